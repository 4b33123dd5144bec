"""Tasks and data: what each task reads, where its pictures come from, and what a batch holds.

    TASKS            one row a task; ALL names the four of MTU (arXiv 2503.11905, section 6.1)
    builtin, Folder  data sets: the emoji that come with the project, or a folder of your own
    Encoded          a folder that was encoded once, so that training encodes nothing again
    Examples         examples of a run: a function of (seed, step, index in the batch) alone
    Encoder          the pictures of a batch as latents of a frozen autoencoder

    python data.py check --data FOLDER
    python data.py encode --data FOLDER --model MODEL --out ENCODED

A data set yields dicts: `prompt` (str), `target` (3, H, W) in [-1, 1], for image-to-image tasks
`source` (3, H, W), and for MT-Diffusion's tasks `x`, the other modality: a picture, the number of
a class, or a text.

Letters: B batch, C channels, H W picture, h w latent, S text length, D text width.
"""
import collections
import contextlib
import functools
import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import emoji
from emoji import ASSETS, ItemDataset, degrade, held_out, on_white, patched, to_pil, to_tensor
from hub import Parser, UserError, blaming, command, open_weights, pick_device, read_json
from hub import replacing, write_json

# -------------------------------------------------------------------------------------------------
# Tasks

class Latent(NamedTuple):
    """How a picture becomes a latent."""
    sample: bool   # a draw from q(z | picture), or its mean
    scaled: bool   # multiplied by the autoencoder's scaling factor, or not


class Task(NamedTuple):
    source: Latent | None       # the picture that enters beside z_t; where dropped it is zeros
    prompt: str | None          # what the text is; None: the text is always ""
    drop: tuple                 # probability that the text, both, or the picture is dropped
    guidance: float             # the paper's text scale on SD 1.5; 1 is no guidance
    image_guidance: float = 1.0
    modality: str | None = None  # MT-Diffusion: the name of x, the other modality
    columns: tuple = ()          # what a folder's metadata.jsonl needs besides file_name


TARGET = Latent(sample=True, scaled=True)
# InstructPix2Pix encodes the condition by its mean and leaves it unscaled. Models in its layout
# expect that, so all image-to-image tasks do the same.
SOURCE = Latent(sample=False, scaled=False)
# MT-Diffusion's x lives in the space of z_0. Its head has to predict it, so it has no noise.
OTHER = Latent(sample=False, scaled=True)

# The dropout of edit and inpaint is InstructPix2Pix's: 5 % text, 5 % both, 5 % picture.
# For MT-Diffusion's tasks the last number is the share of samples that train without x, which the
# paper's starred variants do; it does not print the share.
TASKS = {
    "t2i":       Task(None, "a caption", (0.10, 0.0, 0.0), guidance=7.5, columns=("text",)),
    "edit":      Task(SOURCE, "an instruction", (0.05, 0.05, 0.05), guidance=7.5,
                      image_guidance=1.6, columns=("text", "source_file_name")),
    # The source of sr is the picture itself, degraded anew each time.
    "sr":        Task(SOURCE, None, (0.0, 0.0, 0.0), guidance=1.0),
    "inpaint":   Task(SOURCE, "remove the ...", (0.05, 0.05, 0.05), guidance=4.0,
                      image_guidance=1.5, columns=("text", "source_file_name")),
    "uncond":    Task(None, None, (0.0, 0.0, 0.0), guidance=1.0),
    "translate": Task(None, None, (0.0, 0.0, 0.0), guidance=1.0, modality="source",
                      columns=("source_file_name",)),
    "masked":    Task(None, None, (0.0, 0.0, 0.1), guidance=1.0, modality="masked"),
    "label":     Task(None, None, (0.0, 0.0, 0.1), guidance=1.0, modality="label",
                      columns=("label",)),
    "repr":      Task(None, None, (0.0, 0.0, 0.1), guidance=1.0, modality="repr",
                      columns=("text",)),
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
# Pictures from disk

# Only these formats are opened. Pillow knows more, of which PostScript would start a program.
Image.init()
FORMATS = [name for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
           if name in Image.OPEN]
# A picture of this size takes 400 MB as RGBA. This limit speaks in one line, so Pillow's goes.
MAX_PIXELS = 100_000_000
Image.MAX_IMAGE_PIXELS = None

# EXIF's orientation -> how to turn the picture upright.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


@contextlib.contextmanager
def open_header(path):
    """Yield a picture that is not decoded yet. Whatever fails in the block is a UserError.

    Pillow's readers raise nearly everything on a damaged file, struct.error and SyntaxError too, so
    this one guard catches all of it and names the file.
    """
    try:
        if not os.path.isfile(path):
            # Opening a FIFO would wait for ever, and a device may have no end.
            raise UserError(f"no picture at {path}")
        with warnings.catch_warnings():
            # Pillow prints a remark where it can do without some damaged metadata.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as picture:
                # The header says how large a picture is before any memory is taken for it.
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"it has more than {MAX_PIXELS:,} pixels")
                yield picture
    except (UserError, MemoryError):
        # Too little memory is no fault of the file: `hub.command` has a line for it.
        raise
    except Exception as error:
        raise UserError(f"{path} is not a picture that can be read ({error})") from None


