"""Preparing with one process or many, on Beam, after a kill: the same bytes; and what is refused."""
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from lmlib.data import cleaning, pipeline, preparation, store
from lmlib.data.beam import Beam
from lmlib.data.deduplication import ExactDuplicates
from lmlib.data.folder import Folder
from lmlib.data.prepare import Corpus, Stored, opened, prepare
from lmlib.data.quality import Length
from lmlib.data.sources import TextFiles
from lmlib.data.store import Store
from lmlib.data.tokenizer import Bytes, SentencePiece
from lmlib.data.workers import Local
from tests.data.conftest import sentence

ROOT = pathlib.Path(__file__).parents[2]
FEW = SentencePiece(pieces=330)


@pytest.fixture
def texts(tmp_path, monkeypatch):
  """100 files, some of them alike, some too short, and a .jsonl of Chinese."""
  monkeypatch.chdir(tmp_path)
  os.mkdir('text')
  for i in range(100):
    number = i // 2 if i % 10 == 1 else i
    text = 'short' if i % 17 == 3 else ''.join(sentence(number + k) for k in range(1 + number % 3))
    pathlib.Path(f'text/{i:03}.txt').write_text(text)
  draw = random.Random(0)
  lines = [json.dumps({'text': ''.join(draw.choices('天地玄黃宇宙洪荒', k=40))}, ensure_ascii=False) for _ in range(20)]
  pathlib.Path('zh.jsonl').write_text('\n'.join(lines) + '\n')
  return tmp_path


def corpus(**changes) -> Corpus:
  return Corpus(**{'source': (TextFiles('text/*.txt'), TextFiles('zh.jsonl', 'text')), 'tokenizer': Bytes(),
                   'held_out': 0.1, 'stages': (Length(least=3), ExactDuplicates()), **changes})


def files(folder) -> dict[str, bytes]:
  """Everything in a folder, by its path in it."""
  folder = pathlib.Path(folder)
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def made(path, engine=Local(1), **changes) -> dict[str, bytes]:
  preparation.write(corpus(**changes), path, engine=engine, say=lambda line: None)
  return files(path)


def test_any_number_of_workers_and_beam_give_the_same_bytes(texts):
  pytest.importorskip('apache_beam')
  one = made('one', tokenizer=FEW)
  assert made('two', Local(2), tokenizer=FEW) == one
  assert made('three', Local(3), tokenizer=FEW) == one
  assert made('beam', Beam(), tokenizer=FEW) == one
  assert sorted(path.name for path in pathlib.Path().glob('*.partial')) == []


def test_what_is_stored_is_what_was_read_cleaned(texts):
  made('here')
  prepared, manifest = opened('here', check=True), json.loads(pathlib.Path('here/manifest.json').read_text())
  stored = {name: part.text(i) for part in (prepared.train, prepared.held_out) for i, name in enumerate(part.names)}
  want, seen = {}, set()
  for source in corpus().sources:
    for document in source.documents():
      if isinstance(cleaning.clean(document.text, [Length(least=3)]), str) and document.text not in seen:
        want[document.name] = document.text
        seen.add(document.text)
  assert stored == want
  assert 60 < len(want) < 115
  assert [row['read'] for row in manifest['sources']] == [100, 20]
  assert sum(part['documents'] for part in manifest['parts'].values()) == len(want)
  dropped = {row['name']: sum(reason['documents'] for reason in row['dropped'].values())
             for row in manifest['stages']['stages']}
  assert sum(dropped.values()) == 120 - len(want)
  assert all(dropped.values())
  train = prepared.train
  assert [train.sources[i] for i in train.source_of(range(train.documents))] == [
      repr(corpus().sources['jsonl' in name]) for name in train.names]


