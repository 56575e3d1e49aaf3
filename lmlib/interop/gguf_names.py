"""The architectures that GGUF files name, as switches of models/dense.py, and their tensors as a table of axes.

Names and keys are the same for all architectures, so one table and one reading serve them; an Architecture says
what its name alone fixes. What a file says beyond that is refused by its key, never passed over.
"""
from collections.abc import Mapping
import dataclasses
import math

import numpy as np

from lmlib.gin_text import close
from lmlib.interop.family import Entry
from lmlib.kernels.attention import Pattern
from lmlib.models import dense
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.decoder import Ends
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.positions import Alibi, Learned, Linear, Llama3, LongRope, Rope, Yarn

BLOCK = 'blk.{L}.'
ATTENTION = 'blocks/attention/'
# Keys that change no logits, and those of other parts of a file.
INERT = ('general.', 'tokenizer.', 'quantize.')
TEXT_ONLY = ('general.type', 'split.count')  # which must say 'model' and at most 1

FACTORS = ('rope_freqs.weight', 'rope_factors_long.weight', 'rope_factors_short.weight')


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What general.architecture fixes of a model."""
  positions: type = Rope  # or Learned or Alibi
  paired: bool = False  # rotary positions turn neighbours, and rows of q and k lie so
  norm: str = 'rms'
  place: str = 'pre'
  bias: str | None = ''  # None: of q, k and v if the file has them
  qk_norm: str | None = None
  mlp: MlpStyle = MlpStyle()
  embedding_norm: bool = False
  scaled: bool = False  # embeddings are multiplied by sqrt(D)
  joined: tuple[str, ...] = ()  # 'qkv' and 'gate_up' where they lie in one tensor
  period: int | None = None  # every so many layers one sees everything, the others a window
  local_base: float | None = None
  windows: bool = False  # attention.sliding_window has a meaning
  factors: tuple[str, ...] = ()  # of FACTORS, the tensors of rotary positions that it may have
  wide: int | None = None  # with so many layers the scale of scores is that of D / N and not of H


GPT = dict(norm='layer', bias='qkvo', joined=('qkv',), mlp=MlpStyle('gelu_tanh', gated=False, bias=True))
GEMMA = dict(place='both', scaled=True, windows=True, mlp=MlpStyle('gelu_tanh'))
ARCHITECTURES = {
    'qwen2': Architecture(bias='qkv'),
    'llama': Architecture(paired=True, bias=None, factors=FACTORS),
    'qwen3': Architecture(qk_norm='head'),
    'phi3': Architecture(joined=('qkv', 'gate_up'), windows=True, factors=FACTORS[1:]),
    'gemma2': Architecture(**GEMMA, period=2, wide=46),
    'gemma3': Architecture(**GEMMA, qk_norm='head', period=6, local_base=10_000.0, wide=62),
    'gpt2': Architecture(**GPT, positions=Learned),
    'gptneox': Architecture(**GPT | dict(mlp=MlpStyle('gelu', gated=False, bias=True))),
    'bloom': Architecture(**GPT, positions=Alibi, embedding_norm=True),
}


class Keys:
  """The metadata of one architecture, which notes what is looked at."""

  def __init__(self, metadata: Mapping[str, object], name: str):
    self.metadata, self.name, self._seen = metadata, name, {'general.architecture'}

  def get(self, key: str, default=None):
    """The value of a key of the architecture."""
    self._seen.add(f'{self.name}.{key}')
    return self.metadata.get(f'{self.name}.{key}', default)

  def whole(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
    """A whole number from 1 to `most`; a list of equal ones, one a layer, is one."""
    value = self.get(key, default)
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
      value = value[0].item()
    if type(value) is not int or not 1 <= value <= most:
      raise ValueError(f'{self.name}.{key}={_shown(value)} must be a whole number from 1 to {most:,}')
    return value

  def real(self, key: str, default: float | None = None) -> float:
    """A positive number, the shortest that float32 takes for the one in the file."""
    value = self.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e30:
      raise ValueError(f'{self.name}.{key}={_shown(value)} must be a positive number')
    return float(str(np.float32(value)))

  def unread(self) -> list[str]:
    """The keys that nobody has looked at, of those that may change what a model computes."""
    off = lambda value: value is None or (not isinstance(value, (list, np.ndarray)) and not value)
    return sorted(key for key, value in self.metadata.items()
                  if key not in self._seen and not key.startswith(INERT) and not off(value))


def _shown(value) -> str:
  return 'nothing' if value is None else f'{value!r:.60}'


def architecture(metadata: Mapping[str, object]) -> tuple[str, Architecture]:
  """The architecture of a file. ValueError that says which are known, and the nearest."""
  name = metadata.get('general.architecture')
  if (kind := metadata.get('general.type', 'model')) != 'model':
    raise ValueError(f"general.type={_shown(kind)}: only a 'model' is read")
  if (parts := metadata.get('split.count', 1)) not in (0, 1):
    raise ValueError(f'split.count={_shown(parts)}: a model in several files is not read; llama-gguf-split joins them')
  if not isinstance(name, str) or name not in ARCHITECTURES:
    raise ValueError(f'general.architecture={_shown(name)} is not known{close(str(name)[:60], ARCHITECTURES)}; known '
                     f'are: {", ".join(ARCHITECTURES)}')
  return name, ARCHITECTURES[name]


def config(metadata: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]],
           factors: Mapping[str, np.ndarray]) -> dense.Config:
  """Our config of a file's metadata and of the shapes of its tensors; `factors` are those of rotary positions.

  ValueError, naming it, for a key that is missing, is no sensible number, or says what no config can.
  """
  name, arch = architecture(metadata)
  keys = Keys(metadata, name)
  for key in ('split.count', 'split.no', 'split.tensors.count'):
    keys._seen.add(key)
  if len(table := shapes.get('token_embd.weight', ())) != 2:
    raise ValueError('there is no token_embd.weight of two axes')
  most = max(math.prod(shape) for shape in shapes.values())  # of any size; nothing larger is in the file
  layers = len({key.split('.')[1] for key in shapes if key.startswith('blk.')})
  if (said := keys.whole('block_count')) != layers:
    raise ValueError(f'{name}.block_count={said}, but there are tensors of {layers} blocks')
  if keys.get('vocab_size', table[0]) != table[0]:
    raise ValueError(f'{name}.vocab_size={_shown(keys.get("vocab_size"))}, but token_embd.weight has {table[0]:,} rows')
  width, heads = keys.whole('embedding_length', most=most), keys.whole('attention.head_count', most=most)
  head_width = keys.whole('attention.key_length', width // heads, most)
  if keys.whole('attention.value_length', head_width, most) != head_width:
    raise ValueError(f'{name}.attention.value_length={keys.get("attention.value_length")} is another width than that '
                     f'of keys, {head_width}')
  if keys.get('attention.causal', True) is not True:
    raise ValueError(f'{name}.attention.causal={_shown(keys.get("attention.causal"))}: only decoders are read')
  bias = arch.bias
  if bias is None:
    bias = 'qkv' if 'blk.0.attn_q.bias' in shapes else ''
  eps = 'rms_' if arch.norm == 'rms' else ''
  parallel = 'two norms' if name == 'gptneox' and keys.get('use_parallel_residual') else None
  softcap = keys.real('final_logit_softcapping') if arch.scaled and keys.get('final_logit_softcapping') else None
  found = dense.Config(
      vocab=table[0], layers=layers, width=width, hidden=keys.whole('feed_forward_length', most=most), heads=heads,
      kv_heads=keys.whole('attention.head_count_kv', heads, most), head_width=head_width,
      length=keys.whole('context_length'), positions=_positions(keys, arch, head_width, factors), mlp=arch.mlp,
      attention=AttentionStyle(bias, arch.qk_norm, _patterns(keys, arch, layers, width, heads)),
      norms=Norms(arch.norm, keys.real(f'attention.layer_norm_{eps}epsilon'), place=arch.place, parallel=parallel),
      ends=Ends(tied='output.weight' not in shapes, scale=width**0.5 if arch.scaled else None,
                norm=arch.embedding_norm,
                softcap=softcap))
  if unread := keys.unread():
    raise ValueError(f'what {", ".join(f"{key}={_shown(metadata[key])}" for key in unread[:8])} asks for is not there')
  if unknown := [key for key in factors if key not in arch.factors]:
    raise ValueError(f'{unknown[0]} is not known of {name}')
  return found


def _positions(keys: Keys, arch: Architecture, head_width: int, factors: Mapping[str, np.ndarray]):
  if arch.positions is not Rope:
    keys.get('rope.dimension_count')
    return arch.positions()
  turned = keys.whole('rope.dimension_count', head_width)
  if turned > head_width or (arch.paired and turned != head_width):
    raise ValueError(f'{keys.name}.rope.dimension_count={turned} does not fit heads of {head_width}')
  local = None if arch.local_base is None or not keys.get('attention.sliding_window') else (
      keys.real('rope.freq_base_swa', arch.local_base))
  return Rope(keys.real('rope.freq_base', 10_000.0), turned / head_width, scaling=_scaling(keys, factors, turned),
              local_base=local)


def _scaling(keys: Keys, factors: Mapping[str, np.ndarray], turned: int):
  """How rotary positions reach further. ValueError for a way that is not known."""
  kind, factor = keys.get('rope.scaling.type', 'linear'), keys.get('rope.scaling.factor', 0.0)
  keys.get('rope.scaling.finetuned')  # of no effect
  original = lambda: keys.whole('rope.scaling.original_context_length', keys.get('context_length'))
  if kind == 'linear' and not factor:
    factor = keys.get('rope.scale_linear', 0.0)
  if kind == 'longrope' or 'rope_factors_long.weight' in factors:
    short, long = (tuple(_numbers(factors, f'rope_factors_{name}.weight', turned // 2)) for name in ('short', 'long'))
    return LongRope(original(), short, long, keys.real('rope.scaling.attn_factor', 1.0))
  if 'rope_freqs.weight' in factors:
    keys.get('rope.scaling.original_context_length')
    return _llama3(keys, _numbers(factors, 'rope_freqs.weight', turned // 2))
  if kind == 'none' or factor in (0, 1):
    return None
  if kind == 'linear':
    return Linear(keys.real('rope.scaling.factor', factor))
  if kind == 'yarn':
    return Yarn(keys.real('rope.scaling.factor'), original())
  raise ValueError(f"{keys.name}.rope.scaling.type={_shown(kind)} is not known; 'none', 'linear', 'yarn' and "
                   "'longrope' are")


def _numbers(factors: Mapping[str, np.ndarray], name: str, count: int) -> list[float]:
  if name not in factors or factors[name].shape != (count,):
    raise ValueError(f'{name} must be {count} factors of rotary positions')
  return [float(str(x)) for x in factors[name].astype(np.float32)]


def _llama3(keys: Keys, factors: list[float]) -> Llama3:
  """The scaling of Llama 3.1 that has these factors; a file does not say its settings."""
  base = keys.real('rope.freq_base', 10_000.0)
  for original in (8192, keys.get('context_length')):
    scaling = Llama3(max(factors), original)
    if np.allclose(llama3_factors(scaling, base, len(factors)), factors, rtol=1e-4):
      return scaling
  raise ValueError('rope_freqs.weight has factors that no Llama 3.1 has, with an original length of 8192')


def llama3_factors(scaling: Llama3, base: float, half: int) -> np.ndarray:
  """By how much each frequency is divided, float32."""
  frequency_H = base ** -(np.arange(half) / half)
  kept_H = np.clip((scaling.original * frequency_H / (2 * np.pi) - scaling.slow) / (scaling.quick - scaling.slow), 0, 1)
  return (1 / ((1 - kept_H) / scaling.factor + kept_H)).astype(np.float32)


def _patterns(keys: Keys, arch: Architecture, layers: int, width: int, heads: int) -> tuple[Pattern, ...]:
  softcap = keys.real('attn_logit_softcapping') if arch.scaled and keys.get('attn_logit_softcapping') else None
  scale = (width // heads) ** -0.5 if layers == arch.wide else None
  whole = Pattern(softcap=softcap, scale=scale)
  if not arch.windows or not keys.get('attention.sliding_window'):
    return (whole,)
  local = dataclasses.replace(whole, window=keys.whole('attention.sliding_window'))
  if arch.period is None:
    return (local,)
  period = said = keys.get('attention.sliding_window_pattern', arch.period)
  if isinstance(period, np.ndarray):  # one a layer: whether it has the window
    period = next((n for n in range(1, layers + 1)
                   if period.tolist() == [layer % n < n - 1 for layer in range(layers)]), None)
  if type(period) is not int or not 1 <= period <= layers + 1:
    raise ValueError(f'{keys.name}.attention.sliding_window_pattern={_shown(said)} is no period of layers, the last of '
                     'which sees everything')
  return (local,) * (period - 1) + (whole,)


def metadata(name: str, config: dense.Config) -> dict[str, object]:
  """What a file of this architecture says of a config, but for what it has no key for."""
  arch, norms, first = ARCHITECTURES[name], config.norms, config.attention.patterns[0]
  said = {
      'context_length': config.length, 'embedding_length': config.width, 'block_count': config.layers,
      'feed_forward_length': config.hidden, 'attention.head_count': config.heads,
      'attention.head_count_kv': config.kv_heads, 'attention.key_length': config.head_width,
      'attention.value_length': config.head_width, 'vocab_size': config.vocab,
      f'attention.layer_norm_{"rms_" if norms.kind == "rms" else ""}epsilon': norms.epsilon,
      'final_logit_softcapping': config.ends.softcap, 'attn_logit_softcapping': first.softcap if arch.scaled else None,
      'attention.sliding_window': first.window,
      'use_parallel_residual': norms.parallel is not None if name == 'gptneox' else None}
  if arch.period is not None and len(config.attention.patterns) not in (1, arch.period):
    said['attention.sliding_window_pattern'] = len(config.attention.patterns)
  if isinstance(config.positions, Rope):
    said |= _rope_metadata(config.positions, config.head_width)
  return {'general.architecture': name, 'general.type': 'model'} | {
      f'{name}.{key}': value for key, value in said.items() if value is not None}


def _rope_metadata(rope: Rope, head_width: int) -> dict[str, object]:
  said = {'rope.freq_base': rope.base, 'rope.dimension_count': rope.turned(head_width),
          'rope.freq_base_swa': rope.local_base}
  match rope.scaling:
    case Linear(factor):
      said |= {'rope.scaling.type': 'linear', 'rope.scaling.factor': factor}
    case Yarn(factor, original):
      said |= {'rope.scaling.type': 'yarn', 'rope.scaling.factor': factor,
               'rope.scaling.original_context_length': original}
    case LongRope(original, _, _, magnitude):
      said |= {'rope.scaling.type': 'longrope', 'rope.scaling.attn_factor': magnitude,
               'rope.scaling.original_context_length': original}
  return said


def factors(config: dense.Config) -> dict[str, np.ndarray]:
  """The factors of rotary positions that a file keeps as tensors."""
  scaling = config.positions.scaling if isinstance(config.positions, Rope) else None
  if isinstance(scaling, Llama3):
    half = config.positions.turned(config.head_width) // 2
    return {'rope_freqs.weight': llama3_factors(scaling, config.positions.base, half)}
  if isinstance(scaling, LongRope):
    return {f'rope_factors_{name}.weight': np.asarray(values, np.float32)
            for name, values in (('long', scaling.long), ('short', scaling.short))}
  return {}


def tensors(config: dense.Config, arch: Architecture) -> dict[str, Entry]:
  """The table of weights, for interop/family.py."""
  found = {'token_embd.weight': Entry('V D', {'embedding': ''})}
  if isinstance(config.positions, Learned):
    found['position_embd.weight'] = Entry('S D', {'position_table': ''})
  found |= _norm(config, 'token_embd_norm', 'embedding_norm') if config.ends.norm else {}
  both = config.norms.place == 'both'
  found |= _norm(config, f'{BLOCK}attn_norm', 'blocks/attention_norm') | _attention(config, arch)
  found |= _norm(config, f'{BLOCK}post_attention_norm', 'blocks/attention_out_norm') if both else {}
  found |= _norm(config, f'{BLOCK}ffn_norm', 'blocks/mlp_norm') | _mlp(config, arch)
  found |= _norm(config, f'{BLOCK}post_ffw_norm', 'blocks/mlp_out_norm') if both else {}
  found |= _norm(config, 'output_norm', 'norm')
  return found if config.ends.tied else found | {'output.weight': Entry('V D', {'output': ''})}


def _norm(config: dense.Config, theirs: str, ours: str) -> dict[str, Entry]:
  bias = {f'{theirs}.bias': Entry('D', {f'{ours}/bias': ''})} if config.norms.kind == 'layer' else {}
  return {f'{theirs}.weight': Entry('D', {f'{ours}/scale': ''})} | bias


def _attention(config: dense.Config, arch: Architecture) -> dict[str, Entry]:
  axes, style = {'q': 'KGH', 'k': 'KH', 'v': 'KH'}, config.attention
  found = {f'{BLOCK}attn_output.weight': Entry('D KGH', {f'{ATTENTION}out': ''})}
  if 'qkv' in arch.joined:
    found[f'{BLOCK}attn_qkv.weight'] = Entry('+ D', {ATTENTION + name: inner for name, inner in axes.items()})
    if 'qkv' in style.bias:
      found[f'{BLOCK}attn_qkv.bias'] = Entry('+', {f'{ATTENTION}{name}_bias': inner for name, inner in axes.items()})
  else:
    for name, inner in axes.items():
      found[f'{BLOCK}attn_{name}.weight'] = Entry(f'{inner} D', {ATTENTION + name: ''})
      if name in style.bias:
        found[f'{BLOCK}attn_{name}.bias'] = Entry(inner, {f'{ATTENTION}{name}_bias': ''})
  if 'o' in style.bias:
    found[f'{BLOCK}attn_output.bias'] = Entry('D', {f'{ATTENTION}out_bias': ''})
  if style.qk_norm == 'head':
    found |= {f'{BLOCK}attn_{name}_norm.weight': Entry('H', {f'{ATTENTION}{name}_norm/scale': ''}) for name in 'qk'}
  return found


def _mlp(config: dense.Config, arch: Architecture) -> dict[str, Entry]:
  ours = lambda name: f'blocks/mlp/{name}'
  found = {f'{BLOCK}ffn_down.weight': Entry('D F', {ours('down'): ''})}
  if 'gate_up' in arch.joined:
    return found | {f'{BLOCK}ffn_up.weight': Entry('+ D', {ours('gate'): 'F', ours('up'): 'F'})}
  names = ('gate', 'up') if config.mlp.gated else ('up',)
  found |= {f'{BLOCK}ffn_{name}.weight': Entry('F D', {ours(name): ''}) for name in names}
  if config.mlp.bias:
    found |= {f'{BLOCK}ffn_{name}.bias': Entry('F', {ours(f'{name}_bias'): ''}) for name in names}
    found[f'{BLOCK}ffn_down.bias'] = Entry('D', {ours('down_bias'): ''})
  return found
