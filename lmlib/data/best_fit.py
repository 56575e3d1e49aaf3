"""Best-fit packing: documents stay whole while they fit a row, and any batch is planned by itself.

The fewest documents are cut, and what a row holds is seldom the rest of something (Ding et al. 2024). Packing
a whole corpus would make batch 10^6 depend on all documents, so an epoch is cut into blocks of a fixed number
of rows each, known without looking: the stream of the store, from a place the epoch draws, is cut into fragments
of equal size, a keyed permutation puts `fragments` of them from all over the store into a block, and a block
has as many rows as its fragments could need at worst. A document of at most `length` tokens belongs to
the fragment where it starts; a longer one is cut where fragments and rows end. Within a block the longest pieces
come first, each into the fullest row that holds it (best-fit decreasing, Johnson 1973). The few that find no row
are split over the gaps. Nothing is left out: a fragment can exceed its size only by the last document in it.
"""
import dataclasses

import numpy as np

from lmlib.data import order
from lmlib.data.packing import Piece, Raw, document_at
from lmlib.data.store import Store

KEPT = 2  # plans, of some megabytes: a mixture takes the rows at the border of two blocks in turns
SLACK = 0.015  # of the rows of a block that holds the whole store: the room that spares documents a split


@dataclasses.dataclass(frozen=True)
class BestFit:
  """Rows of whole documents. A row is at least fragment / (fragment + 1) full in the mean."""
  fragment: int = 48  # rows' worth of neighbouring text
  fragments: int = 32  # in a block: from how many places the rows that follow each other come

  def __post_init__(self):
    for name in ('fragment', 'fragments'):
      if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
        raise ValueError(f'BestFit.{name}={getattr(self, name)!r} must be a positive integer')

  def of(self, store: Store, length: int, seed: int) -> 'BestFitRows':
    return BestFitRows(store, length, seed, self)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A packed block: its tokens, and its pieces sorted by row. Piece p lies at row_P, from slot_P on."""
  ids: np.ndarray  # tokens of the block's fragments, some more than once
  source_P: np.ndarray  # of each piece: where in `ids` it starts
  end_P: np.ndarray  # where in `ids` its document ends, or would
  size_P: np.ndarray
  slot_P: np.ndarray
  document_P: np.ndarray
  first_P: np.ndarray  # its first token, counted from the document's bos
  bound_R: np.ndarray  # rows + 1: pieces of row r are bound_R[r] to bound_R[r + 1]


class BestFitRows:
  """The rows of BestFit, of one store. Plans used last are kept: rows come block by block."""
  left_out = 0

  def __init__(self, store: Store, length: int, seed: int, config: BestFit):
    self._store, self._length, self._seed = store, length, seed
    self._fragments = -(-store.tokens // (config.fragment * length))
    self._in_block = min(config.fragments, self._fragments)
    full, rest = divmod(self._fragments, self._in_block)
    self._rows, self._last_rows = self._rows_of(self._in_block), self._rows_of(rest) if rest else 0
    self.rows_per_epoch = full * self._rows + self._last_rows
    self._kept = {}  # plans by (epoch, block, ahead), the one used last at the end

  def _rows_of(self, fragments: int) -> int:
    if fragments == self._fragments:
      return max(1, -(-int(self._store.tokens * (1 + SLACK)) // self._length))
    largest = -(-self._store.tokens // self._fragments) + self._length - 1
    return -(-fragments * largest // self._length)

  def raw(self, visit_B, ahead: int) -> Raw:
    """The rows numbered visit_B since training began, with `ahead` tokens after each piece."""
    epoch_B, block_B = visit_B // self.rows_per_epoch, visit_B % self.rows_per_epoch // self._rows
    parts, where = [], []
    for epoch, block in sorted(set(zip(epoch_B.tolist(), block_B.tolist()))):
      here = np.flatnonzero((epoch_B == epoch) & (block_B == block))
      parts.append(self._cut(visit_B[here], epoch, block, ahead))
      where.append(here)
    back = np.concatenate(where).argsort()
    tokens, segments, number, *more = (np.concatenate(x)[back] for x in zip(*parts))
    return Raw(tokens, tuple(more[:ahead]), tuple(more[ahead:]), segments, True, number)

  def pieces(self, visit: int) -> tuple[int, list[Piece]]:
    """The number of one row, and what it is made of."""
    epoch, block = visit // self.rows_per_epoch, visit % self.rows_per_epoch // self._rows
    number_B, row_B = self._numbers(np.array([visit]), epoch, block)
    plan, row = self._plan(epoch, block, 1), int(row_B[0])
    return int(number_B[0]), [
        Piece(int(plan.document_P[p]), int(plan.first_P[p]), int(plan.first_P[p] + plan.size_P[p]))
        for p in range(plan.bound_R[row], plan.bound_R[row + 1])]

  def _numbers(self, visit_B, epoch: int, block: int):
    """Of rows in one block: their number since training began, and their place in the block's plan."""
    first = epoch * self.rows_per_epoch + block * self._rows
    rows = self._last_rows if (block + 1) * self._rows > self.rows_per_epoch else self._rows
    row_B = order.permute(visit_B - first, rows, seed=self._seed, epoch=f'{epoch} block {block}')
    return first + row_B, row_B

  def _cut(self, visit_B, epoch: int, block: int, ahead: int):
    """Rows of one block: tokens, segments, number, then following and alive for each place ahead."""
    number_B, row_B = self._numbers(visit_B, epoch, block)
    plan, T = self._plan(epoch, block, ahead), self._length
    # The pieces of the rows asked for, and where each lies in the output laid out flat.
    first_B = plan.bound_R[row_B]
    count_B = plan.bound_R[row_B + 1] - first_B
    nth = np.arange(count_B.sum()) - np.repeat(count_B.cumsum() - count_B, count_B)  # of its row
    p = np.repeat(first_B, count_B) + nth
    size = plan.size_P[p]
    start = np.repeat(np.arange(len(row_B)) * T, count_B) + plan.slot_P[p]
    within = np.arange(size.sum()) - np.repeat(size.cumsum() - size, size)
    into, source = np.repeat(start, size) + within, np.repeat(plan.source_P[p], size) + within
    left = np.repeat(plan.end_P[p], size) - source  # tokens to the end of the document, this one included

    def flat(values, dtype):
      out = np.zeros(len(row_B) * T, dtype)
      out[into] = values
      return out.reshape(-1, T)

    last = len(plan.ids) - 1
    steps = range(1, ahead + 1)
    return (flat(plan.ids[source], np.int32), flat(np.repeat(nth + 1, size), np.int32), number_B,
            *(flat(plan.ids[np.minimum(source + j, last)], np.int32) for j in steps),
            *(flat(left > j, bool) for j in steps))

  def _plan(self, epoch: int, block: int, ahead: int) -> Plan:
    wanted = epoch, block, ahead
    plan = self._kept.pop(wanted, None) or self._planned(*wanted)
    self._kept = dict([*self._kept.items(), (wanted, plan)][-KEPT:])
    return plan

  def _planned(self, epoch: int, block: int, ahead: int) -> Plan:
    """Reads the documents of a block and packs them."""
    first, N = block * self._in_block, self._store.tokens
    fragments = np.arange(first, min(first + self._in_block, self._fragments))
    rows = self._last_rows if (block + 1) * self._rows > self.rows_per_epoch else self._rows
    shift, held, ids, found = order.draw(self._seed, epoch, N), 0, [], []
    for fragment in order.permute(fragments, self._fragments, seed=self._seed, epoch=epoch).tolist():
      start, stop = (shift + i * N // self._fragments for i in (fragment, fragment + 1))
      start, stop = start % N, start % N + stop - start
      for a, b in [(start, min(stop, N)), *([(0, stop - N)] if stop > N else [])]:
        document, begin, end, first, last = self._documents(a, b)
        if len(document):
          ids.append(self._store.read(a, min(int(last.max()) + ahead, N)))
          found.append([document, first - begin, last - first, first - a + held, end - a + held])
          held += len(ids[-1])
    document_P, first_P, size_P, source_P, end_P = (np.concatenate(column) for column in zip(*found))
    piece, offset, size, row, slot = packed(size_P, self._length, rows)
    small = np.uint16 if self._store.tokenizer.vocab <= 1 << 16 else np.int32
    return Plan(np.concatenate(ids).astype(small), source_P[piece] + offset, end_P[piece], size, slot,
                document_P[piece], first_P[piece] + offset, np.searchsorted(row, np.arange(rows + 1)))

  def _documents(self, a: int, b: int):
    """What tokens a to b of the stream own: documents, their starts and ends, the first token and the last + 1.

    A short document is owned by the place where it starts, a long one by every place it covers.
    """
    first, last = document_at(self._store, np.array([a, b - 1])).tolist()
    bounds = self._store.offsets[first:last + 2]
    begin, end = bounds[:-1], bounds[1:]
    long = end - begin > self._length
    keep = long | (begin >= a)
    columns = (np.arange(first, last + 1), begin, end, np.where(long, np.maximum(begin, a), begin),
               np.where(long, np.minimum(end, b), end))
    return tuple(column[keep] for column in columns)


def packed(size_P, length: int, rows: int):
  """Puts pieces of these sizes into `rows` rows of `length`: piece, offset in it, size, row, slot; sorted by row.

  Pieces are split where they are longer than a row, and where no row has room for them whole. No row is empty
  while another holds two.
  """
  full_P = size_P // length
  piece = np.repeat(np.arange(len(size_P)), full_P)
  nth = np.arange(len(piece)) - np.repeat(full_P.cumsum() - full_P, full_P)
  wanted = np.argsort(full_P * length - size_P, kind='stable')  # the largest rest first
  rest = [(p, full * length, size - full * length) for p, full, size in
          zip(wanted.tolist(), full_P[wanted].tolist(), size_P[wanted].tolist()) if size > full * length]
  placed = _best_fit(rest, length, len(piece), rows)
  whole = np.stack([piece, nth * length, np.full_like(piece, length), np.arange(len(piece))])
  table = np.concatenate([whole, np.array(placed, np.int64).reshape(-1, 4).T], axis=1)
  piece, offset, size, row = table[:, np.argsort(table[3], kind='stable')]
  before = size.cumsum() - size
  return piece, offset, size, row, before - before[np.searchsorted(row, row)]


def _best_fit(items, length: int, opened: int, rows: int):
  """Tuples (piece, offset, size, row) of items (piece, offset, size), the largest first, from row `opened` on."""
  placed, split, room = [], [], [[] for _ in range(length + 1)]  # room[c]: rows with c places left
  known = 0  # bit c is set where room[c] is not empty: the fullest row that fits is found in one operation

  def put(item, size, capacity, row):
    nonlocal known
    placed.append((item[0], item[1], size, row))
    if capacity > size:
      room[capacity - size].append(row)
      known |= 1 << capacity - size

  def take(capacity):
    nonlocal known
    row = room[capacity].pop()
    if not room[capacity]:
      known ^= 1 << capacity
    return row

  for item in items:
    size = item[2]
    if fits := known >> size:
      capacity = size + (fits & -fits).bit_length() - 1
      put(item, size, capacity, take(capacity))
    elif opened < rows:
      put(item, size, length, opened)
      opened += 1
    else:
      split.append(item)
  if opened < rows:
    return _spread(placed, range(opened, rows))
  for piece, offset, size in split:
    while size:
      capacity = known.bit_length() - 1  # the largest gap
      part = min(size, capacity)
      put((piece, offset), part, capacity, take(capacity))
      offset, size = offset + part, size - part
  return placed


def _spread(placed, empty):
  """Gives each empty row a piece, the largest that is not the first of its row: a row of padding teaches nothing."""
  begun, left = set(), list(reversed(empty))
  out = []
  for piece, offset, size, row in placed:
    out.append((piece, offset, size, left.pop() if row in begun and left else row))
    begun.add(row)
  return out
