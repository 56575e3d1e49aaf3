"""What a run of fine-tuning says: before and after of every measure, samples of both, and what to do next."""
import json

import numpy as np
import pytest

from lmlib.data.chat import Chat
from lmlib.data.conversations import Question
from lmlib.eval import tuning_report
from lmlib.eval.held_out_answers import Score
from tests.post import small
from tests.post.small import turns

FACTS = {'source': 'a model', 'parameters': 1000, 'trained': 100, 'optimizer_bytes': 800,
         'optimizer_bytes_of_all': 8000, 'data': {'conversations': 9}, 'mesh': {'data': 1}}
STEP = {'step': 1, 'loss': 2.0, 'nats': 2.0, 'tokens': 50, 'tokens_per_second': 25.0, 'seconds': 2.0, 'waited': 0.0,
        'saving': 0.0, 'memory_bytes': 1, 'finite': 1.0}


def score(right, nats):
  return Score(np.full(3, nats), np.array([2, 2, 2]), ('one', 'two', 'three'), np.array(right), np.array([True] * 3))


@pytest.fixture
def summary(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(STEP) + '\n')
  said = [turns(f'say {i}', str(i)) for i in range(3)]
  questions = [Question(f'q{i}', one, Chat().example(one, small.tokenizer())) for i, one in enumerate(said)]
  return tuning_report.write(tmp_path, before=score([False] * 3, 4.0), after=score([True, True, False], 1.0),
                             questions=questions, tokenizer=small.tokenizer(), facts=FACTS)


def test_before_and_after_stand_side_by_side(summary, tmp_path):
  assert json.loads((tmp_path / 'report' / 'summary.json').read_text()) == summary
  nats, exact, named = summary['held_out']
  assert (nats['before'], nats['after'], exact['after'], named['difference']) == (2, 0.5, pytest.approx(2 / 3), 0)
  said = tuning_report.closing(summary, tmp_path)
  assert 'nats a token              3     2.000     0.500      -1.500   -1.500 to -1.500' in said
  assert 'exact answers             3      0.0%     66.7%       66.7%' in said
  assert 'merge it' not in said
  (tmp_path / 'adapter').mkdir()
  assert f'PATH = "{tmp_path}/adapter"' in tuning_report.closing(summary, tmp_path)
  assert 'talk to it' in tuning_report.closing(summary | {'trained': 1000}, tmp_path)


def test_samples_show_both_answers_and_all_are_kept(summary, tmp_path):
  assert (tmp_path / 'report' / 'samples.txt').read_text().startswith(
      '---- q0\nsay 0\n  reference  0\n  before     one\n  after      one\n')
  assert json.loads((tmp_path / 'after.json').read_text())['right'] == [True, True, False]
  assert (tmp_path / 'report' / 'loss.png').stat().st_size > 1000


def test_the_opening_says_what_is_trained_and_what_its_optimizer_takes(tmp_path):
  said = tuning_report.opening(FACTS, tmp_path, 0, 9)
  assert 'trained     100 numbers, 10.00% of as many; optimizer state 0.0 MB, where training all of them takes' in said
  assert 'where' not in tuning_report.opening(FACTS | {'trained': 1000}, tmp_path, 0, 9)
