"""MT-Diffusion: the closed forms against the chain, Gaussians and integrals; DDPM at w = 0; Eq. 6; Algorithm 1; heads and encoders."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import aggregation
from adm import CONFIGS as ADM, UNet2D
from aggregation import (SCHEDULES, Aggregation, add_heads, designed, each_class_once, expected, interpolating, joint_loss, sample,
                         unet_encoding, vanishing, widen)
from diffusion import Diffusion, ddim, ddpm, seeded
from folders import UserError, load_weights
from unet import CONFIGS, UNet

BETAS = {"linear": {}, "sd": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
         "cosine": dict(beta_schedule="squaredcos_cap_v2")}
SMALL = dict(CONFIGS["tiny"], block_out_channels=(32, 64, 64), cross_attention_dim=24, sample_size=8)


def diffusion(name="linear", **changes):
    return Diffusion.from_config(BETAS[name] | dict(clip_sample=False, timestep_spacing="trailing") | changes)


def short(T=40):
    """A schedule of few steps that ends near noise."""
    return diffusion(num_train_timesteps=T, beta_end=0.3)


def process(alpha_bar, M=3, seed=0):
    """Weights of no particular form, as large as beta."""
    g = torch.Generator().manual_seed(seed)
    return Aggregation(alpha_bar, (torch.rand(M, len(alpha_bar), generator=g) - 0.3) * (1 - aggregation.alphas(alpha_bar)[0]))


def draw(M=3, B=4, C=2, side=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    z0, zt, noise, *E = torch.randn(3 + M, B, C, side, side, generator=g, dtype=torch.float64).to(dtype)
    return z0, zt, noise, torch.stack(E)


def constants(alpha_bar, t):
    """alpha_t, ab_t, ab_{t-1} in float64, by Python."""
    ab, before = alpha_bar[t].item(), alpha_bar[t - 1].item() if t > 0 else 1.0
    return ab / before, ab, before


# ---- Eq. 3, 4, 7, 8: transition, marginal, weights ----

@pytest.mark.parametrize("name", BETAS)
def test_the_marginal_is_the_chain_of_transitions(name):
    d, (z0, _, _, E) = diffusion(name), draw()
    p, mean, var = process(d.alpha_bar), z0, torch.zeros(())
    for t in range(d.T):
        mean, std = p.transition(mean, E, t)
        var = constants(d.alpha_bar, t)[0] * var + std ** 2
        if t % 111 == 0:
            m, s = p.marginal(z0, E, t)
            assert torch.allclose(m, mean, atol=1e-9) and torch.allclose(s ** 2, var, atol=1e-9)
    m, s = p.marginal(z0, E, -1)
    assert torch.equal(m, z0) and s == 0


def test_monte_carlo():
    d, n, T = short(), 200_000, 20
    p, z0, E = Aggregation(d.alpha_bar, [lambda a: interpolating(a, 0.8)]), 0.6, torch.full((1, 1, 1, 1, 1), -1.3)
    z = torch.full((n, 1, 1, 1), z0)
    for t in range(T):
        before = z
        mean, std = p.transition(z, E.expand(1, n, 1, 1, 1), t)
        z = mean + std * torch.randn_like(z)
    mean, std = p.marginal(torch.full((1, 1, 1, 1), z0), E, T - 1)
    assert abs(z.mean() - mean) < 6e-3 and abs(z.var() - std ** 2) < 6e-3 and mean < 0.2
    slope = ((z - z.mean()) * (before - before.mean())).mean() / z.var()  # the regression of z_{t-1} on z_t is the posterior
    offset = before.mean() - slope * z.mean()
    (at0, var), (at1, _) = (p.posterior(torch.full((1, 1, 1, 1), z0), torch.full((1, 1, 1, 1), y), E, T - 1) for y in (0.0, 1.0))
    assert abs(slope - (at1 - at0)) < 6e-3 and abs(offset - at0) < 6e-3 and abs((before - offset - slope * z).var() - var) < 3e-3


def test_a_timestep_of_each_sample_is_its_own():
    d, (z0, zt, eps, E) = diffusion(), draw()
    p, t = process(d.alpha_bar), torch.tensor([0, 5, 400, 999])
    for f in (lambda z0, zt, eps, E, t: p.marginal(z0, E, t), lambda z0, zt, eps, E, t: p.posterior(z0, zt, E, t),
              lambda z0, zt, eps, E, t: p.posterior_from_eps(zt, eps, E, t), lambda z0, zt, eps, E, t: p.transition(z0, E, t),
              lambda z0, zt, eps, E, t: (p.ddim_step(zt, eps, E, t, t - 1),) * 2):
        together, spread = f(z0, zt, eps, E, t)
        for i in range(4):
            alone, one = f(z0[i:i + 1], zt[i:i + 1], eps[i:i + 1], E[:, i:i + 1], int(t[i]))
            assert torch.equal(together[i:i + 1], alone) and torch.equal(spread[i:i + 1], one)


@pytest.mark.parametrize("name", BETAS)
def test_named_weights_have_their_closed_coefficients(name):
    ab = diffusion(name).alpha_bar.double()
    s, k = ab.sqrt(), 0.7
    for name, c in dict(vanishing=k * s * (1 - s), interpolating=k * (1 - s), first=k * s, zero=0 * s).items():
        schedule = SCHEDULES[name]
        p = Aggregation(ab, [schedule(ab, k)])
        assert torch.allclose(p.c[0, 1:], c, atol=1e-9) and p.c[0, 0] == 0
        assert torch.allclose(designed(ab, c), schedule(ab, k), atol=1e-9)


@pytest.mark.parametrize("name, w, last, most", [
    ("linear", lambda a, t: 1 + 0 * t, 114, 240), ("sd", lambda a, t: 1 + 0 * t, 228, 347), ("cosine", lambda a, t: 1 + 0 * t, 0.24, 421),
    ("linear", lambda a, t: t, 98, 98), ("sd", lambda a, t: t, 166, 166), ("cosine", lambda a, t: t, 0.21, 173),
    ("linear", lambda a, t: 1 - a, 1.96, 1.96), ("sd", lambda a, t: 1 - a, 1.85, 1.85), ("cosine", lambda a, t: 1 - a, 0.07, 1.87),
    ("linear", "interpolating", 0.99, 0.99), ("sd", "interpolating", 0.93, 0.93), ("cosine", "interpolating", 1.00, 1.00),
    ("linear", "vanishing", 0.006, 0.25), ("sd", "vanishing", 0.064, 0.25), ("cosine", "vanishing", 0.000, 0.25)])
def test_sizes_of_the_coefficient(name, w, last, most):
    """c_T and its maximum over t, for weights that are functions of alpha_t and t / T; any function of alpha_bar will do."""
    ab = diffusion(name).alpha_bar
    w = SCHEDULES[w] if isinstance(w, str) else (lambda w: lambda ab: w(aggregation.alphas(ab)[0], torch.arange(1, 1001) / 1000))(w)
    c = Aggregation(ab, [w]).c[0]
    digits = {True: 3, False: 2 if last < 10 else 0}[isinstance(last, float) and last < 0.01 or last == 0.064]
    assert round(c[-1].item(), digits) == last and abs(c.max().item() - most) <= 0.005 * max(1, most)


def test_weights_of_inverse_design_reproduce_any_coefficient():
    ab = diffusion().alpha_bar
    wanted = torch.sin(torch.arange(1000) / 100).double()
    assert torch.allclose(Aggregation(ab, [lambda ab: designed(ab, wanted)]).c[0, 1:], wanted, atol=1e-9)
    zero_snr = diffusion("sd", rescale_betas_zero_snr=True, prediction_type="v_prediction").alpha_bar
    wanted[-1] = 0
    assert torch.allclose(Aggregation(zero_snr, [designed(zero_snr, wanted)]).c[0, 1:], wanted, atol=1e-9)


def test_the_terminal_law():
    z0, _, noise, E = draw(M=1)
    for name in ("linear", "cosine"):  # vanishing: what is left of x is as small as what is left of z_0
        p = Aggregation(diffusion(name).alpha_bar, [vanishing])
        assert (p.start(E, noise) - noise).abs().max() < 0.01 * E.abs().max() and p.c[0, 1] < 1e-3 and p.c.max() > 0.249
    p = Aggregation(diffusion("sd").alpha_bar, [interpolating])
    shift = p.start(E, noise) - noise
    assert torch.allclose(shift, p.marginal(0 * z0, E, 999)[0], atol=1e-12) and torch.allclose(shift, 0.93 * E[0], rtol=0.01)
    assert torch.allclose(p.start(E, noise, 500), p.marginal(0 * z0, E, 500)[0] + noise, atol=1e-12)
    zero_snr = diffusion("sd", rescale_betas_zero_snr=True, prediction_type="v_prediction").alpha_bar
    assert torch.equal(Aggregation(zero_snr, [vanishing]).start(E, noise), noise)  # a_T = 0 forgets x as it forgets z_0


# ---- Eq. 5, 9: posterior, DDIM ----

@pytest.mark.parametrize("name", BETAS)
def test_the_posterior_is_a_product_of_gaussians(name):
    d, (z0, zt, eps, E) = diffusion(name), draw()
    p = process(d.alpha_bar)
    for t in (1, 2, 37, 500, 900, 980):
        a, ab, before = constants(d.alpha_bar, t)
        A, C_before = ((table[:, t + shift].view(3, 1, 1, 1, 1) * E).sum(0) for table, shift in ((p.w, 1), (p.c, 0)))
        C = math.sqrt(a) * (C_before + A)
        m1, v1, v2 = math.sqrt(before) * z0 + C_before, 1 - before, 1 - a   # Lemma 4: prior, and likelihood N(z_t; sqrt(a) (z + A), v2)
        precision = 1 / v1 + a / v2
        mu = (m1 / v1 + math.sqrt(a) * (zt - math.sqrt(a) * A) / v2) / precision
        mean, var = p.posterior(z0, zt, E, t)
        assert torch.allclose(mean, mu, atol=1e-9) and torch.allclose(var, torch.tensor(1 / precision).double(), rtol=1e-9)
        printed = (math.sqrt(before) * (1 - a) * z0 + math.sqrt(a) * (1 - before) * zt + (1 - a) * C_before - a * (1 - before) * A) / (1 - ab)
        assert torch.allclose(mean, printed, atol=1e-9)                     # Eq. 9 as the header has it
        zt_of = math.sqrt(ab) * z0 + C + math.sqrt(1 - ab) * eps
        by_z0, by_eps = p.posterior(z0, zt_of, E, t), p.posterior_from_eps(zt_of, eps, E, t)
        assert torch.allclose(by_z0[0], by_eps[0], atol=1e-7) and torch.equal(by_z0[1], by_eps[1])
        ddpm_mean = (zt_of - (1 - a) / math.sqrt(1 - ab) * eps) / math.sqrt(a)
        assert torch.allclose(by_eps[0], ddpm_mean - A, atol=1e-9)          # Remark 2: one more term, with no factor


def test_the_posterior_by_integration():
    d, t = short(), 12
    p, (a, _, before) = process(d.alpha_bar, M=1), constants(d.alpha_bar, t)
    z0, zt, e = 0.4, -0.9, 1.7
    z = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    density = torch.exp(-(z - math.sqrt(before) * z0 - p.c[0, t] * e) ** 2 / (2 * (1 - before))
                        - (zt - math.sqrt(a) * (z + p.w[0, t + 1] * e)) ** 2 / (2 * (1 - a)))
    mu = (z * density).sum() / density.sum()
    mean, var = p.posterior(*(torch.full((1, 1, 1, 1), y, dtype=torch.float64) for y in (z0, zt)), torch.full((1, 1, 1, 1, 1), e).double(), t)
    assert abs(mean - mu) < 1e-8 and abs(var - ((z - mu) ** 2 * density).sum() / density.sum()) < 1e-8


def test_posteriors_over_several_steps_compose():
    d, (z0, zt, _, E) = short(), draw()
    p, r, s, t = process(d.alpha_bar), 5, 17, 30
    mean, var = p.posterior(z0, zt, E, t, s)
    twice, spread = p.posterior(z0, mean, E, s, r)
    slope = p.posterior(z0, mean + 1, E, s, r)[0] - twice
    direct, total = p.posterior(z0, zt, E, t, r)
    assert torch.allclose(twice, direct, atol=1e-12) and torch.allclose(spread + slope ** 2 * var, total, atol=1e-12)
    assert torch.equal(p.posterior(z0, zt, E, t, -1)[0], z0) and p.posterior(z0, zt, E, t, -1)[1] == 0


@pytest.mark.parametrize("name", BETAS)
def test_ddim_with_the_true_noise_and_x_returns_z0(name):
    d, (z0, _, eps, E) = diffusion(name), draw(dtype=torch.float32)
    p = process(d.alpha_bar)
    for t, r in ((700, 699), (700, 300), (300, 40), (40, 0), (5, -1), (700, -1)):
        mean, std = p.marginal(z0, E, t)
        mean_r, std_r = p.marginal(z0, E, r)
        assert torch.allclose(p.ddim_step(mean + std * eps, eps, E, t, r), mean_r + std_r * eps, atol=1e-4)
    z = p.marginal(z0, E, 700)[0] + p.marginal(z0, E, 700)[1] * eps
    for t, r in ((700, 400), (400, 100), (100, -1)):
        z = p.ddim_step(z, eps, E, t, r)
    assert torch.allclose(z, z0, atol=1e-4)


def test_ddim_with_the_posteriors_variance_is_the_posterior():
    d, (z0, _, eps, E) = diffusion(), draw()
    p = process(d.alpha_bar)
    for t in (1, 60, 999):
        zt = sum(y * eps if i else y for i, y in enumerate(p.marginal(z0, E, t)))
        mean, var = p.posterior(z0, zt, E, t)
        assert torch.allclose(p.ddim_step(zt, eps, E, t, t - 1, var.sqrt()), mean, atol=1e-9)
        noise = torch.randn_like(zt)
        assert torch.allclose(p.ddim_step(zt, eps, E, t, t - 1, var.sqrt(), noise), mean + var.sqrt() * noise, atol=1e-9)
    assert not torch.allclose(p.ddim_step(zt, eps, E, t, t - 1), mean, atol=1e-3)


def test_appendix_d():
    """The gradient of a classifier as E, and the U-Net's difference, give the two guidances."""
    d, (_, zt, eps, E) = short(), draw(M=1)
    t, s, zero = 20, 3.0, Aggregation(d.alpha_bar, [SCHEDULES["zero"]])
    a, ab, _ = constants(d.alpha_bar, t)
    plain, var = zero.posterior_from_eps(zt, eps, E, t)
    w = torch.zeros(1, d.T, dtype=torch.float64)
    w[0, t] = -s * var
    assert torch.allclose(Aggregation(d.alpha_bar, w).posterior_from_eps(zt, eps, E, t)[0], plain + s * var * E[0], atol=1e-12)
    w[0, t] = s * (1 - a) / math.sqrt(a * (1 - ab))
    guided = zero.posterior_from_eps(zt, eps + s * (E[0] - eps), E, t)[0]
    assert torch.allclose(Aggregation(d.alpha_bar, w).posterior_from_eps(zt, eps, E - eps, t)[0], guided, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    d, tensors = diffusion(), draw(dtype=dtype)
    p, t = process(d.alpha_bar), torch.tensor([3, 200, 600, 950])
    for half, full in zip(*(
            [*p.marginal(z0, E, t), *p.posterior(z0, zt, E, t), *p.posterior_from_eps(zt, eps, E, t), *p.transition(z0, E, t), p.start(E, eps),
             p.ddim_step(zt, eps, E, t, t - 2, 0.001, eps)] for z0, zt, eps, E in (tensors, [y.float() for y in tensors]))):
        assert half.dtype == torch.float32 and torch.equal(half, full)


# ---- a network, its heads, Eq. 6 ----

class Toy(nn.Module):
    """Stands for a U-Net: smooth in z, different at each t."""
    config = dict(block_out_channels=(32, 5), in_channels=2, out_channels=2, sample_size=8)

    def __init__(self):
        super().__init__()
        self.conv_norm_out, self.conv_out, self.scale = nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 3, padding=1), nn.Parameter(torch.tensor(0.7))

    def forward(self, z, t):
        h = torch.tanh(self.scale * z.roll(1, -1) - 0.2 * z + torch.sin(t.float() / 90).view(-1, 1, 1, 1))
        return h, {"mid": h.mean(1, keepdim=True).expand(-1, 5, -1, -1), "up": z}


