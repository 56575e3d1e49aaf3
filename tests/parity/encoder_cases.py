"""Tiny encoders and encoder-decoders of transformers: a config.json each, weights drawn by name, one padded batch.

As cases.py has it for decoders; here models read with padding in the middle of nothing, and score hidden places or
the tokens of an answer.
"""
import json

import numpy as np

from tests.parity import cases

BERT = dict(vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
            max_position_embeddings=32, pad_token_id=0)
T5 = dict(model_type='t5', architectures=['T5ForConditionalGeneration'], vocab_size=37, d_model=24, d_kv=8, d_ff=40,
          num_layers=3, num_decoder_layers=2, num_heads=3, relative_attention_num_buckets=8,
          relative_attention_max_distance=9, decoder_start_token_id=0, pad_token_id=0)
CASES = {
    'bert': dict(model_type='bert', architectures=['BertForMaskedLM'], **BERT),
    'bert, tanh': dict(model_type='bert', architectures=['BertForMaskedLM'], **BERT | dict(
        hidden_act='gelu_new', num_attention_heads=4, layer_norm_eps=1e-5)),
    'roberta': dict(model_type='roberta', architectures=['RobertaForMaskedLM'], **BERT | dict(
        pad_token_id=1, max_position_embeddings=34, type_vocab_size=1, layer_norm_eps=1e-5)),
    'xlm-roberta': dict(model_type='xlm-roberta', architectures=['XLMRobertaForMaskedLM'], **BERT | dict(
        pad_token_id=1, max_position_embeddings=34, type_vocab_size=1)),
    't5 1.1': dict(**T5, feed_forward_proj='gated-gelu', tie_word_embeddings=False),
    't5 1.0': dict(**T5, feed_forward_proj='relu'),
}

REAL_BT = cases.REAL_BT  # of BERT's tokens and T5's inputs: padded on neither side, on the right, on the left
TOKENS_BT = np.random.default_rng(0).integers(2, 37, REAL_BT.shape, np.int32)
TARGETS_BT = np.random.default_rng(1).integers(2, 37, REAL_BT.shape, np.int32)
HIDDEN_BT = REAL_BT * (np.arange(12)[None] % 3 == 1)  # the places that BERT's are scored at
TYPES_BT = np.broadcast_to((np.arange(12)[None] > 5).astype(np.int32), REAL_BT.shape)
ANSWERS_BT = np.random.default_rng(2).integers(2, 37, (3, 10), np.int32)  # T5's decoder; each predicts the next
ANSWERED_BT = np.array([[1] * 10, [1] * 4 + [0] * 6, [1] * 9 + [0]], np.int32)


def said(case: dict) -> dict:
  """What config.json says of a case, as a file would give it."""
  return json.loads(json.dumps(case))


def padded(case: dict):
  """The tokens that a model reads, with its padding."""
  return np.where(REAL_BT > 0, TOKENS_BT, case['pad_token_id']).astype(np.int32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Of a tensor of theirs by its name, float32."""
  return cases.weight(name.replace('LayerNorm', 'layer_norm'), shape)
