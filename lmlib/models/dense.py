"""Dense decoder-only Transformers: GPT, LLaMA, Mistral, Qwen, PaLM, Phi, Gemma, GLM, OLMo and their like.

With nothing said it has the shape of LLaMA (Touvron et al. 2023): pre-norm RMSNorm, rotary positions, grouped
heads, a gated hidden layer, no biases. The others are switches of its parts; lmlib/interop/families says which.
"""
import dataclasses

from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Decoder, DecoderConfig, Ends
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.positions import Alibi, Learned, Rope, Sinusoidal
from lmlib.nn.stack import Execution


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
  vocab: int = 256
  layers: int = 2
  width: int = 64
  hidden: int = 128
  heads: int = 4
  kv_heads: int = 4
  head_width: int = 16
  length: int = 1024  # the longest sequence, in tokens
  positions: Rope | Learned | Sinusoidal | Alibi | None = Rope()
  attention: AttentionStyle = AttentionStyle()
  mlp: MlpStyle = MlpStyle()
  norms: Norms = Norms()
  ends: Ends = Ends()
  execution: Execution = Execution()

  def model(self) -> 'Transformer':
    return Transformer(self)


class Transformer(Decoder):
  """The model of a Config."""
