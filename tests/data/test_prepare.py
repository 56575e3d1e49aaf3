import os
import pathlib
import threading

import numpy as np
import pytest

from lmlib.data import prepare as prepares
from lmlib.data import store
from lmlib.data.prepare import Corpus, default_cache, prepare
from lmlib.data.sources import TextFiles
from lmlib.data.tokenizer import SentencePiece


@pytest.fixture
def folder(tmp_path, monkeypatch, texts):
  monkeypatch.chdir(tmp_path)
  os.mkdir('text')
  for i, text in enumerate(texts):
    pathlib.Path(f'text/{i:02}.txt').write_text(text)
  return tmp_path


def corpus(glob='text/*', held_out=0.1, pieces=330):
  return Corpus(TextFiles(glob), SentencePiece(pieces=pieces), held_out)


def test_every_document_is_in_one_part_and_comes_back_exactly(folder, texts):
  prepared = prepare(corpus(), 'cache')
  parts = (prepared.train, prepared.held_out)
  named = {part.names[i]: part.text(i) for part in parts for i in range(part.documents)}
  assert named == {f'text/{i:02}.txt': text for i, text in enumerate(texts)}
  assert prepared.train.documents + prepared.held_out.documents == len(texts)
  assert prepared.tokenizer.vocab == 330
  assert prepared.skipped == ()
  train, held_out = prepared.rows
  assert (train['part'], held_out['part']) == ('train', 'held out')
  assert train['bytes'] + held_out['bytes'] == sum(len(text.encode()) for text in texts)
  assert held_out['bytes_per_token'] == held_out['bytes'] / held_out['tokens']


def test_the_tokenizer_sees_the_train_part_alone(folder):
  first = prepare(corpus(), 'cache')
  pathlib.Path(first.held_out.names[0]).write_text('zzyzx ' * 1000)
  second = prepare(corpus(), 'cache')
  assert second.train.fingerprint == first.train.fingerprint
  assert second.held_out.fingerprint != first.held_out.fingerprint


def test_the_split_goes_by_name_alone():
  entries = [prepares.Entry(f'name {i}', '', 0, 0) for i in range(2000)]
  out = prepares.held_out(entries, 0.05)
  assert 60 < len(out) < 140  # 100 +- 9.7: four deviations
  assert prepares.held_out(entries[::-1], 0.05) == out
  assert prepares.held_out(entries[:1000], 0.05) == {e.name for e in entries[:1000]} & out
  assert out < prepares.held_out(entries, 0.2)


@pytest.mark.parametrize('share', [0.001, 0.999])
def test_two_documents_are_enough_and_one_is_not(share):
  entries = [prepares.Entry(name, '', 0, 0) for name in 'ab']
  assert len(prepares.held_out(entries, share)) == 1
  for few in ([], entries[:1]):
    with pytest.raises(ValueError, match=r'no document but (a|none): .* two'):
      prepares.held_out(few, share)


def test_the_second_time_it_is_read_from_the_cache(folder, monkeypatch):
  said = []
  first = prepare(corpus(), 'cache', say=said.append)
  assert [line.split(' ')[0] for line in said] == ['training', 'tokenizing']
  assert '330 pieces' in said[0]
  monkeypatch.setattr(prepares, 'build', None)
  second = prepare(corpus(), 'cache', say=said.append)
  assert len(said) == 2
  assert second.train.path == first.train.path
  assert second.rows == first.rows


@pytest.mark.parametrize('change', [
    lambda: corpus(held_out=0.2), lambda: corpus(pieces=331), lambda: corpus('text/*[0-8].txt'),
    lambda: pathlib.Path('text/00.txt').write_text('other') and corpus(),
    lambda: pathlib.Path('text/00.txt').rename('text/x.txt') and corpus()])
def test_other_content_or_settings_are_prepared_anew(folder, change):
  first = prepare(corpus(), 'cache')
  assert prepare(change(), 'cache').train.path != first.train.path


def test_a_kill_leaves_nothing_and_the_next_run_starts_afresh(folder, monkeypatch):
  write, calls = store.write, []

  def killed(path, documents, tokenizer):
    calls.append(path)
    if len(calls) == 2:  # the train part is complete, the held-out part not begun
      raise KeyboardInterrupt
    return write(path, documents, tokenizer)

  monkeypatch.setattr(store, 'write', killed)
  with pytest.raises(KeyboardInterrupt):
    prepare(corpus(), 'cache')
  assert os.listdir('cache') == []
  assert prepare(corpus(), 'cache').train.documents


@pytest.mark.parametrize('file', ['held_out/manifest.json', 'train/tokens/c/0', 'train/tokenizer.model'])
def test_a_damaged_cache_is_said_and_made_again(folder, file):
  first = prepare(corpus(), 'cache')
  (first.train.path.parent / file).unlink()
  said = []
  second = prepare(corpus(), 'cache', say=said.append)
  assert 'preparing it again' in said[0]
  assert second.train.fingerprint == first.train.fingerprint
  assert os.listdir('cache') == [first.train.path.parent.name]


def test_two_at_once_use_one_result(folder, monkeypatch):
  together, build = threading.Barrier(2), prepares.build

  def both(*args):
    together.wait(30)  # both have found the cache empty
    build(*args)

  monkeypatch.setattr(prepares, 'build', both)
  results = []
  threads = [threading.Thread(target=lambda: results.append(prepare(corpus(), 'cache'))) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  one, other = results
  assert one.train.path == other.train.path
  assert len(os.listdir('cache')) == 1
  assert np.array_equal(one.train.read(0, 50), other.train.read(0, 50))


def test_text_that_changes_meanwhile_is_noticed(folder):
  def say(line):
    if line.startswith('tokenizing'):
      pathlib.Path('text/07.txt').write_text('changed')

  with pytest.raises(ValueError, match=r'text/07\.txt changed'):
    prepare(corpus(), 'cache', say=say)
  assert os.listdir('cache') == []


def test_a_cache_that_cannot_be_written_is_one_error_that_names_it(folder):
  (folder / 'file').write_text('in the way')
  with pytest.raises(OSError, match=r'cannot write file/cache/\w+: Not a directory; .*LMLIB_CACHE'):
    prepare(corpus(), 'file/cache')


def test_too_little_text_and_bad_shares(folder):
  with pytest.raises(ValueError, match=r'pieces=5000 .*Vocabulary size too high'):
    prepare(corpus(pieces=5000), 'cache')
  assert os.listdir('cache') == []
  for share in (0, 1.0):
    with pytest.raises(ValueError, match=f'held_out={share} '):
      Corpus(held_out=share)


def test_where_the_cache_is(monkeypatch):
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.delenv('LMLIB_CACHE', raising=False)
  assert default_cache() == pathlib.Path.home() / '.cache' / 'lmlib'
  monkeypatch.setenv('XDG_CACHE_HOME', '/x')
  assert default_cache() == pathlib.Path('/x/lmlib')
  monkeypatch.setenv('LMLIB_CACHE', '/y')
  assert default_cache() == pathlib.Path('/y')
