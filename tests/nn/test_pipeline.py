"""Stages of layers: the same numbers as on one device, whatever passes them how."""
import dataclasses
import functools

import jax
import numpy as np
import pytest

from lmlib import sharding
from lmlib.kernels.attention import Pattern
from lmlib.models import protocol
from lmlib.nn import pipeline
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.moe import Experts
from lmlib.nn.router import TopK
from lmlib.sharding import Layout, Pipeline
from lmlib.train import losses
from tests.laws.models import CONFIGS, executed, made

deep = lambda name, **changes: dataclasses.replace(CONFIGS[name], **{'layers': 4, **changes})
MODELS = {
    'dense': deep('dense'),
    'dense remat': executed(deep('dense'), scan=False, remat='full', dropout=0.3),
    'windows': executed(deep('dense', attention=AttentionStyle(patterns=(Pattern(window=3), Pattern()))), remat='dots'),
    'moe': deep('moe', heads=2, experts=Experts(4, 16, TopK(2, balanced=True, balance_loss=0.01, z_loss=0.01,
                                                            capacity=1.5))),
}


def batch(rows: int, T: int = 8):
  """Packed rows of up to three documents, padded, with numbers that dropout draws by."""
  random = np.random.default_rng(0)
  segments_BT = np.sort(random.integers(1, 4, (rows, T)), 1)
  segments_BT[::3, -2:] = 0
  ids = lambda: random.integers(0, 61, (rows, T)).astype(np.int32)
  return {'tokens_BT': ids(), 'targets_BT': ids(), 'segments_BT': segments_BT.astype(np.int32),
          'weight_BT': (segments_BT > 0).astype(np.float32), 'row_B': np.arange(rows, dtype=np.int32)}


@functools.partial(jax.jit, static_argnums=0)
def differentiated(config, params, batch):
  """((loss, (its weight, metrics)), gradients)."""
  loss = losses.NextToken(z_loss=0.01).of(config)

  def summed(params):
    total, *rest = loss(params, batch)
    return total, rest

  return jax.value_and_grad(summed, has_aux=True)(params)


@functools.cache
def alone(config, rows: int):
  """What one device makes of it."""
  return jax.device_get(differentiated(config, made(config), batch(rows)))


def on(layout, config, rows: int):
  with sharding.use(layout):
    params = jax.device_put(made(config), sharding.shardings(protocol.boxed(config)))
    return jax.device_get(differentiated(config, params, sharding.placer()(batch(rows))))


def assert_equal(found, wanted):
  """Two of differentiated() are equal but for the order of float32 sums, a hundred roundings of the largest entry.

  That of an array; and one of the largest of all gradients, for that of a bias of keys is 0 but for rounding.
  """
  largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted[1]))
  compare = lambda path, a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max() + 1e-7 * largest, err_msg=jax.tree_util.keystr(path))
  jax.tree_util.tree_map_with_path(compare, found, wanted)


@pytest.mark.parametrize(('model', 'layout'), [
    ('dense remat', Layout(stage=4, fsdp=2, pipeline=Pipeline(1))),
    ('windows', Layout(stage=2, data=4, pipeline=Pipeline(4, rounds=2))),
    ('moe', Layout(stage=2, fsdp=4)),
], ids=lambda x: str(x))
def test_stages_equal_one_device(model, layout):
  """What plan/verify_matrix.py does not try: remat and dropout, windows in rounds, a capacity."""
  assert_equal(on(layout, MODELS[model], 16), alone(MODELS[model], 16))


@pytest.mark.parametrize(('schedule', 'ticks', 'bubbles'), [
    (pipeline.Schedule(4, 8), 11, 3 / 11), (pipeline.Schedule(4, 1), 4, 3 / 4), (pipeline.Schedule(1, 5), 5, 0),
    (pipeline.Schedule(4, 8, 2), 19, 3 / 19), (pipeline.Schedule(2, 4, 3), 13, 1 / 13)])
def test_bubbles_are_those_of_the_papers(schedule, ticks, bubbles):
  """(s - 1) / (r m + s - 1), and as many places of the table have no microbatch."""
  assert schedule.ticks == ticks
  assert schedule.bubbles == pytest.approx(bubbles)
  microbatch, turn = schedule.work()
  assert (microbatch < 0).mean() == pytest.approx(bubbles)
  for j in range(schedule.microbatches):  # each passes every stage once a round, one tick after the other
    tick, stage = np.nonzero(microbatch == j)
    assert stage.tolist() == list(range(schedule.stages)) * schedule.rounds
    assert (np.diff(tick) == 1).all()
    assert turn[tick, stage].tolist() == np.repeat(np.arange(schedule.rounds), schedule.stages).tolist()


def test_bubbles_of_the_program_are_those_of_the_schedule():
  """The loop over ticks of a compiled program goes round as often as the schedule has ticks."""
  config, layout = MODELS['dense'], Layout(data=2, stage=4, pipeline=Pipeline(4))
  with sharding.use(layout):
    params = jax.device_put(made(config), sharding.shardings(protocol.boxed(config)))
    jaxpr = str(jax.make_jaxpr(lambda params: losses.NextToken().of(config)(params, batch(16))[0])(params))
    assert pipeline.of(16).ticks == 7
  assert 'length=7' in jaxpr


@pytest.mark.parametrize(('layout', 'rows', 'said'), [
    (dict(stage=2, data=4, pipeline=Pipeline(3)), 16, 'Pipeline.microbatches=3 do not divide.*4 on each.*1, 2, 4'),
    (dict(stage=4, data=2, pipeline=Pipeline(rounds=2)), 6, 'Pipeline.rounds=2.*multiple of stage=4.*make that 4')])
def test_batches_that_cannot_pass_are_refused(layout, rows, said):
  with sharding.use(Layout(**layout)), pytest.raises(ValueError, match=said):
    pipeline.check(rows, f'batch={rows}')


def test_layers_that_stages_cannot_share_are_refused():
  with sharding.use(Layout(data=2, stage=4)), pytest.raises(ValueError, match='stage=4 does not divide the 6 layers'):
    pipeline.divides(6)
  with sharding.use(Layout(data=4, stage=2, pipeline=Pipeline(rounds=2))), pytest.raises(
      ValueError, match=r'stage=2 x Pipeline.rounds=2 does not divide the 6 layers.*8 layers'):
    pipeline.divides(6)
  with pytest.raises(ValueError, match='no effect with stage=1'):
    Layout(pipeline=Pipeline(2)).mesh()


def test_what_passes_stages_is_told():
  with sharding.use(Layout(data=2, stage=4, pipeline=Pipeline(4, rounds=2))):
    assert pipeline.told(16) == '4 microbatches pass 4 stages in 2 rounds, 27.3% of their time in bubbles'
  assert pipeline.told(16) == ''
