"""Checkpoints of a run: written behind its back, verified when read, free of layout.

On orbax, whose own manager knows nothing of damage: here every array has a checksum, a
checkpoint that is torn or altered is set aside by name and the one before it is used. On disk a
layer is an array with a name of its own ('params/blocks_0/mlp/up'), so how layers are stacked and
where arrays live is the reader's choice.

A checkpoint is the folder <directory>/<step>: arrays in tensorstore's OCDBT, and in
_CHECKPOINT_METADATA as JSON under 'custom_metadata' the step, the caller's `meta` and the shape,
type and checksum of every array.
"""
import contextlib
import faulthandler
import functools
import json
import logging
import sys
import threading
import time
import warnings
import zlib

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
import orbax.checkpoint as ocp
import tensorstore as ts

from lmlib import processes, trees
from lmlib.sharding import near
from lmlib.train import keeping
from lmlib.train.keeping import Keep

RECORD = '_CHECKPOINT_METADATA'  # orbax's file; it holds our record as custom_metadata
PARTIAL = '.orbax-checkpoint-tmp'  # orbax's suffix of a checkpoint that is being written
GOING = '.removed'  # ours of one that is being deleted
DAMAGED = '.damaged'
SCORES = 'scores.json'  # of the steps that evaluations have seen
LEAVING = 10.0  # seconds that a save under way gets from one of several processes which ends with an error
# What says that reading failed, not that the data are bad: nothing is set aside for these.
PASSING = ('PERMISSION_DENIED', 'RESOURCE_EXHAUSTED', 'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'UNAUTHENTICATED')


class Damaged(Exception):  # noqa: N818, a state of the disk and no fault of the caller
  """A checkpoint that cannot be read back as it was written."""


class Checkpoints:
  """The checkpoints of one run, and the only writer of their folder.

  Of complete ones those stay that `keep` says, a number being that of the newest; `say` gets a line for
  everything that is removed or set aside on restoring, and for a write that takes long. All processes call
  every method. As a context it closes itself, by the error that it leaves with.
  """

  def __init__(self, directory, *, keep: int | Keep = 2, say=print):
    self._directory = epath.Path(directory).expanduser().resolve()
    self._keep, self._say = keeping.of(keep), say
    self._writing, self._watch = None, None  # the step that is being written behind our back, and who looks after it
    _hush()
    self._directory.mkdir(parents=True, exist_ok=True)
    # Weights hardly compress (8% with zstd), and the cores that would try are training.
    self._writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False))

  def steps(self) -> list[int]:
    return steps_in(self._directory)

  def latest(self) -> int | None:
    return max(self.steps(), default=None)

  def save(self, step: int, state, meta: dict | None = None):
    """Starts writing `state`, with `meta` of JSON values; returns once the arrays are copied.

    The caller may donate `state` at once. The copy takes as much device memory as the state until
    it is on the host. Waits for the save before this one, and raises what wait() raises.
    """
    self.wait()
    path = self._directory / str(step)
    if processes.first() and path.exists():
      raise ValueError(f'a checkpoint of step {step} exists already: {path}')
    arrays, sums = _apart(state)
    described = {name: {'shape': list(x.shape), 'dtype': str(x.dtype), 'checksum': int(sums[name])}
                 for name, x in arrays.items()}
    record = {'step': int(step), 'meta': plain(meta or {}), 'arrays': described}
    self._writing = step
    self._watch = threading.Timer(self._keep.slow, self._slow, [step])
    self._watch.daemon = True
    self._watch.start()
    try:
      if not self._directory.is_dir():  # orbax would make it again, perhaps where a disk is no longer mounted
        raise FileNotFoundError('the folder has vanished')
      self._writer.save(path, args=ocp.args.PyTreeSave(_nested(arrays)), custom_metadata=sealed(record))
    except Exception as error:
      raise self._failure(error) from error

  def wait(self):
    """Waits for the save under way, then deletes the checkpoints beyond `keep`.

    Raises OSError with path, step and last good step if it could not be written; the older
    checkpoints are as they were.
    """
    try:
      self._writer.wait_until_finished()
    except Exception as error:
      raise self._failure(error) from error
    if self._writing is not None:
      self._watch.cancel()
      self._writing = None
      if processes.first():
        for step in self._keep.going(self.steps(), self._scores()):
          self._remove(self._directory / str(step))
      processes.gathered('saved')

  def scored(self, step: int, scores: dict[str, float]):
    """Notes what evaluations found at a step, where a rule goes by it. OSError if it cannot be written."""
    if self._keep.best is None:
      return
    if self._keep.best not in scores:
      raise ValueError(f'Keep.best={self._keep.best!r} is none of the scores of the evaluations: '
                       f'{", ".join(sorted(scores))}')
    if processes.first():
      fresh = self._directory / f'{SCORES}.tmp'
      fresh.write_text(json.dumps(self._scores() | {step: scores[self._keep.best]}))
      fresh.replace(self._directory / SCORES)

  def _scores(self) -> dict[int, float]:
    path = self._directory / SCORES
    if self._keep.best is None or not path.exists():
      return {}
    return {int(step): score for step, score in json.loads(path.read_text()).items()}

  def _slow(self, step: int):
    """Says that a write takes long; the run goes on."""
    path = self._directory / f'{step}.slow.{processes.number()}.txt'
    try:
      with open(path, 'w') as file:
        faulthandler.dump_traceback(file)
      where = f'what all threads do is in {path}'
    except OSError as error:
      where = f'{path} cannot be written either: {error.strerror}'
    self._say(f'checkpoint of step {step} is being written for {self._keep.slow:g} s now and is not done; the run goes '
              f'on; {where}')

  def close(self):
    """Waits, raising what wait() raises, and ends the threads that write."""
    try:
      self.wait()
    finally:
      self._writer.close()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if error is None:
      return self.close()
    if processes.count() == 1:
      return self._closed_behind(self.close)
    # A save ends when all processes have written theirs, and another may wait for this one in a step, or be gone.
    ending = threading.Thread(target=self._closed_behind, args=[self._writer.close], daemon=True)
    ending.start()
    ending.join(LEAVING)

  def _closed_behind(self, close):
    """close(), behind an error: what goes wrong now is said, and does not hide what came first."""
    try:
      close()
    except Exception as late:
      self._say(str(late if self._writing is None else self._failure(late)))

  def restore(self, abstract_state, *, newest: int | None = None) -> tuple | None:
    """(state, step, meta) of the newest checkpoint that is whole; None if there has been none.

    newest: those of later steps are not looked at.

    `abstract_state` is a tree of ShapeDtypeStructs; an array goes where its sharding says, or to
    the first device where it says nothing. Raises ValueError if names or shapes differ from those
    stored, and if all checkpoints are damaged. Unfinished ones are removed, damaged ones renamed
    to <step>.damaged, and both are said.
    """
    self.wait()
    steps = processes.told('checkpoints', self._sweep)
    for step in [step for step in reversed(steps) if newest is None or step <= newest]:
      path = self._directory / str(step)
      try:
        return _read(path, abstract_state)
      except Damaged as error:
        aside = processes.told('set aside', lambda: str(self._set_aside(path)))  # noqa: B023, called here
        older = max((other for other in steps if other < step), default=None)
        self._say(f'checkpoint of step {step} is damaged ({error}): set aside as {aside}; '
                  + ('there is no older one' if older is None else f'trying that of step {older}'))
    if aside := sorted(p.name for p in self._directory.iterdir() if DAMAGED in p.name):
      raise ValueError(f'no usable checkpoint in {self._directory}: all are damaged ({", ".join(aside)}); '
                       'remove the folder to start again')

  def forget(self, after: int):
    """Removes the checkpoints of later steps: the run has gone back, and will come by there another way."""
    self.wait()
    if processes.first():
      for step in self.steps():
        if step > after:
          self._remove(self._directory / str(step))
    processes.gathered('later ones are gone')

  def _failure(self, error: Exception) -> OSError:
    step, self._writing = self._writing, None
    self._watch.cancel()
    path, last = self._directory / str(step), self.latest()
    if processes.first():
      for _ in range(5):  # of what one failed write has stopped, others may still be under way
        self._discard(self._directory / f'{step}{PARTIAL}')
        time.sleep(0.1)
    return OSError(f'checkpoint of step {step} could not be written to {path}: {reason(error)}; '
                   + ('there is no earlier one' if last is None else f'the last good one is of step {last}'))

  def _sweep(self) -> list[int]:
    """Removes what an interrupted save or an interrupted removal left; the steps that are there."""
    for path in sorted(self._directory.iterdir()):
      if path.name.endswith(GOING):
        self._discard(path)
      elif PARTIAL in path.name:
        self._discard(path)
        self._say(f'removed {path}: a checkpoint whose writing was interrupted')
    return self.steps()

  def _remove(self, path):
    # Renamed first: a removal cut short must not look like a damaged checkpoint.
    self._discard(path.rename(f'{path}{GOING}'))

  def _discard(self, path):
    try:
      path.rmtree(missing_ok=True)
    except OSError as error:
      self._say(f'could not remove {path}: {error}')

  def _set_aside(self, path):
    aside, more = epath.Path(f'{path}{DAMAGED}'), 1
    while aside.exists():
      aside, more = epath.Path(f'{path}{DAMAGED}.{more}'), more + 1
    path.rename(aside)
    return aside


