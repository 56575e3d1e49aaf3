"""A whole model from a file of llama.cpp's form to a WORKDIR and back, as conversion.py does with folders."""
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from lmlib import gin_text, trees
from lmlib.data.tokenizer import Tokenizer
from lmlib.interop import check, family, folder, gguf
from lmlib.models import protocol
from lmlib.terminal import Terminal
from lmlib.train import workdir
from lmlib.train.checkpoint import Checkpoints, restore_params
from lmlib.train.step import placed

DTYPES = ('float32', 'bfloat16', 'float16')
# Of the largest logit. Eight bits round every weight by up to 1/254 of the largest beside it.
LIMITS = {'F32': check.OWN_LIMIT, 'F16': 1e-2, 'Q8_0': 1e-1}


def to_workdir(source: str, target: str, *, dtype: str | None, checked: bool | None, terminal: Terminal):
  """Makes the WORKDIR `target` of the GGUF file `source`, its weights as `dtype` (None: float32).

  ValueError for what is wrong with either, RunFault if the logits of the checkpoint are not those of the file.
  """
  if dtype not in (None, *DTYPES):
    raise ValueError(f'dtype={dtype!r} must be one of {", ".join(map(repr, DTYPES))}')
  into = pathlib.Path(target).expanduser()
  folder.refuse_existing(into)
  config, params, tokenizer = gguf.load(source)
  params = jax.tree.map(lambda x: x.astype(dtype or 'float32'), params)
  terminal.say(f'source      {source}: {trees.count(params):,} weights')
  with folder.new(into, trees.nbytes(params)) as partial:
    if tokenizer is not None:
      tokenizer.save(partial / 'tokenizer.model')
    (partial / 'config.gin').write_text(
        f'# The model of {source}, as those of gin_configs/models/.\n{gin_text.macro_text({"MODEL": config})}')
    manifest = {'identity': workdir.flat({'model': config}), 'converted': str(source),
                'parameters': trees.count(params)}
    (partial / 'manifest.json').write_text(json.dumps(manifest | workdir.environment(), indent=2) + '\n')
    checkpoints = Checkpoints(partial / 'checkpoints')
    checkpoints.save(0, {'params': params})
    checkpoints.close()
    if _wanted(checked, terminal):
      restored = restore_params(partial / 'checkpoints', placed(protocol.boxed(config)))[0]
      _say(terminal, target, _logits(config, restored), _logits(config, params), check.OWN_LIMIT)


def to_file(source: str, config: protocol.Config, target: str, *, kind: str, architecture: str | None,
            checked: bool | None, terminal: Terminal):
  """Writes the model `config` in the WORKDIR `source` as a GGUF file, its matrices as `kind`.

  ValueError for what is wrong with either or has no words in GGUF, RunFault if what was written, read again,
  gives other logits than the kind's rounding explains; then no file is left.
  """
  here, into = pathlib.Path(source).expanduser(), pathlib.Path(target).expanduser()
  if into.exists():
    raise ValueError(f'TARGET {target!r} exists already')
  params, step, _ = restore_params(here / 'checkpoints', placed(protocol.boxed(config)))
  tokenizer = Tokenizer.load(here / 'tokenizer.model') if (here / 'tokenizer.model').is_file() else None
  terminal.say(f'source      {source} after step {step}, {trees.count(params):,} weights, written as {kind}')
  partial = into.with_name(f'{into.name}.partial')
  try:
    gguf.save(partial, config, params, tokenizer, kind=kind, architecture=architecture)
    if _wanted(checked, terminal):
      _say(terminal, target, _logits(*gguf.load(partial)[:2]), _logits(config, params), LIMITS[kind])
    partial.rename(into)
  finally:
    partial.unlink(missing_ok=True)


def _logits(config, params) -> np.ndarray:
  """Of a fixed row of tokens, in float32."""
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  (tokens_BT,), _ = family.tokens(config)
  return np.asarray(jax.jit(config.model().apply)({'params': params}, tokens_BT)[0])


def _wanted(checked: bool | None, terminal: Terminal) -> bool:
  if checked is False:
    terminal.say('NOT checked the logits were not compared: check = False')
  return checked is not False


def _say(terminal: Terminal, target: str, ours, others, limit: float):
  terminal.say(f'checked     {check.compared(f"{target} beside its source", ours, others, limit).hold()}')
