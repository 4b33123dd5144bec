"""The built-in data: what is held out, what pairs with what, and what an example holds."""
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import emoji
from emoji import STYLES, Builtin, load, patched, to_pil, to_tensor

SOURCES = ("edit", "sr", "inpaint")
OTHERS = ("translate", "masked", "label", "repr")


def rng(seed):
    return np.random.default_rng(seed)


def shown(style, cell):
    return to_tensor(emoji.drawing(style, cell))


def test_every_emoji_is_drawn_in_both_styles():
    assert len(load()) == 1911
    assert sum(len(e.cells) for e in load()) == 3786
    for style in STYLES:
        assert all(emoji.sheet_picture(style, e.cells[None]).getbbox() for e in load())


def test_whole_concepts_are_held_out_whose_nouns_occur_in_training():
    """Tones, genders, colours and styles of a thing share a concept, which is on one side."""
    train, heldout = (emoji.rows_of(split) for split in ("train", "heldout"))
    concepts = {e.concept for e in train}
    assert concepts.isdisjoint(e.concept for e in heldout)
    assert 0.07 < len({e.concept for e in heldout}) / len({e.concept for e in load()}) < 0.13
    nouns = {e.noun for e in train}
    assert nouns.issuperset(e.noun for e in heldout)
    assert len(nouns) > 25
    assert None in nouns
    concept = {e.name: e.concept for e in load()}
    assert concept["man cook"] == concept["woman cook"] == concept["cook"]
    assert concept["blue heart"] == concept["green heart"] == concept["heavy black heart"]
    assert concept["blue heart"] != concept["large blue circle"]
    assert concept["dog face"] != concept["cat face"]


def test_the_table_and_its_captions_never_change():
    table = [(*e, emoji.caption(e, tone, "google")) for e in load() for tone in e.cells]
    assert zlib.crc32(repr(table).encode()) == 148044053


# The shipped weights have seen these: for each task a checksum of all words, the mean of pixels.
@pytest.mark.parametrize("task, words, mean", [
    ("t2i", 113863855, 0.53182), ("uncond", 2328611490, 0.47932), ("edit", 3484996580, 0.50950),
    ("sr", 2328611490, 0.45740), ("inpaint", 119814851, 0.83281),
    ("translate", 2328611490, 0.49181), ("masked", 2328611490, 0.44043),
    ("label", 3336236271, 0.47932), ("repr", 4062418990, 0.47932),
    ("class", 2827253252, 0.47932)])
