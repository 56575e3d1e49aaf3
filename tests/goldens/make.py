"""Writes dense_llama.npz: weights and logits of tiny random models, computed by transformers and torch.

  python -m tests.goldens.make

Needs torch and transformers; tests/parity repeats the comparison without them.
"""
import pathlib

import numpy as np

from tests.parity import llama


def main():
  kept = {}
  for seed, (name, config) in enumerate(llama.CONFIGS.items()):
    state, logits_BTV = llama.reference(config, seed)
    kept |= {f'{name}/{key}': value for key, value in state.items()} | {f'{name}/logits_BTV': logits_BTV}
  np.savez_compressed(pathlib.Path(__file__).parent / 'dense_llama.npz', **kept)


if __name__ == '__main__':
  main()
