"""What a run says of itself: tables for the screen, report/ with pictures, samples and figures."""
import json
import os
import pathlib
import statistics

from lmlib import processes
from lmlib.eval import held_out
from lmlib.eval.perplexity import Score
from lmlib.train import goodput, metrics

# Of goodput.CAUSES, in their order: what counts is dark.
TIME_COLORS = '#1f4e79', '#8fb0d0', '#b8912f', '#5b8c3e', '#7a4f9a', '#c05020', '#8c2d2d', '#cccccc', '#888888'


def opening(facts: dict, folder: pathlib.Path, start: int, steps: int) -> str:
  """The model, the devices and the folder, before the first step."""
  peak = f', peak {facts["peak_flops"] / 1e12:.3g} TFLOP/s' if facts['peak_flops'] else ''
  where = f'going on after step {start} of {steps}' if start else f'{steps} steps'
  return (f'model       {facts["parameters"]:,} weights; {facts["flops_per_token"] / 1e6:,.1f} MFLOP a token to train '
          f'(6ND: {facts["flops_per_token_6nd"] / 1e6:,.1f})\n'
          f'mesh        {mesh(facts)}{peak} ({facts["peak_source"]})\n{layout(facts)}'
          f'workdir     {folder}: {where}')


def mesh(facts: dict) -> str:
  """The mesh axes of several devices: 'data 4 x fsdp 2'."""
  return ' x '.join(f'{name} {size}' for name, size in facts['mesh'].items() if size > 1) or 'one device'


def layout(facts: dict) -> str:
  """The line that says what a layout does with the weights, or nothing where there is one device."""
  return f'layout      {facts["layout"]}\n' if facts.get('layout') else ''


def write(folder: pathlib.Path, *, score: Score | held_out.Score, others: dict[str, float], samples,
          facts: dict) -> dict:
  """Writes report/ (loss.png, time.png, samples.txt, summary.json); returns the figures of the summary.

  others: bits per byte of compressors; samples: pairs of a prompt and what follows; both empty of what writes no text.
  Of several processes the first one writes.
  """
  return processes.told('report', lambda: _written(folder, score, others, samples, facts))


def _written(folder: pathlib.Path, score, others: dict, samples, facts: dict) -> dict:
  out = folder / 'report'
  out.mkdir(exist_ok=True)
  lines = metrics.read(folder / 'metrics.jsonl')
  beside = {'compressors_bits_per_byte': others} if others else {}
  summary = score.figures() | beside | {'parameters': facts['parameters']} | spent(lines) | {
      'seconds_by_cause': goodput.of(folder)}
  if 'bits_per_byte' in summary:
    (out / 'samples.txt').write_text(''.join(
        f'---- {prompt!r} is continued\n{prompt}{continued}\n\n' for prompt, continued in samples))
  loss_curve(lines, out / 'loss.png', title=folder.name, level=score.nats_per_token)
  time_bar(summary['seconds_by_cause'], out / 'time.png', title=folder.name)
  write_summary(out, summary)
  return summary


def finished(folder: pathlib.Path, step: int) -> dict | None:
  """The summary in report/ of a run that has ended at this step; None if there is none."""
  path = folder / 'report' / 'summary.json'
  found = processes.told('summary.json', lambda: json.loads(path.read_text()) if path.exists() else None)
  return found if found and found['steps'] == step else None


def spent(lines: list[dict]) -> dict:
  """Steps, tokens, time and memory of a run, from its metrics.jsonl."""
  steady = lines[1:] or lines  # the first step compiles
  return {'steps': lines[-1]['step'],
          'tokens': lines[-1]['tokens'], 'loss': lines[-1]['loss'], 'seconds': sum(line['seconds'] for line in lines),
          'seconds_waited_for_data': sum(line['waited'] for line in lines),
          'seconds_saving': sum(line['saving'] for line in lines),
          'tokens_per_second': statistics.median(line['tokens_per_second'] for line in steady),
          'mfu': statistics.median(line['mfu'] for line in steady) if 'mfu' in lines[-1] else None,
          'memory_bytes': lines[-1]['memory_bytes'], 'steps_skipped': sum(not line['finite'] for line in lines)}


def write_summary(out: pathlib.Path, summary: dict):
  """Writes summary.json, last and whole: it says that the report is written."""
  fresh = out / 'summary.json.tmp'
  fresh.write_text(json.dumps(summary, indent=2) + '\n')
  os.replace(fresh, out / 'summary.json')


