"""Profiles of the steps that were named, or asked for by touching a file."""
import pytest

from lmlib.train.traces import ASK, Profile, Traces
from lmlib.train.watch import Watch
from tests.train.courses import Rows, run


@pytest.fixture
def profiler(monkeypatch):
  log = []
  monkeypatch.setattr('jax.profiler.start_trace', lambda folder: log.append(folder.rpartition('/')[2]))
  monkeypatch.setattr('jax.profiler.stop_trace', lambda: log.append('stop'))
  return log


def steps(traces, numbers, log):
  """As in the loop: a step is done when the next one has begun."""
  for number in numbers:
    log.append(number)
    traces.before(number)
    if number > numbers[0]:
      traces.after(number - 1)


def test_named_steps_are_traced_once(tmp_path, profiler):
  said = []
  steps(Traces(Profile(first=3, steps=2), tmp_path, said.append), range(1, 8), profiler)
  assert profiler == [1, 2, 3, 'profile_3', 4, 5, 'stop', 6, 7]
  assert said == [f'profile     steps 3 to 4 are in {tmp_path}/profile_3']


def test_a_touch_asks_for_steps_and_an_old_one_does_not(tmp_path, profiler):
  (tmp_path / ASK).touch()
  traces = Traces(Profile(steps=1), tmp_path, lambda line: None)
  steps(traces, range(1, 3), profiler)
  assert profiler == [1, 2]
  (tmp_path / ASK).unlink()
  steps(traces, range(3, 5), profiler)
  (tmp_path / ASK).touch()
  steps(traces, range(5, 8), profiler)
  assert profiler[2:] == [3, 4, 5, 'profile_5', 6, 'stop', 7]


def test_a_trace_whose_steps_do_not_all_come_is_ended(tmp_path, profiler):
  traces = Traces(Profile(first=1, steps=9), tmp_path, lambda line: None)
  steps(traces, range(1, 3), profiler)
  traces.close()
  traces.close()
  assert profiler == [1, 'profile_1', 2, 'stop']


def test_a_run_writes_what_tensorboard_reads(tmp_path):
  run(tmp_path / 'run', Rows(), Watch(profile=Profile(first=2, steps=1)), steps=4)
  assert list((tmp_path / 'run' / 'profile_2').rglob('*.xplane.pb'))


@pytest.mark.parametrize('given', [{'first': 0}, {'steps': 0}, {'steps': None}])
def test_settings_that_make_no_sense_are_named(given):
  with pytest.raises(ValueError, match=f'Profile.{next(iter(given))}='):
    Profile(**given)
