"""The grouped product on GPUs in Pallas' Triton dialect: a program takes a block of rows of one group.

A GPU reads rows from anywhere, so that blocks begin where their group does, and none holds rows of two groups (on
TPUs they do: see grouped_matmul_tpu). Only rows that are in a group are written, over an array of zeros. dw is one
program for each tile of each group's matrix, which goes over the rows of the group in order: results repeat.
"""
import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tiles:
  """The block that one step multiplies, powers of two of at least 16, and how Triton runs it."""
  M: int
  D: int
  F: int
  warps: int = 4
  stages: int = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Tiles of x w and dout w', whose D is the axis that is summed over, and of dw. None of them has been tuned."""
  products: Tiles
  dw: Tiles


def sizes(M: int, E: int, dtype) -> Sizes:
  """Tiles that fit the shared memory of an A100, of about the rows of a group."""
  rows = max(16, min(64 if dtype == jnp.float32 else 128, 1 << (max(1, M // E) - 1).bit_length()))
  if dtype == jnp.float32:
    return Sizes(Tiles(rows, 32, 64, stages=1), Tiles(32, 64, 64, stages=1))
  return Sizes(Tiles(rows, 64, 128, warps=8 if rows == 128 else 4), Tiles(64, 64, 128))


def lacking(x_MD, w_EDF, sizes_E, most=None) -> list[str]:
  """What of a case is not done here."""
  cases = {'a backend but a GPU, or a CPU that interprets it': jax.default_backend() not in ('gpu', 'cpu'),
           'arrays but of float32, bfloat16 or float16, both alike':
               x_MD.dtype != w_EDF.dtype or x_MD.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16),
           'arrays of 2**31 numbers or more':
               max(x_MD.size, w_EDF.size, x_MD.shape[0] * w_EDF.shape[2]) >= 2**31}  # places are int32
  return [case for case, there in cases.items() if there]


def grouped_matmul(x_MD, w_EDF, sizes_E, *, sizes_of: Sizes | None = None, interpret: bool | None = None):
  """out[m] = x[m] w[e(m)], MF; rows beyond the last group are zeros. sizes_of: tiles, whose default is sizes()."""
  (M, D), (E, _, F) = x_MD.shape, w_EDF.shape
  if 0 in (M, D, F, E):
    return jnp.zeros((M, F), x_MD.dtype)
  interpret = jax.default_backend() == 'cpu' if interpret is None else interpret
  return _grouped_matmul(sizes_of or sizes(M, E, x_MD.dtype), interpret, x_MD, w_EDF, sizes_E)


def _ends(sizes_E, M: int):
  """(first row, row after the last) of each group."""
  end_E = jnp.minimum(jnp.cumsum(sizes_E), M).astype(jnp.int32)
  return jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]]), end_E