def test_cuts_into_blocks_and_shards_change_nothing_that_is_read(texts, monkeypatch):
  made('whole')
  for name, value in (('BLOCK', 300), ('TASKS', 2)):
    monkeypatch.setattr(pipeline, name, value)
  monkeypatch.setattr(store, 'SHARD', 64)
  monkeypatch.setattr(store, 'CHUNK', 8)
  made('cut')
  for part in ('train', 'held_out'):
    whole, cut = Store(f'whole/{part}'), Store(f'cut/{part}')
    assert len(os.listdir(f'cut/{part}/tokens/c')) == -(-cut.tokens // 64)
    assert cut.read(0, cut.tokens).tolist() == whole.read(0, whole.tokens).tolist()
    for column in ('offsets', 'bytes', 'names', '_sources'):
      assert list(getattr(cut, column)) == list(getattr(whole, column)), column


def test_elsewhere_than_on_a_disk_it_is_the_same(texts):
  here = made('here')
  preparation.write(corpus(), 'memory://bucket/there', engine=Local(1), say=lambda line: None)
  there = Folder('memory://bucket/there')
  assert dict(zip(there.keys(), there.get_all(there.keys()))) == here
  assert Folder('memory://bucket/there.partial').keys() == []
  prepared = prepare(Stored('memory://bucket/there'))
  assert prepared.train.text(3) == opened('here').train.text(3)
  assert prepared.train.fingerprint == opened('here').train.fingerprint
  assert made(f'file://{texts}/url%20x') == {}  # the folder of that name has it
  assert files('url x') == here


def test_what_is_finished_is_left_and_other_settings_are_refused(texts, monkeypatch):
  here = made('here')
  with monkeypatch.context() as patch:
    patch.setattr(pipeline, 'read', None)
    assert made('here') == here
  for change, said in (({'held_out': 0.2}, r'there held_out = 0\.1; here held_out = 0\.2'),
                       ({'tokenizer': FEW}, r'tokenizer\.SentencePiece'),
                       ({'stages': ()}, 'stages')):
    with pytest.raises(ValueError, match=f'here holds other prepared data.*{said}'):
      made('here', **change)
  pathlib.Path('text/007.txt').write_text('a text of another length, which is long enough')
  with pytest.raises(ValueError, match='its source has changed'):
    made('here')
  os.mkdir('other')
  with pytest.raises(ValueError, match='other exists and holds no prepared data'):
    made('other')
  assert files('here') == here


def stopped_at(monkeypatch, step: str, number: int, error=KeyboardInterrupt):
  """Makes task `number` of a step fail; returns the list of tasks that are begun."""
  begun, function = [], getattr(pipeline, step)

  def failing(task):
    begun.append(task.key)
    if len(begun) == number:
      raise error
    return function(task)

  monkeypatch.setattr(pipeline, step, failing)
  return begun


@pytest.mark.parametrize('step', ['read', 'tokenize', 'arrange'])
def test_what_was_done_is_not_done_again(texts, monkeypatch, step):
  whole = made('whole')
  with monkeypatch.context() as patch:
    begun = stopped_at(patch, step, 4)
    with pytest.raises(KeyboardInterrupt):
      made('here')
  assert not pathlib.Path('here').exists()
  with pytest.raises(ValueError, match=r'here holds no prepared data, but here\.partial is unfinished'):
    opened('here')
  with pytest.raises(ValueError, match=r'here\.partial holds unfinished work of other settings .*0\.2.*remove it'):
    made('here', held_out=0.2)
  again = stopped_at(monkeypatch, step, 0)
  assert made('here') == whole
  assert begun[-1] in again
  assert not set(begun[:-1]) & set(again)
  assert not pathlib.Path('here.partial').exists()


def test_elsewhere_an_unfinished_store_is_none(texts, monkeypatch):
  with monkeypatch.context() as patch:
    stopped_at(patch, 'arrange', 9)
    with pytest.raises(KeyboardInterrupt):
      preparation.write(corpus(), 'memory://b/x', engine=Local(1))
  for path in ('memory://b/x', 'memory://b/x/train'):
    with pytest.raises(ValueError, match=r'holds no prepared data, but|it has no manifest'):
      (Store if path.endswith('train') else opened)(path)
  preparation.write(corpus(), 'memory://b/x', engine=Local(1))
  assert opened('memory://b/x', check=True).train.documents


def test_a_damaged_result_of_a_task_is_named(texts, monkeypatch):
  with monkeypatch.context() as patch:
    stopped_at(patch, 'arrange', 1)
    with pytest.raises(KeyboardInterrupt):
      made('here')
  file = pathlib.Path('here.partial/tokenize/0000003.00000.train.tokens')
  file.write_bytes(file.read_bytes()[:-30])
  with pytest.raises(ValueError, match=r'here\.partial/tokenize/0000003\S+ is damaged or missing: remove here\.'):
    made('here')


GIN = '''
from __gin__ import dynamic_registration
import experiments.prepare
from lmlib.data import prepare
from lmlib.data import sources
from lmlib.data import tokenizer

include 'runs/prepare.gin'

PATH = 'here'
DATA = @prepare.Corpus()
prepare.Corpus.source = @sources.TextFiles()
sources.TextFiles.glob = 'text/*.txt'
prepare.Corpus.tokenizer = @tokenizer.SentencePiece()
tokenizer.SentencePiece.pieces = 330
'''


def command(*bindings: str) -> subprocess.Popen:
  """`python experiments/prepare.py` in the current folder."""
  pathlib.Path('x.gin').write_text(GIN)
  return subprocess.Popen([sys.executable, str(ROOT / 'experiments/prepare.py'), '--gin_file=x.gin',
                           *(f'--gin_bindings={binding}' for binding in bindings)], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def alive(pid: int) -> bool:
  """Whether a process runs, not counting one that has ended and that nobody has asked after."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except OSError:
    return False


def test_killed_and_interrupted_the_same_command_goes_on(texts):
  for i in range(100, 1200):
    pathlib.Path(f'text/{i}.txt').write_text(''.join(sentence(i + k) for k in range(60)))
  process, done = command('workers.Local.processes = 2'), pathlib.Path('here.partial/read')
  while not done.is_dir() or len(os.listdir(done)) < 4:
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)
  children = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True)
  process.kill()
  process.communicate()
  tries = time.monotonic() + 20
  while any(map(alive, map(int, children.stdout.split()))):
    assert time.monotonic() < tries, 'workers outlive their parent'
    time.sleep(0.01)
  assert not pathlib.Path('here').exists()

  process = command('workers.Local.processes = 1')
  while not pathlib.Path('here.partial/tokenize').is_dir():
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)
  process.send_signal(signal.SIGSTOP)  # so that it cannot finish while it is looked at
  with pytest.raises(ValueError, match=rf'is being written by another process \(process {process.pid} on '):
    preparation.write(Corpus(TextFiles('text/*.txt'), FEW), 'here')
  process.send_signal(signal.SIGINT)
  process.send_signal(signal.SIGCONT)
  out, err = process.communicate()
  assert process.returncode == 75
  assert err == 'stopped; what is done lies in here.partial: run the same command again to go on\n'
  assert 'tasks were done before' in out

  process = command('workers.Local.processes = 1')
  out, err = process.communicate()
  assert (process.returncode, err) == (0, '')
  assert 'training a tokenizer' not in out
  preparation.write(Corpus(TextFiles('text/*.txt'), FEW), 'whole', engine=Local(1), say=lambda line: None)
  assert files('here') == files('whole')
  assert not pathlib.Path('here.partial').exists()


def test_a_disk_that_fills_is_one_error_and_with_room_it_goes_on(texts):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # longer files fail, as on a full disk
  try:
    with pytest.raises(OSError, match=r'^cannot write here\.partial: File too large$'):
      made('here')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  with pytest.raises(ValueError, match='unfinished'):
    opened('here')
  assert made('here') == made('whole')


@pytest.mark.parametrize('engine', [Local(1), Local(2), Beam()], ids=['here', 'workers', 'beam'])
def test_a_fault_of_the_input_is_one_line_whoever_finds_it(texts, engine):
  if isinstance(engine, Beam):
    pytest.importorskip('apache_beam')
  pathlib.Path('text/050.txt').write_bytes('fünf'.encode('latin-1'))
  with pytest.raises(ValueError, match=r'^text/050\.txt: not UTF-8 at byte 1'):
    made('here', engine)
  pathlib.Path('text/050.txt').write_text(sentence(50))
  pathlib.Path('here.partial/identity').unlink()  # what is there was read from other text: begin afresh
  subprocess.run(['rm', '-r', 'here.partial'], check=True)
  assert made('here', engine) == made('whole')


def spoil(kind: str) -> str:
  """Puts something in text/bad.* that cannot be read; returns what is said of it."""
  good = [json.dumps({'text': sentence(i)}) for i in range(1000, 1400)]
  path, said = pathlib.Path('text/bad.jsonl'), None
  if kind == 'gzip':
    import gzip
    path = pathlib.Path('text/bad.jsonl.gz')
    path.write_bytes(gzip.compress('\n'.join(good).encode())[:-400])
    return rf'{path}: damaged or truncated gzip file'
  if kind == 'long':
    path = pathlib.Path('text/bad.txt')
    path.write_text('x' * 3000)
    return rf'{path}: longer than longest=2000'
  bad, said = {'json': ('{"text": ', 'not JSON'), 'field': ('{"txt": "a"}', "no field 'text'"),
               'line': (json.dumps({'text': 'x' * 20_000}), 'too long for longest=2000'),
               'characters': (json.dumps({'text': '天' * 700}), 'longer than longest=2000'),
               'encoding': ('{"text": "fünf"}', 'not UTF-8')}[kind]
  path.write_bytes('\n'.join(good[:6]).encode() + b'\n' + bad.encode('latin-1' if kind == 'encoding' else 'utf-8')
                   + b'\n' + '\n'.join(good[6:]).encode())
  return rf'{path}(:|, line )7: .*{said}' if kind == 'field' else rf'{path}(:|, line )7: {said}'


@pytest.mark.parametrize('kind', ['gzip', 'long', 'json', 'field', 'line', 'characters', 'encoding'])
def test_what_cannot_be_read_is_refused_or_skipped_and_counted(texts, kind):
  said = spoil(kind)
  source = TextFiles('text/*', None if kind == 'long' else 'text')
  with pytest.raises(ValueError, match=said):
    made('refused', source=source, longest=2000)
  made('skipped', source=source, longest=2000, on_error='skip', stages=())
  manifest = json.loads(pathlib.Path('skipped/manifest.json').read_text())
  assert sum(manifest['unreadable'].values()) == 1
  [[where, _]] = manifest['unreadable_examples']
  assert where.startswith('text/bad')
  names = {name for part in ('train', 'held_out') for name in Store(f'skipped/{part}').names}
  read = {name for name in names if 'bad' in name}
  assert len(names - read) == 100
  assert len(read) == (0 if kind == 'long' else 400) or (kind == 'gzip' and 50 < len(read) < 400)
  assert 'text/bad.jsonl:7' not in read


def test_a_source_with_nothing_in_it_is_named(texts):
  pathlib.Path('empty.jsonl').write_text('{"text": ""}\n')
  sources = (TextFiles('text/*.txt'), TextFiles('empty.jsonl', 'text'))
  with pytest.raises(ValueError, match=r"TextFiles\(glob='empty\.jsonl'.* has no document: 0 were read"):
    made('here', source=sources, on_error='skip')
  with pytest.raises(ValueError, match=r"zh\.jsonl'.* has no document: 20 were read, none is left"):
    made('there', stages=(Length(least=30),), source=(TextFiles('text/*.txt'), TextFiles('zh.jsonl', 'text')))


def test_two_documents_of_one_name_are_refused(texts):
  with pytest.raises(ValueError, match=r'two documents are named text/000\.txt'):
    made('here', source=(TextFiles('text/*.txt'), TextFiles('text/000.txt')), stages=())


def test_a_store_of_another_tokenizer_is_noticed(texts):
  made('here')
  made('other', tokenizer=Bytes(('<mark>',)))
  assert Store('other/train').manifest['vocab'] == 260
  raw = pathlib.Path('other/train/tokenizer.model').read_bytes()
  pathlib.Path('here/train/tokenizer.model').write_bytes(raw)
  with pytest.raises(ValueError, match='here/train is damaged: its manifest says tokenizer='):
    opened('here')


def test_without_a_held_out_part_all_is_for_training(texts):
  made('here', held_out=None)
  prepared = opened('here')
  assert prepared.held_out is None
  assert [row['part'] for row in prepared.rows] == ['train']


def test_settings_are_checked():
  for change, said in (({'on_error': 'ignore'}, "on_error='ignore'"), ({'longest': 0}, 'longest=0'),
                       ({'source': ()}, r'source=\(\)'),
                       ({'stages': (ExactDuplicates(), Length(least=1))}, 'put it last')):
    with pytest.raises(ValueError, match=said):
      Corpus(**change)
  with pytest.raises(ValueError, match='processes=0'):
    Local(0)
