"""Whether a layout fits a model: what its mesh axes can split of the weights, what stays whole, and what is refused."""
import math

from flax import linen as nn
import jax

from lmlib import sharding
from lmlib.sharding import MESH_AXES, letters

# What a config calls the size of a letter.
NAMES = {'K': 'kv_heads', 'F': 'hidden', 'V': 'vocab', 'D': 'width', 'L': 'layers', 'E': 'experts'}


def check(boxed) -> list[str]:
  """What a mesh axis in use leaves whole of a model's weights (protocol.boxed), such as 'tensor=8: vocab=50257'.

  That is a vocabulary, key heads of which there are fewer than devices, where heads are split all the same, and the
  layers of a stack beside one that is split.
  ValueError for an axis that does not divide what it is there to split: heads, hidden width, width, layers, experts.
  """
  if not sharding.in_use():
    return []
  mesh, layout = sharding.mesh(), sharding.current()
  weights = [(axes, x.shape) for axes, x in zip(jax.tree.leaves(letters(boxed)), jax.tree.leaves(nn.unbox(boxed)))]
  whole = []
  for axis in (axis for axis in MESH_AXES if mesh.shape[axis] > 1):
    faults, left = _unsplit(axis, mesh.shape[axis], weights)
    if faults:
      fits = next(n for n in range(mesh.shape[axis], 0, -1) if not (
          mesh.shape[axis] % n or (n > 1 and _unsplit(axis, n, weights)[0])))
      size = mesh.shape[axis] if getattr(layout, axis) > 0 else f'-1, here {mesh.shape[axis]},'
      rest = f', data={mesh.shape["data"] * mesh.shape[axis] // fits}' if layout.data > 0 else ''
      raise ValueError(f'Layout.{axis}={size} does not divide {faults[0]}: {axis}={fits}{rest} would')
    whole += [f'{axis}={mesh.shape[axis]}: {what}' for what in left]
  return whole


def _unsplit(axis: str, size: int, weights) -> tuple[list[str], list[str]]:
  """What `size` devices of a mesh axis cannot split of weights, (letters, shape): faults, and what may stay whole."""
  mesh, layout = sharding.mesh(), sharding.current()
  rows = [(letter, math.prod(size if m == axis else mesh.shape[m] for m in axes))
          for letter, axes in layout.weights if axis in axes]
  divides = lambda letter, length: any(length % parts == 0 for row, parts in rows if row == letter)
  sizes, split = {}, set()
  for axes, shape in weights:
    for letter, length in zip(axes, shape):
      sizes.setdefault(letter, set()).add(length)
      split |= {letter} if divides(letter, length) else set()
  faults, left = [], []
  if any(letter == 'E' for letter, _ in rows) and 'E' not in sizes:
    faults.append('experts, of which this model has none')
  for letter in dict.fromkeys(letter for letter, _ in rows):
    for length in sorted(sizes.get(letter, ())):
      if divides(letter, length) or letter == 'G':
        continue
      if letter == 'K' and not split & {'K', 'G'}:
        heads = sorted(sizes.get('G', {1}))[-1]
        faults.append(f'kv_heads={length}' + (f' or the {heads} heads of each' if heads > 1 else ''))
      else:
        may = letter in 'KV' or (letter == 'L' and 'L' in split)
        (left if may else faults).append(f'{NAMES.get(letter, letter)}={length}')
  return faults, left


def told(boxed) -> str:
  """What the layout in use does with a model's weights, for a report; '' outside use() and on one device."""
  if not sharding.in_use() or sharding.mesh().size == 1:
    return ''
  mesh, layout = sharding.mesh(), sharding.current()
  said = []
  if mesh.shape['fsdp'] > 1:
    split = ('optimizer state', 'gradients', 'weights')[:layout.zero]
    said.append(f'fsdp splits {" and ".join([", ".join(split[:-1]), split[-1]] if split[1:] else split)} '
                f'(ZeRO-{layout.zero})')
  if layout.sequence:
    said.append('tensor splits the stream along rows too')
  if layout.offload:
    said.append('moments wait on hosts')
  if layout.wide_sums:
    said.append('gradients are summed over devices in float32')
  if layout.slices > 1:
    said.append(f'{layout.across} goes over {layout.slices} slices')
  return '; '.join([*said, *(f'{what} stays whole' for what in check(boxed))])
