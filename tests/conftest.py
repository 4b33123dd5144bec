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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
