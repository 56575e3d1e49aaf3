"""What a run writes down: metrics.jsonl, TensorBoard events and one live line."""
import contextlib
import json
import math
import os
import pathlib
import resource
import statistics
import sys
import time

import jax

from lmlib import processes
from lmlib.terminal import Terminal, clock

BEFORE = 4096  # lines of a record that was begun before which are kept in memory


class Record:
  """One object a step in metrics.jsonl, the same figures for TensorBoard, a line on the screen.

  Opened at step `start` it drops what an interrupted run wrote after that step: every step
  stands in the file once. All methods raise OSError, naming the file, if it cannot be written.
  Of several processes the first one writes.
  """

  def __init__(self, workdir: pathlib.Path, *, start: int, steps: int, flops, peak: float | None,
               live: 'Live'):
    """flops: plan.cost.Flops of a token; peak: FLOP/s of all devices, None if not known."""
    self.path = workdir / 'metrics.jsonl'
    self._steps, self._flops, self._peak, self._live = steps, flops, peak, live
    self._recent: list[float] = []
    # before: the last lines up to `start`; dropped: those of steps that were lost
    self.before, self.dropped = processes.told('metrics.jsonl', lambda: self._open(workdir, start))
    self._seen = self.before[-1]['tokens'] if self.before else 0

  def _open(self, workdir: pathlib.Path, start: int) -> tuple[list[dict], list[dict]]:
    with _naming(self.path):
      kept, dropped = truncated(self.path, start)
      self._file = self.path.open('ab', buffering=0)  # a line is on disk, or it is an error here
    self._board = Board(workdir / 'tensorboard', start)
    return kept[-BEFORE:], dropped

  def write(self, step: int, metrics: dict, *, seconds: float) -> dict:
    """Writes the line of a step, and returns it.

    metrics: host scalars of the step, or texts, with the number of tokens that counted as 'weight'; seconds: how long
    it took. Where a model reads more than counts, 'read' says how many tokens for each; tokens are those read.
    Of an array, such as the load of every layer's experts, the line has the mean over all but its last axis, and
    the smallest and the largest entry as name_min and name_max.
    """
    tokens, metrics = metrics['weight'] * metrics.get('read', 1), flattened(metrics)
    self._seen += tokens
    line = {'step': step, **{name: value for name, value in metrics.items() if name not in ('weight', 'read')},
            'tokens': round(self._seen), 'tokens_per_second': tokens / seconds, 'seconds': seconds,
            'memory_bytes': peak_memory()}
    if self._peak:
      line['mfu'] = self._flops.exact * tokens / seconds / self._peak
      line['mfu_6nd'] = self._flops.six_nd * tokens / seconds / self._peak
    if not processes.first():
      return line
    # JSON knows no NaN: what was not finite is null.
    text = json.dumps(finite(line)) + '\n'
    with _naming(self.path):
      rest = text.encode()
      while rest:  # a disk that fills up takes a part before it refuses
        rest = rest[self._file.write(rest):]
    self._board.write(step, line)
    self._recent = [*self._recent[-49:], seconds]
    self._live.show(step, self._steps, line, statistics.median(self._recent) * (self._steps - step))
    return line

  def evaluated(self, step: int, scores: dict[str, float]):
    """Scores of evaluations after a step, for TensorBoard; they keep a file of their own."""
    if processes.first():
      self._board.write(step, finite(scores))

  def flush(self):
    """Everything written so far survives a loss of power."""
    if not processes.first():
      return
    self._board.flush()
    with _naming(self.path):
      os.fsync(self._file.fileno())

  def close(self):
    self._live.end()
    if processes.first():
      self._file.close()
      self._board.close()


