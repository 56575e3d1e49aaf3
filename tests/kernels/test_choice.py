"""Which implementation runs, and what is said of it."""
import pytest

from lmlib.kernels import choice

LACKING = {'plain': lambda size: [], 'quick': lambda size: ['sizes over eight'] * (size > 8)}


def chosen(asked, size, operation='addition'):
  return choice.chosen(operation, asked, lambda size: 'quick' if size <= 8 else 'plain', LACKING, (size,))


def test_what_is_asked_for_runs_or_is_refused():
  assert [chosen(asked, 8) for asked in ('plain', 'quick', 'auto')] == ['plain', 'quick', 'quick']
  assert chosen('auto', 9) == 'plain'
  with pytest.raises(ValueError, match="addition implementation='quick' cannot do sizes over eight; 'plain' can"):
    chosen('quick', 9)
  with pytest.raises(ValueError, match=r"addition implementation='slow' is none of \['plain', 'quick'\]"):
    chosen('slow', 1)
  with pytest.raises(ValueError, match="addition implementation='quick' cannot do sizes over eight; none can"):
    choice.chosen('addition', 'auto', lambda size: 'quick', {'quick': LACKING['quick']}, (9,))


def test_a_choice_is_said_once(caplog):
  choice.said.cache_clear()
  lines = []
  with choice.saying(lines.append):
    for size in (1, 2, 9):
      chosen('auto', size)
    chosen('plain', 1)  # asked for: there is no choice to speak of
  chosen('auto', 1, 'multiplication')
  assert not caplog.records  # nor anywhere else
  assert lines == ["kernel      addition by 'quick'", "kernel      addition by 'plain'"]
