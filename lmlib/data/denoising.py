"""Denoising: spans of each document are hidden behind special ids and written out after it.

The same rows serve an encoder-decoder, or a decoder alone that reads what is left from both sides (prefix_BT) and
goes on with what is missing. Spans never reach over the border of a document and never hide its first token.
"""
from collections.abc import Callable
import dataclasses
import math

import numpy as np

from lmlib.data import order
from lmlib.data.objectives import Specials, laid, segments

LAYOUTS = 'decoder', 'encoder_decoder'


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """How much is hidden, in spans of what mean length; mean None hides the end in one span."""
  density: float = 0.15
  mean: float | None = 3.0
  mode: str | None = None  # 'r', 's' or 'x': the id that tells the model, of Specials.mode_r and so on

  def __post_init__(self):
    if not 0 < self.density < 1:
      raise ValueError(f'Denoiser.density={self.density} must lie between 0 and 1')
    if self.mean is not None and self.mean < 1:
      raise ValueError(f'Denoiser.mean={self.mean} must be at least 1 token; None is one span at the end')
    if self.mode not in (None, 'r', 's', 'x'):
      raise ValueError(f"Denoiser.mode={self.mode!r} must be None, 'r', 's' or 'x'")

  def count(self, size: int) -> tuple[int, int]:
    """Of a document of `size` tokens: how many are hidden, in how many spans; none in one of a single token."""
    if size < 2:
      return 0, 0
    hidden = min(max(round(size * self.density), 1), size - 1)
    spans = 1 if self.mean is None else min(max(round(hidden / self.mean), 1), hidden, size - hidden)
    return hidden, spans

  def spans(self, size: int, drawn_2T) -> tuple[np.ndarray, np.ndarray]:
    """Starts and sizes of the spans, from uniform numbers: what is shown and what is hidden, each cut at random."""
    hidden, spans = self.count(size)
    if self.mean is None or not spans:
      return np.array([size - hidden] * spans, int), np.array([hidden] * spans, int)
    sizes = parts(hidden, spans, drawn_2T[0])
    shown = parts(size - hidden, spans, drawn_2T[1])
    return (shown + sizes).cumsum() - sizes, sizes


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
  """T5's objective (Raffel et al. 2020). Each span is replaced by a sentinel of its own:

    Thank you <0> me to your party <1> .  ->  <0> for inviting <1> last week <2>

  'decoder': both, one after the other, the first part as prefix. 'encoder_decoder': inputs_BS with
  input_segments_BS and input_positions_BS, and tokens_BT, the targets moved on by one after bos. A row is packed
  with as many tokens as are sure to fit; where many tiny documents leave no room for sentinels, the larger ones get
  them, and the others are shown as they are, with weight 0.
  """
  specials: Specials
  density: float = 0.15
  mean: float = 3.0
  layout: str = 'decoder'
  room: float = 1 / 32  # share of a row that is kept for the sentinels of small documents
  ahead = 1

  def __post_init__(self):
    assert self.denoisers
    check('SpanCorruption', self.layout, self.room)

  @property
  def denoisers(self) -> tuple[Denoiser, ...]:
    return (Denoiser(self.density, self.mean),)

  def raw(self, length: int) -> int:
    return raw_length(self, length)

  def of(self, tokenizer, vocab: int, length: int) -> Callable:
    return denoising(self, 'SpanCorruption', tokenizer, vocab, length)


UL2 = (Denoiser(0.15, 3.0, 'r'), Denoiser(0.15, 8.0, 'r'), Denoiser(0.25, None, 's'), Denoiser(0.5, 3.0, 'x'),
       Denoiser(0.5, 8.0, 'x'), Denoiser(0.15, 64.0, 'x'), Denoiser(0.5, 64.0, 'x'))


@dataclasses.dataclass(frozen=True)
class Ul2:
  """The mixture of denoisers of UL2 (Tay et al. 2023): each document draws one, and its mode id comes first."""
  specials: Specials
  denoisers: tuple[Denoiser, ...] = UL2
  layout: str = 'decoder'
  room: float = 1 / 32
  ahead = 1

  def __post_init__(self):
    if not self.denoisers:
      raise ValueError('Ul2.denoisers=() must hold one at least')
    check('Ul2', self.layout, self.room)

  def raw(self, length: int) -> int:
    return raw_length(self, length)

  def of(self, tokenizer, vocab: int, length: int) -> Callable:
    return denoising(self, 'Ul2', tokenizer, vocab, length)


def check(name: str, layout: str, room: float):
  """ValueError for a layout or a room that there is not."""
  if layout not in LAYOUTS:
    raise ValueError(f'{name}.layout={layout!r} must be one of {LAYOUTS}')
  if not 0 < room < 1:
    raise ValueError(f'{name}.room={room} must lie between 0 and 1')


def raw_length(objective, length: int) -> int:
  """Tokens that rows are packed with: an encoder's row shrinks, a decoder's grows by two ids a span."""
  if objective.layout == 'encoder_decoder':
    return length
  most = max(2 * d.density / d.mean if d.mean else 0 for d in objective.denoisers)
  return int(length * (1 - objective.room) / (1 + most))


