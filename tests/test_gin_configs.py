"""Every gin file resolves, and what it says can be built; nothing is computed."""
import importlib
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from lmlib import cli, sharding, trees
from lmlib.data import objectives
from lmlib.data.prepare import Stored
from lmlib.models import protocol
from lmlib.train import step as step_of
from tests import test_meshes

ROOT = cli.GIN_CONFIGS
LEAVES = sorted(path.name for path in ROOT.glob('*.gin'))
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob('*.gin'))
MACROS = {'MODEL', 'DATA', 'OPTIMIZER', 'LAYOUT', 'STEPS', 'BATCH', 'WORKDIR', 'SEED'}
OWN = {'GLOB', 'FIELD', 'FOLDER', 'SPLIT', 'TASK', 'MODULE', 'PROMPTS', 'NEW', 'PATH', 'STEP', 'ROW', 'SOURCE',
       'TARGET', 'TASKS', 'TEMPLATE', 'SHOTS', 'RUN', 'IMAGE'}  # what to read or continue, which no file can know
GIVEN = ("GLOB = 'texts/*.txt'", "FOLDER = 'data/set'", "TASK = 'task'", "MODULE = 'my_tasks'",
         "PATH = 'data/prepared'", "TASKS = ('task',)", "SOURCE = 'published'",
         "TARGET = 'runs/taken'", "RUN = ('quickstart.gin',)", "IMAGE = 'registry/lmlib'")  # what a user must say
# Behind a leaf.
MESHES = ('meshes/fsdp.gin', 'meshes/context.gin', 'meshes/experts.gin', 'meshes/stages.gin')
OTHER_DATA = ('data/data_folder.gin', 'data/seqio_task.gin')
PODS = tuple(f'meshes/{name}.gin' for name in test_meshes.PODS)  # each for one number of devices
MODELS = sorted(path.stem for path in (ROOT / 'models').glob('*.gin'))
# Weights of each file of models/ as published; tied tables count once. Our own four are counted by hand, as is PaLM,
# whose paper says 540.35 billion: 256000 D + 118 (2 * 48 * 256 D + 2 * 256 D + 3 D F + D) + D.
PUBLISHED = {
    'dense_3m': 3_474_560, 'dense_124m': 124_275_456,
    'gpt2_124m': 124_439_808, 'gpt2_1558m': 1_557_611_200, 'gpt_neox_20b': 20_554_567_680,
    'pythia_1400m': 1_414_647_808, 'bloom_7b': 7_069_016_064, 'bloom_176b': 176_247_271_424,
    'palm_540b': 540_356_474_880, 'command_r_35b': 34_980_831_232, 'llama_7b': 6_738_415_616,
    'llama2_70b': 68_976_648_192, 'llama3_8b': 8_030_261_248, 'llama31_70b': 70_553_706_496,
    'llama31_405b': 405_853_388_800, 'smollm2_135m': 134_515_008, 'smollm2_1700m': 1_711_376_384,
    'mistral_7b': 7_241_732_096, 'qwen2_500m': 494_032_768, 'qwen25_7b': 7_615_616_512, 'qwen3_600m': 596_049_920,
    'qwen3_8b': 8_190_735_360, 'phi3_mini': 3_821_079_552, 'gemma2_2b': 2_614_341_888, 'gemma2_9b': 9_241_705_984,
    'gemma3_1b': 999_885_952, 'glm4_9b': 9_400_279_040, 'olmo2_7b': 7_298_617_344,
    'mixtral_8x7b': 46_702_792_704, 'mixtral_8x22b': 140_620_634_112, 'qwen3_30b_a3b': 30_532_122_624,
    'qwen3_235b_a22b': 235_093_634_560, 'gpt_oss_20b': 20_914_757_184, 'gpt_oss_120b': 116_829_156_672,
    'deepseek_v2_lite': 15_706_484_224, 'deepseek_v3': 671_026_419_200,
    'encoder_1m': 1_371_649, 'encoder_decoder_3m': 2_529_536,
    'bert_base': 109_514_298, 'bert_large': 335_174_458, 'minilm_l6': 22_713_216, 'roberta_base': 124_697_433,
    'roberta_large': 355_412_057, 't5_10_base': 222_903_552, 't5_11_77m': 76_961_152, 't5_11_248m': 247_577_856,
    't5_11_783m': 783_150_080, 't5_11_3b': 2_849_757_184, 't5_11_11b': 11_135_332_352,
}

leaves = pytest.mark.parametrize('leaf', LEAVES)


def text(name: str) -> str:
  return (ROOT / name).read_text()


def includes(name: str) -> list[str]:
  return re.findall(r"^include '(.+?)'", text(name), re.MULTILINE)


def with_includes(name: str) -> str:
  return '\n'.join([text(name), *map(with_includes, includes(name))])


