"""Quantised products equal those of the numbers that the bits stand for, in float64: values and gradients of x."""
from hypothesis import given, settings, strategies
import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding
from lmlib.kernels import quantised_matmul as kernel
from lmlib.kernels import quantised_matmul_tpu
from lmlib.quant import integers

M, D, F = 21, 256, 40
TILES = quantised_matmul_tpu.Tiles(16, 64, 128)
CLOSE = {'float32': 2e-6, 'bfloat16': 4e-3}  # of norms: float32 sums; w and out each rounded once to 8 bits
# (type of w, rows of a block or None for all, zero point)
WEIGHTS = [('int8', None, False), ('int8', None, True), ('int8', 32, False), ('int8', 128, True), ('int4', None, False),
           ('int4', 32, True), ('int4', 64, False), ('float8_e4m3fn', None, False), ('float8_e4m3fn', 64, False)]
# Of the kernel with small tiles, of the operation, and of that on a simulated TPU.
SIMULATED = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')
small = lambda *case, interpret=True: quantised_matmul_tpu.quantised_matmul(*case, tiles=TILES, interpret=interpret)
MULTIPLY = {'tpu': small, 'reference': kernel.reference}


def weights(name, block, zero, D=D, F=F, scale='float32'):
  """(w, scale, zero, w in float64) of random integers, or of numbers in 8 bits."""
  random, Z = np.random.default_rng(1), 1 if block is None else D // block
  if name == 'float8_e4m3fn':
    w_DF = jnp.asarray(random.normal(size=(D, F)), name)
  else:
    most = jnp.iinfo(name)
    w_DF = jnp.asarray(random.integers(most.min, most.max + 1, (D, F)), name)
  scale_ZF = jnp.asarray(random.uniform(0.01, 0.02, (Z, F)), scale)
  zero_ZF = jnp.asarray(random.integers(-8, 8, (Z, F)), scale) if zero else None
  wide = lambda y_ZF: np.repeat(np.asarray(y_ZF).astype(np.float64), D // Z, 0)
  w64_DF = wide(scale_ZF) * (np.asarray(w_DF).astype(np.float64) - (wide(zero_ZF) if zero else 0))
  return w_DF, scale_ZF, zero_ZF, w64_DF


def normal(*shape, dtype='float32', seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def off(found, expected, size=None):
  """The error's norm by that of `size`, or of what is expected."""
  return np.linalg.norm(np.asarray(found).astype(np.float64) - expected) / np.linalg.norm(
      expected if size is None else size)


def both(multiply, x_MD, dout_MF, *case):

  def computed(x_MD, dout_MF):
    out, back = jax.vjp(lambda x_MD: multiply(x_MD, *case), x_MD)
    return out, *back(dout_MF)

  return jax.jit(computed)(x_MD, dout_MF)


@pytest.mark.parametrize('dtype', CLOSE)
@pytest.mark.parametrize('said', WEIGHTS, ids=str)
@pytest.mark.parametrize('name', MULTIPLY)
def test_floats_with_weights_of_few_bits(name, said, dtype):
  *case, w64 = weights(*said)
  x, dout = normal(M, D, dtype=dtype), normal(M, F, dtype=dtype, seed=2)
  rows_M = jnp.linspace(0.5, 2, M)
  out, dx = both(MULTIPLY[name], x, dout, *case, rows_M)
  assert out.dtype == dx.dtype == dtype
  x64, dout64, rows = (np.asarray(y).astype(np.float64) for y in (x, dout, rows_M[:, None]))
  assert off(out, rows * (x64 @ w64)) < CLOSE[dtype]
  assert off(dx, rows * dout64 @ w64.T) < CLOSE[dtype]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(strategies.integers(1, 40), strategies.sampled_from([(6, 32), (3, 50), (1, 300), (5, 8), (2, 256), (1, 7)]),
       strategies.integers(1, 300), strategies.booleans())
def test_any_shape(M, blocks, F, zero):
  """Axes that end inside a tile; blocks that are wider than a tile, that fill it and that do not."""
  (Z, block), D = blocks, blocks[0] * blocks[1]
  *case, w64 = weights('int8', block if Z > 1 else None, zero, D, F)
  x, dout = normal(M, D), normal(M, F, seed=2)
  out, dx = both(small, x, dout, *case)
  for found, y, w in ((out, x, w64), (dx, dout, w64.T)):
    y = np.asarray(y, np.float64)
    # One sum may be near zero by chance: the root of its summed squares is how large it is without such luck.
    assert off(found, y @ w, np.sqrt(y**2 @ w**2)) < CLOSE['float32']


@pytest.mark.parametrize('shape', [(21, 256, 40), (3, 300, 130)], ids=str)
@pytest.mark.parametrize('w', ['int8', 'int4'])
@pytest.mark.parametrize('name', MULTIPLY)
def test_products_of_integers_are_exact(name, w, shape):
  M, D, F = shape
  random = np.random.default_rng(0)
  x = random.integers(-127, 128, (M, D)).astype(np.int8)
  w_DF, scale_ZF, *_ = weights(w, None, False, D, F)
  whole = x.astype(np.int64) @ np.asarray(w_DF).astype(np.int64)
  assert abs(whole).max() < 2**24  # all of which are float32 numbers
  found = MULTIPLY[name](jnp.asarray(x), w_DF, jnp.ones((1, F)), None, None)
  np.testing.assert_array_equal(np.asarray(found), whole)
  rows_M = jnp.linspace(0.01, 0.02, M)
  found = MULTIPLY[name](jnp.asarray(x), w_DF, scale_ZF, None, rows_M)
  assert off(found, whole * np.asarray(scale_ZF, np.float64) * np.asarray(rows_M, np.float64)[:, None]) < 2e-7
  half = MULTIPLY[name](jnp.asarray(x), w_DF, scale_ZF.astype('bfloat16'), None, rows_M)
  assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize('name', MULTIPLY)
def test_sums_of_integers_are_longer_than_float32(name):
  """Products of one sign and then of the other: half of each sum is beyond 2**24, all of it is not."""
  random, D = np.random.default_rng(0), 3000
  x, w = (random.integers(100, 128, shape).astype(np.int8) for shape in ((3, D), (D, 5)))
  x[:, D // 2:] *= -1
  whole = x.astype(np.int64) @ w.astype(np.int64)
  assert abs(whole).max() < 2**24 < (x[:, :D // 2].astype(np.int64) @ w[:D // 2].astype(np.int64)).min()
  found = MULTIPLY[name](jnp.asarray(x), jnp.asarray(w), jnp.ones((1, 5)), None, None)
  np.testing.assert_array_equal(np.asarray(found), whole)


@pytest.mark.parametrize('shape', [(21, 256, 40), (3, 300, 130)], ids=str)
@pytest.mark.parametrize('name', MULTIPLY)
def test_floats_of_eight_bits(name, shape):
  M, D, F = shape
  x, rows_M = integers.rows(normal(M, D), jnp.float8_e4m3fn)
  w_DF, scale_ZF, _, w64 = weights('float8_e4m3fn', None, False, D, F)
  found = MULTIPLY[name](x, w_DF, scale_ZF, None, rows_M)
  expected = np.asarray(rows_M, np.float64)[:, None] * (np.asarray(x).astype(np.float64) @ w64)
  assert off(found, expected) < CLOSE['float32']


def test_eight_bits_with_blocks_are_the_references():
  """Integers of both sides, with scales and zero points along D."""
  w_DF, scale_ZF, zero_ZF, w64 = weights('int4', 64, True)
  x, rows_M = integers.rows(normal(M, D))
  case = x, w_DF, scale_ZF, zero_ZF
  expected = np.asarray(rows_M, np.float64)[:, None] * (np.asarray(x).astype(np.float64) @ w64)
  assert off(kernel.quantised_matmul(*case, x_scale_M=rows_M), expected) < CLOSE['float32']
  with pytest.raises(ValueError, match=r"'tpu' cannot do scales that change along D for x of 8 bits, zero points for x "
                                       r"of 8 bits; 'reference' can"):
    kernel.quantised_matmul(*case, x_scale_M=rows_M, implementation='tpu')


@pytest.mark.parametrize(('said', 'dtype'), [(('int8', 32, True), 'float32'), (('int4', None, False), 'bfloat16')],
                         ids=str)
def test_a_simulated_tpu_finds_no_race_and_nothing_that_is_not_written(said, dtype):
  *case, w64 = weights(*said, D=160, F=130)  # the axes end inside a tile
  x, dout = normal(M, 160, dtype=dtype), normal(M, 130, dtype=dtype, seed=2)
  try:
    found = both(lambda *case: small(*case, interpret=SIMULATED), x, dout, *case)
    out, dx = jax.block_until_ready(found)
    assert not interpret_pallas_call.races.races_found
  finally:
    pltpu.reset_tpu_interpret_mode_state()
  x64, dout64 = (np.asarray(y).astype(np.float64) for y in (x, dout))
  assert off(out, x64 @ w64) < CLOSE[dtype]
  assert off(dx, dout64 @ w64.T) < CLOSE[dtype]


def test_integers_on_a_simulated_tpu():
  x, w_DF = (np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8) for shape in ((M, 300), (300, 130)))
  try:
    found = np.asarray(small(jnp.asarray(x), jnp.asarray(w_DF), jnp.ones((1, 130)), interpret=SIMULATED))
    assert not interpret_pallas_call.races.races_found
  finally:
    pltpu.reset_tpu_interpret_mode_state()
  np.testing.assert_array_equal(found, x.astype(np.int64) @ w_DF.astype(np.int64))


def test_eight_devices_equal_one():
  *case, w64 = weights('int4', 64, True)
  x, dout, rows_M = normal(M, D), normal(M, F, seed=2), jnp.linspace(0.5, 2, M)
  multiply = lambda x, *case: kernel.quantised_matmul(x, *case, x_scale_M=rows_M, implementation='tpu')
  with sharding.use(sharding.Layout(data=2, tensor=4)):
    assert 'shard_map' in str(jax.make_jaxpr(multiply)(x, *case))
    out, dx = both(multiply, x, dout, *case)
  rows = np.asarray(rows_M, np.float64)[:, None]
  assert off(out, rows * (np.asarray(x, np.float64) @ w64)) < CLOSE['float32']
  assert off(dx, rows * np.asarray(dout, np.float64) @ w64.T) < CLOSE['float32']


@pytest.mark.parametrize('implementation', ['auto', *kernel.IMPLEMENTATIONS])
def test_adapters_over_quantised_weights_learn(implementation):
  """The gradients of a low-rank sum beside a quantised product pass through it to what lies before."""
  w = integers.quantised(normal(D, F) / 16, 4, 64)
  x_MD, a_DA, b_AF = normal(M, D, seed=3), normal(D, 2, seed=4) / 16, normal(2, F, seed=5)

  def loss(x_MD, a_DA, product):
    return ((product(x_MD) + x_MD @ a_DA @ b_AF)**2).sum()

  few = lambda x_MD: kernel.quantised_matmul(x_MD, w.values_DF, w.scale_ZF, w.zero_ZF, implementation=implementation)
  found = jax.grad(loss, (0, 1))(x_MD, a_DA, few)
  for one, other in zip(found, jax.grad(loss, (0, 1))(x_MD, a_DA, lambda x_MD: x_MD @ w.array())):
    assert off(one, np.asarray(other).astype(np.float64)) < 5e-6  # both sides in float32


def test_what_does_not_fit_is_refused():
  w_DF, scale_ZF, *_ = weights('int8', 64, False)
  x = normal(M, D)
  for words, case in {
      'scale is of shape': (x, w_DF, scale_ZF[:, 1:]), 'zero is of shape': (x, w_DF, scale_ZF, scale_ZF[:2]),
      '3 scales cannot cut a width of 256': (x, w_DF, scale_ZF[:3]), 'w is of float32': (x, normal(D, F), scale_ZF),
      'x is of float8_e4m3fn and w of int8': (x.astype('float8_e4m3fn'), w_DF, scale_ZF)}.items():
    with pytest.raises(ValueError, match=words):
      kernel.quantised_matmul(*case)
  with pytest.raises(ValueError, match="implementation='gpu' is none of"):
    kernel.quantised_matmul(x, w_DF, scale_ZF, implementation='gpu')
  with pytest.raises(ValueError, match="'tpu' cannot do x of float16; 'reference' can"):
    kernel.quantised_matmul(x.astype('float16'), w_DF, scale_ZF, implementation='tpu')
