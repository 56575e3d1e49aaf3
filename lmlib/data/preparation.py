"""One preparation of a corpus: begun or gone on with, step by step, until the stores have their name.

  PATH/train/, PATH/held_out/   stores (store.py)
  PATH/manifest.json            settings, fingerprints, counts, what each cleaning stage did, what was unreadable
  PATH.partial/                 until then: what is done so far, for whom, and who is at work
"""
from collections import Counter
from collections.abc import Callable
import json
import os
import re

import numpy as np

from lmlib import gin_text
from lmlib.data import cleaning, pipeline, store
from lmlib.data.folder import Folder
from lmlib.data.index import Index, divided
from lmlib.data.pipeline import Arrange, Read, Steps, Tokenize
from lmlib.data.tokenizer import Tokenizer
from lmlib.data.workers import Local
from lmlib.terminal import Terminal

FORMAT = 1  # of the manifest beside the stores, and of what PATH.partial holds
TEXTS = 16  # times what a tokeniser samples that is read for it, of a larger corpus


def write(corpus, path: str | os.PathLike, *, engine=Local(), say: Callable[[str], None] = print,
          terminal: Terminal | None = None, contents: list | None = None, wait: Callable | None = None,
          keep: bool = True) -> dict:
  """Prepares a corpus at `path`; returns its manifest. What is there already, of the same settings, stays.

  engine: who works, workers.Local or beam.Beam. contents: what the sources hold, if that is known already.
  wait: called with a line if another process prepares the same, which is waited for; None: ValueError.
  keep: whether what is done stays in PATH.partial if it ends early, for the next call to go on.
  """
  target = Folder(path)
  work = target.beside('.partial')
  terminal = terminal or _Lines(say)
  wanted = identity(corpus, contents)
  if (found := finished(target, wanted)) is not None:
    return found
  with work.locked(wait):
    try:
      if (found := finished(target, wanted)) is None:
        begin(target, work, wanted)
        pipeline.forget()
        with engine.started(work) as over:
          made = _Making(corpus, target, work, Steps(work, over, terminal), terminal)
          found = made.all(wanted, contents)
      work.remove()
    except BaseException:
      if not keep:
        work.remove()
      raise
  return found


def manifest_of(folder: Folder) -> dict:
  """What a folder of prepared data says of itself. ValueError if it is none."""
  try:
    found = json.loads(folder.get('manifest.json') or b'null')
  except (OSError, ValueError) as error:
    raise ValueError(f'{folder} holds no prepared data: {error}') from error
  if found is None:
    partial = folder.beside('.partial')
    unfinished = f', but {partial} is unfinished: run the same preparation again' if partial.get('identity') else ''
    raise ValueError(f'{folder} holds no prepared data{unfinished}')
  if not isinstance(found, dict) or found.get('format') != FORMAT:
    raise ValueError(f'{folder} has another format than {FORMAT}, which this lmlib reads: prepare the data again')
  return found


def finished(target: Folder, wanted: dict) -> dict | None:
  """The manifest of `target` if it is prepared, None if there is nothing. ValueError for anything else there."""
  if target.get('manifest.json') is None:
    if target.local is not None and target.local.exists():
      raise ValueError(f'{target} exists and holds no prepared data; give another path')
    return None
  found = manifest_of(target)
  if changed := differences(found['identity'], wanted):
    raise ValueError(f'{target} holds other prepared data ({changed}); give another path')
  return found


def begin(target: Folder, work: Folder, wanted: dict):
  """Says in `work` what it is for. ValueError if it is for something else."""
  if (known := work.get('identity')) is None:
    if target.local is None and (keys := target.keys()):
      raise ValueError(f'{target} holds {keys[0]} and no prepared data; give another path')
    pipeline.write_json(work, 'identity', wanted)
  elif changed := differences(pipeline.read_json(work, 'identity', known), wanted):
    raise ValueError(f'{work} holds unfinished work of other settings ({changed}): remove it, or give another path')


def identity(corpus, contents: list | None) -> dict:
  """All that the result depends on. contents: of each source, or None: the names, sizes and times of its parts."""
  parts = [pipeline.grouped(source) for source in corpus.sources]
  settings = gin_text.gin_text('experiments.prepare.main', {'data': corpus})
  return {'format': [FORMAT, store.FORMAT, cleaning.FORMAT], 'settings': settings.splitlines(),
          'tokenizer': store.digest(corpus.tokenizer.identity()),
          'stages': [cleaning.fingerprint(stage) for stage in corpus.stages],
          'source': store.digest([parts, contents or [[stamp(source, part) for group in groups for part in group]
                                                      for source, groups in zip(corpus.sources, parts)]])}


