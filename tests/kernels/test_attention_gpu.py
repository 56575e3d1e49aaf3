"""The GPU's attention, interpreted on a CPU, equals the equation in loops of float64: values and gradients."""
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding
from lmlib.kernels import attention as kernel
from lmlib.kernels import attention_gpu, attention_hopper, attention_ranges
from lmlib.kernels.attention import Pattern, Rows
from lmlib.models import dense, protocol
from lmlib.nn.stack import Execution
from lmlib.train import losses
from tests.kernels.test_attention import B, G, K, arrays, loops, segments

SMALL = attention_gpu.Sizes(*[attention_gpu.Blocks(16, 16)] * 3)  # so that few positions make several blocks
# Relative to the norm: of sums of some ten products that are each rounded by 6e-8, or by 2^-9.
CLOSE = {'float32': 2e-6, 'bfloat16': 4e-3}

T = 37  # no multiple of a block
DOCUMENTS = segments(T)
PREFIX = (np.random.default_rng(2).random((B, T)) < 0.3).astype(np.int32)
START = np.array([0, 20])[:, None]
QUERIES, KEYS = np.array([[1] * 5 + [2] * 30 + [3] * 2] * B), np.array([[1] * 20 + [2] * 25 + [0] * 6] * B)
same = lambda b, t, s: DOCUMENTS[b, t] == DOCUMENTS[b, s]
# Of each case its pattern, rows, number of keys and who sees whom.
CASES = {
    'causal': (Pattern(), Rows(), T, lambda b, t, s: s <= t),
    'window of packed documents, softcap and scale': (
        Pattern(window=9, softcap=1.5, scale=0.7), Rows(segment_BT=DOCUMENTS), T,
        lambda b, t, s: 0 <= t - s < 9 and same(b, t, s)),
    'prefixes of packed documents, chunk and stride': (
        Pattern(chunk=12, stride=3), Rows(segment_BT=DOCUMENTS, prefix_BS=PREFIX), T,
        lambda b, t, s: same(b, t, s) and s // 12 == t // 12 and (t - s) % 3 == 0 and (s <= t or PREFIX[b, s])),
    'after a cache': (Pattern(), Rows(place_BT=START + np.arange(T)[None]), 60,
                      lambda b, t, s: s <= START[b, 0] + t),
    'both directions, a window, other documents of keys and of one none': (
        Pattern(causal=False, window=25), Rows(segment_BT=QUERIES, segment_BS=KEYS), 51,
        lambda b, t, s: QUERIES[b, t] == KEYS[b, s] and abs(t - s) < 25),
}
NONE = list(CASES)[-1]


NAMES = ('out', 'lse', 'dq', 'dk', 'dv', 'sinks', 'slopes', 'bias')
ADDED = ('sink_KG', 'slope_KG', 'bias_BKGTS')


def added(names, S: int, rows_apart: int = 1, length: int = T):
  """What is added to scores, of float32."""
  shapes = dict(sink_KG=(K, G), slope_KG=(K, G), bias_BKGTS=(rows_apart, K, G, length, S))
  random, size = np.random.default_rng(7), dict(slope_KG=0.1)
  return {name: (size.get(name, 1.0) * random.normal(size=shapes[name])).astype(np.float32) for name in names}


def exact(q, k, v, dout, dlse, pattern, seen_BTS, away_BTS, *, terms=False, sink_KG=None, slope_KG=None,
          bias_BKGTS=None):
  """By name, values and gradients in float64 of what there is; away: the place of a key less that of a query.

  terms: not they, but the sums of the sizes of what is summed and subtracted to make them.
  """
  q, k, v, dout, dlse = (np.asarray(x).astype(np.float64) for x in (q, k, v, dout, dlse))
  scale, cap = pattern.scale or q.shape[-1]**-0.5, pattern.softcap or 1e30
  tanh = np.tanh(np.einsum('BTKGH,BSKH->BKGTS', q, k) * scale / cap)
  away, score = away_BTS[:, None, None].astype(np.float64), cap * tanh
  score = score + (0 if slope_KG is None else slope_KG[None, :, :, None, None].astype(np.float64) * away)
  score = score + (0 if bias_BKGTS is None else bias_BKGTS)
  weight = np.where(seen_BTS[:, None, None], np.exp(score), 0)
  sink = 0 if sink_KG is None else np.exp(sink_KG.astype(np.float64))[None, :, :, None]
  total = weight.sum(-1) + sink
  p = weight / np.where(total == 0, 1, total)[..., None]
  with np.errstate(divide='ignore'):
    lse = np.log(total).transpose(0, 3, 1, 2)
  dlse, less = np.where(total == 0, 0, dlse.transpose(0, 2, 3, 1)), np.subtract
  if terms:
    q, k, v, dout, dlse, away, lse = (np.abs(x) for x in (q, k, v, dout, dlse, away, lse))
    lse, less = lse + 1, np.add
  dp = np.einsum('BTKGH,BSKH->BKGTS', dout, v)
  delta = less((p * dp).sum(-1), dlse)
  dscore = p * less(dp, delta[..., None])
  dproduct = dscore * (1 - tanh**2) * scale
  found = dict(out=np.einsum('BKGTS,BSKH->BTKGH', p, v), lse=lse, dq=np.einsum('BKGTS,BSKH->BTKGH', dproduct, k),
               dk=np.einsum('BKGTS,BTKGH->BSKH', dproduct, q), dv=np.einsum('BKGTS,BTKGH->BSKH', p, dout))
  if sink_KG is not None:
    found['sinks'] = -(sink / total * delta).sum((0, 3))
  if slope_KG is not None:
    found['slopes'] = (dscore * away).sum((0, 3, 4))
  if bias_BKGTS is not None:
    found['bias'] = dscore.sum(0, keepdims=True) if len(bias_BKGTS) == 1 else dscore
  return found


def assert_exact(found, expected, type_of: str = 'float32', terms=None):
  """Relative to the norm; that of the terms, where given, for a difference of equals has nothing but rounding."""
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    x, y = x.astype(np.float64), np.asarray(found[name], np.float64)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(x))  # lse of nothing is -inf
    finite = np.isfinite(x)
    size = np.linalg.norm((x if terms is None else terms[name])[finite])
    error = np.linalg.norm(y[finite] - x[finite])
    assert error <= CLOSE[type_of] * size, (name, error, size)


