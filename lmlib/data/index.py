"""What is known of all documents of a corpus before they are tokenised, and which of them go where."""
from collections import Counter
from collections.abc import Iterator

import numpy as np

from lmlib.data import pipeline
from lmlib.data.folder import Folder
from lmlib.data.pipeline import Read


class Index:
  """What is known of all documents before they are tokenised, in the order of the corpus: 24 bytes a document."""

  def __init__(self, work: Folder, tasks: list[Read], reads: list[dict]):
    self._work, self.blocks, stop = work, [], 0  # key, source, documents
    for task, found in zip(tasks, reads):
      for key, documents in found['blocks']:
        self.blocks.append((key, task.source, slice(stop, stop + documents)))
        stop += documents
    arrays = {name: np.zeros(stop, dtype) for name, dtype in
              (('ranks', np.uint64), ('bytes', np.int64), ('characters', np.int64))}
    for key, _, place in self.blocks:
      found = pipeline.read_arrays(work, f'{key}.index')
      for name, array in arrays.items():
        array[place] = found[name]
    self.ranks, self.bytes, self.characters = arrays.values()
    self.read = Counter()
    for task, found in zip(tasks, reads):
      self.read[task.source] += found['documents']
    self.sources = []

  def check(self, corpus, dropped: np.ndarray | None = None):
    """ValueError if two documents have one name, or a source has no document, or none left."""
    kept = np.ones(len(self.ranks), bool) if dropped is None else ~dropped
    self.sources = []
    for number, source in enumerate(corpus.sources):
      own = [place for _, other, place in self.blocks if other == number]
      documents, size = (int(sum(array[place][kept[place]].sum() for place in own)) for array in (kept, self.bytes))
      if not documents:
        raise ValueError(f'Corpus.source: {source!r} has no document: {self.read[number]} were read, none is left')
      self.sources.append({'source': repr(source), 'read': self.read[number], 'documents': documents, 'bytes': size})
    order = np.argsort(self.ranks, kind='stable')
    same = np.flatnonzero(np.diff(self.ranks[order]) == 0)
    for one, other in zip(order[same].tolist(), order[same + 1].tolist()):
      if (name := self.name(one)) == self.name(other):
        raise ValueError(f'two documents are named {name}')

  def name(self, document: int) -> str:
    return next(iter(self.names(slice(document, document + 1))))

  def names(self, wanted: slice = slice(None)) -> Iterator[str]:
    """The names of documents, block by block."""
    start, stop, _ = wanted.indices(len(self.ranks))
    for key, _, place in self.blocks:
      if place.start < stop and start < place.stop:
        found = pipeline.read_arrays(self._work, f'{key}.index')
        names = pipeline.split(found['names'].tobytes(), found['name_bytes'])
        yield from (name.decode() for name in names[max(start - place.start, 0):stop - place.start])

  def signatures(self, stage: int) -> np.ndarray:
    """The rows of a corpus-wide stage."""
    return np.concatenate([pipeline.read_arrays(self._work, f'{key}.index')[f'signatures_{stage}']
                           for key, _, _ in self.blocks])

  def texts(self, key: str, chosen: np.ndarray) -> Iterator[str]:
    """The chosen texts of a block."""
    size = pipeline.read_arrays(self._work, f'{key}.index')['bytes']
    raw = pipeline.read_arrays(self._work, f'{key}.text')['text'].tobytes()
    for text, take in zip(pipeline.split(raw, size), chosen.tolist()):
      if take:
        yield text.decode()


def divided(index: Index, dropped: np.ndarray, share: float | None) -> dict[str, np.ndarray]:
  """Which documents are of which part. ValueError if there are fewer than two to divide."""
  if share is None:
    return {'train': ~dropped}
  kept = np.flatnonzero(~dropped)
  if len(kept) < 2:
    name = index.name(int(kept[0])) if len(kept) else 'none'
    raise ValueError(f'there is no document but {name}: documents are held out whole, so '
                     'there must be two at least; cut the text into several files, or lines of a .jsonl')
  out = np.zeros(len(dropped), bool)
  out[kept] = held_out(index.ranks[kept], share)
  return {'train': ~dropped & ~out, 'held_out': out}


def held_out(ranks: np.ndarray, share: float) -> np.ndarray:
  """Which documents to hold out, bool: those whose rank, as a share of all 64-bit numbers, lies below `share`.

  Of a few documents the one of the lowest rank is held out all the same, and that of the highest is not.
  """
  out = (ranks >> np.uint64(16)) / 2**48 < share
  out[np.argmax(ranks)], out[np.argmin(ranks)] = False, True
  return out
