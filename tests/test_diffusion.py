"""diffusion.py against golden values of Stable Diffusion's schedule, diffusers' schedulers, and its own algebra."""
import inspect

import numpy as np
import pytest
import torch

from diffusion import SAMPLERS, Diffusion, UncertaintyWeight, ddim, guide, partway, randn, seeded
from folders import UserError

SD = dict(_class_name="PNDMScheduler", _diffusers_version="0.6.0", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
          num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, trained_betas=None, clip_sample=False)
LATENTS = {k: v for k, v in SD.items() if k not in ("_class_name", "skip_prk_steps")}
SPACINGS = ("leading", "linspace", "trailing")


def make(**changes):
    return Diffusion.from_config({**SD, **changes})


def reference(**changes):
    return pytest.importorskip("diffusers").DDIMScheduler(**{k: v for k, v in {**LATENTS, **changes}.items() if not k.startswith("_")})


def network(x, t):
    """Stands for a U-Net: smooth in x, different at each t, of unit size."""
    return torch.tanh(0.7 * x.roll(1, -1) - 0.2 * x + torch.sin(t.float() / 90).view(-1, 1, 1, 1))


def batch(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


# ---- schedules ----

def test_golden_values_of_stable_diffusion():
    a = make().alpha_bar
    assert a.shape == (1000,) and a.dtype == torch.float32
    assert torch.allclose(a[[0, 500, 999]], torch.tensor([0.99914998, 0.27633247, 0.00466010]), atol=1e-7)
    assert abs(((1 - a[999]) / a[999]).sqrt() - 14.6146466) < 1e-4 and abs(((1 - a[0]) / a[0]).sqrt() - 0.0291675) < 1e-6
    assert make().final_alpha_bar == a[0]  # set_alpha_to_one false
    zero = make(rescale_betas_zero_snr=True, prediction_type="v_prediction").alpha_bar
    assert torch.allclose(zero[[0, 500]], torch.tensor([0.99914998, 0.24101855]), atol=1e-6) and zero[999] == 0


@pytest.mark.parametrize("changes", [
    {}, dict(beta_schedule="linear"), dict(beta_schedule="squaredcos_cap_v2"), dict(num_train_timesteps=100, beta_schedule="linear"),
    dict(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3), dict(rescale_betas_zero_snr=True, prediction_type="v_prediction")])
def test_schedules_equal_diffusers(changes):
    assert torch.allclose(make(**changes).alpha_bar, reference(**changes).alphas_cumprod, atol=1e-6, rtol=1e-5)


def test_absent_keys_take_the_defaults_of_the_named_class():
    diffusers = pytest.importorskip("diffusers")
    for name in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
        theirs, ours = getattr(diffusers, name)(), Diffusion.from_config({"_class_name": name})
        assert torch.equal(ours.alpha_bar, theirs.alphas_cumprod)
        for key, value in theirs.config.items():
            if key in ours.config:
                assert ours.config[key] == value, (name, key)
        assert ours.config["clip_sample"] == theirs.config.get("clip_sample", False)
        saved = Diffusion.from_config({**theirs.config, "_class_name": name})  # every key that such a file may have is known
        assert saved.config == ours.config


def test_timesteps_golden():
    t = make().timesteps(50)
    assert t[:3] == [981, 961, 941] and t[-2:] == [21, 1] and len(t) == 50
    assert make(timestep_spacing="trailing").timesteps(30)[:2] == [999, 966]
    assert make(timestep_spacing="trailing").timesteps(30)[-2:] == [66, 32]
    assert make(timestep_spacing="linspace").timesteps(25)[0] == 999 and make(timestep_spacing="linspace").timesteps(25)[-1] == 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_diffusers(spacing):
    ours, theirs = make(timestep_spacing=spacing), reference(timestep_spacing=spacing)
    for steps in range(1, 1000):
        theirs.set_timesteps(steps)  # with trailing it appends a stray -1 at some step counts, 61 for one
        assert ours.timesteps(steps) == theirs.timesteps.tolist()[:steps], steps


# ---- training ----

def test_add_noise_keeps_unit_variance_and_ends():
    d = make()
    x0, noise = batch(6, 4, 64, 64)
    t = torch.tensor([0, 10, 250, 500, 750, 999])
    x = d.add_noise(x0, noise, t)
    assert (x.flatten(1).var(1) - 1).abs().max() < 0.05  # 16384 values: 4 sigma is 0.044
    assert torch.allclose(x[0], x0[0], atol=0.2) and torch.allclose(x[5], noise[5], atol=0.4)
    scheduler = reference()
    assert torch.allclose(x, scheduler.add_noise(x0, noise, t), atol=1e-6)
    assert d.add_noise(x0.bfloat16(), noise.bfloat16(), t).dtype == torch.float32


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_target_inverts_to_x0_and_eps(prediction):
    d = make(prediction_type=prediction)
    x0, noise = batch(5, 4, 8, 8)
    t = torch.tensor([0, 100, 500, 900, 999])
    back, eps = d.to_x0_eps(d.target(x0, noise, t), d.add_noise(x0, noise, t), t)
    assert torch.allclose(back, x0, atol=1e-4) and torch.allclose(eps, noise, atol=1e-5)
    if prediction == "v_prediction":
        assert torch.allclose(d.target(x0, noise, t), reference().get_velocity(x0, noise, t), atol=1e-6)


def test_noise_and_v_models_that_say_the_same_agree():
    e, v = make(), make(prediction_type="v_prediction")
    x, eps = batch(3, 4, 8, 8)
    t = torch.tensor([5, 400, 800])
    x0, _ = e.to_x0_eps(eps, x, t)
    x0_v, eps_v = v.to_x0_eps(v.target(x0, eps, t), x, t)
    assert torch.allclose(x0_v, x0, atol=1e-4) and torch.allclose(eps_v, eps, atol=1e-4)


def test_loss_is_one_mean_square_per_sample():
    d = make()
    x0, noise = batch(3, 4, 8, 8)
    t = torch.tensor([3, 500, 999])
    assert torch.equal(d.loss(lambda x, t: noise, x0, t, noise), torch.zeros(3))
    off = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)
    assert torch.allclose(d.loss(lambda x, t: noise + off, x0, t, noise), torch.tensor([0.0, 1.0, 4.0]), atol=1e-5)
    seen = {}

    def model(x, t):
        seen.update(x=x, t=t)
        return (noise + off).bfloat16()
    assert d.loss(model, x0.bfloat16(), t, noise.bfloat16()).dtype == torch.float32
    assert d.loss(model, x0, t, noise).dtype == torch.float32
    assert torch.equal(seen["x"], d.add_noise(x0, noise, t)) and torch.equal(seen["t"], t)
    v = make(prediction_type="v_prediction")
    assert torch.allclose(v.loss(lambda x, t: v.target(x0, noise, t) + 1, x0, t, noise), torch.ones(3), atol=1e-5)


