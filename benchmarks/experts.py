"""What eight TPUs send each other, and keep in memory, for a layer of experts with all its gradients, by layout.

The layer is that of Qwen3-30B-A3B: 128 experts, of which a token passes eight. Every chip has a row of 4096 tokens.
Programs are compiled, not run: it needs libtpu (pip install -e '.[tpu]') and no TPU. A message of tokens counts as all
the room that there is for it, in the first trip and in one further: even loads fill two thirds of the first.

  python benchmarks/experts.py [v5e:2x4]
"""
import json
import os
import platform
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lmlib import sharding
from lmlib.nn.moe import Experts, MixtureOfExperts
from lmlib.nn.places import places
from lmlib.nn.router import TopK
from lmlib.plan import compiled, hlo
from lmlib.sharding import Layout

T, D, EXPERTS = 4096, 2048, Experts(128, 768, TopK(8, balance_loss=1e-3))
LAYOUTS = {'expert=8': Layout(data=1, expert=8), 'fsdp=8': Layout(data=1, fsdp=8),
           'fsdp=2, expert=4': Layout(data=1, fsdp=2, expert=4),
           'fsdp=2, expert=2, tensor=2': Layout(data=1, fsdp=2, expert=2, tensor=2),
           'expert=4, context=2': Layout(data=1, expert=4, context=2)}


def program(layout: Layout, devices):
  """(compiled program of a layer and all its gradients, its mesh)."""
  layer, x_BTD = MixtureOfExperts(D, EXPERTS), jax.ShapeDtypeStruct((len(devices), T, D), jnp.bfloat16)
  here = lambda x_BTD: places(jnp.zeros(x_BTD.shape[:2], int))
  boxed = jax.eval_shape(lambda x_BTD: layer.init(jax.random.key(0), x_BTD, here(x_BTD)), x_BTD)['params']

  def total(params, x_BTD):
    y_BTD, sums = layer.apply({'params': params}, x_BTD, here(x_BTD))
    return y_BTD.astype(jnp.float32).sum() + sums['auxiliary_B'].sum()

  with sharding.use(layout, devices) as mesh:
    where = sharding.shardings(boxed), NamedSharding(mesh, sharding.spec('BTD', x_BTD.shape, mesh, layout.arrays))
    given = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                         (nn.unbox(boxed), x_BTD), where)
    return jax.jit(jax.grad(total, (0, 1)), out_shardings=where).lower(*given).compile(), mesh


def main():
  machine, figures = (sys.argv[1:] or ['v5e:2x4'])[0], {}
  for name, layout in LAYOUTS.items():
    found, mesh = program(layout, compiled.topology(machine).devices)
    sent = hlo.collectives(found.as_text(), mesh)
    figures[name] = {'MB sent': sent.sent() / 1e6, 'of them room for tokens': sent.sent(kind='ragged-all-to-all') / 1e6,
                     'MB of temporary arrays': found.memory_analysis().temp_size_in_bytes / 1e6}
    print(f'\n{name}: {figures[name]["MB of temporary arrays"]:,.0f} MB of temporary arrays\n{sent}', flush=True)
  print(json.dumps({'name': 'experts', 'goal': None, 'ratio': None, 'holds': None, 'figures': figures,
                    'machine': f'{machine}, compiled on {platform.platform()}'}))


if __name__ == '__main__':
  main()
