"""Seconds for which a save holds up training, against the seconds until it is on disk, by the size of a state.

  python benchmarks/saving.py

The goal is of the largest: training waits for less than a fifth of the time that writing takes. On a CPU the copy on
the device is one in the memory that training uses; the disk is that of the folder for temporary files.
"""
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from lmlib import cli, trees
from lmlib.train.checkpoint import Checkpoints

GOAL, ROUNDS = 0.2, 5
SIZES = (10, 100, 1000)  # MB, of float32 weights and two moments
LAYERS, WIDTH = 12, 1024


def state(megabytes: int):
  """A State of so many bytes in all, its weights stacked by layers as in a scan."""
  rows = max(1, round(megabytes * 1e6 / (3 * 4 * LAYERS * WIDTH)))
  weights = lambda: {'blocks': {'up': jnp.ones((LAYERS, rows, WIDTH))}}
  return {'params': weights(), 'optimizer': {'mu': weights(), 'nu': weights()}}


def main():
  cli.keep_memory()
  figures = {}
  for megabytes in SIZES:
    saved, held, done = state(megabytes), [], []
    with tempfile.TemporaryDirectory() as folder:
      checkpoints = Checkpoints(pathlib.Path(folder), keep=1)
      for i in range(ROUNDS + 1):  # the first one compiles
        start = time.perf_counter()
        checkpoints.save(i, saved)
        held.append(time.perf_counter() - start)
        checkpoints.wait()
        done.append(time.perf_counter() - start)
      checkpoints.close()
    size = trees.nbytes(saved) / 1e6
    figures[f'{size:.0f} MB'] = {'held_up': statistics.median(held[1:]), 'written': statistics.median(done[1:])}
    print(f'{size:8,.0f} MB: training waits {statistics.median(held[1:]):.3f} s '
          f'({min(held[1:]):.3f} to {max(held[1:]):.3f}), '
          f'on disk after {statistics.median(done[1:]):.3f} s', flush=True)
  last = list(figures.values())[-1]
  ratio = last['held_up'] / last['written']
  print(json.dumps({'name': 'a save holds up training, share of writing', 'goal': GOAL, 'ratio': ratio,
                    'holds': ratio < GOAL, 'figures': figures,
                    'machine': f'{os.cpu_count()} cores, {platform.processor() or platform.machine()}, '
                               f'jax {jax.__version__}'}))


if __name__ == '__main__':
  main()