def toy(**modalities):
    net = Toy()
    net.config = dict(Toy.config)
    modalities = modalities or {"source": dict(kind="image"), "label": dict(kind="linear", classes=3)}
    return net, add_heads(net, modalities, 2)


def batch(M=2, B=6):
    z0, _, noise, E = draw(M, B, side=8, dtype=torch.float32)
    return z0, noise, E, torch.tensor([3, 100, 250, 500, 800, 999])[:B], {"source": 0.5 * z0, "label": torch.arange(B) % 3}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_w_0_is_ddpms_loss_exactly(kind):
    (net, heads), (z0, noise, E, t, x), d = toy(), batch(), diffusion(prediction_type=kind)
    p = Aggregation(d.alpha_bar, [SCHEDULES["zero"]] * 2)
    loss, terms, _ = joint_loss(d, p, net, heads, z0, t, noise, E, x, weight=0.0)
    plain = d.loss(lambda z, t: net(z, t)[0], z0, t, noise)
    assert torch.equal(terms["denoising"], plain) and torch.equal(loss, plain)
    assert torch.allclose(p.marginal(z0, E, t)[0] + p.marginal(z0, E, t)[1] * noise, d.add_noise(z0, noise, t), atol=1e-6)


def test_the_joint_loss_is_equation_6():
    (net, heads), (z0, noise, E, t, x), d = toy(), batch(), diffusion()
    p = heads.aggregation(d.alpha_bar)
    loss, terms, prediction = joint_loss(d, p, net, heads, z0, t, noise, E, x)
    mean, std = p.marginal(z0, E, t)
    eps, features = net(mean + std * noise, t)
    source = heads["source"].conv(nn.functional.silu(heads["source"].norm(features["up"])))
    log_p = heads["label"].linear(features["mid"].mean((2, 3))).log_softmax(-1)
    written = [(eps - noise).square().mean((1, 2, 3)), (source - x["source"]).square().mean((1, 2, 3)), -log_p[torch.arange(6), x["label"]]]
    for term, by_hand in zip((terms["denoising"], terms["source"], terms["label"]), written):
        assert torch.allclose(term, by_hand, atol=1e-5)
    assert torch.allclose(loss, written[0] + 0.1 * (written[1] + written[2]), atol=1e-5) and torch.allclose(prediction, eps, atol=1e-5)
    soft = nn.functional.one_hot(x["label"], 3).float()
    assert torch.allclose(joint_loss(d, p, net, heads, z0, t, noise, E, x | {"label": soft})[1]["label"], terms["label"], atol=1e-6)


