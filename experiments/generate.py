"""Continues prompts with a model that experiments/pretrain.py trained, or experiments/convert.py took over.

  python experiments/generate.py --gin_file=generate.gin --gin_bindings='PROMPTS = ("import ",)'
"""
from lmlib import cli

if __name__ == '__main__':  # before jax is imported, which reads its log level then
  cli.run(__file__)

import pathlib

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
  model = cli.saved_model(workdir)
  tokenizer = Tokenizer.load(folder / 'tokenizer.model')
  with sharding.use(layout):
    params, step, _ = restore_params(folder / 'checkpoints', placed(protocol.boxed(model)))
    ids = [tokenizer.prompt(prompt) for prompt in prompts]
    continued = generate(model, params, ids, new=new, eos=tokenizer.eos, temperature=temperature, top_k=top_k,
                         seed=seed, start=tokenizer.bos if protocol.encodes(model) else None)
  print(f'{workdir} after step {step}')
  continued = [[i for i in row if i < tokenizer.vocab] for row in continued]  # a model may embed ids that mean nothing
  for prompt, row in zip(prompts, continued):
    print(f'---- {prompt!r} is continued\n{prompt}{tokenizer.decode(row, continues=True)}\n')
