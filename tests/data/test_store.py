import itertools
import json
import os
import pathlib
import resource
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
import tensorstore

from lmlib.data import store
from lmlib.data.sources import Document
from lmlib.data.store import Store


def documents(texts, stop=None):
  for i, text in enumerate(texts):
    if i == stop:
      raise KeyboardInterrupt
    yield Document(f'document {i}', text)


def test_tokens_are_bos_text_eos_document_by_document(small_store, texts, tokenizer):
  want = [[tokenizer.bos, *tokenizer.encode(text).tolist(), tokenizer.eos] for text in texts]
  assert small_store.read(0, small_store.tokens).tolist() == list(itertools.chain(*want))
  assert np.diff(small_store.offsets).tolist() == list(map(len, want))
  assert list(small_store.bytes) == [len(text.encode()) for text in texts]
  assert small_store.text_bytes == sum(len(text.encode()) for text in texts)
  assert tuple(small_store.names) == tuple(f'document {i}' for i in range(len(texts)))
  assert [small_store.text(i) for i in range(small_store.documents)] == texts
  assert small_store.read(3, 9).dtype == np.int32
  small_store.check()


def test_reading_outside_is_an_error(small_store):
  N = small_store.tokens
  for start, stop in ((-1, 2), (0, N + 1), (5, 4)):
    with pytest.raises(ValueError, match=f'{start} to {stop}.*{N}'):
      small_store.read(start, stop)


def test_rows_close_the_circle(small_store):
  N = small_store.tokens
  everything = small_store.read(0, N)
  rows_BT = small_store.rows(np.array([0, 7, N - 2]), 5)
  for start, row in zip((0, 7, N - 2), rows_BT):
    assert row.tolist() == everything[np.arange(start, start + 5) % N].tolist()


def test_documents_are_found_by_token_and_told_by_number(small_store, texts):
  starts = np.array([small_store.offsets[i] for i in range(len(texts) + 1)])
  assert np.array_equal(np.asarray(small_store.offsets), starts)
  position = np.arange(small_store.tokens).reshape(1, -1)
  want = np.repeat(np.arange(len(texts)), np.diff(starts)).reshape(1, -1)
  assert np.array_equal(small_store.document_at(position), want)
  assert small_store.document_at(starts[7]) == 7
  start, stop = small_store.bounds(np.array([[3], [0]]))
  assert start.tolist() == [[starts[3]], [0]]
  assert stop.tolist() == [[starts[4]], [starts[1]]]
  assert small_store.source_of([0, 5]).tolist() == [0, 0]
  assert small_store.sources == ('documents',)
  assert small_store.names[3] == small_store.names[3 - len(texts)] == 'document 3'
  assert small_store.names[37:] == ('document 37', 'document 38', 'document 39')
  for outside in (len(texts), -len(texts) - 1):
    with pytest.raises(IndexError, match='no document'):
      small_store.names[outside]
  with pytest.raises(IndexError, match='not all among'):
    small_store.source_of([len(texts)])


@hypothesis.given(hypothesis.strategies.data())
@hypothesis.settings(max_examples=30, derandomize=True, deadline=None)
def test_a_search_in_a_column_is_the_one_in_memory(data):
  """Whatever the chunks, with equal numbers too, and whatever was looked for before."""
  size = data.draw(hypothesis.strategies.integers(1, 60))
  numbers = np.sort(np.array(data.draw(hypothesis.strategies.lists(
      hypothesis.strategies.integers(0, 40), min_size=size, max_size=size))))
  array = tensorstore.open({'driver': 'zarr3', 'kvstore': 'memory://'}, create=True, dtype='int64', shape=[size],
                           chunk_layout=tensorstore.ChunkLayout(chunk_shape=[data.draw(
                               hypothesis.strategies.integers(1, 9))])).result()
  array.write(numbers).result()
  column = store.Column(array)
  for side in ('left', 'right'):
    for _ in range(3):
      values = np.array(data.draw(hypothesis.strategies.lists(hypothesis.strategies.integers(-1, 41))), np.int64)
      assert np.array_equal(np.searchsorted(column, values, side), np.searchsorted(numbers, values, side))
      index = np.array([value % size for value in values.tolist()], np.int64)
      assert np.array_equal(column[index], numbers[index])
  start, stop = sorted(data.draw(hypothesis.strategies.tuples(*[hypothesis.strategies.integers(0, size)] * 2)))
  assert np.array_equal(column[start:stop], numbers[start:stop])
  assert list(column) == numbers.tolist()


