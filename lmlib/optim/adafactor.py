"""Adafactor (Shazeer and Stern 2018): Adam without momentum, second moments kept as row and column means.

As optax has it, a weight is factored over its two longest axes, whatever their letters (so over L too, in
a model with more layers than its heads are wide), and moments are kept apart along the others. Clipping of
updates and scaling by the weight's RMS treat every layer and expert by itself, where optax.adafactor takes
the whole stack as one matrix.
"""
import dataclasses

import jax
import jax.numpy as jnp
import optax

from lmlib.optim import kinds, settings
from lmlib.optim.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
  threshold: float | None = 1.0  # the largest RMS of an update before the learning rate
  relative: bool = True  # a step is a share of the weight's RMS, at least 1e-3: the rate has no unit
  exponent: float = 0.8  # the second moment of step t = 1, 2, ... decays by 1 - t^-exponent
  epsilon: float = 1e-30  # added to squared gradients
  shortest: int = 128  # weights whose second-longest axis is shorter keep whole moments

  def __post_init__(self):
    super().__post_init__()
    settings.positive_or_none(self, 'threshold')
    settings.positive(self, 'exponent', 'epsilon')
    settings.whole(self, 2, 'shortest')

  def _direction(self, letters):
    moments = optax.scale_by_factored_rms(decay_rate=self.exponent, min_dim_size_to_factor=self.shortest,
                                          epsilon=self.epsilon)

    def scaled(axes, update, weight):
      if self.threshold is not None:
        update = update / jnp.maximum(1.0, rms(axes, update) / self.threshold)
      return update * jnp.maximum(1e-3, rms(axes, weight)) if self.relative else update

    return optax.chain(moments, optax.stateless(
        lambda updates, weights: jax.tree.map(scaled, letters, updates, weights)))


def rms(axes: str, x: jax.Array) -> jax.Array:
  """The root mean square of each stacked weight in x, with axes of size 1 in place of the others."""
  return jnp.sqrt(jnp.mean(x**2, axis=tuple(range(kinds.stacked(axes), x.ndim)), keepdims=True))
