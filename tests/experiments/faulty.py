"""Faults for tests, named by a gin file: a loss that is not a number for chosen rows, and data that do not come."""
import dataclasses
import time

import jax.numpy as jnp

from lmlib.data.packing import Split
from lmlib.train.losses import NextToken


@dataclasses.dataclass(frozen=True)
class Spikes:
  """NextToken, but NaN where the batch holds one of `rows`, numbers as in row_B."""
  rows: tuple[int, ...]

  def of(self, config):
    inner = NextToken().of(config)

    def loss(params, batch):
      total, weight, metrics = inner(params, batch)
      bad = jnp.isin(batch['row_B'], jnp.array(self.rows, jnp.uint32)).any()
      return total * jnp.where(bad, jnp.nan, 1.0), weight, metrics

    return loss


@dataclasses.dataclass(frozen=True)
class Stuck(Split):
  """Split, but rows from number `row` on, in the order of training, never come."""
  row: int = 0

  def of(self, store, length, seed):
    rows = super().of(store, length, seed)
    raw = rows.raw

    def stuck(visit_B, ahead):
      while visit_B.max() >= self.row:
        time.sleep(60)
      return raw(visit_B, ahead)

    rows.raw = stuck
    return rows
