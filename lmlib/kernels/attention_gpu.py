"""Attention on GPUs by blocks that stay on the chip: FlashAttention 2 (Dao 2023) in Pallas' Triton dialect.

Forward: a block of queries meets its blocks of keys in turn and keeps, of each row, the greatest score m so far,
the sum l of exp(score - m) and the weighted sum of values, both made smaller when m grows. At the end
out = acc / l, and lse = m + log l is all that is kept for the way back. Backward, with p = exp(score - lse):

  dv[s] = sum_t p[t,s] dout[t]         dp[t,s] = dout[t] . v[s]         delta[t] = dout[t] . out[t]
  dscore[t,s] = p[t,s] (dp[t,s] - delta[t])      dk[s] = scale sum_t dscore[t,s] q[t]      dq[t] = scale sum_s ...

in two kernels, one over blocks of keys (with all queries of their head and of its group) and one over blocks of
queries: two products more than in one kernel, but sums always come in the same order, so that results repeat bit
for bit. Which blocks meet is known beforehand (attention_ranges). Scores are kept in units of log 2.
"""
import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

from lmlib.kernels import attention_ranges, attention_tile
from lmlib.kernels.attention_tile import LOG2E, UNSEEN, dot
from lmlib.kernels.blocks import tuned

SMALLEST, WIDEST = 16, 256  # of a block, and of a head


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Positions of a block, and how Triton runs it."""
  queries: int
  keys: int
  warps: int = 4
  stages: int = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Blocks of the three kernels: the best of those tried on an H200 with heads of 128 in bfloat16."""
  forward: Blocks = Blocks(128, 64)
  keys: Blocks = Blocks(64, 64)  # dk and dv
  queries: Blocks = Blocks(64, 64)  # dq


def sizes(dtype, width: int) -> Sizes:
  """Blocks that fit the shared memory and registers of an H100 or A100, or that were measured on the chip."""
  found = Sizes()
  if dtype == jnp.float32:
    small = Blocks(64, 32, 4, 1) if width <= 128 else Blocks(32, 16, 4, 1)
    found = Sizes(small, dataclasses.replace(small, queries=small.keys, keys=small.queries), small)
  elif width > 128:
    found = Sizes(Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 1), Blocks(64, 32, 4, 1))
  return tuned('attention_gpu', f'{jnp.dtype(dtype).name} {width}', found)


def lacking(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, added) -> list[str]:
  """What of a case is not done here; `added`: names of what is added to scores, all of which are done."""
  del pattern, added
  width = max(q_BTKGH.shape[-1], v_BSKH.shape[-1])
  cases = {'a backend but a GPU, or a CPU that interprets it': jax.default_backend() not in ('gpu', 'cpu'),
           'keys in front': rows.front, f'heads wider than {WIDEST}': width > WIDEST,
           'arrays but of float32, bfloat16 or float16, all alike':
               len({x.dtype for x in (q_BTKGH, k_BSKH, v_BSKH)}) > 1
               or q_BTKGH.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16)}
  return [case for case, there in cases.items() if there]


def attention(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, **more):
  """Attention, BTKG and the width of v; see attention.attention() and partial_attention()."""
  return partial_attention(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, **more)[0]


