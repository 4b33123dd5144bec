"""measures.py: each measure beside an independent computation, or the library called directly."""
import pickle
import re
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from skimage import metrics

import data
import emoji
import evaluate
import hub
import measures
from data import ASSETS
from hub import UserError

CPU = torch.device("cpu")


def pictures(count, seed=0, size=64):
    """Random pictures (count, 3, size, size), soft as real ones are, whose levels are 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    soft = F.interpolate(coarse, (size, size), mode="bilinear")
    return (soft * 255).round() / 127.5 - 1


def pairs(count, **extra):
    sources, targets = pictures(count, 1), pictures(count, 2)
    return [dict(source=source, target=target, prompt=f"red apple {i}", **extra)
            for i, (source, target) in enumerate(zip(sources, targets))]


@pytest.fixture
def torchvision(monkeypatch):
    """torchvision. Where it is missing, or built for another torch, what the libraries read of it.
    """
    try:
        import torchvision
        return torchvision
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]

    def alexnet(**options):
        layers = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
                  nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
                  nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
                  nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
                  nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)]
        return types.SimpleNamespace(features=nn.Sequential(*layers))

    def module(name, **entries):
        made = types.ModuleType(f"torchvision{name}")
        made.__path__ = []
        vars(made).update(entries)
        monkeypatch.setitem(sys.modules, made.__name__, made)
        return made
    functional = module(".transforms.functional")
    transforms = module(".transforms", functional=functional)
    models = module(".models", alexnet=alexnet)
    datasets = module(".datasets", **{name: type(name, (), {})
                                      for name in ("CIFAR10", "CIFAR100", "STL10")})
    return module("", transforms=transforms, models=models, datasets=datasets)


# -------------------------------------------------------------------------------------------------
# Formulas

@pytest.mark.parametrize("count, width", [(50, 6), (7, 12)])
def test_the_frechet_distance_is_the_textbooks(count, width):
    """Also where the covariances are singular, because there are fewer pictures than features."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + 1
    b = rng.normal(size=(count + 3, width))
    S_a, S_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(S_a @ S_b).astype(complex)).real.sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(S_a) + np.trace(S_b) - 2 * root
    assert measures.frechet_distance(*map(torch.from_numpy, (a, b))) == pytest.approx(expected)


def test_the_kernel_distance_is_the_mean_over_all_pairs_but_ones_own():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 4))

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3
    others = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = np.mean([kernel(a[i], a[j]) + kernel(b[i], b[j]) - 2 * kernel(a[i], b[j])
                        for i, j in others])
    assert measures.kernel_distance(*map(torch.from_numpy, (a, b))) == pytest.approx(expected)


def test_drawings_from_the_targets_own_distribution_have_no_kernel_distance():
    """On average, and however few they are; a Frechet distance is far from zero there."""
    sets = torch.randn(200, 2, 10, 4, generator=torch.Generator().manual_seed(0)).double()
    distances = np.array([measures.kernel_distance(a, b) for a, b in sets])
    assert abs(distances.mean()) < 3 * distances.std() / 200 ** 0.5
    assert np.mean([measures.frechet_distance(a, b) for a, b in sets]) > 1


def test_the_margin_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(0).normal(size=400)
    expected = 1.96 * values.std(ddof=1) / 20
    margin = evaluate.margin(lambda rows: values[rows].mean(), 400, 500)
    assert margin == pytest.approx(expected, rel=0.1)
    assert margin == evaluate.margin(lambda rows: values[rows].mean(), 400, 500)


# -------------------------------------------------------------------------------------------------
# Built in

def test_what_should_change_and_what_should_stay_are_judged_apart():
    source = pictures(1)[0]
    target = source.clone()
    target[:, :20] = -source[:, :20] + 0.5  # the upper part is to change
    example = dict(source=source, target=target, copy=target + 0.12)
    worse = target.clone()
    worse[:, 40:] += 0.2
    drawn = torch.stack([target, source, worse, 0.47 * source + 0.53 * target])
    judged = measures.Change().judge([example] * 4, drawn)
    assert judged["changed"] == [1, 0, 1, 1]
    right, untouched, spoilt, _ = judged["rest"]
    assert right == untouched == 100 and 15 < spoilt < 35
    assert judged["kept"] == [1, 1, 0, 1]
    # Where nothing, or everything, was to change, one of the two has no value.
    same = measures.Change().judge([example | dict(target=source)], source[None])
    assert same["changed"] == [None] and same["rest"] == [100]
    other = measures.Change().judge([example | dict(target=-1 - source.sign())], source[None])
    assert other["rest"] == other["kept"] == [None] and other["changed"] == [0]


