"""Steps that are not finite are counted in a row; an interruption says what to do."""
import pytest

from lmlib.train import health


def test_a_finite_step_begins_the_count_anew():
  said = []
  nonfinite = health.NonFinite(lambda step: [], said.append)
  for step in range(1, 100):
    nonfinite.see(step, finite=step % health.IN_A_ROW == 0)
  assert said[0] == 'step 1: loss or gradient not finite, step skipped (1 in a row)'
  assert len(said) == 90


def test_a_message_names_a_few_rows_of_a_large_batch():
  nonfinite = health.NonFinite(lambda step: [f'row {i}' for i in range(512)], lambda line: None, in_a_row=9)
  with pytest.raises(health.RunFault) as error:
    nonfinite.see(20, finite=False)
  assert str(error.value).endswith('; row 7; and 504 rows more')
  assert '11 to 20' in str(error.value)
  assert error.value.exit_status == 1


def test_an_interruption_becomes_a_stop_with_a_message():
  with pytest.raises(health.Stopped, match=r'^run it again$') as error, health.stopping('run it again'):
    raise KeyboardInterrupt
  assert error.value.exit_status == 75


def test_a_signal_in_the_middle_of_a_write_is_received_all_the_same():
  def say(line):
    raise RuntimeError('reentrant call')

  with health.Signals(say) as signals:
    signals._on(15, None)
    assert signals.received == 'SIGTERM'
    with pytest.raises(KeyboardInterrupt):
      signals._on(15, None)
