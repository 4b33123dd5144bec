"""train.py: every task in every batch, exact resume, ranks and accumulation, faults, the log."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, assert_mistake, call, copies, in_two_processes, same_tensors
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import adm
import aggregation
import data
import dit
import hub
import merge
import moe
import sample
import train
import unet
from data import ALL, ASSETS
from diffusion import Diffusion, UncertaintyWeight
from routing import add_routing
from sample import generate, load_model
from unet import CONFIGS, UNet

QUICK = ["--batch-size", 4, "--eval-size", 1, "--sample-every", 0, "--save-every", 2,
         "--log-every", 1, "--warmup", 1]
FOUR_TASKS = ["--task", "all", "--steps", 4, "--lr", 1e-3]


def run(out, *options, code=0, start=lambda *words: [call(*words)]):
    """Run train.py, in one process or, by `start`, in several -> what the first of them says."""
    ends = start("train.py", *QUICK, "--out", out, *options)
    assert {end.returncode for end in ends} == {code}, [end.stderr[-3000:] for end in ends]
    return ends[0]


def refused(words, out, *options):
    assert_mistake(run(out, *options, code=2), words)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def tensors(out, part="unet"):
    return load_file(next((out / part).glob("*.safetensors")))


def spy(patch, place, name):
    """-> a list that will hold the arguments and the result of each call of a function."""
    calls, real = [], getattr(place, name)
    def spied(*args, **options):
        calls.append([*args, real(*args, **options)])
        return calls[-1][-1]
    patch.setattr(place, name, spied)
    return calls


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Four steps of the main job -> its folder, and what the command printed."""
    out = tmp_path_factory.mktemp("runs") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate", partial(generate, steps=1))
        return out, run(out, *FOUR_TASKS, "--sample-every", 4).stdout


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "all"
    run(out, *FOUR_TASKS, start=partial(in_two_processes, call))
    return out


# ---- what trains ----

def test_all_tasks_train_and_the_end_says_what_to_do_next(straight):
    (out, printed), rows = straight, log(straight[0])
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and load_model(out).tasks == list(ALL)
    assert all(set(row["loss"]) == set(row["loss_by_t"]) == set(ALL) for row in rows)
    assert all(len(bins) == train.BINS for row in rows for bins in row["loss_by_t"].values())
    assert "held-out loss" in printed and f"sample.py --task edit --model {out}" in printed
    assert Image.open(out / "samples" / "000004.png").size == (6 * 64, (2 + 3 * 3) * 64)


@pytest.mark.parametrize("which, parts", [
    ("list", ("conv_in.", ".norm3.", ".ff.")), ("self", ("conv_in.", ".norm3.", ".attn1.")),
    ("all", ("",))])
def test_what_trains_has_changed_and_nothing_else(straight, tmp_path, which, parts):
    if which != "list":
        run(tmp_path, *FOUR_TASKS, "--steps", 1, "--train", which)
    before, after = tensors(ASSETS / "tiny"), tensors(straight[0] if which == "list" else tmp_path)
    assert after.keys() == tensors(straight[0]).keys()
    for key in before.keys() & after.keys():
        # Of a table with a row per task, the first task's.
        row = after[key][0] if after[key].dim() > before[key].dim() else after[key]
        equal = torch.equal(before[key].float(), row[:, :4] if key == "conv_in.weight" else row)
        assert equal != any(part in key for part in parts), key


@pytest.mark.parametrize("name", ["adm-tiny", "ddpm-tiny"])
def test_a_network_on_pixels_trains_from_scratch_and_opens_in_diffusers(name, tmp_path):
    """ADM's learns the variance. Its parts may lie in one folder, as in some repositories."""
    from diffusers import DDPMPipeline
    out, top = tmp_path / "a", tmp_path / "top"
    run(out, "--task", "uncond", "--model", "scratch", "--unet", name, "--lr-schedule", "constant",
        "--eval-every", 2, "--steps", 4)
    first, second = [row for row in log(out) if "held_out" in row]
    assert [first["step"], second["step"], len(first["held_out_by_t"]["uncond"])] == [2, 4, 4]
    assert second["held_out"]["uncond"] < first["held_out"]["uncond"]
    shutil.copytree(out / "unet", top)
    shutil.copy(out / "scheduler" / "scheduler_config.json", top)
    shutil.copy(out / "model_index.json", top)
    ours, again = (generate(load_model(path), "uncond", "", steps=4)[0] for path in (out, top))
    (theirs,) = DDPMPipeline.from_pretrained(out)(
        num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images
    assert ours.tobytes() == again.tobytes()
    assert np.abs(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)).mean() < 1


@pytest.mark.parametrize("name, options", [
    ("dit-tiny", ["--routing", "dtr"]), ("adm-tiny", ["--beta-schedule", "squaredcos_cap_v2"])])
