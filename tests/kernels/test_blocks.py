"""The table of block sizes is read where a kernel is made."""
import dataclasses
import importlib
import json

import pytest

from lmlib.kernels import blocks


@dataclasses.dataclass(frozen=True)
class Pair:
  rows: int = 1
  columns: int = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
  forward: Pair = Pair()
  backward: Pair = Pair()


@pytest.fixture
def table(monkeypatch, tmp_path):
  path = tmp_path / 'blocks.json'
  path.write_text(json.dumps({'product': {blocks.chip(): {'bfloat16 64': {'forward': {'rows': 5}}}, 'TPU v9': {}}}))
  monkeypatch.setattr(blocks, 'TABLE', path)
  blocks.table.cache_clear()
  yield
  blocks.table.cache_clear()


@pytest.mark.usefixtures('table')
def test_numbers_of_the_table_replace_the_default():
  assert blocks.tuned('product', 'bfloat16 64', Sizes()) == Sizes(forward=Pair(5, 2))
  assert blocks.tuned('product', 'bfloat16 128', Sizes()) == Sizes()
  assert blocks.tuned('sum', 'bfloat16 64', Sizes()) == Sizes()


def test_a_field_that_is_none_is_named():
  with pytest.raises(ValueError, match=r"blocks.json: Pair has no 'row', only \['columns', 'rows'\]"):
    blocks.filled(Sizes(), {'forward': {'row': 5}})


def test_every_line_of_the_table_fits_its_kernel():
  for kernel, chips in blocks.table().items():
    sizes = importlib.import_module(f'lmlib.kernels.{kernel}').Sizes
    defaults = {field.name: field.default for field in dataclasses.fields(sizes)}
    for cases in chips.values():
      for found in cases.values():
        for name, numbers in found.items():
          assert isinstance(numbers, int) or blocks.filled(defaults[name], numbers)
