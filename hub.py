"""Files and commands: model folders and the hub, checkpoints, and a user's mistake in one line.

A model is a folder in the Hugging Face layout, on this disk or on the hub. Only safetensors are
read, because files of other kinds run code when they are opened. Whatever is written is first
written beside its place and then renamed, so a crash leaves the old file or the new one.

This file imports nothing of the project; every other file may import it.
"""
import argparse
import contextlib
import errno
import functools
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path


def end_quietly(kind, error, trace):
    """Show an uncaught exception as Python does, but Ctrl-C as `command` does, which runs later."""
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, trace)
    print("interrupted", file=sys.stderr)
    sys.exit(130)


# Set before the imports that take seconds, so the commands import this file first. Other people's
# programs, which import it too, keep what they have.
here = Path(__file__).resolve().parent
if Path(sys.argv[0]).resolve().parent in (here, here / "experiments"):
    sys.excepthook = end_quietly

import torch  # noqa: E402
from PIL.PngImagePlugin import PngInfo  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

try:
    import fcntl
except ImportError:
    # Windows has no such locks: see `lock`.
    fcntl = None

# The names that diffusers and transformers give to a file of weights, and the variants that are
# read, the preferred one first. The variant of weights without averaging, non_ema, is not read.
STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = ("", ".fp16", ".bf16")
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack")  # which others use


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

    def parse_args(self, args=None, namespace=None):
        args = super().parse_args(args, namespace)
        # An unset shell variable makes an empty path, which would mean the current folder.
        for name, value in vars(args).items():
            if value == "" and "prompt" not in name:
                raise UserError(f"--{name.replace('_', '-')} is empty")
        return args


class HelpFormatter(argparse.HelpFormatter):
    """Append the default to the help of an option, where it has one worth showing."""

    def _get_help_string(self, action):
        if action.default in (None, False, "", [], argparse.SUPPRESS):
            return action.help
        # What comes with the code is named as README names it, from the project's folder.
        default = str(action.default).removeprefix(f"{Path(__file__).parent}{os.sep}")
        return f"{action.help} (default: {default})"


