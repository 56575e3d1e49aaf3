"""AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019): m / (sqrt(v) + epsilon), both debiased."""
import dataclasses

import optax

from lmlib.optim import moments, settings
from lmlib.optim.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  moments: str = 'float32'  # a form of moments.FORMS, between steps

  def __post_init__(self):
    super().__post_init__()
    settings.share(self, 'beta1', 'beta2')
    settings.positive(self, 'epsilon')
    settings.choice(self, 'moments', moments.FORMS)

  def _direction(self, letters):
    return moments.stored(optax.scale_by_adam(self.beta1, self.beta2, self.epsilon), self.moments, letters)
