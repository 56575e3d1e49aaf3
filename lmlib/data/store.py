"""A tokenised store: a folder with the tokens of many documents end to end, and where each begins.

  tokens/          uint16 or uint32 by the vocabulary: bos, the text's tokens, eos, document by document
  offsets/         int64, documents + 1: document i is tokens offsets[i] to offsets[i + 1]
  bytes/           int64: UTF-8 bytes of each document's text
  documents.jsonl  one {"name": ...} a line
  tokenizer.model  what made the tokens, and makes text of them again
  manifest.json    counts and fingerprints

The arrays are zarr version 3, in shards of 32k-token chunks with a checksum each: a damaged or missing
chunk raises ValueError, it is never read as zeros. A folder appears under its name only when complete.
"""
from collections.abc import Iterable, Iterator
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil

import numpy as np
import tensorstore

from lmlib.data.sources import Document
from lmlib.data.tokenizer import Tokenizer

FORMAT = 1  # of the folder: raised when what is written or what it means changes
SHARD = 1 << 22  # numbers a file
CHUNK = 1 << 15  # numbers read, and checked, at once
CACHE_BYTES = 1 << 28  # of chunks kept in memory by an open store


class Store:
  """An open store. Arrays of documents are in memory, 16 bytes a document; tokens are read when asked for."""

  def __init__(self, path: str | os.PathLike):
    """Opens the store at `path`. ValueError if there is none, or not a whole one of this format."""
    self.path = pathlib.Path(path)
    try:
      self.manifest = json.loads((self.path / 'manifest.json').read_text())
      names = self.path / 'documents.jsonl'
      names_bytes = names.stat().st_size
    except (OSError, ValueError) as error:
      raise ValueError(f'{self.path} is not a tokenised store: {error}') from error
    if self.manifest['format'] != FORMAT:
      raise ValueError(f'{self.path} has store format {self.manifest["format"]}, this lmlib reads {FORMAT}: '
                       'prepare the data again')
    self._tokens = column(self.path / 'tokens')
    self.offsets: np.ndarray = column(self.path / 'offsets').read().result()
    self.bytes: np.ndarray = column(self.path / 'bytes').read().result()
    self.tokenizer = Tokenizer.load(self.path / 'tokenizer.model')
    found = {'tokens': self._tokens.shape[0], 'documents': len(self.bytes), 'bytes': int(self.bytes.sum()),
             'names_bytes': names_bytes, 'tokenizer': self.tokenizer.fingerprint}
    for key, value in found.items():
      if value != self.manifest[key]:
        raise ValueError(f'{self.path} is damaged: its manifest says {key}={self.manifest[key]}, '
                         f'but there is {value}')

  @property
  def tokens(self) -> int:
    """How many tokens, with one bos and one eos a document."""
    return self.manifest['tokens']

  @property
  def documents(self) -> int:
    return self.manifest['documents']

  @property
  def text_bytes(self) -> int:
    """UTF-8 bytes of all texts."""
    return self.manifest['bytes']

  @property
  def fingerprint(self) -> str:
    """SHA-256 of the content: tokens, documents, names and tokeniser, wherever the folder lies."""
    return self.manifest['fingerprint']

  @functools.cached_property
  def names(self) -> tuple[str, ...]:
    with open(self.path / 'documents.jsonl', encoding='utf-8') as file:
      return tuple(json.loads(line)['name'] for line in file)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Tokens start to stop, int32. ValueError outside the store, or for a damaged chunk."""
    if not 0 <= start <= stop <= self.tokens:
      raise ValueError(f'tokens {start} to {stop} are not all among the {self.tokens} of {self.path}')
    return self._tokens[start:stop].read().result().astype(np.int32)

  def rows(self, start_B, length: int) -> np.ndarray:
    """`length` tokens from each start, BT int32; the last token is followed by the first again."""
    parts, N = [], self.tokens
    for start in np.asarray(start_B).tolist():
      assert 0 <= start < N >= length, (start, length, N)
      spans = [(start, min(start + length, N))] + [(0, start + length - N)] * (start + length > N)
      parts.append([self._tokens[a:b].read() for a, b in spans])  # all are asked for before one is awaited
    return np.stack([np.concatenate([part.result() for part in row]) for row in parts]).astype(np.int32)

  def text(self, document: int) -> str:
    """The text of a document, exactly as its source gave it."""
    start, stop = self.offsets[document:document + 2].tolist()
    return self.tokenizer.decode(self.read(start + 1, stop - 1))

  def scored(self):
    """Pairs (tokens with bos and eos, bytes of the text), one a document, in order."""
    for start, stop, size in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), self.bytes.tolist()):
      yield self.read(start, stop), size

  def check(self):
    """Looks into every file of the store. ValueError if one is missing or damaged where it is touched."""
    for start in range(0, self.tokens, SHARD):
      self.read(start, start + 1)
    if len(self.names) != self.documents or self.offsets[-1] != self.tokens:
      raise ValueError(f'{self.path} is damaged: {len(self.names)} names for {self.documents} documents, '
                       f'{self.tokens} tokens where documents end at {self.offsets[-1]}')


def write(path: str | os.PathLike, documents: Iterable[Document], tokenizer: Tokenizer) -> Store:
  """Tokenises documents into a new store at `path`.

  ValueError if there are none, or if one does not come back from its tokens exactly; OSError, naming
  the path, if it exists already or cannot be written. Nothing is left at `path` then.
  """
  dtype = 'uint16' if tokenizer.vocab <= 1 << 16 else 'uint32'
  with complete_folder(path) as folder, open(folder / 'documents.jsonl', 'wb') as names:
    tokens, offsets, sizes = (Writer(folder / 'tokens', dtype), Writer(folder / 'offsets', 'int64'),
                              Writer(folder / 'bytes', 'int64'))
    hashed = hashlib.sha256()
    offsets.append([0])
    for document in documents:
      ids = tokenizer.encode(document.text)
      if tokenizer.decode(ids) != document.text:
        raise ValueError(f'{document.name}: the tokenizer does not give its text back exactly')
      tokens.append([tokenizer.bos, *ids, tokenizer.eos])
      offsets.append([tokens.count])
      sizes.append([len(document.text.encode())])
      line = json.dumps({'name': document.name}).encode() + b'\n'
      names.write(line)
      hashed.update(line)
    if not sizes.count:
      raise ValueError(f'{path}: no document to store')
    tokenizer.save(folder / 'tokenizer.model')
    content = [FORMAT, dtype, tokens.close(), offsets.close(), sizes.close(), hashed.hexdigest(),
               tokenizer.fingerprint]
    manifest = {'format': FORMAT, 'fingerprint': digest(content), 'tokenizer': tokenizer.fingerprint,
                'vocab': tokenizer.vocab, 'documents': sizes.count, 'names_bytes': names.tell(),
                'bytes': sizes.total, 'tokens': tokens.count}
    (folder / 'manifest.json').write_text(json.dumps(manifest, indent=2) + '\n')
  return Store(path)


class Writer:
  """Appends to one array of a store, a shard at a time."""

  def __init__(self, path: pathlib.Path, dtype: str):
    self.count = self.total = self._written = 0
    self._parts, self._hash = [], hashlib.sha256()
    self._path, self._dtype = path, np.dtype(dtype).newbyteorder('<')
    self._array = column(path, dtype)

  def append(self, numbers):
    part = np.asarray(numbers, self._dtype)
    self._hash.update(part.tobytes())
    self._parts.append(part)
    self.count += len(part)
    self.total += int(part.sum(dtype=np.int64))
    if self.count - self._written >= SHARD:
      self._write((self.count - self._written) // SHARD * SHARD)

  def close(self) -> str:
    """Writes what is left; returns the SHA-256 of all numbers."""
    self._write(self.count - self._written)
    return self._hash.hexdigest()

  def _write(self, size: int):
    waiting, start = np.concatenate(self._parts), self._written
    with tensorstore_errors_as_os_errors(self._path):
      self._array = self._array.resize(exclusive_max=[start + size]).result()
      self._array[start:start + size].write(waiting[:size]).result()
    self._parts, self._written = [waiting[size:]], start + size


def column(path: pathlib.Path, dtype: str | None = None):
  """An array of a store: a new one of `dtype`, or the existing one to read. ValueError if damaged."""
  spec = {'driver': 'zarr3', 'kvstore': {'driver': 'file', 'path': str(path)}}
  if dtype is None:
    context = tensorstore.Context({'cache_pool': {'total_bytes_limit': CACHE_BYTES}})
    return tensorstore.open({**spec, 'fill_missing_data_reads': False}, open=True, read=True, context=context,
                            recheck_cached_data=False).result()
  checked = [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}]
  sharding = {'chunk_shape': [CHUNK], 'codecs': checked, 'index_codecs': checked}
  metadata = {'shape': [0], 'data_type': dtype,
              'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
              'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [SHARD]}}}
  with tensorstore_errors_as_os_errors(path):
    return tensorstore.open({**spec, 'metadata': metadata, 'store_data_equal_to_fill_value': True},
                            create=True).result()


@contextlib.contextmanager
def tensorstore_errors_as_os_errors(path: pathlib.Path):
  """Writing fails with ValueError in tensorstore, whatever the reason: a full disk is not a wrong value."""
  try:
    yield
  except ValueError as error:
    code = re.search(r"os_error_code='(\d+)'", str(error))
    raise OSError(f'cannot write {path}: {os.strerror(int(code[1])) if code else error}') from error


@contextlib.contextmanager
def complete_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A folder to fill, that takes the name `path` when the block ends well and is removed otherwise.

  OSError naming `path` if it cannot be written, FileExistsError if another has taken the name.
  """
  path = pathlib.Path(path)
  partial = path.parent / f'.{path.name}.{secrets.token_hex(4)}.partial'
  try:
    if path.exists():
      raise FileExistsError(f'{path} exists already')
    partial.mkdir(parents=True)
    yield partial
    try:
      os.rename(partial, path)
    except OSError as error:
      if path.exists():
        raise FileExistsError(f'{path} exists already') from error
      raise
  except FileExistsError:
    raise
  except OSError as error:
    reason = error.strerror or str(error).rpartition(': ')[2]  # of one inside, without the paths on the way
    raise OSError(f'cannot write {path}: {reason}') from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def digest(value) -> str:
  """SHA-256, in hexadecimal, of a value that JSON can hold."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
