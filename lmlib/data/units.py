"""SentencePiece's BPE by units: the same ids, several times sooner, as most units of a text have come before.

A text is cut between two characters that stand side by side in no piece of the vocabulary. A merge can never reach
over such a place, so what lies between two of them, about a word, has the ids it has alone; those are remembered.
"""
from collections.abc import Callable
import itertools

import numpy as np

SPACE = '\u2581'  # how SentencePiece writes a space
KEPT = 1 << 18  # units remembered at most: some tens of megabytes
LONGEST = 64  # characters of a unit worth remembering
SLOTS = 1 << 20  # of the table of pairs; two pairs in one slot make a cut fewer, never a wrong one


class Units:
  """Encodes as `processor.encode` does, for a SentencePieceProcessor of kind BPE; fits() says if it is one."""

  def __init__(self, processor):
    self._known = Known(processor.encode)
    self._joined = np.zeros(SLOTS, bool)
    for text in pieces(processor):
      codes = np.frombuffer(text.encode('utf-32-le'), '<u4')
      self._joined[slot(codes[:-1], codes[1:])] = True

  def ids(self, text: str) -> np.ndarray:
    """The ids of a text without U+2581 and half surrogates, int32."""
    codes = np.frombuffer(text.encode('utf-32-le'), '<u4')
    places = [0, *(np.flatnonzero(~self._joined[slot(codes[:-1], codes[1:])]) + 1).tolist(), len(text)]
    units = [text[start:stop] for start, stop in itertools.pairwise(places)]
    return np.frombuffer(bytearray().join(map(self._known.__getitem__, units)), np.int32)


class Known(dict):
  """The ids of units, int32 in bytes: encoded when first asked for."""

  def __init__(self, encode: Callable[[str], list[int]]):
    super().__init__()
    self._encode = encode

  def __missing__(self, unit: str) -> bytes:
    ids = np.array(self._encode(unit), np.int32).tobytes()
    if len(unit) <= LONGEST:
      if len(self) >= KEPT:
        self.clear()
      self[unit] = ids
    return ids


def fits(processor) -> bool:
  """Whether the model is BPE, whose scores are the places of merges in order; a unigram model has logarithms."""
  return all(float(processor.get_score(i)).is_integer() for i in range(processor.vocab_size()))


def pieces(processor):
  """The pieces that stand for text, a space as a space."""
  for i in range(processor.vocab_size()):
    if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or processor.is_unused(i)):
      yield processor.id_to_piece(i).replace(SPACE, ' ')


def slot(first, second):
  """The place of a pair of code points in the table."""
  return (first * np.uint32(0x9E3779B1) ^ second * np.uint32(0x85EBCA6B)) >> np.uint32(12)
