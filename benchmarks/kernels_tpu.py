"""Attention on TPUs as libtpu compiles it, with no TPU: this library's kernel beside JAX's splash and flash attention.

Causal, bfloat16, 8 query heads of 2 key heads, width 128, forward and backward, at 2k to 32k positions for v5e and v5p.
Of each kernel and its block sizes: VMEM, bytes spilled from registers, instruction bundles and slots of each unit; and
the floor, the time that the chip's peak speed and bandwidth alone take. Fewer bundles for a pair of a query and a key
are the better of two block sizes of one kernel. Across kernels they mean little, for branches and waiting are not in
them: lmlib's kernels hold each tile twice, with a mask and without, of which a step runs one. Block sizes at which a
kernel does not fit are said to. Needs libtpu:

  pip install 'lmlib[tpu]'
  python benchmarks/kernels_tpu.py
"""
import collections
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile

CHIPS = {'v5e': (197e12, 819e9), 'v5p': (459e12, 2765e9)}  # bfloat16 FLOP/s and bytes/s of the data sheets
LENGTHS = (2048, 4096, 8192, 16384, 32768)
BLOCKS = ((256, 256), (512, 512), (512, 1024), (1024, 1024))  # of queries and keys
HEADS, KEY_HEADS, WIDTH = 8, 2, 128


def ours(length, block_t, block_s):
  from lmlib.kernels import attention_tpu
  from lmlib.kernels.attention import Pattern, Rows
  sizes = attention_tpu.Sizes(*[attention_tpu.Blocks(block_t, block_s)] * 3)
  attend = lambda q, k, v: attention_tpu.attention(q, k, v, Pattern(), Rows(), sizes_of=sizes)
  return attend, ((1, length, KEY_HEADS, HEADS // KEY_HEADS, WIDTH), *[(1, length, KEY_HEADS, WIDTH)] * 2)


def splash(length, block_t, block_s):
  import jax
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
  sizes = kernel.BlockSizes(block_q=block_t, block_kv=block_s, block_kv_compute=block_s, block_q_dkv=block_t,
                            block_kv_dkv=block_s, block_kv_dkv_compute=block_s, block_q_dq=block_t,
                            block_kv_dq=block_s)
  mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * (HEADS // KEY_HEADS))
  attend = jax.vmap(kernel.make_splash_mqa(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1))
  return attend, ((KEY_HEADS, HEADS // KEY_HEADS, length, WIDTH), *[(KEY_HEADS, length, WIDTH)] * 2)


def flash(length, block_t, block_s):
  from jax.experimental.pallas.ops.tpu import flash_attention as kernel
  sizes = kernel.BlockSizes(
      block_q=block_t, block_k_major=block_s, block_k=block_s, block_b=1, block_q_major_dkv=block_t,
      block_k_major_dkv=block_s, block_k_dkv=block_s, block_q_dkv=block_t, block_k_major_dq=block_s, block_k_dq=block_s,
      block_q_dq=block_t)
  attend = lambda q, k, v: kernel.flash_attention(q, k, v, causal=True, sm_scale=WIDTH**-0.5, block_sizes=sizes)
  return attend, ((1, HEADS, length, WIDTH),) * 3  # it knows no groups


KERNELS = {'lmlib': ours, 'splash': splash, 'flash': flash}


def worker(name: str, chip: str, length: str, block_t: str, block_s: str):
  """Prints what libtpu says of forward and backward at these block sizes; the process has libtpu for itself."""
  with tempfile.TemporaryDirectory() as folder:
    from lmlib.plan import compiled, static
    os.environ['LIBTPU_INIT_ARGS'] = static.FLAGS.format(folder)
    import jax
    import jax.numpy as jnp
    attend, shapes = KERNELS[name](int(length), int(block_t), int(block_s))

    def both(q, k, v):
      out, back = jax.vjp(attend, q, k, v)
      return back(out)

    made = compiled.program(both, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes), machine=chip)
    calls = re.findall(r'%([\w.-]+) = [^\n]* custom-call\(', made.as_text())
    print(json.dumps({name: one for name, one in static.kernels(folder).items() if name in calls}))


def asked(*words) -> dict | str:
  """What the worker prints, or why it failed."""
  done = subprocess.run([sys.executable, __file__, *map(str, words)], text=True, capture_output=True,
                        env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  if done.returncode == 0:
    return json.loads(done.stdout.splitlines()[-1])
  lines = [line for line in done.stderr.splitlines() if 'vmem' in line.lower() or 'Error' in line]
  return (lines or ['no reason given'])[-1].strip()[:120]


def floor(chip: str, length: int) -> float:
  """Seconds that the chip needs at least for causal attention and its gradients in two kernels: nine products."""
  flops, bandwidth = CHIPS[chip]
  work = 9 * 2 * HEADS * WIDTH * length**2 / 2
  moved = 2 * length * WIDTH * (HEADS * 5 + KEY_HEADS * 6)
  return max(work / flops, moved / bandwidth)


def main():
  if len(sys.argv) > 1:
    return worker(*sys.argv[1:])
  best, figures = {}, collections.defaultdict(dict)
  for chip in CHIPS:
    for name in KERNELS:
      for block_t, block_s in BLOCKS:  # at one length: blocks know nothing of it
        found = asked(name, chip, LENGTHS[0], block_t, block_s)
        where = f'{chip} {name:7s} {block_t:4d} x {block_s:4d}'
        if isinstance(found, str):
          print(f'{where}  does not fit: {found}')
          continue
        bundles = sum(one['bundles'] for one in found.values()) / (block_t * block_s)
        if (chip, name) not in best or bundles < best[chip, name][0]:
          best[chip, name] = bundles, block_t, block_s
        for kernel, one in found.items():
          slots = ' '.join(f'{unit} {count}' for unit, count in one['slots'].items())
          thousand = one['bundles'] / (block_t * block_s) * 1e3
          print(f'{where}  {kernel:36.36s} VMEM {one["vmem"] / 2**20:5.2f} MiB, spilled {one["spilled"] / 2**10:5.0f} '
                f'KiB, {one["bundles"]:6d} bundles, {thousand:4.1f} per 1000 pairs; {slots}')
        figures[f'{chip} {name}'][f'{block_t}x{block_s}'] = found
  for (chip, name), (_, block_t, block_s) in best.items():
    for length in LENGTHS:
      found = asked(name, chip, length, block_t, block_s)
      said = found if isinstance(found, str) else (
          f'VMEM {max(one["vmem"] for one in found.values()) / 2**20:5.2f} MiB, '
          f'spilled {max(one["spilled"] for one in found.values()) / 2**10:6.0f} KiB, '
          f'{sum(one["bundles"] for one in found.values()):6d} bundles')
      print(f'{chip} {name:7s} {length:6d} positions, blocks {block_t} x {block_s}: {said}; '
            f'no faster than {floor(chip, length) * 1e3:7.3f} ms')
  print(json.dumps({'name': 'kernels_tpu', 'goal': None, 'ratio': None, 'holds': None, 'figures': figures,
                    'machine': f'{os.cpu_count()} cores, {platform.platform()}, libtpu {version()}'}))


def version() -> str:
  import importlib.metadata
  return importlib.metadata.version('libtpu')


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
  main()
