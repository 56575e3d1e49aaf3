"""Text to ids and back without loss: decode(encode(text)) is text, to the byte, whatever made the tokeniser.

A config says how to get one: SentencePiece and ByteLevelBpe train it, Loaded reads a file or folder that
another project made, Bytes needs nothing. Behind `Tokenizer` stand the kinds of tokenizer_formats.py. No id
is ever added, and text never becomes a special token, whatever it spells: encode_with_specials is the one
way to have '<|im_start|>' read as a mark, for text that a chat template wrote.
"""
import base64
from collections.abc import Iterable, Iterator
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re

import numpy as np

from lmlib.data import tokenizer_formats, tokenizer_training
from lmlib.data.tokenizer_formats import PATTERNS, Special
from lmlib.data.tokenizer_training import BLOCK

SPECIALS = 3  # unknown or padding, bos, eos
BYTES = 256
# What a lossy tokeniser changes: spaces, lines, case, width, ligatures, accents, rare characters.
PROBES = ('x', ' x', '  a  b\n\n\tc\r\n ', 'aB\u00c9e\u0301\ufb01\uff21\u00bd', '\u4e2d\u6587\uff0c\u3002',
          '\u2581 \u2581', '\0\x7f\ufeff\ufffd\U0001f600\u200d', "don't 2718 <s></s><unk>")
ENVELOPE = 'lmlib_tokenizer'  # the key, and its value the version, of a file that adds marks to another's
# Of the folders that other projects publish: the tokeniser, in the order tried.
FILES = ('tokenizer.json', 'tokenizer.model', 'spiece.model')


