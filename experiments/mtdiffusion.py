"""MT-Diffusion's claim: a network that carries another modality along draws better pictures.

    python experiments/mtdiffusion.py --data FOLDER     stages for 90 minutes; again, to go on
    python experiments/mtdiffusion.py --report          table and figure of what is there

In the paper, at equal iterations, FID falls from 23.2 (ADM) to 9.9 with a masked picture beside z_t
(-X) and to 13.5 with a label (-M, starred), while -U, with the masked picture in z_t alone, has
26.0. Here ADM-tiny, 2.2 million parameters, learns Fashion-MNIST at 16 x 16. All arms of a seed
have the same first weights, pictures, noise and timesteps, and what is measured is pure generation:
nothing of the other modality is known.

    plain                    DDPM
    U                        a masked picture is aggregated into z_t, and a head predicts it
    X                        the same, and the masked picture stands beside z_t too
    x beside z               it stands beside z_t, and nothing else: no aggregation, no head. The
                             control that a reviewer of the paper asked for
    M                        a label is aggregated into z_t, and a linear head predicts it
    M, no aggregation        the head alone

X and its control draw their pure generation from zeros beside z_t, which they know from the samples
that train without x. The paper does not print their share; here it is a half. So these two see half
as many samples of what is measured as the others.

Beside the distance, with the networks at the end:

    psnr in patches     of 200 test pictures with 5 to 20 patches, restored. The plain network does
                        it by replacement: at each step, what is visible is replaced by the picture
                        with noise, as RePaint does without its repetitions
    accuracy            share of 1,000 test pictures whose label the joint model infers in 10 steps
    accuracy, tuned     the head on the clean picture after 500 steps of training as a classifier;
                        `from scratch` is the same for a new network

The order is by seed, then by arm, and each run goes through both halves of its training before the
next one begins: after an interruption only the folder of the unfinished run is needed. Rule for
stopping early, fixed before the first run: none.
"""
import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common  # noqa: F401  puts the project's folder on the path
import aggregation
import frame
from diffusion import SAMPLERS, randn, seeded
from emoji import patched
from hub import Parser, UserError, command
from sample import draw_modalities, load_model

OPTIONS = "--batch-size 32 --lr 5e-4 --lr-schedule constant --warmup 200"
BESIDE = "--task masked --input x --drop 0.5"
# A schedule of zeros and a head without weight leave DDPM, with an idle head.
NO_AGGREGATION = " --schedule zero"
NO_HEAD = " --modality-weight 0"

ARMS = {
    "plain": "--task uncond",
    "U": "--task masked --drop 0",
    "X": BESIDE,
    "x beside z": BESIDE + NO_AGGREGATION + NO_HEAD,
    "M": "--task label --drop 0",
    "M, no aggregation": "--task label --drop 0" + NO_AGGREGATION,
}
RESTORED = 200
CLASSIFIED = 1000
TUNING = dict(steps=500, batch_size=64, lr=3e-4)


def is_label(arm):
    return arm.startswith("M")


def base(args, arm, seed):
    """The folder of the new network that an arm starts from: only the label needs classes."""
    if is_label(arm):
        return frame.fresh_model(f"{args.out}/base-label-{seed}", "adm-tiny", seed, frame.CLASSES)
    return frame.fresh_model(f"{args.out}/base-{seed}", "adm-tiny", seed)


# -------------------------------------------------------------------------------------------------
# Restoring what patches hide

def masked_pictures(pictures):
    """Hide patches of pictures (N, 3, H, W), the same ones in every call -> (N, 3, H, W)."""
    return torch.stack([patched(picture, np.random.default_rng(number))
                        for number, picture in enumerate(pictures)])


@torch.no_grad()
def restore_by_replacement(model, masked, steps):
    """Restore pictures (N, 3, H, W), zero where hidden, with a network that knows no x."""
    hidden = (masked == 0).all(dim=1, keepdim=True)
    noise = randn(masked.shape, seeded(range(len(masked))), "cpu")

    def predict(z, t):
        # The sampler's own tensor changes, so that its step starts from what is known.
        z.copy_(torch.where(hidden, z, model.diffusion.add_noise(masked, noise, t)))
        return model.unet(z, t, None)

    x0 = SAMPLERS["ddim"](model.diffusion, predict, noise.clone(), steps=steps)
    return torch.where(hidden, x0, masked)


def psnr_in_patches(model, pictures, steps):
    """Restore patches of pictures (N, 3, H, W) -> PSNR in dB over all hidden pixels."""
    masked = masked_pictures(pictures)
    if model.tasks == ["uncond"]:
        restored = restore_by_replacement(model, masked, steps)
    else:
        restored = draw_modalities(model, len(masked), {"masked": masked}, steps=steps,
                                   sampler="ddim")["image"]
    hidden = (masked == 0).all(dim=1, keepdim=True).expand_as(masked)
    error = (restored.clamp(-1, 1) - pictures)[hidden].square().mean()
    # The range of a picture is 2.
    return round((10 * torch.log10(4 / error)).item(), 2)


