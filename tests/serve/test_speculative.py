"""With every draft the text is the one that is written without, of every row, whatever the draft guesses."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.models import encoder_decoder
from lmlib.nn.cache import Cache
from lmlib.serve import drafts, generate, sampling, speculative, weights
from lmlib.serve.drafts import EarlyLayers, Heads, Lookup, Model
from lmlib.serve.generate import continued
from lmlib.serve.prompts import scored
from lmlib.serve.sampling import Sampling, Seen
from tests.laws.models import CONFIGS, made, tokens

CONFIG = CONFIGS['dense']
SMALL = dataclasses.replace(CONFIG, layers=1, width=16, hidden=24)
FUTURE = dataclasses.replace(CONFIGS['latent_moe'], layers=3, future=2)
WINDOW = dataclasses.replace(CONFIGS['window'], layers=2)
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 7, 8, 9, 7, 8]]
MOST = 14
GREEDY = Sampling(0.0, most=MOST)
MIXED = [Sampling(0.7, most=MOST, seed=3), GREEDY, Sampling(1.2, 20, 0.9, most=9, presence=1.0, forced=(4, 4), seed=5)]

ITSELF = Model(CONFIG, made(CONFIG), 3)

CASES = {
    'lookup': (CONFIG, lambda: Lookup()),
    'early layers of a ring': (WINDOW, lambda: EarlyLayers(1, 3)),
    'early latents': (FUTURE, lambda: EarlyLayers(2, 1)),
    'a ring drafts, with bigrams': (CONFIGS['dense bigrams'], lambda: Model(WINDOW, made(WINDOW), 2)),
}


@functools.cache
def plain(config, mixed: bool):
  return continued(config, made(config), PROMPTS, MIXED if mixed else GREEDY, draws=range(3))


@pytest.mark.parametrize(('case', 'mixed'), [(case, case != 'early latents') for case in CASES])
def test_the_text_is_the_one_without_a_draft(case, mixed):
  """Log-probabilities too; a draw is the same because the noise is."""
  config, draft = CASES[case]
  rows = continued(config, made(config), PROMPTS, MIXED if mixed else GREEDY, draws=range(3), draft=draft())
  for row, expected in zip(rows, plain(config, mixed)):
    assert (row.tokens, row.ended) == (expected.tokens, expected.ended)
    np.testing.assert_allclose(row.logp, expected.logp, rtol=1e-4, atol=1e-5)  # products of other shapes
    assert row.drafted.written == len(row.tokens) - 1  # the prompt's run gave the first
    assert row.drafted.written == row.drafted.steps + row.drafted.accepted
    assert row.drafted.accepted <= row.drafted.drafted


def test_a_model_accepts_all_that_it_drafts_itself():
  """Drawn tokens too: draft and model share the noise. Eight steps then write what 13 would, four a step."""
  rows = continued(CONFIG, made(CONFIG), PROMPTS, MIXED, draft=ITSELF)
  for row, how in zip(rows, MIXED):
    assert row.drafted.acceptance == 1
    assert row.drafted.steps == -(-(how.most - 1) // 4)


def test_weights_laid_out_for_decoding_write_the_same():
  rows = continued(*weights.laid_out(CONFIG, made(CONFIG)), PROMPTS, GREEDY, draft=EarlyLayers(1))
  assert [row.tokens for row in rows] == [row.tokens for row in plain(CONFIG, False)]


def test_rows_go_their_own_pace():
  """One that ends, or gets less far in a step, does not change another."""
  eos = plain(CONFIG, False)[1].tokens[6]
  draft = Lookup()
  together = continued(CONFIG, made(CONFIG), PROMPTS, GREEDY, eos=eos, draft=draft)
  for prompt, row, without in zip(PROMPTS, together, continued(CONFIG, made(CONFIG), PROMPTS, GREEDY, eos=eos)):
    alone, *_ = continued(CONFIG, made(CONFIG), [prompt] * 3, GREEDY, eos=eos, draft=draft)
    assert (alone.tokens, alone.ended) == (row.tokens, row.ended) == (without.tokens, without.ended)
    assert alone.drafted == row.drafted
  assert len({row.drafted.steps for row in together}) > 1


def test_all_the_length_can_be_used():
  """Drafts at the end of the cache are cut, not wrapped around."""
  prompts = [(PROMPTS[2] * 4)[:CONFIG.length - MOST]] * 3
  expected = continued(CONFIG, made(CONFIG), prompts, GREEDY)[0].tokens
  for draft in (Lookup(), ITSELF):
    assert continued(CONFIG, made(CONFIG), prompts, GREEDY, draft=draft)[0].tokens == expected


V, DRAWS = 5, 1000
CRITICAL = {2: 13.82, 3: 16.27, 4: 18.47}  # of chi-square, by degrees of freedom: passed once in a thousand
ODD = dataclasses.replace(SMALL, vocab=V)


@jax.jit
def left(params, tokens_BT, settings):
  """What may be drawn as the third token after a prompt of two."""
  logits_BV = ODD.model().apply({'params': params}, tokens_BT)[0][:, -1]
  seen = Seen(jnp.zeros((V * V, V), bool), jnp.zeros((V * V, V), jnp.int32))
  return jax.nn.softmax(sampling.truncated(sampling.scores(logits_BV, seen, settings, 2), settings), axis=-1)


@pytest.mark.parametrize('how', [Sampling(1.0), Sampling(0.6, top_k=3), Sampling(1.3, top_p=0.8)],
                         ids=['temperature', 'top-k', 'top-p'])
def test_frequencies_are_those_of_the_truncated_distribution(how):
  """Of the third token of many texts, wherever the first two came from, against what the model says after them."""
  params, other = made(ODD), made(ODD, 1)
  near = jax.tree.map(lambda a, b: 0.5 * a + 0.8 * b, params, other)
  rows = continued(ODD, params, [[1, 2]] * DRAWS, dataclasses.replace(how, most=3), draws=range(DRAWS),
                   draft=Model(ODD, near, 2))
  assert 0.02 < sum(row.drafted.accepted for row in rows) / sum(row.drafted.drafted for row in rows) < 0.98
  pairs = jnp.stack(jnp.meshgrid(*[jnp.arange(V)] * 2, indexing='ij'), -1).reshape(-1, 2)
  p_BV = np.asarray(left(params, jnp.pad(pairs, [(0, 0), (2, 0)]).at[:, :2].set(jnp.array([[1, 2]])),
                         sampling.settings([how] * V * V, V, None)))
  tokens_B3 = np.array([row.tokens for row in rows])
  pair_B = tokens_B3[:, 0] * V + tokens_B3[:, 1]
  assert (p_BV[pair_B, tokens_B3[:, 2]] > 0).all()
  found_V, expected_V = np.bincount(tokens_B3[:, 2], minlength=V), p_BV[pair_B].sum(0)
  kept = expected_V > 0
  assert ((found_V[kept] - expected_V[kept])**2 / expected_V[kept]).sum() < CRITICAL[kept.sum() - 1]


def looked_up(ids, width=4, longest=3, shortest=1, room=9):
  """What Lookup drafts after a text, whose last token the model has not read."""
  S = 12
  cache = Cache.empty(((1,),), layers=1, batch=1, length=S, dtype='float32').replace(
      used_B=jnp.array([len(ids) - 1]), tokens_BS=jnp.array([[*ids[:-1], *[9] * (S + 1 - len(ids))]]))
  text = drafts.Text(cache, jnp.array(ids[-1:]), None, jnp.array([0]), jnp.array([room]))
  tokens_BJ, count_B, _ = Lookup(width, longest, shortest).tokens(None, None, (), text, None)
  return tokens_BJ[0, :int(count_B[0])].tolist()


def test_lookup_follows_the_longest_then_the_last_agreement():
  assert looked_up([1, 2, 3, 4, 5, 2, 3]) == [4, 5, 2, 3]
  assert looked_up([1, 2, 5, 3, 2, 6, 1, 2]) == [5, 3, 2, 6]  # two tokens agree, though 2 was last followed by 6
  assert looked_up([2, 5, 3, 2, 6, 1, 2]) == [6, 1, 2, 6]  # and a repetition goes on
  assert looked_up([4, 4]) == [4, 4, 4, 4]
  assert looked_up([1, 2, 3]) == looked_up([7]) == []
  assert looked_up([1, 2, 3, 2], shortest=2) == []
  assert looked_up([1, 2, 3, 1], room=2) == [2, 3]
  assert looked_up([9, 9, 1, 9], longest=2) == [1, 9, 1, 9]  # what lies behind the text is not in it


@jax.jit
def heads(params, tokens_BT):
  """(what Heads drafts, what the modules say of the whole text) after some tokens, of which the last is not read."""
  apply = lambda *args, **how: FUTURE.model().apply({'params': params}, *args, **how)
  draft, read_BT, S = Heads(2, 12), tokens_BT[:, :-1], tokens_BT.shape[1]
  x_BTD = apply(read_BT, method='hidden')[0]
  cache = FUTURE.cache(1, S).replace(used_B=jnp.array([S - 1]), tokens_BS=tokens_BT)
  shared = sampling.settings([Sampling(0.0)], FUTURE.vocab, None), jax.random.split(jax.random.key(0), 1)
  seen = Seen.of(read_BT, jnp.ones_like(read_BT), FUTURE.vocab)
  text = drafts.Text(cache, tokens_BT[:, -1], seen, jnp.array([0]), jnp.array([9]))
  own = draft.begin(FUTURE, S, x_BTD, read_BT, jnp.ones_like(read_BT))
  tokens_BJ, count_B, _ = draft.tokens(FUTURE, params, own, text, shared)
  after_BT = jnp.concatenate([tokens_BT[:, 2:], tokens_BJ[:, :1]], axis=1)
  x_LBTD, _ = apply(x_BTD, jnp.stack([tokens_BT[:, 1:], after_BT], axis=-1), method='future')
  return tokens_BJ, count_B, jnp.stack([scored(FUTURE, params, x_LBTD[j][:, -1]).argmax(-1) for j in range(2)], 1)


def test_heads_draft_what_the_modules_say_of_the_whole_text():
  """Each from the hidden states and from what the one before it drafted; a window before the text is empty."""
  for seed in range(3):
    tokens_BJ, count_B, expected_BJ = heads(made(FUTURE), tokens(FUTURE, 1, 8, seed))
    np.testing.assert_array_equal(tokens_BJ, expected_BJ)
    np.testing.assert_array_equal(count_B, [2])


def test_a_ring_gives_back_what_it_was_spared():
  cache = Cache.empty(((2, 3),), layers=1, batch=1, length=12, dtype='float32', window=4)
  assert cache.spared(3).layers[0].shape == (1, 1, 2, 7, 3)
  assert cache.spared(30).slots == 12
  assert not cache.spared(30).ring


def test_steps_compile_once():
  params = made(CONFIG)
  continued(CONFIG, params, PROMPTS, MIXED, draft=Lookup())
  before = speculative.begin._cache_size(), speculative.more._cache_size()
  continued(CONFIG, params, PROMPTS[::-1], Sampling(0.3, 5, most=MOST, seed=9), eos=4, draft=Lookup())
  assert (speculative.begin._cache_size(), speculative.more._cache_size()) == before


ANSWERS = encoder_decoder.Config(vocab=61, length=32)


@pytest.mark.parametrize(('config', 'draft', 'said'), [
    (CONFIG, lambda: Model(dataclasses.replace(SMALL, vocab=60), None), 'vocab=60.*vocab=61'),
    (CONFIG, lambda: Model(dataclasses.replace(SMALL, length=16), None), 'length=16.*32'),
    (CONFIG, lambda: EarlyLayers(2), r'EarlyLayers.layers=2.*layers=2'),
    (FUTURE, lambda: EarlyLayers(1), 'above 1 and below'),
    (CONFIG, lambda: Heads(), r'Heads.width=1.*dense has future=0'),
    (FUTURE, lambda: Heads(3), r'Heads.width=3.*future=2'),
    (CONFIG, lambda: Lookup(0), r'Lookup.width=0'),
    (CONFIG, lambda: 'lookup', "draft='lookup' is none of Lookup, Model"),
    (CONFIG, lambda: Lookup(2, 1, 3), 'shortest=3 is above longest=1'),
    (ANSWERS, lambda: Lookup(), 'encoder_decoder remembers in a CrossCache'),
])
def test_drafts_that_do_not_fit_are_refused(config, draft, said):
  start = {'start': 0} if config is ANSWERS else {}
  with pytest.raises(ValueError, match=said):
    continued(config, None, PROMPTS, GREEDY, draft=draft(), **start)


def test_guidance_takes_no_draft():
  with pytest.raises(ValueError, match='guidance'):
    continued(CONFIG, None, PROMPTS, GREEDY, against=PROMPTS, guidance=1.5, draft=Lookup())


def test_generate_takes_a_draft():
  found = generate.generate(CONFIG, made(CONFIG), PROMPTS, new=MOST, temperature=0.0, draft=Lookup())
  assert found == [row.tokens for row in plain(CONFIG, False)]
