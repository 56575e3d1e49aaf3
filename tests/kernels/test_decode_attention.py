"""A step of decoding, interpreted on a CPU, equals the equation in loops of float64; what nobody sees is not read."""
import dataclasses
import functools

from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
import jax
from jax.experimental.pallas import tpu as mosaic
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding
from lmlib.kernels import decode_attention as kernel
from lmlib.kernels import decode_attention_gpu, decode_attention_tpu
from lmlib.kernels.attention import Pattern
from lmlib.kernels.decode_attention import Held
from lmlib.models import dense, latent_moe, protocol
from lmlib.nn import cache
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.stack import Execution
from lmlib.serve import generate

NAMES = ('reference', 'tpu', 'gpu')
kernels = pytest.mark.parametrize('name', NAMES[1:])
# Relative to the norm: of sums of some ten products that are each rounded by 6e-8, or by 2^-9.
CLOSE = {'float32': 2e-6, 'bfloat16': 4e-3}
LENGTHS = np.array([5, 0, 37, 48], np.int32)
SMALL = {'reference': {}, 'tpu': {'sizes_of': decode_attention_tpu.Sizes(32)},
         'gpu': {'sizes_of': decode_attention_gpu.Sizes(16, 16, 2)}}  # so that few slots make several blocks


def arrays(B=4, T=1, K=2, G=3, H=8, W=16, S=48, seed=0):
  """q_BTKGH, k_BKSH, v_BKSH and sink_KG."""
  random = np.random.default_rng(seed)
  shapes = (B, T, K, G, H), (B, K, S, H), (B, K, S, W), (K, G)
  return tuple(random.normal(size=shape).astype(np.float32) for shape in shapes)


