"""The same laws for every kind of tokeniser, and each kind against the package that it comes from."""
import base64
import io
import itertools
import json
import pathlib
import pickle

import hypothesis
from hypothesis import strategies
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lmlib.data.tokenizer import ByteLevelBpe, Bytes, Loaded, SentencePiece, Tokenizer
from lmlib.data.tokenizer_formats import PATTERNS, alphabet_bytes

TEXTS = ['the quick brown fox jumps over 12 lazy dogs\n' * 4, '  return self.value\n' * 3,
         '\u732b\u5750\u5728\u57ab\u5b50\u4e0a\uff0c\u72d7\u8eba\u5728\u95e8\u8fb9\u3002' * 4,
         'caf\u00e9 na\u00efve' * 3]
SIZE = sum(map(len, TEXTS))
MARKS = ('<|im_start|>', '<|im_end|>')


def sentencepiece_file(**settings) -> bytes:
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=330, model_type='bpe', byte_fallback=True,
      normalization_rule_name='identity', remove_extra_whitespaces=False, minloglevel=3, num_threads=1, **settings)
  return model.getvalue()


def byte_level(**settings) -> tokenizers.Tokenizer:
  """As GPT-2's, with all that makes ids other than the text's: a bos, a limit, padding, normalisation."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get('prefix', False))
  made.decoder = decoders.ByteLevel()
  made.normalizer = normalizers.NFC()
  made.train_from_iterator([*TEXTS, '<|a <|b ' * 9], trainers.BpeTrainer(  # '<|' is a piece
      vocab_size=310, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      special_tokens=['<s>', '</s>', *MARKS]))
  made.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)])
  made.enable_truncation(5)
  made.enable_padding(length=8)
  return made


def metaspace(prepend: str) -> tokenizers.Tokenizer:
  """As Llama's: SentencePiece in the clothes of tokenizer.json, a space put before every text."""
  made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
  if prepend == 'normalizer':
    made.normalizer = normalizers.Sequence([normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
  else:
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
  spelt = [f'<0x{byte:02X}>' for byte in range(256)]
  made.train_from_iterator(TEXTS, trainers.BpeTrainer(
      vocab_size=360, show_progress=False, special_tokens=['<unk>', '<s>', '</s>', *MARKS, *spelt]))
  spec = json.loads(made.to_str())
  spec['added_tokens'] = [token for token in spec['added_tokens'] if token['content'] not in spelt]
  return tokenizers.Tokenizer.from_str(json.dumps(spec))


def ranks_file(folder: pathlib.Path) -> str:
  """The pieces of a trained byte-level BPE as tiktoken keeps them."""
  trained = ByteLevelBpe(pieces=330, pattern='cl100k').train(TEXTS, SIZE)
  pieces = [trained.decode_bytes([i]) for i in range(3, trained.vocab)]
  lines = [f'{base64.b64encode(piece).decode()} {rank}\n' for rank, piece in enumerate(pieces)]
  (folder / 'x.tiktoken').write_text(''.join(lines))
  return str(folder / 'x.tiktoken')


@pytest.fixture(scope='session')
def kinds(tmp_path_factory):
  folder = tmp_path_factory.mktemp('kinds')

  def loaded(name: str, content, **settings):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.to_str().encode())
    return Loaded(str(folder / name), bos='<s>', eos='</s>', **settings).train()

  return {
      'bpe': SentencePiece(pieces=330).train(TEXTS, SIZE),
      'unigram': SentencePiece(pieces=305, model_type='unigram').train(TEXTS, SIZE),
      'byte level': ByteLevelBpe(pieces=310, specials=MARKS).train(TEXTS, SIZE),
      'bytes': Bytes(MARKS).train(),
      'spaced': loaded('a.model', sentencepiece_file(), specials=MARKS),
      'user defined': loaded('b.model', sentencepiece_file(user_defined_symbols=list(MARKS)), specials=MARKS),
      'gpt2': loaded('c.json', byte_level()),
      'prefixed': loaded('d.json', byte_level(prefix=True)),
      'llama': loaded('e.json', metaspace('normalizer')),
      'mistral': loaded('f.json', metaspace('first')),
      'gemma': loaded('g.json', metaspace('never'), specials=('<extra>',)),
      'ranks': Loaded(ranks_file(folder), pattern='cl100k', specials=('<s>', '</s>', *MARKS), bos='<s>',
                      eos='</s>').train(),
  }


NAMES = ['bpe', 'unigram', 'byte level', 'bytes', 'spaced', 'user defined', 'gpt2', 'prefixed', 'llama', 'mistral',
         'gemma', 'ranks']
every = pytest.mark.parametrize('name', NAMES)
any_text = strategies.text(strategies.one_of(
    strategies.characters(exclude_categories=['Cs']),
    strategies.sampled_from(' \u2581\u2585\0\r\n\t\u4e2d\u6587\U0001f600e\u0301')))
texts = strategies.lists(strategies.one_of(any_text, strategies.sampled_from([
    *MARKS, '<s>', '</s>', '<unk>', '<0x41>', '<|bos|>', '<|eos|>', '<pad>', '<', '|>', ' ', 'the quick'])),
    max_size=5).map(''.join)
quick = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


@every
@quick
@hypothesis.given(text=texts)
def test_any_text_comes_back_and_is_never_a_special(kinds, name, text):
  tokenizer = kinds[name]
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert not tokenizer.is_special(ids).any()
  assert tokenizer.decode(ids) == text


@every
@quick
@hypothesis.given(text=texts, at=strategies.integers(0, 20))
def test_text_that_continues_is_appended(kinds, name, text, at):
  """Also where a model puts a space before a text: not between two parts of one."""
  tokenizer, (first, second) = kinds[name], (text[:at], text[at:])
  ids = np.concatenate([tokenizer.encode(first), tokenizer.encode(second, continues=True)])
  if first:
    assert tokenizer.decode(ids) == text
  assert tokenizer.decode(tokenizer.encode(second, continues=True), continues=True) == second


@every
def test_specials_are_written_out_when_asked(kinds, name):
  tokenizer = kinds[name]
  bos, eos = (tokenizer.spelling(i) for i in (tokenizer.bos, tokenizer.eos))
  ids = tokenizer.encode_with_specials(f'{bos}\u732b the{eos}{eos}x')
  x = len(tokenizer.encode('x', continues=not tokenizer.spaces_after_specials))
  assert np.flatnonzero(tokenizer.is_special(ids)).tolist() == [0, len(ids) - 2 - x, len(ids) - 1 - x]
  assert ids[0] == tokenizer.bos
  assert tokenizer.decode(ids[1:-2 - x], continues=True).lstrip(' ') == '\u732b the'
  for mark in set(MARKS) & set(tokenizer.specials):
    assert tokenizer.encode_with_specials(mark).tolist() == [tokenizer.specials[mark].id]
    assert len(tokenizer.encode(mark)) > 1


@every
def test_it_survives_a_file_and_a_process(kinds, name, tmp_path):
  tokenizer = kinds[name]
  tokenizer.save(tmp_path / 'tokenizer.model')
  for other in (Tokenizer.load(tmp_path / 'tokenizer.model'), pickle.loads(pickle.dumps(tokenizer))):
    assert (other.fingerprint, other.vocab, other.bos, other.eos) == (
        tokenizer.fingerprint, tokenizer.vocab, tokenizer.bos, tokenizer.eos)
    assert other.specials == tokenizer.specials
    assert (other.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])).all()


