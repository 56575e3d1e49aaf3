"""A keyed permutation of 0 .. n - 1 that is computed index by index, with nothing stored; keyed random numbers.

A Feistel network (Luby and Rackoff 1988) permutes the smallest power of two that holds n; an index
that lands at n or above is sent through again until it lands below (cycle walking, Black and Rogaway
2002), at most two times in the mean. Any index of any epoch costs the same.
"""
import hashlib

import numpy as np

ROUNDS = 8  # four make it pseudorandom on large domains; more because the halves of small ones are short


def keys(seed: int, epoch: int) -> np.ndarray:
  """The round keys of one epoch, uint64."""
  drawn = hashlib.sha512(f'order {seed} {epoch}'.encode()).digest()
  return np.frombuffer(drawn, '<u8', ROUNDS)


def permute(index, n: int, *, seed: int, epoch: int) -> np.ndarray:
  """Where the permutation of (seed, epoch) sends each index of 0 .. n - 1; int64, shape of `index`."""
  return _walk(index, n, keys(seed, epoch), range(ROUNDS))


def invert(index, n: int, *, seed: int, epoch: int) -> np.ndarray:
  """The inverse: invert(permute(i)) is i."""
  return _walk(index, n, keys(seed, epoch), range(ROUNDS)[::-1])


def draw(seed: int, epoch: int, below: int) -> int:
  """A number of 0 .. below - 1 for one epoch, independent of its permutation."""
  return int.from_bytes(hashlib.sha256(f'draw {seed} {epoch}'.encode()).digest()[:16], 'big') % below


def row_keys(number_B, *, seed: int, stream: str) -> np.ndarray:
  """One random key a row, uint64: a function of the row's number, the seed and the name of what draws."""
  drawn = hashlib.sha256(f'rows {seed} {stream}'.encode()).digest()
  return _mix(np.asarray(number_B).astype(np.uint64), np.frombuffer(drawn, '<u8', 1))


def uniform(key_B, count: int, stream: int = 0) -> np.ndarray:
  """`count` numbers of [0, 1) for each key, float64; number i of a key is the same whatever `count` is.

  A counter-based generator (Salmon et al. 2011) with splitmix64's finaliser. `stream` numbers independent draws.
  """
  key_B1 = _mix(np.asarray(key_B, np.uint64).reshape(-1)[:, None], np.uint64(stream))
  index_1N = np.arange(count, dtype=np.uint64)[None] * np.uint64(0x9E3779B97F4A7C15)
  return (_mix(key_B1 + index_1N, key_B1) >> np.uint64(11)) * 2.0**-53


def _walk(index, n, round_keys, rounds):
  index = np.asarray(index)
  if not (index.size == 0 or (index.min() >= 0 and index.max() < n)):
    raise ValueError(f'indices from {index.min()} to {index.max()} do not all lie below n={n}')
  x = _feistel(index.reshape(-1).astype(np.uint64), n, round_keys, rounds)
  while (outside := x >= n).any():
    x = np.where(outside, _feistel(x, n, round_keys, rounds), x)
  return x.astype(np.int64).reshape(index.shape)


def _feistel(x, n, round_keys, rounds):
  """One pass over the smallest power of two >= n. An odd number of bits is cut unevenly."""
  bits = max(n - 1, 1).bit_length()
  low_bits = np.uint64(bits // 2)
  low_mask = np.uint64((1 << bits // 2) - 1)
  high_mask = np.uint64((1 << bits - bits // 2) - 1)
  low, high = x & low_mask, x >> low_bits
  for i in rounds:  # each round changes one half by the other, so it is its own inverse
    if i % 2:
      low = low ^ (_mix(high, round_keys[i]) & low_mask)
    else:
      high = high ^ (_mix(low, round_keys[i]) & high_mask)
  return (high << low_bits) | low


def _mix(x, key):
  """splitmix64's finaliser (Steele, Lea and Flood 2014) of x and a key; wraps modulo 2^64."""
  x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ key
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
