import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from lmlib.data.cleaning import Rejected
from lmlib.data.normalization import READ_AS_GBK, Normalization
from tests.data.prose import CHINESE, ENGLISH

quick = settings(max_examples=200, derandomize=True, deadline=None, database=None)
plain = Normalization(mojibake=False, lost=None)


@quick
@given(st.text(st.characters(exclude_categories=['Cs']), max_size=30), st.sampled_from(['NFC', 'NFKC']))
def test_normal_text_is_normal_and_stays(text, form):
  stage = Normalization(form, letters=form == 'NFC', mojibake=False, lost=None)
  once = stage(text)
  assert unicodedata.is_normalized(form, once)
  assert stage(once) == once
  assert '\r' not in once
  assert not {'\0', '\u200b', '\ufeff', '\u202e', '\u0085'} & {*once}


@pytest.mark.parametrize('prose', [ENGLISH, CHINESE, 'x = 1\n\tif y:\n', '👩‍👩‍👧 می‌خواهم', '①½²“…”——《》'])
def test_good_text_is_left_to_the_byte(prose):
  assert Normalization()(prose) == prose


@pytest.mark.parametrize(('text', 'want'), [
    ('cafe\u0301', 'café'), ('a\r\nb\rc\u2028d', 'a\nb\nc\nd'), ('\ufeff你\u200b好\x00\u00ad\u2060', '你好'),
    ('ＡＢｃ１２３，（好）！', 'ABc123，（好）！'), ('\u202eevil\u202c', 'evil'), ('a\x1b[0mb\x0c', 'a[0mb')])
def test_by_hand(text, want):
  assert Normalization()(text) == want


def test_forms_and_widths_are_choices():
  text = 'Ａ１，①ﬁ²'
  assert Normalization()(text) == 'A1，①ﬁ²'
  assert Normalization(letters=False)(text) == text
  assert Normalization('NFKC', letters=False)(text) == 'A1,1fi2'
  assert Normalization(invisible=False, mojibake=False)('a\u200b\r\n') == 'a\u200b\r\n'
  with pytest.raises(ValueError, match='letters=True has no effect'):
    Normalization('NFKC')
  with pytest.raises(ValueError, match="form='NFD'"):
    Normalization('NFD')
  with pytest.raises(ValueError, match='lost=2'):
    Normalization(lost=2)


def test_a_c1_control_is_a_line_end_or_what_windows_meant():
  assert plain('a\u0085b') == 'a\nb'
  assert Normalization()('wait\u0085 it\u0092s') == 'wait… it’s'


@pytest.mark.parametrize('text', ['“It’s café time” — naïve', '中文内容，测试一下', CHINESE])
def test_utf8_read_as_a_western_encoding_is_mended(text):
  broken = text.encode().decode('latin-1')
  assert Normalization(invisible=False)(broken) == text
  assert Normalization(mojibake=False, invisible=False, lost=None)(broken) == broken


def test_utf8_read_as_gbk_is_mended_line_by_line():
  good, tried = '这一行是好的，没有问题。', 0
  for start in range(len(CHINESE) - 12):
    text = CHINESE[start:start + 12]
    try:
      broken = text.encode().decode('gb18030')
    except UnicodeError:
      continue  # what GBK could not read has lost characters, and is no case
    if '\n' not in text and READ_AS_GBK.search(broken):
      tried += 1
      assert Normalization()(f'{good}\n{broken}\nplain') == f'{good}\n{text}\nplain'
  assert tried > 10


def test_what_is_not_certain_is_left():
  exclamation = '！！'.encode().decode('gb18030')  # three characters: too few to be sure
  assert READ_AS_GBK.search(exclamation)
  assert Normalization()(exclamation) == exclamation
  assert Normalization()(exclamation * 2) == '！！！！'
  tried = 0
  for start in range(len(CHINESE) - 12):  # the bytes make sense, but of another script
    try:
      broken = (CHINESE[start:start + 10] + 'жжж').encode().decode('gb18030')
    except UnicodeError:
      continue
    if '\n' not in broken and READ_AS_GBK.search(broken):
      tried += 1
      assert Normalization(letters=False)(broken) == broken
  assert tried > 3


@pytest.mark.parametrize('text', ['联通', '一乙二十丁厂七卜', '鐨是个生僻字，写在这里不应当改动。',
                                  '锛与涓都是汉字', 'Ärger über Öl, naïve façade'])
def test_what_only_looks_like_mojibake_is_left(text):
  assert Normalization()(text) == text


def test_text_that_lost_its_characters_is_dropped():
  assert Normalization()('锟斤拷烫烫烫锟斤拷') == Rejected('lost characters')
  assert Normalization()('caf\ufffd au lait') == Rejected('lost characters')
  long = CHINESE * 10 + '\ufffd'
  assert Normalization()(long) == long
  assert Normalization(lost=None)('\ufffd') == '\ufffd'
