"""Steps whose loss leaps or whose numbers are not finite: how they are told, what is kept of them, what is left out.

After PaLM (Chowdhery et al. 2022, section 5.1), which went back to a checkpoint from before a spike and skipped the
batches around it. A batch is named by its index, as in batch_at(index). What was decided is a file for each event in
WORKDIR/spikes, so the batch of a step is a function of the seed, the step and these files, whenever a run goes on.

A step that is not finite changes no weight (step.py): its batch is left out where it stands, at no cost. Only several
in a row are a spike, or without Spikes the end of the run.
"""
from collections import deque
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import json
import os
import pathlib

import numpy as np

from lmlib import processes
from lmlib.train import metrics
from lmlib.train.health import RunFault

IN_A_ROW = 10  # non-finite steps in a row that are a spike, or stop the run
SHOWN = 8  # rows of a batch that a message names
LEAST = 0.01  # of the mean: values that hardly move deviate by this much


@dataclasses.dataclass(frozen=True)
class Spikes:
  """When a step is a spike, and how much is left out then.

  A spike is a step whose loss lies more than `loss` deviations over the mean of the `window` steps before it, or the
  norm of whose gradient lies `gradient` over its own (None: that number is not looked at). Its batch and the
  `batches` - 1 before are left out. At most `rollbacks` times in the life of a run.
  """
  loss: float | None = 6.0
  gradient: float | None = None
  window: int = 128
  batches: int = 1
  rollbacks: int = 8

  def __post_init__(self):
    for name in ('window', 'batches', 'rollbacks'):
      if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
        raise ValueError(f'Spikes.{name}={getattr(self, name)!r} must be a positive integer')
    if not 2 <= self.window <= metrics.BEFORE:
      raise ValueError(f'Spikes.window={self.window} must lie between 2 and {metrics.BEFORE}')
    for name, value in self.limits:
      if value <= 0:
        raise ValueError(f'Spikes.{"loss" if name == "loss" else "gradient"}={value} must be positive, or None')
    if not self.limits:
      raise ValueError('Spikes.loss=None and Spikes.gradient=None: nothing is looked at; leave out Spikes')

  @property
  def limits(self) -> tuple:
    """(name in metrics.jsonl, deviations) of each number that is looked at."""
    both = ('loss', self.loss), ('grad_norm', self.gradient)
    return tuple((name, value) for name, value in both if value is not None)


class Spike(Exception):  # noqa: N818, not an error: the run goes back and on
  """A step from which a run is to go back. Steps first to last are those whose batches are to be left out."""

  def __init__(self, why: str, *, step: int, first: int, last: int, limit: tuple[str, float] | None, line: dict):
    """step: the one to look at; limit: the number that was too large, and what it may be at most; line: of `step`."""
    super().__init__(why)
    self.step, self.first, self.last, self.limit, self.line = step, first, last, limit, line

  def again(self, values: dict) -> bool:
    """Whether a step with these metrics would be a spike as well."""
    if not values['finite'] or self.limit is None:
      return not values['finite']
    name, most = self.limit
    return not values[name] <= most


