"""How well a model predicts whole documents it has not seen: bits per byte and per character, and perplexity.

Bits per byte do not depend on the tokeniser and compare with compressors: a model at 1.4 bits per
byte could compress the text to 1.4 / 8 of its size (Delétang et al. 2024).
"""
import bz2
from collections.abc import Iterable, Iterator
import dataclasses
import functools
import gzip
import lzma
import math

import jax
import numpy as np

from lmlib import sharding
from lmlib.data.store import Store
from lmlib.eval import loglikelihood
from lmlib.eval.significance import Interval, interval
from lmlib.models import protocol


@dataclasses.dataclass(frozen=True)
class Score:
  nats: float  # of all tokens after the first of each document, its end included
  tokens: int
  bytes: int
  characters: int | None = None  # None: not counted

  @property
  def bits_per_character(self) -> float:
    """ValueError where characters were not counted."""
    if self.characters is None:
      raise ValueError('the characters of these documents were not counted: score texts, or a store by_source')
    return bits(self.nats) / self.characters

  @property
  def bits_per_byte(self) -> float:
    return bits(self.nats) / self.bytes

  @property
  def nats_per_token(self) -> float:
    return self.nats / self.tokens

  @property
  def perplexity(self) -> float:
    return math.exp(self.nats_per_token)

  def figures(self) -> dict:
    """What a report writes down."""
    return {'bits_per_byte': self.bits_per_byte, 'perplexity': self.perplexity, 'held_out_bytes': self.bytes}


def score(config: protocol.Config, params, documents, *, length: int, stride: int, batch: int = 8) -> Score:
  """The score of all documents together; see each()."""
  return total(each(config, params, documents, length=length, stride=stride, batch=batch))


def each(config: protocol.Config, params, documents, *, length: int, stride: int, batch: int = 8) -> Iterator[Score]:
  """Scores every token of every document; yields a Score a document, in their order.

  documents: (tokens, bytes) or (tokens, bytes, characters), tokens with the mark of beginning first, which is not
  scored. A document longer than `length` is read in windows `stride` apart; each token is scored once, in the first
  window that holds it, so with at least length - stride tokens before it (except at the document's start).
  ValueError for windows that do not fit, and for a model that is no decoder alone.
  """
  if not 0 < stride <= length <= config.length:
    raise ValueError(f'stride={stride} and length={length} must satisfy 0 < stride <= length <= {config.length}')
  if protocol.encodes(config):
    raise ValueError(f'{type(config).__module__} has an encoder: perplexity is of a decoder alone, see held_out.py')
  rows, waiting = [], []  # windows with the number of their document; [nats, windows left, the document's sizes]
  first = 0  # the number of the document that waits longest

  def scored(some):
    nats_B = sharding.fetched(_nats(config, params, _batch([row[1:] for row in some], batch, length)))
    for (i, *_), nats in zip(some, nats_B):
      waiting[i - first][0] += float(nats)
      waiting[i - first][1] -= 1

  for number, (ids, *sizes) in enumerate(documents):
    new = [(number, *window) for window in windows(ids, length, stride)]
    rows += new
    waiting.append([0.0, len(new), (len(ids) - 1, *sizes)])
    while len(rows) >= batch:
      scored(rows[:batch])
      rows = rows[batch:]
    while waiting and not waiting[0][1]:
      nats, _, sizes = waiting.pop(0)
      first += 1
      yield Score(nats, *sizes)
  if rows:
    scored(rows)
  for nats, _, sizes in waiting:
    yield Score(nats, *sizes)


def total(scores: Iterable[Score]) -> Score:
  """Several documents as one."""
  found = list(scores)
  counted = bool(found) and all(one.characters is not None for one in found)
  return Score(sum(one.nats for one in found), sum(one.tokens for one in found), sum(one.bytes for one in found),
               sum(one.characters for one in found) if counted else None)


def by_source(config: protocol.Config, params, store: Store, *, length: int, stride: int,
              batch: int = 8) -> dict[str, list[Score]]:
  """The scores of a store's documents, characters counted, by what they were read from."""
  def documents():
    for number, (ids, size) in enumerate(store.scored()):
      yield ids, size, len(store.text(number))

  found: dict[str, list[Score]] = {}
  for number, one in enumerate(each(config, params, documents(), length=length, stride=stride, batch=batch)):
    found.setdefault(store.sources[int(store.source_of(number))], []).append(one)
  return found


def bits(nats: float) -> float:
  return nats / math.log(2)


def intervals(scores: Iterable[Score], *, level: float = 0.95, seed: int = 0) -> dict[str, Interval]:
  """Bootstrap intervals over documents of 'bits_per_byte', 'perplexity' and, if counted, 'bits_per_character'."""
  found = [one for one in scores if one.tokens]
  over = lambda unit: interval([one.nats for one in found], [getattr(one, unit) for one in found], level=level,
                               seed=seed)
  turned = lambda one, f: Interval(f(one.value), f(one.low), f(one.high), level)
  figures = {'bits_per_byte': turned(over('bytes'), bits), 'perplexity': turned(over('tokens'), math.exp)}
  if all(one.characters is not None for one in found):
    figures['bits_per_character'] = turned(over('characters'), bits)
  return figures


@functools.partial(jax.jit, static_argnums=0)
def _nats(config, params, batch):
  """B: of each row the nats of the targets that weigh."""
  apply = lambda method, *args: config.model().apply({'params': params}, *args, method=method)
  x_BTD, w_DV = apply('hidden', batch['tokens_BT'], batch['segments_BT'])[0], apply('unembed')
  logp_BT, _ = loglikelihood.of_targets(config, w_DV, x_BTD, batch['targets_BT'])
  return -(logp_BT * batch['weight_BT']).sum(1)


def windows(ids, length: int, stride: int):
  """Pairs (at most length + 1 ids, number of leading targets already scored)."""
  done = 0  # targets scored so far; target i is ids[i + 1]
  for start in range(0, max(len(ids) - 1, 0), stride):
    yield ids[start:start + length + 1], done - start
    done = min(start + length, len(ids) - 1)
    if done == len(ids) - 1:
      return


def _batch(rows, batch: int, length: int) -> dict:
  tokens_BT = np.zeros((batch, length + 1), np.int32)
  weight_BT = np.zeros((batch, length), np.float32)
  for i, (ids, done) in enumerate(rows):
    tokens_BT[i, :len(ids)] = ids
    weight_BT[i, done:len(ids) - 1] = 1
  return {'tokens_BT': tokens_BT[:, :-1], 'targets_BT': tokens_BT[:, 1:], 'weight_BT': weight_BT,
          'segments_BT': np.ones((batch, length), np.int32)}


def compressors(texts: list[bytes]) -> dict[str, float]:
  """Bits per byte of gzip, bzip2 and xz at their strongest, each document by itself as a model reads it.

  And of xz on all of them as one archive, where it may look back from one document to the others.
  """
  xz = functools.partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME)
  size = sum(map(len, texts))
  packed = {'gzip': map(gzip.compress, texts), 'bzip2': map(bz2.compress, texts), 'xz': map(xz, texts),
            'xz, all as one': [xz(b''.join(texts))]}
  return {name: 8 * sum(map(len, small)) / size for name, small in packed.items()}
