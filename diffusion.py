"""Noise schedules, the training loss, samplers, guidance. Knows no network: a model is any function (x_t, t) -> prediction.

    DDPM    Ho et al. 2020, arXiv 2006.11239             DDIM    Song et al. 2020, arXiv 2010.02502
    Euler   Karras et al. 2022, arXiv 2206.00364         DPM++   Lu et al. 2022, arXiv 2211.01095
    v       Salimans and Ho 2022, arXiv 2202.00512       guidance with an image    InstructPix2Pix, arXiv 2211.09800
    variance that is learned         improved DDPM, Nichol and Dhariwal 2021, arXiv 2102.09672
    MTU     the multi-task loss, here per sample: the sum over tasks of its Eq. 2 belongs to whoever mixes the tasks

Timesteps run over 0..T-1 as in diffusers: alpha_bar[0] is the level after the first noising step, and no index means "clean".
alpha_bar is a_t in MTU and alpha_t in DDIM; sqrt(alpha_bar) and sqrt(1 - alpha_bar) are v's alpha and sigma.

Letters: B batch, C channels, H W latent or picture, T training timesteps, K guidance branches.
"""
import math
from functools import partial

import numpy as np
import torch

from folders import UserError, blaming

# diffusers' DDIMScheduler; Stable Diffusion's own file overrides nearly all of it, so build from the model's config
DEFAULTS = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", trained_betas=None,
                rescale_betas_zero_snr=False, prediction_type="epsilon", clip_sample=True, clip_sample_range=1.0,
                set_alpha_to_one=True, steps_offset=0, timestep_spacing="leading", use_karras_sigmas=False, variance_type="fixed_small")
_EULER = dict(clip_sample=False, timestep_spacing="linspace")
# Where each class's defaults differ, and the sampler that it is.
CLASSES = {"DDIMScheduler": ({}, "ddim"), "DDPMScheduler": ({}, "ddpm"), "PNDMScheduler": (dict(clip_sample=False, set_alpha_to_one=False), "ddim"),
           "EulerDiscreteScheduler": (_EULER, "euler"), "EulerAncestralDiscreteScheduler": (_EULER, "euler-a"),
           "DPMSolverMultistepScheduler": (_EULER, "dpm++")}
CHOICES = dict(beta_schedule=("linear", "scaled_linear", "squaredcos_cap_v2"), prediction_type=("epsilon", "v_prediction"),
               timestep_spacing=("leading", "linspace", "trailing"), thresholding=(False,), use_karras_sigmas=(False, True),
               use_exponential_sigmas=(False,), use_beta_sigmas=(False,), interpolation_type=("linear",), timestep_type=("discrete",),
               variance_type=("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range", None),
               final_sigmas_type=("zero",),
               sigma_min=(None,), sigma_max=(None,), solver_order=(2,), algorithm_type=("dpmsolver++",), solver_type=("midpoint",),
               lambda_min_clipped=(-math.inf, "-Infinity"), use_lu_lambdas=(False,), use_flow_sigmas=(False,), use_dynamic_shifting=(False,))
# PNDM's warm-up; numbers of thresholding and of flows; DPM++'s last step, which is of first order anyway when it ends at sigma = 0
WITHOUT_EFFECT = {"skip_prk_steps", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type", "lower_order_final",
                  "euler_at_final"}


