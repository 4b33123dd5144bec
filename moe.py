"""MTU: a pretrained text-to-image U-Net becomes one network for many tasks.

Chavhan et al., ICML 2025, arXiv 2503.11905. Every feed-forward layer is cut into N experts, and a
router mixes them by task:

    Eq. 1    w_i = softmax(g(e_task; theta_r))_i      FFN(x) = sum_i w_i E_i(x)      i = 1..N
    Eq. 2    L = sum over tasks of the mean of
                 || eps - f_theta(Psi_C^task([z_t, enc(c_I)]), c_T, t) ||^2

e_task is a learned vector of the task, the same for all layers: a row of unet.task_embedding, which
reaches the layers as cond.task_emb. Each layer has a router g of its own, two linear maps (theta_r)
with a ReLU between them. theta is the whole network. Each task also has its own layer norms before
the experts (Psi_L) and its own input convolution (Psi_C). All of these train. Attention, residual
blocks, time embedding and output convolution are shared by the tasks and stay frozen. Eq. 2, where
enc(c_I) is the latent of the source picture and c_T the text, is the training step in train.py (the
paper's formula lists the source as a separate input; its text says that it is concatenated with
z_t). The mean is over examples, noise eps and timesteps t. The squared norm for one sample,
averaged over C, H and W, is Diffusion.error (of v where the network predicts v, as the miniature
does).

No loop over experts is needed. Expert E_i(x) = V_i h_i(x) + b_i owns slice i of the inner
activations h of the dense layer (with GEGLU, h is value times gelu(gate)) and the matching columns
of its output matrix V, so that

    sum_i w_i E_i(x) = V [w_1 h_1(x), ..., w_N h_N(x)] + sum_i w_i b_i

which is the pretrained layer with its inner activations multiplied by w. For a fixed task w is
constant and can be multiplied into V, and an ordinary U-Net remains: `fold`.

At the start the routers end in zeros (but for top_k), so every w_i is 1/N, and every b_i is the
bias b_0 of the pretrained layer, V_0 h_0(x) + b_0. An expert has the share G of the layer's d_FFN
units. With the default G = 1/N the experts hold each pretrained unit once, so that sum_i V_i h_i(x)
is V_0 h_0(x). In general they hold it N G times, in copies whose output weights have the pretrained
ones as their mean, and N G times them as their sum. Hence

    sum_i w_i E_i(x) = 1/N sum_i V_i h_i(x) + sum_i w_i b_0
                     = 1/N (N G) V_0 h_0(x) + b_0                   since sum_i w_i = 1
                     = G V_0 h_0(x) + b_0

So the plain copy, `init="literal"`, gives G times the pretrained output, bias apart. By default
("preserve") we therefore divide the activations by G, and V_0 h_0(x) + b_0 is left.
The task norms and convolutions start as copies too, with zeros for the source picture where the
base reads none. So training starts at the pretrained network, unless top_k drops experts or the
base has input channels that a task lacks.

We differ from the paper in this division. The paper prints the norm of Eq. 2 without its
square. It calls the feed-forward layer a two-layer MLP and does not say how GEGLU is cut, where the
output bias goes, how wide e_task and the routers are, or how experts that are wider than their
share start. Our choices are explained in the code where they are made.

    python moe.py                            parameters and FLOPs of Stable Diffusion 1.5, upcycled;
                                             draws the shipped miniature's experts
    python moe.py --model assets/tiny-mtu    the same of a model, and its router weights
    python moe.py --fold edit --model assets/tiny-mtu --out edit-only

Letters: B batch, L positions, C channels, N experts (index i), R tasks (rows of the tables).
d_task is the width of e_task; d_FFN and d_expert count the inner units of the dense layer and of
one expert, and G = d_expert / d_FFN.
"""
import hub  # noqa: F401  the first import, so that Ctrl-C ends quietly
import copy
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from chart import Axis, arrange, cells, table
from hub import Parser, UserError, blaming, command, read_json, replacing, write_png, write_text
from unet import CONFIGS, BasicTransformerBlock, Conv2d, FeedForward, LayerNorm, UNet

TASKS = ("t2i", "edit", "sr", "inpaint")  # the same as data.ALL