def between(low, high, kind=int):
    """Make an argument's type: a number of a kind from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value
    parse.__name__ = kind.__name__  # argparse names it where `kind` raises ValueError
    return parse


def refuse_idle(args, group, reason):
    """Refuse the options of a group that is of no use here: ignored, they would mislead."""
    for action in group._group_actions:
        if getattr(args, action.dest) != action.default:
            raise UserError(f"{action.option_strings[0]} would do nothing here: {reason}")


OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "size calculation overflowed")


def command(main):
    """Run a command's main(). A user's mistake becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character of somebody's prompt shows a question mark.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if not sys.warnoptions:
        # Remarks of libraries would stand beside our one line; python -W default shows them.
        warnings.simplefilter("ignore")
    code = 2
    try:
        return main()
    except (UserError, SafetensorError) as error:
        message = f"error: {error}"
    except OSError as error:
        # A full disk, a read-only folder, a file where a folder should be.
        reason = f"{error.filename}: {error.strerror}" if error.filename else error
        message = f"error: {reason}"
    except (RuntimeError, MemoryError) as error:
        # PyTorch has a class for a GPU that is full, but on a CPU only a message says so.
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not memory and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        message = ("error: out of memory; take fewer or smaller pictures, and for training a "
                   "smaller --device-batch-size or --gradient-checkpointing")
    except KeyboardInterrupt:
        message = "interrupted"
        code = 130
    if not is_first():
        # Under torchrun every process meets the same mistake. As soon as the first has printed it
        # and left, torchrun ends the others with SIGTERM, so they wait here for that. Only a
        # mistake that the first one does not share, such as one machine's full disk, is printed.
        # On a busy machine the first one takes some seconds to leave.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def is_first():
    """Whether this process is alone, or the first of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def pick_device(name=None):
    """The named torch device, or else the first of cuda, mps and cpu that is there."""
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        # A device that is visible may still refuse to work, so something is computed on it.
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not available here ({reason})") from None
    return torch.device(name)


def is_slow_in_bf16(device):
    """Say whether a device lacks instructions for bf16: a CPU without them is best left at fp32."""
    # Without oneDNN, as in some builds for ARM, nothing is known of its speed.
    return (device.type == "cpu" and torch.backends.mkldnn.is_available()
            and not torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
    except UserError as error:
        # It says what is wrong, but its writer may not have known in which file.
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError,
            SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} does not hold what it should ({reason})") from None


# -------------------------------------------------------------------------------------------------
# Reading

# What lies at the top of a repository that has no folders, such as google/ddpm-cifar10-32 or
# openai/clip-vit-large-patch14.
TOP_LEVEL = ["model_index.json", "config.json", "scheduler_config.json", "vocab.json",
             "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "added_tokens.json"]


def fetch(path_or_hub_id, subfolder):
    """A local folder, or a hub id -> the path of its `subfolder` on this disk.

    A hub id is owner/name, or owner/name@revision for a branch, a tag or a commit. Only the files
    of that part are downloaded, in full precision if there is a choice. A download stays in the
    hub's cache and is found there without a network.
    """
    root = Path(path_or_hub_id)
    name = str(path_or_hub_id)
    if root.is_dir():
        names = {path.name for path in root.iterdir()}
    elif root.is_file():
        names = {root.name}
        if root.suffix == ".safetensors":
            # A LoRA shows in the names of its tensors, whatever its file is called.
            with open_weights(root) as tensors:
                names.update(tensors.keys())
        raise UserError(f"no model folder at {name}, which is a file: {what_it_is(names)}")
    elif (root.exists() or name.partition("@")[0].count("/") != 1 or name[0] in "./~"
          or root.parent.is_dir()):  # a misspelt runs/NAME is no hub id
        raise UserError(f"no model folder at {name} (a hub id has the form owner/name)")
    else:
        try:
            root, names = download(name, subfolder)
        except UserError:
            raise
        except Exception as error:
            # The hub's client passes on the errors of its HTTP library, whose classes differ from
            # version to version, so all of them are caught.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"no folder {name} here, and the hub did not give it: "
                            f"{reason}") from None
    if subfolder and not (root / subfolder).is_dir():
        raise UserError(f"{name} has no folder {subfolder}/: {what_it_is(names)}")
    if not subfolder and not any(root.glob("*.json")):
        raise UserError(f"{name} has no model_index.json: {what_it_is(names)}")
    # Every model has a U-Net, so this is asked once for each model that is loaded.
    loras = [other for other in names if "lora" in other.lower() and other.endswith(".safetensors")]
    if subfolder == "unet" and loras:
        print_once(f"warning: {name}: the LoRA {min(loras)} is ignored, only the model itself is "
                   "loaded")
    return root / subfolder


def download(hub_id, subfolder):
    """Download one part of a repository -> its local root, and the names at the repository's top.

    The repository's files are listed first. So no second precision is downloaded, and no shards
    without their index.
    """
    from huggingface_hub import list_repo_files, snapshot_download
    # Its remarks about attempts that failed would stand beside our one line.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    repository, _, revision = hub_id.partition("@")
    revision = revision or None
    get = functools.partial(snapshot_download, repository, revision=revision)
    prefix = f"{subfolder}/" if subfolder else ""
    wanted = [f"{prefix}*.json", f"{prefix}*.txt"] if subfolder else TOP_LEVEL
    try:
        files = list_repo_files(repository, revision=revision)
    except Exception:
        # The error of the listing says more than that of a cache without the model.
        with contextlib.suppress(Exception):
            # Without a network, what an earlier call has downloaded serves as well.
            root = Path(get(allow_patterns=wanted, local_files_only=True))
            return root, {path.name for path in root.iterdir()}
        raise
    inside = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    weights = choose_weights(inside)
    # A whole model has its weights in folders, and does not need what else lies beside them.
    alone = subfolder or ("config.json" in inside and "unet/config.json" not in inside)
    if weights is not None:
        wanted = [*wanted, prefix + weights]
    elif alone and any(file.endswith(WEIGHTS) for file in inside):
        # Nothing is downloaded. Tokenizers and schedulers have no weights of any kind.
        raise no_weights(f"{hub_id}/{subfolder}".rstrip("/"), inside)
    root = Path(get(allow_patterns=wanted))
    if weights is not None and weights.endswith(".json"):
        # What the shards are called stands in their index.
        get(allow_patterns=[prefix + file.name for file in weight_files(root / subfolder)])
    return root, {file.partition("/")[0] for file in files}


def what_it_is(names):
    """Say what something is that is no model folder, and what to do with it.

    names: what lies at a folder's top, or a file's name and those of its tensors.
    """
    if "unet" in names:
        if "text_encoder_2" in names and "text_encoder" not in names:
            return ("it is SDXL's refiner, which only improves pictures that another model has "
                    "drawn; take stabilityai/stable-diffusion-xl-base-1.0, for example")
    elif "transformer" in names:
        return ("its network is a transformer, as in Stable Diffusion 3 and Flux, and not a U-Net; "
                "of these only DiT is read here, by dit.py")
    elif any("lora" in name.lower() for name in names):
        return ("it is a LoRA, which changes another model; load that model and the LoRA in "
                "diffusers, call fuse_lora, and save the result with save_pretrained")
    elif any(name.endswith((".safetensors", ".ckpt")) for name in names):
        return ("it is a checkpoint in a single file; diffusers' from_single_file reads it, and "
                "save_pretrained then writes the folder that is needed here")
    elif any(name.endswith(WEIGHTS) for name in names):
        return ("its weights are of a kind that runs code when it is opened, such as .bin; load it "
                "in diffusers or transformers, which write safetensors with save_pretrained")
    return "it is not a model in the Hugging Face layout"


def find_index(path_or_hub_id):
    """Find a model -> its folder on this disk, and its model_index.json as a dict."""
    root = fetch(path_or_hub_id, "")
    config = root / "config.json"
    if config.is_file() and not (root / "model_index.json").exists():
        values = read_json(config)
        # diffusers' name for what it is, or else transformers'.
        kind = values.get("_class_name", values.get("model_type"))
        raise UserError(f"{path_or_hub_id} has no model_index.json: it holds a {kind} alone; name "
                        "a whole model, with a U-Net, an autoencoder and what else belongs to it")
    return root, read_json(root / "model_index.json")


@functools.cache
def print_once(line):
    """Print a line to stderr, each one once, and under torchrun by the first process alone."""
    if is_first():
        print(line, file=sys.stderr)


def read_json(path):
    """The JSON object in a file, as a dict."""
    with reading(path):
        try:
            return {**json.loads(Path(path).read_text(encoding="utf-8"))}
        except (ValueError, TypeError, RecursionError):
            raise OSError("it holds no JSON object") from None


def choose_weights(names):
    """Among the names in a folder, choose the file of weights or the index of its shards.

    None is returned where there is neither. Full precision is preferred.
    """
    files = (name for variant in VARIANTS for stem in STEMS
             for name in (f"{stem}{variant}.safetensors",
                          f"{stem}.safetensors.index{variant}.json"))
    return next((name for name in files if name in names), None)


def no_weights(place, names):
    """Make the error that a folder with files of these names has no weights that are read."""
    others = sorted(name for name in names if name.endswith(WEIGHTS))
    return UserError(
        f"no weights in {place}: looked for {' and '.join(STEMS)}.safetensors, whole or sharded, "
        f"and found {', '.join(others) or 'nothing like it'}. diffusers can load another variant "
        "or a .bin file (which runs code when it is opened) and write safetensors with "
        "save_pretrained")


def weight_files(folder):
    """The safetensors files of a folder, one or several shards."""
    folder = Path(folder)
    names = [path.name for path in folder.iterdir() if path.is_file()]
    chosen = choose_weights(names)
    if chosen is None:
        raise no_weights(folder, names)
    if chosen.endswith(".json"):
        with blaming(folder / chosen):
            shards = read_json(folder / chosen)["weight_map"].values()
            # A path would lead out of the folder, and on the hub a star would fetch everything.
            if not all(re.fullmatch(r"[\w.-]+\.safetensors", shard) for shard in shards):
                raise ValueError("a shard has no plain file name")
            return sorted({folder / shard for shard in shards})
    return [folder / chosen]


# A config file is short, but a number in it can ask for a network without end. Real networks have
# tens of layers, and their widths, pictures and classes stay far below a million.
MOST_LAYERS = 200
LARGEST_NUMBER = 10 ** 6

# These keys may hold a list with an item for each level of a U-Net or an autoencoder. All others
# hold one value.
PER_LEVEL = ("block_out_channels", "down_block_types", "up_block_types",
             "transformer_layers_per_block", "attention_head_dim")


def complete(config, defaults, implemented, name="U-Net config"):
    """Fill in the defaults, and refuse by name what is not implemented.

    config: diffusers' keys and values. implemented: key -> its possible values, where diffusers has
    a choice of them; the values of all other keys of `defaults` are numbers. name: for the errors.

    A list of equal items is accepted where one value is meant: [2, 2, 2, 2] layers, [64, 64] as
    the size. Numbers that do not fit each other are left for PyTorch to find when it builds the
    layers.
    """
    completed = dict(defaults)
    for key, value in config.items():
        if key.startswith("_"):
            # A note of diffusers, such as the version that wrote the file.
            continue
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if key not in PER_LEVEL:
            if items and all(item == items[0] for item in items):
                value = items[0]
            items = [value]
        if key in implemented:
            known = all(item in implemented[key] for item in items)
        elif key in defaults:
            known = all(is_number(item, key, defaults[key]) for item in items)
            known = known and len(items) <= MOST_LAYERS
        else:
            # Null, false and zero switch off a feature that we do not have.
            known = not value
        if not known:
            raise UserError(f"{name}: {key} = {show(value)} is not implemented")
        if key in defaults:
            completed[key] = value
    return completed


def show(value):
    """Put a value of a file into a message, without Python's notation of a JSON object."""
    return "an object" if isinstance(value, dict) else f"{value!r:.200}"


