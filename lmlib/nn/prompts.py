"""Virtual tokens before every text: prefix tuning, prompt tuning and P-tuning.

  Prefix    learned keys and values of every layer (Li and Liang 2021), by themselves or from a small network
  Prompt    learned vectors in the place of embeddings (Lester et al. 2021)
  PTuning   those from a small network (Liu et al. 2021; an MLP, where the paper has an LSTM before it)

All of them reach a text through keys and values that every query sees, before its first place: those of vectors are
computed by the model, once for all rows, which is what stands in a causal model where they precede a row. So each
document of a packed row has the prompt before it, and a cache of decoding does not hold it. Places count on from it.
"""
import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from lmlib import sharding, trees
from lmlib.nn import layers
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.decoder import DecoderConfig
from lmlib.nn.positions import Alibi
from lmlib.sharding import Lettered

PREFIX, FRONT = f'{trees.BLOCKS}/attention/prefix', 'front'
SMALL = 0.1  # deviation of keys and values at first


@dataclasses.dataclass(frozen=True)
class Prefix:
  length: int = 16  # virtual tokens
  hidden: int | None = None  # width of the network that makes keys and values; None: they are trained themselves

  def __post_init__(self):
    _positive(self, 'length')
    _positive(self, 'hidden', optional=True)

  def boxed(self, base_boxed):
    """{'blocks': {'attention': {'prefix': {'k': LSKH, 'v': LSKH}}}}, or {'prefix': the network}."""
    sizes = _sizes(base_boxed, type(self).__name__) | {'S': self.length}
    if self.hidden is None:
      return trees.replaced({}, {PREFIX: _boxes({'k': 'LSKH', 'v': 'LSKH'}, sizes)})
    return {'prefix': _boxes({'table': 'SD', 'into': 'DA', 'into_bias': 'A', 'k': 'ALKH', 'k_bias': 'LKH',
                              'v': 'ALKH', 'v_bias': 'LKH'}, sizes | {'A': self.hidden})}

  def new(self, base_boxed, base, key: jax.Array):
    """Keys and values near 0."""
    return _random(self.boxed(base_boxed), key, deviation=SMALL)

  def keys_and_values(self, small) -> tuple[jax.Array, jax.Array]:
    """Those of every layer, LSKH each. ValueError for the tree of another method."""
    found = trees.at(small, PREFIX) if self.hidden is None else trees.at(small, 'prefix')
    if not isinstance(found, dict):
      raise ValueError(f'this tree, with {", ".join(trees.flat(small))}, is none of {self}')
    if self.hidden is None:
      return found['k'], found['v']
    hidden_SA = jnp.tanh(found['table'] @ found['into'] + found['into_bias'][None])
    made = lambda name: jnp.einsum('SA,ALKH->LSKH', hidden_SA, found[name]) + found[f'{name}_bias'][:, None]
    return made('k'), made('v')

  def attached(self, config, params, small, weight: float):
    """params with keys and values in front of every layer's."""
    return _in_front(config, params, *self.keys_and_values(small), self, weight)


@dataclasses.dataclass(frozen=True)
class Prompt:
  length: int = 16  # virtual tokens

  def __post_init__(self):
    _positive(self, 'length')

  def boxed(self, base_boxed):
    """{'prompt': {'table': SD}}."""
    sizes = _sizes(base_boxed, type(self).__name__)
    return {'prompt': _boxes({'table': 'SD'}, sizes | {'S': self.length})}

  def new(self, base_boxed, base, key: jax.Array):
    """Rows of the embedding, drawn at random."""
    table_VD = base['embedding']
    row_S = jax.random.randint(key, (self.length,), 0, table_VD.shape[0])
    return {'prompt': {'table': jnp.asarray(table_VD[row_S], jnp.float32)}}

  def vectors(self, small) -> jax.Array:
    """What stands in the place of embeddings, SD."""
    return small['prompt']['table']

  def attached(self, config, params, small, weight: float):
    """params with the keys and values that the model makes of the prompt in front of every layer's."""
    _check(config, params, self, weight)
    x_SD = self.vectors(small)
    if x_SD.shape != (wanted := (self.length, config.width)):
      raise ValueError(f'this {type(self).__name__} is of another model or length: its vectors have the shape '
                       f'{x_SD.shape}, and must have {wanted}')
    return _in_front(config, params, *read(config, params, x_SD), self, weight)


@dataclasses.dataclass(frozen=True)
class PTuning(Prompt):
  hidden: int = 128  # width of the network

  def __post_init__(self):
    super().__post_init__()
    _positive(self, 'hidden')

  def boxed(self, base_boxed):
    """{'prompt': {'table': SD, 'into': DA, 'between': AF, 'out': FD}} and the biases."""
    sizes = _sizes(base_boxed, type(self).__name__) | {'S': self.length, 'A': self.hidden, 'F': self.hidden}
    return {'prompt': _boxes({'table': 'SD', 'into': 'DA', 'into_bias': 'A', 'between': 'AF', 'between_bias': 'F',
                              'out': 'FD', 'out_bias': 'D'}, sizes)}

  def new(self, base_boxed, base, key: jax.Array):
    """A table of deviation 1, matrices of 1 / sqrt(fan in), biases at 0."""
    return _random(self.boxed(base_boxed), key, deviation=1.0)

  def vectors(self, small) -> jax.Array:
    w = small['prompt']
    x_SA = jax.nn.relu(w['table'] @ w['into'] + w['into_bias'][None])
    x_SF = jax.nn.relu(x_SA @ w['between'] + w['between_bias'][None])
    return x_SF @ w['out'] + w['out_bias'][None]