class Tokenizer:
  """A tokeniser, recognised from the content of its file. Two of equal `fingerprint` give equal ids."""

  def __init__(self, model: bytes):
    """ValueError if `model` is no tokeniser that is known here, or one that loses text."""
    self.model = model
    said, self._backend = opened(model)
    self.specials: dict[str, Special] = {
        **self._backend.specials, **{spelling: Special(i) for spelling, i in said.get('specials', {}).items()}}
    self.chat_template: str | None = said.get('chat_template')
    self.vocab = max(self._backend.vocab, 1 + max((s.id for s in self.specials.values()), default=0))
    marks = {name: self.specials[said[name]].id for name in ('bos', 'eos') if said.get(name)}
    self._bos, self._eos = marks.get('bos', self._backend.bos), marks.get('eos', self._backend.eos)
    self.starts: bool = self._bos is not None and said.get('starts', True)  # bos begins a prompt
    self.marks = {name: self.spelling(i) for name, i in (('bos', self._bos), ('eos', self._eos)) if i is not None}
    self._special = np.zeros(self.vocab, bool)
    self._special[[special.id for special in self.specials.values()]] = True
    for text in (*PROBES, *said.get('specials', {})):
      if (back := self.decode(self.encode(text))) != text:
        raise ValueError(f'a tokenizer that loses text: {text!r} comes back as {back!r}')

  @classmethod
  def load(cls, path) -> 'Tokenizer':
    """The tokeniser of a file. ValueError, naming it, if it cannot be used."""
    try:
      return cls(pathlib.Path(path).read_bytes())
    except (OSError, ValueError) as error:
      raise ValueError(f'{path}: {getattr(error, "strerror", error)}') from error

  def save(self, path: str | os.PathLike):
    pathlib.Path(path).write_bytes(self.model)

  def __reduce__(self):
    return Tokenizer, (self.model,)

  @property
  def bos(self) -> int:
    """The id that begins a document. ValueError if the tokeniser has none."""
    return self._mark('bos', self._bos)

  @property
  def eos(self) -> int:
    """The id that ends a document. ValueError if the tokeniser has none."""
    return self._mark('eos', self._eos)

  def prompt(self, text: str) -> list[int]:
    """The ids of a text to go on with: behind bos, unless the makers' own texts begin without."""
    return [self.bos] * self.starts + self.encode(text).tolist()

  def _mark(self, name: str, mark: int | None) -> int:
    if mark is None:
      raise ValueError(f'this tokenizer has no {name}: name one of its specials, or a new one, in '
                       f'Loaded.{name}; it has {", ".join(self.specials) or "none"}')
    return mark

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the model, in hexadecimal."""
    return hashlib.sha256(self.model).hexdigest()

  def encode(self, text: str, *, continues: bool = False) -> np.ndarray:
    """The ids of a text, int32; a special id never comes of text. ValueError for half a surrogate pair.

    Some models put a space before every text. It is there in the ids, as their makers' have it, and decode
    takes it away again; not so if the text `continues` another.
    """
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(f'character {error.start} of the text is half of a surrogate pair') from error
    if self._backend.spaced and text and not continues:
      text = ' ' + text
    ids = np.asarray(self._backend.ids(text), np.int32)
    if self._special[ids].any():
      ids = np.array([i for part in self._apart(text) for i in self._backend.ids(part)], np.int32)
      if self._special[ids].any():
        raise ValueError(f'text alone becomes the special token {self.spelling(ids[self._special[ids]][0])}')
    return ids

  def encode_with_specials(self, text: str, *, continues: bool = False, without: str = '') -> np.ndarray:
    """The ids of a text in which specials are written out, such as one from a chat template, int32.

    Only for text whose specials are meant: to a prompt or a document of others, use encode. `without` is left
    out of the text between specials, once these are found.
    """
    def encode(ordinary):
      return self.encode(ordinary.replace(without, '') if without else ordinary, continues=continues)

    ids, start = [], 0
    for begin, stop, special in self.found_specials(text):
      ids += [encode(text[start:begin]), np.array([special], np.int32)]
      start, continues = stop, not self.spaces_after_specials
    return np.concatenate([*ids, encode(text[start:])])

  @property
  def spaced(self) -> bool:
    """Whether the model puts a space before every text."""
    return self._backend.spaced is not None

  @property
  def spaces_after_specials(self) -> bool:
    """Whether the model puts its space before text that follows a special, as before a text of its own."""
    return self._backend.spaced == 'always'

  def found_specials(self, text: str) -> Iterator[tuple[int, int, int]]:
    """(start, stop, id) of every special that a text spells, with the white space that it takes along."""
    start = 0
    for found in self._spelt.finditer(text):
      special, begin, stop = self.specials[found[0]], found.start(), found.end()
      if special.takes_left:
        begin = start + len(text[start:begin].rstrip())
      if special.takes_right:
        stop += len(text[stop:]) - len(text[stop:].lstrip())
      yield begin, stop, special.id
      start = stop

  def decode(self, ids, *, continues: bool = False) -> str:
    """The text of ids. Special ids are no text; bytes that form no character become U+FFFD.

    If the ids `continue` a text, a space at their begin is one of the text, whatever the model.
    """
    raw = self.decode_bytes(ids)
    if self._backend.spaced and not continues:
      raw = raw.removeprefix(b' ')
    return raw.decode(errors='replace')

  def decode_bytes(self, ids) -> bytes:
    """The bytes that ids stand for, one after the other; none for specials. ValueError outside the vocabulary."""
    ids = np.asarray(ids, np.int64)
    if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab):
      raise ValueError(f'ids from {ids.min()} to {ids.max()} lie outside the vocabulary of {self.vocab}')
    return b''.join([self._raw[i] for i in ids.tolist()])

  def is_special(self, ids) -> np.ndarray:
    """Whether each id is a special token, bool."""
    return self._special[np.asarray(ids, np.int64)]

  def spelling(self, i: int) -> str | None:
    """How a special token is written, None for any other id."""
    return self._spellings.get(int(i))

  @functools.cached_property
  def _spellings(self) -> dict[int, str]:
    return {special.id: spelling for spelling, special in self.specials.items()}

  @functools.cached_property
  def _spelt(self) -> re.Pattern:
    """Finds the spelling of a special, the longest at each place; nothing if there are none."""
    longest_first = sorted(filter(None, self.specials), key=len, reverse=True)
    return re.compile('|'.join(map(re.escape, longest_first)) or '(?!)')

  def _apart(self, text: str) -> Iterator[str]:
    """The text cut after the first character of whatever spells a special."""
    start = 0
    for found in self._spelt.finditer(text):
      yield text[start:found.start() + 1]
      start = found.start() + 1
    yield text[start:]

  @functools.cached_property
  def _raw(self) -> tuple[bytes, ...]:
    """The bytes of every id."""
    raw = self._backend.raw()
    raw += [b''] * (self.vocab - len(raw))
    return tuple(b'' if special else one for one, special in zip(raw, self._special.tolist()))


@dataclasses.dataclass(frozen=True)
class SentencePiece:
  """How to train a tokeniser. Deterministic: the same texts in the same order give the same model."""
  pieces: int = 4096  # all of them: 3 specials and 256 bytes count
  longest: int = 32  # characters of a piece
  across_words: bool = False  # a piece may reach over spaces and from one script into another
  coverage: float = 0.9995  # share of the characters read that get a piece; the rest are spelt in bytes
  sample: int = 32_000_000  # characters to train on, spread evenly over a longer text
  model_type: str = 'bpe'  # or 'unigram' (Kudo 2018)

  def __post_init__(self):
    check_training(self)
    if not 0.9 <= self.coverage <= 1:
      raise ValueError(f'SentencePiece.coverage={self.coverage} must lie between 0.9 and 1')
    if self.model_type not in ('bpe', 'unigram'):
      raise ValueError(f"SentencePiece.model_type={self.model_type!r} must be 'bpe' or 'unigram'")

  def identity(self) -> dict:
    """All that the outcome of train() depends on, beside the texts: for a fingerprint."""
    return {'way': 'SentencePiece', **dataclasses.asdict(self)}

  def train(self, texts: Iterable[str], characters: int) -> Tokenizer:
    """A tokeniser for `texts`, which hold about `characters` in all. ValueError if they are too few."""
    return Tokenizer(tokenizer_training.sentencepiece_model(self, texts, characters))


@dataclasses.dataclass(frozen=True)
class ByteLevelBpe:
  """How to train byte-level BPE (Radford et al. 2019). The file is a tokenizer.json, with bos and eos beside it."""
  pieces: int = 4096  # all of them: 3 specials, those named here and 256 bytes count
  longest: int = 32  # bytes of a piece
  pattern: str = 'cl100k'  # a name of tokenizer_formats.PATTERNS: where text is cut before merging
  sample: int = 32_000_000  # characters to train on, spread evenly over a longer text
  specials: tuple[str, ...] = ()  # beside padding, bos and eos, such as '<|im_start|>'

  def __post_init__(self):
    check_training(self)
    if self.pattern not in PATTERNS:
      raise ValueError(f'ByteLevelBpe.pattern={self.pattern!r} must be one of {", ".join(PATTERNS)}')
    if len(set(self.marks)) != len(self.marks) or not all(self.marks):
      raise ValueError(f'ByteLevelBpe.specials={self.specials} names one twice, or one of {self.marks[:SPECIALS]}, '
                       'or nothing')

  @property
  def marks(self) -> tuple[str, ...]:
    """The specials, ids 0, 1, 2, ..."""
    return ('<|pad|>', '<|bos|>', '<|eos|>', *self.specials)

  def identity(self) -> dict:
    """All that the outcome of train() depends on, beside the texts: for a fingerprint."""
    return {'way': 'ByteLevelBpe', **dataclasses.asdict(self)}

  def train(self, texts: Iterable[str], characters: int) -> Tokenizer:
    """A tokeniser for `texts`, which hold about `characters` in all. ValueError if they are too few."""
    content = tokenizer_training.byte_level_json(self, texts, characters)
    return Tokenizer(envelope(kind='tokenizer.json', content=content, bos='<|bos|>', eos='<|eos|>'))


@dataclasses.dataclass(frozen=True)
class Bytes:
  """No training: UTF-8 bytes, three specials before them and the named ones behind."""
  specials: tuple[str, ...] = ()

  def __post_init__(self):
    if len(set(self.specials)) != len(self.specials) or {'', '<pad>', '<bos>', '<eos>'} & set(self.specials):
      raise ValueError(f'Bytes.specials={self.specials} names one twice, or <pad>, <bos>, <eos>, or nothing')

  @property
  def pieces(self) -> int:
    return tokenizer_formats.PlainBytes.vocab + len(self.specials)

  def identity(self) -> dict:
    """All that the outcome of train() depends on: for a fingerprint."""
    return {'way': 'Bytes', **dataclasses.asdict(self)}

  def train(self, texts: Iterable[str] = (), characters: int = 0) -> Tokenizer:
    """The tokeniser; texts are not looked at."""
    first = tokenizer_formats.PlainBytes.vocab
    return Tokenizer(envelope(kind='bytes', content='', specials={s: first + i for i, s in enumerate(self.specials)}))


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A tokeniser that exists: a SentencePiece .model, a tokenizer.json, tiktoken ranks, a file that lmlib saved,
  or a folder with one of the first two, whose tokenizer_config.json then tells bos, eos and chat template.

  `bos` and `eos` are spellings of specials; `specials` are spellings that become specials, of pieces that the
  file holds already (not for ranks: a rank is never a special), or new ones, whose ids follow its own. Ranks
  need `pattern`, a name of tokenizer_formats.PATTERNS or a regular expression. `chat_template` is a path.
  """
  path: str
  pattern: str | None = None
  bos: str | None = None
  eos: str | None = None
  specials: tuple[str, ...] = ()
  special_ids: tuple[int, ...] | None = None  # of the `specials`, where they are not the next free ones
  chat_template: str | None = None

  def __post_init__(self):
    if len(set(self.specials)) != len(self.specials) or '' in self.specials:
      raise ValueError(f'Loaded.specials={self.specials} names one twice, or nothing')
    if self.special_ids is not None and len(self.special_ids) != len(self.specials):
      raise ValueError(f'Loaded.special_ids={self.special_ids} must be as many as specials={self.specials}')

  @property
  def pieces(self) -> int:
    return self.load().vocab

  def identity(self) -> dict:
    """All that the outcome depends on: the content of the file, wherever it lies."""
    return {'way': 'Loaded', 'tokenizer': self.load().fingerprint}

  def train(self, texts: Iterable[str] = (), characters: int = 0) -> Tokenizer:
    """The tokeniser, for documents in a store; texts are not looked at. ValueError if it cannot mark their ends."""
    tokenizer = self.load()
    if tokenizer.bos == tokenizer.eos:
      raise ValueError(f'Loaded.path={self.path!r}: bos and eos are both {tokenizer.spelling(tokenizer.bos)!r}, but '
                       "documents need two marks: give Loaded.bos another, such as a new one of Loaded.specials")
    return tokenizer

  def load(self) -> Tokenizer:
    """The tokeniser. ValueError, naming the file, if it cannot be used."""
    path, said = pathlib.Path(os.path.expanduser(self.path)), {}
    try:
      if path.is_dir():
        path, said = in_folder(path)
      said |= {name: value for name, value in (('bos', self.bos), ('eos', self.eos)) if value is not None}
      if self.chat_template is not None:
        said['chat_template'] = pathlib.Path(os.path.expanduser(self.chat_template)).read_text(encoding='utf-8')
      model = path.read_bytes()
      return opened_once(marked(model, said, self) if said or self.specials or self.pattern else model)
    except OSError as error:
      raise ValueError(f'Loaded: {error.filename or path}: {error.strerror}') from error
    except ValueError as error:
      raise ValueError(f'Loaded: {path}: {error}') from error


