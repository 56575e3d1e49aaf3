"""The quickstart's own run file, with a smaller model and less text, computes the same on eight devices."""
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.devices import fake_devices
from tests.experiments.conftest import ROOT

STEPS = 20
SMALL = ('dense.Config.vocab = 300', 'tokenizer.SentencePiece.pieces = 300', 'dense.Config.layers = 2',
         'dense.Config.width = 64', 'dense.Config.hidden = 128', 'dense.Config.heads = 4', 'dense.Config.kv_heads = 4',
         'dense.Config.head_width = 16', 'dense.Config.length = 64', 'schedules.Wsd.warmup = 5', 'BATCH = 8',
         f'STEPS = {STEPS}', 'from lmlib.data import sources', 'prepare.Corpus.source = @sources.TextFiles()')


@pytest.fixture(scope='module')
def losses(tmp_path_factory, texts, environment):
  """losses(devices, layout): the loss of every step, from a process with so many fake devices."""
  def run(devices: int, layout: dict) -> np.ndarray:
    workdir = tmp_path_factory.mktemp('quickstart') / 'run'
    given = [*SMALL, f'sources.TextFiles.glob = "{texts}/*.txt"', f'WORKDIR = "{workdir}"',
             *(f'sharding.Layout.{axis} = {size}' for axis, size in layout.items()),
             *([] if 'tensor' in layout else ['pretrain.main.prompts = ()'])]
    done = subprocess.run([sys.executable, ROOT / 'experiments/pretrain.py', '--gin_file=quickstart.gin',
                           *(f'--gin_bindings={binding}' for binding in given)], text=True, capture_output=True,
                          env=environment | fake_devices(devices))
    assert (done.returncode, done.stderr) == (0, '')
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return np.array([json.loads(line)['loss'] for line in lines])

  return run


def test_eight_devices_train_like_one(losses):
  one = losses(1, {})
  assert len(one) == STEPS
  assert one[-1] < one[0] - 0.5
  np.testing.assert_allclose(losses(8, dict(data=2, fsdp=2, tensor=2)), one, atol=1e-4, rtol=0)
