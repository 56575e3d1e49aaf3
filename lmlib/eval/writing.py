"""A model that continues texts, for evaluations that read what it writes: prompts of like length go together."""
from collections.abc import Collection, Iterator, Sequence
import dataclasses
from typing import Any

from lmlib.data.tokenizer import Tokenizer
from lmlib.models import protocol
from lmlib.serve.generate import generate


@dataclasses.dataclass(frozen=True)
class Writer:
  """writer(prompts) -> one text for each, up to `new` tokens, before the end of text and the first of `stops`."""
  config: protocol.Config
  params: Any
  tokenizer: Tokenizer
  new: int = 256
  stops: tuple[str, ...] = ()
  temperature: float = 0.0  # 0: greedy
  top_k: int | None = None
  seed: int = 0
  batch: int = 16

  def __call__(self, prompts: Sequence[str]) -> list[str]:
    """The text behind each prompt, without it. ValueError where `new` leaves no room for a prompt."""
    return self.behind([self.tokenizer.prompt(prompt) for prompt in prompts])

  def behind(self, prompts: Sequence[Sequence[int]]) -> list[str]:
    """As a call, of tokens. Of too long a prompt the end is read."""
    found = dict(pair for done in self.batches(prompts) for pair in done)
    return [found[i] for i in range(len(prompts))]

  def batches(self, prompts: Sequence[Sequence[int]], done: Collection[int] = ()) -> Iterator[list[tuple[int, str]]]:
    """The places of prompts with their texts as batches are written; those whose places are all `done` are left out.

    A batch draws from a seed of its own, so the texts are what they are without leaving any out.
    """
    room = self.config.length - self.new
    if room < 1:
      raise ValueError(f"Writer.new={self.new} leaves no room for a prompt in the model's length={self.config.length}")
    if self.batch < 1:
      raise ValueError(f'Writer.batch={self.batch} must be at least 1 prompt')
    rows = [list(prompt)[-room:] or [self.tokenizer.eos] for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for number, first in enumerate(range(0, len(order), self.batch)):
      chosen = order[first:first + self.batch]
      if all(i in done for i in chosen):
        continue
      given = [rows[i] for i in chosen]
      given += given[-1:] * (self.batch - len(given))  # the last batch has the shape of the others
      written = generate(self.config, self.params, given, new=self.new, eos=self.tokenizer.eos,
                         temperature=self.temperature, top_k=self.top_k, seed=self.seed + number)
      yield [(i, cut(self._text(ids), self.stops)) for i, ids in zip(chosen, written)]

  def _text(self, ids) -> str:
    """What ids stand for; a model may score more ids than its tokeniser has, which stand for nothing."""
    return self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab], continues=True)


def cut(text: str, stops: Sequence[str]) -> str:
  """The text before the first of `stops`."""
  return text[:min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]