@every
def test_half_a_surrogate_pair_and_ids_outside_are_refused(kinds, name):
  with pytest.raises(ValueError, match='character 1 '):
    kinds[name].encode('a\ud800')
  for i in (-1, kinds[name].vocab):
    with pytest.raises(ValueError, match=f'{i}.*{kinds[name].vocab}'):
      kinds[name].decode([i])


@every
def test_half_a_character_is_marked_and_bytes_are_kept(kinds, name):
  ids = kinds[name].encode('\U0001f984', continues=True)  # in no text that they were trained on
  assert kinds[name].decode_bytes(ids) == '\U0001f984'.encode()
  assert kinds[name].decode(ids[:-1]).endswith('\ufffd')


PLAIN = ['the quick fox', 'a<|im_start|> the</s>', 'x', '\u732b\u5750 on 12', 'caf\u00e9\n\n  y ',
         'unseen \U0001f984\u00df']


@pytest.mark.parametrize('text', PLAIN)
def test_a_tokenizer_json_gives_the_ids_of_its_package(kinds, text):
  """Without the bos, cut and padding that the package puts on."""
  for name, reference in (('gpt2', byte_level()), ('prefixed', byte_level(prefix=True)),
                          ('llama', metaspace('normalizer')), ('mistral', metaspace('first')),
                          ('gemma', metaspace('never'))):
    reference.no_truncation()
    reference.no_padding()
    reference.encode_special_tokens = True
    assert kinds[name].encode(text).tolist() == reference.encode(text, add_special_tokens=False).ids, name
    reference.encode_special_tokens = False
    written = f'<s>{text.replace("> ", ">")}<|im_start|></s>x'  # 'prefixed' keeps '> x' and '>x' apart, it does not
    want = reference.encode(written, add_special_tokens=False).ids
    assert kinds[name].encode_with_specials(written).tolist() == want, name


@pytest.mark.parametrize('text', [*PLAIN, ' x', '  two'])
def test_a_sentencepiece_model_gives_the_ids_of_its_package(kinds, text):
  reference = sentencepiece.SentencePieceProcessor()
  reference.load_from_serialized_proto(sentencepiece_file())
  assert kinds['spaced'].encode(text).tolist() == reference.encode(text)
  assert (kinds['spaced'].bos, kinds['spaced'].eos) == (1, 2)


@quick
@hypothesis.given(text=texts)
def test_ranks_are_merged_lowest_first(kinds, text):
  """Against the definition: of all neighbours the pair of lowest rank is merged, the leftmost of equals."""
  tokenizer, regex = kinds['ranks'], pytest.importorskip('regex')
  ranks = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.vocab - 4)}
  want = []
  for word in regex.findall(PATTERNS['cl100k'], text):
    parts = [bytes([byte]) for byte in word.encode()]
    while True:
      pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
      if not pairs:
        break
      i = min(pairs)[1]
      parts[i:i + 2] = [parts[i] + parts[i + 1]]
    want += [ranks[part] for part in parts]
  assert tokenizer.encode(text).tolist() == want


def test_ranks_keep_the_ids_that_specials_have(tmp_path):
  path = ranks_file(tmp_path)
  made = Loaded(path, pattern=r'\S+|\s+', specials=('<e>', '<f>'), special_ids=(1000, 999), bos='<e>',
                eos='<f>').train()
  assert (made.bos, made.eos, made.vocab) == (1000, 999, 1001)
  assert made.decode([500, 1000]) == ''  # an id between that names nothing


def test_a_folder_says_bos_eos_and_template(tmp_path):
  (tmp_path / 'tokenizer.json').write_text(byte_level().to_str())
  config = {'bos_token': '<s>', 'eos_token': {'content': '<|im_end|>'}, 'chat_template': [
      {'name': 'tool_use', 'template': 'no'}, {'name': 'default', 'template': 'yes'}]}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  made = Loaded(str(tmp_path)).train()
  assert (made.marks, made.chat_template) == ({'bos': '<s>', 'eos': '<|im_end|>'}, 'yes')
  assert Loaded(str(tmp_path), eos='</s>').load().marks['eos'] == '</s>'
  (tmp_path / 'chat_template.jinja').write_text('\u6a21\u677f')
  assert Loaded(str(tmp_path)).load().chat_template == '\u6a21\u677f'
  assert Loaded(str(tmp_path)).identity() != Loaded(str(tmp_path), eos='</s>').identity()
  assert Loaded(str(tmp_path)).pieces == made.vocab


def test_what_lmlib_saved_can_be_loaded_and_given_more(kinds, tmp_path):
  kinds['byte level'].save(tmp_path / 'tokenizer.model')
  more = Loaded(str(tmp_path / 'tokenizer.model'), specials=('<new>',)).train()
  assert (more.bos, more.vocab) == (1, 311)
  assert more.encode_with_specials('<new>').tolist() == [310]


def test_white_space_goes_with_a_special_that_takes_it(tmp_path):
  spec = json.loads(byte_level().to_str())
  spec['added_tokens'][2]['lstrip'] = spec['added_tokens'][3]['rstrip'] = True
  spec['added_tokens'][1] |= {'special': False, 'lstrip': True, 'rstrip': True}
  (tmp_path / 'x.json').write_text(json.dumps(spec))
  made = Loaded(str(tmp_path / 'x.json')).load()
  x = made.encode('x').tolist()
  assert made.encode_with_specials(' \n<|im_start|> x<|im_end|>\n x').tolist() == [
      2, *made.encode(' x').tolist(), 3, *x]
  assert made.decode(made.encode(f' {MARKS[0]} ')) == f' {MARKS[0]} '
  assert made.decode(made.encode(' </s> x')) == ' </s> x'  # one that is text: it would take text along
  assert 1 in made.encode(' </s> x')


@pytest.mark.parametrize(('change', 'said'), [
    (lambda spec: spec['model'].update(type='WordPiece'), 'WordPiece model, which loses text'),
    (lambda spec: spec.update(normalizer={'type': 'Lowercase'}), "loses text: .* comes back as 'ab"),
    (lambda spec: spec.update(normalizer={'type': 'Strip', 'strip_left': True, 'strip_right': True}), 'loses text'),
    (lambda spec: spec['model']['vocab'].pop('x'), "character 0 of the text, 'x', has a byte .* no piece"),
    (lambda spec: spec['model'].update(merges=[['a', '\u4e2d']]), 'cannot be used'),
])
def test_a_tokenizer_json_that_loses_text(tmp_path, change, said):
  spec = json.loads(byte_level().to_str())
  change(spec)
  (tmp_path / 'x.json').write_text(json.dumps(spec))
  with pytest.raises(ValueError, match=rf'x\.json: .*{said}'):
    Tokenizer.load(tmp_path / 'x.json')


def test_a_rare_byte_without_a_piece_is_refused_when_it_comes(tmp_path):
  """As in published files, of which the package drops it in silence."""
  spec = json.loads(byte_level().to_str())
  spec['model']['vocab'].pop('\u0104')  # stands for the byte 4
  (tmp_path / 'x.json').write_text(json.dumps(spec))
  made = Tokenizer.load(tmp_path / 'x.json')
  assert made.decode(made.encode('a\5b')) == 'a\5b'
  with pytest.raises(ValueError, match=r"character 1 of the text, '\\x04'"):
    made.encode('a\4b')


def test_a_model_that_normalises_loses_text(tmp_path):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=330,
                                           model_type='bpe', byte_fallback=True, minloglevel=3, num_threads=1)
  with pytest.raises(ValueError, match=r'loses text: .* comes back as'):
    Tokenizer(model.getvalue())


A = base64.b64encode(b'a').decode()


@pytest.mark.parametrize(('raw', 'settings', 'said'), [
    (f'{A} 0\n', {}, 'ranks, which do not say'), (f'{A} 0\n', {'pattern': 'cl100k'}, 'without the byte 0'),
    (f'{A} 0\n{A} 1\n', {'pattern': 'cl100k'}, 'line 2: .* again'), (f'{A} x\n', {'pattern': 'cl100k'}, 'line 1: '),
    ('{"a": 1}', {}, 'neither a tokenizer.json'), ('{"a": ', {}, 'damaged JSON'),
    ('{"lmlib_tokenizer": 1, "kind": "new", "content": ""}', {}, "kind 'new'"), ('\0\1', {}, 'not a SentencePiece')])
def test_files_that_are_no_tokenizer(tmp_path, raw, settings, said):
  (tmp_path / 'x').write_text(raw)
  with pytest.raises(ValueError, match=f'/x: .*{said}'):
    Loaded(str(tmp_path / 'x'), **settings).load()


@pytest.mark.parametrize(('settings', 'said'), [
    ({}, r'has no bos.*Loaded\.bos; it has <s>, </s>'), ({'bos': '<t>'}, r"Loaded\.bos='<t>' is no special"),
    ({'bos': '<s>', 'eos': '<s>'}, "bos and eos are both '<s>'"),
    ({'specials': ('<s>',)}, "'<s>' is a special already"),
    ({'bos': '<s>', 'eos': '</s>', 'specials': ('!',)}, 'text alone becomes the special token !'),
    ({'chat_template': 'none.jinja'}, 'none.jinja: No such file')])
def test_settings_that_do_not_fit_the_file(tmp_path, settings, said):
  (tmp_path / 'x').write_text(byte_level().to_str())
  with pytest.raises(ValueError, match=said):
    Loaded(str(tmp_path / 'x'), **settings).train()


@pytest.mark.parametrize(('settings', 'said'), [
    ({'specials': ('a', 'a')}, 'specials'), ({'specials': ('',)}, 'specials'), ({'special_ids': (1,)}, 'special_ids')])
def test_settings_that_contradict_themselves(settings, said):
  with pytest.raises(ValueError, match=f'Loaded.{said}='):
    Loaded('x', **settings)


def test_missing_files_and_empty_folders(tmp_path):
  with pytest.raises(ValueError, match='gone: No such file'):
    Loaded(str(tmp_path / 'gone')).load()
  with pytest.raises(ValueError, match=r'without tokenizer\.json'):
    Loaded(str(tmp_path)).load()


def test_the_alphabet_of_bytes_is_a_bijection():
  spelt = pre_tokenizers.ByteLevel.alphabet()
  assert {alphabet_bytes(c) for c in spelt} == {bytes([byte]) for byte in range(256)}


