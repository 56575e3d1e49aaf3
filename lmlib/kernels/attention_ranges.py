"""Which blocks of keys a block of queries meets, from the places and documents at their ends.

A block of queries sees something of the blocks first .. last - 1, and of full .. end - 1 among them it sees
everything, so that no mask is made there. Both come from the least and greatest place and document of each block
(as in FlexAttention's block masks, Dong et al. 2024), so a block that is left out holds nothing that is seen.
"""
import jax.numpy as jnp
import numpy as np

FAR = np.iinfo(np.int32).max // 2  # a place beyond all others


def ends(x_BT, block: int, real_BT=None):
  """Least and greatest of each block, BI and BI; of those that are real, and (FAR, -FAR) where none is."""
  least, most = x_BT, x_BT
  if real_BT is not None:
    least, most = jnp.where(real_BT, x_BT, FAR), jnp.where(real_BT, x_BT, -FAR)
  cut = lambda x_BT: x_BT.reshape(x_BT.shape[0], -1, block)
  return cut(least).min(-1), cut(most).max(-1)


def met(pattern, rows, block_t: int, block_s: int):
  """(some_BIJ, all_BIJ): may a query of block I see a key of block J, and does every one see every one?

  rows: with the places of both given, lengths multiples of the blocks, a place of -1 where there is none.
  """
  place_BT, place_BS = rows.place_BT, rows.place_BS
  least_BI1, most_BI1 = (x[:, :, None] for x in ends(place_BT, block_t, place_BT >= 0))
  least_B1J, most_B1J = (x[:, None, :] for x in ends(place_BS, block_s, place_BS >= 0))
  some_BIJ = (most_BI1 >= 0) & (most_B1J >= 0)
  all_BIJ = (ends(place_BT, block_t)[0][:, :, None] >= 0) & (ends(place_BS, block_s)[0][:, None, :] >= 0)
  after_BIJ, wholly_BIJ = most_BI1 >= least_B1J, least_BI1 >= most_B1J
  if pattern.causal and rows.prefix_BS is not None:
    prefix_B1J = ends((rows.prefix_BS > 0).astype(jnp.int32), block_s)[1][:, None] > 0
    after_BIJ, wholly_BIJ = after_BIJ | prefix_B1J, wholly_BIJ & ~prefix_B1J
  if pattern.causal:
    some_BIJ, all_BIJ = some_BIJ & after_BIJ, all_BIJ & wholly_BIJ
  if pattern.window is not None:
    nearest_BIJ = jnp.maximum(least_BI1 - most_B1J, least_B1J - most_BI1)
    farthest_BIJ = jnp.maximum(most_BI1 - least_B1J, most_B1J - least_BI1)
    some_BIJ, all_BIJ = some_BIJ & (nearest_BIJ < pattern.window), all_BIJ & (farthest_BIJ < pattern.window)
  if pattern.chunk is not None:
    first_BI1, last_BI1, first_B1J, last_B1J = (
        x // pattern.chunk for x in (least_BI1, most_BI1, least_B1J, most_B1J))
    some_BIJ &= (first_BI1 <= last_B1J) & (first_B1J <= last_BI1)
    all_BIJ &= (first_BI1 == last_B1J) & (first_B1J == last_BI1)
  if pattern.stride is not None and pattern.stride > 1:
    all_BIJ &= False
  if rows.segment_BT is not None:
    segment_BS = rows.segment_BT if rows.segment_BS is None else rows.segment_BS
    first_BI1, last_BI1 = (x[:, :, None] for x in ends(rows.segment_BT, block_t, place_BT >= 0))
    first_B1J, last_B1J = (x[:, None, :] for x in ends(segment_BS, block_s, place_BS >= 0))
    some_BIJ &= (first_BI1 <= last_B1J) & (first_B1J <= last_BI1)
    all_BIJ &= (first_BI1 == last_B1J) & (first_B1J == last_BI1)
  return some_BIJ, all_BIJ & some_BIJ


def ranges(some_BIJ, all_BIJ):
  """(first, full, end, last) of each I, BI4 int32, in order; full .. end - 1 is the last run of blocks seen whole."""
  J = some_BIJ.shape[-1]
  index_11J = jnp.arange(J)[None, None]
  last_BI = jnp.where(some_BIJ, index_11J + 1, 0).max(-1)
  first_BI = jnp.minimum(jnp.where(some_BIJ, index_11J, J).min(-1), last_BI)
  end_BI = jnp.where(all_BIJ, index_11J + 1, 0).max(-1)
  broken_BIJ = ~all_BIJ & (index_11J < end_BI[..., None])
  full_BI = jnp.where(broken_BIJ, index_11J + 1, 0).max(-1)
  inside = lambda x_BI: jnp.clip(x_BI, first_BI, last_BI)
  full_BI, end_BI = inside(full_BI), inside(end_BI)
  return jnp.stack([first_BI, full_BI, jnp.maximum(full_BI, end_BI), last_BI], -1).astype(jnp.int32)
