"""How sure a score is: bootstrap intervals of a mean or a ratio of sums, and two models on the same questions.

Questions (or documents) are what is drawn anew, with replacement (Efron 1979; for language, Koehn 2004), so an
interval says what other questions of the same kind would have given, not other seeds of training.
"""
import dataclasses

import numpy as np

CHUNK = 1 << 24  # numbers drawn at once


@dataclasses.dataclass(frozen=True)
class Interval:
  value: float  # of all questions
  low: float
  high: float
  level: float = 0.95

  def __str__(self) -> str:
    return f'{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]'


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Model A less model B on the same questions."""
  difference: Interval
  p: float  # two-sided, of a difference at least as large if the models were exchangeable
  better: int  # questions where A scores higher
  worse: int

  def significant(self, level: float = 0.05) -> bool:
    return self.p < level


def interval(values_N, weights_N=None, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
  """The percentile bootstrap of sum(values) / sum(weights); without weights of the mean.

  Bits per byte: the bits of each document, and its bytes as weights.
  """
  values_N = np.asarray(values_N, float)
  weights_N = np.ones_like(values_N) if weights_N is None else np.asarray(weights_N, float)
  _check(values_N, weights_N, level, draws)
  found = np.concatenate([values_N[index].sum(1) / weights_N[index].sum(1)
                          for index in _drawn(len(values_N), draws, seed)])
  low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
  return Interval(values_N.sum() / weights_N.sum(), float(low), float(high), level)


def compared(a_N, b_N, *, weights_N=None, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Comparison:
  """Two models' scores of the same questions in the same order: the difference, its interval, and a p-value.

  The p-value is of the paired permutation test: each question's scores change sides by a coin, and the share of
  `draws` with a difference as large, itself counted (Phipson and Smyth 2010), is p.
  """
  a_N, b_N = np.asarray(a_N, float), np.asarray(b_N, float)
  if a_N.shape != b_N.shape:
    raise ValueError(f'{len(a_N)} and {len(b_N)} scores: a paired comparison is of the same questions')
  gap_N = a_N - b_N
  difference = interval(gap_N, weights_N, level=level, draws=draws, seed=seed)
  observed, random, extreme = abs(gap_N.sum()), np.random.default_rng(seed), 0
  for size in _sizes(len(gap_N), draws):
    sign = random.integers(0, 2, (size, len(gap_N)), np.int8) * 2 - 1
    extreme += int((np.abs(sign @ gap_N) >= observed * (1 - 1e-9)).sum())
  return Comparison(difference, (extreme + 1) / (draws + 1), int((gap_N > 0).sum()), int((gap_N < 0).sum()))


def _sizes(N: int, draws: int):
  most = max(1, CHUNK // N)
  return [min(most, draws - start) for start in range(0, draws, most)]


def _drawn(N: int, draws: int, seed: int):
  random = np.random.default_rng(seed)
  return (random.integers(0, N, (size, N)) for size in _sizes(N, draws))


def _check(values_N, weights_N, level, draws):
  if values_N.ndim != 1 or not values_N.size or values_N.shape != weights_N.shape:
    raise ValueError(f'{values_N.size} values and {weights_N.size} weights: there must be as many, and some')
  if not np.isfinite(values_N).all() or not (weights_N > 0).all():
    raise ValueError('a bootstrap needs finite values and positive weights')
  if not 0 < level < 1 or draws < 1:
    raise ValueError(f'level={level} must lie between 0 and 1, and draws={draws} be at least 1')
