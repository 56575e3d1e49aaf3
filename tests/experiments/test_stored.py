"""Preparing by one command and training from what it has written by another."""
import subprocess
import sys

from tests.experiments.conftest import ROOT

PREPARE = '''
from __gin__ import dynamic_registration
import experiments.prepare
from lmlib.data import prepare
from lmlib.data import tokenizer

include 'runs/prepare.gin'
include 'data/text_files.gin'

PATH = '{path}'
GLOB = '{texts}/*.txt'
tokenizer.SentencePiece.pieces = 300
prepare.Corpus.on_error = 'skip'
'''


def test_training_from_a_prepared_store_is_training_from_the_cache(command, finished, texts, tmp_path, environment):
  path, gin = tmp_path / 'store', tmp_path / 'prepare.gin'
  gin.write_text(PREPARE.format(path=path, texts=texts))
  done = subprocess.run([sys.executable, str(ROOT / 'experiments/prepare.py'), f'--gin_file={gin}'], text=True,
                        capture_output=True, env=environment)
  assert (done.returncode, done.stderr) == (0, '')
  for part in ('train', 'held out', f'prepared    {path}', 'pretrain_stored.gin'):
    assert part in done.stdout
  text = command.gin.read_text()
  for old, new in (("include 'data/text_files.gin'", "include 'data/stored.gin'"),
                   (f"GLOB = '{texts}/*.txt'", f"PATH = '{path}'"), ('tokenizer.SentencePiece.pieces = 300', ''),
                   ('from lmlib.data import tokenizer', '')):
    assert old in text
    text = text.replace(old, new)
  command.gin.write_text(text)
  status, out, err = command.run()
  assert (status, err) == (0, ''), out
  assert [line['loss'] for line in command.metrics] == [line['loss'] for line in finished.metrics]


def test_what_is_not_prepared_is_one_line(command, tmp_path):
  text = command.gin.read_text().replace("include 'data/text_files.gin'", "include 'data/stored.gin'")
  lines = [line for line in text.splitlines() if 'GLOB' not in line and 'tokenizer' not in line]
  command.gin.write_text('\n'.join([*lines, f"PATH = '{tmp_path}/nowhere'"]))
  status, _, err = command.run()
  assert (status, err) == (2, f'{tmp_path}/nowhere/train is not a tokenised store: it has no manifest.json\n')