# Parts of parameter names: the tables that have a row per task, and what `trainable` lets train. In
# the paper's Table 1 tuning the feed-forward layers alone does best on all three picture tasks.
# "list" and "ffn" differ only after add_task: see `trainable`.
TABLES = ("conv_in.", "task_embedding.", ".norm3.")
LAYERS = {"list": ".ff.", "all": "", "self": ".attn1.", "cross": ".attn2.", "ffn": ".ff."}


def repeated(tensor, count):
    """Return a parameter of `count` rows, each a copy of the tensor."""
    return nn.Parameter(tensor.detach().expand(count, *tensor.shape).clone())


def filled(module, weight, bias):
    """Give a module copies of these values as its parameters, and return it."""
    module.weight = nn.Parameter(weight.clone())
    module.bias = nn.Parameter(bias.clone())
    return module


class TaskLayerNorm(nn.Module):
    """Psi_L: the layer norm before the experts, with a scale and a shift for each task.

    The experts share it. The paper's Fig. 3 could also mean one norm per expert; one per task fits
    its parameter count better.
    """

    def __init__(self, norm, num_tasks):
        super().__init__()
        self.eps = norm.eps
        self.weight = repeated(norm.weight, num_tasks)                          # (R, C)
        self.bias = repeated(norm.bias, num_tasks)

    def forward(self, x, cond):                                                 # (B, L, C)
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        # F.embedding takes rows. The backward of indexing by cond.task is not deterministic on CPU.
        weight = F.embedding(cond.task, self.weight)[:, None].to(x.dtype)       # (B, 1, C)
        bias = F.embedding(cond.task, self.bias)[:, None].to(x.dtype)
        return torch.addcmul(bias, x, weight)

    def fold(self, row):
        """Return the norm of one task as an ordinary LayerNorm."""
        return filled(LayerNorm(self.weight.shape[1], self.eps), self.weight[row], self.bias[row])


class TaskConv(nn.Module):
    """Psi_C: the 3 x 3 input convolution, one for each task.

    Text-to-image reads the noisy latent; the other tasks also read the latent of the source
    picture. All rows are as wide as the widest; the weights of channels that a task lacks are zero
    and stay zero.
    """

    def __init__(self, conv, in_channels, latent_channels):
        super().__init__()
        C, base_channels = conv.weight.shape[:2]
        weight = conv.weight.detach().new_zeros(len(in_channels), C, max(in_channels), 3, 3)
        for row, channels in zip(weight, in_channels):
            # A base as wide as the task (InstructPix2Pix) keeps all of its weights. Otherwise the
            # source's channels start at zero, as InstructPix2Pix itself began.
            pretrained = base_channels if channels == base_channels else latent_channels
            row[:, :pretrained] = conv.weight.detach()[:, :pretrained]
        self.weight = nn.Parameter(weight)                                      # (R, C, Cin, 3, 3)
        self.bias = repeated(conv.bias, len(in_channels))                       # (R, C)
        self.in_channels = list(in_channels)

    def forward(self, x, cond):
        B, channels, height, width = x.shape
        C, widest = self.weight.shape[1:3]
        if channels not in self.in_channels:
            raise UserError(f"the U-Net's input has {channels} channels; its tasks have "
                            f"{sorted(set(self.in_channels))}")
        x = F.pad(x, (0, 0, 0, 0, 0, widest - channels))
        # In a mixed batch a task's weights must get no gradient from channels that it lacks.
        numbers = torch.arange(widest, device=x.device)
        present = torch.stack([numbers < n for n in self.in_channels]).to(x.dtype)  # (R, Cin)
        x = x * F.embedding(cond.task, present)[:, :, None, None]
        # One convolution per sample: its 3 x 3 patches times the weights of its task. A grouped
        # convolution does the same and takes twice the time at Stable Diffusion's size on a CPU.
        patches = F.unfold(x, 3, padding=1)                                     # (B, 9 Cin, H W)
        weight = F.embedding(cond.task, self.weight.flatten(1)).view(B, C, -1).to(x.dtype)
        bias = F.embedding(cond.task, self.bias)[..., None].to(x.dtype)
        return torch.baddbmm(bias, weight, patches).view(B, C, height, width)

    def fold(self, row):
        """Return the convolution of one task as an ordinary Conv2d."""
        channels = self.in_channels[row]
        conv = Conv2d(channels, self.weight.shape[1], 3, padding=1)
        return filled(conv, self.weight[row, :, :channels], self.bias[row])