# ---- sampling ----

ZERO_SNR = dict(rescale_betas_zero_snr=True)
CASES = [(extra, prediction, eta) for eta in (0.0, 0.5, 1.0) for prediction in ("epsilon", "v_prediction")
         for extra in ({}, dict(set_alpha_to_one=True), dict(clip_sample=True), dict(clip_sample=True, clip_sample_range=2.0),
                       dict(beta_schedule="squaredcos_cap_v2", set_alpha_to_one=True, clip_sample=True), ZERO_SNR)
         # eps is refused there; at eta 1 diffusers takes the root of a rounding error below 0: see the test after this one
         if extra is not ZERO_SNR or prediction == "v_prediction" and eta < 1]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("extra, prediction, eta", CASES)
def test_ddim_trajectory_equals_diffusers(extra, prediction, eta, spacing):
    changes = dict(extra, timestep_spacing=spacing, prediction_type=prediction)
    scheduler, d = reference(**changes), make(**changes)
    for steps in (7, 20):
        scheduler.set_timesteps(steps)
        ours, theirs = [], []
        x = start = randn((2, 4, 8, 8), seeded([1, 2]))
        generators = seeded([3, 4])
        for t in scheduler.timesteps:
            out = scheduler.step(network(x, t.expand(2)), t, x, eta=eta, generator=generators)
            x = out.prev_sample
            theirs.append((int(t), x, out.pred_original_sample))
        last = ddim(d, network, start, steps, eta, generators=seeded([3, 4]), callback=lambda i, t, x, x0: ours.append((t, x, x0)))
        assert len(ours) == steps and torch.equal(last, ours[-1][1]) and last.isfinite().all()
        for (t, x, x0), (t_, x_, x0_) in zip(ours, theirs, strict=True):
            assert t == t_
            # relative to the size of the picture: x0 = (x - sigma eps) / sqrt(alpha_bar) is large at first
            assert (x - x_).abs().max() <= 1e-5 * max(1, x_.abs().max()), t
            assert (x0 - x0_).abs().max() <= 1e-5 * max(1, x0_.abs().max()), t


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_from_zero_snr_stays_finite(spacing):
    d = make(**ZERO_SNR, prediction_type="v_prediction", timestep_spacing=spacing)
    for steps in (7, 20):
        assert ddim(d, network, randn((2, 4, 8, 8), seeded([1, 2])), steps, 1.0, generators=seeded([3, 4])).isfinite().all()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_with_the_true_noise_returns_x0(prediction, spacing):
    d = make(prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=True)
    x0, noise = batch(2, 4, 8, 8)

    def oracle(x, t):
        signal, sigma = d._signal_noise(t, x)
        return d.target(x0, (x - signal * x0) / sigma, t)  # the noise that leads from x0 to this x
    x = d.add_noise(x0, noise, torch.full((2,), d.timesteps(20)[0]))
    for eta in (0.0, 1.0):
        assert torch.allclose(ddim(d, oracle, x, 20, eta, generators=seeded([0, 1])), x0, atol=1e-3)


