"""How well a model predicts what its objective hides in documents that training has not seen.

For models that do not write a text from its beginning to its end, which perplexity.py is about: encoders, and
encoder-decoders that fill in what was taken out.
"""
import dataclasses
import math

import jax
import numpy as np

from lmlib.models import protocol


@dataclasses.dataclass(frozen=True)
class Score:
  objective: str  # what hid the tokens
  nats: float  # of all hidden tokens together
  right: int  # of them, how often the first guess was right
  hidden: int
  read: int  # tokens that were shown or hidden
  blind_nats: float  # of the hidden tokens for one who knows how often each of them comes, and reads nothing

  @property
  def nats_per_token(self) -> float:
    return self.nats / self.hidden

  def figures(self) -> dict:
    """What a report writes down."""
    return {'objective': self.objective, 'hidden_nats': self.nats_per_token, 'hidden_perplexity':
            math.exp(self.nats_per_token), 'hidden_accuracy': self.right / self.hidden, 'hidden_tokens': self.hidden,
            'read_tokens': self.read, 'blind_nats': self.blind_nats / self.hidden}


def score(config: protocol.Config, params, loss, batches) -> Score:
  """Scores one epoch of the rows of `batches`, packing.Batches of the documents, by a loss with metrics of its own.

  ValueError if they hide nothing.
  """
  sums = jax.jit(lambda params, batch: loss.of(config)(params, batch)[1:])
  found, count_V, read = np.zeros(3), np.zeros(config.vocab), 0
  for store in batches.stores.stores:
    mine = dataclasses.replace(batches, store=store)
    for start in range(0, mine.rows_per_epoch, mine.batch):
      left = slice(0, min(mine.batch, mine.rows_per_epoch - start))
      batch = mine.batch_at(start // mine.batch, left)
      weight, metrics = sums(params, batch)
      found += [float(metrics['nats']), float(metrics['accuracy']), float(weight)]
      count_V += np.bincount(batch['targets_BT'].reshape(-1), batch['weight_BT'].reshape(-1), config.vocab)
      read += sum(int((batch[name] > 0).sum()) for name in ('segments_BT', 'input_segments_BS') if name in batch)
  if not found[2]:
    raise ValueError(f'{type(batches.objective).__name__} hides no token of the held-out documents')
  share_V = count_V[count_V > 0] / count_V.sum()
  return Score(type(batches.objective).__name__, found[0], round(found[1]), round(found[2]), read,
               -found[2] * float((share_V * np.log(share_V)).sum()))
