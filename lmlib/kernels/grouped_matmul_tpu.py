"""The grouped product on TPUs: MegaBlocks (Gale et al. 2023) with a schedule instead of a sparse matrix.

Rows are cut into tiles. A tile that holds rows of several groups is visited once for each of them, and only that
group's rows of the tile are kept:

  for every tile of columns f:  for every visit (tile, group):  out[tile, f] = rows of the group: x[tile] w[group, :, f]

Visits come in the order of the rows, so that a tile of the output stays on the chip while its groups add theirs, and
a group's matrix while its rows pass by. How many visits there are depends on the sizes alone; the schedule is
made by plain jnp, has a fixed length of about M / tile + E, and reaches the kernel as scalars that are there before it
starts. The way back is dx = dout w', the same kernel with w read in transposed blocks, and dw[e] = x' dout over
the visits of group e, where a group without rows has one visit too, which writes its zeros.
"""
import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from lmlib.kernels import tpu
from lmlib.kernels.blocks import tuned

MEMORY = 12 * 2**20  # bytes on the chip that blocks may take: v4 and v5 give a kernel 16 MiB unless asked for more
LEAST, MOST = 128, 512  # rows of a tile
SIDES = (2048, 1024, 512, 256, 128)  # of the other axes' tiles


@dataclasses.dataclass(frozen=True)
class Tiles:
  """The block that one step of a kernel multiplies: M rows, D of x and F of dout."""
  M: int
  D: int
  F: int


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Tiles of the three products."""
  forward: Tiles
  dx: Tiles
  dw: Tiles


def sizes(M: int, D: int, F: int, E: int, dtype) -> Sizes:
  """Tiles that fit into MEMORY and move the fewest bytes when groups are of about the same size.

  Half a group of rows is a tile, so that tiles of two groups are few; every matrix is read once if all of D
  fits, else once for each tile of rows.
  """
  size, group = jnp.dtype(dtype).itemsize, max(1, M // E)
  rows = min(M, max(LEAST, min(MOST, 1 << max(0, (group // 2).bit_length() - 1))))

  def products(D, F):
    def moved(tiles):
      return 1 / tiles.F + (1 / max(group, rows) if tiles.D == D else 1 / rows), -tiles.D
    fits = lambda d, f: 2 * size * (rows * d + d * f + rows * f) + 8 * rows * f <= MEMORY
    return min((Tiles(rows, d, f) for d in {D, *_parts(D)} for f in _parts(F) if fits(d, f)), key=moved)

  fits = lambda d, f: 2 * size * (rows * d + rows * f + d * f) + 8 * d * f <= MEMORY
  dw = min((Tiles(rows, d, f) for d in _parts(D) for f in _parts(F) if fits(d, f)),
           key=lambda tiles: (1 / tiles.D + 1 / tiles.F, tiles.D))
  dx = products(F, D)
  default = Sizes(products(D, F), Tiles(rows, dx.F, dx.D), dw)
  return tuned('grouped_matmul_tpu', f'{jnp.dtype(dtype).name} {M}x{E}x{D}x{F}', default)


def _parts(size: int) -> list[int]:
  """Lengths of a tile of an axis: those of SIDES or three times half of one, that divide it where any does."""
  sides = sorted({*SIDES, *(side * 3 // 2 for side in SIDES if side >= 256)})
  return [side for side in sides if size % side == 0] or [min(size, side) for side in SIDES[1:]]


def lacking(x_MD, w_EDF, sizes_E, most=None) -> list[str]:
  """What of a case is not done here."""
  cases = {'a backend but a TPU, or a CPU that interprets it': jax.default_backend() not in ('tpu', 'cpu'),
           'arrays but of float32 or bfloat16, both alike':
               x_MD.dtype != w_EDF.dtype or x_MD.dtype not in (jnp.float32, jnp.bfloat16)}
  return [case for case, there in cases.items() if there]


def grouped_matmul(x_MD, w_EDF, sizes_E, *, sizes_of: Sizes | None = None, interpret=None):
  """out[m] = x[m] w[e(m)], MF; rows beyond the last group are zeros. sizes_of: tiles, whose default is sizes()."""
  (M, D), (E, _, F) = x_MD.shape, w_EDF.shape
  if 0 in (M, D, F, E):
    return jnp.zeros((M, F), x_MD.dtype)
  return _grouped_matmul(sizes_of or sizes(M, D, F, E, x_MD.dtype), interpret, x_MD, w_EDF, sizes_E)


def visits(sizes_E, M: int, rows: int, *, groups: bool):
  """The schedule, int32 arrays as long as there may be visits: (tile, source, group, start, end).

  A visit multiplies the rows start .. end of tile `source`, for group `group`, and its results are of tile `tile`.
  groups=False: every tile is visited, for each group that has rows in it or else for none (start = end, nothing to
  read anew). groups=True: every group is visited, for each tile that has rows of it or else for none.
  """
  E, tiles = sizes_E.shape[0], -(-M // rows)
  end_E = jnp.minimum(jnp.cumsum(sizes_E), M).astype(jnp.int32)
  start_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])
  first_E, filled = start_E // rows, -(-end_E[-1] // rows)
  count_E = jnp.where(end_E > start_E, (end_E - 1) // rows + 1 - first_E, 0)
  last_group = jnp.where(end_E > start_E, jnp.arange(E, dtype=jnp.int32), 0).max()
  if groups:
    number, count_E = tiles + E - 1, jnp.maximum(count_E, 1)
  else:  # the tiles beyond the last group are those of one more
    number = tiles + min(E, M) - 1
    more = lambda x_E, last: jnp.concatenate([x_E, jnp.asarray(last, jnp.int32)[None]])
    count_E, first_E = more(count_E, tiles - filled), more(first_E, filled)
    start_E, end_E = more(start_E, 0), more(end_E, 0)
  until_E, visit = jnp.cumsum(count_E), jnp.arange(number, dtype=jnp.int32)
  here = jnp.searchsorted(until_E, visit, side='right', method='compare_all')
  live, here = here < len(until_E), jnp.minimum(here, len(until_E) - 1).astype(jnp.int32)
  tile = jnp.minimum(first_E[here] + visit - (until_E - count_E)[here], tiles - 1)
  inside = lambda row_E: jnp.where(live, jnp.clip(row_E[here] - tile * rows, 0, rows), 0)
  group = here if groups else jnp.where(here == E, last_group, here)
  return tile, jnp.minimum(tile, jnp.maximum(filled - 1, 0)), group, inside(start_E), inside(end_E)


def _dot(a, b, dims):
  """a . b over the dimensions (of a, of b), float32."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(a, b, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _between(x, start, end, axis: int):
  """x with zeros where its index of an axis is not in start .. end: what lies outside an array may be NaN."""
  place = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
  return jnp.where((place >= start) & (place < end), x, jnp.zeros_like(x))


