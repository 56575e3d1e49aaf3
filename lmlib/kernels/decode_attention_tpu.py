"""Attention of a step of decoding on TPUs: keys are copied from the cache while those before them are met.

A program takes the queries of one row, all heads: G x T of them are rows of a matrix for each key head. It passes the
blocks of keys between the first and the last that somebody sees by them, as FlashAttention does (Dao et al. 2022),
and joins them by their greatest scores. The cache stays in the big memory; a block is one copy of a row, or one of
each page that it has (PagedAttention, Kwon et al. 2023), into one of two buffers. While one is met the other fills,
also over the end of a row with the first block of the next, so that short rows wait no longer than long ones.

Quantised keys and values become numbers of the queries' type in the chip's memory, where int8 and float8_e4m3fn are
exact; their scales multiply scores and weights, which are fewer. Scales are gathered beforehand.

Arrays whose H is a multiple of 128 are read where they are. XLA keeps others closer together than a TPU's registers
are wide, and spreads them out, which copies them, before the kernel reads them: store them wider, with zeros behind.
"""
import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic
import jax.numpy as jnp

from lmlib import sharding
from lmlib.kernels import tpu
from lmlib.kernels.blocks import tuned

UNSEEN = -1e30  # a score that is not seen: finite, so that no difference of two is NaN
BUFFERS = 6 * 2**20  # bytes of the chip's memory that blocks may take, with what is made of them,
QUERIES = 10 * 2**20  # and what a row's queries and their sums may
TABLE = 15 * 2**14  # entries of a table of pages that its memory of scalars holds, with what else there is


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How many slots a block has; of pages the next multiple of theirs."""
  slots: int = 512


def sizes(held, rows: int) -> Sizes:
  """Blocks of which two fit BUFFERS, for `rows` queries of a key head."""
  K, size = held.k.shape[1], held.k.dtype.itemsize
  width = sum(-(-x.shape[-1] // tpu.LANES) * tpu.LANES for x in (held.k, held.v) if x is not None)
  made = 4 * rows * 4 + (4 * width if held.k_scale is not None else 0)  # scores and weights, and plain numbers
  most = BUFFERS // (K * (2 * size * width + made))
  default = Sizes(max(32, min(1024, 1 << (most.bit_length() - 1))))
  return tuned('decode_attention_tpu', f'{held.k.dtype.name} {K}x{width}', default)


def lacking(q_BTKGH, held) -> list[str]:
  """What of a case is not done here."""
  kinds = {x.dtype for x in (held.k, held.v) if x is not None and x.dtype not in (jnp.int8, jnp.float8_e4m3fn)}
  (B, T, K, G, H), wide = q_BTKGH.shape, lambda size: -(-size // tpu.LANES) * tpu.LANES
  each = 2 * q_BTKGH.dtype.itemsize * (wide(H) + wide(held.width)) + 4 * (wide(held.width) + 6 * tpu.LANES)
  pages = 0 if held.page_BX is None else B // sharding.batch_devices() * wide(held.page_BX.shape[1])
  unit = max(tpu.SUBLANES, 16 // min(x.dtype.itemsize for x in (held.k, held.v) if x is not None))
  cases = {'a backend but a TPU, or a CPU that interprets it': jax.default_backend() not in tpu.BACKENDS,
           'queries but of float32 or bfloat16': q_BTKGH.dtype not in (jnp.float32, jnp.bfloat16),
           'keys and values of another type than queries, unless quantised': not kinds <= {q_BTKGH.dtype},
           f'pages but of a multiple of {unit} slots': held.page_BX is not None and held.k.shape[2] % unit,
           f'a table of more than {TABLE} pages': pages > TABLE,
           f'{T * K * G} queries of width {H} a row': T * K * G * each > QUERIES}
  return [case for case, there in cases.items() if there]


def attention(q_BTKGH, held, pattern, place_BT, sink_KG=None, *, sizes_of: Sizes | None = None, interpret=None):
  """(out, lse_BTKG), see decode_attention.partial(). interpret: see tpu.call()."""
  B, T, K, G, H = q_BTKGH.shape
  more = -(G * T) % tpu.SUBLANES
  rows = G * T + more
  sizes_of = sizes_of or sizes(held, rows)
  held, case = _fitted(held, sizes_of, pattern, H**-0.5 if pattern.scale is None else pattern.scale)
  fill = lambda x, axis, value=0: jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)],
                                          constant_values=value)
  first_B, end_B = bounds(held, pattern, place_BT)
  cores = 2 if B % 2 == 0 else 1
  scalars = {'first': first_B, 'end': end_B, 'next': _following(first_B, end_B, cores).reshape(-1)}
  if case.paged:
    scalars['page'] = held.page_BX.astype(jnp.int32)
  here = lambda c, i, *_: (c * (B // cores) + i, 0, 0, 0)
  row = lambda x: (x, pl.BlockSpec((1, *x.shape[1:]), lambda *at: here(*at)[:x.ndim]))
  given = {'place_q': row(fill(jnp.repeat(place_BT.astype(jnp.int32), G, axis=1), 1, -1)[..., None]),
           'q': row(jnp.pad(fill(jnp.moveaxis(q_BTKGH, 1, 2).reshape(B, K, T * G, H), 2),
                            [(0, 0), (0, 0), (0, 0), (0, held.k.shape[-1] - H)]))}
  if sink_KG is not None:
    sink_KR1 = fill(jnp.tile(sink_KG.astype(jnp.float32), (1, T)), 1)[..., None]
    given['sink'] = sink_KR1, pl.BlockSpec(sink_KR1.shape, lambda *_: (0, 0, 0))
  if held.place_BS is not None:
    given['place_k'] = row(case.blocks(held.place_BS.astype(jnp.int32)[:, None])[:, :, 0])
  kept = {'k': held.k, 'v': held.v, 'k_scale': held.whole(held.k_scale), 'v_scale': held.whole(held.v_scale)}
  kept = {name: x for name, x in kept.items() if x is not None}
  buffers, moved = [], 0
  for name, x in kept.items():
    if name.endswith('scale'):
      kept[name] = case.blocks(x.astype(jnp.float32))[:, :, :, None]
    shape = (K, 1, case.size) if name.endswith('scale') else (K, case.pages, case.size // case.pages, x.shape[-1])
    buffers.append(mosaic.VMEM((2, *shape), kept[name].dtype))
    moved += B * case.slots * K * x.dtype.itemsize * (1 if name.endswith('scale') else x.shape[-1])
  case = dataclasses.replace(case, scalars=tuple(scalars), given=tuple(given), kept=tuple(kept))

  sums = [mosaic.VMEM((K, rows, width), jnp.float32) for width in (1, 1, held.width)]
  outputs = [(jax.ShapeDtypeStruct((B, K, rows, width), dtype), pl.BlockSpec((1, K, rows, width), here))
             for width, dtype in ((held.width, q_BTKGH.dtype), (1, jnp.float32))]
  places = [spec for _, spec in given.values()] + [pl.BlockSpec(memory_space=pl.ANY)] * len(kept)
  scores = B * K * G * T * case.slots
  out_BKRH, lse_BKR1 = tpu.call(
      functools.partial(_kernel, case), name='decode_attention', grid=(cores, B // cores), inputs=places,
      outputs=outputs, scratch=[*buffers, *sums, mosaic.SemaphoreType.DMA((2, len(buffers))),
                                mosaic.SMEM((1,), jnp.int32)],
      prefetched=len(scalars), semantics=('parallel', 'arbitrary'), flops=2 * scores * (H + held.width),
      bytes_moved=moved, exponentials=scores, interpret=interpret)(
          *scalars.values(), *(x for x, _ in given.values()), *kept.values())
  apart = lambda x: jnp.moveaxis(x[:, :, :G * T].reshape(B, K, T, G, -1), 1, 2)
  return apart(out_BKRH), apart(lse_BKR1)[..., 0]


@dataclasses.dataclass(frozen=True)
class _Case:
  """What a kernel is compiled for."""
  pattern: object
  scale: float
  slots: int  # of a row
  size: int  # slots of a block
  pages: int  # of a block; 1 where there are none
  unit: int  # a copy begins at a multiple of so many slots
  paged: bool
  scalars: tuple[str, ...] = ()  # what it is given, by name: what is prefetched,
  given: tuple[str, ...] = ()  # what comes a row at a time,
  kept: tuple[str, ...] = ()  # and what it copies itself, k first

  def start(self, block):
    """The slot that a block begins with: the last block of a row ends with it, and holds some slots again."""
    return block * self.size if self.paged else jnp.minimum(block * self.size, self.slots - self.size)

  def blocks(self, x_BKS):
    """BKS as BJKS: what each block holds."""
    whole = self.slots // self.size * self.size
    x_BJKS = jnp.moveaxis(x_BKS[..., :whole].reshape(*x_BKS.shape[:2], -1, self.size), 2, 1)
    if whole == self.slots:
      return x_BJKS
    last_BKS = x_BKS[..., whole:] if self.paged else x_BKS[..., self.slots - self.size:]
    last_BKS = jnp.pad(last_BKS, [(0, 0), (0, 0), (0, self.size - last_BKS.shape[-1])])
    return jnp.concatenate([x_BJKS, last_BKS[:, None]], 1)


def _fitted(held, sizes_of: Sizes, pattern, scale: float):
  """(held, case): rows whose length is no multiple of a copy's are filled up, which copies them."""
  page, unit = held.k.shape[2], 32 // min(x.dtype.itemsize for x in (held.k, held.v) if x is not None)
  case = functools.partial(_Case, pattern, scale)
  if held.page_BX is not None:
    pages = min(-(-sizes_of.slots // page), held.page_BX.shape[1])
    return held, case(held.slots, pages * page, pages, page, True)
  if sizes_of.slots % unit:
    raise ValueError(f'decode_attention_tpu.Sizes.slots={sizes_of.slots} is no multiple of {unit}')
  if more := -page % unit:
    fill = lambda x, axis, value=0: None if x is None else jnp.pad(
        x, [(0, more if i == axis else 0) for i in range(x.ndim)], constant_values=value)
    held = held.replace(k=fill(held.k, 2), v=fill(held.v, 2), k_scale=fill(held.k_scale, 2),
                        v_scale=fill(held.v_scale, 2), place_BS=fill(held.place_BS, 1, -1))
  return held, case(held.slots, min(sizes_of.slots, held.slots), 1, unit, False)


def bounds(held, pattern, place_BT):
  """(first_B, end_B): of each row the first slot that is seen, and one behind the last; alike where none is."""
  S = held.slots
  if held.place_BS is not None:
    seen_BS = pattern.seen(place_BT[:, :, None], held.place_BS[:, None]).any(1)
    end_B = jnp.where(seen_BS.any(1), S - jnp.argmax(seen_BS[:, ::-1], axis=1), 0)
    return jnp.argmax(seen_BS, axis=1).astype(jnp.int32), end_B.astype(jnp.int32)
  most_B, least_B = place_BT.max(1), jnp.where(place_BT >= 0, place_BT, S).min(1)
  first_B, end_B = jnp.zeros_like(most_B), jnp.where(most_B < 0, 0, held.length_B)
  if pattern.causal:
    end_B = jnp.minimum(end_B, most_B + 1)
  if pattern.window is not None:
    first_B = jnp.maximum(first_B, least_B - pattern.window + 1)
  if pattern.chunk is not None:
    first_B = jnp.maximum(first_B, least_B // pattern.chunk * pattern.chunk)
  end_B = jnp.clip(end_B, 0, S)
  return jnp.minimum(first_B, end_B).astype(jnp.int32), end_B.astype(jnp.int32)


def _following(first_B, end_B, cores: int):
  """The first row at or behind each that sees something, -1 if none, of each core's rows and one behind them."""
  B = first_B.shape[0]
  row_CB = jnp.where(first_B < end_B, jnp.arange(B, dtype=jnp.int32), B).reshape(cores, -1)
  row_CB = jnp.pad(jax.lax.cummin(row_CB, axis=1, reverse=True), [(0, 0), (0, 1)], constant_values=B)
  return jnp.where(row_CB == B, -1, row_CB)


def _kernel(case: _Case, *refs):
  """All heads of one row."""
  refs = list(refs)
  take = lambda names: {name: refs.pop(0) for name in names}
  scalar = take(case.scalars)
  given, kept = take(case.given), take(case.kept)
  out_ref, lse_ref = refs.pop(0), refs.pop(0)
  buffers = take(case.kept)
  most_ref, sum_ref, acc_ref, done_ref, turn_ref = refs
  core, i, rows = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
  row, at = core * rows + i, core * (rows + 1) + i
  first_ref, end_ref, next_ref = scalar['first'], scalar['end'], scalar['next']

  def move(act, row, block, buffer):
    """Starts the copies of a block, or waits for them: of its pages those that are seen."""
    for place, (name, x_ref) in enumerate(kept.items()):
      into, done = buffers[name].at[buffer], done_ref.at[buffer, place]
      if name.endswith('scale'):
        act(mosaic.make_async_copy(x_ref.at[row, block], into, done))
      elif case.paged:
        page = lambda i, _: act(mosaic.make_async_copy(
            x_ref.at[scalar['page'][row, block * case.pages + i]], into.at[:, i], done))  # noqa: B023
        before, behind = first_ref[row] // case.unit, pl.cdiv(end_ref[row], case.unit)
        jax.lax.fori_loop(jnp.maximum(before - block * case.pages, 0),
                          jnp.minimum(behind - block * case.pages, case.pages), page, None)
      else:
        slots = pl.ds(pl.multiple_of(case.start(block), case.unit), case.size)
        act(mosaic.make_async_copy(x_ref.at[row, :, slots], into.at[:, 0], done))

  start, wait = (lambda copy: copy.start()), (lambda copy: copy.wait())

  def begin(row, buffer):
    @pl.when(row >= 0)
    def _():
      move(start, row, first_ref[row] // case.size, buffer)

  @pl.when(i == 0)
  def _():
    turn_ref[0] = 0
    begin(next_ref[at], 0)

  most_ref[...] = given['sink'][...] if 'sink' in given else jnp.full_like(most_ref, UNSEEN)
  sum_ref[...] = jnp.full_like(sum_ref, float('sink' in given))
  acc_ref[...] = jnp.zeros_like(acc_ref)
  first, end = first_ref[row], end_ref[row]
  last = jnp.where(first < end, pl.cdiv(end, case.size), 0)

  def step(block, buffer):
    @pl.when(block + 1 < last)
    def _():
      move(start, row, block + 1, 1 - buffer)

    @pl.when(block + 1 == last)
    def _():
      begin(next_ref[at + 1], 1 - buffer)

    move(wait, row, block, buffer)
    _meet(case, given, {name: ref.at[buffer] for name, ref in buffers.items()}, (most_ref, sum_ref, acc_ref),
          (block, first, end))
    return 1 - buffer

  turn_ref[0] = jax.lax.fori_loop(first // case.size, last, step, turn_ref[0])
  most, total = most_ref[...], sum_ref[...]
  empty = most <= UNSEEN / 2  # no score was seen: what was summed are UNSEEN ones
  total = jnp.where(empty, 1.0, total)
  out_ref[0] = jnp.where(empty, 0.0, acc_ref[...] / total).astype(out_ref.dtype)
  lse_ref[0] = jnp.where(empty, -jnp.inf, most + jnp.log(total))


def _meet(case: _Case, given, buffers, sums, where):
  """The queries of a row meet a block of keys that has come: `where` is its number, and the first slot and end seen."""
  (most_ref, sum_ref, acc_ref), (block, first, end) = sums, where
  q_KRH, at = given['q'][0], case.start(block)
  values_ref = buffers.get('v', buffers['k'])
  whole = lambda ref: ref[...].reshape(ref.shape[0], case.size, ref.shape[-1])

  if values_ref.dtype != jnp.int8:  # there is no NaN among those
    @pl.when((at < first) | (at + case.size > end))
    def _():  # what no copy has written, and what no query sees, may be NaN, and 0 NaN is NaN
      at_KXSH = lambda axis: jax.lax.broadcasted_iota(jnp.int32, values_ref.shape, axis)
      slot_KXSH = at + at_KXSH(1) * values_ref.shape[2] + at_KXSH(2)
      v_KXSH = jnp.where((slot_KXSH >= first) & (slot_KXSH < end), values_ref[...].astype(jnp.float32), 0.0)
      values_ref[...] = v_KXSH.astype(values_ref.dtype)

  score_KRS = _dot(q_KRH, whole(buffers['k']).astype(q_KRH.dtype), 2) * case.scale
  if 'k_scale' in buffers:
    score_KRS *= buffers['k_scale'][...]
  if case.pattern.softcap is not None:
    score_KRS = case.pattern.softcap * jnp.tanh(score_KRS / case.pattern.softcap)
  slot_1S = at + jax.lax.broadcasted_iota(jnp.int32, (1, case.size), 1)
  place_1S = given['place_k'][0, pl.ds(block, 1), :] if 'place_k' in given else slot_1S
  new_1S = (slot_1S >= jnp.maximum(block * case.size, first)) & (slot_1S < end)
  seen_RS = case.pattern.seen(given['place_q'][0], jnp.where(new_1S, place_1S, -1))
  score_KRS = jnp.where(seen_RS[None], score_KRS, UNSEEN)

  most_KR1 = jnp.maximum(most_ref[...], score_KRS.max(2, keepdims=True))
  shrink_KR1, prob_KRS = jnp.exp(most_ref[...] - most_KR1), jnp.exp(score_KRS - most_KR1)
  most_ref[...] = most_KR1
  sum_ref[...] = sum_ref[...] * shrink_KR1 + prob_KRS.sum(2, keepdims=True)
  if 'v' not in buffers and 'k_scale' in buffers:
    prob_KRS = jnp.where(seen_RS[None], prob_KRS * buffers['k_scale'][...], 0.0)
  elif 'v_scale' in buffers:
    prob_KRS = jnp.where(seen_RS[None], prob_KRS * buffers['v_scale'][...], 0.0)
  v_KSH = whole(values_ref)[..., :acc_ref.shape[-1]].astype(q_KRH.dtype)
  acc_ref[...] = acc_ref[...] * shrink_KR1 + _dot(prob_KRS.astype(v_KSH.dtype), v_KSH, 1)


def _dot(a, b, axis: int):
  """Of each head: rows of a times b, over the last axis of a and `axis` of b; float32 is not rounded."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(a, b, (((2,), (axis,)), ((0,), (0,))), precision=precision,
                             preferred_element_type=jnp.float32)
