"""Plain text to go on pretraining with, cut by the tokeniser of the model that goes on: what conversations.py is to
conversations. Packed as in pretraining; whole documents are held out."""
from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

import numpy as np

from lmlib.data import packing
from lmlib.data.chat import Example
from lmlib.data.conversations import Material
from lmlib.data.prepare import Corpus, default_cache, prepare
from lmlib.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Taken:
  """The tokeniser of a model, from a file that lmlib saved. bos and eos may be one mark: stores know borders."""
  path: str

  @property
  def pieces(self) -> int:
    return Tokenizer.load(self.path).vocab

  def identity(self) -> dict:
    """All that the outcome depends on: the content of the file, wherever it lies."""
    return {'way': 'Taken', 'tokenizer': Tokenizer.load(self.path).fingerprint}

  def train(self, texts=(), characters: int = 0) -> Tokenizer:
    """The tokeniser; texts are not looked at."""
    return Tokenizer.load(self.path)


@dataclasses.dataclass(frozen=True)
class Text:
  """Documents of `source` (data/sources.py) for continued pretraining."""
  source: Any
  held_out: float = 0.05  # share of the documents, by the hash of their names
  packing: Any = packing.Split()
  stages: tuple = ()  # of cleaning

  def opened(self, tokenizer: Tokenizer, *, batch: int, length: int, seed: int, say: Callable = print) -> Material:
    """What is trained on, in rows of `length`, and what is held out, in windows of as many tokens."""
    path = pathlib.Path(default_cache()) / 'tokenizers' / f'{tokenizer.fingerprint[:32]}.model'
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      tokenizer.save(fresh := path.with_suffix('.tmp'))
      fresh.rename(path)
    prepared = prepare(Corpus(self.source, Taken(str(path)), self.held_out, self.stages), say=say)
    say(prepared.table())
    batches = packing.Batches(prepared.train, batch, length, seed, self.packing)
    held = [window for number, (ids, size) in enumerate(prepared.held_out.scored())
            for window in windows(prepared.held_out.names[number], ids, size, length)]
    return Material(batches, tuple(held), prepared.train.fingerprint, {
        'documents': prepared.train.documents, 'tokens': prepared.train.tokens, 'learned': prepared.train.tokens,
        'held_out': prepared.held_out.documents})


@dataclasses.dataclass(frozen=True)
class Window:
  """A stretch of a held-out document. Its first token is read and not scored."""
  where: str
  example: Example
  size: float  # its share of the bytes of the document
  kind = ''
  messages = ()


def windows(name: str, ids, size: int, length: int) -> list[Window]:
  """A document in stretches of at most `length` scored tokens, each token scored once."""
  found = []
  for start in range(0, len(ids) - 1, length):
    part = np.asarray(ids[start:start + length + 1], np.int32)
    weight_T = np.ones(len(part), np.float32)
    weight_T[0] = 0
    found.append(Window(f'{name}: tokens {start}..{start + len(part) - 1}', Example(part, weight_T),
                        size * (len(part) - 1) / (len(ids) - 1)))
  return found
