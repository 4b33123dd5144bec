"""Train: one loop for every method.

    python train.py --task all                      upcycles the miniature to four tasks (MTU)
    python train.py --task t2i --routing dtr        every timestep sees its own channels (DTR)
    python train.py --task translate                two drawings of one thing (MT-Diffusion)
    python train.py --task t2i --t-range 0 500      fine-tunes for a range of timesteps (DeMe)
    torchrun --nproc_per_node 8 train.py --task all --data /data \\
        --model stable-diffusion-v1-5/stable-diffusion-v1-5

Every batch holds every task: MTU Eq. 2 is a sum over tasks of each task's mean loss. The samples of
a batch take turns over the tasks of --task. A task that is listed twice has twice the samples,
and so twice the weight of another; the weights still sum to the number of tasks.
Data, noise and timesteps follow from (seed, step, place in the batch) alone. So the same command
again resumes a run, bit for bit on a CPU, and another number of processes changes only rounding.

Letters: B samples of a micro-batch, C channels, h w latent, S text length, D text width.
"""
import hub  # noqa: F401  the first import, so that Ctrl-C ends quietly
import contextlib
import copy
import datetime
import functools
import json
import operator
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import adm
import aggregation
import data
import dit
import merge
import moe
import routing
from data import ALL, ASSETS, TASKS, Encoder, Examples, collate
from diffusion import UncertaintyWeight
from hub import ADVICE, Parser, UserError, append_line, between, blaming, command, compiled
from hub import is_first, is_slow_in_bf16, load_state, lock, pick_device, read_scalars, reading
from hub import refuse_idle, replacing, save_state, write_json
from sample import JOINT, Model, check_parts, latent_shape, load_model, pipeline_index
from sample import sample_grid
from unet import CONFIGS, UNet

# From scratch: Stable Diffusion's betas, rescaled so that the last step is pure noise (arXiv
# 2305.08891). Our pictures are mostly white, and any signal that remained there would give their
# brightness away. At zero signal the noise says nothing about the picture, hence v-prediction.
SCHEDULER = dict(_class_name="DDIMScheduler", beta_start=0.00085, beta_end=0.012,
                 beta_schedule="scaled_linear", num_train_timesteps=1000, clip_sample=False,
                 set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
                 prediction_type="v_prediction", rescale_betas_zero_snr=True)
# Text and image scales that suit the miniature.
GUIDANCE = {"t2i": [3.0, 1.0], "edit": [2.0, 1.5], "inpaint": [3.0, 1.5]}
EMA_DECAY = 0.9999  # of the weight average, reached after 90,000 steps and smaller before
BINS = 4  # the loss is logged for this many equal ranges of timesteps
# Defaults of --num-experts and its companions, which shape new experts only.
EXPERTS = dict(num_experts=4, expert_width=None, expert_init="preserve", top_k=None)
# Peak learning rate of routers and of e_task, at most: the paper's. In a long run at the experts'
# rate all units of the routers' ReLUs died, and then every task had the same mixture of experts.
ROUTER_LR = 1e-4
WORDLESS = ("uncond", "class")  # these networks read no text


# -------------------------------------------------------------------------------------------------
# Arguments