def computed(given, pattern, rows, sink_KG=None):
  """(out, dq, dk, dv) and, with a sink, its gradient, in one compiled program."""

  @jax.jit
  def both(q, k, v, dout, sink_KG):
    attend = lambda q, k, v, sink_KG: attention_gpu.attention(q, k, v, pattern, rows, sink_KG=sink_KG, sizes_of=SMALL)
    out, back = jax.vjp(attend, q, k, v, sink_KG)
    return out, *(x for x in back(dout) if x is not None)

  return both(*given, sink_KG)


def assert_close(found, expected, type_of: str = 'float32'):
  for name, a, b in zip(('out', 'dq', 'dk', 'dv'), found, expected):
    error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
    assert error < CLOSE[type_of], (name, error)


def test_float64_in_matrices_equals_the_loops():
  pattern, _, S, sees = CASES[NONE]
  more = {key: x.astype(np.float64) for key, x in added(ADDED, S, B).items()}
  given = arrays(T, S)
  seen_BTS = np.array([sees(*at) for at in np.ndindex(B, T, S)]).reshape(B, T, S)
  away_BTS = (np.arange(S)[None] - np.arange(T)[:, None])[None]
  found = exact(*given, np.zeros((B, T, K, G)), pattern, seen_BTS, away_BTS, **more)
  for name, x in zip(('out', 'dq', 'dk', 'dv'), loops(*given, sees, pattern, **more)):
    np.testing.assert_allclose(found[name], x, rtol=1e-12, atol=1e-14)
  for name, key in zip(ADDED, NAMES[5:]):  # by differences of the sum whose gradient it is
    first = np.zeros_like(more[name])
    first.flat[0] = 1e-4
    high, low = ((loops(*given, sees, pattern, **more | {name: more[name] + sign * first})[0] * given[3]).sum()
                 for sign in (1, -1))
    assert found[key].flat[0] == pytest.approx((high - low) / 2e-4, rel=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients(name):
  """Nothing is left of what memory held before: the interpreter fills it with NaN."""
  pattern, rows, S, sees = CASES[name]
  given = arrays(T, S)
  found = computed(given, pattern, rows)
  assert_close(found, loops(*given, sees, pattern))
  if name == NONE:
    assert not found[0][:, -2:].any()
    assert not found[1][:, -2:].any()


def test_bfloat16():
  pattern, rows, S, sees = CASES['causal']
  given = [jnp.asarray(x, jnp.bfloat16) for x in arrays(T, S)]
  found = computed(given, pattern, rows)
  assert {x.dtype.name for x in found} == {'bfloat16'}
  assert_close(found, loops(*(np.asarray(x, np.float32) for x in given), sees, pattern), 'bfloat16')


def test_sinks_and_their_gradient():
  pattern, rows, S, sees = CASES[NONE]
  given, sink_KG = arrays(T, S), np.random.default_rng(3).normal(size=(K, G)).astype(np.float32)
  found = computed(given, pattern, rows, jnp.asarray(sink_KG))
  expected = loops(*given, sees, pattern, sink_KG=sink_KG)
  assert_close(found, expected)
  # A sink's gradient is that of a key whose score it is and whose value is nothing.
  away = [(loops(*given, sees, pattern, sink_KG=sink_KG + 1e-4 * sign * np.eye(K * G)[i].reshape(K, G))[0]
           * given[3].astype(np.float64)).sum() for i, sign in itertools.product(range(K * G), (1, -1))]
  slope_KG = (np.array(away[::2]) - np.array(away[1::2])).reshape(K, G) / 2e-4
  np.testing.assert_allclose(found[4], slope_KG, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('names', 'rows_apart', 'name'), [
    (('slope_KG', 'bias_BKGTS'), 1, 'window of packed documents, softcap and scale'), (('bias_BKGTS',), B, NONE),
    (('sink_KG', 'slope_KG'), 1, 'after a cache')])
def test_what_is_added_to_scores_has_gradients(names, rows_apart, name):
  """Slopes, biases that rows share or not, sinks, and log-sums."""
  pattern, rows, S, _ = CASES[name]
  given, more = arrays(T, S), added(names, S, rows_apart)
  dlse = np.random.default_rng(8).normal(size=(B, T, K, G)).astype(np.float32)

  @jax.jit
  def both(q, k, v, dout, dlse, more):
    attend = lambda q, k, v, more: attention_gpu.partial_attention(q, k, v, pattern, rows, **more, sizes_of=SMALL)
    out, back = jax.vjp(attend, q, k, v, more)
    return out, back((dout, dlse))

  (out, lse), (dq, dk, dv, dmore) = both(*given, dlse, more)
  places = kernel.places(T, S, rows)
  expected = exact(*given, dlse, pattern, kernel.mask(T, S, pattern, rows), np.asarray(places[1] - places[0]), **more)
  assert_exact(dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv) |
               {NAMES[5 + ADDED.index(key)]: x for key, x in dmore.items()}, expected)


