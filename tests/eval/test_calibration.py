"""Calibration by hand, and on answers drawn as often right as said."""
import itertools
import json

import numpy as np
import pytest

from lmlib.eval.calibration import (
  adaptive_bins,
  adaptive_error,
  bins,
  brier,
  expected_error,
  largest_error,
  reliability,
)


def test_expected_error_by_hand():
  """Two answers said 0.9, one right; two said 0.25, none right."""
  assert expected_error([0.9, 0.9, 0.25, 0.25], [1, 0, 0, 0]) == pytest.approx((2 * 0.4 + 2 * 0.25) / 4)
  assert [(one.count, one.accuracy) for one in bins([0.9, 0.9, 0.25, 0.25], [1, 0, 0, 0])] == [(2, 0), (2, 0.5)]


def test_borders_belong_to_the_interval_below():
  assert [one.count for one in bins([0.0, 0.1, 0.2, 0.2000001, 1.0], [0] * 5)] == [2, 1, 1, 1]


def test_who_is_right_as_often_as_said_has_no_error():
  random = np.random.default_rng(0)
  confidence_N = random.uniform(0, 1, 100_000)
  right_N = random.uniform(size=100_000) < confidence_N
  assert expected_error(confidence_N, right_N) < 0.01  # 10,000 answers an interval: 3 standard errors are 0.015 / 3
  assert expected_error(np.sqrt(confidence_N), right_N) > 0.1


def test_brier_by_hand():
  assert brier([[1, 0], [0.5, 0.5], [0, 0, 1]], [0, 1, 0]) == pytest.approx((0 + 0.5 + 2) / 3)


@pytest.mark.parametrize(('probabilities', 'answers'), [([], []), ([[1.0]], [0, 1]), ([[0.5, 0.2]], [0]),
                                                        ([[0.5, 0.5]], [2]), ([[-0.5, 1.5]], [0])])
def test_what_is_no_distribution_is_refused(probabilities, answers):
  with pytest.raises(ValueError, match=r'distribution'):
    brier(probabilities, answers)


@pytest.mark.parametrize(('confidence', 'right', 'count'), [([], [], 10), ([0.5], [1, 0], 10), ([1.5], [1], 10),
                                                            ([0.5], [1], 0)])
def test_what_is_no_confidence_is_refused(confidence, right, count):
  with pytest.raises(ValueError, match=r'confidence|count'):
    expected_error(confidence, right, count)


def test_adaptive_error_by_hand():
  """Two bins of three: 0.5, 0.6, 0.7 with one right; 0.97, 0.98, 0.99 with all right. In any order."""
  confidence, right = [0.99, 0.5, 0.98, 0.6, 0.97, 0.7], [1, 0, 1, 0, 1, 1]
  assert [(one.count, one.accuracy) for one in adaptive_bins(confidence, right, 2)] == [
      (3, pytest.approx(1 / 3)), (3, 1)]
  assert adaptive_error(confidence, right, 2) == pytest.approx(((0.6 - 1 / 3) + 0.02) / 2)
  assert adaptive_error(confidence, right, 1) == pytest.approx(abs(np.mean(confidence) - 4 / 6))
  assert largest_error(confidence, right, 2) == pytest.approx(0.5)  # 0.5 alone in its half, and wrong


@pytest.mark.parametrize(('answers', 'count'), [(1, 10), (7, 4), (10, 4), (100, 7), (12, 12)])
def test_adaptive_bins_hold_everything_once_and_as_many(answers, count):
  draw = np.random.default_rng(answers)
  confidence_N, right_N = draw.uniform(size=answers), draw.integers(0, 2, answers)
  found = adaptive_bins(confidence_N, right_N, count)
  assert sum(one.count for one in found) == answers
  assert len(found) == min(answers, count)
  assert max(one.count for one in found) - min(one.count for one in found) <= 1
  assert sum(one.count * one.accuracy for one in found) == pytest.approx(right_N.sum())
  assert all(a.confidence < b.confidence for a, b in itertools.pairwise(found))


def test_answers_of_one_confidence_stay_together():
  """Their order does not matter, and one confidence for all is one bin."""
  confidence_N = np.round(np.random.default_rng(0).uniform(size=50), 1)
  right_N = np.random.default_rng(1).integers(0, 2, 50)
  order = np.random.default_rng(2).permutation(50)
  mine, other = adaptive_bins(confidence_N, right_N, 6), adaptive_bins(confidence_N[order], right_N[order], 6)
  assert [(one.count, one.accuracy) for one in mine] == [(one.count, one.accuracy) for one in other]
  assert len(adaptive_bins([0.5] * 9, [1] * 9, 3)) == 1


def test_a_diagram_has_all_that_it_draws():
  draw = np.random.default_rng(0)
  confidence_N = draw.uniform(0.9, 1, 1000)  # equal intervals leave all to one bin
  right_N = draw.uniform(size=1000) < confidence_N
  found = json.loads(json.dumps(reliability(confidence_N, right_N)))
  assert len(found['bins']) == 1
  assert found['bins'][0]['count'] == found['answers'] == 1000
  assert found['bins'][0]['accuracy'] == pytest.approx(right_N.mean())
  assert found['calibration_error'] == pytest.approx(found['largest_error'])
  fine = reliability(confidence_N, right_N, adaptive=True)
  assert [one['count'] for one in fine['bins']] == [100] * 10
  low, high = fine['bins'][3]['interval']
  assert low < fine['bins'][3]['accuracy'] < high
  gaps = [abs(one['accuracy'] - one['confidence']) for one in fine['bins']]
  assert fine['adaptive_error'] == pytest.approx(sum(gaps) / 10)


def test_the_error_of_any_bins_is_at_least_that_of_one():
  """By the triangle inequality."""
  draw = np.random.default_rng(3)
  confidence_N, right_N = draw.uniform(size=80), draw.integers(0, 2, 80)
  for count in (2, 5, 20):
    assert adaptive_error(confidence_N, right_N, count) >= adaptive_error(confidence_N, right_N, 1) - 1e-12
    assert largest_error(confidence_N, right_N, count) >= expected_error(confidence_N, right_N, count) - 1e-12
  with pytest.raises(ValueError, match='count=0'):
    adaptive_error(confidence_N, right_N, 0)
