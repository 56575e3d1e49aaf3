import itertools
import random
import re

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from lmlib.data import words
from lmlib.data.cleaning import Rejected
from lmlib.data.quality import Length, Prose, Quality, Repetition
from tests.data.prose import CHINESE, ENGLISH

quick = settings(max_examples=60, derandomize=True, deadline=None, database=None)
both = pytest.mark.parametrize('prose', [ENGLISH, CHINESE], ids=['English', 'Chinese'])


def rejected(stage, text, *parts):
  result = stage(text)
  assert isinstance(result, Rejected), result
  assert all(part in result.reason for part in parts), result


@both
def test_prose_passes_every_rule_unchanged(prose):
  for stage in (Length(), Quality(), Repetition(), Prose(line_words=None, ends=False)):
    assert stage(prose) == prose, stage


def test_length_counts_chinese_and_english_words():
  for unit, exact in (('word ', 50), ('字', 80)):
    assert Length()(unit * exact) == unit * exact
    rejected(Length(), unit * (exact - 1), 'fewer than 50 words')
  assert Length(least=None, most=10)('字' * 16) == '字' * 16
  rejected(Length(least=None, most=10), '字' * 17, 'more than 10 words')
  with pytest.raises(ValueError, match=r'least=5 and Length\.most=4'):
    Length(5, 4)


def test_mean_word_length_is_that_of_words_between_spaces():
  rejected(Quality(), 'a I of the be ' * 20, 'under 3')
  rejected(Quality(), 'incomprehensibilities ' * 20 + 'the of', 'over 10')
  assert Quality(function_words=None)('字' * 100 + ' a b c') == '字' * 100 + ' a b c'  # of Han it says nothing
  assert Quality(mean_length=None)('a I of the be ' * 20)


@both
@pytest.mark.parametrize(('mark', 'name'), [('#', '#'), ('…', 'ellipses'), ('....', 'ellipses')])
def test_symbols_a_word(prose, mark, name):
  number = words.counts(prose).words
  few, many = (f'{prose} {" ".join([mark] * int(number * share))} 字' for share in (0.08, 0.2))
  assert Quality(ellipses=None, lettered=None, mean_length=None)(few) == few
  rejected(Quality(ellipses=None, lettered=None), many, f'over 0.1 {name}')


@both
def test_lines_of_bullets_and_ellipses(prose):
  sentences = re.findall('[^.。]+[.。]', prose.replace('\n', ' '))
  listed = '\n'.join(f'• {line.strip()}' for line in sentences)
  rejected(Quality(), listed, '90% of lines begin with a bullet')
  assert Quality()(f'{listed}\n{prose}') == f'{listed}\n{prose}'
  cut = '\n'.join(f'{line.strip()[:30]}……' for line in sentences)
  rejected(Quality(symbols=None), cut, '30% of lines end with an ellipsis')


def test_words_must_have_letters_and_some_be_function_words():
  rejected(Quality(), 'the of ' + '1234 5678 ' * 30, '80% of words have a letter')
  rejected(Quality(), 'green ideas sleep furiously ' * 5, 'fewer than 2 function words')
  rejected(Quality(), '北京大学清华大学复旦大学' * 5, 'fewer than 2 function words')
  assert Quality(function_words=None)('green ideas sleep furiously') == 'green ideas sleep furiously'
  rejected(Quality(), '--- ---  ', 'of words have a letter')
  rejected(Quality(), '，。', 'no words')


