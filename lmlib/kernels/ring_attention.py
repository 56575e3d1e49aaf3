"""Attention of rows that are split among devices: keys and values go round in a ring (Liu et al. 2023).

Each device keeps its queries and meets one part of the keys after the other; the results for parts are joined by the
logs of their sums (attention_parts.py), and the gradient goes round the other way, by differentiation. With a causal
mask the last device would have all the work: before the ring parts change places, so that device i of c has the parts i
and 2c - 1 - i of 2c (as in Llama 3, Dubey et al. 2024; Striped Attention, Brandon et al. 2023, deals out single
tokens), and back after it. Unlike there nobody outside sees another order: embeddings, losses and whatever looks at
neighbours find tokens where they were.

Packed documents, prefixes, windows and sinks are those of a row on one device, for every part carries its places and
documents along. A bias stays with the queries, each device's with all keys of the row. Keys in front of all rows are on
every device, and met before the first part.
"""
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmlib import sharding
from lmlib.kernels import attention_gpu, attention_parts, attention_tpu

FRONT = 'front_k', 'front_v'


def needed(q_BTKGH, k_BSKH, rows) -> bool:
  """Whether these queries are split along T, and their keys are of the same tokens."""
  T, S = q_BTKGH.shape[1], k_BSKH.shape[1] - rows.front
  return T == S and rows.place_BS is None and bool(ways(q_BTKGH))


def ways(q_BTKGH) -> tuple[str, ...]:
  """The mesh axes that T is split over."""
  return sharding.split('BTKGH', q_BTKGH.shape)[1]


def lacking(kernel, q_BTKGH, k_BSKH, v_BSKH, pattern, rows, added) -> list[str]:
  """What of a case cannot be done around a ring; kernel: the implementation of a part, None for plain jnp."""
  return kernel.lacking(q_BTKGH, k_BSKH, v_BSKH, pattern, rows.replace(front=0), added) if kernel else []


def attention(kernel, q_BTKGH, k_BSKH, v_BSKH, pattern, rows, *, slope_KG=None, bias_BKGTS=None, sink_KG=None):
  """Attention, BTKG and the width of v; see attention.attention()."""
  T, front, column_BT = q_BTKGH.shape[1], rows.front, jnp.arange(q_BTKGH.shape[1], dtype=jnp.int32)[None]
  given = {'q': q_BTKGH, 'k': k_BSKH[:, front:], 'v': v_BSKH[:, front:],
           'place': column_BT if rows.place_BT is None else rows.place_BT,
           'segment': rows.segment_BT, 'of_keys': rows.segment_BT if rows.segment_BS is None else rows.segment_BS,
           'prefix': rows.prefix_BS, 'slope': slope_KG}
  if bias_BKGTS is not None:
    bias_BKGTS = jnp.broadcast_to(bias_BKGTS, (bias_BKGTS.shape[0], *q_BTKGH.shape[2:4], T, T))
    given |= {'bias': jnp.einsum('BKGTS->BTKGS', bias_BKGTS), 'column': column_BT}
  if front:
    given |= {'front_k': k_BSKH[:, :front], 'front_v': v_BSKH[:, :front]}
  given = {name: x for name, x in given.items() if x is not None}
  letters = {'q': 'BTKGH', 'k': 'BTKH', 'v': 'BTKH', 'slope': 'KG', 'bias': 'BTKGS', **dict.fromkeys(FRONT, 'BSKH')}
  specs = {name: PartitionSpec(*(axes or None for axes in sharding.split(letters.get(name, 'BT'), x.shape)))
           for name, x in given.items()}
  [axis] = ways(q_BTKGH)
  devices, partial = sharding.size(axis), attention_parts.plain if kernel is None else kernel.partial_attention
  mixed = pattern.causal and T % (2 * devices) == 0
  mine = functools.partial(_mine, functools.partial(partial, pattern=pattern),
                           functools.partial(attention_parts.in_front, pattern=pattern), axis, devices, mixed)
  run = jax.shard_map(mine, in_specs=(specs,), out_specs=(specs['q'], PartitionSpec(*specs['q'][:4])), check_vma=False)
  return attention_parts.sunk(run(given), sink_KG).astype(v_BSKH.dtype)


def _mine(partial, in_front, axis: str, devices: int, mixed: bool, given):
  """(out, lse_BTKG) of this device's queries with all keys; given: its part of every array."""
  along = [name for name in given if name not in ('slope', *FRONT)]
  if mixed:
    given = given | {name: spread(given[name], axis, devices) for name in along}
  queries = {name: given[name] for name in ('q', 'place', 'segment', 'bias') if name in given}
  keys = {name: given[name] for name in ('k', 'v', 'place', 'of_keys', 'prefix', 'column') if name in given}
  join = jax.checkpoint(functools.partial(_joined, partial, given.get('slope')))
  B, T, K, G, _ = given['q'].shape
  found = (jnp.zeros((B, T, K, G, given['v'].shape[-1]), jnp.float32),
           jnp.full((B, T, K, G), attention_parts.NOTHING, jnp.float32))
  if 'front_k' in given:
    out_BTKGH, lse_BTKG = jax.checkpoint(in_front)(given['q'], *(given[name] for name in FRONT))
    found = out_BTKGH.astype(jnp.float32), lse_BTKG
  onward = [(i, (i + 1) % devices) for i in range(devices)]
  for step in range(devices):
    found = join(found, queries, keys)
    if step + 1 < devices:
      keys = jax.tree.map(lambda x: jax.lax.ppermute(x, axis, onward), keys)
  return tuple(gathered(x, axis, devices) for x in found) if mixed else found


def _joined(partial, slope_KG, found, queries, keys):
  """What was found so far, with one more part of the keys."""
  rows = attention_parts.Part(queries['place'], keys['place'], queries.get('segment'), keys.get('of_keys'),
                              keys.get('prefix'))
  more = {} if slope_KG is None else {'slope_KG': slope_KG}
  if 'bias' in queries:
    more['bias_BKGTS'] = jnp.einsum('BTKGS->BKGTS', queries['bias'][..., keys['column'][0]])
  more = attention_parts.finite(*partial(queries['q'], keys['k'], keys['v'], rows=rows, **more))
  return attention_parts.joined(found, more)


def _routes(devices: int):
  """Where the even and the odd one of each device's two parts go, as ppermute wants it."""
  owner = lambda part: part if part < devices else 2 * devices - 1 - part
  return [[(i, owner(2 * i + odd)) for i in range(devices)] for odd in (0, 1)]


def spread(x_BT, axis: str, devices: int):
  """A device's two neighbouring parts along T for the parts i and 2c - 1 - i."""
  halves = jnp.split(x_BT, 2, axis=1)
  even, odd = (jax.lax.ppermute(half, axis, route) for half, route in zip(halves, _routes(devices)))
  swap = jax.lax.axis_index(axis) % 2 == 1  # an odd device's own number is that of an odd part
  return jnp.where(swap, jnp.concatenate([odd, even], 1), jnp.concatenate([even, odd], 1))


def gathered(x_BT, axis: str, devices: int):
  """The other way."""
  first, second = jnp.split(x_BT, 2, axis=1)
  swap = jax.lax.axis_index(axis) % 2 == 1
  even, odd = jnp.where(swap, second, first), jnp.where(swap, first, second)
  back = lambda route: [(there, here) for here, there in route]
  return jnp.concatenate([jax.lax.ppermute(half, axis, back(route))
                          for half, route in zip((even, odd), _routes(devices))], 1)


KERNELS = {'reference': None, 'gpu': attention_gpu, 'tpu': attention_tpu}