class ExpertFeedForward(nn.Module):
    """Eq. 1 on a GEGLU feed-forward layer, whose weights stay where they are in `net`.

    A unit of GEGLU is a product, value times gelu(gate): an expert takes the same units of both.
    """

    def __init__(self, ff, num_experts, *, init, expert_width, top_k, task_dim, router_dim):
        super().__init__()
        self.net = ff.net
        self.num_experts = num_experts
        self.top_k = top_k
        out = ff.net[2]
        G = 1 / num_experts if expert_width is None else expert_width
        # N d_expert / d_FFN: how often each unit of the dense layer occurs. With the default, once.
        repeats = round(num_experts * G)
        if repeats > 1:
            repeat_width(ff, repeats)
        # Every expert has the whole output bias: the weights sum to 1, so it comes out once.
        self.out_bias = repeated(out.bias, num_experts)                         # (N, C): b_i
        out.bias = None
        # The paper's plain copy ("literal") gives G times the dense output, bias apart, as derived
        # above: a quarter of it for N = 4, of which the paper says nothing.
        self.scale = 1 / G if init == "preserve" else 1.0
        device = out.weight.device
        self.router = nn.Sequential(nn.Linear(task_dim, router_dim, device=device), nn.ReLU(),
                                    nn.Linear(router_dim, num_experts, device=device))
        if top_k in (None, num_experts):
            # Zeros make the weights uniform. With a smaller top_k they would all be tied, and every
            # task would take the same experts.
            nn.init.zeros_(self.router[2].weight)
            nn.init.zeros_(self.router[2].bias)

    def router_weights(self, task_embedding):
        """Compute w of Eq. 1: task_embedding (B, d_task) -> (B, N), whose rows sum to 1."""
        # w depends on the task alone, on neither timestep nor text. The paper has no loss that
        # balances the load of the experts, and needs none: every expert runs for every sample.
        g = self.router(task_embedding).float()
        if self.top_k is not None:
            # With top_k every expert still runs; it only shows how good the result is with k of
            # them. exp(-inf) = 0, and the softmax renormalises the others.
            best = g.topk(self.top_k, dim=-1)
            g = torch.full_like(g, -math.inf).scatter(-1, best.indices, best.values)
        return g.softmax(dim=-1)

    def factors(self, w):
        """Compute the factor of each inner unit: w (..., N) -> (..., N d_expert)."""
        d_expert = self.net[2].in_features // self.num_experts
        return (self.scale * w).repeat_interleave(d_expert, dim=-1)

    def forward(self, x, cond):                                                 # (B, L, C)
        h = self.net[0](x)                                              # (B, L, N d_expert)
        w = self.router_weights(cond.task_emb).to(h.dtype)                      # (B, N)
        h = h * self.factors(w)[:, None]                                        # scale w_i h_i(x)
        bias = w @ self.out_bias.to(w.dtype)                                    # sum_i w_i b_i
        return F.linear(h, self.net[2].weight) + bias[:, None]

    def fold(self, task_embedding):
        """Return Eq. 1 for one task, e_task (1, d_task), as an ordinary FeedForward."""
        w = self.router_weights(task_embedding)[0].to(self.out_bias.dtype)
        ff = FeedForward(self.out_bias.shape[1])
        if ff.net[2].in_features != self.net[2].in_features:
            raise UserError("experts whose widths add up to more than the dense layer's make no "
                            "ordinary U-Net: they do not fold")
        ff.net[0] = self.net[0]
        filled(ff.net[2], self.net[2].weight * self.factors(w), w @ self.out_bias)
        return ff


