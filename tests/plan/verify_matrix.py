"""Every strategy, alone and with others, equals one device; minutes: `pytest --dist worksteal` of this file."""
import functools

import pytest

from lmlib.data import denoising, objectives
from lmlib.kernels.attention import Pattern
from lmlib.models import dense, encoder, encoder_decoder, latent_moe, moe
from lmlib.nn.attention import AttentionStyle
from lmlib.nn.moe import Experts
from lmlib.nn.router import TopK
from lmlib.optim.adamw import AdamW
from lmlib.optim.muon import Muon
from lmlib.optim.schedules import Constant
from lmlib.plan import shrink, verify
from lmlib.sharding import Layout, Pipeline
from lmlib.train import encoder_losses, losses

LOCAL = AttentionStyle(qk_norm='head', sinks=True, patterns=(Pattern(window=5, softcap=5.0), Pattern()))
MODELS = {'dense': dense.Config(layers=4, heads=8, kv_heads=4), 'local': dense.Config(layers=4, attention=LOCAL),
          'experts': moe.Config(layers=4, experts=Experts(8, 64, TopK(2, balance_loss=1e-2, z_loss=1e-3))),
          'latent': latent_moe.Config(layers=3, heads=8)}
ONE = dict(data=1)
LAYOUTS = {
    'data': dict(data=8), 'fsdp': ONE | dict(fsdp=8), 'data fsdp': dict(data=2, fsdp=4), 'tensor': ONE | dict(tensor=8),
    'data fsdp tensor': dict(data=2, fsdp=2, tensor=2), 'context': ONE | dict(context=8),
    'fsdp context tensor': ONE | dict(fsdp=2, context=2, tensor=2), 'zero 1': dict(data=2, fsdp=4, zero=1),
    'zero 2 tensor': ONE | dict(fsdp=4, tensor=2, zero=2), 'slices': dict(data=4, fsdp=2, slices=2, offload=True),
    'stage fsdp tensor': ONE | dict(stage=2, fsdp=2, tensor=2), 'rounds': dict(
        data=2, stage=2, context=2, pipeline=Pipeline(rounds=2))}
OF_EXPERTS = {
    'expert': ONE | dict(expert=8), 'data expert': dict(data=2, expert=4),
    'fsdp expert tensor': ONE | dict(fsdp=2, expert=2, tensor=2),
    'data expert context': dict(data=2, expert=2, context=2), 'stage expert': dict(data=2, stage=2, expert=2)}
CASES = [('dense', layout) for layout in LAYOUTS]
OF_DENSE = 'data fsdp', 'context', 'zero 2 tensor', 'slices'
CASES += [('experts', layout) for layout in LAYOUTS if layout not in OF_DENSE]
CASES += [('local', 'fsdp context tensor'), ('local', 'rounds'), ('latent', 'data fsdp tensor'),
          ('latent', 'stage fsdp tensor')]
CASES += [(model, layout) for model in ('experts', 'latent') for layout in OF_EXPERTS if model == 'experts'
          or layout not in ('data expert context', 'stage expert')]
SPECIALS = objectives.specials_after(300, 4)


@functools.cache
def case(model: str, layout: Layout) -> verify.Case:
  optimizer = (Muon if layout.tensor > 1 and layout.fsdp > 1 else AdamW)(Constant(1e-3))
  return verify.case(verify.whole(MODELS[model], losses.NextToken(z_loss=1e-3)), objectives.CAUSAL, optimizer, layout,
                     rows=16)


ONES = {}


def one(case: verify.Case):
  """The gradients of one device, which layouts of as many layers share."""
  key = case.trained.config
  if key not in ONES:
    ONES[key] = case.gradients()
  return ONES[key]


def assert_fine(rows):
  rows = list(rows)
  assert any(row.checked for row in rows)
  assert not (wrong := [row for row in rows if not row.fine]), '\n'.join(map(str, wrong))


@pytest.mark.parametrize(('model', 'layout'), CASES, ids=lambda name: name.replace(' ', '-'))
def test_layout_equals_one_device(model, layout):
  whole = Layout(**{**LAYOUTS, **OF_EXPERTS}[layout])
  assert shrink.layout(whole) == whole
  here = case(model, whole)
  assert_fine(verify.of_layout(here, one(here)))


@pytest.mark.parametrize(('layout', 'density', 'mean', 'written'), [
    ('data context', 0.15, 3.0, 11), ('stage context', 0.4, 4.0, 20), ('fsdp context tensor', 0.4, 4.0, 20),
    ('fsdp context tensor', 0.52, 1.5, 32)])
def test_rows_of_encoder_decoders_are_split(layout, density, mean, written):
  """32 tokens are read. Those written stay whole, or are split; or are as many: attention to what is read is a ring."""
  several = {'stage context': dict(data=2, stage=2, context=2), 'data context': dict(data=2, context=4)} | LAYOUTS
  objective = denoising.SpanCorruption(objectives.specials_after(300, 16), density, mean, layout='encoder_decoder')
  here = verify.case(verify.whole(encoder_decoder.Config(), encoder_losses.SequenceToSequence()), objective,
                     AdamW(Constant(1e-3)), Layout(**several[layout]))
  assert (here.batch['inputs_BS'].shape[1], here.batch['tokens_BT'].shape[1]) == (32, written)
  assert_fine(verify.of_layout(here, here.gradients()))


@pytest.mark.parametrize(('config', 'loss', 'objective'), [
    (encoder.Config(), encoder_losses.MaskedToken(), objectives.MaskedLm(SPECIALS)),
    (encoder_decoder.Config(), encoder_losses.SequenceToSequence(),
     denoising.SpanCorruption(SPECIALS, layout='encoder_decoder')),
    (latent_moe.Config(future=1), losses.MultiToken(), objectives.MultiToken(2))],
    ids=['encoder', 'encoder-decoder', 'multi-token'])
def test_other_kinds_of_runs(config, loss, objective):
  assert_fine(verify.checks(verify.case(verify.whole(config, loss), objective, AdamW(Constant(1e-3)),
                                        Layout(data=2, fsdp=2, tensor=2))))