def get_args(words=None):
    """Read the command line, or words that stand for one."""
    parser = Parser("Train on one task or on several at once.")
    run = parser.add_argument_group("run")
    run.add_argument("--task", default="all", help="tasks with commas between them; all means "
                     f"{', '.join(ALL)}; {', '.join([*WORDLESS, *JOINT])} train alone")
    run.add_argument("--model", help="model folder or hub id to start from, or scratch (default: "
                     f"assets/tiny; scratch for {' and '.join(WORDLESS)})")
    run.add_argument("--data", help="folder of pictures, whose layouts readers.py lists, or one "
                     "that data.py encode made (default: the built-in emoji)")
    run.add_argument("--degradation", choices=data.DEGRADATIONS, default="simple", help="of the "
                     "pictures of sr in a folder: simple is MTU's, real-esrgan has two full stages")
    run.add_argument("--reverse", action="store_true",
                     help="swap source and target of paired folders (pix2pix: BtoA)")
    run.add_argument("--out", help="run folder; the same command resumes (default: runs/TASK)")
    run.add_argument("--steps", type=between(1, 1e9),
                     help="optimiser steps (default: 200, or 5000 from scratch; paper: 100 epochs)")
    run.add_argument("--batch-size", type=between(1, 1e6), default=32, help="global batch size, a "
                     "multiple of the numbers of tasks and of processes (paper: 128)")
    run.add_argument("--device-batch-size", type=between(1, 1e6), help="samples per micro-batch on "
                     "one device; gradients are accumulated (default: all at once)")
    run.add_argument("--seed", type=between(0, 1e18), default=0,
                     help="random seed for data, noise and initialisation")
    run.add_argument("--device", help="torch device (default: cuda, else mps, else cpu)")
    run.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 autocast, or fp32, which "
                     "is TF32 on cuda (default: bf16 on cuda, else fp32)")
    run.add_argument("--compile", action="store_true", help="compile the network (torch.compile)")
    run.add_argument("--gradient-checkpointing", action="store_true",
                     help="save memory by recomputing activations")
    run.add_argument("--workers", type=between(0, 256), default=0,
                     help="processes that read pictures")

    scratch = parser.add_argument_group("--model scratch")
    scratch.add_argument("--unet", help="size of the new network, a name in unet.CONFIGS, "
                         "adm.CONFIGS or dit.CONFIGS (default: tiny for t2i, dit-tiny for class, "
                         "else adm-tiny)")
    scratch.add_argument("--beta-schedule", choices=("linear", "squaredcos_cap_v2"),
                         default="linear", help="noise schedule of a network that reads no text: "
                         "DDPM's, or the cosine of improved DDPM")
    scratch.add_argument("--encoders", default=str(ASSETS / "tiny"), help="model folder or hub id "
                         "whose autoencoder, tokenizer and text encoder a t2i network uses")

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--lr", type=between(1e-12, 1e3, float), help="peak learning rate "
                              "(default: 1.6e-2 for new experts of the miniature, 1e-3 for other "
                              "training of it, 1e-4 for larger models; paper: 1e-4, SDXL 5e-5); "
                              f"routers and e_task have at most {ROUTER_LR}")
    optimisation.add_argument("--lr-schedule", choices=("constant", "cosine"), default="cosine",
                              help="times the warm-up; cosine falls to zero over all steps")
    optimisation.add_argument("--warmup", type=between(0, 1e9), default=20,
                              help="steps of linear warm-up")
    optimisation.add_argument("--weight-decay", type=between(0, 1e3, float), default=0.0,
                              help="AdamW's weight decay, applied to weight matrices only "
                              "(paper: 0.01 for SDXL)")
    optimisation.add_argument("--loss-weight", choices=("none", "v", "min-snr", "p2", "uw"),
                              default="none", help="loss weighting over timesteps; uw learns it")

    mtu = parser.add_argument_group("MTU, where a text-to-image model learns other tasks")
    mtu.add_argument("--num-experts", type=between(1, 1000),
                     help="N, experts per feed-forward layer (paper: 4, for SDXL 1)")
    mtu.add_argument("--expert-width", type=float,
                     help="G, an expert's share of the layer's width (default: 1/N)")
    mtu.add_argument("--expert-init", choices=("preserve", "literal"),
                     help="preserve equals the pretrained network at step 0, literal is the "
                     "paper's plain copy")
    mtu.add_argument("--top-k", type=int,
                     help="keep the k largest router weights (default: all)")
    mtu.set_defaults(**EXPERTS)
    mtu.add_argument("--train", choices=("list", "all", "self", "cross", "ffn"), help="what "
                     "trains: the paper's list (the default of an upcycled network), everything, or"
                     " one kind of layer (Table 1) beside the tables of the tasks and the routers")

    dtr = parser.add_argument_group("DTR")
    dtr.add_argument("--routing", choices=routing.MODES, help="mask channels by timestep; random "
                     "masks are the paper's control, halves have a second window for skips")
    dtr.add_argument("--alpha", type=between(1e-6, 1e6, float), default=4.0,
                     help="exponent of the window's shift, (t / (T - 1))^alpha")
    dtr.add_argument("--beta", type=between(1e-6, 1, float), default=0.8,
                     help="share of channels that a timestep sees")

    deme = parser.add_argument_group("DeMe")
    deme.add_argument("--t-range", type=int, nargs=2, metavar=("START", "END"),
                      help="fine-tune for timesteps START <= t < END")
    deme.add_argument("--p-global", type=between(0, 1, float), default=0.3, help="probability of "
                      "drawing t from all timesteps instead of the range (official code: 0.3)")
    deme.add_argument("--consistency", type=between(0, 1e6, float), default=1.0,
                      help="weight of the consistency loss, Eq. 5's second term (paper: 1)")
    deme.add_argument("--projection", nargs="?", const="convolutions",
                      choices=("convolutions", "blocks"), help="channel projections: after "
                      "convolutions, where they fold; or after blocks, as in the official code")

    joint = parser.add_argument_group("MT-Diffusion")
    joint.add_argument("--head", choices=("image", "linear", "classifier", "vector"),
                       help="head of the other modality: image for pictures, vector for repr, "
                       "linear (-M) or classifier (-E) for label (default: the first that fits)")
    joint.add_argument("--input", choices=("z", "x"), default="z",
                       help="x: also concatenate the other picture to the input (-X); z: the "
                       "noisy latent only (-U)")
    joint.add_argument("--drop", type=between(0, 0.999, float),
                       help="probability of hiding the other modality in training (default: 0.1, "
                       "and 0 for translate with --input z)")
    joint.add_argument("--schedule", choices=tuple(aggregation.SCHEDULES), default="vanishing",
                       help="weights w_t of the other modality; interpolating needs betas that "
                       "do not end in pure noise")
    joint.add_argument("--k", type=between(-1e6, 1e6, float), default=1.0,
                       help="scale of these weights")
    joint.add_argument("--modality-weight", type=between(0, 1e6, float), default=aggregation.LAMBDA,
                       help="lambda of Eq. 6")

    logging = parser.add_argument_group("logging")
    logging.add_argument("--save-every", type=between(0, 1e9), default=200,
                         help="steps between checkpoints; 0 saves none")
    logging.add_argument("--sample-every", type=between(0, 1e9), help="steps between sample grids, "
                         "0 for none (default: half way and at the end)")
    logging.add_argument("--log-every", type=between(1, 1e9), default=10,
                         help="steps between lines of the log")
    logging.add_argument("--eval-size", type=between(1, 1e5), default=64,
                         help="held-out examples per task for the loss before and after")
    logging.add_argument("--eval-every", type=between(0, 1e9), default=0,
                         help="steps between held-out losses in the log; 0 for none")
    args = parser.parse_args(words)
    if not args.routing:
        refuse_idle(args, dtr, "DTR masks channels with --routing")
    if not args.t_range:
        refuse_idle(args, deme, "DeMe fine-tunes for a --t-range")
    if args.task not in JOINT:
        refuse_idle(args, joint, f"MT-Diffusion has the tasks {', '.join(JOINT)}")
    return args


def parse_tasks(args):
    """Read --task -> the tasks of samples 0, 1, .. in turn. Name the base and the run's folder."""
    if args.model is None:
        args.model = "scratch" if args.task in WORDLESS else str(ASSETS / "tiny")
    shares = list(ALL) if args.task == "all" else args.task.split(",")
    if unknown := [task for task in shares if task not in TASKS]:
        raise UserError(f"--task: {', '.join(unknown)} is unknown; the tasks are "
                        f"{', '.join(TASKS)}, and all means {', '.join(ALL)}")
    if len(shares) > 1 and (alone := {*WORDLESS, *JOINT} & set(shares)):
        raise UserError(f"--task {args.task}: {min(alone)} trains alone")
    args.out = args.out or f"runs/{args.task.replace(',', '-')}"
    return shares


# -------------------------------------------------------------------------------------------------
# Processes

def restart_store():
    """Say where the processes of torchrun find each other; None is torch's own choice.

    On one machine torchrun's store outlives a restart and keeps the addresses of dead processes
    (pytorch issue 135712), so each restart gets names of its own.
    """
    env = os.environ
    one_machine = env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE")
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not one_machine:
        return None
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False,
                          use_libuv=env.get("USE_LIBUV", "1") == "1")
    return dist.PrefixStore(f"start-{env['TORCHELASTIC_RESTART_COUNT']}", store)