def repeat_width(ff, repeats):
    """Put copies of a feed-forward layer's units beside each other, in place.

    The paper's Table 4 has experts whose widths add up to more than the dense layer, N G > 1; how
    they start it does not say. Here expert i takes units (i - 1) d_expert to i d_expert - 1 of the
    copies laid end to end, where units count from 0.
    """
    project, out = ff.net[0].proj, ff.net[2]
    # The rows of the projection are the inner units' values, then their gates.
    rows = torch.arange(project.out_features).view(2, -1).repeat(1, repeats).flatten()
    filled(project, project.weight.detach()[rows], project.bias.detach()[rows])
    # Equal copies with equal router weights would get equal gradients for ever. Random changes of
    # their output weights, whose mean over a unit's copies is zero, make them differ and leave the
    # layer's output as it is.
    weight = out.weight.detach()[:, None].repeat(1, repeats, 1)                 # (C, N G, d_FFN)
    noise = 0.1 * weight * torch.randn_like(weight)
    weight = weight + noise - noise.mean(dim=1, keepdim=True)
    out.weight = nn.Parameter(weight.flatten(1))
    project.out_features *= repeats
    out.in_features *= repeats


def transformer_blocks(unet):
    """List the blocks whose feed-forward layers MTU cuts: 16 in SD 1.5, 70 in SDXL."""
    return [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]


def upcycle(unet, tasks=TASKS, num_experts=4, init="preserve", *, expert_width=None, top_k=None,
            in_channels=None, task_dim=None, router_dim=None, added=()):
    """Upcycle a pretrained U-Net in place, freeze what the paper freezes, and return it.

    init: "preserve" equals the pretrained network at step 0 (unless top_k drops experts); "literal"
        is the paper's plain copy.
    expert_width: the paper's G = d_expert / d_FFN; by default 1/N, which keeps the size.
    top_k: how many of the largest weights stay, renormalised (an ablation of the paper).
    in_channels: task -> input channels; by default 4 for "t2i" and 8 for others. An inpainting
        base, which has 9, loses its mask and its masked picture.
    task_dim, router_dim: widths of e_task and of the routers' hidden layer. The paper states
        neither. The default, the width of the text but at most 768, gives the printed 158M
        trainable and 869M in all for SD 1.5, and 2.6B in all for SDXL; the printed 1.5B trainable
        for SDXL cannot be had within these 2.6B.
    added: tasks that add_task added. upcycle(unet, **config["moe"]) rebuilds a saved network.
    """
    config = unet.config
    blocks = transformer_blocks(unet)
    if "moe" in config:
        raise UserError(f"this U-Net is upcycled already, to {', '.join(config['moe']['tasks'])}; "
                        "add_task adds another")
    if not blocks:
        raise UserError("this U-Net has no feed-forward layers to cut experts from; MTU upcycles "
                        "Stable Diffusion's")
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    latent = config["out_channels"]
    channels = {task: latent if task == "t2i" else 2 * latent for task in tasks}
    width = min(768, config["cross_attention_dim"])
    experts = dict(num_experts=num_experts, init=init, expert_width=expert_width, top_k=top_k,
                   task_dim=task_dim or width, router_dim=router_dim or width)
    moe = dict(experts, tasks=tasks, in_channels=channels | (in_channels or {}),
               added=list(added))
    check(moe, latent, {block.ff.net[2].in_features for block in blocks})

    # Modules are replaced one for one, and the dense layer's weights keep their names and values.
    for block in blocks:
        block.norm3 = TaskLayerNorm(block.norm3, len(tasks))
        block.ff = ExpertFeedForward(block.ff, **experts)
    unet.conv_in = TaskConv(unet.conv_in, list(moe["in_channels"].values()), latent)
    device = unet.conv_in.weight.device
    unet.task_embedding = nn.Embedding(len(tasks), moe["task_dim"], device=device)
    # The scale hardly matters: the routers end in zeros, so at first no embedding has an effect.
    nn.init.normal_(unet.task_embedding.weight)
    config["moe"] = moe
    # A class name of its own, so that no other program opens the folder and draws wrong pictures.
    config["_class_name"] = "Upcycled" + config.get("_class_name", type(unet).__name__)
    return trainable(unet)


