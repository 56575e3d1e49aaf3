"""Models other than plain decoders on several stages, and what is no training: decoding, scoring."""
import dataclasses
import functools

import jax
import numpy as np
import pytest

from lmlib import sharding
from lmlib.eval import perplexity
from lmlib.models import protocol
from lmlib.serve.generate import generate
from lmlib.sharding import Layout, Pipeline
from lmlib.train import encoder_losses
from tests.laws import encoders
from tests.laws.models import CONFIGS, made, tokens
from tests.nn.test_pipeline import assert_equal

LAYOUT = Layout(data=2, stage=2, fsdp=2)
T5 = encoders.executed(dataclasses.replace(encoders.T5, encoder_layers=2), dropout=0.3)
DENSE = CONFIGS['dense']
LATENT = dataclasses.replace(CONFIGS['latent_moe'], layers=4, dense_layers=2)


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


def test_layers_outside_of_the_pipeline_are_those_of_one_device():
  """Dense layers in front of experts: two, which lie on two stages, and all devices run both."""
  hidden = jax.jit(lambda params, tokens_BT: LATENT.model().apply({'params': params}, tokens_BT, method='hidden')[::2])
  tokens_BT = tokens(LATENT, 8, 8)
  alone = jax.device_get(hidden(made(LATENT), tokens_BT))
  with sharding.use(LAYOUT):
    found = jax.device_get(hidden(placed(LATENT, made(LATENT)), tokens_BT))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, alone)


def test_a_trained_model_is_scored_and_continues_texts_where_it_lies():
  """Rows are then as many as there are: fewer than microbatches, and no multiple of them or of the devices."""
  config = dataclasses.replace(DENSE, layers=4)
  documents = [(np.arange(n) % 61, n) for n in (5, 9, 14)]
  score = functools.partial(perplexity.score, config, documents=documents, length=8, stride=4, batch=3)
  write = functools.partial(generate, config, prompts=[[1, 2, 3], [4]], new=4, temperature=0.0)
  nats, texts = score(made(config)).nats, write(made(config))
  with sharding.use(Layout(data=4, stage=2, pipeline=Pipeline(4, rounds=2))):
    params = placed(config, made(config))
    np.testing.assert_allclose(score(params).nats, nats, rtol=1e-5)
    assert write(params) == texts
