import io

import hypothesis
from hypothesis import strategies
import numpy as np
import pytest
import sentencepiece

from lmlib.data.tokenizer import SentencePiece, Tokenizer

AWKWARD = ['', ' ', '  x  ', '\n\n\t\t', '\r', 'a\r\n', 'a\0b\0', '1234567', '<s>', '</s>', '<unk>', '<0x41>',
           '\u2581', ' \u2581 \u2581\u2581', '\u2585', '\ufeffx', '\ufffd', '\u2028', '\ufb01',
           '\uff21 \u00a0', '\U0001f600', '\u4e2d\u6587', 'e\u0301 \u00e9']


@pytest.mark.parametrize('text', AWKWARD)
def test_round_trip_of_awkward_text(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


@hypothesis.given(strategies.text(strategies.one_of(
    strategies.characters(exclude_categories=['Cs']), strategies.sampled_from(' \u2581\u2585\0\r\n\t<>s/'))))
def test_round_trip_of_any_text(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert not set(ids.tolist()) & {tokenizer.bos, tokenizer.eos, 0}
  assert tokenizer.decode(ids) == text


def test_half_a_surrogate_pair_is_no_text(tokenizer):
  with pytest.raises(ValueError, match='character 1 '):
    tokenizer.encode('a\ud800')


def test_control_ids_are_no_text_and_broken_characters_are_marked(tokenizer):
  ids = tokenizer.encode('\U0001f600').tolist()
  assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == '\U0001f600'
  assert '\ufffd' in tokenizer.decode(ids[:2])
  assert tokenizer.decode([]) == ''
  for i in (-1, tokenizer.vocab):
    with pytest.raises(ValueError, match=f'{i}.*{tokenizer.vocab}'):
      tokenizer.decode([i])


def test_digits_are_split():
  numbers = SentencePiece(pieces=275, across_words=True).train(['in 2718 of 1828\n' * 100], 1600)
  assert len(numbers.encode('2718')) == 4


def test_pieces_reach_over_words_and_lines_only_when_asked():
  texts = ['def f(self):\n    return self.value\n' * 50] * 4
  joined = SentencePiece(pieces=300, across_words=True).train(texts, 7000)
  apart = SentencePiece(pieces=280, across_words=False).train(texts, 7000)
  pieces = [[t.decode([i]) for i in range(259, t.vocab)] for t in (joined, apart)]
  assert any('\n    r' in piece for piece in pieces[0])
  assert not any(' ' in piece.strip(' ') for piece in pieces[1])
  assert len(joined.encode(texts[0])) < len(apart.encode(texts[0]))


def test_training_is_deterministic_and_the_model_survives_a_file(tokenizer, texts, tmp_path):
  again = SentencePiece(pieces=300).train(iter(texts), sum(map(len, texts)))
  assert again.fingerprint == tokenizer.fingerprint
  assert SentencePiece(pieces=301).train(texts, 9).fingerprint != tokenizer.fingerprint
  again.save(tmp_path / 'x.model')
  loaded = Tokenizer.load(tmp_path / 'x.model')
  assert loaded.fingerprint == tokenizer.fingerprint
  assert loaded.vocab == 300
  assert len({loaded.bos, loaded.eos, 0}) == 3


def test_files_that_are_no_such_model(tmp_path, texts):
  lossy = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=lossy, vocab_size=60,
                                           model_type='bpe', minloglevel=3)
  for raw, message in (b'no model', 'not a'), (b'', 'not a'), (lossy.getvalue(), 'without byte fallback'):
    (tmp_path / 'y.model').write_bytes(raw)
    with pytest.raises(ValueError, match=rf'y\.model: .*{message}'):
      Tokenizer.load(tmp_path / 'y.model')
  with pytest.raises(ValueError, match=r'z\.model: No such file'):
    Tokenizer.load(tmp_path / 'z.model')


@pytest.mark.parametrize(('pieces', 'text', 'words'), [
    (4096, 'too little text', ['4096', '15 characters', '<= 2']),
    (300, '', ['too little text', '0 characters']),
    (300, ''.join(map(chr, range(0x4e00, 0x5e00))), ['300', '4096 characters', '4353', 'coverage']),
])
def test_too_little_text_or_too_many_characters(pieces, text, words):
  with pytest.raises(ValueError, match=f'SentencePiece.pieces={pieces} ') as error:
    SentencePiece(pieces=pieces).train([text], len(text))
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize('bad', [{'pieces': 259}, {'longest': 0}, {'coverage': 1.5}, {'sample': 10},
                                 {'model_type': 'word'}])
def test_bad_settings(bad):
  (name, value), = bad.items()
  with pytest.raises(ValueError, match=f'SentencePiece.{name}={value!r} '):
    SentencePiece(**bad)
