import threading
import time

import pytest

from lmlib.data.loader import Loader


@pytest.fixture(autouse=True)
def no_thread_is_left():
  before = threading.active_count()
  yield
  assert threading.active_count() == before


def test_steps_come_in_order_and_placed():
  with Loader(lambda step: step * step, 3, 40, place=str) as loader:
    got = list(loader)
  assert [(step, batch) for step, batch, _ in got] == [(step, str(step * step)) for step in range(3, 40)]
  assert all(waited >= 0 for *_, waited in got)


def test_no_steps():
  with Loader(lambda step: step, 5, 5) as loader:
    assert list(loader) == []


def test_it_works_ahead_but_not_without_bound():
  made = []
  third = threading.Event()

  def batch_at(step):
    made.append(step)
    if step == 3:
      third.set()
    return step

  with Loader(batch_at, 0, 100, ahead=3) as loader:
    taken = iter(loader)
    next(taken)
    assert third.wait(5)  # steps 1, 2 and 3 while nobody asks
    time.sleep(0.02)
    assert made == [0, 1, 2, 3]
    assert next(taken)[:2] == (1, 1)


def test_a_second_loop_goes_on_where_the_first_ended():
  with Loader(lambda step: step, 0, 6) as loader:
    for step, _, _ in loader:
      if step == 2:
        break
    assert [batch for _, batch, _ in loader] == [3, 4, 5]


@pytest.mark.parametrize('where', ['batch_at', 'place'])
def test_an_exception_comes_at_its_step(where):
  def fails(step):
    if step == 4:
      raise OSError('damaged chunk')
    return step

  loader = Loader(fails, 0, 9) if where == 'batch_at' else Loader(lambda step: step, 0, 9, place=fails)
  with loader:
    taken = iter(loader)
    assert [next(taken)[0] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(OSError, match='damaged chunk'):
      next(taken)


def test_close_is_prompt_and_may_be_repeated():
  loader = Loader(lambda step: step, 0, 10**9)
  next(iter(loader))
  time.sleep(0.02)  # until the thread waits for room
  start = time.perf_counter()
  loader.close()
  loader.close()
  assert time.perf_counter() - start < 1  # a made batch and a free core: milliseconds
  with pytest.raises(RuntimeError, match='closed before step 1'):
    next(iter(loader))


def test_waiting_is_measured():
  def slow(step):
    time.sleep(0.05)
    return step

  with Loader(slow, 0, 1) as loader:
    assert next(iter(loader))[2] > 0.02  # 0.05 s, less what passed before the first question


def test_ahead_must_be_positive():
  with pytest.raises(ValueError, match='ahead=0'):
    Loader(lambda step: step, 0, 1, ahead=0)
