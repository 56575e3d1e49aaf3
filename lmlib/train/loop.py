"""The one loop: every method differs only in its loss and its batches."""
import contextlib
import time

import jax

from lmlib import sharding
from lmlib.train import health


def check(*, steps: int, batch: int, microbatches: int, length: int, longest: int, save_every: int):
  """Raises ValueError if the numbers of a run do not fit each other or the layout in use."""
  for name, value in dict(steps=steps, batch=batch, microbatches=microbatches, length=length,
                          save_every=save_every).items():
    if not isinstance(value, int) or value < 1:
      raise ValueError(f'{name}={value!r} must be a positive integer')
  if length > longest:
    raise ValueError(f"length={length} is longer than the model's length={longest}")
  parts = sharding.batch_devices()
  if batch % (parts * microbatches):
    raise ValueError(f'batch={batch} is not a multiple of microbatches={microbatches} times the {parts} devices '
                     'that the layout splits a batch over (data x fsdp)')


def train(state, step, *, steps: int, loader, record, checkpoints, save_every: int, rate, describe, say=print):
  """Runs `step` from state.step to `steps`; returns the last state.

  loader iterates (number, device batch, seconds waited) from the state's step on; rate(i) is the
  learning rate of step i; describe(i) names what was in the batch of step i. A step's metrics are read
  while the next one computes. Saves every `save_every` steps, at the end and on a signal.
  Raises health.Stopped after saving for a signal, health.RunFault if numbers stay non-finite.
  """
  nonfinite = health.NonFinite(describe, say)
  pending, saving, last = None, 0.0, time.perf_counter()

  def settle():
    nonlocal pending, saving, last
    if pending is not None:
      number, values, waited, done = pending
      values = {name: float(value) for name, value in jax.device_get(values).items()}
      finite = bool(values['finite'])
      before, last = last, done or time.perf_counter()
      record.write(number, values | {'waited': waited, 'saving': saving, 'learning_rate': float(rate(number - 1))},
                   seconds=last - before)
      pending, saving = None, 0.0
      nonfinite.see(number, finite)

  def save(number: int):
    nonlocal saving
    settle()
    record.flush()
    start = time.perf_counter()
    checkpoints.save(number, state)
    saving = time.perf_counter() - start

  with health.Signals(say) as signals, contextlib.closing(record):
    number = saved = int(state.step)
    for index, batch, waited in loader:
      state, values = step(state, batch)
      done = time.perf_counter() if values['loss'].is_ready() else None  # a backend that does not run ahead
      settle()
      number = index + 1
      pending = (number, values, waited, done)
      if signals.received or number == steps or number % save_every == 0:
        save(number)
        saved = number
      if signals.received:
        break
    settle()
    if saved != number:
      save(number)
    checkpoints.wait()
    if signals.received and number < steps:
      raise health.Stopped(f'stopped by {signals.received} after step {number} of {steps}, saved; '
                           'run the same command to go on')
  return state
