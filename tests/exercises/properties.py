"""The properties that grade each exercise, and what their hints recognise.

A property compares an answer with an independent, slower computation, or states what must hold. It
also computes what well-known mistakes would give; an answer that equals one of them gets a hint
that names the mistake. Wording, exact bits, types of floats and refusals of bad input never count.

Run by ../exercises.py in a process of its own: python properties.py NUMBER FILE
"""
import contextlib
import copy
import importlib
import json
import shlex
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import exercises  # noqa: E402

PROPERTIES = {number: [] for number in exercises.EXERCISES}     # number -> [(name, function)]


def graded(number, name, *options):
    """Let a function of the answer's module and of options grade an exercise; it raises Failed."""
    def add(function):
        PROPERTIES[number].append((name, lambda module: function(module, *options)))
        return function
    return add


class Failed(Exception):
    def __init__(self, expected, came, hint):
        super().__init__(expected, came, hint)
        self.row = dict(expected=expected, came=came, hint=hint)


# -------------------------------------------------------------------------------------------------
# Comparing

def equal(got, want, tol):
    """Whether two float64 tensors agree to `tol` of the largest number."""
    scale = want.abs().max() if want.numel() else 0.0
    return got.shape == want.shape and bool(((got - want).abs() <= tol * scale + 1e-7).all())


def diagnose(got, want, tol):
    """Say how two tensors of one shape differ, if that can be said in words."""
    if not got.isfinite().all():
        return "there are NaN or infinite numbers"
    if want.dim() > 1 and len(want) > 1 and equal(got[:1], want[:1], tol):
        return "only the first sample of the batch is right: each has its own t, task or weights"
    ratio = (got * want).sum() / want.square().sum()
    if ratio and equal(got, ratio * want, tol):
        return f"every number is {ratio:.4g} times what it should be"
    if equal(got, want + (got - want).mean(), tol):
        return f"every number is too large by {(got - want).mean():.4g}"
    for axis in range(want.dim()):
        for step in (-1, 1):
            if want.shape[axis] > 1 and equal(got, want.roll(step, axis), tol):
                return f"everything is shifted by one along axis {axis}"
    if equal(got.flatten().sort().values, want.flatten().sort().values, tol):
        return "the right numbers stand in the wrong order"
    if equal(got, want, 1e-2):
        return "nearly right: is something rounded, or in half precision, or a small term missing?"
    return ""


def expect(got, want, hint, mistakes=(), tol=1e-4, broadcast=False):
    """Raise Failed unless `got` is the tensor `want`.

    hint: what to look at. mistakes: {hint: the result of that mistake}. broadcast: accept every
    shape that broadcasts to that of `want`.
    """
    want = torch.as_tensor(want).detach().double()
    shape = tuple(want.shape)
    if not isinstance(got, torch.Tensor):
        reason = "is a return missing?" if got is None else f"return a tensor of shape {shape}"
        raise Failed(f"a tensor of shape {shape}", f"{type(got).__name__}", reason)
    got = got.detach().cpu().double()
    if broadcast:
        with contextlib.suppress(RuntimeError):
            got = got.broadcast_to(shape)
    if equal(got, want, tol):
        return
    came = f"shape {tuple(got.shape)}"
    expected = f"shape {shape}"
    if got.shape == want.shape:
        worst = (got - want).abs().nan_to_num(torch.inf).argmax()
        index = [int(i) for i in np.unravel_index(int(worst), shape)]
        wrong = int((~torch.isclose(got, want, rtol=tol, atol=tol)).sum())
        expected = f"{want.flatten()[worst]:.5g} at {index}"
        came = f"{got.flatten()[worst]:.5g} ({wrong} of {want.numel()} numbers differ)"
    for words, value in dict(mistakes).items():
        if equal(got, torch.as_tensor(value).detach().double(), tol):
            raise Failed(expected, came, words)
    said = diagnose(got, want, tol) if got.shape == want.shape else "the shape is wrong"
    raise Failed(expected, came, f"{said}; {hint}" if said else hint)


def same_gradients(answer, reference, tensors, hint="", tol=1e-3):
    """Raise Failed unless gradients reach the named tensors, and are the reference's."""
    want = reference()
    probe = torch.randn(want.shape)
    expected = torch.autograd.grad((want * probe).sum(), tensors.values(), allow_unused=True)
    got = answer()
    expect(got, want, "the result itself differs, see the properties above", tol=tol)
    if not got.requires_grad:
        raise Failed("a result that can be trained", "one without any gradient", "something is "
                     "detached: .detach(), .data, .item(), no_grad and numpy all end the gradient")
    came = torch.autograd.grad((got * probe).sum(), tensors.values(), allow_unused=True)
    for name, want, got in zip(tensors, expected, came):
        want = torch.zeros_like(tensors[name]) if want is None else want
        got = torch.zeros_like(want) if got is None else got
        if want.any() and not got.any():
            raise Failed(f"a gradient of {name}", "none", f"no gradient reaches {name}: something "
                         "on its way is detached, a copy or a Python number")
        expect(got, want, hint or f"the result depends on {name} in another way than it should, or "
               "a part of that way is detached", tol=tol)


def call(function, *inputs):
    """Call an answer with copies, so that a change in place spoils nothing but its own property."""
    return function(*copy.deepcopy([x.detach() if isinstance(x, torch.Tensor) else x
                                    for x in inputs]))


def same_twice(first, second, hint):
    """Raise Failed where an answer gives two results for the same inputs."""
    if not isinstance(first, torch.Tensor):
        return      # `expect` will say so
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise Failed("the same result for the same inputs", "another one", hint)


@contextlib.contextmanager
def unchanged(**tensors):
    """Raise Failed where the block has changed a tensor, or one of a dict of tensors, in place."""
    flat = {}
    for name, value in tensors.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name} {key}".strip(): tensor for key, tensor in parts}
    before = {name: tensor.detach().clone() for name, tensor in flat.items()}
    yield
    for name, tensor in flat.items():
        if not torch.equal(before[name], tensor):
            raise Failed(f"{name} as it was", "other values", f"{name} is changed in place; make a "
                         "new tensor instead (x = 2 * x, not x *= 2)")


# Parts of messages of Python and PyTorch, and what they usually mean here.
REASONS = {
    "in-place operation": "an input is changed in place; make a new tensor instead",
    "requires grad. Use": "stay with torch's functions: numpy ends the gradient",
    "out of range": "an index is out of range: do timesteps, rows or slices count from 0?",
    "out of bounds": "an index is out of range: do timesteps, rows or slices count from 0?",
    "NoneType": "something is None: is a return missing?",
    "size": "shapes do not fit: write the shape of each tensor beside its line",
    "shape": "shapes do not fit: write the shape of each tensor beside its line",
    "dimension": "shapes do not fit: write the shape of each tensor beside its line",
}


def failure(error, file):
    """Turn whatever an answer has raised into a row of the result, in one line."""
    if isinstance(error, Failed):
        return error.row
    first = (str(error).splitlines() or [""])[0][:160]
    if isinstance(error, NotImplementedError) and first.startswith("exercise "):
        return dict(expected="a function", came="a blank", hint="the function is not written yet")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if Path(frame.filename).name == Path(file).name]
    place = f" at line {lines[-1]} of {file}" if lines else ""
    if isinstance(error, SyntaxError):
        place = f" at line {error.lineno} of {error.filename and Path(error.filename).name}"
    hint = next((words for part, words in REASONS.items() if part in str(error)),
                "the answer stops here; try the line by itself")
    return dict(expected="a result", came=f"{type(error).__name__}: {first}{place}", hint=hint)


def grade(number, module):
    """Try all properties of an exercise on a module -> a list of dicts."""
    rows = []
    for name, function in PROPERTIES[number]:
        rows.append(try_property(number, name, function, module))
    return rows


def try_property(number, name, function, module):
    torch.manual_seed(0)
    try:
        function(module)
    except (Exception, SystemExit) as error:
        row = failure(error, exercises.EXERCISES[number].file)
        return dict(name=name, passed=False) | row
    return dict(name=name, passed=True)


def load(exercise):
    """Import the file of an exercise; the last one's is a form."""
    if exercise.file.endswith(".json"):
        path = exercises.ROOT / exercise.file
        if not path.exists():
            raise Failed(f"a form {exercise.file}", "no such file",
                         f"`blank {exercise.number}` writes the empty form")
        return json.loads(path.read_text(encoding="utf-8"))
    return importlib.import_module(Path(exercise.file).stem)


def main():
    exercise = exercises.EXERCISES[int(sys.argv[1])]
    names = [name for name, _ in PROPERTIES[exercise.number]]
    with open(sys.argv[2], "w", encoding="utf-8", buffering=1) as file:
        print(json.dumps(names), file=file)
        trouble = module = None
        try:
            module = load(exercise)
        except (Exception, SystemExit) as error:
            trouble = failure(error, exercise.file)
        for name, function in PROPERTIES[exercise.number]:
            row = dict(name=name, passed=False)
            row |= trouble or try_property(exercise.number, name, function, module)
            print(json.dumps(row), file=file)


# -------------------------------------------------------------------------------------------------
# 1. The forward process

def noising(m):
    """A process and a batch whose width equals its size, so that wrong broadcasting shows."""
    diffusion = m.Diffusion.from_config({})
    return diffusion, torch.randn(3, 2, 4, 3), torch.randn(3, 2, 4, 3), torch.tensor([150, 0, 999])


@graded(1, "each sample is mixed at its own level of noise")
def levels(m):
    diffusion, x0, noise, t = noising(m)
    ab = diffusion.alpha_bar.double()

    def mix(signal, sigma):
        return signal.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * noise

    a, before = ab[t], ab[t - 1]
    roots = "the square root is missing: Eq. 4 names a variance, 1 - alpha_bar, and a mean with "
    got = call(diffusion.add_noise, x0, noise, t)
    same_twice(got, call(diffusion.add_noise, x0, noise, t), "the noise is given; draw none here")
    expect(got, mix(a.sqrt(), (1 - a).sqrt()), "compare with Eq. 4", {
        roots + "sqrt(alpha_bar)": mix(a, 1 - a),
        roots + "sqrt(alpha_bar); that of the noise is missing": mix(a.sqrt(), 1 - a),
        roots + "sqrt(alpha_bar); that of the signal is missing": mix(a, (1 - a).sqrt()),
        "signal and noise are exchanged": mix((1 - a).sqrt(), a.sqrt()),
        "one timestep off: alpha_bar[0] belongs to t = 0": mix(before.sqrt(), (1 - before).sqrt()),
        "the signal does not shrink: Eq. 4 scales both": mix(torch.ones(3), (1 - a).sqrt()),
        "this is one step of Eq. 2; Eq. 4 has the product of all alphas":
            mix((a / before).sqrt(), (1 - a / before).sqrt()),
        "all samples have the level of the first t": mix(a[:1].sqrt(), (1 - a[:1]).sqrt()),
        "all samples have the mean level of the batch": mix(a.mean().sqrt(), (1 - a.mean()).sqrt()),
        "the levels run along the width: give them the shape (B, 1, 1, 1)":
            a.sqrt() * x0 + (1 - a).sqrt() * noise,
    })


