"""Where the state of an optimizer lives, moments beside their weights, the rest everywhere; and what it takes."""
import jax
import optax

from lmlib import trees


def state_shardings(transformation: optax.GradientTransformation, shapes, shardings, replicated):
  """The sharding of every array in transformation.init(weights), in a tree like it.

  An array of the state that belongs to a weight and has its shape gets that weight's sharding; counts,
  and the smaller factored moments of Adafactor, get `replicated`. `shapes` and `shardings` are trees like the
  weights, of jax.ShapeDtypeStruct or arrays, and of NamedSharding.
  """
  masked = lambda x: isinstance(x, optax.MaskedNode)  # stands where a weight is another optimizer's

  def placed(moment, weight, sharding):
    if masked(moment):
      return moment
    return sharding if moment.shape == weight.shape else replicated

  # By shape alone: nothing can be computed on a mesh of devices that are not here.
  init = lambda weights: jax.eval_shape(transformation.init, weights)
  return optax.tree_utils.tree_map_params(
      optax.GradientTransformation(init, transformation.update), placed, init(shapes), shapes, shardings,
      transform_non_params=lambda _: replicated, is_leaf=masked)


def state_bytes(transformation: optax.GradientTransformation, shapes) -> int:
  """Bytes of the state of an optimizer for these weights, arrays or their shapes; nothing is computed."""
  return trees.nbytes(jax.eval_shape(transformation.init, shapes))