def is_number(value, key, default):
    """Whether a value is a number like the default, of a size that a network can have."""
    default = default[0] if isinstance(default, tuple) else default
    if value is None:
        # DDPM's files say by a null that attention has one head.
        return default is None or key == "attention_head_dim"
    kinds = (int, float) if isinstance(default, float) else int
    largest = MOST_LAYERS if "layers" in key else LARGEST_NUMBER
    # Python counts true and false as numbers; here they are values of switches only.
    if isinstance(value, bool) != isinstance(default, bool):
        return False
    return isinstance(value, kinds) and 0 <= value <= largest


def per_level(config, key, name="U-Net config"):
    """List the values of a key, one for each level of block_out_channels."""
    levels = len(config["block_out_channels"])
    value = config[key]
    values = list(value) if isinstance(value, (list, tuple)) else [value] * levels
    if len(values) != levels:
        raise UserError(f"{name}: {key} = {value!r} does not have one value for each of the "
                        f"{levels} levels of block_out_channels")
    return values


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

    def refuse(problem, name):
        raise UserError(f"{folder} {problem} {name}: these are not the weights of a "
                        f"{type(module).__name__} with this config")

    state = {}
    for file in weight_files(folder):
        # Each file is closed before the next is opened: mapped pages count as memory.
        with open_weights(file) as tensors:
            for key in tensors.keys():
                name = rename(key)
                if name is None:
                    continue
                # Name and shape are compared first, so what does not belong here is never read.
                if name not in expected:
                    refuse("has an unknown", name)
                if list(expected[name].shape) != tensors.get_slice(key).get_shape():
                    refuse("has another shape of", name)
                tensor = tensors.get_tensor(key)
                if tensor.is_floating_point() != expected[name].is_floating_point():
                    refuse("has another type of", name)
                state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if missing := expected.keys() - state.keys():
        refuse("lacks", min(missing))
    module.load_state_dict(state, assign=True)


