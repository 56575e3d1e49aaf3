"""Where a token stands: rotary positions with their ways of reaching further, and those that are added.

Rotary positions (Su et al. 2021) turn pairs of a head's entries by an angle that grows with position. The angles
depend on positions alone, so a model makes their sines once for all its layers: on a CPU they take longer than
the turning.
"""
import dataclasses
import math

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Linear:
  """Positions divided by `factor` (Chen et al. 2023)."""
  factor: float
  magnitude = 1.0  # of turned queries and keys

  def frequencies(self, frequency_BH, rope: 'Rope', highest_B1):
    """The frequencies in use, 1H or BH. highest_B1: the highest position of each row so far."""
    return frequency_BH / self.factor


@dataclasses.dataclass(frozen=True)
class Ntk:
  """A base that grows once a row is longer than `original` (NTK-aware scaling, dynamic; bloc97 2023).

  Keys in a cache keep the angles that they got: beyond `original`, decoding differs from one forward pass.
  """
  factor: float
  original: int  # positions trained on
  magnitude = 1.0

  def frequencies(self, frequency_BH, rope, highest_B1):
    longer_B1 = jnp.maximum(highest_B1 + 1, self.original).astype(jnp.float32) / self.original
    width = 2 * frequency_BH.shape[-1]
    base_B1 = rope.base * (self.factor * longer_B1 - (self.factor - 1)) ** (width / (width - 2))
    return base_B1 ** -(jnp.arange(width // 2, dtype=jnp.float32) * 2 / width)[None]


@dataclasses.dataclass(frozen=True)
class Yarn:
  """Slow turns divided by `factor`, quick ones kept, a ramp between (Peng et al. 2023)."""
  factor: float
  original: int  # positions trained on
  quick: float = 32.0  # turns over the `original` from which on a frequency is kept
  slow: float = 1.0  # turns up to which it is divided
  whole: bool = True  # the ramp begins and ends at whole entries
  magnitude: float | None = None  # of turned queries and keys; None: 0.1 log(factor) + 1

  def __post_init__(self):
    if self.magnitude is None:
      object.__setattr__(self, 'magnitude', 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0)

  def frequencies(self, frequency_BH, rope, highest_B1):
    half = frequency_BH.shape[-1]
    entry = lambda turns: half * math.log(self.original / (turns * 2 * math.pi)) / math.log(rope.base)
    low, high = entry(self.quick), entry(self.slow)
    if self.whole:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp_H = np.clip((np.arange(half) - low) / ((high - low) or 0.001), 0, 1)[None]
    return frequency_BH * jnp.asarray(ramp_H / self.factor + 1 - ramp_H, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Llama3:
  """As Yarn, with a ramp over wavelengths (Llama 3.1, Dubey et al. 2024)."""
  factor: float
  original: int  # positions trained on
  slow: float = 1.0  # turns over the `original` up to which a frequency is divided by factor
  quick: float = 4.0  # turns from which on it is kept
  magnitude = 1.0

  def frequencies(self, frequency_BH, rope, highest_B1):
    turns_BH = self.original * frequency_BH / (2 * math.pi)
    kept_BH = jnp.clip((turns_BH - self.slow) / (self.quick - self.slow), 0, 1)
    return frequency_BH * ((1 - kept_BH) / self.factor + kept_BH)


@dataclasses.dataclass(frozen=True)
class LongRope:
  """Every frequency divided by a factor of its own, of `long` once a row exceeds `original` (Ding et al. 2024)."""
  original: int
  short: tuple[float, ...]
  long: tuple[float, ...]
  magnitude: float

  def frequencies(self, frequency_BH, rope, highest_B1):
    if not len(self.short) == len(self.long) == frequency_BH.shape[-1]:
      raise ValueError(f'LongRope has {len(self.short)} short and {len(self.long)} long factors for '
                       f'{frequency_BH.shape[-1]} frequencies')
    factors = (jnp.asarray(x, jnp.float32)[None] for x in (self.long, self.short))
    return frequency_BH / jnp.where(highest_B1 >= self.original, *factors)


@struct.dataclass
class Turns:
  """Cosines and sines of every position's angles, BT1H in float32, for both of a pair; sines as rotate() needs them."""
  cos_BT1H: jax.Array
  sin_BT1H: jax.Array
  neighbours: bool = struct.field(pytree_node=False, default=False)


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions. `local_base` is the base of layers with a window, which are not scaled (Gemma 3, 2025)."""
  base: float = 10_000.0
  share: float = 1.0  # of a head's entries, from the first on; the others do not turn
  neighbours: bool = False  # pairs are (2h, 2h + 1), not (h, h + H/2)
  scaling: Linear | Ntk | Yarn | Llama3 | LongRope | None = None
  local_base: float | None = None

  def __post_init__(self):
    if not 0 < self.share <= 1:
      raise ValueError(f'Rope.share={self.share} must lie between 0 and 1')
    if not self.base > 1:
      raise ValueError(f'Rope.base={self.base} must exceed 1')

  def turned(self, width: int) -> int:
    """How many entries of a head of `width` turn. ValueError if they are no pairs."""
    turned = int(width * self.share)
    if turned % 2 or not turned:
      raise ValueError(f'Rope.share={self.share} of head_width={width} is {turned} entries: rotary positions turn '
                       'pairs')
    return turned

  def turns(self, positions_BT, width: int, *, local: bool = False) -> Turns:
    """The angles position * base**(-2h/H), scaled, of a head of `width`."""
    half = self.turned(width) // 2
    here = Rope(self.local_base) if local and self.local_base is not None else self
    frequency_BH = (here.base ** -(jnp.arange(half, dtype=jnp.float32) / half))[None]
    if here.scaling is not None:
      frequency_BH = here.scaling.frequencies(frequency_BH, here, positions_BT.max(axis=1, keepdims=True))
    angle_BT1H = (positions_BT[..., None].astype(jnp.float32) * frequency_BH[:, None])[:, :, None]
    magnitude = 1.0 if here.scaling is None else here.scaling.magnitude
    sin_BT1H, cos_BT1H = magnitude * jnp.sin(angle_BT1H), magnitude * jnp.cos(angle_BT1H)
    both = jnp.stack if self.neighbours else jnp.concatenate
    flat = lambda first, second: both([first, second], -1).reshape(*first.shape[:-1], 2 * half)
    return Turns(flat(cos_BT1H, cos_BT1H), flat(-sin_BT1H, sin_BT1H), self.neighbours)


@dataclasses.dataclass(frozen=True)
class Learned:
  """A vector a position, added to the embedding (Radford et al. 2019); `offset` rows come before that of position 0."""
  offset: int = 0


@dataclasses.dataclass(frozen=True)
class Sinusoidal:
  """Sines and cosines added to the embedding (Vaswani et al. 2017)."""
  base: float = 10_000.0

  def vectors(self, positions_BT, width: int) -> jax.Array:
    """BTD in float32: sines of D/2 frequencies, then their cosines."""
    half = width // 2
    frequency_D = self.base ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle_BTD = positions_BT[..., None].astype(jnp.float32) * frequency_D[None, None]
    return jnp.concatenate([jnp.sin(angle_BTD), jnp.cos(angle_BTD)], -1)


@dataclasses.dataclass(frozen=True)
class Alibi:
  """Scores fall with distance, by a slope a head (Press et al. 2022)."""

  def slopes(self, heads: int) -> np.ndarray:
    """Of N heads, float32: 2^(-8/n), 2^(-16/n), ... for n the power of two below, then those of 2n, every other."""
    power = 2 ** int(math.log2(heads))
    first = 2.0 ** (-8 / power * np.arange(1, power + 1))
    more = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power) + 1, 2))
    return np.concatenate([first, more]).astype(np.float32)


def rotate(x_BTNH, turns: Turns):
  """Turns the pairs of x by the angles of Rope.turns(), in float32; entries beyond them stay; any number of heads."""
  turned = turns.cos_BT1H.shape[-1]
  y_BTNH, rest_BTNH = x_BTNH[..., :turned].astype(jnp.float32), x_BTNH[..., turned:]
  if turns.neighbours:
    swapped_BTNH = jnp.flip(y_BTNH.reshape(*y_BTNH.shape[:-1], -1, 2), -1).reshape(y_BTNH.shape)
  else:
    swapped_BTNH = jnp.roll(y_BTNH, turned // 2, axis=-1)
  y_BTNH = (y_BTNH * turns.cos_BT1H + swapped_BTNH * turns.sin_BT1H).astype(x_BTNH.dtype)
  return y_BTNH if not rest_BTNH.shape[-1] else jnp.concatenate([y_BTNH, rest_BTNH], -1)
