import itertools
import os
import resource

import numpy as np
import pytest

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
  assert small_store.bytes.tolist() == [len(text.encode()) for text in texts]
  assert small_store.text_bytes == sum(len(text.encode()) for text in texts)
  assert small_store.names == tuple(f'document {i}' for i in range(len(texts)))
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


def test_many_shards_equal_one(texts, tokenizer, small_store, tmp_path, monkeypatch):
  monkeypatch.setattr(store, 'SHARD', 64)
  monkeypatch.setattr(store, 'CHUNK', 8)
  cut = store.write(tmp_path / 'cut', documents(texts), tokenizer)
  assert len(os.listdir(tmp_path / 'cut' / 'tokens' / 'c')) == -(-cut.tokens // 64) > 10
  assert cut.read(0, cut.tokens).tolist() == small_store.read(0, cut.tokens).tolist()
  assert cut.fingerprint == small_store.fingerprint
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
    vocab, bos, eos, fingerprint, save = 1 << 17, 1, 2, tokenizer.fingerprint, tokenizer.save
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
    ('documents.jsonl', lambda raw: raw[:-5], 'names_bytes'),
    ('manifest.json', lambda raw: raw[:-5], 'not a tokenised store'),
    ('manifest.json', lambda raw: raw.replace(b'"documents": 40', b'"documents": 41'), 'documents=41.*40'),
    ('manifest.json', lambda raw: raw.replace(b'"format": 1', b'"format": 0'), 'format 0'),
])
def test_damage_is_noticed(texts, tokenizer, tmp_path, file, damage, message):
  made = store.write(tmp_path / 'x', documents(texts), tokenizer).path
  raw = (made / file).read_bytes()
  assert damage(raw) != raw
  (made / file).write_bytes(damage(raw))
  with pytest.raises(ValueError, match=message):
    Store(made).check()
