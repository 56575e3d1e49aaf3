"""Attention of one text to another that an encoder has read, and the cache of a decoder that does so.

Keys and values of the other text are made once: in training by the way, in decoding by the first call.
"""
from typing import Any

from flax import linen as nn
from flax import struct
import jax

from lmlib import sharding
from lmlib.kernels import attention as kernel
from lmlib.kernels.attention import Rows
from lmlib.nn import layers
from lmlib.nn.attention import Attention
from lmlib.nn.cache import Cache, Scaled, plain, taken


@struct.dataclass
class Memory:
  """What an encoder has read, and who may look at it."""
  x_BSD: jax.Array | None  # None: a cache holds its keys and values
  rows: Rows  # documents of queries and of keys
  kept: bool = struct.field(pytree_node=False)  # whether a cache keeps its keys and values


@struct.dataclass
class CrossCache:
  """A cache of the decoder's own tokens and, from the first call on, of what the encoder has read."""
  own: Cache
  crossed: Any = None  # (k_LBSKH, v_LBSKH) of the inputs
  input_segments_BS: jax.Array | None = None  # 0 for padding

  @property
  def used_B(self) -> jax.Array:
    return self.own.used_B

  @property
  def length(self) -> int:
    return self.own.length

  def take(self, row_B) -> 'CrossCache':
    """The cache of these rows, in this order, with what was read for each: see Cache.take."""
    segments_BS = None if self.input_segments_BS is None else self.input_segments_BS[row_B]
    return CrossCache(self.own.take(row_B), taken(self.crossed, row_B), segments_BS)


class CrossAttention(Attention):
  """Queries of x, keys and values of a memory. Positions do not enter, every query sees all of its document."""
  cached: str | None = None  # type of Scaled keys and values in the cache; None: that of x

  @nn.compact
  def __call__(self, x_BTD, memory: Memory, kv=None):
    """Returns attention of x, BTD, and the keys and values (k_BSKH, v_BSKH), which `kv` gives where it is not None.

    They come and go as a cache keeps them, and are met as they are when they are made.
    """
    q_BTKGH = self.normed(self.into(x_BTD, 'q', 'KGH'), 'q_norm')
    implementation = self.implementation if kv is None else 'auto'
    if kv is None:
      k_BSKH, v_BSKH = self.into(memory.x_BSD, 'k', 'KH'), self.into(memory.x_BSD, 'v', 'KH')
      seen = self.normed(k_BSKH, 'k_norm'), v_BSKH
      kv = tuple(Scaled.of(x, self.cached) for x in seen) if memory.kept and self.cached else seen
    else:
      seen = plain(kv, x_BTD.dtype)
    pattern, = self.style.kinds
    attended_BTKGH = kernel.attention(q_BTKGH, *seen, pattern, memory.rows, implementation=implementation)
    out_BTKGH = layers.kept(sharding.constrain(attended_BTKGH, 'BTKGH'), 'attended')
    return self.out(out_BTKGH), kv
