"""A training step of 1.2 billion weights on one GPU: lmlib beside transformers under torch.compile with SDPA.

  python benchmarks/train_gpu.py          on a machine with an H100 or H200, jax[cuda13], torch and transformers

The shape of Llama 3.2 1B (16 layers, width 2048, 32 heads on 8 of width 64, hidden 8192, vocabulary 128,256, tied),
4 rows of 2048 tokens, weights and AdamW in float32, activations in bfloat16. lmlib's rows are packed ones, of one
document each, by each kernel of attention; torch's know no documents. Each side is a process of its own, one after
the other, since they do not fit in memory together. MFU counts the FLOPs that lmlib.plan.cost counts, for all sides,
of the maker's dense bfloat16 peak.
"""
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, VOCAB, BATCH, LENGTH = 16, 2048, 8192, 32, 8, 128256, 4, 2048
RATE, BETAS, DECAY = 3e-4, (0.9, 0.95), 0.1
WARM, STEPS = 4, 20
KERNELS = ('hopper', 'gpu', 'blocked')
os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.92')


def model(attention: str):
  """lmlib's model of that shape."""
  from lmlib.models import dense
  from lmlib.nn.decoder import Ends
  from lmlib.nn.stack import Execution
  return dense.Config(vocab=VOCAB, layers=LAYERS, width=WIDTH, hidden=HIDDEN, heads=HEADS, kv_heads=KV_HEADS,
                      head_width=WIDTH // HEADS, length=LENGTH, ends=Ends(tied=True),
                      execution=Execution(dtype='bfloat16', attention=attention))


def lmlib_step(attention: str):
  """One step as experiments/pretrain.py makes it."""
  import jax
  import numpy as np

  from lmlib import sharding
  from lmlib.models import protocol
  from lmlib.optim.adamw import AdamW
  from lmlib.optim.schedules import Constant
  from lmlib.train import losses
  from lmlib.train import step as step_of

  config = model(attention)
  optimizer = AdamW(Constant(RATE), beta1=BETAS[0], beta2=BETAS[1], decay=DECAY, decay_embedding=DECAY,
                    decay_vector=DECAY, clip=None)
  transformation = optimizer.transformation(sharding.letters(protocol.boxed(config)), 1000)
  state = step_of.init(config, transformation, jax.random.key(0))
  step = step_of.compiled(losses.NextToken().of(config), transformation, 1, step_of.shapes(config, transformation))
  tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1), np.int32)
  batch = jax.device_put({'tokens_BT': tokens_BT[:, :-1], 'targets_BT': tokens_BT[:, 1:],
                          'segments_BT': np.ones((BATCH, LENGTH), np.int32),
                          'weight_BT': np.ones((BATCH, LENGTH), np.float32)})

  def run():
    nonlocal state
    state, metrics = step(state, batch)
    return float(metrics['loss'])

  peak = lambda: jax.devices()[0].memory_stats()['peak_bytes_in_use']
  return run, peak


def torch_step():
  """One step of transformers' Llama under torch.compile, float32 weights under bfloat16 autocast, fused AdamW."""
  import torch
  import transformers

  torch.manual_seed(0)
  torch.set_float32_matmul_precision('high')
  config = transformers.LlamaConfig(
      vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
      num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=LENGTH,
      tie_word_embeddings=True, use_cache=False, attn_implementation='sdpa')
  with torch.device('cuda'):
    network = transformers.LlamaForCausalLM(config).float().train()
  optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)
  tokens_BT = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), device='cuda')
  inputs_BT, targets_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()

  @torch.compile
  def loss_of(inputs_BT, targets_BT):
    with torch.autocast('cuda', torch.bfloat16):
      logits_BTV = network(input_ids=inputs_BT).logits
    return torch.nn.functional.cross_entropy(logits_BTV.float().view(-1, VOCAB), targets_BT.view(-1))

  def run():
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(inputs_BT, targets_BT)
    loss.backward()
    optimizer.step()
    return loss.item()

  return run, torch.cuda.max_memory_allocated


def worker(side: str) -> None:
  """Times the steps of one side: a JSON object as the last line."""
  run, peak = torch_step() if side == 'torch' else lmlib_step(side)
  start = time.perf_counter()
  first = [run() for _ in range(WARM)]
  ready, taken = time.perf_counter() - start, []
  for _ in range(STEPS):
    start = time.perf_counter()
    last = run()
    taken.append(time.perf_counter() - start)
  print(json.dumps({'seconds': statistics.median(taken), 'range': [min(taken), max(taken)], 'warm': ready,
                    'losses': [first[0], last], 'GB': peak() / 1e9}))


def main() -> None:
  """Every side in turn, a table, and one JSON object as the last line."""
  os.environ['JAX_PLATFORMS'] = 'cpu'  # here: the GPU is for the sides alone
  from lmlib.plan import chips, cost
  work = cost.train_flops(model('auto'), LENGTH).exact * BATCH * LENGTH
  there = {**os.environ, 'JAX_PLATFORMS': 'cuda'}
  missing = [name for name in ('torch', 'transformers') if importlib.util.find_spec(name) is None]
  if missing:
    print(f'missing: {", ".join(missing)}')
  machine = subprocess.run([sys.executable, '-c', 'import jax; print(jax.devices()[0].device_kind)'],
                           capture_output=True, text=True, env=there).stdout.strip()
  if not machine:
    print('missing: a GPU and jax[cuda13]')
  figures = {}
  for side in (*KERNELS, *([] if missing else ['torch'])) if machine else ():
    done = subprocess.run([sys.executable, __file__, side], capture_output=True, text=True, env=there)
    if done.returncode:
      print(f'{side} failed: {done.stderr[-600:]}', flush=True)
      continue
    figures[side] = found = json.loads(done.stdout.splitlines()[-1])
    found['tokens/s'] = BATCH * LENGTH / found['seconds']
    found['MFU'] = work / found['seconds'] / chips.PEAK[machine] if machine in chips.PEAK else None
    print(f"{side:<10}{found['seconds'] * 1e3:>8.1f} ms a step ({found['range'][0] * 1e3:.1f} to "
          f"{found['range'][1] * 1e3:.1f}) {found['tokens/s']:>9,.0f} tokens/s  MFU {found['MFU'] or 0:.1%}  "
          f"{found['GB']:.1f} GB  loss {found['losses'][0]:.3f} to {found['losses'][1]:.3f}  "
          f"ready in {found['warm']:.0f} s", flush=True)
  ratio = figures['torch']['seconds'] / figures['hopper']['seconds'] if {'torch', 'hopper'} <= figures.keys() else None
  print(json.dumps({'name': 'train_gpu', 'goal': 1.0, 'ratio': ratio, 'holds': bool(ratio and ratio >= 1.0),
                    'figures': figures, 'machine': machine}))


if __name__ == '__main__':
  worker(sys.argv[1]) if len(sys.argv) > 1 else main()
