"""A candidate answers as the model does, each request once, and what it knows without the model."""
import dataclasses

import numpy as np
import pytest

from lmlib.data.tokenizer import Bytes
from lmlib.eval import loglikelihood, perplexity
from lmlib.eval.answers import Answers
from lmlib.eval.candidate import Candidate
from lmlib.eval.loglikelihood import Request
from lmlib.eval.writing import Writer
from tests.laws.models import CONFIGS, made

TOKENIZER = Bytes().train()
CONFIG = dataclasses.replace(CONFIGS['dense'], vocab=TOKENIZER.vocab)
REQUESTS = [Request((1, 2, 3), (4,)), Request((1, 2, 3), (5,)), Request((9,), (4,)), Request((1, 2, 3), (4,))]
DOCUMENTS = [(np.arange(1, 8), 20, 18), (np.arange(3, 30), 60, 50)]


@pytest.fixture(scope='module')
def params():
  return made(CONFIG)


def test_what_is_known_needs_no_model(params, tmp_path):
  def asked(params):
    kept = Answers(tmp_path / 'answers.jsonl')
    one = Candidate('one', CONFIG, params, TOKENIZER, kept)
    found = (one.likelihoods(REQUESTS, batch=4), one.writer(new=4, batch=2)(['ab', 'c', 'ab']),
             one.documents(DOCUMENTS, length=16, stride=8, batch=2))
    counts = kept.count()
    kept.close()
    return found, counts

  first, counts = asked(params)
  assert counts == (0, 3 + 3 + 2)
  assert asked(None) == (first, (3 + 3 + 2, 0))
  likelihoods, texts, documents = first
  assert likelihoods == loglikelihood.score(CONFIG, params, REQUESTS, batch=4)
  assert texts == Writer(CONFIG, params, TOKENIZER, new=4, batch=2)(['ab', 'c', 'ab'])
  assert documents == list(perplexity.each(CONFIG, params, DOCUMENTS, length=16, stride=8, batch=2))


def test_what_a_kill_left_out_is_what_it_would_have_been(params):
  """Drawn texts too: those that are missing are drawn as if none had been there."""
  prompts = [TOKENIZER.prompt(text) for text in ('abcd', 'ab', 'a', 'abc')]
  settings = {'new': 6, 'temperature': 1.0, 'seed': 3}
  whole = Candidate('whole', CONFIG, params, TOKENIZER).texts(prompts, batch=2, **settings)
  cut = Candidate('cut', CONFIG, params, TOKENIZER)
  writer = Writer(CONFIG, params, TOKENIZER, batch=2, **settings)
  named = dict(sorted(settings.items()))
  cut.answers.add('text', [([prompts[i], named, 0], text) for i, text in next(writer.batches(prompts))])
  assert cut.texts(prompts, batch=2, **settings) == whole
  assert cut.answers.count() == (2, 2 + 2)


def test_a_prompt_given_twice_is_drawn_twice(params):
  one = Candidate('one', CONFIG, params, TOKENIZER)
  texts = one.texts([TOKENIZER.prompt('ab')] * 4, new=12, temperature=1.0, batch=4)
  assert len(set(texts)) > 1


def test_models_that_cannot_answer_are_refused():
  from lmlib.models import encoder
  with pytest.raises(ValueError, match=r'one: lmlib\.models\.encoder is no decoder alone'):
    Candidate('one', encoder.Config(vocab=300), None, TOKENIZER)
  with pytest.raises(ValueError, match=f'has {TOKENIZER.vocab} ids, the model embeds vocab=61'):
    Candidate('one', CONFIGS['dense'], None, TOKENIZER)
