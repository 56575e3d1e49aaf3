"""Tensors in files of Hugging Face's form safetensors, one at a time and never more in memory.

A file: the length of the header in 8 bytes, the header (JSON: type, shape and place of every tensor), the
data. Nothing that a header says is believed before it is checked against the file: lengths, places, overlaps,
shapes. Pickle files (.bin, .pt) are never opened, for reading one runs whatever program it holds.

Read with pread and not by the package `safetensors`: pages of a memory map count as memory in use, and a file
that shrinks under one ends the process.
"""
import dataclasses
import itertools
import json
import math
import os
import pathlib
import struct

import jax.numpy as jnp
import numpy as np

from lmlib.interop.folder import JSON_BYTES, inside, parsed, read_json

FILE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle')
TYPES = {name: np.dtype(kind) for name, kind in {
    'BOOL': np.bool_, 'U8': np.uint8, 'I8': np.int8, 'U16': np.uint16, 'I16': np.int16, 'U32': np.uint32,
    'I32': np.int32, 'U64': np.uint64, 'I64': np.int64, 'F16': np.float16, 'F32': np.float32, 'F64': np.float64,
    'BF16': jnp.bfloat16, 'F8_E4M3': jnp.float8_e4m3fn, 'F8_E5M2': jnp.float8_e5m2}.items()}
