"""What layouts change in programs for TPUs: memory by ZeRO and offload, collectives. Minutes of libtpu."""
import dataclasses
import functools

import pytest

from lmlib.models import dense
from lmlib.plan import compiled
from lmlib.sharding import Layout
from tests.train import compiling
from tests.train.compiling import SIZES, WIDTH, B, T

pytestmark = pytest.mark.skipif(not compiled.available(), reason='libtpu is not installed')
CONFIG = dense.Config(**SIZES, hidden=2048)


@functools.cache
def program(layout: Layout):
  """(memory_analysis() of a compiled step on eight v5e, its collectives, bytes of all weights)."""
  memory, found, _, weights = compiling.program(CONFIG, layout, 'v5e:2x4')
  return memory, found, weights


def test_a_device_keeps_what_zero_says():
  of = {zero: program(Layout(data=1, fsdp=8, zero=zero)) for zero in (1, 2, 3)}
  for zero, (memory, _, weights) in of.items():
    share = 2 * weights // 8 + weights // (8 if zero == 3 else 1)
    assert 0 <= memory.argument_size_in_bytes - share < 0.02 * weights  # counts, a batch, padding
  assert of[2][0].temp_size_in_bytes < of[1][0].temp_size_in_bytes
  # Gradients are bfloat16 where they are reduced; weights that changed are gathered in float32.
  assert of[1][1].sent(kind='all-gather', dtype='f32') == pytest.approx(of[1][2] * 7 / 8, rel=0.02)
  assert of[1][1].sent(kind='all-reduce', dtype='bf16') == pytest.approx(of[1][2] * 7 / 8, rel=0.1)


def test_moments_that_wait_on_hosts_are_no_arguments_of_a_device():
  here, away = (program(Layout(data=1, fsdp=8, offload=offload)) for offload in (False, True))
  moments = 2 * here[2] // 8
  assert here[0].host_argument_size_in_bytes == 0
  assert 0 <= away[0].host_argument_size_in_bytes - moments < 0.02 * moments
  assert here[0].argument_size_in_bytes - away[0].argument_size_in_bytes == away[0].host_argument_size_in_bytes
  assert away[0].host_alias_size_in_bytes == away[0].host_output_size_in_bytes >= moments  # written where it was read


def test_a_stream_that_is_split_is_scattered_and_gathered():
  (_, reduced, _), (_, scattered, _) = (
      program(Layout(data=2, tensor=4, sequence=sequence)) for sequence in (False, True))
  assert scattered.sent(kind='all-reduce', axis='tensor') < 0.2 * reduced.sent(kind='all-reduce', axis='tensor')
  assert not reduced.sent(kind='reduce-scatter')
  assert not reduced.sent(kind='all-gather')
  stream = B // 2 * T * WIDTH * 2 * 3 // 4
  assert scattered.sent(kind='reduce-scatter', axis='tensor') >= 4 * CONFIG.layers * stream
  assert scattered.sent(kind='all-gather', axis='tensor') >= 4 * CONFIG.layers * stream


def test_rows_that_are_split_are_never_gathered():
  _, found, _ = program(Layout(data=2, context=4))
  assert found.sent(kind='all-gather') < 1e4
  assert found.sent(kind='collective-permute', axis='context') > 0


@pytest.mark.parametrize('layout', [Layout(data=8), Layout(data=1, fsdp=8)], ids=str)
def test_gradients_are_summed_in_the_type_that_is_asked_for(layout):
  """All of them but a few vectors."""
  kinds = ('all-reduce', 'reduce-scatter')
  (*_, weights), (_, narrow, _), (_, wide, _) = (
      program(layout), program(layout), program(dataclasses.replace(layout, wide_sums=True)))
  summed = lambda found, dtype: sum(found.sent(kind=kind, dtype=dtype) for kind in kinds)
  assert summed(narrow, 'bf16') > 0.3 * weights
  assert summed(wide, 'bf16') < 0.05 * summed(narrow, 'bf16')
  assert summed(wide, 'f32') > 1.5 * summed(narrow, 'bf16')
