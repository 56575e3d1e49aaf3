"""Multiple choice as MMLU does it (Hendrycks et al. 2021), and C-Eval (Huang et al. 2023) and CMMLU (Li et al. 2023).

A prompt has the subject and some answered questions of its dev part; the model's choice is the letter, or the text of
a choice, to which it gives the highest likelihood. Questions are read from folders as they are published: CSV files
a subject (<split>/<subject>_<split>.csv, or <split>/<subject>.csv), or Parquet (<subject>/<split>-*.parquet).
"""
from collections.abc import Callable, Sequence
import csv
import dataclasses
import pathlib

import numpy as np

from lmlib.data.tokenizer import Tokenizer
from lmlib.eval import calibration, loglikelihood
from lmlib.eval.prompting import Template
from lmlib.eval.significance import Interval, interval
from lmlib.models import protocol

LETTERS = 'ABCDEFGHIJ'
NORMS = (None, 'tokens', 'bytes', 'characters')


@dataclasses.dataclass(frozen=True)
class Question:
  subject: str
  text: str
  choices: tuple[str, ...]
  answer: int  # which of them is right, from 0


@dataclasses.dataclass(frozen=True)
class Style:
  """How questions are asked and answers compared."""
  template: Template = Template('mmlu')  # or ceval, cmmlu
  shots: int = 5  # answered questions in the prompt; fewer where more do not fit
  answers: str = 'letters'  # that are scored; or 'texts' of the choices
  norm: str | None = None  # what the likelihood of a text is divided by: its tokens, bytes or characters

  def __post_init__(self):
    if self.shots < 0:
      raise ValueError(f'Style.shots={self.shots} must not be negative')
    if self.answers not in ('letters', 'texts'):
      raise ValueError(f"Style.answers={self.answers!r} must be 'letters' or 'texts'")
    if self.norm not in NORMS:
      raise ValueError(f'Style.norm={self.norm!r} must be one of {", ".join(map(repr, NORMS))}')
    if self.norm and self.answers == 'letters':
      raise ValueError(f"Style.norm={self.norm!r} has no effect with answers='letters', which are all of one length")

  def said(self, question: Question) -> list[str]:
    """What may follow the prompt, a text for each choice; behind a letter or a digit it begins with a space."""
    found = LETTERS[:len(question.choices)] if self.answers == 'letters' else question.choices
    colon = self.template.text.rstrip()[-1:]
    return [one if colon == '：' else f' {one}' for one in found]


@dataclasses.dataclass(frozen=True)
class Score:
  """What a model chose, and the probabilities that it gave to the choices of each question."""
  questions: tuple[Question, ...]
  probabilities: tuple[tuple[float, ...], ...]
  shots: tuple[int, ...]  # that each prompt had

  @property
  def chosen(self) -> list[int]:
    return [int(np.argmax(one)) for one in self.probabilities]

  @property
  def right_N(self) -> np.ndarray:
    """1.0 where the choice is right: what significance.compared reads."""
    return np.array([float(one == question.answer) for one, question in zip(self.chosen, self.questions)])

  def subjects(self) -> dict[str, float]:
    """The accuracy of each subject."""
    found: dict[str, list[float]] = {}
    for question, right in zip(self.questions, self.right_N.tolist()):
      found.setdefault(question.subject, []).append(right)
    return {name: sum(one) / len(one) for name, one in sorted(found.items())}

  def accuracy(self) -> Interval:
    """Over all questions, as MMLU reports it, with its bootstrap interval."""
    return interval(self.right_N)

  def figures(self) -> dict:
    """What a report writes down; `macro` is the mean of the subjects (C-Eval)."""
    subjects, found = self.subjects(), self.accuracy()
    confidence = [max(one) for one in self.probabilities]
    return {'accuracy': found.value, 'accuracy_interval': [found.low, found.high],
            'macro': sum(subjects.values()) / len(subjects), 'subjects': subjects, 'questions': len(self.questions),
            'calibration_error': calibration.expected_error(confidence, self.right_N),
            'brier': calibration.brier(self.probabilities, [one.answer for one in self.questions]),
            'fewest_shots': min(self.shots)}


def score(config: protocol.Config, params, tokenizer: Tokenizer, questions: Sequence[Question],
          examples: Sequence[Question], *, style: Style = Style(), batch: int = 16) -> Score:
  """The choices of a model; see answered()."""
  likelihoods = lambda requests: loglikelihood.score(config, params, requests, batch=batch)
  return answered(config, tokenizer, questions, examples, likelihoods, style=style)


