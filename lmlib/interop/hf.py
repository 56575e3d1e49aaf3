"""Models in Hugging Face's form: a folder of config.json, safetensors and a tokeniser; into lmlib and back.

One tensor is in memory at a time, whatever the model's size. All is looked through before any of it is read:
every tensor must be known, there once, and of the shape that config.json says.
"""
import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from lmlib import trees
from lmlib.interop import family as families
from lmlib.interop import safetensors
from lmlib.interop.family import Family, Said, Tensor
from lmlib.interop.folder import inside, read_json
from lmlib.interop.safetensors import Stored
from lmlib.models import protocol
from lmlib.train import checkpoint_arrays, workdir
from lmlib.train.checkpoint_arrays import copied
from lmlib.train.step import placed

CONFIG = 'config.json'
ROWS = 1 << 26  # bytes of two tensors that are compared at once
FEW = 6  # names in a message
TRAINING = {'dropout', 'balance_loss', 'balance_over', 'z_loss'}  # settings that no config.json of a model has


@dataclasses.dataclass(frozen=True)
class Published:
  """A folder whose weights are all there: what it says, our config of it, and where its tensors are."""
  folder: pathlib.Path
  family: Family
  said: dict
  overlooked: tuple[str, ...]  # keys of config.json that nobody knows
  config: protocol.Config
  tensors: dict[str, Tensor]
  stored: dict[str, Stored]
  copies: tuple[tuple[Stored, str], ...]  # each with the name of the tensor that it must equal


def read(path) -> Published:
  """Looks through a folder. ValueError that names what is missing, unknown or cannot be so; no weight is read."""
  folder = pathlib.Path(path).expanduser()
  if not folder.is_dir():
    raise ValueError(_no_folder(str(path), folder))
  if (config := inside(folder, CONFIG)) is None:
    raise ValueError(f'{folder} holds no model: there is no {CONFIG}')
  said = Said(read_json(config))
  if said.get('quantization_config'):
    raise ValueError(f'{config}: quantised weights (quantization_config) are not read; take the full ones')
  try:
    found = families.find(said.get('model_type'))
  except ValueError as error:
    raise ValueError(f'{config}: {error}') from error
  files = safetensors.in_folder(folder)
  said.tensors = frozenset(stored.name for stored in files)
  try:
    ours = found.read(said)
    tensors = families.tensors(found, ours)
  except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
    raise ValueError(f'{config}: {error}') from error
  stored, copies = _matched(folder, found, tensors, files)
  return Published(folder, found, dict(said), tuple(said.unread()), ours, tensors, stored, copies)


def load(path, dtype: str = 'float32', *, rounded: str | None = None) -> tuple:
  """(config, params) of a folder, in memory as `dtype`, where the layout in use wants them.

  rounded: the type to which every number of the folder is rounded first; None: to none.
  """
  published = path if isinstance(path, Published) else read(path)
  check_copies(published)
  shapes = placed(families.shapes(published.config))
  arrays = {name: empty(leaf.shape, np.dtype(dtype)) for name, leaf in trees.flat(shapes).items()}
  for name, tensor in published.tensors.items():
    for place, part in zip(tensor.places, tensor.split(_read(published.stored[name], rounded))):
      copied(part, arrays[place.path][(*place.index, ...)])
  put = lambda leaf, x: jax.device_put(x, leaf.sharding, may_alias=True)
  leaves = [put(leaf, arrays.pop(name)) for name, leaf in trees.flat(shapes).items()]
  return published.config, jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def to_checkpoint(published: Published, path: pathlib.Path, dtype: str | None = 'float32', progress=lambda _: None):
  """Writes the weights of a folder as a checkpoint, the folder `path`, as `dtype` (None: as each is stored).

  What is stored less 1 is float32 in either case. `progress` gets the share of the tensors that is done.
  """
  check_copies(published)
  abstract = placed(families.shapes(published.config))
  types, lead = {}, {}
  for name, tensor in published.tensors.items():
    for place in tensor.places:
      here = np.dtype('float32' if tensor.plus else dtype or _kept(published.stored[name].dtype))
      types[place.path] = here if types.get(place.path, here) == here else np.dtype('float32')
      lead[place.path] = len(place.index)
  names = checkpoint_arrays.names_of(abstract)
  lead = {where: axes - bool(axes and isinstance(names[where], tuple)) for where, axes in lead.items()}
  with checkpoint_arrays.Writer(path, abstract, types, lead, step=int(path.name)) as writer:
    for i, (name, tensor) in enumerate(published.tensors.items()):
      # What is written is rounded then, but for what is stored less 1: that is rounded as it is stored.
      _put(writer, names, tensor, _read(published.stored[name], dtype if tensor.plus else None))
      progress((i + 1) / len(published.tensors))
    writer.close()


