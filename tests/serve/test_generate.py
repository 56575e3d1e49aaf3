"""Generation equals forward passes over what is there, row by row, whatever else is in the batch."""
import jax
import numpy as np
import pytest

from lmlib.serve import generate as module
from lmlib.serve import prompts
from lmlib.serve.generate import generate
from lmlib.serve.sampling import Sampling
from tests.laws.models import CONFIGS, made

CONFIG = CONFIGS['dense']
NEW = 6
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 13]]


@pytest.fixture(scope='module')
def params():
  return made(CONFIG)


@pytest.fixture(scope='module')
def greedy(params):
  return generate(CONFIG, params, PROMPTS, new=NEW, temperature=0.0)


@jax.jit
def forward(params, tokens_BT):
  return CONFIG.model().apply({'params': params}, tokens_BT)[0]


def test_greedy_equals_repeated_forward_passes(params, greedy):
  """Each next token has the highest logit of a forward pass over all before it, without a cache."""
  for prompt, found in zip(PROMPTS, greedy):
    ids = list(prompt)
    for _ in range(NEW):
      tokens_BT = np.zeros((1, CONFIG.length), np.int32)  # what follows does not change the past
      tokens_BT[0, :len(ids)] = ids
      ids.append(int(forward(params, tokens_BT)[0, len(ids) - 1].argmax()))
    assert found == ids[len(prompt):]


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_rows_of_different_lengths_are_as_alone(params, temperature):
  """Row 0 of any batch draws from the same key: a prompt continues as it would alone."""
  together = [generate(CONFIG, params, [prompt, *PROMPTS], new=NEW, temperature=temperature, seed=3)[0]
              for prompt in PROMPTS]
  alone = [generate(CONFIG, params, [prompt], new=NEW, temperature=temperature, seed=3)[0]
           for prompt in PROMPTS]
  assert together == alone


def test_a_seed_reproduces_and_another_differs(params):
  draw = lambda seed: generate(CONFIG, params, PROMPTS, new=NEW, seed=seed)
  assert draw(0) == draw(0) != draw(1)


def test_each_token_is_drawn_anew(params):
  """Where all tokens are equally likely, each row draws several of them."""
  uniform = params | {'embedding': 0 * params['embedding']}
  assert all(len(set(row)) > 2 for row in generate(CONFIG, uniform, PROMPTS, new=NEW))


def test_rows_of_equal_prompts_differ(params):
  a, b = generate(CONFIG, params, [PROMPTS[0]] * 2, new=NEW)
  assert a != b


def test_end_of_text_ends_a_row(params, greedy):
  """A row stops before `eos`, the others go on; the result holds no eos."""
  eos = greedy[0][2]
  found = generate(CONFIG, params, PROMPTS, new=NEW, temperature=0.0, eos=eos)
  for row, full in zip(found, greedy):
    assert row == (full[:full.index(eos)] if eos in full else full)
  assert len(found[0]) <= 2


def test_when_all_rows_have_ended_nothing_more_is_computed(params, greedy):
  """Rows that end at once are empty, also where `eos` is never seen by the model again."""
  assert generate(CONFIG, params, [PROMPTS[0]], new=NEW, temperature=0.0, eos=greedy[0][0]) == [[]]


def test_all_the_length_can_be_used(params, greedy):
  prompt = (PROMPTS[2] * 5)[:CONFIG.length - NEW]
  assert len(generate(CONFIG, params, [prompt], new=NEW, temperature=0.0)[0]) == NEW
  assert CONFIG.length < prompts.ROUND  # so that rounding prompts up would exceed the length


def test_settings_compile_nothing_new(params):
  generate(CONFIG, params, PROMPTS, new=NEW)
  before = module._begin._cache_size(), module._more._cache_size()
  generate(CONFIG, params, PROMPTS[::-1], new=NEW - 1, temperature=0.3, top_k=5, seed=9, eos=4)
  other = Sampling(0.5, 3, 0.9, 0.01, 0.8, 1.2, 0.1, 0.2, ((3, -np.inf), (4, 1.0)), (5, 6), 2, NEW, seed=4)
  module.continued(CONFIG, params, PROMPTS, [other, Sampling(most=2), Sampling(forced=(1,) * 6, most=6)])
  assert (module._begin._cache_size(), module._more._cache_size()) == before


@pytest.mark.parametrize(('change', 'expected'), [
    (dict(prompts=[]), 'empty'), (dict(prompts=[[1], []]), 'empty'),
    (dict(prompts=[[1] * 30]), r'30 tokens and new=6.*length=32'), (dict(new=0), 'most=0'),
    (dict(temperature=-1.0), r'temperature=-1.0'), (dict(top_k=0), r'top_k=0'),
    (dict(prompts=[[61, 3]]), r'3 to 61, outside of vocab=61'),
    (dict(prompts=[[-1]]), r'-1 to -1.*vocab=61')])
def test_what_cannot_be_done_is_refused(params, change, expected):
  with pytest.raises(ValueError, match=expected):
    generate(CONFIG, params, **dict(prompts=PROMPTS, new=NEW) | change)
