"""Seconds from the quickstart's command to its first step: cold, with prepared data, and with compiled programs.

  python benchmarks/first_step.py

Each round starts from an empty cache ($LMLIB_CACHE): the first run prepares data and compiles, the second
finds the data but not the programs (JAX_COMPILATION_CACHE_DIR elsewhere), the third finds both.
"""
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROUNDS = 3


def seconds(folder: pathlib.Path, compiled: str) -> float:
  """Until 'step 1/' is printed by a new run; the process is then ended."""
  shutil.rmtree(folder / 'run', ignore_errors=True)
  environment = os.environ | {'LMLIB_CACHE': str(folder / 'cache'), 'PYTHONUNBUFFERED': '1',
                              'JAX_COMPILATION_CACHE_DIR': str(folder / compiled)}
  command = [sys.executable, ROOT / 'experiments' / 'pretrain.py', '--gin_file=quickstart.gin',
             f'--gin_bindings=WORKDIR = "{folder / "run"}"']
  start = time.perf_counter()
  process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
  for line in process.stdout:
    if line.startswith('step 1/'):
      break
  else:
    raise SystemExit('the run ended before its first step')
  took = time.perf_counter() - start
  process.kill()
  process.wait()
  return took


def main():
  found = {'cold': [], 'data prepared': [], 'data prepared, programs compiled': []}
  for _ in range(ROUNDS):
    with tempfile.TemporaryDirectory() as name:
      for (_, values), compiled in zip(found.items(), ('a', 'b', 'a')):
        values.append(seconds(pathlib.Path(name), compiled))
  medians = {name: statistics.median(values) for name, values in found.items()}
  for name, values in found.items():
    print(f'{name:<34}{medians[name]:6.1f} s   ({min(values):.1f} to {max(values):.1f})')
  ratio = medians['data prepared'] / medians['data prepared, programs compiled']
  print(json.dumps({'name': 'first_step', 'goal': None, 'ratio': ratio, 'holds': None, 'figures': found,
                    'machine': f'{os.cpu_count()} cores, {platform.platform()}'}))


if __name__ == '__main__':
  main()
