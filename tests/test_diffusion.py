"""diffusion.py beside diffusers' schedulers, the papers' formulas and its own algebra."""
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch.distributions import Normal, kl_divergence

import diffusion
from diffusion import (CORRECTIONS, SAMPLERS, STEPPING, Diffusion, UncertaintyWeight, ddim,
                       exact_noise, guide, partway, randn, sample_paths, seeded)
from conftest import ROOT, call
from hub import UserError
from sample import generate, load_model

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", trained_betas=None)
SD = dict(BETAS, num_train_timesteps=1000, clip_sample=False, set_alpha_to_one=False,
          skip_prk_steps=True, steps_offset=1)
SPACINGS = ("leading", "linspace", "trailing")
V = dict(prediction_type="v_prediction")
ZERO_SNR = dict(V, rescale_betas_zero_snr=True)
COSINE = dict(beta_schedule="squaredcos_cap_v2")
LEARNED = dict(_class_name="DDPMScheduler", variance_type="learned_range", clip_sample=False)
CLASSES = dict(zip(["ddim", "ddpm", "pndm", "euler", "euler-a", "dpm++"], diffusion.CLASSES))
START = randn((2, 4, 8, 8), seeded([1, 2]))


def make(**changes):
    return Diffusion.from_config({**SD, "_class_name": "PNDMScheduler", **changes})


def class_of(sampler):
    return CLASSES[sampler.removesuffix("-karras")]


def network(x, t):
    """Stands for a U-Net: smooth in x, different at each t, of unit size."""
    return torch.tanh(0.7 * x.roll(1, -1) - 0.2 * x + torch.sin(t.float() / 90).view(-1, 1, 1, 1))


def learned(x, t):
    """Stands for one that tells the variance too."""
    return torch.cat([network(x, t), torch.sin(3 * x)], dim=1)


def batch(*shape):
    return torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))


