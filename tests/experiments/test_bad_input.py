"""What a user can get wrong: one line names the setting, before any work, and nothing saved is harmed."""
import os
import pathlib
import shutil

import pytest

from experiments import pretrain
from lmlib import cli
from lmlib.data.tokenizer import SentencePiece
from lmlib.train.workdir import Workdir
from tests.experiments.conftest import ROOT, Command


@pytest.fixture
def attempt(command, monkeypatch):
  """main() of a configuration, in this process and its eight devices; the tokenizer must not be trained."""
  monkeypatch.setenv('LMLIB_CACHE', str(command.workdir.parent / 'cache'))
  monkeypatch.chdir(ROOT)

  def refused(*_):
    raise AssertionError('work has begun')

  monkeypatch.setattr(SentencePiece, 'train', refused)
  return lambda *bindings: pretrain.main(**cli.arguments(pretrain.main, [str(command.gin)], bindings))


EARLY = {
    'macro': (['STEPZ = 9'], 'STEPZ', 'did you mean "STEPS"'),
    'field': (['dense.Config.widht = 9'], 'dense.Config', 'widht', 'did you mean "width"'),
    'type': (["STEPS = 'many'"], "STEPS='many'", 'int'),
    'required': (['GLOB = %gin.REQUIRED'], 'GLOB', 'required'),
    'config': (['dense.Config.heads = 3'], 'heads=3', 'kv_heads=2'),
    'steps': (['STEPS = 0'], 'steps=0'),
    'save_every': (['BATCH = 8', 'pretrain.main.save_every = 0'], 'save_every=0'),
    'seed': (['BATCH = 8', f'SEED = {2**32}'], f'seed={2**32}', f'{2**32 - 1}'),
    'keep': (['BATCH = 8', 'pretrain.main.keep = 0'], 'keep=0'),
    'batch': ([], 'batch=4', '8 devices', 'data x fsdp'),
    'microbatches': (['BATCH = 16', 'pretrain.main.microbatches = 4'], 'batch=16', 'microbatches=4', '8 dev'),
    'mesh': (['sharding.Layout.data = 16'], 'data=16', '16 devices', 'there are 8'),
    'length': (['BATCH = 8', 'pretrain.main.length = 64'], 'length=64', 'length=32'),
    'vocab': (['BATCH = 8', 'dense.Config.vocab = 512'], 'vocab=512', 'pieces=300'),
    'warmup': (['BATCH = 8', 'STEPS = 4'], 'warmup=5', 'steps=4'),
    'glob': (['BATCH = 8', "GLOB = '/nowhere/*.txt'"], 'TextFiles.glob', "'/nowhere/*.txt'", 'no file'),
    'proc': (['BATCH = 8', "WORKDIR = '/proc/run'"], "WORKDIR '/proc/run'", 'cannot be written'),
    'url': (['BATCH = 8', "WORKDIR = 'gs://bucket/run'"], "WORKDIR 'gs://bucket/run'", 'URL'),
}


@pytest.mark.parametrize(('bindings', 'parts'), [(b, parts) for b, *parts in EARLY.values()], ids=EARLY)
def test_what_the_configuration_gets_wrong(attempt, command, bindings, parts):
  with pytest.raises(ValueError) as error:  # noqa: PT011, the parts are looked for below
    attempt(*bindings)
  line = str(error.value)
  assert all(part in line for part in parts), line
  assert '\n' not in line
  assert not command.workdir.exists()


@pytest.mark.parametrize(('content', 'reason'), [
    (b'', 'empty file'), (b'PK\0\1', 'binary file'), ('fünf'.encode('latin-1'), 'not UTF-8 at byte 1')],
    ids=['empty', 'binary', 'latin-1'])
def test_a_file_that_is_no_text_is_named(attempt, command, tmp_path, content, reason):
  (tmp_path / 'good.txt').write_text('text')
  (tmp_path / 'odd.txt').write_bytes(content)
  with pytest.raises(ValueError, match=f'odd.txt: {reason}'):
    attempt('BATCH = 8', f"GLOB = '{tmp_path}/*.txt'")
  assert not command.workdir.exists()


