"""Sampling draws from the distribution that the settings of each row describe: an oracle in NumPy, and chi-square."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.serve import sampling
from lmlib.serve.sampling import Sampling, Seen, choose

V, DRAWS = 6, 4000
LOGITS_V = np.array([2.0, 1.0, 0.5, 0.0, -1.0, 1.5], np.float32)
PROMPT, WRITTEN_V = (3,), np.array([2, 0, 1, 0, 0, 0])
# 99.99 % quantiles of chi-square by degrees of freedom; seeds are fixed, so no test fails by chance.
CRITICAL = {0: 0.1, 1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7}
CASES = {
    'plain': Sampling(), 'colder': Sampling(temperature=0.5), 'warmer': Sampling(temperature=3.0),
    'greedy': Sampling(temperature=0.0), 'greedy, penalised': Sampling(temperature=0.0, frequency=1.0),
    'top 3': Sampling(top_k=3), 'top 1': Sampling(top_k=1), 'more than there are': Sampling(top_k=1000),
    'top p': Sampling(top_p=0.7), 'a small top p': Sampling(top_p=1e-6), 'min p': Sampling(min_p=0.3),
    'min p of 1': Sampling(min_p=1.0), 'typical': Sampling(typical=0.5), 'little typical': Sampling(typical=1e-6),
    'repetition': Sampling(repetition=1.7), 'presence': Sampling(presence=0.8), 'frequency': Sampling(frequency=0.4),
    'bias': Sampling(bias=((4, 2.5), (0, -np.inf), (4, 0.5))), 'forced': Sampling(forced=(1, 2, 3, 4)),
    'forced before': Sampling(forced=(1,)), 'too short to end': Sampling(least=9),
    'all at once': Sampling(0.8, 5, 0.95, 0.02, 0.9, 1.2, 0.3, 0.1, ((4, 0.9),), least=4),
}
STEP, EOS = 3, 5
cases = pytest.mark.parametrize('how', CASES.values(), ids=CASES)


def softmax(x_V):
  e_V = np.exp(x_V - x_V.max())
  return e_V / e_V.sum()


def expected(how: Sampling) -> np.ndarray:
  """The probabilities of all tokens in float64, one setting after the other, by sets of tokens."""
  x_V = LOGITS_V.astype(np.float64)
  for token in range(V):
    if token in PROMPT or WRITTEN_V[token]:
      x_V[token] = x_V[token] / how.repetition if x_V[token] > 0 else x_V[token] * how.repetition
    x_V[token] -= how.presence * bool(WRITTEN_V[token]) + how.frequency * WRITTEN_V[token]
  for token, added in how.bias:
    x_V[token] += added
  if how.least > STEP:
    x_V[EOS] = -np.inf
  if len(how.forced) > STEP:
    return np.eye(V)[how.forced[STEP]]
  if how.temperature == 0:
    return np.eye(V)[x_V.argmax()]
  x_V /= how.temperature
  kept = sorted(range(V), key=lambda token: -x_V[token])[:how.top_k or V]

  def narrowed(order, mass: float) -> list[int]:
    p_V, found, total = softmax(np.where(np.isin(range(V), kept), x_V, -np.inf)), [], 0.0
    for token in order(p_V):
      found.append(token)
      total += p_V[token]
      if total >= mass:
        break
    return found

  if how.top_p < 1:
    kept = narrowed(lambda p_V: sorted(kept, key=lambda token: -p_V[token]), how.top_p)
  if how.typical < 1:
    def usual(p_V):
      entropy = -sum(p_V[token] * np.log(p_V[token]) for token in kept if p_V[token])
      return sorted((token for token in kept if p_V[token]), key=lambda token: abs(-np.log(p_V[token]) - entropy))
    kept = narrowed(usual, how.typical)
  p_V = softmax(np.where(np.isin(range(V), kept), x_V, -np.inf))
  return softmax(np.where(p_V >= how.min_p * p_V.max(), np.log(np.maximum(p_V, 1e-300)), -np.inf)) * (p_V > 0)


def seen(B: int) -> Seen:
  prompt_V = np.isin(range(V), PROMPT)
  return Seen(jnp.asarray(np.tile(prompt_V, (B, 1))), jnp.asarray(np.tile(WRITTEN_V, (B, 1)), jnp.int32))


drawn = jax.jit(lambda logits_BV, settings, keys_B: choose(logits_BV, seen(len(logits_BV)), settings, keys_B, STEP))
rows = lambda B: jnp.broadcast_to(jnp.asarray(LOGITS_V), (B, V))
keys = jax.random.split(jax.random.key(0), DRAWS)


@cases
def test_what_is_left_is_what_the_oracle_leaves(how):
  settings = sampling.settings([how], V, EOS)
  scores_BV = sampling.scores(rows(1), seen(1), settings, STEP)
  p_V = np.asarray(jax.nn.softmax(sampling.truncated(scores_BV, settings), axis=-1))[0]
  np.testing.assert_allclose(p_V, expected(how), atol=2e-6)


@cases
def test_frequencies_and_log_probabilities(how):
  tokens_B, logp_B, truncated_B = map(np.asarray, drawn(rows(DRAWS), sampling.settings([how] * DRAWS, V, EOS), keys))
  p_V, counts_V = expected(how), np.bincount(tokens_B, minlength=V)
  assert counts_V[p_V == 0].sum() == 0
  expected_V = DRAWS * p_V[p_V > 0]
  assert ((counts_V[p_V > 0] - expected_V)**2 / expected_V).sum() < CRITICAL[len(expected_V) - 1]
  np.testing.assert_allclose(logp_B, np.log(softmax(LOGITS_V))[tokens_B], rtol=1e-5)
  np.testing.assert_allclose(truncated_B, np.log(p_V[tokens_B]), rtol=1e-4, atol=1e-5)


def test_a_row_has_its_own_settings_and_key():
  """A row in a mixed batch draws what it draws among rows of its own settings."""
  mixed = [list(CASES.values())[i % len(CASES)] for i in range(DRAWS)]
  longest = sampling.settings([CASES['forced']], V, EOS).forced_BN.shape
  assert sampling.settings(mixed, V, EOS).forced_BN.shape[1] == longest[1]
  found_B = np.asarray(drawn(rows(DRAWS), sampling.settings(mixed, V, EOS), keys)[0])
  for i, how in enumerate(CASES.values()):
    alone_B = np.asarray(drawn(rows(DRAWS), sampling.settings([how] * DRAWS, V, EOS), keys)[0])
    np.testing.assert_array_equal(found_B[i::len(CASES)], alone_B[i::len(CASES)])


def test_of_equal_logits_none_is_cut_from_the_others():
  logits_BV = jnp.array([[1.0, 1.0, 1.0, 0.0]])
  for how in (Sampling(top_k=2), Sampling(top_p=0.3), Sampling(min_p=1.0)):
    settings = sampling.settings([how], 4, None)
    fresh = Seen(jnp.zeros((1, 4), bool), jnp.zeros((1, 4), jnp.int32))
    left_BV = sampling.truncated(sampling.scores(logits_BV, fresh, settings, 0), settings)
    np.testing.assert_array_equal(np.isfinite(left_BV), [[True, True, True, False]])


@pytest.mark.parametrize(('settings', 'said'), [
    (dict(temperature=-1.0), 'temperature=-1.0'), (dict(temperature=np.nan), 'temperature=nan'),
    (dict(top_k=0), 'top_k=0'), (dict(top_k=2.5), r'top_k=2\.5'), (dict(top_p=0.0), r'top_p=0\.0'),
    (dict(top_p=1.5), r'top_p=1\.5'), (dict(typical=0), 'typical=0'), (dict(min_p=-0.1), r'min_p=-0\.1'),
    (dict(repetition=0.0), r'repetition=0\.0'), (dict(most=0), 'most=0'), (dict(least=9, most=8), 'least=9 and most=8'),
    (dict(stop='end'), "stop='end'"), (dict(stop=('',)), 'not empty'), (dict(presence='1'), "presence='1'")])
def test_settings_out_of_range_are_refused(settings, said):
  with pytest.raises(ValueError, match=said):
    Sampling(**settings)


def test_tokens_outside_the_vocabulary_are_refused():
  with pytest.raises(ValueError, match=r'\[6\], outside of vocab=6'):
    sampling.settings([Sampling(bias=((6, 1.0),))], V, None)
  with pytest.raises(ValueError, match='bans every token'):
    sampling.settings([Sampling(bias=tuple((i, -np.inf) for i in range(V)))], V, None)