def theirs(scheduler, x, timesteps, model=network, **options):
    """diffusers' loop -> (t, the next x as a model sees it, x0 if there is one) of each step."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = seeded([3, 4])
    inputs = []
    x0s = []
    for t in timesteps:
        inputs.append(scheduler.scale_model_input(x, t))
        step = scheduler.step(model(inputs[-1], t.expand(2)), t, x, **options)
        x0s.append(getattr(step, "pred_original_sample", None))
        x = step.prev_sample
    steps = list(zip(timesteps.tolist(), inputs[1:] + [x], x0s))
    if type(scheduler).__name__ == "PNDMScheduler" and len(steps) > 1:
        # It makes its first step twice, and only the second attempt counts.
        steps[:2] = [(steps[0][0], *steps[1][1:])]
    return steps


def ours(sampler, d, x, steps, model=network, **options):
    """The same of ours."""
    seen = []
    last = SAMPLERS[sampler](d, model, x, steps, generators=seeded([3, 4]), **options,
                             callback=lambda i, *step: seen.append(step))
    assert torch.equal(last, seen[-1][1]) and last.isfinite().all()
    return seen


def assert_same(ours, theirs, tolerance=1e-5):
    for (t, *pictures), (t_, *expected) in zip(ours, theirs, strict=True):
        assert abs(t - t_) < 1e-2
        for x, x_ in zip(pictures, expected):
            # relative to the size of the picture: x0 is large at first
            assert x_ is None or (x - x_).abs().max() <= tolerance * max(1, x_.abs().max()), t


def assert_alike(sampler, d, scheduler, steps=9, model=network, tolerance=1e-5, **options):
    scheduler.set_timesteps(steps)
    noise = START * scheduler.init_noise_sigma
    expected = theirs(scheduler, noise, scheduler.timesteps, model, **options)
    assert_same(ours(sampler, d, START, steps, model, **options), expected, tolerance)


# ---- the schedule ----

def test_golden_values_of_stable_diffusion():
    a = make().alpha_bar
    assert a.shape == (1000,) and a.dtype == torch.float32
    assert torch.allclose(a[[0, 500, 999]], torch.tensor([0.99914998, 0.27633247, 0.00466010]))
    zero = make(**ZERO_SNR).alpha_bar
    assert torch.allclose(zero[[0, 500]], torch.tensor([0.99914998, 0.24101855]), atol=1e-6)
    assert zero[999] == 0
    t = make().timesteps(50)
    assert t[:3] == [981, 961, 941] and t[-2:] == [21, 1] and len(t) == 50
    assert make(timestep_spacing="trailing").timesteps(30)[-2:] == [66, 32]
    assert make(timestep_spacing="linspace").timesteps(25)[0] == 999


@pytest.mark.parametrize("changes", [
    {}, dict(beta_schedule="linear"), COSINE, dict(num_train_timesteps=100), ZERO_SNR,
    dict(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3)])
def test_schedules_equal_diffusers(changes):
    scheduler = diffusers.DDIMScheduler.from_config({**SD, **changes})
    assert torch.allclose(make(**changes).alpha_bar, scheduler.alphas_cumprod, 1e-5, 1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_diffusers(spacing):
    d = make(timestep_spacing=spacing)
    scheduler = diffusers.DDIMScheduler.from_config({**SD, "timestep_spacing": spacing})
    for steps in range(1, 1000):
        scheduler.set_timesteps(steps)  # with trailing it appends a stray -1 at some step counts
        assert d.timesteps(steps) == scheduler.timesteps.tolist()[:steps], steps


@pytest.mark.parametrize("name", list(CLASSES.values())[:5])
def test_absent_keys_take_the_defaults_of_the_class(name):
    scheduler = getattr(diffusers, name)()
    d = Diffusion.from_config({"_class_name": name})
    assert torch.equal(d.alpha_bar, scheduler.alphas_cumprod)
    for key, value in scheduler.config.items():
        assert d.config.get(key, value) == value, key
    assert d.config["clip_sample"] == scheduler.config.get("clip_sample", False)
    # A file that diffusers saved holds every key there is.
    assert Diffusion.from_config({**scheduler.config, "_class_name": name}).config == d.config


# Scheduler files of released models, with keys that older classes left behind: the class, the file,
# and what our samplers lack for it, or None if they draw diffusers' picture.
EPS = dict(prediction_type="epsilon")
XL = dict(SD, **EPS, interpolation_type="linear", sample_max_value=1.0, use_karras_sigmas=False,
          timestep_spacing="leading")
DPM = dict(BETAS, algorithm_type="dpmsolver++", dynamic_thresholding_ratio=0.995, solver_order=2,
           lambda_min_clipped=-np.inf, lower_order_final=True, sample_max_value=1.0, steps_offset=1,
           solver_type="midpoint", thresholding=False, use_karras_sigmas=True, variance_type=None)
PLAIN_DPM = dict(DPM, use_karras_sigmas=False)
TRAILING = dict(timestep_spacing="trailing")
FIRST = dict(BETAS, num_train_timesteps=1000, timestep_values=None, tensor_format="pt")
RELEASED = {
    "sd-v1-1 as first released": ("pndm", dict(FIRST, skip_prk_steps=True), None),
    "sd-image-variations": ("pndm", dict(BETAS, skip_prk_steps=True), None),
    "stable-diffusion-v1-5": ("pndm", SD, None),
    "stable-diffusion-2-1-base": ("pndm", dict(SD, **EPS, timestep_spacing="leading"), None),
    "saved from a DDIM that clips": ("pndm", dict(SD, clip_sample=True, steps_offset=0), None),
    "pndm, trailing": ("pndm", dict(SD, **TRAILING), None),
    "pndm, linspace": ("pndm", dict(SD, timestep_spacing="linspace"), None),
    "pndm, v": ("pndm", dict(SD, **V), None),
    "pndm with its warm-up": ("pndm", FIRST, "skip_prk_steps = False"),
    "the first DDIM files": ("ddim", dict(FIRST, clip_sample=True), None),
    "stable-diffusion-inpainting": ("ddim", SD, None),
    "stable-diffusion-2-1": ("ddim", dict(SD, **V), None),
    "v and zero SNR": ("ddim", dict(SD, **ZERO_SNR, **TRAILING), None),
    "DreamBooth": (
        "ddpm", dict(SD, clip_sample_range=1.0, variance_type="fixed_small"), None),
    "ddpm, predict_epsilon": ("ddpm", dict(FIRST, clip_sample=True, predict_epsilon=True), None),
    "ddpm, large variance": ("ddpm", dict(SD, variance_type="fixed_large"), None),
    "ddpm, large variance, trailing": (
        "ddpm", dict(SD, variance_type="fixed_large", **TRAILING), None),
    "stable-diffusion-xl-base-1.0": ("euler", XL, None),
    "sd-turbo": ("euler", dict(BETAS, **EPS, **TRAILING, steps_offset=1, sigma_max=None,
                               sigma_min=None, timestep_type="discrete", final_sigmas_type="zero",
                               rescale_betas_zero_snr=False, use_karras_sigmas=False), None),
    "euler, v and zero SNR": ("euler", dict(XL, **TRAILING) | ZERO_SNR, None),
    "euler, karras": ("euler", dict(XL, use_karras_sigmas=True), None),
    "euler, nothing but betas": ("euler", BETAS, None),
    "euler that stops early": ("euler", dict(XL, final_sigmas_type="sigma_min"),
                               "final_sigmas_type = 'sigma_min'"),
    "sdxl-turbo": ("euler-a", dict(XL, **TRAILING), None),
    "instruct-pix2pix": ("euler-a", dict(SD, **EPS), None),
    "euler-a, v": ("euler-a", dict(SD, **V, timestep_spacing="linspace"), None),
    "dpm++, karras": ("dpm++", DPM, None),
    "dpm++": ("dpm++", PLAIN_DPM, None),
    "dpm++, euler_at_final": (
        "dpm++", dict(PLAIN_DPM, euler_at_final=True, lower_order_final=False), None),
    "dpm++, v and trailing": ("dpm++", dict(PLAIN_DPM, **V, **TRAILING), None),
    "dpm++ after UniPC": (
        "dpm++", dict(PLAIN_DPM, solver_type="bh2", predict_x0=True, disable_corrector=[]), None),
    "dpm++, stochastic": ("dpm++", dict(PLAIN_DPM, algorithm_type="sde-dpmsolver++"),
                          "algorithm_type = 'sde-dpmsolver++'"),
    "dpm++ that stops early": ("dpm++", dict(PLAIN_DPM, final_sigmas_type="sigma_min"),
                               "final_sigmas_type = 'sigma_min'"),
    "dpm++ of first order": ("dpm++", dict(PLAIN_DPM, solver_order=1), "solver_order = 1"),
    "dpm++ of third order": ("dpm++", dict(PLAIN_DPM, solver_order=3), "solver_order = 3"),
    "waifu-diffusion": ("LMSDiscreteScheduler", FIRST, "LMSDiscreteScheduler"),
    "stable-diffusion-2-1 for Flax": ("FlaxDDIMScheduler", dict(SD, **V), "FlaxDDIMScheduler"),
    "UniPC": ("UniPCMultistepScheduler", BETAS, "UniPCMultistepScheduler"),
    "LCM": ("LCMScheduler", dict(SD, timestep_scaling=10.0), "LCMScheduler"),
}


@pytest.mark.parametrize("model", RELEASED)
def test_files_of_released_models_draw_as_in_diffusers(model):
    sampler, file, missing = RELEASED[model]
    name = CLASSES.get(sampler, sampler)
    d = Diffusion.from_config({**file, "_class_name": name})
    assert d.missing == (missing or "") and bool(d.sampler) != bool(missing)
    if not missing:
        sampler += "-karras" if file.get("use_karras_sigmas") else ""
        assert d.sampler == sampler
        tolerance = 2e-4 if file.get("rescale_betas_zero_snr") else 1e-5    # sigma starts at 4096
        assert_alike(sampler, d, getattr(diffusers, name).from_config(file), tolerance=tolerance)


@pytest.fixture(scope="module")
def tiny():
    """The miniature, here and in diffusers, and what to set for it to predict the noise."""
    folder = ROOT / "assets" / "tiny"
    model = load_model(folder)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    alpha_bar = make().alpha_bar.numpy()
    eps = [False]

    def predict_eps(module, args, out):
        """Turn the network's v into eps, or a file that says epsilon would draw noise."""
        if not eps[0]:
            return out
        x, t = args[:2]
        level = torch.tensor(np.interp(t.reshape(-1)[:1], np.arange(1000), alpha_bar)).float()
        v = out if torch.is_tensor(out) else out[0]
        v = level.sqrt() * v + (1 - level).sqrt() * x
        return v if torch.is_tensor(out) else (v,)

    for network in (model.unet, pipe.unet):
        network.register_forward_hook(predict_eps)
    return model, pipe, eps