@graded(1, "unit variance stays unit variance")
def variance_stays(m):
    diffusion, x0, _, t = noising(m)
    one, zero = torch.ones_like(x0), torch.zeros_like(x0)
    squares = diffusion.add_noise(one, zero, t) ** 2 + diffusion.add_noise(zero, one, t) ** 2
    expect(squares, one, "the squares of the two factors must sum to 1: are both square roots "
           "there, and do signal and noise have the same t?")


@graded(1, "gradients reach x0 and the noise")
def forward_gradients(m):
    diffusion, x0, noise, t = noising(m)
    x0.requires_grad_()
    noise.requires_grad_()
    a = diffusion.alpha_bar[t].view(-1, 1, 1, 1)
    same_gradients(lambda: diffusion.add_noise(x0, noise, t),
                   lambda: a.sqrt() * x0 + (1 - a).sqrt() * noise, dict(x0=x0, noise=noise))


@graded(1, "the inputs stay as they are")
def forward_inputs(m):
    diffusion, x0, noise, t = noising(m)
    with unchanged(x0=x0, noise=noise, t=t, alpha_bar=diffusion.alpha_bar):
        diffusion.add_noise(x0, noise, t)


# -------------------------------------------------------------------------------------------------
# 2. DDIM

def network(x, t):
    """A stand-in for a network, which checks how it is called."""
    if not isinstance(t, torch.Tensor) or t.shape != (len(x),):
        raise Failed(f"t of shape ({len(x)},)", str(getattr(t, "shape", type(t).__name__)),
                     "the network wants a timestep for each sample: t (B,)")
    return 0.6 * x + t.view(-1, 1, 1, 1) / 1000


