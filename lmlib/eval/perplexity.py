"""How well a model predicts whole documents it has not seen: bits per byte and perplexity.

Bits per byte do not depend on the tokeniser and compare with compressors: a model at 1.4 bits per
byte could compress the text to 1.4 / 8 of its size (Delétang et al. 2024).
"""
import bz2
import dataclasses
import functools
import gzip
import lzma
import math

import jax
import numpy as np

from lmlib.models import protocol
from lmlib.train.losses import NextToken


@dataclasses.dataclass(frozen=True)
class Score:
  nats: float  # of all tokens after the first of each document, its end included
  tokens: int
  bytes: int

  @property
  def bits_per_byte(self) -> float:
    return self.nats / math.log(2) / self.bytes

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
  """Scores every token of every document.

  documents: pairs (tokens, bytes), tokens with the mark of beginning first, which is not scored. A document
  longer than `length` is read in windows `stride` apart; each token is scored once, in the first window
  that holds it, so with at least length - stride tokens before it (except at the document's start).
  """
  if not 0 < stride <= length <= config.length:
    raise ValueError(f'stride={stride} and length={length} must satisfy 0 < stride <= length <= {config.length}')
  loss = jax.jit(lambda params, batch: NextToken().of(config)(params, batch)[2]['nats'])
  rows, nats, tokens, size = [], [], 0, 0
  for ids, number in documents:
    rows += list(windows(ids, length, stride))
    tokens, size = tokens + len(ids) - 1, size + number
    while len(rows) >= batch:
      nats.append(loss(params, _batch(rows[:batch], batch, length)))
      rows = rows[batch:]
  if rows:
    nats.append(loss(params, _batch(rows, batch, length)))
  return Score(nats=sum(float(x) for x in nats), tokens=tokens, bytes=size)


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
