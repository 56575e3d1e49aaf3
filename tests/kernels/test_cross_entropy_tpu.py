"""The TPU's kernels of logits, interpreted on a CPU, equal the equations in float64: values and gradients."""
import functools

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding
from lmlib.kernels import cross_entropy as kernel
from lmlib.kernels import cross_entropy_tpu
from lmlib.kernels.cross_entropy import Logits
from lmlib.kernels.cross_entropy_tpu import Sizes, Tile

# Relative to the norm: of sums of some hundred products that are each rounded by 6e-8, or by 2^-9.
CLOSE = {'float32': 2e-6, 'bfloat16': 4e-3}
# Of each case its rows, positions, width and vocabulary, the block of D, and how logits are made.
CASES = {
    'whole tiles, D in two blocks': (1, 32, 256, 256, 128, Logits()),
    'a table, D in three blocks, ragged tokens and vocabulary': (2, 11, 384, 300, 128, Logits(tied=True)),
    'soft-cap and temperature, D in pieces, ragged vocabulary': (2, 9, 1024, 140, 1024, Logits(4.0, 0.7)),
    'a table, all of an odd D': (3, 7, 37, 130, 37, Logits(4.0, 1.5, tied=True)),
    'a vocabulary of less than a tile': (1, 5, 16, 3, 16, Logits()),
}


def arrays(B, T, D, V, dtype: str = 'float32'):
  """x, w, targets, and what follows: slopes of lse, of the target's logit, of the highest and of the mean."""
  random = np.random.default_rng(B * T + D + V)
  x_BTD, w_DV = random.normal(size=(B, T, D)), 2 * random.normal(size=(D, V)) / D**0.5
  return (jnp.asarray(x_BTD, dtype), jnp.asarray(w_DV, dtype), random.integers(0, V, (B, T), np.int32),
          tuple(random.normal(size=(4, B, T)).astype(np.float32)))


def expected(x_BTD, w_DV, targets_BT, slopes, logits):
  """Facts and the gradients dx and dw, in float64."""
  x_BTD, w_DV = (np.asarray(y, np.float64) for y in (x_BTD, w_DV))
  dlse_BT1, dtarget_BT1, _, dmean_BT1 = (np.asarray(y, np.float64)[..., None] for y in slopes)
  cap, temperature = logits.softcap or 1e30, logits.temperature or 1.0
  capped_BTV = cap * np.tanh(x_BTD @ w_DV / cap)
  logits_BTV = capped_BTV / temperature
  lse_BT1 = np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
  prob_BTV, hit_BTV = np.exp(logits_BTV - lse_BT1), np.eye(w_DV.shape[1])[targets_BT]
  mean_BT1 = (prob_BTV * logits_BTV).sum(-1, keepdims=True)
  slope_BTV = dlse_BT1 * prob_BTV + dtarget_BT1 * hit_BTV + dmean_BT1 * prob_BTV * (1 + logits_BTV - mean_BT1)
  slope_BTV *= (1 - (capped_BTV / cap)**2) / temperature
  facts = lse_BT1[..., 0], (hit_BTV * logits_BTV).sum(-1), logits_BTV.max(-1), mean_BT1[..., 0]
  return *facts, slope_BTV @ w_DV.T, np.einsum('BTD,BTV->DV', x_BTD, slope_BTV)


def computed(x_BTD, w_DV, targets_BT, slopes, logits, width: int, interpret=None):
  """The same by the kernels, of tiles of 16 tokens and 128 words, in one compiled program."""
  tiles = Sizes(*[Tile(16, 128, width)] * 3)
  facts = functools.partial(cross_entropy_tpu.facts, sizes_of=tiles, interpret=interpret)

  @jax.jit
  def both(x_BTD, w_DV, targets_BT, slopes):
    out, back = jax.vjp(lambda x, w: facts(x, w, targets_BT, logits, True), x_BTD, w_DV)
    return *out, *back(slopes)

  return both(x_BTD, w_DV, targets_BT, slopes)


def assert_close(found, wanted, close):
  for name, a, b in zip(('lse', 'target', 'most', 'mean', 'dx', 'dw'), found, wanted, strict=True):
    error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
    assert error < close, (name, error)


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients(name):
  """Nothing is left of what memory held before: the interpreter fills it with NaN."""
  *shape, width, logits = CASES[name]
  these = arrays(*shape)
  assert_close(computed(*these, logits, width), expected(*these, logits), CLOSE['float32'])


