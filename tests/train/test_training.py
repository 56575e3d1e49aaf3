"""A run goes back after a spike, leaves its batch out, and ends as one that never had it."""
import jax
import numpy as np
import pytest

from lmlib.train import health, metrics
from lmlib.train.spikes import Events, Spikes
from lmlib.train.watch import Watch
from tests.train.courses import Rows, losses_of, run

WATCH = Watch(spikes=Spikes(window=6))


def equal(one, other):
  """Bit for bit."""
  return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), one, other)))


@pytest.fixture(scope='module')
def never(tmp_path_factory):
  """The run that never had batch 16: its folder and its last state."""
  folder = tmp_path_factory.mktemp('runs') / 'never'
  return folder, run(folder, Rows(gone=[16]))


def test_a_poisoned_batch_is_left_out_and_the_run_ends_as_if_it_had_never_been(never, tmp_path):
  folder, said = tmp_path / 'run', []
  state = run(folder, Rows(poisoned=[16]), WATCH, said=said)
  assert equal(state, never[1])
  assert losses_of(folder) == losses_of(never[0])
  event, = Events(folder).read()
  assert (event['step'], event['batch'], event['left_out'], event['back_to']) == (17, 16, [16], 15)
  assert event['documents'] == ['rows of 16']
  assert event['replayed']['loss'] == pytest.approx(event['recorded']['loss'], rel=1e-6)
  assert set(event['layers']) == {'weights', 'gradient', 'update'}
  assert {'blocks_0/mlp/up', 'blocks_1/mlp/up', 'norm/scale'} <= event['layers']['gradient'].keys()
  whole = np.sqrt(sum(norm**2 for norm in event['layers']['gradient'].values()))
  assert whole == pytest.approx(event['recorded']['grad_norm'], rel=1e-5)
  line, = [line for line in said if 'going on' in line]
  assert line.startswith('step 17: loss ')
  assert f'going on from the checkpoint of step 15 without the batch 16 (time 1 of at most 8); see {folder}' in line


def test_a_run_that_is_stopped_after_it_went_back_reads_the_same_batches(never, tmp_path):
  """Stopped before the first checkpoint without the batch, and gone on from the one before."""
  folder = tmp_path / 'run'

  def stop(params, number):
    raise KeyboardInterrupt

  with pytest.raises(health.Stopped):
    run(folder, Rows(poisoned=[16]), WATCH, evaluate=stop, evaluate_every=18)
  assert Events(folder).order().left_out == (16,)
  rows = Rows(poisoned=[16])
  assert equal(run(folder, rows), never[1])  # what was decided holds, whatever the settings are now
  assert rows.asked[:3] == [15, 17, 18]
  assert losses_of(folder) == losses_of(never[0])


def test_a_run_killed_while_it_goes_back_comes_there_again(never, tmp_path, monkeypatch):
  folder = tmp_path / 'run'

  def killed(*_):
    raise RuntimeError('killed')

  with monkeypatch.context() as patch:
    patch.setattr(Events, 'write', killed)
    with pytest.raises(RuntimeError, match='killed'):
      run(folder, Rows(poisoned=[16]), WATCH)
  assert Events(folder).read() == []
  assert equal(run(folder, Rows(poisoned=[16]), WATCH), never[1])
  assert losses_of(folder) == losses_of(never[0])


def test_several_batches_up_to_the_spike_are_left_out(tmp_path):
  said = []
  watch = Watch(spikes=Spikes(window=6, batches=3))
  state = run(tmp_path / 'run', Rows(poisoned=[16]), watch, said=said)
  assert Events(tmp_path / 'run').order().left_out == (14, 15, 16)
  assert Events(tmp_path / 'run').read()[0]['back_to'] == 10
  assert any('without the batches 14 to 16' in line for line in said)
  assert equal(state, run(tmp_path / 'never', Rows(gone=[14, 15, 16])))
  assert losses_of(tmp_path / 'run') == losses_of(tmp_path / 'never')


