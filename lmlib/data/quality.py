"""Length, quality and repetition rules of MassiveText (Gopher) and C4, for prose in any script.

  Length, Quality, Repetition   Rae et al. 2021 (arXiv:2112.11446), appendix A.1.1, table A1
  Prose                         Raffel et al. 2020 (JMLR 21/140), section 2.2

Words are those of words.py, where a Han character counts as 5/8 of one, so that each threshold means as much
Chinese as English. Every rule is a field, and None turns it off. docs/cleaning.md lists what differs from the
papers. Source code, tables and verse fail these rules: they are for pages of prose.
"""
from collections import Counter
import dataclasses
import re
from typing import ClassVar

import numpy as np

from lmlib.data import words
from lmlib.data.cleaning import Rejected

ENGLISH = ('the', 'be', 'to', 'of', 'and', 'that', 'have', 'with')  # Gopher's
CHINESE = ('的', '是', '在', '了', '和', '有', '不', '这', '這', '我', '他', '为', '為', '与', '與', '以', '于', '於')
BULLETS = ('•', '‣', '◦', '●', '○', '■', '□', '▪', '▫', '◆', '◇', '★', '☆', '※', '·', '・', '-', '*', '–', '—')
ELLIPSIS = re.compile(r'\.{3,}|…+')
PARAGRAPHS = re.compile(r'\n{2,}')


@dataclasses.dataclass(frozen=True)
class Length:
  """Between `least` and `most` words: Gopher's 50 to 100,000, which is 80 to 160,000 Chinese characters."""
  least: int | None = 50
  most: int | None = 100_000
  version: ClassVar = words.VERSION

  def __post_init__(self):
    has_effect(self, 'least', 'most')
    if min(self.least or 0, self.most or 0) < 0 or (self.least or 0) > (self.most or float('inf')):
      raise ValueError(f'Length.least={self.least} and Length.most={self.most} must be 0 <= least <= most')

  @property
  def name(self) -> str:
    return 'length'

  def __call__(self, text: str) -> str | Rejected:
    number = words.counts(text).words
    if self.least is not None and number < self.least:
      return Rejected(f'fewer than {self.least} words')
    if self.most is not None and number > self.most:
      return Rejected(f'more than {self.most} words')
    return text


@dataclasses.dataclass(frozen=True)
class Quality:
  """Gopher's rules on words, symbols, lines and function words."""
  mean_length: tuple[float, float] | None = (3, 10)  # characters of a word; of text that has as many words as Han
  symbols: float | None = 0.1  # most '#', and most ellipses, a word
  bullets: float | None = 0.9  # most lines that begin with a bullet
  ellipses: float | None = 0.3  # most lines that end with an ellipsis
  lettered: float | None = 0.8  # least words that hold a letter
  function_words: int | None = 2  # least different ones, of either language
  english: tuple[str, ...] = ENGLISH
  chinese: tuple[str, ...] = CHINESE
  version: ClassVar = words.VERSION

  def __post_init__(self):
    has_effect(self, 'mean_length', 'symbols', 'bullets', 'ellipses', 'lettered', 'function_words')
    shares(self, 'symbols', 'bullets', 'ellipses', 'lettered')
    if self.mean_length is not None and not 0 <= self.mean_length[0] <= self.mean_length[1]:
      raise ValueError(f'Quality.mean_length={self.mean_length} must be (least, most)')
    if self.function_words is not None and not 1 <= self.function_words <= max(len(self.english), len(self.chinese)):
      raise ValueError(f'Quality.function_words={self.function_words} must lie between 1 and the '
                       f'{len(self.english)} of english or {len(self.chinese)} of chinese; None turns it off')

  @property
  def name(self) -> str:
    return 'quality'

  def __call__(self, text: str) -> str | Rejected:
    reason = self._words(text) or self._lines(text) or self._function_words(text)
    return Rejected(reason) if reason else text

  def _words(self, text):
    found = words.counts(text)
    if not found.words:
      return 'no words'
    if self.mean_length is not None and found.tokens >= found.alone * words.CHARACTER / words.WORD:
      low, high = self.mean_length
      mean = found.characters / found.tokens
      if not low <= mean <= high:
        return f'mean word length {"under" if mean < low else "over"} {low if mean < low else high}'
    if self.symbols is not None:
      for name, number in (('#', text.count('#')), ('ellipses', len(ELLIPSIS.findall(text)))):
        if number > self.symbols * found.words:
          return f'over {self.symbols} {name} a word'
    lettered = found.lettered + found.alone * words.CHARACTER / words.WORD
    if self.lettered is not None and lettered < self.lettered * found.words:
      return f'under {self.lettered:.0%} of words have a letter'
    return None

  def _lines(self, text):
    lines = [line for line in map(str.strip, text.split('\n')) if line]
    number = sum(line.startswith(BULLETS) for line in lines)
    if self.bullets is not None and number > self.bullets * len(lines):
      return f'over {self.bullets:.0%} of lines begin with a bullet'
    number = sum(line.endswith(('...', '…')) for line in lines)
    if self.ellipses is not None and number > self.ellipses * len(lines):
      return f'over {self.ellipses:.0%} of lines end with an ellipsis'
    return None

  def _function_words(self, text):
    if self.function_words is None:
      return None
    if sum(word in text for word in self.chinese) >= self.function_words:
      return None
    if len({*self.english}.intersection(text.lower().split())) >= self.function_words:
      return None
    return f'fewer than {self.function_words} function words'


