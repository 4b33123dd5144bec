"""U-Nets without text, on pixels: DDPM's and ADM's, under the names of diffusers' UNet2DModel.

    DDPM    Ho et al. 2020, arXiv 2006.11239: time is added, attention has one head, convolutions halve and double
    ADM     Dhariwal and Nichol 2021, arXiv 2105.05233: time scales and shifts (AdaGN), heads of 64 channels, residual blocks halve and double,
            a class; twice the output channels, whose second half tells the variance (Diffusion.variance_loss)

DDPM's are the base models of DeMe; ADM is the backbone of MT-Diffusion and of DTR's U-Net results. `Cond` and the forward pass are UNet's, so
DTR and DeMe attach alike; MTU finds no feed-forward network here. Classes (B,) come in added={"class_labels": ...}.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import unet
from folders import UserError, blaming, fetch, load_weights, read_json, save_weights
from unet import Cond, Conv2d, Downsample2D, ResnetBlock2D, TimestepEmbedding, UNet, completed, count
from vae import Attention, older_attention_names

# diffusers' defaults; a model's config.json, or an entry of CONFIGS, holds the differences.
DEFAULTS = dict(
    sample_size=None, in_channels=3, out_channels=3, freq_shift=0, flip_sin_to_cos=True, block_out_channels=(224, 448, 672, 896),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), layers_per_block=2, downsample_padding=1,
    downsample_type="conv", upsample_type="conv", attention_head_dim=8, norm_num_groups=32, attn_norm_num_groups=None, norm_eps=1e-5,
    resnet_time_scale_shift="default", add_attention=True, num_class_embeds=None)
# Keys that have one meaning here, and those with a few; other values are refused by name, and so is any other key that is not null.
FIXED = dict(center_input_sample=False, time_embedding_type="positional", mid_block_type="UNetMidBlock2D", mid_block_scale_factor=1,
             dropout=0.0, act_fn="silu")
CHOICES = dict(downsample_type=("conv", "resnet"), upsample_type=("conv", "resnet"), downsample_padding=(0, 1), add_attention=(False, True),
               resnet_time_scale_shift=("default", "scale_shift"), flip_sin_to_cos=(False, True))
BLOCKS = "{}Block2D", "Attn{}Block2D", "Resnet{}sampleBlock2D"  # {}: Down or Up

_DDPM = dict(freq_shift=1, flip_sin_to_cos=False, norm_eps=1e-6, attention_head_dim=None, downsample_padding=0)
_ADM = dict(out_channels=6, resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet", attn_norm_num_groups=32)


def _levels(channels, attends, plain):
    """Per level, finest first: channels and whether it attends. plain: of BLOCKS, that of a level which does not."""
    kinds = [BLOCKS[1] if attend else plain for attend in attends]
    return dict(block_out_channels=channels, down_block_types=tuple(kind.format("Down") for kind in kinds),
                up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)))


CONFIGS = {
    # google/ddpm-cifar10-32; -ema-church-256 and -ema-bedroom-256
    "ddpm": _DDPM | _levels((128, 256, 256, 256), (0, 1, 0, 0), BLOCKS[0]) | dict(sample_size=32),
    "ddpm256": _DDPM | _levels((128, 128, 256, 256, 512, 512), (0, 0, 0, 0, 1, 0), BLOCKS[0]) | dict(sample_size=256),
    # guided-diffusion's, ImageNet 64 x 64
    "adm": _ADM | _levels((192, 384, 576, 768), (0, 1, 1, 1), BLOCKS[2]) | dict(
        sample_size=64, layers_per_block=3, attention_head_dim=64, num_class_embeds=1000),
    # both for a laptop, without classes
    "ddpm-tiny": _DDPM | _levels((32, 64, 96), (0, 1, 0), BLOCKS[0]) | dict(sample_size=32, layers_per_block=1),
    "adm-tiny": _ADM | _levels((32, 64, 96), (0, 1, 1), BLOCKS[2]) | dict(sample_size=32, layers_per_block=1, attention_head_dim=32),
}


class Halve(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, 2)


class Double(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Upsample2D(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.larger = nn.Conv2d(channels, channels, 3, padding=1), Double()

    def forward(self, x, cond):
        return self.conv(self.larger(x))


def attention(channels, groups, c):
    head = c["attention_head_dim"] or channels
    if channels % head:
        raise UserError(f"U-Net config: attention_head_dim = {head} (channels of a head) does not divide {channels} channels")
    return Attention(channels, groups, channels // head, c["norm_eps"])


class DownBlock(unet.DownBlock):
    def __init__(self, cin, cout, kind, last, c):
        nn.Module.__init__(self)
        layers, attends = c["layers_per_block"], kind == "AttnDownBlock2D"
        if attends:
            self.attentions = nn.ModuleList([attention(cout, c["norm_num_groups"], c) for _ in range(layers)])
        self.resnets = nn.ModuleList([ResnetBlock2D(cin if i == 0 else cout, cout, c) for i in range(layers)])
        by_resnet = kind.startswith("Resnet") or attends and c["downsample_type"] == "resnet"
        self.downsamplers = None if last else nn.ModuleList([
            ResnetBlock2D(cout, cout, c, Halve()) if by_resnet else Downsample2D(cout, c["downsample_padding"])])


class MidBlock(unet.MidBlock):
    def __init__(self, channels, c):
        nn.Module.__init__(self)
        groups = c["attn_norm_num_groups"] or c["norm_num_groups"]
        self.attentions = nn.ModuleList([attention(channels, groups, c)] if c["add_attention"] else [])
        self.resnets = nn.ModuleList([ResnetBlock2D(channels, channels, c) for _ in range(2)])


class UpBlock(unet.UpBlock):
    def __init__(self, cin, cout, below, kind, last, c):
        nn.Module.__init__(self)
        layers, attends = c["layers_per_block"] + 1, kind == "AttnUpBlock2D"
        if attends:
            self.attentions = nn.ModuleList([attention(cout, c["norm_num_groups"], c) for _ in range(layers)])
        # Each residual block takes the skip tensor of its mirror image, the last one that of the level above.
        self.resnets = nn.ModuleList([
            ResnetBlock2D((cin if i == 0 else cout) + (below if i == layers - 1 else cout), cout, c) for i in range(layers)])
        by_resnet = kind.startswith("Resnet") or attends and c["upsample_type"] == "resnet"
        self.upsamplers = None if last else nn.ModuleList([ResnetBlock2D(cout, cout, c, Double()) if by_resnet else Upsample2D(cout)])

    def upsample(self, x, cond, skips, run):
        return run(self.upsamplers[0], x, cond)


def checked(config):
    """-> the whole config, defaults filled in. What these U-Nets do not do is refused by name."""
    c, need = completed(config, DEFAULTS, FIXED)
    for key, choices in CHOICES.items():
        need(c[key] in choices and type(c[key]) is type(choices[0]), key)
    for key in ("sample_size", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds"):
        need(c[key] is None or count(c[key]), key)
    for key in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
        need(count(c[key]), key)
    for key in ("norm_eps", "freq_shift"):
        need(type(c[key]) in (float, int), key)
    widths, groups = c["block_out_channels"], c["attn_norm_num_groups"]
    need(isinstance(widths, (list, tuple)) and widths and all(count(w) and w % c["norm_num_groups"] == 0 for w in widths) and widths[0] % 2 == 0,
         "block_out_channels", "norm_num_groups")
    need(c["sample_size"] is None or c["sample_size"] % 2 ** (len(widths) - 1) == 0, "sample_size", "block_out_channels")
    for key, side in (("down_block_types", "Down"), ("up_block_types", "Up")):
        need(isinstance(c[key], (list, tuple)) and len(c[key]) == len(widths) and all(k in [b.format(side) for b in BLOCKS] for k in c[key]), key)
    need(not c["add_attention"] or (groups is None and c["resnet_time_scale_shift"] == "default") or groups and widths[-1] % groups == 0,
         "attn_norm_num_groups")  # diffusers leaves the norm out of a scale-shift mid block without it
    return c


class UNet2D(UNet):
    """diffusers' UNet2DModel. config: differences from DEFAULTS, in diffusers' keys.

    forward as UNet's, without context (None); height and width, which halve at every level but the last, are multiples of `multiple`.
    """

    def __init__(self, config):
        nn.Module.__init__(self)
        self.config = c = checked(config)
        widths, n = list(c["block_out_channels"]), len(c["block_out_channels"])
        E, rev, self.multiple = 4 * widths[0], widths[::-1], 2 ** (n - 1)
        self.conv_in = Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], E)
        self.class_embedding = nn.Embedding(c["num_class_embeds"], E) if c["num_class_embeds"] else None
        self.task_embedding = None
        self.down_blocks = nn.ModuleList([
            DownBlock(widths[max(i - 1, 0)], widths[i], c["down_block_types"][i], i == n - 1, c) for i in range(n)])
        self.mid_block = MidBlock(widths[-1], c)
        self.up_blocks = nn.ModuleList([
            UpBlock(rev[max(i - 1, 0)], rev[i], rev[min(i + 1, n - 1)], c["up_block_types"][i], i == n - 1, c) for i in range(n)])
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], widths[0], c["norm_eps"])
        self.conv_out = nn.Conv2d(widths[0], c["out_channels"], 3, padding=1)
        self.gradient_checkpointing = False

    def condition(self, x, t, context, task, added):
        t, temb = self.embedded(t, x)
        if self.class_embedding is not None:
            if not added or added.get("class_labels") is None:
                raise ValueError('this U-Net knows classes: pass added={"class_labels": (B,)}')
            temb = temb + self.class_embedding(added["class_labels"])
        return Cond(temb, None, t, task, None, added)

    @classmethod
    def from_pretrained(cls, path_or_hub_id, subfolder="", config=None, dtype=torch.float32, attach=lambda unet: unet):
        """As UNet's. subfolder: "" for the layout of google/ddpm-cifar10-32, whose weights lie beside model_index.json."""
        folder = fetch(path_or_hub_id, subfolder)
        config = config or read_json(folder / "config.json")
        if (name := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
            raise UserError(f"{folder} holds a {name}, not a UNet2DModel")
        with torch.device("meta"), blaming(folder / "config.json"):
            unet = attach(cls(config))
        load_weights(unet, folder, older_attention_names, dtype)
        return unet

    def save_pretrained(self, folder, dtype=None):
        """Writes the folder of the U-Net itself. dtype: of the file's tensors, default the parameters' own."""
        save_weights(self, folder, {"_class_name": "UNet2DModel", **self.config}, dtype=dtype)