def check(moe, latent, inner_widths):
    """Raise a UserError if these settings, which config.json records, do not fit this U-Net."""

    def whole(number):
        return 0 < number < math.inf and math.isclose(number, round(number))

    tasks, N, channels = moe["tasks"], moe["num_experts"], moe["in_channels"]
    G = 1 / max(N, 1) if moe["expert_width"] is None else moe["expert_width"]
    units = ", ".join(map(str, sorted(inner_widths)))
    wanted = ", ".join(f"{task} {number}" for task, number in channels.items())
    conditions = {
        f"tasks that are unique names, not {', '.join(tasks) or 'none'}":
            tasks and len(set(tasks)) == len(tasks),
        f"in_channels for each task, at least the {latent} of the noisy latent, not {wanted}":
            channels.keys() == set(tasks) and min(channels.values(), default=0) >= latent,
        f"at least one expert, not num_experts {N}": N >= 1,
        # The largest networks in the paper's Table 4 have N G = 4.
        f"a whole number up to 16 for num_experts x expert_width, not {N} x {G:g}":
            whole(N * G) and N * G < 16.5,
        f"experts that cut the {units} units of a layer evenly, not num_experts {N} of width {G:g}":
            all(whole(inner * G) for inner in inner_widths),
        f"a top_k from 1 to num_experts, not {moe['top_k']} of {N}":
            moe["top_k"] is None or moe["top_k"] in range(1, N + 1),
        f"init preserve or literal, not {moe['init']}": moe["init"] in ("preserve", "literal"),
    }
    for words, holds in conditions.items():
        if not holds:
            raise UserError(f"MTU takes {words}")


def trainable(unet, which="list"):
    """Set requires_grad for what trains, and return the U-Net.

    which: "list" is the paper's: experts, routers, e_task, task norms and task convolutions.
        "self", "cross" and "ffn" tune one kind of layer, as in the paper's Table 1. In an
        upcycled U-Net the parts that tell the tasks apart train as well: the tables with a row
        per task, and the routers. "all" is everything.

    Once add_task has added a task, "list" is the tables alone, so that older tasks do not change.
    """
    moe = unet.config.get("moe")
    parts = (LAYERS[which],)
    if moe:
        parts += (*TABLES, ".ff.router.")
        if which == "list" and moe["added"]:
            parts = TABLES
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    return unet


def task_index(unet, task):
    """Return the row of a task, given by its name or its row."""
    if "moe" not in unet.config:
        raise UserError(f"this U-Net is not upcycled and has no row for a task {task!r}")
    tasks = unet.config["moe"]["tasks"]
    if task in tasks:
        return tasks.index(task)
    if task in range(len(tasks)):
        return task
    raise UserError(f"unknown task {task!r}; this model knows {', '.join(tasks)}")


def add_task(unet, task, like):
    """Add a task in place, as a copy of the task `like`, and return the U-Net.

    Only rows of tasks in the batch get a gradient. So train the new task alone, and without weight
    decay on the tables (train.py), and the other tasks stay exactly as they were.
    """
    row = task_index(unet, like)
    moe = unet.config["moe"]
    if task in moe["tasks"]:
        raise UserError(f"this model has a task {task!r} already")
    for name, table in list(unet.named_parameters()):
        if any(part in name for part in TABLES):
            module, _, parameter = name.rpartition(".")
            table = torch.cat([table.detach(), table.detach()[row:row + 1]])
            setattr(unet.get_submodule(module), parameter, nn.Parameter(table))
    unet.task_embedding.num_embeddings += 1
    unet.conv_in.in_channels.append(unet.conv_in.in_channels[row])
    moe["tasks"].append(task)
    moe["in_channels"][task] = unet.conv_in.in_channels[row]
    moe["added"].append(task)
    return trainable(unet)


@torch.no_grad()
def fold(unet, task):
    """Return the mixture for one task, by name or row, as an ordinary U-Net.

    `unet` is not modified. The paper notes that w can be computed once for a task. Folding it into
    the weights is our addition. Other methods stay attached: a routed network folds into a routed
    one. Without any, the result saves as a unet/ folder of diffusers.
    """
    row = task_index(unet, task)
    folded = copy.deepcopy(unet)
    e_task = unet.task_embedding.weight[row:row + 1]                            # (1, d_task)
    with torch.device("meta"):  # a new module takes no memory before it gets its parameters
        for block in transformer_blocks(folded):
            block.norm3 = block.norm3.fold(row)
            block.ff = block.ff.fold(e_task)
        folded.conv_in = folded.conv_in.fold(row)
    folded.task_embedding = None
    config = folded.config
    del config["moe"]
    config["in_channels"] = folded.conv_in.in_channels
    name = config.pop("_class_name").replace("Upcycled", "")
    if name != "UNet":
        config["_class_name"] = name
    return folded.train(unet.training).requires_grad_(True)