def test_ddim_with_eta_zero_draws_nothing_and_keeps_no_graph():
    x, _ = batch(2, 4, 8, 8)
    generators, weight = seeded([0, 1]), torch.ones((), requires_grad=True)
    state = generators[0].get_state()
    out = ddim(make(), lambda x, t: weight * network(x, t), x, 5, generators=generators)
    assert torch.equal(generators[0].get_state(), state) and not out.requires_grad
    assert torch.equal(out, ddim(make(), network, x, 5))


REFERENCES = {"ddpm": "DDPMScheduler", "euler": "EulerDiscreteScheduler", "euler-a": "EulerAncestralDiscreteScheduler",
              "dpm++": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction, extra", [("epsilon", {}), ("v_prediction", {}), ("epsilon", dict(beta_schedule="squaredcos_cap_v2")),
                                               ("epsilon", dict(steps_offset=0)), ("v_prediction", ZERO_SNR)])
@pytest.mark.parametrize("sampler", ["ddpm", "euler", "euler-karras", "euler-a", "dpm++", "dpm++-karras"])
def test_trajectories_equal_diffusers(sampler, prediction, extra, spacing):
    """The scheduler and ours, built from one config; x as the model sees it."""
    diffusers = pytest.importorskip("diffusers")
    if sampler == "ddpm" and extra is ZERO_SNR:
        pytest.skip("diffusers divides by zero there")
    if sampler == "dpm++-karras" and "beta_schedule" in extra:
        pytest.skip("two steps share a timestep there, and diffusers loses count")
    name = REFERENCES[sampler.removesuffix("-karras")]
    config = dict(SD, **extra, prediction_type=prediction, timestep_spacing=spacing)
    if sampler.endswith("-karras"):
        config["use_karras_sigmas"] = True
    accepted = inspect.signature(getattr(diffusers, name).__init__).parameters
    scheduler = getattr(diffusers, name)(**{k: v for k, v in config.items() if k in accepted})
    d = Diffusion.from_config(dict(scheduler.config) | {"_class_name": name})
    assert d.sampler == sampler
    for steps in (6, 20):
        scheduler.set_timesteps(steps)
        ours, theirs, generators = [], [], seeded([3, 4])
        start = randn((2, 4, 8, 8), seeded([1, 2]))
        x = start * scheduler.init_noise_sigma

        def model(x, t):
            ours.append((t[0].item(), x))
            return network(x, t)
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t)
            theirs.append((t.item(), seen))
            arguments = dict(generator=generators) if "generator" in inspect.signature(scheduler.step).parameters else {}
            x = scheduler.step(network(seen, t.expand(2)), t, x, **arguments).prev_sample
        last = SAMPLERS[sampler](d, model, start, steps, generators=seeded([3, 4]))
        for (t, x_), (t_, seen) in zip(ours + [(0, last)], theirs + [(0, x)], strict=True):
            assert abs(t - t_) < 1e-2, (t, t_)
            # at zero SNR sigma starts at 4096, and diffusers takes differences of numbers of that size in fp32
            assert (x_ - seen).abs().max() <= (1e-5 if extra is not ZERO_SNR else 2e-4) * max(1, seen.abs().max()), t


