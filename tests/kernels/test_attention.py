"""Every implementation of attention equals the equation in loops of float64: values and gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.kernels import attention as kernel
from lmlib.kernels import attention_blocked

B, K, G, H = 2, 2, 3, 8
# float32: sums of some ten products of size 1, each rounded by 6e-8.
CLOSE = dict(rtol=2e-5, atol=2e-5)
implementations = pytest.mark.parametrize('implementation', ['auto', *kernel.IMPLEMENTATIONS])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(attention_blocked, 'SMALLEST', 8)  # so that few positions make several blocks


def arrays(T: int, S: int, seed: int = 0):
  """q, k, v and a gradient of the output."""
  random = np.random.default_rng(seed)
  shapes = (B, T, K, G, H), (B, S, K, H), (B, S, K, H), (B, T, K, G, H)
  return tuple(random.normal(size=shape).astype(np.float32) for shape in shapes)


def loops(q_BTKGH, k_BSKH, v_BSKH, dout_BTKGH, sees):
  """(out, dq, dk, dv) in float64; sees(b, t, s) says whether the query t of row b sees the key s."""
  q_BTKGH, k_BSKH, v_BSKH, dout_BTKGH = (x.astype(np.float64) for x in (q_BTKGH, k_BSKH, v_BSKH, dout_BTKGH))
  out, dq, dk, dv = (np.zeros_like(x) for x in (q_BTKGH, q_BTKGH, k_BSKH, v_BSKH))
  for b, t, k, g in np.ndindex(q_BTKGH.shape[:-1]):
    keys = [s for s in range(k_BSKH.shape[1]) if sees(b, t, s)]
    score_S = k_BSKH[b, keys, k] @ q_BTKGH[b, t, k, g] / np.sqrt(H)
    p_S = np.exp(score_S) / np.exp(score_S).sum()
    out[b, t, k, g] = p_S @ v_BSKH[b, keys, k]
    dp_S = v_BSKH[b, keys, k] @ dout_BTKGH[b, t, k, g]
    ds_S = p_S * (dp_S - p_S @ dp_S) / np.sqrt(H)
    dq[b, t, k, g] = ds_S @ k_BSKH[b, keys, k]
    dk[b, keys, k] += np.outer(ds_S, q_BTKGH[b, t, k, g])
    dv[b, keys, k] += np.outer(p_S, dout_BTKGH[b, t, k, g])
  return out, dq, dk, dv


def computed(implementation, q_BTKGH, k_BSKH, v_BSKH, dout_BTKGH, **masks):
  """(out, dq, dk, dv) of an implementation, in one compiled program."""

  @jax.jit
  def both(q, k, v, dout):
    attend = lambda q, k, v: kernel.attention(q, k, v, implementation=implementation, **masks)
    out, back = jax.vjp(attend, q, k, v)
    return out, *back(dout)

  return both(q_BTKGH, k_BSKH, v_BSKH, dout_BTKGH)


def segments(T: int):
  """Documents of several lengths, one of a single position, others in each row."""
  starts_BT = np.random.default_rng(1).random((B, T)) < 0.2
  starts_BT[1, T // 2:T // 2 + 2] = True
  return np.cumsum(starts_BT, axis=1, dtype=np.int32)


def assert_all_close(found, expected):
  for name, a, b in zip(('out', 'dq', 'dk', 'dv'), found, expected):
    np.testing.assert_allclose(a, b, err_msg=name, **CLOSE)


@implementations
@pytest.mark.parametrize('T', [1, 8, 21])
def test_causal(implementation, T):
  given = arrays(T, T)
  assert_all_close(computed(implementation, *given), loops(*given, lambda b, t, s: s <= t))


@implementations
@pytest.mark.parametrize('T', [7, 21])
def test_documents_of_packed_rows(implementation, T):
  given, segments_BT = arrays(T, T), segments(T)
  expected = loops(*given, lambda b, t, s: s <= t and segments_BT[b, t] == segments_BT[b, s])
  assert_all_close(computed(implementation, *given, segments_BT=segments_BT), expected)


@pytest.mark.parametrize('implementation', ['auto', 'reference'])
@pytest.mark.parametrize('T', [1, 21])
def test_prefixes_are_seen_from_both_sides(implementation, T):
  """Of documents with prefixes of any length, none and whole, and keys marked in their middle too."""
  given, segments_BT = arrays(T, T), segments(T)
  prefix_BS = (np.random.default_rng(2).random((B, T)) < 0.4).astype(np.int32)
  prefix_BS[1, :T // 2] = 1
  sees = lambda b, t, s: segments_BT[b, t] == segments_BT[b, s] and (s <= t or prefix_BS[b, s])
  found = computed(implementation, *given, segments_BT=segments_BT, prefix_BS=prefix_BS)
  assert_all_close(found, loops(*given, sees))
  alone = computed(implementation, *given, prefix_BS=prefix_BS)
  assert_all_close(alone, loops(*given, lambda b, t, s: s <= t or prefix_BS[b, s]))


@pytest.mark.parametrize('implementation', ['auto', 'reference'])
@pytest.mark.parametrize('T', [1, 4])
def test_queries_after_a_cache(implementation, T):
  """Row b's queries come after its own start_B[b] keys; what lies behind them in the cache is not seen."""
  given, start_B = arrays(T, 9), np.array([0, 5], np.int32)
  expected = loops(*given, lambda b, t, s: s <= start_B[b] + t)
  assert_all_close(computed(implementation, *given, start_B=start_B), expected)
  q, k, v, dout = given
  unseen = np.arange(9)[None, :, None, None] >= (start_B + T)[:, None, None, None]
  junk = (q, np.where(unseen, 1e3, k), np.where(unseen, -1e3, v), dout)
  assert_all_close(computed(implementation, *junk, start_B=start_B)[:2], expected[:2])


