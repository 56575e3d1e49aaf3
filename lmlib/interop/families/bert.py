"""BERT (Devlin et al. 2019), as transformers' `BertForMaskedLM`, `BertModel`, `BertForPreTraining` and
`BertForSequenceClassification` publish it.

Which of its heads a folder has is seen from its tensors, and without any from the architecture in config.json:
BertModel has the pooler and no scores, BertForMaskedLM the scores and no pooler, BertForPreTraining both, and
next-sentence prediction, which is left out. BertForSequenceClassification has the pooler and scores of classes, as
many as config.json has names for in id2label, or two.
"""
from lmlib.interop.family import Entry, Family, Said
from lmlib.models import encoder
from lmlib.nn.block import Norms
from lmlib.nn.mlp import MlpStyle

# Of a published activation, its name here.
ACTIVATIONS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'relu': 'relu',
               'silu': 'silu'}
CLASSIFIER = 'BertForSequenceClassification'
HEADS = {'BertForMaskedLM': (True, False), 'BertModel': (False, True), 'BertForPreTraining': (True, True)}
DEEPEST = 64  # layers whose norms may have the names of old files


def read(said: Said) -> encoder.Config:
  """Our config of a config.json."""
  known = [[name] for name in (*HEADS, CLASSIFIER)]
  name = said.only('architectures', *known, default=['BertForMaskedLM'])[0]
  said.only('position_embedding_type', 'absolute', default='absolute')
  return config(said, ends(said, HEADS.get(name), 'cls.predictions.'))


def ends(said: Said, has: tuple[bool, bool] | None, predictions: str) -> encoder.Ends:
  """What stands at the ends of a model: `has` by its architecture, None of a classifier; files tell more exactly."""
  types = said.get('type_vocab_size', 2)
  if has is None:
    return encoder.Ends(types=types, predicts=False, pooler=True, classes=classes(said))
  predicts, pooler = has if said.tensors is None else heads(said.tensors, predictions)
  return encoder.Ends(types=types, predicts=predicts, pooler=pooler)


def classes(said: Said) -> int:
  """How many classes a classifier has: the names in id2label, num_labels in old files, or two."""
  names, number = said.get('id2label'), said.get('num_labels')
  if names is not None and number not in (None, len(names)):
    raise ValueError(f'config.json says num_labels={number}, and names {len(names)} in id2label')
  return len(names) if names is not None else number or 2


def labelled(config: encoder.Config) -> dict:
  """What a config.json says of classes, numbered where they have no names here."""
  names = [f'LABEL_{i}' for i in range(config.ends.classes or 0)]
  return {'id2label': {str(i): name for i, name in enumerate(names)},
          'label2id': {name: i for i, name in enumerate(names)}} if names else {}


def heads(names, predictions: str) -> tuple[bool, bool]:
  """Whether tensors of these names score tokens, and whether they have a pooler."""
  pooler = any(name.endswith('pooler.dense.weight') for name in names)
  return any(name.startswith(predictions) for name in names), pooler


def config(said: Said, ends: encoder.Ends, length: int | None = None, **more) -> encoder.Config:
  """What a config.json of BERT's form says beside the ends of the model."""
  width, heads = said['hidden_size'], said['num_attention_heads']
  if width % heads:
    raise ValueError(f'config.json says hidden_size={width}, which is not a multiple of num_attention_heads={heads}')
  for switch in ('is_decoder', 'add_cross_attention'):
    said.only(switch, False, default=False)
  said.only('tie_word_embeddings', True, default=True)
  return encoder.Config(
      vocab=said['vocab_size'], layers=said['num_hidden_layers'], width=width, hidden=said['intermediate_size'],
      heads=heads, head_width=width // heads, length=length or said['max_position_embeddings'],
      mlp=MlpStyle(ACTIVATIONS[said.only('hidden_act', *ACTIVATIONS, default='gelu')], gated=False, bias=True),
      norms=Norms('layer', epsilon=said.get('layer_norm_eps', 1e-12), place='post'), ends=ends, **more)


def write(config: encoder.Config) -> dict:
  """The config.json of our config."""
  has = {has: name for name, has in HEADS.items()} | {(False, False): 'BertModel'}
  name = CLASSIFIER if config.ends.classes else has[config.ends.predicts, config.ends.pooler]
  return {'architectures': [name], **written(config, config.length)}


