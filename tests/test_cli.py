"""Gin files become the arguments of main(), and faults become one line and a status."""
import dataclasses
import importlib.util  # stock gin uses it without importing it
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import textwrap

import gin
import pytest

from lmlib import cli
from lmlib.models import dense

ROOT = pathlib.Path(cli.__file__).parents[1]
HEAD = f'''from __gin__ import dynamic_registration
import {__name__} as here
from lmlib.models import dense
'''


INTERRUPTED = '''
import gc, os, signal, sys, time
from lmlib import cli
cli.interrupt_again()
class Deaf:
  def __del__(self):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
    print('not reached')
try:
  Deaf()
  for _ in range(1000):
    time.sleep(0.01)
except KeyboardInterrupt:
  sys.exit(75)
'''


@dataclasses.dataclass(frozen=True)
class Part:
  size: int = 1
  rate: float = 0.5
  name: str | None = None
  inner: object = None
  items: tuple[str, ...] = ()

  def __post_init__(self):
    if self.size < 0:
      raise ValueError(f'Part.size={self.size} must not be negative')


@dataclasses.dataclass(frozen=True)
class Needy:
  path: str


def main(*, model=None, other=None, steps: int = 1, workdir: str = 'runs', rates=(), flag: bool = True):
  raise AssertionError('arguments() does not call main')


def anything(*, value):
  raise AssertionError('arguments() does not call main')


