"""Cross-entropy and log-probabilities equal the equations, written in float64: values and gradients, by any means."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding
from lmlib.eval import loglikelihood
from lmlib.kernels import cross_entropy as kernel
from lmlib.kernels import cross_entropy_chunked
from lmlib.kernels.cross_entropy import Logits
from lmlib.models import dense, protocol
from lmlib.nn.stack import Execution
from lmlib.train import losses

B, T, D, V = 3, 10, 8, 19
Z_LOSS = 0.1
CLOSE = 2e-6  # of norms: of sums of some ten float32 products that are each rounded by 6e-8
implementations = pytest.mark.parametrize('name', sorted(kernel.IMPLEMENTATIONS))
# Positions at once; of 12 the last chunk is not full. The others have no chunks.
chunked = pytest.mark.parametrize(('name', 'chunk'), [
    ('reference', 512), ('tpu', 512), *(('chunked', chunk) for chunk in (1, 12, 15, 512))])


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


def computed(name, given, z_loss=None, softcap=None):
  """Sums, and the gradients of the first."""
  def loss(x_BTD, w_DV):
    sums = kernel.cross_entropy(x_BTD, w_DV, *given[2:], z_loss, Logits(softcap, implementation=name))
    return sums[0], sums

  gradients, sums = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*given[:2])
  return sums, gradients


def assert_close(found, expected, close=CLOSE):
  for i, (a, b) in enumerate(zip(found, expected, strict=True)):
    error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
    assert error < close, (i, error)


@chunked
@pytest.mark.parametrize('settings', [(None,), (Z_LOSS,), (Z_LOSS, 2.0)])
def test_sums_and_gradients(name, chunk, settings, monkeypatch):
  monkeypatch.setattr(cross_entropy_chunked, 'CHUNK', chunk)
  sums, gradients = computed(name, arrays(), *settings)
  sums_, gradients_ = loops(*arrays(), settings[0] or 0.0, *settings[1:])
  assert_close((*sums, *gradients), (*sums_, *gradients_))


@implementations
def test_without_a_gradient_the_sums_are_the_same(name):
  plain = jax.jit(lambda *given: kernel.cross_entropy(*given, Z_LOSS, Logits(implementation=name)))(*arrays())
  np.testing.assert_allclose(plain, computed(name, arrays(), Z_LOSS)[0], rtol=1e-6)  # another order


@implementations
def test_only_the_total_has_a_gradient(name):
  given = arrays()
  tripled = lambda x, w: (lambda sums: 3.0 * sums[0] + sums[1] + sums[2])(
      kernel.cross_entropy(x, w, *given[2:], None, Logits(implementation=name)))
  scaled = jax.jit(jax.grad(tripled, argnums=(0, 1)))(*given[:2])
  for a, b in zip(scaled, computed(name, given)[1]):
    np.testing.assert_allclose(a, 3 * b, rtol=1e-5, atol=1e-6)  # float32, one more product


@implementations
def test_large_logits_stay_finite(name):
  x_BTD, *rest = arrays()
  sums, gradients = computed(name, (1e3 * x_BTD, *rest))
  assert np.isfinite(sums).all()
  assert all(np.isfinite(x).all() for x in gradients)


@implementations
def test_without_weight_there_is_nothing(name):
  """Whatever the targets are; one outside of the vocabulary that weighs something is seen in the sums."""
  x_BTD, w_DV, targets_BT, weight_BT = arrays()
  outside_BT = np.where(np.arange(T)[None] == 2, np.array([[-100], [-1], [V]]), targets_BT)
  sums, gradients = computed(name, (x_BTD, w_DV, outside_BT, 0 * weight_BT), Z_LOSS)
  np.testing.assert_array_equal(sums, 0)
  assert not any(np.any(x) for x in gradients)
  for b in range(B):
    weighed_BT = np.where(np.arange(T)[None] == 2, np.eye(B, dtype=np.float32)[b][:, None], weight_BT)
    assert np.isnan(computed(name, (x_BTD, w_DV, outside_BT, weighed_BT), Z_LOSS)[0][:2]).all()


@implementations
def test_bfloat16_sums_in_float32(name):
  x_BTD, *rest = arrays()
  x_BTD = jnp.asarray(x_BTD, jnp.bfloat16)
  sums, (dx_BTD, dw_DV) = computed(name, (x_BTD, *rest))
  assert {x.dtype.name for x in sums} == {'float32'}
  assert (dx_BTD.dtype, dw_DV.dtype) == (jnp.bfloat16, jnp.float32)
  rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
  expected, _ = loops(rounded(x_BTD), rounded(rest[0]), *rest[1:], 0.0)
  np.testing.assert_allclose(sums, expected, rtol=1e-5)  # w is rounded where it multiplies; sums are not


@pytest.mark.parametrize('context', [2, 8])
def test_chunks_of_rows_that_a_layout_splits(context, monkeypatch):
  """A chunk has positions of every part of a row; the last is not full; 8 devices cannot split a row of ten."""
  monkeypatch.setattr(cross_entropy_chunked, 'CHUNK', 12)
  given = arrays()
  with sharding.use(sharding.Layout(data=1, context=context), jax.devices()[:context]):
    sums, gradients = computed('chunked', given, Z_LOSS)
    lse_BT, target_BT, _, _ = jax.jit(kernel.facts)(*given[:3])
  sums_, gradients_ = loops(*given, Z_LOSS)
  assert_close((*sums, *gradients), (*sums_, *gradients_))
  logits_BTV = given[0].astype(np.float64) @ given[1]
  np.testing.assert_allclose(lse_BT, np.log(np.exp(logits_BTV).sum(-1)), rtol=1e-5)
  np.testing.assert_allclose(target_BT, np.take_along_axis(logits_BTV, given[2][..., None], -1)[..., 0], atol=1e-5)


def plain(x_BTD, w_DV, targets_BT, slope_BT, slope_of_entropy_BT, softcap, temperature):
  """logp, entropy and the gradients dx and dw of any use of them, in float64; no token where a target is negative."""
  x_BTD, w_DV = (np.asarray(y, np.float64) for y in (x_BTD, w_DV))
  shape = targets_BT.shape
  logp_BT, entropy_BT = np.zeros(shape), np.zeros(shape)
  dx_BTD, dw_DV = np.zeros_like(x_BTD), np.zeros_like(w_DV)
  for b, t in zip(*np.nonzero(targets_BT >= 0)):
    capped_V = softcap * np.tanh(x_BTD[b, t] @ w_DV / softcap)
    logits_V, target = capped_V / temperature, targets_BT[b, t]
    logp_V = logits_V - np.log(np.exp(logits_V).sum())
    prob_V = np.exp(logp_V)
    logp_BT[b, t], entropy_BT[b, t] = logp_V[target], -(prob_V * logp_V).sum()
    slope_V = slope_BT[b, t] * (np.eye(len(prob_V))[target] - prob_V)
    slope_V -= slope_of_entropy_BT[b, t] * prob_V * (logp_V + entropy_BT[b, t])
    slope_V *= (1 - (capped_V / softcap)**2) / temperature
    dx_BTD[b, t] = w_DV @ slope_V
    dw_DV += np.outer(x_BTD[b, t], slope_V)
  return logp_BT, entropy_BT, dx_BTD, dw_DV


def pulled(given, slopes, logits):
  """Log-probabilities, entropies, and their gradients with slopes of each position."""
  def both(x_BTD, w_DV):
    out, back = jax.vjp(lambda x, w: kernel.log_probs(x, w, given[2], logits, entropy=True), x_BTD, w_DV)
    return *out, *back(slopes)

  return jax.jit(both)(*given[:2])


@chunked
def test_log_probabilities_and_entropies(name, chunk, monkeypatch):
  """And their gradients, whatever follows; without the entropies the others are the same."""
  monkeypatch.setattr(cross_entropy_chunked, 'CHUNK', chunk)
  x_BTD, w_DV, targets_BT, _ = arrays()
  targets_BT = np.where(np.arange(T)[None] < 2, -1, targets_BT)
  slopes = tuple(np.random.default_rng(1).normal(size=(2, B, T)).astype(np.float32))
  logits = Logits(3.0, 0.7, implementation=name)
  found = pulled((x_BTD, w_DV, targets_BT), slopes, logits)
  assert_close(found, plain(x_BTD, w_DV, targets_BT, *slopes, 3.0, 0.7))
  assert not any(np.any(y[:, :2]) for y in found[:3])
  only = jax.jit(jax.grad(lambda x: (kernel.log_probs(x, w_DV, targets_BT, logits) * slopes[0]).sum()))(x_BTD)
  assert_close([only], [plain(x_BTD, w_DV, targets_BT, slopes[0], 0 * slopes[1], 3.0, 0.7)[2]])


def test_a_token_beyond_the_vocabulary_has_no_probability():
  x_BTD, w_DV, targets_BT, _ = arrays()
  beyond_BT = np.arange(T)[None] == np.arange(B)[:, None]
  logp_BT = kernel.log_probs(x_BTD, w_DV, np.where(beyond_BT, V, targets_BT))
  np.testing.assert_array_equal(np.isnan(logp_BT), beyond_BT)


def test_one_setting_chooses_for_a_model():
  """For its training and for its evaluation."""
  config = dense.Config(vocab=32, width=16, layers=1, heads=1, kv_heads=1)
  tokens = np.random.default_rng(5).integers(0, 32, (1, 13)).astype(np.int32)
  batch = {'tokens_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weight_BT': np.ones((1, 12), np.float32),
           'segments_BT': np.ones((1, 12), np.int32)}
  params = protocol.new(config, jax.random.key(0))
  asked = dataclasses.replace(config, execution=Execution(loss='tpu'))
  nats = [float(jax.jit(losses.NextToken().of(each))(params, batch)[0]) for each in (config, asked)]
  request = [loglikelihood.Request(tuple(tokens[0, :1].tolist()), tuple(tokens[0, 1:].tolist()))]
  nats += [-loglikelihood.score(asked, params, request, batch=1)[0].logp]
  np.testing.assert_allclose(nats, nats[0], rtol=1e-6)
  assert protocol.logits(asked) == Logits(tied=True, implementation='tpu')
  traced = str(jax.make_jaxpr(losses.NextToken().of(asked))(params, batch))
  assert 'cross_entropy_forward' in traced
  assert 'cross_entropy_forward' not in str(jax.make_jaxpr(losses.NextToken().of(config))(params, batch))


def test_what_cannot_be_done_is_refused():
  x_BTD, *rest = arrays()
  with pytest.raises(ValueError, match=r"'tpu' cannot do arrays but of float32 or bfloat16; 'chunked', 're"):
    kernel.cross_entropy(x_BTD.astype(np.float16), *rest, None, Logits(implementation='tpu'))
  with pytest.raises(ValueError, match='a width of 100001, of which no tile fits on the chip'):
    kernel.log_probs(np.zeros((1, 1, 100001), np.float32), np.zeros((100001, 2), np.float32), np.zeros((1, 1), int),
                     Logits(implementation='tpu'))
  with pytest.raises(ValueError, match=r"Logits.implementation='liger' must be 'auto' or one of"):
    Logits(implementation='liger')
  with pytest.raises(ValueError, match=r"Execution.loss='liger' must be 'auto' or one of"):
    Execution(loss='liger')
  with pytest.raises(ValueError, match=r'Logits.temperature=0.0 must be positive'):
    Logits(temperature=0.0)
