"""A line from process 0 of a run to every other one: who takes part, what all agree on, and why it ends.

Beside jax's own service, which says neither which setting differs between processes nor what went wrong in the one
that ended first. Messages are lines of JSON over TCP; a process that dies closes its line, so that all know at once.
"""
from collections.abc import Callable
import contextlib
import dataclasses
import json
import os
import queue
import selectors
import socket
import threading
import time
from typing import Any

LINGER = 2.0  # seconds in which process 0 still tells those who come late why there is no run
RETRY = 0.1  # seconds between two tries to reach process 0
# A host that is gone closes nothing: its line is dead after 5 + 3 * 3 seconds without an answer.
ALIVE = {'TCP_KEEPIDLE': 5, 'TCP_KEEPINTVL': 3, 'TCP_KEEPCNT': 3, 'TCP_USER_TIMEOUT': 14000}


@dataclasses.dataclass(frozen=True)
class Fault:
  """Why a run of several processes ends."""
  process: int
  line: str
  status: int


class Ended(RuntimeError):  # noqa: N818, what happened
  """Raised where a process waits for the others, once one of them has a fault."""

  def __init__(self, fault: Fault):
    super().__init__(fault.line)
    self.fault, self.exit_status = fault, fault.status


class Wire:
  """One of so many processes. `lines`: of process 0 the sockets to all others by number, of another {0: socket}.

  ended(fault) is called, in a thread of its own, for the first fault that another process has or that is found.
  """

  def __init__(self, process: int, processes: int, lines: dict[int, socket.socket], ended: Callable[[Fault], None]):
    self.process, self.processes = process, processes
    self._lines, self._ended = lines, ended
    self.fault: Fault | None = None
    self._left = set()  # who has said goodbye
    self._sending, self._state = threading.Lock(), threading.RLock()
    self._answers = queue.SimpleQueue()
    self._given = {}  # process 0: (label, value) of everyone who waits
    self._counting, self._count, self._until, self._why = threading.Lock(), 0, None, None
    self._counts = None  # process 0: how far everyone is, while it asks
    for line in lines.values():
      _keep_alive(line)
    threading.Thread(target=self._listen, name='wire', daemon=True).start()

  def gathered(self, label: str, value: Any = None) -> list:
    """What every process gives, JSON values by number. All call it in the same order with the same label."""
    with self._state:
      if self.fault is not None:
        raise Ended(self.fault)
    if self.process:
      self._send(0, {'at': label, 'value': value})
    else:
      self._give(0, label, json.loads(json.dumps(value)))
    answer = self._answers.get()
    if isinstance(answer, Fault):
      raise Ended(answer)
    return answer

  def stop(self, why: str | None) -> str | None:
    """Called by all once a step, at the same place: why all are to stop at this step, None to go on.

    why: this process is to stop. All stop at the same call, the next that none of them has passed.
    """
    with self._counting:  # held while process 0 asks how far everyone is
      self._count += 1
      if self._until is not None and self._count >= self._until:
        return self._why
      wanted = why is not None and self._why is None
      if wanted:
        self._why = why
    if wanted:
      if self.process:
        self._send(0, {'stop': f'{why} to process {self.process}'})
      else:
        threading.Thread(target=self._ask, args=[why], daemon=True).start()
    return None

  def fail(self, line: str, status: int) -> Fault:
    """Says why this process ends; returns the first fault, which is another one's if that came before."""
    fault = Fault(self.process, line, status)
    with self._state:
      if self.fault is not None:
        return self.fault
      self.fault = fault
    for process in self._lines:
      self._send(process, {'fault': dataclasses.astuple(fault)})
    return fault

  def goodbye(self):
    """All have done what there was to do; none is missed from here on."""
    self.gathered('goodbye')
    for process in self._lines:
      self._send(process, {'goodbye': True})

  def _send(self, process: int, message: dict):
    with contextlib.suppress(OSError), self._sending:  # a line that is dead is seen by the thread that listens
      self._lines[process].sendall(json.dumps(message).encode() + b'\n')

  def _listen(self):
    with selectors.DefaultSelector() as found:
      for process, line in self._lines.items():
        found.register(line, selectors.EVENT_READ, [process, b''])
      while found.get_map():
        for key, _ in found.select():
          try:
            data = key.fileobj.recv(1 << 16)
          except OSError:
            data = b''
          process, rest = key.data
          *lines, key.data[1] = (rest + data).split(b'\n')
          for line in lines:
            self._hear(process, json.loads(line))
          if not data:
            found.unregister(key.fileobj)
            if process not in self._left:
              self._end(Fault(process, f'process {process} of {self.processes} ended without a word (killed, out of '
                              'memory, or its machine is gone); run the same command to go on from the last '
                              'checkpoint', 1))

  def _hear(self, process: int, message: dict):
    match message:
      case {'at': label, 'value': value}:
        self._give(process, label, value)
      case {'all': values}:
        self._answers.put(values)
      case {'fault': found}:
        self._end(Fault(*found))
      case {'stop': why}:
        threading.Thread(target=self._ask, args=[why], daemon=True).start()
      case {'how far': _}:
        self._counting.acquire()
        self._send(0, {'count': self._count})
      case {'count': count}:
        self._counts.put(count)
      case {'until': until, 'why': why}:
        self._until, self._why = until, why
        self._counting.release()
      case {'goodbye': _}:
        self._left.add(process)

  def _give(self, process: int, label: str, value):
    """Of process 0: notes what one process gives, and answers once all have."""
    with self._state:
      self._given[process] = label, value
      if len(self._given) < self.processes:
        return
      given, self._given = self._given, {}
    labels = {number: label for number, (label, _) in given.items()}
    if other := [number for number in labels if labels[number] != labels[0]]:
      self._end(Fault(0, f'process 0 is at {labels[0]!r} and process {other[0]} at {labels[other[0]]!r}: they do '
                      'not do the same', 1))
      return
    values = [given[number][1] for number in range(self.processes)]
    for number in self._lines:
      self._send(number, {'all': values})
    self._answers.put(values)

  def _ask(self, why: str):
    """Of process 0: holds the count of everyone, and lets all go on up to the step after the furthest."""
    with self._state:
      if self._counts is not None:
        return  # asked before
      self._counts = queue.SimpleQueue()
    with self._counting:
      for process in self._lines:
        self._send(process, {'how far': True})
      self._until = max(self._count, *(self._counts.get() for _ in self._lines)) + 1
      self._why = why
      for process in self._lines:
        self._send(process, {'until': self._until, 'why': why})

  def _end(self, fault: Fault):
    """A fault of another process, or one that was found here."""
    with self._state:
      if self.fault is not None:
        return
      self.fault = fault
    if not self.process:
      for process in self._lines:
        self._send(process, {'fault': dataclasses.astuple(fault)})
    self._answers.put(fault)
    threading.Thread(target=self._ended, args=[fault], daemon=True).start()


