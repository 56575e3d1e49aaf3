"""A thread that ends a run which no longer moves: a dead network, a disk that does not answer, a lock held for ever."""
from collections import deque
from collections.abc import Callable
import contextlib
import dataclasses
import faulthandler
import os
import pathlib
import statistics
import sys
import threading
import time

import jax

from lmlib import processes
from lmlib.train.health import RunFault

LOOKS = 1.0  # seconds between two looks, and less where limits are short


@dataclasses.dataclass(frozen=True)
class Hang:
  """A step hangs once it has taken `times` the median of those before, and `least` seconds.

  elsewhere: seconds that the first step, a checkpoint or an evaluation may take; None: as long as they like.
  """
  times: float = 20.0
  least: float = 600.0
  elsewhere: float | None = None

  def __post_init__(self):
    for name in ('times', 'least', 'elsewhere'):
      value = getattr(self, name)
      if not (value is None and name == 'elsewhere') and not value > 0:
        raise ValueError(f'Hang.{name}={value!r} must be positive')


class Watchdog:
  """A context manager that ends the process, with status 1, when nothing has moved for too long.

  The stacks of all threads go to standard error and <workdir>/stacks_<process>.txt, and a last line says where it was.
  Time in which the process itself was stopped, or the machine asleep, does not count.
  """

  def __init__(self, hang: Hang, workdir: pathlib.Path, *, now: Callable[[], float] = time.monotonic,
               end: Callable[[int], None] = os._exit):
    self._hang, self._now, self._end = hang, now, end
    self._path = workdir / f'stacks_{jax.process_index()}.txt'
    self._every = min(LOOKS, hang.least / 10, (hang.elsewhere or hang.least) / 10)
    self._seconds = deque(maxlen=50)  # of the last steps
    self._doing, self._step, self._still, self._seen = 'the first step', None, 0.0, now()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._work, name='watchdog', daemon=True)

  def step(self, number: int):
    """Something has moved: step `number` begins, or its numbers are waited for."""
    self._doing, self._step, self._still = f'step {number}', number, 0.0

  def took(self, seconds: float):
    """How long a step has taken."""
    self._seconds.append(seconds)
    self._still = 0.0

  @contextlib.contextmanager
  def elsewhere(self, what: str):
    """Inside is no step: `what`, such as 'saving'."""
    self._step, before = None, (self._doing, self._step)
    self._doing, self._still = what, 0.0
    try:
      yield
    finally:
      (self._doing, self._step), self._still = before, 0.0

  def limit(self) -> float | None:
    """Seconds that may go by without anything moving."""
    if self._step is None or not self._seconds:
      return self._hang.elsewhere
    return max(self._hang.least, self._hang.times * statistics.median(self._seconds))

  def look(self):
    """Ends the process if it is time to."""
    before, self._seen = self._seen, self._now()
    self._still += min(self._seen - before, 2 * self._every)
    limit = self.limit()
    if limit is not None and self._still > limit:
      line = self._report()
      processes.fail(RunFault(line), line, 1, shown=True)  # ends here, where there are others to tell
      self._end(1)

  def _report(self) -> str:
    median = f', where the median step takes {statistics.median(self._seconds):.3g} s' if self._seconds else ''
    line = (f'{self._doing} hangs: nothing has moved for {self._still:.0f} s{median}; '
            f'the stacks of all threads are in {self._path}; run the same command to go on from the last checkpoint')
    with contextlib.suppress(OSError), self._path.open('w') as file:  # the disk may be what hangs
      print(line, file=file, flush=True)
      faulthandler.dump_traceback(file)
    faulthandler.dump_traceback(sys.__stderr__)
    print(line, file=sys.__stderr__, flush=True)
    return line

  def _work(self):
    while not self._stop.wait(self._every):
      self.look()

  def __enter__(self) -> 'Watchdog':
    self._seen = self._now()
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._stop.set()
    self._thread.join()
