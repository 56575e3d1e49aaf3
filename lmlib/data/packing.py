"""Training batches as a function of the step: what batch 10**6 holds is known without the ones before.

The stream of a store is laid in a circle and cut into rows of `length` targets, from a place that
each epoch draws anew, so that rows end elsewhere every time. Within an epoch the rows come in the
order of a keyed permutation (order.py), each once. A row is cut from the stream wherever it falls:
it may hold the end of one document and the start of the next, numbered in segments_BT.
"""
import dataclasses

import numpy as np

from lmlib.data import order
from lmlib.data.store import Store


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches of `batch` rows of `length` tokens of a store, for ever, epoch after epoch."""
  store: Store
  batch: int
  length: int
  seed: int = 0

  def __post_init__(self):
    for name in ('batch', 'length'):
      if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
        raise ValueError(f'Batches.{name}={getattr(self, name)!r} must be a positive integer')
    if self.store.tokens < self.length + 1:
      raise ValueError(f'Batches.length={self.length} needs rows of {self.length + 1} tokens, but '
                       f'{self.store.path} holds {self.store.tokens}: shorten the length, or give more text')

  @property
  def rows_per_epoch(self) -> int:
    """Up to `length` - 1 tokens, different ones each epoch, are left out of it."""
    return self.store.tokens // self.length

  def batch_at(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
    """The batch of a step, or those of its rows that a process asks for.

    tokens_BT int32; targets_BT int32, the token after each; segments_BT int32, the number of the
    document in its row, from 1; weight_BT float32, 0 where the target is the first token of the next
    document; row_B uint32, the number of the row since training began, which names it (modulo 2^32).
    """
    number_B, start_B = self._places(step, rows)
    ids_BT = self.store.rows(start_B, self.length + 1)
    document_BT = self._documents(start_B[:, None] + np.arange(self.length + 1)[None])
    return {
        'tokens_BT': ids_BT[:, :-1],
        'targets_BT': ids_BT[:, 1:],
        'segments_BT': (document_BT - document_BT[:, :1] + 1)[:, :-1].astype(np.int32),
        'weight_BT': (document_BT[:, 1:] == document_BT[:, :-1]).astype(np.float32),
        'row_B': (number_B % 2**32).astype(np.uint32),
    }

  def describe(self, step: int, rows: slice | None = None) -> list[str]:
    """For each row of a step, the documents in it: 'row 17: a.py: tokens 5..40; b.py: tokens 0..90'.

    Tokens are counted from the document's own bos; the last named is the row's last input.
    """
    lines = []
    for number, start in zip(*(places.tolist() for places in self._places(step, rows))):
      parts, stop = [], start + self.length
      while start < stop:
        document = int(self._documents(np.array(start)))
        turn, i = divmod(document, self.store.documents)
        first, end = self.store.offsets[i:i + 2] + turn * self.store.tokens
        parts.append(f'{self.store.names[i]}: tokens {start - first}..{min(end, stop) - 1 - first}')
        start = int(end)
      lines.append(f'row {number}: ' + '; '.join(parts))
    return lines

  def _places(self, step, rows):
    """Of each row: its number since training began, and the token it starts at."""
    if step < 0:
      raise ValueError(f'step={step} must not be negative')
    visit_B = step * self.batch + np.arange(self.batch, dtype=np.int64)[slice(None) if rows is None else rows]
    n, tokens = self.rows_per_epoch, self.store.tokens
    number_B, start_B = np.empty_like(visit_B), np.empty_like(visit_B)
    for epoch in np.unique(visit_B // n).tolist():
      here = visit_B // n == epoch
      row = order.permute(visit_B[here] % n, n, seed=self.seed, epoch=epoch)
      number_B[here] = epoch * n + row
      start_B[here] = (row * self.length + order.draw(self.seed, epoch, tokens)) % tokens
    return number_B, start_B

  def _documents(self, position):
    """The document that each position of the stream lies in; counted on where the circle closes."""
    turn, position = np.divmod(position, self.store.tokens)
    return np.searchsorted(self.store.offsets, position, side='right') - 1 + turn * self.store.documents
