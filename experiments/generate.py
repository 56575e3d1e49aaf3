"""Continues prompts with a model that experiments/pretrain.py trained.

  python experiments/generate.py --gin_file=generate.gin --gin_bindings='PROMPTS = ("import ",)'
"""
from lmlib import cli

if __name__ == '__main__':  # before jax is imported, which reads its log level then
  cli.run(__file__)

import pathlib

from experiments import pretrain
from lmlib import sharding
from lmlib.data.tokenizer import Tokenizer
from lmlib.models import protocol
from lmlib.serve.generate import generate
from lmlib.train.checkpoint import restore_params
from lmlib.train.step import placed


def main(*, workdir: str, prompts: tuple, layout=sharding.Layout(), new: int = 200, temperature: float = 0.7,
         top_k: int | None = None, seed: int = 0):
  """Prints each prompt and up to `new` tokens after it, from the newest checkpoint in `workdir`."""
  folder = pathlib.Path(workdir).expanduser()
  model = cli.saved(pretrain.main, workdir)['model']
  tokenizer = Tokenizer.load(folder / 'tokenizer.model')
  with sharding.use(layout):
    params, step, _ = restore_params(folder / 'checkpoints', placed(protocol.boxed(model)))
    ids = [[tokenizer.bos, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    continued = generate(model, params, ids, new=new, eos=tokenizer.eos, temperature=temperature, top_k=top_k,
                         seed=seed)
  print(f'{workdir} after step {step}')
  for prompt, row in zip(prompts, continued):
    print(f'---- {prompt!r} is continued\n{prompt}{tokenizer.decode(row, continues=True)}\n')
