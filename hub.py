"""Files and commands: model folders and the hub, checkpoints, and a user's mistake in one line.

A model is a folder in the Hugging Face layout, on this disk or on the hub. Only safetensors are
read, because files of other kinds run code when they are opened. Whatever is written is first
written beside its place and then renamed, so a crash leaves the old file or the new one.

This file imports nothing of the project; every other file may import it.
"""
import argparse
import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# The names that diffusers and transformers give to a file of weights.
STEMS = ("diffusion_pytorch_model", "model")


# -------------------------------------------------------------------------------------------------
# Commands

class UserError(ValueError):
    """Raised for invalid input. Commands print its one line and exit with code 2."""


class Parser(argparse.ArgumentParser):
    """argparse, whose --help shows defaults and whose errors end in one line like any other."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter)

    def error(self, message):
        raise UserError(message)


class HelpFormatter(argparse.HelpFormatter):
    """Append the default to the help of an option, where it has one worth showing."""

    def _get_help_string(self, action):
        if action.default in (None, False, "", [], argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"


OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "size calculation overflowed")


def command(main):
    """Run a command's main(). A user's mistake becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character of somebody's prompt shows a question mark.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return main()
    except (UserError, SafetensorError) as error:
        message = str(error)
    except OSError as error:
        # A full disk, a read-only folder, a file where a folder should be.
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (RuntimeError, MemoryError) as error:
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not memory and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        message = ("out of memory; take fewer or smaller pictures, and for training a smaller "
                   "--device-batch-size or --gradient-checkpointing")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def pick_device(name=None):
    """The named torch device, or else the first of cuda, mps and cpu that is there."""
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not available here ({reason})") from None
    return torch.device(name)


def compiled(function, device):
    """torch.compile, or a UserError where it cannot work."""
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--compile on CPU needs a C++ compiler (g++), and there is none here; "
                        "leave --compile out")
    return torch.compile(function)


@contextlib.contextmanager
def blaming(path):
    """Turn whatever goes wrong in the block into a UserError that names `path`.

    Input files may be malformed in any way. One guard around reading a file replaces a check of
    every value.
    """
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError,
            RuntimeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} does not hold what it should ({reason})") from None


# -------------------------------------------------------------------------------------------------
# Reading

# Files of a repository whose parts lie at its top: google/ddpm-cifar10-32, openai/clip-vit-*.
TOP_LEVEL = ["model_index.json", "config.json", "scheduler_config.json",
             "diffusion_pytorch_model.safetensors", "model.safetensors"]


def fetch(path_or_hub_id, subfolder):
    """A local folder, or a hub id -> the path of its `subfolder` on this disk.

    From the hub only the files of that part are downloaded, and full precision is preferred to
    half. A download stays in the hub's cache and is found there without a network.
    """
    root = Path(path_or_hub_id)
    name = str(path_or_hub_id)
    if not root.is_dir():
        if root.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise UserError(f"no model folder at {name} (a hub id has the form owner/name)")
        root = download(name, subfolder)
    if not (root / subfolder).is_dir():
        raise UserError(f"{name} has no folder {subfolder}/: it is not a model in the Hugging Face "
                        "layout")
    return root / subfolder


