"""Which implementation can do what, found by doing it: writes the tables of docs/kernels.md.

  python -m tests.kernels.support                runs every case by every implementation and writes what it found
  pytest tests/kernels/support_matrix.py         fails if docs/kernels.md says anything else

Each case is held to float64, values and gradients, on a CPU that interprets kernels. A case that an implementation
refuses is left blank; one that it accepts and gets wrong ends the program. What no CPU interprets is marked by what it
says of itself, and was held to float64 by benchmarks/kernels.py on a GPU.
"""
import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'

from lmlib.kernels import attention, cross_entropy, decode_attention, grouped_matmul, quantised_matmul
from tests.kernels import support_attention, support_others

DOCS = pathlib.Path(__file__).parents[2] / 'docs' / 'kernels.md'
# Relative to norms: of sums of products that are each rounded by 6e-8, by 2^-11 or by 2^-9.
CLOSE = {'float32': 2e-6, 'float16': 1e-3, 'bfloat16': 4e-3}
YES, SAYS, NO = '●', '○', ''
ELSEWHERE = {'attention': ('hopper', 'cudnn')}
OPERATIONS = {'attention': (attention.IMPLEMENTATIONS, support_attention.CASES),
              'decode_attention': (decode_attention.IMPLEMENTATIONS, support_others.steps()),
              'grouped_matmul': (grouped_matmul.IMPLEMENTATIONS, support_others.GROUPS),
              'cross_entropy': (cross_entropy.IMPLEMENTATIONS, support_others.WORDS),
              'quantised_matmul': (quantised_matmul.IMPLEMENTATIONS, support_others.BITS)}


def found(operation: str, implementation: str, name: str, case) -> str:
  """The mark of a case. AssertionError if it is done wrong."""
  if implementation in ELSEWHERE.get(operation, ()):
    return SAYS if not case.refused(implementation) else NO
  try:
    error = case.error(implementation)
  except ValueError as reason:
    if 'cannot do' not in str(reason):
      raise
    return NO
  assert error < CLOSE[case.dtype], f'{operation} by {implementation!r}, {name}: an error of {error:.1e}'
  return YES


def head(operation: str) -> list[str]:
  """The lines above a table's rows, in Markdown."""
  names = list(OPERATIONS[operation][0])
  return ['| | ' + ' | '.join(f'`{name}`' for name in names) + ' |', '|---|' + ':-:|' * len(names)]


def row(operation: str, name: str) -> str:
  """The row of a case, found by running it."""
  implementations, cases = OPERATIONS[operation]
  marks = [found(operation, implementation, name, cases[name]) for implementation in implementations]
  return f'| {name} | ' + ' | '.join(marks) + ' |'


def around(text: str, operation: str) -> tuple[str, str, str]:
  """`text` before the table of an operation, its lines, and what follows."""
  mark = f'<!-- support: {operation} -->\n'
  before, rest = text.split(mark)
  table, after = rest.split('\n<!-- end -->', 1)
  return before + mark, table, '\n<!-- end -->' + after


def main():
  text = DOCS.read_text()
  for operation, (_, cases) in OPERATIONS.items():
    print(f'\n{operation}')
    lines = head(operation)
    for name in cases:
      lines.append(row(operation, name))
      print(lines[-1], flush=True)
    before, _, after = around(text, operation)
    text = before + '\n'.join(lines) + after
  DOCS.write_text(text)


if __name__ == '__main__':
  main()