def test_the_classifier_is_small_and_as_good_as_it_says():
    judge = measures.Emoji(CPU)
    path = ASSETS / "emoji/classifier.safetensors"
    assert path.stat().st_size < 400_000
    wanted = judge.record["accuracy"]
    assert min(wanted.values()) > 0.8 and {"tone", "gender", "category", "style"} == set(wanted)
    right = {question: [] for question in wanted}
    for row in emoji.rows_of("heldout")[::4]:
        for tone, cell in row.cells.items():
            for style in emoji.STYLES:
                answers = dict(category=row.category.lower(), style=style, gender=row.person)
                if len(row.cells) > 1 and "+" not in (tone or ""):
                    answers["tone"] = tone or "yellow"
                drawn = emoji.to_tensor(emoji.drawing(style, cell))[None]
                for question, values in judge.judge([dict(answers=answers)], drawn).items():
                    right.setdefault(question, []).extend(v for v in values if v is not None)
    for question, share in wanted.items():
        # A quarter of the concepts, of which there are 202, is a small sample.
        assert np.mean(right[question]) == pytest.approx(share, abs=0.15), question


def test_the_classifier_judges_only_what_was_asked():
    judge = measures.Emoji(CPU)
    dataset = data.builtin("edit", "heldout")
    examples = [evaluate.example_of(dataset, i) for i in evaluate.spread(40, len(dataset))]
    right = judge.judge(examples, measures.stack(examples, "target"))
    before = judge.judge(examples, measures.stack(examples, "source"))
    for question in ("tone", "gender"):
        asked = [example["kind"] == question for example in examples]
        assert [value is not None for value in right[question]] == asked
        values = [[v for v in judged[question] if v is not None] for judged in (right, before)]
        assert np.mean(values[0]) > 0.7 and np.mean(values[1]) < 0.3
    assert set(right["style"]) == {None}


# -------------------------------------------------------------------------------------------------
# The papers' measures, beside the libraries

@pytest.mark.slow
def test_inceptions_scores_are_torch_fidelitys(tmp_path, torchvision, monkeypatch):
    """Random weights on disk, and the library's own function on two sets of pictures."""
    fidelity = pytest.importorskip("torch_fidelity")
    kind = fidelity.FeatureExtractorInceptionV3
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        network = kind("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    # Fresh layers shrink what passes them, until all pictures look alike.
    state = {name: 2.5 * value if name.endswith("conv.weight") else value
             for name, value in network.state_dict().items()}
    torch.save(state, path)

    class Bytes(torch.utils.data.Dataset):
        def __init__(self, pictures):
            self.pictures = [torch.from_numpy(np.array(emoji.to_pil(picture))).permute(2, 0, 1)
                             for picture in pictures]

        def __len__(self):
            return len(self.pictures)

        def __getitem__(self, i):
            return self.pictures[i]
    sets = {"drawn": pictures(12, 3), "targets": pictures(12, 4)}
    expected = fidelity.calculate_metrics(
        input1=Bytes(sets["drawn"]), input2=Bytes(sets["targets"]), cuda=False, isc=True, kid=True,
        fid=True, prc=True, kid_subset_size=12, verbose=False, cache=False,
        feature_extractor="inception-v3-compat", feature_layer_prc="2048",
        feature_extractor_weights_path=str(path))
    judge = measures.Inception(CPU, path)
    scores = judge.compare(*map(judge.features, sets.values()))
    names = {"KID": "kernel_inception_distance_mean", "FID": "frechet_inception_distance",
             "Inception Score": "inception_score_mean", "precision": "precision",
             "recall": "recall"}
    for name, key in names.items():
        assert scores[name] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), name
    assert list(scores)[0] == "KID" and scores["FID"] > 0
    assert scores["Inception Score"] == pytest.approx(1, abs=0.5)


