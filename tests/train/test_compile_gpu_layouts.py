"""A step by each layout, compiled for eight H100 of one host or two. Minutes; skipped where there is no CUDA plugin."""
import re

import pytest

from lmlib import sharding
from lmlib.models import dense, moe
from lmlib.nn.moe import Experts
from lmlib.plan import compiled
from lmlib.sharding import Layout
from tests.train.compiling import SIZES, program

pytestmark = pytest.mark.skipif(not compiled.available('cuda'), reason="JAX's CUDA plugin is not installed")
DENSE = dense.Config(**SIZES, hidden=2048)
MOE = moe.Config(**SIZES, experts=Experts(count=16, hidden=1024))


@pytest.mark.parametrize('machine', ['h100:8', 'h100:2x4'])
def test_weights_and_their_state_are_split(machine):
  memory, found, _, weights = program(DENSE, Layout(data=1, fsdp=8), machine)
  assert memory.argument_size_in_bytes == pytest.approx(3 * weights / 8, rel=0.02)
  assert found.sent(axis='fsdp') > weights / 2  # they are gathered, in bfloat16


@pytest.mark.parametrize('layout', [Layout(data=2, tensor=4, sequence=True), Layout(data=2, context=4),
                                    Layout(data=1, fsdp=4, stage=2)], ids=str)
def test_what_devices_send_each_other_goes_over_the_axes_of_the_layout(layout):
  _, found, _, _ = program(DENSE, layout, 'h100:8')
  seen = {axis for each in found.collectives for axis in each.axis.split('+')}
  assert seen == {axis for axis, size in zip(sharding.MESH_AXES, layout.sizes) if size > 1}


@pytest.mark.parametrize('layout', [Layout(data=1, expert=8), Layout(data=1, fsdp=2, expert=4),
                                    Layout(data=1, expert=4, tensor=2)], ids=str)
def test_tokens_travel_to_their_experts_by_the_operation_for_it(layout):
  _, found, text, _ = program(MOE, layout, 'h100:8')
  assert re.search(r' ragged-all-to-all(-start)?\(', text)
  assert found.sent(kind='ragged-all-to-all', axis='expert') > 0


def test_a_machine_that_is_none_is_named():
  with pytest.raises(ValueError, match="machine='h100:8x' must be 'h100', 'h100:8', or 'h100:2x8' for 2 hosts"):
    compiled.topology('h100:8x')
