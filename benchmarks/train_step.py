"""Training steps a second on CPU: lmlib beside transformers + torch, eager and compiled.

The same Llama-shaped model of 14 M weights (6 layers, width 384, 6 heads, hidden 1024, vocabulary 8192, tied),
batch 8 x 512, float32, AdamW, all cores. Each side is a process of its own; they take turns, so that a
machine that slows down slows all of them. A fourth side does nothing but the step's products with weights, as
XLA does them: what it leaves of a step is all that another program for the same compiler could gain. Needs
torch and transformers beside lmlib:

  pip install torch==2.13.0 transformers && python benchmarks/train_step.py
"""
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time

LAYERS, WIDTH, HIDDEN, HEADS, VOCAB, BATCH, LENGTH = 6, 384, 1024, 6, 8192, 8, 512
RATE, BETAS, DECAY = 3e-4, (0.9, 0.95), 0.1
ROUNDS, STEPS = 5, 3  # rounds of turns, steps a turn
GOAL = 1.25
BOUND = 'products alone'


def lmlib_step():
  """One step as experiments/pretrain.py makes it."""
  from lmlib import cli
  cli.quiet()
  cli.keep_memory()
  import jax
  import numpy as np

  from lmlib import sharding
  from lmlib.models import dense, protocol
  from lmlib.optim.adamw import AdamW
  from lmlib.optim.schedules import Constant
  from lmlib.train import losses
  from lmlib.train import step as step_of

  model = dense.Config(vocab=VOCAB, layers=LAYERS, width=WIDTH, hidden=HIDDEN, heads=HEADS, kv_heads=HEADS,
                       head_width=WIDTH // HEADS, length=LENGTH)
  optimizer = AdamW(Constant(RATE), beta1=BETAS[0], beta2=BETAS[1], decay=DECAY, decay_embedding=DECAY,
                    decay_vector=DECAY, clip=None)
  transformation = optimizer.transformation(sharding.letters(protocol.boxed(model)), 1000)
  state = step_of.init(model, transformation, jax.random.key(0))
  step = step_of.compiled(losses.NextToken().of(model), transformation, 1, step_of.shapes(model, transformation))
  tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1), np.int32)
  batch = jax.device_put({'tokens_BT': tokens_BT[:, :-1], 'targets_BT': tokens_BT[:, 1:],
                          'segments_BT': np.ones((BATCH, LENGTH), np.int32),
                          'weight_BT': np.ones((BATCH, LENGTH), np.float32)})

  def run():
    nonlocal state
    state, metrics = step(state, batch)
    return float(metrics['loss'])

  return run


def torch_step(compiled: bool):
  """One step of transformers' Llama with torch's fused AdamW."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.LlamaConfig(
      vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
      num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=LENGTH,
      tie_word_embeddings=True, use_cache=False, attn_implementation='sdpa')
  model = transformers.LlamaForCausalLM(config).float().train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)
  forward = torch.compile(model) if compiled else model
  tokens_BT = torch.randint(0, VOCAB, (BATCH, LENGTH + 1))
  inputs_BT, targets_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()

  def run():
    optimizer.zero_grad(set_to_none=True)
    logits_BTV = forward(input_ids=inputs_BT).logits
    loss = torch.nn.functional.cross_entropy(logits_BTV.view(-1, VOCAB), targets_BT.view(-1))
    loss.backward()
    optimizer.step()
    return loss.item()

  return run


def products_step():
  """The products of activations with weights of one step, forward and both gradients, and nothing else."""
  from lmlib import cli
  cli.quiet()
  cli.keep_memory()
  import jax

  M = BATCH * LENGTH
  block = [(WIDTH, WIDTH)] * 4 + [(WIDTH, HIDDEN)] * 2 + [(HIDDEN, WIDTH)]
  shapes = block * LAYERS + [(WIDTH, VOCAB)]
  keys = iter(jax.random.split(jax.random.key(0), 3 * len(shapes)))
  new = lambda *shape: jax.random.normal(next(keys), shape)
  arrays = [(new(M, i), new(i, o), new(M, o)) for i, o in shapes]
  products = jax.jit(lambda arrays: [(x @ w, dy @ w.T, x.T @ dy) for x, w, dy in arrays])
  return lambda: jax.block_until_ready(products(arrays))


SIDES = {'lmlib': lmlib_step, 'torch eager': lambda: torch_step(False), 'torch compiled': lambda: torch_step(True),
         BOUND: products_step}


def worker(side: str):
  """Warms up, then answers every line on standard input with the seconds of STEPS steps."""
  run = SIDES[side]()
  for _ in range(3):
    run()
  print('ready', flush=True)
  for _ in sys.stdin:
    seconds = []
    for _ in range(STEPS):
      start = time.perf_counter()
      run()
      seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds), flush=True)


def main():
  missing = [name for name in ('torch', 'transformers') if importlib.util.find_spec(name) is None]
  if missing:
    print(f'missing: {", ".join(missing)}; pip install torch==2.13.0 transformers')
  sides = [side for side in SIDES if side in ('lmlib', BOUND) or not missing]
  pipes = {side: subprocess.Popen([sys.executable, __file__, side], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  text=True) for side in sides}
  seconds = {side: [] for side in sides}
  for side in sides:
    if pipes[side].stdout.readline().strip() != 'ready':
      raise SystemExit(f'{side} did not start')
  for _ in range(ROUNDS):
    for side in sides:
      print('go', file=pipes[side].stdin, flush=True)
      seconds[side].append(statistics.median(json.loads(pipes[side].stdout.readline())))
  for pipe in pipes.values():
    pipe.communicate()
  speed = {side: [BATCH * LENGTH / s for s in values] for side, values in seconds.items()}
  for side, values in speed.items():
    print(f'{side:<16}{statistics.median(values):>10,.0f} tokens/s   ({min(values):,.0f} to {max(values):,.0f})')
  others = [side for side in sides if side not in ('lmlib', BOUND)]
  # Round by round against the better of the others in that round.
  ratios = [speed['lmlib'][i] / max(speed[side][i] for side in others) for i in range(ROUNDS)] if others else []
  ratio = statistics.median(ratios) if ratios else None
  bounds = [speed[BOUND][i] / max(speed[side][i] for side in others) for i in range(ROUNDS)] if others else []
  print(json.dumps({'name': 'train_step', 'goal': GOAL, 'ratio': ratio, 'holds': bool(ratio and ratio >= GOAL),
                    'figures': {side: statistics.median(values) for side, values in speed.items()}
                    | {'ratios': ratios, 'ratios of products alone': bounds},
                    'machine': f'{os.cpu_count()} cores, {platform.platform()}'}))


if __name__ == '__main__':
  worker(sys.argv[1]) if len(sys.argv) > 1 else main()
