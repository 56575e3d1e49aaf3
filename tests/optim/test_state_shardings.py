"""Moments lie beside their weights, counts everywhere; eight devices step as one does."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding, trees
from lmlib.optim.adafactor import Adafactor
from lmlib.optim.adamw import AdamW
from lmlib.optim.lion import Lion
from lmlib.optim.muon import Muon
from lmlib.optim.schedules import Constant
from lmlib.optim.state import state_shardings

LETTERS = {'blocks': {'up': 'LDF', 'scale': 'LD'}, 'embedding': 'VD', 'scale': 'D'}
SHAPES = {'blocks': {'up': (2, 16, 24), 'scale': (2, 16)}, 'embedding': (32, 16), 'scale': (16,)}
FORMS = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES,
                     is_leaf=lambda x: isinstance(x, tuple))
BOXED = jax.tree.map(lambda axes, form: sharding.Lettered(form, axes), LETTERS, FORMS)
OPTIMIZERS = [AdamW(Constant(0.1)), Lion(Constant(0.1)), Muon(Constant(0.1)),
              Adafactor(Constant(0.1), shortest=8)]
by_name = lambda optimizer: type(optimizer).__name__


@pytest.mark.parametrize('optimizer', OPTIMIZERS, ids=by_name)
def test_moments_lie_beside_their_weights(optimizer):
  transformation = optimizer.transformation(LETTERS, 10)
  state = jax.eval_shape(transformation.init, FORMS)
  with sharding.use(sharding.Layout(data=1, fsdp=8)):
    replicated, weights = sharding.replicated(), trees.flat(sharding.shardings(BOXED))
    placed = state_shardings(transformation, FORMS, sharding.shardings(BOXED), replicated)
  assert jax.tree.structure(placed) == jax.tree.structure(state)
  shapes, beside = trees.flat(FORMS), dict.fromkeys(weights, 0)
  for path, where in trees.flat(placed).items():
    owners = [name for name in weights if path.endswith('/' + name)]
    owner = max(owners, key=len, default=None)
    if owner and trees.flat(state)[path].shape == shapes[owner].shape:
      assert where == weights[owner] != replicated
      beside[owner] += 1
    else:
      assert where == replicated
  factored = {'blocks/up', 'embedding'} if isinstance(optimizer, Adafactor) else set()
  moments = 2 if isinstance(optimizer, AdamW) else 1
  adam = {'blocks/scale', 'embedding', 'scale'} if isinstance(optimizer, Muon) else set()
  assert beside == {name: 0 if name in factored else 2 if name in adam else moments for name in weights}


@pytest.mark.parametrize('optimizer', OPTIMIZERS, ids=by_name)
def test_eight_devices_step_as_one_does(optimizer):
  random = np.random.default_rng(7)
  draw = lambda: jax.tree.map(lambda form: random.standard_normal(form.shape).astype(np.float32), FORMS)
  weights, gradients = draw(), draw()
  transformation = optimizer.transformation(LETTERS, 10)
  alone, _ = jax.jit(transformation.update)(gradients, transformation.init(weights), weights)
  with sharding.use(sharding.Layout(data=1, fsdp=4, tensor=2)):
    where = sharding.shardings(BOXED)
    state_where = state_shardings(transformation, FORMS, where, sharding.replicated())
    state = jax.jit(transformation.init, out_shardings=state_where)(jax.device_put(weights, where))
    update = jax.jit(transformation.update, in_shardings=(where, state_where, where),
                     out_shardings=(where, state_where))
    together, _ = update(gradients, state, weights)
  for one, eight in zip(*map(jax.tree.leaves, (alone, together))):
    # Sums over devices add in another order; updates are 0.1 or less.
    np.testing.assert_allclose(eight, one, rtol=0, atol=1e-6)
