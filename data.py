"""Tasks and pictures: what each task's input is, the built-in emoji data, and a plain folder reader.

    TASKS      one row a task: the source's scaling, the prompt, dropout, guidance; ALL: MTU's four (arXiv 2503.11905, section 6.1)
    builtin    (task, split) -> a dataset over 1,911 emoji in two drawing styles; whole concepts are held out
    Folder     images + metadata.jsonl, for your own pictures

An example is a dict: prompt (str), target (3, H, W) and, for image-to-image tasks, source (3, H, W), floats in [-1, 1].
"""
import functools
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from folders import UserError

ASSETS = Path(__file__).parent / "assets"


# ---------------------------------------------------------------------------------------------------------------------
# Tasks

class Latent(NamedTuple):
    """How a picture becomes a latent: a draw from q(z | image) or its mode; times the VAE's scaling factor or not."""
    sample: bool
    scaled: bool


class Task(NamedTuple):
    source: Latent | None   # the picture concatenated to z_t along channels; its null value is zeros
    prompt: str             # what the text is; the null text is ""
    drop: tuple             # conditioning dropout: P(text only), P(both), P(image only) are nulled
    guidance: float         # the paper's text scale s_T on SD 1.5 (1: none)
    image_guidance: float   # and image scale s_I


TARGET = Latent(sample=True, scaled=True)
# InstructPix2Pix encodes the condition with the mode and leaves it unscaled; models in its layout expect that.
SOURCE = Latent(sample=False, scaled=False)

TASKS = {
    "t2i":     Task(None,   "a caption",                     (0.10, 0.00, 0.00), 7.5, 1.0),
    "edit":    Task(SOURCE, "an instruction",                (0.05, 0.05, 0.05), 7.5, 1.6),
    "sr":      Task(SOURCE, "empty",                         (0.00, 0.00, 0.00), 1.0, 1.0),
    "inpaint": Task(SOURCE, '"remove the <object>", no mask', (0.05, 0.05, 0.05), 4.0, 1.5),
    "uncond":  Task(None,   "empty",                         (0.00, 0.00, 0.00), 1.0, 1.0),  # not MTU's: pixels, for DDPM's and ADM's U-Nets
}
ALL = ("t2i", "edit", "sr", "inpaint")

SDXL_GUIDANCE = {"t2i": (5.0, 1.0), "edit": (10.0, 1.5), "sr": (1.0, 1.0), "inpaint": (4.0, 1.5)}  # the paper's, text and image scale


EXAMPLES = {  # what a task draws when nothing is given
    "t2i": (None, "red apple, google style"),
    "edit": ("edit.png", "give it dark skin"),
    "sr": ("sr.png", ""),
    "inpaint": ("inpaint.png", "remove the thumbs up sign on the left"),
    "uncond": (None, ""),
}


def latents(rule, mean, logvar, scaling_factor, noise=None):
    """mean, logvar (B, 4, h, w) of q(z | image) -> the latents that `rule` asks for. The only place that scales."""
    z = mean + torch.exp(0.5 * logvar) * noise if rule.sample else mean
    return z * scaling_factor if rule.scaled else z


