"""What ends a run early: signals, and numbers that stay non-finite."""
import signal

IN_A_ROW = 10  # non-finite steps in a row that stop a run


class RunFault(RuntimeError):
  """Something that only the running job could know; the message is what the user reads."""
  exit_status = 1


class Stopped(Exception):  # noqa: N818: not an error
  """The run was asked to stop, has saved, and goes on when the same command is run again."""
  exit_status = 75


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
    self._say(f'{self.received}: saving after this step (again to stop without saving)')


class NonFinite:
  """Counts steps whose loss or gradient was not finite; raises RunFault at IN_A_ROW of them."""

  def __init__(self, describe, say=print):
    self._describe, self._say = describe, say
    self._in_a_row = 0

  def see(self, step: int, finite: bool):
    """`step` is the number of the step; describe(step) names what was in its batch."""
    self._in_a_row = 0 if finite else self._in_a_row + 1
    if finite:
      return
    self._say(f'step {step}: loss or gradient not finite, step skipped ({self._in_a_row} in a row)')
    if self._in_a_row == IN_A_ROW:
      raise RunFault(f'{IN_A_ROW} steps in a row, {step - IN_A_ROW + 1} to {step}, had a loss or gradient that '
                     f'was not finite; the batch of step {step} was: {"; ".join(self._describe(step))}')
