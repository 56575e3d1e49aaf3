"""Tiny models of the families that transformers knows: a config.json each, weights drawn by name, one padded batch.

Only config.json and weights are given to either side; what each computes from them is what is compared.
"""
import json
import zlib

import numpy as np

SMALL = dict(vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=32)
THREE = SMALL | dict(num_hidden_layers=3)
MHA = {key: value for key, value in SMALL.items() if key != 'num_key_value_heads'}
GPT2 = dict(vocab_size=37, n_embd=24, n_layer=2, n_head=3, n_positions=32)

EXPERTS = SMALL | dict(moe_intermediate_size=20)
LATENT = EXPERTS | dict(num_key_value_heads=4, kv_lora_rank=6, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10)
YARN = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=8)

# What config.json says, by a name of the case: several a family where it has awkward ones.
CASES = {
    'llama': dict(model_type='llama', **SMALL, rope_theta=500.0),
    'llama, tied, odd heads, biases': dict(
        model_type='llama', **SMALL | dict(num_attention_heads=3, num_key_value_heads=1), tie_word_embeddings=True,
        attention_bias=True, mlp_bias=True, head_dim=8),
    'llama 3.1': dict(model_type='llama', **SMALL, rope_theta=500.0, rope_scaling=dict(
        rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)),
    'llama, linear': dict(model_type='llama', **SMALL, rope_scaling=dict(rope_type='linear', factor=3.0)),
    'llama, dynamic': dict(model_type='llama', **SMALL | dict(max_position_embeddings=8),
                           rope_scaling=dict(rope_type='dynamic', factor=2.0)),
    'llama, yarn': dict(model_type='llama', **SMALL, rope_scaling=dict(
        rope_type='yarn', factor=4.0, original_max_position_embeddings=8)),
    'mistral': dict(model_type='mistral', **SMALL, sliding_window=4),
    'qwen2': dict(model_type='qwen2', **SMALL, tie_word_embeddings=True),
    'qwen2, windows': dict(model_type='qwen2', **THREE, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    'qwen3': dict(model_type='qwen3', **SMALL, head_dim=10, tie_word_embeddings=True),
    'phi3': dict(model_type='phi3', **SMALL, sliding_window=5),
    'phi3, longrope': dict(model_type='phi3', **SMALL, original_max_position_embeddings=8, partial_rotary_factor=0.67,
                           rope_scaling=dict(rope_type='longrope', short_factor=[1.0, 1.5], long_factor=[2.0, 7.0])),
    'gemma': dict(model_type='gemma', **SMALL, head_dim=8),
    'gemma2': dict(model_type='gemma2', **THREE, head_dim=8, sliding_window=4, query_pre_attn_scalar=5,
                   attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    'gemma3': dict(model_type='gemma3_text', **THREE, head_dim=8, sliding_window=4, query_pre_attn_scalar=5,
                   sliding_window_pattern=3, rope_theta=1000.0, rope_local_base_freq=50.0,
                   rope_scaling=dict(rope_type='linear', factor=2.0)),
    'glm': dict(model_type='glm', **SMALL, head_dim=8),
    'glm4': dict(model_type='glm4', **SMALL, head_dim=8),
    'olmo2': dict(model_type='olmo2', **SMALL),
    'gpt2': dict(model_type='gpt2', **GPT2),
    'gpt_neox': dict(model_type='gpt_neox', **MHA, rotary_pct=0.34),
    'gpt_neox, one after the other': dict(model_type='gpt_neox', **MHA, use_parallel_residual=False, rotary_pct=1.0),
    'bloom': dict(model_type='bloom', vocab_size=37, hidden_size=24, n_layer=2, n_head=3),
    'falcon': dict(model_type='falcon', vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                   multi_query=True, parallel_attn=True, bias=False, alibi=False),
    'falcon, grouped': dict(model_type='falcon', vocab_size=37, hidden_size=24, num_hidden_layers=2,
                            num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True, ffn_hidden_size=40),
    'granite': dict(model_type='granite', **SMALL, residual_multiplier=0.4, attention_multiplier=0.3,
                    embedding_multiplier=3.0, logits_scaling=2.0),
    'cohere': dict(model_type='cohere', **SMALL | dict(num_key_value_heads=1), logit_scale=0.3),
    'mixtral': dict(model_type='mixtral', **SMALL, num_local_experts=5, num_experts_per_tok=2, sliding_window=4),
    'qwen3_moe': dict(model_type='qwen3_moe', **EXPERTS, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True,
                      head_dim=10, attention_bias=True, tie_word_embeddings=True),
    'gpt_oss': dict(model_type='gpt_oss', **THREE, num_local_experts=4, num_experts_per_tok=2, head_dim=8,
                    sliding_window=3, rope_theta=150000.0, rope_scaling=YARN | dict(truncate=False)),
    'deepseek_v2': dict(model_type='deepseek_v2', **LATENT, n_routed_experts=6, num_experts_per_tok=2, q_lora_rank=None,
                        first_k_dense_replace=1, topk_method='group_limited_greedy', n_group=3, topk_group=2,
                        routed_scaling_factor=4.0, n_shared_experts=2,
                        rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.707)),
    'deepseek_v3': dict(model_type='deepseek_v3', **LATENT, n_routed_experts=8, num_experts_per_tok=3, q_lora_rank=10,
                        first_k_dense_replace=1, n_group=4, topk_group=2, n_shared_experts=1, norm_topk_prob=True,
                        routed_scaling_factor=2.5, rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0)),
}
GENERATED = ('bos_token_id', 'eos_token_id', 'pad_token_id')

TOKENS_BT = np.random.default_rng(0).integers(0, 37, (3, 12), np.int32)
REAL_BT = np.array([[1] * 12, [1] * 7 + [0] * 5, [0] * 3 + [1] * 9], np.int32)  # padded on the right, on the left


def said(case: dict) -> dict:
  """What config.json says of a case, as a file would give it."""
  return json.loads(json.dumps(case | dict.fromkeys(GENERATED)))


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Of a tensor of theirs by its name, float32: norms near 1 (or 0), the rest small, all entries different."""
  draw = np.random.default_rng(zlib.crc32(name.encode())).random(shape) - 0.5
  if 'norm' in name or 'ln_' in name or name.endswith('bias'):
    return (0.5 * draw + (1.0 if name.endswith('weight') else 0.0)).astype(np.float32)
  return (draw * (12 / shape[-1]) ** 0.5).astype(np.float32)


def projection(name: str, gradient: np.ndarray) -> tuple[float, float]:
  """Two numbers that tell a tensor's gradient from others: its length, and a weighted sum."""
  g = np.asarray(gradient, np.float64)
  return float(np.linalg.norm(g)), float((g * weight(f'{name} projected', g.shape)).sum())
