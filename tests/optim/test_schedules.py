"""Every schedule equals its closed form at every step, and refuses a run it does not fit into."""
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlib.optim import schedules

PEAK, WARMUP, STEPS = 3e-3, 10, 100
S = np.arange(STEPS)
WARM = np.minimum(1, (S + 1) / WARMUP)
AFTER = np.maximum(0, (S - WARMUP) / (STEPS - WARMUP))  # share of the way from the warmup to the end
LAST = np.maximum(0, (S - 75) / 25)  # share of the way through the last quarter

CLOSED_FORMS = [
    (schedules.Constant(PEAK, WARMUP), WARM),
    (schedules.Linear(PEAK, WARMUP), WARM * (1 - AFTER)),
    (schedules.Linear(PEAK, WARMUP, floor=0.2), WARM * (0.2 + 0.8 * (1 - AFTER))),
    (schedules.Cosine(PEAK, WARMUP), WARM * (0.1 + 0.9 * np.cos(np.pi / 2 * AFTER)**2)),
    (schedules.Cosine(PEAK, WARMUP, floor=0.0), WARM * np.cos(np.pi / 2 * AFTER)**2),
    (schedules.Wsd(PEAK, WARMUP, decay=0.25), WARM * (1 - LAST)),
    (schedules.Wsd(PEAK, WARMUP, decay=0.25, floor=0.1, form='sqrt'), WARM * (0.1 + 0.9 * (1 - LAST**0.5))),
    (schedules.InverseSquareRoot(PEAK, WARMUP), np.minimum((S + 1) / WARMUP, (WARMUP / (S + 1))**0.5)),
]


@pytest.mark.parametrize(('schedule', 'shape'), CLOSED_FORMS, ids=lambda x: type(x).__name__)
def test_closed_form(schedule, shape):
  schedule.check(STEPS)
  traced = jax.jit(schedule.rate)
  for rate in (lambda s: schedule.rate(s, STEPS), lambda s: traced(jnp.int32(s), jnp.int32(STEPS))):
    rates = [rate(int(s)) for s in S]
    assert all(r.dtype == jnp.float32 and r.shape == () for r in rates)
    # float32 rounds to 6e-8, and a handful of operations each do so.
    np.testing.assert_allclose(rates, PEAK * shape, rtol=0, atol=8e-7 * PEAK)


@pytest.mark.parametrize('schedule', [case[0] for case in CLOSED_FORMS], ids=lambda x: type(x).__name__)
def test_rates_are_positive_and_peak_once_warm(schedule):
  rates = np.array([schedule.rate(int(s), STEPS) for s in S])
  assert (rates > 0).all()
  assert rates.max() == rates[WARMUP - 1] == np.float32(PEAK)
  assert (np.diff(rates[WARMUP - 1:]) <= 0).all()


@pytest.mark.parametrize('make', [schedules.Constant, schedules.Linear, schedules.Cosine, schedules.Wsd])
def test_without_warmup_the_first_step_has_the_peak(make):
  assert make(PEAK).rate(0, STEPS) == np.float32(PEAK)


def test_a_million_steps_lose_no_precision():
  schedule = schedules.Linear(1.0, 1000)
  steps = 1_000_000
  for step in (1000, 500_001, steps - 1):
    want = 1 - (step - 1000) / (steps - 1000)
    # One float32 rounding of the share that has passed, 6e-8, is what 1 - share keeps.
    np.testing.assert_allclose(jax.jit(schedule.rate)(step, steps), want, rtol=0, atol=1.2e-7)


@pytest.mark.parametrize(('setting', 'make'), [
    ('schedules.Cosine.peak=0', lambda: schedules.Cosine(peak=0)),
    ('schedules.Linear.peak=nan', lambda: schedules.Linear(peak=math.nan)),
    ("schedules.Linear.peak='1e-3'", lambda: schedules.Linear(peak='1e-3')),
    ('schedules.Cosine.warmup=-1', lambda: schedules.Cosine(1e-3, warmup=-1)),
    ('schedules.Cosine.warmup=10.0', lambda: schedules.Cosine(1e-3, warmup=10.0)),
    ('schedules.Cosine.floor=1.5', lambda: schedules.Cosine(1e-3, floor=1.5)),
    ('schedules.Wsd.decay=0', lambda: schedules.Wsd(1e-3, decay=0)),
    ('schedules.Wsd.decay=1.0', lambda: schedules.Wsd(1e-3, decay=1.0)),
    ("schedules.Wsd.form='cubic'", lambda: schedules.Wsd(1e-3, form='cubic')),
    ('schedules.InverseSquareRoot.warmup=0', lambda: schedules.InverseSquareRoot(1e-3)),
])
def test_bad_settings_are_named(setting, make):
  with pytest.raises(ValueError, match=re.escape(setting)):
    make()


@pytest.mark.parametrize(('schedule', 'steps', 'words'), [
    (schedules.Cosine(1e-3, warmup=100), 100, ('warmup=100', 'steps=100')),
    (schedules.Constant(1e-3, warmup=5), 4, ('warmup=5', 'steps=4')),
    (schedules.Linear(1e-3), 0, ('steps=0',)),
    (schedules.Wsd(1e-3, warmup=90), 100, ('warmup=90', 'decay=0.2', 'steps=100')),
    (schedules.Wsd(1e-3, decay=0.1), 19, ('decay=0.1', 'steps=19')),
])
def test_a_run_too_short_is_refused(schedule, steps, words):
  with pytest.raises(ValueError, match='.*'.join(map(re.escape, words))):
    schedule.check(steps)


def test_schedules_are_frozen_and_hashable():
  schedule = schedules.Wsd(1e-3, warmup=2)
  assert hash(schedule) == hash(dataclasses.replace(schedule))
  with pytest.raises(dataclasses.FrozenInstanceError):
    schedule.peak = 1.0
