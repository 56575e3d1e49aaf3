"""What a TPU of eight keeps in memory and sends to the others in one step of training, by layout.

The model has 71 M weights: 4 layers of width 1024, hidden width 4096, 8 heads, a vocabulary of 4096; 16 rows of 512
tokens, activations in bfloat16, remat='full', AdamW. Programs are compiled, not run: it needs libtpu
(pip install -e '.[tpu]') and no TPU. Bytes of weights and optimizer state are held to the formula of ZeRO.

  python benchmarks/collectives.py [v5e:2x4] [layout ...]
"""
import json
import os
import platform
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lmlib import sharding, trees
from lmlib.models import dense, protocol
from lmlib.nn.stack import Execution
from lmlib.optim.adamw import AdamW
from lmlib.optim.schedules import Constant
from lmlib.plan import compiled, hlo
from lmlib.sharding import Layout
from lmlib.train import losses
from lmlib.train import step as step_of

B, T = 16, 512
MODEL = dense.Config(vocab=4096, layers=4, width=1024, hidden=4096, heads=8, kv_heads=8, head_width=128, length=T,
                     execution=Execution(dtype='bfloat16', remat='full'))
LAYOUTS = {
    'data': Layout(data=8), 'zero-1': Layout(data=1, fsdp=8, zero=1), 'zero-2': Layout(data=1, fsdp=8, zero=2),
    'zero-3': Layout(data=1, fsdp=8), 'tensor': Layout(data=2, tensor=4),
    'sequence': Layout(data=2, tensor=4, sequence=True), 'context': Layout(data=2, context=4),
    'stage': Layout(data=2, stage=4), 'zero-1 offload': Layout(data=1, fsdp=8, zero=1, offload=True),
    'zero-3 offload': Layout(data=1, fsdp=8, offload=True)}


def program(layout: Layout, devices):
  """(a compiled step, its mesh, the shapes of its state)."""
  optimizer = AdamW(Constant(1e-3)).transformation(sharding.letters(protocol.boxed(MODEL)), 10)
  with sharding.use(layout, devices) as mesh:
    shapes = step_of.shapes(MODEL, optimizer)
    where = NamedSharding(mesh, sharding.spec('BT', (B, T), mesh, layout.arrays))
    batch = {name: jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=where)
             for name in ('tokens_BT', 'targets_BT', 'segments_BT')}
    batch['weight_BT'] = jax.ShapeDtypeStruct((B, T), jnp.float32, sharding=where)
    step = step_of.compiled(losses.NextToken().of(MODEL), optimizer, 1, shapes)
    return step.lower(shapes, batch).compile(), mesh, shapes


def expected(layout: Layout, shapes) -> int:
  """Bytes of weights and moments that a device holds by ZeRO's formula, where fsdp and stage alone split them."""
  whole, n = trees.nbytes(shapes.params), layout.fsdp
  return whole // (n if layout.zero == 3 else 1) + (0 if layout.offload else 2 * whole // n)


def main():
  machine, *names = sys.argv[1:] or ['v5e:2x4']
  devices, figures, holds = compiled.topology(machine).devices, {}, True
  for name in names or LAYOUTS:
    layout = LAYOUTS[name]
    found, mesh, shapes = program(layout, devices)
    memory, sent = found.memory_analysis(), hlo.collectives(found.as_text(), mesh)
    figures[name] = {'MB of arguments': memory.argument_size_in_bytes / 1e6,
                     'MB of temporary arrays': memory.temp_size_in_bytes / 1e6, 'MB sent': sent.sent() / 1e6}
    if layout.offload:
      figures[name]['MB on the host'] = memory.host_argument_size_in_bytes / 1e6
    if name.startswith(('data', 'zero')):
      more = memory.argument_size_in_bytes - expected(layout, shapes)
      holds &= 0 <= more < 1e6  # a batch, counts, and padding of small arrays
    print(f'\n{name}: {layout}\n' + ', '.join(f'{value:,.0f} {of}' for of, value in figures[name].items())
          + f'\n{sent}', flush=True)
  print(json.dumps({'name': 'collectives', 'goal': None, 'ratio': None, 'holds': holds, 'figures': figures,
                    'machine': f'{machine}, compiled on {platform.platform()}'}))


if __name__ == '__main__':
  main()
