"""Ids by units are the ids of the whole text, for any text and any BPE vocabulary."""
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import sentencepiece

from lmlib.data import units
from lmlib.data.tokenizer import SentencePiece
from lmlib.data.units import Units

CHINESE = '在天气晴朗的日子里，孩子们到公园里放风筝。天气不好的时候，他们在家里看书。' * 3
VOCABULARIES = {'words': SentencePiece(pieces=420), 'across words': SentencePiece(pieces=420, across_words=True)}


@pytest.fixture(scope='module', params=VOCABULARIES)
def processor(request, texts):
  trained = VOCABULARIES[request.param].train([*texts, *[CHINESE] * 9], 20_000)
  processor = sentencepiece.SentencePieceProcessor()
  processor.load_from_serialized_proto(trained.model)
  return processor


@pytest.fixture(scope='module')
def of_units(processor):
  return Units(processor)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(parts=st.lists(st.one_of(
    st.text(st.characters(exclude_categories=['Cs'], exclude_characters=units.SPACE), max_size=12),
    st.sampled_from(['the quick brown', '  return', '\n', '):\n    ', '天气', '孩子们到', ' ', '   ', '12', '\x00'])),
    max_size=30))
def test_ids_are_those_of_the_whole_text(processor, of_units, parts):
  text = ''.join(parts)
  assert of_units.ids(text).tolist() == processor.encode(text)


def test_texts_of_the_corpus_are_cut_and_remembered(processor, of_units, texts):
  for text in [*texts, CHINESE, '']:
    assert of_units.ids(text).tolist() == processor.encode(text)
  assert len(of_units._known) > 10


def test_what_is_remembered_is_bounded(processor, texts, monkeypatch):
  monkeypatch.setattr(units, 'KEPT', 5)
  small = Units(processor)
  for text in texts:
    assert small.ids(text).tolist() == processor.encode(text)
    assert len(small._known) <= 5


def test_only_bpe_is_cut(processor, tmp_path, texts):
  assert units.fits(processor)
  (tmp_path / 'text').write_text(' '.join(texts))
  sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / 'text'), model_prefix=str(tmp_path / 'unigram'),
                                           vocab_size=300, byte_fallback=True, minloglevel=3)
  unigram = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'unigram.model'))
  assert not units.fits(unigram)