def partial_attention(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, *, slope_KG=None, bias_BKGTS=None, sink_KG=None,
                      sizes_of: Sizes | None = None, interpret: bool | None = None):
  """(out, lse_BTKG): lse is the log of the sum of exp(score), -inf where nothing is seen, to join parts of the keys.

  Both have gradients. lse includes the sink. sizes_of: blocks, whose default is sizes(). interpret: run on any
  backend, slowly; None: on a CPU.
  """
  B, T, K, G, H = q_BTKGH.shape
  S, W = k_BSKH.shape[1], v_BSKH.shape[-1]
  interpret = jax.default_backend() == 'cpu' if interpret is None else interpret
  width = max(SMALLEST, 1 << (max(H, W) - 1).bit_length())
  sizes_of = sizes_of or sizes(q_BTKGH.dtype, width)
  each = (sizes_of.forward, sizes_of.keys, sizes_of.queries)
  most_t = max(blocks.queries for blocks in each)
  most_s = max(blocks.keys for blocks in each)
  if any(most_t % blocks.queries or most_s % blocks.keys for blocks in each):
    raise ValueError(f'attention_gpu.Sizes {sizes_of}: the blocks of one kernel must be multiples of another\'s')
  long_t, long_s = -T % most_t, -S % most_s
  wide = lambda x, long: attention_tile.fill(attention_tile.fill(x, 1, long), x.ndim - 1, width - x.shape[-1])
  q_BTNH = wide(q_BTKGH.reshape(B, T, K * G, H), long_t)
  whole = attention_tile.whole(rows, q_BTKGH, k_BSKH, long_t, long_s)
  k_BSKH, v_BSKH = wide(k_BSKH, long_s), wide(v_BSKH, long_s)
  heads = lambda x_KG: None if x_KG is None else x_KG.astype(jnp.float32).reshape(K * G)
  if bias_BKGTS is not None:
    bias_BKGTS = jnp.broadcast_to(bias_BKGTS, (bias_BKGTS.shape[0], K, G, T, S)).reshape(-1, K * G, T, S)
    bias_BKGTS = attention_tile.fill(attention_tile.fill(bias_BKGTS, 2, long_t), 3, long_s)
  added = heads(sink_KG), heads(slope_KG), bias_BKGTS
  case = _Case(**attention_tile.of_case(pattern, rows, H, long_t or long_s), sizes=sizes_of, interpret=interpret)
  out_BTNH, lse_BNT = _attention(case, q_BTNH, k_BSKH, v_BSKH, added, whole)
  return (out_BTNH[:, :T, :, :W].reshape(B, T, K, G, W),
          lse_BNT[:, :, :T].swapaxes(1, 2).reshape(B, T, K, G))


@dataclasses.dataclass(frozen=True)
class _Case(attention_tile.Tile):
  """What a kernel is compiled for."""
  sizes: Sizes
  interpret: bool

  def arrays(self, rows):
    """The arrays of queries, BT, and of keys, BS, that a mask is made of."""
    at = lambda place, segment: [x for x, there in ((place, self.places), (segment, self.segments)) if there]
    return at(rows.place_BT, rows.segment_BT), at(rows.place_BS, rows.segment_BS) + [rows.prefix_BS] * self.prefix

  def tile(self, product_TS, numbers, starts, slope=None, bias_TS=None, *, masked: bool):
    """(scores times log2(e), what the gradient of the product is multiplied by, distances for slopes).

    numbers(): slices of arrays(), of queries and of keys; starts: places of the first query and key of the tile.
    """
    score_TS, steep_TS = self.scores(product_TS)
    away_TS = None
    if masked or slope is not None:
      of_T, of_S = numbers()
      place = lambda given, side: (given.pop(0) if self.places else starts[side] + jnp.arange(
          product_TS.shape[side], dtype=jnp.int32))
      place_T1, place_1S = place(of_T, 0)[:, None], place(of_S, 1)[None, :]
    if slope is not None:
      away_TS = (place_1S - place_T1).astype(jnp.float32)
      score_TS += away_TS * (slope * LOG2E)
    if bias_TS is not None:
      score_TS += bias_TS.astype(jnp.float32) * LOG2E
    if masked:
      prefix_1S = of_S.pop()[None, :] if self.prefix else None
      segments = (of_T.pop()[:, None], of_S.pop()[None, :]) if self.segments else (None, None)
      score_TS = jnp.where(self.seen(place_T1, place_1S, *segments, prefix_1S), score_TS, UNSEEN)
    return score_TS, steep_TS, away_TS


def _three(bounds_ref, step, carry, *where):
  """Runs step(j, carry, masked) over the blocks of a range: with a mask, without, with."""
  first, full, end, last = (bounds_ref[(*where, i)] for i in range(4))
  masked, plain = functools.partial(step, masked=True), functools.partial(step, masked=False)
  carry = jax.lax.fori_loop(first, full, masked, carry)
  carry = jax.lax.fori_loop(full, end, plain, carry)
  return jax.lax.fori_loop(end, last, masked, carry)


