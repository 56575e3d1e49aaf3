"""Layers on several devices, one part after the other: the stages of a pipeline.

A batch is cut into microbatches, which follow each other through the stages (GPipe, Huang et al. 2019). All stages
work at once, each on another microbatch: their inputs lie in one array with the stages in front, a tick computes all
of them, and between two ticks every output moves on to the next stage (as in GSPMD, Xu et al. 2021). What tensor,
fsdp or context split is split inside a stage as it is without stages. The backward pass is the derivative of all this
and goes through the stages the other way.

With several rounds a stage holds as many groups of layers, and a microbatch passes all stages that often (Narayanan
et al. 2021): of r rounds, m microbatches and s stages a share (s - 1) / (r m + s - 1) of all work is a bubble, done by
stages that have no microbatch. They then compute on rows of another one, and nobody reads what comes out.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from lmlib import sharding

AXIS = 'stage'


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When which stage works on what. In a round, microbatches come in groups of as many as there are stages."""
  stages: int
  microbatches: int
  rounds: int = 1
  rows: int | None = None  # of the batch

  @property
  def slots(self) -> int:
    """Microbatches, with those that a last group lacks."""
    return self.microbatches if self.rounds == 1 else -(-self.microbatches // self.stages) * self.stages

  @property
  def ticks(self) -> int:
    return self.rounds * self.slots + self.stages - 1

  @property
  def bubbles(self) -> float:
    """The share of all work of all stages that is on no microbatch."""
    return 1 - self.rounds * self.microbatches / self.ticks

  def when(self) -> np.ndarray:
    """(rounds, stages, microbatches): the tick in which a stage works on a microbatch."""
    return self._when(self.microbatches)

  def _when(self, microbatches: int) -> np.ndarray:
    s, j = self.stages, np.arange(microbatches)
    starts = j // s * s * self.rounds + j % s
    return np.arange(self.rounds)[:, None, None] * s + np.arange(s)[None, :, None] + starts[None, None]

  def work(self) -> tuple[np.ndarray, np.ndarray]:
    """Two of (ticks, stages): the microbatch that a stage works on, -1 for a bubble, and its round."""
    microbatch, turn = np.full((self.ticks, self.stages), -1), np.zeros((self.ticks, self.stages), int)
    q, i, j = np.indices((self.rounds, self.stages, self.slots))
    microbatch[self._when(self.slots), i] = np.where(j < self.microbatches, j, -1)
    turn[self._when(self.slots), i] = q
    return microbatch, turn


def of(rows: int) -> Schedule:
  """The schedule of a batch of so many rows in the layout in use.

  As many microbatches as the layout says, or else up to four a stage; fewer where the rows that a device has of
  the batch are no multiple of them, as in scoring. Where there are rounds, a multiple of the stages if there is one.
  """
  stages, wanted = sharding.size(AXIS), sharding.current().pipeline
  parts = _each(rows)
  most = min(wanted.microbatches or 4 * stages, parts)
  fitting = [n for n in range(1, most + 1) if parts % n == 0]
  even = [n for n in fitting if n % stages == 0] if wanted.rounds > 1 else []
  return Schedule(stages, max(even or fitting), wanted.rounds, rows)


def _each(rows: int) -> int:
  """Rows of a batch that a device has, if the layout can split them."""
  ways = sharding.batch_devices()
  return rows // ways if rows % ways == 0 else rows


def check(rows: int, where: str):
  """ValueError if a batch of a run cannot be cut as the layout says; where: the settings that make it so many rows."""
  stages, wanted = sharding.size(AXIS), sharding.current().pipeline
  if stages == 1:
    return
  each = _each(rows)
  fitting = [n for n in range(1, each + 1) if each % n == 0 and (wanted.rounds == 1 or n % stages == 0)]
  said = f'{rows} rows of {where}, {each} on each of the {sharding.batch_devices()} devices that split a batch'
  if not fitting:
    raise ValueError(f'Pipeline.rounds={wanted.rounds} needs microbatches that are a multiple of stage={stages}, and '
                     f'none divides the {said}: make that {-(-each // stages) * stages} on each, or rounds=1')
  if wanted.microbatches is not None and wanted.microbatches not in fitting:
    raise ValueError(f'Pipeline.microbatches={wanted.microbatches} do not divide the {said}: '
                     f'{", ".join(map(str, fitting))} would')


def told(rows: int) -> str:
  """How batches of so many rows pass the stages of the layout in use, for a report; '' where there is one stage."""
  if sharding.size(AXIS) == 1:
    return ''
  schedule = of(rows)
  rounds = f' in {schedule.rounds} rounds' if schedule.rounds > 1 else ''
  return (f'{schedule.microbatches} microbatches pass {schedule.stages} stages{rounds}, '
          f'{schedule.bubbles:.1%} of their time in bubbles')


def divides(layers: int):
  """ValueError if the stages of the layout in use cannot share so many layers evenly."""
  stages, rounds = sharding.size(AXIS), sharding.current().pipeline.rounds
  if layers % (stages * rounds):
    fits = [n for n in range(1, layers + 1) if layers % (n * rounds) == 0]
    more = f' x Pipeline.rounds={rounds}' if rounds > 1 else ''
    works = f'stage={max((n for n in fits if n <= stages), default=fits[-1])}' if fits else 'stage=1 with rounds=1'
    raise ValueError(f'Layout.stage={stages}{more} does not divide the {layers} layers of a stack: {works} does, or '
                     f'{-(-layers // (stages * rounds)) * stages * rounds} layers')


def through(stage, layers, x_BTD, shared):
  """(x_BTD, what the layers give beside it, L in front) of a batch after all stages.

  stage(layers, x_BTD, shared) runs some layers, of which `layers` is a tree of arrays with L in front, on some
  rows, with `shared` of those rows. In trees a name ends in the axes of its array: one that begins with B is of rows,
  and in what comes beside the stream one that ends in B is of rows, all others are sums over them.
  """
  schedule = of(len(x_BTD))
  microbatch, turn = schedule.work()
  with sharding.without(AXIS):
    groups = jax.tree.map(functools.partial(_dealt, schedule), layers)
    followed, fixed, whole = _parted(schedule, shared, microbatch)

    def work(group, real, x_BTD, followed, fixed):
      group, x_BTD, followed, fixed = _heeded(real, (group, x_BTD, followed, fixed))
      return stage(group, x_BTD, whole(followed, fixed))

    work = jax.vmap(work, spmd_axis_name=AXIS)

    def tick(state, coming):
      x, first, real, turn, followed = coming
      passed = _onward(state)
      x = jnp.where(first[:, None, None, None], x, passed)
      state, beside = work(_of_round(groups, turn), real, x, followed, fixed)
      return state, (passed, beside)

    x_mBTD = _rows(schedule, sharding.constrain(x_BTD, 'BTD'))
    first = (turn == 0) & (np.arange(schedule.stages) == 0)
    x_msBTD = _everywhere(x_mBTD, 'BTD', schedule, 1)
    y_mBTD, beside = _ticks(schedule, tick, x_msBTD, (first, microbatch >= 0, turn, followed))
  y_BTD = y_mBTD.swapaxes(0, 1).reshape(x_BTD.shape)
  return sharding.constrain(y_BTD, 'BTD'), _by_layer(schedule, beside)


def _rows(schedule: Schedule, x):
  """Microbatches of an array of rows, in front; of every one each device has rows: i, i + m, i + 2m, …"""
  return x.reshape(-1, schedule.microbatches, *x.shape[1:]).swapaxes(0, 1)


def _everywhere(x, axes: str | None, schedule: Schedule, at: int):
  """x with an axis of the stages, each of which has its own copy: a gradient is summed outside of the loop."""
  x = jnp.broadcast_to(jnp.expand_dims(x, at), (*x.shape[:at], schedule.stages, *x.shape[at:]))
  return _placed(x, axes, at)


def _placed(x, axes: str | None, at: int):
  """x, whose axis `at` is that of the stages and the axes behind it are `axes`, where it belongs."""
  if axes is None:
    return x
  place = jax.vmap(lambda x: sharding.constrain(x, axes), spmd_axis_name=AXIS)
  for _ in range(at):
    place = jax.vmap(place)
  return place(x)


def _heeded(real, tree):
  """A tree as it is, whose gradient is 0 in a bubble, whatever a bubble computes or a custom gradient says."""

  @jax.custom_vjp
  def heeded(real, x):
    return x

  heeded.defvjp(lambda real, x: (x, real), lambda real, dx: (None, jnp.where(real, dx, 0)))
  return jax.tree.map(lambda x: heeded(real, x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree)


def _onward(state):
  """The output of every stage at the next one, that of the last at the first."""
  spec = PartitionSpec(AXIS, *(axes or None for axes in sharding.split('BTD', state.shape[1:])))
  stages = state.shape[0]
  route = [(i, (i + 1) % stages) for i in range(stages)]
  return jax.shard_map(lambda x: jax.lax.ppermute(x, AXIS, route), in_specs=spec, out_specs=spec,
                       check_vma=False)(state)


def _ticks(schedule: Schedule, tick, x, more):
  """(the microbatches after their last round, what comes beside them in every tick).

  x: the microbatches at every stage, of which the first one takes them. It does so where it is passed one that has
  ended its rounds; so whatever it is passed where a group of microbatches begins is an output, the first ones of
  nothing aside.
  """
  s, r, n = schedule.stages, schedule.rounds, schedule.slots
  fill = lambda count: jnp.broadcast_to(x[:1], (count, *x.shape[1:]))
  x = jnp.concatenate([x, fill(n - schedule.microbatches + s - 1)])
  if r == 1:
    state, (passed, beside) = jax.lax.scan(tick, x[0], (x, *more))
  else:
    def group(state, coming):
      x, *more = coming
      x = jnp.concatenate([x, jnp.zeros_like(x, shape=((r - 1) * s, *x.shape[1:]))])
      state, (passed, beside) = jax.lax.scan(tick, state, (x, *more))
      return state, (passed[:s], beside)

    grouped = lambda x, size: x[:n // s * size].reshape(n // s, size, *x.shape[1:])
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    coming = grouped(x, s), *jax.tree.map(lambda x: grouped(x, r * s), more)
    state, found = jax.lax.scan(group, x[0], coming)
    last = x[n:], *jax.tree.map(lambda x: x[n * r:], more)
    state, rest = jax.lax.scan(tick, state, last)
    passed, beside = jax.tree.map(lambda x, y: jnp.concatenate([flat(x), y]), found, rest)
  y = jnp.concatenate([passed[s:], _onward(state)[None]])[:schedule.microbatches]
  at_first = (np.arange(s) == 0)[None, :, None, None, None]
  return jnp.where(at_first, y, 0).sum(1), beside


def _parted(schedule: Schedule, shared, microbatch):
  """Of a tree: what is of rows, as every stage has it in every tick; the rest; and how to put them together."""
  leaves, tree = jax.tree_util.tree_flatten_with_path(shared)
  followed, fixed = {}, {}
  for i, (path, x) in enumerate(leaves):
    axes = _axes(path, x)
    of_rows = (axes or 'B')[0] == 'B' and x.shape[0] == schedule.rows
    if of_rows:
      followed[i] = _placed(_rows(schedule, x)[np.maximum(microbatch, 0)], axes, 1)
    else:
      fixed[i] = _everywhere(x, axes, schedule, 0)

  def whole(followed, fixed):
    both = followed | fixed
    return jax.tree.unflatten(tree, [both[i] for i in range(len(leaves))])

  return followed, fixed, whole


def _axes(path, x) -> str | None:
  """The axes that the name of an array ends in; None if it has no name."""
  name = str(getattr(path[-1], 'name', getattr(path[-1], 'key', '')))
  axes = name.rpartition('_')[2]
  return axes if len(axes) == x.ndim and '_' in name else None


def _dealt(schedule: Schedule, x):
  """(stages, rounds, layers of a group, ...) of an array with L in front: a round goes on where the last one ended."""
  s, r = schedule.stages, schedule.rounds
  return x.reshape(r, s, x.shape[0] // (r * s), *x.shape[1:]).swapaxes(0, 1)


def _of_round(groups, turn):
  """Of every stage the group of layers that it has for its round."""
  if jax.tree.leaves(groups)[0].shape[1] == 1:
    return jax.tree.map(lambda x: x[:, 0], groups)
  mine = lambda groups, turn: jax.tree.map(lambda x: x[:, turn[0]], groups)
  # Of a gather XLA does not see that every stage reads from itself alone.
  return jax.shard_map(mine, in_specs=(PartitionSpec(AXIS),) * 2, out_specs=PartitionSpec(AXIS), axis_names={AXIS},
                       check_vma=False)(groups, turn)


def _by_layer(schedule: Schedule, beside):
  """What came beside the stream in every tick, L in front: of rows, or summed over all microbatches."""
  when, stage = schedule.when(), np.arange(schedule.stages)[None, :, None]

  def one(path, x):
    x = x[when, stage]  # (rounds, stages, microbatches, layers of a group, ...): no bubble is among them
    if _last(path) == 'B':
      x = jnp.moveaxis(x, 2, -1)
      return x.reshape(-1, x.shape[-2] * x.shape[-1])
    return x.sum(2).reshape(-1, *x.shape[4:])

  return jax.tree_util.tree_map_with_path(one, beside)


def _last(path) -> str:
  """The last letter of the name under which an array stands in a tree."""
  return [str(key.key) for key in path if hasattr(key, 'key')][-1][-1]


def gathered(run, layers, x_BTD, shared):
  """What run(layers, x_BTD, shared) gives, layer after layer on all stages, each of which sends its own to the others.

  Memory is for the weights of one layer more.
  """
  stages = sharding.size(AXIS)

  def taken(number, x):
    x = x.reshape(stages, -1, *x.shape[1:])
    mine = jax.lax.dynamic_index_in_dim(x, number % x.shape[1], 1)  # where a stage has it, or another in its place
    here = jnp.arange(stages).reshape(-1, *(1,) * (mine.ndim - 1)) == number // x.shape[1]
    return jnp.where(here, mine, 0).sum(0, dtype=x.dtype)

  def one(x_BTD, number):
    x_BTD, beside = run(jax.tree.map(functools.partial(taken, number), layers), x_BTD, shared)
    return x_BTD, jax.tree.map(lambda x: x[0], beside)

  return jax.lax.scan(one, x_BTD, jnp.arange(jax.tree.leaves(layers)[0].shape[0]))
