"""DTR's claim: routed, the same network draws better after the same training.

    python experiments/dtr.py --data FOLDER             stages for 90 minutes; again, to go on
    python experiments/dtr.py --report                  table and figure of what is there

In the paper DTR lowers DiT-S's FID on ImageNet from 44.3 to 37.4 and DiT-B's from 28.0 to 16.6, and
random masks (R-TR) raise DiT-L's from 12.6 to 16.2. Here DiT-tiny, 1.9 million parameters, learns
Fashion-MNIST at 16 x 16 with its classes. The arms have the same first weights, pictures, noise and
timesteps. What differs from the paper beside size and data: batches of 128 and a learning rate of
5e-4 (there 256 and 1e-4, for networks of 384 channels and more), a warm-up of 200 steps, and
pictures drawn without guidance in 50 steps of DDIM (there scale 1.5 and 250 steps of DDPM).

Measured is the Frechet distance of 2,000 drawings from the 10,000 test pictures in the features of
a small classifier (frame.py; not FID), and the kernel distance. plain against DTR is the claim, and
DTR against R-TR says whether what neighbours share is what helps.

With --adm, ADM-tiny asks whether DTR gains less in a U-Net, whose up blocks lose only skip channels
at low t and only the backbone's at high t: its third arm has a window for each of them.

The order is by seed, then by arm, and each run goes through its four quarters before the next one
begins: after an interruption only the folder of the unfinished run is needed. Rule for stopping
early: none.
"""
import functools
from pathlib import Path

import common  # noqa: F401  puts the project's folder on the path
import frame
from hub import Parser, UserError, command

# The learning rate is constant, as in the official code. So a longer run repeats the shorter one,
# and the quarters are four moments of one run.
OPTIONS = ("--task class --model scratch --unet dit-tiny --beta-schedule squaredcos_cap_v2 "
           "--batch-size 128 --lr 5e-4 --lr-schedule constant --warmup 200")

# Arm -> what it adds to the options, and its number of seeds.
ARMS = {
    "plain": ("", 3),
    "DTR": (" --routing dtr", 3),
    "R-TR": (" --routing random", 1),
}
# Whether DTR still helps beside weights of the loss: the paper finds that it does.
WEIGHTED = {
    "plain, Min-SNR": (" --loss-weight min-snr", 1),
    "DTR, Min-SNR": (" --routing dtr --loss-weight min-snr", 1),
    "plain, ANT-UW": (" --loss-weight uw", 1),
    "DTR, ANT-UW": (" --routing dtr --loss-weight uw", 1),
}
# A U-Net, where one window for [backbone, skip] hides the one or the other. Batches are smaller, or
# an arm would take hours.
ADM_OPTIONS = "--task class --batch-size 32 --lr 5e-4 --lr-schedule constant --warmup 200"
ADM = {
    "ADM, plain": ("", 2),
    "ADM, DTR": (" --routing dtr", 2),
    "ADM, halves": (" --routing halves", 2),
}


def make_stages(args, measure):
    """List the stages: by seed, by arm, by quarter. measure(folder, draws=) -> distances."""
    arms = ARMS | (WEIGHTED if args.weighted else {}) | (ADM if args.adm else {})
    ends = [args.steps * number // 4 for number in range(5)]
    stages = []
    for seed in range(args.seeds):
        for arm, (options, seeds) in arms.items():
            if seed >= seeds:
                continue
            base = OPTIONS
            if arm in ADM:
                base = f"{ADM_OPTIONS} --model " + str(frame.fresh_model(
                    f"{args.out}/new-adm-{seed}", "adm-tiny", seed, frame.CLASSES))
            folder = Path(args.out) / f"{frame.slug(arm)}-{seed}"
            for start, step in zip(ends, ends[1:]):
                # How far two draws from one network differ is shown once.
                draws = 3 if (arm, seed, step) == ("plain", 0, args.steps) else 1
                stages.append(frame.Stage(
                    arm, seed, step, functools.partial(measure, folder, draws=draws),
                    pictures=draws * args.count, options=base + options, out=folder,
                    start=start))
    return stages


def main():
    parser = Parser("Compare DiT-tiny with and without DTR on Fashion-MNIST.")
    frame.add_options(parser, "dtr")
    parser.add_argument("--steps", type=int, default=8000, help="steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="at most so many seeds of an arm")
    parser.add_argument("--weighted", action="store_true",
                        help="add arms with Min-SNR and with ANT-UW, one seed each")
    parser.add_argument("--adm", action="store_true", help="add ADM-tiny without masks, with DTR's "
                        "and with a window for each half of what its up blocks concatenate")
    args = frame.parse_args(parser)
    if args.steps < 4 or args.seeds < 1:
        raise UserError("--steps is at least 4 and --seeds at least 1")
    if not args.report:
        runner = frame.Runner(args, dict(options=OPTIONS, steps=args.steps))
        stages = make_stages(args, runner.frame.measure)
        runner.announce(stages)
        runner.run(stages)
    frame.report(args.results)


if __name__ == "__main__":
    command(main)
