"""MTU's claims: four tasks in one network, each as good as alone, with experts or without.

    python experiments/mtu.py               stages for 90 minutes; again, to go on
    python experiments/mtu.py --report      tables and figure of what is there

The paper upcycles Stable Diffusion 1.5 and trains for 100 epochs on four data sets. Here
assets/tiny learns from the built-in emoji for 300 steps with 8 samples of each task. All arms of a
seed see the same pictures, noise and timesteps; an arm of one task sees those of this task.

    N = 1, 2, 4, 8          the paper's list trains, from the pretrained network
    literal, N = 2, 4, 8    from the paper's plain copy, whose layers give 1/N of their output
    self-, cross-attention  N = 1, and these layers train instead of the feed-forward ones (Table 1)
    TASK alone              N = 4 with one task
    all weights             N = 4, and everything trains
    LoRA                    N = 1, whose feed-forward weights change by products of rank 16 alone
    shared norms            N = 4 with one norm before the experts for all tasks
    shared convolution      N = 4 with one input convolution for all tasks
    TASK alone, all weights N = 1, and everything trains: fine-tuning of the dense network and of a
                            task's input convolution, which Fig. 2 looks into
    fifth, sixth task       added to N = 4, without changing a bit of the older ones
    fifth, all weights      the same task, and everything trains: what do the older tasks forget?

    loss    on 64 held-out examples of a task with fixed noise. The arms have one forward process,
            so their losses may be compared. That of t2i falls when the network forgets drawings
            that the base knows by heart
    closer  share of drawings with a smaller squared error than the source as it is; t2i has none
    right   share of drawings that do what was asked, whatever becomes of the rest: t2i shows the
            category and edit the attribute, to a classifier's eye; of the others, what had to
            change is nearer to the target than to the source, as a blank picture often is

The learning rate, 1.6e-2, was chosen for N = 4 (RESULTS.md); all weights have train.py's default of
1e-3. Arms that could lose only because they need another rate have 4e-3 as well, once; N = 1, 2, 8
and single tasks do not, which favours N = 4. No full run has been made yet.

N = 4 against N = 1 asks whether experts help, against literal whether the start matters, against
TASK alone what sharing costs; against all weights, attention and LoRA, what has to train.

The order is by seed, then by arm: wherever it ends, what is there can be compared. Rule for
stopping early, fixed before the first run: none, as every run is short.
"""
import contextlib
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils import parametrize
from torch.utils.data import Subset

import common
import data
import emoji
import evaluate
import frame
import measures
import moe
import train
from hub import Parser, UserError, blaming, command, pick_device, read_json, replacing
from sample import load_model, pipeline_index

TINY = data.ASSETS / "tiny"
# The scores of evaluate.py that say whether a drawing is right; "changed" where none is named.
RIGHT = dict(t2i=["category"], edit=["tone", "gender", "colour"])
RANK = 16
LOSS_EXAMPLES = 64

# The layers whose change Fig. 2 measures: the weights of a kind, of each transformer block.
KINDS = {f"{words} {part}": [f"{layer}.to_{part}" + (".0" if part == "out" else "")]
         for layer, words in (("attn1", "self"), ("attn2", "cross"))
         for part in ("q", "k", "v", "out")}
KINDS["feed-forward"] = ["ff.net.0.proj", "ff.net.2"]


# -------------------------------------------------------------------------------------------------
# What the options of train.py cannot say of an arm

def write_start(base, tasks, folder):
    """Write the model that an arm starts from, unless it is there -> its folder.

    base: a dense model is upcycled to the tasks. One that is upcycled gets the last task in
    addition, as a copy of super-resolution.
    """
    if not folder.exists():
        model = load_model(base)
        if "moe" in model.unet.config:
            moe.add_task(model.unet, tasks[-1], like="sr")
        else:
            moe.upcycle(model.unet, tasks)
            model.index["guidance"] = train.GUIDANCE
        model.index = pipeline_index(model)
        with replacing(folder) as beside:
            model.save(beside)
    return folder


def own_share(examples, steps):
    """The samples that one task has in the batches of all four. examples: data.Examples of it.

    Numbers run over the batches of all four tasks, where this one has every fourth place: so `TASK
    alone` sees what N = 4 sees of it.
    """
    tasks = len(data.ALL)
    first = data.ALL.index(examples.shares[0])
    examples.batch_size *= tasks
    return Subset(examples, range(first, steps * examples.batch_size, tasks))


def share(part, model):
    """Let the rows of the tables named `part` stay equal: there is one for all tasks."""
    for name, table in model.unet.named_parameters():
        if part in name:
            # Every row gets the sum over rows, so they stay equal. Divided by the root of their
            # number they have one row's norm together, when gradients are clipped; Adam ignores it.
            table.register_hook(lambda g: g.sum(dim=0, keepdim=True).expand_as(g) / len(g) ** 0.5)


