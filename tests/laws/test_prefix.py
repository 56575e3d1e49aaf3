"""Prefix and positions of packed rows in a decoder."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.train.losses import NextToken
from tests.laws.models import MAIN, made, tokens
from tests.laws.test_models import CLOSE, apply, logits

configs = pytest.mark.parametrize('config', MAIN.values(), ids=MAIN.keys())


@functools.partial(jax.jit, static_argnums=0)
def hidden(config, params, tokens_BT, segments_BT, positions_BT=None, prefix_BT=None):
  return config.model().apply({'params': params}, tokens_BT, segments_BT, None, None, positions_BT, prefix_BT,
                              method='hidden')[0]


@configs
def test_earlier_places_see_the_prefix_of_their_document_alone(config):
  """Changing a token of the prefix changes what comes before it, in its document and in no other."""
  params, changed = made(config), [(2, range(5)), (6, range(5, 10)), (3, (3, 4)), (8, (8, 9))]
  tokens_BT = jnp.repeat(tokens(config, 1, 10), 5, axis=0)
  for b, (place, _) in enumerate(changed, 1):
    tokens_BT = tokens_BT.at[b, place].set((tokens_BT[b, place] + 1) % config.vocab)
  segments_BT = jnp.array([[1] * 5 + [2] * 5] * 5)
  prefix_BT = jnp.array([[1, 1, 1, 0, 0, 1, 1, 0, 0, 0]] * 5)
  out_BTD = hidden(config, params, tokens_BT, segments_BT, None, prefix_BT)
  for b, (_, reached) in enumerate(changed, 1):
    assert np.flatnonzero(np.abs(out_BTD[b] - out_BTD[0]).max(-1) > 1e-7).tolist() == list(reached)


@configs
def test_positions_that_restart_change_nothing_but_rounding(config):
  """Rotary positions are relative, so a document's own count gives what the row's count gives."""
  params, tokens_BT = made(config), tokens(config, 2, 12)
  segments_BT = jnp.array([[1] * 5 + [2] * 7] * 2)
  positions_BT = jnp.array([[*range(5), *range(7)]] * 2)
  np.testing.assert_allclose(hidden(config, params, tokens_BT, segments_BT, positions_BT),
                             hidden(config, params, tokens_BT, segments_BT), **CLOSE)
  stretched = hidden(config, params, tokens_BT, segments_BT, 3 * positions_BT)
  assert np.abs(stretched - hidden(config, params, tokens_BT, segments_BT)).max() > 1e-3


@configs
def test_a_cache_takes_neither(config):
  with pytest.raises(ValueError, match='a cache counts for itself'):
    config.model().apply({'params': made(config)}, tokens(config, 1, 3), None, config.cache(1, 4), None,
                         jnp.zeros((1, 3), int), method='hidden')


def test_the_loss_uses_the_prefix_and_refuses_what_it_cannot_use():
  config = MAIN['dense']
  params, tokens_BT = made(config), tokens(config, 2, 8)
  batch = {'tokens_BT': tokens_BT, 'targets_BT': tokens_BT, 'segments_BT': jnp.ones((2, 8), int),
           'weight_BT': jnp.ones((2, 8))}
  loss = jax.jit(NextToken().of(config))
  plain, marked = (loss(params, batch | more)[0] for more in ({}, {'prefix_BT': jnp.ones((2, 8), int)}))
  assert abs(plain - marked) > 1e-3
  np.testing.assert_allclose(loss(params, batch | {'prefix_BT': jnp.zeros((2, 8), int)})[0], plain, rtol=1e-6)
  with pytest.raises(ValueError, match='does not read inner_BT, targets_BTJ'):
    loss(params, batch | {'inner_BT': tokens_BT, 'targets_BTJ': tokens_BT[..., None]})
  assert logits(config, params, tokens_BT).shape == (2, 8, config.vocab)
  assert apply(config, params, tokens_BT)[1] is None
