"""Models in llama.cpp's form GGUF, both ways: config, weights, tokeniser and chat template in one file.

Read into memory one tensor at a time, with what is quantised made float32; written as F16 or Q8_0.
"""
import dataclasses
import pathlib

import jax
import numpy as np

from lmlib import trees
from lmlib.data.tokenizer import Tokenizer
from lmlib.interop import family as families
from lmlib.interop import gguf_file, gguf_names, gguf_tokenizer, hf
from lmlib.interop.family import Family, Tensor
from lmlib.interop.gguf_file import KINDS, Stored
from lmlib.interop.hf import Published, differences
from lmlib.models import protocol

SUFFIX = '.gguf'
WRITTEN = {'F32': 0, 'F16': 1, 'Q8_0': 7}  # kinds of matrices, and what general.file_type says then
FEW = 8


def read(path) -> Published:
  """Looks through a file; its `said` is the metadata. ValueError, naming the file, if it is damaged, or holds what
  lmlib has no words for; no weight is read."""
  path = pathlib.Path(path).expanduser()
  file = gguf_file.opened(path)
  try:
    factors = {name: file.tensors[name].read() for name in gguf_names.FACTORS if name in file.tensors}
    shapes = {name: stored.shape for name, stored in file.tensors.items()}
    config = gguf_names.config(file.metadata, shapes, factors)
    family, tensors = _tensors(config, file.metadata['general.architecture'])
    _check(shapes, tensors)
  except ValueError as error:
    raise error if str(error).startswith(str(path)) else ValueError(f'{path}: {error}') from error
  return Published(path, family, file.metadata, (), config, tensors, file.tensors, ())


def tokenizer_of(published: Published) -> Tokenizer | None:
  """The tokeniser of a file, with its chat template; None if it says that it has none. ValueError as of read()."""
  if published.said.get('tokenizer.ggml.model') in ('none', 'no_vocab'):
    return None
  try:
    return gguf_tokenizer.tokenizer(published.said, published.config.vocab)
  except ValueError as error:
    raise ValueError(f'{published.folder}: {error}') from error


def load(path) -> tuple[protocol.Config, dict, Tokenizer | None]:
  """(config, params in float32 where the layout in use wants them, tokeniser) of a file. ValueError as of read()."""
  published = read(path)
  tokenizer = tokenizer_of(published)
  return *hf.load(published), tokenizer


def rounded(config: protocol.Config, params, kind: str):
  """params with the numbers that a file with matrices of this kind would give back."""
  import gguf
  leaves = {name: np.array(x) for name, x in trees.flat(params).items()}
  for tensor in _tensors(config, _writer(config, None))[1].values():
    stored = gguf.GGMLQuantizationType[_kind(tensor, kind)]
    theirs = np.ascontiguousarray(tensor.join([leaves[place.path][place.index] for place in tensor.places]))
    for place, part in zip(tensor.places, tensor.split(gguf.dequantize(gguf.quantize(theirs, stored), stored))):
      leaves[place.path][place.index] = part
  return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def save(path, config: protocol.Config, params, tokenizer: Tokenizer | None, *, kind: str = 'F16',
         architecture: str | None = None):
  """Writes a file that llama.cpp and transformers read; matrices as `kind`, 'F32', 'F16' or 'Q8_0', the rest as F32.

  The architecture is the first of gguf_names that can hold the model, unless one is given. ValueError if none can,
  or if GGUF has no words for the tokeniser.
  """
  if kind not in WRITTEN:
    raise ValueError(f'kind={kind!r} must be one of {", ".join(WRITTEN)}')
  name = _writer(config, architecture)
  (_, tensors), factors = _tensors(config, name), gguf_names.factors(config)
  said = gguf_names.metadata(name, config) | {
      'general.file_type': WRITTEN[kind], 'general.quantization_version': 2, **(
          {'tokenizer.ggml.model': 'none'} if tokenizer is None else gguf_tokenizer.metadata(tokenizer, config.vocab))}
  stored = [Stored(path, name, 'F32', x.shape) for name, x in factors.items()]
  stored += [Stored(path, one.name, _kind(one, kind), one.shape) for one in tensors.values()]
  leaves = trees.flat(params)

  def read(name):
    if name in factors:
      return factors[name]
    one = tensors[name]
    return one.join([np.asarray(leaves[place.path][place.index], np.float32) for place in one.places])

  gguf_file.write(path, said, stored, read)


