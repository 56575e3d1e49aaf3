"""Layers apart and together, and checksums."""
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from lmlib import sharding, trees

LAYERS = 3


def weights():
  size = lambda *shape: jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
  return {'embedding': size(8, 4),
          'blocks': {'mlp': {'up': size(LAYERS, 4, 8)}, 'norm': {'scale': size(LAYERS, 4)}}}


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
      jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_every_layer_has_its_name():
  apart = trees.unstacked(weights())
  assert sorted(apart) == ['blocks_0/mlp/up', 'blocks_0/norm/scale', 'blocks_1/mlp/up', 'blocks_1/norm/scale',
                           'blocks_2/mlp/up', 'blocks_2/norm/scale', 'embedding']
  assert (apart['blocks_2/mlp/up'] == weights()['blocks']['mlp']['up'][2]).all()


def test_stacked_inverts_unstacked():
  assert same(trees.stacked(trees.unstacked(weights()), weights()), weights())


@pytest.mark.parametrize('optimizer', [
    optax.adamw(1e-3),
    optax.adafactor(1e-3, min_dim_size_to_factor=4),  # placeholders of shape (1,) under blocks
    optax.masked(optax.adam(1e-3),
                 {'embedding': True, 'blocks': {'mlp': {'up': True}, 'norm': {'scale': False}}}),
], ids=['adamw', 'adafactor', 'masked'])
def test_an_optimizers_state_comes_apart_and_together(optimizer):
  tree = {'params': weights(), 'optimizer': optimizer.init(weights())}
  apart = trees.unstacked(tree, tree['params'])
  assert same(trees.stacked(apart, tree, tree['params']), tree)
  assert not any(f'/{trees.BLOCKS}/' in name for name, leaf in apart.items() if leaf.shape[:1] == (LAYERS,))


def test_what_is_no_stack_stays_whole():
  # Adafactor stores (1,) where it does not factor, or does; Adam's count is a scalar.
  tree = {'params': weights(), 'v': {'blocks': {'mlp': {'up': jnp.zeros(1)}, 'count': jnp.int32(0)}}}
  names = trees.layer_names(tree, tree['params'])
  assert names['v/blocks/mlp/up'] is None
  assert names['v/blocks/count'] is None
  assert names['params/blocks/mlp/up'] == tuple(f'params/blocks_{i}/mlp/up' for i in range(LAYERS))


def test_two_stacks_of_different_depth():
  params = {'encoder': {'blocks': {'w': jnp.zeros((2, 4))}}, 'blocks': {'w': jnp.zeros((3, 4))}}
  tree = {'params': params, 'mu': params}
  apart = trees.unstacked(tree, params)
  assert len(apart) == 10
  assert {'mu/encoder/blocks_1/w', 'mu/blocks_2/w'} <= apart.keys()
  assert same(trees.stacked(apart, tree, params), tree)


def test_shapes_and_shardings_come_apart_and_together():
  with sharding.use(sharding.Layout(data=1, fsdp=4, tensor=2)) as mesh:
    where = NamedSharding(mesh, PartitionSpec(None, 'fsdp', 'tensor'))
    like = {'blocks': {'up': jax.ShapeDtypeStruct((LAYERS, 4, 8), jnp.bfloat16, sharding=where)}}
    apart = trees.unstacked(like)
    assert apart['blocks_1/up'].shape == (4, 8)
    assert apart['blocks_1/up'].sharding.spec == PartitionSpec('fsdp', 'tensor')
    back = trees.stacked(apart, like)['blocks']['up']
    assert (back.shape, back.dtype, back.sharding) == ((LAYERS, 4, 8), jnp.bfloat16, where)
  plain = trees.unstacked({'blocks': {'up': jax.ShapeDtypeStruct((LAYERS, 4), jnp.float32)}})
  assert plain['blocks_0/up'].sharding is None


@pytest.mark.parametrize('dtype', [
    'float32', 'bfloat16', 'float16', 'int32', 'uint32', 'int8', 'bool', 'float8_e4m3fn'])
def test_a_checksum_notices(dtype):
  bits = jax.random.randint(jax.random.key(0), (6, 10), 0, 2).astype(jnp.int32)
  x = bits.astype(dtype)
  flipped = x.at[3, 7].set((1 - bits[3, 7]).astype(dtype))
  different = {'itself': x, 'one number': flipped, 'a shift': jnp.roll(x, 1), 'rows swapped': x[::-1],
               'zeros': jnp.zeros_like(x), 'less': x[:, :9]}
  sums = {name: int(trees.checksum(y)) for name, y in different.items()}
  assert len(set(sums.values())) == len(sums), sums


def test_a_checksum_sees_bits_not_values():
  assert trees.checksum(jnp.float32([0.0])) != trees.checksum(jnp.float32([-0.0]))
  nan = jax.lax.bitcast_convert_type(jnp.uint32([0x7FC00000, 0x7FC00001]), jnp.float32)
  assert trees.checksum(nan[:1]) != trees.checksum(nan[1:])
  # A swap of two numbers that differ only in sign, which odd linear weights would miss.
  assert trees.checksum(jnp.float32([1, -1])) != trees.checksum(jnp.float32([-1, 1]))


def test_every_single_bit_counts():
  base, whole = jnp.arange(8, dtype=jnp.uint32), jax.jit(trees.checksum)
  sums = {int(whole(base.at[i].set(base[i] ^ np.uint32(1 << bit)))) for i in range(8) for bit in range(32)}
  assert len(sums | {int(whole(base))}) == 8 * 32 + 1


def test_a_checksum_is_the_same_on_any_number_of_devices():
  x = jax.random.normal(jax.random.key(0), (16, 24))
  one = int(trees.checksum(x))
  for spec in (PartitionSpec('fsdp'), PartitionSpec(None, 'fsdp'), PartitionSpec('tensor', 'fsdp')):
    mesh = sharding.Layout(data=1, fsdp=4, tensor=2).mesh()
    assert int(jax.jit(trees.checksum)(jax.device_put(x, NamedSharding(mesh, spec)))) == one
  assert int(jax.vmap(trees.checksum)(x[None])[0]) == one


def test_a_checksum_of_what_has_no_bits_to_show_is_refused():
  with pytest.raises(ValueError, match='complex64'):
    trees.checksum(jnp.zeros(2, jnp.complex64))


def test_sizes():
  assert trees.count(weights()) == 32 + LAYERS * 36
  assert trees.nbytes(weights()) == 4 * trees.count(weights())


def test_places_of_a_tree_are_read_and_replaced_without_copies():
  tree = {'blocks': {'mlp': {'up': np.ones(3)}}, 'norm': np.zeros(2)}
  assert trees.at(tree, 'blocks/mlp/up') is tree['blocks']['mlp']['up']
  assert trees.at(tree, 'blocks/mlp/up/a') is None
  assert trees.at(tree, 'blocks/attention') is None
  changed = trees.replaced(tree, {'blocks/mlp/up': 5, 'blocks/attention/q': 7})
  assert trees.flat(changed) == {'blocks/attention/q': 7, 'blocks/mlp/up': 5, 'norm': tree['norm']}
  assert changed['norm'] is tree['norm']
  assert 'attention' not in tree['blocks'], 'the tree itself stays'
