"""What lies on disk: pictures, and data sets in the layouts in which people have them.

    read_rows(folder)        the examples of a data set, checked and split, as rows
    open_image, open_square  a picture, whole or as the square that a network sees
    LAYOUTS                  one row a layout: the marker that it is recognised by, and its reader

A row is a dict with file_name, the target, and where the layout has them source_file_name, text,
label, split ("train", "heldout" or "test") and group (rows of a group are held out together). An
edit may have caption and output, what the source and the target show: evaluate.py measures with
them. The picture columns may hold lists of one length, of which each visit draws a pair;
`draw_text` says what a text may be. A picture inside another file is named as if that file were a
folder: data_batch_1.bin/17, train/1.jpg/left.

layout              marker                        task         full copy  source, licence
own folder          metadata.jsonl, metadata.csv  any                     yours
COCO captions       annotations/captions_*.json   t2i            123,287  cocodataset.org, CC BY 4.0
InstructPix2Pix     seeds.json, */prompt.json     edit           313,010  [1]
.. as parquet       *.parquet, data/*.parquet     edit           313,010  [2]; pip install pyarrow
GQA-Inpaint         train_scenes.json             inpaint        105,651  [3]
Real-ESRGAN         meta_info/*.txt               sr                      [4]
pictures and masks  images/ and masks/            inpaint                 yours
CIFAR-10, binary    cifar-10-batches-bin/         class           60,000  [5]
Fashion-MNIST       train-images-idx3-ubyte(.gz)  class           70,000  [6], MIT
paired folders      trainA/ trainB/, or A/ B/     translate               as in the next line
pix2pix             train/1.jpg, of shape 2:1     translate               [7]
ImageNet            train/n01440764/              class        1,331,167  image-net.org, research
LSUN, exported      bedroom_train/                class                   [8]
captions beside     1.txt beside 1.png            t2i                     yours
folders of classes  train/CLASS/, or CLASS/       class                   yours

[1] instruct-pix2pix.eecs.berkeley.edu  [2] hub: timbrooks/instructpix2pix-clip-filtered
[3] github.com/abyildirim/inst-inpaint, and the images of GQA, which are a download of their own
[4] github.com/xinntao/Real-ESRGAN, docs/Training.md  [5] www.cs.toronto.edu/~kriz/cifar.html
[6] github.com/zalandoresearch/fashion-mnist  [7] efrosgans.eecs.berkeley.edu/pix2pix/datasets
[8] github.com/fyu/lsun. Where no licence stands here, the source has to be asked.

"class" stands for class and label. uncond, sr and masked read each of these, and any other folder
of pictures; repr what t2i reads, and translate each that has pairs. Where some pictures lie in
folders, as classes do, those beside the folders are left out. Counts are of training and validation
together.

Split: COCO's val is held out. Of the positions in seeds.json 90 % train, 5 % are held out and 5 %
are the test set. Folders and files named train, val and test mean what they say. Where nothing is
held out the test set is, or else one name in ten.
"""
import collections.abc
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from emoji import is_held_out, on_white
from hub import UserError, blaming, print_once

# -------------------------------------------------------------------------------------------------
# Pictures

# Only these formats are opened. Pillow knows more, of which PostScript would start a program.
Image.init()
FORMATS = [name for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
           if name in Image.OPEN]
# A picture of this size takes 400 MB as RGBA. Pillow's own limit is switched off, because ours
# ends in one line.
MAX_PIXELS = 100_000_000
Image.MAX_IMAGE_PIXELS = None


@contextlib.contextmanager
def open_header(path):
    """Yield a picture that is not decoded yet. Whatever fails in the block is a UserError.

    Pillow's readers raise nearly everything on a damaged file, struct.error and SyntaxError too, so
    this one guard catches all of it and names the file.
    """
    try:
        file, part = split_part(path)
        if not file.is_file():
            # Opening a FIFO would wait for ever, and a device may have no end.
            raise UserError(f"no picture at {path}")
        with warnings.catch_warnings():
            # Pillow prints a remark where it can do without some damaged metadata.
            warnings.simplefilter("ignore")
            opened = open_part(file, part) if part else Image.open(file, formats=FORMATS)
            with opened as picture:
                # The header says how large a picture is before any memory is taken for it.
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"it has more than {MAX_PIXELS:,} pixels")
                yield picture
    except (UserError, MemoryError):
        # Too little memory is no fault of the file: `hub.command` has a line for it.
        raise
    except Exception as error:
        raise UserError(f"{path} is not a picture that can be read ({error})") from None


