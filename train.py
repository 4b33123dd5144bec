"""Train: one flat loop for everything.

    python train.py --task all                                  upcycles the shipped miniature to four tasks on the built-in data
    python train.py --task t2i --model scratch                  trains the miniature itself, text encoder included
    python train.py --task translate                            two drawings of a thing, generated together (joint.py)
    torchrun --nproc_per_node 8 train.py --task all --model stable-diffusion-v1-5/stable-diffusion-v1-5 --data /data

Every batch holds every task (MTU Eq. 2: L = sum over tasks of the task's mean loss); sample k has task k mod S of the S that --task names,
where one may stand twice to count twice. Data, noise and timesteps are a function of (seed, step, k) alone. The same command again resumes.
Letters: B global batch, T tasks, S shares, C channels, h w latent.
"""
import argparse
import contextlib
import copy
import datetime
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

import adm
import cache
import clip
import data
import joint
import merge
import moe
import watch
from checkpoint import any_rank, averaged, forget_after, load_state, restart_store, same_on_all_ranks, same_start, save_state, stoppable
from data import ALL, ASSETS, TASKS, Encoder
from diffusion import UncertaintyWeight
from examples import BINS, Examples, collate, held_out_losses, mean_by_task, mean_by_task_and_t, per_sample_loss
from export import pipeline_index
from folders import UserError, command, compiled, pick_device, read_json, write_json
from options import check, get_args
from routing import add_routing
from sample import Model, load_model, sample_grid
from unet import CONFIGS, UNet
from vae import VAE, Pixels

# From scratch: Stable Diffusion's betas, rescaled so that the last step is pure noise (arXiv 2305.08891; the pictures are mostly white, which
# noise of mean zero is not), and v-prediction, which that needs.
SCHEDULER = dict(_class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                 clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing", prediction_type="v_prediction",
                 rescale_betas_zero_snr=True)
# On pixels: DDPM's; ADM's U-Nets learn the variance, as improved DDPM's
ADM_SCHEDULER = dict(_class_name="DDPMScheduler", beta_start=0.0001, beta_end=0.02, beta_schedule="linear", num_train_timesteps=1000,
                     clip_sample=True, variance_type="learned_range")
GUIDANCE = {"t2i": [3.0, 1.0], "edit": [2.0, 1.5], "inpaint": [3.0, 1.5]}  # text and image scale that suit the miniature


class Denoiser(nn.Module):
    """All that trains, as one module for DDP and torch.compile: the per-sample losses of a batch."""

    def __init__(self, unet, text_encoder, diffusion, loss_weight="none", teacher=None, consistency=0.0):
        """text_encoder: where it trains too, else None. teacher: the frozen pretrained U-Net of DeMe Eq. 5."""
        super().__init__()
        self.unet, self.text_encoder, self.diffusion, self.loss_weight = unet, text_encoder, diffusion, loss_weight
        self.teacher, self.consistency = teacher, consistency
        self.uncertainty = UncertaintyWeight(diffusion.T).to(diffusion.alpha_bar.device) if loss_weight == "uw" else None

    def forward(self, x0, source, text, t, noise, task, added=None):
        """x0, noise, source or None (B, 4, h, w), text (B, 77) ids if its encoder trains, else states (B, 77, D), t, task (B,), added SDXL's
        dict -> losses, weighted losses, both (B,). Eq. 5's second term stands beside the weighted loss."""
        context = text if self.text_encoder is None else self.text_encoder(text)[0]

        def model(x_t, t):  # concatenated along channels: MTU Eq. 2's Psi_C([z_t, E(c_I)])
            z = x_t if source is None else torch.cat([x_t, source], dim=1)
            out.append(self.unet(z, t, context, task=task, added=added))
            if self.teacher is not None and torch.is_grad_enabled():
                with torch.no_grad():
                    out.append(self.teacher(z, t, context, task=task, added=added))
            return out[0]

        out = []
        losses = self.diffusion.loss(model, x0, t, noise)
        weighted = self.diffusion.objective(losses, out[0], x0, noise, t, self.loss_weight, self.uncertainty)
        if len(out) == 2:  # DeMe Eq. 5
            weighted = weighted + self.consistency * merge.consistency_loss(*(y[:, :x0.shape[1]] for y in out))
        return losses, weighted


