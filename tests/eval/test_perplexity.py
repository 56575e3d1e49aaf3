"""Scores of documents: every target once, with context, equal to a computation in NumPy."""
import bz2
import gzip
import lzma
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from lmlib.eval import perplexity
from lmlib.eval.perplexity import Score, score, windows
from tests.laws.models import CONFIGS, made

CONFIG = CONFIGS['dense']
LENGTH, STRIDE = 16, 8


@given(tokens=st.integers(1, 90), length=st.integers(1, 20), stride=st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_windows_score_each_target_once_with_context(tokens, length, stride):
  stride = min(stride, length)
  ids = list(range(tokens))  # a token is its position
  scored, previous = [], -1
  for part, done in windows(ids, length, stride):
    assert 2 <= len(part) <= length + 1
    assert part == ids[part[0]:part[0] + len(part)]
    assert 0 <= done < len(part) - 1, 'a window scores at least one target'
    assert previous < part[0]
    previous = part[0]
    for i in range(done, len(part) - 1):
      context = i + 1  # tokens in the window before the target
      assert context >= min(part[i + 1], length - stride + 1)  # part[i + 1] tokens precede it in the document
      scored.append(part[i + 1])
  assert scored == ids[1:]


def documents(*sizes: int):
  """Pairs of tokens and bytes; a document of n tokens has n targets but one."""
  random = np.random.default_rng(0)
  return [(random.integers(0, CONFIG.vocab, n), 3 * n) for n in sizes]


@pytest.fixture(scope='module')
def params():
  return made(CONFIG)


@jax.jit
def forward(params, tokens_BT):
  return CONFIG.model().apply({'params': params}, tokens_BT)[0]


def by_numpy(params, given_documents):
  """The nats of all targets, each from the first window of LENGTH tokens, STRIDE apart, that predicts it."""
  nats = 0.0
  for ids, _ in given_documents:
    for target in range(1, len(ids)):
      start = max(0, math.ceil((target - LENGTH) / STRIDE)) * STRIDE
      tokens_BT = np.zeros((1, LENGTH), np.int32)
      part = ids[start:start + LENGTH]
      tokens_BT[0, :len(part)] = part
      logits_V = np.asarray(forward(params, tokens_BT)[0, target - 1 - start], np.float64)
      nats += np.log(np.exp(logits_V).sum()) - logits_V[ids[target]]
  return nats


def test_the_score_is_that_of_the_logits(params):
  """Documents shorter than a window, as long, one longer, and many windows long."""
  given_documents = documents(2, 9, LENGTH, LENGTH + 1, LENGTH + 2, 5 * LENGTH + 3)
  found = score(CONFIG, params, given_documents, length=LENGTH, stride=STRIDE, batch=4)
  np.testing.assert_allclose(found.nats, by_numpy(params, given_documents), rtol=1e-5)  # float32 logits
  assert found.tokens == sum(len(ids) - 1 for ids, _ in given_documents)
  assert found.bytes == sum(size for _, size in given_documents)


def test_the_batch_and_the_order_change_nothing(params):
  given_documents = documents(30, 5, 50, 17)
  scores = [score(CONFIG, params, order, length=LENGTH, stride=STRIDE, batch=batch)
            for batch, order in ((4, given_documents), (4, given_documents[::-1]),
                                 (1, iter(given_documents)))]
  for other in scores[1:]:
    np.testing.assert_allclose(other.nats, scores[0].nats, rtol=1e-5)  # float32 sums in another order
    assert (other.tokens, other.bytes) == (scores[0].tokens, scores[0].bytes)


def test_a_uniform_model_has_the_entropy_of_its_vocabulary(params):
  """bits per byte = log2(V) * tokens / bytes."""
  uniform = params | {'embedding': 0 * params['embedding']}
  found = score(CONFIG, uniform, documents(40, 7), length=LENGTH, stride=STRIDE, batch=4)
  expected = math.log2(CONFIG.vocab) * 45 / (3 * 47)
  np.testing.assert_allclose(found.bits_per_byte, expected, rtol=1e-6)  # float32
  np.testing.assert_allclose(found.perplexity, CONFIG.vocab, rtol=1e-5)


def test_a_document_of_one_token_scores_nothing(params):
  found = score(CONFIG, params, documents(1, 20), length=LENGTH, stride=STRIDE, batch=4)
  assert found.tokens == 19


@pytest.mark.parametrize(('length', 'stride'), [(33, 8), (16, 0), (16, 17)])
def test_windows_that_do_not_fit_are_refused(params, length, stride):
  with pytest.raises(ValueError, match=rf'stride={stride} and length={length}.*32'):
    score(CONFIG, params, documents(5), length=length, stride=stride)


def test_figures():
  found = Score(nats=8 * math.log(2), tokens=4, bytes=2)
  assert found.bits_per_byte == pytest.approx(4)
  assert found.perplexity == pytest.approx(4)


def test_compressors_are_beside_it_in_bits_per_byte():
  texts = [b'the quick brown fox ' * 50, b'jumps over the lazy dog ' * 20, b'the quick brown fox ' * 50]
  found, size = perplexity.compressors(texts), sum(map(len, texts))
  assert found.keys() == {'gzip', 'bzip2', 'xz', 'xz, all as one'}
  for name, restore in (('gzip', gzip), ('bzip2', bz2), ('xz', lzma)):
    assert found[name] == pytest.approx(8 * sum(len(restore.compress(text)) for text in texts) / size, rel=0.1)
  assert found['xz, all as one'] < found['xz'] / 2  # the third is a repetition, and two headers are saved


def test_each_document_has_its_own_score_in_order(params):
  """Also where a long one spans batches and a short one ends before it."""
  given_documents = [(*one, 7 * n) for n, one in enumerate(documents(5 * LENGTH, 1, 9, 3 * LENGTH + 1, 2), 1)]
  found = list(perplexity.each(CONFIG, params, iter(given_documents), length=LENGTH, stride=STRIDE, batch=4))
  assert [(one.tokens, one.bytes, one.characters) for one in found] == [
      (len(ids) - 1, size, characters) for ids, size, characters in given_documents]
  np.testing.assert_allclose([one.nats for one in found], [by_numpy(params, [one[:2]]) for one in given_documents],
                             rtol=1e-5)  # float32 logits
  together = perplexity.total(found)
  assert together.characters == 7 * 15
  assert together.bits_per_character == pytest.approx(sum(one.nats for one in found) / math.log(2) / (7 * 15))


def test_characters_that_were_not_counted_have_no_bits():
  with pytest.raises(ValueError, match='not counted'):
    Score(nats=1.0, tokens=1, bytes=1).bits_per_character  # noqa: B018


def test_a_store_is_scored_by_source(params, tmp_path):
  from lmlib.data import store
  from lmlib.data.sources import Document
  from lmlib.data.tokenizer import Bytes
  texts = ['h\u00e9', '\u4e2d\u6587', 'plain']
  made_store = store.write(tmp_path / 'store', [Document(str(n), text) for n, text in enumerate(texts)],
                           Bytes().train(), source='books')
  wide = CONFIGS['dense'].__class__(**{**vars(CONFIG), 'vocab': made_store.tokenizer.vocab})
  found = perplexity.by_source(wide, made(wide), made_store, length=LENGTH, stride=STRIDE, batch=4)
  assert list(found) == ['books']
  assert [(one.characters, one.bytes, one.tokens) for one in found['books']] == [(2, 3, 4), (2, 6, 7), (5, 5, 6)]
  figures = perplexity.intervals(found['books'])
  assert figures.keys() == {'bits_per_byte', 'bits_per_character', 'perplexity'}
  whole = perplexity.total(found['books'])
  for name, one in figures.items():
    assert one.value == pytest.approx(getattr(whole, name))
    assert one.low <= one.value <= one.high
