"""The kinds of tokeniser behind `tokenizer.Tokenizer`: SentencePiece, tokenizer.json, tiktoken ranks, bytes.

Each turns ordinary text into ids that spell it to the byte, and knows the bytes of every id. What their own
packages do beside that is left out: no bos is added, no text is cut or padded, no merge is dropped at random,
no special token is found in text. Where a model puts a space before every text, `spaced` is 'first', or 'always'
if it does so behind specials too; elsewhere it is None.
"""
import base64
import dataclasses
import functools
import json
import re

from lmlib.data import units

SPACE = '\u2581'
# Of a SentencePiece model: normalizer_spec { add_dummy_prefix: false }. Appended to it, it has the last word.
NO_PREFIX = b'\x1a\x02\x18\x00'
# How text is cut before merging, by name: https://github.com/openai/tiktoken and the models' own files.
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_REST = r'\s*[\r\n]+|\s+(?!\S)|\s+'
_CL100K = _ENDINGS + r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|' + _REST
PATTERNS = {
    'gpt2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    'cl100k': _CL100K,
    'llama3': _CL100K,
    'qwen2': _CL100K.replace('{1,3}', ''),  # a digit at a time
    'o200k': (rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*'
              rf'{_ENDINGS}?|' r'\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|' + _REST),
}


@dataclasses.dataclass(frozen=True)
class Special:
  """A control token. In a text with specials it takes the white space beside it along, if its file says so."""
  id: int
  takes_left: bool = False
  takes_right: bool = False


class SentencePieceModel:
  """A serialised SentencePiece model, with byte fallback. U+2581, its sign for a space, is spelt in bytes."""

  def __init__(self, model: bytes):
    """ValueError if `model` is no SentencePiece model, or one that cannot spell unknown text in bytes."""
    import sentencepiece
    try:
      self._processor = processor = sentencepiece.SentencePieceProcessor()
      processor.load_from_serialized_proto(model)
    except RuntimeError as error:
      raise ValueError('not a SentencePiece model') from error
    self._spelt = [processor.piece_to_id(f'<0x{byte:02X}>') for byte in SPACE.encode()]
    if not all(map(processor.is_byte, self._spelt)):
      raise ValueError('a SentencePiece model without byte fallback, which loses text')
    first = processor.encode('x', out_type=str)[0]
    self.spaced = 'always' if first.startswith(SPACE) else None
    if self.spaced:
      processor.load_from_serialized_proto(model + NO_PREFIX)
    self.vocab = processor.vocab_size()
    self.bos, self.eos = (i if i >= 0 else None for i in (processor.bos_id(), processor.eos_id()))
    self.specials = {processor.id_to_piece(i): Special(i) for i in range(self.vocab) if self._control(i)}

  def _control(self, i: int) -> bool:
    return self._processor.is_control(i) or self._processor.is_unknown(i)

  @functools.cached_property
  def _units(self) -> units.Units | None:
    return units.Units(self._processor) if units.fits(self._processor) else None

  def ids(self, text: str):
    if SPACE not in text:
      return self._processor.encode(text) if self._units is None else self._units.ids(text)
    ids = []
    for part in re.split(f'({SPACE})', text):
      ids += self._spelt if part == SPACE else self._processor.encode(part)
    return ids

  def id_of(self, spelling: str) -> int | None:
    """The id of a piece as the file spells it."""
    found = self._processor.piece_to_id(spelling)
    return found if self._processor.id_to_piece(found) == spelling else None

  def raw(self) -> list[bytes]:
    """The bytes of every id."""
    return [b'' if self._control(i) else metaspace_bytes(self._processor.id_to_piece(i),
                                                         byte=self._processor.is_byte(i))
            for i in range(self.vocab)]


