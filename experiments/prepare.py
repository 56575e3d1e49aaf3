"""Prepares text for training: reads, cleans, deduplicates, trains or loads the tokenizer, tokenizes, stores.

  python experiments/prepare.py --gin_file=prepare_standard_library.gin
  python experiments/prepare.py --gin_file=prepare_text_files.gin --gin_bindings='GLOB = "texts/**/*.txt"'
  python experiments/prepare.py --gin_file=... --gin_bindings='workers.Local.processes = 2'
  python experiments/prepare.py --gin_file=... --gin_bindings='experiments.prepare.main.engine = @beam.Beam()'

The same command run again goes on where it stopped. The result does not depend on who worked.
"""
from lmlib import cli

if __name__ == '__main__':
  cli.run(__file__)

import json

from lmlib.data import cleaning, fertility, preparation, workers
from lmlib.data import prepare as prepares
from lmlib.terminal import Terminal
from lmlib.train import health


def main(*, data, path: str, engine=workers.Local(), examples: bool = False):
  """Writes what the corpus `data` holds to `path`, a folder or a URL that tensorstore knows (gs://, s3://).

  `engine` says who works: workers.Local, or beam.Beam. With `examples`, the report of what each cleaning stage
  did shows some of it.
  """
  terminal = Terminal()
  again = f'stopped; what is done lies in {path}.partial: run the same command again to go on'
  with health.stopping(again):
    found = preparation.write(data, path, engine=engine, say=terminal.say, terminal=terminal)
    prepared = prepares.opened(path)
    terminal.say(prepared.table())
    terminal.say('the tokenizer by language, on a sample\n' + fertility.table(fertility.of_store(prepared.train)))
    if found['unreadable']:
      reasons = ', '.join(f'{reason} {count:,}' for reason, count in found['unreadable'].items())
      name, said = found['unreadable_examples'][0]
      terminal.say(f'left out    what could not be read: {reasons}; for example {name}: {said}')
    if found['stages']['stages']:
      report = cleaning.Report.from_json(json.dumps(found['stages']))
      report.examples *= examples
      terminal.say(report.table())
    terminal.say(f'prepared    {path}\n'
                 f'next        python experiments/pretrain.py --gin_file=pretrain_stored.gin '
                 f"--gin_bindings='PATH = \"{path}\"' "
                 f"--gin_bindings='dense.Config.vocab = {prepared.tokenizer.vocab}'")
