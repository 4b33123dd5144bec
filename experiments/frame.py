"""The frame of the experiments on Fashion-MNIST: one measure of pictures, and stages that resume.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb fashion
    python experiments/frame.py --data fashion/usr/share/datasets/fashion-mnist

Three scripts stand on it: dtr.py, mtdiffusion.py and deme.py; mtu.py, on other data, has only its
stages. The command above prints the floor of the measure, which no network can pass.

The measure. Denoising losses of different forward processes cannot be compared, and the papers'
effects are effects on pictures. So pictures are drawn, at least 2,000 of them, and compared with
the 10,000 test pictures in the features of a small classifier (assets/fashion, made by
train_fashion_classifier.py):

    Frechet distance    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): FID's formula (Heusel et
                        al. 2017, arXiv 1706.08500). It is not FID, which means Inception's
                        features. With finite counts it is too large, and that error depends on the
                        count: compare only distances of equally many pictures.
    kernel distance     the unbiased estimate of the squared maximum mean discrepancy with the
                        kernel (x y / d + 1)^3: KID's formula (Binkowski et al. 2018, arXiv
                        1801.01401). For independent pictures it is right on average, whatever the
                        count, and so may be negative. Ours have equally many pictures of each
                        class, and so vary less than that: their floor lies just below zero.

All arms draw from the same noise, and train.py's batches are functions of (seed, step, index): the
arms of one seed share pictures, noise and timesteps too.

The stages. A stage continues one run of train.py to some step and measures the result. When it
ends, its row stands in experiments/results/NAME.json. The next start leaves out what stands there,
and train.py resumes what had begun, so a comparison of many hours can be made in parts.

Letters: N pictures, d features.
"""
import functools
import hashlib
import shlex
import shutil
import statistics
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import adm
import data
from emoji import to_tensor
from hub import Parser, UserError, blaming, command, is_slow_in_bf16, open_weights, pick_device
from hub import read_json, replacing, write_json
from measures import frechet_distance
from sample import Model, generate, load_model, pipeline_index

SIZE = 16                   # pixels of a side; the pictures come with 28
CLASSES = 10
WEIGHTS = data.ASSETS / "fashion" / "classifier.safetensors"
RESULTS = Path(__file__).parent / "results"


# -------------------------------------------------------------------------------------------------
# Pictures and their features

def load_pictures(root, split, count=None):
    """Read Fashion-MNIST as train.py reads it -> pictures (N, 3, 16, 16), classes (N,).

    split: "train" (60,000) or "heldout", the test set (10,000). count: spread evenly over the set.
    """
    dataset = data.open_dataset("class", split, SIZE, root)
    count = min(count or len(dataset), len(dataset))
    examples = [dataset[i * len(dataset) // count] for i in range(count)]
    pictures = torch.stack([example["target"] for example in examples])
    return pictures, torch.tensor([int(example["prompt"]) for example in examples])


class Classifier(nn.Module):
    """Three convolutions, a mean over positions, and a linear layer: (N, 3, 16, 16) -> (N, 10).

    The three colours have filters of their own, although the pictures are grey: a network that
    draws coloured pictures has other features.
    """
    WIDTHS = (32, 64, 64)

    def __init__(self):
        super().__init__()
        inputs = (3, *self.WIDTHS)
        self.convs = nn.ModuleList(
            nn.Conv2d(cin, cout, 3, padding=1, bias=False)
            for cin, cout in zip(inputs, self.WIDTHS))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in self.WIDTHS)
        self.linear = nn.Linear(self.WIDTHS[-1], CLASSES)
        # The features' unit: with it, their variance over the training pictures is 1 on average.
        self.register_buffer("unit", torch.ones(()))

    def features(self, x):
        """What the last layer reads, in its unit: (N, 3, 16, 16) -> (N, 64)."""
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = norm(conv(x)).relu()
            if number < 2:
                x = F.max_pool2d(x, 2)
        return x.mean(dim=(2, 3)) / self.unit

    def forward(self, x):
        return self.linear(self.features(x))


def load_classifier(path=WEIGHTS):
    """Load the shipped classifier -> Classifier in eval mode."""
    classifier = Classifier()
    with open_weights(path) as file, blaming(path):
        classifier.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    return classifier.eval().requires_grad_(False)


def describe_classifier(path=WEIGHTS):
    """Say which classifier measures: the first digits of its file's SHA-256, and its accuracy."""
    with open_weights(path) as file:
        accuracy = file.metadata()["accuracy"]
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    return f"{digest}, {accuracy} of the test pictures right"


@torch.no_grad()
def features_of(classifier, pictures):
    """Features of pictures (N, 3, 16, 16) -> (N, d), in float64."""
    parts = [classifier.features(part) for part in pictures.split(500)]
    return torch.cat(parts).double()


def kernel(a, b):
    """Kernel distance of two sets of features, (N, d) and (M, d) in float64 -> a number."""
    def total(x, y):
        # In parts: all pairs of 10,000 features would take a gigabyte at a time.
        return sum(((part @ y.T / y.shape[1] + 1) ** 3).sum() for part in x.split(1000))

    def within(x):
        # Without bias: no picture is compared with itself.
        themselves = ((x.square().sum(dim=1) / x.shape[1] + 1) ** 3).sum()
        return (total(x, x) - themselves) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))).item()


