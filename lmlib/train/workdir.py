"""The folder of a run: whose it is, that it can be written, and that only one process does."""
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorstore', 'numpy', 'sentencepiece')

# May differ when a run goes on: how it computes, not what.
FREE = frozenset(('scan', 'remat', 'dtype'))


class Workdir:
  """Opens (and makes) the folder of a run; a context manager that holds its lock.

  Raises ValueError if another run lives there (`identity` differs), another process is using it,
  it is no folder, or the disk has not the `need` bytes; OSError if it cannot be written.
  """

  def __init__(self, path: str, *, identity: dict, config: str, manifest: dict, need: int = 0):
    """identity: what must stay the same, dataclasses and plain values by name; config: the gin text."""
    self.path = pathlib.Path(path)
    if self.path.exists() and not self.path.is_dir():
      raise ValueError(f'WORKDIR {path!r} is a file; give a folder')
    self.path.mkdir(parents=True, exist_ok=True)
    self._lock = (self.path / 'lock').open('w')
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f'WORKDIR {path!r} is in use by another process; wait for it or give another WORKDIR') from None
    self._check(flat(identity))
    free = shutil.disk_usage(self.path).free
    if need > free:
      raise ValueError(f'WORKDIR {path!r} has {free / 1e9:.2f} GB free, but the checkpoints of this run '
                       f'need {need / 1e9:.2f} GB; free some or give another WORKDIR')
    manifest = {'identity': flat(identity), **manifest, **environment()}
    _write(self.path / 'manifest.json', json.dumps(manifest, indent=2) + '\n')
    _write(self.path / 'config.gin', config)

  def _check(self, identity: dict):
    manifest = self.path / 'manifest.json'
    if not manifest.exists():
      return
    before = json.loads(manifest.read_text())['identity']
    now = json.loads(json.dumps(identity))
    changed = [name for name in sorted({*before, *now})
               if before.get(name) != now.get(name) and name.split('.')[-1] not in FREE]
    if changed:
      shown = '; '.join(f'{name}: there {before.get(name)!r}, here {now.get(name)!r}' for name in changed[:6])
      raise ValueError(f'WORKDIR {str(self.path)!r} holds another run ({shown}); give another WORKDIR')

  def __enter__(self):
    return self.path

  def __exit__(self, *_):
    self._lock.close()


def flat(value, prefix: str = '') -> dict:
  """{'model.width': 64, 'optimizer.schedule': 'Cosine', 'optimizer.schedule.peak': 1e-3, ...}."""
  if isinstance(value, dict):
    rows = [flat(v, f'{prefix}.{k}' if prefix else k) for k, v in value.items()]
  elif dataclasses.is_dataclass(value):
    rows = [{prefix: type(value).__name__}] if prefix else []
    rows += [flat(getattr(value, f.name), f'{prefix}.{f.name}' if prefix else f.name)
             for f in dataclasses.fields(value)]
  else:
    return {prefix: value}
  return {name: v for row in rows for name, v in row.items()}


def environment() -> dict:
  """Versions, git revision and command, to say later what ran."""
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  root = pathlib.Path(__file__).parents[2]
  try:
    git = subprocess.run(['git', '-C', root, 'describe', '--always', '--dirty'], capture_output=True, text=True)
    revision = git.stdout.strip() or None
  except OSError:
    revision = None
  return {'versions': versions, 'python': platform.python_version(), 'platform': platform.platform(),
          'git': revision, 'command': sys.argv}


def _write(path: pathlib.Path, text: str):
  """All of a file or none."""
  fresh = path.with_name(path.name + '.tmp')
  fresh.write_text(text)
  os.replace(fresh, path)
