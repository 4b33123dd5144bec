"""merge.py: ranges, projections, and the algebra of merging on tensors and folders.

How timesteps are drawn (Eq. 6), task vectors, their sum (Eq. 8) and a projection that folds are
exercises 13 to 15, whose properties test_exercises.py checks in merge.py itself.
"""
import copy
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_mistake, call, full_disk, same_tensors
from PIL import Image
from safetensors.torch import load_file, save_file

import adm
import hub
import merge
import train
from clip import CLIPText, Tokenizer
from diffusion import Diffusion
from hub import UserError, read_json, write_json
import sample
from merge import search_weights, task_vector, timestep_ranges
from sample import generate, load_model
from unet import CONFIGS, UNet
from vae import VAE

SMALL = dict(CONFIGS["tiny"], block_out_channels=(32, 64, 64), cross_attention_dim=24)
# One level, for the tests of folders: the fewer tensors, the faster.
FLAT = dict(SMALL, block_out_channels=(32,), norm_num_groups=8, attention_head_dim=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
PIXELS = adm.CONFIGS["adm-tiny"] | dict(num_class_embeds=None, sample_size=16)
WORDS = ("!", "a", "b", "ab", "ba", "<|startoftext|>", "<|endoftext|>")
TOKENIZER = Tokenizer({word: i for i, word in enumerate(WORDS)}, [("a", "b"), ("b", "a")])
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"


def models(n, dtype=torch.float32):
    """A base and n others: state dicts with an integer tensor."""
    g = torch.Generator().manual_seed(0)
    return [dict(w=torch.randn(5, 7, generator=g).to(dtype),
                 b=torch.randn(3, generator=g).to(dtype),
                 steps=torch.arange(4)) for _ in range(n + 1)]


def combined(base, tuned, weights):
    return merge.merge(base, [task_vector(base, t) for t in tuned], weights)


# ---- ranges and timesteps ----

@pytest.mark.parametrize("T, n", [(1000, 1), (1000, 4), (1000, 3), (1000, 8), (10, 10), (7, 3)])
def test_ranges_cover_all_timesteps_once_and_agree_with_the_ensemble(T, n):
    ranges = timestep_ranges(T, n)
    numbers = [i for i, (start, end) in enumerate(ranges) for _ in range(start, end)]
    assert numbers == [t * n // T for t in range(T)]
    assert timestep_ranges(1000, 4) == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    with pytest.raises(UserError, match="from 1 to 1000"):
        timestep_ranges(1000, 0)


def test_consistency_is_one_mean_square_per_sample():
    a = torch.zeros(3, 4, 8, 8)
    b = a + torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)
    assert merge.consistency_loss(a.bfloat16(), b).tolist() == [0, 1, 4]


# ---- projections ----

def test_projections_start_as_the_identity_train_and_fold():
    torch.manual_seed(0)
    unet = UNet(SMALL)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 24)
    before = unet(*inputs)
    names = set(unet.state_dict())
    merge.add_projections(unet)
    added = set(unet.state_dict()) - names
    resnets, samplers = 3 + 2 + 6, 2 + 2
    assert len(added) == resnets + samplers
    assert all(name.endswith(".projection") for name in added)
    assert torch.allclose(unet(*inputs), before, atol=1e-5)

    unet(*inputs).square().mean().backward()
    assert all(unet.get_parameter(name).grad.abs().max() > 0 for name in added)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if name in added or name.endswith("bias"):
                p.add_(0.2 * torch.randn_like(p))
    after = unet(*inputs)
    folded = merge.fold_projections(unet)
    assert (after - before).abs().max() > 0.1
    assert set(folded.state_dict()) == names
    assert torch.allclose(folded(*inputs), after, atol=1e-5 * after.abs().max().item())
    assert set(unet.state_dict()) == names | added  # the original is as it was