SPARSE = """
import json, pathlib, re, sys, time
import numpy as np
from lmlib.data.store import Store
if sys.argv[2] == 'strict':
  Store(sys.argv[1]).read(0, 5)
begin = time.perf_counter()
store = Store(sys.argv[1], holes=True)
opened = time.perf_counter() - begin
tokens = store.tokens
rng = np.random.default_rng(0)
for _ in range(20):
  start_B = rng.integers(0, tokens, 64)
  rows_BT = store.rows(start_B, 1025)
  assert rows_BT.shape == (64, 1025)
for document in (0, 10**7, 10**8 - 1):
  found = store.document_at(document * 1000 + np.array([0, 999]))
  assert found.tolist() == [document, document], (document, found)
  assert [int(x) for x in store.bounds(document)] == [document * 1000, document * 1000 + 1000]
# Not getrusage: what that says counts the memory of the process that this one was forked from.
most = re.search(r'VmHWM:\\s*(\\d+) kB', pathlib.Path('/proc/self/status').read_text())
print(json.dumps([opened, int(most[1]) / 1024]))
"""


def sparse_store(path, tokenizer, documents: int, length: int):
  """A store of as many documents of `length` tokens, of whose offsets only what a search for a few needs is there."""
  folder = store.Folder(path)
  tokens, types = documents * length, {'tokens': 'uint16', **store.COLUMNS}
  sizes = {'tokens': tokens, 'offsets': documents + 1, 'names': 9 * documents, 'name_offsets': documents + 1}
  arrays = {name: store.column(folder / name, dtype, sizes.get(name, documents)) for name, dtype in types.items()}
  wanted, chunks = set(), -(-(documents + 1) // store.CHUNK)
  for document in (0, 10**7, documents - 1):
    low, high = 0, chunks
    while high - low > 1:  # the chunks whose first number a binary search looks at
      wanted |= {low}
      middle = (low + high) // 2
      low, high = (middle, high) if middle * store.CHUNK <= document else (low, middle)
      wanted |= {middle}
    wanted |= {low, min(low + 1, chunks - 1)}
  for chunk in wanted:
    part = slice(chunk * store.CHUNK, min((chunk + 1) * store.CHUNK, documents + 1))
    arrays['offsets'][part].write(np.arange(part.start, part.stop) * length).result()
  store.finish(folder, tokenizer, {}, documents=documents, tokens=tokens, text_bytes=tokens, sources=['none'],
               names_bytes=9 * documents)


def test_opening_and_reading_cost_the_same_for_a_store_of_any_size(tokenizer, tmp_path):
  """10^11 tokens of 10^8 documents: 200 GB of tokens, 1.6 GB of offsets and sizes."""
  sparse_store(tmp_path / 'huge', tokenizer, 10**8, 1000)
  environment = os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parents[2])}
  run = lambda how: subprocess.run([sys.executable, '-c', SPARSE, str(tmp_path / 'huge'), how], text=True,
                                   capture_output=True, env=environment)
  done = run('holes')
  assert done.returncode == 0, done.stderr
  opened, megabytes = json.loads(done.stdout)
  assert megabytes < 500
  assert opened < 5  # a hundredth of a second on a quiet machine; reading 10^8 offsets would take more
  assert 'missing' in run('strict').stderr  # by default what is not there is an error


