"""Encoders and encoder-decoders equal those of transformers: live where torch is, from goldens everywhere."""
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib import trees
from lmlib.interop import family as families
from lmlib.interop import hf
from lmlib.interop.family import Said
from lmlib.kernels.cross_entropy import cross_entropy
from lmlib.models import protocol
from lmlib.train.step import placed
from tests.parity import encoder_side, transformers_side
from tests.parity.cases import projection
from tests.parity.encoder_cases import (
  ANSWERED_BT,
  ANSWERS_BT,
  CASES,
  HIDDEN_BT,
  REAL_BT,
  TARGETS_BT,
  TYPES_BT,
  padded,
  said,
  weight,
)

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens' / 'encoders.npz'
cases = pytest.mark.parametrize('name', CASES)


def ours(case: dict):
  """(config, their tensors by name, our params) of a case."""
  family = families.find(case['model_type'])
  config = family.read(Said(said(case)))
  shapes, tensors = placed(protocol.boxed(config)), families.tensors(family, config)
  arrays = {path: np.zeros(leaf.shape, np.float32) for path, leaf in trees.flat(shapes).items()}
  for name, tensor in tensors.items():
    for place, part in zip(tensor.places, tensor.split(weight(name, tensor.shape))):
      arrays[place.path][place.index] = part
  return config, tensors, jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(arrays[path]) for path in arrays])


def computed(case: dict):
  """Logits BTV and the gradients of the mean loss, by their names, of our model."""
  config, tensors, params = ours(case)
  given, targets_BT, weight_BT = (padded(case), REAL_BT, None, None, None), TARGETS_BT, HIDDEN_BT
  if case['model_type'] == 't5':
    given = ANSWERS_BT, None, None, None, padded(case), REAL_BT
    targets_BT, weight_BT = np.roll(ANSWERS_BT, -1, 1), ANSWERED_BT
  elif config.ends.types == 2:
    given = *given, TYPES_BT

  @jax.jit
  def both(params):
    def mean(params):
      x_BTD, _, _ = config.model().apply({'params': params}, *given, method='hidden')
      w_DV = config.model().apply({'params': params}, method='unembed')
      return cross_entropy(x_BTD, w_DV, targets_BT, weight_BT.astype(np.float32))[0] / weight_BT.sum()

    return config.model().apply({'params': params}, *given)[0], jax.grad(mean)(params)

  logits_BTV, gradient = both(params)
  flat = {path: np.asarray(x) for path, x in trees.flat(gradient).items()}
  return logits_BTV, {name: tensor.join([flat[place.path][place.index] for place in tensor.places])
                      for name, tensor in tensors.items()}


def assert_logits(case, found_BTV, expected_BTV):
  real_BT = (ANSWERED_BT if case['model_type'] == 't5' else REAL_BT).astype(bool)
  # float32 with sums in another order: each entry to 1e-5 of the largest logit.
  np.testing.assert_allclose(found_BTV[real_BT], expected_BTV[real_BT], rtol=0, atol=1e-5 * np.abs(expected_BTV).max())


@cases
def test_equal_to_transformers(name):
  transformers_side.has_transformers()
  weights, logits_BTV, gradients = encoder_side.computed(CASES[name])
  found_BTV, found = computed(CASES[name])
  assert_logits(CASES[name], found_BTV, logits_BTV)
  assert found.keys() == weights.keys(), 'the tables name other tensors'
  largest = max(np.linalg.norm(g) for g in gradients.values())
  for tensor, gradient in gradients.items():
    error = np.linalg.norm(found[tensor] - gradient)
    # float32; a gradient that is 0 but for rounding, as of a bias of keys, is held to the largest.
    assert error < 1e-4 * np.linalg.norm(gradient) + 1e-6 * largest, (tensor, error)


@cases
def test_equal_to_what_is_kept(name):
  with np.load(GOLDENS) as file:
    logits_BTV, kept = file[f'{name}/logits_BTV'], json.loads(str(file[f'{name}/gradients']))
  found_BTV, found = computed(CASES[name])
  assert_logits(CASES[name], found_BTV, logits_BTV)
  assert found.keys() == kept.keys()
  largest = max(length for length, _ in kept.values())
  for tensor, expected in kept.items():
    np.testing.assert_allclose(projection(tensor, found[tensor]), expected, rtol=1e-3, atol=1e-5 * largest,
                               err_msg=tensor)


@cases
def test_config_json_comes_back(name):
  family = families.find(CASES[name]['model_type'])
  assert family in hf.writers(family.read(Said(said(CASES[name]))))


@pytest.mark.parametrize(('tensors', 'expected'), [
    ({'bert.pooler.dense.weight', 'cls.predictions.bias'}, (True, True)),
    ({'bert.embeddings.word_embeddings.weight', 'cls.predictions.bias'}, (True, False)),
    ({'pooler.dense.weight'}, (False, True)), ({'embeddings.word_embeddings.weight'}, (False, False))])
def test_heads_are_those_that_the_file_has(tensors, expected):
  """bert-base-uncased calls itself BertForMaskedLM and has a pooler all the same."""
  family = families.find('bert')
  config = family.read(Said(said(CASES['bert']), tensors=frozenset(tensors)))
  assert (config.ends.predicts, config.ends.pooler) == expected
  assert family.read(Said(hf.as_said(family, config))).ends.predicts == expected[0]


def test_what_bert_cannot_say_is_refused():
  family = families.find('bert')
  for change, message in ((dict(position_embedding_type='relative_key'), 'position_embedding_type'),
                          (dict(is_decoder=True), 'is_decoder'), (dict(hidden_act='tanh'), 'hidden_act'),
                          (dict(num_attention_heads=5), 'hidden_size=24, which is not a multiple'),
                          (dict(architectures=['BertForTokenClassification']), 'architectures')):
    with pytest.raises(ValueError, match=message):
      family.read(Said(said(CASES['bert'] | change)))


def test_goldens_are_small_and_of_these_cases():
  assert GOLDENS.stat().st_size < 100_000
  with np.load(GOLDENS) as file:
    assert {key.rpartition('/')[0] for key in file.files} == CASES.keys()
