"""Do two timesteps pull the weights in the same direction? (DTR section 3; DeMe Fig. 1)

    python experiments/gradients.py --count 1024

Both papers start from the observation that the gradients of the loss at distant timesteps
disagree, so that training one network on all of them is multi-task learning with conflicts. This
prints and draws the cosine between the gradients at evenly spread timesteps.

A gradient that is estimated from some examples has noise, so its cosine with itself, measured
again on other examples, is below 1. That cosine is the diagonal here, and the ceiling for the
rest: rows and columns come from disjoint halves of the examples, with other noise.
"""
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import data
from hub import Parser, UserError, command, pick_device, replacing, write_json
from sample import load_model


def encode_half(model, half, count, *, batch_size, device):
    """Encode every second example of the training set -> list of (x0, context, noise).

    half: 0 or 1. x0 and noise are (B, C, h, w), context is (B, S, D).
    """
    dataset = data.builtin("t2i", "train", model.native_size)
    examples = [dataset[(2 * k + half) * len(dataset) // (2 * count)] for k in range(count)]
    # All timesteps see the same noise: what differs between their gradients is t alone.
    generator = torch.Generator().manual_seed(half)
    encoder = data.Encoder(model.vae)
    side = model.unet.config["sample_size"]
    shape = (count, model.vae.config["latent_channels"], side, side)
    noise = torch.randn(shape, generator=generator)
    latent_noise = torch.randn(shape, generator=generator)
    batches = []
    for i in range(0, count, batch_size):
        part = slice(i, i + batch_size)
        pictures = [example["target"] for example in examples[part]]
        x0 = encoder.latents(pictures, device, latent_noise[part])
        context, _ = model.encode_text([example["prompt"] for example in examples[part]])
        batches.append((x0, context, noise[part].to(device)))
    return batches


def gradient(model, batches, t):
    """The gradient of the summed loss at timestep t, as one vector of length 1."""
    model.unet.zero_grad(set_to_none=True)
    for x0, context, noise in batches:
        steps = torch.full((len(x0),), t, device=x0.device)
        out = model.unet(model.diffusion.add_noise(x0, noise, steps), steps, context)
        model.diffusion.error(out, x0, noise, steps).sum().backward()
    gradients = [p.grad.flatten() for p in model.unet.parameters() if p.grad is not None]
    # Only the direction counts, not how long the gradient is at this t.
    vector = torch.cat(gradients)
    return vector / vector.norm()


def cosines(model, count, *, levels=20, batch_size=16, device="cpu"):
    """Cosines between the gradients of the t2i loss at `levels` timesteps -> (levels, levels).

    count: training examples in each half. Entry (i, j) is the mean of <g_i, g'_j> and <g_j, g'_i>,
    where g is measured on one half and g' on the other.
    """
    model.unet.requires_grad_(True)
    # The middle of each of `levels` equal ranges.
    timesteps = [int((level + 0.5) * model.diffusion.T / levels) for level in range(levels)]
    halves = []
    with tqdm(total=2 * levels, desc="gradients", leave=False) as bar:
        for half in range(2):
            batches = encode_half(model, half, count, batch_size=batch_size, device=device)
            vectors = []
            for t in timesteps:
                vectors.append(gradient(model, batches, t))
                bar.update()
            halves.append(torch.stack(vectors))
    products = halves[0] @ halves[1].T                               # (levels, levels)
    return ((products + products.T) / 2).cpu().numpy()


def draw(table, T, path):
    """Draw the cosines: blue where gradients agree, red where they disagree, white at 0."""
    plt = common.pyplot()
    figure, axes = plt.subplots(figsize=(5.0, 4.2), layout="constrained")
    limit = np.abs(table).max()
    image = axes.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit, extent=(0, T, T, 0))
    axes.set(xlabel="timestep", ylabel="timestep")
    figure.colorbar(image, label="cosine of the gradients")
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=80)


def main():
    parser = Parser("Measure the cosines between the gradients at different timesteps.")
    parser.add_argument("--model", default=str(data.ASSETS / "tiny"),
                        help="a 64 x 64 text-to-image model")
    parser.add_argument("--count", type=int, default=256, help="training examples in each half")
    parser.add_argument("--device", help="torch device; without it cuda, else mps, else cpu")
    parser.add_argument("--out", default="runs/gradients", help="folder for table and picture")
    args = parser.parse_args()
    device = pick_device(args.device)
    model = load_model(args.model, device=device)
    if model.tasks != ["t2i"] or model.native_size != 64:
        raise UserError(f"--model {args.model} is no 64 x 64 text-to-image model")
    table = cosines(model, args.count, device=device)
    levels = len(table)
    print("cosine of the gradients at two timesteps, mean over the pairs at that distance")
    for distance in (0, 1, 2, 5, 10, levels - 1):
        mean = np.diagonal(table, distance).mean()
        print(f"{distance * model.diffusion.T // levels:>6}{mean:>9.3f}")
    out = Path(args.out)
    rounded = table.astype(float).round(4).tolist()
    write_json(out / "gradients.json", dict(arguments=vars(args), cosines=rounded))
    draw(table, model.diffusion.T, out / "gradients.png")
    print(f"{out / 'gradients.json'}, {out / 'gradients.png'}")


if __name__ == "__main__":
    command(main)
