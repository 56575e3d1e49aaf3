"""Pictures of a report: bars by subject or source, and whether models are right as often as they say."""
from collections.abc import Sequence
import pathlib
import re

from lmlib.eval import calibration
from lmlib.eval.scoreboard import Result

COLORS = '#1f4e79', '#c05020', '#5b8c3e', '#7a4f9a', '#b8912f', '#4a9a98'
MOST = 60  # groups in one picture: those on which the models are worst


def draw(folder: pathlib.Path, results: Sequence[Result]) -> list[pathlib.Path]:
  """Draws what there is to see: <task>_<metric>.png of groups, <task>_reliability.png of confidences; their paths."""
  found = []
  for (task, metric), mine in _together(results).items():
    plain = lambda text: re.sub(r'[^\w.-]+', '_', text)
    if len({group for one in mine for group in one.groups or ()}) > 1:
      found.append(bars(mine, folder / f'{plain(task)}_{plain(metric)}.png'))
    if any(one.confidence for one in mine):
      found.append(reliability(mine, folder / f'{plain(task)}_reliability.png'))
  return found


def bars(results: Sequence[Result], path: pathlib.Path) -> pathlib.Path:
  """A bar for each group and model, the worst group at the top."""
  first = results[0]
  by_group = [one.by_group() for one in results]
  worst = sorted(by_group[0], key=by_group[0].__getitem__, reverse=not first.higher_is_better)[:MOST]
  height = 0.8 / len(results)
  figure, axes = _axes(8, 1.9 + len(worst) * max(0.28, 0.16 * len(results)))
  for n, (one, groups) in enumerate(zip(results, by_group)):
    at = [i + (n - (len(results) - 1) / 2) * height for i in range(len(worst))]
    drawn = axes.barh(at, [groups.get(name, 0.0) for name in worst], height * 0.92, color=COLORS[n % len(COLORS)],
                      label=one.model)
    if len(worst) * len(results) <= 40:
      axes.bar_label(drawn, fmt='%.3g', padding=3, fontsize=8)
    axes.axvline(one.score, color=COLORS[n % len(COLORS)], linestyle='--', linewidth=1)
  axes.set_yticks(range(len(worst)), [name.replace('_', ' ')[:48] for name in worst], fontsize=9)
  axes.invert_yaxis()
  axes.margins(x=0.1)
  axes.set(xlabel=first.metric.replace('_', ' '), title=f'{first.task.replace("_", " ")}; dashed: of all')
  figure.legend(frameon=False, loc='outside lower center', ncols=4)
  axes.grid(axis='x', alpha=0.25)
  figure.savefig(path, dpi=120)
  return path


def reliability(results: Sequence[Result], path: pathlib.Path) -> pathlib.Path:
  """Accuracy by confidence (Guo et al. 2017, figure 1): a dot an interval, larger where it holds more answers."""
  figure, axes = _axes(6, 5.4)
  axes.plot([0, 1], [0, 1], color='#888888', linestyle=':', linewidth=1, label='as right as confident')
  for n, one in enumerate(results):
    if one.confidence:
      bins = calibration.bins(one.confidence, one.values)
      error = calibration.expected_error(one.confidence, one.values)
      across, up = [b.confidence for b in bins], [b.accuracy for b in bins]
      color = COLORS[n % len(COLORS)]
      axes.plot(across, up, color=color, linewidth=1.2, label=f'{one.model}, error {error:.3f}')
      axes.scatter(across, up, [20 + 200 * b.count / len(one.values) for b in bins], color=color, alpha=0.7)
  axes.set(xlim=(-0.02, 1.02), ylim=(-0.04, 1.04), xlabel='confidence', ylabel='accuracy',
           title=results[0].task.replace('_', ' '))
  axes.grid(alpha=0.25)
  axes.legend(frameon=False, loc='upper left')
  figure.savefig(path, dpi=120)
  return path


def _together(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
  found: dict[tuple[str, str], list[Result]] = {}
  for one in results:
    found.setdefault((one.task, one.metric), []).append(one)
  return found


def _axes(width: float, height: float):
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  figure = Figure(figsize=(width, height), layout='constrained')
  FigureCanvasAgg(figure)
  return figure, figure.add_subplot()