def blocks(sizes_E, M: int, rows: int):
  """(group, first row, row after the last) of every block of rows: as many as there may be, the rest are empty."""
  E = sizes_E.shape[0]
  start_E, end_E = _ends(sizes_E, M)
  number_E = -(-(end_E - start_E) // rows)
  last_E, block = jnp.cumsum(number_E), jnp.arange(-(-M // rows) + min(E, M), dtype=jnp.int32)
  here = jnp.searchsorted(last_E, block, side='right', method='compare_all')
  group = jnp.minimum(here, E - 1).astype(jnp.int32)
  start = start_E[group] + (block - (last_E - number_E)[group]) * rows
  return group, start, jnp.where(here < E, jnp.minimum(start + rows, end_E[group]), start)


def _dot(a, b, dims):
  """a . b over the dimensions (of a, of b), float32; float32 operands are not rounded to tf32."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(a, b, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _part(ref, starts, sizes, ends, *lead):
  """A block of a matrix, of `sizes` from `starts`, and which of its numbers lie before `ends`."""
  rows, columns = (start + jnp.arange(size, dtype=jnp.int32) for start, size in zip(starts, sizes))
  inside = (rows < ends[0])[:, None] & (columns < ends[1])[None, :]
  return ref.at[(*lead, *(pl.ds(start, size) for start, size in zip(starts, sizes)))], inside


def _read(*where):
  """Such a block, with zeros where it lies outside."""
  part, inside = _part(*where)
  return triton.load(part, mask=inside, other=0)


def _write(value, *where):
  part, inside = _part(*where)
  triton.store(part, value, mask=inside)


def _products_kernel(tiles: Tiles, transposed: bool, group_ref, start_ref, end_ref, x_ref, w_ref, zeros_ref, out_ref):
  """One block of rows of one group, of one tile of columns."""
  f, v = pl.program_id(0) * tiles.F, pl.program_id(1)
  group, start, end = group_ref[v], start_ref[v], end_ref[v]
  (_, D), (_, F) = x_ref.shape, out_ref.shape

  def step(i, sum_MF):
    d = i * tiles.D
    x = _read(x_ref, (start, d), (tiles.M, tiles.D), (end, D))
    if transposed:
      return sum_MF + _dot(x, _read(w_ref, (f, d), (tiles.F, tiles.D), (F, D), group), ((1,), (1,)))
    return sum_MF + _dot(x, _read(w_ref, (d, f), (tiles.D, tiles.F), (D, F), group), ((1,), (0,)))

  steps = jnp.where(start < end, pl.cdiv(D, tiles.D), 0)
  sum_MF = jax.lax.fori_loop(0, steps, step, jnp.zeros((tiles.M, tiles.F), jnp.float32))
  _write(sum_MF.astype(out_ref.dtype), out_ref, (start, f), (tiles.M, tiles.F), (end, F))


def _weights_kernel(tiles: Tiles, start_ref, end_ref, x_ref, dout_ref, dw_ref):
  """One tile of dw of one group."""
  f, d, e = pl.program_id(0) * tiles.F, pl.program_id(1) * tiles.D, pl.program_id(2)
  start, end = start_ref[e], end_ref[e]
  _, D, F = dw_ref.shape

  def step(i, sum_DF):
    m = start + i * tiles.M
    x = _read(x_ref, (m, d), (tiles.M, tiles.D), (end, D))
    return sum_DF + _dot(x, _read(dout_ref, (m, f), (tiles.M, tiles.F), (end, F)), ((0,), (0,)))

  sum_DF = jnp.zeros((tiles.D, tiles.F), jnp.float32)
  sum_DF = jax.lax.fori_loop(0, pl.cdiv(end - start, tiles.M), step, sum_DF)
  _write(sum_DF.astype(dw_ref.dtype), dw_ref, (d, f), (tiles.D, tiles.F), (D, F), e)


def _call(kernel, tiles: Tiles, name: str, arrays, out, *, grid, flops: float, interpret: bool, aliases=None):
  cost = pl.CostEstimate(flops=int(flops), transcendentals=0,
                         bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, out)))
  return pl.pallas_call(
      kernel, grid=grid, out_shape=out, interpret=interpret, name=name, cost_estimate=cost,
      input_output_aliases=aliases or {},
      compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages))(*arrays)


def _products(x_MD, w_EDF, sizes_E, tiles: Tiles, *, transposed: bool = False, interpret: bool):
  """x[m] w[e(m)], or x[m] w[e(m)]' if transposed."""
  (M, D), F = x_MD.shape, w_EDF.shape[1 if transposed else 2]
  group, start, end = blocks(sizes_E, M, tiles.M)
  zeros_MF = jnp.zeros((M, F), x_MD.dtype)
  return _call(functools.partial(_products_kernel, tiles, transposed), tiles, 'grouped_matmul',
               (group, start, end, x_MD, w_EDF, zeros_MF), jax.ShapeDtypeStruct((M, F), x_MD.dtype),
               grid=(pl.cdiv(F, tiles.F), len(group)), flops=2 * M * D * F, interpret=interpret, aliases={5: 0})


def _weights(x_MD, dout_MF, sizes_E, tiles: Tiles, *, dtype, interpret: bool):
  """dw_EDF: of each group the sum of x' dout over its rows."""
  (M, D), F, E = x_MD.shape, dout_MF.shape[1], sizes_E.shape[0]
  return _call(functools.partial(_weights_kernel, tiles), tiles, 'grouped_matmul_weights',
               (*_ends(sizes_E, M), x_MD, dout_MF), jax.ShapeDtypeStruct((E, D, F), dtype),
               grid=(pl.cdiv(F, tiles.F), pl.cdiv(D, tiles.D), E), flops=2 * M * D * F, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(sizes_of: Sizes, interpret: bool, x_MD, w_EDF, sizes_E):
  one = functools.partial(_products, tiles=sizes_of.products, interpret=interpret)
  return jax.custom_batching.sequential_vmap(one)(x_MD, w_EDF, sizes_E)


def _backward(sizes_of: Sizes, interpret: bool, saved, dout_MF):

  @jax.custom_batching.sequential_vmap
  def one(x_MD, w_EDF, sizes_E, dout_MF):
    return (_products(dout_MF, w_EDF, sizes_E, sizes_of.products, transposed=True, interpret=interpret),
            _weights(x_MD, dout_MF, sizes_E, sizes_of.dw, dtype=w_EDF.dtype, interpret=interpret))

  return *one(*saved, dout_MF), None


_grouped_matmul.defvjp(lambda sizes_of, interpret, *saved: (_grouped_matmul(sizes_of, interpret, *saved), saved),
                       _backward)
