"""What decoding remembers: the keys and values of every layer, and the tokens, for rows of different lengths."""
from flax import struct
import jax
import jax.numpy as jnp


@struct.dataclass
class Cache:
  """Keys and values already seen. Row b has used_B[b] of the S positions filled."""
  k_LBSKH: jax.Array
  v_LBSKH: jax.Array
  used_B: jax.Array
  tokens_BS: jax.Array  # what the positions hold

  @classmethod
  def empty(cls, *, layers: int, batch: int, length: int, kv_heads: int, head_width: int, dtype) -> 'Cache':
    shape = (layers, batch, length, kv_heads, head_width)
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32),
               jnp.zeros((batch, length), jnp.int32))

  @property
  def length(self) -> int:
    return self.k_LBSKH.shape[2]

  def last(self) -> jax.Array:
    """B int32: the token of each row's last filled position, -1 where none is."""
    at_B1 = jnp.maximum(self.used_B - 1, 0)[:, None]
    return jnp.where(self.used_B > 0, jnp.take_along_axis(self.tokens_BS, at_B1, axis=1)[:, 0], -1)


def put(old_BSKH, new_BTKH, used_B):
  """Writes T new entries into each row, from that row's own first free position on."""
  write = lambda old, new, used: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), used, axis=0)
  return jax.vmap(write)(old_BSKH, new_BTKH, used_B)
