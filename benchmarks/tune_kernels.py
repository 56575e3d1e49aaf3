"""Finds the fastest block sizes of a kernel on the chip that is here, and writes them into lmlib/kernels/blocks.json.

  python benchmarks/tune_kernels.py attention_tpu           prints what it finds
  python benchmarks/tune_kernels.py attention_tpu --write   and keeps it

One number or block after the other is varied, the others staying the best so far; each time is the median of several
calls on random data, forward and backward together. Sizes that do not compile are passed over and said. Runs on a TPU
or GPU: on a CPU kernels are interpreted, and their times mean nothing.
"""
import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from lmlib.kernels import attention_gpu, attention_tpu, blocks
from lmlib.kernels.attention import Pattern, Rows

CALLS = 9
DTYPE = jnp.bfloat16


def normal(*shapes):
  """Random arrays of DTYPE."""
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [jax.random.normal(key, shape, DTYPE) for key, shape in zip(keys, shapes)]


def attention_of(module, block, positions):
  """Of an attention's file: of each width its case, its default, what may be tried, and a call of given sizes."""
  for width in (64, 128, 256):
    T, K, G = 8192, 4, 4
    q, k, v = normal((1, T, K, G, width), (1, T, K, width), (1, T, K, width))
    default = module.sizes(DTYPE, width) if module is attention_gpu else module.sizes(DTYPE, width, T, T)

    def call(sizes, q=q, k=k, v=v):
      attend = lambda q, k, v: module.attention(q, k, v, Pattern(), Rows(), sizes_of=sizes)
      return jax.jit(lambda q, k, v: (lambda out, back: back(out))(*jax.vjp(attend, q, k, v))), (q, k, v)

    options = [block(*sizes) for sizes in itertools.product(positions, repeat=2)]
    yield f'{DTYPE.__name__} {width}', default, dict.fromkeys(('forward', 'keys', 'queries'), options), call


KERNELS = {
    'attention_gpu': lambda: attention_of(attention_gpu, attention_gpu.Blocks, (32, 64, 128)),
    'attention_tpu': lambda: attention_of(attention_tpu, attention_tpu.Blocks, (128, 256, 512, 1024, 2048)),
}


def seconds(function, arguments) -> float:
  """Of a call, the median of CALLS."""
  jax.block_until_ready(function(*arguments))
  found = []
  for _ in range(CALLS):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    found.append(time.perf_counter() - start)
  return statistics.median(found)


def search(default, options: dict, timed, say=print):
  """(the best sizes, their time, that of `default`): of each field its options, the others being the best so far.

  timed: sizes -> seconds; what it raises is said, and these sizes are passed over.
  """
  best, time_of = default, {default: timed(default)}
  for name, values in options.items():
    for value in values:
      trial = dataclasses.replace(best, **{name: value})
      if trial not in time_of:
        try:
          time_of[trial] = timed(trial)
        except Exception as error:  # compilers raise what they like
          say(f'  {name} {value}: {str(error).splitlines()[0][:100]}')
    best = min(time_of, key=time_of.get)
  return best, time_of[best], time_of[default]


def kept(path: pathlib.Path, kernel: str, chip: str, case: str, sizes):
  """Writes sizes into the table at `path`."""
  table = json.loads(path.read_text())
  table.setdefault(kernel, {}).setdefault(chip, {})[case] = dataclasses.asdict(sizes)
  path.write_text(json.dumps(table, indent=2, sort_keys=True) + '\n')


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('kernels', nargs='+', choices=sorted(KERNELS))
  parser.add_argument('--write', action='store_true', help='keep what is found in lmlib/kernels/blocks.json')
  given = parser.parse_args(arguments)
  if jax.default_backend() == 'cpu':
    raise SystemExit('there is no TPU or GPU here, and kernels that a CPU interprets have no speed')
  for kernel in given.kernels:
    for case, default, options, call in KERNELS[kernel]():
      best, took, before = search(default, options, lambda sizes: seconds(*call(sizes)))  # noqa: B023, run at once
      print(f'{kernel} {blocks.chip()} {case}: {took * 1e3:.3f} ms, {before / took:.2f} times as fast as '
            f'{default}: {best}')
      if given.write:
        kept(blocks.TABLE, kernel, blocks.chip(), case, best)


if __name__ == '__main__':
  main()
