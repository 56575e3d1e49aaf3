"""Bubbles and traffic of pipelines, counted in compiled training steps: nothing runs, and nothing is timed.

A dense decoder of 8 layers on four stages, in bfloat16 with remat, for several numbers of microbatches and rounds.
Every tick of the schedule sends each stage's output onward once, and so does every tick of the backward pass: how often
a program permutes along the stages says how many ticks it has, and with them the share of all work that is on no
microbatch. Beside it: (s - 1) / (r m + s - 1), and megabytes that a device sends along the stages in a step, for what
is passed on, for the ends of the pipeline with the embedding's gradient, and for exchanging layers before the rounds.
Compiles for four CPU devices, or for a machine that libtpu knows and that has four:

  python benchmarks/pipeline.py
  python benchmarks/pipeline.py v5p:2x2x1
"""
import json
import os
import pathlib
import platform
import sys

STAGES, LAYERS, WIDTH, VOCAB, ROWS, LENGTH = 4, 8, 256, 1024, 32, 120
CASES = ((4, 1), (8, 1), (16, 1), (32, 1), (8, 2), (16, 2))  # microbatches and rounds


def program(machine: str | None, microbatches: int, rounds: int):
  """A training step compiled for the devices of a machine (None: of this one), and its mesh."""
  import jax

  from lmlib import sharding
  from lmlib.models import dense, protocol
  from lmlib.nn.stack import Execution
  from lmlib.optim.adamw import AdamW
  from lmlib.optim.schedules import Constant
  from lmlib.plan import compiled
  from lmlib.train import losses
  from lmlib.train import step as step_of

  model = dense.Config(vocab=VOCAB, layers=LAYERS, width=WIDTH, hidden=4 * WIDTH, heads=2, kv_heads=2, head_width=128,
                       length=LENGTH, execution=Execution('bfloat16', remat='full'))
  optimizer = AdamW(Constant(1e-3)).transformation(sharding.letters(protocol.boxed(model)), 100)
  layout = sharding.Layout(data=1, stage=STAGES, pipeline=sharding.Pipeline(microbatches, rounds))
  with sharding.use(layout, machine and compiled.topology(machine).devices) as mesh:
    shapes = step_of.shapes(model, optimizer)
    where = jax.sharding.NamedSharding(mesh, sharding.spec('BT', (ROWS, LENGTH), mesh, layout.arrays))
    batch = {name: jax.ShapeDtypeStruct((ROWS, LENGTH), 'float32' if name == 'weight_BT' else 'int32', sharding=where)
             for name in ('tokens_BT', 'targets_BT', 'segments_BT', 'weight_BT')}
    return step_of.compiled(losses.NextToken().of(model), optimizer, 1, shapes).lower(shapes, batch).compile(), mesh


def counted(machine: str | None, microbatches: int, rounds: int) -> dict:
  """Ticks, bubbles and bytes of a step."""
  from lmlib.plan import hlo

  step, mesh = program(machine, microbatches, rounds)
  found, _ = hlo.apart(step.as_text(), mesh)
  # An output is as large as a microbatch of the stream, and no weight is; each way a last one leaves the pipeline.
  numbers = ROWS // microbatches * LENGTH * WIDTH
  onward = [one for one in found if one.kind == 'collective-permute'
            and one.sent == one.count * numbers * {'bf16': 2, 'f32': 4}.get(one.dtype, 0)]
  ticks = sum(one.count for one in onward) // 2 - 1
  memory = step.memory_analysis()
  return {'ticks': ticks, 'bubbles': 1 - rounds * microbatches / ticks,
          'formula': (STAGES - 1) / (rounds * microbatches + STAGES - 1),
          'onward': sum(one.sent for one in onward) / 1e6,
          'others': sum(one.sent for one in found if one not in onward) / 1e6,
          'temporary': memory.temp_size_in_bytes / 1e6}


def main():
  machine = sys.argv[1] if len(sys.argv) > 1 else None
  figures = {}
  for microbatches, rounds in CASES:
    found = figures[f'{microbatches} x {rounds}'] = counted(machine, microbatches, rounds)
    print(f'{STAGES} stages, {microbatches:2d} microbatches, {rounds} rounds: {found["ticks"]:3d} ticks, bubbles '
          f'{found["bubbles"]:.3f} (formula {found["formula"]:.3f}); sends {found["onward"]:6.2f} MB onward and '
          f'{found["others"]:6.2f} MB else; {found["temporary"]:6.1f} MB of temporary memory', flush=True)
  worst = max(abs(found['bubbles'] - found['formula']) for found in figures.values())
  print(json.dumps({'name': 'pipeline', 'goal': 0, 'ratio': worst, 'holds': worst < 1e-9, 'figures': figures,
                    'machine': f'{machine or "CPU"}, {os.cpu_count()} cores, {platform.platform()}'}))


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
  from lmlib.plan import fake_devices
  os.environ.update(JAX_PLATFORMS='cpu')
  os.environ.update(fake_devices.environment(STAGES))
  main()
