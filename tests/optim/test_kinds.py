"""Kinds and fan-in follow from names and letters alone."""
import pytest

from lmlib.optim import kinds


def test_kinds_of_a_tree():
  letters = {'blocks': {'attention': {'q': 'LDKGH', 'out': 'LKGHD', 'q_bias': 'LKGH'},
                        'mlp': {'up': 'LEDF', 'bias': 'LEF', 'router': 'LDE'}, 'norm': {'scale': 'LD'}},
             'embedding': 'VD', 'output': 'DV', 'scale': 'VD', 'out_scale': 'DF',
             'temperature': '', 'gain': 'D', 'balance_bias': 'LE'}
  assert kinds.kinds(letters) == {
      'blocks': {'attention': {'q': 'matrix', 'out': 'matrix', 'q_bias': 'vector'},
                 'mlp': {'up': 'matrix', 'bias': 'vector', 'router': 'matrix'}, 'norm': {'scale': 'vector'}},
      'embedding': 'embedding', 'output': 'embedding', 'scale': 'vector', 'out_scale': 'vector',
      'temperature': 'vector', 'gain': 'vector', 'balance_bias': 'balance'}


@pytest.mark.parametrize(('axes', 'fans'), [
    ('DF', ((0,), (1,))), ('LDF', ((1,), (2,))), ('LFD', ((1,), (2,))), ('LEDF', ((2,), (3,))),
    ('DKGH', ((0,), (1, 2, 3))), ('LKGHD', ((1, 2, 3), (4,))), ('LDE', ((1,), (2,))), ('DD', ((0,), (1,))),
    ('LAKGH', ((1,), (2, 3, 4))), ('LKGHA', ((1, 2, 3), (4,))),
    ('LHF', ((1,), (2,))), ('LQKH', ((1,), (2, 3))), ('RKW', ((0,), (1, 2))), ('LKWD', ((1, 2), (3,)))])
def test_fans(axes, fans):
  assert kinds.fans(axes) == fans


def test_fans_refuses_what_it_cannot_tell():
  with pytest.raises(ValueError, match="'LKGH'"):
    kinds.fans('LKGH')
