"""Lion (Chen et al. 2023): the sign of a mix of gradient and momentum, one moment of state.

Every weight moves by the whole learning rate, so the authors take a peak 3 to 10 times smaller than
AdamW's, and a decay larger by as much.
"""
import dataclasses

import optax

from lmlib.optim import moments, settings
from lmlib.optim.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
  decay: float | None = 1.0
  beta1: float = 0.9  # of the mix that steps
  beta2: float = 0.99  # of the momentum that stays
  moments: str = 'float32'  # a form of moments.FORMS, between steps

  def __post_init__(self):
    super().__post_init__()
    settings.share(self, 'beta1', 'beta2')
    settings.choice(self, 'moments', moments.FORMS)

  def _direction(self, letters):
    return moments.stored(optax.scale_by_lion(self.beta1, self.beta2), self.moments, letters)
