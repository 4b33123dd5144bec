"""Exercises for a course: write a function of this project again, from its paper.

    python tests/exercises.py list
    python tests/exercises.py blank 4       take the function out, and leave what it must do
    python tests/exercises.py check 4       try your function: one line per property, and a score
    python tests/exercises.py solution 4    put the project's own function back

`blank` and `solution` change the one or two functions of an exercise in your working copy, and
nothing else in their file. They compare them with the last commit (or another, --commit), so the
project must be a git clone. `check` ends with exit code 0 if every property holds and 1 if not;
with --json it prints one JSON object for a grading program. A mistake in the command itself ends in
one line and exit code 2.

What an exercise asks stands here; the properties that grade it are in exercises/properties.py.
"""
import argparse
import ast
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# Answers that `solution` replaces go here, and so does the form of the last exercise. Git ignores
# this folder.
ANSWERS = ROOT / "runs" / "exercises"


class Exercise(NamedTuple):
    number: int
    level: int              # 1: an equation; 2: a method's idea; 3: several things at once
    title: str
    source: str             # paper and equation
    file: str
    contracts: dict         # qualified name of each function -> what it must do


def exercise(number, level, title, source, file, **contracts):
    """Make an Exercise. A dot in a function's name is written as two underscores."""
    names = {name.replace("__", "."): text for name, text in contracts.items()}
    return Exercise(number, level, title, source, file, names)


