"""Buckets of distance against their definition, word for word."""
import math

import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.nn.relative_bias import Buckets


def defined(ahead: int, buckets: int, furthest: int, causal: bool) -> int:
  """Raffel et al. 2020: half of the buckets of a direction are exact, the others grow with the logarithm."""
  count = buckets if causal else buckets // 2
  offset = count if ahead > 0 and not causal else 0
  distance = max(-ahead, 0) if causal else abs(ahead)
  if distance < count // 2:
    return offset + distance
  shared = math.log(distance / (count // 2)) / math.log(furthest / (count // 2)) * (count - count // 2)
  return offset + min(count // 2 + int(shared), count - 1)


@pytest.mark.parametrize(('buckets', 'furthest'), [(32, 128), (8, 20), (12, 40), (64, 200)])
@pytest.mark.parametrize('causal', [True, False])
def test_every_distance_is_in_its_bucket(buckets, furthest, causal):
  ahead = np.arange(-300, 301)
  found = Buckets(buckets, furthest).bucket(jnp.asarray(ahead), causal=causal)
  assert found.tolist() == [defined(a, buckets, furthest, causal) for a in ahead.tolist()]
  assert set(found.tolist()) == set(range(buckets)) - (set() if causal else {buckets // 2})  # 0 is not ahead


@pytest.mark.parametrize(('buckets', 'furthest', 'message'), [
    (6, 128, 'buckets=6 must be a multiple of 4'), (32, 16, r'furthest=16 must exceed buckets / 2 = 16'),
    (32, 64.0, 'furthest=64.0')])
def test_buckets_that_do_not_fit_are_refused(buckets, furthest, message):
  with pytest.raises(ValueError, match=message):
    Buckets(buckets, furthest)
