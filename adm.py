"""U-Nets on pixels, without a text: DDPM's and ADM's, which diffusers calls UNet2DModel.

Ho et al. 2020 (DDPM, arXiv 2006.11239): the time embedding is added, attention has one head, and
convolutions halve and double the picture. DeMe fine-tunes such models.

Dhariwal and Nichol 2021 (ADM, arXiv 2105.05233, section 3): the time scales and shifts what a
norm puts out (AdaGN), an attention head has 64 channels, residual blocks halve and double the
picture, and the network may read a class. It has twice as many output channels as input channels;
the second half predicts the variance (Nichol and Dhariwal 2021, Eq. 15, and
Diffusion.variance_loss). ADM is the backbone of MT-Diffusion's masked and label tasks, and of DTR's
results on a U-Net.

The forward pass and `Cond` are those of unet.py, so DTR, DeMe and MT-Diffusion attach as they do
there. MTU finds no feed-forward network here. Only models on pixels need this file.

    python adm.py       draws ADM's layers, their shapes and where DTR's masks attach

Letters: as in unet.py.
"""
import hub  # noqa: F401  the first import, so that Ctrl-C ends quietly

import torch
import torch.nn as nn
import torch.nn.functional as F

import unet
from chart import Box, diagram, output_shapes
from hub import Parser, UserError, command, older_attention_names, write_png
from unet import Cond, UNet

# -------------------------------------------------------------------------------------------------
# Configurations

# diffusers' defaults. A model's config.json, like an entry of CONFIGS, holds the differences.
DEFAULTS = dict(
    sample_size=None,
    in_channels=3,
    out_channels=3,                          # 6 with a learned variance
    block_out_channels=(224, 448, 672, 896),
    layers_per_block=2,
    down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
    up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    downsample_type="conv",                  # at levels with attention, "conv" or "resnet"
    upsample_type="conv",
    downsample_padding=1,
    add_attention=True,                      # in the middle
    attention_head_dim=8,                    # channels of a head (not, as in unet.py, their number)
    norm_num_groups=32,
    attn_norm_num_groups=None,               # in the middle
    norm_eps=1e-5,
    resnet_time_scale_shift="default",
    num_class_embeds=None,
    flip_sin_to_cos=True,
    freq_shift=0,
)

# The values that are implemented, of keys that have a choice of values in diffusers.
IMPLEMENTED = dict(
    act_fn=("silu",),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    downsample_padding=(0, 1),
    downsample_type=("conv", "resnet"),
    mid_block_scale_factor=(1,),
    mid_block_type=("UNetMidBlock2D",),
    resnet_time_scale_shift=("default", "scale_shift"),
    time_embedding_type=("positional",),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    upsample_type=("conv", "resnet"),
)

DDPM = dict(
    attention_head_dim=None,  # one head
    downsample_padding=0,
    norm_eps=1e-6,
    flip_sin_to_cos=False,
    freq_shift=1,
)
ADM = dict(
    out_channels=6,
    downsample_type="resnet",
    upsample_type="resnet",
    attention_head_dim=64,
    attn_norm_num_groups=32,
    resnet_time_scale_shift="scale_shift",
)

