"""Classifiers in folders: BERT's and RoBERTa's heads by hand, labels, and what is refused."""
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.interop import classifier, family, hf, safetensors
from lmlib.models import encoder
from lmlib.nn.positions import Learned
from lmlib.serve.classify import classify
from tests.laws.encoders import made

SIZES = dict(vocab=37, layers=1, width=16, hidden=24, heads=2, head_width=8, length=16)
BERT = encoder.Config(**SIZES, ends=encoder.Ends(predicts=False, pooler=True, classes=3))
ROBERTA = dataclasses.replace(BERT, positions=Learned(2), ends=dataclasses.replace(BERT.ends, types=1))
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'you', 'are', 'kind', 'vile', 'today']


def folder(path, kind: str = 'bert', config=BERT, **more):
  """Writes a classifier as it is published; its weights, by our names."""
  path.mkdir(exist_ok=True)
  found, params = family.find(kind), made(config)
  (path / 'config.json').write_text(json.dumps(hf.as_said(found, config) | more))
  tensors = family.tensors(found, config)
  flat = {name: np.asarray(leaf) for name, leaf in hf.trees.flat(params).items()}
  with safetensors.Writer(path, {name: (t.shape, np.dtype('float32')) for name, t in tensors.items()},
                          longest=10**9) as writer:
    for name, tensor in tensors.items():
      writer.write(name, tensor.join([flat[place.path][place.index] for place in tensor.places]))
    writer.close()
  from tokenizers import Tokenizer, models, pre_tokenizers, processors
  made_of = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token='[UNK]'))
  made_of.pre_tokenizer = pre_tokenizers.Whitespace()
  made_of.post_processor = processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
  made_of.save(str(path / 'tokenizer.json'))
  return params


@pytest.mark.parametrize(('kind', 'config'), [('bert', BERT), ('roberta', ROBERTA)])
def test_the_head_is_a_layer_and_a_softmax(tmp_path, kind, config):
  params = folder(tmp_path, kind, config, id2label={'0': 'fine', '1': 'rude', '2': 'toxic'})
  found = classifier.load(tmp_path)
  assert (found.labels, found.several, found.config) == (('fine', 'rude', 'toxic'), False, config)
  states = lambda ids: np.asarray(config.model().apply({'params': params}, jnp.array([ids]), method='encode'))[0, 0]
  texts, expected = ['you are kind', 'vile'], []
  for ids in ([2, 4, 5, 6, 3], [2, 7, 3]):
    x_F = np.tanh(states(ids) @ params['pooler'] + params['pooler_bias'])
    raised_Y = np.exp(x_F @ params['classifier'] + params['classifier_bias'])
    expected.append(raised_Y / raised_Y.sum())
  np.testing.assert_allclose(found.probabilities(texts), expected, rtol=1e-5)  # float32, sums in another order
  np.testing.assert_allclose(found.probability_of('toxic')(texts), np.array(expected)[:, 2], rtol=1e-5)
  asked = classifier.Folder(str(tmp_path), 'toxic')
  np.testing.assert_allclose(asked(texts), np.array(expected)[:, 2], rtol=1e-5)
  assert hash(asked) == hash(classifier.Folder(str(tmp_path), 'toxic'))
  with pytest.raises(ValueError, match=r"label='vile'.*fine, rude, toxic"):
    found.probability_of('vile')


def test_a_text_may_be_of_several_classes(tmp_path):
  folder(tmp_path, problem_type='multi_label_classification')
  found = classifier.load(tmp_path)
  assert found.labels == ('LABEL_0', 'LABEL_1', 'LABEL_2')
  one, = found.probabilities(['you are vile'])
  score_Y = np.log(one / (1 - one))
  alike = dataclasses.replace(found, several=False).probabilities(['you are vile'])[0]
  np.testing.assert_allclose(alike, np.exp(score_Y) / np.exp(score_Y).sum(), rtol=1e-4)  # logs of float32 sigmoids


def test_long_texts_are_refused_or_cut(tmp_path):
  folder(tmp_path)
  found = classifier.load(tmp_path)
  with pytest.raises(ValueError, match='text 0 has 22 tokens, more than length=16'):
    found.probabilities(['you ' * 20])
  np.testing.assert_allclose(found.probabilities(['you ' * 20], long='cut'), found.probabilities(['you ' * 14]))


def test_padding_and_batches_change_nothing():
  params = made(BERT)
  rows = [[2, 4, 3], [2, 7, 7, 7, 7, 3], [2, 3]]
  found = classify(BERT, params, rows)
  np.testing.assert_allclose(found, [classify(BERT, params, [row], batch=1)[0] for row in rows], rtol=1e-5)
  np.testing.assert_allclose(found, classify(BERT, params, rows, batch=2), rtol=1e-5)
  np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize(('said', 'message'), [
    ({'num_labels': 2}, 'num_labels=2, and names 3'), ({'problem_type': 'regression'}, "problem_type='regression'"),
    ({'id2label': {'0': 'a', '1': 'b', '3': 'c'}}, 'must name the classes 0 to 2'),
    ({'id2label': {'0': 'a', '1': 'b', '2': 'a'}}, 'two classes alike'), ({'id2label': {'0': 'a'}}, 'classifier')])
def test_labels_that_do_not_fit_are_refused(tmp_path, said, message):
  folder(tmp_path, **said)
  with pytest.raises(ValueError, match=message):
    classifier.load(tmp_path)


def test_other_folders_are_refused(tmp_path):
  folder(tmp_path)
  (tmp_path / 'tokenizer.json').unlink()
  with pytest.raises(ValueError, match=r'no tokenizer\.json'):
    classifier.load(tmp_path)
  plain = dataclasses.replace(BERT, ends=encoder.Ends(predicts=False, pooler=True))
  folder(tmp_path / 'plain', config=plain)
  with pytest.raises(ValueError, match=r"no classifier of texts.*BertModel"):
    classifier.load(tmp_path / 'plain')
  with pytest.raises(ValueError, match='has no classes'):
    classify(plain, made(plain), [[2, 3]])


@pytest.mark.parametrize('changes', [dict(classes=0), dict(classes=2, pooler=False), dict(classes=2, predicts=True)])
def test_ends_that_cannot_be_are_refused(changes):
  with pytest.raises(ValueError, match=r'encoder\.Ends\.classes='):
    dataclasses.replace(BERT.ends, **changes)


def test_without_classes_there_are_no_scores():
  plain = dataclasses.replace(BERT, ends=encoder.Ends(pooler=True))
  with pytest.raises(ValueError, match='classes=None'):
    plain.model().apply({'params': made(plain)}, jnp.zeros((1, 4, 16)), method='classified')


def test_a_classifier_comes_back_from_its_config():
  for kind, config in (('bert', BERT), ('roberta', ROBERTA)):
    found = family.find(kind)
    said = hf.as_said(found, config)
    assert said['architectures'] == [f'{"Bert" if kind == "bert" else "Roberta"}ForSequenceClassification']
    assert found.read(family.Said(json.loads(json.dumps(said)))) == config
