"""A decoder-only Transformer around the blocks of an architecture: tokens in, hidden states and logits out.

Entries of the embedding start at 1, as large as what the blocks add to them, or at 1 / sqrt(D) where the table
also scores.
"""
import dataclasses
from typing import Any, ClassVar

from flax import linen as nn
import jax.numpy as jnp

from lmlib import sharding
from lmlib.nn import layers
from lmlib.nn.bigrams import Bigrams
from lmlib.nn.bigrams import before as token_before
from lmlib.nn.block import Block
from lmlib.nn.cache import Cache
from lmlib.nn.places import Places, places
from lmlib.nn.positions import Alibi, Learned, Rope, Sinusoidal
from lmlib.nn.stack import stack


@dataclasses.dataclass(frozen=True)
class Ends:
  """What stands before the first block and after the last."""
  tied: bool = True  # one table embeds tokens and scores them
  scale: float | None = None  # what embeddings are multiplied by (Gemma: sqrt(D))
  norm: bool = False  # a norm of the embedding (BLOOM)
  bigrams: int | None = None  # rows of a second table, which embeds tokens with the one before them
  final_norm: bool = True  # a norm after the last block
  logit_scale: float | None = None  # what logits are multiplied by (Command R)
  softcap: float | None = None  # logits lie between -softcap and softcap (Gemma 2)

  def __post_init__(self):
    if self.bigrams is not None and (not isinstance(self.bigrams, int) or self.bigrams < 1):
      raise ValueError(f'Ends.bigrams={self.bigrams!r} must be a positive integer; None turns it off')
    for name in ('scale', 'logit_scale', 'softcap'):
      if getattr(self, name) is not None and not getattr(self, name) > 0:
        raise ValueError(f'Ends.{name}={getattr(self, name)!r} must be positive; None turns it off')


