"""Two runs side by side: which settings and versions differ, and where their numbers part for the first time."""
from collections.abc import Iterator
import dataclasses
import json
import pathlib

import numpy as np
import tensorstore as ts

from lmlib.train import checkpoint, metrics
from lmlib.train.spikes import Events
from lmlib.train.workdir import FREE

NUMBERS = 'data', 'loss', 'grad_norm', 'param_norm'  # of a line of metrics.jsonl; data is a checksum of the batch
BESIDE = 'mesh', 'python', 'platform', 'git', 'peak_source'  # of a manifest: where and by what it ran
NAMES = frozenset(('workdir',))  # settings that say where, and not what


@dataclasses.dataclass(frozen=True)
class Row:
  """Something that differs. `matters`: it changes what is computed, or it is a number that differs."""
  kind: str  # setting, version, batches, step, checkpoint
  text: str
  matters: bool

  def __str__(self):
    return f'{self.kind:<12}{self.text}'


def compare(one: pathlib.Path, other: pathlib.Path) -> list[Row]:
  """What differs between the runs in two WORKDIRs. ValueError if one holds no run.

  Settings of manifest.json matter, but for FREE ones; those of config.gin alone, versions and the mesh do not. Steps
  are compared as far as both have them, and checkpoints of the same step tensor by tensor: the first that differs.
  """
  manifests = [_manifest(folder) for folder in (one, other)]
  rows = [*_settings(*manifests, *(_config(folder) for folder in (one, other))), *_versions(*manifests)]
  left = [Events(folder).order().left_out for folder in (one, other)]
  if left[0] != left[1]:
    rows.append(Row('batches', f'left out are {_listed(left[0])} and {_listed(left[1])}', True))
  return [*rows, *_steps(one, other), *_tensors(one, other)]


def common(one: pathlib.Path, other: pathlib.Path) -> tuple[int, list[int]]:
  """(how many steps both have in metrics.jsonl, the steps of which both have a checkpoint)."""
  lines = [{line['step'] for line in metrics.read(folder / 'metrics.jsonl')} for folder in (one, other)]
  return len(lines[0] & lines[1]), _shared(one, other)


def _settings(manifest, other_manifest, config, other_config) -> Iterator[Row]:
  identity, other_identity, told = manifest['identity'], other_manifest['identity'], set()
  last = lambda name: name.rpartition('.')[2]
  for name in sorted({*identity, *other_identity}):
    here, there = repr(identity.get(name)), repr(other_identity.get(name))
    if here != there:
      told.add((last(name), here, there))
      yield Row('setting', f'{name}: {here} and {there}', last(name) not in FREE)
  for name in sorted({*config, *other_config}):
    here, there = config.get(name), other_config.get(name)
    if here != there and last(name) not in NAMES and (last(name), here, there) not in told:
      yield Row('setting', f'{name}: {here} and {there}', False)


def _versions(manifest, other) -> Iterator[Row]:
  flat = lambda found: {name: found.get(name) for name in BESIDE} | found.get('versions', {})
  one, two = flat(manifest), flat(other)
  for name in sorted({*one, *two}):
    if one.get(name) != two.get(name):
      yield Row('version', f'{name}: {one.get(name)} and {two.get(name)}', False)


def _steps(one, other) -> Iterator[Row]:
  """The first step where each number differs, and by how much."""
  lines = [{line['step']: line for line in metrics.read(folder / 'metrics.jsonl')} for folder in (one, other)]
  both = sorted(lines[0].keys() & lines[1].keys())
  for name in NUMBERS:
    pairs = [(step, lines[0][step].get(name), lines[1][step].get(name)) for step in both]
    differ = [(step, a, b) for step, a, b in pairs if a != b]
    if differ:
      step, a, b = differ[0]
      much = '' if name == 'data' or None in (a, b) else f', {_relative(a, b):.2g} of it'
      rest = [(_relative(a, b), step) for step, a, b in differ if name != 'data' and None not in (a, b)]
      most = f'; most at step {max(rest)[1]}, {max(rest)[0]:.2g}' if len(rest) > 1 else ''
      yield Row('step', f'{name} differs first at step {step}: {a} and {b}{much}; at {len(differ)} of {len(both)} '
                        f'steps{most}', True)


def _tensors(one, other) -> Iterator[Row]:
  """The first tensor that differs in the first checkpoint of both where any does."""
  for step in _shared(one, other):
    paths = [checkpoint.epath.Path(folder.resolve()) / 'checkpoints' / str(step) for folder in (one, other)]
    try:
      records = [checkpoint.record_of(path)['arrays'] for path in paths]
    except checkpoint.Damaged as error:
      yield Row('checkpoint', f'of step {step}: {error}', True)
      continue
    here = lambda name: [records[0].get(name), records[1].get(name)]  # noqa: B023, called here
    names = sorted({*records[0], *records[1]}, key=lambda name: (not name.startswith('params/'), name))
    differ = [name for name in names if here(name)[0] != here(name)[1]]
    if differ:
      yield Row('checkpoint', f'of step {step}: {len(differ)} of {len(names)} tensors differ, first '
                              f'{_apart(paths, differ[0], *here(differ[0]))}', True)
      return


def _apart(paths, name: str, one, other) -> str:
  """A tensor of two checkpoints, and how far apart its entries are."""
  if one is None or other is None:
    return f'{name}, which is only in {paths[0 if other is None else 1]}'
  if one['shape'] != other['shape']:
    return f'{name}: {tuple(one["shape"])} and {tuple(other["shape"])}'
  a, b = (np.asarray(ts.open(checkpoint.spec(path, name), read=True).result().read().result(), np.float64)
          for path in paths)
  return f'{name}: by {np.abs(a - b).max():.3g} at most, of entries up to {np.abs(a).max():.3g}'


def _shared(one, other) -> list[int]:
  return sorted(set(checkpoint.steps_in(one / 'checkpoints')) & set(checkpoint.steps_in(other / 'checkpoints')))


def _manifest(folder: pathlib.Path) -> dict:
  try:
    found = json.loads((folder / 'manifest.json').read_text())
    return found | {'identity': found['identity']}
  except FileNotFoundError:
    raise ValueError(f'WORKDIR {str(folder)!r} holds no run: there is no {folder / "manifest.json"}') from None
  except (ValueError, KeyError, TypeError):
    raise ValueError(f'{folder / "manifest.json"} is damaged') from None


def _config(folder: pathlib.Path) -> dict[str, str]:
  """{'pretrain.main.steps': '60'} of a config.gin as lmlib writes it; imports are left out."""
  found, block = {}, ''
  for line in (folder / 'config.gin').read_text().splitlines() if (folder / 'config.gin').exists() else []:
    name, equals, value = line.partition(' = ')
    if not line.startswith(' '):
      block = line.strip().removesuffix(':') if line.rstrip().endswith(':') else ''
    if equals:
      found[f'{block}.{name.strip()}'.lstrip('.')] = value.strip()
  return found


def _relative(a: float, b: float) -> float:
  return abs(a - b) / max(abs(a), abs(b), 1e-30)


def _listed(indices) -> str:
  return ', '.join(map(str, indices)) or 'none'