@implementations
def test_large_scores_stay_finite(implementation):
  """exp(1000) is not finite in float32; softmax is, and takes the largest score."""
  q, k, v, dout = arrays(21, 21)
  found = computed(implementation, 1e3 * q, k, v, dout)
  assert all(np.isfinite(x).all() for x in found)


@implementations
def test_bfloat16_is_rounded_only_at_the_ends(implementation):
  rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays(21, 21)]
  found = computed(implementation, *rounded)
  assert {x.dtype.name for x in found} == {'bfloat16'}
  expected = loops(*(np.asarray(x, np.float32) for x in rounded), lambda b, t, s: s <= t)
  for name, a, b in zip(('out', 'dq', 'dk', 'dv'), found, expected):
    # Sums of products are float32 and then rounded by 2^-9; so are probabilities and the scores' gradients.
    error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
    assert error < 4 * 2**-9, (name, error)


@implementations
def test_the_default_blocks_equal_the_reference(implementation, monkeypatch):
  monkeypatch.undo()
  given, segments_BT = arrays(300, 300), segments(300)
  assert_all_close(computed(implementation, *given, segments_BT=segments_BT),
                   computed('reference', *given, segments_BT=segments_BT))


def test_what_cannot_be_done_is_refused():
  q, k, v, _ = arrays(4, 9)
  with pytest.raises(ValueError, match=r'4 queries and 9 keys need start_B'):
    kernel.attention(q, k, v)
  with pytest.raises(ValueError, match=r"'blocked' has no start_B.*'reference' has"):
    kernel.attention(q, k, v, start_B=np.array([0, 1]), implementation='blocked')
  with pytest.raises(ValueError, match=r"'fast' is none of \['blocked', 'reference'"):
    kernel.attention(q, q[..., 0, :], q[..., 0, :], implementation='fast')
  with pytest.raises(ValueError, match='give one of them'):
    kernel.attention(q, k, v, start_B=np.array([0, 1]), segments_BT=segments(4))
  with pytest.raises(ValueError, match='give one of them'):
    kernel.attention(q, k, v, start_B=np.array([0, 1]), prefix_BS=segments(9))
  with pytest.raises(ValueError, match=r"'blocked' has no prefix_BS.*'reference' has"):
    kernel.attention(q, k[:, :4], v[:, :4], prefix_BS=segments(4), implementation='blocked')
