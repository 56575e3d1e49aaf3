"""Adapters beside PEFT and torch: what one side writes the other loads, with the same logits."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.interop import peft
from lmlib.nn import adapters
from lmlib.nn.adapters import Adapter
from lmlib.nn.ia3 import Ia3
from lmlib.nn.lora import Lora
from lmlib.nn.prompts import Prefix, Prompt, PTuning
from tests.interop.adapters import small
from tests.parity import transformers_side
from tests.parity.cases import CASES
from tests.parity.test_published import ours

TOKENS_BT = np.random.default_rng(0).integers(0, 37, (2, 7))
# peft uses what transformers calls deprecated, and warns of ways to train that are not these.
pytestmark = [pytest.mark.filterwarnings('ignore::FutureWarning'), pytest.mark.filterwarnings('ignore::UserWarning')]


@pytest.fixture(scope='module')
def package():
  transformers_side.has_transformers()
  return pytest.importorskip('peft', reason='the live comparison needs peft; .ci/run has it')


def assert_same(config, params, theirs):
  """Logits of both sides; theirs may begin with those of virtual tokens."""
  import torch
  with torch.no_grad():
    expected_BTV = theirs(input_ids=torch.from_numpy(TOKENS_BT)).logits.numpy()[:, -TOKENS_BT.shape[1]:]
  found_BTV, _ = jax.jit(config.model().apply)({'params': params}, jnp.asarray(TOKENS_BT))
  # float32 with sums in another order: each entry to 2e-5 of the largest logit.
  np.testing.assert_allclose(found_BTV, expected_BTV, rtol=0, atol=2e-5 * np.abs(expected_BTV).max())
  return expected_BTV


OURS = [
    ('llama', Lora(3, 6.0)), ('llama', Lora(2, 3.0, None, stable=True)), ('qwen2', Lora(2, 4.0, None, magnitude=True)),
    ('gpt2', Lora(2, 4.0, ('q', 'v', 'mlp/up'))), ('qwen2', Ia3()), ('gpt2', Ia3(('k', 'v'), ('down',))),
    ('llama', Prompt(3)), ('gpt2', Prompt(3)), ('llama', PTuning(3, 5)), ('llama', Prefix(3)), ('gpt2', Prefix(3, 5)),
    ('phi3', Lora(2, 4.0, ('gate', 'q')))]


@pytest.mark.parametrize(('name', 'method'), OURS, ids=[f'{name} {method}' for name, method in OURS])
def test_peft_loads_what_lmlib_writes(name, method, package, tmp_path):
  family, config, _, params = ours(CASES[name])
  adapter = Adapter(small(config, method), method)
  peft.write(tmp_path / 'adapter', adapter, family, config)
  theirs = package.PeftModel.from_pretrained(transformers_side.model(CASES[name]), tmp_path / 'adapter').eval()
  expected = assert_same(config, adapters.attach(config, params, adapter), theirs)
  plain, _ = jax.jit(config.model().apply)({'params': params}, jnp.asarray(TOKENS_BT))
  assert np.abs(plain - expected).max() > 0.01 * np.abs(expected).max()


THEIRS = {
    'lora': ('llama', 'LoraConfig', dict(r=3, lora_alpha=6, target_modules=['q_proj', 'v_proj'])),
    'rslora, ranks': ('llama', 'LoraConfig', dict(
        r=2, lora_alpha=4, use_rslora=True, target_modules='all-linear', alpha_pattern={'down_proj': 9},
        rank_pattern={'up_proj': 4, '0.self_attn.q_proj': 1})),
    'dora': ('qwen2', 'LoraConfig', dict(r=2, lora_alpha=4, use_dora=True, target_modules=['q_proj', 'o_proj'])),
    'joined': ('gpt2', 'LoraConfig', dict(r=2, lora_alpha=4, target_modules=['c_attn', 'c_fc'], fan_in_fan_out=True)),
    'one layer': ('llama', 'LoraConfig', dict(r=2, lora_alpha=4, target_modules=['q_proj'], layers_to_transform=[1])),
    'ia3': ('qwen2', 'IA3Config', dict(target_modules=['k_proj', 'v_proj', 'down_proj'],
                                       feedforward_modules=['down_proj'])),
    'prompt': ('llama', 'PromptTuningConfig', dict(num_virtual_tokens=3)),
    'p-tuning': ('gpt2', 'PromptEncoderConfig', dict(num_virtual_tokens=3, encoder_hidden_size=5)),
    'prefix': ('llama', 'PrefixTuningConfig', dict(num_virtual_tokens=3))}


@pytest.mark.parametrize('kind', THEIRS)
def test_lmlib_loads_what_peft_writes(kind, package, tmp_path):
  import torch
  name, cls, settings = THEIRS[kind]
  family, config, _, params = ours(CASES[name])
  torch.manual_seed(0)
  theirs = package.get_peft_model(transformers_side.model(CASES[name]), getattr(package, cls)(
      task_type='CAUSAL_LM', **settings))
  with torch.no_grad():
    for x in theirs.parameters():
      if x.requires_grad:
        x.add_(0.3 * torch.randn(x.shape))
  theirs.eval().save_pretrained(tmp_path)
  adapter = peft.read(tmp_path, family, config)
  assert_same(config, adapters.attach(config, params, adapter), theirs)
