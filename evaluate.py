"""Measure a model on held-out pictures.

    python evaluate.py --task all --count 100
    python evaluate.py --task all --model MODEL --data FOLDER --count 5000 --ssim \
        --inception weights-inception-2015-12-05-6726825d.pth --lpips alexnet-owt-7be5be79.pth \
        --clip openai/clip-vit-large-patch14
    torchrun --nproc_per_node 8 evaluate.py ...

It draws the examples, keeps the drawings as PNG files, and prints one table of all tasks. Whoever
stops it and starts it again goes on with what is drawn. Without the second command's options every
measure is computed from what the project ships: PSNR, distances and answers of a small classifier
of the built-in emoji, and for text-to-image how often a drawing is nearer to its caption's own
picture than to any other. measures.py says what each measure is, and LEGEND what it means.

Each score stands between two others. `nothing` is what a model would reach that gives back the
source as it is, and `ceiling` what the autoencoder's own copy of the target reaches, which a latent
model can hardly surpass. No figure replaces a look at the drawings, which lie in --pictures.
"""
import hub  # noqa: F401  the first import, so that Ctrl-C ends quietly
import functools
import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import emoji
import measures
from data import ALL, ASSETS, TASKS, to_pil, to_tensor
from hub import Parser, UserError, between, command, is_first, print_once, read_json, write_json
from hub import write_png
from sample import draw_modalities, generate, load_model, scales
from train import check_size, join_processes

