"""Cleaning: stages that change or reject a text, run in order, and a report of what each did.

A stage is a frozen dataclass with a `name` and `__call__(text) -> str | Rejected`: pure and picklable, so
that it runs in any process. A corpus-wide stage, deduplication, has `signature(text)` (a row of uint64,
computed in the workers) and `duplicates(signatures)` instead. The stages are in the files beside this one:
normalization, languages, quality, boilerplate, privacy, blocklist, decontamination, deduplication.

A report is a sum over documents. Reports of parts of a corpus merge in any order and grouping to the report
of the whole, byte for byte, however the parts were spread over workers.
"""
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
import importlib.metadata
import json
import time
import types
from typing import Protocol

import numpy as np

FORMAT = 1  # of a report's JSON
EXCERPT = 200  # characters of an example
CHANGED = 'changed'  # the reason under which examples of changes are kept
EMPTY = 'nothing left'


@dataclasses.dataclass(frozen=True)
class Rejected:
  """Why a text is dropped.

  A report counts by reason and detail, so both come from small sets; the detail says which of many alike,
  such as the example of an evaluation set, or the blocked term.
  """
  reason: str
  detail: str = ''


class Stage(Protocol):
  """What a stage has. Optional: `version`, `settings` and `libraries`, for the fingerprint, and `changes(text)`,
  a Counter that says of what kind the changes to a text are, for the report."""

  @property
  def name(self) -> str: ...

  def __call__(self, text: str) -> str | Rejected: ...


class CorpusStage(Protocol):
  """A stage that needs the whole corpus: it drops documents that repeat earlier ones."""

  @property
  def name(self) -> str: ...

  def signature(self, text: str) -> np.ndarray:
    """A row of uint64, of one width for all texts."""

  def duplicates(self, signatures: np.ndarray) -> dict[int, int]:
    """From the rows of all documents in corpus order: a document dropped -> the one kept that it repeats."""


def fingerprint(stage) -> str:
  """SHA-256, in hexadecimal, of what a stage does: its class, the version of its rule, its settings.

  `settings` is the dataclass's fields unless the stage says otherwise: one that reads files gives their
  contents for their names. The versions of the packages in `libraries` belong to it too.
  """
  settings = getattr(stage, 'settings', None)
  value = [type(stage).__name__, getattr(stage, 'version', 1),
           dataclasses.asdict(stage) if settings is None else settings,
           {library: importlib.metadata.version(library) for library in getattr(stage, 'libraries', ())}]
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def divided(stages: Sequence) -> tuple[tuple, tuple]:
  """(stages of one text, corpus-wide stages). ValueError unless every corpus-wide stage comes after the others."""
  wide = [hasattr(stage, 'signature') for stage in stages]
  first = wide.index(True) if True in wide else len(wide)
  if not all(wide[first:]):
    late = stages[wide.index(False, first)]
    raise ValueError(f'stages: {late.name} comes after {stages[first].name}, which compares whole texts and must '
                     'see them as they end: put it last')
  return tuple(stages[:first]), tuple(stages[first:])


def clean(text: str, stages: Sequence[Stage], *, name: str = '', report: 'Report | None' = None) -> str | Rejected:
  """The text after all stages, or why it was dropped; a text with nothing but spaces left is.

  The report, made for the same stages, counts it; `name` is the document's, for examples.
  """
  for i, stage in enumerate(stages):
    result = stage(text)
    if isinstance(result, str) and (not result or result.isspace()):
      result = Rejected(EMPTY)
    if report is not None:
      changed = isinstance(result, str) and result != text and hasattr(stage, 'changes')
      report.count(i, text, result, name=name, changes=stage.changes(text) if changed else {})
    if isinstance(result, Rejected):
      return result
    text = result
  return text


def duplicates_in_turn(stages: Sequence[CorpusStage], signatures: Sequence[np.ndarray]) -> list[dict[int, int]]:
  """For each corpus-wide stage what it drops of that which those before it kept, by index in the corpus.

  signatures[k] are the rows that stage k made of all documents, in corpus order.
  """
  left, found = None, []
  for stage, rows in zip(stages, signatures, strict=True):
    left = np.arange(len(rows)) if left is None else left
    dropped = {int(left[i]): int(left[kept]) for i, kept in stage.duplicates(rows[left]).items()}
    found.append(dropped)
    left = left[~np.isin(left, np.fromiter(dropped, np.int64, len(dropped)))]
  return found


