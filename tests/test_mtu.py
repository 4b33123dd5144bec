"""experiments/mtu.py: what its arms share, what each of them changes, and what is measured."""
import copy
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import data
import emoji
import moe
import mtu
import train
from conftest import ROOT
from hub import read_json
from sample import load_model
from test_moe import base, reloaded, run, scramble

ARMS = mtu.make_arms("runs")


def as_model(unet):
    return SimpleNamespace(unet=unet)


def words(arm):
    return shlex.split(ARMS[arm].options)


@pytest.mark.parametrize("task", data.ALL)
def test_an_arm_of_one_task_sees_what_this_task_has_in_the_others(task):
    datasets = {name: data.builtin(name, "train") for name in data.ALL}
    shape = dict(seed=3, num_timesteps=1000, latent_shape=(4, 16, 16))
    whole = data.Examples(datasets, list(data.ALL), batch_size=32, **shape)
    alone = mtu.own_share(data.Examples({task: datasets[task]}, [task], batch_size=8, **shape), 2)
    # The second step.
    expected = [example for example in map(whole.__getitem__, range(32, 64))
                if example["task"] == task]
    for a, b in zip(map(alone.__getitem__, range(8, 16)), expected, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
                   for key in a)


def test_arms_differ_from_their_controls_in_one_thing_and_the_first_ones_matter_most():
    assert list(ARMS)[:10] == ["before", "N = 4", "N = 1", "literal, N = 4", "literal, N = 2",
                               "literal, N = 8", "N = 2", "N = 8", "self-attention",
                               "cross-attention"]
    for arm, control, more in (
            ("literal, N = 2", "N = 2", ["--expert-init", "literal"]),
            ("self-attention", "N = 1", ["--train", "self"]), ("LoRA", "N = 1", []),
            ("N = 4", "shared norms", ["--num-experts", "4"]),      # the default
            ("N = 4", "shared convolution", ["--num-experts", "4"])):
        assert words(arm) == words(control) + more
    assert {ARMS[name].change for name in list(ARMS)[:10]} == {None}
    for name, arm in ARMS.items():
        if "alone" in name:
            options = dict(zip(words(name), words(name)[1:]))
            assert (options["--task"],) == arm.tasks and options["--batch-size"] == "8"
    assert ARMS["sixth task"].base == ARMS["fifth task"].base.with_name("fifth-task-0")


@pytest.mark.parametrize("part", [".norm3.", "conv_in."])
def test_shared_rows_stay_equal_and_get_the_gradient_of_one_row_for_all(part):
    unet = moe.upcycle(base())
    scramble(unet)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if part in name:
                p.copy_(p[:1].expand_as(p))
    twin = copy.deepcopy(unet)
    run(twin).square().sum().backward()
    mtu.share(part, as_model(unet))
    run(unet).square().sum().backward()
    for (name, p), q in zip(unet.named_parameters(), twin.parameters(), strict=True):
        if part in name:
            assert torch.allclose(p.grad[0], q.grad.sum(0) / 2, rtol=1e-4, atol=1e-4)
            assert torch.equal(p.grad, p.grad[:1].expand_as(p))
            # As long as the gradient of one parameter.
            assert torch.allclose(p.grad.norm(), q.grad.sum(0).norm(), rtol=1e-3)
        elif p.requires_grad:
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-4)


def test_low_rank_changes_are_all_that_trains_of_a_layer_and_are_saved_within_it(tmp_path):
    unet = moe.upcycle(base(), num_experts=1)
    before, weights = run(unet), copy.deepcopy(unet).state_dict()
    mtu.add_low_rank(as_model(unet))
    assert torch.equal(run(unet), before)
    trained = {name for name, p in unet.named_parameters() if p.requires_grad and ".ff." in name}
    assert trained and all(name.endswith((".0.down", ".0.up")) for name in trained)
    for name, p in unet.named_parameters():
        if name in trained:
            nn.init.normal_(p, std=0.3)
    unet.save_pretrained(tmp_path)
    saved = reloaded(tmp_path)
    assert torch.allclose(run(saved), run(unet), atol=1e-4) and not torch.equal(run(saved), before)
    assert saved.state_dict().keys() == weights.keys()
    for name, weight in saved.state_dict().items():
        change = weight - weights[name]
        if ".ff.net." in name and name.endswith("weight"):
            assert torch.linalg.matrix_rank(change, rtol=1e-4) == mtu.RANK
        else:
            assert not change.any()


