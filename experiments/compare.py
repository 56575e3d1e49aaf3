"""Compares two runs: settings and versions, the first step where they part, and the first tensor that differs.

  python experiments/compare.py --gin_file=compare.gin --gin_bindings='TARGET = "runs/again"'

Exits with 1 if anything differs that matters: a setting of what is computed, a number of a step, a tensor.
"""
from lmlib import cli

if __name__ == '__main__':  # before jax is imported, which reads its log level then
  cli.run(__file__)

import pathlib

from lmlib.train import comparison, health


def main(*, workdir: str, other: str):
  """Prints what differs between the runs in `workdir` and `other`, a line each."""
  folders = [pathlib.Path(name).expanduser() for name in (workdir, other)]
  rows = comparison.compare(*folders)
  steps, checkpoints = comparison.common(*folders)
  for row in rows:
    print(row)
  if first := next((row for row in rows if row.matters), None):
    raise health.RunFault(f'{workdir} and {other} differ in {sum(row.matters for row in rows)} things that matter, '
                          f'first: {first.kind} {first.text}')
  print(f'the same: {steps} steps and the checkpoints of {len(checkpoints)} steps that both have')
