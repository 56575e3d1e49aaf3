"""BLOOM (Le Scao et al. 2022): ALiBi in place of positions, a norm of the embedding, biases everywhere."""
from lmlib.interop.family import Entry, Family, Said
from lmlib.models import dense
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.positions import Alibi

LENGTH = 2048  # trained on; where config.json does not say


def read(said: Said) -> dense.Config:
  """Our config of a config.json."""
  said.only('apply_residual_connection_post_layernorm', False, default=False)
  for key in ('slow_but_exact', 'masked_softmax_fusion', 'bias_dropout_fusion', 'skip_bias_add', 'skip_bias_add_qkv',
              'attention_softmax_in_fp32', 'unk_token_id', 'offset_alibi'):
    said.get(key)  # of how it was trained
  width = said.get('hidden_size', said.get('n_embed', 64))
  heads = said.get('n_head', said.get('num_attention_heads', 8))
  return dense.Config(
      vocab=said.get('vocab_size', 250880), layers=said.get('n_layer', said.get('num_hidden_layers', 2)), width=width,
      hidden=4 * width, heads=heads, kv_heads=heads, head_width=width // heads, length=said.get('seq_length', LENGTH),
      positions=Alibi(), attention=AttentionStyle(bias='qkvo'), mlp=MlpStyle('gelu_tanh', gated=False, bias=True),
      norms=Norms('layer', said.get('layer_norm_epsilon', 1e-5)),
      ends=Ends(tied=said.get('tie_word_embeddings', True), norm=True))


def write(config: dense.Config) -> dict:
  """A config.json of our config."""
  if config.hidden != 4 * config.width:
    raise ValueError(f'bloom has hidden = 4 width, not hidden={config.hidden} and width={config.width}')
  return {'vocab_size': config.vocab, 'n_layer': config.layers, 'hidden_size': config.width, 'n_head': config.heads,
          'seq_length': config.length, 'layer_norm_epsilon': config.norms.epsilon,
          'tie_word_embeddings': config.ends.tied}


def tensors(config: dense.Config) -> dict[str, Entry]:
  """The table of weights; queries, keys and values of a head follow one another."""
  layer, heads = 'transformer.h.{L}.', {'q': 'GH', 'k': 'H', 'v': 'H'}
  joined = lambda suffix: {f'blocks/attention/{name}{suffix}': letters for name, letters in heads.items()}
  table = {'transformer.word_embeddings.weight': Entry('V D', {'embedding': ''})}
  for theirs, ours in (('transformer.word_embeddings_layernorm', 'embedding_norm'),
                       (f'{layer}input_layernorm', 'blocks/attention_norm'),
                       (f'{layer}post_attention_layernorm', 'blocks/mlp_norm'), ('transformer.ln_f', 'norm')):
    table |= {f'{theirs}.weight': Entry('D', {f'{ours}/scale': ''}), f'{theirs}.bias': Entry('D', {f'{ours}/bias': ''})}
  table |= {f'{layer}self_attention.query_key_value.weight': Entry('K+ D', joined('')),
            f'{layer}self_attention.query_key_value.bias': Entry('K+', joined('_bias')),
            f'{layer}self_attention.dense.weight': Entry('D KGH', {'blocks/attention/out': ''}),
            f'{layer}self_attention.dense.bias': Entry('D', {'blocks/attention/out_bias': ''}),
            f'{layer}mlp.dense_h_to_4h.weight': Entry('F D', {'blocks/mlp/up': ''}),
            f'{layer}mlp.dense_h_to_4h.bias': Entry('F', {'blocks/mlp/up_bias': ''}),
            f'{layer}mlp.dense_4h_to_h.weight': Entry('D F', {'blocks/mlp/down': ''}),
            f'{layer}mlp.dense_4h_to_h.bias': Entry('D', {'blocks/mlp/down_bias': ''})}
  return table if config.ends.tied else table | {'lm_head.weight': Entry('V D', {'output': ''})}


BLOOM = Family(('bloom',), ('BloomForCausalLM',), read, write, tensors, prefixes=('transformer.',),
               copies={'lm_head.weight': 'transformer.word_embeddings.weight'})