def ddim_by_hand(ab, model, x, steps, stride=None, end=1.0, x0_root=True, direction_root=True):
    """DDIM with eta = 0 in float64, and with mistakes where asked."""
    for t in range(len(ab) - len(ab) // steps, -1, -(len(ab) // steps)):
        after = t - (stride or len(ab) // steps)
        a, b = ab[t], ab[after] if after >= 0 else torch.as_tensor(end).double()
        eps = model(x, torch.full((len(x),), t))
        x0 = (x - ((1 - a).sqrt() if x0_root else 1 - a) * eps) / a.sqrt()
        x = b.sqrt() * x0 + ((1 - b).sqrt() if direction_root else 1 - b) * eps
    return x


@graded(2, "with eta = 0 each step is Eq. 12")
def ddim_steps(m):
    diffusion = m.Diffusion.from_config(dict(clip_sample=False))
    x = torch.randn(2, 3, 4, 4)
    ab, double = diffusion.alpha_bar.double(), x.double()
    variants = {
        "a step goes from t to t - T // steps, and not to t - 1": dict(stride=1),
        "the last step must end at the clean picture, alpha_bar = 1 (diffusion.level)":
            dict(end=ab[0]),
        "the direction to x_t has the factor sqrt(1 - alpha_bar_prev): the square root is missing":
            dict(direction_root=False),
        "Eq. 9 divides what is left after sqrt(1 - alpha_bar) eps: a square root is missing":
            dict(x0_root=False),
    }
    mistakes = {words: ddim_by_hand(ab, network, double, 5, **how)
                for words, how in variants.items()}
    got = m.ddim(diffusion, network, x.clone(), steps=5)
    same_twice(got, m.ddim(diffusion, network, x.clone(), steps=5), "with eta = 0 nothing is drawn "
               "at random: the direction to x_t has the predicted eps, not new noise")
    expect(got, ddim_by_hand(ab, network, double, 5),
           "compare with Eq. 12: the predicted x0, the direction to x_t, no noise", mistakes,
           tol=1e-3)


@graded(2, "a network that knows the noise leads to the clean picture in any number of steps")
def ddim_inverts(m):
    diffusion = m.Diffusion.from_config(dict(clip_sample=False))
    x0, eps = torch.randn(2, 2, 1, 3, 3)
    for steps in (1, 4, 50):
        a = diffusion.alpha_bar[diffusion.timesteps(steps)[0]]
        x = a.sqrt() * x0 + (1 - a).sqrt() * eps
        got = m.ddim(diffusion, lambda x, t: eps.clone(), x, steps=steps)
        expect(got, x0, "every x on the way must be sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, "
               "and the last one clean", tol=2e-3)


@graded(2, "the network is asked once a step, at the timesteps to visit")
def ddim_visits(m):
    diffusion = m.Diffusion.from_config(dict(clip_sample=False))
    seen = []

    def recording(x, t):
        out = network(x, t)
        seen.append(int(t[0]))
        return out

    m.ddim(diffusion, recording, torch.randn(2, 1, 2, 2), steps=4)
    if seen != [750, 500, 250, 0]:
        raise Failed("t = 750, 500, 250, 0", f"t = {', '.join(map(str, seen))}",
                     "visit diffusion.timesteps(steps) in order, each once")


@graded(2, "with eta = 1 the noise has the variance of Eq. 16, and the direction makes room for it")
def ddim_noise(m):
    # Four timesteps, of which two are visited: the noise of the first step is large.
    diffusion = m.Diffusion.from_config(dict(clip_sample=False, num_train_timesteps=4,
                                             beta_start=0.1, beta_end=0.4))
    x = m.ddim(diffusion, lambda x, t: torch.ones_like(x), torch.zeros(8, 4, 64, 64), steps=2,
               eta=1.0)
    ab = diffusion.alpha_bar.double()
    a, b = ab[2], ab[0]
    var = (1 - b) / (1 - a) * (1 - a / b)
    x0 = -(1 - a).sqrt() / a.sqrt()
    # The second step leads to the clean picture, which has no noise.
    mean = (b.sqrt() * x0 + (1 - b - var).sqrt() - (1 - b).sqrt()) / b.sqrt()
    std = (var / b).sqrt()
    got = x.detach().double()
    came = f"standard deviation {got.std():.4g}, mean {got.mean():.4g}"
    expected = f"standard deviation {std:.4g}, mean {mean:.4g}"
    if got.std() < 1e-6:
        raise Failed(expected, came, "eta has no effect: eta > 0 adds noise to every step")
    if abs(got.std() / (var / b.sqrt()) - 1) < 0.05:
        raise Failed(expected, came, "the noise is multiplied by the variance; take its square "
                     "root")
    if abs(got.std() / std - 1) > 0.03:
        raise Failed(expected, came, "the variance of Eq. 16 is (1 - alpha_bar_prev) / (1 - "
                     "alpha_bar) times (1 - alpha_bar / alpha_bar_prev): is there a mistake?")
    if abs(got.mean() - mean) > 0.03 * std:
        raise Failed(expected, came, "the direction to x_t has the factor sqrt(1 - alpha_bar_prev "
                     "- variance): the noise takes the place of a part of it")


@graded(2, "the noise that it starts from stays as it is")
def ddim_inputs(m):
    diffusion = m.Diffusion.from_config(dict(clip_sample=False))
    x = torch.randn(2, 1, 2, 2)
    with unchanged(x=x):
        m.ddim(diffusion, network, x, steps=3)


# -------------------------------------------------------------------------------------------------
# 3. Guidance

@graded(3, "picture and text: three predictions")
def guide_three(m):
    none, picture, both = out = torch.randn(3, 2, 4, 3, 3)
    sT, sI = 7.5, 1.5
    want = none + sI * (picture - none) + sT * (both - picture)
    expect(call(m.guide, out, sT, sI), want, "compare with InstructPix2Pix Eq. 3", {
        "the two scales are exchanged": none + sT * (picture - none) + sI * (both - picture),
        "the text's direction starts from the prediction with the picture, not from that with "
        "neither": none + sI * (picture - none) + sT * (both - none),
        "this is w = scale - 1 of Ho and Salimans: a scale of 1 must give the conditional "
        "prediction": both + sI * (picture - none) + sT * (both - picture),
        "the picture's term is missing": none + sT * (both - picture),
        "image_scale is not used: the picture has a term of its own": none + sT * (both - none),
        "the predictions are averaged": out.mean(0),
        "the sum starts from the prediction with the picture; it starts from the one with neither":
            picture + sI * (picture - none) + sT * (both - picture),
        "the order of the predictions is neither, picture, both":
            both + sI * (picture - both) + sT * (none - picture),
    })


@graded(3, "text alone: two predictions")
def guide_two(m):
    none, text = out = torch.randn(2, 2, 4, 3, 3)
    want = none + 3 * (text - none)
    expect(call(m.guide, out, 3.0, 1.7), want, "with K = 2 the text is all there is", {
        "this is w = scale - 1 of Ho and Salimans: a scale of 1 must give the conditional "
        "prediction": text + 3 * (text - none),
        "with two predictions the second is the text's, and text_scale is its scale":
            none + 1.7 * (text - none),
        "the two predictions are exchanged: the first is the one without text":
            text + 3 * (none - text),
    })


@graded(3, "scales of 1 give the last prediction and scales of 0 the first; one stays as it is")
def guide_ends(m):
    for K in (1, 2, 3):
        out = torch.randn(K, 2, 1, 2, 2)
        words = f"with K = {K}: scales of 1 must cancel everything but the last prediction"
        expect(call(m.guide, out, 1.0, 1.0), out[-1], words)
        words = f"with K = {K}: at scales of 0 nothing is added to the first prediction"
        expect(call(m.guide, out, 0.0, 0.0), out[0], words)


@graded(3, "the predictions stay as they are")
def guide_inputs(m):
    for K in (2, 3):
        out = torch.randn(K, 2, 1, 2, 2)
        with unchanged(out=out):
            m.guide(out, 3.0, 1.5)


# -------------------------------------------------------------------------------------------------
# 4. Attention

def attention_by_hand(layer, x, context, scale=None, axis=-1, heads=None, project=True):
    """Attention, one head after the other, and with mistakes where asked."""
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    heads = heads or layer.heads
    width = q.shape[-1] // heads
    parts = []
    for i in range(heads):
        s = slice(i * width, (i + 1) * width)
        scores = q[..., s] @ k[..., s].transpose(1, 2) * (scale or width ** -0.5)
        parts.append(scores.softmax(axis) @ v[..., s])
    y = torch.cat(parts, -1)
    return layer.to_out[0](y) if project else y


@torch.no_grad()
def compare_attention(layer, x, context, hint):
    source = x if context is None else context
    d, C = x.shape[-1] // layer.heads, x.shape[-1]
    variants = {
        "the scores are not divided by the root of the head's width": dict(scale=1.0),
        "the scores are divided by the head's width; take its square root": dict(scale=1 / d),
        "the scores are divided by the root of all channels; a head has C / heads":
            dict(scale=C ** -0.5),
        "the softmax runs over the wrong axis: the weights of one query sum to 1 over the context":
            dict(axis=-2),
        "there is one head only: split the channels into self.heads slices": dict(heads=1),
        "the output projection self.to_out[0] is missing": dict(project=False),
    }
    mistakes = {words: attention_by_hand(layer, x, source, **how)
                for words, how in variants.items()}
    # Heads and positions laid out one in the other's place.
    q, k, v = [y.unflatten(-1, (layer.heads, d)).transpose(1, 2)
               for y in (layer.to_q(x), layer.to_k(source), layer.to_v(source))]
    scores = q @ k.transpose(-1, -2) / d ** 0.5
    for axis, what in enumerate(("batch", "heads")):
        y = (scores.softmax(axis) @ v).transpose(1, 2).flatten(2)
        mistakes[f"the softmax runs over the {what}, and not over the context"] = \
            layer.to_out[0](y)
    y = scores.softmax(-1) @ v
    mistakes["the heads are put together in the wrong order: bring (B, heads, L, C / heads) to "
             "(B, L, heads, C / heads) before flattening"] = layer.to_out[0](y.reshape(x.shape))
    expect(call(layer, x, context), attention_by_hand(layer, x, source), hint, mistakes)


@graded(4, "cross-attention: positions look at a context")
def cross_attention(m):
    compare_attention(m.Attention(12, 10, 3), 4 * torch.randn(2, 5, 12), 4 * torch.randn(2, 7, 10),
                      "compare with Eq. 1, for each head by itself")


@graded(4, "self-attention: without a context, positions look at each other")
def self_attention(m):
    compare_attention(m.Attention(8, 8, 2), 3 * torch.randn(2, 5, 8), None,
                      "without a context, keys and values come from x itself")


@graded(4, "no sample sees another one, and the order of the context does not count")
def attention_symmetry(m):
    layer = m.Attention(8, 8, 2)
    x, context = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    with torch.no_grad():
        together = layer(x, context)
        for i in range(3):
            expect(together[i:i + 1], layer(x[i:i + 1], context[i:i + 1]),
                   "a sample's result depends on the others in the batch: is an axis mixed up?")
        expect(layer(x, context.flip(1)), together, "attention has no order; a reversed context "
               "must give the same: is the softmax over another axis than the context?")


@graded(4, "gradients reach the input, the context and all four layers")
def attention_gradients(m):
    layer = m.Attention(8, 6, 2)
    x, context = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    same_gradients(lambda: layer(x, context), lambda: attention_by_hand(layer, x, context),
                   dict(x=x, context=context) | dict(layer.named_parameters()))


@graded(4, "the inputs stay as they are")
def attention_inputs(m):
    layer = m.Attention(8, 6, 2)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 4, 6)
    with torch.no_grad(), unchanged(x=x, context=context, layer=dict(layer.named_parameters())):
        layer(x, context)


# -------------------------------------------------------------------------------------------------
# 5 to 9. MTU

SMALL = dict(block_out_channels=(8,), down_block_types=("DownBlock2D",), sample_size=8,
             up_block_types=("UpBlock2D",), layers_per_block=1, attention_head_dim=2,
             cross_attention_dim=6, norm_num_groups=4)


def small_unet():
    import unet
    return unet.UNet(SMALL)


@torch.no_grad()
def experts(m, init="literal", count=4, trained=True):
    """A feed-forward layer of count experts, with the task vectors, and its dense original."""
    net = small_unet()
    block = net.mid_block.attentions[0].transformer_blocks[0]
    dense = copy.deepcopy(block.ff)
    m.upcycle(net, num_experts=count, init=init)
    layer = block.ff
    if trained:
        # As training leaves it: weights that differ by task, and biases that differ by expert.
        layer.router[2].weight.normal_()
        layer.router[2].bias.normal_()
        layer.out_bias.normal_()
    return layer, net.task_embedding.weight, dense


def mixture_by_hand(layer, x, e, activations=1.0, biases=1.0, weights=None, interleaved=False,
                    scale_input=False):
    """Eq. 1, one expert after the other, and with mistakes where asked."""
    w = layer.router(e).softmax(-1) if weights is None else weights
    N = layer.num_experts
    V = layer.net[2].weight
    d = V.shape[1] // N
    total = 0
    for i in range(N):
        w_i = w[:, i, None, None]
        value, gate = layer.net[0].proj(w_i * x if scale_input else x).chunk(2, dim=-1)
        h = value * F.gelu(gate)
        units = slice(i, None, N) if interleaved else slice(i * d, (i + 1) * d)
        out = activations * h[..., units] @ V[:, units].T + biases * layer.out_bias[i]
        total = total + (out if scale_input else w_i * out)
    return total


def mixture_mistakes(layer, x, e, factor=1.0):
    """What mistakes in Eq. 1 give, where `factor` multiplies the activations."""
    g = layer.router(e)
    w = g.softmax(-1)
    N = layer.num_experts

    def by_hand(**how):
        return mixture_by_hand(layer, x, e, **dict(activations=factor) | how)

    return {
        "the softmax runs over the batch; the weights of one sample sum to 1 over the experts":
            by_hand(weights=g.softmax(0)),
        "the experts are averaged: the router's weights are not used":
            by_hand(weights=torch.full_like(w, 1 / N)),
        "the weights are not normalised: is the softmax missing?": by_hand(weights=g),
        "the softmax is taken twice: router_weights has it already":
            by_hand(weights=w.softmax(-1)),
        "the biases are missing: each expert has its own, weighted like its output":
            by_hand(biases=0),
        "the biases are added without their weights; b_i is a part of E_i":
            by_hand(biases=0) + layer.out_bias.sum(0),
        "the biases are averaged without their weights; b_i is a part of E_i":
            by_hand(biases=0) + layer.out_bias.mean(0),
        "an expert's units are a slice of neighbours; here every N-th unit has the same weight "
        "(repeat_interleave, not repeat)": by_hand(interleaved=True),
        "each expert's output is weighted once; here the weights enter twice":
            by_hand(weights=w * w, biases=0) + (w @ layer.out_bias)[:, None],
        "only the best expert counts; Eq. 1 sums over all of them":
            by_hand(weights=F.one_hot(w.argmax(-1), N).to(w)),
        "the weights are averaged over the batch; each sample has those of its own task":
            by_hand(weights=w.mean(0, keepdim=True).expand_as(w)),
        "the last expert is missing": by_hand(weights=w * (torch.arange(N) < N - 1)),
        "the first expert is missing": by_hand(weights=w * (torch.arange(N) > 0)),
        "all samples have the weights of the first sample's task":
            by_hand(weights=w[:1].expand_as(w)),
        "the weights multiply the layer's input; they belong to what the experts put out, and "
        "GEGLU is not linear": by_hand(scale_input=True),
    }


def compare_mixture(layer, x, e, hint, factor=1.0, more=()):
    with torch.no_grad():
        mistakes = mixture_mistakes(layer, x, e, factor) | dict(more)
        want = mixture_by_hand(layer, x, e, activations=factor)
        expect(call(layer, x, SimpleNamespace(task_emb=e.detach())), want, hint, mistakes)


@graded(5, "each sample is mixed by the weights of its own task")
def mixture(m):
    layer, e, _ = experts(m)
    compare_mixture(layer, torch.randn(4, 3, 8), e[[2, 0, 3, 1]],
                    "compare with a loop over the experts: w_i times (V_i h_i + b_i), summed")


@graded(5, "one expert alone is the dense layer, and two are mixed too")
def one_expert(m):
    layer, e, _ = experts(m, count=1)
    compare_mixture(layer, torch.randn(2, 3, 8), e[:2], "with N = 1 the weight is 1, and the bias "
                    "comes once")
    layer, e, _ = experts(m, count=2)
    compare_mixture(layer, torch.randn(2, 3, 8), e[:2], "the number of experts is "
                    "self.num_experts, not always 4")


@graded(6, "at the start the result is the pretrained layer's, for N = 1, 2 and 4")
def preserve_start(m):
    for N in (1, 2, 4):
        layer, e, dense = experts(m, "preserve", N, trained=False)
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            want, bias = dense(x, None), dense.net[2].bias
            # Small beside the tolerance of a sum, a bias that counts N times must be seen.
            layer.out_bias += 1.0
            want, bias = want + 1.0, bias + 1.0
            got = call(layer, x, SimpleNamespace(task_emb=e[:2].detach()))
            expect(got, want, f"N = {N}: at w_i = 1/N the N slices must add up to the dense layer, "
                   "and the bias must come once", {
                "the factor is missing: this is Eq. 1 as printed": (want - bias) / N + bias,
                "the factor multiplies the bias too, which then comes N times":
                    want + (N - 1) * bias,
                "the factor multiplies only the bias; it belongs to the activations":
                    (want - bias) / N + N * bias,
                "the factor divides; it must undo the 1/N of the weights":
                    (want - bias) / N ** 2 + bias,
                "the factor comes twice": (want - bias) * N + bias,
                "the factor comes as its square root": (want - bias) / N ** 0.5 + bias,
                "the biases are added without their weights: their sum is N times the bias":
                    want + (N - 1) * bias,
            })


@graded(6, "when the router has learned, the factor stays and the bias has none")
def preserve_trained(m):
    layer, e, _ = experts(m, "preserve")
    x = torch.randn(4, 3, 8)
    with torch.no_grad():
        more = {
            "the factor is missing: this is Eq. 1 as printed": mixture_by_hand(layer, x, e),
            "the factor multiplies the bias too; the biases' weights sum to 1 without it":
                mixture_by_hand(layer, x, e, activations=4.0, biases=4.0),
            "the factor multiplies only the bias; it belongs to the activations":
                mixture_by_hand(layer, x, e, biases=4.0),
            "the factor divides; it must undo the 1/N of the weights":
                mixture_by_hand(layer, x, e, activations=0.25),
        }
    compare_mixture(layer, x, e, "compare with a loop: w_i times (N V_i h_i + b_i), summed", 4.0,
                    more)


@graded(6, "with init = literal the result is still Eq. 1 as printed")
def preserve_literal(m):
    layer, e, _ = experts(m, "literal")
    compare_mixture(layer, torch.randn(4, 3, 8), e, "self.scale is 1 for literal: use it rather "
                    "than N")


@graded(5, "gradients reach x, the task vectors, the router and all experts", "literal", 1.0)
@graded(6, "gradients reach x, the task vectors, the router and all experts", "preserve", 4.0)
def mixture_gradients(m, init, factor):
    layer, e, _ = experts(m, init)
    x = torch.randn(2, 3, 8, requires_grad=True)
    e = e[:2].detach().clone().requires_grad_()
    parameters = {name: p.requires_grad_() for name, p in layer.named_parameters()}
    same_gradients(lambda: layer(x, SimpleNamespace(task_emb=e)),
                   lambda: mixture_by_hand(layer, x, e, activations=factor),
                   {"x": x, "the task vector e": e} | parameters)


@graded(5, "input and parameters stay as they are", "literal")
@graded(6, "input and parameters stay as they are", "preserve")
def mixture_inputs(m, init):
    layer, e, _ = experts(m, init)
    x = torch.randn(4, 3, 8)
    with torch.no_grad(), unchanged(x=x, layer=dict(layer.named_parameters())):
        layer(x, SimpleNamespace(task_emb=e))


# 7. Folding

@graded(7, "the same for experts that started as the pretrained layer", "preserve", 4.0)
@graded(7, "each task's folded layer computes what the mixture computes", "literal", 1.0)
def folded_layer(m, init, factor):
    layer, e, _ = experts(m, init)
    x = torch.randn(1, 3, 8)
    for row in range(4):
        task = e[row:row + 1]
        with torch.no_grad():
            got = call(copy.deepcopy(layer).fold, task)
            if got is None:
                raise Failed("a FeedForward", "None", "is a return missing?")
            mistakes = mixture_mistakes(layer, x, task, factor)
            mistakes |= {
                "self.scale is missing: the activations are multiplied by it, see exercise 6":
                    mixture_by_hand(layer, x, task),
                "self.scale multiplies the bias too; it belongs to the activations":
                    mixture_by_hand(layer, x, task, activations=factor, biases=factor),
                "every task is folded with the weights of the first":
                    mixture_by_hand(layer, x, e[:1], activations=factor),
            }
            want = mixture_by_hand(layer, x, task, activations=factor)
            expect(got(x, None), want, "the folded layer must compute what the mixture does: "
                   "multiply each unit's output weights (columns) by its expert's w_i", mistakes)


@graded(7, "the result is an ordinary feed-forward layer, without a router")
def fold_kind(m):
    import unet
    layer, e, _ = experts(m)
    got = layer.fold(e[:1])
    want = {name: tuple(p.shape) for name, p in unet.FeedForward(8).state_dict().items()}
    came = {name: tuple(p.shape) for name, p in got.state_dict().items()} \
        if isinstance(got, torch.nn.Module) else type(got).__name__
    if came != want or not isinstance(got, unet.FeedForward):
        raise Failed(f"parameters {want}", f"{type(got).__name__} with {came}", "return a new "
                     "unet.FeedForward(C) that has the usual parameters and nothing else")


@graded(7, "the mixture stays as it is")
def fold_inputs(m):
    layer, e, _ = experts(m, "preserve")
    with torch.no_grad(), unchanged(layer=dict(layer.named_parameters())):
        layer.fold(e[:1])


# 8. The input convolution

@torch.no_grad()
def task_conv(m):
    """Four tasks, of which the first reads 4 channels and the others 8."""
    net = small_unet()
    m.upcycle(net)
    conv = net.conv_in
    for row, channels in enumerate(conv.in_channels):
        conv.weight[row, :, :channels].normal_()
    conv.bias.normal_()
    return conv


def conv_by_hand(conv, x, task, bias_of=None):
    rows = []
    for sample, row in zip(x, task.tolist()):
        n = min(conv.in_channels[row], len(sample))
        bias = conv.bias[row if bias_of is None else bias_of]
        rows.append(F.conv2d(sample[None, :n], conv.weight[row, :, :n], bias, padding=1))
    return torch.cat(rows)


def compare_conv(conv, x, task, hint):
    with torch.no_grad():
        first = torch.full_like(task, int(task[0]))
        expect(call(conv, x, SimpleNamespace(task=task)), conv_by_hand(conv, x, task), hint, {
            "the whole batch has the kernel of the first sample's task":
                conv_by_hand(conv, x, first),
            "the bias is that of the first task": conv_by_hand(conv, x, task, 0),
            "the bias is missing": conv_by_hand(conv, x, task)
            - conv.bias[task][:, :, None, None],
            "the kernels are averaged over the tasks":
                F.conv2d(x, conv.weight.mean(0)[:, :x.shape[1]], conv.bias.mean(0), padding=1),
            "the kernel is turned by 180 degrees: torch's convolution does not flip it":
                conv_by_hand(SimpleNamespace(weight=conv.weight.flip(3, 4), bias=conv.bias,
                                             in_channels=conv.in_channels), x, task),
            "the padding is missing: height and width stay as they are":
                conv_by_hand(conv, x, task)[:, :, 1:-1, 1:-1],
        })


@graded(8, "a mixed batch: each sample has the kernel and the bias of its task")
def conv_mixed(m):
    compare_conv(task_conv(m), torch.randn(4, 8, 5, 4), torch.tensor([2, 0, 3, 1]),
                 "compare with F.conv2d, padding 1, one sample after the other")


@graded(8, "a batch of the narrow task, with 4 channels")
def conv_narrow(m):
    compare_conv(task_conv(m), torch.randn(2, 4, 3, 5), torch.tensor([0, 0]),
                 "x may have fewer channels than the widest task: pad it, or cut the kernel")


@graded(8, "gradients reach x and the tables; weights of channels that a task lacks get none")
def conv_gradients(m):
    conv = task_conv(m)
    x, task = torch.randn(3, 8, 3, 3, requires_grad=True), torch.tensor([0, 3, 0])
    parameters = dict(conv.named_parameters())
    got = conv(x, SimpleNamespace(task=task))
    if isinstance(got, torch.Tensor) and got.requires_grad:
        (grad,) = torch.autograd.grad(got.square().sum(), [conv.weight], allow_unused=True)
        if grad is not None and grad[0, :, 4:].any():
            raise Failed("no gradient there", "a gradient", "the first task reads 4 channels; its "
                         "weights for the other 4 must get no gradient: mask x, or cut the kernel")
    same_gradients(lambda: conv(x, SimpleNamespace(task=task)),
                   lambda: conv_by_hand(conv, x, task), {"x": x} | parameters)


@graded(8, "input and parameters stay as they are")
def conv_inputs(m):
    conv = task_conv(m)
    x = torch.randn(2, 8, 3, 3)
    with torch.no_grad(), unchanged(x=x, conv=dict(conv.named_parameters())):
        conv(x, SimpleNamespace(task=torch.tensor([0, 1])))


# 9. Adding a task

def tables(m, net):
    return {name: p for name, p in net.named_parameters()
            if any(part in name for part in m.TABLES)}


@torch.no_grad()
def with_task(m, like="sr"):
    """An upcycled network whose rows all differ, before and after a task is added."""
    net = small_unet()
    m.upcycle(net)
    for p in tables(m, net).values():
        p.add_(torch.randn_like(p) * (p != 0 if p.dim() == 5 else 1))
    before = {name: p.detach().clone() for name, p in tables(m, net).items()}
    with torch.enable_grad():
        result = m.add_task(net, "colour", like)
    return net, before, result


@graded(9, "every table has one row more, and the old rows stay where they are")
def rows_stay(m):
    net, before, _ = with_task(m)
    after = tables(m, net)
    for name, old in before.items():
        if name not in after:
            raise Failed(f"a parameter {name}", "none", f"{name} must stay a parameter of that "
                         "name: use nn.Parameter")
        if len(after[name]) == len(old):
            raise Failed(f"5 rows in {name}", "4 rows", f"the table {name} is forgotten: "
                         "input convolution, task_embedding and every norm3 have a row per task")
        expect(after[name][:len(old)], old, f"the old rows of {name} must keep their places and "
               "values: the new one is the last")


@graded(9, "the new row is a copy of that of `like`")
def row_copied(m):
    for like, row in (("sr", 2), ("t2i", 0)):
        net, before, _ = with_task(m, like)
        for name, new in tables(m, net).items():
            old = before[name]
            if len(new) == len(old):
                raise Failed(f"a new row in {name}", "none", f"the table {name} is forgotten")
            mistakes = {"the new row is that of the first task, and not of `like`": old[0],
                        "the new row is that of the last task, and not of `like`": old[3],
                        "the new row is zero": torch.zeros_like(old[0]),
                        "the new row is the mean of the old ones": old.mean(0)}
            expect(new[-1], old[row], f"the last row of {name} must equal that of `like` (another "
                   "start would throw away what that task has learned)", mistakes)


@graded(9, "only the tables train from now on, and the result is the network itself")
def tables_train(m):
    net, _, result = with_task(m)
    if result is not net:
        raise Failed("the U-Net itself", "None" if result is None else "another object",
                     "return the network, which is changed in place (trainable returns it)")
    for name, p in net.named_parameters():
        wanted = any(part in name for part in m.TABLES)
        if p.requires_grad != wanted:
            raise Failed(f"{name} {'trains' if wanted else 'is frozen'}", "the contrary",
                         "call trainable(unet) at the end, after the config names the added task: "
                         "else the experts train too, and the old tasks change")


@graded(9, "the config describes the network, so that it can be built again")
def task_recorded(m):
    net, _, _ = with_task(m)
    moe = net.config["moe"]
    came = [moe["tasks"][-1], moe["in_channels"].get("colour"), moe["added"],
            len(net.conv_in.in_channels), net.task_embedding.num_embeddings]
    if came != ["colour", 8, ["colour"], 5, 5]:
        raise Failed("tasks ending in colour, 8 channels, added = [colour], 5 entries in conv_in, "
                     "5 embeddings", str(came), 'keep unet.config["moe"] (tasks, in_channels, '
                     "added), conv_in.in_channels and task_embedding.num_embeddings in step")
    again = m.upcycle(small_unet(), **moe)
    try:
        again.load_state_dict(net.state_dict())
    except RuntimeError:
        raise Failed("a state dict that fits upcycle(UNet(..), **config['moe'])", "one that does "
                     "not", "a table is no parameter any more, or has the old number of rows"
                     ) from None


# -------------------------------------------------------------------------------------------------
# 10 and 11. DTR

def window(t, C, alpha, beta, T, rounding=torch.round, width=None, shift=0):
    """The official code's masks in float64, and with mistakes where asked."""
    width = int(C * beta) if width is None else width
    start = rounding((t.double() / (T - 1)) ** alpha * (C - width))[:, None] + shift
    c = torch.arange(C)
    return ((c >= start) & (c < start + width)).double()


def paper_window(t, C, alpha, beta, T):
    width = int(C * beta)
    first, last = [((C - width) * ((t.double() + i) / T) ** alpha).round()[:, None] for i in (0, 1)]
    c = torch.arange(1, C + 1)
    return ((c > first) & (c <= last + width)).double()


def compare_window(m, t, C, alpha, beta, T, hint):
    got = call(m.task_masks, t, C, alpha, beta, T)
    want = window(t, C, alpha, beta, T)
    if isinstance(got, torch.Tensor) and got.shape == want.shape:
        # Where the exact number is nearly half a channel, both channels are right.
        for nudge in (-1e-3, 1e-3):
            near = window(t, C, alpha, beta, T, lambda x: (x + nudge).round())
            same = (got.double() == near).all(1, keepdim=True)
            want = torch.where(same, near, want)
    expect(got, want, hint, {
        "this is the paper's formula; asked is the official code's window, always C_b wide":
            paper_window(t, C, alpha, beta, T),
        "alpha has no effect: the share of the way is raised to the power alpha":
            window(t, C, 1.0, beta, T),
        "the power is 1 / alpha; with alpha above 1 the window must move little at low t":
            window(t, C, 1 / alpha, beta, T),
        "C_b is rounded up; round it down": window(t, C, alpha, beta, T, width=int(C * beta) + 1),
        "the window is one channel too far": window(t, C, alpha, beta, T, shift=1),
        "the window begins one channel too early": window(t, C, alpha, beta, T, shift=-1),
        "the window is one channel too wide: it ends before start + C_b":
            (window(t, C, alpha, beta, T) + window(t, C, alpha, beta, T, shift=1)).clamp(max=1),
        "the beginning is rounded down, not to the nearest channel":
            window(t, C, alpha, beta, T, torch.floor),
        "the beginning is rounded up, not to the nearest channel":
            window(t, C, alpha, beta, T, torch.ceil),
        "the share of the way is t / (T - 1): the last timestep has gone all of it":
            window(t, C, alpha, beta, T + 1),
        "seen and unseen channels are exchanged": 1 - window(t, C, alpha, beta, T),
        "the window moves the wrong way: at t = 0 it begins at channel 0":
            window(t, C, alpha, beta, T).flip(1),
        "axes are exchanged: a row for each timestep, (B, C)": window(t, C, alpha, beta, T).T,
        "beta is the share that is seen, not the share that is hidden":
            window(t, C, alpha, 1 - beta, T),
    }, tol=1e-9)


@graded(10, "all timesteps of the default window, on 51 channels")
def window_default(m):
    compare_window(m, torch.arange(1000), 51, 4.0, 0.8, 1000, "compare with a loop: C_b = 40 "
                   "channels, from round(11 (t / 999)^4) on")


@graded(10, "other alpha, beta and T")
def window_other(m):
    hint = "are alpha, beta and num_steps all used?"
    compare_window(m, torch.arange(100), 24, 1.0, 0.5, 100, hint)
    compare_window(m, torch.arange(50), 37, 0.5, 0.75, 50, hint)


@graded(10, "each sample has the row of its own t, in any order")
def window_batch(m):
    compare_window(m, torch.tensor([999, 3, 3, 700]), 51, 4.0, 0.8, 1000,
                   "row i belongs to t[i]; timesteps may come in any order and more than once")


@graded(10, "the window begins at channel 0, ends at the last, and beta = 1 shows everything")
def window_ends(m):
    masks = m.task_masks(torch.tensor([0, 999]), 40, 4.0, 0.5, 1000)
    expect(masks, torch.tensor([[1.0] * 20 + [0.0] * 20, [0.0] * 20 + [1.0] * 20]),
           "at t = 0 the first C_b channels are seen, at t = T - 1 the last C_b")
    expect(m.task_masks(torch.tensor([0, 500, 999]), 12, 4.0, 1.0, 1000), torch.ones(3, 12),
           "with beta = 1 every timestep sees all channels")


def routed_block(m):
    """A DiT block with updates that are not zero, its input, and masks that differ by sample."""
    import dit
    net = dit.DiT(dict(sample_size=4, in_channels=2, num_layers=1, num_attention_heads=2,
                       attention_head_dim=4, num_embeds_ada_norm=3))
    with torch.no_grad():
        net.transformer_blocks[0].norm1.linear.weight.normal_()
    m.add_routing(net)
    t = torch.tensor([10, 500, 900])
    x = torch.randn(3, 2, 4, 4)
    cond = net.condition(x, t, torch.tensor([0, 1, 2]), None, None)
    block = net.transformer_blocks[0]
    mask = torch.ones(3, 8)
    mask[0, 6:] = 0
    mask[1, :2] = 0
    mask[2, ::3] = 0
    block.mask = lambda t: mask.to(x)
    return block, torch.randn(3, 5, 8), cond, mask[:, None], dit.DiTBlock.forward


def routed_by_hand(block, x, cond, mask, plain):
    return x + plain(block, mask * x, cond) - mask * x


@graded(11, "the result is x plus the updates that the block makes of the masked x")
def placement(m):
    block, x, cond, mask, plain = routed_block(m)
    with torch.no_grad():
        want = routed_by_hand(block, x, cond, mask, plain)
        updates = want - x
        expect(block(x.clone(), cond), want, "compare with x + Block(m x), where Block is the "
               "updates alone", {
            "the hidden channels of x are lost: only the updates read the masked x":
                plain(block, mask * x, cond),
            "there is no mask at all": plain(block, x, cond),
            "the updates are masked; it is their input that is": x + mask * updates,
            "the mask acts on the output instead of the input":
                x + mask * (plain(block, x, cond) - x),
            "the whole output is masked": mask * plain(block, mask * x, cond),
            "x comes twice: super().forward returns its input plus the updates":
                x + plain(block, mask * x, cond),
            "seen and hidden channels are exchanged":
                routed_by_hand(block, x, cond, 1 - mask, plain),
            "all samples have the mask of the first":
                routed_by_hand(block, x, cond, mask[:1], plain),
            "the residual path is masked: add (1 - m) x again":
                mask * x + updates,
        })


@graded(11, "a mask of ones is the plain block, and a mask of zeros still lets x through")
def placement_ends(m):
    block, x, cond, _, plain = routed_block(m)
    with torch.no_grad():
        block.mask = lambda t: torch.ones(3, 8)
        expect(block(x.clone(), cond), plain(block, x, cond),
               "with beta = 1 routing changes nothing")
        block.mask = lambda t: torch.zeros(3, 8)
        expect(block(x.clone(), cond), routed_by_hand(block, x, cond, 0.0, plain),
               "with nothing seen, the result is x plus the updates of zeros; the residual path "
               "stays whole")


@graded(11, "gradients reach x and the block")
def placement_gradients(m):
    block, x, cond, mask, plain = routed_block(m)
    x.requires_grad_()
    cond = cond._replace(temb=cond.temb.detach())
    tensors = {"x": x} | {name: p for name, p in block.named_parameters() if "emb" not in name}
    same_gradients(lambda: block(x, cond), lambda: routed_by_hand(block, x, cond, mask, plain),
                   tensors)


@graded(11, "x stays as it is")
def placement_inputs(m):
    block, x, cond, _, _ = routed_block(m)
    with torch.no_grad(), unchanged(x=x):
        block(x, cond)


# -------------------------------------------------------------------------------------------------
# 12. Loss weights

def compare_weight(m, kind, want, hint, mistakes=None, **config):
    diffusion = m.Diffusion.from_config(config)
    t = torch.tensor([0, 50, 300, 700, 999])
    ab = diffusion.alpha_bar.double()[t]
    snr = ab / (1 - ab)
    values = {words: value(ab, snr) for words, value in (mistakes or {}).items()}
    with unchanged(t=t, alpha_bar=diffusion.alpha_bar):
        got = diffusion.weight(t, kind)
    # Weights go from 1 to 25,000: each is compared by its ratio.
    right = want(ab, snr)
    if isinstance(got, torch.Tensor) and got.shape == right.shape:
        got, right = got / right, right / right
        values = {words: value / want(ab, snr) for words, value in values.items()}
    expect(got, right, hint, values, tol=1e-3)


@graded(12, "none: every weight is 1")
def weight_none(m):
    for kind in ("epsilon", "v_prediction"):
        compare_weight(m, "none", lambda ab, snr: torch.ones_like(ab), "none is the plain error: "
                       "a 1 for each sample, (B,)", prediction_type=kind)


@graded(12, "v: the error of the noise becomes that of v")
def weight_v(m):
    compare_weight(m, "v", lambda ab, snr: 1 / ab, "write v by eps and x_t alone: its error is "
                   "that of eps divided by the signal", {
        "the weight is squared like the error: divide by alpha_bar, not by its root":
            lambda ab, snr: 1 / ab.sqrt(),
        "this is 1 / (1 - alpha_bar), which belongs to predictions of x0":
            lambda ab, snr: 1 / (1 - ab),
        "the weight is turned over: v counts noisy steps more, not less": lambda ab, snr: ab,
        "v is 1 only where the network predicts v; here it predicts the noise":
            lambda ab, snr: torch.ones_like(ab),
    })


@graded(12, "min-snr: Hang et al. for predicted noise")
def weight_min_snr(m):
    compare_weight(m, "min-snr", lambda ab, snr: snr.clamp(max=5) / snr,
                   "min(snr, 5) is for predictions of x0; for the noise it is divided by snr", {
        "min and max are exchanged": lambda ab, snr: snr.clamp(min=5) / snr,
        "this is the weight for predictions of x0; for the noise divide by snr":
            lambda ab, snr: snr.clamp(max=5),
        "this is the weight for predictions of v; for the noise divide by snr, not snr + 1":
            lambda ab, snr: snr.clamp(max=5) / (snr + 1),
        "snr is that of amplitudes: the square is missing":
            lambda ab, snr: snr.sqrt().clamp(max=5) / snr.sqrt(),
        "gamma is 5 and not 1": lambda ab, snr: snr.clamp(max=1) / snr,
        "snr is turned over: signal by noise": lambda ab, snr: (1 / snr).clamp(max=5) * snr,
        "snr is alpha_bar / (1 - alpha_bar), and not alpha_bar":
            lambda ab, snr: ab.clamp(max=5) / ab,
    })


@graded(12, "p2: Choi et al. with k = gamma = 1")
def weight_p2(m):
    compare_weight(m, "p2", lambda ab, snr: 1 / (1 + snr), "the weight is 1 / (k + snr)^gamma", {
        "k is missing from the sum": lambda ab, snr: 1 / snr,
        "gamma is 1, and this is a square root": lambda ab, snr: 1 / (1 + snr).sqrt(),
        "snr is that of amplitudes: the square is missing": lambda ab, snr: 1 / (1 + snr.sqrt()),
        "the weight is turned over, or snr is: p2 makes clean steps count less":
            lambda ab, snr: ab,
    })


@graded(12, "where the network predicts v, the weights give the same loss")
def weight_of_v(m):
    hint = "the error of v is that of the noise divided by alpha_bar, so the weight is multiplied"
    wants = {"v": lambda ab, snr: torch.ones_like(ab),
             "min-snr": lambda ab, snr: snr.clamp(max=5) / (snr + 1),
             "p2": lambda ab, snr: ab * (1 - ab)}
    noise = {"min-snr": lambda ab, snr: snr.clamp(max=5) / snr, "p2": lambda ab, snr: 1 / (1 + snr),
             "v": lambda ab, snr: 1 / ab}
    for kind, want in wants.items():
        compare_weight(m, kind, want, f"{kind}: {hint}", {
            f"{kind}: these are the weights for predicted noise; {hint}": noise[kind],
            f"{kind}: divided by alpha_bar, where it must be multiplied":
                lambda ab, snr: noise[kind](ab, snr) / ab,
        }, prediction_type="v_prediction")


# -------------------------------------------------------------------------------------------------
# 13 to 15. DeMe

def draws(m, t_range, p, size=20000, T=1000, seed=0):
    got = m.sample_timesteps(t_range, T, p, np.random.default_rng(seed), size)
    if got is None:
        raise Failed(f"{size} integers", "None", "is a return missing?")
    got = np.asarray(got)
    if got.shape != (size,) or not np.array_equal(got, np.floor(got)):
        raise Failed(f"whole numbers of shape ({size},)", f"shape {got.shape}, such as "
                     f"{got.flat[0] if got.size else 'nothing'}", "return one integer per sample")
    if got.min() < 0 or got.max() >= T:
        raise Failed(f"timesteps 0 .. {T - 1}", f"{got.min()} .. {got.max()}",
                     "the last timestep is T - 1: the upper end is not included")
    return got


@graded(13, "with p = 0 every timestep of the range comes, and no other")
def range_only(m):
    got = draws(m, (250, 500), 0.0)
    if got.min() < 250 or got.max() > 499:
        outside = np.mean((got < 250) | (got > 499))
        words = "end is not included: the last timestep of the range is end - 1" \
            if got.max() == 500 and got.min() >= 250 else \
            "p is the probability of drawing from all timesteps; with p = 0 none is"
        raise Failed("250 .. 499", f"{got.min()} .. {got.max()}, {outside:.1%} outside", words)
    counts = np.bincount(got - 250, minlength=250)
    if counts.min() == 0:
        raise Failed("each of 250 timesteps", f"never {250 + counts.argmin()}",
                     "start is included, and so is end - 1")
    if counts.max() > 160 or counts.min() < 30:
        raise Failed("about 80 times each", f"{counts.min()} to {counts.max()} times",
                     "within the range, t is uniform")


@graded(13, "with p = 1 all timesteps come equally often")
def everywhere(m):
    got = draws(m, (250, 500), 1.0)
    share = np.mean((got >= 250) & (got < 500))
    if abs(share - 0.25) > 0.02:
        words = "a global draw may fall into the range as well: all timesteps are equally likely" \
            if share < 0.02 else "p = 1 draws from [0, T) always: are p and 1 - p exchanged?"
        raise Failed("25% in the range", f"{share:.1%}", words)
    if got.max() - got.min() < 990:
        raise Failed("timesteps from 0 to 999", f"{got.min()} .. {got.max()}",
                     "global draws come from all timesteps")


@graded(13, "with p = 0.3 the range has its share, 1 - p and a part of p")
def shares(m):
    for t_range, p in (((250, 500), 0.3), ((0, 100), 0.5)):
        got = draws(m, t_range, p)
        inside = np.mean((got >= t_range[0]) & (got < t_range[1]))
        length = (t_range[1] - t_range[0]) / 1000
        want = 1 - p + p * length
        if abs(inside - want) < 0.02:
            continue
        words = "compare with Eq. 6"
        if inside in (0.0, 1.0) or abs(inside - length) < 0.02:
            words = "the whole batch is drawn alike: every sample decides for itself"
        if abs(inside - (1 - p)) < 0.02:
            words = "global draws never fall into the range: they come from all of [0, T)"
        elif abs(inside - (p + (1 - p) * length)) < 0.02:
            words = "p and 1 - p are exchanged: p is the probability of a global draw"
        raise Failed(f"{want:.1%} in the range", f"{inside:.1%}", words)


@graded(13, "every sample decides for itself")
def per_sample(m):
    kinds = set()
    for seed in range(6):
        got = draws(m, (0, 10), 0.5, size=64, seed=seed)
        kinds.add("both" if 0 < np.mean(got < 10) < 1 else "one kind")
    if kinds != {"both"}:
        raise Failed("both kinds in every batch of 64", "batches of one kind",
                     "the whole batch is drawn alike: draw the decision for each sample")


@graded(13, "all randomness comes from rng")
def from_rng(m):
    if not np.array_equal(draws(m, (0, 500), 0.3, 50), draws(m, (0, 500), 0.3, 50)):
        raise Failed("the same draws for the same rng", "others", "something is drawn from another "
                     "source than rng, or rng is made anew without a seed")
    if np.array_equal(draws(m, (0, 500), 0.3, 50, seed=1), draws(m, (0, 500), 0.3, 50, seed=2)):
        raise Failed("other draws for another rng", "the same", "the seed is fixed in the "
                     "function; draw from rng")


def states(count=2):
    """A base and its tuned copies, as state dicts with a tensor of integers."""
    base = dict(weight=torch.randn(3, 4), bias=torch.randn(3), steps=torch.tensor([7]))
    tuned = [{key: v + 0.3 * torch.randn(v.shape) if v.is_floating_point() else v.clone()
              for key, v in base.items()} for _ in range(count)]
    return base, tuned


def compare_states(got, want, hint, mistakes=()):
    """Compare dicts of tensors; mistakes: {hint: function of a key -> tensor}."""
    if not isinstance(got, dict):
        raise Failed("a dict of tensors", type(got).__name__, "return a dict: name -> tensor")
    if got.keys() != want.keys():
        raise Failed(f"keys {', '.join(want)}", ", ".join(map(str, got)) or "none",
                     "tensors of integers have no average: they stay the base's, and do not enter "
                     "a task vector")
    for key, value in want.items():
        expect(got[key], value, f"{key}: {hint}",
               {words: function(key) for words, function in dict(mistakes).items()})


@graded(14, "a task vector is tuned minus base, without integers")
def vector(m):
    base, (tuned, _) = states()
    want = {key: tuned[key] - base[key] for key in ("weight", "bias")}
    compare_states(call(m.task_vector, base, tuned), want, "compare with Eq. 8's tau", {
        "the sign is wrong: tau points from the base to the tuned model":
            lambda key: base[key] - tuned[key],
        "this is the tuned model itself; subtract the base": lambda key: tuned[key],
    })


@graded(14, "merging adds every vector with its weight to the base")
def merging(m):
    base, tuned = states()
    floats = ("weight", "bias")
    taus = [{key: t[key] - base[key] for key in floats} for t in tuned]
    for weights in ([0.7, 0.9], [0.5, -0.2], [0.0, 1.0]):
        def total(key, w=weights):
            return sum(share * tau[key] for share, tau in zip(w, taus))

        want = {key: base[key] + total(key) if key in floats else base[key] for key in base}
        got = call(m.merge, base, taus, list(weights))
        mistakes = {
            "the weights are normalised; they need not sum to 1":
                lambda key: base[key] + (total(key) / sum(weights) if key in floats else 0),
            "the vectors are averaged; Eq. 8 sums them":
                lambda key: base[key] + (total(key) / 2 if key in floats else 0),
            "the base is missing": lambda key: total(key) if key in floats else base[key],
            "the base counts once per vector":
                lambda key: 2 * base[key] + total(key) if key in floats else base[key],
            "the vectors are subtracted":
                lambda key: base[key] - (total(key) if key in floats else 0),
            "the weights are not used":
                lambda key: base[key] + (total(key, [1, 1]) if key in floats else 0),
            "only the last vector is added":
                lambda key: base[key] + (weights[1] * taus[1][key] if key in floats else 0),
            "only the first vector is added":
                lambda key: base[key] + (weights[0] * taus[0][key] if key in floats else 0),
        }
        compare_states(got, want, "compare with Eq. 8", mistakes)


@graded(14, "weight 1 alone gives the tuned model back, and integers stay whole")
def merging_ends(m):
    base, (tuned, other) = states()
    taus = [call(m.task_vector, base, tuned), call(m.task_vector, base, other)]
    got = call(m.merge, base, taus, [1.0, 0.0])
    compare_states(got, tuned, "weights 1 and 0 must give the first tuned model back")
    if got["steps"].is_floating_point():
        raise Failed("integers", str(got["steps"].dtype), "tensors of integers stay the base's")


@graded(14, "base, tuned models and vectors stay as they are")
def merging_inputs(m):
    base, tuned = states()
    taus = [{key: t[key] - base[key] for key in ("weight", "bias")} for t in tuned]
    with unchanged(base=base, tuned=tuned[0], vector=taus[0], second=taus[1]):
        m.task_vector(base, tuned[0])
        got = m.merge(base, taus, [0.5, 0.5])
        for key in ("weight", "bias"):
            got[key].add_(1.0)


def projected(m):
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    conv.__class__ = m.ProjectedConv2d
    conv.projection = torch.nn.Parameter(torch.randn(4, 4))
    return conv


def folded_by_hand(conv):
    rows = [sum(conv.projection[i, j] * conv.weight[j] for j in range(4)) for i in range(4)]
    return torch.stack(rows), conv.projection.mv(conv.bias)


def answer_folded(conv):
    got = conv.folded()
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise Failed("weight and bias", type(got).__name__, "return both, the weight first")
    return got


@graded(15, "the weight is P times K, on the output channels")
def folded_weight(m):
    conv = projected(m)
    P, K = conv.projection, conv.weight
    weight, _ = answer_folded(copy.deepcopy(conv))
    expect(weight, folded_by_hand(conv)[0], "P mixes output channels, the first axis of K", {
        "P is transposed: row i of P makes output channel i": torch.einsum("ji,jckl->ickl", P, K),
        "P mixes the input channels; it follows the convolution":
            torch.einsum("ij,ojkl->oikl", P, K),
        "P mixes the input channels; it follows the convolution, and is transposed":
            torch.einsum("ji,ojkl->oikl", P, K),
        "only P's diagonal is used": P.diag()[:, None, None, None] * K,
        "P is added; it multiplies": K + P[:, :, None, None],
    })


@graded(15, "the bias is projected too")
def folded_bias(m):
    conv = projected(m)
    _, bias = answer_folded(copy.deepcopy(conv))
    expect(bias, folded_by_hand(conv)[1], "P acts on K x + b: what becomes of b?", {
        "the bias passes through P as well": conv.bias,
        "P is transposed": conv.projection.T @ conv.bias,
        "P is multiplied element by element; it is a matrix": conv.projection.sum(1) * conv.bias,
    })


@graded(15, "one convolution computes what two layers computed")
def folded_result(m):
    conv = projected(m)
    x = torch.randn(2, 4, 5, 5)
    weight, bias = answer_folded(copy.deepcopy(conv))
    with torch.no_grad():
        y = F.conv2d(x, conv.weight, conv.bias, padding=1)
        expect(F.conv2d(x, weight, bias, padding=1),
               torch.einsum("ij,bjhw->bihw", conv.projection, y),
               "apply the convolution and then P, and compare", tol=1e-3)


@graded(15, "gradients reach the projection, the weight and the bias")
def folded_gradients(m):
    conv = projected(m)

    def flat(pair):
        return torch.cat([part.flatten() for part in pair])

    same_gradients(lambda: flat(answer_folded(conv)), lambda: flat(folded_by_hand(conv)),
                   dict(conv.named_parameters()))


@graded(15, "the layer stays as it is")
def folded_inputs(m):
    conv = projected(m)
    with torch.no_grad(), unchanged(layer=dict(conv.named_parameters())):
        conv.folded()


# -------------------------------------------------------------------------------------------------
# 16 and 17. MT-Diffusion

def process(m, modalities=2):
    """A short process, whose coefficients are neither tiny nor nearly 1, and a batch."""
    alpha_bar = torch.cumprod(1 - torch.linspace(0.05, 0.4, 6), 0)
    weights = 0.3 + torch.rand(modalities, 6, dtype=torch.float64)
    aggregation = m.Aggregation(alpha_bar, weights)
    z0, z = torch.randn(2, 3, 2, 3, 3)
    E = torch.randn(modalities, 3, 2, 3, 3)
    return aggregation, alpha_bar.double(), weights, z0, z, E


def walk(ab, weights, z0, E, steps):
    """Take Eq. 3 step by step from z_0 -> mean and variance after so many steps."""
    mean, var = z0.double(), torch.zeros((), dtype=torch.float64)
    for t in range(steps):
        a = ab[t] / (ab[t - 1] if t else 1.0)
        A = (weights[:, t].view(-1, 1, 1, 1, 1) * E).sum(0)
        mean = a.sqrt() * (mean + A)
        var = a * var + 1 - a
    return mean, var


def pair(got, what):
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise Failed(what, type(got).__name__, f"return two tensors: {what}")
    return got


@graded(16, "marginal: the mean is where the steps of Eq. 3 lead")
def marginal_mean(m):
    aggregation, ab, weights, z0, _, E = process(m)
    for t in (0, 3, 5):
        mean, _ = pair(call(aggregation.marginal, z0, E, t), "mean and standard deviation")
        want, _ = walk(ab, weights, z0, E, t + 1)
        A = (weights[:, t].view(-1, 1, 1, 1, 1) * E).sum(0)
        plain = ab[t].sqrt() * z0
        C = want - plain
        expect(mean, want, f"t = {t}: compare with Eq. 3, step by step", {
            "E is missing: this is DDPM's mean": plain,
            "C_t is all the steps' contributions (self.c), not this step's A_t (self.w)": plain + A,
            "C_t is all the steps' contributions, not only this step's":
                plain + (ab[t] / (ab[t - 1] if t else 1)).sqrt() * A,
            "the modalities are averaged; they add up": plain + C / 2,
            "the square root is missing: z_0 has the factor sqrt(ab_t)": ab[t] * z0 + C,
            "C_t is subtracted": plain - C,
            "C_t is added before the scaling, so that it is scaled twice": plain + ab[t].sqrt() * C,
        })


@graded(16, "marginal: the standard deviation is DDPM's")
def marginal_std(m):
    aggregation, ab, weights, z0, _, E = process(m)
    for t in (0, 5):
        _, std = pair(call(aggregation.marginal, z0, E, t), "mean and standard deviation")
        _, var = walk(ab, weights, z0, E, t + 1)
        full = torch.ones_like(z0).double()
        expect(std, var.sqrt() * full, f"t = {t}: variances add up to 1 - ab_t", {
            "this is the variance; take its square root": var * full,
            "this is the noise of one step; the marginal has that of all":
                (1 - ab[t] / (ab[t - 1] if t else 1)).sqrt() * full,
            "this is the signal's factor": ab[t].sqrt() * full,
        }, broadcast=True)


def bayes(ab, weights, z0, z, E, t):
    """Multiply the two Gaussians of Lemma 4 -> mean and variance of z_{t-1}."""
    m0, v0 = walk(ab, weights, z0, E, t)
    if t == 0:
        return m0, v0
    a = ab[t] / ab[t - 1]
    A = (weights[:, t].view(-1, 1, 1, 1, 1) * E).sum(0)
    var = 1 / (1 / v0 + a / (1 - a))
    return var * (m0 / v0 + a.sqrt() * (z - a.sqrt() * A) / (1 - a)), var


@graded(16, "posterior: the mean is Bayes' rule's")
def posterior_mean(m):
    aggregation, ab, weights, z0, z, E = process(m)
    zero = torch.zeros_like(E)
    for t in (1, 3, 5):
        mean, _ = pair(call(aggregation.posterior, z0, z, E, t), "mean and variance")
        want, _ = bayes(ab, weights, z0, z, E, t)
        a = ab[t] / ab[t - 1]
        C = walk(ab, weights, 0 * z0, E, t + 1)[0]
        before = walk(ab, weights, 0 * z0, E, t)[0]
        A = (weights[:, t].view(-1, 1, 1, 1, 1) * E).sum(0)
        plain = bayes(ab, weights, z0, z, zero, t)[0]
        shifted = bayes(ab, weights, z0, z - C, zero, t)[0]
        of_z0 = ab[t - 1].sqrt() * (1 - a) / (1 - ab[t])
        of_z = a.sqrt() * (1 - ab[t - 1]) / (1 - ab[t])
        expect(mean, want, f"t = {t}: multiply the two Gaussians of Lemma 4", {
            "E is missing: this is DDPM's posterior": plain,
            "C_t is taken off z_t, but C_{t-1} is not added to the result": shifted,
            "C_{t-1} is added to the result, but C_t is not taken off z_t": plain + before,
            "C_t is added to the result where C_{t-1} belongs": shifted + C,
            "this is DDPM's mean minus A_t; that holds where z_0 is replaced by the noise, not "
            "here": plain - A,
            "the factors of z_0 and z_t are exchanged":
                of_z * z0 + of_z0 * (z - C) + before,
            "this is the marginal of z_{t-1}: z_t is not used":
                walk(ab, weights, z0, E, t)[0],
        })


@graded(16, "posterior: the variance is DDPM's")
def posterior_var(m):
    aggregation, ab, weights, z0, z, E = process(m)
    full = torch.ones_like(z0).double()
    for t in (1, 5):
        _, var = pair(call(aggregation.posterior, z0, z, E, t), "mean and variance")
        want = bayes(ab, weights, z0, z, E, t)[1]
        beta = 1 - ab[t] / ab[t - 1]
        expect(var, want * full, f"t = {t}: the variance does not depend on E", {
            "this is the standard deviation; square it": want.sqrt() * full,
            "this is beta, the variance of q(z_t | z_{t-1})": beta * full,
            "this is the marginal's variance": (1 - ab[t]) * full,
            "this is the marginal's variance at t - 1": (1 - ab[t - 1]) * full,
        }, broadcast=True)


@graded(16, "a batch of several t, one modality, and the last step to the clean picture")
def process_batch(m):
    aggregation, ab, weights, z0, z, E = process(m, modalities=1)
    t = torch.tensor([5, 0, 2])
    mean, std = pair(call(aggregation.marginal, z0, E, t), "mean and standard deviation")
    back, var = pair(call(aggregation.posterior, z0, z, E, t), "mean and variance")
    rows = [walk(ab, weights, z0[i:i + 1], E[:, i:i + 1], t[i] + 1) for i in range(3)]
    hint = "if the properties above hold: t may be a tensor (B,), each sample with its own"
    shape = torch.ones_like(z0).double()
    expect(mean, torch.cat([row[0] for row in rows]), hint)
    expect(std, torch.stack([row[1].sqrt() for row in rows]).view(-1, 1, 1, 1) * shape, hint,
           broadcast=True)
    rows = [bayes(ab, weights, z0[i:i + 1], z[i:i + 1], E[:, i:i + 1], int(t[i])) for i in range(3)]
    hint += "; from t = 0 the posterior goes to the clean z_0, with variance 0"
    expect(back, torch.cat([row[0] for row in rows]), hint)
    expect(var, torch.stack([row[1] for row in rows]).view(-1, 1, 1, 1) * shape, hint,
           broadcast=True)


@graded(16, "the inputs stay as they are")
def process_inputs(m):
    aggregation, _, _, z0, z, E = process(m)
    tables = dict(ab=aggregation.ab, w=aggregation.w, c=aggregation.c)
    with unchanged(z0=z0, zt=z, E=E, process=tables):
        aggregation.marginal(z0, E, 3)
        aggregation.posterior(z0, z, E, 3)


def linear_head(m):
    unet = SimpleNamespace(config=dict(block_out_channels=(6,)))
    return m.LinearHead(unet, 4, ["cat", "dog", "bird", "fish", "tree"])


@graded(17, "the head: one linear layer on the mean over positions")
def head_logits(m):
    head = linear_head(m)
    features = dict(mid=torch.randn(3, 6, 4, 2), up=torch.randn(3, 6, 8, 4))
    mid = features["mid"]
    with torch.no_grad():
        want = head.linear(mid.mean(dim=(2, 3)))
        expect(call(head, features, torch.zeros(3)), want, "take the mean over both axes of "
               "positions, then the linear layer", {
            "positions are summed; take their mean": head.linear(mid.sum(dim=(2, 3))),
            "this is the largest value of each channel; take the mean":
                head.linear(mid.amax((2, 3))),
            "these are probabilities; return logits": want.softmax(-1),
            "these are log-probabilities; return logits": want.log_softmax(-1),
            "there is a ReLU; the head is one linear layer": want.relu(),
            "there is a ReLU before the layer; the head is one linear layer":
                head.linear(mid.mean(dim=(2, 3)).relu()),
            "the features are those of another block": head.linear(features["up"].mean((2, 3))),
            "only one position is read": head.linear(mid[:, :, 0, 0]),
        })


@graded(17, "the loss of a class: each sample's cross-entropy")
def class_loss(m):
    logits, x = 2 * torch.randn(4, 5), torch.tensor([0, 3, 3, 1])
    p = logits.softmax(-1)[range(4), x]
    hint = "with q certain of the class, KL is -log p(class), in nats, for each sample"
    expect(call(m.divergence, SimpleNamespace(probabilities=True), logits, x), -p.log(), hint, {
        "the batch is averaged; return one number per sample": -p.log().mean(),
        "the batch is summed; return one number per sample": -p.log().sum(),
        "the softmax is taken twice: cross_entropy wants logits":
            F.cross_entropy(logits.softmax(-1), x, reduction="none"),
        "the sign is wrong: KL is not negative": p.log(),
        "the logarithm is missing: this is minus the probability": -p,
        "the logarithm is missing: this is one minus the probability": 1 - p,
        "the softmax is missing: this is minus the logit": -logits[range(4), x],
        "the softmax runs over the batch, not over the classes":
            -logits.log_softmax(0)[range(4), x],
        "the mean is taken over classes; the class itself counts alone":
            -p.log() / 5,
    })


@graded(17, "the loss of a picture or a vector: each sample's mean squared error")
def gaussian_loss(m):
    head = SimpleNamespace(probabilities=False)
    for shape in ((4, 3, 2, 5), (4, 6)):
        output, x = torch.randn(2, *shape)
        square = (output - x) ** 2
        expect(call(m.divergence, head, output, x), square.flatten(1).mean(1), "take the mean over "
               "everything but the batch", {
            "the batch is averaged; return one number per sample": square.mean(),
            "squares are summed; take their mean": square.flatten(1).sum(1),
            "the square is missing": (output - x).abs().flatten(1).mean(1),
            "the square root of the mean is taken": square.flatten(1).mean(1).sqrt(),
            "there is a factor 1/2; take the plain mean": square.flatten(1).mean(1) / 2,
            "only the channels are averaged": square.mean(1),
            "the mean runs over the batch": square.mean(0),
        })


@graded(17, "gradients reach the features, the layer and the output")
def head_gradients(m):
    head = linear_head(m)
    mid = torch.randn(3, 6, 4, 2, requires_grad=True)
    same_gradients(lambda: head(dict(mid=mid), None), lambda: head.linear(mid.mean((2, 3))),
                   dict(mid=mid) | dict(head.named_parameters()))
    output, x = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, 2])
    same_gradients(lambda: m.divergence(SimpleNamespace(probabilities=True), output, x),
                   lambda: F.cross_entropy(output, x, reduction="none"), dict(output=output))
    vector = torch.randn(3, 5)
    same_gradients(lambda: m.divergence(SimpleNamespace(probabilities=False), output, vector),
                   lambda: (output - vector).square().mean(1), dict(output=output))


