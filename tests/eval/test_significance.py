"""Bootstrap intervals cover as often as they say; a comparison finds what is there and nothing else."""
import itertools

import numpy as np
import pytest

from lmlib.eval.significance import compared, interval


def test_an_interval_of_a_mean_is_that_of_its_standard_error():
  values_N = np.random.default_rng(0).normal(3, 2, 2000)
  found = interval(values_N)
  assert found.value == pytest.approx(values_N.mean())
  expected = 1.96 * values_N.std() / np.sqrt(2000)
  assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)  # 2000 draws of a quantile


def test_intervals_cover_as_often_as_they_say():
  """Of 200 samples of 60, 95 % should hold the mean: below 90 % by chance once in 1000, and a percentile interval
  of a skewed sample covers a little less."""
  random = np.random.default_rng(1)
  held = 0
  for seed in range(200):
    found = interval(random.exponential(1.0, 60), draws=500, seed=seed)
    held += found.low <= 1.0 <= found.high
  assert 175 <= held <= 199


def test_a_ratio_weighs_documents_by_their_size():
  found = interval([1.0, 100.0], [1.0, 50.0])
  assert found.value == pytest.approx(101 / 51)
  assert found.low == pytest.approx(1)
  assert found.high == pytest.approx(2)


def test_an_interval_is_the_same_again_and_in_any_chunks(monkeypatch):
  values_N = np.random.default_rng(0).normal(size=50)
  whole = interval(values_N)
  monkeypatch.setattr('lmlib.eval.significance.CHUNK', 500)
  assert interval(values_N) == whole
  assert interval(values_N, seed=1) != whole


def test_a_wider_level_is_a_wider_interval():
  values_N = np.random.default_rng(0).normal(size=50)
  narrow, wide = interval(values_N, level=0.5), interval(values_N, level=0.99)
  assert wide.low < narrow.low < narrow.high < wide.high


def test_p_is_the_share_of_all_exchanges():
  a_N, b_N = np.array([1, 1, 1, 0, 1, 1.0]), np.array([0, 0, 1, 1, 0, 0.0])
  gap_N = a_N - b_N
  every = [abs((np.array(signs) * gap_N).sum()) >= gap_N.sum() for signs in itertools.product([-1, 1], repeat=6)]
  found = compared(a_N, b_N, draws=20_000)
  assert found.p == pytest.approx(np.mean(every), abs=0.015)  # 3 standard errors of 20,000 draws
  assert (found.better, found.worse) == (4, 1)
  assert found.difference.value == pytest.approx(0.5)


def test_a_model_is_not_better_than_itself():
  values_N = np.random.default_rng(0).normal(size=30)
  found = compared(values_N, values_N)
  assert found.p == 1
  assert not found.significant()
  assert (found.better, found.worse) == (0, 0)


def test_pairing_finds_what_separate_intervals_hide():
  random = np.random.default_rng(0)
  hard_N = random.normal(0, 5, 200)
  a_N, b_N = hard_N + 0.3, hard_N + random.normal(0, 0.5, 200)
  first, second = interval(a_N), interval(b_N)
  assert first.low < second.high  # they overlap
  assert compared(a_N, b_N).significant(0.01)


def test_chance_differences_are_rarely_significant():
  random = np.random.default_rng(2)
  found = sum(compared(random.normal(size=40), random.normal(size=40), draws=300, seed=n).significant()
              for n in range(200))
  assert found <= 22  # 10 are expected; more than 22 come once in 1000


@pytest.mark.parametrize(('values', 'weights', 'settings'), [
    ([], None, {}), ([1.0], [1.0, 2.0], {}), ([np.nan], None, {}), ([1.0], [0.0], {}), ([1.0], None, {'level': 1.0}),
    ([1.0], None, {'draws': 0})])
def test_what_cannot_be_drawn_is_refused(values, weights, settings):
  with pytest.raises(ValueError, match=r'must|needs'):
    interval(values, weights, **settings)


def test_other_questions_are_no_pair():
  with pytest.raises(ValueError, match='same questions'):
    compared([1.0, 2.0], [1.0])
