"""DTR, denoising task routing: every timestep sees its own window of each block's channels.

Park et al., ICLR 2024, arXiv 2310.07138. A network that denoises at T noise levels learns T tasks.
DTR tells it which of them are alike, without a parameter: near timesteps share most of their
channels, distant ones few.

    z_{l+1} = z_l + Block_l(m_t * z_l)

Block_l stands for the updates alone, without the residual path.

    the official code, t = 0..T-1, c = 0..C-1:
        start(t) = round((C - C_b) (t / (T - 1))^alpha),  C_b = floor(beta C)
        m[t, c] = 1  where  start(t) <= c < start(t) + C_b,  else 0

    the paper, t = 1..T, c = 1..C:
        edge(t) = round((C - C_b) (t / T)^alpha)
        m[t, c] = 1  where  edge(t - 1) < c <= edge(t) + C_b,  else 0

This file computes the first formula, the code's. Both windows slide from the first channels to the
last. With t and c from 0, the paper's is edge(t) <= c < edge(t + 1) + C_b: wider where the edge
moves, else C_b wide. For alpha >= 1 an edge moves by at most (C - C_b) alpha / T channels a
timestep, but for rounding. With alpha = 4 and beta = 0.8 the two differ by one channel at DiT's
widths and by two at the widest blocks of a U-Net. t is the original timestep, also where sampling
visits only some. The control R-TR (random task routing, mode "random") draws C_b channels at random
for each t.

Two timesteps share what both windows cover, C_b - |start(t) - start(s)| channels where this is
positive. As a share of C_b it is, but for rounding,

    1 - ((1 - beta) / beta) |u^alpha - v^alpha|,    u = t / (T - 1),  v = s / (T - 1)

With beta = 0.8 the first and the last timestep share 0.75. Neighbours share all but about
((1 - beta) / beta) alpha u^(alpha - 1) / (T - 1), which with alpha = 4 is next to nothing at low t.

Where we differ from the official code, or had none to follow: it exists for DiT only, whose block
masks its input once and adds every update to the unmasked z. Masking the input of a residual
block's update in ADM's and in Stable Diffusion's U-Net, with a skip path that stays whole, is our
reading of the paper, and so is the masking of ADM's attention. Stable Diffusion's transformer block
is treated as DiT's.

One thing is different in a U-Net. A residual block of the upward path reads [backbone, skip] side
by side: at low t the window hides skip channels only, at the highest t backbone channels only; in
DiT no channel has a special role. The mode "halves" gives backbone and skip a window each, which is
our own control for this. And everywhere a norm follows the mask, after which hidden
channels are no longer zero. So no product can be left out, and a routed network is not faster.

    python routing.py         draws both masks and prints how much the timesteps share

Letters: z_l features that enter block l, alpha exponent of the window's shift, beta share of the
channels that a timestep sees, C_b their number, B batch, L positions, C channels, T timesteps.
"""
import hub  # noqa: F401  the first import, so that Ctrl-C ends quietly
import functools
import math

import torch
import torch.nn as nn
from PIL import Image

from chart import arrange, numbers, plot
from hub import Parser, UserError, command, write_png

MODES = ("dtr", "random", "halves")


def task_masks(t, num_channels, alpha=4.0, beta=0.8, num_steps=1000):
    """Compute the masks of a batch of timesteps: t (B,) -> (B, num_channels) of 0. and 1., in fp32.

    t: timesteps in [0, num_steps); a fraction counts as the nearest whole one.
    alpha: above 1, the window moves little at low t and much at high t.
    beta: the share of the channels that a timestep sees.
    """
    width = int(num_channels * beta)                                            # C_b
    # With alpha = 4 the window has moved by 6 % of its way at half of T. Most of the channels that
    # change hands do so at high t, where the pictures are nearly all noise.
    moved = (t.float().round() / (num_steps - 1)) ** alpha
    start = (moved * (num_channels - width)).round()[:, None]                   # (B, 1)
    c = torch.arange(num_channels, device=t.device)
    return ((c >= start) & (c < start + width)).float()


def side_by_side(t, widths, **settings):
    """Mask each part of a concatenation by itself: t (B,), widths -> (B, sum of the widths)."""
    return torch.cat([task_masks(t, width, **settings) for width in widths], dim=1)


def concatenated_widths(network):
    """Map the blocks of a U-Net that read [backbone, skip] to the widths of these two."""
    widths = {}
    if not hasattr(network, "up_blocks"):
        return widths               # a DiT concatenates nothing
    backbone = network.mid_block.resnets[-1].conv2.out_channels
    for level in network.up_blocks:
        for block in level.resnets:
            widths[block] = (backbone, block.routable_channels - backbone)
            backbone = block.conv2.out_channels
    return widths


