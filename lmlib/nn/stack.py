"""Equal blocks one after another: one set of stacked weights, scanned or unrolled, with or without remat; or apart."""
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from lmlib import sharding
from lmlib.kernels import cross_entropy
from lmlib.kernels.attention import IMPLEMENTATIONS
from lmlib.kernels.decode_attention import DECODING
from lmlib.nn import pipeline
from lmlib.nn.cache import EIGHTS
from lmlib.nn.layers import KEPT

# What the backward pass finds in memory; the rest it computes again.
REMAT = {
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # results of matrix products with weights
    'full': jax.checkpoint_policies.nothing_saveable,                  # the input of every block
}


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a model is run: nothing here changes its weights or, but for dropout and rounding, its numbers."""
  dtype: str = 'float32'  # of activations; weights are float32
  scan: bool = True  # one program for all layers; False: unrolled, which compiles longer and may run faster
  remat: str | tuple[str, ...] | None = None  # what the backward pass finds: None all, 'dots', 'full', or what it names
  dropout: float | None = None  # share of each block's output that training zeroes
  attention: str = 'auto'  # which of kernels.attention.IMPLEMENTATIONS; with a cache a prompt is read by 'auto'
  decoding: str = 'auto'  # which of decode_attention.DECODING, for up to 16 tokens a row behind those that are cached
  cache: str | None = None  # type of cached keys and values: dtype, or 'int8' or 'float8_e4m3fn' with scales
  loss: str = 'auto'  # which of kernels.cross_entropy.IMPLEMENTATIONS makes losses and log-probabilities of logits
  apart: bool = False  # unrolled, weights and caches of every layer arrays of their own: serve/weights.py makes them

  def __post_init__(self):
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(f"Execution.dtype={self.dtype!r} must be 'float32' or 'bfloat16'")
    named = isinstance(self.remat, tuple) and bool(self.remat)
    if not (named and set(self.remat) <= set(KEPT)) and (named or self.remat not in (None, *REMAT)):
      raise ValueError(f'Execution.remat={self.remat!r} must be None, one of {sorted(REMAT)}, or a tuple of tensors to '
                       f'keep, of {KEPT}')
    if self.attention not in ('auto', *IMPLEMENTATIONS):
      raise ValueError(f"Execution.attention={self.attention!r} must be 'auto' or one of {sorted(IMPLEMENTATIONS)}")
    if self.decoding not in ('auto', *DECODING):
      raise ValueError(f"Execution.decoding={self.decoding!r} must be 'auto' or one of {sorted(DECODING)}")
    if self.cache not in (None, *EIGHTS):
      raise ValueError(f"Execution.cache={self.cache!r} must be None, for the type of activations, or one of {EIGHTS}")
    if self.loss not in ('auto', *cross_entropy.IMPLEMENTATIONS):
      raise ValueError(f"Execution.loss={self.loss!r} must be 'auto' or one of {sorted(cross_entropy.IMPLEMENTATIONS)}")
    if self.dropout is not None and not 0 < self.dropout < 1:
      raise ValueError(f'Execution.dropout={self.dropout} must lie between 0 and 1; None turns it off')
    if self.apart and (self.scan or self.remat is not None or self.dropout is not None):
      raise ValueError(f'Execution.apart is for decoding; it needs scan=False, remat=None and dropout=None, not '
                       f'scan={self.scan}, remat={self.remat!r} and dropout={self.dropout}')

  @property
  def cached(self) -> str:
    """The type of what a cache keeps."""
    return self.cache or self.dtype


def stack(block: type[nn.Module], layers: int, execution: Execution, *, shared: int):
  """`layers` copies of `block`, called as (x, per_layer, *shared) -> (x, per_layer).

  Weights and per_layer trees carry a leading axis L; the last `shared` arguments go to every block
  as they are. With execution.apart they carry none: see Apart. On several stages it is Staged; ValueError if those
  cannot share the layers.
  """
  if execution.apart:
    return functools.partial(Apart, block, layers)
  if sharding.size(pipeline.AXIS) > 1:
    pipeline.divides(layers)
    return functools.partial(Staged, block, layers, execution, shared)
  return scanned(block, layers, execution, shared=shared)


def beside_stages(block: type[nn.Module], layers: int, execution: Execution, *, shared: int):
  """A stack() that is too short for a pipeline: on several stages all of them run all of its layers."""
  if sharding.size(pipeline.AXIS) > 1 and not execution.apart:
    return functools.partial(Staged, block, layers, execution, shared, piped=False)
  return stack(block, layers, execution, shared=shared)


def scanned(block: type[nn.Module], layers: int, execution: Execution, *, shared: int):
  """A stack() for a device that has the weights of all layers."""
  if execution.remat is not None:
    named = jax.checkpoint_policies.save_only_these_names
    policy = named(*execution.remat) if isinstance(execution.remat, tuple) else REMAT[execution.remat]
    block = nn.remat(block, policy=policy, prevent_cse=not execution.scan)
  return nn.scan(block, length=layers, unroll=1 if execution.scan else layers,
                 variable_axes={'params': 0, 'intermediates': 0}, split_rngs={'params': True},
                 in_axes=(0, *(nn.broadcast,) * shared), metadata_params={nn.PARTITION_NAME: 'L'})


class Staged(nn.Module):
  """Blocks whose stacked weights lie on several stages: whole rows pass through them in a pipeline.

  Where a cache is there, as in decoding, every stage runs every layer, whose weights come from where they are.
  """
  block: type[nn.Module]
  layers: int
  execution: Execution
  shared: int
  cfg: Any
  piped: bool = True

  def setup(self):
    self.every = self.some(self.layers)
    nn.share_scope(self, self.every)

  def some(self, layers: int, **settings) -> nn.Module:
    return scanned(self.block, layers, self.execution, shared=self.shared)(self.cfg, **settings)

  def __call__(self, x, per_layer, *shared):
    if self.is_initializing() or self.layers % sharding.size(pipeline.AXIS):
      return self.every(x, per_layer, *shared)
    layers = self.every.variables['params'], per_layer
    run = lambda layers, x, shared: self.some(jax.tree.leaves(layers)[0].shape[0], parent=None).apply(
        {'params': layers[0]}, x, layers[1], *shared)
    _, *kept = per_layer
    if self.piped and not jax.tree.leaves(kept):
      return pipeline.through(run, layers, x, shared)
    return pipeline.gathered(run, layers, x, shared)


class Apart(nn.Module):
  """Blocks whose weights lie under their numbers, 'blocks/0/mlp/up', so that a product reads them where they are.

  Of stacked weights XLA on CPU copies a layer's before every product, which takes decoding twice the time. What a
  cache keeps goes out as a list, a tree a layer, and comes in as one or, the first time, stacked.
  """
  block: type[nn.Module]
  layers: int
  cfg: Any

  @nn.compact
  def __call__(self, x, per_layer, *shared):
    outs = []
    for i in range(self.layers):
      here = jax.tree.map(lambda leaf: leaf[i], per_layer, is_leaf=lambda leaf: isinstance(leaf, list))  # noqa: B023
      x, out = self.block(self.cfg, name=str(i))(x, here, *shared)
      outs.append(out)
    kept, sums = zip(*outs)
    return x, (None if kept[0] is None else list(kept), jax.tree.map(lambda *each: jnp.stack(each), *sums))
