"""IA3 (Liu et al. 2022): learned factors of keys, values and hidden units, and nothing else.

  y = scale * (x W + bias)   of `targets`, as many factors as outputs       y = (scale * x) W   of `inputs`

All factors begin at 1.
"""
import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from lmlib import trees
from lmlib.nn import layers, matrices
from lmlib.sharding import Lettered


@dataclasses.dataclass(frozen=True)
class Ia3:
  targets: tuple[str, ...] = ('k', 'v')  # ends of paths of matrices whose outputs are scaled
  inputs: tuple[str, ...] = ('down',)  # of those whose inputs are

  def __post_init__(self):
    for name in ('targets', 'inputs'):
      if isinstance(getattr(self, name), str):
        raise ValueError(f'Ia3.{name}={getattr(self, name)!r} must name matrices in a tuple')
    if not self.targets and not self.inputs:
      raise ValueError('Ia3.targets=() and inputs=() leave nothing to scale')

  def boxed(self, base_boxed):
    """{'blocks': {'attention': {'k': {'scale': LKH}}, 'mlp': {'down': {'scale': LF}}}}."""
    leaves, sides = {}, {}
    for of_inputs, names in ((False, self.targets), (True, self.inputs)):
      setting = 'Ia3.inputs' if of_inputs else 'Ia3.targets'
      for path, (axes, shape) in (matrices.targeted(base_boxed, names, setting) if names else {}).items():
        if path in sides:
          raise ValueError(f'{path} is named by Ia3.targets={self.targets} and by inputs={self.inputs}')
        lead, ins, outs = matrices.sides(axes)
        letters, sizes = lead + (ins if of_inputs else outs), dict(zip(axes, shape))
        sides[path] = of_inputs
        leaf = jax.ShapeDtypeStruct(tuple(sizes[letter] for letter in letters), jnp.float32)
        leaves[f'{path}/scale'] = Lettered(leaf, letters)
    return trees.replaced({}, leaves)

  def new(self, base_boxed, base, key: jax.Array):
    """Ones."""
    boxes = self.boxed(base_boxed)
    return jax.tree.map(lambda box: jnp.ones(box.value.shape), boxes, is_leaf=lambda x: isinstance(x, Lettered))

  def attached(self, config, params, small, weight: float):
    """params with the matrices made Scaled, and the biases of those whose outputs are."""
    if weight != 1:
      raise ValueError(f'IA3 multiplies: it takes weight=1, not {weight}')
    nodes = {}
    for name, scale in trees.flat(small).items():
      path, _, part = name.rpartition('/')
      if part != 'scale':
        raise ValueError(f'{name} is no array of IA3, whose are all called scale')
      of_inputs = any(matrices.ends(path, target) for target in self.inputs)
      if not of_inputs and not any(matrices.ends(path, target) for target in self.targets):
        raise ValueError(f'{path} is named neither by Ia3.targets={self.targets} nor by inputs={self.inputs}')
      w = trees.at(params, path)
      shape = () if w is None else tuple(w.shape)
      rest = scale.ndim - 1
      expected = (*shape[:1], *(shape[1:1 + rest] if of_inputs else shape[len(shape) - rest:]))
      if w is None or tuple(scale.shape) != expected:
        raise ValueError(f'this IA3 is of another model: {name} has the shape {tuple(scale.shape)}, and this one has '
                         f'{"no such weight" if w is None else f"{path} of shape {shape}"}')
      nodes[path] = Scaled(w, scale, rest, of_inputs)
      if not of_inputs and (bias := trees.at(params, f'{path}_bias')) is not None:
        nodes[f'{path}_bias'] = bias * scale
    return trees.replaced(params, nodes)


class Scaled(layers.Adapted):
  """inner with its outputs, or its inputs, multiplied."""
  scale: jax.Array
  axes: int = struct.field(pytree_node=False)  # that are scaled; the others of `scale` stack layers
  of_inputs: bool = struct.field(pytree_node=False)

  def product(self, equation: str, x) -> jax.Array:
    wide = lambda y: jnp.expand_dims(self.scale, tuple(range(y.ndim - self.scale.ndim)))
    if self.of_inputs:
      return layers.product(equation, x * wide(x), self.inner)
    y = layers.product(equation, x, self.inner)
    return y * wide(y)

  def array(self) -> jax.Array:
    w = layers.array(self.inner)
    lead, others = self.scale.ndim - self.axes, w.ndim - self.scale.ndim
    first = self.scale.ndim if self.of_inputs else lead
    return w * jnp.expand_dims(self.scale, tuple(range(first, first + others)))
