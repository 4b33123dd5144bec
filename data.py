"""Tasks and data: what each task reads, where its pictures come from, and what a batch holds.

    TASKS            one row a task; ALL names the four of MTU (arXiv 2503.11905, section 6.1)
    builtin, Folder  data sets: the emoji that come with the project, or a folder of your own
    Encoded          a folder that was encoded once, so that training encodes nothing again
    Examples         examples of a run: a function of (seed, step, index in the batch) alone
    Encoder          the pictures of a batch as latents of a frozen autoencoder

    python data.py encode --data FOLDER --model MODEL --out ENCODED

A data set yields dicts: `prompt` (str), `target` (3, H, W) in [-1, 1], for image-to-image tasks
`source` (3, H, W), and for MT-Diffusion's tasks `x`, the other modality: a picture, the number of
a class, or a text.

Letters: B batch, C channels, H W picture, h w latent, S text length, D text width.
"""
import functools
import hashlib
import json
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file

import emoji
from emoji import ASSETS, degrade, held_out, on_white, patched, to_pil, to_tensor
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
    "t2i":       Task(None, "a caption", (0.10, 0.0, 0.0), guidance=7.5),
    "edit":      Task(SOURCE, "an instruction", (0.05, 0.05, 0.05), 7.5, image_guidance=1.6),
    "sr":        Task(SOURCE, None, (0.0, 0.0, 0.0), guidance=1.0),
    "inpaint":   Task(SOURCE, "remove the ...", (0.05, 0.05, 0.05), 4.0, image_guidance=1.5),
    "uncond":    Task(None, None, (0.0, 0.0, 0.0), guidance=1.0),
    "translate": Task(None, None, (0.0, 0.0, 0.0), guidance=1.0, modality="source"),
    "masked":    Task(None, None, (0.0, 0.0, 0.1), guidance=1.0, modality="masked"),
    "label":     Task(None, None, (0.0, 0.0, 0.1), guidance=1.0, modality="label"),
    "repr":      Task(None, None, (0.0, 0.0, 0.1), guidance=1.0, modality="repr"),
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
MAX_PIXELS = 100_000_000
Image.MAX_IMAGE_PIXELS = None  # our own limit, below, speaks in one line


def open_image(path):
    """Open a picture upright, as RGBA. A UserError names a file that is missing or no picture."""
    if not Path(path).is_file():
        raise UserError(f"no picture at {path}")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"it has more than {MAX_PIXELS:,} pixels")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):
                # 16 bits a pixel: convert() would cut them off at 255.
                array = np.asarray(picture).clip(0, 65535) // 256
                picture = Image.fromarray(array.astype(np.uint8))
            if picture.mode == "F":
                raise ValueError("floating-point pixels have no fixed white")
            return picture.convert("RGBA")
    except (OSError, SyntaxError, ValueError, struct.error, ZeroDivisionError) as error:
        raise UserError(f"{path} is not a picture that can be read ({error})") from None


def open_square(path, size):
    """Open a picture, crop it to its central square and resize it -> RGB, size x size."""
    picture = on_white(open_image(path))
    side = min(picture.size)
    left = (picture.width - side) // 2
    top = (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.LANCZOS)


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


def open_dataset(task, split, size, root=None):
    """The data set of one task: the built-in one, a folder, or an encoded folder."""
    if root is None:
        return builtin(task, split, size)
    folder = Path(root) / task if (Path(root) / task).is_dir() else Path(root)
    kind = Encoded if (folder / "encoded.json").is_file() else Folder
    return kind(folder, task, split, size)


def class_names(root=None):
    """The classes of the task label: the built-in categories, or those of a folder."""
    if root is None:
        return emoji.classes()
    folder = Path(root) / "label" if (Path(root) / "label").is_dir() else Path(root)
    return sorted({row["label"] for row in read_rows(folder) if "label" in row})


def needed_columns(task):
    """The columns of metadata.jsonl that a task reads."""
    rule = TASKS[task]
    columns = ["file_name"]
    if rule.prompt or rule.modality == "repr":
        columns.append("text")
    if rule.modality == "source" or (rule.source and task != "sr"):
        columns.append("source_file_name")
    if rule.modality == "label":
        columns.append("label")
    return columns