class Report:
  """What each stage saw, changed and dropped, in documents and UTF-8 bytes, with up to `examples` a reason.

  The examples are those whose text has the smallest hash: the same ones in whatever order they come.
  """

  def __init__(self, stages: Iterable = (), examples: int = 0):
    if examples < 0:
      raise ValueError(f'examples={examples} must not be negative')
    self.stages = [(stage.name, fingerprint(stage)) for stage in stages]
    self.examples = examples
    self.counts = Counter()  # by (stage, 'documents' | 'bytes' | ..., reason, detail)
    self.chosen = {}  # by (stage, reason): sorted tuples (hash, name, detail, excerpt)

  def count(self, index: int, text: str, result: str | Rejected, *, name: str = '',
            changes: Mapping[str, int] = types.MappingProxyType({})):
    """Counts what stage number `index` made of one text, and how many changes of each kind."""
    size, counts = size_of(text), self.counts
    counts[index, 'documents', '', ''] += 1
    counts[index, 'bytes', '', ''] += size
    if isinstance(result, Rejected):
      self.drop(index, size, result)
      self._example(index, result.reason, text, name, result.detail, lambda: shortened(text))
    elif result != text:
      counts[index, 'changed documents', '', ''] += 1
      counts[index, 'changed bytes', '', ''] += size
      counts[index, 'changed to bytes', '', ''] += size_of(result)
      for kind, number in changes.items():
        counts[index, 'changes', '', kind] += number
      self._example(index, CHANGED, text, name, '', lambda: difference(text, result))

  def drop(self, index: int, size: int, rejected: Rejected):
    """Counts one dropped document of `size` bytes; whoever calls this counts it as seen."""
    self.counts[index, 'dropped documents', rejected.reason, rejected.detail] += 1
    self.counts[index, 'dropped bytes', rejected.reason, rejected.detail] += size

  def _example(self, index, reason, text, name, detail, excerpt):
    if not self.examples:
      return
    kept, digest = self.chosen.setdefault((index, reason), []), hashlib.sha256(text.encode()).hexdigest()
    if len(kept) < self.examples or (digest, name) <= kept[-1][:2]:
      self.chosen[index, reason] = sorted({*kept, (digest, name, detail, excerpt())})[:self.examples]

  def merge(self, other: 'Report') -> 'Report':
    """The report of both parts. ValueError if they are not of the same stages and number of examples."""
    if (self.stages, self.examples) != (other.stages, other.examples):
      raise ValueError(f'reports of other stages: {self.stages}, examples={self.examples}; '
                       f'{other.stages}, examples={other.examples}')
    merged = Report(examples=self.examples)
    merged.stages = list(self.stages)
    merged.counts = self.counts + other.counts
    for key in self.chosen.keys() | other.chosen.keys():
      both = {*self.chosen.get(key, ()), *other.chosen.get(key, ())}
      merged.chosen[key] = sorted(both)[:self.examples]
    return merged

  def followed_by(self, later: 'Report') -> 'Report':
    """The report of all stages, of which `later` are those that come after: per-text ones, then corpus-wide."""
    if self.examples != later.examples:
      raise ValueError(f'reports with examples={self.examples} and examples={later.examples}')
    joined, n = Report(examples=self.examples), len(self.stages)
    joined.stages = self.stages + later.stages
    joined.counts = self.counts + Counter({(n + key[0], *key[1:]): value for key, value in later.counts.items()})
    joined.chosen = self.chosen | {(n + index, reason): kept for (index, reason), kept in later.chosen.items()}
    return joined

  def rows(self) -> list[dict]:
    """One row a stage: name, fingerprint, documents and bytes seen, changed, and dropped by reason and detail."""
    rows = []
    for index, (name, mark) in enumerate(self.stages):
      dropped = {}
      for (i, what, reason, detail), value in sorted(self.counts.items()):
        if i == index and reason:
          entry = dropped.setdefault(reason, {'documents': 0, 'bytes': 0})
          kind = what.removeprefix('dropped ')
          entry[kind] += value
          if detail:
            details = entry.setdefault('details', {})
            details.setdefault(detail, {'documents': 0, 'bytes': 0})[kind] = value
      total = lambda what, index=index: self.counts[index, what, '', '']
      row = {'name': name, 'fingerprint': mark, 'documents': total('documents'), 'bytes': total('bytes'),
             'changed': {'documents': total('changed documents'), 'bytes': total('changed bytes'),
                         'to_bytes': total('changed to bytes')}, 'dropped': dropped,
             'changes': {kind: value for (i, what, _, kind), value in sorted(self.counts.items())
                         if i == index and what == 'changes'}}
      if self.examples:
        row['examples'] = {reason: [list(example) for example in self.chosen[i, reason]]
                           for i, reason in sorted(self.chosen) if i == index}
      rows.append(row)
    return rows

  def to_json(self) -> str:
    """One line; equal reports give equal text."""
    return json.dumps({'format': FORMAT, 'examples': self.examples, 'stages': self.rows()},
                      ensure_ascii=False, sort_keys=True)

  @classmethod
  def from_json(cls, text: str) -> 'Report':
    """The report that to_json() wrote. ValueError if it is none, or of another format."""
    try:
      value = json.loads(text)
      if value['format'] != FORMAT:
        raise ValueError(f'a cleaning report of format {value["format"]}; this is format {FORMAT}')
      report = cls(examples=value['examples'])
      for index, row in enumerate(value['stages']):
        report._read(index, row)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
      raise ValueError(f'not a cleaning report: {error!r}') from error
    return report

  def _read(self, index, row):
    changed = row['changed']
    self.stages.append((row['name'], row['fingerprint']))
    plain = {'documents': row['documents'], 'bytes': row['bytes'], 'changed documents': changed['documents'],
             'changed bytes': changed['bytes'], 'changed to bytes': changed['to_bytes']}
    self.counts.update({(index, what, '', ''): value for what, value in plain.items() if value})
    self.counts.update({(index, 'changes', '', kind): value for kind, value in row['changes'].items()})
    for reason, entry in row['dropped'].items():
      details = entry.get('details', {})
      for what in ('documents', 'bytes'):
        each = {detail: value[what] for detail, value in details.items()}
        each[''] = entry[what] - sum(each.values())
        self.counts.update({(index, f'dropped {what}', reason, detail): value
                            for detail, value in each.items() if value})
    for reason, kept in row.get('examples', {}).items():
      self.chosen[index, reason] = [tuple(example) for example in kept]

  def table(self) -> str:
    """The report as lines for a terminal: a line a stage, below it a line a reason, most dropped first."""
    lines = [f'{"stage":<34}{"documents":>12}{"MB":>10}{"changed":>10}{"dropped":>10}{"MB dropped":>12}']
    for row in self.rows():
      dropped = row['dropped'].items()
      documents, size = (sum(entry[what] for _, entry in dropped) for what in ('documents', 'bytes'))
      lines.append(f'{row["name"]:<34}{row["documents"]:>12,}{row["bytes"] / 1e6:>10,.2f}'
                   f'{row["changed"]["documents"]:>10,}{documents:>10,}{size / 1e6:>12,.2f}')
      lines += [f'  {kind:<54}{number:>10,}' for kind, number in row['changes'].items()]
      for reason, entry in sorted(dropped, key=lambda item: (-item[1]['documents'], item[0])):
        lines.append(f'  {reason:<64}{entry["documents"]:>10,}{entry["bytes"] / 1e6:>12,.2f}')
        details = sorted(entry.get('details', {}).items(), key=lambda item: (-item[1]['documents'], item[0]))
        lines += [f'    {detail:<62}{value["documents"]:>10,}{value["bytes"] / 1e6:>12,.2f}'
                  for detail, value in details[:5]]
        if len(details) > 5:
          lines.append(f'    and {len(details) - 5} more')
      for reason, examples in row.get('examples', {}).items():
        lines += [f'  {reason}: {": ".join(filter(None, (name, detail)))}: {excerpt!r}'
                  for _, name, detail, excerpt in examples]
    return '\n'.join(lines)


