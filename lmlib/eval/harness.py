"""lmlib's models under the lm-evaluation-harness (EleutherAI): any of its tasks by name, or from a folder of one's own.

The harness makes prompts and scores; what is here answers its three kinds of request, in lmlib's batches. Text
becomes tokens as its Hugging Face backend has it, but for one thing: what a task's text spells never becomes a
special token, unless a chat template wrote it.
"""
from collections.abc import Sequence
import functools
import logging
import math
import pathlib
from typing import Any

from lmlib.eval import loglikelihood
from lmlib.eval.candidate import Candidate
from lmlib.eval.perplexity import bits
from lmlib.eval.scoreboard import Result
from lmlib.gin_text import close

NEW = 256  # tokens that a task gets which does not say how many
WRITING = {'until', 'do_sample', 'temperature', 'top_k', 'max_gen_toks'}


def evaluate(model, tasks: Sequence[str], *, folder: str | None = None, shots: int | None = None,
             limit: int | None = None, chat: bool = False, seed: int = 0) -> dict:
  """The harness' results of a model(...): 'results' by task, 'samples' with every answer, versions, configs.

  folder: with the YAML files of further tasks. shots: examples in the prompt, None for each task's own number;
  limit: so many questions of each. ValueError for a task that is not known, or whose data is not on this machine.
  """
  lm_eval, known = imported(), manager(tasks, folder)
  try:
    return lm_eval.simple_evaluate(
        model, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=known, apply_chat_template=chat,
        fewshot_as_multiturn=chat, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
        fewshot_random_seed=seed, bootstrap_iters=0, confirm_run_unsafe_code=False)
  except (ConnectionError, FileNotFoundError) as error:
    raise ValueError(f'the data of {", ".join(tasks)} is not on this machine and cannot be fetched: {error}. '
                     'Put it into the cache of datasets, or give a task in `folder` that reads local files') from error
  except (ValueError, AssertionError) as error:
    if any(part in str(error) for part in ('Sample larger than population', 'fewshot samples requested exceeds')):
      raise ValueError(f'shots={shots} are more examples than {", ".join(tasks)} have (None: of each task its own '
                       f'number): {error}') from error
    raise


def manager(tasks: Sequence[str], folder: str | None = None):
  """The harness' TaskManager that knows `tasks`. ValueError, naming the nearest, for one that it does not know."""
  imported()
  if folder is not None and not pathlib.Path(folder).is_dir():
    raise ValueError(f'Harness.folder={folder!r} is no folder: give the one that holds the YAML files of your tasks')
  known = _manager(folder, folder is None)
  if folder is not None and not all(known.match_tasks([name]) for name in tasks):
    known = _manager(folder, True)
  for name in tasks:
    if not known.match_tasks([name]):
      raise ValueError(f'the harness knows no task {name!r}{close(name, known.all_tasks)}: see `lm_eval ls tasks`, or '
                       'give the folder with its YAML file')
  return known


@functools.cache
def _manager(folder: str | None, defaults: bool):
  """defaults: with the harness' own tasks, thousands of files that take seconds to look through."""
  from lm_eval.tasks import TaskManager
  return TaskManager(include_path=folder, include_defaults=defaults)


def model(candidate: Candidate, *, batch: int = 16):
  """An lm_eval.api.model.LM that answers with this model; its `chat` renders conversations."""
  return _kind()(candidate, batch)


def results(found: dict, name: str) -> list[Result]:
  """What evaluate() found, for a report: of each task and metric of the harness a Result of the model `name`.

  Means over questions, and bits per byte, which is a ratio of sums, keep the value of each question. Of others, such
  as the harness' perplexities, its corpus scores and what it reports of groups of tasks, there is the score alone.
  """
  made = []
  for task, scores in found['results'].items():
    for key, score in scores.items():
      metric, _, kept = key.partition(',')
      if not kept or metric.endswith('_stderr') or not isinstance(score, (int, float)):
        continue
      samples = [one[metric] for one in found['samples'].get(task, ()) if one['filter'] == kept and metric in one]
      values, weights = _values(samples, metric, score)
      made.append(Result(
          name, task, metric if kept == 'none' else f'{metric} ({kept})', values, weights,
          higher_is_better=found['higher_is_better'].get(task, {}).get(metric) is not False,
          alone=None if values else float(score),
          facts={'shots': found['n-shot'].get(task), 'version': str(found['versions'].get(task))}))
  return made


def _values(samples: list, metric: str, score: float) -> tuple[tuple, tuple | None]:
  """Values and weights whose mean is the score; () where it is no such mean."""
  if metric == 'bits_per_byte' and all(isinstance(one, (tuple, list)) and len(one) == 2 for one in samples):
    values, weights = [-bits(nats) for nats, _ in samples], [float(size) for _, size in samples]
  elif all(isinstance(one, (int, float)) for one in samples):
    values, weights = [float(one) for one in samples], None
  else:
    return (), None
  total = len(values) if weights is None else sum(weights)
  same = bool(values) and math.isclose(sum(values) / total, score, rel_tol=1e-6, abs_tol=1e-9)
  return (tuple(values), None if weights is None else tuple(weights)) if same else ((), None)


