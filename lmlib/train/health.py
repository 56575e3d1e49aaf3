"""What ends a run early: signals, and numbers that stay non-finite."""
import contextlib
import signal

IN_A_ROW = 10  # non-finite steps in a row that stop a run
SHOWN = 8  # rows of a batch that a message names


class RunFault(RuntimeError):  # noqa: N818, what happened, in words of the user
  """Something that only the running job could know; the message is what the user reads."""
  exit_status = 1


class Stopped(Exception):  # noqa: N818, not an error
  """The run was asked to stop, has saved, and goes on when the same command is run again."""
  exit_status = 75


@contextlib.contextmanager
def stopping(message: str):
  """Inside, an interruption raises Stopped with `message`, which says what the same command will do."""
  try:
    yield
  except KeyboardInterrupt:
    raise Stopped(message) from None


class Signals:
  """Inside, Ctrl-C and SIGTERM only set `received`; a second one interrupts at once."""

  def __init__(self, say=print):
    self.received: str | None = None
    self._say = say
    self._before = {}

  def __enter__(self):
    for number in (signal.SIGINT, signal.SIGTERM):
      self._before[number] = signal.signal(number, self._on)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _on(self, number, frame):
    if self.received:
      raise KeyboardInterrupt
    self.received = signal.Signals(number).name
    with contextlib.suppress(RuntimeError):  # the signal came in the middle of a write to the same stream
      self._say(f'{self.received}: saving after this step (again to stop without saving)')


class NonFinite:
  """Counts steps whose loss or gradient was not finite; raises RunFault at IN_A_ROW of them."""

  def __init__(self, describe, say=print, *, in_a_row: int = 0):
    """describe(step) names what was in the batch of a step; in_a_row: how many came just before."""
    self._describe, self._say = describe, say
    self._in_a_row = in_a_row

  def see(self, step: int, finite: bool):
    """`step` is the number of the step, from 1, and all of them are seen in order."""
    self._in_a_row = 0 if finite else self._in_a_row + 1
    if finite:
      return
    self._say(f'step {step}: loss or gradient not finite, step skipped ({self._in_a_row} in a row)')
    if self._in_a_row >= IN_A_ROW:
      rows = self._describe(step)
      shown = '; '.join(rows[:SHOWN]) + (f'; and {len(rows) - SHOWN} rows more' if len(rows) > SHOWN else '')
      raise RunFault(f'{self._in_a_row} steps in a row, {step - self._in_a_row + 1} to {step}, had a loss or '
                     f'gradient that was not finite; the batch of step {step} was: {shown}')