@dataclasses.dataclass(frozen=True)
class Repetition:
  """Gopher's rules on repeated lines, paragraphs and n-grams, as shares of the text.

  A line, paragraph or n-gram is a duplicate where it has occurred earlier in the text, so a share is what
  could be taken away without loss. Each of `top` and `duplicate` is ((n words, most), ...).
  """
  lines: float | None = 0.3  # most duplicate lines
  line_characters: float | None = 0.2  # most characters in them
  paragraphs: float | None = 0.3
  paragraph_characters: float | None = 0.2
  top: tuple[tuple[int, float], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))  # most characters in the commonest n-gram
  duplicate: tuple[tuple[int, float], ...] = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
  version: ClassVar = words.VERSION

  def __post_init__(self):
    has_effect(self, 'lines', 'line_characters', 'paragraphs', 'paragraph_characters', 'top', 'duplicate')
    shares(self, 'lines', 'line_characters', 'paragraphs', 'paragraph_characters')
    for field in ('top', 'duplicate'):
      pairs = getattr(self, field)
      if not all(0 <= most <= 1 and n >= 1 for n, most in pairs) or [n for n, _ in pairs] != sorted({*dict(pairs)}):
        raise ValueError(f'Repetition.{field}={pairs} must be (n words, share between 0 and 1) with rising n')

  @property
  def name(self) -> str:
    return 'repetition'

  def __call__(self, text: str) -> str | Rejected:
    lines = list(filter(None, map(str.strip, text.split('\n'))))
    paragraphs = list(filter(None, map(str.strip, PARAGRAPHS.split(text))))
    reason = (_repeated('lines', lines, self.lines, self.line_characters)
              or _repeated('paragraphs', paragraphs, self.paragraphs, self.paragraph_characters)
              or self._ngrams(text))
    return Rejected(reason) if reason else text

  def _ngrams(self, text):
    found = words.words(text)
    reach = np.concatenate([[0], np.cumsum(found.lengths)])
    top, duplicate, among = dict(self.top), dict(self.duplicate), None
    for n in sorted({*top, *duplicate}):
      hashes, stops = words.ngrams(found, n)
      # Equal n-grams begin with equal shorter ones: only where those recur can these.
      among = np.arange(len(hashes)) if among is None else among[among < len(hashes)]
      among, first, counts = _recurring(hashes, among)
      if not len(among):
        return None
      if n in top:
        spans = (reach[stops[among]] - reach[among]) * (counts == counts.max())
        commonest = among[hashes[among] == hashes[among[spans.argmax()]]]
        if _covered(found.lengths, commonest, stops) > top[n] * reach[-1]:
          return f'over {top[n]:.0%} of characters in one {n}-gram'
      if n in duplicate and _covered(found.lengths, among[~first], stops) > duplicate[n] * reach[-1]:
        return f'over {duplicate[n]:.0%} of characters in duplicate {n}-grams'
    return None


def _covered(lengths, starts, stops):
  """Characters of the words that lie in any of the runs from starts[k] to stops[starts[k]], each once."""
  edges = np.zeros(len(lengths) + 1, np.int64)
  np.add.at(edges, starts, 1)
  np.add.at(edges, stops[starts], -1)
  return lengths[np.cumsum(edges)[:-1] > 0].sum()