def test_what_is_not_given_is_pure_generation():
    """The starred variants: a dropped modality adds nothing to z_t and nothing to the loss."""
    (net, heads), (z0, noise, E, t, x), d = toy(), batch(), diffusion()
    p, given = heads.aggregation(d.alpha_bar), torch.tensor([[1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0]]).float()
    loss, terms, _ = joint_loss(d, p, net, heads, z0, t, noise, E, x, given)
    whole = joint_loss(d, p, net, heads, z0, t, noise, E, x)[1]
    plain = d.loss(lambda z, t: net(z, t)[0], z0, t, noise)
    pure = torch.tensor([3, 5])
    assert torch.equal(loss[pure], plain[pure]) and torch.equal(terms["denoising"][0], whole["denoising"][0])
    assert (terms["source"] == 0).tolist() == (given[0] == 0).tolist() and (terms["label"] == 0).tolist() == (given[1] == 0).tolist()
    assert not torch.allclose(loss[1:3], plain[1:3], atol=1e-6)


def test_a_head_whose_modality_is_absent_gets_a_gradient_of_zero():
    (net, heads), (z0, noise, E, t, x), d = toy(), batch(), diffusion()
    p, losses = heads.aggregation(d.alpha_bar), []
    for present, given in (({"source": x["source"]}, torch.tensor([[1.0] * 6, [0.0] * 6])), (x, torch.tensor([[1.0] * 6, [0.0] * 6]))):
        net.zero_grad(), heads.zero_grad()
        loss = joint_loss(d, p, net, heads, z0, t, noise, E, present, given)[0]
        losses.append(loss)
        loss.sum().backward()
        assert all(q.grad is not None and (q.grad == 0).all() for q in heads["label"].parameters())
        assert all(q.grad is not None and (q.grad != 0).any() for q in heads["source"].parameters())
    assert torch.equal(*losses)


