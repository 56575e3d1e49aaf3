"""What gin text means as values, and the gin text that says a set of values. Does not import gin.

Gin itself only parses (in cli.py). Its registry and wrappers stay unused: values come from plain
calls, nothing is global, and a fault names its file and line. The meaning is gin's (the last binding
wins, an object inherits the scope it is made in, a macro is evaluated in the scope of its own name),
made narrower: an object is always called, a list becomes a tuple, and what nothing reads is an error.
"""
from collections.abc import Callable
import dataclasses
import difflib
import inspect
import math
import os
import types
from typing import Any, Union, get_args, get_origin, get_type_hints


@dataclasses.dataclass(frozen=True)
class Macro:
  """`%name`."""
  name: str


@dataclasses.dataclass(frozen=True)
class Object:
  """`@scope/target()`: what a call of the target gives."""
  target: Callable
  scope: str = ''


@dataclasses.dataclass(frozen=True)
class Bound:
  """What a name is bound to, Macro and Object inside tuples included, and the place that says so."""
  value: Any
  where: str


REQUIRED = Macro('gin.REQUIRED')


class Settings:
  """The bindings of gin files and of the command line, and the values they stand for."""

  def __init__(self):
    self._bound = {}  # (scope, target, field) -> Bound; a macro is (name, None, '')
    self._read = set()
    self._open = []  # what is being made, to notice that something needs itself

  def bind_macro(self, name: str, bound: Bound):
    self._bound[name, None, ''] = bound

  def bind(self, scope: str, target: Callable, field: str, bound: Bound):
    """Sets one field of a class, or argument of a function. ValueError if there is none of that name."""
    fields = _parameters(target)
    if field not in fields:
      kind = 'field' if inspect.isclass(target) else 'argument'
      raise ValueError(f'{bound.where}: {label(target)} has no {kind} "{field}"{close(field, fields)}; '
                       f'it has: {", ".join(fields) or "none"}')
    self._bound[scope, target, field] = bound

  def binds(self, main: Callable) -> bool:
    """Whether any argument of main() is bound."""
    return any(target is main for _, target, _ in self._bound)

  def arguments(self, main: Callable) -> dict[str, Any]:
    """The arguments bound for main(). ValueError for one that is missing or of the wrong type, and for a
    binding that nothing reads."""
    values = self._fields(main, '', 'the gin files')
    unread = []
    for scope, target, *field in self._bound.keys() - self._read:
      macro, where = target is None, self._bound[scope, target, *field].where
      name = scope if macro else _scoped(scope, target, *field)
      unread.append(f'{name} ({where}){close(scope, self._macros(read=True)) if macro else ""}')
    if unread:
      raise ValueError(f'bound, but read by nothing that {label(main)} uses: {", ".join(sorted(unread))}')
    return values

  def model(self) -> Any:
    """The model that the files are about, whatever else they set: the macro MODEL, or what a main() is given.

    ValueError if they are about none.
    """
    for (scope, target, field), bound in self._bound.items():
      if (scope, target) == ('MODEL', None) or (field == 'model' and getattr(target, '__name__', '') == 'main'):
        return self._value(bound, 'MODEL' if target is None else '', 'model', Any)
    raise ValueError('no MODEL is set')

  def _macros(self, *, read: bool) -> list[str]:
    """The names of the macros that something has read, or of those that nothing has."""
    return [key[0] for key in self._bound if key[1] is None and (key in self._read) == read]

  def _fields(self, target, scope, where) -> dict[str, Any]:
    """The arguments of a call of target: those bound for the scope or one around it, innermost last."""
    parts = scope.split('/') if scope else []
    scopes = ['/'.join(parts[:i]) for i in range(len(parts) + 1)]
    hints, values = _hints(target), {}
    for name, parameter in _parameters(target).items():
      keys = [(s, target, name) for s in scopes if (s, target, name) in self._bound]
      self._read.update(keys)
      setting = f'{label(target)}.{name}'
      if keys:
        values[name] = self._value(self._bound[keys[-1]], scope, setting, hints.get(name, Any))
      elif parameter.default is parameter.empty:
        raise ValueError(f'{where}: {setting} is needed and not set; '
                         f'set it in a gin file or with {example(setting, hints.get(name))}')
    return values

  def _value(self, bound: Bound, scope: str, setting: str, hint) -> Any:
    """The value of a binding that fills `setting`, which must fit the annotation `hint`."""
    value = bound.value
    if value == REQUIRED:
      other = nearest(setting, self._macros(read=False))
      but = f' (but {other} is)' if other else ''
      raise ValueError(f'{setting} is required and not set{but}: set it after {bound.where} in a gin file, '
                       f'or with {example(setting, hint)}')
    if isinstance(value, Macro):
      key = (value.name, None, '')
      if key not in self._bound:
        names = self._macros(read=True) + self._macros(read=False)
        raise ValueError(f'{bound.where}: the macro %{value.name} is not defined{close(value.name, names)}; '
                         f'set it in a gin file or with {example(value.name, hint)}')
      self._read.add(key)
      return self._once(f'%{value.name}', bound,
                        lambda: self._value(self._bound[key], value.name, value.name, hint))
    value = self._made(value, bound, scope)
    if not _fits(value, hint):
      raise ValueError(f'{setting}={value!r} ({bound.where}) must be of type {_words(hint)}')
    return value

  def _made(self, value, bound: Bound, scope: str):
    if isinstance(value, tuple):
      return tuple(self._made(item, bound, scope) for item in value)
    if isinstance(value, Macro):  # inside a tuple
      return self._value(dataclasses.replace(bound, value=value), scope, value.name, Any)
    if not isinstance(value, Object):
      return value
    target, scope = value.target, value.scope or scope
    fields = self._once(f'@{_scoped(scope, target)}()', bound,
                        lambda: self._fields(target, scope, bound.where))
    try:
      return target(**fields)
    except (ValueError, TypeError) as error:  # a setting caused it, wherever it was raised
      said = str(error) if target.__name__ in str(error) else f'{label(target)}: {error}'
      raise ValueError(f'{said} (in scope {scope})' if value.scope else said) from error

  def _once(self, what: str, bound: Bound, make: Callable):
    if what in self._open:
      raise ValueError(f'{bound.where}: {what} needs itself')
    self._open.append(what)
    try:
      return make()
    finally:
      self._open.pop()


