"""Tokenisers of published encoders, which lose text, on a file made here."""
import json

import pytest

from lmlib.data.wordpiece import WordPiece


@pytest.fixture(scope='module')
def model() -> bytes:
  """A tokenizer.json of BERT's form, which asks for cutting at 4 and padding to 9."""
  tokenizers = pytest.importorskip('tokenizers')
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'the', 'cat', '##s', 'sleep', ',', '猫', 'cafe']
  made = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
  made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
  made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  made.post_processor = tokenizers.processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
  made.decoder = tokenizers.decoders.WordPiece()
  made.add_special_tokens(words[:5])
  made.enable_truncation(4)
  made.enable_padding(length=9)
  return made.to_str().encode()


def test_rows_have_special_tokens_and_neither_padding_nor_cuts(model):
  tokenizer = WordPiece(model)
  assert tokenizer.rows(['The cats, SLEEP', '猫猫', '']) == [[2, 5, 6, 7, 9, 8, 3], [2, 10, 10, 3], [2, 3]]
  assert (tokenizer.vocab, tokenizer.specials['[MASK]']) == (12, 4)


def test_pairs_say_which_text_a_token_is_of(model):
  pair = [('the cat', 'sleeps')]
  assert WordPiece(model).rows(pair) == [[2, 5, 6, 3, 8, 7, 3]]
  assert WordPiece(model).types(pair) == [[0, 0, 0, 0, 1, 1, 1]]


def test_it_loses_text_and_says_what_it_cannot_spell(model):
  tokenizer = WordPiece(model)
  assert tokenizer.decode(tokenizer.rows(['Café THE'])[0]) == 'cafe the'
  assert tokenizer.unknown(['the dog and cats', 'cats']) == [2, 0]


def test_a_long_text_is_refused_or_cut_if_told(model):
  tokenizer = WordPiece(model, 5)
  assert tokenizer.rows(['the cat sleep']) == [[2, 5, 6, 8, 3]]
  with pytest.raises(ValueError, match=r'text 1 has 6 tokens, more than length=5'):
    tokenizer.rows(['the', 'the cats sleep'])
  assert tokenizer.rows(['the cats sleep'], long='cut') == [[2, 5, 6, 7, 3]]
  with pytest.raises(ValueError, match='text 0 has 6'):  # and the next is not cut
    tokenizer.rows(['the cats sleep'])


def test_what_is_no_tokenizer_is_refused(model, tmp_path):
  (tmp_path / 'tokenizer.json').write_bytes(model)
  assert WordPiece.load(tmp_path / 'tokenizer.json').vocab == 12
  for bad in (b'', b'{}', b'[1]', b'\xff\xfe', json.dumps({'model': {'type': 'WordPiece'}}).encode(), model[:100]):
    (tmp_path / 'bad.json').write_bytes(bad)
    with pytest.raises(ValueError, match=r'bad\.json: not a tokenizer\.json'):
      WordPiece.load(tmp_path / 'bad.json')
  with pytest.raises(ValueError, match='unreadable'):
    WordPiece.load(tmp_path / 'none.json')
  with pytest.raises(ValueError, match='length=2'):
    WordPiece(model, 2)
  with pytest.raises(ValueError, match='is one text'):
    WordPiece(model).rows('the cat')
  with pytest.raises(ValueError, match="long='trim'"):
    WordPiece(model).rows(['the'], long='trim')
