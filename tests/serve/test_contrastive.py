"""Contrastive search takes, token by token, what its equation says of forward passes without a cache."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.serve import contrastive as module
from lmlib.serve.contrastive import Contrastive, stream
from lmlib.serve.generate import continued
from lmlib.serve.sampling import Sampling
from tests.laws.encoders import T5
from tests.laws.encoders import made as made_encoder
from tests.laws.models import CONFIGS, made, tokens

CONFIG, PROMPTS, HOW = CONFIGS['dense'], [[1, 2, 3], [5]], Sampling(0.0, most=7)


@pytest.fixture(scope='module')
def params():
  return made(CONFIG)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, *given):
  x_BTD = config.model().apply({'params': params}, *given, method='hidden')[0]
  return x_BTD, x_BTD @ config.model().apply({'params': params}, method='unembed')


def states(config, params, ids, inputs=None):
  """(h_TD, p_TV) of a forward pass over a text; what lies behind it does not change its past."""
  tokens_BT = np.zeros((1, 12), np.int32)
  tokens_BT[0, :len(ids)] = ids
  found = forward(config, params, tokens_BT, *(() if inputs is None else (None, None, None, jnp.asarray([inputs]))))
  x_TD, logits_TV = (np.asarray(x_BTD[0, :len(ids)], np.float64) for x_BTD in found)
  e_TV = np.exp(logits_TV)
  return x_TD, e_TV / e_TV.sum(1, keepdims=True)


def values(config, params, ids, contrastive: Contrastive, inputs=None) -> dict[int, float]:
  """What the equation gives each candidate after a text."""
  p_V = states(config, params, ids, inputs)[1][-1]
  found = {}
  for token in np.argsort(-p_V)[:contrastive.candidates].tolist():
    h_TD, _ = states(config, params, [*ids, token], inputs)
    h_TD /= np.linalg.norm(h_TD, axis=1, keepdims=True)
    found[token] = (1 - contrastive.penalty) * p_V[token] - contrastive.penalty * (h_TD[:-1] @ h_TD[-1]).max()
  return found


def holds(config, params, ids, written, contrastive, inputs=None):
  """Every token written is the best of its candidates, up to rounding."""
  for i, token in enumerate(written):
    found = values(config, params, [*ids, *written[:i]], contrastive, inputs)
    assert found[token] >= max(found.values()) - 1e-4


def test_each_token_is_the_best_by_the_equation(params):
  contrastive = Contrastive(4, 0.6)
  found = contrastive.best(CONFIG, params, PROMPTS, HOW)
  for prompt, row in zip(PROMPTS, found):
    assert (len(row.tokens), row.ended) == (7, 'length')
    holds(CONFIG, params, prompt, row.tokens[:4], contrastive)
    p_TV = states(CONFIG, params, [*prompt, *row.tokens])[1]
    at = len(prompt) - 1 + np.arange(7)
    np.testing.assert_allclose(row.logp, np.log(p_TV[at, row.tokens]), rtol=1e-4, atol=1e-5)
  assert [row.tokens for row in found] != [row.tokens for row in continued(CONFIG, params, PROMPTS, HOW)]


def test_an_encoder_decoder_is_led_by_what_it_has_answered():
  contrastive, params, inputs = Contrastive(3, 0.7), made_encoder(T5), tokens(T5, 1, 6)[0].tolist()
  row, = contrastive.best(T5, params, [inputs], Sampling(0.0, most=4), start=4)
  holds(T5, params, [4], row.tokens, contrastive, inputs)


def test_without_a_penalty_it_is_greedy_and_settings_compile_nothing_new(params):
  Contrastive(4).best(CONFIG, params, PROMPTS, HOW, eos=11)
  before = module._begin._cache_size(), module._more._cache_size()
  for how in (HOW, Sampling(0.0, most=5, least=3, presence=0.5, forced=(4, 9), bias=((7, -np.inf),))):
    greedy = continued(CONFIG, params, PROMPTS, how, eos=11)
    found = Contrastive(4, 0.0).best(CONFIG, params, PROMPTS, how, eos=11)
    assert [(row.tokens, row.ended) for row in found] == [(row.tokens, row.ended) for row in greedy]
  assert (module._begin._cache_size(), module._more._cache_size()) == before


class Letters:
  decode = staticmethod(lambda ids, continues=False: ''.join('abcdefghij'[i % 10] * 2 for i in ids))


def test_it_streams_and_stops(params):
  plain = Contrastive().best(CONFIG, params, PROMPTS, HOW, tokenizer=Letters())
  stop = plain[0].text[5:8]
  seen = list(stream(CONFIG, params, PROMPTS, Contrastive(), Sampling(0.0, most=7, stop=(stop,)), tokenizer=Letters(),
                     chunk=2))
  assert [len(rows[1].tokens) for rows in seen] == sorted(len(rows[1].tokens) for rows in seen)
  assert seen[-1][0].text == plain[0].text[:plain[0].text.index(stop)]
  assert seen[-1][0].ended == 'stop'


@pytest.mark.parametrize(('make', 'said'), [
    (lambda: Contrastive(1), 'candidates=1 must be at least 2'), (lambda: Contrastive(penalty=1.5), r'penalty=1\.5'),
    (lambda: Contrastive(99).best(CONFIG, None, PROMPTS, HOW), 'candidates=99 are more than vocab=61'),
    (lambda: Contrastive().best(CONFIG, None, PROMPTS, Sampling()), r'temperature=1\.0 must be 0: contrastive'),
    (lambda: Contrastive().best(CONFIG, None, PROMPTS, Sampling(0.0, stop=('a',), most=3)), 'give the tokenizer')])
def test_what_cannot_be_searched_is_refused(make, said):
  with pytest.raises(ValueError, match=said):
    make()