SLOW = RELEASED.keys() - {"sd-v1-1 as first released", "stable-diffusion-v1-5", "sdxl-turbo",
                          "stable-diffusion-2-1", "stable-diffusion-xl-base-1.0", "dpm++, karras"}
DRAWN = [pytest.param(model, marks=pytest.mark.slow) if model in SLOW else model
         for model, (_, _, missing) in RELEASED.items() if not missing]


@pytest.mark.parametrize("model", DRAWN)
@pytest.mark.filterwarnings("ignore")
def test_released_models_draw_the_picture_of_diffusers_pipeline(tiny, model):
    sampler, file, _ = RELEASED[model]
    ours, pipe, eps = tiny
    eps[0] = file.get("prediction_type") != "v_prediction"
    scheduler = {**file, "_class_name": CLASSES[sampler], **CORRECTIONS["StableDiffusionPipeline"]}
    ours = dataclasses.replace(ours, scheduler=scheduler)
    scheduler = getattr(diffusers, CLASSES[sampler]).from_config(file)
    pipe = diffusers.StableDiffusionPipeline(**{**pipe.components, "scheduler": scheduler},
                                             requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    for steps in (1, 2, 5, 20) if model in SLOW else (1, 2, 5):
        theirs = pipe("red apple, google style", num_inference_steps=steps, guidance_scale=3.0,
                      generator=torch.Generator().manual_seed(3)).images[0]
        picture = generate(ours, "t2i", "red apple, google style", guidance=3.0, steps=steps,
                           seed=3)[0]
        difference = np.subtract(picture, theirs, dtype=int)
        assert abs(difference).max() <= 1, steps


@pytest.mark.parametrize("name", ["UniPCMultistep", "DEISMultistep", "DPMSolverSinglestep", "TCD",
                                  "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "LCM"])
def test_of_a_class_that_is_not_implemented_the_process_counts(name):
    file = dict(getattr(diffusers, name + "Scheduler")(**BETAS, **V).config)
    del file["_use_default_values"]
    d = Diffusion.from_config({**file, "_class_name": name + "Scheduler"})
    assert d.sampler is None and d.config["prediction_type"] == "v_prediction"
    scheduler = diffusers.DDIMScheduler.from_config({**file, "clip_sample": False})
    assert_alike("ddim", d, scheduler)


@pytest.mark.parametrize("name", CLASSES.values())
def test_every_key_that_counts_in_diffusers_counts_here(name):
    """A new key of a later version has to be thought about."""
    keys = inspect.signature(getattr(diffusers, name)).parameters.keys()
    # Of thresholding and of flows, which are refused; and of DPM++'s last step, which ends at
    # sigma = 0 and so is of first order in any case.
    idle = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type",
            "use_dynamic_shifting", "lower_order_final", "euler_at_final"}
    assert keys <= {*diffusion.DEFAULTS, *diffusion.PROCESS, *STEPPING, *idle}


@pytest.mark.parametrize("key", STEPPING)
def test_of_another_way_of_stepping_the_process_counts(key):
    file = dict(DPM, _class_name="DPMSolverMultistepScheduler")
    other = Diffusion.from_config({**file, key: "other"})
    assert other.sampler is None and torch.equal(other.alpha_bar, make().alpha_bar)
    assert other.missing == f"{key} = 'other'"
    as_text = Diffusion.from_config({**file, "lambda_min_clipped": "-Infinity"})
    assert as_text.sampler == "dpm++-karras"


QUICK = ["StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionXLPipeline",
         "StableDiffusionInstructPix2PixPipeline"]
REST = sorted(CORRECTIONS.keys() - {*QUICK, "DDIMPipeline"})


@pytest.mark.parametrize("name", QUICK + [pytest.param(x, marks=pytest.mark.slow) for x in REST])
@pytest.mark.filterwarnings("ignore")
def test_old_files_are_corrected_as_by_diffusers_pipelines(name):
    """What a constructor changes in the scheduler's config stands in CORRECTIONS."""
    rooms = ["deprecated.stable_diffusion_safe", "deprecated.stable_diffusion_variants",
             "deprecated.alt_diffusion"]
    rooms = [importlib.import_module(f"diffusers.pipelines.{room}") for room in rooms]
    kind = next(getattr(room, name) for room in (diffusers, *rooms) if hasattr(room, name))
    parts = dict.fromkeys(kind._get_signature_keys(kind)[0])
    changes = CORRECTIONS.get(name, {})
    for file in ({}, dict(clip_sample=True, steps_offset=3), dict(steps_offset=1)):
        for scheduler in (diffusers.DDIMScheduler(**file), diffusers.PNDMScheduler()):
            before = dict(scheduler.config)
            after = kind(**parts | dict(scheduler=scheduler)).scheduler.config
            expected = {**before, **{key: changes[key] for key in changes if key in before}}
            assert {key: after[key] for key in before} == expected


def test_no_other_pipeline_of_diffusers_corrects_a_scheduler():
    """By their source. ONNX's and LEDITS++'s folders hold no weights of ours."""
    found = set()
    for file in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        classes = re.split(r"^class (\w+)", file.read_text(), flags=re.M)[1:]
        for name, body in zip(classes[::2], classes[1::2]):
            keys = re.findall(r'new_config\["(\w+)"\]', body)
            if {"steps_offset", "clip_sample", "skip_prk_steps"} & {*keys}:
                found.add(name)
    found = {name for name in found if not name.startswith(("Onnx", "LEdits"))}
    assert found == CORRECTIONS.keys() - {"DDIMPipeline"}


def test_on_pixels_ddims_pipeline_always_steps_by_ddim():
    scheduler = diffusers.DDPMScheduler(beta_end=0.01)
    expected = diffusers.DDIMPipeline(None, scheduler).scheduler.config
    file = {**scheduler.config, "_class_name": "DDPMScheduler", **CORRECTIONS["DDIMPipeline"]}
    d = Diffusion.from_config(file)
    assert d.sampler == "ddim"
    assert all(d.config[key] == value for key, value in expected.items() if key in d.config)


@pytest.mark.parametrize("changes, word", [
    (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "FlowMatchEuler"),
    (dict(prediction_type="sample"), "prediction_type"),
    (dict(beta_schedule="sigmoid"), "beta_schedule"),
    (dict(timestep_spacing="karras"), "timestep_spacing"),
    (dict(thresholding=True), "thresholding"),
    (dict(variance_type="learned"), "variance_type"),
    (dict(use_karras_sigmas=True), "use_karras_sigmas"),
    (dict(snr_shift_scale=3.0), "snr_shift_scale"),
    (dict(timestep_type="continuous"), "timestep_type"),
    (dict(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True), "use_flow_sigmas"),
    (dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    (dict(trained_betas=[0.1, 0.2]), "trained_betas"),
    (dict(beta_end=1.5), "between 0 and 1"),
    (dict(beta_start="a"), "scheduler config"),
    (dict(steps_offset=1000), "steps_offset")])
def test_what_is_not_implemented_is_refused_by_name(changes, word):
    with pytest.raises(UserError, match=word):
        make(**changes)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler",
                                  "UniPCMultistepScheduler"])
def test_another_class_must_state_its_betas(name):
    with pytest.raises(UserError, match=name):
        Diffusion.from_config(dict(_class_name=name, num_train_timesteps=1000, shift=3.0))


# ---- what the network predicts, and the loss ----

def test_add_noise_keeps_unit_variance_and_ends():
    x0, noise = batch(6, 4, 64, 64)
    t = torch.tensor([0, 10, 250, 500, 750, 999])
    x = make().add_noise(x0, noise, t)
    assert (x.flatten(1).var(1) - 1).abs().max() < 0.05  # 16384 values: 4 sigma is 0.044
    assert torch.allclose(x[0], x0[0], atol=0.2) and torch.allclose(x[5], noise[5], atol=0.4)
    scheduler = diffusers.DDIMScheduler.from_config(SD)
    assert torch.allclose(x, scheduler.add_noise(x0, noise, t), atol=1e-6)
    v = make(**V).target(x0, noise, t)
    assert torch.allclose(v, scheduler.get_velocity(x0, noise, t), atol=1e-6)
    assert make().add_noise(x0.bfloat16(), noise.bfloat16(), t).dtype == torch.float32


@pytest.mark.parametrize("changes", [{}, V])
def test_error_is_one_mean_square_per_sample(changes):
    d = make(**changes)
    x0, noise = batch(3, 4, 8, 8)
    t = torch.tensor([3, 500, 999])
    target = d.target(x0, noise, t)
    back, eps = d.to_x0_eps(target, d.add_noise(x0, noise, t), t)
    assert torch.allclose(back, x0, atol=1e-4) and torch.allclose(eps, noise, atol=1e-5)
    out = target + torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)
    error = d.error(out, x0, noise, t)
    assert torch.equal(d.error(target, x0, noise, t), torch.zeros(3))
    assert torch.allclose(error, torch.tensor([0.0, 1.0, 4.0]), atol=1e-5)
    assert torch.equal(d.loss(out, x0, noise, t), error)
    assert torch.equal(d.error(torch.cat([out, x0], dim=1), x0, noise, t), error)
    half = d.error(out.bfloat16(), x0.bfloat16(), noise.bfloat16(), t)
    assert half.dtype == torch.float32 and torch.allclose(half, error, atol=0.05)


