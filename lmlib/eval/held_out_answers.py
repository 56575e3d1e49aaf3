"""How well a model answers held-out questions, and whether it does so better than before it was tuned.

Three measures: nats a token of the reference answers; the share of answers, written greedily, that are the reference
to the letter; and of those that name it somewhere, so that a model which knows and only chats has its due. Both models
are asked the same questions, so differences are paired: their intervals are of the bootstrap over questions (Efron
1979; Koehn 2004), and say what other questions of the kind would have given.
"""
from collections.abc import Callable
import dataclasses
import json
import math
import os
import pathlib
import re

import jax
import numpy as np

from lmlib import processes, sharding
from lmlib.data import chat
from lmlib.data.tokenizer import Tokenizer
from lmlib.models import protocol
from lmlib.serve import weights
from lmlib.serve.generate import generate
from lmlib.train.losses import NextToken

ROUND = 64  # rows are padded to a multiple of this, so that few lengths compile
DRAWS, LEVEL = 2000, 0.95  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class Exact:
  """Answers are written, up to `new` tokens each, to the first `questions` of those held out (None: all)."""
  new: int = 32
  questions: int | None = None

  def __post_init__(self):
    for name in ('new', 'questions'):
      value = getattr(self, name)
      if not (isinstance(value, int) and value > 0) and not (name == 'questions' and value is None):
        raise ValueError(f'Exact.{name}={value!r} must be a positive number')


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
  """Of every question, in their order."""
  nats_N: np.ndarray  # of all answer tokens together, float
  tokens_N: np.ndarray
  written: tuple[str, ...] = ()  # answers, of as many of the first questions as were to be answered
  right_N: np.ndarray | None = None  # of these, whether it is the reference
  named_N: np.ndarray | None = None  # and whether the reference stands in it

  def to_json(self) -> dict:
    """Everything, as JSON values."""
    listed = lambda x: None if x is None else x.tolist()
    return {'nats': self.nats_N.tolist(), 'tokens': self.tokens_N.tolist(), 'written': list(self.written),
            'right': listed(self.right_N), 'named': listed(self.named_N)}

  @classmethod
  def from_json(cls, found: dict) -> 'Score':
    array = lambda name: None if found[name] is None else np.array(found[name], bool)
    return cls(np.array(found['nats']), np.array(found['tokens']), tuple(found['written']), array('right'),
               array('named'))


def score(config: protocol.Config, params, questions, tokenizer: Tokenizer, exact: Exact | None = None, *,
          batch: int = 8) -> Score:
  """The Score of a model on `questions`, each with an `example` (data/conversations.py, data/continuation.py)."""
  nats_N = nats(config, params, [question.example for question in questions], batch=batch)
  tokens_N = np.array([int((question.example.weight_T[1:] > 0).sum()) for question in questions])
  if exact is None:
    return Score(nats_N, tokens_N)
  asked = [parts(question.example, tokenizer) for question in questions[:exact.questions]]
  found = written(config, params, asked, tokenizer, exact.new, batch)
  right_N = np.array([said.strip() == reference.strip() for said, (_, reference, _) in zip(found, asked)])
  named_N = np.array([names(said, reference) for said, (_, reference, _) in zip(found, asked)])
  return Score(nats_N, tokens_N, tuple(found), right_N, named_N)


def names(said: str, reference: str) -> bool:
  """Whether a reference stands in what was said as words of its own, in whatever case."""
  return re.search(rf'(?<!\w){re.escape(reference.strip())}(?!\w)', said, re.IGNORECASE) is not None


def kept(path: pathlib.Path, make: Callable[[], Score], say: Callable) -> Score:
  """The Score in a file; if there is none, what make() gives, which is then written there."""
  known = processes.told(path.name, lambda: json.loads(path.read_text()) if path.exists() else None)
  if known is None:
    say('scoring the held-out examples before tuning')
    known = (made := make()).to_json()
    if processes.first():
      write(path, made)
  return Score.from_json(known)


def write(path: pathlib.Path, score: Score):
  """Writes a Score to a file, whole or not at all."""
  fresh = path.with_name(f'{path.name}.tmp')
  fresh.write_text(json.dumps(score.to_json()) + '\n')
  os.replace(fresh, path)


