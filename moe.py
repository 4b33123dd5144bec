"""MTU: a pretrained text-to-image U-Net upcycled to many tasks (Chavhan et al., ICML 2025, arXiv 2503.11905).

Every feed-forward network is cut into N experts that a router mixes by task; norms before the experts and the input
convolution exist once per task. Everything else is shared and frozen.

    Eq. 1    w_i = softmax(g(e_task; theta_r))_i       FFN(x) = sum_i w_i E_i(x)        i = 1..N

Experts stay in the dense layout: expert i is slice i of the inner width, so the sum over experts is the dense FFN with its inner
activations multiplied by w_i, one elementwise product more than the pretrained network. For a fixed task it folds into plain weights.

    python moe.py                          parameters and FLOPs of Stable Diffusion 1.5 before and after
    python moe.py --model assets/tiny-mtu  the same for a folder, and its router weights

Letters: B batch, L positions, C channels, E experts, T tasks, H inner width of one expert, D width of the task embedding.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from folders import HelpFormatter, UserError, command, fetch, read_json
from unet import CONFIGS, BasicTransformerBlock, UNet

TASKS = ("t2i", "edit", "sr", "inpaint")  # data.TASKS' names; a method does not import the data


class TaskLayerNorm(nn.Module):
    """Psi_L: the norm before the experts, one row of scale and shift per task, shared by the experts."""

    def __init__(self, norm, num_tasks):
        super().__init__()
        self.normalized_shape, self.eps = norm.normalized_shape, norm.eps
        self.weight = nn.Parameter(norm.weight.detach().expand(num_tasks, -1).clone())   # (T, C)
        self.bias = nn.Parameter(norm.bias.detach().expand(num_tasks, -1).clone())

    def forward(self, x, cond):
        x = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        weight, bias = (F.embedding(cond.task, rows)[:, None].to(x.dtype) for rows in (self.weight, self.bias))  # (B, 1, C)
        return torch.addcmul(bias, x, weight)


class TaskConv(nn.Module):
    """psi_task: the 3 x 3 input convolution, one per task. Weights of channels that a task does not have are zero and stay so."""

    def __init__(self, conv, in_channels, latent_channels):
        super().__init__()
        C, base = conv.weight.shape[:2]
        weight = conv.weight.detach().new_zeros(len(in_channels), C, max(in_channels), 3, 3)
        for row, channels in zip(weight, in_channels):
            # A base as wide as the task (InstructPix2Pix, say) keeps its weights; otherwise all but the noisy latent's start at zero.
            shared = base if channels == base else latent_channels
            row[:, :shared] = conv.weight.detach()[:, :shared]
        self.weight = nn.Parameter(weight)                                                # (T, C, Cin, 3, 3)
        self.bias = nn.Parameter(conv.bias.detach().expand(len(in_channels), -1).clone())  # (T, C)
        self.in_channels = list(in_channels)

    def forward(self, x, cond):
        (B, channels, height, width), (C, widest) = x.shape, self.weight.shape[1:3]
        if channels not in self.in_channels:
            raise UserError(f"the U-Net's input has {channels} channels; its tasks have {', '.join(map(str, sorted(set(self.in_channels))))}")
        x = F.pad(x, (0, 0, 0, 0, 0, widest - channels))
        channel = torch.arange(widest, device=x.device)
        has = torch.stack([channel < n for n in self.in_channels]).to(x.dtype)            # (T, Cin)
        x = x * F.embedding(cond.task, has)[:, :, None, None]
        # One convolution per sample is a matrix product of that sample's 3 x 3 patches with its task's row.
        patches = F.unfold(x, 3, padding=1)                                               # (B, 9 Cin, H W)
        weight = F.embedding(cond.task, self.weight.flatten(1)).view(B, C, -1).to(x.dtype)
        out = torch.baddbmm(F.embedding(cond.task, self.bias)[..., None].to(x.dtype), weight, patches)
        return out.view(B, C, height, width)


class ExpertFeedForward(nn.Module):
    """Eq. 1 for a GEGLU feed-forward network; `net` keeps the pretrained names, its inner width holds E experts of width H side by side."""

    def __init__(self, ff, num_experts, init, expert_width, top_k, task_dim, router_dim):
        super().__init__()
        self.net, self.num_experts, self.top_k = ff.net, num_experts, top_k
        project, out = ff.net[0].proj, ff.net[2]
        inner = out.in_features
        H = round(inner * expert_width)
        if H * num_experts != inner:                       # the paper's G: wider or narrower experts than d_FFN / N
            units = torch.arange(num_experts * H) % inner  # expert i takes H units from i H on, around the end
            project.weight = nn.Parameter(project.weight.detach()[torch.cat([units, inner + units])])  # the same units of value and gate
            project.bias = nn.Parameter(project.bias.detach()[torch.cat([units, inner + units])])
            # Equal copies of a unit would get equal gradients for ever: their output weights part at random, around the same mean.
            weight = out.weight.detach()[:, units]
            part = 0.1 * weight * torch.randn_like(weight)
            total = torch.zeros_like(out.weight).index_add(1, units.to(weight.device), part)
            copies = torch.zeros(inner).index_add(0, units, torch.ones(len(units))).to(weight)
            out.weight = nn.Parameter(weight + part - (total / copies)[:, units])
            project.out_features, out.in_features = 2 * len(units), len(units)
        self.out_bias = nn.Parameter(out.bias.detach().expand(num_experts, -1).clone())  # (E, C): a copy each, since sum_i w_i = 1
        out.bias = None
        # Uniform weights 1/N count every unit N G times, each with 1/N. Times 1/G, on the activations, the dense network is back.
        self.scale = 1 / expert_width if init == "preserve" else 1.0
        device = out.weight.device
        self.router = nn.Sequential(nn.Linear(task_dim, router_dim, device=device), nn.ReLU(),
                                    nn.Linear(router_dim, num_experts, device=device))
        if top_k in (None, num_experts):  # uniform at first; but tied weights would send every task to the same k experts
            nn.init.zeros_(self.router[2].weight)
            nn.init.zeros_(self.router[2].bias)

    def weights(self, task_embedding):
        """task_embedding (B, D) -> w (B, E), rows sum to 1. Eq. 1, left."""
        w = self.router(task_embedding).float().softmax(dim=-1)
        if self.top_k is not None:
            best = w.topk(self.top_k, dim=-1)
            w = torch.zeros_like(w).scatter(-1, best.indices, best.values / best.values.sum(dim=-1, keepdim=True))
        return w

    def forward(self, x, cond):
        h = self.net[0](x)                                                   # (B, L, E H)
        w = self.weights(cond.task_emb).to(h.dtype)
        h = h * (self.scale * w).repeat_interleave(h.shape[-1] // self.num_experts, dim=-1)[:, None]
        return F.linear(h, self.net[2].weight) + (w @ self.out_bias.to(w.dtype))[:, None]


def upcycle(unet, tasks=TASKS, num_experts=4, init="preserve", expert_width=None, top_k=None, in_channels=None, task_dim=None,
            router_dim=None):
    """Upcycle a pretrained U-Net in place and return it. Only the paper's list trains afterwards: experts, routers, task
    embedding, task norms and task convolutions.

    init: "preserve" equals the dense network at step 0, where no top_k drops experts; "literal" is the paper's plain copy, whose FFN
    outputs start at G times the dense ones, 1/N by default. expert_width: the paper's G = d_expert / d_FFN, default 1/N; where N G > 1 the
    copies of a unit part a little in both, or they would stay equal for ever. top_k: keep the k largest weights, renormalised (an ablation).
    in_channels: per task; default 4 for "t2i" (the latent's), 8 for image-to-image tasks, which an InstructPix2Pix base has already; the
        mask and the masked picture of a 9-channel inpainting base are left behind.
    task_dim, router_dim: widths of the task embedding and of the routers' hidden layer; default the text width, 768 for SD 1.5 and at most,
    which gives the paper's printed 158M trainable and 869M in all, and its 2.6B in all for SDXL (the paper states neither; its 1.5B trainable
    for SDXL would need routers of 2048, and these 2.9B in all).
    """
    config, latent = unet.config, unet.config["out_channels"]
    if "moe" in config:
        raise UserError(f"this U-Net is upcycled already, to {', '.join(config['moe']['tasks'])}; add_task adds another")
    blocks = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
    if not blocks:
        raise UserError("this U-Net has no feed-forward networks to cut experts from; MTU upcycles Stable Diffusion's")
    width = 1 / max(num_experts, 1) if expert_width is None else expert_width
    k = num_experts if top_k is None else top_k
    if (num_experts < 1 or not 0 < width < math.inf or init not in ("preserve", "literal") or not 1 <= k <= num_experts
            or not tasks or isinstance(tasks, str) or len(set(tasks)) < len(tasks)):
        raise UserError(f"cannot upcycle with num_experts={num_experts}, expert_width={expert_width}, init={init!r}, top_k={top_k}, "
                        f"tasks={tasks!r}: at least one expert, its width above 0, init preserve or literal, top_k within 1..num_experts, "
                        "a list of unique task names")
    task_dim, router_dim = (dim or min(768, config["cross_attention_dim"]) for dim in (task_dim, router_dim))
    channels = {task: (in_channels or {}).get(task, latent if task == "t2i" else 2 * latent) for task in tasks}
    if min(channels.values()) < latent or not set(in_channels or ()) <= set(tasks):
        raise UserError(f"in_channels={in_channels}: names of {', '.join(tasks)}, each with at least the {latent} channels of the noisy latent")
    for inner in {block.ff.net[2].in_features for block in blocks}:
        copies = width * num_experts
        if not math.isclose(inner * width, round(inner * width)) or (init == "preserve" and not math.isclose(copies, round(copies))):
            raise UserError(f"{num_experts} experts of width {width:g} x {inner} do not cut the FFN evenly; choose num_experts that "
                            f"divides {inner}, and for init=preserve num_experts x expert_width a whole number")
    for block in blocks:
        block.norm3 = TaskLayerNorm(block.norm3, len(tasks))
        block.ff = ExpertFeedForward(block.ff, num_experts, init, width, top_k, task_dim, router_dim)
    unet.conv_in = TaskConv(unet.conv_in, list(channels.values()), latent)
    unet.task_embedding = nn.Embedding(len(tasks), task_dim, device=unet.conv_in.weight.device)
    nn.init.normal_(unet.task_embedding.weight)
    config["_class_name"] = "UpcycledUNet"  # so that no other loader opens the folder and draws wrong pictures
    config["moe"] = dict(tasks=list(tasks), num_experts=num_experts, init=init, expert_width=expert_width, top_k=top_k,
                         in_channels=channels, task_dim=task_dim, router_dim=router_dim)
    return freeze(unet)


def freeze(unet):
    """The paper's list trains, everything else is frozen (attention, residual blocks, time embedding, output convolution). Once `add_task` has
    added a task, only the tables with a row per task train."""
    unet.requires_grad_(False)
    for module in unet.modules():
        if isinstance(module, (TaskLayerNorm, TaskConv) if unet.config["moe"].get("added") else (TaskLayerNorm, TaskConv, ExpertFeedForward)):
            module.requires_grad_(True)
    unet.task_embedding.requires_grad_(True)
    return unet


def task_index(unet, task):
    """The row of a task, given by name or index."""
    if "moe" not in unet.config:
        raise UserError(f"this U-Net is not upcycled and has no row for a task {task!r}")
    tasks = unet.config["moe"]["tasks"]
    if task in tasks:
        return tasks.index(task)
    if isinstance(task, int) and 0 <= task < len(tasks):
        return task
    raise UserError(f"unknown task {task!r}; this model knows {', '.join(tasks)}")


def add_task(unet, task, like):
    """Add a task that starts as a copy of `like`. Only the tables with a row per task train afterwards, also once saved and loaded again, and
    only rows of tasks in the batch get a gradient: train it alone, without weight decay on these tables (as train.py), and the other tasks stay
    as they are."""
    row, moe = task_index(unet, like), unet.config["moe"]
    if task in moe["tasks"]:
        raise UserError(f"this model has a task {task!r} already")
    for table in [m for m in unet.modules() if isinstance(m, (TaskLayerNorm, TaskConv))] + [unet.task_embedding]:
        for name, value in table.named_parameters():
            setattr(table, name, nn.Parameter(torch.cat([value.detach(), value.detach()[row:row + 1]])))
    unet.task_embedding.num_embeddings += 1
    unet.conv_in.in_channels.append(unet.conv_in.in_channels[row])
    moe["tasks"] = [*moe["tasks"], task]
    moe["in_channels"] = {**moe["in_channels"], task: moe["in_channels"][moe["tasks"][row]]}
    moe["added"] = [*moe.get("added", []), task]
    return freeze(unet)


@torch.no_grad()
def fold(unet, task):
    """The mixture for one task as an ordinary U-Net (routed, if this one is): w goes into the FFNs' output layers, norms and convolution
    lose their other rows. Saves as a diffusers unet/ folder. Experts with N G != 1 change the FFNs' width and do not fold."""
    moe, row = unet.config["moe"], task_index(unet, task)
    if not math.isclose(moe["num_experts"] * (moe["expert_width"] or 1 / moe["num_experts"]), 1):
        raise UserError(f"{moe['num_experts']} experts of width {moe['expert_width']:g} make FFNs of another width than an ordinary "
                        "U-Net's: they do not fold")
    channels = moe["in_channels"][moe["tasks"][row]]
    state = dict(unet.state_dict())
    embedding = state.pop("task_embedding.weight")[row:row + 1]
    state["conv_in.weight"], state["conv_in.bias"] = state["conv_in.weight"][row, :, :channels], state["conv_in.bias"][row]
    for name, module in unet.named_modules():
        if isinstance(module, TaskLayerNorm):
            state[f"{name}.weight"], state[f"{name}.bias"] = state[f"{name}.weight"][row], state[f"{name}.bias"][row]
        elif isinstance(module, ExpertFeedForward):
            w = module.weights(embedding)[0].to(embedding.dtype)
            columns = (module.scale * w).repeat_interleave(module.net[2].in_features // len(w))
            state[f"{name}.net.2.weight"] = state[f"{name}.net.2.weight"] * columns
            state[f"{name}.net.2.bias"] = w @ state.pop(f"{name}.out_bias")
            for key in [key for key in state if key.startswith(f"{name}.router.")]:
                del state[key]
    config = {k: v for k, v in unet.config.items() if k not in ("moe", "routing", "_class_name")}
    with torch.device("meta"):
        folded = UNet({**config, "in_channels": channels})
    folded.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    if "routing" in unet.config:
        from routing import add_routing
        add_routing(folded, **unet.config["routing"])
    return folded.train(unet.training)


def from_pretrained(path_or_hub_id, subfolder="unet", config=None, dtype=torch.float32):
    """A U-Net that `upcycle` made and `save_pretrained` saved. config: in place of the folder's own. dtype: of the parameters in memory."""
    config = dict(config or read_json(fetch(path_or_hub_id, subfolder) / "config.json"))
    moe = dict(config.pop("moe"))
    added = moe.pop("added", None)
    config.pop("_class_name", None)
    unet = UNet.from_pretrained(path_or_hub_id, subfolder, config, dtype, attach=lambda unet: upcycle(unet, **moe))
    if added:
        unet.config["moe"]["added"] = added
    return freeze(unet)


def main():
    import argparse

    from watch import flops
    parser = argparse.ArgumentParser(description="Parameters, FLOPs and experts before and after upcycling.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("--model", default="sd15", help=f"{', '.join(CONFIGS)} (shapes only), or a folder or hub id")
    parser.add_argument("--num-experts", type=int, help="N, of a model that is not upcycled yet; default 4")
    args = parser.parse_args()
    if args.model in CONFIGS:
        with torch.device("meta"):
            unet = UNet(CONFIGS[args.model])
    else:
        config = read_json(fetch(args.model, "unet") / "config.json")
        config.pop("routing", None)  # DTR's masks have no weights, and no share in these numbers
        unet = from_pretrained(args.model, config=config) if "moe" in config else UNet.from_pretrained(args.model, config=config)
    if "moe" in unet.config and args.num_experts is not None:
        raise UserError(f"--num-experts is for models that are not upcycled; {args.model} has {unet.config['moe']['num_experts']}")

    def row(name, unet, task=None):
        total, trained = (sum(p.numel() for p in unet.parameters() if p.requires_grad or not only) for only in (False, True))
        print(f"{name:<22}{total / 1e6:>12.2f}M{trained / 1e6:>12.2f}M{flops(unet, task) / 1e9:>12.2f}G")

    size = unet.config["sample_size"]
    print(f"{args.model:<22}{'parameters':>13}{'trainable':>13}{'FLOPs':>13}   one forward, {size} x {size} latent")
    if "moe" not in unet.config:
        row("dense", unet)
        upcycle(unet, num_experts=4 if args.num_experts is None else args.num_experts)
    for i, task in enumerate(unet.config["moe"]["tasks"]):
        row(f"{unet.config['moe']['num_experts']} experts, {task}", unet, i)
    if unet.conv_out.weight.device.type != "meta":
        print("\nrouter weights (Eq. 1), a row per feed-forward network, a column per expert")
        tasks = unet.config["moe"]["tasks"]
        print(" " * 34 + "".join(f"{task:<{6 * unet.config['moe']['num_experts'] + 2}}" for task in tasks))
        for name, module in unet.named_modules():
            if isinstance(module, ExpertFeedForward):
                weights = module.weights(unet.task_embedding.weight)
                print(f"{name.replace('.transformer_blocks', '').replace('attentions.', ''):<34}"
                      + "  ".join("".join(f"{w:6.2f}" for w in row) for row in weights.tolist()))


if __name__ == "__main__":
    command(main)
