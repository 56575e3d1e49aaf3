import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from lmlib.data import pipeline, preparation
from lmlib.data.index import held_out
from lmlib.data.prepare import Corpus, default_cache, prepare
from lmlib.data.sources import TextFiles
from lmlib.data.tokenizer import SentencePiece

ROOT = pathlib.Path(__file__).parents[2]


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


def test_the_table_counts_what_was_read(folder):
  prepared = prepare(corpus(), 'cache')
  row = prepared.rows[0]
  text = dataclasses.replace(prepared, skipped=(('a.py', 'empty file'),)).table()
  for part in ('train', 'held out', f'{row["documents"]}', f'{row["tokens"]:,}', 'skipped 1 files', 'a.py: empty file'):
    assert part in text, part
  assert 'skipped' not in prepared.table()


def test_the_tokenizer_sees_the_train_part_alone(folder):
  first = prepare(corpus(), 'cache')
  pathlib.Path(first.held_out.names[0]).write_text('zzyzx ' * 1000)
  second = prepare(corpus(), 'cache')
  assert second.train.fingerprint == first.train.fingerprint
  assert second.held_out.fingerprint != first.held_out.fingerprint


def ranks(names):
  return np.array([pipeline.rank(name) for name in names], np.uint64)


def test_the_split_goes_by_name_alone():
  names = [f'name {i}' for i in range(2000)]
  out = held_out(ranks(names), 0.05)
  assert 60 < out.sum() < 140  # 100 +- 9.7: four deviations
  assert (held_out(ranks(names[::-1]), 0.05) == out[::-1]).all()
  assert (held_out(ranks(names[:1000]), 0.05) == out[:1000]).all()
  assert (held_out(ranks(names), 0.2) >= out).all()


@pytest.mark.parametrize('share', [0.001, 0.999])
def test_two_documents_are_enough_and_one_is_not(folder, share):
  assert held_out(ranks('ab'), share).sum() == 1
  with pytest.raises(ValueError, match=r'no document but text/00\.txt: .* two'):
    prepare(corpus('text/00.txt', share), 'cache')


def test_the_second_time_it_is_read_from_the_cache(folder, monkeypatch):
  said = []
  first = prepare(corpus(), 'cache', say=said.append)
  assert [line.split(' ')[0] for line in said] == ['training', 'tokenizing']
  assert '330 pieces' in said[0]
  monkeypatch.setattr(preparation, 'write', None)
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


def test_an_interruption_leaves_nothing_and_the_next_run_starts_afresh(folder, monkeypatch):
  arrange, calls = pipeline.arrange, []

  def killed(task):
    calls.append(task)
    if len(calls) == 9:  # the train part is complete, the held-out part not
      raise KeyboardInterrupt
    return arrange(task)

  monkeypatch.setattr(pipeline, 'arrange', killed)
  with pytest.raises(KeyboardInterrupt):
    prepare(corpus(), 'cache')
  assert os.listdir('cache') == []
  assert prepare(corpus(), 'cache').train.documents


KILLED = """
import os, signal, sys
from lmlib.data import pipeline, prepare, sources, tokenizer
pipeline.arrange = lambda task: os.kill(os.getpid(), signal.SIGKILL)
prepare.prepare(prepare.Corpus(sources.TextFiles(sys.argv[1]), tokenizer.SentencePiece(pieces=330), 0.1), 'cache')
"""


@pytest.mark.parametrize('glob', ['text/*', 'text/?[0-8].txt'], ids=['same', 'other'])
def test_what_a_killed_process_leaves_in_the_cache_is_used_or_removed(folder, glob):
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  assert subprocess.run([sys.executable, '-c', KILLED, glob], env=environment).returncode == -signal.SIGKILL
  [left] = os.listdir('cache')
  assert left.endswith('.partial')
  assert prepare(corpus(), 'cache').train.documents
  assert [name.endswith('.partial') for name in os.listdir('cache')] == [False]


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
  together, arrange, lines = threading.Barrier(2), pipeline.arrange, []

  def wait_for_the_other(line):
    lines.append(line)
    if 'waiting' in line:
      together.wait(30)

  def once(task):
    if task.part == 'held_out' and task.column == 'tokens':
      together.wait(30)  # the other has found the lock taken
    return arrange(task)

  monkeypatch.setattr(pipeline, 'arrange', once)
  results = []
  threads = [threading.Thread(target=lambda: results.append(prepare(corpus(), 'cache', say=wait_for_the_other)))
             for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  one, other = results
  assert one.train.path == other.train.path
  assert sum(line.startswith('tokenizing') for line in lines) == 1
  assert len(os.listdir('cache')) == 1
  assert np.array_equal(one.train.read(0, 50), other.train.read(0, 50))


def test_text_that_changes_meanwhile_is_noticed(folder, monkeypatch):
  known = pipeline.content

  def changes(corpus, source):
    found = known(corpus, source)
    pathlib.Path('text/07.txt').write_text('changed')
    return found

  monkeypatch.setattr(pipeline, 'content', changes)
  with pytest.raises(ValueError, match=r'text/06\.txt or one after it changed while it was being prepared'):
    prepare(corpus(), 'cache')
  assert os.listdir('cache') == []


def test_a_document_too_long_is_never_read_whole(folder, monkeypatch):
  with open('text/long.txt', 'wb') as file:
    file.truncate(1 << 40)  # a terabyte of nothing: reading it would end this process
  with pytest.raises(ValueError, match=r'text/long\.txt: longer than longest=50000000 bytes'):
    prepare(corpus(), 'cache')
  assert prepare(dataclasses.replace(corpus(), on_error='skip'), 'cache').train.documents


def test_a_cache_that_cannot_be_written_is_one_error_that_names_it(folder):
  (folder / 'file').write_text('in the way')
  with pytest.raises(OSError, match=r'cannot write file/cache/\w+\.partial: Not a directory; .*LMLIB_CACHE'):
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
