"""DeepSeek-V2 and V3 (2024): latent attention, a few dense blocks, then blocks with a mixture of experts.

V3 adds modules that predict further tokens (`future`), for training and for drafting. Each reads the hidden states
before it and the embedding of the token that those predict, both normalised, through a block of its own; the
embedding and the output matrix are the model's.
"""
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmlib.nn import layers
from lmlib.nn.block import Block, Norms
from lmlib.nn.cache import Cache
from lmlib.nn.decoder import Decoder, DecoderConfig, Ends
from lmlib.nn.latent_attention import LatentAttention, LatentStyle
from lmlib.nn.mlp import Mlp
from lmlib.nn.moe import Experts, MixtureOfExperts
from lmlib.nn.places import Places, places
from lmlib.nn.positions import Rope
from lmlib.nn.router import TopK
from lmlib.nn.stack import Execution, beside_stages, stack


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
  vocab: int = 256
  layers: int = 2
  dense_layers: int = 1  # of them, the first, with a hidden layer in the place of experts
  width: int = 64
  hidden: int = 128  # of dense blocks
  heads: int = 4
  length: int = 1024  # the longest sequence, in tokens
  positions: Rope = Rope(neighbours=True)
  attention: LatentStyle = LatentStyle(rank=16, q_rank=24, head_width=16, turned_width=8, value_width=12)
  experts: Experts = Experts(8, 32, TopK(score='sigmoid', groups=4, groups_chosen=2, group_best=2, balanced=True), 32)
  future: int = 0  # modules that predict the token after the next, and so on
  norms: Norms = Norms()
  ends: Ends = Ends(tied=False)
  execution: Execution = Execution()

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.dense_layers, int) or not 0 <= self.dense_layers < self.layers:
      raise ValueError(f'latent_moe.Config.dense_layers={self.dense_layers!r} must be less than layers={self.layers}')
    if not isinstance(self.future, int) or self.future < 0:
      raise ValueError(f'latent_moe.Config.future={self.future!r} must be a number of modules, 0 for none')
    if not isinstance(self.positions, Rope) or self.positions.local_base is not None:
      raise ValueError(f'latent_moe.Config.positions={self.positions!r} must be a Rope without local_base: '
                       'part of a key turns')

  @property
  def turned_width(self) -> int:
    """Width of what rotary positions turn."""
    return self.attention.turned_width

  @property
  def kv_heads(self) -> int:
    """Every head has keys of its own."""
    return self.heads

  @property
  def expert_share(self) -> float:
    """The share of its experts that computes a token."""
    return self.experts.share

  def model(self) -> 'Transformer':
    return Transformer(self)

  def cache(self, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of at most `length` places; its layers are the dense ones and the others."""
    empty = lambda layers: Cache.empty(((1, self.attention.kept),), layers=layers, batch=batch, length=length,
                                       dtype=self.execution.cached)
    first, last = empty(self.dense_layers), empty(self.layers - self.dense_layers)
    return last.replace(layers=(first.layers, last.layers))

  def attention_flops(self, length: int) -> float:
    """FLOPs a token of the scores and weighted sums, forward, mean over a causal sequence of `length`."""
    return self.attention.flops(self.layers + self.future, self.heads, length)


class DenseBlock(Block):
  """A block with latent attention."""

  def attend(self, x_BTD, places: Places, layer, kv):
    cfg = self.cfg
    return LatentAttention(cfg.width, cfg.heads, cfg.attention, self.out_scale, cfg.execution.attention,
                           cfg.execution.decoding, name='attention')(x_BTD, places, kv)

  def feed(self, x_BTD, places: Places):
    cfg = self.cfg
    return Mlp(cfg.width, cfg.hidden, cfg.experts.style, self.out_scale, name='mlp')(x_BTD), {}


class ExpertBlock(DenseBlock):
  """A block with latent attention and a mixture of experts."""

  def feed(self, x_BTD, places: Places):
    return MixtureOfExperts(self.cfg.width, self.cfg.experts, self.out_scale, name='experts')(x_BTD, places)


class Future(nn.Module):
  """One module that predicts a further token."""
  cfg: Any

  @property
  def sizes(self) -> dict[str, int]:
    return dict(D=self.cfg.width, F=self.cfg.width)

  @nn.compact
  def __call__(self, x_BTD, per_layer, places: Places, dropout_B):
    """Returns the stream that the next module reads, and (the normalised one to score, the router's sums)."""
    layer, embedded_BTD = per_layer
    norm = self.cfg.norms.norm
    read_BTD, token_BTD = norm('hidden_norm')(x_BTD), norm('token_norm')(embedded_BTD)
    w_FD = lambda name: layers.cast(layers.weight(self, name, 'FD', 'F', 0.5**0.5), x_BTD.dtype)
    into = lambda name, y: layers.product('BTF,FD->BTD', y, w_FD(name))
    x_BTD = into('from_token', token_BTD) + into('from_hidden', read_BTD)
    x_BTD, (_, sums) = ExpertBlock(self.cfg, name='block')(x_BTD, (layer, None), places, dropout_B)
    return x_BTD, (norm('norm')(x_BTD), sums)


class Stack(nn.Module):
  """Blocks of one kind under a name of their own, too few for stages to share."""
  cfg: Any
  block: type[nn.Module]
  layers: int

  def setup(self):
    self.blocks = beside_stages(self.block, self.layers, self.cfg.execution, shared=2)(self.cfg)

  def __call__(self, *args):
    return self.blocks(*args)


class Transformer(Decoder):
  """The model of a Config."""

  def make_blocks(self):
    cfg = self.cfg
    if cfg.dense_layers:
      self.dense = Stack(cfg, DenseBlock, cfg.dense_layers)
    self.blocks = stack(ExpertBlock, cfg.layers - cfg.dense_layers, cfg.execution, shared=2)(cfg)
    if cfg.future:
      self.further = Stack(cfg, Future, cfg.future)

  def run_blocks(self, x_BTD, layers_cached, places: Places, dropout_B):
    cfg, kept = self.cfg, None
    first, last = (None, None) if layers_cached is None else layers_cached
    if cfg.dense_layers:
      x_BTD, (first, _) = self.dense(x_BTD, (jnp.arange(cfg.dense_layers), first), places, dropout_B)
    x_BTD, (last, sums) = self.blocks(x_BTD, (jnp.arange(cfg.dense_layers, cfg.layers), last), places, dropout_B)
    if layers_cached is not None:
      kept = first, last
    return x_BTD, kept, sums

  def future(self, x_BTD, tokens_BTL, segments_BT=None, dropout_B=None, positions_BT=None):
    """(x_LBTD to be scored, the routers' sums) of the modules, from what hidden() returns.

    Module l at place t reads tokens_BTL[..., l], the token l + 1 places on, and predicts the one after.
    """
    cfg = self.cfg
    here = self.placed(places(tokens_BTL[..., 0], segments_BT, None, positions_BT))
    embedded_LBTD = layers.looked_up(self.table_VD, jnp.moveaxis(tokens_BTL, -1, 0), x_BTD.dtype)
    if cfg.ends.scale is not None:
      embedded_LBTD *= jnp.asarray(cfg.ends.scale, x_BTD.dtype)
    layer_L = jnp.arange(cfg.layers, cfg.layers + cfg.future)
    return self.further(x_BTD, (layer_L, embedded_LBTD), here, dropout_B)[1]

  def __call__(self, tokens_BT, segments_BT=None, cache: Cache | None = None, dropout_B=None):
    if self.is_initializing() and self.cfg.future:  # whose weights no logits need
      x_BTD = jnp.zeros((*tokens_BT.shape, self.cfg.width), self.cfg.execution.dtype)
      jax.tree.map(jnp.asarray, self.future(x_BTD, jnp.repeat(tokens_BT[..., None], self.cfg.future, -1)))
    return super().__call__(tokens_BT, segments_BT, cache, dropout_B)