@pytest.mark.parametrize("weighting", ["none", "min-snr"])
def test_loss_is_the_weighted_error_and_a_thousandth_of_the_bound(weighting):
    """Improved DDPM Eq. 16; an UncertaintyWeight weights both, as in DTR's official code."""
    d = Diffusion.from_config(dict(LEARNED, num_train_timesteps=500))
    x0, noise = batch(4, 3, 8, 8)
    t = torch.tensor([0, 60, 250, 499])
    x_t = d.add_noise(x0, noise, t)
    out = learned(x_t, t)
    error = d.error(out, x0, noise, t)
    weighted = d.weight(t, weighting) * error
    bound = 0.001 * 500 * d.variance_loss(out, x0, x_t, t)
    assert torch.allclose(d.loss(out, x0, noise, t, weighting), weighted + bound)
    assert torch.allclose(d.loss(out[:, :3], x0, noise, t, weighting), weighted)
    uncertainty = UncertaintyWeight(500)
    with torch.no_grad():
        uncertainty.s.copy_(torch.linspace(-1, 1, 8))
    loss = d.loss(out, x0, noise, t, uncertainty=uncertainty)
    assert torch.allclose(loss, uncertainty(error + bound, t))


@pytest.mark.parametrize("zero_snr", [False, True])
def test_loss_weights_are_the_papers(zero_snr):
    """In terms of snr, as diffusers computes it; nothing is NaN where the last step has none."""
    config = dict(SD, **V, rescale_betas_zero_snr=zero_snr)
    t = torch.tensor([0, 100, 500, 900, 999])
    snr = compute_snr(diffusers.DDIMScheduler.from_config(config), t)
    least = snr.clamp(max=5)
    v = Diffusion.from_config(config)
    assert torch.allclose(v.weight(t, "min-snr"), least / (snr + 1), rtol=1e-3, atol=1e-6)
    assert torch.allclose(v.weight(t, "p2"), snr / (snr + 1) ** 2, rtol=1e-3, atol=1e-6)
    if not zero_snr:
        assert torch.allclose(make().weight(t, "min-snr"), least / snr, rtol=1e-3)
        assert torch.allclose(make().weight(t, "p2"), 1 / (1 + snr), rtol=1e-3)


