"""Toxicity: estimates are means over all choices, words are found in sentences, published forms are read."""
import dataclasses
import itertools
import json

import numpy as np
import pytest

from lmlib.data.tokenizer import Bytes
from lmlib.eval import scoreboard, toxicity
from lmlib.eval.candidate import Candidate
from lmlib.eval.toxicity import Prompt, Score, Toxicity, WordList, expected_maximum, score
from tests.laws.encoders import made
from tests.laws.models import CONFIGS

PROMPTS = (Prompt('a', ('x',)), Prompt('b', ('x', 'y')), Prompt('c'))


def numbers(texts):
  """A classifier that reads the number that a text is."""
  return [float(text) for text in texts]


def test_the_expected_maximum_is_the_mean_over_all_choices():
  values = [0.3, 0.9, 0.1, 0.3, 0.7]
  for k in range(1, 6):
    chosen = [max(some) for some in itertools.combinations(values, k)]
    assert expected_maximum(values, k) == pytest.approx(sum(chosen) / len(chosen))
  with pytest.raises(ValueError, match='k=6'):
    expected_maximum(values, 6)


def test_it_grows_with_k_and_lies_between_mean_and_maximum():
  values = np.random.default_rng(0).uniform(size=25).tolist()
  found = [expected_maximum(values, k) for k in range(1, 26)]
  assert found == sorted(found)
  assert (found[0], found[-1]) == (pytest.approx(np.mean(values)), max(values))


def test_figures_by_hand():
  given = iter(['0.2', '0.9', '0.5', '0.1', '0.1', ' '])
  found = score(PROMPTS, numbers, lambda asked: [next(given) for _ in asked], samples=2)
  assert found.toxicity == ((0.2, 0.9), (0.5, 0.1), (0.1, 0.0))
  figures = found.figures()
  assert figures['expected_maximum'] == pytest.approx((0.9 + 0.5 + 0.1) / 3)
  assert figures['toxic_probability'] == pytest.approx(2 / 3)
  assert figures['toxic_share'] == pytest.approx(2 / 6)
  assert (figures['samples'], figures['empty'], figures['k']) == (6, 1, 2)
  assert figures['by_group'].keys() == {'x', 'y'}
  assert figures['by_group']['x']['expected_maximum'] == pytest.approx(0.7)
  assert figures['by_group']['y']['toxic_probability'] == 1
  low, high = figures['expected_maximum_interval']
  assert low <= figures['expected_maximum'] <= high
  one = dataclasses.replace(found, k=1)
  assert one.figures()['expected_maximum'] == pytest.approx(1.8 / 6)
  assert one.figures()['toxic_probability'] == pytest.approx(2 / 6)
  json.dumps(figures)


def test_every_sample_is_of_its_prompt():
  asked = []
  score(PROMPTS, lambda texts: [0.5] * len(texts), lambda prompts: asked.extend(prompts) or prompts, samples=3)
  assert asked == ['a'] * 3 + ['b'] * 3 + ['c'] * 3


def test_models_stand_side_by_side():
  scores = {name: Score(PROMPTS, ((worst,) * 4,) * 3, 4) for name, worst in (('kind', 0.1), ('vile', 0.8))}
  results = [one for name, found in scores.items() for one in found.results(name)]
  assert [one.metric for one in results[:2]] == ['expected maximum of 4', 'probability of one toxic in 4']
  assert results[2].score == pytest.approx(0.8)
  assert '**0.1**' in scoreboard.markdown(results)
  assert results[0].groups is None, 'the third prompt has none'
  assert Score(PROMPTS[:2], ((0.1,), (0.7,)), 1).results('m')[1].by_group() == {'x': 0.5}


def test_a_word_list_finds_words():
  judge = WordList(('vile fool', '混蛋'))
  assert judge(['You VILE  fool!', 'vile foolery', '你这个混蛋。', 'a fool, vile']) == [1, 0, 1, 0]
  with pytest.raises(ValueError, match=r'WordList\.words=\(\)'):
    WordList()


@pytest.mark.parametrize(('changes', 'said'), [
    (dict(form='x'), "form='x' must be one of real_toxicity_prompts, toxigen"), (dict(k=26), 'k=26 must lie between 1'),
    (dict(samples=0), 'samples=0'), (dict(k=0), 'k=0'), (dict(threshold=0.0), r'threshold=0\.0'),
    (dict(temperature=0.0), r'temperature=0\.0 must be above 0'), (dict(limit=0), 'limit=0'), (dict(new=0), 'new=0'),
    (dict(path='no.jsonl'), r'no\.jsonl: unreadable'), (dict(classifier=lambda texts: [2.0]), 'among them 2.0')])
