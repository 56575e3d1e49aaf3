"""What runs inside the sandbox: a script that shuts itself in, then runs the program it was given.

It is started by sandbox.py with Python's -I, reads one JSON object from standard input, and imports nothing but
Python's own. Walls are put up from the outside in: namespaces (no network, no other processes in sight, a small file
system in memory as the folder), an unprivileged user where it was root, limits on resources, Landlock (Salaün 2021:
the kernel refuses what lies outside of named folders), no capabilities. Where the kernel has none of these, an audit
hook of Python stands instead, which stops what asks politely and not a program that means harm.
"""
import ctypes
import json
import os
import resource
import signal
import sys
import sysconfig

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
PRIVATE, RECURSIVE, BIND, NO_SUID, NO_DEV = 1 << 18, 1 << 14, 1 << 12, 2, 4  # of mount(2)
DEATH_SIGNAL, NO_NEW_PRIVILEGES = 1, 38  # of prctl(2)
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls of Landlock, the same on all machines
EXECUTE, WRITE, READ, LIST, TRUNCATE, DEVICE = 1, 2, 4, 8, 1 << 14, 1 << 15  # of files and folders, in Landlock
USERS = 200_000  # root takes an id from here on that nobody has
WRITES = {'os.chmod', 'os.chown', 'os.link', 'os.mkdir', 'os.remove', 'os.rename', 'os.rmdir', 'os.symlink',
          'os.truncate', 'os.utime', 'os.setxattr', 'os.removexattr', 'os.mkfifo', 'os.mknod'}
REFUSED = ('socket.', 'ctypes.', 'subprocess.', 'os.fork', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.system',
           'os.kill', 'signal.pthread_kill', 'os.chdir', 'os.fchdir', 'pty.', 'shutil.chown', 'syslog.',
           'mmap.__new__', 'sys.addaudithook', 'gc.get_objects')


def main():
  """Reads the order, shuts itself in, runs the program, says how it went on the file descriptor it was given."""
  order = json.loads(sys.stdin.buffer.read())
  program, places = compile_early(order['program']), readable()
  null = os.open(os.devnull, os.O_RDWR)
  os.dup2(null, 0)
  os.dup2(null, 1)
  if 'namespaces' in order['walls']:
    namespaces(order)
    if (child := os.fork()):  # the first process of its namespace: with it all others end
      signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
      os.close(order['answer'])
      os.waitpid(child, 0)  # returns when every process of the namespace is gone
      os._exit(0)
    os.setsid()  # signals to its group stay inside
    private_folder(order, places)
  os.chdir(order['folder'])
  drop_root()
  if closed := [place for place in places if not os.access(place, os.R_OK)]:
    raise PermissionError(f'as a user without rights the program could not read {closed[0]}: do not run as root')
  LIBC.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
  limits(order)
  LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
  if 'landlock' in order['walls']:
    landlock(order['folder'], places)
  no_capabilities()
  os.dup2(null, 2)  # until here for faults of the sandbox itself
  os.close(null)
  say(order, 'started', '')
  if 'hook' in order['walls']:
    hook(order['folder'], places)
  run(program, order)


def compile_early(text: str):
  """The program's code, or the error that compiling it raises, which is the program's fault."""
  try:
    return compile(text, 'program', 'exec')
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    return error


def run(program, order):
  """Runs the program and says 'passed' if it came to its end, or else what it raised."""
  write, end = os.write, os._exit
  token, answer, dumps = order['token'], order['answer'], json.dumps
  order.clear()  # nothing of it is left for the program to read in a global

  def finish(status, message):
    write(answer, (dumps([token, status, message[:500]]) + '\n').encode())
    end(0)

  if isinstance(program, Exception):
    finish('failed', f'{type(program).__name__}: {program}')
  try:
    exec(program, {'__name__': '__main__'})
  except MemoryError:
    finish('failed', 'MemoryError: more memory than Limits.memory')
  except BaseException as error:
    finish('failed', f'{type(error).__name__}: {error}')
  finish('passed', '')


def say(order, status: str, message: str):
  os.write(order['answer'], (json.dumps([order['token'], status, message]) + '\n').encode())


def checked(result: int, what: str):
  """OSError if a function of libc failed."""
  if result < 0:
    number = ctypes.get_errno()
    raise OSError(number, f'{what}: {os.strerror(number)}')
  return result


def namespaces(order):
  """Leaves the network, the processes and the mounts of the machine. OSError if the machine does not allow it."""
  kinds = NEW_NET | NEW_PIDS | NEW_MOUNTS | NEW_IPC
  if os.getuid() == 0 and LIBC.unshare(kinds) == 0:
    return
  user, group = os.getuid(), os.getgid()
  checked(LIBC.unshare(kinds | NEW_USER), 'unshare')
  for name, text in (('setgroups', 'deny'), ('uid_map', f'{user} {user} 1'), ('gid_map', f'{group} {group} 1')):
    with open(f'/proc/self/{name}', 'w') as file:
      file.write(text)


def private_folder(order, places):
  """A file system in memory, of limited size and number of files, where the folder was; seen by nobody else."""
  mount('none', '/', '', PRIVATE | RECURSIVE)
  if os.getuid() == 0:
    open_up(places)
  mount('tmpfs', order['folder'], f'size={order["disk"]},nr_inodes={order["files"]},mode=777', NO_SUID | NO_DEV)


