"""Tasks and data: what each task reads, where its pictures come from, and what a batch holds.

    TASKS            one row a task; ALL names the four of MTU (arXiv 2503.11905, section 6.1)
    builtin, Folder  data sets: the emoji that come with the project, or a folder of your own
    Encoded          a folder that was encoded once, so that training encodes nothing again
    Examples         examples of a run: a function of (seed, step, index in the batch) alone
    Encoder          the pictures of a batch as latents of a frozen autoencoder

    python data.py check --data FOLDER
    python data.py show --task edit --data FOLDER
    python data.py encode --data FOLDER --model MODEL --out ENCODED

A data set yields dicts: `prompt` (str), `target` (3, H, W) in [-1, 1], for image-to-image tasks
`source` (3, H, W), and for MT-Diffusion's tasks `x`, the other modality: a picture, the number of
a class, or a text.

Letters: B batch, C channels, H W picture, h w latent, S text length, D text width.
"""
import hub  # noqa: F401  the first import, so that Ctrl-C ends quietly
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
import textwrap
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import emoji
from chart import arrange
from emoji import ASSETS, DEGRADATIONS, ItemDataset, on_white, patched, to_pil, to_tensor
from hub import Parser, UserError, blaming, command, fcntl, open_weights, pick_device, read_json
from hub import replacing, write_json, write_png, writing
from readers import MAX_PIXELS, PICTURES, Frame, Rows, as_list, choose, decode, draw_text
from readers import file_names, find_broken, find_layout, open_image, open_square, read_rows
from readers import split_part, usable_rows

# -------------------------------------------------------------------------------------------------
# Tasks

class Task(NamedTuple):
    source: bool = False  # whether a picture enters beside z_t; where dropped it is zeros
    drop: tuple = (0.0, 0.0, 0.0)  # probability that the text, both, or the picture is dropped
    guidance: float = 1.0          # the paper's text scale on SD 1.5; 1 is no guidance
    image_guidance: float = 1.0
    modality: str | None = None  # MT-Diffusion: the name of x, the other modality
    columns: tuple = ()          # what the rows of a folder need besides file_name


# The dropout of edit and inpaint is InstructPix2Pix's: 5 % text, 5 % both, 5 % picture.
# For MT-Diffusion's tasks the last number is the share of samples that train without x, which the
# paper's starred variants do; it does not print the share.
TASKS = {
    "t2i":       Task(drop=(0.10, 0.0, 0.0), guidance=7.5, columns=("text",)),
    "edit":      Task(source=True, drop=(0.05, 0.05, 0.05), guidance=7.5, image_guidance=1.6,
                      columns=("text", "source_file_name")),
    # The source of sr is the picture itself, degraded anew each time.
    "sr":        Task(source=True),
    "inpaint":   Task(source=True, drop=(0.05, 0.05, 0.05), guidance=4.0, image_guidance=1.5,
                      columns=("text", "source_file_name")),
    # The name of a class is the prompt, so dropout and guidance work as for text. DiT: 10 %.
    "class":     Task(drop=(0.10, 0.0, 0.0), guidance=4.0, columns=("label",)),
    "uncond":    Task(),
    "translate": Task(modality="source", columns=("source_file_name",)),
    "masked":    Task(drop=(0.0, 0.0, 0.1), modality="masked"),
    "label":     Task(drop=(0.0, 0.0, 0.1), modality="label", columns=("label",)),
    "repr":      Task(drop=(0.0, 0.0, 0.1), modality="repr", columns=("text",)),
}
ALL = ("t2i", "edit", "sr", "inpaint")
# The paper's text and image scales with SDXL.
SDXL_GUIDANCE = {"t2i": (5.0, 1.0), "edit": (10.0, 1.5), "sr": (1.0, 1.0), "inpaint": (4.0, 1.5)}

# What `sample.py --task` draws when it is given nothing: a picture in assets/examples, a prompt.
EXAMPLES = {
    "t2i": (None, "red apple, google style"),
    "edit": ("edit.png", "give it dark skin"),
    "sr": ("sr.png", ""),
    "inpaint": ("inpaint.png", "remove the thumbs up sign on the left"),
}


# -------------------------------------------------------------------------------------------------
# Data sets

