"""Stages of layers: the same numbers as on one device, whatever passes them how."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding
from lmlib.models import protocol
from lmlib.nn import pipeline
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.moe import Experts
from lmlib.nn.router import TopK
from lmlib.sharding import Layout, Pipeline
from lmlib.train import losses
from tests.laws.models import CONFIGS, executed, made

deep = lambda name, **changes: dataclasses.replace(CONFIGS[name], **{'layers': 4, **changes})
MODELS = {
    'dense': executed(deep('dense'), dropout=0.3),
    'dense remat': executed(deep('dense'), scan=False, remat='full'),
    'sandwich': executed(deep('sandwich'), remat='dots'),
    'moe': deep('moe', heads=2, experts=Experts(4, 16, TopK(2, balanced=True, balance_loss=0.01, z_loss=0.01,
                                                            capacity=1.5))),
}


def batch(rows: int, T: int = 8):
  """Packed rows of up to three documents, padded, with numbers that dropout draws by."""
  random = np.random.default_rng(0)
  segments_BT = np.sort(random.integers(1, 4, (rows, T)), 1)
  segments_BT[::3, -2:] = 0
  ids = lambda: random.integers(0, 61, (rows, T)).astype(np.int32)
  return {'tokens_BT': ids(), 'targets_BT': ids(), 'segments_BT': segments_BT.astype(np.int32),
          'weight_BT': (segments_BT > 0).astype(np.float32), 'row_B': np.arange(rows, dtype=np.int32)}


@functools.partial(jax.jit, static_argnums=0)
def differentiated(config, params, batch):
  """((loss, (its weight, metrics)), gradients)."""
  loss = losses.NextToken(z_loss=0.01).of(config)

  def summed(params):
    total, *rest = loss(params, batch)
    return total, rest

  return jax.value_and_grad(summed, has_aux=True)(params)


@functools.cache
def alone(config, rows: int):
  """What one device makes of it."""
  return jax.device_get(differentiated(config, made(config), batch(rows)))


def on(layout, config, rows: int):
  with sharding.use(layout):
    params = jax.device_put(made(config), sharding.shardings(protocol.boxed(config)))
    return jax.device_get(differentiated(config, params, sharding.placer()(batch(rows))))


def assert_equal(found, wanted):
  """Equal but for the order of float32 sums, a hundred roundings of each array's largest entry."""
  compare = lambda path, a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max() + 1e-7,
                                                          err_msg=jax.tree_util.keystr(path))
  jax.tree_util.tree_map_with_path(compare, found, wanted)


@pytest.mark.parametrize('model,layout', [
    ('dense', Layout(stage=2, fsdp=2, tensor=2)),
    ('dense remat', Layout(stage=4, fsdp=2, pipeline=Pipeline(1))),
    ('dense remat', Layout(stage=2, data=4, pipeline=Pipeline(2, rounds=2))),
    ('sandwich', Layout(stage=2, context=2, data=2, pipeline=Pipeline(4, rounds=2))),
    ('moe', Layout(stage=2, fsdp=4)),
], ids=lambda x: str(x))
def test_stages_equal_one_device(model, layout):
  assert_equal(on(layout, MODELS[model], 16), alone(MODELS[model], 16))