def loops(q_BTKGH, held: Held, pattern, place_BT=None, sink_KG=None):
  """(out, lse_BTKG) in float64, a query, a head and a seen slot at a time."""
  float64 = lambda x: None if x is None else np.asarray(x).astype(np.float32).astype(np.float64)
  q, k, v, k_scale, v_scale = (float64(x) for x in (q_BTKGH, held.k, held.v, held.k_scale, held.v_scale))
  v, v_scale = (k, k_scale) if v is None else (v, v_scale)
  (B, T, K, G, H), S = q.shape, held.k.shape[2]
  out, lse = np.zeros((B, T, K, G, held.width)), np.full((B, T, K, G), -np.inf)
  for b, t in np.ndindex(B, T):
    places = [*held.place_BS[b]] if held.place_BS is not None else [*range(int(held.length_B[b]))]
    mine = int(held.length_B[b]) - T + t if place_BT is None else int(place_BT[b, t])
    slots = [s for s, place in enumerate(places) if bool(np.asarray(pattern.seen(np.array(mine), np.array(place))))]
    at = [(b, s) if held.page_BX is None else (int(held.page_BX[b, s // S]), s % S) for s in slots]
    for n, g in np.ndindex(K, G):
      scale = H**-0.5 if pattern.scale is None else pattern.scale
      score = np.array([scale * (k[x, n, s, :H] @ q[b, t, n, g]) * (1 if k_scale is None else k_scale[x, n, s])
                        for x, s in at])
      score = score if pattern.softcap is None else pattern.softcap * np.tanh(score / pattern.softcap)
      sink = [] if sink_KG is None else [float(sink_KG[n, g])]
      if not at and not sink:
        continue
      lse[b, t, n, g] = np.logaddexp.reduce([*score, *sink])
      for (x, s), p in zip(at, np.exp(score - lse[b, t, n, g])):
        out[b, t, n, g] += p * v[x, n, s, :held.width] * (1 if v_scale is None else v_scale[x, n, s])
  return out, lse


def filled(held: Held, first_B=None) -> Held:
  """With NaN in slots that are not filled, or before the first that is seen."""
  slot_BS = np.arange(held.k.shape[2])[None]
  unseen_BS = (slot_BS >= held.length_B[:, None]) | (slot_BS < (0 if first_B is None else first_B[:, None]))
  junk = lambda x: None if x is None else x if x.dtype == jnp.int8 else jnp.where(
      unseen_BS[:, None, :].reshape(unseen_BS.shape[0], 1, -1, *[1] * (x.ndim - 3)), jnp.asarray(jnp.nan, x.dtype), x)
  return held.replace(k=junk(held.k), v=junk(held.v), k_scale=junk(held.k_scale), v_scale=junk(held.v_scale))


def paged(held: Held, size: int, first_B=None, seed: int = 1) -> Held:
  """The same in pages, in any order; entries of the table of no page that is seen are far outside of it."""
  B, S = held.k.shape[0], held.k.shape[2]
  X = S // size
  table_BX = np.random.default_rng(seed).permutation(B * X).reshape(B, X).astype(np.int32)
  pages = lambda x: None if x is None else jnp.zeros((B * X, x.shape[1], size, *x.shape[3:]), x.dtype).at[
      table_BX.reshape(-1)].set(jnp.moveaxis(x.reshape(*x.shape[:2], X, size, *x.shape[3:]), 2, 1).reshape(
          B * X, x.shape[1], size, *x.shape[3:]))
  begin_BX = np.arange(X)[None] * size
  unseen_BX = begin_BX >= held.length_B[:, None]
  if first_B is not None:
    unseen_BX |= begin_BX + size <= first_B[:, None]
  garbage_BX = np.where((np.arange(B)[:, None] + np.arange(X)[None]) % 2, 10**9, -10**9)
  return held.replace(k=pages(held.k), v=pages(held.v), k_scale=pages(held.k_scale), v_scale=pages(held.v_scale),
                      page_BX=jnp.asarray(np.where(unseen_BX, garbage_BX, table_BX), jnp.int32))


def quantised(x_BKSH, dtype):
  """(x in 8 bits, its scale BKS)."""
  most_BKS = np.abs(x_BKSH).max(-1)
  scale_BKS = (most_BKS / (127 if dtype == jnp.int8 else 448)).astype(np.float32)
  x_BKSH = x_BKSH / scale_BKS[..., None]
  return jnp.asarray(np.round(x_BKSH) if dtype == jnp.int8 else x_BKSH).astype(dtype), jnp.asarray(scale_BKS)


def eight(k, v, dtype) -> Held:
  (k, k_scale), (v, v_scale) = quantised(k, dtype), quantised(v, dtype)
  return Held(k, v, jnp.asarray(LENGTHS), k_scale=k_scale, v_scale=v_scale)


def computed(name: str, q_BTKGH, held: Held, pattern, place_BT=None, sink_KG=None, **more):
  """(out, lse_BTKG) of an implementation with small blocks, in one compiled program."""
  place_BT = held.queries_BT(q_BTKGH.shape[1]) if place_BT is None else jnp.asarray(place_BT)
  run = lambda q, held, place_BT, sink_KG: kernel.IMPLEMENTATIONS[name](
      q, held, pattern, place_BT, sink_KG, **SMALL[name], **more)
  return jax.jit(run)(jnp.asarray(q_BTKGH), held, place_BT, sink_KG)


def assert_close(found, expected):
  """Zeros where nothing is seen, and no NaN anywhere."""
  (out, lse), (out_64, lse_64) = (tuple(np.asarray(x, np.float64) for x in pair) for pair in (found, expected))
  close = CLOSE[found[0].dtype.name]
  assert np.linalg.norm(out - out_64) < close * np.linalg.norm(out_64)
  seen = np.isfinite(lse_64)
  np.testing.assert_array_equal(np.isneginf(lse), ~seen)
  assert np.linalg.norm(lse[seen] - lse_64[seen]) < close * np.linalg.norm(lse_64[seen])
  nothing = np.abs(out_64).max(-1) == 0
  assert nothing.any() or len(LENGTHS) != out.shape[0]
  assert not out[nothing].any()


def cases():
  """Of each its q, what is held, pattern, place_BT and sink_KG."""
  found, lengths = {}, jnp.asarray(LENGTHS)
  q, k, v, sink = arrays()
  found['rows of several lengths'] = q, filled(Held(jnp.asarray(k), jnp.asarray(v), lengths)), Pattern(), None, None
  q, k, v, sink = arrays(T=3)
  local = Pattern(window=9, softcap=1.5, scale=0.7)
  first_B = np.maximum(LENGTHS - 3 - 8, 0)
  held = Held(jnp.asarray(k), jnp.asarray(v), lengths)
  found['a window of pages, softcap, scale and sinks'] = q, paged(filled(held, first_B), 8, first_B), local, None, sink
  found['chunks and strides in both directions'] = q, filled(held), Pattern(
      causal=False, chunk=12, stride=2), None, sink
  q, k, v, _ = arrays(K=1, G=5, H=16)
  found['one key head of int8'] = q, paged(filled(eight(k, v, jnp.int8)), 16), Pattern(), None, None
  q, k, v, _ = arrays(T=2, H=24)
  found['float8 rows'] = q, filled(eight(k, v, jnp.float8_e4m3fn)), Pattern(window=20), None, None
  q, k, _, _ = arrays(K=1, G=4, H=24)
  k = np.pad(k, [(0, 0), (0, 0), (0, 0), (0, 8)])
  k, k_scale = quantised(k, jnp.float8_e4m3fn)
  shared = Held(k, None, lengths, k_scale=k_scale, value_width=20)
  found['values that are of wider keys'] = q, paged(filled(shared), 16), Pattern(), None, None
  q, k, v, sink = arrays(T=2, S=37)
  used = jnp.asarray([1, 0, 90, 37])
  place_BT = np.array([[-1, 0], [-1, -1], [88, 89], [35, 36]])
  ring = Held(jnp.asarray(k), jnp.asarray(v), place_BS=cache.held(used, 37))
  found['a ring of odd length'] = q, ring, Pattern(window=36), place_BT, sink
  mixed = np.random.default_rng(3).permuted(np.tile(np.arange(-10, 27), (4, 1)), axis=1)
  mixed[1] = -1
  found['places in any order'] = q, ring.replace(place_BS=jnp.asarray(mixed)), Pattern(), np.array(
      [[3, 4], [5, -1], [26, 27], [0, 30]]), None
  return found


CASES = cases()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('case', CASES)
def test_equals_loops(name, case):
  """Slots that are not filled, or lie before a window's page, hold NaN, and so does memory before it is written."""
  assert_close(computed(name, *CASES[case]), loops(*CASES[case]))


@kernels
def test_bfloat16(name):
  """With keys of int8, as caches may be that keep values as they are."""
  q, k, v, sink = arrays(T=2)
  low = lambda x: jnp.asarray(x, jnp.bfloat16)
  held = eight(k, v, jnp.int8).replace(v=low(v), v_scale=None)
  given = low(q), paged(filled(held), 16), Pattern(), None, sink
  assert_close(computed(name, *given), loops(*given))


def test_the_simulator_of_a_tpu_finds_no_race():
  """On two cores, whose memories hold NaN until they are written, and where a page outside of the pool is an error."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator  # no public name says it
  interpret = mosaic.InterpretParams(detect_races=True, uninitialized_memory='nan', num_cores_or_threads=2)
  q, k, v, sink = arrays(K=1, G=2)
  first_B = np.maximum(LENGTHS - 20, 0)
  rows = filled(eight(k, v, jnp.float8_e4m3fn), first_B)
  for held in (rows, paged(rows, 16, first_B)):
    given = q, held, Pattern(window=20), None, sink
    try:
      found = jax.block_until_ready(computed('tpu', *given, interpret=interpret))
    except Exception:
      mosaic.reset_tpu_interpret_mode_state()
      raise
    assert_close(found, loops(*given))
    races = getattr(simulator, 'races', None)
    assert races is None or not races.races_found  # jax 0.12 raises


PATTERNS = (Pattern(), Pattern(window=7))


@functools.partial(jax.jit, static_argnums=(0, 1))
def of_pages(name, pattern, q, held, place_BT):
  return kernel.IMPLEMENTATIONS[name](q, held, pattern, place_BT, **SMALL[name])


@kernels
@settings(max_examples=12, deadline=None, derandomize=True)
@drawn(lengths=st.lists(st.integers(0, 40), min_size=3, max_size=3), pattern=st.sampled_from(PATTERNS),
       seed=st.integers(0, 99))
def test_pages_of_any_lengths(name, lengths, pattern, seed):
  q, k, v, _ = arrays(B=3, T=2, K=1, G=2, S=40, seed=seed)
  length_B = np.array(lengths, np.int32)
  first_B = np.maximum(length_B - 2, 0)
  first_B = np.maximum(first_B - 6, 0) if pattern.window else np.zeros_like(first_B)
  held = Held(jnp.asarray(k), jnp.asarray(v), jnp.asarray(length_B))
  held = paged(filled(held, first_B), 8, first_B, seed)
  found = of_pages(name, pattern, jnp.asarray(q), held, held.queries_BT(2))
  expected = loops(q, held, pattern)
  for a, b in zip(found, expected):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_log_sums_join_a_shared_prefix():
  """Twenty keys that all rows share, by one kernel, and those of each row, by the other; the sink counts once."""
  q, k, v, sink = arrays(T=2)
  k[:, :, :20], v[:, :, :20] = k[:1, :, :20], v[:1, :, :20]
  held = Held(jnp.asarray(k), jnp.asarray(v), jnp.asarray([22, 20, 37, 48]))
  place_BT, length_B = np.asarray(held.queries_BT(2)), held.length_B
  one = held.replace(k=held.k[:, :, :20], v=held.v[:, :, :20], length_B=jnp.minimum(length_B, 20))
  slot_BS = np.arange(20, 48)[None]
  two = held.replace(k=held.k[:, :, 20:], v=held.v[:, :, 20:], length_B=None,
                     place_BS=jnp.where(slot_BS < length_B[:, None], slot_BS, -1))
  parts = [computed('tpu', q, one, Pattern(), place_BT, sink), computed('gpu', q, two, Pattern(), place_BT)]
  for a, b in zip(kernel.joined(parts), loops(q, held, Pattern(), None, sink)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  out, lse = kernel.joined([(jnp.zeros((1, 1, 1, 1, 2)), jnp.full((1, 1, 1, 1), -jnp.inf))] * 2)
  assert not out.any()
  assert np.isneginf(lse).all()


@kernels
def test_devices_share_rows_and_heads(name):
  q, k, v, sink = arrays(T=2)
  held = paged(eight(k, v, jnp.int8), 16)
  attend = jax.jit(lambda *given: kernel.partial(*given[:2], Pattern(), sink_KG=given[2], implementation=name))
  with sharding.use(sharding.Layout(data=2, tensor=2), jax.devices()[:4]):
    found = attend(q, held, sink)
  assert_close(found, loops(q, held, Pattern(), None, sink))


def weights(config):
  random = np.random.default_rng(7)
  shapes = jax.tree.map(lambda box: box.value.shape, protocol.boxed(config), is_leaf=lambda x: hasattr(x, 'axes'))
  return jax.tree.map(lambda shape: 0.3 * random.normal(size=shape).astype(np.float32), shapes,
                      is_leaf=lambda x: isinstance(x, tuple))


@functools.partial(jax.jit, static_argnums=0)
def applied(config, params, *given):
  return config.model().apply({'params': params}, *given)[:2]


SIZES = dict(vocab=61, width=32, hidden=48, heads=4, length=32)
SMALLER = dense.Config(layers=1, kv_heads=2, head_width=8, **SIZES)
MODELS = {
    'a ring and sinks': (dataclasses.replace(SMALLER, attention=AttentionStyle(
        patterns=(Pattern(window=6, softcap=5.0),), sinks=True)), ('decode_tpu', 'decode_gpu'), 3),
    'latents': (latent_moe.Config(layers=1, dense_layers=0, **SIZES), ('decode_tpu',), 2),
}


@pytest.mark.parametrize('kind', MODELS)
def test_models_decode_with_it(kind):
  """Behind prompts of different lengths, padded on the left; one row's step is padded too."""
  config, names, count = MODELS[kind]
  params = weights(config)
  tokens_BT = np.random.default_rng(6).integers(0, config.vocab, (2, 17)).astype(np.int32)
  real_BT = (np.arange(17)[None] >= np.array([[11], [0]])).astype(np.int32)
  _, past = applied(config, params, tokens_BT, real_BT, config.cache(2, 24))
  real_BT = np.ones((2, count), np.int32)
  real_BT[1, 1:] = 0
  of = lambda name: dataclasses.replace(config, execution=Execution(decoding=name))
  step = lambda name: np.asarray(applied(of(name), params, tokens_BT[:, :count], real_BT, past)[0])[real_BT > 0]
  expected = step('reference')
  for name in names:
    np.testing.assert_allclose(step(name), expected, rtol=2e-5, atol=2e-5)


def test_generation_is_the_same():
  params, prompts = weights(SMALLER), [[5, 3, 9], list(range(12, 32))]
  of = lambda name: dataclasses.replace(SMALLER, execution=Execution(decoding=name))
  written = lambda name: generate.generate(of(name), params, prompts, new=6, temperature=0.0)
  assert written('decode_tpu') == written('reference')


def test_what_cannot_be_done_is_refused():
  q, k, v, _ = (jnp.asarray(x) for x in arrays(T=17))
  held = Held(k, v, jnp.asarray(LENGTHS))
  with pytest.raises(ValueError, match=r"'tpu' cannot do more than 16 queries a row; 'reference' can"):
    kernel.partial(q, held, Pattern(), implementation='tpu')
  with pytest.raises(ValueError, match=r"'tpu' cannot do pages but of a multiple of 8 slots; 'gpu', 'reference' can"):
    kernel.partial(q[:, :1], paged(held, 4), Pattern(), implementation='tpu')
  shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.bfloat16)
  latents = Held(shape(99, 1, 16, 640), None, shape(1024), shape(1024, 512), value_width=512)
  assert decode_attention_tpu.lacking(shape(1024, 12, 1, 128, 576), latents) == [
      'a table of more than 245760 pages', '1536 queries of width 576 a row']
  with pytest.raises(ValueError, match='cannot do keys and values of another type than queries'):
    kernel.partial(q[:, :1].astype(jnp.bfloat16), held, Pattern(), implementation='gpu')
  with pytest.raises(ValueError, match="implementation='flash' is none of"):
    kernel.partial(q, held, Pattern(), implementation='flash')
  eighth = eight(np.asarray(k), np.asarray(v), jnp.int8)
  for wrong, message in ((held.replace(k=k[:, :1]), 'queries of K=2 heads of width 8, and keys'),
                         (held.replace(length_B=None), 'give length_B or place_BS'),
                         (held.replace(length_B=None, place_BS=held.places_BS()), 'needs the place_BT of queries'),
                         (held.replace(v=None), 'give v, or the value_width'),
                         (held.replace(v=None, value_width=9), 'value_width=9 must lie between 1 and the width 8'),
                         (eighth.replace(v_scale=None), 'v is int8 and v_scale None'),
                         (held.replace(k_scale=eighth.k_scale), 'k is float32 and k_scale given'),
                         (eighth.replace(k_scale=jnp.ones((4, 2, 1))), 'one a token and key head'),
                         (held.replace(v=v[:, :, :9]), 'only their widths may differ')):
    with pytest.raises(ValueError, match=message):
      kernel.partial(q[:, :1], wrong, Pattern())
  with pytest.raises(ValueError, match='is no multiple of 8'):
    decode_attention_tpu.attention(q, held, Pattern(), held.queries_BT(17), sizes_of=decode_attention_tpu.Sizes(12))
  with pytest.raises(ValueError, match=r"'decode_gpu' cannot do slopes; 'reference' can"):
    kernel.of_step(q[:, :1], held, ['slopes'], 'decode_gpu')
  with pytest.raises(ValueError, match=r"Execution.decoding='gpu' must be 'auto' or one of"):
    Execution(decoding='gpu')


def lowered(q, held, place_BT):
  """The text of a step for an H100 that is not there."""
  attend = lambda *given: decode_attention_gpu.attention(*given[:2], Pattern(window=100), given[2], interpret=False)
  traced = jax.jit(attend).trace
  if jax.__version_info__ < (0, 12):
    return traced(q, held, place_BT).lower(lowering_platforms=('cuda',)).as_text()
  from jax._src.mesh import AbstractDevice  # jax 0.12 asks which GPU it is, and has no public name for one
  device = AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
    return traced(q, held, place_BT).lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated:DeprecationWarning')  # jax 0.12
@pytest.mark.parametrize('kind', ['bfloat16', 'int8', 'float8_e4m3fn', 'latent'])
def test_the_gpu_kernel_lowers_without_a_gpu(kind):
  shape = lambda dtype, *axes: jax.ShapeDtypeStruct(axes, dtype)
  dtype = jnp.dtype('bfloat16' if kind == 'latent' else kind)
  K, G, H, W = (1, 128, 576, 512) if kind == 'latent' else (8, 4, 128, None)
  pages = shape(dtype, 64, K, 16, H)
  scale = shape(jnp.float32, 64, K, 16) if dtype.itemsize == 1 else None
  held = Held(pages, None if W else pages, shape(jnp.int32, 8), shape(jnp.int32, 8, 32), scale, scale, value_width=W)
  text = lowered(shape(jnp.bfloat16, 8, 2, K, G, H), held, shape(jnp.int32, 8, 2))
  assert 'decode_attention' in text