def duplicates_report(stages: Sequence[CorpusStage], dropped: Sequence[dict[int, int]],
                      documents: Sequence[tuple[str, int]], *, examples: int = 0) -> Report:
  """The report of corpus-wide stages, of what duplicates_in_turn() found among (name, bytes) of all documents.

  An example is the name of a dropped document and that of the one it repeats.
  """
  report, gone = Report(stages, examples), set()
  for index, found in enumerate(dropped):
    left = [i for i in range(len(documents)) if i not in gone]
    report.counts[index, 'documents', '', ''] += len(left)
    report.counts[index, 'bytes', '', ''] += sum(documents[i][1] for i in left)
    reason = 'repeats an earlier document'
    for i, kept in found.items():
      name, size = documents[i]
      report.drop(index, size, Rejected(reason))
      report._example(index, reason, name, name, '', lambda kept=kept: f'repeats {documents[kept][0]}')
    gone |= found.keys()
  report.counts = +report.counts
  return report


def size_of(text: str) -> int:
  """UTF-8 bytes of a text."""
  return len(text) if text.isascii() else len(text.encode())


def shortened(text: str) -> str:
  return text if len(text) <= EXCERPT else text[:EXCERPT] + '…'


def difference(before: str, after: str) -> str:
  """Where two texts first differ: some of the one -> some of the other."""
  low, high = 0, min(len(before), len(after))
  while low < high:  # the longest common beginning, by bisection of equal slices
    middle = (low + high + 1) // 2
    low, high = (middle, high) if before[low:middle] == after[low:middle] else (low, middle - 1)
  start, half = max(0, low - 20), EXCERPT // 2
  return f'{before[start:start + half]} -> {after[start:start + half]}'


def speeds(stages: Sequence, texts: Sequence[str], *, rounds: int = 3) -> dict[str, float]:
  """MB a second of processor time, of each stage alone over the same texts: the best of some rounds, warmed up."""
  megabytes, found = sum(map(size_of, texts)) / 1e6, {}
  for stage in stages:
    work = getattr(stage, 'signature', stage)
    work(texts[0])
    seconds = []
    for _ in range(rounds):
      start = time.process_time()
      for text in texts:
        work(text)
      seconds.append(time.process_time() - start)
    found[stage.name] = megabytes / min(seconds)
  return found
