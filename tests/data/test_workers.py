"""Tasks that are done by other processes."""
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from lmlib.data.workers import Local


def square(x):
  return x * x


def fails(x):
  if x == 7:
    raise ValueError(f'x={x}')
  return x


def dies(x):
  if x == 7:
    os.kill(os.getpid(), signal.SIGKILL)
  return x


def slow(x):
  time.sleep(1000 if x else 0)


def test_every_task_is_done_once_and_faults_come_back():
  with Local(2).started(None) as over:
    assert sorted(over(square, range(20))) == [x * x for x in range(20)]
    assert list(over(square, [])) == []
    assert sorted(over(square, range(3))) == [0, 1, 4]  # by the same processes
    with pytest.raises(ValueError, match='x=7') as error:
      list(over(fails, range(20)))
  assert 'in fails' in error.value.__notes__[0]


def test_a_worker_that_dies_is_an_error_and_no_endless_wait():
  with Local(2).started(None) as over, pytest.raises(RuntimeError, match=r'died with exit code -9; .*fewer processes'):
    list(over(dies, range(20)))


def test_leaving_ends_the_workers_whatever_they_do():
  begin = time.monotonic()
  with Local(2).started(None) as over:
    next(iter(over(slow, range(3))))
  assert time.monotonic() - begin < 300  # the workers sleep for longer


def marks(path):
  path.write_text(str(os.getpid()))
  time.sleep(1000)


PARENT = """
import pathlib, sys
from lmlib.data.workers import Local
from tests.data.test_workers import marks
with Local(2).started(None) as over:
  list(over(marks, [pathlib.Path(path) for path in sys.argv[1:]]))
"""


def alive(pid: int) -> bool:
  """Whether a process runs, not counting one that has ended and that nobody has asked after."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except OSError:
    return False


@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
  files = [tmp_path / 'a', tmp_path / 'b']
  environment = os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parents[2])}
  parent = subprocess.Popen([sys.executable, '-c', PARENT, *map(str, files)], env=environment)
  while not all(path.exists() and path.read_text() for path in files):
    assert parent.poll() is None
    time.sleep(0.01)
  parent.kill()
  parent.wait()
  tries = time.monotonic() + 60
  while any(alive(int(path.read_text())) for path in files):
    assert time.monotonic() < tries, 'workers outlive their parent'
    time.sleep(0.01)


def test_one_process_is_this_one():
  with Local(1).started(None) as over:
    assert list(over(lambda x: x + os.getpid(), [0])) == [os.getpid()]
