"""Two real processes of one run. Four of them, and what else can go wrong: faults.py, which takes minutes."""
import json

import pytest

from tests.processes.running import Tiny
from tests.train import courses


@pytest.fixture
def tiny(tmp_path):
  return Tiny(tmp_path)


def test_two_processes_stop_together_and_one_goes_on_as_if_there_had_never_been_two(tiny, tmp_path):
  """SIGTERM to process 1: both save the same step. A single process goes on with the next batch."""
  layout = 'sharding.Layout.data = 2', 'sharding.Layout.fsdp = 2'
  (status, _, err), other = tiny.run(2, "tiny.main.fault = 'term'", *layout, devices=2)
  assert (status, other[0]) == (75, 75), (err, other[2])
  assert (other[1], other[2]) == ('', '')
  last = len(tiny.losses)
  assert 8 <= last < courses.STEPS
  assert err.splitlines() == [f'stopped by SIGTERM to process 1 after step {last} of {courses.STEPS}, saved; run the '
                              'same command to go on']
  assert str(last) in tiny.checkpoints()
  assert json.loads((tiny.workdir / 'manifest.json').read_text())['identity'] == {}

  courses.run(tiny.workdir, courses.Rows())
  courses.run(tmp_path / 'alone', courses.Rows())
  expected = courses.losses_of(tmp_path / 'alone')
  assert tiny.losses == pytest.approx(expected, abs=1e-5)
  assert len(set(tiny.data)) == courses.STEPS
  assert tiny.data == [line['data'] for line in courses.metrics.read(tmp_path / 'alone' / 'metrics.jsonl')]


def test_settings_that_differ_are_one_line_in_both_and_nothing_is_touched(tiny):
  found = tiny.run(2, each=lambda process: [f'tiny.main.steps = {8 + process}'])
  for status, out, err in found:
    assert (status, out) == (2, '')
    assert err.splitlines() == [
        'process 0 and process 1 differ in their settings: steps = 8 in process 0, steps = 9 in 1']
  assert not tiny.workdir.exists()
