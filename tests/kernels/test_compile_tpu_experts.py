"""A layer of experts on several TPUs is a program in which tokens travel to experts, and nobody gathers them all."""
import math
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import pytest

from lmlib import sharding
from lmlib.nn.moe import Experts, MixtureOfExperts
from lmlib.nn.places import places
from lmlib.nn.router import TopK
from lmlib.plan import compiled
from lmlib.sharding import Layout

pytest.importorskip('libtpu')

T, D, F, E = 4096, 2048, 768, 128  # of Qwen3-30B-A3B
KINDS = 'all-gather', 'all-reduce', 'all-to-all', 'ragged-all-to-all', 'reduce-scatter'


def program(machine: str, layout: Layout, router: TopK) -> str:
  """The compiled text of a layer and of all its gradients, with a row of tokens for each device."""
  devices = compiled.topology(machine).devices
  layer, x_BTD = MixtureOfExperts(D, Experts(E, F, router)), jax.ShapeDtypeStruct((len(devices), T, D), jnp.bfloat16)
  here = places(jnp.zeros(x_BTD.shape[:2], int))
  boxed = jax.eval_shape(lambda x_BTD: layer.init(jax.random.key(0), x_BTD, here), x_BTD)['params']

  def total(params, x_BTD):
    y_BTD, sums = layer.apply({'params': params}, x_BTD, places(jnp.zeros(x_BTD.shape[:2], int)))
    return y_BTD.astype(jnp.float32).sum(), sums

  with sharding.use(layout, devices) as mesh:
    where = sharding.shardings(boxed), NamedSharding(mesh, sharding.spec('BTD', x_BTD.shape, mesh, layout.arrays))
    given = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                         (nn.unbox(boxed), x_BTD), where)
    return jax.jit(jax.grad(total, (0, 1), has_aux=True), out_shardings=(where, None)).lower(*given).compile().as_text()


def collectives(text: str) -> list[tuple[str, int]]:
  """(kind, numbers in the largest result) of each."""
  found = re.findall(r' = (\(.*?\)|\S+) (' + '|'.join(KINDS) + r')(?:-start)?\(', text)
  size = lambda dims: math.prod(int(n) for n in dims.split(',') if n)
  return [(kind, max(map(size, re.findall(r'\w\[([\d,]*)\]', shapes)))) for shapes, kind in found]


@pytest.mark.parametrize(('machine', 'layout', 'router'), [
    ('v5e:2x4', Layout(data=1, expert=8), TopK(8)),
    ('v5e:2x4', Layout(data=1, fsdp=2, expert=2, tensor=2), TopK(8)),
    ('v5e:2x4', Layout(data=2, context=2, expert=2), TopK(8, capacity=1.0)),
    ('v5p:2x2x2', Layout(data=2, expert=4), TopK(8))])
def test_tokens_travel_and_are_not_gathered(machine, layout, router):
  text = program(machine, layout, router)
  found = collectives(text)
  # There and back, and both for gradients; for further trips again, with those made anew.
  assert sum(kind == 'ragged-all-to-all' for kind, _ in found) >= 4
  # Weights are gathered, and tokens nowhere.
  weights, tokens = E // layout.expert * D * F // layout.tensor, T * D
  gathered = [size for kind, size in found if kind == 'all-gather' and size >= tokens]
  assert not gathered or (layout.fsdp > 1 and set(gathered) == {weights})
  assert 'custom_call_target="tpu_custom_call"' in text


def test_rows_are_split_where_experts_are_not():
  """Every device multiplies its own rows, by a kernel, and sorts nobody else's."""
  text = program('v5e:2x2', Layout(data=4), TopK(8))
  assert text.count('custom_call_target="tpu_custom_call"') == 9  # three products, each with its two gradients
  assert f'bf16[{T * 8},{D}]' in text
  assert not re.search(rf'(bf16|f32)\[{4 * T * 8},', text)
  assert not [size for kind, size in collectives(text) if kind == 'all-gather' and size >= T * D]
