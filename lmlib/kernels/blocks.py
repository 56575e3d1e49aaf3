"""Block sizes that were the fastest on a chip: a small table by kernel, chip and case, in blocks.json.

benchmarks/tune_kernels.py measures and writes it. What is not in the table has the default of the kernel's file.
"""
import dataclasses
import functools
import json
import pathlib

import jax

TABLE = pathlib.Path(__file__).with_name('blocks.json')


@functools.cache
def table() -> dict:
  """Kernel -> chip, as JAX calls it -> case -> sizes, a nest of names and numbers."""
  return json.loads(TABLE.read_text())


def chip() -> str:
  """The chip that a program is made for, here or elsewhere (plan/compiled.py)."""
  elsewhere = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if elsewhere is None else elsewhere.device_kind


def tuned(kernel: str, case: str, default):
  """`default`, a dataclass of sizes, with the numbers that were the fastest on this chip, if any are known."""
  found = table().get(kernel, {}).get(chip(), {}).get(case)
  return default if found is None else filled(default, found)


def filled(default, found: dict):
  """`default` with the numbers of `found`. ValueError if it has no such field."""
  known = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
  if strange := sorted(set(found) - set(known)):
    raise ValueError(f'{TABLE.name}: {type(default).__name__} has no {strange[0]!r}, only {sorted(known)}')
  return dataclasses.replace(default, **{name: filled(known[name], value) if isinstance(value, dict) else value
                                         for name, value in found.items()})