@pytest.mark.parametrize("make", [lambda: UNet(SMALL), lambda: adm.UNet2D(PIXELS)])
def test_projections_after_blocks_spare_the_skips(make, tmp_path):
    torch.manual_seed(0)
    unet = make().eval()
    x, t, text = torch.randn(2, unet.config["in_channels"], 16, 16), torch.tensor([3, 900]), None
    if type(unet) is UNet:
        text = torch.randn(2, 5, 24)
    before = unet(x, t, text)
    names = set(unet.state_dict())

    def first_block():
        cond = unet.condition(x, t, text, None, None)
        skips = []
        return unet.down_blocks[0](unet.conv_in(x, cond), cond, skips), skips

    skips = first_block()[1]
    merge.add_projections(unet, "blocks")
    added = set(unet.state_dict()) - names
    assert len(added) == len(unet.down_blocks) + 1 + len(unet.up_blocks)
    assert torch.equal(unet(x, t, text), before)
    with torch.no_grad():
        for name in added:
            p = unet.get_parameter(name)
            assert torch.equal(p[:, :, 0, 0], torch.eye(len(p)))
            p.mul_(2)
    out, after = first_block()
    assert len(skips) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(skips, after))
    assert torch.allclose(out, 2 * after[-1])
    assert (unet(x, t, text) - before).abs().max() > 1e-3
    with pytest.raises(UserError, match="plain U-Net"):
        merge.add_projections(unet, "blocks")

    unet.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["_class_name"] == f"Projected{type(unet).__name__}"
    with pytest.raises(UserError, match="Projected"):
        type(unet).from_pretrained(tmp_path, "")
    again = merge.add_projections(make(), config["projections"]).eval()
    hub.load_weights(again, tmp_path)
    assert torch.equal(again(x, t, text), unet(x, t, text))


def test_projections_after_blocks_number_as_the_paper_says_in_sd15():
    with torch.device("meta"):
        unet = merge.add_projections(UNet(CONFIGS["sd15"]), "blocks")
    sizes = {name: p.numel() for name, p in unet.named_parameters()}
    # + 1.06 % of 868.7M
    assert sum(size for name, size in sizes.items() if ".projection." in name) == 9_216_000


# ---- the algebra ----

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_the_last_rounding(dtype):
    base, *tuned = models(4, dtype)
    out = combined(base, tuned, [0.25] * 4)["w"]
    exact = base["w"].double()
    exact = exact + sum(0.25 * (copy["w"].double() - base["w"].double()) for copy in tuned)
    assert out.dtype == dtype
    assert torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("b"), "the shape of b is none, in the base"),
    (lambda s: s.update(extra=torch.ones(1)), "the shape of extra .* in the base none"),
    (lambda s: s.update(w=torch.ones(2, 2)), "the shape of w"),
    (lambda s: s.update(steps=torch.arange(4) + 1), "steps"),
    (lambda s: s.update(b=torch.arange(3)), "b holds"),
    (lambda s: s.update(steps=torch.arange(4.0)), "steps")])
def test_a_tensor_without_an_average_is_named(change, words):
    base, tuned = models(1)
    change(tuned)
    with pytest.raises(UserError, match=words):
        task_vector(base, tuned)


def test_vectors_belong_to_the_base_and_have_a_weight_each():
    base, *tuned = models(2)
    for change in (dict(w=None), dict(b=torch.zeros(1)), dict(c=torch.zeros(3))):
        vector = task_vector(base, tuned[0]) | change
        vector = {key: value for key, value in vector.items() if value is not None}
        with pytest.raises(UserError, match="task vector"):
            merge.merge(base, [vector], [1.0])
    for weights in ([1.0], [1.0, 2.0, 3.0], [1.0, float("nan")]):
        with pytest.raises(UserError, match="one finite weight for each"):
            combined(base, tuned, weights)


# ---- the search ----

