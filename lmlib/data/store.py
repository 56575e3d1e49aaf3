"""A tokenised store: a folder with the tokens of many documents end to end, and where each begins.

  tokens/          uint8, uint16 or uint32 by the vocabulary: bos, the text's tokens, eos, document by document
  offsets/         int64, documents + 1: document i is tokens offsets[i] to offsets[i + 1]
  bytes/           int64: UTF-8 bytes of each document's text
  sources/         uint16: which of the manifest's sources each document is of
  names/           uint8: the documents' names in UTF-8, end to end
  name_offsets/    int64, documents + 1: name i is bytes name_offsets[i] to name_offsets[i + 1]
  tokenizer.model  what made the tokens, and makes text of them again
  manifest.json    counts and fingerprints; written last, so that without it there is no store

The arrays are zarr version 3, in shards of 4k-number chunks with a checksum each: a damaged or missing
chunk raises ValueError, it is never read as zeros. The folder lies wherever tensorstore can read; on a disk
it appears under its name only when complete. What an open store keeps in memory does not grow with it.
"""
from collections.abc import Iterable, Iterator, Sequence
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil

import numpy as np
import tensorstore

from lmlib.data import folder as folders
from lmlib.data.folder import Folder
from lmlib.data.sources import Document
from lmlib.data.tokenizer import Tokenizer

FORMAT = 2  # of the folder: raised when what is written or what it means changes
SHARD = 1 << 22  # numbers a file
# Numbers read, and checked, at once: a row at random costs the reading of 8 kB, and of 16 kB of a file's index.
CHUNK = 1 << 12
KEPT = 64  # chunks of a column that are kept decoded
COLUMNS = {'offsets': 'int64', 'bytes': 'int64', 'sources': 'uint16', 'names': 'uint8', 'name_offsets': 'int64'}


class Store:
  """An open store. Everything is read when asked for, in chunks of which the last used stay in memory."""

  def __init__(self, path: str | os.PathLike, *, holes: bool = False):
    """Opens the store at `path`. ValueError if there is none, or not a whole one of this format.

    holes: missing chunks are zeros. For tests of size alone: with it, damage is not noticed.
    """
    self.folder = Folder(path)
    self.path = self.folder.local or str(self.folder)
    try:
      self.manifest = json.loads(self.folder.get('manifest.json') or b'')
      found = self.manifest['format']
    except (OSError, ValueError, KeyError, TypeError) as error:
      why = 'it has no manifest.json' if isinstance(error, json.JSONDecodeError) and not error.doc else error
      raise ValueError(f'{self.path} is not a tokenised store: {why}') from error
    if found != FORMAT:
      raise ValueError(f'{self.path} has store format {found}, this lmlib reads {FORMAT}: prepare the data again')
    self._tokens = column(self.folder / 'tokens', holes=holes)
    columns = {name: Column(column(self.folder / name, holes=holes)) for name in COLUMNS}
    self.offsets, self.bytes, self._sources = columns['offsets'], columns['bytes'], columns['sources']
    self.names = Names(columns['names'], columns['name_offsets'])
    try:
      self.tokenizer = Tokenizer(self.folder.get('tokenizer.model') or b'')
    except ValueError as error:
      raise ValueError(f'{self.path}/tokenizer.model: {error}') from error
    facts = {'tokens': self._tokens.shape[0], 'documents': len(self.offsets) - 1,
             'names_bytes': len(columns['names']), 'tokenizer': self.tokenizer.fingerprint}
    facts |= {} if len(self.bytes) == len(self._sources) == len(self.names) == facts['documents'] else {
        'documents': [len(self.offsets) - 1, len(self.bytes), len(self._sources), len(self.names)]}
    for key, value in facts.items():
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

  @property
  def sources(self) -> tuple[str, ...]:
    """What the documents were read from; source_of() counts in it."""
    return tuple(self.manifest['sources'])

  def document_at(self, position) -> np.ndarray:
    """The document that each token lies in, by its place in the store; int64, shape of `position`."""
    return self.offsets.searchsorted(position, side='right') - 1

  def bounds(self, document) -> tuple[np.ndarray, np.ndarray]:
    """The first token of each document and the one after its last; int64, shape of `document`."""
    document = np.asarray(document)
    both = self.offsets[np.stack([document, document + 1])]
    return both[0], both[1]

  def source_of(self, document) -> np.ndarray:
    """The number, in `sources`, of what each document was read from; shape of `document`."""
    return self._sources[np.asarray(document)]

  def read(self, start: int, stop: int) -> np.ndarray:
    """Tokens start to stop, int32. ValueError outside the store, or for a damaged chunk."""
    if not 0 <= start <= stop <= self.tokens:
      raise ValueError(f'tokens {start} to {stop} are not all among the {self.tokens} of {self.path}')
    return self._tokens[start:stop].read().result().astype(np.int32)

  def rows(self, start_B, length: int) -> np.ndarray:
    """`length` tokens from each start, BT int32; the last token is followed by the first again."""
    start_B, N = np.asarray(start_B), self.tokens
    assert length <= N, (length, N)
    assert ((start_B >= 0) & (start_B < N)).all(), (start_B, N)
    parts, row_BT = [], np.empty((len(start_B), length), np.int32)
    for start in start_B.tolist():  # all are asked for before one is awaited
      stop = min(start + length, N)
      rest = self._tokens[:start + length - N].read() if stop - start < length else None
      parts.append((self._tokens[start:stop].read(), stop - start, rest))
    for row_T, (part, size, rest) in zip(row_BT, parts):
      row_T[:size] = part.result()
      if rest is not None:
        row_T[size:] = rest.result()
    return row_BT

  def text(self, document: int) -> str:
    """The text of a document, exactly as it was stored."""
    start, stop = self.offsets[document:document + 2].tolist()
    return self.tokenizer.decode(self.read(start + 1, stop - 1))

  def scored(self) -> Iterator[tuple[np.ndarray, int]]:
    """Pairs (tokens with bos and eos, bytes of the text), one a document, in order."""
    for (start, stop), size in zip(itertools.pairwise(self.offsets), self.bytes):
      yield self.read(start, stop), size

  def check(self):
    """Looks into every file of the store. ValueError if one is missing or damaged where it is touched."""
    for start in range(0, self.tokens, SHARD):
      self.read(start, start + 1)
    found = {'tokens': self.offsets[len(self.offsets) - 1], 'bytes': sum(self.bytes),
             'names_bytes': sum(len(name.encode()) for name in self.names)}
    sum(self._sources)
    for key, value in found.items():
      if value != self.manifest[key]:
        raise ValueError(f'{self.path} is damaged: its manifest says {key}={self.manifest[key]}, but documents '
                         f'have {value}')


