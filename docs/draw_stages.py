"""Draws the figure of "Stages" in docs/parallelism.md from the schedule itself: python docs/draw_stages.py"""
import pathlib

from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from lmlib.nn.pipeline import Schedule

FOLDER = pathlib.Path(__file__).parent / 'pictures'
ROUNDS = ('#8fb4d9', '#8fc1a3')  # the colour of a round
BUBBLE, TEXT = '#f2f2f2', '#303030'
STAGES, MICROBATCHES = 4, 8


def schedules():
  """Which microbatch a stage works on in every tick; as wide as it lasts, where a tick of two rounds has half."""
  figure, axes = plt.subplots(2, 1, figsize=(10, 4.6), sharex=True)
  for axis, rounds in zip(axes, (1, 2)):
    schedule = Schedule(STAGES, MICROBATCHES, rounds)
    microbatch, turn = schedule.work()
    for tick in range(schedule.ticks):
      for stage in range(STAGES):
        here = microbatch[tick, stage]
        colour = BUBBLE if here < 0 else ROUNDS[turn[tick, stage]]
        axis.add_patch(Rectangle((tick / rounds, stage), 1 / rounds, 1, facecolor=colour, edgecolor='white'))
        if here >= 0:
          axis.text((tick + 0.5) / rounds, stage + 0.5, str(here + 1), ha='center', va='center', fontsize=8, color=TEXT)
    name = 'one round (GPipe)' if rounds == 1 else f'{rounds} rounds, half as many layers at a time'
    axis.set_title(f'{name}: {schedule.bubbles:.0%} of the time in bubbles', fontsize=10, loc='left')
    axis.set(xlim=(0, MICROBATCHES + STAGES - 1), ylim=(STAGES, 0), ylabel='stage')
    axis.set_yticks([stage + 0.5 for stage in range(STAGES)], [str(stage + 1) for stage in range(STAGES)])
    axis.tick_params(length=0)
    for side in axis.spines.values():
      side.set_visible(False)
  axes[1].set_xlabel('time, in passes of one microbatch through all layers of a stage, forward')
  colours = [Rectangle((0, 0), 1, 1, color=colour) for colour in (*ROUNDS, BUBBLE)]
  figure.legend(colours, ['first round of a microbatch', 'second round', 'bubble'], loc='lower center', ncols=3,
                frameon=False)
  figure.tight_layout(rect=(0, 0.06, 1, 1))
  figure.savefig(FOLDER / 'stages.png', dpi=110, metadata={'Software': None})
  plt.close(figure)


if __name__ == '__main__':
  FOLDER.mkdir(exist_ok=True)
  schedules()
