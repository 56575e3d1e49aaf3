"""Language identification: which language a text is in, and how sure that is.

The model is py3langid's (a naive Bayes classifier over byte n-grams, Lui and Baldwin 2012), which comes
with its package. It tells Mandarin, Cantonese, Wu and others apart; written Chinese is one language here,
and their probabilities are added. A long text is judged by a sample.
"""
import dataclasses
import functools
import re
from typing import ClassVar

from lmlib.data.cleaning import Rejected

SAMPLES = 4  # pieces of a long text, evenly spread: the beginning of a page is often a menu
CHINESE = frozenset({'zh', 'yue', 'wuu', 'gan', 'hak', 'lzh', 'cdo', 'nan'})
NO_LETTER = re.compile(r'[\W\d_]+')


@dataclasses.dataclass(frozen=True)
class Language:
  """Keeps texts that are in one of `languages` (ISO 639 codes: 'zh', 'en') with enough confidence."""
  languages: tuple[str, ...]
  confidence: float = 0.65  # least probability; FineWeb's threshold (Penedo et al. 2024)
  characters: int = 4000  # looked at, at most
  libraries: ClassVar = ('py3langid',)
  version: ClassVar = 1

  def __post_init__(self):
    if not 0 <= self.confidence <= 1:
      raise ValueError(f'Language.confidence={self.confidence} must lie between 0 and 1')
    if self.characters < SAMPLES:
      raise ValueError(f'Language.characters={self.characters} must be at least {SAMPLES}')
    if not self.languages or isinstance(self.languages, str):
      raise ValueError(f"Language.languages={self.languages!r} must be codes of languages, such as ('zh', 'en')")
    if unknown := set(self.languages) - set(codes()):
      raise ValueError(f'Language.languages: {", ".join(sorted(unknown))} unknown; known: {" ".join(codes())}')

  @property
  def name(self) -> str:
    return 'language'

  def __call__(self, text: str) -> str | Rejected:
    language, confidence = identified(text, characters=self.characters)
    if language not in self.languages:
      return Rejected('other language', language)
    return text if confidence >= self.confidence else Rejected(f'confidence under {self.confidence}', language)


def identified(text: str, *, characters: int = 4000) -> tuple[str, float]:
  """(ISO 639 code, probability) of the likeliest language; 'zxx', no language, for text without letters."""
  sample = sampled(text, characters)
  if not NO_LETTER.sub('', sample):
    return 'zxx', 1.0
  found = {}
  for code, probability in _identifier().rank(sample):
    code = 'zh' if code in CHINESE else code
    found[code] = found.get(code, 0.0) + probability
  language = max(found, key=found.get)
  return language, min(1.0, float(found[language]))


def sampled(text: str, characters: int) -> str:
  """At most so many characters of a text: all, or pieces from its beginning to its end."""
  if len(text) <= characters:
    return text
  length = characters // SAMPLES
  return '\n'.join(text[start:start + length]
                   for start in (i * (len(text) - length) // (SAMPLES - 1) for i in range(SAMPLES)))


@functools.cache
def codes() -> tuple[str, ...]:
  """The ISO 639 codes of the languages that can be told apart."""
  return tuple(sorted({'zh' if code in CHINESE else code for code in _identifier().labels}))


@functools.cache
def _identifier():
  from py3langid.langid import MODEL_FILE, LanguageIdentifier
  return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
