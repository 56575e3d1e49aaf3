"""An interruption says what to do."""
import pytest

from lmlib.train import health


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
