"""MT-Diffusion: several modalities in one forward process, decoded by heads (Chen et al., ICLR 2024, arXiv 2407.17571).

Each step of the forward process adds, besides noise, what encoders make of the other modalities X = (x_1, .., x_M): a source picture, a
masked one, a label, a representation. So z_t carries them all, and one network predicts its noise and, through a head each, the x_i.

Known of the paper are its words, its formulas are not: [r] marks what is reconstructed, from the words, from Eq. 3 as others quote it, and by
derivation; tests/test_aggregation.py checks Eq. 3 to 9 by other ways to compute them. a_t = alpha_t, ab_t = a_1 .. a_t, ab_0 = 1:

    Eq. 1 [r]  q(z_t, X | z_{t-1}) = q(z_t | z_{t-1}, X) prod_i q(x_i)                   the modalities independent, and of no time
    Eq. 2 [r]  -ELBO = KL(q(z_T | z_0, X) || p(z_T))  +  sum_{t>1} KL(q(z_{t-1} | z_t, z_0, X) || p(z_{t-1} | z_t))
                       + sum_t sum_i KL(q(x_i) || p(x_i | z_t))  -  log p(z_0 | z_1)
    Eq. 3 [r]  q(z_t | z_{t-1}, X) = N(sqrt(a_t) (z_{t-1} + A_t), (1 - a_t) I)           A_t = sum_i w_t^i E_i(x_i)
    Eq. 4 [r]  q(z_t | z_0, X) = N(sqrt(ab_t) z_0 + C_t, (1 - ab_t) I)                   C_t = sqrt(a_t) (C_{t-1} + A_t), C_0 = 0; Eq. 7
    Eq. 5, 9   q(z_{t-1} | z_t, z_0, X) = N(mu_t, s2_t I)                                s2_t = (1 - ab_{t-1}) (1 - a_t) / (1 - ab_t)
          [r]  mu_t = (sqrt(ab_{t-1}) (1 - a_t) z_0 + sqrt(a_t) (1 - ab_{t-1}) z_t + (1 - a_t) C_{t-1} - a_t (1 - ab_{t-1}) A_t) / (1 - ab_t)
                    = (z_t - (1 - a_t) / sqrt(1 - ab_t) eps) / sqrt(a_t) - A_t           DDPM's and one more term (Remark 2)
    Eq. 6 [r]  L = E || eps - eps_theta(z_t, t) ||^2 + lambda sum_i KL(q(x_i) || p_theta(x_i | z_t)),   lambda = 0.1
    Eq. 8 [r]  sqrt(a_t) w_t = k (1 - sqrt(a_t))  =>  C_t = k (1 - sqrt(ab_t)) E: the mean goes from z_0 to k E. `interpolating`, below

Eq. 2: as DDPM's, with every p and q joint with X. By Bayes q(z_t | z_{t-1}, X) = q(z_{t-1} | z_t, z_0, X) q(z_t | z_0, X) / q(z_{t-1} | z_0, X);
the quotients of all t telescope to q(z_T | z_0, X), and Eq. 1's product leaves one KL of x_i a step. Without X it is DDPM's bound.
Eq. 4: Lemma 3 adds the noises, a_t (1 - ab_{t-1}) + (1 - a_t) = 1 - ab_t; the means sqrt(a_t) (sqrt(ab_{t-1}) z_0 + C_{t-1} + A_t).
Eq. 5: Lemma 4 multiplies N(z; sqrt(ab_{t-1}) z_0 + C_{t-1}, 1 - ab_{t-1}) by N(z_t; sqrt(a_t) (z + A_t), 1 - a_t), as functions of z.
Why -A_t: put z_0 = (z_t - C_t - sqrt(1 - ab_t) eps) / sqrt(ab_t) into mu_t. Since C_t / sqrt(a_t) = C_{t-1} + A_t, the terms in E are
(1 - a_t) C_{t-1} - a_t (1 - ab_{t-1}) A_t - (1 - a_t) (C_{t-1} + A_t) = -(1 - ab_t) A_t, over 1 - ab_t.
Appendix D [r]: E = grad log p(y | z_t), w_t = -s s2_t is classifier guidance of scale s; E = eps(y) - eps, w_t = s (1 - a_t) / sqrt(a_t (1 - ab_t))
classifier-free guidance.

In y_t = z_t - C_t all of this is plain DDPM. So v, where the network predicts it, is DDPM's of y: v = sqrt(ab_t) eps - sqrt(1 - ab_t) z_0, without E,
and a known x is no more than a shift; what changes is what the network sees, z_t, and that it predicts every x_i.

    Algorithm 1 [r]   z_T = C_T + noise; t = T..1: eps, {x_i} = net(z_t), x_i as given where it is; z_{t-1} = mu_t + sqrt(s2_t) noise: `sample`
    Algorithm 2 [r]   draw (z_0, X), t, eps; C_t by the encoders, without gradient; z_t; one forward pass; a step on L: `joint_loss`

The paper's variants: -U sees z_t alone, -X x beside it (`widen`); -M finds the label in the middle block, -E by a classifier; starred ones train
some samples without x (`given`, `DROP`).

    python aggregation.py                  draws the forward process with and without aggregation, and prints coefficients

Here t runs over 0..T-1 as in diffusion.py: alpha_bar[t] is ab_{t+1}, and t = -1 means clean. Letters: B batch, C channels, H W latent or
picture, M modalities, T timesteps, K classes, D width of a representation.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

import adm
from diffusion import learned_variance, randn
from folders import HelpFormatter, UserError, blaming, command, save_weights
from unet import Cond, sinusoidal

LAMBDA = 0.1  # Eq. 6
DROP = 0.1    # [r] share of samples that train pure generation, without x, in the starred variants; the paper names no number


# ---------------------------------------------------------------------------------------------------------------------
# Weights w_t. The paper's are not in the text, but that they are small "when t is small"; weights of order 1 would drown the unit noise

def alphas(alpha_bar):
    """alpha_bar (T,) -> a_t, ab_{t-1}, both (T,) in float64 on the CPU."""
    ab = torch.as_tensor(alpha_bar).detach().cpu().double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), ab[:-1]])
    return ab / before, before


def vanishing(alpha_bar, k=1.0):
    """w_t = k ab_{t-1} (1 - sqrt(a_t))  =>  c_t = k sqrt(ab_t) (1 - sqrt(ab_t)): zero at both ends, at most k/4; sampling starts from noise."""
    a, before = alphas(alpha_bar)
    return k * before * (1 - a.sqrt())


def interpolating(alpha_bar, k=1.0):
    """w_t = k (1 - sqrt(a_t)) / sqrt(a_t)  =>  c_t = k (1 - sqrt(ab_t)), Eq. 8. For x that are always given: sampling starts from k E."""
    a, _ = alphas(alpha_bar)
    return k * (1 - a.sqrt()) / a.sqrt()


def first(alpha_bar, k=1.0):
    """w_1 = k alone  =>  c_t = k sqrt(ab_t): DDPM of z_0 + k E."""
    w = torch.zeros_like(alphas(alpha_bar)[0])
    w[0] = k
    return w


def zero(alpha_bar, k=1.0):
    """DDPM, with heads or without; k has no effect."""
    return torch.zeros_like(alphas(alpha_bar)[0])


def designed(alpha_bar, c):
    """The weights w_t = c_t / sqrt(a_t) - c_{t-1} of wanted coefficients c (T,), which at alpha_bar = 0 are 0."""
    a, _ = alphas(alpha_bar)
    c = torch.as_tensor(c).double()
    return torch.where((a == 0) & (c == 0), 0.0, c / a.sqrt()) - torch.cat([c.new_zeros(1), c[:-1]])


SCHEDULES = {f.__name__: f for f in (vanishing, interpolating, first, zero)}


# ---------------------------------------------------------------------------------------------------------------------
# The process

class Aggregation:
    """The equations; `transition` and `posterior_from_eps` are for reading, sampling needs `posterior` alone.

    alpha_bar (T,) decreasing; weights: (M, T), or M rows, each T numbers or any function of alpha_bar that returns them.

    Tensors may be of any floating type; arithmetic and results are in fp32, or float64 for float64. z (B, C, H, W), E (M, B, C, H, W), zeros
    for what is unknown, t a number or (B,). std and var come as (B or 1, 1, 1, 1).
    """

    def __init__(self, alpha_bar, weights):
        a, _ = alphas(alpha_bar)
        T, ab = len(a), torch.cat([a.new_ones(1), torch.as_tensor(alpha_bar).detach().cpu().double()])
        w = [torch.as_tensor(row(alpha_bar) if callable(row) else row).detach().cpu().double() for row in weights]
        if not ((ab.diff() < 0).all() and ab[-1] >= 0):
            raise UserError("aggregation: alpha_bar must decrease, from below 1 to 0 or above")
        if not w or any(row.shape != (T,) or not row.isfinite().all() for row in w):
            raise UserError(f"aggregation: a modality's weights are {T} finite numbers, one a timestep (interpolating has none where betas end in "
                            "pure noise)")
        self.ab, self.w = ab, torch.cat([a.new_zeros(len(w), 1), torch.stack(w)], dim=1)    # (T + 1,) and (M, T + 1), row t + 1 is t
        self.c = torch.zeros_like(self.w)                                                   # C_t = sum_i c_t^i E_i(x_i)
        for t in range(T):
            self.c[:, t + 1] = a[t].sqrt() * (self.c[:, t] + self.w[:, t + 1])

    def to(self, device):
        for name in ("ab", "w", "c"):
            setattr(self, name, getattr(self, name).to(device, torch.float32 if torch.device(device).type == "mps" else None))  # mps has no float64
        return self

    def at(self, table, t):
        """Timestep t of a table (.., T + 1) -> (.., B or 1, 1, 1, 1)"""
        t = torch.as_tensor(t, device=table.device).reshape(-1)
        return table.index_select(-1, t + 1)[..., None, None, None]

    def between(self, t, r=None):
        """-> ab_t, ab_r and a = ab_t / ab_r, the product of the alphas after r up to t; r is t - 1 if not given."""
        ab, before = self.at(self.ab, t), self.at(self.ab, t - 1 if r is None else r)
        return ab, before, ab / before

    def aggregate(self, E, t, table=None):
        """C_t = sum_i c_t^i E_i (B, C, H, W); with the table w, A_t."""
        if E.dim() != 5 or len(E) != len(self.c):
            raise ValueError(f"E is (M, B, C, H, W) with M = {len(self.c)}, not {tuple(E.shape)}")
        return (like(self.at(self.c if table is None else table, t), E) * E).sum(0)

    def transition(self, z, E, t):
        """Eq. 3: z = z_{t-1} -> mean, std of z_t."""
        _, _, a = self.between(t)
        return like(a.sqrt(), z) * (z + self.aggregate(E, t, self.w)), like((1 - a).sqrt(), z)

    def marginal(self, z0, E, t):
        """Eq. 4 -> mean, std of z_t."""
        ab = self.at(self.ab, t)
        return like(ab.sqrt(), z0) * z0 + self.aggregate(E, t), like((1 - ab).sqrt(), z0)

    def start(self, E, noise, t=None):
        """The terminal law N(C_T, I), from which sampling starts: C_T + noise, or C_t where the first step visited is t < T - 1."""
        return self.aggregate(E, self.ab.shape[0] - 2 if t is None else t) + noise

    def posterior(self, z0, zt, E, t, r=None):
        """Eq. 5, 9 -> mean, var of z_{t-1}, or of z_r for any r < t. DDPM's Eq. 7 of y_t, and C_r: Eq. 9's terms in E are C_r less
        sqrt(a) (1 - ab_r) / (1 - ab_t) C_t. Where r < t - 1, a is the product of the alphas between."""
        r = t - 1 if r is None else r
        ab, before, a = self.between(t, r)
        from_z0, from_y = before.sqrt() * (1 - a) / (1 - ab), a.sqrt() * (1 - before) / (1 - ab)
        mean = like(from_z0, zt) * z0 + like(from_y, zt) * (zt - self.aggregate(E, t)) + self.aggregate(E, r)
        return mean, like((1 - before) * (1 - a) / (1 - ab), zt)

    def posterior_from_eps(self, zt, eps, E, t):
        """Eq. 5, 9 by the noise -> mean, var of z_{t-1}: DDPM's Eq. 11, less A_t. For alpha_bar_t > 0."""
        ab, before, a = self.between(t)
        mean = like(1 / a.sqrt(), zt) * zt - like((1 - a) / (a * (1 - ab)).sqrt(), zt) * eps - self.aggregate(E, t, self.w)
        return mean, like((1 - before) * (1 - a) / (1 - ab), zt)

    def ddim_step(self, zt, eps, E, t, r, sigma=0.0, noise=None, z0=None):
        """DDIM Eq. 12 for y_t (the paper has DDPM alone) -> z_r for any r < t; without `noise` its mean. sigma 0 is deterministic, sigma^2 =
        `posterior`'s var is DDPM. z0: where it does not follow from eps: at alpha_bar_t = 0, or clipped."""
        ab, before, _ = self.between(t, r)
        if z0 is None:
            z0 = like(1 / ab.sqrt(), zt) * (zt - self.aggregate(E, t)) - like(((1 - ab) / ab).sqrt(), zt) * eps
        direction = (1 - before - torch.as_tensor(sigma).to(before) ** 2).clamp(min=0).sqrt()
        mean = like(before.sqrt(), zt) * z0 + self.aggregate(E, r) + like(direction, zt) * eps
        return mean if noise is None else mean + sigma * noise.to(mean.dtype)

    def to_z0_eps(self, diffusion, prediction, zt, E, t):
        """What the network predicts at z_t, the noise or v, -> z_0, eps: diffusion's conversion, of y_t = z_t - C_t. t (B,)"""
        return diffusion.to_x0_eps(prediction, zt - self.aggregate(E, t), t)


