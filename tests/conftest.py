import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # two workers on two cores; children of tests too

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def called(script, *words):
    """What `python script words` does -> its returncode, stdout and stderr, without the seconds that Python and torch take to start."""
    from folders import command
    before, out, err, code = sys.argv, io.StringIO(), io.StringIO(), 0
    sys.argv = [script, *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command(importlib.import_module(Path(script).stem).main)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


class OneThread:
    """In the place of a ThreadPoolExecutor."""

    def __init__(self, jobs):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def in_one_process(monkeypatch):
    """compare.py's runs of train.py, one after another in this process."""
    import compare

    def run(words, stdout, **options):
        done = called(Path(words[1]).name, *words[2:])
        stdout.write(done.stdout + done.stderr)
        return done
    monkeypatch.setattr(compare.subprocess, "run", run)
    monkeypatch.setattr(compare, "ThreadPoolExecutor", OneThread)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
