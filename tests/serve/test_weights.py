"""Weights laid out for decoding are the same model: prompts continue as they do with the weights as they were."""
import jax
import numpy as np
import pytest

from lmlib.serve import weights
from lmlib.serve.generate import generate
from tests.laws.models import CONFIGS, made, tokens

PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 13]]


@pytest.mark.parametrize('name', ['sandwich', 'window'])  # kinds of layers and a softcap; a ring
def test_prompts_continue_as_before(name):
  config, params = CONFIGS[name], made(CONFIGS[name])
  laid_out = weights.laid_out(config, params)
  greedy = lambda config, params: generate(config, params, PROMPTS, new=6, temperature=0.0)
  assert greedy(*laid_out) == greedy(config, params)
  tokens_BT = tokens(config, 2, 9)
  logits = [jax.jit(c.model().apply)({'params': p}, tokens_BT)[0] for c, p in (laid_out, (config, params))]
  np.testing.assert_allclose(*logits, atol=1e-5 * np.abs(logits[0]).max())  # float32, another order


def test_layers_are_arrays_of_their_own():
  config, params = weights.laid_out(CONFIGS['dense'], made(CONFIGS['dense']))
  assert set(params['blocks']) == {'0', '1'}
  assert params['blocks']['1']['mlp']['up'].shape == (config.width, config.hidden)
  assert params['output'].shape == (config.width, config.vocab)
  with pytest.raises(ValueError, match=r'Execution\.apart is for decoding.*scan=True'):
    type(config.execution)(apart=True)
