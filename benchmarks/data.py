"""From text to packed rows, and from a store to batches: lmlib beside grain and seqio.

(a) Tokenising and packing raw text at length 1024: the source of Python's standard library and of what is installed
beside it, one SentencePiece model for all. In lmlib two processes write half of the text each into stores, and an
epoch of best-fit batches is read from the two, mixed. grain tokenises in its map and packs by FirstFit or by
ConcatThenSplit, in its threads or in two worker processes; seqio packs by its own trim_and_pack_dataset. Each side
is a process of its own; they take turns, so that a machine that slows down slows all of them. Documents longer than a
row are cut before FirstFit and seqio, which would refuse or drop the rest.

(b) Batches from a store, nothing else: tokens a second, where the time goes, and memory; on 1, 4 and 16 copies of the
corpus, and as 1, 8 and 64 stores mixed. Needs grain, and seqio with its TensorFlow, beside lmlib:

  pip install grain seqio && python benchmarks/data.py
"""
import cProfile
import importlib.util
import json
import os
import pathlib
import platform
import pstats
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time

LENGTH, PIECES, ROUNDS = 1024, 4096, 3
GOAL, TOKENS_GOAL = 1.5, 20e6
TEXT = 48_000_000  # characters of (a), or what there is
SIZES, SOURCES, BATCHES = (1, 4, 16), (1, 8, 64), (8, 64)


def tokenizer_and_texts(folder: pathlib.Path):
  from lmlib.data.sources import StandardLibrary
  from lmlib.data.tokenizer import SentencePiece, Tokenizer
  texts = [document.text for document in StandardLibrary().documents()]
  path = folder / 'tokenizer.model'
  if not path.exists():
    SentencePiece(pieces=PIECES).train(texts, sum(map(len, texts))).save(path)
  return Tokenizer.load(path), texts


def race_texts(texts: list[str]) -> list[str]:
  """Texts and the sources of installed packages, TEXT bytes in all, so that starting a process weighs little."""
  size, texts = sum(map(len, texts)), list(texts)
  for path in sorted(pathlib.Path(sysconfig.get_path('purelib')).rglob('*.py')):
    text = path.read_bytes().decode(errors='ignore')
    if text and '\u2581' not in text:
      texts.append(text)
      size += len(text)
    if size > TEXT:
      break
  return texts


def lmlib_side(folder):
  """Text to two stores, one by another process, to an epoch of packed rows."""
  import numpy as np

  from lmlib.data.best_fit import BestFit
  from lmlib.data.mixture import Stores
  from lmlib.data.packing import Batches
  from lmlib.data.store import Store
  texts = race_texts(tokenizer_and_texts(folder)[1])
  # In order, the first half by size.
  half = int(np.searchsorted(np.cumsum([len(text) for text in texts]), sum(map(len, texts)) / 2))
  first = folder / 'first half.json'  # as the other process reads it
  first.write_text(json.dumps(texts[:half]))

  def run():
    with tempfile.TemporaryDirectory() as out:
      with subprocess.Popen([sys.executable, __file__, 'write', str(folder), f'{out}/0', str(first)]) as other:
        written(folder, f'{out}/1', texts[half:])
      if other.returncode:
        raise SystemExit('the other process could not write its store')
      halves = tuple(Store(f'{out}/{i}') for i in (0, 1))
      batches = Batches(Stores(halves, tuple(half.tokens for half in halves)), 64, LENGTH, 0, BestFit())
      steps = -(-sum(half.tokens for half in halves) // (64 * LENGTH)) + 1  # every row once, or nearly
      return sum(len(batches.batch_at(step)['tokens_BT']) for step in range(steps))

  return run


def written(folder, path: str, texts: list[str]):
  """Writes a store of texts. The tokeniser is new: it remembers nothing of the round before."""
  from lmlib.data import store
  from lmlib.data.sources import Document
  from lmlib.data.tokenizer import Tokenizer
  tokenizer = Tokenizer.load(pathlib.Path(folder) / 'tokenizer.model')
  store.write(path, (Document(str(i), text) for i, text in enumerate(texts)), tokenizer)


def grain_side(folder, packing: str, processes: int):
  """grain: a source of texts, tokenised in map, packed; as its documentation puts them together."""
  import grain
  from grain import experimental
  import numpy as np
  import sentencepiece
  texts = race_texts(tokenizer_and_texts(folder)[1])
  processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))
  ends = [processor.bos_id()], [processor.eos_id()]
  tokenised = lambda text: {'tokens': np.array(ends[0] + processor.encode(text) + ends[1], np.int32)}

  class Cut(experimental.FlatMapTransform):
    """A document in parts of at most a row."""
    max_fan_out = 4096

    def flat_map(self, element):
      return [{'tokens': element['tokens'][a:a + LENGTH]} for a in range(0, len(element['tokens']), LENGTH)]

  def run():
    rows = grain.MapDataset.source(texts).map(tokenised).to_iter_dataset()
    lengths = {'tokens': LENGTH}
    if packing == 'FirstFit':
      rows = experimental.FlatMapIterDataset(rows, Cut())
      rows = experimental.FirstFitPackIterDataset(rows, length_struct=lengths, num_packing_bins=64)
    else:
      rows = experimental.ConcatThenSplitIterDataset(rows, length_struct=lengths)
    if processes:
      rows = rows.mp_prefetch(grain.MultiprocessingOptions(num_workers=processes))
    return sum(1 for _ in rows)

  return run


