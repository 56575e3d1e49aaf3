"""The tuner finds the fastest sizes by a clock that is told, passes over what fails, and keeps the table in order."""
import dataclasses
import importlib.util
import json
import pathlib

import pytest

from lmlib.kernels import blocks
from tests.kernels.test_blocks import Pair, Sizes

PATH = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'tune_kernels.py'


@pytest.fixture(scope='module')
def tuner():
  spec = importlib.util.spec_from_file_location('tune_kernels', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_fastest_of_what_runs_is_found(tuner):
  tried, said = [], []

  def timed(sizes):
    tried.append(sizes)
    if sizes.forward.rows == 8:
      raise MemoryError('too large for VMEM\nand more')
    return abs(sizes.forward.rows - 4) + abs(sizes.backward.columns - 6) + 1.0

  options = {'forward': [Pair(2), Pair(4), Pair(8), Pair()], 'backward': [Pair(1, 4), Pair(1, 6), Pair(1, 2)]}
  best, took, before = tuner.search(Sizes(), options, timed, said.append)
  assert (best, took, before) == (Sizes(Pair(4), Pair(1, 6)), 1.0, 8.0)
  assert len(tried) == len(set(tried)) == 1 + 3 + 2  # none twice
  assert said == ['  forward Pair(rows=8, columns=2): too large for VMEM']


def test_what_is_found_is_kept_beside_the_rest(tuner, tmp_path):
  path = tmp_path / 'blocks.json'
  path.write_text(json.dumps({'product': {'TPU v4': {'float32 64': {}}}}))
  tuner.kept(path, 'product', 'TPU v5 lite', 'bfloat16 64', Sizes())
  table = json.loads(path.read_text())
  assert table['product']['TPU v4'] == {'float32 64': {}}
  assert blocks.filled(Sizes(Pair(9), Pair(9)), table['product']['TPU v5 lite']['bfloat16 64']) == Sizes()


def test_every_kernel_has_cases_whose_defaults_may_be_varied(tuner):
  for kernel, cases in tuner.KERNELS.items():
    case, default, options, call = next(cases())
    assert case.startswith('bfloat16'), kernel
    for name, values in options.items():
      assert dataclasses.replace(default, **{name: values[0]}) != default or len(values) > 1
    function, arguments = call(default)
    assert all(out.shape == x.shape for out, x in zip(function.eval_shape(*arguments), arguments))


def test_a_cpu_is_refused(tuner):
  with pytest.raises(SystemExit, match='kernels that a CPU interprets have no speed'):
    tuner.main(['attention_tpu'])