def label(target: Callable) -> str:
  """A class or function as gin files name it: dense.Config."""
  return f'{target.__module__.rpartition(".")[2]}.{target.__qualname__}'


def nearest(name: str, names) -> str | None:
  """The one of the names that resembles `name` most, in any case of letters; None if none does."""
  by_lower = {other.lower(): other for other in names}
  return next((by_lower[found] for found in difflib.get_close_matches(name.lower(), by_lower, 1)), None)


def close(name: str, names) -> str:
  """' (did you mean "width"?)' if one of the names resembles `name`, else nothing."""
  found = nearest(name, names)
  return f' (did you mean "{found}"?)' if found else ''


def example(setting: str, hint=None) -> str:
  """The flag that sets `setting`, with a value of the type that the annotation `hint` asks for."""
  values = {int: '1000', float: '0.1', str: '"..."', bool: 'True'}
  value = next((values[part] for part in (hint, *get_args(hint)) if part in values), '...')
  return f"--gin_bindings='{setting} = {value}'"


def _scoped(scope: str, target, *field: str) -> str:
  return f'{scope}{"/" if scope else ""}{".".join([label(target), *field])}'


def _parameters(target) -> dict[str, inspect.Parameter]:
  return {name: parameter for name, parameter in inspect.signature(target).parameters.items()
          if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)}


def _hints(target) -> dict[str, Any]:
  try:
    return get_type_hints(target.__init__ if inspect.isclass(target) else target)
  except (NameError, TypeError, AttributeError):  # an annotation in quotes that cannot be resolved
    return {}


def _words(hint) -> str:
  return hint.__name__ if isinstance(hint, type) else str(hint)


def _fits(value, hint) -> bool:
  """Whether a value is of an annotation made of int, float, str, bool, None and tuple; others pass."""
  if get_origin(hint) in (Union, types.UnionType):
    return any(_fits(value, part) for part in get_args(hint))
  if hint in (int, float):
    return isinstance(value, (int, hint)) and not isinstance(value, bool)
  if hint in (str, bool, tuple):
    return isinstance(value, hint)
  if hint in (None, type(None)):
    return value is None
  if get_origin(hint) is tuple:
    items = get_args(hint)
    every = len(items) == 2 and items[1] is Ellipsis
    return isinstance(value, tuple) and (not every or all(_fits(item, items[0]) for item in value))
  return True


def gin_text(main: Callable | str, values: dict[str, Any]) -> str:
  """Gin text from which cli.arguments(main, ...) makes `values` again, every field written out.

  main: the function, or its import path ('experiments.pretrain.main'). values: frozen dataclasses,
  tuples, numbers, text and None, in one another; lists come back as tuples and paths as text.
  Differing objects of one class get scopes, named after the argument they fill. ValueError names
  what cannot be written: a function, an array, NaN, a class that no file can import.
  """
  return _Writer(values).text(main)