def answered(config: protocol.Config, tokenizer: Tokenizer, questions: Sequence[Question],
             examples: Sequence[Question], likelihoods: Callable[[list], list], *, style: Style = Style()) -> Score:
  """The choices that have the highest `likelihoods`, a function of requests as loglikelihood.score answers them.

  examples: of which the first style.shots of the same subject stand in the prompt.
  ValueError if a subject has fewer, or if a question alone does not fit.
  """
  if not questions:
    raise ValueError('there are no questions')
  requests, shots = [], []
  for question in questions:
    given = [one for one in examples if one.subject == question.subject][:style.shots]
    if len(given) < style.shots:
      raise ValueError(f'Style.shots={style.shots}, but {question.subject} has {len(given)} examples')
    asked, number = _asked(config, tokenizer, question, given, style)
    requests += asked
    shots.append(number)
  found = iter(likelihoods(requests))
  probabilities = []
  for question in questions:
    logp = [next(found).logp / _length(text, tokenizer, style.norm) for text in style.said(question)]
    raised = np.exp(np.array(logp) - max(logp))
    probabilities.append(tuple((raised / raised.sum()).tolist()))
  return Score(tuple(questions), tuple(probabilities), tuple(shots))


def _asked(config, tokenizer, question: Question, given, style: Style):
  """The requests of a question, and how many examples their prompt has: as many of the first as fit."""
  for number in range(len(given), -1, -1):
    prompt = style.template.prompt(question, given[:number], subject=question.subject)
    asked = [loglikelihood.request(tokenizer, prompt, text) for text in style.said(question)]
    if all(len(one.context) + len(one.continuation) - 1 <= config.length for one in asked):
      return asked, number
  raise ValueError(f"a question of {question.subject} does not fit in the model's length={config.length}: "
                   f'{question.text[:60]!r}')


def _length(text: str, tokenizer: Tokenizer, norm: str | None) -> int:
  """What a likelihood is divided by; the space before a text does not count, as in the harness' acc_norm."""
  bare = text.removeprefix(' ')
  if norm == 'tokens':
    return len(tokenizer.encode(text, continues=True))
  return 1 if norm is None else max(1, len(bare.encode() if norm == 'bytes' else bare))


def read(folder, split: str, subjects: Sequence[str] | None = None) -> list[Question]:
  """The questions of a split (dev, val, validation, test) of a folder, by subject. None: all subjects.

  ValueError, naming file and line, for a folder, split or subject that is not there and for questions without answer.
  """
  folder = pathlib.Path(folder).expanduser()
  files = {}
  for path in [*folder.rglob('*.csv'), *folder.rglob('*.parquet')]:
    subject = _subject(path, split)
    if subject is not None:
      files.setdefault(subject, []).append(path)
  if not files:
    raise ValueError(f'{folder} has no questions of split={split!r}: neither {split}/<subject>_{split}.csv, nor '
                     f'{split}/<subject>.csv, nor <subject>/{split}-*.parquet')
  if missing := sorted(set(subjects or ()) - files.keys()):
    raise ValueError(f'{folder} has no split={split!r} of {", ".join(missing)}; it has {", ".join(sorted(files))}')
  return [question for subject in sorted(files if subjects is None else set(subjects))
          for path in sorted(files[subject]) for question in _questions(path, subject)]


def _subject(path: pathlib.Path, split: str) -> str | None:
  """The subject of a file of a split; None of other files."""
  if path.suffix == '.parquet':
    return path.parent.name if path.stem.split('-')[0] == split else None
  return path.stem.removesuffix(f'_{split}') if path.parent.name == split else None


def _questions(path: pathlib.Path, subject: str):
  """The questions of a file, MMLU's (no header), C-Eval's, CMMLU's (headers of their own) or Parquet."""
  if path.suffix == '.parquet':
    try:
      from pyarrow import parquet
    except ModuleNotFoundError as error:
      raise ModuleNotFoundError(f"{path} needs pyarrow: pip install 'lmlib[eval]'") from error
    records = parquet.read_table(path).to_pylist()
  else:
    with open(path, encoding='utf-8-sig', newline='') as file:
      rows = list(csv.reader(file))
    header = [name.strip().lower() for name in rows[0]] if rows else []
    records = ([dict(zip(header, row)) for row in rows[1:]] if {'question', 'answer'} <= set(header) else
               [dict(zip(('question', *LETTERS[:len(row) - 2].lower(), 'answer'), row)) for row in rows])
  for number, record in enumerate(records):
    yield _question({key.lower(): value for key, value in record.items()}, subject, f'{path}, question {number}')


def _question(record: dict, subject: str, where: str) -> Question:
  choices = record.get('choices') or [record[letter] for letter in LETTERS.lower() if record.get(letter) is not None]
  answer = record.get('answer')
  if isinstance(answer, str):
    answer = LETTERS.find(answer.strip().upper()) if answer.strip() else None
  if not record.get('question') or len(choices) < 2 or answer is None or not 0 <= answer < len(choices):
    raise ValueError(f'{where} has no question, two choices and an answer among them: it has {record}. '
                     'Splits without answers (the test of C-Eval) cannot be scored here')
  return Question(subject, record['question'].strip(), tuple(str(one).strip() for one in choices), int(answer))
