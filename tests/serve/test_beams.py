"""A beam search finds what an oracle in NumPy finds, beam by beam, and with enough beams what a full search does."""
import itertools

import jax
import numpy as np
import pytest

from lmlib.models import dense
from lmlib.nn.decoder import Ends
from lmlib.serve import beams as module
from lmlib.serve import weights
from lmlib.serve.beams import Beams, search
from lmlib.serve.generate import continued
from lmlib.serve.sampling import Sampling
from tests.laws.encoders import BOTH, T5, apply, padded
from tests.laws.encoders import made as made_encoder
from tests.laws.models import CONFIGS, made, tokens

TINY = dense.Config(vocab=5, layers=1, width=16, hidden=16, heads=2, kv_heads=1, head_width=8, length=16,
                    ends=Ends(tied=False))
PROMPTS, EOS, MOST = [[1, 2, 3], [4]], 0, 3
GREEDY = Sampling(0.0, most=MOST)


class Model:
  """Log-probabilities of the next token, by forward passes without a cache, kept."""

  def __init__(self, config, params):
    self.known = {}
    self.forward = jax.jit(lambda tokens_BT: config.model().apply({'params': params}, tokens_BT)[0])
    self.length = config.length

  def __call__(self, ids) -> np.ndarray:
    if (key := tuple(ids)) not in self.known:
      tokens_BT = np.zeros((1, self.length), np.int32)
      tokens_BT[0, :len(key)] = key
      self.known[key] = np.asarray(jax.nn.log_softmax(self.forward(tokens_BT)[0, len(key) - 1]), np.float64)
    return self.known[key]


@pytest.fixture(scope='module')
def params():
  params = made(TINY)
  return params | {'output': 2 * params['output']}  # so that probabilities differ


@pytest.fixture(scope='module')
def model(params):
  return Model(TINY, params)


def penalty(tokens: int, power: float) -> float:
  return ((5 + tokens) / 6)**power


def all_texts(model, prompt, power: float, most: int = MOST):
  """Every text of up to `most` tokens with its score, the highest first."""
  found = []
  for n in range(1, most + 1):
    for ids in itertools.product(range(TINY.vocab), repeat=n):
      if EOS not in ids[:-1] and (n == most or ids[-1] == EOS):
        total = sum(model([*prompt, *ids[:i]])[token] for i, token in enumerate(ids))
        found.append((total / penalty(n, power), [token for token in ids if token != EOS]))
  return sorted(found, key=lambda pair: -pair[0])


def by_hand(model, prompt, beams: Beams, most: int, change=lambda logp_V, written: logp_V):
  """The search as its paper has it, with lists, to the last step."""
  groups, each = beams.groups, beams.count // beams.groups
  live, found = [[(0.0, [])] for _ in range(groups)], [[] for _ in range(groups)]
  for step in range(1, most + 1):
    taken = np.zeros(TINY.vocab)
    for g in range(groups):
      ways = []
      for total, written in live[g]:
        logp_V = change(model([*prompt, *written]), written)
        ways += [(total + logp_V[token] - beams.diversity * taken[token], total + logp_V[token], [*written, token])
                 for token in range(TINY.vocab) if logp_V[token] > -np.inf]
      best = sorted(ways, key=lambda way: -way[0])[:2 * each]
      found[g] += [(total / penalty(step, beams.length_penalty), written[:-1])
                   for _, total, written in best if written[-1] == EOS]
      live[g] = [(total, written) for _, total, written in best if written[-1] != EOS][:each]
      for _, written in live[g]:
        taken[written[-1]] += 1
  for g in range(groups):
    found[g] += [(total / penalty(most, beams.length_penalty), written) for total, written in live[g]]
    found[g] = sorted(found[g], key=lambda pair: -pair[0])[:each]
  return sorted(itertools.chain(*found), key=lambda pair: -pair[0])


def same(rows, expected):
  assert [row.tokens for row in rows] == [written for _, written in expected[:len(rows)]]
  np.testing.assert_allclose([row.score for row in rows], [score for score, _ in expected[:len(rows)]], rtol=1e-4)


@pytest.mark.parametrize('power', [0.0, 1.0, 2.5, -1.0])
def test_enough_beams_find_the_best_of_all_texts(params, model, power):
  found = search(TINY, params, PROMPTS, Beams(16, length_penalty=power), GREEDY, eos=EOS)
  for prompt, rows in zip(PROMPTS, found):
    assert len(rows) == 16
    same(rows, all_texts(model, prompt, power))


@pytest.mark.parametrize('beams', [
    Beams(3), Beams(3, length_penalty=1.0), Beams(3, length_penalty=-2.0), Beams(2, groups=2, diversity=1.0),
    Beams(6, groups=3, length_penalty=0.7, diversity=0.5)], ids=str)