def read_row(root, line):
    """One line of metadata.jsonl -> its dict. ValueError says what is wrong with it."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    for key in ("file_name", "source_file_name", "text", "label"):
        if key in row and not isinstance(row[key], str):
            raise ValueError(f"{key} is no text")
        row.get(key, "").encode()  # half a surrogate pair is no text
    if row.get("split", "train") not in ("train", "heldout"):
        raise ValueError('"split" is "train" or "heldout"')
    for key in ("file_name", "source_file_name"):
        if key in row:
            path = (root / row[key]).resolve()
            if not path.is_relative_to(root.resolve()):
                raise ValueError(f"{row[key]} lies outside of {root}")
            if not path.is_file():
                raise ValueError(f"no picture at {root / row[key]}")
    return row


@functools.lru_cache(maxsize=8)
def read_rows(root):
    """The lines of a folder's metadata.jsonl, each with a "split"."""
    path = root / "metadata.jsonl"
    if not path.is_file():
        raise UserError(f"no {path}: --data names a folder with pictures and a metadata.jsonl, or "
                        "one with a subfolder like that for each task, named after it")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(read_row(root, line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number}: {error}") from None
    if not any("split" in row for row in rows):
        # One file name in ten is held out, the same ones on every machine.
        for row in rows:
            row["split"] = "heldout" if held_out(row.get("file_name", "")) else "train"
    return rows


def served_tasks(rows):
    """The tasks for which every row has what they read."""
    return [task for task in TASKS
            if rows and all(column in row for row in rows for column in needed_columns(task))]


class Folder(torch.utils.data.Dataset):
    """Pictures and a metadata.jsonl, one JSON object a line:

        {"file_name": "after.jpg", "source_file_name": "before.jpg", "text": "make it snow"}

    t2i needs no source, and sr makes its own from the picture. Lines with "split": "heldout" are
    held out; where no line has a split, one file name in ten is. Pictures are cropped to their
    central square and resized.
    """

    def __init__(self, root, task, split, size):
        self.root = root
        self.task = task
        self.size = size
        rows = read_rows(root)
        if missing := [c for c in needed_columns(task) if not all(c in row for row in rows)]:
            raise UserError(f"{root} serves {', '.join(served_tasks(rows)) or 'no task'}; for "
                            f"{task} every line of metadata.jsonl needs {' and '.join(missing)}")
        self.items = [row for row in rows if row.get("split", "train") == split]
        self.classes = class_names(root)
        if not self.items:
            raise UserError(f"{root} has no {split} pictures for {task}; mark some lines of "
                            f'metadata.jsonl with "split": "{split}"')

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.get(i, np.random.default_rng((len(self), i)))

    def get(self, i, rng):
        """Example i; what is random about it (degradation, patches) is drawn from rng."""
        row = self.items[i]
        modality = TASKS[self.task].modality
        picture = open_square(self.root / row["file_name"], self.size)
        example = dict(prompt=row["text"] if TASKS[self.task].prompt else "",
                       target=to_tensor(picture))
        if self.task == "sr":
            example["source"] = to_tensor(degrade(picture, rng))
        elif "source_file_name" in needed_columns(self.task):
            source = to_tensor(open_square(self.root / row["source_file_name"], self.size))
            example["x" if modality else "source"] = source
        elif modality == "masked":
            example["x"] = patched(example["target"], rng)
        elif modality == "label":
            example["x"] = self.classes.index(row["label"])
        elif modality == "repr":
            example["x"] = row["text"]
        return example


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
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
    for t, _ in model.texts:
        parts = [t.vocab, [list(pair) for pair in t.ranks], t.special, repr(t.added)]
        digest.update(json.dumps(parts, sort_keys=True).encode())
    digest.update(str(model.index.get("force_zeros_for_empty_prompt")).encode())
    return digest.hexdigest()


class Encoded(torch.utils.data.Dataset):
    """An encoded folder: its examples hold latents' moments (2, C, h, w) in place of pictures."""

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

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.get(i, np.random.default_rng((len(self), i)))

    def get(self, i, rng):
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
    """Encode every picture and text of a folder, shard by shard; shards that exist are kept."""
    datasets = {}
    for task in ALL:
        folder = root / task if (root / task).is_dir() else root
        if (folder / "metadata.jsonl").is_file() and task in served_tasks(read_rows(folder)):
            datasets[task] = folder
    if not datasets:
        raise UserError(f"{root} serves none of {', '.join(ALL)}; see data.Folder for its layout")

    numbers = {}   # path of a picture -> its row
    texts = {"": 0}
    tasks = {task: dict(train=[], heldout=[]) for task in datasets}
    kept = set()
    for task, folder in datasets.items():
        columns = needed_columns(task)
        for row in read_rows(folder):
            paths = [folder / row[column] for column in columns if column.endswith("file_name")]
            places = [numbers.setdefault(path, len(numbers)) for path in paths]
            text = row["text"] if "text" in columns else ""
            texts.setdefault(text, len(texts))
            item = [places[0], places[1] if len(places) > 1 else None, text]
            tasks[task][row.get("split", "train")].append(item)
            if task == "sr":
                kept.add(paths[0])

    size = model.native_size
    encoder = Encoder(model.vae)
    # Pictures that change on the disk afterwards make another folder.
    stats = [(str(path.resolve()), path.stat()) for path in numbers]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    index = dict(model=str(model.path), fingerprint=fingerprint(model), size=size, tasks=tasks,
                 texts=list(texts), files=hashlib.sha256(json.dumps(files).encode()).hexdigest())
    if (out / "encoded.json").is_file() and read_json(out / "encoded.json") != index:
        raise UserError(f"{out} was made with another model or from other data; delete it, or name "
                        "another --out")
    write_json(out / "encoded.json", index)

    def encode_pictures(paths):
        pictures = [open_square(path, size) for path in paths]
        for path, picture in zip(paths, pictures):
            if path in kept:
                with replacing(out / "pictures" / f"{numbers[path]}.png") as beside:
                    picture.save(beside, format="PNG")
        mean, logvar = encoder.moments([to_tensor(picture) for picture in pictures], device)
        return dict(latents=torch.stack([mean, logvar], dim=1))

    def encode_texts(prompts):
        context, pooled = model.encode_text(prompts)
        return dict(context=context) if pooled is None else dict(context=context, pooled=pooled)

    write_shards(out, "latents", list(numbers), encode_pictures)
    write_shards(out, "texts", list(texts), encode_texts)
    return {task: {split: len(items) for split, items in splits.items()}
            for task, splits in tasks.items()}


def write_shards(out, kind, rows, encode, batch_size=16):
    """Encode rows a batch at a time into files of ROWS_PER_FILE; files that exist are kept."""
    from tqdm import tqdm
    for first in tqdm(range(0, len(rows), ROWS_PER_FILE), desc=kind):
        path = out / f"{kind}-{first // ROWS_PER_FILE:05d}.safetensors"
        if path.is_file():
            continue
        shard = rows[first:first + ROWS_PER_FILE]
        parts = [encode(shard[i:i + batch_size]) for i in range(0, len(shard), batch_size)]
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
        text, both, picture = self.drop or TASKS[task].drop
        drop_text = r < text + both
        drop_picture = text <= r < text + both + picture
        return dict(task=task, prompt="" if drop_text else example["prompt"],
                    target=example["target"], source=example.get("source"), x=example.get("x"),
                    keep=0.0 if drop_picture else 1.0)

    def add_randomness(self, example, t, noise_seed):
        generator = torch.Generator().manual_seed(noise_seed)
        noise, latent_noise = torch.randn(2, *self.latent_shape, generator=generator)
        return dict(example, t=t, noise=noise, latent_noise=latent_noise)


def collate(examples):
    """A list of examples -> a batch: a dict of lists; t, keep and the two noises are tensors."""
    batch = {key: [example[key] for example in examples] for key in examples[0]}
    batch["t"] = torch.tensor(batch["t"])
    batch["keep"] = torch.tensor(batch["keep"])
    batch["noise"] = torch.stack(batch["noise"])
    batch["latent_noise"] = torch.stack(batch["latent_noise"])
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
    def moments(self, pictures, device):
        """Pictures (3, H, W), or encoded ones (2, C, h, w) -> mean, logvar, (B, C, h, w) each."""
        keys = [hash(p.numpy().tobytes()) if p.dim() == 3 else None for p in pictures]
        new = {key: p for key, p in zip(keys, pictures)
               if key is not None and key not in self.memory}
        encoded = {}
        for first in range(0, len(new), self.TOGETHER):
            chunk = list(new.items())[first:first + self.TOGETHER]
            padded = [p for _, p in chunk]
            while len(padded) < self.TOGETHER:
                padded.append(padded[-1])
            mean, logvar = self.vae.encode(torch.stack(padded).to(device))
            moments = torch.stack([mean, logvar], dim=1).float().cpu()
            encoded.update({key: m for (key, _), m in zip(chunk, moments)})
        known = self.memory | encoded
        out = torch.stack([p if key is None else known[key] for key, p in zip(keys, pictures)])
        if len(self.memory) * out[0].nbytes < self.LIMIT:
            self.memory.update(encoded)
        return out[:, 0].to(device), out[:, 1].to(device)

    def latents(self, pictures, rule, device, noise=None):
        """Pictures -> latents (B, C, h, w) by a rule. The only place that scales latents."""
        mean, logvar = self.moments(pictures, device)
        z = mean + torch.exp(0.5 * logvar) * noise.to(device) if rule.sample else mean
        return z * self.vae.config["scaling_factor"] if rule.scaled else z

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
        source = torch.zeros_like(x0)
        source[rows] = self.latents([batch["source"][i] for i in rows], SOURCE, device)
        return x0, source * batch["keep"].to(device)[:, None, None, None]


def main():
    parser = Parser("Encode a folder of pictures and texts once, for train.py --data.")
    parser.add_argument("action", choices=("encode",), help="what to do")
    parser.add_argument("--data", required=True, help="folder of pictures, see data.Folder")
    parser.add_argument("--model", default=str(ASSETS / "tiny"), help="model folder or hub id")
    parser.add_argument("--out", required=True, help="folder for what was encoded")
    parser.add_argument("--device", help="torch device (default: cuda, else mps, else cpu)")
    args = parser.parse_args()
    from sample import load_model
    device = pick_device(args.device)
    model = load_model(args.model, device=device)
    counts = encode_folder(model, Path(args.data), Path(args.out), device)
    for task, splits in counts.items():
        print(f"{task}: {splits['train']} train, {splits['heldout']} held out")
    print(f"{args.out}: train from it with train.py --data {args.out} --model {args.model}")


if __name__ == "__main__":
    command(main)
