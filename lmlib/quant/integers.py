"""Weights and activations as integers of 8 or 4 bits, or as 8-bit floats, with scales: what quantised products read.

  w[d,f] = scale[z,f] (value[d,f] - zero[z,f])      a scale, and if asked for a zero point, of a block z of D

Values are rounded to the nearest: round-to-nearest of LLM.int8() (Dettmers et al. 2022) by columns, and of GPTQ's and
AWQ's forms (Frantar et al. 2023, Lin et al. 2024) by blocks. Unlike nf4.py, whose 16 levels are unequally apart and
whose blocks run along the last axis, a value is a number that can be multiplied as it is.
"""
from flax import struct
import jax
import jax.numpy as jnp

TYPES = {8: jnp.int8, 4: jnp.int4}


class Integers(struct.PyTreeNode):
  """What stands for a matrix, or a stack of them, in a tree of weights."""
  values_DF: jax.Array  # (..., D, F) int8 or int4
  scale_ZF: jax.Array  # (..., Z, F), of blocks of D / Z rows
  zero_ZF: jax.Array | None = None
  dtype: str = struct.field(pytree_node=False, default='float32')

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values_DF.shape

  def astype(self, dtype) -> 'Integers':
    """The same, which array() makes an array of this type of."""
    return self.replace(dtype=jnp.dtype(dtype).name)

  def array(self) -> jax.Array:
    """The weights."""
    (*lead, D, F), Z = self.shape, self.scale_ZF.shape[-2]
    w_ZDF = self.values_DF.astype(jnp.float32).reshape(*lead, Z, D // Z, F)
    if self.zero_ZF is not None:
      w_ZDF -= self.zero_ZF.astype(jnp.float32)[..., None, :]
    return (w_ZDF * self.scale_ZF.astype(jnp.float32)[..., None, :]).reshape(self.shape).astype(self.dtype)


def quantised(w_DF, bits: int = 8, block: int | None = None, *, zero: bool = False, scale_dtype='float32') -> Integers:
  """A float matrix, or a stack (..., D, F) of them, as integers, with a scale for `block` rows of a column.

  block: None is all rows. zero: with a zero point, so that the integers span least .. greatest instead of
  -greatest .. greatest. ValueError for other bits than 8 and 4, or a block that does not divide D.
  """
  (*lead, D, F), block = w_DF.shape, w_DF.shape[-2] if block is None else block
  if bits not in TYPES:
    raise ValueError(f'integers.quantised: bits={bits!r} is none of {sorted(TYPES)}')
  if not isinstance(block, int) or block < 1 or D % block:
    raise ValueError(f'integers.quantised: block={block!r} does not divide {D} rows')
  w_ZDF = jnp.asarray(w_DF, jnp.float32).reshape(*lead, D // block, block, F)
  most = 2**(bits - 1) - 1
  if zero:
    low, high = jnp.minimum(w_ZDF.min(-2), 0), jnp.maximum(w_ZDF.max(-2), 0)  # 0 itself stays a number
    scale_ZF = _above_zero((high - low) / (2 * most + 1)).astype(scale_dtype)
    zero_ZF = jnp.clip(-most - 1 - jnp.round(low / scale_ZF.astype(jnp.float32)), -most - 1, most)
  else:
    scale_ZF, zero_ZF = _above_zero(jnp.abs(w_ZDF).max(-2) / most).astype(scale_dtype), None
  value_ZDF = jnp.round(w_ZDF / scale_ZF.astype(jnp.float32)[..., None, :])
  if zero:
    value_ZDF += zero_ZF[..., None, :]
  value_ZDF = jnp.clip(value_ZDF, -most - 1 if zero else -most, most)
  return Integers(value_ZDF.reshape(w_DF.shape).astype(TYPES[bits]), scale_ZF,
                  None if zero_ZF is None else zero_ZF.astype(scale_dtype))


def rows(x_MD, dtype=jnp.int8) -> tuple[jax.Array, jax.Array]:
  """(values_MD, scale_M float32): activations in int8 or float8_e4m3fn, with a scale a row; M may be many axes."""
  whole = jnp.issubdtype(dtype, jnp.integer)
  most = float((jnp.iinfo if whole else jnp.finfo)(dtype).max)
  x_MD = x_MD.astype(jnp.float32)
  scale_M = _above_zero(jnp.abs(x_MD).max(-1) / most)
  unit_MD = jnp.clip(x_MD / scale_M[..., None], -most, most)
  return (jnp.round(unit_MD) if whole else unit_MD).astype(dtype), scale_M


def _above_zero(scale):
  """Scales, and 1 where all numbers are zero."""
  return jnp.where(scale == 0, 1.0, scale)
