"""Exact and near duplicates: of each group the first document in the corpus is kept.

Near duplicates are found by MinHash (Broder 1997) with locality-sensitive hashing (Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, chapter 3): two documents are candidates when all `rows` minima of at
least one of `bands` bands are equal. If s is the Jaccard similarity of their n-grams, that happens with
probability 1 - (1 - s^rows)^bands, the S-curve. The candidates are joined transitively and not compared
again: as in FineWeb (Penedo et al. 2024), whose 14 bands of 8 rows over 5-grams are the defaults.

A signature is the hash of each band, 8 bytes a band: 112 bytes a document, 112 MB a million. Nothing else
of a text is kept. Finding duplicates sorts one band at a time, which takes some 50 bytes a document more.
At a billion documents, equal hashes by chance join about 0.03 pairs a band.
"""
import dataclasses
import functools
import hashlib
from typing import ClassVar

import numpy as np

from lmlib.data import words

CHUNK = 1024  # n-grams hashed at a time: what MinHash works on then stays in the cache


@dataclasses.dataclass(frozen=True)
class ExactDuplicates:
  """Drops texts that equal an earlier one, to the byte."""
  version: ClassVar = 1

  @property
  def name(self) -> str:
    return 'exact duplicates'

  def signature(self, text: str) -> np.ndarray:
    """uint64, 2: the first 128 bits of the SHA-256 of the text."""
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], '<u8').astype(np.uint64)

  def duplicates(self, signatures: np.ndarray) -> dict[int, int]:
    """Each document that equals an earlier one -> the first that it equals."""
    _, first, inverse = np.unique(checked(signatures, 2), axis=0, return_index=True, return_inverse=True)
    kept = first[inverse.ravel()]
    return {int(i): int(kept[i]) for i in np.flatnonzero(kept != np.arange(len(kept)))}


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
  """Drops texts that are nearly an earlier one, or nearly one that is, and so on."""
  ngram: int = 5  # words, so many English ones, or 8/5 as many Chinese characters
  bands: int = 14
  rows: int = 8  # minima in a band
  seed: int = 1
  version: ClassVar = words.VERSION
  libraries: ClassVar = ('datasketch',)

  def __post_init__(self):
    for field in ('ngram', 'bands', 'rows'):
      if getattr(self, field) < 1:
        raise ValueError(f'NearDuplicates.{field}={getattr(self, field)} must be at least 1')
    if not 0 <= self.seed < 2**32:
      raise ValueError(f'NearDuplicates.seed={self.seed} must lie between 0 and {2**32 - 1}')

  @property
  def name(self) -> str:
    return 'near duplicates'

  def probability(self, similarity: float) -> float:
    """That two texts whose n-grams have this Jaccard similarity become candidates."""
    return 1 - (1 - similarity ** self.rows) ** self.bands

  @property
  def threshold(self) -> float:
    """Where the S-curve rises: the similarity (1 / bands)^(1 / rows)."""
    return (1 / self.bands) ** (1 / self.rows)

  def signature(self, text: str) -> np.ndarray:
    """uint64, bands: a hash of each band's minima. A text shorter than an n-gram is one n-gram."""
    found = words.words(text)
    grams = words.ngrams(found, self.ngram)[0]
    if len(found.hashes) and not len(grams):
      grams = words.spans(found.hashes, np.array([len(found.hashes)]))
    elif not len(grams):  # only signs and spaces
      grams = ExactDuplicates().signature(text)[:1]
    grams = np.unique(grams).tolist()
    sketch = _minhash(self.bands * self.rows, self.seed).copy()
    for start in range(0, len(grams), CHUNK):
      sketch.update_batch(grams[start:start + CHUNK])
    minima = sketch.hashvalues.reshape(self.bands, self.rows)
    result = np.full(self.bands, self.rows, np.uint64)
    for row in minima.T:
      result = words.mixed(result ^ row)
    return result

  def duplicates(self, signatures: np.ndarray) -> dict[int, int]:
    """Each document that is joined to an earlier one -> the first of all that are joined to it."""
    kept = joined(checked(signatures, self.bands))
    return {int(i): int(kept[i]) for i in np.flatnonzero(kept != np.arange(len(kept)))}


def joined(columns: np.ndarray) -> np.ndarray:
  """int64, n: for each row of n, the first row that it is joined to; equal values in a column join rows.

  Joining is transitive: a union-find whose roots are the smallest members, over all pairs at once.
  """
  root = np.arange(len(columns))
  for column in columns.T:
    order = np.argsort(column, kind='stable')
    ranked = column[order]
    same = np.flatnonzero(ranked[1:] == ranked[:-1])
    root = _united(root, order[same], order[same + 1])
  return root


def _united(root, left, right):
  """The roots after also joining left[k] with right[k]."""
  while True:
    a, b = root[left], root[right]
    apart = a != b
    if not apart.any():
      return root
    left, right, a, b = left[apart], right[apart], a[apart], b[apart]
    np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))  # the larger root hangs below the smaller
    while True:  # then every member points to its root again
      higher = root[root]
      if np.array_equal(higher, root):
        break
      root = higher


def checked(signatures: np.ndarray, width: int) -> np.ndarray:
  """The signatures. ValueError unless they are uint64 rows of this width."""
  if signatures.dtype != np.uint64 or signatures.ndim != 2 or signatures.shape[1] != width:
    raise ValueError(f'signatures of shape {signatures.shape}, {signatures.dtype}: rows of {width} uint64 are needed')
  return signatures


@functools.cache
def _minhash(number, seed):
  from datasketch import MinHash
  return MinHash(num_perm=number, seed=seed, scheme='affine64', hashfunc=int)