def older_attention_names(key):
    """Turn the names that an attention's layers had before diffusers 0.17 into today's."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(attentions\.\d+\.)(\w+)(?=\.)", lambda m: m[1] + names.get(m[2], m[2]), key)


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
def writing(path, verb="written"):
    """Turn a failure to write in the block, such as a full disk, into a UserError naming `path`.

    A path that leads to no regular file is refused: a FIFO would wait for ever for a reader, and a
    device such as /dev/null, once replaced by a file, would be gone for everybody.
    """
    try:
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            raise OSError(errno.EINVAL, "it is no regular file")
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        # Inside a folder that `replacing` fills, the final place is named and not the passing one.
        place = re.sub(r"\.part-\d+/[^/]+", "", str(path))
        raise UserError(f"{place} cannot be {verb} ({reason})") from None


reading = functools.partial(writing, verb="read")


@contextlib.contextmanager
def replacing(path):
    """Yield a path to write a file or a folder to; it takes the place of `path` when all is done.

    The path lies in a folder NAME.part-PID beside its final place. safetensors' save_file writes a
    temporary file of its own, which a killed process leaves behind: it lands in that folder too,
    and the next writer removes the folders of processes that are gone.
    """
    # A link stays, and what it leads to is written.
    place = Path(os.path.realpath(path))
    part = place.parent / f"{place.name}.part-{os.getpid()}"
    beside = part / place.name
    try:
        with writing(path):
            place.parent.mkdir(parents=True, exist_ok=True)
            # A process that was killed could not remove its own folder.
            for old in place.parent.glob(f"{place.name}.part-*"):
                if not is_running(old.name.rpartition("-")[2]):
                    shutil.rmtree(old, ignore_errors=True)
            part.mkdir(exist_ok=True)
            yield beside
            if beside.is_file():
                # Without fsync, a power cut after the rename may leave an empty file.
                with open(beside, "rb+") as file:
                    os.fsync(file.fileno())
                # save_file makes a file that only its owner may read.
                beside.chmod(0o644)
            beside.replace(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path, text):
    with replacing(path) as beside:
        # A file name may hold bytes that are no text in UTF-8; they become question marks.
        beside.write_text(text, encoding="utf-8", errors="replace")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_png(path, picture, arguments=None):
    """Write a Pillow picture, with a command's arguments in its metadata if they are given."""
    info = PngInfo()
    if arguments is not None:
        # Beside the pixels, a PNG file holds texts; viewers show them and Pillow reads them back.
        info.add_text("arguments", json.dumps(arguments))
    with replacing(path) as beside:
        picture.save(beside, format="PNG", pnginfo=info)


