"""A model under evaluation: what it is asked, and the answers that it has given already."""
from collections.abc import Callable, Iterable, Sequence
import dataclasses
from typing import Any

from lmlib.data.chat import Chat
from lmlib.data.tokenizer import Tokenizer
from lmlib.eval import loglikelihood, perplexity
from lmlib.eval.answers import Answers
from lmlib.eval.loglikelihood import Likelihood, Request
from lmlib.eval.writing import Writer
from lmlib.models import protocol


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Answers requests of every kind, each once: what `answers` has is not computed again."""
  name: str
  config: protocol.Config
  params: Any
  tokenizer: Tokenizer
  answers: Answers = dataclasses.field(default_factory=Answers)
  chat: Chat = Chat()

  def __post_init__(self):
    if protocol.encodes(self.config) or not protocol.decodes(self.config):
      raise ValueError(f'{self.name}: {type(self.config).__module__} is no decoder alone, which evaluations need')
    if self.tokenizer.vocab > self.config.vocab:
      raise ValueError(f'{self.name}: the tokenizer has {self.tokenizer.vocab} ids, the model embeds '
                       f'vocab={self.config.vocab}')

  def likelihoods(self, requests: Iterable[Request], *, batch: int = 16) -> list[Likelihood]:
    """As loglikelihood.score."""
    given = list(requests)
    said = lambda one: [list(one.context), list(one.continuation)]
    found = {one: Likelihood(*known) for one in dict.fromkeys(given)
             if (known := self.answers.find('likelihood', said(one))) is not None}
    missing = [one for one in given if one not in found]
    for done in loglikelihood.each(self.config, self.params, missing, batch=batch):
      self.answers.add('likelihood', [(said(one), dataclasses.astuple(answer)) for one, answer in done])
      found |= dict(done)
    return [found[one] for one in given]

  def texts(self, prompts: Sequence[Sequence[int]], *, batch: int = 16, **settings) -> list[str]:
    """As Writer.behind, of tokens; settings: new, stops, temperature, top_k, seed, as Writer has them."""
    writer = Writer(self.config, self.params, self.tokenizer, batch=batch, **settings)
    named = {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(settings.items())}
    times, requests = {}, []
    for prompt in map(tuple, prompts):  # one prompt several times is as many requests
      times[prompt] = times.get(prompt, -1) + 1
      requests.append([list(prompt), named, times[prompt]])
    found = {i: text for i, one in enumerate(requests) if (text := self.answers.find('text', one)) is not None}
    for done in writer.batches(prompts, found.keys()):
      self.answers.add('text', [(requests[i], text) for i, text in done if i not in found])
      found = dict(done) | found
    return [found[i] for i in range(len(requests))]

  def writer(self, *, chat: bool = False, **settings) -> Callable[[Sequence[str]], list[str]]:
    """A function that continues texts, or with `chat` answers each as a user's turn; settings as for texts()."""
    turned = lambda text: self.chat.prompt([{'role': 'user', 'content': text}], self.tokenizer).tolist()
    return lambda prompts: self.texts([turned(text) if chat else self.tokenizer.prompt(text) for text in prompts],
                                      **settings)

  def documents(self, documents: Sequence[tuple], *, length: int, stride: int,
                batch: int = 8) -> list[perplexity.Score]:
    """As perplexity.each."""
    said = lambda ids, *sizes: [list(map(int, ids)), *map(int, sizes), length, stride]
    found = {i: perplexity.Score(*known) for i, one in enumerate(documents)
             if (known := self.answers.find('document', said(*one))) is not None}
    missing = [i for i in range(len(documents)) if i not in found]
    scores = perplexity.each(self.config, self.params, (documents[i] for i in missing), length=length, stride=stride,
                             batch=batch)
    for i, score in zip(missing, scores, strict=True):
      self.answers.add('document', [(said(*documents[i]), dataclasses.astuple(score))])
      found[i] = score
    return [found[i] for i in range(len(documents))]
