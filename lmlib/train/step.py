"""One optimizer step: gradients summed over microbatches, divided once by their weight."""
from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import optax

from lmlib import fitting, sharding
from lmlib.models import protocol
from lmlib.nn import pipeline
from lmlib.optim.kinds import descended
from lmlib.optim.state import state_shardings

# loss(params, batch, *frozen) -> (summed loss, its weight, summed metrics). Sums, not means:
# then microbatches and devices of unequal weight add up to the right average. A metric may be a pair of a sum and
# a weight of its own. `frozen`, if a loss asks for it, is what a step is given and does not change.
Loss = Callable[..., tuple[jax.Array, jax.Array, dict[str, Any]]]


@struct.dataclass
class State:
  """What a run carries from step to step, and what a checkpoint holds."""
  step: jax.Array
  params: Any
  optimizer: Any
  skipped: jax.Array  # steps left out so far because a number was not finite

  @classmethod
  def create(cls, params, optimizer: optax.GradientTransformation) -> 'State':
    return cls(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))


def make_step(loss: Loss, optimizer: optax.GradientTransformation, microbatches: int = 1, places=None):
  """Returns step(state, batch, *frozen) -> (state, metrics), pure and ready to jit; places: see gradients().

  Every array of a batch has the batch axis first, a multiple of `microbatches`. Metrics are the
  loss and the loss's own, divided by the weight; norms of gradient (before clipping), parameters
  and update; `finite`, 0 where loss, gradient or update was not and the step changed nothing but `step`.
  """

  def step(state: State, batch, *frozen):
    grads, weight, metrics = gradients(loss, state.params, batch, *frozen, microbatches=microbatches, places=places)
    grad_norm = optax.tree.norm(descended(grads))
    sound = jnp.isfinite(grad_norm) & jnp.isfinite(metrics['loss'])
    params, moments, update_norm, finite = _updated(optimizer, grads, state.params, state.optimizer, sound)
    metrics |= {'grad_norm': grad_norm, 'update_norm': update_norm,
                'param_norm': optax.tree.norm(state.params), 'weight': weight,
                'finite': finite.astype(jnp.float32)}
    return State(state.step + 1, params, moments, state.skipped + (1 - finite.astype(jnp.int32))), metrics

  return step


def _updated(optimizer, grads, params, moments, sound):
  """(weights, moments, norm of the update, whether all was finite); old ones if not `sound` or the update is not."""

  def updated(params, moments):
    moments = sharding.near(moments)
    updates, new = optimizer.update(grads, moments, params)
    norm = optax.tree.norm(updates)
    finite = sound & jnp.isfinite(norm)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return keep(optax.apply_updates(params, updates), params), keep(new, moments), norm, finite

  if not sharding.current().offload:
    return updated(params, moments)
  # Of a branch nothing begins before its condition is known, so moments come when the backward pass has ended.
  left = lambda params, moments: (params, sharding.near(moments), jnp.float32(jnp.nan), False)
  return jax.lax.cond(sound, updated, left, params, moments)


def gradients(loss: Loss, params, batch, *frozen, microbatches: int = 1, places=None):
  """(gradients, weight, metrics) of a batch: sums over its microbatches, divided once by the weight.

  places: where they are laid out, a tree of NamedShardings like the weights; None: where XLA will.
  """

  def summed(params, batch):
    total, weight, metrics = loss(params, batch, *frozen)
    return total, (weight, metrics | {'loss': total})

  def gradient(params, batch):
    grads, aux = jax.grad(summed, has_aux=True)(params, batch)
    return grads if places is None else sharding.laid(grads, places), aux

  grads, (weight, metrics) = _accumulated(gradient, params, batch, microbatches)
  metrics = {name: x[0] / x[1] if isinstance(x, tuple) else x / weight for name, x in metrics.items()}
  return jax.tree.map(lambda x: x / weight, grads), weight, metrics


def _accumulated(gradient, params, batch, microbatches: int):
  """The sum of gradient(params, microbatch); microbatch i holds the rows i, i + m, i + 2m …

  Neighbouring rows live on one device, so every device takes part in every microbatch.
  """
  if microbatches == 1:
    return gradient(params, batch)
  batch = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
  first = jax.tree.map(lambda x: x[0], batch)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first))
  add = lambda sums, micro: (jax.tree.map(jnp.add, sums, gradient(params, micro)), None)
  return jax.lax.scan(add, zeros, batch)[0]


def placed(boxed):
  """Shapes and types of weights from protocol.boxed() and, inside sharding.use(), where each is stored.

  ValueError if the layout in use does not fit them.
  """
  if not sharding.in_use():
    return nn.unbox(boxed)
  fitting.check(boxed)
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                      nn.unbox(boxed), sharding.shardings(boxed))


def shapes(config: protocol.Config, optimizer: optax.GradientTransformation) -> State:
  """The State of a new run: shapes, types and, inside sharding.use(), where every array is stored.

  ValueError if the layout in use does not fit the model.
  """
  fitting.check(boxed := protocol.boxed(config))
  return shapes_of(boxed, optimizer)


def shapes_of(boxed, optimizer: optax.GradientTransformation) -> State:
  """The State of weights with their letters, such as those of an adapter (adapters.boxed)."""
  params = nn.unbox(boxed)
  state = jax.eval_shape(lambda params: State.create(params, optimizer), params)
  if not sharding.in_use():
    return state
  everywhere = sharding.replicated()
  moments = state_shardings(optimizer, params, sharding.shardings(boxed, 'moments'), everywhere)
  stored = State(everywhere, sharding.shardings(boxed), moments, everywhere)
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, stored)


def told(boxed, rows: int) -> str:
  """What the layout in use does with weights, and with microbatches of so many rows, for a report; '' if nothing."""
  return '; '.join(filter(None, [fitting.told(boxed), pipeline.told(rows)]))


def init(config: protocol.Config, optimizer: optax.GradientTransformation, key: jax.Array) -> State:
  """A new run's State, each array made where it is stored."""
  made = lambda key: State.create(protocol.new(config, key), optimizer)
  where = jax.tree.map(lambda x: x.sharding, shapes(config, optimizer)) if sharding.in_use() else None
  return jax.jit(made, out_shardings=where)(key)


def begun(params, optimizer: optax.GradientTransformation, shapes: State) -> State:
  """A new run's State of weights that are there, each array where `shapes` stores it."""
  made = State.create(params, optimizer)
  return jax.device_put(made, jax.tree.map(lambda x: x.sharding, shapes)) if sharding.in_use() else made


def compiled(loss: Loss, optimizer: optax.GradientTransformation, microbatches: int, shapes: State):
  """make_step() jitted: the old state's memory is reused, the new one is laid out like `shapes`."""
  if not sharding.in_use():
    return jax.jit(make_step(loss, optimizer, microbatches), donate_argnums=0)
  where = jax.tree.map(lambda x: x.sharding, shapes)
  step = make_step(loss, optimizer, microbatches, sharding.placed(optimizer.letters, shapes.params, 'gradients'))
  return jax.jit(step, donate_argnums=0, out_shardings=(where, None))
