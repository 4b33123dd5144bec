"""merge.py: ranges, timesteps, projections, and the algebra of merging on tensors and folders."""
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, call, full_disk
from safetensors.torch import load_file, save_file

import adm
import hub
import merge
from clip import CLIPText
from hub import UserError
from merge import search_weights, task_vector, timestep_ranges
from sample import generate, load_model
from unet import CONFIGS, UNet
from vae import VAE

SMALL = dict(CONFIGS["tiny"], block_out_channels=(32, 64, 64), cross_attention_dim=24)
# One level, for the tests of folders: the fewer tensors, the faster.
FLAT = dict(SMALL, block_out_channels=(32,), norm_num_groups=8, attention_head_dim=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
PIXELS = adm.CONFIGS["adm-tiny"] | dict(num_class_embeds=None, sample_size=16)
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


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


def test_the_papers_ranges():
    assert timestep_ranges(1000, 4) == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    with pytest.raises(UserError, match="from 1 to 1000"):
        timestep_ranges(1000, 0)


def test_timesteps_lie_in_the_range_but_for_a_share_of_them():
    rng = np.random.default_rng(0)
    inside = merge.sample_timesteps((250, 500), 1000, 0.0, rng, 4000)
    assert set(inside) == set(range(250, 500))
    t = merge.sample_timesteps((250, 500), 1000, 0.3, rng, 32_000)
    assert abs(((t < 250) | (t >= 500)).mean() - 0.3 * 0.75) < 0.01
    anywhere = merge.sample_timesteps((250, 500), 1000, 1.0, rng, 20_000)
    assert set(anywhere) == set(range(1000))
    with pytest.raises(UserError, match="share"):
        merge.sample_timesteps((5, 5), 1000, 0.3, rng, 1)


def test_each_sample_decides_alone_whether_it_is_global():
    rng = np.random.default_rng(0)
    batches = [merge.sample_timesteps((0, 10), 1000, 0.5, rng, 8) for _ in range(100)]
    assert all(t.shape == (8,) for t in batches)
    assert any(0 < (t >= 10).sum() < 8 for t in batches)


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
    conv, x = unet.mid_block.resnets[0].conv2, torch.randn(1, 64, 4, 4)
    plain = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    assert torch.allclose(conv(x), torch.einsum("dc,bchw->bdhw", conv.projection, plain), atol=1e-5)
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
    config = json.loads((tmp_path / "config.json").read_text())
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

def test_merging_is_linear_and_goes_through_every_model():
    base, *tuned = models(3)
    for i, copy in enumerate(tuned):
        one_hot = [float(j == i) for j in range(3)]
        found = combined(base, tuned, one_hot)
        assert all(torch.allclose(found[key], copy[key], atol=1e-6) for key in base)
    assert all(torch.equal(combined(base, tuned, [0, 0, 0])[key], base[key]) for key in base)
    w = [0.3, -0.4, 1.2]
    shift = sum(x * (copy["w"] - base["w"]) for x, copy in zip(w, tuned))
    assert torch.allclose(combined(base, tuned, w)["w"], base["w"] + shift, atol=1e-6)
    twice = combined(base, tuned, [2 * x for x in w])["w"]
    assert torch.allclose(twice, base["w"] + 2 * shift, atol=1e-5)


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


@pytest.mark.parametrize("change", [
    lambda v: v.pop("w"), lambda v: v.update(b=torch.zeros(1)),
    lambda v: v.update(c=torch.zeros(3))])
def test_a_task_vector_of_another_model_is_named(change):
    base, tuned = models(1)
    vector = task_vector(base, tuned)
    change(vector)
    with pytest.raises(UserError, match="task vector"):
        merge.merge(base, [vector], [1.0])


def test_as_many_weights_as_models():
    base, *tuned = models(2)
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

    def losses(weights, part):
        calls.append((tuple(weights), [example["number"] for example in part]))
        # Each example prefers weights of its own.
        number = np.array(calls[-1][1])
        return (np.dot(weights, [1, 2]) - number % 7 / 3) ** 2 + number

    weights, t, arms = merge.compare_arms(losses, examples, 2, 1000, seed)
    reported = calls[-1][1]
    searched = calls[0][1]
    assert sorted(reported + searched) == sorted(example["number"] for example in examples)
    assert all(numbers in (reported, searched) for _, numbers in calls)
    assert t.tolist() == [number // 5 * 5 for number in reported]
    # Both halves have as many examples of each task in each fifth of the timesteps.
    for low in range(0, 1000, 200):
        for parity in (0, 1):
            counts = [sum(low <= n < low + 200 and n % 5 == parity for n in half)
                      for half in (reported, searched)]
            assert counts == [2, 2]

    def rows(w, numbers):
        return losses(w, [dict(number=number) for number in numbers])

    assert weights == search_weights(lambda w: rows(w, searched).mean(), 2)[0]
    expected = {"before": (0, 0), "copy 0": (1, 0), "copy 1": (0, 1),
                "merged, 1/N each": (0.5, 0.5), "merged, searched": weights}
    for arm, w in expected.items():
        assert np.array_equal(arms[arm], rows(w, reported)), arm
    assert not np.array_equal(t, merge.compare_arms(losses, examples, 2, 1000, seed + 1)[1])
    late = t >= 500
    assert np.array_equal(arms["ensemble (Eq. 7)"][late], arms["copy 1"][late])
    assert np.array_equal(arms["ensemble (Eq. 7)"][~late], arms["copy 0"][~late])


# ---- folders ----

def edit(file, **changes):
    """Change keys of a JSON file, which may be new."""
    old = json.loads(file.read_text()) if file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(old | changes))


def edit_tensors(file, **changes):
    """Change tensors of a file; None removes one."""
    state = load_file(file) | changes
    save_file({key: value for key, value in state.items() if value is not None}, file)


def save(folder, seed):
    torch.manual_seed(seed)
    UNet(FLAT).save_pretrained(folder / "unet")
    edit(folder / "vae/config.json")
    save_file(dict(w=torch.ones(3)), folder / VAE_FILE)
    edit(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    edit(folder / "tokenizer/vocab.json", a=0, b=1)
    edit(folder / "model_index.json")


@pytest.fixture()
def folders(tmp_path):
    for seed, name in enumerate("ABC"):
        save(tmp_path / name, seed)
    return tmp_path


def run(folders, tuned="B", weights=(1,)):
    return call("merge.py", "--base", folders / "A", "--tuned", *[folders / t for t in tuned],
                  "--weights", *weights, "--out", folders / "E")


def test_folders_merge_as_state_dicts_do(folders):
    """Mixed types, integers, shards; a copy without an autoencoder."""
    states = []
    for name in "ABC":
        file = folders / name / UNET_FILE
        half = {key: value.half() for key, value in load_file(file).items() if "norm" in key}
        edit_tensors(file, **half, a_step=torch.tensor(7))
        states.append(load_file(file))
    shards = {key: f"diffusion_pytorch_model-{i % 2}.safetensors"
              for i, key in enumerate(states[1])}
    for name in set(shards.values()):
        part = {key: value for key, value in states[1].items() if shards[key] == name}
        save_file(part, folders / "B/unet" / name)
    edit(folders / "B/unet/diffusion_pytorch_model.safetensors.index.json", weight_map=shards)
    (folders / "B" / UNET_FILE).unlink()
    shutil.rmtree(folders / "C/vae")

    done = run(folders, "BC", [0.3, 0.5])
    assert done.returncode == 0, done.stderr
    base, *copies = states
    expected = combined(base, copies, [0.3, 0.5])
    out = load_file(folders / "E" / UNET_FILE)
    assert out.keys() == expected.keys()
    for key, value in out.items():
        assert torch.equal(value, expected[key])
        assert value.dtype == base[key].dtype
    assert load_file(folders / "E" / VAE_FILE)["w"].tolist() == [1, 1, 1]
    for file in ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "model_index.json"):
        ours, theirs = [json.loads((folders / name / file).read_text()) for name in "EA"]
        assert ours == theirs


def in_older_words(state):
    """Attention as diffusers spelled it before 0.17."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for key, value in state.items():
        for new, old in older.items():
            key = key.replace(f".{new}.", f".{old}.")
        found[key] = value
    assert found.keys() != state.keys()
    return found


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
    done = run(folders, weights=[0.5])
    assert done.returncode == 0, done.stderr
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
    done = run(folders, weights=[0.5])
    assert done.returncode == 0, done.stderr
    for module in (text, vae):
        again = type(module).from_pretrained(folders / "E").state_dict()
        assert all(torch.equal(value, again[key]) for key, value in module.state_dict().items())
    index = json.loads((folders / "E/model_index.json").read_text())
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert index["requires_safety_checker"] is False
    assert index["unet"] == ["diffusers", "U"]


def test_what_is_the_default_may_be_left_out(folders):
    edit(folders / "A/scheduler/scheduler_config.json", beta_end=0.02)
    edit(folders / "B/scheduler/scheduler_config.json", trained_betas=None, steps_offset=1)
    edit(folders / "A/unet/config.json", moe=None)
    edit(folders / "A/unet/config.json", routing=dict(alpha=4.0))
    edit(folders / "B/unet/config.json", routing=dict(alpha=4.0, new=[]))
    assert run(folders).returncode == 0


def test_a_folder_that_points_to_its_base_merges_into_a_whole_one(tmp_path):
    path = ROOT / "assets/tiny-mtu"
    done = call("merge.py", "--base", path, "--tuned", path, "--weights", 1,
                  "--out", tmp_path / "x/E")
    assert done.returncode == 0, done.stderr
    a, b = load_model(tmp_path / "x/E"), load_model(path)
    assert a.tasks == b.tasks
    theirs = b.unet.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in a.unet.state_dict().items())
    assert (tmp_path / "x/E/scheduler").is_dir()


def test_a_merged_model_draws_the_same_in_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    base = ROOT / "assets/tiny"
    done = call("merge.py", "--base", base, "--tuned", base, "--weights", 0.5,
                  "--out", tmp_path / "E")
    assert done.returncode == 0, done.stderr
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "E",
                                                             low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("red apple", num_inference_steps=2, guidance_scale=3.0,
                  generator=torch.Generator().manual_seed(3)).images[0]
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
    done = run(folders, "BC", [0.3, 0.4])
    assert done.returncode == 0, done.stderr
    config = json.loads((folders / "E/unet/config.json").read_text())
    assert config["projections"] == "blocks"
    assert config["_class_name"] == "ProjectedUNet"
    index = json.loads((folders / "E/model_index.json").read_text())
    assert index["_class_name"] == "ProjectedPipeline"
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


SCHEDULER = "B/scheduler/scheduler_config.json"
MISTAKES = [  # what is done to the folders; what the line says besides the part that is at fault
    (json_with("B/unet/config.json", attention_head_dim=4), "B/unet", "attention_head_dim"),
    (json_with("B/unet/config.json", aggregation=dict(channels=4)), "B/unet", "aggregation"),
    (json_with("A/unet/config.json", routing=dict(alpha=4)), "B/unet", "routing"),
    (lambda root: [edit(root / name / "unet/config.json", moe=dict(tasks=tasks))
                   for name, tasks in (("A", ["t2i", "edit"]), ("B", ["edit", "t2i"]))],
     "B/unet", "tasks"),
    (json_with(SCHEDULER, prediction_type="epsilon"), "B/scheduler", "prediction_type"),
    (lambda root: (root / SCHEDULER).write_text("{}"), "B/scheduler", "prediction_type"),
    (json_with(SCHEDULER, beta_end=0.012), "B/scheduler", "beta_end"),
    (json_with(SCHEDULER, num_train_timesteps=500), "B/scheduler", "num_train_timesteps"),
    (json_with(SCHEDULER, rescale_betas_zero_snr=True), "B/scheduler", "rescale_betas_zero_snr"),
    (json_with("B/tokenizer/vocab.json", a=1, b=0), "B/tokenizer", "average"),
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
    (lambda root: [shutil.rmtree(part) for part in (root / "A").iterdir() if part.is_dir()],
     "A", "nothing to merge"),
    (lambda root: shutil.rmtree(root / "B"), "B", "no model folder"),
]


@pytest.mark.parametrize("prepare, part, words", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(folders, prepare, part, words):
    prepare(folders)
    files = sorted(folders.rglob("*"))
    done = run(folders, weights=[-9])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert str(folders / part) in done.stderr, done.stderr
    assert words in done.stderr, done.stderr
    assert sorted(folders.rglob("*")) == files


@pytest.mark.parametrize("words", [
    ["--weights", 1, 2], ["--weights", "nan"], [], ["--weights", 1, "--search"]])
def test_a_mistake_in_the_weights_is_one_line(folders, words):
    done = call("merge.py", "--base", folders / "A", "--tuned", folders / "B",
                  "--out", folders / "E", *words)
    assert done.returncode == 2
    assert "weight" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (folders / "E").exists()


def test_a_full_disk_is_one_line_and_nothing_is_written(folders):
    files = sorted(folders.rglob("*"))
    with full_disk(50_000):
        done = run(folders)
    assert done.returncode == 2
    assert f"{UNET_FILE} cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert sorted(folders.rglob("*")) == files


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_number_of_models(tmp_path):
    """Five files of 80 MB take at most 1.5 files above what five small ones take."""
    size = 80

    def peak(megabytes):
        folders = [tmp_path / f"{name}{megabytes}" for name in "ABCDE"]
        for folder in folders:
            edit(folder / "unet/config.json")
            edit(folder / "model_index.json")
            numbers = int(megabytes * 2 ** 20) // 256
            save_file({f"w{i}": torch.randn(numbers) for i in range(64)}, folder / UNET_FILE)
        base, *tuned = map(str, folders)
        code = ("import merge\n"
                f"merge.merge_folders({base!r}, {tuned}, [1, 2, 3, 4], {base + 'X'!r})\n"
                "status = open('/proc/self/status').read()\n"
                "print(status.split('VmHWM:')[1].split()[0])")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1]) / 1024

    used = peak(size) - peak(0.1)
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

    def held_out_losses(model, net, examples, device, batch_size):
        bias = net.conv_out.bias.detach()
        miss = (bias - torch.tensor([0.7, 0.4, 0, 0])).square().sum().item()
        return np.array([miss + example["t"] / 1000 for example in examples])

    monkeypatch.setitem(sys.modules, "train", SimpleNamespace(
        held_out_examples=held_out_examples, held_out_losses=held_out_losses))
    monkeypatch.setitem(sys.modules, "sample", SimpleNamespace(
        load_model=lambda path, device="cpu": SimpleNamespace(
            unet=UNet.from_pretrained(path), diffusion=SimpleNamespace(T=1000), tasks=["t2i"])))
    return folders


def test_the_command_searches_and_merges(pretended):
    done = search(pretended, "--eval-size", 7, "--device", "cpu")
    assert done.returncode == 0, done.stderr
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


def test_copies_stand_in_the_order_of_their_ranges(pretended):
    for name, t_range in (("B", [0, 500]), ("C", [500, 1000])):
        edit(pretended / name / "arguments.json", t_range=t_range)
    for tuned in ("CB", "B", "BBC"):
        done = search(pretended, tuned=tuned)
        assert done.returncode == 2
        assert "order of their ranges" in done.stderr
    assert search(pretended).returncode == 0


def test_what_cannot_be_merged_is_refused_before_the_search(pretended, monkeypatch):
    monkeypatch.setattr(sys.modules["train"], "held_out_examples", None)
    edit(pretended / "C/scheduler/scheduler_config.json", prediction_type="epsilon")
    done = search(pretended)
    assert done.returncode == 2
    assert "C/scheduler" in done.stderr


def test_a_search_on_the_shipped_model(tmp_path, monkeypatch):
    """Copies with projections after blocks, of which one is worse than the base."""
    monkeypatch.setattr(merge, "search_weights", lambda score, n: ((1.0, 0.1), score((1.0, 0.1))))
    base = ROOT / "assets/tiny"
    copies = tmp_path / "0", tmp_path / "1"
    for folder, scale in zip(copies, (1, 0)):
        shutil.copytree(base, folder)
        unet = merge.add_projections(UNet.from_pretrained(base), "blocks")
        unet.up_blocks[-1].projection.weight.data.mul_(scale)
        unet.save_pretrained(folder / "unet")
        edit(folder / "model_index.json", _class_name="ProjectedPipeline",
             unet=["diffusers", "ProjectedUNet"])
    done = call("merge.py", "--search", "--base", base, "--tuned", *copies, "--task", "t2i",
                  "--eval-size", 4, "--seed", 1, "--out", tmp_path / "E")
    assert done.returncode == 0, done.stderr
    rows = {line[:20].strip(): line[20:].split() for line in done.stdout.splitlines()}
    assert rows["before"] == rows["copy 0"]
    assert float(rows["copy 1"][-1]) > 1.1 * float(rows["before"][-1])
    assert float(rows["merged, searched"][-1]) < float(rows["copy 1"][-1])
    assert "projections" in load_model(tmp_path / "E").unet.config


def test_without_arguments_it_shows_the_ranges():
    done = call("merge.py")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 5