def test_the_search_finds_the_best_weights_of_the_grid():
    calls = []

    def score(w):
        calls.append(w)
        return (w[0] - 0.31) ** 2 + (w[1] - 0.78) ** 2 + 0.5 * (w[0] - 0.31) * (w[1] - 0.78)

    best, value = search_weights(score, 2)
    assert len(set(calls)) == len(calls)  # nothing is scored twice
    assert best == (0.3, 0.8)
    assert value == score(best)
    assert search_weights(lambda w: 1.0, 3)[0] == (1 / 3,) * 3  # what does not help is left
    assert search_weights(lambda w: float("nan") if w[0] > 0.2 else w[0], 1)[0] == (0.0,)
    assert search_weights(lambda w: -sum(w), 2)[0] == (1.0, 1.0)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_reported_loss_has_been_seen_by_the_search(seed):
    examples = [dict(task=task, t=t, number=t + (task == "edit")) for t in range(5, 1000, 50)
                for task in ("t2i", "edit")]
    calls = []

    def rows(weights, numbers):
        # Each example prefers weights of its own.
        numbers = np.array(numbers)
        return (np.dot(weights, [1, 2]) - numbers % 7 / 3) ** 2 + numbers

    def losses(weights, part):
        calls.append([example["number"] for example in part])
        return rows(weights, calls[-1])

    weights, t, arms = merge.compare_arms(losses, examples, 2, 1000, seed)
    searched, reported = calls[0], calls[-1]
    assert sorted(searched + reported) == sorted(example["number"] for example in examples)
    assert all(numbers in (searched, reported) for numbers in calls)
    assert t.tolist() == [number // 5 * 5 for number in reported]
    # Both halves have as many examples of each task in each fifth of the timesteps.
    for half in (searched, reported):
        counts = Counter((number // 200, number % 5) for number in half)
        assert list(counts.values()) == [2] * 10

    assert weights == search_weights(lambda w: rows(w, searched).mean(), 2)[0]
    expected = {"before": (0, 0), "copy 0": (1, 0), "copy 1": (0, 1),
                "merged, 1/N each": (0.5, 0.5), "merged, searched": weights}
    for arm, w in expected.items():
        assert np.array_equal(arms[arm], rows(w, reported)), arm
    ensemble = np.where(t < 500, arms["copy 0"], arms["copy 1"])
    assert np.array_equal(arms["ensemble (Eq. 7)"], ensemble)
    assert not np.array_equal(t, merge.compare_arms(losses, examples, 2, 1000, seed + 1)[1])


# ---- folders ----

def edit(file, **changes):
    """Change keys of a JSON file, which may be new."""
    old = read_json(file) if file.exists() else {}
    write_json(file, old | changes)


def edit_tensors(file, **changes):
    """Change tensors of a file; None removes one."""
    state = load_file(file) | changes
    save_file({key: value for key, value in state.items() if value is not None}, file)


def save(folder, seed):
    torch.manual_seed(seed)
    UNet(FLAT).save_pretrained(folder / "unet")
    edit(folder / "vae/config.json")
    save_file(dict(w=torch.ones(3)), folder / VAE_FILE)
    edit(folder / SCHEDULER, prediction_type="v_prediction")
    TOKENIZER.save_pretrained(folder / "tokenizer")
    edit(folder / "model_index.json")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    root = tmp_path_factory.mktemp("template")
    for seed, name in enumerate("ABC"):
        save(root / name, seed)
    return root


@pytest.fixture()
def folders(template, tmp_path):
    return shutil.copytree(template, tmp_path, dirs_exist_ok=True)


def run(folders, tuned="B", weights=(1,)):
    return call("merge.py", "--base", folders / "A", "--tuned", *[folders / t for t in tuned],
                "--out", folders / "E", "--weights", *weights)


def succeeded(done):
    assert done.returncode == 0, done.stderr
    return done


def test_folders_merge_as_state_dicts_do(folders):
    """Mixed types, integers, one copy in shards, one in half precision without an autoencoder."""
    states = []
    for name in "ABC":
        file = folders / name / UNET_FILE
        half = {key: value.half() for key, value in load_file(file).items()
                if "norm" in key or name == "C"}
        edit_tensors(file, **half, a_step=torch.tensor(7))
        states.append(load_file(file))
    file.rename(file.with_suffix(".fp16.safetensors"))
    shards = {key: f"diffusion_pytorch_model-{i % 2}.safetensors"
              for i, key in enumerate(states[1])}
    for name in set(shards.values()):
        part = {key: value for key, value in states[1].items() if shards[key] == name}
        save_file(part, folders / "B/unet" / name)
    edit(folders / "B/unet/diffusion_pytorch_model.safetensors.index.json", weight_map=shards)
    (folders / "B" / UNET_FILE).unlink()
    shutil.rmtree(folders / "C/vae")

    succeeded(run(folders, "BC", [0.3, 0.5]))
    base, *copies = states
    expected = combined(base, copies, [0.3, 0.5])
    out = load_file(folders / "E" / UNET_FILE)
    assert out.keys() == expected.keys()
    for key, value in out.items():
        assert torch.equal(value, expected[key])
        assert value.dtype == base[key].dtype
    assert load_file(folders / "E" / VAE_FILE)["w"].tolist() == [1, 1, 1]
    for file in (SCHEDULER, "tokenizer/vocab.json", "model_index.json"):
        assert read_json(folders / "E" / file) == read_json(folders / "A" / file)


def in_older_words(state):
    """Attention as diffusers spelled it before 0.17."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", r"to_out\.0": "proj_attn"}
    for new, old in older.items():
        renamed = {re.sub(rf"\b{new}\b", old, key): value for key, value in state.items()}
        assert renamed.keys() != state.keys()
        state = renamed
    return state


def test_files_at_the_top_of_a_repository_merge(folders):
    """The base as google/ddpm-cifar10-32 lies on the hub."""
    states = []
    for name in "AB":
        shutil.rmtree(folders / name / "unet")
        adm.UNet2D(PIXELS).save_pretrained(folders / name / "unet")
        states.append(load_file(folders / name / UNET_FILE))
    for part in ("unet", "scheduler"):
        for file in (folders / "A" / part).iterdir():
            file.rename(folders / "A" / file.name)
    save_file(in_older_words(states[0]), folders / "A/diffusion_pytorch_model.safetensors")
    succeeded(run(folders, weights=[0.5]))
    merged = adm.UNet2D.from_pretrained(folders / "E", "unet").state_dict()
    a, b = states
    assert all(torch.allclose(merged[key], (a[key] + b[key]) / 2, atol=1e-6) for key in a)


def test_older_spellings_of_the_same_network_merge(folders):
    """The base as Stable Diffusion 1.5 lies on the hub, the copy as train.py writes it."""
    text = CLIPText(dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, projection_dim=8))
    vae = VAE(dict(block_out_channels=[8], down_block_types=["DownEncoderBlock2D"],
                   up_block_types=["UpDecoderBlock2D"], norm_num_groups=8))
    for name in "AB":
        text.save_pretrained(folders / name / "text_encoder")
        vae.save_pretrained(folders / name / "vae")
    file = folders / "A/text_encoder/model.safetensors"
    old = {key.removeprefix("text_model."): value for key, value in load_file(file).items()}
    save_file(old | {"embeddings.position_ids": torch.arange(77)[None]}, file)
    save_file(in_older_words(load_file(folders / "A" / VAE_FILE)), folders / "A" / VAE_FILE)
    edit(folders / "A/text_encoder/config.json", transformers_version="4.2", torch_dtype="float32")
    edit(folders / "B/text_encoder/config.json", transformers_version="4.38")
    edit(folders / "A/model_index.json", safety_checker=["x", "Y"], feature_extractor=["x", "Z"],
         unet=["diffusers", "U"])
    succeeded(run(folders, weights=[0.5]))
    for module in (text, vae):
        again = type(module).from_pretrained(folders / "E")
        assert same_tensors(again.state_dict(), module.state_dict())
    index = read_json(folders / "E/model_index.json")
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert index["requires_safety_checker"] is False
    assert index["unet"] == ["diffusers", "U"]


def test_what_does_not_matter_may_differ(folders):
    """Defaults that are left out, precision, sampler, 3e38 in fp32, a stray pipe."""
    edit(folders / "A" / SCHEDULER, beta_end=0.02)
    edit(folders / "B" / SCHEDULER, trained_betas=None, steps_offset=1,
         _class_name="EulerDiscreteScheduler", timestep_spacing="trailing")
    edit(folders / "A/unet/config.json", moe=None, num_attention_heads=None, layers_per_block=[1],
         routing=dict(alpha=4.0))
    edit(folders / "B/unet/config.json", routing=dict(alpha=4.0, new=[]))
    edit(folders / "A/vae/config.json", scaling_factor=0.18215, force_upcast=True)
    edit(folders / "B/vae/config.json", force_upcast=False)
    for name in "AB":
        edit_tensors(folders / name / VAE_FILE, w=torch.full((3,), 3e38))
    os.mkfifo(folders / "A/tokenizer/pipe")
    succeeded(run(folders))
    assert set(load_file(folders / "E" / VAE_FILE)["w"].tolist()) == {torch.tensor(3e38).item()}
    assert not (folders / "E/tokenizer/pipe").exists()


def test_a_folder_that_points_to_its_base_merges_into_a_whole_one(tmp_path):
    path = ROOT / "assets/tiny-mtu"
    merge.merge_folders(path, [path], [1], tmp_path / "x/E")
    a, b = load_model(tmp_path / "x/E"), load_model(path)
    assert a.tasks == b.tasks
    assert same_tensors(a.unet.state_dict(), b.unet.state_dict())
    assert (tmp_path / "x/E/scheduler").is_dir()


def test_a_merged_model_draws_the_same_in_diffusers(tmp_path):
    path = ROOT / "assets/tiny"
    merge.merge_folders(path, [path], [0.5], tmp_path / "E")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "E",
                                                             low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("red apple", num_inference_steps=2, guidance_scale=3.0,
                  generator=torch.manual_seed(3)).images[0]
    ours = generate(load_model(tmp_path / "E"), "t2i", ["red apple"], guidance=3.0, steps=2,
                    seed=3)[0]
    assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).mean() < 1


def test_projections_after_blocks_merge_onto_a_base_without_them(folders):
    base = load_file(folders / "A" / UNET_FILE)
    copies = []
    for name, scale in (("B", 2.0), ("C", 0.5)):
        unet = UNet.from_pretrained(folders / name)
        merge.add_projections(unet, "blocks").mid_block.projection.weight.data.mul_(scale)
        unet.save_pretrained(folders / name / "unet")
        edit(folders / name / "model_index.json", _class_name="ProjectedPipeline")
        copies.append(unet.state_dict())
    succeeded(run(folders, "BC", [0.3, 0.4]))
    config = read_json(folders / "E/unet/config.json")
    assert config["projections"] == "blocks"
    assert config["_class_name"] == "ProjectedUNet"
    assert read_json(folders / "E/model_index.json")["_class_name"] == "ProjectedPipeline"
    merged = merge.add_projections(UNet(FLAT), "blocks")
    hub.load_weights(merged, folders / "E/unet")
    projection = merged.mid_block.projection.weight[:, :, 0, 0]
    assert torch.allclose(projection, torch.eye(32) * (1 + 0.3 * 1.0 - 0.4 * 0.5))
    key = "conv_in.weight"
    shift = sum(w * (copy[key] - base[key]) for w, copy in zip([0.3, 0.4], copies))
    assert torch.allclose(merged.state_dict()[key], base[key] + shift, atol=1e-6)


# ---- mistakes ----

def json_with(place, **changes):
    return lambda root: edit(root / place, **changes)


def tensor(name, key, value):
    return lambda root: edit_tensors(root / name / UNET_FILE, **{key: value})


def cut(place):
    return lambda root: (root / place).write_bytes((root / place).read_bytes()[:-100])


def without(place, key):
    """Leave a key out of the JSON file at A, and set another value than its default in B's."""
    def change(root):
        config = read_json(root / "A" / place)
        del config[key]
        write_json(root / "A" / place, config)
        edit(root / "B" / place, **{key: 4})
    return change


def other_order(root):
    file = root / "B/tokenizer/merges.txt"
    version, first, second = file.read_text().splitlines()
    file.write_text("\n".join([version, second, first]))


def pipe(root):
    shutil.rmtree(root / "B/vae")
    os.mkfifo(root / "B/vae")


MISTAKES = [  # what is done to the folders; what the line says besides the part that is at fault
    # One key of a JSON file in B that is another one than in A.
    *[(json_with(f"B/{file}", **{key: value}), f"B/{Path(file).parent}", key)
      for file, key, value in [
        ("unet/config.json", "attention_head_dim", 4),
        ("unet/config.json", "aggregation", dict(channels=4)),
        ("vae/config.json", "scaling_factor", 0.13025),
        (SCHEDULER, "prediction_type", "epsilon"),
        (SCHEDULER, "beta_end", 0.012),
        (SCHEDULER, "num_train_timesteps", 500),
        (SCHEDULER, "rescale_betas_zero_snr", True),
        ("tokenizer/tokenizer_config.json", "pad_token", "!")]],
    (json_with("A/unet/config.json", routing=dict(alpha=4)), "B/unet", "routing"),
    (lambda root: [edit(root / name / "unet/config.json", moe=dict(tasks=tasks))
                   for name, tasks in (("A", ["t2i", "edit"]), ("B", ["edit", "t2i"]))],
     "B/unet", "tasks"),
    (without("unet/config.json", "attention_head_dim"), "B/unet", "attention_head_dim is 4 and 8"),
    (without("unet/config.json", "norm_num_groups"), "B/unet", "norm_num_groups is 4 and 32"),
    (json_with(f"B/{SCHEDULER}", _class_name="FlowMatchEulerDiscreteScheduler"),
     "B/scheduler: scheduler FlowMatch", "DDIM"),
    (lambda root: (root / "B" / SCHEDULER).write_text("{}"), "B/scheduler", "prediction_type"),
    (json_with("B/tokenizer/vocab.json", a=2, b=1), "B/tokenizer", "differ in vocabulary"),
    (other_order, "B/tokenizer", "differ in merges"),
    (lambda root: (root / "B/unet/config.json").write_text("["), "B/unet/config.json", "read"),
    (json_with("B/model_index.json", base=5), "B/model_index.json", "hold"),
    (json_with("B/model_index.json", base="."), "B/model_index.json", "hold"),
    (cut(f"B/{UNET_FILE}"), f"B/{UNET_FILE}", "cannot be read"),
    (cut(f"A/{UNET_FILE}"), f"A/{UNET_FILE}", "cannot be read"),
    (tensor("B", "conv_in.bias", torch.arange(32)), "B/unet", "conv_in.bias"),
    (tensor("B", "conv_in.bias", torch.arange(32).to(torch.uint16)), "B/unet", "conv_in.bias"),
    (tensor("B", "conv_out.bias", torch.ones(4) / 0), f"B/{UNET_FILE}", "conv_out.bias is not"),
    (tensor("A", "conv_out.bias", torch.ones(4) * torch.nan), f"A/{UNET_FILE}", "is not finite"),
    (tensor("A", "conv_out.bias", torch.full((4,), 6e4).half()), "A/unet", "these weights"),
    (tensor("B", "conv_out.bias", None), "B/unet", "conv_out.bias"),
    (tensor("B", "x.projection.weight", torch.ones(3)), "B/unet", "x.projection.weight"),
    (lambda root: (root / "E").mkdir(), "E exists", "--out"),
    (lambda root: (root / "A" / UNET_FILE).rename(root / "A/unet/model.bin"), "A/unet", ".bin"),
    (lambda root: shutil.rmtree(root / "A/unet"), "A", "nothing to merge"),
    (lambda root: (root / "B/unet").rename(root / "B/transformer"), "B", "nothing to merge"),
    (pipe, "B has no folder vae", "Hugging Face"),
    (lambda root: shutil.rmtree(root / "B"), "B", "no model folder"),
]


@pytest.mark.parametrize("prepare, part, words", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(folders, prepare, part, words):
    prepare(folders)
    files = sorted(folders.rglob("*"))
    assert_mistake(run(folders, weights=[-9]), str(folders / part), words)
    assert sorted(folders.rglob("*")) == files


@pytest.mark.parametrize("weights", [[1, 2], ["nan"], [], [1e39], [1, "--search"]])
def test_a_mistake_in_the_weights_is_one_line(folders, weights):
    assert_mistake(run(folders, weights=weights), "weight")
    assert not (folders / "E").exists()


def test_a_full_disk_is_one_line_and_nothing_is_written(folders):
    files = sorted(folders.rglob("*"))
    with full_disk(50_000):
        done = run(folders)
    assert_mistake(done, f"{UNET_FILE} cannot be written")
    assert sorted(folders.rglob("*")) == files


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_number_of_models(tmp_path):
    """Merging five files of 48 MB takes at most 1.5 files more than merging small ones."""
    size = 48
    for megabytes in (0.1, size):
        for name in "ABCDE":
            folder = tmp_path / str(megabytes) / name
            edit(folder / "unet/config.json")
            edit(folder / "model_index.json")
            numbers = int(megabytes * 2 ** 20) // 256
            save_file({f"w{i}": torch.rand(numbers) for i in range(64)}, folder / UNET_FILE)
    code = """if True:
        import merge, sys
        for size in sys.argv[1:]:
            base, *tuned = [f"{size}/{name}" for name in "ABCDE"]
            merge.merge_folders(base, tuned, [1, 2, 3, 4], f"{size}/F")
            status = open("/proc/self/status").read()
            print(*[status.split(key)[1].split()[0] for key in ("VmRSS:", "VmHWM:")])
        """
    done = succeeded(subprocess.run(
        [sys.executable, "-c", code, "0.1", str(size)], cwd=tmp_path, capture_output=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT)), text=True))
    (before, _), (_, peak) = [map(int, line.split()) for line in done.stdout.splitlines()]
    used = (peak - before) / 1024
    assert used < 1.5 * size, used


# ---- python merge.py ----

def search(folders, *words, tuned="BC"):
    return call("merge.py", "--search", "--base", folders / "A", "--tuned",
                *[folders / t for t in tuned], "--out", folders / "E", *words)


@pytest.fixture()
def pretended(folders, monkeypatch):
    """Losses of conv_out's bias: each example has a target that lies between the copies."""
    for name, bias in (("A", [0.0, 0, 0, 0]), ("B", [1.0, 0, 0, 0]), ("C", [0, 1.0, 0, 0])):
        state = load_file(folders / "A" / UNET_FILE) | {"conv_out.bias": torch.tensor(bias)}
        save_file(state, folders / name / UNET_FILE)

    def held_out_examples(tasks, root, model, count):
        return [dict(task=task, t=int((i + 0.5) * 1000 / count)) for i in range(count)
                for task in tasks]

    def held_out_losses(model, examples, batch_size, encode_text):
        bias = model.unet.conv_out.bias.detach()
        miss = (bias - torch.tensor([0.7, 0.4, 0, 0])).square().sum().item()
        return np.array([miss + example["t"] / 1000 for example in examples])

    monkeypatch.setitem(sys.modules, "train", SimpleNamespace(
        held_out_examples=held_out_examples, held_out_losses=held_out_losses,
        text_encoding=lambda model: len))
    monkeypatch.setitem(sys.modules, "sample", SimpleNamespace(
        load_model=lambda path, device="cpu": SimpleNamespace(
            unet=UNet.from_pretrained(path), diffusion=SimpleNamespace(T=1000), tasks=["t2i"])))
    return folders


def test_the_command_searches_and_merges(pretended):
    done = succeeded(search(pretended, "--eval-size", 7, "--device", "cpu"))
    bias = load_file(pretended / "E" / UNET_FILE)["conv_out.bias"]
    assert torch.allclose(bias, torch.tensor([0.7, 0.4, 0, 0]))
    assert "weights (0.7, 0.4)" in done.stdout
    table = {line[:20].strip(): line[20:].split() for line in done.stdout.splitlines()}
    assert list(table)[3:] == ["before", "copy 0", "copy 1", "ensemble (Eq. 7)",
                               "merged, 1/N each", "merged, searched", "weights (0.7, 0.4);"]
    low, high, mean = [float(number) for number in table["before"]]
    assert low < 0.65 + 0.5 < high
    assert mean == pytest.approx((low + high) / 2, abs=1e-4)
    gains = np.array(table["before"], float) - np.array(table["merged, searched"], float)
    assert np.allclose(gains, 0.65, atol=1e-3)


def test_copies_stand_in_the_order_of_their_ranges_and_match(pretended, monkeypatch):
    for name, t_range in (("B", [0, 500]), ("C", [500, 1000])):
        edit(pretended / name / "arguments.json", t_range=t_range)
    for tuned in ("CB", "B", "BBC"):
        assert_mistake(search(pretended, tuned=tuned), "order of their ranges")
    succeeded(search(pretended))
    # What cannot be merged is refused before the search.
    shutil.rmtree(pretended / "E")
    monkeypatch.setattr(sys.modules["train"], "held_out_examples", None)
    edit(pretended / "C" / SCHEDULER, prediction_type="epsilon")
    assert_mistake(search(pretended), "C/scheduler")


def test_a_search_on_the_shipped_model(tmp_path, monkeypatch):
    """Copies with projections after blocks, of which one is worse than the base."""
    monkeypatch.setattr(merge, "search_weights", lambda score, n: ((1.0, 0.1), score((1.0, 0.1))))
    encoded = []
    encode_text = sample.Model.encode_text

    def counted(model, prompts):
        encoded.append(prompts)
        return encode_text(model, prompts)

    monkeypatch.setattr(sample.Model, "encode_text", counted)
    base = ROOT / "assets/tiny"
    copies = tmp_path / "0", tmp_path / "1"
    for folder, scale in zip(copies, (1, 0)):
        shutil.copytree(base, folder)
        unet = merge.add_projections(UNet.from_pretrained(base), "blocks")
        unet.up_blocks[-1].projection.weight.data.mul_(scale)
        unet.save_pretrained(folder / "unet")
        edit(folder / "model_index.json", _class_name="ProjectedPipeline",
             unet=["diffusers", "ProjectedUNet"])
    done = succeeded(call(
        "merge.py", "--search", "--base", base, "--tuned", *copies, "--task", "t2i",
        "--eval-size", 4, "--seed", 1, "--out", tmp_path / "E"))
    rows = {line[:20].strip(): line[20:].split() for line in done.stdout.splitlines()}
    assert len(encoded) == 2  # each half once, though the second is measured for every arm
    assert rows["before"] == rows["copy 0"]
    assert float(rows["copy 1"][-1]) > 1.1 * float(rows["before"][-1])
    assert float(rows["merged, searched"][-1]) < float(rows["copy 1"][-1])
    assert "projections" in load_model(tmp_path / "E").unet.config


def test_a_copy_is_tuned_on_its_range_and_gets_better_there():
    torch.manual_seed(0)
    model = SimpleNamespace(unet=UNet(SMALL), diffusion=Diffusion.from_config({}))
    x0, context, noise = torch.randn(8, 4, 8, 8), torch.randn(8, 5, 24), torch.randn(8, 4, 8, 8)
    t = torch.arange(500, 1000, 63)
    x_t = model.diffusion.add_noise(x0, noise, t)
    seen = []
    hook = model.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    tuned = merge.tune(model, x0, context, (500, 1000))
    hook.remove()
    assert 0.7 < (torch.cat(seen) >= 500).float().mean() < 1
    with torch.no_grad():
        before, after = (model.diffusion.error(unet(x_t, t, context), x0, noise, t).mean()
                         for unet in (model.unet, tuned))
    assert after < 0.9 * before


def test_without_arguments_it_draws_two_vectors_and_the_plane_between_them(tmp_path, monkeypatch):
    def scaled(model, x0, context, t_range):
        """Copies whose vectors are 1 % and -2 % of the base."""
        unet = copy.deepcopy(model.unet)
        for p in unet.parameters():
            p.data *= 0.98 if t_range[0] else 1.01
        return unet

    drawn = []
    table = merge.table

    def recorded(title, x, y, values, *words, **options):
        drawn.append(values)
        return table(title, x, y, values, *words, **options)

    monkeypatch.setattr(merge, "tune", scaled)
    monkeypatch.setattr(merge, "table", recorded)
    monkeypatch.chdir(tmp_path)
    succeeded(call("merge.py"))
    assert Image.open("samples/merge.png").size > (800, 800)
    sizes, everywhere, low, high = drawn
    assert np.allclose(sizes, [1, 2], rtol=1e-3)
    model = load_model(ROOT / "assets/tiny")
    examples = train.held_out_examples(["t2i"], None, model, 4)
    losses = train.held_out_losses(model, examples, 4)
    # Rows are b from 1.5 down to -0.5, columns a from -0.5 up. (a, b) = (1, 0.5) is the base again.
    for plane, loss in ((everywhere, losses), (low, losses[:2]), (high, losses[2:])):
        assert plane[3, 1] == pytest.approx(loss.mean(), rel=1e-4)
        assert plane[2, 3] == pytest.approx(loss.mean(), rel=1e-3)
    for copy_, row, column in ((scaled(model, 0, 0, (0, 500)), 3, 3),
                               (scaled(model, 0, 0, (500, 1000)), 1, 1)):
        losses = train.held_out_losses(dataclasses.replace(model, unet=copy_), examples, 4)
        assert everywhere[row, column] == pytest.approx(losses.mean(), rel=1e-4)
