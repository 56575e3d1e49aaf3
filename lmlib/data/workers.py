"""Processes of this machine that work on tasks: one function, applied to many values, in any order.

Differs from multiprocessing.Pool in what happens when something ends: a worker that dies (out of memory) is an
error and no endless wait; workers end at once with their parent, also if that is killed, and with Ctrl-C.
"""
from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import multiprocessing
from multiprocessing import connection
import os
import signal
import threading
import traceback
from typing import Any


@dataclasses.dataclass(frozen=True)
class Local:
  """Works in processes of this machine; in this process alone if `processes` is 1."""
  processes: int | None = None  # None: one for every core that this process may use

  def __post_init__(self):
    if self.processes is not None and self.processes < 1:
      raise ValueError(f'Local.processes={self.processes} must be at least 1, or None for every core')

  @contextlib.contextmanager
  def started(self, folder) -> Iterator[Callable]:
    """Inside, over(function, tasks) yields function(task) for every task, as they are done."""
    count = self.processes or cores()
    if count == 1:
      yield lambda function, tasks: map(function, tasks)
      return
    pool = _Pool(count)
    try:
      yield pool.over
    finally:
      pool.stop()


def cores() -> int:
  """How many cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


class _Pool:
  """Workers that are started when there is work for them; a pipe to each."""

  def __init__(self, count: int):
    self._count, self._context, self._workers = count, multiprocessing.get_context('spawn'), {}

  def over(self, function: Callable, tasks: Iterable) -> Iterator[Any]:
    tasks, idle, busy = iter(tasks), list(self._workers), set()
    while True:
      while idle or len(self._workers) < self._count:
        try:
          task = next(tasks)
        except StopIteration:
          break
        pipe = idle.pop() if idle else self._start()
        busy.add(pipe)
        with contextlib.suppress(BrokenPipeError):  # it has died, which is noticed below
          pipe.send((function, task))
      if not busy:
        return
      for pipe in connection.wait(busy):
        try:
          done, value = pipe.recv()
        except (EOFError, ConnectionResetError):
          worker = self._workers[pipe]
          worker.join()
          raise RuntimeError(f'worker process {worker.pid} died with exit code {worker.exitcode}; if that is -9, '
                             'memory may have run out: use fewer processes') from None
        if not done:
          raise value
        busy.remove(pipe)
        idle.append(pipe)
        yield value

  def _start(self):
    ours, theirs = self._context.Pipe()
    worker = self._context.Process(target=_work, args=(theirs,), daemon=True)
    worker.start()
    theirs.close()
    self._workers[ours] = worker
    return ours

  def stop(self):
    for pipe, worker in self._workers.items():
      pipe.close()
      worker.kill()
    for worker in self._workers.values():
      worker.join()
      worker.close()
    self._workers = {}


def _work(pipe):
  """What a worker does: each (function, task) that comes, until its parent is gone."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent sees to its workers
  threading.Thread(target=_end_with_parent, daemon=True).start()
  while True:
    try:
      function, task = pipe.recv()
    except EOFError:
      return
    try:
      answer = True, function(task)
    except Exception as error:
      error.add_note(f'in a worker process:\n{traceback.format_exc()}')
      answer = False, error
    try:
      pipe.send(answer)
    except Exception as error:  # what cannot be sent is described
      pipe.send((False, RuntimeError(f'{answer[1]!r} cannot be sent to the parent process: {error}')))


def _end_with_parent():
  multiprocessing.parent_process().join()
  os._exit(1)
