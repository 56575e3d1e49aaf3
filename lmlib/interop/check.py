"""Whether a converted model computes what the one it was made of does: logits of both sides, and of transformers.

lmlib's own logits of either side show that nothing was lost on the way; those of transformers, where it is
installed, that the table and the config are right. Models that would not fit in memory are left out, and
that is said.
"""
import dataclasses
import importlib.util
import pathlib

import jax
import numpy as np

from lmlib import trees
from lmlib.interop.family import Family, shapes
from lmlib.interop.folder import read_json
from lmlib.models import protocol
from lmlib.train.health import RunFault
from lmlib.train.step import placed

OUTPUTS = ('logits', 'prediction_logits', 'last_hidden_state')  # what transformers calls what lmlib's models return
# The same program on the same numbers; only a scale that is stored less 1 is rounded once more.
OWN_LIMIT = 1e-6
# float32 sums in another order, of the largest logit.
LIMIT = 1e-4


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What was compared, and how far apart: the largest difference, as a share of the largest logit."""
  what: str
  difference: float
  limit: float

  def __str__(self) -> str:
    return f'{self.what}: logits differ by {self.difference:.1e} of the largest, at most {self.limit:.0e} is right'

  def hold(self) -> 'Outcome':
    """Itself. Raises RunFault if the difference is beyond the limit, or no number."""
    if not self.difference <= self.limit:
      raise RunFault(f'{self}: nothing is kept')
    return self


def too_large(config: protocol.Config) -> str | None:
  """Why a check of this model cannot be made here; None if it fits in memory."""
  # Weights in float32, and half as much for what XLA and torch need beside them.
  need, free = 1.5 * trees.nbytes(placed(shapes(config))), _available()
  return None if need <= free else f'it needs {need / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free'


def logits(family: Family, config: protocol.Config, params) -> np.ndarray:
  """What lmlib's model gives for the family's probe, float32."""
  arguments, _ = family.probe(config)
  apply = jax.jit(lambda params, *arguments: config.model().apply({'params': params}, *arguments))
  found = apply(params, *arguments)
  return np.asarray(found[0] if isinstance(found, tuple) else found, np.float32)


def their_logits(family: Family, config: protocol.Config, folder: pathlib.Path, dtype: str | None) -> np.ndarray:
  """What transformers gives for the family's probe, with the weights of a folder in float32.

  dtype: what the weights are rounded to first, None for not at all.
  """
  import torch
  import transformers
  transformers.logging.disable_progress_bar()
  transformers.logging.set_verbosity_error()
  _, arguments = family.probe(config)
  said = read_json(folder / 'config.json').get('architectures')
  known = [name for name in said if name in transformers.__all__] if isinstance(said, list) else []
  name = known[0] if known else family.architectures[0]  # of the heads of a family there may be several
  model = getattr(transformers, name).from_pretrained(
      folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, attn_implementation='eager').eval()
  with torch.no_grad():
    for weight in model.parameters() if dtype else ():
      weight.copy_(weight.to(getattr(torch, dtype)))
    found = model(**{name: torch.from_numpy(np.asarray(x)) for name, x in arguments.items()})
  return next(found[name] for name in OUTPUTS if name in found).numpy()


def has_transformers() -> bool:
  return all(importlib.util.find_spec(name) is not None for name in ('torch', 'transformers'))


def compared(what: str, ours: np.ndarray, others: np.ndarray, limit: float) -> Outcome:
  """How far apart two arrays of logits are. Raises RunFault if their shapes are not the same."""
  if ours.shape != others.shape:
    raise RunFault(f'{what}: logits of {ours.shape} and {others.shape} are not of one shape; nothing is kept')
  difference = float(np.abs(ours - others).max())
  return Outcome(what, difference and difference / float(np.abs(others).max()), limit)


def _available() -> int:
  """Bytes of memory that a process may take."""
  try:
    with open('/proc/meminfo') as file:
      found = dict(line.split(':', 1) for line in file)
    return int(found['MemAvailable'].split()[0]) * 1024
  except (OSError, KeyError, ValueError):  # not Linux
    import os
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
