"""DeMe: fine-tune one copy of a diffusion model per timestep range, then merge their weights.

Ma et al., Decouple-Then-Merge, CVPR 2025, arXiv 2410.06664. Different timesteps pull the weights in
different directions, so each copy trains on its own range, where it is not disturbed by the others.
Adding up what the copies have learned gives one network again, as fast as the pretrained one.

    ranges   copy i learns t in [ceil(i T / N), ceil((i + 1) T / N)),   i = 0 .. N-1
    Eq. 5    || eps - eps_i(x_t, t) ||^2 + || eps_theta(x_t, t) - eps_i(x_t, t) ||^2
             (averaged over C, H and W; train.py adds up the two, the second is `consistency_loss`)
    Eq. 6    t is uniform in range i with probability 1 - p, in [0, T) with probability p
    Eq. 7    before merging, copy floor(t N / T) denoises at t: sample.py --ensemble
    Eq. 8    theta_m = theta + sum_i w_i tau_i,   tau_i = theta_i - theta
             channel projection of features F: P F, where P (C, C) starts at the identity; the
             paper calls the matrix W

theta is the frozen pretrained network, theta_i is copy i, and eps_theta and eps_i are the noises
that they predict in x_t, where eps is the true one. w_i is a weight for each copy, and p is a
share. We differ from the paper and its official code:

    - Ranges and copies count from 0, and ceil cuts the timesteps where N does not divide T.
    - Every sample decides for itself whether it is drawn globally; the official code decides once
      per batch, and draws half of the timesteps as mirror images of the other half.
    - The second term of Eq. 5 compares what the networks predict, which for the miniature is v,
      not the noise.
    - Projections are an option here; the paper trains with them.
    - By default they follow convolutions K and are folded before merging. Eq. 8 then adds up the
      products P_i K_i, where the paper merges its matrices and the other weights separately.
    - Where the paper only says "grid search", we search one weight after the other.

    python merge.py                                        tunes two copies, draws their plane
    python merge.py --base A --tuned B C --weights .5 .5 --out D
    python merge.py --search --base A --tuned B C --task t2i --out D

Letters: N copies, T timesteps, B batch, C channels, M held-out examples, P projection.
"""
import hub  # noqa: F401  the first import, so that Ctrl-C ends quietly
import copy
import functools
import itertools
import math
import reprlib
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import save_file

from chart import arrange, cells, table
from clip import Tokenizer
from diffusion import Diffusion
from hub import (Parser, UserError, blaming, command, fetch, find_index, older_attention_names,
                 open_weights, pick_device, read_json, replacing, weight_files, write_json,
                 write_png)

# Keys of a U-Net's config.json that record an attached method; absent or null: it is not attached.
METHODS = dict(moe=None, routing=None, aggregation=None)


# -------------------------------------------------------------------------------------------------
# Decoupling: what the training of one copy needs

