"""DeMe's claim: copies tuned for ranges of timesteps and merged draw better than the base.

    python experiments/deme.py --data FOLDER            stages for 90 minutes; again, to go on
    python experiments/deme.py --report                 table and figure of what is there

In the paper a DDPM on CIFAR-10 goes from FID 4.42 to 3.51, while fine-tuning it as before does not
help (4.40). So the base must be one that more training does not improve. Here DDPM-tiny, 1.7
million parameters, learns Fashion-MNIST at 16 x 16 until its distance is flat. From there, with as
many samples in all for every arm:

    before                   the base
    fine-tuning              train.py as it is, on all timesteps
    with consistency         the same and the second term of Eq. 5, which holds the network near
                             the base
    ensemble                 four copies, each for a quarter of the timesteps (Eq. 7)
    merged, 1/N              their mean (Eq. 8)
    merged, searched         with the weights whose 500 pictures in 10 steps, from other noise than
                             the reported ones, come nearest to the test pictures

The decisive line: plain fine-tuning must not help much while DeMe does, or the claim is not shown.
Every copy has a seed of its own, the learning rate is constant at the official code's 5e-5, and
there is no warm-up: with a cosine, one long run would learn more than four short ones. Different
from the official recipe: AdamW's betas are 0.9 and 0.999 (0.95 and 0.999 there), the average of the
weights warms up in another way, and there are no channel projections unless --projection is given.

Rule for stopping early, fixed before the first run: the base stops when its distance falls by less
than 3 % from one stage to the next; the tuning has no such rule.
"""
import functools
from pathlib import Path

import common  # noqa: F401  puts the project's folder on the path
import frame
import merge
from hub import Parser, UserError, command
from sample import load_model

BASE = "--task uncond --batch-size 32 --lr 5e-4 --lr-schedule constant --warmup 200"
RECIPE = ("--task uncond --batch-size 32 --lr 5e-5 --lr-schedule constant --warmup 0 "
          "--weight-decay 1e-6")
CONSISTENCY = " --consistency 1 --p-global 0.3"
# Of the search: pictures of a score, their DDIM steps, their first seed, and rounds.
SEARCH = dict(count=500, steps=10, seed=77_000_000, rounds=2)


