"""What a row of a batch may ask for: how long, what first, what stops it, away from what, and of how many draws."""
import jax
import numpy as np
import pytest

from lmlib.data.tokenizer import Bytes
from lmlib.serve import generate as module
from lmlib.serve.generate import best_of, continued, stream
from lmlib.serve.sampling import Sampling
from tests.laws.models import CONFIGS, made

CONFIG = CONFIGS['dense']
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 13]]
GREEDY = Sampling(temperature=0.0, most=20)


class Letters:
  """A tokeniser whose tokens are one to three letters, so that stops lie across them."""

  def decode(self, ids, continues: bool = False) -> str:
    return ''.join('abc'[i % 3] * (1 + i % 2) + 'xyz'[i % 5 % 3] for i in ids)


@pytest.fixture(scope='module')
def params():
  return made(CONFIG)


@pytest.fixture(scope='module')
def greedy(params):
  return continued(CONFIG, params, PROMPTS, GREEDY, tokenizer=Letters())


def logp(params, tokens) -> np.ndarray:
  """Of each token but the first, by one forward pass."""
  tokens_BT = np.zeros((1, CONFIG.length), np.int32)
  tokens_BT[0, :len(tokens)] = tokens
  logits_BTV = jax.jit(lambda p, t: CONFIG.model().apply({'params': p}, t)[0])(params, tokens_BT)
  logp_TV = np.asarray(jax.nn.log_softmax(logits_BTV[0]))
  return logp_TV[np.arange(len(tokens) - 1), tokens[1:]]


def test_log_probabilities_are_those_of_a_forward_pass(params, greedy):
  for how in (GREEDY, Sampling(top_k=5, most=20, seed=3)):
    for prompt, row in zip(PROMPTS, continued(CONFIG, params, PROMPTS, how)):
      assert (len(row.tokens), row.ended, row.text) == (20, 'length', None)
      np.testing.assert_allclose(row.logp, logp(params, prompt + row.tokens)[len(prompt) - 1:], rtol=1e-4, atol=1e-5)
      assert all(kept >= all_ for kept, all_ in zip(row.truncated_logp, row.logp))
  assert greedy[0].truncated_logp == [0.0] * 20


def test_each_row_ends_by_its_own_length(params, greedy):
  rows = [Sampling(temperature=0.0, most=most) for most in (1, 20, 17)]
  for row, full, how in zip(continued(CONFIG, params, PROMPTS, rows), greedy, rows):
    assert (row.tokens, row.ended) == (full.tokens[:how.most], 'length')


def test_forced_tokens_come_first_and_the_model_goes_on_from_them(params):
  forced = (4, 4, 60)
  found = continued(CONFIG, params, PROMPTS, Sampling(temperature=0.0, forced=forced, most=8))
  after = continued(CONFIG, params, [[*prompt, *forced] for prompt in PROMPTS], Sampling(temperature=0.0, most=5))
  assert [row.tokens for row in found] == [[*forced, *row.tokens] for row in after]


def test_the_end_does_not_come_before_the_least_length(params, greedy):
  eos = greedy[0].tokens[0]
  short, long = (continued(CONFIG, params, PROMPTS[:1], Sampling(temperature=0.0, least=least, most=20), eos=eos)[0]
                 for least in (0, 5))
  assert (short.tokens, short.ended) == ([], 'eos')
  assert len(long.tokens) >= 5
  assert eos not in long.tokens


def test_banned_tokens_never_come(params, greedy):
  banned = set(greedy[0].tokens[:3])
  how = Sampling(temperature=0.0, most=20, bias=tuple((token, -np.inf) for token in banned))
  assert not banned & {token for row in continued(CONFIG, params, PROMPTS, how) for token in row.tokens}


@pytest.mark.parametrize('chunk', [1, 3, 16])
def test_a_stop_is_found_across_tokens_wherever_a_chunk_ends(params, greedy, chunk):
  for at in (1, 7, 12):
    text = greedy[0].text
    stop = text[at:at + 4]
    how = [Sampling(temperature=0.0, most=20, stop=(stop, 'never there')), GREEDY, GREEDY]
    *_, (row, *others) = stream(CONFIG, params, PROMPTS, how, tokenizer=Letters(), chunk=chunk)
    first = text.index(stop)
    assert (row.text, row.ended) == (text[:first], 'stop')
    assert row.tokens == greedy[0].tokens[:len(row.tokens)]
    assert stop in Letters().decode(row.tokens)
    assert stop not in Letters().decode(row.tokens[:-1])
    assert len(row.logp) == len(row.truncated_logp) == len(row.tokens)
    assert [other.tokens for other in others] == [full.tokens for full in greedy[1:]]