def check_header(path):
    """Raise a UserError where a picture is missing or its header is damaged."""
    with open_header(path):
        pass


def upright(picture):
    """Turn a picture as its EXIF says.

    ImageOps.exif_transpose would also write all other tags again, and fails where one of them has
    a value that the standard does not allow.
    """
    orientation = None
    with contextlib.suppress(Exception):
        # A block that cannot be read is ignored, as viewers do.
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture


def open_image(path, size=None):
    """Open a picture upright, as RGBA. A UserError names a file that is missing or no picture.

    size: of the square that will be made of it. A large JPEG is then decoded at 1/2, 1/4 or 1/8 of
    its size, several times as fast, and still has two pixels or more for each one of the square.
    """
    with open_header(path) as picture:
        if size is not None:
            # Other formats than JPEG ignore this.
            picture.draft(None, (2 * size, 2 * size))
        # Broken pixels show before the metadata are looked at; some PNGs keep these at their end.
        picture.load()
        picture = upright(picture)
        if picture.mode.startswith("I"):
            # 16 bits a pixel: convert() would cut them off at 255.
            array = np.asarray(picture).clip(0, 65535) // 256
            picture = Image.fromarray(array.astype(np.uint8))
        if picture.mode == "F":
            # TIFF knows such pictures; one cannot tell whether they end at 1, 255 or elsewhere.
            raise ValueError("floating-point pixels have no fixed white")
        return picture.convert("RGBA")


def open_square(path, size):
    """Open a picture, crop it to its central square and resize it -> RGB, size x size."""
    return ImageOps.fit(on_white(open_image(path, size)), (size, size), Image.LANCZOS)


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


def open_dataset(task, split, size, root=None):
    """The data set of one task: the built-in one, a folder, or an encoded folder."""
    if root is None:
        return builtin(task, split, size)
    folder = folder_of(task, root)
    kind = Encoded if (folder / "encoded.json").is_file() else Folder
    return kind(folder, task, split, size)


def class_names(root=None):
    """The classes of the task label: the built-in categories, or those of a folder."""
    if root is None:
        return emoji.classes()
    rows, _ = read_rows(folder_of("label", root))
    # In alphabetical order, so that a class has the same number in every run.
    return sorted({row["label"] for row in rows if "label" in row})


# The columns of metadata.jsonl that name pictures, and all that we read.
PICTURES = ("file_name", "source_file_name")
COLUMNS = (*PICTURES, "text", "label")


def needed_columns(task):
    """The columns of metadata.jsonl that a task reads."""
    return ["file_name", *TASKS[task].columns]


def served_tasks(rows):
    """The tasks for which every row has what they read."""
    return [task for task in TASKS
            if rows and all(column in row for row in rows for column in needed_columns(task))]


def served_folders(root, tasks):
    """Task -> its folder, for those of `tasks` that the pictures in `root` serve."""
    folders = {task: folder_of(task, root) for task in tasks}
    folders = {task: folder for task, folder in folders.items()
               if (folder / "metadata.jsonl").is_file()
               and task in served_tasks(read_rows(folder)[0])}
    if not folders:
        raise UserError(f"{root} serves none of {', '.join(tasks)}; see data.Folder for its layout")
    return folders


