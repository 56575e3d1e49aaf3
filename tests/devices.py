"""Several devices on one CPU."""


def fake_devices(count: int) -> str:
  """XLA_FLAGS for so many devices. They wait long for each other: two busy cores take turns for all of them."""
  return (f' --xla_force_host_platform_device_count={count} --xla_cpu_collective_call_warn_stuck_timeout_seconds=120'
          ' --xla_cpu_collective_call_terminate_timeout_seconds=600')
