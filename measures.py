"""What evaluate.py measures with: distances between sets of pictures, and judges of pictures.

    frechet_distance, kernel_distance            formulas, for the features of any network
    Pixels, Change, Nearest, Emoji               built in: pixels, and a classifier of emoji
    Inception, Perceptual, Similarity, CLIP      the papers' measures, by the field's libraries

A measure has a paper's name only where the paper's network computes it: a Frechet distance in the
features of the built-in classifier is called emoji-FD and not FID. The libraries are imported where
they are used, and their networks come from files that the user names. Nothing is downloaded
silently.

A judge has a `record`, which identifies it, and one or both of these pairs of methods:

    judge(examples, drawn)     score -> a value for each of B examples, None where there is none
    features(pictures)         (B, D), of which compare(drawn, targets) makes score -> value

Pictures are tensors (B, 3, H, W) in [-1, 1]. An example is a dict of a data set, to which
evaluate.py adds `number`, `answers`, `captions`, and `copy`, the autoencoder's of the target.
"""
import hashlib
import importlib
import json
import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from clip import CLIPText, CLIPVision, Tokenizer
from emoji import ASSETS, to_pil, to_tensor
from hub import UserError, blaming, fetch, open_weights, weight_files


def frechet_distance(a, b):
    """Compare the features (N, D) and (M, D) of two sets of pictures by FID's formula.

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 sqrt(S_a S_b))     (Heusel et al. 2017, arXiv 1706.08500)
    """
    # With S = R^T R, the trace of the root is the sum of the singular values of R_a R_b^T. Unlike
    # the root, they are exact also where there are fewer pictures than features.
    roots = [torch.linalg.qr((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b)]
    traces = sum(root.square().sum() for root in roots)
    overlap = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return ((a.mean(dim=0) - b.mean(dim=0)).square().sum() + traces - 2 * overlap).item()


def kernel_distance(a, b):
    """Compare the features (N, D) of N drawings with those of their N targets by KID's MMD^2.

    The kernel is (x.y / D + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401). The estimate has no
    bias, whatever N is, and may be just below zero.
    """
    def mean(x, y):
        k = (x @ y.T / x.shape[1] + 1) ** 3
        # No picture is compared with itself, and no drawing with its own target: they are alike,
        # which would say nothing about the sets.
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return (mean(a, a) + mean(b, b) - 2 * mean(a, b)).item()


def stack(examples, key):
    """One kind of picture of B examples -> (B, 3, H, W)."""
    return torch.stack([example[key] for example in examples])


def to_bytes(pictures):
    """Pictures in [-1, 1] -> 8 bits, in which the libraries want them."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()


def identify(network, files=(), resize="none"):
    """Identify a judge: its name, a hash of its files, and how it resizes pictures."""
    digest = hashlib.sha256()
    for path in files:
        with blaming(path), open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return dict(network=network, sha256=digest.hexdigest()[:16] if files else None, resize=resize)


# -------------------------------------------------------------------------------------------------
# Built in

def squared_error(a, b):
    """Mean squared error of two pictures, or parts of them, on the scale [0, 1]."""
    return (a.clamp(-1, 1) - b).square().mean().item() / 4


def decibels(error):
    """10 log10(1 / MSE). No error at all, where nothing had to change, counts as 100 dB."""
    return -10 * math.log10(max(error, 1e-10))


class Pixels:
    """PSNR, and whether a drawing is closer to the target than the source as it is."""
    record = identify("pixels")

    def judge(self, examples, drawn):
        scores = {"PSNR": [], "closer": []}
        for example, picture in zip(examples, drawn):
            error, nothing = (squared_error(each, example["target"])
                              for each in (picture, example["source"]))
            scores["PSNR"].append(decibels(error))
            # A mean of decibels is ruled by the best pictures; this share counts all alike. A sum's
            # last bits depend on where a picture lies in memory, and are no improvement.
            scores["closer"].append(float(error < 0.9999 * nothing))
        # Kinds of change differ much in how hard they are, so each has scores of its own.
        kinds = [example.get("kind", "") for example in examples]
        return scores | {
            f"{name}, {kind}": [value if own == kind else None for value, own in zip(values, kinds)]
            for kind in sorted(set(kinds) - {""}) for name, values in scores.items()}


class Change:
    """Whether the right part of a picture changed, and how far the rest is from the source."""
    SAME = 8 / 127.5  # JPEG and resampling change a picture by several grey levels everywhere
    record = identify("pixels")

    def judge(self, examples, drawn):
        """examples: with `copy`, the autoencoder's copy of the target."""
        scores = {"changed": [], "rest": [], "kept": []}
        for example, picture in zip(examples, drawn):
            source, target = example["source"], example["target"]
            same = (source - target).abs().amax(dim=0) <= self.SAME
            # A mean over no pixels is NaN, which is smaller than nothing.
            to_source, to_target = (squared_error(picture[:, ~same], each[:, ~same])
                                    for each in (source, target))
            rest, copy = (squared_error(each[:, same], source[:, same])
                          for each in (picture, example["copy"]))
            # Where all is to stay, or nothing is, there is nothing to measure.
            scores["changed"].append(None if same.all() else float(to_target < to_source))
            scores["rest"].append(decibels(rest) if same.any() else None)
            scores["kept"].append(float(rest <= copy) if same.any() else None)
        return scores


class Nearest:
    """Whether no picture is nearer to a drawing than its caption's own; of a class, one of it.

    The distance is the root of the squared error at 16 x 16 pixels, where colours and coarse shapes
    count and detail does not.
    """

    def __init__(self, dataset, candidates):
        """candidates: numbers of the pictures of a data set that a drawing is compared with."""
        self.of_class = dataset.task == "class"
        self.places = {number: place for place, number in enumerate(candidates)}
        # The pictures are made small one by one, since there may be thousands.
        self.prompts, pictures = zip(*(
            (example["prompt"], self.shrink(example["target"][None]))
            for example in map(dataset.__getitem__, candidates)))
        self.pictures = torch.cat(pictures)
        self.record = identify(f"nearest of {len(pictures)} pictures", resize="area, to 16")

    def shrink(self, pictures):
        """(B, 3, H, W) -> (B, 3 * 16 * 16)."""
        return F.adaptive_avg_pool2d(pictures, 16).flatten(1)

    def judge(self, examples, drawn):
        apart = torch.cdist(self.shrink(drawn), self.pictures)  # (B, candidates)
        own = torch.tensor([self.places[example["number"]] for example in examples])
        if self.of_class:
            asked = [example["prompt"] for example in examples]
            shown = [self.prompts[place] for place in apart.argmin(dim=1)]
            return {"same class": [float(a == b) for a, b in zip(asked, shown)]}
        # How many pictures are nearer to each drawing than its own.
        rank = (apart < apart.gather(1, own[:, None])).sum(dim=1)
        return {"nearest": (rank < 1).float().tolist(), "nearest 10": (rank < 10).float().tolist()}


class Classifier(nn.Module):
    """Answer questions about an emoji. experiments/train_emoji_classifier.py trains it.

    answers: question -> the possible answers, such as "tone" -> dark, light, ...
    """
    WIDTHS = (3, 24, 48, 96, 96)

    def __init__(self, answers):
        super().__init__()
        self.answers = answers
        layers = []
        for width_in, width in zip(self.WIDTHS, self.WIDTHS[1:]):
            # Each layer halves the picture, from 64 x 64 to 4 x 4.
            layers += [nn.Conv2d(width_in, width, 3, stride=2, padding=1),
                       nn.GroupNorm(8, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({question: nn.Linear(self.WIDTHS[-1], len(words))
                                    for question, words in answers.items()})

    def forward(self, pictures):
        """Pictures (B, 3, 64, 64) -> features (B, 96), and question -> logits (B, answers)."""
        features = self.layers(pictures).mean(dim=(2, 3))
        return features, {question: head(features) for question, head in self.heads.items()}


class Emoji:
    """Whether a drawing shows what it was asked to show; emoji-KD and emoji-FD."""

    def __init__(self, device, path=ASSETS / "emoji/classifier.safetensors"):
        with open_weights(path) as file, blaming(path):
            notes = {key: json.loads(text) for key, text in file.metadata().items()}
            self.network = Classifier(notes["answers"])
            # Half precision is enough for a file of weights, and too coarse to compute in.
            self.network.load_state_dict(
                {key: file.get_tensor(key).float() for key in file.keys()})
        self.network.to(device).eval()
        self.device = device
        # Its own mistakes limit every score that it gives, so its accuracy stands beside them.
        self.record = identify("emoji classifier", [path], "bicubic to 64 where it is not") | {
            "accuracy": notes.get("accuracy")}

    def run(self, pictures):
        if pictures.shape[2:] != (64, 64):
            pictures = F.interpolate(pictures, (64, 64), mode="bicubic", antialias=True)
        return self.network(pictures.to(self.device))

    def judge(self, examples, drawn):
        _, logits = self.run(drawn)
        scores = {}
        for question, rows in logits.items():
            right = [example["answers"].get(question) for example in examples]
            words = [self.network.answers[question][i] for i in rows.argmax(dim=1)]
            scores[question] = [None if answer is None else float(word == answer)
                                for word, answer in zip(words, right)]
        return scores

    def features(self, pictures):
        return self.run(pictures)[0].double().cpu()

    def compare(self, drawn, targets):
        return {"emoji-KD": kernel_distance(drawn, targets),
                "emoji-FD": frechet_distance(drawn, targets)}


# -------------------------------------------------------------------------------------------------
# The papers' measures

def library(name, package):
    """Import a library that only some measures need."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        # A torchvision that was built for another version of PyTorch raises RuntimeError.
        reason = str(error).splitlines()[0]
        raise UserError(f"this measure needs a library: pip install {package} ({reason})") from None


def read_tensors(path):
    """Read a .pth file, the form in which these networks are distributed, but run no code in it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The unpickler raises errors of any kind for files that are damaged or no tensors.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} holds no weights ({reason})") from None


class Inception:
    """KID, FID, Inception Score, precision and recall, by torch-fidelity.

    Precision and recall are in the same features, as in ADM's evaluator, which DiT and DTR use;
    Kynkaanniemi et al. 2019 and the library's default have VGG 16.
    path: the library's port of TensorFlow's network, weights-inception-2015-12-05-6726825d.pth.
    Another Inception, such as torchvision's, gives numbers that compare with no paper's.
    """

    def __init__(self, device, path):
        fidelity = library("torch_fidelity", "torch-fidelity")
        # The library unpickles whatever a file holds, so only tensors get that far.
        read_tensors(path)
        with blaming(path):
            network = fidelity.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"],
                feature_extractor_weights_path=str(path))
        self.network = network.to(device)
        self.device = device
        self.record = identify("Inception v3 of torch-fidelity", [path],
                               "bilinear to 299 as in TensorFlow 1")

    def features(self, pictures):
        # Pooled features and logits side by side, (B, 2048 + 1008).
        return torch.cat(self.network(to_bytes(pictures).to(self.device)), dim=1).cpu()

    def compare(self, drawn, targets):
        from torch_fidelity.metric_isc import isc_features_to_metric
        from torch_fidelity.metric_kid import kid_features_to_metric
        from torch_fidelity.metric_prc import prc_features_to_metric
        logits = drawn[:, 2048:]
        pair = drawn[:, :2048], targets[:, :2048]
        kid = kid_features_to_metric(*pair, verbose=False, kid_subset_size=min(1000, len(drawn)))
        overlap = prc_features_to_metric(*pair, verbose=False)
        score = isc_features_to_metric(logits)
        # The library's formula for FID takes the eigenvalues of a matrix that has thousands of
        # zeros among them when pictures are few. Ours agrees with it and needs a second.
        return {"KID": kid["kernel_inception_distance_mean"],
                "FID": frechet_distance(*(features.double() for features in pair)),
                "Inception Score": score["inception_score_mean"],
                "precision": overlap["precision"], "recall": overlap["recall"]}


class Perceptual:
    """LPIPS 0.1 (Zhang et al. 2018, arXiv 1801.03924), by lpips.

    path: torchvision's AlexNet, VGG 16 or SqueezeNet 1.1; the library brings its heads.
    """

    def __init__(self, device, path):
        lpips = library("lpips", "lpips")
        state = read_tensors(path)
        with blaming(path):
            net = "vgg" if "features.28.weight" in state else "alex"
            if any("squeeze" in name for name in state):
                net = "squeeze"
            # pnet_rand: the library would download the network otherwise.
            self.network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).to(device)
            # The library cuts torchvision's list of layers into slices, and keeps their numbers.
            self.network.net.load_state_dict({
                name: state[re.sub(r"slice\d+", "features", name)]
                for name in self.network.net.state_dict()})
        self.device = device
        self.record = identify(f"LPIPS 0.1 on {net}", [path])

    def judge(self, examples, drawn):
        if "source" not in examples[0]:
            return {}  # a caption has more right pictures than one
        targets = stack(examples, "target").to(self.device)
        return {"LPIPS": self.network(drawn.to(self.device), targets).flatten().tolist()}