TABLE = [
    exercise(
        1, 1, "the forward process", "DDPM Eq. 4", "diffusion.py", Diffusion__add_noise="""
Draw x_t from q(x_t | x_0), for the noise that is given.

x0, noise: (B, C, H, W) floats. t: (B,) long, each sample's own timestep, 0 .. T - 1. Returns
(B, C, H, W), on the device of x0, in its type or, for half precision, in fp32. No input is changed.

self.alpha_bar (T,) holds the paper's alpha_bar, falling. Timesteps count from 0: self.alpha_bar[0]
is the paper's alpha_bar_1, after the first step of noise."""),
    exercise(
        2, 1, "the sampler DDIM", "DDIM Eqs. 9, 12 and 16", "diffusion.py", ddim="""
Sample from noise x (B, C, H, W) to a picture of that shape by DDIM, in `steps` steps.

model(x, t): the network, t (B,), returns (B, C, H, W). Call it once a step. eta: 0 is
deterministic; 1 adds the noise of DDPM's posterior, in between is a share of it (Eq. 16).

diffusion.timesteps(steps) lists the timesteps to visit, falling; skip the first `start`. A step
goes from t to t - diffusion.T // steps. diffusion.level(t) is alpha_bar there, and 1 for t < 0: the
last step ends at the clean picture. diffusion.to_x0_eps(out, x, t) gives Eq. 9's x0, and eps. The
papers write alpha_t for what is called alpha_bar here.

Not graded: `generators`, a list for randn(x.shape, generators, x.device), and `callback`, called as
callback(number of the step, t, the new x, x0)."""),
    exercise(
        3, 1, "guidance by text and picture", "InstructPix2Pix Eq. 3", "diffusion.py", guide="""
Combine K predictions of one network by classifier-free guidance.

out: (K, B, C, H, W). K = 1: [conditional]. K = 2: [without text, with text]. K = 3: [neither
picture nor text, picture, picture and text]. Returns (B, C, H, W) and changes no input.

Scales are InstructPix2Pix's, with s_T = text_scale and s_I = image_scale: at 1 the result is the
last prediction, at 0 the first. (Ho and Salimans, who have K = 2, print w = scale - 1 instead.)
With K = 2 there is no picture, and image_scale has no effect; with K = 1 no scale has.

Not graded: another K, and rescale > 0 (Lin et al., Eqs. 15 and 16)."""),
    exercise(
        4, 1, "multi-head attention", "Vaswani et al. Eq. 1, section 3.2", "unet.py",
        Attention__forward="""
Let every position of x look at a context, or at x itself where context is None.

x: (B, L, C). context: (B, S, D) or None. Returns (B, L, C), and gradients reach everything.

self.heads is the number of heads; head number i has the i-th of the equal slices of the C channels.
self.to_q maps C to C, self.to_k and self.to_v map D to C, and at the end self.to_out[0] maps C to
C."""),
    exercise(
        5, 2, "a mixture of experts, literally", "MTU Eq. 1", "moe.py",
        ExpertFeedForward__forward="""
Mix N experts by task.

x: (B, L, C). cond.task_emb: (B, d_task), the vector e of each sample's task. Returns (B, L, C);
gradients reach x, e, the router and all experts.

Expert i owns the i-th of N equal slices of the inner units. self.net[0](x) computes all inner units
at once, (B, L, N d_expert), GEGLU included. The columns of self.net[2].weight (C, N d_expert) are
their output weights; self.net[2] has no bias. self.out_bias (N, C) holds each expert's own output
bias. self.router_weights(e) gives w (B, N), softmax included.

Asked is the equation as printed (init="literal"). Exercise 6 asks more of the same function."""),
    exercise(
        6, 2, "a mixture that starts as the pretrained layer", "MTU Eq. 1", "moe.py",
        ExpertFeedForward__forward="""
Mix N experts by task, so that training starts where the pretrained layer ended.

Begin with your answer to exercise 5 (its inputs, result and attributes are the same). At the start
the router's last layer is zero, so every w_i is 1/N, and Eq. 1 as printed does not equal the dense
layer from which the experts were cut. A constant factor repairs this: self.scale, which is N for
init="preserve" and 1 for init="literal". Find where it belongs.

Every expert starts with a copy of the dense layer's whole output bias. With "preserve", N experts
and every w_i = 1/N, the result must be the dense layer's. When the router has learned other
weights the same factor stays. With "literal" the result is Eq. 1 as printed."""),
    exercise(
        7, 2, "folding a mixture into plain weights", "follows from MTU Eq. 1", "moe.py",
        ExpertFeedForward__fold="""
Return, for one task, an ordinary unet.FeedForward that computes what this layer computes.

task_embedding: (1, d_task). The result is a new FeedForward(C): its net[0].proj and net[2] have the
usual parameters, weight and bias, and there is no router in it. This layer is not changed.

See exercise 5 for the attributes, and exercise 6 for self.scale, by which the activations are
multiplied. No gradient is needed.

moe.fold calls this function where new tensors have shapes and no values (the device "meta"); give
the new layers parameters of their own (`filled` does) rather than copying values into theirs. That
is not graded."""),
    exercise(
        8, 2, "an input convolution for each task", "MTU Eq. 2, Psi_C", "moe.py",
        TaskConv__forward="""
Convolve each sample with the kernel of its own task.

x: (B, channels, H, W). cond.task: (B,) long, a row for each sample; a batch may mix tasks. Returns
(B, C, H, W): a 3 x 3 convolution with padding 1, and the bias of the task.

self.weight (R, C, widest, 3, 3) and self.bias (R, C) have a row for each of R tasks. Task r reads
self.in_channels[r] channels. x may have fewer channels than the widest (a batch of narrow tasks
only), or more than a sample's task reads: that task's weights for the others are zero, and must get
no gradient.

Not graded: refusing numbers of channels that no task has."""),
    exercise(
        9, 2, "adding a task", "follows from MTU Eq. 2", "moe.py", add_task="""
Add a task to an upcycled U-Net, in place, as a copy of the task `like`, and return the U-Net.

task: the new name. like: a task's name. The new task is the last row of every table that has a row
per task: parameters of unet.named_parameters() whose names contain one of TABLES. The old rows
keep their places and values. task_index(unet, like) is the row of `like`.

Also to be kept in step: unet.task_embedding.num_embeddings; the list unet.conv_in.in_channels; and
in unet.config["moe"] the list "tasks", the dict "in_channels" and the list "added" of added tasks.
Then trainable(unet) leaves only the tables to train, and its result is the network.

Not graded: refusing a name that is taken."""),
    exercise(
        10, 2, "a window of channels for each timestep", "DTR, as in its official code",
        "routing.py", task_masks="""
Compute DTR's masks of a batch of timesteps.

t: (B,) whole timesteps, 0 .. T - 1 with T = num_steps. Returns (B, num_channels) on t's device: 1
for the channels that the timestep sees and 0 for the others.

The paper and its official code differ by a channel or two. Asked is the code's window: it is
always C_b channels wide, C_b = beta C rounded down. At t = 0 it begins at channel 0, and at
t = T - 1 it ends at the last. In between it begins at (C - C_b) s^alpha, rounded to the nearest
channel, where s goes from 0 at t = 0 to 1 at t = T - 1.

Not graded: half channels, which may be rounded up or down, and fractions of a timestep."""),
    exercise(
        11, 2, "where the mask acts in a transformer", "DTR, z + Block(m z)", "routing.py",
        Routed__forward="""
Mask the input of a block's updates, and nothing else.

x: (B, L, C) tokens of a DiT. self.mask(cond.t) gives the mask m (B, C) of each sample's timestep.
super().forward(y, cond) is the unrouted block, which returns y plus its two updates, attention and
MLP; the second one reads y plus the first. Returns (B, L, C): x plus the updates that the block
makes of the masked x. Every channel receives updates.

Only transformer blocks are graded. A U-Net's residual blocks, pictures (B, C, H, W) that have
self.skip(x) and self.update(x, cond), stay unmasked in self.skip."""),
    exercise(
        12, 2, "weights of the loss", "Min-SNR (2303.09556), P2 (2204.00227)", "diffusion.py",
        Diffusion__weight="""
Return the weight of the error of samples at t (B,) long -> (B,).

With the signal-to-noise ratio of the variances, snr = signal^2 / noise^2, the squared error of
predicted noise is multiplied, by `kind`:

    none      by nothing, that is by 1
    v         so that it becomes the squared error of v = signal noise - sigma x0
    min-snr   by the weight of Hang et al. for predicted noise, with gamma = 5
    p2        by the weight of Choi et al., with k = gamma = 1

Where self.config["prediction_type"] is "v_prediction" and not "epsilon", the error is that of v
already. There none and v give 1, and the other two what gives the same loss as for noise. The
result has the device of t; self.alpha_bar (T,) is the schedule.

Not graded: alpha_bar = 0."""),
    exercise(
        13, 2, "timesteps for one range", "DeMe Eq. 6", "merge.py", sample_timesteps="""
Draw timesteps for one copy of the model -> (size,) integers.

t_range: (start, end), the copy's range; its last timestep is end - 1. T: number of all timesteps,
0 .. T - 1. p_global: the paper's p. rng: a NumPy generator, from which all randomness comes.

The official code draws a whole batch from one of the two; here, every sample decides for itself.

Not graded: refusing impossible ranges."""),
    exercise(
        14, 2, "task vectors and merging", "DeMe Eq. 8", "merge.py", task_vector="""
Return the task vector of a tuned model -> dict of fp32 tensors.

base, tuned: state dicts of the same names and shapes. Tensors of integers do not enter the result.
No input is changed.

Not graded: refusing models that do not match, for which `name` names the tuned one.""",
        merge="""
Add weighted task vectors to a model (Eq. 8) -> a new state dict.

base: state dict. vectors: N dicts from task_vector. weights: N numbers, which need not sum to 1.
Tensors of integers stay the base's; the others have its type. No input is changed, and no tensor of
floats in the result shares memory with the base.

Not graded: refusing what does not match."""),
    exercise(
        15, 2, "a projection that folds", "DeMe, channel projections", "merge.py",
        ProjectedConv2d__folded="""
Multiply the projection into the convolution -> its weight and bias.

A convolution K with bias b is followed by a matrix P on its output channels. Return the weight
(C, C_in, k, k) and the bias (C,) of the one convolution that computes the same. self.weight is K,
self.bias b, self.projection P (C, C); gradients reach all three.

Afterwards say why this works here, and not for a projection that follows a whole block whose
input was also sent along a skip connection."""),
    exercise(
        16, 3, "other modalities in the forward process", "MT-Diffusion Eqs. 3 to 5, 7 and 9",
        "aggregation.py", Aggregation__marginal="""
Return mean and standard deviation of q(z_t | z_0, X), Eqs. 4 and 7.

z0: (B, C, H, W). E: (M, B, C, H, W), the encodings of M modalities. t: a number or (B,). The mean
has z0's shape; the standard deviation broadcasts against it.

Timesteps count from 0: t = 0 is the paper's t = 1, and t = -1 is clean. Tables have a column more
than there are timesteps, and self.at(table, t) looks timestep t up, as (.., B or 1, 1, 1, 1):
self.ab is alpha_bar (1 at t = -1), self.w (M, T + 1) holds the w_t of Eq. 3, self.c (M, T + 1) the
coefficients of E in the mean that follow from Eq. 7's recursion. self.aggregate(E, t) sums the E_i
by their c, and self.aggregate(E, t, self.w) by their w. The tables are float64.

Eq. 3, as this project reads it: q(z_t | z_{t-1}, X) has mean sqrt(a_t) (z_{t-1} + sum_i w_t^i E_i)
and variance 1 - a_t.""",
        Aggregation__posterior="""
Return mean and variance of q(z_{t-1} | z_t, z_0, X), Eqs. 5 and 9.

z0, zt: (B, C, H, W). E: (M, B, C, H, W). t: a number or (B,), and t = 0 goes to the clean picture.
The mean has z0's shape; the variance broadcasts against it. See `marginal` for the tables.

Not graded: r, another timestep below t to go to; DDPM in fewer steps needs it."""),
    exercise(
        17, 3, "a head and its loss", "MT-Diffusion section 2.2.4 and Eq. 6", "aggregation.py",
        LinearHead__forward="""
Read a class off the middle of the U-Net: logits (B, K).

features["mid"]: (B, C, H, W), what the middle block puts out. self.linear maps C to K. The paper
has one linear layer there and does not say how positions are combined: take their mean. t is not
read. Gradients reach the features and the layer.""",
        divergence="""
Return each sample's KL(q(x) || p(x | z_t)) of Eq. 6, up to factors and terms without the network.

Where head.probabilities is true, x is a class (B,) long and output (B, K) logits; q is certain of
the class. Otherwise x and output have the shape (B, ..) and p is a Gaussian around output; take the
squared error's mean over everything but the batch, as for the noise. Returns (B,) floats with a
gradient."""),
    exercise(
        18, 3, "a resume that is exact", "no paper", "hub.py", save_state="""
Write all that a training run needs to go on into one file of safetensors.

path: the file. params: name -> parameter. ema: name -> average of the weights. optimizer: Adam or
AdamW. scalars: a dict that JSON can hold. Nothing in memory changes.

read_scalars(path) must give the scalars back: it reads them as JSON from the entry "scalars" of
the file's metadata (save_file(tensors, path, metadata={"scalars": ..})). The tensors' names are
yours. A parameter that never had a gradient has no state in optimizer.state.

Not graded: a file that is whole or absent even if the process is killed (`replacing`).""",
        load_state="""
Read what save_state wrote into params, ema and optimizer, in place.

Training then goes on bit for bit as if it had not been interrupted. The optimizer is new, for the
same parameters, and must go on working on them: keep the parameters themselves and change their
values.

Not graded: refusing files that do not fit."""),
    exercise(
        19, 3, "an experiment with a control", "README.md; experiments/RESULTS.md",
        "runs/exercises/19.json", form="""
Design an experiment with this project, run it, and read it. Fill in the form
runs/exercises/19.json:

    claim               one sentence that the experiment could show to be wrong
    treatment           the command of one run, for example "python train.py --task .."
    control             the command that it is compared with
    seeds               a list of numbers, each used for both arms (as --seed)
    measure             "held-out loss" or "samples" (a figure computed from drawn pictures)
    lower_is_better     true or false
    treatment_results   the measure of the treatment for each seed, in order
    control_results     the measure of the control for each seed, in order
    mean_difference     the mean over seeds of treatment minus control
    standard_error      of that mean: the standard deviation of the differences (with n - 1),
                        divided by the root of n
    conclusion          "treatment better", "control better" or "no difference seen"
    threat              one sentence: what else could explain the result, or hide an effect

Leave --seed and --out out of the commands. Call a difference one where the mean is further than
two standard errors from 0. Twenty steps a run are enough: the reading is graded and not the
effect."""),
]
EXERCISES = {exercise.number: exercise for exercise in TABLE}
FORM = dict(claim="", treatment="", control="", seeds=[], measure="", lower_is_better=None,
            treatment_results=[], control_results=[], mean_difference=None, standard_error=None,
            conclusion="", threat="")


