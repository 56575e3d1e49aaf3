"""Tasks and mixtures in seqio: from sources of lmlib to registered tasks, and from any task to a source.

A user's own file registers what it likes with seqio itself, or in a line with the functions here:

    # my_tasks.py, beside the gin file or anywhere Python finds it
    import seqio
    from lmlib.data import sources, tasks, tokenizer, vocabulary
    tokens = tokenizer.Loaded('my.model').load()
    tasks.add_text('poems', {'train': sources.TextFiles('poems/*.txt')}, tokens)
    seqio.TaskRegistry.add(
        'letters', source=seqio.TextLineDataSource({'train': 'letters.txt'}),
        preprocessors=[lambda ds: ds.map(lambda line: {'targets': line}), seqio.preprocessors.tokenize],
        output_features={'targets': seqio.Feature(vocabulary.vocabulary(tokens))})
    tasks.add_mixture('writing', {'poems': 2, 'letters': 1})

and a gin file names it, as a source like any other:

    prepare.Corpus.source = @tasks.Seqio()
    tasks.Seqio.name = 'writing'
    tasks.Seqio.module = 'my_tasks'

seqio and TensorFlow are loaded when a task is registered or read, not with this module.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import difflib
import functools
import importlib
import re

import numpy as np

from lmlib.data.chat import Chat, messages_of, pair_of
from lmlib.data.files import text_of
from lmlib.data.sources import Document
from lmlib.data.tokenizer import Tokenizer
from lmlib.data.vocabulary import load_quietly, vocabulary


@dataclasses.dataclass(frozen=True)
class Seqio:
  """A registered task, or the tasks of a mixture one after the other, as a source of documents.

  A document is the text of `field`, as it was before the task made tokens of it. Its name is task, split and
  shard, ':' and a number counted from 1. Nothing is sampled: rates() has what the mixture says of that.
  """
  name: str
  split: str = 'train'
  module: str | None = None  # imported first: it registers the task
  field: str = 'targets'
  skip_empty: bool = False  # texts without a character, which are an error otherwise

  def parts(self) -> tuple[str, ...]:
    """One a shard of each task. ValueError if there is no such task or split."""
    return tuple(self._shards())

  def documents(self, parts: tuple[str, ...] | None = None) -> Iterator[Document]:
    """The documents, by task, shard and place. ValueError, naming the document, for what is no text."""
    for name, text in self._texts(parts):
      if text or not self.skip_empty:
        yield Document(name, text_of(text, name, self.field))

  def skipped(self) -> tuple[tuple[str, str], ...]:
    """(name, reason) of every empty text, if skip_empty. Reads everything again."""
    return tuple((name, 'empty text') for name, text in self._texts(None) if not text) if self.skip_empty else ()

  def rates(self) -> dict[str, float]:
    """The share of each task, in all 1: what the mixture says, or 1 for a single task."""
    found = {task.name: self._rate(task) for task in self._tasks()}
    return {name: rate / sum(found.values()) for name, rate in found.items()}

  def _rate(self, task) -> float:
    provider = self._provider()
    return provider.get_rate(task) if hasattr(provider, 'get_rate') else 1.0

  def _provider(self):
    load_quietly()
    import seqio
    if self.module is not None:
      try:
        importlib.import_module(self.module)
      except ModuleNotFoundError as error:
        raise ValueError(f'Seqio.module={self.module!r} cannot be imported: {error}') from error
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if self.name not in known:
      close = difflib.get_close_matches(self.name, known)
      raise ValueError(f'Seqio.name={self.name!r} is no registered task or mixture (Seqio.module={self.module!r})'
                       + (f'; did you mean {close[0]}?' if close else ''))
    return seqio.get_mixture_or_task(self.name)

  def _tasks(self):
    load_quietly()
    import seqio
    tasks = sorted(seqio.get_subtasks(self._provider()), key=lambda task: task.name)
    for task in tasks:
      if self.split not in task.splits:
        raise ValueError(f'Seqio.split={self.split!r} is no split of {task.name}, which has {", ".join(task.splits)}')
    return tasks

  def _shards(self) -> dict:
    """The task of each part."""
    found = {}
    for task in self._tasks():
      shards = len(task.source.list_shards(self.split))
      found |= {f'{task.name}/{self.split}/{i + 1} of {shards}': task for i in range(shards)}
    return found

  def _texts(self, parts) -> Iterator[tuple[str, str]]:
    known = self._shards()
    for part in known if parts is None else parts:
      if part not in known:
        raise ValueError(f'Seqio: there is no part {part!r} of {self.name}')
      yield from self._shard(known[part], part)

  def _shard(self, task, part: str) -> Iterator[tuple[str, str]]:
    load_quietly()
    import seqio
    import tensorflow as tf
    index, shards = map(int, part.rpartition('/')[2].split(' of '))
    info = seqio.ShardInfo(index - 1, shards) if shards > 1 else None
    made = task.get_dataset(None, self.split, shuffle=False, shard_info=info, num_epochs=1)
    raw = next((key for key in (f'{self.field}_pretokenized', self.field)
                if key in made.element_spec and made.element_spec[key].dtype.name == 'string'), None)
    if raw is None:
      raise ValueError(f'Seqio.field={self.field!r}: {task.name} gives no text of that name, but '
                       f'{", ".join(sorted(made.element_spec))}; seqio.preprocessors.tokenize keeps the text')
    number = 0
    try:
      for number, example in enumerate(made.as_numpy_iterator(), 1):
        yield f'{task.name}/{self.split}/{index}:{number}', example[raw].decode()
    except UnicodeDecodeError as error:
      raise ValueError(f'{task.name}/{self.split}/{index}:{number}: field {self.field!r} is not UTF-8 at byte '
                       f'{error.start}') from error
    except tf.errors.OpError as error:
      said = re.findall(r'(?:ValueError|OSError): (.*)', error.message) or [error.message.strip().splitlines()[0]]
      raise ValueError(f'{task.name}/{self.split}/{index}, after {number} examples: {said[-1]}') from error


def add_text(name: str, splits: Mapping[str, object], tokenizer: Tokenizer, *, metrics: Sequence[Callable] = (),
             shift: int = 0):
  """Registers documents of a source a split as a task with `targets`, text to eos. The task comes back."""
  read = lambda source, parts: ({'name': d.name, 'targets': d.text} for d in source.documents(parts))
  return _add(name, splits, read, _text_features(tokenizer, shift, 'targets'), metrics)


def add_parallel(name: str, splits: Mapping[str, object], tokenizer: Tokenizer, *, inputs: str, targets: str,
                 metrics: Sequence[Callable] = (), shift: int = 0):
  """Registers records of a sources.DataFolder a split as a task from `inputs` to `targets`, both texts with eos.

  The two are fields, or fields of fields: 'translation.zh'. The task comes back.
  """
  def read(source, parts):
    columns = tuple(sorted({inputs.partition('.')[0], targets.partition('.')[0]}))
    for where, record in source.records(parts, columns=columns):
      yield {'name': where, 'inputs': field(record, inputs, where), 'targets': field(record, targets, where)}

  return _add(name, splits, read, _text_features(tokenizer, shift, 'inputs', 'targets'), metrics)


def add_conversations(name: str, splits: Mapping[str, object], tokenizer: Tokenizer, *, chat: Chat = Chat(),
                      metrics: Sequence[Callable] = (), shift: int = 0):
  """Registers records with a conversation (chat.messages_of) as a task: `targets`, and `weights` of their loss."""
  def read(source, parts):
    for where, record in source.records(parts):
      yield {'name': where} | _example(chat, messages_of, record, where, tokenizer, shift)

  return _add(name, splits, read, _token_features(tokenizer, shift, targets='weights'), metrics)


def add_preferences(name: str, splits: Mapping[str, object], tokenizer: Tokenizer, *, chat: Chat = Chat(),
                    metrics: Sequence[Callable] = (), shift: int = 0):
  """Registers records with a preference (chat.pair_of) as a task: `chosen` and `rejected`, each with weights.

  Only the last answer has weight: what lies before it is the same in both.
  """
  last = dataclasses.replace(chat, last_only=True)

  def read(source, parts):
    for where, record in source.records(parts):
      found = {'name': where}
      for n, key in enumerate(('chosen', 'rejected')):
        one = _example(last, lambda record, n=n: pair_of(record)[n], record, where, tokenizer, shift)
        found |= {key: one['targets'], f'{key}_weights': one['weights']}
      yield found

  features = _token_features(tokenizer, shift, chosen='chosen_weights', rejected='rejected_weights')
  return _add(name, splits, read, features, metrics)


def add_tfds(name: str, data_set: str, tokenizer: Tokenizer, *, targets: str = 'text', inputs: str | None = None,
             splits: Mapping[str, str] | None = None, data_dir: str | None = None,
             metrics: Sequence[Callable] = (), shift: int = 0):
  """Registers a data set of TensorFlow Datasets, such as 'imdb_reviews/plain_text:1.0.0'. The task comes back.

  `targets` and `inputs` are its fields; `splits` maps names to its own, such as {'train': 'train[:90%]'}.
  """
  load_quietly()
  import seqio
  keys = {'targets': targets} | ({'inputs': inputs} if inputs else {})
  source = seqio.TfdsDataSource(tfds_name=data_set, tfds_data_dir=data_dir, splits=splits)
  steps = [functools.partial(seqio.preprocessors.rekey, key_map=keys), seqio.preprocessors.tokenize,
           seqio.preprocessors.append_eos]
  return seqio.TaskRegistry.add(name, source=source, preprocessors=steps, metric_fns=list(metrics),
                                output_features=_text_features(tokenizer, shift, *keys))


def add_mixture(name: str, rates: Mapping[str, float]):
  """Registers a mixture of registered tasks, or mixtures, by their rates. The mixture comes back."""
  load_quietly()
  import seqio
  if not rates or min(rates.values()) <= 0:
    raise ValueError(f'rates={dict(rates)} of the mixture {name} must be positive, one at least')
  return seqio.MixtureRegistry.add(name, list(rates.items()))


def field(record: dict, path: str, where: str) -> str:
  """The text at a field, or field of a field. ValueError, naming both, if there is none."""
  value = record
  for key in path.split('.'):
    if not isinstance(value, dict) or key not in value:
      raise ValueError(f'{where}: no field {path!r}, but {sorted(record)}')
    value = value[key]
  return text_of(value, where, path)


def _example(chat, form, record, where, tokenizer, shift) -> dict:
  try:
    example = chat.example(form(record), tokenizer)
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from error
  return {'targets': example.tokens_T + np.int32(shift), 'weights': example.weight_T}


def _text_features(tokenizer, shift, *names):
  load_quietly()
  import seqio
  return {name: seqio.Feature(vocabulary(tokenizer, shift=shift)) for name in names}


def _token_features(tokenizer, shift, **weights):
  """Features of tokens that are made already, and of the weights that go with them."""
  load_quietly()
  import seqio
  import tensorflow as tf
  found = {}
  for tokens, weight in weights.items():
    found[tokens] = seqio.Feature(vocabulary(tokenizer, shift=shift), add_eos=False)
    found[weight] = seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False, dtype=tf.float32)
  return found


def _add(name, splits, read, features, metrics):
  """Registers what `read` makes of sources: text, to be tokenised, or tokens, with weights beside them."""
  load_quietly()
  import seqio
  texts = all(feature.add_eos for feature in features.values())
  steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos] if texts else []
  source = _source_class()(splits, read, {key: None if texts else feature.dtype for key, feature in features.items()})
  return seqio.TaskRegistry.add(name, source=source, preprocessors=steps, metric_fns=list(metrics),
                                output_features=features)


@functools.cache
def _source_class():
  """The seqio.DataSource of lmlib's sources: its shards are their parts."""
  load_quietly()
  import seqio
  import tensorflow as tf

  class Source(seqio.DataSource):
    """Reads `splits`, a source each, by `read(source, parts)`; `fields` have numbers of a type, or None: text."""

    def __init__(self, splits: Mapping[str, object], read, fields):
      super().__init__(splits)
      self._sources, self._read, self._fields = dict(splits), read, fields

    @property
    def supports_arbitrary_sharding(self):
      return False

    def list_shards(self, split):
      return self._sources[split].parts()

    def get_dataset(self, split='train', shuffle=True, seed=None, shard_info=None, *, sequence_length=None,
                    use_cached=False, num_epochs=1):
      parts = self.list_shards(split)
      if shard_info is not None:
        parts = parts[shard_info.index::shard_info.num_shards]
      if shuffle:
        order = np.random.default_rng(None if seed is None else int(seed)).permutation(len(parts))
        parts = tuple(parts[i] for i in order)
      spec = {key: tf.TensorSpec([], tf.string) if kind is None else tf.TensorSpec([None], kind)
              for key, kind in {'name': None, **self._fields}.items()}
      return tf.data.Dataset.from_generator(lambda: self._read(self._sources[split], parts), output_signature=spec)

  return Source