def _kind(tensor: Tensor, kind: str) -> str:
  """The type to write a tensor as: vectors stay float32, as do rows that no block divides."""
  return 'F32' if len(tensor.shape) < 2 or tensor.shape[-1] % KINDS[kind][1] else kind


def _check(shapes: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]):
  """ValueError that lists what the file has too much, too little or in another shape."""
  few = lambda names: ', '.join(names[:FEW]) + (f' and {len(names) - FEW} more' if len(names) > FEW else '')
  wrong = {'unknown': [name for name in shapes if name not in tensors and name not in gguf_names.FACTORS],
           'missing': [name for name in tensors if name not in shapes],
           'of another shape': [f'{name} is {shapes[name]} and must be {one.shape}' for name, one in tensors.items()
                                if name in shapes and shapes[name] != one.shape]}
  if said := [f'{what}: {few(names)}' for what, names in wrong.items() if names]:
    raise ValueError(f'tensors {"; tensors ".join(said)}')


@dataclasses.dataclass(frozen=True)
class Paired(Tensor):
  """Queries or keys of heads in which (2h, 2h + 1) turn together, where ours are (h, h + H/2)."""

  def split(self, theirs):
    halves = self._halves(theirs, -1, 2)
    return super().split(halves.swapaxes(1, 2).reshape(theirs.shape))

  def join(self, ours):
    joined = super().join(ours)
    return self._halves(joined, 2, -1).swapaxes(1, 2).reshape(joined.shape)

  def _halves(self, theirs, *pair: int):
    heads = theirs.shape[0] // self.places[0].size('H')
    return theirs.reshape(heads, *pair, *theirs.shape[1:]) if -1 not in pair else theirs.reshape(
        heads, *(self.places[0].size('H') // 2 if n == -1 else n for n in pair), *theirs.shape[1:])


def _tensors(config, name: str) -> tuple[Family, dict[str, Tensor]]:
  """An architecture as a family of models, and the tensors of a model in its form."""
  arch = gguf_names.ARCHITECTURES[name]
  family = Family((name,), (), read=None, write=None, tensors=lambda config: gguf_names.tensors(config, arch))
  found = families.tensors(family, config)
  paired = lambda one: Paired(*(getattr(one, field.name) for field in dataclasses.fields(one)))
  turned = lambda name: arch.paired and ('.attn_q.' in name or '.attn_k.' in name)
  return family, {name: paired(one) if turned(name) else one for name, one in found.items()}


def _writer(config, wanted: str | None) -> str:
  """The architecture to write a model as. ValueError, with the reason of each, if none can hold it."""
  if wanted is not None and wanted not in gguf_names.ARCHITECTURES:
    raise ValueError(f'architecture={wanted!r} must be one of {", ".join(gguf_names.ARCHITECTURES)}')
  plain, reasons = _plain(config), []
  for name in [wanted] if wanted else gguf_names.ARCHITECTURES:
    try:
      back = gguf_names.config(gguf_names.metadata(name, config), _names(config, name), gguf_names.factors(config))
    except (ValueError, TypeError, AttributeError) as error:  # of the config of another architecture
      reasons.append(f'{name}: {error}')
      continue
    if back == plain:
      return name
    reasons.append(f'{name} has no word for {", ".join(sorted(differences(plain, back)))}')
  raise ValueError('no architecture of GGUF can hold this model: ' + '; '.join(reasons))


def _names(config, name: str) -> dict[str, tuple[int, ...]]:
  """The names of the tensors of a model, as long as any; the embedding of its shape."""
  table = gguf_names.tensors(config, gguf_names.ARCHITECTURES[name])
  return {key.replace('{L}', str(i)): (2**62,) for key in table for i in range(config.layers)} | {
      'token_embd.weight': (config.vocab, config.width)}


def _plain(config):
  """A config without how it is run."""
  return dataclasses.replace(config, execution=type(config.execution)())
