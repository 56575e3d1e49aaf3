"""How finely a tokeniser cuts text, language by language: one that knows a language badly makes it long and dear.

Fertility is tokens per word (Rust et al. 2021). Scripts without spaces between words, such as Chinese, have
tokens per character alone.
"""
import collections
from collections.abc import Iterable, Mapping
import dataclasses
import re

import numpy as np

from lmlib.data.languages import identified
from lmlib.data.store import Store
from lmlib.data.tokenizer import Tokenizer

RARE = 0.02  # share of the documents below which a language has no row of its own
WORD = re.compile(r'\w+')
# Han with its extensions, kana, Thai, Lao, Burmese, Khmer: written without spaces between words.
UNSPACED = re.compile('[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff'
                      '\U00020000-\U0003ffff]')


@dataclasses.dataclass(frozen=True)
class Fertility:
  """Counts over the texts of one language. `words` is None where most letters belong to an unspaced script."""
  language: str
  documents: int
  bytes: int
  characters: int
  words: int | None
  tokens: int
  partial: int  # tokens that are a part of a character: it has no piece of its own

  @property
  def tokens_per_character(self) -> float:
    return self.tokens / self.characters

  @property
  def tokens_per_word(self) -> float | None:
    return None if not self.words else self.tokens / self.words

  @property
  def bytes_per_token(self) -> float:
    return self.bytes / self.tokens


def fertility(tokenizer: Tokenizer, texts: Mapping[str, Iterable[str]]) -> tuple[Fertility, ...]:
  """One row a language of `texts`, in the order given. ValueError if one holds no character."""
  rows, partial = [], np.array([not whole(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab)])
  for language, given in texts.items():
    documents = size = characters = words = letters = unspaced = tokens = cut = 0
    for text in given:
      ids = tokenizer.encode(text)
      documents, tokens, cut = documents + 1, tokens + len(ids), cut + int(partial[ids].sum())
      size, characters = size + len(text.encode()), characters + len(text)
      found = WORD.findall(text)
      words, letters = words + len(found), letters + sum(map(len, found))
      unspaced += len(UNSPACED.findall(text))
    if not tokens:
      raise ValueError(f'texts[{language!r}] holds no character in {documents} documents')
    rows.append(Fertility(language, documents, size, characters, None if 2 * unspaced > letters else words,
                          tokens, cut))
  return tuple(rows)


def of_store(store: Store, documents: int = 256) -> tuple[Fertility, ...]:
  """The fertility in each language of a store's texts, judged by at most `documents` of them, evenly spread.

  Languages are identified (languages.py); the rare ones, under RARE of the documents each, count together as 'other'.
  """
  many = min(documents, store.documents)
  texts = [store.text(i * store.documents // many) for i in range(many)]
  codes = [identified(text)[0] for text in texts]
  counts = collections.Counter(codes)
  groups = {code: [] for code, count in counts.most_common() if count >= RARE * many} | {'other': []}
  for code, text in zip(codes, texts):
    groups.get(code, groups['other']).append(text)
  return fertility(store.tokenizer, {code: group for code, group in groups.items() if group})


def whole(raw: bytes) -> bool:
  """Whether bytes are whole characters."""
  try:
    raw.decode()
  except UnicodeDecodeError:
    return False
  return True


def table(rows: Iterable[Fertility]) -> str:
  """The rows for a terminal."""
  lines = [f'{"language":<12}{"documents":>10}{"MB":>9}{"tokens":>12}{"tokens/char":>13}{"tokens/word":>13}'
           f'{"bytes/token":>13}{"in parts":>10}']
  for row in rows:
    word = '-' if row.tokens_per_word is None else f'{row.tokens_per_word:.3f}'
    lines.append(f'{row.language:<12}{row.documents:>10,}{row.bytes / 1e6:>9.2f}{row.tokens:>12,}'
                 f'{row.tokens_per_character:>13.3f}{word:>13}{row.bytes_per_token:>13.2f}'
                 f'{row.partial / row.tokens:>10.1%}')
  return '\n'.join(lines)
