"""Prompts as papers print them, answers by their rules, and votes."""
import dataclasses

import pytest

from lmlib.eval import prompting
from lmlib.eval.prompting import Shot, Template, answer, vote

SHOT = Shot('What is 1 + 1?', '2', 'One and one more are two.')


def test_templates_to_the_letter():
  assert Template('zero_shot').prompt('What is 2 + 2?') == 'Question: What is 2 + 2?\nAnswer:'
  assert Template('few_shot').prompt('What is 2 + 2?', [SHOT], instruction='Add.') == (
      'Add.\n\nQuestion: What is 1 + 1?\nAnswer: 2\n\nQuestion: What is 2 + 2?\nAnswer:')
  assert Template('chain_of_thought').prompt('What is 2 + 2?', [SHOT]) == (
      'Question: What is 1 + 1?\nAnswer: One and one more are two. The answer is 2.\n\n'
      'Question: What is 2 + 2?\nAnswer:')
  assert Template('chain_of_thought').prompt('What is 2 + 2?').endswith("\nAnswer: Let's think step by step.")


def test_a_template_of_ones_own(tmp_path):
  path = tmp_path / 'mine.jinja'
  path.write_text('{{ question }}？{{ tail }}\n', encoding='utf-8')
  assert Template(str(path)).prompt('几点', tail='答：') == '几点？答：'
  path.write_text('nothing of it')
  with pytest.raises(ValueError, match=r"mine.*leaves out the question 'x'"):
    Template(str(path)).prompt('x')
  path.write_text('{{ question }}{{ tail.a.b }}')
  with pytest.raises(ValueError, match=r'mine.*fails'):
    Template(str(path)).prompt('x')
  path.write_text('{% if %}')
  with pytest.raises(ValueError, match='no Jinja template'):
    Template(str(path))


def test_an_unknown_template_is_refused_with_those_there_are():
  with pytest.raises(ValueError, match=r"'few_shots'.*chain_of_thought.*zero_shot"):
    Template('few_shots')


@pytest.mark.parametrize(('rule', 'text', 'expected'), [
    ('number', 'There are 3 boxes of 4, so 12.', '12'), ('number', 'It costs $1,000.50 in all', '1000.5'),
    ('number', 'from 5 to -3', '-3'), ('number', 'no digits', None), ('number', 'it is 007.00', '7'),
    ('marked', '2 + 2 = 4\n#### 4\nthen 9', '4'), ('marked', '4', None),
    ('boxed', r'so \boxed{1} or rather \boxed{\frac{1}{2}}', r'\frac{1}{2}'),
    ('said', 'First. The answer is Paris.\nBye', 'Paris'), ('said', '因此答案是：北京。', '北京'),
    ('said', 'The answer is 12.50.', '12.5'), ('said', 'I do not know', None),
    ('letter', 'A is wrong. The answer is (C).', 'C'), ('letter', 'Answer: B', 'B'), ('letter', '答案是D。', 'D'),
    ('letter', 'The answer is Apple', None), ('only letter', ' B. red', 'B'), ('only letter', 'Because', None)])
def test_rules(rule, text, expected):
  assert answer(text, [rule]) == expected


def test_the_first_rule_that_finds_something_counts():
  assert answer('#### 4\nand 9', ['marked', 'number']) == '4'
  assert answer('and 9', ['marked', 'number']) == '9'
  with pytest.raises(ValueError, match=r"'last' must be one of.*'number'"):
    answer('9', ['last'])


def test_numbers_in_their_plainest_form():
  assert [prompting.number(one) for one in ('-0.0', '00', '1,234', '.50', '−7', 'x', '1-2')] == [
      '0', '0', '1234', '0.5', '-7', None, None]


def test_the_vote_is_of_the_most_and_of_equals_the_first():
  found = vote(['3', '4', None, '4'])
  assert (found.answer, found.share, found.counts, found.none) == ('4', 0.5, {'3': 1, '4': 2}, 1)
  assert vote(['b', 'a']).answer == 'b'
  assert vote([None, None]).answer is None
  with pytest.raises(ValueError, match='at least one'):
    vote([])


@dataclasses.dataclass
class Said:
  """A writer that answers from a list."""
  texts: list
  temperature: float = 0.7

  def __call__(self, prompts):
    assert len(prompts) == len(self.texts)
    return self.texts


def test_votes_are_of_each_prompts_own_texts():
  found = prompting.votes(Said(['it is 1', '2', '2', '7', 'none', '7']), ['a', 'b'], ['number'], samples=3)
  assert [(one.answer, one.none) for one in found] == [('2', 0), ('7', 1)]


def test_votes_over_the_same_text_are_refused():
  with pytest.raises(ValueError, match=r'samples=3 has no effect.*temperature=0'):
    prompting.votes(Said([], 0.0), ['a'], ['number'], samples=3)
