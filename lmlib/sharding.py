"""Where arrays live: one alphabet of axes, and two tables from letters to mesh axes.

A letter means the same thing in a name (x_BTD), in an einsum ('BTD,DF->BTF') and
in a rule (('F', ('tensor',))):

  B batch        T query position   S key position     D model width
  N query heads  K key/value heads  G query heads per key head (N = K * G)
  H head width   F hidden width     V vocabulary       E experts     L layers
  J future token C choice         M token with an expert
  R latent of keys and values      Q latent of queries  P rotary width    W value width
  I interval of distances          U kind of token, as of a first and a second sentence
  Y class of a text
  A rank or width of an adapter
  Z piece of an axis that is cut: a page of keys and values, or a block of a width that has one scale
  X page of a row
"""
import contextlib
import contextvars
import dataclasses
import math

from flax import linen as nn
from flax import struct
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

ALPHABET = frozenset('BTSDNKGHFVELJCMRQPWIUYAZX')
MESH_AXES = ('data', 'stage', 'fsdp', 'expert', 'context', 'tensor')  # the slowest network first

# Read top to bottom. A row applies if its mesh axes have several devices, are still unused in this array
# and divide this dimension: 'tensor' goes to K where it divides K, else to G.
TENSOR = tuple((letter, ('tensor',)) for letter in 'KGFV')
WEIGHTS = (('L', ('stage',)), ('E', ('expert',)), ('D', ('fsdp',)), *TENSOR)
ARRAYS = (('B', ('data', 'fsdp', 'expert')), ('E', ('expert',)), ('T', ('context',)), *TENSOR)

_current = contextvars.ContextVar('mesh and layout', default=None)


@dataclasses.dataclass(frozen=True)
class Layout:
  """How many devices each mesh axis takes, and which letters it splits.

  `data` splits the batch; `fsdp` splits the batch and the stored weights with their
  optimizer state (ZeRO-3, Rajbhandari et al. 2020); `tensor` splits heads, hidden width and
  vocabulary (Shoeybi et al. 2019); `context` splits the rows themselves, whose attention then goes round
  a ring (kernels/ring_attention.py); `expert` splits the batch and the experts, to which tokens travel (nn/moe.py);
  `stage` splits the layers (nn/stack.py). One size may be -1: the devices that are left.
  """
  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  expert: int = 1
  stage: int = 1
  weights: tuple = WEIGHTS
  arrays: tuple = ARRAYS

  def __post_init__(self):
    for name, size in zip(MESH_AXES, self.sizes):
      if not isinstance(size, int) or size == 0 or size < -1:
        raise ValueError(f'Layout.{name}={size!r} must be a positive number of devices, or -1 for those left')
    if self.sizes.count(-1) > 1:
      raise ValueError(f'{self}: only one may be -1')
    for letter, mesh_axes in (*self.weights, *self.arrays):
      if letter not in ALPHABET or not set(mesh_axes) <= set(MESH_AXES):
        raise ValueError(f'Layout rule {(letter, mesh_axes)}: letters are {"".join(sorted(ALPHABET))}, '
                         f'mesh axes are {MESH_AXES}')
      if letter == 'T' and len(mesh_axes) > 1 and (letter, mesh_axes) in self.arrays:
        raise ValueError(f'Layout rule {(letter, mesh_axes)}: rows go round a ring of one mesh axis, not of several')

  @property
  def sizes(self) -> tuple[int, ...]:
    return tuple(getattr(self, name) for name in MESH_AXES)

  def __str__(self):
    said = [f'{name}={size}' for name, size in zip(MESH_AXES, self.sizes) if size != 1]
    return 'Layout ' + (', '.join(said) or 'of one device')

  def mesh(self, devices=None) -> Mesh:
    """The mesh over `devices` (default: all). Raises ValueError if it does not use them all."""
    devices = jax.devices() if devices is None else devices
    fixed = math.prod(size for size in self.sizes if size > 0)
    if fixed > len(devices):
      raise ValueError(f'{self} needs {fixed} devices, but there are {len(devices)}')
    if len(devices) % fixed or (-1 not in self.sizes and fixed != len(devices)):
      raise ValueError(f'{self} takes a multiple of {fixed} devices, but there are {len(devices)}'
                       if -1 in self.sizes else
                       f'{self} uses {fixed} of {len(devices)} devices: set one size to -1 to use them all')
    sizes = tuple(size if size > 0 else len(devices) // fixed for size in self.sizes)
    auto = (AxisType.Auto,) * len(MESH_AXES)  # jax.make_mesh alone gives Explicit axes
    return jax.make_mesh(sizes, MESH_AXES, axis_types=auto, devices=devices)


@contextlib.contextmanager
def use(layout: Layout, devices=None):
  """Makes the layout current for constrain() and shardings() inside; yields its mesh."""
  mesh = layout.mesh(devices)
  token = _current.set((mesh, layout))
  try:
    with jax.set_mesh(mesh):
      yield mesh
  finally:
    _current.reset(token)


def in_use() -> bool:
  return _current.get() is not None


def spec(axes: str, shape: tuple[int, ...], mesh: Mesh, rules) -> PartitionSpec:
  """The PartitionSpec of an array whose dimensions are named by `axes`, by a table of rules."""
  if unknown := set(axes) - ALPHABET:
    raise ValueError(f'{axes!r} uses {sorted(unknown)}: not in the alphabet of sharding.py')
  taken, placed = set(), {}
  for letter, mesh_axes in rules:
    mesh_axes = tuple(m for m in mesh_axes if mesh.shape[m] > 1)
    free = letter in axes and letter not in placed and not taken & set(mesh_axes)
    if free and mesh_axes and shape[axes.index(letter)] % math.prod(mesh.shape[m] for m in mesh_axes) == 0:
      placed[letter] = mesh_axes
      taken |= set(mesh_axes)
  return PartitionSpec(*(placed.get(a) for a in axes))


def constrain(x: jax.Array, axes: str) -> jax.Array:
  """Lays x out by the rules in use; outside use() there is one device and no rule."""
  assert len(axes) == x.ndim, (axes, x.shape)
  if not in_use():
    return x
  mesh, layout = _current.get()
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, mesh, layout.arrays)))


