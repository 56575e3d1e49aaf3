"""Programs compile for chips that are not here, and say what they cost."""
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import pytest

from lmlib.kernels import tpu
from lmlib.plan import compiled, static

ROOT = pathlib.Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(not compiled.available(), reason='libtpu is not installed')
X = jax.ShapeDtypeStruct((512, 128), jnp.bfloat16)


def doubled(x):
  """2 x by a kernel, four blocks."""

  def kernel(x_ref, out_ref):
    out_ref[...] = x_ref[...] + x_ref[...]

  rows = pl.BlockSpec((128, 128), lambda i: (i, 0))
  outputs = [(jax.ShapeDtypeStruct(x.shape, x.dtype), rows)]
  return tpu.call(kernel, name='doubled', grid=(4,), inputs=[rows], outputs=outputs, flops=x.size,
                  bytes_moved=2 * x.size * x.dtype.itemsize)(x)[0]


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ModuleNotFoundError, match=r"compiling for 'v5e' needs libtpu: pip install \"lmlib\[tpu\]\""):
    compiled.topology('v5e')
  with pytest.raises(ModuleNotFoundError, match=r"'h100' needs JAX's CUDA plugin: .*lmlib\[cuda\]"):
    compiled.topology('h100')


@needs_libtpu
@pytest.mark.parametrize('chip', compiled.TPUS)
def test_every_chip(chip):
  made = compiled.program(doubled, X, machine=chip)
  assert made.as_text().count('custom_call_target="tpu_custom_call"') == 1
  assert made.cost_analysis()['flops'] == 512 * 128  # what the kernel says of itself


@needs_libtpu
def test_twice_the_same():
  """jax's cache, which tests have, cannot give the first back."""
  both = [compiled.program(lambda x: x * 3 + 1, X, machine='v5e').as_text() for _ in range(2)]
  assert both[0] == both[1]


@needs_libtpu
def test_a_pod_and_a_machine_that_is_none():
  assert len(compiled.topology('v5e:16x16').devices) == 256
  with pytest.raises(ValueError, match=r"machine='v9' is none of \['v4'.*'h100'\] and none that libtpu knows"):
    compiled.topology('v9')


def test_the_same_function_is_interpreted_here():
  assert (doubled(jnp.ones((512, 128))) == 2).all()


@needs_libtpu
def test_what_libtpu_says_of_a_kernel(tmp_path):
  code = ('import json, sys; from tests.plan.test_compiled import X, doubled; from lmlib.plan import compiled, static; '
          "compiled.program(doubled, X, machine='v5e'); print(json.dumps(static.kernels(sys.argv[1])))")
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], text=True, capture_output=True, cwd=ROOT,
                        env=os.environ | {'LIBTPU_INIT_ARGS': static.FLAGS.format(tmp_path)})
  [(name, said)] = json.loads(done.stdout.splitlines()[-1]).items()
  assert name.startswith('doubled')
  assert said['vmem'] >= 2 * 2 * 128 * 128 * 2  # two buffers of a block in and of one out
  assert (said['spilled'], said['slots']['MXU']) == (0, 0)
  assert said['bundles'] > 0
  assert said['slots']['VSTORE'] > 0


def test_a_folder_without_a_report(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'holds no \*vmem_report.html: was libtpu loaded with LIBTPU_INIT_ARGS='):
    static.kernels(tmp_path)