CONFIGS = {
    "ddpm": dict(  # google/ddpm-cifar10-32
        DDPM,
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
    "ddpm256": dict(  # google/ddpm-ema-church-256, google/ddpm-ema-bedroom-256
        DDPM,
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    ),
    "adm": dict(  # guided-diffusion's network for ImageNet at 64 x 64
        ADM,
        sample_size=64,
        block_out_channels=(192, 384, 576, 768),
        layers_per_block=3,
        down_block_types=("ResnetDownsampleBlock2D",) + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
        num_class_embeds=1000,
    ),
    # Two for a laptop, without classes.
    "ddpm-tiny": dict(
        DDPM,
        sample_size=32,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
    "adm-tiny": dict(
        ADM,
        sample_size=32,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        attention_head_dim=32,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ),
}

# DDPM's noise schedule, which is also ADM's, except at 64 x 64 pixels. There it is a cosine,
# squaredcos_cap_v2.
SCHEDULER = dict(
    _class_name="DDPMScheduler",
    num_train_timesteps=1000,
    beta_start=0.0001,
    beta_end=0.02,
    beta_schedule="linear",
    clip_sample=True,
    variance_type="fixed_large",
)


def scheduler_for(config, beta_schedule="linear"):
    """Choose a scheduler config: the variance is learned if the network has outputs for it."""
    c = DEFAULTS | config
    learned = c["out_channels"] == 2 * c["in_channels"]
    variance_type = "learned_range" if learned else "fixed_large"
    return SCHEDULER | dict(variance_type=variance_type, beta_schedule=beta_schedule)


def zero_outputs(network):
    """Set the last layer of the network, and of each of its blocks, to zero, in place.

    Every block then starts as its skip path. DDPM's and ADM's official code begin training so.
    """
    last = [network.conv_out]
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            last.append(module.conv2)
        if isinstance(module, Attention):
            last.append(module.to_out[0])
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


# -------------------------------------------------------------------------------------------------
# Layers

def halve(x):
    return F.avg_pool2d(x, 2)


def double(x):
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResnetBlock2D(unet.ResnetBlock2D):
    """A residual block that can change the size, and where the time can scale as well as shift.

    resample: None, halve or double, on both the update and the skip path.
    """

    def __init__(self, cin, cout, c, resample=None):
        super().__init__(cin, cout, c)
        self.resample = resample or nn.Identity()
        self.scale_shift = c["resnet_time_scale_shift"] == "scale_shift"
        if self.scale_shift:
            # One half of the outputs scales, the other shifts.
            self.time_emb_proj = nn.Linear(self.time_emb_proj.in_features, 2 * cout)

    def skip(self, x):
        return super().skip(self.resample(x))

    def update(self, x, cond):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))        # (B, cout, H, W)
        emb = self.time_emb_proj(F.silu(cond.temb))[:, :, None, None]
        if self.scale_shift:
            # AdaGN: ADM, section 3
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        return self.conv2(F.silu(h))


