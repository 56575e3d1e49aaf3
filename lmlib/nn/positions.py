"""Rotary positions (Su et al. 2021): pairs of a head's entries turn by an angle that grows with position.

The angles depend on positions alone, so a model makes their sines once for all its layers: on a CPU
they take longer than the turning.
"""
import jax.numpy as jnp


def turns(positions_BT, width: int, base: float):
  """Cosine and sine of position * base**(-2h/H) for a head of `width` H, each BT1H in float32.

  Both halves of the width carry the same angles; the sine of the first half is negative, as rotate() needs it.
  """
  half = width // 2
  frequency_H = base ** -(jnp.arange(half, dtype=jnp.float32) / half)
  angle_BT1H = positions_BT[..., None, None].astype(jnp.float32) * frequency_H[None, None, None]
  sin, cos = jnp.sin(angle_BT1H), jnp.cos(angle_BT1H)
  return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def rotate(x_BTNH, turns):
  """Turns the pairs (h, h + H/2) of x by the angles of turns(), in float32; any number of heads."""
  cos_BT1H, sin_BT1H = turns
  y_BTNH = x_BTNH.astype(jnp.float32)
  swapped_BTNH = jnp.roll(y_BTNH, y_BTNH.shape[-1] // 2, axis=-1)
  return (y_BTNH * cos_BT1H + swapped_BTNH * sin_BT1H).astype(x_BTNH.dtype)