def decoder_length(objective, raw: int) -> int:
  """Places of an encoder-decoder's targets for rows packed with `raw` tokens."""
  most = max(d.density * (1 + (1 / d.mean if d.mean else 0)) for d in objective.denoisers)
  return math.ceil(raw * (most + objective.room)) + 3


def denoising(objective, name: str, tokenizer, vocab: int, length: int) -> Callable:
  """The function of (raw, key_B) of SpanCorruption and Ul2. ValueError if ids are missing."""
  specials, modes = objective.specials, sorted({f'mode_{d.mode}' for d in objective.denoisers if d.mode})
  specials.check(name, ('sentinels', *modes), tokenizer, vocab)
  raw_T = objective.raw(length)
  if raw_T < 2:
    raise ValueError(f'{name}: a length of {length} leaves no room for two tokens beside sentinels')
  spans = max(d.count(raw_T)[1] for d in objective.denoisers) + 1
  if len(specials.sentinels) < spans:
    raise ValueError(f'{name} makes up to {spans - 1} spans in a document of {raw_T} tokens and closes the last, '
                     f'which takes {spans} sentinels, but Specials.sentinels has {len(specials.sentinels)}')
  together = objective.layout == 'decoder'
  if not together and tokenizer.bos is None:
    raise ValueError(f"{name}.layout='encoder_decoder' starts the decoder with bos, which the tokenizer has not")
  limits = (length,) if together else (length, decoder_length(objective, raw_T))

  def apply(raw, key_B):
    drawn_NBT = [order.uniform(key_B, raw_T, stream) for stream in range(3)]
    rows = []
    for b in range(len(key_B)):
      spans = segments(raw.segments_BT[b])
      which = [objective.denoisers[int(drawn_NBT[0][b, start] * len(objective.denoisers))] for start, _ in spans]
      chosen = with_room(spans, which, limits)
      rows.append([corrupted(raw.tokens_BT[b, start:stop], which[i], specials,
                             [drawn[b, start:stop] for drawn in drawn_NBT[1:]]) if i in chosen else
                   (raw.tokens_BT[b, start:stop], np.zeros(0, np.int32)) for i, (start, stop) in enumerate(spans)])
    if together:
      return laid([[continued(*part) for part in row] for row in rows], length,
                  ('tokens', 'targets', 'weight', 'prefix'))
    inputs = laid([[dict(inputs=shown) for shown, _ in row] for row in rows], length, ('inputs',), 'BS')
    return {'inputs_BS': inputs['inputs_BS'], 'input_segments_BS': inputs['segments_BS'],
            'input_positions_BS': inputs['positions_BS']} | laid(
                [[answered(missing, tokenizer.bos) for _, missing in row] for row in rows], limits[1],
                ('tokens', 'targets', 'weight'))

  return apply


def with_room(spans, which: list[Denoiser], limits: tuple[int, ...]) -> set[int]:
  """The documents of a row that can be corrupted so that everything fits, the larger ones first."""
  left, chosen = list(limits), set()
  left[0] -= sum(stop - start for start, stop in spans)
  for i in sorted(range(len(spans)), key=lambda i: spans[i][0] - spans[i][1]):
    hidden, count = which[i].count(spans[i][1] - spans[i][0])
    mode = int(which[i].mode is not None)
    grows = (2 * count + mode,) if len(limits) == 1 else (count - hidden + mode, hidden + count + 1)
    if hidden and all(more <= room for more, room in zip(grows, left)):
      left = [room - more for more, room in zip(grows, left)]
      chosen.add(i)
  return chosen


def parts(total: int, count: int, drawn) -> np.ndarray:
  """Sizes of `count` parts of at least one that make up `total`, all ways equally likely."""
  cuts = np.sort(np.argsort(drawn[:total - 1])[:count - 1]) + 1
  return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupted(ids, denoiser: Denoiser, specials: Specials, drawn_2T):
  """A document with its spans hidden, and what is missing, both with sentinels."""
  start, size = denoiser.spans(len(ids), drawn_2T)
  sentinels = np.array(specials.sentinels[:len(start) + 1], np.int32)
  hidden = inside(start, size, len(ids))
  shown, keep = ids.copy(), ~hidden
  shown[start], keep[start] = sentinels[:-1], True
  mode = [] if denoiser.mode is None else [getattr(specials, f'mode_{denoiser.mode}')]
  missing = np.append(np.insert(ids[hidden], size.cumsum() - size, sentinels[:-1]), sentinels[-1])
  return np.concatenate([mode, shown[keep]]).astype(np.int32), missing.astype(np.int32)


def inside(start, size, length: int) -> np.ndarray:
  """Which of `length` places lie in one of the spans."""
  change = np.zeros(length + 1, int)
  change[start] += 1
  change[start + size] -= 1
  return change[:-1].cumsum() > 0