NAMES = {kind: name for name, kind in TYPES.items()}
AXES = 16  # that a tensor may have
BLOCK = 1 << 30  # bytes read at once; one call reads at most 2**31


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file: its type, its shape, and its first byte there."""
  path: pathlib.Path
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def read(self, first: int = 0, rows: int | None = None) -> np.ndarray:
    """The tensor, or `rows` of it from `first` on. ValueError if the file does not hold it any more."""
    shape = self.shape if rows is None else (rows, *self.shape[1:])
    x = np.empty(shape, self.dtype)
    start = self.start + (first * (x.nbytes // rows) if rows else 0)
    into = memoryview(x.reshape(-1).view(np.uint8))
    done = 0
    try:
      with open(self.path, 'rb', buffering=0) as file:
        while done < len(into):
          if not (got := os.preadv(file.fileno(), [into[done:done + BLOCK]], start + done)):
            raise ValueError(f'{self.path}: ends within {self.name}: it became shorter')
          done += got
    except OSError as error:
      raise ValueError(f'{self.path}: unreadable: {error.strerror}') from error
    return x


def header(path: pathlib.Path) -> list[Stored]:
  """The tensors that a file says it holds, by place. ValueError, naming the file, for one that cannot be so."""
  try:
    with open(path, 'rb') as file:
      size = os.fstat(file.fileno()).st_size
      if size < 8:
        raise ValueError(f'{path}: {size} bytes are no safetensors file')
      length, = struct.unpack('<Q', file.read(8))
      if not 2 <= length <= size - 8:
        raise ValueError(f'{path}: truncated, or no safetensors file: its header would have {length:,} bytes, '
                         f'the file has {size:,}')
      if length > JSON_BYTES:
        raise ValueError(f'{path}: a header of {length:,} bytes; at most {JSON_BYTES:,} are read')
      raw = file.read(length)
  except OSError as error:
    raise ValueError(f'{path}: unreadable: {error.strerror}') from error
  said = parsed(raw, f'{path}: header')
  said.pop('__metadata__', None)
  found = sorted((_stored(path, name, one, 8 + length) for name, one in said.items()),
                 key=lambda stored: (stored.start, stored.nbytes))
  end, before = 8 + length, None
  for stored in found:
    if stored.start != end:
      what = f'overlaps {before!r:.100}' if stored.start < end else f'leaves a gap of {stored.start - end:,} bytes'
      raise ValueError(f'{path}: {stored.name!r:.100} {what}')
    end, before = stored.start + stored.nbytes, stored.name
  if end != size:
    raise ValueError(f'{path}: truncated or altered: its tensors end at byte {end:,}, the file at {size:,}')
  return found


def _stored(path, name: str, said, data: int) -> Stored:
  where = f'{path}: {name!r:.100}'
  if not isinstance(said, dict) or set(said) != {'dtype', 'shape', 'data_offsets'}:
    raise ValueError(f'{where}: not of dtype, shape and data_offsets')
  kind, shape, offsets = said['dtype'], said['shape'], said['data_offsets']
  if not isinstance(kind, str) or kind not in TYPES:
    raise ValueError(f'{where}: dtype={kind!r:.40}; known are {", ".join(TYPES)}')
  if not _counts(shape) or len(shape) > AXES:
    raise ValueError(f'{where}: shape={shape!r:.100} must be at most {AXES} sizes')
  if not _counts(offsets) or len(offsets) != 2:
    raise ValueError(f'{where}: data_offsets={offsets!r:.100} must be two places')
  stored = Stored(path, name, TYPES[kind], tuple(shape), data + offsets[0])
  if stored.nbytes != offsets[1] - offsets[0]:
    raise ValueError(f'{where}: {kind} of shape {tuple(shape)} takes {stored.nbytes:,} bytes, but data_offsets '
                     f'give it {offsets[1] - offsets[0]:,}')
  return stored


def _counts(values) -> bool:
  """Whether this is a list of numbers of 0 to 2**63."""
  return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def in_folder(folder: pathlib.Path) -> list[Stored]:
  """The tensors of a folder: of model.safetensors, or of the files that its index names.

  One name may be there twice: who reads them says so. ValueError for damaged files, names in the index that
  lead out, tensors that are not where the index says, and where there are only pickle files.
  """
  if (single := inside(folder, FILE)) is not None:
    return header(single)
  if (index := inside(folder, INDEX)) is None:
    _explain(folder)
  places = read_json(index).get('weight_map')
  if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
    raise ValueError(f'{index}: weight_map must name the file of every tensor')
  found = []
  for name in sorted(set(places.values())):
    if _is_pickle(name):
      raise ValueError(f'{index}: names {name}. {WHY}')
    path = inside(folder, name)
    if path is None:
      raise ValueError(f'{index}: names {name}, which is not there')
    found += header(path)
  there = {(stored.name, stored.path.name) for stored in found}
  if astray := sorted(name for name, file in places.items() if (name, file) not in there):
    raise ValueError(f'{index}: not in the file it says: {_few(astray)}')
  return found


WHY = ('A pickle file can run any program when it is read, so it is never opened here. Where you trust it, '
       "transformers writes the safe form: AutoModelForCausalLM.from_pretrained(folder).save_pretrained('new')")


def _is_pickle(name: str) -> bool:
  return name.endswith(PICKLES)


def _explain(folder: pathlib.Path):
  names = sorted(path.name for path in folder.iterdir())
  if pickles := [name for name in names if _is_pickle(name)]:
    raise ValueError(f'{folder}: the weights are in {_few(pickles)}. {WHY}')
  others = [name for name in names if name.endswith('.safetensors')]
  raise ValueError(f'{folder}: there is neither {FILE} nor {INDEX}'
                   + (f', but {_few(others)}' if others else ''))


def _few(names: list[str]) -> str:
  return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


class Writer:
  """Writes tensors, whose shapes are known, into files of at most `longest` bytes of data, in any order.

  A tensor that is larger has a file of its own; `single` is what the file is called if it is one. close() says what
  is missing and syncs; the index comes last.
  """

  def __init__(self, folder: pathlib.Path, tensors: dict[str, tuple[tuple[int, ...], np.dtype]], *,
               longest: int = 5_000_000_000, single: str = FILE):
    self._places, self._files, self._left = {}, [], set(tensors)
    shards, size = [[]], 0
    for name, (shape, dtype) in tensors.items():
      nbytes = math.prod(shape) * dtype.itemsize
      if shards[-1] and size + nbytes > longest:
        shards.append([])
        size = 0
      shards[-1].append((name, shape, dtype, nbytes))
      size += nbytes
    names = [single] if len(shards) == 1 else [
        f'model-{i:05}-of-{len(shards):05}.safetensors' for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
      self._begin(folder / name, shard)
    if len(shards) > 1:
      total = sum(nbytes for shard in shards for *_, nbytes in shard)
      self._index = (folder / INDEX, {'metadata': {'total_size': total}, 'weight_map': {
          name: file for file, shard in zip(names, shards) for name, *_ in shard}})
    else:
      self._index = None

  def _begin(self, path: pathlib.Path, shard: list):
    ends = list(itertools.accumulate(nbytes for *_, nbytes in shard))
    said = {'__metadata__': {'format': 'pt'}} | {
        name: {'dtype': NAMES[dtype], 'shape': list(shape), 'data_offsets': [end - nbytes, end]}
        for (name, shape, dtype, nbytes), end in zip(shard, ends)}
    raw = json.dumps(said, separators=(',', ':')).encode()
    raw += b' ' * (-len(raw) % 8)
    if len(raw) > JSON_BYTES:
      raise ValueError(f'{path}: a header of {len(raw):,} bytes for {len(shard):,} tensors; write smaller files')
    file = open(path, 'wb', buffering=0)
    self._files.append(file)
    _write(file, struct.pack('<Q', len(raw)) + raw, 0)
    os.ftruncate(file.fileno(), 8 + len(raw) + sum(nbytes for *_, nbytes in shard))
    for (name, shape, dtype, nbytes), end in zip(shard, ends):
      self._places[name] = (file, Stored(path, name, dtype, shape, 8 + len(raw) + end - nbytes))

  def write(self, name: str, x: np.ndarray):
    """Puts a tensor where it belongs, as the type it was announced with."""
    file, stored = self._places[name]
    assert x.shape == stored.shape, (name, x.shape, stored.shape)
    self._left.remove(name)
    raw = np.ascontiguousarray(x, stored.dtype).reshape(-1).view(np.uint8)
    _write(file, raw, stored.start)

  def close(self):
    """Everything is on the disk when this returns. ValueError if a tensor has not come."""
    if self._left:
      raise ValueError(f'not written: {_few(sorted(self._left))}')
    for file in self._files:
      os.fsync(file.fileno())
    if self._index is not None:
      path, said = self._index
      path.write_text(json.dumps(said, indent=2) + '\n')

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *_):
    for file in self._files:
      file.close()


def _write(file, raw, start: int):
  raw = memoryview(raw)
  done = 0
  while done < len(raw):
    try:
      done += os.pwrite(file.fileno(), raw[done:done + BLOCK], start + done)
    except OSError as error:
      raise OSError(error.errno, error.strerror, file.name) from error