class Encoder:
    """A training batch's pictures to latents with a frozen VAE. Small data sets repeat their pictures: what was encoded is kept, up to a limit."""

    def __init__(self, vae, limit=256 * 2 ** 20):
        self.vae, self.kept, self.limit = vae, {}, limit
        self.texts = None  # in the place of Model.encode_text, where its states come from a cache

    @torch.no_grad()
    def moments(self, pictures, device, together=4):
        """Pictures (3, H, W), or what a cache has of them (2, 4, h, w), also mixed -> mean, logvar (B, 4, h, w). Always `together` at a time,
        so that a picture's latent does not depend on what else is kept: fp32 sums differ with the shape."""
        keys = [hash(p.numpy().tobytes()) if p.dim() == 3 else None for p in pictures]
        new = {key: p for key, p in zip(keys, pictures) if key is not None and key not in self.kept}
        encoded = {}
        for i in range(0, len(new), together):
            some = list(new.items())[i:i + together]
            some += some[-1:] * (together - len(some))
            mean, logvar = self.vae.encode(torch.stack([p for _, p in some]).to(device))
            encoded.update(zip([key for key, _ in some], torch.stack([mean, logvar], dim=1).float().cpu()))  # (2, 4, h, w) each
        out = torch.stack([p if k is None else encoded[k] if k in encoded else self.kept[k] for k, p in zip(keys, pictures)]).to(device)
        if len(self.kept) * out[0].nbytes < self.limit:
            self.kept.update(encoded)
        return out[:, 0], out[:, 1]

    def __call__(self, batch, device):
        """-> x0 (B, 4, h, w), source (B, 4, h, w) with zeros where a sample has none or it was dropped, or None where no sample has one"""
        scale = self.vae.config["scaling_factor"]
        x0 = latents(TARGET, *self.moments(batch["target"], device), scale, batch["sample_noise"].to(device))
        rows = [i for i, s in enumerate(batch["source"]) if s is not None]
        if not rows:
            return x0, None
        source = torch.zeros_like(x0)
        source[rows] = latents(SOURCE, *self.moments([batch["source"][i] for i in rows], device), scale)
        return x0, source * batch["keep"].to(device)[:, None, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# Emoji: two styles of the same 1,911 pictures plus skin-tone variants, 64 x 64 on white

TONES = {None: "yellow", "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
STYLES = ("google", "twitter")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "pink", "grey", "light blue")
PEOPLE = {"1F468 1F469 1F9D1": "man woman person", "1F466 1F467 1F9D2": "boy girl child", "1F474 1F475 1F9D3": "man woman person",
          "1F934 1F478 1FAC5": "man woman person", "1F385 1F936": "man woman", "1F57A 1F483": "man woman", "2642 2640": "man woman"}
GENDER = {code: word for codes, words in PEOPLE.items() for code, word in zip(codes.split(), words.split())}
FIGURE = {code: codes.split()[0] for codes in PEOPLE for code in codes.split()}  # one code for all genders of a figure
CLASSES = {  # the class noun that an emoji of these Unicode subcategories goes by
    "person": "person person-role person-activity person-sport person-fantasy person-gesture person-resting", "cat": "cat-face",
    "face": "face-affection face-concerned face-glasses face-hand face-hat face-negative face-neutral-skeptical face-sleepy face-smiling "
            "face-tongue face-unwell", "flag": "country-flag subdivision-flag flag", "mammal": "animal-mammal", "bird": "animal-bird",
    "hand": "hand-fingers-closed hand-fingers-open hand-fingers-partial hand-prop hand-single-finger hands", "insect": "animal-bug",
    "sea animal": "animal-marine", "reptile": "animal-reptile", "flower": "plant-flower", "plant": "plant-other", "fruit": "food-fruit",
    "vegetable": "food-vegetable", "dish": "food-prepared food-asian", "sweet": "food-sweet", "drink": "drink", "heart": "heart",
    "vehicle": "transport-ground", "aircraft": "transport-air", "boat": "transport-water", "clock": "time", "tool": "tool", "key": "keycap",
    "building": "place-building place-religious", "instrument": "musical-instrument", "garment": "clothing", "book": "book-paper",
    "arrow": "arrow", "sign": "transport-sign warning zodiac religion",
}
CLASS = {subcategory: noun for noun, subcategories in CLASSES.items() for subcategory in subcategories.split()}
WORDS = {
    "tone": ("make the skin tone {b}", "change the skin to {b}", "give it {b} skin", "turn the skin from {a} to {b}",
             "use a {b} skin tone"),
    "gender": ("make it a {b}", "turn the {a} into a {b}", "show a {b} instead", "change the {a} to a {b}", "replace the {a} with a {b}"),
    "colour": ("make it {b}", "change the colour to {b}", "turn it {b}", "paint it {b}", "change it from {a} to {b}"),
}


class Emoji(NamedTuple):
    name: str
    concept: str        # the same for all tones, genders, colours and styles of a thing: what is held out together
    person: str | None  # man, woman or person, where one figure is shown
    colour: str | None
    noun: str | None    # of its class, see CLASSES
    category: str       # Unicode's
    cells: dict         # skin tone -> (x, y) in the sheets; None is the plain one


def _emoji(row):
    codes = [c for c in row["code"].split("-") if c not in ("FE0F", "200D")]
    figures = [GENDER[c] for c in codes if c in GENDER]
    person = figures[0] if len(figures) == 1 else "person" if not figures and row["category"] == "People & Body" else None
    concept, colour = "-".join(FIGURE.get(c, c) for c in codes if c not in ("2640", "2642", "27A1")), None
    words = row["short_name"].replace("_", " ").replace("large ", "").replace("closed book", "red book")
    for thing in ("heart", "circle", "square", "book"):
        for c in COLOURS:
            if words == f"{c} {thing}" or (c, thing) == ("red", words):
                colour, concept = c, f"coloured {thing}"
    return Emoji(row["name"], concept, person if "27A1" not in codes else None, colour, CLASS.get(row["subcategory"]),
                 row["category"], {None: row["cell"]} | row.get("tones", {}))


class Change(NamedTuple):
    """A pair of pictures of one figure in one style, and what differs."""
    kind: str      # tone, gender or colour
    a: str         # in words, before
    b: str         # and after
    name: str      # of the emoji before
    source: tuple  # cells
    target: tuple
    style: str


def held_out(concept):
    """The split: a fixed function of the concept (or file) name; one in ten is held out."""
    return zlib.crc32(concept.encode()) % 10 == 0


class Sheet:
    """The sheets in memory: one 64 x 64 cell per emoji, with a transparent border of one pixel."""
    rows, sheets = None, {}

    @classmethod
    def load(cls):
        if cls.rows is None:
            cls.rows = [_emoji(r) for r in json.loads((ASSETS / "emoji/emoji.json").read_text())]
            cls.sheets = {s: Image.open(ASSETS / f"emoji/{s}.png").convert("RGBA") for s in STYLES}
        return cls.rows

    @classmethod
    def picture(cls, style, cell):
        x, y = 66 * cell[0] + 1, 66 * cell[1] + 1
        return cls.sheets[style].crop((x, y, x + 64, y + 64))  # RGBA

    @classmethod
    def same(cls, style, a, b):
        """A few variants are drawn alike."""
        return cls.picture(style, a).tobytes() == cls.picture(style, b).tobytes()


def on_white(picture):
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def open_image(path):
    """A picture from disk, upright, RGBA; UserError names the file that is missing or is no picture."""
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16 bits a pixel; convert() would cut them off at 255
                picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8))
            if picture.mode == "F":
                raise ValueError("floating-point pixels have no fixed white")
            return picture.convert("RGBA")
    except FileNotFoundError:
        raise UserError(f"no picture at {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a picture that can be read ({error})") from None


