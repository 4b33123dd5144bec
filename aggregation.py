"""MT-Diffusion: several modalities in one forward process (Chen et al., ICLR 2024,
arXiv 2407.17571).

Beside z_0, the picture (or its latent) that is to be drawn, an example has M other modalities
X = (x_1, .., x_M): a source picture, a masked one, a label, a representation. The forward step from
z_{t-1} to z_t, t = 1 .. T, adds noise and all of them: E_i encodes x_i in the shape of z, w_t^i is
the weight of this encoding at t, and A_t is their weighted sum. So z_t carries X, and one network
predicts the noise eps in z_t, as eps_theta(z_t, t), and through one head each the x_i, as a
distribution p_theta(x_i | z_t). Its target q(x_i) is a point mass at the example's own x_i. beta_t
is DDPM's noise at t, a_t = 1 - beta_t, and ab_t = a_1 a_2 .. a_t with ab_0 = 1.
In the paper's equations C_t is what all steps up to t have added, and k and lambda are constants:

    Eq. 1      q(z_t, X | z_{t-1}) = q(z_t | z_{t-1}, X) prod_i q(x_i)
    Eq. 2      the bound whose terms Eq. 6 weights                     derived in `loss`
    Eq. 3      q(z_t | z_{t-1}, X) = N(sqrt(a_t) (z_{t-1} + A_t), (1 - a_t) I)    `transition`
               A_t = sum_i w_t^i E_i(x_i)
    Eq. 4, 7   q(z_t | z_0, X) = N(sqrt(ab_t) z_0 + C_t, (1 - ab_t) I)            `marginal`
               C_t = sqrt(a_t) (C_{t-1} + A_t) = sum_i c_t^i E_i(x_i),  C_0 = 0
    Eq. 5, 9   q(z_{t-1} | z_t, z_0, X) = N(mu_t, s2_t I)                         `posterior`
               s2_t = (1 - ab_{t-1}) (1 - a_t) / (1 - ab_t)
               mu_t = (z_t - (1 - a_t) / sqrt(1 - ab_t) eps) / sqrt(a_t) - A_t
                                                                         `posterior_from_eps`
    Eq. 6      L = mean over z_0, X, t and eps of || eps - eps_theta(z_t, t) ||^2
                   + lambda sum_i KL(q(x_i) || p_theta(x_i | z_t))                `loss`
    Eq. 8      sqrt(a_t) w_t^i = k (1 - sqrt(a_t))  =>  c_t^i = k (1 - sqrt(ab_t))
                                                                         `interpolating`

and Algorithms 1 and 2 draw and train: `sample` and `loss`.

For ||.||^2 we take the mean over channels and positions; with a sum, the paper's lambda = 0.1 would
mean something else.

These formulas were reconstructed from the paper's prose and by the derivations that stand beside
each method below; tests/test_aggregation.py verifies each by another way to compute it. Eq. 3 is
quoted elsewhere in two forms, which differ by a factor on w. Both have a posterior with one term
more than DDPM's, as Remark 2 says; in ours this term is A_t itself. Eq. 8 is lost: what stands
above is the likeliest of several special cases.

In y_t = z_t - C_t all of this is plain DDPM. So v, where the network predicts it, is DDPM's of y,
and a known x is no more than a shift. What changes is what the network sees, z_t, and that it
predicts every x_i.

The tasks of data.TASKS, where x is the other modality, E encodes it and the head predicts it:

                z_0               x                   E(x)                 head
    translate   Twitter's emoji   Google's            x itself             a copied output block
    masked      a picture         with zero patches   x itself             the same, without SiLU
    label       a picture         its category        U-Net of the name    linear, or a classifier
    repr        a picture         a vector about it   U-Net of one token   two layers

The U-Net of label reads the category's name as a prompt (on pixels, as its class embedding), and
what it returns is normalised. The vector of repr is that of a caption, and the U-Net reads it as a
prompt of one token. The linear head and that of repr read the middle block, the classifier reads
the picture that the U-Net's output stands for.

The paper's variants: -U sees z_t alone, -X sees x beside it (`widen_input`). -M reads the label off
the middle block, -E by a classifier. The starred ones are fine-tuned with some samples that lack
x; here some lack it from the first step.

    python aggregation.py       draws the forward process with and without aggregation

In code t runs over 0..T-1 as in diffusion.py: alpha_bar[t] is ab_{t+1}, and t = -1 means clean.
Letters: B batch, C channels, H W or h w height and width of z, M modalities, T timesteps, K
classes, D width, S tokens of a context, L positions of a picture.
"""
import hub  # noqa: F401  the first import, so that Ctrl-C ends quietly
import copy
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

from chart import arrange
from diffusion import Diffusion, posterior, randn, seeded
from hub import Parser, UserError, command, write_png
from unet import Cond, sinusoidal

# lambda of Eq. 6, the weight of the heads, as the paper has it. `loss` takes another one as
# head_weight, and train.py as --modality-weight.
LAMBDA = 0.1


# -------------------------------------------------------------------------------------------------
# The weights w_t. The paper does not print them; its prose suggests that they are small "when t is
# small". Weights of order 1 would drown the unit noise. The functions below are our choices. Each
# solves Eq. 7, c_t = sqrt(a_t) (c_{t-1} + w_t), for w_t, given the c_t that is wanted:
#     w_t = c_t / sqrt(a_t) - c_{t-1},    where sqrt(ab_t / a_t) = sqrt(ab_{t-1})