def builtin(task, split, size=64):
    """The built-in emoji for a task; split is "train" or "heldout".

    size: of the pictures of tasks that draw on pixels; the others are 64 x 64.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    if split not in ("train", "heldout"):
        raise UserError(f"unknown split {split!r}; use train or heldout")
    return emoji.Builtin(task, split, size)


def folder_of(task, root):
    """The folder of one task: root/TASK where there is one, or else root itself."""
    folder = Path(root) / task
    return folder if folder.is_dir() else Path(root)


def open_dataset(task, split, size, root=None, **options):
    """The data set of one task: the built-in one, a folder, or an encoded folder.

    options: of `Folder`, degradation and reverse.
    """
    if root is None:
        return builtin(task, split, size)
    folder = folder_of(task, root)
    # Each task decides for itself: some folders may be encoded and others not.
    kind = Encoded if is_encoded(folder) else Folder
    dataset = kind(folder, task, split, size, **options)
    if not dataset.items:
        raise UserError(f"{folder} has no {split} pictures for {task}; mark some lines of "
                        f'metadata.jsonl with "split": "{split}"')
    return dataset


def class_names(root=None, task="label"):
    """The classes of the tasks class and label: the built-in categories, or those of a folder.

    They are in alphabetical order, so that a class has the same number in every run.
    """
    if root is None:
        return emoji.classes()
    folder = folder_of(task, root)
    if is_encoded(folder):
        with blaming(folder / "encoded.json"):
            splits = read_json(folder / "encoded.json")["tasks"].get(task, {})
            names = sorted({label for items in splits.values() for *_, label in items})
    else:
        names = sorted({row["label"] for row in read_rows(folder)[0] if "label" in row})
    if not names:
        raise UserError(f"{root}: no picture has a label, which {task} needs")
    return names


def needed_columns(task):
    """The columns of a row that a task reads."""
    return ["file_name", *TASKS[task].columns]


def missing_columns(task, rows, layout):
    """The columns that a task reads and that not every row has."""
    columns = set(rows.columns or ())
    if layout.words not in (None, task):
        columns.discard("text")  # an instruction to edit a picture is no caption of it
    return [column for column in needed_columns(task) if column not in columns]


def served_tasks(rows, layout):
    """The tasks for which every row has what they read."""
    return [task for task in TASKS if not missing_columns(task, rows, layout)]


def served_folders(root, tasks):
    """Task -> its folder, for those of `tasks` that the pictures in `root` serve."""
    root = Path(root)
    folders = {task: root / task for task in tasks if (root / task).is_dir()}
    # Beside the folders of tasks nothing counts, or these would be classes of pictures in the root.
    folders = folders or dict.fromkeys(tasks, root)
    served = {folder: served_tasks(read_rows(folder)[0], layout)
              for folder in set(folders.values()) if (layout := find_layout(folder))}
    folders = {task: folder for task, folder in folders.items() if task in served.get(folder, ())}
    if not folders:
        raise UserError(f"{root} serves none of {', '.join(tasks)}; see readers.py for what a "
                        "folder looks like")
    return folders


class Folder(ItemDataset):
    """Pictures in one of the layouts of readers.py, such as a metadata.jsonl, an object a line:

        {"file_name": "after.jpg", "source_file_name": "before.jpg", "text": "make it snow"}

    t2i needs no source, and sr makes its own from the picture. Lines with "split": "heldout" are
    held out; where no line has a split, one file name in ten is. Pictures are cropped to their
    central square and resized; where a data set's authors cut and mirror at random, training does
    so too, alike for both pictures of a pair. The few rows whose pictures are broken are left out.

    degradation: of sr, one of DEGRADATIONS. reverse: the source and the target change places.
    """
    TRIES = 10

    def __init__(self, root, task, split, size, degradation="simple", reverse=False):
        self.root = root
        self.task = task
        self.size = size
        self.degrade = DEGRADATIONS[degradation]
        self.reverse = reverse
        self.layout = find_layout(root)
        self.augment = split == "train"
        self.record = None  # see record_skipped
        rows, _ = read_rows(root)
        if missing := missing_columns(task, rows, self.layout):
            served = ", ".join(served_tasks(rows, self.layout)) or "no task"
            raise UserError(f"{root} serves {served}; for {task} every picture needs "
                            f"{' and '.join(missing)}, in a metadata.jsonl or as readers.py says")
        self.items = Rows(row for row in usable_rows(root) if row["split"] == split)
        self.classes = class_names(root) if task == "label" else None

    def draw_frame(self, rng):
        """Choose what of the pictures is seen, by the rules of the data set's authors."""
        enlarge, left, top, mirror = rng.random(4)
        # What is measured stays the same picture; the built-in data do likewise.
        if not self.augment:
            return Frame()
        low, high = self.layout.enlarge
        return Frame(low + (high - low) * enlarge, left, top, self.layout.mirror and mirror < 0.5)

    def open_example(self, i, seed):
        """Visit example i -> its row with its text and number, and the list of its pictures.

        In place of an example whose pictures turn out broken comes the next good one. That is a
        function of i and the seed: the same on every rank, in every run, and after resuming.
        """
        columns = needed_columns(self.task)
        broken = []
        for number in range(i, i + self.TRIES):
            # Each try starts from the same seed, and pairs share a frame: the picture before an
            # edit and the one after it stay aligned.
            rng = np.random.default_rng(seed)
            number %= len(self.items)
            row = choose(self.items[number], rng) | dict(number=number)
            try:
                if "text" in columns:
                    row["text"] = draw_text(self.root, row["text"], rng)
                frame = self.draw_frame(rng)
                pictures = [open_square(self.root / row[column], self.size, frame)
                            for column in PICTURES if column in columns]
            except UserError as error:
                broken.append((self.root / row["file_name"], str(error)))
                continue
            report_broken(self.record, tuple(broken))
            return row, pictures
        # So many in a row are no accident: the disk is gone, say.
        raise UserError(f"{self.TRIES} examples in a row cannot be read; the last one: "
                        f"{broken[-1][1]}")

    def get(self, i, rng):
        """Example i; what is random about it (words, crop, patches) is drawn from rng."""
        # One number is the seed of the visit, so a replacement leaves rng in the same state.
        row, pictures = self.open_example(i, rng.integers(2 ** 62))
        if self.reverse and len(pictures) == 2:
            pictures.reverse()  # pix2pix calls this the direction BtoA
        example = make_example(self, row.get(words_of(self.task), ""), pictures[0],
                               [to_tensor(picture) for picture in pictures], rng)
        return dict(example, number=row["number"])


