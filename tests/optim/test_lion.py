"""Lion's steps by hand in float64."""
import numpy as np

from lmlib.optim.lion import Lion
from lmlib.optim.schedules import Constant


def test_three_steps_by_hand(run):
  random = np.random.default_rng(1)
  w = random.standard_normal((2, 3, 4))
  gradients = [random.standard_normal(w.shape) for _ in range(3)]
  gradients[1] *= 0.3  # so that the momentum decides some signs
  after = run(Lion(Constant(0.1), decay=0.5, clip=None, beta1=0.7, beta2=0.6), {'up': 'LDF'}, {'up': w},
              [{'up': g} for g in gradients])
  m = np.zeros_like(w)
  for got, g in zip(after, gradients):
    w = w - 0.1 * (np.sign(0.7 * m + 0.3 * g) + 0.5 * w)
    m = 0.6 * m + 0.4 * g
    np.testing.assert_allclose(got['up'], w, rtol=0, atol=1e-6)  # float32 near weights of size 1 to 3
