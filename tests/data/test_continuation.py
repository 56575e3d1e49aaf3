"""Text for continued pretraining is cut by the tokeniser of the model, and every held-out token is scored once."""
import pathlib

import numpy as np
import pytest

from lmlib.data.continuation import Text, windows
from lmlib.data.sources import TextFiles
from lmlib.data.tokenizer import Tokenizer, described, envelope
from tests.post import small


@pytest.fixture
def text(tmp_path, monkeypatch):
  monkeypatch.setenv('LMLIB_CACHE', str(tmp_path / 'cache'))
  for i in range(6):
    (tmp_path / f'{i}.txt').write_text(f'document {i} says the same ' * 9)
  return Text(TextFiles(f'{tmp_path}/*.txt'), held_out=0.3)


@pytest.mark.parametrize('bos', ['<|bos|>', '<|im_end|>'], ids=['two marks', 'one mark for both'])
def test_documents_are_of_the_tokenizer_and_held_out_whole(text, bos):
  tokenizer = Tokenizer(envelope(**described(small.tokenizer().model) | {'bos': bos}))
  found = text.opened(tokenizer, batch=2, length=32, seed=0, say=lambda line: None)
  batch = found.train.batch_at(0)
  assert batch['tokens_BT'].shape == (2, 32)
  assert 'says the same' in tokenizer.decode(batch['tokens_BT'][0], continues=True)
  held = {window.where.split(':')[0] for window in found.held_out}
  assert len(held) + found.facts['documents'] == 6
  assert sum(window.size for window in found.held_out) == pytest.approx(sum(
      len(pathlib.Path(name).read_bytes()) for name in held))
  again = text.opened(tokenizer, batch=2, length=32, seed=0, say=lambda line: None)
  assert again.fingerprint == found.fingerprint


def test_windows_score_each_token_once():
  ids = np.arange(100, 175)
  found = windows('a', ids, 300, 32)
  scored = [i for window in found for i, weight in zip(window.example.tokens_T, window.example.weight_T) if weight]
  assert scored == ids[1:].tolist()
  assert max(len(window.example) for window in found) == 33
  assert sum(window.size for window in found) == pytest.approx(300)
