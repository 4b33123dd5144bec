"""Right and wrong answers to the exercises, to try the grading with.

A right answer is the body of each of the exercise's functions. A wrong one is a right one with a
piece of text replaced, as a student could have it, and a word that its hint must contain.
"""
from typing import NamedTuple


class Wrong(NamedTuple):
    what: str       # the mistake
    of: str         # the right answer that it is made from
    old: str
    new: str
    hint: str       # a regular expression that the hint must match


RIGHT = {}          # number -> {name: [body of each function]}
WRONG = {}          # number -> [Wrong]

# 1. The forward process
RIGHT[1] = {
    "loop": ["""
rows = []
for sample, eps, step in zip(x0, noise, t):
    a = self.alpha_bar[step]
    rows.append(a ** 0.5 * sample + (1 - a) ** 0.5 * eps)
return torch.stack(rows)"""],
    "vectorised": ["""
a = self.alpha_bar[t].view(-1, 1, 1, 1)
return a.sqrt() * x0 + (1 - a).sqrt() * noise"""],
    "angle": ["""
angle = torch.acos(self.alpha_bar.sqrt()[t].double())[:, None, None, None]
return (torch.cos(angle) * x0 + torch.sin(angle) * noise).float()"""],
}
WRONG[1] = [
    Wrong("no root", "vectorised", "(1 - a).sqrt()", "(1 - a)", "square root"),
    Wrong("one step off", "vectorised", "[t]", "[t - 1]", "one timestep off"),
    Wrong("along the width", "vectorised", ".view(-1, 1, 1, 1)", "", "along the width"),
    Wrong("detached", "vectorised", "* x0", "* x0.detach()", "no gradient reaches x0"),
    Wrong("in place", "vectorised", "return a", "x0 *= a.sqrt()\nreturn x0 + 0 * a", "in place"),
]

# 2. DDIM
DDIM = """
times = diffusion.timesteps(steps)[start:]
for t in times:
    a, b = diffusion.level(t), diffusion.level(t - diffusion.T // steps)
    batch = torch.full((len(x),), t)
    x0, eps = diffusion.to_x0_eps(model(x, batch), x, batch)
    var = eta ** 2 * (1 - b) / (1 - a) * (1 - a / b)
    x = b.sqrt() * x0 + (1 - b - var).sqrt() * eps
    x = x + var.sqrt() * torch.randn(x.shape)
return x"""
RIGHT[2] = {
    "with helpers": [DDIM],
    "by hand": ["""
stride = diffusion.T // steps
for t in diffusion.timesteps(steps)[start:]:
    a = diffusion.alpha_bar[t]
    b = diffusion.alpha_bar[t - stride] if t >= stride else torch.tensor(1.0)
    eps = model(x, torch.tensor([t] * len(x)))
    sigma = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
    x = (x - eps * (1 - a).sqrt()) * (b / a).sqrt() + (1 - b - sigma ** 2) ** 0.5 * eps
    if eta:
        x = x + sigma * randn(x.shape, generators)
return x"""],
    "Eq. 13, an Euler step": ["""
for t in diffusion.timesteps(steps)[start:]:
    a, b = diffusion.level(t).double(), diffusion.level(t - diffusion.T // steps).double()
    eps = model(x, x.new_full((len(x),), t))
    var = eta ** 2 * (1 - b) * (1 - a / b) / (1 - a)
    y = x / a.sqrt() + (((1 - b - var) / b).sqrt() - ((1 - a) / a).sqrt()) * eps
    x = (b.sqrt() * y + var.sqrt() * torch.randn_like(y)).float()
return x"""],
}
WRONG[2] = [
    Wrong("next t", "with helpers", "t - diffusion.T // steps", "t - 1", "not to t - 1"),
    Wrong("not clean", "with helpers", "diffusion.level(t - diffusion.T // steps)",
          "diffusion.alpha_bar[max(t - diffusion.T // steps, 0)]", "clean picture"),
    Wrong("no root", "with helpers", "(1 - b - var).sqrt()", "(1 - b - var)", "square root"),
    Wrong("variance", "with helpers", "var.sqrt() * torch", "var * torch", "square root"),
    Wrong("no room", "with helpers", "(1 - b - var)", "(1 - b)", "takes the place"),
    Wrong("one t", "with helpers", "torch.full((len(x),), t)", "torch.tensor([t])", "each sample"),
    Wrong("in place", "by hand", "x = (x - eps * (1 - a).sqrt()) * (b / a).sqrt() +",
          "x -= eps * (1 - a).sqrt()\n    x = x * (b / a).sqrt() +", "in place"),
]

# 3. Guidance
RIGHT[3] = {
    "cases": ["""
if len(out) == 1:
    return out[0]
if len(out) == 2:
    return out[0] + text_scale * (out[1] - out[0])
none, picture, both = out
return none + image_scale * (picture - none) + text_scale * (both - picture)"""],
    "weighted sum": ["""
scales = {1: [], 2: [text_scale], 3: [image_scale, text_scale]}[len(out)]
scales = torch.tensor([1.0, *scales, 0.0])
return torch.einsum("k,kbchw->bchw", scales[:-1] - scales[1:], out)"""],
    "loop of lerps": ["""
result = out[0].clone()
for k in range(1, len(out)):
    scale = text_scale if k == len(out) - 1 else image_scale
    result += torch.lerp(torch.zeros_like(out[k]), out[k] - out[k - 1], scale)
return result"""],
}
WRONG[3] = [
    Wrong("exchanged", "cases", "image_scale * (picture - none) + text_scale",
          "text_scale * (picture - none) + image_scale", "exchanged"),
    Wrong("from none", "cases", "(both - picture)", "(both - none)", "not from that with neither"),
    Wrong("w = s - 1", "cases", "return out[0] + text", "return out[1] + text", "scale - 1"),
    Wrong("image for text", "cases", "text_scale * (out[1]", "image_scale * (out[1]", "text_scale"),
    Wrong("in place", "loop of lerps", ".clone()", "", "in place"),
]

