"""Trees of arrays: names of leaves, sizes, layers apart and together, checksums.

A leaf's name is its path, 'params/blocks/mlp/up'. The weights of equal blocks are stacked, one
array for all layers; taken apart, every layer has a name of its own, 'params/blocks_0/mlp/up'.
"""
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

BLOCKS = 'blocks'  # the key whose subtree stacks one array a layer: 'blocks/mlp/up' is LDF


def flat(tree) -> dict:
  """Leaves by path, {'blocks/mlp/up': array, ...}."""
  word = lambda key: str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key))))
  return {'/'.join(map(word, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def replaced(tree: dict, leaves: dict) -> dict:
  """`tree` with each of `leaves` at its path, whether or not there was one; no array is copied."""
  tree = dict(tree)
  for path, leaf in leaves.items():
    first, *rest = path.split('/', 1)
    tree[first] = replaced(tree.get(first, {}), {rest[0]: leaf}) if rest else leaf
  return tree


def at(tree: dict, path: str):
  """What a tree holds at a path, such as 'blocks/mlp/up'; None if nothing."""
  for key in path.split('/'):
    tree = tree.get(key) if isinstance(tree, dict) else None
  return tree


def count(tree) -> int:
  """How many numbers a tree of arrays (or of their shapes) holds."""
  return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def nbytes(tree) -> int:
  """How many bytes a tree of arrays (or of their shapes) takes."""
  return sum(int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def layer_names(tree, params=None) -> dict[str, tuple[str, ...] | None]:
  """For every leaf, the names of its layers once apart; None if the leaf stays whole.

  `params` are the weights, in which every leaf under 'blocks' is stacked (default: `tree`). A leaf
  of another tree, such as an optimizer's state, is split if it sits under the same 'blocks' and its
  leading size is that number of layers; counters and placeholders there stay whole.
  """
  depths = _depths(tree if params is None else params)
  names = {}
  for name, leaf in flat(tree).items():
    layers = _depth(name, depths)
    split = layers is not None and leaf.shape[:1] == (layers,)
    names[name] = tuple(_numbered(name, layer) for layer in range(layers)) if split else None
  return names


def unstacked(tree, params=None) -> dict:
  """Leaves by name, layers apart: {'blocks_0/mlp/up': DF, ...} from blocks/mlp/up of LDF.

  Of arrays, or of ShapeDtypeStructs with or without shardings. Which leaves are stacks: see layer_names.
  """
  leaves, apart = flat(tree), {}
  for name, layers in layer_names(tree, params).items():
    parts = {name: leaves[name]} if layers is None else {
        part: layer(leaves[name], i) for i, part in enumerate(layers)}
    assert not apart.keys() & parts.keys(), f'{name} is there twice, stacked and apart'
    apart |= parts
  return apart


def stacked(apart: dict, like, params=None):
  """The inverse of unstacked: a tree of the structure of `like`, with L in front again.

  `like` gives names and ranks; the sharding of a ShapeDtypeStruct is that of `apart`, L unsplit.
  """
  leaves = [apart[name] if layers is None else _together([apart[part] for part in layers])
            for name, layers in layer_names(like, params).items()]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def layer(leaf, index: int = 0):
  """Layer `index` of a stacked leaf, an array or a ShapeDtypeStruct (its sharding without that of L)."""
  if not isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf[index]
  where = leaf.sharding
  if isinstance(where, NamedSharding):
    where = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]), memory_kind=where.memory_kind)
  return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=where)


def checksum(x, start=0) -> jax.Array:
  """A uint32 of the bits of x and of where they are; the same on any number of devices.

  Of rows of an array, of which entry `start` is the first, it is their share of the array's checksum.
  sum over i of mix(bits[i] + (index[i] + 1) * odd) modulo 2**32. mix is a bijection, so that any one
  changed number is noticed; a permutation or a shift is missed with a chance of 2**-32. Integer
  sums do not depend on their order, so sharding does not matter.
  """
  # Odd constants of the MurmurHash3 finaliser (Appleby 2011) and of the golden ratio.
  index = jnp.full(x.shape, 1 + jnp.asarray(start, jnp.uint32))
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1:]) % 2**32
    index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride)
  mixed = _bits(x) + index * np.uint32(0x9E3779B9)
  mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _bits(x) -> jax.Array:
  bits = 8 * x.dtype.itemsize
  if x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and bits <= 32):
    return x.astype(jnp.uint32)
  if not jnp.issubdtype(x.dtype, jnp.floating) or bits > 32:
    raise ValueError(f'no checksum for type {x.dtype}: only for bool, floats and integers of at most 32 bits')
  return jax.lax.bitcast_convert_type(x, f'uint{bits}').astype(jnp.uint32)


def _depths(params) -> dict[str, int]:
  """How many layers each 'blocks' of the weights has, {'encoder/blocks': 6, ...}."""
  depths = {}
  for name, leaf in flat(params).items():
    if (blocks := _blocks(name)) is not None:
      depth = depths.setdefault(blocks, leaf.shape[0])
      assert leaf.shape[0] == depth, f'{name} of shape {leaf.shape} is not a stack of {depth} layers'
  return depths


def _blocks(name: str) -> str | None:
  """'encoder/blocks' from 'encoder/blocks/mlp/up'; None where there is no 'blocks'."""
  keys = name.split('/')
  return '/'.join(keys[:keys.index(BLOCKS) + 1]) if BLOCKS in keys else None


def _depth(name: str, depths: dict[str, int]) -> int | None:
  """The layers of the weights' blocks that this leaf belongs to: 'optimizer/0/mu/blocks' to 'blocks'."""
  blocks = _blocks(name) or ''
  owners = [owner for owner in depths if f'/{blocks}'.endswith(f'/{owner}')]
  return depths[max(owners, key=len)] if owners else None


def _numbered(name: str, layer: int) -> str:
  blocks = _blocks(name)
  return f'{blocks}_{layer}{name[len(blocks):]}'


def _together(layers: list):
  if not isinstance(layers[0], jax.ShapeDtypeStruct):
    return jnp.stack(layers)
  first, where = layers[0], layers[0].sharding
  if isinstance(where, NamedSharding):
    where = NamedSharding(where.mesh, PartitionSpec(None, *where.spec), memory_kind=where.memory_kind)
  return jax.ShapeDtypeStruct((len(layers), *first.shape), first.dtype, sharding=where)
