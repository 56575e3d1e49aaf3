"""Running evaluations: what is known is said, and in training a step is evaluated once."""
import dataclasses
import json

import pytest

from lmlib.data.tokenizer import Bytes
from lmlib.eval import evaluation
from lmlib.eval.candidate import Candidate
from lmlib.eval.scoreboard import Result
from tests.laws.models import CONFIGS

TOKENIZER = Bytes().train()
CONFIG = dataclasses.replace(CONFIGS['dense'], vocab=TOKENIZER.vocab)


@dataclasses.dataclass(frozen=True)
class Counting:
  """An evaluation that asks nothing of a model but its weights, and notes it."""
  name: str = 'counting'
  asked: list = dataclasses.field(default_factory=list)

  def check(self):
    if self.name == 'missing':
      raise ModuleNotFoundError('this needs a package')

  def run(self, candidate):
    self.asked.append(candidate.params)
    if candidate.answers.find('text', 'q') is None:
      candidate.answers.add('text', [('q', 'a')])
    return [Result(candidate.name, self.name, 'share', (1.0, 0.0, float(candidate.params))),
            Result(candidate.name, 'parts', 'bleu', (), alone=float('nan'))]


def test_what_was_known_is_said():
  said, candidate = [], Candidate('tiny', CONFIG, 0.5, TOKENIZER)
  found = [evaluation.run([Counting()], candidate, say=said.append) for _ in range(2)]
  assert found[0][0].score == 0.5
  assert 'counting share 0.5 [' in said[0]
  assert '(1 answers; ' in said[0]
  assert '(0 answers and 1 known from before; ' in said[1]
  assert json.loads(evaluation.summary(found[0])) == {
      'counting': {'share': {'tiny': 0.5}}, 'parts': {'bleu': {'tiny': None}}}


def test_a_package_that_is_missing_is_a_fault_of_the_configuration():
  with pytest.raises(ValueError, match='this needs a package'):
    evaluation.check([Counting('missing')])


def test_in_training_a_step_is_evaluated_once_and_a_cut_line_again(tmp_path):
  one = Counting()
  started = lambda: evaluation.during([one], CONFIG, TOKENIZER, tmp_path, say=lambda _: None)
  evaluate = started()
  first = evaluate(0.5, 10)
  assert first.keys() == {'counting/share', 'counting/parts/bleu'}
  assert evaluate(0.2, 20)['counting/share'] == pytest.approx(0.4)
  path = tmp_path / 'evaluations.jsonl'
  assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [10, 20]
  assert started()(None, 10)['counting/share'] == 0.5, 'known, so the weights are not asked'
  path.write_bytes(path.read_bytes()[:-5])
  assert started()(0.2, 20)['counting/share'] == pytest.approx(0.4)
  assert one.asked == [0.5, 0.2, 0.2]
  assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [10, 20]


def test_a_model_that_cannot_be_evaluated_is_refused_before_training(tmp_path):
  from lmlib.models import encoder
  with pytest.raises(ValueError, match='no decoder alone'):
    evaluation.during([Counting()], encoder.Config(vocab=300), TOKENIZER, tmp_path)
