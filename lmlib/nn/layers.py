"""The one door through which weights enter a model, products with them, norms and dropout.

Weights are stored in float32 and cast to the activations' type where they are used; norms
run in float32 (Ba et al. 2016 for LayerNorm, Zhang and Sennrich 2019 for RMSNorm).

In the place of an array the tree of weights may hold something that stands for one: a quantised array, or one with an
adapter (adapters.py). It knows array(), astype() and, if it is Adapted, its own product; whatever else a model
finds beside its weights it asks for with beside().
"""
import dataclasses
import functools
import math
import re
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np

from lmlib import sharding
from lmlib.sharding import Lettered

# What Execution.remat may name: queries, keys and values as they meet, what heads have read, what a hidden layer makes
# before its last product, and what attention and hidden layer add to the stream.
KEPT = ('q', 'k', 'v', 'attended', 'hidden', 'attention', 'mlp')


def weight(module: nn.Module, name: str, axes: str, fan_in: str, scale: float = 1.0) -> jax.Array:
  """A float32 weight of `module`, one letter an axis, of standard deviation scale / sqrt(fan in).

  The sizes come from `module.sizes`, a mapping from letters; the fan in is the product of the sizes of
  the letters `fan_in`, 1 if there are none. What stands for an array in the tree of weights comes as it is.
  """
  if (found := beside(module, name)) is not None and not isinstance(found, (jax.Array, np.ndarray)):
    return found
  shape = tuple(module.sizes[a] for a in axes)
  deviation = scale / math.prod(module.sizes[a] for a in fan_in) ** 0.5
  return module.param(name, lambda key: Lettered(deviation * jax.random.normal(key, shape, jnp.float32), axes))


def bias(module: nn.Module, name: str, axes: str) -> jax.Array:
  """A float32 bias of `module`, zeros at first; its name must end in '_bias', which is its kind to an optimizer."""
  shape = tuple(module.sizes[a] for a in axes)
  return module.param(name, lambda key: Lettered(jnp.zeros(shape, jnp.float32), axes))


def beside(module: nn.Module, name: str):
  """What the tree of weights holds for `module` under this name, None if nothing does."""
  return module.get_variable('params', name)


class Beside(struct.PyTreeNode):
  """What an adapter puts into the tree of weights where a model has none."""


class Adapted(struct.PyTreeNode):
  """A weight with an adapter: what it was, an array or what stands for one, and more of it in other fields.

  Every array of it has the axes in front that the weight has (L, where layers are stacked).
  """
  inner: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.inner.shape

  def product(self, equation: str, x) -> jax.Array:
    """The product() of x with this weight."""
    raise NotImplementedError

  def array(self) -> jax.Array:
    """The weight with its adapter in it, as one array."""
    raise NotImplementedError

  def astype(self, dtype) -> 'Adapted':
    """The same, to be computed with in another type."""
    names = [field.name for field in dataclasses.fields(self) if field.metadata.get('pytree_node', True)]
    return self.replace(**{name: getattr(self, name).astype(dtype) for name in names})


class Wide(struct.PyTreeNode):
  """A float32 matrix to be computed with in another type, whose gradient stays float32: see cast()."""
  inner: jax.Array
  dtype: str = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.inner.shape

  def product(self, equation: str, x) -> jax.Array:
    """The product() of x with this matrix."""
    return _wide(equation, self.dtype, x, self.inner)

  def array(self) -> jax.Array:
    """The matrix in the type that is computed with."""
    return self.inner.astype(self.dtype)


def cast(w, dtype):
  """A matrix as product() takes it, in the type of the activations.

  A sum over devices has the type of its terms, and the gradient of a bfloat16 matrix is made of bfloat16 products of
  each device. By Layout.wide_sums the matrix stays float32 up to the product, and its gradient is float32 as it leaves
  the product of each device; the numbers that go into both are the same. ValueError where nothing is narrower.
  """
  return Wide(w, jnp.dtype(dtype).name) if _sums_wide(w, dtype) else w.astype(dtype)


def looked_up(table, ids, dtype, axes: str | None = None):
  """The rows of a table of weights at `ids`, in the type of the activations; see cast().

  axes: the letters by which the table is laid out, if it is.
  """
  laid = lambda table: table if axes is None else sharding.constrain(table, axes)
  if not _sums_wide(table, dtype):
    return laid(table.astype(dtype))[ids]
  rows = jax.custom_vjp(lambda table: laid(table.astype(dtype))[ids])
  pulled = lambda _, dx: (jnp.zeros(table.shape, jnp.float32).at[ids].add(dx.astype(jnp.float32)),)
  rows.defvjp(lambda table: (rows(table), None), pulled)
  return rows(table)


