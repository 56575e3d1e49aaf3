"""Choosing the next token from logits; settings are arrays, so changing one compiles nothing anew."""
import jax
import jax.numpy as jnp


def sample(logits_BV, keys_B, temperature_B, top_k_B):
  """One token a row, B int32: softmax(logits / temperature) over the top_k highest; temperature 0 is greedy.

  keys_B: a random key a row. top_k_B: int32, the vocabulary's size leaves every token in.
  """
  V = logits_BV.shape[-1]
  logits_BV = logits_BV.astype(jnp.float32)
  descending_BV = -jnp.sort(-logits_BV, axis=-1)
  least_B = jnp.take_along_axis(descending_BV, jnp.clip(top_k_B, 1, V)[:, None] - 1, axis=-1)[:, 0]
  allowed_BV = jnp.where(logits_BV >= least_B[:, None], logits_BV, -jnp.inf)
  heat_B = jnp.where(temperature_B > 0, temperature_B, 1.0)
  drawn_B = jax.vmap(jax.random.categorical)(keys_B, allowed_BV / heat_B[:, None])
  return jnp.where(temperature_B > 0, drawn_B, logits_BV.argmax(-1)).astype(jnp.int32)
