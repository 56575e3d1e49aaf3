"""The encoders and encoder-decoders that laws are tried on, with the decoders' laws' own helpers."""
import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmlib.kernels.attention import Pattern
from lmlib.models import encoder, encoder_decoder, protocol
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.block import Norms
from lmlib.nn.mlp import MlpStyle
from lmlib.nn.positions import Learned
from lmlib.nn.relative_bias import Buckets

SIZES = dict(vocab=61, layers=2, width=24, hidden=40, heads=3, head_width=8, length=32)
BERT = encoder.Config(**SIZES, ends=encoder.Ends(pooler=True))
ENCODERS = {  # the second has every switch the other way
    'bert': BERT,
    'pre-norm': dataclasses.replace(
        BERT, positions=Learned(2), norms=Norms('rms'), ends=encoder.Ends(types=None, norm=False, final_norm=True),
        attention=AttentionStyle(patterns=(Pattern(causal=False, window=20), Pattern(causal=False)))),
}
# Buckets so few that distances of these short rows share some.
T5 = encoder_decoder.Config(**SIZES, encoder_layers=3, positions=Buckets(8, 12))
ENCODER_DECODERS = {
    't5 1.1': T5,
    't5 1.0': dataclasses.replace(
        T5, mlp=MlpStyle('relu', gated=False), ends=encoder_decoder.Ends(True, 24**-0.5), norms=Norms('layer'),
        attention=AttentionStyle('qkvo', 'head', (Pattern(softcap=20.0),))),
}
SHORT, LONG, BOTH = 5, 7, 12  # lengths of two texts, and of a row that holds both: few shapes, so that few compile


@functools.cache
def made(config):
  """Weights drawn by numpy, so that nothing compiles; scales off 1 and biases off 0: no law holds by accident."""
  draw, unscaled = np.random.default_rng(0), config.attention.patterns[0].scale == 1.0

  def leaf(path, shape):
    numbers = draw.normal(size=shape.shape).astype(np.float32)
    name = path[-1].key
    size = 0.2 * (config.head_width**-0.5 if name == 'q' and unscaled else 1)  # 1 / sqrt(D) is 0.2
    return jnp.asarray(1 + 0.2 * numbers if name == 'scale' else size * numbers)

  return jax.tree_util.tree_map_with_path(leaf, nn.unbox(protocol.boxed(config)))


def executed(config, **changes):
  """The same model, run another way."""
  return dataclasses.replace(config, execution=dataclasses.replace(config.execution, **changes))


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, *args):
  return config.model().apply({'params': params}, *args)


def padded(rows, width: int, *, left: bool):
  """Rows of different lengths and where they are: tokens_BT with junk for padding, segments_BT."""
  tokens_BT, segments_BT = jnp.full((len(rows), width), 7), jnp.zeros((len(rows), width), jnp.int32)
  for b, row in enumerate(rows):
    here = slice(width - len(row), width) if left else slice(0, len(row))
    tokens_BT, segments_BT = tokens_BT.at[b, here].set(row), segments_BT.at[b, here].set(1)
  return tokens_BT, segments_BT
