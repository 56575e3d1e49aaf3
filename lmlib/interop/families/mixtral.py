"""Mixtral (Jiang et al. 2024): Mistral with 8 experts in every block, of which a token passes two."""
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
  """Our config of a config.json."""
  found = sizes(said)
  hidden = found.pop('hidden')
  said.only('hidden_act', 'silu', default='silu')
  said.get('router_jitter_noise')  # of training
  return moe.Config(
      **found, positions=rope(said, found['length'], base=1e6),
      attention=AttentionStyle(patterns=(Pattern(window=said.get('sliding_window')),)),
      experts=Experts(said['num_local_experts'], hidden, TopK(said['num_experts_per_tok'])),
      norms=Norms(epsilon=said.get('rms_norm_eps', 1e-5)), ends=Ends(tied=said.get('tie_word_embeddings', False)))


def write(config: moe.Config) -> dict:
  """A config.json of our config."""
  experts = config.experts
  return {**said_sizes(config), **said_rope(config.positions), 'num_local_experts': experts.count,
          'num_experts_per_tok': experts.router.chosen, 'sliding_window': config.attention.patterns[0].window,
          'rms_norm_eps': config.norms.epsilon, 'hidden_act': 'silu', 'tie_word_embeddings': config.ends.tied}


def tensors(config: moe.Config) -> dict[str, Entry]:
  """The table of weights, one tensor an expert."""
  table, place = names_but_mlp(config), f'{LAYER}block_sparse_moe'
  table[f'{place}.gate.weight'] = Entry('E D', {'blocks/experts/router': ''})
  for theirs, ours, dims in (('w1', 'gate', 'F D'), ('w3', 'up', 'F D'), ('w2', 'down', 'D F')):
    table[f'{place}.experts.{{E}}.{theirs}.weight'] = Entry(dims, {f'blocks/experts/{ours}': ''})
  return table


MIXTRAL = Family(('mixtral',), ('MixtralForCausalLM',), read, write, tensors, prefixes=('model.',), ignored=INV_FREQ,
                 copies=TIED)
