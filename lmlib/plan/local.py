"""Several processes of one run on this machine: started, watched, and started again when one of them dies."""
from collections.abc import Callable
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

from lmlib import processes, wire
from lmlib.plan import fake_devices
from lmlib.train import health

PATIENCE = 30.0  # seconds in which the others end by themselves once one has
LONGEST = 60.0  # seconds to wait before a restart, at most
LIVES = 10  # times as long as the wait before it a run must live for the next wait to be short again
# What a process does first on Linux, so that it saves and ends when the launcher, argv[1], is killed: PR_SET_PDEATHSIG
# is 1 in prctl.h. A program of its own, since threads, such as jax's, allow no Python between fork and exec.
DIES_WITH_IT = '''
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
  os._exit(75)
os.execv(sys.argv[2], sys.argv[2:])
'''
FINAL = (0, 2, 75)  # statuses after which the same command would do the same, or is not to run now


@dataclasses.dataclass(frozen=True)
class Local:
  """A run in `processes` processes of this machine, which go on together after a fault of one, `restarts` times.

  devices: of a CPU, that each process sees; None leaves it to jax. wait: seconds before a restart, and twice as long
  each time that the run then ends within LIVES times as many. A restart goes on from the last checkpoint.
  """
  processes: int = 2
  devices: int | None = None
  restarts: int = 10
  wait: float = 1.0

  def __post_init__(self):
    for name, least in (('processes', 1), ('devices', 1), ('restarts', 0)):
      value = getattr(self, name)
      if not (isinstance(value, int) and value >= least) and not (name == 'devices' and value is None):
        raise ValueError(f'Local.{name}={value!r} must be a number from {least} on')
    if self.wait < 0:
      raise ValueError(f'Local.wait={self.wait} must not be negative')

  def environment(self, process: int, port: int) -> dict[str, str]:
    """What process number `process` has in its environment besides that of this one."""
    devices = {} if self.devices is None else {'JAX_PLATFORMS': 'cpu', **fake_devices.environment(self.devices)}
    return devices | dict(zip(processes.NAMES, (f'127.0.0.1:{port}', str(self.processes), str(process))))

  def run(self, command: list[str], *, say: Callable[[str], None] = print) -> int:
    """Runs the command until it is done; returns its exit status, 1 if it failed more often than `restarts`.

    SIGTERM and Ctrl-C are passed on as SIGTERM: all save, and the status is 75. Nobody outlives this process.
    """
    with _Signals() as asked:
      pause = self.wait / 2
      for tried in range(self.restarts + 1):
        begun = time.monotonic()
        group = _Group([(command, self.environment(i, port)) for port in [wire.free_port()]
                        for i in range(self.processes)])
        status, why = group.ended(asked)
        if status in FINAL or asked.received is not None:
          return status
        if tried < self.restarts:
          pause = self.wait if time.monotonic() - begun > LIVES * pause else min(2 * pause, LONGEST)
          say(f'launch      {why}; all start again in {pause:.3g} s ({tried + 1} of at most {self.restarts} times)')
          if asked.within(pause):
            return 75
      print(f'{why}; given up after {self.restarts} restarts', file=sys.stderr)
      return 1


class _Signals(health.Signals):
  """Notes SIGTERM and Ctrl-C, however many come, and hands each on to `group` as SIGTERM."""
  group: '_Group | None' = None

  def _on(self, number, frame):
    self.received = signal.Signals(number).name
    if self.group is not None:
      self.group.send(signal.SIGTERM)

  def within(self, seconds: float) -> bool:
    """Whether one came, waiting for it so long."""
    end = time.monotonic() + seconds
    while self.received is None and time.monotonic() < end:
      time.sleep(0.05)
    return self.received is not None


class _Group:
  """Processes that end together. What process 0 prints comes through; errors of others have their number in front."""

  def __init__(self, commands: list[tuple[list[str], dict]]):
    self._last, self._lock, self._threads = {}, threading.Lock(), []
    self._children = []
    for number, (command, environment) in enumerate(commands):
      if sys.platform == 'linux':
        command = [sys.executable, '-c', DIES_WITH_IT, str(os.getpid()), *command]
      child = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True,
                               errors='replace', stdout=None if number == 0 else subprocess.DEVNULL,
                               stdin=subprocess.DEVNULL, start_new_session=True)
      self._children.append(child)
      self._threads.append(threading.Thread(target=self._pass_on, args=[number, child.stderr], daemon=True))
      self._threads[-1].start()

  def ended(self, asked: _Signals) -> tuple[int, str]:
    """(status, why) once all have ended: of the first one that did not end well; 2 and 75 of anyone stand for all."""
    asked.group, found, deadline = self, {}, None
    if asked.received is not None:
      self.send(signal.SIGTERM)
    while len(found) < len(self._children):
      for number, child in enumerate(self._children):
        if number not in found and (status := child.poll()) is not None:
          found[number] = status
      if deadline is None and any(found.values()):
        deadline = time.monotonic() + PATIENCE
      if deadline is not None and time.monotonic() > deadline:
        self.send(signal.SIGKILL)
      time.sleep(0.05)
    for thread in self._threads:
      thread.join(5)
    asked.group = None
    # Who was not ready to save yet is ended by the signal itself.
    found = {number: 75 if asked.received and status == -signal.SIGTERM else status for number, status in found.items()}
    bad = {number: status for number, status in found.items() if status}
    if not bad:
      return 0, ''
    status = next((status for status in bad.values() if status in FINAL), 1)
    killed = [number for number, status in bad.items() if status < 0]
    first = killed[0] if killed else next(iter(bad))
    why = (f'process {first} was ended by {signal.Signals(-bad[first]).name}' if killed else
           self._last.get(0) or self._last.get(first) or f'process {first} ended with status {bad[first]}')
    return status, why

  def send(self, number: int):
    for child in self._children:
      if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          child.send_signal(number)

  def _pass_on(self, number: int, stream):
    with stream:
      for line in stream:
        with self._lock:
          self._last[number] = line.rstrip('\n')
          sys.stderr.write(line if number == 0 else f'[{number}] {line}')
          sys.stderr.flush()
