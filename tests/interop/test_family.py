"""The axes language: every table says the same in both directions, and one that does not fit is refused."""
import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lmlib.interop import family
from lmlib.interop.family import Entry, Family, Place, Said, Tensor
from lmlib.models import dense
from lmlib.nn.decoder import Ends

CONFIG = dense.Config(vocab=11, layers=3, width=6, hidden=10, heads=6, kv_heads=3, head_width=4, length=8,
                      ends=Ends(tied=False))


@st.composite
def tensors(draw) -> Tensor:
  """A tensor of theirs with letters in any order, split into axes anywhere, perhaps with a +."""
  letters = draw(st.permutations('ABCDEF'))[:draw(st.integers(1, 4))]
  sizes = {letter: draw(st.integers(1, 4)) for letter in 'ABCDEFXYZ'}
  parts = draw(st.integers(1, 3))
  factors = list(letters)
  if parts > 1:
    factors.insert(draw(st.integers(0, len(factors))), '+')
  dims, axis = [], ''
  for factor in factors:
    axis += factor
    if draw(st.booleans()):
      dims.append(axis)
      axis = ''
      dims += ['1'] * draw(st.integers(0, 1))
  dims += [axis] * bool(axis)
  places = []
  for i in range(parts):
    inner = ''.join(draw(st.permutations('XYZ'))[:draw(st.integers(0, 2))]) if parts > 1 else ''
    ours = ''.join(draw(st.permutations([*letters, *inner])))
    shape = {letter: draw(st.integers(1, 4)) if letter in inner else sizes[letter] for letter in ours}
    places.append(Place(f'{i}', (), ours, inner, tuple(shape[letter] for letter in ours)))
  return Tensor('theirs', tuple(dims), tuple(places))


@settings(deadline=None, max_examples=300)
@given(tensors())
def test_what_is_split_joins_again_and_nothing_is_lost(tensor):
  theirs = np.arange(np.prod(tensor.shape), dtype=np.int64).reshape(tensor.shape)
  ours = tensor.split(theirs)
  assert [part.shape for part in ours] == [place.shape for place in tensor.places]
  assert sorted(np.concatenate([part.ravel() for part in ours])) == list(range(theirs.size))
  np.testing.assert_array_equal(tensor.join(ours), theirs)
  for part in ours:
    assert part.base is not None, 'a view'


def tensor(dims: str, *places: tuple[str, str, tuple[int, ...]], plus: float = 0.0) -> Tensor:
  return Tensor('theirs', tuple(dims.split()), tuple(Place(str(i), (), *p) for i, p in enumerate(places)), plus)


def test_a_projection_becomes_heads():
  w_ND = np.random.default_rng(0).normal(size=(6 * 4, 5))
  q_DKGH, = tensor('KGH D', ('DKGH', '', (5, 3, 2, 4))).split(w_ND)
  x_D = np.arange(5.0)
  np.testing.assert_allclose(np.einsum('d,dkgh->kgh', x_D, q_DKGH).ravel(), w_ND @ x_D)


def test_queries_keys_and_values_follow_one_another():
  w = np.arange((6 + 3 + 3) * 4 * 5).reshape(48, 5)
  q, k, v = tensor('+ D', ('DKGH', 'KGH', (5, 3, 2, 4)), ('DKH', 'KH', (5, 3, 4)), ('DKH', 'KH', (5, 3, 4))).split(w)
  np.testing.assert_array_equal(q.reshape(5, 24), w[:24].T)
  np.testing.assert_array_equal(k.reshape(5, 12), w[24:36].T)
  np.testing.assert_array_equal(v.reshape(5, 12), w[36:].T)


def test_queries_keys_and_values_take_turns_in_every_head():
  w = np.arange(3 * (8 + 4 + 4) * 5).reshape(48, 5)
  q, k, v = tensor('K+ D', ('DKGH', 'GH', (5, 3, 2, 4)), ('DKH', 'H', (5, 3, 4)), ('DKH', 'H', (5, 3, 4))).split(w)
  per_head = w.reshape(3, 16, 5)
  np.testing.assert_array_equal(q[:, 1].reshape(5, 8), per_head[1, :8].T)
  np.testing.assert_array_equal(k[:, 1], per_head[1, 8:12].T)
  np.testing.assert_array_equal(v[:, 2], per_head[2, 12:].T)


