import pytest

from lmlib.data.cleaning import Rejected
from lmlib.data.languages import Language, codes, identified, sampled
from tests.data.prose import CHINESE, ENGLISH

TRADITIONAL = '那年夏天河水很淺，村裡的孩子們整天都在橋下的石頭上玩耍。沒有人告訴他們不要靠近那座舊磨坊。'
GERMAN = 'In jenem Sommer stand der Fluss niedrig, und die Jungen des Dorfes saßen den ganzen Tag auf den Steinen.'
JAPANESE = 'その年の夏、川の水は少なく、村の子供たちは一日中橋の下の石の上で遊んでいました。'
FRENCH = 'Cet été-là, la rivière était basse et les garçons du village passaient leurs journées sous le pont.'


@pytest.mark.parametrize(('text', 'code'), [
    (ENGLISH, 'en'), (CHINESE, 'zh'), (TRADITIONAL, 'zh'), (GERMAN, 'de'), (JAPANESE, 'ja'), (FRENCH, 'fr'),
    (ENGLISH[:112], 'en'), (CHINESE[:30], 'zh')])
def test_languages_are_told_apart_with_confidence(text, code):
  language, confidence = identified(text)
  assert language == code
  assert 0.65 < confidence <= 1


def test_written_chinese_is_one_language():
  """The model takes some short texts for Cantonese or Wu."""
  for text in ('你好', '东京大学', '天气很好', '沒有問題'):
    assert identified(text)[0] == 'zh'


def test_texts_in_other_languages_are_dropped():
  stage = Language(('zh', 'en'))
  for text in (ENGLISH, CHINESE, TRADITIONAL):
    assert stage(text) == text
  assert stage(GERMAN) == Rejected('other language', 'de')
  assert Language(('zh',))(ENGLISH) == Rejected('other language', 'en')


def test_unsure_texts_are_dropped_at_a_confidence():
  text = 'def f(x): return x + 1'
  language, confidence = identified(text)
  assert confidence < 0.65
  assert Language((language,))(text) == Rejected('confidence under 0.65', language)
  assert Language((language,), confidence=0.0)(text) == text


@pytest.mark.parametrize('text', ['', '12345 67,89', ' \n', '!?。，', '😀'])
def test_text_without_letters_is_no_language(text):
  assert identified(text) == ('zxx', 1.0)


def test_a_long_text_is_judged_from_beginning_to_end():
  text = 'x' * 100 + 'y' * 800 + 'z' * 100
  sample = sampled(text, 40)
  assert len(sample) <= 43
  assert sample.startswith('x')
  assert sample.endswith('z')
  assert sampled('short', 40) == 'short'
  menu = 'Startseite Anmelden Hilfe Suche Impressum ' * 10 + ENGLISH * 20
  assert identified(menu)[0] == 'en'


def test_settings_are_checked():
  assert {'zh', 'en', 'de', 'ja'} <= set(codes())
  assert not {'yue', 'wuu'} & set(codes())
  for make, match in ((lambda: Language(('zh', 'xx')), 'xx unknown; known: .* zh'), (lambda: Language(()), 'languages'),
                      (lambda: Language('zh'), "'zh'"), (lambda: Language(('zh',), 1.5), 'confidence=1.5'),
                      (lambda: Language(('zh',), characters=1), 'characters=1')):
    with pytest.raises(ValueError, match=match):
      make()