def download(hub_id, subfolder):
    """Download one part of a repository from the hub -> the root of its local copy."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError
    wanted = TOP_LEVEL
    if subfolder:
        wanted = [f"{subfolder}/*{ending}" for ending in (".json", ".txt", ".safetensors")]
    try:
        # The second attempt accepts half precision, which may be all there is.
        for ignored in (["non_ema", "fp16"], ["non_ema"]):
            patterns = [f"{subfolder}/*.{variant}.*" for variant in ignored]
            root = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=patterns))
            if not subfolder or any((root / subfolder).glob("*.safetensors")):
                break
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no folder {hub_id} here, and the hub did not give it: {reason}") from None
    return root


def read_json(path):
    """The JSON object in a file, as a dict."""
    try:
        return {**json.loads(Path(path).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it holds no JSON object"
        raise UserError(f"{path} cannot be read ({reason})") from None


def weight_files(folder):
    """The safetensors files of a folder, one or several shards, in full precision if possible."""
    folder = Path(folder)
    for variant in ("", ".fp16"):
        for stem in STEMS:
            file = folder / f"{stem}{variant}.safetensors"
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if file.is_file():
                return [file]
            if index.is_file():
                with blaming(index):
                    names = read_json(index)["weight_map"].values()
                    return sorted({folder / name for name in names})
    names = " and ".join(f"{stem}.safetensors" for stem in STEMS)
    raise UserError(f"no weights in {folder}: looked for {names}, whole or sharded. Files that end "
                    "in .bin run code when they are opened and are not read; diffusers' "
                    "save_pretrained turns them into safetensors")


@contextlib.contextmanager
def open_weights(file, advice="download or save it again"):
    """Open a safetensors file; a file that is missing or damaged is named in a UserError."""
    if not Path(file).is_file():
        raise UserError(f"no file {file}")
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} cannot be read ({reason}); {advice}") from None


def load_weights(module, folder, rename=lambda key: key, dtype=torch.float32):
    """Fill a module that was built on the meta device with the weights in a folder, strictly.

    rename: turns a key of the file into the module's, or into None for a key to leave out.
    dtype: of floating-point parameters in memory. Memory never holds a second copy.
    """
    expected = module.state_dict()
    places = {}
    for file in weight_files(folder):
        with open_weights(file) as tensors:
            for key in tensors.keys():
                if (name := rename(key)) is not None:
                    places[name] = (file, key, tuple(tensors.get_slice(key).get_shape()))

    # Names and shapes are compared before any tensor is read.
    problems = {
        "lacks": expected.keys() - places.keys(),
        "has an unknown": places.keys() - expected.keys(),
        "has another shape of": {name for name in expected.keys() & places.keys()
                                 if tuple(expected[name].shape) != places[name][2]},
    }
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder} {problem} {min(names)}{more}: these are not the weights of "
                            f"a {type(module).__name__} with this config")

    state = {}
    for file in weight_files(folder):
        with open_weights(file) as tensors:
            for name, (place, key, _) in places.items():
                if place == file:
                    state[name] = tensors.get_tensor(key)
                    if state[name].is_floating_point() != expected[name].is_floating_point():
                        raise UserError(f"{folder}: {key} is of another type than a number with "
                                        "a fraction, or the reverse")
                    if state[name].is_floating_point():
                        state[name] = state[name].to(dtype)
    module.load_state_dict(state, assign=True)


# -------------------------------------------------------------------------------------------------
# Writing

def is_running(pid):
    """Whether a process with this number is alive on this machine."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def replacing(path):
    """Yield a path to write a file or a folder to; it takes the place of `path` when all is done.

    The path lies in a folder NAME.part-PID beside its final place. safetensors' save_file writes a
    temporary file of its own, which a killed process leaves behind: it lands in that folder too,
    and the next writer removes the folders of processes that are gone.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{path.name}.part-*"):
            if not is_running(old.name.rpartition("-")[2]):
                shutil.rmtree(old, ignore_errors=True)
        part.mkdir(exist_ok=True)
        yield part / path.name
        if (part / path.name).is_file():
            with open(part / path.name, "rb+") as file:
                os.fsync(file.fileno())
            (part / path.name).chmod(0o644)
        (part / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be written ({reason})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path, text):
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_weights(module, folder, config, name="diffusion_pytorch_model.safetensors", dtype=None):
    """Write a module's weights and its config.json into a folder.

    dtype: of the floating-point tensors in the file; None keeps the parameters' own.
    """
    state = {}
    for key, value in module.state_dict().items():
        kind = dtype if value.is_floating_point() else None
        state[key] = value.detach().to("cpu", kind).contiguous()
    with replacing(Path(folder) / name) as beside:
        save_file(state, beside, metadata={"format": "pt"})
    write_json(Path(folder) / "config.json", config)


# -------------------------------------------------------------------------------------------------
# Checkpoints. What a step draws follows from (seed, step, index in the batch), so there is no
# state of random generators to save: a run that is killed goes on bit for bit.

ADVICE = "delete it to begin again"  # where a checkpoint cannot be read


def parameter_numbers(params, optimizer):
    """Parameter name -> its number in optimizer.state_dict(), which counts through the groups."""
    number = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            number[id(p)] = len(number)
    return {name: number[id(p)] for name, p in params.items()}


def save_state(path, params, ema, optimizer, scalars):
    """Write weights, their average, Adam's moments and `scalars` (JSON) into one file."""
    tensors = {}
    moments = optimizer.state_dict()["state"]
    for name, number in parameter_numbers(params, optimizer).items():
        tensors[f"param/{name}"] = params[name].detach()
        tensors[f"ema/{name}"] = ema[name]
        for key, value in moments.get(number, {}).items():
            tensors[f"adam/{key}/{name}"] = value
    tensors = {key: value.contiguous().cpu() for key, value in tensors.items()}
    with replacing(path) as beside:
        save_file(tensors, beside, metadata={"scalars": json.dumps(scalars)})


def read_scalars(path):
    """The `scalars` that save_state wrote, without reading any tensor."""
    with blaming(f"{path} ({ADVICE})"), open_weights(path, ADVICE) as file:
        return json.loads(file.metadata()["scalars"])


def load_state(path, params, ema, optimizer):
    """Read what save_state wrote into params, ema and optimizer, in place."""
    moments = {}
    with blaming(f"{path} ({ADVICE})"), open_weights(path, ADVICE) as file:
        keys = set(file.keys())
        for name, number in parameter_numbers(params, optimizer).items():
            params[name].data.copy_(file.get_tensor(f"param/{name}"))
            ema[name].copy_(file.get_tensor(f"ema/{name}"))
            if f"adam/step/{name}" in keys:
                moments[number] = {key: file.get_tensor(f"adam/{key}/{name}")
                                   for key in ("step", "exp_avg", "exp_avg_sq")}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(dict(state=moments, param_groups=groups))