def test_log_sums_join_parts_and_have_gradients():
  """Of heads of a width that is no power of two, and values of another."""
  random = np.random.default_rng(4)
  shapes = (1, 20, 1, 2, 24), (1, 20, 1, 24), (1, 20, 1, 40), (1, 20, 1, 2, 40), (1, 20, 1, 2)
  q, k, v, dout, dlse = (random.normal(size=shape).astype(np.float32) for shape in shapes)

  def plain(q, k, v):
    score_BTKGS = jnp.einsum('BTKGH,BSKH->BTKGS', q, k) / 24**0.5
    score_BTKGS = jnp.where(np.tri(20, dtype=bool)[None, :, None, None], score_BTKGS, -jnp.inf)
    lse_BTKG = jax.nn.logsumexp(score_BTKGS, axis=-1)
    return jnp.einsum('BTKGS,BSKH->BTKGH', jnp.exp(score_BTKGS - lse_BTKG[..., None]), v), lse_BTKG

  partial = lambda *qkv: attention_gpu.partial_attention(*qkv, Pattern(), Rows(), sizes_of=SMALL)
  both = lambda attend: jax.jit(lambda *qkv: (lambda out, back: (*out, *back((dout, dlse))))(*jax.vjp(attend, *qkv)))
  for found, expected in zip(both(partial)(q, k, v), both(plain)(q, k, v)):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('name', CASES)
