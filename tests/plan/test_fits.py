"""Real sizes are checked without their devices: what fits, and every axis that does not, in the words of the run."""
import dataclasses
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from lmlib import cli, sharding
from lmlib.data import denoising, objectives
from lmlib.models import dense, encoder_decoder, moe, protocol
from lmlib.nn.lora import Lora
from lmlib.nn.moe import Experts
from lmlib.nn.stack import Execution
from lmlib.optim.adamw import AdamW
from lmlib.optim.schedules import Constant
from lmlib.plan import fits, shrink, verify
from lmlib.post.sft import Tuning
from lmlib.sharding import Layout, Pipeline
from lmlib.train import encoder_losses, losses
from lmlib.train import step as step_of

DENSE = dense.Config(layers=6, width=96, hidden=128, heads=6, kv_heads=6, head_width=8, length=96)
MIXED = moe.Config(layers=2, width=32, heads=4, head_width=8, experts=Experts(12, 16))
WRONG = {
    'tensor': (DENSE, dict(tensor=4), {}, r'Layout.tensor=4 does not divide kv_heads=6: tensor=2, data=2 would'),
    'stage': (DENSE, dict(stage=4), {},
              r'Layout.stage=4 does not divide the 6 layers of a stack: stage=3 does, or 8 layers'),
    'rounds': (DENSE, dict(stage=2, pipeline=Pipeline(rounds=2)), {},
               r'Layout.stage=2 x Pipeline.rounds=2 does not divide the 6 layers of a stack: stage=1 does, or 8'),
    'passes': (DENSE, dict(stage=2, pipeline=Pipeline(microbatches=6)), {},
               r'Pipeline.microbatches=6 do not divide the 8 rows of batch=8 by microbatches=1, .*: 1, 2, 4, 8 would'),
    'expert': (MIXED, dict(expert=8), {},
               r'Layout.expert=8 does not divide the moe.Experts.count=12 experts: expert=4 does, with 2 times'),
    'fsdp': (dataclasses.replace(DENSE, width=100), dict(fsdp=8), {},
             r'Layout.fsdp=8 does not divide width=100: fsdp=4, data=2 would'),
    'batch': (DENSE, dict(data=8), dict(batch=12),
              r'batch=12 is not a multiple of microbatches=1 times the 8 devices .*\(data x fsdp x expert\): 16 is'),
    'microbatches': (DENSE, dict(data=4), dict(microbatches=4),
                     r'batch=8 .* microbatches=4 times the 4 devices.*16 is'),
    'context': (DENSE, dict(context=8), dict(length=44),
                r'length=44 is not a multiple of the 8 devices .*\(context\): 40 is'),
    'sums': (DENSE, dict(data=8, wide_sums=True), {},
             r"Layout.wide_sums=True has no effect on a model with Execution.dtype='float32'"),
    'ring': (dataclasses.replace(DENSE, execution=Execution(attention='hopper')), dict(context=8), {},
             r"attention around a ring implementation='hopper' is none of \['gpu', 'reference', 'tpu'\]")}


def sizes_of(config, layout: Layout, batch: int = 8, length: int = 64, microbatches: int = 1) -> fits.Sizes:
  return fits.Sizes(verify.whole(config, losses.NextToken()), objectives.CAUSAL, layout, batch, length, microbatches)


def case(name: str):
  config, layout, numbers, why = WRONG[name]
  return sizes_of(config, Layout(**dict(data=1) | layout), **numbers), why


def published(name: str, folder):
  (folder / 'config.gin').write_text(
      f"from __gin__ import dynamic_registration\ninclude '{cli.GIN_CONFIGS}/models/{name}.gin'\n")
  return cli.saved_model(str(folder))


def test_a_large_run_that_fits(tmp_path):
  """An 8B model over 1024 devices, of which this machine has none."""
  llama = published('llama3_8b', tmp_path)
  layout = Layout(data=4, fsdp=32, tensor=8, slices=4, offload=True)
  rows = fits.checks(sizes_of(llama, layout, batch=512, length=8192, microbatches=2))
  assert all(row.fine for row in rows)
  assert [row.of for row in rows] == [
      'Layout data=4, fsdp=32, tensor=8, offload, slices=4 of data on 1024 devices',
      'batch=512, microbatches=2, length=8192', '8,030,261,248 weights', 'NextToken of 256 rows, traced', 'layout']
  assert rows[-1].said == ('fsdp splits optimizer state, gradients and weights (ZeRO-3); moments wait on hosts; '
                           'data goes over 4 slices')
  adapted = verify.tuned(Tuning(llama, Lora()), losses.NextToken())
  assert all(row.fine for row in fits.checks(fits.Sizes(adapted, objectives.CAUSAL, layout, 512, 8192)))


def begun(sizes: fits.Sizes):
  """What a run does with its sizes as it begins, with devices that are there."""
  with sharding.use(sizes.layout, jax.devices()[:math.prod(sizes.layout.sizes)]):
    sizes.numbers()
    config = sizes.trained.config
    transformation = AdamW(Constant(1e-3)).transformation(sharding.letters(protocol.boxed(config)), 10)
    shapes = step_of.shapes(config, transformation)
    batch = {name: jax.ShapeDtypeStruct((sizes.batch, sizes.length), 'int32')
             for name in ('tokens_BT', 'targets_BT', 'segments_BT', 'weight_BT')}
    jax.eval_shape(losses.NextToken().of(config), shapes.params, batch)


