"""Whether a model is right as often as it says: calibration errors, Brier score, and the bins of a reliability diagram.

Bins are equal intervals of confidence (Guo et al. 2017), or hold equal numbers of answers (Nguyen and O'Connor 2015):
of a model that is mostly sure, equal intervals leave nearly all answers to one bin.
"""
import dataclasses
import itertools

import numpy as np

from lmlib.eval import proportions


@dataclasses.dataclass(frozen=True)
class Bin:
  """The answers of about the same confidence."""
  confidence: float  # mean
  accuracy: float
  count: int


def bins(confidence_N, right_N, count: int = 10) -> list[Bin]:
  """Those of `count` equal intervals of confidence, (0, 1/count] and so on, that hold answers.

  confidence_N: the probability given to the chosen answer; right_N: whether it was right.
  """
  confidence_N, right_N = np.asarray(confidence_N, float), np.asarray(right_N, float)
  _check(confidence_N, right_N)
  if count < 1:
    raise ValueError(f'count={count} must be at least 1 interval')
  place_N = np.clip(np.ceil(confidence_N * count).astype(int) - 1, 0, count - 1)
  return [Bin(confidence_N[here].mean(), right_N[here].mean(), int(here.sum()))
          for here in (place_N == i for i in range(count)) if here.any()]


def adaptive_bins(confidence_N, right_N, count: int = 10) -> list[Bin]:
  """Up to `count` bins of as equal numbers of answers as can be, by confidence.

  Answers of one confidence stay together: a bin that would end among them ends behind the last.
  """
  confidence_N, right_N = np.asarray(confidence_N, float), np.asarray(right_N, float)
  _check(confidence_N, right_N)
  if count < 1:
    raise ValueError(f'count={count} must be at least 1 bin')
  order = np.argsort(confidence_N, kind='stable')
  confidence_N, right_N = confidence_N[order], right_N[order]
  starts = {0}
  for i in range(1, count):
    start = i * len(right_N) // count
    if start and confidence_N[start - 1] == confidence_N[start]:
      start = int(np.searchsorted(confidence_N, confidence_N[start], 'right'))
    if start < len(right_N):
      starts.add(start)
  edges = [*sorted(starts), len(right_N)]
  return [Bin(confidence_N[a:b].mean(), right_N[a:b].mean(), b - a) for a, b in itertools.pairwise(edges)]


def expected_error(confidence_N, right_N, count: int = 10) -> float:
  """ECE (Guo et al. 2017, eq. 5): the gap of accuracy and confidence, the mean over answers of their interval's."""
  return _mean_gap(bins(confidence_N, right_N, count))


def adaptive_error(confidence_N, right_N, count: int = 10) -> float:
  """As ECE, over bins of equal numbers of answers (adaptive ECE; Nguyen and O'Connor 2015)."""
  return _mean_gap(adaptive_bins(confidence_N, right_N, count))


def largest_error(confidence_N, right_N, count: int = 10) -> float:
  """MCE (Guo et al. 2017, eq. 6): the largest gap of any interval; of few answers mostly chance."""
  return max(abs(one.accuracy - one.confidence) for one in bins(confidence_N, right_N, count))


def reliability(confidence_N, right_N, count: int = 10, *, adaptive: bool = False, level: float = 0.95) -> dict:
  """What a reliability diagram draws, as JSON can hold it: of each bin 'confidence', 'accuracy', 'interval', 'count'.

  interval: Wilson's of the accuracy. Beside the bins 'calibration_error', 'adaptive_error', 'largest_error' and
  'answers'. adaptive: bins of equal numbers of answers.
  """
  found = (adaptive_bins if adaptive else bins)(confidence_N, right_N, count)
  spread = [proportions.wilson(round(one.accuracy * one.count), one.count, level=level) for one in found]
  return {'bins': [{'confidence': float(one.confidence), 'accuracy': float(one.accuracy),
                    'interval': [around.low, around.high], 'count': one.count} for one, around in zip(found, spread)],
          'calibration_error': float(expected_error(confidence_N, right_N, count)),
          'adaptive_error': float(adaptive_error(confidence_N, right_N, count)),
          'largest_error': float(largest_error(confidence_N, right_N, count)), 'answers': len(confidence_N)}


def brier(probabilities, answers_N) -> float:
  """Brier's score (1950): the mean squared distance of the probabilities from 1 for the answer, 0 for the rest.

  From 0 to 2. probabilities: of each question those of its choices, which sum to 1, as many as it has.
  """
  if not len(probabilities) or len(probabilities) != len(answers_N):
    raise ValueError(f'{len(probabilities)} distributions and {len(answers_N)} answers: as many are needed, and some')
  total = 0.0
  for p, answer in zip(probabilities, answers_N):
    p = np.asarray(p, float)
    if not 0 <= answer < len(p) or (p < 0).any() or abs(p.sum() - 1) > 1e-4:
      raise ValueError(f'{p.tolist()} is no distribution over choices of which {answer} is one')
    total += ((p - np.eye(len(p))[answer])**2).sum()
  return total / len(answers_N)


def _mean_gap(found: list[Bin]) -> float:
  return sum(one.count * abs(one.accuracy - one.confidence) for one in found) / sum(one.count for one in found)


def _check(confidence_N, right_N):
  if not confidence_N.size or confidence_N.shape != right_N.shape or confidence_N.ndim != 1:
    raise ValueError(f'{confidence_N.size} confidences and {right_N.size} outcomes: there must be as many, and some')
  if not ((confidence_N >= 0) & (confidence_N <= 1)).all():
    raise ValueError(f'confidences lie between 0 and 1, not {confidence_N.min()} to {confidence_N.max()}')
