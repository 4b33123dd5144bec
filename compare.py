"""Does a method help? The same training with and without it, several seeds, held-out loss on fixed noise over training.

    python compare.py dtr --out runs/compare-dtr
    python compare.py masked                              MT-Diffusion: -U, -X and controls; then what is restored, beside SDEdit
    python compare.py label                               MT-Diffusion: -M, -E and controls; then what is recognised
    python compare.py deme --steps 150                    DeMe's copies, ensemble and merges beside one copy tuned as long as all of them
    python compare.py gradients --out runs/gradients      do timesteps pull the weights in the same direction? (DTR, DeMe Fig. 1)

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
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import joint
from aggregation import Classifier
from evaluate import psnr
from examples import Examples, collate
from folders import HelpFormatter, UserError, command, write_file, write_json
from sample import generate, load_model
from train import lr_factor

SCRATCH = "--task t2i --model scratch --batch-size 16 --lr 1.5e-3"
ADM = "--task uncond --model scratch --unet adm-tiny --batch-size 16 --lr 1e-3"
MASKED = ADM.replace("uncond", "masked")
LABEL_BATCH, LABEL_LR = 16, 1e-3
LABEL = f"--task label --batch-size {LABEL_BATCH} --lr {LABEL_LR}"


def _routings(options):
    return {"no routing": options, "DTR": options + " --routing dtr", "R-TR (random)": options + " --routing random"}


ARMS = {  # name of the comparison -> arm -> arguments of train.py
    "dtr": _routings(SCRATCH), "dtr-adm": _routings(ADM),
    "loss-weights": {"none": SCRATCH, "DTR": SCRATCH + " --routing dtr"} | {
        f"{weight}, {name}": f"{SCRATCH} --loss-weight {weight}{option}" for weight in ("min-snr", "p2", "uw")
        for name, option in (("no routing", ""), ("DTR", " --routing dtr"))},
    "masked": {"plain": ADM, "U": MASKED, "X": MASKED + " --input x", "U, w = 0": MASKED + " --schedule zero",
               "U, lambda = 0": MASKED + " --head-weight 0"},
    "label": {"plain": LABEL + " --schedule zero --head-weight 0", "M": LABEL, "M, none dropped": LABEL + " --drop 0",
              "M, w = 0": LABEL + " --schedule zero", "M, lambda = 0": LABEL + " --head-weight 0", "E": LABEL + " --head classifier"},
}
COLOURS = ("#222222", "#1565c0", "#c62828", "#2e7d32", "#8e24aa", "#ef6c00", "#00838f", "#6d4c41")


DEME = {  # the base, trained first where it is not a folder; how it is tuned
    "deme": (str(data.ASSETS / "tiny"), "--task t2i --batch-size 16 --lr 1e-4"),
    "deme-ddpm": ("--task uncond --model scratch --unet ddpm-tiny --batch-size 16 --lr 1e-3", "--task uncond --batch-size 16 --lr 1e-4"),
}


def ranges(n):
    return [f"{1000 * i // n}..{1000 * (i + 1) // n - 1}" for i in range(n)] + ["all t"]


def train(options, out, jobs):
    """One run of train.py, of `jobs` at a time -> its lines of log.jsonl with held-out losses."""
    log, threads = out.with_suffix(".txt"), max(1, (os.cpu_count() or 1) // jobs)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as f:
        done = subprocess.run([sys.executable, str(Path(__file__).parent / "train.py"), *options, "--out", str(out)], stdout=f, stderr=f,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        last = log.read_text().strip().splitlines()[-1:] or ["killed"]
        raise UserError(f"train.py {shlex.join(options)} failed, see {log}: {last[0]}")
    log = out / "log.jsonl"
    return [row for row in map(json.loads, log.read_text().splitlines()) if "held_out" in row] if log.exists() else []


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
    for x in [x for x in sorted(set(xs)) if x == max(xs) or at(max(xs), bottom)[0] - at(x, bottom)[0] > 60]:  # the last two may be neighbours
        draw.text((at(x, bottom)[0] - 20, 2 * (height - low) + 12), f"{x}", fill="#222222", font_size=22)
    draw.text((2 * width // 2, 2 * height - 30), "step; held-out loss", fill="#222222", font_size=22)
    for i, ((name, (steps, losses)), colour) in enumerate(zip(series.items(), COLOURS)):
        above, below = ([at(x, y) for x, y in zip(steps, edge)] for edge in (losses.max(0), losses.min(0)))
        draw.polygon(above + below[::-1], fill=colour + "33")
        draw.line([at(x, y) for x, y in zip(steps, losses.mean(0))], fill=colour, width=5)
        draw.text((2 * width - 340, 40 + 32 * i), name, fill=colour, font_size=26)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda beside: picture.resize(size, Image.LANCZOS).save(beside, format="PNG"))


def print_table(ends, names, title, reference=None, digits=4):
    """ends: row -> (seeds, columns); their mean and standard deviation, and the difference of the last column from row `reference`."""
    print(f"\n{title}, mean (standard deviation) of {len(next(iter(ends.values())))} seeds"
          + (f"; difference: of {names[-1]}, from {reference}" if reference else ""))
    print(f"{'':<22}" + "".join(f"{name:>18}" for name in [*names, *["difference"] * bool(reference)]))
    for row, values in ends.items():
        columns = [*values.T] + ([values[:, -1] - ends[reference][:, -1]] if reference else [])
        print(f"{row:<22}" + "".join(f"{f'{v.mean():.{digits}f} ({v.std(ddof=len(values) > 1):.{digits}f})':>18}" for v in columns))


def same_for_all(args, seed):
    """Options of train.py that every run of a comparison has."""
    return ["--seed", str(seed), "--sample-every", "0", "--eval-size", str(args.eval_size), "--precision", args.precision]


def folder_of(out, arm, seed):
    return out / f"{''.join(c for c in arm.lower() if c.isalnum())}-{seed}"


# ---------------------------------------------------------------------------------------------------------------------
# MT-Diffusion: what the modalities are good for

def restoration(args, out, steps=25, strengths=(0.3, 0.5, 0.7)):
    """-> {row: (seeds, 8)} PSNR inside and outside of 5, 10, 15, 20 patches: of what -U and -X draw, of SDEdit with the plain model, which starts
    from the masked picture, and of that picture. Outside, a model on pixels gives back what it was given; this is its own drawing."""
    rows, count = {}, max(1, args.eval_size // 4)
    for seed in range(args.seeds):
        models = {arm: load_model(folder_of(out, arm, seed)) for arm in ("U", "X", "plain")}
        pictures = joint.Pictures("masked", "heldout", models["U"].native_size)
        chosen, figures = [pictures[i * len(pictures) // count]["target"] for i in range(count)], {}
        for patches in (5, 10, 15, 20):
            x = torch.stack([joint.patched(z0, np.random.default_rng((patches, i)), patches) for i, z0 in enumerate(chosen)])
            drawn = {"as it is": x} | {f"MT-Diffusion-{arm}": joint.draw(models[arm], count, {"masked": x}, steps, sampler="ddim")["image"]
                                       for arm in ("U", "X")}
            for strength in strengths:
                pils = generate(models["plain"], "uncond", [""] * count, [data.to_pil(one) for one in x], steps=steps, strength=strength,
                                sampler="ddim")
                drawn[f"SDEdit, {strength}"] = torch.stack([data.to_tensor(pil) for pil in pils])
            hidden = (x == 0).all(dim=1, keepdim=True).expand_as(x)
            for row, picture in drawn.items():
                errors = ((picture.clamp(-1, 1) - torch.stack(chosen)) / 2).square()
                figures.setdefault(row, []).extend(psnr([errors[part].mean().item()]) for part in (hidden, ~hidden))
        for row, values in figures.items():
            rows.setdefault(row, []).append(values)
    names = [f"{patches} {where}" for patches in (5, 10, 15, 20) for where in ("in", "out")]
    return "PSNR in dB inside and outside of the patches", names, {row: np.array(values) for row, values in rows.items()}


def classifier_alone(model, steps, seed, batch_size=LABEL_BATCH, lr=LABEL_LR):
    """The label head of a joint model trained without diffusion, on clean pictures: -M's with the U-Net before it, -E's by itself; in fp32, and
    its last weights count, not their average.
    -> pictures (B, 3, H, W) -> logits (B, K)"""
    encode, head, side = data.Encoder(model.vae), model.heads["label"], model.unet.config["sample_size"]
    examples = Examples({"label": joint.Pictures("label", "train")}, batch_size, seed, model.diffusion.T,
                        (model.vae.config["latent_channels"], side, side), drop={"label": (0, 0, 0)})
    context, params = model.encode_text([""])[0], [*model.unet.requires_grad_(True).parameters(), *head.parameters()]
    optimizer, schedule = torch.optim.AdamW(params, lr, weight_decay=0.0), SimpleNamespace(steps=steps, warmup=50, lr_schedule="cosine")  # train.py's

    def logits(z0):
        t = torch.zeros(len(z0), dtype=torch.long)
        network = joint.network(model.unet, context.expand(len(z0), -1, -1), None)
        return head({"picture": z0} if isinstance(head, Classifier) else network(z0, t)[1], t)

    for step in tqdm(range(steps), desc="classifier alone", leave=False):
        batch = collate([examples[step * batch_size + k] for k in range(batch_size)])
        loss = torch.nn.functional.cross_entropy(logits(encode(batch, "cpu")[0]), torch.tensor(batch["x"]))
        optimizer.param_groups[0]["lr"] = lr * lr_factor(step, schedule)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    return torch.no_grad()(lambda pictures: logits(model.vae.encode(pictures)[0] * model.vae.config["scaling_factor"]))


def recognition(args, out, steps=10):
    """-> {row: (seeds, 1)} the share of held-out pictures whose category is found: by the joint models, by the same classifiers alone, and by
    always saying the commonest of these pictures' categories."""
    pictures, rows, count = joint.Pictures("label", "heldout"), {}, args.eval_size
    chosen = [pictures[i * len(pictures) // count] for i in range(count)]
    z0, truth = torch.stack([e["target"] for e in chosen]), torch.tensor([e["x"] for e in chosen])
    for seed in range(args.seeds):
        found = {arm: joint.draw(load_model(folder_of(out, arm, seed)), count, {"image": z0}, steps)["label"]
                 for arm in ("M", "M, none dropped", "M, w = 0", "E")}
        for arm, head in (("M", "linear"), ("E", "classifier")):
            torch.manual_seed(seed)
            model = load_model(data.ASSETS / "tiny")
            joint.attach(model, "label", head, "z", "zero")
            found[f"{arm}'s classifier alone"] = classifier_alone(model, args.steps, seed)(z0)
        for row, says in found.items():
            rows.setdefault(row, []).append([(says.argmax(1) == truth).float().mean().item()])
        rows.setdefault("the commonest", []).append([(truth == truth.mode().values).float().mean().item()])
    return f"share recognised of {count} held-out pictures", ["accuracy"], {row: np.array(values) for row, values in rows.items()}


# ---------------------------------------------------------------------------------------------------------------------
# DeMe

def compare_deme(args, out, n=4):
    """At equal total steps: n copies of `steps` steps, and one copy of n * steps, both scored on the same examples, which no search has seen."""
    base, tuning = DEME[args.what]

    def run(seed):
        common, model, found = same_for_all(args, seed), base, {}
        if base.startswith("--"):
            model = out / f"base-{seed}"
            train([*shlex.split(base), *common, "--steps", str(n * args.steps)], model, args.jobs)
        for copies in (n, 1):
            folder = out / f"copies-{copies}-{seed}"
            train([*shlex.split(tuning), *common, "--model", str(model), "--decouple", str(copies), "--steps", str(n * args.steps // copies)],
                  folder, args.jobs)
            unseen = json.loads((folder / "merge.json").read_text())["unseen"]  # by the search
            bins = np.array(unseen["t"]) * n // 1000
            names = ["before", "ensemble (Eq. 7)", "merged, 1/N each", "merged, searched"]
            for theirs, ours in zip(names, names) if copies > 1 else [("copy 0", "one copy (N = 1)"), ("merged, searched", "one copy, searched")]:
                losses = np.array(unseen["losses"][theirs])
                found[ours] = [losses[bins == b].mean() for b in range(n)] + [losses.mean()]
        print(f"seed {seed}: " + ", ".join(f"{row} {values[-1]:.4f}" for row, values in found.items()), flush=True)
        return found

    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(run, range(args.seeds)))
    ends = {row: np.array([found[row] for found in rows]) for row in rows[0]}
    names = ranges(n)
    print_table(ends, names, f"held-out loss after {n * args.steps} steps in all", "one copy (N = 1)")
    write_json(out / "table.json", dict(arguments=vars(args), ranges=names, losses={row: v.tolist() for row, v in ends.items()}))
    print(out / "table.json")


def gradients(model, count, levels=20, batch_size=16):
    """-> (levels, levels) cosines between the gradients of the t2i loss at evenly spread timesteps, over `count` training examples a side.

    Row and column see disjoint examples and noise: a gradient's cosine with itself measured again, the diagonal, is below 1 by the noise of
    its estimate, and is the ceiling for the others.
    """
    unet, diffusion, encode, dataset = model.unet, model.diffusion, data.Encoder(model.vae), data.builtin("t2i", "train", model.native_size)
    unet.requires_grad_(True)
    side, bar, sums = unet.config["sample_size"], tqdm(total=2 * levels * count, desc="gradients", leave=False), []
    for half in range(2):
        chosen = [dataset[(2 * k + half) * len(dataset) // (2 * count)] for k in range(count)]
        noise = torch.randn(2, count, model.vae.config["latent_channels"], side, side, generator=torch.Generator().manual_seed(half))
        batches = []
        for i in range(0, count, batch_size):
            part, examples = slice(i, i + batch_size), chosen[i:i + batch_size]
            batch = dict(target=[e["target"] for e in examples], source=[None] * len(examples), sample_noise=noise[1, part])
            batches.append((encode(batch, "cpu")[0], model.encode_text([e["prompt"] for e in examples])[0], noise[0, part]))
        for level in range(levels):
            unet.zero_grad(set_to_none=True)
            for x0, context, eps in batches:
                t = torch.full((len(x0),), int((level + 0.5) * diffusion.T / levels))
                diffusion.loss(lambda x_t, t: unet(x_t, t, context), x0, t, eps).sum().backward()
                bar.update(len(x0))
            g = torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])
            sums.append(g / g.norm())
    bar.close()
    cosines = torch.stack(sums[:levels]) @ torch.stack(sums[levels:]).T
    return ((cosines + cosines.T) / 2).numpy()


def heatmap(cosines, path, cell=20):
    """White at 0, blue towards 1, red towards -1; t = 0 at the top left."""
    blue, red = np.array([21, 101, 192]), np.array([198, 40, 40])
    shade = np.abs(cosines)[..., None] * (255 - np.where(cosines[..., None] > 0, blue, red))
    picture = Image.fromarray((255 - shade).round().astype(np.uint8)).resize([len(cosines) * cell] * 2, Image.NEAREST)
    write_file(path, lambda beside: picture.save(beside, format="PNG"))


def compare_gradients(args, out):
    model = load_model(args.model)
    if model.tasks != ["t2i"] or model.native_size != 64:
        raise UserError(f"--model {args.model}: the gradients are those of a 64 x 64 text-to-image model")
    cosines = gradients(model, args.eval_size)
    n = len(cosines)
    print("cosine of the gradients at two timesteps, mean over the pairs of that distance")
    for distance in (0, 1, 2, 5, 10, n - 1):
        print(f"{distance * model.diffusion.T // n:>6}{np.diagonal(cosines, distance).mean():>9.3f}")
    write_json(out / "gradients.json", dict(arguments=vars(args), cosines=cosines.round(4).tolist()))
    heatmap(cosines, out / "gradients.png")
    print(f"{out / 'gradients.json'}, {out / 'gradients.png'}")


AFTERWARDS = {"masked": restoration, "label": recognition}  # what is measured besides, on the trained arms


def main():
    parser = argparse.ArgumentParser(description="Train with and without a method and compare held-out losses.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("what", choices=(*ARMS, *DEME, "gradients"))
    parser.add_argument("--steps", type=int, default=600, help="of each run; deme: of each of the four copies")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm, seeds 0, 1 ..")
    parser.add_argument("--eval-size", type=int, default=256,
                        help="held-out examples, each with its own noise and timestep; of gradients: training examples a side")
    parser.add_argument("--model", default=str(data.ASSETS / "tiny"), help="of gradients: a 64 x 64 text-to-image model")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on its share of the CPU's cores")
    parser.add_argument("--out", help="folder for the runs, the table and the curve; default runs/compare-WHAT")
    args = parser.parse_args()
    if min(args.steps, args.seeds, args.jobs) < 1 or args.eval_size < (8 if args.what in DEME else 4):
        raise UserError(f"--steps {args.steps}, --seeds {args.seeds} and --jobs {args.jobs} must be at least 1, --eval-size {args.eval_size} "
                        "at least 4, of deme 8")
    out, every = Path(args.out or f"runs/compare-{args.what}"), max(1, args.steps // 6)
    out.mkdir(parents=True, exist_ok=True)
    if args.what in (*DEME, "gradients"):
        return (compare_deme if args.what in DEME else compare_gradients)(args, out)

    def run(arm, seed):
        own = ["--steps", str(args.steps), "--eval-every", str(every), "--save-every", str(every)]
        folder = folder_of(out, arm, seed)
        rows = train([*shlex.split(ARMS[args.what][arm]), *own, *same_for_all(args, seed)], folder, args.jobs)
        if not rows:
            raise UserError(f"{folder} holds a run without --eval-every; choose another --out")
        print(f"{arm}, seed {seed}: {rows[-1]['held_out']}", flush=True)
        return rows

    pairs = [(arm, seed) for seed in range(args.seeds) for arm in ARMS[args.what]]  # an equal number of each, also while it runs
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = dict(zip(pairs, pool.map(lambda pair: run(*pair), pairs)))

    def first(losses):  # of the task itself; a joint one's heads come after it
        return next(iter(losses.values()))
    series = {arm: ([row["step"] for row in rows[arm, 0]], np.array([[first(row["held_out"]) for row in rows[arm, s]] for s in range(args.seeds)]))
              for arm in ARMS[args.what]}
    ends = {arm: np.array([first(rows[arm, s][-1]["held_out_by_t"]) + [first(rows[arm, s][-1]["held_out"])] for s in range(args.seeds)])
            for arm in series}
    names, found = ranges(len(next(iter(ends.values()))[0]) - 1), {}
    print_table(ends, names, f"held-out loss after {args.steps} steps", next(iter(ends)))
    if args.what in AFTERWARDS:
        title, columns, found = AFTERWARDS[args.what](args, out)
        print_table(found, columns, title, digits=2)
        found = {AFTERWARDS[args.what].__name__: dict(columns=columns) | {row: v.tolist() for row, v in found.items()}}
    write_json(out / "table.json", dict(arguments=vars(args), arms=ARMS[args.what], ranges=names, losses={arm: v.tolist() for arm, v in ends.items()},
                                        steps=series[next(iter(series))][0], curves={arm: v.tolist() for arm, (_, v) in series.items()}) | found)
    curves(series, out / "curve.png")
    print(f"{out / 'table.json'}, {out / 'curve.png'}")


if __name__ == "__main__":
    command(main)
