"""The autoencoder of latent diffusion: pictures to latents, an f-th as high and wide, and back.

Rombach et al. 2022, arXiv 2112.10752, Sec. 3.1 and appendix G. This is diffusers' AutoencoderKL
with the same names of parameters and config keys, so a checkpoint of either loads in the other.
Stable Diffusion's has four levels and f = 8; the miniature's has three and f = 4.

Latents leave `encode` unscaled: whoever makes x0 multiplies by config["scaling_factor"], and
divides by it before `decode`. The miniature's weights come from experiments/train_autoencoder.py.

Letters: B batch, C channels, H W picture, h w latent (H/f, W/f).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

import unet
from hub import Network, UserError, complete, older_attention_names, per_level

# diffusers' defaults. A model's config.json, like an entry of CONFIGS, holds the differences.
DEFAULTS = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(64,),               # one number per level
    layers_per_block=1,
    norm_num_groups=32,
    sample_size=32,
    scaling_factor=0.18215,
    force_upcast=True,
    act_fn="silu",
    mid_block_add_attention=True,
    use_quant_conv=True,
    use_post_quant_conv=True,
    down_block_types="DownEncoderBlock2D",  # one for each level, or the same for all
    up_block_types="UpDecoderBlock2D",
)

# Keys that have a single value here.
IMPLEMENTED = dict(
    act_fn=("silu",),
    latents_mean=(None,),                   # Wan's and other autoencoders of video have one
    latents_std=(None,),
    mid_block_add_attention=(True,),
    use_quant_conv=(True,),
    use_post_quant_conv=(True,),
    down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",),
)

CONFIGS = {
    "tiny": dict(block_out_channels=(32, 64, 128), norm_num_groups=16, sample_size=64),
    "sd15": dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512),
    "sdxl": dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024,
                 scaling_factor=0.13025),
}


def completed(config):
    """Fill a config with the defaults. Raise UserError for a value that is not implemented."""
    c = complete(config, DEFAULTS, IMPLEMENTED, "vae config")
    for key in ("down_block_types", "up_block_types"):
        # All levels are of one type, but diffusers wants to read it for each of them.
        c[key] = per_level(c, key, "vae config")
    if not 1e-3 <= c["scaling_factor"] <= 1e3:
        raise UserError(f"vae config: scaling_factor = {c['scaling_factor']}, by which latents are "
                        "divided, is not from 0.001 to 1,000")
    return c


# -------------------------------------------------------------------------------------------------
# Layers. All group norms have eps = 1e-6 here; the U-Net's residual blocks have 1e-5.

class ResnetBlock2D(nn.Module):
    """The U-Net's residual block without a timestep, of which an autoencoder knows nothing."""

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


class Attention(unet.Attention):
    """Self-attention with a single head over all positions, with its own norm and skip path."""

    def __init__(self, channels, groups):
        super().__init__(channels, channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x):
        # There is one head, so keys and queries have all C channels.
        # The fused kernel never holds all (hw, hw) weights, which are 1 GB at 128 x 128 latents.
        y = super().forward(self.group_norm(x).flatten(2).mT)    # (B, hw, C)
        return x + y.mT.reshape(x.shape)


class Downsample2D(unet.Downsample2D):
    def forward(self, x):
        # Only the right and the bottom are padded, as when the checkpoints were trained.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample2D(unet.Upsample2D):
    def forward(self, x):
        # Repeated and then smoothed pixels have no checkerboard, as transposed convolutions may.
        return super().forward(x, (2 * x.shape[2], 2 * x.shape[3]))


class Level(nn.Module):
    """Residual blocks of one resolution, then the step to the next one, if there is a next one."""

    def __init__(self, cin, cout, num_blocks, *, groups, down=False, up=False):
        super().__init__()
        widths = [cin] + [cout] * num_blocks
        self.resnets = nn.ModuleList(
            [ResnetBlock2D(a, b, groups) for a, b in zip(widths, widths[1:])])
        # A list without modules adds no keys, so both kinds of level have diffusers' names.
        self.downsamplers = nn.ModuleList([Downsample2D(cout, padding=0)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample2D(cout)] if up else [])

    def forward(self, x):
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = module(x)
        return x