def test_lpips_is_the_librarys(tmp_path, torchvision):
    lpips = pytest.importorskip("lpips")
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    # torchvision's names: the layers are numbered through all of the slices.
    layers = {}
    for part in range(1, 6):
        layers |= dict(getattr(reference.net, f"slice{part}").named_children())
    state = {f"features.{number}.{name}": value for number, layer in layers.items()
             for name, value in layer.state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(3)}, tmp_path / "alexnet.pth")
    torch.manual_seed(1)  # the judge must not depend on the fresh weights that it begins with
    judge = measures.Perceptual(CPU, tmp_path / "alexnet.pth")
    examples = pairs(3)
    drawn = pictures(3, 5)
    with torch.no_grad():
        expected = [reference(a[None], b["target"][None]).item() for a, b in zip(drawn, examples)]
        assert judge.judge(examples, drawn)["LPIPS"] == pytest.approx(expected, rel=1e-4)
        assert judge.judge(examples, measures.stack(examples, "target"))["LPIPS"] == [0, 0, 0]
    assert min(expected) > 0 and judge.record["network"] == "LPIPS 0.1 on alex"
    assert judge.judge([dict(target=drawn[0], prompt="a hand")], drawn[:1]) == {}


def test_ssim_is_its_authors():
    """By hand at one place, and not with scikit-image's other defaults."""
    example = pairs(1)[0]
    drawn = pictures(1, 5)
    (value,) = measures.Similarity().judge([example], drawn)["SSIM"]
    a, b = (np.asarray(emoji.to_pil(picture)).astype(float) for picture in
            (drawn[0], example["target"]))
    _, everywhere = metrics.structural_similarity(
        a, b, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True)
    assert value == pytest.approx(everywhere[5:-5, 5:-5].mean(), rel=1e-6)
    x = np.arange(-5, 6)
    window = np.exp(-(x[:, None] ** 2 + x ** 2) / 4.5)
    window /= window.sum()
    a, b = a[20:31, 30:41, 1], b[20:31, 30:41, 1]
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
    covariance = (window * (a - mean_a) * (b - mean_b)).sum()
    c, d = 2.55 ** 2, 7.65 ** 2
    expected = ((2 * mean_a * mean_b + c) * (2 * covariance + d)
                / (mean_a ** 2 + mean_b ** 2 + c) / (var_a + var_b + d))
    assert everywhere[25, 35, 1] == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small CLIPModel of transformers with random weights, and the miniature's tokenizer."""
    from clip import BOS, EOS, Tokenizer
    tokenizer = Tokenizer.from_pretrained(ASSETS / "tiny")
    shared = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=4, projection_dim=16)
    text = dict(shared, vocab_size=len(tokenizer.vocab), max_position_embeddings=77,
                bos_token_id=tokenizer.vocab[BOS], eos_token_id=tokenizer.vocab[EOS])
    vision = dict(shared, image_size=48, patch_size=16)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    for p in model.parameters():
        # CLIP's first weights are so small that all texts are alike.
        p.data += 0.2 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


def embeddings(model, name, **inputs):
    """Unit vectors of transformers' model; its later versions return an object."""
    with torch.no_grad():
        out = getattr(model, f"get_{name}_features")(**inputs)
    return F.normalize(getattr(out, "pooler_output", out), dim=1)


def test_the_clip_score_is_that_of_transformers_model_and_processor(clip_folder):
    folder, model = clip_folder
    from transformers import CLIPImageProcessor
    processor = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=48)
    judge = measures.CLIP(CPU, folder)
    prompts = ["red apple, google style", "waving hand sign"]
    drawn = pictures(2, 5, size=64)
    pixels = processor([emoji.to_pil(picture) for picture in drawn], return_tensors="pt")
    texts = embeddings(model, "text", input_ids=judge.tokenizer(prompts))
    expected = 100 * (embeddings(model, "image", **pixels) * texts).sum(dim=1)
    with torch.no_grad():
        scores = judge.judge([dict(prompt=prompt, target=drawn[0]) for prompt in prompts], drawn)
    assert list(scores) == ["CLIP score"]
    assert scores["CLIP score"] == pytest.approx(expected.tolist(), abs=0.3)
    assert abs(expected[0] - expected[1]) > 1