def test_the_encoder_gets_no_gradient_and_the_network_does():
    unet, d = UNet(SMALL), diffusion()
    heads = add_heads(unet, {"label": dict(kind="linear", classes=5)}, 4)
    z0, noise, context = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24)
    E = unet_encoding(unet, z0, context)
    assert not E.requires_grad and torch.equal(E, unet(torch.zeros(2, 4, 8, 8), 0, context))
    network = lambda z, t: unet(z, t, torch.zeros(2, 7, 24), return_features=True)  # noqa: E731
    p, t, x = heads.aggregation(d.alpha_bar), torch.tensor([10, 700]), {"label": torch.tensor([0, 4])}
    joint_loss(d, p, network, heads, z0, t, noise, E[None], x)[0].sum().backward()
    assert all(q.grad is not None for q in [*unet.parameters(), *heads.parameters()])


def test_one_graph_and_bf16():
    (net, heads), (z0, noise, E, t, x), d = toy(), batch(), diffusion()
    p = heads.aggregation(d.alpha_bar)

    def run():
        return joint_loss(d, p, net, heads, z0, t, noise, E, x, torch.ones(2, 6))[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = torch.compile(run, backend="eager", fullgraph=True)()
    assert half.dtype == torch.float32 and torch.allclose(half, run(), rtol=0.05)


# ---- v ----

def test_v_is_that_of_y_and_trains_the_same():
    """With v = sqrt(ab) eps - sqrt(1 - ab) z_0, an eps network's v has its loss over ab, and draws the same pictures."""
    (net, heads), (z0, noise, E, t, x) = toy(), batch()
    by_eps, by_v = diffusion(), diffusion(prediction_type="v_prediction")
    p = heads.aggregation(by_eps.alpha_bar)

    def v_network(E):
        def run(z, t):
            eps, features = net(z, t)
            ab = by_eps.alpha_bar[t].view(-1, 1, 1, 1)
            y = z - p.aggregate(E, t)
            return (eps - (1 - ab).sqrt() * y) / ab.sqrt(), features  # from y = sqrt(ab) z_0 + sqrt(1 - ab) eps
        return run
    t = t.clamp(max=800)
    a, b = (joint_loss(d, p, f, heads, z0, t, noise, E, x)[1]["denoising"] for d, f in ((by_eps, net), (by_v, v_network(E))))
    assert torch.allclose(a / by_eps.alpha_bar[t], b, rtol=2e-3)
    known = {"source": x["source"], "label": x["label"]}
    encoders = {"source": lambda x: E[0], "label": lambda x: E[1]}
    for sampler in ("ddim", "ddpm"):
        a, b = (sample(d, p, f, heads, encoders, noise, known, steps=10, sampler=sampler, generators=seeded(range(6)))[0]
                for d, f in ((by_eps, net), (by_v, v_network(E))))
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-2 * a.abs().max().item())


