"""Rotary positions (Su et al. 2021): pairs of a head's entries turn by an angle that grows with position."""
import jax.numpy as jnp


def rotate(x_BTNH, positions_BT, base: float):
  """Turns the pairs (h, h + H/2) of x by position * base**(-2h/H), in float32; any number of heads."""
  half = x_BTNH.shape[-1] // 2
  frequency_H = base ** -(jnp.arange(half, dtype=jnp.float32) / half)
  angle_BT1H = positions_BT[..., None, None].astype(jnp.float32) * frequency_H[None, None, None]
  sin, cos = jnp.sin(angle_BT1H), jnp.cos(angle_BT1H)
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTNH.dtype)
