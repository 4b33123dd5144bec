"""The loop: every task in every batch, exact resume, ranks and accumulation, bad input."""
import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adm
import checkpoint
import clip
import data
import joint
import merge
import moe
import sample
import train
import unet
from conftest import ROOT, called, copies, in_two_processes
from data import ALL, ASSETS, TASKS
from examples import BINS, Examples, collate, mean_by_task, mean_by_task_and_t
from routing import add_routing
from sample import Model, generate, load_model
from vae import Pixels

QUICK = ["--batch-size", "4", "--eval-size", "1", "--sample-every", "0", "--save-every", "2", "--log-every", "1", "--warmup", "1"]


def run(out, *args, ranks=1, check=True):
    words = ["train.py", *QUICK, "--out", str(out), *map(str, args)]
    ends = [called(*words)] if ranks == 1 else in_two_processes(called, *words)
    if check:
        assert not any(done.returncode for done in ends), [done.stderr[-3000:] for done in ends]
    return ends[0]


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate", functools.partial(generate, steps=1))
        done = run(out, "--task", "all", "--steps", 4, "--sample-every", 4)
    return out, done


def test_all_tasks_train_and_the_end_tells_what_to_do_next(straight):
    out, done = straight
    rows = log(out)
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and all(set(r["loss"]) == set(ALL) for r in rows)
    assert all(len(bins) == BINS for r in rows for bins in r["loss_by_t"].values())
    assert "held-out loss" in done.stdout and f"sample.py --task edit --model {out}" in done.stdout
    assert Image.open(out / "samples" / "000004.png").size == (6 * 64, (2 + 3 * 3) * 64)
    assert load_model(out).tasks == list(ALL)
    assert json.loads((out / "arguments.json").read_text())["steps"] == 4


PIXELS = ["--task", "uncond", "--model", "scratch", "--lr-schedule", "constant"]


def test_a_network_on_pixels_trains_from_scratch(tmp_path):
    """ADM's, with its learned variance."""
    run(tmp_path / "a", *PIXELS, "--eval-every", 2, "--steps", 4)
    held_out = [row for row in log(tmp_path / "a") if "held_out" in row]
    assert [row["step"] for row in held_out] == [2, 4] and held_out[1]["held_out"]["uncond"] < held_out[0]["held_out"]["uncond"]
    opens_in_diffusers(tmp_path / "a", tmp_path / "top")


def test_ddpms_network_trains_and_opens_in_diffusers(tmp_path):
    run(tmp_path / "a", *PIXELS, "--unet", "ddpm-tiny", "--steps", 1)
    opens_in_diffusers(tmp_path / "a", tmp_path / "top")


def opens_in_diffusers(out, top):
    """The same pictures there; and here from `top`, everything beside model_index.json, as google/ddpm-cifar10-32 has it."""
    from diffusers import DDPMPipeline
    ours = generate(load_model(out), "uncond", ["", ""], steps=4, seed=0)
    theirs = DDPMPipeline.from_pretrained(out)(batch_size=2, num_inference_steps=4, generator=[torch.Generator().manual_seed(s) for s in (0, 1)]).images
    assert all(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() < 1 for a, b in zip(ours, theirs))
    shutil.copytree(out / "unet", top)
    for file in (out / "scheduler" / "scheduler_config.json", out / "model_index.json"):
        shutil.copy(file, top)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(ours, generate(load_model(top), "uncond", ["", ""], steps=4, seed=0)))


def test_a_routed_run_does_not_open_in_diffusers_as_if_it_were_plain(tmp_path):
    from diffusers import DDPMPipeline
    run(tmp_path, *PIXELS, "--routing", "dtr", "--steps", 1)
    assert "routing" in load_model(tmp_path).unet.config
    with pytest.raises(Exception, match="RoutedUNet2D"):
        DDPMPipeline.from_pretrained(tmp_path)


def test_full_trains_the_whole_network_and_keeps_the_papers_layout(straight, tmp_path):
    run(tmp_path / "full", "--task", "all", "--steps", 1, "--full", "--model", straight[0])
    before, after = weights(straight[0]), weights(tmp_path / "full")
    assert before.keys() == after.keys()
    assert [k for k in before if torch.equal(before[k], after[k])] == []


