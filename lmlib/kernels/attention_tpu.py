"""Attention on TPUs by tiles that stay on the chip: FlashAttention 2 (Dao 2023) in Pallas' Mosaic dialect.

The equations are those of attention_gpu. What differs is the machine: a grid runs in order, its last axis passes
the blocks of the other side by one that stays, and sums live in memory beside the processor from step to step.
The forward kernel and that of dq keep queries and pass keys, with a tile TS; the one of dk and dv keeps keys and
passes the queries of all heads of its group, with a tile ST, so that numbers of queries lie along lanes as they come
and no product needs a transpose. The gradient of a bias is a kernel of its own, that writes each tile once and sums
over rows where all share a bias.

Which blocks meet is known beforehand (attention_ranges) and read by the index maps: a step that has nothing to do
names the block that is there already, so that nothing is fetched. Scores are kept in units of log 2.
"""
import dataclasses
import functools
import math
import types

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from lmlib.kernels import attention_ranges, attention_tile, tpu
from lmlib.kernels.attention_tile import LOG2E, UNSEEN, dot
from lmlib.kernels.blocks import tuned
from lmlib.kernels.tpu import LANES

WIDEST = 256  # of a head
WASTE = 1.25  # how much longer than a row its blocks may be


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Positions of a block: multiples of 128 where a TPU compiles it."""
  queries: int
  keys: int


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Blocks of the kernels, each a multiple or a divisor of another's."""
  forward: Blocks = Blocks(512, 512)
  keys: Blocks = Blocks(512, 512)  # dk and dv
  queries: Blocks = Blocks(512, 512)  # dq, and the bias


def sizes(dtype, width: int, length: int, keys: int, added=()) -> Sizes:
  """Blocks that fit the 16 MB of a v5e, no longer than rows of so many queries and keys have use for."""
  # float32 products take several passes, whose parts are in memory too; so are tiles of a bias.
  most = 512 if dtype != jnp.float32 and not (width > 128 and added) else 256
  case = ' '.join([jnp.dtype(dtype).name, str(width), *added])
  best = tuned('attention_tpu', case, Sizes(*[Blocks(most, most)] * 3))
  fit = lambda one: Blocks(_fitting(one.queries, length), _fitting(one.keys, keys))
  return Sizes(fit(best.forward), fit(best.keys), fit(best.queries))


