"""What gin text says of a set of values is those values, to cli and to gin itself."""
import dataclasses
import importlib.util  # stock gin uses it without importing it
import re

import gin
from hypothesis import example, given, settings
from hypothesis import strategies as st
import pytest

from lmlib import cli
from lmlib.gin_text import gin_text, macro_text
from lmlib.models import dense


@dataclasses.dataclass(frozen=True)
class Part:
  size: int = 1
  rate: float = 0.5
  inner: object = None


def main(*, model, other, steps: int):
  raise AssertionError('gin_text() does not call main')


def anything(*, value):
  raise AssertionError('gin_text() does not call main')


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.builds(
    Part, size=st.integers(0, 3), rate=st.floats(0, 1), inner=inner), max_leaves=8)


@given(VALUES)
@example((float('inf'), -float('inf'), -0.0, 1e22, b'\0', '\n\'"'))
@settings(deadline=None, max_examples=60, database=None)
def test_text_and_back(tmp_path_factory, value):
  file = tmp_path_factory.getbasetemp() / 'round_trip.gin'
  file.write_text(gin_text(anything, {'value': value}), encoding='utf-8')
  back = cli.arguments(anything, [str(file)])
  assert repr(back) == repr({'value': value})  # == alone would take 1 for 1.0 and True


def test_text_is_complete_and_scopes_only_what_differs(tmp_path):
  part = Part(inner=Part(size=2))
  values = {'model': dense.Config(width=32), 'other': (part, part), 'steps': 4}
  text = gin_text(main, values)
  names = re.findall(r'^\S+(?=:$)', text, re.MULTILINE)
  assert names[:2] == ['test_gin_text.main', 'dense.Config']
  assert names[-2:] == ['other_0/test_gin_text.Part', 'other_0_inner/test_gin_text.Part']
  for field in dataclasses.fields(dense.Config):
    value = getattr(values['model'], field.name)
    assert re.search(rf'  {field.name} = (@\w+\.\w+\(\)|{re.escape(repr(value))})\n', text), field.name
  assert gin_text(f'{__name__}.main', values) == text
  file = tmp_path / 'config.gin'
  file.write_text(text)
  assert cli.arguments(main, [str(file)]) == values
  try:
    gin.parse_config(text)
    assert gin.get_bindings(main) == values  # stock gin reads it too
  finally:
    gin.clear_config()


def test_text_of_two_modules_of_one_name(tmp_path, monkeypatch):
  for package in ('first', 'second'):
    (tmp_path / package).mkdir()
    (tmp_path / package / 'same.py').write_text(
        'import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass C:\n  x: int = 1\n')
  monkeypatch.syspath_prepend(tmp_path)
  modules = [importlib.import_module(f'{package}.same') for package in ('first', 'second')]
  values = {'value': tuple(module.C(i) for i, module in enumerate(modules))}
  (tmp_path / 'x.gin').write_text(gin_text(anything, values))
  assert cli.arguments(anything, [str(tmp_path / 'x.gin')]) == values


def test_text_refuses_what_no_file_can_say():
  @dataclasses.dataclass(frozen=True)
  class Local:
    x: int = 1

  for value in (Local(), len, Part, float('nan'), {1: 2}, object()):
    with pytest.raises(ValueError, match='value_0'):
      gin_text(anything, {'value': (value,)})


def test_a_text_of_macros_is_a_file_of_a_model(tmp_path):
  """One that sets MODEL, and one that gives a main() its model, are about the same."""
  config = dense.Config(width=24, hidden=40)
  written = macro_text({'MODEL': config})
  assert '\nMODEL = @dense.Config()\n' in written
  (tmp_path / 'config.gin').write_text(written)
  assert cli.saved_model(str(tmp_path)) == config
  (tmp_path / 'config.gin').write_text(gin_text('experiments.pretrain.main', {'steps': 3, 'model': config}))
  assert cli.saved_model(str(tmp_path)) == config


@pytest.mark.parametrize(('text', 'said'), [
    ('from __gin__ import dynamic_registration\nSTEPS = 3\n', 'config.gin: no MODEL is set'),
    ('from __gin__ import dynamic_registration\nfrom lmlib.models import dense\nMODEL = @dense.Config()\n'
     'dense.Config.width = 0\n', r'config.gin: dense.Config.width=0 must be')])
def test_a_file_without_a_model_is_named(tmp_path, text, said):
  (tmp_path / 'config.gin').write_text(text)
  with pytest.raises(ValueError, match=said):
    cli.saved_model(str(tmp_path))