# 4. Attention
RIGHT[4] = {
    "loop": ["""
context = x if context is None else context
q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
d = q.shape[2] // self.heads
samples = []
for b in range(len(x)):
    heads = []
    for i in range(0, q.shape[2], d):
        scores = q[b, :, i:i + d] @ k[b, :, i:i + d].T / d ** 0.5
        heads.append(torch.softmax(scores, dim=1) @ v[b, :, i:i + d])
    samples.append(torch.cat(heads, dim=1))
return self.to_out[0](torch.stack(samples))"""],
    "einsum": ["""
context = x if context is None else context
q, k, v = [y.view(*y.shape[:2], self.heads, -1)
           for y in (self.to_q(x), self.to_k(context), self.to_v(context))]
scores = torch.einsum("blhd,bshd->bhls", q, k) / math.sqrt(q.shape[-1])
w = scores.softmax(dim=-1)
y = torch.einsum("bhls,bshd->blhd", w, v)
return self.to_out[0](y.flatten(2))"""],
    "logarithms": ["""
context = x if context is None else context
B, L, C = x.shape
d = C // self.heads
def split(y):
    return y.reshape(B, -1, self.heads, d).permute(0, 2, 1, 3)
q, k, v = split(self.to_q(x)) * d ** -0.25, split(self.to_k(context)) * d ** -0.25, context
scores = q.matmul(k.mT)
w = torch.exp(scores - scores.logsumexp(3, keepdim=True))
y = w @ split(self.to_v(v))
return self.to_out[0](y.permute(0, 2, 1, 3).reshape(B, L, C))"""],
}
WRONG[4] = [
    Wrong("no scale", "einsum", " / math.sqrt(q.shape[-1])", "", "not divided"),
    Wrong("no root", "einsum", "math.sqrt(q.shape[-1])", "q.shape[-1]", "square root"),
    Wrong("all channels", "einsum", "q.shape[-1])", "x.shape[-1])", "all channels"),
    Wrong("wrong axis", "einsum", "softmax(dim=-1)", "softmax(dim=-2)", "wrong axis"),
    Wrong("heads mixed", "logarithms", "y.permute(0, 2, 1, 3).reshape", "y.reshape", "wrong order"),
    Wrong("no output", "einsum", "self.to_out[0](y.flatten(2))", "y.flatten(2)", "to_out"),
    Wrong("detached", "einsum", "w, v)", "w.detach(), v)", "no gradient reaches"),
    Wrong("context ignored", "einsum", "x if context is None else context", "x",
          "shapes do not fit"),
]

# 5 and 6. A mixture of experts
MIXTURE = """
h = self.net[0](x)
w = self.router_weights(cond.task_emb)
d = h.shape[-1] // self.num_experts
total = 0
for i in range(self.num_experts):
    units = slice(i * d, (i + 1) * d)
    expert = h[:, :, units] @ self.net[2].weight[:, units].T
    expert = expert + self.out_bias[i]
    total = total + w[:, i, None, None] * expert
return total"""
WIDE = """
h = self.net[0](x)
w = self.router_weights(cond.task_emb)
each = w.repeat_interleave(h.shape[-1] // self.num_experts, dim=1)
h = h * each[:, None]
return h @ self.net[2].weight.T + (w @ self.out_bias)[:, None]"""
EINSUM = """
N = self.num_experts
w = self.router(cond.task_emb).softmax(-1)
h = self.net[0](x).unflatten(-1, (N, -1))
V = self.net[2].weight.unflatten(1, (N, -1))
out = torch.einsum("blnd,cnd->blnc", h, V)
out = out + self.out_bias
return torch.einsum("bn,blnc->blc", w, out)"""
RIGHT[5] = {"loop": [MIXTURE], "vectorised": [WIDE], "einsum": [EINSUM]}
WRONG[5] = [
    Wrong("softmax over the batch", "einsum", "softmax(-1)", "softmax(0)", "over the batch"),
    Wrong("repeat", "vectorised", "w.repeat_interleave(h.shape[-1] // self.num_experts, dim=1)",
          "w.repeat(1, h.shape[-1] // self.num_experts)", "every N-th unit"),
    Wrong("biases unweighted", "vectorised", "(w @ self.out_bias)[:, None]",
          "self.out_bias.sum(0)", "without their weights"),
    Wrong("mean", "loop", "total + w[:, i, None, None] * expert",
          "total + expert / self.num_experts", "averaged"),
    Wrong("detached", "einsum", ".softmax(-1)", ".softmax(-1).detach()", "no gradient reaches"),
    Wrong("first task", "vectorised", "h * each[:, None]", "h * each[0]", "first"),
    Wrong("in place", "vectorised", "h = self.net[0](x)", "x *= 0.5\nh = self.net[0](2 * x)",
          "in place"),
    Wrong("input", "loop", "h = self.net[0](x)\n", "h = None\n", "None"),
]
RIGHT[6] = {
    "loop": [MIXTURE.replace("expert + self", "self.scale * expert + self")],
    "vectorised": [WIDE.replace("h * each", "self.scale * h * each")],
    "einsum": [EINSUM.replace("h, V)", "h, self.scale * V)")],
}
WRONG[6] = [
    Wrong("as printed", "loop", "self.scale * ", "", "factor is missing"),
    Wrong("bias too", "loop", "self.scale * expert + self.out_bias[i]",
          "self.scale * (expert + self.out_bias[i])", "bias"),
    Wrong("bias only", "loop", "self.scale * expert + ", "expert + self.scale * ", "only the bias"),
    Wrong("divided", "loop", "self.scale * expert", "expert / self.scale", "divides"),
    Wrong("always N", "einsum", "self.scale", "self.num_experts", "literal"),
    Wrong("root", "loop", "self.scale * expert", "self.scale ** 0.5 * expert", "square root"),
    Wrong("forgets weights", "vectorised", "w = self.router_weights(cond.task_emb)",
          "w = torch.full((len(x), self.num_experts), 1 / self.num_experts)", "averaged"),
]

