"""Muon for matrices (Jordan et al. 2024), AdamW for embeddings and vectors.

The momentum of a matrix, every layer and expert by itself, gives way to the nearest semi-orthogonal matrix,
roughly: five Newton-Schulz steps bring singular values above 0.01 of the norm to between 0.68 and 1.14. All
heads are one matrix: 'LDKGH' is D x (K G H). optax debiases the Nesterov momentum, which Jordan et al. do
not; the direction differs in the first steps only.
"""
import dataclasses
import math

import jax
import optax

from lmlib.optim import moments, settings
from lmlib.optim.kinds import fans, kinds
from lmlib.optim.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
  """The schedule is that of matrices; rate_embedding and rate_vector multiply it for AdamW.

  scaling='adamw' multiplies by 0.2 sqrt(max(fan-in, fan-out)), which gives updates the RMS of AdamW's, so
  that its peak and decay serve for all weights (Liu et al. 2025); 'width' by
  sqrt(max(1, fan-out / fan-in)) (Jordan et al. 2024), whose peak is near 0.02 and needs rate_embedding
  and rate_vector below 1.
  """
  momentum: float = 0.95
  scaling: str = 'adamw'
  iterations: int = 5
  beta1: float = 0.9  # beta1, beta2, epsilon: of AdamW
  beta2: float = 0.95
  epsilon: float = 1e-8
  moments: str = 'float32'  # a form of moments.FORMS, between steps

  def __post_init__(self):
    super().__post_init__()
    settings.share(self, 'momentum', 'beta1', 'beta2')
    settings.choice(self, 'scaling', ('adamw', 'width'))
    settings.whole(self, 1, 'iterations')
    settings.positive(self, 'epsilon')
    settings.choice(self, 'moments', moments.FORMS)

  def _direction(self, letters):
    of = kinds(letters)
    split = jax.tree.map(lambda kind, axes: optax.contrib.MuonDimensionNumbers(*fans(axes))
                         if kind == 'matrix' else optax.MaskedNode(), of, letters)
    adam = optax.scale_by_adam(self.beta1, self.beta2, self.epsilon)
    muon = optax.chain(
        optax.contrib.scale_by_muon(ns_steps=self.iterations, beta=self.momentum,
                                    weight_dimension_numbers=split),
        optax.stateless(lambda updates, _: jax.tree.map(self._scaled, updates, split)))
    whole = optax.partition({'matrix': muon, 'embedding': adam, 'vector': adam}, of)
    return moments.stored(whole, self.moments, letters)

  def _scaled(self, update, split):
    fan_in, fan_out = (math.prod(update.shape[i] for i in axes) for axes in split)
    if self.scaling == 'adamw':
      return update * 0.2 * max(fan_in, fan_out)**0.5
    return update * max(1, fan_out / fan_in)**0.5