def turn_upright(picture):
    """Turn a picture in place as its EXIF says. A block that cannot be read is ignored."""
    try:
        # It turns the pixels before it writes all tags again, which fails where one of them has a
        # value that the standard does not allow: by then the picture is upright.
        ImageOps.exif_transpose(picture, in_place=True)
    except MemoryError:
        raise
    except Exception:
        pass


def open_pixels(path, least=None):
    """Open a picture upright, in the kind of pixels that it has.

    least: pixels that its shorter side should have. A JPEG that is much larger is decoded at 1/2,
    1/4 or 1/8 of its size.
    """
    with open_header(path) as picture:
        if least is not None:
            # Other formats than JPEG ignore this.
            picture.draft(None, (least, least))
        # Broken pixels show before the metadata are looked at; some PNGs keep these at their end.
        picture.load()
        turn_upright(picture)
        if picture.mode.startswith("I"):
            # 16 bits a pixel: convert() would cut them off at 255.
            array = np.asarray(picture).clip(0, 65535) // 256
            picture = Image.fromarray(array.astype(np.uint8))
        if picture.mode == "F":
            # TIFF knows such pictures; one cannot tell whether they end at 1, 255 or elsewhere.
            raise ValueError("floating-point pixels have no fixed white")
        return picture


def open_image(path):
    """Open a picture upright, as RGBA. A UserError names a file that is missing or no picture."""
    return open_pixels(path).convert("RGBA")


class Frame(NamedTuple):
    """What of a picture's central square is seen: enlarge it, cut a part out of it, and mirror."""
    enlarge: float = 1.0
    left: float = 0.5   # where the part lies: 0 is at the left end, 1 at the right end
    top: float = 0.5
    mirror: bool = False


# A JPEG is decoded at a part of its size where this many of its pixels are left for each one of the
# square, along a side. It saves half of the time and changes a photograph by one grey level in the
# mean, about as much as the choice of LANCZOS in the place of bicubic would.
SPARE = 1.3


def open_square(path, size, frame=Frame()):
    """Open a picture, crop it to its central square and resize it -> RGB, size x size."""
    picture = open_pixels(path, math.ceil(SPARE * frame.enlarge * size))
    if picture.has_transparency_data:
        picture = on_white(picture.convert("RGBA"))
    width, height = picture.size
    short = min(width, height)
    # To enlarge a picture and to cut out a square is to resize a smaller square of it.
    side = int(short / frame.enlarge)
    left = round((width - short) / 2 + frame.left * (short - side))
    top = round((height - short) / 2 + frame.top * (short - side))
    picture = picture.crop((left, top, left + side, top + side))
    if picture.mode != "RGB":
        picture = picture.convert("RGB")  # which would copy a picture that is RGB already
    if side != size:
        # Pillow's bicubic filter, computed by torch in a third of the time or less.
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
        picture = Image.merge("RGB", [Image.fromarray(plane) for plane in pixels[0].numpy()])
    return ImageOps.mirror(picture) if frame.mirror else picture


def split_part(path):
    """The name of a picture -> the file on disk, and the part of it, or "" for the whole."""
    file = Path(path)
    while not file.is_file():
        if file == file.parent:
            return Path(path), ""
        file = file.parent
    return file, Path(path).relative_to(file).as_posix() if file != Path(path) else ""


# Two groups, because a pair is in two columns. In random order nearly every example reads a group,
# so a parquet copy is meant for `data.py encode`, which goes through it once.
@functools.lru_cache(maxsize=2)
def read_cells(path, column, group):
    """The encoded pictures in a group of rows of a parquet file. Of one picture it reads all."""
    cells = parquet(path).read_row_group(group, [column], use_threads=False)
    return [cell["bytes"] for cell in cells.column(column).to_pylist()]


def open_part(file, part):
    """Open a picture that lies inside another file -> a Pillow picture."""
    if file.suffix == ".parquet":
        column, group, row = part.split("/")
        return Image.open(io.BytesIO(read_cells(file, column, int(group))[int(row)]),
                          formats=FORMATS)
    if file.suffix == ".bin":
        record = np.fromfile(file, np.uint8, 3073, offset=3073 * int(part))
        return Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0).copy())
    if "idx3-ubyte" in file.name:
        return Image.fromarray(read_idx_array(file)[int(part)])
    picture = open_image(file)
    middle = picture.width // 2
    if part == "left":
        return picture.crop((0, 0, middle, picture.height))
    if part == "right":
        return picture.crop((middle, 0, picture.width, picture.height))
    # masks/1.png/1.jpg is images/1.jpg with grey, the zero of [-1, 1], where the mask is white.
    folder = next(parent.parent for parent in file.parents if parent.name == "masks")
    if not lies_inside(folder.resolve(), f"images/{part}"):
        raise UserError(f"images/{part} lies outside of {folder}")
    whole = open_image(folder / "images" / part).convert("RGB")
    mask = picture.convert("RGB").convert("L").resize(whole.size, Image.BILINEAR)
    whole.paste((128, 128, 128), mask=mask.point(lambda grey: 255 * (grey >= 128)))
    return whole


