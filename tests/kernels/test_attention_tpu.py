"""The TPU's attention, interpreted and simulated on a CPU, equals the equation in float64: values and gradients."""
import dataclasses
import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax._src.mesh import AbstractDevice  # has no public name
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding
from lmlib.kernels import attention as kernel
from lmlib.kernels import attention_tile, attention_tpu
from lmlib.kernels.attention import Pattern, Rows
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.positions import Alibi
from tests.kernels.test_attention import B, arrays, loops
from tests.kernels.test_attention_gpu import ADDED, CASES, CLOSE, DOCUMENTS, NAMES, NONE, T, added, assert_exact, exact
from tests.laws import encoders
from tests.laws.encoders import T5
from tests.laws.models import executed, made, small, tokens

blocks = lambda *six: attention_tpu.Sizes(*(attention_tpu.Blocks(*six[i:i + 2]) for i in (0, 2, 4)))
SMALL = blocks(8, 16, 16, 8, 8, 8)  # so that few positions make several blocks


@functools.partial(jax.jit, static_argnames=('pattern', 'sizes_of', 'interpret'))
def computed(qkv, dout, dlse, more, rows, *, pattern, sizes_of=SMALL, interpret=None):
  """By name, values and gradients of the kernels."""
  attend = lambda qkv, more: attention_tpu.partial_attention(*qkv, pattern, rows, **more, sizes_of=sizes_of,
                                                             interpret=interpret)
  (out, lse), back = jax.vjp(attend, qkv, more)
  (dq, dk, dv), dmore = back((dout, dlse))
  names = dict(zip(ADDED, NAMES[5:]))
  return dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv) | {names[name]: x for name, x in dmore.items()}


def check(qkvd, pattern, rows, *, sizes_of=SMALL, interpret=None, by_terms=False, **more):
  """Holds the kernels to float64; returns what they found."""
  *qkv, dout = qkvd
  length, S = dout.shape[1], qkv[1].shape[1]
  places = kernel.places(length, S, rows)
  dlse = np.random.default_rng(8).normal(size=dout.shape[:-1]).astype(np.float32)
  found = computed(tuple(qkv), dout, dlse, more, rows, pattern=pattern, sizes_of=sizes_of, interpret=interpret)
  seen_BTS = np.broadcast_to(kernel.mask(length, S, pattern, rows), (len(dout), length, S))
  away_BTS = np.asarray(places[1] - places[0])
  side = lambda terms: exact(*qkv, dout, dlse, pattern, seen_BTS, away_BTS, terms=terms, **more)
  assert_exact(found, side(False), qkv[0].dtype.name, side(True) if by_terms else None)
  return found


WITH = {'causal': ('slope_KG',), 'after a cache': ('sink_KG', 'slope_KG'), NONE: ('bias_BKGTS',),
        'window of packed documents, softcap and scale': ('slope_KG', 'bias_BKGTS')}


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients(name):
  """Nothing is left of what memory held before: the interpreter fills it with NaN."""
  pattern, rows, S, _ = CASES[name]
  found = check(arrays(T, S), pattern, rows, **added(WITH.get(name, ()), S, B if name == NONE else 1))
  if name == NONE:
    assert not found['out'][:, -2:].any()
    assert not found['dq'][:, -2:].any()
    assert not found['dk'][:, -6:].any()


def test_the_default_blocks():
  """Of as many lanes as those of a TPU."""
  given = [x[:1, :, :1, :1] if x.ndim == 5 else x[:1, :, :1] for x in arrays(1000, 1000)]
  assert attention_tpu.sizes(jnp.float32, 8, 1000, 1000).forward == attention_tpu.Blocks(256, 256)
  check(given, Pattern(), Rows(), sizes_of=None)


def test_bfloat16_and_other_widths():
  shapes = (1, 20, 1, 2, 24), (1, 20, 1, 24), (1, 20, 1, 40), (1, 20, 1, 2, 40)
  random = np.random.default_rng(4)
  given = [jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in shapes]
  found = check(given, Pattern(), Rows(), sizes_of=blocks(8, 8, 8, 8, 8, 8))
  assert {found[name].dtype.name for name in ('out', 'dq', 'dk', 'dv')} == {'bfloat16'}


def test_parts_of_the_keys_join():
  """As a ring of devices joins them: by log-sums."""
  q, k, v, dout = arrays(16, 16)

  @jax.jit
  def joined(q, k, v):
    parts = [attention_tpu.partial_attention(q, k[:, at], v[:, at], Pattern(), Rows(place_BS=places), sizes_of=SMALL)
             for at, places in ((slice(start, start + 8), start + np.arange(8)[None]) for start in (0, 8))]
    outs, lses = (jnp.stack(x) for x in zip(*parts))
    return (outs * jax.nn.softmax(lses, axis=0)[..., None]).sum(0)

  expected = loops(q, k, v, dout, lambda b, t, s: s <= t)[0]
  assert np.linalg.norm(joined(q, k, v) - expected) / np.linalg.norm(expected) < CLOSE['float32']


