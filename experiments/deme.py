"""Does DeMe help? One copy per timestep range, merged, beside ordinary fine-tuning of equal cost.

    python experiments/deme.py --steps 400
    python experiments/deme.py --model runs/ddpm --task uncond --steps 1000

Each copy trains for --steps, and each control for N times as many, so that all of them see the same
number of samples. The controls differ from DeMe in one thing after the other:

    fine-tuning                 train.py as it is, on all timesteps: what the paper starts from
    fine-tuning, consistency    the same with the second term of Eq. 5, which holds the network near
                                the pretrained one; half of its optimum is the pretrained output
    copies, merged              one copy per range: ensemble, 1/N each, searched weights

The learning rate is constant and has no warm-up, as in the official code. With a warm-up and a
cosine, one long run would learn more than N short ones. Every copy has a seed of its own, or all
copies would see the same pictures and the same noise, N times fewer than the controls see. The base
should be trained until more training no longer helps; else the controls win by training longer.

The losses are those of held-out examples that no search has seen. Differences from the official
recipe: AdamW's betas are 0.9 and 0.999 (0.95 and 0.999 there), the average of the weights warms up
in another way, and there are no channel projections unless --projection is given.
"""
import shlex
from pathlib import Path

import numpy as np

import common
import merge
import train
from data import ASSETS
from hub import Parser, UserError, command, pick_device, write_json
from sample import load_model

RECIPE = "--batch-size 16 --lr 5e-5 --lr-schedule constant --warmup 0 --weight-decay 1e-6"
REFERENCE = "fine-tuning"


def tune(args, name, options, *, steps, seed):
    """Fine-tune the base -> the folder of the run, which resumes where it was interrupted."""
    folder = Path(args.out) / f"{name}-{seed}"
    common.train(
        [*shlex.split(RECIPE), "--task", args.task, "--model", args.model, *options,
         "--steps", str(steps), "--seed", str(seed), "--save-every", str(max(1, steps // 6)),
         "--sample-every", "0", "--precision", args.precision], folder, args.jobs)
    return folder


def measure(args, copies, seed):
    """Merge copies of the base in every way -> timesteps (M,) and {arm: losses (M,)}.

    It is what `merge.py --search` prints, example by example. The seed decides which half of the
    held-out examples the search sees, so that all calls with one seed report the same other half.
    """
    device = pick_device()
    model = load_model(args.model, device=device)
    examples = train.held_out_examples([args.task], None, model, args.eval_size)
    losses = merge.merged_losses(model, copies, device)
    _, t, arms = merge.compare_arms(losses, examples, len(copies), model.diffusion.T, seed)
    return t, arms


def run_seed(args, seed):
    """Train and measure all arms with one seed -> {arm: losses per range and of all t}."""
    n = args.copies
    # No two runs of all repetitions that should be independent share a seed, and so their draws.
    first_seed = 100 * seed
    ranges = merge.timestep_ranges(1000, n)
    consistency = ["--consistency", "1", "--p-global", "0.3"]
    projection = ["--projection"] if args.projection else []

    fine_tuned = tune(args, "plain", [], steps=n * args.steps, seed=first_seed)
    # The range of all timesteps: the consistency term alone is what differs.
    consistent = tune(args, "consistency", ["--t-range", "0", "1000", *consistency],
                      steps=n * args.steps, seed=first_seed)
    copies = []
    for i, (start, end) in enumerate(ranges):
        options = ["--t-range", str(start), str(end), *consistency, *projection]
        copies.append(tune(args, f"range-{i}", options, steps=args.steps, seed=first_seed + i))

    t, arms = measure(args, copies, seed)
    arms = {arm: losses for arm, losses in arms.items() if not arm.startswith("copy")}
    for name, folder in ((REFERENCE, fine_tuned), ("fine-tuning, consistency", consistent)):
        _, single = measure(args, [folder], seed)
        arms[name] = single["copy 0"]
    # Per range, as the paper's question is where in t a method gains.
    bins = t * n // 1000
    table = {arm: [*[losses[bins == i].mean() for i in range(n)], losses.mean()]
             for arm, losses in arms.items()}
    print(f"seed {seed}: " + ", ".join(f"{arm} {row[-1]:.4f}" for arm, row in table.items()),
          flush=True)
    return table


def main():
    parser = Parser("Compare DeMe with ordinary fine-tuning of equal cost.")
    parser.add_argument("--model", default=str(ASSETS / "tiny"), help="the base: a folder")
    parser.add_argument("--task", default="t2i", help="the task of the base")
    parser.add_argument("--steps", type=int, default=400, help="steps of each copy")
    parser.add_argument("--copies", type=int, default=4, help="N, the number of ranges")
    parser.add_argument("--projection", action="store_true",
                        help="give the copies channel projections")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions: seeds 0, 1, ..")
    parser.add_argument("--eval-size", type=int, default=256,
                        help="held-out examples; one half is for the search")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="precision of the runs")
    parser.add_argument("--jobs", type=int, default=2,
                        help="seeds at a time, each with its share of the CPU's cores")
    parser.add_argument("--out", default="runs/deme-comparison", help="folder for runs and table")
    args = parser.parse_args()
    if args.eval_size % (2 * args.copies):
        raise UserError(f"--eval-size {args.eval_size} must be a multiple of {2 * args.copies}, so "
                        "that all arms report the same examples")

    results = common.in_parallel(lambda seed: run_seed(args, seed), range(args.seeds), args.jobs)
    rows = {arm: np.array([table[arm] for table in results]) for arm in results[0]}
    columns = common.range_names(args.copies)
    controls = {arm: None if arm == REFERENCE else REFERENCE for arm in rows}
    common.print_table(f"held-out loss after {args.copies * args.steps} steps in all", columns,
                       rows, controls)
    table = Path(args.out) / "table.json"
    write_json(table, dict(arguments=vars(args), recipe=RECIPE, ranges=columns,
                           losses={arm: values.tolist() for arm, values in rows.items()}))
    print(f"\n{table}")


if __name__ == "__main__":
    command(main)