# 7. Folding
RIGHT[7] = {
    "loop": ["""
w = self.router_weights(task_embedding)[0].detach()
out = self.net[2].weight.detach().clone()
d = out.shape[1] // self.num_experts
for i in range(self.num_experts):
    out[:, i * d:(i + 1) * d] *= w[i] * self.scale
ff = FeedForward(self.out_bias.shape[1])
ff.net[0].load_state_dict(self.net[0].state_dict())
ff.net[2].weight.data = out
ff.net[2].bias.data = sum(w[i] * self.out_bias[i].detach() for i in range(self.num_experts))
return ff"""],
    "vectorised": ["""
w = self.router_weights(task_embedding)[0]
ff = FeedForward(self.out_bias.shape[1])
ff.net[0] = self.net[0]
each = self.scale * w.repeat_interleave(self.net[2].in_features // self.num_experts)
filled(ff.net[2], self.net[2].weight * each, w @ self.out_bias)
return ff"""],
    "in the values": ["""
# GEGLU is linear in its values: their rows can take the factors as well.
w = self.router(task_embedding).softmax(-1)
C, inner = self.net[2].weight.shape
each = self.scale * w.T.expand(-1, inner // self.num_experts).reshape(-1, 1)
each = torch.cat([each, torch.ones_like(each)])
ff = FeedForward(C)
proj = self.net[0].proj
filled(ff.net[0].proj, proj.weight * each, proj.bias * each[:, 0])
filled(ff.net[2], self.net[2].weight, (w @ self.out_bias)[0])
return ff"""],
}
WRONG[7] = [
    Wrong("no scale", "vectorised", "self.scale * ", "", "self.scale"),
    Wrong("mean bias", "vectorised", "w @ self.out_bias)", "self.out_bias.mean(0))",
          "without their weights"),
    Wrong("repeat", "vectorised", "w.repeat_interleave(", "w.repeat(", "every N-th unit"),
    Wrong("gates too", "in the values", "torch.ones_like(each)", "each", "compute what"),
    Wrong("in place", "loop", ".detach().clone()", ".data", "in place"),
    Wrong("keeps the router", "vectorised", "return ff", "ff.router = self.router\nreturn ff",
          "nothing else"),
    Wrong("not transposed", "vectorised", "self.net[2].weight * each",
          "(self.net[2].weight.T * w.repeat_interleave(2)).T", "column"),
]

# 8. A convolution for each task
RIGHT[8] = {
    "loop": ["""
rows = []
for sample, row in zip(x, cond.task.tolist()):
    n = self.in_channels[row]
    weight = self.weight[row][:, :n]
    rows.append(F.conv2d(sample[None, :n], weight, self.bias[row], padding=1))
return torch.cat(rows)"""],
    "grouped": ["""
B, channels, H, W = x.shape
widest = self.weight.shape[2]
x = F.pad(x, (0, 0, 0, 0, 0, widest - channels))
n = torch.tensor(self.in_channels)[cond.task]
x = x * (torch.arange(widest) < n[:, None])[:, :, None, None]
weight = self.weight[cond.task].flatten(0, 1)
y = F.conv2d(x.reshape(1, -1, H, W), weight, padding=1, groups=B)
return y.view(B, -1, H, W) + self.bias[cond.task][:, :, None, None]"""],
    "task by task": ["""
y = 0
for row, n in enumerate(self.in_channels):
    mine = (cond.task == row).to(x.dtype).view(-1, 1, 1, 1)
    n = min(n, x.shape[1])
    out = F.conv2d(x[:, :n], self.weight[row, :, :n], padding=1)
    y = y + mine * (out + self.bias[row].view(1, -1, 1, 1))
return y"""],
}
WRONG[8] = [
    Wrong("first task", "loop", "self.weight[row]", "self.weight[cond.task[0]]", "only the first"),
    Wrong("whole batch", "grouped", "self.weight[cond.task].flatten(0, 1)",
          "self.weight[cond.task[:1]].expand(B, -1, -1, -1, -1).flatten(0, 1)", "only the first"),
    Wrong("no bias", "grouped", " + self.bias[cond.task][:, :, None, None]", "", "bias is missing"),
    Wrong("bias of task 0", "loop", "self.bias[row]", "self.bias[0]", "first task"),
    Wrong("lacking channels", "grouped",
          "x = x * (torch.arange(widest) < n[:, None])[:, :, None, None]\n", "", "no gradient"),
    Wrong("no padding", "loop", ", padding=1", "", "padding"),
    Wrong("not padded", "grouped", "x = F.pad(x, (0, 0, 0, 0, 0, widest - channels))\n",
          "widest = channels\n", "shapes do not fit"),
    Wrong("detached", "loop", "self.weight[row]", "self.weight.data[row]", "no gradient reaches"),
]

