"""Eight devices equal one, wherever tokens and experts are: values, sums and all gradients."""
import functools
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding
from lmlib.nn import dispatch
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.moe import Experts, MixtureOfExperts
from lmlib.nn.places import places
from lmlib.nn.router import ExpertChoice, TopK
from lmlib.sharding import Layout

B, T, D, F, E = 8, 8, 16, 8, 8
RANDOM = np.random.default_rng(0)
X_BTD = RANDOM.normal(size=(B, T, D)).astype(np.float32)
DRAWN_BTD = RANDOM.normal(size=(B, T, D)).astype(np.float32)
PACKED_BT = np.cumsum(RANDOM.random((B, T)) < 0.3, axis=1, dtype=np.int32) + 1
PACKED_BT[np.arange(T)[None] >= RANDOM.integers(3, T + 1, (B, 1))] = 0
PACKED_BT[5] = 0  # a row of padding
LAYERS = {
    'dropless': Experts(E, F, TopK(2, balance_loss=0.1, balance_over='batch', z_loss=0.1), shared=8),
    'DeepSeek-V3': Experts(E, F, TopK(3, score='sigmoid', groups=4, groups_chosen=2, group_best=2, balanced=True,
                                      balance_loss=0.1), shared=8),
    'limited': Experts(E, F, TopK(2, capacity=0.5, score='sigmoid', balanced=True)),
    'expert choice': Experts(E, F, ExpertChoice(2.0)),
    'GPT-OSS': Experts(E, F, TopK(2, bias=True), style=MlpStyle('gelu_sigmoid', bias=True), limit=0.5),
}
LAYOUTS = {'experts': Layout(data=1, expert=8), 'data': Layout(data=2, expert=4),
           'rows': Layout(data=2, context=2, expert=2),
           'all': Layout(data=1, expert=2, fsdp=2, tensor=2), 'no experts': Layout(data=2, fsdp=2, tensor=2)}
USUAL = 'as they come'
ROUTERS = {  # what is done to the router's weights
    USUAL: lambda params: params,
    'ties': lambda params: params | {'router': 0 * params['router']},  # every token takes the first experts
    'two of them': lambda params: params | {'router_bias': jnp.zeros(E).at[jnp.array([5, 6])].set(50.0)},
}


@functools.cache
def computed(name: str, layout: str | None, router: str = USUAL, rows: int = B):
  """(output, sums, gradients) of a layer, of a weighted sum of its output and its auxiliary losses."""
  layer = MixtureOfExperts(D, LAYERS[name])
  given = X_BTD[:rows], PACKED_BT[:rows]

  def total(params, x_BTD, segments_BT):
    y_BTD, sums = layer.apply({'params': params}, x_BTD, places(segments_BT, segments_BT))
    auxiliary_B = sums.get('auxiliary_B', jnp.zeros(1))
    return (y_BTD * DRAWN_BTD[:rows]).sum() + (auxiliary_B * jnp.arange(1, len(auxiliary_B) + 1)).sum(), (y_BTD, sums)

  @jax.jit
  def run(params, x_BTD, segments_BT):
    gradients, found = jax.grad(total, (0, 1), has_aux=True)(params, x_BTD, segments_BT)
    return found, gradients

  params = ROUTERS[router](weights(name))
  if layout is None:
    return jax.device_get(run(params, *given))
  with sharding.use(LAYOUTS[layout]):
    placed = sharding.placer()({'x_BTD': given[0], 'segments_BT': given[1]})
    return jax.device_get(run(params, placed['x_BTD'], placed['segments_BT']))


@functools.cache
def weights(name: str):
  layer, here = MixtureOfExperts(D, LAYERS[name]), places(PACKED_BT, PACKED_BT)
  params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), X_BTD, here)['params'])
  return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)


def assert_equal(name: str, layout: str, *more):
  found, expected = computed(name, layout, *more), computed(name, None, *more)
  for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected)):
    # Of float32, summed in other orders; relative to the largest, for sums of both signs cancel.
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1e-3, np.abs(b).max()), err_msg=str(path))


@pytest.mark.parametrize(('name', 'layout'), [
    *(('dropless', layout) for layout in LAYOUTS), ('DeepSeek-V3', 'all'), ('DeepSeek-V3', 'rows'),
    ('limited', 'rows'), ('limited', 'all'), ('expert choice', 'rows'), ('expert choice', 'experts'),
    ('GPT-OSS', 'all')])
def test_eight_devices_equal_one(name, layout):
  assert_equal(name, layout)


@pytest.mark.parametrize(('name', 'router', 'layout'), [
    ('dropless', 'ties', 'data'), ('GPT-OSS', 'two of them', 'experts'), ('GPT-OSS', 'two of them', 'all')])
def test_loads_however_uneven(name, router, layout, monkeypatch):
  """All tokens for a device or two, in as many trips as that takes, and none for the others."""
  monkeypatch.setattr(dispatch, 'LEAST', 1)
  monkeypatch.setattr(dispatch, 'ROOM', 0.7)
  assert_equal(name, layout, router)
  (_, sums), _ = computed(name, layout, router)
  load_E, even = sums['expert_load_E']
  assert load_E.max() == even * E / 2  # every token
  assert (load_E == 0).any()


def test_rows_that_no_device_gets_alone():
  """Two rows on eight devices: all have both, and each adds what its experts make of them."""
  assert_equal('GPT-OSS', 'data', USUAL, 2)


def test_experts_that_devices_cannot_share_are_refused():
  layer = MixtureOfExperts(D, Experts(6, F))
  with (pytest.raises(ValueError, match=re.escape(
      'Layout.expert=4 does not divide the moe.Experts.count=6 experts: expert=2 does, with 2 times as many devices')),
        sharding.use(LAYOUTS['data'])):
    jax.eval_shape(lambda: layer.init(jax.random.key(0), X_BTD, places(PACKED_BT, PACKED_BT)))
