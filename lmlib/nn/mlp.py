"""The gated hidden layer (SwiGLU, Shazeer 2020): down(silu(gate x) * up x)."""
from flax import linen as nn
import jax

from lmlib import sharding
from lmlib.nn import layers


class GatedMlp(nn.Module):
  width: int
  hidden: int
  out_scale: float = 1.0

  @property
  def sizes(self) -> dict[str, int]:
    return dict(D=self.width, F=self.hidden)

  @nn.compact
  def __call__(self, x_BTD):
    w = lambda *args: layers.weight(self, *args).astype(x_BTD.dtype)
    gate_BTF = layers.product('BTD,DF->BTF', x_BTD, w('gate', 'DF', 'D'))
    up_BTF = layers.product('BTD,DF->BTF', x_BTD, w('up', 'DF', 'D'))
    hidden_BTF = sharding.constrain(jax.nn.silu(gate_BTF) * up_BTF, 'BTF')
    return layers.product('BTF,FD->BTD', hidden_BTF, w('down', 'FD', 'F', self.out_scale))
