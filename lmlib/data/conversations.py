"""Conversations to learn from: read, rendered by a chat template, packed whole; any batch is known by itself.

Where packing.py cuts a stream of documents into rows, an answer must keep its question: every example lies whole in
one row, best fit first (best-fit decreasing, Johnson 1973), and the examples of a row do not see each other. What a
row holds stays; each epoch has the rows in an order of its own.
"""
from collections.abc import Callable, Iterator
import dataclasses
import functools
import hashlib
import json
from typing import Any

import numpy as np

from lmlib.data import files, index, order
from lmlib.data.chat import ANSWERS, Chat, Example, messages_of
from lmlib.data.sources import matching
from lmlib.data.tokenizer import Tokenizer

ON_ERROR = ('refuse', 'skip')
SHOWN = 3  # of what was left out


@dataclasses.dataclass(frozen=True)
class JsonFiles:
  """Records of conversations in the files that match a glob, or one of several.

  A line of .jsonl (or .jsonl.gz), a row of .parquet, or an entry of the list in a .json is a record, in any of the
  forms of chat.messages_of: messages, ShareGPT, Alpaca.
  """
  glob: str | tuple[str, ...]

  def records(self) -> Iterator[tuple[str, dict]]:
    """(where, record), by file and line. ValueError, naming both, for what is no record."""
    for path in matching(self.glob, 'JsonFiles.glob'):
      if not path.endswith('.json'):
        yield from files.records(files.Piece(path))
        continue
      with files.readable(path), open(path, 'rb') as file:
        raw = files.decoded(file.read(), path)
      try:
        found = json.loads(raw)
      except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: not JSON: {error}') from error
      if not isinstance(found, list):
        raise ValueError(f'{path}: a JSON {type(found).__name__}, not a list of records')
      for number, record in enumerate(found, 1):
        if not isinstance(record, dict):
          raise ValueError(f'{path}, record {number}: a JSON {type(record).__name__}, not an object')
        yield f'{path}, record {number}', record


@dataclasses.dataclass(frozen=True)
class Conversations:
  """Which conversations, and how they become examples.

  A conversation is held out, or not, by the hash of what stands before its first answer: another order or more of
  them moves none, and no question is on both sides. With on_error='skip' one that cannot be learned from is left out
  and counted; nothing is left out or shortened in silence. Chat.length None is the length of a row.
  """
  source: Any  # has records(): pairs (where, record)
  chat: Chat = Chat()
  held_out: float = 0.05  # share of the conversations
  on_error: str = 'refuse'  # or 'skip'

  def __post_init__(self):
    if not 0 < self.held_out < 1:
      raise ValueError(f'Conversations.held_out={self.held_out} must lie between 0 and 1')
    if self.on_error not in ON_ERROR:
      raise ValueError(f'Conversations.on_error={self.on_error!r} must be one of {", ".join(ON_ERROR)}')

  def opened(self, tokenizer: Tokenizer, *, batch: int, length: int, seed: int, say: Callable = print) -> 'Material':
    """What is trained on, in rows of `length`, and what is held out. ValueError, naming file and line, for what is
    no conversation that can be learned from."""
    if self.chat.length is not None and self.chat.length > length:
      raise ValueError(f'Chat.length={self.chat.length} is longer than a row, length={length}')
    chat = self.chat if self.chat.length is not None else dataclasses.replace(self.chat, length=length)
    chat.check_tokenizer(tokenizer)
    found, left_out, shortened = [], [], [0, 0]
    for where, record in self.source.records():
      try:
        messages = messages_of(record)
        example = chat.example(messages, tokenizer)
      except ValueError as error:
        if self.on_error == 'refuse':
          raise ValueError(f'{where}: {error}') from error
        left_out.append((where, str(error)))
        continue
      shortened[0] += example.dropped > 0
      shortened[1] += example.cut > 0
      found.append((where, record['kind'] if isinstance(record.get('kind'), str) else '', messages, example))
    if len(found) < 2:
      why = f'; the first was left out: {": ".join(left_out[0])}' if left_out else ''
      raise ValueError(f'Conversations.source={self.source!r} has {len(found)} conversations to learn from, and '
                       f'two are needed, one to be held out{why}')
    ranks = np.array([rank(messages) for _, _, messages, _ in found], np.uint64)
    out = index.held_out(ranks, self.held_out)
    train = Examples.of([(where, example) for (where, *_, example), held in zip(found, out) if not held])
    held = tuple(Question(where, messages, example, kind) for (where, kind, messages, example), held
                 in zip(found, out) if held)
    say(told(train, held, left_out, shortened, chat))
    rows = Rows(train, batch, length, seed)
    return Material(rows, held, train.fingerprint, {
        'conversations': len(train), 'tokens': len(train.tokens), 'learned': int(train.learned.sum()),
        'rows': rows.rows_per_epoch, 'held_out': len(held), 'left_out': len(left_out), 'dropped': shortened[0],
        'cut': shortened[1]})


@dataclasses.dataclass(frozen=True)
class Question:
  """A conversation that is held out."""
  where: str
  messages: list
  example: Example
  kind: str = ''  # what its source calls it: scores are told by kind

  @property
  def size(self) -> int:
    """UTF-8 bytes of the answers."""
    return sum(len((message.get('content') or '').encode()) for message in self.messages
               if message['role'] == ANSWERS)


