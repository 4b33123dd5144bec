"""DiT, the diffusion transformer: diffusers' DiTTransformer2DModel.

Peebles and Xie 2023, "Scalable Diffusion Models with Transformers", arXiv 2212.09748. The latent
is cut into patches of p x p, each patch becomes one token, and a plain transformer works on the
sequence. There is no U: all blocks have the same width and see the whole picture. DTR's main
results are on this network.

The timestep t and the class y reach a block through shifts, scales and gates alone ("adaLN-Zero",
section 3.2):

    c = MLP_t(sinusoids of t) + table[y]                            one vector for each sample
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = Linear(SiLU(c))
    x = x + gate_1 * Attention(norm(x) * (1 + scale_1) + shift_1)
    x = x + gate_2 * MLP(norm(x) * (1 + scale_2) + shift_2)

The linear layer starts at zero. All gates are then zero, so each block starts as the identity, and
the whole network starts as the constant zero, because its last layer is zero too.

The table has one row more than there are classes. The last row means "no class"; it is trained by
dropping one label in ten and used by classifier-free guidance. The network has twice as many output
channels as input channels, and the second half predicts the variance, as in adm.py.

Parameters and config keys have diffusers' names, so that facebook/DiT-XL-2-256's transformer loads
as it is. Three details are those of diffusers and not of the official code: the frequencies of the
sinusoids of t have a freq_shift of 1 (official: 0), the norm before the MLP has an eps of 1e-5
(official: 1e-6), and the positions of a picture of another size are stretched to the size of
training.

DTR attaches from outside: routing.Routed turns a block into block(m x) + (1 - m) x, which is line
for line the official DTR code. Every block has the same width and therefore the same mask; the last
layer is not routed. The random masks of the control R-TR are drawn anew for each block, as in the
official code.

    python dit.py       prints the sizes of all configurations, and draws DiT-XL/2

Letters: B batch, C channels, H W height and width of the latent, p patch size, L = H W / p^2
tokens, D width.
"""
import hub  # noqa: F401  the first import, so that Ctrl-C ends quietly
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from chart import Box, diagram, output_shapes
from hub import Network, Parser, UserError, command, complete, write_png
from unet import Attention, Cond, TimestepEmbedding, call, recompute, sinusoidal

# -------------------------------------------------------------------------------------------------
# Configurations

# diffusers' defaults. A model's config.json, like an entry of CONFIGS, holds the differences.
DEFAULTS = dict(
    sample_size=32,               # height and width of the latents in training
    patch_size=2,                 # p
    in_channels=4,
    out_channels=None,            # null means in_channels; twice as many with a learned variance
    num_layers=28,
    num_attention_heads=16,
    attention_head_dim=72,        # channels of a head; D is this times the number of heads
    attention_bias=True,          # of queries, keys and values
    num_embeds_ada_norm=1000,     # classes, without the row for "no class"
    norm_eps=1e-5,                # of the norm before the MLP; the others have 1e-6
    norm_num_groups=32,           # no effect, as in diffusers: DiT has no group norm
    upcast_attention=False,       # accepted, and without effect here
)

# The values that are implemented, of keys that have a choice of values in diffusers. Older files
# call the network Transformer2DModel, whose other kinds are refused by these keys.
IMPLEMENTED = dict(
    activation_fn=("gelu-approximate",),
    attention_type=("default",),
    norm_elementwise_affine=(False,),
    norm_type=("ada_norm_zero",),
)

# The paper's Table 1 with patches of 2 x 2, for ImageNet at 256 x 256 pixels: latents of 4 x 32 x
# 32, hence 256 tokens. At 512 x 512 pixels only sample_size differs.
CONFIGS = {
    "dit-s": dict(out_channels=8, num_layers=12, num_attention_heads=6, attention_head_dim=64),
    "dit-b": dict(out_channels=8, num_layers=12, num_attention_heads=12, attention_head_dim=64),
    "dit-l": dict(out_channels=8, num_layers=24, num_attention_heads=16, attention_head_dim=64),
    "dit-xl": dict(out_channels=8, num_layers=28, num_attention_heads=16, attention_head_dim=72),
    # For a laptop: pictures of 16 x 16 pixels in ten classes, 64 tokens.
    "dit-tiny": dict(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=32,
        num_embeds_ada_norm=10,
    ),
}


# -------------------------------------------------------------------------------------------------
# Layers

