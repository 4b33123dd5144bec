"""MT-Diffusion: the closed forms against the chain, Gaussians and integrals; DDPM at w = 0; Eq. 6;
Algorithm 1; heads and encoders; and its tasks, as the commands train them and draw with them."""
import json
import math
from functools import partial
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import assert_mistake, call
from PIL import Image
from safetensors.torch import load_file
from torch import allclose, equal

import adm
import aggregation
import data
import emoji
import sample
import train
from aggregation import Aggregation, Known, add_heads, alphas, expected_encoding, interpolating
from aggregation import vanishing, zero
from data import ASSETS, TASKS, Encoder, builtin, to_pil
from diffusion import Diffusion, UncertaintyWeight, ddim, ddpm, seeded
from hub import UserError, write_json
from merge import merge_folders
from routing import add_routing
from sample import draw_modalities, load_model
from unet import CONFIGS, UNet

BETAS = {"linear": {}, "cosine": dict(beta_schedule="squaredcos_cap_v2"),
         "sd": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)}
SMALL = CONFIGS["tiny"] | dict(block_out_channels=(32, 64, 64), cross_attention_dim=24,
                               sample_size=8)
PIXELS = adm.CONFIGS["adm-tiny"] | dict(num_class_embeds=None)
SOURCE = dict(kind="image", weights="vanishing", k=1.0)
LABEL = dict(kind="linear", classes=["a", "b", "c"], weights="vanishing", k=1.0)
CLASSIFIER = LABEL | dict(kind="classifier")


def diffusion(betas="linear", **changes):
    config = dict(clip_sample=False, timestep_spacing="trailing")
    return Diffusion.from_config(BETAS[betas] | config | changes)


def short():
    """A schedule of few steps that ends near noise."""
    return diffusion(num_train_timesteps=40, beta_end=0.3)


def zero_snr():
    """The miniature's own schedule, whose last step is pure noise."""
    return diffusion("sd", rescale_betas_zero_snr=True, prediction_type="v_prediction")


def process(alpha_bar, M=3):
    """A process whose weights have no particular form, and are as large as beta."""
    random = torch.rand(M, len(alpha_bar), generator=seeded([0])[0]) - 0.3
    return Aggregation(alpha_bar, random * (1 - alphas(alpha_bar)[0]))


def tensors(M=3, B=4, side=3, dtype=torch.float64):
    """z_0, z_t, noise (B, 2, side, side) and E (M, B, 2, side, side), all independent."""
    z0, zt, noise, *E = torch.randn(3 + M, B, 2, side, side, generator=seeded([1])[0],
                                    dtype=torch.float64).to(dtype)
    return z0, zt, noise, torch.stack(E)


def constants(alpha_bar, t):
    """alpha_t, ab_t and ab_{t-1} in float64, by Python."""
    ab = alpha_bar[t].item()
    before = alpha_bar[t - 1].item() if t > 0 else 1.0
    return ab / before, ab, before


# ---- Eq. 3, 4, 7, 8: transition, marginal, weights ----

@pytest.mark.parametrize("betas", BETAS)
def test_the_marginal_is_the_chain_of_transitions(betas):
    d = diffusion(betas)
    p = process(d.alpha_bar)
    z0, _, _, E = tensors()
    mean = z0
    var = torch.zeros(())
    for t in range(d.T):
        mean, std = p.transition(mean, E, t)
        var = constants(d.alpha_bar, t)[0] * var + std ** 2
        if t % 111 == 0:
            closed, std = p.marginal(z0, E, t)
            assert allclose(closed, mean, atol=1e-9) and allclose(std ** 2, var, atol=1e-9)
    clean, std = p.marginal(z0, E, -1)
    assert equal(clean, z0) and std == 0


def everything(p, z0, zt, eps, E, t):
    """All that a process computes."""
    return [*p.marginal(z0, E, t), *p.transition(z0, E, t), *p.posterior(z0, zt, E, t),
            *p.posterior_from_eps(zt, eps, E, t), p.ddim_step(zt, eps, E, t, t - 1, 0.001),
            p.aggregate(E, t)]


