"""evaluate.py as a user has it: several models side by side, killed and run again, and what is wrong in one line."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from experiments import evaluate, pretrain
from lmlib import cli
from tests.experiments.conftest import ROOT

QUESTIONS = '''\
evaluations.MultipleChoice:
  folder = '{folder}/mmlu'
  style = @multiple_choice.Style()
  batch = 4
multiple_choice.Style:
  template = @prompting.Template()
  shots = 0
prompting.Template.name = '{folder}/short.jinja'
evaluations.Written:
  source = @written.QuestionFile()
  metrics = ('f1', 'chrf')
  new = 4
written.QuestionFile.path = '{folder}/questions.jsonl'
'''
GIN = '''
from __gin__ import dynamic_registration
from experiments import evaluate
from lmlib.data import sources
from lmlib.eval import evaluations
from lmlib.eval import multiple_choice
from lmlib.eval import prompting
from lmlib.eval import written

evaluate.main:
  workdir = '{workdir}'
  out = '{folder}/report'
  evaluations = (@evaluations.MultipleChoice(), @evaluations.Written(), @evaluations.Perplexity())
''' + QUESTIONS + '''evaluations.Perplexity:
  source = @sources.TextFiles()
  limit = 3
  batch = 1
sources.TextFiles.glob = '{texts}/*.txt'
'''


@pytest.fixture
def started(finished, environment, texts, tmp_path):
  """A function that starts evaluate.py on the finished run, with bindings."""
  run = tmp_path / 'run'
  run.mkdir()
  for name in ('config.gin', 'tokenizer.model'):
    shutil.copy(finished.workdir / name, run)
  (run / 'checkpoints').symlink_to(finished.workdir / 'checkpoints')
  (tmp_path / 'mmlu' / 'test').mkdir(parents=True)
  for subject in ('art', 'law'):
    (tmp_path / 'mmlu' / 'test' / f'{subject}_test.csv').write_text('q,a,b,c,d,A\nr,a,b,c,d,C\n')
  (tmp_path / 'questions.jsonl').write_text('{"question": "q", "answer": "a"}\n{"question": "r", "answer": "b"}\n')
  (tmp_path / 'evaluate.gin').write_text(GIN.format(workdir=run, folder=tmp_path, texts=texts))
  (tmp_path / 'short.jinja').write_text('{{ question.text }}')  # MMLU's own is longer than this model reads

  def start(*bindings):
    return subprocess.Popen([sys.executable, '-u', ROOT / 'experiments/evaluate.py',
                             f'--gin_file={tmp_path}/evaluate.gin',
                             *(f'--gin_bindings={one}' for one in bindings)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=environment)

  return start


def finish(process) -> str:
  out, err = process.communicate(timeout=300)
  assert (process.returncode, err) == (0, ''), (out, err)
  return out


def test_killed_and_run_again_it_goes_on_and_reports_the_same(started, tmp_path):
  kept = tmp_path / 'run' / 'evaluation' / 'answers.jsonl'
  process = started()
  while not (kept.exists() and kept.stat().st_size):
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  had = kept.read_bytes().count(b'\n')
  with open(kept, 'ab') as file:
    file.write(b'{"key": "torn')
  assert not (tmp_path / 'report').exists()
  out = finish(started())
  known = [int(line.split(' known from before')[0].split()[-1]) for line in out.splitlines() if ' known from ' in line]
  assert sum(known) >= had > 0
  total = 4 * 4 + 2 + 3
  assert kept.read_bytes().count(b'\n') <= total
  report = json.loads((tmp_path / 'report' / 'evaluation.json').read_text())
  assert [(row['task'], row['metric'], row['questions']) for row in report['results']] == [
      ('multiple_choice', 'accuracy', 4), ('written', 'f1', 2), ('written', 'chrf', 0),
      ('perplexity', 'bits_per_byte', 3), ('perplexity', 'bits_per_character', 3)]
  assert report['models']['run']['step'] == 60
  assert (tmp_path / 'report' / 'multiple_choice_accuracy.png').exists()
  assert (tmp_path / 'report' / 'multiple_choice_reliability.png').exists()
  assert '| multiple_choice | accuracy, higher is better | 4 |' in (tmp_path / 'report' / 'evaluation.md').read_text()
  last = json.loads(out.splitlines()[-1])
  assert last['perplexity']['bits_per_byte']['run'] == pytest.approx(report['results'][3]['models']['run']['score'])


def test_models_stand_side_by_side_and_share_no_answers(started, tmp_path):
  shutil.copytree(tmp_path / 'run', tmp_path / 'other', symlinks=True)
  out = finish(started(f"evaluate.main.beside = ('{tmp_path}/other',)"))
  assert '| task | metric | n | run | other |' in out
  report = json.loads((tmp_path / 'report' / 'evaluation.json').read_text())
  for row in report['results'][:2]:
    one, other = row['models'].values()
    assert other['score'] == one['score']
    assert (other['difference'], other['p']) == (0, 1)
  assert (tmp_path / 'other' / 'evaluation' / 'answers.jsonl').exists()


@pytest.mark.parametrize(('binding', 'said'), [
    ('multiple_choice.Style.shots = 5', "no questions of split='dev'"),
    ("evaluations.MultipleChoice.folder = '/nowhere'", "/nowhere has no questions of split='test'"),
    ("evaluate.main.beside = ('{run}',)", 'a model stands beside itself'),
    ("evaluate.main.beside = ('{run}/x',)", "WORKDIR '{run}/x' holds no run"),
    ('evaluations.MultipleChoice.splits = 5', 'did you mean "split"')])
def test_what_is_wrong_is_said_before_a_model_is_loaded(started, tmp_path, monkeypatch, binding, said):
  monkeypatch.setattr(evaluate, 'restore_params', None)
  binding, said = (text.replace('{run}', f'{tmp_path}/run') for text in (binding, said))
  with pytest.raises(ValueError, match=re.escape(said)):
    evaluate.main(**cli.arguments(evaluate.main, [str(tmp_path / 'evaluate.gin')], [binding]))


def test_as_a_process_it_is_one_line_and_status_2_and_nothing_is_written(started, tmp_path):
  process = started("written.QuestionFile.path = 'gone.jsonl'")
  _, err = process.communicate(timeout=300)
  assert (process.returncode, err) == (2, "there is no file 'gone.jsonl'\n")
  assert not (tmp_path / 'report').exists()


EVALUATED = '''
from __gin__ import dynamic_registration
from experiments import pretrain
from lmlib.data import sources
from lmlib.eval import evaluations

pretrain.main:
  evaluations = (@evaluations.Perplexity(),)
  evaluate_every = 25
evaluations.Perplexity:
  source = @scored/sources.TextFiles()
  limit = 2
  compressors = False
scored/sources.TextFiles.glob = '{texts}/*.txt'
'''


def test_evaluations_inside_training_change_nothing_but_are_there(command, finished, texts, tmp_path):
  (tmp_path / 'more.gin').write_text(EVALUATED.format(texts=texts))
  status, out, err = command.run(words=[f'--gin_file={tmp_path}/more.gin'])
  assert (status, err) == (0, '')
  assert [line['loss'] for line in command.metrics] == [line['loss'] for line in finished.metrics]
  lines = [json.loads(line) for line in (command.workdir / 'evaluations.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [25, 50, 60]
  scores = [line['scores']['perplexity/bits_per_byte'] for line in lines]
  assert scores == sorted(scores, reverse=True), 'it learns'
  assert 'step 50  perplexity/bits_per_byte ' in out


def test_evaluations_without_a_number_of_steps_are_refused(command, texts, tmp_path):
  (tmp_path / 'more.gin').write_text(EVALUATED.format(texts=texts))
  values = cli.arguments(pretrain.main, [str(command.gin), str(tmp_path / 'more.gin')],
                         ['BATCH = 8', 'pretrain.main.evaluate_every = None'])
  with pytest.raises(ValueError, match='evaluate_every=None and 1 evaluations: both or neither'):
    pretrain.main(**values)
