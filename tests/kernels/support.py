"""Which implementation can do what, found by doing it: writes the tables of docs/kernels.md.

  python -m tests.kernels.support            runs every case by every implementation and writes what it found
  python -m tests.kernels.support --check    fails if docs/kernels.md says anything else

Each case is held to float64, values and gradients, on a CPU that interprets kernels. A case that an implementation
refuses is left blank; one that it accepts and gets wrong ends the program. What no CPU interprets is marked by what it
says of itself, and was held to float64 by benchmarks/kernels.py on a GPU.
"""
import os
import pathlib
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'

from lmlib.kernels import attention, cross_entropy, decode_attention, grouped_matmul, quantised_matmul
from tests.kernels import support_attention, support_others

DOCS = pathlib.Path(__file__).parents[2] / 'docs' / 'kernels.md'
# Relative to norms: of sums of products that are each rounded by 6e-8, by 2^-11 or by 2^-9.
CLOSE = {'float32': 2e-6, 'float16': 1e-3, 'bfloat16': 4e-3}
YES, SAYS, NO = '●', '○', ''
ELSEWHERE = {'attention': ('hopper', 'cudnn')}
TRAINING = {name: run for name, run in attention.IMPLEMENTATIONS.items() if not name.startswith('decode')}
OPERATIONS = {'attention': (TRAINING, support_attention.CASES),
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


def table(operation: str) -> str:
  """In Markdown."""
  implementations, cases = OPERATIONS[operation]
  names = list(implementations)
  lines = ['| | ' + ' | '.join(f'`{name}`' for name in names) + ' |', '|---|' + ':-:|' * len(names)]
  for name, case in cases.items():
    marks = [found(operation, implementation, name, case) for implementation in names]
    lines.append(f'| {name} | ' + ' | '.join(marks) + ' |')
    print(lines[-1], flush=True)
  return '\n'.join(lines)


def replaced(text: str, operation: str, lines: str) -> str:
  """`text` with the table of an operation between its two marks."""
  before, rest = text.split(f'<!-- support: {operation} -->\n')
  _, after = rest.split('<!-- end -->', 1)
  return f'{before}<!-- support: {operation} -->\n{lines}\n<!-- end -->{after}'


def main():
  old = new = DOCS.read_text()
  for operation in OPERATIONS:
    print(f'\n{operation}')
    new = replaced(new, operation, table(operation))
  if sys.argv[1:] != ['--check']:
    DOCS.write_text(new)
  elif new != old:
    raise SystemExit(f'{DOCS} says otherwise: python -m tests.kernels.support writes what was found')


if __name__ == '__main__':
  main()