def test_a_spike_before_the_first_checkpoint_goes_back_to_the_start(tmp_path):
  watch = Watch(spikes=Spikes(loss=3.0, window=3))
  state = run(tmp_path / 'run', Rows(poisoned=[6]), watch, save_every=20)
  assert Events(tmp_path / 'run').read()[0]['back_to'] == 0
  assert equal(state, run(tmp_path / 'never', Rows(gone=[6]), save_every=20))


def test_spikes_without_end_stop_the_run_where_no_more_may_be_left_out(tmp_path):
  watch = Watch(spikes=Spikes(window=6, rollbacks=2))
  with pytest.raises(health.RunFault, match=r'^step 17: loss .* the run has gone back 2 times, and Spikes.rollbacks=2'):
    run(tmp_path / 'run', Rows(poisoned=range(16, 99)), watch)
  assert Events(tmp_path / 'run').order().left_out == (16, 17)


def test_a_spike_that_does_not_come_again_leaves_nothing_out(tmp_path, monkeypatch):
  """As if the machine had failed once: batch 16 is noise when it is read first."""
  rows, said = Rows(poisoned=[16]), []
  healthy = rows.batch_at

  def once(index, part):
    batch = healthy(index, part)
    rows.poisoned = [] if index == 16 else rows.poisoned
    return batch

  monkeypatch.setattr(rows, 'batch_at', once)
  state = run(tmp_path / 'run', rows, WATCH, said=said)
  event, = Events(tmp_path / 'run').read()
  assert (event['left_out'], event['back_to']) == ([], 15)
  assert any('is the machine sound?' in line for line in said)
  assert equal(state, run(tmp_path / 'never', Rows()))


def test_a_machine_that_fails_at_one_step_again_and_again_ends_the_run(tmp_path, monkeypatch):
  """The batch is noise whenever the loop reads it, and none when it is replayed: nothing is ever left out."""
  rows = Rows(poisoned=[16])
  sound = lambda course, index: course.place(Rows().batch_at(index, course.rows))
  monkeypatch.setattr('lmlib.train.training.Course.batch', sound)
  with pytest.raises(health.RunFault, match='has gone back 2 times'):
    run(tmp_path / 'run', rows, Watch(spikes=Spikes(window=6, rollbacks=2)))
  assert Events(tmp_path / 'run').order().left_out == ()


def test_steps_that_are_not_finite_are_left_where_they_stand_and_what_they_held_is_kept(tmp_path):
  run(tmp_path / 'run', Rows(broken=[16]), WATCH)
  event, = Events(tmp_path / 'run').read()
  assert (event['step'], event['left_out'], event['rollback'], event['weights_after_step']) == (17, [], None, 18)
  assert event['documents'] == ['rows of 16']
  assert event['layers']['gradient']['blocks_0/mlp/up'] is None  # NaN
  assert event['layers']['weights']['blocks_0/mlp/up'] > 0
  lines = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  assert [line['step'] for line in lines if not line['finite']] == [17]


@pytest.mark.parametrize(('keep', 'left_out'), [(3, range(8, 18)), (2, range(10, 18))])
def test_ten_in_a_row_that_are_not_finite_are_left_out_as_far_as_checkpoints_reach(tmp_path, keep, left_out):
  """Two of the ten steps stay, at no harm, where the oldest checkpoint is of the tenth step."""
  state = run(tmp_path / 'run', Rows(broken=range(8, 18)), WATCH, keep=keep)
  assert Events(tmp_path / 'run').order().left_out == tuple(left_out)
  assert equal(state, run(tmp_path / 'never', Rows(broken=range(8, left_out[0]), gone=left_out)))


def test_a_line_tells_which_rows_were_read(tmp_path):
  run(tmp_path / 'run', Rows(), steps=3)
  run(tmp_path / 'other', Rows(gone=[1]), steps=3)
  sums, others = ([line['data'] for line in metrics.read(tmp_path / name / 'metrics.jsonl')]
                  for name in ('run', 'other'))
  assert len(set(sums)) == 3
  assert (sums[0] == others[0], sums[2] == others[1], sums[1] in others) == (True, True, False)