def parse_row(root, line):
    """One line of metadata.jsonl -> its dict. ValueError says what is wrong with it.

    root: the folder as an absolute path without symbolic links.
    """
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    for column in COLUMNS:
        if not isinstance(row.get(column, ""), str):
            raise ValueError(f"{column} is no text")
        row.get(column, "").encode()  # half a surrogate pair is no text
    if row.get("split", "train") not in ("train", "heldout"):
        raise ValueError('"split" is "train" or "heldout"')
    for name in picture_names(row):
        # A data set from elsewhere must not make us read this machine's other files, be it by an
        # absolute path, by "..", or through a link.
        if not (root / name).resolve().is_relative_to(root):
            raise ValueError(f"{name} lies outside of {root}")
    return row


def picture_names(row):
    """The file names of a row's pictures."""
    return [row[column] for column in PICTURES if column in row]


def split_rows(rows):
    """Give each row a "split". Where no line says one, one file name in ten is held out."""
    if any("split" in row for row in rows):
        for row in rows:
            row.setdefault("split", "train")
        return
    names = {row.get("file_name", "") for row in rows}
    heldout = {name for name in names if held_out(name)}
    if len(names) > 1 and len(heldout) in (0, len(names)):
        # The names of a handful of pictures may all fall on one side. The first one changes over.
        heldout = heldout.symmetric_difference({min(names)})
    for row in rows:
        row["split"] = "heldout" if row.get("file_name", "") in heldout else "train"


MAX_SKIPPED = 0.01     # the share of lines that may be left out
MAX_HEADERS = 20_000   # files that are opened before training; the others are only looked for


def find_broken(paths, read, label):
    """Call read(path) for all paths -> {path: the reason}, for those where it raises UserError."""
    broken = {}
    for path in tqdm(paths, desc=label, delay=1, leave=False):
        try:
            read(path)
        except UserError as error:
            broken[path] = " ".join(str(error).split())
    return broken


def find_missing(root, rows):
    """Find pictures that are missing or have no header -> {path: the reason}.

    A header takes a tenth of a millisecond, and a hundred times that over a slow network: in large
    folders only some files are opened, spread over all of them.
    """
    names = list(dict.fromkeys(name for row in rows for name in picture_names(row)))
    step = len(names) // MAX_HEADERS + 1
    paths = [root / name for i, name in enumerate(names)
             if i % step == 0 or not os.path.isfile(root / name)]
    return find_broken(paths, check_header, f"looking at {root}")


@functools.lru_cache(maxsize=8)
def read_rows(root):
    """Read a folder's metadata.jsonl -> rows, each with a "split", and `find_missing` of them."""
    path = root / "metadata.jsonl"
    if not path.is_file():
        raise UserError(f"no {path}: --data names a folder with pictures and a metadata.jsonl, or "
                        "one with a subfolder like that for each task, named after it")
    try:
        # Windows puts a mark before the text, which utf-8-sig drops. splitlines() would also split
        # at characters that JSON allows inside of strings, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None
    absolute = root.resolve()
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(parse_row(absolute, line))
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"{path} line {number}: {error}") from None
    split_rows(rows)
    return rows, find_missing(root, rows)


def usable_rows(root):
    """The rows of a folder whose pictures are there. UserError where more than 1 % are not."""
    rows, broken = read_rows(root)
    usable = [row for row in rows
              if not any(root / name in broken for name in picture_names(row))]
    # Some damage is normal in a large download. Much of it means the wrong folder, or half of an
    # archive.
    skipped = len(rows) - len(usable)
    if skipped > MAX_SKIPPED * len(rows):
        raise UserError(f"{root}: {skipped} of {len(rows)} lines of metadata.jsonl cannot be used, "
                        f"more than {MAX_SKIPPED:.0%}; python data.py check --data {root} names "
                        f"them all. The first: {next(iter(broken.values()))}")
    return usable


