"""How fast beside diffusers: ratios of medians of interleaved runs in one process, below 1 is faster.

    python tests/benchmark.py --size sd15 --runs 5
    python tests/benchmark.py --size sd15 --runs 9 --only routed --compile
    python tests/benchmark.py --size sd15 --runs 3 --only step
    python tests/benchmark.py --size sd15 --runs 3 --only joint
    python tests/benchmark.py --size sdxl --only memory
    python tests/benchmark.py --size sd15 --only merge
    python tests/benchmark.py --size sd15 --runs 3 --only cache

Rows: forward; forward and backward with all weights training (ours against diffusers' UNet2DConditionModel with the same weights, random);
the autoencoder likewise; a whole picture of assets/tiny in 20 guided steps against diffusers' pipeline; the U-Net upcycled to four experts
against the dense one, both ours, with the same weights training; and the routed one (DTR) against the plain one. Latents are 32 x 32.

joint: a training step of MT-Diffusion, forward and backward, against the plain step of the same U-Net: with a picture as the other modality, and
with a label, which the U-Net encodes, each class of the batch once, or every sample. All begin with ready latents and text states: the frozen
autoencoder's second picture is not counted.

step: the whole training step against that of diffusers' training scripts: noise, forward, loss, backward, clipping, AdamW on all weights, their
average; on a GPU also under bf16 autocast. It needs 19 GB of memory at SD 1.5's size.

memory: the peak while one guided picture of the model's own size is drawn in bf16, of CUDA's memory, or of the process on CPU above what it
held before the weights. merge: four copies of the U-Net's file in fp32 merged into the fifth, beside reading the five and writing one, and the
peak memory; it needs six files' room in the folder. cache: forward and backward of the upcycled U-Net in the task edit at the model's own size,
with the frozen encoders' work before it (two pictures, a text), which train.py --cache does once, against without.
"""
import argparse
import copy
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import clip  # noqa: E402
import joint  # noqa: E402
import merge  # noqa: E402
import moe  # noqa: E402
import train  # noqa: E402
from aggregation import each_class_once, joint_loss  # noqa: E402
from data import ASSETS  # noqa: E402
from diffusion import Diffusion  # noqa: E402
from folders import compiled, pick_device  # noqa: E402
from routing import add_routing  # noqa: E402
from sample import Model, generate, load_model  # noqa: E402
from unet import CONFIGS, UNet  # noqa: E402
from vae import CONFIGS as VAE_CONFIGS, VAE  # noqa: E402


PARTS = ("unet", "vae", "picture", "routed", "upcycled", "joint")  # step, memory, merge and cache where they are asked for


def seconds(f):
    """One call's, with what a GPU has still to do."""
    start = time.perf_counter()
    f()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def ratio(name, ours, theirs, runs):
    """Interleave, so that a change in the machine's speed meets both; the order alternates."""
    times = {ours: [], theirs: []}
    for f in (ours, theirs):
        seconds(f)
    for i in range(runs):
        for f in ((ours, theirs), (theirs, ours))[i % 2]:
            times[f].append(seconds(f))
    a, b = (statistics.median(times[f]) for f in (ours, theirs))  # seconds
    pairs = sorted(x / y for x, y in zip(times[ours], times[theirs]))
    print(f"{name:<44}{a:>9.3f} s{b:>9.3f} s   ratio {a / b:.3f}   pairs {pairs[0]:.3f} .. {pairs[-1]:.3f}", flush=True)
    return b


def share(name, f, whole, runs):
    """What f takes by itself, of a plain step of `whole` seconds."""
    seconds(f)
    alone = statistics.median(seconds(f) for _ in range(runs))
    print(f"{name:<44}{alone:>9.3f} s{'':>11}   of the plain step {alone / whole:.1%}", flush=True)


