"""Products with weights of few bits on TPUs: they stay so until a tile of them is on the chip.

  for every tile of out:  for every tile of D:  sum += x[tile] floats(w[tile])       then  out = x_scale sum scale

A step of decoding reads all weights for a few rows, so that its time is that of the bytes of w: a half or a quarter
of bfloat16's. Where scales change along D, a tile of w becomes floats of the type of x, scale (w - zero), right
before the product. Where a column has one scale, w or x and w of 8 bits enter the product as they are, int8 with
sums in int32, and the scales are multiplied at the end. The way back to x is dx = dout (scale (w - zero))', the same
kernel with sums over F.
"""
import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from lmlib.kernels import tpu

EIGHTS = (jnp.int8, jnp.float8_e4m3fn)  # types that x may share with w
# Chips with a unit for products of these. Others compile them too, by way of bfloat16.
UNITS = {'int8': ('TPU v5 lite', 'TPU v5e', 'TPU v5', 'TPU v5p', 'TPU v6 lite', 'TPU v6e'), 'float8_e4m3fn': ('TPU7x',)}


@dataclasses.dataclass(frozen=True)
class Tiles:
  """The block that one step multiplies: M rows, and at most so much of D and F, as blocks of scales allow."""
  M: int = 512
  D: int = 1024
  F: int = 512


def sizes(M: int, dtype) -> Tiles:
  """Tiles that fit into 16 MiB with w as floats; few rows leave room for more of w, which is then all that is read."""
  if dtype == jnp.float32:
    return Tiles(min(M, 256), 512, 512)
  return Tiles(M, 2048, 512) if M <= 64 else Tiles(min(M, 512))


def lacking(x_MD, w_DF, scale_ZF, zero_ZF=None, x_scale_M=None) -> list[str]:
  """What of a case is not done here."""
  eight, chip, name = x_MD.dtype in EIGHTS, tpu.chip(), x_MD.dtype.name
  cases = {'a backend but a TPU, or a CPU that interprets it': jax.default_backend() not in ('tpu', 'cpu'),
           'x of float16': x_MD.dtype == jnp.float16,
           'scales that change along D for x of 8 bits': eight and scale_ZF.shape[0] > 1,
           'zero points for x of 8 bits': eight and zero_ZF is not None}
  if eight and chip is not None:
    cases[f'products of {name} on a {chip}: the chips with a unit for them are {", ".join(UNITS[name])}'] = (
        chip not in UNITS[name])
  return [case for case, there in cases.items() if there]


def quantised_matmul(x_MD, w_DF, scale_ZF, zero_ZF=None, x_scale_M=None, *, tiles: Tiles | None = None,
                     interpret=None):
  """The products, MF; see quantised_matmul.quantised_matmul(). tiles: their default is sizes()."""
  tiles = tiles or sizes(x_MD.shape[0], x_MD.dtype)
  if x_MD.dtype in EIGHTS:
    return _products(x_MD, w_DF, scale_ZF, zero_ZF, x_scale_M, tiles=tiles, interpret=interpret)
  return _with_gradient(tiles, interpret, x_MD, w_DF, scale_ZF, zero_ZF, x_scale_M)