def arguments(leaf: str, *more: str) -> tuple:
  """main() of the experiment that a leaf sets up, and the arguments that it and `more` files give."""
  experiment = re.search(r'^(?:experiments\.)?(\w+)\.main:', with_includes(leaf), re.MULTILINE)[1]
  main = importlib.import_module(f'experiments.{experiment}').main
  said = '\n'.join(map(with_includes, (leaf, *more)))
  given = [binding for binding in GIVEN if f'{binding.split()[0]} = %gin.REQUIRED' in said]
  return main, cli.arguments(main, [leaf, *more], given)


@leaves
def test_a_leaf_gives_main_its_arguments(leaf):
  main, values = arguments(leaf)
  inspect.signature(main).bind(**values)


@leaves
def test_what_a_leaf_says_can_be_built(leaf):
  """Weights, optimizer state and one step, by shape alone."""
  main, values = arguments(leaf)
  if 'model' not in values:
    return
  model, B, T = values['model'], values['batch'], values.get('length') or values['model'].length
  letters = sharding.letters(protocol.boxed(model))
  transformation = values['optimizer'].transformation(letters, values['steps'])
  loss = values.get('loss', inspect.signature(main).parameters['loss'].default)
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
  batch = {name: array((B, T), jnp.int32) for name in ('tokens_BT', 'targets_BT', 'segments_BT')}
  batch |= {'weight_BT': array((B, T), jnp.float32), 'row_B': array((B,), jnp.uint32)}
  if protocol.encodes(model) and protocol.decodes(model):
    batch |= {name: array((B, T), jnp.int32) for name in ('inputs_BS', 'input_segments_BS')}
  step = step_of.make_step(loss.of(model), transformation, values.get('microbatches', 1))
  before = step_of.shapes(model, transformation)
  after, metrics = jax.eval_shape(step, before, batch)
  forms = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert forms(after) == forms(before)
  assert {'loss', 'grad_norm', 'finite'} <= metrics.keys()
  if not isinstance(values['data'], Stored):  # whose vocabulary is that of what is there
    needed = objectives.vocabulary(values.get('objective', objectives.CAUSAL), values['data'].vocab)
    assert needed == model.vocab, 'the tokenizer and the model disagree'


@leaves
def test_a_leaf_may_be_given_after_another_mesh(leaf):
  for mesh in sorted({path.relative_to(ROOT).as_posix() for path in (ROOT / 'meshes').glob('*.gin')} - {*PODS}):
    if '%LAYOUT' in with_includes(leaf):
      assert arguments(leaf, mesh)[1]['layout'].mesh().size == 8


@pytest.mark.parametrize('data', OTHER_DATA)
def test_the_quickstart_may_be_given_other_data(data):
  source = arguments('quickstart.gin', data)[1]['data'].source
  assert type(source).__name__ == {'data_folder': 'DataFolder', 'seqio_task': 'Seqio'}[pathlib.Path(data).stem]


def test_tuning_may_be_given_other_conversations():
  data = arguments('sft_smollm2_lora.gin', 'data/conversations.gin')[1]['data']
  assert type(data.source).__name__ == 'JsonFiles'


def model_alone(*, model):
  """What a file of models/ is bound to here: a main() that asks for nothing else."""


@pytest.mark.parametrize('name', MODELS)
def test_a_model_has_as_many_weights_as_published(name, tmp_path):
  file = tmp_path / 'alone.gin'
  file.write_text('from __gin__ import dynamic_registration\nfrom tests import test_gin_configs\n'
                  f"include 'models/{name}.gin'\n"
                  'test_gin_configs.model_alone.model = %MODEL\n')
  model = cli.arguments(model_alone, [str(file)])['model']
  assert trees.count(protocol.boxed(model)) == PUBLISHED[name]


@pytest.mark.parametrize('name', FILES)
def test_a_file_keeps_to_the_form(name):
  code = re.sub(r'#.*', '', text(name))
  assert text(name).startswith('# '), 'the first line says what the file is; --help prints it'
  assert 'from __gin__ import dynamic_registration' in code
  assert 'lmlib' in code or 'experiments' in code
  for included in includes(name):
    assert '/' in included, f'{included} is a leaf'
    assert '/' not in name, 'only leaves include'
  folders = [included.split('/')[0] for included in includes(name)]
  assert len(folders) == len(set(folders)), 'one file of each folder'
  assert set(folders) <= {'models', 'meshes', 'data', 'runs'}
  assert not re.search(r'(?<!%)@\w[\w./]*(?!\w*\()\b(?![\w./]*\()', code), 'objects are made: @name()'


def test_there_are_eight_macros_and_what_to_read():
  used = {macro for name in FILES for macro in re.findall(r'%([A-Z]\w*)', text(name))}
  set_here = {macro for name in FILES for macro in re.findall(r'^([A-Z]\w*) =', text(name), re.MULTILINE)}
  assert used == set_here
  assert used <= MACROS | OWN


def test_every_file_is_used():
  used = {included for leaf in LEAVES for included in includes(leaf)} | {f'models/{name}.gin' for name in PUBLISHED}
  alone = {name for name in FILES if '/' in name} - used - {*MESHES, *OTHER_DATA, *PODS}
  assert not alone, f'{alone} belong to no leaf'
