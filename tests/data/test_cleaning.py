import dataclasses
import itertools
import json
import pathlib
import pickle
import random
import re

import numpy as np
import pytest

from lmlib.data import cleaning, deduplication, quality
from lmlib.data.cleaning import Rejected, Report, clean
from tests.data.prose import CHINESE, ENGLISH

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'cleaning.md'


@dataclasses.dataclass(frozen=True)
class Lower:
  name: str = 'lower'

  def changes(self, text):
    return {'letters': sum(map(str.isupper, text))}

  def __call__(self, text):
    return text.lower()


@dataclasses.dataclass(frozen=True)
class Without:
  """Rejects texts that hold a word; the detail is the text's first letter."""
  word: str
  name: str = 'without'

  def __call__(self, text):
    return Rejected(f'holds {self.word}', text[0]) if self.word in text else text


STAGES = (Lower(), Without('猫'), Without('dog'))
TEXTS = ['A cat', 'a DOG', '一只猫', 'x dog', 'plain', '猫 dog', '狗', 'B dog', 'a dog', 'É']
NAMES = [f'document {i}' for i in range(len(TEXTS))]


def report_of(pairs, examples=2):
  report = Report(STAGES, examples)
  for name, text in pairs:
    clean(text, STAGES, name=name, report=report)
  return report


def test_stages_run_in_order_until_one_rejects():
  assert clean('A Cat', STAGES) == 'a cat'
  assert clean('A DOG', STAGES) == Rejected('holds dog', 'a')  # lower case came first
  assert clean('猫 dog', STAGES) == Rejected('holds 猫', '猫')
  assert clean('Any', ()) == 'Any'


@pytest.mark.parametrize('left', ['', ' \n\u3000'])
def test_a_text_with_nothing_left_is_dropped_and_counted(left):
  @dataclasses.dataclass(frozen=True)
  class Blank:
    name: str = 'blank'

    def __call__(self, text):
      return left

  report = Report([Blank()])
  assert clean('text', [Blank()], report=report) == Rejected('nothing left')
  assert report.rows()[0]['dropped'] == {'nothing left': {'documents': 1, 'bytes': 4}}


def test_the_report_counts_what_each_stage_saw_changed_and_dropped():
  lower, cats, dogs = report_of(zip(NAMES, TEXTS)).rows()
  sizes = [len(text.encode()) for text in TEXTS]
  assert (lower['documents'], lower['bytes'], lower['dropped']) == (10, sum(sizes), {})
  assert lower['changed'] == {'documents': 4, 'bytes': 5 + 5 + 5 + 2, 'to_bytes': 5 + 5 + 5 + 2}
  assert (lower['changes'], cats['changes']) == ({'letters': 1 + 3 + 1 + 1}, {})
  assert cats['dropped'] == {'holds 猫': {'documents': 2, 'bytes': 9 + 7, 'details': {
      '一': {'documents': 1, 'bytes': 9}, '猫': {'documents': 1, 'bytes': 7}}}}
  assert (dogs['documents'], dogs['bytes']) == (8, sum(sizes) - 16)
  assert dogs['dropped']['holds dog']['details'] == {
      'a': {'documents': 2, 'bytes': 10}, 'b': {'documents': 1, 'bytes': 5}, 'x': {'documents': 1, 'bytes': 5}}
  for before, after in itertools.pairwise((lower, cats, dogs)):
    assert before['documents'] - sum(e['documents'] for e in before['dropped'].values()) == after['documents']


@pytest.mark.parametrize('seed', range(5))
def test_parts_merge_to_the_whole_in_any_order_and_grouping(seed):
  pairs = list(zip(NAMES, TEXTS))
  whole, draw = report_of(pairs).to_json(), random.Random(seed)
  draw.shuffle(pairs)
  reports = [report_of(pairs[i::4]) for i in range(4)]
  while len(reports) > 1:
    one = reports.pop(draw.randrange(len(reports)))
    other = reports.pop(draw.randrange(len(reports)))
    reports.append(one.merge(other))
  assert reports[0].to_json() == whole
  empty = Report(STAGES, 2)
  assert empty.merge(reports[0]).to_json() == reports[0].merge(empty).to_json() == whole


def test_examples_are_few_and_those_of_the_smallest_hash():
  import hashlib
  rows = report_of(zip(NAMES, TEXTS)).rows()
  found = rows[2]['examples']['holds dog']
  texts = sorted((hashlib.sha256(TEXTS[i].lower().encode()).hexdigest(), NAMES[i]) for i in (1, 3, 7, 8))
  assert [tuple(example[:2]) for example in found] == texts[:2]
  assert all(example[3] in ('a dog', 'x dog', 'b dog') for example in found)
  assert set(rows[0]['examples']) == {'changed'}
  assert ' -> ' in rows[0]['examples']['changed'][0][3]
  assert 'examples' not in report_of(zip(NAMES, TEXTS), examples=0).rows()[0]


def test_a_report_survives_json_and_pickling():
  report = report_of(zip(NAMES, TEXTS))
  for again in (Report.from_json(report.to_json()), pickle.loads(pickle.dumps(report))):
    assert again.to_json() == report.to_json()
    assert again.merge(report).to_json() == report.merge(report).to_json()
  assert json.loads(report.to_json())['stages'][1]['name'] == 'without'


@pytest.mark.parametrize('text', ['{', '[]', '{"format": 1}', '{"format": 99, "examples": 0, "stages": []}'])
def test_what_is_no_report_is_refused(text):
  with pytest.raises(ValueError, match='cleaning report'):
    Report.from_json(text)


