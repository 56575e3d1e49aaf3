"""Written answers: files are read or named, and texts are judged by the stated rule and by kept metrics."""
import gzip
import json

import pytest

from lmlib.eval import text_metrics, written
from lmlib.eval.prompting import Shot
from lmlib.eval.written import Choices, Question, QuestionFile, judged


def write(path, *records):
  text = ''.join(json.dumps(one, ensure_ascii=False) + '\n' for one in records).encode()
  path.write_bytes(gzip.compress(text) if path.suffix == '.gz' else text)
  return str(path)


def test_questions_are_read(tmp_path):
  records = [{'question': 'q', 'answer': 'a', 'subject': 's'}, {'question': '问', 'answer': ['甲', '乙']},
             {'question': 'n', 'answer': 4}]
  expected = [Question('q', ('a',), 's'), Question('问', ('甲', '乙')), Question('n', ('4',))]
  for name in ('x.jsonl', 'x.jsonl.gz'):
    assert QuestionFile(write(tmp_path / name, *records)).questions() == expected


def test_choices_are_questions_with_letters(tmp_path):
  (tmp_path / 'test').mkdir()
  (tmp_path / 'test' / 'law_test.csv').write_text('What?,yes,no,C\n'.replace(',C', ',B'))
  assert Choices(str(tmp_path)).questions() == [Question('What?\nA. yes\nB. no', ('B',), 'law')]


@pytest.mark.parametrize(('text', 'said'), [
    ('{"question": "q"}\n', r'line 1: a .question. and an .answer.'), ('{"question": "q", "answer": []}\n', 'line 1'),
    ('{"question": "q", "answer": "a"}\n[1]\n', 'line 2: no JSON object'), ('{\n', 'line 1: no JSON')])
def test_lines_of_another_form_are_named(tmp_path, text, said):
  (tmp_path / 'x.jsonl').write_text(text)
  with pytest.raises(ValueError, match=said):
    QuestionFile(str(tmp_path / 'x.jsonl')).questions()


def test_a_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(ValueError, match='no file'):
    QuestionFile(str(tmp_path / 'x.jsonl')).questions()


def test_examples_are_read_as_many_as_there_must_be(tmp_path):
  path = write(tmp_path / 'x.jsonl', {'question': '1+1', 'answer': 2, 'thought': 'One and one.'},
               {'question': 'q', 'answer': 'a'})
  assert written.shots(path, 2) == [Shot('1+1', '2', 'One and one.'), Shot('q', 'a')]
  with pytest.raises(ValueError, match=r'shots=3, but .*x.jsonl has 2 examples'):
    written.shots(path, 3)
  with pytest.raises(ValueError, match=r"line 1: an example needs .*\['question'\]"):
    written.shots(write(tmp_path / 'y.jsonl', {'question': 'q'}), 1)


def test_accuracy_is_of_the_vote():
  questions = [Question('a', ('1,000',)), Question('b', ('B',)), Question('c', ('7',))]
  texts = ['The answer is 3.', 'So the answer is 1000.00.', 'The answer is $1,000.',
           'The answer is B.', 'The answer is b.', 'who knows', 'none', 'none', 'none']
  values, alone, facts = judged(texts, questions, 'accuracy', rules=('said',), samples=3)
  assert (values, alone) == ([1, 1, 0], None)
  assert facts == {'without_answer': 4, 'agreement': pytest.approx((2 / 3 + 1 / 3 + 0) / 3)}


def test_a_letter_is_no_article():
  """The rules of exact match drop 'a', which is an answer here."""
  values, _, _ = judged(['The answer is A.', 'The answer is A.'], [Question('q', ('A',)), Question('q', ('B',))],
                        'accuracy', rules=('said',))
  assert values == [1, 0]


def test_text_metrics_are_those_of_the_library():
  texts, questions = ['the cat sat', 'a dog'], [Question('q', ('a cat sat down', 'it')), Question('r', ('dog',))]
  references = [one.references for one in questions]
  for metric, expected in (('exact_match', text_metrics.exact_match), ('f1', text_metrics.f1),
                           ('rougeL', lambda *given: text_metrics.rouge(*given)['rougeL'])):
    values, alone, _ = judged(texts, questions, metric, rules=())
    assert alone is None
    assert sum(values) / 2 == pytest.approx(expected(texts, references))
  for metric in written.CORPUS:
    values, alone, facts = judged(texts, questions, metric, rules=())
    assert (values, alone) == ([], getattr(text_metrics, metric)(texts, references)[metric])
    assert 'version' in facts['signature']
