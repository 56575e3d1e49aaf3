"""What every optimizer shares: clipping, decoupled weight decay and learning rates by kind of weight.

  g <- g * min(1, clip / |g|)              |g| over all weights
  u <- direction(g)                        Adam, Adafactor, Lion, Muon
  w <- w - rate * factor * (u + decay * w)

A router's offsets, b <- b - rate_balance sign(g), follow the error of load that stands in the place of their
gradient (Wang et al. 2024); nothing else of this concerns them.

The decay is multiplied by the learning rate (Loshchilov and Hutter 2019 multiply it by the shape of
the schedule alone).
"""
import dataclasses

import jax
import jax.numpy as jnp
import optax

from lmlib.optim import settings
from lmlib.optim.kinds import descended, kinds
from lmlib.optim.schedules import Schedule


class Transformation(optax.GradientTransformation):
  """An optax transformation that knows the axis letters of its weights, so that gradients can be laid out by them."""
  letters = None

  @classmethod
  def of(cls, transformation: optax.GradientTransformation, letters) -> 'Transformation':
    made = cls(*transformation)
    made.letters = letters
    return made


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
  rate_balance: float = 1e-3  # of a router's offsets, whatever the schedule; scores lie between 0 and 1

  def __post_init__(self):
    if not isinstance(self.schedule, Schedule):
      raise ValueError(f'{settings.full_name(self, "schedule")}={self.schedule!r} must be a schedule '
                       'of schedules.py, such as Cosine(peak=1e-3, warmup=100)')
    settings.positive_or_none(self, 'decay', 'decay_embedding', 'decay_vector', 'clip')
    settings.positive(self, 'rate_embedding', 'rate_vector', 'rate_balance')

  def transformation(self, letters, steps: int) -> 'Transformation':
    """The optax transformation for weights whose axis letters are `letters`, over a run of `steps`.

    Raises ValueError if the schedule does not fit into `steps`. The state has one form whatever is
    turned off, so that a run may resume with another clip or decay.
    """
    self.schedule.check(steps)
    found = descended(letters)
    transformation = optax.chain(
        optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip),
        self._direction(found),
        self._by_kind(found),
        optax.scale_by_learning_rate(lambda count: self.schedule.rate(count, steps)))
    of = jax.tree.map(lambda kind: kind if kind == 'balance' else 'descended', kinds(letters))
    if 'balance' not in jax.tree.leaves(of):
      return Transformation.of(transformation, letters)
    balance = optax.stateless(lambda errors, _: jax.tree.map(lambda g: -self.rate_balance * jnp.sign(g), errors))
    return Transformation.of(optax.partition({'descended': transformation, 'balance': balance}, of), letters)

  def _direction(self, letters) -> optax.GradientTransformation:
    raise NotImplementedError

  def _by_kind(self, letters) -> optax.GradientTransformation:
    decay = {'matrix': self.decay, 'embedding': self.decay_embedding, 'vector': self.decay_vector}
    factor = {'matrix': 1.0, 'embedding': self.rate_embedding, 'vector': self.rate_vector}

    def step(kind, update, weight):
      return factor[kind] * (update if decay[kind] is None else update + decay[kind] * weight)

    return optax.stateless(lambda updates, weights: jax.tree.map(step, kinds(letters), updates, weights))
