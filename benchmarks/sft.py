"""Steps of LoRA a second on CPU: lmlib beside peft + transformers + torch.

The shape of SmolLM2-135M (30 layers, width 576, 9 heads of which 3 have keys, hidden 1536, vocabulary 49152, tied),
random weights, rank 8 on all matrices of the blocks, batch 4 x 256, float32, AdamW, all cores. Each side is a process
of its own; they take turns, so that a machine that slows down slows both. Needs torch, transformers and peft:

  pip install torch==2.13.0 transformers peft && python benchmarks/sft.py
"""
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time

LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, VOCAB, BATCH, LENGTH = 30, 576, 1536, 9, 3, 49152, 4, 256
RANK, ALPHA, RATE = 8, 16, 2e-4
ROUNDS, STEPS = 5, 1  # rounds of turns, steps a turn
GOAL = 1.2


def lmlib_step():
  """One step of LoRA as nn/adapters.py and train/step.py make it."""
  from lmlib import cli
  cli.quiet()
  cli.keep_memory()
  import jax
  import numpy as np

  from lmlib import sharding
  from lmlib.models import dense, protocol
  from lmlib.nn import adapters
  from lmlib.nn.lora import Lora
  from lmlib.optim.adamw import AdamW
  from lmlib.optim.schedules import Constant
  from lmlib.train import losses
  from lmlib.train import step as step_of

  model = dense.Config(vocab=VOCAB, layers=LAYERS, width=WIDTH, hidden=HIDDEN, heads=HEADS, kv_heads=KV_HEADS,
                       head_width=WIDTH // HEADS, length=LENGTH)
  method, base_boxed = Lora(RANK, ALPHA, None), protocol.boxed(model)
  boxed, base = adapters.boxed(method, base_boxed), protocol.init(model, jax.random.key(0))
  transformation = AdamW(Constant(RATE), decay=None, clip=None).transformation(sharding.letters(boxed), 1000)
  shapes = step_of.shapes_of(boxed, transformation)
  small = adapters.new(method, base_boxed, base, jax.random.key(1))
  state = step_of.begun(small, transformation, shapes)
  step = step_of.compiled(adapters.loss_of(model, method, losses.NextToken().of(model)), transformation, 1, shapes)
  tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1), np.int32)
  batch = jax.device_put({'tokens_BT': tokens_BT[:, :-1], 'targets_BT': tokens_BT[:, 1:],
                          'segments_BT': np.ones((BATCH, LENGTH), np.int32),
                          'weight_BT': np.ones((BATCH, LENGTH), np.float32)})

  def run():
    nonlocal state
    state, metrics = step(state, batch, base)
    return float(metrics['loss'])

  return run


def peft_step():
  """One step of peft's LoRA on transformers' Llama with torch's fused AdamW."""
  import peft
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.LlamaConfig(
      vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
      num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=LENGTH,
      tie_word_embeddings=True, use_cache=False, attn_implementation='sdpa')
  model = peft.get_peft_model(transformers.LlamaForCausalLM(config).float(), peft.LoraConfig(
      r=RANK, lora_alpha=ALPHA, target_modules='all-linear', task_type='CAUSAL_LM')).train()
  trained = [x for x in model.parameters() if x.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
  tokens_BT = torch.randint(0, VOCAB, (BATCH, LENGTH + 1))
  inputs_BT, targets_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()

  def run():
    optimizer.zero_grad(set_to_none=True)
    logits_BTV = model(input_ids=inputs_BT).logits
    loss = torch.nn.functional.cross_entropy(logits_BTV.view(-1, VOCAB), targets_BT.view(-1))
    loss.backward()
    optimizer.step()
    return loss.item()

  return run


SIDES = {'lmlib': lmlib_step, 'peft': peft_step}


def worker(side: str):
  """Warms up, then answers every line on standard input with the seconds of STEPS steps."""
  run = SIDES[side]()
  for _ in range(2):
    run()
  print('ready', flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    for _ in range(STEPS):
      run()
    print((time.perf_counter() - start) / STEPS, flush=True)


def main():
  missing = [name for name in ('torch', 'transformers', 'peft') if importlib.util.find_spec(name) is None]
  if missing:
    print(f'missing: {", ".join(missing)}; pip install torch==2.13.0 transformers peft')
  sides = [side for side in SIDES if side == 'lmlib' or not missing]
  pipes, seconds = {}, {side: [] for side in sides}
  for side in sides:  # one after the other: compiling next to a warm-up would disturb it
    pipes[side] = subprocess.Popen([sys.executable, __file__, side], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)
    if pipes[side].stdout.readline().strip() != 'ready':
      raise SystemExit(f'{side} did not start')
  for _ in range(ROUNDS):
    for side in sides:
      print('go', file=pipes[side].stdin, flush=True)
      seconds[side].append(float(pipes[side].stdout.readline()))
  for pipe in pipes.values():
    pipe.communicate()
  speed = {side: [BATCH * LENGTH / s for s in values] for side, values in seconds.items()}
  for side, values in speed.items():
    print(f'{side:<8}{statistics.median(values):>10,.0f} tokens/s   ({min(values):,.0f} to {max(values):,.0f})')
  ratios = [a / b for a, b in zip(speed['lmlib'], speed['peft'])] if 'peft' in speed else []
  ratio = statistics.median(ratios) if ratios else None
  print(json.dumps({'name': 'sft', 'goal': GOAL, 'ratio': ratio, 'holds': bool(ratio and ratio >= GOAL),
                    'figures': {side: statistics.median(values) for side, values in speed.items()} | {'ratios': ratios},
                    'machine': f'{os.cpu_count()} cores, {platform.platform()}'}))


if __name__ == '__main__':
  worker(sys.argv[1]) if len(sys.argv) > 1 else main()
