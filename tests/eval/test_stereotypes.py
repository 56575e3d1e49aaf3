"""Pairs and triples: shares by hand, published forms, and that likelihoods are those of whole sentences."""
import dataclasses
import json

import jax
import numpy as np
import pytest

from lmlib.data.tokenizer import Bytes
from lmlib.eval import stereotypes
from lmlib.eval.candidate import Candidate
from lmlib.eval.loglikelihood import Likelihood
from lmlib.eval.stereotypes import CrowsPairs, Pair, StereoSet, Triple, TripleScore, score_pairs, score_triples
from tests.laws.encoders import made
from tests.laws.models import CONFIGS

PAIRS = (Pair('aa', 'bbb', 'age'), Pair('c', 'c!', 'age', 'antistereo'), Pair('dddd', 'e', 'race'),
         Pair('ff', 'gg', 'race'))


def by_length(asked):
  """The shorter, the likelier."""
  return [Likelihood(-float(len(text)), False, len(text)) for _, text in asked]


def test_the_share_of_pairs():
  figures = score_pairs(PAIRS, by_length).figures()
  assert figures['stereotype_preferred'] == 0.5
  assert figures['equal'] == 1
  assert {name: one['stereotype_preferred'] for name, one in figures['categories'].items()} == {'age': 1, 'race': 0}
  assert figures['directions']['antistereo'] == {'stereotype_preferred': 1, 'stereotype_preferred_interval': [
      pytest.approx(1 / (1 + 1.959964**2)), 1], 'pairs': 1}  # Wilson, 1 of 1
  json.dumps(figures)
  one, = score_pairs(PAIRS, by_length).results('m')
  assert (one.score, one.by_group()) == (0.5, {'age': 1, 'race': 0})


def test_swapping_the_sentences_turns_the_share_round():
  pairs = tuple(pair for pair in PAIRS if len(pair.more) != len(pair.less))
  swapped = tuple(dataclasses.replace(pair, more=pair.less, less=pair.more) for pair in pairs)
  one, other = (score_pairs(some, by_length).figures()['stereotype_preferred'] for some in (pairs, swapped))
  assert one + other == pytest.approx(1)


TRIPLES = (Triple('chess', 'profession', 'a', 'bb', 'ccc'), Triple('chess', 'profession', 'bb', 'a', 'ccc'),
           Triple('chess', 'profession', 'a', 'bb', 'ccc'), Triple('nurse', 'gender', 'bb', 'ccc', 'a'))


def test_scores_are_means_over_terms():
  score = score_triples(TRIPLES, by_length, norm=None)
  assert score.ss().value == pytest.approx((2 / 3 + 1) / 2)
  assert score.lms().value == pytest.approx((1 + 0) / 2)
  assert score.icat() == pytest.approx(0.5 * (1 - 5 / 6) / 0.5)
  figures = score.figures()
  assert figures['categories']['gender']['lms'] == 0
  assert figures['categories']['profession']['icat'] == pytest.approx(1 * (1 / 3) / 0.5)
  json.dumps(figures)
  results = score.results('m')
  assert [one.score for one in results] == pytest.approx([score.lms().value, score.ss().value, score.icat()])
  assert results[0].by_group() == {'gender': 0, 'profession': 1}


def test_a_model_with_sense_and_no_preference_is_ideal():
  ideal = TripleScore((TRIPLES[0], TRIPLES[3]), ((-1.0, -2.0, -9.0), (-2.0, -1.0, -9.0)))
  assert (ideal.lms().value, ideal.ss().value, ideal.icat()) == (1, 0.5, 1)
  assert TripleScore(TRIPLES[:1], ((-1.0, -2.0, -9.0),)).icat() == 0, 'always the stereotype'


def test_likelihoods_are_a_token_s_unless_said_otherwise():
  read = lambda asked: [Likelihood(-4.0, False, len(text)) for _, text in asked]
  assert score_triples(TRIPLES[:1], read).likelihood == ((-4.0, -2.0, pytest.approx(-4 / 3)),)
  assert score_triples(TRIPLES[:1], read, norm=None).likelihood == ((-4.0, -4.0, -4.0),)


def nats(config, params, ids, behind: int) -> float:
  """Of the tokens behind the first ones, by one forward pass over a padded row."""
  row = np.zeros((1, 32), np.int32)
  row[0, :len(ids)] = ids
  logits_BTV, _ = config.model().apply({'params': params}, row)
  logp_TV = jax.nn.log_softmax(logits_BTV[0])
  return sum(float(logp_TV[t, ids[t + 1]]) for t in range(behind - 1, len(ids) - 1))


