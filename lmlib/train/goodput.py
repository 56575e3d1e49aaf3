"""Where the time of a run went, over all its sessions: goodput is the share that went into steps which count.

WORKDIR/time.jsonl has a line for each stretch of time that no step of metrics.jsonl tells of: at (when it ended, Unix
time), cause, seconds. What a session did last is the later of its last line there and of metrics.jsonl.
"""
from collections import Counter
from collections.abc import Callable
import contextlib
import json
import pathlib
import time

from lmlib import processes
from lmlib.train import metrics

CAUSES = {
    'steps': 'steps that count', 'starting': 'start-up and compilation', 'data': 'waiting for data',
    'saving': 'checkpoints', 'evaluating': 'evaluation', 'lost': 'steps that were lost and done again',
    'rolled back': 'going back after spikes', 'idle': 'between sessions', 'other': 'anything else'}


class Ledger:
  """The time.jsonl of a WORKDIR; of several processes the first one writes it."""

  def __init__(self, workdir: pathlib.Path, *, now: Callable[[], float] = time.time):
    self._workdir, self._path, self.now = workdir, workdir / 'time.jsonl', now
    self.spent = Counter()  # seconds of this session by cause, those of steps included
    self.began = next((line['at'] for line in reversed(metrics.read(self._path)) if line['cause'] == 'begun'), now())

  def begin(self, since: float):
    """A session has begun at `since`; the time since the one before was idle."""
    self.began = since
    if not processes.first():
      return
    lines = metrics.read(self._path)
    if lines:
      steps = self._workdir / 'metrics.jsonl'
      last = max([lines[-1]['at'], *([steps.stat().st_mtime] if steps.exists() else [])])
      metrics.append(self._path, {'at': since, 'cause': 'idle', 'seconds': max(0.0, since - last)})
    metrics.append(self._path, {'at': since, 'cause': 'begun', 'seconds': 0.0})

  def add(self, cause: str, seconds: float):
    """Time that went by until now."""
    assert cause in CAUSES, cause
    self.spent[cause] += seconds
    if not processes.first():
      return
    with self._path.open('a') as file:
      file.write(json.dumps({'at': self.now(), 'cause': cause, 'seconds': seconds}) + '\n')

  @contextlib.contextmanager
  def during(self, cause: str):
    """Adds the time inside."""
    start = self.now()
    try:
      yield
    finally:
      self.add(cause, self.now() - start)

  def stepped(self, line: dict):
    """A step of this session, as metrics.jsonl has it."""
    self.spent.update(_of_step(line))

  def share(self) -> float:
    """The goodput of this session so far."""
    return self.spent['steps'] / max(self.now() - self.began, 1e-9)


def of(workdir: pathlib.Path, *, now: float | None = None) -> dict[str, float]:
  """Seconds by cause, of CAUSES, over the life of a run up to now; they add up to all of it.

  What came after the last thing noted is evaluation: the run is over, and being scored.
  """
  entries, spent = metrics.read(workdir / 'time.jsonl'), Counter()
  if not entries:
    return {}
  now = time.time() if now is None else now
  for line in metrics.read(workdir / 'metrics.jsonl'):
    spent.update(_of_step(line))
  for entry in entries:
    spent[entry['cause']] += entry['seconds']
  spent['evaluating'] += now - entries[-1]['at']
  started = next(entry['at'] for entry in entries if entry['cause'] == 'begun')
  spent['other'] = max(0.0, now - started - sum(spent.values()))
  return {cause: spent[cause] for cause in CAUSES}


def dropped(lines: list[dict]) -> float:
  """Seconds of steps whose lines were dropped, without those that time.jsonl has already."""
  return sum(line['seconds'] - line['saving'] for line in lines)


def said(seconds: dict[str, float]) -> str:
  """'82.1% of 1:02:33 in steps that count; 9.0% start-up and compilation, ...', the largest first."""
  total = sum(seconds.values()) or 1.0
  rest = sorted(((value, cause) for cause, value in seconds.items() if cause != 'steps'), reverse=True)
  named = ', '.join(f'{value / total:.1%} {CAUSES[cause]}' for value, cause in rest if value >= 0.0005 * total)
  return f'{seconds["steps"] / total:.1%} of {metrics.clock(total)} in steps that count' + (named and f'; {named}')


def _of_step(line: dict) -> dict[str, float]:
  cause = 'steps' if line['finite'] else 'lost'
  return {cause: line['seconds'] - line['waited'] - line['saving'], 'data': line['waited']}
