"""What the experiments share: runs of train.py, their logs, and matplotlib.

Import it before any module of the project: it puts the project's folder on Python's path.
"""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(1, str(ROOT))

from hub import UserError  # noqa: E402


# -------------------------------------------------------------------------------------------------
# Runs

def run(script, options, log, jobs=1):
    """Run a script of the project in its own process -> what it printed.

    log: the file that receives its output. jobs: how many such processes share the cores.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, str(ROOT / script), *options], stdout=file,
                              stderr=file, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    printed = log.read_text(encoding="utf-8")
    if done.returncode:
        last = (printed.strip().splitlines() or ["killed"])[-1]
        raise UserError(f"{script} {shlex.join(options)} failed, see {log}: {last}")
    return printed


def train(options, out, jobs=1):
    """Run train.py until it is finished -> the rows of its log that hold held-out losses.

    A run that was interrupted resumes.
    """
    run("train.py", [*options, "--out", str(out)], out.with_suffix(".txt"), jobs)
    return [row for row in read_log(out) if "held_out" in row]


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
