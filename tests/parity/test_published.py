"""Logits and gradients of every family equal those of transformers: live where torch is, from goldens everywhere."""
import dataclasses
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
from lmlib.models import protocol
from lmlib.train.losses import NextToken
from lmlib.train.step import placed
from tests.parity import encoder_cases, transformers_side
from tests.parity.cases import CASES, REAL_BT, TOKENS_BT, projection, said, weight

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens' / 'published.npz'
# Compared in test_encoders.py, or by test_chatglm_is_glm_under_other_names.
ELSEWHERE = {'chatglm', *(case['model_type'] for case in encoder_cases.CASES.values())}
cases = pytest.mark.parametrize('name', CASES)


def ours(case: dict):
  """(family, config, their tensors by name, our params) of a case."""
  family = families.find(case['model_type'])
  config = family.read(Said(said(case)))
  tensors = families.tensors(family, config)
  arrays = {path: np.zeros(leaf.shape, np.float32) for path, leaf in trees.flat(shapes(config)).items()}
  for name, tensor in tensors.items():
    for place, part in zip(tensor.places, tensor.split(weight(name, tensor.shape))):
      arrays[place.path][place.index] = part
  leaves = [jnp.asarray(arrays[path]) for path in trees.flat(shapes(config))]
  return family, config, tensors, jax.tree.unflatten(jax.tree.structure(shapes(config)), leaves)


def shapes(config):
  return placed(protocol.boxed(config))


def computed(case: dict):
  """Logits BTV and the gradients of the mean loss, by their names, of our model."""
  _, config, tensors, params = ours(case)
  real_BT = np.pad(REAL_BT[:, 1:], [(0, 0), (0, 1)]) * REAL_BT
  batch = {'tokens_BT': TOKENS_BT, 'targets_BT': np.roll(TOKENS_BT, -1, 1), 'segments_BT': REAL_BT,
           'weight_BT': real_BT.astype(np.float32)}

  @jax.jit
  def both(params, batch):
    def mean(params):
      total, count, _ = NextToken().of(config)(params, batch)
      return total / count

    logits_BTV, _ = config.model().apply({'params': params}, batch['tokens_BT'], batch['segments_BT'])
    return logits_BTV, jax.grad(mean)(params)

  logits_BTV, gradient = both(params, batch)
  flat = {path: np.asarray(x) for path, x in trees.flat(gradient).items()}
  # Of gradients nothing is taken away.
  plain = {name: dataclasses.replace(tensor, plus=0.0) for name, tensor in tensors.items()}
  return logits_BTV, {name: tensor.join([flat[place.path][place.index] for place in tensor.places])
                      for name, tensor in plain.items()}


def assert_logits(found_BTV, expected_BTV):
  real_BT = REAL_BT.astype(bool)
  # float32 with sums in another order: each entry to 1e-5 of the largest logit.
  np.testing.assert_allclose(found_BTV[real_BT], expected_BTV[real_BT], rtol=0, atol=1e-5 * np.abs(expected_BTV).max())


@cases
def test_equal_to_transformers(name):
  transformers_side.has_transformers()
  weights, logits_BTV, gradients = transformers_side.computed(CASES[name])
  found_BTV, found = computed(CASES[name])
  assert_logits(found_BTV, logits_BTV)
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
  assert_logits(found_BTV, logits_BTV)
  assert {name for name in found if 'e_score_correction' not in name} == kept.keys()
  largest = max(length for length, _ in kept.values())
  for tensor, expected in kept.items():
    np.testing.assert_allclose(projection(tensor, found[tensor]), expected, rtol=1e-3, atol=1e-5 * largest,
                               err_msg=tensor)


@cases
def test_config_json_comes_back(name):
  family, config, *_ = ours_config(CASES[name])
  assert family in hf.writers(config)


def ours_config(case):
  family = families.find(case['model_type'])
  return family, family.read(Said(said(case)))


def test_goldens_are_small_and_of_these_cases():
  assert GOLDENS.stat().st_size < 300_000
  with np.load(GOLDENS) as file:
    assert {key.rpartition('/')[0] for key in file.files} == CASES.keys()


def test_chatglm_is_glm_under_other_names():
  """Its code came with its weights and is not in transformers; GLM-4 is, and computes the same."""
  _, config, _, params = ours(CASES['glm'])
  family = families.find('chatglm')
  back = family.read(Said(hf.as_said(family, config)))
  assert back == config
  assert {place.path for tensor in families.tensors(family, config).values() for place in tensor.places} == {
      *trees.flat(params)}


def test_every_family_has_a_case():
  known = {family.model_types[0] for family in families.families()}
  assert known == {case['model_type'] for case in CASES.values()} | ELSEWHERE


def test_what_config_json_says_and_nobody_has_is_refused():
  for changed, message in ((dict(hidden_act='swish2'), "hidden_act='swish2'"),
                           (dict(rope_scaling=dict(rope_type='x', factor=2.0)), "rope_type='x'"),
                           (dict(num_attention_heads=3), 'heads=3 is not a multiple of kv_heads=2')):
    with pytest.raises(ValueError, match=message):
      families.find('llama').read(Said(said(CASES['llama'] | changed)))
  with pytest.raises(ValueError, match='cannot hold this model'):
    hf.writer(ours_config(CASES['gemma2'])[1], 'llama', None)
