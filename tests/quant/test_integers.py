"""Integers with scales: errors of at most half a step, room, and stacks of layers."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import trees
from lmlib.nn import layers
from lmlib.quant import integers

w_LDF = np.random.default_rng(0).normal(size=(2, 96, 200)).astype(np.float32)
FORMS = [(bits, block, zero) for bits in (8, 4) for block in (None, 32) for zero in (False, True)]
forms = pytest.mark.parametrize(('bits', 'block', 'zero'), FORMS)


@forms
@pytest.mark.parametrize('shift', [0.0, 3.0])
def test_every_weight_is_within_half_a_step(bits, block, zero, shift):
  w = w_LDF + shift
  found = integers.quantised(w, bits, block, zero=zero)
  assert found.values_DF.dtype == {8: jnp.int8, 4: jnp.int4}[bits]
  step = np.repeat(found.scale_ZF, block or 96, -2)
  # A zero point is itself rounded, by half a step, which the ends of a block lose too.
  assert (np.abs(found.array() - w) <= step * (1.001 if zero else 0.501)).all()
  blocks = w.reshape(2, -1, block or 96, 200)
  least, most = np.minimum(blocks.min(-2), 0), np.maximum(blocks.max(-2), 0)
  widest = (most - least) / (2**bits - 1) if zero else np.maximum(most, -least) / (2**(bits - 1) - 1)
  np.testing.assert_allclose(found.scale_ZF, widest, rtol=1e-6)


def test_shifted_weights_gain_by_a_zero_point():
  w = np.abs(w_LDF)
  error = lambda zero: float(jnp.linalg.norm(integers.quantised(w, 4, 32, zero=zero).array() - w))
  assert error(True) < 0.6 * error(False)


@forms
def test_a_stack_is_its_layers(bits, block, zero):
  found = integers.quantised(w_LDF, bits, block, zero=zero)
  assert found.shape == w_LDF.shape
  each = [integers.quantised(w, bits, block, zero=zero).array() for w in w_LDF]
  np.testing.assert_array_equal(found.array(), jnp.stack(each))
  np.testing.assert_array_equal(jax.tree.map(lambda x: x[1], found).array(), each[1])


def test_zeros_are_zeros_and_room_is_small():
  for bits, block, zero in FORMS:
    assert not integers.quantised(np.zeros((64, 3)), bits, block, zero=zero).array().any()
  found = integers.quantised(w_LDF, 8, 32, scale_dtype='bfloat16')
  assert trees.nbytes(found) / w_LDF.size * 8 == 8.5


def test_layers_multiply_by_it():
  w = integers.quantised(w_LDF[0], 8).astype('bfloat16')
  x = jnp.asarray(w_LDF[0, :, :7].T, 'bfloat16')[None]
  np.testing.assert_array_equal(layers.product('BTD,DF->BTF', x, w), layers.product('BTD,DF->BTF', x, w.array()))


@pytest.mark.parametrize('dtype', ['int8', 'float8_e4m3fn'])
def test_rows(dtype):
  x = w_LDF[0] * np.linspace(0, 9, 96, dtype=np.float32)[:, None]
  values, scale_M = integers.rows(jnp.asarray(x), jnp.dtype(dtype))
  assert values.dtype == dtype
  back = np.asarray(values).astype(np.float32) * np.asarray(scale_M)[:, None]
  scale_M1 = np.asarray(scale_M)[:, None]
  step = scale_M1 * 0.501 if dtype == 'int8' else np.abs(x) / 16 + scale_M1 / 512
  assert (np.abs(back - x) <= step).all()
  most = np.abs(np.asarray(values).astype(np.float32)).max(1)
  assert (most[1:] == (127 if dtype == 'int8' else 448)).all()
  assert most[0] == 0


def test_what_cannot_be_is_refused():
  with pytest.raises(ValueError, match='bits=2 is none of'):
    integers.quantised(w_LDF, 2)
  with pytest.raises(ValueError, match='block=33 does not divide 96 rows'):
    integers.quantised(w_LDF, 8, 33)
