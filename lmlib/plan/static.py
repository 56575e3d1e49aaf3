"""What libtpu says of the kernels it compiled: their share of VMEM, what they spill, and which units they use.

libtpu writes it where LIBTPU_INIT_ARGS tells, before it is loaded: see FLAGS. All of it is static: nothing is known of
waiting for memory, and little of how often a branch is taken. So it compares variants of one kernel, and not kernels.
"""
import json
import pathlib
import re

FLAGS = '--xla_jf_dump_to={0}'  # a folder; some 30 MB a kernel


def kernels(folder) -> dict[str, dict]:
  """Of each kernel by its name: vmem and spilled in bytes, bundles (instructions), and slots of each unit.

  FileNotFoundError if the folder holds no report, as when nothing was compiled.
  """
  folder, found = pathlib.Path(folder), {}
  if not (reports := sorted(folder.glob('*vmem_report.html'))):
    raise FileNotFoundError(f'{folder} holds no *vmem_report.html: was libtpu loaded with '
                            f'LIBTPU_INIT_ARGS="{FLAGS.format(folder)}" and something compiled?')
  for report in reports:
    text = report.read_text()
    data, _ = json.JSONDecoder().raw_decode(text, text.index('{', text.index('const DATA')))
    for name, used in data['hlo_breakdowns'].items():
      if not list(folder.glob(f'*-{name}-*-final_hlo-static-per-bundle-utilization.txt')):
        continue  # what kernels are called from
      parts = [part for block in used['blocks'] for part in block['allocations']]
      spilled = sum(part['size'] for part in parts if part['tag'] == 'SPILL')
      found[name] = dict(vmem=used['total_size'] - spilled, spilled=spilled) | units(folder, name)
  return found


def units(folder: pathlib.Path, name: str) -> dict:
  """bundles of a kernel, and how many slots of each unit they fill."""
  [table] = folder.glob(f'*-{name}-*-final_hlo-static-per-bundle-utilization.txt')
  lines = table.read_text().splitlines()
  start = next(i for i, line in enumerate(lines) if 'UTILIZATION' in line)
  heads = [head.strip() for head in lines[start - 2].split(',')]
  rows = [[int(number) for number in line.split()] for line in lines[start + 1:] if re.fullmatch(r'[\d\s]+', line)]
  return dict(bundles=len(rows), slots={head: sum(column) for head, column in zip(heads, zip(*rows))})