def on_cpu(numbers):
    """Make a float64 tensor on the CPU, also where new tensors are made on another device."""
    return torch.as_tensor(numbers, dtype=torch.float64, device="cpu").detach()


def alphas(alpha_bar):
    """alpha_bar (T,) -> a_t and ab_{t-1}, both (T,) in float64 on the CPU."""
    ab = on_cpu(alpha_bar)
    before = torch.cat([ab.new_ones(1), ab[:-1]])
    return ab / before, before


def vanishing(alpha_bar, k=1.0):
    """w_t = k ab_{t-1} (1 - sqrt(a_t)), so that c_t = k sqrt(ab_t) (1 - sqrt(ab_t)).

    c_t is zero at both ends of a process that ends in pure noise, and at most k / 4. Where ab_T is
    not quite zero, as with Stable Diffusion's betas, sampling starts from noise and a little of E.
    """
    # w_t / k = sqrt(ab_{t-1}) (1 - sqrt(ab_t)) - sqrt(ab_{t-1}) (1 - sqrt(ab_{t-1}))
    #         = sqrt(ab_{t-1}) (sqrt(ab_{t-1}) - sqrt(ab_t))
    a, before = alphas(alpha_bar)
    return k * before * (1 - a.sqrt())


def interpolating(alpha_bar, k=1.0):
    """Eq. 8: w_t = k (1 - sqrt(a_t)) / sqrt(a_t), so that c_t = k (1 - sqrt(ab_t)).

    The mean goes from z_0 to k E. This is for x that is always known: sampling starts from k E.
    """
    # Eq. 8 is lost. This is its likeliest form, and the factor k is ours.
    # w_t / k = 1 / sqrt(a_t) - sqrt(ab_{t-1}) - (1 - sqrt(ab_{t-1})) = 1 / sqrt(a_t) - 1
    a, _ = alphas(alpha_bar)
    return k * (1 - a.sqrt()) / a.sqrt()


def zero(alpha_bar, k=1.0):
    """w_t = 0: DDPM, with heads or without. The control without aggregation."""
    return torch.zeros_like(alphas(alpha_bar)[0])


SCHEDULES = {schedule.__name__: schedule for schedule in (zero, vanishing, interpolating)}


# -------------------------------------------------------------------------------------------------
# The process