@dataclasses.dataclass(frozen=True)
class _Case:
  """What a kernel is compiled for."""
  over: int  # the length of the axis that is summed over
  transposed: bool  # sums over F
  late: bool  # a column has one scale, which is multiplied at the end
  zero: bool
  rows: bool  # rows have scales

  def floats(self, w_ref, scale_ref, zero_ref, dtype):
    """A tile of w, DF, for a product with `dtype`."""
    w = w_ref[...]
    if self.late:
      return w.astype(dtype)  # exact
    (d, f), z = w.shape, scale_ref.shape[0]
    w_ZDF = w.astype(jnp.float32).reshape(z, d // z, f)
    if self.zero:
      w_ZDF -= zero_ref[...]
    return (w_ZDF * scale_ref[...]).reshape(d, f).astype(dtype)


def _inside(x, end, axis: int):
  """x with zeros from `end` on, where what lies outside an array may be NaN."""
  place = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
  wide = x.astype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
  return jnp.where(place < end, wide, jnp.zeros_like(wide)).astype(x.dtype)


def _kernel(case: _Case, x_ref, w_ref, scale_ref, *refs):
  """One tile of the axis that is summed over, for one tile of the output."""
  *more, out_ref, sum_ref = refs
  zero_ref = more.pop(0) if case.zero else None
  step, last = pl.program_id(2), pl.num_programs(2) - 1
  x, side = x_ref[...], int(case.transposed)
  w = case.floats(w_ref, scale_ref, zero_ref, x.dtype)
  if case.over % x.shape[1]:
    end = case.over - step * x.shape[1]
    x, w = _inside(x, end, 1), _inside(w, end, side)
  product = jax.lax.dot_general(x, w, (((1,), (side,)), ((), ())), preferred_element_type=sum_ref.dtype,
                                precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)

  @pl.when(step == 0)
  def _():
    sum_ref[...] = product

  @pl.when(step > 0)
  def _():
    sum_ref[...] += product

  @pl.when(step == last)
  def _():
    out = sum_ref[...].astype(jnp.float32)
    if case.late:
      out *= scale_ref[0]
    if case.rows:
      out *= more[0][...]
    out_ref[...] = out.astype(out_ref.dtype)


def _part(size: int, most: int) -> int:
  """The longest tile of an axis of whole registers that divides it; `most` if none does."""
  if size <= most:
    return size
  return next((part for part in range(most // tpu.LANES * tpu.LANES, 0, -tpu.LANES) if size % part == 0), most)


def _blocks(D: int, Z: int, most: int) -> tuple[int, int]:
  """(how long a tile of D is, how many scales it has): whole blocks of D / Z, or a part of one."""
  block = D // Z
  if Z == 1:
    return _part(D, most), 1
  if block > most and block % tpu.LANES == 0:
    return _part(block, most), 1
  whole = [z for z in range(1, Z + 1) if Z % z == 0 and (z == Z or z * block % tpu.LANES == 0)]
  scales = max([z for z in whole if z * block <= most], default=whole[0])
  return scales * block, scales


def _products(x, w_DF, scale_ZF, zero_ZF, x_scale_M, *, tiles: Tiles, transposed: bool = False, interpret=None):
  """x w, MF, of x_MD, or x w', MD, of x_MF."""
  M, (D, F), Z = x.shape[0], w_DF.shape, scale_ZF.shape[0]
  (size_d, scales), size_f, rows = _blocks(D, Z, tiles.D), _part(F, tiles.F), min(M, tiles.M)
  over, size_over, size_out = (F, size_f, size_d) if transposed else (D, size_d, size_f)
  case = _Case(over, transposed, Z == 1 and zero_ZF is None and not transposed, zero_ZF is not None,
               x_scale_M is not None)
  at = lambda i, s: (s, i) if transposed else (i, s)  # tiles of the output's columns and of the sum -> of F and of D
  block = lambda d: d * size_d * Z // D // scales if Z > 1 else 0
  where_w = lambda m, i, s: at(i, s)[::-1]
  where_scale = lambda m, i, s: (block(at(i, s)[1]), 0, at(i, s)[0])
  per_block = [y.astype(jnp.float32)[:, None] for y in (scale_ZF, zero_ZF) if y is not None]
  per_row = [] if x_scale_M is None else [x_scale_M.astype(jnp.float32)[:, None]]
  out = D if transposed else F
  dtype = scale_ZF.dtype if x.dtype in EIGHTS else x.dtype
  bytes_moved = sum(y.size * y.dtype.itemsize for y in (x, *per_block, *per_row)) + M * out * jnp.dtype(dtype).itemsize
  bits = 4 if w_DF.dtype == jnp.int4 else 8
  [product] = tpu.call(
      functools.partial(_kernel, case), name='quantised_matmul' + '_transposed' * transposed,
      grid=(pl.cdiv(M, rows), pl.cdiv(out, size_out), pl.cdiv(over, size_over)),
      inputs=[pl.BlockSpec((rows, size_over), lambda m, i, s: (m, s)), pl.BlockSpec((size_d, size_f), where_w),
              *[pl.BlockSpec((scales, 1, size_f), where_scale)] * len(per_block),
              *[pl.BlockSpec((rows, 1), lambda m, i, s: (m, 0))] * len(per_row)],
      outputs=[(jax.ShapeDtypeStruct((M, out), dtype), pl.BlockSpec((rows, size_out), lambda m, i, s: (m, i)))],
      scratch=[pltpu.VMEM((rows, size_out), jnp.int32 if x.dtype == jnp.int8 else jnp.float32)],
      semantics=('parallel', 'parallel', 'arbitrary'), flops=2 * M * D * F,
      bytes_moved=bytes_moved + D * F * bits / 8 * pl.cdiv(M, rows), interpret=interpret)(x, w_DF, *per_block, *per_row)
  return product


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradient(tiles: Tiles, interpret, x_MD, *weights):
  return _products(x_MD, *weights, tiles=tiles, interpret=interpret)


def _backward(tiles: Tiles, interpret, weights, dout_MF):
  dx_MD = _products(dout_MF, *weights, tiles=tiles, transposed=True, interpret=interpret)
  return dx_MD, *(None for _ in weights)


_with_gradient.defvjp(lambda tiles, interpret, x_MD, *weights: (
    _with_gradient(tiles, interpret, x_MD, *weights), weights), _backward)