# What the columns and the scores mean. Only lines that the table needs are printed below it.
LEGEND = {
    "value": "the score; +- is half the width of its 95 % interval (bootstrap over examples)",
    "nothing": "the same score of the source as it is, which for sr is bicubic enlargement",
    "ceiling": "the same score of the autoencoder's copy of the target, about what a perfect "
               "latent model would reach",
    "PSNR": "likeness of drawing and target in dB, mean over examples",
    "closer": "share of drawings with a smaller squared error than the source as it is",
    "changed": "share of drawings that, where something had to change, are nearer to the target "
               "than to the source",
    "rest": "PSNR in dB, to the source, of the part that was to stay",
    "kept": "share of drawings whose rest is no farther from the source than the autoencoder's "
            "own copy",
    "nearest": "share of drawings to which no picture is nearer than their caption's own",
    "nearest 10": "share of drawings that have it among the ten nearest",
    "same class": "share of drawings whose nearest picture is of the class that was asked for",
    "tone": "share in which the classifier sees the skin tone that was asked for",
    "gender": "share in which the classifier sees the figure that was asked for",
    "colour": "share in which the classifier sees the colour that was asked for",
    "category": "share in which the classifier sees the category that was asked for",
    "style": "share in which the classifier sees the style that was asked for",
    "emoji-KD": "kernel distance of drawings and targets in the classifier's features (not KID)",
    "emoji-FD": "Frechet distance in the same features (not FID)",
    "top-1": "share of pictures whose own class is the likeliest",
    "KID": "kernel distance in Inception's features; unbiased, so it stands before FID",
    "FID": "Frechet distance in Inception's features; larger for fewer pictures",
    "Inception Score": "how sure Inception is of each drawing, and how unlike they are",
    "precision": "share of drawings that lie among the targets, in Inception's features",
    "recall": "share of targets that lie among the drawings, in Inception's features",
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

def open_examples(task, split, size, root=None):
    """The data set whose examples are counted: the built-in one, or a folder."""
    dataset = data.open_dataset(task, split, size, root)
    if root is None and task == "t2i":
        return emoji.Builtin("plain", split)
    if isinstance(dataset, data.Encoded):
        raise UserError(f"{root} holds latents; name the folder that it was encoded from")
    return dataset


def spread(count, length):
    """Numbers of `count` examples, spread over a data set of `length`."""
    # Neighbours in the built-in data are alike: one figure in its genders and tones.
    count = min(count, length)
    return [i * length // count for i in range(count)]


def example_of(dataset, i):
    """Example i, with its number and, where it has any, the answers and captions for measures.py.

    answers: question of the classifier -> what the drawing should show. captions: of the source and
    of the target of an edit.
    """
    example = dataset[i]
    if not isinstance(dataset, emoji.Builtin):
        # In place of one that is broken comes another, whose number is not i.
        captions = captions_of(dataset, dataset.items[example["number"]])
        return dict(example, number=i, captions=captions)
    item = dataset.items[i]
    if isinstance(item, emoji.Change):
        # A change of tone asks for a tone, and says nothing of the figure.
        names = captions_by_cell()
        captions = [names[item.style, *cell] for cell in (item.source, item.target)]
        return dict(example, number=i, captions=captions, answers={item.kind: item.b})
    answers = {}
    # What a removal or a super-resolution should show has no word in the classifier's vocabulary.
    if "source" not in example:
        answers = dict(category=item[0].category.lower(), style=item[1])
    if dataset.task == "class":
        del answers["style"]  # nobody asked for one
    return dict(example, number=i, answers=answers)


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
    if isinstance(text, dict) and text.get("file", "").endswith(".json"):
        # Training reads the instruction alone, so the reader left the rest in the file.
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
    return digest([data.fingerprint(model.unet), *data.encoder_hashes(model), model.scheduler,
                   model.index])


@functools.cache
def code_hash():
    """A short hash of the project's code: yesterday's drawing must not be taken for today's."""
    return digest([path.read_text(encoding="utf-8")
                   for path in sorted(Path(__file__).parent.glob("*.py"))])


def settings_of(model, task, args):
    """Whatever a drawing depends on besides its example. It stands in every score's record."""
    # A scale that is not given is the model's own, which is what has to be recorded.
    guidance, image_guidance = scales(model, task, args.guidance, args.image_guidance)
    # The last bits of a sum depend on the size of a batch, the device and the precision.
    return dict(task=task, data=args.data or "built-in", split=args.split, seed=args.seed,
                steps=args.steps, guidance=guidance,
                image_guidance=image_guidance if TASKS[task].source else None, format="8-bit PNG",
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
    # Other settings have another folder, so that drawings of both can be compared.
    folder = Path(args.pictures) / f"{task}-{digest(settings_of(model, task, args))}"
    paths = [folder / f"{i:05d}.png" for i in range(len(numbers))]
    batches = range(0, len(numbers), args.batch_size)[rank::world]
    for first in tqdm(batches, desc=task, leave=False, disable=not is_first()):
        chosen = slice(first, first + args.batch_size)
        examples = [dataset[i] for i in numbers[chosen]]
        # Pictures of a folder may have changed while their names stayed, so they are read anew.
        requests = [request_of(example) for example in examples]
        if all(map(is_drawn, paths[chosen], requests)):
            continue
        sources = [to_pil(example["source"]) for example in examples if "source" in example]
        drawn = generate(model, task, [example["prompt"] for example in examples], sources or None,
                         steps=args.steps, seed=args.seed + first, guidance=args.guidance,
                         image_guidance=args.image_guidance)
        for picture, path, request in zip(drawn, paths[chosen], requests):
            # The request is written into the PNG, and `is_drawn` reads it there.
            write_png(path, picture, dict(request=request))
    return paths


# -------------------------------------------------------------------------------------------------
# Scores

def margin(score, count, resamples):
    """Half the width of a 95 % interval by the bootstrap: 1.96 standard deviations.

    score: a function of the numbers (count,) of examples, drawn with repetition. Percentiles would
    be wrong for a Frechet distance, which repeated pictures make larger.
    """
    if count < 2:
        return np.nan  # one example alone says nothing about chance
    # A seed of its own, so that the same drawings always have the same interval.
    rng = np.random.default_rng(0)
    values = [score(rng.integers(count, size=count)) for _ in range(resamples)]
    return 1.96 * np.std(values, axis=0, ddof=1)


class Tally:
    """What one judge says of all examples of a task, and the scores that follow.

    Besides the drawings, which give a score its value, it judges what the other columns are of.
    """
    COLUMNS = ("value", "nothing", "ceiling")

    def __init__(self, judge):
        self.judge = judge
        self.values = {}        # score -> column -> list of values
        self.features = {}      # column, or "target" -> list of (B, D)

    def add(self, examples, pictures):
        """Judge a batch. pictures: column -> (B, 3, H, W)."""
        if hasattr(self.judge, "judge"):
            for column, batch in pictures.items():
                for name, values in self.judge.judge(examples, batch).items():
                    # Of some examples a judge has nothing to say.
                    self.values.setdefault(name, {}).setdefault(column, []).extend(
                        value for value in values if value is not None)
        if hasattr(self.judge, "features"):
            targets = measures.stack(examples, "target")
            for column, batch in dict(pictures, target=targets).items():
                self.features.setdefault(column, []).append(self.judge.features(batch))

    def record(self, name, count, columns, error):
        """What is stored of a score. What is not finite, as of a single example, is null."""
        numbers = dict.fromkeys(self.COLUMNS, np.nan) | columns | dict(margin=error)
        numbers = {key: float(number) if math.isfinite(number) else None
                   for key, number in numbers.items()}
        better = "lower" if name in LOWER_IS_BETTER else "higher"
        return dict(numbers, count=count, better=better, **self.judge.record)

    def scores(self):
        """Score -> its record."""
        scores = {}
        # A judge of single pictures: the score is the mean over the examples that have a value.
        for name, columns in self.values.items():
            values = np.array(columns["value"])
            if len(values):
                means = {column: np.mean(each) for column, each in columns.items() if each}
                error = margin(lambda rows: values[rows].mean(), len(values), 200)
                scores[name] = self.record(name, len(values), means, error)
        # A judge of sets: the score compares the features of all drawings with the targets'.
        features = {column: torch.cat(parts) for column, parts in self.features.items()}
        targets = features.pop("target", ())
        if len(targets) > 1:
            distances = {column: self.judge.compare(part, targets)
                         for column, part in features.items()}
            # Drawings and targets are drawn in pairs: an example counts with both of its pictures.
            # Twenty resamples, because a score of the larger networks takes seconds.
            errors = margin(lambda rows: list(self.judge.compare(
                features["value"][rows], targets[rows]).values()), len(targets), 20)
            for name, error in zip(distances["value"], errors):
                columns = {column: distance[name] for column, distance in distances.items()}
                scores[name] = self.record(name, len(targets), columns, error)
        return scores


def open_drawing(path):
    """A drawing -> (3, H, W) in [-1, 1]."""
    return to_tensor(Image.open(path).convert("RGB"))


@torch.no_grad()
def measure(model, dataset, numbers, paths, judges, batch_size):
    """Measure drawings -> score -> its record. numbers: of the examples; paths: of the drawings."""
    tallies = [Tally(judge) for judge in judges]
    for first in tqdm(range(0, len(numbers), batch_size), desc="scores", leave=False):
        chosen = slice(first, first + batch_size)
        examples = [example_of(dataset, i) for i in numbers[chosen]]
        targets = measures.stack(examples, "target").to(model.device)
        # A drawing is compared with the target as it is, and not as the autoencoder copies it.
        copies = model.vae.decode(model.vae.encode(targets)[0]).clamp(-1, 1).cpu()
        examples = [dict(example, copy=copy) for example, copy in zip(examples, copies)]
        pictures = dict(value=torch.stack(list(map(open_drawing, paths[chosen]))), ceiling=copies)
        if "source" in examples[0]:
            pictures["nothing"] = measures.stack(examples, "source")
        for tally in tallies:
            tally.add(examples, pictures)
    return {name: r for tally in tallies for name, r in tally.scores().items()}


@torch.no_grad()
def measure_labels(model, dataset, numbers, args):
    """Infer the class of each picture (MT-Diffusion) -> the record of the score top-1."""
    right = []
    for first in tqdm(range(0, len(numbers), args.batch_size), desc="label", leave=False):
        examples = [dataset[i] for i in numbers[first:first + args.batch_size]]
        known = dict(image=measures.stack(examples, "target"))
        drawn = draw_modalities(model, len(examples), known, steps=args.steps,
                                seed=args.seed + first)
        # drawn["label"] is (B, classes), and x the number of the right class.
        right += [float(row.argmax() == example["x"])
                  for row, example in zip(drawn["label"], examples)]
    # No judge is needed, since the model itself gives the answer.
    record = measures.identify(f"the model, of {drawn['label'].shape[1]} classes")
    tally = Tally(SimpleNamespace(record=record))
    tally.values["top-1"] = dict(value=right)
    return tally.scores()


# -------------------------------------------------------------------------------------------------
# The command

HEADER = (f"{'score':<28}{'task':<9}{'count':>6}{'value':>11}{'+-':>11}{'nothing':>11}"
          f"{'ceiling':>11}  better")


def print_scores(task, scores):
    """Print the lines of one task, below HEADER."""
    for name, r in scores.items():
        star = "*" if TABLE_2.get(task) == name else ""
        numbers = ["" if r[key] is None else format(r[key], ".4g")
                   for key in ("value", "margin", "nothing", "ceiling")]
        cells = "".join(f"{number:>11}" for number in numbers)
        print(f"{name + star:<28}{task:<9}{r['count']:>6}{cells}  {r['better']}", flush=True)


def print_legend(scores):
    """Print what the words in the table mean, and what its numbers depend on.

    scores: task -> score -> its record.
    """
    records = {name: r for of_task in scores.values() for name, r in of_task.items()}
    # "PSNR, tone" is the PSNR of one kind of edit.
    words = {"value", "nothing", "ceiling", *(name.partition(",")[0] for name in records)}
    print()
    for word in filter(words.__contains__, LEGEND):
        print(f"{word:<10} {LEGEND[word]}")
    if any(TABLE_2.get(task) in of_task for task, of_task in scores.items()):
        print("*          what MTU's Table 2 prints for this task")
    # Without the following lines two numbers of the same name are not comparable.
    for network, r in {r["network"]: r for r in records.values()}.items():
        parts = [f"resize: {r['resize']}"]
        if r["sha256"]:
            parts.insert(0, f"sha256 {r['sha256']}")
        for question, share in (r.get("accuracy") or {}).items():
            parts.append(f"{question} right on {share:.0%} of held-out pictures")
        print(f"{network}: {', '.join(parts)}")
    for of_task in filter(None, scores.values()):
        # All scores of a task have the same settings.
        settings = next(iter(of_task.values()))["settings"]
        print(", ".join(f"{key} {value}" for key, value in settings.items()))


def get_args():
    parser = Parser("Measure a model on held-out pictures.")
    group = parser.add_argument_group("what to measure")
    group.add_argument("--task", default="all", help="all, or one task")
    group.add_argument("--model", default=str(ASSETS / "tiny-mtu"), help="model folder or hub id")
    group.add_argument("--data", help="folder of pictures, see readers.py (default: the emoji)")
    group.add_argument("--count", type=between(1, 1e9), default=100, help="examples per task")
    group.add_argument("--split", choices=("heldout", "train", "test"), default="heldout",
                       help="train measures pictures that were trained on; some folders have a "
                       "test set")

    group = parser.add_argument_group("how to draw")
    group.add_argument("--steps", type=int, default=20, help="sampling steps")
    group.add_argument("--guidance", type=float, help="text guidance scale (default: the model's)")
    group.add_argument("--image-guidance", type=float, help="image guidance scale (likewise)")
    group.add_argument("--seed", type=between(0, 1e18), default=0,
                       help="random seed of the drawings")
    group.add_argument("--batch-size", type=between(1, 1e6), default=25,
                       help="pictures drawn at a time")
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
    group.add_argument("--out", help="JSON file for the scores")
    args = parser.parse_args()
    if args.inception and args.count < 10:
        # The Inception Score is a mean over ten parts of the pictures.
        raise UserError(f"--count {args.count}: --inception needs at least 10 pictures")
    return args


def measured_tasks(args, model):
    """The tasks that --task names. A UserError says what cannot be measured."""
    # Pictures that were drawn without any input have no target to compare with, nor have most
    # joint tasks.
    measurable = [task for task in model.tasks if task in (*ALL, "class", "label")]
    check_size(args, model)
    tasks = [args.task]
    if args.task == "all":
        # Of a folder, those that it has pictures for.
        tasks = [*data.served_folders(args.data, measurable)] if args.data else measurable
    if not tasks or not set(tasks) <= set(measurable):
        raise UserError(f"--task {args.task}: {args.model} can be measured on "
                        f"{', '.join(measurable) or 'nothing'}")
    return tasks


def open_judges(args, device):
    """Load the networks that args name -> judges, in the order of their lines in the table.

    They are loaded before anything is drawn, so that a wrong file costs no time.
    """
    judges = []
    if args.lpips:
        judges.append(measures.Perceptual(device, args.lpips))
    if args.ssim:
        judges.append(measures.Similarity())
    if args.inception:
        judges.append(measures.Inception(device, args.inception))
    if args.clip:
        judges.append(measures.CLIP(device, args.clip))
    if args.data is None:
        # The classifier knows nothing but emoji.
        judges.append(measures.Emoji(device))
    return judges


def measure_task(model, task, args, judges, rank=0, world=1):
    """Draw a task, sharing the work, and measure it in the first process -> scores, or None.

    judges: from `open_judges`.
    """
    dataset = open_examples(task, args.split, model.native_size, args.data)
    numbers = spread(args.count, len(dataset))
    # What is inferred of a picture is a number, and is not kept.
    paths = [] if task == "label" else draw(model, task, dataset, numbers, args, rank, world)
    if world > 1:
        torch.distributed.barrier()
    if rank > 0:
        return None  # it goes on with the next task
    if task == "label":
        scores = measure_labels(model, dataset, numbers, args)
    else:
        judges = [*built_in_judges(task, dataset, numbers), *judges]
        scores = measure(model, dataset, numbers, paths, judges, args.batch_size)
    warn(task, scores, len(numbers))
    settings = settings_of(model, task, args)
    return {name: r | dict(settings=settings) for name, r in scores.items()}


def built_in_judges(task, dataset, numbers):
    """The judges of one task that need no network."""
    if not TASKS[task].source:
        # All built-in pictures of a split are candidates, not only those that were drawn: the more
        # there are, the harder it is to be the nearest. Of a folder only those that were drawn are.
        candidates = range(len(dataset)) if isinstance(dataset, emoji.Builtin) else numbers
        return [measures.Nearest(dataset, candidates)]
    # Of a degraded picture no part is to stay.
    return [measures.Pixels()] if task == "sr" else [measures.Pixels(), measures.Change()]


def warn(task, scores, count):
    """Say on stderr what is wrong with a score, or missing."""
    if "FID" in scores and count < 2048:
        print_once(f"warning: FID of {count} pictures is far too large, and compares only with "
                   "itself. Papers take 5,000 to 50,000; below 2,048 read KID")
    if task == "edit" and "CLIP image similarity" in scores and TABLE_2[task] not in scores:
        print_once("warning: no CLIP image-text direction, because the examples have no captions; "
                   "a metadata.jsonl has them as caption, of the source, and output")


def main():
    args = get_args()
    device, rank, world = join_processes(args)
    model = load_model(args.model, device=device)
    tasks = measured_tasks(args, model)
    for task in tasks:
        # What a folder lacks is named now, and not after another task was drawn.
        open_examples(task, args.split, model.native_size, args.data)
    judges = open_judges(args, model.device)
    args.model_hash = model_hash(model)
    scores = {}
    if rank == 0:
        # Lines appear as tasks are done, since drawing thousands of pictures takes hours.
        print(HEADER)
    for task in tasks:
        scores[task] = measure_task(model, task, args, judges, rank, world)
        if rank == 0:
            print_scores(task, scores[task])
    if rank == 0:
        print_legend(scores)
        if args.out:
            # The arguments stand beside the scores, so that a file says how it was made.
            write_json(args.out, dict(arguments=vars(args), scores=scores))
    if world > 1:
        # torchrun ends a process when the others have left: they wait while the first measures.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    command(main)
