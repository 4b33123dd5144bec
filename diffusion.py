"""The diffusion process: noise schedule, training loss, samplers and guidance.

Nothing here knows a network: a model is any function (x_t, t) -> out. The sections follow the life
of a model: the schedule, what the network predicts, the loss and its weights, a learned variance,
the samplers, and guidance.

    DDPM                Ho et al. 2020, arXiv 2006.11239
    DDIM                Song et al. 2020, arXiv 2010.02502
    PNDM                Liu et al. 2022, arXiv 2202.09778
    improved DDPM       Nichol and Dhariwal 2021, arXiv 2102.09672: a learned variance
    v                   Salimans and Ho 2022, arXiv 2202.00512
    zero terminal SNR   Lin et al. 2023, arXiv 2305.08891
    Euler, Karras       Karras et al. 2022, arXiv 2206.00364
    DPM++               Lu et al. 2022, arXiv 2211.01095
    SDEdit              Meng et al. 2021, arXiv 2108.01073
    InstructPix2Pix     Brooks et al. 2022, arXiv 2211.09800: guidance by text and picture
    MTU                 Its Eq. 2 sums the loss over tasks; here is one sample's term of that sum.

Timesteps run from 0 to T - 1 as in diffusers: alpha_bar[0] is the level after the first step of
noise, and no index means "clean". alpha_bar is called a_t in MTU and alpha_t in DDIM. It splits
each x_t into signal and noise, x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps.

    python diffusion.py     draws schedules, loss weights, and samplers at work in one dimension

Letters: B batch, C channels, H W latent or picture, T training timesteps, K branches of guidance.
"""
import hub  # noqa: F401  the first import, so that Ctrl-C ends quietly
import math
from functools import partial

import numpy as np
import torch
from PIL import Image

from chart import arrange, numbers, plot
from hub import Parser, UserError, blaming, command, is_number, show, write_png

# -------------------------------------------------------------------------------------------------
# The schedule

# What a scheduler_config.json can set, with the defaults of diffusers' DDIMScheduler.
DEFAULTS = dict(
    num_train_timesteps=1000,
    beta_start=0.0001,
    beta_end=0.02,
    beta_schedule="linear",
    trained_betas=None,
    rescale_betas_zero_snr=False,
    prediction_type="epsilon",
    clip_sample=True,
    clip_sample_range=1.0,
    set_alpha_to_one=True,
    steps_offset=0,
    timestep_spacing="leading",
    use_karras_sigmas=False,
    variance_type="fixed_small",
)

# The keys that describe the process itself, with the values that are implemented. With any other
# value the file describes another model, so it is refused. Keys in none of these tables are passed
# over: a file may also hold keys of other schedulers that it was once saved by.
PROCESS = dict(
    beta_schedule=("linear", "scaled_linear", "squaredcos_cap_v2"),
    prediction_type=("epsilon", "v_prediction"),
    predict_epsilon=(True,),    # the same before diffusers 0.8
    timestep_spacing=("leading", "linspace", "trailing"),
    timestep_type=("discrete",),
    use_flow_sigmas=(False,),
    snr_shift_scale=(1.0,),
    thresholding=(False,),
    variance_type=("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log",
                   "learned_range", None),
)

# How our samplers step. A scheduler that steps in another way describes the same process, but none
# of ours draws the picture that it would draw.
STEPPING = dict(
    # The first value of each is DPM++'s own. Files of other solvers hold the later ones, which
    # diffusers' DPM++ reads as the first.
    algorithm_type=("dpmsolver++", "deis"),
    solver_type=("midpoint", "logrho", "bh1", "bh2"),
    solver_order=(2,),
    final_sigmas_type=("zero",),
    interpolation_type=("linear",),
    lambda_min_clipped=(-math.inf, "-Infinity"),        # strict JSON has no infinity
    sigma_min=(None,),
    sigma_max=(None,),
    skip_prk_steps=(True,),
    use_beta_sigmas=(False,),
    use_exponential_sigmas=(False,),
    use_lu_lambdas=(False,),
)

# Class of the scheduler -> where its defaults differ, and the sampler below that steps as it does.
SIGMAS = dict(clip_sample=False, timestep_spacing="linspace")
CLASSES = {
    "DDIMScheduler": ({}, "ddim"),
    "DDPMScheduler": ({}, "ddpm"),
    "PNDMScheduler": (
        dict(clip_sample=False, set_alpha_to_one=False, skip_prk_steps=False), "pndm"),
    "EulerDiscreteScheduler": (SIGMAS, "euler"),
    "EulerAncestralDiscreteScheduler": (SIGMAS, "euler-a"),
    "DPMSolverMultistepScheduler": (SIGMAS, "dpm++"),
}

