"""A step of a finished run is done once more in another process, bit for bit."""
import shutil
import subprocess
import sys

from tests.experiments.conftest import ROOT


def replay(command, step: int, *bindings: str) -> tuple[int, str, str]:
  given = [f'WORKDIR = "{command.workdir}"', f'STEP = {step}', *bindings]
  done = subprocess.run([sys.executable, str(ROOT / 'experiments/replay.py'), '--gin_file=replay.gin',
                         *(f'--gin_bindings={binding}' for binding in given)], capture_output=True, text=True,
                        env=command.environment, timeout=300)
  return done.returncode, done.stdout, done.stderr


def test_a_step_of_a_finished_run_is_the_same_bit_for_bit_or_the_difference_ends_it(finished, command):
  status, out, err = replay(finished, 59)
  assert (status, err) == (0, '')
  assert 'step 59, with batch 58, after the checkpoint of step 56' in out
  assert '3 steps were compared with metrics.jsonl: the same bit for bit' in out
  assert all(name in out for name in ('blocks_0', 'embed', 'update/weights', '.txt: tokens '))
  shutil.copytree(finished.workdir, command.workdir)
  path = command.workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines()
  lines[57] = lines[57].replace('"loss": ', '"loss": 1')
  path.write_text('\n'.join(lines) + '\n')
  status, out, err = replay(command, 59)
  assert status == 1
  assert err.startswith('not the numbers recorded: step 58: loss ')
  assert err.count('\n') == 1


def test_a_step_that_cannot_be_replayed_is_named(finished):
  status, _, err = replay(finished, 3)
  assert (status, err.count('\n')) == (2, 1)
  assert 'no usable checkpoint of step 2 or before' in err
  assert 'the oldest is of step 56' in err
  status, _, err = replay(finished, 61)
  assert (status, err) == (2, "STEP=61 must lie between 1 and the run's steps=60\n")