class Similarity:
    """SSIM of its authors (Wang et al. 2004), by scikit-image, on RGB."""

    def __init__(self):
        self.ssim = library("skimage.metrics", "scikit-image").structural_similarity
        self.record = identify("none, a Gaussian window of sigma 1.5")

    def judge(self, examples, drawn):
        if "source" not in examples[0]:
            return {}  # a caption has more right pictures than one
        # scikit-image's own defaults are a uniform window of 7 x 7 and the sample covariance.
        options = dict(channel_axis=0, data_range=255, gaussian_weights=True, sigma=1.5,
                       use_sample_covariance=False)
        pairs = zip(to_bytes(drawn).numpy(), to_bytes(stack(examples, "target")).numpy())
        return {"SSIM": [float(self.ssim(a, b, **options)) for a, b in pairs]}


class CLIP:
    """CLIP scores, with a folder or hub id of a whole CLIPModel.

    InstructPix2Pix takes openai/clip-vit-large-patch14; MTU does not name its own.
    """
    MEAN = (0.48145466, 0.4578275, 0.40821073)
    STD = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, device, path):
        self.tokenizer = Tokenizer.from_pretrained(path, "")
        self.text = CLIPText.from_pretrained(path, "").to(device)
        self.vision = CLIPVision.from_pretrained(path, "").to(device)
        self.device = device
        self.size = self.vision.config["image_size"]
        self.record = identify(
            f"CLIP {path}", weight_files(fetch(path, "")), f"bicubic to {self.size}, for "
            "directions as InstructPix2Pix not antialiased, for the CLIP score antialiased")

    def embed_pictures(self, pictures, antialias=False):
        """Pictures (B, 3, H, W) -> unit vectors (B, D)."""
        size = (self.size, self.size)
        if antialias:
            pictures = torch.stack([to_tensor(to_pil(picture).resize(size, Image.BICUBIC))
                                    for picture in pictures])
        else:
            pictures = F.interpolate(pictures, size, mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.MEAN, self.STD))
        pixels = ((pictures + 1) / 2 - mean) / std
        return F.normalize(self.vision(pixels.to(self.device))[1], dim=1).cpu()

    def embed_texts(self, texts):
        """B texts, cut off after 77 tokens -> unit vectors (B, D)."""
        return F.normalize(self.text(self.tokenizer(texts).to(self.device))[2], dim=1).cpu()

    def judge(self, examples, drawn):
        if "source" not in examples[0]:
            texts = self.embed_texts([example["prompt"] for example in examples])
            # torchmetrics' scale. Hessel et al. 2021 print 2.5 times the cosine.
            score = 100 * (self.embed_pictures(drawn, antialias=True) * texts).sum(dim=1)
            return {"CLIP score": score.tolist()}
        before, after, right = map(self.embed_pictures, (
            stack(examples, "source"), drawn, stack(examples, "target")))
        moved = after - before
        scores = {"CLIP image similarity": (before * after).sum(dim=1),
                  # MTU: the true change of the picture, beside the one that was drawn.
                  "CLIP image-image direction": F.cosine_similarity(moved, right - before)}
        captions = [example.get("captions") for example in examples]
        # InstructPix2Pix: of the captions of both pictures, and not of the instruction.
        old, new = (self.embed_texts(list(texts))
                    for texts in zip(*(pair or ("", "") for pair in captions)))
        directions = F.cosine_similarity(moved, new - old)
        scores = {name: values.tolist() for name, values in scores.items()}
        return scores | {"CLIP image-text direction": [
            value if pair else None for value, pair in zip(directions.tolist(), captions)]}
