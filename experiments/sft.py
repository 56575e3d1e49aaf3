"""Fine-tunes a model, all of it or an adapter beside it, and scores held-out answers before and after.

  python experiments/sft.py --gin_file=sft_smollm2_lora.gin
  python experiments/sft.py --gin_file=sft_smollm2_lora.gin --gin_file=data/conversations.gin \\
      --gin_bindings='SOURCE = "SmolLM2-135M-Instruct"' --gin_bindings='GLOB = "chats/*.jsonl"'

SOURCE is a folder in Hugging Face's form, a GGUF file, a WORKDIR, or package:NAME, an installed package with a GGUF
file. The same command run again goes on where it stopped.
"""
from lmlib import cli

if __name__ == '__main__':  # before jax is imported, which reads its log level then
  cli.run(__file__)

import contextlib
import functools

import jax

from lmlib import gin_text, processes, sharding, trees
from lmlib.eval import held_out_answers, report, tuning_report
from lmlib.interop import opened
from lmlib.nn.adapters import Adapter
from lmlib.plan import chips, cost, hlo
from lmlib.post.sft import Tuning
from lmlib.train import health, keeping, loop, losses, metrics, training
from lmlib.train.checkpoint import Checkpoints
from lmlib.train.watch import Watch
from lmlib.train.workdir import Workdir


def main(*, source: str, data, optimizer, layout, steps: int, batch: int, workdir: str, seed: int = 0, adapter=None,
         begin: str | None = None, four_bits: bool = False, model=None, loss=losses.NextToken(),
         length: int | None = None, microbatches: int = 1, exact: held_out_answers.Exact | None = None,
         save_every: int = 100, keep: int | keeping.Keep = 2, watch=Watch()):
  """Trains what `adapter` says (nn/adapters.py; None: all weights) of the model at `source` on `data`.

  `data` are conversations, of which the answers are learned (data/conversations.py), or text (data/continuation.py).
  A batch has `batch` rows of `length` tokens (None: 1024, or the model's length if that is less). `model` is the
  model's config where it is to compute otherwise than as it comes, with another dtype or remat. Held-out answers are
  scored before and after: nats a token and, with `exact`, how many are written to the letter. four_bits: what an
  adapter stands beside is held in 4 bits (QLoRA), before and after. begin: a folder in PEFT's form, whose adapter is
  trained on. Only what is trained is saved, at the end in PEFT's form too. The rest is as in experiments/pretrain.py.
  """
  given = dict(locals())
  live = metrics.Live()

  with contextlib.ExitStack() as stack:
    # What can be known before any work.
    mesh = stack.enter_context(sharding.use(layout))
    begun = opened.opened(source, cli.saved_model)
    if model is not None:
      opened.same_model(source, begun.config, model)
    model, tokenizer = model or begun.config, begun.tokenizer
    length = min(1024, model.length) if length is None else length
    loop.check(steps=steps, batch=batch, microbatches=microbatches, length=length, longest=model.length,
               save_every=save_every, seed=seed)
    keep = keeping.checked(keep, (), save_every, None)
    if begin is not None and adapter is not None:
      raise ValueError(f'begin={begin!r} says which adapter it is: leave out adapter={adapter}')
    earlier = None if begin is None else opened.adapter_of(begin, model)
    tuning = Tuning(model, adapter if earlier is None else earlier.method, four_bits)
    tree = None if earlier is None else earlier.tree
    step_loss = tuning.loss(loss)  # refuses a model of another kind
    transformation = optimizer.transformation(tuning.letters(), steps)
    shapes = tuning.shapes(transformation)
    run = stack.enter_context(Workdir(workdir))
    run.check({'source': source, 'model': model, 'adapter': tuning.adapter, 'begin': begin, 'four_bits': four_bits,
               'optimizer': optimizer, 'loss': loss, 'batch': batch, 'length': length, 'seed': seed, 'exact': exact})
    folder = run.path

    # What it reads.
    with processes.in_turn('data'):
      material = data.opened(tokenizer, batch=batch, length=length, seed=seed, say=live.say)
    run.check({'data': material.fingerprint})

    # What it starts from.
    base = begun.params(model)
    run.check({'weights': opened.fingerprint([base, tree])})
    base = tuning.held(base)
    checkpoints = stack.enter_context(Checkpoints(folder / 'checkpoints', keep=keep, say=live.say))
    restored = checkpoints.restore(shapes)
    start = int(restored[0].step) if restored else 0
    if start >= steps and (done := report.finished(folder, start)):
      live.say(f'finished    {folder}: {start} of {steps} steps are done\n'
               f'{tuning_report.closing(done, folder)}')
      return

    # What it writes of itself.
    beside = None if tuning.adapter is None else trees.count(shapes.params)
    flops, (peak, peak_source) = cost.train_flops(model, length, beside=beside), chips.peak_flops(mesh.devices.flat)
    facts = tuning.facts(optimizer, steps, batch // microbatches) | {
        'source': source, 'mesh': dict(mesh.shape), 'data': material.facts, 'peak_flops': peak,
        'peak_source': peak_source, 'flops_per_token': flops.exact, 'flops_per_token_6nd': flops.six_nd}
    config = gin_text.gin_text('experiments.sft.main', given | {'model': model})
    run.begin(manifest=facts, files={'config.gin': config.encode(), 'tokenizer.model': tokenizer.model},
              need=trees.nbytes(shapes) * (keep.most(steps) + 1))
    live.say(tuning_report.opening(facts, folder, start, steps))

    # How good it is before.
    score = lambda params: held_out_answers.score(model, params, material.held_out, tokenizer, exact)
    first = lambda: score(base if tree is None else tuning.params(tree, base))
    before = held_out_answers.kept(folder / 'before.json', first, live.say)

    # What it does.
    state = restored[0] if restored else tuning.state(base, transformation, jax.random.key(seed), tree)
    frozen = tuning.frozen(base)
    if not frozen:
      del base
    if start < steps:
      course = training.Course(step_loss, transformation, shapes, material.train,
                               lambda i: optimizer.schedule.rate(i, steps), microbatches, frozen)
      record = functools.partial(metrics.Record, folder, steps=steps, flops=flops, peak=peak, live=live)
      state = training.train(course, state, folder=folder, steps=steps, checkpoints=checkpoints, save_every=save_every,
                             record=record, watch=watch, sends=lambda text: hlo.collectives(text, mesh).by_axis(),
                             say=live.say)

    # What it has learned.
    stack.enter_context(health.stopping('stopped after training, which is saved: '
                                        'run the same command for the report'))
    live.say('scoring the held-out examples again and writing the report')
    after = score(tuning.params(state.params, *frozen))
    if tuning.adapter is not None:
      why = opened.write_adapter(folder / 'adapter', Adapter(state.params, tuning.adapter), model)
      live.say(f'adapter     {folder}/adapter, in the form of PEFT' if why is None else f'adapter     no folder: {why}')
    done = tuning_report.write(folder, before=before, after=after, questions=material.held_out, tokenizer=tokenizer,
                               facts=facts)
    live.say(tuning_report.closing(done, folder))
