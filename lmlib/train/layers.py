"""Norms of every layer's weights, gradient and update in one step: what a spike is looked at by."""
from collections.abc import Callable
import re

import jax
import jax.numpy as jnp
import optax

from lmlib import sharding, trees
from lmlib.optim.kinds import descended
from lmlib.train import step as step_of

COLUMNS = ('weights', 'gradient', 'update')


def compiled(loss: step_of.Loss, optimizer: optax.GradientTransformation, microbatches: int = 1) -> Callable:
  """jit of (state, batch, *frozen) -> (metrics, {'weights': {name: norm}, 'gradient': ..., 'update': ...}) of a step.

  Metrics are loss, grad_norm and finite, as of step.make_step. Names are those on disk, layers apart:
  'blocks_0/mlp/up'. The gradient is that before clipping. The state is kept.
  """

  def layers(state: step_of.State, batch, *frozen):
    grads, _, metrics = step_of.gradients(loss, state.params, batch, *frozen, microbatches=microbatches)
    updates, _ = optimizer.update(grads, sharding.near(state.optimizer), state.params)
    grad_norm, update_norm = optax.tree.norm(descended(grads)), optax.tree.norm(updates)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(update_norm) & jnp.isfinite(metrics['loss'])
    found = dict(zip(COLUMNS, map(norms, (state.params, grads, updates))))
    return {'loss': metrics['loss'], 'grad_norm': grad_norm, 'finite': finite}, found

  return jax.jit(layers)


def norms(tree) -> dict[str, jax.Array]:
  """The Euclidean norm of every weight of a tree, layers apart, float32."""
  found, leaves = {}, trees.flat(tree)
  for name, layers in trees.layer_names(tree).items():
    square = jnp.square(leaves[name].astype(jnp.float32))
    if layers is None:
      found[name] = jnp.sqrt(square.sum())
    else:
      found |= dict(zip(layers, jnp.sqrt(square.sum(tuple(range(1, square.ndim))))))
  return found


def plain(found) -> dict:
  """What compiled() gives, as numbers of Python."""
  return jax.tree.map(float, sharding.fetched(found))


def by_layer(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
  """The norms of whole layers, 'blocks_0' and 'embed', from those of their weights."""
  return {column: _joined(values) for column, values in found.items()}


def _joined(values: dict[str, float]) -> dict[str, float]:
  squares: dict[str, float] = {}
  for name, norm in values.items():
    layer = (re.match(rf'.*?\b{trees.BLOCKS}_\d+(?=/)', name) or re.match(r'[^/]*', name))[0]
    squares[layer] = squares.get(layer, 0.0) + norm**2
  return {layer: square**0.5 for layer, square in squares.items()}


def table(found: dict[str, dict[str, float]]) -> str:
  """A line each: norms of weights, gradient and update, and the update as a share of the weights."""
  width = max(map(len, found['weights']))
  lines = [f'{"":<{width}}  {"weights":>10}  {"gradient":>10}  {"update":>10}  update/weights']
  for name, weights in found['weights'].items():
    gradient, update = found['gradient'][name], found['update'][name]
    share = f'{update / weights:.2e}' if weights else '-'
    lines.append(f'{name:<{width}}  {weights:>10.4g}  {gradient:>10.4g}  {update:>10.4g}  {share:>14}')
  return '\n'.join(lines)
