"""Runs an experiment under gin. The only module that imports gin.

Flags and gin files become the arguments of main(), which is then called as plain Python, so nothing
that happens inside the library can depend on a binding. run() ends the process with a status:

  0   done
  1   a fault of the run: its reason is the last line
  2   a fault of the configuration, before any work: one line that names the setting
  75  stopped by a signal, with everything saved: the same command goes on
"""
import ast
import ctypes
import dataclasses
import hashlib
import importlib
import os
import pathlib
import pkgutil
import platform
import re
import signal
import sys
import sysconfig
import tempfile
import threading
import tokenize
import traceback
import types
import warnings

from absl import flags, logging
from gin import config_parser

from lmlib import gin_text, processes
from lmlib.gin_text import Bound, Macro, Object, close

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h

GIN_CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'gin_configs'


def run(file: str, of: tuple[str, ...] = ()):
  """Calls main() of the experiment in `file` with what the flags say, and exits with the status above.

  of: experiments whose settings it reads, for one that has none of its own: its main() is given the name of the one
  that the files are for, `experiment`, and its arguments, `run`.
  """
  quiet()
  keep_memory()
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the training loop takes over
  interrupt_again()
  path = pathlib.Path(file).resolve()
  # Not the folder of the script: experiments/evaluate.py would hide a package called evaluate.
  sys.path[:] = [str(path.parents[1]), *(p for p in sys.path if p != str(path.parent)), os.getcwd()]
  try:
    given = _flags(sys.argv[1:], path, of or (path.stem,))
    if given.help:
      print(_help(path, of or (path.stem,)))
    elif of:
      main = importlib.import_module(f'{path.parent.name}.{path.stem}').main
      experiment, settings = arguments_of(of, given.gin_file, given.gin_bindings)
      main(experiment=experiment, run=settings)
    else:
      main = importlib.import_module(f'{path.parent.name}.{path.stem}').main
      settings = arguments(main, given.gin_file, given.gin_bindings)
      _begin(f'{path.parent.name}.{path.stem}.main', settings)
      main(**settings)
      processes.end()
  except SystemExit:
    raise
  except BaseException as error:
    status, reason = _fault(error, path)
    if shown := reason is None and (processes.count() == 1 or not processes.consequence(error)):
      traceback.print_exc()
    processes.fail(error, reason or traceback.format_exception_only(error)[-1].strip(), status, shown=shown)
    if not shown:
      print(reason, file=sys.stderr)
    sys.exit(status)
  sys.exit(0)


def _begin(name: str, settings: dict):
  """Joins the other processes of the run, if the environment speaks of any; their settings must be the same."""
  if processes.found(os.environ) is None:
    return
  if 'layout' not in settings:
    raise ValueError(f'{name} runs in one process, but the environment speaks of several (lmlib/processes.py): '
                     'only what has a LAYOUT can be divided')
  processes.begin({'settings': gin_text.gin_text(name, settings).splitlines()})


def arguments(main, gin_files=(), bindings=()) -> dict:
  """The arguments that gin files, then bindings ('STEPS = 50'), give to main(); later ones win.

  A file is looked for from the current folder, then in gin_configs/. ValueError, in one line, names
  the file, line and setting at fault.
  """
  return _read(gin_files, bindings).arguments(main)


def arguments_of(experiments: tuple[str, ...], gin_files=(), bindings=()) -> tuple[str, dict]:
  """The one of these experiments that gin files and bindings are for, and the arguments of its main(); see arguments().

  ValueError if they are for none.
  """
  settings = _read(gin_files, bindings)
  for name in experiments:
    main = importlib.import_module(f'experiments.{name}').main
    if settings.binds(main):
      return name, settings.arguments(main)
  raise ValueError(f'{", ".join(map(str, gin_files))}: sets up none of experiments/{", ".join(experiments)}')


def _read(gin_files, bindings) -> gin_text.Settings:
  reader = _Reader()
  for name in gin_files:
    reader.file(os.fspath(name), '--gin_file')
  imports = dict(reader.imports)
  for binding in bindings:
    reader.text(binding, '--gin_bindings', imports)
  return reader.settings


def saved(main, workdir: str) -> dict:
  """The arguments of main() in the run that `workdir` holds. ValueError if it holds none."""
  return arguments(main, [_saved(workdir)])


def saved_run(workdir: str) -> tuple[str, dict]:
  """The experiment whose run `workdir` holds, pretrain or sft, and the arguments of its main(). ValueError if none."""
  return arguments_of(('pretrain', 'sft'), [_saved(workdir)])


