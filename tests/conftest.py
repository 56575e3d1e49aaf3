"""Eight CPU devices, ranks that must match, quick compilation: before jax is imported."""
import atexit
import os
import shutil
import signal
import tempfile

from tests.devices import fake_devices

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.update({name: f'{os.environ.get(name, "")} {value}' if name == 'XLA_FLAGS' else value
                   for name, value in fake_devices(8).items()})  # of a flag that is there twice the last one counts
# Most of a test's time is compilation. Laws hold without optimisation too, and equal programs compile once.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # of the first process: it hands its environment to its workers
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='lmlib-tests-')
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

import jax
import pytest

# What runs in the background of a shell ignores Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='module', autouse=True)
def bounded_memory():
  """Forgets compiled programs after every file: of thousands of tests they take gigabytes."""
  yield
  jax.clear_caches()
