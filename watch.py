"""What a run tells while it trains: log.jsonl, TensorBoard, and its speed beside what the device can do.

FLOPs are those of the U-Net's products, attention's included, forward and backward, as the run needs them: weights that do not train have no
gradient of their own. A multiplication and an addition are two. Encoders, heads, a teacher, DeMe's projections, the optimizer and what
--gradient-checkpointing computes again do not count. MFU is FLOP/s over the device's peak (dense, without sparsity), where PEAK has it.
"""
import json
import re
import sys

import torch

from folders import writing

PEAK = {  # name in torch.cuda.get_device_name -> TFLOP/s in bf16 and, as fp32 runs use it, TF32, of one device
    "H200": (989, 494), "H100 PCIe": (756, 378), "H100": (989, 494), "A100": (312, 156), "A10": (125, 62), "L40S": (362, 183), "RTX 4090": (165, 83),
}


counted = {}


def flops(unet, task=None, backward=False):
    """FLOPs of one sample of the model's own size: of the forward pass, with `backward` of a training step. Nothing is computed for it."""
    key = json.dumps([unet.config, [name for name, p in unet.named_parameters() if p.requires_grad], task, backward])
    if key in counted:  # --decouple asks for each copy
        return counted[key]
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    config, device = unet.config, unet.conv_out.weight.device
    checkpointing, unet.gradient_checkpointing = unet.gradient_checkpointing, False
    # fake tensors have shapes only; of CPU's fused attention the counter knows nothing
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        tensors = {name: torch.empty_strided(p.shape, p.stride(), device=device).requires_grad_(p.requires_grad)
                   for name, p in unet.named_parameters()}
        tensors |= {name: torch.empty(b.shape, dtype=b.dtype, device=device) for name, b in unet.named_buffers()}
        channels = config["in_channels"] if task is None else config["moe"]["in_channels"][config["moe"]["tasks"][task]]
        context, added = None, None
        if width := config.get("cross_attention_dim"):
            context = torch.empty(1, 77, width, device=device)
        if config.get("addition_embed_type"):
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            added = dict(text_embeds=torch.empty(1, pooled, device=device), time_ids=torch.empty(1, 6, device=device))
        if config.get("num_class_embeds"):
            added = dict(class_labels=torch.empty(1, dtype=torch.long, device=device))
        out = torch.func.functional_call(unet, tensors, (
            torch.empty(1, channels, *[config["sample_size"]] * 2, device=device), torch.empty(1, device=device), context,
            None if task is None else torch.empty(1, dtype=torch.long, device=device), added))
        if backward:
            out.sum().backward()
    unet.gradient_checkpointing = checkpointing
    counted[key] = counter.get_total_flops()
    return counted[key]


def peak(device, precision):
    """FLOP/s, or None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = [tflops for key, tflops in PEAK.items() if re.search(rf"\b{key}\b", name)]
    return found[0][precision != "bf16"] * 1e12 if found and not re.search("MIG|NVL|Laptop", name) else None


def memory(device):
    """GB: the most that CUDA had allocated, or that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class Log:
    """Lines of log.jsonl, and the same numbers for TensorBoard."""

    def __init__(self, folder, tensorboard=False, start=0):
        self.path, self.writer = folder / "log.jsonl", None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(folder, purge_step=start + 1)  # what a resumed run tells again

    def write(self, row):
        with writing(self.path), open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")
        if self.writer is not None:
            for name, value in numbers(row):
                self.writer.add_scalar(name, value, row["step"])
            self.writer.flush()


def numbers(row, name=""):
    """The numbers in nested dicts and lists -> (path, number)"""
    if isinstance(row, (dict, list)):
        for key, value in row.items() if isinstance(row, dict) else enumerate(row):
            yield from numbers(value, f"{name}/{key}" if name else key)
    elif row is not None and name != "step":
        yield name, row
