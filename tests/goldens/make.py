"""Writes published.npz: logits and gradients of tests/parity/cases.py, computed by transformers and torch.

  python -m tests.goldens.make

Needs torch and transformers; tests/parity repeats the comparison without them.
"""
import json
import pathlib

import numpy as np

from tests.parity import transformers_side
from tests.parity.cases import CASES, projection


def main():
  kept = {}
  for name, case in CASES.items():
    _, logits_BTV, gradients = transformers_side.computed(case)
    kept[f'{name}/logits_BTV'] = logits_BTV
    kept[f'{name}/gradients'] = np.array(json.dumps({tensor: projection(tensor, g) for tensor, g in gradients.items()}))
  np.savez_compressed(pathlib.Path(__file__).parent / 'published.npz', **kept)


if __name__ == '__main__':
  main()