class HuggingFaceJson:
  """A tokenizer.json of the `tokenizers` package: byte-level BPE, or a converted SentencePiece model.

  Unicode normalisation to NFC, as of Qwen, is left out: text in NFC has the same ids, other text keeps its
  bytes. A character with a byte for which the file has no piece is refused. A space that the file puts before
  a text becomes `spaced`, so that ' x' and 'x' stay apart.
  """

  def __init__(self, text: str):
    """ValueError if `text` is no tokenizer.json, or of a kind that loses text whatever is done."""
    import tokenizers
    spec = json.loads(text)
    kind = spec['model'].get('type', 'BPE')
    if kind not in ('BPE', 'Unigram'):
      raise ValueError(f'a tokenizer.json with a {kind} model, which loses text')
    self.spaced = None
    for key in ('normalizer', 'pre_tokenizer'):
      spec[key] = self._without_space(spec[key])
    spec |= {'truncation': None, 'padding': None, 'post_processor': None}
    if 'dropout' in spec['model']:
      spec['model']['dropout'] = None
    added = {token['content']: token for token in spec['added_tokens']}
    self.specials = {content: Special(token['id'], token['lstrip'], token['rstrip'])
                     for content, token in added.items() if token['special']}
    for token in spec['added_tokens']:
      token['lstrip'] = token['rstrip'] = False
    self._ordinary = {token['id']: content for content, token in added.items() if not token['special']}
    self._byte_level = 'ByteLevel' in {*kinds(spec['pre_tokenizer']), *kinds(spec['decoder'])}
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the package raises Exception itself
      raise ValueError(f'a tokenizer.json that cannot be used: {error}') from error
    self._tokenizer.encode_special_tokens = True  # in text they are text
    names = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab = max(names.values()) + 1
    self.bos = self.eos = None
    self._spelt = [names.get(f'<0x{byte:02X}>') for byte in SPACE.encode()]
    # Some published files lack bytes that their makers' texts did not hold, and drop these without a word.
    self._lost = bytes(byte for c, byte in alphabet().items() if self._byte_level and c not in names)
    if not self._byte_level and not {f'<0x{byte:02X}>' for byte in range(256)} <= names.keys():
      raise ValueError('a tokenizer.json without byte fallback, which loses text')

  def _without_space(self, part):
    """A part of the file that adds no space before the text and does not normalise to NFC."""
    if not isinstance(part, dict):
      return part
    if part['type'] in ('NFC', 'Prepend'):
      self.spaced = 'always' if part['type'] == 'Prepend' else self.spaced
      return None
    part = dict(part)
    for key in ('normalizers', 'pretokenizers'):
      if key in part:
        part[key] = [kept for kept in map(self._without_space, part[key]) if kept]
    if part['type'] == 'Metaspace':
      scheme = part.get('prepend_scheme', 'always')
      self.spaced = scheme if scheme != 'never' and part.get('add_prefix_space', True) else self.spaced
      part.pop('add_prefix_space', None)
      part['prepend_scheme'] = 'never'
    elif part['type'] == 'ByteLevel':
      self.spaced = 'always' if part['add_prefix_space'] else self.spaced
      part['add_prefix_space'] = False
    return part

  def ids(self, text: str) -> list[int]:
    if self._lost and len(raw := text.encode()) != len(raw.translate(None, self._lost)):
      at, c = next((at, c) for at, c in enumerate(text) if set(c.encode()) & set(self._lost))
      raise ValueError(f'character {at} of the text, {c!r}, has a byte that this tokenizer has no piece for')
    if self._byte_level or SPACE not in text:
      return self._tokenizer.encode(text, add_special_tokens=False).ids
    ids = []
    for part in re.split(f'({SPACE})', text):
      ids += self._spelt if part == SPACE else self._tokenizer.encode(part, add_special_tokens=False).ids
    return ids

  def id_of(self, spelling: str) -> int | None:
    """The id of a piece as the file spells it."""
    return self._tokenizer.token_to_id(spelling)

  def raw(self) -> list[bytes]:
    """The bytes of every id."""
    special = {special.id for special in self.specials.values()}
    found = [b''] * self.vocab
    for piece, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
      if i in self._ordinary:
        found[i] = self._ordinary[i].encode()
      elif i not in special:
        byte = re.fullmatch('<0x[0-9A-F]{2}>', piece)
        found[i] = alphabet_bytes(piece) if self._byte_level else metaspace_bytes(piece, byte=bool(byte))
    return found


