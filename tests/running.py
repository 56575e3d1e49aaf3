"""Several real processes of one run on this machine."""
import os
import subprocess
import sys
import time

from lmlib.wire import free_port
from tests.devices import fake_devices


def environment(process: int, processes: int, port: int, devices: int = 1, **more) -> dict:
  """Of process number `process`, which sees so many devices of its own."""
  return {**fake_devices(devices), 'LMLIB_COORDINATOR': f'127.0.0.1:{port}', 'LMLIB_PROCESSES': str(processes),
          'LMLIB_PROCESS': str(process), **more}


def started(commands: list[list[str]], env: dict, *, devices: int = 1, each=lambda process: {}) -> list:
  """A subprocess for every command, in a run of as many; each(process): further variables."""
  port = free_port()
  return [subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env | environment(
      i, len(commands), port, devices) | each(i)) for i, command in enumerate(commands)]


def ended(processes: list, seconds: float = 120) -> list[tuple[int, str, str]]:
  """(status, stdout, stderr) of each; whoever takes longer is killed."""
  deadline, done = time.monotonic() + seconds, []
  for process in processes:
    try:
      out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      process.kill()
      out, err = process.communicate()
      err += '\nkilled by the test: it took too long'
    done.append((process.returncode, out, '\n'.join(
        line for line in err.splitlines())))
  return done


def python(script: str, *words: str) -> list[str]:
  return [sys.executable, '-u', script, *map(os.fspath, words)]