@st.composite
def cases(draw, lengths=st.integers(3, 33)):
  """Patterns, rows, sizes and what is added."""
  some = lambda low, high: st.none() | st.integers(low, high)
  pattern = Pattern(causal=draw(st.booleans()), window=draw(some(1, 20)), chunk=draw(some(3, 20)),
                    stride=draw(some(2, 4)), softcap=draw(st.none() | st.just(2.0)))
  random = np.random.default_rng(draw(st.integers(0, 999)))
  length, S = draw(lengths), draw(lengths)
  kind = draw(st.sampled_from(['plain', 'packed', 'cache', 'prefix']))
  rows = Rows()
  if kind == 'cache':  # of slots in any order, and some that hold nothing
    place_BS = np.where(random.random((B, S)) < 0.2, -1, random.permuted(np.tile(np.arange(S), (B, 1)), axis=1))
    rows = Rows(place_BT=random.integers(0, S, (B, 1)) + np.arange(length)[None], place_BS=place_BS)
  else:
    S = length
    documents_BT = np.cumsum(random.random((B, length)) < 0.2, axis=1).astype(np.int32)
    rows = Rows(segment_BT=documents_BT if kind == 'packed' or draw(st.booleans()) else None,
                prefix_BS=(random.random((B, length)) < 0.3).astype(np.int32) if kind == 'prefix' else None)
  sizes_of = draw(st.sampled_from([SMALL, blocks(16, 8, 8, 16, 16, 16), blocks(32, 32, 32, 16, 8, 32)]))
  names = draw(st.lists(st.sampled_from(ADDED), unique=True))
  return pattern, rows, length, S, sizes_of, added(names, S, draw(st.sampled_from([1, B])), length)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(cases())
def test_any_case(case):
  pattern, rows, length, S, sizes_of, more = case
  check(arrays(length, S), pattern, rows, sizes_of=sizes_of, by_terms=True, **more)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cases(lengths=st.just(37)), st.booleans())  # of one shape, for speed
