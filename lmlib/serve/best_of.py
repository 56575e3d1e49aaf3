"""The best of several draws, as a setting beside Beams and Contrastive."""
import dataclasses

from lmlib.serve.generate import Continuation, best_of
from lmlib.serve.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class BestOf:
  """Of `copies` draws the likeliest on average: see generate.best_of()."""
  copies: int = 4

  def __post_init__(self):
    if not isinstance(self.copies, int) or self.copies < 1:
      raise ValueError(f'BestOf.copies={self.copies!r} must be a positive integer')

  def best(self, config, params, prompts, how: Sampling, **settings) -> list[Continuation]:
    return best_of(config, params, prompts, how, copies=self.copies, **settings)