def join_processes(args):
    """Join torchrun's processes, if there are several -> device, rank, number of processes.

    Every process runs this whole file on its own share of each batch. DistributedDataParallel
    averages the gradients, so all of them take the same step and keep the same weights.
    """
    cuda = torch.cuda.is_available() and str(args.device or "cuda").startswith("cuda")
    with blaming("torchrun's variables RANK, WORLD_SIZE, MASTER_ADDR, .."):
        # They tell each process its number; without them there is one process.
        rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in
                                   (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
        if world > 1 and cuda:
            if local_rank >= torch.cuda.device_count():
                raise UserError("--nproc_per_node asks for more processes than the "
                                f"{torch.cuda.device_count()} devices here")
            torch.cuda.set_device(local_rank)
        if world > 1:
            # While one process saves or draws, the others wait.
            dist.init_process_group("nccl" if cuda else "gloo", store=restart_store(), rank=rank,
                                    world_size=world, timeout=datetime.timedelta(hours=1))
    return pick_device(args.device), rank, world


class Stop:
    """Notice SIGTERM and Ctrl-C: the step is finished, the run saved, and all ranks leave together.

    torchrun sends SIGTERM after the terminal's Ctrl-C, which is still one request. A second Ctrl-C
    stops at once.
    """

    def __init__(self):
        self.received = []

    def __enter__(self):
        numbers = (signal.SIGTERM, signal.SIGINT)
        # nohup ignores some signals, and that stays so.
        numbers = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]
        self.before = {n: signal.signal(n, self.receive) for n in numbers}
        return self

    def receive(self, number, frame):
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        # It is only noted, because weights in the middle of a step make no checkpoint.
        self.received.append(number)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_any_rank(self, device):
        """Say whether any process was told to stop; then all of them leave together."""
        # torchrun kills the other processes as soon as one has ended.
        if not dist.is_initialized():
            return bool(self.received)
        flag = torch.tensor(float(bool(self.received)), device=device)
        dist.all_reduce(flag)
        return flag.item() > 0


def differ(numbers):
    """Say for each of some whole numbers, (N,), whether the processes have different ones."""
    least = numbers.clone()
    most = numbers.clone()
    if dist.is_initialized():
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return (least != most).tolist()


def check_same_start(step, device):
    """Raise a UserError where the processes found different checkpoints."""
    if any(differ(torch.tensor([step], device=device))):
        raise UserError("the processes found different checkpoints: --out must be on a disk that "
                        "all machines share")


def check_same_weights(params):
    """Raise a UserError where the bits of a parameter differ between the processes.

    Averaged gradients would hide it. A sum of the bits changes when any one bit does.
    """
    if not dist.is_initialized():
        return
    sums = [p.detach().contiguous().view(torch.int32).sum() for p in params.values()]
    different = [name for name, differs in zip(params, differ(torch.stack(sums))) if differs]
    if different:
        raise UserError(f"the weights differ between the processes, {different[0]} first, "
                        f"{len(different)} of {len(params)} in all: a device or a library is at "
                        "fault; the last checkpoint is kept")


# -------------------------------------------------------------------------------------------------
# Model and data

def prepare(args):
    """Join the other processes, make the model and open the data: what `train` takes.

    Mistakes in the arguments and in the data are found here.
    """
    shares = parse_tasks(args)
    device, rank, world = join_processes(args)
    per_rank = args.batch_size // world
    args.device_batch_size = min(args.device_batch_size or per_rank, per_rank)
    if (args.batch_size % len(shares) or args.batch_size % world
            or per_rank % args.device_batch_size):
        raise UserError(f"--batch-size {args.batch_size} must be a multiple of the {len(shares)} "
                        f"tasks, of the {world} processes and of --device-batch-size")
    # The seed decides new weights; what a batch draws has generators of its own.
    torch.manual_seed(args.seed)
    model, teacher = build_model(args, list(dict.fromkeys(shares)), device)
    fill_defaults(args, model, device)
    return model, teacher, open_data(args, model, shares), rank, world


def build_model(args, tasks, device):
    """Make the model to train, with the methods that the arguments ask for -> model, teacher.

    Each method attaches to the network in place, and records itself in config.json. teacher: the
    pretrained network of DeMe's Eq. 5, or None.
    """
    if args.model == "scratch":
        model = new_model(args, tasks)
        check_parts(model)
    elif args.unet:
        raise UserError("--unet goes with --model scratch")
    else:
        model = load_model(args.model)
        prepare_loaded(args, tasks, model)
    network = model.unet
    for module in model.modules:
        if module is not network:
            module.requires_grad_(False)  # autoencoder and text encoders are frozen
    if args.routing:
        routing.add_routing(network, args.alpha, args.beta, args.routing, model.diffusion.T,
                            args.seed)
    if tasks[0] in JOINT:
        attach_modality(args, tasks[0], model)
    if unknown := [task for task in tasks if task not in model.tasks]:
        raise UserError(f"{args.model} does not know {', '.join(unknown)}; it knows "
                        f"{', '.join(model.tasks)}")
    model.to(device)
    network.gradient_checkpointing = args.gradient_checkpointing
    if device.type == "cuda":
        channels_last(network)
    teacher = None
    if args.t_range and args.consistency > 0:
        # The network before projections are attached to it.
        teacher = copy.deepcopy(network).requires_grad_(False)
    return model, teacher


def new_model(args, tasks):
    """Make a model with new weights: one that reads text, or one that does not."""
    if args.t_range:
        raise UserError("--t-range fine-tunes a trained model: name it with --model")
    if tasks == ["t2i"]:
        return new_text_model(args)
    if tasks[0] in (*WORDLESS, *JOINT):
        return new_wordless_model(args, tasks[0])
    raise UserError("--model scratch trains a base: use --task t2i, and then --task all with "
                    f"--model on its folder; or one of {', '.join((*WORDLESS, *JOINT))}")


def new_text_model(args):
    """Make a small Stable Diffusion, whose autoencoder and text encoder are those of --encoders."""
    # SDXL is no choice, since it reads two text encoders.
    configs = {name: c for name, c in CONFIGS.items() if not c.get("addition_embed_type")}
    config = named_config(args.unet or "tiny", configs)
    base = load_model(args.encoders)
    if len(base.texts) != 1:
        raise UserError(f"--encoders {args.encoders} has {len(base.texts)} text encoders, not one")
    # Cross-attention is as wide as the text states that it reads.
    width = base.text_encoder.config["hidden_size"]
    network = UNet(config | dict(cross_attention_dim=width))
    model = Model(network, base.vae, base.text_encoder, base.tokenizer, SCHEDULER, {},
                  path="scratch")
    model.index["guidance"] = {"t2i": GUIDANCE["t2i"]}
    return model


