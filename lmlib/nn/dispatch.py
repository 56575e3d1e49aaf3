"""Tokens reach their experts, wherever these are, and what the experts make of them comes back.

Every device sorts its own tokens by expert and multiplies them by the matrices that it has. Where a mesh axis splits
tokens and experts both, tokens travel along it (GShard, Lepikhin et al. 2020), exactly as many as chose an expert
there (as in MegaBlocks, Gale et al. 2023): none is dropped, and none is counted twice. Where it splits experts alone,
each device computes what its experts have to add.

A device makes room for ROOM times as many rows as it sends, which is what arrives when loads are even. What one with
more favoured experts has no room for comes in further trips, as many as the fullest device needs: an uneven load costs
time, not memory.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmlib import sharding
from lmlib.kernels.exchange import Trip, exchange

ROOM = 1.5  # rows that arrive in one trip, in shares of those that leave
LEAST = 256  # but room for so many rows costs nothing


@dataclasses.dataclass(frozen=True)
class Ways:
  """The mesh axes that split rows of tokens, places in a row, experts, and hidden width."""
  rows: tuple[str, ...] = ()
  places: tuple[str, ...] = ()
  experts: tuple[str, ...] = ()
  hidden: tuple[str, ...] = ()

  @property
  def travel(self) -> bool:
    """Whether tokens go to other devices: those of an axis have other tokens and other experts."""
    return bool(self.experts) and set(self.experts) <= {*self.rows, *self.places}


def ways(x_BTD, count: int, hidden: int) -> Ways:
  """Of tokens and of `count` experts of a hidden width. ValueError if the layout cannot split the experts."""
  rows, places, _ = sharding.split('BTD', x_BTD.shape)
  experts, _, width = sharding.split('EDF', (count, x_BTD.shape[-1], hidden))
  devices = sharding.size('expert')
  if devices > 1 and not experts:
    fits = math.gcd(count, devices)
    raise ValueError(f'Layout.expert={devices} does not divide the moe.Experts.count={count} experts: expert={fits} '
                     f'does, with {devices // fits} times as many devices along another axis, such as fsdp')
  return Ways(rows, places, experts, width)


def mixed(compute, x_BTD, routing, weights: dict, letters: dict, hidden: int):
  """The sum over each token's pairs of weight times what the expert computes, BTD.

  compute: a function (weights, x_MD, sizes_E, most) -> MD of rows that are sorted by expert, `most` of one at most if
  that is known; weights: arrays by name, each of all experts, and the letters of their axes.
  """
  count = jax.tree.leaves(weights)[0].shape[0]
  if not sharding.in_use():
    return _mine(compute, Ways(), count, routing, x_BTD, *(getattr(routing, name) for name in PAIRS), weights)
  way = ways(x_BTD, count, hidden)
  axis = {'B': way.rows, 'T': way.places, 'E': way.experts, 'F': way.hidden, 'M': way.places if routing.ordered else ()}
  placed = lambda axes: PartitionSpec(*(axis.get(letter, ()) or None for letter in axes))
  known = routing.replace(sums={}, **dict.fromkeys(PAIRS))

  def mine(x_BTD, *pairs):
    *pairs, weights = pairs
    if way.hidden:  # of a sum over devices the first adds the biases
      first = jax.lax.axis_index(way.hidden) == 0
      weights = {name: w if 'F' in letters[name] else jnp.where(first, w, 0) for name, w in weights.items()}
    return _mine(compute, way, count, known, x_BTD, *pairs, weights)

  where = placed('BTD'), *(placed('BM') for _ in PAIRS), {name: placed(letters[name]) for name in weights}
  return jax.shard_map(mine, in_specs=where, out_specs=where[0], check_vma=False)(
      x_BTD, *(getattr(routing, name) for name in PAIRS), weights)


PAIRS = 'place_BM', 'expert_BM', 'weight_BM'


def _mine(compute, way: Ways, count: int, known, x_BTD, place_BM, expert_BM, weight_BM, weights):
  """This device's part of mixed(); known: what is static of a Routing."""
  B, T, D = x_BTD.shape
  place_BM = place_BM - (jax.lax.axis_index(way.places) * T if way.places else 0)
  here_BM = (place_BM >= 0) & (place_BM < T)
  token_M = (jnp.arange(B)[:, None] * T + jnp.clip(place_BM, 0, T - 1)).reshape(-1)
  expert_M, weight_M = jnp.where(here_BM, expert_BM, count).reshape(-1), weight_BM.reshape(-1)
  if way.experts and not way.travel:  # the experts of this device alone
    count = jax.tree.leaves(weights)[0].shape[0]
    expert_M = expert_M - jax.lax.axis_index(way.experts) * count
    expert_M = jnp.where((expert_M >= 0) & (expert_M < count), expert_M, count)

  order_M = jnp.argsort(expert_M, stable=True)
  token_M, weight_M = token_M[order_M], jnp.where(expert_M < count, weight_M, 0)[order_M]
  sizes_E = (expert_M[None] == jnp.arange(count)[:, None]).sum(1)
  x_MD = x_BTD.reshape(B * T, D)[token_M]
  most = None if known.room is None else B * min(known.room, T)
  if way.travel:
    y_MD = _travelled(compute, way, B * T, most, known.chosen, x_MD, sizes_E, weights)
  else:
    y_MD = compute(weights, x_MD, sizes_E, most)
  y_MD = y_MD.astype(jnp.float32) * weight_M[:, None]
  y_BTD = jnp.zeros((B * T, D), jnp.float32).at[token_M].add(y_MD).reshape(B, T, D).astype(x_BTD.dtype)
  over = way.hidden + (() if way.travel else way.experts)
  return _summed(y_BTD, over) if over else y_BTD


