"""What a row of training holds, for a terminal: where its documents come from, and its text with its mask.

What is not learned, since the place that would predict it has weight 0, is dim. Prefix, which earlier places see too,
is underlined. Special ids, and targets that are not the next token of the row, are in colour.
"""
import dataclasses
import itertools

import numpy as np

HEADING, DIM, UNDERLINED, COLOURED, PLAIN = '\x1b[1m', '\x1b[2m', '\x1b[4m', '\x1b[36m', '\x1b[0m'


def explain(batches, step: int, row: int, *, index: int | None = None, colours: bool = True) -> str:
  """Row `row` of step `step` of packing.Batches, as lines of text. ValueError if there is no such row.

  Steps count from 0, as in batch_at(); the text counts them from 1, as runs do. index: of the batch that the step
  read, where the run has left others out before it; None: its own.

  Without colours what is not learned stands in {braces}, and prefix in [brackets].
  """
  if not 0 <= row < batches.batch:
    raise ValueError(f'row={row} is none of the {batches.batch} of a step: give 0 to {batches.batch - 1}')
  here, index = slice(row, row + 1), step if index is None else index
  (k, number, pieces), = batches.pieces(index, here)
  batch = {name: values[0] for name, values in batches.batch_at(index, here).items()}
  names, store, mark = batches.stores.names, batches.stores.stores[k], Marks(batches, colours)
  rate = batches.stores.rate(index, k)
  share = f', {names[k]}: {100 * rate:.4g} % of the rows of this step' if len(names) > 1 else ''
  lines = [f'{mark.heading(f"row {row} of step {step + 1}")} is row {number} of {store.path}{share}']
  for n, piece in enumerate(pieces, 1):
    size = int(np.diff(store.offsets[piece.document:piece.document + 2])[0])
    lines.append(f'  {n}. {store.names[piece.document]}: tokens {piece.first} to {piece.stop} of {size}')
  weight_T, segments_T = batch['weight_BT'], batch['segments_BT']
  lines.append(f'  {batches.packing}, {type(batches.objective).__name__}: {(segments_T > 0).sum()} of '
               f'{len(segments_T)} places filled, {(weight_T > 0).sum()} targets')
  if 'inputs_BS' in batch:
    nothing = np.zeros_like(batch['inputs_BS'])
    lines += [mark.heading('encoder'), *mark.documents(batch['inputs_BS'], batch['input_segments_BS'], nothing, nothing,
                                                       nothing), mark.heading('decoder')]
  prefix_T = batch.get('prefix_BT', np.zeros_like(segments_T))
  in_place = getattr(batches.objective, 'in_place', False)
  return '\n'.join([*lines, *mark.documents(batch['tokens_BT'], segments_T, batch['targets_BT'], weight_T, prefix_T,
                                            in_place=in_place)])


@dataclasses.dataclass(frozen=True)
class Style:
  """How a token is shown."""
  learned: bool = True
  prefix: bool = False
  special: bool = False


class Marks:
  """Writes tokens as text of a tokeniser, each with its style."""

  def __init__(self, batches, colours: bool):
    self._tokenizer, self._colours = batches.stores.tokenizer, colours
    specials = getattr(batches.objective, 'specials', None)
    self._names = {i: name for name, i in (specials.ids if specials else {}).items()}
    self._names |= {self._tokenizer.bos: 'bos', self._tokenizer.eos: 'eos'}

  def heading(self, text: str) -> str:
    return f'{HEADING}{text}{PLAIN}' if self._colours else text

  def documents(self, tokens_T, segments_T, targets_T, weight_T, prefix_T, *, in_place: bool = False) -> list[str]:
    """The documents of a row, a heading and the text of each."""
    lines = []
    for n in range(1, int(segments_T.max(initial=0)) + 1):
      t = np.flatnonzero(segments_T == n)
      tokens, targets, weights, prefix = (x[t].tolist() for x in (tokens_T, targets_T, weight_T > 0, prefix_T > 0))
      learned, styled = weights if in_place else [False, *weights[:-1]], []
      for i, token in enumerate(tokens):
        styled.append((token, Style(learned[i], prefix[i], token in self._names)))
        if weights[i] and (in_place or i + 1 == len(tokens) or tokens[i + 1] != targets[i]):
          styled.append((None, targets[i]))
      lines += [self.heading(f'-- {n} --'), self._text(styled)]
    return lines

  def _text(self, styled) -> str:
    parts = []
    for style, run in itertools.groupby(styled, key=lambda pair: 'target' if pair[0] is None else pair[1]):
      if style == 'target':
        parts += [self._styled(f'\u2192{self._spelt(target)}', Style(special=True)) for _, target in run]
      elif style.special:
        parts += [self._styled(self._spelt(token), style) for token, _ in run]
      else:
        parts.append(self._styled(self._decoded([token for token, _ in run]), style))
    return ''.join(parts)

  def _spelt(self, token: int) -> str:
    return f'<{self._names[token]}>' if token in self._names else self._decoded([token])

  def _decoded(self, ids) -> str:
    """Text in which no sequence of the corpus can drive the terminal."""
    text = self._tokenizer.decode(ids)
    return ''.join(c if c.isprintable() or c in '\n\t' else repr(c)[1:-1] for c in text)

  def _styled(self, text: str, style: Style) -> str:
    if not self._colours:
      text = text if style.learned else f'{{{text}}}'
      return f'[{text}]' if style.prefix else text
    codes = DIM * (not style.learned) + UNDERLINED * style.prefix + COLOURED * style.special
    return f'{codes}{text}{PLAIN}' if codes else text
