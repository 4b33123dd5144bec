"""Does a method help? The same training with and without it, several seeds, held-out loss on fixed noise over training.

    python compare.py dtr --out runs/compare-dtr

Each run is `train.py` with a row of ARMS and a seed; a comparison that was interrupted goes on where it was. Prints the held-out loss per range
of timesteps at the end, mean and standard deviation over seeds, and draws the curves. Whatever the outcome.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from folders import UserError, command, write_file, write_json

SCRATCH = "--task t2i --model scratch --batch-size 16 --lr 1.5e-3"
ADM = "--task uncond --model scratch --unet adm-tiny --batch-size 16 --lr 1e-3"


def _routings(options):
    return {"no routing": options, "DTR": options + " --routing dtr", "R-TR (random)": options + " --routing random"}


ARMS = {  # name of the comparison -> arm -> arguments of train.py
    "dtr": _routings(SCRATCH), "dtr-adm": _routings(ADM),
    "loss-weights": {"none": SCRATCH, "DTR": SCRATCH + " --routing dtr"} | {
        f"{weight}, {name}": f"{SCRATCH} --loss-weight {weight}{option}" for weight in ("min-snr", "p2", "uw")
        for name, option in (("no routing", ""), ("DTR", " --routing dtr"))},
}
COLOURS = ("#222222", "#1565c0", "#c62828", "#2e7d32", "#8e24aa", "#ef6c00", "#00838f", "#6d4c41")


def train(options, out, threads):
    """One run of train.py -> its lines of log.jsonl with held-out losses."""
    log = out.with_suffix(".txt")
    with open(log, "w") as f:
        done = subprocess.run([sys.executable, str(Path(__file__).parent / "train.py"), *options, "--out", str(out)], stdout=f, stderr=f,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        last = log.read_text().strip().splitlines()[-1:] or ["killed"]
        raise UserError(f"train.py {shlex.join(options)} failed, see {log}: {last[0]}")
    return [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "held_out" in row]


def curves(series, path, size=(640, 400)):
    """series: name -> (steps (M,), losses (seeds, M)); a line through the means, a band from the least to the greatest seed, without the first
    quarter, whose fall says little."""
    series = {name: (steps[len(steps) // 4:], losses[:, len(steps) // 4:]) for name, (steps, losses) in series.items()}
    (width, height), left, low = size, 60, 40
    picture = Image.new("RGB", (2 * width, 2 * height), "white")  # drawn at twice the size, then made smaller: smooth lines
    draw = ImageDraw.Draw(picture, "RGBA")
    xs = [x for steps, _ in series.values() for x in steps]
    ys = np.concatenate([losses.flatten() for _, losses in series.values()])
    top, bottom = float(ys.max()), float(ys.min())
    top, bottom = top + 0.05 * (top - bottom), bottom - 0.05 * (top - bottom)

    def at(x, y):
        u, v = (x - min(xs)) / max(max(xs) - min(xs), 1), (y - bottom) / max(top - bottom, 1e-9)
        return 2 * (left + u * (width - left - 20)), 2 * (height - low - v * (height - low - 20))
    for k in range(6):
        y = bottom + k / 5 * (top - bottom)
        draw.line([at(min(xs), y), at(max(xs), y)], fill="#dddddd", width=2)
        draw.text((10, at(0, y)[1] - 12), f"{y:.3f}", fill="#222222", font_size=22)
    for x in sorted(set(xs)):
        draw.text((at(x, bottom)[0] - 20, 2 * (height - low) + 12), f"{x}", fill="#222222", font_size=22)
    draw.text((2 * width // 2, 2 * height - 30), "step; held-out loss", fill="#222222", font_size=22)
    for i, ((name, (steps, losses)), colour) in enumerate(zip(series.items(), COLOURS)):
        above, below = ([at(x, y) for x, y in zip(steps, edge)] for edge in (losses.max(0), losses.min(0)))
        draw.polygon(above + below[::-1], fill=colour + "33")
        draw.line([at(x, y) for x, y in zip(steps, losses.mean(0))], fill=colour, width=5)
        draw.text((2 * width - 340, 40 + 32 * i), name, fill=colour, font_size=26)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda beside: picture.resize(size, Image.LANCZOS).save(beside, format="PNG"))


def main():
    parser = argparse.ArgumentParser(description="Train with and without a method and compare held-out losses.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", choices=ARMS)
    parser.add_argument("--steps", type=int, default=600, help="of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm, seeds 0, 1 ..")
    parser.add_argument("--eval-size", type=int, default=256, help="held-out examples, each with its own noise and timestep")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on its share of the CPU's cores")
    parser.add_argument("--out", help="folder for the runs, the table and the curve; default runs/compare-WHAT")
    args = parser.parse_args()
    if min(args.steps, args.seeds, args.jobs) < 1 or args.eval_size < 4:
        raise UserError(f"--steps {args.steps}, --seeds {args.seeds} and --jobs {args.jobs} must be at least 1, --eval-size {args.eval_size} "
                        "at least 4")
    out, every = Path(args.out or f"runs/compare-{args.what}"), max(1, args.steps // 6)
    out.mkdir(parents=True, exist_ok=True)

    def run(arm, seed):
        options = shlex.split(ARMS[args.what][arm]) + ["--steps", str(args.steps), "--eval-every", str(every), "--seed", str(seed),
                                                       "--sample-every", "0", "--save-every", str(every), "--eval-size", str(args.eval_size)]
        rows = train(options, out / f"{''.join(c for c in arm.lower() if c.isalnum())}-{seed}", max(1, (os.cpu_count() or 1) // args.jobs))
        print(f"{arm}, seed {seed}: {rows[-1]['held_out']}", flush=True)
        return rows

    pairs = [(arm, seed) for seed in range(args.seeds) for arm in ARMS[args.what]]  # an equal number of each, also while it runs
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = dict(zip(pairs, pool.map(lambda pair: run(*pair), pairs)))
    task = next(iter(rows[pairs[0]][0]["held_out"]))
    series = {arm: ([row["step"] for row in rows[arm, 0]], np.array([[row["held_out"][task] for row in rows[arm, s]] for s in range(args.seeds)]))
              for arm in ARMS[args.what]}
    ends = {arm: np.array([rows[arm, s][-1]["held_out_by_t"][task] + [rows[arm, s][-1]["held_out"][task]] for s in range(args.seeds)])
            for arm in series}
    bins = len(next(iter(ends.values()))[0]) - 1
    names = [f"{1000 * i // bins}..{1000 * (i + 1) // bins - 1}" for i in range(bins)] + ["all t"]
    first = ends[next(iter(ends))][:, -1]
    print(f"\nheld-out loss after {args.steps} steps, mean (standard deviation) of {args.seeds} seeds; difference: of all t, from the first row")
    print(f"{'':<22}" + "".join(f"{name:>18}" for name in names) + f"{'difference':>20}")
    for arm, values in ends.items():
        cells = [f"{v.mean():.4f} ({v.std(ddof=args.seeds > 1):.4f})" for v in [*values.T, values[:, -1] - first]]
        print(f"{arm:<22}" + "".join(f"{cell:>18}" for cell in cells[:-1]) + f"{cells[-1]:>20}")
    write_json(out / "table.json", dict(arguments=vars(args), arms=ARMS[args.what], ranges=names, losses={arm: v.tolist() for arm, v in ends.items()},
                                        steps=series[next(iter(series))][0], curves={arm: v.tolist() for arm, (_, v) in series.items()}))
    curves(series, out / "curve.png")
    print(f"{out / 'table.json'}, {out / 'curve.png'}")


if __name__ == "__main__":
    command(main)