# -------------------------------------------------------------------------------------------------
# The demonstration

def expert_layers(unet):
    """Find the layers that are cut into experts -> {name: layer}."""
    # No isinstance: `python moe.py` is the module __main__, and sample.py imports another `moe`.
    return {name.replace(".transformer_blocks.0.ff", ""): module
            for name, module in unet.named_modules() if hasattr(module, "router")}


@torch.no_grad()
def weights_of_tasks(unet):
    """Compute Eq. 1's weights in each layer, for each task -> (layers, R, N) in NumPy."""
    e_task = unet.task_embedding.weight
    layers = expert_layers(unet).values()
    return torch.stack([layer.router_weights(e_task) for layer in layers]).numpy()


@torch.no_grad()
def removal_costs(model, count=4):
    """Measure what each task loses when a layer must do without one expert -> (layers, R, N).

    Returns the per cent by which the task's held-out loss rises: the median of `count` fixed
    examples with fixed noise, as a single example can outweigh the others in a mean.
    """
    import train
    examples = train.held_out_examples(model.tasks, None, model, count)
    encode_text = functools.cache(train.text_encoding(model))

    def losses():
        values = train.held_out_losses(model, examples, 16, encode_text)
        return values.reshape(count, -1)                                        # (count, R)

    before = losses()
    costs = []
    for layer in expert_layers(model.unet).values():
        bias = layer.router[2].bias
        for i, value in enumerate(bias.tolist()):
            # exp(-inf) = 0: as with top_k, the softmax renormalises the others.
            bias[i] = -math.inf
            costs.append(np.median(100 * (losses() / before - 1), axis=0))
            bias[i] = value
    return np.reshape(costs, (-1, layer.num_experts, len(model.tasks))).swapaxes(1, 2)


def draw_experts(model, path):
    """Draw the weights of a model's experts and the costs of removal.

    In the shipped miniature a large weight does not mean a large cost. The layers in the middle, in
    which a task may lean on one expert alone, can do without it; the last layer, where all tasks
    weigh all experts alike, misses each.
    """
    weights = weights_of_tasks(model.unet)
    layers, R, N = weights.shape
    # Empty cells part the tasks.
    weights, costs = [
        np.pad(values, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan).reshape(layers, -1)[:, :-1]
        for values in (weights, removal_costs(model))]
    x = Axis(f"experts 0 to {N - 1} of each task", (0, R * (N + 1) - 1),
             {task: (N + 1) * i + N / 2 for i, task in enumerate(model.tasks)})
    y = cells("layer", expert_layers(model.unet))
    title = "rise of a task's held-out loss without the expert, in %; darkest: 100 % and more"
    write_png(path, arrange([table("weights w of Eq. 1", x, y, weights),
                             table(title, x, y, costs, (0, 100), digits=0)]))
    print(f"\n{path}: above, how much each task uses each expert of a layer; below, by how many "
          "per cent\nits held-out loss rises when that layer must do without this expert")


# -------------------------------------------------------------------------------------------------
# Commands

def base_of(model):
    """Return the hub id or the folder from which a loaded model was upcycled."""
    from sample import place_of
    arguments = Path(model.path) / "arguments.json"
    if arguments.is_file():
        # train.py wrote this folder. What it began with is what --model was.
        with blaming(arguments):
            base = str(read_json(arguments).get("model", model.path))
            Path(base).resolve()  # raises ValueError where the text can be no path
            return base
    return str(place_of(model.path, model.index, "vae"))


