"""Relative positions as a bias of attention scores: a number a head for each bucket of distances (Raffel et al. 2020).

Near distances have a bucket each, further ones share them, ever more, up to `furthest`; from there on all are alike.
One table serves all layers of a stack.
"""
import dataclasses
import math

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from lmlib.kernels import attention as kernel
from lmlib.nn import layers
from lmlib.nn.places import Places


@dataclasses.dataclass(frozen=True)
class Buckets:
  buckets: int = 32  # shared by both directions where a query sees what comes after it
  furthest: int = 128  # the distance from which on there is one bucket

  def __post_init__(self):
    if not isinstance(self.buckets, int) or self.buckets < 4 or self.buckets % 4:
      raise ValueError(f'Buckets.buckets={self.buckets!r} must be a multiple of 4: halves of both directions')
    if not isinstance(self.furthest, int) or self.furthest <= self.buckets // 2:
      raise ValueError(f'Buckets.furthest={self.furthest!r} must exceed buckets / 2 = {self.buckets // 2}, the '
                       'distances that have a bucket each')

  def bucket(self, ahead, *, causal: bool):
    """The bucket, int32, of each distance `ahead`: the place of a key minus that of its query."""
    count = self.buckets if causal else self.buckets // 2
    exact = count // 2
    distance = np.maximum(np.arange(self.furthest + 1), 1).astype(np.float32)
    # float32, as the checkpoints were trained: a distance at the border of two buckets may round either way.
    shared = exact + np.log(distance / exact) / np.float32(math.log(self.furthest / exact)) * (count - exact)
    table = np.where(np.arange(self.furthest + 1) < exact, distance.astype(int) - (np.arange(self.furthest + 1) < 1),
                     np.minimum(shared.astype(int), count - 1))
    away = jnp.maximum(-ahead, 0) if causal else abs(ahead)
    found = jnp.asarray(table, jnp.int32)[jnp.minimum(away, self.furthest)]
    return found if causal else found + count * (ahead > 0)


class RelativeBias(nn.Module):
  """The bias of the scores of all layers, BKGTS (B is 1 if all rows are alike), zero at first."""
  buckets: Buckets
  heads: int
  kv_heads: int
  causal: bool

  @property
  def sizes(self) -> dict[str, int]:
    return dict(I=self.buckets.buckets, K=self.kv_heads, G=self.heads // self.kv_heads)

  @nn.compact
  def __call__(self, T: int, here: Places):
    rows = here.rows
    if here.coming is not None:
      rows = rows.replace(place_BS=here.coming.places_BS)
    S = T if rows.place_BS is None else rows.place_BS.shape[1]
    place_BT1, place_B1S = kernel.places(T, S, rows)
    bucket_BTS = self.buckets.bucket(place_B1S - place_BT1, causal=self.causal)
    bias_IKG = layers.bias(self, 'distance_bias', 'IKG')
    return jnp.moveaxis(bias_IKG[bucket_BTS], (3, 4), (1, 2))