def test_a_change_beside_the_newest_rows_is_found_and_the_rows_are_counted():
    old = moe.upcycle(base())
    new = copy.deepcopy(old)
    moe.add_task(new, "restyle", like="sr")
    for name, p in new.named_parameters():
        if any(part in name for part in moe.TABLES):
            p.data[-1] += 1
    found = mtu.compare_older_tasks(old, new)
    more = sum(p.numel() for p in new.parameters()) - sum(p.numel() for p in old.parameters())
    assert found == dict(unchanged=True, kilobytes=round(4 * more / 1000, 1))
    for name in ("conv_out.bias", "conv_in.weight"):
        changed = copy.deepcopy(new)
        changed.get_parameter(name).data.view(-1)[0] += 1e-3
        assert not mtu.compare_older_tasks(old, changed)["unchanged"]


def test_deviation_is_the_norm_of_each_kind_of_change():
    before = base()
    after = moe.upcycle(copy.deepcopy(before), num_experts=1)
    blocks = [moe.transformer_blocks(unet) for unet in (before, after)]
    a, b = blocks[0][1], blocks[1][1]
    b.attn2.to_out[0].weight.data += 0.5
    b.ff.net[0].proj.weight.data *= 3
    found = mtu.deviation(before, after)
    assert all(len(layers) == len(blocks[0]) for layers in found.values()) and len(found) == 9
    norm = 0.5 * a.attn2.to_out[0].weight.numel() ** 0.5
    ff = a.ff.net[0].proj.weight, a.ff.net[2].weight
    squares = [weight.square().sum().item() for weight in ff]
    expected = {"cross out": [norm, norm / a.attn2.to_out[0].weight.norm().item()],
                "feed-forward": [2 * squares[0] ** 0.5, 2 * (squares[0] / sum(squares)) ** 0.5]}
    for kind, layers in found.items():
        assert layers[1] == pytest.approx(expected.get(kind, [0, 0]), rel=1e-4)
        assert layers[0] == [0, 0]


@pytest.fixture
def new_tasks(monkeypatch):
    """The new tasks are known, and forgotten afterwards."""
    for task, draw in mtu.NEW_TASKS.items():
        monkeypatch.setitem(data.TASKS, task, None)
        monkeypatch.setattr(emoji.Builtin, task, draw, raising=False)
    mtu.add_new_tasks()


def test_new_tasks_have_a_source_and_another_target(new_tasks):
    for task in mtu.NEW_TASKS:
        example = data.builtin(task, "heldout")[40]
        assert example["source"].shape == example["target"].shape == (3, 64, 64)
        assert not torch.equal(example["source"], example["target"])
    red, green, blue = example["source"]
    assert torch.equal(red, green) and torch.equal(red, blue)


@pytest.mark.parametrize("tasks, added", [(("t2i",), []), ((*data.ALL, "restyle"), ["restyle"])])
def test_an_arm_may_start_from_an_upcycled_model(tasks, added, tmp_path):
    start = mtu.TINY if not added else ROOT / "assets/tiny-mtu"
    folder = mtu.write_start(start, tasks, tmp_path / "start")
    model = load_model(folder)
    assert model.tasks == list(tasks) and model.unet.config["moe"]["added"] == added
    assert model.guidance == (load_model(start).guidance if added else train.GUIDANCE)
    written = (folder / "model_index.json").stat().st_mtime_ns
    mtu.write_start(start, tasks, folder)
    assert (folder / "model_index.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_from_runs_to_tables(tmp_path, monkeypatch, capsys, new_tasks):
    """Every arm, each for two steps; older tasks stay as they are unless everything trains."""
    options = ["--steps", 2, "--seeds", 1, "--count", 4, "--draw-steps", 2, "--out",
               tmp_path / "runs", "--results", tmp_path / "x.json"]
    monkeypatch.setattr(mtu, "LOSS_EXAMPLES", 2)
    monkeypatch.setattr(sys, "argv", ["mtu.py", *map(str, options)])
    mtu.main()
    rows = {row["arm"]: row for row in read_json(tmp_path / "x.json")["stages"].values()}
    assert rows.keys() == ARMS.keys()
    assert rows["fifth task"]["unchanged"] and rows["sixth task"]["unchanged"]
    assert not rows["fifth, all weights"]["unchanged"]
    for task, loss in rows["N = 4"]["loss"].items():
        assert rows["sixth task"]["loss"][task] == pytest.approx(loss, abs=1e-4)
    assert rows["LoRA"]["trained"] < rows["N = 1"]["trained"]
    lora = load_model(tmp_path / "runs" / "lora-0").unet
    assert lora.config["moe"]["num_experts"] == 1
    printed = capsys.readouterr().out
    assert "| LoRA |" in printed and "| feed-forward |" in printed
    assert (tmp_path / "x.png").stat().st_size > 5000