# Some pipelines of diffusers correct old scheduler files without a word, and so do we for the same
# pipelines: those for Stable Diffusion 1.x and 2.x, but not those for SDXL and InstructPix2Pix.
CORRECTIONS = dict.fromkeys((
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipelineLegacy",
    "StableDiffusionPipelineSafe",
    "StableDiffusionPAGPipeline",
    "StableDiffusionPAGImg2ImgPipeline",
    "StableDiffusionPAGInpaintPipeline",
    "AltDiffusionPipeline",
    "AltDiffusionImg2ImgPipeline",
), dict(clip_sample=False, steps_offset=1)) | {
    "CycleDiffusionPipeline": dict(steps_offset=1),
    "StableDiffusionInpaintPipeline": dict(steps_offset=1, skip_prk_steps=True),
    "StableDiffusionDiffEditPipeline": dict(steps_offset=1, skip_prk_steps=True),
    # On pixels this pipeline steps by DDIM, whatever class the file names.
    "DDIMPipeline": dict(_class_name="DDIMScheduler"),
}


def noise_schedule(config):
    """Compute alpha_bar (T,), fp32 and falling, by diffusers' arithmetic and so with its values."""
    T = config["num_train_timesteps"]
    if not is_number(T, "num_train_timesteps", 1000):
        raise ValueError(f"num_train_timesteps = {T!r} is not implemented")
    first = config["beta_start"]
    last = config["beta_end"]
    if config["trained_betas"] is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif config["beta_schedule"] == "linear":
        betas = torch.linspace(first, last, T)                          # DDPM, section 4
    elif config["beta_schedule"] == "scaled_linear":
        betas = torch.linspace(first ** 0.5, last ** 0.5, T) ** 2       # latent diffusion
    else:
        # "squaredcos_cap_v2", improved DDPM Eq. 17. The cap keeps the last alpha_bar above zero.
        cosine = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in zip(cosine, cosine[1:])])
    if not (1 < T and betas.shape == (T,) and ((0 < betas) & (betas < 1)).all()):
        raise ValueError("trained_betas, or beta_start to beta_end, must give as many numbers "
                         f"between 0 and 1 as num_train_timesteps, {T}")

    alpha_bar = torch.cumprod(1 - betas, 0)         # DDPM, above Eq. 4
    if config["rescale_betas_zero_snr"]:
        if config["prediction_type"] == "epsilon":
            raise ValueError("rescale_betas_zero_snr needs prediction_type v_prediction; "
                             "at alpha_bar = 0 the noise says nothing about x0")
        # Lin et al., Algorithm 1: shift the last signal to 0 and scale the first one back.
        signal = alpha_bar.sqrt()
        alpha_bar = ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2
    return alpha_bar


def not_implemented(file, table):
    """Find the keys of a scheduler file whose values are not in the table -> key: value."""
    return {key: file[key] for key in table if key in file and file[key] not in table[key]}


