"""Measure: on held-out pictures, is a task's output closer to the target than its input is?

    python evaluate.py --task all --model assets/tiny-mtu --count 100

Per task: PSNR to the target (pictures in [0, 1], mean over examples) of the output, of doing nothing (for sr: bicubic enlargement), and of
the autoencoder's own reconstruction of the target, the ceiling of any latent model without --keep-unchanged; and the share of examples
whose output has the smaller squared error than doing nothing. Of t2i, which has no single right answer: how often what is drawn is nearer
to its caption's own picture than to any other of the split. Figures are no eyes: --grid shows what they count.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
from data import ASSETS, TASKS
from folders import HelpFormatter, UserError, command, pick_device, write_json
from sample import generate, grid, load_model, save_png


def mse(a, b):
    """Mean squared error of two pictures (3, H, W) in [-1, 1], on the scale [0, 1]."""
    return ((a.clamp(-1, 1) - b) / 2).square().mean().item()


def psnr(errors):
    return float(np.mean([-10 * np.log10(max(e, 1e-10)) for e in errors]))


@torch.no_grad()
def measure(model, task, count, seed, split="heldout", batch_size=25, **options):
    """-> a dict of figures for one image-to-image task over `count` examples spread over the split, and its pictures: a list of (source,
    output, target)."""
    dataset, rows, shown = data.builtin(task, split), [], []
    count = min(count, len(dataset))
    chosen = [dataset[i * len(dataset) // count] for i in range(count)]
    device = next(model.unet.parameters()).device
    for first in tqdm(range(0, len(chosen), batch_size), desc=task, leave=False):
        batch = chosen[first:first + batch_size]
        prompts, sources = [e["prompt"] for e in batch], [data.to_pil(e["source"]) for e in batch]
        outputs = generate(model, task, prompts, sources, seed=seed + first, **options)
        ceiling = model.vae.decode(model.vae.encode(torch.stack([e["target"] for e in batch]).to(device))[0]).cpu()
        rows += [dict(kind=e.get("kind", ""), output=mse(data.to_tensor(o), e["target"]), nothing=mse(e["source"], e["target"]),
                      ceiling=mse(c, e["target"])) for e, o, c in zip(batch, outputs, ceiling)]
        shown += [(source, output, data.to_pil(e["target"])) for source, output, e in zip(sources, outputs, batch)]

    def figures(rows):
        return dict(count=len(rows), output=psnr([r["output"] for r in rows]), nothing=psnr([r["nothing"] for r in rows]),
                    ceiling=psnr([r["ceiling"] for r in rows]), closer=float(np.mean([r["output"] < r["nothing"] for r in rows])))

    kinds = sorted({r["kind"] for r in rows} - {""})
    return {"all": figures(rows)} | {kind: figures([r for r in rows if r["kind"] == kind]) for kind in kinds}, shown


def ranks(drawn, pictures, own):
    """drawn (B, 3, H, W), all pictures (N, 3, H, W), own (B,) the right one's number -> how many are nearer to each drawn one, (B,). By squared
    error at a quarter of the size, where colours and shapes count and outlines do not."""
    drawn, pictures = (F.avg_pool2d(x, 4).flatten(1) for x in (drawn, pictures))
    distances = torch.cdist(drawn, pictures)
    return (distances < distances.gather(1, own[:, None])).sum(dim=1)


def recognised(model, count, seed, split="heldout", batch_size=25, **options):
    """-> the share of `count` captions, spread over the split's emoji and styles, whose own picture is the nearest to what is drawn, and among
    the ten nearest, of all of the split; and the pictures, a list of (drawn, own)."""
    (captions, pictures), drawn = data.plain(split), []
    count = min(count, len(captions))
    own = [i * len(captions) // count for i in range(count)]
    for first in tqdm(range(0, count, batch_size), desc="t2i", leave=False):
        drawn += generate(model, "t2i", [captions[i] for i in own[first:first + batch_size]], seed=seed + first, **options)
    found = ranks(*(torch.stack([data.to_tensor(p) for p in some]) for some in (drawn, pictures)), torch.tensor(own))
    shares = {f"nearest_{k}": (found < k).float().mean().item() for k in (1, 10)}
    return dict(count=count, of=len(captions)) | shares, [(picture, pictures[i]) for picture, i in zip(drawn, own)]


def main():
    parser = argparse.ArgumentParser(description="Measure a model on held-out pictures.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("--task", default="all", help="all, or one of them")
    parser.add_argument("--model", default=str(ASSETS / "tiny-mtu"), help="folder or hub id")
    parser.add_argument("--count", type=int, default=100, help="examples per task")
    parser.add_argument("--split", choices=("heldout", "train"), default="heldout", help="train: what was trained on")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--guidance", type=float, help="text scale; default as in sample.py")
    parser.add_argument("--image-guidance", type=float, help="image scale; default as in sample.py")
    parser.add_argument("--keep-unchanged", action="store_true", help="as in sample.py, of edit and inpaint")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--device", help="default: cuda, else mps, else cpu")
    parser.add_argument("--out", help="JSON file that gets the figures")
    parser.add_argument("--grid", help="PNG file that gets the pictures of one task, in rows: source but of t2i, what is drawn, target")
    args = parser.parse_args()
    if args.count < 1 or not 0 <= args.seed < 2 ** 62:
        raise UserError(f"--count {args.count} must be at least 1, --seed {args.seed} from 0 to 2^62")
    if args.out and Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a folder; it names a JSON file")
    model = load_model(args.model, device=pick_device(args.device))
    if model.native_size != 64:
        raise UserError(f"{args.model} draws {model.native_size} x {model.native_size} pictures; the built-in ones are 64 x 64")
    tasks = [task for task in model.tasks if task in data.ALL] if args.task == "all" else [args.task]
    if not tasks or not set(tasks) <= {*data.ALL} & {*model.tasks}:
        raise UserError(f"--task {args.task}: choose all or one of {', '.join(data.ALL)}; {args.model} knows {', '.join(model.tasks)}")
    if args.grid and (len(tasks) > 1 or Path(args.grid).suffix != ".png"):
        raise UserError(f"--grid {args.grid} is a file of one --task's pictures, its name ends in .png")
    results = {}
    print(f"{'PSNR in dB':<20}{'count':>6}{'output':>9}{'nothing':>9}{'ceiling':>9}{'closer':>9}")
    for task in tasks:
        if task == "t2i":
            f, shown = recognised(model, args.count, args.seed, args.split, steps=args.steps, guidance=args.guidance)
            results[task] = f
            print(f"{task:<20}{f['count']:>6}   own picture the nearest of {f['of']}: {f['nearest_1']:.0%}, "
                  f"among the ten nearest: {f['nearest_10']:.0%}")
            continue
        results[task], shown = measure(model, task, args.count, args.seed, args.split, steps=args.steps, guidance=args.guidance,
                                       image_guidance=args.image_guidance, keep_unchanged=args.keep_unchanged and TASKS[task].prompt != "empty")
        for kind, f in results[task].items():
            name = task if kind == "all" else f"  {kind}"
            print(f"{name:<20}{f['count']:>6}{f['output']:>9.2f}{f['nothing']:>9.2f}{f['ceiling']:>9.2f}{f['closer']:>9.0%}")
    if args.grid:
        rows = [shown[first:first + 12] for first in range(0, len(shown), 12)]
        pictures = [picture for row in rows for kind in zip(*row) for picture in (*kind, *[Image.new("RGB", (64, 64), "white")] * (12 - len(row)))]
        save_png(grid(pictures, 12), args.grid, vars(args))
    if args.out:
        write_json(args.out, dict(arguments=vars(args), results=results))


if __name__ == "__main__":
    command(main)
