"""Losses of models with an encoder, from the arrays that objectives give."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.data.denoising import SpanCorruption
from lmlib.data.objectives import CAUSAL, MaskedLm, PrefixLm, Specials
from lmlib.train.encoder_losses import MaskedToken, SequenceToSequence, agree
from lmlib.train.losses import NextToken
from tests.laws import models
from tests.laws.encoders import BERT, BOTH, T5, apply, executed, made
from tests.laws.models import tokens

SEGMENTS = np.array([[1] * 5 + [2] * 7, [1] * 6 + [0] * 6])
WEIGHT_BT = np.array([[0, 1, 0, 1, 0, 0, 1] + [0] * 5, [1] + [0] * 11], np.float32)
BATCH = {'tokens_BT': tokens(BERT, 2, BOTH), 'targets_BT': tokens(BERT, 2, BOTH, seed=3), 'segments_BT': SEGMENTS,
         'weight_BT': WEIGHT_BT, 'prefix_BT': (SEGMENTS > 0).astype(int), 'row_B': np.arange(2)}
ANSWERS = {name: x for name, x in BATCH.items() if name != 'prefix_BT'} | {
    'inputs_BS': tokens(BERT, 2, BOTH, seed=4), 'input_segments_BS': np.array([[1] * 4 + [2] * 8, [1] * 5 + [0] * 7]),
    'input_positions_BS': np.zeros((2, BOTH), int), 'positions_BT': np.zeros((2, BOTH), int)}


@pytest.mark.parametrize(('loss', 'config', 'batch', 'read'), [
    (MaskedToken(), BERT, BATCH, 18), (SequenceToSequence(), T5, ANSWERS, 18 + 17)])
def test_a_loss_is_the_sum_over_places_that_count(loss, config, batch, read):
  params = made(config)
  total, weight, metrics = jax.jit(loss.of(config))(params, batch)
  more = (batch['inputs_BS'], batch['input_segments_BS']) if 'inputs_BS' in batch else ()
  logits_BTV, _ = apply(config, params, batch['tokens_BT'], batch['segments_BT'], None, None, *more)
  logp_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), batch['targets_BT'][..., None], -1)[..., 0]
  np.testing.assert_allclose(total, -(logp_BT * WEIGHT_BT).sum(), rtol=1e-5)
  assert (float(weight), int(metrics['read'])) == (4, read)
  right = ((logits_BTV.argmax(-1) == batch['targets_BT']) * WEIGHT_BT).sum()
  assert metrics['accuracy'] == right
  assert metrics['nats'] == total
  dropping = type(loss)(z_loss=0.1).of(executed(config, dropout=0.5))  # rows have numbers, so it drops
  total, _, with_z = jax.jit(dropping)(params, batch)
  assert abs(with_z['nats'] - metrics['nats']) > 1e-2
  assert total > with_z['nats'] + 1e-2


@pytest.mark.parametrize(('loss', 'config', 'message'), [
    (NextToken(), BERT, r'NextToken is of a decoder alone; lmlib\.models\.encoder has an encoder.*needs MaskedToken'),
    (NextToken(), T5, 'needs SequenceToSequence'), (MaskedToken(), T5, r'encoder_decoder is none'),
    (MaskedToken(), models.CONFIGS['dense'], r'dense is none'),
    (SequenceToSequence(), BERT, r'models\.encoder is none'),
    (SequenceToSequence(), models.CONFIGS['dense'], r'dense is none')])
def test_another_kind_of_model_is_refused(loss, config, message):
  with pytest.raises(ValueError, match=message):
    loss.of(config)


def test_arrays_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='MaskedToken does not read input_positions_BS, input_segments_BS, inputs_BS'):
    MaskedToken().of(BERT)(None, ANSWERS)
  with pytest.raises(ValueError, match=r"reads input_segments_BS, inputs_BS.*layout='encoder_decoder'"):
    SequenceToSequence().of(T5)(None, {name: x for name, x in BATCH.items() if name != 'prefix_BT'})


def test_a_loss_and_an_objective_must_agree():
  specials = Specials(mask=300, sentinels=(301, 302))
  masked, spans = MaskedLm(specials), SpanCorruption(specials, layout='encoder_decoder')
  for loss, objective in ((MaskedToken(), masked), (SequenceToSequence(), spans), (NextToken(), CAUSAL),
                          (NextToken(), masked), (NextToken(), SpanCorruption(specials))):
    agree(loss, objective)
  for loss, objective in ((MaskedToken(), PrefixLm()), (MaskedToken(), spans), (SequenceToSequence(), CAUSAL),
                          (SequenceToSequence(), SpanCorruption(specials)), (NextToken(), spans)):
    with pytest.raises(ValueError, match=rf'loss={type(loss).__name__}.*objective={type(objective).__name__}'):
      agree(loss, objective)
