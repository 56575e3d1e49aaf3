"""Quantised products are programs for every TPU, at the sizes of Llama 3 8B's hidden layer."""
import jax
import jax.numpy as jnp
import pytest

from lmlib.kernels import quantised_matmul
from lmlib.plan import compiled

pytest.importorskip('libtpu')

D, F = 4096, 14336


def compiles(chip, M, *, w, D=D, F=F, x='bfloat16', block=None, zero=False, back=False, scale='float32'):
  Z, shape = 1 if block is None else D // block, jax.ShapeDtypeStruct
  x_scale_M = shape((M,), jnp.float32) if x not in ('bfloat16', 'float32') else None

  def product(x_MD, w_DF, scale_ZF, zero_ZF, x_scale_M):
    multiply = lambda x_MD: quantised_matmul.quantised_matmul(x_MD, w_DF, scale_ZF, zero_ZF, x_scale_M=x_scale_M)
    if not back:
      return multiply(x_MD)
    out, gradient = jax.vjp(multiply, x_MD)
    return out, gradient(out)

  program = compiled.program(product, shape((M, D), x), shape((D, F), w), shape((Z, F), scale),
                             shape((Z, F), scale) if zero else None, x_scale_M, machine=chip)
  assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1 + back  # 'auto' is the kernel
  assert program.cost_analysis()['flops'] >= 2 * M * D * F * (1 + back)


@pytest.mark.parametrize('M', [8, 64, 2048])
@pytest.mark.parametrize('chip', compiled.TPUS)
def test_weights_of_four_bits(chip, M):
  compiles(chip, M, w='int4', block=128)


@pytest.mark.parametrize('chip', ['v5e', 'v5p', 'v6e'])
@pytest.mark.parametrize('M', [8, 2048])
def test_eight_bits_of_both(chip, M):
  compiles(chip, M, w='int8', x='int8', scale='bfloat16')


@pytest.mark.parametrize('M', [8, 2048])
def test_floats_of_eight_bits(M):
  compiles('7x', M, w='float8_e4m3fn', x='float8_e4m3fn')


@pytest.mark.parametrize('chip', ['v4', 'v5e', '7x'])
@pytest.mark.parametrize('case', [dict(w='int4', block=32, zero=True, scale='bfloat16'), dict(w='int8'),
                                  dict(w='int8', block=128)], ids=str)
def test_the_way_back(chip, case):
  compiles(chip, 512, back=True, **case)


def test_the_matrix_down_and_float32():
  compiles('v5e', 64, w='int4', D=F, F=D, block=128)
  compiles('v5e', 300, w='int8', x='float32', block=64, back=True)


def test_axes_of_any_length():
  compiles('v5e', 100, w='int8', D=2500, F=700, back=True)
  compiles('v5e', 100, w='int8', x='int8', D=2500, F=700)


@pytest.mark.parametrize(('chip', 'dtype', 'able'), [
    ('v5e', 'float8_e4m3fn', 'TPU7x'), ('v6e', 'float8_e4m3fn', 'TPU7x'), ('v4', 'int8', 'TPU v5 lite'),
    ('7x', 'int8', 'TPU v6')])
def test_chips_without_the_unit_are_refused_by_name(chip, dtype, able):
  shape = jax.ShapeDtypeStruct
  case = shape((8, 128), dtype), shape((128, 128), dtype), shape((1, 128), jnp.float32)
  multiply = lambda *case: quantised_matmul.quantised_matmul(*case, implementation='tpu')
  with pytest.raises(ValueError, match=f'products of {dtype} on a .*: the chips with a unit for them are .*{able}'):
    compiled.program(multiply, *case, machine=chip)
  program = compiled.program(quantised_matmul.quantised_matmul, *case, machine=chip)
  assert 'tpu_custom_call' not in program.as_text()  # 'auto' takes what can do it