def test_blocks_left_out_hold_nothing_and_whole_ones_everything(name):
  pattern, rows, S, sees = CASES[name]
  long_t, long_s = -T % 8, -S % 8
  places = kernel.places(T, S, rows)
  fill = lambda x, by: None if x is None else jnp.pad(jnp.broadcast_to(x, (B, x.shape[1])), [(0, 0), (0, by)],
                                                      constant_values=-1)
  segment_BS = rows.segment_BT if rows.segment_BS is None else rows.segment_BS
  whole = Rows(fill(places[0][:, :, 0], long_t), fill(places[1][:, 0], long_s), fill(rows.segment_BT, long_t),
               fill(segment_BS, long_s), fill(rows.prefix_BS, long_s))
  some, every = (np.asarray(x) for x in attention_ranges.met(pattern, whole, 8, 8))
  bounds = np.asarray(attention_ranges.ranges(some, every))
  seen = np.zeros((B, T + long_t, S + long_s), bool)
  for b, t, s in np.ndindex(B, T, S):
    seen[b, t, s] = sees(b, t, s)
  seen = seen.reshape(B, (T + long_t) // 8, 8, -1, 8)
  index = np.arange(seen.shape[3])[None, None]
  within = lambda low, high: (index >= bounds[..., low, None]) & (index < bounds[..., high, None])
  assert not seen.any((2, 4))[~within(0, 3)].any()
  assert seen.all((2, 4))[within(1, 2)].all()
  assert (np.diff(bounds) >= 0).all()
  if name == 'causal':
    assert (bounds[0, :4] == [[0, 0, i, i + 1] for i in range(4)]).all()


def test_devices_share_rows_and_heads():
  """The gradients of keys that are on several devices, because their heads do not divide, are summed."""
  given = tuple(x[:, :, :1] if i in (1, 2) else x[:, :, :1, :2] for i, x in enumerate(arrays(16, 16)))
  attend = lambda *qkv: kernel.attention(*qkv, rows=Rows(segment_BT=DOCUMENTS[:, :16]), implementation='gpu')
  pulled = lambda dout, out, back: (out, *back(dout))
  both = lambda *given: jax.jit(lambda q, k, v, dout: pulled(dout, *jax.vjp(attend, q, k, v)))(*given)
  with sharding.use(sharding.Layout(data=2, tensor=2), jax.devices()[:4]):
    found = both(*given)
  for a, b in zip(found, both(*given)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_model_asks_for_it():
  config = dense.Config(layers=1, heads=2, kv_heads=1, execution=Execution(attention='gpu'))
  tokens = np.random.default_rng(5).integers(0, 256, (1, 25)).astype(np.int32)
  batch = {'tokens_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weight_BT': np.ones((1, 24), np.float32),
           'segments_BT': np.repeat([[1, 2]], 12, axis=1).astype(np.int32)}
  params = protocol.new(config, jax.random.key(0))
  of = lambda name: dataclasses.replace(config, execution=Execution(attention=name))
  loss = lambda name: float(jax.jit(losses.NextToken().of(of(name)))(params, batch)[0])
  assert loss('gpu') == pytest.approx(loss('reference'), rel=1e-6)
  assert jax.tree.map(jnp.shape, protocol.boxed(of('hopper'))) == jax.tree.map(jnp.shape, protocol.boxed(config))
  with pytest.raises(ValueError, match="'hopper' cannot do a backend but a Hopper GPU"):
    loss('hopper')


def test_what_cannot_be_done_here_is_refused():
  q, k, v, _ = arrays(4, 4)
  for name, lacking in (('hopper', 'a backend but a Hopper GPU, lengths but multiples of 128, heads of widths'),
                        ('cudnn', 'a backend but a GPU')):
    with pytest.raises(ValueError, match=f"'{name}' cannot do {lacking}.*; 'blocked', .*'gpu', 'reference', 'tpu' can"):
      kernel.attention(q, k, v, implementation=name)
  with pytest.raises(ValueError, match=r"'blocked' cannot do slopes; 'gpu', 'reference', 'tpu' can"):
    kernel.attention(q, k, v, slope_KG=jnp.ones((K, G)), implementation='blocked')
  with pytest.raises(ValueError, match=r"Execution.attention='flash' must be 'auto' or one of"):
    Execution(attention='flash')
  sizes = lambda: attention_gpu.Sizes(*[attention_gpu.Blocks(size, 16) for size in (48, 32, 16)])
  with pytest.raises(ValueError, match='must be multiples of another'):
    attention_gpu.attention(q, k, v, Pattern(), Rows(), sizes_of=sizes())


def lowered(attend):
  """The text of a forward and backward pass for an H100 that is not there."""
  shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.bfloat16)
  shapes = shape(1, 256, 1, 2, 64), shape(1, 256, 1, 64), shape(1, 256, 1, 64), shape(1, 256, 1, 2, 64)
  traced = jax.jit(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout)).trace
  if jax.__version_info__ < (0, 12):
    return traced(*shapes).lower(lowering_platforms=('cuda',)).as_text()
  from jax._src.mesh import AbstractDevice  # jax 0.12 asks which GPU it is, and has no public name for one
  device = AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
    return traced(*shapes).lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated:DeprecationWarning')  # jax 0.12
