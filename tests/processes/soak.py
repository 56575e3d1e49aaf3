"""Kills processes of a run at random, again and again, and compares its end with a run that was left alone.

  python -m tests.processes.soak --kills 20 --processes 4

Prints the seconds from each kill to the next step of training, and one line of JSON.
"""
import argparse
import json
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from lmlib.plan.local import Local
from lmlib.train import metrics
from tests.processes.running import ROOT, Tiny

LAUNCH = '''
import json, sys
from lmlib.plan.local import Local
sys.exit(Local(**json.loads(sys.argv[1])).run(json.loads(sys.argv[2])))
'''


def launched(tiny: Tiny, local: Local, *bindings: str, **more) -> subprocess.Popen:
  """A launcher of a tiny run, in a process of its own."""
  given = {name: getattr(local, name) for name in ('processes', 'devices', 'restarts', 'wait')}
  return subprocess.Popen([sys.executable, '-c', LAUNCH, json.dumps(given), json.dumps(tiny.command(*bindings))],
                          env=tiny.environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          **more)


def children(parent: int) -> list[int]:
  """The processes of a run by number: what the launcher has started."""
  found = {}
  for path in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      # pid (name) state parent ...; the name may hold anything
      fields = (path / 'stat').read_text().rpartition(')')[2].split()
      if int(fields[1]) == parent and fields[0] != 'Z':
        said = dict(one.split('=', 1) for one in (path / 'environ').read_text().split('\0') if '=' in one)
        found[int(said['LMLIB_PROCESS'])] = int(path.name)
    except (OSError, KeyError, ValueError):
      continue  # it has just ended
  return [found[number] for number in sorted(found)]


def steps(tiny: Tiny) -> int:
  lines = metrics.read(tiny.workdir / 'metrics.jsonl')
  return lines[-1]['step'] if lines else 0


def stamp(tiny: Tiny) -> float:
  path = tiny.workdir / 'metrics.jsonl'
  return path.stat().st_mtime if path.exists() else 0.0


def until(fact, process: subprocess.Popen, seconds: float = 300):
  """Waits for fact() while the process lives. TimeoutError after so long."""
  end = time.monotonic() + seconds
  while not fact():
    if process.poll() is not None or time.monotonic() > end:
      raise TimeoutError(process.communicate(timeout=5)[0] if process.poll() is not None else 'nothing happens')
    time.sleep(0.02)


def soak(folder: pathlib.Path, *, kills: int, processes: int, seed: int = 0) -> dict:
  """Figures of a run of `processes` with so many kills; AssertionError if it does not end as one left alone."""
  draw, local = random.Random(seed), Local(processes, 1, restarts=kills + 2, wait=0.2)
  # A tenth of a second a batch, so that there is time to kill it; the last kill comes before the end.
  more = [f'tiny.main.steps = {16 * kills + 20}', 'tiny.main.seconds = 0.1', 'tiny.main.save_every = 5']
  tiny, alone = (Tiny(folder / name) for name in ('killed', 'alone') if not (folder / name).mkdir(parents=True))
  launcher = launched(tiny, local, *more)
  took, begun = [], 0
  for _ in range(kills):
    further = begun + draw.randint(1, 12)
    until(lambda: steps(tiny) >= further, launcher)  # noqa: B023, called here
    time.sleep(draw.uniform(0.0, 0.2))
    alive = children(launcher.pid)
    number = draw.randrange(len(alive))
    at, before = time.time(), stamp(tiny)
    os.kill(alive[number], signal.SIGKILL)
    until(lambda: not set(alive) & set(children(launcher.pid)), launcher)  # noqa: B023
    gone = time.time() - at
    lines = steps(tiny)
    until(lambda: stamp(tiny) > at + gone and steps(tiny) and stamp(tiny) != before, launcher)  # noqa: B023
    until(lambda: steps(tiny) != lines or steps(tiny) > 0, launcher)  # noqa: B023
    begun = steps(tiny)
    took.append((number, gone, time.time() - at))
    print(f'process {number} killed: all gone after {gone:.1f} s, training again after {took[-1][2]:.1f} s, at step '
          f'{begun}', flush=True)
  out = launcher.communicate(timeout=600)[0]
  assert launcher.returncode == 0, out
  assert len(re.findall('all start again', out)) == kills, out
  done = launched(alone, local, *more[:1])
  out = done.communicate(timeout=300)[0]
  assert done.returncode == 0, out
  assert tiny.losses == alone.losses, 'the losses are not those of a run that was left alone'
  assert tiny.data == alone.data
  again = [seconds for _, _, seconds in took]
  return {'name': 'seconds from a kill to training again', 'kills': kills, 'processes': processes,
          'of_process_0': sum(number == 0 for number, *_ in took), 'median': statistics.median(again),
          'longest': max(again), 'all_gone_longest': max(gone for _, gone, _ in took), 'steps': len(tiny.losses)}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--processes', type=int, default=4)
  parser.add_argument('--seed', type=int, default=0)
  given = vars(parser.parse_args())
  with tempfile.TemporaryDirectory() as folder:
    print(json.dumps(soak(pathlib.Path(folder), **given)))


if __name__ == '__main__':
  main()
