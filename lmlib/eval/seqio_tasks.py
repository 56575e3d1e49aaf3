"""Tasks and mixtures of seqio (Roberts et al. 2022) by their own metrics, through seqio.Evaluator, with lmlib's models.

What a metric function of a task takes says what the model does: of `predictions` it writes behind the inputs, of
`scores` it says how likely the targets are, in nats, token for token as the task has them. A decoder reads what begins
a document, then the inputs, without an eos at their end, which would be the document's. seqio and TensorFlow are
loaded by check() and run(), not with this module.
"""
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math

from lmlib.data import tasks
from lmlib.data.tokenizer import Tokenizer
from lmlib.data.vocabulary import load_quietly
from lmlib.eval.candidate import Candidate
from lmlib.eval.loglikelihood import Likelihood, Request
from lmlib.eval.scoreboard import Result

INPUTS, TARGETS = 'inputs', 'targets'
Write = Callable[[list[list[int]]], Sequence[str]]  # a text behind each row of tokens, as Writer.behind
Likelihoods = Callable[[list[Request]], Sequence[Likelihood]]  # as loglikelihood.score of a model


@dataclasses.dataclass(frozen=True)
class Score:
  """The metrics of each task by name, and how many examples each has."""
  metrics: Mapping[str, Mapping[str, float]]
  examples: Mapping[str, int]
  cut: int = 0  # examples whose inputs did not fit before their targets, so that the front was left out

  def figures(self) -> dict:
    """What a report writes down."""
    return {'tasks': {name: dict(found) for name, found in self.metrics.items()}, 'examples': dict(self.examples),
            'cut': self.cut}


@dataclasses.dataclass(frozen=True)
class SeqioTask:
  """The evaluation: a registered task, or the tasks of a mixture."""
  task: str
  split: str = 'validation'
  module: str | None = None  # imported first: it registers the task
  limit: int | None = None  # examples of each task, the first; None: all
  lower_is_better: tuple[str, ...] = ()  # metrics of which that is so; seqio does not say
  new: int = 64  # tokens of a prediction, at most
  batch: int = 16
  name: str = 'seqio'

  def check(self):
    """ValueError for settings that cannot be, no such task or split, or one without metrics or targets."""
    for name in ('limit', 'new', 'batch'):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise ValueError(f'SeqioTask.{name}={getattr(self, name)} must be at least 1')
    self._checked()

  def run(self, candidate: Candidate) -> list[Result]:
    """Of a candidate, by greedy decoding: the task's own metrics, which stand alone.

    Of inputs that do not fit the end is read; how often, of all examples, is the fact `cut` of each.
    """
    room, cut = candidate.config.length - self.new, []

    def write(rows):
      cut.extend(row for row in rows if len(row) > room)
      return candidate.texts(rows, new=self.new, batch=self.batch)

    found = self.score(candidate.tokenizer, write, lambda asked: candidate.likelihoods(asked, batch=self.batch))
    return [Result(candidate.name, task, metric, (), alone=value, higher_is_better=metric not in self.lower_is_better,
                   facts={'examples': found.examples[task], 'cut': found.cut + len(cut)})
            for task, metrics in found.metrics.items() for metric, value in metrics.items()]

  def score(self, tokenizer: Tokenizer, write: Write, likelihoods: Likelihoods) -> Score:
    """The metrics of a model. ValueError as check() has it, and for a vocabulary that is not of this tokeniser."""
    for task in self._checked():
      for name in {INPUTS, TARGETS} & task.output_features.keys():
        vocabulary = task.output_features[name].vocabulary
        mine = getattr(getattr(vocabulary, 'tokenizer', None), 'fingerprint', None)
        if mine != tokenizer.fingerprint:
          raise ValueError(f'{task.name}: the vocabulary of {name!r} is {type(vocabulary).__name__}, and not that of '
                           "the model's tokenizer: register the task with data/vocabulary.py's of it")
    import seqio
    evaluator = seqio.Evaluator(self.task, _as_it_is(), self.split, num_examples=self.limit, shuffle=False,
                                async_compute_metrics=False)
    vocabulary = evaluator.eval_tasks[0].output_features[TARGETS].vocabulary
    cut = []

    def predict(dataset):
      rows = list(_rows(dataset, tokenizer, vocabulary))
      found = [vocabulary.encode(text) for text in write([prompt for _, prompt, _ in rows])]
      most = max(map(len, found))  # seqio makes one array of them; id 0 is padding
      return [(i, ids + [0] * (most - len(ids))) for (i, *_), ids in zip(rows, found, strict=True)]

    def score(dataset):
      rows = list(_rows(dataset, tokenizer, vocabulary))
      found = likelihoods([Request(tuple(prompt), tuple(targets)) for _, prompt, targets in rows])
      cut.extend(i for (i, *_), one in zip(rows, found) if one.cut)
      return [(i, one.logp) for (i, *_), one in zip(rows, found, strict=True)]

    future, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict, score_fn=score)
    sizes = {name: int(found.cardinality()) for name, found in evaluator.cached_task_datasets.items()}
    return Score({name: _numbers(name, found) for name, found in future.result().items()}, sizes, len(cut))

  def _checked(self) -> list:
    """The tasks with metrics."""
    try:
      tasks.Seqio(self.task, self.split, self.module).parts()
    except ValueError as error:
      named = str(error).replace('Seqio.name', 'SeqioTask.task').replace('Seqio.split', 'SeqioTask.split')
      raise ValueError(named.replace('Seqio.module', 'SeqioTask.module')) from error
    load_quietly()
    import seqio
    found = [task for task in seqio.get_subtasks(seqio.get_mixture_or_task(self.task)) if task.metric_objs]
    if not found:
      raise ValueError(f'SeqioTask.task={self.task!r} has no metric_fns: there is nothing to evaluate')
    if without := [task.name for task in found if TARGETS not in task.output_features]:
      raise ValueError(f'{without[0]} has no feature {TARGETS!r}, but {", ".join(found[0].output_features)}')
    return found


def _rows(dataset, tokenizer: Tokenizer, vocabulary):
  """(number, tokens to read, tokens of the targets) of each example, by the model's ids."""
  before = [tokenizer.bos] if tokenizer.starts else []
  for number, example in dataset.as_numpy_iterator():
    ours = lambda name, example=example: [int(i) - vocabulary.shift for i in example[name]]
    inputs = ours(INPUTS) if INPUTS in example else []
    if inputs and 'eos' in tokenizer.marks and inputs[-1] == tokenizer.eos:
      inputs = inputs[:-1]
    targets = ours(TARGETS)
    if not targets:
      raise ValueError(f'example {number} has empty targets: there is nothing to score')
    yield int(number), before + inputs or [tokenizer.eos], targets


def _numbers(name: str, found: Mapping) -> dict[str, float]:
  """Metrics that are numbers. ValueError, naming the task, for one that is none."""
  try:
    values = {key: float(getattr(value, 'value', value)) for key, value in found.items()}
  except (TypeError, ValueError) as error:
    raise ValueError(f'{name}: a metric is no number: {error}') from error
  if odd := [key for key, value in values.items() if not math.isfinite(value)]:
    raise ValueError(f'{name}: the metric {odd[0]!r} is {values[odd[0]]}')
  return values


@functools.cache
def _as_it_is():
  """A feature converter that changes nothing: rows keep their lengths, and texts."""
  import seqio
  return type('AsItIs', (seqio.PassThroughFeatureConverter,), {'TASK_FEATURES': {}, 'pack': False})()
