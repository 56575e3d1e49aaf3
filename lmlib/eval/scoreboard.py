"""One report of several models on several tasks: evaluation.json, and evaluation.md with models side by side.

Of every score that is a mean over questions there is an interval, and of every model but the first the p-value of its
difference from the first on the same questions (significance.py).
"""
from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from lmlib.eval.significance import Comparison, Interval, compared, interval

STAR = 0.05  # a difference with a smaller p-value is starred


@dataclasses.dataclass(frozen=True)
class Result:
  """What one model reached on one task: of each question its value, and its weight if the score is a ratio of sums."""
  model: str
  task: str
  metric: str
  values: tuple[float, ...]  # empty: the score is no mean over questions, see `alone`
  weights: tuple[float, ...] | None = None
  higher_is_better: bool = True
  groups: tuple[str, ...] | None = None  # of each question what it belongs to, such as its subject or source
  confidence: tuple[float, ...] | None = None  # of each question the probability of what was chosen
  alone: float | None = None  # a score that has neither interval nor comparison
  ideal: float | None = None  # the best score, where it is neither the highest nor the lowest; as 0 of a bias
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what else to write down

  def __post_init__(self):
    where, count = f'{self.model} on {self.task}, {self.metric}', len(self.values)
    if bool(count) == (self.alone is not None):
      raise ValueError(f'{where}: a score is of {count} values or alone={self.alone}, one of the two')
    for name in ('weights', 'groups', 'confidence'):
      if (found := getattr(self, name)) is not None and len(found) != count:
        raise ValueError(f'{where}: {len(found)} {name} of {count} values')

  @property
  def score(self) -> float:
    if self.alone is not None:
      return self.alone
    return sum(self.values) / (len(self.values) if self.weights is None else sum(self.weights))

  @property
  def interval(self) -> Interval | None:
    return interval(self.values, self.weights) if self.values else None

  def by_group(self) -> dict[str, float]:
    """The score of each group, by name; empty without groups."""
    sums: dict[str, list[float]] = {}
    for i, name in enumerate(self.groups or ()):
      found = sums.setdefault(name, [0.0, 0.0])
      found[0] += self.values[i]
      found[1] += 1 if self.weights is None else self.weights[i]
    return {name: value / weight for name, (value, weight) in sorted(sums.items())}


def table(results: Sequence[Result]) -> list[dict]:
  """A row for each task and metric, with the interval of each model and its comparison with the first that has one.

  ValueError for two results of the same model, task and metric, or results on different questions.
  """
  rows: dict[tuple[str, str], dict] = {}
  for one in results:
    row = rows.setdefault((one.task, one.metric), {'task': one.task, 'metric': one.metric, 'models': {}, 'first': one})
    where = f'{one.model} on {one.task}, {one.metric}'
    if one.model in row['models']:
      raise ValueError(f'there are two results of {where}')
    first = row['first']
    if len(one.values) != len(first.values) or not _same_weights(one, first):
      raise ValueError(f'{where} has {len(one.values)} questions, {first.model} {len(first.values)} or others: '
                       'models are compared on the same ones')
    other = None if one is first or not one.values else compared(one.values, first.values, weights_N=one.weights)
    row['models'][one.model] = {'result': one, 'interval': one.interval, 'beside_first': other}
  return list(rows.values())


def markdown(results: Sequence[Result]) -> str:
  """The table in Markdown, the best score of a row in bold."""
  models = list(dict.fromkeys(one.model for one in results))
  lines = [f'| task | metric | n | {" | ".join(map(_cell, models))} |', f'|---|---|---|{"---|" * len(models)}']
  for row in table(results):
    first = row['first']
    scores = [one['result'].score for one in row['models'].values()]
    if first.ideal is not None:
      best, up = min(scores, key=lambda score: abs(score - first.ideal)), f'{first.ideal:g} is best'
    else:
      best = max(scores) if first.higher_is_better else min(scores)
      up = 'higher is better' if first.higher_is_better else 'lower is better'
    cells = [_score(row['models'].get(model), best) for model in models]
    count = len(first.values) or ''
    lines.append(f'| {_cell(row["task"])} | {_cell(row["metric"])}, {up} | {count} | {" | ".join(cells)} |')
  star = (f'; * marks a difference from {_cell(models[0])} with p < {STAR} (paired permutation test)'
          if models[1:] else '')
  return '\n'.join(lines) + f'\n\nIn brackets 95 % bootstrap intervals over the questions{star}.\n'


def written(results: Sequence[Result]) -> list[dict]:
  """The table as JSON holds it."""
  return [{'task': row['task'], 'metric': row['metric'], 'questions': len(row['first'].values),
           'higher_is_better': row['first'].higher_is_better, 'ideal': row['first'].ideal,
           'models': {name: _plain(one) for name, one in row['models'].items()}} for row in table(results)]


def write(folder, results: Sequence[Result], **facts) -> dict:
  """Writes evaluation.md and evaluation.json into a folder, each as a whole; returns what the latter holds.

  facts: what else to keep beside, such as versions and settings; JSON must be able to hold it.
  """
  out = pathlib.Path(folder).expanduser()
  out.mkdir(parents=True, exist_ok=True)
  report = {'results': written(results), **facts}
  for name, text in (('evaluation.md', markdown(results)),
                     ('evaluation.json', json.dumps(report, indent=2, ensure_ascii=False) + '\n')):
    fresh = out / f'{name}.tmp'
    fresh.write_text(text, encoding='utf-8')
    os.replace(fresh, out / name)
  return report


def _same_weights(a: Result, b: Result) -> bool:
  return (a.weights is None) == (b.weights is None) and (a.weights is None or np.array_equal(a.weights, b.weights))


def _plain(one: dict) -> dict:
  result: Result = one['result']
  found: dict[str, Any] = {'score': result.score}
  if (spread := one['interval']) is not None:
    found['interval'] = [spread.low, spread.high]
  other: Comparison | None = one['beside_first']
  if other is not None:
    gap, (better, worse) = other.difference, (other.better, other.worse)[::1 if result.higher_is_better else -1]
    found |= {'difference': gap.value, 'difference_interval': [gap.low, gap.high], 'p': other.p}
    if result.ideal is None:
      found |= {'better_on': better, 'worse_on': worse}
  if result.groups:
    found['groups'] = result.by_group()
  return found | dict(result.facts)


def _score(one: dict | None, best: float) -> str:
  if one is None:
    return ''
  score, spread, other = one['result'].score, one['interval'], one['beside_first']
  value = f'**{score:.4g}**' if score == best else f'{score:.4g}'
  star = '*' if other is not None and other.significant(STAR) else ''
  return f'{value}{star}' + (f' [{spread.low:.4g}, {spread.high:.4g}]' if spread is not None else '')


def _cell(text: str) -> str:
  return text.replace('|', '\\|').replace('\n', ' ')