# 9. Adding a task
RECORD = """
moe["tasks"].append(task)
moe["added"].append(task)
moe["in_channels"][task] = unet.conv_in.in_channels[row]
unet.conv_in.in_channels.append(unet.conv_in.in_channels[row])
unet.task_embedding.num_embeddings += 1
return trainable(unet)"""
RIGHT[9] = {
    "names": ["""
row, moe = task_index(unet, like), unet.config["moe"]
for name, p in list(unet.named_parameters()):
    if any(part in name for part in TABLES):
        parent, _, last = name.rpartition(".")
        rows = torch.cat([p.data, p.data[row][None]])
        setattr(unet.get_submodule(parent), last, nn.Parameter(rows))""" + RECORD],
    "modules": ["""
row, moe = task_index(unet, like), unet.config["moe"]
modules = [unet.conv_in, unet.task_embedding]
modules += [block.norm3 for block in transformer_blocks(unet)]
for module in modules:
    for last, p in list(module.named_parameters()):
        order = [*range(len(p)), row]
        setattr(module, last, nn.Parameter(p.detach()[order]))""" + RECORD],
    "one matrix": ["""
row, moe = task_index(unet, like), unet.config["moe"]
R = len(moe["tasks"])
select = torch.cat([torch.eye(R), torch.eye(R)[row:row + 1]])
for name, p in unet.named_parameters():
    if any(part in name for part in TABLES):
        p.data = torch.tensordot(select, p.data, dims=1)
        p.grad = None""" + RECORD],
}
WRONG[9] = [
    Wrong("first row", "names", "p.data[row]", "p.data[0]", "first task"),
    Wrong("zeros", "names", "p.data[row][None]", "0 * p.data[:1]", "zero"),
    Wrong("in front", "names", "[p.data, p.data[row][None]]", "[p.data[row][None], p.data]",
          "keep their places"),
    Wrong("norms forgotten", "modules",
          "modules += [block.norm3 for block in transformer_blocks(unet)]\n", "", "forgotten"),
    Wrong("experts train", "names", "return trainable(unet)", "return unet", "trainable"),
    Wrong("not recorded", "names", 'moe["in_channels"][task] = unet.conv_in.in_channels[row]\n',
          "", "in step"),
    Wrong("a buffer", "names", "setattr(unet.get_submodule(parent), last, nn.Parameter(rows))",
          "m = unet.get_submodule(parent)\n        delattr(m, last)\n"
          "        setattr(m, last, rows)",
          "nn.Parameter"),
]

# 10. The window
RIGHT[10] = {
    "loop": ["""
width = math.floor(beta * num_channels)
masks = torch.zeros(len(t), num_channels)
for i, step in enumerate(t.tolist()):
    start = round((step / (num_steps - 1)) ** alpha * (num_channels - width))
    masks[i, start:start + width] = 1
return masks"""],
    "vectorised": ["""
width = int(beta * num_channels)
start = (t / (num_steps - 1)).pow(alpha).mul(num_channels - width).round()[:, None]
c = torch.arange(num_channels)
return ((start <= c) & (c < start + width)).float()"""],
    "cumulative": ["""
width = int(beta * num_channels)
share = torch.linspace(0, 1, num_steps, dtype=torch.float64) ** alpha
start = torch.floor((num_channels - width) * share[t] + 0.5).long()
edges = torch.zeros(len(t), num_channels + 1)
rows = torch.arange(len(t))
edges[rows, start] += 1
edges[rows, start + width] -= 1
return edges.cumsum(1)[:, :-1]"""],
}
WRONG[10] = [
    Wrong("paper's share", "vectorised", "(t / (num_steps - 1))", "(t / num_steps)", "T - 1"),
    Wrong("off by one", "loop", "masks[i, start:start + width]",
          "masks[i, start + 1:start + 1 + width]", "one channel too far"),
    Wrong("too wide", "vectorised", "c < start + width", "c <= start + width", "too wide"),
    Wrong("no alpha", "vectorised", ".pow(alpha)", "", "alpha"),
    Wrong("floor", "loop", "round((", "int((", "rounded down"),
    Wrong("width up", "loop", "math.floor(", "math.ceil(", "round it down"),
    Wrong("inverted", "vectorised", ".float()", ".logical_not().float()", "exchanged"),
    Wrong("rows", "cumulative", "share[t]", "share[t.sort().values]", "any order"),
]