def to_tensor(picture):
    """PIL RGB picture -> (3, H, W) float in [-1, 1]."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1)


def to_pil(image):
    """(3, H, W) float in [-1, 1] -> PIL RGB picture."""
    array = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


class Builtin(torch.utils.data.Dataset):
    """builtin(task, split)[i]; `get(i, rng)` draws the random parts (words, places, degradation) anew, [i] draws them from i."""

    def __init__(self, task, split, size=64):
        self.task, self.split, self.size, self.rows = task, split, size, _rows(split)
        self.items = getattr(self, f"_{task}_items")()

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.get(i, np.random.default_rng((len(self), i)))

    def get(self, i, rng):
        return getattr(self, f"_{self.task}")(self.items[i], rng)

    # t2i: caption -> picture

    def _t2i_items(self):
        self.changes = _changes(self.split)
        return self._pictures()

    def _pictures(self):
        return [(e, style) for e in self.rows for style in STYLES]

    def _t2i(self, item, rng):
        """A plain caption; or, so that the base learns the words that other tasks use, as CLIP has from the web, one by place (some with
        a removal), or one by a change."""
        (e, style), r = item, rng.random()
        if r < 0.2:
            things, (ends, boxes) = (e, self._other(e, rng)), _places(rng)
            at, shown = [_at(end) for end in ends], list(zip(things, boxes))
            prompt = f"{things[0].name} {at[0]} and {things[1].name} {at[1]}"
            if rng.random() < 0.3:
                gone = int(rng.integers(2))
                prompt += f", {_removal(things[gone], at[gone], rng)[0]}"
                del shown[gone]
            return dict(prompt=f"{prompt}, {style} style", target=to_tensor(_canvas(style, shown)))
        if r < 0.45:
            change = self.changes[rng.integers(len(self.changes))]
            prompt = _instruction(change, rng)
            return dict(prompt=f"{change.name}, {prompt}, {change.style} style" if rng.random() < 0.7 else prompt,
                        target=to_tensor(on_white(Sheet.picture(change.style, change.target))))
        tone = _tone(e, rng)
        return dict(prompt=caption(e, tone, style), target=to_tensor(on_white(Sheet.picture(style, e.cells[tone]))))

    # uncond: pictures of any size

    def _uncond_items(self):
        return self._pictures()

    def _uncond(self, item, rng):
        e, style = item
        picture = on_white(Sheet.picture(style, e.cells[_tone(e, rng)]))
        return dict(prompt="", target=to_tensor(picture.resize((self.size, self.size), Image.LANCZOS)))

    # edit: skin tone, gender, colour

    def _edit_items(self):
        return _changes(self.split)

    def _edit(self, change, rng):
        source, target = (to_tensor(on_white(Sheet.picture(change.style, cell))) for cell in (change.source, change.target))
        prompt = _instruction(change, rng)
        if self.split == "train" and rng.random() < 0.5:  # no instruction tells left from right
            source, target = source.flip(-1), target.flip(-1)
        return dict(prompt=prompt, source=source, target=target, kind=change.kind)

    # sr: degraded -> clean

    def _sr_items(self):
        return self._pictures()

    def _sr(self, item, rng):
        e, style = item
        target = on_white(Sheet.picture(style, e.cells[_tone(e, rng)]))
        return dict(prompt="", source=to_tensor(degrade(target, rng, max_sigma=1.5)), target=to_tensor(target))

    # inpaint: two objects on one canvas, remove one

    def _inpaint_items(self):
        return self._pictures()

    def _inpaint(self, item, rng):
        e, style = item
        (ends, boxes), other, gone = _places(rng), self._other(e, rng), int(rng.integers(2))  # e, at that end, goes
        both = [(e, boxes[gone]), (other, boxes[1 - gone])]
        prompt, kind = _removal(e, _at(ends[gone]), rng)
        return dict(prompt=prompt, source=to_tensor(_canvas(style, both)), target=to_tensor(_canvas(style, both[1:])), kind=kind)

    def _other(self, e, rng):
        other = e
        while other.concept == e.concept or (other.noun and other.noun == e.noun):
            other = self.rows[rng.integers(len(self.rows))]
        return other


def _rows(split):
    return [e for e in Sheet.load() if held_out(e.concept) == (split == "heldout")]


@functools.lru_cache
def _changes(split):
    """Every pair that an instruction of WORDS tells; both edit and t2i draw from it."""
    items, groups = [], {}
    for e in _rows(split):
        tones = [t for t in e.cells if t in TONES]
        items += [Change("tone", TONES[a], TONES[b], e.name, e.cells[a], e.cells[b], s) for a in tones for b in tones if a != b for s in STYLES]
        groups.setdefault(e.concept, []).append(e)
    for group in groups.values():
        for kind, word in (("gender", "person"), ("colour", "colour")):
            named = [e for e in group if getattr(e, word)]
            if len({getattr(e, word) for e in named}) < len(named):  # ambiguous, as couples are
                continue
            items += [Change(kind, getattr(a, word), getattr(b, word), a.name, a.cells[t], b.cells[t], s)
                      for a in named for b in named if a is not b for t in a.cells if t in b.cells for s in STYLES]
    return [change for change in items if not Sheet.same(change.style, change.source, change.target)]


def _places(rng):
    """Two boxes that do not cover each other: names of the two ends, ((size, (x, y)), (size, (x, y)))."""
    ends, boxes = ("left", "right") if rng.random() < 0.5 else ("top", "bottom"), []
    for end in (0, 1):
        size = int(rng.integers(28, 33))
        along, across = int(rng.integers(0, 33 - size)), int(rng.integers(0, 65 - size))
        along = along if end == 0 else 64 - size - along
        boxes.append((size, (along, across) if ends[0] == "left" else (across, along)))
    return ends, boxes


def _instruction(change, rng):
    return str(rng.choice(WORDS[change.kind])).format(a=change.a, b=change.b)


def _removal(e, at, rng):
    """An instruction and how it tells the thing: its name, its class (a word that other pictures share) or its name and place."""
    if rng.random() < 0.5:
        return f"remove the {e.name} {at}", "placed"
    return (f"remove the {e.noun}", "classed") if e.noun and rng.random() < 0.5 else (f"remove the {e.name}", "named")


def _at(end):
    return f"on the {end}" if end in ("left", "right") else f"at the {end}"


def _canvas(style, things):
    canvas = Image.new("RGBA", (64, 64), "white")
    for e, (size, corner) in things:
        canvas.alpha_composite(Sheet.picture(style, e.cells[None]).resize((size, size), Image.LANCZOS), corner)
    return canvas.convert("RGB")


def _tone(e, rng):
    """Half of the time the plain picture, so that the many skin tones of a few figures do not crowd out the rest."""
    tones = list(e.cells)
    return tones[rng.integers(len(tones))] if rng.random() < 0.5 else None


def caption(e, tone, style):
    tones = "" if tone is None else ", " + " and ".join(TONES[t] for t in dict.fromkeys(tone.split("-"))) + " skin tone"
    return f"{e.name}{tones}, {style} style"


def plain(split):
    """Captions and RGB pictures of the split's emoji in both styles, without skin tones: two lists."""
    items = builtin("t2i", split).items
    return [caption(e, None, style) for e, style in items], [on_white(Sheet.picture(style, e.cells[None])) for e, style in items]