class Before(layers.Beside):
  """Keys and values in front of a layer's own, LSKH."""
  k: jax.Array
  v: jax.Array

  def join(self, seen):
    """Keys and values BSKH with these in front of every row."""
    wide = lambda first, x: jnp.concatenate([jnp.broadcast_to(first[None].astype(x.dtype), (x.shape[0], *first.shape)),
                                             x], axis=1)
    return wide(self.k, seen[0]), wide(self.v, seen[1])


class Front(layers.Beside):
  """How many virtual tokens stand before the first place of every text."""
  count: int = struct.field(pytree_node=False)


def room(config, params) -> int:
  """The longest text of a model, in tokens, beside the virtual ones in front of it."""
  front = trees.at(params, FRONT)
  return config.length - (0 if front is None else front.count)


def read(config, params, x_SD) -> tuple[jax.Array, jax.Array]:
  """The keys and values, LSKH, that a decoder makes of vectors in the place of embeddings."""
  length, ends = x_SD.shape[0], config.ends
  execution = dataclasses.replace(config.execution, remat=None, dropout=None, cache=None)
  virtual = dataclasses.replace(config, vocab=length, execution=execution)
  params = params | {'embedding': x_SD} | ({} if ends.tied else {'output': jnp.zeros((config.width, length))})
  cache = virtual.cache(1, length)
  _, cache, _ = virtual.model().apply({'params': params}, jnp.arange(length)[None], None, cache, method='hidden')
  return tuple(jnp.einsum('LKSH->LSKH', x_LBKSH[:, 0]) for x_LBKSH in cache.layers)


def _in_front(config, params, k_LSKH, v_LSKH, method, weight: float):
  _check(config, params, method, weight)
  expected = config.layers, method.length, config.kv_heads, config.head_width
  for name, x in (('keys', k_LSKH), ('values', v_LSKH)):
    if x.shape != expected:
      raise ValueError(f'this {type(method).__name__} is of another model or length: {name} have the shape {x.shape}, '
                       f'and must have {expected}')
  return trees.replaced(params, {PREFIX: Before(k_LSKH, v_LSKH), FRONT: Front(method.length)})


def _check(config, params, method, weight: float):
  """ValueError unless the model can have virtual tokens in front."""
  name = type(method).__name__
  if weight != 1:
    raise ValueError(f'{name} is no sum: it takes weight=1, not {weight}')
  if trees.at(params, FRONT) is not None:
    raise ValueError(f'{name}: the model has virtual tokens in front already; attach one prompt at a time')
  if not isinstance(config, DecoderConfig) or not isinstance(config.attention, AttentionStyle):
    raise ValueError(f'{name} needs a decoder with keys and values of every token; {type(config).__module__} is none')
  local = any(pattern.local or pattern.stride or not pattern.causal for pattern in config.attention.patterns)
  lacks = {'causal layers that see all (attention.patterns)': local,
           'positions that are no ALiBi': isinstance(config.positions, Alibi),
           'ends.bigrams=None': config.ends.bigrams is not None, 'execution.apart=False': config.execution.apart}
  if missing := [what for what, lacking in lacks.items() if lacking]:
    raise ValueError(f'{name} needs {", ".join(missing)}')


def _positive(method, name: str, optional: bool = False):
  value = getattr(method, name)
  if not (optional and value is None) and (not isinstance(value, int) or value < 1):
    raise ValueError(f'{type(method).__name__}.{name}={value!r} must be a positive integer')


def _sizes(base_boxed, name: str) -> dict[str, int]:
  """Sizes of the letters of a decoder. ValueError for a model that has no one stack of keys."""
  box = trees.at(base_boxed, f'{trees.BLOCKS}/attention/k')
  if not isinstance(box, Lettered) or box.axes != 'LDKH':
    found = [path for path in trees.flat(sharding.letters(base_boxed)) if 'attention/k' in path]
    raise ValueError(f'{name} needs a decoder whose blocks have keys at {trees.BLOCKS}/attention/k, LDKH; this model '
                     f'has {", ".join(found)}')
  return dict(zip(box.axes, box.value.shape))


def _boxes(letters: dict[str, str], sizes: dict[str, int]) -> dict[str, Lettered]:
  return {name: Lettered(jax.ShapeDtypeStruct(tuple(sizes[letter] for letter in axes), jnp.float32), axes)
          for name, axes in letters.items()}


def _random(boxed, key: jax.Array, deviation: float):
  """Tables and stacks of this deviation, matrices of 1 / sqrt(fan in), biases at 0."""
  leaves = {}
  for path, axes in trees.flat(sharding.letters(boxed)).items():
    shape = trees.at(boxed, path).value.shape
    key, this = jax.random.split(key)
    of = deviation if 'S' in axes else 0.0 if path.endswith('_bias') else shape[0]**-0.5
    leaves[path] = of * jax.random.normal(this, shape, jnp.float32)
  return trees.replaced({}, leaves)