def _forward_kernel(case: _Case, *refs):
  """One block of queries of one head."""
  size_t, size_s = case.sizes.forward.queries, case.sizes.forward.keys
  of_t, of_s = case.places + case.segments, case.places + case.segments + case.prefix
  bounds_ref, q_ref, k_ref, v_ref, sink_ref, slope_ref, bias_ref, *more, out_ref, lse_ref = refs
  refs_T, refs_S = more[:of_t], more[of_t:of_t + of_s]
  i = pl.num_programs(2) - 1 - pl.program_id(2)  # the longest first
  q_TH, of_T = q_ref[...], [ref[...] for ref in refs_T]
  slope = None if slope_ref is None else slope_ref[0]

  def step(j, carry, *, masked):
    most_T, sum_T, acc_TH = carry
    keys = pl.ds(j * size_s, size_s)
    numbers = lambda: (list(of_T), [ref[keys] for ref in refs_S])
    bias_TS = None if bias_ref is None else bias_ref[:, keys]
    score_TS, *_ = case.tile(dot(q_TH, k_ref[keys, :], ((1,), (1,))), numbers, (i * size_t, j * size_s), slope, bias_TS,
                             masked=masked)
    more_T = jnp.maximum(most_T, score_TS.max(1))
    shrink_T = jnp.exp2(most_T - more_T)
    prob_TS = jnp.exp2(score_TS - more_T[:, None])
    acc_TH = acc_TH * shrink_T[:, None] + dot(prob_TS.astype(v_ref.dtype), v_ref[keys, :], ((1,), (0,)))
    return more_T, sum_T * shrink_T + prob_TS.sum(1), acc_TH

  zero_T, acc_TH = jnp.zeros((size_t,), jnp.float32), jnp.zeros((size_t, q_ref.shape[-1]), jnp.float32)
  sink = UNSEEN if sink_ref is None else sink_ref[0] * LOG2E
  carry = zero_T + sink, zero_T + (0.0 if sink_ref is None else 1.0), acc_TH
  most_T, sum_T, acc_TH = _three(bounds_ref, step, carry, i)
  empty_T = most_T <= UNSEEN / 2  # no score was seen: what was summed are UNSEEN ones
  sum_T = jnp.where(empty_T, 1.0, sum_T)
  out_ref[...] = jnp.where(empty_T[:, None], 0.0, acc_TH / sum_T[:, None]).astype(out_ref.dtype)
  lse_ref[...] = jnp.where(empty_T, -jnp.inf, (most_T + jnp.log2(sum_T)) / LOG2E)


def _gradients(case: _Case, arrays, *tile, masked: bool):
  """(probabilities, gradients of scores, of products but for scale, distances). arrays: q, k, v, dout, lse, delta."""
  q_TH, k_SH, v_SH, dout_TH, lse_T, delta_T = arrays
  score_TS, steep_TS, away_TS = case.tile(dot(q_TH, k_SH, ((1,), (1,))), *tile, masked=masked)
  prob_TS = jnp.exp2(score_TS - lse_T[:, None])
  dscore_TS = prob_TS * (dot(dout_TH, v_SH, ((1,), (1,))) - delta_T[:, None])
  return prob_TS, dscore_TS, dscore_TS if steep_TS is None else dscore_TS * steep_TS, away_TS


def _keys_kernel(case: _Case, group: int, *refs):
  """dk and dv of one block of keys of one key head."""
  size_t, size_s = case.sizes.keys.queries, case.sizes.keys.keys
  of_t = case.places + case.segments
  bounds_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, slope_ref, bias_ref, *more, dk_ref, dv_ref = refs
  refs_T, refs_S = more[:of_t], more[of_t:]
  j = pl.program_id(2)
  k_SH, v_SH, of_S = k_ref[...], v_ref[...], [ref[...] for ref in refs_S]

  def head(g, carry):

    def step(i, carry, *, masked):
      dk_SH, dv_SH = carry
      queries = pl.ds(i * size_t, size_t)
      q_TH, dout_TH = q_ref[queries, g, :], dout_ref[queries, g, :]
      prob_TS, _, dproduct_TS, _ = _gradients(
          case, (q_TH, k_SH, v_SH, dout_TH, lse_ref[g, queries], delta_ref[g, queries]),
          lambda: ([ref[queries] for ref in refs_T], list(of_S)), (i * size_t, j * size_s),
          None if slope_ref is None else slope_ref[g], None if bias_ref is None else bias_ref[g, queries, :],
          masked=masked)
      dv_SH += dot(prob_TS.astype(dout_TH.dtype), dout_TH, ((0,), (0,)))
      return dk_SH + dot(dproduct_TS.astype(q_TH.dtype), q_TH, ((0,), (0,))), dv_SH

    return _three(bounds_ref, step, carry, j)

  zero_SH = jnp.zeros(k_ref.shape, jnp.float32)
  dk_SH, dv_SH = jax.lax.fori_loop(0, group, head, (zero_SH, zero_SH))
  dk_ref[...] = (dk_SH * case.scale).astype(dk_ref.dtype)
  dv_ref[...] = dv_SH.astype(dv_ref.dtype)


