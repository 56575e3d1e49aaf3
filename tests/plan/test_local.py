"""Several processes on this machine: started, watched, started again, and none left over."""
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lmlib.plan import local
from lmlib.plan.local import Local
from tests.test_imports import ROOT

LAUNCH = ('import json, sys\nfrom lmlib.plan.local import Local\n'
          'sys.exit(Local(**json.loads(sys.argv[1])).run(json.loads(sys.argv[2])))')
# Notes who it is in the folder argv[1], then does argv[2].
CHILD = '''
import os, pathlib, signal, sys, time
me, folder = os.environ['LMLIB_PROCESS'], pathlib.Path(sys.argv[1])
tries = len(list(folder.glob(f'{me}.*')))
(folder / f'{me}.{tries}').write_text(f'{os.getpid()} {os.environ["LMLIB_COORDINATOR"]}')
def stop(*_):
  sys.exit(75)
def end_with(status):
  print(f'reason {status}', file=sys.stderr)
  sys.exit(status)
'''


@pytest.fixture
def start(tmp_path):
  """A launcher of processes that do `what`, in a process of its own."""
  def starting(what: str, **settings) -> subprocess.Popen:
    command = [sys.executable, '-c', CHILD + what, str(tmp_path)]
    return subprocess.Popen([sys.executable, '-c', LAUNCH, json.dumps({'wait': 0.01} | settings), json.dumps(command)],
                            text=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  return starting


def run(launcher) -> tuple[int, str, list[str]]:
  out, err = launcher.communicate(timeout=60)
  return launcher.returncode, out, err.splitlines()


def pids(folder) -> list[int]:
  return [int(path.read_text().split()[0]) for path in folder.iterdir() if path.read_text()]


def alive(pid: int) -> bool:
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def until(fact):
  end = time.monotonic() + 30
  while not fact():
    assert time.monotonic() < end
    time.sleep(0.02)


def test_process_0_is_heard_and_the_others_only_when_they_complain(start, tmp_path):
  status, out, err = run(start("print(f'out {me}', flush=True); print(f'err {me}', file=sys.stderr)", processes=3))
  assert (status, out) == (0, 'out 0\n')
  assert sorted(err) == ['[1] err 1', '[2] err 2', 'err 0']
  assert len({path.read_text().split()[1] for path in tmp_path.iterdir()}) == 1


def test_all_start_again_when_one_dies_at_another_port(start, tmp_path):
  status, out, err = run(start(
      "time.sleep(0.2)\nif me == '1' and tries < 2: os.kill(os.getpid(), 9)\nif tries < 2: sys.exit(1)", restarts=5))
  assert (status, err) == (0, [])
  assert [line.split(';')[0] for line in out.splitlines()] == ['launch      process 1 was ended by SIGKILL'] * 2
  assert sorted(path.name for path in tmp_path.iterdir()) == ['0.0', '0.1', '0.2', '1.0', '1.1', '1.2']
  assert len({path.read_text().split()[1] for path in tmp_path.iterdir()}) == 3


def test_it_gives_up_with_the_reason_last(start, tmp_path):
  status, out, err = run(start("end_with(1) if me == '0' else sys.exit(1)", restarts=2))
  assert (status, out.count('all start again'), err.count('reason 1')) == (1, 2, 3)
  assert err[-1] == 'reason 1; given up after 2 restarts'


def test_it_waits_longer_each_time_until_a_run_has_lived(monkeypatch):
  lives, now, said = [1, 1, 19, 21, 1, 1, 1, 1, 1, 1, 1], [0.0], []

  class Group:

    def __init__(self, commands):
      pass

    def ended(self, asked):
      now[0] += lives.pop(0)
      return 1, 'it died'

  monkeypatch.setattr(local, '_Group', Group)
  monkeypatch.setattr(local, 'time', SimpleNamespace(
      monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)))
  assert Local(2, restarts=10).run([], say=said.append) == 1
  waits = [float(line.split('again in ')[1].split(' s')[0]) for line in said]
  assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
  lives[:], said[:] = [1, 1, 21, 1, 1], []
  Local(2, restarts=4).run([], say=said.append)
  assert [line.split('again in ')[1].split(' s')[0] for line in said] == ['1', '2', '1', '2']


@pytest.mark.parametrize('final', [2, 75])
def test_some_statuses_are_not_tried_again(start, tmp_path, final):
  status, out, err = run(start(f"end_with({final}) if me == '0' else sys.exit({final})"))
  assert (status, out, err) == (final, '', [f'reason {final}'])


def test_who_does_not_end_with_the_others_is_ended(start, tmp_path, monkeypatch):
  monkeypatch.setattr(local, 'PATIENCE', 0.5)
  command = [sys.executable, '-c', CHILD + "signal.pause() if me == '1' else sys.exit(2)", str(tmp_path)]
  assert Local(2).run(command) == 2
  assert not any(map(alive, pids(tmp_path)))


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_a_signal_goes_to_all_and_the_status_is_that_of_a_stop(start, tmp_path, name):
  launcher = start('signal.signal(signal.SIGTERM, stop)\n(folder / f"ready{me}").write_text("")\nsignal.pause()')
  until(lambda: len(list(tmp_path.glob('ready*'))) == 2)
  launcher.send_signal(getattr(signal, name))
  assert run(launcher) == (75, '', [])
  assert not any(map(alive, pids(tmp_path)))


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells a child that its parent has died')
def test_nobody_outlives_a_launcher_that_is_killed(start, tmp_path):
  launcher = start('(folder / f"ready{me}").write_text("")\nsignal.pause()')
  until(lambda: len(list(tmp_path.glob('ready*'))) == 2)
  os.kill(launcher.pid, signal.SIGKILL)
  until(lambda: not any(map(alive, pids(tmp_path))))
  launcher.communicate()


@pytest.mark.parametrize('wrong', [{'processes': 0}, {'devices': 0}, {'restarts': -1}, {'wait': -1.0}])
def test_numbers_that_cannot_be_are_named(wrong):
  (name, value), = wrong.items()
  with pytest.raises(ValueError, match=f'Local.{name}={value}'):
    Local(**wrong)
