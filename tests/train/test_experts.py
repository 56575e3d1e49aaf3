"""Training a mixture of experts: what routers add to loss, metrics and steps; modules for further tokens."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlib import sharding, trees
from lmlib.models import protocol
from lmlib.nn.moe import Experts
from lmlib.nn.router import TopK
from lmlib.optim.adamw import AdamW
from lmlib.optim.schedules import Constant
from lmlib.train import losses, metrics
from lmlib.train import step as step_of
from tests.laws.models import CONFIGS, made

ROUTER = TopK(2, score='sigmoid', balanced=True, capacity=1.5, balance_loss=0.1, z_loss=0.01)
CONFIG = dataclasses.replace(CONFIGS['moe'], layers=1, experts=Experts(4, 16, ROUTER, shared=8))
FUTURE = dataclasses.replace(CONFIGS['latent_moe'], future=2)


def batch(B: int = 8, T: int = 12, seed: int = 0, J: int | None = None):
  """Rows of documents, padding and positions without weight."""
  random = np.random.default_rng(seed)
  segments_BT = np.cumsum(random.random((B, T)) < 0.1, axis=1, dtype=np.int32) + 1
  segments_BT[np.arange(T)[None] >= random.integers(T // 2, T + 1, (B, 1))] = 0
  whole = lambda *shape: random.integers(0, CONFIG.vocab, shape, dtype=np.int32)
  weight_BT = ((random.random((B, T)) < 0.8) & (segments_BT > 0)).astype(np.float32)
  found = {'tokens_BT': whole(B, T), 'targets_BT': whole(B, T), 'segments_BT': segments_BT, 'weight_BT': weight_BT}
  if J is not None:
    found |= {'targets_BTJ': whole(B, T, J), 'weight_BTJ': np.repeat(weight_BT[..., None], J, -1)}
  return found


@functools.cache
def after(layout, microbatches: int = 1):
  """(weights, metrics) after a step."""
  devices = jax.devices()[:1] if layout is None else None
  with sharding.use(layout or sharding.Layout(), devices):
    tx = AdamW(Constant(1e-2)).transformation(sharding.letters(protocol.boxed(CONFIG)), 10)
    state = step_of.init(CONFIG, tx, jax.random.key(0))
    step = step_of.compiled(losses.NextToken().of(CONFIG), tx, microbatches, step_of.shapes(CONFIG, tx))
    state, found = step(state, sharding.placer()(batch()))
    return jax.device_get((trees.flat(state.params), found))


@pytest.mark.parametrize(('layout', 'microbatches'), [
    (None, 4), (sharding.Layout(data=1, fsdp=2, expert=2, tensor=2), 1)])
def test_microbatches_and_devices_equal_one(layout, microbatches):
  (params, found), (expected_params, expected) = after(layout, microbatches), after(None)
  assert {'auxiliary', 'expert_load', 'router_entropy', 'dropped'} <= found.keys() == expected.keys()
  assert metrics.flattened(found)['expert_load'] == metrics.flattened(expected)['expert_load']
  for name in expected:
    np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, err_msg=name)  # float32, other order
  for name, weight in expected_params.items():
    # As in test_step: Adam moves a weight by a share of the rate where its gradient is near 0.
    np.testing.assert_allclose(params[name], weight, rtol=1e-4, atol=2e-4, err_msg=name)
  np.testing.assert_array_equal(*(p['blocks/experts/balance_bias'] for p in (params, expected_params)))


def test_what_a_step_makes_of_loads():
  """Offsets go down by the rate where an expert has more than its share, up where it has less."""
  params, found = after(None)
  load_LE = found['expert_load']
  assert load_LE.shape == (1, 4)
  np.testing.assert_allclose(load_LE.sum(), 4, rtol=1e-6)
  np.testing.assert_allclose(params['blocks/experts/balance_bias'], -1e-3 * np.sign(load_LE - 1), rtol=1e-6)
  assert 0 < found['dropped'] < 1
  assert found['auxiliary'] > 0.09


def test_offsets_are_in_no_norm():
  """However wrong the loads are, the norm of the gradient and what clipping makes of it are those of the slopes."""
  letters, weights = {'up': 'DF'}, {'up': jnp.full((2, 3), 0.5)}

  def stepped(letters, weights):
    loss = lambda p, _: ((p['up']**2).sum() + 1e6 * p.get('balance_bias', jnp.zeros(1)).sum(), jnp.float32(1), {})
    tx = AdamW(Constant(1e-2), clip=0.1, epsilon=0.1).transformation(letters, 10)
    return jax.jit(step_of.make_step(loss, tx))(step_of.State.create(weights, tx), {})

  expected = stepped(letters, weights)
  found = stepped(letters | {'balance_bias': 'E'}, weights | {'balance_bias': jnp.ones(2)})
  np.testing.assert_allclose(found[1]['grad_norm'], 6**0.5, rtol=1e-6)
  np.testing.assert_array_equal(found[0].params['up'], expected[0].params['up'])
  np.testing.assert_allclose(found[0].params['balance_bias'], 1 - 1e-3)


def test_a_skewed_load_evens_out():
  """Scores that favour two experts of eight; nothing but their offsets is trained."""
  x = np.random.default_rng(0).normal(size=(16, 64, 8)) + np.array([2.0, 1, 0, 0, 0, 0, -1, -1])
  logits_BTE, real_BT = jnp.asarray(x, jnp.float32), jnp.ones((16, 64), bool)
  router = TopK(2, score='sigmoid', balanced=True)
  tx = AdamW(Constant(1e-3), rate_balance=5e-3).transformation({'balance_bias': 'E', 'other': 'D'}, 200)

  def load(weights):
    routing = router.route(logits_BTE, real_BT, weights['balance_bias'])
    count_E, even = routing.sums['expert_load_E']
    return routing.weight_BM.sum() + weights['other'].sum(), count_E / even

  def step(carry, _):
    weights, state = carry
    gradient, load_E = jax.grad(load, has_aux=True)(weights)
    updates, state = tx.update(gradient, state, weights)
    return (optax.apply_updates(weights, updates), state), load_E

  weights = {'balance_bias': jnp.zeros(8), 'other': jnp.zeros(2)}
  load_SE = np.asarray(jax.jit(lambda: jax.lax.scan(step, (weights, tx.init(weights)), None, 200)[1])())
  assert load_SE[0].max() > 2.5
  assert load_SE[0].min() < 0.5
  assert np.abs(load_SE[-1] - 1).max() < 0.1  # an offset goes on moving by the rate, past which lie some tokens


@functools.cache
def further():
  """(total, weight, metrics, gradients, predictions x_LBTD) of the model with modules."""
  params, one, loss = made(FUTURE), batch(2, 8, J=3), losses.MultiToken(weight=0.5).of(FUTURE)

  @jax.jit
  def run(params, one):
    (total, found), gradients = jax.value_and_grad(
        lambda p: (lambda total, *rest: (total, rest))(*loss(p, one)), has_aux=True)(params)
    apply = lambda *args, method: FUTURE.model().apply({'params': params}, *args, method=method)
    x_BTD, *_ = apply(one['tokens_BT'], one['segments_BT'], method='hidden')
    x_LBTD, _ = apply(x_BTD, one['targets_BTJ'][..., :-1], one['segments_BT'], method='future')
    changed_BTJ = one['targets_BTJ'].at[:, 4:].add(1)
    later_LBTD, _ = apply(x_BTD, changed_BTJ[..., :-1], one['segments_BT'], method='future')
    return total, *found, gradients, x_LBTD, later_LBTD, apply(method='unembed')

  return one, run(params, jax.tree.map(jnp.asarray, one))


def test_the_loss_of_further_tokens():
  """In NumPy, from what the modules predict."""
  one, (total, weight, found, _, x_LBTD, _, output_DV) = further()
  assert weight == one['weight_BT'].sum()
  nats = []
  for j in (1, 2):
    logits_BTV = np.asarray(x_LBTD[j - 1], np.float64) @ np.asarray(output_DV, np.float64)
    target_BT = np.take_along_axis(logits_BTV, one['targets_BTJ'][..., j, None], -1)[..., 0]
    nats.append(((np.log(np.exp(logits_BTV).sum(-1)) - target_BT) * one['weight_BTJ'][..., j]).sum())
    value, its_weight = found[f'nats_{j + 1}']
    np.testing.assert_allclose(value, nats[-1], rtol=1e-5)
    assert its_weight == one['weight_BTJ'][..., j].sum()
  np.testing.assert_allclose(total, found['nats'] + 0.5 * np.mean(nats), rtol=1e-5)


def test_modules_are_trained_and_see_no_later_token():
  *_, gradients, x_LBTD, later_LBTD, _ = further()[1]
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients))
  np.testing.assert_array_equal(x_LBTD[:, :, :4], later_LBTD[:, :, :4])
  assert np.abs(x_LBTD[:, 0, 4] - later_LBTD[:, 0, 4]).max() > 1e-3


def test_a_loss_and_a_model_of_other_numbers_of_tokens_are_refused():
  with pytest.raises(ValueError, match='NextToken does not train'):
    losses.NextToken().of(FUTURE)
  with pytest.raises(ValueError, match='latent_moe has future=0'):
    losses.MultiToken().of(CONFIGS['latent_moe'])
  for J, said in ((None, 'gives 1: it must be'), (2, r'gives 2: it must be MultiToken\(tokens=3\)')):
    with pytest.raises(ValueError, match=said):
      losses.MultiToken().of(FUTURE)(None, batch(2, 4, J=J))
  with pytest.raises(ValueError, match='weight=0'):
    losses.MultiToken(weight=0)


def test_a_line_has_the_load_of_every_expert_and_the_extremes_of_all_layers():
  found = metrics.flattened({'loss': 2.0, 'expert_load': np.array([[0.5, 1.5], [1.0, 1.0]])})
  assert found == {'loss': 2.0, 'expert_load': [0.75, 1.25], 'expert_load_min': 0.5, 'expert_load_max': 1.5}
  assert metrics.finite({'a': [1.0, float('nan')], 'b': float('inf')}) == {'a': [1.0, None], 'b': None}