def recorded(modules, run):
    """-> (module, *its inputs) of every call of one of them in run()."""
    seen = []
    hooks = [module.register_forward_pre_hook(lambda module, args: seen.append((module, *args))) for module in modules]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def masks_alone(routed, run):
    """-> what routing adds to a training step, to be timed by itself: each block's mask and its products with x, forward and backward."""
    inputs = [(block, x.detach().requires_grad_(), cond.t)
              for block, x, cond in recorded([block for block in routed.modules() if hasattr(block, "mask")], run)]

    def products():
        for block, x, t in inputs:
            m = block.mask(t).to(x.dtype)
            m = m[:, None] if x.dim() == 3 else m[:, :, None, None]
            y = m * x + (1 - m) * x if x.dim() == 3 else m * x  # of the transformer block, of the residual block
            y.backward(torch.ones_like(y))
    return products


def experts_alone(upcycled, run):
    """-> what MTU adds to a training step, to be timed by itself: each FFN's router and weights on its inner activations and biases, and the whole
    task convolution, though the dense network has one as well: an upper bound. Forward and backward."""
    seen = recorded([m for m in upcycled.modules() if isinstance(m, (moe.ExpertFeedForward, moe.TaskConv))], run)
    seen = [(module, x.detach() if module is upcycled.conv_in else module.net[0](x).detach().requires_grad_(), cond) for module, x, cond in seen]

    def added():
        for module, x, cond in seen:
            if module is upcycled.conv_in:
                module(x, cond).sum().backward()
                continue
            w = module.weights(cond.task_emb.detach())
            y = x * (module.scale * w).repeat_interleave(x.shape[-1] // module.num_experts, dim=-1)[:, None]
            torch.autograd.backward([y, w @ module.out_bias], [torch.ones_like(y), torch.ones_like(y[:, 0, :module.out_bias.shape[1]])])
        upcycled.zero_grad(set_to_none=True)
    return added


def peak_memory(device, reset=False):
    """GB; reset: begin anew."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats() if reset else torch.cuda.max_memory_allocated() / 1e9
    if reset:
        return Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def whole_model(size, device, dtype):
    """All parts at their released sizes, with random weights and the miniature's tokenizer."""
    tiny, vocabulary = load_model(ASSETS / "tiny"), dict(vocab_size=49408)
    text = {"tiny": ["tiny"], "sd15": ["clip_l"], "sdxl": ["clip_l", "clip_bigg"]}
    with torch.device("meta"):
        parts = [UNet(CONFIGS[size]), VAE(VAE_CONFIGS[size]), *[clip.CLIPText(clip.CONFIGS[name] | vocabulary) for name in text[size]]]
    for part in parts:
        part.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        for p in part.parameters():
            p.normal_(std=0.02)
    unet, vae, *encoders = parts
    second = [part for encoder in encoders[1:] for part in (encoder, tiny.tokenizer)]
    return Model(unet, vae, encoders[0], tiny.tokenizer, tiny.scheduler, {}, *second)


def memory(size, runs):
    device = pick_device()
    peak_memory(device, reset=True)
    before, model = peak_memory(device), whole_model(size, device, torch.bfloat16)
    parts = [model.unet, model.vae, *[encoder for _, encoder in model.texts]]
    weights = sum(p.nbytes for part in parts for p in part.parameters()) / 1e9
    print(f"{size}, one picture of {model.native_size} x {model.native_size}, bf16, {device}: weights {weights:.2f} GB", flush=True)
    for low in (False, True):
        peak_memory(device, reset=True)
        generate(model, "t2i", ["pizza"], guidance=7.5, steps=1, low_memory=low)
        print(f"peak {'with --low-memory' if low else '':<20}{peak_memory(device) - before:>6.2f} GB", flush=True)


def cached(size, runs):
    device = pick_device()
    model, bf16 = whole_model(size, device, torch.float32), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    unet, side, task = moe.upcycle(model.unet), model.unet.config["sample_size"], torch.ones(1, dtype=torch.long, device=device)  # edit
    pictures = torch.rand(2, 3, model.native_size, model.native_size, device=device) * 2 - 1
    x, t, (context, pooled) = torch.randn(1, 8, side, side, device=device), torch.full((1,), 500, device=device), model.encode_text(["make it snow"])

    @torch.no_grad()
    def encode():
        with bf16:
            model.vae.encode(pictures[:1]), model.vae.encode(pictures[1:])
            model.encode_text(["make it snow"])

    def step():
        with bf16:
            unet(x, t, context, task=task, added=model.added(pooled, *[model.native_size] * 2)).square().mean().backward()
        unet.zero_grad(set_to_none=True)

    print(f"{f'{size}, {model.native_size} x {model.native_size}, {device}':<44}{'encodes':>11}{'from cache':>11}")
    ratio("training step of edit, upcycled U-Net", lambda: (encode(), step()), step, runs)


def merging(size, runs):
    with tempfile.TemporaryDirectory(dir=".") as folder:
        first, *tuned = folders = [Path(folder) / name for name in "ABCDE"]
        UNet(CONFIGS[size]).save_pretrained(first / "unet")
        (first / "model_index.json").write_text("{}")
        for other in tuned:
            shutil.copytree(first, other)
        name = "unet/diffusion_pytorch_model.safetensors"
        file = (first / name).stat().st_size
        os.sync()
        start = time.perf_counter()
        for other in folders:
            with open(other / name, "rb") as f:
                while f.read(2 ** 26):
                    pass
        shutil.copyfile(first / name, Path(folder) / "copy")
        os.sync()
        disk = time.perf_counter() - start
        peak_memory(cpu := torch.device("cpu"), reset=True)
        before, start = peak_memory(cpu), time.perf_counter()
        merge.merge_folders(first, tuned, [0.1, 0.2, 0.3, 0.4], Path(folder) / "merged")
        os.sync()
        took = time.perf_counter() - start
        memory = peak_memory(cpu) - before
        print(f"{size}, five files of {file / 1e9:.2f} GB: merged in {took:.1f} s, read and written in {disk:.1f} s, ratio {took / disk:.2f}; "
              f"peak memory {memory:.2f} GB, {memory * 1e9 / file:.2f} files")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "sd15", "sdxl"), default="sd15")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, help="default 1; of tiny's step and joint 4, of joint's labels twice as many")
    parser.add_argument("--only", nargs="+", choices=(*PARTS, "step", "memory", "merge", "cache"), default=PARTS, help="groups of rows")
    parser.add_argument("--compile", action="store_true", help="routed: also the training step under torch.compile; step: ours under it")
    args = parser.parse_args()
    alone = {"memory": memory, "merge": merging, "cache": cached}
    if len(args.only) == 1 and args.only[0] in alone:
        return alone[args.only[0]](args.size, args.runs)
    config, B = CONFIGS[args.size], args.batch_size or 1
    torch.manual_seed(0)
    ours = UNet(config)
    x, t, text = torch.randn(B, 4, 32, 32), torch.full((B,), 500), torch.randn(B, 77, config["cross_attention_dim"])

    def step(f, module):
        def run():
            f().square().mean().backward()
            module.zero_grad(set_to_none=True)
        return run

    def forward(f):
        return torch.no_grad()(f)

    print(f"{args.size}, batch {B} but where told, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    a = lambda: ours(x, t, text)  # noqa: E731
    if {"unet", "vae", "picture"} & set(args.only):
        beside_diffusers(args, config, ours, (x, t, text), step, forward)
    if "routed" in args.only:
        with torch.device("meta"):
            routed = UNet(config)
        routed.load_state_dict(ours.state_dict(), assign=True)
        routed = add_routing(routed.requires_grad_(True))
        c = lambda: routed(x, t, text)  # noqa: E731
        print(f"{'':<44}{'routed':>11}{'plain':>11}")
        ratio("forward", forward(c), forward(a), args.runs)
        whole = ratio("forward and backward", step(c, routed), step(a, ours), args.runs)
        share("the masks and their products alone", masks_alone(routed, c), whole, args.runs)
        if args.compile:
            fast, plain = (torch.compile(module, fullgraph=True) for module in (routed, ours))
            ratio("forward and backward, compiled", step(lambda: fast(x, t, text), routed), step(lambda: plain(x, t, text), ours), args.runs)
        routed = fast = plain = None
    if "upcycled" in args.only:
        # the dense U-Net with the same parts trainable is the control; t2i meets four channels in both
        upcycled = moe.upcycle(UNet(config))
        ours.requires_grad_(False)
        for name, p in ours.named_parameters():
            p.requires_grad_(name.startswith("conv_in.") or ".ff." in name or ".norm3." in name)
        task = torch.zeros(B, dtype=torch.long)
        mixed = lambda: upcycled(x, t, text, task=task)  # noqa: E731
        print(f"{'':<44}{'upcycled':>11}{'dense':>11}")
        ratio("forward", forward(mixed), forward(a), args.runs)
        whole = ratio("forward and backward", step(mixed, upcycled), step(a, ours), args.runs)
        share("the experts' weights, task convolution alone", experts_alone(upcycled, mixed), whole, args.runs)
        upcycled = None
    ours.to(pick_device()).requires_grad_(True)
    if "joint" in args.only:
        joint_steps(args, ours, step)
    if "step" in args.only:
        whole_step(args, ours)


def ready(B, width, device, side=32):
    """A batch as the training step meets it: latents, noise, those of another picture, text states, timesteps."""
    return *torch.randn(3, B, 4, side, side, device=device), torch.randn(B, 77, width, device=device), torch.full((B,), 500, device=device)


def joint_steps(args, ours, step):
    device, width, tiny = ours.conv_out.weight.device, ours.config["cross_attention_dim"], load_model(ASSETS / "tiny")
    plain, B = train.Denoiser(ours, None, tiny.diffusion.to(device)), args.batch_size or {"tiny": 4}.get(args.size, 1)

    def attached(task, head):
        with torch.device("meta"):
            unet = UNet(CONFIGS[args.size])
        unet.load_state_dict(ours.state_dict(), assign=True)
        model = replace(tiny, unet=unet.requires_grad_(True), index={})
        joint.attach(model, task, head, "z", "vanishing")
        return model, joint.Denoiser(model)

    def against_plain(name, denoiser, known):
        return ratio(name, step(lambda: denoiser(x0, known(), text, t, noise, None)[1], denoiser),
                     step(lambda: plain(x0, None, text, t, noise, None)[1], plain), args.runs)

    _, denoiser = attached("translate", "image")
    x0, noise, E, text, t = ready(B, width, device)
    known = dict(E=E[None], x={"source": E}, given=torch.ones(1, B, device=device))
    print(f"{f'{device}, fp32, batch {B}':<44}{'joint':>11}{'plain':>11}")
    whole = against_plain("translate: a picture and its source", denoiser, lambda: known)
    # whole steps scatter by more than this: Eq. 6 on what the U-Net returned before. It holds the plain step's own loss too
    with torch.no_grad():
        prediction, features = denoiser.unet(x0, t, text, return_features=True)
    returned = prediction.requires_grad_(), {name: feature.requires_grad_() for name, feature in features.items()}
    share("aggregation, head and losses alone", step(lambda: joint_loss(
        denoiser.diffusion, denoiser.aggregation, lambda z, t: returned, denoiser.heads, x0, t, noise, **known)[0], denoiser.heads), whole, args.runs)

    model, denoiser = attached("label", "linear")
    B = args.batch_size or 2 * B
    x0, noise, _, text, t = ready(B, width, device)
    names = torch.randn(len(joint.classes()), 77, width, device=device)
    labels = torch.arange(B, device=device) * 5 // 8 % len(names)  # 8 emoji are of 5 classes on average; 2 here are of one, the most there is to save

    def encode(numbers):
        return joint.encoding(model, names.index_select(0, numbers), 32, 32)

    print(f"{f'{device}, fp32, batch {B}':<44}{'joint':>11}{'plain':>11}")
    encoders = {f"each class once, {len(labels.unique())} of {B}": lambda: each_class_once(encode, labels),
                f"each sample, {B} of {B}": lambda: encode(labels)}
    for name, encoded in encoders.items():
        whole = against_plain(f"label: encodes {name}", denoiser, lambda: dict(
            E=encoded()[None], x={"label": labels}, given=torch.ones(1, B, device=device)))
        share("that encoding alone", encoded, whole, args.runs)


def whole_step(args, ours):
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import EMAModel
    device, width, B = ours.conv_out.weight.device, ours.config["cross_attention_dim"], args.batch_size or {"tiny": 4}.get(args.size, 1)
    x0, noise, _, text, t = ready(B, width, device, ours.config["sample_size"] if device.type == "cuda" else 32)
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**CONFIGS[args.size])
    # Two U-Nets, each with its gradients, moments and average, would be 34 GB at SD 1.5's size. The time of a step does not depend on the values, so
    # on CPU both train the same parameters, by turns, with the same moments and the same average
    together = device.type == "cpu"
    theirs.load_state_dict(ours.state_dict(keep_vars=True) if together else copy.deepcopy(ours.state_dict()), assign=True)
    if not together:
        train.channels_last(ours)
    theirs.requires_grad_(True)
    scheduler, average, params = DDPMScheduler(), EMAModel(theirs.parameters()), list((theirs if together else ours).parameters())
    denoiser = train.Denoiser(ours, None, Diffusion.from_config({"_class_name": "DDPMScheduler"}).to(device))
    run = compiled(denoiser, device) if args.compile else denoiser
    ema = average.shadow_params if together else [p.detach().clone() for p in params]
    optimizer = train.make_optimizer(train.parameter_groups(denoiser, 0.01, 1e-4), device, zero=False)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.01)
    if together:
        their_optimizer.state = optimizer.state

    def our_step():
        with autocast:
            _, weighted = run(x0, None, text, t, noise, None)
            train.total_loss(weighted, 1, B).backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        if torch.isfinite(norm):
            optimizer.step()
            torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - 0.9999)
        optimizer.zero_grad(set_to_none=True)

    def their_step():
        noisy = scheduler.add_noise(x0, noise, t)
        with autocast:
            prediction = theirs(noisy, t, text).sample
        loss = F.mse_loss(prediction.float(), noise.float())
        loss.item()  # they log every step's
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_optimizer.step()
        their_optimizer.zero_grad()
        average.step(theirs.parameters())

    print(f"{f'{device}, batch {B}':<44}{'ours':>11}{'diffusers':>11}")
    for precision in ["fp32"] + ["bf16"] * (device.type == "cuda"):
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        ratio(f"whole training step, AdamW, average, {precision}", our_step, their_step, args.runs)


