"""Decontamination: texts that share an n-gram with an example of an evaluation set are dropped.

As in GPT-3 (Brown et al. 2020, appendix C), n-grams are of 13 words, without case and punctuation; here a
Han character counts as 5/8 of a word, which makes 21 Chinese characters. An example of fewer words, but at
least `shortest`, is looked for whole. Differs from GPT-3 in that the whole text is dropped rather than 200
characters around the n-gram, and that no n-gram is excused for being frequent: raise `matches` for sets
whose examples share a wording. The report names the set and the example.
"""
from collections import Counter
import dataclasses
import functools
import hashlib
from typing import ClassVar

import numpy as np

from lmlib.data import words
from lmlib.data.cleaning import Rejected
from lmlib.data.sources import TextFiles


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
  """Examples of a named evaluation set: given as texts, or read from files of JSON lines or of text.

  The files are those of a Hugging Face data set on disk, one example a line, of which each of `fields` is
  text: glob='gsm8k/test*.jsonl', fields=('question', 'answer').
  """
  name: str
  texts: tuple[str, ...] = ()
  glob: str | tuple[str, ...] | None = None
  fields: tuple[str, ...] = ()

  def __post_init__(self):
    if bool(self.texts) == bool(self.glob):
      raise ValueError(f'EvaluationSet {self.name!r}: either texts or glob={self.glob!r} must be given')
    if self.fields and not self.glob:
      raise ValueError(f'EvaluationSet {self.name!r}: fields={self.fields} has no effect without glob')

  @functools.cached_property
  def examples(self) -> tuple[tuple[str, str], ...]:
    """(name, text) of each, a field of a line on its own. ValueError, naming file and line, if one is no text."""
    if self.texts:
      return tuple((str(i), text) for i, text in enumerate(self.texts))
    return tuple((document.name, document.text) for field in self.fields or (None,)
                 for document in TextFiles(self.glob, field=field).documents())


@dataclasses.dataclass(frozen=True)
class Decontamination:
  """Drops texts that hold n-grams of an evaluation example."""
  sets: tuple[EvaluationSet, ...]
  ngram: int = 13  # words
  shortest: int = 8  # words of a shorter example that is looked for whole; those with fewer are not: see unseen()
  matches: int = 1  # different n-grams of one example that a text must hold
  version: ClassVar = words.VERSION

  def __post_init__(self):
    if not self.sets:
      raise ValueError('Decontamination.sets=() names no evaluation set')
    names = [each.name for each in self.sets]
    if len({*names}) < len(names):
      raise ValueError(f'Decontamination.sets: two have one name: {names}')
    if not 1 <= self.shortest <= self.ngram:
      raise ValueError(f'Decontamination.shortest={self.shortest} must lie between 1 and ngram={self.ngram}')
    if self.matches < 1:
      raise ValueError(f'Decontamination.matches={self.matches} must be at least 1')

  @property
  def name(self) -> str:
    return 'decontamination'

  @property
  def settings(self):
    texts = [[each.name, [hashlib.sha256(text.encode()).hexdigest() for _, text in each.examples]]
             for each in self.sets]
    return {'sets': texts, 'ngram': self.ngram, 'shortest': self.shortest, 'matches': self.matches}

  def unseen(self) -> tuple[tuple[str, str], ...]:
    """(set, example) of the examples that are too short to be looked for."""
    return self._index[2]

  def __call__(self, text: str) -> str | Rejected:
    found = self.found(text)
    if not found:
      return text
    name, example = min(found, key=lambda key: (-found[key], key))
    return Rejected(f'holds {name}', example)

  def found(self, text: str) -> dict[tuple[str, str], int]:
    """How many n-grams of each example a text holds, of those with enough: by (set, example)."""
    tables, owners, _ = self._index
    spread, hits = words.words(text), Counter()
    for length, (table, owner) in tables.items():
      hashes = (words.ngrams(spread, self.ngram)[0] if length is None else
                words.spans(spread.hashes, np.arange(length, len(spread.hashes) + 1)))
      if not len(hashes):
        continue
      for value in np.unique(hashes[words.member(hashes, table)]):
        low, high = np.searchsorted(table, value), np.searchsorted(table, value, 'right')
        # An example that is looked for whole has one n-gram: that is all of it.
        hits.update({int(i): 1 if length is None else self.matches for i in owner[low:high]})
    return {owners[i]: number for i, number in hits.items() if number >= self.matches}

  @functools.cached_property
  def _index(self):
    """By number of words (None: n-grams) sorted hashes and each one's example; names of examples; the unseen."""
    grams, owners, unseen = {}, {}, []
    for each in self.sets:
      for name, text in each.examples:
        found = words.words(text)
        hashes, length = words.ngrams(found, self.ngram)[0], None
        if not len(hashes):
          length = len(found.hashes)
          if found.number < self.shortest:
            unseen.append((each.name, name))
            continue
          hashes = words.spans(found.hashes, np.array([length]))
        distinct = np.unique(hashes)
        number = owners.setdefault((each.name, name), len(owners))
        grams.setdefault(length, []).append((distinct, np.full(len(distinct), number)))
    if not owners:
      raise ValueError(f'Decontamination.shortest={self.shortest}: all examples of '
                       f'{", ".join(each.name for each in self.sets)} are shorter')
    tables = {}
    for length, pairs in grams.items():
      hashes, owner = map(np.concatenate, zip(*pairs))
      order = np.argsort(hashes, kind='stable')
      tables[length] = hashes[order], owner[order]
    return tables, list(owners), tuple(unseen)
