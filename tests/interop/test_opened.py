"""A model is the same model wherever it lies, with its tokeniser and its chat template."""
import dataclasses
import io
import sys
import types

import jax
import numpy as np
import pytest

from lmlib import cli
from lmlib.data.chat import Chat
from lmlib.interop import conversion, gguf_conversion, opened
from lmlib.nn.stack import Execution
from lmlib.terminal import Terminal
from tests.post import small
from tests.post.small import CONFIG


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """The same model as a WORKDIR, a folder in Hugging Face's form and a GGUF file."""
  folder, terminal = tmp_path_factory.mktemp('places'), Terminal(io.StringIO())
  workdir = str(small.workdir(folder / 'workdir'))
  conversion.to_folder(workdir, CONFIG, str(folder / 'published'), model_type=None, dtype='float32', longest=10**9,
                       checked=False, terminal=terminal)
  gguf_conversion.to_file(workdir, CONFIG, str(folder / 'model.gguf'), kind='F32', architecture=None, checked=False,
                          terminal=terminal)
  return {'workdir': workdir, 'published': str(folder / 'published'), 'gguf': str(folder / 'model.gguf')}


@pytest.mark.parametrize('place', ['published', 'gguf'])
def test_weights_tokenizer_and_template_are_those_of_the_workdir(places, place):
  one, other = (opened.opened(places[name], cli.saved_model) for name in ('workdir', place))
  assert opened.same_model(place, one.config, other.config) is None
  for x, y in zip(jax.tree.leaves(one.params(one.config)), jax.tree.leaves(other.params(other.config)), strict=True):
    np.testing.assert_array_equal(x, y)
  said = small.turns('say sun', 'sun')
  examples = [Chat().example(said, found.tokenizer) for found in (one, other)]
  np.testing.assert_array_equal(examples[0].tokens_T, examples[1].tokens_T)
  np.testing.assert_array_equal(examples[0].weight_T, examples[1].weight_T)


def test_a_package_is_searched_for_its_file_without_being_run(places, tmp_path, monkeypatch):
  (tmp_path / 'a_model').mkdir()
  (tmp_path / 'a_model' / '__init__.py').write_text('raise AssertionError("imported")')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ValueError, match=r"SOURCE 'package:a_model': the package holds 0 files \*\.gguf"):
    opened.opened('package:a_model', cli.saved_model)
  (tmp_path / 'a_model' / 'x.gguf').symlink_to(places['gguf'])
  assert opened.opened('package:a_model', cli.saved_model).config.vocab == CONFIG.vocab
  assert 'a_model' not in sys.modules


def test_how_a_model_computes_may_differ_and_what_it_is_may_not():
  opened.same_model('x', CONFIG, dataclasses.replace(CONFIG, execution=Execution(remat='full')))
  with pytest.raises(ValueError, match=r"model is another than SOURCE 'x' holds \(model\.width: there 16, here 24\)"):
    opened.same_model('x', CONFIG, dataclasses.replace(CONFIG, width=24))


def test_a_fingerprint_sees_one_changed_number():
  tree = {'a': np.arange(6.0).reshape(2, 3), 'b': np.ones(2, np.float32)}
  tree = jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
  before = opened.fingerprint([tree, None])
  assert opened.fingerprint([tree, None]) == before
  tree['a'][1, 2] += 1e-3
  assert opened.fingerprint([tree, None]) != before


@pytest.mark.parametrize(('name', 'reason'), [('nowhere', 'is no model'), ('both', 'a model of others or a run')])
def test_what_is_no_model_is_named(tmp_path, name, reason):
  (tmp_path / 'both').mkdir()
  for file in ('config.json', 'config.gin'):
    (tmp_path / 'both' / file).write_text('{}')
  with pytest.raises(ValueError, match=f'SOURCE .*{name}.* {reason}'):
    opened.opened(str(tmp_path / name), cli.saved_model)


def test_an_adapter_without_a_form_in_peft_says_why_and_leaves_nothing(tmp_path):
  method = types.SimpleNamespace()
  why = opened.write_adapter(tmp_path / 'adapter', opened.Adapter({}, method), CONFIG)
  assert 'has no form in PEFT' in why
  assert not list(tmp_path.iterdir())
