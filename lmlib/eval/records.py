"""Records of published evaluation data, each with its place for messages: .jsonl, .jsonl.gz, .parquet, .csv files."""
from collections.abc import Iterator
import csv
import pathlib

from lmlib.data import files


def read(path, fields: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
  """(where, record) of every record of a file; a CSV file has its names in the first line.

  ValueError, naming the file and the line, for what is no record, or lacks one of `fields`; for a file without any.
  """
  path = str(pathlib.Path(path).expanduser())
  some = False
  for found in _csv(path, fields) if path.endswith('.csv') else _others(path, fields):
    some = True
    yield found
  if not some:
    raise ValueError(f'{path}: holds no records')


def text(record: dict, field: str, where: str) -> str:
  """The text of a field, or of a field of a field, such as 'prompt.text'. ValueError, naming both, if there is none."""
  return files.text_of(value(record, field, where), where, field)


def value(record: dict, field: str, where: str):
  """What a field, or a field of a field, holds. ValueError, naming both, if there is none."""
  found = record
  for key in field.split('.'):
    if not isinstance(found, dict) or key not in found:
      holds = sorted(record) if isinstance(record, dict) else f'a JSON {type(record).__name__}'
      raise ValueError(f'{where}: no field {field!r}, but {holds}')
    found = found[key]
  return found


def one_of(record: dict, field: str, known: tuple, where: str):
  """What a field holds, which must be one of those `known`. ValueError, naming all, if it is not."""
  found = value(record, field, where)
  if not any(found == one and type(found) is type(one) for one in known):
    raise ValueError(f'{where}: field {field!r} is {found!r}, none of {", ".join(map(repr, known))}')
  return found


def number(record: dict, field: str, where: str, *, low: float = 0.0, high: float = 1.0) -> float | None:
  """A number from `low` to `high`, or None where the field holds null. ValueError, naming the field, for others."""
  found = value(record, field, where)
  if found is None:
    return None
  if isinstance(found, bool) or not isinstance(found, (int, float)) or not low <= found <= high:
    raise ValueError(f'{where}: field {field!r} is {found!r}, no number from {low:g} to {high:g}')
  return float(found)


def _others(path: str, fields) -> Iterator[tuple[str, dict]]:
  if not files.holds_lines(path) and not files.holds_rows(path):
    raise ValueError(f'{path}: the name must end in .jsonl, .jsonl.gz, .parquet or .csv')
  for where, record in files.records(files.Piece(path)):
    for field in fields:
      value(record, field, where)
    yield where, record


def _csv(path: str, fields) -> Iterator[tuple[str, dict]]:
  with files.readable(path), open(path, encoding='utf-8-sig', newline='') as file:
    rows = csv.DictReader(file, strict=True)
    try:
      if missing := [field for field in fields if field not in (rows.fieldnames or ())]:
        raise ValueError(f'{path}, line 1: no field {missing[0]!r}, but {sorted(rows.fieldnames or ())}')
      for row in rows:
        where = f'{path}, line {rows.line_num}'
        if None in row or None in row.values():
          raise ValueError(f'{where}: {len(rows.fieldnames)} fields are named in line 1, and not as many are here')
        yield where, row
    except csv.Error as error:
      raise ValueError(f'{path}, line {rows.reader.line_num}: not CSV: {error}') from error
