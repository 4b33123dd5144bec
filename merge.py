"""DeMe: decouple a diffusion model by timestep range, fine-tune one copy a range, merge their weights (Ma et al., CVPR 2025, arXiv 2410.06664).

    ranges    [ceil(i T / N), ceil((i + 1) T / N)),  i = 0..N-1
    Eq. 5     || eps - eps_i(x_t, t) ||^2 + || eps_theta(x_t, t) - eps_i(x_t, t) ||^2         theta: the frozen pretrained network
    Eq. 6     t uniform in range i with probability 1 - p, in [0, T) with probability p
    Eq. 7     before merging, step t uses copy floor(t N / T): sample.py --ensemble
    Eq. 8     theta_m = theta + sum_i w_i tau_i,   tau_i = theta_i - theta

    python merge.py --base A --tuned B C D --weights .3 .3 .4 --out E         any folders in the Hugging Face layout

Letters: N copies, T timesteps, C channels, P projection.
"""
import argparse
import copy
import math
import shutil
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file

from unet import UserError, command, fetch, read_json, weight_files, write_file

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder", "tokenizer", "tokenizer_2", "scheduler")


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning one copy

def timestep_ranges(T, n):
    """N ranges [start, end) that cover 0..T-1, such that t lies in number floor(t N / T), as Eq. 7 chooses."""
    if not 1 <= n <= T:
        raise UserError(f"{n} timestep ranges: from 1 to {T}")
    return [(-(-i * T // n), -(-(i + 1) * T // n)) for i in range(n)]


def sample_timesteps(t_range, T, p_global, rng, size, antithetic=False):
    """Eq. 6 -> (size,) timesteps, from a NumPy generator. Each sample draws for itself whether it is global.

    antithetic: as the official code does, one draw for the whole batch, and the second half mirrors the first (high + low - 1 - t).
    """
    start, end = t_range
    if not (0 <= start < end <= T and 0 <= p_global <= 1):
        raise UserError(f"timestep range {start} {end} with a global share of {p_global}: 0 <= start < end <= {T}, the share from 0 to 1")
    everywhere = rng.random(1 if antithetic else size) < p_global
    low, high = everywhere * 0 + ~everywhere * start, everywhere * T + ~everywhere * end
    if not antithetic:
        return rng.integers(low, high)
    half = rng.integers(low, high, size=size - size // 2)
    return torch.cat([torch.from_numpy(half), torch.from_numpy(high + low - 1 - half)])[:size].numpy()


def consistency_loss(prediction, teacher):
    """Eq. 5's second term per sample: predictions (B, ...) of the copy and of the frozen pretrained network -> (B,), in fp32."""
    return (prediction.float() - teacher.float()).square().flatten(1).mean(1)


class ProjectedConv2d(nn.Conv2d):
    """A convolution followed by P (C, C), the channel projection, which starts as the identity: P (W * x + b) = (P W) * x + P b."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # a P near the identity is lost in half precision
            weight, bias = self.folded()
        return self._conv_forward(x, weight, bias)

    def folded(self):
        return (self.projection @ self.weight.flatten(1)).view_as(self.weight), self.projection @ self.bias


def add_projections(unet):
    """Give a U-Net channel projections in place, and return it: after the second convolution of each residual block (before its sum) and after
    each down- and upsampling convolution, where they fold exactly. The official code's follow whole blocks, which do not fold."""
    for name, module in unet.named_modules():
        if name.endswith((".conv2", "samplers.0.conv")) and type(module) is nn.Conv2d:
            module.__class__ = ProjectedConv2d
            module.projection = nn.Parameter(torch.eye(module.out_channels, device=module.weight.device, dtype=module.weight.dtype))
    return unet


@torch.no_grad()
def fold_projections(unet):
    """-> a copy with the projections multiplied into the convolutions: the U-Net it was before `add_projections`, with other weights."""
    unet = copy.deepcopy(unet)
    for module in unet.modules():
        if type(module) is ProjectedConv2d:
            module.weight.data, module.bias.data = module.folded()
            del module.projection
            module.__class__ = nn.Conv2d
    return unet


# ---------------------------------------------------------------------------------------------------------------------
# Merging

def task_vector(base, tuned):
    """tau = tuned - base, state dicts -> a dict of fp32 tensors. UserError names a missing key or another shape, and integers that differ."""
    for key in sorted(base.keys() ^ tuned.keys()):
        raise UserError(f"the models have different parts: {key} is only in the {'base' if key in base else 'tuned one'}")
    for key, value in base.items():
        if value.shape != tuned[key].shape:
            raise UserError(f"the models differ in the shape of {key}: {tuple(value.shape)} and {tuple(tuned[key].shape)}")
        if not value.is_floating_point() and not torch.equal(value, tuned[key]):
            raise UserError(f"{key} holds integers, and they differ: there is nothing between them")
    return {key: tuned[key].float() - value.float() for key, value in base.items() if value.is_floating_point()}


def merge(base, vectors, weights):
    """Eq. 8: state dict, list of N task vectors, N weights -> state dict of the base's types; sums are taken in fp32."""
    if len(vectors) != len(weights) or not all(map(math.isfinite, weights)):
        raise UserError(f"{len(weights)} weights for {len(vectors)} models: as many, and finite")
    merged = dict(base)
    for key in {key for vector in vectors for key in vector}:
        total = base[key].float()
        for w, vector in zip(weights, vectors):
            total = total + w * vector[key]
        merged[key] = total.to(base[key].dtype)
    return merged


def merged_tensors(base, tuned, weights):
    """Folders of one part -> (key, merged tensor) one after another, which needs the memory of one tensor of each."""
    def where(folder):
        places = {}
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as f:
                places |= dict.fromkeys(f.keys(), file)
        return places

    def read(places, key):  # opened anew for each tensor: a mapped file's pages would count as memory until it is closed
        if key not in places:
            return {}
        with safe_open(places[key], framework="pt") as f:
            return {key: f.get_tensor(key).clone()}

    first, others = where(base), [where(folder) for folder in tuned]
    for key in sorted(set(first).union(*others)):
        own = read(first, key)
        yield key, merge(own, [task_vector(own, read(places, key)) for places in others], weights)[key]


def search_weights(score, n, grid=tuple(i / 10 for i in range(11)), rounds=5):
    """Coordinate search for the weights of Eq. 8, from 1/N each -> weights, their score.

    score(tuple of N weights) -> float, lower is better: held-out loss, FID, anything. A round tries the whole grid for one weight after
    another; the search ends when a round changes nothing. The paper searches a grid, and says no more.
    """
    scores, best = {}, (1 / n,) * n

    def known(weights):
        if weights not in scores:
            scores[weights] = score(weights)
        return scores[weights]

    for _ in range(rounds):
        before = best
        for i in range(n):
            best = min([best, *[best[:i] + (w,) + best[i + 1:] for w in grid]], key=known)
        if best == before:
            break
    return best, known(best)


def merge_folders(base, tuned, weights, out):
    """Eq. 8 on model folders or hub ids, part by part; what a tuned folder lacks, and what has no weights, is the base's. Nothing is written
    under `out` before all is done."""
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists; choose another --out")
    if len(weights) != len(tuned):
        raise UserError(f"{len(weights)} weights for {len(tuned)} models: give as many")

    def parts(path):
        root = fetch(path, "")
        return [part for part in PARTS if ((root / part).is_dir() if Path(path).is_dir() else read_json(root / "model_index.json").get(part))]

    beside = out.with_name(out.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for part in parts(base):
            folder, others = fetch(base, part), [fetch(path, part) if part in parts(path) else fetch(base, part) for path in tuned]
            shutil.copytree(folder, beside / part, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin", "*.part"))
            if not any(folder.glob("*.safetensors")):
                continue
            config = {k: v for k, v in read_json(folder / "config.json").items() if not k.startswith("_") and k != "dtype"}
            for other in others:
                theirs = read_json(other / "config.json")
                if differ := [k for k in config if k in theirs and theirs[k] != config[k]]:
                    raise UserError(f"{other} and {folder} are different networks: {differ[0]} = {theirs[differ[0]]!r} and {config[differ[0]]!r}")
            name = ("model" if weight_files(folder)[0].name.startswith("model") else "diffusion_pytorch_model") + ".safetensors"
            tensors = dict(merged_tensors(folder, others, weights))
            write_file(beside / part / name, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        shutil.copy(fetch(base, "") / "model_index.json", beside)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description="Merge fine-tuned copies of a model: base + sum of w_i (tuned_i - base).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--base", required=True, help="folder in the Hugging Face layout, or hub id")
    parser.add_argument("--tuned", required=True, nargs="+", help="folders or hub ids, N of them")
    parser.add_argument("--weights", required=True, nargs="+", type=float, help="N weights; the paper searches 0 to 1, and they need not sum to 1")
    parser.add_argument("--out", required=True, help="new folder")
    args = parser.parse_args()
    merge_folders(args.base, args.tuned, args.weights, args.out)
    print(f"{args.base} + " + " + ".join(f"{w:g} ({path} - base)" for w, path in zip(args.weights, args.tuned)) + f" -> {args.out}")


if __name__ == "__main__":
    command(main)
