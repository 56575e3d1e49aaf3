"""Adapters: small trees of weights beside those of a model, which stay as they are.

  method   what is trained, a frozen dataclass: Lora (lora.py), Ia3 (ia3.py), Bottleneck (bottleneck.py), Prefix,
           Prompt and PTuning (prompts.py)
  boxed    shapes and letters of a method's weights for a model
  new      those weights, which at first change nothing
  attach   the weights of a model with adapters in them: what every function that takes params reads
  merge    the same as plain arrays
  loss_of  the loss of the small tree alone

An adapted model is its config with attach(config, base, ...) in the place of params. Nothing is copied, so several
adapters share one base, are summed by their weights, and are switched by attaching others.
"""
from collections.abc import Callable
from typing import Any, Protocol

from flax import struct
import jax

from lmlib.nn import layers


class Method(Protocol):
  """A way to adapt a model. `base` is the tree of the model's weights, `base_boxed` their shapes and letters."""

  def boxed(self, base_boxed) -> Any:
    """Shapes and letters of the small tree, as Lettered. ValueError for what the model does not have."""

  def new(self, base_boxed, base, key: jax.Array) -> Any:
    """The small tree at first."""

  def attached(self, config, params, small, weight: float) -> Any:
    """params with the small tree in it, `weight` times."""


@struct.dataclass
class Adapter:
  """A small tree and the method that it is of."""
  tree: Any
  method: Method = struct.field(pytree_node=False)
  weight: float = struct.field(pytree_node=False, default=1.0)  # what is added is multiplied by it


def boxed(method: Method, base_boxed):
  """Shapes and letters of a method's weights for a model; ValueError for parts that the model does not have."""
  return method.boxed(base_boxed)


def new(method: Method, base_boxed, base, key: jax.Array):
  """A method's weights at first, float32. Models begin as they are, but for prompts, which are read from then on."""
  return method.new(base_boxed, base, key)


def attach(config, base, *adapters: Adapter):
  """The weights of a model with adapters in them, in this order; the arrays of `base` are shared, not copied.

  ValueError, with names and both shapes, for an adapter of another model or method.
  """
  params = base
  for adapter in adapters:
    params = adapter.method.attached(config, params, adapter.tree, adapter.weight)
  return params


def merge(config, base, *adapters: Adapter):
  """The weights of a model with adapters added into them: plain arrays, of the shapes of `base`.

  ValueError for adapters that are no change of weights: bottlenecks and prompts.
  """
  params = attach(config, base, *adapters)
  if more := sorted(beside(params)):
    raise ValueError(f'{", ".join(more)} stand beside the weights and cannot be merged into them; attach() keeps them')
  return jax.tree.map(layers.array, params, is_leaf=lambda x: not isinstance(x, dict))


def beside(params) -> list[str]:
  """Paths of what attach() has put where a model has no weight."""
  there = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, layers.Beside))
  return ['/'.join(str(key.key) for key in path) for path, x in there if isinstance(x, layers.Beside)]


def loss_of(config, method: Method, loss: Callable) -> Callable:
  """loss(small, batch, base) of a loss(params, batch): only the small tree is differentiated."""
  return lambda small, batch, base: loss(attach(config, base, Adapter(small, method)), batch)