def new_tokenizer():
    datasets = [data.builtin(task, "train") for task in ("t2i", "edit", "inpaint")]
    return clip.Tokenizer.train([dataset[i]["prompt"] for dataset in datasets for i in range(0, len(dataset), 3)], vocab_size=2048)


def text_parts(folder, width):
    """Tokenizer and text encoder: the folder's, whose states must have that width, or new ones."""
    if not folder:
        tokenizer = new_tokenizer()
        return tokenizer, clip.CLIPText(clip.tiny_config(tokenizer))
    tokenizer, encoder = clip.Tokenizer.from_pretrained(folder), clip.CLIPText.from_pretrained(folder)
    c = encoder.config
    if c["hidden_size"] != width or max(tokenizer.vocab.values()) >= c["vocab_size"] or tokenizer.length > c["max_position_embeddings"]:
        raise UserError(f"--text-encoder {folder} is {c['hidden_size']} wide, the U-Net reads {width}; or its tokenizer has more ids or positions")
    return tokenizer, encoder


def build_model(args, tasks):
    """The model to train and whether it is new; then its text encoder trains too, unless --text-encoder gives one."""
    pixels = tasks == ["uncond"] or tasks[0] in joint.SETTINGS
    if args.unet and not (args.model == "scratch" and pixels):
        raise UserError(f"--unet goes with --model scratch and --task uncond, {', '.join(joint.SETTINGS)}")
    if args.text_encoder and (pixels or args.t_range and args.consistency > 0):
        raise UserError(f"--text-encoder goes with {', '.join(ALL)}; with --t-range at --consistency 0, since the pretrained output has read another")
    if args.model == "scratch":
        if not (tasks == ["t2i"] or pixels) or args.t_range:
            raise UserError("--model scratch trains the base: use --task t2i, then --task all or --t-range with --model on the result; or uncond")
        if pixels:
            config = adm.CONFIGS[args.unet or "adm-tiny"] | dict(num_class_embeds=len(joint.classes()) + 1 if tasks == ["label"] else None)
            scheduler = ADM_SCHEDULER | ({} if config.get("out_channels") == 6 else dict(variance_type="fixed_large"))
            model = Model(adm.UNet2D(config), Pixels(config["sample_size"]), None, None, scheduler, {})
            return replace(model, index=pipeline_index(model)), True
        tokenizer, text_encoder = text_parts(args.text_encoder, CONFIGS["tiny"]["cross_attention_dim"])
        model = Model(UNet(CONFIGS["tiny"]), VAE.from_pretrained(args.vae), text_encoder, tokenizer, SCHEDULER, {})
        return replace(model, index=pipeline_index(model) | {"_guidance": {"t2i": GUIDANCE["t2i"]}}), True
    model = load_model(args.model)
    model.index.pop("base", None)  # a run folder is whole
    if model.heads is not None and tasks[0] not in joint.SETTINGS:
        raise UserError(f"{args.model} does not know {', '.join(tasks)}; it knows {', '.join(model.tasks)}")
    upcycles = "moe" not in model.unet.config and not (tasks == ["t2i"] or pixels)
    if args.t_range and (upcycles or args.routing):
        raise UserError("--t-range fine-tunes a model that can do its tasks already: train that first, then --model on it")
    if upcycles:
        moe.upcycle(model.unet, tasks, args.num_experts, args.expert_init, args.expert_width, args.top_k)
        kept = {k: v for k, v in model.index.items() if k == "force_zeros_for_empty_prompt"}
        model.index = kept | {"_class_name": "UpcycledPipeline"} | ({"guidance": GUIDANCE} if model.native_size <= 64 else {})
    elif "_class_name" not in model.unet.config:  # an ordinary U-Net; parts that the base's index names besides are not written
        model.index = pipeline_index(model)
    if args.text_encoder:
        if len(model.texts) != 1:
            raise UserError(f"--text-encoder is for models with one text encoder, {args.model} has {len(model.texts)}")
        model.tokenizer, model.text_encoder = text_parts(args.text_encoder, model.unet.config["cross_attention_dim"])
    if args.full:
        model.unet.requires_grad_(True)
    if unknown := [task for task in tasks if task not in (*model.tasks, *joint.SETTINGS)]:
        raise UserError(f"{args.model} does not know {', '.join(unknown)}; it knows {', '.join(model.tasks)}")
    return model, False


