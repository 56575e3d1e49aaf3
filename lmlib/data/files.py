"""Reading files a piece at a time: whole ones, lines of a range of bytes, rows of some groups of a Parquet file.

A piece knows the number of its first line or row, so what is read is named the same however a file is cut.
Cuts depend on positions alone: at the first line, or group of rows, that begins at or after a multiple of PART.
"""
from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import gzip
import json
import os
import re
import zlib

PART = 1 << 26  # bytes of a piece, more by one line or row group at most
BLOCK = 1 << 20  # bytes read at once to count lines
SPELT = 8  # bytes of a line of JSON at most, for one of text: escapes, and other fields
ROWS = 256  # of a Parquet file, turned into Python objects at once


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a file: bytes of lines, or row groups, `start` to `stop`; None: all. `first` is counted from 1."""
  path: str
  start: int = 0
  stop: int | None = None
  first: int = 1

  @property
  def name(self) -> str:
    unit = 'row' if holds_rows(self.path) else 'line'
    return self.path if self.stop is None else f'{self.path}[{self.start}:{self.stop}] from {unit} {self.first}'


def piece(name: str, paths: Iterable[str]) -> Piece:
  """The piece of this name. ValueError if it is a part of none of the files at `paths`."""
  if name in (paths := set(paths)):
    return Piece(name)
  found = re.fullmatch(r'(.*)\[(\d+):(\d+)\] from (?:line|row) (\d+)', name, re.DOTALL)
  if not found or found[1] not in paths:
    raise ValueError(f'there is no part {name!r}: it belongs to none of {len(paths)} files')
  return Piece(found[1], *map(int, found.groups()[1:]))


def pieces(path: str) -> list[Piece]:
  """The pieces of a file, in order. A file of text that is no lines, or compressed, is one. ValueError as below."""
  with readable(path):
    if holds_rows(path):
      return row_pieces(path)
    if path.endswith('.gz') or os.path.getsize(path) <= PART:
      return [Piece(path)]
    return line_pieces(path)


def line_pieces(path: str) -> list[Piece]:
  """A file of lines, cut at the first line that begins at or after each multiple of PART bytes."""
  found, start, line = [], 0, 1
  with open(path, 'rb') as file:
    size = os.fstat(file.fileno()).st_size
    while start < size:
      goal, lines, last = (start // PART + 1) * PART, 0, b'\n'
      while left := min(goal, size) - file.tell():
        last = file.read(min(left, BLOCK))
        lines += last.count(b'\n')
        if not last:
          raise ValueError(f'{path}: became shorter while it was read')
      if not last.endswith(b'\n'):
        lines += file.readline().endswith(b'\n')
      found.append(Piece(path, start, file.tell(), line))
      start, line = file.tell(), line + lines
  return found if len(found) > 1 else [Piece(path)]


def row_pieces(path: str) -> list[Piece]:
  """A Parquet file, cut at its row groups."""
  groups = parquet(path).metadata
  found, start, row, size, rows = [], 0, 1, 0, 0
  for i in range(groups.num_row_groups):
    size, rows = size + groups.row_group(i).total_byte_size, rows + groups.row_group(i).num_rows
    if size >= PART or i == groups.num_row_groups - 1:
      found.append(Piece(path, start, i + 1, row))
      start, row, size, rows = i + 1, row + rows, 0, 0
  return found if len(found) > 1 else [Piece(path)]


def lines(piece: Piece, longest: int | None = None) -> Iterator[tuple[int, int, bytes | None]]:
  """(number of the line, its first byte, its bytes) for every line of a piece that is not blank.

  longest: bytes of a line; a longer one is None, and never all in memory.
  """
  with readable(piece.path), opened(piece.path) as file:
    if piece.start:
      file.seek(piece.start - 1)
      if file.read(1) != b'\n':
        raise ValueError(f'{piece.path}: changed: no line begins at byte {piece.start}')
    offset = piece.start
    for number, (line, size) in enumerate(limited(file, longest), piece.first):
      if line is None or line.strip():
        yield number, offset, line
      offset += size
      if piece.stop is not None and offset >= piece.stop:
        return
    if piece.stop is not None and offset < piece.stop:
      raise ValueError(f'{piece.path}: changed: it ends before byte {piece.stop}')


def limited(file, longest: int | None) -> Iterator[tuple[bytes | None, int]]:
  """Each line with its end, and its bytes; of a line longer than `longest` only how many."""
  while line := file.readline(-1 if longest is None else longest + 1):
    size = len(line)
    if longest is None or size <= longest:
      yield line, size
      continue
    while not line.endswith(b'\n') and (line := file.readline(BLOCK)):
      size += len(line)
    yield None, size


def records(piece: Piece, columns: tuple[str, ...] | None = None, *, unreadable: Callable | None = None,
            longest: int | None = None) -> Iterator[tuple[str, dict]]:
  """(where, record) for every line of JSON or row of a piece; `columns` (None: all) must be there.

  ValueError, naming the file and line or row, for what is no record; unreadable(where, message) is called
  instead for a line, and the next one read. longest: bytes of text, SPELT times as many of a line.
  """
  if holds_rows(piece.path):
    yield from rows(piece, columns)
    return
  for number, offset, line in lines(piece, None if longest is None else SPELT * longest):
    where = f'{piece.path}, line {number}'
    try:
      if line is None:
        raise ValueError(f'{where}: too long for longest={longest} bytes of text')
      value = record(line, where, offset, columns)
    except ValueError as error:
      if unreadable is None:
        raise
      unreadable(where, str(error))
    else:
      yield where, value


def record(line: bytes, where: str, offset: int, columns: tuple[str, ...] | None) -> dict:
  """The object that a line of JSON holds. ValueError if it is none, or lacks a column."""
  try:
    value = json.loads(decoded(line, where, offset))
  except json.JSONDecodeError as error:
    raise ValueError(f'{where}: not JSON: {error}') from error
  except RecursionError as error:
    raise ValueError(f'{where}: JSON nested too deep') from error
  for column in columns or ():
    if not isinstance(value, dict) or column not in value:
      holds = sorted(value) if isinstance(value, dict) else f'a JSON {type(value).__name__}'
      raise ValueError(f'{where}: no field {column!r}, but {holds}')
  if not isinstance(value, dict):
    raise ValueError(f'{where}: a JSON {type(value).__name__}, not an object')
  return value


def rows(piece: Piece, columns: tuple[str, ...] | None) -> Iterator[tuple[str, dict]]:
  """(where, row) for every row of a piece of a Parquet file."""
  with readable(piece.path):
    file = parquet(piece.path)
    names = file.schema_arrow.names
    if missing := [column for column in columns or () if column not in names]:
      raise ValueError(f'{piece.path}: no field {missing[0]!r}, but {sorted(names)}')
    groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
    if groups.stop > file.num_row_groups:
      raise ValueError(f'{piece.path}: changed: it has {file.num_row_groups} row groups')
    number = piece.first
    batches = file.iter_batches(ROWS, row_groups=list(groups), columns=None if columns is None else list(columns))
    for batch in batches if groups else ():
      for row in batch.to_pylist():
        yield f'{piece.path}, row {number}', row
        number += 1


def parquet(path: str):
  """An open Parquet file. ValueError if it is none, or pyarrow is not installed."""
  try:
    from pyarrow import parquet as parquets
  except ImportError as error:
    raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'lmlib[parquet]'") from error
  return parquets.ParquetFile(path)


@contextlib.contextmanager
def readable(path: str):
  """What goes wrong while a file is read, as a ValueError that names it."""
  try:
    yield
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise ValueError(f'{path}: damaged or truncated gzip file: {error}') from error
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: not UTF-8: {error.reason}') from error
  except OSError as error:
    raise ValueError(f'{path}: unreadable: {error.strerror or " ".join(str(error).split())}') from error
  except ValueError as error:
    if type(error).__module__.startswith('pyarrow'):
      raise ValueError(f'{path}: not a whole Parquet file: {" ".join(str(error).split())}') from error
    raise


def holds_lines(path: str) -> bool:
  return path.removesuffix('.gz').endswith('.jsonl')


def holds_rows(path: str) -> bool:
  return path.endswith('.parquet')


def opened(path: str):
  return gzip.open(path) if path.endswith('.gz') else open(path, 'rb')


def decoded(raw: bytes, where: str, offset: int = 0) -> str:
  """`raw`, found `offset` bytes into a file, as text. ValueError if empty, binary or not UTF-8."""
  if not raw:
    raise ValueError(f'{where}: empty file')
  if (at := raw.find(0)) >= 0:
    raise ValueError(f'{where}: binary file (a NUL at byte {offset + at})')
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    raise ValueError(f'{where}: not UTF-8 at byte {offset + error.start}: {error.reason}') from error


def text_of(value, where: str, field: str) -> str:
  """The text of a field. ValueError if it is no text, or empty, or none that UTF-8 can hold."""
  if not isinstance(value, str) or not value:
    raise ValueError(f'{where}: field {field!r} is {value!r}, not a text')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'{where}: field {field!r} holds half of a surrogate pair at {error.start}, '
                     'which is no Unicode text') from error
  return value
