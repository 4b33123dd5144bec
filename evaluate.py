"""Measure a model on held-out pictures.

    python evaluate.py --task all --count 100
    python evaluate.py --task all --model MODEL --data FOLDER --count 5000 --ssim \
        --inception weights-inception-2015-12-05-6726825d.pth --lpips alexnet-owt-7be5be79.pth \
        --clip openai/clip-vit-large-patch14
    torchrun --nproc_per_node 8 evaluate.py ...

It draws the examples, keeps the drawings as PNG files, and prints a table of all tasks. Whoever
stops it and starts it again goes on with what is drawn. Without the second command's options every
measure is computed from what the project ships: PSNR, distances and answers of a small classifier
of the built-in emoji, and for text-to-image how often a drawing is nearer to its caption's own
picture than to any other. measures.py says what each measure is, and LEGEND what it means.

No figure replaces a look: --grid saves the pictures that were counted.
"""
import functools
import hashlib
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import emoji
import measures
from data import ALL, ASSETS, TASKS, to_pil, to_tensor
from hub import Parser, UserError, command, is_first, pick_device, print_once, read_json
from hub import write_json
from sample import draw_modalities, generate, grid, load_model, save_png, scales

# What the columns and the scores mean. Only lines that the table needs are printed below it.
LEGEND = {
    "drawing": "PSNR in dB of what the model drew, to the target; higher is better",
    "nothing": "PSNR of the source as it is, which for sr is bicubic enlargement",
    "ceiling": "the same figure for the autoencoder's copy of the target, about what a perfect "
               "latent model would reach",
    "closer": "share of drawings with a smaller squared error than the source as it is",
    "value": "the score; +- is half the width of its 95 % interval (bootstrap over examples)",
    "changed": "share of drawings that, where something had to change, are nearer to the target "
               "than to the source",
    "rest": "PSNR in dB, to the source, of the part that was to stay",
    "kept": "share of drawings whose rest is no farther from the source than the autoencoder's "
            "own copy",
    "tone": "share that show the skin tone that was asked for, to a classifier's eye",
    "gender": "share that show the figure that was asked for, likewise",
    "colour": "share that show the colour that was asked for, likewise",
    "category": "share that show something of the category that was asked for, likewise",
    "style": "share drawn in the style that was asked for, likewise",
    "emoji-KD": "kernel distance of drawings and targets in the classifier's features (not KID)",
    "emoji-FD": "Frechet distance in the same features (not FID)",
    "top-1": "share of pictures whose own class is the likeliest",
    "KID": "kernel distance in Inception's features; unbiased, so it stands before FID",
    "FID": "Frechet distance in Inception's features; larger for fewer pictures",
    "Inception Score": "how sure Inception is of each drawing, and how unlike they are",
    "precision": "share of drawings that lie among the targets, in Inception's features",
    "recall": "share of targets that lie among the drawings, likewise",
    "LPIPS": "distance from drawing to target in a network's features",
    "SSIM": "likeness of drawing and target, window by window; 1 is equal",
    "CLIP score": "100 times the cosine of a drawing and its caption",
    "CLIP image similarity": "cosine of a drawing and its source",
    "CLIP image-image direction": "cosine of the change that was drawn and the true one",
    "CLIP image-text direction": "cosine of the change that was drawn and that of the captions",
}
LOWER_IS_BETTER = ("emoji-KD", "emoji-FD", "KID", "FID", "LPIPS")
# What MTU's Table 2 prints for each task.
TABLE_2 = {"t2i": "FID", "edit": "CLIP image-text direction", "sr": "LPIPS",
           "inpaint": "CLIP image-image direction"}


# -------------------------------------------------------------------------------------------------
# Examples

class Plain(emoji.Builtin):
    """Captions without skin tones, and their pictures: what text-to-image is measured on."""

    def __init__(self, split):
        super().__init__("uncond", split)

    def uncond(self, item, rng):
        row, style = item
        return dict(prompt=emoji.caption(row, None, style),
                    target=to_tensor(emoji.drawing(style, row.cells[None])))


