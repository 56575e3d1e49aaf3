"""Classifiers of texts in Hugging Face's form: BERT, RoBERTa and XLM-RoBERTa `ForSequenceClassification`."""
from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from lmlib.data.wordpiece import WordPiece
from lmlib.interop import hf
from lmlib.interop.folder import inside
from lmlib.models import protocol
from lmlib.serve.classify import classify

TOKENIZER = 'tokenizer.json'
KINDS = ('single_label_classification', 'multi_label_classification')


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A model that gives texts the probabilities of classes, as a folder holds it."""
  config: protocol.Config
  params: Any
  tokenizer: WordPiece
  labels: tuple[str, ...]
  several: bool = False  # whether a text may be of several classes, or of none

  def probabilities(self, texts: Sequence[str], *, batch: int = 32, long: str = 'refuse') -> np.ndarray:
    """Of every class in the order of `labels`, one row a text; see WordPiece.rows for `long`."""
    return classify(self.config, self.params, self.tokenizer.rows(list(texts), long=long), several=self.several,
                    batch=batch)

  def probability_of(self, label: str, *, batch: int = 32, long: str = 'refuse') -> Callable[[Sequence[str]], list]:
    """texts -> the probability of one class for each. ValueError for a label that the folder does not name."""
    if label not in self.labels:
      raise ValueError(f'label={label!r} is no class of this classifier, which has {", ".join(self.labels)}')
    place = self.labels.index(label)
    return lambda texts: self.probabilities(texts, batch=batch, long=long)[:, place].tolist()


@dataclasses.dataclass(frozen=True)
class Folder:
  """texts -> the probability of one class for each, by the classifier of a folder, which is read when first asked."""
  path: str
  label: str
  batch: int = 32
  long: str = 'cut'  # of too long a text the beginning is read; or refuse

  @functools.cached_property
  def _probabilities(self) -> Callable[[Sequence[str]], list]:
    return load(self.path).probability_of(self.label, batch=self.batch, long=self.long)

  def __call__(self, texts: Sequence[str]) -> list[float]:
    return self._probabilities(texts)


def load(path) -> Classifier:
  """The classifier of a folder. ValueError for one that lacks a part, or predicts no classes."""
  folder = pathlib.Path(path).expanduser()
  published = hf.read(folder)
  if (classes := getattr(published.config.ends, 'classes', None)) is None:
    raise ValueError(f'{folder} holds no classifier of texts: config.json says '
                     f'architectures={published.said.get("architectures")}')
  if inside(folder, TOKENIZER) is None:
    raise ValueError(f'{folder} has no {TOKENIZER}')
  kind = published.said.get('problem_type')
  if kind not in (None, *KINDS):
    raise ValueError(f'{folder / hf.CONFIG} says problem_type={kind!r}; known here: {", ".join(KINDS)}')
  tokenizer = WordPiece.load(folder / TOKENIZER, published.config.length)
  if tokenizer.vocab > (vocab := published.config.vocab):
    raise ValueError(f'{folder}: the tokenizer has {tokenizer.vocab} ids, the model embeds vocab={vocab}')
  labels = _labels(published.said.get('id2label'), classes, folder)
  config, params = hf.load(published)
  return Classifier(config, params, tokenizer, labels, kind == KINDS[1] or classes == 1)


def _labels(named, classes: int, folder: pathlib.Path) -> tuple[str, ...]:
  """The names of the classes in their order; LABEL_0 and so on, as transformers has it, where there are none."""
  named = named or {str(i): f'LABEL_{i}' for i in range(classes)}
  if not isinstance(named, dict) or sorted(named) != sorted(map(str, range(classes))):
    raise ValueError(f'{folder / hf.CONFIG}: id2label={named!r} must name the classes 0 to {classes - 1}')
  found = tuple(str(named[str(i)]) for i in range(classes))
  if len(set(found)) < classes:
    raise ValueError(f'{folder / hf.CONFIG}: id2label={named!r} names two classes alike')
  return found