def append_line(path, row):
    """Append a dict to a file that has one JSON object a line; no half of a line stays there."""
    line = (json.dumps(row) + "\n").encode()
    with writing(path), open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while line:
                line = line[file.write(line):]
        except OSError:
            # The disk may have taken the beginning of the line before it was full.
            file.truncate(size)
            raise


@contextlib.contextmanager
def lock(folder):
    """Hold a run folder for this process, and raise UserError where another process holds it.

    Two training runs into one folder would overwrite each other's checkpoints without a word. The
    operating system releases the lock when the process ends, even by SIGKILL, and the empty file
    `.lock` that stays behind holds nobody up. Under torchrun the first process holds it for all.
    """
    folder = Path(folder)
    if fcntl is None or not is_first():
        yield
        return
    # The file is never deleted: a process that has opened it could then lock a file that is gone.
    with writing(folder / ".lock"):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")
    with file:
        try:
            # lockf and not flock, whose locks the workers of a DataLoader inherit: they live on
            # for some seconds after their parent was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another process trains into {folder}; wait for its end, or choose "
                            "another folder with --out") from None
        except OSError:
            # Some network file systems have no locks. A run is not refused for that.
            pass
        yield


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
# Networks

class Network(torch.nn.Module):
    """A network that a model keeps in a folder of its own, as a config.json and weights.

    It is built from a config, and its `config` is the same with the defaults filled in.
    """
    class_names = ()    # what config.json may call it, the usual name first
    folder = ""         # where a model keeps it

    @staticmethod
    def rename(key):
        """Turn a parameter's name in a file into its name here, or into None to leave it out."""
        return key

    @classmethod
    def from_pretrained(cls, path_or_hub_id, subfolder=None, dtype=torch.float32):
        """Load a network from a model folder or from the hub, strictly.

        subfolder: by default where a model keeps it. With "" it lies at the top, by itself.
        dtype: of the parameters in memory.
        """
        folder = fetch(path_or_hub_id, cls.folder if subfolder is None else subfolder)
        config = read_json(folder / "config.json")
        name = config.get("_class_name", cls.class_names[0])
        if name not in cls.class_names:
            # One that a method has changed has another name: as a plain one it would draw nonsense.
            raise UserError(f"{folder} holds a {name}, not a {cls.class_names[0]}; "
                            "sample.load_model opens every kind of model")
        # On the meta device nothing is allocated or drawn at random before the weights come.
        with torch.device("meta"), blaming(folder / "config.json"):
            network = cls(config)
        load_weights(network, folder, cls.rename, dtype)
        return network

    def save_pretrained(self, folder, dtype=None):
        """Write weights and config.json into a folder, as diffusers does.

        dtype: of the tensors in the file; None keeps the type of the parameters.
        """
        config = {"_class_name": self.class_names[0], **self.config}
        save_weights(self, folder, config, dtype=dtype)


