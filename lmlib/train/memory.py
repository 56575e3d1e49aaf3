"""What the memory of a device holds while a run trains, by kind, from shapes and the compiled step."""
import math

import jax

from lmlib import sharding
from lmlib.train import step as step_of


def by_kind(state: step_of.State, frozen: tuple, program: jax.stages.Compiled) -> dict[str, int]:
  """Bytes a device of weights, optimizer state, frozen weights and, if the compiler says it, of all else in a step.

  state: arrays or their shapes, with shardings. All else are activations, gradients and what the compiler keeps.
  """
  waits = lambda x: x.sharding is not None and x.sharding.memory_kind == sharding.HOST
  moments = jax.tree.leaves(state.optimizer)
  found = {'weights': _bytes(state.params), 'optimizer state': _bytes([x for x in moments if not waits(x)])}
  if away := [x for x in moments if waits(x)]:
    found['optimizer state on its host'] = _bytes(away)
  if frozen:
    found['frozen weights'] = _bytes(frozen)
  if (told := program.memory_analysis()) is not None:
    found['activations and temporaries'] = told.temp_size_in_bytes
  return found


def said(found: dict[str, int]) -> str:
  """'weights 13.9 MB, optimizer state 27.8 MB, activations and temporaries 812.0 MB'."""
  return ', '.join(f'{kind} {size / 1e6:,.1f} MB' for kind, size in found.items())


def _bytes(tree) -> int:
  """What one device holds of a tree."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape)
             * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
