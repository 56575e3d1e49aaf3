"""Moments in bfloat16 and in 8 bits: near float32, in fewer bytes, laid out like weights, kept by checkpoints."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding, trees
from lmlib.optim import moments
from lmlib.optim.adamw import AdamW
from lmlib.optim.lion import Lion
from lmlib.optim.muon import Muon
from lmlib.optim.schedules import Constant, Cosine
from lmlib.optim.state import state_bytes, state_shardings
from lmlib.train import checkpoint

LETTERS = {'blocks': {'up': 'LDF', 'scale': 'LD'}, 'embedding': 'VD'}
SHAPES = {'blocks': {'up': (2, 64, 512), 'scale': (2, 64)}, 'embedding': (96, 64)}
FORMS = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES,
                     is_leaf=lambda x: isinstance(x, tuple))
OPTIMIZERS = [AdamW(Constant(0.1), moments=form) for form in moments.FORMS[1:]] + [
    Lion(Constant(0.1), moments='8bit'), Muon(Constant(0.1), moments='8bit')]
by_name = lambda optimizer: f'{type(optimizer).__name__} {optimizer.moments}'


def draw(seed: int = 0):
  random = np.random.default_rng(seed)
  return jax.tree.map(lambda form: random.standard_normal(form.shape).astype(np.float32), FORMS)


def test_numbers_are_those_of_the_paper():
  """256 of them, equal steps within a decade, the smallest above 0 some 5e-7 of the largest."""
  for signed, numbers in moments.NUMBERS.items():
    assert len(numbers) == len(set(numbers)) == 256
    assert numbers[-1] == 1
    assert 0 in numbers
    assert (numbers.min() < -0.99) == signed
  np.testing.assert_allclose(moments.NUMBERS[True][moments.NUMBERS[True] > 0][0], 5.5e-7, rtol=1e-5)


@pytest.mark.parametrize('signed', [True, False])
def test_8_bits_are_near(signed):
  random = np.random.default_rng(0)
  x = random.standard_normal((8, 512)).astype(np.float32) * 10.0 ** random.integers(-3, 3, (8, 1))
  x = x if signed else x**2
  x[0] = 0
  kept = moments.blocks(x, signed=signed)
  assert kept.code.dtype == jnp.uint8
  assert kept.scale.shape == (8, 2)
  found, scale = moments.array(kept), np.repeat(kept.scale, 256, axis=1)
  # Half of a step of the largest decade, 0.9 / 64 or 0.9 / 128, is the most that a number of a block can be off.
  assert (np.abs(found - x) <= scale * (0.9 / 128 if signed else 0.9 / 256) * 1.001).all()
  assert ((found > 0) == (x > 0)).all() or signed
  assert np.abs(found - x)[np.abs(x) < scale / 1000].max() < (scale / 1000).max() * 0.1  # small ones are nearer


def test_rounding_by_chance_keeps_the_mean():
  x = jnp.full((4000,), 1 + 1 / 1024, jnp.float32)  # an eighth of the way between two numbers
  found = moments.by_chance(x, jax.random.key(0)).astype(jnp.float32)
  assert set(np.unique(found)) == {1, 1 + 1 / 128}
  np.testing.assert_allclose(found.mean(), 1 + 1 / 1024, atol=4 * (1 / 128) * (1 / 8 * 7 / 8 / 4000) ** 0.5)


@pytest.mark.parametrize('optimizer', OPTIMIZERS, ids=by_name)
def test_a_state_takes_less_and_lies_beside_its_weights(optimizer):
  tx = optimizer.transformation(LETTERS, 10)
  plain = type(optimizer)(Constant(0.1)).transformation(LETTERS, 10)
  share = state_bytes(tx, FORMS) / state_bytes(plain, FORMS)
  assert share < (0.51 if optimizer.moments == 'bfloat16' else 0.4)  # the embedding's stay whole
  state = jax.eval_shape(tx.init, FORMS)
  with sharding.use(sharding.Layout(data=1, fsdp=4, tensor=2)):
    placed = state_shardings(tx, FORMS, sharding.placed(LETTERS, FORMS, 'moments'), sharding.replicated())
  assert jax.tree.structure(placed) == jax.tree.structure(state)
  cut = {path: place.shard_shape(trees.flat(state)[path].shape) for path, place in trees.flat(placed).items()}
  found = {shape for path, shape in cut.items() if 'blocks/up' in path}
  assert found == ({(2, 16, 256), (2, 16, 1)} if optimizer.moments == '8bit' else {(2, 16, 256)})


@pytest.mark.parametrize('optimizer', OPTIMIZERS, ids=by_name)
def test_eight_devices_step_as_one_does(optimizer):
  weights, gradients = draw(1), draw(2)
  tx = optimizer.transformation(LETTERS, 10)
  two = lambda g, s, w: tx.update(g, tx.update(g, s, w)[1], w)[0]
  alone = jax.jit(two)(gradients, tx.init(weights), weights)
  with sharding.use(sharding.Layout(data=1, fsdp=4, tensor=2)):
    where = sharding.placed(LETTERS, FORMS)
    state_where = state_shardings(tx, FORMS, where, sharding.replicated())
    state = jax.jit(tx.init, out_shardings=state_where)(jax.device_put(weights, where))
    together = jax.jit(two, in_shardings=(where, state_where, where))(gradients, state, weights)
  for one, eight in zip(*map(jax.tree.leaves, (alone, together))):
    np.testing.assert_allclose(eight, one, rtol=0, atol=2e-6)  # updates are 0.1 or less


def trained(optimizer, steps: int = 150) -> float:
  """The loss after steps of a small regression: a hidden layer learns another one's outputs."""
  random = np.random.default_rng(0)
  x_BD, teacher = random.standard_normal((256, 32)).astype(np.float32), random.standard_normal((32, 8))
  y_BF = np.tanh(x_BD @ teacher / 6).astype(np.float32)
  letters = {'up': 'DF', 'down': 'FD'}
  weights = {'up': random.standard_normal((32, 256)).astype(np.float32) / 6,
             'down': random.standard_normal((256, 8)).astype(np.float32) / 16}
  weights['down'] = np.repeat(weights['down'], 4, axis=1)[:, :32]  # 8192 numbers, of which eight columns are read

  def loss(weights):
    return (((jnp.tanh(x_BD @ weights['up']) @ weights['down'])[:, :8] - y_BF) ** 2).mean()

  tx = optimizer.transformation(letters, steps)

  @jax.jit
  def step(weights, state):
    value, gradients = jax.value_and_grad(loss)(weights)
    updates, state = tx.update(gradients, state, weights)
    return jax.tree.map(jnp.add, weights, updates), state, value

  state = tx.init(weights)
  for _ in range(steps):
    weights, state, value = step(weights, state)
  return float(value)


