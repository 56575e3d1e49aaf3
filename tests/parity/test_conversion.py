"""Folders that transformers wrote become WORKDIRs, and those that we write load there, with the same logits."""
import json

import numpy as np
import pytest

from experiments import convert
from lmlib import gin_text
from lmlib.data.tokenizer import ByteLevelBpe, Loaded, SentencePiece
from lmlib.interop import check, family, hf
from lmlib.models import dense, protocol
from lmlib.train.checkpoint import Checkpoints
from tests.interop.published import TEXTS

torch = pytest.importorskip('torch', reason='the live comparison needs torch and transformers; .ci/run has them')
transformers = pytest.importorskip('transformers', reason='the live comparison needs transformers; .ci/run has it')

SIZES = dict(vocab_size=300, num_hidden_layers=3, hidden_size=24, intermediate_size=40, num_attention_heads=6,
             num_key_value_heads=3, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-6)


def published(path, *, dtype='float32', shard='1GB', **settings):
  """A random model as transformers saves it."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | settings))
  for weight in model.parameters():
    weight.data += 0.1 * torch.randn_like(weight)
  model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard)


def logits(path) -> np.ndarray:
  found = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
  with torch.no_grad():
    return found(torch.arange(40).reshape(2, 20)).logits.numpy()


@pytest.mark.parametrize('settings', [
    dict(tie_word_embeddings=True), dict(tie_word_embeddings=False), dict(dtype='bfloat16', shard='20KB'),
    dict(dtype='float16', tie_word_embeddings=True, shard='20KB'),
    dict(num_attention_heads=3, num_key_value_heads=1, rope_theta=500.0)], ids=str)
def test_there_and_back_the_logits_are_transformers(tmp_path, settings, capsys):
  published(tmp_path / 'a', **settings)
  convert.main(source=str(tmp_path / 'a'), target=str(tmp_path / 'run'), dtype=None)
  convert.main(source=str(tmp_path / 'run'), target=str(tmp_path / 'b'), shard=20_000.0)
  assert capsys.readouterr().out.count('lmlib beside transformers: logits differ by') == 2
  # The same numbers in the same program.
  np.testing.assert_array_equal(logits(tmp_path / 'b'), logits(tmp_path / 'a'))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_rounded_weights_are_compared_with_those_that_were_rounded(tmp_path, dtype, capsys):
  published(tmp_path / 'a')
  convert.main(source=str(tmp_path / 'a'), target=str(tmp_path / 'run'), dtype=dtype)
  convert.main(source=str(tmp_path / 'a'), target=str(tmp_path / 'run 32'))
  convert.main(source=str(tmp_path / 'run 32'), target=str(tmp_path / 'b'), dtype=dtype)
  assert capsys.readouterr().out.count('lmlib beside transformers: logits differ by') == 3
  rounded = logits(tmp_path / 'b')
  assert 0 < np.abs(rounded - logits(tmp_path / 'a')).max() < 0.1 * np.abs(rounded).max()


def test_a_setting_that_is_read_wrongly_is_noticed(tmp_path, monkeypatch):
  """The comparison with transformers, not that of lmlib with itself."""
  published(tmp_path / 'a', rope_theta=500.0)
  llama = family.find('llama')
  monkeypatch.setattr(family, 'find', lambda _: wrong)
  wrong = family.dataclasses.replace(llama, read=lambda said: llama.read(family.Said(said | {
      'rope_parameters': {'rope_theta': 400.0, 'rope_type': 'default'}})))
  with pytest.raises(check.RunFault, match='lmlib beside transformers: logits differ by'):
    convert.main(source=str(tmp_path / 'a'), target=str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('kind', [ByteLevelBpe(pieces=300, specials=('<mark>',)), SentencePiece(pieces=300)],
                         ids=['byte level', 'SentencePiece'])
def test_what_lmlib_trained_loads_with_its_tokenizer(tmp_path, kind):
  import jax
  config = dense.Config(vocab=300, layers=2, width=16, hidden=24, heads=2, kv_heads=1, head_width=8, length=32)
  made = Checkpoints(tmp_path / 'run' / 'checkpoints')
  made.save(1, {'params': protocol.init(config, jax.random.key(0))})
  made.close()
  tokenizer = kind.train(TEXTS, 500)
  tokenizer.save(tmp_path / 'run' / 'tokenizer.model')
  (tmp_path / 'run' / 'config.gin').write_text(gin_text.macro_text({'MODEL': config}))
  convert.main(source=str(tmp_path / 'run'), target=str(tmp_path / 'out'))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  for text in (*TEXTS, 'a  b'):
    assert theirs(text)['input_ids'] == tokenizer.prompt(text), text
    assert theirs.decode(theirs(text)['input_ids'], skip_special_tokens=True) == text
  assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos, tokenizer.eos)
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['eos_token_id'] == tokenizer.eos
  assert Loaded(str(tmp_path / 'out')).load().prompt('a') == tokenizer.prompt('a')


def test_loading_gives_what_transformers_loads(tmp_path):
  published(tmp_path, dtype='bfloat16')
  _, params = hf.load(tmp_path)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  np.testing.assert_array_equal(params['embedding'], theirs.model.embed_tokens.weight.detach().numpy())