def test_clip_directions_are_instruct_pix2pixs_and_mtus(clip_folder):
    """With the captions of both pictures; an example without has no image-text direction."""
    folder, model = clip_folder
    judge = measures.CLIP(CPU, folder)
    examples = pairs(3)
    captions = [["red apple", "green apple"], ["a cat", "a dog"], ["light skin", "dark skin"]]
    drawn = pictures(3, 5)

    def image(x):
        # The lines of InstructPix2Pix's metrics/clip_similarity.py.
        x = F.interpolate((x + 1) / 2, size=48, mode="bicubic", align_corners=False)
        x = x - torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
        x = x / torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
        return embeddings(model, "image", pixel_values=x)

    def text(column):
        ids = judge.tokenizer([pair[column] for pair in captions])
        return embeddings(model, "text", input_ids=ids)
    before = image(measures.stack(examples, "source"))
    right = image(measures.stack(examples, "target"))
    after = image(drawn)
    with torch.no_grad():
        some = judge.judge([dict(examples[0], captions=captions[0]), *examples[1:]], drawn)
        scores = judge.judge([dict(example, captions=pair)
                              for example, pair in zip(examples, captions)], drawn)
        own = judge.judge(examples, measures.stack(examples, "target"))
    for name, expected in {
            "CLIP image similarity": F.cosine_similarity(before, after),
            "CLIP image-image direction": F.cosine_similarity(after - before, right - before),
            "CLIP image-text direction": F.cosine_similarity(after - before, text(1) - text(0)),
            }.items():
        assert scores[name] == pytest.approx(expected.tolist(), abs=2e-3), name
    first, *others = some["CLIP image-text direction"]
    assert first == pytest.approx(scores["CLIP image-text direction"][0]) and others == [None] * 2
    assert own["CLIP image-image direction"] == pytest.approx([1, 1, 1], abs=1e-5)


def test_clip_comes_from_the_hub_too(clip_folder, tmp_path, monkeypatch):
    """By an id. Which files of a repository come is test_hub.py's."""
    folder, _ = clip_folder
    names = {path.name for path in folder.iterdir()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda hub_id, subfolder: (folder, names))
    local, remote = measures.CLIP(CPU, folder), measures.CLIP(CPU, "owner/clip")
    examples = pairs(2, captions=["red apple", "green apple"])
    drawn = pictures(2, 5)
    assert remote.record == local.record | dict(network="CLIP owner/clip")
    with torch.no_grad():
        assert remote.judge(examples, drawn) == local.judge(examples, drawn)


# -------------------------------------------------------------------------------------------------
# A user's mistakes

@pytest.mark.parametrize("kind, module, package", [
    (lambda: measures.Inception(CPU, "w.pth"), "torch_fidelity", "torch-fidelity"),
    (lambda: measures.Perceptual(CPU, "w.pth"), "lpips", "lpips"),
    (lambda: measures.Similarity(), "skimage.metrics", "scikit-image")])
def test_a_library_that_is_missing_is_named_with_its_command(kind, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        kind()


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("content", [None, b"", b"no weights", pickle.dumps(Evil(), protocol=2)],
                         ids=["missing", "empty", "text", "code"])
def test_a_file_without_weights_is_refused_and_runs_no_code(tmp_path, content, capsys):
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="holds no weights"):
        measures.read_tensors(path)
    assert "code ran" not in capsys.readouterr().out


def test_the_hash_of_a_network_is_that_of_its_files(tmp_path):
    for name, content in (("a", b"1"), ("b", b"2")):
        (tmp_path / name).write_bytes(content)
    hashes = [measures.identify("x", [tmp_path / name], "none")["sha256"] for name in "ab"]
    assert hashes[0] != hashes[1] and all(re.fullmatch("[0-9a-f]{16}", h) for h in hashes)
