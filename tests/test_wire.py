"""Processes that meet, agree and end: the wire between them, in threads of one process."""
import concurrent.futures
import contextlib
import os
import queue
import socket
import threading
import time

import pytest

from lmlib import processes, wire

SOON = 20.0


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
  monkeypatch.setattr(wire, 'LINGER', 0.3)


def call(process: int, count: int = 3, port: int = 1) -> wire.Call:
  return wire.Call(f'127.0.0.1:{port}', count, process)


def meet(calls, facts=lambda process: {}, timeout: float = SOON) -> list:
  """What wire.met gives or raises for every call, side by side."""
  def one(each):
    try:
      return wire.met(each, facts(each.process), timeout, lambda: 'told')
    except ValueError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
    return list(pool.map(one, calls))


@pytest.fixture
def wires():
  """Three wires, each with the faults that it has heard of."""
  port = wire.free_port()
  met = meet([call(i, 3, port) for i in range(3)])
  faults = [queue.SimpleQueue() for _ in met]
  assert [told for _, told in met] == ['told'] * 3
  made = [wire.Wire(i, 3, lines, faults[i].put) for i, (lines, _) in enumerate(met)]
  for one, found in zip(made, faults):
    one.faults = found
  yield made
  for one in made:
    one.fault = one.fault or 'the test is over'
  for lines, _ in met:
    for line in lines.values():
      with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
  for thread in threading.enumerate():
    if thread.name == 'wire':
      thread.join(SOON)
  for lines, _ in met:
    for line in lines.values():
      line.close()


def together(functions) -> list:
  with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
    return [found.result(SOON) for found in [pool.submit(function) for function in functions]]


def test_all_know_what_each_gives_in_their_order(wires):
  for turn in range(3):
    found = together([lambda one=one, turn=turn: one.gathered(f'turn {turn}', [one.process, turn]) for one in wires])
    assert found == [[[0, turn], [1, turn], [2, turn]]] * 3


def test_processes_that_do_different_things_are_told(wires):
  def one(each):
    with pytest.raises(wire.Ended, match="process 0 is at 'saving' and process 2 at 'scoring'"):
      each.gathered('scoring' if each.process == 2 else 'saving')

  together([lambda each=each: one(each) for each in wires])


@pytest.mark.parametrize('who', [0, 2])
def test_all_stop_at_one_step_whoever_is_asked(wires, who):
  """Each takes as long as it likes for a step, but none is two steps ahead of another, as in training."""
  barrier, stopped = [threading.Barrier(3) for _ in range(4000)], {}

  def train(one):
    for step in range(4000):
      barrier[step].wait(SOON)
      time.sleep(0.0003 * one.process)
      if why := one.stop('SIGTERM' if one.process == who and step >= 20 else None):
        stopped[one.process] = step, why
        return

  together([lambda one=one: train(one) for one in wires])
  step, = {step for step, _ in stopped.values()}
  assert 20 < step < 3999
  assert stopped[1][1] == ('SIGTERM' if who == 0 else 'SIGTERM to process 2')


def test_the_first_fault_reaches_all_and_stays_the_first(wires):
  assert wires[2].fail('the disk is full', 1).process == 2
  for one in wires[:2]:
    assert one.faults.get(timeout=SOON) == wire.Fault(2, 'the disk is full', 1)
    assert one.fail('gloo: connection closed', 1).line == 'the disk is full'
    with pytest.raises(wire.Ended, match='the disk is full') as ended:
      one.gathered('saved')
    assert ended.value.exit_status == 1


def test_whoever_waits_hears_of_a_fault(wires):
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    waiting = pool.submit(wires[1].gathered, 'data')
    wires[0].fail('bad thing=3', 2)
    assert isinstance(waiting.exception(SOON), wire.Ended)


@pytest.mark.parametrize('who', [0, 1])
def test_a_process_that_dies_is_missed_at_once(wires, who):
  wires[who].fault = 'it is dead and says no more'
  for line in wires[who]._lines.values():
    line.shutdown(socket.SHUT_RDWR)
  fault = wires[2].faults.get(timeout=SOON)
  assert (fault.process, fault.status) == (who, 1)
  assert fault.line.startswith(f'process {who} of 3 ended without a word')


