"""Eight devices equal one, wherever tokens and experts are: values, sums and all gradients.

A part of all layers and layouts; dispatch_matrix.py has the others.
"""
import functools
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding
from lmlib.models import moe
from lmlib.nn import dispatch
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.moe import Experts, MixtureOfExperts
from lmlib.nn.places import places
from lmlib.nn.router import ExpertChoice, TopK
from lmlib.sharding import Layout
from tests.laws.models import made

B, T, D, F, E = 8, 8, 16, 8, 8
RANDOM = np.random.default_rng(0)
X_BTD = RANDOM.normal(size=(B, T, D)).astype(np.float32)
DRAWN_BTD = RANDOM.normal(size=(B, T, D)).astype(np.float32)
PACKED_BT = np.cumsum(RANDOM.random((B, T)) < 0.3, axis=1, dtype=np.int32) + 1
PACKED_BT[np.arange(T)[None] >= RANDOM.integers(3, T + 1, (B, 1))] = 0
PACKED_BT[5] = 0  # a row of padding
PLAIN = MlpStyle('relu', gated=False)
LAYERS = {
    'dropless': Experts(E, F, TopK(2, balance_loss=0.1, balance_over='batch', z_loss=0.1), shared=8),
    'DeepSeek-V3': Experts(E, F, TopK(3, score='sigmoid', groups=4, groups_chosen=2, group_best=2, balanced=True,
                                      balance_loss=0.1), shared=8),
    'limited': Experts(E, F, TopK(2, capacity=0.5, score='sigmoid', balanced=True)),
    'expert choice': Experts(E, F, ExpertChoice(2.0)),
    'GPT-OSS': Experts(E, F, TopK(2, bias=True), style=MlpStyle('gelu_sigmoid', bias=True), limit=0.5),
    'uneven': Experts(E, F, TopK(2, bias=True, balance_loss=0.1), style=PLAIN),
}
LAYOUTS = {'experts': Layout(data=1, expert=8), 'data': Layout(data=2, expert=4),
           'rows': Layout(data=2, context=2, expert=2), 'all': Layout(data=1, expert=2, fsdp=2, tensor=2),
           'no experts': Layout(data=2, fsdp=2, tensor=2)}


@functools.cache
def program(name: str, rows: int = B, trips: str = 'usual'):
  """A compiled function (weights, x_BTD, segments_BT) -> (output, sums, gradients of all losses) of a layer.

  trips: what stands for the constants of dispatch that it is made with.
  """
  layer = MixtureOfExperts(D, LAYERS[name])

  def total(params, x_BTD, segments_BT):
    y_BTD, sums = layer.apply({'params': params}, x_BTD, places(segments_BT, segments_BT))
    auxiliary_B = sums.get('auxiliary_B', jnp.zeros(1))
    return (y_BTD * DRAWN_BTD[:rows]).sum() + (auxiliary_B * jnp.arange(1, len(auxiliary_B) + 1)).sum(), (y_BTD, sums)

  @jax.jit
  def run(params, x_BTD, segments_BT):
    gradients, (y_BTD, sums) = jax.grad(total, (0, 1), has_aux=True)(params, x_BTD, segments_BT)
    return y_BTD, sums, gradients

  return run


@functools.cache
def weights(name: str):
  layer, here = MixtureOfExperts(D, LAYERS[name]), places(PACKED_BT, PACKED_BT)
  params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), X_BTD, here)['params'])
  return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)


def computed(name: str, layout: str | None, rows: int = B, trips: str = 'usual', changed=()):
  """What program() finds; `changed`: weights in the place of its own."""
  run, params, given = program(name, rows, trips), weights(name) | dict(changed), (X_BTD[:rows], PACKED_BT[:rows])
  if layout is None:
    return jax.device_get(run(params, *given))
  with sharding.use(LAYOUTS[layout]):
    placed = sharding.placer()({'x_BTD': given[0], 'segments_BT': given[1]})
    return jax.device_get(run(params, placed['x_BTD'], placed['segments_BT']))


def assert_equal(found, expected):
  for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected)):
    # Of float32, summed in other orders; relative to the largest, for sums of both signs cancel.
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1e-3, np.abs(b).max()), err_msg=str(path))


@pytest.mark.parametrize(('name', 'layout'), [
    ('dropless', 'experts'), ('dropless', 'rows'), ('dropless', 'all'), ('dropless', 'no experts'),
    ('DeepSeek-V3', 'data'), ('limited', 'rows'), ('limited', 'all'), ('expert choice', 'rows'), ('GPT-OSS', 'all')])
def test_eight_devices_equal_one(name, layout):
  assert_equal(computed(name, layout), computed(name, None))


@pytest.mark.parametrize('layout', ['experts', 'all'])
def test_loads_however_uneven(layout, monkeypatch):
  """All tokens for two devices or one, ties, and what comes at random: in as many trips as that takes."""
  monkeypatch.setattr(dispatch, 'LEAST', 1)
  monkeypatch.setattr(dispatch, 'ROOM', 0.7)
  router_DE, zero_E = weights('uneven')['router'], np.zeros(E, np.float32)
  cases = [(0 * router_DE, zero_E), (router_DE, zero_E + 50 * np.isin(np.arange(E), (5, 6)))]
  cases += [(router_DE, np.random.default_rng(seed).normal(size=E).astype(np.float32) * 3) for seed in range(4)]
  fullest = []
  for router_DE, bias_E in cases:
    changed = {'router': router_DE, 'router_bias': jnp.asarray(bias_E, jnp.float32)}
    found = computed('uneven', layout, B, 'short', changed)
    assert_equal(found, computed('uneven', None, B, 'short', changed))
    load_E, even = found[1]['expert_load_E']
    fullest.append((load_E / even).max())
  assert fullest[0] == fullest[1] == E / 2  # every token
  assert 1.5 < min(fullest) < E / 2


def test_rows_that_no_device_gets_alone():
  """Two rows on eight devices: all have both, and each adds what its experts and their biases make of them."""
  assert_equal(computed('GPT-OSS', 'data', 2), computed('GPT-OSS', None, 2))


@pytest.mark.parametrize('rows', [8, 2])
def test_decoding(rows):
  """A prompt and a token after it, with rows for every device or fewer."""
  config = moe.Config(vocab=31, layers=1, width=16, heads=2, kv_heads=2, head_width=8,
                      experts=Experts(8, 8, style=PLAIN))
  params, tokens_BT = made(config), np.random.default_rng(1).integers(0, 31, (rows, 5), np.int32)

  @jax.jit
  def run(params, tokens_BT):
    apply = lambda tokens_BT, cache: config.model().apply({'params': params}, tokens_BT, None, cache)
    _, cache, *_ = apply(tokens_BT[:, :4], config.cache(rows, 6))
    return apply(tokens_BT[:, 4:], cache)[0]

  expected = run(params, tokens_BT)
  with sharding.use(LAYOUTS['data']):
    found = run(params, sharding.placer()({'tokens_BT': tokens_BT})['tokens_BT'])
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_experts_that_devices_cannot_share_are_refused():
  layer = MixtureOfExperts(D, Experts(6, F))
  with (pytest.raises(ValueError, match=re.escape(
      'Layout.expert=4 does not divide the moe.Experts.count=6 experts: expert=2 does, with 2 times as many devices')),
        sharding.use(LAYOUTS['data'])):
    jax.eval_shape(lambda: layer.init(jax.random.key(0), X_BTD, places(PACKED_BT, PACKED_BT)))
