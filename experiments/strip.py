"""Draw README's first picture: what the shipped miniature makes of held-out pictures.

    python experiments/strip.py --out assets/results/tasks.png

The examples are the first three of each task's held-out set, by index, and not chosen.
Text-to-image shows captions that were seen in training, since the miniature knows only those.
"""
import textwrap

from PIL import Image, ImageDraw

import common  # noqa: F401  puts the project's folder on the path
import data
import emoji
from hub import Parser, command, replacing
from sample import generate, load_model

SIDE = 96         # pixels of one picture
GAP = 14
WORDS = 44        # height of the words below a pair
INK = "#222222"
TITLES = {"edit": "edit: held-out pictures", "inpaint": "remove: held-out pictures",
          "sr": "super-resolution: held-out pictures"}


def pairs_of(model, task, count):
    """The first held-out examples of a task -> (source, drawing, instruction)."""
    dataset = data.builtin(task, "heldout")
    examples = [dataset[i] for i in range(count)]
    sources = [data.to_pil(example["source"]) for example in examples]
    prompts = [example["prompt"] for example in examples]
    drawings = generate(model, task, prompts, sources, seed=0)
    return list(zip(sources, drawings, prompts))


def captions_of(model, count):
    """Captions spread over the training set -> (drawing, caption)."""
    dataset = emoji.Builtin("plain", "train")
    chosen = [dataset[(2 * i + 1) * len(dataset) // (2 * count)]["prompt"] for i in range(count)]
    return list(zip(generate(model, "t2i", chosen, seed=0), chosen))


def enlarged(picture):
    return picture.resize((SIDE, SIDE), Image.NEAREST)


def write(draw, corner, text, width, size=12):
    lines = textwrap.wrap(text, max(8, width * 2 // size))
    draw.multiline_text(corner, "\n".join(lines[:3]), fill=INK, font_size=size)


def main():
    parser = Parser("Draw README's first picture with the shipped miniature.")
    parser.add_argument("--model", default=str(data.ASSETS / "tiny-mtu"), help="model folder")
    parser.add_argument("--out", default="samples/tasks.png", help="where the picture goes")
    args = parser.parse_args()
    model = load_model(args.model)

    pair = 2 * SIDE + GAP
    width = 3 * (pair + 2 * GAP) + GAP
    block = 22 + SIDE + WORDS
    sheet = Image.new("RGB", (width, 4 * block + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for task, title in TITLES.items():
        draw.text((GAP, top), f"{title}: source, and what the model draws", fill=INK, font_size=14)
        for column, (source, drawing, prompt) in enumerate(pairs_of(model, task, 3)):
            left = GAP + column * (pair + 2 * GAP)
            sheet.paste(enlarged(source), (left, top + 22))
            draw.text((left + SIDE + 1, top + 22 + SIDE // 2 - 8), ">", fill=INK, font_size=16)
            sheet.paste(enlarged(drawing), (left + SIDE + GAP, top + 22))
            words = prompt or "(no instruction)"
            write(draw, (left, top + 24 + SIDE), words, width=pair)
        top += block
    draw.text((GAP, top), "text-to-image: captions seen in training", fill=INK, font_size=14)
    step = (width - GAP) // 4
    for column, (drawing, caption) in enumerate(captions_of(model, 4)):
        left = GAP + column * step
        sheet.paste(enlarged(drawing), (left, top + 22))
        write(draw, (left, top + 24 + SIDE), caption, width=step - GAP)
    with replacing(args.out) as beside:
        sheet.save(beside, format="PNG")
    print(args.out)


if __name__ == "__main__":
    command(main)