def _products_kernel(tile_ref, source_ref, group_ref, start_ref, end_ref, x_ref, w_ref, out_ref, sum_ref, *,
                     over: int, transposed: bool):
  """One visit, of one tile of columns and one of the `over` that are summed over. w: DF, or FD if transposed."""
  v, d, steps = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
  start, end, rows = start_ref[v], end_ref[v], out_ref.shape[0]
  fresh = (v == 0) | (tile_ref[v] != tile_ref[jnp.maximum(v - 1, 0)])

  @pl.when(start < end)
  def _():
    x, w = x_ref[...], w_ref[...]
    if over % x.shape[1]:
      x = _between(x, 0, over - d * x.shape[1], 1)
      w = _between(w, 0, over - d * x.shape[1], int(transposed))
    product = _dot(x, w, ((1,), (int(transposed),)))

    @pl.when(d == 0)
    def _():
      sum_ref[...] = product

    @pl.when(d > 0)
    def _():
      sum_ref[...] += product

  @pl.when((d == steps - 1) & (end - start == rows))
  def _():
    out_ref[...] = sum_ref[...].astype(out_ref.dtype)

  @pl.when((d == steps - 1) & (end > start) & (end - start < rows))
  def _():
    row = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 0)
    before = jnp.where(fresh, 0.0, out_ref[...].astype(jnp.float32))
    out_ref[...] = jnp.where((row >= start) & (row < end), sum_ref[...], before).astype(out_ref.dtype)

  @pl.when((d == steps - 1) & (end == start) & fresh)
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)


