"""Decoder-only Transformers with a mixture of experts in every block: Mixtral, Qwen3-MoE, GPT-OSS and their like.

A dense decoder in all else. Which experts a token passes, and what of that is trained, says `experts.router`.
"""
import dataclasses

from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Block, Norms
from lmlib.nn.decoder import Decoder, DecoderConfig, Ends
from lmlib.nn.moe import Experts, MixtureOfExperts
from lmlib.nn.places import Places
from lmlib.nn.positions import Alibi, Learned, Rope, Sinusoidal
from lmlib.nn.stack import Execution


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
  vocab: int = 256
  layers: int = 2
  width: int = 64
  heads: int = 4
  kv_heads: int = 4
  head_width: int = 16
  length: int = 1024  # the longest sequence, in tokens
  positions: Rope | Learned | Sinusoidal | Alibi | None = Rope()
  attention: AttentionStyle = AttentionStyle()
  experts: Experts = Experts()
  norms: Norms = Norms()
  ends: Ends = Ends()
  execution: Execution = Execution()

  @property
  def hidden(self) -> int:
    """Width of the hidden layer of an expert."""
    return self.experts.hidden

  @property
  def expert_share(self) -> float:
    """The share of its experts that computes a token."""
    return self.experts.share

  def model(self) -> 'Transformer':
    return Transformer(self)


class ExpertBlock(Block):
  """A block whose hidden layer is a mixture of experts."""

  def feed(self, x_BTD, places: Places):
    return MixtureOfExperts(self.cfg.width, self.cfg.experts, self.out_scale, name='experts')(x_BTD, places)


class Transformer(Decoder):
  """The model of a Config."""
  block = ExpertBlock