LEARNED = dict(_class_name="DDPMScheduler", variance_type="learned_range", clip_sample=False)


@pytest.mark.parametrize("steps", [5, 50])
def test_a_learned_variance_is_sampled_as_diffusers_does(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler, start, generators = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False), batch(2, 3, 8, 8)[0], seeded([3, 4])

    def model(x, t):  # the second half stays within -1 and 1, mostly
        return torch.cat([network(x, t), torch.sin(3 * x)], dim=1)
    scheduler.set_timesteps(steps)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(2)), t, x, generator=generators).prev_sample
    ours = SAMPLERS["ddpm"](Diffusion.from_config(LEARNED), model, start, steps, generators=seeded([3, 4]))
    assert (ours - x).abs().max() <= 1e-5 * max(1, x.abs().max())
    plain = SAMPLERS["ddpm"](Diffusion.from_config(LEARNED | dict(variance_type="fixed_small")), network, start, steps, generators=seeded([3, 4]))
    assert (plain - x).abs().max() > 1e-2
    for name, sampler in SAMPLERS.items():  # the others read the noise alone
        if name != "ddpm":
            d = make()
            assert torch.equal(sampler(d, model, start, 5, generators=seeded([3, 4])), sampler(d, network, start, 5, generators=seeded([3, 4])))


def test_a_learned_variance_wants_the_channels_that_tell_it():
    with pytest.raises(UserError, match="learned_range wants a model with 8 output channels, this one has 4"):
        SAMPLERS["ddpm"](Diffusion.from_config(LEARNED), network, batch(1, 4, 8, 8)[0], 5)


def test_variance_loss_is_the_divergence_of_the_two_gaussians():
    from torch.distributions import Normal, kl_divergence
    d = Diffusion.from_config(LEARNED)
    x0, noise = (y.double() for y in batch(5, 3, 4, 4))
    x0, t = (0.5 * x0).clamp(-1, 1), torch.tensor([1, 2, 30, 500, 999])
    eps, v = noise + 0.1 * torch.randn_like(noise), 2 * torch.rand_like(noise) - 1
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    a = torch.cumprod(1 - betas, 0)
    a_prev, at, beta = a[t - 1].view(-1, 1, 1, 1), a[t].view(-1, 1, 1, 1), betas[t].view(-1, 1, 1, 1)
    x_t = at.sqrt() * x0 + (1 - at).sqrt() * noise
    posterior = beta * (1 - a_prev) / (1 - at)

    def mean(x):  # DDPM Eq. 7
        return a_prev.sqrt() * beta / (1 - at) * x + (1 - beta).sqrt() * (1 - a_prev) / (1 - at) * x_t
    var = beta ** ((v + 1) / 2) * posterior ** ((1 - v) / 2)  # improved DDPM Eq. 15
    x0_hat = (x_t - (1 - at).sqrt() * eps) / at.sqrt()
    kl = kl_divergence(Normal(mean(x0), posterior.sqrt()), Normal(mean(x0_hat), var.sqrt())).flatten(1).mean(1) / np.log(2)
    out = torch.cat([eps, v], dim=1).float().requires_grad_()
    got = d.variance_loss(out, x0.float(), x_t.float(), t)
    assert torch.allclose(got.double(), kl, rtol=5e-3, atol=1e-6)  # alpha_bar is fp32
    grad, = torch.autograd.grad(got.sum(), out)
    assert torch.count_nonzero(grad[:, :3]) == 0 and (grad[:3, 3:] != 0).all()  # the mean learns from the other loss