def mount(source: str, place: str, data: str, flags: int):
  checked(LIBC.mount(source.encode(), place.encode(), source.encode(), ctypes.c_ulong(flags), data.encode()),
          f'mount of {source} on {place}')


def open_up(places):
  """Where Python lies in a folder that only root may enter, an empty folder with Python alone takes its place."""
  held = {}  # of a closed folder, what is needed in it, open
  for place in places:
    parts = place.split('/')
    above = ['/'.join(parts[:n]) for n in range(2, len(parts))]
    closed = next((folder for folder in above if not os.stat(folder).st_mode & 1), None)
    if closed is not None and not any(place.startswith(os.path.join(other, '')) for other in held.get(closed, {})):
      held.setdefault(closed, {})[place] = os.open(place, os.O_PATH | os.O_CLOEXEC)
  for closed, places in held.items():
    mount('tmpfs', closed, 'size=1m,mode=755', NO_SUID | NO_DEV)
    for place, file in places.items():
      os.makedirs(place)
      mount(f'/proc/self/fd/{file}', place, '', BIND)
      os.close(file)


def drop_root():
  """Root becomes a user whom nobody else is, so that limits hold for it and the files of others are closed."""
  if os.getuid() == 0:
    user = USERS + os.getppid() if os.getppid() else USERS + int.from_bytes(os.urandom(2), 'big')
    try:
      os.setgroups([])
      os.setresgid(user, user, user)
      os.setresuid(user, user, user)
    except OSError:
      os.setgroups([])  # a container that maps few ids: nobody's has to do
      os.setresgid(65534, 65534, 65534)
      os.setresuid(65534, 65534, 65534)


def limits(order):
  """Hard limits of the kernel: memory, processor time, size of a file, open files, processes and threads."""
  seconds = int(order['seconds']) + 1
  for kind, most in ((resource.RLIMIT_AS, order['memory']), (resource.RLIMIT_CPU, seconds),
                     (resource.RLIMIT_FSIZE, order['disk']), (resource.RLIMIT_NOFILE, 64),
                     (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, order['processes'])):
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def readable() -> list[str]:
  """The folders and files of Python and its libraries."""
  places = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values(), '/usr', '/lib', '/lib64',
            '/etc/ld.so.cache', '/etc/localtime', '/dev/urandom', '/dev/null', '/dev/zero'}
  return sorted(place for place in places if os.path.exists(place))


def landlock(folder: str, places):
  """From here on the kernel lets this process and all it starts write in `folder` alone, and read little else."""
  version = checked(LIBC.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1)), 'landlock')
  bits = 13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16
  handled = (1 << bits) - 1
  attributes = (ctypes.c_uint64 * 3)(handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
  size = 24 if version >= 6 else 16 if version >= 4 else 8
  rules = checked(LIBC.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint(0)), 'landlock')

  class Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = 'ms'
    _fields_ = (('allowed', ctypes.c_uint64), ('parent', ctypes.c_int32))

  allowed = dict.fromkeys(places, EXECUTE | READ | LIST) | {
      '/dev/null': READ | WRITE, folder: handled & ~EXECUTE & ~DEVICE}
  for place, access in allowed.items():
    if not os.path.isdir(place):
      access &= EXECUTE | WRITE | READ | TRUNCATE
    at = os.open(place, os.O_PATH | os.O_CLOEXEC)
    beneath = Beneath(access & handled, at)
    checked(LIBC.syscall(ADD_RULE, rules, 1, ctypes.byref(beneath), ctypes.c_uint(0)), f'landlock of {place}')
    os.close(at)
  checked(LIBC.syscall(RESTRICT_SELF, rules, ctypes.c_uint(0)), 'landlock')
  os.close(rules)


def no_capabilities():
  """Gives up what a user namespace gave: mounting, raw sockets."""
  header = (ctypes.c_uint32 * 2)(0x20080522, 0)
  LIBC.capset(header, (ctypes.c_uint32 * 6)())


def hook(folder: str, places):
  """Python's own events that reach outside raise PermissionError. No wall: native code does not pass here."""
  real, join, inside = os.path.realpath, os.path.join, [os.path.realpath(folder)]
  seen = [real(place) for place in places]

  def lies(path, roots) -> bool:
    if isinstance(path, int):
      return path > 2  # of a file that was opened here
    path = real(os.fsdecode(path))
    return any(path == place or path.startswith(join(place, '')) for place in roots)

  def refuse(event, arguments):
    if event.startswith(REFUSED):
      raise PermissionError(f'the sandbox does not allow {event}')
    if event == 'open' and arguments[0] is not None:
      path, _, flags = arguments
      writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
      if not lies(path, inside if writes else inside + seen):
        raise PermissionError(f'the sandbox does not allow to open {path!r}')
    if event in WRITES and not all(lies(path, inside) for path in arguments if isinstance(path, (str, bytes))):
      raise PermissionError(f'the sandbox does not allow {event} of {arguments[0]!r}')
    if event in ('os.listdir', 'os.scandir') and arguments[0] is not None and not lies(arguments[0], inside + seen):
      raise PermissionError(f'the sandbox does not allow to list {arguments[0]!r}')

  sys.addaudithook(refuse)


if __name__ == '__main__':
  main()