# -------------------------------------------------------------------------------------------------
# Trees of files

ENDINGS = tuple(ending for ending, name in Image.EXTENSION.items() if name in FORMATS)

SPLITS = {"train": "train", "val": "heldout", "validation": "heldout", "heldout": "heldout",
          "t10k": "heldout", "test": "test"}


def read_text(path):
    """Read a text file in UTF-8, without the mark that Windows puts before it."""
    if not path.is_file():
        raise UserError(f"no file at {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None


def visible(root, *patterns):
    """Yield what lies in a folder and matches, but for hidden files.

    macOS leaves a hidden ._1.jpg beside each 1.jpg in archives.
    """
    for pattern in patterns:
        yield from (path for path in root.glob(pattern) if path.name[0] != ".")


def find_pictures(root):
    """List the pictures below a folder by their names relative to it, sorted."""
    names = []
    for folder, folders, files in os.walk(root):
        # An encoded folder holds pictures too, which are not new ones.
        folders[:] = [name for name in folders
                      if name[0] != "." and not os.path.isfile(f"{folder}/{name}/encoded.json")]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files
                  if name[0] != "." and name.lower().endswith(ENDINGS)]
    return sorted(names)


# -------------------------------------------------------------------------------------------------
# One reader a layout. Each yields rows; None stands for a line without one, so lines keep numbers.

def read_jsonl(root):
    """Read metadata.jsonl, one JSON object a line."""
    # splitlines() would also split at characters that JSON allows in strings, such as U+2028.
    for line in read_text(root / "metadata.jsonl").split("\n"):
        yield json.loads(line) if line.strip() else None


def read_csv(root):
    """Read metadata.csv, whose first line names the columns."""
    yield None  # the first line
    for row in csv.DictReader(io.StringIO(read_text(root / "metadata.csv"), newline="")):
        # An empty cell is a column that this picture does not have, but for the text.
        yield {key: value for key, value in row.items() if value or key == "text"}


def read_coco(root):
    """COCO captions of 2017, or else of 2014: five captions a picture, at times more."""
    files = {path.stem.removeprefix("captions_"): path
             for path in sorted(visible(root, "annotations/captions_*.json"))}
    # The pictures of both years are the same ones, split in other ways: with both, pictures that
    # are held out in one would be trained on in the other. So one year is read.
    there = [part for part in files if (root / part).is_dir()]
    year = max((part[-4:] for part in there or files), default="")
    for part, path in files.items():
        if part.endswith(year):
            content = json.loads(read_text(path))
            captions = {}
            for row in content["annotations"]:
                # Many captions end in spaces or line breaks.
                words = " ".join(row["caption"].split())
                captions.setdefault(row["image_id"], []).append(words)
            for image in content["images"]:
                if image["id"] in captions:
                    yield dict(file_name=f"{part}/{image['file_name']}", split=SPLITS[part[:-4]],
                               text=captions[image["id"]])


def read_instructpix2pix(root):
    """The authors' folder: an example is a prompt, of whose up to four pairs a visit draws one."""
    if (root / "seeds.json").is_file():
        seeds = json.loads(read_text(root / "seeds.json"))
    else:
        # Whoever unpacks the zip files by hand has no such file. Names in order take its place.
        seeds = [(path.parent.name, sorted(picture.name.removesuffix("_0.jpg")
                                           for picture in path.parent.glob("*_0.jpg")))
                 for path in sorted(visible(root, "*/prompt.json"))]
    # The authors' arithmetic: in floating point 0.9 + 0.05 is a little more than 0.95.
    train = math.floor(0.9 * len(seeds))
    heldout = math.floor((0.9 + 0.05) * len(seeds))
    for i, (name, numbers) in enumerate(seeds):
        if not numbers:
            continue  # it keeps its position, on which the split depends
        # Only "edit" is read of prompt.json; the other keys differ between releases. A full copy
        # has 313,010 of these files, so each one is read when its example is.
        yield dict(file_name=[f"{name}/{number}_1.jpg" for number in numbers],
                   source_file_name=[f"{name}/{number}_0.jpg" for number in numbers],
                   text=dict(file=f"{name}/prompt.json"),
                   split="train" if i < train else "heldout" if i < heldout else "test")


