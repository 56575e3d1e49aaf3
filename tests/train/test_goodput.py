"""All of a run's time has a cause, over sessions that were killed too."""
import os

import pytest

from lmlib.train import goodput, metrics
from lmlib.train.goodput import Ledger


class Clock:

  def __init__(self):
    self.time = 1000.0

  def __call__(self) -> float:
    return self.time

  def passes(self, seconds: float):
    self.time += seconds


def step(folder, clock, number: int, seconds: float, *, waited=0.0, saving=0.0, finite=1.0):
  clock.passes(seconds - saving)  # saving has passed already
  line = {'step': number, 'seconds': seconds, 'waited': waited, 'saving': saving, 'finite': finite}
  metrics.append(folder / 'metrics.jsonl', line)
  os.utime(folder / 'metrics.jsonl', (clock.time, clock.time))
  return line


@pytest.fixture
def killed(tmp_path):
  """A session of two steps, a save and a step after it, which was killed; 20 s later the clock stands at the next."""
  clock = Clock()
  ledger = Ledger(tmp_path, now=clock)
  ledger.begin(clock.time)
  clock.passes(10.0)
  ledger.add('starting', 10.0)
  step(tmp_path, clock, 1, 2.0, waited=0.5)
  step(tmp_path, clock, 2, 2.0)
  with ledger.during('saving'):
    clock.passes(1.0)
  step(tmp_path, clock, 3, 3.0, saving=1.0)
  clock.passes(20.0)
  return tmp_path, clock


def test_a_killed_session_and_its_successor_add_up(killed):
  folder, clock = killed
  with (folder / 'time.jsonl').open('a') as file:
    file.write('{"at": 10')  # torn
  ledger = Ledger(folder, now=clock)
  ledger.begin(clock.time)
  clock.passes(4.0)
  ledger.add('starting', 4.0)
  kept, dropped = metrics.truncated(folder / 'metrics.jsonl', 2)
  assert len(kept) == 2
  ledger.add('lost', goodput.dropped(dropped))
  step(folder, clock, 3, 2.0)
  step(folder, clock, 4, 2.0, finite=0.0)
  with ledger.during('evaluating'):
    clock.passes(5.0)
  clock.passes(3.0)  # the report
  found = goodput.of(folder, now=clock.time)
  assert found == pytest.approx({'steps': 5.5, 'starting': 14.0, 'data': 0.5, 'saving': 1.0, 'evaluating': 8.0,
                                 'lost': 4.0, 'rolled back': 0.0, 'idle': 20.0, 'other': 0.0})
  assert sum(found.values()) == pytest.approx(clock.time - 1000.0)
  assert goodput.said(found) == (
      '10.4% of 0:53 in steps that count; 37.7% between sessions, 26.4% start-up and compilation, 15.1% evaluation, '
      '7.5% steps that were lost and done again, 1.9% checkpoints, 0.9% waiting for data')


def test_a_session_knows_its_own_share(killed):
  folder, clock = killed
  ledger = Ledger(folder, now=clock)
  ledger.begin(clock.time)
  clock.passes(6.0)
  ledger.stepped(step(folder, clock, 3, 2.0))
  assert ledger.share() == pytest.approx(0.25)


def test_a_run_from_before_there_were_ledgers_has_no_causes(tmp_path):
  assert goodput.of(tmp_path) == {}