def test_kernels_lower_for_cuda_without_a_gpu():

  def attend(q, k, v):
    bias_BKGTS = jnp.broadcast_to(q[:, 0, :, :, 0].astype(jnp.float32)[..., None, None], (1, 1, 2, 256, 256))
    return attention_gpu.attention(q, k, v, Pattern(window=100), Rows(), slope_KG=q[0, 0, :, :, 0],
                                   bias_BKGTS=bias_BKGTS, interpret=False)

  text = lowered(attend)
  missing = [name for name in ('attention_forward', 'attention_backward_keys', 'attention_backward_queries',
                              'attention_backward_bias') if name not in text]
  assert not missing


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason='the Mosaic dialect of jax 0.10 has other names')
def test_hopper_kernels_lower_without_a_gpu():
  documents = Rows(segment_BT=np.repeat([[1, 2]], 128, axis=1).astype(np.int32))
  text = lowered(lambda *qkv: attention_hopper.attention(*qkv, Pattern(window=100), documents))
  assert text.count('custom_call @mosaic_gpu') == 3


def test_the_hopper_kernel_takes_what_it_says():
  """On a CPU nothing of it runs; benchmarks/kernels.py holds it to float64 on a GPU."""
  shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.bfloat16)
  q, k = shape(1, 256, 1, 2, 64), shape(1, 256, 1, 64)
  lacking = lambda q, k, pattern=Pattern(), rows=Rows(), added=(): attention_hopper.lacking(
      q, k, k, pattern, rows, added)
  nothing = lacking(q, k)
  assert nothing[0] == 'a backend but a Hopper GPU'
  for more, case in (((q, shape(1, 384, 1, 64)), 'other numbers of queries and keys'),
                     ((q, k, Pattern(chunk=8)), 'a chunk'), ((q, k, Pattern(), Rows(prefix_BS=1)), 'a prefix'),
                     ((q, k, Pattern(), Rows(), ['sinks']), 'sinks'),
                     ((shape(1, 200, 1, 2, 64), shape(1, 200, 1, 64)), 'lengths but multiples of 128'),
                     ((shape(1, 256, 1, 2, 80), shape(1, 256, 1, 80)), 'heads of widths but (64, 128)')):
    assert [name for name in lacking(*more) if name not in nothing] == [case]
