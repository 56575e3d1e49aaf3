"""One vector for a text from the states of its tokens (Reimers and Gurevych 2019)."""
import dataclasses

import jax.numpy as jnp

KINDS = ('mean', 'first', 'max')


@dataclasses.dataclass(frozen=True)
class Pooling:
  """The mean of all tokens' states, the first token's, or the largest of every entry; of length one if normalised."""
  kind: str = 'mean'
  normalised: bool = True

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f'Pooling.kind={self.kind!r} must be one of {KINDS}')

  def of(self, x_BTD, real_BT):
    """BD in float32, of the tokens where real_BT is true; zeros of a row that has none."""
    x_BTD, real_BT1 = x_BTD.astype(jnp.float32), real_BT[..., None]
    if self.kind == 'first':
      found_BD = jnp.take_along_axis(x_BTD, real_BT1.argmax(1, keepdims=True), axis=1)[:, 0]
    elif self.kind == 'max':
      found_BD = jnp.where(real_BT1, x_BTD, -jnp.inf).max(1)
    else:
      found_BD = jnp.where(real_BT1, x_BTD, 0).sum(1) / jnp.maximum(real_BT1.sum(1), 1)
    found_BD = jnp.where(real_BT.any(1, keepdims=True), found_BD, 0)
    if not self.normalised:
      return found_BD
    return found_BD / jnp.maximum(jnp.linalg.norm(found_BD, axis=-1, keepdims=True), 1e-12)
