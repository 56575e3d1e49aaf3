import json

import pytest

from lmlib.data import fertility, store, tokenizer_training
from lmlib.data.sources import Document
from lmlib.data.tokenizer import ByteLevelBpe, Bytes, SentencePiece, Tokenizer
from lmlib.data.tokenizer_formats import PATTERNS
from tests.data import prose

ENGLISH = ['the cat sat on the mat, and the dog lay by the door.\n' * 3, 'dogs do not read; cats do.\n']
CHINESE = ['\u732b\u5750\u5728\u57ab\u5b50\u4e0a\uff0c\u72d7\u8eba\u5728\u95e8\u8fb9\u3002\n' * 3,
           '\u72d7\u4e0d\u8bfb\u4e66\uff0c\u732b\u8bfb\u4e66\u3002\n']
SIZE = sum(map(len, ENGLISH + CHINESE))

CONFIGS = [SentencePiece(pieces=330), SentencePiece(pieces=295, model_type='unigram'), ByteLevelBpe(pieces=300),
           ByteLevelBpe(pieces=290, pattern='gpt2', specials=('<|im_start|>',)), Bytes()]


@pytest.mark.parametrize('config', CONFIGS[:3], ids=lambda config: type(config).__name__)
@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(5, 'Input/output error')], ids=repr)
def test_what_the_texts_raise_is_raised(config, error):
  """Ctrl-C and a file that cannot be read are no faults of the settings."""
  def texts():
    yield from ENGLISH
    raise error

  with pytest.raises(type(error)) as raised:
    config.train(texts(), SIZE)
  assert raised.value is error


@pytest.mark.parametrize('config', CONFIGS, ids=lambda config: type(config).__name__)
def test_training_is_deterministic_and_has_as_many_pieces_as_asked(config):
  one = config.train(iter(ENGLISH + CHINESE), SIZE)
  assert config.train(iter(ENGLISH + CHINESE), SIZE).model == one.model
  assert one.vocab == config.pieces
  assert len({0, one.bos, one.eos}) == 3
  assert not one.decode_bytes([0])  # padding, or unknown: no text


@pytest.mark.parametrize('config', CONFIGS[:4], ids=lambda config: type(config).__name__)
def test_training_makes_text_shorter(config):
  trained = config.train(ENGLISH + CHINESE, SIZE)
  for text in (ENGLISH[0], CHINESE[0]):
    assert len(trained.encode(text)) < len(text.encode())


@pytest.mark.parametrize('pattern', sorted(PATTERNS))
def test_patterns_cut_text_without_loss(pattern):
  trained = ByteLevelBpe(pieces=270, pattern=pattern).train(ENGLISH, SIZE)
  text = "I'LL pay 1234567\u4e2d\u6587, \u2014 \r\n\n  don't\t\u0e01\u0e33 \U0001f600"
  assert trained.decode(trained.encode(text)) == text


def test_a_unigram_model_is_another_model():
  bpe, unigram = (SentencePiece(pieces=295, model_type=kind).train(ENGLISH + CHINESE, SIZE)
                  for kind in ('bpe', 'unigram'))
  assert bpe.fingerprint != unigram.fingerprint


def test_no_more_pieces_than_there_are_is_an_error():
  with pytest.raises(ValueError, match=r'ByteLevelBpe.pieces=5000 .* 10 characters.*no more than \d+'):
    ByteLevelBpe(pieces=5000).train(['ab' * 5], 10)


@pytest.mark.parametrize(('config', 'bad', 'said'), [
    (ByteLevelBpe, {'pieces': 259}, 'ByteLevelBpe.pieces=259 must exceed 259'),
    (ByteLevelBpe, {'pieces': 260, 'specials': ('<a>',)}, 'ByteLevelBpe.pieces=260 must exceed 260'),
    (ByteLevelBpe, {'pattern': 'gpt5'}, "ByteLevelBpe.pattern='gpt5' must be one of gpt2"),
    (ByteLevelBpe, {'specials': ('<|eos|>',)}, 'ByteLevelBpe.specials='),
    (ByteLevelBpe, {'longest': 0}, 'ByteLevelBpe.longest=0'), (Bytes, {'specials': ('<a>', '<a>')}, 'Bytes.specials='),
    (Bytes, {'specials': ('<pad>',)}, 'Bytes.specials=')])