def continued(shown, missing) -> dict:
  """For a decoder alone: what is missing follows what is shown, which is prefix."""
  whole = np.concatenate([shown, missing])
  places = max(len(whole) - 1, len(shown))  # the last token is a target only
  index = np.arange(places)
  targets = np.append(whole[1:], np.int32(0))[:places]
  return dict(tokens=whole[:places], targets=targets, prefix=index < len(shown),
              weight=(index >= len(shown) - 1) & (len(missing) > 0))


def answered(missing, bos: int) -> dict:
  """For the decoder of an encoder-decoder: targets, each predicted from those before it."""
  tokens = np.concatenate([[bos], missing[:-1]]) if len(missing) else missing
  return dict(tokens=tokens, targets=missing, weight=np.ones(len(missing)))


@dataclasses.dataclass(frozen=True)
class Glm:
  """Blank infilling of GLM (Du et al. 2022), for a decoder.

  Part A is the document with each span replaced by the mask, seen from both sides. Part B holds the spans in random
  order, each after Specials.start, and predicts them and Specials.end after each. positions_BT of part B are those
  of the masks; inner_BT counts within the span from 1, and is 0 in part A. Lengths of spans are Poisson, at least 1.
  """
  specials: Specials
  density: float = 0.15
  mean: float = 3.0
  room: float = 1 / 32
  ahead = 1

  def __post_init__(self):
    if not 0 < self.density < 1 or self.mean < 1:
      raise ValueError(f'Glm.density={self.density} must lie between 0 and 1, and mean={self.mean} be 1 or more')
    check('Glm', 'decoder', self.room)

  def raw(self, length: int) -> int:
    return int(length * (1 - self.room) / (1 + 2 * self.density / self.mean))

  def of(self, tokenizer, vocab: int, length: int) -> Callable:
    self.specials.check('Glm', ('mask', 'start', 'end'), tokenizer, vocab)
    if (raw_T := self.raw(length)) < 2:
      raise ValueError(f'Glm: a length of {length} leaves no room for two tokens beside special ids')

    def apply(raw, key_B):
      drawn_NBT = [order.uniform(key_B, raw_T, stream) for stream in range(3)]
      rows = []
      for b in range(len(key_B)):
        row, left = {}, length - int((raw.segments_BT[b] > 0).sum())
        for start, stop in sorted(segments(raw.segments_BT[b]), key=lambda span: span[0] - span[1]):
          ids, drawn_3T = raw.tokens_BT[b, start:stop], [drawn[b, start:stop] for drawn in drawn_NBT]
          sizes = self.sizes(len(ids), drawn_3T[0])
          row[start] = self._blanked(ids, sizes if 2 * len(sizes) <= left else sizes[:0], drawn_3T)
          left -= len(row[start]['tokens']) - len(ids)
        rows.append([row[start] for start in sorted(row)])
      return laid(rows, length, ('tokens', 'targets', 'weight', 'prefix', 'inner'))

    return apply

  def sizes(self, size: int, drawn_T) -> np.ndarray:
    """Lengths of the spans in a document of `size` tokens: as many as hide `density` of it."""
    hidden, _ = Denoiser(self.density).count(size)
    table = np.cumsum([math.exp(n * math.log(self.mean) - self.mean - math.lgamma(n + 1))
                       for n in range(int(self.mean * 4) + 12)])
    lengths = np.maximum(np.searchsorted(table, drawn_T[:hidden]), 1)
    count = int(np.searchsorted(lengths.cumsum(), hidden)) + 1 if hidden else 0
    lengths = lengths[:min(count, size - hidden)]
    if len(lengths):
      lengths[-1] += hidden - lengths.sum()
    return lengths

  def _blanked(self, ids, sizes, drawn_3T) -> dict:
    if not len(sizes):
      return dict(tokens=ids, targets=0 * ids, weight=0 * ids, prefix=1 + 0 * ids, positions=np.arange(len(ids)),
                  inner=0 * ids)
    special, shown = self.specials, parts(len(ids) - int(sizes.sum()), len(sizes), drawn_3T[1])
    start = (shown + sizes).cumsum() - sizes
    first, keep = ids.copy(), ~inside(start, sizes, len(ids))
    first[start], keep[start] = special.mask, True
    mask_at = shown.cumsum() + np.arange(len(sizes))  # of each span, in part A
    columns = [(first[keep], 0 * first[keep], np.arange(int(keep.sum())), 0 * first[keep])]
    for i in np.argsort(drawn_3T[2][:len(sizes)]).tolist():
      span = ids[start[i]:start[i] + sizes[i]]
      columns.append((np.append(special.start, span), np.append(span, special.end),
                      np.full(len(span) + 1, mask_at[i]), np.arange(1, len(span) + 2)))
    tokens, targets, positions, inner = (np.concatenate(column) for column in zip(*columns))
    prefix = np.arange(len(tokens)) < len(columns[0][0])
    return dict(tokens=tokens, targets=targets, weight=~prefix, prefix=prefix, positions=positions, inner=inner)
