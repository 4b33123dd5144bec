"""merge.py: ranges, timesteps, projections that fold, and the algebra of merging, on tensors and on folders."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import adm
import merge
from conftest import ROOT, called, full_disk
from folders import UserError
from merge import merge as merged
from merge import search_weights, task_vector, timestep_ranges
from sample import load_unet
from unet import CONFIGS, UNet

SMALL = dict(CONFIGS["tiny"], block_out_channels=(32, 64, 64), cross_attention_dim=24)


def models(n, dtype=torch.float32):
    """A base and n others: state dicts with an integer tensor."""
    g = torch.Generator().manual_seed(0)
    return [dict(w=torch.randn(5, 7, generator=g).to(dtype), b=torch.randn(3, generator=g).to(dtype), steps=torch.arange(4)) for _ in range(n + 1)]


def combined(base, tuned, weights):
    return merged(base, [task_vector(base, t) for t in tuned], weights)


# ---- ranges and timesteps ----

@pytest.mark.parametrize("T, n", [(1000, 1), (1000, 4), (1000, 3), (1000, 8), (10, 10), (7, 3)])
def test_ranges_cover_all_timesteps_once_and_agree_with_the_ensemble(T, n):
    ranges = timestep_ranges(T, n)
    assert [i for i, (start, end) in enumerate(ranges) for _ in range(start, end)] == [t * n // T for t in range(T)]


def test_the_papers_ranges():
    assert timestep_ranges(1000, 4) == [(0, 250), (250, 500), (500, 750), (750, 1000)]


@pytest.mark.parametrize("antithetic", [False, True])
def test_timesteps_lie_in_the_range_but_for_a_share_of_them(antithetic):
    rng = np.random.default_rng(0)
    inside = merge.sample_timesteps((250, 500), 1000, 0.0, rng, 4000, antithetic)
    assert inside.min() >= 250 and inside.max() < 500 and len(set(inside)) == 250
    t = np.concatenate([merge.sample_timesteps((250, 500), 1000, 0.3, rng, 8, antithetic) for _ in range(4000)])
    assert abs(((t < 250) | (t >= 500)).mean() - 0.3 * 0.75) < 0.01 and t.min() >= 0 and t.max() <= 999
    assert merge.sample_timesteps((0, 1000), 1000, 1.0, rng, 1, antithetic).shape == (1,)


def test_samples_draw_alone_and_antithetic_batches_together_in_pairs():
    rng = np.random.default_rng(0)
    mixed = [merge.sample_timesteps((0, 10), 1000, 0.5, rng, 8) for _ in range(100)]
    assert any(0 < (t >= 10).sum() < 8 for t in mixed)
    for _ in range(50):
        t = merge.sample_timesteps((250, 500), 1000, 0.5, rng, 8, antithetic=True)
        assert len(set(t[:4] + t[4:])) == 1 and t[0] + t[4] in (749, 999)


def test_consistency_is_one_mean_square_per_sample():
    a = torch.zeros(3, 4, 8, 8)
    assert merge.consistency_loss(a.bfloat16(), a + torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)).tolist() == [0, 1, 4]


# ---- projections ----

def test_projections_start_as_the_identity_train_and_fold():
    torch.manual_seed(0)
    unet = UNet(SMALL)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 24)
    before, names = unet(x, t, text), set(unet.state_dict())
    merge.add_projections(unet)
    added = set(unet.state_dict()) - names
    assert len(added) == (3 + 2 + 6) + (2 + 2) and all(name.endswith(".projection") for name in added)  # residual blocks, samplers
    assert torch.allclose(unet(x, t, text), before, atol=1e-5)
    unet(x, t, text).square().mean().backward()
    assert all(unet.get_parameter(name).grad.abs().max() > 0 for name in added)
    with torch.no_grad():
        for name in added:
            unet.get_parameter(name).add_(0.2 * torch.randn_like(unet.get_parameter(name)))
        for name, p in unet.named_parameters():
            if name.endswith("bias"):
                p.add_(0.1 * torch.randn_like(p))
    after = unet(x, t, text)
    folded = merge.fold_projections(unet)
    assert set(folded.state_dict()) == names and (after - before).abs().max() > 0.1
    assert torch.allclose(folded(x, t, text), after, atol=1e-5 * after.abs().max().item())
    assert set(unet.state_dict()) == names | added  # the original is as it was


@pytest.mark.parametrize("make", [lambda: UNet(SMALL), lambda: adm.UNet2D(adm.CONFIGS["adm-tiny"] | dict(num_class_embeds=None, sample_size=16))])
def test_the_official_projections_follow_blocks_and_spare_the_skips(make, tmp_path):
    torch.manual_seed(0)
    unet = make().eval()
    x, t, text = torch.randn(2, unet.config["in_channels"], 16, 16), torch.tensor([3, 900]), torch.randn(2, 5, 24)
    before, names, blocks = unet(x, t, text), set(unet.state_dict()), len(unet.down_blocks) + 1 + len(unet.up_blocks)
    skips = unet.down_blocks[0](unet.conv_in(x, None), unet.condition(x, t, text, None, None), lambda f, *args: f(*args))[1]
    merge.add_projections(unet, "blocks")
    added = sorted(set(unet.state_dict()) - names)
    assert len(added) == blocks and torch.equal(unet(x, t, text), before)
    with torch.no_grad():
        for name in added:
            p = unet.get_parameter(name)
            assert torch.equal(p[:, :, 0, 0], torch.eye(len(p)))
            p.mul_(2)
    out, after = unet.down_blocks[0](unet.conv_in(x, None), unet.condition(x, t, text, None, None), lambda f, *args: f(*args))
    assert len(skips) == len(after) and all(torch.equal(a, b) for a, b in zip(skips, after))
    assert torch.allclose(out, 2 * after[-1]) and (unet(x, t, text) - before).abs().max() > 1e-3
    with pytest.raises(UserError, match="plain U-Net"):
        merge.add_projections(unet, "blocks")
    unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == f"Projected{type(unet).__name__}" and config["projections"] == "blocks"
    again, _ = load_unet(type(unet), tmp_path, "", config, torch.float32)
    assert torch.equal(again(x, t, text), unet(x, t, text))


def test_the_official_projections_number_as_the_paper_says_in_sd15():
    with torch.device("meta"):
        unet = merge.add_projections(UNet(CONFIGS["sd15"]), "blocks")
    assert sum(p.numel() for name, p in unet.named_parameters() if ".projection." in name) == 9_216_000  # +1.06 % of 868.7M


# ---- the algebra ----

def test_merging_is_linear_and_goes_through_every_model():
    base, *tuned = models(3)
    for i in range(3):
        one_hot = [float(j == i) for j in range(3)]
        assert all(torch.allclose(combined(base, tuned, one_hot)[k], tuned[i][k], atol=1e-6) for k in base)
    assert all(torch.equal(combined(base, tuned, [0, 0, 0])[k], base[k]) for k in base)
    w = [0.3, -0.4, 1.2]
    expected = base["w"] + sum(x * (t["w"] - base["w"]) for x, t in zip(w, tuned))
    assert torch.allclose(combined(base, tuned, w)["w"], expected, atol=1e-6)
    twice = combined(base, tuned, [2 * x for x in w])["w"] - base["w"]
    assert torch.allclose(twice, 2 * (combined(base, tuned, w)["w"] - base["w"]), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_the_last_rounding(dtype):
    base, *tuned = models(4, dtype)
    out = combined(base, tuned, [0.25] * 4)["w"]
    exact = base["w"].double() + sum(0.25 * (t["w"].double() - base["w"].double()) for t in tuned)
    assert out.dtype == dtype and torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("b"), "b is only in the base"), (lambda s: s.update(extra=torch.ones(1)), "extra is only in the tuned"),
    (lambda s: s.update(w=torch.ones(2, 2)), "shape of w"), (lambda s: s.update(steps=torch.arange(4) + 1), "steps holds integers")])
def test_what_does_not_fit_is_named(change, words):
    base, tuned = models(1)
    change(tuned)
    with pytest.raises(UserError, match=words):
        task_vector(base, tuned)


def test_as_many_weights_as_models():
    base, *tuned = models(2)
    with pytest.raises(UserError, match="1 weights for 2"):
        combined(base, tuned, [1.0])
    with pytest.raises(UserError, match="finite"):
        combined(base, tuned, [1.0, float("nan")])


def test_the_search_finds_the_best_weights_of_the_grid():
    calls = []

    def score(w):
        calls.append(w)
        return (w[0] - 0.31) ** 2 + (w[1] - 0.78) ** 2 + 0.5 * (w[0] - 0.31) * (w[1] - 0.78)
    best, value = search_weights(score, 2)
    assert best == (0.3, 0.8) and value == score(best) and len(set(calls[:-1])) == len(calls) - 1  # nothing is scored twice
    assert search_weights(lambda w: 1.0, 3)[0] == (1 / 3,) * 3  # what does not help is left
    assert search_weights(lambda w: float("nan") if w[0] > 0.2 else w[0], 1)[0] == (0.0,)


# ---- folders ----

def save(folder, seed, dtype=None):
    torch.manual_seed(seed)
    unet = UNet(SMALL)
    unet.save_pretrained(folder / "unet", dtype=dtype)
    (folder / "vae").mkdir(exist_ok=True)
    save_file(dict(w=torch.ones(3)), folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "vae" / "config.json").write_text("{}")
    (folder / "model_index.json").write_text("{}")
    return unet


@pytest.fixture()
def folders(tmp_path):
    for seed, name in enumerate("ABC"):
        save(tmp_path / name, seed)
    return tmp_path


def test_folders_merge_as_state_dicts_do(folders):
    """Whole and sharded files; what only the base has is the base's."""
    base, *tuned = (load_file(folders / name / "unet/diffusion_pytorch_model.safetensors") for name in "ABC")
    for name, state in zip("ABC", (base, *tuned)):  # mixed types, as checkpoints have
        state |= {k: v.half() for k, v in state.items() if "norm" in k} | dict(a_step=torch.tensor(7))
        save_file(state, folders / name / "unet/diffusion_pytorch_model.safetensors")
    keys = sorted(base)
    file = folders / "B/unet/diffusion_pytorch_model.safetensors"
    file.unlink()
    for i, part in enumerate((keys[::2], keys[1::2])):
        save_file({k: tuned[0][k] for k in part}, file.parent / f"diffusion_pytorch_model-{i}.safetensors")
    file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(dict(
        weight_map={k: f"diffusion_pytorch_model-{i}.safetensors" for i, part in enumerate((keys[::2], keys[1::2])) for k in part})))
    (folders / "C/vae/diffusion_pytorch_model.safetensors").unlink()
    (folders / "C/vae/config.json").unlink()
    (folders / "C/vae").rmdir()
    done = called("merge.py", "--base", folders / "A", "--tuned", folders / "B", folders / "C", "--weights", 0.3, 0.5, "--out", folders / "E")
    assert done.returncode == 0, done.stderr
    expected = combined(base, tuned, [0.3, 0.5])
    out = load_file(folders / "E/unet/diffusion_pytorch_model.safetensors")
    assert out.keys() == expected.keys() and all(torch.equal(out[k], expected[k]) and out[k].dtype == base[k].dtype for k in out)
    assert (folders / "E/model_index.json").is_file()
    assert load_file(folders / "E/vae/diffusion_pytorch_model.safetensors")["w"].tolist() == [1, 1, 1]


