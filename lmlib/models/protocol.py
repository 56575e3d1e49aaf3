"""What training, serving and evaluation know of an architecture."""
from typing import Any, Protocol

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmlib import sharding


class Config(Protocol):
  """The numbers of an architecture: a frozen dataclass."""
  vocab: int
  length: int  # the longest sequence, in tokens

  def model(self) -> nn.Module:
    """The module: apply({'params': params}, tokens_BT, segments_BT, cache, dropout_B) -> (logits_BTV, cache).

    Its method `hidden` returns BTD in place of logits, and takes positions_BT and prefix_BT after dropout_B
    (packing.Batches); `unembed` returns the matrix DV between the two.
    """

  def cache(self, batch: int, length: int) -> Any:
    """An empty cache for decoding, with a field used_B: positions filled in each row."""

  def attention_flops(self, length: int) -> float:
    """FLOPs a token of what is no product with a weight, forward, mean over a sequence of `length`."""


def boxed(config: Config):
  """Shapes, types and letters of the weights; nothing is computed."""
  return jax.eval_shape(config.model().init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']


def new(config: Config, key: jax.Array):
  """New weights; traceable."""
  return nn.unbox(config.model().init(key, jnp.zeros((1, 1), jnp.int32)))['params']


def init(config: Config, key: jax.Array):
  """New weights, each made where the layout in use stores it."""
  where = sharding.shardings(boxed(config)) if sharding.in_use() else None
  return jax.jit(new, static_argnums=0, out_shardings=where)(config, key)
