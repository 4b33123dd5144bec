"""Stable Diffusion's U-Net in plain PyTorch, under diffusers' names: UNet2DConditionModel without what Stable Diffusion never uses.

Rombach et al. 2022, arXiv 2112.10752. Parameters and config keys are diffusers': a checkpoint of either loads in the other as it is.

A method attaches by swapping sub-modules. What a block may depend on besides its input travels in `Cond`, per sample, to the call sites
conv_in, resnet, transformer_block, norm and ff.

Letters: B batch, C channels, H W latent, L = H W, S text length, D text width, E width of the time embedding.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from folders import UserError, blaming, fetch, load_weights, read_json, save_weights

# diffusers' defaults; a model's config.json, or an entry of CONFIGS, holds the differences.
DEFAULTS = dict(
    sample_size=None, in_channels=4, out_channels=4, flip_sin_to_cos=True, freq_shift=0, layers_per_block=2, norm_num_groups=32,
    norm_eps=1e-5, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(320, 640, 1280, 1280), transformer_layers_per_block=1, cross_attention_dim=1280, attention_head_dim=8,
    use_linear_projection=False, addition_embed_type=None, addition_time_embed_dim=None, projection_class_embeddings_input_dim=None,
    resnet_time_scale_shift="default", upcast_attention=False)  # the last is kept for others to read: attention's softmax runs in fp32 here anyway

# Keys of diffusers that have one meaning here; another value is refused by name, and so is any other key that is not null.
FIXED = dict(
    act_fn="silu", center_input_sample=False, downsample_padding=1, mid_block_scale_factor=1, mid_block_type="UNetMidBlock2DCrossAttn",
    only_cross_attention=False, dropout=0.0, dual_cross_attention=False, resnet_skip_time_act=False,
    resnet_out_scale_factor=1.0, time_embedding_type="positional", conv_in_kernel=3, conv_out_kernel=3, attention_type="default",
    class_embeddings_concat=False, addition_embed_type_num_heads=64)

#     SD 1.5's blocks                 channels   height (of 64)   and upwards
#     down 0   2 x [resnet, attention]     320   64               up 3   3 x [resnet, attention]
#     down 1   2 x [resnet, attention]     640   32               up 2   3 x [resnet, attention]
#     down 2   2 x [resnet, attention]    1280   16               up 1   3 x [resnet, attention]
#     down 3   2 x [resnet]               1280   8                up 0   3 x [resnet]; mid: resnet, attention, resnet
CONFIGS = {
    "tiny": dict(sample_size=16, block_out_channels=(64, 128, 128), layers_per_block=1, cross_attention_dim=128, attention_head_dim=2,
                 down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                 up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")),
    "sd15": dict(sample_size=64, cross_attention_dim=768),
    "sdxl": dict(sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
                 down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
                 up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
                 addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816),
}


class Cond(NamedTuple):
    """What a block may depend on besides its input."""
    temb: torch.Tensor               # (B, E) embedding of t and of `added`
    context: torch.Tensor            # (B, S, D) text states
    t: torch.Tensor                  # (B,) timestep
    task: torch.Tensor | None        # (B,) index of the task
    task_emb: torch.Tensor | None    # (B, width) its embedding, where a method gave the U-Net a table
    added: dict | None               # SDXL: text_embeds (B, 1280), time_ids (B, 6)


# ---------------------------------------------------------------------------------------------------------------------
# Layers that a method may replace take `cond`

class Conv2d(nn.Conv2d):
    def forward(self, x, cond):
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    def forward(self, x, cond):
        return super().forward(x)


class ResnetBlock2D(nn.Module):
    """resample: None, or what doubles or halves height and width inside the block (ADM)."""

    def __init__(self, cin, cout, c, resample=None):
        super().__init__()
        groups, eps = c["norm_num_groups"], c["norm_eps"]
        self.resample, self.scale_shift = resample or nn.Identity(), c["resnet_time_scale_shift"] == "scale_shift"
        self.norm1 = nn.GroupNorm(groups, cin, eps)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * c["block_out_channels"][0], cout * (1 + self.scale_shift))
        self.norm2 = nn.GroupNorm(groups, cout, eps)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else None

    def update(self, x, cond):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        emb = self.time_emb_proj(F.silu(cond.temb))[:, :, None, None]
        if self.scale_shift:  # AdaGN: Dhariwal and Nichol 2021, section 3
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        return self.conv2(F.silu(h))

    def skip(self, x):
        x = self.resample(x)
        return x if self.conv_shortcut is None else self.conv_shortcut(x)

    def forward(self, x, cond):
        return self.skip(x) + self.update(x, cond)


class Attention(nn.Module):
    """Multi-head attention: self-attention without `context`, cross-attention to it with one."""

    def __init__(self, channels, context_dim, heads):
        super().__init__()
        if channels % heads:
            raise UserError(f"U-Net config: attention_head_dim = {heads} (the number of heads) does not divide {channels} channels")
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (project(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)   # (B, L, C) -> (B, heads, L, C/heads)
                   for project, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        # On CPU the fused kernel's backward in bf16 is slower than plain products, as long as these fit.
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] * k.shape[2] <= 2 ** 20:
            y = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, channels, inner):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Dropout(0.0), nn.Linear(4 * channels, channels)])

    def forward(self, x, cond):
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Module):
    def __init__(self, channels, context_dim, heads):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x, cond):                                                 # (B, L, C)
        x = x + self.attn1(self.norm1(x, cond))
        x = x + self.attn2(self.norm2(x, cond), cond.context)
        return x + self.ff(self.norm3(x, cond), cond)


class Transformer2DModel(nn.Module):
    def __init__(self, channels, depth, heads, c):
        super().__init__()
        self.linear = c["use_linear_projection"]
        self.norm = nn.GroupNorm(c["norm_num_groups"], channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(channels, c["cross_attention_dim"], heads) for _ in range(depth)])
        self.proj_out = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x, cond):                                                 # (B, C, H, W)
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        h = h.permute(0, 2, 3, 1).flatten(1, 2).contiguous()                    # (B, L, C)
        h = self.proj_in(h) if self.linear else h
        for transformer_block in self.transformer_blocks:
            h = transformer_block(h, cond)
        h = self.proj_out(h) if self.linear else h
        h = h.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)                    # (B, C, H, W)
        return x + (h if self.linear else self.proj_out(h))


class Downsample2D(nn.Module):
    """padding: 1 on all sides, or 0: on the right and at the bottom only, as DDPM's."""

    def __init__(self, channels, padding=1):
        super().__init__()
        self.conv, self.pad = nn.Conv2d(channels, channels, 3, stride=2, padding=padding), (0, 1 - padding) * 2

    def forward(self, x, cond):
        return self.conv(F.pad(x, self.pad) if any(self.pad) else x)