# 11. Placement
RIGHT[11] = {
    "official": ["""
m = self.mask(cond.t)[:, None]
return super().forward(x * m, cond) + x * (1 - m)"""],
    "updates alone": ["""
m = self.mask(cond.t).unsqueeze(1)
masked = m * x
updates = super().forward(masked, cond) - masked
return x + updates"""],
    "sample by sample": ["""
m = self.mask(cond.t)
masked = torch.stack([sample * row for sample, row in zip(x, m)])
out = super().forward(masked, cond)
return torch.where(m[:, None, :] > 0, out, out + x)"""],
}
WRONG[11] = [
    Wrong("x lost", "official", " + x * (1 - m)", "", "lost"),
    Wrong("updates masked", "updates alone", "x + updates", "x + m * updates", "are masked"),
    Wrong("x twice", "updates alone", "super().forward(masked, cond) - masked",
          "super().forward(masked, cond)", "twice"),
    Wrong("no mask", "official", "super().forward(x * m, cond) + x * (1 - m)",
          "super().forward(x, cond)", "no mask"),
    Wrong("output", "updates alone", "masked = m * x\n", "masked = x\nx = x + 0\n", "no mask"),
    Wrong("exchanged", "official", "[:, None]", "[:, None].sub(1).neg()", "exchanged"),
    Wrong("in place", "updates alone", "masked = m * x", "masked = x.mul_(m)", "in place"),
    Wrong("detached", "updates alone", "x + updates", "x.detach() + updates", "detached"),
]

# 12. Loss weights
RIGHT[12] = {
    "loop": ["""
weights = []
for step in t.tolist():
    a = self.alpha_bar[step].item()
    snr = a / (1 - a)
    weight = dict(none=1.0, v=1 / a, p2=1 / (1 + snr))
    weight["min-snr"] = min(snr, 5) / snr
    factor = a if self.config["prediction_type"] == "v_prediction" and kind != "none" else 1.0
    weights.append(weight[kind] * factor)
return torch.tensor(weights)"""],
    "vectorised": ["""
a = self.alpha_bar[t]
snr = a / (1 - a)
if kind == "none":
    return torch.ones(len(t))
weight = {"v": 1 / a, "p2": 1 / (1 + snr), "min-snr": torch.clamp(snr, max=5) / snr}[kind]
if self.config["prediction_type"] == "v_prediction":
    weight = weight * a
return weight"""],
    "logarithms": ["""
a = self.alpha_bar.double()[t]
l = torch.logit(a)
of_v = self.config["prediction_type"] != "epsilon"
if kind == "none":
    return a ** 0
log = {"v": -a.log(), "p2": torch.log1p(-a),
       "min-snr": torch.minimum(l, torch.tensor(5.0).log()) - l}[kind]
return (log + of_v * a.log()).exp().float()"""],
}
WRONG[12] = [
    Wrong("max", "vectorised", "torch.clamp(snr, max=5)", "torch.clamp(snr, min=5)", "min and max"),
    Wrong("of x0", "vectorised", "torch.clamp(snr, max=5) / snr", "torch.clamp(snr, max=5)",
          "divide by snr"),
    Wrong("root", "vectorised", "snr = a / (1 - a)", "snr = (a / (1 - a)).sqrt()", "square"),
    Wrong("v's root", "vectorised", '"v": 1 / a', '"v": 1 / a.sqrt()', "not by its root"),
    Wrong("no k", "loop", "1 / (1 + snr)", "1 / snr", "k is missing"),
    Wrong("v forgotten", "vectorised", "weight = weight * a\n", "pass\n", "predicted noise"),
    Wrong("first t", "vectorised", "self.alpha_bar[t]", "self.alpha_bar[t[:1]]", "shape is wrong"),
]

# 13. Timesteps of a range
RIGHT[13] = {
    "loop": ["""
draws = []
for _ in range(size):
    low, high = (0, T) if rng.random() < p_global else t_range
    draws.append(rng.integers(low, high))
return np.array(draws)"""],
    "where": ["""
start, end = t_range
everywhere = rng.random(size) < p_global
return np.where(everywhere, rng.integers(0, T, size), rng.integers(start, end, size))"""],
    "one mixture": ["""
# Eq. 6 as one distribution over all timesteps, drawn by inverting its cumulative sum.
density = np.full(T, p_global / T)
density[t_range[0]:t_range[1]] += (1 - p_global) / (t_range[1] - t_range[0])
draws = np.searchsorted(np.cumsum(density), rng.random(size), side="right")
return draws.clip(max=T - 1)"""],
}
WRONG[13] = [
    Wrong("end included", "where", "rng.integers(start, end, size)",
          "rng.integers(start, end + 1, size)", "end is not included"),
    Wrong("p exchanged", "where", "< p_global", ">= p_global", "exchanged"),
    Wrong("per batch", "where", "rng.random(size) < p_global", "rng.random() < p_global",
          "whole batch"),
    Wrong("outside", "one mixture", "+= (1 - p_global)", "= (1 - p_global)", "into the range"),
    Wrong("global numpy", "where", "rng.integers(0, T, size)", "np.random.randint(0, T, size)",
          "rng"),
    Wrong("T included", "where", "rng.integers(0, T, size)", "rng.integers(0, T + 1, size)",
          "T - 1"),
    Wrong("floats", "where", "rng.integers(start, end, size)", "rng.uniform(start, end, size)",
          "integer"),
]