def _keep_alive(line: socket.socket):
  line.settimeout(None)
  line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in ALIVE.items():
    if hasattr(socket, name):
      line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@dataclasses.dataclass(frozen=True)
class Call:
  """How processes find each other, and under which names the user has set it."""
  address: str  # of process 0, host:port
  processes: int
  process: int
  names: tuple[str, str, str] = ('LMLIB_COORDINATOR', 'LMLIB_PROCESSES', 'LMLIB_PROCESS')

  @property
  def said(self) -> str:
    return f'{self.names[0]}={self.address!r}'

  @property
  def place(self) -> tuple[str, int]:
    """Host and port. ValueError for another form."""
    host, _, port = self.address.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
      raise ValueError(f"{self.said} must be the host and port of process 0, such as 'host0:8476'")
    return host.strip('[]'), int(port)


def met(call: Call, facts: dict, timeout: float, answer: Callable[[], Any]) -> tuple[dict[int, socket.socket], Any]:
  """(lines, what process 0 answers), once all processes have come and have the same `facts`.

  ValueError, the same line in all that have come, names what differs and both values, or who has not come within
  `timeout` seconds. answer: gives the JSON value that process 0 tells all.
  """
  hello = {'process': call.process, 'processes': call.processes, 'host': socket.gethostname(), 'facts': facts}
  return _called(call, hello, timeout) if call.process else _listened(call, hello, timeout, answer)


def _listened(call: Call, hello: dict, timeout: float, answer) -> tuple[dict, Any]:
  deadline, here, lines = time.monotonic() + timeout, {0: hello}, []
  try:
    door = socket.create_server(('', call.place[1]))
  except OSError as error:
    raise ValueError(f'process 0 cannot listen on {call.said}: {os.strerror(error.errno)}; another process may have '
                     f'{call.names[2]}=0, or another run this port') from None
  fault, waiting = None, []  # (socket, what it has said so far)
  with door:
    while len(here) < call.processes and fault is None:
      if (left := deadline - time.monotonic()) <= 0:
        missing = ', '.join(str(i) for i in range(call.processes) if i not in here)
        fault = (f'{call.names[1]}={call.processes}, but of these processes {missing} did not come to {call.said} '
                 f'within {timeout:g} s')
        break
      for line, said in _spoken(door, waiting, min(left, 0.5)):
        lines.append(line)
        fault = fault or differs(call, here, said)
        if fault is None:
          here[said['process']] = said | {'line': line}
    if fault is None:
      for line, _ in waiting:  # strangers
        line.close()
      told = answer()
      for number, one in here.items():
        if number:
          one['line'].sendall(json.dumps({'welcome': told}).encode() + b'\n')
      return {number: one['line'] for number, one in sorted(here.items()) if number}, told
    _refuse(door, waiting, lines, fault)
  raise ValueError(fault)