def timestep_ranges(T, n):
    """Cut 0 .. T-1 into n ranges [start, end). Timestep t lies in number floor(t n / T), Eq. 7."""
    if not 1 <= n <= T:
        raise UserError(f"{n} timestep ranges are not possible: from 1 to {T} are")
    # The first t with t n / T >= i. The paper's i T / N is the same where N divides T.
    edges = [-(-i * T // n) for i in range(n + 1)]
    return list(zip(edges, edges[1:]))


def sample_timesteps(t_range, T, p_global, rng, size):
    """Draw timesteps for one copy (Eq. 6) -> (size,) integers, from the NumPy generator `rng`.

    t_range: (start, end) of the copy. p_global: the paper's p, 0.3 in the official code. The global
    draws keep a copy from forgetting the rest, so that it stays close enough to merge.
    """
    start, end = t_range
    if not (0 <= start < end <= T and 0 <= p_global <= 1):
        raise UserError(f"timestep range {start} {end} with a global share of {p_global}: it takes "
                        f"0 <= start < end <= {T} and a share from 0 to 1")
    everywhere = rng.random(size) < p_global                                    # (size,) of bool
    low = np.where(everywhere, 0, start)
    high = np.where(everywhere, T, end)
    return rng.integers(low, high)                                              # high is excluded


def consistency_loss(prediction, teacher):
    """Compare the predictions (B, C, H, W) of a copy and of the frozen pretrained network -> (B,).

    The second term of Eq. 5, in fp32: the square's mean over C, H and W. Where the networks predict
    v, it is the squared difference of the noises that they imply, divided by alpha_bar, and so is
    the first term.
    """
    # The paper weighs both terms alike, so the best prediction lies half way between the mean noise
    # at x_t and what the teacher says.
    return (prediction.float() - teacher.float()).square().flatten(1).mean(1)


# -------------------------------------------------------------------------------------------------
# Channel projections: the paper finds that tuning on one range changes features along channels.
#
# P mixes the channels of one position u. A convolution K adds up its input's channels d and shifts
# v. So P right after K is another convolution, P K, with the bias P b:
#
#     (P (K * x + b))_c(u) = sum_e P_ce (sum_{d,v} K_ed(v) x_d(u + v) + b_e)
#                          = sum_{d,v} (sum_e P_ce K_ed(v)) x_d(u + v) + sum_e P_ce b_e
#
# After a residual block's sum it would be P (s + K * h + b) = P s + (P K) * h + P b, and the skip
# path s has no weights that could take up P where the width stays. Nor can the next layers: a group
# norm and a SiLU come first, and norm(P x) is not P norm(x). So P folds right after a convolution,
# before any sum.

class ProjectedConv2d(nn.Conv2d):
    """A convolution K and then P (C, C) on its channels: P (K * x + b) = (P K) * x + P b."""

    def forward(self, x):
        # bf16 has no number between 1 and 1.008: a P near the identity would be lost.
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.folded()
        return self._conv_forward(x, weight, bias)

    def folded(self):
        """Multiply the projection into the convolution -> its weight and bias."""
        weight = self.projection @ self.weight.flatten(1)                       # (C, C_in k k)
        return weight.view_as(self.weight), self.projection @ self.bias


def project_output(block, inputs, out):
    """Project the output (B, C, H, W) of a block, after the block has stored its skip tensors."""
    return block.projection(out)


def add_projections(unet, placement="convolutions"):
    """Give a U-Net channel projections in place, each the identity at first, and return it.

    "convolutions": after the second convolution of each residual block, before its sum, and after
    each convolution that halves or doubles the size. fold_projections removes them exactly.
    "blocks": as in the official code, after each down, mid and up block. These do not all fold:
    some blocks end in a residual sum, and others have passed on their output as a skip before. The
    network keeps them, and they are merged like all weights.
    """
    if placement == "convolutions":
        for name, module in unet.named_modules():
            if name.endswith((".conv2", "samplers.0.conv")) and type(module) is nn.Conv2d:
                # The convolution keeps its parameters and their names; P comes beside them.
                module.__class__ = ProjectedConv2d
                module.projection = nn.Parameter(torch.eye(module.out_channels).to(module.weight))
        return unet

    if any(unet.config.get(key) for key in (*METHODS, "projections")):
        raise UserError("projections after blocks are for a plain U-Net, and this one has a method "
                        "attached already")
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        channels = block.resnets[-1].conv2.out_channels
        block.projection = nn.Conv2d(channels, channels, 1, bias=False).to(unet.conv_out.weight)
        nn.init.dirac_(block.projection.weight)
        block.register_forward_hook(project_output)
    # Under a class name of its own, no other loader opens the folder and draws wrong pictures.
    unet.config["projections"] = "blocks"
    unet.config["_class_name"] = f"Projected{type(unet).__name__}"
    return unet


@torch.no_grad()
def fold_projections(unet):
    """Copy a U-Net, with the projections after convolutions multiplied into their weights."""
    unet = copy.deepcopy(unet)
    for module in unet.modules():
        if type(module) is ProjectedConv2d:
            # What remains is the U-Net as it was before add_projections, with other weights.
            module.weight.data, module.bias.data = module.folded()
            del module.projection
            module.__class__ = nn.Conv2d
    return unet


# -------------------------------------------------------------------------------------------------
# Merging: Eq. 8 on state dicts, and the search for its weights

def check_shapes(base, other, name):
    """Raise a UserError at the first tensor that two models do not share, in name and in shape."""
    for key in sorted(base.keys() | other.keys()):
        ours, theirs = [tuple(state[key].shape) if key in state else "none"
                        for state in (base, other)]
        if ours != theirs:
            raise UserError(f"{name} and the base are different networks: the shape of {key} is "
                            f"{theirs}, in the base {ours}")


def task_vector(base, tuned, name="the tuned model"):
    """Subtract two state dicts: tau = tuned - base -> dict of fp32 tensors.

    Integers have no average: they must be equal, and do not enter tau. Where they differ, or names
    or shapes do, a UserError says which tensor of `name` is at fault.
    """
    check_shapes(base, tuned, name)
    tau = {}
    for key, theta in base.items():
        theta_i = tuned[key]
        if theta.is_floating_point() and theta_i.is_floating_point():
            tau[key] = theta_i.float() - theta.float()                          # Eq. 8
        elif theta.dtype != theta_i.dtype or not torch.equal(theta, theta_i):
            raise UserError(f"{name}: {key} holds other integers than the base, or integers where "
                            "the base has fractions; these have no average")
    return tau


def merge(base, vectors, weights):
    """Add weighted task vectors to a state dict (Eq. 8) -> state dict in the base's types.

    base: state dict. vectors: iterable of N dicts from task_vector. weights: N numbers, which need
    not sum to 1. Tensors of integers stay the base's.
    """
    # Sums in fp32: half precision would lose the differences.
    sums = {key: theta.to(torch.float32, copy=True)
            for key, theta in base.items() if theta.is_floating_point()}
    for w, tau in itertools.zip_longest(weights, vectors):
        if w is None or tau is None or not math.isfinite(w):
            raise UserError("merging takes exactly one finite weight for each tuned model")
        check_shapes(sums, tau, "a task vector")
        for key, total in sums.items():
            total += w * tau[key]                                               # Eq. 8
    return base | {key: total.to(base[key].dtype) for key, total in sums.items()}


def search_weights(score, n, grid=tuple(i / 10 for i in range(11)), rounds=5):
    """Search the weights of Eq. 8 one coordinate after the other, from 1/N each -> weights, score.

    score: takes a tuple of n weights and returns a number, lower is better: a held-out loss, FID,
    anything. A round tries the whole grid for one weight after another; the search ends after a
    round that changes nothing, and at the latest after `rounds`. The full grid for the paper's
    N = 4 would take 11^4 = 14,641 scores.
    """
    # The same weights come up many times, so scores are cached. A score that is not finite counts
    # as infinite.
    @functools.cache
    def finite_score(weights):
        value = score(weights)
        return value if math.isfinite(value) else math.inf

    best = (1 / n,) * n
    for _ in range(rounds):
        before = best
        for i in range(n):
            neighbours = [best[:i] + (w,) + best[i + 1:] for w in grid]
            best = min([best, *neighbours], key=finite_score)
        if best == before:
            break
    return best, finite_score(best)


def compare_arms(losses, examples, n, T, seed=0):
    """Search the weights on one half of the examples, and measure every arm on the other half.

    An arm is one way to use the copies: one of them alone, all as an ensemble, or merged.

    losses: takes n weights and a list of examples, returns the losses (M,) of the network that
    these weights merge. examples: dicts with "task" and "t", an even number for each task.

    Returns the weights, the timesteps (M/2,) of the reported half, and {arm: losses (M/2,)}.
    """
    # Neighbours in t form pairs. One of each pair, at random, goes to the search, the other to the
    # report.
    examples = sorted(examples, key=lambda example: (example["task"], example["t"]))
    pairs = np.arange(len(examples)).reshape(-1, 2)
    halves = np.random.default_rng(seed).permuted(pairs, axis=1).T                 # (2, M/2)
    searched, reported = [[examples[i] for i in half] for half in halves]
    weights, _ = search_weights(lambda weights: losses(weights, searched).mean(), n)

    t = np.array([int(example["t"]) for example in reported])
    # All arms but the ensemble are points of Eq. 8: zeros give the base, a single 1 gives one copy.
    copy_losses = np.stack([losses(one_hot, reported) for one_hot in np.eye(n)])   # (N, M/2)
    arms = {"before": losses((0,) * n, reported)}
    arms |= {f"copy {i}": values for i, values in enumerate(copy_losses)}
    arms["ensemble (Eq. 7)"] = copy_losses[t * n // T, np.arange(len(t))]
    arms["merged, 1/N each"] = losses((1 / n,) * n, reported)
    arms["merged, searched"] = losses(weights, reported)
    return weights, t, arms


def merged_losses(model, unets, names):
    """Return the function `losses` of compare_arms: (weights, examples) -> losses (M,).

    model: the loaded base, whose U-Net takes on the merged weights. unets: those of its N copies.
    names: of the copies, for messages.
    """
    import train
    if "projections" in unets[0].config.keys() - model.unet.config.keys():
        add_projections(model.unet, "blocks")
    base = {key: theta.cpu().clone() for key, theta in model.unet.state_dict().items()}
    vectors = [task_vector(base, unet.state_dict(), name) for unet, name in zip(unets, names)]

    # The same texts come at every point of the search, so they are encoded only once.
    encode_text = functools.cache(train.text_encoding(model))

    def losses(weights, examples):
        model.unet.load_state_dict(merge(base, vectors, weights))
        return train.held_out_losses(model, examples, 16, encode_text)

    return losses


# -------------------------------------------------------------------------------------------------
# Merging model folders, part by part. Numbers can always be added up. Whether the sum means
# anything is what the first half of this section finds out, before any tensor is read.

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder",
         "tokenizer", "tokenizer_2", "scheduler")

# A network is more than its weights: these keys of a config.json change what it computes and leave
# no trace in the shapes. An older file may lack them; then they have these values. The other keys
# show in names and shapes of the tensors, which must agree as well.
DEFAULTS = dict(METHODS, attention_head_dim=8, num_attention_heads=8, act_fn="silu",
                norm_num_groups=32, norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0,
                scaling_factor=0.18215, hidden_act="quick_gelu", layer_norm_eps=1e-5)
# These keys may differ: picture sizes, numeric precision, notes of the program that wrote the file.
# Projections after blocks may be in the copies alone.
IMMATERIAL = {"projections", "sample_size", "dtype", "torch_dtype", "upcast_attention",
              "force_upcast", "dropout", "attention_dropout", "transformers_version",
              "architectures", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
# These keys of a scheduler decide what a network's input and output mean. The others say how to
# step when drawing, and any stepping draws with the same network.
PROCESS = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end",
           "trained_betas", "rescale_betas_zero_snr")

# Words that some versions of transformers put in front of the names of a text or image encoder.
PREFIXES = ("text_model", "vision_model")


def find_parts(path_or_hub_id):
    """Find the parts of a model -> its model_index.json as a dict, and {part: folder on this disk}.

    The index may name another model as "base", to which the remaining parts belong: a folder beside
    this one, or a hub id. The pixel models that DeMe tunes, such as google/ddpm-cifar10-32, have no
    folders: U-Net and scheduler lie at their top.
    """
    root, index = find_index(path_or_hub_id)
    flat = (root / "diffusion_pytorch_model.safetensors").is_file()
    folders = {}
    with blaming(root / "model_index.json"):
        for part in PARTS:
            # Of a model on the hub, the index says which parts can be downloaded.
            on_hub = not Path(path_or_hub_id).is_dir() and (index.get(part) or [None])[0]
            if flat and part in ("unet", "scheduler"):
                folders[part] = root
            elif (root / part).exists() or on_hub:
                folders[part] = fetch(path_or_hub_id, part)
        if "unet" not in folders:
            # A copy without one would leave the base as it is, without a word.
            raise UserError(f"{path_or_hub_id} has no folder unet/: there is nothing to merge")
        if base := index.pop("base", None):
            folders = find_parts(root / base if (root / base).is_dir() else base)[1] | folders
    return index, folders


def meaning(part, folder):
    """Read the settings that must be equal before weights can be averaged, as a dict."""
    if part.startswith("tokenizer"):
        # A word's id is its row in the text encoder's table.
        tokenizer = Tokenizer.from_pretrained(folder, "")
        return dict(tokenizer.special, vocabulary=tokenizer.vocab, merges=tokenizer.ranks)
    config = read_json(folder / config_name(part))
    if part == "scheduler":
        with blaming(folder):
            config = Diffusion.from_config(config).config
        return {key: config[key] for key in PROCESS}
    # Null means the default; a list with the same value for every level means that one value.
    for key, value in config.items():
        if isinstance(value, list) and value and value == value[:1] * len(value):
            config[key] = value[0]
    return DEFAULTS | {key: value for key, value in config.items() if value is not None}


def config_name(part):
    """Return the name of the file that describes a part."""
    return "scheduler_config.json" if part == "scheduler" else "config.json"


def check_meaning(base, tuned, names):
    """Raise a UserError at a key that two configs share with different values, by their names."""
    for key in sorted((base.keys() | tuned.keys()) - IMMATERIAL):
        # False, zero and an empty list switch off what another file does not mention.
        ours = base.get(key) or None
        theirs = tuned.get(key) or None
        if key in METHODS and ours and theirs:
            # A later version of a method may record more about it.
            check_meaning(ours, theirs, names)
        elif ours != theirs and not key.startswith("_"):
            values = f"{key} is {reprlib.repr(theirs)} and {reprlib.repr(ours)}"
            if isinstance(theirs or ours, dict):    # a vocabulary, or a method's settings
                values = f"they differ in {key}"
            raise UserError(f"{names} have no meaningful average: {values}")


def matching_parts(base, tuned):
    """Find the parts of the base and of its copies, and check that an average has a meaning.

    Returns the merged model's index, and {part: its folders, of the base and of the N copies}.
    What a copy lacks besides a U-Net is the base's.
    """
    index, parts = find_parts(base)
    folders = {part: [folder] for part, folder in parts.items()}
    for path in tuned:
        their_index, theirs = find_parts(path)
        for part, folder in parts.items():
            other = theirs.get(part, folder)
            names = f"{other} and {folder}"
            with blaming(names):
                check_meaning(meaning(part, folder), meaning(part, other), names)
            folders[part].append(other)
        # Projections after blocks show in the copies' index, as a class name of their own.
        index |= their_index
    for key, value in index.items():
        if isinstance(value, list) and key not in parts:
            # A safety checker, say, which is not copied, so that no loader looks for it.
            index[key] = [None, None]
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    return index, folders


class Place(NamedTuple):
    """Where a tensor lies on disk."""
    file: Path
    key: str        # its name in the file
    shape: tuple


def find_tensors(folder):
    """Find the weights in a folder, whole or in shards -> {today's name: Place}."""
    places = {}
    for file in weight_files(folder):
        with open_weights(file) as tensors:
            for key in tensors.keys():
                name = older_attention_names(key)
                words = [word for word in name.split(".") if word not in PREFIXES]
                # position_ids, the list 0, 1, 2 .., is stored in older files only.
                if words[-1] != "position_ids":
                    shape = tensors.get_slice(key).get_shape()
                    places[".".join(words)] = Place(file, key, tuple(shape))
    return places


def check_finite(tensor, name):
    """Raise a UserError where a tensor holds infinity or not-a-number."""
    if tensor.is_floating_point() and not tensor.float().isfinite().all():
        raise UserError(f"{name} is not finite everywhere")


def read_tensor(place):
    """Read one tensor. The file is closed at once: its mapped pages would count as our memory."""
    with open_weights(place.file) as tensors, blaming(place.file):
        tensor = tensors.get_tensor(place.key).clone()
        check_finite(tensor, f"{place.file}: {place.key}")
    return tensor


def merge_weights(base, tuned, weights):
    """Merge the weights in folders (Eq. 8) -> state dict under the keys of the base's files.

    Memory holds the merged weights and one tensor of another model, however many there are.
    """
    ours, *places = [find_tensors(folder) for folder in (base, *tuned)]
    # The pretrained network has no projections after blocks: there they are the identity.
    added = {name: place for theirs in places for name, place in theirs.items()
             if name.endswith(".projection.weight") and len(place.shape) == 4}
    expected = added | ours
    for folder, theirs in zip(tuned, places):
        check_shapes(expected, theirs, folder)

    # All of the base is read first, and its tensors become the merged ones in place. Results that
    # were allocated one by one, with other tensors coming and going between them, would leave holes
    # in the memory as large as a file.
    state = {name: read_tensor(place) if name in ours
             else nn.init.dirac_(torch.empty(place.shape)) for name, place in expected.items()}
    for name, theta in state.items():
        vectors = (task_vector({name: theta}, {name: read_tensor(theirs[name])}, folder)
                   for folder, theirs in zip(tuned, places))
        theta.copy_(merge({name: theta}, vectors, weights)[name])
        # Half precision ends at 65504, which large weights may leave.
        check_finite(theta, f"{name} of {base}, merged with these weights,")
    return {expected[name].key: theta for name, theta in state.items()}


def merge_folders(base, tuned, weights, out):
    """Merge models in the Hugging Face layout (Eq. 8), part by part, into the new folder `out`.

    base, tuned: folders or hub ids. Nothing appears at `out` before all is done.
    """
    index, folders = matching_parts(base, tuned)
    with replacing(out) as merged:
        for part, (folder, *others) in folders.items():
            if part.startswith("tokenizer"):
                Tokenizer.from_pretrained(folder, "").save_pretrained(merged / part)
                continue
            # The copies' U-Net may have projections, of which the base's config does not know.
            described = others[0] if part == "unet" else folder
            name = config_name(part)
            write_json(merged / part / name, read_json(described / name))
            if part != "scheduler":
                # The names of transformers and of diffusers, without their variants and shards.
                stem = "model" if "encoder" in part else "diffusion_pytorch_model"
                state = merge_weights(folder, others, weights)
                with replacing(merged / part / f"{stem}.safetensors") as file:
                    save_file(state, file, metadata={"format": "pt"})
        write_json(merged / "model_index.json", index)


# -------------------------------------------------------------------------------------------------
# Commands

def check_order(paths, T):
    """Raise a UserError where a copy was tuned for another range than its place among them says.

    train.py records the range in arguments.json; folders without one are trusted.
    """
    for path, t_range in zip(paths, timestep_ranges(T, len(paths))):
        file = Path(path) / "arguments.json"
        recorded = read_json(file).get("t_range") if file.is_file() else None
        if recorded not in (None, list(t_range)):
            raise UserError(f"{path} was tuned for timesteps {recorded}, not for {list(t_range)}: "
                            "name all copies, in the order of their ranges")


def search(args):
    """Search the weights for --base and --tuned, print every arm's losses, merge."""
    import train
    from sample import load_model
    matching_parts(args.base, args.tuned)  # what cannot be merged is refused before the search
    model = load_model(args.base, device=pick_device(args.device))
    T = model.diffusion.T
    n = len(args.tuned)
    check_order(args.tuned, T)
    unets = [load_model(path).unet for path in args.tuned]
    losses = merged_losses(model, unets, args.tuned)
    # A multiple of 2 N, so that each range has as many examples in one half as in the other.
    count = math.ceil(args.eval_size / (2 * n)) * 2 * n
    tasks = args.task.split(",") if args.task else model.tasks
    if unknown := set(tasks) - set(model.tasks):
        raise UserError(f"{args.base} does not know {', '.join(unknown)}; it knows "
                        f"{', '.join(model.tasks)}")
    examples = train.held_out_examples(tasks, args.data, model, count)
    print(f"searching; each try measures {count // 2} held-out examples per task", flush=True)
    weights, t, arms = compare_arms(losses, examples, n, T, args.seed)
    merge_folders(args.base, args.tuned, weights, args.out)

    print(f"mean loss of the {len(t)} others, by timestep")
    ranges = [f"{low} to {high - 1}" for low, high in timestep_ranges(T, n)]
    print(" " * 20, *[f"{name:>12}" for name in ranges], "     all")
    for arm, values in arms.items():
        means = [values[t * n // T == i].mean() for i in range(n)]
        print(f"{arm:<20}", *[f"{mean:>12.4f}" for mean in means], f"{values.mean():>8.4f}")
    print(f"weights {weights}; saved in {args.out}")


# -------------------------------------------------------------------------------------------------
# The demonstration: two copies that have each learned a little, in seconds

GRID = (-0.5, 0.0, 0.5, 1.0, 1.5)       # the values of a and of b
LAYERS = ("conv_in", "time_embedding", "resnets", "attentions", "samplers", "conv_out")


def tune(model, x0, context, t_range):
    """Tune a copy of a model's U-Net on one range for ten steps, and return it.

    x0: latents (B, C, H, W) of pictures. context: (B, S, D), their captions.
    """
    unet = copy.deepcopy(model.unet).requires_grad_(True)
    optimizer = torch.optim.Adam(unet.parameters(), 3e-4)
    rng = np.random.default_rng(0)
    for _ in range(10):
        t = torch.from_numpy(sample_timesteps(t_range, model.diffusion.T, 0.3, rng, len(x0)))
        noise = torch.randn_like(x0)
        x_t = model.diffusion.add_noise(x0, noise, t)
        with torch.no_grad():
            teacher = model.unet(x_t, t, context)
        out = unet(x_t, t, context)
        error = model.diffusion.error(out, x0, noise, t)
        loss = error + consistency_loss(out, teacher)                           # Eq. 5
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return unet


@torch.no_grad()
def draw_copies(model, unets, examples, names):
    """Draw the sizes of two copies' task vectors and the losses on the plane that they span."""
    sizes = {}
    for layer, module in model.unet.named_modules():
        if layer.endswith(LAYERS) and module.state_dict():     # some lists of samplers are empty
            theta, *tuned = [nn.utils.parameters_to_vector(part.parameters()) for part in
                             (module, *(unet.get_submodule(layer) for unet in unets))]
            sizes[layer] = [100 * (theta_i - theta).norm() / theta.norm() for theta_i in tuned]
    charts = [table("size of tau, per cent of theta", cells("copy for", names),
                    cells("layer", sizes), np.array(list(sizes.values())), size=(140, 22))]
    losses = merged_losses(model, unets, names)
    plane = np.array([[losses((a, b), examples) for a in GRID] for b in GRID[::-1]])    # (5, 5, M)
    for name, part in zip(("all t", *names), (plane, *np.split(plane, 2, axis=-1))):
        means = part.mean(axis=-1)
        # The lowest loss is white, and the base's, which is at a = b = 0, is blue.
        charts.append(table(f"loss of theta + a tau_0 + b tau_1, {name}", cells("a", GRID),
                            cells("b", GRID[::-1]), means, (means.min(), means[3, 1]), digits=3,
                            size=(80, 80)))
    return arrange(charts, columns=2)


def demonstrate(path="samples/merge.png"):
    """Tune two copies of the miniature on a few pictures, and draw what merging them gives."""
    import train
    from data import ASSETS, collate
    from sample import load_model
    torch.manual_seed(0)
    model = load_model(ASSETS / "tiny")
    # Pictures that the base has not seen; their timesteps rise.
    examples = train.held_out_examples(["t2i"], None, model, 4)
    batch = collate(examples)
    x0, _ = train.encoder_of(model.vae)(batch, "cpu")
    context, _ = model.encode_text(batch["prompt"])
    ranges = timestep_ranges(model.diffusion.T, 2)
    unets = [tune(model, x0, context, t_range) for t_range in ranges]
    names = [f"t = {low} to {high - 1}" for low, high in ranges]
    write_png(path, draw_copies(model, unets, examples, names))
    print(f"{path}: two copies after ten steps each, and losses on the four pictures that they "
          "learned.\nEach range of timesteps has its lowest loss elsewhere, and a merged network "
          "is one point for both.")


def main():
    if len(sys.argv) == 1:
        return demonstrate()
    parser = Parser("Merge fine-tuned copies of a model: base + sum of w_i (tuned_i - base).")
    parser.add_argument("--base", required=True, help="pretrained model, a folder or hub id")
    parser.add_argument("--tuned", required=True, nargs="+",
                        help="copies of it, folders or hub ids, in the order of their ranges")
    parser.add_argument("--out", required=True, help="new folder for the merged model")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--weights", nargs="+", type=float,
                     help="one weight per copy; they need not sum to 1")
    how.add_argument("--search", action="store_true",
                     help="find the weights on one half of the held-out examples")
    group = parser.add_argument_group("search")
    group.add_argument("--task", help="tasks to measure, with commas; default: all of the model's")
    group.add_argument("--data", help="folder with the data; default: the built-in pictures")
    group.add_argument("--eval-size", type=int, default=64, help="held-out examples per task")
    group.add_argument("--seed", type=int, default=0, help="random seed that splits the examples")
    group.add_argument("--device", help="cuda, mps or cpu; default: the first that is there")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise UserError(f"{args.out} exists; choose another --out")
    if not 1 <= args.eval_size <= 100_000 or args.seed < 0:
        raise UserError("--eval-size is from 1 to 100,000, and --seed at least 0")
    if args.search:
        search(args)
    else:
        merge_folders(args.base, args.tuned, args.weights, args.out)


if __name__ == "__main__":
    command(main)
