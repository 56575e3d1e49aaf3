"""Pretrains a language model on text and scores it on documents it has never seen.

  python experiments/pretrain.py --gin_file=quickstart.gin
  python experiments/pretrain.py --gin_file=quickstart.gin --gin_bindings='STEPS = 100'

The same command run again goes on where it stopped.
"""
from lmlib import cli

if __name__ == '__main__':  # before jax is imported, which reads its log level then
  cli.run(__file__)

import contextlib
import dataclasses
import functools

import jax

from lmlib import gin_text, processes, sharding, trees
from lmlib.data import objectives
from lmlib.data import packing as packings
from lmlib.data.prepare import prepare
from lmlib.eval import evaluation, held_out, perplexity, report
from lmlib.models import protocol
from lmlib.plan import chips, cost, hlo
from lmlib.serve.generate import generate
from lmlib.train import encoder_losses, health, keeping, loop, losses, metrics, training
from lmlib.train import step as step_of
from lmlib.train.checkpoint import Checkpoints
from lmlib.train.watch import Watch
from lmlib.train.workdir import Workdir


def main(*, model, data, optimizer, layout, steps: int, batch: int, workdir: str, seed: int = 0,
         packing=packings.Split(), objective=objectives.CAUSAL, loss=losses.NextToken(), length: int | None = None,
         microbatches: int = 1, save_every: int = 100, keep: int | keeping.Keep = 2, watch=Watch(),
         evaluations: tuple = (), evaluate_every: int | None = None,
         prompts: tuple = ('import ', 'class ', 'def read(')):
  """Trains `model` on `data` for `steps` steps of `batch` rows of `length` tokens (None: the model's length).

  `data` is a corpus or a mixture of several; `packing` fills rows with documents, `objective` says what of
  them is predicted. Gradients are summed over `microbatches`. Every `save_every` steps a checkpoint is written;
  the last `keep` stay, or those that a keeping.Keep says. `watch` is what to look out for (train/watch.py).
  `evaluations` (eval/evaluations.py) run every `evaluate_every` steps and after the last; what they find goes to
  evaluations.jsonl and TensorBoard. At the end a decoder is scored on the held-out documents and continues each of
  `prompts`; a model with an encoder, or one that learned to fill in, is scored by what its objective hides in them.
  """
  config = gin_text.gin_text('experiments.pretrain.main', locals())
  length = model.length if length is None else length
  live = metrics.Live()

  with contextlib.ExitStack() as stack:
    # What can be known before any work.
    mesh = stack.enter_context(sharding.use(layout))
    loop.check(steps=steps, batch=batch, microbatches=microbatches, length=length, longest=model.length,
               save_every=save_every, seed=seed, evaluate_every=1 if evaluate_every is None else evaluate_every)
    encoder_losses.agree(loss, objective)
    loss.of(model)  # refuses a model of another kind
    evaluation.check_during(evaluations, evaluate_every)
    keep = keeping.checked(keep, evaluations, save_every, evaluate_every)
    if model.vocab != (needed := objectives.vocabulary(objective, data.vocab)):
      more = '' if needed == data.vocab else f' and the special ids of the objective go up to {needed - 1}'
      raise ValueError(f'the model has vocab={model.vocab}, but the tokenizer of the data has '
                       f'pieces={data.vocab}{more}: they must be equal{more and f", vocab={needed}"}')
    transformation = optimizer.transformation(sharding.letters(protocol.boxed(model)), steps)
    shapes = step_of.shapes(model, transformation)
    run = stack.enter_context(Workdir(workdir))
    run.check({'model': model, 'optimizer': optimizer, 'loss': loss, 'packing': packing,
               'objective': objective, 'batch': batch, 'length': length, 'seed': seed})
    folder = run.path

    # What it reads.
    with processes.in_turn('data'):
      prepared = prepare(data, say=live.say)
    if prepared.held_out is None:
      raise ValueError(f'{prepared.train.path} was prepared with held_out=None: there is nothing to score on')
    run.check({'data': prepared.train.fingerprint})
    tokenizer = prepared.tokenizer
    batches = packings.Batches(prepared.train, batch, length, seed, packing, objective, model.vocab)
    writes = not (protocol.encodes(model) or getattr(objective, 'in_place', False))
    unseen = None if writes else dataclasses.replace(batches, store=prepared.held_out)
    ids = [[tokenizer.bos, *tokenizer.encode(prompt).tolist()] for prompt in prompts if writes]
    if (longest := max(map(len, ids), default=0)) >= model.length:
      raise ValueError(f'prompts: the longest has {longest} tokens, which leaves no room for an answer in '
                       f"the model's length={model.length}")
    evaluate = evaluation.during(evaluations, model, tokenizer, folder, say=live.say) if evaluations else None
    live.say(prepared.table())

    # What it starts from.
    checkpoints = stack.enter_context(Checkpoints(folder / 'checkpoints', keep=keep, say=live.say))
    if restored := checkpoints.restore(shapes):
      state = restored[0]
    else:
      state = step_of.init(model, transformation, jax.random.key(seed))
    start = int(state.step)
    if start >= steps and (done := report.finished(folder, start)):
      live.say(f'finished    {folder}: {start} of {steps} steps are done\n{report.closing(done, folder)}')
      return

    # What it writes of itself.
    answer, first = None, batches.batch_at(0)
    if 'inputs_BS' in first:
      answer = length * float((first['segments_BT'] > 0).sum() / (first['input_segments_BS'] > 0).sum())
    flops, (peak, peak_source) = cost.train_flops(model, length, answer), chips.peak_flops(mesh.devices.flat)
    facts = {'parameters': trees.count(shapes.params), 'mesh': dict(mesh.shape), 'data': prepared.rows,
             'peak_flops': peak, 'peak_source': peak_source, 'flops_per_token': flops.exact,
             'flops_per_token_6nd': flops.six_nd, 'layout': step_of.told(protocol.boxed(model), batch // microbatches)}
    run.begin(manifest=facts, files={'config.gin': config.encode(), 'tokenizer.model': tokenizer.model},
              need=trees.nbytes(shapes) * (keep.most(steps) + 1))
    live.say(report.opening(facts, folder, start, steps))

    # What it does.
    if start < steps:
      course = training.Course(loss.of(model), transformation, shapes, batches,
                               lambda i: optimizer.schedule.rate(i, steps), microbatches)
      record = functools.partial(metrics.Record, folder, steps=steps, flops=flops, peak=peak, live=live)
      state = training.train(course, state, folder=folder, steps=steps, checkpoints=checkpoints, save_every=save_every,
                             record=record, watch=watch, evaluate=evaluate, evaluate_every=evaluate_every,
                             sends=lambda text: hlo.collectives(text, mesh).by_axis(), say=live.say)

    # What it has learned.
    stack.enter_context(health.stopping('stopped after training, which is saved: '
                                        'run the same command for the report'))
    live.say('scoring the held-out documents and writing the report')
    if writes:
      score = perplexity.score(model, state.params, prepared.held_out.scored(), length=length,
                               stride=max(1, length // 2))
      continued = generate(model, state.params, ids, new=min(200, model.length - longest), eos=tokenizer.eos,
                           temperature=0.7, seed=seed) if ids else []
      continued = [[i for i in row if i < tokenizer.vocab] for row in continued]  # special ids are no text
      samples = [(prompt, tokenizer.decode(row, continues=True)) for prompt, row in zip(prompts, continued)]
      others = perplexity.compressors([prepared.held_out.text(i).encode() for i in range(prepared.held_out.documents)])
    else:
      score, samples, others = held_out.score(model, state.params, loss, unseen), [], {}
    done = report.write(folder, score=score, others=others, samples=samples, facts=facts)
    live.say(report.closing(done, folder))