class LowRank(nn.Module):
    """LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen weight plus a product of rank `RANK`."""

    def __init__(self, weight):
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(RANK, columns).to(weight) / columns ** 0.5)
        self.up = nn.Parameter(torch.zeros(rows, RANK).to(weight))

    def forward(self, weight):
        return weight + self.up @ self.down


def add_low_rank(model):
    """Freeze the feed-forward layers but for a product of low rank, in place.

    What is saved has the product added to the weights: an ordinary upcycled network.
    """
    def merge(linear, state, prefix, _):
        for name in ("original", "0.down", "0.up"):
            del state[f"{prefix}parametrizations.weight.{name}"]
        state[f"{prefix}weight"] = linear.weight.detach()

    for block in moe.transformer_blocks(model.unet):
        block.ff.requires_grad_(False)
        for linear in (block.ff.net[0].proj, block.ff.net[2]):
            parametrize.register_parametrization(linear, "weight", LowRank(linear.weight))
            linear._register_state_dict_hook(merge)


def restyle(dataset, item, rng):
    """The fifth task: turn Google's drawing of an emoji into Twitter's."""
    cell = item[0].cells[emoji.draw_tone(item[0], rng)]
    source, target = (emoji.to_tensor(emoji.drawing(style, cell)) for style in emoji.STYLES)
    return dict(prompt="", source=source, target=target)


def colourise(dataset, item, rng):
    """The sixth task: colour a grey drawing."""
    _, picture = dataset.pick(item, rng)
    grey = picture.convert("L").convert("RGB")
    return dict(prompt="", source=emoji.to_tensor(grey), target=emoji.to_tensor(picture))


NEW_TASKS = {"restyle": restyle, "colourise": colourise}


def add_new_tasks():
    """Make the new tasks known: rows of the table of tasks, and methods of the built-in data."""
    for task, draw in NEW_TASKS.items():
        data.TASKS[task] = data.TASKS["sr"]
        setattr(emoji.Builtin, task, draw)


# -------------------------------------------------------------------------------------------------
# The arms

class Arm(NamedTuple):
    """How one network is trained, and on which tasks it is measured."""
    options: str | None             # of train.py; None: it is measured as it starts
    tasks: tuple = data.ALL
    seeds: int = 2
    change: Callable | None = None  # of the model, in place, before it trains
    base: Path | None = None        # what write_start begins with, where train.py cannot


def options(more="", *, task="all", lr="1.6e-2"):
    """The options of train.py, where every task has 8 samples in each batch."""
    size = 32 if task == "all" else 8
    return f"--task {task} --batch-size {size} --warmup 20 --eval-size 1 --lr {lr} {more}"


def make_arms(out):
    """List the arms in the order of their importance. out: the folder of the runs."""
    first, fifth = (Path(out) / f"{frame.slug(arm)}-0" for arm in ("N = 4", "fifth task"))
    arms = {"before": Arm(None, seeds=1, base=TINY)}
    arms |= {f"N = {N}": Arm(options(f"--num-experts {N}"), seeds=3) for N in (4, 1)}
    arms |= {f"literal, N = {N}": Arm(options(f"--num-experts {N} --expert-init literal"))
             for N in (4, 2, 8)}
    arms |= {f"N = {N}": Arm(options(f"--num-experts {N}")) for N in (2, 8)}
    arms |= {f"{kind}-attention": Arm(options(f"--num-experts 1 --train {kind}"), seeds=1)
             for kind in ("self", "cross")}
    # train.py leaves a model for text-to-image dense, as that is what it does already.
    arms |= {f"{task} alone": Arm(options(task=task), (task,),
                                  base=TINY if task == "t2i" else None) for task in data.ALL}
    arms |= {
        "all weights": Arm(options("--train all", lr="1e-3")),
        "LoRA": Arm(options("--num-experts 1"), change=add_low_rank),
        "shared norms": Arm(options(), change=functools.partial(share, ".norm3.")),
        "shared convolution": Arm(options(), change=functools.partial(share, "conv_in.")),
    }
    arms |= {f"{task} alone, all weights": Arm(
        options("--num-experts 1 --train all", task=task, lr="1e-3"), (task,), seeds=1)
        for task in data.ALL[1:]}
    five = (*data.ALL, "restyle")
    arms |= {
        "fifth task": Arm(options(task="restyle"), five, seeds=1, base=first),
        "sixth task": Arm(options(task="colourise"), (*five, "colourise"), seeds=1, base=fifth),
        "fifth, all weights": Arm(options("--train all", task="restyle", lr="1e-3"), five,
                                  seeds=1, base=first),
    }
    for name in ("self-attention", "cross-attention", "LoRA", "all weights", "literal, N = 4"):
        words = arms[name].options.replace("1.6e-2", "4e-3").replace("1e-3", "4e-3")
        arms[f"{name}, 4e-3"] = arms[name]._replace(options=words, seeds=1)
    return arms