def test_v_at_zero_terminal_snr():
    """The miniature's own schedule: at alpha_bar = 0 the noise says nothing of z_0, v = -z_0 does."""
    d, (z0, _, noise, E) = diffusion("sd", rescale_betas_zero_snr=True, prediction_type="v_prediction"), draw(M=1, dtype=torch.float32)
    p, heads = Aggregation(d.alpha_bar, [vanishing]), toy(source=dict(kind="image"))[1]

    def network(z, t):  # all-knowing
        ab = d.alpha_bar[t].view(-1, 1, 1, 1)
        return d.target(z0, (z - p.aggregate(E, t) - ab.sqrt() * z0) / (1 - ab).sqrt(), t), {"mid": z, "up": z}
    for sampler in ("ddim", "ddpm"):
        out, _ = sample(d, p, network, heads, {"source": lambda x: E[0]}, noise, {"source": z0}, steps=7, sampler=sampler)
        assert torch.allclose(out, z0, atol=1e-4)


# ---- Algorithm 1 ----

@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddim", "ddim, eta 1", "ddim, clipped", "ddpm", "ddpm, large", "ddpm, clipped"])
def test_w_0_draws_what_ddpm_draws(kind, sampler):
    (net, heads), noise = (part.double() for part in toy()), batch()[1].double()
    changes = dict(clip_sample="clipped" in sampler, variance_type="fixed_large" if "large" in sampler else "fixed_small")
    d, options = diffusion(prediction_type=kind, **changes), dict(eta=1.0) if "eta" in sampler else {}
    d.alpha_bar, d.final_alpha_bar = d.alpha_bar.double(), d.final_alpha_bar.double()  # in fp32, differences of neighbours lose digits
    p = Aggregation(d.alpha_bar, [SCHEDULES["zero"]] * 2)
    encoders = {name: lambda x: torch.ones_like(noise) for name in heads}
    ours, x = sample(d, p, net, heads, encoders, noise, steps=20, sampler=sampler[:4], generators=seeded(range(6)), **options)
    theirs = (ddim if "ddim" in sampler else ddpm)(d, lambda z, t: net(z, t)[0], noise.clone(), 20, generators=seeded(range(6)), **options)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())
    assert x["label"].shape == (6, 3) and torch.allclose(x["label"].sum(1), torch.ones(6)) and x["source"].shape == noise.shape


