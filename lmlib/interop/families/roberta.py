"""RoBERTa (Liu et al. 2019), as `RobertaForMaskedLM` publishes it, and XLM-RoBERTa; BERT's form with other ends.

Of `RobertaForSequenceClassification` the first layer of the classifier is what BERT calls its pooler.
"""
import numpy as np

from lmlib.interop.families import bert
from lmlib.interop.family import PROBE, Entry, Family, Said
from lmlib.models import encoder
from lmlib.nn.positions import Learned

HEADS = {'ForMaskedLM': (True, False), 'Model': (False, True)}
CLASSIFIER = 'ForSequenceClassification'
KINDS = ('Roberta', 'XLMRoberta')


def read(said: Said) -> encoder.Config:
  """Our config of a config.json."""
  known = [[kind + name] for kind in KINDS for name in (*HEADS, CLASSIFIER)]
  name = said.only('architectures', *known, default=known[0])[0]
  offset = said.get('pad_token_id', 1) + 1
  return bert.config(said, bert.ends(said, HEADS.get(name.rpartition('Roberta')[2]), 'lm_head.'),
                     said['max_position_embeddings'] - offset, positions=Learned(offset))


def write(config: encoder.Config) -> dict:
  """The config.json of our config; its architecture is RoBERTa's in either case."""
  name = 'RobertaForMaskedLM' if config.ends.predicts else 'RobertaModel'
  name = f'Roberta{CLASSIFIER}' if config.ends.classes else name
  if config.positions.offset < 1:
    raise ValueError(f'Learned.offset={config.positions.offset}: positions of RoBERTa come after that of its padding')
  return {'architectures': [name], 'pad_token_id': config.positions.offset - 1,
          **bert.written(config, config.length + config.positions.offset)}


def tensors(config: encoder.Config) -> dict[str, Entry]:
  """The table of weights."""
  if config.ends.classes:
    found, head = bert.body(config, 'roberta.'), 'classifier.'
    first = {f'{head}dense.{part}': found.pop(f'roberta.pooler.dense.{part}') for part in ('weight', 'bias')}
    return found | first | {f'{head}out_proj.weight': Entry('Y F', {'classifier': ''}),
                            f'{head}out_proj.bias': Entry('Y', {'classifier_bias': ''})}
  if not config.ends.predicts:
    return bert.body(config, '')
  return bert.body(config, 'roberta.') | {
      'lm_head.dense.weight': Entry('F D', {'transform': ''}), 'lm_head.dense.bias': Entry('F', {'transform_bias': ''}),
      **bert.norm('lm_head.layer_norm', 'transform_norm'), 'lm_head.bias': Entry('V', {'output_bias': ''})}


def probe(config: encoder.Config) -> tuple[tuple, dict]:
  """Tokens without that of padding, from which transformers counts positions."""
  shape, padding = (2, min(config.length, PROBE)), config.positions.offset - 1
  tokens_BT = np.random.default_rng(0).integers(0, config.vocab - 1, shape, np.int32)
  tokens_BT += tokens_BT >= padding
  return (tokens_BT,), {'input_ids': tokens_BT}


ROBERTA = Family(
    model_types=('roberta', 'xlm-roberta'), architectures=('RobertaForMaskedLM', 'XLMRobertaForMaskedLM'), read=read,
    write=write, tensors=tensors, prefixes=('roberta.',),
    ignored={r'(roberta\.)?embeddings\.position_ids': 'they count from the padding on',
             r'(roberta\.)?pooler\.dense\.(weight|bias)': 'a classifier has a layer of its own in its place'},
    copies={'lm_head.decoder.weight': 'roberta.embeddings.word_embeddings.weight',
            'lm_head.decoder.bias': 'lm_head.bias'},
    probe=probe)
