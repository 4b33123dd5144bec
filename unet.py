"""Stable Diffusion's U-Net: diffusers' UNet2DConditionModel without what no Stable Diffusion uses.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv
2112.10752, sections 3.2 and 3.3. The network reads a noisy latent picture, a timestep and a text,
and predicts the noise. The timestep enters in the residual blocks. In the transformer blocks each
position attends to all others and to the text. Modules, parameters and config keys have
diffusers' names, so that the weights of either load in the other as they are.

A method attaches in place: moe.py swaps layers, routing.py and merge.py change the class of some,
and aggregation.py adds heads. Whatever a block may depend on besides its input travels in one
value, `Cond`, and has one row per sample: a batch may mix timesteps, texts and tasks.

Letters: B batch, C channels, H W height and width of the latent, L = H W positions, S length of
the text, D width of the text states, E width of the time embedding.
"""
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hub import Network, UserError, complete, per_level

# -------------------------------------------------------------------------------------------------
# Configurations
#
# Stable Diffusion 1.5 on a picture of 512 x 512 pixels, that is a latent of 4 x 64 x 64:
#
#     way down                       channels     size       way up
#     conv_in                        4 -> 320   64 x 64      conv_out, 320 -> 4
#     down 0   2 x [resnet, attn]         320   64 x 64      up 3     3 x [resnet, attn]
#     down 1   2 x [resnet, attn]         640   32 x 32      up 2     3 x [resnet, attn], upsample
#     down 2   2 x [resnet, attn]        1280   16 x 16      up 1     3 x [resnet, attn], upsample
#     down 3   2 x [resnet]              1280    8 x 8       up 0     3 x [resnet], upsample
#     mid      resnet, attn, resnet      1280    8 x 8
#
# A convolution with stride 2 leads from one level down to the next. Each tensor that the way down
# makes is concatenated to the input of one resnet on the way up. There are three of every size:
# the outputs of two layers, and what conv_in or the convolution before them has made. This is why
# a level of the way up has three layers where a level of the way down has two.

# diffusers' defaults. A model's config.json, like an entry of CONFIGS, holds the differences.
DEFAULTS = dict(
    sample_size=None,                           # height and width of the latents in training
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),  # one number per level
    layers_per_block=2,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    transformer_layers_per_block=1,
    attention_head_dim=8,                       # despite its name, the number of heads
    cross_attention_dim=1280,                   # D
    use_linear_projection=False,                # True in SD 2 and XL, see Transformer2DModel
    norm_num_groups=32,
    norm_eps=1e-5,
    flip_sin_to_cos=True,
    freq_shift=0,
    addition_embed_type=None,                   # "text_time" in SDXL: picture sizes, pooled text
    addition_time_embed_dim=None,
    projection_class_embeddings_input_dim=None,
    upcast_attention=False,                     # accepted, and without effect here
)

# The values that are implemented, of keys that have a choice of values in diffusers.
IMPLEMENTED = dict(
    act_fn=("silu",),
    addition_embed_type=(None, "text_time"),
    addition_embed_type_num_heads=(64,),
    attention_type=("default",),
    conv_in_kernel=(3,),
    conv_out_kernel=(3,),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    downsample_padding=(1,),
    mid_block_scale_factor=(1,),
    mid_block_type=("UNetMidBlock2DCrossAttn",),
    resnet_out_scale_factor=(1,),
    resnet_time_scale_shift=("default",),
    time_embedding_type=("positional",),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)

CONFIGS = {
    "tiny": dict(
        sample_size=16,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=128,
    ),
    "sd15": dict(sample_size=64, cross_attention_dim=768),
    "sdxl": dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,  # pooled text 1280, and six numbers of 256 each
    ),
}


# -------------------------------------------------------------------------------------------------
# What conditions a block

class Cond(NamedTuple):
    """What a block may depend on besides its input, one row per sample."""
    temb: torch.Tensor             # (B, E) embedding of t and of `added`
    context: torch.Tensor | None   # (B, S, D) text states
    t: torch.Tensor                # (B,) timesteps
    task: torch.Tensor | None      # (B,) rows of the tasks in a method's tables
    task_emb: torch.Tensor | None  # (B, width) their embedding, where a method has added a table
    added: dict | None             # SDXL: text_embeds (B, 1280), time_ids (B, 6); or class_labels


