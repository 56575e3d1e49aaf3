"""What all optimizers share: clipping, decay and rates by kind, one form of state, clear errors."""
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.optim.adafactor import Adafactor
from lmlib.optim.adamw import AdamW
from lmlib.optim.lion import Lion
from lmlib.optim.muon import Muon
from lmlib.optim.schedules import Constant

ALL = (AdamW, Adafactor, Lion, Muon)
LETTERS = {'blocks': {'up': 'LDF', 'scale': 'LD'}, 'embedding': 'VD'}
SHAPES = {'blocks': {'up': (2, 4, 3), 'scale': (2, 4)}, 'embedding': (5, 4)}


def tree(seed):
  random = np.random.default_rng(seed)
  return jax.tree.map(random.standard_normal, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize('make', ALL)
def test_decay_and_rate_go_by_kind(make, run):
  weights = jax.tree.map(np.float32, tree(0))
  zero = jax.tree.map(np.zeros_like, weights)
  optimizer = make(Constant(0.5), decay=0.1, decay_embedding=0.2, rate_embedding=0.25)
  (after,) = run(optimizer, LETTERS, weights, [zero])
  # A zero gradient leaves decay alone, one multiplication in float32: 1e-6.
  same = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-6)
  same(after['blocks']['up'], weights['blocks']['up'] * (1 - 0.5 * 0.1))
  same(after['embedding'], weights['embedding'] * (1 - 0.5 * 0.25 * 0.2))
  np.testing.assert_array_equal(after['blocks']['scale'], weights['blocks']['scale'])
  (after,) = run(dataclasses.replace(optimizer, decay_vector=0.3, rate_vector=2.0), LETTERS, weights, [zero])
  same(after['blocks']['scale'], weights['blocks']['scale'] * (1 - 0.5 * 2.0 * 0.3))


@pytest.mark.parametrize('make', [AdamW, Muon])
def test_clipping_scales_all_gradients_by_one_number(make, run):
  weights, small, large = tree(0), tree(1), tree(2)
  norm = lambda g: np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
  scaled = lambda g, c: jax.tree.map(lambda x: x * c, g)
  small = scaled(small, 0.1 / norm(small))
  assert norm(large) > 1 > norm(small)
  clipped = run(make(Constant(0.1), clip=1.0), LETTERS, weights, [small, large])
  by_hand = run(make(Constant(0.1), clip=None), LETTERS, weights, [small, scaled(large, 1 / norm(large))])
  free = run(make(Constant(0.1), clip=None), LETTERS, weights, [small, large])
  # Two float32 ways to the same gradient; Muon's five iterations amplify the difference.
  close = lambda *pair: all(np.allclose(x, y, rtol=0, atol=1e-5) for x, y in zip(*map(jax.tree.leaves, pair)))
  assert close(clipped, by_hand)
  assert not close(clipped, free)


def test_the_first_rate_is_that_of_step_0(run):
  weights, gradient = tree(0), tree(1)
  whole = run(AdamW(Constant(0.3), decay=None), LETTERS, weights, [gradient])[0]
  part = run(AdamW(Constant(0.3, warmup=3), decay=None), LETTERS, weights, [gradient])[0]
  for w, a, b in zip(*map(jax.tree.leaves, (weights, whole, part))):
    np.testing.assert_allclose(b - w, (a - w) / 3, rtol=0, atol=1e-6)  # float32 near weights of size 1


@pytest.mark.parametrize('make', ALL)
def test_the_state_has_one_form_whatever_is_off(make):
  on = make(Constant(0.1), decay=0.1, decay_embedding=0.1, decay_vector=0.1, clip=1.0, rate_vector=0.5)
  off = make(Constant(0.1), decay=None, clip=None)
  weights = jax.tree.map(jnp.float32, tree(0))
  state = lambda optimizer: jax.eval_shape(optimizer.transformation(LETTERS, 10).init, weights)
  assert jax.tree.structure(state(on)) == jax.tree.structure(state(off))


@pytest.mark.parametrize('make', ALL)
def test_settings_are_few_and_the_schedule_is_checked(make):
  assert len(dataclasses.fields(make)) <= 15
  with pytest.raises(ValueError, match='warmup=20 must be less than steps=10'):
    make(Constant(0.1, warmup=20)).transformation(LETTERS, 10)


@pytest.mark.parametrize(('setting', 'make'), [
    ('adamw.AdamW.schedule=0.001', lambda: AdamW(1e-3)),
    ('adamw.AdamW.clip=0', lambda: AdamW(Constant(1.0), clip=0)),
    ('adamw.AdamW.decay=-1', lambda: AdamW(Constant(1.0), decay=-1)),
    ('lion.Lion.decay_vector=0.0', lambda: Lion(Constant(1.0), decay_vector=0.0)),
    ('adamw.AdamW.beta2=1.0', lambda: AdamW(Constant(1.0), beta2=1.0)),
    ('adamw.AdamW.epsilon=0', lambda: AdamW(Constant(1.0), epsilon=0)),
    ('adamw.AdamW.rate_embedding=None', lambda: AdamW(Constant(1.0), rate_embedding=None)),
    ('lion.Lion.beta1=-0.1', lambda: Lion(Constant(1.0), beta1=-0.1)),
    ('adafactor.Adafactor.threshold=0', lambda: Adafactor(Constant(1.0), threshold=0)),
    ('adafactor.Adafactor.shortest=True', lambda: Adafactor(Constant(1.0), shortest=True)),
    ('muon.Muon.momentum=1', lambda: Muon(Constant(1.0), momentum=1)),
    ('muon.Muon.iterations=0', lambda: Muon(Constant(1.0), iterations=0)),
    ("muon.Muon.scaling='none'", lambda: Muon(Constant(1.0), scaling='none')),
])
def test_bad_settings_are_named(setting, make):
  with pytest.raises(ValueError, match=re.escape(setting)):
    make()
