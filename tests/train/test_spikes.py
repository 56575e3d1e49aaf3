"""What is a spike, which batches a step reads after some were left out, and what is kept of it."""
import math

import pytest

from lmlib.train import spikes
from lmlib.train.health import RunFault
from lmlib.train.spikes import Events, Numbers, Order, Spike, Spikes

SMALL = Spikes(window=4)


def line(step, loss=2.0, grad_norm=1.0, finite=1.0):
  return {'step': step, 'loss': loss, 'grad_norm': grad_norm, 'finite': finite}


def numbers(settings, before=(), said=None, rows=('row 0',)):
  return Numbers(settings, before, describe=lambda step: list(rows), say=(said if said is not None else []).append)


def see(watched, lines, noted=None):
  for one in lines:
    watched.see(one, lambda why, one=one: None if noted is None else noted.append(one['step']))


def test_a_loss_far_above_those_before_is_a_spike_and_one_far_below_is_none():
  watched = numbers(SMALL)
  see(watched, [line(1, 2.0), line(2, 2.2), line(3, 1.8), line(4, 2.0), line(5, 0.1), line(6, 2.4)])
  with pytest.raises(Spike, match=r'^step 7: loss 9 is over ') as error:
    see(watched, [line(7, 9.0)])
  spike = error.value
  assert (spike.step, spike.first, spike.last) == (7, 7, 7)
  assert [spike.again(one) for one in (line(7, 9.0), line(7, math.nan, finite=0.0), line(7, 2.5))] == [
      True, True, False]


def test_limits_are_mean_and_deviations_of_the_window():
  """Of 1, 2, 3, 4: 2.5 + 2 x sqrt(1.25) = 4.736."""
  for loss, found in ((4.73, False), (4.74, True)):
    watched = numbers(Spikes(loss=2.0, window=4))
    see(watched, [line(1, 90.0), *(line(i + 1, float(i)) for i in (1, 2, 3, 4))])  # the first is out of the window
    if found:
      with pytest.raises(Spike, match=r'over 2\.5 \+ 2 x 1\.12'):
        see(watched, [line(6, loss)])
    else:
      see(watched, [line(6, loss)])


def test_nothing_is_a_spike_before_the_window_is_full_and_losses_that_stand_still_may_move_a_little():
  watched = numbers(SMALL)
  see(watched, [line(1, 2.0), line(2, 2.0), line(3, 9.0), line(4, 2.0)])
  watched = numbers(SMALL, before=[line(i, 2.0) for i in range(1, 5)])
  see(watched, [line(5, 2.1)])  # 6 x 0.01 x 2 over it is 2.12
  with pytest.raises(Spike):
    see(watched, [line(6, 2.3)])


def test_the_norm_of_the_gradient_is_looked_at_where_it_is_asked_for():
  before = [line(i) for i in range(1, 5)]
  see(numbers(SMALL, before), [line(5, grad_norm=99.0)])
  with pytest.raises(Spike, match='grad_norm 99 is over 1') as error:
    see(numbers(Spikes(loss=None, gradient=6.0, window=4, batches=3), before), [line(5, grad_norm=99.0)])
  assert (error.value.first, error.value.last) == (3, 5)


def test_steps_that_are_not_finite_are_noted_counted_and_in_a_row_a_spike_or_the_end():
  said, noted = [], []
  watched = numbers(None, said=said)
  see(watched, [line(step, finite=float(step % spikes.IN_A_ROW == 0)) for step in range(1, 100)], noted)
  assert said[0] == 'step 1: loss or gradient not finite, step skipped (1 in a row)'
  assert len(said) == len(noted) == 90
  row = [line(step, math.nan, finite=0.0) for step in range(11, 21)]
  with pytest.raises(RunFault, match=r'10 steps in a row, 11 to 20, .* row 7; and 504 rows more$') as error:
    see(numbers(None, rows=[f'row {i}' for i in range(512)]), row)
  assert error.value.exit_status == 1
  with pytest.raises(Spike, match='10 steps in a row, 11 to 20') as error:
    see(numbers(SMALL, before=row[:7]), row[7:])  # the count goes on over a resumption
  assert (error.value.step, error.value.first, error.value.last) == (11, 11, 20)
  assert (error.value.again(row[0]), error.value.again(line(11))) == (True, False)


def test_steps_that_are_not_finite_count_in_no_mean():
  watched = numbers(SMALL)
  see(watched, [line(1), line(2), line(3, math.nan, finite=0.0), line(4), line(5)])
  with pytest.raises(Spike):
    see(watched, [line(6, 9.0)])


def test_an_order_counts_past_what_is_left_out():
  order = Order().without([5]).without([2, 3, 9])
  assert [order.index(position) for position in range(8)] == [0, 1, 4, 6, 7, 8, 10, 11]
  assert [Order().index(position) for position in range(3)] == [0, 1, 2]


def test_what_was_decided_is_read_back(tmp_path):
  events = Events(tmp_path)
  assert (events.read(), events.order(), events.rollbacks()) == ([], Order(), 0)
  plain = {'step': 20, 'batch': 19, 'left_out': [], 'rollback': None, 'loss': math.nan}
  events.write(plain)
  events.write(plain | {'step': 9, 'batch': 8, 'left_out': [8], 'rollback': 1})
  events.write(plain | {'step': 9, 'batch': 9, 'left_out': [9], 'rollback': 2})
  events.write(plain | {'step': 9, 'batch': 9})  # is kept beside it
  assert [(event['step'], event['batch']) for event in Events(tmp_path).read()] == [(9, 8), (9, 9), (9, 9), (20, 19)]
  assert Events(tmp_path).order() == Order((8, 9))
  assert Events(tmp_path).rollbacks() == 2
  assert Events(tmp_path).read()[-1]['loss'] is None


@pytest.mark.parametrize('torn', ['', '{"step": 3}', '[]', '{"step'])
def test_a_decision_that_cannot_be_read_is_no_silence(tmp_path, torn):
  events = Events(tmp_path)
  events.write({'step': 9, 'batch': 8, 'left_out': [8], 'rollback': 1}).write_text(torn)
  with pytest.raises(ValueError, match=r'9_8\.json is damaged, and says which batches the run leaves out'):
    events.order()


@pytest.mark.parametrize(('given', 'message'), [
    ({'window': 1}, 'window=1 must lie between 2 and 4096'), ({'batches': 0}, 'batches=0'), ({'loss': -1.0}, 'loss=-1'),
    ({'rollbacks': 1.5}, 'rollbacks=1.5'), ({'gradient': 0.0}, 'gradient=0.0'), ({'loss': None}, 'nothing is looked')])
def test_settings_that_make_no_sense_are_named(given, message):
  with pytest.raises(ValueError, match=message):
    Spikes(**given)
