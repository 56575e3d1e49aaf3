"""What transformers and torch compute for a case: weights by name, logits and gradients."""
import importlib

import numpy as np

from tests.parity.cases import REAL_BT, TOKENS_BT, said, weight

# What a model in memory calls otherwise than its files do.
RENAMED = {('gpt_neox', 'lm_head.weight'): 'embed_out.weight'}


def published(model_type: str, name: str, value) -> list[tuple[str, object]]:
  """What files hold of a model's weight or its gradient: names and views; experts, one array there, are apart."""
  place, experts, what = name.partition('.mlp.experts.')
  if not experts or model_type == 'gpt_oss':
    if model_type == 'mixtral':
      name = name.replace('.mlp.gate.', '.block_sparse_moe.gate.')
    return [(RENAMED.get((model_type, name), name), value)]
  names = {'gate_up_proj': ('gate_proj', 'up_proj'), 'down_proj': ('down_proj',)}[what]
  if model_type == 'mixtral':
    place, names = f'{place}.block_sparse_moe', {'gate_up_proj': ('w1', 'w3'), 'down_proj': ('w2',)}[what]
  else:
    place = f'{place}.mlp'
  return [(f'{place}.experts.{e}.{name}.weight', part) for e, expert in enumerate(value)
          for name, part in zip(names, expert.chunk(len(names)))]


def arrays(found):
  """What of a model files hold: weights, and the offsets of a router, which are none to torch."""
  return [*found.named_parameters(), *((name, x) for name, x in found.named_buffers() if 'e_score_correction' in name)]


def model(case: dict):
  """The model of a case in float32 with the weights of cases.weight()."""
  import torch
  import transformers
  transformers.logging.set_verbosity_error()
  config = transformers.AutoConfig.for_model(**said(case))
  config._attn_implementation = 'eager'
  found = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').float().eval()
  with torch.no_grad():
    for in_memory, value in arrays(found):
      for name, part in published(case['model_type'], in_memory, value):
        part.copy_(torch.from_numpy(weight(name, tuple(part.shape))))
  return found


def computed(case: dict) -> tuple[dict, np.ndarray, dict]:
  """Weights by name, logits BTV and, by name, gradients of the mean cross-entropy of next tokens."""
  import torch
  found = model(case)
  tokens_BT, real_BT = torch.from_numpy(TOKENS_BT).long(), torch.from_numpy(REAL_BT).long()
  arguments = dict(input_ids=tokens_BT, attention_mask=real_BT)
  if case['model_type'] != 'bloom':
    arguments['position_ids'] = (real_BT.cumsum(1) - 1).clamp(min=0)
  if case.get('rope_scaling', {}).get('rope_type') in ('dynamic', 'longrope'):
    # There a row's positions depend on the longest of its batch; ours on its own alone.
    logits_BTV = torch.zeros(*TOKENS_BT.shape, found.config.vocab_size)
    for b, real_T in enumerate(real_BT.bool()):
      logits_BTV[b, real_T] = found(tokens_BT[b:b + 1, real_T], use_cache=False).logits[0]
  else:
    logits_BTV = found(**arguments, use_cache=False).logits
  both_BT = (real_BT[:, :-1] * real_BT[:, 1:]).bool()
  loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1][both_BT], tokens_BT[:, 1:][both_BT])
  loss.backward()
  numbers = lambda x: x.detach().numpy()
  kind = case['model_type']
  named = dict(pair for name, x in arrays(found) for pair in published(kind, name, x))
  gradients = [(name, x.grad) for name, x in found.named_parameters() if x.grad is not None]
  return ({name: numbers(x) for name, x in named.items()}, numbers(logits_BTV),
          {name: numbers(x) for in_memory, g in gradients for name, x in published(kind, in_memory, g)})


def has_transformers():
  import pytest
  for name in ('torch', 'transformers'):
    pytest.importorskip(name, reason=f'the live comparison needs {name}; .ci/run has it')
  return importlib.import_module('transformers')