def test_gate_and_up_take_turns():
  w_DF = np.arange(5 * 6).reshape(5, 6)
  gate, up = tensor('D F+', ('DF', '', (5, 3)), ('DF', '', (5, 3))).split(w_DF)
  np.testing.assert_array_equal(gate, w_DF[:, ::2])
  np.testing.assert_array_equal(up, w_DF[:, 1::2])


def test_plus_is_added_in_float32_and_taken_off():
  import ml_dtypes
  theirs = np.array([2**-7, -0.5], ml_dtypes.bfloat16)
  norm = tensor('D', ('D', '', (2,)), plus=1.0)
  ours, = norm.split(theirs)
  assert ours.dtype == np.float32
  assert ours.tolist() == [1 + 2**-7, 0.5]
  assert norm.join([ours]).tolist() == [2**-7, -0.5]


def test_a_table_names_every_tensor_and_weight():
  found = family.tensors(family.find('llama'), CONFIG)
  assert len(found) == 3 + 9 * CONFIG.layers
  q = found['model.layers.2.self_attn.q_proj.weight']
  assert (q.shape, q.places[0].path, q.places[0].index) == ((24, 6), 'blocks/attention/q', (2,))
  moved = family.find('llama')
  table = {name: dataclasses.replace(entry, start=4) for name, entry in moved.tensors(CONFIG).items()}
  moved = dataclasses.replace(moved, tensors=lambda _: table)
  assert 'model.layers.6.self_attn.q_proj.weight' in family.tensors(moved, CONFIG)


FAULTS = {
    'unknown': ({'output': None, 'outptu': Entry('V D', {'outptu': ''})},
                "no weight 'outptu' (did you mean \"output\"?)"),
    'missing': ({'output': None}, 'no entry fills output'),
    'twice': ({'again': Entry('V D', {'embedding': ''})}, 'embedding is filled by embedding already'),
    'letters': ({'output': Entry('V F', {'output': ''})}, "'V F' with '' is made of VF, but output of DV"),
    'axis': ({'output': Entry('V d', {'output': ''})}, "the axis 'd' of 'V d'"),
    'no plus': ({'output': Entry('V D', {'output': 'V'})}, "output says 'V', but 'V D' has no +"),
    'plus alone': ({'output': Entry('V+ D', {'output': ''})}, 'one + joins several parts'),
    'no layers': ({'output': None, 'o{L}': Entry('V D', {'output': ''})}, 'output is DV, which does not begin with L')}


@pytest.mark.parametrize(('changes', 'said'), FAULTS.values(), ids=FAULTS)
def test_a_table_that_does_not_fit_is_refused(changes, said):
  right = {path: Entry(' '.join(letters), {path: ''}) for path, letters in
           {'embedding': 'VD', 'output': 'VD', 'norm/scale': 'D'}.items()}
  right |= {template: entry for template, entry in family.find('llama').tensors(CONFIG).items() if '{L}' in template}
  table = {name: entry for name, entry in (right | changes).items() if entry is not None}
  broken = Family(('x',), ('X',), None, None, lambda _: table)
  with pytest.raises(ValueError) as error:  # noqa: PT011, looked at below
    family.tensors(broken, CONFIG)
  assert said in str(error.value)


def test_an_unknown_family_says_which_are_known_and_the_nearest():
  with pytest.raises(ValueError, match=r"'lama' is not known \(did you mean \"llama\"\?\); known are: .*llama"):
    family.find('lama')


def test_a_config_says_what_was_overlooked():
  said = Said({'model_type': 'x', 'a': 1, 'b': 2, 'c': None, 'use_cache': True})
  assert said['a'] == 1
  assert said.get('c', 3) == 3
  assert said.unread() == ['b']
  assert said.only('b', 2, 3) == 2
  assert said.unread() == []
  with pytest.raises(ValueError, match=r"config.json says b=2; known here: 4, 5"):
    said.only('b', 4, 5)
  with pytest.raises(ValueError, match=r"config.json has no 'd', which a x model needs"):
    said['d']