def test_uncertainty_weights_equal_the_papers_sum_and_learn_to_balance():
    weight = UncertaintyWeight(1000)
    t = torch.arange(0, 1000, 25)  # five samples in each of eight clusters
    losses = torch.rand(40) + torch.arange(40)
    with torch.no_grad():
        weight.s.copy_(torch.randn(8))
    means = losses.view(8, 5).mean(1) / 8
    expected = (0.5 * (torch.exp(-weight.s) * means + weight.s)).sum()
    assert torch.allclose(weight(losses, t).mean(), expected)
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        weight(losses, t).mean().backward()
        optimizer.step()
    assert torch.allclose(torch.exp(weight.s), means, rtol=0.05)  # where the derivative vanishes
    assert weight(losses[:3], t[:3]).shape == (3,)


# ---- a learned variance ----

def test_variance_loss_is_the_divergence_of_the_two_gaussians():
    x0, noise = batch(5, 3, 4, 4).double()
    x0 = (0.5 * x0).clamp(-1, 1)
    t = torch.tensor([1, 2, 30, 500, 999])
    eps = noise + 0.1 * torch.randn_like(noise)
    v = 2 * torch.rand_like(noise) - 1
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    a = torch.cumprod(1 - betas, 0)
    a_prev, at, beta = (y.view(-1, 1, 1, 1) for y in (a[t - 1], a[t], betas[t]))
    x_t = at.sqrt() * x0 + (1 - at).sqrt() * noise

    def gaussian(x, variance):  # DDPM Eq. 7
        of_x_t = (1 - beta).sqrt() * (1 - a_prev) / (1 - at)
        return Normal(a_prev.sqrt() * beta / (1 - at) * x + of_x_t * x_t, variance.sqrt())
    posterior = beta * (1 - a_prev) / (1 - at)
    variance = beta ** ((v + 1) / 2) * posterior ** ((1 - v) / 2)  # improved DDPM Eq. 15
    x0_hat = (x_t - (1 - at).sqrt() * eps) / at.sqrt()
    kl = kl_divergence(gaussian(x0, posterior), gaussian(x0_hat, variance)).flatten(1).mean(1)
    out = torch.cat([eps, v], dim=1).float().requires_grad_()
    got = Diffusion.from_config(LEARNED).variance_loss(out, x0.float(), x_t.float(), t)
    assert torch.allclose(got.double(), kl / np.log(2), rtol=5e-3, atol=1e-6)  # alpha_bar is fp32
    grad, = torch.autograd.grad(got.sum(), out)
    assert torch.count_nonzero(grad[:, :3]) == 0  # the mean learns from the error
    assert (grad[:3, 3:] != 0).all()


