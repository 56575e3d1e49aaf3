"""One run in several processes: how they are found, what they agree on, and how they end.

begin() is the one door, before anything touches a device. Who takes part is read from the environment:

  LMLIB_COORDINATOR, LMLIB_PROCESSES, LMLIB_PROCESS   host:port of process 0, how many there are, which one this is;
                                                      in a Kubernetes Job JOB_COMPLETION_INDEX is the last (of several
                                                      jobs of a JobSet, with JOB_INDEX and LMLIB_JOB_PROCESSES)
  a step of Slurm (srun) with several tasks
  a TPU, of which jax knows the other hosts

and where none of these says several, there is one process and nothing waits. Only process 0 writes and says things.
LMLIB_TIMEOUT (300): seconds that processes wait for each other to come. LMLIB_HEARTBEAT (10): seconds without a sign
after which a process counts as dead.
"""
from collections.abc import Mapping
import contextlib
import hashlib
import math
import os
import pathlib
import platform
import re
import sys
import threading
import time
from typing import Any

from lmlib import wire

NAMES = wire.Call('', 0, 0).names
SLURM = ('SLURM_STEP_NODELIST', 'SLURM_STEP_NUM_TASKS', 'SLURM_PROCID')
GRACE = 1.0  # seconds that process 0 has to find the fault itself which another process found
CAUSE = 15.0  # seconds to hear why a connection between devices broke
# What is said when another process is gone, by whoever passes it on and by jax itself; the reason comes over the wire.
PASSED_ON = ('gloo', 'heartbeat', 'coordination', 'barrier')
OF_JAX = (*PASSED_ON, 'connection', 'socket', 'unavailable', 'peer')

_wire: wire.Wire | None = None


def first() -> bool:
  """Whether this is process 0, or the only one."""
  return _wire is None or _wire.process == 0


def number() -> int:
  return 0 if _wire is None else _wire.process


def count() -> int:
  return 1 if _wire is None else _wire.processes


def gathered(label: str, value: Any = None) -> list:
  """What each process gives, JSON values, in all of them. All call it, in the same order and with the same label."""
  return [value] if _wire is None else _wire.gathered(label, value)


def told(label: str, make) -> Any:
  """What make() gives in process 0, where alone it is called: a JSON value, known to all."""
  return gathered(label, make() if first() else None)[0]


def same(label: str, value: Any):
  """ValueError, naming two processes and their values, unless all give the same."""
  for number, other in enumerate(values := gathered(label, value)):
    if other != values[0]:
      raise ValueError(f'{label} is {values[0]} in process 0 and {other} in process {number}: all must have the same')


@contextlib.contextmanager
def in_turn(label: str):
  """Inside, process 0 goes first and all others after it: they find what it has made, or make their own."""
  if not first():
    gathered(label)
  yield
  if first():
    gathered(label)


def stop(why: str | None) -> str | None:
  """Called by all once a step: why all stop behind this step, None to go on. why: this process is to stop."""
  return why if _wire is None else _wire.stop(why)


def fail(error: BaseException, line: str, status: int, *, shown: bool):
  """Ends all processes, if there are others; the first fault of all is the last line of process 0.

  shown: whether `line` stands on the screen already, below a traceback.
  """
  if _wire is None:
    return
  if not consequence(error):
    if _wire.fail(line, status).process == _wire.process or first():
      _leave(line if not shown and (first() or status == 1) else None, status)
  else:
    for _ in range(int(CAUSE / 0.1)):
      if _wire.fault is not None:
        break
      time.sleep(0.1)
  _ended(_wire.fault or _wire.fail(line, status))


def consequence(error: BaseException | None) -> bool:
  """Whether an error may only say that another process has ended."""
  while error is not None:
    words = OF_JAX if type(error).__name__ in ('JaxRuntimeError', 'XlaRuntimeError') else PASSED_ON
    if isinstance(error, wire.Ended) or any(word in str(error).lower() for word in words):
      return True
    error = error.__cause__
  return False