def beside_diffusers(args, config, ours, inputs, step, forward):
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    (x, t, text), B = inputs, args.batch_size or 1
    print(f"{'':<44}{'ours':>11}{'diffusers':>11}")
    if "unet" in args.only:
        with torch.device("meta"):
            theirs = UNet2DConditionModel(**config)
        theirs.load_state_dict(ours.state_dict(), assign=True)
        theirs.requires_grad_(True)
        a, b = lambda: ours(x, t, text), lambda: theirs(x, t, text).sample
        ratio("forward", forward(a), forward(b), args.runs)
        ratio("forward and backward", step(a, ours), step(b, theirs), args.runs)
    if "vae" in args.only:
        vae = VAE(VAE_CONFIGS[args.size])
        vae_theirs = AutoencoderKL(**{k: v for k, v in vae.config.items() if not k.startswith("_")})
        vae_theirs.load_state_dict(vae.state_dict())
        latents = torch.randn(B, 4, 32, 32)
        pictures = torch.randn(B, 3, 32 * vae.factor, 32 * vae.factor).clamp(-1, 1)
        ratio("autoencoder: encode", forward(lambda: vae.encode(pictures)), forward(lambda: vae_theirs.encode(pictures)), args.runs)
        ratio("autoencoder: decode", forward(lambda: vae.decode(latents)), forward(lambda: vae_theirs.decode(latents)), args.runs)
    if "picture" in args.only:
        model, pipe = load_model(ASSETS / "tiny"), StableDiffusionPipeline.from_pretrained(ASSETS / "tiny", low_cpu_mem_usage=False)
        pipe.set_progress_bar_config(disable=True)
        ratio("assets/tiny: a picture, 20 guided steps", lambda: generate(model, "t2i", ["pizza"] * B, guidance=3.0, steps=20),
              lambda: pipe(["pizza"] * B, guidance_scale=3.0, num_inference_steps=20), args.runs)


if __name__ == "__main__":
    main()
