"""How fast and how large is it, beside diffusers and beside itself without a method?

    python experiments/benchmark.py --size sd15 --runs 3
    python experiments/benchmark.py --size sd15 --runs 3 --only step
    python experiments/benchmark.py --size sdxl --only memory
    python experiments/benchmark.py --gpu

Rows are ratios of the medians of interleaved runs in one process; below 1 the first is faster.
Weights are random, latents 32 x 32, everything in fp32 on CPU.

Beside diffusers, with the same weights:
    unet      the U-Net forward, and forward and backward with all weights training
    vae       the autoencoder's encoding and decoding
    picture   one picture by assets/tiny in 20 guided steps
    step      the whole training step of diffusers' scripts; at SD 1.5's size it needs 19 GB
Beside itself: routed, upcycled and joint (benchmark_methods.py), memory, encoded, pictures and
merge (benchmark_models.py); memory and merge want a process of their own, as in the third command.
--gpu fills the table of a GPU instead, in benchmark_gpu.py, in less than ten minutes.
"""
import torch

import timing
import benchmark_methods
import benchmark_models
from data import ASSETS
from hub import Parser, command
from sample import generate, load_model
from vae import CONFIGS as VAE_CONFIGS, VAE


def unet_rows(args):
    ours = timing.random_unet(args.size)
    theirs = timing.diffusers_unet(args.size)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.requires_grad_(True)
    x, _, context, t = timing.make_batch(ours.config, args.batch_size)
    calls = [lambda: ours(x, t, context), lambda: theirs(x, t, context).sample]
    timing.print_both([ours, theirs], calls, args.runs)


@torch.no_grad()
def vae_rows(args):
    from diffusers import AutoencoderKL
    vae = VAE(VAE_CONFIGS[args.size])
    theirs = AutoencoderKL(**{k: v for k, v in vae.config.items() if not k.startswith("_")})
    theirs.load_state_dict(vae.state_dict())
    latents = torch.randn(args.batch_size, 4, 32, 32)
    pictures = torch.randn(args.batch_size, 3, 32 * vae.factor, 32 * vae.factor).clamp(-1, 1)
    timing.print_ratio("autoencoder: encode", lambda: vae.encode(pictures),
                       lambda: theirs.encode(pictures), args.runs)
    timing.print_ratio("autoencoder: decode", lambda: vae.decode(latents),
                       lambda: theirs.decode(latents), args.runs)


def picture_rows(args):
    from diffusers import StableDiffusionPipeline
    model = load_model(ASSETS / "tiny")
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "tiny", low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["pizza"] * args.batch_size
    timing.print_ratio("assets/tiny: a picture, 20 guided steps",
                       lambda: generate(model, "t2i", prompts, guidance=3.0, steps=20),
                       lambda: pipe(prompts, guidance_scale=3.0, num_inference_steps=20), args.runs)


def step_rows(args):
    # Two networks with gradients, moments and averages would need 34 GB at SD 1.5's size. A step's
    # time does not depend on the values, so both train the same tensors, in turn.
    ours = timing.random_unet(args.size)
    theirs = timing.diffusers_unet(args.size)
    theirs.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    params = list(ours.parameters())
    batch = timing.make_batch(ours.config, args.batch_size)
    second, their_optimizer, average = timing.their_step(theirs, params, batch)
    first, optimizer = timing.our_step(ours, params, batch, average=average.shadow_params)
    their_optimizer.state = optimizer.state
    timing.print_ratio("whole training step: AdamW, average", first, second, args.runs)


# Group of rows -> its function, and the names of its two columns.
ROWS = {"unet": (unet_rows, "ours", "diffusers"), "vae": (vae_rows, "ours", "diffusers"),
        "picture": (picture_rows, "ours", "diffusers"), "step": (step_rows, "ours", "diffusers"),
        **benchmark_methods.ROWS, **benchmark_models.ROWS}
USUAL = ("unet", "vae", "picture", "routed", "upcycled", "joint")


def main():
    parser = Parser("Time the project beside diffusers, and beside itself without a method.")
    parser.add_argument("--size", choices=tuple(benchmark_models.TEXT_TOWERS), default="sd15",
                        help="size of the model")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each")
    parser.add_argument("--batch-size", type=int, default=1, help="samples in a batch")
    parser.add_argument("--only", nargs="+", choices=tuple(ROWS), default=USUAL,
                        help="groups of rows")
    parser.add_argument("--compile", action="store_true", help="routed: also under torch.compile")
    parser.add_argument("--gpu", action="store_true", help="fill the table of a GPU instead")
    args = parser.parse_args()
    if args.gpu:
        import benchmark_gpu
        return benchmark_gpu.fill_table(args)
    print(f"{args.size}, batch {args.batch_size}, fp32, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")
    for name in args.only:
        rows, first, second = ROWS[name]
        print(f"{name:<48}{first:>11}{second:>11}")
        rows(args)


if __name__ == "__main__":
    command(main)
