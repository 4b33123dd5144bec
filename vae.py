"""The autoencoder of latent diffusion: images <-> latents (diffusers' AutoencoderKL, same names, same keys).

Rombach et al. 2022, arXiv 2112.10752, section 3.1. Stable Diffusion's has four levels, f = 8, 248 tensors.
Latents leave `encode` unscaled; data.latents is the one place that multiplies by config["scaling_factor"].

    python vae.py --out runs/vae          trains the miniature autoencoder (f = 4) on the built-in pictures

Letters: B batch, C channels, H W picture, h w latent = H/f W/f.
"""
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from folders import HelpFormatter, UserError, blaming, command, fetch, load_weights, pick_device, read_json, save_weights

DEFAULTS = dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(64,), layers_per_block=1, norm_num_groups=32,
                act_fn="silu", sample_size=32, scaling_factor=0.18215, force_upcast=True, mid_block_add_attention=True,
                down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
                use_quant_conv=True, use_post_quant_conv=True)
FIXED = dict(act_fn="silu", mid_block_add_attention=True, use_quant_conv=True, use_post_quant_conv=True)
IGNORED = {"latents_mean", "latents_std", "shift_factor"}  # None in every Stable Diffusion; refused otherwise


def _levels(channels):
    return dict(block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * len(channels),
                up_block_types=("UpDecoderBlock2D",) * len(channels))


CONFIGS = {
    "tiny": dict(_levels((32, 64, 128)), layers_per_block=1, norm_num_groups=16, sample_size=64),
    "sd15": dict(_levels((128, 256, 512, 512)), layers_per_block=2, sample_size=512, scaling_factor=0.18215),
    "sdxl": dict(_levels((128, 256, 512, 512)), layers_per_block=2, sample_size=1024, scaling_factor=0.13025, force_upcast=True),
}


