"""Encoder-decoders: T5 1.1 and FLAN-T5 (Raffel et al. 2020), with the switches of T5 1.0.

With nothing said it has the shape of T5 1.1: pre-norm RMSNorm, no biases, a gated hidden layer, scores that are not
scaled and get a bias by buckets of distance, one table a stack for all of its layers; the encoder's text and the
decoder's go through one embedding. T5 1.0 has relu, not gated, and scores tokens by the embedding, of states times
1 / sqrt(D). Dropout is that of the sublayers' outputs alone; T5 has it in four places more.
"""
import dataclasses

from flax import linen as nn
import jax.numpy as jnp

from lmlib import sharding
from lmlib.kernels.attention import Pattern, Rows
from lmlib.nn import layers
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Block, Norms
from lmlib.nn.cache import Cache
from lmlib.nn.cross_attention import CrossAttention, CrossCache, Memory
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.places import Places, places
from lmlib.nn.relative_bias import Buckets, RelativeBias
from lmlib.nn.stack import Execution, stack


@dataclasses.dataclass(frozen=True)
class Ends:
  """What stands after the last block of the decoder."""
  tied: bool = False  # the embedding scores tokens too
  logit_scale: float | None = None  # what logits are multiplied by (T5 1.0: 1 / sqrt(D))

  def __post_init__(self):
    if self.logit_scale is not None and not self.logit_scale > 0:
      raise ValueError(f'encoder_decoder.Ends.logit_scale={self.logit_scale!r} must be positive; None turns it off')


@dataclasses.dataclass(frozen=True)
class Config:
  vocab: int = 256
  encoder_layers: int = 2
  layers: int = 2  # of the decoder
  width: int = 64
  hidden: int = 128
  heads: int = 4
  head_width: int = 16
  length: int = 512  # the longest text of either side, in tokens
  positions: Buckets = Buckets()
  attention: AttentionStyle = AttentionStyle(patterns=(Pattern(scale=1.0),))  # of the decoder; the encoder's sees all
  mlp: MlpStyle = MlpStyle('gelu_tanh')
  norms: Norms = Norms()
  ends: Ends = Ends()
  execution: Execution = Execution()

  softcap = None

  @property
  def tied(self) -> bool:
    return self.ends.tied

  def __post_init__(self):
    for name in ('vocab', 'encoder_layers', 'layers', 'width', 'hidden', 'heads', 'head_width', 'length'):
      if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
        raise ValueError(f'encoder_decoder.Config.{name}={getattr(self, name)!r} must be a positive integer')
    if self.norms.place != 'pre' or self.norms.parallel is not None:
      raise ValueError(f"encoder_decoder.Config.norms={self.norms} must have place='pre' and parallel=None")
    plain = Pattern(softcap=self.attention.patterns[0].softcap, scale=self.attention.patterns[0].scale)
    if self.attention.patterns != (plain,):
      raise ValueError(f'encoder_decoder.Config.attention.patterns={self.attention.patterns} must be one, {plain}: '
                       'the decoder sees all that it has written, and the encoder sees both sides by itself')
    if self.attention.sinks:
      raise ValueError('encoder_decoder.Config.attention.sinks=True must be False: attention to the inputs has none')

  @property
  def kv_heads(self) -> int:
    return self.heads

  @property
  def sees_all(self) -> AttentionStyle:
    """The attention of the encoder, and to it."""
    pattern, = self.attention.patterns
    return dataclasses.replace(self.attention, patterns=(dataclasses.replace(pattern, causal=False),))

  def model(self) -> 'EncoderDecoder':
    return EncoderDecoder(self)

  def cache(self, batch: int, length: int) -> CrossCache:
    """An empty cache for `batch` rows of at most `length` places of the decoder; the first call gives it the inputs."""
    shape = (self.kv_heads, self.head_width)
    return CrossCache(Cache.empty((shape, shape), layers=self.layers, batch=batch, length=length,
                                  dtype=self.execution.cached))

  def of_inputs(self, name: str) -> bool:
    """Whether a weight of this path multiplies tokens of the inputs, not those of the decoder."""
    return name.startswith('encoder/') or name.endswith(('cross_attention/k', 'cross_attention/v'))

  def attention_flops(self, length: int, answer: float) -> float:
    """FLOPs a token of either side of the scores and weighted sums, forward, for `answer` tokens of the decoder."""
    seen = length * self.encoder_layers * length + answer * self.layers * ((answer + 1) / 2 + length)
    return 4 * self.heads * self.head_width * seen / (length + answer)


