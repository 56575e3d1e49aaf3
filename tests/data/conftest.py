"""A tokeniser and a store small enough to make in a moment."""
import pytest

from lmlib.data import store
from lmlib.data.folder import Folder
from lmlib.data.sources import Document
from lmlib.data.tokenizer import SentencePiece

WORDS = ['the', 'quick', 'brown', 'fox', 'jumps', 'over', 'a', 'lazy', 'dog\n', '  ', 'return', 'self.value']


def sentence(i: int) -> str:
  """Text number i: no two are alike."""
  return f'{i}: ' + ' '.join(WORDS[i * k % len(WORDS)] for k in range(1, 9 + i % 5)) + '\n'


@pytest.fixture(autouse=True, scope='session')
def quick_disk():
  """Tests need not survive a loss of power: a disk that others write to would hold them up."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Folder, 'settle', lambda self: None)
    yield


@pytest.fixture(scope='session')
def texts():
  return [''.join(sentence(i + k) for k in range(1 + i % 3)) for i in range(40)]


@pytest.fixture(scope='session')
def tokenizer(texts):
  return SentencePiece(pieces=300).train(texts, sum(map(len, texts)))


@pytest.fixture(scope='session')
def small_store(texts, tokenizer, tmp_path_factory):
  documents = (Document(f'document {i}', text) for i, text in enumerate(texts))
  return store.write(tmp_path_factory.mktemp('data') / 'small', documents, tokenizer)
