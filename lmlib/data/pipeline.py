"""From sources to tokenised stores, in steps of independent tasks that leave their results in a folder.

  read      parts of a source: documents, cleaned, in blocks of text; names, signatures, a report
  (here)    what repeats, what is held out, the tokenizer
  tokenize  a block: its tokens, and what is known of each document
  arrange   a shard of an array of a store: cut from the tokenised blocks

A task writes its result, and then a line that says that it is done; a task that is done is not done again.
Who does the tasks (workers.py, beam.py) does not matter: blocks depend on the source alone, shards on the
documents alone, so the stores are the same to the byte.
"""
from collections import Counter
from collections.abc import Callable, Iterator
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import re
import time
from typing import Any
import zipfile

import numpy as np

from lmlib.data import cleaning, languages, store
from lmlib.data.folder import Folder
from lmlib.data.sources import Document
from lmlib.data.tokenizer import Tokenizer
from lmlib.terminal import clock

BLOCK = 1 << 25  # bytes of text of a block, more by one document at most
TASKS, PARTS, MOST = 32, 16, 4096  # a source is cut into 32 tasks at least, of 16 parts each, but into 4096 at most
EXAMPLES = 3  # of what a stage did, kept in the report
LISTED = 20  # documents that could not be read, kept by name


@dataclasses.dataclass(frozen=True)
class Read:
  """Documents of some parts of one source."""
  work: str
  corpus: Any
  number: int  # of the task, in the order of the corpus
  source: int
  parts: tuple[str, ...]

  @property
  def key(self) -> str:
    return f'read/{self.number:07}'


@dataclasses.dataclass(frozen=True)
class Tokenize:
  """The documents of one block that are kept."""
  work: str
  block: str
  source: int
  parts: dict[str, np.ndarray]  # of each part of the store, its documents by their number in the block

  @property
  def key(self) -> str:
    return f'tokenize/{self.block.removeprefix("read/")}'


@dataclasses.dataclass(frozen=True)
class Arrange:
  """One shard of one array: from `start`, `size` numbers of all `total`."""
  work: str
  target: str
  part: str
  column: str
  dtype: str
  start: int
  size: int
  total: int
  blocks: tuple[tuple[str, int, int, int], ...]  # key; documents, tokens and bytes of names before it

  @property
  def key(self) -> str:
    return f'arrange/{self.part}.{self.column}.{self.start:015}'


def plan(corpus, work: Folder) -> list[Read]:
  """The tasks that read a corpus. ValueError for a source that has no part."""
  tasks = []
  for number, source in enumerate(corpus.sources):
    for parts in grouped(source):
      tasks.append(Read(str(work), corpus, len(tasks), number, parts))
  return tasks


