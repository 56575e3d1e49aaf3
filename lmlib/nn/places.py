"""Where the tokens of a batch stand and who sees whom: made once, used by every layer."""
from flax import struct
import jax
import jax.numpy as jnp

from lmlib.kernels.attention import Rows
from lmlib.nn.cache import Cache, Coming
from lmlib.nn.positions import Turns


@struct.dataclass
class Places:
  positions_BT: jax.Array  # what rotary and added positions count by
  rows: Rows  # without a cache: of queries and keys, which are the same tokens
  turns: tuple[Turns, ...] = ()  # of layers that see all, and of local ones; none without rotary positions
  slope_KG: jax.Array | None = None  # ALiBi
  bias_BKGTS: jax.Array | None = None  # relative positions by buckets
  coming: Coming | None = None  # with a cache


def places(tokens_BT, segments_BT=None, cache: Cache | None = None, positions_BT=None, prefix_BT=None) -> Places:
  """Of a batch of rows, packed (segments_BT numbers documents) or with a cache (segments_BT is 0 for padding).

  Without positions_BT they count from 0 in every document, or on from what the cache holds. ValueError for
  positions or a prefix together with a cache.
  """
  T = tokens_BT.shape[1]
  if cache is None:
    if positions_BT is None:
      positions_BT = jnp.arange(T)[None] if segments_BT is None else counted(segments_BT)
    return Places(positions_BT, Rows(segment_BT=segments_BT, prefix_BS=prefix_BT))
  if positions_BT is not None or prefix_BT is not None:
    raise ValueError('positions_BT and prefix_BT are of whole rows: a cache counts for itself')
  coming = cache.coming(T, segments_BT)
  return Places(jnp.maximum(coming.place_BT, 0), Rows(place_BT=coming.place_BT), coming=coming)


def counted(segments_BT) -> jax.Array:
  """BT: the index of each token in its document."""
  index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1])[None], segments_BT.shape)
  begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], [(0, 0), (1, 0)], constant_values=True)
  return index_BT - jax.lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)