def closing(summary: dict, folder: pathlib.Path) -> str:
  """What came out and what to do next."""
  writes = 'bits_per_byte' in summary
  work = f"--gin_bindings='WORKDIR = \"{folder}\"'"
  ahead = [
      f'talk to it    python experiments/generate.py --gin_file=generate.gin {work}',
      f'score text    python experiments/evaluate.py --gin_file=evaluate.gin {work} '
      "--gin_bindings='GLOB = \"texts/*.txt\"'"] if writes else []
  ahead += [
      f'watch         tensorboard --logdir={folder}/tensorboard   (pip install tensorboard)',
      'scale         python experiments/pretrain.py --gin_file=pretrain_dense_124m.gin',
      'your text     python experiments/pretrain.py --gin_file=text_files.gin '
      "--gin_bindings='GLOB = \"texts/**/*.txt\"'"]
  return '\n'.join([
      *effort(summary), '',
      *_scored(summary), '',
      f'report      {folder}/report: loss.png, time.png, {"samples.txt, " if writes else ""}summary.json',
      *(f'{"" if i else "next":<12}{line}' for i, line in enumerate(ahead))])


def effort(summary: dict) -> list[str]:
  """How long it took."""
  mfu = f', {metrics.utilisation(summary["mfu"], 0)}' if summary['mfu'] else ''
  skipped = f', {summary["steps_skipped"]} steps skipped as not finite' if summary['steps_skipped'] else ''
  causes = summary['seconds_by_cause']
  return [f'trained     {summary["steps"]:,} steps, {summary["tokens"]:,} tokens in '
          f'{metrics.clock(summary["seconds"])}; {summary["tokens_per_second"]:,.0f} tokens/s{mfu}{skipped}',
          *([f'goodput     {goodput.said(causes)}'] if causes else [])]


def _scored(summary: dict) -> list[str]:
  """What the model made of the held-out documents."""
  if 'bits_per_byte' in summary:
    rows = [('this model', summary['bits_per_byte']), *summary.get('compressors_bits_per_byte', {}).items()]
    return [f'held out    {summary["held_out_bytes"] / 1e6:.2f} MB in whole documents, none seen in training; '
            'bits per byte', *(f'            {name:<16}{value:.3f}' for name, value in rows)]
  return [f'held out    {summary["hidden_tokens"]:,} tokens that {summary["objective"]} hides in documents not seen '
          f'in training, of {summary["read_tokens"]:,}; nats a hidden token',
          f'            {"this model":<16}{summary["hidden_nats"]:.3f}   {summary["hidden_accuracy"]:.1%} are guessed',
          f'            {"unread":<16}{summary["blind_nats"]:.3f}   by how often each token comes']


def loss_curve(lines: list[dict], path: pathlib.Path, *, title: str, level: float | None = None):
  """Draws the cross-entropy of every step of metrics.jsonl, its mean over 2 % of the run, and that of held-out text."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  lines = [line for line in lines if line['nats'] is not None]
  steps, loss = [line['step'] for line in lines], [line['nats'] for line in lines]
  figure = Figure(figsize=(8, 4.5), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  axes.plot(steps, loss, color='#b8cbe0', linewidth=0.8, label='every step')
  wide = max(1, len(loss) // 50)
  smooth = [statistics.fmean(loss[max(0, i - wide + 1):i + 1]) for i in range(len(loss))]
  axes.plot(steps, smooth, color='#1f4e79', linewidth=1.8, label=f'mean of {wide} steps')
  if level is not None:
    axes.axhline(level, color='#c05020', linestyle='--', linewidth=1.2, label='held-out documents, at the end')
  axes.set(xlabel='step', ylabel='cross-entropy (nats a token)', title=f'Training loss of {title}')
  axes.grid(alpha=0.25)
  axes.legend(frameon=False)
  figure.savefig(path, dpi=120)


def time_bar(seconds: dict[str, float], path: pathlib.Path, *, title: str):
  """Draws where the time of a run went (goodput.of), one bar of all its causes; nothing if none is known."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  total, left = sum(seconds.values()), 0.0
  if not total:
    return
  figure = Figure(figsize=(8, 2.6), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  for color, (cause, spent) in zip(TIME_COLORS, seconds.items(), strict=True):
    if spent >= 0.0005 * total:
      axes.barh(0, spent / total, left=left, color=color, label=f'{goodput.CAUSES[cause]} {spent / total:.1%}')
      left += spent / total
  axes.set(xlim=(0, 1), yticks=[], xlabel=f'share of {metrics.clock(total)}', title=f'Where the time of {title} went')
  axes.xaxis.set_major_formatter(lambda share, _: f'{share:.0%}')
  figure.legend(frameon=False, loc='outside lower center', ncols=3, fontsize=9)
  figure.savefig(path, dpi=120)
