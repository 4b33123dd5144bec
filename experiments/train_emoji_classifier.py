"""Train the small classifier whose features evaluate.py compares drawings in.

    python experiments/train_emoji_classifier.py --out runs/classifier.safetensors

It answers five questions about one of the built-in emoji: its skin tone, its figure, its colour,
its category, and who drew it. A question that a drawing leaves open, such as the skin tone of a
house, does not count in the loss. Concepts that are held out from the generators are held out here
too, and the accuracies that it prints are theirs. No held-out concept comes in several colours, so
that for colours nothing is known but the training drawings.

What a latent diffusion model draws is softer than an emoji and a little noisy. So the pictures are
moved, blurred and given noise in training, and the accuracy is printed for the autoencoder's copies
of held-out drawings as well.
"""
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import common
import emoji
from hub import command, pick_device, replacing
from measures import Classifier, Emoji
from vae import VAE

NOBODY = -1  # the label of a question that a drawing leaves open


def describe(row, tone, style):
    """What is asked about a drawing, and the answer, where there is one."""
    answers = dict(gender=row.person, colour=row.colour, category=row.category.lower(),
                   style=style)
    if len(row.cells) > 1 and "+" not in (tone or ""):
        # The drawing without a tone is yellow; edits call it so. Couples in two tones stay out.
        answers["tone"] = tone or "yellow"
    return answers


def drawings(split):
    """Every drawing of a split -> pictures (N, 3, 64, 64) in uint8, and N dicts of answers."""
    pictures = []
    answers = []
    for row in emoji.rows_of(split):
        for tone, cell in row.cells.items():
            for style in emoji.STYLES:
                pictures.append(emoji.to_tensor(emoji.drawing(style, cell)))
                answers.append(describe(row, tone, style))
    pictures = (torch.stack(pictures) + 1) * 127.5
    return pictures.round().byte(), answers


def numbered(answers, heads):
    """Turn N dicts of answers into labels (N,) for each question."""
    return {question: torch.tensor([known.index(answer[question])
                                    if answer.get(question) in known else NOBODY
                                    for answer in answers])
            for question, known in heads.items()}


def augment(x, generator):
    """Move, mirror, blur and disturb pictures (B, 3, 64, 64) in [-1, 1], each in its own way."""
    def uniform(low, high):
        return low + (high - low) * torch.rand(len(x), generator=generator)

    # An affine map from the places of the new picture to those of the old one.
    angle = uniform(-0.15, 0.15)
    scale = uniform(0.9, 1.2)
    mirror = uniform(-1, 1).sign()
    rows = [torch.stack([scale * mirror * angle.cos(), -scale * angle.sin(), uniform(-0.1, 0.1)]),
            torch.stack([scale * mirror * angle.sin(), scale * angle.cos(), uniform(-0.1, 0.1)])]
    grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), x.shape, align_corners=False)
    # White is 0 here, so that what comes in from outside is white.
    x = F.grid_sample(x - 1, grid, align_corners=False) + 1
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    share = uniform(-1, 1).clamp(min=0)[:, None, None, None]
    x = torch.lerp(x, soft, share)
    # The strength of colours changes less than two neighbouring skin tones differ.
    x = x * uniform(0.93, 1.0)[:, None, None, None]
    noise = torch.randn(x.shape, generator=generator)
    return x + uniform(0, 0.1)[:, None, None, None] * noise


def train(classifier, pictures, labels, args, device):
    """Train the classifier in place."""
    generator = torch.Generator().manual_seed(args.seed)

    def loss_of_step(step):
        chosen = torch.randint(len(pictures), (args.batch_size,), generator=generator)
        x = augment(pictures[chosen] / 127.5 - 1, generator)
        _, logits = classifier(x.to(device))
        loss = 0
        for question, answer in logits.items():
            label = labels[question][chosen].to(device)
            # A batch may hold no drawing at all with a colour; its mean would be NaN.
            total = F.cross_entropy(answer, label, ignore_index=NOBODY, reduction="sum")
            loss = loss + total / (label != NOBODY).sum().clamp(min=1)
        return loss

    common.fit(classifier.parameters(), loss_of_step, args, weight_decay=0.05)


@torch.no_grad()
def accuracy(classifier, pictures, labels, device):
    """Share of right answers for each question, over the drawings that answer it."""
    parts = [classifier((part / 127.5 - 1).to(device))[1] for part in pictures.split(256)]
    shares = {}
    for question, label in labels.items():
        answer = torch.cat([part[question] for part in parts]).argmax(dim=1).cpu()
        known = label != NOBODY
        if known.any():
            shares[question] = (answer == label)[known].float().mean().item()
    return shares


@torch.no_grad()
def copies(pictures, device):
    """What the miniature's autoencoder makes of pictures, in uint8."""
    vae = VAE.from_pretrained(emoji.ASSETS / "tiny").to(device)
    parts = []
    for part in pictures.split(16):
        copy = vae.decode(vae.encode((part / 127.5 - 1).to(device))[0])
        parts.append(((copy.clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
    return torch.cat(parts)


def save(classifier, path, notes):
    """Write the weights in half precision, and the notes into the header of the file."""
    state = {key: value.detach().half().cpu() for key, value in classifier.state_dict().items()}
    with replacing(path) as beside:
        save_file(state, beside, metadata={key: json.dumps(note) for key, note in notes.items()})


def main():
    args = common.training_parser(__doc__.splitlines()[0], out="runs/classifier.safetensors",
                                  steps=2000, batch_size=128, lr=3e-3).parse_args()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    pictures, answers = drawings("train")
    questions = ("tone", "gender", "colour", "category", "style")
    heads = {question: sorted({answer[question] for answer in answers if answer.get(question)})
             for question in questions}
    classifier = Classifier(heads).to(device)
    train(classifier, pictures, numbered(answers, heads), args, device)
    notes = dict(answers=heads)
    save(classifier, args.out, notes)

    # What is measured is the file, in its half precision.
    classifier = Emoji(device, args.out).network
    heldout, heldout_answers = drawings("heldout")
    every_third = slice(None, None, 3)
    rows = {"training drawings": (pictures[::5], answers[::5]),
            "held-out drawings": (heldout, heldout_answers),
            "held-out, the autoencoder's copies": (copies(heldout[every_third], device),
                                                   heldout_answers[every_third])}
    for name, (pictures, answers) in rows.items():
        shares = accuracy(classifier, pictures, numbered(answers, heads), device)
        words = ", ".join(f"{question} {share:.1%}" for question, share in shares.items())
        print(f"{name} ({len(pictures)}): {words}")
        if name == "held-out drawings":
            # evaluate.py prints it beside whatever the classifier says.
            notes["accuracy"] = {question: round(share, 3) for question, share in shares.items()}
    save(classifier, args.out, notes)
    print(f"{Path(args.out).stat().st_size / 1000:.0f} kB -> {args.out}")


if __name__ == "__main__":
    command(main)
