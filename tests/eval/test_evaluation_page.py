"""docs/evaluation.md names what there is, and tells of every evaluation that there is."""
import importlib
import pathlib
import pkgutil
import re

from lmlib import eval as evaluations
from lmlib import interop, plan

PAGE = (pathlib.Path(__file__).parents[2] / 'docs' / 'evaluation.md').read_text(encoding='utf-8')

FILES = ('py', 'md', 'json', 'jsonl')  # whose names look like those of modules


def modules(package) -> dict:
  return {info.name: f'{package.__name__}.{info.name}' for info in pkgutil.iter_modules(package.__path__)}


def test_what_the_page_names_is_there():
  known = modules(interop) | modules(plan) | modules(evaluations)
  named = [name for name in re.findall(r'`(?:plan\.)?([a-z_]+\.[A-Za-z_]+)[`(]', PAGE) if name.split('.')[0] in known]
  assert {'bias.Bbq', 'cost.Forward', 'classifier.Folder', 'calibration.reliability', 'refusal.RULES'} <= {*named}
  for name in named:
    module, _, attribute = name.partition('.')
    assert attribute in FILES or hasattr(importlib.import_module(known[module]), attribute), name


def test_every_evaluation_is_on_the_page():
  """Every class of lmlib/eval with check() and run(candidate)."""
  for stem, name in modules(evaluations).items():
    found = importlib.import_module(name)
    for attribute, value in vars(found).items():
      if isinstance(value, type) and value.__module__ == name and hasattr(value, 'check') and hasattr(value, 'run'):
        assert stem == 'evaluation' or f'`{stem}.{attribute}`' in PAGE, f'{stem}.{attribute}'
