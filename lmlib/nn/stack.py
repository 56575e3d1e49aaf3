"""Equal blocks one after another: one set of stacked weights, scanned or unrolled, with or without remat."""
from flax import linen as nn
import jax

# What the backward pass finds in memory; the rest it computes again.
REMAT = {
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # results of matrix products with weights
    'full': jax.checkpoint_policies.nothing_saveable,                  # the input of every block
}


def stack(block: type[nn.Module], layers: int, *, scan: bool, remat: str | None, shared: int):
  """`layers` copies of `block`, called as (x, per_layer, *shared) -> (x, per_layer).

  Weights and per_layer trees carry a leading axis L; the last `shared` arguments go to every block
  as they are. Unrolled (scan=False) compiles longer and sometimes runs faster; the weights,
  and up to rounding the numbers, are the same.
  """
  if remat is not None:
    block = nn.remat(block, policy=REMAT[remat], prevent_cse=not scan)
  return nn.scan(block, length=layers, unroll=1 if scan else layers,
                 variable_axes={'params': 0}, split_rngs={'params': True},
                 in_axes=(0, *(nn.broadcast,) * shared), metadata_params={nn.PARTITION_NAME: 'L'})
