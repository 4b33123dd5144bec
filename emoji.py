"""The built-in data: 1,911 emoji, each drawn in two styles, and the examples of every task.

    load()                 the table of emoji, without pictures
    sheet_picture          one drawing
    Builtin(task, split)   the data set of a task: an example is a dict

Emoji suit many tasks at once. A figure comes in several skin tones and genders and a heart in
several colours, which gives genuine pairs for editing. Two companies drew every emoji, which gives
pairs for translation, and each has a name. Whole concepts are held out, never single drawings. The
table was written by experiments/emoji_words.py; assets/README.md has sources and licences.

A picture is a tensor (3, H, W) in [-1, 1] or a Pillow picture, 64 x 64 unless a size is given.
"""
import functools
import io
import itertools
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

ASSETS = Path(__file__).parent / "assets"
STYLES = ("google", "twitter")

# How people ask for a change from {a} to {b}.
INSTRUCTIONS = {
    "tone": ("make the skin tone {b}", "change the skin to {b}", "give it {b} skin",
             "turn the skin from {a} to {b}", "use a {b} skin tone"),
    "gender": ("make it a {b}", "turn the {a} into a {b}", "show a {b} instead",
               "change the {a} to a {b}", "replace the {a} with a {b}"),
    "colour": ("make it {b}", "change the colour to {b}", "turn it {b}", "paint it {b}",
               "change it from {a} to {b}"),
}


# -------------------------------------------------------------------------------------------------
# Pictures

def on_white(picture):
    """Put a Pillow RGBA picture on white -> RGB."""
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def to_tensor(picture):
    """Turn a Pillow RGB picture into a tensor (3, H, W) in [-1, 1]."""
    # In place: memory for two more copies would cost more than the arithmetic.
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return pixels.float().div_(127.5).sub_(1)