@pytest.mark.parametrize('make', [AdamW, Lion], ids=lambda make: make.__name__)
def test_training_ends_where_it_ends_in_float32(make):
  peak = {AdamW: 1e-2, Lion: 2e-3}[make]
  ends = {form: trained(make(Cosine(peak, warmup=10), decay=None, beta2=0.99, moments=form)) for form in moments.FORMS}
  assert ends['float32'] < 0.01
  for form in moments.FORMS[1:]:
    assert ends[form] < 1.15 * ends['float32'] + 1e-5, ends


@pytest.mark.parametrize('optimizer', OPTIMIZERS[:2], ids=by_name)
def test_a_checkpoint_gives_it_back(optimizer, tmp_path):
  tx = optimizer.transformation(LETTERS, 10)
  weights = jax.tree.map(jnp.asarray, draw())
  state = {'params': weights, 'optimizer': tx.update(draw(1), tx.init(weights), weights)[1]}
  with_checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  with_checkpoints.save(1, state)
  found = with_checkpoints.restore(jax.eval_shape(lambda: state))[0]
  with_checkpoints.close()
  assert jax.tree.structure(found) == jax.tree.structure(state)
  for a, b in zip(*map(jax.tree.leaves, (found, state))):
    np.testing.assert_array_equal(a, b)


def test_a_form_that_is_none():
  with pytest.raises(ValueError, match=r"adamw.AdamW.moments='int4' must be one of \('float32', 'bfloat16', '8bit'\)"):
    AdamW(Constant(0.1), moments='int4')