def seqio_side(folder):
  """seqio: its own packing of a tf.data.Dataset."""
  import numpy as np
  import sentencepiece
  import seqio
  import tensorflow as tf
  texts = race_texts(tokenizer_and_texts(folder)[1])
  processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))

  def parts():
    for text in texts:
      ids = np.array([processor.bos_id(), *processor.encode(text), processor.eos_id()], np.int32)
      for start in range(0, len(ids), LENGTH):
        yield {'targets': ids[start:start + LENGTH]}

  def run():
    rows = tf.data.Dataset.from_generator(parts, output_signature={'targets': tf.TensorSpec([None], tf.int32)})
    return sum(1 for _ in seqio.utils.trim_and_pack_dataset(rows, {'targets': LENGTH}))

  return run


SIDES = {'lmlib': lmlib_side, 'grain FirstFit': lambda folder: grain_side(folder, 'FirstFit', 0),
         'grain ConcatThenSplit': lambda folder: grain_side(folder, 'ConcatThenSplit', 0),
         'grain ConcatThenSplit, 2 processes': lambda folder: grain_side(folder, 'ConcatThenSplit', 2),
         'seqio': seqio_side}


def side(name: str, folder: str):
  """A process that makes rows whenever a line comes in, and says in what time, of the clock and of its CPUs."""
  if name.startswith('grain'):
    from absl import flags
    flags.FLAGS(sys.argv[:1])  # its worker processes ask for them
  run = SIDES[name](pathlib.Path(folder))
  print('ready', flush=True)
  for _ in sys.stdin:
    start, used = time.perf_counter(), cpu_seconds()
    rows = run()
    print(json.dumps([time.perf_counter() - start, cpu_seconds() - used, rows]), flush=True)


def cpu_seconds() -> float:
  """Of this process and of those that it has waited for."""
  return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def resident() -> int:
  """Bytes of memory that this process has now; the most it ever had would count its parent's too."""
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()