def saved_model(workdir: str):
  """The config of the model in `workdir`, whichever experiment wrote it. ValueError if there is none."""
  config, reader = _saved(workdir), _Reader()
  reader.file(str(config), 'WORKDIR')
  try:
    return reader.settings.model()
  except ValueError as error:
    raise ValueError(f'{config}: {error}') from error


def _saved(workdir: str) -> pathlib.Path:
  config = pathlib.Path(workdir).expanduser() / 'config.gin'
  if not config.is_file():
    raise ValueError(f'WORKDIR {workdir!r} holds no run: there is no {config}')
  return config


def interrupt_again():
  """Sends an interruption once more that came where Python must ignore exceptions, such as in a callback of jax."""
  before = sys.unraisablehook

  def hook(unraisable):
    if unraisable.exc_type is not KeyboardInterrupt:
      before(unraisable)
    else:
      threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()

  sys.unraisablehook = hook


def quiet():
  """Keeps the noise of dependencies off the screen, and what XLA compiles on disk for the next run.

  Overrides nothing that the environment sets. The C++ of jaxlib reads its log level while it is
  imported, so an experiment that imports jax above cli keeps jax's own choice (errors and warnings).
  """
  jax = sys.modules.get('jax')
  if jax is not None and os.environ.get('TF_CPP_MIN_LOG_LEVEL') == '1':
    del os.environ['TF_CPP_MIN_LOG_LEVEL']  # set by jax; TensorFlow, imported later, would read it
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  logging.set_verbosity(logging.ERROR)  # orbax
  if not sys.warnoptions:
    warnings.filterwarnings('ignore', module=r'(?!lmlib\b|experiments\b|__main__\b)')
  wanted = {'jax_persistent_cache_min_compile_time_secs': 0.0}
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ and (folder := _cache()) is not None:
    wanted['jax_compilation_cache_dir'] = folder
  for name, value in wanted.items():
    if name.upper() not in os.environ:
      os.environ[name.upper()] = str(value)
      if jax is not None:  # it has read its environment already
        jax.config.update(name, value)


def keep_memory():
  """Lets glibc keep freed memory rather than give large blocks back to the system, on Linux.

  XLA on CPU asks for a step's temporary arrays anew each step; new pages cost a sixth of its time
  (benchmarks/train_step.py). Settings of the environment (MALLOC_..., GLIBC_TUNABLES) stand.
  """
  if sys.platform != 'linux' or any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for name in os.environ):
    return
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except AttributeError:  # another C library, such as musl
    return
  for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
    mallopt(option, value)


def _cache() -> str | None:
  """A folder for compiled programs, or None if none can be written. One a processor: a program that was
  compiled for the instructions of another may crash."""
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  root = os.path.expanduser(os.environ.get('LMLIB_CACHE') or os.path.join(home, 'lmlib'))
  try:
    cpu = re.search(r'^(flags|Features).*', pathlib.Path('/proc/cpuinfo').read_text(), re.MULTILINE)[0]
  except (OSError, TypeError):
    cpu = platform.processor()
  name = f'{platform.machine()}-{hashlib.sha256(cpu.encode()).hexdigest()[:8]}'
  folder = os.path.join(root, 'jax', name)
  try:
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError:
    return None
  return folder


def _fault(error: BaseException, path: pathlib.Path) -> tuple[int, str | None]:
  """The status and the line that an exception ends the run with; without a line, a traceback."""
  line = ' '.join(str(error).split())
  if (status := getattr(error, 'exit_status', None)) is not None:
    return status, line
  if isinstance(error, KeyboardInterrupt):
    return 75, 'stopped before there was anything to save; run the same command again'
  if isinstance(error, OSError):
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return 1, ': '.join([*names, error.strerror or line or type(error).__name__])
  if isinstance(error, ValueError) and _ours(error, path):
    return 2, line
  return 1, None


def _ours(error, path) -> bool:
  """Whether lmlib, the experiments or a file of the user raised it, and not Python or a package."""
  *_, (frame, _) = traceback.walk_tb(error.__traceback__)
  file = pathlib.Path(frame.f_code.co_filename)
  if file.is_relative_to(pathlib.Path(__file__).parent) or file.is_relative_to(path.parent):
    return True
  installed = {'site-packages', 'dist-packages'} & set(file.parts)
  return file.is_file() and not installed and not file.is_relative_to(sysconfig.get_path('stdlib'))