def new_wordless_model(args, task):
    """Make an ADM or a DDPM on pixels, or a DiT on pixels or latents, with the data's classes."""
    by_class = task == "class"
    name = args.unet or ("dit-tiny" if by_class else "adm-tiny")
    config = named_config(name, adm.CONFIGS | (dit.CONFIGS if by_class else {}))
    classes = []
    if task in ("class", "label"):
        classes = data.class_names(args.data, task)
    if name in dit.CONFIGS:
        network = dit.DiT(config | dict(num_embeds_ada_norm=len(classes)))
    else:
        # One row more than there are classes: the last means "no class".
        network = adm.UNet2D(config | dict(num_class_embeds=len(classes) + 1 if classes else None))
        adm.zero_outputs(network)
    scheduler = adm.scheduler_for(network.config, args.beta_schedule)
    if network.config["in_channels"] == 3:
        vae = adm.Pixels(network.config["sample_size"])
    else:
        vae = load_model(args.encoders).vae
        # A scheduler that DiTPipeline can draw with. Latents may lie outside of [-1, 1].
        scheduler |= dict(_class_name="DDIMScheduler", clip_sample=False)
    model = Model(network, vae, None, None, scheduler, {}, path="scratch")
    if by_class:
        model.index["id2label"] = {str(number): name for number, name in enumerate(classes)}
    return model


def named_config(name, configs):
    """Look up --unet among the sizes that suit the task."""
    if name not in configs:
        raise UserError(f"--unet {name}: choose from {', '.join(configs)}")
    return configs[name]


def prepare_loaded(args, tasks, model):
    """Upcycle a text-to-image model that is to learn other tasks, and choose what trains."""
    network = model.unet
    plain = tasks == ["t2i"] or tasks[0] in (*WORDLESS, *JOINT)
    # A text-to-image model is upcycled as soon as it is to do anything else.
    upcycles = "moe" not in network.config and not plain
    if args.t_range and (upcycles or args.routing):
        raise UserError("--t-range fine-tunes a model that knows its --task and has its masks "
                        "already: train that first, and then name it with --model")
    if upcycles:
        moe.upcycle(network, tasks, args.num_experts, args.expert_init,
                    expert_width=args.expert_width, top_k=args.top_k)
        if is_miniature(model):
            model.index["guidance"] = GUIDANCE
            if args.lr is None and args.train != "all":
                # The best of three rates for a short run (experiments/RESULTS.md).
                args.lr = 1.6e-2
    elif given := [name for name, value in EXPERTS.items() if getattr(args, name) != value]:
        raise UserError(f"--{given[0].replace('_', '-')} shapes new experts, and {args.model} gets "
                        "none here")
    if "moe" in network.config:
        moe.trainable(network, args.train or "list")
    elif args.train:
        raise UserError("--train goes with several tasks (MTU)")


def attach_modality(args, task, model):
    """Give the model the head, the inputs and the forward process of a task of MT-Diffusion."""
    if args.t_range:
        raise UserError(f"--t-range does not go with --task {task}")
    classes = data.class_names(args.data) if task == "label" else ()
    aggregation.prepare(model, task, TASKS[task].modality, head=args.head, input=args.input,
                        weights=args.schedule, k=args.k, classes=classes)


def is_miniature(model):
    return sum(p.numel() for p in model.unet.parameters()) < 2e7


