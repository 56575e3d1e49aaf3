"""Muon's steps by hand: Newton-Schulz acts on singular values, layer by layer; the rest is AdamW."""
import numpy as np
import pytest

from lmlib.optim.adamw import AdamW
from lmlib.optim.muon import Muon
from lmlib.optim.schedules import Constant

D, K, G, H, F, L, E = 12, 2, 2, 4, 20, 3, 2
SIZES = dict(zip('DKGHFLE', (D, K, G, H, F, L, E)))


def newton_schulz(s):
  """What five steps make of singular values (the quintic of Jordan et al. 2024)."""
  for _ in range(5):
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
  return s


def orthogonal(x):
  """The update of one 2-D matrix, in float64 by SVD."""
  u, s, v = np.linalg.svd(x, full_matrices=False)
  return u @ np.diag(newton_schulz(s / np.linalg.norm(x))) @ v


def as_matrices(axes, x):
  """x as (stack, fan-in, fan-out), spelt out for the letters of these tests."""
  m, n = {'LDKGH': (D, K * G * H), 'LKGHD': (K * G * H, D), 'LEFD': (F, D), 'DF': (D, F)}[axes]
  return np.asarray(x, np.float64).reshape(-1, m, n)


def scale(scaling, m, n):
  return 0.2 * max(m, n)**0.5 if scaling == 'adamw' else max(1, n / m)**0.5


@pytest.mark.parametrize('scaling', ['adamw', 'width'])
@pytest.mark.parametrize('axes', ['LDKGH', 'LKGHD', 'LEFD', 'DF'])
def test_three_steps_by_hand(axes, scaling, run):
  random = np.random.default_rng(4)
  draw = lambda: random.standard_normal([SIZES[a] for a in axes])
  w, gradients = draw(), [draw() for _ in range(3)]
  optimizer = Muon(Constant(0.1), decay=0.3, clip=None, momentum=0.8, scaling=scaling)
  after = run(optimizer, {'w': axes}, {'w': w}, [{'w': g} for g in gradients])
  m, w = 0, as_matrices(axes, w)
  for t, g in enumerate(as_matrices(axes, g) for g in gradients):
    m = 0.8 * m + 0.2 * g
    mixed = 0.8 * m / (1 - 0.8**(t + 2)) + 0.2 * g / (1 - 0.8**(t + 1))  # Nesterov, debiased
    update = scale(scaling, *w.shape[1:]) * np.stack([orthogonal(x) for x in mixed])
    w = w - 0.1 * (update + 0.3 * w)
    # float32 rounding, 6e-8, grows by the slope of the five steps, at most 3.4^5 = 485 on tiny values.
    np.testing.assert_allclose(as_matrices(axes, after[t]['w']), w, rtol=0, atol=3e-5)


def test_updates_are_nearly_orthogonal_in_every_layer(run):
  # By the quintic, singular values from 0.01 to 1 of the norm end between 0.68 and 1.14.
  band = newton_schulz(np.linspace(0.01, 1, 10_000))
  assert 0.68 < band.min() < band.max() < 1.14
  random = np.random.default_rng(5)
  w, g = np.zeros((L, D, K, G, H)), random.standard_normal((L, D, K, G, H))
  g *= np.array([1e-4, 1.0, 1e3])[:, None, None, None, None]  # layers do not see each other's size
  optimizer = Muon(Constant(1.0), scaling='width', decay=None, clip=None)
  (after,) = run(optimizer, {'w': 'LDKGH'}, {'w': w}, [{'w': g}])
  scaled = as_matrices('LDKGH', after['w']) / scale('width', D, K * G * H)
  for before, update in zip(as_matrices('LDKGH', g), scaled):
    s = np.linalg.svd(before, compute_uv=False)
    assert s.min() / np.linalg.norm(before) > 0.01  # so the band applies
    s = np.linalg.svd(update, compute_uv=False)
    assert 0.68 < s.min() <= s.max() < 1.14


def test_embeddings_and_vectors_follow_adamw(run):
  random = np.random.default_rng(6)
  letters = {'embedding': 'VD', 'output': 'DV', 'scale': 'LD', 'up': 'DF'}
  shapes = {'embedding': (7, 3), 'output': (3, 7), 'scale': (2, 3), 'up': (3, 5)}
  draw = lambda: {name: random.standard_normal(shape) for name, shape in shapes.items()}
  weights, gradients = draw(), [draw() for _ in range(3)]
  settings = {'schedule': Constant(0.1), 'beta1': 0.7, 'beta2': 0.8, 'epsilon': 1e-2,
              'rate_embedding': 0.3, 'rate_vector': 0.2, 'decay_embedding': 0.1}
  muon = run(Muon(**settings), letters, weights, gradients)[-1]
  adamw = run(AdamW(**settings), letters, weights, gradients)[-1]
  for name in ('embedding', 'output', 'scale'):
    np.testing.assert_array_equal(muon[name], adamw[name])
  assert not np.allclose(muon['up'], adamw['up'], atol=1e-2)


def test_a_zero_gradient_moves_nothing(run):
  w = np.ones((2, 3, 4))
  (after,) = run(Muon(Constant(1.0), decay=None), {'w': 'LDF'}, {'w': w}, [{'w': 0 * w}])
  np.testing.assert_array_equal(after['w'], w)