def stamp(source, part: str) -> str | None:
  """What changes when a part does, if that can be known without reading it: for a file, its size and time."""
  path = re.sub(r'\[\d+:\d+\] from (line|row) \d+$', '', part)  # a piece of a file (files.py)
  try:
    found = os.stat(os.path.join(getattr(source, 'root', ''), path))
  except (OSError, ValueError):
    return None
  return f'{found.st_size} {found.st_mtime_ns}'


def differences(there: dict, here: dict) -> str:
  """What differs between two identities, in words; '' if nothing does."""
  said = []
  for name in there | here:
    one, other = there.get(name), here.get(name)
    if one == other:
      continue
    if name == 'settings':
      lines = [[line.strip() for line in lines or () if line not in (others or ())]
               for lines, others in ((one, other), (other, one))]
      said.append(f'there {", ".join(lines[0]) or "nothing"}; here {", ".join(lines[1]) or "nothing"}')
    else:
      said.append({'source': 'its source has changed'}.get(name, f'its {name} differs'))
  return '; '.join(said)


def skipped(corpus) -> tuple[tuple[str, str], ...]:
  """What the sources leave out by themselves."""
  return tuple(pair for source in corpus.sources for pair in source.skipped())


class _Making:
  """One preparation: the steps between the first document and the manifest."""

  def __init__(self, corpus, target: Folder, work: Folder, steps: Steps, terminal: Terminal):
    self.corpus, self.target, self.work, self.steps, self.terminal = corpus, target, work, steps, terminal
    self.stages, self.wide = cleaning.divided(corpus.stages)
    # A disk gives a whole folder its name at once; elsewhere the manifest comes last.
    self.place = target if target.local is None else work / 'result'

  def all(self, wanted: dict, contents: list | None) -> dict:
    tasks = pipeline.plan(self.corpus, self.work)
    reads = self.steps.done('reading', pipeline.read, tasks)
    self._unchanged(tasks, reads, contents)
    index = Index(self.work, tasks, reads)
    index.check(self.corpus)
    report = self._report(reads)
    dropped = np.zeros(len(index.ranks), bool)
    if self.wide:
      report, dropped = self._repeated(index, report)
    index.check(self.corpus, dropped)
    parts = divided(index, dropped, self.corpus.held_out)
    self._tokenizer(index, parts['train'])
    self.terminal.say(f'tokenizing {sum(map(np.count_nonzero, parts.values())):,} documents, '
                      f'{index.bytes[~dropped].sum() / 1e6:.1f} MB')
    counts = self.steps.done('tokenizing', pipeline.tokenize, [
        Tokenize(str(self.work), key, source, {part: np.flatnonzero(chosen[place]) for part, chosen in parts.items()})
        for key, source, place in index.blocks])
    return self._finish(wanted, index, reads, report, self._arranged(index, counts, list(parts)))

  def _unchanged(self, tasks: list[Read], reads: list[dict], contents: list | None):
    known = [one for each in contents or () for one in each]
    for task, found, before in zip(tasks, reads, known):
      if found['content'] != before:
        raise ValueError(f'{task.parts[0]}{" or one after it" if len(task.parts) > 1 else ""} changed while it was '
                         'being prepared: run again')

  def _report(self, reads: list[dict]) -> cleaning.Report:
    report = cleaning.Report(self.stages, examples=pipeline.EXAMPLES)
    for found in reads:
      report = report.merge(cleaning.Report.from_json(found['report']))
    return report

  def _repeated(self, index: Index, report: cleaning.Report):
    """The report with what the corpus-wide stages drop, and which documents these are."""
    self.terminal.say(f'comparing {len(index.ranks):,} documents')
    found = cleaning.duplicates_in_turn(self.wide, [index.signatures(i) for i in range(len(self.wide))])
    later = cleaning.duplicates_report(self.wide, found, list(zip(index.names(), index.bytes.tolist())),
                                       examples=pipeline.EXAMPLES)
    dropped = np.zeros(len(index.ranks), bool)
    dropped[[i for each in found for i in each]] = True
    return report.followed_by(later), dropped

  def _tokenizer(self, index: Index, train: np.ndarray):
    """Trains the tokenizer, unless that is done."""
    if self.work.get('tokenizer.model') is not None:
      return
    config, characters = self.corpus.tokenizer, index.characters[train]
    every = max(1, int(characters.sum()) // (TEXTS * getattr(config, 'sample', 1 << 62)))
    blocks = index.blocks[::every]
    number = sum(int(index.characters[place][train[place]].sum()) for _, _, place in blocks)
    self.terminal.say(f'training a tokenizer of {config.pieces} pieces on '
                      f'{sum(index.bytes[place][train[place]].sum() for _, _, place in blocks) / 1e6:.1f} MB')
    texts = (text for key, _, place in blocks for text in index.texts(key, train[place]))
    self.work.put('tokenizer.model', config.train(texts, number).model)

  def _arranged(self, index: Index, counts: list[dict], parts: list[str]) -> dict[str, dict]:
    """Writes the stores; returns the counts and fingerprint of each."""
    tokenizer, tasks, totals = Tokenizer(self.work.get('tokenizer.model')), [], {}
    for part in parts:
      totals[part], new = arrangement(self.work, self.place, part, index, counts, tokenizer.vocab)
      tasks += new
    hashes = self.steps.done('writing', pipeline.arrange, tasks)
    for part, total in totals.items():
      columns = {name: [] for name in ('tokens', *store.COLUMNS)}
      for task, found in zip(tasks, hashes):
        if task.part == part:
          columns[task.column].append(found['sha256'])
      total['fingerprint'] = store.finish(
          self.place / part, tokenizer, columns, documents=total['documents'], tokens=total['tokens'],
          text_bytes=total['bytes'], names_bytes=total['names_bytes'], sources=list(map(repr, self.corpus.sources)))
    return totals

  def _finish(self, wanted: dict, index: Index, reads: list[dict], report, parts: dict[str, dict]) -> dict:
    unread, spoken = Counter(), {}
    for found in reads:
      unread.update(found['unread'][0])
      for language, counts in found['languages'].items():
        spoken[language] = np.add(spoken.get(language, 0), counts)
    listed = [pair for found in reads for pair in found['unread'][1]]
    if self.corpus.on_error == 'refuse':  # what sources leave out by themselves
      listed = skipped(self.corpus)
      unread.update(reason.split(':')[0] for _, reason in listed)
    tokenizer = Tokenizer(self.work.get('tokenizer.model'))
    manifest = {'format': FORMAT, 'tokenizer': tokenizer.fingerprint, 'vocab': tokenizer.vocab, 'parts': parts,
                'read': {key: sum(found[key] for found in reads) for key in ('documents', 'bytes')},
                'sources': index.sources, 'unreadable': dict(sorted(unread.items())),
                'unreadable_examples': list(listed)[:pipeline.LISTED], 'stages': json.loads(report.to_json()),
                'languages': {language: [int(n) for n in counts] for language, counts in sorted(spoken.items())},
                'content': store.digest([found['content'] for found in reads]), 'identity': wanted}
    self.place.put('manifest.json', json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b'\n')
    if self.target.local is not None:
      store.appear(self.place.local, self.target.local)
    return manifest


def arrangement(work: Folder, place: Folder, part: str, index: Index, counts: list[dict], vocab: int):
  """The totals of a part of the store, and the tasks that write it. Makes its empty arrays."""
  total, before = Counter(documents=0, tokens=0, bytes=0, names_bytes=0), []
  for (key, _, _), found in zip(index.blocks, counts):
    before.append((f'tokenize/{key.removeprefix("read/")}', dict(total)))
    total.update(found['parts'][part])
  ends = [*(known for _, known in before[1:]), dict(total)]
  tasks, dtypes = [], {'tokens': store.token_type(vocab), **store.COLUMNS}
  for column, dtype in dtypes.items():
    unit = {'tokens': 'tokens', 'names': 'names_bytes'}.get(column, 'documents')
    lead = int(column in ('offsets', 'name_offsets'))  # these begin with a 0 that is of no document
    size = total[unit] + lead
    store.column(place / part / column, dtype, size)
    for start in range(0, size, store.SHARD):
      stop = min(start + store.SHARD, size)
      blocks = tuple((key, known['documents'], known['tokens'], known['names_bytes'])
                     for (key, known), end in zip(before, ends)
                     if known[unit] + lead < stop and end[unit] + lead > start)
      tasks.append(Arrange(str(work), str(place), part, column, dtype, start, stop - start, size, blocks))
  return dict(total), tasks


class _Lines:
  """A terminal.Terminal for a function that takes lines; progress is not shown."""

  def __init__(self, say: Callable[[str], None]):
    self.say = say

  def progress(self, text: str, *, last: bool = False):
    pass