@both
def test_repeated_lines_and_paragraphs(prose):
  lines = [line for line in re.split('(?<=[.。，,])', prose) if line.strip()]
  once = '\n'.join(lines)
  assert Repetition()(once) == once
  most = dict(top=(), duplicate=())
  n = len(lines)
  rejected(Repetition(line_characters=None, paragraphs=None, paragraph_characters=None, **most),
           once + f'\n{min(lines, key=len)}' * (n // 2 + 1), '30% of lines are duplicates')
  longest = max(lines, key=len)
  rejected(Repetition(lines=None, paragraphs=None, paragraph_characters=None, **most),
           once + f'\n{longest}' * n, '20% of characters in duplicate lines')
  paragraphs = '\n\n'.join([once] * 2)
  only = Repetition(lines=None, line_characters=None, **most)
  rejected(only, paragraphs, '30% of paragraphs are duplicates')
  assert only(once) == once


@both
def test_repeated_ngrams(prose):
  phrase = {ENGLISH: 'click here now ', CHINESE: '马上点击这里'}[prose]
  spread = lambda times: ''.join(part + phrase for part in re.split('(?<=[,，.。])', prose)) + phrase * times
  only = dict(lines=None, line_characters=None, paragraphs=None, paragraph_characters=None)
  rejected(Repetition(**only, duplicate=()), spread(60), 'of characters in one')
  rejected(Repetition(**only, top=()), prose + prose[:len(prose) // 4], 'duplicate 5-grams')
  assert Repetition(**only)(prose + prose[:len(prose) // 20])


def shares_by_loops(text, n):
  """(share of characters in the commonest n-gram, in n-grams that occurred before), word by word."""
  found = words.words(text)
  hashes, stops = words.ngrams(found, n)
  lengths, total = found.lengths.tolist(), int(found.lengths.sum())
  share = lambda covered: sum(lengths[i] for i in covered) / total
  places = {}
  for i, (h, stop) in enumerate(zip(hashes.tolist(), stops.tolist())):
    places.setdefault(h, []).append(range(i, stop))
  most = max(map(len, places.values()), default=0)
  size = lambda span: sum(lengths[i] for i in span)
  longest = max((size(spans[0]) for spans in places.values() if len(spans) == most), default=0)
  # Of n-grams as frequent and as long any may be taken: all their shares are possible.
  top = {share({*itertools.chain(*spans)}) for spans in places.values()
         if len(spans) == most > 1 and size(spans[0]) == longest} or {0.0}
  return top, share({*itertools.chain(*itertools.chain(*(spans[1:] for spans in places.values())))})


@quick
@given(st.lists(st.sampled_from(['aa', 'b', 'ccc', '中', '文', 'dd']), min_size=3, max_size=40), st.integers(1, 3))
def test_shares_of_ngrams_are_those_of_loops(units, n):
  text, off = ' '.join(units), dict(lines=None, line_characters=None, paragraphs=None, paragraph_characters=None)
  top, duplicate = shares_by_loops(text, n)
  # The shares are quotients of numbers under 100. The 1-grams that come first may narrow the search, no more.
  for most, passes in ((min(1, max(top) + 1e-6), True), (min(top) - 1e-6, False)):
    if most >= 0:
      assert (Repetition(**off, top=((n, most),), duplicate=((1, 1.0),))(text) == text) == passes
  for most, passes in ((min(1, duplicate + 1e-6), True), (duplicate - 1e-6, False)):
    if most >= 0:
      assert (Repetition(**off, top=((1, 1.0),), duplicate=((n, most),))(text) == text) == passes


def test_prose_keeps_sentences():
  lines = ['Home', 'This line is a sentence of words.', 'This one has no end', 'Too short.', '他说今天的天气非常好。',
           '首页', '"She asked us to come with her."', 'Please turn on JavaScript to read this page.',
           'Read our Privacy Policy to learn more about this.', '请先阅读并同意本网站的隐私政策再继续。']
  want = [lines[1], lines[4], lines[6]]
  assert Prose()('\n'.join(lines)) == '\n'.join(want)
  assert Prose(line_words=None)('\n'.join(lines)) == '\n'.join([lines[1], lines[3], *want[1:]])


def test_prose_drops_pages():
  text = 'One sentence of five words. '
  rejected(Prose(), text * 2, 'fewer than 3 sentences')
  assert Prose()(text * 3 + 'Here is an end.')
  rejected(Prose(), '这是一个完整的句子。' * 2, 'fewer than 3 sentences')
  assert Prose()('这是一个完整的句子。' * 3)
  rejected(Prose(), text * 4 + 'Lorem Ipsum', 'lorem ipsum')
  rejected(Prose(), text * 4 + '{', 'curly bracket')
  assert Prose()('It was so [1] and so [citation needed] in the end. ' * 3 + 'x.') == (
      'It was so  and so  in the end. ' * 3 + 'x.')


def test_text_without_change_is_the_same_object():
  text = 'One sentence of five words.\n' * 2 + 'And here is one more sentence.'
  assert Prose()(text) is text


@pytest.mark.parametrize(('make', 'words_of'), [
    (lambda: Length(None, None), 'Length has no effect'), (lambda: Quality(bullets=1.5), 'Quality.bullets=1.5'),
    (lambda: Quality(function_words=0), 'function_words=0'), (lambda: Quality(mean_length=(5, 3)), r'\(5, 3\)'),
    (lambda: Quality(None, None, None, None, None, None), 'Quality has no effect'),
    (lambda: Repetition(top=((2, 1.5),)), 'Repetition.top'),
    (lambda: Repetition(duplicate=((6, .1), (5, .1))), 'rising'),
    (lambda: Repetition(None, None, None, None, (), ()), 'Repetition has no effect'),
    (lambda: Prose(sentences=0), 'Prose.sentences=0'),
    (lambda: Prose(None, None, False, False, False, False, False, False), 'Prose has no effect')])
def test_settings_are_checked(make, words_of):
  with pytest.raises(ValueError, match=words_of):
    make()


def test_random_words_do_not_repeat():
  draw = random.Random(0)
  text = ' '.join(''.join(draw.choices('abcdefgh', k=4)) for _ in range(20_000))
  assert Repetition()(text) == text
