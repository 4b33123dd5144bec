"""Measure a model on held-out pictures.

    python evaluate.py --task all --count 100

For a task with a source it prints the PSNR to the target (pictures in [0, 1], mean over examples)
of three things: what the model draws; the source as it is, which for sr is bicubic enlargement;
and the autoencoder's own reconstruction of the target, which is about what a perfect latent model
would reach. "Closer" is the share of examples whose drawing has a smaller squared error than the
source as it is.

Text-to-image has no single right answer. There it prints how often a drawing is nearer to its
caption's own picture than to any other picture of the split; for a class, how often the picture
that is nearest of all belongs to the class. No figure replaces a look: --grid saves the pictures
that were counted.
"""
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
    # An error of zero, where nothing had to change, counts as 100 dB instead of infinity.
    return float(np.mean(-10 * np.log10(np.maximum(errors, 1e-10))))


def batches(count, length, batch_size=25):
    """Indices of `count` examples, spread over a data set of `length`, a batch at a time."""
    count = min(count, length)
    # Neighbours in the built-in data are alike: one figure in its genders and tones.
    indices = [i * length // count for i in range(count)]
    return [indices[i:i + batch_size] for i in range(0, count, batch_size)]


@torch.no_grad()
def measure_edits(model, task, count, seed, split="heldout", **options):
    """Measure a task with a source -> one row an example, and (source, drawn, target) pictures.

    A row is a dict of `kind` (of edits: tone, gender or colour) and the squared errors of the
    drawing, of the source as it is (`nothing`), and of the autoencoder (`ceiling`).
    """
    dataset = data.builtin(task, split)
    device = model.unet.conv_out.weight.device
    rows = []
    pictures = []
    for indices in tqdm(batches(count, len(dataset)), desc=task, leave=False):
        examples = [dataset[i] for i in indices]
        sources = [to_pil(example["source"]) for example in examples]
        # Drawing n of a call has the seed `seed + n`: a figure does not depend on how examples are
        # batched.
        drawn = generate(model, task, [example["prompt"] for example in examples], sources,
                         seed=seed + len(rows), **options)
        # A latent model can hardly be better than the autoencoder's own copy of the target.
        targets = torch.stack([example["target"] for example in examples])
        ceiling = model.vae.decode(model.vae.encode(targets.to(device))[0]).cpu()
        for example, source, picture, best in zip(examples, sources, drawn, ceiling):
            # All three are compared with the target as it is, and not as the autoencoder copies it.
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
    # A mean of decibels is ruled by the best pictures; this share counts every example alike.
    closer = float(np.mean([row["output"] < row["nothing"] for row in rows]))
    return dict(count=len(rows), closer=closer, **figures)


def summaries(rows):
    """Rows of `measure_edits` -> the figures of all of them, and of each kind of edit."""
    figures = {"all": summary(rows)}
    # Kinds of change differ much in how hard they are, so each has a line of its own.
    for kind in sorted({row["kind"] for row in rows} - {""}):
        figures[kind] = summary([row for row in rows if row["kind"] == kind])
    return figures


def distances(drawn, pictures):
    """Compare drawings (B, 3, H, W) with all pictures (N, 3, H, W) -> (B, N).

    The root of the squared error at a quarter of the size, where colours and coarse shapes count
    and detail does not.
    """
    drawn = F.avg_pool2d(drawn, 4).flatten(1)
    pictures = F.avg_pool2d(pictures, 4).flatten(1)
    return torch.cdist(drawn, pictures)


def rank_own(drawn, pictures, own):
    """How many pictures are nearer to each drawing than its own -> (B,).

    drawn (B, 3, H, W); all pictures (N, 3, H, W); own (B,): the number of the right one.
    """
    # All pictures of a split are candidates, not only those that were drawn: the more there are,
    # the harder it is to be the nearest.
    apart = distances(drawn, pictures)
    return (apart < apart.gather(1, own[:, None])).sum(dim=1)


def draw_prompts(model, task, prompts, count, seed, **options):
    """Draw `count` of the prompts -> PIL pictures, and the number of each one's prompt."""
    drawn = []
    numbers = []
    for indices in tqdm(batches(count, len(prompts)), desc=task, leave=False):
        drawn += generate(model, task, [prompts[i] for i in indices], seed=seed + len(numbers),
                          **options)
        numbers += indices
    return drawn, numbers


def as_batch(pictures):
    """PIL pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    return torch.stack([to_tensor(picture) for picture in pictures])


def measure_classes(model, count, seed, split="heldout", **options):
    """Measure the task class -> figures, and (drawn, nearest) pictures."""
    examples = list(data.builtin("class", split, model.native_size))
    classes = [example["prompt"] for example in examples]
    pictures = torch.stack([example["target"] for example in examples])
    # Drawing the class of every n-th example draws each class as often as the split has it.
    drawn, own = draw_prompts(model, "class", classes, count, seed, **options)
    nearest = distances(as_batch(drawn), pictures).argmin(dim=1).tolist()
    right = [classes[i] == classes[j] for i, j in zip(own, nearest)]
    figures = dict(count=len(own), of=len(classes), same_class=float(np.mean(right)))
    return figures, [(picture, to_pil(pictures[i])) for picture, i in zip(drawn, nearest)]


def measure_captions(model, count, seed, split="heldout", **options):
    """Measure text-to-image -> figures, and (drawn, own) pictures."""
    captions, pictures = emoji.plain(split)
    # A caption's own picture has its number: both are lists of the same drawings.
    drawn, own = draw_prompts(model, "t2i", captions, count, seed, **options)
    rank = rank_own(as_batch(drawn), as_batch(pictures), torch.tensor(own)).numpy()
    # A rank of 0 means that no other picture is nearer.
    figures = dict(count=len(own), of=len(captions), nearest_1=float(np.mean(rank < 1)),
                   nearest_10=float(np.mean(rank < 10)))
    return figures, [(picture, pictures[i]) for picture, i in zip(drawn, own)]


def measure(model, task, args):
    """Measure one task -> its figures, and the pictures that were counted."""
    # What is not given here, such as the guidance, is the model's own.
    options = dict(seed=args.seed, split=args.split, steps=args.steps)
    if task == "class":
        return measure_classes(model, args.count, **options)
    if TASKS[task].source is None:
        return measure_captions(model, args.count, **options)
    rows, pictures = measure_edits(model, task, args.count, **options)
    return summaries(rows), pictures


# -------------------------------------------------------------------------------------------------
# The command

HEADER = f"{'PSNR in dB':<20}{'count':>6}{'drawing':>9}{'nothing':>9}{'ceiling':>9}{'closer':>9}"


def print_figures(task, figures):
    """Print the lines of one task, below HEADER."""
    # What has no PSNR fills the columns with a sentence.
    if task == "class":
        print(f"{task:<20}{figures['count']:>6}   nearest picture of {figures['of']} has the right "
              f"class: {figures['same_class']:.0%}")
        return
    if "all" not in figures:
        print(f"{task:<20}{figures['count']:>6}   own picture nearest of {figures['of']}: "
              f"{figures['nearest_1']:.0%}, among the ten nearest: {figures['nearest_10']:.0%}")
        return
    for kind, f in figures.items():
        name = task if kind == "all" else f"  {kind}"
        print(f"{name:<20}{f['count']:>6}{f['output']:>9.2f}{f['nothing']:>9.2f}"
              f"{f['ceiling']:>9.2f}{f['closer']:>9.0%}")


def save_grid(examples, path, arguments, columns=12):
    """Save tuples of pictures: in blocks of rows, each picture of a tuple below the other."""
    # The last block may be short: white pictures fill its rows.
    blank = Image.new("RGB", examples[0][0].size, "white")
    pictures = []
    for first in range(0, len(examples), columns):
        # zip(*..) turns a block of tuples into a row of sources, one of drawings, one of targets.
        for row in zip(*examples[first:first + columns]):
            filling = [blank] * (columns - len(row))
            pictures += [*row, *filling]
    save_png(grid(pictures, columns), path, arguments)


def get_args():
    parser = Parser("Measure a model on held-out pictures.")
    parser.add_argument("--task", default="all", help="all, or one task")
    parser.add_argument("--model", default=str(ASSETS / "tiny-mtu"), help="model folder or hub id")
    parser.add_argument("--count", type=int, default=100, help="examples per task")
    parser.add_argument("--split", choices=("heldout", "train"), default="heldout",
                        help="train measures pictures that were trained on")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the drawings")
    parser.add_argument("--device", help="torch device (default: cuda, else mps, else cpu)")
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--grid", help="PNG file for the pictures of one task: source (if it has "
                        "one), drawing and target (for class, the nearest) below each other")
    args = parser.parse_args()
    if args.count < 1:
        raise UserError(f"--count {args.count} must be at least 1")
    if not 0 <= args.seed < 2 ** 62:
        raise UserError(f"--seed {args.seed} must be from 0 to 2^62 - 1")
    return args


def measured_tasks(args, model):
    """The tasks that --task names. A UserError says what cannot be measured."""
    # Pictures that were drawn without any input, and joint tasks, have no target to compare with.
    measurable = [task for task in model.tasks if task in (*ALL, "class")]
    if measurable != ["class"] and model.native_size != 64:
        raise UserError(f"{args.model} draws {model.native_size} x {model.native_size} pictures, "
                        "and the built-in ones are 64 x 64")
    tasks = measurable if args.task == "all" else [args.task]
    if not tasks or not set(tasks) <= set(measurable):
        raise UserError(f"--task {args.task}: {args.model} can be measured on "
                        f"{', '.join(measurable) or 'nothing'}")
    # Refused now, and not after minutes of drawing.
    if args.grid and (len(tasks) > 1 or not args.grid.endswith(".png")):
        raise UserError(f"--grid {args.grid} is a .png file for the pictures of one --task")
    return tasks


def main():
    args = get_args()
    model = load_model(args.model, device=pick_device(args.device))
    tasks = measured_tasks(args, model)
    results = {}
    print(HEADER)
    for task in tasks:
        results[task], pictures = measure(model, task, args)
        print_figures(task, results[task])
    if args.grid:
        save_grid(pictures, args.grid, vars(args))
    if args.out:
        # The arguments stand beside the figures, so that a file says how it was made.
        write_json(args.out, dict(arguments=vars(args), results=results))


if __name__ == "__main__":
    command(main)