def test_older_spellings_of_the_same_network_merge(tmp_path):
    """The base as Stable Diffusion 1.5 lies on the hub, the copy as train.py writes it; files that no part of the folder answers for."""
    from clip import CLIPText
    from vae import VAE
    torch.manual_seed(0)
    text = CLIPText(dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, projection_dim=8))
    vae = VAE(dict(block_out_channels=[8], down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"], norm_num_groups=8))
    for name in "AB":
        save(tmp_path / name, 0)
        text.save_pretrained(tmp_path / name / "text_encoder")
        vae.save_pretrained(tmp_path / name / "vae")
    a = tmp_path / "A"
    old = {k.removeprefix("text_model."): v for k, v in text.state_dict().items()} | {"embeddings.position_ids": torch.arange(77)[None]}
    save_file(old, a / "text_encoder/model.safetensors")
    new = dict(to_q="query", to_k="key", to_v="value")
    old = {".".join(new.get(w, w) for w in k.replace("to_out.0", "proj_attn").split(".")): v for k, v in vae.state_dict().items()}
    save_file({k: v.contiguous() for k, v in old.items()}, a / "vae/diffusion_pytorch_model.safetensors")
    config = json.loads((a / "text_encoder/config.json").read_text())
    (a / "text_encoder/config.json").write_text(json.dumps(config | dict(transformers_version="4.21", torch_dtype="float32")))
    (tmp_path / "B/text_encoder/config.json").write_text(json.dumps(config | dict(transformers_version="4.38")))
    (a / "model_index.json").write_text(json.dumps(dict(safety_checker=["x", "Y"], feature_extractor=["x", "Z"], unet=["diffusers", "U"])))
    done = called("merge.py", "--base", a, "--tuned", tmp_path / "B", "--weights", 0.5, "--out", tmp_path / "E")
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "E/text_encoder/model.safetensors").keys() == text.state_dict().keys()
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in load_file(tmp_path / "E/vae/diffusion_pytorch_model.safetensors").items())
    index = json.loads((tmp_path / "E/model_index.json").read_text())
    assert index["safety_checker"] == index["feature_extractor"] == [None, None] and index["unet"] == ["diffusers", "U"]


