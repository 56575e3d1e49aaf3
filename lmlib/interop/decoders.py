"""What the config.json and the tensors of most published decoders share: sizes, rotary positions, LLaMA's names."""
import dataclasses
import math

from lmlib.interop.family import Entry, Said
from lmlib.kernels.attention import Pattern
from lmlib.models import dense
from lmlib.nn.positions import Linear, Llama3, LongRope, Ntk, Rope, Yarn

LAYER = 'model.layers.{L}.'
ACTIVATIONS = {'silu': 'silu', 'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh',
               'relu': 'relu'}
THEIRS = {'silu': 'silu', 'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh', 'relu': 'relu'}


def sizes(said: Said) -> dict:
  """The sizes of dense.Config, as LLaMA and most since call them.

  Where positions are scaled as a row grows, max_position_embeddings is what training saw, and more is allowed.
  """
  heads, length = said['num_attention_heads'], said['max_position_embeddings']
  scaling = said.get('rope_parameters') or said.get('rope_scaling') or {}
  if scaling.get('rope_type', scaling.get('type')) == 'dynamic':
    length = int(length * scaling.get('factor', 1))
  return dict(
      vocab=said['vocab_size'], layers=said['num_hidden_layers'], width=said['hidden_size'],
      hidden=said['intermediate_size'], heads=heads, kv_heads=said.get('num_key_value_heads', heads),
      head_width=said.get('head_dim', said['hidden_size'] // heads), length=length)


def said_sizes(config) -> dict:
  """The inverse of sizes()."""
  return {
      'vocab_size': config.vocab, 'num_hidden_layers': config.layers, 'hidden_size': config.width,
      'intermediate_size': config.hidden, 'num_attention_heads': config.heads,
      'num_key_value_heads': config.kv_heads, 'head_dim': config.head_width, 'max_position_embeddings': config.length}


def without_head_dim(config, model_type: str) -> dict:
  """said_sizes() for a family whose heads divide the width. ValueError where they do not."""
  if config.head_width * config.heads != config.width:
    raise ValueError(f'{model_type} has heads of width / heads={config.width / config.heads:g}, not '
                     f'head_width={config.head_width}')
  return {key: value for key, value in said_sizes(config).items() if key != 'head_dim'}


def activation(said: Said, key: str = 'hidden_act', default: str = 'silu') -> str:
  """Our name of an activation that config.json names."""
  return ACTIVATIONS[said.only(key, *ACTIVATIONS, default=default)]


def rope(said: Said, length: int, *, base: float = 10_000.0, share: float = 1.0, neighbours: bool = False,
         local_base: float | None = None) -> Rope:
  """Rotary positions of a config.json in the form of transformers 4 or 5; base and share are the family's own."""
  found = Said(said.get('rope_parameters') or said.get('rope_scaling') or {})
  kind = found.get('rope_type', found.get('type', 'default'))
  base = float(found.get('rope_theta', said.get('rope_theta', base)))
  share = float(found.get('partial_rotary_factor', said.get('partial_rotary_factor', share)))
  original = found.get('original_max_position_embeddings', said.get('original_max_position_embeddings', length))
  if kind == 'dynamic':
    original = said['max_position_embeddings']
  scaling = None
  if kind in ('linear', 'dynamic', 'yarn', 'llama3'):
    factor = float(found['factor'])
  if kind == 'linear':
    scaling = Linear(factor)
  elif kind == 'dynamic':
    scaling = Ntk(factor, original)
  elif kind == 'yarn':
    scaling = Yarn(factor, original, float(found.get('beta_fast', 32)), float(found.get('beta_slow', 1)),
                   found.given('truncate', True), _yarn_magnitude(found, factor))
  elif kind == 'llama3':
    scaling = Llama3(factor, original, float(found['low_freq_factor']), float(found['high_freq_factor']))
  elif kind in ('longrope', 'su'):
    stretch = length / original
    magnitude = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    factors = (tuple(map(float, found[f'{name}_factor'])) for name in ('short', 'long'))
    scaling = LongRope(original, *factors, found.get('attention_factor', magnitude))
  elif kind != 'default':
    raise ValueError(f"config.json says rope_type={kind!r}; known are 'default', 'linear', 'dynamic', 'yarn', "
                     "'llama3', 'longrope'")
  return Rope(base, share, neighbours, scaling, local_base)


def _yarn_magnitude(found: Said, factor: float) -> float | None:
  """As DeepSeek extends it: mscale over mscale_all_dim; None for YaRN's own."""
  if (stated := found.get('attention_factor')) is not None:
    return float(stated)
  grown = lambda by: 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0
  if found.get('mscale') and found.get('mscale_all_dim'):
    return grown(found['mscale']) / grown(found['mscale_all_dim'])
  return None


def said_rope(rope: Rope, *, share: float = 1.0) -> dict:
  """The inverse of rope(), in the form that transformers 4 and 5 read; a share that is not said is the family's."""
  said = {'rope_theta': rope.base}
  if rope.share != share:
    said['partial_rotary_factor'] = rope.share
  scaling = rope.scaling
  if isinstance(scaling, Linear):
    said['rope_scaling'] = {'rope_type': 'linear', 'factor': scaling.factor}
  elif isinstance(scaling, Ntk):
    said['max_position_embeddings'] = scaling.original
    said['rope_scaling'] = {'rope_type': 'dynamic', 'factor': scaling.factor}
  elif isinstance(scaling, Yarn):
    said['rope_scaling'] = {
        'rope_type': 'yarn', 'factor': scaling.factor, 'original_max_position_embeddings': scaling.original,
        'beta_fast': scaling.quick, 'beta_slow': scaling.slow, 'truncate': scaling.whole,
        'attention_factor': scaling.magnitude}
  elif isinstance(scaling, Llama3):
    said['rope_scaling'] = {
        'rope_type': 'llama3', 'factor': scaling.factor, 'original_max_position_embeddings': scaling.original,
        'low_freq_factor': scaling.slow, 'high_freq_factor': scaling.quick}
  elif isinstance(scaling, LongRope):
    said['original_max_position_embeddings'] = scaling.original
    said['rope_scaling'] = {'rope_type': 'longrope', 'short_factor': list(scaling.short),
                            'long_factor': list(scaling.long), 'attention_factor': scaling.magnitude}
  return said


def patterns(said: Said, layers: int, full: Pattern, *, window: int | None, default) -> tuple[Pattern, ...]:
  """The shortest cycle of patterns that gives every layer its own.

  Of layer_types where config.json has them, else of default(layer), which says whether a layer is local.
  """
  kinds = said.get('layer_types') or ['sliding_attention' if default(i) else 'full_attention' for i in range(layers)]
  if len(kinds) != layers or not set(kinds) <= {'sliding_attention', 'full_attention'}:
    raise ValueError(f'config.json says layer_types={kinds!r} for {layers} layers; known are sliding_attention and '
                     'full_attention, one a layer')
  if window is None and 'sliding_attention' in kinds:
    raise ValueError('config.json says layer_types with sliding_attention and no sliding_window')
  every = tuple(full if kind == 'full_attention' else dataclasses.replace(full, window=window) for kind in kinds)
  return next(every[:n] for n in range(1, layers + 1) if all(every[i] == every[i % n] for i in range(layers)))


def said_patterns(config) -> dict:
  """The inverse of patterns(): layer_types, and sliding_window if there is one."""
  found = config.attention.patterns
  every = [found[i % len(found)] for i in range(config.layers)]
  windows = {pattern.window for pattern in every if pattern.window is not None}
  if len(windows) > 1:
    raise ValueError(f'windows of {sorted(windows)} places in one model have no words in config.json')
  return {'layer_types': ['full_attention' if pattern.window is None else 'sliding_attention' for pattern in every],
          'sliding_window': next(iter(windows), None)}


def llama_names(config: dense.Config, *, plus: float = 0.0, style: str = 'pre') -> dict[str, Entry]:
  """The table of LLaMA and of those after it that name tensors alike, with the biases and norms that config has.

  plus: what norms are stored less of. style: which of a block's norms bear which names.
  """
  table = names_but_mlp(config, plus=plus, style=style)
  table |= {f'{LAYER}mlp.gate_proj.weight': Entry('F D', {'blocks/mlp/gate': ''}),
            f'{LAYER}mlp.up_proj.weight': Entry('F D', {'blocks/mlp/up': ''}),
            f'{LAYER}mlp.down_proj.weight': Entry('D F', {'blocks/mlp/down': ''})}
  if config.mlp.bias:
    table |= {f'{LAYER}mlp.{name}_proj.bias': Entry('D' if name == 'down' else 'F', {f'blocks/mlp/{name}_bias': ''})
              for name in ('gate', 'up', 'down')}
  return table


def names_but_mlp(config, *, plus: float = 0.0, style: str = 'pre') -> dict[str, Entry]:
  """llama_names() of a model whose blocks have something else in the place of a hidden layer."""
  norm = lambda path: Entry('D', {f'{path}/scale': ''}, plus=plus)
  into = {name: f'self_attn.{name}_proj' for name in ('q', 'k', 'v')}
  axes = {'q': 'KGH', 'k': 'KH', 'v': 'KH'}
  table = {'model.embed_tokens.weight': Entry('V D', {'embedding': ''})}
  table |= {f'{LAYER}{name}.weight': norm(f'blocks/{path}') for name, path in NORMS[style].items()}
  for name, theirs in into.items():
    table[f'{LAYER}{theirs}.weight'] = Entry(f'{axes[name]} D', {f'blocks/attention/{name}': ''})
    if name in config.attention.bias:
      table[f'{LAYER}{theirs}.bias'] = Entry(axes[name], {f'blocks/attention/{name}_bias': ''})
  table[f'{LAYER}self_attn.o_proj.weight'] = Entry('D KGH', {'blocks/attention/out': ''})
  if 'o' in config.attention.bias:
    table[f'{LAYER}self_attn.o_proj.bias'] = Entry('D', {'blocks/attention/out_bias': ''})
  if config.attention.qk_norm is not None:
    for name, letters in (('q', 'KGH'), ('k', 'KH')):
      letters = 'H' if config.attention.qk_norm == 'head' else letters
      path = f'blocks/attention/{name}_norm/scale'
      table[f'{LAYER}self_attn.{name}_norm.weight'] = Entry(letters, {path: ''}, plus=plus)
  table['model.norm.weight'] = norm('norm')
  if not config.ends.tied:
    table['lm_head.weight'] = Entry('V D', {'output': ''})
  return table


# The norms of a block by the names that families give them.
NORMS = {
    'pre': {'input_layernorm': 'attention_norm', 'post_attention_layernorm': 'mlp_norm'},
    'one': {'input_layernorm': 'attention_norm'},
    'output': {'post_attention_layernorm': 'attention_out_norm', 'post_feedforward_layernorm': 'mlp_out_norm'},
    'gemma': {'input_layernorm': 'attention_norm', 'post_attention_layernorm': 'attention_out_norm',
              'pre_feedforward_layernorm': 'mlp_norm', 'post_feedforward_layernorm': 'mlp_out_norm'},
    'glm4': {'input_layernorm': 'attention_norm', 'post_self_attn_layernorm': 'attention_out_norm',
             'post_attention_layernorm': 'mlp_norm', 'post_mlp_layernorm': 'mlp_out_norm'},
}
INV_FREQ = {r'.*\.rotary_emb\.inv_freq': 'follows from the config'}
TIED = {'lm_head.weight': 'model.embed_tokens.weight'}
