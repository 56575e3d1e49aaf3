"""Phi-3 and Phi-4 mini (Abdin et al. 2024): LLaMA whose projections from one input are one tensor."""
import dataclasses

from lmlib.interop.decoders import INV_FREQ, LAYER, TIED, llama_names, rope, said_rope, said_sizes, sizes
from lmlib.interop.family import Entry, Family, Said
from lmlib.kernels.attention import Pattern
from lmlib.models import dense
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends


def read(said: Said) -> dense.Config:
  """Our config of a config.json."""
  said.only('hidden_act', 'silu', default='silu')
  found = sizes(said)
  return dense.Config(
      **found, positions=rope(said, found['length']), norms=Norms(epsilon=said.get('rms_norm_eps', 1e-5)),
      attention=AttentionStyle(patterns=(Pattern(window=said.get('sliding_window')),)),
      ends=Ends(tied=said.get('tie_word_embeddings', False)))


def write(config: dense.Config) -> dict:
  """A config.json of our config."""
  said = said_sizes(config) | said_rope(config.positions)
  if config.head_width * config.heads == config.width:
    del said['head_dim']
  return said | {'rms_norm_eps': config.norms.epsilon, 'hidden_act': 'silu', 'tie_word_embeddings': config.ends.tied,
                 'sliding_window': config.attention.patterns[0].window}


def tensors(config: dense.Config) -> dict[str, Entry]:
  """The table of weights."""
  apart = ('q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj')
  table = {name: entry for name, entry in llama_names(dataclasses.replace(config, attention=AttentionStyle())).items()
           if not name.endswith(tuple(f'{part}.weight' for part in apart))}
  q, k, v, gate, up = (f'blocks/{path}' for path in ('attention/q', 'attention/k', 'attention/v', 'mlp/gate', 'mlp/up'))
  return table | {f'{LAYER}self_attn.qkv_proj.weight': Entry('+ D', {q: 'KGH', k: 'KH', v: 'KH'}),
                  f'{LAYER}mlp.gate_up_proj.weight': Entry('+ D', {gate: 'F', up: 'F'})}


PHI3 = Family(('phi3',), ('Phi3ForCausalLM',), read, write, tensors, prefixes=('model.',), ignored=INV_FREQ,
              copies=TIED)
