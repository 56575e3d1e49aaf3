"""What is hidden and what is to be predicted: objectives on packed rows, each a pure function of the rows.

An objective is a frozen dataclass. raw(length) says how many tokens a row is packed with, so that what the
objective adds has room; of(tokenizer, vocab, length) checks it and returns a function of (packing.Raw, one random
key a row) that makes the arrays of a batch. All chance comes of the row's key, so microbatches, processes and
resumes see the same rows. A key is seen by the later queries of its document and, where prefix_BT is 1, by all
of them. Denoising lies in denoising.py.
"""
from collections.abc import Callable
import dataclasses
import itertools

import numpy as np

from lmlib.data import order


@dataclasses.dataclass(frozen=True)
class Specials:
  """Ids that no text gives, by what they are for; an objective asks for those that it uses."""
  mask: int | None = None  # masked LM, GLM
  sentinels: tuple[int, ...] = ()  # span corruption: the first span's, the second's, ...
  prefix: int | None = None  # fill in the middle
  suffix: int | None = None
  middle: int | None = None
  mode_r: int | None = None  # UL2: what kind of denoising is wanted
  mode_s: int | None = None
  mode_x: int | None = None
  start: int | None = None  # GLM: before a span and after it
  end: int | None = None

  def __post_init__(self):
    ids, named = list(self.ids.values()), list(self.ids)
    for name, i in self.ids.items():
      if not isinstance(i, int) or i < 0:
        raise ValueError(f'Specials.{name}={i!r} must be an id: 0 or more')
      if named[ids.index(i)] != name:
        raise ValueError(f'Specials.{name}={i} is also Specials.{named[ids.index(i)]}: ids must differ')

  @property
  def ids(self) -> dict[str, int]:
    """Those that are given, by name."""
    given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != 'sentinels'}
    return {name: i for name, i in given.items() if i is not None} | {
        f'sentinels[{n}]': i for n, i in enumerate(self.sentinels)}

  def check(self, objective: str, names: tuple[str, ...], tokenizer, vocab: int):
    """ValueError if one of these names is missing, outside the vocabulary, or an id that text has too."""
    for name in names:
      if getattr(self, name) in (None, ()):
        raise ValueError(f'{objective} needs Specials.{name}, which is not given')
    for name, i in self.ids.items():
      if name.partition('[')[0] not in names:
        continue
      if i >= vocab:
        raise ValueError(f'Specials.{name}={i} lies outside the vocabulary of {vocab}')
      if i in (tokenizer.bos, tokenizer.eos):
        raise ValueError(f'Specials.{name}={i} is the {"bos" if i == tokenizer.bos else "eos"} of the tokenizer')
      text = tokenizer.decode([i]) if i < tokenizer.vocab else ''
      if text and ('\ufffd' in text or list(tokenizer.encode(text)) == [i]):
        raise ValueError(f'Specials.{name}={i} is the piece {text!r} of the tokenizer, which texts have too')


def specials_after(vocab: int, sentinels: int = 0) -> Specials:
  """All special ids one after another from `vocab` on, where a tokeniser has none to spare."""
  names = [field.name for field in dataclasses.fields(Specials) if field.name != 'sentinels']
  ids = dict(zip(names, range(vocab, vocab + len(names))))
  return Specials(**ids, sentinels=tuple(range(vocab + len(names), vocab + len(names) + sentinels)))


def vocabulary(objective, vocab: int) -> int:
  """The vocabulary that a model needs: the tokeniser's, and special ids after it."""
  specials = getattr(objective, 'specials', None)
  return max([vocab, *(i + 1 for i in (specials.ids.values() if specials else ()))])


def layout(segments_BT):
  """Of each place: its position in its segment, the segment's size, and where in the row that starts; BT."""
  B, T = segments_BT.shape
  first_BT = np.ones((B, T), bool)
  first_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
  index_BT = np.broadcast_to(np.arange(T)[None], (B, T))
  start_BT = np.maximum.accumulate(np.where(first_BT, index_BT, 0), axis=1)
  starts = np.flatnonzero(first_BT)
  size = np.diff([*starts, B * T])
  return index_BT - start_BT, np.repeat(size, size).reshape(B, T), start_BT


