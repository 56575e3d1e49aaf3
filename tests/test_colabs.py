"""Every notebook runs from top to bottom, and is kept without its outputs."""
import dataclasses
import json
import os
import pathlib

import pytest

from tests.interop import published

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'colabs').glob('*.ipynb'))
notebooks = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
pytestmark = pytest.mark.filterwarnings('ignore')  # of Jupyter's own; in the notebook Python's defaults hold


def opened(path):
  nbformat = pytest.importorskip('nbformat', reason="nbformat is in the extra 'test'")
  return nbformat.read(path, as_version=4)


def tiny_model(path: pathlib.Path) -> pathlib.Path:
  """A folder in Hugging Face's form, with a chat template and weights that nobody trained."""
  published.folder(path, dataclasses.replace(published.CONFIG, layers=1, length=512), pieces=290)
  said = json.loads((path / 'tokenizer_config.json').read_text())
  template = ('{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'
              '{% if add_generation_prompt %}assistant: {% endif %}')
  (path / 'tokenizer_config.json').write_text(json.dumps(said | {'chat_template': template}))
  return path


@notebooks
def test_a_notebook_is_kept_without_outputs(path):
  for cell in opened(path).cells:
    if cell.cell_type == 'code':
      assert (cell.outputs, cell.execution_count) == ([], None)


@notebooks
def test_a_notebook_installs_lmlib_on_colab_first(path):
  first = next(cell for cell in opened(path).cells if cell.cell_type == 'code')
  assert "if 'google.colab' in sys.modules:\n  %pip install -q lmlib" in first.source


@notebooks
def test_a_notebook_runs(path, tmp_path, monkeypatch):
  nbclient = pytest.importorskip('nbclient', reason="nbclient and ipykernel are in the extra 'test'")
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])))
  monkeypatch.setenv('XLA_FLAGS', '')  # one device
  if path.stem.startswith('01'):  # the only one that trains long enough for all of XLA's work to pay
    monkeypatch.delenv('JAX_DISABLE_MOST_OPTIMIZATIONS', raising=False)
  monkeypatch.setenv('JUPYTER_RUNTIME_DIR', str(tmp_path / 'runtime'))
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
  monkeypatch.setenv('LMLIB_MODEL', str(tiny_model(tmp_path / 'model')))  # in place of one that must be fetched
  notebook = opened(path)
  nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3',
                          resources={'metadata': {'path': str(tmp_path)}}).execute()
  said = ''.join(output.get('text', '') for cell in notebook.cells for output in cell.get('outputs', ()))
  assert 'Warning' not in said, said
