"""OLMo 2 (2024): norms of what attention and the hidden layer put out, and of all queries and keys at once."""
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
  said.only('attention_bias', False, default=False)
  found = sizes(said)
  return dense.Config(
      **found, positions=rope(said, found['length']), attention=AttentionStyle(qk_norm='all'),
      norms=Norms(epsilon=said.get('rms_norm_eps', 1e-5), place='output'),
      ends=Ends(tied=said.get('tie_word_embeddings', False)))


def write(config: dense.Config) -> dict:
  """A config.json of our config."""
  said = without_head_dim(config, 'olmo2') | said_rope(config.positions)
  return said | {'rms_norm_eps': config.norms.epsilon, 'hidden_act': 'silu', 'tie_word_embeddings': config.ends.tied}


OLMO2 = Family(('olmo2',), ('Olmo2ForCausalLM',), read, write, functools.partial(llama_names, style='output'),
               prefixes=('model.',), ignored=INV_FREQ, copies=TIED)