def restore_params(directory, abstract_params, *, say=print) -> tuple:
  """(params, step, meta) of the newest checkpoint that is whole, without the optimizer's state.

  For evaluation and generation, also while the run goes on: nothing on disk is changed. Raises
  ValueError as Checkpoints.restore does, and if there is no checkpoint.
  """
  tree, step, meta = _looked_up(directory, {'params': abstract_params}, None, whole=False, say=say)
  return tree['params'], step, meta


def restore_state(directory, abstract_state, *, newest: int, say=print) -> tuple:
  """(state, step, meta) of the newest checkpoint that is whole, of step `newest` at the latest; see restore_params."""
  return _looked_up(directory, abstract_state, newest, whole=True, say=say)


def _looked_up(directory, abstract, newest: int | None, *, whole: bool, say) -> tuple:
  """(tree, step, meta) of the newest checkpoint that is whole; nothing on disk is changed."""
  directory = epath.Path(directory).expanduser().resolve()
  there = steps_in(directory)
  steps = [step for step in there if newest is None or step <= newest]
  for step in reversed(steps):
    try:
      return _read(directory / str(step), abstract, whole=whole)
    except Damaged as error:
      say(f'checkpoint of step {step} is damaged ({error}): {directory / str(step)} is not used')
  why = 'all are damaged' if steps else f'the oldest is of step {there[0]}' if there else 'there is none'
  early = '' if newest is None else f' of step {newest} or before'
  raise ValueError(f'no usable checkpoint{early} in {directory}: {why}')