@pytest.mark.parametrize('below', ['', '/run'], ids=['a file', 'under a file'])
def test_a_workdir_that_is_a_file(attempt, tmp_path, below):
  file = tmp_path / 'file'
  file.write_text('precious')
  with pytest.raises(ValueError, match=f"^WORKDIR '{file}{below}' (is a file|cannot be written: Not a dir)"):
    attempt('BATCH = 8', f"WORKDIR = '{file}{below}'")
  assert file.read_text() == 'precious'


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_workdir_that_is_read_only(attempt, tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(ValueError, match=r'^WORKDIR .* cannot be written: Permission denied'):
    attempt('BATCH = 8')
  tmp_path.chmod(0o700)


def contents(folder: pathlib.Path) -> dict:
  return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


OTHERS = {
    'model': ({'width = 16': 'width = 24'}, 'model.width: there 16, here 24'),
    'optimizer': ({'adamw': 'lion', 'AdamW': 'Lion'}, "optimizer: there 'adamw.AdamW', here 'lion.Lion'"),
    'peak': ({'0.003': '0.01'}, 'optimizer.schedule.peak: there 0.003, here 0.01'),
    'batch': ({'BATCH = 4': 'BATCH = 16'}, 'batch: there 4, here 16'),
    'seed': ({'BATCH = 4': 'BATCH = 4\nSEED = 1'}, 'seed: there 0, here 1'),
    'vocabulary': ({'= 300': '= 310'}, 'model.vocab: there 300, here 310'),
}


@pytest.mark.parametrize(('changes', 'shown'), OTHERS.values(), ids=OTHERS)
def test_another_run_is_refused_before_work_and_left_alone(attempt, command, finished, changes, shown):
  before, text = contents(finished.workdir), command.gin.read_text()
  for old, new in changes.items():
    assert old in text
    text = text.replace(old, new)
  command.gin.write_text(text)
  with pytest.raises(ValueError, match='holds another run') as error:
    attempt(f"WORKDIR = '{finished.workdir}'", 'sharding.Layout.data = 4', 'sharding.Layout.tensor = 2')
  assert shown in str(error.value)
  assert str(finished.workdir) in str(error.value)
  assert contents(finished.workdir) == before


def test_a_workdir_of_other_data_is_refused_and_left_alone(finished, tmp_path, texts, environment):
  for path in texts.iterdir():
    (tmp_path / path.name).write_text(path.read_text() + ' and more')
  before = contents(finished.workdir)
  other = Command(tmp_path, tmp_path, environment)
  status, _, err = other.run(f"WORKDIR = '{finished.workdir}'")
  assert status == 2
  assert err.startswith(f"WORKDIR '{finished.workdir}' holds another run (data: there '")
  assert err.count('\n') == 1
  assert contents(finished.workdir) == before


def test_a_damaged_manifest_is_named(attempt, command):
  command.workdir.mkdir()
  (command.workdir / 'manifest.json').write_text('{"iden')
  with pytest.raises(ValueError, match=r'manifest\.json is damaged'):
    attempt('BATCH = 8')


def test_a_prompt_longer_than_the_model_is_refused_before_training(attempt, command, monkeypatch):
  monkeypatch.undo()
  monkeypatch.setenv('LMLIB_CACHE', command.environment['LMLIB_CACHE'])
  with pytest.raises(ValueError, match=r"prompts: the longest has \d+ tokens, .* the model's length=32"):
    attempt('BATCH = 8', f"pretrain.main.prompts = ('a', '{'ab' * 40}')")
  assert not (command.workdir / 'checkpoints').exists()


@pytest.mark.parametrize(('words', 'parts'), [
    (['--gin_fil=x'], ['--gin_fil', 'did you mean "gin_file"']),
    (['--gin_file=quikstart.gin'], ["'quikstart.gin'", 'did you mean "quickstart.gin"']),
    (["--gin_bindings=WORKDIR = '/proc/run'"], ["WORKDIR '/proc/run' cannot be written"])],
    ids=['flag', 'file', 'workdir'])
def test_as_a_process_it_is_one_line_and_status_2(command, words, parts):
  status, out, err = command.run(words=words)
  assert (status, out) == (2, '')
  assert err.count('\n') == 1
  assert all(part in err for part in parts), err


def test_two_processes_cannot_share_a_workdir(command):
  with Workdir(str(command.workdir)):
    status, out, err = command.run()
  assert (status, out) == (2, '')
  assert err == (f"WORKDIR '{command.workdir}' is in use by another process; wait for it or give another "
                 'WORKDIR\n')
  assert not command.workdir.exists()


def test_a_disk_that_is_full_while_data_are_prepared(command, tmp_path):
  cache = tmp_path / 'cache'
  command.environment = command.environment | {'LMLIB_CACHE': str(cache)}
  status, _, err = command.run(longest_file=20_000)
  assert status == 1
  assert err.startswith(f'cannot write {cache}/')
  assert 'File too large' in err
  assert '$LMLIB_CACHE' in err
  assert err.count('\n') == 1
  assert not list(cache.iterdir())
  assert not command.workdir.exists()


def test_a_disk_that_is_full_at_a_checkpoint_and_the_one_before_is_whole(command, finished):
  shutil.copytree(finished.workdir, command.workdir)
  shutil.rmtree(command.workdir / 'checkpoints' / '60')  # as if it had been killed at step 57
  before = contents(command.workdir / 'checkpoints')
  longest = (command.workdir / 'metrics.jsonl').stat().st_size + 1_000
  assert longest < max(map(len, before.values()))
  status, _, err = command.run(longest_file=longest)
  assert status == 1
  assert err.startswith(f'checkpoint of step 60 could not be written to {command.workdir}/checkpoints/60: ')
  assert err.endswith('the last good one is of step 56\n')
  assert err.count('\n') == 1
  assert contents(command.workdir / 'checkpoints') == before
  status, out, err = command.run()  # with room again, the same command goes on
  assert (status, err) == (0, '')
  assert 'going on after step 56 of 60' in out


def test_a_disk_that_is_full_at_a_line_of_metrics_and_what_was_saved_is_whole(command, finished):
  few = 'pretrain.main.save_every = 1000'
  for name in ('manifest.json', 'tokenizer.model'):
    assert (finished.workdir / name).stat().st_size < 9_000
  status, _, err = command.run(few, longest_file=9_000)
  assert (status, err) == (1, f'{command.workdir}/metrics.jsonl: File too large\n')
  assert 0 < command.last_step() < 60
  status, _, err = command.run(few)  # with room again, the same command goes on
  assert (status, err) == (0, '')
  assert [line['loss'] for line in command.metrics] == [line['loss'] for line in finished.metrics]


def test_too_little_space_for_the_checkpoints_is_known_before_training(command, monkeypatch):
  monkeypatch.setattr('shutil.disk_usage', lambda _: type('Usage', (), {'free': 90_000}))
  with Workdir(str(command.workdir)) as run, pytest.raises(ValueError, match=r'0\.1 MB free.* need 0\.3 MB'):
    run.begin(manifest={}, files={}, need=300_000)
