"""Adds an adapter in PEFT's form, as experiments/sft.py and peft write it, into the weights of its model.

  python experiments/merge.py --gin_file=merge.gin --gin_bindings='SOURCE = "SmolLM2-135M-Instruct"' \\
      --gin_bindings='PATH = "runs/sft_lora/adapter"' --gin_bindings='TARGET = "runs/sft_lora_merged"'

SOURCE is a model as experiments/sft.py takes it; TARGET becomes a WORKDIR.
"""
from lmlib import cli

if __name__ == '__main__':
  cli.run(__file__)

from lmlib.interop import opened
from lmlib.nn import adapters
from lmlib.terminal import Terminal


def main(*, source: str, path: str, target: str):
  """Makes the WORKDIR `target` of the model at `source` with the adapter in the folder `path` merged into it."""
  terminal, begun = Terminal(), opened.opened(source, cli.saved_model)
  adapter = opened.adapter_of(path, begun.config)
  params = adapters.merge(begun.config, begun.params(begun.config), adapter)
  opened.to_workdir(target, begun.config, params, begun.tokenizer, f'The model of {source} with the adapter {path}')
  terminal.say(f'merged      {path} into {source}\nwritten     {target}\nnext        python experiments/generate.py '
               f"--gin_file=generate.gin --gin_bindings='WORKDIR = \"{target}\"'")
