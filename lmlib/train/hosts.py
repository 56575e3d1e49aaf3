"""Which process holds up the others: each tells now and then what it waited for and how fast its devices are.

All devices wait for the slowest in every step, so the time of a step is the same everywhere and names nobody. What
differs is how long a process waited for its own data, and how long its own devices take for a product that no other
has a part in.
"""
from collections.abc import Callable
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from lmlib import processes

SIDE, TIMES = 1024, 8  # of the product: on one core of a CPU some 0.2 s, on an accelerator under a millisecond


@dataclasses.dataclass(frozen=True)
class Stragglers:
  """Every `every` steps processes are compared; one is named that takes more than `times` the median, and `least` more.

  least: seconds that it waits a step. What all are slow at alike is told by goodput, and by no process.
  """
  every: int = 100
  times: float = 1.5
  least: float = 0.01

  def __post_init__(self):
    if not isinstance(self.every, int) or self.every < 1:
      raise ValueError(f'Stragglers.every={self.every!r} must be a positive number of steps')
    if not self.times > 1 or self.least < 0:
      raise ValueError(f'Stragglers.times={self.times} must be more than 1, and least={self.least} not negative')


class Hosts:
  """Compares the processes of a run; with one there is nothing to compare, and nothing is measured."""

  def __init__(self, stragglers: Stragglers, say: Callable[[str], None], *, count: int | None = None,
               gather: Callable = processes.gathered, probe: Callable[[], float] | None = None):
    """count: processes; gather(label, numbers): those of each, in order; probe(): how long our devices take."""
    self._stragglers, self._say, self._gather = stragglers, say, gather
    self._alone = (processes.count() if count is None else count) == 1
    self._probe = probe or _product
    self._waited: list[float] = []

  def after(self, line: dict) -> dict[str, float]:
    """After a step, the same in all processes; returns what is new, for TensorBoard."""
    if self._alone:
      return {}
    self._waited.append(line['waited'])
    if line['step'] % self._stragglers.every:
      return {}
    mine = [statistics.fmean(self._waited), self._probe()]
    waited_P, probe_P = np.array(self._gather('seconds of processes', mine)).T
    self._waited = []
    self._name(line['step'], waited_P, 'waits {0:.3g} s a step for its data', self._stragglers.least)
    self._name(line['step'], probe_P, 'has a device that takes {0:.3g} s for a product')
    return {'hosts/waited_most': float(waited_P.max()), 'hosts/waited_median': float(np.median(waited_P)),
            'hosts/product_most': float(probe_P.max()), 'hosts/product_median': float(np.median(probe_P))}

  def _name(self, step: int, seconds_P, what: str, least: float = 0.0):
    slowest, median = int(seconds_P.argmax()), float(np.median(seconds_P))
    if seconds_P[slowest] > max(self._stragglers.times * median, median + least):
      self._say(f'step {step}: process {slowest} {what.format(float(seconds_P[slowest]))}; the median of '
                f'{len(seconds_P)} processes is {median:.3g} s')


def _product() -> float:
  """Seconds that the slowest device of this process takes for a product of its own, when it is free."""
  slowest = 0.0
  for device in jax.local_devices():
    with jax.set_mesh(Mesh([device], ('alone',))):  # in that of the run all its devices would take part
      x = jax.device_put(np.ones((SIDE, SIDE), np.float32), device)
      _repeated(x).block_until_ready()
      start = time.perf_counter()
      _repeated(x).block_until_ready()
      slowest = max(slowest, time.perf_counter() - start)
  return slowest


@jax.jit
def _repeated(x):
  return jax.lax.fori_loop(0, TIMES, lambda _, y: jnp.tanh(y @ x / SIDE), x)
