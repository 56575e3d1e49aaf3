"""One step: sums divided once, microbatches, devices, non-finite numbers."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlib import sharding, trees
from lmlib.models import protocol
from lmlib.optim.adamw import AdamW
from lmlib.optim.schedules import Constant
from lmlib.train import checkpoint, layers, losses
from lmlib.train import step as step_of
from tests.laws.models import CONFIGS

CONFIG = CONFIGS['dense']
LOSS = losses.NextToken(z_loss=1e-3).of(CONFIG)


def batch(B: int = 8, T: int = 16, seed: int = 0):
  """Packed rows, some positions without weight, rows of different weight."""
  random = np.random.default_rng(seed)
  segments_BT = np.cumsum(random.random((B, T)) < 0.1, axis=1, dtype=np.int32) + 1
  return {'tokens_BT': random.integers(0, CONFIG.vocab, (B, T), dtype=np.int32),
          'targets_BT': random.integers(0, CONFIG.vocab, (B, T), dtype=np.int32), 'segments_BT': segments_BT,
          'weight_BT': (random.random((B, T)) < random.random((B, 1))).astype(np.float32),
          'row_B': np.arange(B, dtype=np.uint32)}


def transformation(steps: int = 10):
  return AdamW(Constant(1e-2)).transformation(sharding.letters(protocol.boxed(CONFIG)), steps)


def after(layout, microbatches: int = 1, steps: int = 2):
  """(params, metrics) after some steps."""
  devices = jax.devices()[:1] if layout is None else None
  with sharding.use(layout or sharding.Layout(), devices):
    tx = transformation()
    state = step_of.init(CONFIG, tx, jax.random.key(0))
    step = step_of.compiled(LOSS, tx, microbatches, step_of.shapes(CONFIG, tx))
    for i in range(steps):
      state, metrics = step(state, sharding.placer()(batch(seed=i)))
    return jax.device_get((state.params, metrics))


@pytest.fixture(scope='module')
def one_device():
  return after(None)


def assert_close(found, expected):
  for name in ('loss', 'nats', 'accuracy', 'grad_norm', 'param_norm', 'update_norm', 'weight'):
    np.testing.assert_allclose(found[1][name], expected[1][name], rtol=2e-5, err_msg=name)  # float32, other order
  for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0])):
    # Adam divides by sqrt of the second moment: where a gradient is near 0, rounding moves a weight by up to
    # a small share of the learning rate of 1e-2.
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize('microbatches', [2, 4, 8])
def test_microbatches_equal_the_large_batch(microbatches, one_device):
  assert_close(after(None, microbatches), one_device)


@pytest.mark.parametrize('layout', [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=4, tensor=2, zero=2),
                                    dict(data=2, context=2, tensor=2, sequence=True),
                                    dict(data=2, fsdp=4, zero=1, offload=True)], ids=str)
def test_eight_devices_equal_one(layout, one_device):
  """Every strategy once; plan/verify_matrix.py has more."""
  assert_close(after(sharding.Layout(**layout)), one_device)


def test_microbatches_on_several_devices_equal_one(one_device):
  assert_close(after(sharding.Layout(data=2, fsdp=2, tensor=2), 2), one_device)


def test_weights_and_moments_are_split_by_fsdp():
  with sharding.use(sharding.Layout(data=1, fsdp=8)):
    tx = transformation()
    state = step_of.init(CONFIG, tx, jax.random.key(0))
    step = step_of.compiled(LOSS, tx, 1, step_of.shapes(CONFIG, tx))
    state, _ = step(state, sharding.placer()(batch()))
    for tree in (state.params, state.optimizer):
      big = [x for x in jax.tree.leaves(tree) if x.size >= CONFIG.width**2]
      assert big
      assert all(x.addressable_shards[0].data.size == x.size // 8 for x in big)


@pytest.mark.parametrize('zero', [1, 2, 3])
def test_a_device_holds_what_zero_says(zero):
  """Bytes of a program's arguments: weights, whole or split, moments, split, and a device's share of the batch."""
  with sharding.use(sharding.Layout(data=1, fsdp=8, zero=zero)):
    tx = transformation()
    shapes = step_of.shapes(CONFIG, tx)
    given = sharding.placer()({name: x for name, x in batch().items() if name != 'row_B'})  # no dropout reads it
    program = step_of.compiled(LOSS, tx, 1, shapes).lower(shapes, given).compile()
  weights = trees.nbytes(shapes.params)  # every one has the width as an axis, which 8 divides
  counts = trees.nbytes(shapes) - 3 * weights
  share = weights * (3 if zero == 3 else 2) // 8 + weights * (zero < 3)
  assert program.memory_analysis().argument_size_in_bytes == share + counts + trees.nbytes(given) // 8


def test_moments_wait_on_hosts(tmp_path):
  """After a step and out of a checkpoint; and what looks into layers reads them there."""
  with sharding.use(sharding.Layout(data=1, fsdp=8, offload=True)):
    tx = transformation()
    shapes = step_of.shapes(CONFIG, tx)
    step = step_of.compiled(LOSS, tx, 1, shapes)
    state, _ = step(step_of.init(CONFIG, tx, jax.random.key(0)), sharding.placer()(batch()))
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state)
    restored, *_ = checkpoints.restore(shapes)
    checkpoints.close()
    for x, y, shape in zip(*map(jax.tree.leaves, (state, restored, shapes))):
      np.testing.assert_array_equal(jax.device_get(x), jax.device_get(y))
      assert x.sharding == y.sharding == shape.sharding
    kinds = {kind: sum(x.nbytes for x in jax.tree.leaves(state) if x.sharding.memory_kind == kind)
             for kind in ('device', sharding.HOST)}
    weights = trees.nbytes(state.params)
    assert kinds[sharding.HOST] == 2 * weights
    assert kinds['device'] == trees.nbytes(state) - 2 * weights
    found = layers.compiled(LOSS, tx)(restored, sharding.placer()(batch(seed=1)))[1]
    assert all(norm > 0 for norm in jax.tree.leaves(layers.plain(found['update'])))
    bad = batch() | {'weight_BT': np.full((8, 16), np.inf, np.float32)}
    after_bad, metrics = step(restored, sharding.placer()(bad))
    assert (metrics['finite'], after_bad.skipped) == (0, 1)
    for x, y in zip(*map(jax.tree.leaves, ((after_bad.params, after_bad.optimizer), (state.params, state.optimizer)))):
      np.testing.assert_array_equal(jax.device_get(x), jax.device_get(y))


def test_the_loss_is_the_weighted_mean():
  """Against NumPy in float64, from the logits."""
  params, one = protocol.init(CONFIG, jax.random.key(0)), batch()
  logits_BTV = np.asarray(CONFIG.model().apply({'params': params}, one['tokens_BT'], one['segments_BT'])[0], np.float64)
  lse_BT = np.log(np.exp(logits_BTV).sum(-1))
  nats_BT = lse_BT - np.take_along_axis(logits_BTV, one['targets_BT'][..., None], -1)[..., 0]
  weight_BT = one['weight_BT']
  total, weight, metrics = LOSS(params, one)
  assert weight == weight_BT.sum()
  np.testing.assert_allclose(metrics['nats'], (nats_BT * weight_BT).sum(), rtol=1e-5)
  np.testing.assert_allclose(total, ((nats_BT + 1e-3 * lse_BT**2) * weight_BT).sum(), rtol=1e-5)
  right_BT = logits_BTV.argmax(-1) == one['targets_BT']
  np.testing.assert_allclose(metrics['accuracy'], (right_BT * weight_BT).sum())


def test_a_step_that_is_not_finite_changes_nothing_but_the_count():
  tx = transformation()
  state = step_of.init(CONFIG, tx, jax.random.key(0))
  step = jax.jit(step_of.make_step(LOSS, tx))
  bad = batch() | {'weight_BT': np.full((8, 16), np.inf, np.float32)}
  after_bad, metrics = step(state, bad)
  assert metrics['finite'] == 0
  assert (after_bad.step, after_bad.skipped) == (1, 1)
  for tree in ('params', 'optimizer'):
    for a, b in zip(jax.tree.leaves(getattr(after_bad, tree)), jax.tree.leaves(getattr(state, tree))):
      np.testing.assert_array_equal(a, b)
  good, metrics = step(after_bad, batch())
  assert metrics['finite'] == 1
  assert (good.step, good.skipped) == (2, 1)
  assert not np.array_equal(good.params['embedding'], state.params['embedding'])


def test_grad_norm_is_the_one_before_clipping():
  params, one = protocol.init(CONFIG, jax.random.key(0)), batch()
  tx = AdamW(Constant(1e-2), clip=1e-3).transformation(sharding.letters(protocol.boxed(CONFIG)), 10)
  _, metrics = jax.jit(step_of.make_step(LOSS, tx))(step_of.State.create(params, tx), one)
  grads = jax.grad(lambda p: LOSS(p, one)[0])(params)
  expected = optax.tree.norm(grads) / one['weight_BT'].sum()
  assert expected > 1e-2
  np.testing.assert_allclose(metrics['grad_norm'], expected, rtol=1e-5)


def test_it_learns_one_batch():
  tx = AdamW(Constant(1e-2)).transformation(sharding.letters(protocol.boxed(CONFIG)), 100)
  state, step = step_of.init(CONFIG, tx, jax.random.key(0)), jax.jit(step_of.make_step(LOSS, tx))
  one = jax.tree.map(jnp.asarray, batch(4))
  for _ in range(80):
    state, metrics = step(state, one)
  assert metrics['nats'] < 0.5, metrics