def parameter_groups(module, weight_decay, lr):
    """Norms, biases and rows per task get no weight decay: rows of absent tasks would drift. Learned loss weights have ANT-UW's own lr."""
    rows = {id(p) for m in module.modules() if isinstance(m, (moe.TaskConv, moe.TaskLayerNorm, nn.Embedding)) for p in m.parameters()}
    groups = [dict(params=[], weight_decay=weight_decay, peak_lr=lr), dict(params=[], weight_decay=0.0, peak_lr=lr),
              dict(params=[], weight_decay=0.0, peak_lr=0.025)]
    for name, p in module.named_parameters():
        if p.requires_grad:
            plain = p.dim() == 1 or not name.endswith("weight") or id(p) in rows
            groups[2 if name.startswith("uncertainty.") else plain]["params"].append(p)
    return groups


def channels_last(unet):
    """As a GPU's convolutions want their weights. `to(memory_format=...)` does not take those of TaskConv, which have a dimension more."""
    for p in unet.parameters():
        if p.dim() == 4:
            p.data = p.data.to(memory_format=torch.channels_last)


def make_optimizer(groups, device, zero):
    fused = device.type in ("cuda", "cpu")  # one pass over memory, several times as fast
    if zero:  # each process has the moments of its share
        from torch.distributed.optim import ZeroRedundancyOptimizer
        return ZeroRedundancyOptimizer([group for group in groups if group["params"]], torch.optim.AdamW, fused=fused)
    return torch.optim.AdamW(groups, fused=fused)


def lr_factor(step, args):
    """What multiplies the learning rate: linear warm-up, then constant or a cosine to zero."""
    warm = min(1.0, (step + 1) / max(args.warmup, 1))
    return warm * (0.5 * (1 + np.cos(np.pi * step / args.steps)) if args.lr_schedule == "cosine" else 1.0)


def total_loss(losses, num_tasks, batch_size):
    """MTU Eq. 2, the sum over tasks of each task's mean loss, from per-sample losses (B,) of the batch or of a part of it, where every task has
    batch_size / num_tasks samples. A task with more of them weighs as much more."""
    return losses.sum() * num_tasks / batch_size


def open_data(args, model, shares, encode, rank=0, world=1):
    """-> the training examples, the held-out data sets per task (of pictures, for grids), fixed examples of these. With --cache examples hold
    moments in the place of pictures, and encode.texts is set."""
    if not args.data and model.native_size != 64 and model.texts and model.heads is None:
        raise UserError(f"{args.model} draws {model.native_size} x {model.native_size} pictures, the built-in ones are 64 x 64: give --data")
    size, side = model.native_size, model.unet.config["sample_size"]
    builtin = data.builtin if model.heads is None else joint.Pictures
    train, held_out = ({task: data.Folder(args.data, task, split, size) if args.data else builtin(task, split, size)
                        for task in dict.fromkeys(shares)} for split in ("train", "heldout"))
    measured = held_out
    if args.cache:
        kept = cache.open_cache(args, model, [*train.values(), *held_out.values()], rank, world)
        train, measured = kept.applied(train), kept.applied(held_out)
        encode.texts = kept.states if kept.texts else None
    examples = Examples(train, args.batch_size, args.seed, model.diffusion.T, (model.vae.config["latent_channels"], side, side),
                        args.t_range, args.p_global, args.antithetic, model.heads and {shares[0]: (0, 0, args.drop)}, shares)
    return examples, held_out, list(examples.held_out(measured, args.eval_size))


