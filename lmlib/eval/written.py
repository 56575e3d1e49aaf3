"""Questions whose answers a model writes: read from files, asked through templates, judged by stated rules.

Few-shot (Brown et al. 2020), chain of thought (Wei et al. 2022; without examples Kojima et al. 2022) and votes over
several answers (self-consistency, Wang et al. 2023) are prompting.py's; what compares answers, text_metrics.py's.
"""
from collections.abc import Callable, Sequence
import dataclasses
import json
import pathlib

from lmlib.data import files
from lmlib.eval import multiple_choice, prompting, text_metrics
from lmlib.eval.prompting import Shot

METRICS = ('accuracy', 'exact_match', 'f1', 'rougeL', 'bleu', 'chrf')
CORPUS = ('bleu', 'chrf')  # of all texts at once: no mean over questions


@dataclasses.dataclass(frozen=True)
class Question:
  text: str
  references: tuple[str, ...]  # right answers
  group: str = ''  # such as its subject


@dataclasses.dataclass(frozen=True)
class QuestionFile:
  """A .jsonl file (or .jsonl.gz): lines with a 'question', its 'answer' or a list of them, and maybe a 'subject'."""
  path: str

  def questions(self) -> list[Question]:
    """ValueError, naming file and line, for a line of another form."""
    found = []
    for number, record in enumerate(_records(self.path), 1):
      answers = record.get('answer')
      answers = [answers] if isinstance(answers, (str, int, float)) else answers
      if not isinstance(record.get('question'), str) or not answers or not isinstance(answers, list):
        raise ValueError(f"{self.path}, line {number}: a 'question' and an 'answer', or a list of answers, are needed, "
                         f'not {json.dumps(record, ensure_ascii=False)[:120]}')
      found.append(Question(record['question'], tuple(map(str, answers)), str(record.get('subject', ''))))
    return found


@dataclasses.dataclass(frozen=True)
class Choices:
  """Multiple choice with the letters in the question, from a folder as multiple_choice.py reads them."""
  folder: str
  split: str = 'test'
  subjects: tuple[str, ...] | None = None

  def questions(self) -> list[Question]:
    return [Question('\n'.join([one.text, *(f'{letter}. {choice}' for letter, choice in zip(
        multiple_choice.LETTERS, one.choices))]), (multiple_choice.LETTERS[one.answer],), one.subject)
        for one in multiple_choice.read(self.folder, self.split, self.subjects)]


def shots(path: str, count: int) -> list[Shot]:
  """The first `count` examples of a .jsonl file: 'question', 'answer' and, for chains of thought, 'thought'."""
  found = []
  for number, record in enumerate(_records(path), 1):
    if not {'question', 'answer'} <= record.keys():
      raise ValueError(f"{path}, line {number}: an example needs a 'question' and an 'answer', not {sorted(record)}")
    found.append(Shot(str(record['question']), str(record['answer']), str(record.get('thought', ''))))
  if len(found) < count:
    raise ValueError(f'shots={count}, but {path} has {len(found)} examples')
  return found[:count]


def judged(texts: Sequence[str], questions: Sequence[Question], metric: str, *, rules: Sequence[str],
           language: str = 'en', samples: int = 1) -> tuple[list[float], float | None, dict]:
  """(the values of a metric, one a question; or none and the score of all together; facts).

  texts: `samples` of each question, which 'accuracy' votes over; ValueError for other metrics of several.
  """
  references = [one.references for one in questions]
  if metric == 'accuracy':
    found = [prompting.answer(text, rules) for text in texts]
    votes = [prompting.vote(found[i:i + samples]) for i in range(0, len(found), samples)]
    plain = lambda text: prompting.number(text) or text_metrics.normalised(text, language) or text.lower()
    right = [float(one.answer is not None and plain(one.answer) in set(map(plain, given)))
             for one, given in zip(votes, references)]
    return right, None, {'without_answer': sum(one.none for one in votes), 'agreement': _mean([v.share for v in votes])}
  if metric in CORPUS:
    score = {'bleu': lambda: text_metrics.bleu(texts, references, language=language),
             'chrf': lambda: text_metrics.chrf(texts, references)}[metric]()
    return [], score[metric], {'signature': score['signature']}
  one_by_one: Callable = {'exact_match': text_metrics.exact_match, 'f1': text_metrics.f1,
                          'rougeL': lambda *given, **more: text_metrics.rouge(*given, **more)['rougeL']}[metric]
  return [one_by_one([text], [given], language=language) for text, given in zip(texts, references)], None, {}


def _records(path: str):
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise ValueError(f'there is no file {path!r}')
  with files.opened(str(file)) as lines:
    for number, line in enumerate(lines, 1):
      try:
        record = json.loads(line)
      except ValueError as error:
        raise ValueError(f'{path}, line {number}: no JSON: {error}') from None
      if not isinstance(record, dict):
        raise ValueError(f'{path}, line {number}: no JSON object, but {str(record)[:60]!r}')
      yield record


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)