# -------------------------------------------------------------------------------------------------
# Drawing and measuring

def fresh_model(folder, name, seed, classes=0):
    """Write a new network for 16 x 16 pixels into a folder, unless it is there -> the folder.

    train.py's own new networks are larger. Arms that start from one folder have the same first
    weights. Output layers are zero and the betas are a cosine's, as the papers have them.

    name: in adm.CONFIGS. classes: 0, or as many for the task label.
    """
    if not (Path(folder) / "model_index.json").is_file():
        torch.manual_seed(seed)
        config = dict(sample_size=SIZE, num_class_embeds=classes + 1 if classes else None)
        network = adm.UNet2D(adm.CONFIGS[name] | config)
        adm.zero_outputs(network)
        scheduler = adm.scheduler_for(network.config, "squaredcos_cap_v2")
        model = Model(network, adm.Pixels(SIZE), None, None, scheduler, {})
        model.index = pipeline_index(model)
        with replacing(folder) as beside:
            model.save(beside)
    return Path(folder)


def draw(model, count, *, steps, seed, ensemble=(), precision="bf16", batch_size=250):
    """Draw pictures from a model of any task -> (N, 3, 16, 16) in [-1, 1], of 256 grey levels.

    Without guidance, which would trade variety for likeness. Every class has equally many pictures,
    as in the test set. Picture i starts from the noise of seed + i, whatever the model and the
    batch. ensemble: see sample.generate. precision: bf16 takes half the time of fp32, or, on a
    processor without instructions for it, many times as much.
    """
    (task,) = model.tasks
    prompts = [str(i % CLASSES) if task == "class" else "" for i in range(count)]
    options = dict(guidance=1.0) if task == "class" else {}
    pictures = []
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        for first in range(0, count, batch_size):
            pictures += generate(model, task, prompts[first:first + batch_size], steps=steps,
                                 sampler="ddim", seed=seed + first, ensemble=ensemble, **options)
    return torch.stack([to_tensor(picture) for picture in pictures])


class Frame:
    """The classifier, the features of the test pictures, and how pictures are drawn.

    args: data, count, draw_steps and precision, see `add_options`.
    """
    # Seeds of the noise. No seed of one draw of pictures is one of another's.
    APART = 1_000_000

    def __init__(self, args):
        self.args = args
        self.classifier = load_classifier()

    @property
    def settings(self):
        """What must be the same for all rows of a file."""
        return dict(classifier=describe_classifier(), count=self.args.count,
                    draw_steps=self.args.draw_steps, precision=self.args.precision)

    def train(self, stage, words):
        """Run train.py with these words, for a stage and in its folder."""
        common.train([*words, "--data", self.args.data], stage.out)

    def draw(self, folder, count):
        """Draw pictures as when measuring, so that their time is known."""
        draw(load_model(folder), count, steps=self.args.draw_steps, seed=0,
             precision=self.args.precision)

    @functools.cached_property
    def real(self):
        """The features of the 10,000 test pictures."""
        pictures, _ = load_pictures(self.args.data, "heldout")
        return features_of(self.classifier, pictures)

    def distances(self, pictures):
        """Pictures (N, 3, 16, 16) -> Frechet and kernel distance from the test pictures."""
        features = features_of(self.classifier, pictures)
        return frechet_distance(self.real, features), kernel(self.real, features)

    def measure(self, model, draws=1, **options):
        """Draw from a model, or from the one in a folder -> {measure: a value for each draw}.

        options: of `draw`, where they differ from the usual.
        """
        model = load_model(model) if isinstance(model, (str, Path)) else model
        usual = dict(count=self.args.count, steps=self.args.draw_steps,
                     precision=self.args.precision)
        values = [self.distances(draw(model, seed=self.APART * (number + 1), **usual | options))
                  for number in range(draws)]
        return {name: [round(value, 5) for value in column]
                for name, column in zip(("frechet", "kernel"), zip(*values))}

    def floor(self, draws=3):
        """Measure training pictures as if they were drawn -> what `measure` returns.

        They come from the distribution itself, so this is what finite counts alone make of the
        distances. A network that is far below it has copied the test set.
        """
        each = self.args.count // CLASSES
        # By a half more than needed: classes are not equally frequent in every part of the set.
        pictures, classes = load_pictures(self.args.data, "train", 15 * draws * each)
        columns = [(classes == number).nonzero()[:, 0] for number in range(CLASSES)]
        values = []
        for number in range(draws):
            part = slice(number * each, (number + 1) * each)
            chosen = torch.cat([rows[part] for rows in columns])
            values.append(self.distances(pictures[chosen]))
        return {name: [round(value, 5) for value in column]
                for name, column in zip(("frechet", "kernel"), zip(*values))}