class Folder(ItemDataset):
    """Pictures and a metadata.jsonl, one JSON object a line:

        {"file_name": "after.jpg", "source_file_name": "before.jpg", "text": "make it snow"}

    t2i needs no source, and sr makes its own from the picture. Lines with "split": "heldout" are
    held out; where no line has a split, one file name in ten is. Pictures are cropped to their
    central square and resized. The few lines whose pictures are missing or broken are left out.
    """
    TRIES = 10

    def __init__(self, root, task, split, size):
        self.root = root
        self.task = task
        self.size = size
        self.record = None  # see record_skipped
        rows, _ = read_rows(root)
        missing = [column for column in needed_columns(task)
                   if not all(column in row for row in rows)]
        if missing:
            raise UserError(f"{root} serves {', '.join(served_tasks(rows)) or 'no task'}; for "
                            f"{task} every line of metadata.jsonl needs {' and '.join(missing)}")
        self.items = [row for row in usable_rows(root) if row["split"] == split]
        self.classes = class_names(root)
        if not self.items:
            raise UserError(f"{root} has no {split} pictures for {task}; mark some lines of "
                            f'metadata.jsonl with "split": "{split}"')

    def open_pictures(self, i):
        """Example i -> its row, and its pictures by column.

        In place of an example whose pictures turn out broken comes the next good one. That is a
        function of i alone: the same on every rank, in every run, and after resuming.
        """
        columns = [column for column in needed_columns(self.task) if column in PICTURES]
        for number in range(i, i + self.TRIES):
            row = self.items[number % len(self.items)]
            try:
                return row, {column: open_square(self.root / row[column], self.size)
                             for column in columns}
            except UserError as error:
                reason = str(error)
                report_broken(self.record, ((self.root / row["file_name"], reason),))
        # So many in a row are no accident: the disk is gone, say.
        raise UserError(f"{self.TRIES} examples in a row cannot be read; the last one: {reason}")

    def get(self, i, rng):
        """Example i; what is random about it (degradation, patches) is drawn from rng."""
        # rng is used only afterwards, so a replacement draws the same numbers.
        row, pictures = self.open_pictures(i)
        modality = TASKS[self.task].modality
        picture = pictures["file_name"]
        example = dict(prompt=row["text"] if TASKS[self.task].prompt else "",
                       target=to_tensor(picture))
        if self.task == "sr":
            example["source"] = to_tensor(degrade(picture, rng))
        elif "source_file_name" in pictures:
            example["x" if modality else "source"] = to_tensor(pictures["source_file_name"])
        elif modality == "masked":
            example["x"] = patched(example["target"], rng)
        elif modality == "label":
            example["x"] = self.classes.index(row["label"])
        elif modality == "repr":
            example["x"] = row["text"]
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
        more = f" (and {len(reasons) - 1} more, see {record})" if len(reasons) > 1 else ""
        print(f"left out: {reasons[0]}{more}", file=sys.stderr)


def append_new(record, broken):
    """Append a line to a file for each picture that it does not name yet -> their reasons.

    Ranks and worker processes may do so at once. Each line is one write at what is then the end of
    the file, so none damages another.
    """
    new = []
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with open(record, "a+", encoding="utf-8", errors="replace", buffering=1) as file:
            with contextlib.suppress(ImportError, OSError):
                # Some systems lack this lock. Without it a line may come twice.
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = set(file)
            for path, reason in broken:
                line = json.dumps(dict(file_name=str(path), reason=reason)) + "\n"
                if line not in known:
                    file.write(line)
                    new.append(reason)
    except OSError as error:
        raise UserError(f"{record} cannot be written ({error.strerror})") from None
    return new


def check_folder(root):
    """Decode every picture of a folder. Print how many examples a task has, and what is broken."""
    counts = {}
    paths = {}  # an ordered set: several tasks may share a folder
    for task, folder in served_folders(root, TASKS).items():
        rows, _ = read_rows(folder)
        counts[task] = collections.Counter(row["split"] for row in rows)
        paths |= {folder / name: None for row in rows for name in picture_names(row)}
    broken = find_broken(paths, open_image, "decoding")
    print_counts(counts)
    for reason in broken.values():
        print(reason)
    if broken:
        raise UserError(f"{len(broken)} of {len(paths)} pictures in {root} cannot be read")
    print(f"all {len(paths)} pictures in {root} can be read")


