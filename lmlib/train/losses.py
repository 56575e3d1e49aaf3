"""Losses as sums: (params, batch) -> (sum, weight, metrics). The step divides once."""
import dataclasses

import jax

from lmlib.kernels.cross_entropy import cross_entropy
from lmlib.models import protocol

READ = {'tokens_BT', 'targets_BT', 'segments_BT', 'weight_BT', 'row_B', 'positions_BT', 'prefix_BT'}


@dataclasses.dataclass(frozen=True)
class NextToken:
  """Cross-entropy of the next token in nats, plus `z_loss` times log(normaliser)^2 (Chowdhery et al. 2022)."""
  z_loss: float | None = None

  def __post_init__(self):
    if self.z_loss is not None and self.z_loss <= 0:
      raise ValueError(f'NextToken.z_loss={self.z_loss} must be positive; None turns it off')

  def of(self, config: protocol.Config):
    """loss(params, batch) of a decoder-only model.

    batch: tokens_BT, targets_BT, segments_BT (documents of a packed row), weight_BT (0 where
    nothing is to be learned) and, if the model is to drop out, row_B (a number for every row). Of what
    objectives add, positions_BT and prefix_BT; ValueError for arrays that it would have to ignore.
    Metrics: 'nats' is the cross-entropy alone, 'accuracy' the share of right first guesses.
    """
    model = config.model()

    def loss(params, batch):
      if unknown := sorted(batch.keys() - READ):
        raise ValueError(f'the loss NextToken of a decoder does not read {", ".join(unknown)}, which the objective '
                         'of this run gives: it needs a loss and a model that do')
      dropout_B = jax.vmap(jax.random.key)(batch['row_B']) if 'row_B' in batch else None
      apply = lambda method, *args: model.apply({'params': params}, *args, method=method)
      x_BTD, _ = apply('hidden', batch['tokens_BT'], batch['segments_BT'], None, dropout_B,
                       batch.get('positions_BT'), batch.get('prefix_BT'))
      total, nats, correct = cross_entropy(x_BTD, apply('unembed'), batch['targets_BT'], batch['weight_BT'],
                                           self.z_loss)
      return total, batch['weight_BT'].sum(), {'nats': nats, 'accuracy': correct}

    return loss
