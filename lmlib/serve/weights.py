"""The weights of a model, laid out once for decoding many tokens with them."""
import dataclasses

import jax
import jax.numpy as jnp

from lmlib import trees
from lmlib.models import protocol


def laid_out(config: protocol.Config, params) -> tuple[protocol.Config, dict]:
  """The same model with every layer's weights in arrays of their own, and with a table of its own that scores.

  A product with one token's activations takes as long as reading the weights. Of stacked weights XLA on CPU copies
  a layer's first, and a tied table it reads across its rows. Takes as much memory again as the weights do.
  """
  execution = dataclasses.replace(config.execution, scan=False, apart=True, remat=None, dropout=None)
  tied = config.ends.tied
  params = _apart(params) | ({'output': jnp.array(params['embedding'].T)} if tied else {})
  return dataclasses.replace(config, execution=execution, ends=dataclasses.replace(config.ends, tied=False)), params


def _apart(tree):
  """A tree of weights in which what lies stacked under 'blocks' lies under the number of each layer."""
  if not isinstance(tree, dict):
    return tree
  return {key: _numbered(value) if key == trees.BLOCKS else _apart(value) for key, value in tree.items()}


def _numbered(stacked) -> dict:
  layers = jax.tree.leaves(stacked)[0].shape[0]
  return {str(i): jax.tree.map(lambda x: jnp.array(x[i]), stacked) for i in range(layers)}  # noqa: B023
