"""Peak memory of converting a 20 GB sharded checkpoint of the LLaMA form, beside its bound: largest tensor x 3 + 1 GB.

  python benchmarks/convert_memory.py

The weights are a file with holes: it reads as zeros and takes no room, and so does what is written of it, for
tensorstore stores no chunk of zeros. A second, smaller model has random weights, all of which are written, in both
directions. Each conversion is a process of its own, started as a user starts it. What the process takes before it
reads anything (Python, jax) counts.
"""
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARD = 5_000_000_000
SIZES = {
    # 10 G weights, 20 GB in bfloat16; the largest tensor is the embedding, 1.05 GB.
    'zeros': dict(vocab_size=128_256, num_hidden_layers=45, hidden_size=4096, intermediate_size=14_336,
                  num_attention_heads=32, num_key_value_heads=8, head_dim=128),
    # 0.8 G weights, 1.6 GB; the largest tensor takes 0.26 GB.
    'random': dict(vocab_size=64_128, num_hidden_layers=12, hidden_size=2048, intermediate_size=5632,
                   num_attention_heads=16, num_key_value_heads=8, head_dim=128),
}


def make(folder: pathlib.Path, kind: str) -> tuple[int, int]:
  """Writes a model; (bytes of its tensors, bytes of the largest)."""
  from lmlib.interop import family, safetensors
  said = SIZES[kind] | {'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'rms_norm_eps': 1e-6,
                        'max_position_embeddings': 4096, 'rope_theta': 500_000.0, 'tie_word_embeddings': False}
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(said))
  llama = family.find('llama')
  tensors = family.tensors(llama, llama.read(family.Said(said)))
  dtype, draw = np.dtype('bfloat16'), np.random.default_rng(0)
  with safetensors.Writer(folder, {n: (t.shape, dtype) for n, t in tensors.items()}, longest=SHARD) as writer:
    for name, tensor in tensors.items() if kind == 'random' else ():
      writer.write(name, draw.standard_normal(tensor.shape, np.float32) * 0.02)
    if kind == 'zeros':
      writer._left.clear()  # its files are as long as their tensors, and stay holes
    writer.close()
  sizes = [int(np.prod(tensor.shape)) * dtype.itemsize for tensor in tensors.values()]
  return sum(sizes), max(sizes)


def converted(source: pathlib.Path, target: pathlib.Path, *bindings: str) -> dict:
  """Converts as a user does, without the comparison of logits; peak of resident memory, seconds, bytes on disk."""
  flags = [f'--gin_bindings={binding}' for binding in (
      f'SOURCE = "{source}"', f'TARGET = "{target}"', 'convert.main.check = False', *bindings)]
  start = time.perf_counter()
  done = subprocess.run([sys.executable, __file__, 'convert', '--gin_file=convert.gin', *flags], stdout=subprocess.PIPE,
                        text=True)
  if done.returncode:
    raise SystemExit(f'converting {source} failed: {done.stdout}')
  blocks = sum(file.stat().st_blocks for file in target.rglob('*'))
  return {'peak': int(done.stdout.split()[-1]) * 1024, 'seconds': time.perf_counter() - start, 'disk': blocks * 512}


def convert():
  """experiments/convert.py, and the peak of its memory as the last word."""
  import atexit
  import runpy
  atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
  sys.argv[:] = [str(ROOT / 'experiments' / 'convert.py'), *sys.argv[2:]]
  runpy.run_path(sys.argv[0], run_name='__main__')


def main():
  os.environ['PYTHONPATH'] = str(ROOT)
  sys.path.insert(0, str(ROOT))
  figures = {}
  with tempfile.TemporaryDirectory(dir=os.environ.get('TMPDIR')) as name:
    folder = pathlib.Path(name)
    for kind in SIZES:
      total, largest = make(folder / kind, kind)
      runs = [(f'{kind}, in', folder / kind, folder / f'{kind} in', 'convert.main.dtype = None'),
              (f'{kind}, in as float32', folder / kind, folder / f'{kind} in 32')]
      if kind != 'zeros':  # files of safetensors are written without holes
        runs.append((f'{kind}, out', folder / f'{kind} in', folder / f'{kind} out', 'convert.main.dtype = "bfloat16"'))
      for label, source, target, *bindings in runs:
        found = figures[label] = converted(source, target, *bindings)
        found |= {'bytes': total, 'largest': largest, 'bound': 3 * largest + 10**9}
        print(f'{label:<24}{total / 1e9:6.1f} GB in {found["seconds"]:6.1f} s, peak {found["peak"] / 1e9:.2f} GB, '
              f'bound {found["bound"] / 1e9:.2f} GB, {found["disk"] / 1e9:.2f} GB on the disk', flush=True)
  ratio = max(found['peak'] / found['bound'] for found in figures.values())
  print(json.dumps({'name': 'convert_memory', 'goal': 1.0, 'ratio': ratio, 'holds': ratio < 1, 'figures': figures,
                    'machine': f'{os.cpu_count()} cores, {platform.platform()}'}))


if __name__ == '__main__':
  if sys.argv[1:2] == ['convert']:
    convert()
  else:
    main()
