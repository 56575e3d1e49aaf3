"""An encoder-decoder answers what it reads: greedy answers equal repeated forward passes."""
import jax.numpy as jnp
import pytest

from lmlib.serve.generate import generate
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


def test_what_cannot_be_answered_is_refused():
  with pytest.raises(ValueError, match=r'start=None: the decoder of an encoder-decoder begins with a token'):
    generate(T5, None, INPUTS, new=1)
  with pytest.raises(ValueError, match=r'start=0 is of encoder-decoders'):
    generate(models.CONFIGS['dense'], None, INPUTS, new=1, start=0)
  with pytest.raises(ValueError, match='is an encoder: it scores hidden tokens and generates none'):
    generate(BERT, None, INPUTS, new=1)
  with pytest.raises(ValueError, match=r'new=32 exceed.*length=32'):
    generate(T5, None, INPUTS, new=32, start=0)