def stop(message):
    """End with one line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# -------------------------------------------------------------------------------------------------
# A function in a file: lines, as lists of text with their line ends

parse = functools.lru_cache(ast.parse)      # the same file is looked at again and again


def find_node(source, name):
    """Find a function by its qualified name -> its node of the syntax tree, or None."""
    node = parse(source)
    for part in name.split("."):
        same = [child for child in node.body if getattr(child, "name", None) == part]
        if not same:
            return None
        node = same[-1]     # Python takes the last of several
    return node


def find_lines(source, name):
    """Find the lines of a function, decorators included -> first and one after the last, or None.

    A half-written answer may be no Python at all. Then the function ends where the indentation
    does.
    """
    try:
        node = find_node(source, name)
    except SyntaxError:
        return find_by_indentation(source.splitlines(), name)
    if node is None:
        return None
    first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
    return first - 1, node.end_lineno


def find_by_indentation(lines, name):
    """Do what find_lines does, for a file with a syntax error."""
    last = 0
    for part in name.split("."):
        starts = [i for i in range(last, len(lines))
                  if re.match(rf"\s*(def|class) {part}\b", lines[i])]
        if not starts:
            return None
        first, last = starts[0], starts[0] + 1
    indent = len(lines[first]) - len(lines[first].lstrip())
    # The line that closes a long list of arguments begins where `def` does.
    while last < len(lines) and (not lines[last].strip() or lines[last][indent] in " )"):
        last += 1
    while not lines[last - 1].strip():
        last -= 1
    while first > 0 and lines[first - 1].strip().startswith("@"):
        first -= 1
    return first, last


def function_text(source, name):
    """Return the text of a function in a file, or None where there is none of that name."""
    place = find_lines(source, name)
    if place is None:
        return None
    return "".join(source.splitlines(keepends=True)[slice(*place)])


def with_function(source, name, text):
    """Return a file with another text for one function."""
    first, last = find_lines(source, name)
    lines = source.splitlines(keepends=True)
    return "".join(lines[:first] + [text] + lines[last:])


def with_body(source, name, body):
    """Return a function's text with another body, whose lines are indented from zero."""
    node = find_node(source, name)
    first, _ = find_lines(source, name)
    lines = source.splitlines(keepends=True)
    start = node.body[0].lineno - 1
    # A comment before the first statement would give something away.
    while not lines[start - 1].split("#")[0].strip():
        start -= 1
    indent = " " * node.body[0].col_offset
    return "".join(lines[first:start]) + textwrap.indent(body.rstrip() + "\n", indent)