def to_pil(image):
    """Turn a tensor (3, H, W) in [-1, 1] into a Pillow RGB picture."""
    array = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def degrade(picture, rng, max_sigma=3.0):
    """Spoil a Pillow RGB picture for super-resolution -> one of the same size, half as sharp.

    MTU (section 6.1) names Gaussian blur, Poisson noise and a factor of 2, but no strengths. Ours
    are those of Real-ESRGAN's first stage (arXiv 2107.10833): sigma from 0.2 to 3 pixels, and
    0.05 to 3 times the shot noise of 255 grey levels.
    """
    width, height = picture.size
    blurred = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, max_sigma)))
    small = blurred.resize((width // 2, height // 2), Image.BICUBIC)
    x = np.asarray(small, dtype=np.float32) / 255
    # A count of x * 255 photons varies by its square root: bright places are noisier.
    noise = rng.poisson(x * 255) / 255 - x
    x = np.clip(x + rng.uniform(0.05, 3.0) * noise, 0, 1)
    noisy = Image.fromarray((x * 255).round().astype(np.uint8))
    return noisy.resize(picture.size, Image.BICUBIC)


class Stage(NamedTuple):
    """One of the two rounds in which Real-ESRGAN (arXiv 2107.10833) spoils a picture."""
    blur: float       # probability of a blur
    sigma: tuple      # its range of standard deviations, in pixels
    resize: tuple     # probabilities to enlarge and to reduce; otherwise the size stays
    scales: tuple     # the range of factors
    gaussian: tuple   # the range of standard deviations of Gaussian noise, in grey levels
    poisson: tuple    # the range of factors on shot noise


# train_realesrgan_x2plus.yml of the authors' code.
STAGES = (Stage(1.0, (0.2, 3.0), (0.2, 0.7), (0.15, 1.5), (1, 30), (0.05, 3.0)),
          Stage(0.8, (0.2, 1.5), (0.3, 0.4), (0.3, 1.2), (1, 25), (0.05, 2.5)))
KERNELS = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
MODES = ("area", "bilinear", "bicubic")


def kernel_grid(rng):
    """Coordinates of a kernel of a random odd side from 7 to 21 -> x, y, (side, side) each."""
    radius = int(rng.integers(3, 11))
    ax = np.arange(-radius, radius + 1.0)
    return np.meshgrid(ax, ax)


def blur_kernel(rng, sigma):
    """Draw one of Real-ESRGAN's six shapes of blur; a tenth of kernels are a sinc."""
    if rng.random() < 0.1:
        return sinc_kernel(rng)
    x, y = kernel_grid(rng)
    # Plain, generalised and plateau-shaped Gaussians, each isotropic and anisotropic.
    shape, anisotropic = divmod(rng.choice(6, p=KERNELS), 2)
    sx, sy = rng.uniform(*sigma, 2) if anisotropic else np.full(2, rng.uniform(*sigma))
    angle = rng.uniform(-np.pi, np.pi)
    u = (x * np.cos(angle) + y * np.sin(angle)) / sx
    v = (y * np.cos(angle) - x * np.sin(angle)) / sy
    r2 = u ** 2 + v ** 2
    # Half of the exponents are below 1, whichever range they are from.
    low, high = ((1, 1), (0.5, 4), (1, 2))[shape]
    beta = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    kernel = 1 / (1 + r2 ** beta) if shape == 2 else np.exp(-0.5 * r2 ** beta)
    return kernel / kernel.sum()


def sinc_kernel(rng, final=False):
    """Draw an ideal low-pass filter, whose ringing is that of sharpened and compressed pictures."""
    x, y = kernel_grid(rng)
    lowest = np.pi / 3 if final or len(x) < 13 else np.pi / 5
    cutoff = rng.uniform(lowest, np.pi)
    # A tiny distance stands for zero in the centre: J_1(c r) / r tends to c / 2.
    r = torch.from_numpy(np.hypot(x, y).clip(1e-6))
    kernel = (cutoff / (2 * np.pi) * torch.special.bessel_j1(cutoff * r) / r).numpy()
    return kernel / kernel.sum()


def convolve(x, kernel):
    """Filter a picture (3, H, W) with a kernel (k, k), mirrored at its borders."""
    radius = len(kernel) // 2
    mode = "reflect" if radius < min(x.shape[1:]) else "replicate"
    x = F.pad(x[None], [radius] * 4, mode=mode)
    weight = torch.from_numpy(kernel).float().expand(3, 1, *kernel.shape)
    return F.conv2d(x, weight, groups=3)[0]


def resize(x, size, rng):
    """Resize a picture (3, H, W) in one of three ways."""
    size = [max(1, int(length)) for length in size]
    return F.interpolate(x[None], size=size, mode=MODES[rng.integers(3)])[0]


def add_noise(x, rng, stage):
    """Add Gaussian or shot noise to a picture (3, H, W) in [0, 1]; 40 % of it is grey."""
    gaussian = rng.random() < 0.5
    grey = rng.random() < 0.4
    if gaussian:
        noise = rng.standard_normal(x[:1].shape if grey else x.shape)
        noise = noise * rng.uniform(*stage.gaussian) / 255
    else:
        levels = x.clamp(0, 1).mul(255).round().numpy() / 255
        if grey:
            levels = np.tensordot([[0.299, 0.587, 0.114]], levels, 1)
        # As many photons as the picture has levels, to the next power of two.
        photons = 2 ** np.ceil(np.log2(len(np.unique(levels))))
        noise = (rng.poisson(levels * photons) / photons - levels) * rng.uniform(*stage.poisson)
    return (x + torch.from_numpy(noise).float()).clamp(0, 1)


def compress(x, rng):
    """Save a picture (3, H, W) in [0, 1] as a JPEG of a quality from 30 to 95 and read it."""
    file = io.BytesIO()
    to_pil(2 * x.clamp(0, 1) - 1).save(file, format="JPEG", quality=int(rng.uniform(30, 95)))
    return to_tensor(Image.open(file)) / 2 + 0.5


def degrade_twice(picture, rng):
    """Spoil a Pillow RGB picture by Real-ESRGAN's two stages, for a factor of 2 -> the same size.

    Theirs sharpen the picture first, since their network's targets are sharp too. Ours are not.
    """
    x = to_tensor(picture) / 2 + 0.5
    small = [length // 2 for length in x.shape[1:]]
    for number, stage in enumerate(STAGES):
        if rng.random() < stage.blur:
            x = convolve(x, blur_kernel(rng, stage.sigma))
        up, down = stage.resize
        r = rng.random()
        low, high = stage.scales
        scale = rng.uniform(1, high) if r < up else rng.uniform(low, 1) if r < up + down else 1
        # The second stage starts from the size it ends with.
        size = small if number else x.shape[1:]
        x = add_noise(resize(x, [length * scale for length in size], rng), rng, stage)
        if number == 0:
            x = compress(x, rng)
    # The last two steps come in either order: a filter with the final size, and compression.
    kernel = sinc_kernel(rng, final=True) if rng.random() < 0.8 else np.ones((1, 1))
    filter_first = rng.random() < 0.5
    if not filter_first:
        x = compress(x, rng)
    x = convolve(resize(x, small, rng), kernel)
    if filter_first:
        x = compress(x, rng)
    return to_pil(2 * x - 1).resize(picture.size, Image.BICUBIC)


# What train.py --degradation offers.
DEGRADATIONS = {"simple": degrade, "real-esrgan": degrade_twice}


def patched(picture, rng, patches=None):
    """Set square patches in a copy of a picture (3, H, W) to zero, as MT-Diffusion masks.

    patches: how many; they may overlap. The default of 5 to 20 follows the paper's Mask-5 to
    Mask-20, which we read as counts. The side of a patch is not printed there; we take H/8.
    """
    if patches is None:
        patches = rng.integers(5, 21)
    side = picture.shape[1] // 8
    picture = picture.clone()
    for _ in range(patches):
        top, left = (int(rng.integers(length - side + 1)) for length in picture.shape[1:])
        # No grey level becomes exactly 0, because 255 is odd: the zeros are the mask.
        picture[:, top:top + side, left:left + side] = 0
    return picture


# -------------------------------------------------------------------------------------------------
# The table and the drawings

class Emoji(NamedTuple):
    """An emoji: the words for it, and where the sheets show it."""
    name: str
    concept: str        # the same for all genders and colours of a thing
    person: str | None  # "man", "woman", "person", ..., where one figure is shown
    colour: str | None  # where the thing comes in several colours
    noun: str | None    # the everyday word for its kind, such as "bird"
    category: str       # one of Unicode's ten
    cells: dict         # skin tone -> [column, row]; None is the plain drawing


@functools.cache
def load():
    """Read the table of all emoji, once."""
    rows = json.loads((ASSETS / "emoji/emoji.json").read_bytes())
    # JSON cannot have null as a key, so the file holds pairs of a skin tone and a cell.
    return [Emoji(**row)._replace(cells=dict(row["cells"])) for row in rows]


@functools.cache
def sheet(style):
    """Open the sheet of all drawings in a style, once -> RGBA."""
    return Image.open(ASSETS / f"emoji/{style}.png").convert("RGBA")


def sheet_picture(style, cell):
    """Cut a drawing out of its sheet -> Pillow RGBA, 64 x 64."""
    # Each cell has a transparent border of one pixel.
    x, y = (66 * number + 1 for number in cell)
    return sheet(style).crop((x, y, x + 64, y + 64))


def drawing(style, cell):
    return on_white(sheet_picture(style, cell))


def caption(emoji, tone, style):
    """Name a drawing, for example "waving hand sign, dark skin tone, google style"."""
    words = ""
    if tone is not None:
        # Two people have two tones, "light+dark"; where both are equal, the caption has one.
        words = f", {' and '.join(dict.fromkeys(tone.split('+')))} skin tone"
    return f"{emoji.name}{words}, {style} style"


def classes():
    """List the categories; the task "label" numbers them in this order."""
    return sorted({emoji.category.lower() for emoji in load()})


# -------------------------------------------------------------------------------------------------
# What is held out, and which drawings make a pair

def is_held_out(name):
    """Say whether the concept, or the file, of this name is held out: one in ten is.

    The answer depends on the name alone, so it stays the same when data are added. Single drawings
    would make no test: a model that has seen a thing in one style knows it in the other.
    """
    return zlib.crc32(name.encode()) % 10 == 0


def rows_of(split):
    """List the emoji of a split, "train" or "heldout"."""
    return [emoji for emoji in load() if is_held_out(emoji.concept) == (split == "heldout")]


class Change(NamedTuple):
    """Two drawings of one thing in one style, and how they differ."""
    kind: str     # tone, gender or colour
    a: str        # the word for what the source shows
    b: str        # and for what the target shows
    name: str     # of the source
    source: list  # a cell
    target: list  # a cell
    style: str


def families(rows):
    """Yield (kind, members): drawings of a thing that differ in that respect alone.

    A member is (word, name, cells). The cells of two members under the same key make a pair.
    """
    # One emoji in its skin tones is a family. Drawings of couples in two tones stay out.
    concepts = {}
    for emoji in rows:
        concepts.setdefault(emoji.concept, []).append(emoji)
        yield "tone", [(tone or "yellow", emoji.name, {"": cell})
                       for tone, cell in emoji.cells.items() if "+" not in (tone or "")]
    # The emoji of a concept are another; two of them pair up in the skin tones they share.
    for group in concepts.values():
        for kind, field in (("gender", "person"), ("colour", "colour")):
            yield kind, [(getattr(e, field), e.name, e.cells) for e in group if getattr(e, field)]


@functools.cache
def changes(split):
    """List every change from one drawing of a split to another, for edit and for captions."""
    found = []
    for kind, members in families(rows_of(split)):
        if len({word for word, _, _ in members}) < len(members):
            # Two books are red, because one of them is open: "make it red" has two answers.
            continue
        # Every ordered pair: a way there is also a way back.
        for (a, name, before), (b, _, after) in itertools.permutations(members, 2):
            shared = [key for key in before if key in after]
            for key, style in itertools.product(shared, STYLES):
                source = before[key]
                target = after[key]
                # A few variants are drawn alike; an edit that changes nothing teaches nothing.
                if sheet_picture(style, source) != sheet_picture(style, target):
                    found.append(Change(kind, a, b, name=name, source=source, target=target,
                                        style=style))
    return found


# -------------------------------------------------------------------------------------------------
# Scenes of two things

class Place(NamedTuple):
    """A square on a canvas of 64 x 64 pixels."""
    words: str     # such as "on the left"
    size: int      # its side
    corner: tuple  # (x, y), upper left


def draw_places(rng):
    """Choose two places at opposite ends of the canvas. They never overlap."""
    # A square of at most 32 pixels fits into each half of the canvas.
    sideways = rng.random() < 0.5
    ends = ("on the left", "on the right") if sideways else ("at the top", "at the bottom")
    places = []
    for words in ends:
        size = int(rng.integers(28, 33))
        along = int(rng.integers(0, 33 - size))
        across = int(rng.integers(0, 65 - size))
        if places:
            # The second place is measured from the far end.
            along = 64 - size - along
        places.append(Place(words, size, (along, across) if sideways else (across, along)))
    return places


def canvas(style, things):
    """Paint a list of (emoji, place) on white -> (3, 64, 64)."""
    picture = Image.new("RGBA", (64, 64), "white")
    for emoji, place in things:
        large = sheet_picture(style, emoji.cells[None])
        small = large.resize((place.size, place.size), Image.LANCZOS)
        picture.alpha_composite(small, place.corner)
    return to_tensor(picture.convert("RGB"))


# -------------------------------------------------------------------------------------------------
# Random choices

def draw_tone(emoji, rng):
    """Choose one of an emoji's skin tones, but half of the time None, the plain drawing."""
    # Otherwise a few figures with many tones would crowd out everything else.
    tones = list(emoji.cells)
    return tones[rng.integers(len(tones))] if rng.random() < 0.5 else None


def draw_instruction(change, rng):
    return str(rng.choice(INSTRUCTIONS[change.kind])).format(a=change.a, b=change.b)


def draw_removal(emoji, place, rng):
    """Choose an instruction to remove a thing -> its words, and how they name the thing."""
    if rng.random() < 0.5:
        return f"remove the {emoji.name} {place.words}", "placed"
    # The names of held-out things are new to a model, but not the noun for their kind.
    if emoji.noun and rng.random() < 0.5:
        return f"remove the {emoji.noun}", "classed"
    return f"remove the {emoji.name}", "named"


# -------------------------------------------------------------------------------------------------
# The data set

class ItemDataset(torch.utils.data.Dataset):
    """A data set of `items`, whose get(i, rng) makes an example of item i.

    [i] is always the same example: its random parts come from a generator seeded with (len, i).
    """

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.get(i, np.random.default_rng((len(self), i)))


class Builtin(ItemDataset):
    """Make the examples of one task: dicts with a prompt (str) and a target (3, H, W).

    Image-to-image tasks add a source (3, H, W); MT-Diffusion's tasks add x, the other modality: a
    picture, the number of a class, or a caption. Words, tones, places and noise are random.

    task: one of data.TASKS, or "plain". split: "train" or "heldout". size: of the pictures of
    uncond, class and MT-Diffusion's tasks.
    """

    def __init__(self, task, split, size=64):
        self.task = task
        self.split = split
        self.size = size
        self.rows = rows_of(split)
        self.items = list(itertools.product(self.rows, STYLES))
        if task == "translate":
            self.items = self.rows
        elif task in ("edit", "t2i"):
            self.changes = changes(split)
        if task == "edit":
            self.items = self.changes
        for style in STYLES:
            # Opened before a data loader forks, the sheets are shared by all its workers.
            sheet(style)

    def get(self, i, rng):
        """Make an example of item i by the method that has the task's name."""
        # "class" is a word of Python's.
        name = "by_class" if self.task == "class" else self.task
        return getattr(self, name)(self.items[i], rng)

    def pick(self, item, rng):
        """Choose a skin tone for an item -> the drawing's caption and its RGB picture."""
        emoji, style = item
        tone = draw_tone(emoji, rng)
        return caption(emoji, tone, style), drawing(style, emoji.cells[tone])

    def resized(self, picture):
        return to_tensor(picture.resize((self.size, self.size), Image.LANCZOS))

    def other(self, emoji, rng):
        """Choose a second emoji for a canvas."""
        # Another concept and another noun, so that "remove the bird" has one answer.
        other = emoji
        while other.concept == emoji.concept or (other.noun and other.noun == emoji.noun):
            other = self.rows[rng.integers(len(self.rows))]
        return other

    # MTU's four tasks

    def t2i(self, item, rng):
        """Pair a caption with its picture.

        Stable Diffusion has met the words of the other tasks on the web. A miniature meets them
        here: a fifth of the captions place two things, and a quarter describe an edit's result.
        """
        r = rng.random()  # one draw decides the form of the caption
        if r < 0.2:
            return self.scene(item, rng)
        if r < 0.45:
            return self.edited(rng)
        prompt, picture = self.pick(item, rng)
        return dict(prompt=prompt, target=to_tensor(picture))

    def scene(self, item, rng):
        """Pair two things with words for their places; at times one of them is removed."""
        emoji, style = item
        other = self.other(emoji, rng)
        things = list(zip((emoji, other), draw_places(rng)))
        prompt = " and ".join(f"{thing.name} {place.words}" for thing, place in things)
        if rng.random() < 0.3:
            gone, place = things.pop(rng.integers(2))
            removal, _ = draw_removal(gone, place, rng)
            prompt = f"{prompt}, {removal}"
        return dict(prompt=f"{prompt}, {style} style", target=canvas(style, things))

    def edited(self, rng):
        """Pair an edit's instruction with its result alone."""
        change = self.changes[rng.integers(len(self.changes))]
        prompt = draw_instruction(change, rng)
        if rng.random() < 0.7:
            prompt = f"{change.name}, {prompt}, {change.style} style"
        return dict(prompt=prompt, target=to_tensor(drawing(change.style, change.target)))

    def plain(self, item, rng):
        """Pair a caption with its picture, without skin tones: text-to-image is measured on it."""
        # With its tones a hand would count six times, and a pizza once.
        emoji, style = item
        return dict(prompt=caption(emoji, None, style),
                    target=to_tensor(drawing(style, emoji.cells[None])))

    def edit(self, change, rng):
        """Change a skin tone, a gender or a colour."""
        source = to_tensor(drawing(change.style, change.source))
        target = to_tensor(drawing(change.style, change.target))
        prompt = draw_instruction(change, rng)
        if self.split == "train" and rng.random() < 0.5:
            # Mirroring doubles the pairs, since no instruction speaks of left and right.
            source = source.flip(-1)
            target = target.flip(-1)
        return dict(prompt=prompt, source=source, target=target, kind=change.kind)

    def sr(self, item, rng):
        """Restore a degraded picture."""
        _, picture = self.pick(item, rng)
        # A blur of 3 pixels, as in photographs, would leave nothing to see of 64.
        source = degrade(picture, rng, max_sigma=1.5)
        return dict(prompt="", source=to_tensor(source), target=to_tensor(picture))

    def inpaint(self, item, rng):
        """Remove one of two things, the item's, from a canvas."""
        emoji, style = item
        places = draw_places(rng)
        other = self.other(emoji, rng)
        # The item's thing stands at either end; the other one stays.
        gone = rng.integers(2)
        things = [(emoji, places[gone]), (other, places[1 - gone])]
        prompt, kind = draw_removal(emoji, places[gone], rng)
        return dict(prompt=prompt, source=canvas(style, things), target=canvas(style, things[1:]),
                    kind=kind)

    # Pictures alone, and MT-Diffusion's four settings

    def uncond(self, item, rng):
        """Draw a picture without any words."""
        _, picture = self.pick(item, rng)
        return dict(prompt="", target=self.resized(picture))

    def translate(self, emoji, rng):
        """Join Google's drawing, x, and Twitter's, the target."""
        cell = emoji.cells[draw_tone(emoji, rng)]
        x, target = (self.resized(drawing(style, cell)) for style in STYLES)
        return dict(prompt="", target=target, x=x)

    def masked(self, item, rng):
        """Join a picture and its masked copy, x."""
        example = self.uncond(item, rng)
        return dict(example, x=patched(example["target"], rng))

    def by_class(self, item, rng):
        """Draw a picture of a category, whose name is the prompt."""
        return dict(self.uncond(item, rng), prompt=item[0].category.lower())

    def label(self, item, rng):
        """Join a picture and the number of its category, x."""
        return dict(self.uncond(item, rng), x=classes().index(item[0].category.lower()))

    def repr(self, item, rng):
        """Join a picture and its caption, x, which a text encoder turns into a vector."""
        words, picture = self.pick(item, rng)
        return dict(prompt="", target=self.resized(picture), x=words)