def steps_in(directory) -> list[int]:
  """The steps whose checkpoints are complete, oldest first; none where there is no folder."""
  return sorted(int(path.name) for path in (directory.iterdir() if directory.is_dir() else ()) if path.name.isdecimal())


def _hush():
  """Keeps off the screen what orbax says of failures: they reach the caller as exceptions, in one line."""
  logging.getLogger('absl').addFilter(_not_orbax)
  # When one of many writes fails orbax forgets those that had not begun.
  warnings.filterwarnings('ignore', r"coroutine '.*write_fragment' was never awaited", RuntimeWarning)
  logging.getLogger('asyncio').addFilter(_not_forgotten)
  if not hasattr(sys.unraisablehook, 'before_checkpoints'):
    before = sys.unraisablehook

    def hook(unraisable):
      # When one of many writes fails orbax closes its event loop, and each of the others complains.
      if str(unraisable.exc_value) != 'Event loop is closed':
        before(unraisable)

    hook.before_checkpoints = before
    sys.unraisablehook = hook


def _not_orbax(record: logging.LogRecord) -> bool:
  return 'orbax' not in record.pathname


def _not_forgotten(record: logging.LogRecord) -> bool:
  # One of many failed writes reaches the caller; asyncio logs those that nobody asked for.
  return 'exception was never retrieved' not in record.getMessage()


