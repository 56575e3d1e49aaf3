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
    objectives add, positions_BT and prefix_BT; ValueError for arrays that it would have to ignore, and for a model
    with modules that it would not train.
    Metrics: 'nats' is the cross-entropy alone, 'accuracy' the share of right first guesses; see reported().
    """
    if protocol.encodes(config):
      needed = 'SequenceToSequence' if protocol.decodes(config) else 'MaskedToken'
      raise ValueError(f'the loss NextToken is of a decoder alone; {type(config).__module__} has an encoder, which '
                       f'needs {needed}')
    if modules := getattr(config, 'future', 0):
      raise ValueError(f'the model has future={modules} modules that predict further tokens, which the loss '
                       'NextToken does not train: MultiToken does, or future=0 leaves them out')
    model = config.model()

    def loss(params, batch):
      check('NextToken', batch, READ)
      apply = lambda method, *args: model.apply({'params': params}, *args, method=method)
      x_BTD, _, sums = apply('hidden', batch['tokens_BT'], batch['segments_BT'], None, dropout_keys(batch),
                             batch.get('positions_BT'), batch.get('prefix_BT'))
      total, nats, correct = cross_entropy(x_BTD, apply('unembed'), batch['targets_BT'], batch['weight_BT'],
                                           self.z_loss, protocol.logits(config))
      auxiliary, metrics = reported(sums, batch['weight_BT'])
      return total + auxiliary, batch['weight_BT'].sum(), {'nats': nats, 'accuracy': correct} | metrics

    return loss


@dataclasses.dataclass(frozen=True)
class MultiToken:
  """NextToken, and `weight` times the mean cross-entropy of the tokens after that, one a module (DeepSeek-V3, 2024).

  It reads what objectives.MultiToken of config.future + 1 tokens gives.
  """
  weight: float = 0.3
  z_loss: float | None = None  # of the next token

  def __post_init__(self):
    for name in ('weight', 'z_loss'):
      value = getattr(self, name)
      if (value is None and name == 'weight') or (value is not None and not value > 0):
        raise ValueError(f'MultiToken.{name}={value} must be positive')

  def of(self, config: protocol.Config):
    """loss(params, batch) of a model whose method `future` predicts tokens after the next.

    batch: as NextToken, with targets_BTJ and weight_BTJ. ValueError if the model has no such modules or the
    batch other tokens than they predict. Metrics: as NextToken, and 'nats_2', 'nats_3', ..., each divided by its
    own weight.
    """
    modules = getattr(config, 'future', 0)
    if not modules:
      raise ValueError('the loss MultiToken needs a model with modules that predict further tokens; '
                       f'{type(config).__module__} has future={modules}')
    model = config.model()

    def loss(params, batch):
      check('MultiToken', batch, READ - {'prefix_BT'} | {'targets_BTJ', 'weight_BTJ'})
      targets_BTJ = batch.get('targets_BTJ', batch['targets_BT'][..., None])
      if targets_BTJ.shape[-1] != modules + 1:
        raise ValueError(f'a model with future={modules} predicts {modules + 1} tokens, and the objective of this run '
                         f'gives {targets_BTJ.shape[-1]}: it must be MultiToken(tokens={modules + 1})')
      apply = lambda method, *args: model.apply({'params': params}, *args, method=method)
      given = batch['segments_BT'], dropout_keys(batch), batch.get('positions_BT')
      x_BTD, _, sums = apply('hidden', batch['tokens_BT'], given[0], None, *given[1:])
      x_LBTD, more = apply('future', x_BTD, targets_BTJ[..., :-1], *given)
      score = lambda x_BTD, targets_BT, weight_BT, z_loss: cross_entropy(
          x_BTD, apply('unembed'), targets_BT, weight_BT, z_loss, protocol.logits(config))
      total, nats, correct = score(x_BTD, batch['targets_BT'], batch['weight_BT'], self.z_loss)
      metrics = {'nats': nats, 'accuracy': correct}
      for j in range(1, modules + 1):
        weight_BT = batch['weight_BTJ'][..., j]
        further, *_ = score(x_LBTD[j - 1], targets_BTJ[..., j], weight_BT, None)
        total += self.weight / modules * further
        metrics[f'nats_{j + 1}'] = further, weight_BT.sum()
      auxiliary, told = reported(jax.tree.map(lambda *x: jax.numpy.concatenate(x), sums, more), batch['weight_BT'])
      return total + auxiliary, batch['weight_BT'].sum(), metrics | told

    return loss


def check(name: str, batch, read):
  """ValueError for arrays of a batch that the loss of this name does not read."""
  if unknown := sorted(batch.keys() - read):
    raise ValueError(f'the loss {name} does not read {", ".join(unknown)}, which the objective '
                     'of this run gives: it needs a loss and a model that do')


def dropout_keys(batch):
  """B random keys, one for each row's number; None if rows have no numbers."""
  return jax.vmap(jax.random.key)(batch['row_B']) if 'row_B' in batch else None


def reported(sums, weight_BT):
  """(loss, metrics) of what the blocks of a model report, L in front: see Decoder.hidden.

  'auxiliary_B' are losses, means over the tokens of a row, which count with the weight of the row; a batch's
  is then the sum of its microbatches'. The others are pairs of a sum and its weight, for a metric.
  """
  sums, metrics, loss = dict(sums), {}, 0.0
  if (auxiliary_LB := sums.pop('auxiliary_B', None)) is not None:
    loss = metrics['auxiliary'] = (auxiliary_LB * weight_BT.sum(1)[None]).sum()
  for name, (sum_L, weight_L) in sums.items():
    if sum_L.ndim == 1:
      metrics[name] = sum_L.sum(), weight_L.sum()
    else:  # of every layer, 'expert_load_E' as expert_load
      metrics[name.rpartition('_')[0]] = sum_L, weight_L[:, None]
  return loss, metrics