def test_a_timestep_of_each_sample_is_its_own():
    p = process(diffusion().alpha_bar)
    z0, zt, eps, E = tensors()
    t = torch.tensor([0, 5, 400, 999])
    together = everything(p, z0, zt, eps, E, t)
    for i in range(4):
        row = slice(i, i + 1)
        alone = everything(p, z0[row], zt[row], eps[row], E[:, row], int(t[i]))
        assert all(equal(a[row], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    p = process(diffusion().alpha_bar)
    t = torch.tensor([3, 200, 600, 950])
    halves = tensors(dtype=dtype)
    full = everything(p, *[y.float() for y in halves], t)
    for a, b in zip(everything(p, *halves, t), full, strict=True):
        assert a.dtype == torch.float32 and equal(a, b)


@pytest.mark.parametrize("betas", [*BETAS, "zero terminal SNR"])
def test_named_weights_have_their_closed_coefficients(betas):
    """Where alpha_bar ends at 0, vanishing weights forget x as the process forgets z_0."""
    ab = (diffusion(betas) if betas in BETAS else zero_snr()).alpha_bar.double()
    s = ab.sqrt()
    closed = {vanishing: s * (1 - s), interpolating: 1 - s, zero: 0 * s}
    if betas not in BETAS:
        closed.pop(interpolating)
    for weights, c in closed.items():
        p = Aggregation(ab, [weights(ab, 0.7)])
        assert allclose(p.c[0, 1:], 0.7 * c, atol=1e-9) and p.c[0, 0] == 0


@pytest.mark.parametrize("betas, c", [("linear", "114 240"), ("cosine", "0 421"),
                                      ("sd", "228 347")])
def test_weights_of_order_1_drown_the_unit_noise(betas, c):
    """c_T and the largest c_t; weights may be any function of alpha_bar."""
    p = Aggregation(diffusion(betas).alpha_bar, [torch.ones_like])
    assert f"{p.c[0, -1]:.0f} {p.c.max():.0f}" == c


# ---- Eq. 5, 9: posterior, DDIM ----

@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("t", [1, 2, 37, 500, 900, 980])
def test_the_posterior_is_a_product_of_gaussians(betas, t):
    d = diffusion(betas)
    p = process(d.alpha_bar)
    z0, zt, eps, E = tensors()
    a, ab, before = constants(d.alpha_bar, t)
    A = (p.w[:, t + 1].view(3, 1, 1, 1, 1) * E).sum(0)
    C_before = (p.c[:, t].view(3, 1, 1, 1, 1) * E).sum(0)
    # Lemma 4: the prior N(m, v) of z_{t-1}, and the likelihood of z_t.
    m = math.sqrt(before) * z0 + C_before
    v = 1 - before
    precision = 1 / v + a / (1 - a)
    mu = (m / v + math.sqrt(a) * (zt - math.sqrt(a) * A) / (1 - a)) / precision
    mean, var = p.posterior(z0, zt, E, t)
    assert allclose(mean, mu, atol=1e-9) and abs(var * precision - 1) < 1e-9
    # As the derivation beside `posterior` has it.
    of_x = (1 - a) * C_before - a * (1 - before) * A
    header = math.sqrt(before) * (1 - a) * z0 + math.sqrt(a) * (1 - before) * zt + of_x
    assert allclose(mean, header / (1 - ab), atol=1e-9)
    # Remark 2: by the noise it is DDPM's mean and one more term, with no factor.
    C = math.sqrt(a) * (C_before + A)
    zt = math.sqrt(ab) * z0 + C + math.sqrt(1 - ab) * eps
    by_eps, same_var = p.posterior_from_eps(zt, eps, E, t)
    assert allclose(p.posterior(z0, zt, E, t)[0], by_eps, atol=1e-7) and equal(var, same_var)
    ddpm_mean = (zt - (1 - a) / math.sqrt(1 - ab) * eps) / math.sqrt(a)
    assert allclose(by_eps, ddpm_mean - A, atol=1e-9)


def test_posteriors_over_several_steps_compose():
    p = process(short().alpha_bar)
    z0, zt, _, E = tensors()
    mean, var = p.posterior(z0, zt, E, 30, 17)
    twice, spread = p.posterior(z0, mean, E, 17, 5)
    slope = p.posterior(z0, mean + 1, E, 17, 5)[0] - twice
    direct, total = p.posterior(z0, zt, E, 30, 5)
    assert allclose(twice, direct, atol=1e-12)
    assert allclose(spread + slope ** 2 * var, total, atol=1e-12)
    clean, var = p.posterior(z0, zt, E, 30, -1)
    assert equal(clean, z0) and var == 0


@pytest.mark.parametrize("betas", BETAS)
def test_ddim_with_the_true_noise_and_x_returns_z0(betas):
    p = process(diffusion(betas).alpha_bar)
    z0, _, eps, E = tensors(dtype=torch.float32)

    def noisy(t):
        mean, std = p.marginal(z0, E, t)
        return mean + std * eps

    for t, r in ((700, 699), (700, 300), (300, 40), (40, 0), (5, -1), (700, -1)):
        assert allclose(p.ddim_step(noisy(t), eps, E, t, r), noisy(r), atol=1e-4)


@pytest.mark.parametrize("t", [1, 60, 999])
def test_ddim_with_the_posteriors_variance_is_the_posterior(t):
    p = process(diffusion().alpha_bar)
    z0, _, eps, E = tensors()
    mean, std = p.marginal(z0, E, t)
    zt = mean + std * eps
    mean, var = p.posterior(z0, zt, E, t)
    step = partial(p.ddim_step, zt, eps, E, t, t - 1)
    assert allclose(step(var.sqrt()), mean, atol=1e-9)
    assert t < 999 or not allclose(step(), mean, atol=1e-3)


def test_appendix_d():
    """The gradient of a classifier as E, and the U-Net's difference, give the two guidances."""
    d = short()
    _, zt, eps, E = tensors(M=1)
    t, s = 20, 3.0
    a, ab, _ = constants(d.alpha_bar, t)
    plain = Aggregation(d.alpha_bar, [zero])
    mean, var = plain.posterior_from_eps(zt, eps, E, t)
    w = torch.zeros(1, d.T, dtype=torch.float64)
    w[0, t] = -s * var
    by_classifier, _ = Aggregation(d.alpha_bar, w).posterior_from_eps(zt, eps, E, t)
    assert allclose(by_classifier, mean + s * var * E[0], atol=1e-12)
    w[0, t] = s * (1 - a) / math.sqrt(a * (1 - ab))
    guided, _ = plain.posterior_from_eps(zt, eps + s * (E[0] - eps), E, t)
    classifier_free, _ = Aggregation(d.alpha_bar, w).posterior_from_eps(zt, eps, E - eps, t)
    assert allclose(classifier_free, guided, atol=1e-12)


# ---- a network, its heads, Eq. 6 ----

class Toy(nn.Module):
    """Stands for a U-Net: smooth in z, different at each t. Called as predict(z_t, t)."""

    def __init__(self):
        super().__init__()
        self.config = dict(block_out_channels=(32, 5), in_channels=2, sample_size=8,
                           layers_per_block=1)
        self.conv_norm_out = nn.GroupNorm(1, 2)
        self.conv_out = nn.Conv2d(2, 2, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, z, t):
        wave = torch.sin(t.float() / 90).view(-1, 1, 1, 1)
        h = torch.tanh(self.scale * z.roll(1, -1) - 0.2 * z + wave)
        mid = h.mean(1, keepdim=True).expand(-1, 5, -1, -1)
        return h, self.heads(dict(z=z, out=h, mid=mid, up=z), t)


def toy(d, weights="vanishing", **modalities):
    """A network that knows source and label, or the given modalities -> it and its heads."""
    modalities = modalities or dict(source=SOURCE, label=LABEL)
    modalities = {name: m | dict(weights=weights) for name, m in modalities.items()}
    net = add_heads(Toy(), modalities, 2, d)
    return net, net.heads


def toy_batch():
    """z_0, noise, t, what is known of source and label, and their E."""
    z0, _, noise, E = tensors(2, 6, side=8, dtype=torch.float32)
    x = dict(source=0.5 * z0, label=torch.arange(6) % 3)
    known = {name: Known(x[name], e, torch.ones(6)) for name, e in zip(x, E)}
    return z0, noise, torch.tensor([3, 100, 250, 500, 800, 999]), known, E


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_w_0_is_ddpms_loss_exactly(kind):
    d = diffusion(prediction_type=kind)
    net, heads = toy(d, weights="zero")
    z0, noise, t, known, _ = toy_batch()
    loss, terms = aggregation.loss(heads, net, z0, known, noise, t, head_weight=0.0)
    plain = d.error(net(d.add_noise(z0, noise, t), t)[0], z0, noise, t)
    assert equal(terms["denoising"], plain) and equal(loss, plain)


def test_the_loss_is_equation_6():
    net, heads = toy(diffusion())
    z0, noise, t, known, E = toy_batch()
    loss, terms = aggregation.loss(heads, net, z0, known, noise, t)
    mean, std = heads.process.marginal(z0, E, t)
    z = mean + std * noise
    eps, _ = net(z, t)
    source = heads["source"].conv(F.silu(heads["source"].norm(z)))
    middle = eps.mean((1, 2, 3))[:, None].expand(-1, 5)
    log_p = heads["label"].linear(middle).log_softmax(-1)
    by_hand = dict(denoising=(eps - noise).square().mean((1, 2, 3)),
                   source=(source - known["source"].x).square().mean((1, 2, 3)),
                   label=-log_p[torch.arange(6), known["label"].x])
    assert terms.keys() == by_hand.keys()
    assert all(allclose(terms[name], by_hand[name], atol=1e-5) for name in terms)
    both = by_hand["source"] + by_hand["label"]
    assert allclose(loss, by_hand["denoising"] + 0.1 * both, atol=1e-5)


def test_what_is_not_kept_is_pure_generation():
    """The starred variants: a dropped modality adds nothing to z_t, the loss and gradients."""
    d = diffusion()
    net, heads = toy(d)
    z0, noise, t, known, _ = toy_batch()
    plain = d.loss(net(d.add_noise(z0, noise, t), t)[0], z0, noise, t)
    _, whole = aggregation.loss(heads, net, z0, known, noise, t)
    rows = dict(source=[1.0, 1, 0, 0, 1, 0], label=[1.0, 0, 1, 0, 0, 0])
    partly = {name: k._replace(keep=torch.tensor(rows[name])) for name, k in known.items()}
    loss, terms = aggregation.loss(heads, net, z0, partly, noise, t)
    assert equal(loss[[3, 5]], plain[[3, 5]]) and not allclose(loss[1:3], plain[1:3], atol=1e-6)
    assert equal(terms["denoising"][0], whole["denoising"][0])
    assert all(equal(terms[name].isnan(), k.keep == 0) for name, k in partly.items())
    # Dropped from all of the batch: its head rests, and has a gradient all the same, as DDP needs.
    dropped = known | {"label": known["label"]._replace(keep=torch.zeros(6))}
    aggregation.loss(heads, net, z0, dropped, noise, t)[0].sum().backward()
    assert all(equal(q.grad, 0 * q) for q in heads["label"].parameters())
    assert all((q.grad != 0).any() for q in heads["source"].parameters())


def test_one_graph_and_bf16():
    net, heads = toy(diffusion())
    z0, noise, t, known, _ = toy_batch()

    def loss():
        return aggregation.loss(heads, net, z0, known, noise, t)[0]

    with torch.autocast("cpu", torch.bfloat16):
        half = torch.compile(loss, backend="eager", fullgraph=True)()
    assert half.dtype == torch.float32 and allclose(half, loss(), rtol=0.05)


# ---- v ----

@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_v_at_zero_terminal_snr(sampler):
    """At alpha_bar = 0 the noise says nothing of z_0, v = -z_0 does."""
    d = zero_snr()
    z0, _, noise, E = tensors(M=1, dtype=torch.float32)
    _, heads = toy(d, source=SOURCE)

    def omniscient(z, t):
        ab = d.alpha_bar[t].view(-1, 1, 1, 1)
        y = z - heads.process.aggregate(E, t)
        return d.target(z0, (y - ab.sqrt() * z0) / (1 - ab).sqrt(), t), {"source": z0}

    out, _ = aggregation.sample(heads, omniscient, {"source": lambda x: E[0]}, noise,
                                known={"source": z0}, steps=7, sampler=sampler)
    assert allclose(out, z0, atol=1e-4)


# ---- Algorithm 1 ----

@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddim", "ddim, clipped",
                                     "ddpm", "ddpm, large", "ddpm, clipped", "ddpm, learned"])