@pytest.fixture
def configs(tmp_path, monkeypatch):
  """An empty gin_configs/, and a function that writes files into it; the current folder is another one."""
  folder, current = tmp_path / 'gin_configs', tmp_path / 'current'
  current.mkdir()
  monkeypatch.setattr(cli, 'GIN_CONFIGS', folder)
  monkeypatch.chdir(current)

  def write(name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(textwrap.dedent(text))

  return write


def fault(*bindings, files=()):
  with pytest.raises(ValueError) as caught:  # noqa: PT011 (each test looks at the message)
    cli.arguments(main, files, bindings)
  message = str(caught.value)
  assert '\n' not in message
  return message


# Values.

SCOPED = HEAD + '''
MODEL = @dense.Config()
PART = @here.Part()
dense.Config.width = 32
policy/dense.Config.layers = 5
here.Part:
  size = 3
  items = ('a', 'b')
PART/here.Part.rate = 2.0
outer/inner/here.Part.size = 4
outer/here.Part.size = 7
here.main:
  model = %MODEL
  other = (@policy/dense.Config(), @outer/here.Part(), %PART, @outer/inner/here.Part())
  steps = 10
'''


def test_stock_gin_makes_the_same_values(configs):
  """Scopes, macros and nesting mean what they mean to gin's own registry."""
  configs('x.gin', SCOPED)
  ours = cli.arguments(main, ['x.gin'], ['here.main.steps = 11'])
  assert importlib.util
  try:
    gin.parse_config(SCOPED + 'here.main.steps = 11\n')
    stock = gin.get_bindings(main)
  finally:
    gin.clear_config()
  assert ours == stock
  assert ours['steps'] == 11
  assert ours['model'] == dense.Config(width=32)
  policy, outer, part, inner = ours['other']
  assert policy == dense.Config(width=32, layers=5)
  assert outer == Part(size=7, items=('a', 'b'))
  assert part == Part(size=3, rate=2.0, items=('a', 'b'))
  assert inner == Part(size=4, items=('a', 'b'))


def test_lists_become_tuples_and_nested_objects_are_made(configs):
  configs('x.gin', HEAD + 'here.main.model = @a/here.Part()\na/here.Part.inner = @b/here.Part()\n')
  bindings = ['here.main.rates = [1, [2.5, None], ()]', "a/here.Part.items = ['x']"]
  made = cli.arguments(main, ['x.gin'], bindings)
  assert made == {'model': Part(inner=Part(), items=('x',)), 'rates': (1, (2.5, None), ())}
  assert hash(made['rates'])


def test_command_line_may_import(configs):
  configs('x.gin', HEAD)
  bindings = ['from lmlib import sharding', 'here.main.model = @sharding.Layout()']
  made = cli.arguments(main, ['x.gin'], bindings)
  assert type(made['model']).__name__ == 'Layout'


def test_later_files_win_and_the_current_folder_is_searched_first(configs):
  configs('x.gin', HEAD + 'here.main.steps = 1\n')
  configs('sub/y.gin', HEAD + 'here.main.steps = 2\n')
  assert cli.arguments(main, ['x.gin', 'sub/y.gin']) == {'steps': 2}
  assert cli.arguments(main, ['sub/y.gin', 'x.gin']) == {'steps': 1}
  pathlib.Path('x.gin').write_text(HEAD + 'here.main.steps = 3\n')
  assert cli.arguments(main, ['x.gin']) == {'steps': 3}


# Faults of the configuration.

BASE = HEAD + '''
MODEL = @dense.Config()
STEPS = 5
here.main:
  model = %MODEL
  steps = %STEPS
  other = @here.Part()
'''


@pytest.mark.parametrize(('binding', 'expected'), [
    ('dense.Config.widht = 3', 'dense.Config has no field "widht" (did you mean "width"?); it has: vocab, '),
    ('here.main.step = 3', 'test_cli.main has no argument "step" (did you mean "steps"?)'),
    ('dens.Config.width = 3', '"dens" is not imported (did you mean "dense"?)'),
    ('moe.Config.width = 3', '`from lmlib.models import moe`'),
    ('dense.Confg.width = 3', 'dense has no "Confg" (did you mean "Config"?)'),
    ('dense.dataclasses.x = 3', 'dense.dataclasses is no class or function, but a module'),
    ('from lmlib.models import dens', 'lmlib.models has no module "dens" (did you mean "dense"?)'),
    ('import lmlib_missing', "cannot import lmlib_missing: No module named 'lmlib_missing'"),
    ('STEPZ = 3', 'read by nothing that test_cli.main uses: STEPZ (--gin_bindings) (did you mean "STEPS"?)'),
    ('MODEL = 1\ndense.Config.width = 3', 'by nothing that test_cli.main uses: dense.Config.width'),
    ('policy/dense.Config.width = 3', 'uses: policy/dense.Config.width (--gin_bindings)'),
    ('STEPS = %STEP', 'the macro %STEP is not defined (did you mean "STEPS"?)'),
    ('STEPS = %gin.REQUIRED', "with --gin_bindings='STEPS = 1000'"),
    ('MODEL = %MODEL', '%MODEL needs itself'),
    ('here.Part.inner = @here.Part()', '@test_cli.Part() needs itself'),
    ('MODEL = @dense.Config', '@dense.Config lacks its ()'),
    ('MODEL = {1: 2}', 'is a dictionary; write a tuple of pairs'),
    ('MODEL = @here.Needy()', '''Needy.path is needed and not set; set it in a gin file or with '''
                              '''--gin_bindings='test_cli.Needy.path = "..."\''''),
    ('STEPS 50', "--gin_bindings: cannot read 'STEPS 50': expected NAME = value"),
    ('WORKDIR = runs/x', 'text needs quotes'),
    ('WORKDIR = ~/x', 'text needs quotes'),
    ('WORKDIR = "runs', "cannot read 'WORKDIR = \"runs'"),
    ('here.main.rates = (1,', "cannot read 'here.main.rates = (1,'"),
    ('STEPS = 50k', "cannot read 'STEPS = 50k'"),
    ("STEPS = '3'", "STEPS='3' (--gin_bindings) must be of type int"),
    ('STEPS = 3.0', 'STEPS=3.0 (--gin_bindings) must be of type int'),
    ('STEPS = True', 'STEPS=True (--gin_bindings) must be of type int'),
    ('here.main.flag = 1', 'test_cli.main.flag=1 (--gin_bindings) must be of type bool'),
    ('here.Part.name = 3', 'Part.name=3 (--gin_bindings) must be of type str | None'),
    ("here.Part.items = 'ab'", "Part.items='ab' (--gin_bindings) must be of type tuple[str, ...]"),
    ('here.Part.items = (1,)', 'must be of type tuple[str, ...]'),
    ('here.Part.size = -1', 'Part.size=-1 must not be negative'),
    ('MODEL = @p/here.Part()\np/here.Part.size = -2', 'Part.size=-2 must not be negative (in scope p)'),
    ('dense.Config.heads = 3', 'dense.Config.heads=3 is not a multiple of kv_heads=4'),
    ("include 'missing.gin'", "there is no file 'missing.gin'"),
])
def test_a_fault_is_one_line_that_names_the_setting(configs, binding, expected):
  configs('x.gin', BASE)
  cli.arguments(main, ['x.gin'])
  assert expected in fault(*binding.split('\n'), files=['x.gin'])


def test_types_that_fit(configs):
  configs('x.gin', BASE)
  bindings = ['here.Part.rate = 1', 'here.Part.name = None', "here.Part.items = ['a']"]
  made = cli.arguments(main, ['x.gin'], bindings)
  assert made['other'] == Part(rate=1, name=None, items=('a',))


def test_a_fault_in_a_file_names_its_line(configs):
  configs('models/a.gin', HEAD + 'dense.Config.widht = 3\n')
  configs('x.gin', "include 'models/a.gin'\n" + BASE)
  assert fault(files=['x.gin']).startswith('models/a.gin:4: dense.Config has no field "widht"')
  configs('y.gin', BASE + 'here.Part.size = "x"\n')
  assert "Part.size='x' (y.gin:11) must be of type int" in fault(files=['y.gin'])
  configs('z.gin', BASE + 'here.Part\n')
  assert fault(files=['z.gin']).startswith("z.gin:11: cannot read 'here.Part'")


def test_required_is_set_after_the_line_that_requires_it(configs):
  run = HEAD + 'STEPS = %gin.REQUIRED\nhere.main.steps = %STEPS\n'
  configs('runs/r.gin', run)
  configs('first.gin', "include 'runs/r.gin'\nSTEPS = 7\n")
  configs('last.gin', "STEPS = 7\ninclude 'runs/r.gin'\n")
  configs('none.gin', "STEPZ = 7\ninclude 'runs/r.gin'\n")
  assert cli.arguments(main, ['first.gin']) == {'steps': 7}
  assert 'STEPS is required and not set: set it after runs/r.gin:4' in fault(files=['last.gin'])
  assert 'STEPS is required and not set (but STEPZ is)' in fault(files=['none.gin'])
  assert cli.arguments(main, ['last.gin'], ['STEPS = 8']) == {'steps': 8}


def test_a_required_field_and_a_missing_argument(configs):
  configs('x.gin', HEAD + 'here.Part.size = %gin.REQUIRED\nhere.main.model = @here.Part()\n')
  assert 'Part.size is required and not set' in fault(files=['x.gin'])
  with pytest.raises(ValueError, match=r'anything\.value is needed and not set'):
    cli.arguments(anything, [], [])


def test_files(configs):
  configs('quickstart.gin', BASE)
  configs('other.gin', "include 'quickstart.gin'\n")
  configs('runs/a.gin', "include 'runs/b.gin'\n")
  configs('runs/b.gin', "include 'runs/a.gin'\n")
  configs('plain.gin', 'from lmlib.models import dense\n')
  configs('binary.gin', '')
  (cli.GIN_CONFIGS / 'binary.gin').write_bytes(b'\xff\xfe\x00')
  assert "there is no file 'quikstart.gin'" in fault(files=['quikstart.gin'])
  assert 'did you mean "quickstart.gin"?' in fault(files=['quikstart.gin'])
  assert str(cli.GIN_CONFIGS) in fault(files=['quikstart.gin'])
  assert 'other.gin:1: quickstart.gin is a whole configuration' in fault(files=['other.gin'])
  assert 'runs/b.gin:1: runs/a.gin includes itself' in fault(files=['runs/a.gin'])
  assert 'plain.gin:1: begin the file with `from __gin__' in fault(files=['plain.gin'])
  assert 'cannot read' in fault(files=['binary.gin'])


# The process.

EXPERIMENT = '''
"""Fakes a run.

More about it."""
import json
import pathlib
import time

from lmlib import cli

class Fault(RuntimeError):
  exit_status = 1

class Stopped(Exception):
  exit_status = 75

def main(*, what, steps: int = 1):
  if hasattr(what, 'check'):
    what.check()
  if what == 'value':
    raise ValueError('length=9 is longer than 8\\n  indeed')
  if what == 'dependency':
    json.loads('{')
  if what == 'fault':
    raise Fault('step 3: not finite')
  if what == 'stopped':
    raise Stopped('saved step 4')
  if what == 'file':
    open('/missing/file')
  if what == 'write':
    raise OSError(28, 'No space left on device')
  if what == 'bug':
    raise KeyError('bug')
  if what == 'alone':
    raise RuntimeError('gloo: what several processes say of each other')
  if what == 'wait':
    print('waiting', flush=True)
    time.sleep(30)
  print('what', what, 'steps', steps)

if __name__ == '__main__':
  cli.GIN_CONFIGS = pathlib.Path('HERE/gin_configs')
  cli.run(__file__)
'''


MINE = '''
def text(*, bad: bool = False):
  if bad:
    raise ValueError('mine is bad')
  return 'done'

class Late:
  def check(self):
    raise ValueError('mine is bad, as it turns out')
'''


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with verbs/fake.py, gin_configs/ and a module of the user's own."""
  place = tmp_path_factory.mktemp('place')
  (place / 'verbs').mkdir()
  (place / 'gin_configs' / 'runs').mkdir(parents=True)
  (place / 'verbs' / 'fake.py').write_text(EXPERIMENT.strip().replace('HERE', str(place)))
  (place / 'gin_configs' / 'runs' / 'fake.gin').write_text(
      'from __gin__ import dynamic_registration\nfrom verbs import fake\nfake.main.what = %WHAT\n')
  (place / 'gin_configs' / 'quick.gin').write_text("# A quick one.\ninclude 'runs/fake.gin'\nWHAT = 'done'\n")
  (place / 'gin_configs' / 'unrelated.gin').write_text('STEPS = 3\n')
  (place / 'current').mkdir()
  (place / 'current' / 'mine.py').write_text(MINE)
  return place


def start(place, *flags):
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'LMLIB_CACHE': str(place / 'cache')}
  command = [sys.executable, str(place / 'verbs' / 'fake.py'), *flags]
  return subprocess.Popen(command, cwd=place / 'current', env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(place, *flags):
  process = start(place, *flags)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


@pytest.mark.parametrize(('what', 'status', 'last'), [
    ('value', 2, 'length=9 is longer than 8 indeed'),
    ('fault', 1, 'step 3: not finite'),
    ('stopped', 75, 'saved step 4'),
    ('file', 1, '/missing/file: No such file or directory'),
    ('write', 1, 'No space left on device'),
])
def test_status(place, what, status, last):
  assert finish(place, '--gin_file=quick.gin', f"--gin_bindings=WHAT = '{what}'") == (status, '', last + '\n')


@pytest.mark.parametrize(('what', 'last'), [
    ('dependency', 'json.decoder.JSONDecodeError'),
    ('bug', "KeyError: 'bug'"),
    ('alone', 'RuntimeError: gloo'),
])
def test_what_nobody_foresaw_shows_its_traceback(place, what, last):
  status, _, err = finish(place, '--gin_file=quick.gin', f"--gin_bindings=WHAT = '{what}'")
  assert status == 1
  assert err.startswith('Traceback')
  assert err.splitlines()[-1].startswith(last)


def test_done(place):
  assert finish(place, '--gin_file', 'quick.gin', '--gin_bindings=fake.main.steps = 2') == (
      0, 'what done steps 2\n', '')


def test_a_module_of_the_user(place):
  mine = ('--gin_file=quick.gin', '--gin_bindings=import mine', '--gin_bindings=WHAT = @mine.text()')
  assert finish(place, *mine) == (0, 'what done steps 1\n', '')
  assert finish(place, *mine, '--gin_bindings=mine.text.bad = True') == (2, '', 'mine.text: mine is bad\n')
  late = ('--gin_file=quick.gin', '--gin_bindings=import mine', '--gin_bindings=WHAT = @mine.Late()')
  assert finish(place, *late) == (2, '', 'mine is bad, as it turns out\n')


def test_the_folder_of_experiments_hides_no_package(place):
  status, _, err = finish(place, '--gin_file=quick.gin', '--gin_bindings=import fake')
  assert (status, err) == (2, "--gin_bindings: cannot import fake: No module named 'fake'\n")


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_loop(place, number):
  process = start(place, '--gin_file=quick.gin', "--gin_bindings=WHAT = 'wait'")
  assert process.stdout.readline() == 'waiting\n'
  process.send_signal(number)
  assert process.communicate(timeout=60) == (
      '', 'stopped before there was anything to save; run the same command again\n')
  assert process.returncode == 75


@pytest.mark.parametrize(('flags', 'expected'), [
    (['--gin_flie=quick.gin'], 'there is no flag --gin_flie (did you mean "gin_file"?)'),
    (['--gin_file=quick.gin', '--steps=5'], "no flag --steps; a setting is given as --gin_bindings='STEPS"),
    (['quick.gin'], "'quick.gin' belongs to no flag; did you mean --gin_file=quick.gin?"),
    (['--gin_file=quick.gin', 'STEPS=5'], "did you mean --gin_bindings='STEPS=5'?"),
    (['--gin_file'], 'Missing value for flag --gin_file'),
    ([], 'for fake are: quick.gin'),
    (['--gin_file=quikc.gin'], 'did you mean "quick.gin"?'),
])
def test_flags(place, flags, expected, monkeypatch):
  monkeypatch.setattr(cli, 'GIN_CONFIGS', place / 'gin_configs')
  monkeypatch.setattr(sys, 'path', list(sys.path))
  with pytest.raises(ValueError, match=re.escape(expected)):
    cli.arguments(main, cli._flags(flags, place / 'verbs' / 'fake.py').gin_file)


def test_a_wrong_flag_ends_with_2(place):
  status, out, err = finish(place, '--gin_flie=quick.gin')
  assert (status, out, err.count('\n')) == (2, '', 1)


def test_help(place):
  status, out, err = finish(place, '--help')
  assert (status, err) == (0, '')
  assert out.startswith('Fakes a run.\n\nMore about it.')
  for part in ('--gin_file=FILE', '--gin_bindings=', 'quick.gin                   A quick one.', 'WHAT'):
    assert part in out
  assert 'unrelated.gin' not in out


# Quiet, and the cache of compiled programs.

COMPILES = '''
{before}
from lmlib import cli
cli.quiet()
import jax
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
from jax._src import monitoring
hits = []
monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.jit(lambda x: x * 2 + 1)(1.0).block_until_ready()
print(hits.count('/jax/compilation_cache/cache_hits'))
'''


def quietly(code, **environment):
  kept = {name: value for name, value in os.environ.items()
          if name not in ('XLA_FLAGS', 'TF_CPP_MIN_LOG_LEVEL', 'LMLIB_CACHE', 'XDG_CACHE_HOME')
          and not name.startswith('JAX_')}
  environment = {**kept, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', **environment}
  done = subprocess.run([sys.executable, '-c', code], env=environment, text=True, capture_output=True,
                        check=False, timeout=120)
  assert (done.returncode, done.stderr) == (0, '')
  return done.stdout.split()


@pytest.mark.parametrize('before', ['', 'import jax'])
def test_the_second_run_reads_the_cache_in_silence(tmp_path, before):
  folder, seconds, hits = quietly(COMPILES.format(before=before), LMLIB_CACHE=str(tmp_path))
  assert pathlib.Path(folder).parent == tmp_path / 'jax'
  assert (float(seconds), int(hits)) == (0, 0)
  *_, hits = quietly(COMPILES.format(before=before), LMLIB_CACHE=str(tmp_path))
  assert int(hits) > 0


SHOWS = '''
import os
from lmlib import cli
cli.quiet()
print(os.environ['TF_CPP_MIN_LOG_LEVEL'])
print(os.environ.get('JAX_COMPILATION_CACHE_DIR'))
print(os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'])
'''


def test_the_environment_of_the_user_stays(tmp_path):
  assert quietly(SHOWS, TF_CPP_MIN_LOG_LEVEL='0', JAX_COMPILATION_CACHE_DIR='mine',
                 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='9') == ['0', 'mine', '9']
  level, folder, seconds = quietly(SHOWS, XDG_CACHE_HOME=str(tmp_path))
  assert (level, seconds) == ('2', '0.0')
  assert folder.startswith(str(tmp_path / 'lmlib' / 'jax'))


def test_without_a_folder_for_the_cache_there_is_none(tmp_path):
  (tmp_path / 'file').touch()
  assert quietly(SHOWS, LMLIB_CACHE=str(tmp_path / 'file'))[1] == 'None'


def test_a_folder_that_takes_no_file_is_no_cache(tmp_path, monkeypatch):
  def refuse(**_):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setenv('LMLIB_CACHE', str(tmp_path))
  assert cli._cache()
  monkeypatch.setattr(tempfile, 'TemporaryFile', refuse)
  assert cli._cache() is None


def test_what_is_imported():
  shows = "import sys\nfrom lmlib import {}\nprint({{'jax', '{}'}} & {{*sys.modules}})"
  assert quietly(shows.format('cli', 'tensorflow')) == ['set()']
  assert quietly(shows.format('gin_text', 'gin')) == ['set()']


def test_an_interruption_where_exceptions_are_ignored_is_not_lost():
  done = subprocess.run([sys.executable, '-c', INTERRUPTED], text=True, capture_output=True, timeout=60,
                        env=os.environ | {'PYTHONPATH': str(ROOT)}, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (75, '', '')
