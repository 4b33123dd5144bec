"""What train.py can be asked: its options, their defaults and the papers' values; recipes of papers; what is refused at once."""
import argparse
import importlib.util

import adm
import joint
from aggregation import SCHEDULES
from data import ALL, ASSETS
from folders import HelpFormatter, UserError
from routing import MODES

# MTU's recipes, 8 devices of 16 samples. Its Table 2: FID 7.2 from text, I-T 17.2 of edits, LPIPS 24.8 of sr, I-I 44.0 of inpaint; with SDXL 3.9,
# 20.1, 26.5, 44.2. 100 epochs of the 513,829 examples of its four data sets together would be 401,429 steps; what an epoch is, and the schedule, are
# not stated.
PRESETS = {
    "mtu-sd15": dict(model="stable-diffusion-v1-5/stable-diffusion-v1-5", batch_size=128, lr=1e-4, lr_schedule="constant", num_experts=4),
    "mtu-sdxl": dict(model="stabilityai/stable-diffusion-xl-base-1.0", batch_size=128, lr=5e-5, lr_schedule="constant", num_experts=1,
                     weight_decay=0.01),
}


def get_args():
    p = argparse.ArgumentParser(description="Train on one task or on all.", formatter_class=HelpFormatter)
    p.add_argument("--task", help=f"all ({', '.join(ALL)}; the default, of --t-range and --decouple the model's own), one or several of them, "
                   f"one named twice has twice the samples; or one of uncond, {', '.join(joint.SETTINGS)}")
    p.add_argument("--model", default=str(ASSETS / "tiny"), help="folder or hub id to start from, or scratch (t2i, uncond, translate, masked, label)")
    p.add_argument("--preset", choices=tuple(PRESETS), help="a paper's recipe as the defaults of the other options, see PRESETS; give it --steps")
    p.add_argument("--unet", choices=tuple(adm.CONFIGS), help="of --model scratch, but for t2i, see adm.CONFIGS; default adm-tiny")
    p.add_argument("--vae", default=str(ASSETS / "tiny"), help="with --model scratch: the folder whose vae/ is used")
    p.add_argument("--text-encoder", help="folder or hub id with a text_encoder/ and its tokenizer/, which take the place of the model's; from "
                   "scratch they are then frozen. python clip.py makes one for the miniature")
    p.add_argument("--data", help="folder of your own pictures (data.Folder); default: the built-in emoji")
    p.add_argument("--cache", help="folder for latents and text states of --data, made where it is missing: nothing is then encoded twice")
    p.add_argument("--out", help="run folder; default runs/TASK. The same command again resumes it")
    p.add_argument("--steps", type=int, help="default 200, from scratch 5000; the paper: 100 epochs")
    p.add_argument("--batch-size", type=int, default=32, help="global, a multiple of the number of tasks named (the paper: 128)")
    p.add_argument("--device-batch-size", type=int, help="samples at a time on one device; the rest is accumulated. Default: all")
    p.add_argument("--lr", type=float, help="default 1e-3 for the miniature, else the paper's 1e-4")
    p.add_argument("--lr-schedule", choices=("constant", "cosine"), default="cosine", help="after the warm-up; cosine ends at zero")
    p.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    p.add_argument("--weight-decay", type=float, default=0.0, help="AdamW, on weight matrices only (the paper: 0.01 for SDXL)")
    p.add_argument("--ema", type=float, default=0.9999, help="largest decay of the weight average; (1 + step) / (10 + step) before")
    p.add_argument("--loss-weight", choices=("none", "v", "min-snr", "p2", "uw"), default="none", help="of timesteps (MTU: none); uw learns them")
    p.add_argument("--num-experts", type=int, default=4, help="N, experts per FFN (the paper: 4 for SD 1.5, 1 for SDXL)")
    p.add_argument("--expert-init", choices=("preserve", "literal"), default="preserve", help="preserve equals the dense network at step 0")
    p.add_argument("--expert-width", type=float, help="the paper's G, as a share of the FFN's width; default 1/N")
    p.add_argument("--top-k", type=int, help="keep the k largest router weights; default all")
    p.add_argument("--full", action="store_true", help="train the whole upcycled U-Net, not only the paper's list")
    p.add_argument("--train-text-encoder", action="store_true", help="which the paper freezes; the miniature's has read little, see README")
    p.add_argument("--routing", choices=MODES, help="dtr: each timestep sees its window of channels; random: the control. Default: none")
    p.add_argument("--alpha", type=float, default=4.0, help="of --routing: the window moves with t to this power (the paper: 4)")
    p.add_argument("--beta", type=float, default=0.8, help="of --routing: share of channels that a timestep sees (the paper: 0.8)")
    p.add_argument("--t-range", type=int, nargs=2, metavar=("START", "END"), help="DeMe: tune for timesteps START <= t < END. Default: all alike")
    p.add_argument("--decouple", type=int, metavar="N", help="DeMe as a whole: N ranges, a copy for each, weights searched, merged; --out runs/deme")
    p.add_argument("--p-global", type=float, default=0.3, help="of both: share of samples from all timesteps (the official code: 0.3)")
    p.add_argument("--consistency", type=float, default=1.0, help="of both: weight of staying near the pretrained output (the paper: 1)")
    p.add_argument("--projection", nargs="?", const="convolutions", choices=("convolutions", "blocks"),
                   help="of both: channel projections after convolutions (the default), folded on saving; or after blocks, kept (the official code)")
    p.add_argument("--antithetic", action="store_true", help="of both: one draw of the range a batch, its second half mirrored (the official code)")
    p.add_argument("--head", choices=("image", "linear", "classifier"), help="MT-Diffusion: of label, linear (-M, the default) or classifier (-E)")
    p.add_argument("--input", choices=("z", "x"), help="of translate and masked: x enters beside z_t (-X), or not (-U, the default)")
    p.add_argument("--drop", type=float, help="of joint tasks: share of samples that train without x (starred); default 0.1, of translate -U 0")
    p.add_argument("--schedule", choices=SCHEDULES, help="of joint tasks: the weights w_t of x in the forward process; default vanishing; "
                   "interpolating is for x that is always given, and for betas that do not end in pure noise")
    p.add_argument("--head-weight", type=float, help="of joint tasks: lambda of Eq. 6, default the paper's 0.1")
    p.add_argument("--image-encoder", help="of repr: folder or hub id of a CLIP image tower, its vectors as wide as the U-Net's cross-attention; "
                   "x is then its vector of the picture. Default: the text encoder's of the caption, even where --model has an image_encoder/, "
                   "unless it was trained with that")
    p.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 autocast or fp32; default bf16 on cuda, else fp32")
    p.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler on CPU")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory, one more forward")
    p.add_argument("--zero", action="store_true", help="Adam's moments divided among the processes of torchrun (ZeRO stage 1)")
    p.add_argument("--device", help="default: cuda, else mps, else cpu")
    p.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    p.add_argument("--save-every", type=int, default=200, help="steps between checkpoints, 0 for none, not at the end either")
    p.add_argument("--sample-every", type=int, help="steps between sample grids, 0 for none; default: half way and at the end")
    p.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl")
    p.add_argument("--eval-size", type=int, default=64, help="held-out examples per task for the loss before and after")
    p.add_argument("--eval-every", type=int, default=0, help="steps between lines of log.jsonl with that loss, also per range of timesteps; 0: none")
    p.add_argument("--tensorboard", action="store_true", help="log.jsonl's numbers for TensorBoard too, in --out; needs its package")
    p.add_argument("--bench", action="store_true", help="train for --steps, default 30, leave nothing behind but --cache, and print the speed")
    p.add_argument("--seed", type=int, default=0, help="of all that is random")
    p.set_defaults(**PRESETS.get(p.parse_known_args()[0].preset, {}))
    return p.parse_args()


def check(args):
    """Numbers that mean nothing, before anything is read or computed."""
    for name in ("steps", "batch_size", "device_batch_size", "log_every", "eval_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1")
    if (not 0 <= args.ema < 1 or (args.lr is not None and not 0 < args.lr < float("inf")) or not 0 <= args.weight_decay < float("inf")
            or min(args.warmup, args.workers, args.eval_every, args.save_every) < 0 or not 0 <= args.seed < 2 ** 62):
        raise UserError(f"--ema {args.ema} must be in [0, 1), --lr {args.lr} above 0, --weight-decay {args.weight_decay}, --warmup {args.warmup}, "
                        f"--workers {args.workers}, --eval-every {args.eval_every}, --save-every {args.save_every} and --seed {args.seed} at least 0")
    if args.t_range is None and (args.projection or args.antithetic) or not 0 <= args.consistency < float("inf"):
        raise UserError(f"--projection and --antithetic go with --t-range, and --consistency {args.consistency} is at least 0")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard")
    if args.cache and not args.data:
        raise UserError("--cache goes with --data: the built-in pictures are drawn anew each time")
