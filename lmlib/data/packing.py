"""Training batches as a function of the step: what batch 10**6 holds is known without the ones before.

A packing says which stretches of documents fill a row, an objective (objectives.py) what is hidden and
what is to be predicted, a mixture (mixture.py) from which store each row comes.

Split lays the stream of a store in a circle and cuts it into rows of `length` tokens, from a place that
each epoch draws anew, so that rows end elsewhere every time. Within an epoch the rows come in the
order of a keyed permutation (order.py), each once. A row is cut from the stream wherever it falls:
it may hold the end of one document and the start of the next, numbered in segments_BT. OneEach gives every
document rows of its own; BestFit (best_fit.py) keeps documents whole while they fit.
"""
import dataclasses
import functools
from typing import Any

import numpy as np

from lmlib.data import objectives, order
from lmlib.data.mixture import Stores
from lmlib.data.store import Store


@dataclasses.dataclass(frozen=True)
class Raw:
  """Packed rows of documents' tokens, before an objective has seen them."""
  tokens_BT: np.ndarray  # int32
  following: tuple  # of BT int32: the token 1, 2, ... places on in the store
  alive: tuple  # of BT bool: whether that token lies in the same document
  segments_BT: np.ndarray  # int32, the number of the document in its row, from 1; 0 is padding
  restart: bool  # whether positions count from the start of each document of the row
  number_B: np.ndarray  # int64, the number of the row since training began, which names it


@dataclasses.dataclass(frozen=True)
class Piece:
  """Where a stretch of a row comes from: tokens first to stop of a document, counted from its own bos."""
  document: int
  first: int
  stop: int


@dataclasses.dataclass(frozen=True)
class Split:
  """Concatenate and split: no padding; a document ends where its row does and goes on in another."""
  restart: bool = False  # positions_BT count from each document's start; rotary models do not feel it

  def of(self, store: Store, length: int, seed: int) -> 'SplitRows':
    return SplitRows(store, length, seed, self.restart)


@dataclasses.dataclass(frozen=True)
class OneEach:
  """One document a row, padded. A longer one gets several rows, or only its beginning is used."""
  long: str = 'split'  # or 'cut': the rest of a long document is left out, as Batches.left_out() counts

  def __post_init__(self):
    if self.long not in ('split', 'cut'):
      raise ValueError(f"OneEach.long={self.long!r} must be 'split' or 'cut'")

  def of(self, store: Store, length: int, seed: int) -> 'OneEachRows':
    return OneEachRows(store, length, seed, self.long)


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches of `batch` rows of `length` tokens of a store, or of several, for ever, epoch after epoch."""
  store: Store | Stores
  batch: int
  length: int
  seed: int = 0
  packing: Any = Split()
  objective: Any = objectives.CAUSAL
  vocab: int | None = None  # of the model; None is the tokeniser's

  def __post_init__(self):
    for name in ('batch', 'length'):
      if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
        raise ValueError(f'Batches.{name}={getattr(self, name)!r} must be a positive integer')
    _ = self._apply, self._rows  # what does not fit is said now

  @functools.cached_property
  def stores(self) -> Stores:
    return self.store if isinstance(self.store, Stores) else Stores((self.store,))

  @functools.cached_property
  def _apply(self):
    tokenizer = self.stores.tokenizer
    return self.objective.of(tokenizer, self.vocab or tokenizer.vocab, self.length)

  @functools.cached_property
  def _rows(self):
    length = self.objective.raw(self.length)
    return tuple(self.packing.of(store, length, self.seed) for store in self.stores.stores)

  @property
  def rows_per_epoch(self) -> int:
    """Of a single store. Split leaves up to `length` - 1 tokens, different ones each epoch, out of it."""
    rows, = self._rows
    return rows.rows_per_epoch

  @property
  def left_out(self) -> int:
    """Tokens of an epoch of every store that no row shows."""
    return sum(rows.left_out for rows in self._rows)

  def batch_at(self, step: int, rows: slice | np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The batch of a step, or those of its rows that a process asks for.

    tokens_BT int32; targets_BT int32, the token after each (or what the objective asks for); segments_BT
    int32, the number of the document in its row, from 1, 0 for padding; weight_BT float32, 0 where nothing
    is to be learned, as of the first token of the next document; row_B uint32, the number of the row since
    training began (of its store, if there is but one), which names it (modulo 2^32). Where packing or objective need
    them: positions_BT int32, from 0 in each document; prefix_BT int32, 1 where a key is seen by all queries
    of its document.
    """
    visits_B = self._visits(step, rows)
    store_B, visit_B = self._places(visits_B)
    raws, keys, where = [], [], []
    for k in np.unique(store_B).tolist():
      here = np.flatnonzero(store_B == k)
      raws.append(self._rows[k].raw(visit_B[here], self.objective.ahead))
      keys.append(order.row_keys(raws[-1].number_B, seed=self.seed, stream=f'objective {k}'))
      where.append(here)
    if not where:
      raise ValueError(f'rows={rows} of a batch of {self.batch} are none')
    raw = joined(raws)
    batch = self._apply(raw, np.concatenate(keys))
    if len(self._rows) == 1:
      return batch | {'row_B': (raw.number_B % 2**32).astype(np.uint32)}
    back = np.concatenate(where).argsort()
    return {name: value[back] for name, value in batch.items()} | {'row_B': (visits_B % 2**32).astype(np.uint32)}

  def pieces(self, step: int, rows: slice | None = None) -> list[tuple[int, int, list[Piece]]]:
    """For each row of a step: the index of its store, its number there, and the pieces it is made of."""
    return [(k, *self._rows[k].pieces(visit))
            for k, visit in zip(*(places.tolist() for places in self._places(self._visits(step, rows))))]

  def describe(self, step: int, rows: slice | None = None) -> list[str]:
    """For each row of a step, the documents in it: 'row 17: a.py: tokens 5..40; b.py: tokens 0..90'.

    Tokens are counted from the document's own bos; the last named is the row's last input.
    """
    lines = []
    for k, number, pieces in self.pieces(step, rows):
      names = self.stores.stores[k].names
      store = f' of {self.stores.names[k]}' if len(self.stores.stores) > 1 else ''
      lines.append(f'row {number}{store}: ' + '; '.join(
          f'{names[piece.document]}: tokens {piece.first}..{piece.stop - 1}' for piece in pieces))
    return lines

  def _visits(self, step, rows):
    if step < 0:
      raise ValueError(f'step={step} must not be negative')
    return step * self.batch + np.arange(self.batch, dtype=np.int64)[slice(None) if rows is None else rows]

  def _places(self, visits_B):
    """Of each row: the index of its store, and the number of rows which that store gave before."""
    return self.stores.places(visits_B, batch=self.batch, seed=self.seed)


