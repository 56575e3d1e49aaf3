"""Four bits a weight: levels, errors, room, and low-rank adapters on top (QLoRA)."""
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from lmlib import trees
from lmlib.models import protocol
from lmlib.nn import adapters, matrices
from lmlib.nn.adapters import Adapter
from lmlib.nn.lora import Lora
from lmlib.quant import nf4
from tests.laws.models import DECODERS, made, tokens

DENSE = DECODERS['dense']


def test_levels_are_quantiles_of_a_normal_distribution():
  """As the paper makes them: 8 quantiles below 0, 9 from 0 on, the ends at an offset, divided by the largest."""
  offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
  above, below = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1]), -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
  expected = np.sort([*above, 0.0, *below])
  np.testing.assert_allclose(nf4.LEVELS, expected / expected.max(), atol=2e-4)  # the published ones are rounded


def test_error_and_room():
  w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 96, 200)).astype(np.float32))
  quantised = nf4.quantised(w)
  error = float(jnp.linalg.norm(quantised.array() - w) / jnp.linalg.norm(w))
  assert 0.06 < error < 0.11  # of the 16 levels of a normal distribution, blocks of 64: 0.09
  assert quantised.shape == w.shape
  assert trees.nbytes(quantised) / w.size * 8 < 4.2
  each = [nf4.quantised(layer[None]).array()[0] for layer in w]
  np.testing.assert_array_equal(jnp.stack(each), quantised.array())  # a layer does not know the others
  sliced = jax.tree.map(lambda x: x[1], quantised)
  np.testing.assert_array_equal(sliced.array(), quantised.array()[1])


def test_every_weight_is_within_half_a_step_of_its_level():
  w = np.random.default_rng(1).normal(size=(1, 64 * 7 + 5)).astype(np.float32)
  found = np.asarray(nf4.quantised(jnp.asarray(w)).array())
  most = np.abs(np.pad(w, [(0, 0), (0, 59)]).reshape(-1, 64)).max(-1).repeat(64)[:w.size]
  # Half of the widest step is 0.152; eight bits move the largest one by up to 1/16 of its distance from the mean.
  assert (np.abs(found[0] - w[0]) <= most * 0.152 + 0.07 * np.abs(most).max()).all()
  assert not nf4.quantised(jnp.zeros((1, 70))).array().any()


def test_qlora_is_lora_on_the_rounded_weights():
  params, boxed, method = made(DENSE), protocol.boxed(DENSE), Lora(3, 6.0, None)
  packed = matrices.quantised(boxed, params)
  rounded = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else x.array(), packed,
                         is_leaf=lambda x: not isinstance(x, dict))
  room = lambda tree: trees.nbytes({path: trees.at(tree, path) for path in matrices.matrices(boxed)})
  assert room(packed) < 0.17 * room(params)  # 4.13 of 32 bits, and the halves of small blocks
  draw = np.random.default_rng(0)
  small = jax.tree.map(lambda x: jnp.asarray(0.3 * draw.normal(size=x.shape).astype(np.float32)),
                       nn.unbox(adapters.boxed(method, boxed)))
  tokens_BT = tokens(DENSE, 2, 6)

  @jax.jit
  def loss_and_gradients(small, base):
    attach = lambda small: adapters.attach(DENSE, base, Adapter(small, method))
    loss = lambda small: (DENSE.model().apply({'params': attach(small)}, tokens_BT)[0]**2).sum()
    return jax.value_and_grad(loss)(small)

  found, expected = loss_and_gradients(small, packed), loss_and_gradients(small, rounded)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    # The same sums in another program: relative to the largest entry of each.
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
  merged = adapters.merge(DENSE, packed, Adapter(small, method))
  assert {type(x) for x in jax.tree.leaves(merged)} == {type(jnp.zeros(1))}
  assert math.prod(merged['blocks']['mlp']['up'].shape) == params['blocks']['mlp']['up'].size
