"""Falcon (Almazrouei et al. 2023): attention and hidden layer side by side, one key head (7B) or a few (40B)."""
from lmlib.interop.decoders import THEIRS, activation, rope, said_rope
from lmlib.interop.family import Entry, Family, Said
from lmlib.models import dense
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends
from lmlib.nn.mlp import MlpStyle


def read(said: Said) -> dense.Config:
  """Our config of a config.json."""
  for switch, value in (('alibi', False), ('bias', False), ('parallel_attn', True), ('multi_query', True)):
    said.only(switch, value, default=value)
  grouped, width, heads = said.get('new_decoder_architecture', False), said['hidden_size'], said['num_attention_heads']
  norms = said.get('num_ln_in_parallel_attn', 2 if grouped else 1)
  length = said.get('max_position_embeddings', 2048)
  return dense.Config(
      vocab=said['vocab_size'], layers=said['num_hidden_layers'], width=width,
      hidden=said.get('ffn_hidden_size', 4 * width), heads=heads,
      kv_heads=said.get('num_kv_heads', heads) if grouped else 1, head_width=width // heads, length=length,
      positions=rope(said, length),
      mlp=MlpStyle(activation(said, 'activation', 'gelu'), gated=False),
      norms=Norms('layer', said.get('layer_norm_epsilon', 1e-5), parallel='two norms' if norms == 2 else 'one norm'),
      ends=Ends(tied=said.get('tie_word_embeddings', True)))


def write(config: dense.Config) -> dict:
  """A config.json of our config."""
  return {**said_rope(config.positions), 'vocab_size': config.vocab, 'num_hidden_layers': config.layers,
          'hidden_size': config.width, 'ffn_hidden_size': config.hidden, 'num_attention_heads': config.heads,
          'num_kv_heads': config.kv_heads, 'multi_query': True, 'parallel_attn': True, 'alibi': False, 'bias': False,
          'new_decoder_architecture': _grouped(config), 'max_position_embeddings': config.length,
          'num_ln_in_parallel_attn': 2 if config.norms.parallel == 'two norms' else 1,
          'activation': THEIRS[config.mlp.activation], 'layer_norm_epsilon': config.norms.epsilon,
          'tie_word_embeddings': config.ends.tied}


def _grouped(config: dense.Config) -> bool:
  return config.kv_heads > 1 or config.norms.parallel == 'two norms'


def tensors(config: dense.Config) -> dict[str, Entry]:
  """The table of weights; with several key heads each is followed by its queries, keys and values."""
  layer, q, k, v = 'transformer.h.{L}.', *(f'blocks/attention/{name}' for name in 'qkv')
  joined = Entry('K+ D', {q: 'GH', k: 'H', v: 'H'}) if _grouped(config) else Entry('+ D', {q: 'KGH', k: 'KH', v: 'KH'})
  norms = {'input_layernorm': 'attention_norm'} if config.norms.parallel == 'one norm' else {
      'ln_attn': 'attention_norm', 'ln_mlp': 'mlp_norm'}
  table = {'transformer.word_embeddings.weight': Entry('V D', {'embedding': ''})}
  for theirs, ours in (*((f'{layer}{theirs}', f'blocks/{ours}') for theirs, ours in norms.items()),
                       ('transformer.ln_f', 'norm')):
    table |= {f'{theirs}.weight': Entry('D', {f'{ours}/scale': ''}), f'{theirs}.bias': Entry('D', {f'{ours}/bias': ''})}
  table |= {f'{layer}self_attention.query_key_value.weight': joined,
            f'{layer}self_attention.dense.weight': Entry('D KGH', {'blocks/attention/out': ''}),
            f'{layer}mlp.dense_h_to_4h.weight': Entry('F D', {'blocks/mlp/up': ''}),
            f'{layer}mlp.dense_4h_to_h.weight': Entry('D F', {'blocks/mlp/down': ''})}
  return table if config.ends.tied else table | {'lm_head.weight': Entry('V D', {'output': ''})}


FALCON = Family(('falcon',), ('FalconForCausalLM',), read, write, tensors, prefixes=('transformer.',),
                ignored={r'.*rotary_emb\.inv_freq': 'follows from the config'},
                copies={'lm_head.weight': 'transformer.word_embeddings.weight'})
