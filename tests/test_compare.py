"""The comparison of arms: what it runs and what it reports."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import compare
import data
import joint
from conftest import in_one_process
from folders import UserError
from sample import load_model

TINY = "--task uncond --model scratch --unet ddpm-tiny --batch-size 2"


@pytest.fixture
def arms(monkeypatch):
    monkeypatch.setitem(compare.ARMS, "dtr", {"plain": TINY, "routed": TINY + " --routing dtr"})


def call(monkeypatch, *args, what="dtr"):
    in_one_process(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["compare.py", what, "--eval-size", "4", *map(str, args)])
    compare.main()


def test_a_comparison_from_runs_to_table_and_curve(arms, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "--steps", 6, "--seeds", 2, "--out", tmp_path / "c")
    table = json.loads((tmp_path / "c" / "table.json").read_text())
    for arm in ("plain", "routed"):
        for seed in range(2):
            rows = [json.loads(line) for line in (tmp_path / "c" / f"{arm}-{seed}" / "log.jsonl").read_text().splitlines()]
            last = [row for row in rows if "held_out" in row][-1]
            assert last["step"] == 6 and table["losses"][arm][seed] == [*last["held_out_by_t"]["uncond"], last["held_out"]["uncond"]]
            assert table["curves"][arm][seed][-1] == last["held_out"]["uncond"] and len(table["curves"][arm][seed]) == 6
    assert table["losses"]["plain"][0] != table["losses"]["plain"][1] != table["losses"]["routed"][1]
    difference = np.subtract(*[[row[-1] for row in table["losses"][arm]] for arm in ("routed", "plain")])
    assert f"{difference.mean():.4f} ({difference.std(ddof=1):.4f})" in capsys.readouterr().out
    assert Image.open(tmp_path / "c" / "curve.png").size == (640, 400)


def test_what_is_restored_is_compared_with_sdedit_and_with_the_truth(tmp_path, monkeypatch):
    small = TINY.replace("uncond", "masked")
    monkeypatch.setitem(compare.ARMS, "masked", {"plain": TINY, "U": small, "X": small + " --input x"})
    real = joint.draw

    def draw(model, count, known, steps, **options):
        if joint.beside(model):  # -X is a perfect painter in this test
            return {"image": torch.stack([pictures[i * len(pictures) // count]["target"] for i in range(count)])}
        return real(model, count, known, steps, **options)
    pictures = joint.Pictures("masked", "heldout", 32)
    monkeypatch.setattr(joint, "draw", draw)
    monkeypatch.setattr(compare.restoration, "__defaults__", (2, (0.5,)))
    call(monkeypatch, "--steps", 1, "--seeds", 1, "--out", tmp_path, "--eval-size", 8, what="masked")
    told = json.loads((tmp_path / "table.json").read_text())
    assert {arm: len(v[0]) for arm, v in told["losses"].items()} == dict(plain=5, U=5, X=5)
    rows = told["restoration"]
    assert rows["columns"][:2] == ["5 in", "5 out"] and np.allclose(rows["MT-Diffusion-X"], 100)
    given = np.array(rows["as it is"][0])
    assert (given[1::2] == 100).all() and (given[::2] < 20).all()
    drawn = np.array([rows[row][0] for row in ("MT-Diffusion-U", "SDEdit, 0.5")])
    assert (drawn < 50).all() and not np.allclose(*drawn)


def test_what_is_recognised_is_counted_against_the_truth(tmp_path, monkeypatch):
    def draw(model, count, known, steps):
        right = torch.nn.functional.one_hot(torch.tensor([pictures[i * len(pictures) // count]["x"] for i in range(count)]), 10).float()
        right[0] = 1 - right[0]
        return {"label": right if model[0] == "E" else 1 - right}
    pictures = joint.Pictures("label", "heldout")
    monkeypatch.setattr(joint, "draw", draw)
    monkeypatch.setattr(compare, "load_model", lambda folder: folder.name.upper() if folder.parent == tmp_path else load_model(folder))
    monkeypatch.setattr(compare, "classifier_alone", lambda model, steps, seed: lambda z0: torch.eye(10)[[0] * len(z0)])
    args = SimpleNamespace(eval_size=8, steps=1, seeds=2)
    _, _, rows = compare.recognition(args, tmp_path)
    truth = [pictures[i * len(pictures) // 8]["x"] for i in range(8)]
    assert (rows["E"] == 7 / 8).all() and (rows["M"] <= 1 / 8).all() and rows["E"].shape == (2, 1)
    assert (rows["M's classifier alone"] == truth.count(0) / 8).all()
    assert (rows["the commonest"] == max(map(truth.count, truth)) / 8).all()


@pytest.mark.parametrize("head", ["linear", "classifier"])
def test_a_classifier_alone_learns_what_it_sees(head, monkeypatch):
    model = load_model(data.ASSETS / "tiny")
    joint.attach(model, "label", head, "z", "zero")
    real = joint.Pictures("label", "train")
    two = [next(real[i] for i in range(len(real)) if real[i]["x"] == k) for k in (1, 7)]
    monkeypatch.setattr(joint.Pictures, "get", lambda self, i, rng: two[i % 2])
    predict = compare.classifier_alone(model, 12, 0, batch_size=4)
    assert predict(torch.stack([e["target"] for e in two])).argmax(1).tolist() == [1, 7]


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(compare.ARMS, "dtr", {"bad": TINY + " --lr -1"})
    with pytest.raises(UserError, match="bad-0.txt: error: .*--lr -1"):
        call(monkeypatch, "--steps", 6, "--seeds", 1, "--out", tmp_path)


@pytest.mark.parametrize("arguments", [("--seeds", 0), ("--steps", 0), ("--jobs", 0)])
def test_bad_numbers_are_refused(arguments, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=arguments[0]):
        call(monkeypatch, *arguments, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_curve_shows_every_arm(tmp_path):
    steps = [10, 20, 30, 40]
    compare.curves({name: (steps, np.array([[4.0, 3, 2, k], [4.1, 3, 2, k]])) for k, name in enumerate(("a", "b", "c"))}, tmp_path / "x.png")
    seen = np.asarray(Image.open(tmp_path / "x.png")).reshape(-1, 3).astype(int)
    for colour in compare.COLOURS[:3]:
        wanted = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(seen - wanted).sum(1) < 30).sum() > 50


def test_deme_is_compared_with_one_copy_on_the_same_examples(tmp_path, monkeypatch, capsys):
    ran = []

    def train(options, out, threads):
        ran.append(options)
        if "--decouple" in options:
            out.mkdir()
            copies = int(options[options.index("--decouple") + 1])
            rows = ["before", "ensemble (Eq. 7)", "merged, 1/N each", "merged, searched", *[f"copy {i}" for i in range(copies)]]
            unseen = dict(t=[0, 249, 250, 999, 500], losses={row: [float(i + copies)] * 3 + [9.0, 5.0] for i, row in enumerate(rows)})
            (out / "merge.json").write_text(json.dumps(dict(unseen=unseen)))
        return []
    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(sys, "argv", ["compare.py", "deme-ddpm", "--steps", "5", "--seeds", "2", "--eval-size", "8", "--out", str(tmp_path)])
    compare.main()
    told = json.loads((tmp_path / "table.json").read_text())["losses"]
    assert told["merged, searched"] == [[7.0, 7.0, 5.0, 9.0, 7.0]] * 2 and told["one copy (N = 1)"] == [[5.0, 5.0, 5.0, 9.0, 5.8]] * 2
    steps = {tuple(o[o.index(key) + 1] if key in o else "" for key in ("--decouple", "--steps", "--seed")) for o in ran}
    assert steps == {(copies, n, seed) for copies, n in (("", "20"), ("4", "5"), ("1", "20")) for seed in "01"}
    assert "1.2000 (0.0000)" in capsys.readouterr().out  # merged, searched: 7.0 beside 5.8


def test_cosines_of_gradients_are_those_of_two_disjoint_halves():
    model = load_model(data.ASSETS / "tiny")
    cosines = compare.gradients(model, count=2, levels=2, batch_size=1)
    dataset, found = data.builtin("t2i", "train"), []
    for half, t in ((0, 250), (1, 750), (0, 750), (1, 250)):
        noise = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(half))
        examples = [dataset[(2 * k + half) * len(dataset) // 4] for k in range(2)]
        mean, logvar = model.vae.encode(torch.stack([e["target"] for e in examples]))
        x0 = (mean + (0.5 * logvar).exp() * noise[1]) * model.vae.config["scaling_factor"]
        t = torch.full((2,), t)
        out = model.unet(model.diffusion.add_noise(x0, noise[0], t), t, model.encode_text([e["prompt"] for e in examples])[0])
        a = model.diffusion.alpha_bar[t].view(2, 1, 1, 1)
        model.unet.zero_grad()
        (out - (a.sqrt() * noise[0] - (1 - a).sqrt() * x0)).square().mean().backward()  # v
        found.append(torch.cat([p.grad.flatten() for p in model.unet.parameters()]))
    other = compare.gradients(model, count=2, levels=2, batch_size=2)
    expected = sum(torch.cosine_similarity(found[i], found[i + 1], dim=0).item() for i in (0, 2)) / 2
    assert abs(cosines[0, 1] - expected) < 1e-3 and abs(cosines[0, 0] - torch.cosine_similarity(found[0], found[3], dim=0).item()) < 1e-3
    assert cosines.shape == (2, 2) and np.allclose(cosines, cosines.T) and np.allclose(cosines, other, atol=1e-3)


def test_the_heatmap_is_blue_where_gradients_agree_and_red_where_they_do_not(tmp_path):
    compare.heatmap(np.array([[1.0, -1.0], [0.0, 0.5]]), tmp_path / "x.png")
    picture = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
    assert picture.shape == (40, 40, 3)
    assert picture[0, 0].tolist() == [21, 101, 192] and picture[0, 39].tolist() == [198, 40, 40] and picture[39, 0].tolist() == [255] * 3
