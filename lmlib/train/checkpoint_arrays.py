"""A checkpoint written and read array by array, or a part of one, for models larger than memory.

On disk it is what checkpoint.Checkpoints writes, and restore_params reads and verifies it alike; only the
arrays are cut into chunks, so that parts of them come and go alone.
"""
import contextlib
import json
import math
import os
import pathlib

import jax
import numpy as np
import tensorstore as ts

from lmlib import trees
from lmlib.train import checkpoint

CHUNK = 1 << 25  # bytes of a chunk, at most, where an axis allows it
TILE = 16  # entries of the last axis that are copied at once from an array with other strides: a line of cache
COMMIT = 1 << 27  # bytes that are written together: each commit makes files of its own and rewrites their tree

_checksum = jax.jit(trees.checksum)  # of flat arrays, so that few shapes compile


class Writer:
  """Writes the weights of a checkpoint, `params` by path, to the folder `path` as checkpoint `step`.

  abstract_params gives their shapes; `dtypes`, by path, the type of each on disk. Parts of an array may come
  in any order, each once; `lead` says, by path, how many axes behind the layers' are written one at a time.
  """

  def __init__(self, path: pathlib.Path, abstract_params, dtypes: dict[str, np.dtype], lead: dict[str, int], *,
               step: int = 0):
    self._path, self._step = path, step
    self.names = names_of(abstract_params)
    self._stores, self._arrays, self._left = {}, {}, {}
    self._transaction, self._bytes, self._commit, self._sums = ts.Transaction(), 0, None, []
    context = ts.Context()  # one tree of one store, so that transactions span arrays
    opened = {}
    for where, leaf in trees.flat(abstract_params).items():
      layers, dtype = self.names[where], dtypes[where]
      shape = leaf.shape[1:] if isinstance(layers, tuple) else leaf.shape
      chunk = chunks(shape, dtype.itemsize, lead.get(where, 0))
      for name in layers if isinstance(layers, tuple) else (layers,):
        self._arrays[name] = {'shape': list(shape), 'dtype': dtype.name, 'checksum': 0}
        self._left[name] = math.prod(shape)
        opened[name] = ts.open(
            checkpoint.spec(path, name) | {'metadata': {'compressor': None}}, create=True, dtype=ts.dtype(dtype),
            shape=shape, fill_value=0, chunk_layout=ts.ChunkLayout(chunk_shape=chunk), context=context,
            transaction=self._transaction)
    with self._writable():
      stores = {name: store.result() for name, store in opened.items()}
      self._transaction.commit_sync()
    self._stores = {name: store.with_transaction(None) for name, store in stores.items()}
    self._transaction = ts.Transaction()

  def write(self, name: str, index: tuple[int, ...], x: np.ndarray):
    """Puts `x` at [index] of an array; any strides, cast to the type on disk. OSError if the disk is full."""
    said, store = self._arrays[name], self._stores[name]
    shape, dtype = tuple(said['shape']), np.dtype(said['dtype'])
    assert x.shape == shape[len(index):], (name, index, x.shape, shape)
    chunk = store.chunk_layout.write_chunk.shape or ()  # None of an array without axes
    for block in blocks(x.shape, chunk[len(index):]):
      part = copied(x[block], np.empty(x[block].shape, dtype))
      place = (*(slice(i, i + 1) for i in index), *block)
      start = sum((axis.start or 0) * math.prod(shape[i + 1:]) for i, axis in enumerate(place))
      self._sums.append((said, _checksum(part.reshape(-1), np.uint32(start % 2**32))))  # read later: XLA works beside
      self._left[name] -= part.size
      with self._writable():
        store.with_transaction(self._transaction)[place].write(part.reshape((1,) * len(index) + part.shape)).result()
      self._bytes += part.nbytes
      if self._bytes >= COMMIT:
        self._next()

  def _next(self):
    """Begins to commit what was written, when what came before is on the disk."""
    with self._writable():
      if self._commit is not None:
        self._commit.result()
      self._commit = self._transaction.commit_async()
    self._transaction, self._bytes = ts.Transaction(), 0
    for said, value in self._sums:
      said['checksum'] = (said['checksum'] + int(value)) % 2**32
    self._sums = []

  def close(self):
    """Everything is on the disk when this returns."""
    self._next()
    self._next()
    assert not any(self._left.values()), [name for name, left in self._left.items() if left]
    record = {'step': self._step, 'meta': {}, 'arrays': self._arrays}
    text = json.dumps({'custom_metadata': checkpoint.sealed(record)})
    (self._path / checkpoint.RECORD).write_text(text)
    for file in self._path.rglob('*'):
      if file.is_file():
        with open(file, 'rb') as opened:
          os.fsync(opened.fileno())

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *_):
    self._transaction.abort()
    if self._commit is not None:  # what is under way must not come after the folder is gone
      with contextlib.suppress(ValueError):
        self._commit.result()

  @contextlib.contextmanager
  def _writable(self):
    try:
      yield
    except ValueError as error:  # tensorstore raises no other
      raise OSError(f'{self._path} could not be written: {checkpoint.reason(error)}') from error


