"""Train the miniature's autoencoder on the built-in pictures.

    python experiments/train_autoencoder.py --out runs/vae

The loss is the squared error plus a little KL(q(z | picture) || N(0, I)) (Rombach et al. 2022,
appendix G), without the paper's perceptual and adversarial terms, which emoji do not need. The
folder that is written takes its other parts from assets/tiny, so it is a model like any other.
"""
import numpy as np
import torch
import torch.nn.functional as F

import common
import data
from hub import command, is_slow_in_bf16, pick_device, replacing
from vae import CONFIGS, VAE

KL_WEIGHT = 1e-6


class Pictures:
    """What all tasks encode: plain pictures, scenes of two things, and degraded pictures."""

    def __init__(self, args):
        self.args = args
        sr = data.builtin("sr", "train")
        self.kinds = [(sr, "target"), (data.builtin("inpaint", "train"), "source"), (sr, "source")]

    def batch(self, step):
        """Draw the pictures of a step -> (B, 3, 64, 64); half of them are mirrored."""
        rng = np.random.default_rng((self.args.seed, step))
        pictures = []
        for kind in rng.choice(3, size=self.args.batch_size, p=(0.65, 0.2, 0.15)):
            dataset, key = self.kinds[kind]
            picture = dataset.get(int(rng.integers(len(dataset))), rng)[key]
            pictures.append(picture.flip(2) if rng.random() < 0.5 else picture)
        return torch.stack(pictures)


def train(vae, pictures, args, device):
    """Train all weights in place, in bf16 where that is fast."""
    def loss_of_step(step):
        images = pictures.batch(step).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=not is_slow_in_bf16(device)):
            mean, logvar = vae.encode(images)
            output = vae.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
        mean = mean.float()
        logvar = logvar.float()
        mse = F.mse_loss(output.float(), images)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        return mse + KL_WEIGHT * kl

    common.fit(vae.parameters(), loss_of_step, args, betas=(0.9, 0.99), weight_decay=0.0)


@torch.no_grad()
def fix_latents(vae, pictures, args, device):
    """Make q(z | picture) its mean, and latents of unit variance with the scaling factor.

    The posterior's noise has done its work: latents that are near decode alike. Without the noise
    they are easier to predict. Unit variance is Rombach et al. 2022, appendix G.
    """
    latent = vae.config["latent_channels"]
    vae.quant_conv.weight[latent:] = 0
    vae.quant_conv.bias[latent:] = -12
    count = max(1, 512 // args.batch_size)
    images = torch.cat([pictures.batch(args.steps + i) for i in range(count)])
    mean, _ = vae.encode(images.to(device))
    vae.config["scaling_factor"] = round(1 / mean.std().item(), 5)


@torch.no_grad()
def psnr(vae, count, device="cpu"):
    """Reconstruct `count` held-out pictures -> their mean PSNR in dB, 10 log10(1 / MSE)."""
    dataset = data.builtin("sr", "heldout")
    count = min(count, len(dataset))
    chosen = [dataset[i * len(dataset) // count]["target"] for i in range(count)]
    values = []
    for images in torch.stack(chosen).to(device).split(32):
        output = vae.decode(vae.encode(images)[0]).clamp(-1, 1)
        # Half the difference: PSNR's formula is for pixels in [0, 1].
        values.append(-10 * torch.log10(((output - images) / 2).square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()


def main():
    args = common.training_parser(__doc__.splitlines()[0], out="runs/vae", steps=2600,
                                  batch_size=16, lr=1.5e-3).parse_args()
    common.refuse_existing(args.out)
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    vae = VAE(CONFIGS["tiny"]).to(device)
    pictures = Pictures(args)
    with replacing(args.out) as folder:
        train(vae, pictures, args, device)
        fix_latents(vae, pictures, args, device)
        vae.save_pretrained(folder / "vae")
        common.borrow_from_tiny(folder, args.out)
    print(f"held-out PSNR {psnr(vae, 400, device):.2f} dB, scaling factor "
          f"{vae.config['scaling_factor']}; saved in {args.out}")


if __name__ == "__main__":
    command(main)