def test_beams_are_those_of_the_oracle(params, model, beams):
  how = Sampling(0.0, most=7)
  for prompt, rows in zip(PROMPTS, search(TINY, params, PROMPTS, beams, how, eos=EOS)):
    same(rows, by_hand(model, prompt, beams, 7))
    for row in rows:
      ids = [*row.tokens, *[EOS] * (row.ended == 'eos')]
      assert row.ended == ('length' if len(row.tokens) == 7 else 'eos')
      logp = [model([*prompt, *ids[:i]])[token] for i, token in enumerate(ids)]
      np.testing.assert_allclose(row.logp, logp[:len(row.tokens)], rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(sum(logp) / penalty(len(ids), beams.length_penalty), row.score, rtol=1e-4)


def test_what_is_asked_of_single_texts_holds_in_a_search(params, model):
  """Bias, lengths, forced tokens and penalties of what a beam, not its neighbour, has written."""
  how = Sampling(0.0, most=6, least=4, presence=1.5, bias=((3, 0.7), (2, -np.inf)), forced=(4,))

  def change(logp_V, written):
    x_V = logp_V - 1.5 * np.isin(range(TINY.vocab), written)
    x_V[3] += 0.7
    x_V[2] = -np.inf
    if len(written) < 4:
      x_V[EOS] = -np.inf
    if not written:
      x_V = np.where(np.arange(TINY.vocab) == 4, 0.0, -np.inf)
    return x_V - np.log(np.exp(x_V).sum())

  for prompt, rows in zip(PROMPTS, search(TINY, params, PROMPTS, Beams(3), how, eos=EOS)):
    same(rows, by_hand(model, prompt, Beams(3), 6, change))
    for row in rows:
      assert row.tokens[0] == 4
      assert 2 not in row.tokens
      assert len(row.tokens) >= 4


def test_one_beam_is_greedy_in_a_ring_and_apart():
  config, prompts, how = CONFIGS['window'], [[1, 2, 3], [5]], Sampling(0.0, most=8)
  params = made(config)
  greedy = [row.tokens for row in continued(config, params, prompts, how)]
  for model in [(config, params), weights.laid_out(config, params)]:
    assert [rows[0].tokens for rows in search(*model, prompts, Beams(1), how)] == greedy
    three = search(*model, prompts, Beams(3), how)
    assert len({tuple(row.tokens) for row in three[0]}) == 3


def test_an_encoder_decoder_searches_its_answers():
  """The scores are those of forward passes, and no lower than that of the greedy answer."""
  params, how = made_encoder(T5), Sampling(0.0, most=5)
  inputs = [tokens(T5, 1, size, seed=size)[0].tolist() for size in (3, 9)]
  greedy = continued(T5, params, inputs, how, start=4)
  found = search(T5, params, inputs, Beams(3), how, start=4)
  one = search(T5, params, inputs, Beams(1), how, start=4)
  assert [rows[0].tokens for rows in one] == [row.tokens for row in greedy]
  for given, rows, simple in zip(inputs, found, greedy):
    assert rows[0].score >= sum(simple.logp) - 1e-5
    ids = [4, *rows[0].tokens]
    both = [padded([jax.numpy.array(row)] * 2, BOTH, left=False) for row in (ids, given)]
    logits_BTV, _ = apply(T5, params, *both[0], None, None, *both[1])
    logp_TV = np.asarray(jax.nn.log_softmax(logits_BTV[0]))
    np.testing.assert_allclose(logp_TV[np.arange(5), ids[1:]].sum(), rows[0].score, rtol=1e-4)


def test_settings_compile_nothing_new(params):
  search(TINY, params, PROMPTS, Beams(4, 2, 1.0, 0.5), GREEDY, eos=EOS)
  before = module._found._cache_size()
  how = Sampling(0.0, most=5, least=1, repetition=1.2, presence=0.1, bias=((1, 1.0),), forced=(2,))
  search(TINY, params, PROMPTS[::-1], Beams(4, 2, 0.3, 2.0), how, eos=3)
  assert module._found._cache_size() == before


@pytest.mark.parametrize(('make', 'said'), [
    (lambda: Beams(0), 'count=0'), (lambda: Beams(5, 2, diversity=1.0), 'count=5 is not a multiple of groups=2'),
    (lambda: Beams(4, diversity=1.0), r'diversity=1\.0 keeps groups=1 apart'), (lambda: Beams(4, 2), r'diversity=0\.0'),
    (lambda: Beams(length_penalty=np.nan), 'length_penalty=nan'),
    (lambda: search(TINY, None, PROMPTS, Beams(), Sampling()), r'temperature=1\.0 must be 0: a beam search draws'),
    (lambda: search(TINY, None, PROMPTS, Beams(), Sampling(0.0, top_k=3)), 'top_k=3 has no effect on a beam search'),
    (lambda: search(TINY, None, PROMPTS, Beams(), Sampling(0.0, stop=('a',))), 'stop=.* has no effect'),
    (lambda: search(TINY, None, PROMPTS, Beams(), Sampling(0.0, most=14)), r'3 tokens and new=14 exceed .*length=16')])
def test_what_cannot_be_searched_is_refused(make, said):
  with pytest.raises(ValueError, match=said):
    make()
