"""GLM-4 (Team GLM 2024) as transformers has it and as ChatGLM published it: half of each head turns, in neighbours.

Its prefix language modelling is a mask, not a weight: give prefix_BT (Du et al. 2022).
"""
from lmlib.interop.decoders import INV_FREQ, LAYER, TIED, llama_names, rope, said_rope, said_sizes, sizes
from lmlib.interop.family import Entry, Family, Said
from lmlib.models import dense
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends
from lmlib.nn.positions import Rope

EPSILON = 1.5625e-07


def _read(said: Said, place: str) -> dense.Config:
  said.only('hidden_act', 'silu', default='silu')
  found = sizes(said if 'head_dim' in said else Said({**said, 'head_dim': 128}))
  return dense.Config(
      **found, positions=rope(said, found['length'], share=0.5, neighbours=True),
      attention=AttentionStyle(bias='qkv' if said.get('attention_bias', True) else ''),
      norms=Norms(epsilon=said.get('rms_norm_eps', EPSILON), place=place),
      ends=Ends(tied=said.get('tie_word_embeddings', False)))


def read_glm(said: Said) -> dense.Config:
  """Our config of a config.json."""
  return _read(said, 'pre')


def read_glm4(said: Said) -> dense.Config:
  """As read_glm, with norms on both sides."""
  return _read(said, 'both')


def write(config: dense.Config) -> dict:
  """A config.json of our config."""
  return {**said_sizes(config), **said_rope(config.positions, share=0.5), 'rms_norm_eps': config.norms.epsilon,
          'hidden_act': 'silu', 'attention_bias': bool(config.attention.bias), 'tie_word_embeddings': config.ends.tied}


def _joined(table: dict[str, Entry]) -> dict[str, Entry]:
  """The table with gate and up in one tensor."""
  table = {name: entry for name, entry in table.items() if 'mlp.gate_proj' not in name and 'mlp.up_proj' not in name}
  return table | {f'{LAYER}mlp.gate_up_proj.weight': Entry('+ D', {'blocks/mlp/gate': 'F', 'blocks/mlp/up': 'F'})}


def tensors_glm(config: dense.Config) -> dict[str, Entry]:
  """The table of weights."""
  return _joined(llama_names(config))


def tensors_glm4(config: dense.Config) -> dict[str, Entry]:
  """The table of weights, with the norms of outputs."""
  return _joined(llama_names(config, style='glm4'))


def read_chatglm(said: Said) -> dense.Config:
  """Our config of a config.json of ChatGLM 2 and 3 and the first GLM-4, whose code came with the weights."""
  for switch, value in (('rmsnorm', True), ('post_layer_norm', True), ('add_bias_linear', False),
                        ('apply_residual_connection_post_layernorm', False), ('original_rope', True)):
    said.only(switch, value, default=value)
  heads = said['num_attention_heads']
  groups = said.get('multi_query_group_num', heads) if said.get('multi_query_attention', False) else heads
  return dense.Config(
      vocab=said['padded_vocab_size'], layers=said['num_layers'], width=said['hidden_size'],
      hidden=said['ffn_hidden_size'], heads=heads, kv_heads=groups, head_width=said['kv_channels'],
      length=said['seq_length'], positions=Rope(10_000.0 * said.get('rope_ratio', 1), 0.5, neighbours=True),
      attention=AttentionStyle(bias='qkv' if said.get('add_qkv_bias', False) else ''),
      norms=Norms(epsilon=said.get('layernorm_epsilon', 1e-5)), ends=Ends(tied=said.get('tie_word_embeddings', False)))


def write_chatglm(config: dense.Config) -> dict:
  """A config.json of our config."""
  return {'padded_vocab_size': config.vocab, 'num_layers': config.layers, 'hidden_size': config.width,
          'ffn_hidden_size': config.hidden, 'num_attention_heads': config.heads, 'multi_query_attention': True,
          'multi_query_group_num': config.kv_heads, 'kv_channels': config.head_width, 'seq_length': config.length,
          'rope_ratio': config.positions.base / 10_000.0, 'add_qkv_bias': bool(config.attention.bias),
          'layernorm_epsilon': config.norms.epsilon, 'rmsnorm': True, 'post_layer_norm': True, 'original_rope': True,
          'add_bias_linear': False, 'tie_word_embeddings': config.ends.tied}


def tensors_chatglm(config: dense.Config) -> dict[str, Entry]:
  """The table of weights."""
  layer, heads = 'transformer.encoder.layers.{L}.', {'q': 'KGH', 'k': 'KH', 'v': 'KH'}
  joined = lambda suffix: {f'blocks/attention/{name}{suffix}': letters for name, letters in heads.items()}
  table = {
      'transformer.embedding.word_embeddings.weight': Entry('V D', {'embedding': ''}),
      f'{layer}input_layernorm.weight': Entry('D', {'blocks/attention_norm/scale': ''}),
      f'{layer}self_attention.query_key_value.weight': Entry('+ D', joined('')),
      f'{layer}self_attention.dense.weight': Entry('D KGH', {'blocks/attention/out': ''}),
      f'{layer}post_attention_layernorm.weight': Entry('D', {'blocks/mlp_norm/scale': ''}),
      f'{layer}mlp.dense_h_to_4h.weight': Entry('+ D', {'blocks/mlp/gate': 'F', 'blocks/mlp/up': 'F'}),
      f'{layer}mlp.dense_4h_to_h.weight': Entry('D F', {'blocks/mlp/down': ''}),
      'transformer.encoder.final_layernorm.weight': Entry('D', {'norm/scale': ''})}
  if config.attention.bias:
    table[f'{layer}self_attention.query_key_value.bias'] = Entry('+', joined('_bias'))
  if not config.ends.tied:
    table['transformer.output_layer.weight'] = Entry('V D', {'output': ''})
  return table


COMMON = dict(prefixes=('model.',), ignored=INV_FREQ, copies=TIED)
GLM = Family(('glm',), ('GlmForCausalLM',), read_glm, write, tensors_glm, **COMMON)
GLM4 = Family(('glm4',), ('Glm4ForCausalLM',), read_glm4, write, tensors_glm4, **COMMON)
CHATGLM = Family(('chatglm',), ('ChatGLMModel',), read_chatglm, write_chatglm, tensors_chatglm,
                 ignored={r'transformer\.rotary_pos_emb\.inv_freq': 'follows from the config'})