def test_variance_loss_at_t_0_is_the_likelihood_of_8_bit_pixels():
    d = Diffusion.from_config(LEARNED)
    levels = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)
    x_t = torch.full((256, 1, 1, 1), 0.3)
    bits = d.variance_loss(torch.zeros(256, 2, 1, 1), levels, x_t, torch.zeros(256).long())
    p = 2 ** -bits
    assert abs(p.sum() - 1) < 1e-3  # over all values of a pixel
    mean = x_t[0].squeeze() / d.alpha_bar[0].sqrt()
    assert bits.argmin() == (127.5 * (mean + 1)).round().long()
    # The least variance is the posterior's of t = 1; v = 0 is half way to beta, in the logarithm.
    beta, beta_1 = 0.0001, 0.0001 + 0.0199 / 999
    least = beta_1 * beta / (beta + beta_1)
    width = (2 / 255) ** 2 / 12
    variance = (p * (levels.squeeze() - mean) ** 2).sum()
    assert abs(variance - (least * beta) ** 0.5 - width) < 1e-6


@pytest.mark.parametrize("steps", [5, 50])
def test_a_learned_variance_is_sampled_as_in_diffusers(steps):
    scheduler = diffusers.DDPMScheduler.from_config(LEARNED)
    d = Diffusion.from_config(LEARNED)
    assert_alike("ddpm", d, scheduler, steps, learned)
    fixed = Diffusion.from_config(dict(LEARNED, variance_type="fixed_small"))
    fixed = ours("ddpm", fixed, START, steps)
    assert (fixed[-1][1] - ours("ddpm", d, START, steps, learned)[-1][1]).abs().max() > 1e-2
    for sampler in SAMPLERS.keys() - {"ddpm"}:  # the others read the noise alone
        assert_same(ours(sampler, make(), START, 5, learned), ours(sampler, make(), START, 5), 0)
    with pytest.raises(UserError, match="learned_range needs .* 8 output channels; .* has 4"):
        ours("ddpm", d, START, steps)


# ---- samplers ----

