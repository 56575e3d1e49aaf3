"""Cross-entropy of next tokens straight from hidden states, without all logits in memory.

  logits[t,v] = cap(x[t,:] . w[:,v]),   lse[t] = log sum_v exp(logits[t,v]),   cap(x) = c tanh(x / c) if c is given
  nats = sum_t weight[t] (lse[t] - logits[t, target[t]])
  total = nats + z_loss sum_t weight[t] lse[t]^2          (z-loss of PaLM, Chowdhery et al. 2022)

A chunk of positions at a time; its gradient is made on the way forward, while the logits are at hand
(as in Liger Kernel, Hsu et al. 2024), so that only arrays the size of x and w are kept and the
logits are never made twice. Logits, softmax and sums are float32.
"""
import functools

import jax
import jax.numpy as jnp

CHUNK = 512  # positions at once, all rows of the batch together


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(x_BTD, w_DV, targets_BT, weight_BT, z_loss: float | None = None, softcap: float | None = None):
  """(total, nats, correct): float32 sums over all positions. Only `total` has a gradient, for x and w.

  `correct` is the weight of the positions whose target has the highest logit.
  """
  return _chunked(x_BTD, w_DV, targets_BT, weight_BT, z_loss, softcap, gradients=False)[0]


def reference(x_BTD, w_DV, targets_BT, weight_BT, z_loss: float | None = None, softcap: float | None = None):
  """The equations above, all logits in memory; differentiable as it stands."""
  logits_BTV = jnp.einsum('BTD,DV->BTV', x_BTD, w_DV.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
  logits_BTV = logits_BTV if softcap is None else softcap * jnp.tanh(logits_BTV / softcap)
  lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  nats = ((lse_BT - target_BT) * weight_BT).sum()
  total = nats if z_loss is None else nats + z_loss * (lse_BT**2 * weight_BT).sum()
  return total, nats, ((target_BT == logits_BTV.max(-1)) * weight_BT).sum()


def _chunked(x_BTD, w_DV, targets_BT, weight_BT, z_loss, softcap, *, gradients: bool):
  """((total, nats, correct), (dx_BTD, dw_DV) or None)."""
  B, T, _ = x_BTD.shape
  size = max(1, min(T, CHUNK // B))
  count = -(-T // size)
  w_DV, dtype = w_DV.astype(x_BTD.dtype), w_DV.dtype

  def cut(y_BT):  # B T ... -> count B size ..., the last chunk filled up with zeros, which weigh nothing
    filled = jnp.pad(y_BT, [(0, 0), (0, count * size - T)] + [(0, 0)] * (y_BT.ndim - 2))
    return filled.reshape(B, count, size, *y_BT.shape[2:]).swapaxes(0, 1)

  def chunk(carry, part):
    sums, dw_DV = carry
    x_BTD, targets_BT, weight_BT = part
    logits_BTV = jnp.einsum('BTD,DV->BTV', x_BTD, w_DV, preferred_element_type=jnp.float32)
    logits_BTV = logits_BTV if softcap is None else softcap * jnp.tanh(logits_BTV / softcap)
    most_BT1 = logits_BTV.max(-1, keepdims=True)
    raised_BTV = jnp.exp(logits_BTV - most_BT1)
    sum_BT1 = raised_BTV.sum(-1, keepdims=True)
    lse_BT = (most_BT1 + jnp.log(sum_BT1))[..., 0]
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nats = ((lse_BT - target_BT) * weight_BT).sum()
    total = nats if z_loss is None else nats + z_loss * (lse_BT**2 * weight_BT).sum()
    correct = ((target_BT == most_BT1[..., 0]) * weight_BT).sum()
    sums = jax.tree.map(jnp.add, sums, (total, nats, correct))
    if not gradients:
      return (sums, dw_DV), None
    slope_BT = weight_BT if z_loss is None else weight_BT * (1 + 2 * z_loss * lse_BT)
    hit_BTV = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
    dlogits_BTV = raised_BTV * (slope_BT[..., None] / sum_BT1) - jnp.where(hit_BTV, weight_BT[..., None], 0)
    if softcap is not None:
      dlogits_BTV *= 1 - (logits_BTV / softcap)**2
    dlogits_BTV = dlogits_BTV.astype(x_BTD.dtype)
    dx_BTD = jnp.einsum('BTV,DV->BTD', dlogits_BTV, w_DV)
    x_MD, dlogits_MV = (y.reshape(-1, y.shape[-1]) for y in (x_BTD, dlogits_BTV))  # sums over one axis are faster
    dw_DV += jnp.einsum('MD,MV->DV', x_MD, dlogits_MV, preferred_element_type=jnp.float32)
    return (sums, dw_DV), dx_BTD

  zero = jnp.zeros((), jnp.float32)
  dw_DV = jnp.zeros(w_DV.shape, jnp.float32) if gradients else zero
  (sums, dw_DV), dx = jax.lax.scan(chunk, ((zero,) * 3, dw_DV), (cut(x_BTD), cut(targets_BT), cut(weight_BT)))
  if not gradients:
    return sums, None
  return sums, (dx.swapaxes(0, 1).reshape(B, count * size, -1)[:, :T], dw_DV.astype(dtype))


def _forward(x_BTD, w_DV, targets_BT, weight_BT, z_loss, softcap):
  return _chunked(x_BTD, w_DV, targets_BT, weight_BT, z_loss, softcap, gradients=True)


def _backward(z_loss, softcap, gradients, slopes):
  dx_BTD, dw_DV = gradients
  return (slopes[0] * dx_BTD).astype(dx_BTD.dtype), (slopes[0] * dw_DV).astype(dw_DV.dtype), None, None


cross_entropy.defvjp(_forward, _backward)