class Aggregation:
    """Compute the forward process and its posterior.

    alpha_bar: (T,), decreasing. weights: (M, T), or M rows, each T numbers or a function of
    alpha_bar that returns them.

    In all methods z is (B, C, H, W), E is (M, B, C, H, W) with zeros for what is unknown, t is a
    number or (B,), and std and var come as (B or 1, 1, 1, 1). Tensors may be of any floating type:
    coefficients are computed in float64, results are in fp32 (in float64 for float64).
    """

    def __init__(self, alpha_bar, weights):
        a, before = alphas(alpha_bar)
        T = len(a)
        rows = [on_cpu(row(alpha_bar) if callable(row) else row) for row in weights]
        self.ab = torch.cat([before, on_cpu(alpha_bar)[-1:]])                       # (T + 1,)
        if not ((self.ab.diff() < 0).all() and self.ab[-1] >= 0):
            raise UserError("aggregation: alpha_bar must decrease, from below 1 to 0 or above")
        if not rows or any(row.shape != (T,) or not row.isfinite().all() for row in rows):
            raise UserError(f"aggregation: the weights of a modality are {T} finite numbers, one a "
                            "timestep (interpolating has none where betas end in pure noise)")
        # Column t + 1 of the tables is timestep t, column 0 is clean.
        self.w = torch.cat([a.new_zeros(len(rows), 1), torch.stack(rows)], dim=1)   # (M, T + 1)
        # C_t is linear in the E_i, so their coefficients c_t^i follow its recursion (Eq. 7).
        self.c = torch.zeros_like(self.w)
        for t in range(T):
            self.c[:, t + 1] = a[t].sqrt() * (self.c[:, t] + self.w[:, t + 1])

    def to(self, device):
        # MPS has no float64.
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.ab = self.ab.to(device, dtype)
        self.w = self.w.to(device, dtype)
        self.c = self.c.to(device, dtype)
        return self

    def at(self, table, t):
        """Look up timestep t of a table (.., T + 1) -> (.., B or 1, 1, 1, 1)."""
        t = torch.as_tensor(t, device=table.device).reshape(-1)
        return table.index_select(-1, t + 1)[..., None, None, None]

    def ddpm(self, t, r, z):
        """Return the four numbers of diffusion.posterior, DDPM's Eq. 7, for z_t -> z_r."""
        numbers = posterior(self.at(self.ab, t), self.at(self.ab, r))
        return [like(number, z) for number in numbers]

    def aggregate(self, E, t, table=None):
        """Compute C_t = sum_i c_t^i E_i -> (B, C, H, W). With the table w: A_t.

        Sampling starts from it, at z_T = C_T + noise.
        """
        if E.dim() != 5 or len(E) != len(self.c):
            raise ValueError(f"E is (M, B, C, H, W) with M = {len(self.c)}, not {tuple(E.shape)}")
        return (like(self.at(self.c if table is None else table, t), E) * E).sum(0)

    def transition(self, z, E, t):
        """Eq. 3: z = z_{t-1} -> mean and std of z_t.

        Nothing below calls it: training and sampling need only what many of these steps sum up to.
        """
        a = self.at(self.ab, t) / self.at(self.ab, t - 1)
        mean = like(a.sqrt(), z) * (z + self.aggregate(E, t, self.w))
        return mean, like((1 - a).sqrt(), z)

    def marginal(self, z0, E, t):
        """Eq. 4 and 7 -> mean and std of z_t."""
        # By induction from z_0 itself, where ab_0 = 1 and C_0 = 0. Put
        #     z_{t-1} = sqrt(ab_{t-1}) z_0 + C_{t-1} + sqrt(1 - ab_{t-1}) e
        # into Eq. 3, with another noise e' that is independent of e (Lemma 3):
        #     z_t = sqrt(a_t ab_{t-1}) z_0 + sqrt(a_t) (C_{t-1} + A_t)
        #           + sqrt(a_t (1 - ab_{t-1})) e + sqrt(1 - a_t) e'
        # a_t ab_{t-1} is ab_t, and the second term is C_t. The variances of the noises add up to
        # a_t - ab_t + 1 - a_t = 1 - ab_t. Unrolled, C_t = sum_{s<=t} sqrt(ab_t / ab_{s-1}) A_s.
        ab = self.at(self.ab, t)
        mean = like(ab.sqrt(), z0) * z0 + self.aggregate(E, t)
        return mean, like((1 - ab).sqrt(), z0)

    def posterior(self, z0, zt, E, t, r=None):
        """Eq. 5 and 9 -> mean and var of z_{t-1}, or of z_r for any r < t."""
        # Lemma 4 multiplies two Gaussians in z = z_{t-1}: N(z; sqrt(ab_{t-1}) z_0 + C_{t-1},
        # 1 - ab_{t-1}) and N(z_t; sqrt(a_t) (z + A_t), 1 - a_t). As in diffusion.posterior, the
        # product has variance 1 / P and mean Q / P with
        #     P = 1 / (1 - ab_{t-1}) + a_t / (1 - a_t) = (1 - ab_t) / ((1 - ab_{t-1}) (1 - a_t))
        #     Q = (sqrt(ab_{t-1}) z_0 + C_{t-1}) / (1 - ab_{t-1})
        #         + sqrt(a_t) (z_t - sqrt(a_t) A_t) / (1 - a_t),
        # so the mean, times 1 - ab_t, is
        #     sqrt(ab_{t-1}) (1 - a_t) z_0 + sqrt(a_t) (1 - ab_{t-1}) z_t
        #     + (1 - a_t) C_{t-1} - a_t (1 - ab_{t-1}) A_t.
        # The code says the same in y_t = z_t - C_t, where it is DDPM's Eq. 7, and adds C_r to the
        # result: -sqrt(a_t) (1 - ab_{t-1}) C_t + (1 - ab_t) C_{t-1} is the second line, because
        # C_t = sqrt(a_t) (C_{t-1} + A_t) and 1 - ab_t - a_t (1 - ab_{t-1}) = 1 - a_t.
        # Over several steps a is the product of the alphas between.
        r = t - 1 if r is None else r
        of_z0, of_y, var, _ = self.ddpm(t, r, zt)
        mean = of_z0 * z0 + of_y * (zt - self.aggregate(E, t)) + self.aggregate(E, r)
        return mean, var

    def posterior_from_eps(self, zt, eps, E, t):
        """Eq. 5 and 9 by the noise, as Remark 2 describes them -> mean and var of z_{t-1}.

        ab_t must be above 0. `sample` uses `posterior`, which is equal to it and also steps over
        several timesteps.
        """
        # Put z_0 = (z_t - C_t - sqrt(1 - ab_t) eps) / sqrt(ab_t) into the mean above, times
        # 1 - ab_t. Its first term becomes (1 - a_t) (z_t - C_t - sqrt(1 - ab_t) eps) / sqrt(a_t).
        # The terms in z_t are then, times sqrt(a_t), 1 - a_t + a_t (1 - ab_{t-1}) = 1 - ab_t. Since
        # C_t / sqrt(a_t) = C_{t-1} + A_t, the terms in E are
        #     (1 - a_t) C_{t-1} - a_t (1 - ab_{t-1}) A_t - (1 - a_t) (C_{t-1} + A_t),
        # which is -(1 - ab_t) A_t: of X only -A_t remains beside DDPM's Eq. 11 (Remark 2).
        #
        # So classifier guidance of scale g is E = grad log p(label | z_t) with w_t = -g s2_t, and
        # classifier-free guidance is E = eps(label) - eps with
        # w_t = g (1 - a_t) / sqrt(a_t (1 - ab_t)) (Appendix D).
        ab = self.at(self.ab, t)
        a = ab / self.at(self.ab, t - 1)
        mean = like(1 / a.sqrt(), zt) * (zt - like((1 - a) / (1 - ab).sqrt(), zt) * eps)
        _, _, var, _ = self.ddpm(t, t - 1, zt)
        return mean - self.aggregate(E, t, self.w), var

    def ddim_step(self, zt, eps, E, t, r, sigma=0.0, z0=None):
        """DDIM's step (Eq. 12) from z_t to z_r for any r < t -> its mean; sigma is its std.

        sigma = 0, as in `sample`, is deterministic, and sigma^2 = `posterior`'s var is DDPM.
        z0: where it does not follow from eps, at ab_t = 0 or when it was clipped.
        """
        if z0 is None:
            shift, std = self.marginal(torch.zeros_like(zt), E, t)
            z0 = (zt - shift - std * eps) / like(self.at(self.ab, t).sqrt(), zt)
        mean, std = self.marginal(z0, E, r)
        # Of the variance 1 - ab_r of z_r, fresh noise brings sigma^2 and the old noise the rest.
        return mean + (std ** 2 - sigma ** 2).clamp(min=0).sqrt() * eps