def test_w_0_draws_what_ddpm_draws(kind, sampler):
    variance = dict(large="fixed_large", learned="learned_range").get(sampler[6:], "fixed_small")
    d = diffusion(prediction_type=kind, clip_sample="clipped" in sampler, variance_type=variance)
    d.alpha_bar = d.alpha_bar.double()  # in fp32, differences of neighbours lose digits
    net, heads = toy(d, weights="zero")
    net.double()
    noise = toy_batch()[1].double()
    encoders = {name: lambda x: torch.ones_like(noise) for name in heads}

    def predict(z, t):
        out, outputs = net(z, t)
        return torch.cat([out, torch.sin(3 * z)], dim=1), outputs

    ours, x = aggregation.sample(heads, predict, encoders, noise, steps=20, sampler=sampler[:4],
                                 generators=seeded(range(6)))
    theirs = (ddim if "ddim" in sampler else ddpm)(
        d, lambda z, t: predict(z, t)[0], noise.clone(), 20, generators=seeded(range(6)))
    assert allclose(ours, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())
    assert x["label"].shape == (6, 3) and allclose(x["label"].sum(1), torch.ones(6))
    assert x["source"].shape == noise.shape


class Gaussian:
    """z_0 ~ N(m, s^2), x = rho z_0 + u, u ~ N(0, tau^2), all scalars.

    Called as predict(z_t, t), it returns the exact E[eps | z_t] and E[x | z_t], or where x is known
    E[eps | z_t, x]. It also stands for the heads.
    """
    m, s, rho, tau = 0.4, 0.5, 0.8, 0.3

    def __init__(self, d, weights, x=None):
        self.diffusion = d
        self.process = Aggregation(d.alpha_bar, [weights])
        self.x = x

    def __iter__(self):
        return iter(["x"])

    def __getitem__(self, name):
        return SimpleNamespace(probabilities=False)

    def of_z0(self, x):
        """Mean and variance of z_0 given x."""
        gain = self.rho * self.s ** 2 / (self.rho ** 2 * self.s ** 2 + self.tau ** 2)
        return self.m + gain * (x - self.rho * self.m), self.s ** 2 * (1 - gain * self.rho)

    def __call__(self, z, t):
        ab = self.diffusion.alpha_bar[t].view(-1, 1, 1, 1)
        c = self.process.c[0, t + 1].view(-1, 1, 1, 1).float()
        if self.x is not None:
            mean, var = self.of_z0(self.x)
            off = (z - ab.sqrt() * mean - c * self.x) / (ab * var + 1 - ab)
            return (1 - ab).sqrt() * off, {"x": self.x}
        signal = ab.sqrt() + c * self.rho       # z_t = signal z_0 + c u + sqrt(1 - ab) eps
        v = signal ** 2 * self.s ** 2 + c ** 2 * self.tau ** 2 + 1 - ab
        off = (z - signal * self.m) / v
        z0 = self.m + signal * self.s ** 2 * off
        return (1 - ab).sqrt() * off, {"x": self.rho * z0 + c * self.tau ** 2 * off}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("weights", [vanishing, interpolating])
def test_algorithm_1_draws_from_the_posterior_with_exact_networks(sampler, weights):
    """z_0 given x = 0.9, and if x is unknown the marginal N(0.4, 0.5^2), where x comes out too."""
    d = diffusion(num_train_timesteps=200, beta_end=0.1)
    noise = torch.randn(20_000, 1, 1, 1)
    x = torch.full_like(noise, 0.9)
    exact = Gaussian(d, weights, x)
    draw = partial(aggregation.sample, encoders={"x": lambda x: x}, noise=noise, steps=200,
                   sampler=sampler)
    z, out = draw(exact, exact, known={"x": x})
    mean, var = exact.of_z0(0.9)
    assert abs(z.mean() - mean) < 0.015 and abs(z.std() - math.sqrt(var)) < 0.03
    assert equal(out["x"], x)
    if weights is vanishing:
        exact = Gaussian(d, weights)
        z, out = draw(exact, exact)
        assert abs(z.mean() - 0.4) < 0.02 and abs(z.std() - 0.5) < 0.08
        assert abs(out["x"].mean() - 0.32) < 0.02


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_known_modalities_stay_and_are_encoded_once(sampler):
    """An unknown label is encoded by its probabilities: the mean of z_{t-1} is linear in E."""
    net, heads = toy(diffusion(clip_sample=True))
    z0, noise, _, known, E = toy_batch()
    encoded = dict(source=[], label=[])
    encoders = {"source": lambda x: encoded["source"].append(x) or 0.9 * x,
                "label": lambda x: encoded["label"].append(x) or (
                    E[0] if x.dim() == 1 else expected_encoding(E[1, :3], x))}
    draw = partial(aggregation.sample, heads, net, encoders, noise, steps=5, sampler=sampler)
    for names in ([], ["source"], ["label"], ["source", "label"]):
        steps = []
        encoded.update(source=[], label=[])
        _, out = draw(known={name: known[name].x.clone() for name in names},
                      callback=lambda i, t, z, z0, x: steps.append(x))
        assert list(out) == ["source", "label"] and len(steps) == 5
        for name in out:
            assert len(encoded[name]) == (1 if name in names else 5)
            stays = all(equal(x[name], known[name].x) for x in [*steps, out])
            assert stays if name in names else not equal(steps[0][name], steps[-1][name])
        if not names:
            with torch.no_grad():
                _, outputs = net(noise, torch.full((6,), 999))
            assert equal(encoded["label"][0], outputs["label"].softmax(-1))
            assert encoded["label"][0].max() < 0.99
    table = torch.randn(3, 2, 8, 8)
    one_hot = F.one_hot(torch.tensor([2, 0]), 3)
    assert allclose(expected_encoding(table, one_hot), table[[2, 0]], atol=1e-6)
    mean = expected_encoding(table, torch.full((1, 3), 1 / 3))
    assert allclose(mean[0], table.mean(0), atol=1e-6)


