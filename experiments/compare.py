"""Does a method help? Train with and without it, over several seeds, and compare held-out losses.

    python experiments/compare.py dtr                       DTR, random masks, and no routing
    python experiments/compare.py masked --steps 500        MT-Diffusion: what its head costs
    python experiments/compare.py label --steps 200         the same, with a class beside z_0

A run is train.py with the options of one arm and one seed. Arms of a comparison share pictures,
noise and timesteps, which follow from the seed. A comparison that was interrupted resumes.

Only losses of the same forward process may be compared. With aggregation z_t holds a part of x
besides z_0, so the least possible loss is another: such an arm may have the larger loss and draw as
well. Each row therefore names its control, which differs in one thing and never in the process.
Whether aggregation helps, a loss cannot say; that takes a measure of samples.
"""
import shlex
from pathlib import Path

import numpy as np

import common
from hub import Parser, UserError, command, replacing, write_json

SCRATCH = "--task t2i --model scratch --batch-size 16 --lr 1.5e-3"
MASKED = "--task masked --model scratch --unet adm-tiny --batch-size 16 --lr 1e-3"
LABEL = "--task label --batch-size 16 --lr 1e-3"
# w = 0 is a model without aggregation; lambda = 0 one whose head passes no gradient on.
NO_AGGREGATION = " --schedule zero"
NO_HEAD = " --modality-weight 0"

# Name of the comparison -> arm -> options of train.py, and the arm that it is compared with.
ARMS = {
    "dtr": {
        "no routing": (SCRATCH, None),
        "DTR": (SCRATCH + " --routing dtr", "no routing"),
        "R-TR (random)": (SCRATCH + " --routing random", "no routing"),
    },
    "masked": {
        "plain": (MASKED + NO_AGGREGATION + NO_HEAD, None),
        "U, w = 0": (MASKED + NO_AGGREGATION, "plain"),
        "U, lambda = 0": (MASKED + NO_HEAD, None),
        "U": (MASKED, "U, lambda = 0"),
        "X, lambda = 0": (MASKED + " --input x" + NO_HEAD, None),
        "X": (MASKED + " --input x", "X, lambda = 0"),
    },
    "label": {
        "plain": (LABEL + NO_AGGREGATION + NO_HEAD, None),
        "M, w = 0": (LABEL + NO_AGGREGATION, "plain"),
        "M, lambda = 0": (LABEL + NO_HEAD, None),
        "M": (LABEL, "M, lambda = 0"),
        "M, none dropped": (LABEL + " --drop 0", "M"),
        "E": (LABEL + " --head classifier", "M, lambda = 0"),
    },
}


def folder_of(args, arm, seed):
    name = "".join(c if c.isalnum() else "-" for c in arm.lower())
    return Path(args.out) / f"{name}-{seed}"


def run_arm(arm, seed, args):
    """Train one arm with one seed -> its rows of log.jsonl that hold held-out losses."""
    options, _ = ARMS[args.comparison][arm]
    out = folder_of(args, arm, seed)
    every = str(max(1, args.steps // 6))
    rows = common.train(
        [*shlex.split(options), "--steps", str(args.steps), "--seed", str(seed),
         "--eval-size", str(args.eval_size), "--eval-every", every, "--save-every", every,
         "--sample-every", "0", "--precision", args.precision], out, args.jobs)
    print(f"{arm}, seed {seed}: {rows[-1]['held_out']}", flush=True)
    return rows


def first(losses):
    """The denoising loss, which comes before those of MT-Diffusion's heads."""
    return next(iter(losses.values()))


def draw_curves(curves, steps, controls, path):
    """Draw a panel for each forward process: the arms that share it, in bands over their seeds.

    curves: arm -> array (seeds, M). The first quarter is left out: its fall hides the rest.
    """
    plt = common.pyplot()
    roots = [arm for arm in curves if controls[arm] is None]
    figure, panels = plt.subplots(1, len(roots), squeeze=False, layout="constrained",
                                  figsize=(5.4 * len(roots), 4.0))
    begin = len(steps) // 4
    for arm, values in curves.items():
        root = arm
        while controls[root] is not None:
            root = controls[root]
        axes = panels[0, roots.index(root)]
        values = values[:, begin:]
        line, = axes.plot(steps[begin:], values.mean(axis=0), label=arm)
        axes.fill_between(steps[begin:], values.min(axis=0), values.max(axis=0), alpha=0.2,
                          color=line.get_color())
    for axes in panels[0]:
        axes.set(xlabel="step", ylabel="held-out loss")
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=100)


def main():
    parser = Parser("Train with and without a method and compare held-out losses.")
    parser.add_argument("comparison", choices=tuple(ARMS), help="which arms to train")
    parser.add_argument("--steps", type=int, default=600, help="steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm: seeds 0, 1, ..")
    parser.add_argument("--eval-size", type=int, default=256,
                        help="held-out examples, each with its own noise and timestep")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="precision of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, sharing the cores")
    parser.add_argument("--out", help="folder; without it runs/compare-COMPARISON")
    args = parser.parse_args()
    if min(args.steps, args.seeds, args.jobs) < 1 or args.eval_size < 4:
        raise UserError(f"--steps {args.steps}, --seeds {args.seeds} and --jobs {args.jobs} are at "
                        f"least 1, and --eval-size {args.eval_size} is at least 4")
    args.out = args.out or f"runs/compare-{args.comparison}"
    arms = ARMS[args.comparison]

    # All arms of seed 0 come first, so that an unfinished comparison is a fair one.
    pairs = [(arm, seed) for seed in range(args.seeds) for arm in arms]
    results = common.in_parallel(lambda pair: run_arm(*pair, args), pairs, args.jobs)
    rows = {arm: [r for (name, _), r in zip(pairs, results) if name == arm] for arm in arms}

    steps = [row["step"] for row in results[0]]
    curves = {arm: np.array([[first(row["held_out"]) for row in run] for run in rows[arm]])
              for arm in arms}
    ends = {arm: np.array([[*first(run[-1]["held_out_by_t"]), first(run[-1]["held_out"])]
                           for run in rows[arm]])
            for arm in arms}
    columns = common.range_names(len(next(iter(ends.values()))[0]) - 1)
    controls = {arm: control for arm, (_, control) in arms.items()}
    common.print_table(f"held-out loss after {args.steps} steps", columns, ends, controls)

    out = Path(args.out)
    write_json(out / "table.json", dict(
        arguments=vars(args), arms=arms, ranges=columns, steps=steps,
        losses={arm: values.tolist() for arm, values in ends.items()},
        curves={arm: values.tolist() for arm, values in curves.items()}))
    draw_curves(curves, steps, controls, out / "curve.png")
    print(f"\n{out / 'table.json'}, {out / 'curve.png'}")


if __name__ == "__main__":
    command(main)
