"""Several real processes of one run on this machine."""
import os
import pathlib
import subprocess
import sys
import time

from lmlib.plan.local import Local
from lmlib.train import metrics
from lmlib.wire import free_port
from tests.processes import tiny

ROOT = pathlib.Path(__file__).parents[2]


class Tiny:
  """`python tests/processes/tiny.py` in several processes, whose programs are those of the tests around."""

  def __init__(self, folder: pathlib.Path):
    self.workdir, self.gin = folder / 'run', folder / 'tiny.gin'
    self.gin.write_text(tiny.GIN.format(workdir=self.workdir))
    ours = {'XLA_FLAGS', 'PJRT_NPROC'}
    self.environment = {name: value for name, value in os.environ.items() if name not in ours} | {
        'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'LMLIB_TIMEOUT': '60'}

  def command(self, *bindings: str) -> list[str]:
    return [sys.executable, '-u', str(ROOT / 'tests/processes/tiny.py'), f'--gin_file={self.gin}',
            *(f'--gin_bindings={binding}' for binding in bindings)]

  def start(self, processes: int, *bindings: str, devices: int = 1, each=lambda process: ()) -> list[subprocess.Popen]:
    """each(process): bindings of one of them."""
    local, port = Local(processes, devices), free_port()
    return [subprocess.Popen(self.command(*bindings, *each(i)), text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env=self.environment | local.environment(i, port))
            for i in range(processes)]

  def run(self, processes: int, *bindings: str, **options) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each."""
    return ended(self.start(processes, *bindings, **options))

  @property
  def losses(self) -> list[float]:
    """The loss of every step, which stand there once and in order."""
    lines = metrics.read(self.workdir / 'metrics.jsonl')
    assert [line['step'] for line in lines] == list(range(1, len(lines) + 1))
    return [line['loss'] for line in lines]

  @property
  def data(self) -> list[str]:
    """A checksum of what every step read."""
    return [line['data'] for line in metrics.read(self.workdir / 'metrics.jsonl')]

  def checkpoints(self) -> list[str]:
    return sorted(path.name for path in (self.workdir / 'checkpoints').iterdir())


def ended(started: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str, str]]:
  """(status, stdout, stderr) of each; whoever takes longer is killed."""
  deadline, done = time.monotonic() + seconds, []
  for process in started:
    try:
      out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      process.kill()
      out, err = process.communicate()
      err += '\nkilled by the test: it took too long'
    done.append((process.returncode, out, err))
  return done
