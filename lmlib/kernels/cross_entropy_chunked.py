"""Cross-entropy and log-probabilities a chunk of positions at a time: never more logits than a chunk's in memory.

The gradient of cross-entropy is made on the way forward, while the logits are at hand (as in Liger Kernel, Hsu et
al. 2024), so that only arrays the size of x and w are kept and the logits are never made twice. That needs to know
what follows, which is a sum over positions; of log-probabilities anything may follow, and the way back makes a chunk's
logits again. Logits, softmax and sums are float32.
"""
import functools

import jax
import jax.numpy as jnp

from lmlib import sharding

CHUNK = 512  # positions at once, all rows of the batch together


def _cut(arrays, count: int, size: int):
  """B T ... -> count B size ..., the last chunk filled up with zeros, which weigh nothing.

  Where a layout splits rows a chunk has positions of every part of them, so that none has to move.
  """
  parts = _parts(jax.tree.leaves(arrays)[0].shape[1])

  def cut(y_BT):
    B, T, *more = y_BT.shape
    y = y_BT.reshape(B, parts, T // parts, *more)
    y = jnp.pad(y, [(0, 0), (0, 0), (0, count * size // parts - T // parts)] + [(0, 0)] * len(more))
    y = y.reshape(B, parts, count, size // parts, *more).transpose(2, 0, 1, 3, *range(4, 4 + len(more)))
    return y.reshape(count, B, size, *more)

  return jax.tree.map(cut, arrays)


def _joined(arrays, T: int):
  """count B size ... -> B T ..."""
  parts = _parts(T)

  def joined(y):
    count, B, size, *more = y.shape
    y = y.reshape(count, B, parts, size // parts, *more).transpose(1, 2, 0, 3, *range(4, 4 + len(more)))
    return y.reshape(B, parts, -1, *more)[:, :, :T // parts].reshape(B, T, *more)

  return jax.tree.map(joined, arrays)


def _parts(T: int) -> int:
  """Into how many parts the layout in use splits rows of T positions."""
  size = sharding.size('context')
  return size if T % size == 0 else 1


def _sizes(B: int, T: int) -> tuple[int, int]:
  """How many chunks of how many positions of each row, as many of each of its parts."""
  parts = _parts(T)
  size = max(1, min(T, CHUNK // B) // parts)
  return -(-T // parts // size), size * parts


def _scored(x_BTD, w_DV, logits):
  product_BTV = jnp.einsum('BTD,DV->BTV', x_BTD, w_DV, preferred_element_type=jnp.float32)
  return logits.of(product_BTV)


def _picked(logits_BTV, targets_BT):
  """BT: the logits of targets; of those outside of the vocabulary any."""
  return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1, mode='clip')[..., 0]


def _pulled(dlogits_BTV, x_BTD, w_DV):
  """dx_BTD and dw_DV, the latter float32, of the gradient of products."""
  dlogits_BTV = dlogits_BTV.astype(x_BTD.dtype)
  dx_BTD = jnp.einsum('BTV,DV->BTD', dlogits_BTV, w_DV)
  if sharding.size('context') > 1:  # one axis of B * T would bring together rows that are split
    return dx_BTD, jnp.einsum('BTD,BTV->DV', x_BTD, dlogits_BTV, preferred_element_type=jnp.float32)
  x_MD, dlogits_MV = (y.reshape(-1, y.shape[-1]) for y in (x_BTD, dlogits_BTV))  # sums over one axis are faster
  return dx_BTD, jnp.einsum('MD,MV->DV', x_MD, dlogits_MV, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(x_BTD, w_DV, targets_BT, weight_BT, z_loss, logits):
  """(total, nats, correct), see cross_entropy.cross_entropy(); targets lie in the vocabulary."""
  return _sums(x_BTD, w_DV, targets_BT, weight_BT, z_loss, logits, gradients=False)[0]


def _sums(x_BTD, w_DV, targets_BT, weight_BT, z_loss, logits, *, gradients: bool):
  """((total, nats, correct), (dx_BTD, dw_DV) or None)."""
  B, T, _ = x_BTD.shape
  count, size = _sizes(B, T)
  w_DV, dtype = w_DV.astype(x_BTD.dtype), w_DV.dtype

  def chunk(carry, part):
    sums, dw_DV = carry
    x_BTD, targets_BT, weight_BT = part
    logits_BTV = _scored(x_BTD, w_DV, logits)
    most_BT1 = logits_BTV.max(-1, keepdims=True)
    raised_BTV = jnp.exp(logits_BTV - most_BT1)
    sum_BT1 = raised_BTV.sum(-1, keepdims=True)
    lse_BT = (most_BT1 + jnp.log(sum_BT1))[..., 0]
    target_BT = _picked(logits_BTV, targets_BT)
    nats = ((lse_BT - target_BT) * weight_BT).sum()
    total = nats if z_loss is None else nats + z_loss * (lse_BT**2 * weight_BT).sum()
    correct = ((target_BT == most_BT1[..., 0]) * weight_BT).sum()
    sums = jax.tree.map(jnp.add, sums, (total, nats, correct))
    if not gradients:
      return (sums, dw_DV), None
    slope_BT = weight_BT if z_loss is None else weight_BT * (1 + 2 * z_loss * lse_BT)
    hit_BTV = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
    dlogits_BTV = raised_BTV * (slope_BT[..., None] / sum_BT1) - jnp.where(hit_BTV, weight_BT[..., None], 0)
    dx_BTD, more_DV = _pulled(logits.pulled(dlogits_BTV, logits_BTV), x_BTD, w_DV)
    return (sums, dw_DV + more_DV), dx_BTD

  zero = jnp.zeros((), jnp.float32)
  dw_DV = jnp.zeros(w_DV.shape, jnp.float32) if gradients else zero
  (sums, dw_DV), dx = jax.lax.scan(chunk, ((zero,) * 3, dw_DV), _cut((x_BTD, targets_BT, weight_BT), count, size))
  return sums, (_joined(dx, T), dw_DV.astype(dtype)) if gradients else None


def _forward(x_BTD, w_DV, targets_BT, weight_BT, z_loss, logits):
  return _sums(x_BTD, w_DV, targets_BT, weight_BT, z_loss, logits, gradients=True)


def _backward(z_loss, logits, gradients, slopes):
  dx_BTD, dw_DV = gradients
  return (slopes[0] * dx_BTD).astype(dx_BTD.dtype), (slopes[0] * dw_DV).astype(dw_DV.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def facts(x_BTD, w_DV, targets_BT, logits, entropy: bool):
  """(lse_BT, target_BT, most_BT, mean_BT), see cross_entropy.facts()."""
  T = x_BTD.shape[1]
  w_DV = w_DV.astype(x_BTD.dtype)

  def chunk(part):
    x_BTD, targets_BT = part
    logits_BTV = _scored(x_BTD, w_DV, logits)
    most_BT1 = logits_BTV.max(-1, keepdims=True)
    raised_BTV = jnp.exp(logits_BTV - most_BT1)
    sum_BT = raised_BTV.sum(-1)
    mean_BT = (raised_BTV * logits_BTV).sum(-1) / sum_BT if entropy else None
    return most_BT1[..., 0] + jnp.log(sum_BT), _picked(logits_BTV, targets_BT), most_BT1[..., 0], mean_BT

  return _joined(jax.lax.map(chunk, _cut((x_BTD, targets_BT), *_sizes(*x_BTD.shape[:2]))), T)


def _facts_forward(x_BTD, w_DV, targets_BT, logits, entropy):
  found = facts(x_BTD, w_DV, targets_BT, logits, entropy)
  return found, (x_BTD, w_DV, targets_BT, found[0], found[3])


def _facts_backward(logits, entropy, saved, slopes):
  x_BTD, w_DV, targets_BT, lse_BT, mean_BT = saved
  dlse_BT, dtarget_BT, _, dmean_BT = slopes
  T, dtype = x_BTD.shape[1], w_DV.dtype
  w_DV = w_DV.astype(x_BTD.dtype)

  def chunk(dw_DV, part):
    x_BTD, targets_BT, lse_BT, dlse_BT, dtarget_BT, of_mean = part
    logits_BTV = _scored(x_BTD, w_DV, logits)
    slope_BTV = dlse_BT[..., None]
    if entropy:
      mean_BT, dmean_BT = of_mean
      slope_BTV = slope_BTV + dmean_BT[..., None] * (1 + logits_BTV - mean_BT[..., None])
    hit_BTV = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
    dlogits_BTV = jnp.exp(logits_BTV - lse_BT[..., None]) * slope_BTV + jnp.where(hit_BTV, dtarget_BT[..., None], 0)
    dx_BTD, more_DV = _pulled(logits.pulled(dlogits_BTV, logits_BTV), x_BTD, w_DV)
    return dw_DV + more_DV, dx_BTD

  of_mean = (mean_BT, dmean_BT) if entropy else None
  parts = _cut((x_BTD, targets_BT, lse_BT, dlse_BT, dtarget_BT, of_mean), *_sizes(*x_BTD.shape[:2]))
  dw_DV, dx = jax.lax.scan(chunk, jnp.zeros(w_DV.shape, jnp.float32), parts)
  return _joined(dx, T), dw_DV.astype(dtype), None


facts.defvjp(_facts_forward, _facts_backward)