class Reader:
  """Reads the weights of the newest checkpoint of a folder, and knows whether they are what was written.

  ValueError if there is none.
  """

  def __init__(self, directory: pathlib.Path):
    steps = checkpoint.steps_in(directory)
    if not steps:
      raise ValueError(f'no checkpoint in {directory}')
    self.step = steps[-1]
    self._path = directory / str(self.step)
    try:
      self.arrays = checkpoint.record_of(self._path)['arrays']
    except checkpoint.Damaged as error:
      raise self._damaged(error) from error
    self._sums, self._left = {}, {name: math.prod(said['shape']) for name, said in self.arrays.items()}
    self._store = (None, None)

  def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    """An array, or [index] of it, in the type on disk. ValueError if it cannot be read."""
    said = self.arrays[name]
    shape = tuple(said['shape'])
    try:
      with checkpoint.readable(self._path):
        if self._store[0] != name:
          store = ts.open(checkpoint.spec(self._path, name), read=True).result()
          if store.shape != shape or store.dtype.name != said['dtype']:
            raise checkpoint.Damaged(f'{name} is {store.dtype.name}{store.shape}')
          if store.chunk_layout.read_chunk.shape == shape:
            store = store.read().result()  # whole, or every part would read all of it again
          self._store = (name, store)
        store = self._store[1]
        x = store[index] if isinstance(store, np.ndarray) else store[index].read().result()
    except checkpoint.Damaged as error:
      raise self._damaged(error) from error
    start = sum(i * math.prod(shape[axis + 1:]) for axis, i in enumerate(index))
    self._sums[name] = (self._sums.get(name, 0) + int(_checksum(x.reshape(-1), np.uint32(start % 2**32)))) % 2**32
    self._left[name] -= x.size
    return x

  def verify(self):
    """ValueError unless every array that was read, each part of it once, is what was written."""
    for name, value in self._sums.items():
      assert self._left[name] == 0, f'{name} was read in part, or more than once'
      if value != (stored := self.arrays[name]['checksum']):
        raise self._damaged(f'{name} has checksum {value}, written was {stored}')

  def _damaged(self, why) -> ValueError:
    return ValueError(f'checkpoint {self._path} is damaged: {why}')


def names_of(abstract_params) -> dict[str, str | tuple[str, ...]]:
  """By path of a weight its name on disk; where layers are stacked, one a layer."""
  tree = {'params': abstract_params}
  names = trees.layer_names(tree, abstract_params)
  return {name.removeprefix('params/'): layers or name for name, layers in names.items()}


def chunks(shape: tuple[int, ...], itemsize: int, lead: int = 0) -> tuple[int, ...]:
  """A chunk of at most CHUNK bytes: whole inner axes, some of the next, one of those before and of the `lead`."""
  found, size = [], itemsize
  for axis, length in reversed(list(enumerate(shape))):
    most = 1 if axis < lead else max(1, min(length, CHUNK // size))
    found.append(most)
    size = size * most if most == length else CHUNK
  return tuple(reversed(found))


def blocks(shape: tuple[int, ...], chunk: tuple[int, ...]):
  """The places of all chunks of an array, as slices, in order."""
  if not shape:
    yield ()
    return
  for start in range(0, shape[0], chunk[0]):
    for rest in blocks(shape[1:], chunk[1:]):
      yield (slice(start, min(start + chunk[0], shape[0])), *rest)


def copied(x: np.ndarray, out: np.ndarray) -> np.ndarray:
  """`out`, which is contiguous, with the numbers of x, of any strides.

  What numpy does at once for transposed arrays takes up to seven times as long: it reads one number a line.
  """
  shape, strides = [], []
  for size, stride in zip(x.shape, x.strides):
    if shape and strides[-1] == size * stride:  # axes that are one
      shape[-1], strides[-1] = shape[-1] * size, stride
    elif size != 1:
      shape, strides = [*shape, size], [*strides, stride]
  if len(shape) < 2 or strides[-1] == x.itemsize or not x.size:
    out[...] = x
    return out
  flat, into = np.lib.stride_tricks.as_strided(x, shape, strides, writeable=False), out.reshape(shape)
  if x.dtype != out.dtype:
    order = sorted(range(len(shape)), key=lambda axis: -strides[axis])
    flat = flat.transpose(order).astype(out.dtype, order='C').transpose(np.argsort(order))
  for i in range(0, shape[-1], TILE):
    into[..., i:i + TILE] = flat[..., i:i + TILE]
  return out