# 14. Task vectors
RIGHT[14] = {
    "comprehensions": ["""
return {key: tuned[key].float() - value.float() for key, value in base.items()
        if value.is_floating_point()}""", """
def moved(key, theta):
    if not theta.is_floating_point():
        return theta
    return theta + sum(w * tau[key] for w, tau in zip(weights, vectors))
return {key: moved(key, theta) for key, theta in base.items()}"""],
    "loops": ["""
tau = {}
for key in tuned:
    if tuned[key].is_floating_point():
        tau[key] = torch.sub(tuned[key], base[key])
return tau""", """
result = {key: theta.clone() for key, theta in base.items()}
for w, tau in zip(weights, vectors):
    for key in tau:
        result[key] += w * tau[key]
return result"""],
    "an affine mean": ["""
return {key: -1 * (base[key] - tuned[key]) for key in base if base[key].dtype.is_floating_point}""",
                       """
# Sum of w_i theta_i plus the rest of theta, which is Eq. 8 in another order.
vectors, weights = list(vectors), torch.tensor(list(weights))
result = dict(base)
for key in vectors[0]:
    models = torch.stack([base[key] + tau[key] for tau in vectors])
    result[key] = (1 - weights.sum()) * base[key] + torch.tensordot(weights, models, dims=1)
return result"""],
}
WRONG[14] = [
    Wrong("sign", "loops", "torch.sub(tuned[key], base[key])", "base[key] - tuned[key]", "sign"),
    Wrong("in place", "loops", "theta.clone()", "theta", "in place"),
    Wrong("normalised", "comprehensions", "for w, tau in zip(weights, vectors))",
          "for w, tau in zip(weights, vectors)) / sum(weights)", "normalised"),
    Wrong("no base", "comprehensions", "theta + sum", "sum", "base is missing"),
    Wrong("integers", "comprehensions", "\n        if value.is_floating_point()", "", "integers"),
    Wrong("averaged", "comprehensions", "for w, tau in zip(weights, vectors))",
          "for w, tau in zip(weights, vectors)) / len(vectors)", "average"),
    Wrong("the tuned model", "loops", "torch.sub(tuned[key], base[key])", "tuned[key]",
          "subtract the base"),
    Wrong("last only", "loops", "result[key] += w * tau[key]",
          "result[key] = base[key] + w * tau[key]", "only the last"),
]

# 15. Projections
RIGHT[15] = {
    "matrix": ["""
P, K = self.projection, self.weight
return (P @ K.flatten(1)).view(K.shape), P @ self.bias"""],
    "loop": ["""
C = len(self.bias)
P, K, b = self.projection, self.weight, self.bias
weight = torch.stack([sum(P[i, j] * K[j] for j in range(C)) for i in range(C)])
bias = torch.stack([sum(P[i, j] * b[j] for j in range(C)) for i in range(C)])
return weight, bias"""],
    "as a 1 x 1 convolution": ["""
P, K = self.projection, self.weight
weight = nn.functional.conv2d(K.transpose(0, 1), P[:, :, None, None]).transpose(0, 1)
return weight, torch.einsum("ij,j->i", P, self.bias)"""],
}
WRONG[15] = [
    Wrong("transposed", "matrix", "(P @ K", "(P.T @ K", "transposed"),
    Wrong("inputs", "as a 1 x 1 convolution",
          "nn.functional.conv2d(K.transpose(0, 1), P[:, :, None, None]).transpose(0, 1)",
          "nn.functional.conv2d(K, P[:, :, None, None])", "input channels"),
    Wrong("bias forgotten", "matrix", "P @ self.bias", "self.bias", "bias"),
    Wrong("detached", "matrix", "P, K = self.projection, ", "P, K = self.projection.data, ",
          "no gradient reaches projection"),
    Wrong("diagonal", "loop", "sum(P[i, j] * K[j] for j in range(C))", "P[i, i] * K[i]",
          "diagonal"),
    Wrong("in place", "matrix", "return (", "K.data = K.data + 1\nreturn (", "in place"),
    Wrong("weight only", "matrix", ", P @ self.bias", "", "both"),
]

