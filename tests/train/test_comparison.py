"""Two runs are the same, or the first thing in which they differ is named."""
import json
import shutil

import pytest

from experiments import compare as verb
from lmlib.train import health
from lmlib.train.comparison import common, compare
from lmlib.train.spikes import Spikes
from lmlib.train.watch import Watch
from tests.train.courses import Rows, run

CONFIG = 'experiments.pretrain.main:\n  steps = 24\n  workdir = {0!r}\n\nlayout.Layout:\n  data = {1}\n'


def described(folder, *, data: int = -1, jax='1.0', rate: float = 0.01):
  """Writes what a run says of itself beside its numbers."""
  identity = {'optimizer.schedule.peak': rate, 'seed': 0, 'data': 'f00'}
  manifest = {'identity': identity, 'versions': {'jax': jax}, 'mesh': {'data': 1}}
  (folder / 'manifest.json').write_text(json.dumps(manifest))
  (folder / 'config.gin').write_text(CONFIG.format(str(folder), data))


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'one'
  run(folder, Rows())
  described(folder)
  return folder


def test_a_run_that_was_done_again_in_pieces_is_the_same(one, tmp_path, capsys):
  run(tmp_path / 'again', Rows(), steps=9)
  run(tmp_path / 'again', Rows())
  described(tmp_path / 'again')
  assert compare(one, tmp_path / 'again') == []
  verb.main(workdir=str(one), other=str(tmp_path / 'again'))
  assert capsys.readouterr().out == 'the same: 24 steps and the checkpoints of 2 steps that both have\n'


def test_other_data_are_told_by_step_and_by_the_first_tensor(one, tmp_path):
  run(tmp_path / 'other', Rows(gone=[6]))
  described(tmp_path / 'other')
  found = {row.text.split()[0]: row for row in compare(one, tmp_path / 'other')}
  assert all(row.matters for row in found.values())
  for name, first in (('data', 7), ('loss', 7), ('grad_norm', 7), ('param_norm', 8)):
    assert f'{name} differs first at step {first}: ' in found[name].text
    assert f'; at {25 - first} of 24 steps' in found[name].text
  assert found['of'].text.startswith('of step 20: ')
  assert 'tensors differ, first params/blocks_0/' in found['of'].text
  assert ': by ' in found['of'].text
  with pytest.raises(health.RunFault, match='differ in 5 things that matter, first: step data differs first at step 7'):
    verb.main(workdir=str(one), other=str(tmp_path / 'other'))


def test_settings_matter_and_versions_and_the_layout_do_not(one, tmp_path):
  shutil.copytree(one, tmp_path / 'other')
  described(tmp_path / 'other', data=4, jax='2.0', rate=0.02)
  assert [(str(row), row.matters) for row in compare(one, tmp_path / 'other')] == [
      ('setting     optimizer.schedule.peak: 0.01 and 0.02', True),
      ('setting     layout.Layout.data: -1 and 4', False), ('version     jax: 1.0 and 2.0', False)]
  described(tmp_path / 'other', data=4, jax='2.0')
  verb.main(workdir=str(one), other=str(tmp_path / 'other'))


def test_checkpoints_are_compared_where_both_have_them(one, tmp_path):
  shutil.copytree(one, tmp_path / 'other')
  shutil.rmtree(tmp_path / 'other' / 'checkpoints' / '20')
  run(tmp_path / 'third', Rows(gone=[22]))
  shutil.rmtree(tmp_path / 'other' / 'checkpoints' / '24')
  shutil.copytree(tmp_path / 'third' / 'checkpoints' / '24', tmp_path / 'other' / 'checkpoints' / '24')
  row, = compare(one, tmp_path / 'other')
  assert row.text.startswith('of step 24: ')
  assert common(one, tmp_path / 'other') == (24, [24])


def test_batches_left_out_are_told(one, tmp_path):
  run(tmp_path / 'other', Rows(poisoned=[16]), Watch(spikes=Spikes(window=6)))
  described(tmp_path / 'other')
  rows = compare(one, tmp_path / 'other')
  assert (rows[0].kind, rows[0].text) == ('batches', 'left out are none and 16')


@pytest.mark.parametrize(('text', 'message'), [(None, 'holds no run: there is no'), ('{"a', 'is damaged'),
                                               ('{"a": 1}', 'is damaged')])
def test_a_folder_without_a_run_is_named(one, tmp_path, text, message):
  if text is not None:
    (tmp_path / 'manifest.json').write_text(text)
  with pytest.raises(ValueError, match=message):
    compare(one, tmp_path)
