"""Train the miniature's text tower on the built-in captions.

    python experiments/train_text_tower.py --out runs/clip
    python train.py --task t2i --model scratch --encoders runs/clip --out runs/tiny

Stable Diffusion's text tower was trained beside an image tower on 400 million captions. Here the
image tower is fixed, as in LiT (Zhai et al. 2022, arXiv 2111.07991), and very simple: the principal
components of a picture. From the pooled state of its text, a linear head predicts them.
"""
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import emoji  # noqa: E402
from clip import BOS, CONFIGS, EOS, CLIPText, Tokenizer  # noqa: E402
from hub import (Parser, UserError, command, is_slow_in_bf16, pick_device,  # noqa: E402
                 read_json, replacing, write_json)

WARMUP = 100
SHARES = {"t2i": 0.75, "edit": 0.1, "inpaint": 0.15}


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/clip", help="new folder for the model")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=128, help="texts a step")
    parser.add_argument("--lr", type=float, default=1e-3,
                        help="peak learning rate, after a warm-up and before a cosine to zero")
    parser.add_argument("--components", type=int, default=128,
                        help="principal components of a picture that are predicted")
    parser.add_argument("--device", help="torch device; without it cuda, else mps, else cpu")
    parser.add_argument("--seed", type=int, default=0, help="random seed for weights and data")
    args = parser.parse_args()
    if min(args.steps, args.batch_size) < 1 or not 0 < args.lr < math.inf:
        raise UserError("--steps, --batch-size and --lr must be above 0")
    if not 1 <= args.components <= 3072 or not 0 <= args.seed < 2 ** 62:
        raise UserError("--components must be in 1 .. 3072, and --seed in 0 .. 2 ** 62")
    if Path(args.out).exists():
        raise UserError(f"{args.out} exists; choose another --out")
    return args


def described(task, example):
    """The picture (3, H, W) that a text describes: a caption's, or what an instruction leads to."""
    if task == "inpaint":
        # A removal names the thing that goes: here it is alone, on white.
        return example["source"] - example["target"] + 1
    return example["target"]


def halved(pictures):
    """Pictures (3, 64, 64) -> their pixels at half size, (B, 3072)."""
    return F.avg_pool2d(torch.stack(pictures), 2).flatten(1)


def principal_components(pixels, count):
    """Find the first components of pixels (B, 3072) -> their mean, and directions (3072, count).

    pixels @ directions are codes whose variance is 1 on average.
    """
    mean = pixels.mean(dim=0)
    _, S, V = torch.linalg.svd(pixels - mean, full_matrices=False)
    scale = (len(pixels) / (S[:count] ** 2).mean()).sqrt()
    return mean, V[:count].T * scale


class Predictor(nn.Module):
    """The text tower, and the head that predicts a picture's components from its pooled state."""

    def __init__(self, tokenizer, components):
        super().__init__()
        self.tokenizer = tokenizer
        vocab = tokenizer.vocab
        self.tower = CLIPText({**CONFIGS["tiny"], "vocab_size": len(vocab),
                               "bos_token_id": vocab[BOS], "eos_token_id": vocab[EOS]})
        self.head = nn.Linear(self.tower.width, components)
        # As CLIP, draw first weights from narrow normal distributions, and set biases to zero.
        for module in self.tower.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, texts):
        """Predict the components of what B texts describe -> (B, components)."""
        ids = self.tokenizer(texts)
        # Nothing after the longest text's end token changes a pooled state: the tower is causal.
        longest = (ids == self.tokenizer.vocab[EOS]).int().argmax(dim=1).max()
        return self.head(self.tower(ids[:, :longest + 1].to(self.head.weight.device))[2])


def train(predictor, components, args, device):
    """Train tower and head in place, in bf16 where that is fast.

    components: mean and directions.
    """
    mean, directions = components
    params = list(predictor.parameters())
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    sets = {task: data.builtin(task, "train") for task in SHARES}
    bar = tqdm(range(args.steps), desc="text tower")
    for step in bar:
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / WARMUP, cosine)
        rng = np.random.default_rng((args.seed, step))
        tasks = rng.choice(list(SHARES), size=args.batch_size, p=list(SHARES.values()))
        examples = [sets[task].get(int(rng.integers(len(sets[task]))), rng) for task in tasks]
        code = halved([described(*pair) for pair in zip(tasks, examples)]) - mean
        with torch.autocast(device.type, torch.bfloat16, enabled=not is_slow_in_bf16(device)):
            prediction = predictor([example["prompt"] for example in examples])
        loss = F.mse_loss(prediction.float(), (code @ directions).to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def main():
    args = parse_args()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    tiny = data.ASSETS / "tiny"
    predictor = Predictor(Tokenizer.from_pretrained(tiny), args.components).to(device)
    examples = list(emoji.Builtin("plain", "train"))
    captions = [example["prompt"] for example in examples]
    pixels = halved([example["target"] for example in examples])
    mean, directions = principal_components(pixels, args.components)
    with replacing(args.out) as folder:
        train(predictor, (mean, directions), args, device)
        predictor.tower.save_pretrained(folder / "text_encoder")
        predictor.tokenizer.save_pretrained(folder / "tokenizer")
        write_json(folder / "model_index.json", {
            **read_json(tiny / "model_index.json"), "base": os.path.relpath(tiny, args.out)})

    code = (pixels - mean) @ directions
    with torch.no_grad():
        parts = [captions[i:i + 256] for i in range(0, len(captions), 256)]
        prediction = torch.cat([predictor(part) for part in parts]).cpu()
    nearest = torch.cdist(prediction, code).argmin(dim=1) == torch.arange(len(code))
    explained = 100 - 100 * F.mse_loss(prediction, code).item()
    print(f"{len(code)} training captions explain {explained:.0f} % of the components' variance; "
          f"{100 * nearest.float().mean():.0f} % of the predictions are nearest to their own "
          f"picture; saved in {args.out}")


if __name__ == "__main__":
    command(main)