def random_masks(num_channels, beta=0.8, num_steps=1000, seed=0, block=0):
    """Draw R-TR's masks: floor(beta C) channels for each timestep -> (T, num_channels) of bool.

    The draw is a function of seed and block, so it needs no place in a checkpoint.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + block)
    # On the CPU even where a model is built on the meta device: no file holds these values.
    values = torch.rand(num_steps, num_channels, generator=generator, device="cpu")
    # Sorting random numbers gives a random permutation of 0 .. C-1; C_b of its entries are below
    # C_b.
    return values.argsort(dim=1) < int(num_channels * beta)


class RandomMask(nn.Module):
    """Look up R-TR's masks of one block: t (B,) -> (B, C)."""

    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", table, persistent=False)                  # (T, C)

    def forward(self, t):
        return self.table.index_select(0, t.round().long())


class Routed:
    """A mix-in: `add_routing` replaces a block's class by a subclass of Routed and the old class.

    super().forward is then the unrouted block. The paper's z is x here.
    """

    def forward(self, x, cond):                          # pictures (B, C, H, W), tokens (B, L, C)
        m = self.mask(cond.t).to(x.dtype)                                       # (B, C)
        m = m[:, :, None, None] if x.dim() == 4 else m[:, None]
        if hasattr(self, "skip"):
            # A residual block's skip path may change width and size, and is never masked.
            return self.skip(x) + self.update(m * x, cond)
        # A transformer or attention block. The plain one returns m x + updates; adding (1 - m) x
        # gives x + updates, as the official code does for DiT.
        return super().forward(m * x, cond) + (1 - m) * x


def add_routing(network, alpha=4.0, beta=0.8, mode="dtr", num_steps=1000, seed=0):
    """Route a network in place, and return it.

    mode: "dtr", "random" for R-TR, whose draw `seed` fixes (each block has a draw of its own), or
    "halves", DTR with two windows where a U-Net concatenates.
    beta = 1 is the plain network. Every block that has `routable_channels` is routed, with masks
    for that many channels. Parameters keep their names; config.json records the routing.
    """
    if "routing" in network.config:
        raise UserError(f"this network is routed already: {network.config['routing']}")
    # U-Nets and DiT mark the blocks that can be routed.
    blocks = [module for module in network.modules() if hasattr(module, "routable_channels")]
    parts = {block: (block.routable_channels,) for block in blocks}
    if mode == "halves":
        parts |= concatenated_widths(network)
    least = min(map(min, parts.values()))
    if (not 1 <= beta * least <= least or not 0 < alpha < math.inf
            or mode not in MODES or num_steps < 2):
        raise UserError(f"cannot route with alpha={alpha}, beta={beta}, mode={mode!r}, "
                        f"num_steps={num_steps}: alpha is above 0, beta in (0, 1] and leaves one "
                        f"of {least} channels, mode {' or '.join(MODES)}, num_steps above 1")
    settings = dict(alpha=alpha, beta=beta, num_steps=num_steps)
    device = next(network.parameters()).device
    for i, block in enumerate(blocks):
        kind = type(block)
        block.__class__ = type(f"Routed{kind.__name__}", (Routed, kind), {})
        if mode == "random":
            table = random_masks(block.routable_channels, beta, num_steps, seed=seed, block=i)
            block.mask = RandomMask(table if device.type == "meta" else table.to(device))
        else:
            # Blocks of equal width have equal masks, which are computed anew in every forward pass.
            block.mask = functools.partial(side_by_side, widths=parts[block], **settings)
    network.config["routing"] = dict(mode=mode, seed=seed, **settings)
    # A class name of its own, so that no other program opens the folder and draws without masks.
    name = network.config.get("_class_name", type(network).__name__)
    network.config["_class_name"] = f"Routed{name}"
    return network


def draw_mask(name, mask):
    """Draw a mask (T, C), t from left to right and channels from top to bottom."""
    T, C = mask.shape
    pixels = Image.fromarray((mask.T * 255).byte().numpy())
    return plot(name, numbers("timestep", 0, T - 1), numbers("channel", C - 1, 0),
                background=pixels, size=(T, C))


def main():
    parser = Parser("Draw the masks of DTR and R-TR, and print how much timesteps share.")
    parser.add_argument("--out", default="samples/routing.png", help="file for the picture")
    args = parser.parse_args()
    # R-TR hides as many channels. If it helped as much, the sharing would not be what helps; in the
    # paper it harms.
    masks = {"DTR": task_masks(torch.arange(1000), 320),
             "R-TR (random)": random_masks(320).float()}                        # (T, C) each

    print("share of its channels that timestep t has in common with")
    print("masks             t    t + 1   t + 10  t + 100  t + 400      999")
    for name, mask in masks.items():
        for t in (0, 200, 400, 599):
            shares = mask[[t + 1, t + 10, t + 100, t + 400, 999]] @ mask[t] / mask[t].sum()
            print(f"{name:<14}{t:>5}" + "".join(f"{share:>9.3f}" for share in shares))
    sheet = arrange([draw_mask(name, mask) for name, mask in masks.items()])
    write_png(args.out, sheet)
    print(f"{args.out}: t from left to right, channels from top to bottom, white where seen")


if __name__ == "__main__":
    command(main)
