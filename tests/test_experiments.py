"""The scripts in experiments/: what they run, what they compare, and what they report."""
import contextlib
import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import gradients
import plot
from conftest import ROOT
from hub import UserError, command
from sample import load_model

TINY = "--task uncond --model scratch --unet ddpm-tiny --batch-size 2"


def call(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.main()


@pytest.fixture
def in_one_process(monkeypatch):
    """Run the scripts' child processes here, one after another."""
    def run(words, stdout, **options):
        before = sys.argv
        script = next(number for number, word in enumerate(words) if word.endswith(".py"))
        sys.argv = words[script:]
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
                command(importlib.import_module(Path(words[script]).stem).main)
        except SystemExit as end:
            return SimpleNamespace(returncode=end.code)
        finally:
            sys.argv = before
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(common.subprocess, "run", run)


# -------------------------------------------------------------------------------------------------
# common.py

def test_a_run_that_fails_is_named(in_one_process, tmp_path):
    with pytest.raises(UserError, match="bad-0.txt: error: .*--lr: -1 is not"):
        common.train([*shlex.split(TINY), "--steps", "6", "--lr", "-1"], tmp_path / "bad-0")


# -------------------------------------------------------------------------------------------------
# gradients.py

def test_cosines_of_gradients_are_those_of_two_disjoint_halves():
    model = load_model(data.ASSETS / "tiny")
    cosines = gradients.cosines(model, count=2, levels=2, batch_size=1)
    dataset = data.builtin("t2i", "train")
    found = []
    for half, t in ((0, 250), (1, 750), (0, 750), (1, 250)):
        generator = torch.Generator().manual_seed(half)
        noise, latent_noise = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
        examples = [dataset[(2 * k + half) * len(dataset) // 4] for k in range(2)]
        mean, logvar = model.vae.encode(torch.stack([e["target"] for e in examples]))
        x0 = (mean + (0.5 * logvar).exp() * latent_noise) * model.vae.config["scaling_factor"]
        t = torch.full((2,), t)
        context, _ = model.encode_text([e["prompt"] for e in examples])
        out = model.unet(model.diffusion.add_noise(x0.detach(), noise, t), t, context)
        a = model.diffusion.alpha_bar[t].view(2, 1, 1, 1)
        v = a.sqrt() * noise - (1 - a).sqrt() * x0.detach()
        model.unet.zero_grad()
        (out - v).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.unet.parameters()]))

    def cosine(i, j):
        return torch.cosine_similarity(found[i], found[j], dim=0).item()

    assert abs(cosines[0, 1] - (cosine(0, 1) + cosine(2, 3)) / 2) < 1e-3
    assert abs(cosines[0, 0] - cosine(0, 3)) < 1e-3
    assert cosines.shape == (2, 2)
    assert np.allclose(cosines, cosines.T)
    other = gradients.cosines(model, count=2, levels=2, batch_size=2)
    assert np.allclose(cosines, other, atol=1e-3)


def test_the_heatmap_is_blue_where_gradients_agree_and_red_where_they_do_not(tmp_path):
    gradients.draw(np.array([[1.0, -1.0], [-1.0, 1.0]]), 1000, tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    top_left = pixels[height // 4, width // 4]
    bottom_left = pixels[3 * height // 4, width // 4]
    assert top_left[2] > top_left[0] + 50
    assert bottom_left[0] > bottom_left[2] + 50


# -------------------------------------------------------------------------------------------------
# plot.py

@pytest.fixture
def run_folder(tmp_path):
    lines = [dict(step=step, loss=dict(edit=1 / step, sr=2.0),
                  loss_by_t=dict(edit=[1.0, None, 2.0, 3.0])) for step in (10, 20, 30)]
    lines.append(dict(step=30, held_out=dict(edit=0.5), held_out_by_t=dict(edit=[1, 2, 3, 4])))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    # Lines of somebody's own, and one that a killed run left behind.
    text += '[1]\nnote\n{"step": 40, "loss": {"edit": "low"}}\n{"loss": {"edit": 1}}\n{"step": 50'
    (tmp_path / "log.jsonl").write_text(text)
    return tmp_path


def test_a_log_is_read_past_lines_of_somebodys_own(run_folder):
    curves = plot.read_curves(run_folder, "loss")
    steps, losses = curves["edit"]
    assert steps.tolist() == [10, 20, 30, 40]
    assert np.allclose(losses[:3, 0], [1 / 10, 1 / 20, 1 / 30])
    assert np.isnan(losses[3]).all()
    assert np.array_equal(losses[0, 1:], [1.0, np.nan, 2.0, 3.0], equal_nan=True)
    assert np.isnan(curves["sr"][1][:, 1:]).all()
    assert plot.read_curves(run_folder, "held_out")["edit"][1].tolist() == [[0.5, 1, 2, 3, 4]]


def test_the_running_mean_leaves_out_what_is_missing():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    assert plot.smoothed(values, 2).tolist() == [1.0, 1.0, 3.0, 4.0]
    assert plot.smoothed(values, 1)[3] == 5.0


@pytest.mark.parametrize("options", [[], ["--by-t"], ["--held-out", "--by-t"]])
def test_curves_of_several_runs_are_drawn(run_folder, options, monkeypatch, capsys):
    out = run_folder / "curves.png"
    call(monkeypatch, plot, run_folder, run_folder, *options, "--out", out)
    assert Image.open(out).format == "PNG"
    assert "edit" in capsys.readouterr().out


def test_a_run_without_the_curve_is_named(run_folder, monkeypatch):
    (run_folder / "log.jsonl").write_text('{"step": 1, "loss": {"edit": 1.0}}')
    with pytest.raises(UserError, match="--eval-every"):
        call(monkeypatch, plot, run_folder, "--held-out")
    with pytest.raises(UserError, match="no .*log.jsonl"):
        call(monkeypatch, plot, run_folder / "nowhere")


def test_help_needs_none_of_the_packages_that_only_experiments_use():
    for path in (ROOT / "experiments").glob("*.py"):
        packages = r"^(import|from) (matplotlib|diffusers|transformers)"
        assert not re.search(packages, path.read_text(), re.M), path.name
