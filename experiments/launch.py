"""Starts an experiment in several processes of this machine, or writes the files that start it elsewhere.

  python experiments/launch.py --gin_file=launch.gin --gin_bindings='RUN = ("quickstart.gin",)'
  python experiments/launch.py --gin_file=launch_slurm.gin --gin_bindings='RUN = ("pretrain_dense_124m.gin",)'

RUN are the gin files of the experiment, and launch.main.bindings its bindings, as text.
"""
from lmlib import cli

if __name__ == '__main__':
  cli.run(__file__)

import pathlib
import sys

from lmlib.plan import launch
from lmlib.plan.local import Local


def main(*, where, gin_files: tuple[str, ...], bindings: tuple[str, ...] = (), name: str = 'lmlib',
         into: str = 'launch'):
  """Runs it if `where` is a local.Local, and ends with its exit status; else writes files to the folder `into`.

  where: local.Local, or launch.Slurm, TpuVm or Gke; what the experiment is given is checked before. name: of the job.
  """
  experiment, settings = cli.arguments_of(('pretrain', 'sft'), gin_files, bindings)
  run = launch.Run(experiment, gin_files, bindings, name)
  if isinstance(where, Local):
    command = [sys.executable, '-u', str(pathlib.Path(__file__).with_name(f'{experiment}.py'))]
    sys.exit(where.run(command + [f'--gin_file={name}' for name in gin_files]
                       + [f'--gin_bindings={binding}' for binding in bindings]))
  launch.check(where, settings['layout'])
  folder = pathlib.Path(into)
  folder.mkdir(parents=True, exist_ok=True)
  for file, text in where.files(run).items():
    (folder / file).write_text(text)
    print(f'wrote {folder / file}')