def blank_text(source, exercise, name):
    """Return the text of a function whose docstring is the contract and whose body is to write."""
    # The contracts are as wide as a function at the top level may be; a method's are moved right.
    width = 100 - find_node(source, name).body[0].col_offset
    text = f'"""{exercise.contracts[name].strip()}\n\nExercise {exercise.number}. Source: '
    text += f"{exercise.source}."
    paragraphs = [paragraph if "\n    " in f"\n{paragraph}" else textwrap.fill(paragraph, width)
                  for paragraph in text.split("\n\n")]
    body = "\n\n".join(paragraphs) + '\n"""\n'
    body += f'raise NotImplementedError("exercise {exercise.number}: {exercise.title}")'
    return with_body(source, name, body)


def is_blank(text):
    """Whether a function's text is what `blank` leaves, of whatever exercise."""
    last = text.rstrip().splitlines()[-1]
    return last.strip().startswith('raise NotImplementedError("exercise ')


# -------------------------------------------------------------------------------------------------
# Files and git

def read(path):
    return path.read_text(encoding="utf-8")     # Windows' line ends become plain ones


def write(path, text):
    """Write a file so that a crash leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    newline = "\r\n" if path.exists() and b"\r\n" in path.read_bytes() else "\n"
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8", newline=newline)
    os.replace(beside, path)


def committed(file, commit):
    """Return a file of the project as a commit has it."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "show", f"{commit}:./{file}"],
                              capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        stop("git is not installed, and blank and solution compare functions with a commit")
    if done.returncode:
        reason = done.stderr.strip().splitlines()[0] if done.stderr.strip() else "git failed"
        stop(f"no {file} in commit {commit} ({reason}); blank and solution need the project as a "
             "git clone, where the original functions are committed")
    return done.stdout


