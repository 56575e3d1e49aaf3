"""A Transformer block: attention and a hidden layer, each with its norm, added to the stream of width D."""
import dataclasses
from typing import Any

from flax import linen as nn
import jax

from lmlib import sharding
from lmlib.nn import layers
from lmlib.nn.attention import Attention, AttentionStyle
from lmlib.nn.mlp import Mlp
from lmlib.nn.places import Places

PLACES = ('pre', 'post', 'output', 'both')
PARALLEL = (None, 'one norm', 'two norms')


@dataclasses.dataclass(frozen=True)
class Norms:
  """The norms of a block and where they stand.

    pre     x + f(norm(x))        (Xiong et al. 2020)      post    norm(x + f(x))        (Vaswani et al. 2017)
    output  x + norm(f(x))        (OLMo 2, 2024)           both    x + norm(f(norm(x)))  (Gemma 2, 2024)

  With `parallel` the hidden layer reads x too and not what attention made of it (GPT-J, 2021; PaLM, Chowdhery
  et al. 2022), through attention's 'one norm' or 'two norms'.
  """
  kind: str = 'rms'  # or 'layer'
  epsilon: float = 1e-6
  bias: bool = True  # of a 'layer' norm
  place: str = 'pre'
  parallel: str | None = None

  def __post_init__(self):
    for name, allowed in (('kind', ('rms', 'layer')), ('place', PLACES), ('parallel', PARALLEL)):
      if getattr(self, name) not in allowed:
        raise ValueError(f'Norms.{name}={getattr(self, name)!r} must be one of {allowed}')
    if self.parallel is not None and self.place != 'pre':
      raise ValueError(f"Norms.parallel={self.parallel!r} needs place='pre', not {self.place!r}")

  def norm(self, name: str) -> nn.Module:
    """A new norm; its module must be made where flax may make one."""
    if self.kind == 'rms':
      return layers.RmsNorm(self.epsilon, name=name)
    return layers.LayerNorm(self.epsilon, self.bias, name=name)


class Block(nn.Module):
  """One block of an architecture whose config has the fields of models.dense.Config.

  attend() and feed() make the two layers; an architecture that has others overrides them.
  """
  cfg: Any

  @nn.compact
  def __call__(self, x_BTD, per_layer, places: Places, dropout_B):
    """Returns the stream and, of this layer, what a cache keeps and the sums that feed() reports."""
    layer, kv = per_layer
    norms = self.cfg.norms
    drop = self.dropping(2, layer, dropout_B)
    inside = lambda x, name: norms.norm(f'{name}_norm')(x) if norms.place in ('pre', 'both') else x
    before = lambda x, name: sharding.gathered(inside(x, name))
    behind = lambda y, name: norms.norm(f'{name}_out_norm')(y) if norms.place in ('output', 'both') else y
    out = lambda y, name: behind(layers.kept(sharding.scattered(y), name), name)
    after = lambda x, name: norms.norm(f'{name}_norm')(x) if norms.place == 'post' else x

    x_BTD = sharding.stream(x_BTD)
    read_BTD = before(x_BTD, 'attention')
    y_BTD, kv = self.attend(read_BTD, places, layer, kv)
    y_BTD = layers.after(self, 'attention_bottleneck', y_BTD)
    if norms.parallel is not None:
      z_BTD, sums = self.feed(read_BTD if norms.parallel == 'one norm' else before(x_BTD, 'mlp'), places)
      z_BTD = layers.after(self, 'mlp_bottleneck', z_BTD)
      return x_BTD + drop(out(y_BTD, 'attention'), 0) + drop(out(z_BTD, 'mlp'), 1), (kv, sums)
    x_BTD = after(x_BTD + drop(out(y_BTD, 'attention'), 0), 'attention')
    y_BTD, sums = self.feed(before(x_BTD, 'mlp'), places)
    y_BTD = layers.after(self, 'mlp_bottleneck', y_BTD)
    return after(x_BTD + drop(out(y_BTD, 'mlp'), 1), 'mlp'), (kv, sums)

  @property
  def out_scale(self) -> float:
    """Projections that end in the stream start smaller by 1 / sqrt(2 L) (Radford et al. 2019)."""
    return (2 * self.cfg.layers) ** -0.5

  @property
  def style(self) -> AttentionStyle:
    return self.cfg.attention

  def dropping(self, count: int, layer, dropout_B):
    """drop(y_BTD, i) of the block's sublayer i of `count`; dropout_B holds a random key a row, None drops nothing."""
    rate = self.cfg.execution.dropout
    if dropout_B is None or rate is None:
      return lambda y_BTD, i: y_BTD
    keys_NB = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, layer), count), out_axes=1)(dropout_B)
    return lambda y_BTD, i: layers.dropout(y_BTD, keys_NB[i], rate)

  def attend(self, x_BTD, places: Places, layer, kv):
    """Attention of x, BTD, and what a cache keeps of it."""
    cfg = self.cfg
    return Attention(cfg.width, cfg.heads, cfg.kv_heads, cfg.head_width, self.style, cfg.norms.epsilon,
                     self.out_scale, cfg.execution.attention, cfg.execution.decoding, name='attention')(
                         x_BTD, places, self.style.kind(layer), kv)

  def feed(self, x_BTD, places: Places):
    """The hidden layer of x, BTD, and sums over its tokens to report or to train on, by name."""
    return Mlp(self.cfg.width, self.cfg.hidden, self.cfg.mlp, self.out_scale, name='mlp')(x_BTD), {}