@dataclasses.dataclass(frozen=True)
class Material:
  """What a run of fine-tuning reads."""
  train: Any  # has batch_at(step) and describe(step)
  held_out: tuple  # of Question
  fingerprint: str  # of what is trained on
  facts: dict


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """Examples end to end."""
  names: tuple[str, ...]
  tokens: np.ndarray  # int32
  learned: np.ndarray  # bool: whether the token is one of an answer
  offsets: np.ndarray  # int64: example i is tokens offsets[i] to offsets[i + 1]

  @classmethod
  def of(cls, named: list[tuple[str, Example]]) -> 'Examples':
    sizes = [len(example) for _, example in named]
    return cls(tuple(name for name, _ in named), np.concatenate([example.tokens_T for _, example in named]),
               np.concatenate([example.weight_T > 0 for _, example in named]), np.cumsum([0, *sizes]))

  def __len__(self) -> int:
    return len(self.names)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of tokens, weights and borders, in hexadecimal."""
    hashed = hashlib.sha256()
    for array in (self.tokens.astype('<i4'), self.learned, self.offsets.astype('<i8')):
      hashed.update(array.tobytes())
    return hashed.hexdigest()


class Rows:
  """Batches of `batch` rows of `length` places, each of whole examples, for ever, epoch after epoch."""

  def __init__(self, examples: Examples, batch: int, length: int, seed: int):
    """ValueError if an example does not fit a row. The last token of an example is a target alone."""
    self._examples, self.batch, self._length, self._seed = examples, batch, length, seed
    size_N = np.diff(examples.offsets) - 1
    if (longest := int(size_N.max())) > length:
      raise ValueError(f'{examples.names[int(size_N.argmax())]}: {longest + 1} tokens do not fit a row of {length}')
    self._rows = packed(size_N, length, order.permute(np.arange(len(size_N)), len(size_N), seed=seed, epoch='rows'))
    self.rows_per_epoch = len(self._rows)

  def batch_at(self, step: int, rows: slice | np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The batch of a step, as packing.Batches.batch_at has it; weight_BT is 1 where the target is of an answer."""
    numbers = self._numbers(step)[slice(None) if rows is None else rows]
    B, T = len(numbers), self._length
    batch = {name: np.zeros((B, T), np.int32) for name in ('tokens_BT', 'targets_BT', 'segments_BT', 'positions_BT')}
    batch['weight_BT'] = np.zeros((B, T), np.float32)
    for b, number in enumerate(numbers.tolist()):
      at = 0
      for segment, i in enumerate(self._rows[number % self.rows_per_epoch], 1):
        start, stop = self._examples.offsets[i:i + 2].tolist()
        here = slice(at, at + stop - start - 1)
        batch['tokens_BT'][b, here] = self._examples.tokens[start:stop - 1]
        batch['targets_BT'][b, here] = self._examples.tokens[start + 1:stop]
        batch['weight_BT'][b, here] = self._examples.learned[start + 1:stop]
        batch['segments_BT'][b, here], batch['positions_BT'][b, here] = segment, np.arange(stop - start - 1)
        at = here.stop
    return batch | {'row_B': (numbers % 2**32).astype(np.uint32)}

  def describe(self, step: int) -> list[str]:
    """For each row of a step, the examples in it: 'row 17: a.jsonl, line 3; a.jsonl, line 9'."""
    return [f'row {number}: ' + '; '.join(self._examples.names[i] for i in self._rows[number % self.rows_per_epoch])
            for number in self._numbers(step).tolist()]

  def _numbers(self, step: int) -> np.ndarray:
    """Of each row of a step, epoch * rows + its place in the packing."""
    visit_B, n = step * self.batch + np.arange(self.batch, dtype=np.int64), self.rows_per_epoch
    number_B = np.empty_like(visit_B)
    for epoch in np.unique(visit_B // n).tolist():
      here = visit_B // n == epoch
      number_B[here] = epoch * n + order.permute(visit_B[here] % n, n, seed=self._seed, epoch=epoch)
    return number_B


def packed(size_N, length: int, first_N) -> list[list[int]]:
  """Rows of the numbers of examples whose sizes sum to at most `length`; of equal size those first in `first_N`."""
  rows, room, known = [], [[] for _ in range(length + 1)], 0  # room[c]: rows with c places left; bit c: there are any
  for i in first_N[np.argsort(-size_N[first_N], kind='stable')].tolist():
    size = int(size_N[i])
    if fits := known >> size:
      capacity = size + (fits & -fits).bit_length() - 1
      row = room[capacity].pop()
      known ^= 0 if room[capacity] else 1 << capacity
    else:
      capacity, row = length, len(rows)
      rows.append([])
    rows[row].append(i)
    if capacity > size:
      room[capacity - size].append(row)
      known |= 1 << capacity - size
  return rows


def rank(messages: list[dict]) -> int:
  """A number of 64 bits from what stands before the first answer."""
  first = next(i for i, message in enumerate(messages) if message['role'] == ANSWERS)
  said = json.dumps([[message['role'], message.get('content')] for message in messages[:first]])
  return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], 'big')


def told(train: Examples, held, left_out, shortened, chat: Chat) -> str:
  """How much there is, and what was left out or shortened, with the first few shown."""
  lines = [f'{"data":<12}{len(train):,} conversations of {len(train.tokens):,} tokens, of which '
           f'{int(train.learned.sum()):,} are answers; {len(held):,} more are held out']
  if shortened[0]:
    lines.append(f'shortened   {shortened[0]:,} conversations lost their oldest turns to fit {chat.length} tokens')
  if shortened[1]:
    lines.append(f'shortened   {shortened[1]:,} conversations lost text of questions to fit {chat.length} tokens')
  if left_out:
    lines.append(f'left out    {len(left_out):,} conversations: '
                 + '; '.join(': '.join(pair) for pair in left_out[:SHOWN]))
  return '\n'.join(lines)
