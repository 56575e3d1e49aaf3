"""The loop with a step and a disk that only note when they are asked."""
import contextlib
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

from lmlib import sharding
from lmlib.train import health, loop, spikes

GOOD = {'steps': 10, 'batch': 8, 'microbatches': 1, 'length': 16, 'longest': 16, 'save_every': 3, 'seed': 0}


class Value:
  """A number on a device; reading it is noted, and waits until it is done."""

  def __init__(self, log, what: str, value: float, done: float):
    self._log, self._what, self._value, self._done = log, what, value, done

  def is_ready(self) -> bool:
    return time.perf_counter() >= self._done

  def __array__(self, dtype=None, copy=None):
    time.sleep(max(0.0, self._done - time.perf_counter()))
    self._log.append(self._what)
    return np.asarray(self._value, dtype)


class Run:
  """Everything that train() is given, with a log of what it did, in order."""

  def __init__(self, *, start: int = 0, seconds: float = 0.0, ahead: bool = True, bad=()):
    """seconds a step takes; ahead: whether step() returns before that; bad: steps that are not finite."""
    self.log, self.lines, self.saved, self.said = [], [], [], []
    self.state, self.before, self.on = SimpleNamespace(step=start), [], {}
    self._seconds, self._ahead, self._bad, self._free = seconds, ahead, bad, 0.0

  def step(self, state, batch):
    number = state.step + 1
    assert batch == f'batch {state.step}'
    self.log.append(f'step {number}')
    self._free = max(self._free, time.perf_counter()) + self._seconds
    if not self._ahead:
      time.sleep(max(0.0, self._free - time.perf_counter()))
    values = {'loss': Value(self.log, f'read {number}', 1.0, self._free),
              'finite': np.float32(number not in self._bad)}
    self.on.get(number, lambda: None)()
    return SimpleNamespace(step=number), values

  def write(self, step, values, *, seconds):
    self.lines.append({'step': step, 'seconds': seconds, **values})
    return self.lines[-1]

  def flush(self):
    self.log.append('flush')

  def close(self):
    self.log.append('close')

  def save(self, step, state):
    assert state.step == step
    assert self.lines[-1]['step'] == step  # what a checkpoint says is done is written down before
    self.saved.append(step)

  def wait(self):
    self.log.append('wait')

  def scored(self, step, scores):
    self.log.append(f'noted {step}')

  def evaluated(self, step, scores):
    self.log.append(f'scores {step} {scores}')

  def train(self, steps: int, save_every: int = 100, **more):
    loader = ((i, f'batch {i}', 0.25) for i in range(self.state.step, steps))
    numbers = spikes.Numbers(None, self.before, describe=lambda step: [f'documents {step - 1}'], say=self.said.append)
    watching = SimpleNamespace(before=lambda number: None, during=lambda cause, number: contextlib.nullcontext(),
                               after=lambda line, state: numbers.see(line, lambda why: None))
    return loop.train(self.state, self.step, steps=steps, loader=loader, record=self, checkpoints=self,
                      save_every=save_every, beside=lambda i: {'learning_rate': i / 100}, watching=watching,
                      say=self.said.append, **more)


def test_a_step_is_read_while_the_next_one_computes():
  run = Run(seconds=0.002)
  assert run.train(4).step == 4
  assert run.log == ['step 1', 'step 2', 'read 1', 'step 3', 'read 2', 'step 4', 'read 3', 'read 4', 'flush',
                     'wait', 'close']


def test_lines_hold_the_learning_rate_of_their_step_and_the_time_they_waited():
  run = Run(start=3)
  run.train(6)
  assert [line['step'] for line in run.lines] == [4, 5, 6]
  assert [line['learning_rate'] for line in run.lines] == [0.03, 0.04, 0.05]
  assert [line['waited'] for line in run.lines] == [0.25] * 3


@pytest.mark.parametrize('ahead', [True, False])
def test_seconds_are_those_of_each_step_and_add_up(ahead):
  run = Run(seconds=0.02, ahead=ahead)
  start = time.perf_counter()
  run.train(6)
  seconds = [line['seconds'] for line in run.lines]
  assert min(seconds) > 0
  assert max(seconds[1:5]) > 0.015
  # 6 steps of 20 ms; between them and after them the host does next to nothing.
  assert 0.119 < sum(seconds) <= time.perf_counter() - start


def test_seconds_are_positive_where_some_steps_run_ahead_and_some_do_not():
  run = Run()

  def step(state, batch, step=run.step):
    run._ahead, run._seconds = bool(state.step % 3), 0.002 * (state.step % 2)
    return step(state, batch)

  run.step = step
  start = time.perf_counter()
  run.train(30)
  seconds = [line['seconds'] for line in run.lines]
  assert min(seconds) > 0
  assert sum(seconds) <= time.perf_counter() - start


