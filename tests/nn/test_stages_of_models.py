"""Models other than plain decoders on several stages, and what is no training: decoding, scoring."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from lmlib import sharding
from lmlib.eval import perplexity
from lmlib.models import protocol
from lmlib.nn import pipeline
from lmlib.sharding import Layout, Pipeline
from lmlib.train import encoder_losses
from tests.laws import encoders
from tests.laws.models import CONFIGS, made, tokens
from tests.nn.test_pipeline import assert_equal

LAYOUT = Layout(data=2, stage=2, fsdp=2)
T5 = encoders.executed(dataclasses.replace(encoders.T5, encoder_layers=2), dropout=0.3)
DENSE = CONFIGS['dense']


def placed(config, params):
  return jax.device_put(params, sharding.shardings(protocol.boxed(config)))


def packed(rows: int, T: int, seed: int):
  random = np.random.default_rng(seed)
  return random.integers(0, 61, (rows, T), np.int32), np.sort(random.integers(0, 3, (rows, T), np.int32), 1)


@pytest.mark.parametrize(('config', 'kind'), [
    (encoders.BERT, encoder_losses.MaskedToken), (T5, encoder_losses.SequenceToSequence)], ids=['bert', 't5'])
def test_stages_of_models_with_an_encoder_equal_one_device(config, kind):
  """Of an encoder-decoder each side is a pipeline of its own, and rows of the decoder find what was read for them."""
  (tokens_BT, segments_BT), (inputs_BS, input_segments_BS) = packed(8, 6, 0), packed(8, 10, 1)
  batch = {'tokens_BT': tokens_BT, 'targets_BT': np.roll(tokens_BT, 1), 'segments_BT': segments_BT,
           'weight_BT': (segments_BT > 0).astype(np.float32), 'row_B': np.arange(8, dtype=np.int32)}
  if kind is encoder_losses.SequenceToSequence:
    batch |= {'inputs_BS': inputs_BS, 'input_segments_BS': input_segments_BS}

  @jax.jit
  def differentiated(params, batch):
    def summed(params):
      total, *rest = kind().of(config)(params, batch)
      return total, rest
    return jax.value_and_grad(summed, has_aux=True)(params)

  alone = jax.device_get(differentiated(encoders.made(config), batch))
  with sharding.use(LAYOUT):
    found = differentiated(placed(config, encoders.made(config)), sharding.placer()(batch))
    assert_equal(jax.device_get(found), alone)


def test_decoding_on_stages_equals_the_forward_pass():
  """With a cache every stage runs all layers."""
  apply = jax.jit(lambda params, *args: DENSE.model().apply({'params': params}, *args))
  tokens_BT, cache = tokens(DENSE, 4, 8), DENSE.cache(4, 8)
  whole_BTV, _ = apply(made(DENSE), tokens_BT)
  with sharding.use(LAYOUT):
    params = placed(DENSE, made(DENSE))
    assert 'stage' in params['blocks']['attention']['out'].sharding.spec
    for chunk in (slice(0, 7), slice(7, 8)):
      out_BTV, cache = apply(params, tokens_BT[:, chunk], None, cache)
      np.testing.assert_allclose(out_BTV, whole_BTV[:, chunk], rtol=1e-5, atol=1e-5)


def test_layers_outside_of_the_pipeline_have_the_gradients_of_one_device():
  """Such as dense layers in front of experts: all devices run them, with weights that come from their stages."""
  run = lambda layers, x_BD, shared: (jnp.tanh(x_BD @ layers[0][0] + shared), layers[1] * x_BD.sum())
  random = np.random.default_rng(0)
  w_LDD, x_BD = (random.normal(size=shape).astype(np.float32) for shape in ((4, 6, 6), (8, 6)))

  def outcome(w_LDD):
    x, beside_L = pipeline.gathered(run, (w_LDD, jnp.arange(4)), x_BD, 0.5)
    return x.sum() + (beside_L**2).sum()

  def plain(w_LDD):
    x, total = jnp.asarray(x_BD), 0.0
    for layer, w_DD in enumerate(w_LDD):
      total += (layer * x.sum())**2
      x = jnp.tanh(x @ w_DD + 0.5)
    return x.sum() + total

  with sharding.use(Layout(data=2, stage=4)) as mesh:
    stored = jax.device_put(w_LDD, NamedSharding(mesh, PartitionSpec('stage')))
    found = jax.jit(jax.grad(outcome))(stored)
  wanted = jax.grad(plain)(jnp.asarray(w_LDD))
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_a_trained_model_is_scored_where_it_lies():
  """Rows are then as many as there are: fewer than microbatches, and no multiple of them or of the devices."""
  documents = [(np.arange(n) % 61, n) for n in (5, 9, 14)]
  score = functools.partial(perplexity.score, DENSE, documents=documents, length=8, stride=4, batch=3)
  nats = score(made(DENSE)).nats
  with sharding.use(Layout(data=4, stage=2, pipeline=Pipeline(4))):
    np.testing.assert_allclose(score(placed(DENSE, made(DENSE))).nats, nats, rtol=1e-5)