def test_a_grid_passes_all_that_is_seen(case, keys_stay):
  """And a step that makes no mask needs none; the last axis is as long as the pattern alone demands."""
  pattern, rows, length, S, sizes_of, _ = case
  square, long_t, long_s = attention_tpu.Blocks(8, 8), -length % 8, -S % 8
  kinds = attention_tpu._Case(**attention_tile.of_case(pattern, rows, 8, True), sizes=sizes_of, added=(),
                              interpret=None, ordered=rows.place_BT is rows.place_BS is None)
  whole = attention_tile.whole(rows, np.zeros((B, length, 1, 1, 1)), np.zeros((B, S, 1, 1)), long_t, long_s)
  seen = np.broadcast_to(kernel.mask(length, S, pattern, rows), (B, length, S))
  seen = np.pad(seen, [(0, 0), (0, long_t), (0, long_s)]).reshape(B, (length + long_t) // 8, 8, -1, 8)
  some_BIJ, all_BIJ = (np.swapaxes(x, 1, 2) if keys_stay else x for x in (seen.any((2, 4)), seen.all((2, 4))))
  bounds = np.asarray(attention_tpu._bounds(kinds, whole, square, keys_stay=keys_stay))
  visited = np.zeros_like(some_BIJ)
  for b, i in np.ndindex(some_BIJ.shape[:2]):
    for step in range(kinds.most(square, length + long_t, S + long_s, keys_stay)):
      j, met, plain = (int(x) for x in attention_tpu._passing(bounds, b * some_BIJ.shape[1] + i, step))
      assert 0 <= j < some_BIJ.shape[2]
      assert not (met and visited[b, i, j])
      assert all_BIJ[b, i, j] or not (met and plain)
      visited[b, i, j] |= bool(met)
  assert not (some_BIJ & ~visited).any()


def test_a_simulated_tpu_finds_no_race_and_nothing_unwritten(monkeypatch):
  """Of two cores, whose memory is NaN before: every part of every output is written, by one."""
  pattern, rows, *_ = CASES['window of packed documents, softcap and scale']
  rows = jax.tree.map(lambda x: x[:1, :20], rows)
  simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan', num_cores_or_threads=2)
  given = [x[:1, :, :1, :2] if i in (0, 3) else x[:1, :, :1] for i, x in enumerate(arrays(20, 20))]
  more = {key: x[:, :1, :2] if key == 'bias_BKGTS' else x[:1, :2] for key, x in added(ADDED, 20, length=20).items()}
  looked, state = [], interpret_pallas_call.RaceDetectionState
  each_kernel = lambda **how: looked.append(state(**how)) or looked[-1]
  monkeypatch.setattr(interpret_pallas_call, 'RaceDetectionState', each_kernel)
  try:
    check(given, pattern, rows, interpret=simulated, sizes_of=blocks(*[16] * 6), **more)
  finally:
    pltpu.reset_tpu_interpret_mode_state()
  assert [found.races_found for found in looked] == [False] * 4


def test_a_window_makes_a_grid_short():
  case = attention_tpu._Case(**attention_tile.of_case(Pattern(window=1024), Rows(), 8, False), sizes=SMALL, added=(),
                             interpret=None, ordered=True)
  square = attention_tpu.Blocks(512, 512)
  assert case.most(square, 2**17, 2**17, False) == case.most(square, 2**17, 2**17, True) == 3
  assert dataclasses.replace(case, pattern=Pattern(chunk=512)).most(square, 2**17, 2**17, False) == 1
  assert dataclasses.replace(case, ordered=False).most(square, 2**17, 2**17, False) == 256


def test_devices_share_rows_and_heads():
  """And one bias for all rows, whose gradient is the sum over devices."""
  q, k, v, dout = (x[:, :16, :1] if i in (1, 2) else x[:, :16, :1, :2] for i, x in enumerate(arrays(16, 16)))
  more = {'slope_KG': np.array([[0.1, 0.2]], np.float32), 'sink_KG': np.array([[0.5, -1.0]], np.float32),
          'bias_BKGTS': np.random.default_rng(6).normal(size=(1, 1, 2, 16, 16)).astype(np.float32)}
  attend = lambda *qkv, more: kernel.attention(*qkv, rows=Rows(segment_BT=DOCUMENTS[:, :16]), **more,
                                               implementation='tpu')

  @jax.jit
  def both(q, k, v, dout, more):
    out, back = jax.vjp(lambda *qkv: attend(*qkv[:3], more=qkv[3]), q, k, v, more)
    return out, *back(dout)

  with sharding.use(sharding.Layout(data=2, tensor=2), jax.devices()[:4]):
    out, dq, dk, dv, dmore = both(q, k, v, dout, more)
  seen_BTS = kernel.mask(16, 16, Pattern(), Rows(segment_BT=DOCUMENTS[:, :16]))
  away_BTS = (np.arange(16)[None] - np.arange(16)[:, None])[None]
  expected = exact(q, k, v, dout, np.zeros(dout.shape[:-1]), Pattern(), seen_BTS, away_BTS, **more)
  del expected['lse']
  assert_exact(dict(out=out, dq=dq, dk=dk, dv=dv, sinks=dmore['sink_KG'], slopes=dmore['slope_KG'],
                    bias=dmore['bias_BKGTS']), expected)


def logits(config, params, *args):
  return jax.jit(lambda params: config.model().apply({'params': params}, *args)[0])(params)


def test_laws_of_a_decoder():
  """Packed documents do not leak, decoding equals the forward pass, eight devices equal one."""
  config = executed(small(layers=1, positions=Alibi(), attention=AttentionStyle(
      sinks=True, patterns=(Pattern(window=5, softcap=5.0),))), attention='tpu')
  params, tokens_BT = made(config), tokens(config, 8, 12)
  segments_BT = np.repeat([[1, 2]], 6, axis=1).repeat(8, 0).astype(np.int32)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  found_BTV, later_BT = logits(config, params, tokens_BT, segments_BT), tokens_BT[:, 6:]
  close(found_BTV[:, 6:], logits(config, params, later_BT))
  decoded = lambda cache: config.model().apply({'params': params}, later_BT, None, cache)[0]
  close(found_BTV[:, 6:], jax.jit(decoded)(config.cache(8, 8)))
  with sharding.use(sharding.Layout(data=4, tensor=2)):
    close(found_BTV, logits(config, params, tokens_BT, segments_BT))


def test_an_encoder_decoder_asks_for_it():
  """Which has a bias, and queries and keys of different texts."""
  config = dataclasses.replace(T5, layers=1, encoder_layers=1)
  params, given = encoders.made(config), (tokens(config, 2, 6), tokens(config, 2, 9))
  of = lambda name: encoders.apply(encoders.executed(config, attention=name), params, given[0], None, None, None,
                                   given[1], None)[0]
  np.testing.assert_allclose(of('tpu'), of('reference'), rtol=1e-5, atol=1e-5)


def test_a_tpu_that_is_not_there_chooses_it():
  """A program compiled for TPUs is the one that TPUs run."""
  shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
  given = lambda T: (shape(1, T, 1, 2, 64), shape(1, T, 1, 64), shape(1, T, 1, 64))
  chosen = lambda T, rows=Rows(): kernel.chosen(*given(T), Pattern(), rows, ['slopes'])
  assert chosen(128) == 'reference'
  device = AbstractDevice('TPU v5 lite', 1, 'tpu')
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
    assert [chosen(128), chosen(127), chosen(128, Rows(front=2))] == ['tpu', 'reference', 'tpu']


def test_what_cannot_be_done_is_refused():
  q, k, v, _ = arrays(4, 4)
  with pytest.raises(ValueError, match=r"'tpu' cannot do arrays but of float32 or bfloat16, all alike"):
    kernel.attention(q, k, v.astype(np.float16), implementation='tpu')
  wide = np.concatenate([v] * 33, -1)
  with pytest.raises(ValueError, match=r"'tpu' cannot do heads wider than 256"):
    kernel.attention(q, k, wide, implementation='tpu')
  with pytest.raises(ValueError, match='must be multiples of another'):
    attention_tpu.attention(q, k, v, Pattern(), Rows(), sizes_of=blocks(48, 8, 32, 8, 16, 8))