# -------------------------------------------------------------------------------------------------
# Stages

class Stage(NamedTuple):
    """Train one run to some step, and measure it. Without options nothing is trained."""
    arm: str
    seed: int
    step: int                       # of the run, when the stage ends
    measure: Callable               # () -> what the row of results says of the run
    pictures: int                   # that measuring draws, in `draw_steps` steps each
    options: str | None = None      # of train.py
    out: Path | None = None         # the run's folder
    start: int = 0                  # the step at which the stage before it has ended

    @property
    def name(self):
        return f"{self.arm}, seed {self.seed}, step {self.step}"

    @property
    def images(self):
        """How many samples this stage trains on."""
        if self.options is None:
            return 0
        words = shlex.split(self.options)
        return (self.step - self.start) * int(words[words.index("--batch-size") + 1])


def add_options(parser, name):
    """Add the options that all experiments have."""
    parser.add_argument("--minutes", type=float, default=90,
                        help="no stage begins that would end later than this")
    parser.add_argument("--count", type=int, default=2000, help="pictures drawn for a distance")
    parser.add_argument("--draw-steps", type=int, default=50, help="DDIM steps of a picture")
    parser.add_argument("--precision", choices=("fp32", "bf16"),
                        default="fp32" if is_slow_in_bf16(pick_device()) else "bf16",
                        help="precision of training and drawing (default: bf16 where it is fast)")
    parser.add_argument("--out", default=f"runs/{name}", help="folder for the runs")
    parser.add_argument("--results", default=str(RESULTS / f"{name}.json"),
                        help="file that receives a row for each stage")
    parser.add_argument("--report", action="store_true",
                        help="only print the table and draw the figure of what is there")


def parse_args(parser):
    """Parse the options of an experiment on Fashion-MNIST."""
    parser.add_argument("--data", help="folder with Fashion-MNIST's idx files")
    args = parser.parse_args()
    if not args.report and args.data is None:
        raise UserError("--data FOLDER names the folder with Fashion-MNIST's idx files")
    if args.count < 2 * CLASSES or args.count % CLASSES:
        raise UserError(f"--count {args.count} is a multiple of {CLASSES}, at least {2 * CLASSES}")
    if not 1 <= args.draw_steps <= 1000:
        raise UserError(f"--draw-steps {args.draw_steps}: from 1 to 1000")
    return args


