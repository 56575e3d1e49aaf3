"""Steps that are not finite: one is skipped, ten in a row end the run; nothing saved is harmed."""
import json

import jax
import numpy as np
import pytest

from lmlib.data.packing import Batches
from lmlib.data.prepare import Corpus, prepare
from lmlib.data.sources import TextFiles
from lmlib.data.tokenizer import SentencePiece
from lmlib.models import dense, protocol
from lmlib.train import step as step_of
from lmlib.train.checkpoint import restore_params

MODEL = dense.Config(vocab=300, layers=1, width=16, hidden=32, heads=2, kv_heads=2, head_width=8, length=32)


@pytest.fixture(autouse=True)
def compiled_soon(command):
  """Each of these runs compiles a step of its own."""
  command.environment = command.environment | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}


@pytest.fixture
def batches(command, texts) -> Batches:
  corpus = Corpus(TextFiles(f'{texts}/*.txt'), SentencePiece(pieces=300))
  return Batches(prepare(corpus, command.environment['LMLIB_CACHE']).train, 4, 32, 0)


@pytest.fixture
def spoiled(command, batches):
  """A function that makes the loss of some steps, counted from 1, NaN."""

  def spoil(*steps: int):
    rows = tuple(int(batches.batch_at(step - 1)['row_B'][0]) for step in steps)
    text = command.gin.read_text() + ('from tests.experiments import faulty\n'
                                      'pretrain.main.loss = @faulty.Spikes()\n'
                                      f'faulty.Spikes.rows = {rows}\n')
    command.gin.write_text(text)

  return spoil


def test_one_step_is_skipped_counted_and_reported(command, spoiled):
  spoiled(12)
  status, out, err = command.run('STEPS = 20')
  assert (status, err) == (0, '')
  assert 'step 12: loss or gradient not finite, step skipped (1 in a row)' in out
  assert '1 steps skipped as not finite' in out
  lines = command.metrics
  assert [line['step'] for line in lines if not line['finite']] == [12]
  assert lines[11]['loss'] is None
  # Nothing has changed but the step: the weights that step 13 begins with are those of step 12.
  assert lines[12]['param_norm'] == lines[11]['param_norm'] != lines[10]['param_norm']
  assert json.loads((command.workdir / 'report/summary.json').read_text())['steps_skipped'] == 1


def test_ten_in_a_row_end_the_run_naming_steps_and_documents(command, spoiled, batches, texts):
  spoiled(*range(12, 40))
  ends = '10 steps in a row, 12 to 21, had a loss or gradient that was not finite; the batch of step 21 was: '
  for _ in range(2):  # run again, it goes on from step 14 and comes to the same end
    status, out, err = command.run()
    assert status == 1
    assert err == f'{ends}{"; ".join(batches.describe(20))}\n'
    assert str(texts) in err
    assert command.checkpoints() == [7, 14]
    shapes = step_of.placed(protocol.boxed(MODEL))
    params, step, _ = restore_params(command.workdir / 'checkpoints', shapes)
    assert step == 14
    assert all(np.isfinite(weight).all() for weight in jax.tree.leaves(params))
  assert 'going on after step 14 of 60' in out


def test_a_learning_rate_out_of_this_world_ends_the_run_in_one_line(command):
  status, _, err = command.run('schedules.Cosine.peak = 1e30', 'adamw.AdamW.clip = None')
  assert status == 1
  assert err.startswith('10 steps in a row, ')
  assert err.count('\n') == 1
