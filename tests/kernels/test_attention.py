"""Every implementation of attention equals the equation in loops of float64: values and gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.kernels import attention as kernel
from lmlib.kernels import attention_blocked
from lmlib.kernels.attention import Pattern, Rows

B, K, G, H = 2, 2, 3, 8
# float32: sums of some ten products of size 1, each rounded by 6e-8.
CLOSE = dict(rtol=2e-5, atol=2e-5)
implementations = pytest.mark.parametrize('implementation', ['auto', 'reference', 'blocked'])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(attention_blocked, 'SMALLEST', 8)  # so that few positions make several blocks


def arrays(T: int, S: int, seed: int = 0):
  """q, k, v and a gradient of the output."""
  random = np.random.default_rng(seed)
  shapes = (B, T, K, G, H), (B, S, K, H), (B, S, K, H), (B, T, K, G, H)
  return tuple(random.normal(size=shape).astype(np.float32) for shape in shapes)


def loops(q_BTKGH, k_BSKH, v_BSKH, dout_BTKGH, sees, pattern=Pattern(), slope_KG=None, bias_BKGTS=None, sink_KG=None):
  """(out, dq, dk, dv) in float64; sees(b, t, s) says whether the query t of row b sees the key s."""
  q_BTKGH, k_BSKH, v_BSKH, dout_BTKGH = (x.astype(np.float64) for x in (q_BTKGH, k_BSKH, v_BSKH, dout_BTKGH))
  out, dq, dk, dv = (np.zeros_like(x) for x in (q_BTKGH, q_BTKGH, k_BSKH, v_BSKH))
  scale, cap = pattern.scale or 1 / np.sqrt(H), pattern.softcap or 1e30
  for b, t, k, g in np.ndindex(q_BTKGH.shape[:-1]):
    keys = [s for s in range(k_BSKH.shape[1]) if sees(b, t, s)]
    capped_S = cap * np.tanh(scale * k_BSKH[b, keys, k] @ q_BTKGH[b, t, k, g] / cap)
    score_S = capped_S + (0 if slope_KG is None else slope_KG[k, g] * (np.array(keys, float) - t))
    score_S += 0 if bias_BKGTS is None else bias_BKGTS[b, k, g, t, keys]
    p_S = np.exp(score_S) / ((0 if sink_KG is None else np.exp(sink_KG[k, g])) + np.exp(score_S).sum() or 1)
    out[b, t, k, g] = p_S @ v_BSKH[b, keys, k]
    dp_S = v_BSKH[b, keys, k] @ dout_BTKGH[b, t, k, g]
    ds_S = p_S * (dp_S - p_S @ dp_S) * scale * (1 - (capped_S / cap)**2)
    dq[b, t, k, g] = ds_S @ k_BSKH[b, keys, k]
    dk[b, keys, k] += np.outer(ds_S, q_BTKGH[b, t, k, g])
    dv[b, keys, k] += np.outer(p_S, dout_BTKGH[b, t, k, g])
  return out, dq, dk, dv


def computed(implementation, q_BTKGH, k_BSKH, v_BSKH, dout_BTKGH, pattern=Pattern(), rows=Rows(), **scores):
  """(out, dq, dk, dv) of an implementation, in one compiled program."""

  @jax.jit
  def both(q, k, v, dout):
    attend = lambda q, k, v: kernel.attention(q, k, v, pattern, rows, implementation=implementation, **scores)
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
  assert_all_close(computed(implementation, *given, rows=Rows(segment_BT=segments_BT)), expected)


@pytest.mark.parametrize('implementation', ['auto', 'reference'])
@pytest.mark.parametrize('T', [1, 21])
def test_prefixes_are_seen_from_both_sides(implementation, T):
  """Of documents with prefixes of any length, none and whole, and keys marked in their middle too."""
  given, segments_BT = arrays(T, T), segments(T)
  prefix_BS = (np.random.default_rng(2).random((B, T)) < 0.4).astype(np.int32)
  prefix_BS[1, :T // 2] = 1
  sees = lambda b, t, s: segments_BT[b, t] == segments_BT[b, s] and (s <= t or prefix_BS[b, s])
  found = computed(implementation, *given, rows=Rows(segment_BT=segments_BT, prefix_BS=prefix_BS))
  assert_all_close(found, loops(*given, sees))
  alone = computed(implementation, *given, rows=Rows(prefix_BS=prefix_BS))
  assert_all_close(alone, loops(*given, lambda b, t, s: s <= t or prefix_BS[b, s]))


@pytest.mark.parametrize('implementation', ['auto', 'reference'])
@pytest.mark.parametrize('T', [1, 4])
def test_queries_after_a_cache(implementation, T):
  """Row b's queries come after its own start_B[b] keys; what lies behind them in the cache is not seen."""
  given, start_B = arrays(T, 9), np.array([0, 5], np.int32)
  expected = loops(*given, lambda b, t, s: s <= start_B[b] + t)
  rows = Rows(place_BT=start_B[:, None] + np.arange(T)[None])
  assert_all_close(computed(implementation, *given, rows=rows), expected)
  q, k, v, dout = given
  unseen = np.arange(9)[None, :, None, None] >= (start_B + T)[:, None, None, None]
  junk = (q, np.where(unseen, 1e3, k), np.where(unseen, -1e3, v), dout)
  assert_all_close(computed(implementation, *junk, rows=rows)[:2], expected[:2])


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
  assert_all_close(computed(implementation, *given, rows=Rows(segment_BT=segments_BT)),
                   computed('reference', *given, rows=Rows(segment_BT=segments_BT)))


