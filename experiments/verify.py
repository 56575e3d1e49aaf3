"""Proves on this CPU that a run fits its layout, and that this computes what one device does, before it costs anything.

  python experiments/verify.py --gin_file=pretrain_dense_124m.gin --gin_file=meshes/fsdp.gin

Takes the files of a run, which it does not begin. First its real sizes, of which nothing is computed: whether model,
batch, length and layout fit each other, on as many devices as the layout names; of a size of -1, on which numbers of
them. Then a small copy of its model goes over fake devices in the run's layout and over one, with random tokens. Prints
what was checked, the difference and how much of it rounding may be; exits with 1 if any is larger or a size is wrong.
"""
from lmlib import cli

if __name__ == '__main__':
  cli.run(__file__, of=('pretrain', 'sft'))

import math
import os

import jax

from lmlib.data import objectives
from lmlib.interop import opened
from lmlib.plan import fake_devices, fits, shrink, verify
from lmlib.post.sft import Tuning
from lmlib.train import health, losses


def main(*, experiment: str, run: dict):
  """Verifies a run of experiments/pretrain.py or sft.py, given its arguments. RunFault if anything is wrong."""
  layout = shrink.layout(run['layout'])
  os.environ.update(fake_devices.environment(math.prod(layout.sizes)))
  jax.config.update('jax_platforms', 'cpu')
  model, loss = run.get('model'), run.get('loss', losses.NextToken())
  if experiment == 'pretrain':
    trained = verify.whole(model, loss)
  else:
    model = model or opened.opened(run['source'], cli.saved_model).config
    trained = verify.tuned(Tuning(model, run.get('adapter')), loss)
  objective = run.get('objective', objectives.CAUSAL)
  length = run.get('length')
  if length is None:
    length = model.length if experiment == 'pretrain' else min(1024, model.length)

  sizes = fits.Sizes(trained, objective, run['layout'], run['batch'], length, run.get('microbatches', 1))
  rows = fits.checks(sizes)
  print(*rows, sep='\n', flush=True)
  if wrong := [row for row in rows if not row.fine]:
    raise health.RunFault(f'the real sizes do not fit: {wrong[0].said}')

  case = verify.case(trained, objective, run['optimizer'], layout, restart=verify.restarts(run.get('packing')))

  print(f'\n{shrink.said(model, case.trained.config)}; float32\n{run["layout"]}, here {layout}, '
        f'on {math.prod(layout.sizes)} fake devices and on one\n')
  for row in verify.checks(case):
    print(row, flush=True)
    rows.append(row)
  wrong = [row for row in rows if not row.fine]
  checked = sum(row.checked for row in rows)
  if wrong:
    raise health.RunFault(f'{len(wrong)} of {checked} checks differ, first: '
                          f'{" ".join(str(wrong[0]).split())}')
  print(f'\n{checked} checks, none differs')