# 16. The process
MARGINAL = """
ab = self.at(self.ab, t)
return (ab.sqrt() * z0 + self.aggregate(E, t)).float(), (1 - ab).sqrt().float()"""
POSTERIOR = """
r = t - 1 if r is None else r
ab, before = self.at(self.ab, t), self.at(self.ab, r)
a = ab / before
of_z0 = before.sqrt() * (1 - a) / (1 - ab)
of_z = a.sqrt() * (1 - before) / (1 - ab)
var = (1 - before) * (1 - a) / (1 - ab)
shifted = zt - self.aggregate(E, t)
return of_z0 * z0 + of_z * shifted + self.aggregate(E, r), var"""
RIGHT[16] = {
    "shifted": [MARGINAL, POSTERIOR],
    "step by step": ["""
rows, stds = [], []
for i, last in enumerate(torch.as_tensor(t).reshape(-1).expand(len(z0)).tolist()):
    mean, var = z0[i], 0.0
    for s in range(last + 1):
        a = self.ab[s + 1] / self.ab[s]
        mean = a ** 0.5 * (mean + sum(self.w[k, s + 1] * E[k, i] for k in range(len(E))))
        var = a * var + 1 - a
    rows.append(mean)
    stds.append(torch.as_tensor(var) ** 0.5)
return torch.stack(rows), torch.stack(stds)[:, None, None, None]""", """
# Lemma 4: precisions add up. Times the prior's variance, nothing is divided by 0 at t = 0.
prior, std = self.marginal(z0, E, t - 1)
a = self.at(self.ab, t) / self.at(self.ab, t - 1)
v = std ** 2
A = self.aggregate(E, t, self.w)
gain = a * v / (a * v + 1 - a)
return prior + gain * (zt / a.sqrt() - A - prior), (1 - gain) * v"""],
    "sums of coefficients": ["""
scale = self.at(self.ab, t)
C = sum(self.at(c, t) * e for c, e in zip(self.c, E))
return scale ** 0.5 * z0 + C, torch.sqrt(1 - scale)""", """
# Remark 2: by the noise that z_0 and z_t imply.
ab = self.at(self.ab, t)
a = ab / self.at(self.ab, t - 1)
eps = (zt - self.aggregate(E, t) - ab.sqrt() * z0) / (1 - ab).sqrt()
mean = (zt - (1 - a) / (1 - ab).sqrt() * eps) / a.sqrt() - self.aggregate(E, t, self.w)
return mean, (1 - self.at(self.ab, t - 1)) / (1 - ab) * (1 - a)"""],
}
WRONG[16] = [
    Wrong("no E", "shifted", "(ab.sqrt() * z0 + self.aggregate(E, t))", "(ab.sqrt() * z0)",
          "E is missing"),
    Wrong("A for C", "shifted", "z0 + self.aggregate(E, t))", "z0 + self.aggregate(E, t, self.w))",
          "all the steps"),
    Wrong("variance", "shifted", "(1 - ab).sqrt().float()", "(1 - ab).float()", "square root"),
    Wrong("no C_r", "shifted", " + self.aggregate(E, r), var", ", var", "not added"),
    Wrong("beta", "shifted", "var = (1 - before) * (1 - a) / (1 - ab)", "var = 1 - a", "beta"),
    Wrong("modalities averaged", "sums of coefficients",
          "C = sum(self.at(c, t) * e for c, e in zip(self.c, E))",
          "C = sum(self.at(c, t) * e for c, e in zip(self.c, E)) / len(E)", "averaged"),
    Wrong("minus A", "shifted", "+ of_z * shifted + self.aggregate(E, r)",
          "+ of_z * zt - self.aggregate(E, t, self.w)", "minus A_t"),
    Wrong("in place", "shifted", "shifted = zt - ", "shifted = zt\nshifted -= ", "in place"),
]

# 17. A head and its loss
RIGHT[17] = {
    "vectorised": ["""
return self.linear(features["mid"].mean(dim=(2, 3)))""", """
if head.probabilities:
    return F.cross_entropy(output, x, reduction="none")
return (output - x).pow(2).flatten(1).mean(1)"""],
    "loops": ["""
logits = []
for sample in features["mid"]:
    logits.append(self.linear(sample.flatten(1).T).mean(0))
return torch.stack(logits)""", """
rows = []
for out, target in zip(output, x):
    if head.probabilities:
        rows.append(-(out - out.logsumexp(0))[target])
    else:
        rows.append(((out - target) ** 2).mean())
return torch.stack(rows)"""],
    "other forms": ["""
mid = features["mid"]
out = torch.einsum("bchw,kc->bk", mid, self.linear.weight) / mid[0, 0].numel()
return out + self.linear.bias""",
                    """
if head.probabilities:
    q = F.one_hot(x, output.shape[1]).to(output)
    return (q * (torch.logsumexp(output, 1, keepdim=True) - output)).sum(1)
dims = tuple(range(1, x.dim()))
return F.mse_loss(output, x, reduction="none").mean(dims)"""],
}
WRONG[17] = [
    Wrong("summed", "vectorised", "mean(dim=(2, 3))", "sum(dim=(2, 3))", "summed"),
    Wrong("largest", "vectorised", "mean(dim=(2, 3))", "amax(dim=(2, 3))", "largest"),
    Wrong("one number", "vectorised", ', reduction="none"', "", "one number per sample"),
    Wrong("softmax twice", "vectorised", "cross_entropy(output", "cross_entropy(output.softmax(-1)",
          "twice"),
    Wrong("no mean", "vectorised", ".flatten(1).mean(1)", ".flatten(1).sum(1)", "summed"),
    Wrong("wrong softmax", "loops", "out.logsumexp(0)", "output.logsumexp(0)", "batch"),
    Wrong("detached", "vectorised", 'features["mid"].mean', 'features["mid"].detach().mean',
          "detached"),
    Wrong("axes", "vectorised", "mean(dim=(2, 3))", "mean(dim=(1, 2))", "shapes do not fit"),
]