CASES = [("ddim", extra | prediction, eta) for eta in (0.0, 0.5, 1.0) for prediction in ({}, V)
         for extra in ({}, dict(set_alpha_to_one=True), dict(clip_sample=True),
                       dict(clip_sample=True, clip_sample_range=2.0),
                       dict(COSINE, set_alpha_to_one=True, clip_sample=True))]
CASES += [("ddim", ZERO_SNR, eta) for eta in (0.0, 0.5, 1.0)]
CASES += [(sampler, extra, None) for sampler in list(SAMPLERS)[1:]
          for extra in ({}, V, COSINE, dict(steps_offset=0), ZERO_SNR)]
# diffusers is wrong there: it takes the root of a rounding error below 0, it divides by zero, it
# loses count where two steps share a timestep, and its PNDM passes over rescale_betas_zero_snr.
BROKEN = [("ddim", ZERO_SNR, 1.0), ("ddpm", ZERO_SNR, None), ("dpm++-karras", COSINE, None),
          ("pndm", ZERO_SNR, None)]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler, extra, eta", CASES)
def test_trajectories_equal_diffusers(sampler, extra, eta, spacing):
    """The scheduler and ours, built from one config, step by step."""
    name = class_of(sampler)
    karras = sampler.endswith("-karras")
    config = dict(SD, **{"timestep_spacing": spacing, "use_karras_sigmas": karras, **extra})
    scheduler = getattr(diffusers, name).from_config(config)
    d = Diffusion.from_config({**scheduler.config, "_class_name": name})
    assert d.sampler == sampler
    options = {} if eta is None else dict(eta=eta)
    # At zero SNR sigma starts at 4096, and diffusers takes differences of such numbers in fp32.
    tolerance = 2e-4 if extra is ZERO_SNR and sampler != "ddim" else 1e-5
    for steps in (7, 20):
        if (sampler, extra, eta) in BROKEN:
            ours(sampler, d, START, steps, **options)  # is finite
        else:
            assert_alike(sampler, d, scheduler, steps, tolerance=tolerance, **options)


@pytest.mark.parametrize("sampler, strength, spacing", [
    *[("ddim", strength, "leading") for strength in (0.02, 0.3, 0.58, 0.75, 0.999, 1.0)],
    *[(sampler, strength, spacing) for sampler in ("euler", "euler-a", "dpm++")
      for strength in (0.6, 1.0) for spacing in SPACINGS]])
def test_starting_from_a_picture_equals_diffusers(sampler, strength, spacing):
    x0, noise = batch(2, 4, 8, 8)
    name = class_of(sampler)
    for steps in (50, 64):
        scheduler = getattr(diffusers, name).from_config({**SD, "timestep_spacing": spacing})
        scheduler.set_timesteps(steps)
        d = Diffusion.from_config({**scheduler.config, "_class_name": name})
        timesteps, _ = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(
            SimpleNamespace(scheduler=scheduler), steps, strength, "cpu")
        x, start = partway(d, x0, noise, steps, strength, sampler)
        y = scheduler.add_noise(x0, noise, timesteps[:1].repeat(2))
        expected = theirs(scheduler, y, timesteps)
        assert_same(ours(sampler, d, x, steps, start=start), expected)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("changes", [{}, V])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_returns_x0_from_the_true_noise(sampler, changes, spacing):
    x0, noise = batch(2, 4, 8, 8)
    d = make(set_alpha_to_one=True, timestep_spacing=spacing, **changes)
    # PNDM's sums of several outputs are exact only for many steps, unless all are the same eps.
    steps = 200 if sampler == "pndm" else 20
    x, start = partway(d, x0, noise, steps, 1.0, sampler)
    sigmas = (1 / d.alpha_bar - 1).sqrt().numpy()

    def oracle(x, t):
        sigma = np.interp(t[0].item(), np.arange(1000), sigmas)
        signal = (1 + sigma ** 2) ** -0.5
        eps = (x - signal * x0) / (signal * sigma)
        return signal * eps - signal * sigma * x0 if changes else eps
    for options in [{}, dict(eta=1.0)] if sampler == "ddim" else [{}]:
        seen = ours(sampler, d, x, steps, oracle, start=start, **options)
        # Karras's timesteps are rounded, or interpolated in log sigma: t does not tell all.
        tolerance = 0.05 if "karras" in sampler else 5e-3 if sampler == "pndm" else 2e-3
        assert torch.allclose(seen[-1][1], x0, atol=tolerance)
        t = [step[0] for step in seen]
        assert len(t) == steps and t == sorted(t, reverse=True)


def test_ddim_with_eta_zero_draws_nothing_and_keeps_no_graph():
    generators = seeded([0, 1])
    state = generators[0].get_state()
    weight = torch.ones((), requires_grad=True)
    out = ddim(make(), lambda x, t: weight * network(x, t), START, 5, generators=generators)
    assert torch.equal(generators[0].get_state(), state) and not out.requires_grad
    numbers = []
    again = ddim(make(), network, START, 5, callback=lambda i, *_: numbers.append(i))
    assert torch.equal(out, again) and numbers == list(range(5))