def like(coefficient, z):
    """A coefficient computed in float64, for z."""
    return coefficient.to(z.device, torch.promote_types(z.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Encoders x -> E(x) (B, C, H, W), without parameters of their own. A picture's is the identity, for x in the space of z: pixels, or latents
# of the frozen VAE (data.Encoder), which are then also what its head predicts

@torch.no_grad()
def unet_encoding(unet, z, context=None, added=None):
    """E(x) = U-Net(0, t = 0, x), its prediction -> (B, C, H, W); z: any tensor of that shape. x enters by cross-attention, context (B, S, D):
    a label's text states, or a representation as one token, x[:, None]; in an adm.UNet2D, which has none, as added={"class_labels": (B,)}.

    Training encodes with the weights of the moment, sampling with the averaged ones.
    """
    B, C = z.shape[:2]
    zeros = torch.zeros(B, unet.config["in_channels"], *z.shape[2:], device=z.device, dtype=unet.conv_out.weight.dtype)
    return unet(zeros, torch.zeros(B, device=z.device, dtype=torch.long), context, added=added)[:, :C]


def each_class_once(encode, labels):
    """encode(classes (n,)) -> (n, C, H, W); labels (B,) -> E (B, C, H, W), each class that occurs encoded once."""
    classes, rows = labels.unique(return_inverse=True)
    return encode(classes).index_select(0, rows)


def expected(table, x):
    """All classes' encodings (K, C, H, W) and labels x, (B,) or probabilities (B, K) -> E (B, C, H, W). mu_t is linear in eps and E, so their
    means give its mean over p(z_0, x | z_t)."""
    return table.index_select(0, x) if x.dim() == 1 else torch.einsum("bk,kchw->bchw", x.to(table.dtype), table)


# ---------------------------------------------------------------------------------------------------------------------
# Heads p_theta(x_i | z_t). features: the U-Net's "mid" and "up", and "picture", the z_0 that its output stands for

class ImageHead(nn.Module):
    """A copy of the U-Net's output block; that of the masked pictures is described without SiLU."""
    probabilities = False

    def __init__(self, unet, channels, silu=True):
        super().__init__()
        self.norm, self.conv, self.silu = copy.deepcopy(unet.conv_norm_out), copy.deepcopy(unet.conv_out), silu
        self.conv.weight, self.conv.bias = (nn.Parameter(p.detach()[:channels].clone()) for p in (self.conv.weight, self.conv.bias))
        self.conv.out_channels = channels                        # without those that tell a variance

    def forward(self, features, t):                              # -> (B, C, H, W)
        h = self.norm(features["up"])
        return self.conv(F.silu(h) if self.silu else h)


class LinearHead(nn.Module):
    """MT-Diffusion-M: one linear layer on the middle block, averaged over positions [r]."""
    probabilities = True

    def __init__(self, unet, channels, classes):
        super().__init__()
        self.linear = nn.Linear(unet.config["block_out_channels"][-1], classes)

    def forward(self, features, t):                              # -> (B, K)
        return self.linear(features["mid"].mean(dim=(2, 3)))


class VectorHead(nn.Module):
    """Two layers on the middle block, averaged over positions [r]; the paper's width is 1024."""
    probabilities = False

    def __init__(self, unet, channels, width=1024):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(unet.config["block_out_channels"][-1], width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, features, t):                              # -> (B, D)
        return self.net(features["mid"].mean(dim=(2, 3)))


class Classifier(nn.Module):
    """MT-Diffusion-E: guided-diffusion's classifier, the encoder half of ADM's U-Net and attention pooling, on the U-Net's output: on the picture
    that can be reconstructed from it [r]. guided-diffusion's is 128 wide, 4 deep."""
    probabilities = True

    def __init__(self, unet, channels, classes, width=128, depth=4):
        super().__init__()
        C, size, self.width, self.heads = 4 * width, unet.config["sample_size"], width, 4 * width // min(width, 64)
        net = adm.UNet2D(adm.CONFIGS["adm"] | dict(
            block_out_channels=(width, 2 * width, 3 * width, C), layers_per_block=depth, attention_head_dim=min(width, 64),
            in_channels=channels, sample_size=size, num_class_embeds=None))
        self.conv_in, self.time_embedding, self.down_blocks, self.mid_block = net.conv_in, net.time_embedding, net.down_blocks, net.mid_block
        self.norm, self.qkv, self.out = nn.GroupNorm(32, C), nn.Linear(C, 3 * C), nn.Linear(C, classes)
        self.position = nn.Parameter(torch.randn((size // net.multiple) ** 2 + 1, C) / C ** 0.5)

    def forward(self, features, t):                              # -> (B, K)
        cond = Cond(self.time_embedding(sinusoidal(t, self.width).to(self.norm.weight.dtype)), None, t, None, None, None)
        x = self.conv_in(features["picture"].to(self.norm.weight.dtype), cond)
        for block in self.down_blocks:
            x, _ = block(x, cond, lambda module, *inputs: module(*inputs))
        x = F.silu(self.norm(self.mid_block(x, cond, lambda module, *inputs: module(*inputs)))).flatten(2).transpose(1, 2)  # (B, L, C)
        if len(self.position) != 1 + x.shape[1]:
            raise UserError("the classifier reads only pictures of the size that it was made for")
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.position
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)    # (B, heads, 1 + L, C/heads)
        return self.out(F.scaled_dot_product_attention(q[:, :, :1], k, v).flatten(1))      # the mean asks all positions


HEADS = {"image": ImageHead, "linear": LinearHead, "classifier": Classifier, "vector": VectorHead}


class Heads(nn.ModuleDict):
    """A head a modality, in the order of E's rows. modalities: name -> dict(kind=, a name in HEADS; weights=, one in SCHEDULES, and its k=;
    options of the kind). channels: of z."""

    def __init__(self, unet, modalities, channels):
        super().__init__()
        self.config = dict(channels=channels, modalities={})
        for name, asked in modalities.items():
            with blaming(f"modality {name}"):
                m = dict(weights="vanishing", k=1.0) | asked
                if m.get("kind") not in HEADS or m["weights"] not in SCHEDULES:
                    raise UserError(f"modality {name}: {asked}; the kinds are {', '.join(HEADS)}, the weights {', '.join(SCHEDULES)}")
                self[name] = HEADS[m["kind"]](unet, channels, **{key: value for key, value in m.items() if key not in ("kind", "weights", "k")})
            self.config["modalities"][name] = m
        self.to(unet.conv_out.weight).requires_grad_(True)

    def forward(self, features, t):
        return {name: head(features, t) for name, head in self.items()}

    def aggregation(self, alpha_bar):
        return Aggregation(alpha_bar, [SCHEDULES[m["weights"]](alpha_bar, m["k"]) for m in self.config["modalities"].values()])

    def save_pretrained(self, folder, dtype=None):
        save_weights(self, folder, {"_class_name": "Heads", **self.config}, dtype=dtype)


def add_heads(unet, modalities, channels):
    """-> Heads for a U-Net, whose config.json records them under "aggregation"; add_heads(unet, **that) and load_weights make them again."""
    if "aggregation" in unet.config:
        raise UserError(f"this U-Net has heads already: {', '.join(unet.config['aggregation']['modalities'])}")
    heads = Heads(unet, modalities, channels)
    unet.config["aggregation"] = heads.config
    unet.config.setdefault("_class_name", f"Joint{type(unet).__name__}")  # so that no other loader opens the folder and draws wrong pictures
    return heads


def widen(unet, channels):
    """MT-Diffusion-X, eps_theta(z_t, t, x): input channels for x beside z_t, in place; their weights start at zero, so the network is what it was.
    For pure generation x is all zeros."""
    old = unet.conv_in
    unet.conv_in = copy.deepcopy(old)
    unet.conv_in.weight = nn.Parameter(torch.cat([old.weight.detach(), old.weight.new_zeros(len(old.weight), channels, 3, 3)], dim=1))
    unet.conv_in.in_channels = unet.config["in_channels"] = old.in_channels + channels
    return unet


# ---------------------------------------------------------------------------------------------------------------------
# Training and sampling. network(z_t, t) -> prediction, features, as U-Nets return with return_features; it closes over its conditions

def decode(diffusion, network, heads, z, t):
    """One forward pass -> prediction, {modality: its head's output}."""
    prediction, features = network(z, t)
    picture, _ = diffusion.to_x0_eps(prediction, z, t)  # of z, not of z - C_t, which would tell x
    return prediction, heads({**features, "picture": picture}, t)


def divergence(head, output, x):
    """KL(q(x) || p_theta(x | z_t)) up to constants, (B,) in fp32: cross-entropy for labels x, (B,) or probabilities (B, K); for a Gaussian
    around the output the mean squared error."""
    if head.probabilities:
        return F.cross_entropy(output.float(), x, reduction="none")
    return (output.float() - x).square().flatten(1).mean(1)


def joint_loss(diffusion, aggregation, network, heads, z0, t, noise, E, x, given=None, weight=LAMBDA,
               objective=lambda denoising, prediction: denoising):
    """Eq. 6, by Algorithm 2 -> the loss (B,), its terms {"denoising": (B,), modality: (B,)} before `weight`, lambda, and the prediction.
    objective: what of the denoising term counts, where training weights it (Diffusion.objective); in y_t = z_t - C_t it is DDPM's.

    E (M, B, C, H, W) in the order of the heads, x {modality: its values}. given (M, B) of 0 and 1: what a sample does not have, or what was
    dropped for the starred variants, has E = 0 and no KL, whatever its values. A modality that no sample has may be absent from x; its head's
    gradient is zero.
    """
    given = torch.ones(E.shape[:2], device=E.device) if given is None else given
    E, out = E * given[..., None, None, None], []

    def shifted(y, t):
        out.extend(decode(diffusion, network, heads, y + aggregation.aggregate(E, t), t))
        return out[0]

    terms = {"denoising": diffusion.loss(shifted, z0, t, noise)}  # y_t is DDPM's
    for row, (name, output) in zip(given, out[1].items()):
        terms[name] = divergence(heads[name], output, x[name]) * row if name in x else 0 * output.float().flatten(1).sum(1)
    return objective(terms["denoising"], out[0]) + weight * sum(terms[name] for name in heads), terms, out[0]


@torch.no_grad()
def sample(diffusion, aggregation, network, heads, encoders, noise, known=None, z0=None, steps=50, sampler="ddim", eta=0.0, generators=None,
           callback=None):
    """Algorithm 1 -> z_0 (B, C, H, W), {modality: x}, both as given where they are.

    encoders: {modality: x -> E}. noise (B, C, H, W). known: {modality: x}, any of them; the others start at E = 0, then are what their heads say,
    a picture, a representation or probabilities (B, K). z0: the picture itself, if that is known and the rest is wanted: z_t is then drawn
    from Eq. 4, always with the same noise. sampler: ddim or ddpm; steps, eta, generators as in diffusion.py, but the last step ends at clean.
    callback(i, t, z, z0, x) sees each step.
    """
    known, visited = known or {}, diffusion.timesteps(steps) + [-1]
    if sampler not in ("ddim", "ddpm") or not 0 <= eta <= 1:
        raise UserError(f"sampler {sampler}, eta {eta}: joint sampling is by ddim, with eta from 0 to 1, or ddpm")
    if unknown := [name for name in known if name not in heads]:
        raise UserError(f"this model was not trained on {', '.join(unknown)}; it knows {', '.join(heads)}")
    fixed = {name: encoders[name](x) for name, x in known.items()}
    E = torch.stack([fixed.get(name, torch.zeros_like(noise)) for name in heads])

    def on_the_way(t):
        mean, std = aggregation.marginal(z0, E, t)
        return mean + std * noise

    z = aggregation.start(E, noise, visited[0]) if z0 is None else on_the_way(visited[0])
    for i, (t, r) in enumerate(zip(visited, visited[1:])):
        batch_t = torch.full((len(z),), t, dtype=torch.long, device=z.device)
        prediction, outputs = decode(diffusion, network, heads, z, batch_t)
        x = {name: known[name] if name in known else out.float().softmax(-1) if heads[name].probabilities else out.float()
             for name, out in outputs.items()}
        E = torch.stack([fixed[name] if name in fixed else encoders[name](x[name]) for name in heads])
        z0_hat, eps = aggregation.to_z0_eps(diffusion, prediction.float(), z, E, batch_t)
        mean, var = aggregation.posterior(z0_hat, z, E, t, r)
        if z0 is not None:
            z, z0_hat = on_the_way(r), z0
        elif sampler == "ddim":
            z = aggregation.ddim_step(z, eps, E, t, r, eta * var.sqrt(), randn(z.shape, generators, z.device) if eta > 0 else None, z0_hat)
        else:
            beta, kind = like(1 - aggregation.between(t, r)[2], z), str(diffusion.config["variance_type"])
            if "large" in kind:
                var = beta
            if "learned" in kind and r >= 0:
                var = learned_variance(prediction[:, z.shape[1]:].float(), var.log(), beta.log()).exp()
            z = mean + var.sqrt() * randn(z.shape, generators, z.device) if r >= 0 else mean
        if callback is not None:
            callback(i, t, z, z0_hat, x)
    return z, x


def main():
    import argparse
    import math
    from pathlib import Path

    from PIL import Image, ImageDraw

    from data import STYLES, Sheet, on_white, to_pil, to_tensor
    from diffusion import Diffusion, seeded
    parser = argparse.ArgumentParser(description="Draw the forward process from one emoji in two styles, z_0 and x, and print its coefficients.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("--emoji", default="dragon face", help="its name")
    parser.add_argument("--k", type=float, default=1.0, help="scale of the weights")
    parser.add_argument("--out", default="samples/aggregation.png", help="the picture")
    args = parser.parse_args()
    emoji, out = {e.name: e for e in Sheet.load()}.get(args.emoji), Path(args.out)
    if emoji is None or not math.isfinite(args.k) or out.suffix.lower() != ".png" or out.is_dir():
        raise UserError(f"--emoji {args.emoji} --k {args.k} --out {out}: a name in assets/emoji/emoji.json, a finite number, a .png file")
    x, z0 = (to_tensor(on_white(Sheet.picture(style, emoji.cells[None])))[None] for style in STYLES)
    noise, alpha_bar = randn(z0.shape, seeded([0])), Diffusion.from_config({}).alpha_bar
    side, times = 128, (0, 100, 200, 300, 400, 500, 600, 800, 999)
    processes = {name: Aggregation(alpha_bar, [schedule(alpha_bar, args.k)]) for name, schedule in SCHEDULES.items()}
    sheet = Image.new("RGB", (side * (1 + len(times)), 24 + 6 * side), "white")
    draw, ink = ImageDraw.Draw(sheet), dict(fill="#222222", font_size=14)
    for k, t in enumerate(times, 1):
        draw.text((side * k + 6, 4), f"t = {t}", **ink)
    for i, name in enumerate(("zero", "vanishing", "interpolating")):
        top, left, title = 24 + 2 * side * i, x if i else z0, f"w: {name}" if i else "w = 0: DDPM"
        steps = [processes[name].marginal(z0, x[None], t) for t in times]
        rows = [left, *[mean for mean, _ in steps]], [torch.ones_like(z0), *[mean + std * noise for mean, std in steps]]
        picture = to_pil(torch.cat([torch.cat(row, dim=3)[0] for row in rows], dim=1))
        sheet.paste(picture.resize((sheet.width, 2 * side), Image.NEAREST), (0, top))
        draw.text((6, top + side + 6), f"{title}\n\nabove: {'x' if i else 'z_0'}, and\nthe mean of z_t\n\nhere: z_t", **ink)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    print(f"z_t = sqrt(ab_t) z_0 + c_t x + std_t noise; k = {args.k:g}, DDPM's linear betas\n{'t':>6}{'sqrt(ab_t)':>12}{'std_t':>8}   c_t:"
          + "".join(f"{name:>15}" for name in processes))
    for t in times:
        signal, std = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        print(f"{t:>6}{signal:>12.4f}{std:>8.4f}       " + "".join(f"{p.c[0, t + 1]:>15.4f}" for p in processes.values()))
    print(f"{args.emoji} in two styles, t from left to right -> {out}")


if __name__ == "__main__":
    command(main)
