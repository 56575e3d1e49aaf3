"""Eight CPU devices, ranks that must match, quick compilation: before jax is imported."""
import os
import tempfile

from tests.devices import fake_devices

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + fake_devices(8)
# Most of a test's time is compilation. Laws hold without optimisation too, and equal programs compile once.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', tempfile.mkdtemp(prefix='lmlib-tests-'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')