def _queries_kernel(case: _Case, *refs):
  """dq of one block of queries of one head, and what each query adds to the gradient of the slope."""
  size_t, size_s = case.sizes.queries.queries, case.sizes.queries.keys
  of_t, of_s = case.places + case.segments, case.places + case.segments + case.prefix
  bounds_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, slope_ref, bias_ref, *more = refs
  refs_T, refs_S, (dq_ref, *dslope_ref) = more[:of_t], more[of_t:of_t + of_s], more[of_t + of_s:]
  i = pl.num_programs(2) - 1 - pl.program_id(2)
  q_TH, dout_TH, of_T = q_ref[...], dout_ref[...], [ref[...] for ref in refs_T]
  lse_T, delta_T = lse_ref[...], delta_ref[...]
  slope = None if slope_ref is None else slope_ref[0]

  def step(j, carry, *, masked):
    dq_TH, *dslope_T = carry
    keys = pl.ds(j * size_s, size_s)
    k_SH = k_ref[keys, :]
    _, dscore_TS, dproduct_TS, away_TS = _gradients(
        case, (q_TH, k_SH, v_ref[keys, :], dout_TH, lse_T, delta_T),
        lambda: (list(of_T), [ref[keys] for ref in refs_S]), (i * size_t, j * size_s), slope,
        None if bias_ref is None else bias_ref[:, keys], masked=masked)
    return dq_TH + dot(dproduct_TS.astype(k_SH.dtype), k_SH, ((1,), (0,))), *(
        x_T + (dscore_TS * away_TS).sum(1) for x_T in dslope_T)

  dslope_T = [jnp.zeros((size_t,), jnp.float32) for _ in dslope_ref]
  dq_TH, *dslope_T = _three(bounds_ref, step, (jnp.zeros(q_ref.shape, jnp.float32), *dslope_T), i)
  dq_ref[...] = (dq_TH * case.scale).astype(dq_ref.dtype)
  for ref, x_T in zip(dslope_ref, dslope_T):
    ref[...] = x_T


def _bias_kernel(case: _Case, shared: int, *refs):
  """A tile of the gradient of the bias of one head, over the rows that share it."""
  size_t, size_s = case.sizes.queries.queries, case.sizes.queries.keys
  of_t = case.places + case.segments
  bounds_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, slope_ref, bias_ref, *more, dbias_ref = refs
  refs_T, refs_S = more[:of_t], more[of_t:]
  i, j = pl.program_id(1), pl.program_id(2)
  slope, bias_TS = None if slope_ref is None else slope_ref[0], bias_ref[...]

  def row(b, dbias_TS):

    def tile(_, dbias_TS):
      arrays = [ref[b, ...] for ref in (q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref)]
      numbers = lambda: ([ref[b, :] for ref in refs_T], [ref[b, :] for ref in refs_S])
      return dbias_TS + _gradients(case, arrays, numbers, (i * size_t, j * size_s), slope, bias_TS, masked=True)[1]

    met = (j >= bounds_ref[b, 0]) & (j < bounds_ref[b, 3])
    return jax.lax.fori_loop(0, met.astype(jnp.int32), tile, dbias_TS)

  dbias_ref[...] = jax.lax.fori_loop(0, shared, row, jnp.zeros(dbias_ref.shape, jnp.float32))


def _call(kernel, blocks: Blocks, case: _Case, grid, inputs, outputs, flops: float, name: str):
  """pallas_call of pairs (array or shape, BlockSpec); an array of None is left out of memory, not of the kernel."""
  arrays, _ = zip(*inputs)
  shapes, out_specs = zip(*outputs)
  moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes) if x is not None)
  cost = pl.CostEstimate(flops=int(flops), transcendentals=0, bytes_accessed=moved)
  return pl.pallas_call(
      kernel, grid=grid, in_specs=[None if x is None else spec for x, spec in inputs], out_specs=list(out_specs),
      out_shape=list(shapes), interpret=case.interpret, name=name, cost_estimate=cost,
      compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages))(*arrays)


def _of_rows(arrays, spec):
  return [(x, spec) for x in arrays]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(case: _Case, q_BTNH, k_BSKH, v_BSKH, added, rows):
  """(out_BTNH, lse_BNT). added: sink_N, slope_N, bias_BNTS, None those that there are not."""
  return _forward(case, q_BTNH, k_BSKH, v_BSKH, added, rows)[0]


def _of_bias(bias_BNTS, block, at):
  """A spec for a bias, of one row if all rows share it. at(grid) -> the index of a block."""

  def index(*grid):
    b, *place = at(*grid)
    return (0 if bias_BNTS.shape[0] == 1 else b, *place)

  return None if bias_BNTS is None else pl.BlockSpec(block, index)