def _put(writer, names, tensor: Tensor, theirs: np.ndarray):
  for place, part in zip(tensor.places, tensor.split(theirs)):
    for where, index, x in _on_disk(names[place.path], place.index, part):
      writer.write(where, index, x)


def from_checkpoint(reader: checkpoint_arrays.Reader, config, family: Family, folder: pathlib.Path, *,
                    dtype: str = 'float32', longest: int = 5_000_000_000, progress=lambda _: None):
  """Writes the weights of a checkpoint into `folder`, as files of `longest` bytes. ValueError if it is damaged."""
  tensors = families.tensors(family, config)
  names = checkpoint_arrays.names_of(placed(families.shapes(config)))
  _fits(reader, config, names)
  kind = np.dtype(dtype)
  with safetensors.Writer(folder, {name: (t.shape, kind) for name, t in tensors.items()}, longest=longest) as writer:
    for i, (name, tensor) in enumerate(tensors.items()):
      writer.write(name, _joined(reader, names, tensor))
      progress((i + 1) / len(tensors))
    reader.verify()
    writer.close()


def _joined(reader, names, tensor: Tensor) -> np.ndarray:
  parts = []
  for place in tensor.places:
    found = [reader.read(where, index) for where, index, _ in _on_disk(names[place.path], place.index)]
    parts.append(found[0] if len(found) == 1 else np.stack(found))
  return tensor.join(parts)


def writers(config: protocol.Config) -> list[Family]:
  """The families in whose form a model can be written, those with the first names first.

  ValueError, with the reason of each, if there is none.
  """
  able, reasons = [], []
  for family in families.families():
    try:
      back = family.read(Said(as_said(family, config)))
    except (ValueError, TypeError, AttributeError) as error:  # of the config of another architecture
      reasons.append(f'{family.model_types[0]}: {error}')
      continue
    if differ := differences(config, back):
      reasons.append(f'{family.model_types[0]} has no word for {", ".join(differ)}')
    else:
      able.append(family)
  if not able:
    raise ValueError('no family of interop/families can hold this model: ' + '; '.join(reasons))
  return able


def writer(config: protocol.Config, wanted: str | None, before: str | None) -> Family:
  """The family to write a model as: the one `wanted`, or the one that it came from, or the first that can.

  ValueError if that one cannot hold it, with the reason.
  """
  able = writers(config)
  for name in filter(None, (wanted, before)):
    found = families.find(name)
    if found in able:
      return found
    if name == wanted:
      raise ValueError(f'model_type={wanted!r} cannot hold this model; {", ".join(f.model_types[0] for f in able)} can')
  return able[0]


def rounded(family: Family, config: protocol.Config, params, dtype: str):
  """params with the numbers that a folder of this type would give back, in float32."""
  plus = {place.path: tensor.plus for tensor in families.tensors(family, config).values() for place in tensor.places}
  leaves = [(x - plus[name]).astype(dtype).astype(jnp.float32) + plus[name] if plus[name] else
            x.astype(dtype).astype(jnp.float32) for name, x in trees.flat(params).items()]
  return jax.tree.unflatten(jax.tree.structure(params), leaves)


def as_said(family: Family, config: protocol.Config) -> dict:
  """The config.json of a model in the form of a family."""
  return {'architectures': list(family.architectures), 'model_type': family.model_types[0], **family.write(config)}


def differences(config, back) -> list[str]:
  """What two configs differ in, but for how they compute."""
  one, other = workdir.flat({'model': config}), workdir.flat({'model': back})
  return [f'{name}={one.get(name)!r} (read back as {other.get(name)!r})' for name in one.keys() | other.keys()
          if one.get(name) != other.get(name) and name.split('.')[-1] not in workdir.FREE | TRAINING]


