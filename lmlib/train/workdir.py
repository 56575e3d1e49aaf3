"""The folder of a run: whose it is, that it can be written, and that only one process does."""
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import secrets
import shutil
import subprocess
import sys
import time

from lmlib import processes
from lmlib.train.goodput import Ledger

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorstore', 'numpy', 'sentencepiece')

SEEN = 100  # tenths of a second until all processes must see what one has written

# May differ when a run goes on: how it computes, not what.
FREE = frozenset(('scan', 'remat', 'dtype'))


class Workdir:
  """Takes the folder of a run, made if need be; a context manager that gives it back.

  Before any work: take it and check() what is known; begin() writes. A folder in which nothing has
  begun is removed again. Raises ValueError if the folder cannot be used or another run has it.
  Of several processes the first takes, checks and writes; the others see that it is the same folder.
  """

  def __init__(self, path: str):
    self.path = pathlib.Path(path).expanduser()
    self._identity, self._began, self._lock = {}, time.time(), None
    if not processes.first():
      self._same()
      return
    if '://' in str(path):
      raise ValueError(f'WORKDIR {path!r} is a URL; give a folder of this machine')
    if self.path.exists() and not self.path.is_dir():
      raise ValueError(f'WORKDIR {path!r} is a file; give a folder')
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = _locked(self.path / 'lock')
    except BlockingIOError:
      raise ValueError(f'WORKDIR {path!r} is in use by another process; wait for it or give another '
                       'WORKDIR') from None
    except OSError as error:
      raise ValueError(f'WORKDIR {path!r} cannot be written: {error.strerror}') from None
    self._same()

  def _same(self):
    """ValueError unless this process sees the folder of process 0."""
    if processes.count() == 1:
      return
    token = processes.told('WORKDIR', lambda: self._token(secrets.token_hex(8)))
    for _ in range(SEEN):
      if (self.path / 'lock').is_file() and (self.path / 'lock').read_text() == token:
        return
      time.sleep(0.1)
    raise ValueError(f'WORKDIR {str(self.path)!r} is another folder here than for process 0: it must lie on storage '
                     'that all processes share')

  def _token(self, token: str) -> str:
    self._lock.truncate(0)
    self._lock.write(token)
    self._lock.flush()
    return token

  def check(self, identity: dict):
    """Raises ValueError if a run with other settings lives here.

    identity: settings that must stay the same, dataclasses and plain values by name. What it does not
    name is not compared yet.
    """
    self._identity |= (now := json.loads(json.dumps(flat(identity))))
    for name, value in now.items():
      processes.same(name, value)
    if not processes.first():
      return
    manifest = self.path / 'manifest.json'
    if not manifest.exists():
      return
    try:
      known = json.loads(manifest.read_text())['identity']
    except (ValueError, KeyError, TypeError):
      raise ValueError(f'{manifest} is damaged, and nothing else says which run it is; give another '
                       'WORKDIR') from None
    before = {name: value for name, value in known.items() if name.split('.')[0] in identity}
    changed = [name for name in {**now, **before} if before.get(name) != now.get(name)
               and not (name.split('.')[-1] in FREE and name in before and name in now)]
    if changed:
      shown = '; '.join(f'{name}: there {before.get(name)!r}, here {now.get(name)!r}' for name in changed[:6])
      more = f'; and {len(changed) - 6} more' if len(changed) > 6 else ''
      raise ValueError(f'WORKDIR {str(self.path)!r} holds another run ({shown}{more}); give another WORKDIR')

  def begin(self, *, manifest: dict, files: dict[str, bytes], need: int = 0):
    """Writes manifest.json, with what check() was given, and `files`; each whole or not at all.

    need: bytes that all checkpoints will take. Raises ValueError if the disk has not that much beside
    those that are there, OSError if it cannot be written.
    """
    if processes.first():
      self._begin(manifest, files, need)

  def _begin(self, manifest: dict, files: dict[str, bytes], need: int):
    whole = [path for path in (self.path / 'checkpoints').glob('*') if path.name.isdecimal()]
    need -= sum(file.stat().st_size for path in whole for file in path.rglob('*'))
    free = shutil.disk_usage(self.path).free
    if need > free:
      raise ValueError(f'WORKDIR {str(self.path)!r} has {free / 1e6:,.1f} MB free, but the checkpoints of '
                       f'this run need {need / 1e6:,.1f} MB; free some, lower keep or give another WORKDIR')
    for name, content in files.items():
      _write(self.path / name, content)
    text = json.dumps({'identity': self._identity, **manifest, **environment()}, indent=2) + '\n'
    _write(self.path / 'manifest.json', text.encode())
    Ledger(self.path).begin(self._began)

  def __enter__(self) -> 'Workdir':
    return self

  def __exit__(self, *_):
    if self._lock is None:
      return
    if not (self.path / 'manifest.json').exists():
      try:
        (self.path / 'lock').unlink()
        self.path.rmdir()
      except OSError:
        pass  # it holds something else
    self._lock.close()


def _locked(path: pathlib.Path):
  """An open file that no other process has locked. Raises BlockingIOError if one has."""
  while True:
    file = path.open('a')
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return file
    except FileNotFoundError:
      pass
    except OSError:
      file.close()
      raise
    file.close()  # the one who had it removed it: another file has the name now, or none


def flat(value, prefix: str = '') -> dict:
  """{'model': 'dense.Config', 'model.width': 64, 'optimizer.schedule': 'schedules.Cosine', ...}."""
  if isinstance(value, dict):
    rows = [flat(v, f'{prefix}.{k}' if prefix else k) for k, v in value.items()]
  elif dataclasses.is_dataclass(value):
    kind = f'{type(value).__module__.rpartition(".")[2]}.{type(value).__qualname__}'
    rows = [{prefix: kind}] if prefix else []
    rows += [flat(getattr(value, f.name), f'{prefix}.{f.name}' if prefix else f.name)
             for f in dataclasses.fields(value)]
  elif isinstance(value, (tuple, list)) and any(map(dataclasses.is_dataclass, value)):
    rows = [{prefix: len(value)}, *(flat(v, f'{prefix}.{i}') for i, v in enumerate(value))]
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
    git = subprocess.run(['git', '-C', root, 'describe', '--always', '--dirty'], capture_output=True,
                         text=True)
    revision = git.stdout.strip() or None
  except OSError:
    revision = None
  return {'versions': versions, 'python': platform.python_version(), 'platform': platform.platform(),
          'git': revision, 'command': sys.argv}


def _write(path: pathlib.Path, content: bytes):
  """All of a file or none, and the old one stays until then."""
  fresh = path.with_name(path.name + '.tmp')
  try:
    with fresh.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(fresh, path)
  except OSError as error:
    fresh.unlink(missing_ok=True)
    raise OSError(error.errno, error.strerror, str(path)) from None
