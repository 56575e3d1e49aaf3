"""The tables of docs/kernels.md say what is so; minutes: `pytest --dist worksteal tests/kernels/support_matrix.py`."""
import pytest

from tests.kernels import support


def lines(operation: str) -> list[str]:
  return support.around(support.DOCS.read_text(), operation)[1].splitlines()


@pytest.mark.parametrize(('operation', 'name'), [
    (operation, name) for operation, (_, cases) in support.OPERATIONS.items() for name in cases])
def test_a_row_is_what_is_found(operation, name):
  there = [line for line in lines(operation) if line.startswith(f'| {name} |')]
  assert there == [support.row(operation, name)], 'python -m tests.kernels.support writes what is found'


@pytest.mark.parametrize('operation', support.OPERATIONS)
def test_a_table_has_all_implementations_and_no_other_rows(operation):
  first, second, *rows = lines(operation)
  assert [first, second] == support.head(operation)
  assert [row.split(' | ')[0].removeprefix('| ') for row in rows] == list(support.OPERATIONS[operation][1])
