"""What the kernels of attention by tiles share: a tile's mask and scores, and rows filled up to whole blocks."""
import dataclasses
import math

import jax
import jax.numpy as jnp

LOG2E = math.log2(math.e)
UNSEEN = -1e30  # a score that is not seen: finite, so that no difference of two is NaN


@dataclasses.dataclass(frozen=True)
class Tile:
  """How the scores of a tile are made, and which arrays say who sees whom in it."""
  pattern: object
  scale: float
  places: bool  # given, and not just 0, 1, 2, ...
  segments: bool
  prefix: bool

  def seen(self, place_T1, place_1S, segment_T1=None, segment_1S=None, prefix_1S=None):
    """Whether queries see keys, TS; or ST of S1 and 1T."""
    seen_TS = self.pattern.seen(place_T1, place_1S)
    if self.prefix:
      seen_TS |= (prefix_1S > 0) & dataclasses.replace(self.pattern, causal=False).seen(place_T1, place_1S)
    if self.segments:
      seen_TS &= segment_T1 == segment_1S
    return seen_TS

  def scores(self, product_TS):
    """Scores times log2(e), and what their gradient is multiplied by before scale."""
    cap = self.pattern.softcap
    if cap is None:
      return product_TS * (self.scale * LOG2E), None
    tanh_TS = jnp.tanh(product_TS * (self.scale / cap))
    return tanh_TS * (cap * LOG2E), 1 - tanh_TS * tanh_TS


def of_case(pattern, rows, width: int, filled: bool) -> dict:
  """The fields of a Tile for heads of a width, if rows are `filled` up or not."""
  given = rows.place_BT is not None or rows.place_BS is not None or filled
  return dict(pattern=pattern, scale=width**-0.5 if pattern.scale is None else pattern.scale, places=bool(given),
              segments=rows.segment_BT is not None, prefix=rows.prefix_BS is not None)


def fill(x, axis: int, by: int, value=0):
  """x and `by` more of a value behind it along an axis."""
  return jnp.pad(x, [(0, by if i == axis else 0) for i in range(x.ndim)], constant_values=value) if by else x


def whole(rows, q_BTKGH, k_BSKH, long_t: int, long_s: int):
  """Rows with all places and `long` more queries and keys that are seen by none and see none."""
  (B, T), S = q_BTKGH.shape[:2], k_BSKH.shape[1]

  def filled(x_BT, T, long, value):
    return None if x_BT is None else fill(jnp.broadcast_to(x_BT.astype(jnp.int32), (B, T)), 1, long, value)

  place = lambda place_BT, T: jnp.arange(T, dtype=jnp.int32)[None] if place_BT is None else place_BT
  segment_BS = rows.segment_BT if rows.segment_BS is None else rows.segment_BS
  return dataclasses.replace(
      rows, place_BT=filled(place(rows.place_BT, T), T, long_t, -1),
      place_BS=filled(place(rows.place_BS, S), S, long_s, -1), segment_BT=filled(rows.segment_BT, T, long_t, -1),
      segment_BS=filled(segment_BS, S, long_s, -2), prefix_BS=filled(rows.prefix_BS, S, long_s, 0))


def dot(a, b, dims):
  """a . b over the dimensions (of a, of b), float32; float32 operands are not rounded to fewer bits."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(a, b, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32)