@pytest.mark.parametrize('tied', [False, True])
def test_bfloat16(tied):
  """dx and dw are summed in float32 beside the result; facts are float32 all along."""
  these, logits = arrays(2, 19, 256, 300, 'bfloat16'), Logits(4.0, tied=tied)
  found, wanted = computed(*these, logits, 128), expected(*these, logits)
  assert [y.dtype.name for y in found] == ['float32'] * 4 + ['bfloat16'] * 2
  assert_close(found, wanted, CLOSE['bfloat16'])
  for a, b in zip(found[:4], wanted):
    assert np.linalg.norm(np.asarray(a) - b) < CLOSE['float32'] * np.linalg.norm(b)


def test_master_weights_have_float32_gradients():
  x_BTD, w_DV, *rest = arrays(2, 19, 256, 300)
  x_BTD, w_DV = x_BTD.astype(jnp.bfloat16), w_DV.astype(jnp.bfloat16).astype(jnp.float32)
  found, wanted = computed(x_BTD, w_DV, *rest, Logits(), 256), expected(x_BTD, w_DV, *rest, Logits())
  assert [y.dtype.name for y in found[4:]] == ['bfloat16', 'float32']
  assert_close(found, wanted, CLOSE['bfloat16'])


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(tokens=st.integers(1, 40), vocab=st.integers(1, 400), width=st.sampled_from([1, 40, 256]), tied=st.booleans())
def test_any_numbers_of_tokens_and_words(tokens, vocab, width, tied):
  these, logits = arrays(1, tokens, width, vocab), Logits(tied=tied)
  assert_close(computed(*these, logits, min(width, 128)), expected(*these, logits), CLOSE['float32'])


@settings(deadline=None, derandomize=True)
@given(tokens=st.integers(1, 20000), width=st.integers(1, 9000), vocab=st.integers(1, 300000),
       kinds=st.tuples(*[st.sampled_from(['float32', 'bfloat16'])] * 2), memory=st.sampled_from([12, 40, 64]))
def test_tiles_fit(tokens, width, vocab, kinds, memory):
  found = cross_entropy_tpu.sizes(tokens, width, vocab, *kinds, memory << 20)
  assert found is not None or width > 2000
  for tile in [] if found is None else (found.forward, found.states, found.matrix):
    assert width % tile.width == 0
    assert tile.width == width or tile.width % 128 == 0
    assert (tile.tokens % 16, tile.vocab % 128) == (0, 0)
    assert tile.tokens < tokens + 16
    assert tile.vocab < vocab + 128


@pytest.mark.parametrize('tied', [False, True])
def test_a_simulated_tpu_races_nowhere(tied):
  """All results are written and none of them before it is read: memory is NaN at first, and two cores take turns."""
  races = pytest.importorskip('jax._src.pallas.mosaic.interpret.interpret_pallas_call')
  these, logits = arrays(1, 20, 256, 200), Logits(4.0, tied=tied)
  simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan', num_cores_or_threads=2)
  try:
    found = computed(*these, logits, 128, simulated)
    jax.block_until_ready(found)
  except Exception:
    pltpu.reset_tpu_interpret_mode_state()
    raise
  if jax.__version_info__ < (0, 12):  # later versions raise by themselves
    assert not races.races.races_found
  for a, b in zip(found, computed(*these, logits, 128)):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('tied', [False, True])
def test_devices_share_rows_and_vocabulary(tied):
  these, logits = arrays(4, 6, 256, 512), Logits(4.0, 0.7, tied)
  with sharding.use(sharding.Layout(data=2, fsdp=2, tensor=2)):
    eight = computed(*these, logits, 128)
    lies = sharding.constrain(jnp.zeros((256, 512)), 'DV').sharding
    assert eight[5].sharding.is_equivalent_to(lies, 2)
  assert_close(eight, expected(*these, logits), CLOSE['float32'])


def test_tiles_that_do_not_divide_are_refused():
  x_BTD, w_DV, *rest = arrays(1, 5, 384, 130)
  for width in (256, 192):
    with pytest.raises(ValueError, match=f'Tile.*width={width}.*must divide D=384, by a multiple of 128'):
      computed(x_BTD, w_DV, *rest, Logits(), width)


def test_log_probabilities_ask_for_them():
  x_BTD, w_DV, targets_BT, _ = arrays(2, 11, 64, 300)
  found = [jax.jit(functools.partial(kernel.log_probs, logits=Logits(temperature=0.5, implementation=name),
                                     entropy=True))(x_BTD, w_DV, targets_BT) for name in ('tpu', 'reference')]
  for a, b in zip(*found):
    np.testing.assert_allclose(a, b, rtol=1e-5)
