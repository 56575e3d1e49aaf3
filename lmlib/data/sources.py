"""Where documents come from: Python's own standard library, or the user's files.

A source is a frozen dataclass with documents(), sorted by name, and skipped(). Text is exactly what
the file holds: UTF-8 without a change of newlines. What a user names must be readable to the last
byte; of the standard library, which nobody chose file by file, the unreadable is skipped and counted.
"""
from collections.abc import Iterator
import dataclasses
import glob as globs
import gzip
import json
import os
import pathlib
import sysconfig
import zlib

# Directories of the standard library that hold test suites, or that are not the library.
LEFT_OUT = frozenset({'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'})
TEXT_SUFFIXES = ('.py', '.txt', '.rst')


@dataclasses.dataclass(frozen=True)
class Document:
  name: str
  text: str


@dataclasses.dataclass(frozen=True)
class StandardLibrary:
  """The source of the standard library of the Python that runs, without its tests: about 12 MB."""

  def documents(self) -> Iterator[Document]:
    """One document a file, named by its path below the library. ValueError if no source is installed."""
    for name, text, reason in self._files():
      if reason is None:
        yield Document(name, text)

  def skipped(self) -> tuple[tuple[str, str], ...]:
    """(name, reason) of every file that documents() leaves out because it cannot be used."""
    return tuple((name, reason) for name, _, reason in self._files() if reason is not None)

  def _files(self):
    root = pathlib.Path(sysconfig.get_path('stdlib'))
    names = []
    for folder, below, files in os.walk(root):
      below[:] = [name for name in below if name not in LEFT_OUT]
      names += [(pathlib.Path(folder) / name).relative_to(root).as_posix()
                for name in files if name.endswith(TEXT_SUFFIXES)]
    if not names:
      raise ValueError(f'StandardLibrary: {root} holds no {", ".join(TEXT_SUFFIXES)} file; '
                       "use TextFiles(glob='...') with text of your own")
    for name in sorted(names):
      try:
        yield name, decoded((root / name).read_bytes(), name), None
      except OSError as error:
        yield name, None, f'unreadable: {error.strerror}'
      except ValueError as error:
        yield name, None, str(error).removeprefix(f'{name}: ')


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """The files that match a glob, or one of several; `**` also matches folders below.

  A .jsonl file holds one document a line, its text in `field`; any other file is one document of
  text. Either may be compressed, with .gz at the end of its name. A document is named by its path
  as the glob spells it, with ':' and the line number in a .jsonl file.
  """
  glob: str | tuple[str, ...]
  field: str | None = None

  def files(self) -> list[str]:
    """The matching paths, sorted. ValueError if a glob matches none, or `field` does not fit them."""
    paths = set()
    for pattern in (self.glob,) if isinstance(self.glob, str) else self.glob:
      found = filter(os.path.isfile, globs.glob(os.path.expanduser(pattern), recursive=True))
      found = {os.path.normpath(path) for path in found}
      if not found:
        raise ValueError(f'TextFiles.glob={pattern!r} matches no file (looked from {os.getcwd()})')
      paths |= found
    if not paths:
      raise ValueError(f'TextFiles.glob={self.glob!r} names no file')
    lines = [path for path in sorted(paths) if holds_lines(path)]
    if lines and not self.field:
      raise ValueError(f'TextFiles.field={self.field!r}, but {lines[0]} is .jsonl: '
                       'name the field that holds the text')
    if self.field is not None and not lines:
      raise ValueError(f'TextFiles.field={self.field!r} has no effect: '
                       f'glob={self.glob!r} matches no .jsonl file')
    return sorted(paths)

  def documents(self) -> Iterator[Document]:
    """The documents, by file and line. ValueError, naming the file, for whatever is not text."""
    for path in self.files():
      try:
        yield from self._lines(path) if holds_lines(path) else self._text(path)
      except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f'{path}: damaged or truncated gzip file: {error}') from error
      except OSError as error:
        raise ValueError(f'{path}: unreadable: {error.strerror}') from error

  def skipped(self) -> tuple[tuple[str, str], ...]:
    return ()

  def _text(self, path):
    with opened(path) as file:
      yield Document(path, decoded(file.read(), path))

  def _lines(self, path):
    number, offset, found = 0, 0, False
    with opened(path) as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield Document(f'{path}:{number}', self._field(line, f'{path}, line {number}', offset))
          found = True
        offset += len(line)
    if not found:
      raise ValueError(f'{path}: empty file')

  def _field(self, line: bytes, where: str, offset: int) -> str:
    try:
      value = json.loads(decoded(line, where, offset))
    except json.JSONDecodeError as error:
      raise ValueError(f'{where}: not JSON: {error}') from error
    if not isinstance(value, dict) or self.field not in value:
      holds = sorted(value) if isinstance(value, dict) else f'a JSON {type(value).__name__}'
      raise ValueError(f'{where}: no field {self.field!r} (TextFiles.field), but {holds}')
    text = value[self.field]
    if not isinstance(text, str) or not text:
      raise ValueError(f'{where}: field {self.field!r} is {text!r}, not a text')
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(f'{where}: field {self.field!r} holds half of a surrogate pair at {error.start}, '
                       'which is no Unicode text') from error
    return text


def holds_lines(path: str) -> bool:
  return path.removesuffix('.gz').endswith('.jsonl')


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