def sinusoidal(t, width, flip_sin_to_cos=True, freq_shift=0):
    """Encode numbers t (N,) as sines and cosines of geometric frequencies -> (N, width), fp32.

    This is the position encoding of the Transformer (Vaswani et al. 2017, section 3.5).
    """
    half = width // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10000) * steps / (half - freq_shift))
    angles = t[:, None].float() * frequencies                       # (N, width / 2)
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers that turn an encoded number (N, cin) into an embedding (N, width)."""

    def __init__(self, cin, width):
        super().__init__()
        self.linear_1 = nn.Linear(cin, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


# -------------------------------------------------------------------------------------------------
# Layers. A method may replace conv_in, a norm of a transformer block, a feed-forward network, a
# residual block or a transformer block. These take `cond` even where they make no use of it.

class Conv2d(nn.Conv2d):
    def forward(self, x, cond):
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    def forward(self, x, cond):
        return super().forward(x)


class ResnetBlock2D(nn.Module):
    """A residual block: two convolutions, with the time embedding added between them.

    (B, cin, H, W) -> (B, cout, H, W). c: the network's config.
    """

    def __init__(self, cin, cout, c):
        super().__init__()
        groups = c["norm_num_groups"]
        eps = c["norm_eps"]
        self.routable_channels = cin  # DTR can mask the input of this block
        self.norm1 = nn.GroupNorm(groups, cin, eps)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * c["block_out_channels"][0], cout)
        self.norm2 = nn.GroupNorm(groups, cout, eps)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        # A sum needs equal widths: where they differ, a 1 x 1 convolution is the skip path.
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def skip(self, x):
        return self.conv_shortcut(x)

    def update(self, x, cond):
        h = self.conv1(F.silu(self.norm1(x)))                       # (B, cout, H, W)
        h = h + self.time_emb_proj(F.silu(cond.temb))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h)))

    def forward(self, x, cond):
        return self.skip(x) + self.update(x, cond)


class Attention(nn.Module):
    """Multi-head attention: cross-attention to a context, or self-attention without one."""

    def __init__(self, channels, context_dim, heads, bias=False):
        super().__init__()
        if channels % heads:
            raise UserError(f"U-Net config: attention_head_dim = {heads} (the number of heads) "
                            f"does not divide {channels} channels")
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias)
        self.to_k = nn.Linear(context_dim, channels, bias)
        self.to_v = nn.Linear(context_dim, channels, bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def split(self, y):
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, context=None):                             # (B, L, C), (B, S, D)
        if context is None:
            context = x
        q = self.split(self.to_q(x))                                # (B, heads, L, C / heads)
        k = self.split(self.to_k(context))                          # (B, heads, S, C / heads)
        v = self.split(self.to_v(context))
        fits = q.shape[2] * k.shape[2] <= 2 ** 20
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and fits:
            # In bf16 on a CPU the fused kernel's backward is slower than plain products. These
            # hold all L x S scores at a time, so a long sequence takes the fused kernel.
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)  # (B, heads, L, S)
            y = scores.softmax(-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))         # (B, L, C)


class GEGLU(nn.Module):
    """A linear layer whose second half gates the first (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, channels, inner):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The part of a transformer block that MTU cuts into experts."""

    def __init__(self, channels):
        super().__init__()
        # diffusers has a dropout in the middle, which no Stable Diffusion uses.
        self.net = nn.ModuleList([
            GEGLU(channels, 4 * channels),
            nn.Identity(),
            nn.Linear(4 * channels, channels),
        ])

    def forward(self, x, cond):
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Module):
    """Positions look at each other, then at the text, then each is transformed by itself."""

    def __init__(self, channels, context_dim, heads):
        super().__init__()
        self.routable_channels = channels
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x, cond):                                     # (B, L, C)
        x = x + self.attn1(self.norm1(x, cond))
        x = x + self.attn2(self.norm2(x, cond), cond.context)
        return x + self.ff(self.norm3(x, cond), cond)


class Transformer2DModel(nn.Module):
    """Transformer blocks on a picture, whose L = H W positions become a sequence."""

    def __init__(self, channels, depth, heads, c):
        super().__init__()
        # A linear layer on the sequence is a 1 x 1 convolution on the picture, stored otherwise.
        self.linear = c["use_linear_projection"]
        projection = nn.Linear if self.linear else partial(nn.Conv2d, kernel_size=1)
        self.norm = nn.GroupNorm(c["norm_num_groups"], channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList([
            BasicTransformerBlock(channels, c["cross_attention_dim"], heads) for _ in range(depth)
        ])
        self.proj_out = projection(channels, channels)

    def forward(self, x, cond):                                     # (B, C, H, W)
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = h.permute(0, 2, 3, 1).flatten(1, 2).contiguous()        # (B, L, C)
        if self.linear:
            h = self.proj_in(h)
        for transformer_block in self.transformer_blocks:
            h = transformer_block(h, cond)
        if self.linear:
            h = self.proj_out(h)
        h = h.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)        # (B, C, H, W)
        if not self.linear:
            h = self.proj_out(h)
        return x + h


class Downsample2D(nn.Module):
    """Halve height and width by a convolution with stride 2; an odd size is rounded up."""

    def __init__(self, channels, padding=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x, cond):
        return self.conv(x)


class Upsample2D(nn.Module):
    """Repeat pixels until the picture has the given (height, width), then convolve."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


