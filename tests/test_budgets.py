"""Sizes and names that keep the library readable."""
import ast
import dataclasses
import importlib
import inspect
import pathlib

from flax import linen as nn
import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = sorted((ROOT / 'lmlib').rglob('*.py'))
EXPERIMENTS = sorted(path for path in (ROOT / 'experiments').glob('*.py') if path.stem != '__init__')
FORBIDDEN = {'utils', 'util', 'common', 'helper', 'helpers', 'manager', 'base', 'misc'}
name = lambda path: path.relative_to(ROOT).as_posix()
files = pytest.mark.parametrize('path', [*LIBRARY, *EXPERIMENTS], ids=name)


def functions(tree):
  return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def lines(node) -> int:
  """Lines of a definition, its decorators included."""
  return node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1


@files
def test_files_and_functions_are_short(path):
  kernel = path.is_relative_to(ROOT / 'lmlib' / 'kernels')
  text = path.read_text()
  most = 140 if path in EXPERIMENTS else 700 if kernel else 500
  assert len(text.splitlines()) <= most
  for function in [] if path in EXPERIMENTS else functions(ast.parse(text)):  # there main() is the file
    assert lines(function) <= (150 if kernel else 60), f'{function.name} has {lines(function)} lines'


@files
def test_names_say_what_is_inside(path):
  assert not FORBIDDEN & {*path.relative_to(ROOT).parts, *path.stem.split('_')}, path


@pytest.mark.parametrize('path', EXPERIMENTS, ids=name)
def test_an_experiment_is_one_main(path):
  tree = ast.parse(path.read_text())
  assert [f.name for f in functions(tree)] == ['main']
  assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
  found = functions(tree)[0].args
  assert [found.args, found.posonlyargs, found.vararg, found.kwarg] == [[], [], None, None], 'main(*, ...)'


@files
def test_public_things_are_described(path):
  """Every module; every public function or method whose few lines do not say it; every public class but the
  dataclasses and layers that are their module's subject or have nothing but named fields."""
  tree = ast.parse(path.read_text())
  assert path.stem == '__init__' or ast.get_docstring(tree), 'the module has no docstring'
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
      assert ast.get_docstring(node) or lines(node) <= 3, f'{node.name} has no docstring'
    if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
      plain = not node.decorator_list and not node.bases
      assert ast.get_docstring(node) or not plain, f'{node.name} has no docstring'


def dataclasses_of_lmlib():
  """Every dataclass that a module of lmlib defines, by name."""
  found = {}
  for path in LIBRARY:
    dotted = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    found |= {f'{dotted}.{key}': value for key, value in vars(importlib.import_module(dotted)).items()
              if inspect.isclass(value) and value.__module__ == dotted and dataclasses.is_dataclass(value)}
  return found


def test_configs_are_small_frozen_and_hashable():
  """At most 15 fields, those that are inherited included. What flax makes of a module is not counted."""
  seen = dataclasses_of_lmlib()
  assert {'lmlib.models.dense.Config', 'lmlib.sharding.Layout', 'lmlib.optim.muon.Muon'} <= seen.keys()
  for label, cls in seen.items():
    fields = [field.name for field in dataclasses.fields(cls) if field.name not in ('parent', 'name')]
    assert len(fields) <= 15, f'{label} has {len(fields)} fields'
    if not issubclass(cls, nn.Module):
      assert cls.__dataclass_params__.frozen, f'{label} is not frozen'