def each(function, axes, out: str | tuple[str, ...]):
  """function(*arrays), run by every device on its own part of them, for what XLA cannot split by itself.

  axes: the letters of each array; out: those of the result, or of each result, which are all letters of the arrays.
  Rules place them like any computed array, so a letter that `function` sums over or compares along must not be split.
  """

  def run(*arrays):
    if not in_use() or _current.get()[0].size == 1:
      return function(*arrays)
    mesh, layout = _current.get()
    specs = tuple(spec(letters, x.shape, mesh, layout.arrays) for letters, x in zip(axes, arrays))
    size = {}
    for letter, n in ((letter, n) for letters, x in zip(axes, arrays) for letter, n in zip(letters, x.shape)):
      size[letter] = max(n, size.get(letter, 1))  # an axis of one is for all of the others
    placed = jax.tree.map(lambda out: spec(out, tuple(size[letter] for letter in out), mesh, layout.arrays), out)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=placed, check_vma=False)(*arrays)

  return run


def size(axis: str) -> int:
  """How many devices a mesh axis has (1 outside use())."""
  return _current.get()[0].shape[axis] if in_use() else 1


def split(axes: str, shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
  """The mesh axes that split each dimension of a computed array, () where none does: for a shard_map of one's own."""
  if not in_use():
    return ((),) * len(axes)
  mesh, layout = _current.get()
  found = spec(axes, shape, mesh, layout.arrays)
  return tuple((places,) if isinstance(places, str) else places or () for places in found)


class Lettered(struct.PyTreeNode, nn.meta.AxisMetadata):
  """A weight and the letters of its axes; what module.init returns until nn.unbox() takes it off."""
  value: jax.Array
  axes: str = struct.field(pytree_node=False)

  def unbox(self):
    return self.value

  def replace_boxed(self, val):
    return self.replace(value=val)

  def add_axis(self, index, params):
    return self.replace(axes=self.axes[:index] + params[nn.PARTITION_NAME] + self.axes[index:])

  def remove_axis(self, index, params):
    return self.replace(axes=self.axes[:index] + self.axes[index + 1:])


def letters(boxed):
  """The axis letters of every weight, such as 'LDF', in a tree from module.init or its eval_shape."""
  return jax.tree.map(lambda box: box.axes, boxed, is_leaf=lambda x: isinstance(x, Lettered))


def shardings(boxed):
  """The NamedSharding of every weight in a tree from module.init or its eval_shape, inside use()."""
  mesh, layout = _current.get()
  return jax.tree.map(lambda axes, x: NamedSharding(mesh, spec(axes, x.shape, mesh, layout.weights)),
                      letters(boxed), nn.unbox(boxed))


def placer():
  """A function that puts a batch, {'tokens_BT': array, ...}, where the layout in use wants it.

  The name of an array ends in its axes. Works in other threads, which do not see use(); outside use()
  it puts everything on the first device.
  """
  if not in_use():
    return jax.device_put
  mesh, layout = _current.get()
  where = lambda name, x: NamedSharding(mesh, spec(name.rpartition('_')[2], x.shape, mesh, layout.arrays))
  return lambda batch: jax.device_put(batch, {name: where(name, x) for name, x in batch.items()})


def replicated() -> NamedSharding:
  return NamedSharding(_current.get()[0], PartitionSpec())


def batch_devices() -> int:
  """Into how many parts the layout in use splits a batch (1 outside use())."""
  if not in_use():
    return 1
  mesh, layout = _current.get()
  return math.prod(mesh.shape[m] for letter, mesh_axes in layout.arrays if letter == 'B' for m in mesh_axes)
