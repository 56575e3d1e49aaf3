"""Files of llama.cpp's form GGUF: what they say of a model, and its tensors, one at a time.

A file (version 2 or 3): counts, metadata (key, type, value), the name, shape, type and place of every tensor, and
after padding the data. The reader of the package `gguf` believes all of it, so the header is read here, and every
count, length and place is held against the size of the file before anything is made of it. The package undoes the
quantisation of tensors and writes files.
"""
from collections.abc import Callable, Iterable
import dataclasses
import math
import os
import pathlib
import struct

import numpy as np

MAGIC = b'GGUF'
VERSIONS = (2, 3)
# Of what a number says a value's type is: 8 is a string, 9 an array.
SCALARS = {0: '<u1', 1: '<i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 7: '?', 10: '<u8', 11: '<i8',
           12: '<f8'}
STRING, ARRAY = 8, 9
# Types of tensors that are read: their number in a file, entries of a block, bytes of a block.
KINDS = {'F32': (0, 1, 4), 'F16': (1, 1, 2), 'BF16': (30, 1, 2), 'Q4_0': (2, 32, 18), 'Q4_1': (3, 32, 20),
         'Q5_0': (6, 32, 22), 'Q5_1': (7, 32, 24), 'Q8_0': (8, 32, 34), 'Q4_K': (12, 256, 144),
         'Q5_K': (13, 256, 176), 'Q6_K': (14, 256, 210)}