def imported():
  """The harness. ModuleNotFoundError, saying what to install, without it."""
  try:
    import lm_eval
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"the harness needs {error.name}: pip install 'lmlib[eval]'") from error
  logging.getLogger('lm_eval').setLevel(logging.ERROR)  # it says of every metric what it takes for granted
  return lm_eval


@functools.cache
def _kind() -> type:
  """The subclass of the harness' LM, made when it is first needed."""
  imported()
  from lm_eval.api.model import TemplateLM
  return type('Lmlib', (_Answers, TemplateLM), {'__doc__': 'A model of lmlib that answers the harness.'})


class _Answers:
  """What the harness asks of a model. With TemplateLM, which pairs contexts and continuations, it is an LM."""

  def __init__(self, candidate: Candidate, batch: int):
    super().__init__()
    self.candidate, self.batch_size = candidate, batch
    self.tokenizer = candidate.tokenizer
    self.templated = False  # whether texts are a chat template's, whose specials are meant

  @property
  def eot_token_id(self) -> int:
    return self.tokenizer.eos

  @property
  def prefix_token_id(self) -> int:
    """What stands before a text that has nothing before it."""
    return self.tokenizer.bos if 'bos' in self.tokenizer.marks else self.tokenizer.eos

  @property
  def max_length(self) -> int:
    return self.candidate.config.length

  @property
  def tokenizer_name(self) -> str:
    return self.tokenizer.fingerprint

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The template, for the harness' own record."""
    if isinstance(chat_template, str):
      raise ValueError(f'chat_template={chat_template!r}: templates have no names here; give Chat(template=...)')
    return (self.candidate.chat.template or self.tokenizer.chat_template) if chat_template else None

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """The text of a conversation. If no new answer is prompted for, the last turn stays open, to be gone on with."""
    self.templated = True
    text = self.candidate.chat.render(chat_history, self.tokenizer, prompts=add_generation_prompt)
    if add_generation_prompt:
      return text
    last = chat_history[-1]['content']
    return text[:text.rindex(last) + len(last)]

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    """The tokens of a text, behind what begins one, unless add_special_tokens=False or the template wrote that."""
    encode = self.tokenizer.encode_with_specials if self.templated else self.tokenizer.encode
    ids = encode(string).tolist()
    starts = self.tokenizer.starts if add_special_tokens is None else add_special_tokens and self.tokenizer.starts
    return [self.tokenizer.bos, *ids] if starts and ids[:1] != [self.tokenizer.bos] else ids

  def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
    """(nats, whether greedy) of triples: anything, tokens of the context, tokens of the continuation."""
    asked = [loglikelihood.Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
    found = self.candidate.likelihoods(asked, batch=self.batch_size)
    answers = [(one.logp, one.greedy) for one in found]
    for (key, *_), answer in zip(requests, answers):
      if key is not None:
        self.cache_hook.add_partial('loglikelihood', key, answer)
    return answers

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Nats of whole texts, in windows of the model's length that follow each other, as the harness cuts them."""
    from lm_eval import utils as harness_windows
    windows, counts = [], []
    for (text,) in (one.args for one in requests):
      cut = [harness_windows.make_disjoint_window(window) for window in harness_windows.get_rolling_token_windows(
          token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
          context_len=1)]
      windows += [(None, *window) for window in cut]
      counts.append(len(cut))
    nats = iter(self._loglikelihood_tokens(windows))
    found = [sum(next(nats)[0] for _ in range(count)) for count in counts]
    for one, answer in zip(requests, found):
      self.cache_hook.add_partial('loglikelihood_rolling', one.args, answer)
    return found

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """What the model writes behind each context, up to the task's stop strings; same settings go together."""
    found: dict[int, str] = {}
    settings: dict[str, list[int]] = {}
    for i, one in enumerate(requests):
      settings.setdefault(repr(sorted(one.args[1].items())), []).append(i)
    for numbers in settings.values():
      how = sampling(requests[numbers[0]].args[1])
      written = self.candidate.texts([self.tok_encode(requests[i].args[0]) for i in numbers], batch=self.batch_size,
                                     **how)
      for i, text in zip(numbers, written):
        found[i] = text
        self.cache_hook.add_partial('generate_until', requests[i].args, text)
    return [found[i] for i in range(len(requests))]


def sampling(given: dict[str, Any]) -> dict[str, Any]:
  """How a task wants its text written, as Writer names it. ValueError for settings that this sampler does not have."""
  from lm_eval.models.utils import normalize_gen_kwargs
  said = normalize_gen_kwargs(given, NEW)
  if unknown := sorted(key for key in said.keys() - WRITING if said[key] not in (None, False, 1, 1.0)):
    raise ValueError(f'generation_kwargs of the task name {", ".join(unknown)}, which is not supported here: '
                     f'{", ".join(sorted(WRITING))} are')
  return {'new': said['max_gen_toks'], 'stops': tuple(said['until']), 'top_k': said.get('top_k') or None,
          'temperature': float(said.get('temperature') or 0.0) if said.get('do_sample') else 0.0}
