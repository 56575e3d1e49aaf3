"""Memory by kind is what a device holds of a state, and what the compiled step says."""
import jax

from lmlib import sharding, trees
from lmlib.train import memory
from lmlib.train import step as step_of
from tests.train import courses


def test_kinds_are_shares_of_the_devices_and_the_steps_own():
  with sharding.use(sharding.Layout(data=2, fsdp=4)) as mesh:
    made = courses.compiled.__wrapped__(mesh)
    found = memory.by_kind(made.shapes, (), made.program)
    whole = trees.nbytes(made.shapes.params)
    assert whole / 4 <= found['weights'] < whole / 2  # norms are whole everywhere
    state = step_of.init(courses.MODEL, made.optimizer, jax.random.key(0))
    assert found['weights'] == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.params))
    assert 2 * found['weights'] <= found['optimizer state'] < 2 * found['weights'] + 100  # AdamW and its counters
    assert found['activations and temporaries'] > 0
    assert memory.said(found | {'weights': 13_900_000}).startswith('weights 13.9 MB, optimizer state ')


def test_what_waits_on_hosts_is_told_apart():
  with sharding.use(sharding.Layout(data=2, fsdp=4, offload=True)) as mesh:
    made = courses.compiled.__wrapped__(mesh)
    found = memory.by_kind(made.shapes, (), made.program)
    assert found['optimizer state'] < 100  # counters
    assert found['optimizer state on its host'] == 2 * found['weights']
