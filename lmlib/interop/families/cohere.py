"""Command R (Cohere 2024), the published family nearest to PaLM: one norm, attention and hidden layer side by side.

With one key head and RMSNorm it is PaLM (Chowdhery et al. 2022), of which there are no published weights.
"""
import functools

from lmlib.interop.decoders import INV_FREQ, TIED, llama_names, rope, said_rope, sizes, without_head_dim
from lmlib.interop.family import Family, Said
from lmlib.models import dense
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends


def read(said: Said) -> dense.Config:
  """Our config of a config.json."""
  said.only('hidden_act', 'silu', default='silu')
  said.only('use_qk_norm', False, default=False)
  found, scale = sizes(said), said.get('logit_scale', 0.0625)
  return dense.Config(
      **found, positions=rope(said, found['length'], base=500_000.0, neighbours=True),
      attention=AttentionStyle(bias='qkvo' if said.get('attention_bias', False) else ''),
      norms=Norms('layer', said.get('layer_norm_eps', 1e-5), bias=False, parallel='one norm'),
      ends=Ends(tied=said.get('tie_word_embeddings', True), logit_scale=None if scale == 1 else scale))


def write(config: dense.Config) -> dict:
  """A config.json of our config."""
  said = without_head_dim(config, 'cohere') | said_rope(config.positions)
  return said | {'layer_norm_eps': config.norms.epsilon, 'hidden_act': 'silu',
                 'logit_scale': config.ends.logit_scale or 1.0, 'attention_bias': bool(config.attention.bias),
                 'tie_word_embeddings': config.ends.tied, 'use_qk_norm': False}


COHERE = Family(('cohere',), ('CohereForCausalLM',), read, write, functools.partial(llama_names, style='one'),
                prefixes=('model.',), ignored=INV_FREQ, copies=TIED)