def decouple(args, shares, device, rank, world):
    """DeMe as a whole: one copy a timestep range (each a run of its own, which resumes), the weights of Eq. 8 searched on one half of the
    held-out examples, the merged model, and a table of losses on the other half."""
    out, N, tasks = Path(args.out or "runs/deme"), args.decouple, list(dict.fromkeys(shares))
    if args.t_range or args.model == "scratch" or args.eval_size < 2 * N or not args.save_every or args.text_encoder:
        raise UserError(f"--decouple makes the ranges itself, of a pretrained --model and its text encoder, saves, needs --eval-size {2 * N} or more")
    model = load_model(args.model, device=device)
    if args.projection == "blocks":
        merge.add_projections(model.unet, "blocks")  # each the identity: what the copies started from
    T, ranges, copies = model.diffusion.T, merge.timestep_ranges(model.diffusion.T, N), [out / f"range-{i}" for i in range(N)]
    for t_range, folder in zip(ranges, copies):
        train(argparse.Namespace(**vars(args) | dict(decouple=None, t_range=list(t_range), out=str(folder))), shares, device, rank, world)
    if rank > 0:
        return
    denoiser, encode = Denoiser(model.unet, None, model.diffusion.to(device)), Encoder(model.vae)
    fixed = open_data(args, model, tasks, encode)[2]
    part, searched = np.array([e["t"] for e in fixed]) * N // T, np.arange(len(fixed)) // len(tasks) % 2 == 0
    base = {key: value.cpu().clone() for key, value in model.unet.state_dict().items()}
    vectors = [merge.task_vector(base, load_model(folder).unet.state_dict()) for folder in copies]

    def losses(weights, examples=fixed):
        model.unet.load_state_dict(merge.merge(base, vectors, list(weights)))
        return held_out_losses(denoiser, encode, model, examples, args.batch_size, device)

    rows = {"before": losses([0] * N)} | {f"copy {i}": losses(np.eye(N)[i]) for i in range(N)}
    rows["ensemble (Eq. 7)"] = np.choose(part, [rows[f"copy {i}"] for i in range(N)])
    rows["merged, 1/N each"] = losses([1 / N] * N)
    half = [e for e, s in zip(fixed, searched) if s]
    weights, _ = merge.search_weights(lambda w: losses(w, half).mean(), N)
    rows["merged, searched"] = losses(weights)
    replace(model, index=read_json(copies[0] / "model_index.json")).save(out / "merged")
    table = {name: [row[~searched & (part == i)].mean() for i in range(N)] + [row[~searched].mean()] for name, row in rows.items()}
    unseen = dict(t=[e["t"] for e, s in zip(fixed, searched) if not s], losses={name: row[~searched].tolist() for name, row in rows.items()})
    write_json(out / "merge.json", dict(ranges=ranges, weights=weights, losses=table, unseen=unseen))
    print(" " * 20 + "".join(f"{f'{a}..{b - 1}':>12}" for a, b in ranges) + f"{'all':>12}")
    for name, row in table.items():
        print(f"{name:<20}" + "".join(f"{value:>12.4f}" for value in row))
    print(f"weights {weights}; saved in {out / 'merged'}. Next: python sample.py --task {tasks[0]} --model {out / 'merged'}")


def main():
    args = get_args()
    rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if world > 1 and torch.cuda.is_available() and str(args.device or "cuda").startswith("cuda"):
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node asks for more processes than the {torch.cuda.device_count()} devices here")
        torch.cuda.set_device(local_rank)
    device = pick_device(args.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=restart_store(), rank=rank, world_size=world,
                                timeout=datetime.timedelta(hours=1))  # while one saves, or makes more of a cache, the others wait
    if args.task is None:
        own = (args.t_range or args.decouple is not None) and args.model != "scratch"
        args.task = ",".join(load_model(args.model).tasks) if own else "all"
    tasks = list(ALL) if args.task == "all" else args.task.split(",")
    alone = {"uncond", *joint.SETTINGS}
    if not set(tasks) <= {*TASKS, *alone} or len(tasks) > 1 and alone & set(tasks):
        raise UserError(f"--task {args.task} names an unknown task, or one that goes alone beside others; the tasks are {', '.join(ALL)}, "
                        f"or all; or one of uncond, {', '.join(joint.SETTINGS)} alone")
    joint.checked(args, tasks)
    (bench if args.bench else decouple if args.decouple is not None else train)(args, tasks, device, rank, world)
    if world > 1:
        dist.destroy_process_group()


