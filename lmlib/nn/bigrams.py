"""An embedding of every token together with the one before it, from a table smaller than all pairs.

Pairs share rows by a hash, as the byte n-grams of BLT do (Pagnoni et al. 2024; for tokens, Huang et al.
2025). A look-up costs no product, so a small model learns what follows what at once, and its attention is
free for the rest.
"""
from flax import linen as nn
import jax
import jax.numpy as jnp

from lmlib.nn import layers

SCALE = 0.5  # of a row's entries at first, beside the 1 of a token's own


class Bigrams(nn.Module):
  rows: int
  width: int
  dtype: str = 'float32'

  @property
  def sizes(self) -> dict[str, int]:
    return dict(V=self.rows, D=self.width)

  @nn.compact
  def __call__(self, tokens_BT, before_BT):
    """What to add to the embedding of tokens_BT, BTD; before_BT of before() is -1 where none came before."""
    table_VD = layers.weight(self, 'table', 'VD', '', SCALE)
    return layers.looked_up(table_VD, row(tokens_BT, before_BT, self.rows), self.dtype, 'VD')


def row(tokens_BT, before_BT, rows: int) -> jax.Array:
  """The row, below `rows`, of each pair: a multiplicative hash with odd constants (Appleby 2011)."""
  mixed = tokens_BT.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B)
  mixed ^= (before_BT + 1).astype(jnp.uint32) * jnp.uint32(0xC2B2AE35)
  mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x9E3779B1)
  return ((mixed ^ (mixed >> 15)) % jnp.uint32(rows)).astype(jnp.int32)


def before(tokens_BT, segments_BT=None, last_B=None) -> jax.Array:
  """The token before each. last_B, or -1, comes before the first column and where another segment begins."""
  first_B1 = jnp.full_like(tokens_BT[:, :1], -1) if last_B is None else last_B[:, None]
  before_BT = jnp.concatenate([first_B1, tokens_BT[:, :-1]], axis=1)
  if segments_BT is None:
    return before_BT
  begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], [(0, 0), (1, 0)])
  return jnp.where(begins_BT, first_B1, before_BT)