def test_reports_of_other_stages_do_not_merge():
  for other in (Report(STAGES[:2], 2), Report(STAGES, 1), Report((Lower(), Without('x'), Without('dog')), 2)):
    with pytest.raises(ValueError, match='reports of other stages'):
      Report(STAGES, 2).merge(other)
  with pytest.raises(ValueError, match='examples=-1'):
    Report(STAGES, -1)


def test_the_table_says_every_stage_and_reason():
  table = report_of(zip(NAMES, TEXTS)).table()
  for word in ('lower', 'without', 'holds 猫', 'holds dog', 'document', ' -> '):
    assert word in table
  assert len(Report(STAGES).table().split('\n')) == 1 + len(STAGES)


def test_a_fingerprint_tells_class_settings_and_version():
  @dataclasses.dataclass(frozen=True)
  class Newer(Lower):
    version = 2

  @dataclasses.dataclass(frozen=True)
  class Reading(Without):
    settings = 'the contents of a file'

  stages = [Lower(), Without('a'), Without('b'), Newer(), Reading('a')]
  assert len({cleaning.fingerprint(stage) for stage in stages}) == len(stages)
  assert cleaning.fingerprint(Without('a')) == cleaning.fingerprint(Without('a'))
  assert cleaning.fingerprint(Reading('a')) == cleaning.fingerprint(Reading('b'))


def test_corpus_wide_stages_come_last():
  exact, near = deduplication.ExactDuplicates(), deduplication.NearDuplicates()
  assert cleaning.divided([*STAGES, exact, near]) == (STAGES, (exact, near))
  assert cleaning.divided(STAGES) == (STAGES, ())
  assert cleaning.divided([exact]) == ((), (exact,))
  with pytest.raises(ValueError, match='lower comes after exact duplicates'):
    cleaning.divided([exact, *STAGES])


def test_corpus_wide_stages_see_what_those_before_left():
  @dataclasses.dataclass(frozen=True)
  class Neighbours:
    """Drops what equals the document before it, of those it sees."""
    name: str = 'neighbours'

    def duplicates(self, signatures):
      return {i: i - 1 for i in range(1, len(signatures)) if signatures[i, 0] == signatures[i - 1, 0]}

  exact, neighbours = deduplication.ExactDuplicates(), Neighbours()
  texts = ['p', 'p', 'q', 'r']
  rows = np.array([exact.signature(text) for text in texts])
  other = np.array([[1], [3], [2], [2]], np.uint64)
  dropped = cleaning.duplicates_in_turn([exact, neighbours], [rows, other])
  assert dropped == [{1: 0}, {3: 2}]
  other = np.array([[2], [3], [2], [4]], np.uint64)  # 0 and 2 are neighbours once 1 is gone
  assert cleaning.duplicates_in_turn([exact, neighbours], [rows, other]) == [{1: 0}, {2: 0}]
  documents = [(text, 10 + i) for i, text in enumerate(texts)]
  report = cleaning.duplicates_report([exact, neighbours], dropped, documents, examples=1)
  first, second = report.rows()
  assert (first['documents'], first['bytes'], second['documents'], second['bytes']) == (4, 46, 3, 35)
  assert second['dropped'] == {'repeats an earlier document': {'documents': 1, 'bytes': 13}}
  assert second['examples']['repeats an earlier document'][0][1:] == ['r', '', 'repeats q']
  joined = Report(STAGES, 1).followed_by(report)
  assert [row['name'] for row in joined.rows()][2:] == ['without', 'exact duplicates', 'neighbours']
  assert Report.from_json(joined.to_json()).to_json() == joined.to_json()


def test_the_first_difference_is_shown():
  before = 'x' * 500 + ' mail me@my.org now' + 'y' * 500
  shown = cleaning.difference(before, before.replace('me@my.org', '<EMAIL>'))
  assert 'mail me@my.org now' in shown
  assert 'mail <EMAIL> now' in shown
  assert len(shown) < 2 * cleaning.EXCERPT


def test_speeds_are_positive_and_by_name():
  found = cleaning.speeds([Lower(), deduplication.ExactDuplicates()], ['some text'], rounds=1)
  assert list(found) == ['lower', 'exact duplicates']
  assert min(found.values()) > 0


def test_the_page_on_cleaning_runs_as_it_stands(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'gsm8k').mkdir()
  (tmp_path / 'gsm8k' / 'test.jsonl').write_text(json.dumps({'question': ENGLISH[:400]}) + '\n')
  code, = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
  values = {'texts': {'good': CHINESE + ' a@b.org', 'test': 'x ' + ENGLISH, 'short': '太短'}}
  exec(compile(code, 'cleaning.md', 'exec'), values)
  assert values['kept'] == {'good': CHINESE + ' <EMAIL>'}
  assert 'holds gsm8k' in capsys.readouterr().out


def test_the_page_has_the_s_curve_and_every_threshold():
  text = PAGE.read_text()
  similarities, probabilities = (re.findall(r'[01]\.\d+', line) for line in text.split('\n')
                                 if line.startswith(('| s |', '| 14 bands')))
  stage = deduplication.NearDuplicates()
  assert probabilities == [f'{stage.probability(float(s)):.2f}' for s in similarities]
  repetition = quality.Repetition()
  for pairs in (repetition.top, repetition.duplicate):
    assert ', '.join(f'{share:.2f}' for _, share in pairs) in text
