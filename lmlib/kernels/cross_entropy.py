"""Cross-entropy and log-probabilities of tokens straight from hidden states, without all logits in memory.

  logits[t,v] = cap(x[t,:] . w[:,v]) / temperature,   lse[t] = log sum_v exp(logits[t,v]),   p = exp(logits - lse)
  logp[t] = logits[t, target[t]] - lse[t],   entropy[t] = lse[t] - sum_v p[t,v] logits[t,v]
  nats = -sum_t weight[t] logp[t]
  total = nats + z_loss sum_t weight[t] lse[t]^2          (z-loss of PaLM, Chowdhery et al. 2022)

cap(x) = c tanh(x / c) if c is given (Gemma 2, 2024). Logits, softmax and sums are float32.
"""
import dataclasses

import jax
import jax.numpy as jnp

from lmlib.kernels import choice, cross_entropy_chunked, cross_entropy_tpu


@dataclasses.dataclass(frozen=True)
class Logits:
  """How logits are made of hidden states and a matrix DV, and by what."""
  softcap: float | None = None  # products lie between -softcap and softcap
  temperature: float | None = None  # what they are divided by then
  tied: bool = False  # DV is the transpose of a table VD: where it matters, that is read as it is stored
  implementation: str = 'auto'  # of IMPLEMENTATIONS, or 'auto': see chosen()

  def __post_init__(self):
    for name in ('softcap', 'temperature'):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f'cross_entropy.Logits.{name}={value!r} must be positive; None turns it off')
    if self.implementation not in ('auto', *IMPLEMENTATIONS):
      raise ValueError(f"cross_entropy.Logits.implementation={self.implementation!r} must be 'auto' or one of "
                       f'{sorted(IMPLEMENTATIONS)}')

  def of(self, product):
    """The logits of products, of any shape."""
    capped = product if self.softcap is None else self.softcap * jnp.tanh(product / self.softcap)
    return capped if self.temperature is None else capped / self.temperature

  def pulled(self, dlogits, logits):
    """The gradient of products, from that of logits."""
    if self.softcap is not None:
      dlogits = dlogits * (1 - (logits * ((self.temperature or 1.0) / self.softcap))**2)
    return dlogits if self.temperature is None else dlogits / self.temperature


def cross_entropy(x_BTD, w_DV, targets_BT, weight_BT, z_loss: float | None = None, logits: Logits | None = None):
  """(total, nats, correct): float32 sums over all positions. Only `total` has a gradient, for x and w.

  `correct` is the weight of the positions whose target has the highest logit. A target outside of the vocabulary
  makes total and nats NaN, unless it has no weight. ValueError if the implementation asked for cannot do the case.
  """
  logits = logits or Logits()
  implementation = _able(x_BTD, w_DV, logits)
  V = w_DV.shape[1]
  known_BT = (targets_BT >= 0) & (targets_BT < V)
  weight_BT = jnp.where(known_BT | (weight_BT == 0), weight_BT, jnp.nan)
  targets_BT = jnp.where(known_BT, targets_BT, 0)
  if implementation == 'chunked':
    return cross_entropy_chunked.cross_entropy(x_BTD, w_DV, targets_BT, weight_BT, z_loss, logits)
  lse_BT, target_BT, most_BT, _ = IMPLEMENTATIONS[implementation](x_BTD, w_DV, targets_BT, logits, False)
  nats = ((lse_BT - target_BT) * weight_BT).sum()
  total = nats if z_loss is None else nats + z_loss * (lse_BT**2 * weight_BT).sum()
  correct = ((target_BT == most_BT) * weight_BT).sum()
  return total, jax.lax.stop_gradient(nats), jax.lax.stop_gradient(correct)


def log_probs(x_BTD, w_DV, targets_BT, logits: Logits | None = None, *, entropy: bool = False):
  """Log-probabilities of targets, BT in float32; with `entropy` a pair of them and the entropies, BT in nats.

  Both have gradients for x and w, whatever follows. Where a target is negative there is no token: zeros, and no
  gradient. A target beyond the vocabulary gives NaN. ValueError as cross_entropy().
  """
  lse_BT, target_BT, _, mean_BT = facts(x_BTD, w_DV, targets_BT, logits, entropy=entropy)
  there_BT = targets_BT >= 0
  logp_BT = jnp.where(there_BT, target_BT - lse_BT, 0)
  return (logp_BT, jnp.where(there_BT, lse_BT - mean_BT, 0)) if entropy else logp_BT


def facts(x_BTD, w_DV, targets_BT, logits: Logits | None = None, *, entropy: bool = False):
  """(lse_BT, target_BT, most_BT, mean_BT) of the logits of each position, in float32.

  most is the highest and has no gradient; mean is that under p, None without `entropy`. The logit of a negative target
  is that of token 0, of one beyond the vocabulary NaN.
  """
  logits = logits or Logits()
  clipped_BT = jnp.clip(targets_BT, 0, w_DV.shape[1] - 1)
  found = IMPLEMENTATIONS[_able(x_BTD, w_DV, logits)](x_BTD, w_DV, clipped_BT, logits, entropy)
  lse_BT, target_BT, most_BT, mean_BT = found
  return lse_BT, jnp.where(targets_BT < w_DV.shape[1], target_BT, jnp.nan), jax.lax.stop_gradient(most_BT), mean_BT


def reference(x_BTD, w_DV, targets_BT, logits: Logits, entropy: bool):
  """facts() by the equations above, all logits in memory; differentiable as it stands."""
  product_BTV = jnp.einsum('BTD,DV->BTV', x_BTD, w_DV.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
  logits_BTV = logits.of(product_BTV)
  lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  mean_BT = (jnp.exp(logits_BTV - lse_BT[..., None]) * logits_BTV).sum(-1) if entropy else None
  return lse_BT, target_BT, jax.lax.stop_gradient(logits_BTV.max(-1)), mean_BT


def chosen(x_BTD, w_DV, logits: Logits) -> str:
  """The fastest implementation that is proven: 'chunked', everywhere. 'tpu' was not timed on a TPU yet."""
  return 'chunked'


def _able(x_BTD, w_DV, logits: Logits) -> str:
  """The name of the implementation of a case; ValueError if it cannot do it."""
  return choice.chosen('cross_entropy', logits.implementation, chosen, LACKING, (x_BTD, w_DV, logits))


# facts() of targets inside the vocabulary: functions of (x_BTD, w_DV, targets_BT, logits, entropy).
IMPLEMENTATIONS = {'reference': reference, 'chunked': cross_entropy_chunked.facts, 'tpu': cross_entropy_tpu.facts}
# What of a case each cannot do: functions of (x_BTD, w_DV, logits) -> names.
LACKING = {'reference': lambda *case: [], 'chunked': lambda *case: [], 'tpu': cross_entropy_tpu.lacking}
