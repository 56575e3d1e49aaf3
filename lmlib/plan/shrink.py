"""A run's model, layout and objective made small, with all that is particular to them: what verify.py computes.

Numbers shrink, switches stay: a model keeps its kinds of layers, its grouped heads, its router and its windows, and a
layout all of its mesh axes that have several devices.
"""
import dataclasses
import math

import jax

from lmlib.data import objectives
from lmlib.models import protocol
from lmlib.sharding import MESH_AXES, Layout

HEADS, HEAD_WIDTH, WIDTH, HIDDEN, LENGTH, EXPERTS = 8, 8, 64, 64, 32, 8
# The largest value of a field wherever it stands in a model's config; a smaller one stays.
MOST = {'head_width': HEAD_WIDTH, 'width': WIDTH, 'hidden': HIDDEN, 'length': LENGTH, 'shared': HIDDEN, 'window': 5,
        'chunk': 8, 'stride': 3, 'bigrams': 97, 'rank': 16, 'q_rank': 24, 'turned_width': 8, 'value_width': 8,
        'original': LENGTH // 2, 'dense_layers': 1}


def layout(whole: Layout, devices: int = 8) -> Layout:
  """A layout of the same mesh axes: each has two devices, and the largest ones more while `devices` allow it.

  Of several slices there are two, a pipeline chooses its microbatches itself, and sums are float32 as they are.
  """
  found = {name: 1 if size == 1 else 2 for name, size in zip(MESH_AXES, whole.sizes)}
  wanted = {name: math.inf if size == -1 else size for name, size in zip(MESH_AXES, whole.sizes)}
  while several := [name for name in MESH_AXES if found[name] > 1 and 2 * found[name] <= wanted[name]]:
    if 2 * math.prod(found.values()) > devices:
      break
    found[max(several, key=lambda name: wanted[name] / found[name])] *= 2
  return dataclasses.replace(whole, **found, slices=min(whole.slices, 2), wide_sums=False,
                             pipeline=dataclasses.replace(whole.pipeline, microbatches=None))


def model(whole: protocol.Config, small: Layout, vocab: int) -> protocol.Config:
  """The model with small numbers, in float32 and by whatever kernels this machine has, for a small layout."""
  changes = {'vocab': vocab, 'execution': dataclasses.replace(
      whole.execution, dtype='float32', attention='auto', decoding='auto', loss='auto', dropout=None)}
  kv_heads = getattr(whole, 'kv_heads', whole.heads)
  grouped = {whole.heads: HEADS, 1: 1}.get(kv_heads, HEADS // 2)
  changes |= {'heads': HEADS, 'kv_heads': grouped}
  patterns = len(getattr(whole.attention, 'patterns', (None,)))
  for name in ('layers', 'encoder_layers'):
    if (layers := getattr(whole, name, None)) is not None:
      least = max(2, patterns if name == 'layers' else 2, 2 if getattr(whole, 'dense_layers', 0) else 1)
      several, outside = small.stage * small.pipeline.rounds, min(getattr(whole, 'dense_layers', 0), 1)
      changes[name] = min(layers, outside - (outside - least) // several * several)  # stages share those not outside
  fields = {field.name for field in dataclasses.fields(whole)}
  return _smaller(whole, {name: value for name, value in changes.items() if name in fields})


def _smaller(value, changes=None):
  """A dataclass with every field of MOST at most that, those inside it too, and some set to what `changes` says."""
  changes = dict(changes or {})
  for field in dataclasses.fields(value):
    if field.name in changes or not field.init:
      continue
    now = getattr(value, field.name)
    if isinstance(now, int) and not isinstance(now, bool) and field.name in MOST:
      changes[field.name] = min(now, MOST[field.name])
    elif isinstance(now, tuple) and field.name in ('short', 'long'):  # of a frequency each, LongRope's
      changes[field.name] = now[:HEAD_WIDTH // 2]
    elif isinstance(now, tuple):
      changes[field.name] = tuple(_smaller(item) if dataclasses.is_dataclass(item) else item for item in now)
    elif dataclasses.is_dataclass(now):
      changes[field.name] = _experts(now) if hasattr(now, 'router') else _smaller(now)
  return dataclasses.replace(value, **changes)


def _experts(experts):
  """Up to EXPERTS experts, of which as large a share is chosen as those allow: two at most, in four groups at most."""
  count, router = min(experts.count, EXPERTS), experts.router
  if getattr(router, 'groups', None) is not None:
    groups = math.gcd(min(router.groups, 4), count)
    router = dataclasses.replace(router, groups=groups, groups_chosen=min(router.groups_chosen, max(1, groups // 2)),
                                 group_best=min(router.group_best, count // groups))
  if hasattr(router, 'chosen'):
    router = dataclasses.replace(router, chosen=min(router.chosen, 2))
  return _smaller(experts, {'count': count, 'router': router})


def objective(whole, vocab: int):
  """The objective with special ids that follow a tokeniser of `vocab` ids."""
  specials = getattr(whole, 'specials', None)
  if specials is None:
    return whole
  every = objectives.specials_after(vocab, len(specials.sentinels))
  kept = {name: getattr(every, name) if value not in (None, ()) else value for name, value in
          ((field.name, getattr(specials, field.name)) for field in dataclasses.fields(specials))}
  return dataclasses.replace(whole, specials=objectives.Specials(**kept))


def said(whole: protocol.Config, small: protocol.Config) -> str:
  """In a line, what was made small: '32 layers to 2, 8,030,261,248 weights to 163,456'."""
  count = lambda config: sum(math.prod(x.shape) for x in jax.tree.leaves(protocol.boxed(config)))
  return f'{whole.layers} layers to {small.layers}, {count(whole):,} weights to {count(small):,}'