def test_a_network_of_classes_trains_from_scratch_and_draws_the_class_it_is_asked_for(
        name, options, tmp_path):
    run(tmp_path, "--task", "class", "--unet", name, "--steps", 9, "--lr", 5e-3, *options)
    model = load_model(tmp_path)
    assert model.tasks == ["class"] and model.classes["flags"] == data.class_names().index("flags")
    assert (model.scheduler["beta_schedule"] == "linear") == (name == "dit-tiny")
    a, b, again = (generate(model, "class", [words], steps=2, guidance=4.0)[0].tobytes()
                   for words in ("flags", "objects", str(model.classes["flags"])))
    assert a == again and a != b


@pytest.mark.parametrize("name, options", [
    ("RoutedUNet2D", ["uncond", "--model", "scratch", "--routing", "dtr", "--alpha", 2]),
    ("ProjectedUNet", ["t2i", "--t-range", 0, 500, "--projection", "blocks"])])
def test_what_is_no_plain_network_does_not_open_in_diffusers(name, options, tmp_path):
    from diffusers import DiffusionPipeline
    run(tmp_path, "--task", *options, "--steps", 1)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["diffusers", name]
    with pytest.raises(Exception, match=name.replace("UNet", "Pipeline")):
        DiffusionPipeline.from_pretrained(tmp_path)
    network = load_model(tmp_path).unet
    if "Routed" in name:
        assert network.config["routing"]["alpha"] == 2
    else:
        projection = network.up_blocks[1].projection.weight[..., 0, 0]
        assert not torch.equal(projection, torch.eye(len(projection)))


