"""What ends a run early: a fault, or a signal after which it is saved."""
import contextlib
import signal


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
