"""The grouped product of TPUs, interpreted on a CPU, equals loops of float64: values and both gradients."""
import functools

from hypothesis import given, settings, strategies
import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import megablox
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.kernels import grouped_matmul
from lmlib.kernels import grouped_matmul_tpu as kernel

M, D, F, E = 39, 20, 24, 5
SMALL = kernel.Sizes(*[kernel.Tiles(16, 8, 16)] * 2, kernel.Tiles(8, 16, 8))  # several of every axis, the last cut off
CLOSE = {'float32': 2e-6, 'bfloat16': 4e-3}  # of norms: float32 sums, and one rounding to 8 bits


def arrays(dtype='float32', M=M, D=D, F=F, E=E):
  random = np.random.default_rng(0)
  return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in ((M, D), (E, D, F), (M, F)))


def loops(x, w, dout, sizes):
  x, w, dout = (np.asarray(y).astype(np.float64) for y in (x, w, dout))
  out, dx, dw, start = np.zeros(dout.shape), np.zeros_like(x), np.zeros_like(w), 0
  for e, size in enumerate(sizes):
    rows = slice(start, start + size)
    out[rows], dx[rows], dw[e] = x[rows] @ w[e], dout[rows] @ w[e].T, x[rows].T @ dout[rows]
    start += size
  return out, dx, dw


@functools.partial(jax.jit, static_argnames=('sizes_of', 'interpret'))
def both(x, w, dout, sizes_E, sizes_of=SMALL, interpret=True):
  multiply = lambda x, w: kernel.grouped_matmul(x, w, sizes_E, sizes_of=sizes_of, interpret=interpret)
  out, back = jax.vjp(multiply, x, w)
  return out, *back(dout)


def check(found, expected, dtype='float32'):
  for name, one, other in zip(('out', 'dx', 'dw'), found, expected):
    assert one.dtype == dtype, name
    off = np.linalg.norm(np.asarray(one).astype(np.float64) - other)
    assert off <= CLOSE[dtype] * np.linalg.norm(other), (name, off)  # NaN is not less


@settings(max_examples=40, deadline=None, derandomize=True)
@given(strategies.lists(strategies.integers(0, M), min_size=E - 1, max_size=E - 1), strategies.integers(0, M))
def test_any_sizes(cuts, total):
  bounds = [0, *sorted(min(cut, total) for cut in cuts), total]
  sizes, given_arrays = np.diff(bounds), arrays()
  check(both(*given_arrays, jnp.asarray(sizes)), loops(*given_arrays, sizes))


@pytest.mark.parametrize('sizes', [(M, 0, 0, 0, 0), (0, 0, M, 0, 0), (0,) * E, (16, 16, 0, 0, 7), (1,) * E,
                                   (0, 8, 0, 8, 0)], ids=str)
@pytest.mark.parametrize('dtype', CLOSE)
def test_sizes_at_the_edges(sizes, dtype):
  given_arrays = arrays(dtype)
  check(both(*given_arrays, jnp.asarray(sizes)), loops(*given_arrays, sizes), dtype)


@pytest.mark.parametrize(('shape', 'sizes'), [
    ((1, 3, 2, 1), (1,)), ((7, 130, 5, 3), (2, 0, 4)), ((150, 3, 300, 2), (5, 140)), ((0, 4, 4, 2), (0, 0))], ids=str)
def test_shapes_of_any_size_by_the_tiles_of_the_table(shape, sizes):
  given_arrays = arrays('float32', *shape)
  check(both(*given_arrays, jnp.asarray(sizes), sizes_of=None), loops(*given_arrays, sizes))


schedule = jax.jit(kernel.visits, static_argnames=('M', 'rows', 'groups'))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(strategies.lists(strategies.integers(0, 14), min_size=E, max_size=E), strategies.sampled_from((66, 70)))
def test_the_schedule_is_every_group_in_every_tile_once(sizes, rows):
  """Of 66 or 70 rows in tiles of 8."""
  tiles, ends = -(-rows // 8), np.minimum(np.cumsum(sizes), rows)
  pairs = [(row // 8, e, row % 8) for e, end in enumerate(ends) for row in range(ends[e - 1] if e else 0, end)]
  for groups in (False, True):
    tile, source, group, start, end = (np.asarray(x) for x in schedule(np.array(sizes), M=rows, rows=8, groups=groups))
    assert [(t, e, row) for t, e, a, b in zip(tile, group, start, end) for row in range(a, b)] == pairs
    order = group if groups else tile
    assert (np.diff(order) >= 0).all()  # what is written comes in one piece
    assert set(order) == set(range(E if groups else tiles))  # and all of it does
    assert (source[start < end] == tile[start < end]).all()


def test_numbers_outside_every_group_are_not_read():
  x, w, dout = arrays()
  sizes = (5, 0, 9, 4, 0)
  expected = loops(x, w, dout, sizes)
  nobody = np.arange(M)[:, None] >= sum(sizes)
  found = both(jnp.where(nobody, jnp.nan, x), w, jnp.where(nobody, jnp.inf, dout), jnp.asarray(sizes))
  check(found, expected)


@pytest.mark.parametrize(('sizes', 'dtype'), [((11, 0, 2, 3, 7), 'float32'), ((0, 0, 20, 0, 19), 'bfloat16'),
                                              ((0,) * E, 'float32')], ids=str)
def test_a_simulated_tpu_finds_no_race_and_nothing_that_is_not_written(sizes, dtype):
  given_arrays = arrays(dtype)
  simulator = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')
  try:
    found = jax.block_until_ready(both(*given_arrays, jnp.asarray(sizes), interpret=simulator))
    assert not interpret_pallas_call.races.races_found
  finally:
    pltpu.reset_tpu_interpret_mode_state()
  check(found, loops(*given_arrays, sizes), dtype)


def test_it_equals_megablox():
  """JAX's own kernel, which wants all rows in groups and whole tiles of them."""
  sizes, (x, w, _) = jnp.array([40, 0, 3, 80, 5], jnp.int32), arrays(M=128, D=128, F=128)
  theirs = megablox.gmm(x, w, sizes, jnp.float32, (64, 128, 128), interpret=True)
  ours = kernel.grouped_matmul(x, w, sizes, sizes_of=kernel.sizes(128, 128, 128, E, 'float32'), interpret=True)
  np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)  # float32 sums of 128 products


def test_rows_of_a_batch_are_done_one_by_one():
  x, w, dout = arrays()
  sizes = np.array([(11, 0, 2, 3, 7), (0, 0, 30, 0, 9)])
  found = jax.vmap(lambda x, sizes: both(x, w, dout, sizes))(jnp.stack([x, 2 * x]), jnp.asarray(sizes))
  for b, times in enumerate((1, 2)):
    check([y[b] for y in found], loops(times * x, w, dout, sizes[b]))


def test_what_it_cannot_do_is_said():
  x, w, _ = arrays()
  with pytest.raises(ValueError, match=r"cannot do arrays but of float32 or bfloat16, both alike; .*'ragged'.* can"):
    grouped_matmul.grouped_matmul(x, w.astype('bfloat16'), jnp.zeros(E, int), implementation='tpu')
  whole, half = (x, w, jnp.zeros(E, int)), (x.astype('float16'), w.astype('float16'), jnp.zeros(E, int))
  chosen = lambda case, platform, most=None: grouped_matmul.chosen(*case, most, platform=platform)
  assert [chosen(whole, platform) for platform in ('cpu', 'gpu', 'tpu')] == ['blocked', 'ragged', 'tpu']
  assert chosen(half, 'tpu') == 'ragged'
  assert chosen(whole, 'tpu', most=9) == 'padded'
