"""A run that is killed, stopped or damaged goes on as if nothing had happened. Real processes."""
import json
import random
import re
import shutil
import signal
import time

import pytest

from tests.devices import fake_devices
from tests.experiments.conftest import Command, begun, until

STEPS = 60
CLOCKS = {'waited', 'saving', 'tokens_per_second', 'seconds', 'memory_bytes', 'mfu', 'mfu_6nd'}


def numbers(lines):
  """What was computed, without what was measured."""
  return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def test_an_undisturbed_run_learns_and_writes_every_step_once(finished):
  lines = finished.metrics
  assert [line['step'] for line in lines] == list(range(1, STEPS + 1))
  assert all(line['seconds'] > 0 for line in lines)
  assert lines[-1]['loss'] < lines[0]['loss'] - 0.5  # so that equal losses mean something


@pytest.fixture(scope='module')
def stopped(tmp_path_factory, texts, environment):
  """A run that was told to stop after step 20 or so: what the tests of damage begin with."""
  command = Command(tmp_path_factory.mktemp('stopped'), texts, environment)
  process = command.start()
  until(lambda: command.last_step() >= 20, process)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=300)
  return command, process.returncode, out, err


@pytest.fixture
def again(stopped, command):
  """The command for a copy of the stopped run."""
  shutil.copytree(stopped[0].workdir, command.workdir)
  return command


def finishes(command, finished) -> str:
  """The command goes on to the same numbers, once each; returns what it says."""
  status, out, err = command.run()
  assert (status, err) == (0, ''), out
  assert numbers(command.metrics) == numbers(finished.metrics)
  return out


def test_killed_three_times_the_losses_are_those_of_an_undisturbed_run(finished, command):
  seed = random.randrange(10**6)
  print(f'seed {seed}')
  draw = random.Random(seed)
  for left in (4, 3, 2):
    metrics = command.workdir / 'metrics.jsonl'
    before = metrics.stat().st_ino if metrics.exists() else None
    process = command.start()
    start = begun(process)
    until(lambda: metrics.exists() and metrics.stat().st_ino != before, process)  # noqa: B023, run at once
    target = start + draw.randint(1, (STEPS - start) // left)
    until(lambda: command.last_step() >= target, process)  # noqa: B023, run at once
    time.sleep(draw.uniform(0, 0.03))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (command.workdir / 'report').exists()
  finishes(command, finished)


def test_a_finished_run_says_so_and_changes_nothing(finished):
  command = finished
  facts = lambda: {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
                   for path in command.workdir.rglob('*')}
  before = facts()
  status, out, err = command.run()
  assert (status, err) == (0, '')
  assert f'finished    {command.workdir}: 60 of 60 steps are done' in out
  assert 'bits per byte' in out
  assert facts() == before


def test_sigterm_saves_says_what_to_do_and_the_run_goes_on(stopped, finished, again):
  command, status, out, err = stopped
  assert status == 75
  assert 'SIGTERM: saving after this step' in out
  step = command.checkpoints()[-1]
  assert err == f'stopped by SIGTERM after step {step} of 60, saved; run the same command to go on\n'
  assert step == command.last_step() >= 20
  out = finishes(again, finished)
  assert f'going on after step {step} of 60' in out


def test_ctrl_c_while_compiling_saves_the_first_step_and_the_run_goes_on(finished, command):
  process = command.start()
  begun(process)
  time.sleep(0.1)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 75, (out, err)
  assert err.count('\n') == 1
  if command.checkpoints():  # else it came before the loop, and there was nothing to save
    assert f'stopped by SIGINT after step {command.checkpoints()[-1]} of 60, saved; run the same' in err
  finishes(command, finished)


def test_ctrl_c_while_data_is_prepared_leaves_nothing(command, tmp_path):
  command.environment = command.environment | {'LMLIB_CACHE': str(tmp_path / 'cache')}
  process = command.start()
  assert process.stdout.readline().startswith('training a tokenizer')
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 75
  assert err == 'stopped before there was anything to save; run the same command again\n'
  assert not command.workdir.exists()
  assert not list((tmp_path / 'cache').iterdir())


def largest(folder):
  return max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_corrupted_checkpoint_is_named_and_set_aside_and_the_older_one_used(finished, again):
  older, newest = again.checkpoints()
  file = largest(again.workdir / 'checkpoints' / str(newest))
  raw = bytearray(file.read_bytes())
  middle = slice(len(raw) // 2, len(raw) // 2 + 16)
  raw[middle] = bytes(255 - byte for byte in raw[middle])
  file.write_bytes(raw)
  out = finishes(again, finished)
  assert f'checkpoint of step {newest} is damaged' in out
  assert f'trying that of step {older}' in out
  assert f'going on after step {older} of 60' in out
  assert (again.workdir / 'checkpoints' / f'{newest}.damaged').is_dir()


def test_a_torn_checkpoint_and_a_torn_line_are_no_hindrance(finished, again):
  older, newest = again.checkpoints()
  file = largest(again.workdir / 'checkpoints' / str(newest))
  file.write_bytes(file.read_bytes()[:100])
  metrics = again.workdir / 'metrics.jsonl'
  metrics.write_bytes(metrics.read_bytes() + b'{"step": 9999, "los')
  out = finishes(again, finished)
  assert f'checkpoint of step {newest} is damaged' in out
  assert f'going on after step {older} of 60' in out


def test_more_steps_go_on_from_a_finished_run(finished, command):
  shutil.copytree(finished.workdir, command.workdir)
  status, out, err = command.run('STEPS = 70')
  assert (status, err) == (0, '')
  assert 'going on after step 60 of 70' in out
  assert [line['step'] for line in command.metrics] == list(range(1, 71))
  assert json.loads((command.workdir / 'report/summary.json').read_text())['steps'] == 70


def test_activations_may_have_another_type_on_the_way(finished, again):
  """Weights are float32 in both, so the first loss of the other type differs by its rounding alone."""
  done = again.last_step()
  status, _, err = again.run("stack.Execution.dtype = 'bfloat16'")
  assert (status, err) == (0, '')
  assert numbers(again.metrics[:done]) == numbers(finished.metrics[:done])
  assert [line['data'] for line in again.metrics] == [line['data'] for line in finished.metrics]
  off = [abs(line['loss'] - other['loss']) for line, other in zip(again.metrics[done:], finished.metrics[done:])]
  assert 0 < off[0] < 0.01
  assert 0 < max(off) < 0.05


def test_devices_layout_microbatches_scan_and_remat_may_change_on_the_way(finished, again):
  again.environment = again.environment | fake_devices(4) | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}  # compiles sooner
  status, out, err = again.run('sharding.Layout.data = 1', 'sharding.Layout.fsdp = 2',
                             'sharding.Layout.tensor = 2', 'pretrain.main.microbatches = 2',
                             'stack.Execution.scan = False', "stack.Execution.remat = 'full'")
  assert status == 0, err  # XLA may warn of an inefficient layout
  assert all(f'{axis} ' in re.search(r'\nsent        a step and device: (.*)', out)[1] for axis in ('fsdp', 'tensor'))
  found, expected = ([line['loss'] for line in lines] for lines in (again.metrics, finished.metrics))
  assert found == pytest.approx(expected, abs=1e-4)  # float32 sums in another order, over 40 steps
