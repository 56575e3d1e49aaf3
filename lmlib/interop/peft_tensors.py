"""The tensors of adapters in PEFT's form, from the tables that a family has of its weights.

  base_model.model.<module>.lora_A.weight            rank x in     ours: a, in x rank
  base_model.model.<module>.lora_B.weight            out x rank    b, rank x out
  base_model.model.<module>.lora_magnitude_vector    out           scale (DoRA)
  base_model.model.<module>.ia3_l                    out x 1, or 1 x in

Where several of our matrices follow one another in one of theirs, as queries, keys and values do in GPT-2's, they
share lora_A and have a part of lora_B each.
"""
import dataclasses

import numpy as np

from lmlib.interop.family import Family, Place, Tensor, tensors
from lmlib.models import protocol
from lmlib.nn import matrices

FRONT = 'base_model.model.'


@dataclasses.dataclass(frozen=True)
class Module:
  """A linear layer of theirs: its name, and the tensor of its weight."""
  name: str
  weight: Tensor

  @property
  def paths(self) -> tuple[str, ...]:
    return tuple(place.path for place in self.weight.places)

  @property
  def layer(self) -> int:
    return self.weight.places[0].index[0]

  @property
  def transposed(self) -> bool:
    """Whether the weight is stored as in x out (Conv1D), not out x in."""
    return self._side(1) == 'outs'

  def _side(self, dim: int) -> str:
    """Which side of our matrix an axis of theirs is."""
    place = self.weight.places[0]
    _, ins, outs = matrices.sides(place.letters)
    letters = self.weight.dims[dim].replace('+', place.inner)
    if sorted(letters) == sorted(ins) and '+' not in self.weight.dims[dim]:
      return 'ins'
    if sorted(letters) == sorted(outs):
      return 'outs'
    raise ValueError(f'{self.name}: {self.weight.dims} of {place.letters} is no linear layer that an adapter of PEFT '
                     'can be written for')

  def _dims(self) -> tuple[str, str]:
    """Their axes of outputs and of inputs."""
    first, second = self.weight.dims
    return (second, first) if self.transposed else (first, second)

  def _tensor(self, suffix: str, dims: tuple[str, ...], part: str, letters, rank: int = 0) -> Tensor:
    """The tensor `suffix`, whose places are the arrays `part` beside ours; letters: of each from (ins, outs)."""
    places = []
    for place in self.weight.places:
      _, ins, outs = matrices.sides(place.letters)
      sizes, these = dict(zip(place.letters, place.shape)) | {'A': rank}, letters(ins, outs)
      inner = place.inner if '+' in ''.join(dims) else ''
      places.append(Place(f'{place.path}/{part}', place.index, these, inner, tuple(sizes[a] for a in these)))
    return Tensor(f'{FRONT}{self.name}.{suffix}', dims, tuple(places))

  def lora_a(self, rank: int) -> Tensor:
    """lora_A of one of our matrices; where several share it, of any."""
    found = self._tensor('lora_A.weight', ('A', self._dims()[1]), 'a', lambda ins, outs: f'{ins}A', rank)
    return dataclasses.replace(found, places=found.places[:1])

  def lora_b(self, rank: int) -> Tensor:
    return self._tensor('lora_B.weight', (self._dims()[0], 'A'), 'b', lambda ins, outs: f'A{outs}', rank)

  def magnitude(self) -> Tensor:
    return self._tensor('lora_magnitude_vector', self._dims()[:1], 'scale', lambda ins, outs: outs)

  def ia3(self, of_inputs: bool) -> Tensor:
    dims = ('1', self._dims()[1]) if of_inputs else (self._dims()[0], '1')
    return self._tensor('ia3_l', dims, 'scale', lambda ins, outs: ins if of_inputs else outs)


def modules(family: Family, config: protocol.Config, boxed) -> dict[str, Module]:
  """The linear layers of a model that an adapter can be for, by their names."""
  known = matrices.matrices(boxed)
  return {module.name: module for module in (Module(name.removesuffix('.weight'), tensor)
                                             for name, tensor in tensors(family, config).items())
          if all(path in known for path in module.paths)}


def split(tensor: Tensor, theirs: np.ndarray):
  """(path, layer, our array) of every part of a tensor of theirs."""
  for place, part in zip(tensor.places, tensor.split(theirs)):
    yield place.path, place.index[0], part
