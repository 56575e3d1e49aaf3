"""Supervised fine-tuning: every weight of a model, or an adapter beside them (nn/adapters.py), on the same batches.

The loss is train/losses.NextToken, whose weights are 1 where a batch says that a target is to be learned: the answers
of conversations (data/conversations.py), or all of a text (data/continuation.py). What differs is what is trained.
"""
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import optax

from lmlib import fitting, sharding, trees
from lmlib.models import protocol
from lmlib.nn import adapters, matrices
from lmlib.optim.state import state_bytes
from lmlib.train import step as step_of


@dataclasses.dataclass(frozen=True)
class Tuning:
  """A model of which `adapter`, a method of nn/adapters.py, is trained; None: all weights.

  held(base) are the weights that it starts from, of a model's: with four_bits the matrices of its blocks in 4 bits
  (QLoRA, Dettmers et al. 2023), which are made whole where they are used. frozen(base) is what a step is given after
  its batch.
  """
  config: protocol.Config
  adapter: Any = None
  four_bits: bool = False

  def __post_init__(self):
    if self.four_bits and self.adapter is None:
      raise ValueError('four_bits=True holds weights that are not trained, and adapter=None trains all of them')

  def held(self, base):
    """The weights as they are held while others are trained."""
    return matrices.quantised(protocol.boxed(self.config), base) if self.four_bits else base

  def boxed(self):
    """Shapes and letters of what is trained. ValueError for an adapter of parts that the model does not have."""
    whole = protocol.boxed(self.config)
    return whole if self.adapter is None else adapters.boxed(self.adapter, whole)

  def letters(self):
    return sharding.letters(self.boxed())

  def shapes(self, optimizer: optax.GradientTransformation) -> step_of.State:
    """The State of a run, of what is trained alone: shapes, types and where every array is stored.

    ValueError if the layout in use does not fit the model.
    """
    fitting.check(protocol.boxed(self.config))
    return step_of.shapes_of(self.boxed(), optimizer)

  def state(self, base, optimizer: optax.GradientTransformation, key: jax.Array, tree=None) -> step_of.State:
    """The State at first. The model that it makes is `base`, but for prompts, which are read from the start.

    tree: of an adapter that was trained before; None: a new one.
    """
    if tree is not None:
      small = jax.tree.map(jax.numpy.asarray, tree)
    elif self.adapter is None:
      small = jax.tree.map(lambda x: x.copy(), base)  # the steps reuse the memory of the state
    else:
      small = jax.jit(lambda base, key: adapters.new(self.adapter, protocol.boxed(self.config), base, key))(base, key)
    return step_of.begun(small, optimizer, self.shapes(optimizer))

  def frozen(self, base) -> tuple:
    return () if self.adapter is None else (base,)

  def loss(self, loss):
    """loss(trained, batch, *frozen) of a loss with of(config): only what is trained is differentiated.

    Metrics: those of the loss, and 'read', how many tokens are read for each that is learned.
    """
    whole = loss.of(self.config)

    def counted(params, batch):
      total, weight, metrics = whole(params, batch)
      return total, weight, metrics | {'read': (batch['segments_BT'] > 0).sum()}

    return counted if self.adapter is None else adapters.loss_of(self.config, self.adapter, counted)

  def params(self, trained, *frozen):
    """The weights that generation and evaluation take, of what is trained and frozen(base)."""
    if self.adapter is None:
      return trained
    return adapters.attach(self.config, *frozen, adapters.Adapter(trained, self.adapter))

  def facts(self, optimizer, steps: int, rows: int) -> dict:
    """Weights that are trained and bytes of their optimizer's state, beside those of training all of the model.

    And what the layout in use does with them, as step.told() says it of microbatches of so many rows.
    """
    whole = Tuning(self.config)
    state = lambda tuning: state_bytes(optimizer.transformation(tuning.letters(), steps), nn.unbox(tuning.boxed()))
    return {'parameters': trees.count(whole.boxed()), 'trained': trees.count(self.boxed()),
            'optimizer_bytes': state(self), 'optimizer_bytes_of_all': state(whole),
            'layout': step_of.told(whole.boxed(), rows)}