# -------------------------------------------------------------------------------------------------
# Training and measuring

class Tasks:
    """What stands in the place of frame.Frame: how an arm is trained, drawn and measured."""

    def __init__(self, args):
        self.args = args
        self.arms = make_arms(args.out)
        self.device = pick_device()
        # One autoencoder in all runs, so that pictures are encoded once: see train.encoder_of.
        self.vae = load_model(TINY, device=self.device).vae
        self.classifier = measures.Emoji(self.device)
        self.trained = 0        # parameters of the last run

    @property
    def settings(self):
        return dict(count=self.args.count, draw_steps=self.args.draw_steps,
                    precision=self.args.precision, loss_examples=LOSS_EXAMPLES)

    def floor(self):
        return {}

    def start(self, arm, folder):
        """The model that an arm with a base starts from, beside the run's folder."""
        return write_start(arm.base, arm.tasks, folder.with_name(f"{folder.name}-start"))

    def train(self, stage, words):
        """Train a stage as train.py does, but for what its arm changes."""
        arm = self.arms[stage.arm]
        torch.manual_seed(stage.seed)
        if arm.base:
            words = [*words, "--model", str(self.start(arm, stage.out))]
        args = train.get_args([*words, "--out", str(stage.out)])
        stage.out.parent.mkdir(parents=True, exist_ok=True)
        with (open(stage.out.with_suffix(".txt"), "w", encoding="utf-8") as log,
              contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)):
            model, teacher, (examples, *held_out), *processes = train.prepare(args)
            if arm.change:
                arm.change(model)
            model.vae = self.vae
            self.trained = sum(p.numel() for p in model.unet.parameters() if p.requires_grad)
            if len(arm.tasks) == 1:
                examples = own_share(examples, args.steps)
            train.train(args, model, teacher, (examples, *held_out), *processes)

    def draw(self, folder, count):
        """Draw as many pictures of each task, `count` in all, and judge them."""
        model = load_model(folder, device=self.device)
        for task in model.tasks:
            self.judge(model, task, count // len(model.tasks), folder)

    def judge(self, model, task, count, folder):
        """Draw held-out examples of a task -> the shares that are closer, and that are right.

        folder: of the run. It keeps the drawings, and those that are there are not drawn again.
        """
        wanted = SimpleNamespace(
            data=None, split="heldout", seed=0, steps=self.args.draw_steps, guidance=None,
            image_guidance=None, count=count, batch_size=32,
            model_hash=evaluate.model_hash(model), pictures=folder / "pictures")
        bf16 = self.args.precision == "bf16"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            scores = evaluate.measure_task(model, task, wanted, [self.classifier])
        shares = {}
        # Kinds of edits have a score each, of the examples of this kind.
        for measure, names in (("closer", ["closer"]), ("right", RIGHT.get(task, ["changed"]))):
            found = [scores[name] for name in names if name in scores]
            if found:
                total = sum(score["value"] * score["count"] for score in found)
                shares[measure] = round(total / sum(score["count"] for score in found), 4)
        return shares

    def measure(self, name, folder):
        """Measure the run of an arm -> a row's numbers."""
        arm = self.arms[name]
        place = folder if arm.options else self.start(arm, folder)
        model = load_model(place, device=self.device)
        model.vae = self.vae
        examples = train.held_out_examples(arm.tasks, None, model, LOSS_EXAMPLES)
        losses = train.held_out_losses(model, examples, batch_size=32)
        row = dict(trained=self.trained if arm.options else 0, loss={}, closer={}, right={})
        for i, task in enumerate(arm.tasks):
            # The examples of the tasks come in turn.
            row["loss"][task] = round(losses[i::len(arm.tasks)].mean().item(), 5)
            for measure, value in self.judge(model, task, self.args.count, folder).items():
                row[measure][task] = value
        if len(arm.tasks) > len(data.ALL):
            row |= compare_older_tasks(load_model(arm.base).unet, model.unet.cpu())
        if name.endswith("alone, all weights"):
            row["deviation"] = deviation(load_model(TINY).unet, model.unet.cpu())
        return row


def compare_older_tasks(old, new):
    """Say whether a network changed beside the rows of its newest task, and their size."""
    old, size, unchanged = old.state_dict(), 0, True
    for name, tensor in new.state_dict().items():
        if any(part in name for part in moe.TABLES):
            size += tensor[-1].nbytes
            tensor = tensor[:-1]
        unchanged = unchanged and torch.equal(tensor, old[name])
    return dict(unchanged=unchanged, kilobytes=round(size / 1000, 1))


@torch.no_grad()
def deviation(base, tuned):
    """Fig. 2: Frobenius norm of the change -> {kind: [[absolute, relative] of each layer]}."""
    changes = {kind: [] for kind in KINDS}
    for blocks in zip(moe.transformer_blocks(base), moe.transformer_blocks(tuned)):
        for kind, names in KINDS.items():
            before, after = (torch.cat([block.get_submodule(name).weight.flatten()
                                        for name in names]) for block in blocks)
            norm = (after - before).norm().item()
            changes[kind].append([norm, norm / before.norm().item()])
    return changes


# -------------------------------------------------------------------------------------------------
# Tables and figure

def print_table(rows, measure):
    """Print a measure: a row for each arm and a column for each task."""
    tasks = (*data.ALL, *NEW_TASKS)
    print(f"\n{measure}: mean (standard deviation) over seeds\n")
    print("| | " + " | ".join(tasks) + " | trained | seeds |")
    print("|" + "---|" * (len(tasks) + 3))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        cells = [frame.cell([row[measure][task] for row in of_arm if task in row[measure]])
                 for task in tasks]
        print(f"| {arm} | " + " | ".join(cells)
              + f" | {of_arm[0]['trained'] / 1e6:.2f}M | {len(of_arm)} |")


def report_deviation(rows, path):
    """Print the mean ranks of Fig. 2 and draw the changes of all layers."""
    changes = np.array([[row["deviation"][kind] for kind in KINDS] for row in rows])
    # (tasks, kinds, layers, 2). The largest change of a layer has rank 1.
    ranks = 1 + (-changes).argsort(axis=1).argsort(axis=1)
    print(f"\nchange of the weights, mean of {len(rows)} tasks and all layers; rank 1 is largest\n")
    print("| | Frobenius norm | rank | relative | rank |\n|---|---|---|---|---|")
    for number, kind in enumerate(KINDS):
        cells = [f"{table[:, number, :, i].mean():.{digits}f}"
                 for i in (0, 1) for table, digits in ((changes, 4), (ranks, 1))]
        print(f"| {kind} | " + " | ".join(cells) + " |")
    plt = common.pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained", sharey=True)
    for axes, table, words in zip(panels, np.moveaxis(changes.mean(axis=0), 2, 0),
                                  ("Frobenius norm of the change", "relative to the weights")):
        figure.colorbar(axes.imshow(table, aspect="auto"), ax=axes)
        axes.set(title=words, xlabel="transformer block", yticks=range(len(KINDS)),
                 yticklabels=KINDS)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=100)
    plt.close(figure)
    print(path)


