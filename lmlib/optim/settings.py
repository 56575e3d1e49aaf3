"""The ranges that settings of schedules and optimizers must lie in, each with one wording."""
import math


def full_name(config, name: str) -> str:
  """The setting as a gin file writes it, such as 'adamw.AdamW.clip'."""
  return f'{type(config).__module__.rpartition(".")[2]}.{type(config).__name__}.{name}'


def _number(value) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def positive(config, *names: str):
  """Raises ValueError unless each is a finite number above 0."""
  for name in names:
    if not _number(value := getattr(config, name)) or value <= 0:
      raise ValueError(f'{full_name(config, name)}={value!r} must be a number above 0')


def positive_or_none(config, *names: str):
  """Raises ValueError unless each is None, which turns it off, or a finite number above 0."""
  for name in names:
    if (value := getattr(config, name)) is not None and (not _number(value) or value <= 0):
      raise ValueError(f'{full_name(config, name)}={value!r} must be a number above 0; None turns it off')


def share(config, *names: str):
  """Raises ValueError unless each is at least 0 and less than 1."""
  for name in names:
    if not _number(value := getattr(config, name)) or not 0 <= value < 1:
      raise ValueError(f'{full_name(config, name)}={value!r} must be at least 0 and less than 1')


def whole(config, least: int, *names: str):
  """Raises ValueError unless each is a whole number of at least `least`."""
  for name in names:
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
      raise ValueError(f'{full_name(config, name)}={value!r} must be a whole number of at least {least}')


def choice(config, name: str, choices: tuple[str, ...]):
  """Raises ValueError unless the setting is one of `choices`."""
  if (value := getattr(config, name)) not in choices:
    raise ValueError(f'{full_name(config, name)}={value!r} must be one of {choices}')
