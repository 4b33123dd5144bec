"""What the experiments share: runs of train.py, their logs, small trainings, and matplotlib.

Import it before any module of the project: it puts the project's folder on Python's path.
"""
import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(1, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from hub import Parser, UserError, between, read_json, write_json  # noqa: E402


# -------------------------------------------------------------------------------------------------
# Runs

def train(options, out):
    """Run train.py in processes of its own until it is finished.

    A run that was interrupted resumes. On a CPU it gets as many processes as there are cores, where
    the batch can be divided so: two processes of one thread are faster than one of two threads. A
    device draws the whole batch by itself.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=32)
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    processes = math.gcd(parser.parse_known_args(options)[0].batch_size, cores)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node", str(processes)]
    command += [str(ROOT / "train.py"), *options, "--out", str(out)]
    log = out.with_suffix(".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=file,
                              env={**os.environ, "OMP_NUM_THREADS": str(cores // processes)})
    if done.returncode:
        lines = log.read_text(encoding="utf-8").splitlines() or ["killed"]
        # What torchrun writes stands below the line that says what was wrong.
        wrong = [line for line in lines if line.startswith("error:")] or lines[-1:]
        raise UserError(f"train.py {shlex.join(options)} failed, see {log}: {wrong[0]}")


def read_log(folder):
    """Read the rows of a run's log.jsonl that belong to a step.

    Half a line that a killed run left behind, and lines that somebody else wrote, are skipped.
    """
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise UserError(f"no {path}: give the folder of a run of train.py")
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------------
# Small networks, trained without train.py

def training_parser(description, *, out, steps, batch_size, lr):
    """Make a parser with the options of every such script and these defaults."""
    parser = Parser(description)
    parser.add_argument("--out", default=out, help="where the trained network goes")
    parser.add_argument("--steps", type=between(1, 1e9), default=steps, help="optimiser steps")
    parser.add_argument("--batch-size", type=between(1, 1e6), default=batch_size,
                        help="samples per step")
    parser.add_argument("--lr", type=between(1e-12, 1e3, float), default=lr,
                        help="peak learning rate, after a warm-up and before a cosine to zero")
    parser.add_argument("--device", help="torch device; without it cuda, else mps, else cpu")
    parser.add_argument("--seed", type=between(0, 1e18), default=0,
                        help="random seed for weights and data")
    return parser


def refuse_existing(out):
    """Refuse to write over what is there already."""
    if Path(out).exists():
        raise UserError(f"{out} exists; choose another --out")


def fit(params, loss_of_step, args, **adamw):
    """Train parameters in place for args.steps steps of AdamW.

    loss_of_step: a function of the step's number. adamw: options of AdamW other than lr.
    """
    params = list(params)
    optimizer = torch.optim.AdamW(params, lr=args.lr, **adamw)
    warmup = 100
    bar = tqdm(range(args.steps), desc="training")
    for step in bar:
        # The shipped weights come from the smaller of warm-up and cosine, not from their product.
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / warmup, cosine)
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def borrow_from_tiny(folder, out):
    """Write a model_index.json that takes the parts which a folder lacks from assets/tiny.

    out: where the folder will lie when it is complete.
    """
    tiny = ROOT / "assets" / "tiny"
    write_json(folder / "model_index.json", {
        **read_json(tiny / "model_index.json"), "base": os.path.relpath(tiny, out)})


# -------------------------------------------------------------------------------------------------
# Figures

def range_names(n, T=1000):
    """The names of n equal ranges of T timesteps, and of all of them."""
    return [f"{T * i // n}..{T * (i + 1) // n - 1}" for i in range(n)] + ["all t"]


def pyplot():
    """matplotlib's pyplot, which the product itself does not need."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("this script draws with matplotlib: "
                        "pip install -r experiments/requirements.txt") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot
