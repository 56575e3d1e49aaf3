"""Tokenisers in the metadata of a GGUF file, both ways: byte-level BPE ('gpt2') and SentencePiece's BPE ('llama').

A file holds pieces, their types and merges or scores, and by name how text is cut before merging. Out of it is
made what Tokenizer opens, a tokenizer.json or a SentencePiece model, so that a file's tokeniser is held to the same
promises as any other: exact round trips, and no special out of text.
"""
import base64
from collections.abc import Iterator
import json
import struct

import numpy as np

from lmlib.data.tokenizer import Tokenizer, described, envelope
from lmlib.data.tokenizer_formats import PATTERNS, kinds
from lmlib.gin_text import close

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces, here and in SentencePiece
PREFIX = 'tokenizer.ggml.'
DIGIT = r'\p{N}'
TEKKEN = PATTERNS['o200k'].replace('{1,3}', '').replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", '')
# How text is cut before merging, by the name in a file: patterns one after the other, and whether a whole piece is
# taken as it stands, without its merges. Of several names for the same the first is the one that is written.
CUTS = {
    'gpt-2': ((PATTERNS['gpt2'],), False), 'phi-2': ((PATTERNS['gpt2'],), False), 'olmo': ((PATTERNS['gpt2'],), False),
    'smollm': ((DIGIT, PATTERNS['gpt2']), False), 'starcoder': ((DIGIT, PATTERNS['gpt2']), False),
    'refact': ((DIGIT, PATTERNS['gpt2']), False), 'command-r': ((DIGIT, PATTERNS['gpt2']), False),
    'llama-bpe': ((PATTERNS['llama3'],), True), 'llama3': ((PATTERNS['llama3'],), True),
    'llama-v3': ((PATTERNS['llama3'],), True), 'falcon3': ((PATTERNS['llama3'],), True),
    'dbrx': ((PATTERNS['cl100k'],), False), 'smaug-bpe': ((PATTERNS['cl100k'],), False),
    'chatglm-bpe': ((PATTERNS['cl100k'],), False), 'glm4': ((PATTERNS['cl100k'],), True),
    'qwen2': ((PATTERNS['qwen2'],), False), 'deepseek-r1-qwen': ((PATTERNS['qwen2'],), False),
    'stablelm2': ((PATTERNS['qwen2'],), False), 'megrez': ((PATTERNS['qwen2'],), False),
    'gpt-4o': ((PATTERNS['o200k'],), False), 'llama4': ((PATTERNS['o200k'],), False),
    'tekken': ((TEKKEN,), True),
}
BEGUN = ('llama-bpe', 'llama3', 'llama-v3', 'falcon3', 'tekken')  # names of cuts whose texts begin with bos


def tokenizer(metadata: dict[str, object], vocab: int) -> Tokenizer:
  """The tokeniser of a file whose embedding has `vocab` rows. ValueError, naming the key, if it cannot be made."""
  said = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
  pieces, kind = said.get('tokens'), said.get('model')
  if kind not in ('gpt2', 'llama'):
    raise ValueError(f"{PREFIX}model={kind!r:.40} is none that is read: 'gpt2' and 'llama' are")
  if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
    raise ValueError(f'{PREFIX}tokens must be a list of strings')
  if len(pieces) != vocab:
    raise ValueError(f'{PREFIX}tokens has {len(pieces):,} pieces, but the embedding {vocab:,} rows')
  types = _numbers(said, 'token_type', len(pieces), np.full(len(pieces), NORMAL)).astype(int).tolist()
  more = {}
  for name in ('bos', 'eos'):
    if (i := said.get(f'{name}_token_id')) is not None:
      if type(i) is not int or not 0 <= i < len(pieces):
        raise ValueError(f'{PREFIX}{name}_token_id={i!r:.40} is none of {len(pieces):,} pieces')
      more[name], types[i] = pieces[i], CONTROL
  # llama.cpp begins with bos where a file does not say, but for most byte-level BPE.
  if not said.get('add_bos_token', kind == 'llama' or said.get('pre') in BEGUN):
    more['starts'] = False
  if isinstance(template := metadata.get('tokenizer.chat_template'), str):
    more['chat_template'] = template
  try:
    if kind == 'gpt2':
      return Tokenizer(envelope(kind='tokenizer.json', content=_byte_level(said, pieces, types), **more))
    model = base64.b64encode(_sentencepiece(said, pieces, types)).decode()
    return Tokenizer(envelope(kind='sentencepiece', content=model, **more))
  except KeyError as error:
    raise ValueError(f'{PREFIX}{error.args[0]} is missing') from error


