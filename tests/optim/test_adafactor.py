"""Adafactor's steps by hand in float64; a stack of layers is each layer by itself."""
import numpy as np
import pytest

from lmlib.optim.adafactor import Adafactor
from lmlib.optim.schedules import Constant

LETTERS = {'up': 'LDF', 'scale': 'LD'}


def rms(x):
  return np.sqrt((x**2).mean())


def by_hand(w, gradients, *, rate, exponent, threshold, factored):
  """One layer's weights after each step (Shazeer and Stern 2018, algorithms 4 and 5)."""
  row = column = whole = 0
  for t, g in enumerate(gradients, start=1):
    beta = 1 - t**-exponent
    row = beta * row + (1 - beta) * (g**2).mean(axis=-1, keepdims=True)
    column = beta * column + (1 - beta) * (g**2).mean(axis=0, keepdims=True)
    whole = beta * whole + (1 - beta) * g**2
    update = g / np.sqrt(row * column / row.mean() if factored else whole)
    update = update / max(1, rms(update) / threshold)
    w = w - rate * max(1e-3, rms(w)) * update
    yield w


@pytest.mark.parametrize('threshold', [0.5, 2.0])
def test_three_steps_by_hand(threshold, run):
  random = np.random.default_rng(2)
  size = np.array([1.0, 1e-5])  # the second layer is below the least RMS
  draw = lambda: {'up': random.standard_normal((2, 3, 4)), 'scale': random.standard_normal((2, 3))}
  weights, gradients = draw(), [draw() for _ in range(3)]
  weights = {'up': weights['up'] * size[:, None, None], 'scale': weights['scale'] * size[:, None]}
  optimizer = Adafactor(Constant(0.1), decay=None, clip=None, threshold=threshold, exponent=0.7, shortest=3)
  after = run(optimizer, LETTERS, weights, gradients)
  for name in LETTERS:
    for layer in range(2):
      hand = by_hand(weights[name][layer], [g[name][layer] for g in gradients], rate=0.1, exponent=0.7,
                     threshold=threshold, factored=name == 'up')
      for got, want in zip(after, hand):
        # float32 against weights of size 1 to 3, or of 1e-4 in the second layer.
        np.testing.assert_allclose(got[name][layer], want, rtol=1e-5, atol=1e-6 * size[layer])


def test_an_absolute_step_does_not_see_the_weights_size(run):
  random = np.random.default_rng(3)
  w, g = random.standard_normal((3, 4)), random.standard_normal((3, 4))
  optimizer = Adafactor(Constant(0.1), decay=None, threshold=None, relative=False)
  (after,) = run(optimizer, {'up': 'DF'}, {'up': w}, [{'up': g}])
  # Axes shorter than `shortest`: whole moments, whose first step is the sign of the gradient.
  np.testing.assert_allclose(after['up'], w - 0.1 * np.sign(g), rtol=0, atol=1e-6)