def _recurring(hashes, among):
  """Of the positions `among`, rising: those whose hash occurs twice; whether it is the first time; how often."""
  order = among[np.argsort(hashes[among], kind='stable')]
  ranked = hashes[order]
  new = np.ones(len(order), bool)
  new[1:] = ranked[1:] != ranked[:-1]
  group = np.cumsum(new) - 1
  counts = np.bincount(group)[group] if len(group) else group
  keep = counts > 1
  back = np.argsort(order[keep], kind='stable')
  return order[keep][back], new[keep][back], counts[keep][back]


def _repeated(what, parts, most, most_characters):
  if len(parts) < 2 or (most is None and most_characters is None):
    return None
  counts = Counter(parts)
  if most is not None and len(parts) - len(counts) > most * len(parts):
    return f'over {most:.0%} of {what} are duplicates'
  twice = sum((number - 1) * len(part) for part, number in counts.items())
  if most_characters is not None and twice > most_characters * sum(map(len, parts)):
    return f'over {most_characters:.0%} of characters in duplicate {what}'
  return None


ENDS = ('.', '!', '?', '"', '”', '’', '。', '！', '？', '…', '」', '』')
SENTENCES = re.compile(r'[.!?]["”’)\]]?(?=\s|$)|[。！？…](?![。！？…])')
CITATIONS = re.compile(r'\[(?:\d{1,3}|citation needed|edit|来源请求|編輯|编辑)\]')
POLICIES = ('terms of use', 'privacy policy', 'cookie policy', 'uses cookies', 'use of cookies', 'use cookies',
            '使用条款', '使用條款', '服务条款', '服務條款', '隐私政策', '隱私政策', '隐私权政策', '隱私權政策')


@dataclasses.dataclass(frozen=True)
class Prose:
  """C4's rules: keeps the lines that are sentences, and the pages that have enough of them."""
  line_words: int | None = 5  # least of a line: 8 Chinese characters
  sentences: int | None = 3  # least of a page
  ends: bool = True  # a line must end with a terminal mark
  scripts: bool = True  # lines that say JavaScript go
  policies: bool = True  # and those on terms of use, privacy and cookies
  citations: bool = True  # marks such as [1] go
  placeholder: bool = True  # pages with 'lorem ipsum' go
  braces: bool = True  # and those with '{', as code has
  version: ClassVar = words.VERSION

  def __post_init__(self):
    has_effect(self, *(field.name for field in dataclasses.fields(self)))
    for field in ('line_words', 'sentences'):
      if getattr(self, field) is not None and getattr(self, field) < 1:
        raise ValueError(f'Prose.{field}={getattr(self, field)} must be at least 1; None turns it off')

  @property
  def name(self) -> str:
    return 'prose'

  def __call__(self, text: str) -> str | Rejected:
    if self.placeholder and 'lorem ipsum' in text.lower():
      return Rejected('lorem ipsum')
    if self.braces and '{' in text:
      return Rejected('curly bracket')
    if self.citations and '[' in text:
      text = CITATIONS.sub('', text)
    lines = text.split('\n')
    kept = list(filter(self._is_prose, lines))
    result = text if len(kept) == len(lines) else '\n'.join(kept)
    if self.sentences is not None:
      number = sum(1 for _, _ in zip(SENTENCES.finditer(result), range(self.sentences)))
      if number < self.sentences:
        return Rejected(f'fewer than {self.sentences} sentences')
    return result

  def _is_prose(self, line):
    line = line.strip()
    if self.ends and not line.endswith(ENDS):
      return False
    if self.line_words is not None and words.number_of_words(line) < self.line_words:
      return False
    if self.scripts or self.policies:
      low = line.lower()
      return not (self.scripts and 'javascript' in low) and not (self.policies and any(p in low for p in POLICIES))
    return True


def shares(config, *fields: str):
  """ValueError unless each of these fields is None or a share between 0 and 1."""
  for field in fields:
    value = getattr(config, field)
    if value is not None and not 0 <= value <= 1:
      raise ValueError(f'{type(config).__name__}.{field}={value} must be a share between 0 and 1; None turns it off')


def has_effect(config, *fields: str):
  """ValueError if all of these fields are off."""
  if not any(getattr(config, field) not in (None, False, ()) for field in fields):
    raise ValueError(f'{type(config).__name__} has no effect: {", ".join(fields)} are all off')
