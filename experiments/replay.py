"""Does one step of a run once more, bit for bit, and shows what every layer did in it and what it read.

  python experiments/replay.py --gin_file=replay.gin --gin_bindings='STEP = 120'
  python experiments/replay.py --gin_file=replay.gin --gin_bindings='STEP = 120' \\
      --gin_bindings='replay.main.batch = 119'

The run goes on or has ended; nothing in its folder is changed. Exits with 1 if the numbers are not those recorded.
"""
from lmlib import cli

if __name__ == '__main__':  # before jax is imported, which reads its log level then
  cli.run(__file__)

import json
import pathlib

from lmlib import sharding
from lmlib.data.packing import Batches
from lmlib.data.prepare import prepare
from lmlib.interop import opened
from lmlib.models import protocol
from lmlib.post.sft import Tuning
from lmlib.train import health, layers, training
from lmlib.train import replay as replaying
from lmlib.train import step as step_of


def main(*, workdir: str, step: int, batch: int | None = None, weights: bool = False, layout=None):
  """Replays step `step`, counted from 1, of the run in `workdir`, from the last checkpoint before it.

  batch: the index of another batch to do it with, such as one that was left out (WORKDIR/spikes). weights: a line for
  each weight, not for each layer. layout: None is that of the run; on another, numbers are rounded otherwise.
  """
  folder = pathlib.Path(workdir).expanduser()
  experiment, run = cli.saved_run(workdir)
  if not 1 <= step <= run['steps']:
    raise ValueError(f"STEP={step} must lie between 1 and the run's steps={run['steps']}")
  if batch is not None and batch < 0:
    raise ValueError(f'batch={batch} is an index, counted from 0')
  known = json.loads((folder / 'manifest.json').read_text())
  with sharding.use(layout or run['layout']) as mesh:
    if experiment == 'pretrain':
      model, frozen = run['model'], ()
      transformation = run['optimizer'].transformation(sharding.letters(protocol.boxed(model)), run['steps'])
      loss, shapes = run['loss'].of(model), step_of.shapes(model, transformation)
      prepared = prepare(run['data'])
      length = model.length if run['length'] is None else run['length']
      batches = Batches(prepared.train, run['batch'], length, run['seed'], run['packing'], run['objective'],
                        model.vocab)
      fingerprint = prepared.train.fingerprint
    else:
      begun = opened.opened(run['source'], cli.saved_model)
      model = run['model'] or begun.config
      adapter = run['adapter'] if run['begin'] is None else opened.adapter_of(run['begin'], model).method
      tuning = Tuning(model, adapter, run['four_bits'])
      transformation = run['optimizer'].transformation(tuning.letters(), run['steps'])
      loss, shapes = tuning.loss(run['loss']), tuning.shapes(transformation)
      length = min(1024, model.length) if run['length'] is None else run['length']
      material = run['data'].opened(begun.tokenizer, batch=run['batch'], length=length, seed=run['seed'])
      frozen = tuning.frozen(tuning.held(begun.params(model))) if adapter is not None else ()
      batches, fingerprint = material.train, material.fingerprint
    if fingerprint != known['identity']['data']:
      raise ValueError(f"WORKDIR {workdir!r} was trained on other data than its source gives now: there "
                       f"{known['identity']['data']}, here {fingerprint}")
    course = training.Course(loss, transformation, shapes, batches,
                             lambda i: run['optimizer'].schedule.rate(i, run['steps']), run['microbatches'], frozen)
    found = replaying.replay(course, folder, step, batch=batch)

  print(f'step {found.step}, with batch {found.batch}, after the checkpoint of step {found.begin}\n' +
        '\n'.join(found.documents) + '\n')
  print(layers.table(found.layers if weights else layers.by_layer(found.layers)) + '\n')
  print('  '.join(f'{name} {value:.9g}' for name, value in found.values.items()))
  if not found.differences:
    print(f'{found.compared} steps were compared with metrics.jsonl: '
          + ('the same bit for bit' if found.compared else 'it has none of them'))
  elif dict(mesh.shape) != known['mesh']:
    print(f'on another mesh than the run\'s {known["mesh"]}; first difference at {found.differences[0]}')
  else:
    raise health.RunFault(f'not the numbers recorded: {found.differences[0]}; {len(found.differences)} differences')