class Ranks:
  """Byte-level BPE from ranks, a line each of base64 bytes and a number, merged by tiktoken."""

  spaced, bos, eos = None, None, None

  def __init__(self, text: str, pattern: str, specials: dict[str, int]):
    """`pattern` cuts text before merging: a name of PATTERNS or a regular expression. ValueError for bad ranks."""
    import tiktoken
    ranks = {}
    for number, line in enumerate(text.splitlines(), 1):
      if line:
        try:
          piece, rank = line.split(' ')
          piece, rank = base64.b64decode(piece, validate=True), int(rank)
        except ValueError as error:
          raise ValueError(f'line {number}: {line[:80]!r} is not base64, a space and a rank') from error
        if piece in ranks or not piece:
          raise ValueError(f'line {number}: the piece {piece!r} ' + ('again' if piece else 'holds nothing'))
        ranks[piece] = rank
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
      raise ValueError(f'ranks without the byte {missing[0]}, which lose text')
    taken = [*ranks.values(), *specials.values()]
    if len(set(taken)) != len(taken) or min(taken) < 0:
      raise ValueError(f'two pieces or specials have one id, or an id is negative; the specials are {specials}')
    self._ranks, self.vocab = ranks, max(taken) + 1
    self.specials = {spelling: Special(i) for spelling, i in specials.items()}
    self._encoding = tiktoken.Encoding('ranks', pat_str=PATTERNS.get(pattern, pattern), mergeable_ranks=ranks,
                                       special_tokens=specials)

  def ids(self, text: str) -> list[int]:
    return self._encoding.encode_ordinary(text)

  def id_of(self, spelling: str) -> int | None:
    """The id of a piece of these bytes."""
    return self._ranks.get(spelling.encode())

  def raw(self) -> list[bytes]:
    """The bytes of every id."""
    found = [b''] * self.vocab
    for piece, rank in self._ranks.items():
      found[rank] = piece
    return found


class PlainBytes:
  """UTF-8 bytes: ids 0, 1, 2 are padding, bos and eos, byte b is b + 3 (as in ByT5, Xue et al. 2021)."""

  FIRST = 3
  vocab, spaced, bos, eos = FIRST + 256, None, 1, 2

  def __init__(self):
    self.specials = {'<pad>': Special(0), '<bos>': Special(1), '<eos>': Special(2)}

  def ids(self, text: str) -> list[int]:
    return [byte + self.FIRST for byte in text.encode()]

  def id_of(self, spelling: str) -> int | None:
    raw = spelling.encode()
    return raw[0] + self.FIRST if len(raw) == 1 else None

  def raw(self) -> list[bytes]:
    """The bytes of every id."""
    return [b''] * self.FIRST + [bytes([byte]) for byte in range(256)]


def kinds(part) -> list[str]:
  """The types that a part of a tokenizer.json is made of."""
  if isinstance(part, dict):
    return [part['type'], *(kind for value in part.values() for kind in kinds(value))] if 'type' in part else []
  return [kind for value in part for kind in kinds(value)] if isinstance(part, list) else []


def metaspace_bytes(piece: str, *, byte: bool) -> bytes:
  """The bytes of a piece of SentencePiece's spelling, of which <0x41> is one byte if `byte`."""
  return bytes([int(piece[3:5], 16)]) if byte else piece.replace(SPACE, ' ').encode()


@functools.cache
def alphabet() -> dict[str, int]:
  """The printable character that stands for each byte in byte-level BPE (Radford et al. 2019)."""
  printable = [*range(ord('!'), ord('~') + 1), *range(0xa1, 0xad), *range(0xae, 0x100)]
  others = (byte for byte in range(256) if byte not in printable)
  return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def alphabet_bytes(piece: str) -> bytes:
  """The bytes of a piece in the spelling of byte-level BPE; other characters stand for themselves."""
  known = alphabet()
  return b''.join(bytes([known[c]]) if c in known else c.encode() for c in piece)
