"""Takes a model over from Hugging Face's form or llama.cpp's into a WORKDIR, or writes that of a WORKDIR in theirs.

  python experiments/convert.py --gin_file=convert.gin --gin_bindings='SOURCE = "SmolLM2-135M"' \\
      --gin_bindings='TARGET = "runs/smollm2"'
  python experiments/convert.py --gin_file=convert.gin --gin_bindings='SOURCE = "runs/smollm2"' \\
      --gin_bindings='TARGET = "published/smollm2"'

A SOURCE that holds a config.json is in Hugging Face's form, one that holds a config.gin is a WORKDIR; a SOURCE or
TARGET named *.gguf is a file of llama.cpp's form, which is in memory whole. Of a folder no more than a tensor is at
a time, but for the comparison of logits at the end.
"""
from lmlib import cli

if __name__ == '__main__':
  cli.run(__file__)

import pathlib

from lmlib.interop import conversion, gguf_conversion
from lmlib.interop.folder import read_json
from lmlib.models import protocol
from lmlib.terminal import Terminal


def main(*, source: str, target: str, dtype: str | None = 'float32', model_type: str | None = None,
         shard: float = 5e9, check: bool | None = None, kind: str | None = None):
  """Writes the model of the folder `source` to a new folder `target`, and compares logits of the two.

  dtype: of the weights written, float32, bfloat16 or float16; None, for a WORKDIR: as the source has them.
  model_type: of config.json, where several families could hold the model (None: the one that it came from, or the
  first). shard: bytes of a file of weights. check: None compares logits if the model fits in memory, True in any
  case, False never; with transformers' too where torch and transformers are installed. kind: of the matrices in a
  GGUF file, F16 (or None), Q8_0 or F32, whose model_type is the architecture there.
  """
  terminal, folder = Terminal(), pathlib.Path(source).expanduser()
  inwards, outwards = (folder / 'config.json').exists(), (folder / 'config.gin').exists()
  if inwards and outwards:
    raise ValueError(f'SOURCE {source!r} holds a config.json and a config.gin: is it a model of others or a WORKDIR?')
  if kind is not None and not (outwards and target.endswith('.gguf')):
    raise ValueError(f'kind={kind!r} is of GGUF files, and TARGET {target!r} is none: leave it out')
  if outwards and target.endswith('.gguf'):
    gguf_conversion.to_file(source, cli.saved_model(source), target, kind=kind or 'F16', architecture=model_type,
                            checked=check, terminal=terminal)
    terminal.say(f'written     {target}\nnext        llama-cli -m {target}')
  elif outwards:
    conversion.to_folder(source, cli.saved_model(source), target, model_type=model_type, dtype=dtype,
                         longest=int(shard), checked=check, terminal=terminal)
    architecture, = read_json(pathlib.Path(target).expanduser() / 'config.json')['architectures']
    terminal.say(f"written     {target}\nnext        transformers.{architecture}.from_pretrained('{target}')")
  else:
    of = gguf_conversion if source.endswith('.gguf') else conversion
    of.to_workdir(source, target, dtype=dtype, checked=check, terminal=terminal)
    terminal.say(f'written     {target}')
    if protocol.decodes(cli.saved_model(target)):
      terminal.say("next        python experiments/generate.py --gin_file=generate.gin --gin_bindings='WORKDIR = "
                   f'"{target}"\'')
