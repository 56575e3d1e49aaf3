"""Products with weights of few bits, and of rows of few bits with them: what a quantised layer computes.

  out[m,f] = x_scale[m] sum_z scale[z,f] sum_{d in block z} x[m,d] (w[d,f] - zero[z,f])

D is cut into Z blocks of equal length, each with a scale, and a zero point if it has one, for every column: Z is 1
in LLM.int8() (Dettmers et al. 2022) and SmoothQuant (Xiao et al. 2023), D / 128 in GPTQ and AWQ (Frantar et al.
2023, Lin et al. 2024). x is of floats, or of the 8 bits of w, int8 or float8_e4m3fn (Micikevicius et al. 2022), with
one scale a row. Products of integers are summed in int32 and are exact; all others in float32. The gradient is that
of x if it is of floats: weights, scales and zero points have none (LoRA over quantised weights, Dettmers et al. 2023).
"""

import jax
import jax.numpy as jnp

from lmlib import sharding
from lmlib.kernels import choice, quantised_matmul_tpu, tpu

EIGHTS = (jnp.int8, jnp.float8_e4m3fn)


def quantised_matmul(x_MD, w_DF, scale_ZF, zero_ZF=None, *, x_scale_M=None, implementation: str = 'auto'):
  """The products, MF: in the type of x if that is of floats of 16 or 32 bits, else in that of scale_ZF.

  w: int4, int8 or float8_e4m3fn. implementation: a name of IMPLEMENTATIONS, or 'auto': see chosen(). ValueError if
  shapes or types do not fit, or if the one asked for cannot do the case. 'tpu' runs on a CPU too, interpreted and slow.
  """
  case = x_MD, w_DF, scale_ZF, zero_ZF, x_scale_M
  _check(*case)
  implementation = choice.chosen('quantised_matmul', implementation, chosen, LACKING, case)
  return IMPLEMENTATIONS[implementation](x_MD, w_DF, *(None if y is None else jax.lax.stop_gradient(y)
                                                       for y in (scale_ZF, zero_ZF, x_scale_M)))


def _check(x_MD, w_DF, scale_ZF, zero_ZF, x_scale_M):
  (M, D), F, Z = x_MD.shape, w_DF.shape[1], scale_ZF.shape[0]
  shapes = {'w': (w_DF, (D, F)), 'scale': (scale_ZF, (Z, F)), 'zero': (zero_ZF, (Z, F)), 'x_scale': (x_scale_M, (M,))}
  for name, (array, shape) in shapes.items():
    if array is not None and array.shape != shape:
      raise ValueError(f'quantised_matmul: {name} is of shape {array.shape} and x of {x_MD.shape}; it must be {shape}')
  if D % Z:
    raise ValueError(f'quantised_matmul: {Z} scales cannot cut a width of {D} into equal blocks')
  if w_DF.dtype not in (jnp.int4, *EIGHTS):
    raise ValueError(f'quantised_matmul: w is of {w_DF.dtype}, which is none of int4, int8 and float8_e4m3fn')
  whole = jnp.issubdtype(w_DF.dtype, jnp.integer)
  if x_MD.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8 if whole else jnp.float8_e4m3fn):
    raise ValueError(f'quantised_matmul: x is of {x_MD.dtype} and w of {w_DF.dtype}; x must be of floats, or of int8 '
                     'with integers and of float8_e4m3fn with float8_e4m3fn')


def chosen(x_MD, w_DF, scale_ZF, zero_ZF, x_scale_M) -> str:
  """'tpu' on a TPU where that can do the case, else 'reference'."""
  able = tpu.chip() is not None and not quantised_matmul_tpu.lacking(x_MD, w_DF, scale_ZF, zero_ZF, x_scale_M)
  return 'tpu' if able else 'reference'


def reference(x_MD, w_DF, scale_ZF, zero_ZF=None, x_scale_M=None):
  """The equation above: x of floats with all of w as floats of its type; x of 8 bits by blocks."""
  dtype = scale_ZF.dtype if x_MD.dtype in EIGHTS else x_MD.dtype
  precision = jax.lax.Precision.HIGHEST if x_MD.dtype == jnp.float32 else None
  if x_MD.dtype not in EIGHTS:
    out_MF = jnp.dot(x_MD, dequantised(w_DF, scale_ZF, zero_ZF).astype(dtype), precision=precision,
                     preferred_element_type=jnp.float32)
  else:
    (M, D), Z, F = x_MD.shape, *scale_ZF.shape
    sums = jnp.int32 if x_MD.dtype == jnp.int8 else jnp.float32
    x_MZD, w_ZDF = x_MD.reshape(M, Z, D // Z), w_DF.reshape(Z, D // Z, F).astype(x_MD.dtype)
    out_MZF = jnp.einsum('MZD,ZDF->MZF', x_MZD, w_ZDF, preferred_element_type=sums).astype(jnp.float32)
    if zero_ZF is not None:
      out_MZF -= x_MZD.astype(sums).sum(-1).astype(jnp.float32)[..., None] * zero_ZF.astype(jnp.float32)[None]
    out_MF = (out_MZF * scale_ZF.astype(jnp.float32)[None]).sum(1)
  if x_scale_M is not None:
    out_MF *= x_scale_M.astype(jnp.float32)[:, None]
  return out_MF.astype(dtype)


def dequantised(w_DF, scale_ZF, zero_ZF=None) -> jax.Array:
  """scale[z,f] (w[d,f] - zero[z,f]), DF in float32."""
  (D, F), Z = w_DF.shape, scale_ZF.shape[0]
  w_ZDF = w_DF.astype(jnp.float32).reshape(Z, D // Z, F)
  if zero_ZF is not None:
    w_ZDF -= zero_ZF.astype(jnp.float32)[:, None]
  return (w_ZDF * scale_ZF.astype(jnp.float32)[:, None]).reshape(D, F)


def _tpu(x_MD, w_DF, scale_ZF, zero_ZF, x_scale_M):
  """The kernel, which XLA cannot split, run by every device on its own columns."""
  axes = {'zero_ZF': (zero_ZF, 'ZF'), 'x_scale_M': (x_scale_M, 'M')}
  given = {name: pair for name, pair in axes.items() if pair[0] is not None}

  def mine(x_MD, w_DF, scale_ZF, *more):
    return quantised_matmul_tpu.quantised_matmul(x_MD, w_DF, scale_ZF, **dict(zip(given, more)))

  letters = ('MD', 'DF', 'ZF', *(letters for _, letters in given.values()))
  return sharding.each(mine, letters, 'MF')(x_MD, w_DF, scale_ZF, *(array for array, _ in given.values()))


IMPLEMENTATIONS = {'reference': reference, 'tpu': _tpu}
# What of a case each cannot do: functions of (x, w, scale, zero, x_scale) -> names.
LACKING = {'reference': lambda *case: [], 'tpu': quantised_matmul_tpu.lacking}
