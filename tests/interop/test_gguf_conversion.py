"""From a WORKDIR to a GGUF file and back: the same weights to what the kind rounds, and nothing half."""
import jax
import numpy as np
import pytest

from experiments import convert
from lmlib import cli
from lmlib.interop import check, gguf, gguf_conversion
from lmlib.models import protocol
from lmlib.train.checkpoint import restore_params
from lmlib.train.health import RunFault
from lmlib.train.step import placed
from tests.interop.published import folder


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp('gguf')
  (path / 'source').mkdir()
  folder(path / 'source', pieces=290)
  convert.main(source=str(path / 'source'), target=str(path / 'run'), check=False)
  return path / 'run'


def weights(path):
  config = cli.saved_model(str(path))
  return config, restore_params(path / 'checkpoints', placed(protocol.boxed(config)))[0]


@pytest.mark.parametrize(('kind', 'rounding'), [('F32', 0), (None, 2**-11), ('Q8_0', 2**-7)])
def test_there_and_back(kind, rounding, workdir, tmp_path, capsys):
  convert.main(source=str(workdir), target=str(tmp_path / 'model.gguf'), kind=kind)
  assert f'{tmp_path}/model.gguf beside its source: logits differ by' in capsys.readouterr().out
  convert.main(source=str(tmp_path / 'model.gguf'), target=str(tmp_path / 'back'))
  assert f'{tmp_path}/back beside its source: logits differ by 0.0e+00' in capsys.readouterr().out
  (config, params), (back_config, back) = weights(workdir), weights(tmp_path / 'back')
  assert back_config == config
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params)):
    assert np.abs(a - b).max() <= rounding * np.abs(b).max()
  # Through GGUF a tokeniser keeps its ids and loses what GGUF has no words for.
  assert (tmp_path / 'back/tokenizer.model').is_file()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['back', 'model.gguf']


def test_what_was_written_wrong_is_not_kept(workdir, tmp_path, monkeypatch):
  save = gguf.save

  def wrong(path, config, params, *args, **settings):
    save(path, config, params | {'embedding': params['embedding'] * 1.5}, *args, **settings)

  monkeypatch.setattr(gguf, 'save', wrong)
  with pytest.raises(RunFault, match='logits differ by'):
    convert.main(source=str(workdir), target=str(tmp_path / 'model.gguf'))
  assert not list(tmp_path.iterdir())


def test_what_is_refused(workdir, tmp_path):
  (tmp_path / 'there.gguf').write_bytes(b'x')
  with pytest.raises(ValueError, match=r'there\.gguf. exists already'):
    convert.main(source=str(workdir), target=str(tmp_path / 'there.gguf'))
  with pytest.raises(ValueError, match=r'there\.gguf: '):
    convert.main(source=str(tmp_path / 'there.gguf'), target=str(tmp_path / 'run'))
  with pytest.raises(ValueError, match=r"kind='F16' is of GGUF files"):
    convert.main(source=str(workdir), target=str(tmp_path / 'folder'), kind='F16')
  with pytest.raises(ValueError, match=r"kind='Q9' must be one of F32, F16, Q8_0"):
    convert.main(source=str(workdir), target=str(tmp_path / 'model.gguf'), kind='Q9')
  assert [path.name for path in tmp_path.iterdir()] == ['there.gguf']
  assert gguf_conversion.LIMITS['F32'] == check.OWN_LIMIT
