"""Rows made in other processes, of any number, resumed with another: the same global batches."""
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lmlib.data.best_fit import BestFit
from lmlib.data.mixture import Stage, Stores
from lmlib.data.objectives import PrefixLm
from lmlib.data.packing import Batches
from lmlib.data.store import Store

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 0, 1, 2, 3, 10**6, 10**9
CODE = '''
import json, pathlib, sys
import numpy as np
from tests.data.test_processes import made
first, stop, steps, out = json.loads(sys.argv[2])
batches = made(sys.argv[1])
np.savez(out, **{f'{step} {name}': value for step in steps
                 for name, value in batches.batch_at(step, slice(first, stop)).items()})
'''


def made(path) -> Batches:
  stores = (Store(path), Store(path), Store(path))
  mixed = Stores(stores, (5, 3, 2), ('a', 'b', 'c'), (Stage(2, (1, 1, 8)),), block=32)
  return Batches(mixed, 16, 32, 9, BestFit(fragment=4, fragments=2), PrefixLm())


@pytest.fixture(scope='module')
def whole(small_store):
  batches = made(small_store.path)
  return {f'{step} {name}': value for step in STEPS for name, value in batches.batch_at(step).items()}


def test_four_processes_then_two_then_one(small_store, whole, tmp_path):
  """Four processes make the first steps, two go on, one jumps ahead: each rank its rows alone."""
  jobs = [(count, rank, steps) for count, steps in ((4, STEPS[:2]), (2, STEPS[2:4]), (1, STEPS[4:]))
          for rank in range(count)]
  running = []
  for count, rank, steps in jobs:
    size = 16 // count
    given = json.dumps([rank * size, (rank + 1) * size, steps, str(tmp_path / f'{count} {rank}.npz')])
    running.append(subprocess.Popen([sys.executable, '-c', CODE, str(small_store.path), given], cwd=ROOT))
  assert [process.wait() for process in running] == [0] * len(jobs)
  for count in (4, 2, 1):
    parts = [np.load(tmp_path / f'{count} {rank}.npz') for rank in range(count)]
    for name in parts[0]:
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name], name)


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_slices_make_the_batch(small_store, whole, processes):
  size = 16 // processes
  parts = [made(small_store.path) for _ in range(processes)]
  for step in reversed(STEPS):
    rows = [part.batch_at(step, slice(i * size, (i + 1) * size)) for i, part in enumerate(parts)]
    for name in rows[0]:
      np.testing.assert_array_equal(np.concatenate([row[name] for row in rows]), whole[f'{step} {name}'], name)
