"""Running evaluations: what is wrong is said first, what was answered before is not asked again.

An evaluation is described in evaluations.py; anything else with the same three parts will do.
"""
from collections.abc import Callable, Sequence
import json
import pathlib
import time
from typing import Protocol

from lmlib import processes
from lmlib.data.tokenizer import Tokenizer
from lmlib.eval.candidate import Candidate
from lmlib.eval.scoreboard import Result
from lmlib.models import protocol
from lmlib.train import metrics


class Evaluation(Protocol):
  """What run() needs of one."""
  name: str

  def check(self) -> None:
    """ValueError for what can be known to be wrong before a model is loaded."""

  def run(self, candidate: Candidate) -> list[Result]:
    """What the candidate reaches."""


def check_during(evaluations: Sequence[Evaluation], every: int | None):
  """check(), of a run that may have none. ValueError if it has some and not a number of steps, or the reverse."""
  if bool(evaluations) != (every is not None):
    raise ValueError(f'evaluate_every={every} and {len(evaluations)} evaluations: both or neither')
  if evaluations:
    check(evaluations)


def check(evaluations: Sequence[Evaluation]):
  """ValueError if there are none, two have one name, one of them finds a fault, or a package is missing."""
  names = [one.name for one in evaluations]
  if not names:
    raise ValueError('evaluations=() names none')
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise ValueError(f'two evaluations have name={twice[0]!r}: give each its own')
  for one in evaluations:
    try:
      one.check()
    except ModuleNotFoundError as error:
      raise ValueError(str(error)) from error


def run(evaluations: Sequence[Evaluation], candidate: Candidate, *, say: Callable[[str], None] = print) -> list[Result]:
  """The results of all; says of each its scores, how many answers were known from before, and how long it took."""
  found = []
  for one in evaluations:
    candidate.answers.count()
    start = time.perf_counter()
    mine = one.run(candidate)
    repeated, new = candidate.answers.count()
    known = f'{new:,} answers' + (f' and {repeated:,} known from before' if repeated else '')
    say(f'{one.name:<10}  {candidate.name}: ' + ', '.join(_said(result) for result in mine[:6]) +
        f' ({known}; {time.perf_counter() - start:.1f} s)')
    found += mine
  return found


def during(evaluations: Sequence[Evaluation], config: protocol.Config, tokenizer: Tokenizer, folder: pathlib.Path, *,
           say: Callable[[str], None] = print) -> Callable:
  """A function of (params, step) that runs evaluations on a model in training, for loop.train.

  It returns {'<evaluation>/<task>/<metric>': score} and appends a line to evaluations.jsonl. What that file has of a
  step is not done again: a run that is resumed repeats its steps bit for bit. ValueError as Candidate.
  """
  Candidate('in training', config, None, tokenizer)
  path = folder / 'evaluations.jsonl'
  names = sorted(one.name for one in evaluations)

  def evaluate(params, step: int) -> dict[str, float]:
    known = lambda: next((line['scores'] for line in metrics.read(path)
                          if line['step'] == step and line['evaluations'] == names), None)
    if (scores := processes.told('evaluations.jsonl', known)) is not None:
      return scores
    start = time.perf_counter()
    candidate = Candidate(f'step {step}', config, params, tokenizer)
    scores = {}
    for one in evaluations:
      scores |= {'/'.join(dict.fromkeys([one.name, result.task, result.metric])): result.score
                 for result in one.run(candidate)}
    scores = processes.told('scores', lambda: scores)
    line = {'step': step, 'evaluations': names, 'scores': scores, 'seconds': time.perf_counter() - start}
    if processes.first():
      metrics.append(path, line)
    say(f'step {step}  ' + '  '.join(f'{name} {score:.4g}' for name, score in scores.items()) +
        f'  ({line["seconds"]:.1f} s)')
    return scores

  return evaluate


def summary(results: Sequence[Result]) -> str:
  """One line of JSON: of each task and metric the score of every model."""
  found: dict[str, dict] = {}
  for one in results:
    found.setdefault(one.task, {}).setdefault(one.metric, {})[one.model] = one.score
  return json.dumps(metrics.finite(found), ensure_ascii=False)


def _said(result: Result) -> str:
  spread = result.interval
  score = f'{result.score:.4g}' if spread is None else str(spread)
  return f'{result.task} {result.metric} {score}'