def joined(raws: list[Raw]) -> Raw:
  """The rows of several, in that order."""
  if len(raws) == 1:
    return raws[0]
  together = lambda name: np.concatenate([getattr(raw, name) for raw in raws])
  columns = lambda name: tuple(np.concatenate(column) for column in zip(*(getattr(raw, name) for raw in raws)))
  return Raw(together('tokens_BT'), columns('following'), columns('alive'), together('segments_BT'),
             raws[0].restart, together('number_B'))


def document_at(store: Store, position):
  """The document that each position of the stream lies in; counted on where the circle closes."""
  turn, position = np.divmod(position, store.tokens)
  return np.searchsorted(store.offsets, position, side='right') - 1 + turn * store.documents


def starts(store: Store, document):
  """Where documents start in the stream; those after the last go on in the next turn of the circle."""
  turn, document = np.divmod(document, store.documents)
  return store.offsets[document] + turn * store.tokens


class SplitRows:
  """The rows of Split, of one store."""
  left_out = 0  # other tokens each epoch

  def __init__(self, store: Store, length: int, seed: int, restart: bool):
    self._store, self._length, self._seed, self._restart = store, length, seed, restart
    if store.tokens < length + 1:
      raise ValueError(f'Batches.length={length} needs rows of {length + 1} tokens, but '
                       f'{store.path} holds {store.tokens}: shorten the length, or give more text')
    self.rows_per_epoch = store.tokens // length

  def raw(self, visit_B, ahead: int) -> Raw:
    """The rows numbered visit_B since training began, with `ahead` tokens after each."""
    (number_B, start_B), T = self._places(visit_B), self._length
    if self._store.tokens < T + ahead:
      raise ValueError(f'{ahead} tokens ahead of Batches.length={T} are more than the {self._store.tokens} '
                       f'tokens of {self._store.path}')
    ids_BT = self._store.rows(start_B, T + ahead)
    opens_BT = self._opens(start_B, T + ahead)
    counted_BT = opens_BT.cumsum(1, dtype=np.int32)
    alive = [~opens_BT[:, 1:T + 1]] + [counted_BT[:, j:T + j] == counted_BT[:, :T] for j in range(2, ahead + 1)]
    return Raw(ids_BT[:, :T], tuple(ids_BT[:, j:T + j] for j in range(1, ahead + 1)), tuple(alive),
               counted_BT[:, :T] + 1, self._restart, number_B)

  def pieces(self, visit: int) -> tuple[int, list[Piece]]:
    """The number of one row, and what it is made of."""
    (number,), (start,) = (places.tolist() for places in self._places(np.array([visit])))
    parts, stop = [], start + self._length
    while start < stop:
      document = int(document_at(self._store, start))
      first, end = starts(self._store, np.array([document, document + 1])).tolist()
      parts.append(Piece(document % self._store.documents, start - first, min(end, stop) - first))
      start = end
    return number, parts

  def _places(self, visit_B):
    """Of each row: its number since training began, and the token it starts at."""
    n, tokens = self.rows_per_epoch, self._store.tokens
    number_B, start_B = np.empty_like(visit_B), np.empty_like(visit_B)
    for epoch in np.unique(visit_B // n).tolist():
      here = visit_B // n == epoch
      row = order.permute(visit_B[here] % n, n, seed=self._seed, epoch=epoch)
      number_B[here] = epoch * n + row
      start_B[here] = (row * self._length + order.draw(self._seed, epoch, tokens)) % tokens
    return number_B, start_B

  def _opens(self, start_B, width: int):
    """Where in each row a document starts, not counting its first place: bool, B x width."""
    first_B, last_B = document_at(self._store, np.stack([start_B, start_B + width - 1]))
    count_B = last_B - first_B
    row = np.repeat(np.arange(len(start_B)), count_B)
    document = np.arange(len(row)) - np.repeat(count_B.cumsum() - count_B - first_B - 1, count_B)
    opens_BT = np.zeros((len(start_B), width), bool)
    opens_BT[row, starts(self._store, document) - start_B[row]] = True
    return opens_BT


class OneEachRows:
  """The rows of OneEach, of one store: rows are counted by groups of documents, once, when it is opened."""
  GROUP = 1 << 12  # documents between two places where the count of rows is remembered

  def __init__(self, store: Store, length: int, seed: int, long: str):
    self._store, self._length, self._seed, self._long = store, length, seed, long
    counts, self.left_out = [], 0
    for first in range(0, store.documents, self.GROUP):
      size = np.diff(self._bounds(first))
      counts.append(int(self._count(size).sum()))
      self.left_out += int(np.maximum(size - length, 0).sum()) if long == 'cut' else 0
    self._before = np.cumsum([0, *counts])
    self.rows_per_epoch = int(self._before[-1])

  def _bounds(self, first: int):
    return self._store.offsets[first:min(first + self.GROUP, self._store.documents) + 1]

  def _count(self, size):
    return np.ones_like(size) if self._long == 'cut' else -(-size // self._length)

  def _places(self, visit_B):
    """Of each row: its number, document, first token in it, and the document's bounds in the stream; int64."""
    out, n = np.empty((5, len(visit_B)), np.int64), self.rows_per_epoch
    for epoch in np.unique(visit_B // n).tolist():
      here = visit_B // n == epoch
      row = order.permute(visit_B[here] % n, n, seed=self._seed, epoch=epoch)
      out[0, here], out[1, here] = epoch * n + row, row
    group_B = np.searchsorted(self._before, out[1], side='right') - 1
    for group in np.unique(group_B).tolist():
      here, bounds = np.flatnonzero(group_B == group), self._bounds(group * self.GROUP)
      before = self._before[group] + np.cumsum([0, *self._count(np.diff(bounds))])
      i = np.searchsorted(before, out[1, here], side='right') - 1
      out[1:, here] = (group * self.GROUP + i, (out[1, here] - before[i]) * self._length, bounds[i], bounds[i + 1])
    return out

  def raw(self, visit_B, ahead: int) -> Raw:
    """The rows numbered visit_B since training began, with `ahead` tokens after each."""
    (number_B, _, first_B, start_B, stop_B), T = self._places(visit_B), self._length
    width = min(T + ahead, self._store.tokens)
    ids_BT = np.pad(self._store.rows(start_B + first_B, width), [(0, 0), (0, T + ahead - width)])
    inside_BT = np.arange(T + ahead)[None] < (stop_B - start_B - first_B)[:, None]
    ids_BT *= inside_BT
    steps = range(1, ahead + 1)
    shown_BT = inside_BT[:, :T]
    return Raw(ids_BT[:, :T], tuple(ids_BT[:, j:T + j] for j in steps),
               tuple(inside_BT[:, j:T + j] & shown_BT for j in steps), shown_BT.astype(np.int32), True, number_B)

  def pieces(self, visit: int) -> tuple[int, list[Piece]]:
    """The number of one row, and what it is made of."""
    number, document, first, start, stop = self._places(np.array([visit]))[:, 0].tolist()
    return number, [Piece(document, first, min(first + self._length, stop - start))]