def _products(x_MD, w_EDF, sizes_E, tiles: Tiles, *, transposed: bool = False, interpret=None):
  """x[m] w[e(m)], or x[m] w[e(m)]' if transposed. tiles.D is of the axis that is summed over."""
  (M, D), E, F = x_MD.shape, w_EDF.shape[0], w_EDF.shape[1 if transposed else 2]
  schedule = visits(sizes_E, M, tiles.M, groups=False)
  steps = pl.cdiv(D, tiles.D)
  summed = lambda v, d, start, end: jnp.where(start[v] < end[v], d, steps - 1)  # nothing is read where nothing is done

  def rows(f, v, d, tile, source, group, start, end):
    return source[v], summed(v, d, start, end)

  def matrix(f, v, d, tile, source, group, start, end):
    at = summed(v, d, start, end)
    return (group[v], f, at) if transposed else (group[v], at, f)

  shape = (None, tiles.F, tiles.D) if transposed else (None, tiles.D, tiles.F)
  size, columns = x_MD.dtype.itemsize, pl.cdiv(F, tiles.F)
  read = M * D * columns + D * F * (E if steps == 1 else len(schedule[0]))
  [out_MF] = tpu.call(
      functools.partial(_products_kernel, over=D, transposed=transposed), name='grouped_matmul',
      grid=(columns, len(schedule[0]), steps),
      inputs=[pl.BlockSpec((tiles.M, tiles.D), rows), pl.BlockSpec(shape, matrix)],
      outputs=[(jax.ShapeDtypeStruct((M, F), x_MD.dtype),
                pl.BlockSpec((tiles.M, tiles.F), lambda f, v, d, tile, *_: (tile[v], f)))],
      scratch=[pltpu.VMEM((tiles.M, tiles.F), jnp.float32)], prefetched=5,
      semantics=('parallel', 'arbitrary', 'arbitrary'), flops=2 * M * D * F, bytes_moved=size * (read + M * F),
      interpret=interpret)(*schedule, x_MD, w_EDF)
  return out_MF


def _weights_kernel(source_ref, group_ref, start_ref, end_ref, x_ref, dout_ref, dw_ref, sum_ref):
  """One visit of a group, of one tile of its dw."""
  v, last = pl.program_id(2), pl.num_programs(2) - 1
  start, end, rows = start_ref[v], end_ref[v], x_ref.shape[0]
  group = group_ref[v]

  @pl.when((v == 0) | (group != group_ref[jnp.maximum(v - 1, 0)]))
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(end - start == rows)
  def _():
    sum_ref[...] += _dot(x_ref[...], dout_ref[...], ((0,), (0,)))

  @pl.when((end > start) & (end - start < rows))
  def _():
    x, dout = _between(x_ref[...], start, end, 0), _between(dout_ref[...], start, end, 0)
    sum_ref[...] += _dot(x, dout, ((0,), (0,)))

  @pl.when((v == last) | (group != group_ref[jnp.minimum(v + 1, last)]))
  def _():
    dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)


def _weights(x_MD, dout_MF, sizes_E, tiles: Tiles, *, dtype, interpret=None):
  """dw_EDF: of each group the sum of x' dout over its rows."""
  (M, D), F, E = x_MD.shape, dout_MF.shape[1], sizes_E.shape[0]
  _, *schedule = visits(sizes_E, M, tiles.M, groups=True)
  columns, size = (pl.cdiv(D, tiles.D), pl.cdiv(F, tiles.F)), x_MD.dtype.itemsize
  moved = size * (M * D * columns[1] + M * F * columns[0]) + jnp.dtype(dtype).itemsize * E * D * F
  [dw_EDF] = tpu.call(
      _weights_kernel, name='grouped_matmul_weights', grid=(*columns, len(schedule[0])),
      inputs=[pl.BlockSpec((tiles.M, tiles.D), lambda d, f, v, source, *_: (source[v], d)),
              pl.BlockSpec((tiles.M, tiles.F), lambda d, f, v, source, *_: (source[v], f))],
      outputs=[(jax.ShapeDtypeStruct((E, D, F), dtype),
                pl.BlockSpec((None, tiles.D, tiles.F), lambda d, f, v, source, group, *_: (group[v], d, f)))],
      scratch=[pltpu.VMEM((tiles.D, tiles.F), jnp.float32)], prefetched=4,
      semantics=('parallel', 'parallel', 'arbitrary'), flops=2 * M * D * F, bytes_moved=moved,
      interpret=interpret)(*schedule, x_MD, dout_MF)
  return dw_EDF


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(sizes_of: Sizes, interpret, x_MD, w_EDF, sizes_E):
  one = jax.custom_batching.sequential_vmap(functools.partial(_products, tiles=sizes_of.forward, interpret=interpret))
  return one(x_MD, w_EDF, sizes_E)


def _backward(sizes_of: Sizes, interpret, saved, dout_MF):

  @jax.custom_batching.sequential_vmap
  def one(x_MD, w_EDF, sizes_E, dout_MF):
    tiles = Tiles(sizes_of.dx.M, sizes_of.dx.F, sizes_of.dx.D)
    return (_products(dout_MF, w_EDF, sizes_E, tiles, transposed=True, interpret=interpret),
            _weights(x_MD, dout_MF, sizes_E, sizes_of.dw, dtype=w_EDF.dtype, interpret=interpret))

  return *one(*saved, dout_MF), None


_grouped_matmul.defvjp(lambda sizes_of, interpret, *saved: (_grouped_matmul(sizes_of, interpret, *saved), saved),
                       _backward)
