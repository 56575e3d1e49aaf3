"""Model FLOPs by formula; what the hardware repeats (remat) or wastes (padding) does not count."""
import dataclasses

from flax import linen as nn
import jax

from lmlib import sharding, trees
from lmlib.models import protocol


@dataclasses.dataclass(frozen=True)
class Flops:
  """Training FLOPs a token, forward and backward.

  six_nd: 6 N, N all weights (Kaplan et al. 2020). exact: 6 for every weight that multiplies a
  token (a looked-up table does not) and 3 times the forward attention over a causal sequence
  (PaLM, Chowdhery et al. 2022, appendix B, with the masked half left out).
  """
  six_nd: float
  exact: float


def train_flops(config: protocol.Config, length: int) -> Flops:
  """Training FLOPs a token of a model on sequences of `length`."""
  boxed = protocol.boxed(config)
  weights, letters = trees.flat(nn.unbox(boxed)), trees.flat(sharding.letters(boxed))
  unembed = jax.eval_shape(lambda p: config.model().apply({'params': p}, method='unembed'), nn.unbox(boxed))
  vectors = [name for name, axes in letters.items() if len(axes.lstrip('L')) == 1]
  tables = [name for name, axes in letters.items() if 'V' in axes]
  multiplied = sum(trees.count(w) for name, w in weights.items() if name not in (*vectors, *tables))
  multiplied += trees.count(unembed)
  return Flops(six_nd=6 * trees.count(weights), exact=6 * multiplied + 3 * config.attention_flops(length))

