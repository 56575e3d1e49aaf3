"""The one loop: every method differs only in its loss and its batches."""
import contextlib
import time

from lmlib import processes, sharding
from lmlib.nn import pipeline
from lmlib.train import health


def check(*, longest: int, seed: int, **counts: int):
  """Raises ValueError if the numbers of a run do not fit each other or the layout in use.

  longest: the model's length; counts: steps, batch, microbatches, length, save_every.
  """
  for name, value in counts.items():
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise ValueError(f'{name}={value!r} must be a positive integer')
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed={seed} must lie between 0 and {2**32 - 1}')
  batch, microbatches, length = counts['batch'], counts['microbatches'], counts['length']
  if length > longest:
    raise ValueError(f"length={length} is longer than the model's length={longest}")
  parts = sharding.batch_devices()
  if batch % (several := parts * microbatches):
    raise ValueError(f'batch={batch} is not a multiple of microbatches={microbatches} times the {parts} devices that '
                     f'the layout splits a batch over (data x fsdp x expert): {-(-batch // several) * several} is')
  pipeline.check(batch // microbatches, f'batch={batch} by microbatches={microbatches}')
  if length % (context := sharding.size('context')):
    raise ValueError(f'length={length} is not a multiple of the {context} devices that the layout splits rows over '
                     f'(context): {length // context * context or context} is')


def train(state, step, *, steps: int, loader, record, checkpoints, save_every: int, beside, watching,
          evaluate=None, evaluate_every: int | None = None, say=print):
  """Runs `step` from state.step to `steps`; returns the last state.

  loader iterates (index, device batch, seconds waited) from the state's step on: step k, counted from 1, has index
  k - 1, and beside(k - 1) is what its line says besides its metrics. A step's metrics are read while the next one
  computes; `watching` (a watch.Watching) is told of every step, save and evaluation. Saves every `save_every` steps, at
  the end and on a signal. Every `evaluate_every` steps and after the last, record.evaluated() gets what
  evaluate(params, number) returns; its time is no step's. Raises health.Stopped after saving for a signal, and what
  `watching` does.
  """
  books = _Books(record, checkpoints, beside, watching)
  due = lambda number: evaluate is not None and number and (number % evaluate_every == 0 or number == steps)
  at_once = health.stopping('stopped at once; run the same command to go on from the last checkpoint')
  with at_once, health.Signals(say) as signals, contextlib.closing(record):
    number, stopped = int(state.step), None
    saved = number
    if due(number):  # a run that was stopped here had no time for it
      books.evaluate(number, state, evaluate)
    for index, batch, waited in loader:
      watching.before(index + 1)
      state, values = step(state, batch)
      done = time.perf_counter() if values['loss'].is_ready() else None
      books.settle(state, done)
      number = index + 1
      books.pending = (number, values, waited, done)
      stopped = processes.stop(signals.received)
      if stopped or number == steps or number % save_every == 0:
        books.save(number, state)
        saved = number
      if stopped:
        break
      if due(number):
        books.evaluate(number, state, evaluate)
    books.settle(state)
    if saved != number:
      books.save(number, state)
    with watching.during('saving', number):
      checkpoints.wait()
    if stopped := stopped or next(filter(None, processes.gathered('end of the loop', signals.received)), None):
      raise health.Stopped(f'stopped by {stopped} after step {number} of {steps}, saved; '
                           'run the same command to go on')
  return state


class _Books:
  """What is written down of a step, once the next has begun, and how long it took."""

  def __init__(self, record, checkpoints, beside, watching):
    self.pending = None  # (number, metrics, seconds waited for data, when it was done if known) of the last step
    self._record, self._checkpoints, self._beside, self._watching = record, checkpoints, beside, watching
    self._saving, self._last = 0.0, time.perf_counter()

  def settle(self, state, ahead: float | None = None):
    """Reads the metrics of the step before; state: that of now; ahead: when the step after it was done, if it is."""
    if self.pending is not None:
      number, values, waited, done = self.pending
      values = {name: value if value.ndim else float(value) for name, value in sharding.fetched(values).items()}
      # Done when it was sent, or seen done along with the next one: half of the time each; or just now.
      before, self._last = self._last, done or (ahead and (self._last + ahead) / 2) or time.perf_counter()
      values |= {'waited': waited, 'saving': self._saving} | self._beside(number - 1)
      line = self._record.write(number, values, seconds=self._last - before)
      self.pending, self._saving = None, 0.0
      self._watching.after(line, state)

  def save(self, number: int, state):
    self.settle(state)
    self._record.flush()
    start = time.perf_counter()
    with self._watching.during('saving', number):
      self._checkpoints.save(number, state)
    self._saving = time.perf_counter() - start

  def evaluate(self, number: int, state, evaluate):
    self.settle(state)
    with self._watching.during('evaluating', number):
      scores = evaluate(state.params, number)
    self._record.evaluated(number, scores)
    self._checkpoints.scored(number, scores)
    self._last = time.perf_counter()
