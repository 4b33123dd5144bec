"""The comparison of arms: what it runs and what it reports."""
import json
import sys

import numpy as np
import pytest
from PIL import Image

import compare
from folders import UserError

TINY = "--task uncond --model scratch --unet ddpm-tiny --batch-size 2"


@pytest.fixture
def arms(monkeypatch):
    monkeypatch.setitem(compare.ARMS, "dtr", {"plain": TINY, "routed": TINY + " --routing dtr"})


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["compare.py", "dtr", "--eval-size", "4", *map(str, args)])
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
