"""The grouped product of GPUs, interpreted on a CPU, equals loops of float64, and is lowered for a GPU."""
import functools

from hypothesis import given, settings, strategies
import jax
from jax._src.mesh import AbstractDevice
import jax.numpy as jnp
from jax.sharding import AbstractMesh
import numpy as np
import pytest

from lmlib.kernels import grouped_matmul_gpu as kernel
from tests.kernels.test_grouped_matmul_tpu import CLOSE, arrays, check, loops

pytestmark = pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated:DeprecationWarning')  # jax 0.12
M, E = 39, 5
SMALL = kernel.Sizes(kernel.Tiles(16, 16, 16), kernel.Tiles(16, 16, 16))  # the last of every axis is cut off


@functools.partial(jax.jit, static_argnames='interpret')
def both(x, w, dout, sizes_E, interpret=True):
  multiply = lambda x, w: kernel.grouped_matmul(x, w, sizes_E, sizes_of=SMALL if interpret else None,
                                                interpret=interpret)
  out, back = jax.vjp(multiply, x, w)
  return out, *back(dout)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(strategies.lists(strategies.integers(0, M), min_size=E - 1, max_size=E - 1), strategies.integers(0, M))
def test_any_sizes(cuts, total):
  sizes, given_arrays = np.diff([0, *sorted(min(cut, total) for cut in cuts), total]), arrays()
  check(both(*given_arrays, jnp.asarray(sizes)), loops(*given_arrays, sizes))


@pytest.mark.parametrize('sizes', [(M, 0, 0, 0, 0), (0,) * E, (16, 16, 0, 0, 7)], ids=str)
@pytest.mark.parametrize('dtype', CLOSE)
def test_sizes_at_the_edges(sizes, dtype):
  given_arrays = arrays(dtype)
  check(both(*given_arrays, jnp.asarray(sizes)), loops(*given_arrays, sizes), dtype)


def test_numbers_outside_every_group_are_not_read():
  x, w, dout = arrays()
  sizes = (5, 0, 9, 4, 0)
  nobody = np.arange(M)[:, None] >= sum(sizes)
  found = both(jnp.where(nobody, jnp.nan, x), w, jnp.where(nobody, jnp.inf, dout), jnp.asarray(sizes))
  check(found, loops(x, w, dout, sizes))


@pytest.mark.parametrize('dtype', [*CLOSE, 'float16'])
def test_it_is_lowered_for_a_gpu(dtype):
  shape = jax.ShapeDtypeStruct
  M, D, F, E = 16384, 4096, 14336, 8
  h100 = AbstractMesh((), (), abstract_device=AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu'))
  with jax.sharding.use_abstract_mesh(h100):
    traced = both.trace(shape((M, D), dtype), shape((E, D, F), dtype), shape((M, F), dtype), shape((E,), jnp.int32),
                        interpret=False)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('@__gpu$xla.gpu.triton') == 3


def test_what_it_cannot_do_is_said():
  shape = jax.ShapeDtypeStruct
  sizes_E = shape((E,), jnp.int32)
  assert not kernel.lacking(shape((M, 8), jnp.float16), shape((E, 8, 8), jnp.float16), sizes_E)
  assert kernel.lacking(shape((M, 8), jnp.float16), shape((E, 8, 8), jnp.float32), sizes_E) == [
      'arrays but of float32, bfloat16 or float16, both alike']
  assert kernel.lacking(shape((M, 8), jnp.float16), shape((E, 8, 2**26), jnp.float16), sizes_E) == [
      'arrays of 2**31 numbers or more']
