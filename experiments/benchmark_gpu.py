"""The table of one GPU: benchmark.py --gpu prints it, in less than ten minutes on one card.

Rows: the training step at SD 1.5's size on latents of 512 x 512 pictures, bf16 autocast, all
weights training (of the upcycled network the paper's list): images a second, TFLOP/s, MFU and peak
memory, eager, with weights in channels_last, and under torch.compile; the same of diffusers' U-Net
with the training step of diffusers' scripts. Then the memory of one guided picture, and whether a
training run that was stopped and resumed on CUDA ends with the same bits.

Networks follow one after another: two of them would not fit beside each other on a small card.
"""
import functools
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch

import common
import timing
import benchmark_models
import moe
import train
from hub import UserError, open_weights, pick_device
from unet import CONFIGS, UNet

BATCH_SIZE = 8
WARMUP = 3
# Name, kind of network, channels_last, torch.compile.
VARIANTS = [
    ("ours, eager", "ours", False, False),
    ("ours, channels_last", "ours", True, False),
    ("ours, compiled", "ours", False, True),
    ("ours, channels_last, compiled", "ours", True, True),
    ("ours, upcycled, channels_last", "upcycled", True, False),
    ("diffusers, eager", "diffusers", False, False),
    ("diffusers, channels_last", "diffusers", True, False),
    ("diffusers, channels_last, compiled", "diffusers", True, True),
]


def make_network(kind, device):
    """A network of SD 1.5's size with random weights, whose weights train."""
    if kind == "diffusers":
        net = timing.diffusers_unet("sd15").to_empty(device=device)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.02)
        return net.requires_grad_(True)
    with torch.device(device):
        net = UNet(CONFIGS["sd15"])
    return moe.upcycle(net).to(device) if kind == "upcycled" else net


def measure_step(kind, channels_last, compiles, device, runs):
    """Time one kind of training step -> images a second, and peak memory in GB."""
    gc.collect()
    torch.cuda.empty_cache()
    timing.peak_memory(device, reset=True)
    net = make_network(kind, device)
    if channels_last:
        train.channels_last(net)
    params = [p for p in net.parameters() if p.requires_grad]
    batch = timing.make_batch(CONFIGS["sd15"], BATCH_SIZE, side=64, device=device)
    forward = torch.compile(net) if compiles else net
    if kind == "upcycled":
        task = torch.zeros(BATCH_SIZE, dtype=torch.long, device=device)
        forward = functools.partial(forward, task=task)
    make_step = timing.their_step if kind == "diffusers" else timing.our_step
    step = make_step(forward, params, batch, precision="bf16")[0]
    # The first steps compile, choose algorithms and allocate Adam's moments.
    for _ in range(WARMUP):
        step()
    torch.cuda.synchronize()
    seconds = statistics.median(timing.seconds(step) for _ in range(runs))
    return BATCH_SIZE / seconds, timing.peak_memory(device)


def step_flops(kind):
    """FLOPs of one sample's training step; those of diffusers' network are the same as ours."""
    with torch.device("meta"):
        net = UNet(CONFIGS["sd15"])
    if kind == "upcycled":
        return train.count_flops(moe.upcycle(net), backward=True)
    return train.count_flops(net, backward=True)


def resumes_exactly(folder):
    """Train eight steps at once, and four and four -> whether the two checkpoints are equal."""
    def run(name, steps):
        common.train(["--task", "all", "--lr-schedule", "constant", "--warmup", "0",
                      "--steps", str(steps), "--sample-every", "0", "--eval-size", "4",
                      "--device", "cuda"], folder / name)
        return folder / name / "state" / "state.safetensors"

    whole = run("whole", 8)
    run("resumed", 4)
    resumed = run("resumed", 8)
    # Weights, their average and Adam's moments: nothing else goes from step to step.
    with open_weights(whole) as a, open_weights(resumed) as b:
        different = [key for key in a.keys()
                     if not torch.equal(a.get_tensor(key), b.get_tensor(key))]
    return f"no: {len(different)} tensors differ" if different else "yes, bit for bit"


def fill_table(args):
    device = pick_device()
    if device.type != "cuda":
        raise UserError("--gpu needs a CUDA device, and there is none here")
    begin = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    peak = train.peak_flops(device, "bf16")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, SD 1.5's U-Net, "
          f"64 x 64 latents, batch {BATCH_SIZE}, bf16 autocast\n"
          "| training step | images/s | TFLOP/s | MFU | peak GB |\n|---|---|---|---|---|")
    for name, kind, channels_last, compiles in VARIANTS:
        speed, memory = measure_step(kind, channels_last, compiles, device, args.runs)
        flops = speed * step_flops(kind)
        mfu = f"{flops / peak:.1%}" if peak else "unknown"
        print(f"| {name} | {speed:.1f} | {flops / 1e12:.0f} | {mfu} | {memory:.1f} |", flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    benchmark_models.memory_rows(args)
    with tempfile.TemporaryDirectory() as folder:
        print(f"a run that was stopped and resumed: {resumes_exactly(Path(folder))}")
    print(f"{time.perf_counter() - begin:.0f} s")