def test_a_folder_that_points_to_its_base_still_does(tmp_path):
    done = called("merge.py", "--base", ROOT / "assets/tiny-mtu", "--tuned", ROOT / "assets/tiny-mtu", "--weights", 1, "--out", tmp_path / "x/E")
    assert done.returncode == 0, done.stderr
    from sample import load_model
    a, b = load_model(tmp_path / "x/E"), load_model(ROOT / "assets/tiny-mtu")
    assert all(torch.equal(a.unet.state_dict()[k], v) for k, v in b.unet.state_dict().items()) and a.tasks == b.tasks


def other_network(folder):
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "attention_head_dim": 4}))


@pytest.mark.parametrize("prepare, weights, words", [
    (other_network, [1], "attention_head_dim"), (lambda f: None, [1, 2], "2 weights for 1"),
    (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"cut"), [1], "header"),
    (lambda f: (f.parent / "E").mkdir(), [1], "exists"),
    (lambda f: (f.parent / "A/unet/diffusion_pytorch_model.safetensors").rename(f.parent / "A/unet/diffusion_pytorch_model.bin"), [1], ".bin"),
    (lambda f: [shutil.rmtree(f.parent / "A" / part) for part in ("unet", "vae")], [1], "nothing to merge")])
def test_a_mistake_is_one_line_and_nothing_is_written(folders, prepare, weights, words):
    prepare(folders / "B")
    files = sorted(folders.rglob("*"))
    done = called("merge.py", "--base", folders / "A", "--tuned", folders / "B", "--weights", *weights, "--out", folders / "E")
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(folders.rglob("*")) == files


