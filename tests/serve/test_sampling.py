"""Sampling draws from the distribution that the settings of each row describe."""
import jax
import numpy as np
import pytest

from lmlib.serve.sampling import sample

V, DRAWS = 6, 4000
LOGITS_V = np.array([2.0, 1.0, 0.5, 0.0, -1.0, 1.5], np.float32)
draw = jax.jit(sample)
# 99.99 % quantiles of chi-square by degrees of freedom; seeds are fixed, so no test fails by chance.
CRITICAL = {1: 15.1, 2: 18.4, 5: 25.7}


def rows(temperature: float, top_k: int, seed: int = 0):
  """DRAWS rows with the same logits and keys of their own."""
  logits_BV = np.broadcast_to(LOGITS_V, (DRAWS, V))
  keys_B = jax.random.split(jax.random.key(seed), DRAWS)
  settings = np.full(DRAWS, temperature, np.float32), np.full(DRAWS, top_k, np.int32)
  return np.asarray(draw(logits_BV, keys_B, *settings))


@pytest.mark.parametrize(('temperature', 'top_k'), [
    (1.0, V), (0.5, V), (3.0, V), (1.0, 3), (0.7, 2), (1.0, 1000)])
def test_frequencies(temperature, top_k):
  """By chi-square: softmax(logits / temperature) over the top_k highest logits."""
  tokens_B = rows(temperature, top_k)
  kept = np.argsort(-LOGITS_V)[:top_k]
  p_V = np.zeros(V)
  p_V[kept] = np.exp(LOGITS_V[kept] / temperature) / np.exp(LOGITS_V[kept] / temperature).sum()
  counts_V = np.bincount(tokens_B, minlength=V)
  assert counts_V[p_V == 0].sum() == 0
  expected_V = DRAWS * p_V[p_V > 0]
  assert ((counts_V[p_V > 0] - expected_V)**2 / expected_V).sum() < CRITICAL[len(expected_V) - 1]


def test_temperature_0_and_top_1_take_the_highest():
  assert set(rows(0.0, V)) == set(rows(1.0, 1)) == set(rows(0.0, 3)) == {LOGITS_V.argmax()}


def test_a_row_has_its_own_settings_and_key():
  """A row in a mixed batch draws what it draws among rows of its own settings."""
  settings = [(0.0, V), (1.0, V), (0.5, 2), (2.0, 4)]
  temperature_B, top_k_B = (np.array(column, dtype) for column, dtype in zip(
      zip(*(settings[i % 4] for i in range(DRAWS))), (np.float32, np.int32)))
  logits_BV, keys_B = np.broadcast_to(LOGITS_V, (DRAWS, V)), jax.random.split(jax.random.key(0), DRAWS)
  mixed_B = np.asarray(draw(logits_BV, keys_B, temperature_B, top_k_B))
  for i, setting in enumerate(settings):
    np.testing.assert_array_equal(mixed_B[i::4], rows(*setting)[i::4])


def test_the_same_key_draws_the_same_and_another_another():
  np.testing.assert_array_equal(rows(1.0, V), rows(1.0, V))
  assert (rows(1.0, V) != rows(1.0, V, seed=1)).any()


def test_changing_settings_compiles_nothing():
  traced = []
  counted = jax.jit(lambda *args: traced.append(1) or sample(*args))
  logits_BV, keys_B = np.broadcast_to(LOGITS_V, (2, V)), jax.random.split(jax.random.key(0), 2)
  for temperature, top_k in [(0.0, V), (1.0, 2), (0.3, 5)]:
    counted(logits_BV, keys_B, np.full(2, temperature, np.float32), np.full(2, top_k, np.int32))
  assert len(traced) == 1