def fill_defaults(args, model, device):
    """Fill in the arguments whose defaults depend on the model or the device."""
    if args.loss_weight == "v" and model.diffusion.config["prediction_type"] == "v_prediction":
        raise UserError(f"--loss-weight v is for models that predict the noise; {args.model} "
                        "predicts v already")
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    if args.precision == "bf16" and is_slow_in_bf16(device):
        print0("This processor has no instructions for bf16: --precision fp32 is many times as "
               "fast here.")
    if args.lr is None:
        args.lr = 1e-3 if is_miniature(model) else 1e-4
    args.steps = args.steps or (5000 if args.model == "scratch" else 200)
    if args.sample_every is None:
        args.sample_every = max(1, args.steps // 2)


def check_size(args, model):
    """Raise a UserError where a Stable Diffusion would need built-in pictures of another size."""
    size = model.native_size
    if not args.data and model.texts and size != 64 and model.tasks[0] not in JOINT:
        raise UserError(f"{args.model} draws {size} x {size} pictures, and the built-in ones are "
                        "64 x 64: name a folder with --data")


def open_data(args, model, shares):
    """Open the data -> training examples, held-out data sets, fixed held-out examples, Encoded."""
    tasks = list(dict.fromkeys(shares))
    size = model.native_size
    check_size(args, model)
    training, held_out = (
        {task: data.open_dataset(task, split, size, args.data, degradation=args.degradation,
                                 reverse=args.reverse) for task in tasks}
        for split in ("train", "heldout"))
    # Missing and broken pictures are left out, and named in the run folder.
    data.record_skipped([*training.values(), *held_out.values()],
                        Path(args.out) / "skipped.jsonl")
    counts = ", ".join(f"{task} {len(training[task])} + {len(held_out[task])}" for task in tasks)
    print0(f"{args.data or 'built-in emoji'}: {counts} pictures (training + held out)")
    encoded = training[tasks[0]] if isinstance(training[tasks[0]], data.Encoded) else None
    if encoded:
        encoded.check(model)

    # MT-Diffusion's starred variants train a share of the samples without the other modality.
    drop = None
    if tasks[0] in JOINT:
        share = TASKS[tasks[0]].drop[2] if args.input == "z" else 0.1
        drop = (0.0, 0.0, share if args.drop is None else args.drop)
    sample_timestep = None
    if args.t_range:
        sample_timestep = functools.partial(draw_timestep, tuple(args.t_range), model.diffusion.T,
                                            args.p_global)
        sample_timestep(np.random.default_rng(0))  # raises here if the range is empty
    examples = Examples(training, shares, batch_size=args.batch_size, seed=args.seed,
                        num_timesteps=model.diffusion.T,
                        latent_shape=latent_shape(model, size, size),
                        sample_timestep=sample_timestep, drop=drop)
    return examples, held_out, examples.held_out(held_out, args.eval_size), encoded


def draw_timestep(t_range, num_timesteps, p_global, rng):
    """Draw the timestep of one sample: DeMe Eq. 6."""
    return int(merge.sample_timesteps(t_range, num_timesteps, p_global, rng, 1)[0])


class Net(nn.Module):
    """Everything that trains, as the one module that DistributedDataParallel wraps."""

    def __init__(self, unet, uncertainty=None):
        super().__init__()
        self.unet = unet                # with MT-Diffusion's heads and DeMe's projections
        self.uncertainty = uncertainty  # ANT-UW's learned weights of timesteps

    def forward(self, z, t, context, task=None, added=None):
        return self.unet(z, t, context, task=task, added=added)


def parameter_groups(net, weight_decay, lr):
    """AdamW's groups: weight matrices decay; norms, biases and tables with a row per task do not.

    Decay would make the rows of tasks that are absent from a batch drift, and a task that was
    added later must leave the older ones as they are. ANT-UW's weights have the learning rate of
    DTR's official code, and the routers and the task embedding at most MTU's.
    """
    tables = {id(p) for module in net.modules()
              if isinstance(module, (moe.TaskConv, moe.TaskLayerNorm, nn.Embedding))
              for p in module.parameters()}
    groups = {}
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue
        no_decay = p.dim() == 1 or not name.endswith("weight") or id(p) in tables
        decay, peak = 0.0 if no_decay else weight_decay, lr
        if name.startswith("uncertainty."):
            decay, peak = 0.0, 0.025
        elif ".router." in name or "task_embedding" in name:
            peak = min(lr, ROUTER_LR)
        groups.setdefault((decay, peak), []).append(p)
    return [dict(params=params, weight_decay=decay, peak_lr=peak)
            for (decay, peak), params in groups.items()]


def channels_last(network):
    """Lay out convolutions as a GPU wants them: the channels of a pixel side by side.

    Module.to(memory_format=...) would refuse the five dimensions of moe.TaskConv's weight.
    """
    for p in network.parameters():
        if p.dim() == 4:
            p.data = p.data.to(memory_format=torch.channels_last)


def lr_factor(step, args):
    """Return the learning rate's factor: linear warm-up, times 1 or a cosine that ends at zero.

    The cosine begins at the first step, so with a warm-up the rate stays just below --lr.
    """
    warmup = min(1.0, (step + 1) / max(args.warmup, 1))
    if args.lr_schedule == "constant":
        return warmup
    # Half a period of a cosine: 1 at the first step, 0 after the last.
    return warmup * 0.5 * (1 + np.cos(np.pi * step / args.steps))


@contextlib.contextmanager
def averaged(params, ema):
    """Put the weight average in place of the weights, inside the block.

    The average is an exponential moving one (EMA), less noisy than the weights themselves. It is
    what is measured, drawn with, and saved.
    """
    def swap():
        # The tensors change places, so nothing is copied.
        for name, p in params.items():
            p.data, ema[name] = ema[name], p.data
    swap()
    try:
        yield
    finally:
        swap()


# -------------------------------------------------------------------------------------------------
# What a run logs

def count_flops(network, backward=False):
    """Count the multiplications and additions of one sample of the model's own size.

    backward: count a whole training step, in which frozen weights need no gradient of their own,
    and not the forward pass alone. Every task of an upcycled network costs the same.
    """
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode
    # On the meta device tensors have only shapes, so nothing is computed and nothing allocated.
    empty = functools.partial(torch.empty, device="meta")
    tensors = {name: torch.empty_like(x, device="meta").requires_grad_(x.requires_grad)
               for name, x in (*network.named_parameters(), *network.named_buffers())}
    config = network.config
    channels = config["in_channels"]
    if "moe" in config:
        channels = max(config["moe"]["in_channels"].values())
    width = config.get("cross_attention_dim")
    context = empty(1, 77, width) if width else None
    side = config["sample_size"]
    number = empty(1, dtype=torch.long)
    pooled = 0
    if config.get("addition_embed_type"):
        pooled = (config["projection_class_embeddings_input_dim"]
                  - 6 * config["addition_time_embed_dim"])
    # A network takes what it needs of timestep, text, task, and SDXL's or the class's inputs.
    inputs = (empty(1, channels, side, side), number, context, number,
              dict(text_embeds=empty(1, pooled), time_ids=empty(1, 6), class_labels=number))
    counter = FlopCounterMode(display=False)
    # What gradient checkpointing computes twice is not counted twice: MFU is about useful work.
    checkpointing = network.gradient_checkpointing
    network.gradient_checkpointing = False
    with counter, torch.set_grad_enabled(backward):
        outputs = tree_leaves(torch.func.functional_call(network, tensors, inputs))
        if backward:
            sum(output.sum() for output in outputs).backward()
    network.gradient_checkpointing = checkpointing
    return counter.get_total_flops()


# Peak TFLOP/s of one device by the makers' data sheets, without sparsity: in bf16, and in TF32,
# which fp32 runs use.
PEAK = {"H200": (989, 494), "H100 PCIe": (756, 378), "H100": (989, 494), "A100": (312, 156),
        "A10": (125, 62), "L40S": (362, 183), "RTX 4090": (165, 83)}


def peak_flops(device, precision):
    """Return a device's FLOP/s at its best, or None where that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for key, (bf16, tf32) in PEAK.items():
        # A slice of a card (MIG) and a card with less power have other peaks.
        if re.search(rf"\b{key}\b", name) and not re.search("MIG|NVL|Laptop", name):
            return (bf16 if precision == "bf16" else tf32) * 1e12
    return None


class Meter:
    """Mean losses, by name and range of timesteps, since they were last read.

    names: tasks, and "MODALITY head" for the heads of MT-Diffusion.
    """

    def __init__(self, names, num_timesteps):
        self.names = names
        self.num_timesteps = num_timesteps
        self.records = []                   # of each micro-batch: tasks, timesteps, loss terms
        self.seconds = 0.0                  # that steps took since the last line of the log

    def add(self, batch, terms):
        """terms: {"denoising" or modality: (B,)}. Nothing waits for the device before `read`."""
        terms = {name: values.detach() for name, values in terms.items()}
        self.records.append((batch["task"], batch["t"], terms))

    def read(self, device=None):
        """Return {name: mean}, {name: [mean in each range, or None]} and samples; start anew.

        device: where the sums of all processes are added up; None takes this process's alone.
        """
        sums = np.zeros((len(self.names), BINS, 2))     # sums of losses, and their counts
        samples = 0
        for tasks, t, terms in self.records:
            samples += len(tasks)
            bins = t.numpy() * BINS // self.num_timesteps
            for name, values in terms.items():
                # A sample's denoising loss belongs to its task.
                rows = [self.names.index(task if name == "denoising" else f"{name} head")
                        for task in tasks]
                values = values.double().cpu().numpy()
                present = np.isfinite(values)  # NaN: the sample has no such modality
                np.add.at(sums, (rows, bins),
                          np.stack([np.where(present, values, 0), present], axis=1))
        if device is not None and dist.is_initialized():
            # Sums and counts travel, not means: processes see different numbers of a task.
            numbers = torch.tensor([*sums.ravel(), samples], device=device)
            dist.all_reduce(numbers)
            *flat, samples = numbers.tolist()
            sums = np.reshape(flat, sums.shape)
        self.records = []
        means = {name: float(total / count)
                 for name, (total, count) in zip(self.names, sums.sum(axis=1)) if count}
        ranges = {name: [round(float(total / count), 5) if count else None for total, count in row]
                  for name, row in zip(self.names, sums)}
        return means, ranges, samples


def forget_after(path, step):
    """Drop the lines of log.jsonl that steps after the checkpoint wrote: they come again.

    A line that somebody else wrote stays, whatever its bytes are, but not half a line of ours.
    """
    if not path.exists():
        return
    with reading(path):
        lines = path.read_bytes().split(b"\n")
    start = b'{"step": '
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            again = bool({"loss", "held_out"} & {*row}) and row["step"] > step
        except (TypeError, KeyError):
            again = False
        except (ValueError, RecursionError):
            # A process that was killed may have written a part of its line, or nothing yet.
            again = number == len(lines) and start.startswith(line[:len(start)])
        if not again:
            kept.append(line + b"\n")
    with replacing(path) as beside:
        beside.write_bytes(b"".join(kept))


# -------------------------------------------------------------------------------------------------
# The held-out loss: fixed examples with fixed noise, so that two networks can be compared

def held_out_examples(tasks, root, model, count):
    """Make `count` fixed held-out examples of each task, with their timesteps and noise."""
    datasets = {task: data.open_dataset(task, "heldout", model.native_size, root) for task in tasks}
    size = model.native_size
    examples = Examples(datasets, list(tasks), batch_size=len(tasks), seed=0,
                        num_timesteps=model.diffusion.T,
                        latent_shape=latent_shape(model, size, size))
    return examples.held_out(datasets, count)


@functools.lru_cache(maxsize=1)
def encoder_of(vae):
    """Return one Encoder per autoencoder, which remembers the pictures that it has encoded.

    So the fixed examples are encoded only once, however often they are measured.
    """
    return Encoder(vae)


@torch.no_grad()
def held_out_terms(model, examples, batch_size, encode_text=None):
    """Yield the examples in batches, each with its terms of the loss, as training has them.

    encode_text: what text_encoding returns, or the same with a memory; prompts come as a tuple.
    """
    device = model.device
    diffusion = model.diffusion.to(device)
    encoder = encoder_of(model.vae)
    encode_text = encode_text or text_encoding(model)
    for first in range(0, len(examples), batch_size):
        batch = collate(examples[first:first + batch_size])
        t, noise = batch["t"].to(device), batch["noise"].to(device)
        # From here on as in the training step, without gradient, autocast or loss weight.
        x0, source = encoder(batch, device)
        context, added = encode_text(tuple(batch["prompt"]))
        known = aggregation.encode_batch(model, encoder, batch, x0.shape[1:])
        if known:
            predict = aggregation.predictor(model.unet, model.unet, known, context, added)
            _, terms = aggregation.loss(model.unet.heads, predict, x0, known, noise, t)
        else:
            z_t = diffusion.add_noise(x0, noise, t)
            z = z_t if source is None else torch.cat([z_t, source], dim=1)
            out = model.unet(z, t, context, task_rows(model, batch), added)
            terms = {"denoising": diffusion.error(out, x0, noise, t)}
        yield batch, terms


def held_out_losses(model, examples, batch_size, encode_text=None):
    """Compute the denoising loss of each of M examples -> (M,) in NumPy."""
    batches = held_out_terms(model, examples, batch_size, encode_text)
    return torch.cat([terms["denoising"] for _, terms in batches]).cpu().numpy()


def text_encoding(model, encoded=None):
    """Return encode(prompts) -> context (B, S, D), and what SDXL adds to it; both None on pixels.

    encoded: a data.Encoded, which has the text states already.
    """
    size = model.native_size

    def encode(prompts):
        # A DiT reads the number of a class, which is no text.
        states = (encoded if encoded and model.texts else model).encode_text(prompts)
        context, pooled = (None if x is None else x.to(model.device) for x in states)
        return context, model.added(pooled, size, size)
    return encode


def task_rows(model, batch):
    """Return the row of each sample's task in an upcycled network -> (B,)."""
    return torch.tensor([model.tasks.index(task) for task in batch["task"]], device=model.device)


# -------------------------------------------------------------------------------------------------
# Saving and resuming

# Arguments that may change when a run is resumed: they do not change what it computes.
FREE = ("out", "device", "device_batch_size", "workers", "compile", "gradient_checkpointing",
        "save_every", "sample_every", "log_every", "eval_every")


def fixed_settings(args):
    """List the arguments that must be the same when a run is resumed -> dict."""
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    for key in ("model", "encoders", "data"):
        if settings[key] and Path(settings[key]).exists():
            # Under another name it is the same folder, and so are our assets after they moved.
            path = Path(settings[key]).resolve()
            ours = path.is_relative_to(ASSETS.resolve())
            settings[key] = str(path.relative_to(ASSETS.resolve()) if ours else path)
    if args.lr_schedule == "constant":
        # With a constant learning rate a longer run repeats the shorter one, so it may resume.
        settings.pop("steps")
    return settings


def refuse_foreign_model(out):
    """Raise a UserError where the run folder holds a model that is no run of ours."""
    if (out / "model_index.json").exists() and not (out / "arguments.json").exists():
        raise UserError(f"{out} holds a model that train.py did not write; choose another --out")


def resume(out, args, params, ema, optimizer, loss_names):
    """Load the checkpoint of a run folder in place, if there is one, and return its scalars."""
    path = out / "state" / "state.safetensors"
    if not path.exists():
        # before: the held-out loss at the start. skipped: steps whose gradient was not finite.
        return dict(step=0, before=None, skipped=0, in_a_row=0)
    scalars = read_scalars(path)
    settings = fixed_settings(args)
    with blaming(f"{path} ({ADVICE})"):
        # A damaged number is named here, before any training.
        for key in ("step", "skipped", "in_a_row"):
            if not 0 <= operator.index(scalars[key]) <= 1e9:  # TypeError for what is no number
                raise ValueError(f"{key} is no count of steps")
        # Options that were added after the checkpoint was written count as off.
        recorded = {key: value and None for key, value in settings.items()} | scalars["settings"]
    changed = [f"--{key.replace('_', '-')} was {recorded[key]!r} and is now {value!r}"
               for key, value in settings.items() if recorded[key] != value]
    if changed:
        raise UserError(f"{out} was begun with other settings: {'; '.join(changed)}. Give those, "
                        "or another --out")
    with blaming(f"{path} ({ADVICE})"):
        # With the same settings the run has the same losses.
        before = scalars["before"]
        losses = list(map(float, before.values()))
        if before.keys() != set(loss_names) or not np.isfinite(losses).all():
            raise ValueError("the losses before the run are others, or not finite")
    load_state(path, params, ema, optimizer)
    return scalars


def save(out, args, model, params, ema, optimizer, scalars):
    """Write the averaged model, and then the state, which says that the model is there.

    The state comes last: a run that is killed in between resumes from the older state, and writes
    the same model again. All processes come here, and the first one writes.
    """
    check_same_weights(params)
    if not is_first():
        return
    path = out / "state" / "state.safetensors"
    write_json(out / "arguments.json", vars(args))
    with averaged(params, ema):
        complete = model
        if args.projection == "convolutions":
            # The saved model is an ordinary one; the state keeps the projections apart.
            complete = replace(model, unet=merge.fold_projections(model.unet))
        # With an earlier state the frozen parts were written. A deleted one is written again.
        complete.save(out, unet_only=path.exists())
    save_state(path, params, ema, optimizer, dict(scalars, settings=fixed_settings(args)))


# -------------------------------------------------------------------------------------------------
# Training

def print0(line):
    """Print a line in the first process alone, above its progress bar."""
    if is_first():
        tqdm.write(line)


def due(every, done, steps):
    """Say whether something that comes every so many steps comes after step `done`, or the last."""
    return every > 0 and (done % every == 0 or done == steps)


def train(args, model, teacher, opened, rank, world):
    """Train a model, or go on with its training.

    model, teacher: from build_model. opened: from open_data.
    """
    examples, eval_sets, eval_examples, encoded = opened
    tasks = list(eval_sets)
    folder = Path(args.out)
    device = model.device
    # TF32 keeps fp32's range and multiplies several times as fast on recent GPUs.
    torch.backends.cuda.matmul.allow_tf32 = True
    # How many micro-batches make this process's share of a batch.
    accumulation = args.batch_size // world // args.device_batch_size

    # The model: `unet` is its network, and `net` holds that and whatever else trains.
    unet = model.unet
    diffusion = model.diffusion.to(device)
    flops = count_flops(unet, backward=True)
    if args.projection:
        merge.add_projections(unet, args.projection)
    model.index = pipeline_index(model)  # what this run saves is complete, and names no base
    uncertainty = UncertaintyWeight(diffusion.T).to(device) if args.loss_weight == "uw" else None
    net = Net(unet, uncertainty)

    # What trains, its moving average, and the optimiser.
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in params.items()}
    # The fused AdamW passes over memory once, several times as fast on the CPU too.
    optimizer = torch.optim.AdamW(parameter_groups(net, args.weight_decay, args.lr),
                                  fused=device.type in ("cuda", "cpu"))
    trained = sum(p.numel() for p in params.values())
    frozen = sum(p.numel() for p in unet.parameters() if not p.requires_grad)
    print0(f"{trained:,} parameters train, {frozen:,} of the U-Net are frozen, "
           f"on {world} x {device}")

    # The frozen encoders, and the names of the losses.
    encoder = encoder_of(model.vae)
    encode_text = text_encoding(model, encoded)
    loss_names = [*tasks, *(f"{modality} head" for modality in unet.heads or ())]

    def held_out_means():
        """Measure the averaged weights -> {name: mean}, {name: [mean in each range of t]}."""
        held_out = Meter(loss_names, diffusion.T)
        with averaged(params, ema):
            for batch, terms in held_out_terms(model, eval_examples, args.batch_size, encode_text):
                held_out.add(batch, terms)
                finite = terms["denoising"].isfinite().tolist()
                if not all(finite):
                    i = finite.index(False)
                    raise UserError(f"{args.data if encoded else args.model} gives losses that are "
                                    f"not finite, for {batch['task'][i]} at t = {batch['t'][i]}: "
                                    "it is damaged")
        return held_out.read()[:2]

    # Arguments and data have been checked. From here on, files are written.
    refuse_foreign_model(folder)
    with lock(folder), Stop() as stop:
        progress = resume(folder, args, params, ema, optimizer, loss_names)
        start = progress["step"]
        check_same_start(start, device)
        if start > 0:
            print0(f"resuming {folder} at step {start}")
        if start >= args.steps:
            print0(f"{folder} is finished ({start} steps); to train on from it: --model {folder} "
                   "with another --out")
        if progress["before"] is None:
            print0(f"measuring the held-out loss on {len(eval_examples)} examples")
            progress["before"], _ = held_out_means()
        if rank == 0:
            forget_after(folder / "log.jsonl", start)

        batches = iter(DataLoader(examples, batch_sampler=micro_batches(args, start, rank, world),
                                  collate_fn=collate, num_workers=args.workers,
                                  persistent_workers=args.workers > 0))

        # Compile first, then wrap: DDP's hooks stay outside of the graph.
        net = compiled(net, device) if args.compile else net
        if world > 1:
            ids = [torch.cuda.current_device()] if device.type == "cuda" else None
            net = nn.parallel.DistributedDataParallel(net, device_ids=ids,
                                                      gradient_as_bucket_view=True)
        # A new context for each forward pass: its cache of cast weights must not outlive a step.
        autocast = functools.partial(torch.autocast, device.type, torch.bfloat16,
                                     enabled=args.precision == "bf16")
        meter = Meter(loss_names, diffusion.T)

        for step in tqdm(range(start, args.steps), initial=start, total=args.steps,
                         desc=args.task, disable=rank > 0):
            began = time.time()
            factor = lr_factor(step, args)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor

            for micro in range(accumulation):
                # A function of (seed, step, index in the batch). For guidance, some prompts and
                # sources in it are empty, as often as data.TASKS says.
                batch = next_batch(batches)
                t, noise = batch["t"].to(device), batch["noise"].to(device)
                task = task_rows(model, batch)
                # The encoders are frozen. source: what the network reads beside z_t (zeros for
                # t2i among other tasks), or None.
                # added: SDXL's pooled text and sizes, or class labels, or None.
                # known: the other modality of MT-Diffusion, and empty for every other method.
                with torch.no_grad(), autocast():
                    x0, source = encoder(batch, device)              # (B, C, h, w)
                    context, added = encode_text(batch["prompt"])    # (B, S, D)
                    known = aggregation.encode_batch(model, encoder, batch, x0.shape[1:])
                # DDP reads this: it averages gradients with the last micro-batch only.
                net.require_backward_grad_sync = micro == accumulation - 1
                with autocast():
                    if not known:
                        z_t = diffusion.add_noise(x0, noise, t)      # DDPM Eq. 4
                        # MTU Eq. 2: [z_t, enc(c_I)]
                        z = z_t if source is None else torch.cat([z_t, source], dim=1)
                        out = net(z, t, context, task, added)
                        # One number a sample, (B,). terms: without weight, for the log by task.
                        loss = diffusion.loss(out, x0, noise, t, args.loss_weight, uncertainty)
                        terms = {"denoising": diffusion.error(out.detach(), x0, noise, t)}
                        if teacher is not None:                      # DeMe Eq. 5, second term
                            with torch.no_grad():
                                pretrained = teacher(z, t, context, task, added)
                            channels = x0.shape[1]   # ADM and DiT have C more, for the variance
                            distance = merge.consistency_loss(out[:, :channels],
                                                              pretrained[:, :channels])
                            loss = loss + args.consistency * distance
                    else:                                            # MT-Diffusion Eq. 6
                        predict = aggregation.predictor(net, unet, known, context, added)
                        loss, terms = aggregation.loss(
                            unet.heads, predict, x0, known, noise, t,
                            head_weight=args.modality_weight, weighting=args.loss_weight,
                            uncertainty=uncertainty)
                # MTU Eq. 2: the sum over tasks of each task's mean, if each is listed once and so
                # has equally many samples. This micro-batch has its share of that sum.
                share = loss.sum() * len(tasks) / args.batch_size
                # DDP averages the gradients of the processes, and a sum is wanted.
                (share * world).backward()
                meter.add(batch, terms)

            # Clip the gradient, take the step, and let the average follow the weights. DDPM's
            # code, DeMe's and diffusers' scripts clip at 1; DTR's code, as DiT's, does not clip,
            # and MTU and MT-Diffusion do not say.
            norm = nn.utils.clip_grad_norm_(params.values(), 1.0)
            if torch.isfinite(norm):  # reading it waits for the device, so the clock counts it
                optimizer.step()
                # A smaller decay in the first steps, or the average keeps the initial weights.
                decay = min(EMA_DECAY, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params.values()],
                                     1 - decay)
                progress["in_a_row"] = 0
            else:
                # A step whose gradient is not finite changes nothing.
                progress["skipped"] += 1
                progress["in_a_row"] += 1
                if progress["in_a_row"] == 3:
                    raise UserError(f"the loss or its gradient is not finite at step {step}, nor "
                                    f"at the two before; the last checkpoint in {folder} is kept. "
                                    "Try a lower --lr")
            optimizer.zero_grad()
            stopping = stop.on_any_rank(device)
            meter.seconds += time.time() - began
            progress["step"] = done = step + 1

            # Logging, held-out losses, checkpoints, pictures: none of it changes the step.
            if due(args.log_every, done, args.steps):
                log_line(args, meter, progress, norm, lr=args.lr * factor, flops=flops / world,
                         device=device)
            if rank == 0 and due(args.eval_every, done, args.steps):
                mean, by_range = held_out_means()
                append_line(folder / "log.jsonl",
                            dict(step=done, held_out=mean, held_out_by_t=by_range))
            if due(args.save_every, done, args.steps) or (stopping and args.save_every):
                save(folder, args, model, params, ema, optimizer, progress)
            if stopping:
                if world > 1:
                    dist.barrier()
                goes_on = f"; the same command goes on from the checkpoint in {folder}"
                print0(f"stopped at step {done}{goes_on if args.save_every else ''}")
                raise KeyboardInterrupt
            if rank == 0 and due(args.sample_every, done, args.steps):
                with averaged(params, ema):
                    path = folder / "samples" / f"{done:06d}.png"
                    sample_grid(model, eval_sets, 6, args.seed, path)

    # The same fixed examples and noise as before the run, with the averaged weights.
    after, _ = held_out_means()
    print0(f"{'held-out loss':<20}{'before':>9}{'after':>9}")
    for name, value in after.items():
        print0(f"{name:<20}{progress['before'][name]:>9.4f}{value:>9.4f}")
    if args.save_every:
        print0(f"saved in {folder}; {folder / 'samples'} has for each task a row of sources, if it "
               f"has any, of drawings and of targets. Next: python sample.py "
               f"--task {'edit' if 'edit' in tasks else tasks[0]} --model {folder}")