NUMBERS = {number: kind for kind, (number, _, _) in KINDS.items()}
ALIGNMENT = 32
AXES = 4
KEY_BYTES = 65_535
HEADER_BYTES = 1 << 28
BLOCK = 1 << 30  # bytes read at once; one call reads at most 2**31


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file: its type, its shape with the axis that lies together last, and its first byte there."""
  path: pathlib.Path
  name: str
  kind: str
  shape: tuple[int, ...]
  start: int = 0

  @property
  def dtype(self) -> np.dtype:
    """Of what read() gives."""
    return np.dtype(np.float32)

  @property
  def nbytes(self) -> int:
    _, entries, size = KINDS[self.kind]
    return math.prod(self.shape) // entries * size

  def read(self) -> np.ndarray:
    """The tensor in float32. ValueError if the file does not hold it any more."""
    import gguf
    raw, done = np.empty(self.nbytes, np.uint8), 0
    try:
      with open(self.path, 'rb', buffering=0) as file:
        while done < len(raw):
          if not (got := os.preadv(file.fileno(), [memoryview(raw)[done:done + BLOCK]], self.start + done)):
            raise ValueError(f'{self.path}: ends within {self.name}: it became shorter')
          done += got
    except OSError as error:
      raise ValueError(f'{self.path}: unreadable: {error.strerror}') from error
    rows = raw.reshape(*self.shape[:-1], -1)
    with np.errstate(all='ignore'):  # a scale that is no number makes none
      return gguf.dequantize(rows, gguf.GGMLQuantizationType[self.kind])


@dataclasses.dataclass(frozen=True, eq=False)
class File:
  """What a file says: values by key (arrays are lists of str, or numpy arrays), tensors by name."""
  path: pathlib.Path
  metadata: dict[str, object]
  tensors: dict[str, Stored]


class _Header:
  """The front of a file, read value by value; nothing is read, or made, that the file is too short for."""

  def __init__(self, path, file):
    self.path, self.file, self.at = path, file, 0
    self.size = os.fstat(file.fileno()).st_size

  def bytes(self, count: int, what: str) -> bytes:
    """The next `count` bytes."""
    self.room(count, 1, what)
    self.at += count
    if len(raw := self.file.read(count)) != count:
      raise ValueError(f'{self.path}: ends within {what}: it became shorter')
    return raw

  def room(self, count: int, least: int, what: str):
    """ValueError unless `count` things of at least so many bytes each can follow."""
    if count * least > self.size - self.at:
      raise ValueError(f'{self.path}: truncated, or altered: {what} would take {count * least:,} bytes at byte '
                       f'{self.at:,} of {self.size:,}')
    if self.at + count * least > HEADER_BYTES:
      raise ValueError(f'{self.path}: {what} would end the header at byte {self.at + count * least:,}; at most '
                       f'{HEADER_BYTES:,} are read')

  def number(self, form: str, what: str):
    """The next number of a struct format such as 'Q'."""
    return struct.unpack(f'<{form}', self.bytes(struct.calcsize(f'<{form}'), what))[0]

  def text(self, what: str, most: int = HEADER_BYTES) -> str:
    """The next string."""
    if (length := self.number('Q', what)) > most:
      raise ValueError(f'{self.path}: {what} of {length:,} bytes; at most {most:,} are read')
    try:
      return self.bytes(length, what).decode()
    except UnicodeDecodeError as error:
      raise ValueError(f'{self.path}: {what} is no UTF-8: {error}') from error

  def value(self, what: str, kind: int | None = None, *, inner: bool = False):
    """The next value of a type, whose number comes first if it is not given."""
    kind = self.number('I', what) if kind is None else kind
    if kind in SCALARS:
      dtype = np.dtype(SCALARS[kind])
      return np.frombuffer(self.bytes(dtype.itemsize, what), dtype)[0].item()
    if kind == STRING:
      return self.text(what)
    if kind != ARRAY or inner:
      raise ValueError(f'{self.path}: {what} has values of type {kind}, which is none that is read')
    kind, count = self.number('I', what), self.number('Q', what)
    if kind in SCALARS:
      dtype = np.dtype(SCALARS[kind])
      self.room(count, dtype.itemsize, what)
      return np.frombuffer(self.bytes(count * dtype.itemsize, what), dtype)
    self.room(count, 8, what)
    return [self.value(what, kind, inner=True) for _ in range(count)]


def opened(path) -> File:
  """The header of a GGUF file. ValueError, naming it, for one that is none, is cut short or contradicts itself."""
  path = pathlib.Path(path)
  try:
    with open(path, 'rb') as file:
      return _opened(_Header(path, file))
  except OSError as error:
    raise ValueError(f'{path}: unreadable: {error.strerror}') from error


def _opened(header: _Header) -> File:
  path = header.path
  if header.size < 24 or (magic := header.bytes(4, 'the first word')) != MAGIC:
    raise ValueError(f'{path}: no GGUF file: {header.size:,} bytes' + (
        f', which begin {magic!r}' if header.size >= 24 else ''))
  if (version := header.number('I', 'the version')) not in VERSIONS:
    raise ValueError(f'{path}: GGUF of version {version}; {" and ".join(map(str, VERSIONS))} are read, of '
                     'little-endian bytes')
  count, pairs = header.number('Q', 'the number of tensors'), header.number('Q', 'the number of keys')
  header.room(pairs, 13, f'{pairs:,} keys')
  metadata = {}
  for _ in range(pairs):
    key = header.text('a key', KEY_BYTES)
    if key in metadata:
      raise ValueError(f'{path}: the key {key!r:.100} is there twice')
    metadata[key] = header.value(f'{key!r:.100}')
  alignment = metadata.get('general.alignment', ALIGNMENT)
  if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
    raise ValueError(f'{path}: general.alignment={alignment!r:.40} must be a power of two')
  header.room(count, 24, f'{count:,} tensors')
  said = [_said(header) for _ in range(count)]
  return File(path, metadata, _placed(header, said, alignment))


def _said(header: _Header) -> tuple[Stored, int]:
  """The next tensor and where it says it begins, counted from the first."""
  name = header.text('the name of a tensor', KEY_BYTES)
  what = f'the tensor {name!r:.100}'
  if not 1 <= (axes := header.number('I', what)) <= AXES:
    raise ValueError(f'{header.path}: {what} has {axes} axes; 1 to {AXES} are read')
  shape = tuple(header.number('Q', what) for _ in range(axes))[::-1]
  number, offset = header.number('I', what), header.number('Q', what)
  if number not in NUMBERS:
    raise ValueError(f'{header.path}: {what} is of type {number}; read are {", ".join(KINDS)}')
  kind = NUMBERS[number]
  if not math.prod(shape) or shape[-1] % KINDS[kind][1]:
    raise ValueError(f'{header.path}: {what} has the shape {shape}, which no {kind} fills')
  return Stored(header.path, name, kind, shape), offset


def _placed(header: _Header, said: list[tuple[Stored, int]], alignment: int) -> dict[str, Stored]:
  """The tensors by name. ValueError unless they follow one another, as llama.cpp asks, and fill the file."""
  padded = lambda at: -(-at // alignment) * alignment
  data, end, found = padded(header.at), 0, {}
  for stored, offset in said:
    if stored.name in found:
      raise ValueError(f'{header.path}: the tensor {stored.name!r:.100} is there twice')
    if offset != padded(end):
      raise ValueError(f'{header.path}: the tensor {stored.name!r:.100} says it begins at byte {offset:,} of the data, '
                       f'where {padded(end):,} must be')
    found[stored.name] = dataclasses.replace(stored, start=data + offset)
    end = offset + stored.nbytes
  if said and not data + end <= header.size <= data + padded(end):
    raise ValueError(f'{header.path}: truncated or altered: its tensors end at byte {data + end:,}, the file at '
                     f'{header.size:,}')
  return found


def write(path, metadata: dict[str, object], stored: Iterable[Stored], read: Callable[[str], np.ndarray]):
  """Writes a file of these tensors; read(name) gives the numbers of each in float32, one after the other.

  `metadata` maps keys, general.architecture among them, to bool, int, float or str, or to lists of one of these.
  """
  import gguf
  types = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32,
           str: gguf.GGUFValueType.STRING}
  path, stored = pathlib.Path(path), list(stored)
  writer = gguf.GGUFWriter(None, metadata['general.architecture'])
  for key, value in metadata.items():
    if key == 'general.architecture':
      continue
    if isinstance(value, list):
      # llama.cpp wants the types of tokens, and all else that are numbers in a list, as int32.
      inner = gguf.GGUFValueType.INT32 if type(value[0]) is int else types[type(value[0])]
      writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, inner)
    else:
      writer.add_key_value(key, value, types[type(value)])
  for one in stored:
    writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), one.nbytes, gguf.GGMLQuantizationType[one.kind])
  unfinished = path.with_name(f'{path.name}.unfinished')
  try:
    writer.write_header_to_file(unfinished)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in stored:
      writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(read(one.name), np.float32),
                                             gguf.GGMLQuantizationType[one.kind]))
    writer.close()
    os.replace(unfinished, path)
  finally:
    writer.close()
    unfinished.unlink(missing_ok=True)
