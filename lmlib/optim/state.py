"""Where the state of an optimizer lives, moments beside their weights, the rest everywhere; and what it takes."""
import math

import jax
from jax.sharding import NamedSharding, PartitionSpec
import optax

from lmlib import trees
from lmlib.optim.moments import Blocks


def state_shardings(transformation: optax.GradientTransformation, shapes, shardings, replicated):
  """The sharding of every array in transformation.init(weights), in a tree like it.

  An array of the state that belongs to a weight and has its shape gets that weight's sharding; counts,
  and the smaller factored moments of Adafactor, get `replicated`. `shapes` and `shardings` are trees like the
  weights, of jax.ShapeDtypeStruct or arrays, and of NamedSharding.
  """
  # A MaskedNode stands where a weight is another optimizer's.
  leaf = lambda x: isinstance(x, (optax.MaskedNode, Blocks))

  def placed(moment, weight, sharding):
    if isinstance(moment, optax.MaskedNode):
      return moment
    if isinstance(moment, Blocks):
      return moment.replace(code=sharding, scale=_of_blocks(moment.scale.shape, sharding))
    return sharding if moment.shape == weight.shape else replicated

  # By shape alone: nothing can be computed on a mesh of devices that are not here.
  init = lambda weights: jax.eval_shape(transformation.init, weights)
  return optax.tree_utils.tree_map_params(
      optax.GradientTransformation(init, transformation.update), placed, init(shapes), shapes, shardings,
      transform_non_params=lambda _: replicated, is_leaf=leaf)


def _of_blocks(shape, sharding: NamedSharding) -> NamedSharding:
  """Where the scales of a weight's blocks lie: beside it, whole along the last axis where that cuts a block."""
  spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
  last = (spec[-1],) if isinstance(spec[-1], str) else spec[-1] or ()
  cut = shape[-1] % math.prod(sharding.mesh.shape[axis] for axis in last)
  return NamedSharding(sharding.mesh, PartitionSpec(*spec[:-1], None if cut else spec[-1]),
                       memory_kind=sharding.memory_kind)


def state_bytes(transformation: optax.GradientTransformation, shapes) -> int:
  """Bytes of the state of an optimizer for these weights, arrays or their shapes; nothing is computed."""
  return trees.nbytes(jax.eval_shape(transformation.init, shapes))