def _apart(state) -> tuple[dict, dict]:
  """Copies of the arrays of a state and their checksums, by name on disk."""
  copies = {}
  for (name, layers), leaf in zip(trees.layer_names(state, _params(state)).items(), jax.tree.leaves(state)):
    if layers is None:
      copies[name] = _copy(leaf.sharding)(leaf)
    else:
      one = trees.layer(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding))
      copies |= {part: _layer(one.sharding)(leaf, i) for i, part in enumerate(layers)}
  # Each checksum comes out of the jit that copied: once they are here, the copies are made.
  sums = jax.device_get({name: value for name, (_, value) in copies.items()})
  return {name: array for name, (array, _) in copies.items()}, sums


@functools.cache
def _layer(sharding):
  """jit of (x, i) -> (a copy of x[i], its checksum). i is traced: one small program for all layers."""

  def layer(x, i):
    part = jax.lax.dynamic_index_in_dim(near(x), i, keepdims=False)
    return part, trees.checksum(part)

  return _jit(layer, sharding)


@functools.cache
def _copy(sharding):
  """jit of x -> (a copy, its checksum). jit may hand an unchanged argument through, but not x.copy()."""
  return _jit(lambda x: (near(x).copy(), trees.checksum(near(x))), sharding)


@functools.cache
def _join(sharding, layers: int, dtype):
  """jit of the parts of a leaf -> (the leaf as dtype, checksums of the parts); the leaf is a copy."""

  def join(*parts):
    stack = jnp.stack(near(parts))
    return (stack if layers else stack[0]).astype(dtype), jax.vmap(trees.checksum)(stack)

  return _jit(join, sharding)


def _jit(function, sharding):
  """function jitted to return (an array laid out by `sharding`, checksums on every device)."""
  if not isinstance(sharding, NamedSharding):
    return jax.jit(function)
  return jax.jit(function, out_shardings=(sharding, NamedSharding(sharding.mesh, PartitionSpec())))


def _read(path, abstract, *, whole: bool = True) -> tuple:
  """(tree, step, meta) of one checkpoint.

  whole: it must hold nothing else. Raises Damaged, or ValueError if another tree is stored.
  """
  params = _params(abstract)
  record = _agreed(lambda: record_of(path))
  _fits(path, record['arrays'], trees.unstacked(abstract, params), whole)
  leaves, sums = [], {}
  # One leaf after the other, so that no more than one is in memory twice.
  for (name, layers), leaf in zip(trees.layer_names(abstract, params).items(), jax.tree.leaves(abstract)):
    names = layers or (name,)
    part = leaf if layers is None else trees.layer(leaf)
    parts = _agreed(lambda: _load(path, names, part.sharding, record['arrays']))  # noqa: B023, called here
    joined, sums[names] = _join(leaf.sharding, len(layers or ()), leaf.dtype)(*parts)
    leaves.append(joined)
  for names, values in jax.device_get(sums).items():
    for name, value in zip(names, values):
      if (stored := record['arrays'][name]['checksum']) != int(value):
        raise Damaged(f'{name} has checksum {int(value)}, written was {stored}')
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves), record['step'], record['meta']


def record_of(path) -> dict:
  """What save() wrote beside the arrays. Raises Damaged if it is missing or altered."""
  try:
    record = json.loads((path / RECORD).read_text())['custom_metadata']
    crc32 = record.pop('crc32')
  except FileNotFoundError:
    raise Damaged(f'{RECORD} is missing') from None
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise Damaged(f'{RECORD} is unreadable: {reason(error)}') from error
  if crc32 != _crc32(record) or str(record['step']) != path.name:
    raise Damaged(f'{RECORD} is altered')
  return record


