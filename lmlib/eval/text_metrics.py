"""How close texts are to their references: BLEU, chrF, ROUGE by the libraries that keep them; exact match and F1.

BLEU (Papineni et al. 2002) and chrF (Popović 2015) are sacrebleu's (Post 2018), of a whole corpus, 0 to 100; ROUGE
(Lin 2004) is rouge-score's, the mean over texts, 0 to 1, as are exact match and F1 (Rajpurkar et al. 2016, SQuAD).
"""
from collections import Counter
from collections.abc import Sequence
import re
import string
import unicodedata

LANGUAGES = ('en', 'zh')
ROUGE = ('rouge1', 'rouge2', 'rougeL')
HAN = '\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff'


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]], *, language: str = 'en') -> dict:
  """Corpus BLEU: 'bleu' and the 'signature' that says how it was computed. references: one or more of each text.

  Chinese is cut into characters by sacrebleu's tokeniser 'zh', other languages by '13a'.
  """
  _check(texts, references, language)
  return _sacrebleu(texts, references, 'BLEU', tokenize='zh' if language == 'zh' else '13a')


def chrf(texts: Sequence[str], references: Sequence[Sequence[str]], *, words: int = 0) -> dict:
  """Corpus chrF, of character n-grams up to 6: 'chrf' and the 'signature'. words=2: chrF++, 'chrf++'."""
  _check(texts, references)
  return _sacrebleu(texts, references, 'CHRF', word_order=words)


def rouge(texts: Sequence[str], references: Sequence[Sequence[str]], *, language: str = 'en',
          stemmed: bool = False) -> dict:
  """F-measures 'rouge1', 'rouge2' and 'rougeL': of each text with its best reference, the mean over texts.

  In Chinese a token is one Chinese character, or a run of other letters and digits; ROUGE's own tokeniser would drop
  all Chinese. stemmed: English words lose their endings (Porter); ValueError in another language.
  """
  _check(texts, references, language)
  if stemmed and language != 'en':
    raise ValueError(f"stemmed={stemmed} is of English: it has no effect with language={language!r}")
  rouge_scorer = _imported('rouge_score.rouge_scorer')
  scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=stemmed, tokenizer=_Characters() if language == 'zh' else None)
  found = [scorer.score_multi(list(given), text) for text, given in zip(texts, references)]
  return {name: sum(one[name].fmeasure for one in found) / len(found) for name in ROUGE}


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]], *, language: str = 'en') -> float:
  """The share of texts that equal one of their references, both normalised."""
  _check(texts, references, language)
  return _mean(float(any(normalised(text, language) == normalised(one, language) for one in given))
               for text, given in zip(texts, references))


def f1(texts: Sequence[str], references: Sequence[Sequence[str]], *, language: str = 'en') -> float:
  """The mean over texts of the F1 of tokens shared with the best of their references, both normalised.

  A token is a word, in Chinese a character.
  """
  _check(texts, references, language)
  return _mean(max(overlap(text, one, language) for one in given) for text, given in zip(texts, references))


def overlap(text: str, reference: str, language: str = 'en') -> float:
  """F1 of the tokens of two normalised texts, each as often as it comes; 1 if both have none."""
  mine, theirs = (_tokens(normalised(one, language), language) for one in (text, reference))
  if not mine or not theirs:
    return float(mine == theirs)
  shared = (Counter(mine) & Counter(theirs)).total()
  return 2 * shared / (len(mine) + len(theirs))


def normalised(text: str, language: str = 'en') -> str:
  """An answer without what does not matter: SQuAD's rules, lower case, no punctuation, no articles, single spaces.

  SQuAD knows ASCII punctuation; of Chinese (as CMRC, Cui et al. 2019) all punctuation goes, spaces too, and letters
  and digits of full width become plain ones.
  """
  if language == 'zh':
    text = unicodedata.normalize('NFKC', text).lower()
    return ''.join(c for c in text if unicodedata.category(c)[0] not in 'PSZC')
  text = ''.join(c for c in text.lower() if c not in string.punctuation)
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


class _Characters:
  """The tokens of Chinese text, in the form of rouge-score's tokenisers."""

  def tokenize(self, text: str) -> list[str]:
    return _tokens(unicodedata.normalize('NFKC', text).lower(), 'zh')


def _tokens(text: str, language: str) -> list[str]:
  return re.findall(f'[{HAN}]|[^\\W{HAN}]+', text) if language == 'zh' else text.split()


def _sacrebleu(texts, references, name: str, **settings) -> dict:
  metrics = _imported('sacrebleu.metrics')
  if any(not given for given in references):
    raise ValueError('a text has no reference')
  most = max(map(len, references))
  columns = [[given[n] if n < len(given) else None for given in references] for n in range(most)]
  metric = getattr(metrics, name)(**settings)
  found = metric.corpus_score(list(texts), columns)
  key = {'BLEU': 'bleu', 'chrF2': 'chrf', 'chrF2++': 'chrf++'}[found.name]
  return {key: found.score, 'signature': str(metric.get_signature())}


def _imported(module: str):
  import importlib
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"this metric needs {error.name}: pip install 'lmlib[eval]'") from error


def check_language(language: str):
  """ValueError for a language whose tokens are not known here."""
  if language not in LANGUAGES:
    raise ValueError(f'language={language!r} must be one of {", ".join(LANGUAGES)}')


def _check(texts, references, language: str = 'en'):
  check_language(language)
  if not texts or len(texts) != len(references):
    raise ValueError(f'{len(texts)} texts and {len(references)} sets of references: there must be as many, and some')
  for given in references:
    if isinstance(given, str) or not given:
      raise ValueError(f'the references of a text are a list of texts, at least one, not {given!r}')


def _mean(values) -> float:
  found = list(values)
  return sum(found) / len(found)
