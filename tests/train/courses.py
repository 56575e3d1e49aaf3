"""A tiny model on rows that are easy to learn, but for poisoned batches; a run of it in a folder."""
import dataclasses
import functools
import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from lmlib import sharding
from lmlib.models import dense, protocol
from lmlib.optim import adamw, schedules
from lmlib.train import losses, metrics, replay, training
from lmlib.train import step as step_of
from lmlib.train.checkpoint import Checkpoints
from lmlib.train.watch import Watch

MODEL = dense.Config(vocab=64, layers=2, width=16, hidden=32, heads=2, kv_heads=2, head_width=8, length=8)
OPTIMIZER = adamw.AdamW(schedule=schedules.Cosine(peak=0.01, warmup=4))
STEPS = 24
BROKEN = 63  # the token of rows whose loss is NaN


class Rows:
  """Rows that count upwards; those of `poisoned` batches are noise, and those of `broken` ones have a loss of NaN."""

  def __init__(self, poisoned=(), broken=(), gone=()):
    self.poisoned, self.broken, self.gone, self.asked = poisoned, broken, gone, []

  batch = 8

  def batch_at(self, index: int, rows) -> dict:
    for gone in sorted(self.gone):  # as if there had never been such a batch
      index += index >= gone
    self.asked.append(index)
    draw = np.random.default_rng(index)
    numbers = (np.arange(9) + np.append(index, draw.integers(24, size=7))[:, None]) % 24
    if index in self.poisoned:
      numbers = draw.integers(32, BROKEN, size=(8, 9))
    if index in self.broken:
      numbers[0, 0] = BROKEN
    tokens_BT = numbers[rows]
    return {'tokens_BT': tokens_BT[:, :-1].astype(np.int32), 'targets_BT': tokens_BT[:, 1:].astype(np.int32),
            'segments_BT': np.ones((len(tokens_BT), 8), np.int32),
            'weight_BT': np.ones((len(tokens_BT), 8), np.float32)}

  def describe(self, index: int) -> list[str]:
    return [f'rows of {index}']


def loss_of(model):

  def loss(params, batch):
    total, weight, metrics = losses.NextToken().of(model)(params, batch)
    return total * jnp.where((batch['tokens_BT'] == BROKEN).any(), jnp.nan, 1.0), weight, metrics

  return loss


loss = loss_of(MODEL)


@functools.cache
def compiled(mesh) -> training.Course:
  """A course whose programs others may use: of equal ones there is one, and few are compiled."""
  transformation = OPTIMIZER.transformation(sharding.letters(protocol.boxed(MODEL)), STEPS)
  found = training.Course(loss, transformation, step_of.shapes(MODEL, transformation), Rows(),
                          lambda i: OPTIMIZER.schedule.rate(i, STEPS))
  return found if found.program and found.layers else None


def course(mesh, rows) -> training.Course:
  mine = dataclasses.replace(compiled(mesh), batches=rows)
  mine.__dict__.update(program=compiled(mesh).program, layers=compiled(mesh).layers)
  return mine


@functools.cache
def first(mesh):
  """The state that all begin with, on the host."""
  return jax.device_get(step_of.init(MODEL, compiled(mesh).optimizer, jax.random.key(0)))


def run(folder, rows, watch=Watch(), *, steps: int = STEPS, save_every: int = 5, keep: int = 2, said=None, **more):
  """Trains to `steps` from the newest checkpoint in `folder`, on one device; the last state."""
  folder.mkdir(exist_ok=True)
  with (sharding.use(sharding.Layout(), jax.devices()[:1]) as mesh,
        Checkpoints(folder / 'checkpoints', keep=keep) as there):
    mine = course(mesh, rows)
    restored = there.restore(mine.shapes)
    state = restored[0] if restored else jax.device_put(first(mesh), sharding.replicated())
    record = functools.partial(metrics.Record, folder, steps=steps, flops=SimpleNamespace(exact=1.0, six_nd=1.0),
                               peak=None, live=metrics.Live(io.StringIO()))
    return training.train(mine, state, folder=folder, steps=steps, checkpoints=there, save_every=save_every,
                          record=record, watch=watch, say=[].append if said is None else said.append, **more)


def replayed(folder, rows, step: int, **more):
  """replay() on the device of run()."""
  with sharding.use(sharding.Layout(), jax.devices()[:1]) as mesh:
    return replay.replay(course(mesh, rows), folder, step, **more)


def losses_of(folder) -> list[float]:
  """The loss of every step, which stand there once and in order."""
  lines = metrics.read(folder / 'metrics.jsonl')
  assert [line['step'] for line in lines] == list(range(1, len(lines) + 1))
  return [line['loss'] for line in lines]