def originals(exercise, commit):
    """Return the committed file, after making sure that it has the exercise's functions."""
    source = committed(exercise.file, commit)
    for name in exercise.contracts:
        text = function_text(source, name)
        if text is None:
            stop(f"{exercise.file} of commit {commit} has no function {name}")
        if is_blank(text):
            stop(f"commit {commit} has {name} as a blank already; name an older one by --commit")
    return source


def blank(exercise, commit):
    """Take the functions of an exercise out of the working copy."""
    if exercise.file.endswith(".json"):
        path = ROOT / exercise.file
        if path.exists() and json.loads(read(path)) != FORM:
            stop(f"{exercise.file} is filled in already; move it away first")
        write(path, json.dumps(FORM, indent=2) + "\n")
        print(exercise.contracts["form"].strip())
        return
    source = originals(exercise, commit)
    path = ROOT / exercise.file
    text = read(path)
    for name in exercise.contracts:
        now = function_text(text, name)
        if now is None:
            stop(f"{exercise.file} has no function {name}; `solution` cannot place it either, so "
                 f"take the file back from git (git checkout {exercise.file})")
        if now != function_text(source, name) and not is_blank(now):
            number = exercise.number
            stop(f"{name} in {exercise.file} has changes that are not committed. Commit them, or "
                 f"put the original back by `solution {number}`; to go on from what you have, "
                 f"leave out blank and run `check {number}`")
    for name in exercise.contracts:
        text = with_function(text, name, blank_text(source, exercise, name))
    write(path, text)
    print(f"{exercise.file}: {' and '.join(exercise.contracts)} to be written "
          f"({exercise.source}); then: python tests/exercises.py check {exercise.number}")