def grouped(source) -> list[tuple[str, ...]]:
  """The parts of a source, in groups that a task reads."""
  parts = source.parts()
  size = max(1, min(-(-len(parts) // TASKS), PARTS), -(-len(parts) // MOST))
  return [parts[i:i + size] for i in range(0, len(parts), size)]


def read(task: Read) -> int:
  """Reads and cleans; returns how many bytes of text were read."""
  corpus, work = task.corpus, Folder(task.work)
  stages, wide = cleaning.divided(corpus.stages)
  report, unread, hashed = cleaning.Report(stages, examples=EXAMPLES), Unread(), hashlib.sha256()
  blocks, documents, size, spoken = Blocks(work, task.key, wide), 0, 0, {}
  for document in readable(corpus, corpus.sources[task.source], task.parts, unread):
    raw = document.text.encode()
    documents, size = documents + 1, size + len(raw)
    fold(hashed, document.name, raw)
    text = cleaning.clean(document.text, stages, name=document.name, report=report) if stages else document.text
    if isinstance(text, str):
      blocks.add(document.name, text)
      for stage in stages:
        if isinstance(stage, languages.Language):
          found = spoken.setdefault(languages.identified(text, characters=stage.characters)[0], [0, 0])
          found[:] = found[0] + 1, found[1] + cleaning.size_of(text)
  blocks.flush()
  write_json(work, task.key, {'blocks': blocks.counts, 'documents': documents, 'bytes': size,
                              'content': hashed.hexdigest(), 'unread': [unread.reasons, unread.listed],
                              'report': report.to_json(), 'languages': spoken})
  return size


def content(corpus, source) -> list[str]:
  """SHA-256 of the names and texts of each group of parts of a source, as read() finds them."""
  found = []
  for parts in grouped(source):
    hashed = hashlib.sha256()
    for document in readable(corpus, source, parts, Unread()):
      fold(hashed, document.name, document.text.encode())
    found.append(hashed.hexdigest())
  return found


def fold(hashed, name: str, raw: bytes):
  """Adds a document to a hash, so that no two lists of documents are the same to it."""
  hashed.update(json.dumps([name, len(raw)]).encode())
  hashed.update(raw)


class Unread:
  """Counts, by reason, what could not be read."""

  def __init__(self):
    self.reasons, self.listed = Counter(), []

  def __call__(self, where: str, message: str):
    said = message.removeprefix(f'{where}: ')
    self.reasons[re.sub(r'\d+', 'N', re.split(r"[:('\"=]", said)[0]).strip()] += 1
    if len(self.listed) < LISTED:
      self.listed.append([where, said])


def readable(corpus, source, parts: tuple[str, ...], unread: Unread) -> Iterator[Document]:
  """The documents of parts of a source, none longer than corpus.longest.

  ValueError, naming it, for one that is longer or cannot be read; `unread` counts it if corpus.on_error is
  'skip'. Of a source that cannot go on after an error, the rest of the parts' group is left out.
  """
  skip, known = corpus.on_error == 'skip', inspect.signature(source.documents).parameters
  options = {name: value for name, value in (('longest', corpus.longest), ('unreadable', unread if skip else None))
             if name in known}
  documents = source.documents(parts, **options)
  while True:
    try:
      document = next(documents, None)
    except ValueError as error:
      if not skip:
        raise
      unread(f'{parts[0]} and what follows it', str(error))
      return
    if document is None:
      return
    if (size := cleaning.size_of(document.text)) > corpus.longest:
      message = f'{document.name}: longer than longest={corpus.longest} bytes: {size}'
      if not skip:
        raise ValueError(message)
      unread(document.name, message)
      continue
    yield document


class Blocks:
  """Collects the documents that are kept, and writes them block by block."""

  def __init__(self, work: Folder, key: str, wide: tuple):
    self._work, self._key, self._wide = work, key, wide
    self.counts = []  # of each block: its key and the number of its documents
    self._clear()

  def _clear(self):
    self._texts, self._names, self._characters, self._size = [], [], [], 0
    self._signatures = [[] for _ in self._wide]

  def add(self, name: str, text: str):
    self._texts.append(text.encode())
    self._names.append(name)
    self._characters.append(len(text))
    self._size += len(self._texts[-1])
    for rows, stage in zip(self._signatures, self._wide):
      rows.append(stage.signature(text))
    if self._size >= BLOCK:
      self.flush()

  def flush(self):
    if not self._names:
      return
    key = f'{self._key}.{len(self.counts):05}'
    names = [name.encode() for name in self._names]
    signatures = {f'signatures_{i}': np.stack(rows) for i, rows in enumerate(self._signatures)}
    write_arrays(self._work, f'{key}.text', text=joined(self._texts))
    write_arrays(self._work, f'{key}.index', ranks=np.array([rank(name) for name in self._names], np.uint64),
                 bytes=sizes(self._texts), characters=np.array(self._characters, np.int64), names=joined(names),
                 name_bytes=sizes(names), **signatures)
    self.counts.append([key, len(names)])
    self._clear()


def tokenize(task: Tokenize) -> int:
  """Tokenises a block; returns the bytes of its text."""
  work = Folder(task.work)
  tokenizer = tokenizer_of(task.work)
  index, raw = read_arrays(work, f'{task.block}.index'), read_arrays(work, f'{task.block}.text')['text'].tobytes()
  names, counts = split(index['names'].tobytes(), index['name_bytes']), {}
  stops = np.cumsum(index['bytes'])
  for part, chosen in task.parts.items():
    ids = [store.encoded(tokenizer, names[i].decode(), raw[stops[i] - index['bytes'][i]:stops[i]].decode())
           for i in chosen.tolist()]
    kept = [names[i] for i in chosen.tolist()]
    columns = {'lengths': sizes(ids), 'bytes': index['bytes'][chosen], 'name_bytes': sizes(kept),
               'sources': np.full(len(ids), task.source, np.uint16), 'names': joined(kept)}
    tokens = np.concatenate([np.zeros(0, np.int32), *ids]).astype(store.token_type(tokenizer.vocab))
    write_arrays(work, f'{task.key}.{part}.tokens', tokens=tokens)
    write_arrays(work, f'{task.key}.{part}.columns', **columns)
    counts[part] = {'documents': len(ids), 'tokens': len(tokens), 'bytes': int(columns['bytes'].sum()),
                    'names_bytes': len(columns['names'])}
  write_json(work, task.key, {'source': task.source, 'parts': counts})
  return len(raw)


def arrange(task: Arrange) -> int:
  """Writes a shard; returns its bytes."""
  work, target = Folder(task.work), Folder(task.target) / task.part / task.column
  numbers = np.empty(task.size, task.dtype)
  filled = 0
  if task.column in ('offsets', 'name_offsets') and task.start == 0:
    numbers[0], filled = 0, 1  # the others are where documents end
  for block, *before in task.blocks:
    found, first = piece(task, work, block, *before)
    begin = max(task.start + filled - first, 0)
    part = found[begin:begin + task.size - filled]
    numbers[filled:filled + len(part)] = part
    filled += len(part)
  assert filled == task.size, (task.key, filled, task.size)
  array = store.column(target, task.dtype, task.total)
  write_json(work, task.key, {'sha256': store.write_shard(target, array, task.start, numbers)})
  return numbers.nbytes


def piece(task: Arrange, work: Folder, block: str, documents: int, tokens: int, names: int):
  """What a block holds of an array, and the place of its first number in it."""
  if task.column == 'tokens':
    return tokens_of(task.work, f'{block}.{task.part}.tokens')['tokens'], tokens
  columns = columns_of(task.work, f'{block}.{task.part}.columns')
  if task.column == 'offsets':
    return tokens + np.cumsum(columns['lengths']), documents + 1
  if task.column == 'name_offsets':
    return names + np.cumsum(columns['name_bytes']), documents + 1
  return columns[task.column], names if task.column == 'names' else documents


class Steps:
  """Does tasks, shows how far they are, and finds their results."""

  def __init__(self, work: Folder, over: Callable, terminal):
    self.work, self._over, self._terminal = work, over, terminal

  def done(self, name: str, function: Callable, tasks: list) -> list[dict]:
    """The results of all tasks, in their order. Only those are done that have none yet."""
    have = set(self.work.keys())
    todo = [task for task in tasks if task.key not in have]
    if len(todo) < len(tasks):
      self._terminal.say(f'{name}: {len(tasks) - len(todo)} of {len(tasks)} tasks were done before')
    begin, size = time.monotonic(), 0
    for i, bytes_done in enumerate(self._over(function, todo), 1):
      size += bytes_done
      seconds = max(time.monotonic() - begin, 1e-9)
      self._terminal.progress(f'{name} {i}/{len(todo)}  {size / 1e6:,.1f} MB  {size / 1e6 / seconds:,.2f} MB/s  '
                              f'{clock(seconds / i * (len(todo) - i))} left', last=i == len(todo))
    return [read_json(self.work, task.key, value)
            for task, value in zip(tasks, self.work.get_all(task.key for task in tasks))]


def rank(name: str) -> int:
  """64 bits that depend on the name alone; the prefix sets them apart from other draws by name."""
  return int.from_bytes(hashlib.sha256(f'held out {name}'.encode()).digest()[:8], 'big')


def joined(parts: list[bytes]) -> np.ndarray:
  return np.frombuffer(b''.join(parts), np.uint8)


def sizes(parts: list) -> np.ndarray:
  return np.array([len(part) for part in parts], np.int64)


def split(raw: bytes, parts: np.ndarray) -> list[bytes]:
  """The parts of given sizes that follow one another in `raw`."""
  stops = np.cumsum(parts).tolist()
  return [raw[stop - size:stop] for stop, size in zip(stops, parts.tolist())]


def write_arrays(work: Folder, key: str, **arrays):
  """Writes arrays under one key, with checksums."""
  file = io.BytesIO()
  np.savez(file, **arrays)
  work.put(key, file.getbuffer().tobytes())


def read_arrays(work: Folder, key: str) -> dict[str, np.ndarray]:
  """The arrays under a key. ValueError if they are damaged."""
  try:
    with np.load(io.BytesIO(work.get(key) or b'')) as found:
      return dict(found)
  except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
    raise damaged(work, key) from error


def write_json(work: Folder, key: str, value: dict):
  raw = json.dumps(value, ensure_ascii=False).encode()
  work.put(key, json.dumps([hashlib.sha256(raw).hexdigest(), raw.decode()]).encode())


def read_json(work: Folder, key: str, raw: bytes | None) -> dict:
  """What write_json wrote. ValueError if it is damaged."""
  try:
    checksum, text = json.loads(raw or b'')
    if hashlib.sha256(text.encode()).hexdigest() == checksum:
      return json.loads(text)
  except ValueError as error:
    raise damaged(work, key) from error
  raise damaged(work, key)


def damaged(work: Folder, key: str) -> ValueError:
  return ValueError(f'{work}/{key} is damaged or missing: remove {work} and run again')


@functools.lru_cache(2)
def tokens_of(work: str, key: str) -> dict[str, np.ndarray]:
  """The tokens of a block. The last are kept: shards that follow one another share a block."""
  return read_arrays(Folder(work), key)


@functools.lru_cache(64)
def columns_of(work: str, key: str) -> dict[str, np.ndarray]:
  """What is known of the documents of a block, which several arrays are cut from."""
  return read_arrays(Folder(work), key)


@functools.lru_cache(1)
def tokenizer_of(work: str) -> Tokenizer:
  return Tokenizer(Folder(work).get('tokenizer.model') or b'')


def forget():
  """Empties what this process has kept of a work folder: another may have its name now."""
  for kept in (tokens_of, columns_of, tokenizer_of):
    kept.cache_clear()