def test_w_0_draws_with_a_learned_variance():
    unet, (_, noise, _, _, _) = UNet2D(ADM["adm-tiny"]), batch()
    noise, d = torch.randn(2, 3, 8, 8), diffusion(variance_type="learned_range")
    with torch.no_grad():
        unet.conv_out.weight.mul_(3)
    heads = add_heads(unet, {"masked": dict(kind="image", silu=False)}, 3)
    p = Aggregation(d.alpha_bar, [SCHEDULES["zero"]])
    ours, x = sample(d, p, lambda z, t: unet(z, t, None, return_features=True), heads, {"masked": lambda x: x}, noise, steps=4, sampler="ddpm",
                     generators=seeded(range(2)))
    theirs = ddpm(d, lambda z, t: unet(z, t, None), noise.clone(), 4, generators=seeded(range(2)))
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item()) and x["masked"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("name", BETAS)
def test_w_0_steps_equal_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    _, _, eps, E = draw(M=1, dtype=torch.float32)
    d, zt = diffusion(name), 0.5 * draw()[1].float()
    p = Aggregation(d.alpha_bar, [SCHEDULES["zero"]])
    config = {**BETAS[name], "clip_sample": False}
    theirs = diffusers.DDIMScheduler(**config)
    theirs.set_timesteps(20)
    for t in (950, 500, 50, 0):
        assert torch.allclose(p.ddim_step(zt, eps, E, t, max(t - 50, -1)), theirs.step(eps, t, zt).prev_sample, rtol=1e-4, atol=1e-4)
    theirs = diffusers.DDPMScheduler(**config)
    for t in (900, 500, 50):
        a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        mean, var = p.posterior_from_eps(zt, eps, E, t)
        ours = mean + var.sqrt() * torch.randn(zt.shape, generator=a)
        assert torch.allclose(ours, theirs.step(eps, t, zt, generator=b).prev_sample, rtol=1e-4, atol=2e-4)


class Gaussian(nn.Module):
    """z_0 ~ N(m, s^2), x = rho z_0 + u, u ~ N(0, tau^2), all scalars: the exact E[eps | z_t] and E[x | z_t], or with x known E[eps | z_t, x]."""

    def __init__(self, d, p, x=None, m=0.4, s=0.5, rho=0.8, tau=0.3):
        super().__init__()
        self.d, self.p, self.x, self.m, self.s, self.rho, self.tau = d, p, x, m, s, rho, tau

    def forward(self, z, t):
        m, s, rho, tau = self.m, self.s, self.rho, self.tau
        ab, c = (y.view(-1, 1, 1, 1).float() for y in (self.d.alpha_bar[t], self.p.c[0, t + 1]))
        if self.x is not None:  # z_0 given x first
            gain = rho * s * s / (rho * rho * s * s + tau * tau)
            mean, var = m + gain * (self.x - rho * m), s * s - gain * rho * s * s
            v = ab * var + 1 - ab
            return (1 - ab).sqrt() * (z - ab.sqrt() * mean - c * self.x) / v, {"x": self.x}
        signal = ab.sqrt() + c * rho                       # z_t = signal z_0 + c u + sqrt(1 - ab) eps
        v = signal ** 2 * s * s + c ** 2 * tau * tau + 1 - ab
        off = (z - signal * m) / v
        return (1 - ab).sqrt() * off, {"x": rho * (m + signal * s * s * off) + c * tau * tau * off}


class Told(nn.Module):
    probabilities = False

    def forward(self, features, t):
        return features["x"]


def told():
    class Both(nn.ModuleDict):
        def forward(self, features, t):
            return {name: head(features, t) for name, head in self.items()}
    return Both({"x": Told()})


@pytest.mark.parametrize("sampler, schedule", [("ddim", "vanishing"), ("ddpm", "vanishing"), ("ddim", "interpolating"), ("ddpm", "first")])
def test_algorithm_1_draws_from_the_posterior_with_exact_networks(sampler, schedule):
    """z_0 given x is N(0.66.., 0.255^2) at x = 0.9; the marginal N(0.4, 0.5^2) if x is unknown, where x comes out as well."""
    d, n = diffusion(num_train_timesteps=200, beta_end=0.1), 20_000
    p, noise = Aggregation(d.alpha_bar, [lambda ab: SCHEDULES[schedule](ab)]), torch.randn(n, 1, 1, 1)
    x = torch.full((n, 1, 1, 1), 0.9)
    z, out = sample(d, p, Gaussian(d, p, x), told(), {"x": lambda x: x}, noise, {"x": x}, steps=200, sampler=sampler)
    gain = 0.8 * 0.25 / (0.64 * 0.25 + 0.09)
    mean, std = 0.4 + gain * (0.9 - 0.32), math.sqrt(0.25 - gain * 0.8 * 0.25)
    assert abs(z.mean() - mean) < 0.015 and abs(z.std() - std) < 0.03 and torch.equal(out["x"], x)
    if schedule == "vanishing":
        z, out = sample(d, p, Gaussian(d, p), told(), {"x": lambda x: x}, noise, steps=200, sampler=sampler)
        assert abs(z.mean() - 0.4) < 0.02 and abs(z.std() - 0.5) < 0.08 and abs(out["x"].mean() - 0.32) < 0.02


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_known_modalities_stay_exactly_as_given(sampler):
    (net, heads), (z0, noise, E, _, x), d = toy(), batch(), diffusion(clip_sample=True)
    p, encoders, seen = heads.aggregation(d.alpha_bar), {"source": lambda x: 0.9 * x, "label": lambda x: expected(E[0, :3], x)}, []
    for known in ({}, {"source": x["source"]}, {"label": x["label"]}, x):
        given = {name: value.clone() for name, value in known.items()}
        _, out = sample(d, p, net, heads, encoders, noise, known, steps=5, sampler=sampler, callback=lambda i, t, z, z0, x: seen.append(x))
        assert list(out) == ["source", "label"]
        for name, value in given.items():
            assert torch.equal(out[name], value) and all(torch.equal(y[name], value) for y in seen[-5:])
        for name in set(heads) - set(known):
            assert not torch.equal(seen[-5][name], seen[-1][name])
    drawn, out = sample(d, p, net, heads, encoders, noise, {}, z0, steps=5, sampler=sampler)  # the picture is known, the rest is not
    assert torch.equal(drawn, z0) and out["label"].shape == (6, 3)


def test_with_the_picture_known_every_step_is_on_its_marginal():
    (net, heads), (z0, noise, E, _, x), d = toy(), batch(), diffusion()
    p, states = heads.aggregation(d.alpha_bar), []
    encoders = {"source": lambda x: x, "label": lambda x: E[1]}
    sample(d, p, net, heads, encoders, noise, {"label": x["label"]}, z0, steps=4,
           callback=lambda i, t, z, z0, x: states.append((t - 250, z, x["source"])))
    for r, z, source in states:
        mean, std = p.marginal(z0, torch.stack([source, E[1]]), max(r, -1))
        assert torch.allclose(z, mean + std * noise, atol=1e-5)
    assert [r for r, _, _ in states] == [749, 499, 249, -1]


def test_known_modalities_are_encoded_once():
    (net, heads), (_, noise, E, _, x), d, calls = toy(), batch(), diffusion(), []
    encoders = {name: (lambda name: lambda x: calls.append(name) or E[0])(name) for name in heads}
    sample(d, heads.aggregation(d.alpha_bar), net, heads, encoders, noise, {"source": x["source"]}, steps=5)
    assert calls.count("source") == 1 and calls.count("label") == 5


# ---- encoders, heads, folders ----

def test_encoders():
    unet = UNet2D(ADM["adm-tiny"] | dict(num_class_embeds=5)).eval()
    with torch.no_grad():
        for q in unet.parameters():
            q.add_(0.02 * torch.randn_like(q))
    z, labels, calls = torch.randn(4, 3, 8, 8), torch.tensor([2, 0, 2, 4]), []

    def encode(classes):
        calls.append(classes.tolist())
        return unet_encoding(unet, z[:len(classes)], added={"class_labels": classes})
    E = each_class_once(encode, labels)
    assert calls == [[0, 2, 4]] and E.shape == z.shape and torch.equal(E[0], E[2]) and not torch.allclose(E[0], E[1], atol=1e-4)
    direct = unet(torch.zeros(4, 3, 8, 8), torch.zeros(4), None, added={"class_labels": labels})[:, :3].detach()  # without the variance's channels
    assert torch.allclose(E, direct, atol=1e-5)
    table = torch.cat([encode(torch.tensor([k])) for k in range(5)])
    assert torch.equal(expected(table, labels), table[labels])
    assert torch.allclose(expected(table, nn.functional.one_hot(labels, 5)), table[labels], atol=1e-6)
    assert torch.allclose(expected(table, torch.full((1, 5), 0.2))[0], table.mean(0), atol=1e-6)


@pytest.mark.parametrize("make, context, channels", [(lambda: UNet(SMALL), torch.zeros(2, 7, 24), 4), (lambda: UNet2D(ADM["adm-tiny"]), None, 3)])
def test_heads_on_real_networks(make, context, channels):
    unet = make().requires_grad_(False)
    side, z, t = 8, torch.randn(2, channels, 8, 8), torch.tensor([5, 900])
    unet.config["sample_size"] = side
    heads = add_heads(unet, {"source": dict(kind="image"), "masked": dict(kind="image", silu=False), "m": dict(kind="linear", classes=7),
                             "e": dict(kind="classifier", classes=7, width=32, depth=1), "repr": dict(kind="vector", width=24)}, channels)
    out, features = unet(z, t, context, return_features=True)
    y = heads({**features, "picture": z}, t)
    picture = (2, channels, 8, 8)
    assert {name: tuple(value.shape) for name, value in y.items()} == dict(source=picture, masked=picture, m=(2, 7), e=(2, 7), repr=(2, 24))
    assert torch.equal(y["source"], out[:, :channels])  # a copy of the output block starts as it
    assert torch.equal(y["masked"], unet.conv_out(unet.conv_norm_out(features["up"]))[:, :channels])
    sum(value.sum() for value in y.values()).backward()  # of a frozen network too, all heads train
    assert all(q.grad is not None for q in heads.parameters())
    moved = heads({**features, "picture": z.roll(1, 0)}, t)
    assert not torch.allclose(moved["e"], y["e"], atol=1e-5) and torch.equal(moved["m"], y["m"])
    assert not torch.allclose(heads({**features, "picture": z}, t + 50)["e"], y["e"], atol=1e-6)
    with pytest.raises(UserError, match="size"):
        heads["e"]({"picture": torch.randn(2, channels, 16, 16)}, t)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_heads_see_the_picture_that_the_output_stands_for(kind):
    (net, _), (z, _, _, t, _), d = toy(), batch(), diffusion(prediction_type=kind)
    seen = []
    prediction, _ = aggregation.decode(d, net, lambda features, t: seen.append((features, t)), z, t)
    features, at = seen[0]
    ab = d.alpha_bar[t].view(-1, 1, 1, 1)
    picture = (z - (1 - ab).sqrt() * prediction) / ab.sqrt() if kind == "epsilon" else ab.sqrt() * z - (1 - ab).sqrt() * prediction
    assert torch.allclose(features["picture"], picture, rtol=1e-5, atol=1e-5) and torch.equal(at, t) and {"mid", "up"} < set(features)


def test_the_classifiers_pooling_is_attention_of_the_mean():
    unet = UNet(SMALL)
    head = add_heads(unet, {"e": dict(kind="classifier", classes=3, width=32, depth=1)}, 4)["e"]
    caught = []
    head.norm.register_forward_hook(lambda m, i, o: caught.append(o))
    y = head({"picture": torch.randn(2, 4, 8, 8)}, torch.tensor([0, 500]))
    x = nn.functional.silu(caught[0]).flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], 1) + head.position
    q, k, v = head.qkv(x).chunk(3, -1)
    out = []
    for i in range(0, 128, 32):  # 4 heads of 32 channels
        w = (q[:, :1, i:i + 32] @ k[..., i:i + 32].transpose(1, 2) / math.sqrt(32)).softmax(-1)
        out.append(w @ v[..., i:i + 32])
    assert torch.allclose(y, head.out(torch.cat(out, -1)[:, 0]), atol=1e-5)