def end():
  """All have done what there was to do: waits for the others, and lets jax go."""
  if _wire is not None:
    import jax
    _wire.goodbye()
    jax.distributed.shutdown()


def begin(facts: Mapping[str, Any] = {}, environ: Mapping[str, str] = os.environ):
  """Joins the other processes that the environment speaks of; returns at once if it speaks of none.

  facts: names and JSON values that must be the same in all, beside the code and the versions. ValueError, in one
  line, for what differs or is missing, within LMLIB_TIMEOUT.
  """
  global _wire
  assert _wire is None, 'begun before'
  call = found(environ)
  if call is None:
    return
  timeout, heartbeat = seconds(environ, 'LMLIB_TIMEOUT', 300), seconds(environ, 'LMLIB_HEARTBEAT', 10)
  import jax  # here: what runs in one process need not load it
  jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM away from the loop
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  facts = {'code of lmlib': code(), 'jax': jax.__version__, 'Python': platform.python_version()} | dict(facts)
  start = lambda **how: jax.distributed.initialize(
      **how, initialization_timeout=math.ceil(timeout), heartbeat_timeout_seconds=math.ceil(heartbeat))
  if call == 'tpu':
    start()
    if jax.process_count() == 1:
      return
    call = _of_tpu(jax)
    lines, _ = wire.met(call, facts, timeout, lambda: None)
  else:
    lines, port = wire.met(call, facts, timeout, wire.free_port)
    host, _ = call.place
    start(coordinator_address=f'[{host}]:{port}' if ':' in host else f'{host}:{port}',
          num_processes=call.processes, process_id=call.process)
  _wire = wire.Wire(call.process, call.processes, lines, _ended)
  _speak(call.process == 0)


def found(environ: Mapping[str, str], devices: str = '/sys/bus/pci/devices') -> wire.Call | str | None:
  """The processes that the environment speaks of: a Call, 'tpu' where jax knows them, None for one process.

  ValueError for variables that do not fit each other.
  """
  if given := [name for name in NAMES if environ.get(name)]:
    return _explicit(environ, given)
  tasks = environ.get(SLURM[1], '1')
  if environ.get('SLURM_JOB_ID') and tasks.isdecimal() and int(tasks) > 1:
    if missing := [name for name in SLURM if name not in environ]:
      raise ValueError(f'{SLURM[1]}={tasks}, but {missing[0]} is not set: start the command by srun')
    port = 61440 + int(environ['SLURM_JOB_ID']) % 4096
    return _call(f'{first_host(environ[SLURM[0]])}:{port}', tasks, environ[SLURM[2]], SLURM)
  asked = environ.get('JAX_PLATFORMS', '')
  if (not asked or 'tpu' in asked) and (environ.get('MEGASCALE_COORDINATOR_ADDRESS') or ',' in environ.get(
      'TPU_WORKER_HOSTNAMES', '') or _has_tpu(pathlib.Path(devices))):
    return 'tpu'
  return None


def first_host(nodes: str) -> str:
  """The first of a list of Slurm's: 'tpu[007-009,12],cpu1' -> 'tpu007'."""
  name, _, numbers = re.match(r'([^\[,]+)(\[([^\]]+)\])?', nodes).groups()
  return name + re.split(r'[,-]', numbers)[0] if numbers else name


def seconds(environ: Mapping[str, str], name: str, default: float) -> float:
  """A setting of the environment. ValueError if it is no number of at least 1."""
  try:
    value = float(environ.get(name) or default)
  except ValueError:
    value = 0.0
  if not 1 <= value < math.inf:
    raise ValueError(f'{name}={environ[name]!r} must be a number of seconds, at least 1, such as {default}')
  return value


def code() -> str:
  """A hash of the library's and the experiments' source."""
  root, digest = pathlib.Path(__file__).parent, hashlib.sha256()
  for path in sorted([*root.rglob('*.py'), *(root.parent / 'experiments').glob('*.py')]):
    digest.update(f'{path.relative_to(root.parent)}\n'.encode() + path.read_bytes())
  return digest.hexdigest()[:12]