class MidBlock(nn.Module):
    """The lowest resolution, the only one with attention: its cost grows with (h w) squared."""

    def __init__(self, channels, groups):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)])
        self.resnets = nn.ModuleList([ResnetBlock2D(channels, channels, groups) for _ in range(2)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Picture (B, 3, H, W) -> mean and log-variance on top of each other (B, 2C, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths = config["block_out_channels"]
        groups = config["norm_num_groups"]
        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([
            Level(widths[max(i - 1, 0)], width, config["layers_per_block"], groups=groups,
                  down=i + 1 < len(widths))
            for i, width in enumerate(widths)])
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        # Twice the channels of a latent, since the encoder describes a normal distribution.
        self.conv_out = nn.Conv2d(widths[-1], 2 * config["latent_channels"], 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """The encoder's mirror image, with one more residual block on each level."""

    def __init__(self, config):
        super().__init__()
        widths = config["block_out_channels"][::-1]
        groups = config["norm_num_groups"]
        self.conv_in = nn.Conv2d(config["latent_channels"], widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList([
            Level(widths[max(i - 1, 0)], width, config["layers_per_block"] + 1, groups=groups,
                  up=i + 1 < len(widths))
            for i, width in enumerate(widths)])
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config["out_channels"], 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# -------------------------------------------------------------------------------------------------
# Tiles. Beyond its training size a picture's memory is the autoencoder's, not the U-Net's. So a
# large picture passes through it in overlapping squares, which are faded into each other.

def blend(left, right, overlap):
    """Fade the first columns of a tile (B, C, rows, columns) in over its left neighbour's last."""
    n = min(overlap, left.shape[3], right.shape[3])
    ramp = torch.arange(n, device=right.device, dtype=right.dtype) / n
    faded = torch.lerp(left[..., -n:], right[..., :n], ramp)
    return torch.cat([faded, right[..., n:]], dim=3)


def tiled(network, x, size, out_size):
    """Compute network(x) from squares that overlap by a quarter.

    x: (B, C, rows, columns). size: side of a square of x, of which the network makes one of
    out_size. Squares, order and blending are those of diffusers' AutoencoderKL.enable_tiling().
    """
    step = size - size // 4
    overlap = out_size // 4
    above = []
    strips = []
    for i in range(0, x.shape[2], step):
        row = []
        for j in range(0, x.shape[3], step):
            tile = network(x[:, :, i:i + size, j:j + size])
            if above:
                # Transposed, the tile above is a left neighbour too.
                tile = blend(above[len(row)].mT, tile.mT, overlap).mT
            if row:
                tile = blend(row[-1], tile, overlap)
            row.append(tile)
        # The right and the lower neighbour have faded this tile's end in and bring it along.
        end = out_size - overlap
        strips.append(torch.cat([tile[:, :, :end, :end] for tile in row], dim=3))
        above = row
    return torch.cat(strips, dim=2)


# -------------------------------------------------------------------------------------------------
# The autoencoder

def in_fp32(network):
    """Make a function that computes network(x) in fp32, in spite of its weights and of autocast."""
    # Copies, but gradients flow through them to the network's own weights.
    weights = {name: p.float() for name, p in network.named_parameters()}

    def run(x):
        with torch.autocast(x.device.type, enabled=False):
            return functional_call(network, weights, x)
    return run


class VAE(Network):
    """diffusers' AutoencoderKL. config: its keys, as far as they differ from the defaults.

    Weights and inputs may differ in floating dtype; the output has the input's, or autocast's.
    `tile` is the side of a tile in latents, a multiple of 4 since a quarter of it overlaps the next
    one, and bounds the memory that a large picture takes. Each tile is normalised by itself, so
    colours may differ a little from the whole's. diffusers takes config["sample_size"] // factor,
    the size of its training latents, as the tile.
    """
    class_names = ("AutoencoderKL",)
    folder = "vae"
    rename = staticmethod(older_attention_names)

    def __init__(self, config):
        super().__init__()
        self.config = completed(config)
        latent = self.config["latent_channels"]
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        # Their names come from the paper's other autoencoder, which quantises to a codebook.
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    @property
    def factor(self):
        """f, the pixels of a picture for one of the latent, along one side."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def run(self, network, x, tile, *, scale, out_scale):
        """Compute network(x), whole or in tiles, in a dtype that does not overflow.

        scale, out_scale: pixels of input and output for one of the latent, f and 1 or 1 and f.
        """
        if not x.is_floating_point():
            raise UserError(f"the autoencoder takes floats, pictures in [-1, 1], not {x.dtype}")
        if tile is not None and (tile < 4 or tile % 4):
            # A tile's last quarter is faded into the next one.
            raise UserError(f"tile = {tile} is not a positive multiple of 4 (a quarter overlaps)")
        device = x.device.type
        dtype = self.quant_conv.weight.dtype
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        if self.config["force_upcast"] and torch.float16 in (dtype, autocast):
            # SDXL's activations exceed 65504, the largest fp16, and pictures turn black
            # (diffusers' issues 7188 and 9844). bf16 would not overflow, but has only 8 bits.
            dtype = torch.float32
            network = in_fp32(network)
        y = x.to(dtype)
        # A picture of one tile passes whole.
        if tile is None or max(x.shape[2:]) <= tile * scale:
            y = network(y)
        else:
            y = tiled(network, y, tile * scale, tile * out_scale)
        return y if autocast else y.to(x.dtype)

    def encode(self, images, tile=None):
        """Encode pictures (B, 3, H, W) in [-1, 1] -> mean and log-variance of q(z | picture).

        Both are (B, 4, H/f, W/f) and unscaled. UserError unless f divides H and W.
        """
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor:
            raise UserError(f"pictures of {width} x {height} pixels: the autoencoder needs "
                            f"multiples of {self.factor}")
        network = nn.Sequential(self.encoder, self.quant_conv)
        moments = self.run(network, images, tile, scale=self.factor, out_scale=1)
        mean, logvar = moments.chunk(2, dim=1)
        # To draw a latent: mean + exp(logvar / 2) noise. Its noise is tiny beside the mean.
        # The limits are diffusers': they keep exp(logvar) finite.
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents, tile=None):
        """Decode unscaled latents (B, 4, h, w) -> pictures (B, 3, f h, f w), about [-1, 1]."""
        network = nn.Sequential(self.post_quant_conv, self.decoder)
        return self.run(network, latents, tile, scale=1, out_scale=self.factor)