def test_with_the_picture_known_every_step_is_on_its_marginal():
    net, heads = toy(diffusion())
    z0, noise, _, known, E = toy_batch()
    states = []
    drawn, x = aggregation.sample(
        heads, net, {"source": lambda x: x, "label": lambda x: E[1]}, noise,
        known={"label": known["label"].x}, z0=z0, steps=4,
        callback=lambda i, t, z, z0, x: states.append((max(t - 250, -1), z, x["source"])))
    for r, z, source in states:
        mean, std = heads.process.marginal(z0, torch.stack([source, E[1]]), r)
        assert allclose(z, mean + std * noise, atol=1e-5)
    assert [r for r, _, _ in states] == [749, 499, 249, -1]
    assert equal(drawn, z0) and equal(x["label"], known["label"].x)


# ---- heads, encoders, folders ----

@pytest.mark.parametrize("make, context", [
    (lambda: UNet(SMALL), torch.zeros(2, 7, 24)),
    (lambda: adm.UNet2D(PIXELS | dict(sample_size=8)), None)])
def test_heads_on_real_networks(make, context):
    unet = make().requires_grad_(False)
    C = unet.config["in_channels"]
    modalities = dict(source=SOURCE, masked=SOURCE | dict(silu=False), m=LABEL, e=CLASSIFIER)
    if context is not None:     # a vector enters by cross-attention
        modalities["repr"] = dict(kind="vector", weights="zero", k=1.0)
    heads = add_heads(unet, modalities, C, diffusion()).heads
    seen = []
    heads.register_forward_pre_hook(lambda module, inputs: seen.append(dict(inputs[0])))
    z = torch.randn(2, C, 8, 8)
    t = torch.tensor([5, 900])
    out, y = unet(z, t, context)
    features = seen[0]
    shapes = {name: tuple(value.shape) for name, value in y.items()}
    picture = (2, C, 8, 8)
    vector = {} if context is None else dict(repr=(2, 24))
    assert shapes == dict(source=picture, masked=picture, m=(2, 3), e=(2, 3), **vector)
    assert equal(y["source"], out[:, :C])  # a copy of the output block starts as it
    assert equal(y["masked"], unet.conv_out(unet.conv_norm_out(features["up"]))[:, :C])
    if context is not None:
        one, _, two = heads["repr"].net
        assert equal(y["repr"], two(one(features["mid"].mean((2, 3))).relu()))
    sum(value.sum() for value in y.values()).backward()  # of a frozen network too, all heads train
    assert all(q.grad is not None for q in heads.parameters())
    moved = heads(features | dict(z=z.roll(1, 0)), t)
    assert equal(moved["m"], y["m"]) and not allclose(moved["e"], y["e"], atol=1e-5)
    heads(features, t)  # which adds the picture
    assert equal(heads["e"](features, t), y["e"])
    assert not allclose(heads["e"](features, t + 50), y["e"], atol=1e-6)
    with pytest.raises(UserError, match="size"):
        heads["e"]({"picture": torch.randn(2, C, 16, 16)}, t)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_classifier_sees_the_picture_that_the_output_stands_for(kind):
    """Of z_t, which is known, and not of z_t - C_t, which would tell x."""
    d = diffusion(prediction_type=kind)
    net, heads = toy(d, e=CLASSIFIER)
    seen = []
    heads["e"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    z, _, t, _, _ = toy_batch()
    out, _ = net(z, t)
    heads(dict(z=torch.cat([z, z + 1], dim=1), out=out), t)  # what is beside z_t is no part of it
    picture, _ = d.to_x0_eps(out, z, t)
    for features, at in seen:
        assert allclose(features["picture"], picture, rtol=1e-5, atol=1e-5) and equal(at, t)


def test_the_classifiers_pooling_is_attention_of_the_mean():
    head = add_heads(UNet(SMALL), {"e": CLASSIFIER}, 4, diffusion()).heads["e"]
    seen = []
    head.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y = head({"picture": torch.randn(2, 4, 8, 8)}, torch.tensor([0, 500]))
    x = F.silu(seen[0]).flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + head.position
    parts = []
    for q, k, v in zip(*(part.split(32, -1) for part in head.qkv(x).chunk(3, -1))):  # each head
        weights = (q[:, :1] @ k.transpose(1, 2) / math.sqrt(32)).softmax(-1)
        parts.append(weights @ v)
    assert len(parts) == 4 and allclose(y, head.out(torch.cat(parts, -1)[:, 0]), atol=1e-5)


def with_unet(unet, folder):
    """A model folder that has this U-Net, and the rest from the miniature."""
    unet.save_pretrained(folder / "unet")
    write_json(folder / "model_index.json", {"base": str(ASSETS / "tiny")})
    return folder


@pytest.mark.parametrize("modality", [
    7, SOURCE | dict(kind="mask"), SOURCE | dict(classes=["a"]), SOURCE | dict(weights="ones"),
    SOURCE | dict(k="large"), dict(kind="linear", weights="zero", k=1.0), dict(kind="image")])
def test_a_folder_whose_heads_mean_nothing_is_refused(modality, tmp_path):
    unet = UNet.from_pretrained(ASSETS / "tiny")
    unet.config |= dict(_class_name="JointUNet", aggregation=dict(modalities={"y": modality},
                                                                  channels=4))
    with pytest.raises(UserError, match="config.json"):
        load_model(with_unet(unet, tmp_path))


def test_a_widened_network_is_what_it_was_and_learns_x():
    unet = UNet(SMALL).eval()
    z, x = torch.randn(2, 2, 4, 8, 8)
    conditions = torch.tensor([1, 900]), torch.randn(2, 7, 24)
    before = unet(z, *conditions)
    aggregation.widen_input(unet, 4)
    out = unet(torch.cat([z, x], dim=1), *conditions)
    assert unet.config["in_channels"] == 8 and allclose(out, before, atol=1e-6)
    out.square().sum().backward()
    assert (unet.conv_in.weight.grad[:, 4:] != 0).any()


def test_bad_arguments_are_refused():
    ab = diffusion().alpha_bar
    net, heads = toy(diffusion())
    _, noise, _, _, E = toy_batch()
    for alpha_bar, weights in ((ab, []), (ab, [torch.zeros(3)]), (ab, [[math.nan] * 1000]),
                               (ab, torch.zeros(1000)), (zero_snr().alpha_bar, [interpolating])):
        with pytest.raises(UserError, match="finite numbers"):
            Aggregation(alpha_bar, weights)
    for numbers in (ab.flip(0), torch.ones(3), [0.5, -0.1], [0.5, math.nan]):
        with pytest.raises(UserError, match="decrease"):
            Aggregation(numbers, [torch.zeros(len(numbers))])
    for bad in (E[:1], E[0]):
        with pytest.raises(ValueError, match="M = 2"):
            heads.process.marginal(noise, bad, 3)
    for t in (1000, torch.tensor([0, 1, 2, 3, 4, -2])):
        with pytest.raises((IndexError, RuntimeError)):
            heads.process.marginal(noise, E, t)
    for options, words in ((dict(known={"mask": noise}), "mask"), (dict(sampler="euler"), "euler"),
                           (dict(steps=0), "steps")):
        with pytest.raises(UserError, match=words):
            aggregation.sample(heads, net, {}, noise, **options)


def test_the_demonstration(tmp_path):
    done = call("aggregation.py", "--out", tmp_path / "new" / "a.png")
    assert done.returncode == 0 and "a.png" in done.stdout, done.stderr
    picture = np.asarray(Image.open(tmp_path / "new" / "a.png").convert("L")).astype(float)
    # Six rows of ten pictures, each with black text on white above it.
    cells = picture.reshape(6, 152, 10, 128).swapaxes(1, 2)
    assert (cells[:, :, :24].min((2, 3)) < 60).all() and np.median(cells[:, :, :24]) == 255
    # The mean at T: nothing, nothing, x.
    plain, small, large = cells[::2, -1, 24:]
    assert abs(plain - 128).max() < 4 and abs(small - 128).max() < 6 and large.std() > 30
    assert_mistake(call("aggregation.py", "--out", tmp_path), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


# ---- the tasks: training ----

QUICK = ["--batch-size", "4", "--eval-size", "1", "--sample-every", "0", "--save-every", "1",
         "--log-every", "1", "--warmup", "1", "--lr-schedule", "constant"]


def run(out, *arguments):
    done = call("train.py", *QUICK, "--out", out, *arguments)
    assert done.returncode == 0, done.stderr


def attached(task, head=None, input="z", base=ASSETS / "tiny"):
    """A model of a task, its weights no longer zeros or copies. base: a folder, or "pixels"."""
    torch.manual_seed(0)
    if base == "pixels":
        config = PIXELS | dict(num_class_embeds=11 if task == "label" else None)
        model = sample.Model(adm.UNet2D(config), adm.Pixels(32), None, None,
                             adm.scheduler_for(config), {})
    else:
        model = load_model(base)
    aggregation.prepare(model, task, TASKS[task].modality, head=head, input=input,
                        classes=emoji.classes())
    with torch.no_grad():
        for p in model.unet.heads.parameters():
            p += 0.02 * torch.randn_like(p)
        if input == "x":
            model.unet.conv_in.weight[:, model.vae.config["latent_channels"]:].normal_(std=0.1)
    model.index = sample.pipeline_index(model)
    return model


@pytest.fixture(scope="module")
def models():
    return {task: attached(task) for task in ("translate", "label", "repr")}


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A folder of -X on pixels, with ADM's learned variance."""
    folder = tmp_path_factory.mktemp("pixels")
    attached("masked", input="x", base="pixels").save(folder)
    return folder


def batch_of(model, count=4, drop=0.0):
    """Examples as a training step has them."""
    (task,) = model.tasks
    side = model.unet.config["sample_size"]
    examples = data.Examples({task: builtin(task, "train", model.native_size)}, [task],
                             batch_size=count, seed=0, num_timesteps=1000, drop=(0.0, 0.0, drop),
                             latent_shape=(model.vae.config["latent_channels"], side, side))
    return [examples[k] for k in range(count)]


def step(model, examples, **options):
    """What a training step computes -> loss, terms, z_0, what is known of the modality."""
    batch = data.collate(examples)
    encoder = Encoder(model.vae)
    z0, _ = encoder(batch, "cpu")
    known = aggregation.encode_batch(model, encoder, batch, z0.shape[1:])
    context, added = train.text_encoding(model)(batch["prompt"])
    predict = aggregation.predictor(model.unet, model.unet, known, context, added)
    loss, terms = aggregation.loss(model.unet.heads, predict, z0, known, batch["noise"],
                                   batch["t"], **options)
    return loss, terms, z0, known[TASKS[model.tasks[0]].modality]


@pytest.mark.slow
def test_resuming_is_exact_and_heads_train(tmp_path):
    """In bf16 too, where classes are encoded under autocast."""
    a, b = (tmp_path / name for name in "ab")
    file = "unet/diffusion_pytorch_model.safetensors"
    options = ["--task", "label", "--precision", "bf16", "--drop", 0.5, "--k", 0.5,
               "--eval-every", 1]
    run(a, *options, "--steps", 2)
    run(b, *options, "--steps", 1)
    start = load_file(b / file)
    run(b, *options, "--steps", 2)
    whole, resumed = load_file(a / file), load_file(b / file)
    assert all(equal(whole[key], resumed[key]) for key in whole)
    changed = {key for key in whole if not equal(whole[key], start[key])}
    assert changed.issuperset({"conv_in.weight", *(k for k in whole if k.startswith("heads."))})
    assert load_model(a).unet.config["aggregation"]["modalities"]["label"]["k"] == 0.5
    log = (a / "log.jsonl").read_text()
    held_out = []
    for row in map(json.loads, log.splitlines()):
        assert row.get("held_out", row.get("loss_by_t")).keys() == {"label", "label head"}
        assert "label" in row.get("loss", ["label"])
        held_out += row.get("held_out", {}).values()
    assert len(held_out) == 4 and np.isfinite(held_out).all()
    done = call("train.py", *QUICK, "--out", a, *options, "--steps", 2, "--schedule", "zero")
    assert_mistake(done, "--schedule was 'vanishing' and is now 'zero'")
    assert (a / "log.jsonl").read_text() == log


def test_the_loss_is_that_of_a_batch_made_by_hand(models):
    """From pictures to Eq. 6: latents, z_t = sqrt(ab) z_0 + c_t x + sqrt(1 - ab) noise, one forward
    pass, v of y_t and x."""
    model = models["translate"]
    examples = batch_of(model)
    batch = data.collate(examples)
    t, noise = batch["t"], batch["noise"]
    ab = model.diffusion.alpha_bar[t].view(-1, 1, 1, 1)
    scale = model.vae.config["scaling_factor"]
    with torch.no_grad():
        loss, terms, _, _ = step(model, examples, head_weight=0.3)
        p2, uw = (step(model, examples, head_weight=0.3, **options)[0] for options in
                  (dict(weighting="p2"), dict(uncertainty=UncertaintyWeight(1000))))
        mean, logvar = model.vae.encode(torch.stack(batch["target"]))
        z0 = scale * (mean + (logvar / 2).exp() * batch["latent_noise"])
        x = scale * model.vae.encode(torch.stack(batch["x"]))[0]
        z = ab.sqrt() * z0 + ab.sqrt() * (1 - ab.sqrt()) * x + (1 - ab).sqrt() * noise
        v, outputs = model.unet(z, t, model.encode_text([""] * 4)[0])
    denoising = (v - (ab.sqrt() * noise - (1 - ab).sqrt() * z0)).square().mean((1, 2, 3))
    head = (outputs["source"] - x).square().mean((1, 2, 3))
    parts = [part for _, part in train.held_out_terms(model, examples, 3)]
    held_out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for ours, by_hand in ((terms["denoising"], denoising), (terms["source"], head),
                          (loss, denoising + 0.3 * head), (uw, denoising / 2 + 0.3 * head),
                          (p2, denoising * model.diffusion.weight(t, "p2") + 0.3 * head),
                          (held_out["denoising"], denoising), (held_out["source"], head)):
        assert np.allclose(ours, by_hand, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("task, input, base", [
    ("label", "z", ASSETS / "tiny"), ("masked", "x", ASSETS / "tiny"), ("masked", "x", "pixels")])
def test_what_is_dropped_is_pure_generation_and_all_parameters_get_a_gradient(task, input, base):
    """On pixels too, where the loss has a term for the learned variance."""
    model = attached(task, input=input, base=base)
    d = model.diffusion
    examples = batch_of(model, drop=1.0)
    loss, terms, z0, known = step(model, examples)
    assert known.keep.tolist() == [0.0] * 4 and terms[task].isnan().all()
    loss.sum().backward()
    assert all(p.grad is not None for p in model.unet.parameters())
    assert all((p.grad == 0).all() for p in model.unet.heads.parameters())
    batch = data.collate(examples)
    z = d.add_noise(z0, batch["noise"], batch["t"])
    if input == "x":
        z = torch.cat([z, torch.zeros_like(z)], dim=1)
    context, _ = model.encode_text([""] * 4)
    with torch.no_grad():
        out, _ = model.unet(z, batch["t"], context)
        _, given, _, _ = step(model, batch_of(model))
    error = d.error(out, z0, batch["noise"], batch["t"])
    plain = d.loss(out, z0, batch["noise"], batch["t"])
    assert allclose(loss, plain, atol=1e-4) and allclose(terms["denoising"], error, atol=1e-4)
    assert allclose(plain, error) == (base != "pixels")
    assert given[task].isfinite().all() and not allclose(given["denoising"], error, atol=1e-4)


@pytest.mark.parametrize("task", train.JOINT)
def test_drop_rates(task):
    examples = data.Examples({}, [], batch_size=4, seed=0, num_timesteps=1000,
                             latent_shape=(4, 16, 16), drop=(0.0, 0.0, 0.25))
    example = dict(prompt="", target=None, x=1)
    draws = [examples.make_sample(example, task, dropout=r / 400, t=0, noise_seed=0)["keep"]
             for r in range(400)]
    assert draws.count(0.0) == 100
    assert TASKS[task].drop == (0.0, 0.0, 0.0 if task == "translate" else 0.1)


@pytest.mark.parametrize("base", [ASSETS / "tiny", "pixels"])
def test_classes_are_encoded_by_name_or_embedding_and_normalised_over_all_of_them(base):
    """On pixels z_t meets the last row of the embedding, a class its own."""
    model = attached("label", base=base)
    seen = []
    model.unet.register_forward_pre_hook(
        lambda module, inputs, more: seen.append((inputs[2:], more)), with_kwargs=True)
    examples = [dict(example, x=k) for example, k in zip(batch_of(model), (3, 5, 3, 3))]
    E = step(model, examples)[3].E
    (context, encoding), (_, denoising) = seen
    if base == "pixels":
        assert encoding["added"]["class_labels"].tolist() == list(range(10))
        assert denoising["added"]["class_labels"].tolist() == [10] * 4
        inputs, added = (torch.zeros(10, 3, 32, 32), 0, None), dict(class_labels=torch.arange(10))
    else:
        names, _ = model.encode_text(emoji.classes())
        assert equal(context[0], names)
        inputs, added = (torch.zeros(10, 4, 16, 16), 0, names), None
    with torch.no_grad():
        raw = model.unet(*inputs, added=added)[0][:, :E.shape[1]].double()  # without variances
    # The variance over classes, averaged over channels and positions, is 1.
    expected = (raw - raw.mean(0)) / raw.var(0, unbiased=False).mean().sqrt()
    assert not E.requires_grad and equal(E[0], E[2]) and equal(E[0], E[3])
    assert allclose(E[:2].double(), expected[[3, 5]], atol=1e-3)

    table = aggregation.encode_classes(model, E.shape[1:])
    assert table.mean(0).abs().max() < 1e-5 and abs(table.square().mean() - 1) < 1e-5
    # A class has the same encoding in every batch and in drawing, to the last bit.
    assert equal(E[:2], table[[3, 5]]) and equal(E[1], step(model, examples[1:2])[3].E[0])
    encode = aggregation.modality_encoder(model, "label", E.shape[1:])
    assert allclose(encode(torch.tensor([3, 5])), E[:2])
    assert encode(torch.full((1, 10), 0.1)).abs().max() < 1e-5  # an unknown label: E = 0
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(3)
        model.unet.conv_out.bias.mul_(3).add_(1)
        assert allclose(aggregation.encode_classes(model, E.shape[1:]), table, atol=1e-3)
        # A new network, whose output says nothing: rounding is not blown up to a label.
        model.unet.conv_out.weight.zero_()
        assert aggregation.encode_classes(model, E.shape[1:]).abs().max() < 1e-3


def test_a_single_class_is_aggregated_as_nothing():
    model = load_model(ASSETS / "tiny")
    aggregation.prepare(model, "label", "label", classes=["fruit"])
    model.index = sample.pipeline_index(model)
    assert (aggregation.encode_classes(model, (4, 16, 16)) == 0).all()


def test_a_model_on_pixels_needs_an_embedding_of_these_classes(tmp_path):
    attached("label", base="pixels").save(tmp_path)
    path = tmp_path / "unet" / "config.json"
    write_json(path, json.loads(path.read_text()) | dict(num_class_embeds=12))
    with pytest.raises(UserError, match="class_embedding"):
        load_model(tmp_path)
    plain = sample.Model(adm.UNet2D(PIXELS), adm.Pixels(32), None, None, adm.SCHEDULER, {})
    with pytest.raises(UserError, match="class embedding"):
        aggregation.prepare(plain, "label", "label", classes=emoji.classes())


def test_a_representation_is_the_captions_vector_encoded_as_one_token(models):
    model = models["repr"]
    examples = batch_of(model, count=2)
    captions = [example["x"] for example in examples]
    with torch.no_grad():
        known = step(model, examples)[3]
        pooled = model.text_encoder(model.tokenizer(captions))[2]
        E, _ = model.unet(torch.zeros(2, 4, 16, 16), 0, pooled[:, None])
    assert allclose(known.x, pooled, atol=1e-5) and allclose(known.E, E, atol=1e-4)
    assert all("style" in words for words in captions) and captions[0] != captions[1]
    drawn, other = (
        draw_modalities(model, 1, {"repr": sample.read_given(model, f"repr={words}", 64, 64)[0]
                                   ["repr"][None]}, steps=3)
        for words in ("red apple", "blue book"))
    assert (drawn["image"] - other["image"]).abs().mean() > 1e-3
    assert equal(drawn["repr"], aggregation.vectors(model, ["red apple"]))
    # A word that textual inversion has learned means the same here as in a prompt.
    expand = model.tokenizer.expand
    model.tokenizer.expand = lambda text: expand(text.replace("<fruit>", "red apple"))
    assert equal(aggregation.vectors(model, ["<fruit>"]), drawn["repr"])
    del model.tokenizer.expand


def test_a_larger_model_sees_the_emoji_enlarged():
    model = load_model(ASSETS / "tiny")
    model.unet.config["sample_size"] = 32
    aggregation.prepare(model, "repr", "repr")
    examples = batch_of(model, count=1)
    assert examples[0]["target"].shape == (3, 128, 128)
    assert step(model, examples)[2].shape == (1, 4, 32, 32)
    assert draw_modalities(model, 1, steps=1)["image"].shape == (1, 3, 128, 128)


# ---- the tasks: drawing ----

def test_known_pictures_stay_exactly_as_given(models):
    draw = partial(draw_modalities, models["translate"], steps=2)
    pairs = builtin("translate", "heldout")
    source, target = (torch.stack([pairs[i][key] for i in (3, 30)]) for key in ("x", "target"))
    out = draw(2, {"source": source})
    assert list(out) == ["image", "source"] and equal(out["source"], source)
    back, other = (draw(2, {"image": image}) for image in (target, target.flip(0)))
    assert equal(back["image"], target)
    assert (back["source"] - other["source"]).abs().mean() > 0.01
    free = draw(2)
    assert (free["image"] - out["image"]).abs().mean() > 1e-3
    assert (free["source"] - source).abs().mean() > 0.05
    again = draw(1, {"source": source[1:]}, seed=1)  # a sample does not depend on its batch
    assert (again["image"] - out["image"][1:]).abs().max() < 0.02
    pictures = sample.generate(models["translate"], "translate", ["", ""], steps=2)
    assert pictures == [to_pil(picture) for picture in free["image"]]


def test_what_is_known_enters_beside_z_t_and_zeros_where_it_is_not(pixels, monkeypatch):
    """-X without x is pure generation, as in training: no E either, and no x drawn."""
    model = load_model(pixels)
    example = builtin("masked", "heldout", 32)[9]
    x = example["x"]
    seen = []
    model.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0, 3:]))
    aggregated = []
    aggregate = Aggregation.aggregate
    monkeypatch.setattr(Aggregation, "aggregate",
                        lambda *inputs: aggregated.append(aggregate(*inputs)) or aggregated[-1])
    for known, beside, names in (({"masked": x[None]}, x, ["image", "masked"]),
                                 ({}, torch.zeros_like(x), ["image"])):
        seen.clear()
        aggregated.clear()
        assert list(draw_modalities(model, 1, known, steps=2)) == names
        assert len(seen) == 2 and all(equal(y, beside) for y in seen)
        assert any(C.any() for C in aggregated) == bool(known)
    with pytest.raises(UserError, match="beside z_t"):
        draw_modalities(model, 1, {"image": example["target"][None]}, steps=2)


