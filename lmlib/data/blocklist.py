"""Blocklists: texts that hold blocked terms are dropped.

A term's end that is a letter or a digit must be the end of a word in the text, unless it is a Han or kana
character, since Chinese has no word borders: 'ass' is not in 'class', but '赌博' is in '网络赌博平台'. Case
and the spaces between the words of a term do not matter; traditional and simplified forms are two terms.
"""
import dataclasses
import functools
import hashlib
import pathlib
from typing import ClassVar

import numpy as np

from lmlib.data import words
from lmlib.data.cleaning import Rejected


@dataclasses.dataclass(frozen=True)
class Blocklist:
  """Drops texts with more than `share` of their words in blocked terms: with the default, any."""
  terms: tuple[str, ...] = ()
  file: str | None = None  # more terms, one a line in UTF-8; empty lines and those that begin with # are none
  share: float = 0.0
  version: ClassVar = words.VERSION

  def __post_init__(self):
    if not 0 <= self.share < 1:
      raise ValueError(f'Blocklist.share={self.share} must be at least 0 and under 1')
    if not self.all_terms:
      raise ValueError(f'Blocklist.terms={self.terms}, file={self.file!r}: no term')

  @property
  def name(self) -> str:
    return 'blocklist'

  @property
  def settings(self):
    return {'terms': hashlib.sha256('\n'.join(self.all_terms).encode()).hexdigest(), 'share': self.share}

  @functools.cached_property
  def all_terms(self) -> tuple[str, ...]:
    """The terms, in lower case with single spaces, sorted. ValueError if the file cannot be read as UTF-8."""
    terms = [*self.terms]
    if self.file is not None:
      try:
        lines = pathlib.Path(self.file).read_text(encoding='utf-8-sig').splitlines()
      except OSError as error:
        raise ValueError(f'Blocklist.file={self.file!r}: {error.strerror}') from error
      except UnicodeDecodeError as error:
        raise ValueError(f'Blocklist.file={self.file!r}: not UTF-8 at byte {error.start}') from error
      terms += [line for line in lines if not line.startswith('#')]
    return tuple(sorted({*filter(None, map(folded, terms))}))

  def __call__(self, text: str) -> str | Rejected:
    text_folded = folded(text)
    found = self.found(text_folded, first=not self.share)
    if not found:
      return text
    if self.share:
      size = words.counts(text_folded).words
      blocked = sum(words.number_of_words(term) for _, term in found)
      if blocked <= self.share * size:
        return text
      return Rejected(f'over {self.share} of words blocked', most_common(found))
    return Rejected('blocked term', most_common(found))

  def found(self, text: str, *, first: bool = False) -> list[tuple[int, str]]:
    """(position, term) of every blocked term in a folded text, in order; with `first`, of one term at most."""
    offset, tail, kept = 0, '', set()
    overlap = max(self._index[1]) + 1  # a term, and what stands before it
    for start in range(0, len(text), words.BLOCK):
      piece = tail + text[start:start + words.BLOCK]
      last = start + words.BLOCK >= len(text)
      kept.update((at + offset, term) for at, term in self._in_piece(piece, offset > 0, last))
      if first and kept:
        return [min(kept)]
      tail = piece[-overlap:]
      offset = start + words.BLOCK - len(tail)
    return sorted(kept)

  def _in_piece(self, piece, more_before, last):
    firsts, tables = self._index
    codes = np.frombuffer(piece.encode('utf-32-le', 'surrogatepass'), np.uint32)
    sums, inverses = words.prefix_sums(codes)
    kind = words.kinds()[codes]
    in_word = np.zeros(len(codes) + 1, bool)  # in_word[-1], which is beyond either end, is False
    in_word[:-1] = (kind == words.LETTER) | (kind == words.DIGIT)
    candidates = np.flatnonzero(firsts[codes])
    for length, table in tables.items():
      starts = candidates[:np.searchsorted(candidates, len(codes) - length, 'right')]
      hashes = words.mixed((sums[starts + length] - sums[starts]) * inverses[starts])
      for at in starts[words.member(hashes, table)].tolist():
        stop = at + length
        if (more_before and at == 0) or (stop == len(codes) and not last):
          continue  # what stands beside it is in another piece, which holds the term too
        cut = (in_word[at - 1] and in_word[at]) or (in_word[stop - 1] and in_word[stop])
        if not cut and (term := piece[at:stop]) in self._set:
          yield at, term

  @functools.cached_property
  def _set(self):
    return frozenset(self.all_terms)

  @functools.cached_property
  def _index(self) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Which code points begin a term; by length in characters the sorted hashes of the terms."""
    by_length, firsts = {}, np.zeros(0x110000, bool)
    firsts[[ord(term[0]) for term in self.all_terms]] = True
    for term in self.all_terms:
      by_length.setdefault(len(term), []).append(words.hash_of(term))
    return firsts, {length: np.sort(np.array(hashes, np.uint64)) for length, hashes in sorted(by_length.items())}


def folded(text: str) -> str:
  """In lower case, with one space for any spaces between words."""
  return ' '.join(text.lower().split())


def most_common(found: list[tuple[int, str]]) -> str:
  """The term found most often, and of those the first in order of letters."""
  terms = [term for _, term in found]
  return min({*terms}, key=lambda term: (-terms.count(term), term))
