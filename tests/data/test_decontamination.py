import gzip
import json
import pickle

import pytest

from lmlib.data import words
from lmlib.data.cleaning import Rejected, Report, clean, fingerprint
from lmlib.data.decontamination import Decontamination, EvaluationSet
from tests.data.prose import CHINESE, ENGLISH

QUESTION = ('Natalia sold clips to forty-eight of her friends in April, and then she sold half as many clips in May; '
            'how many clips did she sell altogether?')
PROBLEM = '小明有十二个苹果，他把其中的三分之一送给了妹妹，又买了五个梨，请问小明现在一共有多少个水果？'
SETS = (EvaluationSet('gsm8k', (QUESTION, 'What is the capital city of the old French kingdom?')),
        EvaluationSet('cmath', (PROBLEM, '太短了')))


@pytest.mark.parametrize('prose', [ENGLISH, CHINESE])
def test_a_text_that_holds_an_example_is_dropped_and_named(prose):
  stage = Decontamination(SETS)
  assert stage(prose) == prose
  assert stage(prose + QUESTION + prose) == Rejected('holds gsm8k', '0')
  assert stage(prose + PROBLEM + prose) == Rejected('holds cmath', '0')


def test_case_and_punctuation_do_not_matter():
  stage = Decontamination(SETS)
  assert stage('x ' + QUESTION.upper().replace(',', ' --').replace(' ', '\n')) == Rejected('holds gsm8k', '0')
  assert stage('题：' + PROBLEM.replace('，', ' ')) == Rejected('holds cmath', '0')


def test_thirteen_words_or_twenty_one_characters_are_enough_and_less_is_not():
  stage = Decontamination(SETS)
  spaced = QUESTION.replace('-', ' ').split(' ')
  assert isinstance(stage('x ' + ' '.join(spaced[3:16]) + ' y'), Rejected)
  assert isinstance(stage('x ' + ' '.join(spaced[3:15]) + ' y'), str)
  characters = [c for c in PROBLEM if c not in '，？']
  assert isinstance(stage('前' + ''.join(characters[5:26]) + '后'), Rejected)
  assert isinstance(stage('前' + ''.join(characters[5:25]) + '后'), str)


def test_short_examples_are_looked_for_whole_and_shorter_ones_are_named():
  stage = Decontamination(SETS)
  whole = 'What is the capital city of the old French kingdom?'  # ten words
  assert stage(f'{ENGLISH} {whole} {ENGLISH}') == Rejected('holds gsm8k', '1')
  assert Decontamination(SETS, matches=5)(whole) == Rejected('holds gsm8k', '1')  # its one n-gram is all of it
  assert stage(ENGLISH + whole.replace('kingdom', 'republic')).startswith('The')
  assert stage.unseen() == (('cmath', '1'),)
  assert Decontamination(SETS, shortest=1).unseen() == ()
  assert Decontamination(SETS, shortest=1)('他说太短了吧') == Rejected('holds cmath', '1')
  borders = ('one two three four five six seven', 'one two three four five six seven eight', '天地玄黄宇宙洪荒日月盈',
             '天地玄黄宇宙洪荒日月盈昃辰')  # 7 and 8 words; 11 and 13 characters: 6.9 and 8.1 words
  assert Decontamination((EvaluationSet('s', borders),)).unseen() == (('s', '0'), ('s', '2'))
  with pytest.raises(ValueError, match=r'shortest=8: all examples of s are shorter'):
    Decontamination((EvaluationSet('s', ('a b c',)),)).unseen()


def test_the_example_with_most_in_common_is_named():
  half = ' '.join(QUESTION.split(' ')[:16]) + ' and a different end to the tale'
  sets = (EvaluationSet('a', (half,)), EvaluationSet('b', (QUESTION,)))
  assert Decontamination(sets)(QUESTION) == Rejected('holds b', '0')
  assert set(Decontamination(sets).found(QUESTION)) == {('a', '0'), ('b', '0')}
  assert set(Decontamination(sets, matches=8).found(QUESTION)) == {('b', '0')}
  assert Decontamination(sets, matches=100)(QUESTION) == QUESTION


def test_found_ngrams_are_counted_as_sets_of_words():
  stage = Decontamination((EvaluationSet('prose', (ENGLISH,)),))
  part = ' '.join(ENGLISH.split()[20:60])
  grams = lambda text: {*words.ngrams(words.words(text), 13)[0].tolist()}
  assert stage.found(part * 2)['prose', '0'] == len(grams(part * 2) & grams(ENGLISH))


def test_the_report_says_which_sets_and_examples():
  stages = (Decontamination(SETS),)
  report = Report(stages, examples=1)
  for name, text in enumerate([ENGLISH, QUESTION, PROBLEM, QUESTION + ENGLISH]):
    clean(text, stages, name=f'd{name}', report=report)
  dropped = report.rows()[0]['dropped']
  assert {reason: entry['documents'] for reason, entry in dropped.items()} == {'holds gsm8k': 2, 'holds cmath': 1}
  assert dropped['holds gsm8k']['details']['0']['documents'] == 2


def test_sets_come_from_files_and_their_contents_make_the_fingerprint(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  answer = 'Nobody in this whole wide world will ever really know it.'
  lines = ''.join(json.dumps({'question': q, 'answer': answer}) + '\n' for q in (QUESTION, PROBLEM))
  (tmp_path / 'test.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
  read = lambda glob, fields: Decontamination((EvaluationSet('read', glob=glob, fields=fields),))
  stage = read('*.jsonl.gz', ('question',))
  assert stage(ENGLISH + PROBLEM) == Rejected('holds read', 'test.jsonl.gz:2')
  both = read('*.jsonl.gz', ('question', 'answer'))
  assert both('Nobody in this whole wide world will ever really know it!').reason == 'holds read'
  (tmp_path / 'test.jsonl.gz').rename('renamed.jsonl.gz')
  assert fingerprint(read('re*', ('question',))) == fingerprint(stage)
  assert fingerprint(both) != fingerprint(stage)
  (tmp_path / 'plain.txt').write_text(QUESTION)
  assert read('plain.txt', ())('x ' + QUESTION) == Rejected('holds read', 'plain.txt')
  for glob, fields, match in (('none*', ('q',), 'matches no file'), ('re*', ('text',), "line 1: no field 'text'"),
                              ('re*', (), 'name the field')):
    with pytest.raises(ValueError, match=match):
      read(glob, fields)(ENGLISH)


def test_the_stage_is_picklable_with_its_index():
  stage = Decontamination(SETS)
  stage(ENGLISH)
  again = pickle.loads(pickle.dumps(stage))
  assert again == stage
  assert again(QUESTION) == stage(QUESTION)


@pytest.mark.parametrize(('make', 'match'), [
    (lambda: Decontamination(()), r'sets=\(\)'),
    (lambda: Decontamination((SETS[0], SETS[0])), 'one name'),
    (lambda: Decontamination(SETS, shortest=14), 'shortest=14'),
    (lambda: Decontamination(SETS, matches=0), 'matches=0'),
    (lambda: EvaluationSet('x'), 'either texts or glob'), (lambda: EvaluationSet('x', ('a',), glob='b'), 'either'),
    (lambda: EvaluationSet('x', ('a',), fields=('b',)), 'no effect without glob')])
def test_settings_are_checked(make, match):
  with pytest.raises(ValueError, match=match):
    make()