class Column:
  """An array with a number a document, read by the chunk; the chunks used last stay in memory."""

  def __init__(self, array: tensorstore.TensorStore):
    self._array, self._size, self._width = array, array.shape[0], array.chunk_layout.read_chunk.shape[0]
    self._chunks: dict[int, np.ndarray] = {}
    self._known = None

  def __len__(self) -> int:
    return self._size

  def __iter__(self) -> Iterator[int]:
    for number in range(-(-self._size // self._width)):
      yield from self._chunk(number).tolist()

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.array(self._array.read().result(), dtype)

  def __getitem__(self, index):
    """An int for an int; an array for a slice of step 1, or for an array of indices from 0."""
    if isinstance(index, slice):
      start, stop, step = index.indices(self._size)
      assert step == 1, index
      return self._array[start:max(start, stop)].read().result()
    index = np.asarray(index)
    if index.size and not (index.min() >= 0 and index.max() < self._size):
      raise IndexError(f'documents {index.min()} to {index.max()} are not all among {self._size}')
    flat = index.reshape(-1)
    found, chunk = np.empty(flat.shape, self._array.dtype.numpy_dtype), flat // self._width
    for number in np.unique(chunk).tolist():
      here = chunk == number
      found[here] = self._chunk(number)[flat[here] % self._width]
    return found.reshape(index.shape) if index.ndim else int(found[0])

  def searchsorted(self, values, side: str = 'left', sorter=None) -> np.ndarray:
    """As np.searchsorted, of a column that grows; reads the chunks on the way of a binary search."""
    values, chunks = np.asarray(values), -(-self._size // self._width)
    if self._known is None:  # the chunks whose first number is known, and that number
      self._known = np.array([0, chunks]), np.array([self._chunk(0)[0], np.iinfo(np.int64).max])
    flat = values.reshape(-1)
    while True:
      number, first = self._known
      at = np.clip(np.searchsorted(first, flat, side) - 1, 0, len(number) - 2)
      unknown = np.unique(at[number[at + 1] - number[at] > 1])
      if not unknown.size:
        break
      middle = (number[unknown] + number[unknown + 1]) // 2
      learned = [self._chunk(i)[0] for i in middle.tolist()]
      self._known = np.insert(number, unknown + 1, middle), np.insert(first, unknown + 1, learned)
    found, chunk = np.empty(flat.shape, np.int64), number[at]
    for i in np.unique(chunk).tolist():
      here = chunk == i
      found[here] = i * self._width + np.searchsorted(self._chunk(i), flat[here], side)
    return found.reshape(values.shape)

  def _chunk(self, number: int) -> np.ndarray:
    chunk = self._chunks.pop(number, None)
    if chunk is None:
      chunk = self._array[number * self._width:min((number + 1) * self._width, self._size)].read().result()
    self._chunks[number] = chunk  # at the end: used last
    if len(self._chunks) > KEPT:
      self._chunks.pop(next(iter(self._chunks)), None)
    return chunk


class Names(Sequence):
  """The names of a store's documents, read when asked for."""

  def __init__(self, letters: Column, offsets: Column):
    self._letters, self._offsets = letters, offsets

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def __getitem__(self, document):
    if isinstance(document, slice):
      return tuple(self[i] for i in range(*document.indices(len(self))))
    if not -len(self) <= document < len(self):
      raise IndexError(f'there is no document {document} among {len(self)}')
    start, stop = self._offsets[int(document) % len(self) + np.arange(2)].tolist()
    return self._letters[start:stop].tobytes().decode()

  def __iter__(self) -> Iterator[str]:
    for first in range(0, len(self), CHUNK):
      offsets = self._offsets[first:first + CHUNK + 1]
      raw = self._letters[offsets[0]:offsets[-1]].tobytes()
      for start, stop in itertools.pairwise((offsets - offsets[0]).tolist()):
        yield raw[start:stop].decode()


def write(path: str | os.PathLike, documents: Iterable[Document], tokenizer: Tokenizer, *,
          source: str = 'documents') -> Store:
  """Tokenises documents into a new store at `path`, a folder of this machine, in this process alone.

  `source` says what they were read from. ValueError if there are none, or if one does not come back from its
  tokens exactly; OSError, naming the path, if it exists already or cannot be written. Nothing is left then.
  """
  with complete_folder(path) as partial:
    folder = Folder(partial)
    types = {'tokens': token_type(tokenizer.vocab), **COLUMNS}
    writers = {name: Writer(folder / name, dtype) for name, dtype in types.items()}
    writers['offsets'].append([0])
    writers['name_offsets'].append([0])
    for document in documents:
      ids = encoded(tokenizer, document.name, document.text)
      new = {'tokens': ids, 'bytes': [len(document.text.encode())], 'sources': [0],
             'names': np.frombuffer(document.name.encode(), np.uint8)}
      for name, numbers in new.items():
        writers[name].append(numbers)
      writers['offsets'].append([writers['tokens'].count])
      writers['name_offsets'].append([writers['names'].count])
    if not writers['bytes'].count:
      raise ValueError(f'{path}: no document to store')
    hashes = {name: writer.close() for name, writer in writers.items()}
    finish(folder, tokenizer, hashes, documents=writers['bytes'].count, tokens=writers['tokens'].count,
           text_bytes=writers['bytes'].total, names_bytes=writers['names'].count, sources=[source])
  return Store(path)


def encoded(tokenizer: Tokenizer, name: str, text: str) -> np.ndarray:
  """The tokens of a document with its marks, int32. ValueError, naming it, if they do not give the text back."""
  ids = tokenizer.encode(text)
  if tokenizer.decode(ids) != text:
    raise ValueError(f'{name}: the tokenizer does not give its text back exactly')
  return np.concatenate([[tokenizer.bos], ids, [tokenizer.eos]], dtype=np.int32)


def token_type(vocab: int) -> str:
  """The smallest type that holds the tokens of a vocabulary."""
  return 'uint8' if vocab <= 1 << 8 else 'uint16' if vocab <= 1 << 16 else 'uint32'


def finish(folder: Folder, tokenizer: Tokenizer, hashes: dict[str, list[str]], *, documents: int, tokens: int,
           text_bytes: int, names_bytes: int, sources: list[str]) -> str:
  """Makes a folder of arrays a store; returns its fingerprint. hashes: SHA-256 of every shard of every array."""
  folder.put('tokenizer.model', tokenizer.model)
  content = [FORMAT, token_type(tokenizer.vocab), hashes, tokenizer.fingerprint]
  manifest = {'format': FORMAT, 'fingerprint': digest(content), 'tokenizer': tokenizer.fingerprint,
              'vocab': tokenizer.vocab, 'documents': documents, 'names_bytes': names_bytes, 'bytes': text_bytes,
              'tokens': tokens, 'sources': sources}
  folder.put('manifest.json', json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b'\n')
  return manifest['fingerprint']


class Writer:
  """Appends to one array of a store, a shard at a time."""

  def __init__(self, folder: Folder, dtype: str):
    self.count = self.total = self._written = 0
    self._parts, self._hashes = [], []
    self._folder, self._dtype = folder, np.dtype(dtype)
    self._array = column(folder, dtype)

  def append(self, numbers):
    part = np.asarray(numbers, self._dtype)
    self._parts.append(part)
    self.count += len(part)
    self.total += int(part.sum(dtype=np.int64))
    while self.count - self._written >= SHARD:
      self._write(SHARD)

  def close(self) -> list[str]:
    """Writes what is left; returns the SHA-256 of every shard."""
    if self.count > self._written:
      self._write(self.count - self._written)
    return self._hashes

  def _write(self, size: int):
    waiting, start = np.concatenate(self._parts), self._written
    with folders.as_os_error('write', self._folder):
      self._array = self._array.resize(exclusive_max=[start + size]).result()
    self._hashes.append(write_shard(self._folder, self._array, start, waiting[:size]))
    self._parts, self._written = [waiting[size:]], start + size


def write_shard(folder: Folder, array: tensorstore.TensorStore, start: int, numbers: np.ndarray) -> str:
  """Writes the shard that begins at `start`, as a whole; returns its SHA-256. OSError if it cannot be written."""
  assert start % SHARD == 0, start
  assert len(numbers) <= SHARD, len(numbers)
  with folders.as_os_error('write', folder):
    array[start:start + len(numbers)].write(numbers).result()
  return hashlib.sha256(np.ascontiguousarray(numbers, numbers.dtype.newbyteorder('<'))).hexdigest()


def column(folder: Folder, dtype: str | None = None, size: int = 0, *, holes: bool = False):
  """An array of a store: a new one of `dtype` and `size`, or the existing one to read. ValueError if damaged."""
  spec = {'driver': 'zarr3', 'kvstore': folder.spec}
  if dtype is None:
    return tensorstore.open({**spec, 'fill_missing_data_reads': holes}, open=True, read=True,
                            context=folders.CONTEXT, recheck_cached_data='open').result()
  checked = [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}]
  if np.dtype(dtype).itemsize == 1:
    checked[0] = {'name': 'bytes'}
  index = [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}]
  sharding = {'chunk_shape': [CHUNK], 'codecs': checked, 'index_codecs': index}
  metadata = {'shape': [size], 'data_type': dtype,
              'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
              'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [SHARD]}}}
  with folders.as_os_error('write', folder):
    return tensorstore.open({**spec, 'metadata': metadata, 'store_data_equal_to_fill_value': True}, open=True,
                            create=True, context=folders.CONTEXT).result()


@contextlib.contextmanager
def complete_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A folder to fill, that takes the name `path` when the block ends well and is removed otherwise.

  OSError naming `path` if it cannot be written, FileExistsError if another has taken the name. What a killed
  process has left is removed; ValueError if one that lives is writing `path`.
  """
  path = pathlib.Path(path)
  partial = path.parent / f'{path.name}.partial'
  try:
    if path.exists():
      raise FileExistsError(f'{path} exists already')
    with Folder(partial).locked():
      shutil.rmtree(partial / 'whole', ignore_errors=True)
      (partial / 'whole').mkdir()
      try:
        yield partial / 'whole'
        appear(partial / 'whole', path)
      finally:
        shutil.rmtree(partial, ignore_errors=True)
  except FileExistsError:
    raise
  except OSError as error:
    reason = error.strerror or str(error).rpartition(': ')[2]  # of one inside, without the paths on the way
    raise OSError(f'cannot write {path}: {reason}') from error


def appear(whole: pathlib.Path, path: pathlib.Path):
  """Gives a finished folder its name, when it would survive a loss of power. FileExistsError if that is taken."""
  Folder(whole).settle()
  try:
    os.rename(whole, path)
  except OSError as error:
    if path.exists():
      raise FileExistsError(f'{path} exists already') from error
    raise OSError(f'cannot write {path}: {error.strerror}') from error


def digest(value) -> str:
  """SHA-256, in hexadecimal, of a value that JSON can hold."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
