"""GPT-NeoX (Black et al. 2022) and Pythia: attention and hidden layer side by side, a quarter of each head turns."""
from lmlib.interop.decoders import THEIRS, activation, rope
from lmlib.interop.family import Entry, Family, Said
from lmlib.models import dense
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends
from lmlib.nn.mlp import MlpStyle


def read(said: Said) -> dense.Config:
  """Our config of a config.json."""
  heads, width, length = said['num_attention_heads'], said['hidden_size'], said['max_position_embeddings']
  side_by_side = said.given('use_parallel_residual', True)
  return dense.Config(
      vocab=said['vocab_size'], layers=said['num_hidden_layers'], width=width, hidden=said['intermediate_size'],
      heads=heads, kv_heads=heads, head_width=width // heads, length=length,
      positions=rope(said, length, base=float(said.get('rotary_emb_base', 10_000.0)),
                     share=said.get('rotary_pct', 0.25)),
      attention=AttentionStyle(bias='qkvo' if said.get('attention_bias', True) else ''),
      norms=Norms('layer', said.get('layer_norm_eps', 1e-5), parallel='two norms' if side_by_side else None),
      mlp=MlpStyle(activation(said, default='gelu'), gated=False, bias=True),
      ends=Ends(tied=said.get('tie_word_embeddings', False)))


def write(config: dense.Config) -> dict:
  """A config.json of our config. ValueError for positions that are scaled."""
  if config.positions.scaling is not None:
    raise ValueError(f'gpt_neox has no words for scaled positions, {config.positions.scaling}')
  return {'vocab_size': config.vocab, 'num_hidden_layers': config.layers, 'hidden_size': config.width,
          'intermediate_size': config.hidden, 'num_attention_heads': config.heads,
          'max_position_embeddings': config.length, 'rotary_emb_base': config.positions.base,
          'rotary_pct': config.positions.share, 'attention_bias': bool(config.attention.bias),
          'layer_norm_eps': config.norms.epsilon, 'use_parallel_residual': config.norms.parallel is not None,
          'hidden_act': THEIRS[config.mlp.activation], 'tie_word_embeddings': config.ends.tied}


def tensors(config: dense.Config) -> dict[str, Entry]:
  """The table of weights; queries, keys and values of a head follow one another."""
  layer, heads = 'gpt_neox.layers.{L}.', {'q': 'GH', 'k': 'H', 'v': 'H'}
  joined = lambda suffix: {f'blocks/attention/{name}{suffix}': letters for name, letters in heads.items()}
  table = {'gpt_neox.embed_in.weight': Entry('V D', {'embedding': ''})}
  for theirs, ours in ((f'{layer}input_layernorm', 'blocks/attention_norm'),
                       (f'{layer}post_attention_layernorm', 'blocks/mlp_norm'), ('gpt_neox.final_layer_norm', 'norm')):
    table |= {f'{theirs}.weight': Entry('D', {f'{ours}/scale': ''}), f'{theirs}.bias': Entry('D', {f'{ours}/bias': ''})}
  table |= {f'{layer}attention.query_key_value.weight': Entry('K+ D', joined('')),
            f'{layer}attention.dense.weight': Entry('D KGH', {'blocks/attention/out': ''})}
  if config.attention.bias:
    table |= {f'{layer}attention.query_key_value.bias': Entry('K+', joined('_bias')),
              f'{layer}attention.dense.bias': Entry('D', {'blocks/attention/out_bias': ''})}
  table |= {f'{layer}mlp.dense_h_to_4h.weight': Entry('F D', {'blocks/mlp/up': ''}),
            f'{layer}mlp.dense_h_to_4h.bias': Entry('F', {'blocks/mlp/up_bias': ''}),
            f'{layer}mlp.dense_4h_to_h.weight': Entry('D F', {'blocks/mlp/down': ''}),
            f'{layer}mlp.dense_4h_to_h.bias': Entry('D', {'blocks/mlp/down_bias': ''})}
  return table if config.ends.tied else table | {'embed_out.weight': Entry('V D', {'output': ''})}


NEOX = Family(('gpt_neox',), ('GPTNeoXForCausalLM',), read, write, tensors, prefixes=('gpt_neox.',),
              ignored={r'.*attention\.(masked_)?bias': 'the mask, which is no weight',
                       r'.*rotary_emb\.inv_freq': 'follows from the config'},
              copies={'embed_out.weight': 'gpt_neox.embed_in.weight'})
