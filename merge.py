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
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from safetensors import safe_open

from folders import HelpFormatter, UserError, command, fetch, new_folder, read_json, weight_files, write_file, write_json

WITHOUT_WEIGHTS = ("tokenizer", "tokenizer_2", "scheduler")
PARTS = ("unet", "heads", "vae", "text_encoder", "text_encoder_2", "image_encoder", *WITHOUT_WEIGHTS)
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
         "F8_E4M3": 1, "F8_E5M2": 1}  # bytes, by safetensors' names
METHODS = ("moe", "routing", "projections", "aggregation")  # keys of a config.json that record what is attached; absent: nothing
# keys of a config.json that say nothing of the weights' meaning
NOT_THE_NETWORK = {"dtype", "torch_dtype", "transformers_version", "architectures", "use_cache", "sample_size", "bos_token_id", "eos_token_id",
                   "pad_token_id"}


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
    low, high = np.where(everywhere, 0, start), np.where(everywhere, T, end)
    if not antithetic:
        return rng.integers(low, high)
    half = rng.integers(low, high, size=size - size // 2)
    return np.concatenate([half, high + low - 1 - half])[:size]


def consistency_loss(prediction, teacher):
    """Eq. 5's second term per sample: predictions (B, ...) of the copy and of the frozen pretrained network -> (B,), in fp32. Of whatever the
    network predicts: the noise in the paper; of v it is the noise's over alpha_bar, as in the first term."""
    return (prediction.float() - teacher.float()).square().flatten(1).mean(1)


class ProjectedConv2d(nn.Conv2d):
    """A convolution followed by P (C, C), the channel projection, which starts as the identity: P (W * x + b) = (P W) * x + P b."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # a P near the identity is lost in half precision
            weight, bias = self.folded()
        return self._conv_forward(x, weight, bias)

    def folded(self):
        return (self.projection @ self.weight.flatten(1)).view_as(self.weight), self.projection @ self.bias


class BlockProjection:
    """Mixed into a block of the U: its output passes P, the tensors for the skips do not."""

    def forward(self, *inputs):
        out = super().forward(*inputs)
        return (self.projection(out[0]), out[1]) if isinstance(out, tuple) else self.projection(out)


def add_projections(unet, placement="convolutions"):
    """Give a U-Net channel projections in place, and return it.

    "convolutions": after the second convolution of each residual block (before its sum) and after each down- and upsampling convolution, where
        they fold exactly.
    "blocks": the official code's, after each down, mid and up block. They do not fold (skips leave before them): the network keeps them,
        config.json records them, and copies merge with them.
    """
    if placement == "blocks":
        if "_class_name" in unet.config:  # something is attached
            raise UserError(f"projections after blocks are for a plain U-Net, not for a {unet.config['_class_name']}")
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            channels, like = block.resnets[-1].conv2.out_channels, unet.conv_out.weight
            block.__class__ = type(f"Projected{type(block).__name__}", (BlockProjection, type(block)), {})
            block.projection = nn.Conv2d(channels, channels, 1, bias=False, device=like.device, dtype=like.dtype)
            nn.init.dirac_(block.projection.weight)
        unet.config |= {"projections": "blocks", "_class_name": f"Projected{type(unet).__name__}"}
        return unet
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
    """Eq. 8: state dict, list of N task vectors of its floating-point tensors, N weights -> state dict of the base's types; sums in fp32."""
    if len(vectors) != len(weights) or not all(map(math.isfinite, weights)):
        raise UserError(f"{len(weights)} weights for {len(vectors)} models: as many, and finite")
    shapes = {key: value.shape for key, value in base.items() if value.is_floating_point()}
    for vector in vectors:
        if different := sorted(key for key in shapes.keys() | vector.keys() if key not in vector or shapes.get(key) != vector[key].shape):
            raise UserError(f"a task vector is not of this model: {different[0]} is missing, unknown or of another shape")
    merged = dict(base)
    for key in shapes:
        total = base[key].float()
        for w, vector in zip(weights, vectors):
            total = total + w * vector[key]
        merged[key] = total.to(base[key].dtype)
    return merged


def spelling(part):
    """What turns the older key names of a part into those that are written today; None drops a key."""
    if part == "vae":
        from vae import older_attention_names
        return older_attention_names
    if part.startswith("text_encoder") or part == "image_encoder":
        from clip import prefixed
        return lambda key: prefixed(key, "vision_model." if part == "image_encoder" else "text_model.")
    return str


def places(folder, rename=str):
    """key -> file, the key there, dtype and shape, of a folder's safetensors."""
    found = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as f:
            found |= {rename(key): (file, key, f.get_slice(key).get_dtype(), f.get_slice(key).get_shape()) for key in f.keys()}
    return {key: place for key, place in found.items() if key is not None}


def read(found, key):
    """{key: tensor}, or {} where it is not. The file is opened anew: a mapped file's pages count as memory until it is closed."""
    if key not in found:
        return {}
    file, own, *_ = found[key]
    with safe_open(file, framework="pt") as f:
        return {key: f.get_tensor(own).clone()}


def merge_files(base, tuned, weights, out, rename=str):
    """Eq. 8 on the weights in folders, into the file `out`, tensor by tensor: one tensor of each model in memory at a time.

    safetensors' own save_file wants them all, and copies them; the format is 8 bytes for the header's length, the header, the tensors' bytes.
    """
    first, others = places(base, rename), [places(folder, rename) for folder in tuned]
    keys = sorted(set(first).union(*others), key=lambda key: (-SIZES[first[key][2]] if key in first else 0, key))  # so that all lie aligned
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key in keys:
        if key in first:
            _, _, dtype, shape = first[key]
            start, end = end, end + SIZES[dtype] * math.prod(shape)
            header[key] = dict(dtype=dtype, shape=shape, data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(out, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            own = read(first, key)
            merged = merge(own, [task_vector(own, read(found, key)) for found in others], weights)[key]
            f.write(merged.contiguous().flatten().view(torch.uint8).numpy())


def search_weights(score, n, grid=tuple(i / 10 for i in range(11)), rounds=5):
    """Coordinate search for the weights of Eq. 8, from 1/N each -> weights, their score.

    score(tuple of N weights) -> float, lower is better: held-out loss, FID, anything. A round tries the whole grid for one weight after
    another; the search ends when a round changes nothing. The paper searches a grid, and says no more.
    """
    scores, best = {}, (1 / n,) * n

    def known(weights):
        if weights not in scores:
            value = score(weights)
            scores[weights] = value if math.isfinite(value) else math.inf
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

    def read_index(path):
        root = fetch(path, "")
        index = read_json(root / "model_index.json")
        return index, [part for part in PARTS if ((root / part).is_dir() if Path(path).is_dir() else (index.get(part) or [None])[0])]

    (index, parts), theirs = read_index(base), [read_index(path)[1] for path in tuned]
    if not parts:
        raise UserError(f"{base} holds none of {', '.join(PARTS)}: there is nothing to merge")
    for part in ("safety_checker", "feature_extractor", "image_encoder"):
        if part in index and part not in parts:  # not copied, so that nobody looks for it
            index |= {part: [None, None]} | ({"requires_safety_checker": False} if part == "safety_checker" else {})
    with new_folder(out) as beside:
        if "base" in index and (Path(base) / index["base"]).exists():  # where the other parts are, as seen from the new place
            index["base"] = os.path.relpath(Path(base) / index["base"], out)
        for part in parts:
            folder = fetch(base, part)
            others = [fetch(path, part) if part in own else folder for path, own in zip(tuned, theirs)]
            shutil.copytree(folder, beside / part, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin", "*.part"))
            if part in WITHOUT_WEIGHTS:
                continue
            name = ("model" if weight_files(folder)[0].name.startswith("model") else "diffusion_pytorch_model") + ".safetensors"
            config = {k: v for k, v in read_json(folder / "config.json").items() if not k.startswith("_") and k not in NOT_THE_NETWORK}
            for other in others:
                told = read_json(other / "config.json")
                if differ := [k for k in (*METHODS, *config) if (k in told or k in METHODS) and told.get(k) != config.get(k)]:
                    raise UserError(f"{other} and {folder} are different networks: {differ[0]} = {told.get(differ[0])!r} and "
                                    f"{config.get(differ[0])!r}")
            write_file(beside / part / name, lambda path: merge_files(folder, others, weights, path, spelling(part)))
        write_json(beside / "model_index.json", index)


def main():
    parser = argparse.ArgumentParser(description="Merge fine-tuned copies of a model: base + sum of w_i (tuned_i - base).",
                                     formatter_class=HelpFormatter)
    parser.add_argument("--base", required=True, help="folder in the Hugging Face layout, or hub id")
    parser.add_argument("--tuned", required=True, nargs="+", help="folders or hub ids, N of them")
    parser.add_argument("--weights", required=True, nargs="+", type=float, help="N weights; the paper searches 0 to 1, and they need not sum to 1")
    parser.add_argument("--out", required=True, help="new folder")
    args = parser.parse_args()
    merge_folders(args.base, args.tuned, args.weights, args.out)
    print(f"{args.base} + " + " + ".join(f"{w:g} ({path} - base)" for w, path in zip(args.weights, args.tuned)) + f" -> {args.out}")


if __name__ == "__main__":
    command(main)