class Diffusion:
    """Hold a noise schedule and compute what follows from it, in fp32 also for half precision.

    alpha_bar   (T,) fp32, falling; inputs on another device work too, with a copy of it per call
    config      every key of DEFAULTS with its value
    sampler     the name in SAMPLERS that the scheduler's file stands for, or None
    missing     what the file asks for and no sampler does, where sampler is None
    """

    def __init__(self, alpha_bar, config, sampler="ddim", missing=""):
        self.alpha_bar = alpha_bar
        self.config = config
        self.sampler = sampler
        self.missing = missing
        self.T = len(alpha_bar)

    @classmethod
    def from_config(cls, scheduler_config):
        """Build from the dict of a scheduler_config.json.

        Absent keys take the defaults of the class that the file names, or of DDIM. A class or a way
        of stepping that none of our samplers has makes `sampler` None: the file still describes
        the process, and every sampler can be picked by name. Another process raises UserError.
        """
        name = str(scheduler_config.get("_class_name", "DDIMScheduler"))
        differences, sampler = CLASSES.get(name, (dict(clip_sample=False), None))
        # Other classes have other defaults, so their files must state the betas. A flow has none.
        betas = {"beta_start", "beta_end", "beta_schedule"}
        if sampler is None and ("Flow" in name or not betas <= scheduler_config.keys()):
            raise UserError(f"scheduler {name} is not implemented; use one of {', '.join(CLASSES)}")
        file = differences | scheduler_config
        config = {key: file.get(key, default) for key, default in DEFAULTS.items()}

        for key, value in not_implemented(file, PROCESS).items():
            raise UserError(f"scheduler config: {key} = {show(value)} is not implemented; "
                            f"use {' or '.join(map(repr, PROCESS[key]))}")
        stepping = not_implemented(file, STEPPING)
        missing = ", ".join(f"{key} = {show(value)}" for key, value in stepping.items())
        if sampler is None:
            missing = name
        elif config["use_karras_sigmas"]:
            sampler += "-karras"
            if sampler not in SAMPLERS:
                raise UserError(f"scheduler config: {name} has no use_karras_sigmas")

        with blaming("the scheduler config"):
            alpha_bar = noise_schedule(config)
            if config["steps_offset"] not in range(len(alpha_bar)):
                raise ValueError("steps_offset is not a timestep")
            if not 0 < config["clip_sample_range"] < math.inf:
                raise ValueError("clip_sample_range is not above 0")
        return cls(alpha_bar, config, None if missing else sampler, missing)

    def to(self, device):
        """Move the schedule to a device, in place."""
        self.alpha_bar = self.alpha_bar.to(device)
        return self

    def signal_noise(self, t, x):
        """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) for t (B,), each (B, 1, 1, 1)."""
        alpha_bar = self.alpha_bar.to(x.device)[t.to(x.device)].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def level(self, t):
        """Return alpha_bar at one timestep; below 0 is the level at which DDIM and PNDM end."""
        if t < 0 and self.config["set_alpha_to_one"]:
            return torch.ones_like(self.alpha_bar[0])       # clean
        return self.alpha_bar[max(t, 0)]    # below 0 that of t = 0, as in Stable Diffusion

    def add_noise(self, x0, noise, t):
        """Draw x_t from q(x_t | x_0): x0, noise (B, C, H, W), t (B,) long -> (B, C, H, W)."""
        signal, sigma = self.signal_noise(t, x0)
        return signal * x0 + sigma * noise          # DDPM Eq. 4; z_t of MTU Eq. 2

    # ---------------------------------------------------------------------------------------------
    # What the network predicts: the noise eps, or v, a mixture of noise and picture. To read eps
    # off x_t is trivial where x_t is nearly all noise; v has something to say at every level, and
    # it is what a schedule that ends at alpha_bar = 0 needs. As signal^2 + sigma^2 = 1, x_t and v
    # are x0 and eps turned by an angle, and the turn back solves them. The mixed terms cancel:
    #     x_t = signal x0 + sigma eps     signal x_t - sigma v = (signal^2 + sigma^2) x0 = x0
    #     v = signal eps - sigma x0       sigma x_t + signal v = (sigma^2 + signal^2) eps = eps

    def target(self, x0, noise, t):
        """Return what the network should predict at add_noise(x0, noise, t), (B, C, H, W)."""
        if self.config["prediction_type"] == "epsilon":
            return noise
        signal, sigma = self.signal_noise(t, x0)
        return signal * noise - sigma * x0          # Salimans and Ho, section 4

    def solved(self, out, x_t, signal, sigma):
        """Solve x_t = signal x0 + sigma eps, and what the network says, for x0 and eps.

        out has C channels, or 2 C with a learned variance, whose half is not read here.
        """
        out = out[:, :x_t.shape[1]]
        if self.config["prediction_type"] == "epsilon":
            return (x_t - sigma * out) / signal, out                        # DDIM Eq. 9
        return signal * x_t - sigma * out, signal * out + sigma * x_t       # v, appendix D

    def to_x0_eps(self, out, x_t, t):
        """Turn the network's output at x_t, t (B,) into x0 and eps, both (B, C, H, W).

        x0 is clamped to +-clip_sample_range where the config has clip_sample; eps stays as the
        network says it, as in diffusers.
        """
        x0, eps = self.solved(out, x_t, *self.signal_noise(t, x_t))
        if self.config["clip_sample"]:
            limit = self.config["clip_sample_range"]
            x0 = x0.clamp(-limit, limit)
        return x0, eps

    # ---------------------------------------------------------------------------------------------
    # The loss and its weights

    def error(self, out, x0, noise, t):
        """Return each sample's squared error, a mean over C, H and W -> (B,) fp32.

        This is one sample's term of MTU Eq. 2, or of DDPM Eq. 14, for out at x_t (B, C, H, W). MTU
        prints the norm without the square; the square is meant, as in DDPM. Where out has 2 C
        channels, only the first C count.
        """
        prediction = out[:, :x0.shape[1]].float()
        return (self.target(x0, noise, t) - prediction).square().flatten(1).mean(1)

    def loss(self, out, x0, noise, t, weighting="none", uncertainty=None):
        """Return what training minimises for each sample -> (B,) fp32.

        The error is weighted by `weight`. Where the network learns the variance (out has 2 C
        channels), the variational bound is added, unweighted and small, so that it does not
        disturb what the error teaches: L_hybrid, improved DDPM Eq. 16. `uncertainty`, an
        UncertaintyWeight, takes the place of `weighting` and weights the sum of both, as DTR's
        official code does.
        """
        error = self.error(out, x0, noise, t)
        bound = 0.0
        if out.shape[1] > x0.shape[1]:
            x_t = self.add_noise(x0, noise, t)
            bound = 0.001 * self.T * self.variance_loss(out, x0, x_t, t)
        if uncertainty is not None:
            return uncertainty(error + bound, t)
        return self.weight(t, weighting) * error + bound        # not on the bound

    def weight(self, t, kind="none"):
        """Return the weight of the error of samples at t (B,) -> (B,).

        With snr = alpha_bar / (1 - alpha_bar), an error of predicted noise is multiplied by

            none      1
            v         1 / alpha_bar, which makes it the error of v: noisy steps, where layout and
                      colours are decided, count more
            min-snr   min(5, snr) / snr        Hang et al., arXiv 2303.09556
            p2        1 / (1 + snr)            Choi et al., arXiv 2204.00227, with k = gamma = 1

        The error of predicted v is that of the noise over alpha_bar already. There none and v are
        1, and the others are multiplied by alpha_bar.
        """
        alpha_bar = self.alpha_bar.to(t.device)[t]
        predicts_noise = self.config["prediction_type"] == "epsilon"
        if kind == "none" or (kind == "v" and not predicts_noise):
            return torch.ones_like(alpha_bar)
        # At a given x_t, x0 = (x_t - sigma eps) / signal, with which v = signal eps - sigma x0 is
        # (eps - sigma x_t) / signal. So an error of eps, over signal, is an error of v.
        # In this form min-snr and p2 are finite at alpha_bar = 0, where min(5, snr) / snr would be
        # 0 / 0. v is not, but no network that predicts the noise is trained there.
        snr = alpha_bar / (1 - alpha_bar)
        weight = {"v": 1 / alpha_bar, "min-snr": (5 / snr).clamp(max=1), "p2": 1 / (1 + snr)}[kind]
        return weight if predicts_noise else weight * alpha_bar

    # ---------------------------------------------------------------------------------------------
    # A learned variance. Each reverse step adds noise. DDPM fixes its variance; the networks of
    # ADM and DiT predict it, in C more channels.

    def variance_loss(self, out, x0, x_t, t):
        """Return one term of the variational bound, in bits per dimension -> (B,).

        This is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 the negative
        log-likelihood of 8-bit pixels (improved DDPM Eqs. 4 to 6). Times T it estimates L_vlb but
        for the constant L_T. It trains the second half of out (B, 2 C, H, W): no gradient reaches
        the first, which learns from the error.
        """
        alpha_bar = self.alpha_bar.to(t.device)
        clean = torch.ones_like(alpha_bar[:1])
        of_x0, _, small, beta = posterior(alpha_bar, torch.cat([clean, alpha_bar[:-1]]))
        # At t = 0 the posterior's variance is zero. The official code takes that of t = 1 there.
        small[0] = small[1]
        of_x0, small, beta = (y[t].view(-1, 1, 1, 1) for y in (of_x0, small, beta))
        prediction, v = out.float().chunk(2, dim=1)
        low = small.log()
        log_var = learned_variance(v, low, beta.log())

        x0_hat, _ = self.solved(prediction.detach(), x_t, *self.signal_noise(t, x0))
        gap = of_x0 * (x0 - x0_hat)         # between the two means, which differ only in x0
        kl = 0.5 * (log_var - low - 1 + torch.exp(low - log_var) + gap ** 2 * torch.exp(-log_var))

        # A pixel is 2 / 255 wide; the darkest and the brightest reach to infinity (DDPM Eq. 13).
        ndtr = torch.special.ndtr
        per_std = torch.exp(-0.5 * log_var)
        upper = (gap + 1 / 255) * per_std
        lower = (gap - 1 / 255) * per_std
        end = torch.where(x0 < 0, ndtr(upper), ndtr(-lower))
        p = torch.where(x0.abs() < 0.999, ndtr(upper) - ndtr(lower), end)
        nats = torch.where(t.view(-1, 1, 1, 1) == 0, -p.clamp(min=1e-12).log(), kl)
        return (nats / math.log(2)).flatten(1).mean(1)

    def step_variance(self, out, small, large, channels):
        """Return the variance of one reverse step, of the kind that `variance_type` names.

        small and large are its two bounds: the variance of the posterior, and beta (DDPM, section
        3.2). A learned variance lies between them and needs an out of twice the channels.
        """
        small = small.clamp(min=1e-20)      # it is 0 at the end, and has no logarithm there
        kind = str(self.config["variance_type"])
        if "large" in kind:
            return large
        if "learned" not in kind:
            return small
        if out.shape[1] != 2 * channels:
            raise UserError(f"the scheduler's variance_type {kind} needs a model with "
                            f"{2 * channels} output channels; this one has {out.shape[1]}")
        return learned_variance(out[:, channels:], small.log(), large.log()).exp()

    # ---------------------------------------------------------------------------------------------
    # Sampling visits some of the timesteps that training saw, or all of them.

    def timesteps(self, steps):
        """List the timesteps that `steps` sampling steps visit, falling (Lin et al., Table 2)."""
        if not 1 <= steps <= self.T:
            raise UserError(f"steps = {steps}: choose from 1 to {self.T}, the number of timesteps "
                            "that the model was trained with")
        spacing = self.config["timestep_spacing"]
        offset = self.config["steps_offset"]
        if spacing == "leading":
            times = [i * (self.T // steps) + offset for i in reversed(range(steps))]
        elif spacing == "linspace":
            stride = (self.T - 1) / max(steps - 1, 1)
            times = [round(i * stride) for i in reversed(range(steps))]
        else:
            # "trailing". The stride is not written as -T / steps, because numpy's arange rounds it
            # in this way, and that decides the ties.
            stride = (self.T - self.T / steps) - self.T
            times = [round(self.T + i * stride) - 1 for i in range(steps)]
        if times[0] >= self.T:
            raise UserError(f"steps = {steps} with steps_offset = {offset} begins at timestep "
                            f"{times[0]}, but the last is {self.T - 1}; take fewer steps")
        return times


def posterior(alpha_bar, alpha_bar_prev):
    """Return DDPM's Eq. 7, q(x_{t-1} | x_t, x_0), for alpha_bar at t and at t - 1.

    Four tensors of their shape: the factors of x_0 and of x_t in the mean, the variance, and beta,
    the variance of q(x_t | x_{t-1}).
    """
    # By Bayes' rule the density of x = x_{t-1} is, but for a factor, the product of
    #     q(x | x_0) = N(x; sqrt(alpha_bar_prev) x_0, 1 - alpha_bar_prev)  and
    #     q(x_t | x) = N(x_t; sqrt(alpha) x, beta).
    # The sum of their exponents is -(P x^2 - 2 Q x) / 2 and terms without x, so it is a Gaussian in
    # x of variance 1 / P and mean Q / P, with
    #     P = 1 / (1 - alpha_bar_prev) + alpha / beta
    #     Q = sqrt(alpha_bar_prev) x_0 / (1 - alpha_bar_prev) + sqrt(alpha) x_t / beta.
    # On one denominator P is (beta + alpha - alpha alpha_bar_prev) / (beta (1 - alpha_bar_prev)),
    # whose numerator is 1 - alpha_bar. Dividing Q by it gives the two factors below.
    #
    # Where timesteps are left out between the two, alpha and beta are those of one long step.
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    of_x0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
    of_x_t = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return of_x0, of_x_t, beta * (1 - alpha_bar_prev) / (1 - alpha_bar), beta


def learned_variance(v, low, high):
    """Interpolate the logarithms of two variances, improved DDPM Eq. 15: v = -1 is low, 1 is high.

    This v is that paper's, and not the v that a network may predict in the place of the noise.
    """
    share = (v + 1) / 2
    return share * high + (1 - share) * low


class UncertaintyWeight(torch.nn.Module):
    """Learn a weight for each of N clusters of timesteps: ANT-UW (Go et al., arXiv 2306.00354).

        L = sum_n (exp(-s_n) L_n + s_n) / 2,    L_n = the mean loss of cluster n, divided by N

    s_n starts at 0. A cluster whose loss is large ends up with a small weight.
    """

    def __init__(self, num_timesteps, clusters=8):
        super().__init__()
        self.T = num_timesteps
        self.s = torch.nn.Parameter(torch.zeros(clusters))

    def forward(self, losses, t):
        """losses, t (B,) -> (B,), whose mean is L if all clusters have equally many samples.

        Where t is drawn uniformly, as in train.py, the mean is L on average.
        """
        clusters = len(self.s)
        # An embedding, because indexing a table has a backward that is not deterministic on CPU
        s = torch.nn.functional.embedding(t * clusters // self.T, self.s[:, None])[:, 0]
        return (torch.exp(-s) * losses + clusters * s) / 2


# -------------------------------------------------------------------------------------------------
# Samplers. Each goes from noise x (B, C, H, W) to x0 (B, C, H, W):
#
#   model       (x, t (B,)) -> out, guided already
#   x           randn(...) for start = 0; `partway` gives an x and its start for SDEdit
#   generators  see `randn`; only samplers that add noise on the way read them
#   callback    callback(i, t, x, x0) sees each step: its number, its timestep, the new x, and the
#               x0 predicted on the way

def for_each(x, t):
    """Repeat a timestep, int or float, for each picture of x (B, C, H, W) -> (B,)."""
    return torch.full((len(x),), t, device=x.device)


@torch.no_grad()
def ddim(diffusion, model, x, steps=50, eta=0.0, start=0, generators=None, callback=None):
    """Sample by DDIM: eta 0 is deterministic, eta 1 adds DDPM's posterior noise.

    As in diffusers, a step goes from t to t - T // steps, which for linspace and trailing can
    differ by a little from the next t visited.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta = {eta}: choose from 0 (deterministic) to 1 (DDPM)")
    for i, t in enumerate(diffusion.timesteps(steps)[start:]):
        batch_t = for_each(x, t)
        x0, eps = diffusion.to_x0_eps(model(x, batch_t), x, batch_t)
        alpha_bar = diffusion.level(t)
        alpha_bar_prev = diffusion.level(t - diffusion.T // steps)
        # Eq. 12: the predicted x0, the direction to x_t, and random noise of variance Eq. 16
        var = eta ** 2 * (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        x = alpha_bar_prev.sqrt() * x0 + (1 - alpha_bar_prev - var).sqrt() * eps
        if eta > 0:
            x = x + var.sqrt() * randn(x.shape, generators, x.device)
        if callback:
            callback(i, t, x, x0)
    return x


# Adams and Bashforth's weights of the last one, two, three and four outputs, the newest first.
MULTISTEP = (
    (1,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@torch.no_grad()
def pndm(diffusion, model, x, steps=50, start=0, generators=None, callback=None):
    """Sample by PNDM without its warm-up, as Stable Diffusion 1.x does: DDIM with a memory.

    Each step is DDIM's for a sum of the last four outputs (PNDM Eq. 12). The first has no past, so
    it is made twice, the second time with the mean of the outputs at both its ends.
    """
    stride = diffusion.T // steps
    times = diffusion.timesteps(steps)[start:]
    outputs = []

    def step(out, t):
        """Go from x at t to t - stride -> the new x, and x0."""
        x0, eps = diffusion.solved(out, x, *diffusion.signal_noise(torch.tensor([t]), x))
        alpha_bar_prev = diffusion.level(t - stride)
        return alpha_bar_prev.sqrt() * x0 + (1 - alpha_bar_prev).sqrt() * eps, x0

    for i, t in enumerate(times):
        outputs = [model(x, for_each(x, t)), *outputs[:3]]
        out = sum(weight * y for weight, y in zip(MULTISTEP[len(outputs) - 1], outputs))
        if i == 0 and len(times) > 1:
            x_next, _ = step(out, t)
            out = (out + model(x_next, for_each(x, times[1]))) / 2
            # As in diffusers, the second attempt is counted back from where it ends.
            t = times[1] + stride
        x, x0 = step(out, t)
        if callback:
            callback(i, times[i], x, x0)
    return x


@torch.no_grad()
def ddpm(diffusion, model, x, steps=50, start=0, generators=None, callback=None):
    """Sample as DDPM does (Algorithm 2), with the variance of `Diffusion.step_variance`.

    Only a step that starts at t = 0 adds no noise. As in diffusers, a last step that starts later
    adds some where the variance is large or learned.
    """
    times = diffusion.timesteps(steps) + [-1]
    alpha_bar = torch.cat([diffusion.alpha_bar, diffusion.alpha_bar.new_ones(1)])   # [-1] is clean
    for i, (t, prev) in enumerate(zip(times[start:], times[start + 1:])):
        batch_t = for_each(x, t)
        out = model(x, batch_t)
        x0, _ = diffusion.to_x0_eps(out, x, batch_t)
        of_x0, of_x_t, small, beta = posterior(alpha_bar[t], alpha_bar[prev])
        var = diffusion.step_variance(out, small, beta, channels=x.shape[1])
        x = of_x0 * x0 + of_x_t * x
        if t > 0:
            x = x + var.sqrt() * randn(x.shape, generators, x.device)
        if callback:
            callback(i, t, x, x0)
    return x


def visits(diffusion, steps, sampler="ddim"):
    """Return the timesteps that a sampler visits, (steps,), and the noise there, (steps + 1,).

    The noise is sigma = sqrt(1 / alpha_bar - 1), the ratio of noise to signal; its last value is 0.
    Both are fp32, on the CPU, by diffusers' arithmetic. Euler's timesteps may lie between trained
    ones; sigma is then interpolated. Karras's steps are equal in sigma^(1/7) (Karras et al., Eq.
    5), over the range that Euler visits, or the whole range for DPM++.
    """
    T = diffusion.T
    config = diffusion.config
    spacing = config["timestep_spacing"]
    is_euler = sampler.startswith("euler")
    is_dpm = sampler.startswith("dpm++")
    alpha_bar = diffusion.alpha_bar.cpu().clone()
    if alpha_bar[-1] == 0 and (is_euler or is_dpm):
        alpha_bar[-1] = 2 ** -24        # pure noise would be at an infinite sigma
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt().numpy()

    t = np.array(diffusion.timesteps(steps))
    if is_dpm and spacing != "trailing":
        if steps == T:
            raise UserError(f"steps = {steps}: dpm++ would visit a timestep twice; take fewer")
        # DPM++ takes the timesteps of one step more, and leaves out the last.
        t = np.array(diffusion.timesteps(steps + 1)[:-1])
    levels = sigma[t].astype(float)
    if is_euler and spacing == "linspace":
        t = np.linspace(0, T - 1, steps, dtype=np.float32)[::-1]
        levels = np.interp(t, np.arange(T), sigma)

    if sampler.endswith("-karras"):
        first, last = (sigma[-1], sigma[0]) if is_dpm else (levels[0], levels[-1])
        root = first ** (1 / 7) + np.linspace(0, 1, steps) * (last ** (1 / 7) - first ** (1 / 7))
        levels = root ** 7
        t = np.interp(np.log(levels), np.log(sigma), np.arange(T))
        if is_dpm:
            t = np.floor(t) if config["beta_schedule"] == "squaredcos_cap_v2" else t.round()
    return torch.tensor(t.copy()).float(), torch.tensor([*levels, 0.0]).float()


@torch.no_grad()
def sigma_solver(diffusion, model, x, steps=50, start=0, generators=None, callback=None,
                 sampler="euler"):
    """Sample in y = x / sqrt(alpha_bar) = x0 + sigma eps, where dy / dsigma = eps.

    sampler: "euler" (Karras et al., Algorithm 2 without churn), "euler-a" (ancestral), which goes
    further down and adds fresh noise, or "dpm++", DPM-Solver++(2M) (Lu et al., Algorithm 2), whose
    first and last steps are of first order; the first and the last of them also with "-karras".
    The model gets t as fp32. The config's clip_sample is for ddim and ddpm alone, as in diffusers.
    """
    t, sigma = visits(diffusion, steps, sampler)
    root = (sigma ** 2 + 1).sqrt()      # 1 / sqrt(alpha_bar)
    h = (-sigma.log()).diff()           # of half the logarithm of the signal-to-noise ratio, lambda
    is_dpm = sampler.startswith("dpm++")
    # diffusers' Euler takes pure noise to have size sigma at the start, but for leading timesteps,
    # which do not begin at the noisiest, size root.
    leading = diffusion.config["timestep_spacing"] == "leading"
    y = x * (root[start] if start > 0 or leading or is_dpm else sigma[0])
    for i in range(start, steps):
        x = y / root[i]
        out = model(x, for_each(x, t[i].item()))
        x0, _ = diffusion.solved(out, x, 1 / root[i], sigma[i] / root[i])
        # Euler's step follows eps = (y - x0) / sigma towards x0. Lu et al.'s step, divided by their
        # alpha and with exp(-h) = sigma[i + 1] / sigma[i], is the same towards D, which is where
        # the last two x0 point.
        D = x0
        if is_dpm and start < i < steps - 1:
            D = x0 + 0.5 * h[i] / h[i - 1] * (x0 - x0_before)
        up = 0.0
        if sampler == "euler-a":
            up = sigma[i + 1] * (1 - (sigma[i + 1] / sigma[i]) ** 2).sqrt()
        down = (sigma[i + 1] ** 2 - up ** 2).sqrt()
        y = D + down * (y - D) / sigma[i]
        if up > 0:
            y = y + up * randn(y.shape, generators, y.device)
        x0_before = x0
        if callback:
            callback(i - start, t[i].item(), y / root[i + 1], x0)
    return y


SAMPLERS = dict(ddim=ddim, ddpm=ddpm, pndm=pndm) | {
    name: partial(sigma_solver, sampler=name)
    for name in ("euler", "euler-karras", "euler-a", "dpm++", "dpm++-karras")}


def partway(diffusion, x0, noise, steps, strength, sampler="ddim"):
    """Start from a picture (SDEdit): x0, noise (B, C, H, W) -> x (B, C, H, W) and start.

    strength in (0, 1] is the share of the steps that is run, as in diffusers' img2img: near 0 keeps
    the picture, and 1 runs all of them.
    """
    _, sigma = visits(diffusion, steps, sampler)
    run = int(steps * strength) if 0 < strength <= 1 else 0
    if run < 1:
        raise UserError(f"strength = {strength} leaves none of {steps} steps to run; choose "
                        f"strength from {math.ceil(1000 / steps) / 1000:g} to 1")
    leading = diffusion.config["timestep_spacing"] == "leading"
    if run == steps and sampler.startswith("euler") and not leading:
        return x0 / sigma[0] + noise, 0     # euler takes what starts at 0 for noise of size sigma
    angle = torch.atan(sigma[steps - run])  # finite also where sigma is not, at pure noise
    return angle.cos() * x0 + angle.sin() * noise, steps - run


# -------------------------------------------------------------------------------------------------
# Guidance, and the noise that a picture starts from

def guide(out, text_scale=1.0, image_scale=1.0, rescale=0.0):
    """Combine K predictions by classifier-free guidance: (K, B, C, H, W) -> (B, C, H, W).

    K = 1   [conditional]                 as it is
    K = 2   [no text, text]               Ho and Salimans, arXiv 2207.12598, whose w is scale - 1
    K = 3   [none, image, image + text]   InstructPix2Pix Eq. 3, arXiv 2211.09800

    rescale in [0, 1] pulls the size of the result towards that of the conditional prediction (Lin
    et al., Eqs. 15 and 16). All channels are guided. Another K raises ValueError.
    """
    if len(out) > 3:
        raise ValueError(f"guide takes 1, 2 or 3 branches, got {len(out)}")
    result = out[0]
    if len(out) == 3:
        result = result + image_scale * (out[1] - out[0])
    if len(out) > 1:
        result = result + text_scale * (out[-1] - out[-2])
    if rescale > 0 and len(out) > 1:
        size = result.std(dim=(1, 2, 3), keepdim=True)
        conditional = out[-1].std(dim=(1, 2, 3), keepdim=True)
        result = result * (rescale * conditional / size + 1 - rescale)
    return result


def seeded(seeds):
    """Make one CPU generator per picture, for `randn`."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def randn(shape, generators=None, device="cpu"):
    """Draw standard normal noise of shape (B, ...) in fp32.

    generators: a list of B, one per picture, or None for torch's own. A picture's noise then does
    not depend on the batch around it, nor on the device, and equals that of a diffusers pipeline
    in fp32 with the same generators.
    """
    if generators is None:
        return torch.randn(shape, device=device)
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for a batch of {shape[0]}")
    return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in generators]).to(device)