def test_a_model_is_evaluated(tmp_path):
  """Of whole sentences, or of what stands behind their context."""
  config = dataclasses.replace(CONFIGS['dense'], vocab=300, layers=1)
  params, tokenizer = made(config), Bytes().train()
  candidate = Candidate('m', config, params, tokenizer)
  whole = lambda text: nats(config, params, tokenizer.prompt(text), 1)
  (tmp_path / 'c.csv').write_text(',sent_more,sent_less,stereo_antistereo,bias_type\n'
                                  '0,old men,kids,stereo,age\n1,kids,old men,stereo,age\n2,a,b,stereo,x\n')
  evaluation = CrowsPairs(str(tmp_path / 'c.csv'), limit=2, batch=2)
  evaluation.check()
  one, = evaluation.run(candidate)
  assert one.values == (float(whole('old men') > whole('kids')), float(whole('kids') > whole('old men')))
  texts = {'stereotype': 'you lie', 'anti-stereotype': 'hm', 'unrelated': 'tree'}
  said = [{'id': '0', 'sentence': text, 'gold_label': label} for label, text in texts.items()]
  (tmp_path / 's.json').write_text(json.dumps({'data': {'intersentence': [example(context='Hi.', sentences=said)]}}))
  evaluation = StereoSet(str(tmp_path / 's.json'), 'intersentence', batch=2)
  evaluation.check()
  sense, preferred, _ = evaluation.run(candidate)
  behind = len(tokenizer.prompt('Hi.'))
  a, b, c = (nats(config, params, ids, behind) / (len(ids) - behind)
             for ids in (tokenizer.prompt(f'Hi. {text}') for text in texts.values()))
  assert (sense.values, preferred.values) == ((((a > c) + (b > c)) / 2,), (float(a > b),))


def test_what_does_not_compare_is_refused(tmp_path):
  for score, some, said in ((score_pairs, PAIRS, '1 likelihoods came back for 8'),
                            (score_triples, TRIPLES, '1 likelihoods came back for 12')):
    with pytest.raises(ValueError, match=said):
      score(some, lambda asked: [Likelihood(-1.0, False, 1)])
    with pytest.raises(ValueError, match='no sentences'):
      score((), list)
  with pytest.raises(ValueError, match='2 contexts do not fit'):
    score_pairs(PAIRS[:1], lambda asked: [Likelihood(-1.0, False, 1, cut=3)] * 2)
  for evaluation, said in ((CrowsPairs('a.csv', limit=0), 'limit=0'), (CrowsPairs('no.csv'), 'unreadable'),
                           (StereoSet('a.json', norm='bytes'), "norm='bytes'"), (StereoSet('no.json'), 'unreadable')):
    with pytest.raises(ValueError, match=said):
      evaluation.check()


def test_crows_pairs_are_read(tmp_path):
  path = tmp_path / 'crows_pairs_anonymized.csv'
  header = ',sent_more,sent_less,stereo_antistereo,bias_type,annotations,anon_writer,anon_annotators\n'
  path.write_text(f'{header}0,"He, old.",He is young.,stereo,age,[],a1,[]\n1,a,b,antistereo,disability,[],a1,[]\n')
  assert stereotypes.crows_pairs(path) == [Pair('He, old.', 'He is young.', 'age'),
                                           Pair('a', 'b', 'disability', 'antistereo')]
  path.write_text(f'{header}0,a,b,stereotype,age,[],a1,[]\n')
  with pytest.raises(ValueError, match=r"\.csv, line 2: field 'stereo_antistereo' is 'stereotype'"):
    stereotypes.crows_pairs(path)
  path.write_text(f'{header}0,,b,stereo,age,[],a1,[]\n')
  with pytest.raises(ValueError, match=r"line 2: field 'sent_more' is ''"):
    stereotypes.crows_pairs(path)


def sentences(*labels):
  return [{'id': str(i), 'sentence': f'It is {label}.', 'gold_label': label, 'labels': []}
          for i, label in enumerate(labels)]


def example(**changes):
  return {'id': 'x', 'target': 'chess player', 'bias_type': 'profession', 'context': 'He plays chess.',
          'sentences': sentences('unrelated', 'stereotype', 'anti-stereotype')} | changes


def test_stereoset_is_read(tmp_path):
  path = tmp_path / 'dev.json'
  path.write_text(json.dumps({'version': '1.0', 'data': {'intrasentence': [example()], 'intersentence': [example()]}}))
  expected = Triple('chess player', 'profession', 'It is stereotype.', 'It is anti-stereotype.', 'It is unrelated.')
  assert stereotypes.stereoset(path) == [expected]
  behind, = stereotypes.stereoset(path, 'intersentence')
  assert behind.texts[0] == ('He plays chess. ', 'It is stereotype.')


@pytest.mark.parametrize(('content', 'said'), [
    ('{', 'dev.json: not JSON'), ('[]', r"no field 'data\.intrasentence', but a JSON list"),
    ({'data': {'intrasentence': []}}, 'not a list of examples'),
    ({'data': {'intrasentence': [example(), example(sentences=sentences('stereotype', 'unrelated'))]}},
     'example 1 of intrasentence.*one of each gold_label'),
    ({'data': {'intrasentence': [example(sentences=sentences('stereotype', 'related', 'unrelated'))]}},
     "'gold_label' is 'related'"), ({'data': {'intrasentence': [example(target='')]}}, "'target' is ''"),
    ({'data': {'intrasentence': [example(sentences=['a'])]}}, "no field 'gold_label', but a JSON str")])
def test_other_forms_are_refused(tmp_path, content, said):
  path = tmp_path / 'dev.json'
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  with pytest.raises(ValueError, match=said):
    stereotypes.stereoset(path)
  with pytest.raises(ValueError, match="kind='both'"):
    stereotypes.stereoset(path, 'both')
