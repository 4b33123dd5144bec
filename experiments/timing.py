"""What the benchmarks share: interleaved timing, peak memory, and the two training steps.

Import it before any module of the project: it puts the project's folder on Python's path.
"""
import functools
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import common  # noqa: F401  puts the project's folder on the path
from diffusion import Diffusion
from unet import CONFIGS, UNet


# -------------------------------------------------------------------------------------------------
# Clocks

def seconds(function):
    """Time one call, up to the end of the work that it left on a GPU."""
    start = time.perf_counter()
    function()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def print_ratio(name, first, second, runs):
    """Print the ratio of the median times of two functions, and of the extreme pairs.

    Calls take turns, so that a change in the machine's speed meets both.
    """
    times = {first: [], second: []}
    for function in times:
        seconds(function)  # the first call allocates, and is not counted
    for i in range(runs):
        for function in (first, second) if i % 2 == 0 else (second, first):
            times[function].append(seconds(function))
    a, b = (statistics.median(times[function]) for function in (first, second))
    pairs = sorted(x / y for x, y in zip(times[first], times[second]))
    print(f"{name:<48}{a:>9.3f} s{b:>9.3f} s   ratio {a / b:.3f}"
          f"   pairs {pairs[0]:.3f} .. {pairs[-1]:.3f}", flush=True)


def print_both(networks, calls, runs):
    """Print the rows of the forward pass, and of forward and backward.

    networks: two modules. calls: for each a function that returns its output.
    """
    print_ratio("forward", *[torch.no_grad()(call) for call in calls], runs)

    def step(net, call):
        return lambda: backward(net, call())
    print_ratio("forward and backward", *map(step, networks, calls), runs)


def peak_memory(device, reset=False):
    """The most memory held since the last reset, in GB: CUDA's, or this process's on CPU."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e9
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return int(peak) * 1024 / 1e9


# -------------------------------------------------------------------------------------------------
# What is timed

@functools.cache
def random_unet(size):
    """Our U-Net of a released size with random weights; all rows of a benchmark share it."""
    torch.manual_seed(0)
    return UNet(CONFIGS[size])


def diffusers_unet(size):
    """diffusers' U-Net of that size, without storage: its weights are assigned."""
    from diffusers import UNet2DConditionModel
    with torch.device("meta"):
        return UNet2DConditionModel(**CONFIGS[size])


def make_batch(config, batch_size, side=32, device="cpu"):
    """What a training step starts from -> x0, noise (B, 4, h, w), context (B, 77, D), t (B,)."""
    x0, noise = torch.randn(2, batch_size, 4, side, side, device=device)
    context = torch.randn(batch_size, 77, config["cross_attention_dim"], device=device)
    return x0, noise, context, torch.full((batch_size,), 500, device=device)


def backward(module, out):
    """Send a gradient back from a module's output, and forget it."""
    out.square().mean().backward()
    module.zero_grad(set_to_none=True)


def our_step(net, params, batch, *, precision="fp32", average=None):
    """The training step of train.py on encoded inputs -> a function, and its optimizer."""
    x0, noise, context, t = batch
    diffusion = Diffusion.from_config({"_class_name": "DDPMScheduler"}).to(x0.device)
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.01, fused=True)
    average = average or [p.detach().clone() for p in params]

    def step():
        z_t = diffusion.add_noise(x0, noise, t)
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = net(z_t, t, context)
        diffusion.loss(out, x0, noise, t).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        if torch.isfinite(norm):
            optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in params], 1 - 0.9999)
        optimizer.zero_grad(set_to_none=True)
    return step, optimizer


def their_step(net, params, batch, *, precision="fp32"):
    """The training step of diffusers' scripts -> a function, its optimizer, and its average."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel
    x0, noise, context, t = batch
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.01)
    average = EMAModel(params)

    def step():
        noisy = scheduler.add_noise(x0, noise, t)
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=precision == "bf16"):
            prediction = net(noisy, t, context).sample
        loss = F.mse_loss(prediction.float(), noise.float())
        loss.item()  # their scripts log the loss of every step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(params)
    return step, optimizer, average
