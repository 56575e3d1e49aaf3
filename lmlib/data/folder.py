"""A folder of values by key: on this machine's disk, or wherever tensorstore can write (gs://, s3://, memory://).

A value is written as a whole or not at all, and read as a whole or in a range of its bytes.
"""
from collections.abc import Iterable, Iterator
import concurrent.futures
import contextlib
import fcntl
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import time
import urllib.parse

import tensorstore

CACHE_BYTES = 1 << 27  # of chunks and indices kept in memory by this process, for all open arrays together
# One for all: the cache is shared, and what is written under memory:// is found again.
CONTEXT = tensorstore.Context({'cache_pool': {'total_bytes_limit': CACHE_BYTES}})
AT_ONCE = 64  # reads that are asked for before the first is awaited
WAIT = 0.2  # seconds between two looks at a lock


class Folder:
  """A place for values. `local` is its path on this machine's disk, or None if it lies elsewhere."""

  def __init__(self, path: str | os.PathLike):
    """path: of a folder, or a URL that tensorstore knows. ValueError for any other URL."""
    text = os.fspath(path)
    if text.startswith('file://'):
      text = urllib.parse.unquote(text.removeprefix('file://'))
    self.local = None if '://' in text else pathlib.Path(text).expanduser()
    if self.local is not None:
      self._text = str(self.local)
      self.spec = {'driver': 'file', 'path': f'{os.path.abspath(self.local)}/', 'file_io_sync': False}  # see settle()
    else:
      self._text = text.rstrip('/')
      try:
        self.spec = tensorstore.KvStore.Spec(f'{self._text}/').to_json()
      except ValueError as error:
        raise ValueError(f'{text!r} is neither a path nor a URL that tensorstore knows: {error}') from error
    self._open = None

  def __str__(self) -> str:
    return self._text

  __fspath__ = __str__

  def __truediv__(self, name: str) -> 'Folder':
    return Folder(f'{self._text}/{name}')

  def beside(self, suffix: str) -> 'Folder':
    """The folder whose name has `suffix` at its end."""
    return Folder(self._text + suffix)

  @property
  def store(self) -> tensorstore.KvStore:
    if self._open is None:
      self._open = tensorstore.KvStore.open(self.spec, context=CONTEXT).result()
    return self._open

  def get(self, key: str) -> bytes | None:
    """The value of a key, None if there is none. OSError if it cannot be read."""
    return next(self.get_all([key]))

  def get_all(self, keys: Iterable[str]) -> Iterator[bytes | None]:
    """The values of keys, in order, some of them asked for ahead."""
    with as_os_error('read', self):
      keys, waiting = iter(keys), []
      for key in keys:
        waiting.append(self.store.read(key))
        if len(waiting) == AT_ONCE:
          yield _value(waiting.pop(0))
      for found in waiting:
        yield _value(found)

  def put(self, key: str, value: bytes):
    """OSError, naming the folder, if it cannot be written."""
    with as_os_error('write', self):
      self.store.write(key, value).result()

  def delete(self, key: str):
    with as_os_error('write', self):
      self.store.write(key, None).result()

  def keys(self) -> list[str]:
    """All keys, sorted."""
    with as_os_error('read', self):
      return sorted(key.decode() for key in self.store.list().result())

  def settle(self):
    """Waits until what has been written to a disk would survive a loss of power."""
    if self.local is not None:
      with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:  # at once: a disk settles many in one go
        list(pool.map(_fsync, [self.local, *self.local.rglob('*')]))

  def remove(self):
    """Removes the folder and all in it, if it is there."""
    if self.local is not None:
      shutil.rmtree(self.local, ignore_errors=True)
    else:
      with as_os_error('write', self):
        self.store.delete_range(tensorstore.KvStore.KeyRange()).result()

  @contextlib.contextmanager
  def locked(self, wait=None):
    """Inside, no other process has the lock of this folder, which it makes if need be.

    wait: called with a line once if another has it, and then waits for it; None: ValueError instead. A lock
    on this machine's disk ends with its process. Elsewhere it is a value that a killed process leaves behind:
    it is taken over if that process was of this machine and is gone.
    """
    take = self._flock if self.local is not None else self._mark
    me = {'pid': os.getpid(), 'host': socket.gethostname(), 'lock': secrets.token_hex(8)}
    while (release := take(me)) is None:
      line = f'{self} is being written by another process ({self._owner()})'
      if wait is None:
        advice = '' if self.local is not None else f'; if it is gone, remove {self}/lock'
        raise ValueError(f'{line}: wait for it, or give another path{advice}')
      if wait:
        wait(f'{line}: waiting for it')
        wait = False
      time.sleep(WAIT)
    try:
      yield
    finally:
      release()

  def _flock(self, me: dict):
    path = self.local / 'lock'
    while True:
      try:
        self.local.mkdir(parents=True, exist_ok=True)
      except OSError as error:
        raise OSError(f'cannot write {self}: {error.strerror}') from error
      with contextlib.suppress(FileNotFoundError):  # the one who had it removed it: look again
        file = path.open('a+')
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
          if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(json.dumps(me))
            file.flush()
            return file.close
        except BlockingIOError:
          file.close()
          return None
        except FileNotFoundError:
          pass
        file.close()

  def _mark(self, me: dict):
    value, take = json.dumps(me).encode(), lambda stamp: self.store.write('lock', value, if_equal=stamp).result()
    with as_os_error('write', self):
      found = self.store.read('lock').result()
      owner = self._read_owner()
      if found.state == 'missing' or (owner and owner['host'] == me['host'] and not _alive(owner['pid'])):
        take(found.stamp.generation)  # unless another was quicker
      return (lambda: self.store.write('lock', None).result()) if self._read_owner() == me else None

  def _read_owner(self) -> dict | None:
    try:
      value = (self.local / 'lock').read_text() if self.local is not None else self.get('lock')
      return json.loads(value)
    except (OSError, TypeError, ValueError):
      return None

  def _owner(self) -> str:
    owner = self._read_owner() or {'pid': 'unknown', 'host': 'unknown host'}
    return f'process {owner["pid"]} on {owner["host"]}'


def _fsync(path: pathlib.Path):
  try:
    file = os.open(path, os.O_RDONLY)
    try:
      os.fsync(file)
    finally:
      os.close(file)
  except OSError as error:
    raise OSError(f'cannot write {path}: {error.strerror}') from error


def _alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


def _value(found) -> bytes | None:
  found = found.result()
  return found.value if found.state == 'value' else None


@contextlib.contextmanager
def as_os_error(what: str, place):
  """tensorstore fails with ValueError, whatever the reason: a full disk is not a wrong value."""
  try:
    yield
  except ValueError as error:
    code = re.search(r"os_error_code='(\d+)'", str(error))
    raise OSError(f'cannot {what} {place}: {os.strerror(int(code[1])) if code else error}') from error
