"""A tiny run as a user has it: files, a gin file, a process."""
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
GIN = '''
from __gin__ import dynamic_registration
from experiments import pretrain
from lmlib.data import tokenizer
from lmlib.models import dense
from lmlib.optim import adamw
from lmlib.optim import schedules

include 'runs/pretrain.gin'
include 'models/dense_3m.gin'
include 'meshes/data.gin'
include 'data/text_files.gin'

STEPS = 60
BATCH = 4
GLOB = '{texts}/*.txt'
WORKDIR = '{workdir}'
pretrain.main.save_every = 7
pretrain.main.prompts = ()
tokenizer.SentencePiece.pieces = 300
dense.Config:
  vocab = 300
  layers = 1
  width = 16
  hidden = 32
  heads = 2
  kv_heads = 2
  head_width = 8
  length = 32
OPTIMIZER = @adamw.AdamW()
adamw.AdamW.schedule = @schedules.Cosine()
schedules.Cosine:
  peak = 0.003
  warmup = 5
'''

LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture(scope='session')
def texts(tmp_path_factory) -> pathlib.Path:
  """A folder of twelve text files."""
  folder, draw = tmp_path_factory.mktemp('texts'), random.Random(0)
  words = [''.join(draw.choices('abcdefghijklmnop', k=draw.randint(2, 7))) for _ in range(300)]
  for i in range(12):
    lines = [' '.join(draw.choices(words, k=10)) for _ in range(60)]
    (folder / f'{i}.txt').write_text('\n'.join(lines))
  return folder


@pytest.fixture(scope='session')
def environment(tmp_path_factory) -> dict:
  """Of a process as a user starts it, but with caches of these tests, and compiled quickly as all tests are."""
  ours = {'XLA_FLAGS', 'PJRT_NPROC'}
  return {name: value for name, value in os.environ.items() if name not in ours} | {
      'PYTHONPATH': str(ROOT), 'LMLIB_CACHE': str(tmp_path_factory.mktemp('data')), 'JAX_PLATFORMS': 'cpu'}


class Command:
  """`python experiments/pretrain.py` with a tiny configuration that writes to `workdir`."""

  def __init__(self, folder: pathlib.Path, texts: pathlib.Path, environment: dict):
    self.workdir, self.gin, self.environment = folder / 'run', folder / 'tiny.gin', environment
    self.gin.write_text(GIN.format(texts=texts, workdir=self.workdir))

  def start(self, *bindings: str, words=(), longest_file: int | None = None) -> subprocess.Popen:
    """words: further arguments; longest_file: bytes after which each file is a full disk."""
    limited = [] if longest_file is None else [sys.executable, '-c', LIMITED, str(longest_file)]
    script = [sys.executable, '-u', str(ROOT / 'experiments/pretrain.py'), f'--gin_file={self.gin}']
    given = [f'--gin_bindings={binding}' for binding in bindings]
    return subprocess.Popen([*limited, *script, *given, *words], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=self.environment)

  def run(self, *bindings: str, **options) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)"""
    process = self.start(*bindings, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err

  @property
  def metrics(self) -> list[dict]:
    return [json.loads(line) for line in (self.workdir / 'metrics.jsonl').read_text().splitlines()]

  def last_step(self) -> int:
    """The step of the last whole line of metrics.jsonl, 0 if there is none."""
    try:
      *lines, _ = (self.workdir / 'metrics.jsonl').read_bytes().split(b'\n')
    except FileNotFoundError:
      return 0
    return json.loads(lines[-1])['step'] if lines else 0

  def checkpoints(self) -> list[int]:
    folder = self.workdir / 'checkpoints'
    return sorted(int(path.name) for path in folder.glob('*') if path.name.isdecimal())


def begun(process: subprocess.Popen) -> int:
  """Waits until the run has said what it will do; returns the step it goes on from."""
  for line in process.stdout:
    if line.startswith('workdir'):
      words = line.split()
      return int(words[words.index('step') + 1]) if 'step' in words else 0
  raise AssertionError(process.communicate())


def until(fact, process: subprocess.Popen):
  """Waits for fact() while the process lives."""
  while not fact():
    assert process.poll() is None, process.communicate()
    time.sleep(0.001)


@pytest.fixture(scope='session')
def finished(tmp_path_factory, texts, environment) -> Command:
  """A run that went from beginning to end, in one piece."""
  command = Command(tmp_path_factory.mktemp('finished'), texts, environment)
  status, out, err = command.run("pretrain.main.prompts = ('ab', 'c')")
  assert (status, err) == (0, ''), out
  return command


@pytest.fixture
def command(tmp_path, texts, environment) -> Command:
  return Command(tmp_path, texts, environment)