class Diffusion:
    """A noise schedule and what follows from it. Tensors it returns are fp32 or wider, also for half-precision inputs.

    config      every key of DEFAULTS with its value
    alpha_bar   (T,) fp32, decreasing; `to(device)` moves it (an input on another device works too, with a copy per call)
    sampler     the name in SAMPLERS that the config's class stands for
    """

    def __init__(self, alpha_bar, config):
        self.alpha_bar, self.config, self.sampler = alpha_bar, config, "ddim"
        self.T = len(alpha_bar)
        # the level after the last step
        self.final_alpha_bar = torch.ones_like(alpha_bar[0]) if config["set_alpha_to_one"] else alpha_bar[0]

    @classmethod
    def from_config(cls, scheduler_config):
        """From the dict of a scheduler_config.json (CLASSES; without `_class_name`, DDIM). PNDM (Stable Diffusion 1.5) is sampled by `ddim`.

        Absent keys take the defaults of the class that the file names. What is not implemented raises UserError, by name.
        """
        name = str(scheduler_config.get("_class_name", "DDIMScheduler"))
        if name not in CLASSES:
            raise UserError(f"scheduler {name} is not implemented; use one of {', '.join(CLASSES)}")
        config = {**DEFAULTS, **CLASSES[name][0]}
        for key, value in scheduler_config.items():
            if key.startswith("_") or key in WITHOUT_EFFECT:
                continue
            if key not in DEFAULTS and key not in CHOICES:
                if value is None:
                    continue
                raise UserError(f"scheduler config: {key} is not implemented")
            if key in CHOICES and value not in CHOICES[key]:
                raise UserError(f"scheduler config: {key} = {value!r} is not implemented; "
                                f"use {' or '.join(map(repr, CHOICES[key]))}")
            if key in DEFAULTS:
                config[key] = value
        with blaming("scheduler config"):
            betas = _betas(config)
            if not (len(betas) > 1 and ((0 < betas) & (betas < 1)).all() and 0 <= config["steps_offset"] < len(betas)):
                raise UserError("scheduler config: the betas must lie between 0 and 1, and 0 <= steps_offset < num_train_timesteps")
        if config["num_train_timesteps"] != len(betas):
            raise UserError(f"scheduler config: trained_betas has {len(betas)} values, "
                            f"num_train_timesteps is {config['num_train_timesteps']}")
        alpha_bar = torch.cumprod(1 - betas, 0)  # DDPM, above Eq. 4
        if config["rescale_betas_zero_snr"]:
            if config["prediction_type"] == "epsilon":
                raise UserError("scheduler config: rescale_betas_zero_snr needs prediction_type v_prediction; "
                                "at alpha_bar = 0 the noise says nothing about x0")
            s = alpha_bar.sqrt()  # arXiv 2305.08891, Algorithm 1: shift the last to 0, scale the first back
            alpha_bar = ((s - s[-1]) * (s[0] / (s[0] - s[-1]))) ** 2
        diffusion = cls(alpha_bar, config)
        diffusion.sampler = CLASSES[name][1] + "-karras" * config["use_karras_sigmas"]
        if diffusion.sampler not in SAMPLERS:
            raise UserError(f"scheduler config: use_karras_sigmas is not implemented for {name}")
        return diffusion

    def to(self, device):
        self.alpha_bar, self.final_alpha_bar = self.alpha_bar.to(device), self.final_alpha_bar.to(device)
        return self

    def _signal_noise(self, t, x):
        """sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t) for t (B,), each (B,1,1,1) to multiply x (B,C,H,W)."""
        a = self.alpha_bar.to(x.device)[t.to(x.device)].view(-1, *[1] * (x.dim() - 1))
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, x0, noise, t):
        """x0, noise (B,C,H,W), t (B,) long -> x_t (B,C,H,W), a draw of q(x_t | x_0)."""
        signal, sigma = self._signal_noise(t, x0)
        return signal * x0 + sigma * noise  # DDPM Eq. 4; z_t of MTU Eq. 2

    def target(self, x0, noise, t):
        """What the model should predict at x_t = add_noise(x0, noise, t): the noise, or v. (B,C,H,W)"""
        if self.config["prediction_type"] == "epsilon":
            return noise
        signal, sigma = self._signal_noise(t, x0)
        return signal * noise - sigma * x0  # Salimans and Ho, section 4: v = alpha eps - sigma x

    def loss(self, model, x0, t, noise):
        """One sample's term of MTU Eq. 2 (DDPM Eq. 14): || target - f(z_t, t) ||^2, a mean over C, H, W in fp32 -> (B,).

        The target is eps, as in the paper, or v. `model(x_t, t)` closes over its conditions. MTU prints the norm without the square; the
        square is meant, as in DDPM.
        """
        prediction = model(self.add_noise(x0, noise, t), t)[:, :x0.shape[1]]  # a second half of the channels tells the variance
        return (self.target(x0, noise, t) - prediction.float()).square().flatten(1).mean(1)

    def objective(self, losses, prediction, x0, noise, t, kind="none", uncertainty=None):
        """What training minimises of per-sample losses (B,) -> (B,): weighted by `weight`, or by a UncertaintyWeight in its place, and where the
        network tells the variance (prediction of 2 C channels) improved DDPM Eq. 16."""
        weighted = losses * self.weight(t, kind) if uncertainty is None else uncertainty(losses, t)
        if prediction.shape[1] > x0.shape[1]:
            weighted = weighted + 0.001 * self.T * self.variance_loss(prediction, x0, self.add_noise(x0, noise, t), t)
        return weighted

    def variance_loss(self, prediction, x0, x_t, t):
        """What trains the second half of prediction's 2 C channels (see learned_variance): one term of the variational bound (improved DDPM
        Eqs. 4 to 6) in bits per dimension, KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the negative log-likelihood of 8-bit
        pixels -> (B,).

        No gradient reaches the first half. Times T it estimates L_vlb but for the constant L_T; L_hybrid = loss + 0.001 L_vlb (Eq. 16).
        """
        a = self.alpha_bar.to(t.device)
        a_prev = torch.cat([torch.ones_like(a[:1]), a[:-1]])
        predicted, v = prediction.float().chunk(2, dim=1)
        signal, sigma = self._signal_noise(t, x0)
        x0_hat, _ = self.solved(predicted.detach(), x_t, signal, sigma)
        at, before = (y[t].view(-1, 1, 1, 1) for y in (a, a_prev))
        beta = 1 - at / before
        late = t.clamp(min=1)  # at t = 0 the posterior's variance is zero: that of t = 1 bounds from below, as in the official code
        low = ((1 - a[late] / a_prev[late]) * (1 - a_prev[late]) / (1 - a[late])).log().view(-1, 1, 1, 1)
        log_var = learned_variance(v, low, beta.log())
        gap = before.sqrt() * beta / (1 - at) * (x0 - x0_hat)  # of the means, DDPM Eq. 7
        kl = 0.5 * (log_var - low - 1 + torch.exp(low - log_var) + gap ** 2 * torch.exp(-log_var))
        # a pixel is 2 / 255 wide, those at the ends reach to infinity (DDPM Eq. 13)
        upper, lower = ((gap + end) * torch.exp(-0.5 * log_var) for end in (1 / 255, -1 / 255))
        ndtr, inside = torch.special.ndtr, x0.abs() < 0.999
        p = torch.where(inside, ndtr(upper) - ndtr(lower), torch.where(x0 < 0, ndtr(upper), ndtr(-lower)))
        bits = torch.where((t == 0).view(-1, 1, 1, 1), -p.clamp(min=1e-12).log(), kl) / math.log(2)
        return bits.flatten(1).mean(1)

    def weight(self, t, kind="none"):
        """What multiplies the loss of samples at t (B,) -> (B,), snr = alpha_bar / (1 - alpha_bar). On the loss of predicted noise:

        none      1
        v         1 / alpha_bar, which makes it the loss of v: noisy steps, where layout and colours are decided, count more
        min-snr   min(5, snr) / snr        Hang et al., arXiv 2303.09556
        p2        1 / (1 + snr)            Choi et al., arXiv 2204.00227, k = 1, gamma = 1
        On the loss of predicted v, which is the noise's over alpha_bar: none and v are 1, the others times alpha_bar.
        """
        a, noise = self.alpha_bar.to(t.device)[t], self.config["prediction_type"] == "epsilon"
        if kind == "none" or kind == "v" and not noise:
            return torch.ones_like(a)
        snr = a / (1 - a)
        w = {"v": 1 / a, "min-snr": (5 / snr).clamp(max=1), "p2": 1 / (1 + snr)}[kind]  # 0 / 0 nowhere, also at alpha_bar = 0
        return w if noise else w * a

    def to_x0_eps(self, prediction, x_t, t):
        """The prediction (noise or v, (B,C,H,W)) at x_t, t (B,) -> x0, eps, both (B,C,H,W).

        x0 is clamped to +-clip_sample_range where the config has clip_sample; eps stays the model's own, as in diffusers.
        """
        x0, eps = self.solved(prediction, x_t, *self._signal_noise(t, x_t))
        if self.config["clip_sample"]:
            x0 = x0.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])
        return x0, eps

    def solved(self, prediction, x_t, signal, sigma):
        """x_t = signal x0 + sigma eps and the prediction of eps or of v = signal eps - sigma x0 -> x0, eps."""
        prediction = prediction[:, :x_t.shape[1]]
        if self.config["prediction_type"] == "epsilon":
            return (x_t - sigma * prediction) / signal, prediction  # DDIM Eq. 9
        return signal * x_t - sigma * prediction, signal * prediction + sigma * x_t  # Salimans and Ho, appendix D

    def timesteps(self, steps):
        """The timesteps that `steps` sampling steps visit: a descending list of ints (diffusers' DDIM; arXiv 2305.08891, Table 2)."""
        if not 1 <= steps <= self.T:
            raise UserError(f"steps = {steps}: choose from 1 to {self.T}, the timesteps the model was trained with")
        spacing, offset = self.config["timestep_spacing"], self.config["steps_offset"]
        if spacing == "leading":
            out = [i * (self.T // steps) + offset for i in reversed(range(steps))]
        elif spacing == "linspace":
            stride = (self.T - 1) / max(steps - 1, 1)
            out = [round(i * stride) for i in reversed(range(steps))]
        else:  # trailing
            stride = (self.T - self.T / steps) - self.T  # not -T / steps: numpy's arange rounds so, which decides the ties
            out = [round(self.T + i * stride) - 1 for i in range(steps)]
        if out[0] >= self.T:
            raise UserError(f"steps = {steps} with steps_offset = {offset} asks for timestep {out[0]} of 0..{self.T - 1}; take fewer steps")
        return out


def learned_variance(v, low, high):
    """v, whose -1 and 1 stand for the smallest and the largest variance, and the logarithms of these -> the variance's (improved DDPM Eq. 15)."""
    share = (v + 1) / 2
    return share * high + (1 - share) * low


class UncertaintyWeight(torch.nn.Module):
    """ANT-UW (Go et al., arXiv 2306.00354): a learned weight for each of K clusters of timesteps, by homoscedastic uncertainty.

        L = sum_k (exp(-s_k) L_k + s_k) / 2,   L_k = mean loss of cluster k, over K,   s_k starts at 0
    """

    def __init__(self, num_timesteps, clusters=8):
        super().__init__()
        self.T, self.s = num_timesteps, torch.nn.Parameter(torch.zeros(clusters))

    def forward(self, losses, t):
        """losses, t (B,) -> (B,), whose mean is L where the clusters have the same number of samples, and on average elsewhere."""
        s = torch.nn.functional.embedding(t * len(self.s) // self.T, self.s[:, None])[:, 0]
        return (torch.exp(-s) * losses + len(self.s) * s) / 2


def _betas(config):
    """The noise added at each of the T steps, (T,) fp32; the arithmetic is diffusers', so that the values are equal."""
    T, first, last, schedule = (config[k] for k in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"))
    if config["trained_betas"] is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    if schedule == "linear":  # DDPM, section 4
        return torch.linspace(first, last, T)
    if schedule == "scaled_linear":  # latent diffusion
        return torch.linspace(first ** 0.5, last ** 0.5, T) ** 2

    def cosine(u):  # squaredcos_cap_v2: Nichol and Dhariwal, arXiv 2102.09672, Eq. 17
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.tensor([min(1 - cosine((i + 1) / T) / cosine(i / T), 0.999) for i in range(T)])


@torch.no_grad()
def ddim(diffusion, model, x, steps=50, eta=0.0, start=0, generators=None, callback=None):
    """DDIM: x (B,C,H,W) at the level of timesteps(steps)[start] -> x0 (B,C,H,W).

    model(x, t (B,) long) -> prediction (B,C,H,W), guided already. eta 0 is deterministic, eta 1 is DDPM's posterior noise.
    x is randn(...) for start = 0, or comes with its start from `partway`. generators: see `randn`; read only where eta > 0.
    callback(i, t, x, x0) sees each step: its number, its timestep (int), the new x and the x0 predicted on the way.

    As in diffusers a step goes from t to t - T // steps, which for linspace and trailing can differ by a little from the next t visited.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta = {eta}: choose from 0 (deterministic) to 1 (DDPM)")
    for i, t in enumerate(diffusion.timesteps(steps)[start:]):
        batch_t = torch.full((len(x),), t, dtype=torch.long, device=x.device)
        x0, eps = diffusion.to_x0_eps(model(x, batch_t), x, batch_t)
        prev = t - diffusion.T // steps
        a, a_prev = diffusion.alpha_bar[t], diffusion.alpha_bar[prev] if prev >= 0 else diffusion.final_alpha_bar
        var = eta ** 2 * (1 - a_prev) / (1 - a) * (1 - a / a_prev)  # DDIM Eq. 16, squared
        x = a_prev.sqrt() * x0 + (1 - a_prev - var).sqrt() * eps  # DDIM Eq. 12: predicted x0, direction to x_t
        if eta > 0:
            x = x + var.sqrt() * randn(x.shape, generators, x.device)  # DDIM Eq. 12: random noise
        if callback is not None:
            callback(i, t, x, x0)
    return x


@torch.no_grad()
def ddpm(diffusion, model, x, steps=50, start=0, generators=None, callback=None):
    """DDPM's ancestral sampling (Algorithm 2), as `ddim`. The variance is the posterior's, beta where the config says fixed_large, what the
    second half of the model's channels tells where it says learned_range; the last step adds no noise (diffusers does, with the latter two,
    where it starts above t = 0)."""
    visited = diffusion.timesteps(steps) + [-1]
    for i, (t, prev) in enumerate(zip(visited[start:], visited[start + 1:])):
        batch_t = torch.full((len(x),), t, dtype=torch.long, device=x.device)
        prediction = model(x, batch_t)
        x0, _ = diffusion.to_x0_eps(prediction, x, batch_t)
        a, a_prev = diffusion.alpha_bar[t], diffusion.alpha_bar[prev] if prev >= 0 else torch.ones_like(diffusion.alpha_bar[0])
        beta = 1 - a / a_prev
        var, kind, C = beta * (1 - a_prev) / (1 - a), str(diffusion.config["variance_type"]), x.shape[1]
        x = a_prev.sqrt() * beta / (1 - a) * x0 + (a / a_prev).sqrt() * (1 - a_prev) / (1 - a) * x  # DDPM Eq. 7
        if "learned" in kind and prediction.shape[1] != 2 * C:
            raise UserError(f"the scheduler's variance_type {kind} wants a model with {2 * C} output channels, this one has {prediction.shape[1]}")
        if prev >= 0:
            var = beta if "large" in kind else learned_variance(prediction[:, C:], var.log(), beta.log()).exp() if "learned" in kind else var
            x = x + var.sqrt() * randn(x.shape, generators, x.device)
        if callback is not None:
            callback(i, t, x, x0)
    return x


def visits(diffusion, steps, sampler="ddim"):
    """The timesteps that a sampler's steps visit, (steps,), and the noise there as sigma = sqrt(1 / alpha_bar - 1), (steps + 1,), last 0.

    fp32 on the CPU, by diffusers' arithmetic. Euler's timesteps may lie between the trained ones, sigma is then interpolated. Karras:
    equal steps in sigma^(1/7) (arXiv 2206.00364, Eq. 5), over Euler's own range and DPM++'s whole one.
    """
    T, spacing = diffusion.T, diffusion.config["timestep_spacing"]
    alpha_bar = diffusion.alpha_bar.cpu().clone()
    if alpha_bar[-1] == 0 and not sampler.startswith("dd"):
        alpha_bar[-1] = 2 ** -24  # pure noise is at no finite sigma
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt().numpy()
    t = np.array(diffusion.timesteps(steps), dtype=np.float32)
    if sampler.startswith("euler") and spacing == "linspace":
        t = np.linspace(0, T - 1, steps, dtype=np.float32)[::-1]
    elif sampler.startswith("dpm++") and spacing == "linspace":  # one more, without the last
        t = np.linspace(0, T - 1, steps + 1).round()[:0:-1]
    elif sampler.startswith("dpm++") and spacing == "leading":
        t = np.arange(1, steps + 1)[::-1] * (T // (steps + 1)) + diffusion.config["steps_offset"]
    whole = t.astype(int)
    if len(set(whole)) < steps and sampler == "dpm++":
        raise UserError(f"steps = {steps}: {sampler} would visit a timestep twice; take fewer")
    visited = sigma[whole].astype(float) if (whole == t).all() else np.interp(t, np.arange(T), sigma)
    if sampler.endswith("-karras"):
        first, last = (visited[0], visited[-1]) if sampler.startswith("euler") else (sigma[-1], sigma[0])
        visited = (first ** (1 / 7) + np.linspace(0, 1, steps) * (last ** (1 / 7) - first ** (1 / 7))) ** 7
        t = np.interp(np.log(visited), np.log(sigma), np.arange(T))
        t = t.round() if sampler.startswith("dpm++") and diffusion.config["beta_schedule"] != "squaredcos_cap_v2" else t
    return torch.tensor(t.copy(), dtype=torch.float32), torch.tensor([*visited, 0.0], dtype=torch.float32)


@torch.no_grad()
def euler(diffusion, model, x, steps=50, start=0, generators=None, callback=None, sampler="euler"):
    """Euler's method for the probability flow, as `ddim` but in y = x / sqrt(alpha_bar) = x0 + sigma eps, where dy / dsigma = eps.

    sampler: "euler" (Karras et al., Algorithm 2 without churn), "euler-karras", or "euler-a", which goes further down and adds fresh noise.
    model gets t as fp32. The config's clip_sample is for ddim and ddpm alone, as in diffusers.
    """
    t, sigma = visits(diffusion, steps, sampler)
    root = (sigma ** 2 + 1).sqrt()
    # diffusers takes pure noise for a start of size sigma, but at leading timesteps, where the first is not the noisiest, of size root
    y = x * (sigma[0] if start == 0 and diffusion.config["timestep_spacing"] != "leading" else root[start])
    for i in range(start, steps):
        x = y / root[i]
        prediction = model(x, t[i].expand(len(x)).to(x.device))
        x0, eps = diffusion.solved(prediction, x, 1 / root[i], sigma[i] / root[i])
        up = sigma[i + 1] * (1 - (sigma[i + 1] / sigma[i]) ** 2).sqrt() if sampler == "euler-a" else torch.zeros(())
        down = (sigma[i + 1] ** 2 - up ** 2).sqrt()
        y = x0 + down * (y - x0) / sigma[i]
        if up > 0:
            y = y + up * randn(y.shape, generators, y.device)
        if callback is not None:
            callback(i - start, t[i].item(), y / root[i + 1], x0)
    return y


@torch.no_grad()
def dpm_solver(diffusion, model, x, steps=50, start=0, generators=None, callback=None, sampler="dpm++"):
    """DPM-Solver++(2M), Lu et al., Algorithm 2, as `ddim`; the first and the last step are of first order. sampler: "dpm++" or "dpm++-karras"."""
    t, sigma = visits(diffusion, steps, sampler)
    alpha = 1 / (sigma ** 2 + 1).sqrt()   # the paper's alpha and sigma are sqrt(alpha_bar) and sqrt(1 - alpha_bar)
    lam, noise, before = -sigma.log(), sigma * alpha, None
    for i in range(start, steps):
        prediction = model(x, t[i].long().expand(len(x)).to(x.device))
        x0, _ = diffusion.solved(prediction, x, alpha[i], noise[i])
        h, D = lam[i + 1] - lam[i], x0
        if start < i < steps - 1:
            D = x0 + 0.5 * h / (lam[i] - lam[i - 1]) * (x0 - before)
        x, before = noise[i + 1] / noise[i] * x - alpha[i + 1] * torch.expm1(-h) * D, x0
        if callback is not None:
            callback(i - start, int(t[i]), x, x0)
    return x


SAMPLERS = {"ddim": ddim, "ddpm": ddpm} | {name: partial(euler, sampler=name) for name in ("euler", "euler-karras", "euler-a")} | {
    name: partial(dpm_solver, sampler=name) for name in ("dpm++", "dpm++-karras")}


def partway(diffusion, x0, noise, steps, strength, sampler="ddim"):
    """Start from a picture (SDEdit, arXiv 2108.01073; diffusers' img2img): x0, noise (B,C,H,W) -> x (B,C,H,W), start for a sampler.

    strength in (0, 1] is the share of the steps that is run: near 0 keeps the picture, 1 runs them all.
    """
    run = int(steps * strength) if 0 < strength <= 1 else 0
    _, sigma = visits(diffusion, steps, sampler)
    if run < 1:
        raise UserError(f"strength = {strength} leaves none of {steps} steps to run; choose strength from "
                        f"{math.ceil(1000 / steps) / 1000:g} to 1")
    if run == steps and sampler.startswith("euler") and diffusion.config["timestep_spacing"] != "leading":
        return x0 / sigma[0] + noise, 0  # euler takes what starts at 0 for noise of size sigma
    level = torch.atan(sigma[steps - run])  # sigma = tan, so that infinity, pure noise, is a number
    return level.cos() * x0 + level.sin() * noise, steps - run


def guide(out, text_scale=1.0, image_scale=1.0, rescale=0.0):
    """Classifier-free guidance: predictions out (K,B,C,H,W) -> (B,C,H,W), on every channel. Other K: ValueError.

    K = 1   [given]                        as it is
    K = 2   [no text, text]                Ho and Salimans, arXiv 2207.12598, with scale 1 the conditional model (their w + 1)
    K = 3   [none, image, image + text]    InstructPix2Pix Eq. 3
    rescale in [0, 1]: pulls the size of the result towards the conditional prediction's (arXiv 2305.08891, Eqs. 15 and 16)
    """
    if len(out) == 1:
        return out[0]
    if len(out) == 2:
        guided = out[0] + text_scale * (out[1] - out[0])
    elif len(out) == 3:
        guided = out[0] + image_scale * (out[1] - out[0]) + text_scale * (out[2] - out[1])
    else:
        raise ValueError(f"guide takes 1, 2 or 3 branches, got {len(out)}")
    if rescale > 0:
        std, wanted = (y.flatten(1).std(dim=1).view(-1, 1, 1, 1) for y in (guided, out[-1]))
        guided = guided * (rescale * wanted / std + 1 - rescale)
    return guided


def seeded(seeds):
    """One CPU generator per picture, for `randn`."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def randn(shape, generators=None, device="cpu"):
    """Standard normal noise of shape (B,...) in fp32; generators: a list of B, one per picture, or None for torch's own.

    A picture's noise comes from its own CPU generator, so it does not depend on the batch around it or on the device, and equals the
    noise of a diffusers pipeline in fp32 that is given the same generators.
    """
    if generators is None:
        return torch.randn(shape, device=device)
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for a batch of {shape[0]}")
    return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in generators]).to(device)