def test_a_folder_is_rebuilt_with_its_heads(tmp_path):
    unet, features = UNet(SMALL), {"mid": torch.randn(2, 64, 2, 2), "up": torch.randn(2, 32, 8, 8)}
    heads = add_heads(unet, {"label": dict(kind="linear", classes=4), "source": dict(kind="image", weights="interpolating", k=0.5)}, 4)
    with torch.no_grad():
        for q in heads.parameters():
            q.normal_()
    unet.save_pretrained(tmp_path / "unet")
    heads.save_pretrained(tmp_path / "heads")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert config["_class_name"] == "JointUNet" and config["aggregation"]["modalities"]["source"]["k"] == 0.5
    with pytest.raises(UserError, match="JointUNet"):
        UNet.from_pretrained(tmp_path)
    asked = config.pop("aggregation")
    del config["_class_name"]
    again = UNet.from_pretrained(tmp_path, config=config)
    rebuilt = add_heads(again, **asked)
    load_weights(rebuilt, tmp_path / "heads")
    a, b = heads(features, None), rebuilt(features, None)
    assert list(a) == list(b) == ["label", "source"] and all(torch.equal(a[name], b[name]) for name in a)
    ab = diffusion().alpha_bar
    assert torch.equal(heads.aggregation(ab).c, rebuilt.aggregation(ab).c)
    assert torch.equal(heads.aggregation(ab).w[:, 1:], torch.stack([vanishing(ab), interpolating(ab, 0.5)]))