def _flags(argv: list[str], path: pathlib.Path, of: tuple[str, ...] = ()) -> flags.FlagValues:
  """The parsed flags. ValueError for a flag or word that is none of ours, or if no file is given."""
  values = flags.FlagValues()
  flags.DEFINE_multi_string('gin_file', [], 'a file of settings', flag_values=values)
  flags.DEFINE_multi_string('gin_bindings', [], 'a setting', flag_values=values)
  flags.DEFINE_boolean('help', False, 'show help', short_name='h', flag_values=values)
  try:
    words = values([path.name, *argv])[1:]
  except flags.UnrecognizedFlagError as error:
    meant = close(error.flagname, ['gin_file', 'gin_bindings', 'help'])
    raise ValueError(f"there is no flag --{error.flagname}{meant}; a setting is given as "
                     "--gin_bindings='STEPS = 50', and --help shows all") from None
  except flags.Error as error:
    raise ValueError(str(error)) from None
  if words:
    meant = f"--gin_bindings='{words[0]}'" if '=' in words[0] else f'--gin_file={words[0]}'
    raise ValueError(f'{words[0]!r} belongs to no flag; did you mean {meant}?')
  if not values.gin_file and not values.help:
    known = ', '.join(_leaves(of or (path.stem,))) or 'none'
    raise ValueError(f'--gin_file is missing; the files in {GIN_CONFIGS} for {path.stem} are: {known}')
  return values


def _help(path: pathlib.Path, of: tuple[str, ...]) -> str:
  leaves = _leaves(of)
  macros = sorted({macro for text in leaves.values() for macro in re.findall(r'%([A-Z]\w*)', text)})
  comment = lambda text: (re.match(r'#\s*(.*)', text) or ['', ''])[1]
  files = [f'  {name:<27} {comment(text)}'.rstrip() for name, text in leaves.items()]
  return '\n'.join([
      ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or path.stem, '',
      '  --gin_file=FILE             settings, from the current folder or gin_configs/; may be repeated',
      "  --gin_bindings='NAME = 1'   one setting, over those of the files; may be repeated",
      '  --help                      this text', '',
      f'Files in {GIN_CONFIGS}:', *files, '',
      f"Macros, for --gin_bindings='NAME = value': {', '.join(macros)}"])


def _leaves(of: tuple[str, ...]) -> dict[str, str]:
  """The files at the top of gin_configs/ that set up any of these experiments: name and text, includes included."""
  texts = {path.name: _with_includes(path, set()) for path in sorted(GIN_CONFIGS.glob('*.gin'))}
  return {name: text for name, text in texts.items() if re.search(rf'\b({"|".join(of)})\.main\b', text)}


def _with_includes(path, seen) -> str:
  if path in seen or not path.is_file():
    return ''
  seen.add(path)
  text = path.read_text(encoding='utf-8', errors='replace')
  names = re.findall(r'''^include\s+['"](.+?)['"]''', text, re.MULTILINE)
  return '\n'.join([text, *(_with_includes(GIN_CONFIGS / name, seen) for name in names)])


@dataclasses.dataclass(frozen=True)
class _Name:
  """`@name` or `@name()` as written; looked up once its statement is read, when faults have a line."""
  name: str
  called: bool


class _Delegate(config_parser.ParserDelegate):

  def configurable_reference(self, scoped_configurable_name, evaluate):
    return _Name(scoped_configurable_name, evaluate)

  def macro(self, macro_name):
    return Macro(macro_name)