# -------------------------------------------------------------------------------------------------
# The U. `run` calls a layer.

def call(module, *inputs):
    return module(*inputs)


def recompute(module, *inputs):
    """Call a module without storing what is inside it; the backward pass computes that again."""
    return checkpoint(module, *inputs, use_reentrant=False)


class Block(nn.Module):
    """One level of the U. A network puts layers into its lists; a list may stay empty."""

    def __init__(self):
        super().__init__()
        self.attentions = nn.ModuleList()
        self.resnets = nn.ModuleList()
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()


class DownBlock(Block):
    """A level of the way down. It pushes each tensor that the way up will need on `skips`."""

    def forward(self, x, cond, skips, run=call):
        for i, resnet in enumerate(self.resnets):
            x = run(resnet, x, cond)                                # (B, C, H, W)
            if self.attentions:
                x = run(self.attentions[i], x, cond)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = run(downsampler, x, cond)                           # (B, C, H / 2, W / 2)
            skips.append(x)
        return x


class MidBlock(Block):
    """The bottom of the U: a residual block, attention if there is any, a residual block."""

    def forward(self, x, cond, run=call):
        first, last = self.resnets
        for layer in (first, *self.attentions, last):
            x = run(layer, x, cond)
        return x


class UpBlock(Block):
    """A level of the way up. It pops the tensors that the way down has pushed, the last first."""

    def forward(self, x, cond, skips, run=call):
        for i, resnet in enumerate(self.resnets):
            x = torch.cat([x, skips.pop()], dim=1)                  # (B, C + C of the skip, H, W)
            x = run(resnet, x, cond)                                # (B, C, H, W)
            if self.attentions:
                x = run(self.attentions[i], x, cond)
        for upsampler in self.upsamplers:
            if isinstance(upsampler, ResnetBlock2D):
                # In ADM (adm.py) a residual block doubles the picture, and it reads the time.
                x = run(upsampler, x, cond)
            else:
                # The next tensor to pop says how large: 13 was halved to 7, whose double is not 13.
                x = upsampler(x, skips[-1].shape[-2:])
        return x


