"""How sure a share of yes and no is: the interval of Wilson (1927), which holds at 0 and 1 and for few questions."""
from collections.abc import Sequence
import math
import statistics

from lmlib.eval.significance import Interval


def wilson(yes: int, total: int, *, level: float = 0.95) -> Interval:
  """The share yes / total, and the shares p that the score test keeps: |yes/total - p| <= z sqrt(p (1-p) / total).

  ValueError for no questions, or more yes than questions.
  """
  if not 0 <= yes <= total or not total:
    raise ValueError(f'{yes} of {total} is no share: there must be questions, and no more yes than those')
  if not 0 < level < 1:
    raise ValueError(f'level={level} must lie between 0 and 1')
  z, share = statistics.NormalDist().inv_cdf((1 + level) / 2), yes / total
  middle, wide = share + z**2 / (2 * total), z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
  bounds = [(middle + sign * wide) / (1 + z**2 / total) for sign in (-1, 1)]
  return Interval(share, 0.0 if not yes else bounds[0], 1.0 if yes == total else bounds[1], level)


def share(answers: Sequence[bool], *, level: float = 0.95) -> Interval:
  """The share of yes among answers."""
  return wilson(sum(map(bool, answers)), len(answers), level=level)


def by_group(groups: Sequence[str], answers: Sequence[bool], *, level: float = 0.95) -> dict[str, Interval]:
  """The share of yes in each group, in the order of their names."""
  if len(groups) != len(answers):
    raise ValueError(f'{len(groups)} groups and {len(answers)} answers: there must be as many')
  return {name: share([one for group, one in zip(groups, answers) if group == name], level=level)
          for name in sorted(set(groups))}


def figure(name: str, found: Interval) -> dict:
  """What a report writes down of a share: itself and its interval, by the names <name> and <name>_interval."""
  return {name: found.value, f'{name}_interval': [found.low, found.high]}
