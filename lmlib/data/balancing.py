"""How often to draw from each source: proportional to size to the power 1 / temperature.

Temperature 1 draws by size, and a high one from all alike, so that a small language is seen more often than
its share of the text (Devlin et al. 2018 for multilingual BERT, with 1/T = 0.7; Conneau et al. 2020 for XLM-R,
0.3). No source is repeated more than a number of epochs: what a small one may not give, the others give.
"""
from collections.abc import Mapping
import dataclasses
from fractions import Fraction
import math

PARTS = 1_000_000  # rates are whole numbers of these


@dataclasses.dataclass(frozen=True)
class Balance:
  """How to draw from sources of given sizes."""
  temperature: float = 1.0
  epochs: float | None = None  # most times that a source is read; needs to be known how much is drawn in all
  parts: int = PARTS

  def __post_init__(self):
    if not 0 < self.temperature < math.inf:
      raise ValueError(f'Balance.temperature={self.temperature} must be above 0')
    if self.epochs is not None and not 0 < self.epochs < math.inf:
      raise ValueError(f'Balance.epochs={self.epochs} must be above 0; None sets no limit')
    if self.parts < 1:
      raise ValueError(f'Balance.parts={self.parts} must be at least 1')

  def rates(self, sizes: Mapping[str, int], total: int | None = None) -> dict[str, Fraction]:
    """The share of each source in what is drawn: fractions of `parts`, which add up to exactly 1.

    `sizes` are tokens, or any other unit, of each source, and `total` what is drawn in all in that unit.
    ValueError for an empty source, or if the sources cannot give `total` in so many epochs.
    """
    if not sizes or min(sizes.values()) <= 0:
      raise ValueError(f'Balance: sources of sizes {dict(sizes)}; each must hold something')
    if (total is None) != (self.epochs is None):
      raise ValueError(f'Balance.epochs={self.epochs} and total={total}: a limit needs both, and no limit neither')
    if len(sizes) > self.parts:
      raise ValueError(f'Balance.parts={self.parts} for {len(sizes)} sources')
    if total is not None and sum(sizes.values()) * self.epochs < total:
      raise ValueError(f'Balance.epochs={self.epochs} of {sum(sizes.values()):,} in all sources are fewer than '
                       f'the {total:,} that are to be drawn')
    largest = max(sizes.values())
    weights = {name: (size / largest) ** (1 / self.temperature) for name, size in sizes.items()}
    most = {name: Fraction(self.parts) if total is None else
            min(Fraction(self.parts), Fraction(size) * Fraction(self.epochs) * self.parts / total)
            for name, size in sizes.items()}
    parts = apportioned(weights, most, self.parts)
    if never := [name for name in sizes if not parts[name]]:
      raise ValueError(f'Balance.parts={self.parts}: {", ".join(never)} would get less than one part, which is never')
    return {name: Fraction(parts[name], self.parts) for name in sizes}


def apportioned(weights: Mapping[str, float], most: Mapping[str, Fraction], parts: int) -> dict[str, int]:
  """Whole numbers of parts, proportional to the weights as far as none gets more than its most.

  By largest remainders, ties by name. The sum of `most` is at least `parts`. Where its whole parts are fewer,
  those that lose most by rounding get one more part, which is above their most by less than one.
  """
  capped, left = {}, parts
  while True:  # who would exceed gets its most, and the others share the rest
    free = {name: weight for name, weight in weights.items() if name not in capped}
    scale = left / sum(free.values()) if free else 0.0
    over = {name: math.floor(most[name]) for name, weight in free.items() if weight * scale > most[name]}
    if not over:
      break
    capped |= over
    left -= sum(over.values())
  exact = {name: weight * scale for name, weight in free.items()} or most
  result = capped | {name: math.floor(value) for name, value in exact.items()}
  rest = parts - sum(result.values())
  for name in sorted(exact, key=lambda name: (math.floor(exact[name]) - exact[name], name))[:rest]:
    result[name] += 1
  return result
