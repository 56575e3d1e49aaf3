"""A step done once more has the numbers that were recorded, to the bit, and says what every layer did."""
import json
import math
import re

import numpy as np
import pytest

from lmlib.train import layers, metrics
from lmlib.train.spikes import Events, Spikes
from lmlib.train.watch import Watch
from tests.train.courses import Rows, replayed, run


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A run that left batch 16 out: steps to 24, with checkpoints of 20 and 24."""
  folder = tmp_path_factory.mktemp('runs') / 'run'
  run(folder, Rows(poisoned=[16]), Watch(spikes=Spikes(window=6)))
  return folder


def facts(folder):
  return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_a_step_is_the_one_recorded_bit_for_bit_and_nothing_changes(folder):
  before, line = facts(folder), metrics.read(folder / 'metrics.jsonl')[22]
  found = replayed(folder, Rows(poisoned=[16]), 23)
  assert (found.batch, found.begin, found.documents) == (23, 20, ['rows of 23'])
  assert (found.differences, found.compared) == ((), 3)
  assert {name: found.values[name] for name in ('loss', 'grad_norm', 'update_norm', 'param_norm')} == {
      name: line[name] for name in ('loss', 'grad_norm', 'update_norm', 'param_norm')}
  whole = {name: math.hypot(*norms.values()) for name, norms in found.layers.items()}
  assert whole == pytest.approx({'weights': line['param_norm'], 'gradient': line['grad_norm'],
                                 'update': line['update_norm']}, rel=1e-5)
  assert facts(folder) == before


def test_other_data_are_noticed_and_the_first_difference_named(folder):
  found = replayed(folder, Rows(poisoned=[16, 22]), 24)
  assert found.differences[0].step == 22
  assert re.match(r'step 22: loss [\d.]+, recorded [\d.]+$', str(found.differences[0]))
  assert {difference.step for difference in found.differences} == {22, 23, 24}


def test_a_batch_that_was_left_out_can_be_looked_at(folder):
  found = replayed(folder, Rows(poisoned=[16]), 22, batch=16)
  assert (found.batch, found.documents, found.compared) == (16, ['rows of 16'], 1)
  assert found.values['loss'] > 2 * metrics.read(folder / 'metrics.jsonl')[21]['loss']


def test_what_a_spike_has_of_its_layers_is_what_a_replay_shows(folder, tmp_path):
  run(tmp_path / 'run', Rows(), steps=17)
  line = metrics.read(tmp_path / 'run' / 'metrics.jsonl')[16]
  found = replayed(tmp_path / 'run', Rows(poisoned=[16]), 17)
  event, = Events(folder).read()
  assert found.layers == event['layers']
  assert {difference.name: difference.recorded for difference in found.differences}['loss'] == line['loss']


def test_a_step_before_all_checkpoints_is_refused(folder):
  with pytest.raises(ValueError, match=r'no usable checkpoint of step 16 or before in .*: the oldest is of step 20'):
    replayed(folder, Rows(), 17)


def test_norms_of_layers_are_those_of_their_weights(folder):
  found = replayed(folder, Rows(poisoned=[16]), 21).layers
  together = layers.by_layer(found)
  assert set(together['weights']) >= {'blocks_0', 'blocks_1', 'embedding', 'norm'}
  of_block = [norm for name, norm in found['gradient'].items() if name.startswith('blocks_1/')]
  assert together['gradient']['blocks_1'] == pytest.approx(np.sqrt(np.square(of_block).sum()))
  lines = layers.table(together).splitlines()
  assert len(lines) == 1 + len(together['weights'])
  assert len({len(line) for line in lines}) == 1
  assert layers.by_layer({'weights': {'encoder/blocks_3/mlp/up': 3.0, 'encoder/blocks_3/mlp/gate': 4.0, 'bias': 1.0}}
                         ) == {'weights': {'encoder/blocks_3': 5.0, 'bias': 1.0}}


def test_events_hold_json(folder):
  for path in (folder / 'spikes').iterdir():
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
