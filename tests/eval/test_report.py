"""The report of a run: pictures, samples and figures that say what metrics.jsonl says."""
import json
import math

from matplotlib import image
import numpy as np
import pytest

from lmlib.eval import held_out, report
from lmlib.eval.perplexity import Score

STEPS = 120


@pytest.fixture
def folder(tmp_path):
  """A WORKDIR with the metrics of a run whose step 7 was not finite."""
  folder = tmp_path / 'run'
  folder.mkdir()
  with open(folder / 'metrics.jsonl', 'w') as file:
    for step in range(1, STEPS + 1):
      nats = None if step == 7 else 2 + 6 * math.exp(-step / 30) + 0.2 * math.sin(step)
      file.write(json.dumps({
          'step': step, 'loss': nats, 'nats': nats, 'finite': float(step != 7), 'tokens': 100 * step,
          'tokens_per_second': 1.0 if step == 1 else 1000.0, 'mfu': 0.4, 'seconds': 0.1, 'waited': 0.01,
          'saving': 0.02, 'memory_bytes': 10**9}) + '\n')
  return folder


@pytest.fixture
def summary(folder):
  return report.write(folder, score=Score(nats=300.0, tokens=100, bytes=400), others={'gzip': 1.7, 'xz': 1.5},
                      samples=[('import ', 'os\n')], facts={'parameters': 12345})


def test_the_summary_is_what_the_run_did(folder, summary):
  assert json.loads((folder / 'report' / 'summary.json').read_text()) == summary
  expected = {'bits_per_byte': 300 / math.log(2) / 400, 'perplexity': math.exp(3), 'steps': STEPS,
              'tokens': 100 * STEPS, 'parameters': 12345, 'seconds': 0.1 * STEPS,
              'seconds_waited_for_data': 0.01 * STEPS, 'tokens_per_second': 1000.0, 'mfu': 0.4,
              'steps_skipped': 1}
  assert {name: summary[name] for name in expected} == pytest.approx(expected)


def test_the_curve_is_a_picture(folder, summary):
  """Readable, of a size to look at, with both curves and the line of held-out text drawn in it."""
  pixels_HWC = image.imread(folder / 'report' / 'loss.png')
  assert pixels_HWC.shape[0] >= 400
  assert pixels_HWC.shape[1] >= 700
  for red, green, blue in ((0x1f, 0x4e, 0x79), (0xc0, 0x50, 0x20), (0xb8, 0xcb, 0xe0)):
    wanted = np.array([red, green, blue]) / 255
    near = (np.abs(pixels_HWC[..., :3] - wanted) < 0.02).all(-1)
    assert np.ptp(near.any(0).nonzero()) > 400, 'the curve crosses the picture'


def test_the_samples_are_readable(folder, summary):
  assert "'import ' is continued\nimport os\n" in (folder / 'report' / 'samples.txt').read_text()


def test_the_closing_says_what_came_out_and_what_is_next(folder, summary):
  text = report.closing(summary, folder)
  for part in ('1.082', 'gzip', '1.700', '120 steps', '1 steps skipped', 'MFU 40%', str(folder),
               'evaluate.py', 'pretrain_dense_124m.gin', 'text_files.gin', 'generate.py'):
    assert part in text, part


def test_a_model_that_writes_nothing_is_reported_by_what_it_fills_in(folder):
  score = held_out.Score('MaskedLm', nats=120.0, right=30, hidden=60, read=400, blind_nats=300.0)
  summary = report.write(folder, score=score, others={}, samples=[], facts={'parameters': 12345})
  assert json.loads((folder / 'report' / 'summary.json').read_text()) == summary
  expected = {'objective': 'MaskedLm', 'hidden_nats': 2.0, 'hidden_perplexity': math.exp(2), 'hidden_accuracy': 0.5,
              'hidden_tokens': 60, 'read_tokens': 400, 'blind_nats': 5.0, 'steps': STEPS}
  assert {name: summary[name] for name in expected} == expected
  assert not {'bits_per_byte', 'perplexity', 'compressors_bits_per_byte'} & summary.keys()
  assert not (folder / 'report' / 'samples.txt').exists()
  text = report.closing(summary, folder)
  for part in ('60 tokens that MaskedLm hides', '2.000   50.0% are guessed', 'unread          5.000', 'tensorboard'):
    assert part in text, part
  for part in ('generate.py', 'evaluate.py', 'samples.txt', 'bits per byte'):
    assert part not in text, part
