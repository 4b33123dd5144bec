"""Measure a model on held-out pictures.

    python evaluate.py --task all --count 100

For a task with a source it prints the PSNR to the target (pictures in [0, 1], mean over examples)
of three things: what the model draws; the source as it is, which for sr is bicubic enlargement;
and the autoencoder's own reconstruction of the target, which is about what a perfect latent model
would reach. "Closer" is the share of examples whose drawing has a smaller squared error than the
source as it is.

Text-to-image has no single right answer. There it prints how often a drawing is nearer to its
caption's own picture than to any other picture of the split. No figure replaces a look: --grid
saves the pictures that were counted.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import emoji
from data import ALL, ASSETS, TASKS, to_pil, to_tensor
from hub import Parser, UserError, command, pick_device, write_json
from sample import generate, grid, load_model, save_png


def squared_error(a, b):
    """Mean squared error of two pictures (3, H, W) in [-1, 1], on the scale [0, 1]."""
    return ((a.clamp(-1, 1) - b) / 2).square().mean().item()


def psnr(errors):
    """Mean of 10 log10(1 / MSE) over examples, in dB."""
    return float(np.mean([-10 * np.log10(max(error, 1e-10)) for error in errors]))


def batches(count, length, batch_size=25):
    """Indices of `count` examples, spread over a data set of `length`, a batch at a time."""
    chosen = [i * length // count for i in range(count)]
    return [chosen[i:i + batch_size] for i in range(0, count, batch_size)]


@torch.no_grad()
def measure_edits(model, task, count, seed, split="heldout", **options):
    """Measure a task with a source -> one row an example, and (source, drawn, target) pictures.

    A row is a dict of `kind` (of edits: tone, gender or colour) and the squared errors of the
    drawing, of the source as it is (`nothing`), and of the autoencoder (`ceiling`).
    """
    dataset = data.builtin(task, split)
    device = model.unet.conv_out.weight.device
    rows, pictures = [], []
    for indices in tqdm(batches(min(count, len(dataset)), len(dataset)), desc=task, leave=False):
        examples = [dataset[i] for i in indices]
        sources = [to_pil(example["source"]) for example in examples]
        drawn = generate(model, task, [example["prompt"] for example in examples], sources,
                         seed=seed + len(rows), **options)
        # A latent model can hardly be better than the autoencoder's own copy of the target.
        targets = torch.stack([example["target"] for example in examples])
        ceiling = model.vae.decode(model.vae.encode(targets.to(device))[0]).cpu()
        for example, source, picture, best in zip(examples, sources, drawn, ceiling):
            target = example["target"]
            rows.append(dict(kind=example.get("kind", ""),
                             output=squared_error(to_tensor(picture), target),
                             nothing=squared_error(example["source"], target),
                             ceiling=squared_error(best, target)))
            pictures.append((source, picture, to_pil(target)))
    return rows, pictures


def summary(rows):
    """Rows of `measure_edits` -> their figures."""
    figures = {key: psnr([row[key] for row in rows]) for key in ("output", "nothing", "ceiling")}
    closer = float(np.mean([row["output"] < row["nothing"] for row in rows]))
    return dict(count=len(rows), closer=closer, **figures)


def rank_own(drawn, pictures, own):
    """How many pictures are nearer to each drawing than its own -> (B,).

    drawn (B, 3, H, W); all pictures (N, 3, H, W); own (B,): the number of the right one. By squared
    error at a quarter of the size, where colours and coarse shapes count and detail does not.
    """
    drawn = F.avg_pool2d(drawn, 4).flatten(1)
    pictures = F.avg_pool2d(pictures, 4).flatten(1)
    distances = torch.cdist(drawn, pictures)  # (B, N)
    return (distances < distances.gather(1, own[:, None])).sum(dim=1)


def measure_captions(model, count, seed, split="heldout", **options):
    """Measure text-to-image -> figures, and (drawn, own) pictures."""
    captions, pictures = emoji.plain(split)
    count = min(count, len(captions))
    drawn, own = [], []  # the drawings, and the number of each one's own picture
    for indices in tqdm(batches(count, len(captions)), desc="t2i", leave=False):
        drawn += generate(model, "t2i", [captions[i] for i in indices], seed=seed + len(own),
                          **options)
        own += indices
    rank = rank_own(torch.stack([to_tensor(picture) for picture in drawn]),
                    torch.stack([to_tensor(picture) for picture in pictures]), torch.tensor(own))
    figures = dict(count=count, of=len(captions), nearest_1=(rank < 1).float().mean().item(),
                   nearest_10=(rank < 10).float().mean().item())
    return figures, [(picture, pictures[i]) for picture, i in zip(drawn, own)]


def save_grid(shown, path, arguments, columns=12):
    """Save tuples of pictures: in blocks of rows, each picture of a tuple below the other."""
    # The last block may be short: white pictures fill its rows.
    blank = Image.new("RGB", shown[0][0].size, "white")
    pictures = []
    for first in range(0, len(shown), columns):
        for row in zip(*shown[first:first + columns]):
            pictures += [*row, *[blank] * (columns - len(row))]
    save_png(grid(pictures, columns), path, arguments)


def get_args():
    parser = Parser("Measure a model on held-out pictures.")
    parser.add_argument("--task", default="all", help="all, or one task")
    parser.add_argument("--model", default=str(ASSETS / "tiny-mtu"), help="model folder or hub id")
    parser.add_argument("--count", type=int, default=100, help="examples per task")
    parser.add_argument("--split", choices=("heldout", "train"), default="heldout",
                        help="train measures pictures that were trained on")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--guidance", type=float,
                        help="text guidance scale (default: the model's own)")
    parser.add_argument("--image-guidance", type=float, help="image guidance scale, likewise")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the drawings")
    parser.add_argument("--device", help="torch device (default: cuda, else mps, else cpu)")
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--grid", help="PNG file for the pictures of one task: source (but for "
                        "t2i), drawing and target below each other")
    args = parser.parse_args()
    if not 1 <= args.count <= 100_000 or not 0 <= args.seed < 2 ** 62:
        raise UserError(f"--count {args.count} must be at least 1, and --seed {args.seed} at least "
                        "0")
    return args


def main():
    args = get_args()
    model = load_model(args.model, device=pick_device(args.device))
    if model.native_size != 64:
        raise UserError(f"{args.model} draws {model.native_size} x {model.native_size} pictures, "
                        "and the built-in ones are 64 x 64")
    # Pictures that were drawn without any input, and joint tasks, have no target to compare with.
    measured = [task for task in model.tasks if task in ALL]
    tasks = measured if args.task == "all" else [args.task]
    if not tasks or not set(tasks) <= set(measured):
        raise UserError(f"--task {args.task}: {args.model} can be measured on "
                        f"{', '.join(measured) or 'nothing'}")
    if args.grid and (len(tasks) > 1 or not args.grid.endswith(".png")):
        raise UserError(f"--grid {args.grid} is a .png file for the pictures of one --task")
    options = dict(seed=args.seed, split=args.split, steps=args.steps, guidance=args.guidance)
    results = {}
    # Each drawing has a seed of its own, so a figure does not depend on how examples are batched.
    print(f"{'PSNR in dB':<20}{'count':>6}{'drawing':>9}{'nothing':>9}{'ceiling':>9}{'closer':>9}")
    for task in tasks:
        if TASKS[task].source is None:
            results[task], shown = measure_captions(model, args.count, **options)
            f = results[task]
            print(f"{task:<20}{f['count']:>6}   own picture nearest of {f['of']}: "
                  f"{f['nearest_1']:.0%}, among the ten nearest: {f['nearest_10']:.0%}")
            continue
        rows, shown = measure_edits(model, task, args.count, **options,
                                    image_guidance=args.image_guidance)
        results[task] = {"all": summary(rows)}
        # Kinds of change differ much in how hard they are, so each has a line of its own.
        for kind in sorted({row["kind"] for row in rows} - {""}):
            results[task][kind] = summary([row for row in rows if row["kind"] == kind])
        for kind, f in results[task].items():
            name = task if kind == "all" else f"  {kind}"
            print(f"{name:<20}{f['count']:>6}{f['output']:>9.2f}{f['nothing']:>9.2f}"
                  f"{f['ceiling']:>9.2f}{f['closer']:>9.0%}")
    if args.grid:
        save_grid(shown, Path(args.grid), vars(args))
    if args.out:
        write_json(args.out, dict(arguments=vars(args), results=results))


if __name__ == "__main__":
    command(main)
