"""Encoders and encoder-decoders that transformers saved become WORKDIRs and come back, with the same logits."""
import numpy as np
import pytest

from experiments import convert
from lmlib.interop import check, family, hf
from lmlib.models import encoder
from tests.parity import encoder_side
from tests.parity.encoder_cases import CASES, T5, said

pytest.importorskip('torch', reason='the live comparison needs torch and transformers; .ci/run has them')
pytest.importorskip('transformers', reason='the live comparison needs transformers; .ci/run has it')


@pytest.mark.parametrize('name', CASES)
def test_there_and_back_the_logits_are_those_of_transformers(name, tmp_path, capsys):
  encoder_side.model(CASES[name]).save_pretrained(tmp_path / 'a')
  convert.main(source=str(tmp_path / 'a'), target=str(tmp_path / 'run'))
  convert.main(source=str(tmp_path / 'run'), target=str(tmp_path / 'b'))
  assert capsys.readouterr().out.count('lmlib beside transformers: logits differ by') == 2
  a, b = (hf.read(tmp_path / folder) for folder in 'ab')
  assert a.config == b.config
  assert a.tensors.keys() == b.tensors.keys()


@pytest.mark.parametrize('architecture', ['BertModel', 'BertForPreTraining'])
def test_a_pooler_stays(architecture, tmp_path, capsys):
  """A file of BertForPreTraining has next-sentence prediction too, which is left aside."""
  encoder_side.model(CASES['bert'] | dict(architectures=[architecture])).save_pretrained(tmp_path / 'a')
  convert.main(source=str(tmp_path / 'a'), target=str(tmp_path / 'run'))
  assert 'lmlib beside transformers: logits differ by' in capsys.readouterr().out
  config, params = hf.load(tmp_path / 'a')
  assert config.ends == encoder.Ends(pooler=True, predicts=architecture == 'BertForPreTraining')
  x_BTD = config.model().apply({'params': params}, np.array([[3, 4, 5]]), method='encode')
  assert config.model().apply({'params': params}, x_BTD, method='pooled').shape == (1, 24)
  family_of, (arguments, given) = family.find('bert'), family.find('bert').probe(config)
  assert check.logits(family_of, config, params).shape[:2] == arguments[0].shape == given['input_ids'].shape


@pytest.mark.parametrize(('name', 'architecture'), [('bert', 'BertForSequenceClassification'),
                                                    ('roberta', 'RobertaForSequenceClassification')])
def test_classifiers_score_as_those_of_transformers(name, architecture, tmp_path, capsys):
  case = CASES[name] | dict(architectures=[architecture], id2label={0: 'fine', 1: 'rude', 2: 'toxic'})
  encoder_side.model(case).save_pretrained(tmp_path / 'a')
  convert.main(source=str(tmp_path / 'a'), target=str(tmp_path / 'run'))
  convert.main(source=str(tmp_path / 'run'), target=str(tmp_path / 'b'))
  assert capsys.readouterr().out.count('lmlib beside transformers: logits differ by') == 2
  a, b = (hf.read(tmp_path / folder) for folder in 'ab')
  assert a.config == b.config
  assert a.config.ends.classes == 3
  assert b.said['id2label'] == {'0': 'fine', '1': 'rude', '2': 'toxic'}


def test_t5_as_transformers_5_and_4_say_it():
  """1.1 is tied there by name and not scaled; as 4 says it, it is not tied."""
  read = lambda tensors=None, **more: family.find('t5').read(
      family.Said(said(T5 | dict(feed_forward_proj='gated-gelu') | more), tensors=tensors))
  assert not read(tie_word_embeddings=True, scale_decoder_outputs=False).ends.tied
  assert read(tie_word_embeddings=False) == read(tie_word_embeddings=True, scale_decoder_outputs=False)
  assert read(tie_word_embeddings=True, scale_decoder_outputs=True).ends.logit_scale == 24**-0.5
  with pytest.raises(ValueError, match='no T5 does both'):
    read(tie_word_embeddings=False, scale_decoder_outputs=True)
  with pytest.raises(ValueError, match=r'whose lm_head\.weight is not there'):
    read(frozenset({'shared.weight'}), scale_decoder_outputs=False)