def test_variance_loss_at_t_0_is_the_likelihood_of_8_bit_pixels():
    d = Diffusion.from_config(LEARNED)
    levels = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)
    t, x_t = torch.zeros(256, dtype=torch.long), torch.full((256, 1, 1, 1), 0.3)
    bits = d.variance_loss(torch.zeros(256, 2, 1, 1), levels, x_t, t)
    assert abs((2 ** -bits).sum() - 1) < 1e-3  # over all values of a pixel, one
    assert bits.argmin() == (x_t[0] / d.alpha_bar[0].sqrt() + 1).mul(127.5).round().long()


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_returns_x0_from_the_true_noise(sampler):
    x0, noise = batch(2, 4, 8, 8)
    d = make(set_alpha_to_one=True)
    x, start = partway(d, x0, noise, 20, 1.0, sampler)
    seen = []

    def oracle(x, t):
        a = torch.tensor(np.interp(t[0].item(), np.arange(1000), (1 / d.alpha_bar - 1).sqrt().numpy())).float() ** -2
        signal = (a / (1 + a)).sqrt()  # a is the signal-to-noise ratio
        return (x - signal * x0) / (1 - signal ** 2).sqrt()
    # Karras's timesteps are rounded or interpolated in log sigma: there t does not tell sigma exactly
    out = SAMPLERS[sampler](d, oracle, x, 20, start=start, generators=seeded([0, 1]), callback=lambda i, t, x, x0: seen.append((i, t)))
    assert torch.allclose(out, x0, atol=0.05 if "karras" in sampler else 2e-3)
    assert [i for i, _ in seen] == list(range(20)) and [t for _, t in seen] == sorted((t for _, t in seen), reverse=True)


@pytest.mark.parametrize("strength, spacing", [(0.6, "leading"), (0.6, "linspace"), (1.0, "leading"), (1.0, "linspace"), (1.0, "trailing")])
@pytest.mark.parametrize("sampler", ["euler", "euler-a", "dpm++"])
def test_starting_from_a_picture_equals_diffusers(sampler, strength, spacing):
    diffusers = pytest.importorskip("diffusers")
    x0, noise = batch(2, 4, 8, 8)
    name = REFERENCES[sampler]
    scheduler = getattr(diffusers, name)(timestep_spacing=spacing, **{
        k: v for k, v in LATENTS.items() if k in ("beta_start", "beta_end", "beta_schedule", "steps_offset")})
    d = Diffusion.from_config(dict(scheduler.config) | {"_class_name": name})
    scheduler.set_timesteps(20)
    pipe = type("", (), dict(scheduler=scheduler))()
    timesteps, _ = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipe, 20, strength, "cpu")
    x, start = partway(d, x0, noise, 20, strength, sampler)
    first = []
    SAMPLERS[sampler](d, lambda x, t: first.append(x) or network(x, t), x, 20, start=start, generators=seeded([0, 1]))
    y = scheduler.add_noise(x0, noise, timesteps[:1].repeat(2))
    assert torch.allclose(first[0], scheduler.scale_model_input(y, timesteps[0]), atol=1e-5)
    for t in timesteps:
        y = scheduler.step(network(scheduler.scale_model_input(y, t), t.expand(2)), t, y, **(
            dict(generator=seeded([0, 1])) if sampler == "euler-a" else {})).prev_sample
        if sampler == "euler-a":  # the noise starts anew at every step here, so compare the first one
            break
    visited = []
    out = SAMPLERS[sampler](d, network, x, 20, start=start, generators=seeded([0, 1]), callback=lambda i, t, x, x0: visited.append((t, x)))
    assert [t for t, _ in visited] == pytest.approx(timesteps.tolist(), abs=1e-3)
    if sampler == "euler-a":
        out, y = visited[0][1], scheduler.scale_model_input(y, timesteps[1])
    assert torch.allclose(out, y, atol=1e-5)


@pytest.mark.parametrize("strength", [0.02, 0.3, 0.58, 0.75, 0.999, 1.0])
def test_partway_equals_diffusers_img2img(strength):
    diffusers = pytest.importorskip("diffusers")
    scheduler, d = reference(), make()
    x0, noise = batch(2, 4, 8, 8)
    for steps in (50, 64):
        scheduler.set_timesteps(steps)
        pipe = type("", (), dict(scheduler=scheduler))()
        timesteps, _ = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipe, steps, strength, "cpu")
        x, start = partway(d, x0, noise, steps, strength)
        visited = []
        ddim(d, network, x, steps, start=start, callback=lambda i, t, x, x0: visited.append(t))
        assert visited == timesteps.tolist()
        assert torch.allclose(x, scheduler.add_noise(x0, noise, timesteps[:1].repeat(2)), atol=1e-6)


