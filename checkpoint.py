"""Where a run stands: weights, their average, Adam's moments and the step, in one safetensors file that is whole or not there.

A run that is killed goes on from the last one, bit for bit: what a step draws follows from (seed, step, index in the batch), so there is no
state of random generators to keep.
"""
import contextlib
import json
import os
import signal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from folders import UserError, write_file


@contextlib.contextmanager
def averaged(params, ema):
    """The weight average in place of the weights."""
    def swap():
        for name, p in params.items():
            p.data, ema[name] = ema[name], p.data
    swap()
    yield
    swap()


@contextlib.contextmanager
def stoppable():
    """-> a list that is no longer empty once the process was told to stop, by SIGTERM or Ctrl-C; at a second Ctrl-C it stops at once. torchrun
    sends SIGTERM after the terminal's Ctrl-C: that is once."""
    told = []

    def tell(number, _):
        if number == signal.SIGINT and number in told:
            raise KeyboardInterrupt
        told.append(number)
    ours = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]  # nohup's stays ignored
    before = {number: signal.signal(number, tell) for number in ours}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def restart_store():
    """The store where torchrun's processes find each other. On one machine torchrun's own outlives a restart, with the addresses of the dead in it
    (pytorch issue 135712): each start gets names of its own. None, torch's choice, elsewhere."""
    told = os.environ
    if told.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or told["LOCAL_WORLD_SIZE"] != told["WORLD_SIZE"]:
        return None
    store = dist.TCPStore(told["MASTER_ADDR"], int(told["MASTER_PORT"]), is_master=False, use_libuv=told.get("USE_LIBUV", "1") == "1")
    return dist.PrefixStore(f"start-{told['TORCHELASTIC_RESTART_COUNT']}", store)


def any_rank(told, device):
    """Whether a rank was told to stop: all must leave at the same step."""
    if not dist.is_initialized():
        return bool(told)
    flag = torch.tensor(float(bool(told)), device=device)
    dist.all_reduce(flag)
    return flag.item() > 0


def same_start(step, device):
    """UserError where the ranks found different checkpoints."""
    if dist.is_initialized():
        most = torch.tensor([step, -step], device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if most[0] != -most[1]:
            raise UserError("the processes found different checkpoints: --out must be on a disk that all machines share")


def same_on_all_ranks(params):
    """UserError names the first parameter whose bits are not the same everywhere: averaged gradients would hide it."""
    sums = torch.stack([p.detach().contiguous().view(torch.int32).sum() for p in params.values()])  # one bit that differs changes it
    least, most = sums.clone(), sums.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if different := [name for name, same in zip(params, (least == most).tolist()) if not same]:
        raise UserError(f"the weights differ between the processes, {different[0]} first, {len(different)} of {len(params)} in all: a device or a "
                        "library is at fault; the last checkpoint is kept")


def indices(params, optimizer):
    """name -> its number in optimizer.state_dict(), which counts in the order of the groups."""
    order = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    return {name: order[id(p)] for name, p in params.items()}


def save_state(path, params, ema, optimizer, scalars):
    """One safetensors file: weights, average, Adam's moments; scalars as JSON."""
    tensors = {f"param/{n}": p.detach() for n, p in params.items()} | {f"ema/{n}": e for n, e in ema.items()}
    moments = optimizer.state_dict()["state"]
    for name, i in indices(params, optimizer).items():
        tensors |= {f"adam/{key}/{name}": value for key, value in moments.get(i, {}).items()}
    tensors = {k: v.contiguous().cpu() for k, v in tensors.items()}
    write_file(path, lambda beside: save_file(tensors, beside, metadata={"scalars": json.dumps(scalars)}))


def load_state(path, params, ema, optimizer, settings):
    """-> the scalars of the checkpoint; UserError where it was made with other settings or is damaged."""
    try:
        with safe_open(path, "pt") as f:
            scalars, keys = json.loads(f.metadata()["scalars"]), set(f.keys())
            told = scalars["settings"]  # an option that is younger than the run was not in use
            if changed := [f"--{k.replace('_', '-')} was {told.get(k)!r}, is now {v!r}" for k, v in settings.items() if told.get(k, v and None) != v]:
                raise UserError(f"{path.parent.parent} was begun with other settings: {'; '.join(changed)}. Give those, or another --out")
            for name, p in params.items():
                p.data.copy_(f.get_tensor(f"param/{name}").view_as(p))
                ema[name].copy_(f.get_tensor(f"ema/{name}").view_as(p))
            moments = {}
            for name, i in indices(params, optimizer).items():
                shapes = dict(step=(), exp_avg=params[name].shape, exp_avg_sq=params[name].shape)
                if f"adam/step/{name}" in keys:
                    moments[i] = {key: f.get_tensor(f"adam/{key}/{name}").view(shape) for key, shape in shapes.items()}
            groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
            optimizer.load_state_dict(dict(state=moments, param_groups=groups))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); delete it to begin again") from None
    return scalars


def forget_after(log, step):
    """Lines of log.jsonl that steps after the checkpoint wrote: they come again."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("}\n") and json.loads(line)["step"] <= step]
        write_file(log, lambda beside: beside.write_text("".join(lines)))
