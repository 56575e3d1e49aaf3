"""Encoders, which read a text from both sides: BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019), MiniLM.

With nothing said it has the shape of BERT: learned positions, post-norm LayerNorm, biases everywhere, a norm of the
embedding, and a head that scores hidden tokens by the table that embeds them. Next-sentence prediction is left out;
its pooler is there if asked for, and so are scores of classes of a text, made of the pooler's output. Dropout is that
of the blocks alone.
"""
import dataclasses

from flax import linen as nn
import jax.numpy as jnp

from lmlib import sharding
from lmlib.kernels.attention import Pattern
from lmlib.nn import layers
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Block, Norms
from lmlib.nn.mlp import ACTIVATIONS, MlpStyle
from lmlib.nn.places import places
from lmlib.nn.positions import Learned
from lmlib.nn.stack import Execution, stack


@dataclasses.dataclass(frozen=True)
class Ends:
  """What stands before the first block and after the last."""
  types: int | None = 2  # kinds of tokens, as of a first and a second sentence, each with a vector that is added
  norm: bool = True  # a norm of the embedding
  final_norm: bool = False  # a norm after the last block; post-norm blocks end in one
  predicts: bool = True  # a head that scores the tokens of hidden places
  pooler: bool = False  # a tanh layer on the first token's state
  classes: int | None = None  # of a text, scored from the pooler's output

  def __post_init__(self):
    if self.types is not None and (not isinstance(self.types, int) or self.types < 1):
      raise ValueError(f'encoder.Ends.types={self.types!r} must be a positive integer; None turns them off')
    if self.classes is not None and (not isinstance(self.classes, int) or self.classes < 1):
      raise ValueError(f'encoder.Ends.classes={self.classes!r} must be a positive integer; None: a text has no classes')
    if self.classes is not None and (self.predicts or not self.pooler):
      raise ValueError(f'encoder.Ends.classes={self.classes} are scored from a pooler, and tokens then are not: '
                       f'pooler={self.pooler} must be True and predicts={self.predicts} False')


@dataclasses.dataclass(frozen=True)
class Config:
  vocab: int = 256
  layers: int = 2
  width: int = 64
  hidden: int = 256
  heads: int = 4
  head_width: int = 16
  length: int = 512  # the longest text, in tokens
  positions: Learned = Learned()
  attention: AttentionStyle = AttentionStyle(bias='qkvo', patterns=(Pattern(causal=False),))
  mlp: MlpStyle = MlpStyle('gelu', gated=False, bias=True)
  norms: Norms = Norms('layer', epsilon=1e-12, place='post')
  ends: Ends = Ends()
  execution: Execution = Execution()

  softcap, tied = None, False  # the matrix of unembed() has a row more than the table

  def __post_init__(self):
    for name in ('vocab', 'layers', 'width', 'hidden', 'heads', 'head_width', 'length'):
      if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
        raise ValueError(f'encoder.Config.{name}={getattr(self, name)!r} must be a positive integer')
    if not isinstance(self.positions, Learned):
      raise ValueError(f'encoder.Config.positions={self.positions} must be Learned(): an encoder has no others')
    if causal := [pattern for pattern in self.attention.patterns if pattern.causal]:
      raise ValueError(f'encoder.Config.attention has {causal[0]}: an encoder sees both sides, causal=False')

  @property
  def kv_heads(self) -> int:
    return self.heads

  def model(self) -> 'Encoder':
    return Encoder(self)

  def attention_flops(self, length: int) -> float:
    """FLOPs a token of the scores and weighted sums, forward, mean over a text of `length`."""
    return self.attention.flops(self.layers, length, self.heads * self.head_width)


