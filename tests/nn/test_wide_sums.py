"""Gradients that devices sum in float32 by choice, though a model computes in bfloat16."""
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import sharding, trees
from lmlib.models import dense, encoder_decoder, latent_moe, moe, protocol
from lmlib.nn import layers
from lmlib.nn.decoder import Ends
from lmlib.nn.moe import Experts
from lmlib.nn.stack import Execution
from lmlib.sharding import Layout
from lmlib.train import encoder_losses, losses
from lmlib.train import step as step_of

B, T = 16, 24
NARROW = Execution(dtype='bfloat16', remat='full')
DENSE = dense.Config(vocab=64, layers=2, width=32, hidden=64, heads=4, kv_heads=2, head_width=8, length=T,
                     ends=Ends(tied=True), execution=NARROW)
MODELS = {
    'dense': DENSE,
    'experts': moe.Config(vocab=64, layers=2, width=32, heads=4, kv_heads=2, head_width=8, length=T,
                          experts=Experts(count=4, hidden=32), execution=NARROW),
    'latent': latent_moe.Config(vocab=64, layers=3, width=32, heads=4, length=T, execution=NARROW),
}
LAYOUTS = {'data': Layout(data=8), 'fsdp': Layout(data=1, fsdp=8), 'expert': Layout(data=2, expert=4),
           'tensor': Layout(data=4, tensor=2), 'context': Layout(data=2, context=4), 'stage': Layout(data=4, stage=2)}


def batch_of(seed: int = 0) -> dict:
  draw = np.random.default_rng(seed)
  tokens = draw.integers(0, 64, (B, T + 1), dtype=np.int32)
  segments = np.repeat([[1] * (T // 3) + [2] * (T - T // 3)], B, 0).astype(np.int32)
  return {'tokens_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'segments_BT': segments,
          'weight_BT': np.ones((B, T), np.float32)}


def gradients(config, layout: Layout, params, devices=None) -> dict[str, np.ndarray]:
  with sharding.use(layout, devices):
    placed = jax.device_put(params, sharding.shardings(protocol.boxed(config)))
    made = jax.jit(lambda params, batch: step_of.gradients(losses.NextToken().of(config), params, batch)[0])
    found = jax.device_get(made(placed, sharding.placer()(batch_of())))
  return {name: np.asarray(x, np.float64) for name, x in trees.flat(found).items()}


def new(config):
  return jax.device_get(jax.jit(protocol.new, static_argnums=0)(config, jax.random.key(0)))


def off(found, expected) -> dict[str, float]:
  return {name: float(np.linalg.norm(found[name] - x) / max(np.linalg.norm(x), 1e-30)) for name, x in expected.items()}


def both(config, layout: Layout) -> tuple[dict, dict]:
  """How far every gradient of a layout is from that of one device, summed in bfloat16 and in float32."""
  params = new(config)
  one = gradients(config, Layout(wide_sums=True), params, jax.devices()[:1])
  narrow, wide = (off(gradients(config, dataclasses.replace(layout, wide_sums=wide), params), one)
                  for wide in (False, True))
  matrices = [name for name, x in one.items() if x.ndim > 2 or 'embedding' in name]
  return {name: narrow[name] for name in matrices}, {name: wide[name] for name in matrices}


@pytest.mark.parametrize('layout', ['data', 'fsdp'])
def test_sums_over_devices_are_those_of_one_device_but_for_their_order(layout):
  """To the last bits where nothing else differs: attention is cut otherwise where there are fewer rows."""
  narrow, wide = both(DENSE, LAYOUTS[layout])
  assert len(narrow) == 8
  for name in narrow:
    assert narrow[name] > 1e-3, name
    assert wide[name] < (1e-6 if 'mlp' in name else narrow[name] / 2), name


def test_an_experts_gradient_is_rounded_on_each_device_and_then_summed():
  narrow, wide = both(MODELS['experts'], LAYOUTS['expert'])
  assert sum('experts' in name for name in narrow) == 4
  del narrow['blocks/experts/router']  # float32 anyway
  for name in narrow:
    assert wide[name] < (0.9 * narrow[name] if 'experts' in name else 1e-6), name


@pytest.mark.parametrize('layout', ['tensor', 'context', 'stage'])
def test_other_layouts_find_the_gradients_of_one_device_too(layout):
  """Their activations are rounded elsewhere, which is seen beside the sums."""
  params = new(DENSE)
  one = gradients(DENSE, Layout(wide_sums=True), params, jax.devices()[:1])
  found = gradients(DENSE, dataclasses.replace(LAYOUTS[layout], wide_sums=True), params)
  assert max(off(found, one).values()) < 0.02


def sums(config, layout: Layout) -> str:
  """The program that makes gradients, before it is divided among devices."""
  loss = losses.NextToken().of(config)
  with sharding.use(layout):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), new(config))
    return str(jax.make_jaxpr(lambda params, batch: step_of.gradients(loss, params, batch)[0])(shapes, batch_of()))


@pytest.mark.parametrize(('kind', 'matrices'), [('dense', 7), ('latent', 2 * 8 + 3 + 3)])
def test_what_leaves_a_product_is_float32(kind, matrices):
  """In the program, dot_general has the type in which its result is summed over devices: of every matrix but experts'
  in the layers of a loop, and the three of a hidden layer that all tokens share."""
  narrow, wide = (sums(MODELS[kind], Layout(data=8, wide_sums=wide)) for wide in (False, True))
  of = lambda text: len(re.findall(r':f32\[[\d,]+\] = dot_general', text))
  assert of(wide) - of(narrow) == matrices


@pytest.mark.parametrize('kind', ['dense', 'experts'])
def test_without_it_weights_are_cast_and_no_more(kind, monkeypatch):
  plain = sums(MODELS[kind], Layout(data=8))
  monkeypatch.setattr(layers, 'cast', lambda w, dtype: w.astype(dtype))
  monkeypatch.setattr(layers, 'looked_up', lambda table, ids, dtype, axes: sharding.constrain(
      table.astype(dtype), axes)[ids])
  assert sums(MODELS[kind], Layout(data=8)) == plain


@pytest.mark.parametrize('config', [DENSE, MODELS['experts']])
def test_a_model_that_sums_in_float32_anyway_is_refused(config):
  config = dataclasses.replace(config, execution=Execution())
  with pytest.raises(ValueError, match=r"wide_sums=True has no effect on a model with Execution.dtype='float32'"), (
      sharding.use(Layout(data=8, wide_sums=True))):
    step_of.shapes(config, None)


def test_an_encoder_decoder_learns_by_it():
  config = encoder_decoder.Config(vocab=64, layers=2, encoder_layers=2, width=32, hidden=64, heads=4, head_width=8,
                                  length=T, execution=NARROW)
  draw = np.random.default_rng(0)
  batch = batch_of() | {'inputs_BS': draw.integers(0, 64, (B, T), dtype=np.int32),
                        'input_segments_BS': np.ones((B, T), np.int32)}
  batch['segments_BT'] = np.ones((B, T), np.int32)
  loss = encoder_losses.SequenceToSequence().of(config)
  with sharding.use(Layout(data=1, fsdp=8, wide_sums=True)):
    params = jax.device_put(new(config), sharding.shardings(protocol.boxed(config)))
    found = jax.jit(lambda params, batch: step_of.gradients(loss, params, batch)[0])(params, sharding.placer()(batch))
  assert all(bool(jnp.isfinite(x).all()) and float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(found))