class UNet(Network):
    """The U-Net of Stable Diffusion 1.x, 2.x and XL, of InstructPix2Pix and of inpainting models.

    config: differences from DEFAULTS, in diffusers' keys.
    """
    class_names = ("UNet2DConditionModel",)
    folder = "unet"
    defaults = DEFAULTS
    implemented = IMPLEMENTED

    def __init__(self, config):
        super().__init__()
        self.config = c = complete(config, self.defaults, self.implemented)
        widths = c["block_out_channels"]
        down_types = per_level(c, "down_block_types")
        up_types = per_level(c, "up_block_types")[::-1]  # diffusers lists these from the bottom up
        bottom = len(widths) - 1

        def add_layer(block, cin, level, block_type):
            block.resnets.append(self.make_resnet(cin, widths[level]))
            block.attentions.extend(self.make_attention(level, block_type))

        self.conv_in = Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])
        self.add_condition(4 * widths[0])

        # The way is that of `forward`, with a stack of widths where it has a stack of tensors.
        channels = widths[0]
        skips = [channels]
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            block = DownBlock()
            for _ in range(c["layers_per_block"]):
                add_layer(block, channels, level, down_types[level])
                channels = width
                skips.append(channels)
            if level < bottom:
                block.downsamplers.append(self.make_downsampler(channels, down_types[level]))
                skips.append(channels)
            self.down_blocks.append(block)

        self.mid_block = MidBlock()
        add_layer(self.mid_block, channels, bottom, "Mid")
        self.mid_block.resnets.append(self.make_resnet(channels, channels))

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            block = UpBlock()
            for _ in range(c["layers_per_block"] + 1):
                # What a layer reads is concatenated from the layer before and from a skip.
                add_layer(block, channels + skips.pop(), level, up_types[level])
                channels = widths[level]
            if level > 0:
                block.upsamplers.append(self.make_upsampler(channels, up_types[level]))
            self.up_blocks.append(block)

        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], channels, c["norm_eps"])
        self.conv_out = nn.Conv2d(channels, c["out_channels"], 3, padding=1)
        self.task_embedding = None  # MTU sets a table (tasks, width), which fills Cond.task_emb
        self.heads = None           # MT-Diffusion sets a module that reads features, see `forward`
        self.gradient_checkpointing = False

    # The parts of the U. The U-Nets of adm.py differ from this one in them and in `condition`.

    def add_condition(self, width):
        """Make what embeds further conditions, to be added to the embedding of the timestep."""
        c = self.config
        self.add_embedding = None
        if c["addition_embed_type"] is not None:
            self.add_embedding = TimestepEmbedding(
                c["projection_class_embeddings_input_dim"], width)
            if c["projection_class_embeddings_input_dim"] <= 6 * c["addition_time_embed_dim"]:
                raise UserError("U-Net config: addition_time_embed_dim leaves no room for a text")

    def make_resnet(self, cin, cout):
        return ResnetBlock2D(cin, cout, self.config)

    def make_attention(self, level, block_type):
        """Make the attention after a residual block, in a list that is empty where there is none.

        The middle of Stable Diffusion's U-Net always has attention, though 1.5's lowest level has
        none.
        """
        if not block_type.startswith(("CrossAttn", "Mid")):
            return []
        c = self.config
        depth = per_level(c, "transformer_layers_per_block")[level]
        heads = per_level(c, "attention_head_dim")[level]
        return [Transformer2DModel(c["block_out_channels"][level], depth, heads, c)]

    def make_downsampler(self, channels, block_type):
        return Downsample2D(channels)

    def make_upsampler(self, channels, block_type):
        return Upsample2D(channels)

    def forward(self, x, t, context, task=None, added=None):
        """Predict the noise (or v) in x.

        x: (B, Cin, H, W) noisy latents, with what is concatenated to them; any H and W.
        t: (B,) timesteps, or one number. context: (B, S, D) text states.
        task: (B,) rows of the tasks, where a method needs them. added: SDXL's dict, see Cond.

        Returns (B, Cout, H, W). Where `heads` is set, it returns that and what the heads make of
        the features: the input z, the output out, and what the middle block and the last block of
        the way up put out.
        """
        cond = self.condition(x, t, context, task, added)
        run = recompute if self.gradient_checkpointing and torch.is_grad_enabled() else call
        h = self.conv_in(x, cond)                                   # (B, C, H, W)
        skips = [h]
        for block in self.down_blocks:
            h = block(h, cond, skips, run)
        mid = self.mid_block(h, cond, run)                          # (B, C, H / 8, W / 8) in SD 1.5
        h = mid
        for block in self.up_blocks:
            h = block(h, cond, skips, run)
        out = self.conv_out(F.silu(self.conv_norm_out(h)))          # (B, Cout, H, W)
        if self.heads is None:
            return out
        return out, self.heads(dict(z=x, out=out, mid=mid, up=h), cond.t)

    def condition(self, x, t, context, task, added):
        """Embed everything that is not a picture -> Cond."""
        t, temb = self.embed_time(t, x)
        if self.add_embedding is not None:
            # SDXL reads the pooled text, and six numbers: original size, crop corner, target size.
            ids = self.encode(added["time_ids"].flatten(), self.config["addition_time_embed_dim"])
            text = added["text_embeds"].to(ids.dtype)
            temb = temb + self.add_embedding(torch.cat([text, ids.view(len(x), -1)], dim=-1))
        task_emb = None
        if self.task_embedding is not None:
            if task is None:
                raise ValueError("this U-Net has several tasks: pass task (B,), a row per sample")
            task_emb = self.task_embedding(task)
        return Cond(temb, context, t, task, task_emb, added)

    def embed_time(self, t, x):
        """Embed a timestep, or one per sample -> t (B,) and the embedding (B, E)."""
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        return t, self.time_embedding(self.encode(t, self.config["block_out_channels"][0]))

    def encode(self, numbers, width):
        """Encode numbers in fp32, and cast then: in bf16, both 998 and 999 are 1000."""
        c = self.config
        waves = sinusoidal(numbers, width, c["flip_sin_to_cos"], c["freq_shift"])
        return waves.to(self.conv_out.weight.dtype)
