"""Every gin file resolves, and what it says can be built; nothing is computed."""
import importlib
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from lmlib import cli, sharding, trees
from lmlib.data.prepare import Stored
from lmlib.models import protocol
from lmlib.train import step as step_of

ROOT = cli.GIN_CONFIGS
LEAVES = sorted(path.name for path in ROOT.glob('*.gin'))
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob('*.gin'))
MACROS = {'MODEL', 'DATA', 'OPTIMIZER', 'LAYOUT', 'STEPS', 'BATCH', 'WORKDIR', 'SEED'}
OWN = {'GLOB', 'FIELD', 'FOLDER', 'SPLIT', 'TASK', 'MODULE', 'PROMPTS', 'NEW',
       'PATH', 'STEP', 'ROW'}  # what to read or continue, which no file can know
GIVEN = ("GLOB = 'texts/*.txt'", "FOLDER = 'data/set'", "TASK = 'task'", "MODULE = 'my_tasks'",
         "PATH = 'data/prepared'")  # what a user must say, to files that require it
ON_THE_COMMAND_LINE = ('meshes/fsdp.gin', 'data/data_folder.gin', 'data/seqio_task.gin')  # behind a leaf
PARAMETERS = {'3m': 3_000_000, '124m': 124_000_000}

leaves = pytest.mark.parametrize('leaf', LEAVES)


def text(name: str) -> str:
  return (ROOT / name).read_text()


def includes(name: str) -> list[str]:
  return re.findall(r"^include '(.+?)'", text(name), re.MULTILINE)


def with_includes(name: str) -> str:
  return '\n'.join([text(name), *map(with_includes, includes(name))])


def arguments(leaf: str, *more: str) -> tuple:
  """main() of the experiment that a leaf sets up, and the arguments that it and `more` files give."""
  experiment = re.search(r'^(?:experiments\.)?(\w+)\.main:', with_includes(leaf), re.MULTILINE)[1]
  main = importlib.import_module(f'experiments.{experiment}').main
  said = '\n'.join(map(with_includes, (leaf, *more)))
  given = [binding for binding in GIVEN if f'{binding.split()[0]} = %gin.REQUIRED' in said]
  return main, cli.arguments(main, [leaf, *more], given)


@leaves
def test_a_leaf_gives_main_its_arguments(leaf):
  main, values = arguments(leaf)
  inspect.signature(main).bind(**values)


@leaves
def test_what_a_leaf_says_can_be_built(leaf):
  """Weights, optimizer state and one step, by shape alone."""
  main, values = arguments(leaf)
  if 'model' not in values:
    return
  model, B, T = values['model'], values['batch'], values.get('length') or values['model'].length
  letters = sharding.letters(protocol.boxed(model))
  transformation = values['optimizer'].transformation(letters, values['steps'])
  loss = values.get('loss', inspect.signature(main).parameters['loss'].default)
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
  batch = {name: array((B, T), jnp.int32) for name in ('tokens_BT', 'targets_BT', 'segments_BT')}
  batch |= {'weight_BT': array((B, T), jnp.float32), 'row_B': array((B,), jnp.uint32)}
  step = step_of.make_step(loss.of(model), transformation, values.get('microbatches', 1))
  before = step_of.shapes(model, transformation)
  after, metrics = jax.eval_shape(step, before, batch)
  forms = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert forms(after) == forms(before)
  assert {'loss', 'grad_norm', 'finite'} <= metrics.keys()
  if not isinstance(values['data'], Stored):  # whose vocabulary is that of what is there
    assert values['data'].vocab == model.vocab, 'the tokenizer and the model disagree'


@leaves
def test_a_leaf_may_be_given_after_another_mesh(leaf):
  for mesh in sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'meshes').glob('*.gin')):
    if '%LAYOUT' in with_includes(leaf):
      assert arguments(leaf, mesh)[1]['layout'].mesh().size == 8


@pytest.mark.parametrize('data', ON_THE_COMMAND_LINE[1:])
def test_the_quickstart_may_be_given_other_data(data):
  source = arguments('quickstart.gin', data)[1]['data'].source
  assert type(source).__name__ == {'data_folder': 'DataFolder', 'seqio_task': 'Seqio'}[pathlib.Path(data).stem]


@pytest.mark.parametrize('name', [name for name in FILES if name.startswith('models/')])
def test_a_model_has_the_size_of_its_name(name):
  _, values = arguments(next(leaf for leaf in LEAVES if name in includes(leaf)))
  expected = PARAMETERS[pathlib.Path(name).stem.rpartition('_')[2]]
  # A name is a round number: within a sixth for 3M, a hundredth for 124M.
  assert abs(trees.count(protocol.boxed(values['model'])) / expected - 1) < max(0.01, 0.5e6 / expected)


@pytest.mark.parametrize('name', FILES)
def test_a_file_keeps_to_the_form(name):
  code = re.sub(r'#.*', '', text(name))
  assert text(name).startswith('# '), 'the first line says what the file is; --help prints it'
  assert 'from __gin__ import dynamic_registration' in code
  assert 'lmlib' in code or 'experiments' in code
  for included in includes(name):
    assert '/' in included, f'{included} is a leaf'
    assert '/' not in name, 'only leaves include'
  folders = [included.split('/')[0] for included in includes(name)]
  assert len(folders) == len(set(folders)), 'one file of each folder'
  assert set(folders) <= {'models', 'meshes', 'data', 'runs'}
  assert not re.search(r'(?<!%)@\w[\w./]*(?!\w*\()\b(?![\w./]*\()', code), 'objects are made: @name()'


def test_there_are_eight_macros_and_what_to_read():
  used = {macro for name in FILES for macro in re.findall(r'%([A-Z]\w*)', text(name))}
  set_here = {macro for name in FILES for macro in re.findall(r'^([A-Z]\w*) =', text(name), re.MULTILINE)}
  assert used == set_here
  assert used <= MACROS | OWN


def test_every_file_is_used():
  used = {included for leaf in LEAVES for included in includes(leaf)}
  alone = {name for name in FILES if '/' in name} - used - {*ON_THE_COMMAND_LINE}
  assert not alone, f'{alone} belong to no leaf'