def model_card(task, model, plain, name):
    """Return the README.md of a task of `model` that is folded into `plain`, in folder `name`."""
    from data import ASSETS
    # The card's example must draw what we draw. Diffusers' own guidance of 7.5 is too much for many
    # models, so the example states the guidance.
    text, image = plain.guidance[task]
    arguments = f"guidance_scale={text}"
    kind = "text-to-image"
    if plain.tasks != ["t2i"]:
        kind = "image-to-image"
        size = (model.native_size, model.native_size)
        arguments += (f', image_guidance_scale={image},\n               '
                      f'image=Image.open("source.png").convert("RGB").resize({size})')
    base = base_of(model)
    licence = f"Its licence is the licence of `{base}`."
    # The hub links a card to its base. A folder on this disk means nothing there.
    base_model = "" if Path(base).exists() else f"\nbase_model: {base}"
    if ASSETS in Path(base).resolve().parents:
        base = f"assets/{Path(base).name}"
        licence = ("It learned from pictures of Noto Emoji (Apache-2.0) and Twemoji (CC-BY 4.0); "
                   "assets/README.md of the project names their makers.")
    pipeline = plain.index["_class_name"]
    return f"""---
library_name: diffusers
pipeline_tag: {kind}{base_model}
---
The task `{task}` of a model that was upcycled from `{base}` (MTU, arXiv 2503.11905), with its
experts folded into plain weights.

{licence}

```python
from diffusers import {pipeline}
from PIL import Image

pipe = {pipeline}.from_pretrained("{name}")
picture = pipe("your words here", {arguments}).images[0]
```

In the project that trained it: `python sample.py --task {task} --model {name}`.
"""


def write_task(task, path, out):
    """Write one task of an upcycled model as a folder that diffusers opens, with a model card."""
    from sample import load_model, pipeline_index, scales
    if Path(out).exists():
        raise UserError(f"{out} exists; choose another --out")
    model = load_model(path)
    plain = copy.copy(model)
    plain.unet = fold(model.unet, task)
    for key, value in plain.unet.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{path} folds into a {key} that is not finite: it is damaged")
    if name := plain.unet.config.get("_class_name"):
        raise UserError(f"{path} folds into a {name}, which no other program knows")
    plain.index = pipeline_index(plain) | {"_guidance": {task: scales(model, task, None, None)}}
    with replacing(out) as folder:
        plain.save(folder)
        write_text(folder / "README.md", model_card(task, model, plain, Path(out).name))
    print(f"{task} of {path} -> {out}")


def print_size(label, unet):
    """Print parameters and FLOPs of a U-Net, in one row.

    For SD 1.5 this is 803 GFLOP. The paper's 0.67 TFLOP is about what remains without the
    two matrix products inside attention, which take 126.
    """
    from train import count_flops
    total = sum(p.numel() for p in unet.parameters())
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    flops = count_flops(unet)
    print(f"{label:<22}{total / 1e6:>12.2f}M{trained / 1e6:>12.2f}M{flops / 1e9:>12.2f}G")


def main():
    parser = Parser("Count an upcycled U-Net's parameters and FLOPs, or write one task of a model.")
    parser.add_argument("--model", default="sd15",
                        help=f"one of {', '.join(CONFIGS)} (shapes only), a folder or a hub id")
    parser.add_argument("--fold", metavar="TASK", help="task to write as an ordinary model folder")
    parser.add_argument("--out", help="folder for --fold, or else file for the experts' picture")
    args = parser.parse_args()
    if args.fold and not args.out:
        raise UserError("--fold TASK and --out FOLDER go together")
    if args.fold:
        return write_task(args.fold, args.model, args.out)

    from data import ASSETS
    from sample import load_model
    if args.model in CONFIGS:
        # Tensors on the meta device have shapes and no values: 860M parameters take no memory.
        with torch.device("meta"):
            unet = UNet(CONFIGS[args.model])
        # Without values there are no experts to compare, so the picture is the miniature's.
        model = load_model(ASSETS / "tiny-mtu")
        out = args.out or "samples/moe.png"
    else:
        model = load_model(args.model)
        unet = model.unet
        out = args.out
    print(f"{args.model:<22}   parameters    trainable        FLOPs   of one forward pass")
    if "moe" not in unet.config:
        print_size("dense", unet)
        upcycle(unet)
    # One row for all tasks: they share the experts, and a convolution is as wide as the widest.
    print_size("upcycled", unet)
    if args.model not in CONFIGS:
        # In the paper's Stable Diffusion 1.5, t2i and edit come to share experts in several layers.
        print("\nrouter weights (Eq. 1) of", " | ".join(unet.config["moe"]["tasks"]))
        for layer, w in zip(expert_layers(unet), weights_of_tasks(unet)):           # (R, N)
            print(f"{layer:<34}" + " | ".join(" ".join(f"{w_i:.2f}" for w_i in row) for row in w))
    if out:
        draw_experts(model, out)


if __name__ == "__main__":
    command(main)