# -------------------------------------------------------------------------------------------------
# Recognising classes

def joint_accuracy(model, pictures, classes):
    """Share of pictures (N, 3, H, W) whose class (N,) the joint model infers, by Algorithm 1."""
    drawn = draw_modalities(model, len(pictures), {"image": pictures}, steps=10, sampler="ddim")
    return (drawn["label"].argmax(dim=1) == classes).double().mean().item()


def tuned_accuracy(model, training, test, seed):
    """Train a joint model as a classifier of clean pictures, in place -> accuracy on test pictures.

    training, test: pictures (N, 3, H, W) and classes (N,).
    """
    predict = aggregation.predictor(model.unet, model.unet, {}, None, None)

    def logits(pictures):
        _, outputs = predict(pictures, torch.zeros(len(pictures), dtype=torch.long))
        return outputs["label"]

    pictures, classes = training
    rng = np.random.default_rng(seed)
    model.unet.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=TUNING["lr"])
    for _ in range(TUNING["steps"]):
        chosen = torch.from_numpy(rng.integers(len(pictures), size=TUNING["batch_size"]))
        loss = F.cross_entropy(logits(pictures[chosen]), classes[chosen])
        # What the head does not read, such as the upward path, has no gradient and stays.
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.unet.eval()
    with torch.no_grad():
        found = torch.cat([logits(part).argmax(dim=1) for part in test[0].split(500)])
    return (found == test[1]).double().mean().item()


def classifier_data(args):
    """Enough training pictures for the tuning, and 2,000 test pictures."""
    return (frame.load_pictures(args.data, "train", TUNING["steps"] * TUNING["batch_size"]),
            frame.load_pictures(args.data, "heldout", 2 * CLASSIFIED))


def scratch_accuracy(args, seed):
    """Tune a new network with a new head, which has learned nothing before -> a row's numbers."""
    model = load_model(base(args, "M", seed))
    torch.manual_seed(seed)
    aggregation.prepare(model, "label", "label", classes=list(map(str, range(frame.CLASSES))))
    return {"accuracy, tuned": tuned_accuracy(model, *classifier_data(args), seed)}


# -------------------------------------------------------------------------------------------------
# Stages

def measure(args, the_frame, arm, seed, folder, last):
    """Measure a run's network -> a row's numbers."""
    row = the_frame.measure(folder)
    if not last:
        return row
    model = load_model(folder)
    if is_label(arm):
        pictures, classes = frame.load_pictures(args.data, "heldout", CLASSIFIED)
        row["accuracy"] = joint_accuracy(model, pictures, classes)
        row["accuracy, tuned"] = tuned_accuracy(model, *classifier_data(args), seed)
    else:
        pictures, _ = frame.load_pictures(args.data, "heldout", RESTORED)
        row["psnr in patches"] = psnr_in_patches(model, pictures, args.draw_steps)
    return row


def make_stages(args, the_frame):
    """List the stages: by seed, by arm, and the two halves of each run."""
    stages = []
    half = args.steps // 2
    for seed in range(args.seeds):
        for arm, task in ARMS.items():
            options = f"{OPTIONS} {task} --model {base(args, arm, seed)}"
            if is_label(arm):
                options += f" --k {args.k}"
            folder = Path(args.out) / f"{frame.slug(arm)}-{seed}"
            for start, step in ((0, half), (half, args.steps)):
                stages.append(frame.Stage(
                    arm, seed, step,
                    functools.partial(measure, args, the_frame, arm, seed, folder,
                                      step == args.steps),
                    pictures=args.count, options=options, out=folder, start=start))
        stages.append(frame.Stage("from scratch", seed, args.steps,
                                  functools.partial(scratch_accuracy, args, seed), pictures=0))
    return stages


def main():
    parser = Parser("Compare MT-Diffusion's variants and controls on Fashion-MNIST.")
    frame.add_options(parser, "mtdiffusion")
    parser.add_argument("--steps", type=int, default=12000, help="steps of each run")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each arm: seeds 0, 1, ..")
    parser.add_argument("--k", type=float, default=1.0, help="scale of the label's weights w_t")
    args = frame.parse_args(parser)
    if args.steps < 2 or args.seeds < 1:
        raise UserError("--steps is at least 2 and --seeds at least 1")
    if not args.report:
        settings = dict(options=OPTIONS, steps=args.steps, k=args.k)
        runner = frame.Runner(args, settings)
        stages = make_stages(args, runner.frame)
        runner.announce(stages)
        runner.run(stages)
    frame.report(args.results)


if __name__ == "__main__":
    command(main)