def modulate(x, shift, scale, eps=1e-6):
    """Normalise tokens x (B, L, D), then scale and shift them by vectors of (B, 1, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class Embedding(nn.Module):
    """Embed timesteps (B,) and classes (B,) -> c (B, D). Class number `classes` means no class."""

    def __init__(self, classes, width):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, width)
        self.class_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})

    def forward(self, t, label):
        table = self.class_embedder["embedding_table"]
        # The sinusoids are computed in fp32 and cast then: in bf16, both 998 and 999 are 1000.
        waves = sinusoidal(t, 256, freq_shift=1).to(table.weight.dtype)
        return self.timestep_embedder(waves) + table(label)


class AdaLayerNormZero(nn.Module):
    """Compute from t and the class what modulates a block: six vectors of (B, 1, D).

    emb: the Embedding of the first block; None in the others, which read what it has made. This is
    the paper's network. In diffusers every block has an Embedding, hence this odd place for it.
    """

    def __init__(self, width):
        super().__init__()
        self.emb = None
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, cond):
        embedding = cond.temb                                       # (B, D)
        if self.emb is not None:
            embedding = self.emb(cond.t, cond.added["class_labels"])
        return self.linear(F.silu(embedding))[:, None].chunk(6, dim=-1)


class FeedForward(nn.Module):
    """The MLP: two linear layers and a GELU, without the gate of unet.FeedForward."""

    def __init__(self, width):
        super().__init__()
        # diffusers has a dropout in the middle, which DiT does not use.
        self.net = nn.ModuleList([
            nn.ModuleDict({"proj": nn.Linear(width, 4 * width)}),
            nn.Identity(),
            nn.Linear(4 * width, width),
        ])

    def forward(self, x):
        h = F.gelu(self.net[0]["proj"](x), approximate="tanh")      # (B, L, 4 D)
        return self.net[2](h)


class DiTBlock(nn.Module):
    """Tokens look at each other, then each is transformed by itself. c: the network's config."""

    def __init__(self, width, c):
        super().__init__()
        self.routable_channels = width  # DTR can mask the input of this block
        self.eps = c["norm_eps"]
        self.norm1 = AdaLayerNormZero(width)
        self.attn1 = Attention(width, width, c["num_attention_heads"], c["attention_bias"])
        self.ff = FeedForward(width)

    def forward(self, x, cond):                                     # (B, L, D)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.norm1(cond)
        x = x + gate_1 * self.attn1(modulate(x, shift_1, scale_1))
        return x + gate_2 * self.ff(modulate(x, shift_2, scale_2, self.eps))


