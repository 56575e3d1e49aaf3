"""Runs an optimizer on given gradients."""
import jax
import numpy as np
import optax
import pytest


@pytest.fixture
def run():
  """run(optimizer, letters, weights, gradients, steps=10): the weights after each of the gradients."""

  def run(optimizer, letters, weights, gradients, steps=10):
    transformation = optimizer.transformation(letters, steps)

    @jax.jit
    def step(gradient, state, weights):
      updates, state = transformation.update(gradient, state, weights)
      return state, optax.apply_updates(weights, updates)

    float32 = lambda tree: jax.tree.map(np.float32, tree)
    weights, after = float32(weights), []
    state = jax.jit(transformation.init)(weights)
    for gradient in gradients:
      state, weights = step(float32(gradient), state, weights)
      after.append(weights)
    return after

  return run
