"""The tiny course of tests/train/courses.py as an experiment of its own, with a process that has a fault.

  python tests/processes/tiny.py --gin_file=tiny.gin
"""
from lmlib import cli

if __name__ == '__main__':
  cli.run(__file__)

import contextlib
import dataclasses
import functools
import os
import pathlib
import resource
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import jax
import orbax.checkpoint as ocp

from lmlib import processes, sharding
from lmlib.train import keeping, metrics, training
from lmlib.train import step as step_of
from lmlib.train.checkpoint import Checkpoints
from lmlib.train.watch import Watch
from lmlib.train.workdir import Workdir
from tests.train import courses

GIN = '''
from __gin__ import dynamic_registration
from processes import tiny
from lmlib import sharding
from lmlib.train import hang
from lmlib.train import hosts
from lmlib.train import keeping
from lmlib.train import spikes
from lmlib.train import watch

tiny.main.layout = @sharding.Layout()
tiny.main.workdir = '{workdir}'
'''


def main(*, layout, workdir: str, steps: int = courses.STEPS, save_every: int = 5, fault: str | None = None,
         who: int = 1, at: int = 8, seconds: float = 0.0, keep: int | keeping.Keep = 2, watch: Watch = Watch(),
         poisoned: tuple[int, ...] = (), scan: bool = True):
  """Trains to `steps`; process `who` has the fault when it makes batch `at`. seconds: that a batch takes."""
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  rows = courses.Rows(poisoned=poisoned)
  model = dataclasses.replace(courses.MODEL, execution=dataclasses.replace(courses.MODEL.execution, scan=scan))
  healthy = rows.batch_at

  def batch_at(index, part):
    if processes.number() == who and fault and (index == at or (fault == 'slow' and index > at)):
      FAULTS[fault](workdir)
    time.sleep(seconds)
    return healthy(index, part)

  rows.batch_at = batch_at
  if fault == 'held':
    held()
  with contextlib.ExitStack() as stack:
    stack.enter_context(sharding.use(layout))
    run = stack.enter_context(Workdir(workdir))
    transformation = courses.OPTIMIZER.transformation(sharding.letters(courses.protocol.boxed(model)), courses.STEPS)
    shapes = step_of.shapes(model, transformation)
    course = training.Course(courses.loss_of(model), transformation, shapes, rows,
                             lambda i: courses.OPTIMIZER.schedule.rate(i, courses.STEPS))
    checkpoints = stack.enter_context(Checkpoints(run.path / 'checkpoints', keep=keep))
    restored = checkpoints.restore(shapes)
    state = restored[0] if restored else step_of.init(model, transformation, jax.random.key(0))
    run.begin(manifest={}, files={})
    print(f'begin at {int(state.step)}', flush=True)
    record = functools.partial(metrics.Record, run.path, steps=steps, flops=SimpleNamespace(exact=1.0, six_nd=1.0),
                               peak=None, live=metrics.Live())
    training.train(course, state, folder=run.path, steps=steps, checkpoints=checkpoints, save_every=save_every,
                   record=record, watch=watch)
    print('done', flush=True)


def full(workdir: str):
  """From here on a file of this process may have no more than 2 kB: what a full disk does to those of arrays."""
  resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def broken(workdir: str):
  raise ValueError('bad thing=3')


def gone(workdir: str):
  """The folder of checkpoints, once nothing is being written or removed in it."""
  folder = pathlib.Path(workdir, 'checkpoints')
  while not all(path.name.isdecimal() for path in folder.iterdir()):
    time.sleep(0.01)
  shutil.rmtree(folder)


def stuck(workdir: str):
  threading.Event().wait()


def slow(workdir: str):
  time.sleep(0.5)


def held():
  """No save of step 5 ends: process 0 does not write the last of it."""
  whole = ocp.PyTreeCheckpointHandler.finalize
  ocp.PyTreeCheckpointHandler.finalize = (
      lambda self, path: threading.Event().wait() if path.name.startswith('5.') else whole(self, path))


FAULTS = {'term': lambda workdir: os.kill(os.getpid(), signal.SIGTERM),
          'kill': lambda workdir: os.kill(os.getpid(), signal.SIGKILL),
          'full': full, 'broken': broken, 'held': broken, 'stuck': stuck, 'slow': slow, 'gone': gone}
