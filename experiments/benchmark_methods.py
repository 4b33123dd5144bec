"""Rows of benchmark.py about what a method adds to the time of a step.

    routed    DTR's network against the plain one
    upcycled  MTU's network with four experts against the dense one, with the same weights training
    joint     MT-Diffusion's training step, with a picture or a class as the other modality, against
              the plain step; latents and text states are ready in both
"""
from dataclasses import replace

import torch

import timing
import aggregation
import moe
from data import ASSETS, TASKS
from routing import add_routing
from sample import load_model
from unet import CONFIGS, UNet


def copy_of(unet, size):
    """Another U-Net that holds the same weights, without a copy of them."""
    with torch.device("meta"):
        other = UNet(CONFIGS[size])
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.requires_grad_(True)


def routed_rows(args):
    ours = timing.random_unet(args.size)
    x, _, context, t = timing.make_batch(ours.config, args.batch_size)
    routed = add_routing(copy_of(ours, args.size))
    calls = [lambda: routed(x, t, context), lambda: ours(x, t, context)]
    timing.print_both([routed, ours], calls, args.runs)
    if args.compile:
        print("under torch.compile:")
        fast, plain = (torch.compile(net, fullgraph=True) for net in (routed, ours))
        calls = [lambda: fast(x, t, context), lambda: plain(x, t, context)]
        timing.print_both([routed, ours], calls, args.runs)


def upcycled_rows(args):
    ours = timing.random_unet(args.size)
    x, _, context, t = timing.make_batch(ours.config, args.batch_size)
    upcycled = moe.upcycle(UNet(CONFIGS[args.size]))
    # The control is the dense network, of which the same parts train; t2i reads four channels.
    for name, p in ours.named_parameters():
        p.requires_grad_(name.startswith("conv_in.") or ".ff." in name or ".norm3." in name)
    task = torch.zeros(args.batch_size, dtype=torch.long)
    calls = [lambda: upcycled(x, t, context, task=task), lambda: ours(x, t, context)]
    timing.print_both([upcycled, ours], calls, args.runs)
    ours.requires_grad_(True)


def joint_rows(args):
    ours = timing.random_unet(args.size)
    tiny = load_model(ASSETS / "tiny")
    x0, noise, context, t = timing.make_batch(ours.config, args.batch_size)
    given = torch.ones(args.batch_size)
    # Eight emoji are of five classes on average, and each class of a batch is encoded once.
    labels = torch.arange(args.batch_size) * 5 // 8
    shape = x0.shape[1:]
    names = torch.randn(10, *context.shape[1:])

    def plain():
        out = ours(tiny.diffusion.add_noise(x0, noise, t), t, context)
        tiny.diffusion.loss(out, x0, noise, t).sum().backward()
        ours.zero_grad(set_to_none=True)

    for task, head in (("translate", "image"), ("label", "linear")):
        modality = TASKS[task].modality
        unet = copy_of(ours, args.size)
        model = replace(tiny, unet=unet)
        aggregation.prepare(model, task, modality, head=head, classes=range(10))

        def joint():
            if task == "label":
                classes, rows = labels.unique(return_inverse=True)
                E = aggregation.unet_encoding(unet, shape, names[classes])[rows]
                known = aggregation.Known(labels, E, given)
            else:
                known = aggregation.Known(x0, x0, given)
            total, _ = aggregation.loss(unet.heads, lambda z, t: unet(z, t, context), x0,
                                        {modality: known}, noise, t)
            total.sum().backward()
            unet.zero_grad(set_to_none=True)
        timing.print_ratio(f"{task}: forward and backward", joint, plain, args.runs)


# Group of rows -> its function, and the names of its two columns.
ROWS = {"routed": (routed_rows, "routed", "plain"),
        "upcycled": (upcycled_rows, "upcycled", "dense"),
        "joint": (joint_rows, "joint", "plain")}
