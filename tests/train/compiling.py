"""A training step compiled for a machine that is not here, by a layout over its devices."""
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lmlib import sharding, trees
from lmlib.models import protocol
from lmlib.nn.stack import Execution
from lmlib.optim.adamw import AdamW
from lmlib.optim.schedules import Constant
from lmlib.plan import compiled, hlo
from lmlib.train import losses
from lmlib.train import step as step_of

B, T, WIDTH = 16, 256, 512
SIZES = {'vocab': 1024, 'layers': 2, 'width': WIDTH, 'heads': 4, 'kv_heads': 4, 'head_width': 128, 'length': T,
         'execution': Execution(dtype='bfloat16', remat='full')}


def program(config, layout: sharding.Layout, machine: str):
  """(memory_analysis(), collectives, text of the compiled step, bytes of all weights), of B rows of T tokens."""
  tx = AdamW(Constant(1e-3)).transformation(sharding.letters(protocol.boxed(config)), 10)
  with sharding.use(layout, compiled.topology(machine).devices) as mesh:
    shapes = step_of.shapes(config, tx)
    where = NamedSharding(mesh, sharding.spec('BT', (B, T), mesh, layout.arrays))
    batch = {name: jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=where)
             for name in ('tokens_BT', 'targets_BT', 'segments_BT')}
    batch['weight_BT'] = jax.ShapeDtypeStruct((B, T), jnp.float32, sharding=where)
    made = step_of.compiled(losses.NextToken().of(config), tx, 1, shapes).lower(shapes, batch).compile()
    text = made.as_text()
    return made.memory_analysis(), hlo.collectives(text, mesh), text, trees.nbytes(shapes.params)
