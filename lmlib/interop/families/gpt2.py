"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm and biases everywhere, matrices stored as ours are."""
from lmlib.interop.decoders import THEIRS, activation
from lmlib.interop.family import Entry, Family, Said
from lmlib.models import dense
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.positions import Learned


def read(said: Said) -> dense.Config:
  """Our config of a config.json."""
  for switch, value in (('scale_attn_weights', True), ('scale_attn_by_inverse_layer_idx', False),
                        ('add_cross_attention', False)):
    said.only(switch, value, default=value)
  said.get('reorder_and_upcast_attn'), said.get('n_ctx')
  width, heads = said.get('n_embd', 768), said.get('n_head', 12)
  return dense.Config(
      vocab=said.get('vocab_size', 50257), layers=said.get('n_layer', 12), width=width,
      hidden=said.get('n_inner', 4 * width),
      heads=heads, kv_heads=heads, head_width=width // heads, length=said.get('n_positions', 1024), positions=Learned(),
      attention=AttentionStyle(bias='qkvo'), norms=Norms('layer', said.get('layer_norm_epsilon', 1e-5)),
      mlp=MlpStyle(activation(said, 'activation_function', 'gelu_new'), gated=False, bias=True),
      ends=Ends(tied=said.get('tie_word_embeddings', True)))


def write(config: dense.Config) -> dict:
  """A config.json of our config."""
  return {'vocab_size': config.vocab, 'n_layer': config.layers, 'n_embd': config.width, 'n_inner': config.hidden,
          'n_head': config.heads, 'n_positions': config.length, 'layer_norm_epsilon': config.norms.epsilon,
          'activation_function': THEIRS[config.mlp.activation], 'tie_word_embeddings': config.ends.tied}


def tensors(config: dense.Config) -> dict[str, Entry]:
  """The table of weights."""
  layer, heads = 'transformer.h.{L}.', {'q': 'KGH', 'k': 'KH', 'v': 'KH'}
  joined = lambda suffix: {f'blocks/attention/{name}{suffix}': letters for name, letters in heads.items()}
  table = {'transformer.wte.weight': Entry('V D', {'embedding': ''}),
           'transformer.wpe.weight': Entry('S D', {'position_table': ''})}
  for theirs, ours in ((f'{layer}ln_1', 'blocks/attention_norm'), (f'{layer}ln_2', 'blocks/mlp_norm'),
                       ('transformer.ln_f', 'norm')):
    table |= {f'{theirs}.weight': Entry('D', {f'{ours}/scale': ''}), f'{theirs}.bias': Entry('D', {f'{ours}/bias': ''})}
  table |= {f'{layer}attn.c_attn.weight': Entry('D +', joined('')),
            f'{layer}attn.c_attn.bias': Entry('+', joined('_bias')),
            f'{layer}attn.c_proj.weight': Entry('KGH D', {'blocks/attention/out': ''}),
            f'{layer}attn.c_proj.bias': Entry('D', {'blocks/attention/out_bias': ''}),
            f'{layer}mlp.c_fc.weight': Entry('D F', {'blocks/mlp/up': ''}),
            f'{layer}mlp.c_fc.bias': Entry('F', {'blocks/mlp/up_bias': ''}),
            f'{layer}mlp.c_proj.weight': Entry('F D', {'blocks/mlp/down': ''}),
            f'{layer}mlp.c_proj.bias': Entry('D', {'blocks/mlp/down_bias': ''})}
  return table if config.ends.tied else table | {'lm_head.weight': Entry('V D', {'output': ''})}


GPT2 = Family(('gpt2',), ('GPT2LMHeadModel',), read, write, tensors, prefixes=('transformer.',),
              ignored={r'.*attn\.(masked_)?bias': 'the mask, which is no weight'},
              copies={'lm_head.weight': 'transformer.wte.weight'})