def test_examples_never_change(task, words, mean):
    dataset = Builtin(task, "train")
    text = []
    pictures = []
    for i in range(0, len(dataset), len(dataset) // 40):
        example = dataset[i]
        assert ("source" in example, "x" in example) == (task in SOURCES, task in OTHERS)
        assert (example["prompt"] == "") == (task not in ("t2i", "edit", "inpaint", "class"))
        assert task not in SOURCES or not torch.equal(example["source"], example["target"])
        for key, value in sorted(example.items()):
            (pictures if torch.is_tensor(value) else text).append(value)
    pictures = torch.stack(pictures)
    assert zlib.crc32(repr(text).encode()) == words
    assert pictures.mean().item() == pytest.approx(mean, abs=1e-4)
    assert pictures.shape[1:] == (3, 64, 64)
    assert pictures.abs().max() <= 1
    small = Builtin(task, "heldout", size=32)
    side = 64 if task in ("t2i", *SOURCES) else 32
    assert small[0]["target"].shape == (3, side, side)
    assert all(torch.equal(small[i]["target"], small[i]["target"]) for i in range(20))


def test_edit_pairs_are_genuine():
    """Both pictures show one thing in one style; the instruction names what the target has."""
    dataset = Builtin("edit", "train")
    assert {change.kind for change in dataset.items} == {"tone", "gender", "colour"}
    cells = {tuple(cell): (e, tone) for e in load() for tone, cell in e.cells.items()}
    for i in range(0, len(dataset), 37):
        change = dataset.items[i]
        e, tone = cells[tuple(change.source)]
        f, new_tone = cells[tuple(change.target)]
        words = dict(tone=(tone or "yellow", new_tone or "yellow"), gender=(e.person, f.person),
                     colour=(e.colour, f.colour))
        assert words[change.kind] == (change.a, change.b)
        assert change.a != change.b
        assert (e.concept, e.name) == (f.concept, change.name)
        assert e is f if change.kind == "tone" else tone == new_tone
        assert change.b in dataset[i]["prompt"]


def test_training_edits_are_mirrored_half_of_the_time_and_held_out_ones_never():
    for split, counts in (("train", range(20, 61)), ("heldout", range(1))):
        dataset = Builtin("edit", split)
        plain = shown(dataset.items[0].style, dataset.items[0].source)
        sources = [dataset.get(0, rng(seed))["source"] for seed in range(80)]
        mirrored = sum(torch.equal(source, plain.flip(-1)) for source in sources)
        assert mirrored in counts
        assert sum(torch.equal(source, plain) for source in sources) == 80 - mirrored


def test_inpaint_target_lacks_the_object_and_keeps_the_other():
    dataset = Builtin("inpaint", "train")
    kinds = []
    for i in range(0, len(dataset), 131):
        e, _ = dataset.items[i]
        example = dataset[i]
        changed = (example["source"] != example["target"]).any(0).nonzero().float()
        assert len(changed) > 0
        assert example["target"].min() < 1
        thing = e.noun if example["kind"] == "classed" else e.name
        start, _, place = example["prompt"].partition(f"remove the {thing}")
        assert start == ""
        if place:
            side = place.split()[-1]
            middle = changed.mean(0)[int(side in ("left", "right"))]
            assert (middle < 31.5) == (side in ("left", "top"))
        kinds.append((example["kind"], place != ""))
    assert set(kinds) == {("named", False), ("classed", False), ("placed", True)}
    assert kinds.count(("placed", True)) > 5


def test_the_second_thing_on_a_canvas_goes_by_other_words():
    dataset = Builtin("inpaint", "train")
    for i in range(50):
        e, _ = dataset.items[31 * i]
        other = dataset.other(e, rng(i))
        assert other.concept != e.concept
        assert other.noun is None or other.noun != e.noun


def test_some_captions_place_two_things():
    """A half is white where its thing was removed, and nowhere else."""
    dataset = Builtin("t2i", "train")
    nouns = {e.name: e.noun for e in dataset.rows}
    scenes = 0
    for example in (dataset[i] for i in range(400)):
        words, _, gone = example["prompt"].rpartition(", ")[0].partition(", remove the ")
        for first, second, dim in ((" on the left", " on the right", 2),
                                   (" at the top", " at the bottom", 1)):
            if f"{first} and " in words:
                scenes += 1
                gone = gone.removesuffix(first).removesuffix(second)
                names = words.removesuffix(second).split(f"{first} and ")
                for name, half in zip(names, example["target"].chunk(2, dim=dim)):
                    assert bool(half.min() > 0.99) == (gone in (name, nouns[name]))
    assert 50 < scenes < 110


def test_some_captions_describe_the_result_of_an_edit():
    dataset = Builtin("t2i", "train")
    results = {f"{c.name}, make the skin tone {c.b}, {c.style} style": c for c in dataset.changes}
    examples = [dataset[i] for i in range(800)]
    found = [example for example in examples if example["prompt"] in results]
    assert len(found) > 10
    for example in found:
        change = results[example["prompt"]]
        assert torch.equal(example["target"], shown(change.style, change.target))


def test_degrading_halves_the_resolution_and_is_reproducible():
    picture = to_pil(Builtin("plain", "train")[5]["target"])
    a, b, c = (emoji.degrade(picture, rng(seed)) for seed in (0, 0, 1))
    assert a.size == picture.size
    assert a == b != c
    spectrum = np.abs(np.fft.fft2(np.asarray(a.convert("L"), dtype=float)))
    assert spectrum[24:40].mean() < 0.1 * spectrum[:8].mean()


@pytest.mark.parametrize("shape", [0, 1, 2])
def test_real_esrgans_kernels(monkeypatch, shape):
    """Gaussians, generalised ones and plateaus, by their formulas; none moves or dims a picture."""
    monkeypatch.setattr(emoji, "KERNELS", np.eye(6)[2 * shape])
    seen = []
    for seed in range(300):
        kernel = emoji.blur_kernel(rng(seed), (2.0, 2.0))
        side = len(kernel)
        assert kernel.sum() == pytest.approx(1)
        assert np.allclose(kernel, kernel[::-1]) and np.allclose(kernel, kernel.T)
        seen.append((side, kernel[side // 2, side // 2 + 2] / kernel.max()))
    assert {side for side, _ in seen} == set(range(7, 22, 2))
    # At a distance of one standard deviation, r^2 = 1, the exponent does not matter. The remaining
    # kernels are sinc filters.
    value = 0.5 if shape == 2 else np.exp(-0.5)
    share = np.mean([abs(ratio - value) < 1e-6 for _, ratio in seen])
    assert 0.84 < share < 0.96


def test_an_anisotropic_kernel_has_the_covariance_of_its_ellipse(monkeypatch):
    monkeypatch.setattr(emoji, "KERNELS", np.eye(6)[1])
    x, y = np.meshgrid(range(-10, 11), range(-10, 11))
    for seed in range(60):
        kernel = emoji.blur_kernel(rng(seed), (0.8, 2.0))
        if len(kernel) == 21 and (kernel >= 0).all():
            variances = np.linalg.eigvalsh([[(kernel * x * x).sum(), (kernel * x * y).sum()],
                                            [(kernel * x * y).sum(), (kernel * y * y).sum()]])
            assert 0.6 < np.sqrt(variances[0]) <= np.sqrt(variances[1]) < 2.05
            assert variances[1] > 1.01 * variances[0]


def test_a_sinc_kernel_passes_what_is_below_its_cutoff():
    """Known values: J1(x) / x at zero, and the response on either side of the cutoff."""
    for seed in range(40):
        kernel = emoji.sinc_kernel(rng(seed), final=True)
        assert kernel.sum() == pytest.approx(1) and np.allclose(kernel, kernel.T)
        if len(kernel) == 21:
            radius = rng(seed)
            radius.integers(3, 11)
            cutoff = radius.uniform(np.pi / 3, np.pi)
            spectrum = np.abs(np.fft.fft2(kernel, (256, 256)))[0]
            inside = int(256 * (cutoff - 0.5) / (2 * np.pi))
            assert np.allclose(spectrum[:inside], 1, atol=0.2)
            if cutoff < 2.4:
                outside = int(256 * (cutoff + 0.5) / (2 * np.pi))
                assert spectrum[outside:128].max() < 0.2


def test_convolving_is_a_correlation_with_mirrored_borders():
    x = torch.from_numpy(rng(0).random((3, 12, 10))).float()
    kernel = rng(1).random((5, 5))
    padded = np.pad(x.numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
    expected = sum(kernel[i, j] * padded[:, i:i + 12, j:j + 10] for i in range(5) for j in range(5))
    assert np.allclose(emoji.convolve(x, kernel), expected, atol=1e-5)
    one = np.zeros((21, 21))
    one[10, 10] = 1
    assert torch.allclose(emoji.convolve(x, one), x)  # larger than the picture


def test_noise_has_the_published_strength():
    stage = emoji.STAGES[0]
    grey = torch.full((3, 64, 64), 0.5)
    grey[:, 0] = torch.linspace(0, 1, 64)  # so that shot noise has 64 levels to count
    gaussian, poisson, same = [], [], 0
    for seed in range(200):
        noise = emoji.add_noise(grey, rng(seed), stage)[:, 1:] - 0.5
        same += torch.equal(noise[0], noise[1])
        (gaussian if rng(seed).random() < 0.5 else poisson).append(noise.std().item())
    assert 1 / 255 < min(gaussian) < 4 / 255 and 24 / 255 < max(gaussian) < 31 / 255
    # 65 levels count as 128 photons, whose share at a half has a deviation of sqrt(0.5 / 128).
    assert 0 < min(poisson) < 0.03 and 0.17 < max(poisson) < 3 * (0.5 / 128) ** 0.5
    assert 55 < same < 105


def test_degrading_twice_is_reproducible_and_stronger_than_once():
    picture = to_pil(Builtin("plain", "train")[5]["target"]).resize((96, 80))
    a, b, c = (emoji.degrade_twice(picture, rng(seed)) for seed in (0, 0, 1))
    assert a.size == picture.size
    assert a == b != c

    def error(degraded):
        return np.square(np.asarray(degraded, float) - np.asarray(picture, float)).mean() ** 0.5
    once, twice = (np.median([error(degrade(picture, rng(seed))) for seed in range(30)])
                   for degrade in (emoji.DEGRADATIONS["simple"], emoji.DEGRADATIONS["real-esrgan"]))
    assert once < twice < 100
    tiny = picture.resize((16, 16))
    assert all(emoji.degrade_twice(tiny, rng(seed)).size == (16, 16) for seed in range(20))


def test_pictures_survive_the_tensor():
    picture = Image.fromarray(rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert emoji.to_pil(to_tensor(picture)) == picture


def test_patches_are_squares_of_zeros_and_no_other_pixel_is_zero():
    picture = Builtin("masked", "heldout")[7]["target"]
    assert (picture != 0).all()
    one = patched(picture, rng(0), patches=1)
    rows, columns = np.nonzero((one == 0).all(0).numpy())
    assert len(rows) == 64
    assert np.ptp(rows) == np.ptp(columns) == 7
    assert torch.equal(one[one != 0], picture[one != 0])
    # On a long strip a patch is a single pixel, and hardly two of them meet.
    strip = torch.ones(1, 8, 10_000)
    counts = {int((patched(strip, rng(seed)) == 0).sum()) for seed in range(200)}
    assert counts == set(range(5, 21))


def test_translate_pairs_the_styles_of_one_emoji_in_one_tone():
    dataset = Builtin("translate", "train")
    i, e = next((i, e) for i, e in enumerate(dataset.rows) if len(e.cells) > 3)
    for seed in range(4):
        example = dataset.get(i, rng(seed))
        cell = e.cells[emoji.draw_tone(e, rng(seed))]
        assert torch.equal(example["x"], shown("google", cell))
        assert torch.equal(example["target"], shown("twitter", cell))


def test_the_category_is_the_prompt_of_class_and_its_number_is_x_of_label():
    prompts, numbers = (Builtin(task, "heldout") for task in ("class", "label"))
    assert len(emoji.classes()) == 10
    for i in range(0, len(prompts), 37):
        category = prompts.items[i][0].category.lower()
        assert prompts[i]["prompt"] == emoji.classes()[numbers[i]["x"]] == category
