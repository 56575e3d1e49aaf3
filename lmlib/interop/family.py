"""How a published family of models maps to ours: its config.json, and its tensors as a table of axes.

A table says of every tensor of theirs how its axes are made of our letters, as in

  'model.layers.{L}.self_attn.q_proj.weight': Entry('KGH D', {'blocks/attention/q': ''})

Their axes are separated by spaces, each a product of our letters in their order; how ours lie is known from
the model (sharding.letters), so reshapes and transposes follow. {L}, and {E} for experts kept apart, run over
leading axes of ours. '+' stands where several of ours follow one another, each with the letters given there:

  'model.layers.{L}.self_attn.qkv_proj.weight': Entry('+ D', {q: 'KGH', k: 'KH', v: 'KH'})    one after the other
  '...attention.query_key_value.weight':        Entry('K+ D', {q: 'GH', k: 'H', v: 'H'})     in every key head
  '...mlp.gate_up_proj':                        Entry('D F+', {gate: '', up: ''})            taking turns

'1' is an axis of size one. The same table is read in both directions; nothing is copied on the way in.
"""
from collections.abc import Callable, Mapping
import dataclasses
import functools
import importlib
import itertools
import math
import pkgutil
import re

from flax import linen as nn
import numpy as np

from lmlib import sharding, trees
from lmlib.gin_text import close
from lmlib.models import protocol
from lmlib.train.checkpoint_arrays import copied

# Keys of a config.json that change no logits: of training, generating, and what files are called.
INERT = frozenset((
    '_name_or_path', 'architectures', 'attention_dropout', 'auto_map', 'bos_token_id', 'classifier_dropout',
    'dtype', 'embd_pdrop', 'eos_token_id', 'attn_pdrop', 'resid_pdrop', 'hidden_dropout', 'hidden_dropout_prob',
    'attention_probs_dropout_prob', 'dropout_rate', 'id2label', 'label2id', 'initializer_range',
    'initializer_factor', 'model_type', 'output_attentions', 'output_hidden_states', 'output_router_logits',
    'pad_token_id', 'pretraining_tp', 'problem_type', 'return_dict', 'router_aux_loss_coef', 'summary_activation',
    'summary_first_dropout', 'summary_proj_to_labels', 'summary_type', 'summary_use_proj', 'task_specific_params',
    'torch_dtype', 'transformers_version', 'use_cache'))

PROBE = 64  # tokens of a row that a logits check reads
MOST = 1_000_000  # tensors of a model


class Said(dict):
  """A config.json that notes which of its keys are looked at.

  tensors: the names in the files beside it, None if there are no files, for families whose config.json tells of
  tensors that a file may lack.
  """

  def __init__(self, *args, tensors: frozenset[str] | None = None):
    super().__init__(*args)
    self._seen, self.tensors = set(), tensors

  def __getitem__(self, key):
    if (found := self.get(key)) is None:
      raise ValueError(f'config.json has no {key!r}, which a {self.get("model_type")} model needs')
    return found

  def get(self, key, default=None):
    """The value, or the default; a null counts as absent. ValueError for a number that is no size."""
    self._seen.add(key)
    found = super().get(key)
    if type(found) is int and abs(found) >= 2**31:
      raise ValueError(f'config.json says {key}={found}; sizes lie below 2**31')
    return default if found is None else found

  def given(self, key, default=None):
    """The value, a null too; the default if the key is absent."""
    self._seen.add(key)
    return super().get(key, default)

  def only(self, key, *known, default=None):
    """The value if it is one of those `known`. ValueError if it is not: nothing is passed over."""
    if (value := self.get(key, default)) not in known:
      raise ValueError(f'config.json says {key}={value!r}; known here: '
                       f'{", ".join(map(repr, known))}')
    return value

  def unread(self) -> list[str]:
    """The keys that nobody has looked at, of those that may change what the model computes."""
    return sorted(key for key, value in self.items()
                  if key not in self._seen | INERT and value not in (None, False, [], {}))


@dataclasses.dataclass(frozen=True)
class Entry:
  """The axes of a tensor of theirs, and what of ours it holds: letters at the '+' by our path."""
  dims: str
  parts: Mapping[str, str]
  plus: float = 0.0  # ours = theirs + plus: some store the scale of a norm less 1
  start: int = 0  # the number that {L} has for our first layer


def tokens(config: protocol.Config) -> tuple[tuple, dict]:
  tokens_BT = np.random.default_rng(0).integers(0, config.vocab, (2, min(config.length, PROBE)), np.int32)
  return (tokens_BT,), {'input_ids': tokens_BT}


