"""Sentence encoders in folders, and what is refused of them."""
import pytest

from lmlib.interop import sentence
from lmlib.nn.pooling import Pooling


@pytest.mark.parametrize('pooling', [Pooling(), Pooling('first', False), Pooling('max')])
def test_what_is_written_is_read(tmp_path, pooling):
  sentence.write(tmp_path, pooling, width=24, length=16)
  assert sentence.pooling_of(tmp_path) == pooling


@pytest.mark.parametrize(('file', 'content', 'message'), [
    ('modules.json', '{"type": 3', 'modules.json: not a list of modules'),
    ('modules.json', '[1, 2]', 'not a list of modules'), ('modules.json', '[' * 100_000, 'not a list of modules'),
    ('modules.json', '[{"type": "a.Transformer", "path": ""}]', 'lists Transformer; known here is'),
    ('modules.json', '[{"type": "a.Transformer", "path": ""}, {"type": "Pooling", "path": "../x"}]', "and '../x'"),
    ('modules.json', '[{"type": "Transformer", "path": "0"}, {"type": "Pooling", "path": "1_Pooling"}]', "not in '0'"),
    ('modules.json', '[{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "2"}]', 'has no config.json'),
    ('1_Pooling/config.json', '{"pooling_mode_lasttoken": true}', 'asks for pooling_mode_lasttoken'),
    ('1_Pooling/config.json', '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}', 'asks for pooling'),
    ('1_Pooling/config.json', '{}', 'asks for no pooling')])
def test_what_is_not_known_is_refused(tmp_path, file, content, message):
  sentence.write(tmp_path, Pooling(), width=24, length=16)
  (tmp_path / file).write_text(content)
  with pytest.raises(ValueError, match=message):
    sentence.pooling_of(tmp_path)


def test_a_folder_without_modules_is_none(tmp_path):
  with pytest.raises(ValueError, match=r'no sentence encoder: it has no modules\.json'):
    sentence.load(tmp_path)