def written(config: encoder.Config, rows: int) -> dict:
  """What a config.json of BERT's form says beside its architecture; rows: of the table of positions."""
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  return {
      'vocab_size': config.vocab, 'num_hidden_layers': config.layers, 'hidden_size': config.width,
      'intermediate_size': config.hidden, 'num_attention_heads': config.heads, 'max_position_embeddings': rows,
      'type_vocab_size': config.ends.types, 'hidden_act': names[config.mlp.activation],
      'layer_norm_eps': config.norms.epsilon, 'tie_word_embeddings': True, **labelled(config)}


def body(config: encoder.Config, prefix: str) -> dict[str, Entry]:
  """The table of what all encoders of BERT's form have."""
  embeddings, layer = f'{prefix}embeddings.', f'{prefix}encoder.layer.{{L}}.'
  found = {
      f'{embeddings}word_embeddings.weight': Entry('V D', {'embedding': ''}),
      f'{embeddings}position_embeddings.weight': Entry('S D', {'position_table': ''}),
      f'{embeddings}token_type_embeddings.weight': Entry('U D', {'type_table': ''}),
      **norm(f'{embeddings}LayerNorm', 'embedding_norm')}
  for theirs, ours, axes in (('query', 'q', 'KGH'), ('key', 'k', 'KH'), ('value', 'v', 'KH')):
    found |= {f'{layer}attention.self.{theirs}.weight': Entry(f'{axes} D', {f'blocks/attention/{ours}': ''}),
              f'{layer}attention.self.{theirs}.bias': Entry(axes, {f'blocks/attention/{ours}_bias': ''})}
  for theirs, ours, axes in (('attention.output.dense', 'attention/out', 'D KGH'),
                             ('intermediate.dense', 'mlp/up', 'F D'), ('output.dense', 'mlp/down', 'D F')):
    found |= {f'{layer}{theirs}.weight': Entry(axes, {f'blocks/{ours}': ''}),
              f'{layer}{theirs}.bias': Entry(axes.split()[0], {f'blocks/{ours}_bias': ''})}
  found |= norm(f'{layer}attention.output.LayerNorm', 'blocks/attention_norm')
  found |= norm(f'{layer}output.LayerNorm', 'blocks/mlp_norm')
  if config.ends.pooler:
    found |= {f'{prefix}pooler.dense.weight': Entry('F D', {'pooler': ''}),
              f'{prefix}pooler.dense.bias': Entry('F', {'pooler_bias': ''})}
  return found


def norm(theirs: str, ours: str) -> dict[str, Entry]:
  """Scale and bias of a LayerNorm."""
  return {f'{theirs}.weight': Entry('D', {f'{ours}/scale': ''}), f'{theirs}.bias': Entry('D', {f'{ours}/bias': ''})}


def tensors(config: encoder.Config) -> dict[str, Entry]:
  """The table of weights; the names begin with 'bert.' where there is a head beside the pooler."""
  if config.ends.classes:
    return body(config, 'bert.') | {'classifier.weight': Entry('Y F', {'classifier': ''}),
                                    'classifier.bias': Entry('Y', {'classifier_bias': ''})}
  if not config.ends.predicts:
    return body(config, '')
  head = 'cls.predictions.'
  return body(config, 'bert.') | {
      f'{head}transform.dense.weight': Entry('F D', {'transform': ''}),
      f'{head}transform.dense.bias': Entry('F', {'transform_bias': ''}),
      **norm(f'{head}transform.LayerNorm', 'transform_norm'), f'{head}bias': Entry('V', {'output_bias': ''})}


def old_names() -> dict[str, str]:
  """Norms that files of 2019 call gamma and beta, by those names."""
  norms = ['bert.embeddings.LayerNorm', 'cls.predictions.transform.LayerNorm']
  norms += [f'bert.encoder.layer.{i}.{place}.LayerNorm' for i in range(DEEPEST)
            for place in ('attention.output', 'output')]
  both = {f'{name}.{old}': f'{name}.{new}' for name in norms for old, new in (('gamma', 'weight'), ('beta', 'bias'))}
  return both | {old.removeprefix('bert.'): new.removeprefix('bert.') for old, new in both.items()}


BERT = Family(
    model_types=('bert',), architectures=('BertForMaskedLM',), read=read, write=write, tensors=tensors,
    prefixes=('bert.',),
    ignored={r'(bert\.)?embeddings\.position_ids': 'they count from 0',
             r'cls\.seq_relationship\..*': 'next-sentence prediction: no head here has it'},
    copies={'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
            'cls.predictions.decoder.bias': 'cls.predictions.bias', **old_names()})
