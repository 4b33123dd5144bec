"""What the experiments share: runs of train.py, their logs, and matplotlib.

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

from hub import UserError  # noqa: E402


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
