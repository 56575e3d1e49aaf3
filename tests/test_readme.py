"""What the README shows works as it stands."""
import pathlib
import re

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()


def test_the_library_example_runs_and_learns_its_sentence(capsys):
  code, = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  exec(compile(code, 'README.md', 'exec'), {})
  assert "b' or not to be, that '" in capsys.readouterr().out


def test_the_gin_files_and_experiments_it_names_exist():
  root = pathlib.Path(__file__).parents[1]
  for name in re.findall(r'--gin_file=(\S+\.gin)', README):
    assert (root / 'gin_configs' / name).exists(), name
  for name in re.findall(r'python (experiments/\S+\.py)', README):
    assert (root / name).exists(), name
