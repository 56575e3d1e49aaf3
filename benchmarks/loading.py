"""Seconds from starting Python to a model in memory in float32, beside transformers' from_pretrained.

  python benchmarks/loading.py

The model has the sizes of SmolLM2-135M and random weights in bfloat16. Each side is a process of its own, as a user
starts it, imports counted; they take turns. The seconds of the call alone, and of processor time, are printed too.
"""
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

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOAL, ROUNDS = 0.5, 5
SAID = dict(model_type='llama', architectures=['LlamaForCausalLM'], vocab_size=49_152, num_hidden_layers=30,
            hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
            max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10_000.0, tie_word_embeddings=True)


def make(folder: pathlib.Path):
  from lmlib.interop import family, safetensors
  (folder / 'config.json').write_text(json.dumps(SAID))
  llama = family.find('llama')
  tensors, draw = family.tensors(llama, llama.read(family.Said(SAID))), np.random.default_rng(0)
  shapes = {name: (tensor.shape, np.dtype('bfloat16')) for name, tensor in tensors.items()}
  with safetensors.Writer(folder, shapes) as writer:
    for name, (shape, _) in shapes.items():
      writer.write(name, draw.standard_normal(shape, np.float32) * 0.02)
    writer.close()


def side(name: str, folder: str):
  """Prints the seconds of the call, and of the processor in the whole process."""
  if name == 'lmlib':
    import jax

    from lmlib import cli
    from lmlib.interop import hf
    cli.keep_memory()
    jax.devices()
    start = time.perf_counter()
    jax.block_until_ready(hf.load(folder)[1])
  else:
    import torch
    from transformers import LlamaForCausalLM
    start = time.perf_counter()
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
  print(time.perf_counter() - start, time.process_time())


def main():
  os.environ['PYTHONPATH'] = str(ROOT)
  sys.path.insert(0, str(ROOT))
  sides = ['lmlib'] + ['transformers'] * (importlib.util.find_spec('transformers') is not None)
  if len(sides) < 2:
    print('missing: transformers; pip install torch transformers')
  found = {name: {'process': [], 'call': [], 'processor': []} for name in sides}
  with tempfile.TemporaryDirectory() as folder:
    make(pathlib.Path(folder))
    for _ in range(ROUNDS):
      for name in sides:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, name, folder], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True, check=True)
        took = time.perf_counter() - start
        for values, value in zip(found[name].values(), (took, *map(float, done.stdout.split()[-2:]))):
          values.append(value)
  for name, kinds in found.items():
    print(f'{name:<14}' + ', '.join(f'{kind} {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})'
                                    for kind, values in kinds.items()))
  ratios = {kind: statistics.median(a / b for a, b in zip(values, found['transformers'][kind]))
            for kind, values in found['lmlib'].items()} if len(sides) > 1 else {}
  ratio = ratios.get('process')
  machine = f'{os.cpu_count()} cores, {platform.platform()}'
  print(json.dumps({'name': 'loading', 'goal': GOAL, 'ratio': ratio, 'holds': ratio and ratio <= GOAL,
                    'figures': found | {'ratios': ratios}, 'machine': machine}))


if __name__ == '__main__':
  if sys.argv[1:]:
    side(*sys.argv[1:])
  else:
    main()
