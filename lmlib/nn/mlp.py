"""The hidden layer: down(act(up x)), or gated, down(act(gate x) * up x) (SwiGLU and GeGLU, Shazeer 2020)."""
import dataclasses
import functools

from flax import linen as nn
import jax

from lmlib import sharding
from lmlib.nn import layers

ACTIVATIONS = {
    'silu': jax.nn.silu,
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),  # the approximation of GPT-2 and Gemma
    'gelu_sigmoid': lambda x: x * jax.nn.sigmoid(1.702 * x),  # that of Hendrycks and Gimpel 2016 (GPT-OSS)
    'relu': jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class MlpStyle:
  activation: str = 'silu'
  gated: bool = True
  bias: bool = False

  def __post_init__(self):
    if self.activation not in ACTIVATIONS:
      raise ValueError(f'MlpStyle.activation={self.activation!r} must be one of {", ".join(ACTIVATIONS)}')


class Mlp(nn.Module):
  width: int
  hidden: int
  style: MlpStyle = MlpStyle()
  out_scale: float = 1.0

  @property
  def sizes(self) -> dict[str, int]:
    return dict(D=self.width, F=self.hidden)

  @nn.compact
  def __call__(self, x_BTD):
    hidden_BTF = self.activation(self.into(x_BTD, 'gate') if self.style.gated else self.into(x_BTD, 'up'))
    if self.style.gated:
      hidden_BTF *= self.into(x_BTD, 'up')
    hidden_BTF = layers.kept(sharding.constrain(hidden_BTF, 'BTF'), 'hidden')
    down_FD = layers.cast(layers.weight(self, 'down', 'FD', 'F', self.out_scale), x_BTD.dtype)
    y_BTD = layers.product('BTF,FD->BTD', hidden_BTF, down_FD)
    if self.style.bias:
      y_BTD += layers.bias(self, 'down_bias', 'D').astype(x_BTD.dtype)[None, None]
    return y_BTD

  @property
  def activation(self):
    return ACTIVATIONS[self.style.activation]

  def into(self, x_BTD, name: str):
    """The projection `name` of x, BTF."""
    y_BTF = layers.product('BTD,DF->BTF', x_BTD, layers.cast(layers.weight(self, name, 'DF', 'D'), x_BTD.dtype))
    if self.style.bias:
      y_BTF += layers.bias(self, f'{name}_bias', 'F').astype(x_BTD.dtype)[None, None]
    return y_BTF
