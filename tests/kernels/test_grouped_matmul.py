"""Every implementation of the grouped product equals it in loops of float64: values and both gradients."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.kernels import grouped_matmul as kernel
from lmlib.kernels import grouped_matmul_blocked

pytestmark = pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated:DeprecationWarning')  # jax 0.12
M, D, F, E = 23, 5, 7, 4
SIZES = {'uneven': (11, 2, 3, 7), 'empty groups': (0, 13, 0, 10), 'rows beyond': (5, 0, 9, 4),
         'one group': (0, 0, 23, 0), 'no rows': (0, 0, 0, 0)}
implementations = pytest.mark.parametrize('implementation', ['auto', *kernel.IMPLEMENTATIONS])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(grouped_matmul_blocked, 'LEAST', 4)  # so that few rows make several blocks
  monkeypatch.setattr(grouped_matmul_blocked, 'MOST', 4)


def arrays():
  random = np.random.default_rng(0)
  return tuple(random.normal(size=shape).astype(np.float32) for shape in ((M, D), (E, D, F), (M, F)))


@functools.cache
def both(implementation):
  """(out, dx, dw) from x, w, the gradient of out, and sizes."""
  most = M if implementation == 'padded' else None

  @jax.jit
  def computed(x, w, dout, sizes_E):
    multiply = lambda x, w: kernel.grouped_matmul(x, w, sizes_E, most=most, implementation=implementation)
    out, back = jax.vjp(multiply, x, w)
    return out, *back(dout)

  return computed


def loops(x, w, dout, sizes):
  x, w, dout = (y.astype(np.float64) for y in (x, w, dout))
  out, dx, dw, start = np.zeros((M, F)), np.zeros_like(x), np.zeros_like(w), 0
  for e, size in enumerate(sizes):
    rows = slice(start, start + size)
    out[rows], dx[rows], dw[e] = x[rows] @ w[e], dout[rows] @ w[e].T, x[rows].T @ dout[rows]
    start += size
  return out, dx, dw


@implementations
@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients(implementation, sizes):
  given = arrays()
  for found, expected in zip(both(implementation)(*given, jnp.asarray(sizes)), loops(*given, sizes)):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # float32: sums of some ten products


def test_all_groups_of_one_size_are_one_batch_of_products():
  x, w, _ = arrays()
  found = kernel.grouped_matmul(x[:20], w, jnp.full(E, 5), most=5)
  np.testing.assert_allclose(found, np.einsum('emd,edf->emf', x[:20].reshape(E, 5, D), w).reshape(20, F), rtol=1e-5,
                             atol=1e-5)


def test_what_cannot_be_done_is_refused():
  x, w, _ = arrays()
  with pytest.raises(ValueError, match=r"'padded' cannot do groups without `most`; .*'ragged'.* can"):
    kernel.grouped_matmul(x, w, jnp.zeros(E, int), implementation='padded')
  with pytest.raises(ValueError, match="implementation='dense' is none of"):
    kernel.grouped_matmul(x, w, jnp.zeros(E, int), implementation='dense')