def nats(config: protocol.Config, params, examples: list[chat.Example], *, batch: int) -> np.ndarray:
  """Of each example the nats of what is learned of it, float64."""
  loss = NextToken().of(config)
  of_row = lambda params, row: loss(params, jax.tree.map(lambda x: x[None], row))[2]['nats']
  of_rows = jax.jit(lambda params, rows: jax.lax.map(lambda row: of_row(params, row), rows))
  out = np.zeros(len(examples))
  by_size = sorted(range(len(examples)), key=lambda i: len(examples[i]))
  for first in range(0, len(by_size), batch):
    here = by_size[first:first + batch]
    width = -(-(len(examples[here[-1]]) - 1) // ROUND) * ROUND
    rows = {name: np.zeros((batch, width), np.int32) for name in ('tokens_BT', 'targets_BT', 'segments_BT')}
    rows['weight_BT'] = np.zeros((batch, width), np.float32)
    for b, i in enumerate(here):
      example, size = examples[i], len(examples[i]) - 1
      rows['tokens_BT'][b, :size], rows['targets_BT'][b, :size] = example.tokens_T[:-1], example.tokens_T[1:]
      rows['weight_BT'][b, :size], rows['segments_BT'][b, :size] = example.weight_T[1:] > 0, 1
    out[here] = sharding.fetched(of_rows(params, rows))[:len(here)]
  return out


def parts(example: chat.Example, tokenizer: Tokenizer) -> tuple[list[int], str, int]:
  """What the model is given to write the last answer, the reference, and the token that ends it."""
  start, stop = [run for run in chat.runs(example.weight_T > 0) if example.weight_T[run[0]] > 0][-1]
  ids = example.tokens_T[start:stop]
  return example.tokens_T[:start].tolist(), tokenizer.decode(ids[:-1], continues=True), int(ids[-1])


def written(config: protocol.Config, params, asked, tokenizer: Tokenizer, new: int, batch: int) -> list[str]:
  """The greedy answer to each of `asked`, triples of parts(). ValueError for a prompt that leaves no room."""
  if jax.default_backend() == 'cpu':
    config, params = weights.laid_out(config, params)
  out = [''] * len(asked)
  by_size = sorted(range(len(asked)), key=lambda i: len(asked[i][0]))
  for first in range(0, len(by_size), batch):
    here = by_size[first:first + batch]
    prompts = [asked[i][0] for i in here]
    # As many rows each time, and one end: conversations of one template end in one token.
    rows = generate(config, params, prompts + prompts[:1] * (batch - len(here)), new=new, eos=asked[here[0]][2],
                    temperature=0.0)
    for i, row in zip(here, rows):
      out[i] = tokenizer.decode([token for token in row if token < tokenizer.vocab], continues=True)
  return out


def paired(before_N, after_N, weights_N=None, *, seed: int = 0) -> tuple[float, float, float]:
  """(after less before, low, high): the difference of means, weighted ones of sums over weights, and its interval."""
  gap_N = np.asarray(after_N, float) - np.asarray(before_N, float)
  weights_N = np.ones(len(gap_N)) if weights_N is None else np.asarray(weights_N, float)
  random, drawn = np.random.default_rng(seed), []
  for _ in range(DRAWS):
    index_N = random.integers(0, len(gap_N), len(gap_N))
    drawn.append(gap_N[index_N].sum() / weights_N[index_N].sum())
  low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return gap_N.sum() / weights_N.sum(), float(low), float(high)


def compared(before: Score, after: Score, questions) -> list[dict]:
  """A row a measure, and of exact answers one more a kind: measure, questions, before, after, difference, low, high.

  Of texts, whose bytes are known and which nobody answers, bits a byte are a measure too.
  """
  rows = [_row('nats a token', before.nats_N, after.nats_N, before.tokens_N)]
  if not questions[0].messages:
    size_N = np.array([question.size for question in questions])
    rows.append(_row('bits a byte', before.nats_N / math.log(2), after.nats_N / math.log(2), size_N))
  if before.right_N is not None:
    kinds = np.array([question.kind for question in questions[:len(before.right_N)]])
    rows += [_row('exact answers', before.right_N, after.right_N), _row('named in it', before.named_N, after.named_N)]
    if len(set(kinds.tolist())) > 1:
      rows += [_row(f'exact, {kind}', before.right_N[kinds == kind], after.right_N[kinds == kind])
               for kind in dict.fromkeys(kinds.tolist())]
  return rows


def _row(measure: str, before_N, after_N, weights_N=None) -> dict:
  total = len(before_N) if weights_N is None else weights_N.sum()
  difference, low, high = paired(before_N, after_N, weights_N)
  return {'measure': measure, 'questions': len(before_N), 'before': float(before_N.sum() / total),
          'after': float(after_N.sum() / total), 'difference': float(difference), 'low': low, 'high': high}