@pytest.mark.parametrize("base", [ASSETS / "tiny", "pixels"])
def test_a_picture_is_classified_and_a_class_is_drawn(base):
    model = attached("label", base=base)
    image = builtin("label", "heldout", model.native_size)[5]["target"].expand(2, -1, -1, -1)
    found = draw_modalities(model, 2, {"image": image}, steps=2)["label"]
    assert found.shape == (2, 10) and allclose(found.sum(1), torch.ones(2))
    flags, fruit = (draw_modalities(model, 1, {"label": torch.tensor([k])}, steps=3)
                    for k in (3, 4))
    assert flags["label"].tolist() == [3]
    assert (flags["image"] - fruit["image"]).abs().mean() > 1e-4


@pytest.mark.parametrize("task, rows", [("translate", 5), ("masked", 4), ("label", 3), ("repr", 3)])
def test_a_grid_shows_pure_generation_what_x_gives_and_the_truth(models, pixels, task, rows,
                                                                 tmp_path, monkeypatch):
    """Interpolating weights need x, and there pure generation is left out."""
    model = models.get(task) or load_model(pixels)
    modality = TASKS[task].modality
    side = model.native_size
    dataset = builtin(task, "heldout", side)
    x = [dataset[(2 * i + 1) * len(dataset) // 4]["x"] for i in range(2)]
    make = dict(label=torch.tensor, repr=partial(aggregation.vectors, model))
    seen = []
    monkeypatch.setattr(sample, "draw_modalities", lambda model, count, known, seed: seen.append(
        known) or draw_modalities(model, count, known, seed=seed, steps=1))
    sample.sample_grid(model, {task: dataset}, 2, 0, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (2 * side, rows * side)
    config = model.unet.config["aggregation"]["modalities"][modality]
    monkeypatch.setitem(config, "weights", "interpolating")
    sample.sample_grid(model, {task: dataset}, 2, 0, tmp_path / "grid.png")
    assert [list(known) for known in seen] == [[], [modality], [modality]]
    assert all(equal(known[modality], make.get(task, torch.stack)(x)) for known in seen[1:])
    for known in ({}, {"image": torch.zeros(1, 3, side, side)}):
        with pytest.raises(UserError, match=f"--given {modality}"):
            draw_modalities(model, 1, known, steps=2)


def draw(task, model, out, *words, given=()):
    given = [word for value in given for word in ("--given", value)]
    return call("sample.py", "--task", task, "--model", model, "--steps", 2, "--out", out, *words,
                *given)


def transparent(path, size=32):
    """Save a held-out picture whose patches are transparent, in the left half only in part."""
    example = builtin("masked", "heldout", size)[200]
    hidden = (example["x"] == 0).all(0).numpy()
    alpha = np.where(hidden, 0, 255).astype(np.uint8)
    alpha[:, :size // 2][hidden[:, :size // 2]] = 254
    picture = to_pil(example["target"])
    picture.putalpha(Image.fromarray(alpha))
    picture.save(path)


def test_restoring_on_pixels_keeps_the_others_exactly(pixels, tmp_path):
    transparent(tmp_path / "in.png")
    done = draw("masked", pixels, tmp_path / "out.png", "--num-images", 2,
                given=[f"masked={tmp_path / 'in.png'}"])
    assert done.returncode == 0, done.stderr
    given, written = (np.asarray(Image.open(tmp_path / name)) for name in ("in.png", "out.png"))
    opaque = given[..., 3] == 255
    assert all(0 < (~half).sum() < 512 for half in (opaque[:, :16], opaque[:, 16:]))
    assert (written[:32] != written[32:]).any()
    for row in (written[:32], written[32:]):  # the bytes of both files
        restored, x = row[:, :32], row[:, 32:]
        assert (restored[opaque] == given[opaque, :3]).all()
        assert (x[opaque] == given[opaque, :3]).all() and (x[~opaque] == 128).all()
        assert (restored != given[..., :3]).any(-1)[~opaque].mean() > 0.9


def test_folders_are_rebuilt_and_other_loaders_refuse_them(pixels, tmp_path):
    routed = with_unet(add_routing(UNet.from_pretrained(ASSETS / "tiny")), tmp_path / "routed")
    for name, model in (("x", attached("masked", input="x")),
                        ("e", attached("label", "classifier", base=routed))):
        model.save(tmp_path / name)
        again = load_model(tmp_path / name)
        assert again.unet.config["aggregation"] == model.unet.config["aggregation"]
        assert again.tasks == model.tasks and aggregation.reads_x(again.unet) == (name == "x")
        assert ("routing" in again.unet.config) == (name == "e")
        inputs = (torch.randn(2, again.unet.config["in_channels"], 16, 16), torch.tensor([3, 900]),
                  torch.randn(2, 7, 128))
        (out, a), (same, b) = model.unet(*inputs), again.unet(*inputs)
        assert equal(out, same) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
        with pytest.raises(Exception, match="Joint|Routed"):
            diffusers.DiffusionPipeline.from_pretrained(tmp_path / name)
        with pytest.raises(UserError, match="Joint"):
            UNet.from_pretrained(tmp_path / name)
        with pytest.raises(UserError, match="already"):
            add_heads(again.unet, {"source": SOURCE}, 4, diffusion())
    merge_folders(tmp_path / "x", [tmp_path / "x"], [0.5], tmp_path / "merged")
    assert load_model(tmp_path / "merged").tasks == load_model(pixels).tasks == ["masked"]
    with pytest.raises(Exception, match="Joint"):
        diffusers.DDPMPipeline.from_pretrained(pixels)


def test_a_folder_keeps_the_order_and_the_weights_of_its_modalities(tmp_path):
    modalities = dict(label=LABEL, source=SOURCE | dict(weights="interpolating", k=0.5))
    d = diffusion()
    unet = add_heads(UNet.from_pretrained(ASSETS / "tiny"), modalities, 4, d)
    write_json(with_unet(unet, tmp_path) / "scheduler" / "scheduler_config.json", d.config)
    again = load_model(tmp_path).unet
    assert again.config["aggregation"] == dict(modalities=modalities, channels=4)
    rows = torch.stack([vanishing(d.alpha_bar), interpolating(d.alpha_bar, 0.5)])
    assert list(again.heads) == ["label", "source"] and equal(again.heads.process.w[:, 1:], rows)


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for task, model in models.items():
        model.save(folder / task)
    return folder


def test_the_command_draws_all_modalities_and_describes_them(folders, tmp_path, monkeypatch):
    out = tmp_path / "out.png"
    monkeypatch.setattr(sample, "BATCH", 2)  # the third sample is a batch of its own
    example = ASSETS / "examples/sr.png"
    done = draw("translate", folders / "translate", out, "--num-images", 3,
                given=[f"source={example}"])
    assert done.returncode == 0 and "image, source; given: source=" in done.stdout, done.stderr
    shown = data.on_white(data.open_image(example)).resize((64, 64), Image.BICUBIC)
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (192, 128, 3) and (drawn[128:, 64:] == np.asarray(shown)).all()
    assert draw("translate", folders / "translate", out, "--seed", 2,
                given=[f"source={example}"]).returncode == 0
    alone = np.asarray(Image.open(out), dtype=int)[:, :64]
    assert np.abs(alone - drawn[128:, :64]).max() <= 3  # its seed is 2
    edit = f"image={ASSETS / 'examples/edit.png'}"
    first, _ = draw("label", folders / "label", out, given=[edit]).stdout.splitlines()
    best = {words.rpartition(" ")[0] for words in first.split(", ")}
    assert len(best) == 3 and best <= {*emoji.classes()} and Image.open(out).size == (64, 64)
    done = draw("label", folders / "label", out, given=["label=food & drink"])
    assert done.returncode == 0 and "given: label=food & drink" in done.stdout, done.stderr
    done = draw("repr", folders / "repr", out)
    assert "nearest held-out caption: '" in done.stdout, done.stderr


@pytest.mark.parametrize("task, name, number, known, steps", [
    ("label", "heads.label", math.nan, {"image": torch.zeros(1, 3, 64, 64)}, 1),
    ("translate", "heads.source", math.nan, {}, 1),
    ("label", "conv_out", 0.0, {"label": torch.tensor([0])}, 2)])
def test_weights_that_say_nothing_are_named(task, name, number, known, steps):
    """Those of a head too, whose word is the label, or becomes a part of z_t."""
    model = attached(task)
    for weight in model.unet.get_submodule(name).parameters():
        weight.data.fill_(number)
    with pytest.raises(UserError, match="the unet of .*tiny computes"):
        draw_modalities(model, 1, known, steps=steps)


@pytest.mark.parametrize("task, model, given, words", [
    ("label", "label", ["label=cats"], "the classes are activities"),
    ("label", "label", [f"source={ASSETS}/examples/sr.png"], "image or label"),
    ("label", "label", ["label=flags", "label=symbols"], "NAME=VALUE once"),
    ("label", "label", ["label=flags", f"image={ASSETS}/examples/sr.png"], "nothing is left"),
    ("label", "label", ["label="], "NAME=VALUE"),
    ("translate", "translate", ["source=nothing.png"], "nothing.png"),
    ("translate", "translate", ["image={}/cut.png"], "cut.png"),
    ("label", "translate", [], "'label'; it knows translate"),
    ("t2i", "translate", ["label=flags"], "--given would do nothing"),
    ("t2i", "translate", [], "it knows translate")])
def test_a_mistake_in_what_is_given_is_one_line(folders, tmp_path, task, model, given, words):
    (tmp_path / "cut.png").write_bytes((ASSETS / "examples/edit.png").read_bytes()[:100])
    out = tmp_path / "out.png"
    out.write_bytes(b"before")
    given = [word.format(tmp_path) for word in given]
    assert_mistake(draw(task, folders / model, out, given=given), words)
    assert out.read_bytes() == b"before"


def test_a_masked_picture_has_something_masked_and_the_size_that_is_drawn(pixels, tmp_path):
    model = load_model(pixels)
    with pytest.raises(UserError, match="transparent"):
        sample.read_given(model, f"masked={ASSETS / 'results/routing.png'}", 32, 32)
    picture = tmp_path / "in.png"
    Image.new("RGBA", (32, 32), (9, 9, 9, 254)).save(picture)
    for path in (ASSETS / "examples/masked.png", picture):
        known, *size = sample.read_given(model, f"masked={path}", 32, 32)
        assert known["masked"].shape == (3, 32, 32) and (known["masked"] == 0).all(0).any()
        assert size == [32, 32]
    out = tmp_path / "out.png"
    for size, options, drawn in ((64, [], "32 x 32"),
                                 (32, ["--width", 40, "--height", 48], "40 x 48")):
        transparent(picture, size)
        done = draw("masked", pixels, out, *options, given=[f"masked={picture}"])
        assert_mistake(done, f"the picture is {size} x {size} and what is drawn {drawn}",
                       "--height")
        assert not out.exists()
    transparent(picture, 40)
    done = draw("masked", pixels, out, "--height", 40, "--width", 40, given=[f"masked={picture}"])
    assert done.returncode == 0 and Image.open(out).size == (80, 40), done.stderr


@pytest.mark.parametrize("arguments, words", [
    ("translate,masked", "alone"), ("t2i --head linear", "--head"),
    ("translate --head linear", "the heads of translate are image"),
    ("label --input x", "picture beside z_t"), ("label --drop 1", "--drop"),
    ("label --modality-weight -1", "--modality-weight"), ("translate --data x", "--data"),
    ("masked --t-range 0 9", "--t-range"), ("translate --unet adm-tiny", "--unet"),
    ("repr --model scratch", "text encoder"),
    (f"translate --model {ASSETS / 'tiny-mtu'}", "starts from"),
    ("translate --schedule interpolating", "interpolating")])
def test_a_mistake_in_training_is_one_line(tmp_path, arguments, words):
    done = call("train.py", *QUICK, "--out", tmp_path / "run", "--steps", 1, "--task",
                *arguments.split())
    assert_mistake(done, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--prompt", "x"], "--prompt"), (["--strength", "0.5"], "--strength"),
    ([], "python train.py --task translate trains one")])
def test_a_mistake_in_drawing_is_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert_mistake(call("sample.py", "--task", "translate", *arguments), words)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_goes_on_from_a_joint_model_of_the_same_kind_alone(tmp_path, folders):
    start = ["--model", folders / "translate", "--steps", 1, "--task"]
    run(tmp_path / "on", *start, "translate")
    assert load_model(tmp_path / "on").tasks == ["translate"]
    for words, message in (("translate --input x", "other heads"), ("masked", "other heads"),
                           ("translate --schedule zero", "other heads"),
                           ("all", "it knows translate"), ("t2i", "it knows translate")):
        done = call("train.py", *QUICK, "--out", tmp_path / "no", *start, *words.split())
        assert_mistake(done, message)
        assert not (tmp_path / "no").exists()
    done = call("moe.py", "--fold", "translate", "--model", folders / "translate",
                "--out", tmp_path / "no")
    assert_mistake(done, "not upcycled")
    assert not (tmp_path / "no").exists()
