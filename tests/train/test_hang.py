"""What does not move for too long is ended, by a clock that is told the time; a process in tests/experiments."""
import pytest

from lmlib.train.hang import Hang, Watchdog


class Clock:
  """A watchdog whose time passes when it is told so, a tenth of a second between looks."""

  def __init__(self, folder, hang=Hang(times=10.0, least=2.0, elsewhere=5.0)):
    self.time, self.ended = 0.0, []
    self.dog = Watchdog(hang, folder, now=lambda: self.time, end=self.ended.append)

  def passes(self, seconds: float) -> bool:
    """Lets time pass; whether the process has been ended by then."""
    for _ in range(round(seconds * 10)):
      self.time += 0.1
      self.dog.look()
      if self.ended:
        return True
    return False


@pytest.mark.parametrize(('median', 'within', 'ends'), [(0.1, 1.9, 0.3), (0.5, 4.8, 0.4)])
def test_a_step_may_take_so_many_medians_and_no_less_than_the_least(tmp_path, capfd, median, within, ends):
  clock = Clock(tmp_path)
  for seconds in (median, median, 90.0):
    clock.dog.took(seconds)
  clock.dog.step(4)
  assert not clock.passes(within)
  clock.dog.step(5)  # it moved
  assert not clock.passes(within)
  assert clock.passes(ends)
  assert clock.ended == [1]
  *stacks, last = capfd.readouterr().err.splitlines()
  assert last.startswith(f'step 5 hangs: nothing has moved for {round(within + 0.2)} s, where the median step takes '
                         f'{median} s; the stacks of all threads are in {tmp_path}/stacks_0.txt')
  assert any('test_hang.py' in line for line in stacks)
  assert 'test_hang.py' in (tmp_path / 'stacks_0.txt').read_text()


def test_what_is_no_step_has_a_limit_of_its_own(tmp_path, capfd):
  clock = Clock(tmp_path)
  assert not clock.passes(4.8)  # the first step
  clock.dog.step(1)
  clock.dog.took(0.1)
  clock.dog.step(2)
  with clock.dog.elsewhere('saving after step 2'):
    assert not clock.passes(4.8)
  assert not clock.passes(1.9)
  with clock.dog.elsewhere('saving after step 2'):
    assert clock.passes(5.3)
  assert 'saving after step 2 hangs: nothing has moved for 5 s' in capfd.readouterr().err
  forever = Clock(tmp_path, Hang(least=2.0))
  with forever.dog.elsewhere('evaluating after step 2'):
    assert not forever.passes(999)


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path):
  clock = Clock(tmp_path)
  clock.dog.step(1)
  clock.dog.took(0.1)
  clock.dog.step(2)
  for _ in range(3):
    clock.time += 3600.0  # a machine that slept
    clock.dog.look()
  assert not clock.ended
  assert clock.passes(2.0)


@pytest.mark.parametrize('given', [{'times': 0.0}, {'least': -1.0}, {'elsewhere': 0.0}])
def test_limits_are_positive(given):
  with pytest.raises(ValueError, match=f'Hang.{next(iter(given))}=.* must be positive'):
    Hang(**given)
