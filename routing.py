"""DTR, denoising task routing: every timestep sees its own window of channels (Park et al., ICLR 2024, arXiv 2310.07138).

    m[t, c] = 1  for  start(t) <= c < start(t) + C_b,   start(t) = round((C - C_b) (t / (T - 1))^alpha),   C_b = floor(beta C)
    z_{l+1} = z_l + Block_l(m_t * z_l)

Near timesteps share most channels, distant ones few: a prior on which denoising tasks are alike, without a parameter. t is the original
timestep, 0..T-1, also where sampling visits only some. The control R-TR draws the C_b channels of each timestep and block at random.

The paper's networks are DiT and ADM (adm.py; that its attention, a residual block as well, is masked alike is our reading). In Stable
Diffusion's U-Net each residual block is treated as ADM's and each transformer block as DiT's: the mask meets what enters the update, the skip
path stays whole, each mask is built for its block's own width. Behind the norm a masked channel is no longer zero (a mean is subtracted, a bias
added), so no product can be left out: routing does not make sampling faster.

    python routing.py                      draws both masks (timestep x channel) and prints how much timesteps share

Letters: B batch, L positions, C channels, T timesteps.
"""
import torch
import torch.nn as nn

from folders import HelpFormatter, UserError, command
from unet import BasicTransformerBlock, ResnetBlock2D
from vae import Attention

MODES = ("dtr", "random")


def task_masks(t, num_channels, alpha=4.0, beta=0.8, num_steps=1000):
    """t (B,) timesteps in [0, num_steps), fractions taken to the nearest -> masks (B, num_channels) of 0. and 1., in fp32.

    As the official code draws them. alpha > 1 moves the window little at low t and much at high t; beta is the share of channels.
    """
    width = int(num_channels * beta)                                            # C_b
    start = ((t.float().round() / (num_steps - 1)) ** alpha * (num_channels - width)).round()[:, None]
    c = torch.arange(num_channels, device=t.device)
    return ((c >= start) & (c < start + width)).float()


def random_masks(num_channels, beta=0.8, num_steps=1000, seed=0, block=0):
    """R-TR: for each timestep floor(beta C) channels at random -> (T, num_channels) bool, a function of seed and block."""
    generator = torch.Generator().manual_seed(seed * 100_003 + block)
    order = torch.rand(num_steps, num_channels, generator=generator).argsort(dim=1)
    return order < int(num_channels * beta)


class Mask(nn.Module):
    """The mask of one block's input, without parameters and without a place in checkpoints."""

    def __init__(self, num_channels, block, alpha, beta, mode, num_steps, seed):
        super().__init__()
        if int(num_channels * beta) < 1:
            raise UserError(f"routing with beta = {beta:g} leaves none of a block's {num_channels} channels; take a larger beta")
        self.num_channels, self.alpha, self.beta, self.num_steps = num_channels, alpha, beta, num_steps
        self.register_buffer("table", random_masks(num_channels, beta, num_steps, seed, block) if mode == "random" else None, persistent=False)

    def forward(self, t):
        """t (B,) -> (B, C)"""
        if self.table is None:
            return task_masks(t, self.num_channels, self.alpha, self.beta, self.num_steps)
        return self.table.index_select(0, t.round().long())


class RoutedResnetBlock2D(ResnetBlock2D):
    """out = skip(x) + update(m * x)"""

    def forward(self, x, cond):                                                 # (B, C, H, W)
        m = self.mask(cond.t).to(x.dtype)[:, :, None, None]
        return self.skip(x) + self.update(m * x, cond)


class RoutedAttention(Attention):
    """ADM's attention: out = x + update(m * x)"""

    def forward(self, x, cond):                                                 # (B, C, H, W)
        m = self.mask(cond.t).to(x.dtype)[:, :, None, None]
        return x + self.update(m * x)


class RoutedTransformerBlock(BasicTransformerBlock):
    """r = m * x, then r = r + update(r) for each update in turn, out = r + (1 - m) * x: x plus the updates, the first of which sees m * x."""

    def forward(self, x, cond):                                                 # (B, L, C)
        m = self.mask(cond.t).to(x.dtype)[:, None]
        return super().forward(m * x, cond) + (1 - m) * x