@graded(17, "the inputs stay as they are")
def head_inputs(m):
    head = linear_head(m)
    mid, output, x = torch.randn(3, 6, 4, 2), torch.randn(3, 5), torch.randn(3, 5)
    with torch.no_grad(), unchanged(mid=mid, output=output, x=x):
        head(dict(mid=mid), None)
        m.divergence(SimpleNamespace(probabilities=False), output, x)
        m.divergence(SimpleNamespace(probabilities=True), output, torch.tensor([0, 1, 2]))


# -------------------------------------------------------------------------------------------------
# 18. A resume

class Run:
    """A training run on five numbers; one of its parameters never has a gradient."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.params = {name: torch.nn.Parameter(torch.randn(3, 2)) for name in ("a", "b", "unused")}
        self.ema = {name: p.detach().clone() for name, p in self.params.items()}
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=0.1, weight_decay=0.1)

    def train(self, start, steps):
        for step in range(start, start + steps):
            data = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            loss = ((data @ self.params["a"]).tanh() + data @ self.params["b"] - 1).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            for name, p in self.params.items():
                self.ema[name].lerp_(p.detach(), 0.1)
        return self

    def parts(self):
        return self.params, self.ema, self.optimizer


@contextlib.contextmanager
def resumed(m):
    """A run that was saved after four steps, and another one that it was loaded into."""
    old, new = Run(0).train(0, 4), Run(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        m.save_state(path, *old.parts(), dict(step=4))
        if not path.exists():
            raise Failed("a file", "none", "save_state must write the file at `path`")
        m.load_state(path, *new.parts())
    yield old, new


@graded(18, "weights and averages come back")
def values_back(m):
    with resumed(m) as (old, new):
        for name, p in old.params.items():
            expect(new.params[name], p, f"parameter {name} must come back, into the parameter that "
                   "was passed in", {f"parameter {name} is the average, not the weight":
                                     old.ema[name]}, tol=1e-7)
            expect(new.ema[name], old.ema[name], f"the average of {name} must come back", {
                "the average is filled with the weights themselves": p,
                "the average is not loaded": Run(1).ema[name]}, tol=1e-7)


@graded(18, "training goes on as if it had never stopped")
def goes_on(m):
    with resumed(m) as (old, new):
        a, b = old.optimizer.state[old.params["a"]], new.optimizer.state[new.params["a"]]
        for key, words in (("step", "the count of steps, which corrects the moments' bias"),
                           ("exp_avg", "the first moment"), ("exp_avg_sq", "the second moment")):
            if key not in b:
                raise Failed(f"{key} in optimizer.state", "none",
                             f"{words} is lost ({key} of the optimizer's state)")
            expect(torch.as_tensor(b[key]), torch.as_tensor(a[key]),
                   f"{words} ({key}) must come back for each parameter", tol=1e-7)
        old.train(4, 4)
        new.train(4, 4)
        for name in ("a", "b", "unused"):
            expect(new.params[name], old.params[name], "the resumed run drifts away: something "
                   "that a step needs is lost, or the optimizer works on other tensors", tol=1e-7)
            expect(new.ema[name], old.ema[name], "the average drifts away", tol=1e-7)


@graded(18, "the scalars can be read by themselves")
def scalars_back(m):
    scalars = dict(step=4, loss=0.5, names=["a", "b"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        m.save_state(path, *Run(0).train(0, 1).parts(), scalars)
        try:
            came = m.read_scalars(path)
        except Exception as error:
            raise Failed(str(scalars), f"{type(error).__name__}", 'write them as JSON: metadata = '
                         '{"scalars": json.dumps(scalars)}') from None
    if came != scalars:
        raise Failed(str(scalars), str(came), 'write them as JSON: metadata = {"scalars": '
                     "json.dumps(scalars)}")


@graded(18, "a run can be saved before its first step")
def saved_early(m):
    old, new = Run(0), Run(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        m.save_state(path, *old.parts(), dict(step=0))
        m.load_state(path, *new.parts())
    old.train(0, 2)
    new.train(0, 2)
    expect(new.params["a"], old.params["a"], "before the first step no parameter has moments, and "
           "the run must go on all the same", tol=1e-7)


@graded(18, "saving changes nothing")
def saving_inputs(m):
    run = Run(0).train(0, 3)
    moments = run.optimizer.state[run.params["a"]]
    with tempfile.TemporaryDirectory() as folder, \
            unchanged(params=run.params, ema=run.ema, moment=dict(moments)):
        m.save_state(Path(folder) / "state.safetensors", *run.parts(), {})


# -------------------------------------------------------------------------------------------------
# 19. The experiment's form

def options_of(command):
    """Split a command -> the script, {option: value}; --seed and --out do not count."""
    words = shlex.split(command)
    scripts = [word for word in words if word.endswith(".py")]
    if not scripts:
        raise Failed("a command such as python train.py --task ..", command or "nothing",
                     "state the command, so that somebody else can repeat the run")
    options, key = {}, None
    for word in words[words.index(scripts[0]) + 1:]:
        if word.startswith("--"):
            key, _, value = word.partition("=")
            options[key] = [value] if value else []
        elif key:
            options[key].append(word)
    return scripts[0], {key: value for key, value in options.items()
                        if key not in ("--seed", "--out")}


def numbers(form, key):
    values = form.get(key)
    kinds = isinstance(values, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if not kinds:
        raise Failed(f"{key}: a list of numbers", str(values), "give the figure of every run")
    return np.array(values, dtype=float)


def difference(form):
    """The mean and the standard error of the paired differences."""
    treatment, control = numbers(form, "treatment_results"), numbers(form, "control_results")
    if len(treatment) != len(control) or len(treatment) < 2:
        raise Failed("as many results of the control as of the treatment",
                     f"{len(treatment)} and {len(control)}", "run both arms with every seed")
    gaps = treatment - control
    return gaps.mean(), gaps.std(ddof=1) / len(gaps) ** 0.5, gaps


@graded(19, "the form is complete")
def form_complete(form):
    empty = [key for key in exercises.FORM if form.get(key) in ("", None, [])]
    if empty:
        raise Failed("every field", f"nothing in {', '.join(empty)}", "fill in the whole form")
    for key in ("claim", "threat"):
        if len(str(form[key]).split()) < 5:
            raise Failed(f"{key}: a sentence", str(form[key]), "say it in a whole sentence")


@graded(19, "treatment and control differ in exactly one option")
def form_control(form):
    (script, treatment), (other, control) = [options_of(form.get(key) or "")
                                             for key in ("treatment", "control")]
    changed = sorted(key for key in treatment.keys() | control.keys()
                     if treatment.get(key) != control.get(key))
    if script != other:
        changed.insert(0, "the script")
    if len(changed) != 1:
        words = "the arms are the same: nothing is tested" if not changed else \
            "with several differences nobody can tell which one had the effect"
        raise Failed("one difference", ", ".join(changed) or "none", words)


@graded(19, "at least three seeds, the same for both arms")
def form_seeds(form):
    seeds = numbers(form, "seeds")
    if len(set(seeds)) < max(3, len(seeds)):
        raise Failed("three different seeds or more", f"{[int(s) for s in seeds]}",
                     "one run shows nothing about the noise between runs, and a seed that is used "
                     "twice counts once")
    lengths = [len(numbers(form, f"{arm}_results")) for arm in ("treatment", "control")]
    if lengths != [len(seeds)] * 2:
        raise Failed(f"{len(seeds)} results in each arm", f"{lengths[0]} and {lengths[1]}",
                     "one result for each seed in each arm, in the order of the seeds")


@graded(19, "the measure is fair to both arms")
def form_measure(form):
    if form.get("measure") not in ("held-out loss", "samples"):
        raise Failed("held-out loss or samples", str(form.get("measure")), "the training loss is "
                     "noisy and rewards memory; name one of the two")
    (_, treatment), (_, control) = [options_of(form.get(key) or "")
                                    for key in ("treatment", "control")]
    for key in ("--schedule", "--k", "--input", "--beta-schedule"):
        if treatment.get(key) != control.get(key) and form["measure"] == "held-out loss":
            raise Failed("samples", "held-out loss", f"{key} changes what the network sees at each "
                         "t, and with it the least possible loss: losses of the two arms are not "
                         "comparable, measure samples")


@graded(19, "mean and standard error are those of the paired differences")
def form_statistics(form):
    mean, error, gaps = difference(form)
    came, said = form.get("mean_difference"), form.get("standard_error")
    both = numbers(dict(both=[came, said]), "both")
    if not np.isclose(both[0], mean, rtol=0.02, atol=1e-9):
        words = "the sign is wrong: treatment minus control" if np.isclose(both[0], -mean, 0.02) \
            else "take the mean over seeds of treatment minus control"
        raise Failed(f"mean {mean:.4g}", f"{both[0]:.4g}", words)
    if not np.isclose(both[1], error, rtol=0.02, atol=1e-9):
        n = len(gaps)
        words = "divide the standard deviation of the differences by the root of n"
        if np.isclose(both[1], error * n ** 0.5, 0.02):
            words = "this is the standard deviation of one difference; " + words
        elif np.isclose(both[1], error * ((n - 1) / n) ** 0.5, 0.02):
            words = "the variance divides by n - 1, not by n"
        raise Failed(f"standard error {error:.4g}", f"{both[1]:.4g}", words)


@graded(19, "the conclusion is what the figures say")
def form_conclusion(form):
    mean, error, _ = difference(form)
    lower = form.get("lower_is_better")
    if not isinstance(lower, bool):
        raise Failed("true or false in lower_is_better", str(lower), "is a loss better when lower?")
    want = "no difference seen"
    if abs(mean) > 2 * error:
        want = "treatment better" if (mean < 0) == lower else "control better"
    if form.get("conclusion") != want:
        words = f"the mean is {abs(mean) / max(error, 1e-12):.2g} standard errors from 0; " \
            "call it a difference above two, and mind whether lower is better"
        raise Failed(want, str(form.get("conclusion")), words)


if __name__ == "__main__":
    main()
