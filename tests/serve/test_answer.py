"""An encoder-decoder answers what it reads: greedy answers equal repeated forward passes."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.serve.generate import best_of, continued, generate
from lmlib.serve.sampling import Sampling
from tests.laws import models
from tests.laws.encoders import BERT, BOTH, T5, apply, made, padded
from tests.laws.models import tokens

NEW, START = 5, 4
INPUTS = [tokens(T5, 1, size, seed=size)[0].tolist() for size in (3, 9)]


def test_greedy_equals_repeated_forward_passes():
  """Of rows of different lengths, read together; in the forward pass each is alone."""
  params = made(T5)
  for inputs, found in zip(INPUTS, generate(T5, params, INPUTS, new=NEW, temperature=0.0, start=START)):
    ids = [START]
    for _ in range(NEW):
      given = [padded([jnp.array(row)] * 2, BOTH, left=False) for row in (ids, inputs)]
      logits_BTV, _ = apply(T5, params, *given[0], None, None, *given[1])
      ids.append(int(logits_BTV[0, len(ids) - 1].argmax()))
    assert found == ids[1:]
  again = generate(T5, params, INPUTS, new=NEW, temperature=0.0, start=START, eos=found[2])
  assert again[1] == found[:found.index(found[2])]


def test_a_seed_is_what_rows_draw_from():
  drawn = [generate(T5, made(T5), INPUTS, new=NEW, seed=seed, start=START) for seed in (3, 3, 4)]
  assert drawn[0] == drawn[1] != drawn[2]
  assert generate(T5, made(T5), [INPUTS[0], INPUTS[0]], new=NEW, seed=3, start=START)[0] == drawn[0][0]


def test_guidance_leads_an_answer_away_from_another():
  """Each token is the best of log-probabilities of forward passes over both inputs, combined."""
  params, g = made(T5), 2.5

  def after(inputs, ids):
    both = [padded([jnp.array(row)] * 2, BOTH, left=False) for row in (ids, inputs)]
    logits_BTV, _ = apply(T5, params, *both[0], None, None, *both[1])
    return jax.nn.log_softmax(logits_BTV[0, len(ids) - 1])

  found = continued(T5, params, INPUTS, Sampling(0.0, most=4), start=START, against=INPUTS[::-1], guidance=g)
  for inputs, other, row in zip(INPUTS, INPUTS[::-1], found):
    for i, token in enumerate(row.tokens):
      led_V = g * after(inputs, [START, *row.tokens[:i]]) + (1 - g) * after(other, [START, *row.tokens[:i]])
      assert led_V[token] >= led_V.max() - 1e-4


def test_an_answer_heeds_every_setting():
  params, how = made(T5), Sampling(most=6, least=6, forced=(3, 9), seed=5, bias=((7, -np.inf),))
  found = continued(T5, params, INPUTS, how, start=START, eos=8)
  assert [row.tokens[:2] for row in found] == [[3, 9]] * 2
  assert [row.ended for row in found] == ['length'] * 2
  assert not {7, 8} & {*found[0].tokens, *found[1].tokens}
  best = best_of(T5, params, INPUTS, how, copies=3, start=START, eos=8)
  draws = [continued(T5, params, INPUTS, how, start=START, eos=8, draws=[copy] * 2) for copy in range(3)]
  for i, row in enumerate(best):
    assert row.score == pytest.approx(max(np.mean(draw[i].logp) for draw in draws), rel=1e-5)
    assert row.score == pytest.approx(np.mean(row.logp))


def test_what_cannot_be_answered_is_refused():
  with pytest.raises(ValueError, match=r'start=None: the decoder of an encoder-decoder begins with a token'):
    generate(T5, None, INPUTS, new=1)
  with pytest.raises(ValueError, match=r'start=0 is of encoder-decoders'):
    generate(models.CONFIGS['dense'], None, INPUTS, new=1, start=0)
  with pytest.raises(ValueError, match='is an encoder: it scores hidden tokens and generates none'):
    generate(BERT, None, INPUTS, new=1)
  with pytest.raises(ValueError, match=r'new=32 exceed.*length=32'):
    generate(T5, None, INPUTS, new=32, start=0)
  with pytest.raises(ValueError, match=f'start={T5.vocab} lies outside of vocab={T5.vocab}'):
    generate(T5, None, INPUTS, new=1, start=T5.vocab)
