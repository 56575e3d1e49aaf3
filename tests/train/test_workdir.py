"""A folder belongs to one run, and to one process at a time."""
import dataclasses
import fcntl
import json

import pytest

from lmlib.train.workdir import Workdir, flat


@dataclasses.dataclass(frozen=True)
class Schedule:
  peak: float = 0.1


@dataclasses.dataclass(frozen=True)
class Model:
  width: int = 8
  scan: bool = True
  schedule: Schedule = Schedule()


def begin(path, need=0, **identity):
  with Workdir(str(path)) as run:
    run.check(identity)
    run.begin(manifest={'parameters': 7}, files={'config.gin': b'A = 1\n'}, need=need)


def test_an_identity_is_flat_and_names_classes():
  assert flat({'model': Model(), 'seed': 0}) == {
      'model': 'test_workdir.Model', 'model.width': 8, 'model.scan': True,
      'model.schedule': 'test_workdir.Schedule', 'model.schedule.peak': 0.1, 'seed': 0}


def test_several_parts_of_one_kind_are_named_by_number():
  assert flat({'parts': (Schedule(), Schedule(0.2)), 'sizes': (1, 2)}) == {
      'parts': 2, 'parts.0': 'test_workdir.Schedule', 'parts.0.peak': 0.1, 'parts.1': 'test_workdir.Schedule',
      'parts.1.peak': 0.2, 'sizes': (1, 2)}


def test_the_manifest_says_what_ran(tmp_path):
  begin(tmp_path / 'a' / 'run', model=Model(), seed=3)
  manifest = json.loads((tmp_path / 'a' / 'run' / 'manifest.json').read_text())
  assert manifest['identity']['model.width'] == 8
  assert manifest['parameters'] == 7
  assert manifest['versions']['jax']
  assert manifest['python']
  assert (tmp_path / 'a' / 'run' / 'config.gin').read_text() == 'A = 1\n'


def test_another_run_is_refused_with_both_values(tmp_path):
  begin(tmp_path, model=Model(), seed=3)
  before = (tmp_path / 'manifest.json').read_bytes()
  with Workdir(str(tmp_path)) as run:
    with pytest.raises(ValueError, match=r'holds another run \(model.schedule.peak: there 0.1, here 0.2\)'):
      run.check({'model': Model(schedule=Schedule(0.2))})
    with pytest.raises(ValueError, match='seed: there 3, here 4'):
      run.check({'seed': 4})
    with pytest.raises(ValueError, match="optimizer: there None, here 'adamw'"):
      run.check({'optimizer': 'adamw'})
  assert (tmp_path / 'manifest.json').read_bytes() == before


def test_how_it_computes_may_change_and_what_is_not_named_is_not_compared(tmp_path):
  begin(tmp_path, model=Model(), seed=3)
  with Workdir(str(tmp_path)) as run:
    run.check({'model': Model(scan=False)})


def test_only_one_process_at_a_time(tmp_path):
  with Workdir(str(tmp_path)), pytest.raises(ValueError, match='in use by another process'):
    Workdir(str(tmp_path))
  with Workdir(str(tmp_path)):
    pass


def test_a_lock_whose_file_was_removed_is_no_lock(tmp_path, monkeypatch):
  flock, calls = fcntl.flock, []

  def late(file, how):
    if not calls:  # the one who had it ends, and removes the file, after we opened it
      (tmp_path / 'lock').unlink()
    calls.append(how)
    flock(file, how)

  monkeypatch.setattr(fcntl, 'flock', late)
  with Workdir(str(tmp_path)):
    assert len(calls) == 2
    with pytest.raises(ValueError, match='in use by another process'):
      Workdir(str(tmp_path))


def test_a_run_that_never_began_leaves_nothing(tmp_path):
  with pytest.raises(RuntimeError), Workdir(str(tmp_path / 'run')):
    raise RuntimeError
  assert not (tmp_path / 'run').exists()
  (tmp_path / 'notes.txt').write_text('mine')
  with Workdir(str(tmp_path)):
    pass
  assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']


def test_only_the_space_of_checkpoints_that_are_not_there_is_asked_for(tmp_path, monkeypatch):
  monkeypatch.setattr('shutil.disk_usage', lambda path: type('Usage', (), {'free': 1_000_000}))
  with pytest.raises(ValueError, match=r'has 1\.0 MB free, .* need 1\.5 MB'):
    begin(tmp_path, need=1_500_000)
  assert not (tmp_path / 'manifest.json').exists()
  for name in ('7', '9.damaged'):
    (tmp_path / 'checkpoints' / name / 'd').mkdir(parents=True)
    (tmp_path / 'checkpoints' / name / 'd' / 'data').write_bytes(bytes(600_000))
  begin(tmp_path, need=1_500_000)
  with pytest.raises(ValueError, match=r'need 1\.4 MB'):
    begin(tmp_path, need=2_000_000)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
  begin(tmp_path, seed=3)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('os.fsync', full)
  with pytest.raises(OSError, match='No space left on device') as error:
    begin(tmp_path, seed=3)
  assert error.value.filename == str(tmp_path / 'config.gin')
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