def test_nobody_misses_those_who_have_said_goodbye(wires):
  together([one.goodbye for one in wires])
  for line in (line for one in wires for line in one._lines.values()):
    line.shutdown(socket.SHUT_RDWR)
  time.sleep(0.1)
  assert all(one.fault is None for one in wires)


def refused(*calls, **more) -> str:
  """The one line that all calls are refused with."""
  line, = set(meet(calls, **more))
  assert isinstance(line, str)
  assert '\n' not in line
  return line


def test_counts_that_differ_are_named_by_all():
  port = wire.free_port()
  assert refused(call(0, 2, port), call(1, 3, port)) == (
      'LMLIB_PROCESSES=2 in process 0 and LMLIB_PROCESSES=3 in process 1: all must have the same')


def test_two_of_one_number_are_named_by_all():
  port = wire.free_port()
  host = socket.gethostname()
  assert refused(call(0, 3, port), call(1, 3, port), call(1, 3, port)) == (
      f'two processes have LMLIB_PROCESS=1, on {host} and on {host}: each must have its own, from 0 to 2')


def test_settings_and_code_that_differ_are_named_by_all():
  port = wire.free_port()
  facts = lambda process: {'code': 'a', 'settings': ['STEPS = 5', f'BATCH = {8 - process}']}
  assert refused(call(0, 2, port), call(1, 2, port), facts=facts) == (
      'process 0 and process 1 differ in their settings: BATCH = 8 in process 0, BATCH = 7 in 1')
  port = wire.free_port()
  assert refused(call(0, 2, port), call(1, 2, port), facts=lambda process: {'code': 'ab'[process]}) == (
      'process 0 and process 1 differ in their code: a in process 0, b in 1')


def test_who_does_not_come_is_named_in_time():
  port, start = wire.free_port(), time.monotonic()
  assert refused(call(0, 4, port), call(2, 4, port), timeout=1.0) == (
      f"LMLIB_PROCESSES=4, but of these processes 1, 3 did not come to LMLIB_COORDINATOR='127.0.0.1:{port}' within 1 s")
  assert time.monotonic() - start < 10


def test_a_wrong_address_is_named_in_time():
  port = wire.free_port()
  line = refused(call(1, 2, port), timeout=1.0)
  assert line.startswith(f"process 1 of 2 did not reach process 0 at LMLIB_COORDINATOR='127.0.0.1:{port}' within 1 s: ")
  assert 'refused' in line
  with socket.create_server(('', 0)) as other:
    port = other.getsockname()[1]
    assert refused(call(0, 2, port)) == (
        f"process 0 cannot listen on LMLIB_COORDINATOR='127.0.0.1:{port}': Address already in use; another process may "
        'have LMLIB_PROCESS=0, or another run this port')


def test_strangers_at_the_door_are_ignored():
  port = wire.free_port()

  def stranger():
    for said in (b'GET / HTTP/1.0\r\n\r\n', b'{}\n', b'7\n', b''):
      for _ in range(50):
        try:
          with socket.create_connection(('127.0.0.1', port)) as line:
            line.sendall(said)
          break
        except OSError:
          time.sleep(0.02)

  thread = threading.Thread(target=stranger)
  thread.start()
  time.sleep(0.3)
  found = meet([call(0, 2, port), call(1, 2, port)])
  thread.join()
  assert [told for _, told in found] == ['told', 'told']
  for lines, _ in found:
    for line in lines.values():
      line.close()


SLURM = {'SLURM_JOB_ID': '4100', 'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '3', 'SLURM_NTASKS': '4',
         'SLURM_STEP_NODELIST': 'gpu[007-009,12],cpu1'}
OURS = {'LMLIB_COORDINATOR': 'a:1', 'LMLIB_PROCESSES': '4', 'LMLIB_PROCESS': '3'}
JOB = {'LMLIB_COORDINATOR': 'a:1', 'LMLIB_PROCESSES': '4', 'JOB_COMPLETION_INDEX': '1'}


