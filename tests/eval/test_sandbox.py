"""Programs that try to get out, by the walls of the kernel and by the hook that makes do without."""
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from lmlib.eval import sandbox
from lmlib.eval.sandbox import Limits, run

QUICK = Limits(seconds=1.5)
kernel = pytest.mark.skipif(sys.platform != 'linux' or sandbox._kernel_walls() != sandbox.KERNEL,
                            reason='this kernel has no namespaces or no Landlock for us')


def hooked():
  """The walls that the hook is tried with: as few others as the machine runs it with."""
  for walls in (('hook',), ('namespaces', 'hook')):
    try:
      run('', walls=walls)
      return walls
    except OSError:
      pass
  pytest.skip('no sandbox here')


@pytest.fixture(params=[pytest.param('kernel', marks=kernel), 'hook'])
def walls(request):
  return sandbox.KERNEL if request.param == 'kernel' else hooked()


def fails(program, walls, limits=QUICK):
  found = run(program, limits, walls=walls)
  assert found.status == 'failed', found
  return found.message


def test_a_program_passes_when_it_comes_to_its_end(walls):
  assert run('assert sum(range(4)) == 6', walls=walls).passed
  assert 'AssertionError' in fails('assert sum(range(4)) == 7', walls)
  assert 'SyntaxError' in fails('def f(:', walls)


@pytest.mark.parametrize('program', ['import sys\nsys.exit(0)', 'raise SystemExit', 'import os\nos._exit(0)'])
def test_leaving_before_the_end_is_no_pass(walls, program):
  fails(program, walls)


def test_saying_that_one_passed_is_no_pass(walls):
  """What reports the end carries a word that the program was not told."""
  program = '''
import os
for n in range(3, 64):
  try: os.write(n, b'["", "passed", ""]\\n["passed"]\\npassed\\n' * 3)
  except OSError: pass
assert False'''
  assert 'AssertionError' in fails(program, walls)


@pytest.mark.parametrize('program', ['while True: pass', 'import time\ntime.sleep(60)'])
def test_an_endless_loop_times_out(walls, program):
  start = time.monotonic()
  assert run(program, Limits(seconds=0.5), walls=walls).status == 'timed out'
  assert time.monotonic() - start < 10


def test_a_loop_that_catches_everything_times_out(walls):
  program = '''
import signal
for s in range(1, 65):
  try: signal.signal(s, signal.SIG_IGN)
  except (OSError, ValueError): pass
while True:
  try:
    while True: pass
  except BaseException: pass'''
  assert run(program, Limits(seconds=0.5), walls=walls).status == 'timed out'


def test_memory_is_limited(walls):
  assert 'Limits.memory' in fails('x = bytearray(2 * 10**9)', walls)
  assert 'Limits.memory' in fails('x = []\nwhile True: x.append(bytearray(10**7))', walls, Limits(seconds=10))


def alive(sign: str) -> bool:
  """Whether a process with this in its command line lives."""
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      if sign.encode() in path.read_bytes():
        return True
    except OSError:
      pass
  return False


@kernel
def test_a_fork_bomb_is_contained_and_gone_afterwards():
  program = '''
import os
while True:
  try:
    if os.fork() == 0: os.setsid()
  except OSError: pass'''
  found = run(program, Limits(seconds=1, processes=8))
  assert found.status == 'timed out'
  assert not alive('sandbox_inside.py')


@kernel
def test_the_number_of_processes_is_that_of_the_limits():
  program = '''
import os, time
made = 0
try:
  while True:
    if os.fork() == 0: time.sleep(60)
    made += 1
except BlockingIOError:
  raise SystemExit(f'made {made}')'''
  assert 'made 7' in fails(program, sandbox.KERNEL, Limits(seconds=5, processes=8))


def test_the_hook_refuses_processes():
  for program in ('import os\nos.fork()', 'import subprocess\nsubprocess.run(["true"])', 'import os\nos.system("true")',
                  'import os\nos.execv("/bin/true", ["true"])'):
    assert 'PermissionError: the sandbox does not allow' in fails(program, hooked())


def test_there_is_no_network(walls):
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
    fails(f'import socket\nsocket.create_connection(("127.0.0.1", {port}), 1)', walls)
  fails('import urllib.request\nurllib.request.urlopen("http://192.0.2.1/", timeout=1)', walls)


@kernel
def test_the_network_alone_has_no_way_out():
  """Also of datagrams, which Landlock does not know."""
  program = 'import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 9))'
  assert 'unreachable' in fails(program, ('namespaces',))


@kernel
def test_abstract_sockets_of_others_are_out_of_reach():
  with socket.socket(socket.AF_UNIX) as server:
    server.bind('\0lmlib-sandbox-test')
    server.listen()
    fails('import socket\nsocket.socket(socket.AF_UNIX).connect("\\0lmlib-sandbox-test")', sandbox.KERNEL)


