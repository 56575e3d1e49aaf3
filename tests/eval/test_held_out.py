"""The score of what an objective hides, against sums over its batches."""
import collections
import dataclasses
import math

import jax
import numpy as np
import pytest

from lmlib.data import store
from lmlib.data.objectives import MaskedLm, Specials
from lmlib.data.packing import Batches, OneEach
from lmlib.data.sources import Document
from lmlib.data.tokenizer import Bytes
from lmlib.eval import held_out
from lmlib.models import encoder, protocol
from lmlib.train.encoder_losses import MaskedToken

TOKENIZER = Bytes()
MASK = TOKENIZER.pieces
CONFIG = encoder.Config(vocab=MASK + 1, layers=1, width=16, hidden=16, heads=1, head_width=16, length=16)
TEXTS = [f'{i} times {i} is {i * i}' for i in range(13)]


@pytest.fixture(scope='module')
def batches(tmp_path_factory):
  documents = (Document(text, text) for text in TEXTS)
  kept = store.write(tmp_path_factory.mktemp('held') / 'out', documents, TOKENIZER.train())
  return Batches(kept, 4, 16, packing=OneEach(), objective=MaskedLm(Specials(mask=MASK), rate=0.3), vocab=MASK + 1)


@pytest.fixture(scope='module')
def params():
  return protocol.init(CONFIG, jax.random.key(0))


def test_every_row_of_an_epoch_counts_once(batches, params):
  found = held_out.score(CONFIG, params, MaskedToken(), batches)
  rows, loss = batches.rows_per_epoch, MaskedToken().of(CONFIG)
  whole = dataclasses.replace(batches, batch=rows).batch_at(0)
  total, weight, metrics = jax.jit(loss)(params, whole)
  assert rows % batches.batch, 'the last batch is a part'
  np.testing.assert_allclose(found.nats, total, rtol=1e-5)
  assert (found.hidden, found.right) == (int(weight), int(metrics['accuracy']))
  assert found.read == (whole['segments_BT'] > 0).sum()
  assert found.hidden < 0.5 * found.read
  assert found.objective == 'MaskedLm'


def test_the_blind_guess_is_the_entropy_of_what_is_hidden(batches, params):
  found = held_out.score(CONFIG, params, MaskedToken(), batches)
  whole = dataclasses.replace(batches, batch=batches.rows_per_epoch).batch_at(0)
  counts = collections.Counter(whole['targets_BT'][whole['weight_BT'] > 0].tolist())
  entropy = -sum(n * math.log(n / found.hidden) for n in counts.values())
  assert found.blind_nats == pytest.approx(entropy)
  assert found.figures()['blind_nats'] == pytest.approx(entropy / found.hidden)
  assert found.figures()['hidden_perplexity'] == pytest.approx(math.exp(found.nats / found.hidden))


def test_nothing_hidden_is_refused(batches, params):
  none = dataclasses.replace(batches, objective=MaskedLm(Specials(mask=MASK), rate=1e-9))
  with pytest.raises(ValueError, match='MaskedLm hides no token'):
    held_out.score(CONFIG, params, MaskedToken(), none)