def _speak(first: bool):
  """Only Python speaks on stdout, and only in process 0; gloo would tell of every connection."""
  silent = open(os.devnull, 'w')
  if not first:
    sys.stdout = silent
  elif sys.stdout is sys.__stdout__:
    sys.stdout.flush()
    sys.stdout = open(os.dup(1), 'w', buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)
  with contextlib.suppress(OSError):
    os.dup2(silent.fileno(), 1)


def _explicit(environ: Mapping[str, str], given: list[str]) -> wire.Call:
  process, names = environ.get(NAMES[2]), NAMES
  if process is None and 'JOB_COMPLETION_INDEX' in environ:
    names = (*NAMES[:2], 'JOB_COMPLETION_INDEX')
    process = environ['JOB_COMPLETION_INDEX']
    if 'JOB_INDEX' in environ and (each := environ.get('LMLIB_JOB_PROCESSES')):
      process = str(int(environ['JOB_INDEX']) * int(each) + int(process))
  if missing := [name for name in NAMES if not environ.get(name) and not (name == NAMES[2] and process)]:
    raise ValueError(f'{given[0]}={environ[given[0]]!r} is set, but {" and ".join(missing)} not: several processes '
                     'need all three, one process none of them')
  return _call(environ[NAMES[0]], environ[NAMES[1]], process, names)


def _call(address: str, processes: str, process: str, names) -> wire.Call | None:
  for name, value, least in ((names[1], processes, 1), (names[2], process, 0)):
    if not value.isdecimal() or int(value) < least:
      raise ValueError(f'{name}={value!r} must be a number from {least} on')
  if int(process) >= int(processes):
    raise ValueError(f'{names[2]}={process} must lie between 0 and {int(processes) - 1}, as {names[1]}={processes}')
  call = wire.Call(address, int(processes), int(process), names)
  _ = call.place
  return call if call.processes > 1 else None


def _has_tpu(devices: pathlib.Path) -> bool:
  """Whether a PCI device is Google's and neither a disk nor a network card."""
  for vendor in devices.glob('*/vendor'):
    with contextlib.suppress(OSError):
      if vendor.read_text().strip() == '0x1ae0' and (
          vendor.with_name('class').read_text()[:4] not in ('0x01', '0x02')):
        return True
  return False


def _of_tpu(jax) -> wire.Call:
  """Where process 0 listens, told over the devices."""
  import socket

  from jax.experimental import multihost_utils
  import numpy as np
  place = np.zeros(256, np.uint8)
  said = f'{socket.gethostbyname(socket.gethostname())}:{wire.free_port()}'.encode()
  place[:len(said)] = np.frombuffer(said, np.uint8)
  place = bytes(np.asarray(multihost_utils.broadcast_one_to_all(place))).rstrip(b'\0').decode()
  return wire.Call(place, jax.process_count(), jax.process_index(), ('the address of process 0', 'jax.process_count()',
                                                                     'jax.process_index()'))


def _ended(fault: wire.Fault):
  """Ends this process because of another one; the main thread may be waiting for that one somewhere in C++."""
  if first():
    time.sleep(GRACE)
  dead = fault.line.startswith(f'process {fault.process} of')
  line = fault.line if dead or fault.process == _wire.process else f'process {fault.process}: {fault.line}'
  _leave(line if first() or (dead and fault.process == 0) else None, fault.status)


def _leave(line: str | None, status: int):
  """Ends the process without waiting for anyone: neither jax nor a thread that writes may hold it."""
  with _leaving:
    if line is not None:
      with contextlib.suppress(Exception):
        sys.stdout.flush()
      with contextlib.suppress(Exception):
        print(line, file=sys.stderr, flush=True)
    os._exit(status)


_leaving = threading.Lock()