class Attention(unet.Attention):
    """Self-attention over the positions of a picture, with its own norm and skip path."""

    def __init__(self, channels, groups, c):
        head = channels if c["attention_head_dim"] is None else c["attention_head_dim"]
        if channels % head:
            raise UserError(f"U-Net config: attention_head_dim = {head} (channels of a head) does "
                            f"not divide {channels} channels")
        super().__init__(channels, channels, channels // head, bias=True)
        self.routable_channels = channels
        self.group_norm = nn.Identity()
        if groups is not None:
            self.group_norm = nn.GroupNorm(groups, channels, c["norm_eps"])

    def forward(self, x, cond):                                     # (B, C, H, W)
        h = self.group_norm(x).flatten(2).transpose(1, 2)           # (B, L, C)
        # Unlike in Stable Diffusion, attention stands by itself, without a feed-forward network.
        h = super().forward(h)
        return x + h.transpose(1, 2).reshape(x.shape)


class Downsample2D(unet.Downsample2D):
    """Halve by a convolution that is padded on the right and at the bottom only, as DDPM's is."""

    def forward(self, x, cond):
        return super().forward(F.pad(x, (0, 1, 0, 1)), cond)


# -------------------------------------------------------------------------------------------------
# The network

class UNet2D(UNet):
    """DDPM's and ADM's U-Net. config: differences from DEFAULTS, in diffusers' keys.

    `forward` is UNet's; its context is None, and classes come as added={"class_labels": (B,)}.
    Height and width must be multiples of `multiple`, since every level but the last halves them.
    """
    class_names = ("UNet2DModel",)
    defaults = DEFAULTS
    implemented = IMPLEMENTED
    rename = staticmethod(older_attention_names)  # google/ddpm-cifar10-32 is of 2022

    def __init__(self, config):
        super().__init__(config)
        size = self.config["sample_size"]
        self.multiple = 2 ** (len(self.config["block_out_channels"]) - 1)
        if size is not None and size % self.multiple:
            raise UserError(f"U-Net config: sample_size = {size} is no multiple of {self.multiple}")

    def add_condition(self, width):
        classes = self.config["num_class_embeds"]
        # ImageNet's 1000 rows are all classes; in models that are trained here the last is none.
        self.num_class_embeds = classes
        self.class_embedding = None if classes is None else nn.Embedding(classes, width)

    def make_resnet(self, cin, cout, resample=None):
        return ResnetBlock2D(cin, cout, self.config, resample)

    def make_attention(self, level, block_type):
        c = self.config
        groups = c["norm_num_groups"]
        if block_type == "Mid":
            if not c["add_attention"]:
                return []
            # With AdaGN, diffusers leaves this norm out if it has no number of groups.
            if c["attn_norm_num_groups"] or c["resnet_time_scale_shift"] != "default":
                groups = c["attn_norm_num_groups"]
        elif not block_type.startswith("Attn"):
            return []
        return [Attention(c["block_out_channels"][level], groups, c)]

    def make_downsampler(self, channels, block_type):
        c = self.config
        by_resnet = c["downsample_type"] == "resnet" and block_type.startswith("Attn")
        if by_resnet or block_type.startswith("Resnet"):
            return self.make_resnet(channels, channels, halve)
        # DDPM, written in TensorFlow, pads on one side only; diffusers' own default is symmetric.
        if c["downsample_padding"] == 0:
            return Downsample2D(channels, padding=0)
        return unet.Downsample2D(channels)

    def make_upsampler(self, channels, block_type):
        by_resnet = self.config["upsample_type"] == "resnet" and block_type.startswith("Attn")
        if by_resnet or block_type.startswith("Resnet"):
            return self.make_resnet(channels, channels, double)
        return unet.Upsample2D(channels)

    def condition(self, x, t, context, task, added):
        """Embed the time and the class -> Cond."""
        t, temb = self.embed_time(t, x)
        if self.class_embedding is not None:
            if not added or added.get("class_labels") is None:
                raise ValueError('this U-Net has classes: pass added={"class_labels": (B,)}')
            temb = temb + self.class_embedding(added["class_labels"])
        return Cond(temb, None, t, task, None, added)

    @classmethod
    def from_pretrained(cls, path_or_hub_id, subfolder="", dtype=torch.float32):
        """Load as Network.from_pretrained does, but by default from the top of a folder."""
        return super().from_pretrained(path_or_hub_id, subfolder, dtype)


# -------------------------------------------------------------------------------------------------
# The other parts of a model

class Pixels(nn.Module):
    """Stand where other models have an autoencoder: a picture is its own latent.

    size: height and width of the pictures.
    """
    factor = 1

    def __init__(self, size):
        super().__init__()
        self.config = dict(latent_channels=3, scaling_factor=1.0, sample_size=size)

    def encode(self, images, tile=None):
        """Return pictures (B, 3, H, W) as their own mean, with the log of a variance of zero."""
        return images, torch.full_like(images, -torch.inf)

    def decode(self, z, tile=None):
        return z


# -------------------------------------------------------------------------------------------------
# The demonstration

NAMES = {unet.Conv2d: "convolution", nn.Conv2d: "convolution", ResnetBlock2D: "residual",
         Attention: "attention"}
NOTES = (
    "Blue: channels x height x width of the tensor that leaves a box.",
    "Orange: how many channels each residual block or attention reads. DTR's mask acts on them at",
    "the entry of the update; the skip path around it stays whole.",
    "On the way up a residual block reads the tensors from below and from the left, side by side.",
    "t and the class scale and shift the second norm of each residual block.",
)


def layers_of(block):
    """List the layers of a level, a residual block and its attention together."""
    return [[resnet, *block.attentions[i:i + 1]] for i, resnet in enumerate(block.resnets)]


def network_boxes(config):
    """Describe a U-Net -> its boxes, one for each tensor that is handed on, and the arrows."""
    with torch.device("meta"):      # tensors have shapes but no memory
        network = UNet2D(config)
        size = config["sample_size"]
        x = torch.empty(1, network.config["in_channels"], size, size)
        shapes = output_shapes(network, x, 0, None, added=dict(class_labels=torch.tensor([0])))
    groups = [[network.conv_in]]
    for block in network.down_blocks:
        groups += layers_of(block) + [[layer] for layer in block.downsamplers]
    first, last = network.mid_block.resnets
    groups.append([first, *network.mid_block.attentions, last])
    depth = len(groups)
    for block in network.up_blocks:
        groups += layers_of(block)
        groups[-1].extend(block.upsamplers)
    groups.append([network.conv_out])

    boxes = [Box(0, 0, "x_t", tuple(x.shape[1:]))]
    for i, group in enumerate(groups, 1):
        masks = [str(layer.routable_channels) for layer in group
                 if hasattr(layer, "routable_channels")]
        # The way up is as long as the way down, and the middle is the turn.
        boxes.append(Box(int(i > depth), min(i, 2 * depth - i),
                         ", ".join(NAMES[type(layer)] for layer in group),
                         shapes[group[-1]], "  ".join(masks)))
    arrows = [(i, i + 1) for i in range(2 * depth)]
    return boxes, arrows + [(i, 2 * depth - i) for i in range(1, depth)]


def main():
    parser = Parser("Draw ADM's layers, the shapes after them and where DTR's masks attach.")
    parser.add_argument("--out", default="samples/adm.png", help="file for the picture")
    args = parser.parse_args()
    write_png(args.out, diagram(*network_boxes(CONFIGS["adm"]), NOTES))
    print(args.out)


if __name__ == "__main__":
    command(main)
