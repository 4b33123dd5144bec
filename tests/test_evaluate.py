"""evaluate.py: what its figures count."""
import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
from conftest import called
from data import ASSETS
from sample import load_model


def test_a_picture_is_ranked_among_all():
    """On the pictures themselves every one is the nearest; moved by two, as many as really are nearer count."""
    pictures = torch.stack([data.to_tensor(data.on_white(data.Sheet.picture(style, e.cells[None])))
                            for e, style in data.builtin("t2i", "heldout").items[:40]])
    own = torch.arange(40)
    assert (evaluate.ranks(pictures, pictures, own) == 0).all()
    small = torch.nn.functional.interpolate(pictures, scale_factor=0.25, mode="area")
    expected = [sum(((small[i] - x) ** 2).sum() < ((small[i] - small[(i + 2) % 40]) ** 2).sum() for x in small) for i in range(40)]
    assert evaluate.ranks(pictures, pictures, (own + 2) % 40).tolist() == expected and max(expected) > 5


def test_what_draws_the_right_picture_is_recognised(monkeypatch):
    """A stand-in that draws each caption's own picture, and one that draws another's."""
    items = data.builtin("t2i", "heldout").items
    right = {data.caption(e, None, style): data.on_white(data.Sheet.picture(style, e.cells[None])) for e, style in items}
    monkeypatch.setattr(evaluate, "generate", lambda model, task, prompts, **options: [right[p] for p in prompts])
    found, shown = evaluate.recognised(None, 30, 0)
    assert found["nearest_1"] > 0.9 and found["nearest_10"] == 1 and found["of"] == len(items)  # a few are drawn alike
    assert all(np.array_equal(a, b) for a, b in shown)
    names = list(right)
    monkeypatch.setattr(evaluate, "generate", lambda model, task, prompts, **options: [right[names[names.index(p) - 7]] for p in prompts])
    assert evaluate.recognised(None, 30, 0)[0]["nearest_1"] < 0.1


@pytest.mark.parametrize("task, kinds", [("t2i", 2), ("edit", 3)])
def test_the_grid_shows_what_was_counted(tmp_path, task, kinds):
    done = called("evaluate.py", "--task", task, "--count", 13, "--steps", 1, "--grid", tmp_path / "a.png", "--out", tmp_path / "a.json")
    assert done.returncode == 0 and task in done.stdout, done.stderr
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (12 * 64, 2 * kinds * 64)
        last = np.asarray(picture.crop((0, (2 * kinds - 1) * 64, 64, 2 * kinds * 64)))
    items = data.builtin(task, "heldout")
    target = items.items[12 * len(items) // 13] if task == "t2i" else items[12 * len(items) // 13]["target"]
    target = data.on_white(data.Sheet.picture(target[1], target[0].cells[None])) if task == "t2i" else data.to_pil(target)
    assert np.array_equal(last, np.asarray(target))


@pytest.mark.parametrize("words, told", [(["--task", "colour"], "t2i"), (["--task", "edit", "--model", ASSETS / "tiny"], "edit"), (["--count", 0], "--count"),
                                         (["--grid", "a.png"], "--grid"), (["--task", "sr", "--grid", "a.txt"], "--grid")])
def test_a_mistake_is_one_line_and_exit_2(words, told):
    done = called("evaluate.py", *words)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_the_shares_of_a_task_are_of_its_examples():
    """The untouched source is as close as doing nothing, never closer."""
    model = load_model(ASSETS / "tiny-mtu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "generate", lambda model, task, prompts, sources, **options: sources)
        figures, shown = evaluate.measure(model, "edit", 4, 0)
    assert figures["all"]["closer"] == 0 and abs(figures["all"]["output"] - figures["all"]["nothing"]) < 1e-3 and len(shown) == 4