class Upsample2D(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


# ---------------------------------------------------------------------------------------------------------------------
# The U: one class per direction; a level has attention or not

class DownBlock(nn.Module):
    def __init__(self, cin, cout, depth, heads, last, c):
        super().__init__()
        layers = c["layers_per_block"]
        if depth:
            self.attentions = nn.ModuleList([Transformer2DModel(cout, depth, heads, c) for _ in range(layers)])
        self.resnets = nn.ModuleList([ResnetBlock2D(cin if i == 0 else cout, cout, c) for i in range(layers)])
        self.downsamplers = None if last else nn.ModuleList([Downsample2D(cout)])

    def forward(self, x, cond, run):
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = run(resnet, x, cond)
            if hasattr(self, "attentions"):
                x = run(self.attentions[i], x, cond)
            skips.append(x)
        if self.downsamplers is not None:
            x = run(self.downsamplers[0], x, cond)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    def __init__(self, channels, depth, heads, c):
        super().__init__()
        self.attentions = nn.ModuleList([Transformer2DModel(channels, depth, heads, c)])
        self.resnets = nn.ModuleList([ResnetBlock2D(channels, channels, c) for _ in range(2)])

    def forward(self, x, cond, run):
        for module in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = run(module, x, cond)
        return x


class UpBlock(nn.Module):
    def __init__(self, cin, cout, below, depth, heads, last, c):
        super().__init__()
        layers = c["layers_per_block"] + 1
        if depth:
            self.attentions = nn.ModuleList([Transformer2DModel(cout, depth, heads, c) for _ in range(layers)])
        # Each residual block takes the skip tensor of its mirror image, the last one that of the level above.
        self.resnets = nn.ModuleList([
            ResnetBlock2D((cin if i == 0 else cout) + (below if i == layers - 1 else cout), cout, c) for i in range(layers)])
        self.upsamplers = None if last else nn.ModuleList([Upsample2D(cout)])

    def forward(self, x, cond, skips, run):
        for i, resnet in enumerate(self.resnets):
            x = run(resnet, torch.cat([x, skips.pop()], dim=1), cond)
            if hasattr(self, "attentions"):
                x = run(self.attentions[i], x, cond)
        return x if self.upsamplers is None else self.upsample(x, cond, skips, run)

    def upsample(self, x, cond, skips, run):
        return self.upsamplers[0](x, skips[-1].shape[-2:])  # the skip's size, so that odd sizes work


class TimestepEmbedding(nn.Module):
    def __init__(self, cin, width):
        super().__init__()
        self.linear_1 = nn.Linear(cin, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


def sinusoidal(t, width, flip_sin_to_cos=True, freq_shift=0):
    """Transformer position encoding of t (N,) -> (N, width), in fp32."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / (half - freq_shift))
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()], dim=-1)


def per_level(c, key):
    return list(c[key]) if isinstance(c[key], (list, tuple)) else [c[key]] * len(c["block_out_channels"])


def count(value):
    return type(value) is int and value > 0


def completed(config, defaults, fixed):
    """-> the config with `defaults` filled in, and need(ok, *keys), which refuses these keys' values by name where not ok. A key that is in
    neither table, or has another value than its fixed one, is refused at once."""
    c = {**defaults, **{k: v for k, v in config.items() if k in defaults}}

    def need(ok, *keys):
        if not ok:
            raise UserError("U-Net config: " + ", ".join(f"{k} = {c.get(k, config.get(k))!r}" for k in keys) + " is not implemented")

    for key, value in config.items():
        need(key in defaults or key.startswith("_") or (value == fixed[key] if key in fixed else value is None), key)
    return c, need


def checked(config):
    """-> the whole config, defaults filled in. What this U-Net does not do is refused by name."""
    c, need = completed(config, DEFAULTS, FIXED)
    numbers = ["in_channels", "out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim"]
    for key in numbers + ["sample_size"] * (c["sample_size"] is not None):
        need(count(c[key]), key)
    for key, kinds in (("flip_sin_to_cos", [bool]), ("use_linear_projection", [bool]), ("norm_eps", [float, int]), ("freq_shift", [float, int])):
        need(type(c[key]) in kinds, key)
    widths = c["block_out_channels"]
    need(isinstance(widths, (list, tuple)) and widths and all(count(w) and w % c["norm_num_groups"] == 0 for w in widths),
         "block_out_channels", "norm_num_groups")
    for key, side in (("down_block_types", "Down"), ("up_block_types", "Up")):
        need(isinstance(c[key], (list, tuple)) and len(c[key]) == len(widths)
             and all(n in (f"{side}Block2D", f"CrossAttn{side}Block2D") for n in c[key]), key)
    for key in ("transformer_layers_per_block", "attention_head_dim"):
        need(len(per_level(c, key)) == len(widths) and all(map(count, per_level(c, key))), key)
    extra = "addition_time_embed_dim", "projection_class_embeddings_input_dim"
    need(c["resnet_time_scale_shift"] in ("default", "scale_shift"), "resnet_time_scale_shift")
    need(c["addition_embed_type"] is None or c["addition_embed_type"] == "text_time" and all(count(c[key]) for key in extra),
         "addition_embed_type", *extra)
    return c


class UNet(nn.Module):
    """diffusers' UNet2DConditionModel for Stable Diffusion 1.x, 2.x and XL. config: differences from DEFAULTS, in diffusers' keys."""

    def __init__(self, config):
        super().__init__()
        self.config = c = checked(config)
        widths, n = list(c["block_out_channels"]), len(c["block_out_channels"])
        depths, heads = per_level(c, "transformer_layers_per_block"), per_level(c, "attention_head_dim")  # heads, whatever its name
        down = [depths[i] if "CrossAttn" in c["down_block_types"][i] else 0 for i in range(n)]
        up = [depths[-1 - i] if "CrossAttn" in c["up_block_types"][i] else 0 for i in range(n)]
        E, rev = 4 * widths[0], widths[::-1]
        self.conv_in = Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], E)
        self.add_embedding = TimestepEmbedding(c["projection_class_embeddings_input_dim"], E) if c["addition_embed_type"] else None
        self.task_embedding = None  # a method may set a table (T, width): Cond.task_emb
        self.down_blocks = nn.ModuleList([
            DownBlock(widths[max(i - 1, 0)], widths[i], down[i], heads[i], i == n - 1, c) for i in range(n)])
        self.mid_block = MidBlock(widths[-1], depths[-1], heads[-1], c)
        self.up_blocks = nn.ModuleList([
            UpBlock(rev[max(i - 1, 0)], rev[i], rev[min(i + 1, n - 1)], up[i], heads[-1 - i], i == n - 1, c) for i in range(n)])
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], widths[0], c["norm_eps"])
        self.conv_out = nn.Conv2d(widths[0], c["out_channels"], 3, padding=1)
        self.gradient_checkpointing = False

    def embedded(self, t, x):
        """A timestep, or one a sample -> t (B,) and its embedding (B, E), computed in fp32, then cast to the network's type."""
        c, t = self.config, t.expand(len(x)) if torch.is_tensor(t) else torch.full((len(x),), t, device=x.device)
        numbers = sinusoidal(t, c["block_out_channels"][0], c["flip_sin_to_cos"], c["freq_shift"])
        return t, self.time_embedding(numbers.to(self.conv_out.weight.dtype))

    def condition(self, x, t, context, task, added):
        """-> Cond. The embeddings of numbers are computed in fp32, then cast to the network's type."""
        c, dtype = self.config, self.conv_out.weight.dtype
        t, temb = self.embedded(t, x)
        if self.add_embedding is not None:
            ids = sinusoidal(added["time_ids"].flatten(), c["addition_time_embed_dim"], c["flip_sin_to_cos"], c["freq_shift"])
            temb = temb + self.add_embedding(torch.cat([added["text_embeds"].to(dtype), ids.view(len(x), -1).to(dtype)], dim=-1))
        if self.task_embedding is not None and task is None:
            raise ValueError("this U-Net knows several tasks: pass task (B,), the row of each sample's task")
        return Cond(temb, context, t, task, None if self.task_embedding is None else self.task_embedding(task), added)

    def forward(self, x, t, context, task=None, added=None, return_features=False):
        """x (B, Cin, H, W) noisy latents, with what is concatenated to them; t (B,) or a number; context (B, S, D) text states;
        task (B,) rows; added: SDXL's dict. -> (B, Cout, H, W); with return_features also {"mid", "up"}, the outputs of the mid block
        and of the last up block. H and W may be any size."""
        cond = self.condition(x, t, context, task, added)

        def run(module, *inputs):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                return checkpoint(module, *inputs, use_reentrant=False)
            return module(*inputs)

        x = self.conv_in(x, cond)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, cond, run)
            skips += more
        mid = x = self.mid_block(x, cond, run)
        for block in self.up_blocks:
            x = block(x, cond, skips, run)
        out = self.conv_out(F.silu(self.conv_norm_out(x)))
        return (out, {"mid": mid, "up": x}) if return_features else out

    @classmethod
    def from_pretrained(cls, path_or_hub_id, subfolder="unet", config=None, dtype=torch.float32, attach=lambda unet: unet):
        """config: in place of the folder's own. dtype: of the parameters in memory. attach: gives the U-Net a method's parameters, which the
        folder's weights then fill."""
        folder = fetch(path_or_hub_id, subfolder)
        config = config or read_json(folder / "config.json")
        if (name := config.get("_class_name", "UNet2DConditionModel")) != "UNet2DConditionModel":
            raise UserError(f"{folder} holds a {name}: sample.load_model opens it")
        with torch.device("meta"), blaming(folder / "config.json"):
            unet = attach(cls(config))
        load_weights(unet, folder, dtype=dtype)
        return unet

    def save_pretrained(self, folder, dtype=None):
        """Writes the unet/ folder itself. dtype: of the file's tensors, default the parameters' own."""
        save_weights(self, folder, {"_class_name": "UNet2DConditionModel", **self.config}, dtype=dtype)