class ReadingBlock(Block):
  """A block of the encoder."""

  @property
  def style(self) -> AttentionStyle:
    return self.cfg.sees_all


class WritingBlock(Block):
  """A block of the decoder: attention to what it has written and to what the encoder has read, and a hidden layer."""

  @nn.compact
  def __call__(self, x_BTD, per_layer, places: Places, memory: Memory, dropout_B):
    """Returns the stream and what a cache keeps of this layer: its own keys and values, and those of the memory."""
    layer, kv, crossed = per_layer
    cfg, norm, drop = self.cfg, self.cfg.norms.norm, self.dropping(3, layer, dropout_B)
    cross = CrossAttention(cfg.width, cfg.heads, cfg.kv_heads, cfg.head_width, cfg.sees_all, cfg.norms.epsilon,
                           self.out_scale, cfg.execution.attention, cached=cfg.execution.cache, name='cross_attention')

    before = lambda x_BTD, name: sharding.gathered(norm(f'{name}_norm')(x_BTD))
    after = lambda y_BTD, name: layers.kept(
        sharding.scattered(layers.after(self, f'{name}_bottleneck', y_BTD)), name.removeprefix('cross_'))
    x_BTD = sharding.stream(x_BTD)
    y_BTD, kv = self.attend(before(x_BTD, 'attention'), places, layer, kv)
    x_BTD += drop(after(y_BTD, 'attention'), 0)
    y_BTD, crossed = cross(before(x_BTD, 'cross_attention'), memory, crossed)
    x_BTD += drop(after(y_BTD, 'cross_attention'), 1)
    y_BTD, _ = self.feed(before(x_BTD, 'mlp'), places)
    return x_BTD + drop(after(y_BTD, 'mlp'), 2), (kv, crossed if memory.kept else None)


class Tower(nn.Module):
  """A stack of blocks with the bias of its distances in front and a norm behind."""
  cfg: Config
  block: type[nn.Module]
  causal: bool

  @nn.compact
  def __call__(self, x_BTD, per_layer, here: Places, *shared):
    """The stream and what the blocks give beside it, L in front. per_layer: what each gets, its number first."""
    cfg = self.cfg
    bias = RelativeBias(cfg.positions, cfg.heads, cfg.kv_heads, self.causal, name='relative')
    here = here.replace(bias_BKGTS=bias(x_BTD.shape[1], here))
    blocks = stack(self.block, per_layer[0].shape[0], cfg.execution, shared=1 + len(shared))(cfg, name='blocks')
    x_BTD, beside = blocks(x_BTD, per_layer, here, *shared)
    return sharding.gathered(cfg.norms.norm('norm')(x_BTD)), beside