class ResnetBlock2D(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention over all positions, with its own norm and skip. One head here; adm.py uses several."""

    def __init__(self, channels, groups, heads=1, eps=1e-6):
        super().__init__()
        self.heads = heads
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])

    def update(self, x, cond=None):
        B, C, h, w = x.shape
        y = self.group_norm(x).flatten(2).transpose(1, 2)                       # (B, hw, C)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))  # (B, heads, hw, C/heads)
        y = self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y.transpose(1, 2).reshape(B, C, h, w)

    def forward(self, x, cond=None):
        return x + self.update(x)


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)])
        self.resnets = nn.ModuleList([ResnetBlock2D(channels, channels, groups) for _ in range(2)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample2D(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as the checkpoints were trained


class Upsample2D(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, then a change of resolution (all levels but the last)."""

    def __init__(self, cin, cout, layers, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D(cin if i == 0 else cout, cout, groups) for i in range(layers)])
        if down:
            self.downsamplers = nn.ModuleList([Downsample2D(cout)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample2D(cout)])
        self.last = "downsamplers" if down else "upsamplers" if up else None

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.last is None else getattr(self, self.last)[0](x)


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, groups, n = c["block_out_channels"], c["norm_num_groups"], len(c["block_out_channels"])
        self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([
            Level(widths[max(i - 1, 0)], widths[i], c["layers_per_block"], groups, down=i < n - 1) for i in range(n)])
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c["latent_channels"], 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, groups, n = c["block_out_channels"][::-1], c["norm_num_groups"], len(c["block_out_channels"])
        self.conv_in = nn.Conv2d(c["latent_channels"], widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList([
            Level(widths[max(i - 1, 0)], widths[i], c["layers_per_block"] + 1, groups, up=i < n - 1) for i in range(n)])
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c["out_channels"], 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def blend(before, after, dim, extent):
    """`after`, its first `extent` rows (dim 2) or columns (dim 3) faded in, linearly from 0, over the last ones of `before`."""
    n = min(extent, before.shape[dim], after.shape[dim])
    ramp = torch.arange(n, device=after.device, dtype=after.dtype).view([n if d == dim else 1 for d in range(4)]) / n
    faded = torch.lerp(before.narrow(dim, before.shape[dim] - n, n), after.narrow(dim, 0, n), ramp)
    return torch.cat([faded, after.narrow(dim, n, after.shape[dim] - n)], dim)


def tiled(run, x, size, out_size):
    """run(x) tile by tile. x: (B, C, rows, columns); a square of `size`, from which `run` makes one of `out_size`, overlaps the next by a quarter.

    The tiles, their order and their blending are those of diffusers' AutoencoderKL after enable_tiling().
    """
    step, fade, above, strips = size - size // 4, out_size // 4, [], []
    for i in range(0, x.shape[2], step):
        row = []
        for j in range(0, x.shape[3], step):
            y = run(x[:, :, i:i + size, j:j + size])
            y = blend(above[len(row)], y, 2, fade) if i else y
            row.append(blend(row[-1], y, 3, fade) if j else y)
        strips.append(torch.cat([y[:, :, :out_size - fade, :out_size - fade] for y in row], 3))
        above = row
    return torch.cat(strips, 2)


class VAE(nn.Module):
    """AutoencoderKL. config: diffusers' keys, differences from its defaults; what is not implemented is refused by name.

    Weights may be of any floating dtype, inputs of another; what comes back has the input's, or autocast's. fp16 weights (or fp16 autocast)
    compute in fp32 unless config["force_upcast"] is false. `tile`, a multiple of 4 latents, bounds the memory of a large picture by that of
    a tile: overlapping tiles are blended, each normalised by itself, so that colours may differ a little. diffusers' enable_tiling() takes
    vae.config["sample_size"] // vae.factor, the size of the training pictures.
    """

    def __init__(self, config):
        super().__init__()
        for key, value in config.items():
            if key.startswith("_") or (key in IGNORED and value is None):
                continue
            if key not in DEFAULTS or value != FIXED.get(key, value):
                raise UserError(f"vae config: {key} = {value!r} is not implemented")
        self.config = {**DEFAULTS, **{k: v for k, v in config.items() if k in DEFAULTS}}
        for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if list(self.config[key] or ()) != [kind] * len(self.config["block_out_channels"]):
                raise UserError(f"vae config: {key} = {self.config[key]!r} is not implemented, only {kind} at each of block_out_channels")
        latent, scale = self.config["latent_channels"], self.config["scaling_factor"]
        if not 0 < scale < float("inf"):
            raise UserError(f"vae config: scaling_factor = {scale!r} is not above 0")
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    @property
    def factor(self):
        """Picture pixels per latent pixel, f."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def _run(self, net, x, tile, down, up):
        """net(x), whole or from tiles of tile * down rows and columns to tile * up, in a dtype that does not overflow."""
        if tile is not None and (tile < 4 or tile % 4):
            raise UserError(f"tile = {tile} is not a positive multiple of 4 latents (tiles overlap by a quarter)")
        if not x.is_floating_point():
            raise UserError(f"the autoencoder takes floating-point tensors, pictures in [-1, 1], not {x.dtype}")
        dtype, device = self.quant_conv.weight.dtype, x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if self.config["force_upcast"] and torch.float16 in (dtype, autocast and torch.get_autocast_dtype(device)):
            # SDXL's activations exceed 65504, the largest fp16: NaN, black pictures (huggingface/diffusers#7188, #9844 under autocast;
            # huggingface.co/madebyollin/sdxl-vae-fp16-fix). fp32: bf16 would not overflow either, but keeps 8 bits of every activation.
            dtype, weights = torch.float32, {name: p.float() for name, p in net.named_parameters()}

            def run(x):
                with torch.autocast(device, enabled=False):
                    return functional_call(net, weights, x)
        else:
            run = net
        whole = tile is None or max(x.shape[2:]) <= tile * down
        y = run(x.to(dtype)) if whole else tiled(run, x.to(dtype), tile * down, tile * up)
        return y if autocast else y.to(x.dtype)

    def encode(self, images, tile=None):
        """images (B, 3, H, W) in [-1, 1] -> mean, logvar (B, 4, H/f, W/f) of q(z | image), unscaled. UserError unless f divides H and W."""
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise UserError(f"pictures of {images.shape[3]} x {images.shape[2]} pixels: the autoencoder needs multiples of {self.factor}")
        mean, logvar = self._run(nn.Sequential(self.encoder, self.quant_conv), images, tile, self.factor, 1).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def mode(self, images, tile=None):
        """images (B, 3, H, W) -> the most likely latents (B, 4, H/f, W/f), unscaled."""
        return self.encode(images, tile)[0]

    def sample_latents(self, images, generator=None, tile=None):
        """images (B, 3, H, W) -> a draw from q(z | image), (B, 4, H/f, W/f), unscaled. The generator is one of the CPU's."""
        mean, logvar = self.encode(images, tile)
        return mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator).to(mean)

    def decode(self, latents, tile=None):
        """latents (B, 4, h, w), unscaled -> images (B, 3, f h, f w), about [-1, 1]."""
        return self._run(nn.Sequential(self.post_quant_conv, self.decoder), latents, tile, 1, self.factor)

    @classmethod
    def from_pretrained(cls, path_or_hub_id, subfolder="vae", dtype=torch.float32):
        folder = fetch(path_or_hub_id, subfolder)
        config = read_json(folder / "config.json")
        if (name := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
            raise UserError(f"{folder} holds a {name}, not an AutoencoderKL")
        with torch.device("meta"), blaming(folder / "config.json"):
            vae = cls(config)
        load_weights(vae, folder, older_attention_names, dtype)
        return vae

    def save_pretrained(self, folder, dtype=None):
        save_weights(self, folder, {"_class_name": "AutoencoderKL", **self.config}, dtype=dtype)


class Pixels(nn.Module):
    """Stands where a model that draws pixels has no autoencoder: a picture is its own latent."""
    factor = 1

    def __init__(self, size):
        super().__init__()
        self.config = dict(latent_channels=3, scaling_factor=1.0, sample_size=size)

    def encode(self, images, tile=None):
        return images, torch.full_like(images, -torch.inf)

    def decode(self, z, tile=None):
        return z


def older_attention_names(key):
    """Checkpoints before diffusers 0.17 name the attention's four layers query, key, value, proj_attn."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        key = re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", key)
    return key


def main():
    import argparse
    import time
    from pathlib import Path

    import numpy as np
    from tqdm import tqdm

    import data

    parser = argparse.ArgumentParser(description="Train the miniature autoencoder on the built-in pictures.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("--out", default="runs/vae", help="folder that gets vae/")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak; 100 steps of warm-up, cosine to zero")
    parser.add_argument("--kl", type=float, default=1e-6, help="weight of KL(q(z | image) || N(0, I)), a sum, beside the squared error's mean")
    parser.add_argument("--eval-size", type=int, help="held-out pictures of the last PSNR; default all")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", help="default: cuda, else mps, else cpu")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    args = parser.parse_args()
    if (min(args.steps, args.batch_size, 1 if args.eval_size is None else args.eval_size) < 1 or args.seed < 0
            or not 0 < args.lr < float("inf") or not 0 <= args.kl < float("inf")):
        raise UserError("--steps, --batch-size and --eval-size are at least 1, --seed and --kl at least 0, --lr above 0")
    if (Path(args.out) / "vae").exists():
        raise UserError(f"{Path(args.out) / 'vae'} exists; choose another --out")
    Path(args.out).mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    device = pick_device(args.device).type
    vae = VAE(CONFIGS["tiny"]).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    sources = [(data.builtin(task, "train"), key) for task, key in (("sr", "target"), ("inpaint", "source"), ("sr", "source"))]
    autocast = torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16")

    def batch(step):
        """Plain pictures, canvases with two objects, degraded pictures: all that the tasks will encode."""
        rng, pictures = np.random.default_rng((args.seed, step)), []
        for kind in rng.choice(3, size=args.batch_size, p=(0.65, 0.2, 0.15)):
            dataset, key = sources[kind]
            picture = dataset.get(int(rng.integers(len(dataset))), rng)[key]
            pictures.append(picture.flip(2) if rng.random() < 0.5 else picture)
        return torch.stack(pictures).to(device)

    start, bar = time.time(), tqdm(range(args.steps), desc="vae")
    for step in bar:
        scale = min((step + 1) / 100, 0.5 * (1 + np.cos(np.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        images = batch(step)
        with autocast:
            mean, logvar = vae.encode(images)
            output = vae.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
        mean, logvar = mean.float(), logvar.float()
        mse = F.mse_loss(output.float(), images)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        optimizer.zero_grad()
        (mse + args.kl * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(mse=f"{mse.item():.4f}", kl=f"{kl.item():.0f}")
        if (step + 1) % 500 == 0:
            vae.save_pretrained(Path(args.out) / "vae")
            tqdm.write(f"step {step + 1}: held-out PSNR {psnr(vae, 200, device):.2f} dB on 200 pictures, {time.time() - start:.0f} s")

    # The posterior's noise has done its work, latents that decode alike when near. Without it they are easier to predict: q becomes its mean.
    with torch.no_grad():
        vae.quant_conv.weight[vae.config["latent_channels"]:] = 0
        vae.quant_conv.bias[vae.config["latent_channels"]:] = -12
        # latents of unit variance, as Stable Diffusion's scaling factor makes them (arXiv 2112.10752, D.1)
        mean = vae.mode(torch.cat([batch(args.steps + i) for i in range(max(1, 512 // args.batch_size))]))
        vae.config["scaling_factor"] = round(1 / mean.std().item(), 5)
    vae.save_pretrained(Path(args.out) / "vae")
    print(f"held-out PSNR {psnr(vae, args.eval_size, device):.2f} dB, scaling factor {vae.config['scaling_factor']}, {time.time() - start:.0f} s, "
          f"saved in {Path(args.out) / 'vae'}")


def blended(picture, drawn, redrawn, threshold=0.3):
    """An edited picture whose unchanged parts are the source's own pixels, not what the autoencoder makes of them.

    picture, its edited version, its reconstruction (B, 3, H, W) in [-1, 1] -> (B, 3, H, W): `drawn` where it differs from `redrawn` by
    `threshold` or more (mean over channels and 3 x 3 pixels), `picture` where it does not, and smoothly between.
    """
    change = F.avg_pool2d((drawn - redrawn).abs().mean(1, keepdim=True), 3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(picture, drawn, (change / threshold).clamp(max=1).square())


@torch.no_grad()
def psnr(vae, count, device):
    """Mean over held-out pictures of 10 log10(1 / MSE), pictures in [0, 1], reconstruction from the mode."""
    import data
    dataset, values = data.builtin("sr", "heldout"), []
    count = min(count or len(dataset), len(dataset))
    for i in range(0, count, 32):
        images = torch.stack([dataset[j * len(dataset) // count]["target"] for j in range(i, min(i + 32, count))]).to(device)
        output = vae.decode(vae.encode(images)[0]).clamp(-1, 1)
        values.append(-10 * torch.log10(((output - images) / 2).square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()


if __name__ == "__main__":
    command(main)