class Numbers:
  """Sees the numbers of every step, in order. Raises Spike, or RunFault where there are no Spikes to go by."""

  def __init__(self, spikes: Spikes | None, before: Sequence[dict], *, describe: Callable[[int], list[str]],
               say=print):
    """before: the last lines of metrics.jsonl up to now; describe(step) names what its batch held."""
    self._spikes, self._describe, self._say = spikes, describe, say
    self._row = []  # the lines of non-finite steps, one after the other, up to now
    self._seen = deque(maxlen=spikes.window if spikes else 1)
    for line in before:
      self._row = [] if line['finite'] else [*self._row, line]
      if line['finite']:
        self._seen.append(line)

  def see(self, line: dict, note: Callable[[str], None]):
    """line: the step's, with step, loss, grad_norm and finite; note(why) keeps what is known of one not finite."""
    step = line['step']
    if not line['finite']:
      self._row.append(line)
      self._say(f'step {step}: loss or gradient not finite, step skipped ({len(self._row)} in a row)')
      note('loss or gradient not finite')
      if len(self._row) >= IN_A_ROW:
        raise self._stuck()
      return
    self._row = []
    for name, deviations in self._spikes.limits if self._spikes else ():
      self._compare(line, name, deviations)
    self._seen.append(line)

  def _compare(self, line: dict, name: str, deviations: float):
    if len(self._seen) < self._spikes.window:
      return
    values = np.array([seen[name] for seen in self._seen])
    mean, deviation = float(values.mean()), max(float(values.std()), LEAST * abs(float(values.mean())))
    most = mean + deviations * deviation
    if not line[name] <= most:
      step = line['step']
      raise Spike(f'step {step}: {name} {line[name]:.6g} is over {mean:.6g} + {deviations:g} x {deviation:.3g}, its '
                  f'mean and deviation over {self._spikes.window} steps', step=step, line=line, limit=(name, most),
                  first=max(1, step - self._spikes.batches + 1), last=step)

  def _stuck(self) -> Exception:
    first, last = self._row[0]['step'], self._row[-1]['step']
    why = f'{len(self._row)} steps in a row, {first} to {last}, had a loss or gradient that was not finite'
    if self._spikes:
      return Spike(why, step=first, first=first, last=last, limit=None, line=self._row[0])
    rows = self._describe(last)
    shown = '; '.join(rows[:SHOWN]) + (f'; and {len(rows) - SHOWN} rows more' if len(rows) > SHOWN else '')
    return RunFault(f'{why}; the batch of step {last} was: {shown}')


@dataclasses.dataclass(frozen=True)
class Order:
  """Which batch each step reads: all of them in turn, but for those left out."""
  left_out: tuple[int, ...] = ()  # indices of batches, ascending

  def index(self, position: int) -> int:
    """The index of the batch at a position of the order, both from 0: step k reads that at position k - 1."""
    for left in self.left_out:
      if left > position:
        break
      position += 1
    return position

  def without(self, indices: Iterable[int]) -> 'Order':
    return Order(tuple(sorted({*self.left_out, *indices})))


class Events:
  """The folder WORKDIR/spikes, with a file for each step that was not as it should be: <step>_<index of its batch>.json
  where the run went back, <step>_<index>_skipped.json where it went on."""

  def __init__(self, workdir: pathlib.Path):
    self.folder = workdir / 'spikes'

  def read(self) -> list[dict]:
    """All of them, by step. ValueError for a file that is none."""
    found = []
    for path in self.folder.glob('*.json'):
      try:
        found.append(json.loads(path.read_text()))
        if not {'step', 'batch', 'left_out', 'rollback'} <= found[-1].keys():
          raise ValueError('an event has more')
      except (ValueError, AttributeError) as error:
        raise ValueError(f'{path} is damaged, and says which batches the run leaves out; restore it, or give another '
                         'WORKDIR') from error
    return sorted(found, key=lambda event: (event['step'], event['batch']))

  def order(self) -> Order:
    """The order of batches, by what was decided so far."""
    return Order().without(processes.told('left out', lambda: [
        index for event in self.read() for index in event['left_out']]))

  def rollbacks(self) -> int:
    """How often the run has gone back."""
    return processes.told('rollbacks', lambda: max((event['rollback'] or 0 for event in self.read()), default=0))

  def write(self, event: dict) -> pathlib.Path:
    """event: step, batch (its index), why, left_out, rollback (its number; None where the run went on) and more.

    Of several processes the first one writes.
    """
    skipped = '_skipped' if event['rollback'] is None else ''
    path = self.folder / f'{event["step"]}_{event["batch"]}{skipped}.json'
    if not processes.first():
      return path
    self.folder.mkdir(exist_ok=True)
    fresh = path.with_suffix('.tmp')
    with fresh.open('w') as file:
      file.write(json.dumps(metrics.finite(event), indent=1) + '\n')
      file.flush()
      os.fsync(file.fileno())
    os.replace(fresh, path)
    return path