def macro_text(values: dict[str, Any]) -> str:
  """Gin text that sets macros, {'MODEL': config}, every field written out; otherwise as gin_text."""
  return _Writer(values).text(None)


class _Writer:

  def __init__(self, values):
    self._values = values
    self._objects = {}  # class -> {key: (path of its first place, object)}
    self._modules = {}  # name in the file -> module
    for name, value in values.items():
      self._collect(value, name)
    self._scopes = {}  # (class, key) -> scope
    for cls, objects in self._objects.items():
      for key, (path, _) in objects.items():
        scope = path if len(objects) > 1 else ''
        while scope and scope in self._scopes.values():
          scope += '_'
        self._scopes[cls, key] = scope

  def text(self, main) -> str:
    """main: the function or its import path; None for macros."""
    if main is None:
      blocks = [''.join(f'{name} = {self._written(value)}\n' for name, value in self._values.items())]
    else:
      path = main if isinstance(main, str) else f'{main.__module__}.{main.__qualname__}'
      module, _, name = path.rpartition('.')
      blocks = [self._block(self._name(module, name), self._values)]
    for objects in self._objects.values():
      for _, value in objects.values():
        blocks.append(self._block(self._object(value), _init_fields(value)))
    modules = sorted((module, name) for name, module in self._modules.items())
    head = ['from __gin__ import dynamic_registration', *(_import(module, name) for module, name in modules)]
    return '\n'.join(['\n'.join(head) + '\n', *filter(None, blocks)])

  def _collect(self, value, path):
    """Notes the classes of objects, outer ones first, and refuses what cannot be written."""
    if isinstance(value, (tuple, list)):
      for i, item in enumerate(value):
        self._collect(item, f'{path}_{i}')
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
      cls = type(value)
      if cls.__module__ == '__main__' or '<locals>' in cls.__qualname__:
        raise ValueError(f'{path} is of the class {cls.__module__}.{cls.__qualname__}, which a gin file '
                         'cannot import; put the class at the top of a module')
      self._objects.setdefault(cls, {}).setdefault(_key(value), (path, value))
      for name, item in _init_fields(value).items():
        self._collect(item, f'{path}_{name}')
    elif _literal(value) is None:
      raise ValueError(f'{path}={value!r} cannot be written in a gin file: not a number, text, None, a tuple '
                       'or a dataclass')

  def _block(self, name: str, fields: dict) -> str:
    lines = [f'  {field} = {self._written(value)}\n' for field, value in fields.items()]
    return f'{name}:\n{"".join(lines)}' if lines else ''

  def _written(self, value) -> str:
    if isinstance(value, (tuple, list)):
      return f'({", ".join(map(self._written, value))}{"," if len(value) == 1 else ""})'
    return f'@{self._object(value)}()' if dataclasses.is_dataclass(value) else _literal(value)

  def _object(self, value) -> str:
    scope = self._scopes[type(value), _key(value)]
    return f'{scope}{"/" if scope else ""}{self._name(type(value).__module__, type(value).__qualname__)}'

  def _name(self, module: str, qualname: str) -> str:
    """How the file names something in a module, which it imports under the first free name."""
    name = module.rpartition('.')[2]
    while name == 'gin' or self._modules.setdefault(name, module) != module:
      name += '_'
    return f'{name}.{qualname}'


def _init_fields(value) -> dict[str, Any]:
  """The fields of a dataclass that its constructor takes."""
  return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}


def _import(module: str, name: str) -> str:
  package, _, last = module.rpartition('.')
  line = f'from {package} import {last}' if package else f'import {last}'
  return line if name == last else f'{line} as {name}'


def _key(value):
  """Equal for values that are written alike: 1, 1.0 and True differ, a list and a tuple do not."""
  if isinstance(value, (tuple, list)):
    return tuple(map(_key, value))
  if dataclasses.is_dataclass(value):
    return (type(value), *map(_key, _init_fields(value).values()))
  return _literal(value)


def _literal(value) -> str | None:
  """A number, text, bool or None as Python writes it; None for anything else, NaN among it."""
  if isinstance(value, os.PathLike):
    value = os.fspath(value)
  for kind in (bool, int, str, bytes):
    if isinstance(value, kind):
      return kind.__repr__(value)
  if isinstance(value, float) and not math.isnan(value):
    return float.__repr__(value).replace('inf', '1e999')  # read back as infinity
  return 'None' if value is None else None
