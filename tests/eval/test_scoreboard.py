"""The report: the same figures in JSON and Markdown, and stars only where models differ."""
import json

import numpy as np
import pytest

from lmlib.eval import scoreboard
from lmlib.eval.scoreboard import Result

RIGHT = tuple(float(n % 2) for n in range(200))
BETTER = tuple(float(n % 5 > 0) for n in range(200))
RESULTS = [Result('a', 'mmlu', 'accuracy', RIGHT), Result('b', 'mmlu', 'accuracy', BETTER),
           Result('c', 'mmlu', 'accuracy', RIGHT[1:] + RIGHT[:1]),
           Result('a', 'texts', 'bits_per_byte', (8.0, 40.0), (4.0, 16.0), higher_is_better=False),
           Result('b', 'texts', 'bits_per_byte', (9.0, 44.0), (4.0, 16.0), higher_is_better=False)]


def test_the_files_hold_the_figures(tmp_path):
  report = scoreboard.write(tmp_path / 'new', RESULTS, seed=3)
  assert json.loads((tmp_path / 'new' / 'evaluation.json').read_text()) == report
  assert report['seed'] == 3
  mmlu, texts = report['results']
  assert [one['score'] for one in mmlu['models'].values()] == [0.5, 0.8, 0.5]
  assert mmlu['models']['b']['difference'] == pytest.approx(0.3)
  assert mmlu['models']['b']['p'] < 0.001
  assert mmlu['models']['c']['p'] == 1
  assert (mmlu['models']['b']['better_on'], mmlu['models']['b']['worse_on']) == (80, 20)
  assert texts['models']['a']['score'] == pytest.approx(48 / 20)
  assert (texts['models']['b']['better_on'], texts['models']['b']['worse_on']) == (0, 2), 'lower is better'
  assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == ['evaluation.json', 'evaluation.md']


def test_the_table_has_models_side_by_side():
  lines = scoreboard.markdown(RESULTS).splitlines()
  assert lines[0] == '| task | metric | n | a | b | c |'
  assert lines[2].startswith('| mmlu | accuracy, higher is better | 200 | 0.5 [')
  assert '| **0.8*** [' in lines[2]
  assert lines[2].count('* [') == 1, 'b alone differs'
  assert '**2.4** [' in lines[3]
  assert lines[3].endswith('|  |')
  assert all(line.count('|') == 7 for line in lines[:4])
  assert 'difference from a' in lines[-1]


@pytest.mark.parametrize(('more', 'said'), [
    (Result('a', 'mmlu', 'accuracy', RIGHT), 'two results of a on mmlu'),
    (Result('d', 'mmlu', 'accuracy', RIGHT[:-1]), 'd on mmlu, accuracy has 199 questions'),
    (Result('d', 'texts', 'bits_per_byte', (8.0, 40.0), (4.0, 17.0)), 'same ones')])
def test_what_does_not_compare_is_refused(more, said):
  with pytest.raises(ValueError, match=said):
    scoreboard.table([*RESULTS, more])


def test_groups_are_ratios_of_their_own_sums_and_a_lone_score_has_no_interval(tmp_path):
  weighed = Result('a', 't', 'bits', (4.0, 2.0, 9.0), (2.0, 2.0, 3.0), groups=('x', 'x', 'y'), facts={'seed': 1})
  found = scoreboard.written([weighed, Result('a', 't', 'bleu', (), alone=31.0)])
  assert found[0]['models']['a']['groups'] == {'x': 1.5, 'y': 3.0}
  assert (found[0]['models']['a']['score'], found[0]['models']['a']['seed']) == (pytest.approx(15 / 7), 1)
  assert found[1]['models']['a'] == {'score': 31.0}
  assert '| t | bleu, higher is better |  | **31** |' in scoreboard.markdown([Result('a', 't', 'bleu', (), alone=31.0)])
  with pytest.raises(ValueError, match='one of the two'):
    Result('a', 't', 'm', ())
  with pytest.raises(ValueError, match='2 groups of 1 values'):
    Result('a', 't', 'm', (1.0,), groups=('x', 'y'))


def test_names_do_not_break_the_table():
  found = scoreboard.markdown([Result('a|b', 'x', 'y', tuple(np.ones(3)))])
  assert found.splitlines()[0] == '| task | metric | n | a\\|b |'


def test_the_best_of_a_bias_is_the_nearest_to_none():
  scores = {'a': 0.3, 'b': -0.2, 'c': -0.9}
  results = [Result(name, 'bbq', 'bias', (value,) * 3, ideal=0.0) for name, value in scores.items()]
  line = scoreboard.markdown(results).splitlines()[2]
  assert line.startswith('| bbq | bias, 0 is best | 3 | 0.3 [')
  assert '**-0.2*' in line or '**-0.2**' in line
  assert line.count('**') == 2