@pytest.mark.parametrize(('environ', 'found'), [
    ({}, None), ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, None),  # a batch script, not a step
    ({'JOB_COMPLETION_INDEX': '2'}, None), (OURS | {'LMLIB_PROCESSES': '1', 'LMLIB_PROCESS': '0'}, None),
    (OURS, ('a:1', 4, 3)), (OURS | SLURM | {'LMLIB_PROCESS': '1'}, ('a:1', 4, 1)),
    (SLURM, ('gpu007:61444', 4, 3)), (JOB, ('a:1', 4, 1)),
    (JOB | {'JOB_INDEX': '1', 'LMLIB_JOB_PROCESSES': '2'}, ('a:1', 4, 3))])
def test_processes_are_found_in_the_environment(environ, found, tmp_path):
  call = processes.found(environ, str(tmp_path))
  assert found == (call and (call.address, call.processes, call.process))


@pytest.mark.parametrize(('environ', 'message'), [
    ({'LMLIB_PROCESS': '0'}, "LMLIB_PROCESS='0' is set, but LMLIB_COORDINATOR and LMLIB_PROCESSES not"),
    (OURS | {'LMLIB_PROCESS': '4'}, 'LMLIB_PROCESS=4 must lie between 0 and 3, as LMLIB_PROCESSES=4'),
    (OURS | {'LMLIB_PROCESSES': 'four'}, "LMLIB_PROCESSES='four' must be a number from 1"),
    (OURS | {'LMLIB_COORDINATOR': 'host'}, "LMLIB_COORDINATOR='host' must be the host and port"),
    ({name: SLURM[name] for name in SLURM if name != 'SLURM_PROCID'}, 'SLURM_PROCID is not set: start .* by srun')])
def test_variables_that_do_not_fit_are_named(environ, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    processes.found(environ, str(tmp_path))


def test_a_tpu_is_found_by_its_device(tmp_path):
  def device(name, vendor, kind):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'vendor').write_text(f'{vendor}\n')
    (tmp_path / name / 'class').write_text(f'{kind}\n')

  device('net', '0x1ae0', '0x020000')
  device('disk', '0x1ae0', '0x010802')
  device('gpu', '0x10de', '0x030200')
  assert processes.found({}, str(tmp_path)) is None
  device('tpu', '0x1ae0', '0xff0000')
  assert processes.found({}, str(tmp_path)) == 'tpu'
  assert processes.found({'JAX_PLATFORMS': 'cpu'}, str(tmp_path)) is None
  assert processes.found({'TPU_WORKER_HOSTNAMES': 'a,b'}, str(tmp_path / 'none')) == 'tpu'


def test_seconds_of_the_environment_are_checked():
  assert processes.seconds({}, 'LMLIB_TIMEOUT', 300) == 300
  assert processes.seconds({'LMLIB_TIMEOUT': '2.5'}, 'LMLIB_TIMEOUT', 300) == 2.5
  for wrong in ('0', 'soon', 'nan'):
    with pytest.raises(ValueError, match=f"LMLIB_TIMEOUT='{wrong}' must be a number of seconds"):
      processes.seconds({'LMLIB_TIMEOUT': wrong}, 'LMLIB_TIMEOUT', 300)


def test_one_process_agrees_with_itself():
  assert processes.first()
  assert (processes.count(), processes.number(), processes.gathered('x', 3)) == (1, 0, [3])
  assert processes.told('x', lambda: os.getpid()) == os.getpid()
  assert processes.stop(None) is None
  assert processes.stop('SIGINT') == 'SIGINT'


class JaxRuntimeError(RuntimeError):
  """Of the name that jax's has."""


@pytest.mark.parametrize(('error', 'follows'), [
    (JaxRuntimeError('Connection closed by peer [127.0.0.1]:1'), True), (JaxRuntimeError('RESOURCE_EXHAUSTED'), False),
    (OSError('checkpoint could not be written: UNKNOWN: Gloo AllGather failed'), True), (OSError('disk full'), False),
    (wire.Ended(wire.Fault(1, 'bad', 2)), True), (ValueError('bad thing=3'), False)])
def test_what_follows_from_the_end_of_another_is_no_reason(error, follows):
  assert processes.consequence(error) == follows
  outer = RuntimeError('outside')
  outer.__cause__ = error
  assert processes.consequence(outer) == follows