def test_from_scratch_makes_a_folder_that_diffusers_opens(tmp_path):
    """The encoders are those of --encoders, whose folder may name a base; they stay frozen."""
    from diffusers import StableDiffusionPipeline
    tiny, encoders, out = load_model(ASSETS / "tiny"), tmp_path / "clip", tmp_path / "a"
    with torch.no_grad():
        tiny.text_encoder.text_model.final_layer_norm.bias += 0.5
    tiny.text_encoder.save_pretrained(encoders / "text_encoder")
    index = tiny.index | dict(base=os.path.relpath(ASSETS / "tiny", encoders))
    (encoders / "model_index.json").write_text(json.dumps(index))
    run(out, "--task", "t2i", "--model", "scratch", "--steps", 1, "--encoders", encoders)
    model = load_model(out)
    assert model.tasks == ["t2i"] and same_tensors(model.vae.state_dict(), tiny.vae.state_dict())
    assert same_tensors(model.text_encoder.state_dict(), tiny.text_encoder.state_dict())
    pipe = StableDiffusionPipeline.from_pretrained(out, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("x", num_inference_steps=1).images[0].size == (64, 64)


def test_grids_show_pictures_also_where_they_were_encoded_once(tmp_path, monkeypatch):
    model, picture = load_model(ASSETS / "tiny"), data.builtin("t2i", "heldout")[5]["target"]
    moments = torch.stack(model.vae.encode(picture[None]), dim=1)[0]
    monkeypatch.setattr(sample, "generate", lambda *args, **options: [data.to_pil(picture)])
    for source, error in ((picture, 0), (moments, 8)):
        examples = [dict(prompt="", source=source, target=source)]
        sample.sample_grid(model, {"edit": examples}, 1, 0, tmp_path / "a.png")
        rows = np.asarray(Image.open(tmp_path / "a.png"), dtype=float).reshape(3, 64, 64, 3)
        assert np.abs(rows - rows[1]).mean() <= error and rows.std() > 20


def test_a_range_is_trained_and_saved_without_projections(tmp_path):
    """The folder is an ordinary Stable Diffusion."""
    run(tmp_path, "--task", "t2i", "--t-range", 0, 250, "--p-global", 0, "--projection", "--steps", 2)
    assert all(row["loss_by_t"]["t2i"][1:] == [None] * 3 for row in log(tmp_path))
    before, after, state = tensors(ASSETS / "tiny"), tensors(tmp_path), tensors(tmp_path, "state")
    assert before.keys() == after.keys() and load_model(tmp_path).tasks == ["t2i"]
    assert any((after[key] - before[key].float()).abs().max() > 1e-4 for key in before)
    projections = [v for k, v in state.items() if k.startswith("param/") and "projection" in k]
    assert len(projections) == 15 and all((p - torch.eye(len(p))).any() for p in projections)
    assert json.loads((tmp_path / "arguments.json").read_text())["lr"] == 1e-3


@pytest.mark.parametrize("shares", [["edit", "sr"], ["edit", "edit", "sr"]], ids=len)
def test_a_step_minimises_the_sum_over_tasks_of_each_tasks_mean(shares, tmp_path, monkeypatch):
    """MTU Eq. 2, in two parts and with weighted timesteps; a task named twice counts twice."""
    batches, inputs = spy(monkeypatch, train, "next_batch"), spy(monkeypatch, train.Net, "forward")
    losses, totals = spy(monkeypatch, Diffusion, "loss"), spy(monkeypatch, torch.Tensor, "backward")
    run(tmp_path, "--task", ",".join(shares), "--steps", 1, "--batch-size", 2 * len(shares),
        "--device-batch-size", len(shares), "--loss-weight", "p2", "--num-experts", 1)
    assert [batch["task"] for _, batch in batches] == [shares, shares]
    assert load_model(tmp_path).tasks == ["edit", "sr"]
    # What enters the network is [z_t, E(c_I)], the text and the row of the task.
    base, errors, weighted = load_model(ASSETS / "tiny"), [], []
    for (_, batch), (_, z, t, context, rows, *_), (_, out, x0, *_) in zip(batches, inputs, losses):
        clean, source = data.Encoder(base.vae)(batch, "cpu")
        z_t = base.diffusion.add_noise(clean, batch["noise"], batch["t"])
        assert torch.allclose(x0, clean, atol=1e-5) and torch.equal(t, batch["t"])
        assert torch.allclose(z, torch.cat([z_t, source], dim=1), atol=1e-5)
        assert torch.allclose(context, base.encode_text(batch["prompt"])[0], atol=1e-5)
        assert rows.tolist() == [int(task == "sr") for task in shares]
        errors.append(base.diffusion.error(out, x0, batch["noise"], t).detach())
        weighted.append(errors[-1] * base.diffusion.weight(t, "p2"))
    # What is minimised is weighted, and what is logged is not.
    (row,), sum_of_means = log(tmp_path), 0
    for task in ("edit", "sr"):
        mine = [i for i, name in enumerate(shares) if name == task]
        assert row["loss"][task] == pytest.approx(torch.stack(errors)[:, mine].mean().item())
        share = 2 * len(mine) / len(shares)
        sum_of_means += share * torch.stack(weighted)[:, mine].mean().item()
    total = sum(total.item() for total, _ in totals if not total.is_meta)
    assert total == pytest.approx(sum_of_means, rel=1e-5)


def test_consistency_is_towards_the_frozen_pretrained_network(tmp_path, monkeypatch):
    """DeMe Eq. 5: nothing at the start; then the distance of the two predictions, weighted."""
    inputs, pairs, losses, totals = (spy(monkeypatch, *function) for function in (
        (train.Net, "forward"), (merge, "consistency_loss"), (Diffusion, "loss"),
        (torch.Tensor, "backward")))
    run(tmp_path, "--task", "t2i", "--t-range", 0, 500, "--consistency", 3, "--steps", 2)
    pretrained = load_model(ASSETS / "tiny").unet
    totals = [total.item() for total, _ in totals if not total.is_meta]
    for step, (_, teacher, distance) in enumerate(pairs):
        assert not teacher.requires_grad
        with torch.no_grad():
            assert torch.allclose(teacher, pretrained(*inputs[step][1:4]), atol=1e-5)
        assert (distance.max() < 1e-10 if step == 0 else distance.min() > 1e-6)
        assert totals[step] == pytest.approx((losses[step][-1] + 3 * distance).mean().item())
    assert len(pairs) == len(totals) == 2


def test_no_weight_decay_on_norms_biases_and_rows_of_tasks():
    net = train.Net(moe.upcycle(load_model(ASSETS / "tiny").unet), UncertaintyWeight(1000))
    groups = train.parameter_groups(net, 0.1, 1e-3)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {(group["weight_decay"], group["peak_lr"]): {names[id(p)] for p in group["params"]}
             for group in groups}
    # Routers, and the embedding that they read, would die at the experts' rate.
    assert found.keys() == {(0.1, 1e-3), (0.0, 1e-3), (0.1, 1e-4), (0.0, 1e-4), (0.0, 0.025)}
    assert all(".ff." in name and name.endswith("weight") for name in found[0.1, 1e-3])
    assert all(".router." in name and name.endswith("weight") for name in found[0.1, 1e-4])
    assert "unet.task_embedding.weight" in found[0.0, 1e-4]
    assert "unet.conv_in.weight" in found[0.0, 1e-3] and any(
        "norm3.weight" in name for name in found[0.0, 1e-3])
    assert not any(".router." in name for name in found[0.1, 1e-3] | found[0.0, 1e-3])
    assert found[0.0, 0.025] == {"uncertainty.s"}
    # A smaller rate of the run holds for all but the uncertainty.
    assert {group["peak_lr"] for group in train.parameter_groups(net, 0.1, 1e-5)} == {1e-5, 0.025}


def test_an_upcycled_network_computes_the_same_in_channels_last():
    network, task = moe.upcycle(load_model(ASSETS / "tiny").unet), torch.tensor([1, 3])
    inputs = torch.randn(2, 8, 16, 16), torch.tensor([5, 900]), torch.randn(2, 77, 128), task
    before, weight = network(*inputs), network.conv_out.weight
    train.channels_last(network)
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert torch.allclose(network(*inputs), before, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    "all", "t2i --t-range 0 500 --projection", "sr --routing dtr --loss-weight uw", "masked",
    "translate --input x", "label", "repr", "label --model scratch --head classifier"])