def test_the_text_encoder_trains_where_asked(straight, tmp_path):
    def states(folder):
        return load_file(folder / "text_encoder" / "model.safetensors")
    run(tmp_path / "a", "--task", "all", "--steps", 1, "--train-text-encoder")
    before, after, frozen = states(ASSETS / "tiny"), states(tmp_path / "a"), states(straight[0])
    assert all(torch.equal(before[key].float(), frozen[key].float()) for key in before)
    changed = {key for key in before if not torch.equal(before[key].float(), after[key])}
    assert changed == {key for key in before if "position_ids" not in key}
    for other in (["--task", "t2i", "--t-range", 0, 500], ["--task", "label"]):
        done = run(tmp_path / "b", *other, "--train-text-encoder", check=False)
        assert done.returncode == 2 and "--train-text-encoder" in done.stderr


def test_held_out_means_per_task_and_range_of_timesteps():
    examples = [dict(task=task, t=t) for t in (0, 249, 250, 999) for task in ("edit", "sr")]
    losses = np.array([1.0, 10, 3, 30, 5, 50, 7, 70])
    assert mean_by_task(examples, losses) == {"edit": 4.0, "sr": 40.0}
    assert mean_by_task_and_t(examples, losses, 1000) == {"edit": [2.0, 5.0, None, 7.0], "sr": [20.0, 50.0, None, 70.0]}


def test_only_the_papers_list_has_changed(straight):
    before, after = load_file(ASSETS / "tiny" / "unet" / "diffusion_pytorch_model.safetensors"), weights(straight[0])
    same = [k for k in before if k in after and before[k].shape == after[k].shape and torch.equal(before[k].float(), after[k])]
    changed = [k for k in before if k not in same]
    assert changed and all(k.startswith("conv_in.") or ".norm3." in k or ".ff." in k for k in changed)
    assert any("attn1" in k for k in same) and any("resnets" in k for k in same) and "conv_out.weight" in same