def _sums_wide(w, dtype) -> bool:
  """Whether the gradient of a weight is to be wider than activations of this type."""
  if not sharding.current().wide_sums:
    return False
  if jnp.dtype(dtype) == jnp.float32:
    raise ValueError("Layout.wide_sums=True has no effect on a model with Execution.dtype='float32', whose gradients "
                     'are summed in float32 as they are: leave wide_sums=False')
  return isinstance(w, (jax.Array, np.ndarray)) and w.dtype == jnp.float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _wide(equation: str, dtype: str, x, w):
  return product(equation, x, w.astype(dtype))


def _wide_forward(equation: str, dtype: str, x, w):
  return _wide(equation, dtype, x, w), (x, w)


def _wide_backward(equation: str, dtype: str, saved, dy):
  x, w = saved
  x_axes, w_axes, out = re.fullmatch(r'(\w+),(\w+)->(\w+)', equation).groups()
  dx, = jax.vjp(lambda x: product(equation, x, w.astype(dtype)), x)[1](dy)
  return dx, jnp.einsum(f'{x_axes},{out}->{w_axes}', x, dy, preferred_element_type=jnp.float32)


_wide.defvjp(_wide_forward, _wide_backward)


def after(module: nn.Module, name: str, x_BTD):
  """x, or what an adapter of this name beside `module` makes of it."""
  adapter = beside(module, name)
  return x_BTD if adapter is None else adapter(x_BTD)


def array(w) -> jax.Array:
  """The array that a weight is, or stands for."""
  return w if isinstance(w, (jax.Array, np.ndarray)) else w.array()


def product(equation: str, x, w) -> jax.Array:
  """einsum of activations with a weight, such as ('BTD,DKGH->BTKGH', x, w), as one product of matrices.

  The letters summed over end x and begin w. The same numbers as jnp.einsum, but the gradient of w then
  sums over one axis of length B * T, for which XLA on CPU needs no transposed copies. What stands for an array is
  made into one again by the backward pass, and not kept for it.
  """
  if isinstance(w, (Adapted, Wide)):
    return w.product(equation, x)
  if not isinstance(w, (jax.Array, np.ndarray)):
    return jax.checkpoint(lambda x, w: product(equation, x, w.array()))(x, w)
  inputs, out = equation.split('->')
  x_axes, w_axes = inputs.split(',')
  shared = ''.join(a for a in w_axes if a in x_axes)
  assert x_axes.endswith(shared), equation
  assert w_axes.startswith(shared), equation
  assert out == x_axes.removesuffix(shared) + w_axes.removeprefix(shared), equation
  lead, last = x.shape[:len(x_axes) - len(shared)], w.shape[len(shared):]
  if sharding.size('context') > 1:  # one axis of B * T would bring together rows that are split
    return jnp.einsum(equation, x, w)
  size = math.prod(w.shape[:len(shared)])
  return (x.reshape(-1, size) @ w.reshape(size, -1)).reshape(*lead, *last)


def kept(x, name: str):
  """x, which the backward pass finds in memory if Execution.remat names it; a name of KEPT."""
  assert name in KEPT, name
  return jax.ad_checkpoint.checkpoint_name(x, name)


class RmsNorm(nn.Module):
  """x / rms(x) * scale over the last axes, in float32, returned in the type of x."""
  epsilon: float = 1e-6
  axes: str = 'D'  # letters of those last axes

  @nn.compact
  def __call__(self, x):
    over = tuple(range(x.ndim - len(self.axes), x.ndim))
    scale = self.param('scale', lambda key: Lettered(jnp.ones(x.shape[over[0]:], jnp.float32), self.axes))
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y**2, axis=over, keepdims=True) + self.epsilon)
    return (y * jnp.expand_dims(scale, tuple(range(over[0])))).astype(x.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / deviation * scale + bias over the last axis, in float32, returned in the type of x."""
  epsilon: float = 1e-5
  biased: bool = True

  @nn.compact
  def __call__(self, x_BTD):
    width = x_BTD.shape[-1:]
    y_BTD = x_BTD.astype(jnp.float32)
    y_BTD -= jnp.mean(y_BTD, axis=-1, keepdims=True)
    y_BTD *= jax.lax.rsqrt(jnp.mean(y_BTD**2, axis=-1, keepdims=True) + self.epsilon)
    scale_D = self.param('scale', lambda key: Lettered(jnp.ones(width, jnp.float32), 'D'))
    y_BTD *= scale_D[None, None]
    if self.biased:
      y_BTD += self.param('bias', lambda key: Lettered(jnp.zeros(width, jnp.float32), 'D'))[None, None]
    return y_BTD.astype(x_BTD.dtype)


def dropout(x_BTD, keys_B, rate: float):
  """Zeroes a share `rate` of x and scales the rest by 1 / (1 - rate); one random key a row.

  A row's own key decides its mask, so microbatches and devices do not change it.
  """
  keep_BTD = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BTD.shape[1:]))(keys_B)
  return jnp.where(keep_BTD, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)
