"""Models on disk: folders in the Hugging Face layout, local or on the hub. And what the commands share: the device, a user's mistake.

Only safetensors are read: files of other kinds run code when opened. What is written is whole or not there.
"""
import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHTS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' file names


class HelpFormatter(argparse.HelpFormatter):
    """--help with the defaults, where the option's own words do not tell them."""

    def _get_help_string(self, action):
        told = action.default is not False and action.default not in (None, "", [], argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if told else action.help


class UserError(Exception):
    """A user's mistake, told in one line. Commands print it and exit with 2."""


def fetch(path_or_hub_id, subfolder):
    """A local folder, or a hub id (downloaded, only the files needed; the hub's cache serves offline) -> the folder's `subfolder`."""
    root, name = Path(path_or_hub_id), str(path_or_hub_id)
    if not root.is_dir():
        if root.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise UserError(f"no model folder at {name} (a hub id has the form owner/name)")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError
        wanted = [f"{subfolder}/*{end}" for end in (".json", ".txt", ".safetensors")] if subfolder else [
            "model_index.json", "config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors", "model.safetensors"]  # DDPM, CLIP
        try:
            for ignored in (["non_ema", "fp16"], ["non_ema"]):  # the second time, half precision: it may be all there is
                root = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=[f"{subfolder}/*.{i}.*" for i in ignored]))
                if not subfolder or any((root / subfolder).glob("*.safetensors")):
                    break
        except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise UserError(f"no folder {name} here, nor can it be had from the hub: {str(error).strip().splitlines()[0]}") from None
    if not (root / subfolder).is_dir():
        raise UserError(f"{name} has no folder {subfolder}/: it is not a model in the Hugging Face layout")
    return root / subfolder


@contextlib.contextmanager
def blaming(path):
    """What goes wrong inside is that file's fault: a user's file may hold anything."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} does not hold what it should: {type(error).__name__} {error}") from None


def read_json(path):
    try:
        return {**json.loads(Path(path).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or 'no JSON object'})") from None


def weight_files(folder):
    """The folder's safetensors, whole or sharded, in full precision if there is a choice."""
    for variant in ("", ".fp16"):
        for stem in WEIGHTS:
            if (file := Path(folder) / f"{stem}{variant}.safetensors").is_file():
                return [file]
            if (index := Path(folder) / f"{stem}.safetensors.index{variant}.json").is_file():
                with blaming(index):
                    return sorted({Path(folder) / name for name in read_json(index)["weight_map"].values()})
    raise UserError(f"no weights in {folder}: looked for {' and '.join(f'{n}.safetensors' for n in WEIGHTS)}, whole or sharded; "
                    ".bin files, which run code when opened, are not: let diffusers' save_pretrained write safetensors once")


def load_weights(module, folder, rename=lambda key: key, dtype=torch.float32):
    """Strictly fill a module that is on the meta device from the folder's safetensors; one copy in memory."""
    state = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    value = tensors.get_tensor(key)
                    state[rename(key)] = value.to(dtype) if value.is_floating_point() else value
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({str(error).splitlines()[0]}); download or save it again") from None
    state.pop(None, None)  # what `rename` drops
    wanted = module.state_dict()
    for problem, keys in (("lacks", sorted(wanted.keys() - state.keys())), ("has an unknown", sorted(state.keys() - wanted.keys())),
                          ("has another shape or type of", sorted(k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape
                                                                  or wanted[k].is_floating_point() != state[k].is_floating_point()))):
        if keys:
            more = f" and {len(keys) - 1} more" if keys[1:] else ""
            raise UserError(f"{folder} {problem} {keys[0]}{more}: not a {type(module).__name__} of this config")
    module.load_state_dict(state, assign=True)


@contextlib.contextmanager
def writing(path):
    """What goes wrong inside is a full disk's or a folder's fault, and the file is named."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error})") from None


def write_file(path, write):
    """write(path), but beside its place, fsynced and renamed: a crash leaves the old file or the new one. UserError names the file."""
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(beside)
            beside.chmod(0o644)
            with open(beside, "rb+") as f:
                os.fsync(f.fileno())
            beside.replace(path)
    except UserError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def write_json(path, value):
    write_file(path, lambda beside: beside.write_text(json.dumps(value, indent=2) + "\n"))


@contextlib.contextmanager
def new_folder(path):
    """A folder to fill in the block, which gets the name `path` at its end: all of it is there, or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=path.name + ".part-"))
    try:
        yield beside
        beside.chmod(0o755)
        beside.replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def save_weights(module, folder, config, name="diffusion_pytorch_model.safetensors", dtype=None):
    state = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous() for k, v in module.state_dict().items()}
    write_file(Path(folder) / name, lambda beside: save_file(state, beside, metadata={"format": "pt"}))
    write_json(Path(folder) / "config.json", config)


def pick_device(name=None):
    """The device that is named, else cuda, mps, cpu in this order."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available here ({str(error).splitlines()[0]})") from None
    return torch.device(name)


def compiled(run, device):
    """torch.compile; UserError where that cannot work."""
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--compile on CPU needs a C++ compiler (g++), and there is none here; leave --compile out")
    return torch.compile(run)


def command(main):
    """Run a command: a user's mistake ends in one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, SafetensorError) as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(
                words in str(error) for words in ("not enough memory", "can't allocate memory", "size calculation overflowed")):
            raise
        message = "out of memory; take fewer or smaller pictures, and for training a smaller --device-batch-size or --gradient-checkpointing"
    except OSError as error:  # a full disk, a read-only folder, a file where a folder should be
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    else:
        return
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