def test_a_widened_network_is_what_it_was_and_learns_x():
    unet, (z, t, text) = UNet(SMALL).eval(), (torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), torch.randn(2, 7, 24))
    before = unet(z, t, text)
    widen(unet, 4)
    x = torch.randn(2, 4, 8, 8)
    assert unet.config["in_channels"] == 8 and torch.allclose(unet(torch.cat([z, x], 1), t, text), before, atol=1e-6)
    unet(torch.cat([z, x], 1), t, text).square().sum().backward()
    assert (unet.conv_in.weight.grad[:, 4:] != 0).any()
    assert UNet(unet.config).conv_in.weight.shape == unet.conv_in.weight.shape
    assert unet_encoding(unet, z, text).shape == z.shape


# ---- mistakes ----

def test_bad_arguments_are_refused():
    d, (_, noise, E, _, x) = diffusion(), batch()
    ab, (net, heads) = d.alpha_bar, toy()
    p, encoders = heads.aggregation(ab), {name: lambda x: E[0] for name in ("source", "label")}
    zero_snr = diffusion("sd", rescale_betas_zero_snr=True, prediction_type="v_prediction").alpha_bar
    for alpha_bar, weights in ((ab, []), (ab, [torch.zeros(3)]), (ab, [[math.nan] * 1000]), (ab, torch.zeros(1000)), (zero_snr, [interpolating])):
        with pytest.raises(UserError, match="finite numbers"):
            Aggregation(alpha_bar, weights)
    for alpha_bar in (ab.flip(0), torch.ones(3), torch.tensor([0.5, -0.1]), torch.tensor([0.5, math.nan])):
        with pytest.raises(UserError, match="decrease"):
            Aggregation(alpha_bar, [torch.zeros(len(alpha_bar))])
    for bad in (E[:1], E[0], E[0, 0]):
        with pytest.raises(ValueError, match="M = 2"):
            p.marginal(noise, bad, 3)
    for t in (1000, -2, torch.tensor([0, 1, 2, 3, 4, -2])):
        with pytest.raises((IndexError, RuntimeError)):
            p.marginal(noise, E, t)
    for options, words in ((dict(known={"mask": x}), "mask"), (dict(sampler="euler"), "euler"), (dict(eta=2.0), "eta"), (dict(steps=0), "steps")):
        with pytest.raises(UserError, match=words):
            sample(d, p, net, heads, encoders, noise, **options)
    for modality in (dict(kind="mask"), dict(weights="vanishing"), dict(kind="linear"), dict(kind="linear", classes=3, weights="ones"),
                     dict(kind="image", classes=3), 7):
        with pytest.raises(UserError, match="modality y"):
            toy(y=modality)
    with pytest.raises(UserError, match="already"):
        add_heads(net, {"y": dict(kind="image")}, 2)


def test_the_demonstration_draws(tmp_path):
    import subprocess
    import sys

    from conftest import ROOT
    from PIL import Image

    def run(*arguments):
        return subprocess.run([sys.executable, str(ROOT / "aggregation.py"), *arguments], capture_output=True, text=True)
    done = run("--out", str(tmp_path / "new" / "a.png"))
    assert done.returncode == 0 and "400      0.4400  0.8980                0.2464         0.5600         0.4400         0.0000" in done.stdout
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "new" / "a.png").convert("L"))).float()
    assert picture.shape == (24 + 6 * 128, 1280)
    last = picture[:, -128:]
    plain, vanishing_, interpolating_ = (last[24 + 256 * i:24 + 256 * i + 128] for i in range(3))
    assert (plain - 128).abs().max() < 4 and (vanishing_ - 128).abs().max() < 6 and interpolating_.std() > 30  # the mean at T: nothing, nothing, x
    bad = run("--emoji", "no such thing", "--out", str(tmp_path / "b.png"))
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1 and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("arguments", [["--k", "nan"], ["--out", "a.jpg"], ["--out", "."]])
def test_the_demonstrations_bad_input(arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", ["aggregation.py", *arguments])
    with pytest.raises(UserError, match="--emoji"):
        aggregation.main()
