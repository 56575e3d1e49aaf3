"""Evaluates models of WORKDIRs, trained or converted: whatever evaluations a gin file names, models side by side.

  python experiments/evaluate.py --gin_file=evaluate.gin --gin_bindings='GLOB = "texts/*.txt"'
  python experiments/evaluate.py --gin_file=evaluate_multiple_choice.gin --gin_bindings='FOLDER = "mmlu/data"'

The same command run again, after a kill too, asks no model twice.
"""
from lmlib import cli

if __name__ == '__main__':  # before jax is imported, which reads its log level then
  cli.run(__file__)

import contextlib
import pathlib

from lmlib import gin_text, sharding
from lmlib.data.tokenizer import Tokenizer
from lmlib.eval import answers, evaluation, pictures, scoreboard
from lmlib.eval.candidate import Candidate
from lmlib.models import protocol
from lmlib.train.checkpoint import restore_params
from lmlib.train.step import placed
from lmlib.train.workdir import environment


def main(*, workdir: str, evaluations: tuple, beside: tuple = (), out: str | None = None, layout=sharding.Layout()):
  """Writes evaluation.json, evaluation.md and pictures to `out` (None: report/ of `workdir`).

  evaluations: of lmlib/eval/evaluations.py, or others of that form. beside: WORKDIRs of further models, compared
  with that of `workdir` on the same questions. Each keeps its answers in <WORKDIR>/evaluation/answers.jsonl. The last
  line is a JSON object: the score of every model by task and metric.
  """
  config = gin_text.gin_text('experiments.evaluate.main', locals())
  folders = [pathlib.Path(name).expanduser() for name in (workdir, *beside)]
  names = [folder.name if [one.name for one in folders].count(folder.name) == 1 else str(folder) for folder in folders]
  if len(set(names)) < len(names):
    raise ValueError(f'beside={beside} and WORKDIR {workdir!r}: a model stands beside itself')
  models = [cli.saved_model(str(folder)) for folder in folders]
  evaluation.check(evaluations)
  report = folders[0] / 'report' if out is None else pathlib.Path(out).expanduser()

  found, said = [], {}
  with sharding.use(layout):
    for folder, name, model in zip(folders, names, models):
      params, step, _ = restore_params(folder / 'checkpoints', placed(protocol.boxed(model)))
      tokenizer = Tokenizer.load(folder / 'tokenizer.model')
      fingerprint = answers.fingerprint(model, params, tokenizer)
      with contextlib.closing(answers.Answers(folder / 'evaluation' / 'answers.jsonl', fingerprint)) as kept:
        print(f'model       {folder} after step {step}')
        found += evaluation.run(evaluations, Candidate(name, model, params, tokenizer, kept))
      said[name] = {'workdir': str(folder), 'step': step, 'fingerprint': fingerprint}
      del params
      scoreboard.write(report, found, models=said, config=config, **environment())
  drawn = pictures.draw(report, found)
  print(f'\n{scoreboard.markdown(found)}\nreport      {report}: ' + ', '.join(
      ['evaluation.json', 'evaluation.md', *(path.name for path in drawn)]))
  print(evaluation.summary(found))