class _Reader:
  """Reads gin text statement by statement into `settings`."""

  def __init__(self):
    self.settings = gin_text.Settings()
    self.imports = {}  # of all files: name -> module, or None where files differ
    self._open = []

  def file(self, name: str, where: str):
    path = _find(name, where)
    if path in self._open:
      raise ValueError(f'{where}: {name} includes itself')
    if self._open and path.parent == GIN_CONFIGS:
      raise ValueError(f'{where}: {name} is a whole configuration and cannot be included; '
                       f'give both, --gin_file={name} first')
    try:
      text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(f'{where}: cannot read {path}: {getattr(error, "strerror", None) or error}') from None
    self._open.append(path)
    self.text(text, name, None)
    self._open.pop()

  def text(self, text: str, origin: str, imports: dict | None):
    """imports: the names that are known already; None for a file, which must import what it names."""
    dynamic, imports = imports is not None, {} if imports is None else imports
    for statement in _statements(text, origin):
      where = f'{origin}:{statement.location.line_num}' if origin.endswith('.gin') else origin
      if isinstance(statement, config_parser.IncludeStatement):
        self.file(statement.filename, where)
      elif isinstance(statement, config_parser.ImportStatement):
        if statement.module == '__gin__.dynamic_registration':
          dynamic = True
          continue
        if not dynamic:
          raise ValueError(f'{where}: begin the file with `from __gin__ import dynamic_registration`')
        name, module = statement.bound_name(), _module(statement, where)
        imports[name] = module
        self.imports[name] = module if self.imports.get(name, module) is module else None
      elif isinstance(statement, config_parser.BlockDeclaration):
        _target(statement.selector, imports, where)
      elif not statement.arg_name:
        name = f'{statement.scope}/{statement.selector}'.lstrip('/')
        self.settings.bind_macro(name, Bound(_value(statement.value, imports, where), where))
      else:
        self.settings.bind(statement.scope, _target(statement.selector, imports, where), statement.arg_name,
                           Bound(_value(statement.value, imports, where), where))


def _statements(text, origin):
  """Gin's own statements, faults of syntax as ValueError."""
  try:
    yield from config_parser.ConfigParser(text, _Delegate())
  except (SyntaxError, tokenize.TokenError) as error:
    message = error.args[0]
    line = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
    lines = text.splitlines() or ['']
    shown = lines[min(line or 1, len(lines)) - 1].strip()
    if 'Failed to parse token' in message or 'Unable to parse value' in message:
      message = 'text needs quotes (WORKDIR = "runs/a"), an object @ and (), a macro %'
    elif "':' or '='" in message or 'Unexpected token' in message:
      message = 'expected NAME = value'
    place = f'{origin}:{line}' if origin.endswith('.gin') else origin
    raise ValueError(f'{place}: cannot read {shown!r}: {message}') from None


def _find(name: str, where: str) -> pathlib.Path:
  for path in (pathlib.Path(name), GIN_CONFIGS / name):
    if path.is_file():
      return path.resolve()
  known = [path.relative_to(GIN_CONFIGS).as_posix() for path in GIN_CONFIGS.rglob('*.gin')]
  known += [path.name for path in pathlib.Path().glob('*.gin')]
  raise ValueError(f'{where}: there is no file {name!r} in {pathlib.Path.cwd()} or {GIN_CONFIGS}'
                   f'{close(name, known)}')


def _module(statement, where):
  try:
    module = importlib.import_module(statement.module)
  except ModuleNotFoundError as error:
    package, _, last = statement.module.rpartition('.')
    if error.name == statement.module and package in sys.modules:
      names = [info.name for info in pkgutil.iter_modules(getattr(sys.modules[package], '__path__', ()))]
      raise ValueError(f'{where}: {package} has no module "{last}"{close(last, names)}') from None
    raise ValueError(f'{where}: cannot import {statement.module}: {error}') from None
  return module if statement.is_from or statement.alias else sys.modules[statement.bound_name()]


def _target(selector: str, imports: dict, where: str):
  """The class or function that a dotted name means among the imports of its file."""
  first, *rest = selector.split('.')
  if imports.get(first) is None:
    why = 'means two modules' if first in imports else 'is not imported'
    advice = close(first, imports) or f'; import it first, as in `from lmlib.models import {first}`'
    raise ValueError(f'{where}: in {selector}, "{first}" {why}{advice}')
  found = imports[first]
  for i, name in enumerate(rest):
    names = [n for n, value in vars(found).items() if callable(value) and not n.startswith('_')]
    if not hasattr(found, name):
      raise ValueError(f'{where}: {".".join([first, *rest[:i]])} has no "{name}"{close(name, names)}')
    found = getattr(found, name)
  if isinstance(found, types.ModuleType) or not callable(found):
    raise ValueError(f'{where}: {selector} is no class or function, but a {type(found).__name__}')
  return found


def _value(value, imports, where):
  """A parsed value with its names looked up; a list becomes a tuple, since configs are hashable."""
  if isinstance(value, (tuple, list)):
    return tuple(_value(item, imports, where) for item in value)
  if isinstance(value, dict):
    raise ValueError(f'{where}: {value} is a dictionary; write a tuple of pairs')
  if isinstance(value, _Name):
    if not value.called:
      raise ValueError(f'{where}: @{value.name} lacks its (): settings are values, not classes or functions')
    scope, _, name = value.name.rpartition('/')
    return Object(_target(name, imports, where), scope)
  return value