def test_one_graph_for_all_steps(words, tmp_path, monkeypatch):
    """No graph break, and no recompilation from step to step."""
    graphs = []
    monkeypatch.setattr(train, "compiled", lambda net, device: torch.compile(
        net, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward))
    torch._dynamo.reset()
    run(tmp_path, "--task", *words.split(), "--steps", 3, "--compile", "--batch-size", 8,
        "--device-batch-size", 4)
    assert len(graphs) == 1


# ---- saving, resuming, and what may go wrong ----

def killed(at, *words):
    """A run that ends by force when half of its at-th state is written."""
    real, states = hub.save_file, iter(range(1, 9))
    def half(tensors, path, **options):
        real(tensors, path, **options)
        if path.name == "state.safetensors" and next(states) == at:
            os.truncate(path, path.stat().st_size // 2)
            os._exit(9)
    hub.save_file = half
    call(*words)


@pytest.mark.slow
def test_runs_killed_while_they_save_go_on_from_the_last_state_bit_for_bit(straight, tmp_path):
    """Killed at the first state, that is all of it again; then twice at the second."""
    words = [*FOUR_TASKS, "--save-every", 1]
    for at in (1, 2, 1):
        args = (at, "train.py", *QUICK, "--out", tmp_path, *words)
        process = copies().Process(target=killed, args=args)
        process.start()
        process.join(240)
        assert process.exitcode == 9
    assert "at step 1" in run(tmp_path, *words).stdout
    assert same_tensors(tensors(straight[0]), tensors(tmp_path))
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4]
    assert not list(tmp_path.rglob("*.part-*"))


@pytest.mark.parametrize("words", [
    "uncond --model scratch --workers 1", "masked --model scratch --input x",
    *(pytest.param(words, marks=pytest.mark.slow) for words in (
        "t2i --t-range 0 500 --projection", "sr --routing dtr --loss-weight uw",
        "edit,sr --train all --workers 2 --top-k 2 --device-batch-size 2",
        "label --model scratch --head classifier"))])
