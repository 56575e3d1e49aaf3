"""Cross-entropy equals the equation, written in float64: sums and gradients, in any chunks."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.kernels import cross_entropy as kernel

B, T, D, V = 3, 10, 8, 19
Z_LOSS = 0.1
implementations = pytest.mark.parametrize('function', [kernel.cross_entropy, kernel.reference])
# Positions at once; of 12 the last chunk is not full. The reference has no chunks.
chunked = pytest.mark.parametrize(('function', 'chunk'), [
    (kernel.reference, None), *((kernel.cross_entropy, chunk) for chunk in (1, 12, 15, 512))])


def arrays():
  """x, w, targets and weights, some of them 0."""
  random = np.random.default_rng(0)
  weight_BT = random.random((B, T)) * (random.random((B, T)) < 0.8)
  return (random.normal(size=(B, T, D)).astype(np.float32), random.normal(size=(D, V)).astype(np.float32),
          random.integers(0, V, (B, T), np.int32), weight_BT.astype(np.float32))


def loops(x_BTD, w_DV, targets_BT, weight_BT, z_loss, softcap=1e30):
  """((total, nats, correct), (dx, dw) of total), in float64."""
  x_BTD, w_DV, weight_BT = (y.astype(np.float64) for y in (x_BTD, w_DV, weight_BT))
  total = nats = correct = 0.0
  dx_BTD, dw_DV = np.zeros_like(x_BTD), np.zeros_like(w_DV)
  for b, t in np.ndindex(B, T):
    logits_V = softcap * np.tanh(x_BTD[b, t] @ w_DV / softcap)
    lse, target, weight = np.log(np.exp(logits_V).sum()), targets_BT[b, t], weight_BT[b, t]
    nats += weight * (lse - logits_V[target])
    total += weight * (lse - logits_V[target] + z_loss * lse**2)
    correct += weight * (logits_V.argmax() == target)
    slope_V = weight * ((1 + 2 * z_loss * lse) * np.exp(logits_V - lse) - np.eye(V)[target])
    slope_V *= 1 - (logits_V / softcap)**2
    dx_BTD[b, t] = w_DV @ slope_V
    dw_DV += np.outer(x_BTD[b, t], slope_V)
  return (total, nats, correct), (dx_BTD, dw_DV)


def computed(function, given, *settings):
  def loss(x_BTD, w_DV):
    sums = function(x_BTD, w_DV, *given[2:], *settings)
    return sums[0], sums

  gradients, sums = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*given[:2])
  return sums, gradients


@chunked
@pytest.mark.parametrize('settings', [(None,), (Z_LOSS,), (Z_LOSS, 2.0)])
def test_sums_and_gradients(function, chunk, settings, monkeypatch):
  monkeypatch.setattr(kernel, 'CHUNK', chunk)
  sums, gradients = computed(function, arrays(), *settings)
  sums_, gradients_ = loops(*arrays(), settings[0] or 0.0, *settings[1:])
  # float32 sums of 30 positions of 19 logits.
  np.testing.assert_allclose(sums, sums_, rtol=1e-5)
  for name, a, b in zip(('dx', 'dw'), gradients, gradients_):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=name)


@implementations
def test_without_a_gradient_the_sums_are_the_same(function):
  plain = jax.jit(lambda *given: function(*given, Z_LOSS))(*arrays())
  np.testing.assert_allclose(plain, computed(function, arrays(), Z_LOSS)[0], rtol=1e-6)  # another order


@implementations
def test_a_gradient_is_scaled_by_what_follows(function):
  given = arrays()
  tripled = lambda x, w: 3.0 * function(x, w, *given[2:], None)[0]
  scaled = jax.jit(jax.grad(tripled, argnums=(0, 1)))(*given[:2])
  for a, b in zip(scaled, computed(function, given, None)[1]):
    np.testing.assert_allclose(a, 3 * b, rtol=1e-5, atol=1e-6)  # float32, one more product


@implementations
def test_large_logits_stay_finite(function):
  x_BTD, *rest = arrays()
  sums, gradients = computed(function, (1e3 * x_BTD, *rest), None)
  assert np.isfinite(sums).all()
  assert all(np.isfinite(x).all() for x in gradients)


@implementations
def test_without_weight_there_is_nothing(function):
  x_BTD, w_DV, targets_BT, weight_BT = arrays()
  sums, gradients = computed(function, (x_BTD, w_DV, targets_BT, 0 * weight_BT), Z_LOSS)
  np.testing.assert_array_equal(sums, 0)
  assert not any(np.any(x) for x in gradients)


@implementations
def test_bfloat16_sums_in_float32(function):
  x_BTD, *rest = arrays()
  x_BTD = jnp.asarray(x_BTD, jnp.bfloat16)
  sums, (dx_BTD, dw_DV) = computed(function, (x_BTD, *rest), None)
  assert {x.dtype.name for x in sums} == {'float32'}
  assert (dx_BTD.dtype, dw_DV.dtype) == (jnp.bfloat16, jnp.float32)
  rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
  expected, _ = loops(rounded(x_BTD), rounded(rest[0]), *rest[1:], 0.0)
  np.testing.assert_allclose(sums, expected, rtol=1e-5)  # w is rounded where it multiplies; sums are not
