"""Words of text in any script, and hashes of word n-grams, as arrays.

Rules of the literature count words between spaces; Chinese and Japanese put none. Here a word is a run of
letters, digits and marks, while a Han or kana character stands by itself and counts as 5/8 of a word: in
segmented Chinese a word has 1.54 to 1.71 characters (the corpora of Emerson 2005, The Second International
Chinese Word Segmentation Bakeoff), so 1.6. An n-gram of n words is thus n English words, 8n/5 Chinese
characters, or, in mixed text, as many of both as weigh as much; no document needs to be called one or the
other. Other scripts without spaces (Thai, Lao, Khmer, Burmese) are runs: their rules count too few words.

Everything is linear in the length of the text, and works in blocks, so a long text needs little more
memory than its words' hashes.
"""
from collections.abc import Iterator
import dataclasses
import functools
import re
import unicodedata

import numpy as np

WORD, CHARACTER = 8, 5  # what a word, and a character that stands by itself, weigh
BLOCK = 1 << 18  # characters worked on at a time: arrays that stay in the processor's cache
# Han with its extensions and iteration marks, kana, bopomofo: written without spaces.
ALONE = '\u3005-\u3007\u3040-\u30fa\u30fc-\u30ff\u3105-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff' \
    '\uff66-\uff9f\U00020000-\U0003ffff'
SPACE, LETTER, ALONES, DIGIT, SYMBOL = range(5)  # kinds of characters
ALONE_PATTERN = re.compile(f'[{ALONE}]')
# CJK punctuation, which parts words as spaces do.
PARTING = '\u3000-\u3004\u3008-\u303f\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65'
SPLIT_PATTERN = re.compile(f'[{ALONE}{PARTING}\\s]+')
VERSION = 1  # of the definition of words and of their hashes


@dataclasses.dataclass(frozen=True)
class Words:
  """The words of a text, in order; n of them."""
  hashes: np.ndarray  # uint64, n: of a word's letters without case; equal words have equal hashes
  lengths: np.ndarray  # int64, n: characters of each
  alone: np.ndarray  # bool, n: a Han or kana character

  @functools.cached_property
  def weights(self) -> np.ndarray:
    """int64, n: in eighths of a word."""
    return np.where(self.alone, CHARACTER, WORD).astype(np.int64)

  @functools.cached_property
  def number(self) -> float:
    """How many words, a Han character counted as 5/8."""
    return float(self.weights.sum()) / WORD


def words(text: str) -> Words:
  """The words of a text: runs of letters, digits and marks, and single Han or kana characters."""
  found = [_block(codes) for codes in blocks(text.lower())]
  columns = zip(*found) if found else ([np.zeros(0, kind)] for kind in (np.uint64, np.int64, bool))
  return Words(*map(np.concatenate, columns))


def blocks(text: str) -> Iterator[np.ndarray]:
  """The code points of a text, uint32, cut at spaces into blocks; a longer word is cut."""
  start = 0
  while start < len(text):
    stop = start + BLOCK
    if stop < len(text) and (at := max(text.rfind(' ', start, stop), text.rfind('\n', start, stop))) > start:
      stop = at
    yield np.frombuffer(text[start:stop].encode('utf-32-le', 'surrogatepass'), np.uint32)
    start = stop


def runs(inside: np.ndarray, alone: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Starts and ends of the runs of `inside` and of each of `alone`, by position; both bool, of one length."""
  edge = np.zeros(len(inside) + 1, bool)
  edge[1:] = inside[:len(inside)]
  starts = np.flatnonzero(alone | (inside & ~edge[:-1]))
  edge[:-1], edge[-1] = inside, False
  ends = np.flatnonzero(alone | (inside & ~edge[1:])) + 1
  return starts, ends


def _block(codes):
  kind = kinds()[codes]
  alone = kind == ALONES
  starts, ends = runs((kind == LETTER) | (kind == DIGIT), alone)
  return *_hashed(mixed(codes.astype(np.uint64)), starts, ends), alone[starts]


def _hashed(values, starts, ends):
  """Hash and length of each run: the polynomial of its values in B, modulo 2^64, mixed once more."""
  sums, inverses = _prefix_sums(values)
  return mixed((sums[ends] - sums[starts]) * inverses[starts]), ends - starts


def prefix_sums(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(sums, inverses) of at most 3 BLOCK code points: mixed((sums[j] - sums[i]) * inverses[i]) hashes i to j."""
  return _prefix_sums(mixed(codes.astype(np.uint64)))


def _prefix_sums(values):
  powers, inverses = _powers(len(values) + 1)
  sums = np.zeros(len(values) + 1, np.uint64)
  np.cumsum(values * powers[:-1], out=sums[1:])
  return sums, inverses


def hash_of(text: str) -> int:
  """The hash of a short text's characters, as they are."""
  sums, _ = prefix_sums(np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32))
  return int(mixed(sums[-1:])[0])


