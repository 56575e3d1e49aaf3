"""Rows taken from a cache, in any order and several times, go on as they would where they were."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.serve import prompts, weights
from tests.laws import encoders
from tests.laws.models import CONFIGS, made

ROWS = jnp.array([2, 0, 2])
MODELS = {name: (CONFIGS[name], made) for name in ('dense bigrams', 'window', 'latent_moe')} | {
    'encoder_decoder': (encoders.T5, encoders.made)}


@functools.partial(jax.jit, static_argnums=0)
def further(config, params, cache, token_B):
  return config.model().apply({'params': params}, token_B[:, None], None, cache)


@pytest.mark.parametrize('name', [*MODELS, 'apart'])
def test_rows_go_on_as_they_would(name):
  config, new = MODELS['window' if name == 'apart' else name]
  params = new(config)
  if name == 'apart':
    config, params = weights.laid_out(config, params)
  tokens_BT, lengths_B = jnp.arange(1, 25).reshape(3, 8), jnp.array([3, 8, 5])
  _, _, cache = jax.jit(prompts.read, static_argnums=(0, 1, 5))(
      config, 16, params, tokens_BT, lengths_B, 4 if name == 'encoder_decoder' else None)
  token_B = jnp.array([7, 9, 11])
  logits_BTV, after = further(config, params, cache, token_B)
  taken_BTV, taken = further(config, params, cache.take(ROWS), token_B[ROWS])
  np.testing.assert_allclose(taken_BTV, logits_BTV[ROWS], rtol=1e-5, atol=1e-5)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), taken, after.take(ROWS))
  again_BTV, _ = further(config, params, taken, jnp.array([1, 2, 3]))
  assert not np.allclose(again_BTV[0], again_BTV[2]), 'a row that came twice goes on by itself'
