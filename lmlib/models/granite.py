"""Granite 3 (IBM 2024): a dense decoder of LLaMA's shape whose blocks add less to the stream.

Each of a block's two outputs is multiplied by `residual_scale`, which no other architecture here has; what else
Granite multiplies (embeddings, scores, logits) are numbers of Ends and Pattern.
"""
import dataclasses

from lmlib.nn import block
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Decoder, DecoderConfig, Ends
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.positions import Rope
from lmlib.nn.stack import Execution


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
  vocab: int = 256
  layers: int = 2
  width: int = 64
  hidden: int = 128
  heads: int = 4
  kv_heads: int = 2
  head_width: int = 16
  length: int = 1024  # the longest sequence, in tokens
  residual_scale: float = 0.22
  positions: Rope = Rope()
  attention: AttentionStyle = AttentionStyle()
  mlp: MlpStyle = MlpStyle()
  norms: Norms = Norms()
  ends: Ends = Ends()
  execution: Execution = Execution()

  def model(self) -> 'Transformer':
    return Transformer(self)


class Block(block.Block):
  """A block whose attention and hidden layer are scaled before they are added."""

  def attend(self, *args):
    y_BTD, kept = super().attend(*args)
    return y_BTD * self.cfg.residual_scale, kept

  def feed(self, *args):
    y_BTD, sums = super().feed(*args)
    return y_BTD * self.cfg.residual_scale, sums


class Transformer(Decoder):
  """The model of a Config."""
  block = Block
