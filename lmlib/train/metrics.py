"""What a run writes down: metrics.jsonl, TensorBoard events and one live line."""
import json
import math
import os
import pathlib
import resource
import statistics
import sys

import jax
from tensorboardX import SummaryWriter


class Record:
  """One object a step in metrics.jsonl, the same figures for TensorBoard, a line on the screen.

  Opened at step `start` it drops what an interrupted run wrote after that step: every step
  stands in the file once.
  """

  def __init__(self, workdir: pathlib.Path, *, start: int, steps: int, flops, peak: float | None, live: 'Live'):
    """flops: plan.cost.Flops of a token; peak: FLOP/s of all devices, None if not known."""
    self.path = workdir / 'metrics.jsonl'
    self._steps, self._flops, self._peak, self._live = steps, flops, peak, live
    self._seen = _truncate(self.path, start)
    self._file = self.path.open('a')
    self._board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=start + 1 if start else None)
    self._recent: list[float] = []

  def write(self, step: int, metrics: dict, *, seconds: float):
    """metrics: host scalars of the step, with its number of tokens as 'weight'; seconds: how long it took."""
    tokens = metrics.pop('weight')
    self._seen += tokens
    line = {'step': step, **metrics, 'tokens': round(self._seen), 'tokens_per_second': tokens / seconds,
            'seconds': seconds, 'memory_bytes': peak_memory()}
    if self._peak:
      line['mfu'] = self._flops.exact * tokens / seconds / self._peak
      line['mfu_6nd'] = self._flops.six_nd * tokens / seconds / self._peak
    # JSON knows no NaN: what was not finite is null.
    self._file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in line.items()}) + '\n')
    self._file.flush()
    for name, value in line.items():
      if name != 'step':
        self._board.add_scalar(name, value, step)
    self._recent = [*self._recent[-49:], seconds]
    self._live.show(step, self._steps, line, statistics.median(self._recent) * (self._steps - step))

  def flush(self):
    """Everything written so far survives a loss of power."""
    self._board.flush()
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self):
    self._live.end()
    self._file.close()
    self._board.close()


class Live:
  """step of steps, loss, tokens/s, MFU, time left: one line rewritten on a terminal, else now and then a line."""

  def __init__(self, out=None, *, every: int = 20):
    """every: without a terminal, a line each so many steps."""
    self._out, self._every, self._open = out or sys.stdout, every, False

  def show(self, step: int, steps: int, line: dict, left: float):
    terminal = self._out.isatty()
    if not terminal and step % self._every and step not in (1, steps):
      return
    mfu = f'  MFU {line["mfu"]:.1%}' if 'mfu' in line else ''
    text = (f'step {step}/{steps}  loss {line["loss"]:.4f}  {line["tokens_per_second"]:,.0f} tokens/s{mfu}'
            f'  {clock(left)} left')
    self._out.write(f'\r{text}\x1b[K' if terminal else f'{text}\n')
    self._out.flush()
    self._open = terminal

  def say(self, text: str):
    """Prints a line of its own, above the live one."""
    self.end()
    self._out.write(text + '\n')
    self._out.flush()

  def end(self):
    if self._open:
      self._out.write('\n')
    self._open = False


def clock(seconds: float) -> str:
  """12 -> '0:12', 3725 -> '1:02:05'."""
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  return f'{hours}:{minute:02}:{second:02}' if hours else f'{minute}:{second:02}'


def peak_memory() -> int:
  """The most bytes in use so far: on the first device, or by this process if that is a CPU."""
  stats = jax.local_devices()[0].memory_stats() or {}
  unit = 1 if sys.platform == 'darwin' else 1024
  return stats.get('peak_bytes_in_use') or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read(path: pathlib.Path) -> list[dict]:
  """The lines of a metrics.jsonl; a last line that a kill cut off is left out."""
  if not path.exists():
    return []
  lines = path.read_text().split('\n')
  return [json.loads(line) for line in lines[:-1] if line]


def _truncate(path: pathlib.Path, step: int) -> int:
  """Drops the lines after `step`; returns the tokens seen until then."""
  kept = [line for line in read(path) if line['step'] <= step]
  fresh = path.with_suffix('.tmp')
  fresh.write_text(''.join(json.dumps(line) + '\n' for line in kept))
  os.replace(fresh, path)
  return kept[-1]['tokens'] if kept else 0