# ---- guidance and noise ----

@pytest.mark.parametrize("branches", [2, 3])
def test_guidance_rescale_equals_diffusers(branches):
    pipelines = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    out = torch.randn(branches, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for rescale in (0.3, 1.0):
        theirs = pipelines.rescale_noise_cfg(guide(out, 7.5, 1.5), out[-1], rescale)
        assert torch.allclose(guide(out, 7.5, 1.5, rescale), theirs, atol=1e-5)


def test_guidance():
    out = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    none, image, both = out
    assert torch.equal(guide(out[:1], 7.5), none)
    assert torch.allclose(guide(out[:2], 1.0), image, atol=1e-6) and torch.equal(guide(out[:2], 0.0), none)
    assert torch.allclose(guide(out[:2], 7.5), none + 7.5 * (image - none))
    assert torch.allclose(guide(out), both, atol=1e-6) and torch.equal(guide(out, 0.0, 0.0), none)
    assert torch.allclose(guide(out, 0.0, 1.0), image, atol=1e-6)
    assert torch.allclose(guide(out, 7.5, 1.5), none + 7.5 * (both - image) + 1.5 * (image - none), atol=1e-5)
    for k in (2, 3):  # all channels are guided
        assert ((guide(out[:k], 3.0, 2.0) - out[k - 1]).abs().amax((0, 2, 3)) > 0.1).all()
    with pytest.raises(ValueError):
        guide(torch.zeros(4, 1, 4, 2, 2))


def test_a_picture_depends_on_its_own_seed_alone():
    shape, seeds = (3, 4, 8, 8), [7, 8, 9]
    together = randn(shape, seeded(seeds))
    for i, seed in enumerate(seeds):
        assert torch.equal(together[i:i + 1], randn((1, 4, 8, 8), seeded([seed])))
    g = seeded(seeds)
    whole = ddim(make(), network, randn(shape, g), 10, eta=1.0, generators=g)
    for i, seed in enumerate(seeds):
        g = seeded([seed])
        alone = ddim(make(), network, randn((1, 4, 8, 8), g), 10, eta=1.0, generators=g)
        assert torch.allclose(alone, whole[i:i + 1], atol=1e-6)
    with pytest.raises(ValueError):
        randn(shape, seeded([1]))
    pytest.importorskip("diffusers")
    from diffusers.utils.torch_utils import randn_tensor
    assert torch.equal(together, randn_tensor(shape, generator=seeded(seeds)))
    assert torch.equal(together[:1], randn_tensor((1, 4, 8, 8), generator=seeded(seeds)[0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_draws_the_same_picture():
    g, h, d = seeded([1, 2]), seeded([1, 2]), make()
    cpu = ddim(d, network, randn((2, 4, 8, 8), g), 20, eta=1.0, generators=g)
    gpu = ddim(make().to("cuda"), network, randn((2, 4, 8, 8), h, "cuda"), 20, eta=1.0, generators=h)
    assert gpu.is_cuda and torch.allclose(cpu, gpu.cpu(), atol=1e-4)
    x0, noise = (x.cuda() for x in batch(2, 4, 8, 8))
    assert d.loss(network, x0, torch.tensor([1, 900], device="cuda"), noise).is_cuda


# ---- refusals ----

@pytest.mark.parametrize("changes, word", [
    (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "FlowMatchEuler"), (dict(prediction_type="sample"), "prediction_type"),
    (dict(beta_schedule="sigmoid"), "beta_schedule"), (dict(timestep_spacing="karras"), "timestep_spacing"),
    (dict(thresholding=True), "thresholding"), (dict(variance_type="learned"), "variance_type"),
    (dict(use_karras_sigmas=True), "use_karras_sigmas"), (dict(snr_shift_scale=3.0), "snr_shift_scale"),
    (dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr"), (dict(trained_betas=[0.1, 0.2]), "trained_betas")])
def test_what_is_not_implemented_is_refused_by_name(changes, word):
    with pytest.raises(UserError, match=word):
        make(**changes)


def test_a_timestep_visited_twice_is_refused():
    for spacing in ("leading", "linspace"):
        with pytest.raises(UserError, match="twice"):
            SAMPLERS["dpm++"](make(timestep_spacing=spacing, steps_offset=0), network, torch.randn(1, 4, 8, 8), 1000)


def test_bad_numbers_are_refused_by_name():
    d, x = make(), torch.zeros(1, 4, 4, 4)
    for steps in (0, -1, 1001):
        with pytest.raises(UserError, match="steps"):
            d.timesteps(steps)
    with pytest.raises(UserError, match="steps_offset"):  # leading + 1 would ask for timestep 1000
        d.timesteps(1000)
    with pytest.raises(UserError, match="eta"):
        ddim(d, network, x, 5, eta=1.5)
    for strength in (0.0, -0.5, 0.01, 1.5):
        with pytest.raises(UserError, match="strength"):
            partway(d, x, x, 50, strength)


def test_weight_v_turns_the_loss_of_noise_into_the_loss_of_v():
    """The same network's error, measured in eps and in v (both from diffusers' conversions of x0)."""
    eps, v = (Diffusion.from_config(dict(SD, prediction_type=kind)) for kind in ("epsilon", "v_prediction"))
    x0, noise, t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 300, 700, 999])
    x_t, guess = eps.add_noise(x0, noise, t), noise + 0.1 * torch.randn_like(noise)
    as_x0, _ = eps.to_x0_eps(guess, x_t, t)
    as_v = v.target(as_x0, guess, t)
    loss_eps, loss_v = eps.loss(lambda x, t: guess, x0, t, noise), v.loss(lambda x, t: as_v, x0, t, noise)
    assert torch.allclose(loss_eps * eps.weight(t, "v"), loss_v, rtol=1e-3)
    assert torch.equal(eps.weight(t), torch.ones(4)) and torch.equal(v.weight(t, "v"), torch.ones(4))


@pytest.mark.parametrize("zero_snr", [False, True])
def test_loss_weights_are_the_papers(zero_snr):
    """Against the formulas in terms of snr, as diffusers' compute_snr gives it; nothing is NaN where the last step has none."""
    training_utils, scheduling = pytest.importorskip("diffusers.training_utils"), pytest.importorskip("diffusers")
    config = dict(LATENTS, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction")
    ours, t = Diffusion.from_config(config), torch.tensor([0, 100, 500, 900, 999])
    scheduler = scheduling.DDIMScheduler(**config)
    snr = training_utils.compute_snr(scheduler, t)
    least = torch.minimum(snr, torch.full_like(snr, 5.0))
    assert torch.allclose(ours.weight(t, "min-snr"), least / (snr + 1), rtol=1e-3, atol=1e-6)
    assert torch.allclose(ours.weight(t, "p2"), snr / (snr + 1) ** 2, rtol=1e-3, atol=1e-6)
    if not zero_snr:
        eps = Diffusion.from_config(dict(config, prediction_type="epsilon", rescale_betas_zero_snr=False))
        assert torch.allclose(eps.weight(t, "min-snr"), least / snr, rtol=1e-3)
        assert torch.allclose(eps.weight(t, "p2"), 1 / (1 + snr), rtol=1e-3)


def test_uncertainty_weights_equal_the_papers_sum_and_learn_to_balance():
    weight, t = UncertaintyWeight(1000), torch.arange(0, 1000, 25)          # five samples in each of eight clusters
    losses = torch.rand(40) + torch.arange(40)
    with torch.no_grad():
        weight.s.copy_(torch.randn(8))
    means = losses.view(8, 5).mean(1) / 8
    assert torch.allclose(weight(losses, t).mean(), (0.5 * (torch.exp(-weight.s) * means + weight.s)).sum())
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        weight(losses, t).mean().backward()
        optimizer.step()
    assert torch.allclose(torch.exp(weight.s), means, rtol=0.05)            # where the derivative vanishes
    assert weight(losses[:3], t[:3]).shape == (3,)
