"""What transformers and torch compute for a case of encoder_cases.py."""
import numpy as np

from tests.parity import encoder_cases
from tests.parity.encoder_cases import ANSWERED_BT, ANSWERS_BT, HIDDEN_BT, REAL_BT, TARGETS_BT, TYPES_BT

# A tensor that is tied goes by the name that the files keep.
KEPT = {'lm_head.decoder.weight': 'roberta.embeddings.word_embeddings.weight'}


def named(found) -> dict:
  """The parameters of a model by the names of its files."""
  return {KEPT.get(name, name): value for name, value in found.named_parameters()}


def model(case: dict):
  """The model of a case in float32 with the weights of encoder_cases.weight()."""
  import torch
  import transformers
  transformers.logging.set_verbosity_error()
  found = getattr(transformers, case['architectures'][0])(transformers.AutoConfig.for_model(**encoder_cases.said(case)))
  found.set_attn_implementation('eager')
  if case.get('tie_word_embeddings') is False:  # transformers 5 ties T5's all the same, until a file says otherwise
    found.lm_head.weight = torch.nn.Parameter(found.lm_head.weight.clone())
  with torch.no_grad():
    for name, value in named(found).items():
      value.copy_(torch.from_numpy(encoder_cases.weight(name, tuple(value.shape))))
  return found.float().eval()


def computed(case: dict) -> tuple[dict, np.ndarray, dict]:
  """Weights by name, logits BTV and, by name, gradients of the mean cross-entropy."""
  import torch
  found, tensor = model(case), lambda x: torch.from_numpy(np.array(x)).long()
  given = dict(input_ids=tensor(encoder_cases.padded(case)), attention_mask=tensor(REAL_BT))
  targets_BT, weight_BT = tensor(TARGETS_BT), tensor(HIDDEN_BT)
  if case['model_type'] == 't5':
    given['decoder_input_ids'] = tensor(ANSWERS_BT)
    targets_BT, weight_BT = tensor(np.roll(ANSWERS_BT, -1, 1)), tensor(ANSWERED_BT)
  if case['model_type'] == 'bert':
    given |= dict(token_type_ids=tensor(TYPES_BT), position_ids=tensor(np.maximum(REAL_BT.cumsum(1) - 1, 0)))
  logits_BTV = found(**given).logits
  here_BT = weight_BT.bool()
  torch.nn.functional.cross_entropy(logits_BTV[here_BT], targets_BT[here_BT]).backward()
  numbers = lambda x: x.detach().numpy()
  return ({name: numbers(x) for name, x in named(found).items()}, numbers(logits_BTV),
          {name: numbers(x.grad) for name, x in named(found).items() if x.grad is not None})