def check_copies(published: Published):
  """ValueError unless every tensor that stands for another, such as a tied lm_head.weight, equals it."""
  for copy, name in published.copies:
    original = published.stored[name]
    step = max(1, ROWS // max(1, original.nbytes // max(1, original.shape[0])))
    for first in range(0, original.shape[0], step):
      rows = min(step, original.shape[0] - first)
      if not np.array_equal(copy.read(first, rows), original.read(first, rows)):
        raise ValueError(f'{copy.path}: {copy.name} differs from {name}, which it must equal: config.json ties them '
                         '(tie_word_embeddings)')


def _matched(folder, family: Family, tensors: dict[str, Tensor], files: list[Stored]) -> tuple[dict, tuple]:
  """The file's tensors by our names for them, and the copies. ValueError that lists all that is wrong."""
  found, copies, wrong = {}, {}, {'unknown': [], 'there twice': [], 'of another shape': [], 'of another type': []}
  for stored in files:
    if (name := _name(stored.name, family, tensors)) is None:
      if not any(re.fullmatch(pattern, stored.name) for pattern in family.ignored):
        wrong['unknown'].append(stored.name)
      continue
    into = found if name in tensors else copies
    shape = tensors[name if name in tensors else family.copies[name]].shape
    if name in into:
      wrong['there twice'].append(stored.name)
    if stored.shape != shape:
      wrong['of another shape'].append(f'{stored.name} is {stored.shape} there and {shape} by {CONFIG}')
    if not jnp.issubdtype(stored.dtype, jnp.floating):
      wrong['of another type'].append(f'{stored.name} is {stored.dtype}')
    into[name] = stored
  for name, original in family.copies.items():
    if name in copies and original not in found:  # a file may keep any one of those that are tied
      found[original] = copies.pop(name)
  wrong['missing'] = [name for name in tensors if name not in found]
  if said := [f'{what}: {_few(names)}' for what, names in wrong.items() if names]:
    raise ValueError(f'{folder} does not hold the {family.model_types[0]} model that its {CONFIG} describes; '
                     f'tensors {"; tensors ".join(said)}')
  return found, tuple((stored, family.copies[name]) for name, stored in copies.items())


def _name(name: str, family: Family, tensors) -> str | None:
  """What the table calls a tensor: with or without one of the family's prefixes; None if it does not know it."""
  names = [name, *(name.removeprefix(prefix) for prefix in family.prefixes), *(p + name for p in family.prefixes)]
  return next((n for n in names if n in tensors or family.copies.get(n) in tensors), None)


def _few(names: list[str]) -> str:
  return ', '.join(names[:FEW]) + (f' and {len(names) - FEW} more' if len(names) > FEW else '')


def _read(stored: Stored, rounded: str | None) -> np.ndarray:
  x = stored.read()
  return x if rounded is None else x.astype(np.dtype(rounded), copy=False)


def _kept(dtype: np.dtype) -> str:
  return 'float32' if dtype == np.float64 else dtype.name


def empty(shape, dtype) -> np.ndarray:
  """An array that jax may take over without a copy: its CPU arrays begin at multiples of 64 bytes."""
  size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start:start + size].view(dtype).reshape(shape)


def _on_disk(names, index: tuple[int, ...], x=None):
  """(name on disk, index there, part of x) of what params[path][index] is; names: of checkpoint_arrays.names_of."""
  if isinstance(names, str):
    yield names, index, x
  elif index:
    yield names[index[0]], index[1:], x
  else:
    for i, name in enumerate(names):
      yield name, (), None if x is None else x[i]


def _fits(reader, config, names):
  """ValueError if a checkpoint is of another model."""
  wanted = {}
  for where, leaf in trees.flat(placed(families.shapes(config))).items():
    for name, *_ in _on_disk(names[where], ()):
      wanted[name] = leaf.shape[1:] if isinstance(names[where], tuple) else leaf.shape
  stored = {name: tuple(said['shape']) for name, said in reader.arrays.items() if name.startswith('params/')}
  differ = [f'{name} is {stored.get(name, "absent")} there and {wanted.get(name, "absent")} here'
            for name in sorted(wanted.keys() | stored.keys()) if stored.get(name) != wanted.get(name)]
  if differ:
    raise ValueError(f'the checkpoint does not fit the model: {_few(differ)}')


def _no_folder(said: str, folder: pathlib.Path) -> str:
  if folder.is_file():
    return f'{said!r} is a file; give the folder that it lies in'
  if re.fullmatch(r'[\w.-]+/[\w.-]+', said) and not folder.parent.is_dir():
    return (f'there is no folder {said!r}. Models are not downloaded here; '
            f'`hf download {said} --local-dir {folder.name}` does so')
  return f'there is no folder {said!r}'