def test_nothing_is_written_outside_of_the_folder(walls, tmp_path):
  tmp_path.chmod(0o777)
  victim = tmp_path / 'victim'
  victim.write_text('whole')
  victim.chmod(0o666)
  for way in ('open({0!r}, "w")', 'open({0!r}, "a")', 'import os\nos.remove({0!r})', 'import os\nos.truncate({0!r}, 0)',
              'import os\nos.rename({0!r}, {1!r})', 'import os\nos.symlink({0!r}, "way")\nopen("way", "w")',
              'open({1!r}, "w")', 'import os\nos.mkdir({1!r})', 'import os\nos.chdir("/")\nopen({0!r}[1:], "w")',
              'import os\nos.link({0!r}, "hard")\nopen("hard", "w")', 'import shutil\nshutil.rmtree({2!r})',
              'import os\nos.open({0!r}, os.O_RDWR | os.O_TRUNC)'):
    fails(way.format(str(victim), str(tmp_path / 'other'), str(tmp_path)), walls)
    assert [path.name for path in tmp_path.iterdir()] == ['victim'], way
    assert victim.read_text() == 'whole', way


@kernel
def test_native_code_writes_nothing_outside_either(tmp_path):
  tmp_path.chmod(0o777)
  program = f'''
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.open({str(tmp_path / "other")!r}.encode(), os.O_CREAT | os.O_WRONLY, 0o600) < 0
assert libc.mount(b"none", b"/", b"tmpfs", ctypes.c_ulong(0), None) < 0
assert libc.umount2(os.getcwd().encode(), 2) < 0
assert libc.unshare(0x10000000) < 0 or libc.mount(b"none", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None) < 0
assert libc.setuid(0) < 0 or os.getuid() != 0 or libc.open({str(tmp_path / "other")!r}.encode(), 0o101, 0o600) < 0'''
  found = run(program)
  assert found.passed, found
  assert not list(tmp_path.iterdir())


def test_files_in_the_folder_are_its_own_and_gone_afterwards(walls):
  program = 'open("a", "w").write("x" * 1000)\nassert open("a").read() == "x" * 1000\nimport os\nos.remove("a")'
  found = run(program, walls=walls)
  assert found.passed, found
  assert fails('import os\nraise SystemExit(os.listdir("."))', walls) == 'SystemExit: []'


@kernel
def test_all_files_together_are_limited():
  few = Limits(disk=1 << 20, files=8)
  big = 'for n in range(4): open(str(n), "wb").write(bytes(400_000))'
  assert 'No space left' in fails(big, sandbox.KERNEL, few)
  many = 'for n in range(20): open(str(n), "wb")'
  assert 'No space left' in fails(many, sandbox.KERNEL, few)


def test_a_file_is_limited(walls):
  fails('f = open("a", "wb")\nfor n in range(100): f.write(bytes(10**6)); f.flush()', walls, Limits(disk=1 << 20))


def test_secrets_are_not_read(walls, tmp_path, monkeypatch):
  secret = tmp_path / 'secret'
  secret.write_text('key')
  secret.chmod(0o644)
  tmp_path.chmod(0o777)
  fails(f'open({str(secret)!r}).read()', walls)
  fails(f'import os\nos.listdir({str(tmp_path)!r})', walls)
  fails('open("/etc/passwd").read()', walls)
  monkeypatch.setenv('LMLIB_SECRET', 'key')
  found = run('import os\nassert not {"LMLIB_SECRET", "HOME", "USER", "PATH"} & os.environ.keys(), os.environ',
              walls=walls)
  assert found.passed, found
  fails(f'print(open("/proc/{os.getpid()}/environ", "rb").read())', walls)
  fails('import os\nopen(f"/proc/{os.getppid()}/environ", "rb").read()', walls)


def test_the_parent_and_others_are_not_killed(walls):
  with subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']) as other:
    for pid in (os.getpid(), other.pid, 'os.getppid()', -1, 0):
      run(f'import os, signal\nos.kill({pid}, signal.SIGKILL)', QUICK, walls=walls)
      run(f'import os, signal\nos.killpg({pid}, signal.SIGKILL)', QUICK, walls=walls)
    assert other.poll() is None
    other.kill()


@kernel
def test_no_other_process_is_seen():
  """It is the first of its namespace and has no parent there."""
  assert fails('import os\nraise SystemExit((os.getpid(), os.getppid()))', sandbox.KERNEL) == 'SystemExit: (1, 0)'


def test_python_and_its_libraries_are_there(walls):
  found = run('import collections, heapq, math, re, typing, hashlib, numpy\nassert numpy.ones(3).sum() == 3',
              Limits(seconds=20), walls=walls)
  assert found.passed, found


def test_missing_walls_are_an_error_that_says_what_to_do(monkeypatch):
  monkeypatch.setattr(sandbox, '_kernel_walls', lambda: ('namespaces',))
  with pytest.raises(OSError, match=r'landlock.*make_do'):
    run('')
  assert sandbox.available(make_do=True) == ('namespaces', 'hook')


@pytest.mark.parametrize('field', ['seconds', 'memory', 'disk', 'files', 'processes'])
def test_limits_are_positive(field):
  with pytest.raises(ValueError, match=f'Limits.{field}=0'):
    Limits(**{field: 0})