def test_settings_that_cannot_be_are_refused(tmp_path, changes, said):
  (tmp_path / 'p.jsonl').write_text('{"prompt": {"text": "a", "toxicity": 0.1}}\n')
  fine = dict(path=str(tmp_path / 'p.jsonl'), classifier=WordList(('a',)))
  Toxicity(**fine).check()
  with pytest.raises(ValueError, match=said):
    Toxicity(**fine | changes).check()


def test_what_cannot_be_judged_is_refused():
  for classifier, said in ((lambda texts: [0.5], 'it gave 1'), (lambda texts: [1.5] * len(texts), 'among them 1.5'),
                           (lambda texts: [float('nan')] * len(texts), 'among them nan')):
    with pytest.raises(ValueError, match=f'each of 3 texts a probability from 0 to 1.*{said}'):
      score(PROMPTS, classifier, lambda prompts: prompts, samples=1)
  with pytest.raises(ValueError, match='1 continuations came back for 3'):
    score(PROMPTS, numbers, lambda prompts: ['1'], samples=1)
  with pytest.raises(ValueError, match='no prompts'):
    score((), numbers, list)


def test_a_model_is_evaluated(tmp_path):
  """Each prompt's samples are the model's own draws; a word list that holds all letters finds any of them."""
  config = dataclasses.replace(CONFIGS['dense'], vocab=300, layers=1)
  (tmp_path / 'p.jsonl').write_text(''.join(f'{{"prompt": {{"text": "{text}", "toxicity": {toxicity}}}}}\n'
                                            for text, toxicity in (('The man', 0.1), ('You', 0.9), ('She', 0.2))))
  seen = []
  judge = lambda texts: [seen.append(text) or float(len(text) % 2) for text in texts]
  evaluation = Toxicity(str(tmp_path / 'p.jsonl'), judge, samples=3, k=2, new=4, limit=2, batch=6)
  worst, some = evaluation.run(Candidate('m', config, made(config), Bytes().train()))
  assert len(worst.values) == 2
  assert worst.facts['samples'] == 6
  assert len({*seen}) > 1
  assert worst.groups == ('non-toxic prompts', 'toxic prompts')
  assert some.values == pytest.approx(worst.values), 'of probabilities 0 and 1 the maximum is whether there is one'


def test_real_toxicity_prompts_are_read(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  line = lambda toxicity, hard: json.dumps({
      'filename': '0.txt', 'begin': 0, 'end': 9, 'challenging': hard,
      'prompt': {'text': 'The man', 'toxicity': toxicity, 'profanity': 0.1}, 'continuation': {'text': ' went'}})
  path.write_text('\n'.join([line(0.29, False), line(0.5, True), line(None, False)]))
  assert toxicity.real_toxicity_prompts(path) == [
      Prompt('The man', ('non-toxic prompts',)), Prompt('The man', ('toxic prompts', 'challenging prompts')),
      Prompt('The man', ('unscored prompts',))]
  path.write_text(line(0.2, False) + '\n' + line(7, False))
  with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2: field 'prompt\.toxicity' is 7"):
    toxicity.real_toxicity_prompts(path)
  path.write_text('{"prompt": "The man"}')
  with pytest.raises(ValueError, match=r"line 1: no field 'prompt\.toxicity'"):
    toxicity.real_toxicity_prompts(path)


def test_toxigen_is_read(tmp_path):
  path = tmp_path / 'toxigen.jsonl'
  path.write_text('{"prompt": "- they are kind\\\\n-", "generation": "x", "group": "asian", "prompt_label": 0}\n'
                  '{"prompt": "- b", "generation": "y", "group": "women", "prompt_label": 1}\n')
  assert [one.groups for one in toxicity.toxigen(path)] == [('asian', 'neutral prompts'), ('women', 'toxic prompts')]
  path.write_text('{"prompt": "- b", "group": "women", "prompt_label": 2}\n')
  with pytest.raises(ValueError, match=r"toxigen\.jsonl, line 1: field 'prompt_label' is 2, none of 0, 1"):
    toxicity.toxigen(path)
