"""What training, serving and evaluation know of an architecture."""
import dataclasses
from typing import Any, Protocol

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmlib import sharding
from lmlib.kernels.cross_entropy import Logits


class Config(Protocol):
  """The numbers of an architecture: a frozen dataclass.

  What follows is a decoder's. An encoder has no cache() and its model a method `encode` beside `hidden`: BTD of
  tokens_BT, segments_BT (0 for padding), dropout_B; `hidden` is what unembed() scores the tokens of hidden places by.
  An encoder-decoder has both: `encode` reads inputs_BS, and model and `hidden` take inputs_BS and input_segments_BS
  after dropout_B, with a cache the first time only; attention_flops takes the number of the decoder's tokens too, and
  of_inputs(path) says which weights multiply those of the inputs. encodes() and decodes() tell the kinds apart.
  """
  vocab: int
  length: int  # the longest sequence, in tokens
  execution: Any  # how it is run: nn.stack.Execution

  def model(self) -> nn.Module:
    """The module: apply({'params': params}, tokens_BT, segments_BT, cache, dropout_B) -> (logits_BTV, cache).

    With a cache segments_BT is 0 for padding, which goes nowhere. Its method `hidden` returns (x_BTD, cache, sums):
    BTD in place of logits, and what the blocks report, L in front; it takes positions_BT and
    prefix_BT after dropout_B (packing.Batches). `unembed` returns the matrix DV between BTD and logits.
    """

  @property
  def softcap(self) -> float | None:
    """Logits are softcap * tanh(BTD @ DV / softcap); None: not capped."""

  @property
  def tied(self) -> bool:
    """Whether DV is the transpose of the table that embeds tokens."""

  def cache(self, batch: int, length: int) -> Any:
    """An empty cache for decoding, with a field used_B: positions filled in each row."""

  def attention_flops(self, length: int) -> float:
    """FLOPs a token of what is no product with a weight, forward, mean over a sequence of `length`."""


def decodes(config: Config) -> bool:
  """Whether a model writes token after token: a decoder, alone or behind an encoder."""
  return hasattr(config, 'cache')


def encodes(config: Config) -> bool:
  """Whether a model reads a text from both sides: an encoder, alone or before a decoder."""
  return hasattr(config.model(), 'encode')


def expert_share(config: Config) -> float:
  """The share of its experts that computes a token of a model; 1 for one without a mixture of experts."""
  return getattr(config, 'expert_share', 1.0)


def logits(config: Config, temperature: float | None = None) -> Logits:
  """How kernels.cross_entropy makes logits of what a model's `hidden` and `unembed` return."""
  return Logits(config.softcap, temperature, config.tied, config.execution.loss)


def boxed(config: Config):
  """Shapes, types and letters of the weights; nothing is computed."""
  return jax.eval_shape(lambda: _first(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))['params']


def new(config: Config, key: jax.Array):
  """New weights; traceable."""
  return nn.unbox(_first(config).init(key, jnp.zeros((1, 1), jnp.int32)))['params']


def _first(config: Config) -> nn.Module:
  """The model that weights are made with: of one token, which a kernel that was asked for may not take."""
  return dataclasses.replace(config, execution=dataclasses.replace(config.execution, attention='auto')).model()


def init(config: Config, key: jax.Array):
  """New weights, each made where the layout in use stores it."""
  where = sharding.shardings(boxed(config)) if sharding.in_use() else None
  return jax.jit(new, static_argnums=0, out_shardings=where)(config, key)
