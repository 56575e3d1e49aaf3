"""Writes encoders.npz: logits and gradients of tests/parity/encoder_cases.py, computed by transformers and torch.

  python -m tests.goldens.make_encoders
"""
import json
import pathlib

import numpy as np

from tests.parity import encoder_side
from tests.parity.cases import projection
from tests.parity.encoder_cases import CASES


def main():
  kept = {}
  for name, case in CASES.items():
    _, logits_BTV, gradients = encoder_side.computed(case)
    kept[f'{name}/logits_BTV'] = logits_BTV
    kept[f'{name}/gradients'] = np.array(json.dumps({tensor: projection(tensor, g) for tensor, g in gradients.items()}))
  np.savez_compressed(pathlib.Path(__file__).parent / 'encoders.npz', **kept)


if __name__ == '__main__':
  main()