def check_training(config):
  """ValueError, naming the setting, for what no training can do."""
  name, specials = type(config).__name__, SPECIALS + len(getattr(config, 'specials', ()))
  if config.pieces <= specials + BYTES:
    raise ValueError(f'{name}.pieces={config.pieces} must exceed {specials + BYTES}: '
                     f'{specials} specials and {BYTES} bytes')
  if not 1 <= config.longest <= 512:
    raise ValueError(f'{name}.longest={config.longest} must lie between 1 and 512')
  if config.sample < BLOCK:
    raise ValueError(f'{name}.sample={config.sample} must be at least {BLOCK} characters')


@functools.lru_cache(4)
def opened_once(model: bytes) -> Tokenizer:
  """Tokenizer(model), without the second that a large one takes when a config is asked for it again."""
  return Tokenizer(model)


def envelope(**said) -> bytes:
  """A file that says of another, its `content`, what that leaves open: bos, eos, specials, pattern, chat_template."""
  return json.dumps({ENVELOPE: 1, **said}, sort_keys=True, ensure_ascii=False).encode()


def opened(model: bytes):
  """What an envelope says ({} without one) and the kind of tokeniser in it. ValueError if it is unknown."""
  said = described(model)
  content = said.pop('content')
  match said['kind']:
    case 'sentencepiece':
      return said, tokenizer_formats.SentencePieceModel(content)
    case 'tokenizer.json':
      return said, tokenizer_formats.HuggingFaceJson(content)
    case 'ranks':
      return said, tokenizer_formats.Ranks(content, said['pattern'], said.get('specials', {}))
    case 'bytes':
      return said, tokenizer_formats.PlainBytes()
  raise ValueError(f'a tokenizer of kind {said["kind"]!r}, which this lmlib does not know')