def words_of(task):
    """The column of a row that holds a task's words, or None."""
    return next((column for column in ("text", "label") if column in TASKS[task].columns), None)


def make_example(dataset, words, picture, images, rng):
    """Make the example of one visit to a `Folder` or an `Encoded`.

    words: the text, or the name of the class. picture: the target as a Pillow picture, which is
    spoiled anew at each visit. images: the target and, where the task has one, the source or x,
    pictures (3, H, W) or their moments (2, C, h, w).
    """
    rule = TASKS[dataset.task]
    # In MT-Diffusion's tasks the words are x, and there is no prompt.
    example = dict(prompt="" if rule.modality else words, target=images[0])
    if dataset.task == "sr":
        example["source"] = to_tensor(dataset.degrade(picture, rng))
    elif dataset.task == "masked":
        example["x"] = patched(to_tensor(picture), rng)
    elif dataset.task == "label":
        example["x"] = dataset.classes.index(words)
    elif dataset.task == "repr":
        example["x"] = words
    elif len(images) == 2:
        example["x" if rule.modality else "source"] = images[1]
    return example


def record_skipped(datasets, record):
    """Name in a file, skipped.jsonl, the pictures that training leaves out.

    datasets: from `open_dataset`. Pictures that they find broken later are added to the file.
    """
    for dataset in datasets:
        if isinstance(dataset, Folder):
            dataset.record = record
            _, broken = read_rows(dataset.root)
            report_broken(record, tuple(broken.items()))


@functools.cache
def report_broken(record, broken):
    """Name pictures that are left out, on stderr and, unless it is None, in the file `record`.

    broken: a tuple of (path, reason). A process reports a picture once because of the cache, and
    others that share the file do not report it again.
    """
    reasons = [reason for _, reason in broken]
    if record is not None and broken:
        reasons = append_new(record, broken)
    if reasons:
        where = f", see {record}" if record is not None else ""
        more = f" (and {len(reasons) - 1} more{where})" if len(reasons) > 1 else ""
        # In one write, or the lines of several processes would run into each other.
        sys.stderr.write(f"left out: {reasons[0]}{more}\n")


def append_new(record, broken):
    """Append a line to a file for each picture that it does not name yet -> their reasons.

    Ranks and worker processes may do so at once. Each line is one write at what is then the end of
    the file, so none damages another.
    """
    lines = {json.dumps(dict(file_name=str(path), reason=reason)) + "\n": reason
             for path, reason in broken}
    with writing(record):
        record.parent.mkdir(parents=True, exist_ok=True)
        with open(record, "a+", encoding="utf-8", errors="replace", buffering=1) as file:
            with contextlib.suppress(AttributeError, OSError):
                # Some systems lack this lock. Without it a line may come twice.
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            for line in file:
                lines.pop(line, None)
            file.writelines(lines)
    return list(lines.values())