def builtin(task, split, size=64):
    """The built-in data set of a task; split is "train" or "heldout". size: of uncond's pictures, the others are 64 x 64."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    if split not in ("train", "heldout"):
        raise UserError(f"unknown split {split!r}; use train or heldout")
    return Builtin(task, split, size)


# ---------------------------------------------------------------------------------------------------------------------
# Super-resolution's degradation

def degrade(picture, rng, max_sigma=3.0):
    """PIL RGB -> PIL RGB of the same size, half the resolution: Gaussian blur, half size (bicubic), Poisson noise, back to size.

    MTU names blur, Poisson noise and x2 only. Ranges are the first stage of Real-ESRGAN (arXiv 2107.10833): sigma in
    [0.2, 3] pixels, Poisson scale in [0.05, 3]; the built-in 64-pixel pictures use sigma up to 1.5, since 3 leaves no picture.
    """
    width, height = picture.size
    small = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, max_sigma))).resize((width // 2, height // 2), Image.BICUBIC)
    x = np.asarray(small, dtype=np.float32) / 255
    noise = rng.poisson(x * 255) / 255 - x          # shot noise at 255 levels, as in Real-ESRGAN's Poisson branch
    x = np.clip(x + rng.uniform(0.05, 3.0) * noise, 0, 1)
    return Image.fromarray((x * 255).round().astype(np.uint8)).resize((width, height), Image.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# Your own pictures

class Folder(torch.utils.data.Dataset):
    """Pictures and a metadata.jsonl, one JSON object a line:

        {"file_name": "target.jpg", "text": "a caption or an instruction", "source_file_name": "source.jpg"}

    text is absent where TASKS has an empty prompt; source_file_name is for tasks with a source, but sr, which makes its own. Pictures are cropped
    to a centred square and resized to size x size pixels. Lines with "split": "heldout" are held out; where no line has a split, one file name
    in ten is.
    """

    def __init__(self, root, task, split, size):
        self.task, self.size, self.root = task, size, Path(root) / task if (Path(root) / task).is_dir() else Path(root)
        rule = TASKS[task]
        self.columns = ["file_name"] + ["text"] * (rule.prompt != "empty") + ["source_file_name"] * (task != "sr" and rule.source is not None)
        self.cached = None  # path -> moments (2, C, h, w), which an example then holds in the place of pictures; sr degrades its source anew
        path = self.root / "metadata.jsonl"
        if not path.is_file():
            raise UserError(f"no {path}: --data wants a folder with pictures and a metadata.jsonl, or one such folder per task, "
                            f"named {task}")
        rows = []
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                str(row).encode()  # half a surrogate pair is no text
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number} is not JSON ({error})") from None
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in self.columns):
                raise UserError(f"{path} line {number}: {task} needs {', '.join(self.columns)}, as text")
            if row.get("split", "train") not in ("train", "heldout"):
                raise UserError(f'{path} line {number}: "split" is "train" or "heldout"')
            if missing := [row[key] for key in self.columns if key != "text" and not (self.root / row[key]).is_file()]:
                raise UserError(f"{path} line {number}: no picture at {self.root / missing[0]}")
            rows.append(row)
        by_name = not any("split" in row for row in rows)
        self.items = [row for row in rows
                      if (held_out(row["file_name"]) if by_name else row.get("split") == "heldout") == (split == "heldout")]
        if not self.items:
            raise UserError(f'{path} has no {split} pictures for {task}; mark some lines with "split": "{split}"')

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.get(i, np.random.default_rng((len(self), i)))

    def _read(self, name, picture=None):
        return self.cached(self.root / name) if self.cached else to_tensor(picture or self.picture(name))

    def picture(self, name):
        picture = on_white(open_image(self.root / name))
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        return picture.crop((left, top, left + side, top + side)).resize((self.size, self.size), Image.LANCZOS)

    def get(self, i, rng):
        row, example, picture = self.items[i], {}, None
        if self.task == "sr":
            picture = self.picture(row["file_name"])
            example["source"] = to_tensor(degrade(picture, rng))
        elif "source_file_name" in self.columns:
            example["source"] = self._read(row["source_file_name"])
        return dict(prompt=row["text"] if "text" in self.columns else "", target=self._read(row["file_name"], picture), **example)
