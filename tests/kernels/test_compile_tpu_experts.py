"""A layer of experts on several TPUs is a program in which tokens travel to experts, and nobody gathers them all."""
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
from lmlib.plan import compiled, hlo
from lmlib.sharding import Layout

pytest.importorskip('libtpu')

T, D, F, E = 4096, 2048, 768, 128  # of Qwen3-30B-A3B
TOKENS = T * D * 2  # bytes of those of one device


def program(machine: str, layout: Layout, router: TopK) -> tuple[str, hlo.Found]:
  """The text of a layer and of all its gradients, with a row of tokens for each device, and what they communicate."""
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
    run = jax.jit(jax.grad(total, (0, 1), has_aux=True), out_shardings=(where, None))
    text = run.lower(*given).compile().as_text()
  return text, hlo.collectives(text, mesh)


@pytest.mark.parametrize(('machine', 'layout', 'router'), [
    ('v5e:2x4', Layout(data=1, expert=8), TopK(8)),
    ('v5e:2x4', Layout(data=1, fsdp=2, expert=2, tensor=2), TopK(8)),
    ('v5e:2x4', Layout(data=2, context=2, expert=2), TopK(8, capacity=1.0)),
    ('v5p:2x2x2', Layout(data=2, expert=4), TopK(8))])
def test_tokens_travel_and_are_not_gathered(machine, layout, router):
  text, found = program(machine, layout, router)
  # There and back, and both for gradients; for further trips again, with those made anew.
  assert sum(c.places for c in found.collectives if (c.kind, c.axis) == ('ragged-all-to-all', 'expert')) == 9
  assert found.sent(kind='ragged-all-to-all') >= 4 * 8 * TOKENS / 2
  # Weights are gathered and their gradients summed, and tokens nowhere but the sums over hidden width.
  rest = {(c.kind, c.axis): c.sent for c in found.collectives if c.kind != 'ragged-all-to-all' and c.sent > TOKENS / 2}
  assert rest.keys() <= {('all-gather', 'fsdp'), ('reduce-scatter', 'fsdp'), ('all-reduce', 'tensor'),
                         ('all-reduce', 'data'), ('all-reduce', 'data+context')}
  assert 'custom_call_target="tpu_custom_call"' in text


def test_rows_are_split_where_experts_are_not():
  """Every device multiplies its own rows, by a kernel, and sorts nobody else's."""
  text, found = program('v5e:2x2', Layout(data=4), TopK(8))
  assert text.count('custom_call_target="tpu_custom_call"') == 9  # three products, each with its two gradients
  assert f'bf16[{T * 8},{D}]' in text
  assert not re.search(rf'(bf16|f32)\[{4 * T * 8},', text)
  assert found.sent(kind='all-gather') == found.sent(kind='all-to-all') == 0
