"""Attention of a step of decoding on GPUs, in Pallas' Triton dialect: the keys of a row are split among programs.

One query a row is too little work to fill a GPU, so that each row's keys go in parts to several programs, and the
parts are joined by the logs of their sums (Flash-Decoding, Dao et al. 2023). A program has the queries of one key
head, or some of them, and reads keys and values from where they lie: slot s of a row is slot s % S of page
page_BX[b, s // S] (PagedAttention, Kwon et al. 2023). Widths that are no power of two are taken in pieces that are.
"""
import dataclasses
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

from lmlib.kernels import decode_attention_tpu

LOG2E = math.log2(math.e)
UNSEEN = -1e30  # a score that is not seen: finite, so that no difference of two is NaN
SMALLEST, PROGRAMS = 16, 512  # of a side of a product, and that fill a GPU


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What a program takes, and how Triton runs it: not yet timed."""
  slots: int = 64  # of a block of keys
  rows: int = 16  # queries, of all that a key head has
  parts: int = 1  # of a row's keys
  warps: int = 4
  stages: int = 2


def sizes(held, programs: int, rows: int) -> Sizes:
  """For `rows` queries of a key head and so many programs in all before keys are split."""
  wide = max(held.k.shape[-1], held.width) > 128
  size = Sizes(32 if wide else 64, 16 if wide else min(64, 1 << max(4, (rows - 1).bit_length())))
  programs *= -(-rows // size.rows)
  return dataclasses.replace(size, parts=max(1, min(PROGRAMS // programs, held.slots // (4 * size.slots))))


def lacking(q_BTKGH, held) -> list[str]:
  """What of a case is not done here."""
  kinds = {x.dtype for x in (held.k, held.v) if x is not None and x.dtype not in (jnp.int8, jnp.float8_e4m3fn)}
  cases = {'a backend but a GPU, or a CPU that interprets it': jax.default_backend() not in ('gpu', 'cpu'),
           'queries but of float32, bfloat16 or float16':
               q_BTKGH.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16),
           'keys and values of another type than queries, unless quantised': not kinds <= {q_BTKGH.dtype}}
  return [case for case, there in cases.items() if there]


def attention(q_BTKGH, held, pattern, place_BT, sink_KG=None, *, sizes_of: Sizes | None = None, interpret=None):
  """(out, lse_BTKG), see decode_attention.partial(). interpret: run on any backend, slowly; None: on a CPU."""
  B, T, K, G, H = q_BTKGH.shape
  interpret = jax.default_backend() == 'cpu' if interpret is None else interpret
  size = sizes_of or sizes(held, B * K, G * T)
  case = _Case(pattern, H**-0.5 if pattern.scale is None else pattern.scale, size, held.k.shape[2], pieces(H),
               pieces(held.width), (H, held.width), held.page_BX is not None)
  more = -(G * T) % size.rows
  rows, tiles = G * T + more, (G * T + more) // size.rows
  fill = lambda x, axis, by, value=0: jnp.pad(x, [(0, by if i == axis else 0) for i in range(x.ndim)],
                                              constant_values=value)
  q_BKRH = fill(jnp.moveaxis(q_BTKGH, 1, 2).reshape(B, K, T * G, H), 2, more)
  q_BKRH = fill(q_BKRH, 3, sum(width for _, width in case.keys) - H)
  place_BR = fill(jnp.repeat(place_BT.astype(jnp.int32), G, axis=1), 1, more, -1)
  first_B, end_B = decode_attention_tpu.bounds(held, pattern, place_BT)

  tile = pl.BlockSpec((None, None, size.rows, q_BKRH.shape[-1]), lambda b, n, p: (b, n // tiles, n % tiles, 0))
  whole = lambda x: (x, pl.BlockSpec((None, *x.shape[1:]), lambda b, n, p: (b,) + (0,) * (x.ndim - 1)))
  kept = lambda x: (x, None if x is None else pl.BlockSpec(
      (x.shape[0] if case.paged else None, None, *x.shape[2:]),
      lambda b, n, p: (0 if case.paged else b, n // tiles) + (0,) * (x.ndim - 2)))
  given = [whole(jnp.stack([first_B, end_B], 1)), (place_BR, pl.BlockSpec(
      (None, size.rows), lambda b, n, p: (b, n % tiles))), (q_BKRH, tile)]
  given += [whole(x) if x is not None else (None, None) for x in (held.page_BX, held.place_BS)]
  given += [kept(x) for x in (held.k, held.v, held.k_scale, held.v_scale)]
  width = sum(width for _, width in case.values)
  out_shape = [jax.ShapeDtypeStruct((B, K, size.parts, rows, width), jnp.float32),
               jax.ShapeDtypeStruct((B, K, size.parts, rows), jnp.float32)]
  at = lambda b, n, p: (b, n // tiles, p, n % tiles)
  moved = sum(x.size * x.dtype.itemsize for x, _ in given if x is not None)
  cost = pl.CostEstimate(flops=2 * B * K * G * T * held.slots * (H + held.width), bytes_accessed=moved,
                         transcendentals=B * K * G * T * held.slots)
  out_BKPRH, lse_BKPR = pl.pallas_call(
      functools.partial(_kernel, case), grid=(B, K * tiles, size.parts), in_specs=[spec for _, spec in given],
      out_specs=[pl.BlockSpec((None, None, None, size.rows, width), lambda *i: (*at(*i), 0)),
                 pl.BlockSpec((None, None, None, size.rows), at)],
      out_shape=out_shape, interpret=interpret, name='decode_attention', cost_estimate=cost,
      compiler_params=triton.CompilerParams(num_warps=size.warps, num_stages=size.stages))(*(x for x, _ in given))

  apart = lambda x: jnp.moveaxis(x[:, :, :, :G * T].reshape(B, K, -1, T, G, *x.shape[4:]), 1, 3)
  return _joined(apart(out_BKPRH)[..., :held.width], apart(lse_BKPR), sink_KG, q_BTKGH.dtype)


def _joined(out_BPTKGH, lse_BPTKG, sink_KG, dtype):
  """(out, lse_BTKG) of the parts P and the sink."""
  lse_BTKG = jax.nn.logsumexp(lse_BPTKG, axis=1)
  if sink_KG is not None:
    lse_BTKG = jnp.logaddexp(lse_BTKG, sink_KG.astype(jnp.float32)[None, None])
  share_BPTKG = jnp.exp(lse_BPTKG - jnp.where(jnp.isneginf(lse_BTKG), 0, lse_BTKG)[:, None])
  return (out_BPTKGH * share_BPTKG[..., None]).sum(1).astype(dtype), lse_BTKG


def pieces(width: int) -> tuple[tuple[int, int], ...]:
  """(start, size) of pieces that cover a width, of powers of two; the last may be longer than what is left."""
  found, start = [], 0
  while start < width:
    size = max(SMALLEST, 1 << ((width - start).bit_length() - 1))
    found.append((start, size))
    start += size
  return tuple(found)


@dataclasses.dataclass(frozen=True)
class _Case:
  """What a kernel is compiled for."""
  pattern: object
  scale: float
  sizes: Sizes
  slots: int  # of a row, or of a page
  keys: tuple[tuple[int, int], ...]  # pieces of a key
  values: tuple[tuple[int, int], ...]
  widths: tuple[int, int]  # of a key and a value
  paged: bool


def _kernel(case: _Case, bounds_ref, place_ref, q_ref, table_ref, keys_ref, k_ref, v_ref, k_scale_ref, v_scale_ref,
            out_ref, lse_ref):
  """Some queries of one key head, and one part of the keys."""
  size, part = case.sizes.slots, pl.program_id(2)
  first, end = bounds_ref[0], bounds_ref[1]
  blocks = pl.cdiv(pl.cdiv(end - first, size), case.sizes.parts)
  begin = first + part * blocks * size
  place_R, q = place_ref[...], [q_ref[:, pl.ds(start, width)] for start, width in case.keys]
  values_ref, values_scale_ref = (v_ref, v_scale_ref) if v_ref is not None else (k_ref, k_scale_ref)

  def step(block, carry):
    most_R, sum_R, *acc = carry
    slot_S = begin + block * size + jnp.arange(size, dtype=jnp.int32)
    there_S = slot_S < end
    slot_S = jnp.where(there_S, slot_S, 0)
    at = (slot_S,)
    if case.paged:
      at = triton.load(table_ref.at[slot_S // case.slots], mask=there_S, other=0), slot_S % case.slots

    def read(ref, piece, width):
      """The entries of a piece, SH; zeros of a slot that is not filled, and beyond the width."""
      lane_H = piece[0] + jnp.arange(piece[1], dtype=jnp.int32)
      real_SH = there_S[:, None] & (lane_H < width)[None]
      at_SH = (*(x[:, None] for x in at), jnp.minimum(lane_H, width - 1)[None])
      x_SH = triton.load(ref.at[tuple(jnp.broadcast_to(x, real_SH.shape) for x in at_SH)], mask=real_SH)
      return jnp.where(real_SH, x_SH.astype(q_ref.dtype), 0)

    scale = lambda ref: triton.load(ref.at[at], mask=there_S, other=0)[None]
    score_RS = sum(_dot(q_RH, read(k_ref, piece, case.widths[0]), 1) for q_RH, piece in zip(q, case.keys)) * case.scale
    if k_scale_ref is not None:
      score_RS *= scale(k_scale_ref)
    if case.pattern.softcap is not None:
      score_RS = case.pattern.softcap * jnp.tanh(score_RS / case.pattern.softcap)
    place_S = slot_S
    if keys_ref is not None:
      place_S = triton.load(keys_ref.at[slot_S], mask=there_S, other=-1)
    seen_RS = case.pattern.seen(place_R[:, None], jnp.where(there_S, place_S, -1)[None])
    score_RS = jnp.where(seen_RS, score_RS * LOG2E, UNSEEN)
    more_R = jnp.maximum(most_R, score_RS.max(1))
    shrink_R, prob_RS = jnp.exp2(most_R - more_R), jnp.exp2(score_RS - more_R[:, None])
    sum_R = sum_R * shrink_R + prob_RS.sum(1)
    if values_scale_ref is not None:
      prob_RS *= scale(values_scale_ref)
    prob_RS = prob_RS.astype(q_ref.dtype)
    return more_R, sum_R, *(acc_RH * shrink_R[:, None] + _dot(prob_RS, read(values_ref, piece, case.widths[1]), 0)
                            for acc_RH, piece in zip(acc, case.values))

  zero_R = jnp.zeros(place_R.shape, jnp.float32)
  carry = zero_R + UNSEEN, zero_R, *(jnp.zeros((place_R.shape[0], width), jnp.float32) for _, width in case.values)
  left = jnp.clip(pl.cdiv(end - begin, size), 0, blocks)
  most_R, sum_R, *acc = jax.lax.fori_loop(0, left, step, carry)
  empty_R = most_R <= UNSEEN / 2  # no score was seen: what was summed are UNSEEN ones
  sum_R = jnp.where(empty_R, 1.0, sum_R)
  for acc_RH, (start, width) in zip(acc, case.values):
    out_ref[:, pl.ds(start, width)] = jnp.where(empty_R[:, None], 0.0, acc_RH / sum_R[:, None])
  lse_ref[...] = jnp.where(empty_R, -jnp.inf, (most_R + jnp.log2(sum_R)) / LOG2E)


def _dot(a_RX, b, axis: int):
  """a times b over the last axis of a and `axis` of b; float32 is not rounded to tf32."""
  precision = jax.lax.Precision.HIGHEST if a_RX.dtype == jnp.float32 else None
  return jax.lax.dot_general(a_RX, b, (((1,), (axis,)), ((), ())), precision=precision,
                             preferred_element_type=jnp.float32)