def test_many_shards_equal_one(texts, tokenizer, small_store, tmp_path, monkeypatch):
  monkeypatch.setattr(store, 'SHARD', 64)
  monkeypatch.setattr(store, 'CHUNK', 8)
  cut = store.write(tmp_path / 'cut', documents(texts), tokenizer)
  assert len(os.listdir(tmp_path / 'cut' / 'tokens' / 'c')) == -(-cut.tokens // 64) > 10
  assert cut.read(0, cut.tokens).tolist() == small_store.read(0, cut.tokens).tolist()
  cut.check()
  (tmp_path / 'cut' / 'tokens' / 'c' / '3').unlink()
  Store(tmp_path / 'cut').read(0, 64)
  for damaged in (lambda: Store(tmp_path / 'cut').check(), lambda: Store(tmp_path / 'cut').read(190, 200)):
    with pytest.raises(ValueError, match='missing'):
      damaged()


def test_fingerprint_covers_text_and_names_and_not_the_place(texts, tokenizer, small_store, tmp_path):
  made = lambda name, documents: store.write(tmp_path / name, documents, tokenizer).fingerprint
  assert made('same', documents(texts)) == small_store.fingerprint
  assert made('order', documents(texts[::-1])) != small_store.fingerprint
  assert made('names', (Document(f'{d.name}!', d.text) for d in documents(texts))) != small_store.fingerprint


def test_large_vocabularies_take_four_bytes(texts, tmp_path, tokenizer):
  class Large:
    vocab, bos, eos, fingerprint, model = 1 << 17, 1, 2, tokenizer.fingerprint, tokenizer.model
    encode = staticmethod(lambda text: np.array([ord(c) + 70_000 for c in text], np.int32))
    decode = staticmethod(lambda ids: ''.join(chr(i - 70_000) for i in ids))

  wide = store.write(tmp_path / 'wide', documents(texts), Large())
  assert wide.read(1, 3).tolist() == [ord(c) + 70_000 for c in texts[0][:2]]


@pytest.mark.parametrize('stop', [0, 20])
def test_nothing_is_left_of_a_store_that_was_not_finished(texts, tokenizer, tmp_path, stop):
  with pytest.raises(KeyboardInterrupt):
    store.write(tmp_path / 'x', documents(texts, stop), tokenizer)
  assert os.listdir(tmp_path) == []
  with pytest.raises(ValueError, match='not a tokenised store'):
    Store(tmp_path / 'x')


def test_a_tokenizer_that_loses_text_is_refused(tmp_path, tokenizer):
  class Lossy:
    vocab, bos, eos = 300, 1, 2
    encode = staticmethod(lambda text: tokenizer.encode(text.replace('\n', ' ')))
    decode = staticmethod(tokenizer.decode)

  with pytest.raises(ValueError, match='document 1'):
    store.write(tmp_path / 'x', documents(['a b', 'a\nb']), Lossy())
  assert os.listdir(tmp_path) == []


def test_no_document_and_a_taken_name_are_errors(texts, tokenizer, tmp_path, small_store):
  with pytest.raises(ValueError, match='no document'):
    store.write(tmp_path / 'x', [], tokenizer)
  with pytest.raises(FileExistsError, match='small exists'):
    store.write(small_store.path, documents(texts), tokenizer)
  assert small_store.text(0) == texts[0]


def test_a_full_disk_is_one_error_that_names_the_path(texts, tokenizer, tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # longer files fail, as on a full disk
  try:
    with pytest.raises(OSError, match=f'cannot write {tmp_path}/x'):
      store.write(tmp_path / 'x', documents(texts), tokenizer)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(('file', 'damage', 'message'), [
    ('tokens/c/0', lambda raw: bytes([raw[0] ^ 1]) + raw[1:], 'igest'),
    ('offsets/c/0', lambda raw: bytes([raw[0] ^ 1]) + raw[1:], 'igest'),
    ('names/c/0', lambda raw: bytes([raw[0] ^ 1]) + raw[1:], 'igest'),
    ('manifest.json', lambda raw: raw[:-5], 'not a tokenised store'),
    ('manifest.json', lambda raw: raw.replace(b'"documents": 40', b'"documents": 41'), 'documents=41.*40'),
    ('manifest.json', lambda raw: raw.replace(b'"format": 2', b'"format": 0'), 'format 0'),
])
def test_damage_is_noticed(texts, tokenizer, tmp_path, file, damage, message):
  made = store.write(tmp_path / 'x', documents(texts), tokenizer).path
  raw = (made / file).read_bytes()
  assert damage(raw) != raw
  (made / file).write_bytes(damage(raw))
  with pytest.raises(ValueError, match=message):
    Store(made).check()