class EncoderDecoder(nn.Module):
  """The model of a Config. inputs_BS are the encoder's tokens, tokens_BT the decoder's."""
  cfg: Config

  @property
  def sizes(self) -> dict[str, int]:
    return dict(V=self.cfg.vocab, D=self.cfg.width)

  def setup(self):
    self.table_VD = layers.weight(self, 'embedding', 'VD', 'D' if self.cfg.ends.tied else '')
    self.encoder = Tower(self.cfg, ReadingBlock, causal=False)
    self.decoder = Tower(self.cfg, WritingBlock, causal=True)
    if not self.cfg.ends.tied:
      self.output_DV = layers.weight(self, 'output', 'DV', 'D')

  def embedded(self, tokens_BT):
    """Vectors of tokens of either side, BTD. ValueError if they are more than the model's length."""
    if (T := tokens_BT.shape[1]) > self.cfg.length:
      raise ValueError(f'a text of {T} tokens is longer than length={self.cfg.length} of {type(self.cfg).__module__}')
    return layers.looked_up(self.table_VD, tokens_BT, self.cfg.execution.dtype, 'VD')

  def encode(self, inputs_BS, input_segments_BS=None, dropout_B=None):
    """What the encoder makes of the inputs, BSD. input_segments_BS numbers the texts of a row, 0 for padding."""
    here, numbers_L = places(inputs_BS, input_segments_BS), jnp.arange(self.cfg.encoder_layers)
    return self.encoder(self.embedded(inputs_BS), (numbers_L, None), here, dropout_B)[0]

  def hidden(self, tokens_BT, segments_BT=None, cache: CrossCache | None = None, dropout_B=None, inputs_BS=None,
             input_segments_BS=None):
    """(x_BTD, cache, {}): what unembed() scores, and the cache with these tokens in it.

    Text n of segments_BT answers text n of input_segments_BS. With a cache a row is one text, and both are 0 for
    padding alone; the first call gives it the inputs, later ones only tokens. ValueError for inputs too few or many.
    """
    cfg = self.cfg
    if self.is_initializing():
      inputs_BS = tokens_BT
    if cache is not None and cache.length > cfg.length:
      raise ValueError(f'a cache of {cache.length} tokens is longer than length={cfg.length} of {type(cfg).__module__}')
    here = places(tokens_BT, segments_BT, None if cache is None else cache.own)
    memory = self.remembered(segments_BT, cache, dropout_B, inputs_BS, input_segments_BS)
    numbers_L = cfg.encoder_layers + jnp.arange(cfg.layers)  # no two layers of a row drop the same
    kept = (None, None) if cache is None else (cache.own.layers, cache.crossed)
    x_BTD, (kv, crossed) = self.decoder(self.embedded(tokens_BT), (numbers_L, *kept), here, memory, dropout_B)
    if cache is not None:
      cache = CrossCache(cache.own.after(kv, tokens_BT, here.coming), crossed, memory.rows.segment_BS)
    return x_BTD if cfg.ends.logit_scale is None else x_BTD * cfg.ends.logit_scale, cache, {}

  def remembered(self, segments_BT, cache, dropout_B, inputs_BS, input_segments_BS) -> Memory:
    """What the decoder sees of the inputs: read now, or what the cache holds."""
    if (inputs_BS is None) == (cache is None or cache.crossed is None):
      raise ValueError('inputs_BS are missing: a model without a cache, or with a new one, reads them'
                       if inputs_BS is None else 'inputs_BS are given, but the cache holds some: begin with a new one')
    x_BSD = None if inputs_BS is None else self.encode(inputs_BS, input_segments_BS, dropout_B)
    if inputs_BS is None:
      input_segments_BS = cache.input_segments_BS
    elif input_segments_BS is None:
      input_segments_BS = jnp.ones_like(inputs_BS)
    segments_BT = jnp.ones_like(input_segments_BS[:, :1]) if segments_BT is None else segments_BT
    return Memory(x_BSD, Rows(segment_BT=segments_BT, segment_BS=input_segments_BS), cache is not None)

  def unembed(self):
    """The matrix that scores hidden states, DV, in float32."""
    return self.table_VD.T if self.cfg.ends.tied else self.output_DV

  def __call__(self, tokens_BT, segments_BT=None, cache: CrossCache | None = None, dropout_B=None, inputs_BS=None,
               input_segments_BS=None):
    """Next-token logits of the decoder, BTV in float32, and the cache; arguments are those of hidden()."""
    x_BTD, cache, _ = self.hidden(tokens_BT, segments_BT, cache, dropout_B, inputs_BS, input_segments_BS)
    logits_BTV = jnp.einsum('BTD,DV->BTV', x_BTD, self.unembed().astype(x_BTD.dtype)).astype(jnp.float32)
    return sharding.constrain(logits_BTV, 'BTV'), cache
