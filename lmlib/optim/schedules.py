"""Learning rates: linear warmup to a peak, then one of five shapes.

  rate(step) = peak * min(1, (step + 1) / warmup) * shape(step),   step = 0, 1, ..., steps - 1

The warmup counts from 1 and the decay ends at `steps`, one past the last step, so no step has rate 0.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp

from lmlib.optim import settings


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What all shapes share; `floor`, where a shape has one, is the share of the peak it ends at."""
  peak: float
  warmup: int = 0  # steps; 0 starts at the peak

  def __post_init__(self):
    settings.positive(self, 'peak')
    settings.whole(self, 0, 'warmup')
    if hasattr(self, 'floor'):
      settings.share(self, 'floor')

  def check(self, steps: int):
    """Raises ValueError if a run of `steps` steps is too short for this schedule."""
    if not isinstance(steps, int) or steps < 1:
      raise ValueError(f'steps={steps!r} must be a positive whole number')
    if self.warmup >= steps:
      raise ValueError(f'{settings.full_name(self, "warmup")}={self.warmup} must be less than steps={steps}')

  def rate(self, step, steps) -> jax.Array:
    """The learning rate of step 0, 1, ... of a run of `steps`: a float32 scalar; ints may be traced."""
    warm = jnp.minimum(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
    return jnp.asarray(self.peak * warm * self._shape(step, steps), jnp.float32)

  def _shape(self, step, steps):
    raise NotImplementedError

  def _after_warmup(self, step, steps):
    """From 0 at the end of the warmup to 1 at `steps`."""
    return jnp.clip((step - self.warmup) / (steps - self.warmup), 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
  """The peak, to the end."""

  def _shape(self, step, steps):
    return 1.0


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
  """A straight line from the peak to floor * peak."""
  floor: float = 0.0

  def _shape(self, step, steps):
    return 1 - (1 - self.floor) * self._after_warmup(step, steps)


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
  """Half a cosine wave from the peak to floor * peak (Loshchilov and Hutter 2017, without restarts)."""
  floor: float = 0.1

  def _shape(self, step, steps):
    return self.floor + (1 - self.floor) * 0.5 * (1 + jnp.cos(math.pi * self._after_warmup(step, steps)))


@dataclasses.dataclass(frozen=True)
class Wsd(Schedule):
  """Warmup, stable, decay (Hu et al. 2024): the peak until a share `decay` of all steps is left.

  The decay there is exponential; here it is 1 - x ('linear') or 1 - sqrt(x) ('sqrt', Hägele et al.
  2024) of the way x through it.
  """
  decay: float = 0.2  # share of all steps
  floor: float = 0.0
  form: str = 'linear'

  def __post_init__(self):
    super().__post_init__()
    settings.positive(self, 'decay')
    settings.share(self, 'decay')
    settings.choice(self, 'form', ('linear', 'sqrt'))

  def check(self, steps: int):
    super().check(steps)
    name = settings.full_name(self, 'decay')
    if self.decay * steps < 2:
      raise ValueError(f'{name}={self.decay} of steps={steps} is less than 2 steps: the rate would not decay')
    if self.warmup > (1 - self.decay) * steps:
      raise ValueError(f'warmup={self.warmup} ends inside the decay, {name}={self.decay} of steps={steps}')

  def _shape(self, step, steps):
    x = jnp.clip(1 - (steps - step) / (self.decay * steps), 0.0, 1.0)
    return 1 - (1 - self.floor) * (x if self.form == 'linear' else jnp.sqrt(x))


@dataclasses.dataclass(frozen=True)
class InverseSquareRoot(Schedule):
  """peak * sqrt(warmup / (step + 1)) after the warmup (Vaswani et al. 2017); needs no end."""

  def __post_init__(self):
    super().__post_init__()
    settings.whole(self, 1, 'warmup')

  def _shape(self, step, steps):
    return jnp.minimum(1.0, jnp.sqrt(self.warmup / (step + 1)))
