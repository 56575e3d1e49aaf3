"""Which implementation of an operation runs: the one that was asked for if it can, or the fastest proven one."""
import contextlib
import functools
import logging

logger = logging.getLogger('lmlib.kernels')


def chosen(operation: str, asked: str, auto, lacking: dict, case: tuple) -> str:
  """The name of an implementation for a case, the arguments of what `lacking` holds.

  lacking: of each implementation a function (*case) -> names of what it cannot do; auto: a function (*case) ->
  name, for asked='auto', whose choice is logged once. ValueError if `asked` is none of them, or cannot do the case (or
  what was chosen cannot): it says what is lacking and which can.
  """
  if asked not in ('auto', *lacking):
    raise ValueError(f'{operation} implementation={asked!r} is none of {sorted(lacking)}')
  name = auto(*case) if asked == 'auto' else asked
  if missing := lacking[name](*case):
    able = ', '.join(repr(name) for name in sorted(lacking) if not lacking[name](*case))
    raise ValueError(f'{operation} implementation={name!r} cannot do {", ".join(missing)}; {able or "none"} can')
  if asked == 'auto' and logger.isEnabledFor(logging.INFO):
    said(operation, name)
  return name


@functools.cache
def said(operation: str, name: str):
  """Logs it, the first time that somebody listens."""
  logger.info('%s by %r', operation, name)


class _Lines(logging.Handler):

  def __init__(self, say):
    super().__init__(logging.INFO)
    self.emit = lambda record: say(f'kernel      {record.getMessage()}')


@contextlib.contextmanager
def saying(say):
  """Choices made inside for the first time are lines of say(text)."""
  lines, level, propagate = _Lines(say), logger.level, logger.propagate
  logger.addHandler(lines)
  logger.setLevel(logging.INFO)
  logger.propagate = False  # what says it here need not say it to standard error too
  try:
    yield
  finally:
    logger.removeHandler(lines)
    logger.setLevel(level)
    logger.propagate = propagate