def _fits(path, stored: dict, wanted: dict, whole: bool):
  """Raises ValueError if a checkpoint is of another tree than the one wanted."""
  differ = []
  names = wanted.keys() | stored.keys() if whole else wanted
  for name in sorted(names, key=lambda name: (not name.startswith('params/'), name)):
    there = tuple(stored[name]['shape']) if name in stored else 'absent'
    here = tuple(wanted[name].shape) if name in wanted else 'absent'
    if there != here:
      differ.append(f'{name} is {there} there and {here} here')
    elif not _castable(stored[name]['dtype'], wanted[name].dtype):
      differ.append(f'{name} is {stored[name]["dtype"]} there and {wanted[name].dtype} here')
  if differ:
    few = '; '.join(differ[:4]) + (f'; and {len(differ) - 4} more' if len(differ) > 4 else '')
    raise ValueError(f'checkpoint {path} does not fit this model and optimizer: {few}')


def _castable(stored: str, wanted) -> bool:
  stored = jnp.dtype(stored)
  return stored == wanted or (jnp.issubdtype(stored, jnp.floating) and jnp.issubdtype(wanted, jnp.floating))


def _load(path, names, sharding, stored: dict) -> list[jax.Array]:
  """Arrays of one shape, in the types stored. Raises Damaged.

  Read without orbax, whose event loop leaves tracebacks on the screen when one of many reads fails.
  """
  sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
  opened = [ts.open(spec(path, name), read=True) for name in names]
  with readable(path):
    shards = []
    for name, store in zip(names, opened):
      store, shape = store.result(), tuple(stored[name]['shape'])
      if store.shape != shape or store.dtype.name != stored[name]['dtype']:
        raise Damaged(f'{name} is {store.dtype.name}{store.shape}')
      places = sharding.addressable_devices_indices_map(shape).values()
      shards.append({str(index): store[index].read() for index in places})  # begun, for all names
    return [jax.make_array_from_callback(tuple(stored[name]['shape']), sharding,
                                         lambda index, read=read: read[str(index)].result())
            for name, read in zip(names, shards)]


def spec(path, name: str) -> dict:
  """Where tensorstore finds an array of a checkpoint."""
  base = f'{path}/' if '://' in str(path) else {'driver': 'file', 'path': f'{path}/'}
  return {'driver': 'zarr', 'kvstore': {'driver': 'ocdbt', 'base': base, 'path': f'{name.replace("/", ".")}/'}}


@contextlib.contextmanager
def readable(path):
  """What goes wrong while tensorstore reads: Damaged for what the disk holds, OSError for what may pass."""
  try:
    yield
  except ValueError as error:  # tensorstore raises no other
    if any(word in str(error) for word in PASSING):
      raise OSError(f'checkpoint {path} could not be read: {reason(error)}') from error
    raise Damaged(reason(error)) from error


def _params(state):
  return state['params'] if isinstance(state, dict) else state.params


def _nested(leaves: dict) -> dict:
  """{'a/b': x} as {'a': {'b': x}}."""
  tree = {}
  for name, leaf in leaves.items():
    *folders, last = name.split('/')
    functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[last] = leaf
  return tree


def plain(meta: dict) -> dict:
  """`meta` as JSON gives it back. ValueError if it would be something else."""
  try:
    plain = json.loads(json.dumps(meta))
  except (TypeError, ValueError) as error:
    raise ValueError(f'meta={meta!r} must hold JSON values only: {error}') from error
  if plain != meta:
    raise ValueError(f'meta={meta!r} would come back from JSON as {plain!r}')
  return plain


def sealed(record: dict) -> dict:
  """A record with its own checksum, as RECORD holds it."""
  return record | {'crc32': _crc32(record)}


def _crc32(record: dict) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def reason(error: BaseException) -> str:
  """The first line of what went wrong, shortened; tensorstore adds its own lists in brackets."""
  line = next(iter(str(error).strip().splitlines()), '').split(' [')[0] or type(error).__name__
  return line if len(line) <= 240 else f'{line[:100]} … {line[-140:]}'


def _agreed(read):
  """read(), which raises Damaged in all processes if it does in one."""
  try:
    value, error = read(), None
  except Damaged as damage:
    value, error = None, damage
  for number, found in enumerate(processes.gathered('read', error and str(error))):
    if found is not None:
      raise error or Damaged(f'process {number}: {found}')
  return value