def killed(at, *words):
    """A run that ends by force when half of its at-th state is written."""
    save, states = checkpoint.save_file, iter(range(1, 9))

    def half(tensors, path, **options):
        save(tensors, path, **options)
        if next(states) == at:
            os.truncate(path, path.stat().st_size // 2)
            os._exit(9)
    checkpoint.save_file = half
    called(*words)


@pytest.mark.slow
def test_runs_killed_while_they_save_go_on_from_the_last_state_bit_for_bit(straight, tmp_path):
    """Killed at the first state, that is all of it again; then twice at the second."""
    words = ["--task", "all", "--steps", "4", "--save-every", "1"]
    for at in (1, 2, 1):
        process = copies().Process(target=killed, args=(at, "train.py", *QUICK, "--out", tmp_path / "a", *words))
        process.start()
        process.join(120)
        assert process.exitcode == 9
    assert "at step 1" in run(tmp_path / "a", *words).stdout
    a, b = weights(straight[0]), weights(tmp_path / "a")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [r["step"] for r in log(tmp_path / "a")] == [1, 2, 3, 4]


@pytest.mark.parametrize("options", [
    ["--task", "t2i", "--t-range", 0, 500, "--projection"],
    ["--task", "edit,sr", "--full", "--train-text-encoder", "--workers", 2, "--top-k", 2, "--device-batch-size", 2],
    ["--task", "sr", "--routing", "dtr", "--loss-weight", "uw"],
    ["--task", "masked", "--model", "scratch", "--input", "x"],
    ["--task", "uncond", "--model", "scratch", "--workers", 1]], ids=["deme", "mtu", "dtr-uw", "masked-x", "pixels"])
def test_every_method_goes_on_from_a_checkpoint_bit_for_bit(options, tmp_path, monkeypatch):
    options = [*options, "--steps", 3, "--save-every", 1]
    run(tmp_path / "a", *options)
    save = train.save_state

    def full(*args):  # the disk, twice, after the first checkpoint
        saved.append(save(*args) if len(saved) % 2 == 0 else 0)
        if len(saved) % 2 == 0:
            raise OSError(28, "No space left on device", "state.safetensors")
    saved = []
    monkeypatch.setattr(train, "save_state", full)
    for _ in range(2):
        done = run(tmp_path / "b", *options, check=False)
        assert done.returncode == 2 and done.stderr.strip().splitlines()[-1] == "error: state.safetensors: No space left on device"
    monkeypatch.undo()
    assert "at step 2" in run(tmp_path / "b", *options).stdout
    assert not any("uncertainty" in key for key in weights(tmp_path / "b"))
    for part in ("unet", *["text_encoder"] * ("--train-text-encoder" in options), "state"):
        a, b = (load_file(next((tmp_path / x / part).glob("*.safetensors"))) for x in "ab")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert ("uw" in options) == ("ema/uncertainty.s" in a) and (a.get("param/uncertainty.s", torch.ones(8)) != 0).sum() > 1
    a, b = ([{k: row[k] for k in ("step", "loss", "grad_norm")} for row in log(tmp_path / x)] for x in "ab")
    assert a == b


def test_an_option_younger_than_the_run_was_not_in_use(straight, tmp_path):
    out = shutil.copytree(straight[0], tmp_path / "a")
    state = out / "state" / "state.safetensors"
    with safe_open(state, "pt") as f:
        scalars = json.loads(f.metadata()["scalars"])
        for name in ("train_text_encoder", "top_k"):
            del scalars["settings"][name]
        save_file({key: f.get_tensor(key) for key in f.keys()}, tmp_path / "older", metadata=dict(scalars=json.dumps(scalars)))
    (tmp_path / "older").rename(state)
    assert "is finished" in run(out, "--task", "all", "--steps", 4).stdout
    assert "--top-k was None, is now 2" in run(out, "--task", "all", "--steps", 4, "--top-k", 2, check=False).stderr


def test_a_checkpoint_cut_short_is_named_and_nothing_is_written(straight, tmp_path):
    out = shutil.copytree(straight[0], tmp_path / "a")
    state = out / "state" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = run(out, "--task", "all", "--steps", 4, check=False)
    assert done.returncode == 2 and "state.safetensors cannot be read" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.fixture
def interruptible():
    """-> the two signals' handlers, which are Python's own, also where the tests run in the background."""
    handlers = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield handlers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_bit_for_bit(straight, tmp_path, monkeypatch, interruptible, number):
    told, factor = [], train.lr_factor

    def telling(step, args):
        if step == 2 and not told:
            told.append(signal.raise_signal(number))
        return factor(step, args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "lr_factor", telling)
        done = run(tmp_path / "a", "--task", "all", "--steps", 4, "--save-every", 100, check=False)
    assert done.returncode == 130 and "stopped at step 3, saved in" in done.stdout and "held-out loss" not in done.stdout
    assert signal.getsignal(number) == interruptible[number]
    assert "at step 3" in run(tmp_path / "a", "--task", "all", "--steps", 4, "--save-every", 100).stdout
    a, b = weights(straight[0]), weights(tmp_path / "a")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_an_ignored_signal_stays_ignored(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with checkpoint.stoppable() as told:
        signal.raise_signal(signal.SIGINT)
        assert not told


def test_at_a_second_interrupt_a_run_ends_at_once(interruptible):
    with pytest.raises(KeyboardInterrupt), checkpoint.stoppable() as told:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):  # torchrun's are no second time
            signal.raise_signal(number)
        assert len(told) == 3
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("bad", [[2], [1, 2, 3]])
def test_steps_that_are_not_finite_change_nothing_and_three_in_a_row_end_the_run(tmp_path, monkeypatch, bad):
    per_sample, calls = train.per_sample_loss, iter(range(100))

    def broken(denoiser, encode, model, batch, device):
        losses, weighted = per_sample(denoiser, encode, model, batch, device)
        factor = torch.ones(len(losses))
        if torch.is_grad_enabled() and next(calls) in bad:
            factor[1] = float("nan")  # the batch's second task is edit
        return losses * factor, weighted * factor
    monkeypatch.setattr(train, "per_sample_loss", broken)
    done = run(tmp_path / "a", "--task", "all", "--steps", 5, "--save-every", 1, check=False)
    rows = log(tmp_path / "a")
    assert load_model(tmp_path / "a").tasks == list(ALL) and all(v.isfinite().all() for v in weights(tmp_path / "a").values())
    if bad == [2]:
        assert done.returncode == 0 and [row["skipped"] for row in rows] == [0, 0, 1, 1, 1] and rows[2]["grad_norm"] is None
        assert all(np.isfinite(value) for row in rows for value in row["loss"].values())
    else:
        assert done.returncode == 2 and "edit at timestep" in done.stderr and "at step 3" in done.stderr and len(rows) == 3
        state = load_file(tmp_path / "a" / "state" / "state.safetensors")
        assert {int(v) for k, v in state.items() if k.startswith("adam/step/")} == {1}


def test_steps_after_the_checkpoint_leave_the_log(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(dict(step=i)) + "\n" for i in (10, 20, 30)))
    train.forget_after(log, 20)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [10, 20]


def test_a_latent_does_not_depend_on_what_else_is_kept():
    dataset, vae = data.builtin("t2i", "train"), load_model(ASSETS / "tiny").vae
    pictures = [dataset[i]["target"] for i in range(0, 40, 2)]
    fresh, warm = data.Encoder(vae), data.Encoder(vae)
    for n in (3, 7):
        warm.moments(pictures[n:n + 2], "cpu")
    assert all(torch.equal(a, b) for a, b in zip(fresh.moments(pictures, "cpu"), warm.moments(pictures, "cpu")))


