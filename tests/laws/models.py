"""The models that every law is tried on: one small config an architecture."""
import functools

import jax
import numpy as np

from lmlib.models import dense, protocol

CONFIGS = {
    'dense': dense.Config(vocab=61, layers=2, width=32, hidden=48, heads=4, kv_heads=2, head_width=8, length=32),
    'dense untied': dense.Config(vocab=61, layers=3, width=32, hidden=48, heads=2, kv_heads=2, head_width=8,
                                 length=32, tied=False),
    'dense bigrams': dense.Config(vocab=61, layers=2, width=32, hidden=48, heads=2, kv_heads=2, head_width=8,
                                  length=32, tied=False, bigrams=97),
}


@functools.cache
@functools.partial(jax.jit, static_argnums=(0, 1))
def made(config, seed: int = 0):
  """Weights with every norm's scale away from 1, so that no law holds by accident."""
  leaves, tree = jax.tree.flatten(protocol.new(config, jax.random.key(seed)))
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  return jax.tree.unflatten(tree, [x * (1 + 0.2 * jax.random.normal(k, x.shape)) for x, k in zip(leaves, keys)])


def tokens(config, B: int, T: int, seed: int = 2):
  return jax.numpy.asarray(np.random.default_rng(seed).integers(0, config.vocab, (B, T), np.int32))
