"""What a weight is to an optimizer, read from its name and its axis letters.

  matrix     multiplies activations: 'LDF', 'LDKGH', 'LEFD'
  embedding  has the vocabulary as an axis: 'VD', and so the untied output matrix 'DV' as well; or positions, 'SD', or
             kinds of tokens, 'UD'
  vector     scales or shifts: named scale or bias, or one letter long: 'LD', 'LEF'
  balance    a router's offsets, named balance_bias: its gradient is an error of load, not the slope of a loss

Layers and experts in front (L, E) stack weights and never count; the E of a router, 'LDE', does.
"""
import jax
import optax

KINDS = ('matrix', 'embedding', 'vector', 'balance')
BALANCE = 'balance_bias'


def stacked(axes: str) -> int:
  """How many axes in front only stack weights: 1 for 'LDF', 2 for 'LEDF', 0 for 'DF'."""
  return len(axes) - len(axes.lstrip('LE'))


def kind(name: str, axes: str) -> str:
  """One of KINDS, from a weight's own name, such as 'up', and its axis letters."""
  if name == BALANCE:
    return 'balance'
  if name in ('scale', 'bias') or name.endswith(('_scale', '_bias')) or len(axes) - stacked(axes) <= 1:
    return 'vector'
  return 'embedding' if set(axes) & set('VSU') else 'matrix'


def kinds(letters):
  """The kind of every weight, in a tree like `letters`, which holds the axis letters ('LDF')."""
  return jax.tree.map_with_path(lambda path, axes: kind(_name(path), axes), letters)


def descended(weights):
  """The weights, or a tree like them, without those that follow no slope: what the norm of a gradient is of."""
  return jax.tree.map_with_path(lambda path, x: optax.MaskedNode() if _name(path) == BALANCE else x, weights)


def _name(path) -> str:
  return str(getattr(path[-1], 'key', path[-1])) if path else ''


def fans(axes: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The axes of a matrix that its product sums over, and those it makes: ((1,), (2, 3)) for 'LDKH'.

  D in front reads the residual stream, Q and R read a latent, A what an adapter made small; D at the end writes to the
  stream, A makes small; all other axes, but the stacked ones, are the other side. Without one of these at an end a
  matrix of two axes maps the first to the second.
  Raises ValueError for any other letters.
  """
  where = tuple(range(stacked(axes), len(axes)))
  if axes[where[0]] in 'DQRA' or len(where) == 2:
    return where[:1], where[1:]
  if axes.endswith(('D', 'A')):
    return where[:-1], where[-1:]
  raise ValueError(f'weight axes {axes!r}: D or A at neither end, so fan-in and fan-out are unknown')
