"""Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads from one small latent a token.

  c = norm(x kv_down)             R entries, and r = turn(x k_turned), P entries: all that a cache keeps, U in all
  k = (c k, r), v = c v           a head's key has H entries that do not turn and P that all heads share
  q = (n q, turn(n q_turned))     of n = x, or of a latent n = norm(x q_down) of Q entries

With a cache, scores can be taken in the latent, q' = q k', and its weighted sum go through v afterwards: the
same numbers in another order, so that keys and values of the past are never made ("absorbed").
"""
import dataclasses

from flax import linen as nn
import jax.numpy as jnp

from lmlib import sharding
from lmlib.kernels import attention as kernel
from lmlib.kernels import decode_attention
from lmlib.kernels.attention import Pattern
from lmlib.kernels.tpu import LANES
from lmlib.nn import layers
from lmlib.nn.places import Places
from lmlib.nn.positions import rotate


@dataclasses.dataclass(frozen=True)
class LatentStyle:
  rank: int = 512  # R
  q_rank: int | None = None  # Q; None: queries come from x itself
  head_width: int = 128  # H
  turned_width: int = 64  # P
  value_width: int = 128  # W
  epsilon: float = 1e-6  # of the norms of latents
  scale: float = 1.0  # of scores, beside 1 / sqrt(H + P): YaRN's (0.1 mscale log(factor) + 1)^2

  def __post_init__(self):
    for name in ('rank', 'q_rank', 'head_width', 'turned_width', 'value_width'):
      value = getattr(self, name)
      if (value is None and name != 'q_rank') or (value is not None and (not isinstance(value, int) or value < 1)):
        raise ValueError(f'LatentStyle.{name}={value!r} must be a positive integer')
    if not self.scale > 0:
      raise ValueError(f'LatentStyle.scale={self.scale} must be positive')

  @property
  def kept(self) -> int:
    """U: the width of what a cache keeps of a place: c, then r, then zeros up to a multiple of a TPU's lanes."""
    width = self.rank + self.turned_width
    return width if width < LANES else -(-width // LANES) * LANES

  @property
  def pattern(self) -> Pattern:
    return Pattern(scale=self.scale * (self.head_width + self.turned_width) ** -0.5)

  def flops(self, layers: int, heads: int, length: int) -> float:
    """FLOPs a token of scores and weighted sums, forward, mean over a sequence."""
    width = self.head_width + self.turned_width + self.value_width
    return layers * 2 * heads * width * self.pattern.mean_keys(length)

  def absorbs(self, T: int, S: int) -> bool:
    """Whether T queries of a cache with S places cost less in the latent than S keys and values cost to make."""
    made = S * self.rank * (self.head_width + self.value_width)
    there = T * self.rank * (self.head_width + self.value_width)
    return there + T * S * (2 * self.rank + self.turned_width) < made + T * S * (
        self.head_width + self.turned_width + self.value_width)


class LatentAttention(nn.Module):
  """`kept`, a layer's (x_B1SU,), makes it decode; None trains."""
  width: int
  heads: int
  style: LatentStyle = LatentStyle()
  out_scale: float = 1.0
  implementation: str = 'auto'  # of kernels.attention, over whole rows
  decoding: str = 'auto'  # and of steps of decoding

  @property
  def sizes(self) -> dict[str, int]:
    style = self.style
    return dict(D=self.width, K=self.heads, H=style.head_width, P=style.turned_width, W=style.value_width,
                R=style.rank, Q=style.q_rank)

  @nn.compact
  def __call__(self, x_BTD, places: Places, kept=None):
    """Returns attention of x, BTD, and what is kept with x in it."""
    (turns,), dtype = places.turns, x_BTD.dtype
    into = lambda y, name, axes: layers.product(
        f'BT{axes[0]},{axes}->BT{axes[1:]}', y, layers.cast(layers.weight(self, name, axes, axes[0]), dtype))
    q_from, letter = x_BTD, 'D'
    if self.style.q_rank is not None:
      q_from, letter = layers.RmsNorm(self.style.epsilon, axes='Q', name='q_norm')(into(x_BTD, 'q_down', 'DQ')), 'Q'
    q_BTKH, turned_BTKP = into(q_from, 'q', f'{letter}KH'), rotate(into(q_from, 'q_turned', f'{letter}KP'), turns)
    c_BTR = layers.RmsNorm(self.style.epsilon, axes='R', name='kv_norm')(into(x_BTD, 'kv_down', 'DR'))
    r_BTP = rotate(into(x_BTD, 'k_turned', 'DP')[:, :, None], turns)[:, :, 0]
    k_RKH, v_RKW = (layers.cast(layers.weight(self, name, axes, 'R'), dtype)
                    for name, axes in (('k', 'RKH'), ('v', 'RKW')))

    if kept is None:
      out_BTKW = self.plain((q_BTKH, turned_BTKP), c_BTR, r_BTP, places.rows, k_RKH, v_RKW, self.implementation)
    else:
      out_BTKW, kept = self.read((q_BTKH, turned_BTKP), c_BTR, r_BTP, kept, places, k_RKH, v_RKW)
    out_KWD = layers.cast(layers.weight(self, 'out', 'KWD', 'KW', self.out_scale), dtype)
    out_BTKW = layers.kept(sharding.constrain(out_BTKW, 'BTKW'), 'attended')
    return layers.product('BTKW,KWD->BTD', out_BTKW, out_KWD), kept

  def plain(self, q, c_BSR, r_BSP, rows, k_RKH, v_RKW, implementation: str):
    """Attention with the keys and values that the latents stand for, BTKW."""
    k_BSKH, v_BSKW = layers.product('BSR,RKH->BSKH', c_BSR, k_RKH), layers.product('BSR,RKW->BSKW', c_BSR, v_RKW)
    r_BSKP = jnp.broadcast_to(r_BSP[:, :, None], (*k_BSKH.shape[:3], r_BSP.shape[-1]))
    q_BTKGH = jnp.concatenate(q, -1)[:, :, :, None]
    k_BSKH = jnp.concatenate([k_BSKH, r_BSKP], -1)
    q_BTKGH, k_BSKH, v_BSKW = map(layers.kept, (q_BTKGH, k_BSKH, v_BSKW), 'qkv')
    return kernel.attention(q_BTKGH, k_BSKH, v_BSKW, self.style.pattern, rows,
                            implementation=implementation)[:, :, :, 0]

  def read(self, q, c_BTR, r_BTP, kept, places: Places, k_RKH, v_RKW):
    """Attention to what a cache keeps, BTKW, and that with these tokens in it."""
    coming, R, P = places.coming, self.style.rank, self.style.turned_width
    new_BTU = fill(jnp.concatenate([c_BTR, r_BTP], -1), self.style.kept)
    seen, kept = coming.join(kept, (new_BTU[:, :, None],))
    rows, x_BSU = places.rows.replace(place_BS=coming.places_BS), seen[0][:, :, 0]
    asked = self.decoding if coming.step else 'reference'
    if asked in ('auto', 'reference') and not self.style.absorbs(q[0].shape[1], x_BSU.shape[1]):
      return self.plain(q, x_BSU[..., :R], x_BSU[..., R:R + P], rows, k_RKH, v_RKW, 'auto'), kept
    # The same, of one key head whose values are the latents: what q meets in k is what q k' meets in the latent.
    q_BTKR = jnp.einsum('BTKH,RKH->BTKR', q[0], layers.array(k_RKH))
    q_BTGU = jnp.concatenate([q_BTKR, q[1]], -1)[:, :, None]
    held = coming.held(seen, kept, value_width=R)
    if by := decode_attention.of_step(q_BTGU, held, [], asked):
      out_BTGR = decode_attention.decode_attention(q_BTGU, held, self.style.pattern, place_BT=rows.place_BT,
                                                   implementation=by)
    else:  # zeros meet what fills up a place, so that neither keys nor values are cut out of it
      x_BSKU = x_BSU[:, :, None]
      out_BTGR = kernel.attention(fill(q_BTGU, x_BSU.shape[-1]), x_BSKU, x_BSKU, self.style.pattern, rows)[..., :R]
    return jnp.einsum('BTKR,RKW->BTKW', out_BTGR[:, :, 0], layers.array(v_RKW)), kept


def fill(x, width: int):
  """x with zeros behind its last axis, up to `width`."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