def bench(args, tasks, device, rank, world):
    """The speed of the last two thirds of a short run's steps, by its log."""
    steps = 30 if args.steps is None else args.steps
    steps -= steps % 3 if steps > 3 else 0
    if args.decouple is not None:
        raise UserError("--bench times one run, not --decouple")
    with tempfile.TemporaryDirectory() as out:
        train(argparse.Namespace(**vars(args) | dict(out=out, steps=steps, log_every=max(1, steps // 3), save_every=0, sample_every=0, eval_every=0,
                                                     eval_size=1)), tasks, device, rank, world)
        if rank == 0:
            rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
            speed, tflops, waited, mfu = (np.mean([np.nan if row[key] is None else row[key] for row in rows[1:] or rows])
                                          for key in ("images_per_s", "tflops", "data_share", "mfu"))
            print(f"{speed:.2f} images/s; U-Net, forward and backward, {tflops:.3f} TFLOP/s a device (watch.py tells what counts), MFU "
                  f"{'unknown, for want of its peak' if np.isnan(mfu) else f'{100 * mfu:.1f} %'}; waiting for data {100 * waited:.1f} % of the time; "
                  f"peak memory {rows[-1]['memory_gb'] or np.nan:.2f} GB")


def train(args, shares, device, rank, world):
    """One run, resumed if it was begun. shares: the task of each sample in turn."""
    tasks = list(dict.fromkeys(shares))
    print0 = tqdm.write if rank == 0 else lambda *_: None

    # What is asked
    check(args)
    args.out = args.out or f"runs/{'tiny' if args.model == 'scratch' and args.task == 't2i' else args.task.replace(',', '-')}"
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    per_rank = args.batch_size // world
    micro = min(args.device_batch_size or per_rank, per_rank)
    if args.batch_size % len(shares) or args.batch_size % world or per_rank % micro:
        raise UserError(f"--batch-size {args.batch_size} must be a multiple of the {len(shares)} that --task names, of {world} processes and of "
                        "--device-batch-size")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    # Model
    model, scratch = build_model(args, tasks)
    if args.routing:
        add_routing(model.unet, args.alpha, args.beta, args.routing, model.diffusion.T, args.seed)
    if tasks[0] in joint.SETTINGS:
        joint.attach(model, tasks[0], args.head, args.input, args.schedule, args.image_encoder)
    model.to(device)
    if device.type == "cuda":
        channels_last(model.unet)
    model.unet.gradient_checkpointing = args.gradient_checkpointing
    miniature = sum(p.numel() for p in model.unet.parameters()) < 2e7
    args.lr = args.lr or (1e-3 if miniature else 1e-4)
    args.steps = args.steps or (5000 if scratch else 200)
    args.sample_every = max(1, args.steps // 2) if args.sample_every is None else args.sample_every
    if args.train_text_encoder and (len(model.texts) != 1 or args.t_range or tasks[0] in joint.SETTINGS):
        raise UserError("--train-text-encoder is for models with one text encoder, and not for --t-range or the joint tasks")
    trained = model.text_encoder if scratch and not args.text_encoder or args.train_text_encoder else None
    for part in filter(None, [model.vae, model.text_encoder_2, model.image_encoder, None if trained else model.text_encoder]):
        part.eval().requires_grad_(False)
    if trained is not None:
        trained.train()
    teacher = copy.deepcopy(model.unet).requires_grad_(False) if args.t_range and args.consistency > 0 else None
    row = model.tasks.index(tasks[0]) if "moe" in model.unet.config else None  # every task costs the same
    peak, per_image = watch.peak(device, args.precision), watch.flops(model.unet, row, backward=True) / 1e12 / world  # TFLOP of a device
    if args.projection:
        merge.add_projections(model.unet, args.projection)
    if args.routing or model.heads is not None or args.projection == "blocks":
        name = model.unet.config["_class_name"]
        model.index |= {"_class_name": name.replace("UNet", "Pipeline")} | ({"unet": ["diffusers", name]} if "unet" in model.index else {})
    if model.heads is None:
        denoiser = Denoiser(model.unet, trained, model.diffusion.to(device), args.loss_weight, teacher, args.consistency)
        encode, names = Encoder(model.vae), tasks
    else:
        denoiser, encode = joint.Denoiser(model, args.loss_weight, args.head_weight), joint.Encoder(model)
        names = [*tasks, *(f"{modality} head" for modality in model.heads)]
    params = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in params.items()}
    optimizer = make_optimizer(parameter_groups(denoiser, args.weight_decay, args.lr), device, args.zero and world > 1)
    trains, frozen = (sum(p.numel() for p in group) for group in (params.values(), [p for p in model.unet.parameters() if not p.requires_grad]))
    print0(f"{trains:,} parameters train, {frozen:,} of the U-Net are frozen, on {world} x {device}")

    if args.loss_weight == "v" and model.scheduler.get("prediction_type") == "v_prediction":
        raise UserError(f"--loss-weight v is for models that predict the noise; {args.model} predicts v already")

    # Resume
    out, start, before, skipped, in_a_row = Path(args.out), 0, None, 0, 0
    state = out / "state" / "state.safetensors"
    settings = {k: v for k, v in vars(args).items() if k not in (  # what may change
        "out", "device", "device_batch_size", "workers", "cache", "compile", "gradient_checkpointing", "save_every", "sample_every",
        "log_every", "eval_every", "zero", "tensorboard", "bench", "preset")}
    for key in ("model", "vae", "data", "text_encoder", "image_encoder"):  # under another name, or after the checkout moved, it is the same
        if settings[key] and Path(settings[key]).exists():
            path = Path(settings[key]).resolve()
            settings[key] = str(path.relative_to(ASSETS.resolve().parent) if path.is_relative_to(ASSETS.resolve()) else path)
    if not scratch:
        del settings["vae"]
    unused = ["p_global", "consistency", "projection", "antithetic"] * (args.t_range is None) + [*joint.OPTIONS] * (model.heads is None)
    for key in ["steps"] * (args.lr_schedule == "constant") + unused:
        del settings[key]  # a run at constant lr may be made longer
    if state.exists():
        scalars = load_state(state, params, ema, optimizer, settings)
        start, before, skipped, in_a_row = scalars["step"], scalars["before"], scalars.get("skipped", 0), scalars.get("in_a_row", 0)
        print0(f"resuming {out} at step {start}")
    elif out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; it names a folder")
    elif (out / "model_index.json").exists() and not (out / "arguments.json").exists():
        raise UserError(f"{out} holds a model that is no run of train.py; choose another --out")
    same_start(start, device)
    if rank == 0:
        forget_after(out / "log.jsonl", start)
    if start >= args.steps:
        print0(f"{out} is finished ({start} steps); to train on from it: --model {out} with another --out")

    # Data
    examples, held_out, fixed = open_data(args, model, shares, encode, rank, world)

    def measured():
        return mean_by_task(fixed, held_out_losses(denoiser, encode, model, fixed, args.batch_size, device), names[len(tasks):])

    before = before or measured()

    # The loop
    run = denoiser
    if world > 1:
        ids = [torch.cuda.current_device()] if device.type == "cuda" else None
        run = nn.parallel.DistributedDataParallel(denoiser, device_ids=ids, gradient_as_bucket_view=True)
    run = compiled(run, device) if args.compile else run
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    first = rank * per_rank
    batches = [range(step * args.batch_size + first + m, step * args.batch_size + first + m + micro)
               for step in range(start, args.steps) for m in range(0, per_rank, micro)]
    loader = iter(torch.utils.data.DataLoader(examples, batch_sampler=batches, collate_fn=collate, num_workers=args.workers,
                                              persistent_workers=args.workers > 0))
    sums, busy, waited, saved = torch.zeros(len(names) * BINS, 2, device=device), 0.0, 0.0, False
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        log = watch.Log(out, args.tensorboard, start)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.task, disable=rank > 0)
    with stoppable() as told:
        for step in bar:
            began, seen, factor = time.time(), [], lr_factor(step, args)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            for m in range(0, per_rank, micro):
                asked = time.time()
                try:
                    batch = next(loader)
                except UserError as error:  # one from a worker process comes wrapped in its traceback
                    raise UserError(str(error).strip().splitlines()[-1].removeprefix("folders.UserError: ")) from None
                waited += time.time() - asked
                last = m + micro == per_rank
                with contextlib.nullcontext() if last or world == 1 else run.no_sync(), autocast:
                    losses, weighted = per_sample_loss(run, encode, model, batch, device)
                    (total_loss(weighted, len(tasks), args.batch_size) * world).backward()  # DDP averages over the ranks
                losses = losses.detach().reshape(len(losses), -1)  # a joint task's modalities beside its own; NaN: the sample goes without
                cell = torch.tensor([tasks.index(task) for task in batch["task"]])[:, None] + torch.arange(losses.shape[1])
                cell, finite = cell * BINS + (batch["t"] * BINS // denoiser.diffusion.T)[:, None], losses.isfinite()
                sums.index_add_(0, cell.flatten().to(device), torch.stack([losses.where(finite, 0), finite.to(losses.dtype)], dim=-1).flatten(0, 1))
                seen.append((batch["task"], batch["t"], losses[:, 0]))
            norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
            if torch.isfinite(norm):
                optimizer.step()
                decay, in_a_row = min(args.ema, (1 + step) / (10 + step)), 0
                torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params.values()], 1 - decay)
            else:  # such a step changes nothing
                skipped, in_a_row = skipped + 1, in_a_row + 1
                if in_a_row == 3:
                    where = [f", that of {name} at timestep {t}" for part in seen for name, t, v in zip(*part) if not torch.isfinite(v)]
                    raise UserError(f"the loss{''.join(where[:1])} or its gradient is not finite at step {step}, nor at the two before; the last "
                                    f"checkpoint in {out} is kept. Try a lower --lr")
            optimizer.zero_grad(set_to_none=True)
            leaving = any_rank(told, device)  # waits for what the device has still to do
            done, busy = step + 1, busy + time.time() - began

            if done % args.log_every == 0 or done == args.steps:
                if world > 1:
                    dist.all_reduce(sums)
                total, count = sums.view(len(names), BINS, 2).cpu().unbind(-1)
                mean = {name: (total[i].sum() / count[i].sum()).item() for i, name in enumerate(names) if count[i].any()}
                bins = {name: [round(s / n, 5) if n else None for s, n in zip(total[i].tolist(), count[i].tolist())] for i, name in enumerate(names)}
                speed = count[:len(tasks)].sum().item() / busy
                print0(f"step {done}: " + ", ".join(f"{name} {v:.4f}" for name, v in mean.items()) + f"; lr {args.lr * factor:.2e}, "
                       f"{speed:.1f} images/s" + f", {skipped} steps skipped" * (skipped > 0))
                if rank == 0:
                    memory = watch.memory(device)
                    log.write(dict(step=done, loss=mean, loss_by_t=bins, lr=args.lr * factor, skipped=skipped,
                                   grad_norm=None if in_a_row else norm.item(), images_per_s=round(speed, 2), tflops=round(speed * per_image, 4),
                                   mfu=peak and round(speed * per_image * 1e12 / peak, 4), data_share=round(waited / busy, 4),
                                   memory_gb=memory and round(memory, 3)))
                sums, busy, waited = torch.zeros_like(sums), 0.0, 0.0
            if rank == 0 and args.eval_every and (done % args.eval_every == 0 or done == args.steps):
                with averaged(params, ema):
                    losses = held_out_losses(denoiser, encode, model, fixed, args.batch_size, device)
                log.write(dict(step=done, held_out=mean_by_task(fixed, losses, names[len(tasks):]),
                               held_out_by_t=mean_by_task_and_t(fixed, losses, examples.T, names[len(tasks):])))
            saving = args.save_every > 0 and (done % args.save_every == 0 or done == args.steps or leaving)
            if saving and world > 1:
                same_on_all_ranks(params)
                if args.zero:
                    optimizer.consolidate_state_dict(to=0)
            if rank == 0 and saving:
                if not all(e.isfinite().all() for e in ema.values()):
                    raise UserError(f"weights are not finite at step {step}; the last checkpoint in {out} is kept. Try a lower --lr")
                write_json(out / "arguments.json", vars(args))
                with averaged(params, ema):
                    whole = replace(model, unet=merge.fold_projections(model.unet)) if args.projection == "convolutions" else model
                    whole.save(out, frozen_too=trained is not None or not saved)  # what does not train, once per start
                saved = True
                scalars = dict(step=done, before=before, skipped=skipped, in_a_row=in_a_row, settings=settings)
                save_state(state, params, ema, optimizer, scalars)  # last: what it counts is there
            if leaving:
                if world > 1:
                    dist.barrier()  # torchrun ends the others when one has ended
                print0(f"stopped at step {done}" + f", saved in {out}; the same command goes on from there" * saving)
                raise KeyboardInterrupt
            if rank == 0 and args.sample_every and (done % args.sample_every == 0 or done == args.steps):
                with averaged(params, ema):
                    sample_grid(model, held_out, 6, args.seed, out / "samples" / f"{done:06d}.png")

    if not args.save_every:
        return
    with averaged(params, ema):
        after = measured()
    print0("held-out loss      before    after")
    for name in names:
        print0(f"{name:<16}{before[name]:>9.4f}{after[name]:>9.4f}")
    print0(f"saved in {out} (samples in {out / 'samples'}). "
           f"Next: python sample.py --task {'edit' if 'edit' in tasks else tasks[0]} --model {out}")


if __name__ == "__main__":
    command(main)
