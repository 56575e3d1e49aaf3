"""Questions with short answers that every machine can make: a small honest set to show what tuning does.

  names       the first line of a docstring of Python's standard library -> the name of the function
  sums        two numbers up to 99, added or subtracted -> the result
  characters  a letter -> its name in Unicode

The question says in which form to answer, so that a model which is not tuned has a fair chance. None repeats.
"""
import ast
from collections.abc import Iterator
import dataclasses
import pathlib
import unicodedata

import numpy as np

from lmlib.data import order
from lmlib.data.sources import StandardLibrary

NAMES = ('Which function of Python\'s standard library has this description? Answer with its name alone.\n\n{}')
SUMS = 'What is {} {} {}? Answer with the number alone.'
CHARACTERS = 'What is the name of the character {} in Unicode? Answer with the name alone, in capital letters.'
LETTERS = ((0xc0, 0x250), (0x370, 0x400), (0x400, 0x530), (0x1e00, 0x1f00))  # Latin, Greek, Cyrillic, more of Latin
LONGEST = 200  # characters of a line of a docstring
KINDS = ('names', 'sums', 'characters')


@dataclasses.dataclass(frozen=True)
class Questions:
  """The source of at most `each` questions of every kind, the same ones for the same Python and seed."""
  kinds: tuple[str, ...] = KINDS
  each: int = 400
  seed: int = 0

  def __post_init__(self):
    for kind in self.kinds:
      if kind not in KINDS:
        raise ValueError(f'Questions.kinds names {kind!r}, none of {", ".join(KINDS)}')
    if not self.kinds or len(set(self.kinds)) != len(self.kinds):
      raise ValueError(f'Questions.kinds={self.kinds} names none, or one twice')
    if self.each < 2:
      raise ValueError(f'Questions.each={self.each} must be at least 2')

  def records(self) -> Iterator[tuple[str, dict]]:
    """(where, record of messages), where 'sums 17' is the seventeenth sum; `kind` says which one it is."""
    for kind in self.kinds:
      pairs = {'names': names, 'sums': sums, 'characters': characters}[kind]()
      chosen = order.permute(np.arange(len(pairs)), len(pairs), seed=self.seed, epoch=kind)[:self.each]
      for number, i in enumerate(chosen.tolist(), 1):
        question, answer = pairs[i]
        yield f'{kind} {number}', {'kind': kind, 'messages': [{'role': 'user', 'content': question},
                                                              {'role': 'assistant', 'content': answer}]}


def names() -> list[tuple[str, str]]:
  """First lines of docstrings of public functions and methods, where they say one name only."""
  found, source = {}, StandardLibrary()
  for name in source.parts():
    if '/' in name or not name.endswith('.py'):
      continue
    try:
      tree = ast.parse((pathlib.Path(source.root) / name).read_bytes())
    except (SyntaxError, ValueError, OSError):
      continue
    for node in ast.walk(tree):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith('_'):
        line = ((ast.get_docstring(node) or '').strip().splitlines() or [''])[0].strip()
        if 10 <= len(line) <= LONGEST:
          found.setdefault(line, set()).add(node.name)
  return [(NAMES.format(line), *said) for line, said in sorted(found.items()) if len(said) == 1]


def sums() -> list[tuple[str, str]]:
  """All of numbers from 1 to 99; differences of a larger and a smaller one."""
  found = [(SUMS.format(a, '+', b), str(a + b)) for a in range(1, 100) for b in range(1, 100)]
  return found + [(SUMS.format(a, '-', b), str(a - b)) for a in range(1, 100) for b in range(1, a)]


def characters() -> list[tuple[str, str]]:
  """Letters of LETTERS that have a name."""
  places = [chr(i) for start, stop in LETTERS for i in range(start, stop)]
  return [(CHARACTERS.format(c), unicodedata.name(c)) for c in places
          if unicodedata.category(c) in ('Lu', 'Ll') and unicodedata.name(c, '')]