# -------------------------------------------------------------------------------------------------
# The demonstration

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
EXAMPLES = {
    "linear (DDPM)": {},
    "scaled_linear (SD)": SD,
    "squaredcos_cap_v2": dict(beta_schedule="squaredcos_cap_v2"),
    "zero terminal SNR": SD | dict(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
}


def exact_noise(diffusion, x, t):
    """Return the mean of eps given x_t, if x_0 is -1 or 1 with equal odds: a perfect network."""
    signal, sigma = diffusion.signal_noise(t, x)
    # By Bayes' rule the odds of 1 against -1 are those of two Gaussians' densities at x_t,
    #     exp(((x_t + signal)^2 - (x_t - signal)^2) / (2 sigma^2)) = exp(2 signal x_t / sigma^2).
    x0 = torch.tanh(signal * x / sigma ** 2)
    return (x - signal * x0) / sigma


def sample_paths(diffusion, sampler, starts, steps=100):
    """Sample such x_0 from starts (B,) -> x_t at each timestep visited, and x_0 (steps + 1, B)."""
    path = [starts.view(-1, 1, 1, 1)]
    SAMPLERS[sampler](diffusion, partial(exact_noise, diffusion), path[0], steps,
                      generators=seeded(range(len(starts))),
                      callback=lambda i, t, x, x0: path.append(x))
    return torch.stack(path).flatten(1)


def draw_paths(time):
    """Draw paths of two samplers on the density of x_t, which is dark where x_t is likely."""
    diffusion = Diffusion.from_config(dict(timestep_spacing="trailing", clip_sample=False))
    curves = [(sampler, diffusion.timesteps(100) + [0], path)
              for sampler, starts in (("ddim", [-2, -1.2, -0.4, 0.4, 1.2, 2]), ("ddpm", [-1, 1]))
              for path in sample_paths(diffusion, sampler, torch.tensor(starts)).T]
    x = torch.linspace(3, -3, 240)[:, None]
    signal = diffusion.alpha_bar.sqrt()
    density = sum(torch.exp(-(x - mean) ** 2 / (2 - 2 * diffusion.alpha_bar))
                  for mean in (signal, -signal))                                    # (240, T)
    shade = 255 - 130 * density / density.amax(0)
    return plot("sampling, from right to left, on the density of x_t; x_0 is -1 or 1", time,
                numbers("x_t", -3, -1, 1, 3), curves, Image.fromarray(shade.byte().numpy()))


def main():
    parser = Parser("Draw noise schedules, loss weights, and samplers on an exact example.")
    parser.add_argument("--out", default="samples/diffusion.png", help="file for the picture")
    args = parser.parse_args()
    t = torch.arange(1000)
    time = numbers("timestep t", 0, 250, 500, 750, 999)
    ratios = []
    for name, config in EXAMPLES.items():
        alpha_bar = Diffusion.from_config(config).alpha_bar
        ratios.append((name, t, (alpha_bar / (1 - alpha_bar)).log10()))
    weights = [(kind, t, Diffusion.from_config(SD).weight(t, kind).log10())
               for kind in ("v", "min-snr", "p2", "none")]
    sheet = arrange([
        plot("signal-to-noise ratio of four schedules", time,
             numbers("snr", 1e-5, 0.01, 1, 100, 1e5, log=True), ratios),
        plot("weight of the error of predicted noise, scaled_linear", time,
             numbers("weight", 0.001, 0.1, 1, 10, 1000, log=True), weights),
        draw_paths(time)])
    write_png(args.out, sheet)
    print(args.out)


if __name__ == "__main__":
    command(main)
