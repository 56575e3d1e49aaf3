"""Several devices on one CPU, to try a layout on a machine that has none. Does not import jax."""


def environment(count: int) -> dict[str, str]:
  """Environment variables for so many devices, to be set before jax looks for any.

  They wait long for each other: two busy cores take turns for all of them. Of threads there are more than devices, for
  one that waits for the others holds its thread, and those may need one to get there.
  """
  return {'PJRT_NPROC': str(2 * count), 'XLA_FLAGS': (
      f'--xla_force_host_platform_device_count={count} --xla_cpu_collective_call_warn_stuck_timeout_seconds=120'
      ' --xla_cpu_collective_call_terminate_timeout_seconds=600')}
