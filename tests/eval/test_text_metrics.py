"""Text metrics: known values, by hand where hands suffice; Chinese is not thrown away."""
import math

import pytest

from lmlib.eval import text_metrics
from lmlib.eval.text_metrics import bleu, chrf, exact_match, f1, normalised, rouge

pytest.importorskip('sacrebleu')
pytest.importorskip('rouge_score')
CAT = ['the cat sat on the mat', 'it is a guide to action']


def test_the_same_text_has_the_highest_score():
  for language, texts in (('en', CAT), ('zh', ['今天天气很好，我们去公园。', '他在北京大学学习。'])):
    given = [[text] for text in texts]
    assert bleu(texts, given, language=language)['bleu'] == pytest.approx(100)
    assert chrf(texts, given)['chrf'] == pytest.approx(100)
    assert rouge(texts, given, language=language) == {name: pytest.approx(1) for name in text_metrics.ROUGE}
    assert exact_match(texts, given, language=language) == f1(texts, given, language=language) == 1


def test_bleu_is_the_geometric_mean_of_precisions_with_brevity():
  """6 words of which 5 stand in the reference, 3 of 5 pairs, 2 of 4 threes, 1 of 3 fours; 6 words of 7."""
  text, reference = 'the cat sat on the rug', 'the cat sat on a red rug'
  shared = (5 / 6, 3 / 5, 2 / 4, 1 / 3)
  expected = 100 * math.exp(1 - 7 / 6) * math.prod(shared)**0.25
  assert bleu([text], [[reference]])['bleu'] == pytest.approx(expected)


def test_chinese_bleu_counts_characters():
  """Without cutting, a sentence is one word and half-right is all wrong."""
  text, reference = '我们明天去北京大学学习', '我们明天去北京大学工作'
  found = bleu([text], [[reference]], language='zh')
  assert found['bleu'] == pytest.approx(100 * math.prod((9 / 11, 8 / 10, 7 / 9, 6 / 8))**0.25)
  assert 'tok:zh' in found['signature']
  assert 'tok:13a' in bleu([text], [[reference]])['signature']


def test_several_references_as_many_as_there_are():
  assert bleu(CAT, [[CAT[0], 'x'], [CAT[1]]])['bleu'] == pytest.approx(100)
  assert rouge(CAT, [['x', CAT[0]], [CAT[1]]])['rouge2'] == pytest.approx(1)


def test_chrf_with_words_is_another_score():
  texts, given = ['the cats sat'], [['the cat sat']]
  assert 0 < chrf(texts, given, words=2)['chrf++'] < chrf(texts, given)['chrf'] < 100


def test_rouge_by_hand():
  """4 of 6 and 4 of 5 words shared; one pair of five and of four; in order, the, cat, mat."""
  found = rouge(['the cat sat on the mat'], [['the mat the cat likes']])
  assert found['rouge1'] == pytest.approx(2 * 4 / 11)
  assert found['rouge2'] == pytest.approx(2 * 2 / 9)
  assert found['rougeL'] == pytest.approx(2 * 2 / 11)


def test_chinese_rouge_counts_characters():
  found = rouge(['北京大学GPT4'], [['北京学校gpt4']], language='zh')
  assert found['rouge1'] == pytest.approx(4 / 5)  # 北 京 学 gpt4 of five each
  assert found['rouge2'] == pytest.approx(1 / 4)
  assert rouge(['北京大学'], [['北京大学']])['rouge1'] == 0  # what its own tokeniser makes of it


def test_stemming():
  assert rouge(['cats'], [['cat']], stemmed=True)['rouge1'] == 1
  assert rouge(['cats'], [['cat']])['rouge1'] == 0


def test_normalised_as_squad_does():
  assert normalised('The  Eiffel-Tower, an icon.') == 'eiffeltower icon'
  assert normalised('theater') == 'theater'
  assert normalised('《红楼梦》， ＡＢ１。', 'zh') == '红楼梦ab1'


def test_f1_by_hand():
  assert f1(['a red cat'], [['the red dog']]) == pytest.approx(0.5)
  assert f1(['red'], [['dog', 'red cat']]) == pytest.approx(2 / 3)
  assert f1(['cat cat cat'], [['cat']]) == pytest.approx(0.5)  # counted as often as it comes
  assert f1(['北京大学'], [['北京']], language='zh') == pytest.approx(2 / 3)
  assert f1([''], [['the']]) == 1
  assert f1([''], [['cat']]) == 0
  assert exact_match(['The cat.', 'dog'], [['cat'], ['cat', 'the dogs']]) == 0.5


@pytest.mark.parametrize(('texts', 'references', 'said'), [
    ([], [], 'as many'), (['a'], [], 'as many'), (['a'], [[]], 'at least one'), (['a'], ['a'], 'list of texts')])
@pytest.mark.parametrize('metric', [bleu, chrf, rouge, exact_match, f1])
def test_what_does_not_match_is_refused(metric, texts, references, said):
  with pytest.raises(ValueError, match=said):
    metric(texts, references)


def test_settings_without_effect_are_refused():
  with pytest.raises(ValueError, match='stemmed=True is of English'):
    rouge(['a'], [['a']], language='zh', stemmed=True)
  with pytest.raises(ValueError, match="language='de'"):
    bleu(['a'], [['a']], language='de')
