"""Cross-entropy of next tokens straight from hidden states.

  logits[t,v] = x[t,:] . w[:,v],   lse[t] = log sum_v exp(logits[t,v])
  loss = sum_t weight[t] (lse[t] - logits[t, target[t]]),   squares = sum_t weight[t] lse[t]^2

The second sum is the z-loss of PaLM (Chowdhery et al. 2022), before its factor. Logits and
softmax are float32.
"""
import jax
import jax.numpy as jnp


def cross_entropy(x_BTD, w_DV, targets_BT, weight_BT):
  """(loss, squares, correct): sums over all positions, scalars in float32.

  `correct` is the weight of the positions whose target has the highest logit.
  """
  return reference(x_BTD, w_DV, targets_BT, weight_BT)


def reference(x_BTD, w_DV, targets_BT, weight_BT):
  """The equations above, all logits in memory."""
  logits_BTV = jnp.einsum('BTD,DV->BTV', x_BTD, w_DV.astype(x_BTD.dtype)).astype(jnp.float32)
  lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  correct_BT = (target_BT == logits_BTV.max(-1)).astype(jnp.float32)
  total = lambda y_BT: (y_BT * weight_BT).sum()
  return total(lse_BT - target_BT), total(lse_BT**2), total(correct_BT)
