"""Logits equal those of transformers' Llama: live where torch is installed, and from goldens everywhere."""
import pathlib

import jax
import numpy as np
import pytest

from lmlib import trees
from lmlib.models import protocol
from tests.parity import llama

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens' / 'dense_llama.npz'
configs = pytest.mark.parametrize('name', llama.CONFIGS)


def assert_equal(config, state, expected_BTV):
  """The logits of our model with these weights are those expected, and the weights fill our tree."""
  params = llama.params(config, state)
  shapes = lambda tree: {name: leaf.shape for name, leaf in trees.flat(tree).items()}
  assert shapes(params) == shapes(jax.eval_shape(lambda: protocol.new(config, jax.random.key(0))))
  logits_BTV = jax.jit(config.model().apply)({'params': params}, llama.TOKENS_BT)[0]
  # float32 with sums in another order: each entry to 1e-5 of the largest logit.
  np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=1e-5, atol=1e-5 * np.abs(expected_BTV).max())


@configs
def test_logits_equal_those_of_transformers(name):
  pytest.importorskip('torch', reason='the live comparison needs torch and transformers; .ci/run has them')
  pytest.importorskip('transformers', reason='the live comparison needs transformers; .ci/run has it')
  assert_equal(llama.CONFIGS[name], *llama.reference(llama.CONFIGS[name], seed=1))


@configs
def test_logits_equal_those_kept(name):
  with np.load(GOLDENS) as file:
    prefix = f'{name}/'
    state = {key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)}
  expected_BTV = state.pop('logits_BTV')
  assert_equal(llama.CONFIGS[name], state, expected_BTV)


def test_goldens_are_small():
  assert GOLDENS.stat().st_size < 200_000