def test_bad_numbers_are_refused_by_name():
    for steps in (0, -1, 1001):
        with pytest.raises(UserError, match="steps"):
            make().timesteps(steps)
    with pytest.raises(UserError, match="steps_offset"):  # leading + 1 would begin at 1000
        make().timesteps(1000)
    for spacing in ("leading", "linspace"):
        with pytest.raises(UserError, match="twice"):
            ours("dpm++", make(timestep_spacing=spacing, steps_offset=0), START, 1000)
    with pytest.raises(UserError, match="eta"):
        ddim(make(), network, START, 5, eta=1.5)
    for strength in (0.0, -0.5, 0.01, 1.5):
        with pytest.raises(UserError, match="strength"):
            partway(make(), START, START, 50, strength)


# ---- guidance and noise ----

def test_guidance_is_rescaled_as_in_diffusers():
    """Exercise 3 grades what the scales do."""
    pipelines = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
    out = torch.randn(3, 2, 4, 8, 8)
    assert torch.equal(guide(out[:1], 7.5, rescale=0.3), out[0])
    for k in (2, 3):
        for rescale in (0.3, 1.0):
            expected = pipelines.rescale_noise_cfg(guide(out[:k], 7.5, 1.5), out[k - 1], rescale)
            assert torch.allclose(guide(out[:k], 7.5, 1.5, rescale), expected, atol=1e-5)
    with pytest.raises(ValueError):
        guide(torch.zeros(4, 1, 4, 2, 2))


def test_a_picture_depends_on_its_own_seed_alone():
    seeds = [7, 8, 9]
    together = randn((3, 4, 8, 8), seeded(seeds))
    g = seeded(seeds)
    whole = ddim(make(), network, randn((3, 4, 8, 8), g), 10, eta=1.0, generators=g)
    for i, seed in enumerate(seeds):
        g = seeded([seed])
        noise = randn((1, 4, 8, 8), g)
        assert torch.equal(together[i:i + 1], noise)
        alone = ddim(make(), network, noise, 10, eta=1.0, generators=g)
        assert torch.allclose(alone, whole[i:i + 1], atol=1e-6)
    with pytest.raises(ValueError):
        randn((3, 4, 8, 8), seeded([1]))
    assert torch.equal(together, randn_tensor((3, 4, 8, 8), generator=seeded(seeds)))
    assert torch.equal(together[:1], randn_tensor((1, 4, 8, 8), generator=seeded(seeds)[0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_draws_the_same_picture():
    cpu = ddim(make(), network, START, 20, eta=1.0, generators=seeded([3, 4]))
    gpu = ddim(make().to("cuda"), network, START.cuda(), 20, eta=1.0, generators=seeded([3, 4]))
    assert gpu.is_cuda and torch.allclose(cpu, gpu.cpu(), atol=1e-4)
    t = torch.tensor([1, 900], device="cuda")
    assert make().loss(learned(gpu, t), gpu, gpu, t, "v").is_cuda


# ---- the demonstration ----

def test_the_exact_noise_is_the_score_of_the_density():
    """eps = -sigma d/dx log p(x_t), of the mixture that noise makes of the points -1 and 1."""
    d = Diffusion.from_config({})
    t = torch.arange(0, 1000, 37)
    signal, sigma = d.signal_noise(t, t)
    x = (signal * torch.linspace(-1.2, 1.2, 9)).double().requires_grad_()
    densities = [Normal(signal * x0, sigma).log_prob(x) for x0 in (-1.0, 1.0)]
    score, = torch.autograd.grad(torch.logsumexp(torch.stack(densities), 0).sum(), x)
    assert torch.allclose(exact_noise(d, x, t), -sigma * score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_paths_of_the_demonstration(sampler):
    """They end at -1 and 1 alike, by way of marginals whose mean square is alpha_bar + sigma^2."""
    d = Diffusion.from_config(dict(timestep_spacing="trailing", clip_sample=False))
    starts = torch.linspace(0, 1, 402)[1:-1].erfinv() * 2 ** 0.5        # normal quantiles
    starts = torch.cat([-starts.flip(0), starts])
    path = sample_paths(d, sampler, starts)
    assert path.shape == (101, 800) and torch.equal(path[0], starts)
    assert (path[-1].abs() - 1).abs().max() < 1e-3
    assert abs(path[-1].mean()) < (1e-3 if sampler == "ddim" else 0.06)
    assert (path.square().mean(1) - 1).abs().max() < 0.15
    if sampler == "ddim":
        # One equation without noise drives all: they keep their order and never cross.
        assert (path.diff(dim=1) >= -1e-5).all()


def test_the_demonstration(tmp_path):
    done = call("diffusion.py", "--out", tmp_path / "d.png")
    assert done.returncode == 0 and str(tmp_path / "d.png") in done.stdout
    assert (np.asarray(Image.open(tmp_path / "d.png")) < 255).any()