def print_counts(counts):
    """Print how many examples each task has. counts: task -> split -> number."""
    for task, splits in counts.items():
        print(f"{task}: {splits['train']} train, {splits['heldout']} held out")


# -------------------------------------------------------------------------------------------------
# A folder that was encoded once. Training from it encodes nothing but what is drawn anew each time.
#
#     encoded.json               what it was made with, and for each task and split its rows
#     latents-00000.safetensors  (n, 2, C, h, w) in half precision: mean and log-variance, unscaled
#     texts-00000.safetensors    (n, S, D) text states, and (n, P) pooled ones where there are any
#     pictures/0.png             the cropped pictures of sr, whose source is degraded anew

ROWS_PER_FILE = 512


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


def fingerprint(model):
    """What encoded data depend on: a hash of the autoencoder, the text encoders, the tokenizers."""
    digest = hashlib.sha256()
    for module in [model.vae, *[encoder for _, encoder in model.texts]]:
        digest.update(json.dumps(module.config, sort_keys=True).encode())
        # In fp32, in which every precision that weights are loaded in has a place.
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
    for tokenizer, _ in model.texts:
        # Two models may share the weights and still read words differently.
        parts = [tokenizer.vocab, [list(pair) for pair in tokenizer.ranks], tokenizer.special,
                 repr(tokenizer.added)]
        digest.update(json.dumps(parts, sort_keys=True).encode())
    # SDXL's model_index.json says whether the empty text is encoded or stands for zeros.
    digest.update(str(model.index.get("force_zeros_for_empty_prompt")).encode())
    return digest.hexdigest()


class Encoded(ItemDataset):
    """An encoded folder: its examples hold latents' moments (2, C, h, w) in place of pictures.

    An item is [row of the target, row of the source or None, text].
    """

    def __init__(self, root, task, split, size):
        self.root = root
        self.task = task
        self.index = read_json(root / "encoded.json")
        with blaming(root / "encoded.json"):
            if task not in self.index["tasks"]:
                raise UserError(f"{root} was encoded for {', '.join(self.index['tasks'])}, not for "
                                f"{task}")
            if self.index["size"] != size:
                raise UserError(f"{root} holds pictures of {self.index['size']} pixels, and this "
                                f"model draws {size}")
            self.items = self.index["tasks"][task][split]
            self.text_numbers = {text: i for i, text in enumerate(self.index["texts"])}

    def get(self, i, rng):
        """Example i; sr's degradation is drawn from rng."""
        target, source, text = self.items[i]
        example = dict(prompt=text, target=read_shard(self.root, "latents", target)["latents"])
        if self.task == "sr":
            picture = open_image(self.root / "pictures" / f"{target}.png").convert("RGB")
            example["source"] = to_tensor(degrade(picture, rng))
        elif source is not None:
            example["source"] = read_shard(self.root, "latents", source)["latents"]
        return example

    def check(self, model):
        """Raise a UserError where the folder was encoded with another model."""
        if self.index["fingerprint"] != fingerprint(model):
            raise UserError(f"{self.root} was encoded with another autoencoder or text encoder "
                            f"({self.index['model']}); encode it again for this model")

    def encode_text(self, prompts):
        """Text states that Model.encode_text would compute -> context (B, S, D), pooled or None."""
        rows = [read_shard(self.root, "texts", self.text_numbers[prompt]) for prompt in prompts]
        context, pooled = (torch.stack([row[name] for row in rows]) if name in rows[0] else None
                           for name in ("context", "pooled"))
        return context, pooled


