"""AdamW's steps by hand in float64."""
import numpy as np

from lmlib.optim.adamw import AdamW
from lmlib.optim.schedules import Linear

LETTERS = {'up': 'LDF', 'embedding': 'VD', 'scale': 'D'}


def test_three_steps_by_hand(run):
  random = np.random.default_rng(0)
  shapes = {'up': (2, 3, 4), 'embedding': (5, 3), 'scale': (3,)}
  draw = lambda: {name: random.standard_normal(shape) for name, shape in shapes.items()}
  weights, gradients = draw(), [draw() for _ in range(3)]
  gradients[1] = {name: 0.01 * g for name, g in gradients[1].items()}  # below the clip; the others above
  optimizer = AdamW(Linear(0.1, warmup=2), decay=0.2, decay_embedding=0.05, clip=0.7, beta1=0.8, beta2=0.9,
                    epsilon=1e-3)
  after = run(optimizer, LETTERS, weights, gradients, steps=10)

  decay = {'up': 0.2, 'embedding': 0.05, 'scale': 0.0}
  rates = [0.05, 0.1, 0.1]
  m = {name: 0 * w for name, w in weights.items()}
  v = dict(m)
  for t, (g, rate) in enumerate(zip(gradients, rates), start=1):
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    assert (norm > 0.7) == (t != 2)
    for name in weights:
      x = g[name] * min(1, 0.7 / norm)
      m[name] = 0.8 * m[name] + 0.2 * x
      v[name] = 0.9 * v[name] + 0.1 * x**2
      step = (m[name] / (1 - 0.8**t)) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-3)
      weights[name] = weights[name] - rate * (step + decay[name] * weights[name])
      # float32: weights of size 1 to 3 round by 1e-7 to 2e-7 a step, steps of 0.1 by less.
      np.testing.assert_allclose(after[t - 1][name], weights[name], rtol=0, atol=1e-6)