def check_folder(root):
    """Decode every picture of a folder. Print what each task has, and all that is broken."""
    counts = {}
    paths = {}  # an ordered set: several tasks may share a folder
    folders = served_folders(root, TASKS)
    for task, folder in folders.items():
        rows, _ = read_rows(folder)
        counts[task] = collections.Counter(row["split"] for row in rows)
        paths |= {folder / name: None for row in rows for name in file_names(row)}
    # Unlike training, which reads some headers first, this reads all pixels and all captions.
    broken = find_broken(paths, decode, "decoding")
    print_counts(counts)
    for folder in dict.fromkeys(folders.values()):
        rows, _ = read_rows(folder)
        # What is not recognised for what it is shows here at a glance.
        print(f"{folder} is read as {find_layout(folder).name}; for example")
        for i in range(min(3, len(rows))):
            example = json.dumps(rows[i * len(rows) // 3], ensure_ascii=False)
            print(f"    {textwrap.shorten(example, 200)}")
    for reason in broken.values():
        print(reason)
    if broken:
        raise UserError(f"{len(broken)} of {len(paths)} pictures and texts in {root} cannot be "
                        "read")
    print(f"all {len(paths)} pictures and texts in {root} can be read")


def draw_example(example):
    """Draw what training reads -> a Pillow picture: source or x, target, and below them the words.
    """
    values = [example[key] for key in ("source", "x", "target") if key in example]
    pictures = [to_pil(value) for value in values if torch.is_tensor(value)]
    row = arrange(pictures, len(pictures))
    # MT-Diffusion's other modality need not be a picture: the number of a class, or a caption.
    words = next((str(value) for value in values if not torch.is_tensor(value)), example["prompt"])
    cell = Image.new("RGB", (row.width + 4, row.height + 32), "white")
    cell.paste(row)
    # Pillow's own font draws letters six pixels wide, and has those of Latin-1.
    lines = textwrap.wrap(words.encode("latin-1", "replace").decode("latin-1"), cell.width // 6)
    ImageDraw.Draw(cell).text((2, row.height), "\n".join(lines[:2]), fill="black")
    return cell


def show_folder(args):
    """Draw a sheet of examples as a training run sees them."""
    dataset = open_dataset(args.task, "train", args.size or 256, args.data,
                           degradation=args.degradation, reverse=args.reverse)
    if isinstance(dataset, Encoded):
        raise UserError(f"{args.data} holds latents; show the folder that it was encoded from")
    # Spread over the data set, whose neighbours are often alike.
    count = min(16, len(dataset))
    cells = [draw_example(dataset[i * len(dataset) // count]) for i in range(count)]
    path = Path(args.out or f"samples/{args.task}-data.png")
    write_png(path, arrange(cells, 4), vars(args))
    print(f"{path}: examples of {args.task} as training sees them")


def print_counts(counts):
    """Print how many examples each task has. counts: task -> split -> number."""
    for task, splits in counts.items():
        test = f", {splits['test']} test" if splits.get("test") else ""
        print(f"{task}: {splits['train']} train, {splits['heldout']} held out{test}")


# -------------------------------------------------------------------------------------------------
# A folder that was encoded once. Training from it encodes nothing but what is drawn anew each time.
#
#     encoded.json               what it was made with, and for each task and split its rows
#     latents-00000.safetensors  (n, 2, C, h, w) in half precision: mean and log-variance, unscaled
#     texts-00000.safetensors    (n, S, D) text states, and (n, P) pooled ones where there are any
#     pictures/0.png             the cropped pictures of sr and masked, which spoil them anew

ROWS_PER_FILE = 512
# Tasks whose pictures stay pictures as well.
SPOILED = ("sr", "masked")


def is_encoded(folder):
    """Say whether `encode_folder` made this folder."""
    return (folder / "encoded.json").is_file()


@functools.lru_cache(maxsize=None)
def open_shard(path):
    """Open a file of rows and keep it open for the next example."""
    with open_weights(path):
        pass  # a missing or damaged file is named here
    return safe_open(path, framework="pt")


def read_shard(folder, kind, i):
    """Row i of the files of one kind -> {name: tensor}, in fp32."""
    path = folder / f"{kind}-{i // ROWS_PER_FILE:05d}.safetensors"
    with blaming(path):
        file = open_shard(path)
        # .float() copies: a slice shares the storage of the whole file, which would travel along
        # when a worker process sends it.
        return {name: file.get_slice(name)[i % ROWS_PER_FILE].float() for name in file.keys()}


def fingerprint(module, *notes):
    """A hash of a network: its configuration, its weights, and notes on how it is used."""
    digest = hashlib.sha256(json.dumps([module.config, *notes], sort_keys=True).encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        # In fp32, in which every precision that weights are loaded in has a place.
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def encoder_hashes(model):
    """What encoded data depend on: hashes of the autoencoder, and then of the text encoders."""
    hashes = [fingerprint(model.vae)]
    for tokenizer, encoder in model.texts:
        # Two models may share the weights and still read words differently. SDXL's
        # model_index.json says whether the empty text is encoded or stands for zeros.
        hashes.append(fingerprint(encoder, tokenizer.vocab, list(tokenizer.ranks),
                                  tokenizer.special, repr(tokenizer.added),
                                  model.index.get("force_zeros_for_empty_prompt")))
    return hashes


class Encoded(ItemDataset):
    """An encoded folder: its examples hold latents' moments (2, C, h, w) in place of pictures.

    An item is [row of the target, row of the source or None, text or label]. In place of each may
    stand a list, of which a visit draws one, as in a folder. Nothing is cut or mirrored at random.
    """

    def __init__(self, root, task, split, size, degradation="simple", reverse=False):
        if reverse:
            raise UserError(f"{root} is encoded, and cannot be reversed")
        self.root = root
        self.degrade = DEGRADATIONS[degradation]
        self.task = task
        self.index = read_json(root / "encoded.json")
        with blaming(root / "encoded.json"):
            # What is long leaves the index, since workers would copy it: see Rows.
            tasks = self.index.pop("tasks")
            if task not in tasks:
                raise UserError(f"{root} was encoded for {', '.join(tasks)}, not for {task}")
            if self.index["size"] != size:
                raise UserError(f"{root} holds pictures of {self.index['size']} pixels, and this "
                                f"model draws {size}")
            self.items = Rows(tasks[task][split])
            self.text_numbers = {text: i for i, text in enumerate(self.index.pop("texts"))}
        self.classes = class_names(root) if task == "label" else None

    def get(self, i, rng):
        """Example i; what is spoiled anew is drawn from rng."""
        with blaming(self.root / "encoded.json"):
            return self.read(*self.items[i], rng)

    def read(self, target, source, text, rng):
        """Read what `get` returns, from files that may be damaged."""
        # As in Folder.get and open_example: both then draw the same words and the same noise.
        visit = np.random.default_rng(rng.integers(2 ** 62))
        row = choose(dict(file_name=target, source_file_name=source), visit)
        words = draw_text(self.root, text, visit)
        picture = None
        if self.task in SPOILED:
            path = self.root / "pictures" / f"{row['file_name']}.png"
            picture = open_image(path).convert("RGB")
        images = [read_shard(self.root, "latents", number)["latents"]
                  for number in row.values() if number is not None]
        return make_example(self, words, picture, images, rng)

    def check(self, model):
        """Raise a UserError where the folder was encoded with another model, or is damaged."""
        with blaming(self.root / "encoded.json"):
            # An earlier version left other hashes, under other names.
            hashes = self.index.get("encoders", [])
            if not model.texts:
                # A network that reads no text, such as a DiT, may take latents that have texts.
                hashes = hashes[:1]
            if hashes != encoder_hashes(model):
                raise UserError(f"{self.root} was encoded with another autoencoder or text encoder "
                                f"({self.index['model']}), or by an earlier version of this "
                                "project; encode it again for this model")
        # The shapes stand in the heads of the files, so no tensor is read.
        config = model.unet.config
        side = config["sample_size"]
        latents = dict(latents=[2, model.vae.config["latent_channels"], side, side])
        texts = {}
        if model.texts:
            texts["context"] = [model.tokenizer.length, config["cross_attention_dim"]]
        if model.text_encoder_2:
            texts["pooled"] = [model.text_encoder_2.width]
        for path in sorted(self.root.glob("*-*.safetensors")):
            shapes = latents if path.name.startswith("latents") else texts
            with blaming(path):
                file = open_shard(path)
                found = {name: file.get_slice(name).get_shape()[1:] for name in file.keys()}
                if shapes and found != shapes:
                    raise UserError(f"{path} holds tensors of the shapes {found}, but this model "
                                    f"needs {shapes}; delete the file and encode again")

    def encode_text(self, prompts):
        """Text states that Model.encode_text would compute -> context (B, S, D), pooled or None."""
        with blaming(self.root / "encoded.json"):
            rows = [read_shard(self.root, "texts", self.text_numbers[prompt]) for prompt in prompts]
        context, pooled = (torch.stack([row[name] for row in rows]) if name in rows[0] else None
                           for name in ("context", "pooled"))
        return context, pooled


def encode_folder(model, root, out, device, size=None, tasks=TASKS):
    """Encode every picture and text of a folder -> task -> split -> number of examples.

    Shards that exist are not written again, so encoding that was interrupted goes on.

    size: of the pictures; None: as the model draws them. tasks: those to encode for, where the
    pictures serve them; for sr and masked, copies of all pictures are written beside the latents.
    """
    if out.resolve().is_relative_to(root.resolve()) or (out / "metadata.jsonl").exists():
        raise UserError(f"{out} is a folder of pictures or inside one; choose another folder with "
                        "--out")
    if model.vae.factor == 1:
        raise UserError(f"{model.path} draws pixels, and has no autoencoder to encode with")
    size = size or model.native_size
    if size % model.vae.factor:
        raise UserError(f"--size {size} must be a multiple of {model.vae.factor}")
    folders = served_folders(root, tasks)
    paths, texts, tasks = number_rows(folders)
    index = dict(model=str(model.path), encoders=encoder_hashes(model), size=size, tasks=tasks,
                 texts=texts, files=fingerprint_files(paths))
    recorded = read_json(out / "encoded.json") if is_encoded(out) else None
    # Without a record nobody knows what shards hold, and they would not be written again.
    if recorded != index and (recorded is not None or any(out.glob("*.safetensors"))):
        raise UserError(f"{out} was made with another model or version, or from other data; delete "
                        "it, or name another --out")
    # The index comes first: it reserves the folder for this model and these data.
    write_json(out / "encoded.json", index)
    for folder in folders.values():
        _, broken = read_rows(folder)
        report_broken(out / "skipped.jsonl", tuple(broken.items()))

    spoiled = {number for task in SPOILED for items in tasks.get(task, {}).values()
               for target, _, _ in items for number in as_list(target)}
    pictures = [(path, out / "pictures" / f"{i}.png" if i in spoiled else None)
                for i, path in enumerate(paths)]
    encoder = Encoder(model.vae)
    write_shards(out, "latents", pictures,
                 functools.partial(encode_pictures, encoder, size=size, device=device))
    if model.texts:
        write_shards(out, "texts", texts, functools.partial(encode_texts, model))
    return {task: {split: len(items) for split, items in splits.items()}
            for task, splits in tasks.items()}


def number_rows(folders):
    """Number the pictures and texts of some folders, task -> folder, in the order of their rows.

    Returns the paths of the pictures, the texts, and task -> split -> the items of an Encoded.
    """
    picture_rows = {}
    text_rows = {"": 0}  # every folder needs the empty text, for dropped conditions
    tasks = {}
    for task, folder in folders.items():
        tasks[task] = dict(train=[], heldout=[], test=[])
        columns = needed_columns(task)
        for row in usable_rows(folder):
            # A picture of several tasks, or one that is a source here and a target there, has one
            # number.
            item = [[picture_rows.setdefault(folder / name, len(picture_rows))
                     for name in as_list(row[column])] if column in columns else [None]
                    for column in PICTURES]
            texts = possible_texts(folder, row.get(words_of(task), ""))
            for text in texts:
                text_rows.setdefault(text, len(text_rows))
            # A single one is no list, as in folders that were encoded in the past.
            tasks[task][row["split"]].append([values if len(values) > 1 else values[0]
                                              for values in (*item, texts)])
    return list(picture_rows), list(text_rows), tasks


def possible_texts(folder, text):
    """All captions of a picture, or a few of the instructions that can be composed for it."""
    if isinstance(text, str | list):
        return as_list(text)
    # Five, as COCO has captions: all that can be composed from a scene would be dozens.
    return sorted({draw_text(folder, text, np.random.default_rng(i)) for i in range(5)})


def fingerprint_files(paths):
    """A hash of the names, sizes and times of files: it changes when a picture changes."""
    stats = [(str(path.resolve()), split_part(path)[0].stat()) for path in paths]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def encode_pictures(encoder, pictures, *, size, device):
    """Encode pictures, a list of (path, path of the cropped copy to write or None)."""
    squares = [open_square(path, size) for path, _ in pictures]
    for square, (_, copy) in zip(squares, pictures):
        if copy is not None:
            write_png(copy, square)
    latents = encoder.encode([to_tensor(square) for square in squares], device)
    return dict(latents=torch.stack(latents))


def encode_texts(model, prompts):
    """Encode texts: their states, and pooled ones where the model has them."""
    context, pooled = model.encode_text(prompts)
    return dict(context=context) if pooled is None else dict(context=context, pooled=pooled)


def write_shards(out, kind, rows, encode, batch_size=16):
    """Write files of ROWS_PER_FILE rows each, but for those that exist.

    encode: turns a batch of rows into {name: tensor}, whose first dimension counts the rows.
    """
    for first in tqdm(range(0, len(rows), ROWS_PER_FILE), desc=kind):
        path = out / f"{kind}-{first // ROWS_PER_FILE:05d}.safetensors"
        if path.is_file():
            continue
        shard = rows[first:first + ROWS_PER_FILE]
        parts = [encode(shard[i:i + batch_size]) for i in range(0, len(shard), batch_size)]
        # Half precision changes a loss by less than 0.05 %, and halves what is read in each step.
        tensors = {name: torch.cat([part[name] for part in parts]).half().cpu().contiguous()
                   for name in parts[0]}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(f"{path} cannot be written: the {name} that the model computes "
                                "are not finite in half precision, which ends at 65,504: its "
                                "weights are damaged or too large")
        with replacing(path) as beside:
            save_file(tensors, beside)


# -------------------------------------------------------------------------------------------------
# A batch

@dataclasses.dataclass(eq=False)
class Examples(torch.utils.data.Dataset):
    """The examples of a run. Number i is sample k = i mod B of step i div B.

    Everything about it, picture, words, dropout, timestep and noise, follows from (seed, step, k).
    So a resumed run sees what the whole run would have seen, and the number of processes that
    share a batch changes nothing.
    """
    datasets: dict       # task -> its data set
    shares: list         # the tasks of samples 0, 1, .. in turn; one may stand there several times
    _: dataclasses.KW_ONLY
    batch_size: int
    seed: int
    num_timesteps: int
    latent_shape: tuple  # (C, h, w) of z_0
    sample_timestep: Callable | None = None  # rng -> int; None draws uniformly from all timesteps
    drop: tuple | None = None  # replaces the dropout probabilities of TASKS, for all tasks

    def __getitem__(self, i):
        # NumPy mixes the three numbers into a seed, so neighbours have nothing in common.
        step, k = divmod(i, self.batch_size)
        rng = np.random.default_rng((self.seed, step, k))
        task = self.shares[k % len(self.shares)]
        dataset = self.datasets[task]
        # Dropout, timestep and noise are drawn before the picture: two runs that differ in what
        # their pictures draw at random still share them.
        dropout = rng.random()
        if self.sample_timestep is None:
            t = int(rng.integers(self.num_timesteps))
        else:
            t = self.sample_timestep(rng)
        noise_seed = int(rng.integers(2 ** 62))
        example = dataset.get(int(rng.integers(len(dataset))), rng)
        return self.make_sample(example, task, dropout=dropout, t=t, noise_seed=noise_seed)

    def held_out(self, datasets, count):
        """Fixed examples: `count` a task, with timesteps spread evenly and noise of their own."""
        # All tasks share the timestep and the noise of example i.
        return [self.make_sample(dataset[i * len(dataset) // count], task, dropout=1.0,
                                 t=int((i + 0.5) * self.num_timesteps / count), noise_seed=i)
                for i in range(count) for task, dataset in datasets.items()]

    def make_sample(self, example, task, *, dropout, t, noise_seed):
        """Make what training reads of an example: its conditions, or null values, t and noise.

        dropout: uniform in [0, 1), or 1 to drop nothing. This one draw decides, as in
        InstructPix2Pix: the text, both, or the picture. MT-Diffusion's other modality counts as
        the picture.
        """
        text, both, picture = self.drop or TASKS[task].drop
        drop_text = dropout < text + both
        drop_picture = text <= dropout < text + both + picture
        # Noise for z_t, and to sample z_0 with. The CPU draws it, so it is the same on all devices.
        generator = torch.Generator().manual_seed(noise_seed)
        noise, latent_noise = torch.randn(2, *self.latent_shape, generator=generator)
        # A picture that is dropped stays in the sample; its latent is multiplied by `keep`.
        return dict(task=task, prompt="" if drop_text else example["prompt"],
                    target=example["target"], source=example.get("source"), x=example.get("x"),
                    keep=0.0 if drop_picture else 1.0, t=t, noise=noise, latent_noise=latent_noise)


def collate(examples):
    """A list of examples -> a batch: a dict of lists; t, keep and the two noises are tensors."""
    # Pictures stay in lists, because not every sample of a batch has a source.
    batch = {key: [example[key] for example in examples] for key in examples[0]}
    for key in ("t", "keep", "noise", "latent_noise"):
        batch[key] = torch.stack([torch.as_tensor(value) for value in batch[key]])
    return batch


class Encoder:
    """Pictures to latents with a frozen autoencoder.

    Small data sets repeat their pictures, so what was encoded is remembered, up to a limit.
    Pictures go through the autoencoder four at a time, always: sums differ in the last bit with
    the shape of a batch, and a resumed run would not be bit for bit the same.
    """
    TOGETHER = 4
    LIMIT = 256 * 2 ** 20  # bytes

    def __init__(self, vae):
        self.vae = vae
        self.memory = {}

    @torch.no_grad()
    def encode(self, pictures, device):
        """Pictures (3, H, W) -> a list of their mean and log-variance (2, C, h, w), on the CPU."""
        rows = []
        for first in range(0, len(pictures), self.TOGETHER):
            chunk = pictures[first:first + self.TOGETHER]
            # The last chunk is filled up with copies of its last picture.
            filling = [chunk[-1]] * (self.TOGETHER - len(chunk))
            mean, logvar = self.vae.encode(torch.stack(chunk + filling).to(device))
            moments = torch.stack([mean, logvar], dim=1).float().cpu()
            if not moments[:, 0].isfinite().all():
                raise UserError("the autoencoder's latents are not finite: its weights are damaged")
            rows.extend(moments[:len(chunk)])
        return rows

    def moments(self, pictures, device):
        """Pictures (3, H, W), or encoded ones (2, C, h, w) -> mean, logvar, (B, C, h, w) each."""
        # The same picture may come again under another number or in another task.
        keys = [hash(picture.numpy().tobytes()) if picture.dim() == 3 else None
                for picture in pictures]
        new = {key: picture for key, picture in zip(keys, pictures)
               if key is not None and key not in self.memory}
        known = self.memory | dict(zip(new, self.encode(list(new.values()), device)))
        # What comes from an encoded folder is not in memory and stands for itself.
        moments = torch.stack([known.get(key, picture) for key, picture in zip(keys, pictures)])
        if len(self.memory) * moments[0].nbytes < self.LIMIT:
            self.memory = known
        return moments[:, 0].to(device), moments[:, 1].to(device)

    def latents(self, pictures, device, noise=None, scaled=True):
        """Pictures -> latents (B, C, h, w). The only place that scales latents.

        noise: (B, C, h, w), standard normal, for a draw from q(z | picture); None takes the mean.
        """
        z, logvar = self.moments(pictures, device)
        if noise is not None:
            z = z + torch.exp(0.5 * logvar) * noise.to(device)
        return z * self.vae.config["scaling_factor"] if scaled else z

    def __call__(self, batch, device):
        """A batch -> x0 (B, C, h, w), and source (B, C, h, w) or None where no task has one.

        The source is zeros for samples that have none or whose source was dropped.
        """
        x0 = self.latents(batch["target"], device, batch["latent_noise"])
        rows = [i for i, source in enumerate(batch["source"]) if source is not None]
        if not rows:
            return x0, None
        # t2i shares the network with tasks that have a source, and reads zeros there.
        source = torch.zeros_like(x0)
        # InstructPix2Pix encodes the condition by its mean and leaves it unscaled. Models in its
        # layout expect that, so all image-to-image tasks do the same.
        source[rows] = self.latents([batch["source"][i] for i in rows], device, scaled=False)
        return x0, source * batch["keep"].to(device)[:, None, None, None]


def main():
    parser = Parser("Check or show a folder of pictures, or encode it, for train.py --data.")
    parser.add_argument("action", choices=("check", "show", "encode"),
                        help="check decodes every picture; show draws a sheet of examples")
    parser.add_argument("--data", required=True, help="folder of pictures, see readers.py")
    parser.add_argument("--task", choices=TASKS, help="task whose examples to show (default: t2i) "
                        "or to encode (default: whatever the folder serves)")
    parser.add_argument("--size", type=int, help="side of the pictures (default: 256 to show them, "
                        "as the model draws them to encode them)")
    parser.add_argument("--degradation", default="simple", choices=DEGRADATIONS, help="of sr")
    parser.add_argument("--reverse", action="store_true", help="swap source and target")
    parser.add_argument("--model", default=str(ASSETS / "tiny"), help="model folder or hub id")
    parser.add_argument("--out", help="folder for what is encoded, or file for the sheet (default: "
                        "samples/TASK-data.png)")
    parser.add_argument("--device", help="torch device (default: cuda, else mps, else cpu)")
    args = parser.parse_args()
    if args.size is not None and not 8 <= args.size <= 4096:
        raise UserError(f"--size {args.size} must be from 8 to 4096")
    if args.action == "check":
        check_folder(Path(args.data))
        return
    if args.action == "show":
        args.task = args.task or "t2i"
        show_folder(args)
        return
    if args.out is None:
        raise UserError("data.py encode needs --out, a folder for what is encoded")
    from sample import load_model  # here, because sample.py imports this file
    device = pick_device(args.device)
    model = load_model(args.model, device=device)
    tasks = [args.task] if args.task else TASKS
    print_counts(encode_folder(model, Path(args.data), Path(args.out), device, args.size, tasks))
    print(f"{args.out}: train from it with train.py --data {args.out} --model {args.model}")


if __name__ == "__main__":
    command(main)
