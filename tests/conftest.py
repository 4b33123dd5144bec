import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ |= dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")  # two workers on two cores; children of tests too

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def called(script, *words):
    """What `python script words` does -> its returncode, stdout and stderr, without the seconds that Python and torch take to start."""
    import train
    from folders import command
    if not hasattr(train.new_tokenizer, "cache_info"):  # always the same, and seconds
        train.new_tokenizer = functools.cache(train.new_tokenizer)
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


def as_rank(rank, port, function, words, counted):
    import watch
    watch.counted |= counted  # seconds
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    return function(*words)


def copies():
    """-> multiprocessing, whose processes start as copies of one that has imported torch, which saves seconds"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "torch.utils.flop_counter"])
    return context


def in_two_processes(function, *words):
    """function(*words) in two processes that find each other as torchrun's do -> what each returned."""
    import watch
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with copies().Pool(2) as pool:
        return pool.starmap_async(as_rank, [(rank, port, function, words, watch.counted) for rank in range(2)], chunksize=1).get(timeout=240)


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    before, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)


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
