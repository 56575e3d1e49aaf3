"""What every optimizer shares: clipping, decoupled weight decay and learning rates by kind of weight.

  g <- g * min(1, clip / |g|)              |g| over all weights
  u <- direction(g)                        Adam, Adafactor, Lion, Muon
  w <- w - rate * factor * (u + decay * w)

The decay is multiplied by the learning rate (Loshchilov and Hutter 2019 multiply it by the shape of
the schedule alone).
"""
import dataclasses

import jax
import optax

from lmlib.optim import settings
from lmlib.optim.kinds import kinds
from lmlib.optim.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """The settings that all optimizers have; see kinds.py for what a matrix, an embedding, a vector is."""
  schedule: Schedule
  decay: float | None = 0.1  # of matrices
  decay_embedding: float | None = None
  decay_vector: float | None = None
  rate_embedding: float = 1.0  # multiplies the schedule
  rate_vector: float = 1.0
  clip: float | None = 1.0  # the largest norm of all gradients together

  def __post_init__(self):
    if not isinstance(self.schedule, Schedule):
      raise ValueError(f'{settings.full_name(self, "schedule")}={self.schedule!r} must be a schedule '
                       'of schedules.py, such as Cosine(peak=1e-3, warmup=100)')
    settings.positive_or_none(self, 'decay', 'decay_embedding', 'decay_vector', 'clip')
    settings.positive(self, 'rate_embedding', 'rate_vector')

  def transformation(self, letters, steps: int) -> optax.GradientTransformation:
    """The optax transformation for weights whose axis letters are `letters`, over a run of `steps`.

    Raises ValueError if the schedule does not fit into `steps`. The state has one form whatever is
    turned off, so that a run may resume with another clip or decay.
    """
    self.schedule.check(steps)
    return optax.chain(
        optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip),
        self._direction(letters),
        self._by_kind(letters),
        optax.scale_by_learning_rate(lambda count: self.schedule.rate(count, steps)))

  def _direction(self, letters) -> optax.GradientTransformation:
    raise NotImplementedError

  def _by_kind(self, letters) -> optax.GradientTransformation:
    decay = {'matrix': self.decay, 'embedding': self.decay_embedding, 'vector': self.decay_vector}
    factor = {'matrix': 1.0, 'embedding': self.rate_embedding, 'vector': self.rate_vector}

    def step(kind, update, weight):
      return factor[kind] * (update if decay[kind] is None else update + decay[kind] * weight)

    return optax.stateless(lambda updates, weights: jax.tree.map(step, kinds(letters), updates, weights))