def described(model: bytes) -> dict:
  """The `kind` and `content` of a tokeniser's file, bytes of a SentencePiece model or text, and what else it says."""
  if model.lstrip()[:1] == b'{':
    try:
      said = json.loads(model)
    except ValueError as error:
      raise ValueError(f'not a tokenizer: damaged JSON: {error}') from error
    if 'model' in said and 'added_tokens' in said:
      return {'content': model.decode(), 'kind': 'tokenizer.json'}
    if said.get(ENVELOPE) != 1:
      raise ValueError(f'JSON, but neither a tokenizer.json nor a file of lmlib; it has {", ".join(said)[:100]}')
    if said['kind'] == 'sentencepiece':
      said['content'] = base64.b64decode(said['content'])
    return said
  if re.match(rb'[A-Za-z0-9+/]+={0,2} \d+\r?\n', model):
    raise ValueError("tiktoken ranks, which do not say how text is cut: use Loaded(path, pattern='cl100k')")
  return {'content': model, 'kind': 'sentencepiece'}


def marked(model: bytes, said: dict, config: Loaded) -> bytes:
  """The file `model` in an envelope with what `said` and a Loaded config add to it."""
  if config.pattern is not None:
    said |= {'kind': 'ranks', 'pattern': config.pattern, 'content': model.decode(errors='replace')}
    backend = tokenizer_formats.Ranks(said['content'], config.pattern, {})
  else:
    inner, backend = opened(model)
    content = json.loads(model)['content'] if ENVELOPE in inner else (
        base64.b64encode(model).decode() if inner['kind'] == 'sentencepiece' else model.decode())
    said = inner | said | {'content': content}
  specials = dict(said.get('specials', {}))
  known = {**backend.specials, **specials}
  if again := [spelling for spelling in config.specials if spelling in known]:
    raise ValueError(f'Loaded.specials={config.specials}: {again[0]!r} is a special already')
  free = max([backend.vocab - 1, *specials.values()]) + 1
  for n, spelling in enumerate(config.specials):
    found = None if config.pattern else backend.id_of(spelling)
    given = config.special_ids[n] if config.special_ids else None
    specials[spelling] = found if given is None and found is not None else free if given is None else given
    free = max(free, specials[spelling] + 1)
  if specials:
    said['specials'] = specials
  for name in ('bos', 'eos'):
    if said.get(name) and said[name] not in {**backend.specials, **specials}:
      raise ValueError(f'Loaded.{name}={said[name]!r} is no special of it: it has '
                       f'{", ".join({**backend.specials, **specials}) or "none"}; a new one goes to Loaded.specials')
  return envelope(**said)


