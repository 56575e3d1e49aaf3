"""Laws that every encoder keeps. Remat is a law of nn/stack.py: decoders and encoder-decoders are tried on it."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.kernels.attention import Pattern
from lmlib.models import encoder, protocol
from lmlib.nn.attention import AttentionStyle
from tests.laws.encoders import BERT, BOTH, ENCODERS, LONG, SHORT, apply, executed, made, padded
from tests.laws.models import tokens

CLOSE = dict(rtol=1e-5, atol=1e-5)  # a hundred roundings of numbers of size 1, as for decoders
configs = pytest.mark.parametrize('config', ENCODERS.values(), ids=ENCODERS.keys())


def logits(config, params, tokens_BT, segments_BT=None, *more):
  return apply(config, params, tokens_BT, segments_BT, None, *more)[0]


@configs
def test_every_place_sees_both_sides(config):
  """Whatever token is another, all states are."""
  params, tokens_BT, all_BT = made(config), tokens(config, 1, BOTH).repeat(2, 0), jnp.ones((2, BOTH), jnp.int32)
  for place in range(BOTH):
    other_BT = tokens_BT.at[1, place].set((tokens_BT[1, place] + 1) % config.vocab)
    out_BTV = logits(config, params, other_BT, all_BT)
    assert np.abs(out_BTV[0] - out_BTV[1]).max(-1).min() > 1e-5


@configs
def test_padding_changes_nothing(config):
  params, rows = made(config), [tokens(config, 1, size)[0] for size in (SHORT, LONG)]
  for left in (False, True):
    out_BTV = logits(config, params, *padded(rows, BOTH, left=left))
    for b, row in enumerate(rows):
      here = slice(BOTH - len(row), BOTH) if left else slice(0, len(row))
      np.testing.assert_allclose(out_BTV[b, here], logits(config, params, row[None])[0], **CLOSE)
    np.testing.assert_allclose(logits(config, params, *padded(rows[::-1], BOTH, left=left))[::-1], out_BTV, **CLOSE)


@configs
def test_packed_texts_do_not_leak(config):
  params, a_BT, b_BT = made(config), tokens(config, 1, SHORT), tokens(config, 1, LONG, seed=3)
  packed_BT = jnp.concatenate([a_BT, b_BT], 1).repeat(2, 0)  # one row of two texts, and one that takes them for one
  packed_BTV = logits(config, params, packed_BT, jnp.array([[1] * SHORT + [2] * LONG, [1] * BOTH]))
  np.testing.assert_allclose(packed_BTV[:1, :SHORT], logits(config, params, a_BT), **CLOSE)
  np.testing.assert_allclose(packed_BTV[:1, SHORT:], logits(config, params, b_BT), **CLOSE)
  assert np.abs(packed_BTV[0] - packed_BTV[1]).max(-1).min() > 0.01


def test_unrolled_layers_are_the_scanned_ones():
  params, rows = made(BERT), padded(tokens(BERT, 2, BOTH), BOTH, left=False)
  np.testing.assert_allclose(logits(executed(BERT, scan=False), params, *rows), logits(BERT, params, *rows), **CLOSE)


def test_mixed_precision_keeps_weights_and_logits_in_float32():
  config = BERT
  mixed, rows = executed(config, dtype='bfloat16'), padded(tokens(config, 2, BOTH), BOTH, left=False)
  assert {x.dtype.name for x in jax.tree.leaves(protocol.boxed(mixed))} == {'float32'}
  params = made(config)
  full_BTV, mixed_BTV = logits(config, params, *rows), logits(mixed, params, *rows)
  assert mixed_BTV.dtype == jnp.float32
  states = jax.eval_shape(lambda p: mixed.model().apply({'params': p}, *rows, method='encode'), params)
  assert states.dtype == jnp.bfloat16
  error = np.linalg.norm(mixed_BTV - full_BTV) / np.linalg.norm(full_BTV)
  assert 0 < error < 0.03  # bfloat16 rounds by 2^-9 = 0.002, a few times over


def test_dropout_belongs_to_the_row():
  dropping, params = executed(BERT, dropout=0.5), made(BERT)
  rows = tokens(BERT, 1, BOTH).repeat(2, 0), jnp.ones((2, BOTH), jnp.int32)
  run = lambda numbers: logits(dropping, params, *rows, jax.vmap(jax.random.key)(jnp.array(numbers)))
  out_BTV = run([5, 6])
  assert np.abs(out_BTV[0] - out_BTV[1]).max() > 0.01
  np.testing.assert_array_equal(*run([7, 7]))
  np.testing.assert_allclose(run([6, 5])[::-1], out_BTV, **CLOSE)


def test_what_an_encoder_cannot_do_is_refused():
  config = ENCODERS['pre-norm']
  params, tokens_BT = made(config), tokens(config, 1, 4)
  with pytest.raises(ValueError, match=r'33 tokens.*length=32'):
    logits(config, params, tokens(config, 1, 33))
  with pytest.raises(ValueError, match=r'types_BT are given, but encoder\.Ends\.types=None'):
    logits(config, params, tokens_BT, None, None, None, tokens_BT * 0)
  with pytest.raises(ValueError, match='takes no cache'):
    config.model().apply({'params': params}, tokens_BT, None, object())
  with pytest.raises(ValueError, match='pooler=False'):
    config.model().apply({'params': params}, jnp.zeros((1, 4, 24)), method='pooled')
  mute = dataclasses.replace(config, ends=encoder.Ends(predicts=False))
  with pytest.raises(ValueError, match='predicts=False'):
    mute.model().apply({'params': made(mute)}, tokens_BT, method='hidden')
  assert jax.eval_shape(lambda p: logits(mute, p, tokens_BT), made(mute)).shape == (1, 4, 24)
  with pytest.raises(ValueError, match=r'causal=True.*sees both sides'):
    dataclasses.replace(config, attention=AttentionStyle(patterns=(Pattern(),)))
  with pytest.raises(ValueError, match='positions=None must be Learned'):
    dataclasses.replace(config, positions=None)
