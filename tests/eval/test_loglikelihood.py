"""Likelihoods of continuations: those of the plain logits, whatever is shared, batched, padded or cut."""
import functools

import jax
import numpy as np
import pytest

from lmlib.data.tokenizer import Bytes
from lmlib.eval import loglikelihood
from lmlib.eval.loglikelihood import Request, score
from tests.laws.models import CONFIGS, made

RANDOM = np.random.default_rng(0)


def ids(n, config=CONFIGS['dense']):
  return tuple(RANDOM.integers(0, config.vocab, n).tolist())


def by_logits(config, params, one: Request):
  """The sum of log-probabilities, and whether it is greedy, of the plain forward pass over one row."""
  whole = one.context + one.continuation
  tokens_BT = np.zeros((1, config.length), np.int32)  # what follows changes nothing before, and one shape compiles
  tokens_BT[0, :len(whole) - 1] = whole[:-1]
  logits_TV = np.asarray(forward(config)(params, tokens_BT)[0], np.float64)
  logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
  at = range(len(one.context) - 1, len(whole) - 1)
  return (sum(logp_TV[i, whole[i + 1]] for i in at), all(logits_TV[i].argmax() == whole[i + 1] for i in at))


@functools.cache
def forward(config):
  return jax.jit(lambda params, tokens_BT: config.model().apply({'params': params}, tokens_BT)[0])


def requests(config):
  """Shared contexts and lonely ones, short and long, of several tokens and of one, and one twice."""
  shared, long = ids(9, config), ids(13, config)
  found = [Request(shared, ids(n, config)) for n in (1, 1, 2, 5)] + [Request(long, ids(n, config)) for n in (1, 13)]
  return [*found, Request(ids(3, config), ids(4, config)), found[2]]


@pytest.mark.parametrize('name', ['dense', 'sandwich', 'latent_moe'])
def test_likelihoods_are_those_of_the_logits(name):
  config = CONFIGS[name]
  params, given = made(config), requests(config)
  if name == 'dense':  # what fills a row alone, which compiles for itself
    given += [Request(ids(a, config), ids(b, config)) for a, b in ((1, 31), (31, 1))]
  found = score(config, params, given, batch=8)
  expected = [by_logits(config, params, one) for one in given]
  np.testing.assert_allclose([one.logp for one in found], [p for p, _ in expected], rtol=2e-4)  # float32
  assert [one.greedy for one in found] == [greedy for _, greedy in expected]
  assert [one.tokens for one in found] == [len(one.continuation) for one in given]
  assert not any(one.cut for one in found)


def test_the_batch_and_the_order_change_nothing():
  config = CONFIGS['dense']
  params, given = made(config), requests(config)
  whole = [one.logp for one in score(config, params, given, batch=8)]
  np.testing.assert_allclose([one.logp for one in score(config, params, given[::-1], batch=3)][::-1], whole,
                             rtol=1e-4)  # float32 sums in another order


def test_what_greedy_decoding_writes_is_greedy():
  config = CONFIGS['dense']
  params, context = made(config), ids(6)
  text = list(context)
  for _ in range(5):
    tokens_BT = np.array([text + [0] * (config.length - len(text))], np.int32)
    text.append(int(forward(config)(params, tokens_BT)[0, len(text) - 1].argmax()))
  written = tuple(text[6:])
  other = (*written[:-1], (written[-1] + 1) % config.vocab)
  found = score(config, params, [Request(context, written), Request(context, other), Request(context, written[:1])])
  assert [one.greedy for one in found] == [True, False, True]


def test_of_too_long_a_context_the_end_is_read():
  config = CONFIGS['dense']
  params, context, continuation = made(config), ids(50), ids(3)
  found, = score(config, params, [Request(context, continuation)])
  assert found.cut == 50 + 3 - 1 - config.length
  kept = Request(context[found.cut:], continuation)
  assert found.logp == pytest.approx(by_logits(config, params, kept)[0], rel=1e-4)
  assert len(kept.context) + len(kept.continuation) - 1 == config.length, 'all that fits'


def test_few_shapes_compile_and_contexts_are_read_once(monkeypatch):
  config = CONFIGS['dense']
  read = []

  def seen(config, params, tokens_GT, lengths_G, context_R, targets_RT):
    read.append((tokens_GT.shape, targets_RT.shape))
    return np.zeros(len(context_R)), np.zeros(len(context_R), bool)

  monkeypatch.setattr(loglikelihood, '_likelihoods', seen)
  params = None
  contexts = [ids(n) for n in range(4, 12)]
  score(config, params, [Request(context, (answer,)) for context in contexts for answer in range(4)], batch=32)
  assert read == [((8, 16), (32, 1))], '8 contexts of 4 answers are 8 rows'
  read.clear()
  score(config, params, [Request(ids(int(n)), ids(int(m))) for n, m in RANDOM.integers(1, 14, (60, 2))], batch=16)
  assert len(set(read)) <= 4


def test_rungs():
  sizes = {1: 16, 16: 16, 17: 24, 24: 24, 25: 32, 33: 48, 49: 64, 65: 96, 1000: 1024}
  assert {size: loglikelihood.rung(size) for size in sizes} == sizes


@pytest.mark.parametrize(('given', 'said'), [
    (Request((), (1,)), 'both need one'), (Request((1,), ()), 'both need one'), (Request((1,), (61,)), 'vocab=61'),
    (Request((-1,), (1,)), 'vocab=61'), (Request((1,), (1,) * 33), 'length=32')])
def test_what_cannot_be_scored_is_refused(given, said):
  with pytest.raises(ValueError, match=said):
    score(CONFIGS['dense'], None, [given])


def test_an_encoder_is_refused():
  from lmlib.models import encoder
  with pytest.raises(ValueError, match='no decoder alone'):
    score(encoder.Config(vocab=61, layers=1, width=32, hidden=48, heads=4, length=32), None, [])


def test_spaces_belong_to_the_continuation():
  tokenizer = Bytes().train()
  text = lambda ids: tokenizer.decode(ids)
  for context, continuation in (('Answer: ', 'A'), ('Answer:', ' A')):
    found = loglikelihood.request(tokenizer, context, continuation)
    assert (text(found.context), text(found.continuation)) == ('Answer:', ' A')
    assert found.context[0] == tokenizer.bos
  found = loglikelihood.request(tokenizer, '', 'A')
  assert found.context == (tokenizer.bos,)
  assert text(found.continuation) == 'A'
  with pytest.raises(ValueError, match='empty'):
    loglikelihood.request(tokenizer, 'x', '')