def test_a_full_disk_is_one_line_and_nothing_is_written(folders):
    files = sorted(folders.rglob("*"))
    with full_disk(50_000):
        done = called("merge.py", "--base", folders / "A", "--tuned", folders / "B", "--weights", 1, "--out", folders / "E")
    assert done.returncode == 2 and "cannot be written" in done.stderr and "safetensors" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(folders.rglob("*")) == files


@pytest.mark.parametrize("change", [lambda v: v.pop("w"), lambda v: v.update(b=torch.zeros(1)), lambda v: v.update(c=torch.zeros(3))])
def test_a_task_vector_of_another_model_is_named(change):
    base, tuned = models(1)
    vector = task_vector(base, tuned)
    change(vector)
    with pytest.raises(UserError, match="task vector"):
        merged(base, [vector], [1.0])


def test_a_method_on_one_side_only_is_named(folders):
    path = folders / "B/unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"aggregation": {"channels": 4}}))
    for base, tuned in (("A", "B"), ("B", "A")):
        done = called("merge.py", "--base", folders / base, "--tuned", folders / tuned, "--weights", 1, "--out", folders / "E")
        assert done.returncode == 2 and "aggregation" in done.stderr and not (folders / "E").exists()


def test_a_missing_copy_is_named(folders):
    done = called("merge.py", "--base", folders / "A", "--tuned", folders / "nowhere", "--weights", 1, "--out", folders / "E")
    assert done.returncode == 2 and "nowhere" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_number_of_models(tmp_path):
    """80 MB a file, four of them: at most 1.5 files above what merging four small ones takes. A mapped file may count as a whole."""
    size = 80

    def peak(megabytes):
        folders = [tmp_path / f"{name}{megabytes}" for name in "ABCDE"]
        for folder in folders:
            (folder / "unet").mkdir(parents=True)
            save_file({f"w{i}": torch.randn(int(megabytes * 2 ** 20) // 256, 1) for i in range(64)}, folder / "unet/diffusion_pytorch_model.safetensors")
            for file in ("unet/config.json", "model_index.json"):
                (folder / file).write_text("{}")
        args = ["--base", folders[0], "--tuned", *folders[1:], "--weights", 1, 2, 3, 4, "--out", tmp_path / f"X{megabytes}"]
        code = (f"import sys, merge\nsys.argv = ['merge.py', *{list(map(str, args))!r}]\nmerge.main()\n"
                "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1]) / 1024
    used = peak(size) - peak(0.1)
    assert used < 1.5 * size, used
