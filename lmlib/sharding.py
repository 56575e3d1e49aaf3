"""Where arrays live: one alphabet of axes, and tables from letters to mesh axes.

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
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

ALPHABET = frozenset('BTSDNKGHFVELJCMRQPWIUYAZX')
HOST = 'pinned_host'  # what JAX calls memory of a host that devices read by themselves
MESH_AXES = ('data', 'stage', 'fsdp', 'expert', 'context', 'tensor')  # the slowest network first

# Read top to bottom. A row applies if its mesh axes have several devices, are still unused in this array
# and divide this dimension: 'tensor' goes to K where it divides K, else to G.
TENSOR = tuple((letter, ('tensor',)) for letter in 'KGFV')
WEIGHTS = (('L', ('stage',)), ('E', ('expert',)), ('D', ('fsdp',)), *TENSOR)
ROWS = (('B', ('data', 'fsdp', 'expert', 'stage')), ('B', ('data', 'fsdp', 'expert')))  # on stages where they divide
ARRAYS = (*ROWS, ('E', ('expert',)), ('T', ('context',)), *TENSOR)

_current = contextvars.ContextVar('mesh and layout', default=None)


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """How a batch passes the stages of a layout (nn/pipeline.py): nothing here changes numbers."""
  microbatches: int | None = None  # parts that follow each other; None: up to four a stage, see pipeline.of()
  rounds: int = 1  # times that each passes all stages, every one of which holds as many groups of layers

  def __post_init__(self):
    for name in ('microbatches', 'rounds'):
      value = getattr(self, name)
      if (value is None and name == 'rounds') or (value is not None and (not isinstance(value, int) or value < 1)):
        raise ValueError(f'Pipeline.{name}={value!r} must be a positive integer')


@dataclasses.dataclass(frozen=True)
class Layout:
  """How many devices each mesh axis takes, and which letters it splits.

  `data` splits the batch; `fsdp` splits the batch and, as `zero` says, the weights with what belongs to them (ZeRO,
  Rajbhandari et al. 2020); `tensor` splits heads, hidden width and vocabulary (Shoeybi et al. 2019); `context` splits
  the rows themselves, whose attention then goes round a ring (kernels/ring_attention.py); `expert` splits the batch and
  the experts, to which tokens travel (nn/moe.py); `stage` splits the layers, between which a batch passes as `pipeline`
  says (nn/pipeline.py). One size may be -1: the devices that are left.

  zero: 1 splits the optimizer's state over fsdp, 2 gradients as well, 3 the stored weights too.
  slices: groups of devices, each with a fast network of its own and a slow one between them; the mesh axis `across`
  goes over all of them, slices outermost, and the other axes stay inside one.
  sequence: `tensor` splits the stream between attention and hidden layers as well, along its rows (sequence
  parallelism, Korthikanti et al. 2022); rows of a length that it does not divide stay whole.
  offload: an optimizer's moments wait in the memory of hosts from one update to the next.
  wide_sums: gradients of matrices and tables are float32 where devices sum them, not of the activations' type; of an
  expert's, each device's part is of that type before. What an adapter trains is summed as it is.
  """
  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  expert: int = 1
  stage: int = 1
  zero: int = 3
  slices: int = 1
  across: str = 'data'
  sequence: bool = False
  offload: bool = False
  wide_sums: bool = False
  pipeline: Pipeline = Pipeline()
  weights: tuple = WEIGHTS
  arrays: tuple = ARRAYS

  def __post_init__(self):
    for name, size in zip(MESH_AXES, self.sizes):
      if not isinstance(size, int) or size == 0 or size < -1:
        raise ValueError(f'Layout.{name}={size!r} must be a positive number of devices, or -1 for those left')
    if self.sizes.count(-1) > 1:
      raise ValueError(f'{self}: only one may be -1')
    self._check_zero_and_slices()
    for letter, mesh_axes in (*self.weights, *self.arrays):
      if letter not in ALPHABET or not set(mesh_axes) <= set(MESH_AXES):
        raise ValueError(f'Layout rule {(letter, mesh_axes)}: letters are {"".join(sorted(ALPHABET))}, '
                         f'mesh axes are {MESH_AXES}')
      if letter == 'T' and len(mesh_axes) > 1 and (letter, mesh_axes) in self.arrays:
        raise ValueError(f'Layout rule {(letter, mesh_axes)}: rows go round a ring of one mesh axis, not of several')

  def _check_zero_and_slices(self):
    if self.zero not in (1, 2, 3):
      raise ValueError(f'Layout.zero={self.zero!r} must be 1, 2 or 3: what fsdp splits')
    if self.zero != 3 and self.fsdp == 1:
      raise ValueError(f'Layout.zero={self.zero} says what fsdp={self.fsdp} device splits: nothing; '
                       'give fsdp devices, or leave zero=3')
    if self.sequence and self.tensor == 1:
      raise ValueError(f'Layout.sequence={self.sequence} splits rows over tensor={self.tensor} device: nothing; '
                       'give tensor devices, or leave sequence=False')
    if not isinstance(self.slices, int) or self.slices < 1:
      raise ValueError(f'Layout.slices={self.slices!r} must be a positive number of slices')
    if self.across not in MESH_AXES:
      raise ValueError(f'Layout.across={self.across!r} must be one of {MESH_AXES}')
    if (size := getattr(self, self.across)) > 0 and size % self.slices:
      raise ValueError(f'Layout.{self.across}={size} goes over slices={self.slices}, which do not divide it: '
                       f'{self.across}={-(-size // self.slices) * self.slices} would, or -1')

  @property
  def sizes(self) -> tuple[int, ...]:
    return tuple(getattr(self, name) for name in MESH_AXES)

  def __str__(self):
    said = [f'{name}={size}' for name, size in zip(MESH_AXES, self.sizes) if size != 1]
    said += [f'zero={self.zero}'] if self.zero != 3 else []
    said += [name for name in ('sequence', 'offload', 'wide_sums') if getattr(self, name)]
    said += [f'slices={self.slices} of {self.across}'] if self.slices != 1 else []
    return 'Layout ' + (', '.join(said) or 'of one device')

  def table(self, what: str) -> tuple:
    """The rules of 'arrays' that are computed or of the 'stream' between layers, BTD; or of 'weights', 'gradients' or
    'moments': their optimizer's state.
    """
    if what == 'arrays' or (what == 'stream' and not self.sequence):
      return self.arrays
    if what == 'stream':
      split = tuple((letter, (*axes, 'tensor')) for letter, axes in self.arrays if letter == 'T')
      return (*(split or (('T', ('tensor',)),)), *self.arrays)
    if self.zero >= {'weights': 3, 'gradients': 2, 'moments': 1}[what]:
      return self.weights
    return tuple((letter, tuple(axis for axis in axes if axis != 'fsdp')) for letter, axes in self.weights)

  def mesh(self, devices=None) -> Mesh | AbstractMesh:
    """The mesh over `devices` (None: all; a number: devices that are not here). ValueError if it does not use all."""
    devices = jax.devices() if devices is None else devices
    sizes = self._filled(devices if isinstance(devices, int) else len(devices))
    auto = (AxisType.Auto,) * len(MESH_AXES)  # Linen knows no Explicit axes
    if isinstance(devices, int):
      return AbstractMesh(sizes, MESH_AXES, axis_types=auto)
    across = MESH_AXES.index(self.across)
    inside = tuple(size // self.slices if i == across else size for i, size in enumerate(sizes))
    parts = [mesh_utils.create_device_mesh(inside, part, allow_split_physical_axes=True)
             for part in in_slices(devices, self.slices)]
    return Mesh(np.concatenate(parts, axis=across), MESH_AXES, axis_types=auto)

  def _filled(self, devices: int) -> tuple[int, ...]:
    """The sizes on so many devices."""
    fixed = math.prod(size for size in self.sizes if size > 0)
    if fixed > devices:
      raise ValueError(f'{self} needs {fixed} devices, but there are {devices}')
    if devices % fixed or (-1 not in self.sizes and fixed != devices):
      raise ValueError(f'{self} takes a multiple of {fixed} devices, but there are {devices}'
                       if -1 in self.sizes else
                       f'{self} uses {fixed} of {devices} devices: set one size to -1 to use them all')
    sizes = tuple(size if size > 0 else devices // fixed for size in self.sizes)
    if (size := sizes[MESH_AXES.index(self.across)]) % self.slices:
      raise ValueError(f'Layout.{self.across}=-1 is {size} on {devices} devices, which slices={self.slices} do not '
                       f'divide: slices={math.gcd(size, self.slices)} would')
    self._check_pipeline(sizes[MESH_AXES.index('stage')])
    return sizes

  def _check_pipeline(self, stages: int):
    microbatches, rounds = self.pipeline.microbatches, self.pipeline.rounds
    if stages == 1 and self.pipeline != Pipeline():
      raise ValueError(f'Layout.pipeline={self.pipeline} has no effect with stage=1: set stage to 2 or more')
    if rounds > 1 and microbatches is not None and microbatches % stages:
      raise ValueError(f'Pipeline.microbatches={microbatches} must be a multiple of stage={stages} where '
                       f'rounds={rounds}: {-(-microbatches // stages) * stages} is')


def in_slices(devices, slices: int) -> list[list]:
  """The devices of each slice. TPUs know their own; others are cut, in their order, into runs of equal length.

  ValueError if TPUs form another number of slices.
  """
  if devices[0].platform != 'tpu':
    size = len(devices) // slices
    return [list(devices[i * size:(i + 1) * size]) for i in range(slices)]
  own = {}
  for device in devices:
    own.setdefault(getattr(device, 'slice_index', 0), []).append(device)
  if len(own) != slices:
    raise ValueError(f'Layout.slices={slices}, but the {len(devices)} devices form {len(own)}: slices={len(own)}')
  return [own[index] for index in sorted(own)]


@contextlib.contextmanager
def use(layout: Layout, devices=None):
  """Makes the layout current inside; yields its mesh. With a number of devices only shapes can be found inside."""
  mesh = layout.mesh(devices)
  here = isinstance(mesh, Mesh)
  if here and layout.offload and HOST not in (kinds := [m.kind for m in mesh.devices.flat[0].addressable_memories()]):
    raise ValueError(f'Layout.offload={layout.offload} needs memory of kind {HOST!r}, but '
                     f'{mesh.devices.flat[0].device_kind} devices have {kinds}: leave offload=False')
  token = _current.set((mesh, layout))
  try:
    with jax.set_mesh(mesh) if here else jax.sharding.use_abstract_mesh(mesh):
      yield mesh
  finally:
    _current.reset(token)


@contextlib.contextmanager
def without(axis: str):
  """Inside, no rule for computed arrays uses this mesh axis: a vmap or shard_map around them does."""
  if not in_use():
    yield
    return
  mesh, layout = _current.get()
  rules = tuple((letter, tuple(m for m in mesh_axes if m != axis)) for letter, mesh_axes in layout.arrays)
  token = _current.set((mesh, dataclasses.replace(layout, arrays=rules)))
  try:
    yield
  finally:
    _current.reset(token)


def in_use() -> bool:
  return _current.get() is not None


def current() -> Layout:
  """The layout in use; outside use() one that asks for nothing."""
  return _current.get()[1] if in_use() else Layout()


def mesh() -> Mesh | AbstractMesh:
  """The mesh of the layout in use."""
  return _current.get()[0]


def spec(axes: str, shape: tuple[int, ...], mesh: Mesh, rules) -> PartitionSpec:
  """The PartitionSpec of an array whose dimensions are named by `axes`, by a table of rules."""
  if unknown := set(axes) - ALPHABET - {'1'}:  # 1 is an axis of one
    raise ValueError(f'{axes!r} uses {sorted(unknown)}: not in the alphabet of sharding.py')
  taken, placed = set(), {}
  for letter, mesh_axes in rules:
    mesh_axes = tuple(m for m in mesh_axes if mesh.shape[m] > 1)
    free = letter in axes and letter not in placed and not taken & set(mesh_axes)
    if free and mesh_axes and shape[axes.index(letter)] % math.prod(mesh.shape[m] for m in mesh_axes) == 0:
      placed[letter] = mesh_axes
      taken |= set(mesh_axes)
  return PartitionSpec(*(placed.get(a) for a in axes))


def constrain(x: jax.Array, axes: str, what: str = 'arrays') -> jax.Array:
  """Lays x out by the rules in use, of Layout.table(what); outside use() there is one device and no rule."""
  assert len(axes) == x.ndim, (axes, x.shape)
  if not in_use():
    return x
  mesh, layout = _current.get()
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, mesh, layout.table(what))))


def stream(x_BTD: jax.Array) -> jax.Array:
  """The stream between layers where it belongs."""
  return constrain(x_BTD, 'BTD', 'stream')


def gathered(x_BTD: jax.Array) -> jax.Array:
  """The stream as products with weights take it: rows whole, where Layout.sequence split them.

  Its gradient, a sum over `tensor`, goes back to the parts that each device has of the stream.
  """
  return _between(x_BTD, 'arrays', 'stream')


def scattered(x_BTD: jax.Array) -> jax.Array:
  """What products with weights made, a sum over `tensor`, as a part of the stream: gathered() the other way."""
  return _between(x_BTD, 'stream', 'arrays')


def _between(x_BTD, forward: str, backward: str):
  if not current().sequence:
    return x_BTD
  moved = jax.custom_vjp(lambda x_BTD: constrain(x_BTD, 'BTD', forward))
  moved.defvjp(lambda x_BTD: (constrain(x_BTD, 'BTD', forward), None),
               lambda _, dx_BTD: (constrain(dx_BTD, 'BTD', backward),))
  return moved(x_BTD)


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


def shardings(boxed, what: str = 'weights'):
  """The NamedSharding of every weight in a tree from module.init or its eval_shape, inside use().

  what: 'weights', as they are stored, their 'gradients', or 'moments', what an optimizer keeps of each.
  """
  return placed(letters(boxed), nn.unbox(boxed), what)


def placed(letters, shapes, what: str = 'weights'):
  """shardings() of weights whose letters and shapes are two trees."""
  mesh, layout = _current.get()
  memory = HOST if what == 'moments' and layout.offload else None
  return jax.tree.map(
      lambda axes, x: NamedSharding(mesh, spec(axes, x.shape, mesh, layout.table(what)), memory_kind=memory),
      letters, shapes)


def near(tree):
  """The arrays of a tree in the memory of devices, inside jit: those of Layout.offload come from hosts."""
  return jax.device_put(tree, jax.memory.Space.Device)


def own_rows(batch: int) -> np.ndarray:
  """The numbers of the rows of a batch that devices of this process hold by the layout in use, ascending."""
  if not in_use():
    return np.arange(batch)
  mesh, layout = _current.get()
  where = NamedSharding(mesh, spec('B', (batch,), mesh, layout.arrays))
  return np.unique([np.arange(batch)[index] for index in where.addressable_devices_indices_map((batch,)).values()])


def placer(batch: int | None = None):
  """A function that puts a batch, {'tokens_BT': array, ...}, where the layout in use wants it.

  The name of an array ends in its axes. Works in other threads, which do not see use(); outside use()
  it puts everything on the first device. batch: its rows; of several processes each gives those of own_rows(batch).
  """
  if not in_use():
    return jax.device_put
  mesh, layout = _current.get()
  where = lambda name, shape: NamedSharding(mesh, spec(name.rpartition('_')[2], shape, mesh, layout.arrays))
  if batch is None or jax.process_count() == 1:
    return lambda whole: jax.device_put(whole, {name: where(name, x.shape) for name, x in whole.items()})
  rows = own_rows(batch)

  def placed(name, x):
    here = lambda index: x[np.searchsorted(rows, np.arange(batch)[index[0]])][:, *index[1:]]
    shape = (batch, *x.shape[1:])
    return jax.make_array_from_callback(shape, where(name, shape), here)

  return lambda part: {name: placed(name, x) for name, x in part.items()}


def fetched(tree):
  """The arrays of a tree on the host, each whole, wherever its parts are. All processes call it together."""

  def whole(x):
    far = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    return multihost_utils.process_allgather(x, tiled=True) if far else x

  return jax.device_get(jax.tree.map(whole, tree))


def replicated() -> NamedSharding:
  return NamedSharding(_current.get()[0], PartitionSpec())


def batch_devices() -> int:
  """Into how many parts the layout in use splits every batch (1 outside use())."""
  if not in_use():
    return 1
  mesh, layout = _current.get()
  return min((math.prod(mesh.shape[m] for m in mesh_axes) for letter, mesh_axes in layout.arrays if letter == 'B'),
             default=1)


def laid(tree, places):
  """Every array of a tree laid out by the NamedSharding at its place in another."""
  return jax.tree.map(jax.lax.with_sharding_constraint, tree, places)