def test_what_has_been_written_is_seen_on_the_way(params, greedy):
  seen = [[list(row.tokens) for row in rows] for rows in stream(CONFIG, params, PROMPTS, GREEDY, chunk=4)]
  assert [len(rows[0]) for rows in seen] == [1, 5, 9, 13, 17, 20]
  assert all(full.tokens[:len(row)] == row for rows in seen for row, full in zip(rows, greedy))


def test_a_seed_draws_the_same_whatever_else_is_there(params):
  how = Sampling(seed=7, most=10)
  alone, = continued(CONFIG, params, PROMPTS[1:2], how)
  together = continued(CONFIG, params, PROMPTS, [Sampling(seed=1, most=10), how, Sampling(0.0, most=3)])
  assert together[1].tokens == alone.tokens
  assert continued(CONFIG, params, PROMPTS[1:2], Sampling(seed=8, most=10))[0].tokens != alone.tokens


def test_penalties_spread_what_is_written(params):
  words = lambda **how: len(set(continued(CONFIG, params, PROMPTS[:1], Sampling(0.0, most=20, **how))[0].tokens))
  assert words(presence=50.0) == 20
  assert words(repetition=1e6, presence=0.0) >= words()


def test_guidance_leads_away_from_another_prompt(params):
  """By a forward pass of each: log p = g log p(. | prompt) + (1 - g) log p(. | against)."""
  against, g = [[2, 2], [9, 8, 7, 6], [3]], 1.8
  found = continued(CONFIG, params, PROMPTS, Sampling(0.0, most=6), against=against, guidance=g)
  forward = jax.jit(lambda tokens_BT: jax.nn.log_softmax(
      CONFIG.model().apply({"params": params}, tokens_BT)[0], axis=-1))

  def after(tokens):
    tokens_BT = np.zeros((1, CONFIG.length), np.int32)
    tokens_BT[0, :len(tokens)] = tokens
    return np.asarray(forward(tokens_BT))[0, len(tokens) - 1]

  for prompt, other, row in zip(PROMPTS, against, found):
    for i, token in enumerate(row.tokens):
      led_V = g * after(prompt + row.tokens[:i]) + (1 - g) * after(other + row.tokens[:i])
      assert led_V[token] >= led_V.max() - 1e-4
      np.testing.assert_allclose(row.logp[i], np.log(np.exp(led_V) / np.exp(led_V).sum())[token], atol=1e-4)
  plain = continued(CONFIG, params, PROMPTS, Sampling(0.0, most=6))
  assert [row.tokens for row in found] != [row.tokens for row in plain]


def test_the_best_of_several_draws(params):
  how = Sampling(most=8, seed=2)
  draws = [continued(CONFIG, params, PROMPTS, how, draws=[copy] * 3) for copy in range(4)]
  for i, row in enumerate(best_of(CONFIG, params, PROMPTS, how, copies=4)):
    assert row.tokens == max((draw[i] for draw in draws), key=lambda row: np.mean(row.logp)).tokens
    assert row.score == pytest.approx(np.mean(row.logp))
  with pytest.raises(ValueError, match=r'copies=2 at temperature=0\.0'):
    best_of(CONFIG, params, PROMPTS, GREEDY, copies=2)


@pytest.mark.parametrize(('settings', 'said'), [
    (dict(how=Sampling(stop=('a',), most=2)), 'give the tokenizer'), (dict(how=[GREEDY]), '3 prompts and 1 times'),
    (dict(how=Sampling(most=40)), r'new=40 exceed the model.s length=32'),
    (dict(how=GREEDY, guidance=2.0), r'guidance=2\.0 needs prompts'),
    (dict(how=GREEDY, against=[[1]], guidance=2.0), '3 prompts and 1 in against')])
def test_what_does_not_fit_is_refused(params, settings, said):
  with pytest.raises(ValueError, match=said):
    continued(CONFIG, params, PROMPTS, **settings)


def test_text_is_that_of_the_tokenizer(params):
  tokenizer = Bytes().train()
  row = continued(CONFIG, params, PROMPTS, GREEDY, tokenizer=tokenizer)[0]
  assert row.text == tokenizer.decode(row.tokens, continues=True)
  assert module.CHUNK < 20
