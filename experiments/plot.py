"""Draw the loss curves of runs of train.py.

    python experiments/plot.py runs/a runs/b
    python experiments/plot.py runs/a runs/b --held-out --by-t

There is one panel for each task, and one colour for each run. The loss of a single step is noisy:
most of its variance comes from t, because an example is easy at one timestep and hard at another.
So the faint line is what log.jsonl holds, and the strong one its running mean. With --held-out the
panels show the loss on fixed held-out examples instead, which needs a run with --eval-every; with
--by-t there is a panel for each range of timesteps as well.
"""
import math
from pathlib import Path

import numpy as np

import common
from hub import Parser, UserError, command, replacing

RANGES = 4  # train.py logs the loss in this many equal ranges of timesteps


def read_curves(folder, key):
    """Read the losses of a run -> {task: (steps (M,), losses (M, 1 + RANGES))}.

    key: "loss" or "held_out". Column 0 is the loss of all t. What a row lacks is NaN, and rows
    that say nothing about a task are left out, so a log may hold lines of your own.
    """
    points = {}
    for row in common.read_log(folder):
        losses = as_dict(row.get(key))
        by_t = as_dict(row.get(f"{key}_by_t"))
        for task, loss in losses.items():
            # A range that no sample fell into since the last row is null.
            ranges = by_t.get(task)
            if not isinstance(ranges, list) or len(ranges) != RANGES:
                ranges = [None] * RANGES
            values = [as_number(value) for value in (loss, *ranges)]
            points.setdefault(task, {})[row["step"]] = values
    return {task: (np.array(sorted(steps)), np.array([steps[step] for step in sorted(steps)]))
            for task, steps in points.items()}


def as_dict(value):
    return value if isinstance(value, dict) else {}


def as_number(value):
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def smoothed(values, width):
    """The mean of up to `width` values that end at each one; NaN does not count."""
    result = np.full(len(values), np.nan)
    for i in range(len(values)):
        window = values[max(0, i - width + 1):i + 1]
        if np.isfinite(window).any():
            result[i] = np.mean(window[np.isfinite(window)])
    return result


def draw_line(axes, name, steps, values, width):
    """Draw one run's curve: faint as it is, and strong as its running mean."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    line, = axes.plot(steps, smoothed(values, width), label=name, linewidth=1.5)
    if width > 1:
        axes.plot(steps, values, color=line.get_color(), linewidth=0.7, alpha=0.3)


def draw(runs, key, by_t, width):
    """Draw {name of a run: read_curves(...)} -> a matplotlib figure, one row for each task."""
    tasks = list(dict.fromkeys(task for curves in runs.values() for task in curves))
    titles = common.range_names(RANGES)
    # Losses at small and at large t differ by up to an order of magnitude, so each has its panel.
    columns = [*range(1, RANGES + 1), 0] if by_t else [0]  # all t is the last panel
    plt = common.pyplot()
    figure, panels = plt.subplots(len(tasks), len(columns), squeeze=False, layout="constrained",
                                  figsize=(4.2 * len(columns) + 1.0, 2.6 * len(tasks) + 0.4))
    for row, task in zip(panels, tasks):
        for axes, column in zip(row, columns):
            for name, curves in runs.items():
                if task in curves:
                    steps, losses = curves[task]
                    draw_line(axes, name, steps, losses[:, column], width)
            axes.set_title(f"{task}, t = {titles[column - 1]}" if column else f"{task}, all t")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("held-out loss" if key == "held_out" else "training loss")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    panels[0][0].legend()
    return figure


def main():
    parser = Parser("Draw the loss curves of runs of train.py.")
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--held-out", action="store_true",
                        help="draw the held-out loss, of runs with --eval-every")
    parser.add_argument("--by-t", action="store_true",
                        help="also draw a panel for each range of timesteps")
    parser.add_argument("--smooth", type=int, default=10,
                        help="rows of log.jsonl in the running mean of the training loss")
    parser.add_argument("--out", default="samples/curves.png", help="the picture")
    args = parser.parse_args()
    key = "held_out" if args.held_out else "loss"
    runs = {folder: read_curves(folder, key) for folder in args.runs}
    for folder, curves in runs.items():
        if not curves:
            more = "; train with --eval-every" if args.held_out else ""
            raise UserError(f"{folder}/log.jsonl holds no line with \"{key}\"{more}")
    width = 1 if args.held_out else max(1, args.smooth)
    figure = draw(runs, key, args.by_t, width)
    with replacing(Path(args.out)) as beside:
        figure.savefig(beside, format="png", dpi=100)
    for folder, curves in runs.items():
        ends = [f"{task} {smoothed(losses[:, 0], width)[-1]:.4f}"
                for task, (_, losses) in curves.items()]
        print(f"{folder}: at the end {', '.join(ends)}")
    print(args.out)


if __name__ == "__main__":
    command(main)
