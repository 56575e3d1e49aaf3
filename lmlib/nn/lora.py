"""Low-rank adapters: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024).

  LoRA   y = x W + scale (x a) b,   scale = alpha / rank, of rsLoRA alpha / sqrt(rank)
  DoRA   y = m (x W + scale (x a) b) / |W + scale a b|,   norms and m by output, no gradient through the norm

a begins random and b at 0, m at |W|, so that a new adapter changes nothing. Of W no gradient is ever made.
"""
import dataclasses
import math

from flax import struct
import jax
import jax.numpy as jnp

from lmlib import trees
from lmlib.nn import layers, matrices
from lmlib.sharding import Lettered


@dataclasses.dataclass(frozen=True)
class Lora:
  rank: int = 8
  alpha: float = 16.0
  targets: tuple[str, ...] | None = ('q', 'v')  # ends of paths, such as 'q' or 'mlp/up'; None: all matrices of blocks
  stable: bool = False  # rsLoRA
  magnitude: bool = False  # DoRA

  def __post_init__(self):
    if not isinstance(self.rank, int) or self.rank < 1:
      raise ValueError(f'Lora.rank={self.rank!r} must be a positive integer')
    if not self.alpha > 0:
      raise ValueError(f'Lora.alpha={self.alpha!r} must be positive')
    if self.targets is not None and (not self.targets or isinstance(self.targets, str)):
      raise ValueError(f'Lora.targets={self.targets!r} must name matrices in a tuple; None takes all of the blocks')

  @property
  def scale(self) -> float:
    return self.alpha / (math.sqrt(self.rank) if self.stable else self.rank)

  def boxed(self, base_boxed):
    """{'blocks': {'attention': {'q': {'a': LDA, 'b': LAKGH}}}}, with the magnitudes 'scale', LKGH, of DoRA."""
    return trees.replaced({}, {path: self._boxes(axes, dict(zip(axes, shape))) for path, (axes, shape) in
                               matrices.targeted(base_boxed, self.targets, 'Lora.targets').items()})

  def new(self, base_boxed, base, key: jax.Array):
    """a uniform within 1 / sqrt(fan in), b at 0, magnitudes those of the base."""
    found, leaves = matrices.targeted(base_boxed, self.targets, 'Lora.targets'), {}
    for part_key, (path, (axes, shape)) in zip(jax.random.split(key, len(found)), found.items()):
      sizes, (lead, ins, outs) = dict(zip(axes, shape)), matrices.sides(axes)
      boxes, bound = self._boxes(axes, sizes), matrices.size(ins, sizes)**-0.5
      leaves[path] = {'a': jax.random.uniform(part_key, boxes['a'].value.shape, jnp.float32, -bound, bound),
                      'b': jnp.zeros(boxes['b'].value.shape, jnp.float32)}
      if self.magnitude:
        leaves[path]['scale'] = matrices.norms(layers.array(trees.at(base, path)), len(outs), len(lead))
    return trees.replaced({}, leaves)

  def _boxes(self, axes: str, sizes: dict[str, int]) -> dict[str, Lettered]:
    """What stands beside a matrix of these letters."""
    lead, ins, outs = matrices.sides(axes)
    letters = {'a': f'{lead}{ins}A', 'b': f'{lead}A{outs}'} | ({'scale': f'{lead}{outs}'} if self.magnitude else {})
    shape = lambda letters: tuple((sizes | {'A': self.rank})[letter] for letter in letters)
    return {name: Lettered(jax.ShapeDtypeStruct(shape(these), jnp.float32), these) for name, these in letters.items()}

  def attached(self, config, params, small, weight: float):
    """params with every matrix that `small` has a part for made LowRank, or WithMagnitude."""
    nodes = {}
    for path, part in matrices.parts(small).items():
      w = trees.at(params, path)
      self._check(path, part, w, weight)
      if self.magnitude:
        nodes[path] = WithMagnitude(w, part['a'], part['b'], part['scale'], self.scale)
      else:
        nodes[path] = LowRank(w, part['a'], part['b'], weight * self.scale)
    return trees.replaced(params, nodes)

  def _check(self, path: str, part: dict, w, weight: float):
    """ValueError unless these arrays are of this method and fit the weight."""
    wanted = {'a', 'b'} | ({'scale'} if self.magnitude else set())
    if part.keys() != wanted:
      raise ValueError(f'{path} has the arrays {", ".join(sorted(part))}, and {self} needs {", ".join(sorted(wanted))}')
    a, b = part['a'].shape, part['b'].shape
    if a[-1] != self.rank:
      raise ValueError(f'{path}/a has the shape {a}, and Lora.rank={self.rank} must be the last of it')
    axes = len(a) + len(b) - 2 if w is None else len(w.shape)
    lead = max(0, len(a) + len(b) - 2 - axes)
    matrices.fits(path, w, (*a[:-1], *b[lead + 1:]), 'Lora')
    matrices.fits(f'{path}/b', part['b'], (*a[:lead], self.rank, *b[lead + 1:]), 'Lora')
    if self.magnitude and (weight != 1 or isinstance(w, layers.Adapted)):
      raise ValueError(f'DoRA at {path} (Lora.magnitude=True) is no sum: it takes weight=1, not {weight}, and a weight '
                       'that no adapter has changed before')


class LowRank(layers.Adapted):
  """inner + scale a b."""
  a: jax.Array
  b: jax.Array
  scale: float = struct.field(pytree_node=False)

  def product(self, equation: str, x) -> jax.Array:
    return layers.product(equation, x, self.inner) + self.more(equation, x)

  def more(self, equation: str, x) -> jax.Array:
    """scale (x a) b."""
    inputs, out = equation.split('->')
    x_axes, w_axes = inputs.split(',')
    ins = ''.join(letter for letter in w_axes if letter in x_axes)
    lead, outs = x_axes.removesuffix(ins), w_axes.removeprefix(ins)
    small = layers.product(f'{x_axes},{ins}A->{lead}A', x, self.a)
    return layers.product(f'{lead}A,A{outs}->{out}', small * self.scale, self.b)

  def array(self) -> jax.Array:
    return layers.array(self.inner) + self.scale * matrices.joined(self.a, self.b, self.shape)


class WithMagnitude(layers.Adapted):
  """magnitude (inner + scale a b) / |inner + scale a b|, norms by output."""
  a: jax.Array
  b: jax.Array
  magnitude: jax.Array
  scale: float = struct.field(pytree_node=False)

  @property
  def turned(self) -> LowRank:
    return LowRank(self.inner, self.a, self.b, self.scale)

  def ratio(self) -> jax.Array:
    """magnitude / |inner + scale a b|, of every output."""
    lead = self.a.ndim + self.b.ndim - 2 - len(self.shape)
    whole = jax.lax.stop_gradient(self.turned.array())
    return (self.magnitude / matrices.norms(whole, self.magnitude.ndim - lead, lead)).astype(self.a.dtype)

  def product(self, equation: str, x) -> jax.Array:
    y, ratio = self.turned.product(equation, x), self.ratio()
    return y * jnp.expand_dims(ratio, tuple(range(y.ndim - ratio.ndim)))

  def array(self) -> jax.Array:
    ratio, lead = self.ratio(), self.a.ndim + self.b.ndim - 2 - len(self.shape)
    ins = self.a.ndim - 1 - lead
    return self.turned.array() * jnp.expand_dims(ratio, tuple(range(lead, lead + ins)))
