"""Which devices of a compiled program talk to which: its collectives by kind and mesh axis, how often, how many bytes.

Read from the text of a program for TPUs, GPUs or CPUs. A loop counts as often as it runs: by what the text says of it,
or by the bound in its condition (XLA for TPUs says no more). Bytes are those that a device sends where n of them go
round a ring: of a whole of S bytes (n - 1) / n S for a gather, a reduction to parts or an exchange, twice that for a
reduction to all, S for a permutation. XLA for TPUs writes a reduce-scatter as an all-reduce in a fusion of its own,
and may turn a gather beside a product into a loop of permutations, which is what is counted then.
"""
from collections.abc import Iterator
import dataclasses
import math
import re

from jax.sharding import Mesh
import numpy as np

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute',
         'collective-broadcast')
BITS = {'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 's32': 32, 'u32': 32, 's64': 64, 'u64': 64,
        'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64, 'f8e4m3fn': 8, 'f8e5m2': 8, 'c64': 64}
ARRAY = re.compile(r'\b(' + '|'.join(BITS) + r')\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind along one mesh axis ('data+fsdp': along both), in a step of one device."""
  kind: str
  axis: str
  dtype: str
  places: int  # in the text
  count: int  # as often as loops run
  sent: int  # bytes


@dataclasses.dataclass(frozen=True)
class Found:
  """The collectives of a program, the largest first, and how many of its loops run nobody knows how often."""
  collectives: tuple[Collective, ...]
  unknown_loops: int

  def sent(self, *, kind: str | None = None, axis: str | None = None, dtype: str | None = None) -> int:
    """Bytes that a device sends in all collectives of a kind, axis and type; None: of all."""
    wanted = {'kind': kind, 'axis': axis, 'dtype': dtype}
    return sum(found.sent for found in self.collectives
               if all(value in (None, getattr(found, name)) for name, value in wanted.items()))

  def by_axis(self) -> str:
    """'fsdp 12.3 MB, data 1.1 MB', what a device sends in all; 'none'."""
    sums: dict[str, int] = {}
    for found in self.collectives:
      sums[found.axis] = sums.get(found.axis, 0) + found.sent
    largest_first = sorted(sums.items(), key=lambda of: -of[1])
    return ', '.join(f'{axis} {sent / 1e6:,.1f} MB' for axis, sent in largest_first) or 'none'

  def __str__(self):
    rows = [f'{found.kind:<20} {found.axis:<14} {found.dtype:<5} {found.places:>6} {found.count:>8,} '
            f'{found.sent / 1e6:>12,.2f}' for found in self.collectives]
    more = [f'{self.unknown_loops} loops of unknown length count once'] if self.unknown_loops else []
    head = f'{"kind":<20} {"axis":<14} {"type":<5} {"places":>6} {"count":>8} {"MB sent":>12}'
    return '\n'.join([head, *rows, *more])


def collectives(text: str, mesh: Mesh) -> Found:
  """What a program compiled over `mesh` communicates, from its text (jax.stages.Compiled.as_text())."""
  each, unknown = apart(text, mesh)
  sums = {}
  for one in each:
    key = one.kind, one.axis, one.dtype
    places, count, sent = sums.get(key, (0, 0, 0))
    sums[key] = places + one.places, count + one.count, sent + one.sent
  found = [Collective(*key, *values) for key, values in sums.items() if values[2]]
  return Found(tuple(sorted(found, key=lambda c: -c.sent)), unknown)


def apart(text: str, mesh: Mesh) -> tuple[list[Collective], int]:
  """(every collective of a program's text by itself, how many loops run nobody knows how often)."""
  computations, entry = _computations(text)
  found, unknown = [], 0
  for kind, instruction, times, known in _walked(computations, entry, 1):
    if kind == 'while':
      unknown += not known
      continue
    groups = _groups(instruction, mesh.size)
    for dtype, size in _whole(kind, instruction, groups).items():
      found.append(Collective(kind, _axis(groups, mesh, kind), dtype, 1, times, times * _sent(kind, size, groups)))
  return found, unknown


@dataclasses.dataclass(frozen=True)
class _Instruction:
  shape: str
  code: str
  rest: str  # operands and attributes

  def calls(self, key: str) -> list[str]:
    found = re.search(rf'\b{key}=\{{?((?:%?[\w.\-]+(?:, ?)?)+)', self.rest)
    return [name.strip().lstrip('%') for name in found[1].split(',') if name.strip()] if found else []


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Instructions by the name of their computation, and the name of the first that runs.

  Only a line that begins an instruction or a computation counts: what kernels say of themselves has lines of its own.
  """
  found, entry, here = {}, None, None
  for line in text.splitlines():
    if head := re.match(r'(ENTRY )?%?([\w.\-]+) \(.*->.*\{$', line):
      here = found.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif here is not None and (body := re.match(r'\s+(?:ROOT )?%?[\w.\-]+ = (.*)', line)):
      shape, rest = _cut(body[1])
      if code := re.match(r' ?([a-z][\w\-]*)\(', rest):
        here.append(_Instruction(shape, code[1], rest))
  return found, entry


def _cut(text: str) -> tuple[str, str]:
  """The shape that an instruction begins with, perhaps a tuple in parentheses, and the rest."""
  depth = 0
  for i, character in enumerate(text):
    depth += (character in '([{') - (character in ')]}')
    if not depth and character == ' ':
      return text[:i], text[i:]
  return text, ''


def _walked(computations, name: str, times: int) -> Iterator[tuple[str, _Instruction, int, bool]]:
  """(kind, instruction, how often it runs, known) of every collective, and of every loop as the kind 'while'."""
  for one in computations.get(name, ()):
    kind = one.code.removesuffix('-start')
    if kind in KINDS:
      scattered = kind == 'all-reduce' and 'all-reduce-scatter' in name
      yield 'reduce-scatter' if scattered else kind, one, times, True
    elif one.code == 'while':
      trips = _trips(computations, one)
      yield 'while', one, times, trips is not None
      yield from _walked(computations, one.calls('body')[0], times * (trips or 1))
    elif one.code in ('fusion', 'call', 'async-start', 'conditional'):
      for key in ('calls', 'to_apply', 'branch_computations', 'true_computation', 'false_computation'):
        for called in one.calls(key):
          yield from _walked(computations, called, times)


def _trips(computations, loop: _Instruction) -> int | None:
  """How often a loop runs; None if nobody says."""
  if said := re.search(r'known_trip_count["\\]*:\s*\{["\\]*n["\\]*:["\\]*(\d+)', loop.rest):
    return int(said[1])
  inside = list(computations.get(loop.calls('condition')[0], ()))
  for one in inside:
    inside += [other for called in one.calls('calls') for other in computations.get(called, ())]
  bounds = [int(number[1]) for one in inside if one.code == 'constant' and one.shape.startswith(('s32[]', 'u32[]'))
            and (number := re.match(r' ?constant\((\d+)\)', one.rest))]
  less = any('direction=LT' in one.rest for one in inside)
  return bounds[0] if less and len(bounds) == 1 else None


def _whole(kind: str, one: _Instruction, groups: np.ndarray) -> dict[str, int]:
  """Bytes of the whole array of a collective, by type: what a gather makes and a reduction to parts takes."""
  found = [(dtype, math.prod(int(n) for n in dims.split(',') if n) * BITS[dtype] // 8)
           for dtype, dims in ARRAY.findall(one.shape)]
  if one.code in ('all-gather-start', 'collective-permute-start', 'reduce-scatter-start'):  # operands, results, more
    found = [array for array in found if array[1] > 4] or found
    found = found[:len(found) // 2] if kind == 'reduce-scatter' else found[len(found) // 2:]
  elif kind == 'reduce-scatter' and one.code == kind:
    found = [(dtype, size * groups.shape[1]) for dtype, size in found]
  sizes = {}
  for dtype, size in found:
    sizes[dtype] = sizes.get(dtype, 0) + size
  return sizes


def _sent(kind: str, size: int, groups: np.ndarray) -> int:
  if kind in ('collective-permute', 'collective-broadcast'):
    return size
  n = groups.shape[1]
  return size * (n - 1) * (2 if kind == 'all-reduce' else 1) // n


def _groups(one: _Instruction, devices: int) -> np.ndarray:
  """Who talks to whom: a group of devices, by their number in the mesh, a row; of a permutation, pairs."""
  if pairs := re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', one.rest):
    return np.array(re.findall(r'\{(\d+),(\d+)\}', pairs[1]), int).reshape(-1, 2)
  if listed := re.search(r'replica_groups=\{((?:\{[\d,]+\},?)+)\}', one.rest):
    return np.array([row.split(',') for row in re.findall(r'\{([\d,]+)\}', listed[1])], int)
  if counted := re.search(r'replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)', one.rest):
    return _iota(counted[2]).reshape(_numbers(counted[1]))
  if named := re.search(r'replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\((.*?\)?)\))? ?\{([^}]*)\}', one.rest):
    return _of_mesh(*named.groups())
  return np.arange(devices)[None]


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in re.findall(r'\d+', text))


def _iota(text: str) -> np.ndarray:
  """Devices in the order that '[2,4]T(1,0)' says."""
  dims, _, turned = text.partition('T')
  ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
  return ids.transpose(_numbers(turned)) if turned else ids


def _of_mesh(axes: str, order: str | None, named: str) -> np.ndarray:
  """Groups along axes of a mesh of XLA's own; of an axis, as 'x':(2)4 says, perhaps a part."""
  names, sizes = re.findall(r"'([^']+)'", axes), [int(n) for n in re.findall(r"'=(\d+)", axes)]
  ids = np.arange(math.prod(sizes)) if order is None else (
      _iota(order) if order.startswith('[') else np.array(_numbers(order)))
  inside, dims = [], list(sizes)
  cut = {name: (int(before), int(size)) for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", named)}
  whole = set(re.findall(r"'([^']+)'", named))
  dims = []
  for name, size in zip(names, sizes):
    before, mine = cut.get(name, (1, size if name in whole else 1))
    parts = (before, mine, size // before // mine)
    inside.append(len(dims) + 1)
    dims += parts
  outside = [i for i in range(len(dims)) if i not in inside]
  together = math.prod(dims[i] for i in inside)
  return ids.reshape(dims).transpose(outside + inside).reshape(-1, together)


def _axis(groups: np.ndarray, mesh: Mesh, kind: str) -> str:
  """The mesh axes along which devices of a group differ, such as 'fsdp' or 'data+fsdp'."""
  places = np.stack(np.unravel_index(groups, mesh.devices.shape))
  varies = (places != places[:, :, :1]).any(axis=(1, 2))
  names = [name for name, varying in zip(mesh.axis_names, varies) if varying]
  if kind != 'collective-permute' and groups.shape[1] < math.prod(mesh.shape[name] for name in names):
    return f'part of {"+".join(names)}'
  return '+'.join(names) or 'none'