def _travelled(compute, way: Ways, tokens: int, most, chosen: int, x_MD, sizes_E, weights):
  """What the experts of all devices make of these rows, which are sorted by expert."""
  devices = math.prod(sharding.size(name) for name in way.experts)
  axis = way.experts[0] if len(way.experts) == 1 else way.experts
  M, here = x_MD.shape[0], sizes_E.shape[0] // devices
  longest = min(M, tokens * min(chosen, here), here * (tokens if most is None else most))
  rows = min(devices * longest, max(LEAST, math.ceil(ROOM * M)))
  most = None if most is None or devices * here * most > rows else devices * most  # else it would be padded to more
  count_ZE = jax.lax.all_gather(sizes_E, axis)
  trip = functools.partial(_trip, compute, axis, rows, most)
  if devices * longest <= rows:
    return trip(0, x_MD, count_ZE, weights)
  trips_Z = -(-count_ZE.reshape(devices, devices, here).sum((0, 2)) // rows)
  # The same on all devices of the mesh, for in a trip they meet.
  trips = jax.lax.pmax(trips_Z.max(), sharding.MESH_AXES)
  return _trips(trip, trips, x_MD, count_ZE, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _trips(trip, trips, x_MD, count_ZE, weights):
  """The results of all trips. The way back is kept of the first alone; others are made again, one at a time."""
  return _further(trip, trips, trip(0, x_MD, count_ZE, weights), x_MD, count_ZE, weights)


def _further(trip, trips, y_MD, *given):
  # They begin with the first trip's sum: on a CPU devices may not meet in two trips at once.
  return jax.lax.fori_loop(1, trips, lambda number, y_MD: y_MD + trip(number, *given), y_MD)


def _trips_forward(trip, trips, x_MD, count_ZE, weights):
  y_MD, back = jax.vjp(lambda x_MD, weights: trip(0, x_MD, count_ZE, weights), x_MD, weights)
  return _further(trip, trips, y_MD, x_MD, count_ZE, weights), (back, trips, x_MD, count_ZE, weights)


def _trips_backward(trip, saved, dy_MD):
  back, trips, x_MD, count_ZE, weights = saved

  def one(number, so_far):
    again = jax.vjp(lambda x_MD, weights: trip(number, x_MD, count_ZE, weights), x_MD, weights)[1]
    return jax.tree.map(jnp.add, so_far, again(dy_MD))

  dx_MD, dweights = jax.lax.fori_loop(1, trips, one, back(dy_MD))
  return None, dx_MD, None, dweights


_trips.defvjp(_trips_forward, _trips_backward)


def _trip(compute, axis, rows: int, most, number, x_MD, count_ZE, weights):
  """The results for those rows that arrive within trip `number`, zeros for all others.

  In the order of their devices, and on each of their experts, the rows that a device gets are one sequence, of which
  trip n takes those from n * rows on. count_ZE: how many every device has for every expert.
  """
  Z, E = count_ZE.shape
  me, first = jax.lax.axis_index(axis), number * rows
  count_ZZE = count_ZE.reshape(Z, Z, E // Z)  # of a device, for a device's experts
  start_ZZ = _before(count_ZE, 1).reshape(count_ZZE.shape)[..., 0]
  count_ZZ = count_ZZE.sum(2)
  arrive_ZZ = _before(count_ZZ, 0)
  from_ZZ, to_ZZ = (jnp.clip(end - arrive_ZZ, 0, count_ZZ) for end in (first, first + rows))
  start_ZZ, count_ZZ, there_ZZ = start_ZZ + from_ZZ, to_ZZ - from_ZZ, jnp.clip(arrive_ZZ - first, 0, rows)
  trip = Trip(start_ZZ[me], count_ZZ[me], there_ZZ[me], count_ZZ[:, me], there_ZZ[:, me], start_ZZ[:, me])

  mine_ZE = count_ZZE[:, me]
  start_ZE = _before(mine_ZE.reshape(-1), 0).reshape(mine_ZE.shape) - first
  start_ZE, end_ZE = (jnp.clip(x, 0, rows) for x in (start_ZE, start_ZE + mine_ZE))
  by_expert_M, by_device_M = _orders(start_ZE, end_ZE - start_ZE, rows)
  x_MD, M = exchange(x_MD, trip, rows, axis), x_MD.shape[0]
  y_MD = compute(weights, _permuted(x_MD, by_expert_M, by_device_M), (end_ZE - start_ZE).sum(0), most)
  return exchange(_permuted(y_MD, by_device_M, by_expert_M), trip.reversed(), M, axis)


def _before(x, axis: int):
  """The sum of the entries before each."""
  return jnp.cumsum(x, axis) - x


def _orders(start_ZE, count_ZE, rows: int):
  """Two permutations of rows that come by device and expert: to those by expert and device, and back."""
  turned_ZE = _before(count_ZE.T.reshape(-1), 0).reshape(count_ZE.T.shape).T

  def order(count, start, other):
    end, row_M = jnp.cumsum(count.reshape(-1)), jnp.arange(rows)
    block_M = jnp.searchsorted(end, row_M, side='right', method='compare_all')
    found_M = jnp.minimum(block_M, len(end) - 1)
    return jnp.where(block_M < len(end), row_M + (other - start).reshape(-1)[found_M], row_M)

  return order(count_ZE.T, turned_ZE.T, start_ZE.T), order(count_ZE, start_ZE, turned_ZE)


@jax.custom_vjp
def _permuted(x_MD, order_M, back_M):
  """x[order]; back: the order that undoes it, which gradients take instead of adding rows up."""
  return x_MD[order_M]


_permuted.defvjp(lambda x, order, back: (x[order], back), lambda back, dy: (dy[back], None, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _summed(x_BTD, axes: tuple[str, ...]):
  """The sum over devices that all go on with it alike."""
  return jax.lax.psum(x_BTD, axes)


# Each of them has the same share of the gradient, so that there is nothing to add up: what psum knows nothing of.
_summed.defvjp(lambda x, axes: (jax.lax.psum(x, axes), None),
               lambda axes, _, dy: (dy * math.prod(sharding.size(name) for name in axes),))