def like(coefficient, z):
    """Cast a coefficient that was computed in float64 to the type that z computes in."""
    return coefficient.to(z.device, torch.promote_types(z.dtype, torch.float32))


# -------------------------------------------------------------------------------------------------
# Heads p_theta(x_i | z_t). They read features of the U-Net: "mid" and "up", the outputs of its
# middle and of its last block, and "picture", the z_0 that its output stands for.

class ImageHead(nn.Module):
    """A copy of the U-Net's output block; for masked pictures the paper has no SiLU in it."""
    probabilities = False

    def __init__(self, unet, channels, silu=True):
        super().__init__()
        old = unet.conv_out
        self.silu = silu
        self.norm = copy.deepcopy(unet.conv_norm_out)
        self.conv = nn.Conv2d(old.in_channels, channels, 3, padding=1)
        # Only the first channels: ADM's others describe a variance.
        self.conv.load_state_dict({name: p[:channels] for name, p in old.state_dict().items()})

    def forward(self, features, t):                                          # -> (B, C, H, W)
        h = self.norm(features["up"])
        return self.conv(F.silu(h) if self.silu else h)


class LinearHead(nn.Module):
    """MT-Diffusion-M: one linear layer on the middle block, averaged over positions (ours)."""
    probabilities = True

    def __init__(self, unet, channels, classes):
        super().__init__()
        self.linear = nn.Linear(unet.config["block_out_channels"][-1], len(classes))

    def forward(self, features, t):                                          # -> (B, K) logits
        return self.linear(features["mid"].mean(dim=(2, 3)))


