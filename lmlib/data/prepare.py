"""From a source of documents to two tokenised stores, train and held-out, made once and kept.

A document is held out, or not, by the hash of its name: adding a file moves no other. The tokeniser
is trained on the train part alone. The result lies in the cache under a fingerprint of names,
contents and settings, so what is found there is what would be made.
"""
from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import itertools
import os
import pathlib
import secrets
import shutil

from lmlib.data import store
from lmlib.data.sources import Document, StandardLibrary, TextFiles
from lmlib.data.store import Store
from lmlib.data.tokenizer import SentencePiece, Tokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
  source: StandardLibrary | TextFiles = dataclasses.field(default_factory=StandardLibrary)
  tokenizer: SentencePiece = dataclasses.field(default_factory=SentencePiece)
  held_out: float = 0.05  # share of the documents, by the hash of their names

  def __post_init__(self):
    if not 0 < self.held_out < 1:
      raise ValueError(f'Corpus.held_out={self.held_out} must lie between 0 and 1')

  @property
  def vocab(self) -> int:
    """The size of the vocabulary, known before the tokenizer is trained."""
    return self.tokenizer.pieces


@dataclasses.dataclass(frozen=True)
class Prepared:
  train: Store
  held_out: Store
  skipped: tuple[tuple[str, str], ...]  # (name, reason) of files that the source left out

  @property
  def tokenizer(self) -> Tokenizer:
    return self.train.tokenizer

  @property
  def rows(self) -> list[dict]:
    """What was read, one row a part: part, documents, bytes, tokens, bytes_per_token."""
    return [{'part': part, 'documents': kept.documents, 'bytes': kept.text_bytes, 'tokens': kept.tokens,
             'bytes_per_token': kept.text_bytes / kept.tokens}
            for part, kept in (('train', self.train), ('held out', self.held_out))]


@dataclasses.dataclass(frozen=True)
class Entry:
  """What is remembered of a document between two readings of the source."""
  name: str
  sha256: str
  characters: int
  bytes: int


def default_cache() -> pathlib.Path:
  """$LMLIB_CACHE, else $XDG_CACHE_HOME/lmlib, else ~/.cache/lmlib."""
  if os.environ.get('LMLIB_CACHE'):
    return pathlib.Path(os.environ['LMLIB_CACHE'])
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'lmlib'


def prepare(corpus: Corpus, cache: str | os.PathLike | None = None, *,
            say: Callable[[str], None] = lambda line: None) -> Prepared:
  """The stores of a corpus, from the cache if they are there; `say` gets a line before each long job.

  Two processes may prepare the same corpus at once: one's work is kept, both use it. ValueError for
  text that cannot be read, split or tokenised; OSError, naming the path, if the cache cannot be
  written. Neither leaves anything in the cache.
  """
  entries = listed(corpus.source)
  out = held_out(entries, corpus.held_out)
  folder = pathlib.Path(cache or default_cache()) / store.digest(
      [store.FORMAT, dataclasses.asdict(corpus.tokenizer), corpus.held_out,
       [(entry.name, entry.sha256) for entry in entries]])[:32]
  skipped = corpus.source.skipped()
  if folder.exists():
    try:
      return opened(folder, skipped)
    except ValueError as error:
      say(f'{error}: preparing it again')
      discard(folder)
  try:
    with store.complete_folder(folder) as partial:
      build(corpus, entries, out, partial, say)
  except FileExistsError:
    pass  # another process was faster with the same content
  except OSError as error:
    raise OSError(f'{error}; prepared data goes to cache={folder.parent}, by default $LMLIB_CACHE') from error
  return opened(folder, skipped)


def opened(folder: pathlib.Path, skipped) -> Prepared:
  """The prepared data in a folder. ValueError if it is not whole."""
  prepared = Prepared(Store(folder / 'train'), Store(folder / 'held_out'), skipped)
  for kept in (prepared.train, prepared.held_out):
    kept.check()
  if prepared.train.tokenizer.fingerprint != prepared.held_out.tokenizer.fingerprint:
    raise ValueError(f'{folder} is damaged: its two stores have different tokenizers')
  return prepared


def build(corpus: Corpus, entries: list[Entry], out: frozenset, folder: pathlib.Path, say):
  """Trains the tokeniser and writes both stores into `folder`."""
  kept = [entry for entry in entries if entry.name not in out]
  size = sum(entry.bytes for entry in kept)
  say(f'training a tokenizer of {corpus.tokenizer.pieces} pieces on {size / 1e6:.1f} MB')
  texts = (document.text for document in again(corpus, entries) if document.name not in out)
  tokenizer = corpus.tokenizer.train(texts, sum(e.characters for e in kept))
  say(f'tokenizing {len(entries)} documents, {sum(e.bytes for e in entries) / 1e6:.1f} MB')
  store.write(folder / 'train', (d for d in again(corpus, entries) if d.name not in out), tokenizer)
  store.write(folder / 'held_out', (d for d in again(corpus, entries) if d.name in out), tokenizer)


def held_out(entries: list[Entry], share: float) -> frozenset:
  """Names of the documents to hold out: those whose hash lies below the share.

  Of a few documents the one with the lowest hash is held out all the same, and the one with the
  highest is not. ValueError if there are fewer than two.
  """
  ranks = {entry.name: rank(entry.name) for entry in entries}
  if len(entries) < 2:
    raise ValueError(f'there is no document but {"".join(ranks) or "none"}: documents are held out whole, so '
                     'there must be two at least; cut the text into several files, or lines of a .jsonl')
  low, high = min(ranks, key=ranks.get), max(ranks, key=ranks.get)
  return frozenset(name for name, rank in ranks.items() if rank < share) - {high} | {low}


def rank(name: str) -> float:
  """A number in [0, 1) that depends on the name alone; the prefix sets it apart from other draws by name."""
  return int.from_bytes(hashlib.sha256(f'held out {name}'.encode()).digest()[:6], 'big') / 2**48


def listed(source) -> list[Entry]:
  """All documents of a source, without their texts. ValueError if two have one name."""
  entries = [entry(document) for document in source.documents()]
  names = sorted(entry.name for entry in entries)
  if twice := [a for a, b in itertools.pairwise(names) if a == b]:
    raise ValueError(f'two documents are named {twice[0]}')
  return entries


def entry(document: Document) -> Entry:
  raw = document.text.encode()
  return Entry(document.name, hashlib.sha256(raw).hexdigest(), len(document.text), len(raw))


def again(corpus: Corpus, entries: list[Entry]) -> Iterator[Document]:
  """The documents once more. ValueError if they are not what they were at first."""
  documents = corpus.source.documents()
  for known in entries:
    document = next(documents, None)
    if document is None or entry(document) != known:
      raise ValueError(f'{known.name} changed while it was being prepared: run again')
    yield document


def discard(folder: pathlib.Path):
  """Removes a folder; its name is free at once, also for another process."""
  aside = folder.parent / f'.{folder.name}.{secrets.token_hex(4)}.partial'
  try:
    os.rename(folder, aside)
  except OSError as error:
    raise OSError(f'cannot replace the damaged {folder}: {error.strerror}') from error
  shutil.rmtree(aside, ignore_errors=True)
