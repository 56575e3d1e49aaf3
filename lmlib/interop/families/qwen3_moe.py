"""Qwen3-MoE (2025): Qwen 3 with 128 experts in every block, of which a token passes eight."""
from lmlib.interop.decoders import INV_FREQ, LAYER, TIED, names_but_mlp, rope, said_rope, said_sizes, sizes
from lmlib.interop.family import Entry, Family, Said
from lmlib.kernels.attention import Pattern
from lmlib.models import moe
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends
from lmlib.nn.moe import Experts
from lmlib.nn.router import TopK


def read(said: Said) -> moe.Config:
  """Our config of a config.json. ValueError if some blocks have no experts."""
  found = sizes(said)
  found.pop('hidden')  # of blocks without experts
  said.only('hidden_act', 'silu', default='silu')
  said.only('decoder_sparse_step', 1, default=1)
  said.only('mlp_only_layers', [], default=[])
  said.get('max_window_layers')  # which no code reads
  count = said['num_experts'] if 'num_experts' in said else said['num_local_experts']
  return moe.Config(
      **found, positions=rope(said, found['length']),
      attention=AttentionStyle(bias='qkvo' if said.get('attention_bias', False) else '', qk_norm='head', patterns=(
          Pattern(window=said.get('sliding_window') if said.get('use_sliding_window', False) else None),)),
      experts=Experts(count, said['moe_intermediate_size'],
                      TopK(said['num_experts_per_tok'], normalised=said.get('norm_topk_prob', False))),
      norms=Norms(epsilon=said.get('rms_norm_eps', 1e-6)), ends=Ends(tied=said.get('tie_word_embeddings', False)))


def write(config: moe.Config) -> dict:
  """A config.json of our config."""
  experts, window = config.experts, config.attention.patterns[0].window
  return {**said_sizes(config), **said_rope(config.positions), 'num_experts': experts.count,
          'num_experts_per_tok': experts.router.chosen, 'moe_intermediate_size': experts.hidden,
          'norm_topk_prob': experts.router.normalised, 'decoder_sparse_step': 1, 'mlp_only_layers': [],
          'use_sliding_window': window is not None, 'sliding_window': window, 'rms_norm_eps': config.norms.epsilon,
          'attention_bias': bool(config.attention.bias), 'hidden_act': 'silu', 'tie_word_embeddings': config.ends.tied}


def tensors(config: moe.Config) -> dict[str, Entry]:
  """The table of weights, one tensor an expert."""
  table = names_but_mlp(config)
  table[f'{LAYER}mlp.gate.weight'] = Entry('E D', {'blocks/experts/router': ''})
  for name, dims in (('gate', 'F D'), ('up', 'F D'), ('down', 'D F')):
    table[f'{LAYER}mlp.experts.{{E}}.{name}_proj.weight'] = Entry(dims, {f'blocks/experts/{name}': ''})
  return table


QWEN3_MOE = Family(('qwen3_moe',), ('Qwen3MoeForCausalLM',), read, write, tensors, prefixes=('model.',),
                   ignored=INV_FREQ, copies=TIED)