@dataclasses.dataclass(frozen=True)
class Family:
  """Models that one config class of ours can hold, as others publish them.

  `read` makes our config of a config.json (read with Said's methods, so that what was overlooked is known),
  `write` a config.json of our config without model_type and architectures; both raise ValueError for what the
  other side has no words for, and read(write(config)) is config but for how it computes.
  """
  model_types: tuple[str, ...]  # of config.json
  architectures: tuple[str, ...]  # of config.json, one a model_type; transformers' class for it
  read: Callable[[Said], protocol.Config]
  write: Callable[[protocol.Config], dict]
  tensors: Callable[[protocol.Config], dict[str, Entry | tuple[Entry, ...]]]  # several: each of a stack of layers
  prefixes: tuple[str, ...] = ()  # that a file's names may have more, or lack
  ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)  # regular expressions: why
  # Tensors that may be there beside those of the table and must then equal one of it: 'lm_head.weight'.
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # What a comparison of logits gives to both sides: our arguments after {'params': params}, and theirs by name.
  probe: Callable[[protocol.Config], tuple[tuple, dict]] = tokens


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a part of one of their tensors lies in ours: params[path][index], with these letters."""
  path: str
  index: tuple[int, ...]
  letters: str
  inner: str  # of the letters, those at the '+'
  shape: tuple[int, ...]

  def size(self, letters: str) -> int:
    return math.prod(self.shape[self.letters.index(letter)] for letter in letters)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of theirs: its name, its axes as factors (letters, '+'), and the places of its parts."""
  name: str
  dims: tuple[str, ...]
  places: tuple[Place, ...]
  plus: float = 0.0

  @functools.cached_property
  def shape(self) -> tuple[int, ...]:
    return tuple(math.prod(map(self._size, dim)) for dim in self.dims)

  @functools.cached_property
  def _factors(self) -> str:
    return ''.join(self.dims).replace('1', '')

  def _size(self, factor: str) -> int:
    if factor == '+':
      return sum(place.size(place.inner) for place in self.places)
    return 1 if factor == '1' else self.places[0].size(factor)

  def split(self, theirs: np.ndarray) -> list[np.ndarray]:
    """Our parts of their tensor, one a place: views, or float32 where something is added."""
    if theirs.shape != self.shape:
      raise ValueError(f'{self.name} has the shape {theirs.shape}, and must have {self.shape}')
    x, found, start = theirs.reshape(list(map(self._size, self._factors))), [], 0
    at = self._factors.find('+')
    for place in self.places:
      part, factors = x, self._factors
      if at >= 0:
        stop = start + place.size(place.inner)
        part = part[(slice(None),) * at + (slice(start, stop),)]
        part = part.reshape(*part.shape[:at], *map(place.size, place.inner), *part.shape[at + 1:])
        factors, start = factors.replace('+', place.inner), stop
      part = part.transpose([factors.index(letter) for letter in place.letters])
      found.append(part.astype(np.float32) + np.float32(self.plus) if self.plus else part)
    return found

  def join(self, ours: list[np.ndarray]) -> np.ndarray:
    """Their tensor from our parts, one a place."""
    parts, at = [], self._factors.find('+')
    for place, part in zip(self.places, ours):
      if part.shape != place.shape:
        raise ValueError(f'{place.path}, for {self.name}, has the shape {part.shape}, and must have {place.shape}')
      factors = self._factors.replace('+', place.inner)
      part = part.transpose([place.letters.index(letter) for letter in factors])
      if at >= 0:
        rest = part.shape[at + len(place.inner):]
        part = part.reshape(*part.shape[:at], place.size(place.inner), *rest)
      parts.append(part.astype(np.float32) - np.float32(self.plus) if self.plus else part)
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=at)
    return copied(joined, np.empty(joined.shape, joined.dtype)).reshape(self.shape)


@functools.lru_cache(8)
def shapes(config: protocol.Config):
  """protocol.boxed(config), traced once."""
  return protocol.boxed(config)