def encode_folder(model, root, out, device):
    """Encode every picture and text of a folder -> task -> split -> number of examples.

    Shards that exist are not written again, so encoding that was interrupted goes on.
    """
    folders = served_folders(root, ALL)
    paths, texts, tasks = number_rows(folders)
    size = model.native_size
    index = dict(model=str(model.path), fingerprint=fingerprint(model), size=size, tasks=tasks,
                 texts=texts, files=fingerprint_files(paths))
    if (out / "encoded.json").is_file() and read_json(out / "encoded.json") != index:
        raise UserError(f"{out} was made with another model or from other data; delete it, or name "
                        "another --out")
    # The index comes first: it reserves the folder for this model and these data.
    write_json(out / "encoded.json", index)
    for folder in folders.values():
        _, broken = read_rows(folder)
        report_broken(out / "skipped.jsonl", tuple(broken.items()))

    # Pictures of sr stay pictures as well, because their sources are degraded anew each time.
    sr = {target for items in tasks.get("sr", {}).values() for target, _, _ in items}
    pictures = [(path, out / "pictures" / f"{i}.png" if i in sr else None)
                for i, path in enumerate(paths)]
    encoder = Encoder(model.vae)
    write_shards(out, "latents", pictures,
                 functools.partial(encode_pictures, encoder, size=size, device=device))
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
        tasks[task] = dict(train=[], heldout=[])
        columns = needed_columns(task)
        for row in usable_rows(folder):
            text = row["text"] if "text" in columns else ""
            text_rows.setdefault(text, len(text_rows))
            numbers = {column: picture_rows.setdefault(folder / row[column], len(picture_rows))
                       for column in columns if column in PICTURES}
            item = [numbers["file_name"], numbers.get("source_file_name"), text]
            tasks[task][row["split"]].append(item)
    return list(picture_rows), list(text_rows), tasks


def fingerprint_files(paths):
    """A hash of the names, sizes and times of files: it changes when a picture changes."""
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def encode_pictures(encoder, pictures, *, size, device):
    """Encode pictures, a list of (path, path of the cropped copy to write or None)."""
    squares = [open_square(path, size) for path, _ in pictures]
    for square, (_, copy) in zip(squares, pictures):
        if copy is not None:
            with replacing(copy) as beside:
                square.save(beside, format="PNG")
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
        with replacing(path) as beside:
            save_file(tensors, beside)


# -------------------------------------------------------------------------------------------------
# A batch

