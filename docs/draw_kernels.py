"""Draws the three figures of docs/kernels.md from what the kernels compute: python docs/draw_kernels.py"""
import pathlib

import jax.numpy as jnp
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, Rectangle
import numpy as np

from lmlib.kernels import attention, attention_ranges
from lmlib.kernels.attention import Pattern, Rows

FOLDER = pathlib.Path(__file__).parent / 'pictures'
NONE, SOME, ALL, SEEN = '#f2f2f2', '#ffd58a', '#8fc1a3', '#404040'
T, BLOCK = 48, 4
DOCUMENTS = np.repeat([1, 2, 3], [20, 8, 20])[None]


def of_blocks(pattern: Pattern, rows: Rows) -> np.ndarray:
  """0, 1 and 2 of blocks that are left out, masked and seen whole, IJ."""
  place_BT = jnp.arange(T)[None]
  whole = rows.replace(place_BT=place_BT, place_BS=place_BT)
  some, every = attention_ranges.met(pattern, whole, BLOCK, BLOCK)
  return np.asarray(some[0].astype(int) + every[0])


def tiles():
  """Which blocks a mask empties, fills or cuts."""
  cases = {'causal': (Pattern(), Rows()), 'a window of 10': (Pattern(window=10), Rows()),
           'three packed documents': (Pattern(), Rows(segment_BT=jnp.asarray(DOCUMENTS)))}
  figure, axes = plt.subplots(1, 3, figsize=(10, 3.9))
  for axis, (name, (pattern, rows)) in zip(axes, cases.items()):
    kinds = of_blocks(pattern, rows)
    axis.imshow(kinds, cmap=ListedColormap([NONE, SOME, ALL]), vmin=0, vmax=2, extent=(0, T, T, 0))
    seen_TS = np.asarray(attention.mask(T, T, pattern, rows)[0])
    place_T, place_S = np.nonzero(seen_TS)
    axis.scatter(place_S + 0.5, place_T + 0.5, s=1.2, color=SEEN, linewidths=0)
    axis.set_xticks(range(0, T + 1, 3 * BLOCK))
    axis.set_yticks(range(0, T + 1, 3 * BLOCK))
    axis.set_title(f'{name}: {(kinds == 0).mean():.0%} left out')
    axis.set_xlabel('key s')
  axes[0].set_ylabel('query t')
  colours = [Rectangle((0, 0), 1, 1, color=colour) for colour in (NONE, SOME, ALL)]
  figure.legend(colours, ['left out', 'masked', 'whole, no mask made'], loc='lower center', ncols=3, frameon=False)
  figure.tight_layout(rect=(0, 0.07, 1, 1))
  save(figure, 'attention_tiles')


def online_softmax():
  """m, l and the output of one row while blocks of keys pass by."""
  random = np.random.default_rng(5)
  score_S, value_S = random.normal(size=T) * 2, random.normal(size=T)
  most, total, weighted, lines = -np.inf, 0.0, 0.0, []
  for start in range(0, T, BLOCK):
    score, value = score_S[start:start + BLOCK], value_S[start:start + BLOCK]
    more = max(most, score.max())
    shrink = np.exp(most - more)
    prob = np.exp(score - more)
    most, total, weighted = more, total * shrink + prob.sum(), weighted * shrink + prob @ value
    lines.append((most, shrink, total, weighted / total))
  most_J, shrink_J, total_J, out_J = np.array(lines).T
  block_J = np.arange(len(lines)) + 1
  exact = np.exp(score_S - score_S.max()) @ value_S / np.exp(score_S - score_S.max()).sum()
  figure, axes = plt.subplots(1, 3, figsize=(10, 3.1))
  axes[0].scatter(np.arange(T) / BLOCK + 0.5 + 0.5 / BLOCK, score_S, s=8, color='#999999', label='scores')
  axes[0].step(block_J, most_J, where='mid', color='#c44e52', label='m, the greatest so far')
  axes[1].plot(block_J, total_J, marker='o', markersize=3, color='#4c72b0', label='l, sum of exp(score - m)')
  grown = shrink_J[1:] < 1
  axes[1].scatter(block_J[1:][grown], total_J[1:][grown], s=60, facecolors='none', edgecolors='#c44e52',
                  label='m grew: l and acc made smaller')
  axes[2].plot(block_J, out_J, marker='o', markersize=3, color='#55a868', label='acc / l')
  axes[2].axhline(exact, color='#404040', linewidth=0.8, linestyle='--', label='softmax over all keys')
  for axis in axes:
    axis.set_xlabel('blocks of keys so far')
    axis.set_xticks(block_J[1::2])
    axis.legend(frameon=False, fontsize=8)
  axes[1].set_ylim(0, total_J.max() * 1.35)
  figure.tight_layout()
  save(figure, 'online_softmax')


def backward():
  """Two walks over the same tiles: down the columns for dk and dv, along the rows for dq."""
  kinds = of_blocks(Pattern(), Rows())[:6, :6]
  size = len(kinds)
  figure, axes = plt.subplots(1, 2, figsize=(8.4, 4.7))
  titles = ("a tile of keys stays:  dv += p' dout,  dk += dscore' q", 'a tile of queries stays:  dq += dscore k')
  for axis, title, down in zip(axes, titles, (True, False)):
    axis.imshow(kinds, cmap=ListedColormap([NONE, SOME, ALL]), vmin=0, vmax=2, extent=(0, size, size, 0))
    for here in range(size):
      first, last = (here + 0.2, size - 0.2) if down else (0.2, here + 0.8)
      ends = ((here + 0.5, first), (here + 0.5, last)) if down else ((first, here + 0.5), (last, here + 0.5))
      axis.add_patch(FancyArrowPatch(*ends, arrowstyle='-|>', mutation_scale=11, color=SEEN, linewidth=1.2))
    axis.set_title(title, fontsize=9)
    axis.set_xlabel('block of keys')
    axis.set_ylabel('block of queries')
    axis.set_xticks(range(size + 1))
    axis.set_yticks(range(size + 1))
  figure.suptitle("every tile is made twice:  p = exp(score - lse),  dscore = p (dout v' - delta)", fontsize=10)
  figure.tight_layout()
  save(figure, 'attention_backward')


def save(figure, name: str):
  figure.savefig(FOLDER / f'{name}.png', dpi=110, metadata={'Software': None})
  plt.close(figure)


if __name__ == '__main__':
  FOLDER.mkdir(exist_ok=True)
  for draw in (tiles, online_softmax, backward):
    draw()
