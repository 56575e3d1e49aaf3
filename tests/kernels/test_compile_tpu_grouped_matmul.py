"""The grouped product and its gradients are programs for every TPU, at the sizes of models that there are."""
import jax
import jax.numpy as jnp
import pytest

from lmlib.kernels import grouped_matmul
from lmlib.plan import compiled

pytest.importorskip('libtpu')

MIXTRAL = (16384, 4096, 14336, 8)
SHAPES = {'Qwen3-30B-A3B': (32768, 2048, 768, 128), 'a part of DeepSeek-V3': (16384, 7168, 2048, 16),
          'Qwen3-30B-A3B, decoding': (64, 2048, 768, 128)}


@pytest.mark.parametrize('chip', compiled.TPUS)
def test_chips(chip):
  compiles(chip, *MIXTRAL, jnp.bfloat16)


@pytest.mark.parametrize('name', SHAPES)
def test_models(name):
  compiles('v5e', *SHAPES[name], jnp.bfloat16)  # the chip with the least memory for a kernel


def test_float32():
  compiles('v5e', *SHAPES['Qwen3-30B-A3B'], jnp.float32)


def test_axes_of_any_length():
  compiles('v5e', 1000, 500, 333, 3, jnp.bfloat16)


def both(x_MD, w_EDF, sizes_E, dout_MF):
  out, back = jax.vjp(lambda x, w: grouped_matmul.grouped_matmul(x, w, sizes_E), x_MD, w_EDF)
  return out, *back(dout_MF)


def compiles(chip, M, D, F, E, dtype):
  shape = jax.ShapeDtypeStruct
  program = compiled.program(both, shape((M, D), dtype), shape((E, D, F), dtype), shape((E,), jnp.int32),
                             shape((M, F), dtype), machine=chip)
  assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3  # 'auto' is the kernel
  # The way there and the two back are counted.
  assert program.cost_analysis()['flops'] >= 6 * M * D * F