def _forward(case: _Case, q_BTNH, k_BSKH, v_BSKH, added, rows):
  B, T, N, H = q_BTNH.shape
  S, G, blocks = k_BSKH.shape[1], N // k_BSKH.shape[2], case.sizes.forward
  sink_N, slope_N, bias_BNTS = added
  bounds_BI4 = attention_ranges.ranges(*attention_ranges.met(case.pattern, rows, blocks.queries, blocks.keys))
  I = T // blocks.queries
  of_T, of_S = case.arrays(rows)
  queries = pl.BlockSpec((None, blocks.queries, None, H), lambda n, b, i: (b, I - 1 - i, n, 0))
  keys = pl.BlockSpec((None, S, None, H), lambda n, b, i: (b, 0, n // G, 0))
  head = pl.BlockSpec((1,), lambda n, b, i: (n,))
  bias = _of_bias(bias_BNTS, (None, None, blocks.queries, S), lambda n, b, i: (b, n, I - 1 - i, 0))
  inputs = [(bounds_BI4, pl.BlockSpec((None, I, 4), lambda n, b, i: (b, 0, 0))), (q_BTNH, queries), (k_BSKH, keys),
            (v_BSKH, keys), (sink_N, head), (slope_N, head), (bias_BNTS, bias),
            *_of_rows(of_T, pl.BlockSpec((None, blocks.queries), lambda n, b, i: (b, I - 1 - i))),
            *_of_rows(of_S, pl.BlockSpec((None, S), lambda n, b, i: (b, 0)))]
  outputs = [(jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype), queries),
             (jax.ShapeDtypeStruct((B, N, T), jnp.float32),
              pl.BlockSpec((None, None, blocks.queries), lambda n, b, i: (b, n, I - 1 - i)))]
  out_BTNH, lse_BNT = _call(functools.partial(_forward_kernel, case), blocks, case, (N, B, I), inputs, outputs,
                            4 * B * N * T * S * H / (1 + case.pattern.causal), 'attention_forward')
  return (out_BTNH, lse_BNT), (q_BTNH, k_BSKH, v_BSKH, added, rows, out_BTNH, lse_BNT)


def _backward(case: _Case, saved, gradients):
  q_BTNH, k_BSKH, v_BSKH, (sink_N, slope_N, bias_BNTS), rows, out_BTNH, lse_BNT = saved
  dout_BTNH, dlse_BNT = gradients
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  G, of_T, of_S = N // K, *case.arrays(rows)
  delta_BNT = jnp.einsum('BTNH,BTNH->BNT', dout_BTNH, out_BTNH, preferred_element_type=jnp.float32)
  delta_BNT -= dlse_BNT  # d lse[t] / d score[t,s] = p[t,s]: the same sum again
  dsink_N = None if sink_N is None else -(jnp.exp(sink_N[None, :, None] - lse_BNT) * delta_BNT).sum((0, 2))
  scaled_BNT = jnp.where(jnp.isneginf(lse_BNT), 0, lse_BNT) * LOG2E
  flops = 4 * B * N * T * S * H / (1 + case.pattern.causal)
  given = (q_BTNH, k_BSKH, v_BSKH, dout_BTNH, scaled_BNT, delta_BNT)

  blocks = case.sizes.keys
  some_BIJ, all_BIJ = attention_ranges.met(case.pattern, rows, blocks.queries, blocks.keys)
  bounds_BJ4 = attention_ranges.ranges(some_BIJ.swapaxes(1, 2), all_BIJ.swapaxes(1, 2))
  queries = pl.BlockSpec((None, T, G, H), lambda k, b, j: (b, 0, k, 0))
  keys = pl.BlockSpec((None, blocks.keys, None, H), lambda k, b, j: (b, j, k, 0))
  sums = pl.BlockSpec((None, G, T), lambda k, b, j: (b, k, 0))
  inputs = [(bounds_BJ4, pl.BlockSpec((None, S // blocks.keys, 4), lambda k, b, j: (b, 0, 0))),
            *zip(given, (queries, keys, keys, queries, sums, sums)),
            (slope_N, pl.BlockSpec((G,), lambda k, b, j: (k,))),
            (bias_BNTS, _of_bias(bias_BNTS, (None, G, T, blocks.keys), lambda k, b, j: (b, k, 0, j))),
            *_of_rows(of_T, pl.BlockSpec((None, T), lambda k, b, j: (b, 0))),
            *_of_rows(of_S, pl.BlockSpec((None, blocks.keys), lambda k, b, j: (b, j)))]
  dk_BSKH, dv_BSKH = _call(functools.partial(_keys_kernel, case, G), blocks, case, (K, B, S // blocks.keys), inputs,
                           [(jax.ShapeDtypeStruct(x.shape, x.dtype), keys) for x in (k_BSKH, v_BSKH)],
                           2 * flops, 'attention_backward_keys')

  blocks = case.sizes.queries
  bounds_BI4 = attention_ranges.ranges(*attention_ranges.met(case.pattern, rows, blocks.queries, blocks.keys))
  I = T // blocks.queries
  queries = pl.BlockSpec((None, blocks.queries, None, H), lambda n, b, i: (b, I - 1 - i, n, 0))
  keys = pl.BlockSpec((None, S, None, H), lambda n, b, i: (b, 0, n // G, 0))
  sums = pl.BlockSpec((None, None, blocks.queries), lambda n, b, i: (b, n, I - 1 - i))
  head, float32 = pl.BlockSpec((1,), lambda n, b, i: (n,)), lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
  inputs = [(bounds_BI4, pl.BlockSpec((None, I, 4), lambda n, b, i: (b, 0, 0))),
            *zip(given, (queries, keys, keys, queries, sums, sums)), (slope_N, head),
            (bias_BNTS, _of_bias(bias_BNTS, (None, None, blocks.queries, S), lambda n, b, i: (b, n, I - 1 - i, 0))),
            *_of_rows(of_T, pl.BlockSpec((None, blocks.queries), lambda n, b, i: (b, I - 1 - i))),
            *_of_rows(of_S, pl.BlockSpec((None, S), lambda n, b, i: (b, 0)))]
  outputs = [(jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype), queries),
             *([] if slope_N is None else [(float32(B, N, T), sums)])]
  dq_BTNH, *dslope_BNT = _call(functools.partial(_queries_kernel, case), blocks, case, (N, B, I), inputs, outputs,
                               1.5 * flops, 'attention_backward_queries')
  dslope_N = dslope_BNT[0].sum((0, 2)) if dslope_BNT else None
  dbias_BNTS = None if bias_BNTS is None else _bias_gradient(case, bounds_BI4, given, slope_N, bias_BNTS, rows)
  return dq_BTNH, dk_BSKH, dv_BSKH, (dsink_N, dslope_N, dbias_BNTS), None


def _bias_gradient(case: _Case, bounds_BI4, given, slope_N, bias_BNTS, rows):
  """BNTS like the bias; the sum over all rows if they share it."""
  (B, T, N, H), (S, K), blocks = given[0].shape, given[1].shape[1:3], case.sizes.queries
  G, shared, (of_T, of_S) = N // K, B // bias_BNTS.shape[0], case.arrays(rows)
  spec = lambda block, at: pl.BlockSpec(block, lambda bn, i, j: at(bn // N, bn % N, i, j))
  queries = spec((shared, blocks.queries, None, H), lambda b, n, i, j: (b, i, n, 0))
  keys = spec((shared, blocks.keys, None, H), lambda b, n, i, j: (b, j, n // G, 0))
  sums = spec((shared, None, blocks.queries), lambda b, n, i, j: (b, n, i))
  bias = spec((None, None, blocks.queries, blocks.keys), lambda b, n, i, j: (b, n, i, j))
  inputs = [(bounds_BI4, spec((shared, None, 4), lambda b, n, i, j: (b, i, 0))),
            *zip(given, (queries, keys, keys, queries, sums, sums)),
            (slope_N, spec((1,), lambda b, n, i, j: (n,))), (bias_BNTS, bias),
            *_of_rows(of_T, spec((shared, blocks.queries), lambda b, n, i, j: (b, i))),
            *_of_rows(of_S, spec((shared, blocks.keys), lambda b, n, i, j: (b, j)))]
  grid = (bias_BNTS.shape[0] * N, T // blocks.queries, S // blocks.keys)
  [dbias_BNTS] = _call(functools.partial(_bias_kernel, case, shared), blocks, case, grid, inputs,
                       [(jax.ShapeDtypeStruct(bias_BNTS.shape, jnp.float32), bias)],
                       4 * B * N * T * S * H / (1 + case.pattern.causal), 'attention_backward_bias')
  return dbias_BNTS.astype(bias_BNTS.dtype)


_attention.defvjp(_forward, _backward)