# -------------------------------------------------------------------------------------------------
# Checkpoints. What a step draws follows from (seed, step, index in the batch), so there is no
# state of random generators to save: a run that is killed goes on bit for bit.

ADVICE = "delete it to begin again"  # where a checkpoint cannot be read


def save_state(path, params, ema, optimizer, scalars):
    """Write weights, their average, Adam's moments and `scalars` (JSON) into one file."""
    tensors = {}
    for name, p in params.items():
        tensors[f"param/{name}"] = p.detach()
        tensors[f"ema/{name}"] = ema[name]
        # A parameter that has never had a gradient, such as an unused expert's, has no moments.
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"adam/{key}/{name}"] = value
    tensors = {key: value.contiguous().cpu() for key, value in tensors.items()}
    with replacing(path) as beside:
        save_file(tensors, beside,
                  metadata={"scalars": json.dumps(scalars), "tensors": str(len(tensors))})


def read_scalars(path):
    """The `scalars` that save_state wrote, without reading any tensor."""
    with open_weights(path, ADVICE) as file, blaming(f"{path} ({ADVICE})"):
        return json.loads(file.metadata()["scalars"])


def load_state(path, params, ema, optimizer):
    """Read what save_state wrote into params, ema and optimizer, in place."""
    with open_weights(path, ADVICE) as file, blaming(f"{path} ({ADVICE})"):
        keys = set(file.keys())
        places = {}
        for name, p in params.items():
            places |= {f"param/{name}": p.data, f"ema/{name}": ema[name]}
            if f"adam/step/{name}" in keys:
                # A fused Adam wants its count of steps on the device of the parameter too.
                optimizer.state[p] = dict(step=torch.zeros((), device=p.device),
                                          exp_avg=torch.zeros_like(p),
                                          exp_avg_sq=torch.zeros_like(p))
                places |= {f"adam/{key}/{name}": value
                           for key, value in optimizer.state[p].items()}
        # Files of earlier versions have no count.
        if keys != {*places} or file.metadata().get("tensors", str(len(keys))) != str(len(keys)):
            raise ValueError("tensors are missing or belong to something else")
        for key, place in places.items():
            tensor = file.get_tensor(key)
            same = tensor.shape == place.shape and tensor.dtype == place.dtype
            if not same or not tensor.isfinite().all():
                raise ValueError(f"{key} does not fit")
            # In place, since DDP and the optimizer hold these very tensors.
            place.copy_(tensor)
