"""What decoding with a model costs: FLOPs, seconds to the first token and for each further one, memory, money, energy.

Greedy decoding of random tokens is timed twice in every repeat, for one new token and for all: the first time is that
to the first token, and their difference, divided by the other tokens, that of a token. What is reported is the median
of the repeats and their quartiles; the first repeat, which compiles, is not counted. Money and energy are arithmetic
with a price and a power that are given, not measured.
"""
from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from lmlib import trees
from lmlib.eval.candidate import Candidate
from lmlib.eval.scoreboard import Result
from lmlib.models import protocol
from lmlib.serve.generate import generate
from lmlib.train import metrics

Decode = Callable[[list[list[int]], int], Sequence[Sequence[int]]]  # (prompts, new tokens) -> so many tokens for each


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes."""
  weights: int
  cache: int  # of all rows, at their full length
  cache_of_token: float  # of one row, the mean over its length
  peak: int  # the most so far: on the first device, or of this process if that is a CPU

  @classmethod
  def of(cls, config: protocol.Config, params, batch: int, length: int) -> 'Memory':
    """Of decoding `batch` rows of `length` tokens; weights as they are, the cache by its shapes."""
    cache = trees.nbytes(jax.eval_shape(lambda: config.cache(batch, length)))
    return cls(trees.nbytes(params), cache, cache / (batch * length), metrics.peak_memory())


@dataclasses.dataclass(frozen=True)
class Score:
  """Seconds of every repeat, and what they were spent on."""
  first: tuple[float, ...]  # for one token behind every prompt
  whole: tuple[float, ...]  # for all
  prompt: int
  new: int
  batch: int
  memory: Memory | None = None
  flops: float | None = None  # a token, forward
  price_per_hour: float | None = None
  watts: float | None = None

  @property
  def token(self) -> tuple[float, ...]:
    """Seconds of a further token of all rows; of a tiny model with few new tokens the clock's noise is larger."""
    return tuple((whole - first) / (self.new - 1) for first, whole in zip(self.first, self.whole))

  @property
  def tokens_per_second(self) -> tuple[float, ...]:
    """New tokens of all rows a second, the time to the first included."""
    return tuple(self.batch * self.new / whole for whole in self.whole)

  def figures(self) -> dict:
    """What a report writes down: medians, and quartiles beside them; what was not given is left out."""
    speed = float(np.median(self.tokens_per_second))
    found = {**_spread('seconds_to_first_token', self.first), **_spread('seconds_per_token', self.token),
             **_spread('tokens_per_second', self.tokens_per_second), 'repeats': len(self.first),
             'prompt_tokens': self.prompt, 'new_tokens': self.new, 'batch': self.batch,
             'prompt_tokens_per_second': self.batch * self.prompt / float(np.median(self.first))}
    if self.memory is not None:
      found |= {f'{name}_bytes': size for name, size in dataclasses.asdict(self.memory).items()}
    if self.flops is not None:
      found |= {'flops_per_token': self.flops, 'prompt_flops_per_second': self.flops *
                found['prompt_tokens_per_second'], 'decoding_flops_per_second': self.flops * speed}
    if self.price_per_hour is not None:
      found['price_per_million_tokens'] = self.price_per_hour / 3600 / speed * 1e6
    if self.watts is not None:
      found |= {'joules_per_token': self.watts / speed, 'kwh_per_million_tokens': self.watts / speed / 3.6}
    return found

  def results(self, model: str, task: str = 'efficiency') -> list[Result]:
    """Medians, which stand alone: repeats of two models are no pairs."""
    found = self.figures()
    names = [('seconds_to_first_token', False), ('seconds_per_token', False), ('tokens_per_second', True),
             ('weights_bytes', False), ('cache_bytes', False), ('flops_per_token', False),
             ('price_per_million_tokens', False), ('joules_per_token', False)]
    return [Result(model, task, name.replace('_', ' '), (), alone=float(found[name]), higher_is_better=higher,
                   facts=found if name == 'seconds_to_first_token' else {}) for name, higher in names if name in found]


@dataclasses.dataclass(frozen=True)
class Efficiency:
  """The evaluation: how decoding is timed."""
  prompt: int = 128  # tokens
  new: int = 32
  batch: int = 1  # rows at once
  repeats: int = 5
  flops: Callable[[protocol.Config, int], float] | None = None  # such as plan.cost.Forward(); None: not counted
  price_per_hour: float | None = None  # of all devices in use, in any currency
  watts: float | None = None  # that they draw
  seed: int = 0
  name: str = 'efficiency'

  def check(self):
    """ValueError for settings that cannot be."""
    for name, least in (('prompt', 1), ('new', 2), ('batch', 1), ('repeats', 1)):
      if getattr(self, name) < least:
        raise ValueError(f'Efficiency.{name}={getattr(self, name)} must be at least {least}')
    for name in ('price_per_hour', 'watts'):
      if getattr(self, name) is not None and not getattr(self, name) > 0:
        raise ValueError(f'Efficiency.{name}={getattr(self, name)} must be positive; None: not said')

  def run(self, candidate: Candidate) -> list[Result]:
    """Of a candidate; nothing is taken from answers that are kept."""
    return self.timed(candidate.config, candidate.params).results(candidate.name, self.name)

  def timed(self, config: protocol.Config, params: Any, decode: Decode | None = None,
            clock: Callable[[], float] = time.perf_counter) -> Score:
    """The times of a model. decode: what is timed, generate() by default.

    ValueError where prompt and new exceed the model's length, and for a decoder that does not write all tokens.
    """
    if self.prompt + self.new > config.length:
      raise ValueError(f'Efficiency.prompt={self.prompt} and new={self.new} exceed the length={config.length} of the '
                       'model')
    if decode is None:
      decode = lambda prompts, new: generate(config, params, prompts, new=new, temperature=0.0)
    draw = np.random.default_rng(self.seed)
    prompts = draw.integers(0, config.vocab, (self.batch, self.prompt)).tolist()
    first, whole = [], []
    for _ in range(1 + self.repeats):
      for new, seconds in ((1, first), (self.new, whole)):
        start = clock()
        rows = decode(prompts, new)
        seconds.append(clock() - start)
        if [len(row) for row in rows] != [new] * self.batch:
          raise ValueError(f'{new} tokens were asked for behind each of {self.batch} prompts; there came '
                           f'{[len(row) for row in rows]}')
    flops = None if self.flops is None else self.flops(config, self.prompt + self.new)
    memory = Memory.of(config, params, self.batch, self.prompt + self.new)
    return Score(tuple(first[1:]), tuple(whole[1:]), self.prompt, self.new, self.batch, memory, flops,
                 self.price_per_hour, self.watts)


def _spread(name: str, values: Sequence[float]) -> dict:
  """The median, and the quartiles beside it."""
  low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
  return {name: middle, f'{name}_quartiles': [low, high]}