def parquet(path):
    """Open a parquet file."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading parquet needs `pip install pyarrow`") from None
    return ParquetFile(path)


def read_parquet(root):
    """InstructPix2Pix on the hub, or its sample of 1,000, which names one column differently."""
    for path in sorted(visible(root, "*.parquet", "data/*.parquet")):
        file = parquet(path)
        # Columns are taken by name: the first three of the full set are other ones.
        columns = set(file.schema_arrow.names)
        before = "original_image" if "original_image" in columns else "input_image"
        name = path.relative_to(root).as_posix()
        words = sorted(columns & {"edit_prompt", "original_prompt", "edited_prompt"})
        for group in range(file.num_row_groups):
            texts = file.read_row_group(group, words, use_threads=False).to_pylist()
            for i, text in enumerate(texts):
                # The sample has no captions.
                yield dict(file_name=f"{name}/edited_image/{group}/{i}", text=text["edit_prompt"],
                           source_file_name=f"{name}/{before}/{group}/{i}",
                           caption=text.get("original_prompt"), output=text.get("edited_prompt"))


# How the authors of GQA-Inpaint speak of a place where a thing is removed, not added.
PLACES = {"to the left of": "at the left of", "to the right of": "at the right of"}


def position(scene, box):
    """Name the third of the central square that a box lies in, as GQA-Inpaint's loader does."""
    side = min(scene["width"], scene["height"])
    left, right = (min(max(x - (scene["width"] - side) // 2, 0), side) for x in (box[0], box[2]))
    third = side // 3
    half = (right - left) / 2
    if left <= third and right >= 2 * third:
        return "at the center"
    if third - left >= half:
        return "at the left"
    return "at the center" if 2 * third - left >= half else "at the right"


def compose(scene, number, same):
    """The instruction to remove a thing, as a form for `draw_text`. same: name -> its things."""
    def name(thing):
        # One of its attributes, which may be missing, comes before the name.
        words = thing.get("attributes") or [""]
        return [f"{word} {thing['name']}".strip() for word in words]

    things = scene["objects"]
    thing = things[number]
    relations = [dict(join=[PLACES.get(relation["name"], relation["name"]), "the",
                            name(things[relation["object"]])])
                 for relation in thing["relations"]
                 if things[relation["object"]]["name"] in same
                 and things[relation["object"]]["name"] != thing["name"]]
    where = relations or position(scene, thing["bbox"])
    # What is the only one of its name needs no place; it has one half of the time.
    unique = len(same[thing["name"]]) == 1
    return dict(join=["remove the", name(thing), ["", where] if unique else where])


def read_gqa(root):
    """GQA-Inpaint: pairs of all things that were removed, with an instruction to do so.

    The data were made to add things, so the picture without the thing is the target here.
    A file train_instructions.json or test_instructions.json takes the place of composed words;
    train_instructions_qwen2.5-14b-instruct.json has to be renamed to that for its words to be read.
    At one visit in five (irrelevant_text_prob) its authors train on another picture's instruction
    and the source as the target. MTU's paper does not say so, and it is left out here.
    """
    for path in sorted(visible(root, "*_scenes.json")):
        part = path.name.removesuffix("_scenes.json")
        fixed = root / f"{part}_instructions.json"
        instructions = json.loads(read_text(fixed)) if fixed.is_file() else {}
        for image, scene in json.loads(read_text(path)).items():
            same = {}
            for number, thing in scene["objects"].items():
                same.setdefault(thing["name"], []).append(number)
            # "The chair" means one of two chairs only if they stand in different places.
            places = scene["image_relative_positions"]
            same = {name: numbers for name, numbers in same.items() if len(numbers) == 1
                    or len(numbers) == 2 and places[numbers[0]] != places[numbers[1]]}
            for number in sum(same.values(), []):
                if scene["objects"][number]["bidirected"]:
                    text = instructions.get(f"i{image}-o{number}")
                    yield dict(file_name=f"images_inpainted/{image}/{number}.jpg",
                               source_file_name=f"images/{image}.jpg", group=image,
                               text=text or compose(scene, number, same), split=SPLITS[part])


def read_meta_info(root):
    """Real-ESRGAN's lists: a relative path a line; what follows a space says how large it is."""
    # The list that comes with the code names the authors' crops. One's own have other names, so
    # generate_meta_info.py of their scripts has to list them anew.
    for path in sorted(visible(root, "meta_info*.txt", "meta_info/*.txt")):
        for line in read_text(path).splitlines():
            if name := line.strip().split(" ")[0].rstrip(","):
                # 0001T2_s013 is crop 13 of scale 2 of picture 0001: held out as a whole or not.
                picture = re.sub(r"(T\d)?(_s\d+)?$", "", Path(name).stem)
                yield dict(file_name=name, group=picture)


def read_masks(root):
    """images/1.jpg with masks/1.png, white where the picture has to be filled in."""
    masks = {Path(name).with_suffix("").as_posix(): name for name in find_pictures(root / "masks")}
    for name in find_pictures(root / "images"):
        mask = masks.get(Path(name).with_suffix("").as_posix(), name)
        yield dict(file_name=f"images/{name}", source_file_name=f"masks/{mask}/{name}", text="")


def read_cifar(root):
    """CIFAR-10's binary files: records of a label and 3 planes of 32 x 32 bytes."""
    folder = root / "cifar-10-batches-bin"
    folder = folder if folder.is_dir() else root
    # The release "for Python" holds pickles, which may run anything when they are read.
    names = read_text(folder / "batches.meta.txt").split()
    for path in sorted(visible(folder, "*_batch*.bin")):
        records = np.fromfile(path, np.uint8).reshape(-1, 3073)
        for i, label in enumerate(records[:, 0]):
            yield dict(file_name=f"{path.relative_to(root).as_posix()}/{i}", label=names[label],
                       split="test" if path.name.startswith("test") else "train")


MAX_ARRAY = 2 ** 30  # bytes; Fashion-MNIST has 47 million


@functools.lru_cache(maxsize=2)
def read_idx_array(path):
    """Read an array in MNIST's format, plain or gzip: how many dimensions, their sizes, bytes."""
    with open(path, "rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
    with (gzip.open if packed else open)(path, "rb") as file:
        # The fourth byte counts the dimensions; their sizes follow with the high byte first.
        shape = np.frombuffer(file.read(4 * file.read(4)[3]), ">u4").tolist()
        count = math.prod(shape)
        # A small gzip file may unpack to any size: no more is read than its header promises.
        if count > MAX_ARRAY:
            raise ValueError(f"{path} promises more than {MAX_ARRAY:,} bytes")
        content = file.read(count + 1)
    if len(content) != count:
        raise ValueError(f"{path} does not hold the {count:,} bytes that its header promises")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_idx(root):
    """MNIST's format. A class is its number, because the names are in no file."""
    for path in sorted(visible(root, "*-images*idx3-ubyte*")):
        if path.suffix == ".gz" and path.with_suffix("").is_file():
            continue  # the same pictures unpacked
        labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        for i, label in enumerate(read_idx_array(labels)):
            yield dict(file_name=f"{path.name}/{i}", label=str(label),
                       split=SPLITS[path.name.partition("-")[0]])


def read_pairs(root):
    """Folders A, the source, and B, the target, whose names agree but for an _A and _B."""
    for a in sorted(root / f"{part}A" for part in ("", *SPLITS) if (root / f"{part}A").is_dir()):
        b = root / f"{a.name[:-1]}B"
        partners = {re.sub(r"_B$", "", name.rpartition(".")[0]): name for name in find_pictures(b)}
        for name in find_pictures(a):
            key = re.sub(r"_A$", "", name.rpartition(".")[0])
            # A picture without a partner is reported as missing there. CycleGAN's folders have the
            # same names, but few of their pictures have one.
            yield dict(source_file_name=f"{a.name}/{name}",
                       file_name=f"{b.name}/{partners.get(key, name)}",
                       split=SPLITS.get(a.name[:-1] or name.partition("/")[0]))


def read_halves(root):
    """pix2pix: both pictures side by side, of which the left one, A, is the source."""
    # In Cityscapes A is the photograph: drawing one from labels takes --reverse.
    for name in find_pictures(root):
        split = name.partition("/")[0]
        if split in SPLITS:
            yield dict(source_file_name=f"{name}/left", file_name=f"{name}/right",
                       split=SPLITS[split])


def read_folders(root):
    """Any tree of pictures: splits and classes from folders, captions from text files beside."""
    rows = []
    for name in find_pictures(root):
        folders = name.split("/")[:-1]
        row = dict(file_name=name)
        if folders and folders[0] in SPLITS:
            row["split"] = SPLITS[folders.pop(0)]
        elif folders and (lsun := re.fullmatch("(.+)_(train|val)", folders[0])):
            folders[0], row["split"] = lsun[1], SPLITS[lsun[2]]
        rows.append(row | (dict(label=folders[0]) if folders else {}))
    # A class comes from the outermost folder, because LSUN's export may nest a/b/c below it.
    # ImageNet's pictures for validation lie in one folder and have no class: they are left out.
    classes = any("label" in row for row in rows)
    rows = [row for row in rows if "label" in row or not classes]
    # One text file is enough to tell that captions are meant.
    texts = [Path(row["file_name"]).with_suffix(".txt").as_posix() for row in rows]
    if any((root / text).is_file() for text in texts):
        # A picture without a caption is reported as one whose text is missing.
        rows = [row | dict(text=dict(file=text)) for row, text in zip(rows, texts)]
    return rows


# -------------------------------------------------------------------------------------------------
# The table

class Layout(NamedTuple):
    name: str
    markers: str                 # patterns; one with "/" at its end is of a folder
    read: Callable               # folder -> rows
    count: int | None = None     # examples of a full copy
    enlarge: tuple = (1.0, 1.0)  # training resizes by a factor in this range and cuts at random
    mirror: bool = False         # and mirrors half of the pictures
    words: str | None = None     # the one task that its texts are for; None: whichever


# InstructPix2Pix's paper resizes to 256 to 288 pixels and cuts 256, and mirrors; its released code
# only mirrors (configs/train.yaml: min_resize_res and max_resize_res are both 256). pix2pix resizes
# to 286, cuts 256 and mirrors (train.lua: loadSize, fineSize, flip). Real-ESRGAN, and the usual
# training on ImageNet, CIFAR-10 and LSUN, mirror. Instructions of GQA-Inpaint and captions say left
# and right, so those are not. One filter resizes all: InstructPix2Pix has LANCZOS in the place of
# bicubic, and GQA-Inpaint bilinear.
# The first row of which a marker is there counts, so the general ones stand below.
LAYOUTS = (
    Layout("metadata.jsonl", "metadata.jsonl", read_jsonl),
    Layout("metadata.csv", "metadata.csv", read_csv),
    Layout("COCO captions", "annotations/captions_*.json", read_coco, 123_287),
    Layout("InstructPix2Pix", "seeds.json */prompt.json", read_instructpix2pix, 313_010,
           (1.0, 288 / 256), True, "edit"),
    Layout("InstructPix2Pix in parquet", "*.parquet data/*.parquet", read_parquet, 313_010,
           (1.0, 288 / 256), True, "edit"),
    Layout("GQA-Inpaint", "*_scenes.json", read_gqa, 105_651, words="inpaint"),
    Layout("Real-ESRGAN", "meta_info*.txt meta_info/*.txt", read_meta_info, mirror=True),
    Layout("pictures with masks", "masks/../images/", read_masks, words="inpaint"),
    Layout("CIFAR-10", "data_batch_*.bin cifar-10-batches-bin/", read_cifar, 60_000, mirror=True),
    Layout("MNIST's format", "*-idx3-ubyte* *.idx3-ubyte*", read_idx, 70_000),
    # Classes may be letters.
    Layout("folders of letters", "A/../B/../C/", read_folders),
    Layout("paired folders", "trainA/ A/../B/", read_pairs, None, (286 / 256, 286 / 256), True),
    Layout("pix2pix", "2:1", read_halves, None, (286 / 256, 286 / 256), True),
    Layout("ImageNet", "train/n[0-9][0-9][0-9][0-9]*/ n[0-9][0-9][0-9][0-9]*/", read_folders,
           1_331_167, mirror=True),
    Layout("LSUN", "*_train/ *_val/", read_folders, mirror=True),
    Layout("pictures", "*", read_folders),
)


def has_marker(root, marker):
    """Say whether a folder has a file or folder of this pattern."""
    if marker == "2:1":
        paths = (path for path in visible(root, "train/*") if path.suffix.lower() in ENDINGS)
        first = [is_double(path) for path in itertools.islice(paths, 3)]
        return bool(first) and all(first)
    return any(path.is_dir() or marker[-1] != "/" for path in visible(root, marker.rstrip("/")))


def is_double(path):
    """Say whether a picture is twice as wide as high, as are two of them side by side."""
    with contextlib.suppress(UserError), open_header(path) as picture:
        return picture.width == 2 * picture.height
    return False


def find_layout(root):
    """The first layout of the table of which a folder has a marker, or None."""
    return next((layout for layout in LAYOUTS
                 if any(has_marker(root, marker) for marker in layout.markers.split())), None)


# -------------------------------------------------------------------------------------------------
# What a visit draws

def choose(row, rng):
    """Draw one of a row's pairs of pictures, where it has several. Names may be numbers."""
    if isinstance(row["file_name"], str | int):
        return row
    number = rng.integers(len(row["file_name"]))
    return {key: value[number] if key.endswith("file_name") else value
            for key, value in row.items()}


def draw_text(root, text, rng):
    """Draw a text of a row: {"file": name} is a file that holds it, or a form for `fill_in`."""
    if not isinstance(text, dict) or "file" not in text:
        return fill_in(text, rng)
    path = root / text["file"]
    words = read_text(path)
    if path.suffix == ".json":
        # InstructPix2Pix's prompt.json
        with blaming(path):
            words = json.loads(words)["edit"]
    return words.strip()


def fill_in(form, rng):
    """A str is itself, of a list an item is drawn, and {"join": [..]} joins its parts."""
    if isinstance(form, str):
        return form
    if isinstance(form, list):
        return fill_in(form[rng.integers(len(form))], rng)
    return " ".join(filter(None, [fill_in(part, rng) for part in form["join"]]))


def is_form(form):
    """Say whether `fill_in` can read this."""
    parts = form.get("join") if isinstance(form, dict) else form
    return isinstance(form, str) or bool(parts) and isinstance(parts, list) and all(
        map(is_form, parts))


# -------------------------------------------------------------------------------------------------
# Rows, checked and split

TEXTS = (".txt", ".json")
MAX_SKIPPED = 0.01     # the share of the lines of a folder's metadata that may be left out
MAX_HEADERS = 20_000   # files that are opened before training; the others are only looked for


# The columns of a row that name pictures, or lists of them of which a visit draws one.
PICTURES = ("file_name", "source_file_name")


class Rows(collections.abc.Sequence):
    """Rows, dicts, packed into one array.

    A process that reads a Python object changes the count of its references. The workers of a
    data loader would so copy a list of 100,000 dicts page by page; an array they share.
    """

    def __init__(self, rows):
        lines = []
        self.columns = None  # those that all rows have
        for row in rows:
            lines.append(json.dumps(row).encode())
            if isinstance(row, dict):
                self.columns = set(row) if self.columns is None else self.columns & set(row)
        self.ends = np.cumsum([len(line) for line in lines])
        self.text = np.frombuffer(b"".join(lines), np.uint8)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        # A negative number or one that is too large raises IndexError, which ends a loop.
        end = self.ends[range(len(self))[i]]
        return json.loads(self.text[self.ends[i - 1] if i else 0:end].tobytes())


def as_list(names):
    """A name, or a list of them -> a list."""
    return names if isinstance(names, list) else [names]


def picture_names(row):
    """The file names of a row's pictures."""
    return [name for column in PICTURES for name in as_list(row.get(column, []))]


def file_names(row):
    """The file names of a row's pictures, and of a caption in a file of its own."""
    text = row.get("text")
    caption = [text["file"]] if isinstance(text, dict) and "file" in text else []
    return picture_names(row) + caption


def check_row(root, row):
    """Raise ValueError where a row is not what a reader yields.

    root: the folder as an absolute path without symbolic links.
    """
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    text = row.get("text", "")
    for column in ("label", "group"):
        if not isinstance(row.get(column, ""), str):
            raise ValueError(f"{column} is no text")
    if not is_form(text) and not (isinstance(text, dict) and isinstance(text.get("file"), str)):
        raise ValueError("text is no text")
    counts = {len(row[column]) if isinstance(row[column], list) else -1
              for column in PICTURES if column in row}
    if len(counts) > 1 or 0 in counts:
        raise ValueError("there are not as many sources as targets, or none")
    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    if row.get("split") not in (None, "train", "heldout", "test"):
        raise ValueError('"split" is "train", "heldout" or "test"')
    for name in file_names(row):
        # A data set from elsewhere must not make us read this machine's other files, be it by an
        # absolute path, by "..", or through a link.
        if not isinstance(name, str) or ".." in name.split("/") or not lies_inside(root, name):
            raise ValueError(f"{name} lies outside of {root}")


real_path = functools.lru_cache(maxsize=1000)(os.path.realpath)


def lies_inside(root, name):
    """Say whether a name leads to a place inside a folder, through whatever links."""
    folder, file = os.path.split(os.path.join(root, name))
    # Folders repeat themselves, and following the links of a path takes its time.
    path = Path(real_path(folder), file)
    if path.is_symlink():
        path = path.resolve()
    return path.is_relative_to(root)


def split_rows(rows):
    """Give each row a "split". Where none is held out, the test set is, or one file in ten."""
    splits = {row.get("split") for row in rows}
    if "heldout" in splits or "test" in splits:
        for row in rows:
            row["split"] = row.get("split") or "train"
            if "heldout" not in splits and row["split"] == "test":
                row["split"] = "heldout"
        return
    # All crops of one picture, for example, fall on one side.
    names = [row.get("group") or next(iter(picture_names(row)), "") for row in rows]
    heldout = {name for name in names if is_held_out(name)}
    if len(set(names)) > 1 and len(heldout) in (0, len(set(names))):
        # The names of a handful of pictures may all fall on one side. The first one changes over.
        heldout = heldout.symmetric_difference({min(names)})
    for row, name in zip(rows, names):
        row["split"] = "heldout" if name in heldout else "train"


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
    """Find files that are missing, and pictures that have no header -> {path: the reason}.

    A header takes a tenth of a millisecond, and a hundred times that over a slow network: in large
    folders only some files are opened, spread over all of them.
    """
    names = list(dict.fromkeys(name for row in rows for name in file_names(row)))
    step = len(names) // MAX_HEADERS + 1
    paths = [root / name for i, name in enumerate(names)
             if i % step == 0 or not os.path.isfile(os.path.join(root, name))]
    return find_broken(paths, check_file, f"looking at {root}")


def check_file(path):
    """Raise a UserError where a file is missing, or a picture's header is damaged."""
    file, part = split_part(path)
    # Captions are small. What holds many pictures may be large, and only has to be there.
    if path.suffix in TEXTS or part and file.is_file():
        if not file.is_file():
            read_text(path)  # which says that it is missing
        return
    with open_header(path):
        pass


def decode(path):
    """Read a picture, or a caption in a file of its own, whole."""
    if path.suffix in TEXTS:
        draw_text(path.parent, dict(file=path.name), None)
    else:
        open_pixels(path)


@functools.lru_cache(maxsize=8)
def read_rows(root):
    """Read a folder in any layout -> rows, each with a "split", and `find_missing` of them."""
    if (root / "encoded.json").is_file():
        raise UserError(f"{root} holds latents; name the folder that it was encoded from")
    layout = find_layout(root)
    if layout is None:
        raise UserError(f"no pictures in {root}: --data names a folder with a metadata.jsonl, or "
                        "in another layout of readers.py, or one with a subfolder like that for "
                        "each task, named after it")
    absolute = root.resolve()
    rows = []
    try:
        for row in layout.read(root):
            if row is not None:
                check_row(absolute, row)
            rows.append(row)
    except MemoryError:
        raise
    except Exception as error:
        # Files from elsewhere may be wrong in any way. The rows read so far tell which line is.
        unit = "line" if layout.name.startswith("metadata") else "example"
        raise UserError(f"{root}: {layout.name} {unit} {len(rows) + 1}: {error}") from None
    rows = [row for row in rows if row is not None]
    split_rows(rows)
    rows = Rows(rows)
    return rows, find_missing(root, rows)


def usable_rows(root):
    """The rows of a folder whose files are there. UserError where too few are."""
    rows, broken = read_rows(root)
    usable = [row for row in rows if not any(root / name in broken for name in file_names(row))]
    layout = find_layout(root)
    # Some damage is normal in a large download. Much of it means the wrong folder, or half of an
    # archive. A published list, however, may well name more than somebody has downloaded.
    skipped = len(rows) - len(usable)
    own = layout.name.startswith("metadata")
    most = MAX_SKIPPED if own else 0.99
    if skipped > most * len(rows):
        raise UserError(f"{root}: {skipped} of {len(rows)} lines of {layout.name} cannot be used, "
                        f"more than {most:.0%}; python data.py check --data {root} names them all. "
                        f"The first: {next(iter(broken.values()))}")
    full = max(len(rows), layout.count or 0)
    if not own and len(usable) < full:
        first = f"; for one, {next(iter(broken.values()))}" if broken else ""
        print_once(f"{root}: {layout.name}, {len(usable):,} of {full:,} examples are there{first}")
    return usable