PATTERNS = {
    'both directions': (Pattern(causal=False), lambda b, t, s: True),
    'window': (Pattern(window=4), lambda b, t, s: 0 <= t - s < 4),
    'window both ways': (Pattern(causal=False, window=4), lambda b, t, s: abs(t - s) < 4),
    'chunk': (Pattern(chunk=6), lambda b, t, s: s <= t and s // 6 == t // 6),
    'stride': (Pattern(stride=6), lambda b, t, s: s <= t and (t - s) % 6 == 0),
    'softcap and scale': (Pattern(softcap=1.5, scale=0.7), lambda b, t, s: s <= t),
    'scale': (Pattern(scale=0.7), lambda b, t, s: s <= t),
}


@pytest.mark.parametrize('name', PATTERNS)
def test_patterns(name):
  (pattern, sees), given, segments_BT = PATTERNS[name], arrays(21, 21), segments(21)
  assert_all_close(computed('auto', *given, pattern), loops(*given, sees, pattern))
  expected = loops(*given, lambda b, t, s: sees(b, t, s) and segments_BT[b, t] == segments_BT[b, s], pattern)
  assert_all_close(computed('auto', *given, pattern, Rows(segment_BT=segments_BT)), expected)


@pytest.mark.parametrize('given_too', [('slope_KG',), ('bias_BKGTS',), ('sink_KG',),
                                       ('slope_KG', 'bias_BKGTS', 'sink_KG')])
def test_what_is_added_to_scores(given_too):
  random, given = np.random.default_rng(5), arrays(13, 13)
  shapes = {'slope_KG': (K, G), 'bias_BKGTS': (B, K, G, 13, 13), 'sink_KG': (K, G)}
  more = {name: random.normal(size=shapes[name]).astype(np.float32) for name in given_too}
  pattern = Pattern(window=5, softcap=2.0)
  found = computed('auto', *given, pattern, **more)
  assert_all_close(found, loops(*given, lambda b, t, s: 0 <= t - s < 5, pattern, **more))


def test_queries_and_keys_of_different_documents():
  """As an encoder-decoder has them; a query whose document has no keys gets zeros, and no gradient is NaN."""
  given, query_BT = arrays(5, 9), np.array([[1, 1, 2, 2, 3]] * B)
  key_BS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]] * B)
  found = computed('auto', *given, Pattern(causal=False), Rows(segment_BT=query_BT, segment_BS=key_BS))
  assert_all_close(found, loops(*given, lambda b, t, s: query_BT[b, t] == key_BS[b, s]))
  assert not found[0][:, 4].any()


