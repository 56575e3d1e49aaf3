import numpy as np
import pytest

from lmlib.data import order


@pytest.mark.parametrize('n', [*range(1, 40), 63, 64, 65, 1000, 4097])
def test_it_is_a_permutation_and_has_an_inverse(n):
  for epoch in range(3):
    there = order.permute(np.arange(n), n, seed=5, epoch=epoch)
    assert sorted(there.tolist()) == list(range(n))
    assert (order.invert(there, n, seed=5, epoch=epoch) == np.arange(n)).all()


def test_one_index_equals_the_index_among_all():
  n = 1001
  everything = order.permute(np.arange(n), n, seed=1, epoch=2)
  assert all(order.permute(i, n, seed=1, epoch=2) == everything[i] for i in (0, 500, 1000))


def test_huge_domains_cost_nothing():
  n = 10**15
  there = order.permute(np.arange(n - 5, n), n, seed=0, epoch=0)
  assert there.max() < n
  assert order.invert(there, n, seed=0, epoch=0).tolist() == list(range(n - 5, n))


@pytest.mark.parametrize('n', [1000, 1024, 1500])
def test_it_looks_random(n):
  """Rank correlation with the index, with its neighbour, and between epochs and seeds."""
  index = np.arange(n)
  orders = [order.permute(index, n, seed=seed, epoch=epoch) for seed in range(4) for epoch in range(4)]
  correlation = lambda a, b: np.corrcoef(a, b)[0, 1]
  # Independent permutations correlate with deviation 1/sqrt(n - 1); 4.5 of them: once in 10^5 draws.
  bound = 4.5 / np.sqrt(n - 1)
  for i, a in enumerate(orders):
    assert abs(correlation(a, index)) < bound
    assert abs(correlation(a[1:], a[:-1])) < bound
    assert all(abs(correlation(a, b)) < bound for b in orders[:i])


def test_small_orders_all_occur():
  """Of three things all six orders come up, each about as often."""
  seen = [tuple(order.permute(np.arange(3), 3, seed=0, epoch=epoch).tolist()) for epoch in range(600)]
  counts = [seen.count(one) for one in set(seen)]
  assert len(counts) == 6
  assert min(counts) > 55  # 100 +- 9.1 each, were they equally likely: five deviations


def test_draws_differ_by_epoch_and_seed_and_stay_below():
  drawn = [order.draw(seed, epoch, 10**6) for seed in range(10) for epoch in range(10)]
  assert len(set(drawn)) > 95
  assert 0 <= min(drawn) < 10**5 < 9 * 10**5 < max(drawn) < 10**6


def test_an_index_outside_is_an_error():
  for index in (-1, 10):
    with pytest.raises(ValueError, match=f'{index}.*n=10'):
      order.permute(np.array([3, index]), 10, seed=0, epoch=0)


def test_uniform_numbers_depend_on_key_stream_and_place_alone():
  key_B = order.row_keys(np.arange(500), seed=3, stream='masks')
  drawn = order.uniform(key_B, 40)
  assert drawn.min() >= 0
  assert drawn.max() < 1
  assert (order.uniform(key_B[7:9], 5) == drawn[7:9, :5]).all()
  others = [order.uniform(key_B, 40, 1), order.uniform(order.row_keys(np.arange(500), seed=4, stream='masks'), 40),
            order.uniform(order.row_keys(np.arange(500), seed=3, stream='other'), 40), drawn[::-1], drawn[:, ::-1]]
  for other in [drawn[:-1].ravel()[:-1], *others]:
    # Of 20,000 pairs the correlation deviates by 0.007; 4.5 of them.
    n = min(other.size, drawn.size)
    one = drawn.ravel()[1:n + 1] if other.size < drawn.size else drawn.ravel()
    assert abs(np.corrcoef(one[:n], other.ravel()[:n])[0, 1]) < 0.032
  count, _ = np.histogram(drawn, 20, (0, 1))
  assert abs(count - 1000).max() < 4.5 * 31  # binomial of 20,000 draws
