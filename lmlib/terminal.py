"""What a job says while it runs: lines, and below them one live line that a terminal rewrites."""
import sys
import time

EVERY = 10.0  # seconds between two lines of progress where nothing can be rewritten


class Terminal:
  """Lines on a stream. All methods write at once."""

  def __init__(self, out=None):
    self._out, self._open, self._last = out or sys.stdout, False, time.monotonic()

  def progress(self, text: str, *, last: bool = False):
    """Shows how far a job is; without a terminal, only now and then and for the last time."""
    if not self._out.isatty():
      if not last and time.monotonic() - self._last < EVERY:
        return
      self._last = time.monotonic()
    self.line(text)

  def line(self, text: str):
    """Rewrites the live line; without a terminal, a line of its own."""
    terminal = self._out.isatty()
    self._out.write(f'\r{text}\x1b[K' if terminal else f'{text}\n')
    self._out.flush()
    self._open = terminal

  def say(self, text: str):
    """Prints a line of its own, above the live one."""
    self.end()
    self._out.write(text + '\n')
    self._out.flush()

  def end(self):
    if self._open:
      self._out.write('\n')
    self._open = False


def clock(seconds: float) -> str:
  """12 -> '0:12', 3725 -> '1:02:05'."""
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  return f'{hours}:{minute:02}:{second:02}' if hours else f'{minute}:{second:02}'