@pytest.mark.parametrize(('start', 'steps', 'saved'), [
    (0, 7, [3, 6, 7]), (0, 6, [3, 6]), (4, 7, [6, 7]), (0, 2, [2])])
def test_saves_every_few_steps_and_at_the_end(start, steps, saved):
  run = Run(start=start)
  run.train(steps, save_every=3)
  assert run.saved == saved


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
@pytest.mark.parametrize('step', [1, 4, 10])
def test_a_signal_saves_the_step_and_stops(name, step):
  run, before = Run(), signal.getsignal(getattr(signal, name))
  run.on[step] = lambda: os.kill(os.getpid(), getattr(signal, name))
  with pytest.raises(health.Stopped, match=f'^stopped by {name} after step {step} of 10, saved; run'):
    run.train(10)
  assert run.saved == [step] == [run.lines[-1]['step']]
  assert run.log[-1] == 'close'
  assert run.said == [f'{name}: saving after this step (again to stop without saving)']
  assert signal.getsignal(getattr(signal, name)) is before


def test_a_second_signal_stops_at_once_without_saving():
  run = Run()
  run.on[4] = lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
  with pytest.raises(health.Stopped, match=r'^stopped at once; run the same command to go on from the last'):
    run.train(10, save_every=3)
  assert run.saved == [3]


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run_without_saving():
  run = Run(bad=range(4, 40))
  with pytest.raises(health.RunFault, match=r'in a row, 4 to 13, .* batch of step 13 was: documents 12$'):
    run.train(60, save_every=13)
  assert run.saved == []
  assert run.lines[-1]['step'] == 13


def test_the_count_of_steps_in_a_row_goes_on_over_a_resumption():
  run = Run(start=10, bad=range(4, 40))
  run.before = [{'step': step, 'finite': float(step < 4)} for step in range(1, 11)]
  with pytest.raises(health.RunFault, match='10 steps in a row, 4 to 13'):
    run.train(60)


@pytest.mark.parametrize(('changed', 'message'), [
    ({'steps': 0}, 'steps=0'), ({'save_every': 1.5}, 'save_every=1.5'),
    ({'microbatches': True}, 'microbatches=True'), ({'length': 17}, 'length=17 .* length=16'),
    ({'seed': -1}, 'seed=-1'), ({'batch': 12}, 'batch=12 .* microbatches=1 .* 8 devices'),
    ({'microbatches': 2}, 'batch=8 .* microbatches=2 .* 8 devices')])
def test_numbers_that_do_not_fit_are_named(changed, message):
  with sharding.use(sharding.Layout()):
    loop.check(**GOOD)
    with pytest.raises(ValueError, match=message):
      loop.check(**(GOOD | changed))


def evaluating(run, seconds: float = 0.0):
  """What evaluates the state of a run, whose step stands for its weights."""
  def evaluate(params, number):
    assert params == number == run.lines[-1]['step'], 'the step is written down before'
    time.sleep(seconds)
    return {'score': params}

  class State(SimpleNamespace):
    @property
    def params(self):
      return self.step

  plain = run.step
  run.step = lambda state, batch: (State(step=state.step + 1), plain(state, batch)[1])
  run.state = State(step=run.state.step)
  return evaluate


def test_evaluations_come_every_so_many_steps_and_after_the_last():
  run = Run()
  run.train(5, evaluate=evaluating(run), evaluate_every=2)
  assert [line for line in run.log if line.startswith('scores')] == [
      f"scores {n} {{'score': {n}}}" for n in (2, 4, 5)]


def test_the_time_of_evaluations_is_no_steps():
  run = Run(seconds=0.001)
  run.train(5, evaluate=evaluating(run, 0.2), evaluate_every=1)
  assert sum(line['seconds'] for line in run.lines) < 0.5 < 5 * 0.2


def test_a_run_that_stopped_before_an_evaluation_makes_up_for_it():
  run = Run(start=4)
  looked = []
  evaluating(run)
  run.train(6, evaluate=lambda params, number: looked.append(number) or {}, evaluate_every=4)
  assert looked == [4, 6]


def test_rows_that_the_layout_cannot_split_are_refused():
  with sharding.use(sharding.Layout(data=1, context=8)):
    loop.check(**GOOD | {'length': 16})
    with pytest.raises(ValueError, match=r'length=12 is not a multiple of the 8 devices .*\(context\): 8 is'):
      loop.check(**GOOD | {'length': 12})
