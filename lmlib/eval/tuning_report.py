"""What a run of fine-tuning says of itself: before and after side by side; report/ as report.py has it."""
import pathlib

from lmlib import processes
from lmlib.eval import held_out_answers, report
from lmlib.train import goodput, metrics

SHOWN = 12  # answers in samples.txt
PLACES = {'nats a token': '{:.3f}', 'bits a byte': '{:.3f}'}  # of a measure; others are shares


def opening(facts: dict, folder: pathlib.Path, start: int, steps: int) -> str:
  """What is trained, the devices and the folder, before the first step."""
  share = facts['trained'] / facts['parameters']
  megabytes = lambda size: f'{size / 1e6:,.1f} MB'
  whole = '' if facts['trained'] == facts['parameters'] else (
      f', where training all of them takes {megabytes(facts["optimizer_bytes_of_all"])}')
  where = f'going on after step {start} of {steps}' if start else f'{steps} steps'
  return (f'model       {facts["source"]}: {facts["parameters"]:,} weights\n'
          f'trained     {facts["trained"]:,} numbers, {share:.2%} of as many; optimizer state '
          f'{megabytes(facts["optimizer_bytes"])}{whole}\n'
          f'mesh        {report.mesh(facts)}\n{report.layout(facts)}'
          f'workdir     {folder}: {where}')


def write(folder: pathlib.Path, *, before: held_out_answers.Score, after: held_out_answers.Score, questions, tokenizer,
          facts: dict) -> dict:
  """Writes report/ (loss.png, time.png, samples.txt, summary.json); returns the figures of the summary.

  Of several processes the first one writes.
  """
  return processes.told('report', lambda: _written(folder, before, after, questions, tokenizer, facts))


def _written(folder: pathlib.Path, before, after, questions, tokenizer, facts: dict) -> dict:
  out = folder / 'report'
  out.mkdir(exist_ok=True)
  lines = metrics.read(folder / 'metrics.jsonl')
  kept = ('source', 'parameters', 'trained', 'optimizer_bytes', 'optimizer_bytes_of_all')
  summary = {'held_out': held_out_answers.compared(before, after, questions),
             'held_out_tokens': int(after.tokens_N.sum()), 'level': held_out_answers.LEVEL, 'data': facts['data']}
  summary |= {name: facts[name] for name in kept} | report.spent(lines) | {
      'seconds_by_cause': goodput.of(folder)}
  if after.written:
    (out / 'samples.txt').write_text('\n'.join(_sample(*one, tokenizer) for one in list(zip(
        questions, before.written, after.written))[:SHOWN]))
  held_out_answers.write(folder / 'after.json', after)
  report.loss_curve(lines, out / 'loss.png', title=folder.name, level=after.nats_N.sum() / after.tokens_N.sum())
  report.time_bar(summary['seconds_by_cause'], out / 'time.png', title=folder.name)
  report.write_summary(out, summary)
  return summary


def _sample(question, before: str, after: str, tokenizer) -> str:
  prompt, reference, _ = held_out_answers.parts(question.example, tokenizer)
  asked = question.messages[-2]['content'] if len(question.messages) > 1 else tokenizer.decode(prompt)
  return (f'---- {question.where}\n{asked}\n  reference  {reference.strip()}\n  before     {before.strip()}\n'
          f'  after      {after.strip()}\n')


def closing(summary: dict, folder: pathlib.Path) -> str:
  """What came out, before beside after, and what to do next."""
  work = f"--gin_bindings='WORKDIR = \"{folder}\"'"
  ahead = [f'watch         tensorboard --logdir={folder}/tensorboard   (pip install tensorboard)']
  if summary['trained'] == summary['parameters']:
    ahead.insert(0, f'talk to it    python experiments/generate.py --gin_file=generate.gin {work}')
  elif (folder / 'adapter').is_dir():
    given = {'SOURCE': summary['source'], 'PATH': f'{folder}/adapter', 'TARGET': f'{folder}_merged'}
    ahead.insert(0, 'merge it      python experiments/merge.py --gin_file=merge.gin '
                 + ' '.join(f"--gin_bindings='{name} = \"{value}\"'" for name, value in given.items()))
  rows = [f'{"held out":<12}{"":<20}{"asked":>7}{"before":>10}{"after":>10}{"difference":>12}'
          f'   {summary["level"]:.0%} interval, paired']
  for row in summary['held_out']:
    place = PLACES.get(row['measure'], '{:.1%}')
    shown = [place.format(row[name]) for name in ('before', 'after', 'difference', 'low', 'high')]
    rows.append(f'{"":<12}{row["measure"]:<20}{row["questions"]:>7,}{shown[0]:>10}{shown[1]:>10}{shown[2]:>12}'
                f'   {shown[3]} to {shown[4]}')
  return '\n'.join([*report.effort(summary), '', *rows, '',
                    f'report      {folder}/report: loss.png, time.png, samples.txt, summary.json',
                    *(f'{"" if i else "next":<12}{line}' for i, line in enumerate(ahead))])
