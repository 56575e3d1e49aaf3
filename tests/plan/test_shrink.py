"""Every model that a gin file names has a small copy of its kind; layouts keep their axes."""
import dataclasses

import jax
import pytest

from lmlib import cli, trees
from lmlib.data.objectives import MaskedLm, Specials, vocabulary
from lmlib.models import dense, protocol
from lmlib.plan import shrink
from lmlib.sharding import Layout

MODELS = sorted(path.stem for path in (cli.GIN_CONFIGS / 'models').glob('*.gin'))


@pytest.mark.parametrize('name', MODELS)
def test_every_model_becomes_small(name, tmp_path):
  (tmp_path / 'config.gin').write_text(
      f"from __gin__ import dynamic_registration\ninclude '{cli.GIN_CONFIGS}/models/{name}.gin'\n")
  whole = cli.saved_model(str(tmp_path))
  small = shrink.model(whole, Layout(data=1, fsdp=2, tensor=2), 264)
  assert type(small) is type(whole)
  assert trees.count(protocol.boxed(small)) < 300_000
  # All that it is made of is there: the same weights, by name and letters.
  names = lambda config: {path: len(x.shape) for path, x in trees.flat(protocol.boxed(config)).items()}
  assert names(small) == names(whole)
  assert (getattr(small, 'kv_heads', 0) == small.heads) == (getattr(whole, 'kv_heads', 0) == whole.heads)


@pytest.mark.parametrize(('whole', 'small'), [
    (Layout(data=16, fsdp=256), dict(data=2, fsdp=4)), (Layout(data=1, fsdp=-1), dict(fsdp=8)),
    (Layout(data=1, fsdp=-1, context=4), dict(fsdp=4, context=2)), (Layout(data=1, fsdp=32, tensor=8, stage=4),
                                                                    dict(fsdp=2, tensor=2, stage=2)),
    (Layout(data=2, tensor=2), dict(data=2, tensor=2)), (Layout(data=1), {})])
def test_layouts_keep_their_axes(whole, small):
  assert shrink.layout(whole) == dataclasses.replace(whole, **dict(data=1, fsdp=1) | small)


def test_sums_that_are_wide_by_choice_are_float32_in_a_small_run_as_they_are():
  assert shrink.layout(Layout(data=8, wide_sums=True)) == Layout(data=8)


def test_layers_are_as_many_as_stages_take():
  whole = dense.Config(layers=24)
  assert shrink.model(whole, Layout(data=1, stage=4), 64).layers == 4
  assert shrink.model(whole, Layout(), 64).layers == 2


def test_special_ids_follow_the_small_vocabulary():
  small = shrink.objective(MaskedLm(Specials(mask=50000)), 259)
  assert small.specials.mask == 259
  assert vocabulary(small, 259) == 260


def test_what_shrinks_is_said():
  whole = dense.Config(vocab=1000, layers=12, width=128)
  said = shrink.said(whole, shrink.model(whole, Layout(), 264))
  assert said.startswith('12 layers to 2, ')
  assert f'{sum(x.size for x in jax.tree.leaves(protocol.boxed(whole))):,} weights to' in said