class VectorHead(nn.Module):
    """Two layers on the middle block, averaged over positions; the paper's width is 1024."""
    probabilities = False

    def __init__(self, unet, channels):
        super().__init__()
        inner = unet.config["block_out_channels"][-1]
        width = unet.config["cross_attention_dim"]  # a vector enters as one token
        self.net = nn.Sequential(nn.Linear(inner, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, features, t):                                          # -> (B, D)
        return self.net(features["mid"].mean(dim=(2, 3)))


class Classifier(nn.Module):
    """MT-Diffusion-E: guided-diffusion's classifier on the z_0 that the U-Net's output stands for.

    It is the encoder half of ADM's U-Net with attention pooling; guided-diffusion's is 128 wide
    and 4 deep. The paper puts it on "the output". Our reading is the picture that the output and
    z_t stand for. It is z_0 + C_t / sqrt(ab_t) where the network predicts eps, and z_0 +
    sqrt(ab_t) C_t where it predicts v: C_t cannot be subtracted without knowing x.
    """
    probabilities = True

    def __init__(self, unet, channels, classes):
        super().__init__()
        import adm
        # As deep as the U-Net, and no wider than guided-diffusion's.
        width = min(128, max(32, unet.config["block_out_channels"][0] // 64 * 32))
        C = 4 * width
        size = unet.config["sample_size"]
        net = adm.UNet2D(adm.CONFIGS["adm"] | dict(
            block_out_channels=(width, 2 * width, 3 * width, C),
            layers_per_block=unet.config["layers_per_block"],
            attention_head_dim=min(width, 64), in_channels=channels, sample_size=size,
            num_class_embeds=None))
        self.width = width
        self.num_heads = C // min(width, 64)
        self.conv_in = net.conv_in
        self.time_embedding = net.time_embedding
        self.down_blocks = net.down_blocks
        self.mid_block = net.mid_block
        self.norm = nn.GroupNorm(32, C)
        self.qkv = nn.Linear(C, 3 * C)
        self.out = nn.Linear(C, len(classes))
        positions = (size // net.multiple) ** 2 + 1
        self.position = nn.Parameter(torch.randn(positions, C) / C ** 0.5)
        for module in self.modules():
            # DTR routes the U-Net, and not what reads it.
            vars(module).pop("routable_channels", None)

    def forward(self, features, t):                                          # -> (B, K) logits
        dtype = self.norm.weight.dtype
        temb = self.time_embedding(sinusoidal(t, self.width).to(dtype))
        cond = Cond(temb, None, t, None, None, None)
        x = self.conv_in(features["picture"].to(dtype), cond)
        for block in self.down_blocks:
            x = block(x, cond, [])                         # the skip connections are not used
        x = F.silu(self.norm(self.mid_block(x, cond)))
        x = x.flatten(2).transpose(1, 2)                                     # (B, L, C)
        if len(self.position) != 1 + x.shape[1]:
            raise UserError("the classifier reads only pictures of the size it was made for")
        # The query is the mean over all positions; keys and values are all of them.
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.position
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v)       # (B, heads, 1, C/heads)
        return self.out(pooled.flatten(1))


HEADS = {"image": ImageHead, "linear": LinearHead, "classifier": Classifier, "vector": VectorHead}
# The heads that suit a modality, the default first.
HEADS_OF = {"source": ("image",), "masked": ("image",), "label": ("linear", "classifier"),
            "repr": ("vector",)}


class Heads(nn.ModuleDict):
    """Hold one head per modality, in the order of E's rows, and the process that they belong to.

    modalities: name -> dict(kind=, a name in HEADS; weights=, a name in SCHEDULES, and its k=;
    options of that kind of head). channels: of z. `diffusion` tells what the network predicts.
    """

    def __init__(self, unet, modalities, channels, diffusion):
        super().__init__()
        self.channels = channels
        self.diffusion = diffusion
        schedules = []
        for name, m in modalities.items():
            options = {key: m[key] for key in m.keys() - {"kind", "weights", "k"}}
            self[name] = HEADS[m["kind"]](unet, channels, **options)
            schedules.append(SCHEDULES[m["weights"]](diffusion.alpha_bar, m["k"]))
        self.process = Aggregation(diffusion.alpha_bar, schedules)

    def forward(self, features, t):
        """Turn what the U-Net computed at z_t into {modality: its head's output}."""
        # Of z_t, not of z_t - C_t, which would give x away.
        z = features["z"][:, :self.channels]
        features["picture"], _ = self.diffusion.to_x0_eps(features["out"], z, t)
        return {name: head(features, t) for name, head in self.items()}


def add_heads(unet, modalities, channels, diffusion):
    """Give a U-Net the heads of MT-Diffusion, in place, and return it.

    Its forward then returns the prediction and {modality: output}. config.json records the heads
    under "aggregation"; add_heads(unet, **config["aggregation"], diffusion=...) makes them again.
    """
    if "aggregation" in unet.config:
        names = ", ".join(unet.config["aggregation"]["modalities"])
        raise UserError(f"this U-Net has heads already: {names}")
    heads = Heads(unet, modalities, channels, diffusion)
    # Heads always train, also beside a U-Net that is frozen.
    unet.heads = heads.to(unet.conv_out.weight).requires_grad_(True)
    unet.config["aggregation"] = dict(modalities=modalities, channels=channels)
    # With a class name of its own, no other loader opens the folder and draws wrong pictures.
    name = unet.config.get("_class_name", type(unet).__name__)
    unet.config["_class_name"] = f"Joint{name}"
    return unet


def widen_input(unet, channels):
    """MT-Diffusion-X, eps_theta(z_t, t, x): add input channels for x beside z_t, in place.

    Their weights start at zero, so the network is what it was. In pure generation x is all zeros.
    """
    conv = unet.conv_in
    extra = conv.weight.new_zeros(conv.out_channels, channels, 3, 3)
    conv.weight = nn.Parameter(torch.cat([conv.weight.detach(), extra], dim=1))
    conv.in_channels += channels
    unet.config["in_channels"] = conv.in_channels
    return unet


def reads_x(unet):
    """Whether x enters beside z_t, the paper's -X."""
    return unet.config["in_channels"] > unet.config["aggregation"]["channels"]


def prepare(model, task, modality, *, head=None, input="z", weights="vanishing", k=1.0, classes=()):
    """Attach MT-Diffusion to a U-Net that draws pictures from text, from a class or from nothing.

    head: a name in HEADS_OF[modality], by default the first. input: "z" (-U) or "x" (-X).
    classes: the names of the label's classes. A model that has these heads already stays as it is.
    UserError where the model and the modality do not go together.
    """
    unet = model.unet
    # Check everything before changing the model.
    kind = head or HEADS_OF[modality][0]
    if kind not in HEADS_OF[modality]:
        raise UserError(f"--head {head}: the heads of {task} are {', '.join(HEADS_OF[modality])}")
    if input == "x" and kind != "image":
        raise UserError(f"--input x puts a picture beside z_t, and {modality} is not a picture")
    config = dict(kind=kind, weights=weights, k=k)
    if modality == "masked":
        config["silu"] = False
    if modality == "label":
        config["classes"] = list(classes)
    if unet.heads is not None:
        # Training goes on from a model of the same kind, and from no other.
        heads = unet.config["aggregation"]["modalities"]
        if heads != {modality: config} or reads_x(unet) != (input == "x"):
            raise UserError(f"{model.path} was trained with other heads, weights or inputs, which "
                            "its unet/config.json lists under aggregation")
        return
    if unet.folder != "unet" or model.tasks not in (["t2i"], ["class"], ["uncond"]):
        raise UserError(f"{task} starts from a U-Net that draws from text, from a class or from "
                        f"nothing, and {model.path} knows {', '.join(model.tasks)}")
    if modality == "repr" and not (
            model.texts and vectors(model, [""]).shape[1] == unet.config["cross_attention_dim"]):
        raise UserError("repr enters as one token of the U-Net's cross-attention: it needs a text "
                        "encoder whose pooled state is as wide")
    # One row of the embedding per class, and one for no class.
    embedded = unet.config.get("num_class_embeds")
    if modality == "label" and not model.texts and embedded != len(classes) + 1:
        raise UserError("label enters a model on pixels by its class embedding, which this one "
                        "lacks or has for other classes: use --model scratch")
    channels = model.vae.config["latent_channels"]
    if input == "x":
        widen_input(unet, channels)
    add_heads(unet, {modality: config}, channels, model.diffusion)


# -------------------------------------------------------------------------------------------------
# Encoders x -> E(x) (B, C, h, w), without parameters of their own. A picture, in the space of z,
# is its own encoding. Everything else is read by the U-Net itself: E(x) = U-Net(0, t = 0, x).

class Known(NamedTuple):
    """What a training batch knows of one modality."""
    x: torch.Tensor     # pictures in the space of z (B, C, h, w), classes (B,), vectors (B, D)
    E: torch.Tensor     # its encoding (B, C, h, w)
    keep: torch.Tensor  # (B,) of 0 and 1: samples with 0 train as if x were not there


def predictor(net, unet, batch_x, context, added):
    """Make predict(z_t, t) -> prediction, {modality: output}, for `loss` and `sample`.

    net: the U-Net, or what wraps it. batch_x: {modality: Known}, of which -X reads x beside z_t; a
    sample that does not keep its x reads zeros. With a class embedding, z_t itself has no class.
    added: what SDXL reads besides the context, see sample.Model.added.
    """
    x_input = None
    if reads_x(unet):
        ((x, _, keep),) = batch_x.values()
        x_input = x * keep[:, None, None, None]

    def predict(z, t):
        conditions = added
        if unet.config.get("num_class_embeds"):
            # A class reaches z_t through E alone, or there would be nothing to aggregate.
            no_class = unet.config["num_class_embeds"] - 1
            conditions = dict(class_labels=torch.full((len(z),), no_class, device=z.device))
        if x_input is not None:
            z = torch.cat([z, x_input.to(z.dtype)], dim=1)
        return net(z.to(unet.conv_out.weight.dtype), t, context, added=conditions)
    return predict


@torch.no_grad()
def unet_encoding(unet, shape, context=None, added=None):
    """E(x) = U-Net(0, t = 0, x) -> (B, C, h, w), by its prediction; shape: (C, h, w).

    x enters by cross-attention as context (B, S, D), or as a class embedding by `added`. Training
    encodes with the weights of the moment, sampling with the averaged ones.
    """
    weight = unet.conv_out.weight
    B = len(added["class_labels"] if context is None else context)
    zeros = weight.new_zeros(B, unet.config["in_channels"], *shape[1:])
    context = None if context is None else context.to(weight)
    t = torch.zeros(B, device=weight.device, dtype=torch.long)
    prediction, _ = unet(zeros, t, context, added=added)
    # Only the first channels: ADM's others describe a variance.
    return prediction[:, :shape[0]].float()


def class_names(unet):
    """List the classes of the modality label of a U-Net that has its head."""
    return unet.config["aggregation"]["modalities"]["label"]["classes"]


def encode_classes(model, shape):
    """Encode all K classes -> E (K, C, h, w), whose mean over classes is 0 and mean square is 1.

    shape: (C, h, w). The U-Net reads the names of the classes or, on pixels, its class embedding.
    What it answers differs little between classes: in assets/tiny the root mean square is 0.13
    around a common part of 0.34 that carries no information, so that a label would hardly show in
    the noise of z_t. Hence the normalisation, which the paper does not mention. How strongly a
    label shows is then up to k alone. E = 0, for an unknown label, is the mean of all classes.
    """
    if model.texts:
        # A text-to-image model knows what the classes' names mean.
        context, pooled = model.encode_text(class_names(model.unet))
        factor = model.vae.factor
        added = model.added(pooled, shape[1] * factor, shape[2] * factor)
    else:
        context = None
        added = {"class_labels": torch.arange(len(class_names(model.unet)), device=model.device)}
    table = unet_encoding(model.unet, shape, context, added)
    table = table - table.mean(dim=0)
    # A new network may compute zeros for all classes, and the mean of a single class is itself.
    return table / table.square().mean().clamp(min=1e-6).sqrt()


def modality_encoder(model, modality, shape):
    """Make the function x -> E(x) for the modality of a model.

    x: pictures in the space of z, vectors (B, D), classes (B,), or probabilities (B, K), which give
    the mean of all classes' encodings.
    """
    if modality == "repr":
        return lambda x: unet_encoding(model.unet, shape, x[:, None])
    if modality != "label":
        return lambda x: x
    # Every step of sampling may change the probabilities, but never the classes.
    table = encode_classes(model, shape)
    return lambda x: table.index_select(0, x) if x.dim() == 1 else expected_encoding(table, x)


def expected_encoding(table, probabilities):
    """All classes' encodings (K, C, h, w), probabilities (B, K) -> the mean E (B, C, h, w).

    mu_t is linear in eps and in E, so their means give its mean over p(z_0, x | z_t). This is
    exact for pictures too. For repr, where a network reads the mean of x, it is an approximation.
    """
    return torch.einsum("bk,kchw->bchw", probabilities.to(table.dtype), table)


@torch.no_grad()
def vectors(model, captions):
    """Compute the representation x of pictures by their captions -> (B, D).

    It is the frozen text encoder's pooled state. The paper takes CLIP's vector of the picture,
    which lies in the same space where both towers of one CLIP are at hand.
    """
    tokenizer, encoder = model.texts[0]
    ids = tokenizer([tokenizer.expand(caption) for caption in captions])
    _, _, pooled = encoder(ids.to(model.device))
    return pooled.float()


@torch.no_grad()
def encode_batch(model, encoder, batch, shape):
    """Encode what a training batch says of the other modality -> {name: Known}; {} without heads.

    encoder: data.Encoder. shape: (C, h, w) of z_0.
    """
    if model.unet.heads is None:
        return {}
    (name,) = model.unet.heads
    if name == "label":
        x = torch.tensor(batch["x"], device=model.device)
    elif name == "repr":
        x = vectors(model, batch["x"])
    else:
        # A picture lives in the space of z_0. The head has to predict it, so it has no noise.
        x = encoder.latents(batch["x"], model.device)
    E = modality_encoder(model, name, shape)(x)
    return {name: Known(x, E, batch["keep"].to(model.device))}


# -------------------------------------------------------------------------------------------------
# Training

def divergence(head, output, x):
    """KL(q(x) || p_theta(x | z_t)) up to factors and terms without theta -> (B,) in fp32.

    Cross-entropy for classes; for a Gaussian around the output, the mean squared error.
    """
    if head.probabilities:
        return F.cross_entropy(output.float(), x, reduction="none")
    return (output.float() - x).square().flatten(1).mean(1)


def loss(heads, predict, z0, batch_x, noise, t, *, head_weight=LAMBDA, **weighting):
    """Eq. 6 by Algorithm 2 -> the loss (B,) and its terms, {"denoising" or modality: (B,)}.

    predict(z_t, t) -> prediction, {modality: output}. batch_x: {modality: Known}, one a head.
    head_weight: the paper's lambda. weighting: options of Diffusion.loss for the denoising term,
    which in y_t = z_t - C_t is DDPM's.

    A sample that does not keep its x has E = 0 and no KL; its KL term is reported as NaN.
    """
    # The paper's prose names the four terms of Eq. 2, and this is our derivation. Eq. 1 draws X at
    # each step; q(x_i) is a point mass at the example's own x_i, the same at each. We assume that
    # the x_i are independent given z_t: p(z_{t-1}, X | z_t) = p(z_{t-1} | z_t, X) prod_i p(x_i |
    # z_t). Below, p(z_{t-1} | z_t) is short for p(z_{t-1} | z_t, X).
    #
    # By Jensen's inequality -log p(z_0) is at most the mean over q of log(q / p), where q is the
    # density of all that is drawn after z_0, and p that of the same and z_0. With Eq. 1 this is
    #     -log p(z_T) + sum_t log(q(z_t | z_{t-1}, X) / p(z_{t-1} | z_t))
    #     + sum_t sum_i log(q(x_i) / p(x_i | z_t)).
    # By Bayes' rule q(z_t | z_{t-1}, X) = q(z_{t-1} | z_t, z_0, X) q(z_t | z_0, X) / q(z_{t-1} |
    # z_0, X) for t > 1. The quotients of the last two, and q(z_1 | z_0, X) at t = 1, telescope to
    # q(z_T | z_0, X). The mean of log(q / p) of one variable is a KL, so the bound is the mean of
    #     KL(q(z_T | z_0, X) || p(z_T)) + sum_{t>1} KL(q(z_{t-1} | z_t, z_0, X) || p(z_{t-1} | z_t))
    #     + sum_t sum_i KL(q(x_i) || p(x_i | z_t)) - log p(z_0 | z_1).
    # The first term has no parameters. In the second, both Gaussians have the variance s2_t and,
    # by Eq. 9, means that differ in eps alone, as p's has the A_t of the same X. So it is
    #     (1 - a_t)^2 / (2 s2_t a_t (1 - ab_t)) || eps - eps_theta ||^2.
    # The last term, for a Gaussian p around mu_1, is such a square too, since mu_1 is z_0 where
    # eps_theta is eps.
    # Eq. 6 replaces these factors by 1, and gives the KL terms the factor lambda.
    E = torch.stack([batch_x[name].E * batch_x[name].keep[:, None, None, None] for name in heads])
    # Eq. 4, as y_t + C_t: with w = 0 this is DDPM to the last bit.
    z_t = heads.diffusion.add_noise(z0, noise, t) + heads.process.aggregate(E, t)
    out, outputs = predict(z_t, t)
    total = heads.diffusion.loss(out, z0, noise, t, **weighting)
    terms = {"denoising": heads.diffusion.error(out, z0, noise, t)}
    for name, output in outputs.items():
        x, _, keep = batch_x[name]
        kl = divergence(heads[name], output, x)
        total = total + head_weight * keep * kl                                          # Eq. 6
        terms[name] = torch.where(keep > 0, kl, torch.nan)
    return total, terms


# -------------------------------------------------------------------------------------------------
# Sampling

@torch.no_grad()
def sample(heads, predict, encoders, noise, *, known=None, z0=None, steps=50, sampler="ddim",
           generators=None, callback=None):
    """Algorithm 1 -> z_0 (B, C, H, W) and {modality: x}, those that are known as they are.

    predict(z_t, t) -> prediction, {modality: output}. encoders: {modality: x -> E}. noise: of z_0's
    shape. known: {modality: x}. The others start at E = 0, and then are what their heads say: a
    picture, a representation, or probabilities (B, K). z0: the picture itself where that is known
    and the rest is inferred; z_t is then drawn from Eq. 4, always with the same noise. For -X
    without x, whose network reads zeros beside z_t, the encoder that is passed returns zeros.
    sampler: ddim, which adds no noise, or ddpm. callback(i, t, z, z0, x) sees each step.
    """
    diffusion, process = heads.diffusion, heads.process
    known = known or {}
    visited = diffusion.timesteps(steps) + [-1]
    if sampler not in ("ddim", "ddpm"):
        raise UserError(f"sampler {sampler}: several modalities are drawn by ddim or by ddpm")
    if unknown := [name for name in known if name not in heads]:
        raise UserError(f"this model was not trained on {', '.join(unknown)}; it knows "
                        f"{', '.join(heads)}")
    known_E = {name: encoders[name](x) for name, x in known.items()}
    E = torch.stack([known_E.get(name, torch.zeros_like(noise)) for name in heads])

    def noisy(t):
        mean, std = process.marginal(z0, E, t)
        return mean + std * noise

    # All samplers start from noise of variance 1, whatever timestep t comes first. By Eq. 4 the
    # mean of z_t is then near C_t, so this one adds C_t. A known picture says where z_t is exactly.
    z = process.aggregate(E, visited[0]) + noise if z0 is None else noisy(visited[0])
    for i, (t, r) in enumerate(zip(visited, visited[1:])):
        batch_t = torch.full((len(z),), t, dtype=torch.long, device=z.device)
        prediction, outputs = predict(z, batch_t)
        prediction = prediction.float()
        # Encode the heads' new estimate of what is unknown.
        x = {name: infer(heads[name], output) for name, output in outputs.items()} | known
        E = torch.stack([known_E[name] if name in known else encoders[name](x[name])
                         for name in heads])
        y = z - process.aggregate(E, batch_t)
        z0_hat, eps = diffusion.to_x0_eps(prediction, y, batch_t)
        if z0 is not None:
            # Only x is asked for: z stays on the marginal of the picture that is known.
            z, z0_hat = noisy(r), z0
        elif sampler == "ddim":
            z = process.ddim_step(z, eps, E, t, r, z0=z0_hat)
        else:
            # As diffusion.ddpm: the variance may be the posterior's, or beta, or learned.
            _, _, small, beta = process.ddpm(t, r, z)
            var = diffusion.step_variance(prediction, small, beta, z.shape[1])
            z, _ = process.posterior(z0_hat, z, E, t, r)
            if t > 0:
                z = z + var.sqrt() * randn(z.shape, generators, z.device)
        if callback is not None:
            callback(i, t, z, z0_hat, x)
    return z, x


def infer(head, output):
    """Return what a head says of x: probabilities, or the mean of its Gaussian."""
    return output.float().softmax(-1) if head.probabilities else output.float()


# -------------------------------------------------------------------------------------------------
# The demonstration

TIMES = (0, 100, 200, 300, 400, 500, 600, 800, 999)


def labelled(picture, text):
    """Enlarge a picture (1, 3, H, W) and put a line of text above it -> a Pillow picture."""
    from data import to_pil
    cell = Image.new("RGB", (128, 128 + 24), "white")
    cell.paste(to_pil(picture[0]).resize((128, 128), Image.NEAREST), (0, 24))
    ImageDraw.Draw(cell).text((6, 4), text, fill="black", font_size=14)
    return cell


def draw_process(name, process, z0, x, noise):
    """Draw the mean of z_t at TIMES, and z_t below -> two rows of pictures.

    z0, x, noise: (1, 3, H, W).
    """
    means = [labelled(x, "x")]
    samples = [labelled(torch.ones_like(x), f"w: {name}")]
    for t in TIMES:
        mean, std = process.marginal(z0, x[None], t)
        means.append(labelled(mean, f"mean at t = {t}"))
        samples.append(labelled(mean + std * noise, f"z_t, c_t = {process.c[0, t + 1]:.3f}"))
    return means + samples


def main():
    from data import builtin
    parser = Parser("Draw the forward process of one emoji in two styles, z_0 and x.")
    parser.add_argument("--out", default="samples/aggregation.png", help="where the picture goes")
    args = parser.parse_args()
    dragon = builtin("translate", "train")[585]  # one whose drawings differ in shape
    x, z0 = dragon["x"][None], dragon["target"][None]
    alpha_bar = Diffusion.from_config({}).alpha_bar
    noise = randn(z0.shape, seeded([0]))
    pictures = []
    for name, weights in SCHEDULES.items():
        pictures += draw_process(name, Aggregation(alpha_bar, [weights]), z0, x, noise)
    write_png(args.out, arrange(pictures, columns=1 + len(TIMES)))
    print(f"z_t = sqrt(ab_t) z_0 + c_t x + std_t noise, with DDPM's linear betas -> {args.out}")


if __name__ == "__main__":
    command(main)