def solution(exercise, commit):
    """Put the functions of an exercise back, and keep everything else in the file."""
    if exercise.file.endswith(".json"):
        sys.path.insert(0, str(TESTS / "exercises"))
        from answers import FORM_ANSWER
        print(json.dumps(FORM_ANSWER, indent=2))
        return
    source = originals(exercise, commit)
    path = ROOT / exercise.file
    text = read(path)
    for name in exercise.contracts:
        now = function_text(text, name)
        original = function_text(source, name)
        if now is None:
            stop(f"{exercise.file} has no function {name} to replace")
        if now != original and not is_blank(now):
            # Nobody wants to lose an evening's answer.
            kept = ANSWERS / f"{exercise.number}-{name}.py"
            write(kept, textwrap.dedent(now))
            print(f"your answer is kept in {kept.relative_to(ROOT)}")
        text = with_function(text, name, original)
    write(path, text)
    print(f"{exercise.file}: {' and '.join(exercise.contracts)} as in commit {commit}")


# -------------------------------------------------------------------------------------------------
# Grading

def grade(exercise, limit):
    """Grade the working copy in another process -> a list of dicts, one per property.

    An answer may loop for ever or end the process. It is stopped after `limit` seconds, and what
    it was doing has failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        results.touch()
        words = [sys.executable, TESTS / "exercises" / "properties.py", exercise.number, results]
        # What an answer prints is for its writer, and must not mix with the JSON.
        child = subprocess.Popen(list(map(str, words)), stdout=sys.stderr)
        # The time that Python takes to import torch does not count.
        deadline = None
        while child.poll() is None and (deadline is None or time.monotonic() < deadline):
            if deadline is None and results.stat().st_size:
                deadline = time.monotonic() + limit
            time.sleep(0.05)
        ended = f"the process ended with code {child.returncode} before it was through"
        hint = "does the function leave Python, or use all memory?"
        if child.returncode is None:
            ended = f"it still ran after {limit:g} seconds"
            hint = "a loop that does not end, or does far too much?"
            child.kill()
            child.wait()
        names, *properties = [json.loads(line) for line in read(results).splitlines()] or [[]]
    for name in names[len(properties):] or ([] if properties else ["the answer can be tried"]):
        properties.append(dict(name=name, passed=False, expected="an answer in time", came=ended,
                               hint=hint))
        ended = "not tried"
        hint = "see the property above"
    return properties


def check(exercise, limit, as_json):
    """Print the result for each property and the score -> whether all hold."""
    properties = grade(exercise, limit)
    score = sum(row["passed"] for row in properties)
    passed = score == len(properties)
    if as_json:
        print(json.dumps(dict(exercise=exercise.number, title=exercise.title, score=score,
                              maximum=len(properties), passed=passed, properties=properties)))
        return passed
    print(f"exercise {exercise.number}, {exercise.title}: {exercise.file}, "
          f"{' and '.join(exercise.contracts)}")
    for row in properties:
        if row["passed"]:
            print(f"passed   {row['name']}")
        else:
            print(f"FAILED   {row['name']} | expected {row['expected']} | came {row['came']} | "
                  f"hint: {row['hint']}")
    print(f"score    {score} of {len(properties)}")
    return passed


class Parser(argparse.ArgumentParser):
    def error(self, message):
        stop(message)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["list", "blank", "check", "solution"])
    parser.add_argument("number", type=int, nargs="?", help="number of the exercise")
    parser.add_argument("--json", action="store_true", help="check: print one JSON object")
    parser.add_argument("--limit", type=float, default=20, help="check: seconds until it gives up")
    parser.add_argument("--commit", default="HEAD", help="blank, solution: whose functions to take")
    args = parser.parse_args()
    if args.action == "list":
        for row in TABLE:
            names = ", ".join(row.contracts)
            print(f"{row.number:<3} level {row.level}  {row.title}: {row.file} {names} "
                  f"[{row.source}]")
        return 0
    if args.number not in EXERCISES:
        stop(f"name an exercise from 1 to {len(EXERCISES)}; `list` shows them")
    exercise = EXERCISES[args.number]
    if args.action == "check":
        return 0 if check(exercise, args.limit, args.json) else 1
    action = blank if args.action == "blank" else solution
    action(exercise, args.commit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