def published(tokenizer: Tokenizer) -> tuple[str, bytes]:
  """The file that others know a tokeniser as: its name, and its content. ValueError for kinds of ours alone."""
  model = tokenizer.model
  said, backend = opened(model)
  specials = {spelling: i for spelling, i in said.get('specials', {}).items() if spelling not in backend.specials}
  kind = {tokenizer_formats.SentencePieceModel: 'tokenizer.model',
          tokenizer_formats.HuggingFaceJson: 'tokenizer.json'}.get(type(backend))
  if kind is None or (specials and kind == 'tokenizer.model'):
    raise ValueError(f'a tokenizer of {type(backend).__name__}{" with added specials" if specials else ""} has no '
                     'form that others read: only SentencePiece models and tokenizer.json have')
  content = json.loads(model)['content'] if ENVELOPE in said else model
  if kind == 'tokenizer.model':
    return kind, content if isinstance(content, bytes) else base64.b64decode(content)
  spec = json.loads(content)
  spec['added_tokens'] += [
      dict(id=i, content=spelling, special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
      for spelling, i in specials.items()]
  if tokenizer.starts:
    bos = tokenizer.spelling(tokenizer.bos)
    template = [{'SpecialToken': {'id': bos, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]
    spec['post_processor'] = {
        'type': 'TemplateProcessing', 'single': template, 'pair': [*template, {'Sequence': {'id': 'B', 'type_id': 1}}],
        'special_tokens': {bos: {'id': bos, 'ids': [tokenizer.bos], 'tokens': [bos]}}}
  return kind, json.dumps(spec, ensure_ascii=False).encode()


def in_folder(folder: pathlib.Path) -> tuple[pathlib.Path, dict]:
  """Of a folder of another project the tokeniser's file, and what the files beside say of it."""
  paths = [folder / name for name in FILES if (folder / name).is_file()]
  if not paths:
    raise ValueError(f'a folder without {" or ".join(FILES)}')
  said, config, template = {}, folder / 'tokenizer_config.json', folder / 'chat_template.jinja'
  if config.is_file():
    found = json.loads(config.read_text(encoding='utf-8'))
    for name in ('bos', 'eos'):
      token = found.get(f'{name}_token')
      token = token.get('content') if isinstance(token, dict) else token
      if token:
        said[name] = token
    templates = found.get('chat_template')
    if isinstance(templates, list):  # several, by name
      templates = {one['name']: one['template'] for one in templates}.get('default')
    if templates:
      said['chat_template'] = templates
    if 'bos' in said and not found.get('add_bos_token', _begins_with_special(paths[0])):
      said['starts'] = False
  if template.is_file():
    said['chat_template'] = template.read_text(encoding='utf-8')
  return paths[0], said


def _begins_with_special(path: pathlib.Path) -> bool:
  """Whether a tokeniser's file puts a special before every text, as far as it says so itself."""
  if path.suffix != '.json':
    return True  # a SentencePiece model says nothing, and the families that publish one do
  processor = json.loads(path.read_text(encoding='utf-8')).get('post_processor') or {}
  templates = [part for part in processor.get('processors', [processor]) if part.get('type') == 'TemplateProcessing']
  return any('SpecialToken' in part['single'][0] for part in templates if part['single'])