def test_a_foreign_model_is_not_overwritten(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    done = run(tmp_path, "--task", "all", "--steps", 1, check=False)
    assert done.returncode == 2 and str(tmp_path) in done.stderr and [f.name for f in tmp_path.iterdir()] == ["model_index.json"]


def test_a_mistake_in_a_worker_process_is_one_line_too(tmp_path):
    lines = [dict(file_name=f"{i}.png", split=split) for i, split in enumerate(["train"] + ["heldout"])]
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = run(tmp_path / "run", "--task", "sr", "--steps", 1, "--data", tmp_path, "--workers", 1, check=False)
    assert done.returncode == 2 and "0.png" in done.stderr and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


def test_a_finished_run_says_so_and_a_changed_setting_is_refused(straight):
    out, _ = straight
    before = (out / "log.jsonl").read_text()
    assert "is finished" in run(out, "--task", "all", "--steps", 4).stdout
    done = run(out, "--task", "all", "--steps", 4, "--lr", "0.5", check=False)
    assert done.returncode == 2 and "--lr" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert (out / "log.jsonl").read_text() == before


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "all"
    run(out, "--task", "all", "--steps", 4, ranks=2)
    return out


def test_accumulation_checkpointing_and_two_ranks_change_only_rounding(straight, two_ranks, tmp_path, monkeypatch):
    """Each rank, and each part, has two of the four tasks."""
    again, checkpointed = unet.checkpoint, []
    monkeypatch.setattr(unet, "checkpoint", lambda *args, **options: checkpointed.append(0) or again(*args, **options))
    run(tmp_path / "micro", "--task", "all", "--steps", 4, "--device-batch-size", 2, "--gradient-checkpointing")
    assert checkpointed
    for other in (tmp_path / "micro", two_ranks):
        for a, b in zip(log(straight[0]), log(other)):
            assert all(abs(a["loss"][t] - b["loss"][t]) < 1e-3 * a["loss"][t] for t in ALL) and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-2


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds a process's children in /proc")
@pytest.mark.slow
def test_a_run_of_which_a_process_dies_is_brought_back_bit_for_bit(two_ranks, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1", "--nproc_per_node", "2"]
    going = subprocess.Popen([*launch, "train.py", *QUICK, "--out", tmp_path / "a", "--task", "all", "--steps", "4"], cwd=ROOT, text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while going.poll() is None and not (tmp_path / "a" / "state" / "state.safetensors").exists():
            time.sleep(0.05)
        children = [int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat")
                    if stat.read_text().rpartition(")")[2].split()[1] == str(going.pid)]
        os.kill(max(children), signal.SIGKILL)
        _, told = going.communicate(timeout=120)
    finally:
        going.kill()
    assert going.returncode == 0 and "exitcode: -9" in told, told[-3000:]
    assert [row["step"] for row in log(tmp_path / "a")] == [1, 2, 3, 4]
    a, b = weights(two_ranks), weights(tmp_path / "a")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_batch_is_a_function_of_seed_step_and_index():
    def batch(seed, size, workers=0):
        sets = {task: data.builtin(task, "train") for task in ALL}
        examples = Examples(sets, size, seed, 1000, (4, 16, 16))
        loader = torch.utils.data.DataLoader(examples, batch_sampler=[range(size, 2 * size)], collate_fn=collate, num_workers=workers)
        return next(iter(loader))

    a, b, c = batch(0, 8), batch(0, 8, workers=1), batch(1, 8)
    assert a["task"] == [*ALL] * 2
    for key in ("noise", "t", "target", "sample_noise", "keep"):
        assert torch.equal(a[key], b[key])
    assert a["prompt"] == b["prompt"] != c["prompt"] and not torch.equal(a["noise"], c["noise"])


def test_a_task_named_twice_has_two_shares(tmp_path, monkeypatch):
    sets, shares = {task: data.builtin(task, "train") for task in ("edit", "sr")}, ["edit", "edit", "sr"]
    examples = Examples(sets, 6, 0, 1000, (4, 16, 16), shares=shares)
    assert [examples[i]["task"] for i in range(6)] == shares * 2
    trained, real = [], train.per_sample_loss
    monkeypatch.setattr(train, "per_sample_loss", lambda *a: trained.append(a[3]["task"]) or real(*a))
    run(tmp_path, "--task", "edit,edit,sr", "--steps", 1, "--batch-size", 3, "--num-experts", 1)
    assert trained == [shares] and load_model(tmp_path).tasks == ["edit", "sr"] and log(tmp_path)[0]["loss"].keys() == {"edit", "sr"}
    assert train.total_loss(torch.tensor([1.0, 2.0, 5.0]), 2, 3) == 2 / 3 * (1 + 2) + 2 / 3 * 5


def test_a_text_encoder_from_a_folder_takes_the_models_place(tmp_path):
    """Frozen, also from scratch, but with --train-text-encoder; refused where its states are not as wide as the cross-attention."""
    tokenizer = clip.Tokenizer.train(["a red apple"] * 3, vocab_size=514)
    tower = clip.CLIPText(clip.tiny_config(tokenizer))
    tower.save_pretrained(tmp_path / "given" / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "given" / "tokenizer")
    common = ("--steps", 1, "--text-encoder", tmp_path / "given")
    run(tmp_path / "scratch", "--task", "t2i", "--model", "scratch", *common)
    run(tmp_path / "tuned", *common)
    run(tmp_path / "trained", "--train-text-encoder", *common)
    for name in ("scratch", "tuned", "trained"):
        model = load_model(tmp_path / name)
        same = all(torch.equal(v, tower.state_dict()[k]) for k, v in model.text_encoder.state_dict().items())
        assert model.tokenizer.vocab == tokenizer.vocab and same == (name != "trained")
    for wrong, words in ((dict(hidden_size=64), "64 wide"), (dict(vocab_size=300), "more ids"), (dict(max_position_embeddings=64), "positions")):
        clip.CLIPText(tower.config | wrong).save_pretrained(tmp_path / "given" / "text_encoder")
        done = run(tmp_path / "wrong", *common, check=False)
        assert done.returncode == 2 and words in done.stderr and not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("task", TASKS)
def test_conditioning_dropout_has_the_stated_rates(task):
    examples = Examples({task: None}, 8, 0, 1000, (4, 16, 16))
    seen = [examples.condition(dict(prompt="words", target=None), task, r) for r in np.linspace(0, 1, 2000, endpoint=False)]
    text, both, image = TASKS[task].drop
    none = [(e["prompt"] == "", e["keep"] == 0) for e in seen]
    for case, rate in (((True, False), text), ((True, True), both), ((False, True), image)):
        assert abs(np.mean([n == case for n in none]) - rate) < 0.002


def small(kind):
    """-> a denoiser, and a batch that is large enough for two threads."""
    levels = dict(sample_size=8, block_out_channels=(64,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
    model, (B, C, side) = replace(load_model(ASSETS / "tiny"), unet=unet.UNet(unet.CONFIGS["tiny"] | levels)), (520, 4, 1)
    if kind == "linear":
        levels = dict(block_out_channels=(32, 64), down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
                      up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), num_class_embeds=11)
        model, (B, C, side) = Model(adm.UNet2D(adm.CONFIGS["adm-tiny"] | levels), Pixels(32), None, None, train.ADM_SCHEDULER, {}), (260, 3, 2)
    if kind == "classifier":
        B, side = 16, 8
    (x0, noise, source), task, text = torch.randn(3, B, C, side, side), torch.arange(B) % 4, torch.randn(B, 1, 128) if model.texts else None
    if kind == "mtu":
        denoiser = train.Denoiser(add_routing(moe.upcycle(model.unet)), None, model.diffusion, "uw")
    elif kind == "deme":
        teacher = copy.deepcopy(model.unet).requires_grad_(False)
        denoiser, source = train.Denoiser(merge.add_projections(model.unet), None, model.diffusion, "none", teacher, 1.0), None
    else:
        joint.attach(model, "translate" if kind == "image" else "label", kind, "x" if kind == "image" else "z", "vanishing")
        x = source if kind == "image" else task
        denoiser, source = joint.Denoiser(model), dict(E=source[None], x={name: x for name in model.heads}, given=(task > 0)[None].float())
    with torch.no_grad():
        for p in denoiser.parameters():  # those that start at zero keep gradients from others
            p += 0.02 * torch.randn_like(p)
    return denoiser, (x0, source, text, torch.arange(B) * 37 % 1000, noise, task)


def operations(tensor):
    """The names of what is differentiated."""
    seen, left = set(), [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
    return {node.name() for node in seen}


@pytest.mark.parametrize("kind", ["mtu", "deme", "image", "classifier", "linear"])
def test_two_threads_give_the_same_gradients_each_time(kind):
    """Of DTR on MTU, DeMe and MT-Diffusion's heads. Not so advanced indexing's, table[task], by chance: it is refused by name."""
    denoiser, batch = small(kind)
    params, threads = [p for p in denoiser.parameters() if p.requires_grad], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        losses = [denoiser(*batch)[1].sum() for _ in range(2)]
        first, second = (torch.autograd.grad(loss, params) for loss in losses)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(first, second))
    assert not {"IndexBackward0", "IndexPutBackward0", "PutBackward0", "TakeBackward0"} & (found := operations(losses[0])) and len(found) > 9


def test_the_loss_is_the_sum_over_tasks_of_each_tasks_mean():
    """MTU Eq. 2, whole and in parts."""
    losses = torch.tensor([1.0, 10.0, 3.0, 30.0, 5.0, 50.0])  # of tasks A, B, A, B, A, B
    whole = train.total_loss(losses, 2, 6)
    assert whole == (1 + 3 + 5) / 3 + (10 + 30 + 50) / 3
    assert whole == sum(train.total_loss(losses[i:i + 2], 2, 6) for i in (0, 2, 4))


def test_a_samples_loss_is_the_mean_square_of_what_is_missing():
    """On a model whose loss is known: a zero prediction leaves the target's own square."""
    model = load_model(ASSETS / "tiny")
    model.unet.forward = lambda x, t, context, task=None, added=None: torch.zeros_like(x[:, :4])
    denoiser = train.Denoiser(model.unet, model.text_encoder, model.diffusion, loss_weight="p2")
    x0, noise, t = torch.randn(8, 4, 16, 16), torch.randn(8, 4, 16, 16), torch.arange(8)
    losses, weighted = denoiser(x0, None, model.tokenizer([""] * 8), t, noise, torch.zeros(8, dtype=torch.long))
    assert torch.allclose(losses, model.diffusion.target(x0, noise, t).square().mean((1, 2, 3)))
    assert torch.allclose(weighted, losses * model.diffusion.weight(t, "p2"))


def test_consistency_is_towards_the_frozen_pretrained_network():
    """DeMe Eq. 5: nothing at the start; afterwards the distance of the two outputs, with its weight, and no gradient into the teacher."""
    model = load_model(ASSETS / "tiny")
    teacher = copy.deepcopy(model.unet).requires_grad_(False)
    denoiser = train.Denoiser(model.unet, None, model.diffusion, teacher=teacher, consistency=3.0)
    x0, noise, t, text = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 77, 128)
    losses, weighted = denoiser(x0, None, text, t, noise, None)
    assert torch.equal(losses, weighted)
    with torch.no_grad():
        model.unet.conv_out.bias += 0.5
    losses, weighted = denoiser(x0, None, text, t, noise, None)
    assert torch.allclose(weighted - losses, torch.full((2,), 3 * 0.25), atol=1e-4)
    weighted.sum().backward()
    assert all(p.grad is None for p in teacher.parameters()) and model.unet.conv_in.weight.grad.abs().max() > 0


def test_a_range_is_trained_and_saved_without_projections(tmp_path):
    """The folder is an ordinary Stable Diffusion."""
    run(tmp_path / "a", "--task", "t2i", "--t-range", 0, 250, "--p-global", 0, "--projection", "--steps", 2)
    assert all(bins["t2i"][0] is not None and bins["t2i"][1:] == [None] * 3 for bins in (r["loss_by_t"] for r in log(tmp_path / "a")))
    a, base = weights(tmp_path / "a"), weights(ASSETS / "tiny")
    assert a.keys() == base.keys() and any((a[k] - base[k].float()).abs().max() > 1e-4 for k in a)
    state = load_file(tmp_path / "a" / "state" / "state.safetensors")
    projections = [k for k in state if k.startswith("param/") and k.endswith(".projection")]
    assert len(projections) == 15 and all((state[k] - torch.eye(len(state[k]))).abs().max() > 0 for k in projections)
    assert load_model(tmp_path / "a").tasks == ["t2i"]


def test_antithetic_timesteps_mirror_each_other_in_a_batch():
    examples = Examples({"t2i": data.builtin("t2i", "train")}, 8, 0, 1000, (4, 16, 16), (250, 500), 0.5, antithetic=True)
    batches = [[examples[step * 8 + k]["t"] for k in range(8)] for step in range(12)]
    for t in batches:
        assert {a + b for a, b in zip(t[:4], t[4:])} in ({749}, {999})
    assert {sum(t) for t in batches} == {4 * 749, 4 * 999} and len({tuple(t) for t in batches}) == 12


def test_the_official_projections_stay_and_are_merged_with(tmp_path):
    """The copies' own class keeps diffusers from opening them; the merged model has W = I + sum of w_i (W_i - I)."""
    options = ["--task", "t2i", "--decouple", 2, "--steps", 1, "--eval-size", 4, "--lr", 1e-3, "--projection", "blocks"]
    run(tmp_path / "deme", *options)
    told, name = json.loads((tmp_path / "deme/merge.json").read_text()), "up_blocks.1.projection.weight"
    copies, merged = [weights(tmp_path / f"deme/range-{i}")[name] for i in range(2)], weights(tmp_path / "deme/merged")[name]
    start = torch.eye(len(merged))[:, :, None, None]
    assert not torch.equal(copies[0], start) and not torch.equal(copies[0], copies[1])
    assert torch.allclose(merged, start + sum(w * (c - start) for w, c in zip(told["weights"], copies)), atol=1e-6)
    index = json.loads((tmp_path / "deme/merged/model_index.json").read_text())
    assert index["_class_name"] == "ProjectedPipeline" and index["unet"] == ["diffusers", "ProjectedUNet"]
    model = load_model(tmp_path / "deme/merged")
    assert torch.equal(model.unet.get_parameter(name), merged)
    assert called("sample.py", "--export", "t2i", "--export-to", tmp_path / "x", "--model", tmp_path / "deme/merged").returncode == 2


def test_deme_as_a_whole(tmp_path, monkeypatch):
    """Copies, search, table and merged model from one command, for the model's own task; interrupted, it trains nothing anew."""
    options = ["--model", ASSETS / "tiny", "--decouple", 2, "--steps", 1, "--eval-size", 4, "--lr", 1e-3, "--projection"]

    def interrupted(where, name, at):
        real, calls = getattr(where, name), []

        def call(*args, **options):
            calls.append(args)
            if len(calls) == at:
                raise KeyboardInterrupt
            return real(*args, **options)
        monkeypatch.setattr(where, name, call)
    interrupted(train, "open_data", 2)  # the second copy's
    interrupted(train.merge, "search_weights", 1)
    assert [run(tmp_path / "deme", *options, check=False).returncode for _ in range(2)] == [130, 130]
    monkeypatch.undo()
    done = run(tmp_path / "deme", *options)
    assert done.stdout.count("is finished") == 2
    told = json.loads((tmp_path / "deme/merge.json").read_text())
    assert told["ranges"] == [[0, 500], [500, 1000]] and len(told["weights"]) == 2 and "ensemble (Eq. 7)" in done.stdout
    losses = told["losses"]
    assert losses["ensemble (Eq. 7)"][:2] == [losses["copy 0"][0], losses["copy 1"][1]]
    copies = [weights(tmp_path / f"deme/range-{i}") for i in range(2)]
    base, merged = weights(ASSETS / "tiny"), weights(tmp_path / "deme/merged")
    for key in ("conv_in.weight", "mid_block.resnets.0.conv2.bias"):
        expected = base[key].float() + sum(w * (c[key] - base[key].float()) for w, c in zip(told["weights"], copies))
        assert torch.allclose(merged[key], expected, atol=1e-6) and not torch.equal(copies[0][key], copies[1][key])
    assert "finished" in run(tmp_path / "deme", *options).stdout and json.loads((tmp_path / "deme/merge.json").read_text()) == told
    model = load_model(tmp_path / "deme/merged")
    assert model.tasks == ["t2i"]
    pipe = pytest.importorskip("diffusers").StableDiffusionPipeline.from_pretrained(tmp_path / "deme/merged", low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("red apple", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(3)).images[0]
    ours = generate(model, "t2i", ["red apple"], guidance=3.0, steps=2, seed=3)[0]
    assert np.abs(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)).mean() < 1
    for given, code in (((0, 1), 0), ((1, 0), 2), ((0,), 2), ((0, 2), 2)):  # in order; swapped; one of two; a missing one
        drawn = called("sample.py", "--task", "t2i", "--model", ASSETS / "tiny", "--steps", 1, "--out", tmp_path / "a.png", "--ensemble",
                       *[tmp_path / f"deme/range-{i}" for i in given])
        assert drawn.returncode == code and drawn.stderr.count("error:") == (code > 0), drawn.stderr


def test_encoding_follows_the_tasks_rules():
    vae = load_model(ASSETS / "tiny").vae
    pictures = [data.builtin("edit", "heldout")[i]["source"] for i in (0, 5)]
    batch = dict(target=torch.stack(pictures), source=[None, pictures[0]], sample_noise=torch.randn(2, 4, 16, 16), keep=torch.tensor([1.0, 1.0]))
    encode = data.Encoder(vae)
    x0, source = encode(batch, "cpu")
    again = encode(batch, "cpu")  # from what was kept
    mean, logvar = vae.encode(torch.stack(pictures))
    assert torch.allclose(x0, vae.config["scaling_factor"] * (mean + (logvar / 2).exp() * batch["sample_noise"]), atol=1e-5)
    assert source[0].abs().max() == 0 and torch.allclose(source[1], mean[0], atol=1e-5)
    assert torch.equal(again[0], x0) and torch.equal(again[1], source)
    assert encode({**batch, "keep": torch.tensor([1.0, 0.0])}, "cpu")[1].abs().max() == 0


def test_no_weight_decay_on_norms_biases_and_rows_of_tasks():
    unet = moe.upcycle(load_model(ASSETS / "tiny").unet)
    decayed, kept = ({id(p) for p in group["params"]} for group in train.parameter_groups(unet, 0.1, 1e-3)[:2])
    names = {id(p): n for n, p in unet.named_parameters()}
    assert all(".ff." in names[i] and names[i].endswith("weight") for i in decayed)
    assert {n for i, n in names.items() if i in kept} >= {"conv_in.weight", "task_embedding.weight", "mid_block.attentions.0.transformer_blocks.0.norm3.weight"}


def test_an_upcycled_network_computes_the_same_in_channels_last():
    unet = moe.upcycle(load_model(ASSETS / "tiny").unet)
    inputs = torch.randn(2, 8, 16, 16), torch.tensor([5, 900]), torch.randn(2, 77, unet.config["cross_attention_dim"])
    before = unet(*inputs, task=torch.tensor([1, 3]))
    train.channels_last(unet)
    assert unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last) and not unet.conv_out.weight.is_contiguous()
    assert torch.allclose(unet(*inputs, task=torch.tensor([1, 3])), before, atol=1e-4)


def test_own_pictures_from_a_folder(tmp_path):
    rows = []
    for split in ("train", "heldout"):
        for i in range(2):
            for name in (f"{split}{i}.png", f"s{split}{i}.png"):
                Image.fromarray(np.random.default_rng(i).integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(tmp_path / name)
            rows.append(dict(file_name=f"{split}{i}.png", source_file_name=f"s{split}{i}.png", text="make it new", split=split))
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(tmp_path / "run", "--task", "edit,sr", "--steps", 1, "--data", tmp_path)
    assert load_model(tmp_path / "run").tasks == ["edit", "sr"]


def test_from_scratch_makes_a_folder_that_diffusers_opens(tmp_path):
    run(tmp_path / "base", "--task", "t2i", "--model", "scratch", "--steps", 1)
    assert load_model(tmp_path / "base").tasks == ["t2i"]
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "base", low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("x", num_inference_steps=1).images[0].size == (64, 64)


@pytest.mark.parametrize("arguments, words", [
    (["--task", "colorize"], "colorize"), (["--model", "nowhere"], "nowhere"), (["--task", "edit", "--model", "scratch"], "scratch"),
    (["--batch-size", "6"], "--batch-size"), (["--data", "nowhere"], "metadata.jsonl"), (["--num-experts", "7"], "evenly"),
    (["--device", "nonsense"], "nonsense"), (["--task", "translate,translate"], "that goes alone"), (["--task", "label", "--text-encoder", "x"], "--text-encoder"),
    (["--task", "t2i", "--t-range", "0", "500", "--text-encoder", "x"], "--consistency 0"), (["--text-encoder", "nowhere"], "nowhere"),
    (["--task", "t2i", "--decouple", "2", "--text-encoder", "x"], "its text encoder"), (["--eval-size", "0"], "--eval-size"),
    (["--task", "t2i", "--t-range", "500", "1200"], "500 1200"), (["--task", "t2i", "--t-range", "5", "5"], "5 5"),
    (["--task", "t2i", "--t-range", "0", "10", "--p-global", "2"], "share"), (["--projection"], "--t-range"), (["--antithetic"], "--t-range"),
    (["--task", "edit", "--t-range", "0", "500"], "train that first"), (["--decouple", "0"], "timestep ranges"), (["--decouple", "40"], "--eval-size 80"),
    (["--decouple", "2", "--model", "scratch"], "pretrained"), (["--task", "t2i", "--model", "scratch", "--t-range", "0", "500"], "scratch trains the base"),
    (["--consistency", "-1"], "consistency"), (["--save-every", "-1"], "--save-every"), (["--bench", "--decouple", "2"], "--bench"),
    (["--bench", "--steps", "0"], "--steps"), (["--task", "t2i", "--decouple", "2", "--save-every", "0"], "saves")])
def test_a_mistake_is_one_line_and_exit_2(tmp_path, arguments, words):
    done = run(tmp_path / "run", "--steps", 1, *arguments, check=False)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
