"""What a finished run is good for: generating and evaluating, as the closing summary says."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from lmlib.data import index, pipeline, prepare
from lmlib.train.spikes import Events
from tests.experiments.conftest import ROOT


def run(environment, experiment: str, **macros) -> str:
  bindings = [f'--gin_bindings={name} = {value!r}' for name, value in macros.items()]
  done = subprocess.run([sys.executable, ROOT / f'experiments/{experiment}.py', f'--gin_file={experiment}.gin',
                         *bindings], text=True, capture_output=True, env=environment, check=False)
  assert (done.returncode, done.stderr) == (0, '')
  return done.stdout


def test_generate_continues_each_prompt(finished, environment):
  prompts = ('ab', 'cd')
  out = run(environment, 'generate', WORKDIR=str(finished.workdir), PROMPTS=prompts, NEW=5)
  assert out.startswith(f'{finished.workdir}\n')
  for prompt in prompts:
    assert f"---- {prompt!r} is continued\n{prompt}" in out


def test_evaluate_scores_the_held_out_documents_as_the_report_did(finished, environment, texts, tmp_path):
  manifest = json.loads((finished.workdir / 'manifest.json').read_text())
  report = json.loads((finished.workdir / 'report' / 'summary.json').read_text())
  names = sorted(str(path) for path in texts.iterdir())
  out = index.held_out(np.array([pipeline.rank(name) for name in names], np.uint64), prepare.Corpus.held_out)
  (tmp_path / 'held_out').mkdir()
  for name in np.array(names)[out]:
    shutil.copy(name, tmp_path / 'held_out')
  held_out = next(row for row in manifest['data'] if row['part'] == 'held out')
  assert held_out['bytes'] == sum(path.stat().st_size for path in (tmp_path / 'held_out').iterdir())
  out = run(environment, 'evaluate', WORKDIR=str(finished.workdir), GLOB=f'{tmp_path}/held_out/*')
  assert json.loads(out.splitlines()[-1])['perplexity']['bits_per_byte']['run'] == pytest.approx(
      report['bits_per_byte'], rel=1e-5)
  evaluated = json.loads((finished.workdir / 'report' / 'evaluation.json').read_text())
  found = evaluated['results'][0]['models']['run']
  assert found['score'] == pytest.approx(report['bits_per_byte'], rel=1e-5)
  assert found['compressors_bits_per_byte'] == report['compressors_bits_per_byte']


def test_explain_shows_a_row_of_the_run(finished, environment):
  out = run(environment, 'explain', WORKDIR=str(finished.workdir), STEP=2, ROW=1)
  assert out.startswith('row 1 of step 2 is row ')
  assert '\x1b' not in out, 'no colours where there is no terminal'


def test_explain_shows_the_batch_that_a_step_read(finished, environment, tmp_path):
  """Step 2 of a run that left its second batch out read the third."""
  shutil.copytree(finished.workdir, tmp_path / 'run')
  before = run(environment, 'explain', WORKDIR=str(tmp_path / 'run'), STEP=3, ROW=1)
  Events(tmp_path / 'run').write({'step': 2, 'batch': 1, 'left_out': [1], 'rollback': 1})
  after = run(environment, 'explain', WORKDIR=str(tmp_path / 'run'), STEP=2, ROW=1)
  assert after.replace('step 2', 'step 3') == before


def test_explain_refuses_other_data_than_the_run_had(finished, environment, tmp_path):
  shutil.copytree(finished.workdir, tmp_path / 'run')
  manifest = tmp_path / 'run' / 'manifest.json'
  facts = json.loads(manifest.read_text())
  facts['identity']['data'] = 'of before'
  manifest.write_text(json.dumps(facts))
  done = subprocess.run([sys.executable, ROOT / 'experiments/explain.py', '--gin_file=explain.gin',
                         f'--gin_bindings=WORKDIR = "{tmp_path}/run"'], text=True, capture_output=True, env=environment)
  assert done.returncode == 2
  assert 'was trained on other data than its source gives now: there of before, here' in done.stderr


@pytest.mark.parametrize(('experiment', 'said'), [
    ('explain', 'holds no run: there is no {0}/config.gin'),
    ('generate', 'is no model: neither a folder with config.json or config.gin, nor a file named *.gguf')])
def test_a_folder_without_a_run_is_named(environment, tmp_path, experiment, said):
  done = subprocess.run([sys.executable, ROOT / f'experiments/{experiment}.py', f'--gin_file={experiment}.gin',
                         f'--gin_bindings=WORKDIR = "{tmp_path}"'], text=True, capture_output=True, env=environment)
  assert done.returncode == 2
  assert done.stderr.startswith(f"WORKDIR '{tmp_path}' {said.format(tmp_path)}")
  assert done.stderr.count('\n') == 1
