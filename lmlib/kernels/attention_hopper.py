"""Attention on Hopper GPUs: the algorithm of attention_gpu in Pallas' Mosaic dialect, by who does what on the chip.

A program has three warpgroups. One only moves memory: the copy engine fills slots of shared memory with blocks of
keys and values, and a barrier a slot says when it is full and when it may be overwritten. Two compute, each on 64
rows of its own, with all products on the matrix units as 'wgmma' that run in the background. Two overlaps hide the
exponentials (FlashAttention 3, Shah et al. 2024): a warpgroup starts the scores of the next block together with
the weighted sum of this one, and makes the softmax of the former while the latter runs; and the two take turns to
start products, so that one's softmax runs beside the other's products.

Differences from there: blocks come from attention_ranges, so that windows and packed documents are passed over too;
the backward pass is two kernels, one for dk and dv and one for dq, whose sums come in one order and repeat bit for
bit, where one kernel with atomic sums would make two products less.
"""
import dataclasses
import functools
import inspect
import math

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from lmlib.kernels import attention_ranges

LOG2E = math.log2(math.e)
UNSEEN = -1e30  # a score that is not seen: finite, so that no difference of two is NaN
ROWS = 64  # of a warpgroup: the rows of one wgmma
GROUPS = 2  # that compute
TILE = ROWS * GROUPS
WIDTHS = (64, 128)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Positions of a block that is streamed past the 128 rows of a program, and slots of memory for it."""
  keys: int = 128  # forward
  slots: int = 2
  queries_back: int = 64  # past keys, for dk and dv
  slots_queries: int = 3
  keys_back: int = 64  # past queries, for dq
  slots_keys: int = 3


def lacking(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, added) -> list[str]:
  """What of a case is not done here; `added`: names of what is added to scores."""
  T, S, H = q_BTKGH.shape[1], k_BSKH.shape[1], q_BTKGH.shape[-1]
  cases = {'a backend but a Hopper GPU': not _hopper(), **dict.fromkeys(added, True),
           'a chunk': pattern.chunk, 'a stride': pattern.stride, 'a prefix': rows.prefix_BS is not None,
           'places (a cache)': rows.place_BT is not None or rows.place_BS is not None,
           'segments of keys': rows.segment_BS is not None, 'keys in front': rows.front,
           'other numbers of queries and keys': T != S, f'lengths but multiples of {TILE}': T % TILE or S % TILE,
           f'heads of widths but {WIDTHS}': H not in WIDTHS or v_BSKH.shape[-1] != H,
           'arrays but of bfloat16 or float16':
               len({x.dtype for x in (q_BTKGH, k_BSKH, v_BSKH)}) > 1
               or q_BTKGH.dtype not in (jnp.bfloat16, jnp.float16),
           'jax before 0.11': jax.__version_info__ < (0, 11)}
  return [case for case, there in cases.items() if there]


def _hopper() -> bool:
  return jax.default_backend() == 'gpu' and jax.devices()[0].compute_capability == '9.0'


def attention(q_BTKGH, k_BSKH, v_BSKH, pattern, rows, *, sizes: Sizes = Sizes()):
  """Attention, BTKGH like q; see attention.attention()."""
  B, T, K, G, H = q_BTKGH.shape
  case = _Case(pattern, H**-0.5 if pattern.scale is None else pattern.scale, sizes, rows.segment_BT is not None)
  segment_BT = None if rows.segment_BT is None else rows.segment_BT.astype(jnp.int32)
  out_BTNH = _attention(case, q_BTKGH.reshape(B, T, K * G, H), k_BSKH, v_BSKH, segment_BT)
  return out_BTNH.reshape(B, T, K, G, H)


@dataclasses.dataclass(frozen=True)
class _Case:
  """What a kernel is compiled for."""
  pattern: object
  scale: float
  sizes: Sizes
  segments: bool

  @property
  def ragged(self) -> bool:
    """Whether blocks at the far end from the diagonal are seen in part."""
    return self.segments or self.pattern.window is not None

  def bounds(self, segment_BT, B, T, block: int, *, of_keys: bool):
    """(first, full, end, last) of every tile, BI4; see attention_ranges. of_keys: the tiles are of keys."""
    place_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    rows = _Rows(place_BT, place_BT, segment_BT, segment_BT)
    blocks = (block, TILE) if of_keys else (TILE, block)
    some, all_ = attention_ranges.met(self.pattern, rows, *blocks)
    return attention_ranges.ranges(*((some.swapaxes(1, 2), all_.swapaxes(1, 2)) if of_keys else (some, all_)))

  def seen(self, place_q, place_k, segment_q, segment_k):
    """Whether queries see keys, all arrays of one shape."""
    seen = None
    away = place_q - place_k
    if self.pattern.causal:
      seen = away >= 0
    if self.pattern.window is not None:
      near = away < self.pattern.window if self.pattern.causal else jnp.abs(away) < self.pattern.window
      seen = near if seen is None else seen & near
    if self.segments:
      same = segment_q == segment_k
      seen = same if seen is None else seen & same
    return seen

  def scores(self, product):
    """Scores times log2(e), and what their gradient is multiplied by before scale."""
    cap = self.pattern.softcap
    if cap is None:
      return product * (self.scale * LOG2E), None
    tanh = jnp.tanh(product * (self.scale / cap))
    return tanh * (cap * LOG2E), 1 - tanh * tanh


@dataclasses.dataclass(frozen=True)
class _Rows:
  place_BT: jax.Array
  place_BS: jax.Array
  segment_BT: jax.Array | None
  segment_BS: jax.Array | None
  prefix_BS: None = None


def _across(x, shape, axis: int):
  """x along `axis` of a shape of two."""
  return jax.lax.broadcast_in_dim(x, shape, [axis])


class _Mask:
  """What is seen of a block of scores whose rows are those of a warpgroup, queries or (keys_first) keys."""

  def __init__(self, mosaic, case: _Case, start, segment_rows, *, keys_first: bool):
    self.mosaic, self.case, self.start, self.segment_rows, self.keys_first = (
        mosaic, case, start, segment_rows, keys_first)

  def seen(self, shape, columns_start, segment_line):
    """segment_line: the documents of the columns, in shared memory; None without documents. None: all is seen."""
    iota = lambda axis, start: start + self.mosaic.broadcasted_iota(jnp.int32, shape, axis,
                                                                    layout=self.mosaic.Layout.WGMMA)
    places, segments = (iota(0, self.start), iota(1, columns_start)), (None, None)
    if self.case.segments:
      columns = self.mosaic.load(segment_line, layout=self.mosaic.Layout.WGMMA.reduce(0))
      segments = _across(self.segment_rows, shape, 0), _across(columns, shape, 1)
    if self.keys_first:
      places, segments = places[::-1], segments[::-1]
    return self.case.seen(*places, *segments)


def _rows_of(mosaic, segment_ref, b, start):
  """Documents of the rows of a warpgroup."""
  return mosaic.load(segment_ref.at[b, pl.ds(start, ROWS)], layout=mosaic.Layout.WGMMA.reduce(1), optimized=False)


def _tiles(mosaic, *shape):
  """Shared memory for 16-bit matrices, laid out as wgmma reads them."""
  return lambda dtype: mosaic.SMEM(shape, dtype, transforms=(mosaic.TilingTransform((8, 64)),
                                                             mosaic.SwizzleTransform(128)))


def _descending(bounds, step, carry, *, ragged: bool):
  """Runs step(t, j, carry, masked) over blocks j = last - 1 - t for t from 1: those after a first one.

  ragged: blocks among them may be seen in part. One loop for both kinds: with two, the compiler would wait for every
  product before it starts the next.
  """
  first, full, end, last = bounds

  def one(t, carry):
    j = last - 1 - t
    return step(t, j, carry, masked=(j < full) | (j >= end) if ragged else False)

  return jax.lax.fori_loop(1, last - first, one, carry)


def _stream(mosaic, pairs, slots: int, steps, where):
  """The warpgroup that moves memory: for each step t and (source, slots, full, free) of pairs, where(t) to its slot.

  What has no `free` of its own shares the `full` of the one before, and is free when that is.
  """

  def copy(t, slot):
    for source, memory, full, _ in pairs:
      mosaic.copy_gmem_to_smem(source(where(t)), memory.at[slot], full.at[slot])

  for t in range(slots):
    pl.when(t < steps)(functools.partial(copy, t, t))

  @pl.loop(slots, steps)
  def _(t):
    slot = jax.lax.rem(t, jnp.int32(slots))
    for source, memory, full, free in pairs:
      if free is not None:
        mosaic.barrier_wait(free.at[slot])
      mosaic.copy_gmem_to_smem(source(where(t)), memory.at[slot], full.at[slot])


def _documents(segment_ref, segment_smem, full, where):
  """For _stream: the documents of a block, if there are any."""
  return [(lambda at: segment_ref[0].at[where(at)], segment_smem[0], full, None)] if segment_ref else []


def _bounds(bounds_ref, b, i):
  return tuple(bounds_ref[b, i, n] for n in range(4))


def _forward_kernel(mosaic, case: _Case, group: int, refs, memory):
  """One tile of queries of one head."""
  q_ref, k_ref, v_ref, bounds_ref, *segment_ref, out_ref, lse_ref = refs
  q_smem, k_smem, v_smem, lse_smem, q_full, k_full, v_full, k_free, v_free, turn, *segment_smem = memory
  sizes, H = case.sizes, q_ref.shape[-1]
  n, b, me = jax.lax.axis_index('n'), jax.lax.axis_index('b'), jax.lax.axis_index('warpgroup')
  i = bounds_ref.shape[1] - 1 - jax.lax.axis_index('i')  # the longest first
  bounds = first, *_, last = _bounds(bounds_ref, b, i)
  shape = (ROWS, sizes.keys)

  @pl.when(me < GROUPS)
  def _():
    mosaic.set_max_registers(240, action='increase')
    start = i * TILE + me * ROWS
    here = b, pl.ds(start, ROWS), n
    mosaic.copy_gmem_to_smem(q_ref.at[here], q_smem.at[me], q_full.at[me])
    segment_T = _rows_of(mosaic, segment_ref[0], b, start) if case.segments else None
    mask = _Mask(mosaic, case, start, segment_T, keys_first=False)
    pl.when(me == 1)(lambda: mosaic.barrier_arrive(turn.at[0]))  # the first warpgroup begins
    mosaic.barrier_wait(q_full.at[me])

    def softmax(score, j, slot, most_T, masked):
      score, _ = case.scores(score)

      def hidden(score):
        seen = mask.seen(shape, j * sizes.keys, segment_smem[0].at[slot] if case.segments else None)
        return score if seen is None else jnp.where(seen, score, UNSEEN)

      if masked is True:
        score = hidden(score)
      elif masked is not False:
        score = jax.lax.cond(masked, hidden, lambda score: score, score)
      mosaic.barrier_arrive(k_free.at[slot])
      more_T = jnp.maximum(most_T, score.max(axis=1))
      return jnp.exp2(score - _across(more_T, shape, 0)), more_T, jnp.exp2(most_T - more_T)

    def attended(acc_ref):
      mosaic.barrier_wait(k_full.at[0])

      def scored(score_ref):
        mosaic.wgmma(score_ref, q_smem.at[me], k_smem.at[0].transpose((1, 0)))
        return score_ref[...]

      score = pl.run_scoped(scored, mosaic.ACC(shape, jnp.float32))
      rows = lambda value: mosaic.layout_cast(jnp.full((ROWS,), value, jnp.float32), mosaic.Layout.WGMMA.reduce(1))
      prob, most_T, _ = softmax(score, last - 1, 0, rows(UNSEEN), True)
      carry = most_T, prob.sum(axis=1), prob.astype(q_ref.dtype)

      def step(t, j, carry, *, masked):
        most_T, sum_T, prob16 = carry
        slot, before = (jax.lax.rem(x, jnp.int32(sizes.slots)) for x in (t, t - 1))
        mosaic.barrier_wait(k_full.at[slot])
        mosaic.barrier_wait(v_full.at[before])
        mosaic.barrier_wait(turn.at[me])

        def overlapped(score_ref):
          mosaic.wgmma(score_ref, q_smem.at[me], k_smem.at[slot].transpose((1, 0)))
          mosaic.wgmma(acc_ref, prob16, v_smem.at[before])
          mosaic.barrier_arrive(turn.at[1 - me])
          score = mosaic.wgmma_accumulator_load(score_ref, wait_n=1)
          prob, more_T, shrink_T = softmax(score, j, slot, most_T, masked)
          return more_T, sum_T * shrink_T + prob.sum(axis=1), prob.astype(q_ref.dtype), shrink_T

        *carry, shrink_T = pl.run_scoped(overlapped, mosaic.ACC(shape, jnp.float32))
        acc = acc_ref[...]
        mosaic.barrier_arrive(v_free.at[before])
        acc_ref[...] = acc * _across(shrink_T, acc.shape, 0)
        return tuple(carry)

      most_T, sum_T, prob16 = _descending(
          bounds, step, carry, ragged=case.ragged or (case.pattern.causal and sizes.keys < TILE))
      slot = jax.lax.rem(last - 1 - first, jnp.int32(sizes.slots))
      mosaic.barrier_wait(v_full.at[slot])
      mosaic.wgmma(acc_ref, prob16, v_smem.at[slot])
      return acc_ref[...], most_T, sum_T

    acc, most_T, sum_T = pl.run_scoped(attended, mosaic.ACC((ROWS, H), jnp.float32))
    q_smem.at[me][...] = (acc * _across(1 / sum_T, acc.shape, 0)).astype(out_ref.dtype)
    lse_smem.at[me][...] = most_T / LOG2E + jnp.log(sum_T)
    mosaic.commit_smem()
    mosaic.copy_smem_to_gmem(q_smem.at[me], out_ref.at[here])
    mosaic.copy_smem_to_gmem(lse_smem.at[me], lse_ref.at[b, n, pl.ds(start, ROWS)])
    mosaic.wait_smem_to_gmem(0)

  @pl.when(me == GROUPS)
  def _():
    mosaic.set_max_registers(24, action='decrease')
    k = jax.lax.div(n, jnp.int32(group))
    source = lambda ref: lambda j: ref.at[b, pl.ds(j * sizes.keys, sizes.keys), k]
    documents = _documents(segment_ref, segment_smem, k_full, lambda j: (b, pl.ds(j * sizes.keys, sizes.keys)))
    _stream(mosaic, [(source(k_ref), k_smem, k_full, k_free), *documents, (source(v_ref), v_smem, v_full, v_free)],
            sizes.slots, last - first, lambda t: last - 1 - t)


def _kernel(mosaic, body, grid, scratch, outputs, inputs, *, products: int):
  """Runs body(refs, memory) on a grid of (heads, tiles, rows of the batch); products: of a block of scores' size."""
  count, (B, T, N, H) = len(inputs) + len(outputs), inputs[0].shape
  pairs = B * N * T * T // 2
  cost = pl.CostEstimate(flops=2 * products * pairs * H, transcendentals=pairs,
                         bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs)))
  given = {'cost_estimate': cost} if 'cost_estimate' in inspect.signature(mosaic.kernel).parameters else {}  # jax 0.12
  return mosaic.kernel(
      lambda *refs: body(refs[:count], refs[count:]), out_type=list(outputs), scratch_types=scratch, grid=grid,
      grid_names=('n', 'i', 'b'), num_threads=GROUPS + 1, thread_name='warpgroup',
      compiler_params=mosaic.CompilerParams(approx_math=True), **given)(*inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(case: _Case, q_BTNH, k_BSKH, v_BSKH, segment_BT):
  """Attention, BTNH."""
  return _forward(case, q_BTNH, k_BSKH, v_BSKH, segment_BT)[0]


def _forward(case: _Case, q_BTNH, k_BSKH, v_BSKH, segment_BT):
  from jax.experimental.pallas import mosaic_gpu as mosaic
  B, T, N, H = q_BTNH.shape
  sizes, dtype, barrier = case.sizes, q_BTNH.dtype, mosaic.Barrier
  bounds_BI4 = case.bounds(segment_BT, B, T, sizes.keys, of_keys=False)
  streamed = _tiles(mosaic, sizes.slots, sizes.keys, H)(dtype)
  scratch = [_tiles(mosaic, GROUPS, ROWS, H)(dtype), streamed, streamed, mosaic.SMEM((GROUPS, ROWS), jnp.float32),
             barrier(num_barriers=GROUPS), barrier(num_arrivals=1 + case.segments, num_barriers=sizes.slots),
             barrier(num_barriers=sizes.slots), *[barrier(num_arrivals=GROUPS, num_barriers=sizes.slots)] * 2,
             barrier(num_barriers=GROUPS), *[mosaic.SMEM((sizes.slots, sizes.keys), jnp.int32)] * case.segments]
  outputs = [jax.ShapeDtypeStruct(q_BTNH.shape, dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)]
  inputs = [q_BTNH, k_BSKH, v_BSKH, bounds_BI4, *([segment_BT] if case.segments else [])]
  out_BTNH, lse_BNT = _kernel(mosaic, functools.partial(_forward_kernel, mosaic, case, N // k_BSKH.shape[2]),
                              (N, T // TILE, B), scratch, outputs, inputs, products=2)
  return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, segment_BT, out_BTNH, lse_BNT)


def _keys_kernel(mosaic, case: _Case, group: int, refs, memory):
  """dk and dv of one tile of keys of one key head: rows of a warpgroup are keys, columns queries."""
  q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, bounds_ref, *segment_ref, dk_ref, dv_ref = refs
  (k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, kv_full, q_full, dout_full, lse_full, delta_full,
   q_free, dout_free, lse_free, delta_free, *segment_smem) = memory
  size, H, slots = case.sizes.queries_back, k_ref.shape[-1], jnp.int32(case.sizes.slots_queries)
  k, j, b, me = (jax.lax.axis_index(name) for name in ('n', 'i', 'b', 'warpgroup'))
  first, full, end, last = _bounds(bounds_ref, b, j)
  count, shape = last - first, (ROWS, size)

  @pl.when(me < GROUPS)
  def _():
    mosaic.set_max_registers(240, action='increase')
    start = j * TILE + me * ROWS
    here = b, pl.ds(start, ROWS), k
    mosaic.copy_gmem_to_smem(k_ref.at[here], k_smem.at[me], kv_full.at[me])
    mosaic.copy_gmem_to_smem(v_ref.at[here], v_smem.at[me], kv_full.at[me])
    segment_S = _rows_of(mosaic, segment_ref[0], b, start) if case.segments else None
    mask = _Mask(mosaic, case, start, segment_S, keys_first=True)
    mosaic.barrier_wait(kv_full.at[me])

    def summed(dk_ref, dv_ref):

      def step(t, i, masked):
        slot = jax.lax.rem(t, slots)
        columns = lambda ref: mosaic.load(ref.at[slot], layout=mosaic.Layout.WGMMA.reduce(0))
        mosaic.barrier_wait(q_full.at[slot])
        mosaic.barrier_wait(dout_full.at[slot])

        def one(score_ref, dprob_ref):
          mosaic.wgmma(score_ref, k_smem.at[me], q_smem.at[slot].transpose((1, 0)))
          mosaic.wgmma(dprob_ref, v_smem.at[me], dout_smem.at[slot].transpose((1, 0)))
          mosaic.barrier_wait(lse_full.at[slot])
          lse = _across(columns(lse_smem), shape, 1)
          mosaic.barrier_arrive(lse_free.at[slot])
          score, slope = case.scores(mosaic.wgmma_accumulator_load(score_ref, wait_n=1))
          prob = jnp.exp2(score - lse)
          line = segment_smem[0].at[slot] if case.segments else None
          seen = mask.seen(shape, i * size, line) if masked else None
          prob = prob if seen is None else jnp.where(seen, prob, 0.0)
          prob16 = prob.astype(q_ref.dtype)
          dprob = mosaic.wgmma_accumulator_load(dprob_ref, wait_n=0)
          mosaic.wgmma(dv_ref, prob16, dout_smem.at[slot])
          mosaic.barrier_wait(delta_full.at[slot])
          delta = _across(columns(delta_smem), shape, 1)
          mosaic.barrier_arrive(delta_free.at[slot])
          dscore = prob * (dprob - delta)
          dscore = dscore if slope is None else dscore * slope
          mosaic.wgmma(dk_ref, dscore.astype(q_ref.dtype), q_smem.at[slot])
          mosaic.wgmma_wait(1)
          mosaic.barrier_arrive(dout_free.at[slot])
          mosaic.wgmma_wait(0)
          mosaic.barrier_arrive(q_free.at[slot])

        pl.run_scoped(one, mosaic.ACC(shape, jnp.float32), mosaic.ACC(shape, jnp.float32))

      def head(g, _):
        loop = lambda low, high, masked: jax.lax.fori_loop(
            low, high, lambda i, _: step(g * count + i - first, i, masked), None)
        if case.ragged:
          loop(first, full, True)
        elif case.pattern.causal:  # only the first are masked, which may be all
          loop(first, jnp.where(end > full, full, last), True)
        loop(full, end, False)
        if case.ragged:
          loop(end, last, True)

      jax.lax.fori_loop(0, group, head, None)
      return dk_ref[...], dv_ref[...]

    acc = mosaic.ACC((ROWS, H), jnp.float32)
    dk, dv = pl.run_scoped(summed, acc, acc)
    k_smem.at[me][...] = (dk * case.scale).astype(dk_ref.dtype)
    v_smem.at[me][...] = dv.astype(dv_ref.dtype)
    mosaic.commit_smem()
    mosaic.copy_smem_to_gmem(k_smem.at[me], dk_ref.at[here])
    mosaic.copy_smem_to_gmem(v_smem.at[me], dv_ref.at[here])
    mosaic.wait_smem_to_gmem(0)

  @pl.when(me == GROUPS)
  def _():
    mosaic.set_max_registers(24, action='decrease')

    def where(t):  # head, start
      return k * group + jax.lax.div(t, count), (first + jax.lax.rem(t, count)) * size

    tile = lambda ref: lambda at: ref.at[b, pl.ds(at[1], size), at[0]]
    line = lambda ref: lambda at: ref.at[b, at[0], pl.ds(at[1], size)]
    documents = _documents(segment_ref, segment_smem, q_full, lambda at: (b, pl.ds(at[1], size)))
    _stream(mosaic, [(tile(q_ref), q_smem, q_full, q_free), *documents, (line(lse_ref), lse_smem, lse_full, lse_free),
                     (tile(dout_ref), dout_smem, dout_full, dout_free),
                     (line(delta_ref), delta_smem, delta_full, delta_free)],
            case.sizes.slots_queries, group * count, where)


def _queries_kernel(mosaic, case: _Case, group: int, refs, memory):
  """dq of one tile of queries of one head."""
  q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, bounds_ref, *segment_ref, dq_ref = refs
  (q_smem, dout_smem, lse_smem, delta_smem, k_smem, v_smem, q_full, k_full, v_full, k_free, v_free,
   *segment_smem) = memory
  size, H, slots = case.sizes.keys_back, q_ref.shape[-1], jnp.int32(case.sizes.slots_keys)
  n, b, me = jax.lax.axis_index('n'), jax.lax.axis_index('b'), jax.lax.axis_index('warpgroup')
  i = bounds_ref.shape[1] - 1 - jax.lax.axis_index('i')
  first, full, end, last = _bounds(bounds_ref, b, i)
  shape = (ROWS, size)

  @pl.when(me < GROUPS)
  def _():
    mosaic.set_max_registers(240, action='increase')
    start = i * TILE + me * ROWS
    here, line = (b, pl.ds(start, ROWS), n), (b, n, pl.ds(start, ROWS))
    for source, there in ((q_ref.at[here], q_smem), (dout_ref.at[here], dout_smem), (lse_ref.at[line], lse_smem),
                          (delta_ref.at[line], delta_smem)):
      mosaic.copy_gmem_to_smem(source, there.at[me], q_full.at[me])
    segment_T = _rows_of(mosaic, segment_ref[0], b, start) if case.segments else None
    mask = _Mask(mosaic, case, start, segment_T, keys_first=False)
    mosaic.barrier_wait(q_full.at[me])
    rows = lambda ref: mosaic.load(ref.at[me], layout=mosaic.Layout.WGMMA.reduce(1))
    lse_T, delta_T = rows(lse_smem), rows(delta_smem)

    def summed(acc_ref):

      def step(t, j, masked):
        slot = jax.lax.rem(t, slots)
        mosaic.barrier_wait(k_full.at[slot])
        mosaic.barrier_wait(v_full.at[slot])

        def one(score_ref, dprob_ref):
          mosaic.wgmma(score_ref, q_smem.at[me], k_smem.at[slot].transpose((1, 0)))
          mosaic.wgmma(dprob_ref, dout_smem.at[me], v_smem.at[slot].transpose((1, 0)))
          score, slope = case.scores(mosaic.wgmma_accumulator_load(score_ref, wait_n=1))
          prob = jnp.exp2(score - _across(lse_T, shape, 0))
          line = segment_smem[0].at[slot] if case.segments else None
          seen = mask.seen(shape, j * size, line) if masked else None
          prob = prob if seen is None else jnp.where(seen, prob, 0.0)
          dprob = mosaic.wgmma_accumulator_load(dprob_ref, wait_n=0)
          mosaic.barrier_arrive(v_free.at[slot])
          dscore = prob * (dprob - _across(delta_T, shape, 0))
          dscore = dscore if slope is None else dscore * slope
          mosaic.wgmma(acc_ref, dscore.astype(q_ref.dtype), k_smem.at[slot])
          mosaic.wgmma_wait(0)
          mosaic.barrier_arrive(k_free.at[slot])

        pl.run_scoped(one, mosaic.ACC(shape, jnp.float32), mosaic.ACC(shape, jnp.float32))

      loop = lambda low, high, masked: jax.lax.fori_loop(low, high, lambda j, _: step(j - first, j, masked), None)
      if case.ragged:
        loop(first, full, True)
      loop(full, end, False)
      if case.ragged or case.pattern.causal:
        loop(end, last, True)
      return acc_ref[...]

    dq = pl.run_scoped(summed, mosaic.ACC((ROWS, H), jnp.float32))
    q_smem.at[me][...] = (dq * case.scale).astype(dq_ref.dtype)
    mosaic.commit_smem()
    mosaic.copy_smem_to_gmem(q_smem.at[me], dq_ref.at[here])
    mosaic.wait_smem_to_gmem(0)

  @pl.when(me == GROUPS)
  def _():
    mosaic.set_max_registers(24, action='decrease')
    k = jax.lax.div(n, jnp.int32(group))
    source = lambda ref: lambda j: ref.at[b, pl.ds(j * size, size), k]
    documents = _documents(segment_ref, segment_smem, k_full, lambda j: (b, pl.ds(j * size, size)))
    _stream(mosaic, [(source(k_ref), k_smem, k_full, k_free), *documents, (source(v_ref), v_smem, v_full, v_free)],
            case.sizes.slots_keys, last - first, lambda t: first + t)


def _backward(case: _Case, saved, dout_BTNH):
  from jax.experimental.pallas import mosaic_gpu as mosaic
  q_BTNH, k_BSKH, v_BSKH, segment_BT, out_BTNH, lse_BNT = saved
  B, T, N, H = q_BTNH.shape
  K, sizes, dtype, barrier = k_BSKH.shape[2], case.sizes, q_BTNH.dtype, mosaic.Barrier
  delta_BNT = jnp.einsum('BTNH,BTNH->BNT', dout_BTNH, out_BTNH, preferred_element_type=jnp.float32)
  given = [q_BTNH, k_BSKH, v_BSKH, dout_BTNH, lse_BNT * LOG2E, delta_BNT]
  segments = [segment_BT] if case.segments else []
  mine, line = _tiles(mosaic, GROUPS, ROWS, H)(dtype), lambda count, size: mosaic.SMEM((count, size), jnp.float32)
  filled = lambda slots, copies=1: barrier(num_arrivals=copies, num_barriers=slots)
  free = lambda slots: barrier(num_arrivals=GROUPS, num_barriers=slots)

  slots, size = sizes.slots_queries, sizes.queries_back
  streamed = _tiles(mosaic, slots, size, H)(dtype)
  scratch = [mine, mine, streamed, streamed, line(slots, size), line(slots, size),
             barrier(num_arrivals=2, num_barriers=GROUPS), filled(slots, 1 + case.segments), *[filled(slots)] * 3,
             *[free(slots)] * 4, *[mosaic.SMEM((slots, size), jnp.int32)] * case.segments]
  bounds_BJ4 = case.bounds(segment_BT, B, T, size, of_keys=True)
  dk_BSKH, dv_BSKH = _kernel(mosaic, functools.partial(_keys_kernel, mosaic, case, N // K), (K, T // TILE, B),
                             scratch, [jax.ShapeDtypeStruct(k_BSKH.shape, dtype)] * 2,
                             [*given, bounds_BJ4, *segments], products=4)

  slots, size = sizes.slots_keys, sizes.keys_back
  streamed = _tiles(mosaic, slots, size, H)(dtype)
  scratch = [mine, mine, line(GROUPS, ROWS), line(GROUPS, ROWS), streamed, streamed,
             barrier(num_arrivals=4, num_barriers=GROUPS), filled(slots, 1 + case.segments), filled(slots),
             *[free(slots)] * 2, *[mosaic.SMEM((slots, size), jnp.int32)] * case.segments]
  bounds_BI4 = case.bounds(segment_BT, B, T, size, of_keys=False)
  [dq_BTNH] = _kernel(mosaic, functools.partial(_queries_kernel, mosaic, case, N // K), (N, T // TILE, B), scratch,
                      [jax.ShapeDtypeStruct(q_BTNH.shape, dtype)], [*given, bounds_BI4, *segments], products=3)
  return dq_BTNH, dk_BSKH, dv_BSKH, None


_attention.defvjp(_forward, _backward)