def _refuse(door, waiting, lines, fault: str):
  """Tells those who have come, and those who still do."""
  refused = json.dumps({'refused': fault}).encode() + b'\n'
  end = time.monotonic() + LINGER
  while lines or time.monotonic() < end:
    for line in lines:
      with contextlib.suppress(OSError), line:
        line.sendall(refused)
    lines = [line for line, _ in _spoken(door, waiting, 0.2)]
  for line, _ in waiting:
    line.close()


def _spoken(door, waiting: list, timeout: float) -> list[tuple[socket.socket, dict]]:
  """(line, hello) of those who have said who they are by now; waits for news up to `timeout`."""
  with selectors.DefaultSelector() as found:
    for one in (door, *(line for line, _ in waiting)):
      found.register(one, selectors.EVENT_READ)
    ready = [key.fileobj for key, _ in found.select(timeout)]
  if door in ready:
    line, _ = door.accept()
    line.setblocking(False)
    waiting.append((line, bytearray()))
  done = []
  for line, said in list(waiting):
    if line in ready:
      try:
        said += (data := line.recv(1 << 20))
        hello = json.loads(said) if said.endswith(b'\n') else None
        if hello is not None and not {'process', 'processes', 'host', 'facts'} <= hello.keys():
          raise ValueError('a hello has more')
      except (OSError, ValueError, AttributeError):
        hello, data = None, b''
      if hello is not None:
        line.setblocking(True)
        done.append((line, hello))
      if hello is not None or not data:
        waiting.remove((line, said))
      if hello is None and not data:  # a stranger
        line.close()
  return done


def differs(call: Call, here: dict[int, dict], said: dict) -> str | None:
  """What is wrong with one more process, beside those that are here."""
  _, count, index = call.names
  number, mine = said['process'], here[0]
  if said['processes'] != mine['processes']:
    return (f'{count}={mine["processes"]} in process 0 and {count}={said["processes"]} in process {number}: '
            'all must have the same')
  if number in here:
    return (f'two processes have {index}={number}, on {here[number]["host"]} and on {said["host"]}: each must have '
            f'its own, from 0 to {mine["processes"] - 1}')
  for name, value in mine['facts'].items():
    if (other := said['facts'].get(name)) != value:
      if isinstance(value, list) and isinstance(other, list):
        value = ', '.join(line for line in value if line not in other) or 'nothing'
        other = ', '.join(line for line in said['facts'][name] if line not in mine['facts'][name]) or 'nothing'
      return f'process 0 and process {number} differ in their {name}: {value} in process 0, {other} in {number}'
  return None


def _called(call: Call, hello: dict, timeout: float) -> tuple[dict, Any]:
  deadline, why = time.monotonic() + timeout, 'no answer'
  place = call.place
  while (left := deadline - time.monotonic()) > 0:
    line = None
    try:
      line = socket.create_connection(place, timeout=max(0.1, min(left, 10.0)))
      line.sendall(json.dumps(hello).encode() + b'\n')
      line.settimeout(timeout + LINGER)  # process 0 may have begun to wait just now
      said = _line(line)
      if 'welcome' in said:
        return {0: line}, said['welcome']
    except OSError as error:
      why, said = error.strerror or str(error) or type(error).__name__, None
    if line is not None:
      line.close()
    if said is not None:
      raise ValueError(said['refused'])
    time.sleep(RETRY)
  raise ValueError(f'process {call.process} of {call.processes} did not reach process 0 at {call.said} within '
                   f'{timeout:g} s: {why}')


def _line(line: socket.socket) -> dict:
  """One message. OSError if the other side is no process of ours."""
  said = bytearray()
  while not said.endswith(b'\n'):
    if not (data := line.recv(1 << 16)):
      raise ConnectionResetError('closed by the other side')
    said += data
  try:
    found = json.loads(said)
    if isinstance(found, dict) and {'welcome', 'refused'} & found.keys():
      return found
  except ValueError:
    pass
  raise ConnectionResetError('what answers there is no process of lmlib')


def free_port() -> int:
  """A port that nobody listens on now."""
  with socket.socket() as one:
    one.bind(('', 0))
    return one.getsockname()[1]