def slug(arm):
    """Make the name of an arm fit for a folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in arm.lower())


class Runner:
    """Run stages one after another, and keep what they measured in one JSON file.

    settings: what else than the frame's must be the same for all rows of the file. the_frame: what
    stands in the place of Frame in an experiment on other data.
    """
    PROBE = 20      # steps of training from which the rate is measured before there is a row

    def __init__(self, args, settings, the_frame=None):
        self.args = args
        self.frame = the_frame or Frame(args)
        self.began = time.monotonic()
        self.path = Path(args.results)
        self.rates = None           # of the probe: images trained and pictures drawn per second
        settings = settings | self.frame.settings
        # Other options than the defaults show in the settings.
        command = f"python experiments/{self.path.stem}.py"
        self.results = dict(command=command if the_frame else f"{command} --data FOLDER",
                            settings=settings, floor=None, stages={})
        if self.path.is_file():
            self.results = read_json(self.path)
            with blaming(self.path):
                recorded = self.results["settings"]
                changed = [key for key in settings.keys() | recorded.keys()
                           if settings.get(key) != recorded.get(key)]
            if changed:
                raise UserError(f"{self.path} was begun with other settings "
                                f"({', '.join(sorted(changed))}): give those, or another --results")

    @property
    def rows(self):
        return list(self.results["stages"].values())

    @property
    def minutes(self):
        """Minutes since the start."""
        return (time.monotonic() - self.began) / 60

    def remaining(self, stages):
        return [stage for stage in stages if stage.name not in self.results["stages"]]

    def announce(self, stages):
        """Say before anything starts what all stages together will take."""
        if self.results["floor"] is None:
            self.results["floor"] = self.frame.floor()
        if self.results["floor"]:
            print(f"floor, training pictures against test pictures: {self.results['floor']}")
        remaining = self.remaining(stages)
        self.probe(next((stage for stage in remaining if stage.options), None))
        total = sum(self.estimate(stage) for stage in remaining)
        print(f"{len(remaining)} of {len(stages)} stages remain, about {total:.0f} minutes in all; "
              f"no stage begins that would end after {self.args.minutes:g}", flush=True)

    def run(self, stages):
        """Run the stages that are not done, in order -> whether the time was enough for all."""
        for stage in self.remaining(stages):
            gone = stage.start > 0 and not stage.out.is_dir()
            # A run whose folder is gone begins at its first step again.
            minutes = self.estimate(stage._replace(start=0) if gone else stage)
            left = self.args.minutes - self.minutes
            if minutes > left:
                print(f"{stage.name} would take about {minutes:.0f} minutes, and {left:.0f} are "
                      "left: the same command goes on")
                return False
            self.results["stages"][stage.name] = self.perform(stage)
            write_json(self.path, self.results)
        return True

    def perform(self, stage):
        """Train and measure -> the stage's row."""
        row = dict(arm=stage.arm, seed=stage.seed, step=stage.step, images=stage.images,
                   pictures=stage.pictures)
        if stage.options:
            self.frame.train(stage, self.words(stage, stage.step))
            reached = common.read_log(stage.out)[-1]["step"]
            if reached != stage.step:
                # Without this, a lost file of results would be filled with later networks.
                raise UserError(f"{stage.out} is at step {reached} already, past {stage.name}: "
                                f"remove the folder, or bring {self.path} back")
            row["train_seconds"] = round(training_seconds(stage), 1)
        began = time.monotonic()
        row |= stage.measure()
        row["measure_seconds"] = round(time.monotonic() - began, 1)
        values = ", ".join(f"{key} {value}" for key, value in row.items()
                           if key not in ("arm", "seed", "step"))
        print(f"{stage.name}: {values}", flush=True)
        return row

    def words(self, stage, steps):
        """The words of train.py's command, but for --out."""
        return [*shlex.split(stage.options), "--seed", str(stage.seed), "--steps", str(steps),
                "--precision", self.args.precision, "--log-every", "50", "--save-every", "500",
                "--sample-every", "0"]

    def probe(self, stage):
        """Measure the rates of a machine, where no row tells them, by a few steps of a stage."""
        if stage is None or self.rates or any(row["images"] for row in self.rows):
            return
        # A name of its own: the run itself must not begin with other settings.
        folder = Path(self.args.out) / f"probe-{time.time_ns()}"
        self.frame.train(stage._replace(out=folder), self.words(stage, self.PROBE))
        trained = [row["images_per_s"] for row in common.read_log(folder) if "images_per_s" in row]
        began = time.monotonic()
        self.frame.draw(folder, 100)
        self.rates = (trained[-1], 100 / (time.monotonic() - began))
        shutil.rmtree(folder)
        folder.with_suffix(".txt").unlink()
        print(f"by a probe: {self.rates[0]:.0f} images trained and {self.rates[1]:.1f} pictures "
              "drawn per second")

    def estimate(self, stage):
        """Estimate the minutes of a stage by the slowest row of its arm, or of any arm."""
        rows = [row for row in self.rows if row["arm"] == stage.arm] or self.rows
        trained = [row["images"] / row["train_seconds"] for row in rows
                   if row.get("train_seconds")]
        drawn = [row["pictures"] / row["measure_seconds"] for row in rows
                 if row["pictures"] and row["measure_seconds"]]
        seconds = 0.0
        for work, rates, number in ((stage.images, trained, 0), (stage.pictures, drawn, 1)):
            rate = min(rates) if rates else self.rates and self.rates[number]
            seconds += work / rate if rate else 0.0
        return seconds / 60


def training_seconds(stage):
    """How long the steps of a stage took, by the run's log: also where it was interrupted."""
    before = stage.start
    seconds = 0.0
    each = stage.images / (stage.step - stage.start)
    for row in common.read_log(stage.out):
        if "images_per_s" in row and stage.start < row["step"] <= stage.step:
            seconds += (row["step"] - before) * each / row["images_per_s"]
            before = row["step"]
    return seconds


