"""What a report takes from the harness' results; tests/parity/test_harness.py runs the harness itself."""
import math

import pytest

from lmlib.eval import harness
from lmlib.eval.scoreboard import Result

FOUND = {
    'results': {'choice': {'name': 'choice', 'alias': 'choice', 'sample_len': 3, 'acc,none': 2 / 3,
                           'acc_stderr,none': 0.1, 'exact_match,strict': 1 / 3, 'exact_match,loose': 1.0},
                'rolling': {'bits_per_byte,none': 9 / 30 / math.log(2), 'word_perplexity,none': math.exp(2.0)},
                'group': {'acc,none': 0.4, 'alias': 'group'}},
    'samples': {'choice': [{'filter': 'none', 'acc': 1.0}, {'filter': 'none', 'acc': 0.0}, {'filter': 'none', 'acc': 1},
                           *({'filter': 'strict', 'exact_match': x} for x in (0.0, 1.0, 0.0)),
                           *({'filter': 'loose', 'exact_match': x} for x in (1.0, 1.0, 1.0))],
                'rolling': [{'filter': 'none', 'bits_per_byte': (-4.0, 20), 'word_perplexity': (-4.0, 2)},
                            {'filter': 'none', 'bits_per_byte': (-5.0, 10), 'word_perplexity': (-5.0, 2)}]},
    'higher_is_better': {'choice': {'acc': True}, 'rolling': {'bits_per_byte': False, 'word_perplexity': False}},
    'n-shot': {'choice': 2}, 'versions': {'choice': 1.0}}


def test_means_and_ratios_keep_the_value_of_each_question():
  found = {(one.task, one.metric): one for one in harness.results(FOUND, 'm')}
  assert found.keys() == {('choice', 'acc'), ('choice', 'exact_match (strict)'), ('choice', 'exact_match (loose)'),
                          ('rolling', 'bits_per_byte'), ('rolling', 'word_perplexity'), ('group', 'acc')}
  assert found['choice', 'acc'] == Result('m', 'choice', 'acc', (1.0, 0.0, 1.0), facts={'shots': 2, 'version': '1.0'})
  assert found['choice', 'exact_match (strict)'].values == (0.0, 1.0, 0.0)
  bits = found['rolling', 'bits_per_byte']
  assert bits.weights == (20.0, 10.0)
  assert bits.score == pytest.approx(9 / 30 / math.log(2))
  assert not bits.higher_is_better
  assert (found['rolling', 'word_perplexity'].values, found['rolling', 'word_perplexity'].alone) == ((), math.exp(2.0))
  assert found['group', 'acc'].alone == 0.4


def test_a_score_that_is_not_the_mean_of_its_questions_stands_alone():
  changed = FOUND | {'results': {'choice': {'acc,none': 0.9}}}
  one, = harness.results(changed, 'm')
  assert (one.values, one.alone) == ((), 0.9)
