"""Batches made ahead of time by one background thread.

Since a batch is a function of its step, the thread carries no state worth saving: a resumed run
starts a new one at its step.
"""
from collections.abc import Callable, Iterator
import queue
import threading
import time
from typing import Any


class Loader:
  """Iterates over (step, place(batch_at(step)), seconds waited for it) for steps start .. stop - 1.

  `place` puts a batch on the devices; it runs in the thread too, so that copying overlaps with
  computing. At most `ahead` batches are made and not yet taken. What the thread raises is raised at
  the step where it happened. End it by close(), or by leaving its `with`.
  """

  def __init__(self, batch_at: Callable[[int], Any], start: int, stop: int, *,
               place: Callable[[Any], Any] = lambda batch: batch, ahead: int = 2):
    if ahead < 1:
      raise ValueError(f'Loader ahead={ahead} must be at least 1')
    self._batch_at, self._place, self._next, self._stop = batch_at, place, start, stop
    self._room, self._ready, self._closed = threading.Semaphore(ahead), queue.SimpleQueue(), False
    self._thread = threading.Thread(target=self._work, args=[range(start, stop)], name='loader', daemon=True)
    self._thread.start()

  def _work(self, steps: range):
    for step in steps:
      self._room.acquire()
      if self._closed:
        return
      try:
        batch, error = self._place(self._batch_at(step)), None
      except BaseException as raised:
        batch, error = None, raised
      self._ready.put((batch, error))
      if error is not None:
        return

  def __iter__(self) -> Iterator[tuple[int, Any, float]]:
    while self._next < self._stop:
      if self._closed:
        raise RuntimeError(f'the loader was closed before step {self._next}')
      start = time.perf_counter()
      batch, error = self._ready.get()
      if error is not None:
        self.close()
        raise error
      waited = time.perf_counter() - start
      self._room.release()
      self._next += 1
      yield self._next - 1, batch, waited

  def close(self):
    """Stops the thread, at the latest when the batch that it is making is made."""
    self._closed = True
    self._room.release()
    self._thread.join()

  def __enter__(self) -> 'Loader':
    return self

  def __exit__(self, *_):
    self.close()
