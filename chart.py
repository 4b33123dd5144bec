"""Draw the demonstrations' charts and diagrams.

A chart has curves, or the picture of a table, between two axes; a diagram has boxes and arrows.
Pillow is enough for them. Both are drawn at twice their size and then halved, so that slanted lines
are smooth. This file imports nothing of the project; every other file may import it.
"""
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00")
FONT = ImageFont.load_default(30)
LINE = 36       # height of a line of text before a chart is halved


class Axis(NamedTuple):
    label: str
    ends: tuple     # values at the left and right end, or at the bottom and the top
    ticks: dict     # text -> value

    def place(self, values):
        """Turn values into shares of the axis: 0 at its first end and 1 at its last."""
        first, last = self.ends
        return (np.asarray(values) - first) / (last - first)


def numbers(label, *ticks, log=False):
    """Make an axis of numbers from its first tick to its last; with log, in their logarithms."""
    values = np.log10(ticks) if log else ticks
    texts = [f"{tick:g}" for tick in ticks]
    return Axis(label, (values[0], values[-1]), dict(zip(texts, values)))


def text_width(*texts):
    """Return the width of the longest text, in an even number of pixels, which can be halved."""
    return max((2 * int(FONT.getlength(text) / 2 + 1) for text in texts), default=0)


def plot(title, x, y, curves=(), background=None, size=(600, 200)):
    """Draw a chart -> a Pillow picture.

    x, y: Axis. curves: (name, xs, ys) each. Those of one name share a colour and a line of the
    legend; points outside of the axes are left out. background: a picture that fills the frame.
    size: width and height of what is inside the frame.
    """
    width, height = 2 * size[0], 2 * size[1]
    colours = dict(zip(dict.fromkeys(name for name, _, _ in curves), COLOURS))
    left = max(140, 32 + text_width(y.label, *y.ticks))
    top = LINE + 28
    chart = Image.new("RGB", (left + width + 2 * LINE + text_width(*colours),
                              top + height + 3 * LINE), "white")
    draw = ImageDraw.Draw(chart)
    draw_axes(draw, title, x, y, (left, top, left + width, top + height))
    if background is not None:
        chart.paste(background.resize((width, height), Image.NEAREST), (left, top))
    for name, xs, ys in curves:
        u = x.place(xs)
        v = y.place(ys)
        points = np.stack([left + u * width, top + (1 - v) * height], axis=1)
        inside = (0 <= u) & (u <= 1) & (0 <= v) & (v <= 1)
        draw.line(points[inside].ravel().tolist(), colours[name], 4, "curve")
    draw.rectangle([left - 2, top - 2, left + width + 1, top + height + 1], None, "#808080", 2)
    for i, (name, colour) in enumerate(colours.items()):
        draw.text((left + width + 16, top + i * LINE), name, colour, FONT, "la")
    return chart.reduce(2)


def draw_axes(draw, title, x, y, frame):
    """Write title, labels and ticks around a frame, and draw the grid inside of it."""
    left, top, right, bottom = frame

    def write(text, column, row, anchor):
        draw.text((column, row), text, "black", FONT, anchor)

    write(title, (left + right) / 2, top - 24, "ms")
    write(x.label, (left + right) / 2, bottom + 8 + LINE, "ma")
    write(y.label, left - 16, top - 24, "rs")
    for text, value in x.ticks.items():
        column = left + x.place(value) * (right - left)
        draw.line([column, top, column, bottom], "#dddddd", 2)
        write(text, column, bottom + 4, "ma")
    for text, value in y.ticks.items():
        row = bottom - y.place(value) * (bottom - top)
        draw.line([left, row, right, row], "#dddddd", 2)
        write(text, left - 16, row, "rm")


def cells(label, names):
    """Make an axis of cells that stand side by side, with a name for each."""
    return Axis(label, (0, len(names)), {str(name): i + 0.5 for i, name in enumerate(names)})


def table(title, x, y, values, limits=None, *, digits=2, size=(44, 26)):
    """Draw a table as coloured cells with numbers in them -> a Pillow picture.

    x, y: Axis, which count cells from the left and from the top. values: (rows, columns); where it
    is NaN, a cell stays empty. limits: the values that are white and blue, by default the lowest
    and the highest. size: of a cell.
    """
    rows, columns = values.shape
    limits = limits or (np.nanmin(values), np.nanmax(values))
    cell = 2 * np.array(size)
    background = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(background)
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        share = np.interp(value, limits, (0, 1))
        corner = cell * (column, row)
        colour = (255 - share * np.array([255, 141, 77])).astype(int)
        draw.rectangle([*corner, *(corner + cell)], tuple(colour))
        text = f"{round(value, digits) + 0.0:.{digits}f}"       # + 0.0 makes 0 of -0
        draw.text(corner + cell / 2, text, "white" if share > 0.6 else "black", FONT, "mm")
    return plot(title, x, y._replace(ends=y.ends[::-1]), background=background,
                size=(columns * size[0], rows * size[1]))


def arrange(pictures, columns=1):
    """Put pictures into the cells of a sheet, row by row."""
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


class Box(NamedTuple):
    column: float
    row: float
    text: str
    shape: tuple = ()   # of the tensor that leaves the box, without the batch
    mask: str = ""      # what DTR masks of the tensor that enters it


def diagram(boxes, arrows, notes):
    """Draw boxes in columns and rows, arrows (from, to) by the boxes' numbers, and lines of notes.

    A box's shape stands at its right end, and its mask at the left one.
    """
    half = np.array([400, 26])      # half the width and the height of a box
    centres = [half + 12 + (920, 84) * np.array([box.column, box.row]) for box in boxes]
    right, bottom = (np.max(centres, axis=0) + half + 12).astype(int).tolist()
    sheet = Image.new("RGB", (right, bottom + 12 + LINE * len(notes)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, note in enumerate(notes):
        draw.text((12, bottom + LINE * i), note, "black", FONT, "la")
    for box, centre in zip(boxes, centres):
        left, top, right, bottom = *(centre - half), *(centre + half)
        draw.rectangle([left, top, right, bottom], None, "#808080", 2)
        if box.mask:
            end = left + 24 + text_width(box.mask)
            draw.rectangle([left, top, end, bottom], COLOURS[-1], "#808080", 2)
            draw.text((left + 12, centre[1]), box.mask, "black", FONT, "lm")
            left = end
        draw.text((left + 12, centre[1]), box.text, "black", FONT, "lm")
        shape = " x ".join(map(str, box.shape))
        draw.text((right - 12, centre[1]), shape, COLOURS[0], FONT, "rm")
    for i, j in arrows:
        stacked = boxes[i].column == boxes[j].column
        side = np.sign(centres[j] - centres[i]) * half * (not stacked, stacked)
        start, end = centres[i] + side, centres[j] - side
        draw.line([*start, *end], "#808080", 3)
        # A triangle in the middle points along the arrow; without rotation it points upwards.
        angle = np.degrees(np.arctan2(*(start - end)))
        draw.regular_polygon((*((start + end) / 2), 12), 3, angle, "#808080")
    return sheet.reduce(2)


def output_shapes(network, *inputs, **options):
    """Run a network -> {module: shape of the tensor that it returns, without the batch}."""
    shapes = {}

    def record(module, inputs, output):
        if hasattr(output, "shape"):
            shapes[module] = tuple(output.shape[1:])

    for module in network.modules():
        module.register_forward_hook(record)
    network(*inputs, **options)
    return shapes
