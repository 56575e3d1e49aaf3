"""A dense decoder with the weights of transformers' LlamaForCausalLM, which has the same equations.

Only sizes and weights are given to either side; what each computes from them is what is compared.
"""
import jax
import jax.numpy as jnp
import numpy as np

from lmlib.models import dense

SIZES = dict(vocab=37, layers=2, width=24, hidden=40, heads=4, kv_heads=2, head_width=8, length=32)
CONFIGS = {'tied': dense.Config(**SIZES), 'untied': dense.Config(**SIZES, tied=False, rope_base=500.0)}
TOKENS_BT = np.random.default_rng(0).integers(0, SIZES['vocab'], (3, 32), np.int32)


def params(config: dense.Config, state: dict) -> dict:
  """Our weights from those of LlamaForCausalLM by name; a matrix there is (out, in), heads in front."""
  K, G, H, D = config.kv_heads, config.heads // config.kv_heads, config.head_width, config.width

  def layer(i: int) -> dict:
    w = lambda name: np.asarray(state[f'model.layers.{i}.{name}.weight'], np.float32)
    heads = lambda name, *shape: np.moveaxis(w(f'self_attn.{name}_proj').reshape(*shape, D), -1, 0)
    return {'attention_norm': {'scale': w('input_layernorm')},
            'mlp_norm': {'scale': w('post_attention_layernorm')},
            'attention': {'q': heads('q', K, G, H), 'k': heads('k', K, H), 'v': heads('v', K, H),
                          'out': w('self_attn.o_proj').T.reshape(K, G, H, D)},
            'mlp': {name: w(f'mlp.{name}_proj').T for name in ('gate', 'up', 'down')}}

  stack = lambda *leaves: jnp.asarray(np.stack(leaves))
  blocks = jax.tree.map(stack, *map(layer, range(config.layers)))
  top = {'embedding': state['model.embed_tokens.weight'], 'norm': {'scale': state['model.norm.weight']}}
  if not config.tied:
    top['output'] = np.asarray(state['lm_head.weight']).T
  return {'blocks': blocks, **jax.tree.map(jnp.asarray, top)}


def reference(config: dense.Config, seed: int):
  """Random weights by name and the logits of TOKENS_BT, BTV float32, from transformers with torch."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  theirs = LlamaForCausalLM(LlamaConfig(
      vocab_size=config.vocab, num_hidden_layers=config.layers, hidden_size=config.width,
      intermediate_size=config.hidden, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
      head_dim=config.head_width, max_position_embeddings=config.length, rms_norm_eps=1e-6,
      rope_parameters={'rope_type': 'default', 'rope_theta': config.rope_base},
      tie_word_embeddings=config.tied, attn_implementation='eager')).eval()
  random = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, weight in sorted(theirs.named_parameters()):
      centre, size = (1.0, 0.2) if 'norm' in name else (0.0, weight.shape[-1] ** -0.5)  # scales away from 1
      weight.copy_(centre + size * torch.randn(weight.shape, generator=random))
    logits_BTV = theirs(torch.from_numpy(TOKENS_BT).long()).logits
  state = {name: weight.detach().numpy() for name, weight in theirs.named_parameters()}
  return state, logits_BTV.numpy()