def open_examples(task, split, size, root=None):
    """The data set whose examples are counted: the built-in one, or a folder."""
    dataset = data.open_dataset(task, split, size, root)
    if root is None and task == "t2i":
        return Plain(split)
    if isinstance(dataset, data.Encoded):
        raise UserError(f"{root} holds latents; name the folder that it was encoded from")
    return dataset


def spread(count, length):
    """Numbers of `count` examples, spread over a data set of `length`."""
    # Neighbours in the built-in data are alike: one figure in its genders and tones.
    count = min(count, length)
    return [i * length // count for i in range(count)]


def example_of(dataset, i):
    """Example i, with the answers and the captions that measures.py asks for, where it has any."""
    example = dataset[i]
    if not isinstance(dataset, emoji.Builtin):
        # In place of one that is broken comes another: its number is not i.
        return dict(example, captions=captions_of(dataset, dataset.items[example["number"]]))
    item = dataset.items[i]
    if isinstance(item, emoji.Change):
        names = captions_by_cell()
        captions = [names[item.style, *cell] for cell in (item.source, item.target)]
        return dict(example, answers={item.kind: item.b}, captions=captions)
    answers = {}
    if "source" not in example:
        answers = dict(category=item[0].category.lower(), style=item[1])
    if dataset.task == "class":
        del answers["style"]  # nobody asked for one
    return dict(example, answers=answers)


@functools.cache
def captions_by_cell():
    """(style, column, row) -> the caption of that drawing."""
    return {(style, *cell): emoji.caption(row, tone, style)
            for row in emoji.load() for tone, cell in row.cells.items() for style in emoji.STYLES}


def captions_of(dataset, row):
    """The captions before and after an edit, if a folder has them; the instruction is no caption.

    They stand beside the instruction in InstructPix2Pix's prompt.json, and under the same names
    (caption or input, and output) in a metadata.jsonl.
    """
    text = row.get("text")
    if isinstance(text, dict) and "file" in text:
        row = read_json(dataset.root / text["file"])
    captions = [row.get("caption") or row.get("input"), row.get("output")]
    return captions if all(isinstance(words, str) for words in captions) else None


# -------------------------------------------------------------------------------------------------
# Drawing

def digest(value):
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def model_hash(model):
    """A short hash of everything that a model consists of."""
    network = hashlib.sha256()
    for name, tensor in model.unet.state_dict().items():
        network.update(name.encode())
        network.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest([data.fingerprint(model), network.hexdigest(), model.unet.config,
                   model.scheduler, model.index])


@functools.cache
def code_hash():
    """A short hash of the project's code: yesterday's drawing must not be taken for today's."""
    return digest([path.read_text(encoding="utf-8")
                   for path in sorted(Path(__file__).parent.glob("*.py"))])


def settings_of(model, task, args):
    """Whatever a drawing depends on besides its example. It stands in every score's record."""
    source = TASKS[task].source is not None
    guidance, image_guidance = scales(model, task, args.guidance, args.image_guidance)
    return dict(task=task, data=args.data or "built-in", split=args.split, seed=args.seed,
                steps=args.steps, guidance=guidance,
                image_guidance=image_guidance if source else None, format="8-bit PNG",
                count=args.count, batch_size=args.batch_size, device=model.device.type,
                dtype=str(model.unet.conv_out.weight.dtype), model=args.model_hash,
                code=code_hash())


def request_of(example):
    """What identifies an example: its words, and its source picture's bytes."""
    source = example.get("source")
    return digest([example["prompt"], source is not None and source.numpy().tobytes().hex()])


def is_drawn(path, request):
    """Whether the drawing of this very example is there."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return json.loads(picture.text["arguments"])["request"] == request
    except (OSError, ValueError, KeyError, AttributeError):
        return False  # missing, or half of a file that somebody copied


def draw(model, task, dataset, numbers, args, rank=0, world=1):
    """Draw examples into a folder, but for batches that are there -> the paths of all drawings.

    Example number i of the count has the seed `args.seed + i`. Processes share the batches, and a
    batch is always drawn whole: sums differ in the last bit with its shape, so that neither the
    number of processes nor an interruption changes a score.
    """
    folder = Path(args.pictures) / f"{task}-{digest(settings_of(model, task, args))}"
    paths = [folder / f"{i:05d}.png" for i in range(len(numbers))]
    batches = range(0, len(numbers), args.batch_size)[rank::world]
    for first in tqdm(batches, desc=task, leave=False, disable=not is_first()):
        chosen = slice(first, first + args.batch_size)
        examples = [dataset[i] for i in numbers[chosen]]
        requests = [request_of(example) for example in examples]
        if all(map(is_drawn, paths[chosen], requests)):
            continue
        sources = [to_pil(example["source"]) for example in examples if "source" in example]
        drawn = generate(model, task, [example["prompt"] for example in examples], sources or None,
                         steps=args.steps, seed=args.seed + first, guidance=args.guidance,
                         image_guidance=args.image_guidance)
        for picture, path, request in zip(drawn, paths[chosen], requests):
            save_png(picture, path, dict(request=request))
    return paths


# -------------------------------------------------------------------------------------------------
# Figures of a task

def squared_error(a, b):
    """Mean squared error of two pictures (3, H, W) in [-1, 1], on the scale [0, 1]."""
    return ((a.clamp(-1, 1) - b) / 2).square().mean().item()


def psnr(errors):
    """Mean of 10 log10(1 / MSE) over examples, in dB."""
    # An error of zero, where nothing had to change, counts as 100 dB instead of infinity.
    return float(np.mean(-10 * np.log10(np.maximum(errors, 1e-10))))


def summary(rows):
    """Rows of `measure` -> their figures."""
    figures = {key: psnr([row[key] for row in rows]) for key in ("output", "nothing", "ceiling")}
    # A mean of decibels is ruled by the best pictures; this share counts every example alike.
    # A sum's last bits depend on where a picture lies in memory, and are no improvement.
    closer = float(np.mean([row["output"] < 0.9999 * row["nothing"] for row in rows]))
    return dict(count=len(rows), closer=closer, **figures)


def summaries(rows):
    """Rows of `measure` -> the figures of all of them, and of each kind of edit."""
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
    apart = distances(drawn, pictures)
    return (apart < apart.gather(1, own[:, None])).sum(dim=1)


def coarse(pictures):
    """Pictures at 64 x 64 pixels at most, so that thousands of them fit into memory."""
    return F.adaptive_avg_pool2d(pictures, min(64, pictures.shape[-1]))


def figures_of_drawings(task, dataset, numbers, drawn):
    """Figures of a task without a source, and for each drawing the number of a picture to show.

    drawn: (B, 3, H, W), of the examples with these numbers.
    """
    # All built-in pictures of a split are candidates, not only those that were drawn: the more
    # there are, the harder it is to be the nearest. Of a folder only those that were drawn are.
    candidates = range(len(dataset)) if isinstance(dataset, emoji.Builtin) else numbers
    prompts, pictures = zip(*((example["prompt"], coarse(example["target"]))
                              for example in map(dataset.__getitem__, candidates)))
    pictures = torch.stack(pictures)
    own = [candidates.index(i) for i in numbers]
    figures = dict(count=len(own), of=len(candidates))
    if task == "class":
        nearest = distances(drawn, pictures).argmin(dim=1).tolist()
        right = [prompts[i] == prompts[j] for i, j in zip(own, nearest)]
        return figures | dict(same_class=float(np.mean(right))), [candidates[i] for i in nearest]
    rank = rank_own(drawn, pictures, torch.tensor(own)).numpy()
    # A rank of 0 means that no other picture is nearer.
    figures |= dict(nearest_1=float(np.mean(rank < 1)), nearest_10=float(np.mean(rank < 10)))
    return figures, numbers


def margin(score, count, resamples):
    """Half the width of a 95 % interval by the bootstrap: 1.96 standard deviations.

    score: a function of the numbers (count,) of examples, drawn with repetition. Percentiles would
    be wrong for a Frechet distance, which repeated pictures make larger.
    """
    rng = np.random.default_rng(0)
    values = [score(rng.integers(count, size=count)) for _ in range(resamples)]
    return 1.96 * np.std(values, axis=0, ddof=1)


class Tally:
    """What one judge says of all examples of a task, and the scores that follow."""

    def __init__(self, judge):
        self.judge = judge
        self.drawn = {}          # score -> a value an example, None where there is none
        self.copies = {}         # the same of the autoencoder's copies of the targets
        self.sets = ([], [], []) # features of drawings, copies and targets

    def add(self, examples, drawn, copies):
        if hasattr(self.judge, "judge"):
            for column, pictures in ((self.drawn, drawn), (self.copies, copies)):
                for name, values in self.judge.judge(examples, pictures).items():
                    column.setdefault(name, []).extend(values)
        if hasattr(self.judge, "features"):
            targets = measures.stack(examples, "target")
            for part, pictures in zip(self.sets, (drawn, copies, targets)):
                part.append(self.judge.features(pictures))

    def record(self, name, value, error, ceiling, count):
        """What is stored of a score. What is not finite, as of a single example, is null."""
        numbers = {key: float(number) if math.isfinite(number) else None for key, number in
                   dict(value=value, margin=error, ceiling=ceiling).items()}
        better = "lower" if name in LOWER_IS_BETTER else "higher"
        return dict(numbers, count=count, better=better, **self.judge.record)

    def scores(self):
        """Score -> its record."""
        scores = {}
        if "rest" in self.drawn:
            self.drawn["kept"] = [None if a is None else float(a >= b) for a, b in
                                  zip(self.drawn["rest"], self.copies["rest"])]
        for name, values in self.drawn.items():
            values = np.array([value for value in values if value is not None])
            ceiling = [value for value in self.copies.get(name, ()) if value is not None]
            if len(values):
                # One example alone says nothing about chance.
                error = np.nan
                if len(values) > 1:
                    error = margin(lambda rows: values[rows].mean(), len(values), 200)
                scores[name] = self.record(name, values.mean(), error,
                                           np.mean(ceiling) if ceiling else np.nan, len(values))
        count = sum(map(len, self.sets[0]))
        if count > 1:
            drawn, copies, targets = map(torch.cat, self.sets)
            ceilings = self.judge.compare(copies, targets)
            # Twenty resamples, because a score of the larger networks takes seconds.
            errors = margin(lambda rows: list(self.judge.compare(drawn[rows], targets[rows])
                                              .values()), count, 20)
            for (name, value), error in zip(self.judge.compare(drawn, targets).items(), errors):
                scores[name] = self.record(name, value, error, ceilings[name], count)
        return scores


@torch.no_grad()
def measure(model, task, dataset, numbers, paths, *, judges=(), batch_size=25, show=False):
    """Measure drawings -> figures of the first table, scores, and tuples of pictures for --grid.

    numbers: of the examples. paths: of their drawings. show: whether the pictures are wanted.
    """
    rows = []
    small = []
    pictures = []
    tallies = [Tally(judge) for judge in judges]
    for first in tqdm(range(0, len(numbers), batch_size), desc=f"{task}: scores", leave=False):
        chosen = slice(first, first + batch_size)
        examples = [example_of(dataset, i) for i in numbers[chosen]]
        drawn = torch.stack([to_tensor(Image.open(path).convert("RGB")) for path in paths[chosen]])
        targets = measures.stack(examples, "target").to(model.device)
        # A latent model can hardly be better than the autoencoder's own copy of the target.
        copies = model.vae.decode(model.vae.encode(targets)[0]).cpu()
        for example, picture, copy in zip(examples, drawn, copies):
            # All are compared with the target as it is, and not as the autoencoder copies it.
            target = example["target"]
            if "source" in example:
                rows.append(dict(kind=example.get("kind", ""),
                                 output=squared_error(picture, target),
                                 nothing=squared_error(example["source"], target),
                                 ceiling=squared_error(copy, target)))
            if show:
                shown = [example[key] for key in ("source",) if key in example]
                pictures.append(tuple(map(to_pil, (*shown, picture, target))))
        small.append(coarse(drawn))
        for tally in tallies:
            tally.add(examples, drawn, copies)
    scores = {name: r for tally in tallies for name, r in tally.scores().items()}
    if rows:
        return summaries(rows), scores, pictures
    figures, beside = figures_of_drawings(task, dataset, numbers, torch.cat(small))
    return figures, scores, [(drawn, to_pil(dataset[i]["target"]))
                             for (drawn, _), i in zip(pictures, beside)]


@torch.no_grad()
def measure_labels(model, dataset, numbers, args):
    """Infer the class of each picture (MT-Diffusion) -> figures, and the score top-1."""
    right = []
    for first in tqdm(range(0, len(numbers), args.batch_size), desc="label", leave=False):
        examples = [dataset[i] for i in numbers[first:first + args.batch_size]]
        known = dict(image=measures.stack(examples, "target"))
        drawn = draw_modalities(model, len(examples), known, steps=args.steps,
                                seed=args.seed + first)
        right += [float(row.argmax() == example["x"])
                  for row, example in zip(drawn["label"], examples)]
    tally = Tally(SimpleNamespace(record=dict(network="the model", sha256=None, resize="none")))
    tally.drawn["top-1"] = right
    figures = dict(count=len(right), of=drawn["label"].shape[1], top_1=float(np.mean(right)))
    return figures, tally.scores()


# -------------------------------------------------------------------------------------------------
# The command

HEADER = f"{'PSNR in dB':<20}{'count':>6}{'drawing':>9}{'nothing':>9}{'ceiling':>9}{'closer':>9}"
SCORES = f"{'score':<28}{'task':<9}{'count':>6}{'value':>11}{'+-':>9}{'ceiling':>10}  better"


def print_figures(task, figures):
    """Print the lines of one task, below HEADER."""
    # What has no PSNR fills the columns with a sentence.
    sentences = dict(
        same_class="nearest picture of {of} has the right class: {same_class:.0%}",
        nearest_1="own picture nearest of {of}: {nearest_1:.0%}, among the ten nearest: "
                  "{nearest_10:.0%}",
        top_1="of {of} classes the right one is the likeliest: {top_1:.0%}")
    for key, sentence in sentences.items():
        if key in figures:
            print(f"{task:<20}{figures['count']:>6}   {sentence.format(**figures)}")
            return
    for kind, f in figures.items():
        name = task if kind == "all" else f"  {kind}"
        print(f"{name:<20}{f['count']:>6}{f['output']:>9.2f}{f['nothing']:>9.2f}"
              f"{f['ceiling']:>9.2f}{f['closer']:>9.0%}")


def print_scores(scores, results):
    """Print all tasks' scores below each other, and below them what the words in the table mean.

    scores: task -> score -> its record.
    """
    print(f"\n{SCORES}")
    for task, records in scores.items():
        for name, r in records.items():
            star = "*" if TABLE_2.get(task) == name else ""
            value, error, ceiling = ("" if r[key] is None else format(r[key], ".4g")
                                     for key in ("value", "margin", "ceiling"))
            print(f"{name + star:<28}{task:<9}{r['count']:>6}{value:>11}{error:>9}{ceiling:>10}  "
                  f"{r['better']}")
    every = {name: r for records in scores.values() for name, r in records.items()}
    words = {"value", "ceiling", *every}
    if any("all" in figures for figures in results.values()):
        words |= {"drawing", "nothing", "closer"}
    print()
    for word in [word for word in LEGEND if word in words]:
        print(f"{word:<9} {LEGEND[word]}")
    if any(TABLE_2.get(task) in records for task, records in scores.items()):
        print("*         what MTU's Table 2 prints for this task")
    # Without the following lines two numbers of the same name are not comparable.
    for network, r in {r["network"]: r for r in every.values() if r["sha256"]}.items():
        print(f"{network}: sha256 {r['sha256']}, resize: {r['resize']}"
              + "".join(f", {question} right on {share:.0%} of held-out pictures"
                        for question, share in (r.get("accuracy") or {}).items()))
    settings = [r["settings"] for records in scores.values() for r in list(records.values())[:1]]
    # What differs between the tasks, such as the guidance, has a line for each of them.
    lines = [{key: value for key, value in each.items()
              if key == "task" or len(settings) > 1 and any(value != o[key] for o in settings)}
             for each in settings]
    if settings:
        lines.append({key: value for key, value in settings[0].items() if key not in lines[0]})
    for line in lines:
        print(", ".join(f"{key} {value}" for key, value in line.items()))


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
    group = parser.add_argument_group("what to measure")
    group.add_argument("--task", default="all", help="all, or one task")
    group.add_argument("--model", default=str(ASSETS / "tiny-mtu"), help="model folder or hub id")
    group.add_argument("--data", help="folder of pictures, see readers.py (default: the emoji)")
    group.add_argument("--count", type=int, default=100, help="examples per task")
    group.add_argument("--split", choices=("heldout", "train", "test"), default="heldout",
                       help="train measures pictures that were trained on; some folders have a "
                       "test set")

    group = parser.add_argument_group("how to draw")
    group.add_argument("--steps", type=int, default=20, help="sampling steps")
    group.add_argument("--guidance", type=float, help="text guidance scale (default: the model's)")
    group.add_argument("--image-guidance", type=float, help="image guidance scale (likewise)")
    group.add_argument("--seed", type=int, default=0, help="random seed of the drawings")
    group.add_argument("--batch-size", type=int, default=25, help="pictures drawn at a time")
    group.add_argument("--device", help="torch device (default: cuda, else mps, else cpu)")

    group = parser.add_argument_group("the papers' measures, whose networks you name")
    group.add_argument("--inception", metavar="FILE", help="torch-fidelity's Inception v3: KID, "
                       "FID, Inception Score, precision and recall")
    group.add_argument("--lpips", metavar="FILE", help="torchvision's AlexNet or VGG 16: LPIPS")
    group.add_argument("--clip", metavar="MODEL", help="folder or hub id of a CLIPModel: "
                       "directions and the CLIP score")
    group.add_argument("--ssim", action="store_true", help="SSIM, which needs scikit-image")

    group = parser.add_argument_group("what to save")
    group.add_argument("--pictures", default="samples/evaluate", help="folder for the drawings")
    group.add_argument("--out", help="JSON file for the figures")
    group.add_argument("--grid", help="PNG file for the pictures of one task: source (if it has "
                       "one), drawing and target (for class, the nearest) below each other")
    args = parser.parse_args()
    if min(args.count, args.batch_size) < 1:
        raise UserError(f"--count {args.count} and --batch-size {args.batch_size} must be at "
                        "least 1")
    if not 0 <= args.seed < 2 ** 62:
        raise UserError(f"--seed {args.seed} must be from 0 to 2^62 - 1")
    if args.inception and args.count < 10:
        raise UserError(f"--count {args.count}: --inception needs at least 10 pictures")
    return args


def measured_tasks(args, model):
    """The tasks that --task names. A UserError says what cannot be measured."""
    # Pictures that were drawn without any input have no target to compare with, nor have most
    # joint tasks.
    measurable = [task for task in model.tasks if task in (*ALL, "class", "label")]
    fixed = [task for task in measurable if task not in ("class", "label")]
    if fixed and model.native_size != 64 and args.data is None:
        raise UserError(f"{args.model} draws {model.native_size} x {model.native_size} pictures, "
                        "and the built-in ones are 64 x 64; name others with --data")
    tasks = [args.task]
    if args.task == "all":
        # Of a folder, those that it has pictures for.
        tasks = [*data.served_folders(args.data, measurable)] if args.data else measurable
    if not tasks or not set(tasks) <= set(measurable):
        raise UserError(f"--task {args.task}: {args.model} can be measured on "
                        f"{', '.join(measurable) or 'nothing'}")
    # Refused now, and not after minutes of drawing.
    if args.grid and (len(tasks) > 1 or tasks == ["label"] or not args.grid.endswith(".png")):
        raise UserError(f"--grid {args.grid} is a .png file for the pictures of one --task")
    return tasks


def open_judges(args, device):
    """Load the networks that args name -> judges of any task, and those of pairs of pictures.

    They are loaded before anything is drawn, so that a wrong file costs no time.
    """
    judges = []
    pairs = [measures.Change()]
    if args.inception:
        judges.append(measures.Inception(device, args.inception))
    if args.clip:
        judges.append(measures.CLIP(device, args.clip))
    if args.lpips:
        pairs.append(measures.Perceptual(device, args.lpips))
    if args.ssim:
        pairs.append(measures.Similarity())
    if args.data is None:
        judges.append(measures.Emoji(device))
    return judges, pairs


def measure_task(model, task, args, judges, pairs, rank=0, world=1):
    """Draw a task, sharing the work, and measure it in the first process -> as `measure`, or None.
    """
    dataset = open_examples(task, args.split, model.native_size, args.data)
    numbers = spread(args.count, len(dataset))
    settings = settings_of(model, task, args)
    if task == "label":
        if rank > 0:
            return None
        figures, scores = measure_labels(model, dataset, numbers, args)
        pictures = []
    else:
        paths = draw(model, task, dataset, numbers, args, rank, world)
        if world > 1:
            torch.distributed.barrier()
        if rank > 0:
            return None
        if TASKS[task].source is not None:
            # Of a degraded picture no part is to stay.
            judges = [*(pairs[1:] if task == "sr" else pairs), *judges]
        figures, scores, pictures = measure(
            model, task, dataset, numbers, paths, judges=judges, batch_size=args.batch_size,
            show=bool(args.grid))
    if "FID" in scores and len(numbers) < 2048:
        print_once(f"warning: FID of {len(numbers)} pictures is far too large, and compares only "
                   "with itself. Papers take 5,000 to 50,000; below 2,048 read KID")
    if task == "edit" and "CLIP image similarity" in scores and TABLE_2[task] not in scores:
        print_once("warning: no CLIP image-text direction, because the examples have no captions; "
                   "a metadata.jsonl has them as caption, of the source, and output")
    return figures, {name: r | dict(settings=settings) for name, r in scores.items()}, pictures


def main():
    args = get_args()
    rank, world, device = 0, 1, None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from train import join_processes  # here, because one process needs none of train.py
        device, rank, world = join_processes(args)
    model = load_model(args.model, device=device or pick_device(args.device))
    tasks = measured_tasks(args, model)
    for task in tasks:
        # What a folder lacks is named now, and not after another task was drawn.
        open_examples(task, args.split, model.native_size, args.data)
    judges, pairs = open_judges(args, model.device)
    args.model_hash = model_hash(model)
    results = {}
    scores = {}
    if rank == 0:
        print(HEADER)
    for task in tasks:
        measured = measure_task(model, task, args, judges, pairs, rank, world)
        if measured:
            results[task], scores[task], pictures = measured
            print_figures(task, results[task])
    if rank == 0:
        print_scores(scores, results)
        if args.grid:
            save_grid(pictures, args.grid, vars(args))
        if args.out:
            # The arguments stand beside the figures, so that a file says how it was made.
            write_json(args.out, dict(arguments=vars(args), results=results, scores=scores))
    if world > 1:
        # torchrun ends a process when the others have left: they wait while the first measures.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    command(main)
