"""What a writer gives to the sampler and makes of what it gets; the sampler has tests of its own."""
import dataclasses

import pytest

from lmlib.data.tokenizer import Bytes
from lmlib.eval import writing
from lmlib.eval.writing import Writer
from tests.laws.models import CONFIGS

TOKENIZER = Bytes().train()
CONFIG = dataclasses.replace(CONFIGS['dense'], vocab=300)  # of length 32


@pytest.fixture
def asked(monkeypatch):
  """The calls of the sampler, which answers with each prompt's text, a stop, and an id that stands for nothing."""
  calls = []

  def generate(config, params, prompts, **settings):
    calls.append((prompts, settings))
    return [[*ids[1:], 299, *TOKENIZER.encode('.x').tolist()] for ids in prompts]

  monkeypatch.setattr(writing, 'generate', generate)
  return calls


def test_texts_come_back_in_their_order_and_end_at_a_stop(asked):
  prompts = ['one', 'a longer one', 'b', 'four', 'fifth']
  assert Writer(CONFIG, None, TOKENIZER, new=8, stops=('x', '.'), batch=2)(prompts) == prompts
  assert Writer(CONFIG, None, TOKENIZER, new=8, batch=2)(['one']) == ['one.x']


def test_like_lengths_go_together_and_the_last_batch_is_full(asked):
  Writer(CONFIG, None, TOKENIZER, new=8, batch=2)(['a', 'bbbb', 'cccc', 'd', 'ee'])
  assert [[len(ids) - 1 for ids in prompts] for prompts, _ in asked] == [[4, 4], [2, 1], [1, 1]]


def test_batches_draw_with_seeds_of_their_own(asked):
  """Row i of every batch draws alike from one seed: samples of one prompt would repeat."""
  Writer(CONFIG, None, TOKENIZER, new=8, batch=2, temperature=0.7, top_k=5, seed=3)(['same'] * 6)
  assert [settings['seed'] for _, settings in asked] == [3, 4, 5]
  assert all(settings['temperature'] == 0.7 and settings['top_k'] == 5 for _, settings in asked)


def test_of_too_long_a_prompt_the_end_is_read(asked):
  Writer(CONFIG, None, TOKENIZER, new=8, batch=1)(['x' * 40 + 'end'])
  (ids,), _ = asked[0]
  assert len(ids) == 24
  assert TOKENIZER.decode(ids).endswith('end')


@pytest.mark.parametrize(('settings', 'said'), [({'new': 32}, 'new=32.*length=32'), ({'batch': 0}, 'batch=0')])
def test_settings_that_cannot_be_are_refused(asked, settings, said):
  with pytest.raises(ValueError, match=said):
    Writer(CONFIG, None, TOKENIZER, **{'new': 8, **settings})(['a'])