def _numbers(said, name: str, count: int, default=None) -> np.ndarray:
  found = said.get(name, default)
  if found is None:
    raise KeyError(name)
  if not isinstance(found, np.ndarray) or found.shape != (count,):
    raise ValueError(f'{PREFIX}{name} must be {count:,} numbers, one a piece')
  return found


def _byte_level(said, pieces: list[str], types: list[int]) -> str:
  """The tokenizer.json of byte-level BPE."""
  if (name := said['pre']) not in CUTS:
    raise ValueError(f'{PREFIX}pre={name!r:.40} says how text is cut, and is not known{close(str(name), CUTS)}; known '
                     f'are: {", ".join(CUTS)}')
  if said.get('add_space_prefix'):
    raise ValueError(f'{PREFIX}add_space_prefix=True is not known of byte-level BPE')
  ids = {piece: i for i, piece in enumerate(pieces) if types[i] != UNUSED}
  if len(ids) != sum(kind != UNUSED for kind in types):
    again = next(piece for i, piece in enumerate(pieces) if types[i] != UNUSED and ids[piece] != i)
    raise ValueError(f'{PREFIX}tokens has {again!r:.100} twice')
  merges = [merge.split(' ') for merge in said['merges']]
  for parts in merges:
    if len(parts) != 2 or not {*parts, ''.join(parts)} <= ids.keys():
      raise ValueError(f'{PREFIX}merges has {" ".join(parts)!r:.100}, which joins no two pieces to a third')
  (*before, last), whole = CUTS[name]
  split = lambda pattern: {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
  byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
  added = [{'id': i, 'content': piece, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
            'special': types[i] != USER_DEFINED}
           for i, piece in enumerate(pieces) if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)]
  return json.dumps({
      'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': None,
      'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [*map(split, before), split(last), byte_level]},
      'post_processor': None, 'decoder': byte_level,
      'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
                'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': whole,
                'vocab': ids, 'merges': merges}}, ensure_ascii=False)


def _sentencepiece(said, pieces: list[str], types: list[int]) -> bytes:
  """The serialised model of SentencePiece's BPE."""
  scores = _numbers(said, 'scores', len(pieces)).astype(np.float32).tolist()
  number = lambda name, default: int(said.get(f'{name}_token_id', default))
  trainer = _varint(3, 2) + _varint(35, 1) + b''.join(  # BPE, byte fallback
      _varint(at, number(name, -1)) for at, name in ((40, 'unknown'), (41, 'bos'), (42, 'eos'), (43, 'padding')))
  if 'unknown_token_id' not in said and UNKNOWN in types:
    trainer += _varint(40, types.index(UNKNOWN))
  charsmap = bytes(np.asarray(said.get('precompiled_charsmap', ()), np.uint8).tolist())
  normalizer = (_field(1, b'identity') + (_field(2, charsmap) if charsmap else b'')
                + _varint(3, int(said.get('add_space_prefix', True)))
                + _varint(4, int(said.get('remove_extra_whitespaces', False))) + _varint(5, 1))
  return b''.join(_field(1, _field(1, piece.encode()) + struct.pack('<Bf', 2 << 3 | 5, score) + _varint(3, kind))
                  for piece, score, kind in zip(pieces, scores, types)) + _field(2, trainer) + _field(3, normalizer)


def metadata(tokenizer: Tokenizer, vocab: int) -> dict[str, object]:
  """What a file says of a tokeniser whose model has `vocab` rows. ValueError if GGUF has no words for it."""
  if tokenizer.vocab > vocab:
    raise ValueError(f'a tokenizer of {tokenizer.vocab:,} pieces, for an embedding of {vocab:,} rows')
  said = described(tokenizer.model)
  if said['kind'] == 'tokenizer.json':
    found = _byte_level_metadata(json.loads(said['content']), vocab)
  elif said['kind'] == 'sentencepiece':
    found = _sentencepiece_metadata(said['content'], vocab)
  else:
    raise ValueError(f"a tokenizer of kind {said['kind']!r}, for which GGUF has no words: it has them for byte-level "
                     "BPE and SentencePiece's BPE")
  pieces, types = found[f'{PREFIX}tokens'], found[f'{PREFIX}token_type']
  for spelling, special in tokenizer.specials.items():
    pieces[special.id], types[special.id] = spelling, types[special.id] if types[special.id] == UNKNOWN else CONTROL
  marks = {name: tokenizer.specials[spelling].id for name, spelling in tokenizer.marks.items()}
  found |= {f'{PREFIX}{name}_token_id': i for name, i in marks.items()}
  found[f'{PREFIX}add_bos_token'] = tokenizer.starts
  if tokenizer.chat_template is not None:
    found['tokenizer.chat_template'] = tokenizer.chat_template
  return found


