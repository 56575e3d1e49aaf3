"""Profiles of chosen steps, as TensorBoard and xprof read them: told before, or asked for while a run goes on."""
from collections.abc import Callable
import dataclasses
import pathlib

import jax

from lmlib import processes

ASK = 'profile'  # the file in WORKDIR that is touched to ask for one


@dataclasses.dataclass(frozen=True)
class Profile:
  """Which steps are traced: `steps` of them, from step `first` on, and whenever WORKDIR/profile is touched."""
  first: int | None = None
  steps: int = 3

  def __post_init__(self):
    for name in ('first', 'steps'):
      value = getattr(self, name)
      if not (value is None and name == 'first') and (not isinstance(value, int) or value < 1):
        raise ValueError(f'Profile.{name}={value!r} must be a positive integer')


class Traces:
  """Traces steps into <workdir>/profile_<first step>. Every process traces itself, of several into process_<number>.

  The profiler names a file by its machine, so that two processes of one machine need folders of their own.
  """

  def __init__(self, profile: Profile, workdir: pathlib.Path, say: Callable[[str], None]):
    self._profile, self._workdir, self._say = profile, workdir, say
    self._asked, self._last = self._touched(), None

  def before(self, number: int):
    """Step `number` is about to begin."""
    asked, self._asked = self._asked, self._touched()
    if self._last is None and (number == self._profile.first or self._asked not in (asked, None)):
      self._first, self._last = number, number + self._profile.steps - 1
      jax.profiler.start_trace(str(self._folder))

  def after(self, number: int):
    """Step `number` is done."""
    if self._last is not None and number >= self._last:
      self._stop(number)

  def close(self):
    """Ends a trace whose steps did not all come."""
    if self._last is not None:
      self._stop(self._last)

  @property
  def _folder(self) -> pathlib.Path:
    folder = self._workdir / f'profile_{self._first}'
    return folder if processes.count() == 1 else folder / f'process_{processes.number()}'

  def _stop(self, last: int):
    self._last = None
    jax.profiler.stop_trace()
    self._say(f'profile     steps {self._first} to {last} are in {self._folder}')

  def _touched(self) -> int | None:
    try:
      return (self._workdir / ASK).stat().st_mtime_ns
    except FileNotFoundError:
      return None
