"""Laws that every encoder-decoder keeps."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.kernels.attention import Pattern
from lmlib.models import protocol
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from tests.laws.encoders import BOTH, ENCODER_DECODERS, LONG, SHORT, T5, apply, executed, made, padded
from tests.laws.models import tokens

PAIRS = (SHORT, LONG), (LONG, SHORT)  # tokens of the decoder, and inputs
ALL_BT = jnp.ones((2, BOTH), jnp.int32)
CLOSE = dict(rtol=1e-5, atol=1e-5)  # a hundred roundings of numbers of size 1, as for decoders
configs = pytest.mark.parametrize('config', ENCODER_DECODERS.values(), ids=ENCODER_DECODERS.keys())


def logits(config, params, tokens_BT, inputs_BS, segments_BT=None, input_segments_BS=None, dropout_B=None):
  return apply(config, params, tokens_BT, segments_BT, None, dropout_B, inputs_BS, input_segments_BS)[0]


@configs
def test_outputs_see_all_inputs_and_their_own_past(config):
  """Another token changes the outputs from its place on, bit by bit no other; another input changes all."""
  params, rows = made(config), [tokens(config, 1, BOTH, seed=seed).repeat(2, 0) for seed in (2, 3)]
  for side, seen in ((0, np.tri(BOTH, dtype=bool).T), (1, np.ones((BOTH, BOTH), bool))):
    for place in range(BOTH):
      changed = list(rows)
      changed[side] = rows[side].at[1, place].set((rows[side][1, place] + 1) % config.vocab)
      out_BTV = logits(config, params, *changed, ALL_BT, ALL_BT)
      np.testing.assert_array_equal(np.abs(out_BTV[0] - out_BTV[1]).max(-1) > 0, seen[place])


@configs
def test_padding_of_either_side_changes_nothing(config):
  """Nor does a cache: decoding equals the forward pass, of rows of different lengths on both sides."""
  params, rows = made(config), [(tokens(config, 1, t)[0], tokens(config, 1, s)[0]) for t, s in PAIRS]
  alone = [logits(config, params, row[None], inputs[None])[0] for row, inputs in rows]
  for left in (False, True):
    tokens_BT, segments_BT = padded([row[:-2] for row, _ in rows], BOTH, left=left)
    inputs = padded([inputs for _, inputs in rows], BOTH, left=left)
    first_BTV, cache = apply(config, params, tokens_BT, segments_BT, config.cache(2, 16), None, *inputs)
    next_BTV, cache = apply(config, params, jnp.stack([row[-2:-1] for row, _ in rows]), None, cache)
    last_BTV, cache = apply(config, params, jnp.stack([row[-1:] for row, _ in rows]), None, cache)
    np.testing.assert_array_equal(cache.used_B, [len(row) for row, _ in rows])
    for out_BTV in (first_BTV, logits(config, params, tokens_BT, inputs[0], segments_BT, inputs[1])):
      for b, (row, _) in enumerate(rows):
        here = slice(BOTH - len(row) + 2, BOTH) if left else slice(0, len(row) - 2)
        np.testing.assert_allclose(jnp.concatenate([out_BTV[b, here], next_BTV[b], last_BTV[b]]), alone[b], **CLOSE)


@configs
def test_packed_texts_do_not_leak(config):
  """Row 0 holds two texts; where row 1 takes the tokens or the inputs for one text, its outputs are others."""
  params = made(config)
  a, b = ((tokens(config, 1, t), tokens(config, 1, s)) for t, s in PAIRS)
  tokens_BT, inputs_BS = (jnp.concatenate(x, 1).repeat(2, 0) for x in zip(a, b))
  number_T, number_S = (1 + (jnp.arange(BOTH) >= size) for size in PAIRS[0])
  for segments in ((jnp.stack([number_T, number_T]), jnp.stack([number_S, ALL_BT[0]])),
                   (jnp.stack([number_T, ALL_BT[0]]), jnp.stack([number_S, number_S]))):
    packed_BTV = logits(config, params, tokens_BT, inputs_BS, *segments)
    np.testing.assert_allclose(packed_BTV[:1, :SHORT], logits(config, params, *a), **CLOSE)
    np.testing.assert_allclose(packed_BTV[:1, SHORT:], logits(config, params, *b), **CLOSE)
    assert np.abs(packed_BTV[0] - packed_BTV[1]).max() > 0.01


def whole():
  return tokens(T5, 2, BOTH), tokens(T5, 2, BOTH, seed=3), ALL_BT, ALL_BT


def test_unrolling_and_remat_change_no_number():
  params, rows = made(T5), whole()
  gradient = lambda config: jax.jit(jax.grad(lambda p: (logits(config, p, *rows)**2).mean()))(params)
  for a, b in zip(*(jax.tree.leaves(gradient(config)) for config in (T5, executed(T5, remat='full', scan=False)))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())  # other order of sums


def test_rows_do_not_know_of_each_other_and_are_right_in_bfloat16():
  mixed, params, rows = executed(T5, dtype='bfloat16'), made(T5), whole()
  assert {x.dtype.name for x in jax.tree.leaves(protocol.boxed(mixed))} == {'float32'}
  full_BTV, mixed_BTV = (logits(c, params, *rows) for c in (T5, mixed))
  np.testing.assert_allclose(logits(T5, params, *(x[::-1] for x in rows))[::-1], full_BTV, **CLOSE)
  assert mixed_BTV.dtype == jnp.float32
  assert jax.tree.leaves(mixed.cache(1, 2).own.layers)[0].dtype == jnp.bfloat16
  error = np.linalg.norm(mixed_BTV - full_BTV) / np.linalg.norm(full_BTV)
  assert 0 < error < 0.03  # bfloat16 rounds by 2^-9 = 0.002, a few times over


def test_dropout_belongs_to_the_row():
  dropping, params, rows = executed(T5, dropout=0.5), made(T5), [x[:1].repeat(2, 0) for x in whole()]
  run = lambda numbers: logits(dropping, params, *rows, jax.vmap(jax.random.key)(jnp.array(numbers)))
  out_BTV = run([5, 6])
  assert np.abs(out_BTV[0] - out_BTV[1]).max() > 0.01
  np.testing.assert_array_equal(*run([7, 7]))
  np.testing.assert_allclose(run([6, 5])[::-1], out_BTV, **CLOSE)


def test_what_an_encoder_decoder_cannot_do_is_refused():
  params, tokens_BT = made(T5), tokens(T5, 1, 4)
  with pytest.raises(ValueError, match='inputs_BS are missing'):
    apply(T5, params, tokens_BT)
  with pytest.raises(ValueError, match='inputs_BS are missing'):
    apply(T5, params, tokens_BT, None, T5.cache(1, 8))
  _, cache = jax.eval_shape(lambda p: apply(T5, p, tokens_BT, None, T5.cache(1, 8), None, tokens_BT), params)
  with pytest.raises(ValueError, match='the cache holds some'):
    jax.eval_shape(lambda p, cache: apply(T5, p, tokens_BT, None, cache, None, tokens_BT), params, cache)
  for too_long in ((tokens(T5, 1, 33), tokens_BT), (tokens_BT, tokens(T5, 1, 33))):
    with pytest.raises(ValueError, match=r'33 tokens.*length=32'):
      logits(T5, params, *too_long)
  with pytest.raises(ValueError, match=r'a cache of 33.*length=32'):
    apply(T5, params, tokens_BT, None, T5.cache(1, 33), None, tokens_BT)
  with pytest.raises(ValueError, match=r"place='post'.*must have place='pre'"):
    dataclasses.replace(T5, norms=Norms(place='post'))
  with pytest.raises(ValueError, match=r'window=4.*must be one'):
    dataclasses.replace(T5, attention=AttentionStyle(patterns=(Pattern(window=4),)))
  with pytest.raises(ValueError, match='sinks=True must be False'):
    dataclasses.replace(T5, attention=AttentionStyle(sinks=True))
