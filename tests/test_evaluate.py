"""evaluate.py: what its figures count."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import emoji
import evaluate
from conftest import call
from data import ASSETS
from sample import load_model


def test_a_picture_is_ranked_among_all():
    """On the pictures themselves each is nearest to itself; elsewhere the nearer ones count."""
    _, pictures = emoji.plain("heldout")
    pictures = torch.stack([data.to_tensor(picture) for picture in pictures[:40]])
    own = torch.arange(40)
    assert (evaluate.rank_own(pictures, pictures, own) == 0).all()
    small = torch.nn.functional.interpolate(pictures, scale_factor=0.25, mode="area")

    def distance(i, j):
        return ((small[i] - small[j]) ** 2).sum()

    other = (own + 2) % 40
    expected = [sum(int(distance(i, j) < distance(i, other[i])) for j in range(40))
                for i in range(40)]
    assert evaluate.rank_own(pictures, pictures, other).tolist() == expected
    assert max(expected) > 5


def test_a_model_that_draws_the_right_picture_is_recognised(monkeypatch):
    """A stand-in that draws each caption's own picture, and one that draws another's."""
    captions, pictures = emoji.plain("heldout")

    def drawing(shift):
        def generate(model, task, prompts, **options):
            return [pictures[captions.index(prompt) - shift] for prompt in prompts]
        return generate
    monkeypatch.setattr(evaluate, "generate", drawing(0))
    figures, shown = evaluate.measure_captions(None, 30, 0)
    assert figures["nearest_1"] > 0.9 and figures["nearest_10"] == 1  # a few are drawn alike
    assert figures["of"] == len(captions)
    assert all(np.array_equal(drawn, own) for drawn, own in shown)
    monkeypatch.setattr(evaluate, "generate", drawing(7))
    assert evaluate.measure_captions(None, 30, 0)[0]["nearest_1"] < 0.1


def test_a_model_that_draws_the_right_class_is_recognised(monkeypatch):
    """A stand-in that draws some picture of each class, and one that draws another class."""
    dataset = data.builtin("class", "heldout", 16)
    of_class = {}
    for example in dataset:
        of_class.setdefault(example["prompt"], data.to_pil(example["target"]))
    names = list(of_class)

    def drawing(shift):
        def generate(model, task, prompts, **options):
            return [of_class[names[names.index(prompt) - shift]] for prompt in prompts]
        return generate
    model = SimpleNamespace(native_size=16)
    monkeypatch.setattr(evaluate, "generate", drawing(0))
    figures, shown = evaluate.measure_classes(model, 30, 0)
    assert figures == dict(count=30, of=len(dataset), same_class=1.0)
    assert all(np.array_equal(drawn, nearest) for drawn, nearest in shown)
    monkeypatch.setattr(evaluate, "generate", drawing(1))
    assert evaluate.measure_classes(model, 30, 0)[0]["same_class"] == 0


def test_the_untouched_source_is_never_closer_than_itself(monkeypatch):
    def unchanged(model, task, prompts, sources, **options):
        return sources
    monkeypatch.setattr(evaluate, "generate", unchanged)
    rows, shown = evaluate.measure_edits(load_model(ASSETS / "tiny-mtu"), "edit", 4, 0)
    figures = evaluate.summary(rows)
    assert figures["closer"] == 0 and abs(figures["output"] - figures["nothing"]) < 1e-3
    assert len(shown) == 4


@pytest.mark.parametrize("task, kinds", [("t2i", 2), ("edit", 3)])
def test_the_grid_shows_what_was_counted(tmp_path, task, kinds):
    done = call("evaluate.py", "--task", task, "--count", 13, "--steps", 1,
                "--grid", tmp_path / "a.png", "--out", tmp_path / "a.json")
    assert done.returncode == 0 and task in done.stdout, done.stderr
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (12 * 64, 2 * kinds * 64)
        last = np.asarray(picture.crop((0, (2 * kinds - 1) * 64, 64, 2 * kinds * 64)))
    if task == "t2i":
        _, pictures = emoji.plain("heldout")
        target = pictures[12 * len(pictures) // 13]
    else:
        dataset = data.builtin(task, "heldout")
        target = data.to_pil(dataset[12 * len(dataset) // 13]["target"])
    assert np.array_equal(last, np.asarray(target))


@pytest.mark.parametrize("arguments, words", [
    (["--task", "colour"], "t2i"),
    (["--task", "edit", "--model", ASSETS / "tiny"], "edit"),
    (["--count", 0], "--count"),
    (["--grid", "a.png"], "--grid"),
    (["--task", "sr", "--grid", "a.txt"], "--grid")])
def test_a_mistake_is_one_line_and_exit_2(arguments, words):
    done = call("evaluate.py", *arguments)
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
