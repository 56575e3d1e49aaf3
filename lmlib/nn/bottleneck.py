"""Bottleneck adapters (Houlsby et al. 2019): small layers after attention and after the hidden layer of every block.

  x + up(act(down(x))),   before the sum with the stream

up begins at 0, so that a new adapter changes nothing.
"""
import dataclasses

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from lmlib import sharding, trees
from lmlib.nn import layers, matrices
from lmlib.nn.mlp import ACTIVATIONS
from lmlib.sharding import Lettered

LAYERS = {'attention': ('attention',), 'cross_attention': ('cross_attention',), 'mlp': ('mlp', 'experts')}
PARTS = {'down': 'LDA', 'down_bias': 'LA', 'up': 'LAD', 'up_bias': 'LD'}


@dataclasses.dataclass(frozen=True)
class Bottleneck:
  width: int = 64
  activation: str = 'gelu'
  after: tuple[str, ...] = ('attention', 'mlp')  # of LAYERS; a mixture of experts is an mlp too

  def __post_init__(self):
    if not isinstance(self.width, int) or self.width < 1:
      raise ValueError(f'Bottleneck.width={self.width!r} must be a positive integer')
    if self.activation not in ACTIVATIONS:
      raise ValueError(f'Bottleneck.activation={self.activation!r} must be one of {", ".join(ACTIVATIONS)}')
    if not self.after or isinstance(self.after, str) or not set(self.after) <= LAYERS.keys():
      raise ValueError(f'Bottleneck.after={self.after!r} must name some of {", ".join(LAYERS)} in a tuple')

  def boxed(self, base_boxed):
    """{'blocks': {'attention_bottleneck': {'down': LDA, 'down_bias': LA, 'up': LAD, 'up_bias': LD}}}."""
    shapes, sizes = trees.flat(nn.unbox(base_boxed)), {}
    for path, axes in trees.flat(sharding.letters(base_boxed)).items():
      blocks, _, rest = path.rpartition(f'{trees.BLOCKS}/')
      if path.startswith((f'{trees.BLOCKS}/', f'{blocks}{trees.BLOCKS}/')):
        sizes.setdefault(f'{blocks}{trees.BLOCKS}/{rest.split("/")[0]}', {}).update(zip(axes, shapes[path].shape))
    leaves = {}
    for name in self.after:
      found = [path for path in sizes if path.rpartition('/')[2] in LAYERS[name]]
      if not found:
        raise ValueError(f'Bottleneck.after names {name!r}, which no block of this model has; they have '
                         f'{", ".join(sorted({path.rpartition("/")[2] for path in sizes}))}')
      for path in found:
        here = sizes[path] | {'A': self.width}
        leaves |= {f'{path.rpartition("/")[0]}/{name}_bottleneck/{part}': Lettered(
            jax.ShapeDtypeStruct(tuple(here[letter] for letter in axes), jnp.float32), axes)
                   for part, axes in PARTS.items()}
    return trees.replaced({}, leaves)

  def new(self, base_boxed, base, key: jax.Array):
    """down of deviation 1 / sqrt(D), the others at 0."""
    leaves = {}
    for path, box in trees.flat(nn.unbox(self.boxed(base_boxed))).items():
      leaves[path] = jnp.zeros(box.shape, jnp.float32)
      if path.endswith('/down'):
        key, this = jax.random.split(key)
        leaves[path] = jax.random.normal(this, box.shape) * box.shape[1]**-0.5
    return trees.replaced({}, leaves)

  def attached(self, config, params, small, weight: float):
    """params with a small layer beside each that has one."""
    if weight != 1:
      raise ValueError(f'a bottleneck is no sum: it takes weight=1, not {weight}')
    nodes = {}
    for path, part in matrices.parts(small).items():
      where, _, name = path.rpartition('/')
      layer = name.removesuffix('_bottleneck')
      if part.keys() != PARTS.keys() or layer not in LAYERS or layer == name:
        raise ValueError(f'{path} with the arrays {", ".join(sorted(part))} is no part of a Bottleneck')
      if not any(trees.at(params, f'{where}/{one}') for one in LAYERS[layer]):
        raise ValueError(f'this Bottleneck is of another model: it stands at {path}, and this one has no such layer')
      if trees.at(params, path) is not None:
        raise ValueError(f'there is a bottleneck at {path} already: the order of two would be unclear')
      D, L = config.width, part['down'].shape[0]
      expected = {'down': (L, D, self.width), 'down_bias': (L, self.width), 'up': (L, self.width, D), 'up_bias': (L, D)}
      depth = jax.tree.leaves(trees.at(params, where))[0].shape[0]
      wrong = [f'{path}/{name} is {tuple(part[name].shape)} in the adapter and {(depth, *shape[1:])} for the model'
               for name, shape in expected.items() if tuple(part[name].shape) != (depth, *shape[1:])]
      if wrong:
        raise ValueError(f'this Bottleneck is of another model or width={self.width}: {"; ".join(wrong)}')
      nodes[path] = After(**part, activation=self.activation)
    return trees.replaced(params, nodes)


class After(layers.Beside):
  """What stands after a layer."""
  down: jax.Array
  down_bias: jax.Array
  up: jax.Array
  up_bias: jax.Array
  activation: str = struct.field(pytree_node=False)

  def __call__(self, x_BTD):
    w = jax.tree.map(lambda x: x.astype(x_BTD.dtype), self)
    y_BTA = layers.product('BTD,DA->BTA', x_BTD, w.down) + w.down_bias[None, None]
    return x_BTD + layers.product('BTA,AD->BTD', ACTIVATIONS[self.activation](y_BTA), w.up) + w.up_bias[None, None]