def batch_of(raw, *, targets_BT, weight_BT, tokens_BT=None, prefix_BT=None) -> dict[str, np.ndarray]:
  """The arrays of a batch whose places are those of the raw rows."""
  batch = {'tokens_BT': raw.tokens_BT if tokens_BT is None else tokens_BT, 'targets_BT': targets_BT,
           'segments_BT': raw.segments_BT, 'weight_BT': weight_BT.astype(np.float32)}
  if raw.restart:
    batch['positions_BT'] = layout(raw.segments_BT)[0].astype(np.int32)
  return batch if prefix_BT is None else batch | {'prefix_BT': prefix_BT.astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class Causal:
  """The next token of the document."""
  ahead = 1  # tokens after a row that its targets reach

  def raw(self, length: int) -> int:
    return length

  def of(self, tokenizer, vocab: int, length: int) -> Callable:
    return lambda raw, key_B: batch_of(raw, targets_BT=raw.following[0], weight_BT=raw.alive[0])


CAUSAL = Causal()


@dataclasses.dataclass(frozen=True)
class PrefixLm:
  """The next token, of a document whose beginning is seen from both sides and not predicted (Raffel et al. 2020)."""
  share: float | None = None  # of each document that is prefix; None draws it anew for each
  ahead = 1

  def __post_init__(self):
    if self.share is not None and not 0 < self.share < 1:
      raise ValueError(f'PrefixLm.share={self.share} must lie between 0 and 1; None draws it')

  def raw(self, length: int) -> int:
    return length

  def of(self, tokenizer, vocab: int, length: int) -> Callable:

    def apply(raw, key_B):
      position_BT, size_BT, start_BT = layout(raw.segments_BT)
      if self.share is None:
        drawn_BT = np.take_along_axis(order.uniform(key_B, length), start_BT, axis=1)
        prefix_size_BT = 1 + (drawn_BT * (size_BT - 1)).astype(int)
      else:
        prefix_size_BT = np.clip(np.rint(self.share * size_BT), 1, np.maximum(size_BT - 1, 1))
      inside_BT = raw.segments_BT > 0
      return batch_of(raw, targets_BT=raw.following[0], prefix_BT=inside_BT & (position_BT < prefix_size_BT),
                      weight_BT=raw.alive[0] & (position_BT >= prefix_size_BT - 1))

    return apply


@dataclasses.dataclass(frozen=True)
class MaskedLm:
  """Hidden tokens from both sides (BERT, Devlin et al. 2019): targets are the tokens of the same places.

  Each token, or each word, is chosen with chance `rate`; bos and eos never. Of the chosen tokens `masked` become the
  mask, `random` another token, the rest stay. A word, in scripts with spaces, is a run of letters or digits that
  several pieces spell. Chinese is written without: there a piece that starts with an ideograph begins a word,
  so the tokeniser's pieces stand for the words of whole-word masking (Cui et al. 2021), which needs a segmenter.
  """
  specials: Specials
  rate: float = 0.15
  masked: float = 0.8
  random: float = 0.1
  whole_word: bool = False
  ahead = 1
  in_place = True  # the target of a place is its own token, not the next

  def __post_init__(self):
    if not 0 < self.rate <= 1:
      raise ValueError(f'MaskedLm.rate={self.rate} must lie between 0 and 1')
    if self.masked < 0 or self.random < 0 or self.masked + self.random > 1:
      raise ValueError(f'MaskedLm.masked={self.masked} and random={self.random} must be shares of at most 1 together')

  def raw(self, length: int) -> int:
    return length

  def of(self, tokenizer, vocab: int, length: int) -> Callable:
    self.specials.check('MaskedLm', ('mask',), tokenizer, vocab)
    joins = word_joins(tokenizer) if self.whole_word else None

    def apply(raw, key_B):
      tokens_BT = raw.tokens_BT
      unit_BT = np.broadcast_to(np.arange(length)[None], tokens_BT.shape)
      if joins is not None:  # the place where each word starts speaks for the whole word
        _, _, start_BT = layout(raw.segments_BT)
        goes_on_BT = np.zeros(tokens_BT.shape, bool)
        goes_on_BT[:, 1:] = joins(tokens_BT[:, :-1], tokens_BT[:, 1:])
        unit_BT = np.maximum.accumulate(np.where(goes_on_BT & (unit_BT > start_BT), 0, unit_BT), axis=1)
      may_BT = (raw.segments_BT > 0) & (tokens_BT != tokenizer.bos) & (tokens_BT != tokenizer.eos)
      chosen_BT = may_BT & (np.take_along_axis(order.uniform(key_B, length), unit_BT, axis=1) < self.rate)
      fate_BT = order.uniform(key_B, length, 1)
      other_BT = (order.uniform(key_B, length, 2) * tokenizer.vocab).astype(np.int32)
      shown_BT = np.where(fate_BT < self.masked, np.int32(self.specials.mask),
                          np.where(fate_BT < self.masked + self.random, other_BT, tokens_BT))
      return batch_of(raw, tokens_BT=np.where(chosen_BT, shown_BT, tokens_BT), targets_BT=tokens_BT,
                      weight_BT=chosen_BT, prefix_BT=raw.segments_BT > 0)

    return apply


def word_joins(tokenizer) -> Callable:
  """A function of neighbouring ids, before and after: whether the second goes on with the first's word."""
  first_V, last_V = np.zeros(tokenizer.vocab, np.int8), np.zeros(tokenizer.vocab, np.int8)
  for i in range(tokenizer.vocab):
    if text := tokenizer.decode([i]):
      first_V[i], last_V[i] = _kind(text[0]), _kind(text[-1])
  return lambda before, after: (first_V[after] > 0) & (first_V[after] == last_V[before])


def _kind(character: str) -> int:
  """1 for what words are made of, 2 for a byte that is no character by itself, else 0, ideographs too."""
  if character == '\ufffd':
    return 2
  ideograph = '\u2e80' <= character <= '\u9fff' or '\uf900' <= character <= '\ufaff' or character >= '\U00020000'
  return int((character.isalnum() or character == '_') and not ideograph)


@dataclasses.dataclass(frozen=True)
class MultiToken:
  """The next `tokens` tokens from each place (Gloeckle et al. 2024; DeepSeek-V3 2024), also those beyond the row.

  targets_BTJ and weight_BTJ hold them, J = 0 the next one; weights are 0 across the border of a document.
  """
  tokens: int = 2

  def __post_init__(self):
    if not isinstance(self.tokens, int) or self.tokens < 2:
      raise ValueError(f'MultiToken.tokens={self.tokens!r} must be 2 or more; Causal predicts one')

  @property
  def ahead(self) -> int:
    return self.tokens

  def raw(self, length: int) -> int:
    return length

  def of(self, tokenizer, vocab: int, length: int) -> Callable:
    return lambda raw, key_B: batch_of(raw, targets_BT=raw.following[0], weight_BT=raw.alive[0]) | {
        'targets_BTJ': np.stack(raw.following, axis=-1), 'weight_BTJ': np.stack(raw.alive, axis=-1).astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
  """The next token, of documents cut in three and put in another order (Bavarian et al. 2022).

  PSM: prefix P suffix S middle M become <prefix> P <suffix> S <middle> M; SPM, with chance `spm`: <prefix> <suffix> S
  <middle> P M, which keeps P M in one stretch. Done to each document of a row, or the part of a long one that the
  row holds, so that no example loses a part; bos stays first and eos last. Cuts fall between tokens.
  Each document is chosen with chance `rate`; where a row has no room for three more ids, the smaller ones stay.
  """
  specials: Specials
  rate: float = 0.5
  spm: float = 0.5
  room: float = 1 / 32  # share of a row that is kept for the ids
  ahead = 1

  def __post_init__(self):
    for name in ('rate', 'spm'):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f'FillInTheMiddle.{name}={getattr(self, name)} must lie between 0 and 1')
    if self.rate == 0 or not 0 < self.room < 1:
      raise ValueError(f'FillInTheMiddle.rate={self.rate} and room={self.room} must exceed 0, and room be below 1')

  def raw(self, length: int) -> int:
    return length - max(3, int(self.room * length))

  def of(self, tokenizer, vocab: int, length: int) -> Callable:
    self.specials.check('FillInTheMiddle', ('prefix', 'suffix', 'middle'), tokenizer, vocab)
    if self.raw(length) < 1:
      raise ValueError(f'FillInTheMiddle: a length of {length} leaves no token beside three special ids')

    def apply(raw, key_B):
      drawn_NBT = [order.uniform(key_B, length, stream) for stream in range(4)]
      rows = []
      for b in range(len(key_B)):
        spans = segments(raw.segments_BT[b])
        wanted = [(stop - start, i) for i, (start, stop) in enumerate(spans) if drawn_NBT[0][b, start] < self.rate]
        chosen = {i for _, i in sorted(wanted, reverse=True)[:(length - raw.tokens_BT.shape[1]) // 3]}
        rows.append([self._moved(raw.tokens_BT[b, start:stop], [x[b, start] for x in drawn_NBT[1:]], tokenizer)
                     if i in chosen else
                     dict(tokens=raw.tokens_BT[b, start:stop], targets=raw.following[0][b, start:stop],
                          weight=raw.alive[0][b, start:stop])
                     for i, (start, stop) in enumerate(spans)])
      return laid(rows, length, ('tokens', 'targets', 'weight'))

    return apply

  def _moved(self, ids, drawn, tokenizer):
    head, tail = int(ids[0] == tokenizer.bos), len(ids) - int(ids[-1] == tokenizer.eos and len(ids) > 1)
    body = ids[head:tail]
    a, b = sorted(int(u * (len(body) + 1)) for u in drawn[:2])
    special = self.specials
    if drawn[2] < self.spm:
      order_of = [[special.prefix, special.suffix], body[b:], [special.middle], body[:b]]
    else:
      order_of = [[special.prefix], body[:a], [special.suffix], body[b:], [special.middle], body[a:b]]
    moved = np.concatenate([ids[:head], *order_of, ids[tail:]]).astype(np.int32)
    return dict(tokens=moved, targets=np.append(moved[1:], np.int32(0)), weight=np.arange(len(moved)) < len(moved) - 1)


def segments(segments_T) -> list[tuple[int, int]]:
  """Start and stop of each document of a row, in order; padding is none."""
  edges = [0, *(np.flatnonzero(np.diff(segments_T)) + 1).tolist(), len(segments_T)]
  return [(a, b) for a, b in itertools.pairwise(edges) if segments_T[a] > 0]


def laid(rows: list[list[dict]], length: int, names: tuple[str, ...], axes: str = 'BT') -> dict[str, np.ndarray]:
  """Rows of documents, each a dict of arrays of one length, end to end, padded with zeros to `length`.

  names: what every document has; its array 'weight' becomes float32, others int32. Beside them come 'segments' and,
  from 0 in each document unless it says them, 'positions'.
  """
  out = {name: np.zeros((len(rows), length), np.float32 if name == 'weight' else np.int32)
         for name in (*names, 'segments', 'positions')}
  for b, row in enumerate(rows):
    at = 0
    for number, part in enumerate(row, 1):
      size = len(part[names[0]])
      here = slice(at, at + size)
      assert here.stop <= length, (here, length)
      out['segments'][b, here], out['positions'][b, here] = number, np.arange(size)
      for name, values in part.items():
        out[name][b, here] = values
      at += size
  return {f'{name}_{axes}': values for name, values in out.items()}