def test_every_method_goes_on_from_a_checkpoint_bit_for_bit(
        words, tmp_path, monkeypatch, request):
    """Also on two threads. There, the backward of table[task] does so by chance only."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    a, b, totals = tmp_path / "a", tmp_path / "b", spy(monkeypatch, torch.Tensor, "backward")
    options = ["--task", *words.split(), "--steps", 3, "--save-every", 1]
    run(a, *options)
    left, operations = [totals[-1][0].grad_fn], set()
    while left:
        node = left.pop()
        if node is not None and node not in operations:
            operations.add(node)
            left += [before for before, _ in node.next_functions]
    names = {node.name() for node in operations}
    assert "ConvolutionBackward0" in names and not names & {
        "IndexBackward0", "IndexPutBackward0", "PutBackward0", "TakeBackward0"}
    save, saved = train.save_state, []
    def on_a_full_disk(*args):
        """Each run saves once, and its second state does not fit."""
        saved.append(len(saved) % 2 == 0 and save(*args))
        if len(saved) % 2 == 0:
            raise OSError(28, "No space left on device", "state.safetensors")
    monkeypatch.setattr(train, "save_state", on_a_full_disk)
    for _ in range(2):
        last = run(b, *options, code=2).stderr.strip().splitlines()[-1]
        assert last == "error: state.safetensors: No space left on device"
    monkeypatch.undo()
    assert "at step 2" in run(b, *options).stdout
    assert same_tensors(tensors(a, "state"), tensors(b, "state"))
    assert same_tensors(tensors(a), tensors(b))
    learned = tensors(b, "state").get("param/uncertainty.s", torch.zeros(2))
    assert ("uw" in words) == bool((learned != 0).sum() > 1)
    assert not any("uncertainty" in key for key in tensors(b))
    assert any("heads." in key for key in tensors(b)) == (options[1] in train.JOINT)
    for first, second in zip(log(a), log(b), strict=True):
        keys = ("step", "loss", "loss_by_t", "grad_norm")
        assert [first[key] for key in keys] == [second[key] for key in keys]


def test_a_finished_run_says_so_and_a_changed_setting_is_refused(straight, tmp_path):
    """An option younger than the run was not in use, and another name makes no other folder."""
    out = shutil.copytree(straight[0], tmp_path / "a")
    (tmp_path / "link").symlink_to(ASSETS / "tiny")
    before, path = (out / "log.jsonl").read_text(), out / "state" / "state.safetensors"
    scalars = hub.read_scalars(path)
    del scalars["settings"]["top_k"], scalars["settings"]["routing"]
    save_file(load_file(path), tmp_path / "older", metadata=dict(scalars=json.dumps(scalars)))
    (tmp_path / "older").rename(path)
    assert "is finished" in run(out, *FOUR_TASKS, "--model", tmp_path / "link").stdout
    refused("--lr was 0.001 and is now 0.5", out, *FOUR_TASKS, "--lr", 0.5)
    refused("--top-k was None and is now 2", out, *FOUR_TASKS, "--top-k", 2)
    # Other tasks have other losses, but that is not what is wrong.
    refused("--task was 'all' and is now 'edit'", out, *FOUR_TASKS, "--task", "edit")
    assert (out / "log.jsonl").read_text() == before


def test_what_train_py_cannot_go_on_from_is_named_and_nothing_is_written(straight, tmp_path):
    out, foreign = shutil.copytree(straight[0], tmp_path / "a"), tmp_path / "b" / "model_index.json"
    path = out / "state" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    foreign.parent.mkdir()
    foreign.write_text("{}")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    refused("state.safetensors cannot be read", out, *FOUR_TASKS)
    refused(f"{foreign.parent} holds a model", foreign.parent, *FOUR_TASKS)
    refused("cannot be written", foreign, *FOUR_TASKS)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("change", [
    *[dict(before=before) for before in (
        dict(t2i=1.0), dict.fromkeys([*ALL, "label head"], 1.0), None, 3,
        dict.fromkeys(ALL, np.inf), dict.fromkeys(ALL, [1.0]))],
    dict(step=10 ** 30), dict(step=2.0), dict(skipped=-1), dict(settings=[])], ids=str)
def test_numbers_of_a_state_that_no_run_wrote_are_named(straight, tmp_path, change):
    out = shutil.copytree(straight[0], tmp_path / "a")
    path = out / "state" / "state.safetensors"
    scalars = hub.read_scalars(path) | change
    save_file(load_file(path), tmp_path / "b", metadata=dict(scalars=json.dumps(scalars)))
    (tmp_path / "b").rename(path)
    refused("delete it to begin again", out, *FOUR_TASKS)


def test_lines_of_steps_after_the_checkpoint_leave_the_log(tmp_path):
    ours = [json.dumps({"step": step, name: {}}) for step in (10, 20, 30)
            for name in ("loss", "held_out")]
    others = ['{"step": 99}', '{"step": "a", "loss": 1}', "[[]]", '{"loss": 1}', "of somebody else",
              '{"step": 5', "", "\u00e9\r", "[" * 100_000, '"loss"', "{", "5"]
    log = tmp_path / "log.jsonl"
    for last in ("", "{", '{"step": 1', '{"step": 10, "loss": {"t2i": 0.', *ours[4:]):
        log.write_bytes("\n".join([*others, *ours, *others, last]).encode())
        train.forget_after(log, 20)
        assert log.read_bytes() == "\n".join([*others, *ours[:4], *others, ""]).encode(), last
    # Nothing is appended to a line that lacks its end.
    for last in ("a note", '{"note": "half', '{"step": 99}', *ours[:4], '{"step":x'):
        log.write_bytes("\n".join([*ours, last]).encode())
        train.forget_after(log, 20)
        assert log.read_bytes() == "\n".join([*ours[:4], last, ""]).encode(), last


@pytest.fixture
def interruptible():
    """The two signals' handlers are Python's own, also where tests run in the background."""
    handlers = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield handlers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_bit_for_bit(
        straight, tmp_path, monkeypatch, interruptible, number):
    factor, words = train.lr_factor, [*FOUR_TASKS, "--save-every", 100]
    with monkeypatch.context() as patch:
        patch.setattr(train, "lr_factor", lambda step, args: (
            step == 2 and signal.raise_signal(number)) or factor(step, args))
        printed = run(tmp_path, *words, code=130).stdout
    assert "stopped at step 3; the same command goes on" in printed and "Next:" not in printed
    assert signal.getsignal(number) == interruptible[number]
    assert "at step 3" in run(tmp_path, *words).stdout
    assert same_tensors(tensors(straight[0]), tensors(tmp_path))


def test_an_ignored_signal_stays_ignored_and_a_second_interrupt_ends_a_run_at_once(interruptible):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with train.Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert not stop.received
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt), train.Stop() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):  # torchrun's do not count
            signal.raise_signal(number)
        assert len(stop.received) == 3
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("bad, parts", [([2], 1), ([1, 2, 3], 2)])
def test_steps_that_are_not_finite_change_nothing_and_three_in_a_row_end_the_run(
        tmp_path, monkeypatch, bad, parts):
    next_batch, calls = train.next_batch, iter(range(100))
    def broken(batches):
        batch = next_batch(batches)
        if next(calls) // parts in bad:
            batch["noise"][1] = float("nan")  # the second task is edit
        return batch
    monkeypatch.setattr(train, "next_batch", broken)
    done = run(tmp_path, *FOUR_TASKS, "--steps", 5, "--save-every", 1, "--device-batch-size",
               4 // parts, code=0 if bad == [2] else 2)
    rows, state = log(tmp_path), tensors(tmp_path, "state")
    assert load_model(tmp_path).tasks == list(ALL) and rows[bad[0]]["grad_norm"] is None
    assert all(value.isfinite().all() for value in tensors(tmp_path).values())
    assert all(np.isfinite(value) for row in rows for value in row["loss"].values())
    if bad == [2]:
        assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]
    else:
        assert "at step 3" in done.stderr and len(rows) == 3
        assert {int(v) for k, v in state.items() if k.startswith("adam/step/")} == {1}


def test_a_mistake_in_a_worker_process_is_one_line_too(tmp_path):
    rows = [dict(file_name=f"{split}.png", split=split) for split in ("train", "heldout")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.new("RGB", (64, 64)).save(tmp_path / "heldout.png")
    (tmp_path / "train.png").write_text("no picture")
    options = ["--task", "sr", "--steps", 1, "--data", tmp_path, "--workers", 1]
    stderr = run(tmp_path / "run", *options, code=2).stderr
    assert "train.png is not a picture" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("options, words", [
    ("--task t2i --model scratch --t-range 0 500", "fine-tunes a trained model"),
    ("--task t2i --t-range 0 500 --routing dtr", "train that first"), ("--num-experts 7", "evenly"),
    ("--task t2i --model scratch --encoders nowhere", "nowhere"), ("--device nonsense", "nonsense"),
    ("--task t2i --model scratch --unet sdxl", "choose from"), ("--data nowhere", "metadata.jsonl"),
    ("--task edit --model scratch", "scratch trains a base"), ("--steps many", "invalid int value"),
    ("--task t2i --t-range 0 9 --p-global 2", "--p-global"), ("--consistency -1", "--consistency"),
    ("--task edit --t-range 0 500", "train that first"), ("--loss-weight v", "predicts v already"),
    ("--task t2i --train all", "--train goes with"), ("--task translate,translate", "trains alone"),
    ("--task t2i --t-range 500 1200", "500 1200"), ("--task t2i,uncond", "trains alone"),
    ("--save-every -1", "--save-every"), ("--task t2i --t-range 5 5", "5 5"), ("--lr nan", "--lr"),
    ("--batch-size 6", "--batch-size"), ("--unet tiny", "--model scratch"),
    ("--eval-size 0", "--eval-size"), ("--task colorize", "colorize"),
    ("--model nowhere", "nowhere"), ("--projection", "--t-range"),
    ("--k 2", "--k would do nothing"), ("--alpha 2", "--alpha would do nothing"),
    ("--task t2i --top-k 2", "--top-k shapes new experts"),
    (f"--model {ASSETS / 'tiny-mtu'} --num-experts 8", "--num-experts shapes new experts")])
def test_a_mistake_is_one_line_and_exit_2(tmp_path, options, words):
    refused(words, tmp_path / "run", "--steps", 1, *options.split())
    assert not (tmp_path / "run").exists()


def test_a_base_takes_the_encoders_of_a_model_that_has_one_of_each(tmp_path):
    model = load_model(ASSETS / "tiny")
    model.text_encoder_2, model.tokenizer_2 = model.text_encoder, model.tokenizer
    network = adm.UNet2D(adm.CONFIGS["adm-tiny"])
    pixels = sample.Model(network, adm.Pixels(32), None, None, train.SCHEDULER, {})
    options = SimpleNamespace(model="scratch", unet=None, encoders="there", t_range=None)
    for base, count in ((model, 2), (pixels, 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "load_model", lambda path: base)
            with pytest.raises(hub.UserError, match=f"--encoders there has {count} text encoders"):
                train.build_model(options, ["t2i"], torch.device("cpu"))


@pytest.mark.parametrize("env, words", [
    (dict(RANK="abc"), "invalid literal"), (dict(WORLD_SIZE="2"), "MASTER_ADDR"),
    (dict(WORLD_SIZE="2", MASTER_ADDR="localhost"), "MASTER_PORT")])
def test_variables_of_torchrun_that_are_wrong_are_one_line(env, words, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    refused("torchrun's variables", tmp_path / "run")
    refused(words, tmp_path / "run")


@pytest.mark.parametrize("words", ["--task class --model scratch", "--task label"])
def test_a_folder_without_classes_is_one_line_without_torchs_remarks(words, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    refused("no picture has a label", tmp_path / "run", *words.split(), "--data", tmp_path)


# ---- processes ----

def test_accumulation_checkpointing_and_two_ranks_change_only_rounding(
        straight, two_ranks, tmp_path, monkeypatch):
    """Each rank, and each part, has two of the four tasks."""
    recomputed = spy(monkeypatch, unet, "checkpoint")
    run(tmp_path, *FOUR_TASKS, "--device-batch-size", 2, "--gradient-checkpointing")
    assert recomputed
    for other in (tmp_path, two_ranks):
        for a, b in zip(log(straight[0]), log(other), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds children in /proc")
@pytest.mark.slow
def test_a_run_of_which_a_process_dies_is_brought_back_bit_for_bit(two_ranks, tmp_path):
    words = ["torch.distributed.run", "--standalone", "--max-restarts", 1, "--nproc_per_node", 2,
             "train.py", *QUICK, "--out", tmp_path, *FOUR_TASKS]
    torchrun = subprocess.Popen([sys.executable, "-m", *map(str, words)], cwd=ROOT, text=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while torchrun.poll() is None and not (tmp_path / "state/state.safetensors").exists():
            time.sleep(0.05)
        children = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat")
                    if path.read_text().rpartition(")")[2].split()[1] == str(torchrun.pid)]
        os.kill(max(children), signal.SIGKILL)
        _, stderr = torchrun.communicate(timeout=240)
    finally:
        torchrun.kill()
    assert torchrun.returncode == 0 and "exitcode: -9" in stderr, stderr[-3000:]
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4]
    assert same_tensors(tensors(two_ranks), tensors(tmp_path))


def one_bit_apart():
    """Checkpoints and weights agree, and then they do not."""
    dist.init_process_group("gloo")
    params = dict(a=torch.arange(6.0).view(2, 3).T, b=torch.ones(5), c=torch.zeros(2))
    train.check_same_start(5, "cpu")
    train.check_same_weights(params)
    params["b"][3] += dist.get_rank() * torch.finfo().eps
    with pytest.raises(hub.UserError, match="a disk that all machines share"):
        train.check_same_start(2 + dist.get_rank(), "cpu")
    with pytest.raises(hub.UserError, match="differ between the processes, b first, 1 of 3"):
        train.check_same_weights(params)


def test_processes_say_so_where_checkpoints_or_one_bit_of_the_weights_differ():
    in_two_processes(one_bit_apart)


def in_trouble(*words):
    """The second process has a bad batch in step 2, is told to stop in step 3, or, with one step
    alone, moves one of its weights in that."""
    parameter_groups, next_batch = train.parameter_groups, train.next_batch
    groups, steps = [], iter(range(1, 9))
    def troubled(batches):
        batch, step = next_batch(batches), next(steps)
        if words[-1] == 1:
            groups[0]["params"][0].data[0] += 1e-6
        if step == 2:
            batch["noise"][:] = float("nan")
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return batch
    if os.environ["RANK"] == "1":
        train.next_batch = troubled
        train.parameter_groups = lambda *args: groups.extend(parameter_groups(*args)) or groups
    return call(*words)


def test_a_run_whose_processes_part_ends_before_it_saves(tmp_path):
    done = run(tmp_path, "--task", "sr", "--steps", 1, code=2,
               start=partial(in_two_processes, in_trouble))
    assert "differ between the processes" in done.stderr and not (tmp_path / "state").exists()


def test_what_befalls_one_process_all_do(tmp_path):
    """Also where only one of them has an x for the head."""
    words = ["--task", "label", "--drop", 0.9, "--seed", 10]
    run(tmp_path / "b", *words, "--steps", 1, "--save-every", 0)
    assert not (tmp_path / "b" / "state").exists()
    done = run(tmp_path / "a", *words, "--steps", 5, code=130,
               start=partial(in_two_processes, in_trouble))
    (alone,), rows = log(tmp_path / "b"), log(tmp_path / "a")
    assert "stopped at step 3" in done.stdout and [row["skipped"] for row in rows] == [0, 1, 1]
    assert [row["grad_norm"] is None for row in rows] == [False, True, False]
    assert tensors(tmp_path / "a", "state")["adam/step/unet.conv_in.weight"] == 2
    assert len(alone["loss"]) == 2 and alone["loss"] == pytest.approx(rows[0]["loss"], rel=1e-3)
    assert alone["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-2)


# ---- what a run logs ----

SDXL = CONFIGS["sdxl"] | dict(
    block_out_channels=(32, 64, 64), sample_size=16, attention_head_dim=(1, 2, 2),
    norm_num_groups=8, transformer_layers_per_block=(1, 1, 1), cross_attention_dim=128)
NETWORKS = {
    # Without addition_embed_type this width means nothing.
    "dense": lambda config: UNet(config | dict(addition_time_embed_dim=256)),
    "checkpointed": UNet, "upcycled": lambda config: moe.upcycle(UNet(config)),
    "routed": lambda config: add_routing(UNet(config)), "sdxl": lambda config: UNet(SDXL),
    "blocks": lambda config: merge.add_projections(UNet(config), "blocks"),
    "heads": lambda config: aggregation.add_heads(UNet(config), {"source": dict(
        kind="image", weights="zero", k=1.0)}, 4, Diffusion.from_config({})),
    "pixels": lambda config: adm.UNet2D(adm.CONFIGS["adm-tiny"]),
    "classes": lambda config: dit.DiT(dit.CONFIGS["dit-tiny"] | dict(num_embeds_ada_norm=9))}


@pytest.mark.parametrize("kind", NETWORKS)
def test_flops_are_those_of_a_step(kind):
    """They are those of a real step; the network is as it was afterwards."""
    network = NETWORKS[kind](CONFIGS["tiny"])
    network.gradient_checkpointing = kind == "checkpointed"
    task = torch.tensor([1]) if kind == "upcycled" else None
    trained = [p.requires_grad for p in network.parameters()]
    counted = [train.count_flops(network, backward) for backward in (False, True)]
    assert network.gradient_checkpointing == (kind == "checkpointed")
    assert [p.requires_grad for p in network.parameters()] == trained
    assert all(p.grad is None and p.device.type == "cpu" for p in network.parameters())
    network.gradient_checkpointing = False
    channels = network.config["in_channels"] if task is None else 8
    side = network.config["sample_size"]
    inputs = (torch.zeros(1, channels, side, side), torch.zeros(1, dtype=torch.long),
              None if kind in ("pixels", "classes") else torch.zeros(1, 77, 128), task,
              dict(text_embeds=torch.zeros(1, 1280), time_ids=torch.zeros(1, 6),
                   class_labels=torch.zeros(1, dtype=torch.long)))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        outputs = tree_leaves(network(*inputs))
        forward = counter.get_total_flops()
        sum(output.sum() for output in outputs).backward()
    assert 2 * forward < counted[1] < 3 * forward
    assert counted == [forward, counter.get_total_flops()]


def test_the_log_says_the_speed(tmp_path, monkeypatch):
    """By a clock that ticks at each look, when a step begins and when it ends."""
    ticks = iter(range(10 ** 6))
    monkeypatch.setattr(train.time, "time", lambda: next(ticks))
    monkeypatch.setattr(train, "peak_flops", lambda device, precision: 1e9)
    run(tmp_path, "--task", "sr", "--steps", 4, "--log-every", 2, "--device-batch-size", 2)
    flops = train.count_flops(load_model(tmp_path).unet, backward=True)
    assert len(log(tmp_path)) == 2
    for row in log(tmp_path):
        assert row["images_per_s"] == 4 and row["mfu"] == pytest.approx(4 * flops / 1e9, rel=1e-3)


def test_the_peak_is_that_of_the_device(monkeypatch):
    gpu = SimpleNamespace(type="cuda")
    for name, bf16, tf32 in (
            ("NVIDIA H100 PCIe", 756e12, 378e12), ("NVIDIA H200", 989e12, 494e12),
            ("NVIDIA A100-SXM4-80GB", 312e12, 156e12), ("NVIDIA A10G", None, None),
            ("NVIDIA RTX A1000 Laptop GPU", None, None), ("NVIDIA H100 NVL", None, None),
            ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert (train.peak_flops(gpu, "bf16"), train.peak_flops(gpu, "fp32")) == (bf16, tf32)
    assert train.peak_flops(torch.device("cpu"), "bf16") is None


def test_bf16_on_a_processor_without_instructions_for_it_is_remarked(monkeypatch, capsys):
    for slow, precision, remarked in ((True, "bf16", True), (True, None, False),
                                      (False, "bf16", False)):
        monkeypatch.setattr(train, "is_slow_in_bf16", lambda device, slow=slow: slow)
        args = train.get_args(["--precision", precision] if precision else [])
        train.fill_defaults(args, load_model(ASSETS / "tiny"), torch.device("cpu"))
        assert args.precision == (precision or "fp32")
        assert ("--precision fp32 is many times as fast" in capsys.readouterr().out) == remarked


def test_means_per_task_and_range_of_timesteps():
    """In the log and held out; nan where a sample has no such modality, or is not finite."""
    examples = [dict(task=task, t=t) for t in (0, 249, 250, 999) for task in ("edit", "sr")]
    terms = {"denoising": np.array([1.0, 10, 3, 30, 5, 50, 7, 70]),
             "label": np.array([1.0, np.nan, 3, 5, *[np.nan] * 4])}
    names = ["edit", "sr", "label head"]
    meter = train.Meter(names, 1000)
    for half in (slice(0, 5), slice(5, 8)):
        batch = dict(task=[e["task"] for e in examples[half]],
                     t=torch.tensor([e["t"] for e in examples[half]]))
        meter.add(batch, {name: torch.tensor(values[half]) for name, values in terms.items()})
    mean, by_range, samples = meter.read("cpu")
    assert mean == {"edit": 4.0, "sr": 40.0, "label head": 3.0} and samples == 8
    assert by_range == {"edit": [2.0, 5.0, None, 7.0], "sr": [20.0, 50.0, None, 70.0],
                        "label head": [3.0, None, None, None]}
    assert meter.read()[0] == {}


def test_a_damaged_model_is_named_before_the_first_step(tmp_path):
    model = load_model(ASSETS / "tiny")
    torch.nn.init.constant_(model.unet.conv_out.bias, float("nan"))
    model.save(tmp_path / "nan")
    refused("nan gives losses that are not finite, for t2i at t = 500", tmp_path / "run",
            "--task", "t2i", "--model", tmp_path / "nan", "--steps", 1)
    model.scheduler["beta_start"] = "x"
    model.save(tmp_path / "x")
    refused("scheduler_config.json: the scheduler", tmp_path / "run", "--task", "t2i", "--model",
            tmp_path / "x", "--steps", 1)
