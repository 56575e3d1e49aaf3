"""Training from a state to the last step, through spikes; what pretraining and fine-tuning have in common.

A run is its Course, which says what a step computes, and a folder. After a spike (spikes.py) it goes back to a
checkpoint from before, replays the steps up to it, writes down what the layers did, and goes on without its batch.
"""
from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any
import zlib

import numpy as np
import optax

from lmlib import processes, sharding
from lmlib.data.loader import Loader
from lmlib.kernels import choice
from lmlib.train import goodput, health, layers, loop, memory, metrics
from lmlib.train import step as step_of
from lmlib.train.checkpoint import Checkpoints
from lmlib.train.spikes import Events, Order, Spike, Spikes
from lmlib.train.watch import Watch, Watching, recorded


@dataclasses.dataclass(frozen=True, eq=False)
class Course:
  """What is computed, step after step: enough to do any step again."""
  loss: step_of.Loss
  optimizer: optax.GradientTransformation
  shapes: step_of.State
  batches: Any  # has batch, the rows of one, batch_at(index, rows) and describe(index)
  rate: Callable[[int], float]  # of a step, counted from 0
  microbatches: int = 1
  frozen: tuple = ()  # what a step is given after its batch

  @functools.cached_property
  def place(self):
    return sharding.placer(self.batches.batch)

  @functools.cached_property
  def rows(self):
    return sharding.own_rows(self.batches.batch)

  def part(self, index: int) -> dict[str, np.ndarray]:
    """The rows of a batch that this process is to place."""
    return self.batches.batch_at(index, self.rows)

  def batch(self, index: int):
    """A batch, where the layout in use wants it."""
    return self.place(self.part(index))

  @functools.cached_property
  def program(self):
    """The step, compiled: (state, batch, *frozen) -> (state, metrics), see step.compiled()."""
    step = step_of.compiled(self.loss, self.optimizer, self.microbatches, self.shapes)
    return step.lower(self.shapes, self.batch(0), *self.frozen).compile()

  def step(self, state, batch):
    """(state, metrics) after a step; the memory of the old state is reused."""
    return self.program(state, batch, *self.frozen)

  @functools.cached_property
  def layers(self):
    """layers.compiled() of its step."""
    return layers.compiled(self.loss, self.optimizer, self.microbatches)

  def upto(self, state, number: int, order: Order, seen=lambda number, values: None):
    """The state after step `number`, computed from `state`; seen(number, metrics) gets those of every step."""
    for position in range(int(state.step), number):
      state, values = self.step(state, self.batch(order.index(position)))
      seen(position + 1, values)
    return state


def train(course: Course, state, *, folder: pathlib.Path, steps: int, checkpoints: Checkpoints, save_every: int,
          record: Callable[..., metrics.Record], watch: Watch, evaluate=None, evaluate_every: int | None = None,
          sends: Callable[[str], str] | None = None, say=print):
  """The state after `steps` steps, from `state`; see loop.train, and record(start=) makes its record.

  sends(text of the compiled step) says what its devices send each other, where there are several.
  Raises health.Stopped after saving for a signal; health.RunFault if numbers stay non-finite, or spikes go on when
  Spikes.rollbacks are used up.
  """
  events, ledger, cause = Events(folder), goodput.Ledger(folder), 'lost'
  with health.stopping('stopped at once; run the same command to go on from the last checkpoint'):
    with choice.saying(say):
      program = course.program  # before the first step is timed
    say(f'memory      a device: {memory.said(memory.by_kind(course.shapes, course.frozen, program))}')
    if sends is not None and course.shapes.step.sharding.mesh.size > 1:
      say(f'sent        a step and device: {sends(program.as_text())}')
    if watch.spikes and not processes.told('checkpoints', checkpoints.steps):
      checkpoints.save(int(state.step), state)  # there is always one to go back to
    ledger.add('starting', ledger.now() - ledger.began)
    while True:
      order, sums, start = events.order(), {}, int(state.step)
      beside = lambda step: {'learning_rate': float(course.rate(step)), 'data': sums.pop(step)}  # noqa: B023
      with ledger.during('starting'):
        book = record(start=start)
      ledger.add(cause, goodput.dropped(book.dropped))
      read = functools.partial(_read, course, order, sums)
      try:
        with (Loader(read, start, steps, place=course.place) as loader,
              Watching(watch, course, folder=folder, order=order, record=book, ledger=ledger, say=say) as watching):
          return loop.train(state, course.step, steps=steps, loader=loader, record=book, checkpoints=checkpoints,
                            save_every=save_every, beside=beside, watching=watching, evaluate=evaluate,
                            evaluate_every=evaluate_every, say=say)
      except Spike as spike:
        found, cause = spike, 'rolled back'
      del state  # its memory was given to the steps
      with ledger.during(cause):
        state = back(course, found, watch.spikes, events=events, order=order, checkpoints=checkpoints, say=say)
        if processes.first():
          metrics.truncated(folder / 'evaluations.jsonl', int(state.step))


def back(course: Course, spike: Spike, spikes: Spikes, *, events: Events, order: Order, checkpoints: Checkpoints, say):
  """The state to go on from after a spike; writes down what is left out, and what is known of the step.

  A spike that does not come again when its step is replayed was none of its batch: nothing is left out then.
  """
  if (used := events.rollbacks()) >= spikes.rollbacks:
    raise health.RunFault(f'{spike}; the run has gone back {used} times, and Spikes.rollbacks={spikes.rollbacks} '
                          f'allows no more; {events.folder} tells of each')
  checkpoints.wait()  # for one that is being written
  there = processes.told('checkpoints', checkpoints.steps)
  newest = max((step for step in there if step < spike.first), default=min(there))
  state, begin, _ = checkpoints.restore(course.shapes, newest=newest)
  first, at = max(spike.first, begin + 1), max(spike.step, begin + 1)
  state = course.upto(state, at - 1, order)
  index = order.index(at - 1)
  values, found = map(layers.plain, course.layers(state, course.batch(index), *course.frozen))
  again = spike.again(values)
  left_out = [order.index(position) for position in range(first - 1, spike.last)] if again else []
  checkpoints.forget(begin)
  # Only now: a run that is killed before this line comes here again, and to the same.
  path = events.write({'step': at, 'batch': index, 'why': str(spike), 'left_out': left_out, 'rollback': used + 1,
                       'back_to': begin, 'recorded': recorded(spike.line), 'replayed': values,
                       'documents': course.batches.describe(index), 'layers': found})
  what = f'without the batch{"es" if len(left_out) > 1 else ""} {_spans(left_out)}' if again else (
      f'with all batches, for when it was replayed from there its loss was {values["loss"]:.6g}: is the machine sound?')
  say(f'{spike}; going on from the checkpoint of step {begin} {what} (time {used + 1} of at most {spikes.rollbacks}); '
      f'see {path}')
  if again and first < at:
    state, _, _ = checkpoints.restore(course.shapes, newest=begin)
  return state


def _read(course: Course, order: Order, sums: dict, position: int):
  """The batch of a position of the order; a checksum of its first row, which tells data apart, goes to `sums`."""
  batch = course.part(order.index(position))
  crc = 0
  for name in sorted(batch):
    crc = zlib.crc32(np.ascontiguousarray(batch[name][0]).tobytes(), crc)
  sums[position] = f'{crc:08x}'
  return batch


def _spans(numbers: list[int]) -> str:
  """'7' or '7 to 9': they follow each other, but for what was left out before."""
  return str(numbers[0]) if len(numbers) == 1 else f'{numbers[0]} to {numbers[-1]}'
