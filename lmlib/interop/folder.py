"""Folders of files that others made: nothing outside is read, and a new folder is there whole or not at all."""
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import stat

JSON_BYTES = 25_000_000  # of JSON in a file or a header, at most; parsed, it takes up to 20 times as much


def inside(folder: pathlib.Path, name: str) -> pathlib.Path | None:
  """The file `name` of a folder, None if there is none. ValueError if it lies elsewhere or is no file.

  A link that leads out is refused, but for those of a cache of Hugging Face's from snapshots/x to blobs/.
  """
  if not isinstance(name, str) or not name or name in ('.', '..') or set(name) & set('/\\\0') or len(name) > 255:
    raise ValueError(f'{folder}: the file name {name!r} leads out of the folder, or is none')
  path, home = folder / name, folder.resolve()
  try:
    real = path.resolve(strict=True)
    mode = real.stat().st_mode
  except FileNotFoundError:
    return None
  except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
    raise ValueError(f'{path}: unreadable: {getattr(error, "strerror", None) or error}') from error
  blobs = home.parent.name == 'snapshots' and real.parent == home.parent.parent / 'blobs'
  if real.parent != home and not blobs:
    raise ValueError(f'{path}: a link that leads out of the folder, to {real}: copy the file if you trust it')
  if not stat.S_ISREG(mode):
    raise ValueError(f'{path}: no file')
  return path


def read_json(path: pathlib.Path) -> dict:
  """The object in a file of JSON. ValueError, naming the file, if it holds none."""
  try:
    with open(path, 'rb') as file:
      raw = file.read(JSON_BYTES + 1)
  except OSError as error:
    raise ValueError(f'{path}: unreadable: {error.strerror}') from error
  return parsed(raw, path)


def parsed(raw: bytes, where) -> dict:
  """The object that JSON holds, of names that differ. ValueError, naming `where`, for anything else."""
  if len(raw) > JSON_BYTES:
    raise ValueError(f'{where}: more than {JSON_BYTES:,} bytes of JSON')
  try:
    found = json.loads(raw.decode(), object_pairs_hook=_distinct)
  except UnicodeDecodeError as error:
    raise ValueError(f'{where}: JSON that is not UTF-8 at byte {error.start}') from error
  except RecursionError as error:
    raise ValueError(f'{where}: JSON nested too deep') from error
  except ValueError as error:
    raise ValueError(f'{where}: not JSON: {error}') from error
  if not isinstance(found, dict):
    raise ValueError(f'{where}: a JSON {type(found).__name__}, not an object')
  return found


def _distinct(pairs):
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    again = next(name for name in found if names.count(name) > 1)
    raise ValueError(f'the name {again!r:.100} is there twice')
  return found


@contextlib.contextmanager
def new(path: pathlib.Path, need: int = 0):
  """A folder <path>.partial to write into, which becomes `path` when all went well and is removed when not.

  What a killed writer left there is removed first. ValueError if there is something at `path`, if another
  process is writing it, if it cannot be written or the disk has no room for `need` bytes.
  """
  refuse_existing(path)
  partial = path.with_name(f'{path.name}.partial')
  with _locked(path) as lock:
    try:
      shutil.rmtree(partial, ignore_errors=True)
      if need > (free := shutil.disk_usage(path.parent).free):
        raise ValueError(f'TARGET {str(path)!r} has {free / 1e6:,.1f} MB free, but {need / 1e6:,.1f} MB are needed')
      partial.mkdir()
      yield partial
      refuse_existing(path)
      os.rename(partial, path)
    except OSError as error:
      if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(error.errno, f'{error.strerror}; nothing is left of it', str(path)) from error
      raise
    finally:
      shutil.rmtree(partial, ignore_errors=True)
      pathlib.Path(lock.name).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: pathlib.Path):
  """An open file <path>.lock that no other process has. ValueError if one has it, or it cannot be written."""
  with contextlib.ExitStack() as stack:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      lock = stack.enter_context(open(path.with_name(f'{path.name}.lock'), 'a'))
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f'TARGET {str(path)!r} is being written by another process') from None
    except OSError as error:
      raise ValueError(f'TARGET {str(path)!r} cannot be written: {error.strerror}') from error
    yield lock


def refuse_existing(path: pathlib.Path):
  """ValueError if there is something at `path`, but for an empty folder, or it is a URL."""
  if ':/' in str(path):  # of gs://bucket a path makes gs:/bucket
    raise ValueError(f'TARGET {str(path)!r} is a URL; give a folder of this machine')
  if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
    raise ValueError(f'TARGET {str(path)!r} exists already; give another, or remove it')
