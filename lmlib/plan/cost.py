"""Model FLOPs by formula; what the hardware repeats (remat) or wastes (padding) does not count."""
import dataclasses

from flax import linen as nn
import jax

from lmlib import sharding, trees
from lmlib.models import protocol
from lmlib.optim.kinds import kind, stacked


@dataclasses.dataclass(frozen=True)
class Flops:
  """Training FLOPs a token, forward and backward.

  six_nd: 6 N, N all weights (Kaplan et al. 2020). exact: 6 for every weight that multiplies a
  token (a looked-up table does not), 4 where it is frozen, and 3 times the forward attention over a causal sequence
  (PaLM, Chowdhery et al. 2022, appendix B, with the masked half left out). Of weights that are one an
  expert both count the share that computes a token, and of those of an encoder-decoder the share of its side.
  """
  six_nd: float
  exact: float


@dataclasses.dataclass(frozen=True)
class Forward:
  """Counts of a decoder's forward pass; a value that evaluations are given, since they lie left of this package."""

  def __call__(self, config: protocol.Config, length: int) -> float:
    """FLOPs a token over sequences of `length`: a third of the exact ones of training."""
    return train_flops(config, length).exact / 3


def train_flops(config: protocol.Config, length: int, answer: float | None = None, *,
                beside: int | None = None) -> Flops:
  """Training FLOPs a token of a model on sequences of `length`.

  beside: numbers of an adapter that is trained where all weights of the model are frozen: they get no gradient, so
  each costs 4; None: they are trained.
  answer: of an encoder-decoder, how many tokens its decoder has for `length` of its encoder; a token is then one of
  either side, and takes part in what its side computes. ValueError for one without it.
  """
  if (answer is None) == (sides := protocol.encodes(config) and protocol.decodes(config)):
    raise ValueError(f'answer={answer}: the tokens of a decoder behind an encoder, and of no other, are to be given')
  boxed = protocol.boxed(config)
  weights, letters = trees.flat(nn.unbox(boxed)), trees.flat(sharding.letters(boxed))
  unembed = jax.eval_shape(lambda p: config.model().apply({'params': p}, method='unembed'), nn.unbox(boxed))
  share = protocol.expert_share(config)
  used = {name: trees.count(w) * (share if 'E' in letters[name][:stacked(letters[name])] else 1)
          for name, w in weights.items()}
  if sides:
    of_inputs = length / (length + answer)
    used = {name: count * (of_inputs if config.of_inputs(name) else 1 - of_inputs) for name, count in used.items()}
  matrices = [name for name, axes in letters.items() if kind(name.rpartition('/')[2], axes) == 'matrix']
  multiplied = sum(used[name] for name in matrices) + trees.count(unembed) * (1 - of_inputs if sides else 1)
  attention = config.attention_flops(length, answer) if sides else config.attention_flops(length)
  each, more = (6, 0) if beside is None else (4, 6 * beside)
  return Flops(six_nd=each * sum(used.values()) + more, exact=each * multiplied + more + 3 * attention)