def _fitting(most: int, length: int) -> int:
  while most > LANES and -(-length // most) * most > WASTE * length:
    most //= 2
  return most


def lacking(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, added) -> list[str]:
  """What of a case is not done here; `added`: names of what is added to scores, all of which are done."""
  del pattern, added
  cases = {'a backend but a TPU, or a CPU that interprets it': jax.default_backend() not in tpu.BACKENDS,
           'keys in front': rows.front,
           f'heads wider than {WIDEST}': max(q_BTKGH.shape[-1], v_BSKH.shape[-1]) > WIDEST,
           'arrays but of float32 or bfloat16, all alike':
               len({x.dtype for x in (q_BTKGH, k_BSKH, v_BSKH)}) > 1
               or q_BTKGH.dtype not in (jnp.float32, jnp.bfloat16)}
  return [case for case, there in cases.items() if there]


def attention(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, **more):
  """Attention, BTKG and the width of v; see attention.attention() and partial_attention()."""
  return partial_attention(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, **more)[0]


def partial_attention(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, *, slope_KG=None, bias_BKGTS=None, sink_KG=None,
                      sizes_of: Sizes | None = None, interpret=None):
  """(out, lse_BTKG): lse is the log of the sum of exp(score), -inf where nothing is seen, to join parts of the keys.

  Both have gradients. lse includes the sink. A score below -3e29 is none. sizes_of: blocks, whose default is
  sizes(); ValueError if they do not divide each other. interpret: see tpu.call().
  """
  B, T, K, G, H = q_BTKGH.shape
  S, W = k_BSKH.shape[1], v_BSKH.shape[-1]
  added = {'sinks': sink_KG, 'slopes': slope_KG, 'bias': bias_BKGTS}
  added = tuple(name for name, x in added.items() if x is not None)
  sizes_of = sizes_of or sizes(q_BTKGH.dtype, max(H, W), T, S, added)
  each = (sizes_of.forward, sizes_of.keys, sizes_of.queries)
  most_t, most_s = max(blocks.queries for blocks in each), max(blocks.keys for blocks in each)
  if any(most_t % blocks.queries or most_s % blocks.keys for blocks in each):
    raise ValueError(f'attention_tpu.Sizes {sizes_of}: the blocks of one kernel must be multiples of another\'s')
  long_t, long_s, fill = -T % most_t, -S % most_s, attention_tile.fill
  q_BNTH = fill(jnp.moveaxis(q_BTKGH, 1, 3).reshape(B, K * G, T, H), 2, long_t)
  k_BKSH, v_BKSH = (fill(x_BSKH.swapaxes(1, 2), 2, long_s) for x_BSKH in (k_BSKH, v_BSKH))
  given = {}
  if sink_KG is not None:
    given['sink_N'] = sink_KG.astype(jnp.float32).reshape(K * G)
  if slope_KG is not None:
    given['slope_N'] = slope_KG.astype(jnp.float32).reshape(K * G)
  if bias_BKGTS is not None:
    bias_BKGTS = jnp.broadcast_to(bias_BKGTS, (bias_BKGTS.shape[0], K, G, T, S))
    given['bias_BNTS'] = fill(fill(bias_BKGTS.reshape(-1, K * G, T, S), 2, long_t), 3, long_s)
  case = _Case(**attention_tile.of_case(pattern, rows, H, long_t or long_s), sizes=sizes_of, interpret=interpret,
               added=added, ordered=rows.place_BT is None and rows.place_BS is None)
  whole = attention_tile.whole(rows, q_BTKGH, k_BSKH, long_t, long_s)
  out_BNTH, lse_BNT = _attention(case, q_BNTH, k_BKSH, v_BKSH, given, whole)
  return (jnp.moveaxis(out_BNTH[:, :, :T].reshape(B, K, G, T, W), 3, 1),
          jnp.moveaxis(lse_BNT[:, :, :T].reshape(B, K, G, T), 3, 1))


@dataclasses.dataclass(frozen=True)
class _Case(attention_tile.Tile):
  """What kernels are compiled for."""
  sizes: Sizes
  added: tuple[str, ...]  # to scores
  ordered: bool  # places are 0, 1, 2, ..., and -1 at the end
  interpret: object

  def arrays(self, rows):
    """What a mask and slopes are made of, by name: int32 numbers of queries, B1T, and of keys, B1S."""
    found = {}
    if self.places:
      found |= dict(place_B1T=rows.place_BT, place_B1S=rows.place_BS)
    if self.segments:
      found |= dict(segment_B1T=rows.segment_BT, segment_B1S=rows.segment_BS)
    if self.prefix:
      found |= dict(prefix_B1S=rows.prefix_BS)
    return {name: x_BT[:, None] for name, x_BT in found.items()}

  def most(self, blocks: Blocks, T: int, S: int, keys_stay: bool) -> int:
    """The most blocks that pass by one that stays, from the pattern alone."""
    size, passing, length, others = blocks.queries, blocks.keys, T, S
    if keys_stay:
      size, passing, length, others = passing, size, others, length
    if not self.ordered or not self.pattern.local:
      return others // passing
    first = np.arange(0, length, size)
    last = first + size - 1
    reach, chunk = (self.pattern.window or T + S) - 1, self.pattern.chunk or T + S
    low = np.maximum(first - reach, first // chunk * chunk)
    high = np.minimum(last + reach, last // chunk * chunk + chunk - 1)
    if self.pattern.causal and not self.prefix:
      low, high = (first, high) if keys_stay else (low, last)
    low, high = np.maximum(low, 0), np.minimum(high, others - 1)
    return max(1, int((high // passing - low // passing).max()) + 1)

  def share(self, T: int, S: int) -> float:
    """About how much of all tiles is visited, from the pattern alone."""
    if self.ordered and T == S and not self.prefix:
      return dataclasses.replace(self.pattern, stride=None).mean_keys(T) / S
    return 1.0


@dataclasses.dataclass(frozen=True)
class _Kernel:
  """One of the kernels: a grid, and which block a step of it is about."""
  name: str
  grid: tuple[int, ...]
  blocks: Blocks
  group: int  # heads of queries that share one of keys
  stays: int  # blocks of the side that stays
  keys_stay: bool = False

  def at(self, step, bounds_ref):
    """(row, head, block of queries, block of keys, whether they meet, whether all of it is seen)."""
    if self.keys_stay:
      b, k, j, g, passing = step
      i, met, whole = _passing(bounds_ref, b * self.stays + j, passing)
      return b, k * self.group + g, i, j, met, whole
    b, n, i, passing = step
    return b, n, i, *_passing(bounds_ref, b * self.stays + i, passing)

  def spec(self, name: str, shape):
    """The block of an array whose axes are the last letters of its name."""
    size = dict(B=None, N=None, K=None, T=self.blocks.queries, S=self.blocks.keys)
    axes = name.rpartition('_')[2]

    def index(*grid_and_refs):
      b, n, i, j, _, _ = self.at(grid_and_refs[:len(self.grid)], grid_and_refs[len(self.grid)])
      at = dict(B=b if shape[0] > 1 else 0, N=n, K=n // self.group, T=i, S=j)
      return tuple(at.get(letter, 0) for letter in axes)

    return pl.BlockSpec(tuple(size.get(letter, length) for letter, length in zip(axes, shape)), index)

  def run(self, case: _Case, body, given: dict, outputs: dict, scratch: dict, work):
    """The outputs, by name. given: arrays; outputs, scratch: shapes; work: (products of a tile, their width)."""
    scalars = [name for name in ('bounds', 'sink_N', 'slope_N') if name in given]
    inputs = [name for name in given if name not in scalars]
    kept = {f'{name}_column': ((self.blocks.keys if self.keys_stay else self.blocks.queries, LANES),
                               given[name].dtype) for name in inputs if self.stands(name)}
    scratch = {**{name: (shape, jnp.float32) for name, shape in scratch.items()}, **kept}
    names = [*scalars, *inputs, *outputs, *scratch]

    def kernel(*refs):
      ref = types.SimpleNamespace(**dict(zip(names, refs)))
      step = tuple(pl.program_id(axis) for axis in range(len(self.grid)))
      body(case, self, ref, step)

    B, N, T, _ = given['q_BNTH'].shape
    S = given['k_BKSH'].shape[2]
    pairs = B * N * T * S * case.share(T, S)
    tiles = pairs / (self.blocks.queries * self.blocks.keys)
    streamed = 'T' if self.keys_stay else 'S'
    block_bytes = lambda name: (given[name].dtype.itemsize * math.prod(
        size for size in self.spec(name, given[name].shape).block_shape if size is not None))
    moved = sum(tiles * block_bytes(name) if streamed in name.rpartition('_')[2] else given[name].nbytes
                for name in inputs) + sum(math.prod(x.shape) * x.dtype.itemsize for x in outputs.values())
    semantics = ['parallel'] * 3 + ['arbitrary'] * (len(self.grid) - 3)
    found = tpu.call(
        kernel, name=self.name, grid=self.grid, inputs=[self.spec(name, given[name].shape) for name in inputs],
        outputs=[(x, self.spec(name, x.shape)) for name, x in outputs.items()],
        scratch=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()], prefetched=len(scalars),
        semantics=semantics, flops=2 * pairs * work, bytes_moved=moved, exponentials=pairs, interpret=case.interpret,
    )(*(given[name] for name in (*scalars, *inputs)))
    return dict(zip(outputs, found))

  def stands(self, name: str) -> bool:
    """Whether numbers of positions, one each, are those of the rows of a tile."""
    return name.endswith('1S' if self.keys_stay else '1T')


def _passing(bounds_ref, row, step):
  """(block, whether it is met, whether all of it is seen) of a step past a row of attention_ranges.ranges()."""
  first, full, end, last = (bounds_ref[4 * row + column] for column in range(4))
  here = first + step
  return jnp.maximum(jnp.minimum(here, last - 1), 0), here < last, (here >= full) & (here < end)


def _stand(ref):
  """Turns numbers that come along lanes into columns, for the rows of the tiles to come."""
  for name in [name for name in vars(ref) if hasattr(ref, f'{name}_column')]:
    row_1T = getattr(ref, name)[...]
    getattr(ref, f'{name}_column')[...] = jnp.broadcast_to(row_1T, (LANES, row_1T.shape[1])).T


def _lying(column_TL):
  """Equal lanes of a column, TL, as a row, 1T."""
  return column_TL.T[:1]


def _wide(column_TL, lanes: int):
  """Equal lanes of a column as so many lanes."""
  return jnp.tile(column_TL, (1, -(-lanes // LANES)))[:, :lanes]


def _numbers(kernel: _Kernel, ref, name: str):
  """Numbers of positions: TS, alike in a row, of those that stay; 1S of those that pass."""
  if not kernel.stands(name):
    return getattr(ref, name)[...]
  return _wide(getattr(ref, f'{name}_column')[...], kernel.blocks.queries if kernel.keys_stay else kernel.blocks.keys)


def _places(case: _Case, kernel: _Kernel, ref, i, j):
  """The places of queries and of keys, one of them a column."""
  if case.places:
    return _numbers(kernel, ref, 'place_B1T'), _numbers(kernel, ref, 'place_B1S')
  line = lambda size, axis: jax.lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)
  return (i * kernel.blocks.queries + line(kernel.blocks.queries, int(kernel.keys_stay)),
          j * kernel.blocks.keys + line(kernel.blocks.keys, int(not kernel.keys_stay)))


def _scores(case: _Case, kernel: _Kernel, ref, at, *, masked: bool):
  """(scores of a tile times log2(e), what the gradient of its product is multiplied by, distances for slopes)."""
  _, n, i, j, _, _ = at
  sides = (ref.k_BKSH, ref.q_BNTH) if kernel.keys_stay else (ref.q_BNTH, ref.k_BKSH)
  score_TS, steep_TS = case.scores(dot(sides[0][...], sides[1][...], ((1,), (1,))))
  away_TS = None
  if masked or 'slopes' in case.added:
    place_T, place_S = _places(case, kernel, ref, i, j)
  if 'slopes' in case.added:
    away_TS = (place_S - place_T).astype(jnp.float32)
    score_TS += away_TS * (ref.slope_N[n] * LOG2E)
  if 'bias' in case.added:
    bias_TS = ref.bias_BNTS[...].astype(jnp.float32) * LOG2E
    score_TS += bias_TS.T if kernel.keys_stay else bias_TS
  if masked:
    names = ('segment_B1T', case.segments), ('segment_B1S', case.segments), ('prefix_B1S', case.prefix)
    more = [_numbers(kernel, ref, name) if there else None for name, there in names]
    score_TS = jnp.where(case.seen(place_T, place_S, *more), score_TS, UNSEEN)
  return score_TS, steep_TS, away_TS


def _gradients(case: _Case, kernel: _Kernel, ref, at, *, masked: bool):
  """(probabilities, gradients of scores, of products but for scale, distances) of a tile."""
  score_TS, steep_TS, away_TS = _scores(case, kernel, ref, at, masked=masked)
  sides = (ref.v_BKSH, ref.dout_BNTH) if kernel.keys_stay else (ref.dout_BNTH, ref.v_BKSH)
  prob_TS = jnp.exp2(score_TS - _numbers(kernel, ref, 'lse_BN1T'))
  dscore_TS = prob_TS * (dot(sides[0][...], sides[1][...], ((1,), (1,))) - _numbers(kernel, ref, 'delta_BN1T'))
  return prob_TS, dscore_TS, dscore_TS if steep_TS is None else dscore_TS * steep_TS, away_TS


def _visit(at, tile):
  """Runs tile(masked) if the blocks meet, without a mask if all is seen."""
  *_, met, whole = at
  pl.when(met & whole)(functools.partial(tile, masked=False))
  pl.when(met & jnp.logical_not(whole))(functools.partial(tile, masked=True))


def _forward_body(case: _Case, kernel: _Kernel, ref, step):
  """One block of queries of one head, past which its keys come."""
  at = kernel.at(step, ref.bounds)

  @pl.when(step[-1] == 0)
  def _():
    _stand(ref)
    sink = ref.sink_N[at[1]] * LOG2E if 'sinks' in case.added else UNSEEN
    ref.most_TL[...] = jnp.full_like(ref.most_TL, sink)
    ref.sum_TL[...] = jnp.full_like(ref.sum_TL, 1 / ref.sum_TL.shape[1] if 'sinks' in case.added else 0.0)
    ref.acc_TH[...] = jnp.zeros_like(ref.acc_TH)

  def tile(*, masked):
    score_TS, *_ = _scores(case, kernel, ref, at, masked=masked)
    most_TL, lanes = ref.most_TL[...], ref.sum_TL.shape[1]
    more_TL = jnp.maximum(most_TL, score_TS.max(1, keepdims=True))
    shrink_TL, prob_TS = jnp.exp2(most_TL - more_TL), jnp.exp2(score_TS - _wide(more_TL, score_TS.shape[1]))
    ref.most_TL[...] = more_TL
    parts = [prob_TS[:, start:start + lanes] for start in range(0, prob_TS.shape[1], lanes)]
    ref.sum_TL[...] = ref.sum_TL[...] * _wide(shrink_TL, lanes) + sum(parts[1:], parts[0])
    v_SH = ref.v_BKSH[...]
    weighted_TH = dot(prob_TS.astype(v_SH.dtype), v_SH, ((1,), (0,)))
    ref.acc_TH[...] = ref.acc_TH[...] * _wide(shrink_TL, v_SH.shape[1]) + weighted_TH

  _visit(at, tile)

  @pl.when(step[-1] == kernel.grid[-1] - 1)
  def _():
    empty_T1 = ref.most_TL[:, :1] <= UNSEEN / 2  # no score was seen: what was summed are UNSEEN ones
    sum_T1 = jnp.where(empty_T1, 1.0, ref.sum_TL[...].sum(1, keepdims=True))
    ref.out_BNTH[...] = jnp.where(empty_T1, 0.0, ref.acc_TH[...] / sum_T1).astype(ref.out_BNTH.dtype)
    lse_T1 = jnp.where(empty_T1, -jnp.inf, ref.most_TL[:, :1] / LOG2E + jnp.log(sum_T1))
    ref.lse_BN1T[...] = _lying(jnp.broadcast_to(lse_T1, ref.most_TL.shape))


def _keys_body(case: _Case, kernel: _Kernel, ref, step):
  """dk and dv of one block of keys of one key head, past which the queries of its group come; tiles are ST."""
  at, (*_, g, passing) = kernel.at(step, ref.bounds), step

  @pl.when((g == 0) & (passing == 0))
  def _():
    _stand(ref)
    ref.dk_SH[...] = jnp.zeros_like(ref.dk_SH)
    ref.dv_SH[...] = jnp.zeros_like(ref.dv_SH)

  def tile(*, masked):
    prob_ST, _, dproduct_ST, _ = _gradients(case, kernel, ref, at, masked=masked)
    q_TH, dout_TH = ref.q_BNTH[...], ref.dout_BNTH[...]
    ref.dv_SH[...] += dot(prob_ST.astype(dout_TH.dtype), dout_TH, ((1,), (0,)))
    ref.dk_SH[...] += dot(dproduct_ST.astype(q_TH.dtype), q_TH, ((1,), (0,)))

  _visit(at, tile)

  @pl.when((g == kernel.group - 1) & (passing == kernel.grid[-1] - 1))
  def _():
    ref.dk_BKSH[...] = (ref.dk_SH[...] * case.scale).astype(ref.dk_BKSH.dtype)
    ref.dv_BKSH[...] = ref.dv_SH[...].astype(ref.dv_BKSH.dtype)


def _queries_body(case: _Case, kernel: _Kernel, ref, step):
  """dq of one block of queries of one head, and what each query adds to the gradient of the slope."""
  at = kernel.at(step, ref.bounds)

  @pl.when(step[-1] == 0)
  def _():
    _stand(ref)
    ref.dq_TH[...] = jnp.zeros_like(ref.dq_TH)
    if 'slopes' in case.added:
      ref.dslope_T[...] = jnp.zeros_like(ref.dslope_T)

  def tile(*, masked):
    _, dscore_TS, dproduct_TS, away_TS = _gradients(case, kernel, ref, at, masked=masked)
    k_SH = ref.k_BKSH[...]
    ref.dq_TH[...] += dot(dproduct_TS.astype(k_SH.dtype), k_SH, ((1,), (0,)))
    if 'slopes' in case.added:
      ref.dslope_T[...] += (dscore_TS * away_TS).sum(1, keepdims=True)

  _visit(at, tile)

  @pl.when(step[-1] == kernel.grid[-1] - 1)
  def _():
    ref.dq_BNTH[...] = (ref.dq_TH[...] * case.scale).astype(ref.dq_BNTH.dtype)
    if 'slopes' in case.added:
      ref.dslope_BN1T[...] = _lying(ref.dslope_T[...])


@dataclasses.dataclass(frozen=True)
class _BiasKernel(_Kernel):
  """One whose steps are all tiles, each of them for one row after another of those that share a bias."""

  def at(self, step, bounds_ref):
    """As above."""
    apart, n, i, j, b = step
    b += apart * self.grid[-1]
    first, full, end, last = (bounds_ref[4 * (b * self.stays + i) + column] for column in range(4))
    return b, n, i, j, (j >= first) & (j < last), (j >= full) & (j < end)


def _bias_body(case: _Case, kernel: _BiasKernel, ref, step):
  """A tile of the gradient of the bias of one head."""
  at = kernel.at(step, ref.bounds)
  _stand(ref)

  @pl.when(step[-1] == 0)
  def _():
    ref.dbias_BNTS[...] = jnp.zeros_like(ref.dbias_BNTS)

  def tile(*, masked):
    ref.dbias_BNTS[...] += _gradients(case, kernel, ref, at, masked=masked)[1]

  _visit(at, tile)


def _bounds(case: _Case, rows, blocks: Blocks, *, keys_stay: bool = False):
  """attention_ranges.ranges() of each block that stays, one number after another."""
  met = attention_ranges.met(case.pattern, rows, blocks.queries, blocks.keys)
  return attention_ranges.ranges(*(x_BIJ.swapaxes(1, 2) if keys_stay else x_BIJ for x_BIJ in met)).reshape(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(case: _Case, q_BNTH, k_BKSH, v_BKSH, added, rows):
  """(out_BNTH, lse_BNT). added: sink_N, slope_N, bias_BNTS, those that there are."""
  return _forward(case, q_BNTH, k_BKSH, v_BKSH, added, rows)[0]


def _forward(case: _Case, q_BNTH, k_BKSH, v_BKSH, added, rows):
  (B, N, T, H), (K, S, W), blocks = q_BNTH.shape, v_BKSH.shape[1:], case.sizes.forward
  I, J = T // blocks.queries, case.most(blocks, T, S, keys_stay=False)
  kernel = _Kernel('attention_forward', (B, N, I, J), blocks, N // K, I)
  given = dict(bounds=_bounds(case, rows, blocks), q_BNTH=q_BNTH, k_BKSH=k_BKSH, v_BKSH=v_BKSH, **added,
               **case.arrays(rows))
  found = kernel.run(
      case, _forward_body, given, dict(out_BNTH=jax.ShapeDtypeStruct((B, N, T, W), q_BNTH.dtype),
                                       lse_BN1T=jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)),
      dict(most_TL=(blocks.queries, LANES), sum_TL=(blocks.queries, math.gcd(blocks.keys, LANES)),
           acc_TH=(blocks.queries, W)), H + W)
  out_BNTH, lse_BNT = found['out_BNTH'], found['lse_BN1T'][:, :, 0]
  return (out_BNTH, lse_BNT), (q_BNTH, k_BKSH, v_BKSH, added, rows, out_BNTH, lse_BNT)


def _backward(case: _Case, saved, gradients):
  q_BNTH, k_BKSH, v_BKSH, added, rows, out_BNTH, lse_BNT = saved
  dout_BNTH, dlse_BNT = gradients
  (B, N, T, H), (K, S, W) = q_BNTH.shape, v_BKSH.shape[1:]
  G, float32 = N // K, lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  delta_BNT = jnp.einsum('BNTH,BNTH->BNT', dout_BNTH, out_BNTH, preferred_element_type=jnp.float32)
  delta_BNT -= dlse_BNT  # d lse[t] / d score[t,s] = p[t,s]: the same sum again
  dadded = {}
  if 'sink_N' in added:
    dadded['sink_N'] = -(jnp.exp(added['sink_N'][None, :, None] - lse_BNT) * delta_BNT).sum((0, 2))
  scaled_BNT = jnp.where(jnp.isneginf(lse_BNT), 0, lse_BNT) * LOG2E
  given = dict(q_BNTH=q_BNTH, k_BKSH=k_BKSH, v_BKSH=v_BKSH, dout_BNTH=dout_BNTH, lse_BN1T=scaled_BNT[:, :, None],
               delta_BN1T=delta_BNT[:, :, None], **added, **case.arrays(rows))
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)

  blocks = case.sizes.keys
  I, J = case.most(blocks, T, S, keys_stay=True), S // blocks.keys
  kernel = _Kernel('attention_backward_keys', (B, K, J, G, I), blocks, G, J, keys_stay=True)
  of_keys = kernel.run(case, _keys_body, dict(bounds=_bounds(case, rows, blocks, keys_stay=True), **given),
                       dict(dk_BKSH=like(k_BKSH), dv_BKSH=like(v_BKSH)),
                       dict(dk_SH=(blocks.keys, H), dv_SH=(blocks.keys, W)), 2 * (H + W))

  blocks = case.sizes.queries
  I, J = T // blocks.queries, case.most(blocks, T, S, keys_stay=False)
  given = dict(bounds=_bounds(case, rows, blocks), **given)
  kernel = _Kernel('attention_backward_queries', (B, N, I, J), blocks, G, I)
  outputs, scratch = dict(dq_BNTH=like(q_BNTH)), dict(dq_TH=(blocks.queries, H))
  if 'slope_N' in added:
    outputs['dslope_BN1T'], scratch['dslope_T'] = float32(B, N, 1, T), (blocks.queries, LANES)
  of_queries = kernel.run(case, _queries_body, given, outputs, scratch, 2 * H + W)
  if 'slope_N' in added:
    dadded['slope_N'] = of_queries['dslope_BN1T'].sum((0, 2, 3))
  if 'bias_BNTS' in added:
    apart, J = added['bias_BNTS'].shape[0], S // blocks.keys
    kernel = _BiasKernel('attention_backward_bias', (apart, N, I, J, B // apart), blocks, G, I)
    of_bias = kernel.run(case, _bias_body, given, dict(dbias_BNTS=float32(apart, N, T, S)), {}, H + W)
    dadded['bias_BNTS'] = of_bias['dbias_BNTS'].astype(added['bias_BNTS'].dtype)
  return of_queries['dq_BNTH'], of_keys['dk_BKSH'], of_keys['dv_BKSH'], dadded, None


_attention.defvjp(_forward, _backward)