def _byte_level_metadata(spec: dict, vocab: int) -> dict[str, object]:
  if spec['model'].get('type', 'BPE') != 'BPE' or 'ByteLevel' not in kinds(spec['pre_tokenizer']):
    raise ValueError('a tokenizer.json that is no byte-level BPE, for which GGUF has no words; of SentencePiece it '
                     'takes the .model')
  cut = tuple(_cuts(spec['pre_tokenizer'])), bool(spec['model'].get('ignore_merges', False))
  if {*kinds(spec['normalizer'])} - {'NFC', 'Sequence'} or cut not in CUTS.values():
    raise ValueError(f'a tokenizer that cuts text by {", ".join(cut[0])!r:.200}'
                     f'{" and takes pieces whole" * cut[1]}, for which GGUF has no name; it has names for what '
                     f'{", ".join(CUTS)} do')
  name = next(name for name, other in CUTS.items() if other == cut)
  pieces, types = [f'[PAD{i}]' for i in range(vocab)], [UNUSED] * vocab
  for piece, i in spec['model']['vocab'].items():
    pieces[i], types[i] = piece, NORMAL
  for token in spec['added_tokens']:
    pieces[token['id']], types[token['id']] = token['content'], CONTROL if token['special'] else USER_DEFINED
  merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in spec['model']['merges']]
  return {f'{PREFIX}model': 'gpt2', f'{PREFIX}pre': name, f'{PREFIX}tokens': pieces, f'{PREFIX}token_type': types,
          f'{PREFIX}merges': merges}


def _cuts(part) -> Iterator[str]:
  """The patterns by which a pre-tokeniser cuts text; its description where it is something else."""
  match part:
    case {'type': 'Sequence', 'pretokenizers': parts}:
      for one in parts:
        yield from _cuts(one)
    case {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}:
      yield pattern
    case {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Removed', 'invert': True}:
      yield pattern
    case {'type': 'Digits', 'individual_digits': True}:
      yield DIGIT
    case {'type': 'ByteLevel', 'add_prefix_space': False}:
      if part.get('use_regex', True):
        yield PATTERNS['gpt2']
    case _:
      yield json.dumps(part)


def _sentencepiece_metadata(model: bytes, vocab: int) -> dict[str, object]:
  found = dict(_fields(model))
  trainer, normalizer = dict(_fields(found.get(2, b''))), dict(_fields(found.get(3, b'')))
  if trainer.get(3, 1) != 2:  # 1 is unigram
    raise ValueError('a SentencePiece model that is no BPE, for which GGUF has no words')
  pieces, types = [f'[PAD{i}]' for i in range(vocab)], [UNUSED] * vocab
  scores = [-1e4] * vocab
  for i, raw in enumerate(value for number, value in _fields(model) if number == 1):
    piece = dict(_fields(raw))
    pieces[i], scores[i], types[i] = piece[1].decode(), struct.unpack('<f', piece.get(2, bytes(4)))[0], piece.get(3, 1)
  said = {f'{PREFIX}model': 'llama', f'{PREFIX}pre': 'default', f'{PREFIX}tokens': pieces,
          f'{PREFIX}scores': scores, f'{PREFIX}token_type': types,
          f'{PREFIX}add_space_prefix': bool(normalizer.get(3, 1)),
          f'{PREFIX}remove_extra_whitespaces': bool(normalizer.get(4, 1))}
  return said | ({f'{PREFIX}unknown_token_id': types.index(UNKNOWN)} if UNKNOWN in types else {})


def _varint(number: int, value: int) -> bytes:
  """A field of a protocol buffer that holds a whole number."""
  return _unsigned(number << 3) + _unsigned(value % 2**64)


def _field(number: int, raw: bytes) -> bytes:
  """A field of a protocol buffer that holds bytes."""
  return _unsigned(number << 3 | 2) + _unsigned(len(raw)) + raw


def _unsigned(value: int) -> bytes:
  found = bytearray()
  while value > 127:
    found.append(value & 127 | 128)
    value >>= 7
  return bytes([*found, value])


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
  """Number and value of each field of a protocol buffer that was opened before."""
  at = 0

  def unsigned():
    nonlocal at
    value, shift = 0, 0
    while True:
      byte = raw[at]
      at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
      if byte < 128:
        return value

  while at < len(raw):
    number, kind = divmod(unsigned(), 8)
    if kind == 0:
      yield number, unsigned()
      continue
    size = {1: 8, 5: 4}.get(kind)
    size = unsigned() if size is None else size
    yield number, raw[at:at + size]
    at += size
