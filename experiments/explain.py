"""Shows what a row of a run's training batches holds: its documents, their share of the mixture, its text and mask.

  python experiments/explain.py --gin_file=explain.gin --gin_bindings='STEP = 20' --gin_bindings='ROW = 3'

Dim text is read and not learned, underlined text is a prefix that earlier places see too.
"""
from lmlib import cli

if __name__ == '__main__':
  cli.run(__file__)

import json
import pathlib
import sys

from experiments import pretrain
from lmlib.data.explain import explain
from lmlib.data.packing import Batches
from lmlib.data.prepare import prepare
from lmlib.train.spikes import Events


def main(*, workdir: str, step: int, row: int = 0):
  """Prints row `row`, from 0, of step `step`, from 1, as the run in `workdir` reads it."""
  if step < 1:
    raise ValueError(f'STEP={step} must be at least 1, the first step of a run')
  run = cli.saved(pretrain.main, workdir)
  model, length = run['model'], run['length']
  train = prepare(run['data'], say=print).train
  folder = pathlib.Path(workdir).expanduser()
  known = json.loads((folder / 'manifest.json').read_text())['identity']['data']
  if train.fingerprint != known:
    raise ValueError(f'WORKDIR {workdir!r} was trained on other data than its source gives now: there {known}, '
                     f'here {train.fingerprint}')
  batches = Batches(train, run['batch'], model.length if length is None else length, run['seed'], run['packing'],
                    run['objective'], model.vocab)
  index = Events(folder).order().index(step - 1)
  print(explain(batches, step - 1, row, index=index, colours=sys.stdout.isatty()))