def micro_batches(args, start, rank, world):
    """Yield the numbers of the examples of each micro-batch of this process, from a step on."""
    per_rank = args.batch_size // world
    for step in range(start, args.steps):
        first = step * args.batch_size + rank * per_rank
        for i in range(first, first + per_rank, args.device_batch_size):
            yield range(i, i + args.device_batch_size)


def next_batch(batches):
    """Take the next batch. A worker's UserError comes wrapped in its traceback: unwrap it."""
    try:
        return next(batches)
    except UserError as error:
        message = str(error).strip().splitlines()[-1]
        raise UserError(message.removeprefix("hub.UserError: ")) from None


def log_line(args, meter, progress, norm, *, lr, flops, device):
    """Print the losses since the last line, and append them to log.jsonl.

    flops: of one sample, divided by the number of devices that share the samples. MFU is FLOP/s
    over what a device can do at its best; the frozen encoders, a teacher and the optimiser do not
    count.
    """
    mean, by_range, samples = meter.read(device)
    speed = samples / meter.seconds
    meter.seconds = 0.0
    peak = peak_flops(device, args.precision)
    losses = ", ".join(f"{name} {value:.4f}" for name, value in mean.items())
    skipped = f", {progress['skipped']} steps skipped" if progress["skipped"] else ""
    print0(f"step {progress['step']}: {losses}; lr {lr:.2e}, {speed:.1f} images/s{skipped}")
    if is_first():
        append_line(Path(args.out) / "log.jsonl", dict(
            step=progress["step"], loss=mean, loss_by_t=by_range, lr=lr,
            skipped=progress["skipped"],
            grad_norm=None if progress["in_a_row"] else norm.item(),
            images_per_s=round(speed, 2),
            mfu=peak and round(speed * flops / peak, 4)))


def main():
    args = get_args()
    model, teacher, opened, rank, world = prepare(args)
    train(args, model, teacher, opened, rank, world)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