def make_base_stages(args, measure):
    """List the stages of the base, the longest training that it may have."""
    fresh = frame.fresh_model(f"{args.out}/new", "ddpm-tiny", 0)
    ends = [args.base_steps * number // 4 for number in range(5)]
    folder = Path(args.out) / "base"
    return [frame.Stage("base", 0, step, functools.partial(measure, folder, draws=3),
                        pictures=3 * args.count, options=f"{BASE} --model {fresh}", out=folder,
                        start=start)
            for start, step in zip(ends, ends[1:])]


# -------------------------------------------------------------------------------------------------
# Merging

class Merging:
    """The base and its copies in memory. folders: the copies', in the order of their ranges."""

    def __init__(self, args, the_frame, folders):
        self.args = args
        self.frame = the_frame
        self.model = load_model(Path(args.out) / "base")
        self.unets = [load_model(folder).unet for folder in folders]
        if args.projection == "blocks":
            merge.add_projections(self.model.unet, "blocks")
        self.base = {key: value.clone() for key, value in self.model.unet.state_dict().items()}
        self.vectors = [merge.task_vector(self.base, unet.state_dict()) for unet in self.unets]

    def merged(self, weights):
        """The model with the base's weights and the weighted task vectors (Eq. 8)."""
        self.model.unet.load_state_dict(merge.merge(self.base, self.vectors, weights))
        return self.model

    def score(self, weights):
        """What the search makes small: the distance of few pictures in few steps."""
        options = {key: SEARCH[key] for key in ("count", "steps", "seed")}
        pictures = frame.draw(self.merged(weights), precision=self.args.precision, **options)
        features = frame.features_of(self.frame.classifier, pictures)
        return frame.frechet_distance(self.frame.real, features)

    def measure(self, arm):
        """Measure one way to use the copies -> a row's numbers."""
        n = len(self.unets)
        if arm == "ensemble":
            return self.frame.measure(self.model, ensemble=self.unets)
        if arm == "merged, 1/N":
            return self.frame.measure(self.merged((1 / n,) * n))
        weights, score = merge.search_weights(self.score, n, rounds=SEARCH["rounds"])
        row = self.frame.measure(self.merged(weights))
        return dict(row, weights=list(weights), searched=round(score, 5))


def make_tuning_stages(args, the_frame, seed):
    """List the stages of all arms with one seed: the controls, the copies, what is merged."""
    n, steps = args.copies, args.steps
    recipe = f"{RECIPE} --model {args.out}/base"
    options = CONSISTENCY + (f" --projection {args.projection}" if args.projection else "")
    # No two runs that should be independent share a seed, and with it their draws.
    first_seed = 100 * seed
    stages = []

    def add(arm, number, words, step, measured=True):
        folder = Path(args.out) / f"{frame.slug(arm)}-{first_seed + number}"
        measure = functools.partial(the_frame.measure, folder) if measured else dict
        stages.append(frame.Stage(arm, first_seed + number, step, measure, out=folder,
                                  pictures=args.count if measured else 0,
                                  options=recipe + words))
        return folder

    add("fine-tuning", 0, "", n * steps)
    # The range of all timesteps: the consistency term alone is what differs.
    add("with consistency", 0, f" --t-range 0 1000 {CONSISTENCY}", n * steps)
    folders = [add(f"copy {i}", i, f" --t-range {low} {high} {options}", steps, measured=False)
               for i, (low, high) in enumerate(merge.timestep_ranges(1000, n))]

    def measure_merged(arm):
        return Merging(args, the_frame, folders).measure(arm)

    # A search visits the grid for one weight after another.
    searching = SEARCH["rounds"] * 11 * n * SEARCH["count"] * SEARCH["steps"] // args.draw_steps
    for arm, more in (("ensemble", 0), ("merged, 1/N", 0), ("merged, searched", searching)):
        stages.append(frame.Stage(arm, first_seed, n * steps,
                                  functools.partial(measure_merged, arm),
                                  pictures=args.count + more))
    return stages


def main():
    parser = Parser("Compare DeMe with ordinary fine-tuning of equal cost on Fashion-MNIST.")
    frame.add_options(parser, "deme")
    parser.add_argument("--base-steps", type=int, default=48000, help="at most, of the base")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each copy")
    parser.add_argument("--copies", type=int, default=4, help="N, the number of ranges")
    parser.add_argument("--projection", choices=("convolutions", "blocks"),
                        help="give the copies channel projections")
    parser.add_argument("--seeds", type=int, default=2, help="repetitions of the tuning")
    args = frame.parse_args(parser)
    if args.base_steps < 4 or min(args.steps, args.copies, args.seeds) < 1:
        raise UserError("--base-steps is at least 4, and --steps, --copies and --seeds at least 1")
    if not args.report:
        settings = dict(base=BASE, recipe=RECIPE + CONSISTENCY, search=SEARCH, steps=args.steps,
                        base_steps=args.base_steps, copies=args.copies,
                        projection=args.projection)
        runner = frame.Runner(args, settings)
        base = make_base_stages(args, runner.frame.measure)
        tuning = [stage for seed in range(args.seeds)
                  for stage in make_tuning_stages(args, runner.frame, seed)]
        runner.announce(base + tuning)
        enough = True
        for stage in base:
            if frame.is_flat(runner.rows, "base"):
                print("the base is flat")
                break
            enough = enough and runner.run([stage])
        # The copies are tuned from wherever the base has ended.
        if enough:
            runner.run(tuning)
    # The base has trained for other steps than the tuning, so the steps are no common axis.
    frame.report(args.results, by_arm=True)


if __name__ == "__main__":
    command(main)
