"""A mixture of experts equals each token's experts one by one: values and gradients, however tokens are routed."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.models import moe, protocol
from lmlib.nn.mlp import ACTIVATIONS, MlpStyle
from lmlib.nn.moe import Experts, MixtureOfExperts
from lmlib.nn.places import places
from lmlib.nn.router import ExpertChoice, TopK
from tests.laws.models import CONFIGS, made, tokens

B, T, D, F, E = 2, 6, 8, 10, 4
SEGMENTS_BT = jnp.array([[1] * 6, [1, 1, 1, 1, 0, 0]])
X_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
LAYERS = {
    'top k': Experts(E, F, TopK(2), shared=6),
    'limited': Experts(E, F, TopK(2, capacity=1.0)),
    'expert choice': Experts(E, F, ExpertChoice(2.0)),
    'clamped': Experts(E, F, TopK(3, bias=True), style=MlpStyle('gelu_sigmoid', bias=True), limit=0.5),
    'not gated': Experts(E, F, TopK(1, score='sigmoid', balanced=True), style=MlpStyle('gelu', gated=False, bias=True)),
}


@functools.cache
def computed(layer):
  """(weights, output, sums, gradients of a weighted sum of the output) of a layer, and the same one by one."""
  module = MixtureOfExperts(D, layer)
  here = places(jnp.zeros((B, T), int), SEGMENTS_BT)
  draw_BTD = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)

  @jax.jit
  def run(key):
    params = jax.tree.map(lambda box: box.value, module.init(key, X_BTD, here)['params'],
                          is_leaf=lambda x: hasattr(x, 'axes'))
    params = {name: x if name == 'shared' else x + 0.3 * jax.random.normal(key, x.shape) for name, x in params.items()}
    found = lambda p, x: module.apply({'params': p}, x, here)
    plain = lambda p, x: one_by_one(layer, p, x)
    gradients = [jax.grad(lambda p, x, f=f: (f(p, x)[0] * draw_BTD).sum(), (0, 1))(params, X_BTD)
                 for f in (found, plain)]
    return params, found(params, X_BTD), plain(params, X_BTD)[0], gradients

  return run(jax.random.key(0))


def one_by_one(layer, p, x_BTD):
  """Every expert with every token, weighted by what the router says."""
  logits_BTE = x_BTD @ p['router'] + p.get('router_bias', jnp.zeros(E))[None, None]
  routing = layer.router.route(logits_BTE, SEGMENTS_BT > 0, p.get('balance_bias'))
  token_BM = jnp.arange(B)[:, None] * T + routing.place_BM
  weight_ME = jnp.zeros((B * T, E + 1)).at[token_BM, routing.expert_BM].add(routing.weight_BM)[:, :E]
  y_MD, x_MD = 0.0, x_BTD.reshape(B * T, D)
  act, bias = ACTIVATIONS[layer.style.activation], lambda name, e: p[f'{name}_bias'][e][None] if layer.style.bias else 0
  for e in range(E):
    up_MF = x_MD @ p['up'][e] + bias('up', e)
    if layer.style.gated:
      gate_MF = x_MD @ p['gate'][e] + bias('gate', e)
      if layer.limit is not None:
        gate_MF, up_MF = jnp.minimum(gate_MF, layer.limit), jnp.clip(up_MF, -layer.limit, layer.limit) + 1
      hidden_MF = act(gate_MF) * up_MF
    else:
      hidden_MF = act(up_MF)
    y_MD += weight_ME[:, e:e + 1] * (hidden_MF @ p['down'][e] + bias('down', e))
  y_BTD = y_MD.reshape(B, T, D)
  if layer.shared is not None:
    s = p['shared']
    y_BTD += (act(x_BTD @ s['gate']) * (x_BTD @ s['up'])) @ s['down']
  return y_BTD, routing


@pytest.mark.parametrize('layer', LAYERS.values(), ids=LAYERS.keys())
def test_it_equals_its_experts_one_by_one(layer):
  _, (y_BTD, _), plain_BTD, (gradients, expected) = computed(layer)
  np.testing.assert_allclose(y_BTD, plain_BTD, rtol=1e-5, atol=1e-5)
  for (path, found), wanted in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected)):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=str(path))  # float32, other orders of sums


def test_padding_passes_no_routed_expert():
  _, (y_BTD, _), *_ = computed(LAYERS['clamped'])
  assert not np.asarray(y_BTD)[1, 4:].any()
  assert np.asarray(y_BTD)[SEGMENTS_BT > 0].all()


def test_the_gradient_of_offsets_is_the_error_of_load():
  """In units that are whole: E times the tokens of an expert less those of all, whatever the loss."""
  params, (_, sums), _, ((gradient, _), _) = computed(LAYERS['not gated'])
  load_E, _ = sums['expert_load_E']
  np.testing.assert_array_equal(gradient['balance_bias'], E * load_E - load_E.sum())
  assert params['balance_bias'].any()


def test_a_cache_refuses_experts_that_look_ahead():
  config = moe.Config(experts=Experts(4, 8, ExpertChoice()), layers=1, width=8, heads=1, kv_heads=1, head_width=4)
  assert protocol.boxed(config)
  with pytest.raises(ValueError, match='ExpertChoice lets later tokens decide'):
    jax.eval_shape(lambda: config.model().init(jax.random.key(0), jnp.zeros((1, 2), int), None, config.cache(1, 4)))


def test_a_cache_knows_no_capacity():
  """Tokens that came before are not counted, so nothing is dropped where the whole row would be."""
  config = dataclasses.replace(CONFIGS['moe'], experts=Experts(4, 8, TopK(1, capacity=0.5)))
  params, tokens_BT = made(config), tokens(config, 1, 8)
  run = jax.jit(lambda config, *args: config.model().apply({'params': params}, *args)[0], static_argnums=0)
  free = dataclasses.replace(config, experts=Experts(4, 8, TopK(1)))
  cached = run(config, tokens_BT, None, config.cache(1, 8))
  np.testing.assert_allclose(cached, run(free, tokens_BT), rtol=1e-5, atol=1e-5)
  assert np.abs(cached - run(config, tokens_BT)).max() > 0.01


@pytest.mark.parametrize(('settings', 'said'), [
    (dict(count=0), 'moe.Experts.count=0'), (dict(limit=1.0, style=MlpStyle(gated=False)), 'needs style.gated=False'),
    (dict(count=1), 'chosen=2 exceeds the 1 experts'), (dict(shared=0), 'moe.Experts.shared=0')])
def test_settings_that_cannot_be_are_refused(settings, said):
  with pytest.raises(ValueError) as error:  # noqa: PT011, looked at below
    Experts(**settings)
  assert said in str(error.value)