@pytest.mark.parametrize('name', WRONG)
def test_what_does_not_fit_is_wrong_in_the_words_of_the_run(name):
  sizes, why = case(name)
  wrong = [row for row in fits.checks(sizes) if not row.fine]
  assert len(wrong) == 1
  with pytest.raises(ValueError, match=why) as refused:
    begun(sizes)
  assert wrong[0].said == ' '.join(str(refused.value).split())
  assert str(wrong[0]).startswith('real sizes ')
  assert f'WRONG {wrong[0].said}' in str(wrong[0])


@pytest.mark.parametrize('name', WRONG)
def test_its_small_copy_fits(name):
  """So what is computed of a copy could not have told."""
  sizes, _ = case(name)
  layout = shrink.layout(sizes.layout)
  small = sizes_of(shrink.model(sizes.trained.config, layout, 264), layout, batch=16, length=32)
  assert all(row.fine for row in fits.checks(small))


def test_its_small_copy_computes_what_one_device_does():
  sizes, _ = case('tensor')
  copy = verify.case(sizes.trained, sizes.objective, AdamW(Constant(1e-3)), shrink.layout(sizes.layout))
  rows = list(verify.against('layout = one device', copy.gradients(), copy.gradients(layout=copy.layout)))
  assert all(row.fine for row in rows)


@pytest.mark.parametrize(('layout', 'fitting'), [
    (dict(data=1, fsdp=-1), '1, 2, 4, 8'), (dict(data=-1, tensor=2), '2, 4, 6, 8, 12, 16, 24, 48'),
    (dict(data=1, stage=-1), '1, 2, 3, 6'), (dict(data=1, tensor=-1), '1, 2'),
    (dict(data=-1, slices=4), '4, 8, 12, 24'), (dict(data=1, context=-1), '1, 2, 4, 8, 16, 32, 64')])
def test_numbers_of_devices_that_a_layout_may_be_given(layout, fitting):
  """24 rows; a width of 104, which 8 divides and 3 does not."""
  sizes = sizes_of(dataclasses.replace(DENSE, width=104), Layout(**layout), batch=24)
  rows = fits.checks(sizes)
  assert all(row.fine for row in rows)
  assert rows[0].said == f'fits {fitting} devices'
  assert rows[0].of.endswith(f' on {fitting.split()[-1]} devices')


def test_a_layout_that_no_number_of_devices_fits():
  rows = fits.checks(sizes_of(DENSE, Layout(data=-1, tensor=4)))
  assert [row.said for row in rows if not row.fine] == ['Layout.tensor=4 does not divide kv_heads=6: tensor=2 would']


def test_what_stays_whole_is_told():
  rows = fits.checks(sizes_of(dataclasses.replace(DENSE, vocab=257), Layout(data=1, tensor=2)))
  assert rows[-1].said == 'tensor=2: vocab=257 stays whole'
  assert not rows[-1].checked


def test_all_that_is_wrong_is_said_at_once():
  sizes, _ = case('tensor')
  assert sum(not row.fine for row in fits.checks(dataclasses.replace(sizes, layout=Layout(data=3, tensor=4)))) == 2


@pytest.mark.parametrize(('numbers', 'why'), [
    (dict(batch=0), 'batch=0 must be a positive integer'), (dict(microbatches=0), 'microbatches=0 must be'),
    (dict(length=128), "length=128 is longer than the model's length=96"), (dict(batch=6, microbatches=4), 'batch=6')])
def test_numbers_that_no_layout_helps(numbers, why):
  row, = fits.checks(sizes_of(DENSE, Layout(data=-1), **numbers))
  assert not row.fine
  assert row.said.startswith(why)


def test_a_loss_of_another_kind_of_model():
  row, = fits.checks(dataclasses.replace(sizes_of(DENSE, Layout(data=1)), trained=verify.whole(
      DENSE, encoder_losses.SequenceToSequence())))
  assert row.said == 'the loss SequenceToSequence is of an encoder-decoder; lmlib.models.dense is none'


def test_attention_of_a_gpu_is_no_fault_of_this_machine():
  config = dataclasses.replace(DENSE, execution=Execution(attention='cudnn'))
  assert all(row.fine for row in fits.checks(sizes_of(config, Layout(data=8))))


def test_encoder_decoders():
  specials = objectives.specials_after(300, 16)
  trained = verify.whole(encoder_decoder.Config(vocab=320), encoder_losses.SequenceToSequence())
  sizes = fits.Sizes(trained, denoising.SpanCorruption(specials, layout='encoder_decoder'),
                     Layout(data=1, context=4, tensor=4), 8, 64)
  rows = fits.checks(sizes)
  assert all(row.fine for row in rows)
  written = sizes.microbatch()['tokens_BT'].shape[1]
  assert written % 4
  assert rows[-1].said == f'context=4: rows of {written} tokens of the decoder stay whole'


def test_verify_ends_with_what_does_not_fit():
  """The 124M of the run files has 32 rows, and this mesh 64 devices for them: told in seconds, nothing computed."""
  command = [sys.executable, pathlib.Path(cli.__file__).parents[1] / 'experiments' / 'verify.py',
             '--gin_file=pretrain_dense_124m.gin', '--gin_file=meshes/v5e_256.gin']
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 1
  first, second, third = done.stdout.splitlines()
  assert first.split()[-1] == third.split()[-1] == 'ok'
  assert 'WRONG batch=32 is not a multiple of microbatches=1 times the 64 devices' in second
  assert done.stderr.splitlines()[-1] == f'the real sizes do not fit: {second.partition("WRONG ")[2]}'