ROUTED = {  # class of a block -> its routed class, the width of its input
    ResnetBlock2D: (RoutedResnetBlock2D, lambda block: block.norm1.num_channels),
    Attention: (RoutedAttention, lambda block: block.group_norm.num_channels),
    BasicTransformerBlock: (RoutedTransformerBlock, lambda block: block.norm1.normalized_shape[0]),
}


def add_routing(unet, alpha=4.0, beta=0.8, mode="dtr", num_steps=1000, seed=0):
    """Route a U-Net in place and return it. mode: "dtr", or "random" for R-TR, whose draw `seed` fixes. beta 1 is the plain network.

    Upcycled U-Nets can be routed and routed ones upcycled. Parameters keep their names; config.json records the routing.
    """
    if "routing" in unet.config:
        raise UserError(f"this U-Net is routed already: {unet.config['routing']}")
    if not 0 < beta <= 1 or not 0 < alpha < float("inf") or mode not in MODES or num_steps < 2:
        raise UserError(f"cannot route with alpha={alpha}, beta={beta}, mode={mode!r}, num_steps={num_steps}: "
                        f"alpha above 0, beta in (0, 1], mode {' or '.join(MODES)}, at least 2 timesteps")
    device = unet.conv_out.weight.device
    blocks = [(m, kind) for m in unet.modules() for kind in ROUTED if isinstance(m, kind)]
    masks = [Mask(ROUTED[kind][1](m), i, alpha, beta, mode, num_steps, seed) for i, (m, kind) in enumerate(blocks)]
    for (block, kind), mask in zip(blocks, masks):
        block.__class__, block.mask = ROUTED[kind][0], mask.to(device)
    unet.config["routing"] = dict(alpha=alpha, beta=beta, mode=mode, num_steps=num_steps, seed=seed)
    unet.config.setdefault("_class_name", f"Routed{type(unet).__name__}")  # so that no other loader opens the folder and draws wrong pictures
    return unet


def main():
    import argparse
    from pathlib import Path

    from PIL import Image
    parser = argparse.ArgumentParser(description="Draw the masks and print how much timesteps share.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("--channels", type=int, default=320, help="C, a block's input width")
    parser.add_argument("--alpha", type=float, default=4.0, help="the window moves with t to this power (the paper: 4)")
    parser.add_argument("--beta", type=float, default=0.8, help="share of channels that a timestep sees (the paper: 0.8)")
    parser.add_argument("--out", default="samples/routing.png", help="the picture")
    args = parser.parse_args()
    if args.channels < 1 or not 0 < args.beta <= 1 or not 0 < args.alpha < float("inf") or int(args.channels * args.beta) < 1:
        raise UserError(f"--channels {args.channels} --alpha {args.alpha} --beta {args.beta}: channels at least 1, alpha above 0, beta in "
                        "(0, 1] and leaving a channel")
    T = 1000
    both = {"dtr": task_masks(torch.arange(T), args.channels, args.alpha, args.beta, T),
            "random": random_masks(args.channels, args.beta, T).float()}
    out = Path(args.out)
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UserError(f"--out {out}: pictures are written as .png files")
    out.parent.mkdir(parents=True, exist_ok=True)
    border = torch.full((T, 8), 0.5)
    Image.fromarray((torch.cat([both["dtr"], border, both["random"]], dim=1).T * 255).byte().numpy()).save(out)
    print("share of channels in common (1: the same window)")
    print(f"{'t':>6}{'t + 1':>9}{'t + 10':>9}{'t + 100':>9}{'t + 400':>9}   then the same for random masks")
    for t in (0, 200, 400, 599):
        print(f"{t:>6}" + "   ".join("".join(f"{(m[t] * m[t + d]).sum() / m[t].sum():>9.3f}" for d in (1, 10, 100, 400)) for m in both.values()))
    print(f"timesteps from left (t = 0) to right, channels from top to bottom, dtr above random -> {out}")


if __name__ == "__main__":
    command(main)