def tensors(family: Family, config: protocol.Config) -> dict[str, Tensor]:
  """Every tensor of theirs by name, in the order of the table. Nothing is computed.

  ValueError, naming the entry, for a table that does not fit the model, or leaves out or names twice one of
  the model's weights: a fault of the family's file.
  """
  boxed = shapes(config)
  letters, leaves = trees.flat(sharding.letters(boxed)), trees.flat(nn.unbox(boxed))
  found, filled = {}, {}
  entries = ((template, entry) for template, some in family.tensors(config).items()
             for entry in (some if isinstance(some, tuple) else (some,)))
  for template, entry in entries:
    for path in entry.parts:
      if path not in letters:
        raise ValueError(f'{template}: the model has no weight {path!r}{close(path, letters)}')
      if path in filled:
        raise ValueError(f'{template}: {path} is filled by {filled[path]} already')
      filled[path] = template
    for tensor in _tensors(template, entry, {path: (letters[path], leaves[path].shape) for path in entry.parts}):
      if tensor.name in found:
        raise ValueError(f'{template}: {tensor.name} is there twice')
      found[tensor.name] = tensor
  if missing := sorted(letters.keys() - filled.keys()):
    raise ValueError(f'{family.model_types[0]}: no entry fills {", ".join(missing)}')
  return found


def _tensors(template: str, entry: Entry, ours: dict[str, tuple[str, tuple[int, ...]]]):
  """The tensors that a template stands for; ours: letters and shape of every part."""
  running = re.findall(r'\{(\w)\}', template)
  sizes = {}
  for path, (letters, shape) in ours.items():
    if letters[:len(running)] != ''.join(running):
      raise ValueError(f'{template}: {path} is {letters}, which does not begin with {"".join(running)}')
    for letter, size in zip(running, shape):
      if sizes.setdefault(letter, size) != size:
        raise ValueError(f'{template}: {letter} is {sizes[letter]} and, in {path}, {size}')
  if (many := math.prod(sizes.values())) > MOST:
    raise ValueError(f'{template} stands for {many:,} tensors; at most {MOST:,} are read')
  dims = tuple(entry.dims.split())
  rest = {path: (letters[len(running):], shape[len(running):]) for path, (letters, shape) in ours.items()}
  _check(template, dims, entry, rest)
  for index in itertools.product(*(range(sizes[letter]) for letter in running)):
    name = template
    for letter, i in zip(running, index):
      name = name.replace(f'{{{letter}}}', str(i + entry.start if letter == 'L' else i))
    places = tuple(Place(path, index, letters, entry.parts[path], shape) for path, (letters, shape) in rest.items())
    yield Tensor(name, dims, places, entry.plus)


def _check(template: str, dims: tuple[str, ...], entry: Entry, rest: dict):
  """ValueError unless the axes of theirs and of ours are made of the same letters and sizes."""
  factors, sizes = ''.join(dims), {}
  if bad := [dim for dim in dims if not re.fullmatch(r'1|[A-Z]*\+?[A-Z]*', dim)]:
    raise ValueError(f'{template}: the axis {bad[0]!r} of {entry.dims!r} is neither 1 nor letters and +')
  if factors.count('+') > 1 or ('+' in factors) != (len(rest) > 1):
    raise ValueError(f'{template}: {entry.dims!r} has {factors.count("+")} +, with {len(rest)} parts: '
                     'one + joins several parts')
  for path, (letters, shape) in rest.items():
    inner = entry.parts[path]
    if inner and '+' not in factors:
      raise ValueError(f'{template}: {path} says {inner!r}, but {entry.dims!r} has no + to put it')
    theirs = factors.replace('1', '').replace('+', inner)
    if sorted(theirs) != sorted(letters) or len(set(letters)) != len(letters):
      raise ValueError(f'{template}: {entry.dims!r} with {inner!r} is made of {theirs}, but {path} of {letters}; '
                       'every letter must be there once')
    for letter, size in zip(letters, shape):
      if letter not in inner and sizes.setdefault(letter, size) != size:
        raise ValueError(f'{template}: {letter} is {sizes[letter]} and, in {path}, {size}')


@functools.cache
def families() -> tuple[Family, ...]:
  """All there are, one a model_type: every Family in a file of interop/families/, by the name of the file."""
  package = importlib.import_module('lmlib.interop.families')
  modules = [importlib.import_module(f'{package.__name__}.{info.name}')
             for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name)]
  found = [value for module in modules for value in vars(module).values() if isinstance(value, Family)]
  return tuple(dataclasses.replace(family, model_types=(model_type,), architectures=(architecture,))
               for family in found for model_type, architecture in zip(family.model_types, family.architectures))


def find(model_type: str) -> Family:
  """The family of a model_type. ValueError that says which are known, and the nearest."""
  known = {family.model_types[0]: family for family in families()}
  if model_type not in known:
    raise ValueError(f'the family {model_type!r} is not known{close(str(model_type), known)}; '
                     f'known are: {", ".join(sorted(known))}')
  return known[model_type]