@pytest.mark.parametrize('implementation', ['reference', 'gpu', 'tpu'])
def test_keys_in_front_are_seen_by_every_query(implementation):
  """Of every document and whatever the window; the places of the others do not count them. A sink counts once."""
  segments_BT = segments(6)
  for pattern, rows in ((Pattern(), Rows(segment_BT=segments_BT)), (Pattern(window=2), Rows())):
    given = arrays(6, 9)
    sees = lambda b, t, s, rows=rows, pattern=pattern: s < 3 or (
        s - 3 <= t < s - 3 + (pattern.window or 9)
        and (rows.segment_BT is None or segments_BT[b, t] == segments_BT[b, s - 3]))
    sink = {'sink_KG': np.linspace(-1, 1, K * G, dtype=np.float32).reshape(K, G)} if pattern.window else {}
    assert_all_close(computed(implementation, *given, pattern, rows.replace(front=3), **sink),
                     loops(*given, sees, **sink))
  with pytest.raises(ValueError, match=r'front=3 keys have no place'):
    computed('auto', *given, Pattern(), Rows(front=3), slope_KG=np.ones((K, G), np.float32))


def test_slots_that_hold_nothing_are_not_seen():
  given, place_BS = arrays(3, 6), np.array([[4, 5, 6, -1, 2, 3], [0, 1, -1, -1, -1, -1]])
  place_BT = np.array([[4, 5, 6], [0, 1, -1]])
  for window in (None, 2):
    found = computed('auto', *given, Pattern(window=window), Rows(place_BT=place_BT, place_BS=place_BS))
    seen_BTS = (place_BS[:, None] >= 0) & (place_BS[:, None] <= place_BT[..., None])
    seen_BTS &= place_BT[..., None] - place_BS[:, None] < (window or 9)
    assert_all_close(found, loops(*given, lambda b, t, s, seen_BTS=seen_BTS: seen_BTS[b, t, s]))


def test_values_may_have_another_width():
  q, k, v, dout = arrays(7, 7)
  wide = np.concatenate([v, 2 * v], -1)
  out = kernel.attention(q, k, wide)
  np.testing.assert_allclose(out, np.concatenate([loops(q, k, v, dout, lambda b, t, s: s <= t)[0]] * 2, -1)
                             * np.repeat([1, 2], H), **CLOSE)


@pytest.mark.parametrize('pattern', [Pattern(), Pattern(causal=False), Pattern(window=5), Pattern(chunk=6),
                                     Pattern(causal=False, chunk=6), Pattern(stride=6),
                                     Pattern(causal=False, window=7, stride=3)], ids=str)
def test_the_mean_number_of_keys(pattern):
  seen = kernel.mask(24, 24, pattern)[0].sum(-1).mean()
  assert pattern.mean_keys(24) == pytest.approx(float(seen), rel=1e-6)


def test_what_cannot_be_done_is_refused():
  q, k, v, _ = arrays(4, 9)
  with pytest.raises(ValueError, match=r'4 queries and 9 keys need their places'):
    kernel.attention(q, k, v)
  with pytest.raises(ValueError, match=r"'blocked' cannot do places \(a cache\), other num.*'reference', 'tpu' can"):
    kernel.attention(q, k, v, rows=Rows(place_BT=np.array([[0, 1, 2, 3]])), implementation='blocked')
  with pytest.raises(ValueError, match=r"'fast' is none of \['blocked', 'cudnn', 'gpu', 'hopper'"):
    kernel.attention(q, q[..., 0, :], q[..., 0, :], implementation='fast')
  for pattern, lacking in ((Pattern(window=3), 'a window'), (Pattern(causal=False), 'both directions'),
                           (Pattern(softcap=3.0), 'a softcap')):
    with pytest.raises(ValueError, match=f"'blocked' cannot do .*{lacking}"):
      kernel.attention(q, k[:, :4], v[:, :4], pattern, implementation='blocked')
  for field in ('window', 'chunk', 'stride', 'softcap', 'scale'):
    with pytest.raises(ValueError, match=f'Pattern.{field}=0 must be'):
      Pattern(**{field: 0})
