"""Peak speeds of chips, for MFU: floating-point operations a second in bfloat16 (float32 on CPU)."""
import time

import jax
import jax.numpy as jnp

# Dense bfloat16 peaks of the makers' data sheets, FLOP/s for what JAX calls one device.
PEAK = {
    'TPU v2': 22.5e12, 'TPU v3': 61.5e12, 'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5e': 197e12,
    'TPU v5': 459e12, 'TPU v5p': 459e12, 'TPU v6 lite': 918e12, 'TPU v6e': 918e12, 'TPU7x': 1153.5e12,
    'NVIDIA A100-SXM4-40GB': 312e12, 'NVIDIA A100-SXM4-80GB': 312e12, 'NVIDIA A100 80GB PCIe': 312e12,
    'NVIDIA H100 80GB HBM3': 989.4e12, 'NVIDIA H100 PCIe': 756e12, 'NVIDIA H200': 989.4e12,
    'NVIDIA B200': 2250e12, 'NVIDIA L4': 121e12, 'NVIDIA L40S': 362e12, 'NVIDIA RTX A6000': 154.8e12,
    'NVIDIA GeForce RTX 4090': 165.2e12, 'NVIDIA GeForce RTX 3090': 71e12, 'Tesla V100-SXM2-16GB': 125e12,
    'Tesla T4': 65e12,
}


def peak_flops(devices) -> tuple[float, str] | tuple[None, str]:
  """(FLOP/s of all devices together, where the figure is from); None if the chip is not in the table."""
  kind = devices[0].device_kind
  if devices[0].platform == 'cpu':  # fake devices share one CPU: one measurement stands for all
    return measured(), 'measured here by a float32 matrix product; too low if other programs ran beside it'
  if kind not in PEAK:
    return None, f'{kind} is not in the table of plan/chips.py'
  return PEAK[kind] * len(devices), f'{len(devices)} × {kind} at {PEAK[kind] / 1e12:g} TFLOP/s'


def measured(size: int = 1024, for_seconds: float = 0.3) -> float:
  """FLOP/s of a square float32 matrix product, the best of those that so much time allows and at least of three."""
  a = jnp.ones((size, size), jnp.float32)
  product = jax.jit(jnp.matmul)
  product(a, a).block_until_ready()
  seconds = []
  while len(seconds) < 3 or sum(seconds) < for_seconds:
    start = time.perf_counter()
    product(a, a).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)
