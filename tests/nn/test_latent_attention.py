"""Latent attention: scores in the latent are those of the keys that it stands for; what a cache keeps."""
import dataclasses
import functools

import jax
import numpy as np
import pytest

from lmlib.models import latent_moe
from lmlib.nn.latent_attention import LatentStyle
from tests.laws.models import CONFIGS, made, tokens

CONFIG = CONFIGS['latent_moe']


@functools.partial(jax.jit, static_argnums=(0, 3))
def decoded(config, params, tokens_BT, absorbed):
  """Logits of the last 3 tokens, read at once after the others."""
  model = config.model()
  _, cache = model.apply({'params': params}, tokens_BT[:, :-3], None, config.cache(tokens_BT.shape[0], 12))
  return model.apply({'params': params}, tokens_BT[:, -3:], None, cache)[0]


def test_absorbed_equals_plain(monkeypatch):
  params, tokens_BT, found = made(CONFIG), tokens(CONFIG, 2, 10), {}
  for absorbed in (True, False):
    seen = []
    monkeypatch.setattr(LatentStyle, 'absorbs', lambda *_, absorbed=absorbed, seen=seen: seen.append(1) or absorbed)
    found[absorbed] = decoded(CONFIG, params, tokens_BT, absorbed)
    assert seen
  full = jax.jit(lambda p: CONFIG.model().apply({'params': p}, tokens_BT)[0])(params)[:, -3:]
  for absorbed, logits_BTV in found.items():
    # float32 sums in another order, as in laws/test_models.
    np.testing.assert_allclose(logits_BTV, full, rtol=1e-5, atol=1e-5, err_msg=f'{absorbed=}')
  assert not np.array_equal(found[True], found[False]), 'one way was taken twice'


def test_few_queries_are_scored_in_the_latent_and_many_against_keys():
  style = LatentStyle()  # the sizes of DeepSeek
  assert style.absorbs(1, 1000)
  assert not style.absorbs(1000, 1000)


def test_a_cache_keeps_latents_and_turned_keys_alone():
  """In one array a stack; those of DeepSeek, 576 wide, with zeros up to 640, which a TPU reads where they lie."""
  style = CONFIG.attention
  for config, width in ((CONFIG, style.rank + style.turned_width),
                        (dataclasses.replace(CONFIG, attention=LatentStyle()), 640)):
    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(lambda config=config: config.cache(3, 20)).layers)]
    assert shapes == [(1, 3, 1, 20, width)] * 2  # of dense layers, of the others


@pytest.mark.parametrize(('settings', 'said'), [
    (dict(dense_layers=2), 'dense_layers=2 must be less than layers=2'), (dict(future=-1), 'future=-1'),
    (dict(positions=None), 'positions=None must be a Rope'), (dict(heads=0), 'latent_moe.Config.heads=0'),
    (dict(attention=LatentStyle(turned_width=7)), 'rotary positions turn pairs')])
def test_settings_that_cannot_be_are_refused(settings, said):
  with pytest.raises(ValueError) as error:  # noqa: PT011, looked at below
    latent_moe.Config(**settings)
  assert said in str(error.value)


def test_styles_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match='q_rank=0 must be'):
    LatentStyle(q_rank=0)
