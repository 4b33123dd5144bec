"""Train the miniature's text tower on the built-in captions.

    python experiments/train_text_tower.py --out runs/clip
    python train.py --task t2i --model scratch --encoders runs/clip --out runs/tiny

Stable Diffusion's text tower was trained beside an image tower on 400 million captions. Here the
image tower is fixed, as in LiT (Zhai et al. 2022, arXiv 2111.07991), and very simple: the principal
components of a picture. From the pooled state of its text, a linear head predicts them.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
import emoji
from clip import BOS, CONFIGS, EOS, CLIPText, Tokenizer
from hub import between, command, is_slow_in_bf16, pick_device, replacing

SHARES = {"t2i": 0.75, "edit": 0.1, "inpaint": 0.15}


def parse_args():
    parser = common.training_parser(__doc__.splitlines()[0], out="runs/clip", steps=4000,
                                    batch_size=128, lr=1e-3)
    parser.add_argument("--components", type=between(1, 3072), default=128,
                        help="principal components of a picture that are predicted")
    args = parser.parse_args()
    common.refuse_existing(args.out)
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
    sets = {task: data.builtin(task, "train") for task in SHARES}

    def loss_of_step(step):
        rng = np.random.default_rng((args.seed, step))
        tasks = rng.choice(list(SHARES), size=args.batch_size, p=list(SHARES.values()))
        examples = [sets[task].get(int(rng.integers(len(sets[task]))), rng) for task in tasks]
        code = halved([described(*pair) for pair in zip(tasks, examples)]) - mean
        with torch.autocast(device.type, torch.bfloat16, enabled=not is_slow_in_bf16(device)):
            prediction = predictor([example["prompt"] for example in examples])
        return F.mse_loss(prediction.float(), (code @ directions).to(device))

    common.fit(predictor.parameters(), loss_of_step, args, betas=(0.9, 0.98), weight_decay=0.0)


def main():
    args = parse_args()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_pretrained(data.ASSETS / "tiny")
    predictor = Predictor(tokenizer, args.components).to(device)
    examples = list(emoji.Builtin("plain", "train"))
    captions = [example["prompt"] for example in examples]
    pixels = halved([example["target"] for example in examples])
    mean, directions = principal_components(pixels, args.components)
    with replacing(args.out) as folder:
        train(predictor, (mean, directions), args, device)
        predictor.tower.save_pretrained(folder / "text_encoder")
        predictor.tokenizer.save_pretrained(folder / "tokenizer")
        common.borrow_from_tiny(folder, args.out)

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
