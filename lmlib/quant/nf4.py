"""Weights in 4 bits: NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023).

  w = level[code] * most,   most = mean + scale * eighth      4.13 bits a weight

The 16 levels are quantiles of a normal distribution; `most` is the largest |w| of 64 weights, itself kept in 8 bits
(floating point, 4 of them the exponent's) with one scale for 256 of them and one mean a layer. Two codes make a byte.
"""
import math

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # of the paper's appendix E
BLOCK, BLOCKS = 64, 256  # weights with a largest one, and largest ones with a scale
EIGHT = jnp.float8_e4m3fn
MOST = 448.0  # the largest number of that type


class Nf4(struct.PyTreeNode):
  """What stands for a float array in a tree of weights; axes in front of the blocks stack layers."""
  codes: jax.Array  # (..., blocks, 32) uint8
  eighths: jax.Array  # (..., blocks) in 8 bits
  scales: jax.Array  # (..., blocks / 256), float32
  mean: jax.Array  # (...,), float32
  inner: tuple[int, ...] = struct.field(pytree_node=False)  # the shape of one layer
  dtype: str = struct.field(pytree_node=False, default='float32')

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.codes.shape[:-2], *self.inner)

  def astype(self, dtype) -> 'Nf4':
    """The same, which array() makes an array of this type of."""
    return self.replace(dtype=jnp.dtype(dtype).name)

  def array(self) -> jax.Array:
    """The weights."""
    lead, blocks = self.codes.shape[:-2], self.codes.shape[-2]
    scale = jnp.repeat(self.scales, BLOCKS, axis=-1)[..., :blocks]
    most = self.mean[..., None] + scale * self.eighths.astype(jnp.float32)
    level = jnp.asarray(LEVELS)[jnp.stack([self.codes >> 4, self.codes & 15], -1)].reshape(*lead, blocks, BLOCK)
    flat = (level * most[..., None]).reshape(*lead, -1)[..., :math.prod(self.inner)]
    return flat.reshape(self.shape).astype(self.dtype)


def quantised(w, lead: int = 1) -> Nf4:
  """A float array in 4 bits, each of its first `lead` axes' entries by itself."""
  front, inner = w.shape[:lead], w.shape[lead:]
  flat = jnp.asarray(w, jnp.float32).reshape(*front, -1)
  pad = -flat.shape[-1] % BLOCK
  blocks = jnp.pad(flat, [(0, 0)] * lead + [(0, pad)]).reshape(*front, -1, BLOCK)
  most = jnp.abs(blocks).max(-1)
  mean = most.mean(-1)
  rest = jnp.pad(most - mean[..., None], [(0, 0)] * lead + [(0, -most.shape[-1] % BLOCKS)])
  rest = rest.reshape(*front, -1, BLOCKS)
  scales = jnp.abs(rest).max(-1) / MOST
  eighths = (rest / jnp.where(scales == 0, 1, scales)[..., None]).astype(EIGHT).reshape(*front, -1)
  eighths = eighths[..., :most.shape[-1]]
  unit = blocks / jnp.where(most == 0, 1, most)[..., None]
  between = jnp.asarray((LEVELS[1:] + LEVELS[:-1]) / 2)
  codes = jnp.searchsorted(between, unit).astype(jnp.uint8).reshape(*front, -1, BLOCK // 2, 2)
  return Nf4(codes[..., 0] << 4 | codes[..., 1], eighths, scales, mean, tuple(inner))
