"""Losses of models with an encoder: tokens that are hidden in a text, and a text that answers another.

Sums, as in losses.py. Beside its own metrics a loss reports 'read': the tokens that went through the model for each
that counts, since most are read and not predicted.
"""
import dataclasses

from lmlib.kernels.cross_entropy import cross_entropy
from lmlib.models import protocol
from lmlib.train.losses import NextToken, check, dropout_keys

MASKED = {'tokens_BT', 'targets_BT', 'segments_BT', 'weight_BT', 'row_B', 'positions_BT', 'prefix_BT'}
ANSWERED = {'tokens_BT', 'targets_BT', 'segments_BT', 'weight_BT', 'row_B', 'positions_BT', 'inputs_BS',
            'input_segments_BS', 'input_positions_BS'}


@dataclasses.dataclass(frozen=True)
class MaskedToken(NextToken):
  """Cross-entropy in nats of the tokens of hidden places (BERT, Devlin et al. 2019), with NextToken's z_loss."""

  def of(self, config: protocol.Config):
    """loss(params, batch) of an encoder. ValueError for another model.

    batch: as objectives.MaskedLm gives it; prefix_BT marks what sees both sides, which here is all.
    Metrics: 'nats', 'accuracy' and 'read'.
    """
    if not protocol.encodes(config) or protocol.decodes(config):
      raise ValueError(f'the loss MaskedToken is of an encoder; {type(config).__module__} is none')
    model = config.model()

    def loss(params, batch):
      check('MaskedToken', batch, MASKED)
      apply = lambda method, *args: model.apply({'params': params}, *args, method=method)
      x_BTD, _, _ = apply('hidden', batch['tokens_BT'], batch['segments_BT'], None, dropout_keys(batch),
                          batch.get('positions_BT'))
      total, nats, correct = cross_entropy(x_BTD, apply('unembed'), batch['targets_BT'], batch['weight_BT'],
                                           self.z_loss, protocol.logits(config))
      read = (batch['segments_BT'] > 0).sum()
      return total, batch['weight_BT'].sum(), {'nats': nats, 'accuracy': correct, 'read': read}

    return loss


@dataclasses.dataclass(frozen=True)
class SequenceToSequence(NextToken):
  """Cross-entropy in nats of the next token of the targets, given the inputs (T5, Raffel et al. 2020)."""

  def of(self, config: protocol.Config):
    """loss(params, batch) of an encoder-decoder. ValueError for another model, or a batch without inputs.

    batch: as objectives of layout 'encoder_decoder' give it; positions count within texts, which a model of
    relative positions has from the segments. Metrics: 'nats', 'accuracy' and 'read', tokens of both sides.
    """
    if not (protocol.encodes(config) and protocol.decodes(config)):
      raise ValueError(f'the loss SequenceToSequence is of an encoder-decoder; {type(config).__module__} is none')
    model = config.model()

    def loss(params, batch):
      check('SequenceToSequence', batch, ANSWERED)
      if missing := sorted({'inputs_BS', 'input_segments_BS'} - batch.keys()):
        raise ValueError(f'the loss SequenceToSequence reads {", ".join(missing)}, which the objective of this run '
                         "does not give: it needs layout='encoder_decoder'")
      x_BTD, _, _ = model.apply({'params': params}, batch['tokens_BT'], batch['segments_BT'], None, dropout_keys(batch),
                                batch['inputs_BS'], batch['input_segments_BS'], method='hidden')
      w_DV = model.apply({'params': params}, method='unembed')
      total, nats, correct = cross_entropy(x_BTD, w_DV, batch['targets_BT'], batch['weight_BT'], self.z_loss,
                                           protocol.logits(config))
      read = (batch['segments_BT'] > 0).sum() + (batch['input_segments_BS'] > 0).sum()
      return total, batch['weight_BT'].sum(), {'nats': nats, 'accuracy': correct, 'read': read}

    return loss


def agree(loss, objective):
  """ValueError unless an objective hides and shows what a loss of models with an encoder, or of others, is about."""
  named = type(loss).__name__, type(objective).__name__
  in_place, layout = getattr(objective, 'in_place', False), getattr(objective, 'layout', None)
  if isinstance(loss, MaskedToken) and not in_place:
    raise ValueError(f'loss={named[0]} predicts the tokens of their own places, but objective={named[1]} asks for '
                     'others: it must be MaskedLm')
  if isinstance(loss, SequenceToSequence) != (layout == 'encoder_decoder'):
    raise ValueError(f'loss={named[0]} and objective={named[1]} with layout={layout!r}: SequenceToSequence goes with '
                     "layout='encoder_decoder', and with nothing else")
