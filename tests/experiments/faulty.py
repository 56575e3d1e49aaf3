"""A loss for tests, named by a gin file, that is not a number for chosen rows."""
import dataclasses

import jax.numpy as jnp

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