def is_flat(rows, arm, tolerance=0.03):
    """Say whether an arm's mean distance fell by less than `tolerance` over its last stage.

    Steps that one seed has reached and another has not are left out.
    """
    by_step = {}
    for row in rows:
        if row["arm"] == arm and "frechet" in row:
            by_step.setdefault(row["step"], []).append(row["frechet"][0])
    seeds = max(map(len, by_step.values()), default=0)
    means = [statistics.mean(by_step[step]) for step in sorted(by_step)
             if len(by_step[step]) == seeds]
    return len(means) > 1 and means[-1] > (1 - tolerance) * means[-2]


# -------------------------------------------------------------------------------------------------
# Table and figure

# What a row holds besides measures of its network.
NO_MEASURES = {"arm", "seed", "step", "images", "pictures", "train_seconds", "measure_seconds",
               "weights", "searched"}


def cell(values, digits=3):
    """Mean and, of several values, their standard deviation in parentheses."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else mean


def print_tables(results):
    """Print, for each measure, a row for each arm and a column for each step."""
    rows = list(results["stages"].values())
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    measures = list(dict.fromkeys(key for row in rows for key in row if key not in NO_MEASURES))
    print(f"classifier {results['settings']['classifier']}; floor {results['floor']}")
    for measure in measures:
        columns = sorted({row["step"] for row in rows if measure in row})
        print(f"\n{measure}: mean (standard deviation) over seeds, after so many steps\n")
        print("| | " + " | ".join(map(str, columns)) + " | seeds |")
        print("|" + "---|" * (len(columns) + 2))
        for arm in arms:
            values = {step: [first_of(row[measure]) for row in rows if row["arm"] == arm
                             and row["step"] == step and measure in row] for step in columns}
            if any(values.values()):
                cells = [cell(values[step], 4 if measure == "kernel" else 3) for step in columns]
                print(f"| {arm} | " + " | ".join(cells)
                      + f" | {max(map(len, values.values()))} |")
    for row in rows:
        if len(row.get("frechet", ())) > 1:
            print(f"\nscatter of {len(row['frechet'])} draws from one network ({row['arm']}, seed "
                  f"{row['seed']}): {row['frechet']}, {row['kernel']}")
    seconds = sum(row.get("train_seconds", 0) + row["measure_seconds"] for row in rows)
    print(f"\n{seconds / 60:.0f} minutes in all")


def first_of(value):
    """Of several draws the first: arms that were drawn more often have no advantage."""
    return value[0] if isinstance(value, list) else value


def draw_figure(results, path, by_arm=False):
    """Draw the Frechet distances: curves over the steps, with bands over the seeds.

    by_arm: draw only where each run has ended, a column for each arm and a point for each seed.
    """
    plt = common.pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    points = {}
    for row in results["stages"].values():
        if "frechet" in row:
            arm = points.setdefault(row["arm"], {})
            arm.setdefault(row["step"], []).append(row["frechet"][0])
    for arm, values in points.items():
        steps = sorted(values)
        if by_arm:
            ends = values[steps[-1]]
            axes.plot([arm] * len(ends), ends, "o")
            continue
        line, = axes.plot(steps, [statistics.mean(values[step]) for step in steps], marker="o",
                          label=arm)
        axes.fill_between(steps, [min(values[step]) for step in steps],
                          [max(values[step]) for step in steps], alpha=0.2,
                          color=line.get_color())
    if results["floor"]:
        axes.axhline(statistics.mean(results["floor"]["frechet"]), color="grey", linestyle=":",
                     label="floor")
    axes.set(ylabel="Frechet distance", yscale="log", xlabel="" if by_arm else "step")
    axes.tick_params(axis="x", rotation=20 if by_arm else 0)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=100)
    plt.close(figure)


def report(path, by_arm=False):
    """Print the tables and draw the figure of the rows that a file has, finished or not."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no {path}: no stage has ended yet")
    results = read_json(path)
    with blaming(path):
        print_tables(results)
        draw_figure(results, path.with_suffix(".png"), by_arm)
    print(f"{path}, {path.with_suffix('.png')}")


def main():
    parser = Parser("Print the floor of the measure: training pictures against test pictures.")
    add_options(parser, "frame")
    args = parse_args(parser)
    print(f"classifier {describe_classifier()}")
    for name, values in Frame(args).floor().items():
        print(f"{name} distance of {args.count} training pictures from the test pictures: "
              f"{', '.join(map(str, values))}")


if __name__ == "__main__":
    command(main)