def report(path):
    """Print the tables and draw the figure of the rows that a file has, finished or not."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no {path}: no stage has ended yet")
    with blaming(path):
        rows = list(read_json(path)["stages"].values())
        for measure in ("loss", "closer", "right"):
            print_table(rows, measure)
        for row in rows:
            if "unchanged" in row:
                print(f"\n{row['arm']}: {row['kilobytes']} KB of its own, older tasks unchanged: "
                      f"{row['unchanged']}")
        if changed := [row for row in rows if "deviation" in row]:
            report_deviation(changed, path.with_suffix(".png"))
        seconds = sum(row.get("train_seconds", 0) + row["measure_seconds"] for row in rows)
        print(f"\n{seconds / 60:.0f} minutes in all")


def make_stages(args, tasks):
    """List the stages: by seed, then by arm."""
    stages = []
    for seed in range(args.seeds):
        for name, arm in tasks.arms.items():
            if seed < arm.seeds:
                folder = Path(args.out) / f"{frame.slug(name)}-{seed}"
                stages.append(frame.Stage(
                    name, seed, args.steps if arm.options else 0,
                    functools.partial(tasks.measure, name, folder),
                    pictures=args.count * len(arm.tasks), options=arm.options, out=folder))
    return stages


def main():
    parser = Parser("Compare ways to teach one network MTU's four tasks.")
    frame.add_options(parser, "mtu")
    parser.add_argument("--steps", type=int, default=300, help="steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="at most so many seeds of an arm")
    parser.set_defaults(count=32, draw_steps=20)
    args = parser.parse_args()
    if min(args.steps, args.seeds, args.draw_steps) < 1 or args.count < 2:
        raise UserError("--steps, --seeds and --draw-steps are at least 1, and --count at least 2")
    if not args.report:
        add_new_tasks()
        tasks = Tasks(args)
        runner = frame.Runner(args, dict(steps=args.steps), tasks)
        stages = make_stages(args, tasks)
        runner.announce(stages)
        runner.run(stages)
    report(args.results)


if __name__ == "__main__":
    command(main)