# 18. A resume
RIGHT[18] = {
    "flat names": ["""
tensors = {}
for name, p in params.items():
    tensors["p." + name], tensors["e." + name] = p.detach().clone(), ema[name].clone()
    for key, value in optimizer.state.get(p, {}).items():
        tensors[f"{key}.{name}"] = value.clone()
save_file(tensors, path, metadata={"scalars": json.dumps(scalars)})""", """
with safe_open(path, framework="pt") as file:
    for key in file.keys():
        kind, _, name = key.partition(".")
        value = file.get_tensor(key)
        if kind == "p":
            params[name].data.copy_(value)
        elif kind == "e":
            ema[name].copy_(value)
        else:
            optimizer.state[params[name]][kind] = value"""],
    "the optimizer's state dict": ["""
tensors = {f"0/{i}": p.data for i, p in enumerate(params.values())}
tensors |= {f"1/{i}": ema[name] for i, name in enumerate(params)}
for i, values in optimizer.state_dict()["state"].items():
    tensors |= {f"2/{i}/{key}": value for key, value in values.items()}
save_file(tensors, str(path), metadata=dict(scalars=json.dumps(scalars)))""", """
from safetensors.torch import load_file
tensors = load_file(path)
whole = optimizer.state_dict()
whole["state"] = {}
for key, value in tensors.items():
    if key.startswith("2/"):
        _, i, name = key.split("/")
        whole["state"].setdefault(int(i), {})[name] = value
optimizer.load_state_dict(whole)
with torch.no_grad():
    for i, (name, p) in enumerate(params.items()):
        p.copy_(tensors[f"0/{i}"])
        ema[name].copy_(tensors[f"1/{i}"])"""],
    "one long vector": ["""
parts = [p.detach() for p in params.values()] + [ema[name] for name in params]
known = [name for name, p in params.items() if p in optimizer.state]
for name in known:
    state = optimizer.state[params[name]]
    parts += [state["step"], state["exp_avg"], state["exp_avg_sq"]]
vector = torch.cat([part.double().reshape(-1) for part in parts])
metadata = {"scalars": json.dumps(scalars), "known": json.dumps(known)}
save_file({"all": vector}, path, metadata=metadata)""", """
with safe_open(path, framework="pt") as file:
    known, vector = json.loads(file.metadata()["known"]), file.get_tensor("all")
place = 0
def take(like):
    nonlocal place
    place += like.numel()
    return vector[place - like.numel():place].view(like.shape).to(like.dtype)
for p in params.values():
    p.data.copy_(take(p))
for name in params:
    ema[name].copy_(take(ema[name]))
for name in known:
    p = params[name]
    optimizer.state[p] = {"step": take(torch.tensor(0.0)), "exp_avg": take(p),
                          "exp_avg_sq": take(p)}"""],
}
WRONG[18] = [
    Wrong("no moments", "flat names", "optimizer.state.get(p, {}).items()", "()", "lost"),
    Wrong("no count", "flat names", "tensors[f\"{key}.{name}\"] = value.clone()",
          "tensors[f\"{key}.{name}\"] = value * (key != 'step')", "count of steps"),
    Wrong("average is the weight", "flat names", "ema[name].clone()", "p.detach().clone()",
          "filled with the weights"),
    Wrong("moments exchanged", "one long vector", '"exp_avg": take(p),\n'
          '                          "exp_avg_sq": take(p)',
          '"exp_avg_sq": take(p),\n                          "exp_avg": take(p)', "moment"),
    Wrong("other tensors", "flat names", "params[name].data.copy_(value)",
          "params[name] = torch.nn.Parameter(value)", "lost"),
    Wrong("scalars by str", "flat names", "json.dumps(scalars)", "str(scalars)", "JSON"),
    Wrong("half precision", "the optimizer's state dict", "p.data for", "p.data.half() for",
          "come back"),
]

# 19. The form. These runs took 20 seconds each on two CPU cores.
RUN = "python train.py --task t2i --model scratch --steps 20 --batch-size 8 --eval-size 64"
FORM_ANSWER = dict(
    claim="With DTR's masks the held-out loss after twenty steps is lower than without routing.",
    treatment=f"{RUN} --sample-every 0 --routing dtr", control=f"{RUN} --sample-every 0",
    seeds=[0, 1, 2], measure="held-out loss", lower_is_better=True,
    treatment_results=[0.9803, 0.9750, 0.9895], control_results=[0.9754, 0.9705, 0.9862],
    mean_difference=0.00423, standard_error=0.000481, conclusion="control better",
    threat="Twenty steps say nothing about 400,000, where the paper sees the difference, and three "
           "seeds are few.")
FORM_RIGHT = {
    "control better": {},
    "no difference": dict(treatment_results=[0.9803, 0.9650, 0.9895], mean_difference=0.0009,
                          standard_error=0.00324, conclusion="no difference seen"),
    "samples": dict(
        claim="Aggregation brings samples closer to the held-out pictures.",
        treatment="python train.py --task translate --schedule vanishing --seed 3",
        control="python train.py --task translate --schedule=zero --out runs/x",
        measure="samples", lower_is_better=False, treatment_results=[7, 8, 9.5],
        control_results=[4, 5, 6], mean_difference=3.1667, standard_error=0.1667,
        conclusion="treatment better"),
}
FORM_WRONG = [      # the mistake, what it changes, the hint
    ("two differences", dict(control=RUN), "several differences"),
    ("the same arms", dict(control=FORM_ANSWER["treatment"]), "the same"),
    ("one seed", dict(seeds=[0], treatment_results=[0.98], control_results=[0.97]), "one run"),
    ("seed twice", dict(seeds=[0, 1, 1]), "twice"),
    ("sign", dict(mean_difference=-0.00423), "sign"),
    ("deviation", dict(standard_error=0.000481 * 3 ** 0.5), "root of n"),
    ("wrong way", dict(conclusion="treatment better"), "lower is better"),
    ("over-read", FORM_RIGHT["no difference"] | dict(conclusion="control better"), "above two"),
    ("unfair", dict(treatment="python train.py --task label --schedule vanishing",
                    control="python train.py --task label --schedule zero"), "not comparable"),
    ("empty", dict(threat=""), "whole form"),
    ("no sentence", dict(claim="DTR helps."), "whole sentence"),
]
