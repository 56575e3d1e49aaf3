"""Choosing the next token from logits; settings are arrays, so changing one compiles nothing anew."""
import jax
import jax.numpy as jnp


def sample(logits_BV, keys_B, temperature_B, top_k_B):
  """One token a row, B int32: softmax(logits / temperature) over the top_k highest; temperature 0 is greedy.

  keys_B: a random key a row. top_k_B: int32, the vocabulary's size leaves every token in.
  """
  V = logits_BV.shape[-1]
  logits_BV = logits_BV.astype(jnp.float32)
  draws_B = temperature_B > 0
  # Sorting and drawing take as long as a small model does: they are left out where no row asks for them.
  least_B = jax.lax.cond((draws_B & (top_k_B < V)).any(), _least, lambda *_: jnp.full(len(logits_BV), -jnp.inf),
                         logits_BV, top_k_B)

  def drawn():
    allowed_BV = jnp.where(logits_BV >= least_B[:, None], logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, allowed_BV / jnp.where(draws_B, temperature_B, 1.0)[:, None])

  highest_B = logits_BV.argmax(-1)
  return jnp.where(draws_B, jax.lax.cond(draws_B.any(), drawn, lambda: highest_B), highest_B).astype(jnp.int32)


def _least(logits_BV, top_k_B):
  """Of each row the lowest logit among its top_k."""
  descending_BV = -jnp.sort(-logits_BV, axis=-1)
  last_B1 = jnp.clip(top_k_B, 1, logits_BV.shape[-1])[:, None] - 1
  return jnp.take_along_axis(descending_BV, last_B1, axis=-1)[:, 0]
