"""The matrices of a model's blocks, by path and axis letters: what adapters and quantisation find there."""
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmlib import sharding, trees
from lmlib.gin_text import close
from lmlib.optim import kinds
from lmlib.quant import nf4


def matrices(base_boxed) -> dict[str, tuple[str, tuple[int, ...]]]:
  """(letters, shape) by path of every matrix of the blocks that all tokens pass: experts and routers are none.

  base_boxed: shapes and letters of a model's weights, from protocol.boxed().
  """
  shapes, found = trees.flat(nn.unbox(base_boxed)), {}
  for path, axes in trees.flat(sharding.letters(base_boxed)).items():
    name = path.rpartition('/')[2]
    if trees.BLOCKS in path.split('/') and 'E' not in axes and kinds.kind(name, axes) == 'matrix':
      found[path] = axes, tuple(shapes[path].shape)
  return found


def targeted(base_boxed, targets: tuple[str, ...] | None, setting: str) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Of matrices() those that a path of `targets` is the end of, such as 'q' or 'mlp/up'; None: all of them.

  ValueError, naming the setting and what the model has, for a target that is the end of none.
  """
  found = matrices(base_boxed)
  if targets is None:
    return found
  for target in targets:
    if not any(ends(path, target) for path in found):
      names = sorted({path.rpartition('/')[2] for path in found})
      raise ValueError(f'{setting} names {target!r}, which is no matrix of the blocks of this model'
                       f'{close(target, names)}; it has {", ".join(names)} ({", ".join(sorted(found))})')
  return {path: said for path, said in found.items() if any(ends(path, target) for target in targets)}


def ends(path: str, target: str) -> bool:
  """Whether `target`, such as 'q' or 'mlp/up', is the end of a path."""
  return f'/{path}'.endswith(f'/{target}')


def sides(axes: str) -> tuple[str, str, str]:
  """The letters of a matrix: those that stack it, those that its product sums over, and those it makes."""
  ins, outs = kinds.fans(axes)
  letters = lambda places: ''.join(axes[i] for i in places)
  return axes[:kinds.stacked(axes)], letters(ins), letters(outs)


def joined(a, b, like: tuple[int, ...]):
  """a b of shape `like`, of a of (L,) ins, A and b of (L,) A, outs."""
  lead = a.ndim + b.ndim - 2 - len(like)
  rank, front = a.shape[-1], like[:lead]
  return (a.reshape(*front, -1, rank) @ b.reshape(*front, rank, -1)).reshape(like)


def norms(w, outs: int, lead: int):
  """|w| in float32 over the axes between the first `lead` and the last `outs`: one for each output."""
  over = tuple(range(lead, w.ndim - outs))
  return jnp.sqrt((w.astype(jnp.float32)**2).sum(over))


def fits(path: str, w, shape: tuple[int, ...], setting: str):
  """ValueError, naming both shapes, unless the model has a weight at `path` and it has the shape `shape`."""
  if w is None or tuple(w.shape) != tuple(shape):
    there = 'has no such weight' if w is None else f'has {tuple(w.shape)} there'
    raise ValueError(f'{setting} is of another model: it adapts {path} of shape {tuple(shape)}, and this one {there}')


def size(letters: str, sizes: dict[str, int]) -> int:
  return math.prod(sizes[letter] for letter in letters)


def parts(small) -> dict[str, dict[str, jax.Array]]:
  """The arrays of a small tree by the path that they stand at and their own names."""
  found = {}
  for name, leaf in trees.flat(small).items():
    path, _, part = name.rpartition('/')
    found.setdefault(path, {})[part] = leaf
  return found


def quantised(base_boxed, base):
  """The weights of a model with the matrices of its blocks, experts' too, in 4 bits: the base of QLoRA.

  Embeddings, norms, biases and routers stay as they are. What computes with it makes each matrix an array of floats
  where it multiplies, and again in the backward pass.
  """
  nodes = {}
  for path, axes in trees.flat(sharding.letters(base_boxed)).items():
    name, expert = path.rpartition('/')[2], axes.startswith('LE')
    if trees.BLOCKS in path.split('/') and kinds.kind(name, axes) == 'matrix' and ('E' not in axes or expert):
      nodes[path] = nf4.quantised(trees.at(base, path))
  return trees.replaced(base, nodes)