class DecoderConfig:
  """What a config with the fields of models.dense.Config says of itself; an architecture's Config inherits it."""

  def __post_init__(self):
    name = f'{type(self).__module__.rpartition(".")[2]}.Config'
    sizes = {'vocab', 'layers', 'width', 'hidden', 'heads', 'kv_heads', 'head_width', 'length'}
    for field in (field.name for field in dataclasses.fields(self) if field.name in sizes):
      if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
        raise ValueError(f'{name}.{field}={getattr(self, field)!r} must be a positive integer')
    if self.heads % self.kv_heads:
      raise ValueError(f'{name}.heads={self.heads} is not a multiple of kv_heads={self.kv_heads}')
    if isinstance(self.positions, Rope):
      self.positions.turned(self.turned_width)

  @property
  def turned_width(self) -> int:
    """Width of the heads that rotary positions turn."""
    return self.head_width

  @property
  def softcap(self) -> float | None:
    return self.ends.softcap

  @property
  def tied(self) -> bool:
    return self.ends.tied

  def cache(self, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of at most `length` places."""
    shape = (self.kv_heads, self.head_width)
    return Cache.empty((shape, shape), layers=self.layers, batch=batch, length=length, dtype=self.execution.cached,
                       window=self.attention.window)

  def attention_flops(self, length: int) -> float:
    """FLOPs a token of the scores and weighted sums, forward, mean over a causal sequence of `length`."""
    return self.attention.flops(self.layers, length, self.heads * self.head_width)


class Decoder(nn.Module):
  """cfg: a config with the fields of models.dense.Config. An architecture names its own `block`."""
  cfg: Any
  block: ClassVar[type[nn.Module]] = Block

  @property
  def sizes(self) -> dict[str, int]:
    cfg = self.cfg
    rows = cfg.length + cfg.positions.offset if isinstance(cfg.positions, Learned) else 0
    return dict(V=cfg.vocab, D=cfg.width, S=rows)

  def setup(self):
    cfg, ends = self.cfg, self.cfg.ends
    self.table_VD = layers.weight(self, 'embedding', 'VD', 'D' if ends.tied else '')
    if isinstance(cfg.positions, Learned):
      self.table_SD = layers.weight(self, 'position_table', 'SD', '', 0.1)
    if ends.norm:
      self.embedding_norm = cfg.norms.norm(None)
    if ends.bigrams is not None:
      self.bigrams = Bigrams(ends.bigrams, cfg.width, cfg.execution.dtype)
    self.make_blocks()
    if ends.final_norm:
      self.norm = cfg.norms.norm(None)
    if not ends.tied:
      self.output_DV = layers.weight(self, 'output', 'DV', 'D')

  def make_blocks(self):
    self.blocks = stack(self.block, self.cfg.layers, self.cfg.execution, shared=2)(self.cfg)

  def run_blocks(self, x_BTD, layers_cached, places: Places, dropout_B):
    """The stream after all blocks, what a cache keeps of them, and the sums that they report, L in front."""
    x_BTD, (kept, sums) = self.blocks(x_BTD, (jnp.arange(self.cfg.layers), layers_cached), places, dropout_B)
    return x_BTD, kept, sums

  def hidden(self, tokens_BT, segments_BT=None, cache: Cache | None = None, dropout_B=None, positions_BT=None,
             prefix_BT=None):
    """(x_BTD, cache, sums): the normalised output of the last block, the cache with these tokens in it, and
    what the blocks report, summed over tokens and by layer ({} if they report nothing).

    segments_BT numbers the documents of a packed row; with a cache it is 0 for padding, on either side.
    positions_BT counts places anew (in each document, say), prefix_BT marks keys that earlier queries see
    too: both as packing.Batches gives them, and without a cache only.
    """
    cfg, T = self.cfg, tokens_BT.shape[1]
    length, front = T if cache is None else cache.length, layers.beside(self, 'front')
    before = 0 if front is None else front.count  # virtual tokens
    if length + before > cfg.length:
      virtual = f' with {before} virtual ones in front' if before else ''
      raise ValueError(f'a sequence of {length} tokens{virtual} is longer than length={cfg.length} of '
                       f'{type(cfg).__module__}')
    here = places(tokens_BT, segments_BT, cache, positions_BT, prefix_BT)
    here = self.placed(here.replace(positions_BT=here.positions_BT + before) if before else here)
    x_BTD = self.embedded(tokens_BT, segments_BT, cache, here)
    x_BTD, kept, sums = self.run_blocks(x_BTD, None if cache is None else cache.layers, here, dropout_B)
    if cache is not None:
      cache = cache.after(kept, tokens_BT, here.coming)
    x_BTD = sharding.gathered(self.norm(x_BTD) if cfg.ends.final_norm else x_BTD)
    return x_BTD if cfg.ends.logit_scale is None else x_BTD * cfg.ends.logit_scale, cache, sums

  def placed(self, here: Places) -> Places:
    """Places with what this model's kind of positions makes of them."""
    cfg = self.cfg
    if isinstance(cfg.positions, Rope):
      kinds = (False,) if cfg.positions.local_base is None else (False, True)
      width = cfg.turned_width
      return here.replace(turns=tuple(cfg.positions.turns(here.positions_BT, width, local=local) for local in kinds))
    if isinstance(cfg.positions, Alibi):
      slope_N = jnp.asarray(cfg.positions.slopes(cfg.heads))
      return here.replace(slope_KG=slope_N.reshape(cfg.kv_heads, -1))
    return here

  def embedded(self, tokens_BT, segments_BT, cache, here: Places):
    """What goes into the first block, BTD."""
    cfg, ends, dtype = self.cfg, self.cfg.ends, self.cfg.execution.dtype
    x_BTD = layers.looked_up(self.table_VD, tokens_BT, dtype, 'VD')
    if ends.scale is not None:
      x_BTD *= jnp.asarray(ends.scale, dtype)
    if ends.bigrams is not None:
      before_BT = token_before(tokens_BT, segments_BT, None if cache is None else cache.last())
      x_BTD += self.bigrams(tokens_BT, before_BT)
    if isinstance(cfg.positions, Learned):
      x_BTD += layers.looked_up(self.table_SD, here.positions_BT + cfg.positions.offset, dtype)
    if isinstance(cfg.positions, Sinusoidal):
      x_BTD += cfg.positions.vectors(here.positions_BT, cfg.width).astype(dtype)
    return self.embedding_norm(x_BTD) if ends.norm else x_BTD

  def unembed(self):
    """The matrix that scores hidden states, DV, in float32."""
    return self.table_VD.T if self.cfg.ends.tied else self.output_DV

  def __call__(self, tokens_BT, segments_BT=None, cache: Cache | None = None, dropout_B=None):
    """Next-token logits, BTV in float32, and the cache with these tokens in it (None if none came).

    segments_BT numbers the documents of a packed row; dropout_B holds one random key a row.
    """
    x_BTD, cache, _ = self.hidden(tokens_BT, segments_BT, cache, dropout_B)
    logits_BTV = jnp.einsum('BTD,DV->BTV', x_BTD, self.unembed().astype(x_BTD.dtype)).astype(jnp.float32)
    if self.cfg.ends.softcap is not None:
      logits_BTV = self.cfg.ends.softcap * jnp.tanh(logits_BTV / self.cfg.ends.softcap)
    return sharding.constrain(logits_BTV, 'BTV'), cache
