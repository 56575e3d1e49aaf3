"""From a source of documents to tokenised stores, train and held-out.

A document is held out, or not, by the hash of its name: adding a file moves no other. The tokeniser
is trained on the train part alone. prepare() keeps the result in the cache under a fingerprint of names,
contents and settings, so what is found there is what would be made; experiments/prepare.py makes it at a path
of one's own, by the same steps (preparation.py).
"""
from collections.abc import Callable
import contextlib
import dataclasses
import functools
import os
import pathlib
import secrets
from typing import Any

from lmlib.data import cleaning, pipeline, preparation, store
from lmlib.data.folder import Folder
from lmlib.data.mixture import Mixture
from lmlib.data.sources import StandardLibrary
from lmlib.data.store import Store
from lmlib.data.tokenizer import SentencePiece, Tokenizer
from lmlib.data.workers import Local

ON_ERROR = ('refuse', 'skip')


@dataclasses.dataclass(frozen=True)
class Corpus:
  """What to prepare, and how. A source is described in sources.py, a cleaning stage in cleaning.py."""
  source: Any = dataclasses.field(default_factory=StandardLibrary)  # or a tuple of several
  tokenizer: Any = dataclasses.field(default_factory=SentencePiece)
  held_out: float | None = 0.05  # share of the documents, by the hash of their names; None: no such part
  stages: tuple = ()  # of cleaning, in their order; those that compare documents last
  on_error: str = 'refuse'  # a document that cannot be read, or 'skip': leave it out, counted
  longest: int = 50_000_000  # bytes of a document; a longer one cannot be read. Memory grows with it, some 20 times

  def __post_init__(self):
    if self.held_out is not None and not 0 < self.held_out < 1:
      raise ValueError(f'Corpus.held_out={self.held_out} must lie between 0 and 1')
    if self.on_error not in ON_ERROR:
      raise ValueError(f'Corpus.on_error={self.on_error!r} must be one of {", ".join(ON_ERROR)}')
    if self.longest < 1:
      raise ValueError(f'Corpus.longest={self.longest} must be positive')
    if not self.sources:
      raise ValueError('Corpus.source=() names no source')
    cleaning.divided(self.stages)

  @property
  def sources(self) -> tuple:
    return self.source if isinstance(self.source, tuple) else (self.source,)

  @property
  def vocab(self) -> int:
    """The size of the vocabulary, known before the tokenizer is trained."""
    return self.tokenizer.pieces


@dataclasses.dataclass(frozen=True)
class Stored:
  """What experiments/prepare.py has written at `path`, a folder or a URL that tensorstore knows."""
  path: str

  @property
  def vocab(self) -> int:
    return Store(Folder(self.path) / 'train').tokenizer.vocab


@dataclasses.dataclass(frozen=True)
class Prepared:
  train: Store
  held_out: Store | None
  skipped: tuple[tuple[str, str], ...] = ()  # (name, reason) of files that the source left out

  @property
  def tokenizer(self) -> Tokenizer:
    return self.train.tokenizer

  @property
  def rows(self) -> list[dict]:
    """What was read, one row a part: part, documents, bytes, tokens, bytes_per_token."""
    return [{'part': part, 'documents': kept.documents, 'bytes': kept.text_bytes, 'tokens': kept.tokens,
             'bytes_per_token': kept.text_bytes / kept.tokens}
            for part, kept in (('train', self.train), ('held out', self.held_out)) if kept is not None]

  def table(self) -> str:
    """Documents, bytes and tokens of every part, and how many files were left out."""
    lines = [f'{"data":<12}{"documents":>10}{"MB":>9}{"tokens":>12}{"bytes/token":>13}']
    lines += [f'{row["part"]:<12}{row["documents"]:>10,}{row["bytes"] / 1e6:>9.2f}{row["tokens"]:>12,}'
              f'{row["bytes_per_token"]:>13.2f}' for row in self.rows]
    if self.skipped:
      lines.append(f'skipped {len(self.skipped)} files, for example {": ".join(self.skipped[0])}')
    return '\n'.join(lines)


def default_cache() -> pathlib.Path:
  """$LMLIB_CACHE, else $XDG_CACHE_HOME/lmlib, else ~/.cache/lmlib."""
  if os.environ.get('LMLIB_CACHE'):
    return pathlib.Path(os.environ['LMLIB_CACHE'])
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'lmlib'


def prepare(data: Corpus | Stored | Mixture, cache: str | os.PathLike | None = None, *,
            say: Callable[[str], None] = lambda line: None) -> Prepared:
  """The stores of a corpus, or of all of a mixture, from the cache if they are there.

  `say` gets a line before each long job.
  Two processes may prepare the same corpus at once: one works, the other waits for it. ValueError for
  text that cannot be read, split or tokenised; OSError, naming the path, if the cache cannot be
  written. Neither leaves anything in the cache, and what a killed process has left there is removed.
  """
  if isinstance(data, Stored):
    return opened(data.path)
  if isinstance(data, Mixture):
    return data.prepared(functools.partial(prepare, cache=cache, say=say))
  contents = [pipeline.content(data, source) for source in data.sources]
  cache = pathlib.Path(cache or default_cache())
  wanted = preparation.identity(data, contents)
  folder = cache / store.digest(wanted)[:32]
  remove_leftovers(cache, folder)
  if folder.exists():
    try:
      return opened(folder, preparation.skipped(data), check=True)
    except ValueError as error:
      say(f'{error}: preparing it again')
      discard(folder)
  try:
    preparation.write(data, folder, engine=Local(1), say=say, contents=contents, wait=say, keep=False)
  except OSError as error:
    raise OSError(f'{error}; prepared data goes to cache={cache}, by default $LMLIB_CACHE') from error
  return opened(folder, preparation.skipped(data), check=True)


def opened(path, skipped=(), *, check: bool = False) -> Prepared:
  """The prepared data in a folder. ValueError if it is not whole. check: look into every file."""
  folder = Folder(path)
  parts = preparation.manifest_of(folder)['parts']
  prepared = Prepared(*(Store(folder / part) if part in parts else None for part in ('train', 'held_out')), skipped)
  for part in parts:
    kept = getattr(prepared, part)
    if kept.fingerprint != parts[part]['fingerprint']:
      raise ValueError(f'{kept.path} is damaged, or another store: its fingerprint is not the one of {folder}')
    if kept.tokenizer.fingerprint != prepared.tokenizer.fingerprint:
      raise ValueError(f'{folder} is damaged: its two stores have different tokenizers')
    if check:
      kept.check()
  return prepared


def remove_leftovers(cache: pathlib.Path, own: pathlib.Path):
  """Removes what killed processes have left unfinished in the cache, but for what goes on as `own`."""
  for path in cache.glob('*.partial'):
    if path.name != f'{own.name}.partial':
      with contextlib.suppress(ValueError, OSError), Folder(path).locked():
        Folder(path).remove()


def discard(folder: pathlib.Path):
  """Removes a folder; its name is free at once, also for another process."""
  aside = folder.parent / f'{folder.name}.{secrets.token_hex(4)}.partial'
  try:
    os.rename(folder, aside)
  except OSError as error:
    raise OSError(f'cannot replace the damaged {folder}: {error.strerror}') from error
  Folder(aside).remove()