def ngrams(found: Words, number: int) -> tuple[np.ndarray, np.ndarray]:
  """(hashes, stops) of the n-grams of `number` words: the one that begins with word i ends before stops[i].

  It is the shortest run of words from i that weighs `number` words. Those near the end of the text that
  cannot are left out, so both arrays may be shorter than the words, or empty.
  """
  reach = np.zeros(len(found.weights) + 1, np.int64)
  np.cumsum(found.weights, out=reach[1:])
  whole = int(np.searchsorted(reach, reach[-1] - number * WORD, 'right'))
  stops = np.searchsorted(reach, reach[:whole] + number * WORD)
  return spans(found.hashes, stops), stops


def spans(hashes: np.ndarray, stops: np.ndarray) -> np.ndarray:
  """The hash, uint64, of each run of words i to stops[i]; ValueError if one of more than BLOCK words is asked."""
  result = np.empty(len(stops), np.uint64)
  for start in range(0, len(stops), BLOCK):
    ends = stops[start:start + BLOCK]
    last = int(ends[-1])
    if last - start > 2 * BLOCK:
      raise ValueError(f'an n-gram of more than {BLOCK} words')
    result[start:start + BLOCK] = _hashed(hashes[start:last], np.arange(len(ends)), ends - start)[0]
  return result


@dataclasses.dataclass(frozen=True)
class Counts:
  """Of a text cut at spaces and CJK punctuation: a token is a run of anything else, but for Han and kana."""
  tokens: int
  characters: int  # in tokens
  lettered: int  # tokens with a letter
  alone: int  # Han and kana characters

  @property
  def words(self) -> float:
    return self.tokens + self.alone * CHARACTER / WORD


def counts(text: str) -> Counts:
  """How many words a text has, as rules count them that cut it at spaces: 'a - b' has three."""
  total = np.zeros(4, np.int64)
  for codes in blocks(text):
    kind = kinds()[codes]
    starts, ends = runs((kind != SPACE) & (kind != ALONES), np.zeros(len(kind), bool))
    letters = np.zeros(len(kind) + 1, np.int64)
    np.cumsum(kind == LETTER, out=letters[1:])
    total += (len(starts), (ends - starts).sum(), (letters[ends] > letters[starts]).sum(), (kind == ALONES).sum())
  return Counts(*map(int, total))


def number_of_words(text: str) -> float:
  """How many words a short text has, between spaces and CJK punctuation; a Han character counts as 5/8."""
  if text.isascii():
    return len(text.split())
  return len(SPLIT_PATTERN.sub(' ', text).split()) + len(ALONE_PATTERN.findall(text)) * CHARACTER / WORD


def mixed(values: np.ndarray) -> np.ndarray:
  """A fixed bijection of uint64 that spreads every bit (splitmix64 of Steele, Lea and Flood 2014)."""
  values = values + np.uint64(0x9E3779B97F4A7C15)
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


def member(values: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Which of the values are in a sorted, not empty table; bool."""
  return table[np.minimum(np.searchsorted(table, values), len(table) - 1)] == values


@functools.cache
def kinds() -> np.ndarray:
  """The kind of every code point, uint8."""
  table = np.full(0x110000, SYMBOL, np.uint8)
  for code in range(0x32000):
    character = chr(code)
    if character.isalpha():
      table[code] = LETTER
    elif character.isspace():
      table[code] = SPACE
    elif character.isalnum() or (code > 0x2ff and unicodedata.category(character) in ('Mn', 'Mc', 'Me')):
      table[code] = DIGIT  # marks are no letters by themselves, but belong to words
  for characters, kind in ((PARTING, SPACE), (ALONE, ALONES)):
    for first, last in re.findall('(.)(?:-(.))?', characters):
      table[ord(first):ord(last or first) + 1] = kind
  table.setflags(write=False)
  return table


@functools.cache
def _all_powers(number):
  """The first powers of an odd number and of its inverse modulo 2^64."""
  odd = 0x9E3779B97F4A7C15
  both = []
  for factor in (odd, pow(odd, -1, 1 << 64)):
    powers = np.full(number, factor, np.uint64)
    powers[0] = 1
    both.append(np.cumprod(powers))
  return both


def _powers(number):
  powers, inverses = _all_powers(3 * BLOCK + 2)
  return powers[:number], inverses[:number]