def test_bad_settings(config, bad, said):
  with pytest.raises(ValueError, match=said):
    config(**bad)


def test_what_identifies_a_config_is_all_of_it():
  configs = [*CONFIGS, Bytes(('<a>',)), SentencePiece(pieces=330, longest=8)]
  assert len({json.dumps(config.identity(), sort_keys=True) for config in configs}) == len(configs)


def test_blocks_lose_nothing():
  text = 'line\n' * 7 + 'x' * 2500 + '\n\n' + '  y\u4e2d\u2581\0\u2585\n' * 600
  blocks = list(tokenizer_training.blocks(text))
  assert ''.join(blocks) == text
  assert max(map(len, blocks)) == tokenizer_training.BLOCK
  assert [block[0] for block in blocks[-2:]] == ['\n', '\n']  # cut before a newline where there is one


def test_a_sample_is_spread_over_the_text(monkeypatch):
  taken = []
  monkeypatch.setattr(tokenizer_training.sentencepiece.SentencePieceTrainer, 'train',
                      lambda *, sentence_iterator, **_: taken.extend(sentence_iterator))
  with pytest.raises(ValueError, match='model'):  # there is none
    SentencePiece(sample=2000).train((f'{i:04}' * 250 for i in range(8)), 8000)
  assert [block[:4] for block in taken] == ['0003', '0007']


def test_fertility_by_hand():
  """Bytes: a token a byte, so tokens per character are bytes per character."""
  rows = fertility.fertility(Bytes().train(), {'en': ['ab c', 'd'], 'zh': ['\u732b\u8bfb\u4e66 x']})
  english, chinese = rows
  assert (english.documents, english.bytes, english.characters, english.words, english.tokens) == (2, 5, 5, 3, 5)
  assert (english.tokens_per_character, english.bytes_per_token, english.partial) == (1, 1, 0)
  assert english.tokens_per_word == pytest.approx(5 / 3)
  assert (chinese.words, chinese.tokens_per_word, chinese.tokens, chinese.characters) == (None, None, 11, 5)
  assert chinese.partial == 9  # three characters in three bytes each
  shown = fertility.table(rows).splitlines()
  assert [line.split()[0] for line in shown] == ['language', 'en', 'zh']
  assert [len(line) for line in shown] == [len(shown[0])] * 3
  assert '81.8%' in shown[2]


def test_fertility_tells_a_tokenizer_that_knows_a_language_from_one_that_does_not():
  english, both = (ByteLevelBpe(pieces=290).train(texts, SIZE) for texts in (ENGLISH, ENGLISH + CHINESE))
  texts = {'zh': CHINESE}
  apart, together = (fertility.fertility(trained, texts)[0] for trained in (english, both))
  assert together.tokens_per_character < apart.tokens_per_character
  assert together.partial < apart.partial
  assert together.bytes == apart.bytes
  with pytest.raises(ValueError, match=r"'de'.* 1 documents"):
    fertility.fertility(both, {'de': ['']})


def test_the_file_of_a_trained_one_is_all_that_is_needed(tmp_path):
  made = CONFIGS[3].train(ENGLISH, SIZE)
  made.save(tmp_path / 'tokenizer.model')
  loaded = Tokenizer.load(tmp_path / 'tokenizer.model')
  assert (loaded.fingerprint, loaded.bos, loaded.eos, loaded.marks) == (
      made.fingerprint, 1, 2, {'bos': '<|bos|>', 'eos': '<|eos|>'})
  assert loaded.specials['<|im_start|>'].id == 3


def test_fertility_of_a_store_goes_by_language(tmp_path):
  texts = [prose.ENGLISH] * 60 + [prose.CHINESE] * 39 + ['12 345 6789']  # the last in no language, and rare
  kept = store.write(tmp_path / 'store', (Document(str(i), text) for i, text in enumerate(texts)), Bytes().train())
  rows = fertility.of_store(kept, documents=100)
  assert [(row.language, row.documents) for row in rows] == [('en', 60), ('zh', 39), ('other', 1)]
  assert rows[1].bytes == 39 * len(prose.CHINESE.encode())
  assert sum(row.documents for row in fertility.of_store(kept, documents=10)) == 10
