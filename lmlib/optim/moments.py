"""An optimizer's moments in fewer bits: bfloat16, or 8 bits with a scale a block (Dettmers et al. 2022).

They are stored so between steps and are float32 within one. bfloat16 rounds up or down by chance, with odds that keep
the mean: rounded to the nearest, a second moment would not feel what is less than 1/256 of it. Chance is a function of
the step, so a run repeats.

8 bits are an index into 256 numbers that lie as those of the paper do: seven decades, each with twice as many numbers
as the one below. A block is a run along the last axis with one scale, its largest value: in the paper 2048 numbers,
here at most 256. Second moments need no sign, and above 0 they stay above 0, for updates are divided by
them. Those of weights with a vocabulary and of small ones stay float32, as in the paper.
"""
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

FORMS = ('float32', 'bfloat16', '8bit')
BLOCK, SMALLEST, LEAST = 256, 4096, 16  # the longest block, the smallest array and the shortest block of 8 bits


class Blocks(struct.PyTreeNode):
  """An array in 8 bits: codes, of its shape, and scales, which have blocks in the place of the last axis."""
  code: jax.Array
  scale: jax.Array
  signed: bool = struct.field(pytree_node=False)


class Stored(NamedTuple):
  """The state of an optimizer whose moments are stored in fewer bits."""
  count: jax.Array
  inner: optax.OptState


def stored(transformation: optax.GradientTransformation, form: str, letters) -> optax.GradientTransformation:
  """The transformation with its moments, of weights of these letters, in a form of FORMS between steps."""
  if form == 'float32':
    return transformation

  def init(weights):
    return Stored(jnp.int32(0), _encoded(transformation.init(weights), form, letters, jnp.int32(0)))

  def update(updates, state, weights=None):
    updates, inner = transformation.update(updates, _decoded(state.inner), weights)
    return updates, Stored(state.count + 1, _encoded(inner, form, letters, state.count + 1))

  return optax.GradientTransformation(init, update)


def _encoded(state, form: str, letters, count):
  """A state with each of its moments in a form. Those of Adam, Lion and Muon are trees like the weights."""
  of_vocabulary = [path for path, axes in jax.tree_util.tree_leaves_with_path(letters) if 'V' in axes]
  leaves, tree = jax.tree_util.tree_flatten_with_path(state)
  found = []
  for i, (path, x) in enumerate(leaves):
    if not jnp.issubdtype(x.dtype, jnp.floating) or not x.ndim:
      found.append(x)
    elif form == 'bfloat16':
      found.append(by_chance(x, jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), count)))
    elif x.size < SMALLEST or _block(x) < LEAST or any(path[-len(tail):] == tail for tail in of_vocabulary):
      found.append(x)
    else:
      found.append(blocks(x, signed=not any(getattr(key, 'name', None) == 'nu' for key in path)))
  return jax.tree.unflatten(tree, found)


def _decoded(state):
  return jax.tree.map(array, state, is_leaf=lambda x: isinstance(x, Blocks))


def array(x) -> jax.Array:
  """A moment as it is computed with, float32."""
  if isinstance(x, Blocks):
    share = jnp.asarray(NUMBERS[x.signed])[x.code].reshape(*x.scale.shape, -1)
    return (share * x.scale[..., None]).reshape(x.code.shape)
  return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def by_chance(x: jax.Array, key: jax.Array) -> jax.Array:
  """x in bfloat16, rounded to one of its neighbours so that the mean is x."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  dither = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  cut = jax.lax.bitcast_convert_type((bits + dither) & jnp.uint32(0xffff0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def blocks(x: jax.Array, *, signed: bool) -> Blocks:
  """x in 8 bits: of every number the nearest of NUMBERS, times the largest of its block."""
  cut = x.reshape(*x.shape[:-1], -1, _block(x))
  scale = jnp.abs(cut).max(-1)
  share = cut / jnp.where(scale > 0, scale, 1)[..., None]
  numbers = NUMBERS[signed]
  code = jnp.searchsorted(jnp.asarray((numbers[1:] + numbers[:-1]) / 2), share).astype(jnp.uint8)
  if not signed:
    code = jnp.maximum(code, (share > 0).astype(jnp.uint8))
  return Blocks(code.reshape(x.shape), scale, signed)


def _block(x) -> int:
  """How long a block of x is: the most that divide its last axis."""
  return max(n for n in range(1, min(BLOCK, x.shape[-1]) + 1) if x.shape[-1] % n == 0)


def _numbers(signed: bool) -> np.ndarray:
  """256 numbers up to 1: 0, 1 and the middles of 1, 2, 4, ... equal parts of 0.1 to 1 of each decade, or twice that."""
  found = [0.0, 1.0]
  for i in range(7):
    edges = np.linspace(0.1, 1, 2**(i if signed else i + 1) + 1)
    middles = 10.0**(i - 6) * (edges[1:] + edges[:-1]) / 2
    found += [*middles, *(-middles if signed else ())]
  return np.sort(np.array(found, np.float32))


NUMBERS = {signed: _numbers(signed) for signed in (False, True)}