class Board:
  """Scalars for TensorBoard. Without tensorboardX's SummaryWriter, whose thread would die of a full disk
  and leave the run waiting for it."""

  def __init__(self, folder: pathlib.Path, start: int):
    """What an earlier file in the folder says of steps after `start` is no longer shown."""
    # Here, because it loads torch where that is installed.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    self._folder = folder
    with _naming(folder):
      folder.mkdir(exist_ok=True)
      # A name of its own also for a run that is resumed within the same second.
      self._events = EventsWriter(str(folder / 'events'), f'.{start}.{os.getpid()}')
      if start:
        self._events.write_event(Event(wall_time=time.time(), step=start + 1,
                                       session_log=SessionLog(status=SessionLog.START)))

  def write(self, step: int, scalars: dict):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    values = [Summary.Value(tag=name, simple_value=value)
              for name, value in scalars.items() if name != 'step' and isinstance(value, (int, float))]
    with _naming(self._folder):
      self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

  def flush(self):
    with _naming(self._folder):
      self._events.flush()

  def close(self):
    with _naming(self._folder):
      self._events.close()


class Live(Terminal):
  """One line, rewritten on a terminal, else now and then a new one: step, loss, tokens/s, MFU, time left."""

  def __init__(self, out=None, *, every: int = 20):
    """every: without a terminal, a line each so many steps."""
    super().__init__(out)
    self._every = every

  def show(self, step: int, steps: int, line: dict, left: float):
    if not self._out.isatty() and step % self._every and step not in (1, steps):
      return
    mfu = f'  {utilisation(line["mfu"])}' if 'mfu' in line else ''
    self.line(f'step {step}/{steps}  loss {line["loss"]:.4f}  {line["tokens_per_second"]:,.0f} tokens/s{mfu}'
              f'  {clock(left)} left')


def utilisation(mfu: float, digits: int = 1) -> str:
  """'MFU 26.2%'. More than all is no share: then the peak is too low, as one measured beside other programs is."""
  return f'MFU {mfu:.{digits}%}' if mfu <= 1 else 'MFU unknown (faster than the peak that was taken)'


def flattened(metrics: dict) -> dict:
  """Metrics with arrays as lists and their extremes."""
  lines = {}
  for name, value in metrics.items():
    if not getattr(value, 'ndim', 0):
      lines[name] = value
    else:
      mean_E = value.reshape(-1, value.shape[-1]).mean(0)
      lines |= {name: [round(float(x), 4) for x in mean_E], f'{name}_min': float(value.min()),
                f'{name}_max': float(value.max())}
  return lines


def finite(value):
  """A number or None, or a text; the same of what lists and dictionaries hold."""
  if isinstance(value, dict):
    return {name: finite(x) for name, x in value.items()}
  if isinstance(value, list):
    return [finite(x) for x in value]
  return value if value is None or isinstance(value, str) or math.isfinite(value) else None


def peak_memory() -> int:
  """The most bytes in use so far: on the first device, or by this process if that is a CPU."""
  stats = jax.local_devices()[0].memory_stats() or {}
  unit = 1 if sys.platform == 'darwin' else 1024
  return stats.get('peak_bytes_in_use') or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read(path: pathlib.Path) -> list[dict]:
  """The lines of a metrics.jsonl, up to one that a kill or a loss of power has cut off."""
  lines = []
  if path.exists():
    for line in path.read_bytes().splitlines(keepends=True):
      try:
        lines.append(json.loads(line))
      except ValueError:
        break
      if not line.endswith(b'\n'):
        return lines[:-1]
  return lines


def append(path: pathlib.Path, line: dict):
  """Adds a line to a file that read() reads, behind its last whole one. OSError, naming the file, if it cannot."""
  kept = read(path)
  with _naming(path):
    if path.exists():
      os.truncate(path, sum(len(whole) for whole in path.read_bytes().splitlines(keepends=True)[:len(kept)]))
    with path.open('ab') as file:
      file.write(json.dumps(finite(line)).encode() + b'\n')


def truncated(path: pathlib.Path, step: int) -> tuple[list[dict], list[dict]]:
  """Drops the lines of a file that are of steps after `step`; returns (the others, those dropped)."""
  if not path.exists():
    return [], []
  lines = read(path)
  kept, dropped = ([line for line in lines if (line['step'] > step) == late] for late in (False, True))
  fresh = path.with_suffix('.tmp')
  fresh.write_text(''.join(json.dumps(line) + '\n' for line in kept))
  os.replace(fresh, path)
  return kept, dropped


@contextlib.contextmanager
def _naming(path: pathlib.Path):
  """Errors of the disk that say of which file."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(path)) from None
