"""Rotary positions: what a rotation keeps, and that only distances count."""
import jax
import numpy as np

from lmlib.nn import positions

B, T, N, H, BASE = 2, 6, 3, 8, 100.0
POSITIONS_BT = np.array([[0, 1, 2, 3, 4, 5], [7, 0, 50, 1000, 3, 3]], np.int32)
turned = jax.jit(lambda x_BTNH, positions_BT, base: positions.rotate(
    x_BTNH, positions.Rope(base).turns(positions_BT, H)), static_argnums=2)


def array(seed: int):
  return np.random.default_rng(seed).normal(size=(B, T, N, H)).astype(np.float32)


def test_it_is_a_product_of_complex_numbers():
  """(x[h] + i x[h + H/2]) exp(i position base^(-2h/H)), in float64."""
  x_BTNH = array(0)
  z_BTNh = x_BTNH[..., :H // 2] + 1j * x_BTNH[..., H // 2:].astype(np.float64)
  angle_BTh = POSITIONS_BT[..., None] * BASE ** (-2 * np.arange(H // 2) / H)
  z_BTNh = z_BTNh * np.exp(1j * angle_BTh)[:, :, None]
  expected_BTNH = np.concatenate([z_BTNh.real, z_BTNh.imag], -1)
  # float32: an angle of 1000 is rounded by 1000 * 6e-8.
  np.testing.assert_allclose(turned(x_BTNH, POSITIONS_BT, BASE), expected_BTNH, atol=3e-4)


def test_it_keeps_lengths_and_leaves_position_0():
  x_BTNH = array(0)
  y_BTNH = turned(x_BTNH, POSITIONS_BT, BASE)
  lengths = lambda z_BTNH: np.linalg.norm(z_BTNH, axis=-1)
  np.testing.assert_allclose(lengths(y_BTNH), lengths(x_BTNH), rtol=1e-5)  # float32
  np.testing.assert_array_equal(y_BTNH[0, 0], x_BTNH[0, 0])
  assert np.abs(y_BTNH[0, 1] - x_BTNH[0, 1]).max() > 0.1


def test_only_distances_count():
  q_BTNH, k_BTNH = array(0), array(1)

  def scores(q_shift: int, k_shift: int):
    q, k = turned(q_BTNH, POSITIONS_BT + q_shift, BASE), turned(k_BTNH, POSITIONS_BT + k_shift, BASE)
    return np.einsum('BTNH,BSNH->BNTS', q, k)

  np.testing.assert_allclose(scores(40, 40), scores(0, 0), atol=1e-3)  # angles of up to 1000 in float32
  assert np.abs(scores(1, 0) - scores(0, 0)).max() > 0.1


def test_the_type_stays():
  assert turned(array(0).astype('bfloat16'), POSITIONS_BT, BASE).dtype == 'bfloat16'
