"""What several test files share: commands and mistakes, two processes, a full disk, networks."""
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

# Two workers on two cores: one thread each, for the children of tests too.
os.environ |= dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]


counted = {}


@contextlib.contextmanager
def counting_once():
    """Inside the block the FLOPs of a network, which take seconds, are counted once."""
    import train
    if not hasattr(train, "count_flops"):  # a test put a stand-in for train.py there
        yield
        return
    count_flops = train.count_flops

    def remembered(network, *how, **options):
        trained = [name for name, p in network.named_parameters() if p.requires_grad]
        key = json.dumps([type(network).__name__, network.config, trained, how, options])
        if key not in counted:
            counted[key] = count_flops(network, *how, **options)
        return counted[key]

    train.count_flops = remembered
    try:
        yield
    finally:
        train.count_flops = count_flops


def call(script, *words):
    """Run `python script words` in this process -> its returncode, stdout and stderr.

    It saves the seconds that Python and torch take to start.
    """
    from hub import command
    arguments = sys.argv
    out, err = io.StringIO(), io.StringIO()
    code = 0
    sys.argv = [script, *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), counting_once():
            command(importlib.import_module(Path(script).stem).main)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = arguments
    return SimpleNamespace(returncode=code or 0, stdout=out.getvalue(), stderr=err.getvalue())


def copies():
    """multiprocessing, whose processes start as copies of one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "torch.utils.flop_counter"])
    return context


def as_rank(rank, port, function, words, flops):
    counted.update(flops)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                       MASTER_ADDR="localhost", MASTER_PORT=str(port))
    return function(*words)


def in_two_processes(function, *words):
    """function(*words) in two processes that find each other as torchrun's do -> both results."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    jobs = [(rank, port, function, words, counted) for rank in range(2)]
    with copies().Pool(2) as pool:
        return pool.starmap_async(as_rank, jobs, chunksize=1).get(timeout=240)


@contextlib.contextmanager
def refused(match):
    """The block raises a UserError of one line, which matches."""
    from hub import UserError
    with pytest.raises(UserError, match=match) as error:
        yield
    assert "\n" not in str(error.value)


def assert_mistake(done, *words):
    """A command ended as a user's mistake does: exit code 2, and one line that has these words."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert str(word) in done.stderr, done.stderr


@contextlib.contextmanager
def full_disk(size):
    """Inside the block no file can grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)


@torch.no_grad()
def randomised(network, scale=0.1):
    """Make every tensor of a new network count: some start at 0 or 1. Returns it for evaluation."""
    for p in network.parameters():
        p.add_(scale * torch.randn_like(p))
    return network.eval()


def shapes(network):
    """Map the names of a network's tensors to their shapes."""
    return {key: value.shape for key, value in network.state_dict().items()}


def same_tensors(a, b):
    """Say whether two state dicts have the same names, and exactly the same values."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