class Examples(torch.utils.data.Dataset):
    """The examples of a run. Number i is sample k = i mod B of step i div B.

    Everything about it, picture, words, dropout, timestep and noise, follows from (seed, step, k).
    So a resumed run sees what the whole run would have seen, and the number of processes that
    share a batch changes nothing.
    """

    def __init__(self, datasets, shares, *, batch_size, seed, num_timesteps, latent_shape,
                 sample_timestep=None, drop=None):
        """datasets: task -> its data set.

        shares: the tasks of samples 0, 1, .. in turn; a task may stand there several times.
        latent_shape: (C, h, w) of z_0.
        sample_timestep(rng) -> int; None draws uniformly from all timesteps.
        drop: replaces the dropout probabilities of TASKS, for all tasks.
        """
        self.datasets = datasets
        self.shares = shares
        self.batch_size = batch_size
        self.seed = seed
        self.num_timesteps = num_timesteps
        self.latent_shape = latent_shape
        self.sample_timestep = sample_timestep
        self.drop = drop

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
        example = self.drop_conditions(example, task, dropout)
        return self.add_randomness(example, t, noise_seed)

    def held_out(self, datasets, count):
        """Fixed examples: `count` a task, with timesteps spread evenly and noise of their own."""
        examples = []
        # All tasks share the timestep and the noise of example i.
        for i in range(count):
            t = int((i + 0.5) * self.num_timesteps / count)
            for task, dataset in datasets.items():
                example = dataset[i * len(dataset) // count]
                example = self.drop_conditions(example, task, 1.0)
                examples.append(self.add_randomness(example, t, i))
        return examples

    def drop_conditions(self, example, task, r):
        """Replace conditions by their null values; r is uniform in [0, 1). Pass 1 to drop nothing.

        One draw decides, as in InstructPix2Pix: the text, both, or the picture. MT-Diffusion's
        other modality counts as the picture.
        """
        # A picture that is dropped stays in the example; its latent is multiplied by `keep`.
        text, both, picture = self.drop or TASKS[task].drop
        drop_text = r < text + both
        drop_picture = text <= r < text + both + picture
        return dict(task=task, prompt="" if drop_text else example["prompt"],
                    target=example["target"], source=example.get("source"), x=example.get("x"),
                    keep=0.0 if drop_picture else 1.0)

    def add_randomness(self, example, t, noise_seed):
        """Add the timestep and two noises (C, h, w): z_t's, and one to sample z_0 with."""
        # The CPU draws them, so that they are the same on every device.
        generator = torch.Generator().manual_seed(noise_seed)
        noise, latent_noise = torch.randn(2, *self.latent_shape, generator=generator)
        return dict(example, t=t, noise=noise, latent_noise=latent_noise)


def collate(examples):
    """A list of examples -> a batch: a dict of lists; t, keep and the two noises are tensors."""
    # Pictures stay in lists, because not every sample of a batch has a source.
    batch = {key: [example[key] for example in examples] for key in examples[0]}
    for key in ("t", "keep"):
        batch[key] = torch.tensor(batch[key])
    for key in ("noise", "latent_noise"):
        batch[key] = torch.stack(batch[key])
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
            rows.extend(moments[:len(chunk)])
        return rows

    def moments(self, pictures, device):
        """Pictures (3, H, W), or encoded ones (2, C, h, w) -> mean, logvar, (B, C, h, w) each."""
        # The same picture may come again under another number or in another task.
        keys = [hash(picture.numpy().tobytes()) for picture in pictures]
        new = {key: picture for key, picture in zip(keys, pictures)
               if picture.dim() == 3 and key not in self.memory}
        known = self.memory | dict(zip(new, self.encode(list(new.values()), device)))
        # What comes from an encoded folder is not in memory and stands for itself.
        moments = torch.stack([known.get(key, picture) for key, picture in zip(keys, pictures)])
        if len(self.memory) * moments[0].nbytes < self.LIMIT:
            self.memory = known
        return moments[:, 0].to(device), moments[:, 1].to(device)

    def latents(self, pictures, encoding, device, noise=None):
        """Pictures -> latents (B, C, h, w). The only place that scales latents.

        encoding: a `Latent`. noise: (B, C, h, w), standard normal, where it asks for a sample.
        """
        mean, logvar = self.moments(pictures, device)
        z = mean
        if encoding.sample:
            z = mean + torch.exp(0.5 * logvar) * noise.to(device)
        return z * self.vae.config["scaling_factor"] if encoding.scaled else z

    def modality(self, batch, device):
        """The latents (B, C, h, w) of a batch's other modality, where that is a picture."""
        return self.latents(batch["x"], OTHER, device)

    def __call__(self, batch, device):
        """A batch -> x0 (B, C, h, w), and source (B, C, h, w) or None where no task has one.

        The source is zeros for samples that have none or whose source was dropped.
        """
        x0 = self.latents(batch["target"], TARGET, device, batch["latent_noise"])
        rows = [i for i, source in enumerate(batch["source"]) if source is not None]
        if not rows:
            return x0, None
        # t2i shares the network with tasks that have a source, and reads zeros there.
        source = torch.zeros_like(x0)
        source[rows] = self.latents([batch["source"][i] for i in rows], SOURCE, device)
        return x0, source * batch["keep"].to(device)[:, None, None, None]


def main():
    parser = Parser("Check a folder of pictures, or encode it once, for train.py --data.")
    parser.add_argument("action", choices=("check", "encode"), help="check decodes every picture")
    parser.add_argument("--data", required=True, help="folder of pictures, see data.Folder")
    parser.add_argument("--model", default=str(ASSETS / "tiny"), help="model folder or hub id")
    parser.add_argument("--out", help="folder for what is encoded")
    parser.add_argument("--device", help="torch device (default: cuda, else mps, else cpu)")
    args = parser.parse_args()
    if args.action == "check":
        check_folder(Path(args.data))
        return
    if args.out is None:
        raise UserError("data.py encode needs --out, a folder for what is encoded")
    from sample import load_model  # here, because sample.py imports this file
    device = pick_device(args.device)
    model = load_model(args.model, device=device)
    print_counts(encode_folder(model, Path(args.data), Path(args.out), device))
    print(f"{args.out}: train from it with train.py --data {args.out} --model {args.model}")


if __name__ == "__main__":
    command(main)
