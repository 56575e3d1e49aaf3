"""Peaks of chips: those in the table, those that are not, and a CPU."""
import types

import jax
import pytest

from lmlib.plan import chips


def devices(kind: str, number: int, platform: str = 'gpu'):
  return [types.SimpleNamespace(device_kind=kind, platform=platform)] * number


def test_several_chips_add_up():
  assert chips.peak_flops(devices('NVIDIA H100 80GB HBM3', 8))[0] == 8 * 989.4e12
  value, source = chips.peak_flops(devices('TPU v5 lite', 4, 'tpu'))
  assert (value, source) == (4 * 197e12, '4 × TPU v5 lite at 197 TFLOP/s')


def test_a_chip_that_is_not_known_has_no_peak():
  value, source = chips.peak_flops(devices('NVIDIA X1', 1))
  assert value is None
  assert 'NVIDIA X1' in source


def test_every_peak_is_a_plausible_number():
  assert all(1e13 < peak < 1e16 for peak in chips.PEAK.values())


def test_a_cpu_is_measured_once_for_all_its_fake_devices(monkeypatch):
  monkeypatch.setattr(chips, 'measured', lambda: 5e10)
  assert chips.peak_flops(jax.devices())[0] == 5e10


def test_a_measurement_is_the_best_of_several(monkeypatch):
  """2 n^3 FLOPs over the shortest time, by a clock that is told."""
  ticks = iter([tick for start in range(0, 1000, 10) for tick in (start, start + (1.0 if start == 50 else 3.0))])
  monkeypatch.setattr(chips.time, 'perf_counter', lambda: next(ticks))
  assert chips.measured(8, for_seconds=20) == pytest.approx(2 * 8**3 / 1.0)
