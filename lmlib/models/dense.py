"""Dense decoder-only Transformer of the LLaMA shape (Touvron et al. 2023).

Pre-norm RMSNorm, rotary positions, grouped-query attention, a gated hidden layer, no biases; the
embedding may be tied to the output, and an embedding of pairs of tokens added to it. The projections that
end in the residual stream start smaller by 1 / sqrt(2 L) (Radford et al. 2019). Entries of the embedding
start at 1, as large as what the blocks add to them, or at 1 / sqrt(D) where the table also scores.
"""
import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmlib import sharding
from lmlib.nn import layers, positions
from lmlib.nn.attention import Attention
from lmlib.nn.bigrams import Bigrams, before
from lmlib.nn.cache import Cache, put
from lmlib.nn.mlp import GatedMlp
from lmlib.nn.stack import REMAT, stack


@dataclasses.dataclass(frozen=True)
class Config:
  vocab: int = 256
  layers: int = 2
  width: int = 64
  hidden: int = 128
  heads: int = 4
  kv_heads: int = 4
  head_width: int = 16
  length: int = 1024  # the longest sequence, in tokens
  rope_base: float = 10_000.0
  tied: bool = True  # one table embeds tokens and scores them
  bigrams: int | None = None  # rows of a second table, which embeds tokens with the one before them
  dropout: float | None = None  # share of each block's output that training zeroes
  dtype: str = 'float32'  # of activations; weights are float32
  scan: bool = True
  remat: str | None = None  # what the backward pass recomputes: None, 'dots' or 'full'

  def __post_init__(self):
    for name in ('vocab', 'layers', 'width', 'hidden', 'heads', 'kv_heads', 'head_width', 'length'):
      if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
        raise ValueError(f'dense.Config.{name}={getattr(self, name)!r} must be a positive integer')
    if self.heads % self.kv_heads:
      raise ValueError(f'dense.Config.heads={self.heads} is not a multiple of kv_heads={self.kv_heads}')
    if self.head_width % 2:
      raise ValueError(f'dense.Config.head_width={self.head_width} must be even: rotary positions turn pairs')
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(f"dense.Config.dtype={self.dtype!r} must be 'float32' or 'bfloat16'")
    if self.remat not in (None, *REMAT):
      raise ValueError(f'dense.Config.remat={self.remat!r} must be None or one of {sorted(REMAT)}')
    if self.bigrams is not None and (not isinstance(self.bigrams, int) or self.bigrams < 1):
      raise ValueError(f'dense.Config.bigrams={self.bigrams!r} must be a positive integer; None turns it off')
    if self.dropout is not None and not 0 < self.dropout < 1:
      raise ValueError(f'dense.Config.dropout={self.dropout} must lie between 0 and 1; None turns it off')

  @property
  def sizes(self) -> dict[str, int]:
    return dict(V=self.vocab, D=self.width)

  def model(self) -> 'Transformer':
    return Transformer(self)

  def cache(self, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of at most `length` positions."""
    return Cache.empty(layers=self.layers, batch=batch, length=length, kv_heads=self.kv_heads,
                       head_width=self.head_width, dtype=self.dtype)

  def attention_flops(self, length: int) -> float:
    """FLOPs a token of the scores and weighted sums, forward, mean over a causal sequence of `length`."""
    return self.layers * 2 * 2 * self.heads * self.head_width * (length + 1) / 2


class Block(nn.Module):
  cfg: Config

  @nn.compact
  def __call__(self, x_BTD, per_layer, turns, segments_BT, used_B, dropout_B, prefix_BT):
    cfg, (layer, kv) = self.cfg, per_layer
    out_scale = (2 * cfg.layers) ** -0.5
    keys_2B = None if dropout_B is None else jax.vmap(
        lambda key: jax.random.split(jax.random.fold_in(key, layer)), out_axes=1)(dropout_B)
    drop = lambda y_BTD, i: y_BTD if keys_2B is None else layers.dropout(y_BTD, keys_2B[i], cfg.dropout)

    x_BTD = sharding.constrain(x_BTD, 'BTD')
    y_BTD, kv = Attention(cfg.width, cfg.heads, cfg.kv_heads, cfg.head_width, out_scale, name='attention')(
        layers.RmsNorm(name='attention_norm')(x_BTD), turns, segments_BT, kv, used_B, prefix_BT)
    x_BTD += drop(y_BTD, 0)
    y_BTD = GatedMlp(cfg.width, cfg.hidden, out_scale, name='mlp')(layers.RmsNorm(name='mlp_norm')(x_BTD))
    x_BTD += drop(y_BTD, 1)
    return x_BTD, (layer, kv)


class Transformer(nn.Module):
  cfg: Config

  @property
  def sizes(self) -> dict[str, int]:
    return self.cfg.sizes

  def setup(self):
    cfg = self.cfg
    self.table_VD = layers.weight(self, 'embedding', 'VD', 'D' if cfg.tied else '')
    if cfg.bigrams is not None:
      self.bigrams = Bigrams(cfg.bigrams, cfg.width, cfg.dtype)
    self.blocks = stack(Block, cfg.layers, scan=cfg.scan, remat=cfg.remat, shared=5)(cfg)
    self.norm = layers.RmsNorm()
    if not cfg.tied:
      self.output_DV = layers.weight(self, 'output', 'DV', 'D')

  def hidden(self, tokens_BT, segments_BT=None, cache: Cache | None = None, dropout_B=None, positions_BT=None,
             prefix_BT=None):
    """The normalised output of the last block, BTD, and the cache with these tokens in it.

    positions_BT counts places anew (in each document, say), prefix_BT marks keys that earlier queries see
    too: both as packing.Batches gives them, and without a cache only.
    """
    cfg, T = self.cfg, tokens_BT.shape[1]
    length = T if cache is None else cache.length
    if length > cfg.length:
      raise ValueError(f'a sequence of {length} tokens is longer than dense.Config.length={cfg.length}')
    if cache is not None and not (positions_BT is None and prefix_BT is None):
      raise ValueError('positions_BT and prefix_BT are of whole rows: a cache counts for itself')
    used_B = None if cache is None else cache.used_B
    if positions_BT is None:
      positions_BT = jnp.arange(T)[None] + (jnp.zeros((1, 1), jnp.int32) if cache is None else used_B[:, None])
    dropout_B = None if cfg.dropout is None else dropout_B

    x_BTD = sharding.constrain(self.table_VD.astype(cfg.dtype), 'VD')[tokens_BT]
    if cfg.bigrams is not None:
      before_BT = before(tokens_BT, segments_BT, None if cache is None else cache.last())
      x_BTD += self.bigrams(tokens_BT, before_BT)
    kv = None if cache is None else (cache.k_LBSKH, cache.v_LBSKH)
    turns = positions.turns(positions_BT, cfg.head_width, cfg.rope_base)
    x_BTD, (_, kv) = self.blocks(x_BTD, (jnp.arange(cfg.layers), kv), turns, segments_BT, used_B, dropout_B, prefix_BT)
    if cache is not None:
      cache = Cache(*kv, used_B + T, put(cache.tokens_BS, tokens_BT, used_B))
    return self.norm(x_BTD), cache

  def unembed(self):
    """The matrix that scores hidden states, DV, in float32."""
    return self.table_VD.T if self.cfg.tied else self.output_DV

  def __call__(self, tokens_BT, segments_BT=None, cache: Cache | None = None, dropout_B=None):
    """Next-token logits, BTV in float32, and the cache with these tokens in it (None if none came).

    segments_BT numbers the documents of a packed row; dropout_B holds one random key a row.
    """
    x_BTD, cache = self.hidden(tokens_BT, segments_BT, cache, dropout_B)
    logits_BTV = jnp.einsum('BTD,DV->BTV', x_BTD, self.unembed().astype(x_BTD.dtype)).astype(jnp.float32)
    return sharding.constrain(logits_BTV, 'BTV'), cache
