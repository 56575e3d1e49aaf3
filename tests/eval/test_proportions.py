"""Wilson's interval solves its equation, covers as often as said, and stays between 0 and 1."""
import math

import numpy as np
import pytest

from lmlib.eval.proportions import by_group, figure, share, wilson

Z = 1.959963984540054  # of 95 %


def test_the_bounds_are_where_the_score_test_turns():
  for yes, total in ((1, 2), (3, 10), (99, 100), (500, 1000)):
    found = wilson(yes, total)
    assert found.value == yes / total
    for p in (found.low, found.high):
      assert abs(found.value - p) == pytest.approx(Z * math.sqrt(p * (1 - p) / total))


def test_all_and_none_have_intervals():
  """Of n without one yes, z^2 / (n + z^2)."""
  assert (wilson(0, 10).low, wilson(0, 10).high) == (0, pytest.approx(Z**2 / (10 + Z**2)))
  assert (wilson(10, 10).low, wilson(10, 10).high) == (pytest.approx(10 / (10 + Z**2)), 1)


@pytest.mark.parametrize('p', [0.1, 0.5, 0.93])
def test_coverage_is_about_what_is_said(p):
  """Summed over all outcomes of 40 questions, no drawing: Wilson's mean coverage is close to 95 %."""
  inside = sum(math.comb(40, yes) * p**yes * (1 - p)**(40 - yes) for yes in range(41)
               if wilson(yes, 40).low <= p <= wilson(yes, 40).high)
  assert 0.92 < inside < 0.99  # single shares of 40 lie that far from 95 %, since outcomes are whole numbers


def test_more_questions_and_lower_levels_are_narrower():
  wide = lambda found: found.high - found.low
  widths = [wide(wilson(n // 4, n)) for n in (4, 40, 400)]
  assert widths == sorted(widths, reverse=True)
  assert wide(wilson(3, 10, level=0.5)) < wide(wilson(3, 10))


def test_groups():
  found = by_group(['b', 'a', 'b'], [True, False, False])
  assert list(found) == ['a', 'b']
  assert [one.value for one in found.values()] == [0, 0.5]
  assert share(np.array([True, True])).value == 1
  assert figure('rate', found['a'])['rate_interval'] == [0, found['a'].high]


@pytest.mark.parametrize(('yes', 'total', 'level'), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_what_is_no_share_is_refused(yes, total, level):
  with pytest.raises(ValueError, match=r'share|level'):
    wilson(yes, total, level=level)
  with pytest.raises(ValueError, match='1 groups and 2 answers'):
    by_group(['a'], [True, False])