def reader(paths: list[str], batch: int, packing: str):
  """A process that reads batches from stores: tokens a second, seconds of CPU a million tokens, memory, profile."""
  from lmlib.data.best_fit import BestFit
  from lmlib.data.mixture import Stores
  from lmlib.data.packing import Batches, Split
  from lmlib.data.store import Store
  before = resident()
  stores = Stores(tuple(map(Store, paths)), rates=(1,) * len(paths))
  batches = Batches(stores, batch, LENGTH, 0, {'Split': Split(), 'BestFit': BestFit()}[packing])
  epoch = max(1, sum(store.tokens for store in stores.stores) // (batch * LENGTH))
  step, speed, cpu, steps = 0, [], [], max(1, 1024 // batch)
  for _ in range(min(epoch, 2 * steps)):
    batches.batch_at(step)
    step += 1
  for _ in range(2 * ROUNDS):
    start, used = time.perf_counter(), time.process_time()
    for i in range(steps):
      batches.batch_at(step + i)
    step += steps
    speed.append(steps * batch * LENGTH / (time.perf_counter() - start))
    cpu.append((time.process_time() - used) / (steps * batch * LENGTH / 1e6))
  far = time.perf_counter()
  for i in range(8):
    batches.batch_at(10**9 + i)
  far = (time.perf_counter() - far) / 8
  profile = cProfile.Profile()
  profile.runcall(lambda: [batches.batch_at(step + i) for i in range(steps)])
  rows = sorted(pstats.Stats(profile).stats.items(), key=lambda item: -item[1][2])
  total = sum(row[2] for _, row in rows)
  where = {f'{pathlib.Path(file).name}:{name}': round(row[2] / total, 3) for (file, _, name), row in rows[:6]}
  print(json.dumps({'tokens_per_second': statistics.median(speed), 'best': max(speed),
                    'cpu_seconds_per_million_tokens': statistics.median(cpu), 'memory_mb': (resident() - before) / 1e6,
                    'seconds_of_step_10**9': far, 'where': where}))


def stores(folder: pathlib.Path) -> dict:
  """Paths of the stores of (b), by their kind."""
  from lmlib.data import store
  from lmlib.data.sources import Document
  tokenizer, texts = tokenizer_and_texts(folder)
  made = {}
  for size in SIZES:
    documents = (Document(f'{copy} {i}', text) for copy in range(size) for i, text in enumerate(texts))
    made[f'corpus x {size}'] = [str(store.write(folder / f'size {size}', documents, tokenizer).path)]
  for count in SOURCES[1:]:
    made[f'{count} sources'] = [
        str(store.write(folder / f'{count} of {k}', (Document(str(i), t) for i, t in enumerate(texts[k::count])),
                        tokenizer).path) for k in range(count)]
  return made


def raced(folder: pathlib.Path, missing: list[str]) -> dict:
  """Of every side, in turns: pairs (seconds, seconds of CPU of all processes that have ended)."""
  sides = [name for name in SIDES if name.split()[0] not in missing]
  quiet = os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': ''}
  pipes = {name: subprocess.Popen([sys.executable, __file__, 'side', name, str(folder)], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=quiet)
           for name in sides}
  for name in sides:
    if pipes[name].stdout.readline().strip() != 'ready':
      raise SystemExit(f'{name} did not start')
  seconds = {name: [] for name in sides}
  for _ in range(ROUNDS):
    for name in sides:
      print('go', file=pipes[name].stdin, flush=True)
      took, used, rows = json.loads(pipes[name].stdout.readline())
      assert rows > 1, (name, rows)
      seconds[name].append((took, used))
  for pipe in pipes.values():
    pipe.communicate()
  return seconds


def main():
  missing = [name for name in ('grain', 'seqio') if importlib.util.find_spec(name) is None]
  if missing:
    print(f'missing: {", ".join(missing)}; pip install {" ".join(missing)}')
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    _, texts = tokenizer_and_texts(folder)
    megabytes = sum(len(text.encode()) for text in race_texts(texts)) / 1e6
    raced_seconds = raced(folder, missing)
    seconds, cpu = ({label: [pair[i] for pair in pairs] for label, pairs in raced_seconds.items()} for i in (0, 1))
    for label, values in seconds.items():
      print(f'{label:<36}{megabytes / statistics.median(values):>8.2f} MB/s   '
            f'({megabytes / max(values):.2f} to {megabytes / min(values):.2f})   '
            f'{statistics.median(cpu[label]):.2f} s of CPU', flush=True)
    reads = {}
    for label, paths in stores(folder).items():
      for packing, batch in [(p, b) for p in ('Split', 'BestFit') for b in BATCHES]:
        done = subprocess.run([sys.executable, __file__, 'read', json.dumps([paths, batch, packing])],
                              stdout=subprocess.PIPE, text=True, check=True)
        reads[f'{label}, {packing}, batch {batch}'] = found = json.loads(done.stdout)
        print(f'{label:<14}{packing:<9}batch {batch:<4}{found["tokens_per_second"] / 1e6:>7.1f} M tokens/s  '
              f'{found["memory_mb"]:>5.0f} MB  step 10^9 {1e3 * found["seconds_of_step_10**9"]:.1f} ms', flush=True)
    for label in ('corpus x 1, Split, batch 64', 'corpus x 1, BestFit, batch 64'):
      print(f'{label}: {", ".join(f"{where} {share:.0%}" for where, share in reads[label]["where"].items())}')
  others = [label for label in seconds if label.startswith('grain')]
  # Round by round against the best of grain in that round.
  ratios = [min(seconds[label][i] for label in others) / seconds['lmlib'][i] for i in range(ROUNDS)] if others else []
  ratio = statistics.median(ratios) if ratios else None
  speed = reads['corpus x 1, Split, batch 64']['tokens_per_second']
  print(json.dumps({'name': 'data', 'goal': GOAL, 'ratio': ratio,
                    'holds': bool(ratio and ratio >= GOAL and speed >= TOKENS_GOAL),
                    'figures': {label: megabytes / statistics.median(values) for label, values in seconds.items()}
                    | {'ratios': ratios, 'cpu_seconds': {label: statistics.median(cpu[label]) for label in cpu},
                       'tokens_goal': TOKENS_GOAL, 'reads': reads},
                    'machine': f'{os.cpu_count()} cores, {platform.platform()}'}))


if __name__ == '__main__':
  if sys.argv[1:2] == ['side']:
    side(*sys.argv[2:])
  elif sys.argv[1:2] == ['write']:
    written(*sys.argv[2:4], json.loads(pathlib.Path(sys.argv[4]).read_text()))
  elif sys.argv[1:2] == ['read']:
    reader(*json.loads(sys.argv[2]))
  else:
    main()