class Encoder(nn.Module):
  """The model of a Config."""
  cfg: Config

  @property
  def sizes(self) -> dict[str, int]:
    cfg = self.cfg
    return dict(V=cfg.vocab, D=cfg.width, F=cfg.width, S=cfg.length + cfg.positions.offset, U=cfg.ends.types,
                Y=cfg.ends.classes)

  def setup(self):
    cfg, ends = self.cfg, self.cfg.ends
    self.table_VD = layers.weight(self, 'embedding', 'VD', 'D')
    self.table_SD = layers.weight(self, 'position_table', 'SD', 'D')
    if ends.types is not None:
      self.table_UD = layers.weight(self, 'type_table', 'UD', 'D')
    if ends.norm:
      self.embedding_norm = cfg.norms.norm(None)
    self.blocks = stack(Block, cfg.layers, cfg.execution, shared=2)(cfg)
    if ends.final_norm:
      self.norm = cfg.norms.norm(None)
    if ends.predicts:
      self.transform_DF = layers.weight(self, 'transform', 'DF', 'D')
      self.transform_bias_F = layers.bias(self, 'transform_bias', 'F')
      self.transform_norm = cfg.norms.norm(None)
      self.output_bias_V = layers.bias(self, 'output_bias', 'V')
    if ends.pooler:
      self.pooler_DF = layers.weight(self, 'pooler', 'DF', 'D')
      self.pooler_bias_F = layers.bias(self, 'pooler_bias', 'F')
    if ends.classes is not None:
      self.classifier_FY = layers.weight(self, 'classifier', 'FY', 'F')
      self.classifier_bias_Y = layers.bias(self, 'classifier_bias', 'Y')

  def encode(self, tokens_BT, segments_BT=None, dropout_B=None, positions_BT=None, types_BT=None):
    """The state of every token, BTD.

    segments_BT numbers the texts of a row, 0 for padding on either side; a text sees itself alone. Positions count
    from 0 in every text unless positions_BT says them; types_BT are all 0 unless given.
    """
    cfg, ends, dtype = self.cfg, self.cfg.ends, self.cfg.execution.dtype
    if (T := tokens_BT.shape[1]) > cfg.length:
      raise ValueError(f'a text of {T} tokens is longer than length={cfg.length} of {type(cfg).__module__}')
    if types_BT is not None and ends.types is None:
      raise ValueError('types_BT are given, but encoder.Ends.types=None: this encoder has none')
    here = places(tokens_BT, segments_BT, None, positions_BT)
    x_BTD = layers.looked_up(self.table_VD, tokens_BT, dtype, 'VD')
    x_BTD += layers.looked_up(self.table_SD, here.positions_BT + cfg.positions.offset, dtype)
    if ends.types is not None:
      x_BTD += layers.looked_up(self.table_UD, jnp.zeros((1, 1), int) if types_BT is None else types_BT, dtype)
    x_BTD = self.embedding_norm(x_BTD) if ends.norm else x_BTD
    x_BTD, _ = self.blocks(x_BTD, (jnp.arange(cfg.layers), None), here, dropout_B)
    return sharding.gathered(self.norm(x_BTD) if ends.final_norm else x_BTD)

  def pooled(self, x_BTD):
    """What the pooler makes of the first token's state, BD."""
    if not self.cfg.ends.pooler:
      raise ValueError('encoder.Ends.pooler=False: this encoder has no pooler')
    x_BD, dtype = x_BTD[:, 0], x_BTD.dtype
    y_BF = layers.product('BD,DF->BF', x_BD, layers.cast(self.pooler_DF, dtype))
    return jnp.tanh(y_BF + self.pooler_bias_F.astype(dtype)[None])

  def classified(self, x_BTD):
    """Scores of the classes of a text that begins a row of states, BY in float32."""
    if self.cfg.ends.classes is None:
      raise ValueError('encoder.Ends.classes=None: this encoder has no classes of texts')
    scores_BY = layers.product('BF,FY->BY', self.pooled(x_BTD), layers.cast(self.classifier_FY, x_BTD.dtype))
    return scores_BY.astype(jnp.float32) + self.classifier_bias_Y[None]

  def hidden(self, tokens_BT, segments_BT=None, cache=None, dropout_B=None, positions_BT=None, types_BT=None):
    """(x, None, {}): what unembed() scores, the head's transformed states and a one for its bias, BT(D+1)."""
    if cache is not None:
      raise ValueError('an encoder decodes nothing: it takes no cache')
    if not self.cfg.ends.predicts:
      raise ValueError('encoder.Ends.predicts=False: this encoder has no head that scores tokens')
    x_BTD = self.encode(tokens_BT, segments_BT, dropout_B, positions_BT, types_BT)
    y_BTF = layers.product('BTD,DF->BTF', x_BTD, layers.cast(self.transform_DF, x_BTD.dtype))
    y_BTF = ACTIVATIONS[self.cfg.mlp.activation](y_BTF + self.transform_bias_F.astype(x_BTD.dtype)[None, None])
    y_BTF = self.transform_norm(y_BTF)
    return jnp.concatenate([y_BTF, jnp.ones_like(y_BTF[..., :1])], -1), None, {}

  def unembed(self):
    """The matrix that scores what hidden() returns, (D+1)V in float32: the embedding and, last, the bias."""
    return jnp.concatenate([self.table_VD.T, self.output_bias_V[None]])

  def __call__(self, tokens_BT, segments_BT=None, cache=None, dropout_B=None, positions_BT=None, types_BT=None):
    """Logits of the token of each place, BTV in float32, and None, since there is no cache.

    With classes of texts the scores of those, BY; without a head that scores anything, the states, BTD.
    """
    if self.cfg.ends.classes is not None:
      return self.classified(self.encode(tokens_BT, segments_BT, dropout_B, positions_BT, types_BT)), None
    if not self.cfg.ends.predicts:
      return self.encode(tokens_BT, segments_BT, dropout_B, positions_BT, types_BT), None
    x_BTD, _, _ = self.hidden(tokens_BT, segments_BT, cache, dropout_B, positions_BT, types_BT)
    logits_BTV = jnp.einsum('BTD,DV->BTV', x_BTD, self.unembed().astype(x_BTD.dtype)).astype(jnp.float32)
    return sharding.constrain(logits_BTV, 'BTV'), None
