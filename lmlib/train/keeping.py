"""Which checkpoints of a run stay on disk."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Keep:
  """The newest stay, those of every so many steps, and the best by a score of the run's evaluations.

  A checkpoint goes only when a newer one is complete.
  """
  newest: int = 2
  every: int | None = None  # of these steps all stay: 1000 keeps 1000, 2000, ...
  best: str | None = None  # such as 'perplexity/bits_per_byte', a name of evaluations.jsonl
  highest: bool = False  # whether more of it is better
  slow: float = 600.0  # seconds of writing after which it is said what all threads do

  def __post_init__(self):
    for name in ('newest', 'every'):
      value = getattr(self, name)
      if not (isinstance(value, int) and not isinstance(value, bool) and value > 0) and not (
          name == 'every' and value is None):
        raise ValueError(f'keep={value!r} must be a positive number of checkpoints' if name == 'newest' else
                         f'Keep.every={value!r} must be a positive number of steps')
    if self.highest and self.best is None:
      raise ValueError('Keep.highest=True has no effect with Keep.best=None: say of which score')
    if self.slow <= 0:
      raise ValueError(f'Keep.slow={self.slow} must be a positive number of seconds')

  def going(self, steps: list[int], scores: dict[int, float]) -> list[int]:
    """Of complete checkpoints, oldest first, those that nothing keeps; scores: by step, of what `best` names."""
    staying = {*steps[-self.newest:], *(step for step in steps if self.every and step % self.every == 0)}
    if scored := [step for step in steps if step in scores]:
      staying.add((max if self.highest else min)(scored, key=scores.__getitem__))
    return [step for step in steps if step not in staying]

  def most(self, steps: int) -> int:
    """How many there are at most in a run of so many steps."""
    return self.newest + (steps // self.every if self.every else 0) + (self.best is not None)


def of(keep: int | Keep) -> Keep:
  """A number stands for the newest."""
  return keep if isinstance(keep, Keep) else Keep(keep)


def checked(keep: int | Keep, evaluations, save_every: int, evaluate_every: int | None) -> Keep:
  """of(keep). ValueError if no evaluation, or only one of steps that are not saved, gives the score it goes by."""
  keep = of(keep)
  if keep.best is None:
    return keep
  names = [one.name for one in evaluations]
  if keep.best.split('/')[0] not in names:
    raise ValueError(f'Keep.best={keep.best!r} is of no evaluation of this run: {", ".join(names) or "there are none"}')
  if evaluate_every % save_every:
    raise ValueError(f'Keep.best={keep.best!r} needs a checkpoint of every step that is evaluated, but '
                     f'evaluate_every={evaluate_every} is no multiple of save_every={save_every}')
  return keep
