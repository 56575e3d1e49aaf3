"""Questions whose answers are right, none twice, the same for the same seed."""
import re
import unicodedata

import pytest

from lmlib.data.chat import messages_of
from lmlib.data.questions import Questions


@pytest.fixture(scope='module')
def found():
  return list(Questions(each=300).records())


def pairs(found, kind):
  return [tuple(message['content'] for message in messages_of(record)) for _, record in found if record['kind'] == kind]


def test_none_repeats_and_each_kind_is_there(found):
  assert len({question for kind in ('names', 'sums', 'characters') for question, _ in pairs(found, kind)}) == 900
  assert [where for where, _ in found][::300] == ['names 1', 'sums 1', 'characters 1']


def test_answers_are_right(found):
  for question, answer in pairs(found, 'sums'):
    a, sign, b = re.match(r'What is (\d+) ([+-]) (\d+)\?', question).groups()
    assert int(answer) == int(a) + int(b) * (1 if sign == '+' else -1) >= 0
  for question, answer in pairs(found, 'characters'):
    assert unicodedata.lookup(answer) == re.search('character (.) in', question)[1]
  assert all(answer.isidentifier() and not answer.startswith('_') for _, answer in pairs(found, 'names'))


def test_a_seed_is_a_choice_and_says_the_same_again(found):
  short = {'kinds': ('sums', 'characters'), 'each': 20}
  assert list(Questions(**short).records()) == list(Questions(**short).records())
  assert list(Questions(**short).records()) != list(Questions(**short, seed=1).records())


@pytest.mark.parametrize(('settings', 'reason'), [
    ({'kinds': ('riddles',)}, r"Questions\.kinds names 'riddles', none of names"),
    ({'kinds': ()}, r'kinds=\(\) names none'), ({'each': 1}, r'Questions\.each=1 must be at least 2')])
def test_settings_out_of_range(settings, reason):
  with pytest.raises(ValueError, match=reason):
    Questions(**settings)