class PatchEmbed(nn.Module):
    """Turn a picture into tokens that know their places: (B, C, H, W) -> (B, L, D)."""

    def __init__(self, width, c):
        super().__init__()
        self.base = c["sample_size"] // c["patch_size"]
        # A convolution whose stride is its size is a linear layer on each patch.
        self.proj = nn.Conv2d(c["in_channels"], width, c["patch_size"], c["patch_size"])

    def positions(self, rows, columns, width):
        """Encode the places of a grid as sines and cosines -> (rows * columns, width), fixed.

        The first half of the channels encodes the column and the second half the row. A larger
        grid has finer steps, not larger numbers than the network has seen.
        """
        def encode(count):
            places = torch.arange(count, device=self.proj.weight.device) * (self.base / count)
            return sinusoidal(places, width // 2, flip_sin_to_cos=False)

        across = encode(columns)[None].expand(rows, -1, -1)         # (rows, columns, D / 2)
        down = encode(rows)[:, None].expand(-1, columns, -1)
        return torch.cat([across, down], dim=-1).flatten(0, 1)

    def forward(self, x):
        h = self.proj(x)                                            # (B, D, H / p, W / p)
        rows, columns = h.shape[-2:]
        h = h.flatten(2).transpose(1, 2)                            # (B, L, D)
        return h + self.positions(rows, columns, h.shape[-1]).to(h.dtype)


# -------------------------------------------------------------------------------------------------
# The network

class DiT(Network):
    """A diffusion transformer. config: differences from DEFAULTS, in diffusers' keys.

    Height and width must be multiples of `multiple`, the patch size.
    """
    class_names = ("DiTTransformer2DModel", "Transformer2DModel")
    folder = "transformer"

    def __init__(self, config):
        super().__init__()
        self.config = c = complete(config, DEFAULTS, IMPLEMENTED, "DiT config")
        c["out_channels"] = c["out_channels"] or c["in_channels"]
        width = c["num_attention_heads"] * c["attention_head_dim"]
        patch = c["patch_size"]
        if width == 0 or width % 4 or c["sample_size"] % patch:
            raise UserError(f"DiT config: the width {width} (num_attention_heads times "
                            "attention_head_dim) must be a multiple of 4 above 0, and sample_size "
                            f"= {c['sample_size']} one of patch_size = {patch}")
        self.pos_embed = PatchEmbed(width, c)
        self.transformer_blocks = nn.ModuleList(
            [DiTBlock(width, c) for _ in range(c["num_layers"])])
        self.transformer_blocks[0].norm1.emb = Embedding(c["num_embeds_ada_norm"], width)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, patch * patch * c["out_channels"])
        self.initialise()
        # What other files ask of a network.
        self.multiple = patch
        self.num_class_embeds = c["num_embeds_ada_norm"] + 1        # the last one means no class
        self.task_embedding = None
        self.heads = None
        self.gradient_checkpointing = False

    @property
    def conv_out(self):
        """The last layer, by a U-Net's name: other files ask it for device and type."""
        return self.proj_out_2

    def initialise(self):
        """Initialise as the official code does: Xavier's uniform numbers, zeros, small normals."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        # The patches' convolution counts as the linear layer that it is.
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.data.flatten(1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        for block in self.transformer_blocks:
            # Queries, keys and values are one layer of D x 3 D in the official code, and Xavier's
            # range depends on the sum of both sides: 4 D instead of 2 D.
            for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
                nn.init.xavier_uniform_(layer.weight, gain=0.5 ** 0.5)
            nn.init.zeros_(block.norm1.linear.weight)               # adaLN-Zero
        emb = self.transformer_blocks[0].norm1.emb
        for layer in (emb.timestep_embedder.linear_1, emb.timestep_embedder.linear_2,
                      emb.class_embedder["embedding_table"]):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.proj_out_1.weight)
        nn.init.zeros_(self.proj_out_2.weight)

    def forward(self, x, t, label=None, task=None, added=None):
        """Predict the noise in x, and its variance where the config has the channels for it.

        x: (B, C, H, W) noisy latents. t: (B,) timesteps, or one number.
        label: (B,) classes; num_class_embeds - 1 means none. They may also come as
            added={"class_labels": (B,)}, as for adm.UNet2D, whose third argument is None.
        task: not read; train.py and sample.py pass it to every network.

        Returns (B, C, H, W), or (B, 2 C, H, W) with a variance.
        """
        cond = self.condition(x, t, label, task, added)
        run = recompute if self.gradient_checkpointing and torch.is_grad_enabled() else call
        p = self.multiple
        rows = x.shape[2] // p
        h = self.pos_embed(x)                                       # (B, L, D)
        for block in self.transformer_blocks:
            h = run(block, h, cond)
        shift, scale = self.proj_out_1(F.silu(cond.temb))[:, None].chunk(2, dim=-1)
        h = self.proj_out_2(modulate(h, shift, scale))              # (B, L, p p Cout)
        # Every token becomes its patch again, with the channels last.
        h = h.unflatten(1, (rows, -1)).unflatten(3, (p, p, -1))     # (B, H / p, W / p, p, p, Cout)
        h = h.permute(0, 5, 1, 3, 2, 4)                             # (B, Cout, H / p, p, W / p, p)
        return h.flatten(4, 5).flatten(2, 3)                        # (B, Cout, H, W)

    def condition(self, x, t, label, task, added):
        """Embed the time and the class -> Cond."""
        if label is None:
            label = (added or {}).get("class_labels")
        if label is None:
            raise ValueError('a DiT has classes: pass label, or added={"class_labels": (B,)}')
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        temb = self.transformer_blocks[0].norm1.emb(t, label)       # (B, D)
        return Cond(temb, None, t, task, None, {"class_labels": label})

    # ---------------------------------------------------------------------------------------------
    # On disk, as in diffusers, every block has an embedding. In DiT-XL's file the 27 spare copies
    # are 75 of 750 million numbers. Only where diffusers itself has trained do they differ.

    def copies(self):
        """Name the copies of the first block's embedding: copy's key -> original's key."""
        first = self.transformer_blocks[0].norm1.emb
        return {f"transformer_blocks.{i}.norm1.emb.{name}": f"transformer_blocks.0.norm1.emb.{name}"
                for i, block in enumerate(self.transformer_blocks) if block.norm1.emb is None
                for name, _ in first.named_parameters()}

    def state_dict(self, **options):
        """Return what nn.Module does, and the copies."""
        state = super().state_dict(**options)
        prefix = options.get("prefix", "")
        for key, original in self.copies().items():
            # safetensors refuses two tensors that share their memory.
            state[prefix + key] = state[prefix + original].clone()
        return state

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Load as nn.Module does. Where the copies differ, each block gets its own embedding."""
        copies = self.copies()
        if all(torch.equal(state_dict[key], state_dict[original])
               for key, original in copies.items() if key in state_dict):
            state_dict = {key: value for key, value in state_dict.items() if key not in copies}
        else:
            first = self.transformer_blocks[0].norm1
            for block in self.transformer_blocks[1:]:
                block.norm1.emb = copy.deepcopy(first.emb)
        return super().load_state_dict(state_dict, strict, assign)


# -------------------------------------------------------------------------------------------------
# The demonstration

NOTES = (
    "Left: the network. Middle: one of its blocks, with DTR. Right: what t and the class do.",
    "Blue: the tensor that leaves a box, tokens x channels but for pictures and vectors.",
    "Orange: where DTR's mask m acts, and on how many channels. The updates of a block do not read",
    "what m hides of x, but write to all channels. (1 - m) x carries the hidden ones past them.",
)


def network_boxes(config):
    """Describe a DiT -> its boxes and the arrows between them."""
    with torch.device("meta"):
        dit = DiT(config)
        c = dit.config
        x = torch.empty(1, c["in_channels"], c["sample_size"], c["sample_size"])
        shapes = output_shapes(dit, x, 0, torch.tensor([0]))
    block = dit.transformer_blocks[0]
    tokens = shapes[block]
    mask = str(block.routable_channels)
    boxes = [
        Box(0, 0, "z_t", tuple(x.shape[1:])),
        Box(0, 1, "each patch becomes a token", shapes[dit.pos_embed]),
        Box(0, 2, f"{c['num_layers']} transformer blocks", tokens, mask),
        Box(0, 3, "norm, scaled and shifted by c", tokens),
        Box(0, 4, "linear layer: tokens become patches", shapes[dit.proj_out_2]),
        Box(0, 5, "noise and variance", shapes[dit]),
        Box(1, 0, "x", tokens),
        Box(1, 1, "m x", tokens, mask),
        Box(1, 2, "+ gate_1 attention(norm)", shapes[block.attn1]),
        Box(1, 3, "+ gate_2 MLP(norm)", shapes[block.ff]),
        Box(1, 4, "+ (1 - m) x", tokens),
        Box(2, 0, "t, class"),
        Box(2, 1, "c, for all blocks", shapes[block.norm1.emb]),
        Box(2, 2, "shifts, scales and gates", shapes[block.norm1.linear]),
    ]
    down = [(i, i + 1) for i in range(len(boxes) - 1) if boxes[i].column == boxes[i + 1].column]
    return boxes, down + [(13, 8), (13, 9)]


def main():
    from train import count_flops
    parser = Parser("Print the sizes of the configurations, and draw DiT-XL/2.")
    parser.add_argument("--out", default="samples/dit.png", help="file for the picture")
    args = parser.parse_args()
    print("GMACs are billions of multiplications, each with its addition, for one forward pass of")
    print("one picture. The paper calls them Gflops (DiT-XL/2: 118.64, with 675 M parameters).")
    print("config    blocks  width  heads  tokens   parameters    GMACs")
    for name, config in CONFIGS.items():
        with torch.device("meta"):      # tensors have shapes but no memory
            dit = DiT(config)
        parameters = sum(p.numel() for p in dit.parameters())
        # The counter takes a multiplication and an addition for two.
        gmacs = count_flops(dit) / 2e9
        print(f"{name:<8}{len(dit.transformer_blocks):>8}{dit.proj_out_1.in_features:>7}"
              f"{dit.config['num_attention_heads']:>7}{dit.pos_embed.base ** 2:>8}"
              f"{parameters:>13,}{gmacs:>9.2f}")
    write_png(args.out, diagram(*network_boxes(CONFIGS["dit-xl"]), NOTES))
    print(args.out)


if __name__ == "__main__":
    command(main)
