"""Where documents come from: Python's own standard library, or the user's files, text, JSON lines or Parquet.

A source is a frozen dataclass with documents(), in a fixed order, and skipped(). parts() names pieces that
can be read each alone: documents(parts) are the documents of these, named as if all had been read. Text is
exactly what the file holds: UTF-8 without a change of newlines. What a user names must be readable to the
last byte; of the standard library, which nobody chose file by file, the unreadable is skipped and counted.
"""
from collections.abc import Callable, Iterator
import dataclasses
import glob as globs
import os
import pathlib
import re
import sysconfig

from lmlib.data import files
from lmlib.data.files import Piece, decoded, holds_lines, holds_rows, text_of

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

  @property
  def root(self) -> str:
    return sysconfig.get_path('stdlib')

  def parts(self) -> tuple[str, ...]:
    """One a file, by its path below the library. ValueError if no source is installed."""
    return tuple(self._names())

  def documents(self, parts: tuple[str, ...] | None = None) -> Iterator[Document]:
    """One document a file, named by its path below the library. ValueError if no source is installed."""
    for name, text, reason in self._files(parts):
      if reason is None:
        yield Document(name, text)

  def skipped(self) -> tuple[tuple[str, str], ...]:
    """(name, reason) of every file that documents() leaves out because it cannot be used."""
    return tuple((name, reason) for name, _, reason in self._files() if reason is not None)

  def _names(self) -> list[str]:
    root, names = pathlib.Path(sysconfig.get_path('stdlib')), []
    for folder, below, inside in os.walk(root):
      below[:] = [name for name in below if name not in LEFT_OUT]
      names += [(pathlib.Path(folder) / name).relative_to(root).as_posix()
                for name in inside if name.endswith(TEXT_SUFFIXES)]
    if not names:
      raise ValueError(f'StandardLibrary: {root} holds no {", ".join(TEXT_SUFFIXES)} file; '
                       "use TextFiles(glob='...') with text of your own")
    return sorted(names)

  def _files(self, parts=None):
    root, names = pathlib.Path(sysconfig.get_path('stdlib')), self._names()
    if unknown := set(parts or ()) - set(names):
      raise ValueError(f'StandardLibrary: there is no part {min(unknown)!r} in {root}')
    for name in names if parts is None else parts:
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
  text, or with `lines` one document a line, without its line end. Blank lines are none. Each may be
  compressed, with .gz at the end of its name. A document is named by its path as the glob spells
  it, with ':' and the line number where lines are documents.
  """
  glob: str | tuple[str, ...]
  field: str | None = None
  lines: bool = False

  def files(self) -> list[str]:
    """The matching paths, sorted. ValueError if a glob matches none, or `field` or `lines` does not fit them."""
    paths = matching(self.glob, 'TextFiles.glob')
    of_json = [path for path in paths if holds_lines(path)]
    if of_json and not self.field:
      raise ValueError(f'TextFiles.field={self.field!r}, but {of_json[0]} is .jsonl: '
                       'name the field that holds the text')
    if self.field is not None and not of_json:
      raise ValueError(f'TextFiles.field={self.field!r} has no effect: '
                       f'glob={self.glob!r} matches no .jsonl file')
    if self.lines and len(of_json) == len(paths):
      raise ValueError(f'TextFiles.lines={self.lines} has no effect: glob={self.glob!r} matches .jsonl files alone')
    return paths

  def parts(self) -> tuple[str, ...]:
    """One a file, or several of a long file of lines. ValueError as files()."""
    return tuple(piece.name for path in self.files()
                 for piece in (files.pieces(path) if self._cut(path) else [Piece(path)]))

  def documents(self, parts: tuple[str, ...] | None = None, *, unreadable: Callable | None = None,
                longest: int | None = None) -> Iterator[Document]:
    """The documents, by file and line. ValueError, naming the file, for whatever is not text.

    unreadable(where, message) is called instead, and the next line or file read. longest: bytes of a document;
    of a longer one no more is read, and it is an error like the others.
    """
    paths = self.files()
    for name in paths if parts is None else parts:
      piece = files.piece(name, paths)
      try:
        yield from (self._lines if self._cut(piece.path) else self._text)(piece, unreadable, longest)
      except ValueError as error:
        if unreadable is None:
          raise
        unreadable(piece.path, str(error))

  def skipped(self) -> tuple[tuple[str, str], ...]:
    return ()

  def _cut(self, path: str) -> bool:
    return self.lines or holds_lines(path)

  def _text(self, piece: Piece, unreadable, longest):
    with files.readable(piece.path), files.opened(piece.path) as file:
      raw = file.read() if longest is None else file.read(longest + 1)
    if longest is not None and len(raw) > longest:
      raise ValueError(f'{piece.path}: longer than longest={longest} bytes')
    yield Document(piece.path, decoded(raw, piece.path))

  def _lines(self, piece: Piece, unreadable, longest):
    found, wanted = False, (self.field,) if holds_lines(piece.path) else None
    for where, value in self._values(piece, wanted, unreadable, longest):
      found = True
      try:
        text = text_of(value, where, self.field) if wanted else value
      except ValueError as error:
        if unreadable is None:
          raise
        unreadable(where, str(error))
      else:
        yield Document(named(where), text)
    if not found and piece.stop is None and unreadable is None:
      raise ValueError(f'{piece.path}: empty file')

  def _values(self, piece: Piece, wanted, unreadable, longest):
    """(where, what should be a text) for every record, or line."""
    if wanted:
      for where, record in files.records(piece, wanted, unreadable=unreadable, longest=longest):
        yield where, record[self.field]
      return
    for number, offset, line in files.lines(piece, longest):
      where = f'{piece.path}, line {number}'
      try:
        if line is None:
          raise ValueError(f'{where}: longer than longest={longest} bytes')
        yield where, decoded(line, where, offset).removesuffix('\n').removesuffix('\r')
      except ValueError as error:
        if unreadable is None:
          raise
        unreadable(where, str(error))


@dataclasses.dataclass(frozen=True)
class DataFolder:
  """One split of a data set in the layout of Hugging Face's: .parquet or .jsonl files, named or filed by split.

  train.jsonl, train-00000-of-00002.parquet, train/0000.parquet and the same below data/, where .jsonl may end
  in .gz too. With split=None `path` is a glob of such files. A document is the text of `field` in one record,
  named by the file, ':' and the line or row, counted from 1. Empty texts are an error, or skipped and counted.
  """
  path: str
  split: str | None = 'train'
  field: str = 'text'
  skip_empty: bool = False

  def files(self) -> list[str]:
    """The paths of the split, sorted. ValueError if there is none, or some of them are missing."""
    if self.split is None:
      paths = matching(self.path, 'DataFolder.path')
      if wrong := [path for path in paths if not holds_lines(path) and not holds_rows(path)]:
        raise ValueError(f'DataFolder.path={self.path!r} matches {wrong[0]}, which is neither .parquet nor .jsonl')
      return paths
    root, splits = os.path.normpath(os.path.expanduser(self.path)), {}
    for folder in (root, os.path.join(root, 'data')):
      for path in globs.glob(os.path.join(globs.escape(folder), '*')) if os.path.isdir(folder) else ():
        if os.path.isdir(path) and os.path.basename(path) != 'data':
          inside = globs.glob(os.path.join(globs.escape(path), '*'))
          splits.setdefault(os.path.basename(path), []).extend(one for one in inside if SPLIT.fullmatch(one))
        elif found := SPLIT.fullmatch(path):
          splits.setdefault(found['split'], []).append(path)
    if not splits.get(self.split):
      known = sorted(split for split, paths in splits.items() if paths)
      raise ValueError(f'DataFolder.path={self.path!r} holds no split {self.split!r} (.parquet or .jsonl); '
                       f'it has {", ".join(known) or "none"} (looked from {os.getcwd()})')
    return complete(sorted(map(os.path.normpath, splits[self.split])))

  def parts(self) -> tuple[str, ...]:
    """One a file, or several of a long one. ValueError as files()."""
    return tuple(piece.name for path in self.files() for piece in files.pieces(path))

  def records(self, parts: tuple[str, ...] | None = None, *,
              columns: tuple[str, ...] | None = None) -> Iterator[tuple[str, dict]]:
    """(name, record) for every record, in order, of `columns` (None: all), which must be there."""
    paths = self.files()
    for name in paths if parts is None else parts:
      for where, record in files.records(files.piece(name, paths), columns):
        yield named(where), record

  def documents(self, parts: tuple[str, ...] | None = None, *, unreadable: Callable | None = None,
                longest: int | None = None) -> Iterator[Document]:
    """The documents, by file and record. ValueError, naming both, for whatever is not text.

    unreadable and longest: as TextFiles.documents; a damaged file is left out from where the damage is.
    """
    paths = self.files()
    for part in paths if parts is None else parts:
      try:
        for where, record in files.records(files.piece(part, paths), (self.field,), unreadable=unreadable,
                                           longest=longest):
          if self.skip_empty and empty(record[self.field]):
            continue
          try:
            text = text_of(record[self.field], named(where), self.field)
          except ValueError as error:
            if unreadable is None:
              raise
            unreadable(named(where), str(error))
          else:
            yield Document(named(where), text)
      except ValueError as error:
        if unreadable is None:
          raise
        unreadable(part, str(error))

  def skipped(self) -> tuple[tuple[str, str], ...]:
    """(name, reason) of every record without text, if skip_empty. Reads all files again."""
    if not self.skip_empty:
      return ()
    return tuple((name, 'empty text') for name, record in self.records(columns=(self.field,))
                 if empty(record[self.field]))


# train.jsonl, train-00000-of-00002.parquet, and with a hash behind it
SPLIT = re.compile(r'(.*/)?(?P<split>[^/]+?)(-\d+(-of-\d+)?(-[0-9a-f]{8,})?)?\.(parquet|jsonl|jsonl\.gz)')


def matching(glob: str | tuple[str, ...], setting: str) -> list[str]:
  """The files that match a glob or one of several, sorted. ValueError, naming the setting, if one matches none."""
  paths = set()
  for pattern in (glob,) if isinstance(glob, str) else glob:
    found = filter(os.path.isfile, globs.glob(os.path.expanduser(pattern), recursive=True))
    found = {os.path.normpath(path) for path in found}
    if not found:
      raise ValueError(f'{setting}={pattern!r} matches no file (looked from {os.getcwd()})')
    paths |= found
  if not paths:
    raise ValueError(f'{setting}={glob!r} names no file')
  return sorted(paths)


def complete(paths: list[str]) -> list[str]:
  """The paths. ValueError if their names say that there should be more of them."""
  for path in paths:
    if numbers := re.search(r'-(\d+)-of-(\d+)', os.path.basename(path)):
      shards = {int(n[1]) for n in (re.search(r'-(\d+)-of-' + numbers[2], other) for other in paths) if n}
      if missing := set(range(int(numbers[2]))) - shards:
        raise ValueError(f'{os.path.dirname(path)}: of {numbers[2]} files of the split, number '
                         f'{min(missing):0{len(numbers[1])}} is missing')
  return paths


def empty(value) -> bool:
  return value is None or value == ''


def named(where: str) -> str:
  """The name of a document: 'a.jsonl:3' for 'a.jsonl, line 3'."""
  path, _, number = where.rpartition(', ')
  return f'{path}:{number.split(" ")[1]}'
