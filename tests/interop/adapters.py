"""Small trees for tests of adapters."""
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmlib.models import protocol
from lmlib.nn import adapters


def drawn(shapes, seed: int, size: float):
  """Numbers drawn by numpy, so that nothing compiles; scales near 1."""
  draw = np.random.default_rng(seed)
  leaf = lambda path, x: jnp.asarray((path[-1].key == 'scale') + size * draw.normal(size=x.shape).astype(np.float32))
  return jax.tree_util.tree_map_with_path(leaf, shapes)


def small(config, method, seed: int = 1, size: float = 0.2):
  """A tree of a method for a model."""
  return drawn(nn.unbox(adapters.boxed(method, protocol.boxed(config))), seed, size)
