"""Laws that every decoder keeps."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.models import protocol
from lmlib.nn.layers import dropout
from tests.laws.models import CONFIGS, MAIN, executed, made, smooth, tokens

# float32 sums of different length or order: 1e-5 of logits of size 1 is a hundred roundings.
CLOSE = dict(rtol=1e-5, atol=1e-5)
every = pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS.keys())
configs = pytest.mark.parametrize('config', MAIN.values(), ids=MAIN.keys())
B, T, PROMPT = 3, 12, 8  # what tests agree on, so that equal programs are traced once for several of them


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, *args):
  return config.model().apply({'params': params}, *args)


def logits(config, params, tokens_BT, segments_BT=None):
  return apply(config, params, tokens_BT, segments_BT)[0]


@every
def test_the_future_does_not_change_the_past(config):
  """By gradients: the output at t depends on the embedding of the token at s if s <= t, and only then."""
  params, T = made(config), 6
  tokens_BT = jnp.arange(T)[None]  # all tokens differ, so a row of the table is a position

  def output(table_VD, t):
    model = config.model()
    hidden_BTD, *_ = model.apply({'params': params | {'embedding': table_VD}}, tokens_BT, method='hidden')
    return hidden_BTD[0, t] @ jnp.arange(1.0, config.width + 1)

  rows = jax.jit(lambda table_VD: jax.lax.map(lambda t: jax.grad(output)(table_VD, t), jnp.arange(T)))
  size_TS = np.abs(rows(params['embedding'])).sum(-1)[:, :T]
  np.testing.assert_array_equal(size_TS > 0, np.tri(T, dtype=bool))


@every
def test_packed_documents_do_not_leak(config):
  """Two of 7 and 5 tokens; the first alone has other tokens behind it, which it does not see."""
  params = made(config)
  a_BT, b_BT = tokens(config, B, 7), tokens(config, B, 5, seed=3)
  packed_BT = jnp.concatenate([a_BT, b_BT], 1)
  segments_BT = jnp.concatenate([jnp.full_like(a_BT, 1), jnp.full_like(b_BT, 2)], 1)
  packed_BTV = logits(config, params, packed_BT, segments_BT)
  alone_BTV = logits(config, params, packed_BT)
  np.testing.assert_allclose(packed_BTV[:, :7], alone_BTV[:, :7], **CLOSE)
  np.testing.assert_allclose(packed_BTV[:, 7:], logits(config, params, jnp.pad(b_BT, [(0, 0), (0, 7)]))[:, :5], **CLOSE)
  assert np.abs(alone_BTV[:, 7:] - packed_BTV[:, 7:]).max() > 0.01  # without segments they would


@every
def test_decoding_equals_the_forward_pass(config):
  params, tokens_BT = made(config), tokens(config, B, T)
  real_BT = jnp.ones((B, PROMPT), int)
  out_BTV, cache = apply(config, params, tokens_BT[:, :PROMPT], real_BT, config.cache(B, 16))
  out, at = [out_BTV], PROMPT
  for chunk in (1, 1, 2):
    out_BTV, cache = apply(config, params, tokens_BT[:, at:at + chunk], None, cache)
    out, at = [*out, out_BTV], at + chunk
  np.testing.assert_allclose(jnp.concatenate(out, 1), logits(config, params, tokens_BT), **CLOSE)
  np.testing.assert_array_equal(cache.used_B, [T] * B)


@every
@pytest.mark.parametrize('side', ['left', 'right'])
def test_rows_of_different_length_decode_together(config, side):
  """Padded on either side, which is told by segments 0."""
  params, tokens_BT, lengths_B = made(config), tokens(config, B, T), jnp.array([2, 7, 5])
  real_BT = jnp.arange(PROMPT)[None] < lengths_B[:, None]
  if side == 'right':
    padded_BT = jnp.where(real_BT, tokens_BT[:, :PROMPT], 7)
  else:
    padded_BT = jnp.stack([jnp.roll(jnp.where(real, row[:PROMPT], 7), PROMPT - length)
                           for row, real, length in zip(tokens_BT, real_BT, lengths_B)])
    real_BT = real_BT[:, ::-1]
  _, cache = apply(config, params, padded_BT, real_BT.astype(int), config.cache(B, 16))
  np.testing.assert_array_equal(cache.used_B, lengths_B)
  next_BT = jnp.take_along_axis(tokens_BT, lengths_B[:, None], 1)
  out_BTV, _ = apply(config, params, next_BT, None, cache)
  full_BTV = logits(config, params, tokens_BT)
  for b, length in enumerate(lengths_B):
    np.testing.assert_allclose(out_BTV[b, 0], full_BTV[b, length], **CLOSE)


@configs
def test_scanned_and_unrolled_layers_are_equal(config):
  params, tokens_BT = made(config), tokens(config, 2, 8)
  unrolled = executed(config, scan=False)
  np.testing.assert_allclose(logits(config, params, tokens_BT), logits(unrolled, params, tokens_BT), **CLOSE)


@configs
def test_remat_changes_memory_and_not_numbers(config):
  config = dataclasses.replace(config, layers=4)
  params, tokens_BT = made(config), tokens(config, 4, 32)
  found = {}
  names = ('attended', 'hidden')
  for remat in (None, 'dots', 'full', names):
    model = executed(config, remat=remat)
    gradient = jax.jit(jax.grad(lambda p, m=model: (logits(m, p, tokens_BT)**2).sum()))
    compiled = gradient.lower(params).compile()
    found[remat] = compiled.memory_analysis().temp_size_in_bytes, compiled(params)
  memory = {remat: size for remat, (size, _) in found.items()}
  assert memory['full'] < memory['dots'] < memory[None], memory
  assert memory['full'] < memory[names] < memory[None], memory
  largest = max(np.abs(x).max() for x in jax.tree.leaves(found[None][1]))
  for remat in ('dots', 'full', names):
    for a, b in zip(jax.tree.leaves(found[remat][1]), jax.tree.leaves(found[None][1])):
      # Other orders of sums; that of a bias of keys is 0 but for rounding, so the largest gradient counts too.
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-7 * largest)


@configs
def test_mixed_precision_keeps_weights_and_logits_in_float32(config):
  config = smooth(config)
  mixed = executed(config, dtype='bfloat16')
  params, tokens_BT = protocol.init(mixed, jax.random.key(0)), tokens(config, 2, 8)
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'float32'}
  grads = jax.eval_shape(jax.grad(lambda p: logits(mixed, p, tokens_BT).sum()), params)
  assert {x.dtype.name for x in jax.tree.leaves(grads)} == {'float32'}
  full_BTV, mixed_BTV = logits(config, params, tokens_BT), logits(mixed, params, tokens_BT)
  assert mixed_BTV.dtype == jnp.float32
  hidden_BTD, *_ = jax.eval_shape(lambda p: mixed.model().apply({'params': p}, tokens_BT, method='hidden'), params)
  assert hidden_BTD.dtype == jnp.bfloat16
  error = np.linalg.norm(mixed_BTV - full_BTV) / np.linalg.norm(full_BTV)
  assert 0 < error < 0.03  # bfloat16 rounds by 2^-9 = 0.002, a few times over


@configs
def test_dropout_belongs_to_the_row(config):
  dropping = executed(config, dropout=0.5)
  params, tokens_BT = made(config), tokens(config, 1, 8).repeat(3, 0)
  keys_B = jax.vmap(jax.random.key)(jnp.array([5, 6, 5]))
  run = lambda tokens, keys: apply(dropping, params, tokens, None, None, keys)[0]
  out_BTV = run(tokens_BT, keys_B)
  np.testing.assert_array_equal(out_BTV[0], out_BTV[2])
  assert np.abs(out_BTV[0] - out_BTV[1]).max() > 0.01
  np.testing.assert_allclose(run(tokens_BT[:1], keys_B[:1])[0], out_BTV[0], **CLOSE)
  np.testing.assert_array_equal(run(tokens_BT, None), logits(config, params, tokens_BT))


def test_dropout_keeps_the_mean_and_drops_the_share():
  y_BTD = dropout(jnp.ones((4, 64, 64)), jax.random.split(jax.random.key(0), 4), 0.3)
  share = float((y_BTD == 0).mean())
  assert abs(share - 0.3) < 0.02  # 16384 draws: five standard deviations are 0.018
  np.testing.assert_allclose(y_BTD[y_BTD != 0], 1 / 0.7, rtol=1e-6)


@configs
def test_a_new_model_knows_nothing(config):
  """Its first loss is near log V: logits of size 1 add 1/2, and little more."""
  params, tokens_BT = protocol.init(config, jax.random.key(3)), tokens(config, 8, 32)
  logp_BTV = jax.nn.log_softmax(logits(config, params, tokens_BT))
  nats = -jnp.take_along_axis(logp_BTV[:, :-1], tokens_BT[:, 1:, None], -1).mean()
  assert np.log(config.vocab) - 0.2 < nats < np.log(config.vocab) + 0.8


@configs
def test_a_sequence_longer_than_the_model_is_refused(config):
  with pytest.raises(ValueError, match=r'33 tokens.*length=32'):
    logits(config, made(config), tokens(config, 1, 33))
