"""--cache: the same losses without encoding, made once and in parts, refused when anything it depends on has changed."""
import json
import multiprocessing.reduction
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cache
import clip
import data
import train
import vae
from conftest import called, in_two_processes
from data import ASSETS
from folders import UserError
from sample import load_model

WORDS = ["--task", "edit,sr,t2i", "--model", str(ASSETS / "tiny"), "--batch-size", "6", "--eval-size", "2", "--sample-every", "0", "--log-every", "1",
         "--warmup", "1", "--steps", "2"]


def run(out, *args):
    return called("train.py", *WORDS, "--out", out, *args)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six pairs, four of them to train on, of another size and shape than what the network draws."""
    folder, rng, rows = tmp_path_factory.mktemp("data"), np.random.default_rng(0), []
    for i in range(6):
        for name in (f"{i}.png", f"s{i}.png"):
            Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).resize((70, 80), Image.BICUBIC).save(folder / name)
        rows.append(dict(file_name=f"{i}.png", source_file_name=f"s{i}.png", text=f"number {i}", split="heldout" if i > 3 else "train"))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory):
    """The same training without a cache, and with one that it makes -> their folders, and the cache."""
    out = tmp_path_factory.mktemp("runs")
    for name, words in (("plain", []), ("cached", ["--cache", out / "cache"])):
        done = run(out / name, "--data", pictures, *words)
        assert done.returncode == 0, done.stderr
        (out / name / "stdout").write_text(done.stdout)
    return out / "plain", out / "cached", out / "cache"


@pytest.fixture
def own(runs, pictures, tmp_path):
    """-> a copy of the pictures that may be changed, and of their cache, and open() of that cache as train.py opens it."""
    shutil.copytree(pictures, tmp_path / "data")  # with the times of its files
    shutil.copytree(runs[2], tmp_path / "cache")
    model = load_model(ASSETS / "tiny")

    def opened(tasks=("edit", "sr", "t2i"), size=64, model=model):
        sets = [data.Folder(tmp_path / "data", task, split, size) for split in ("train", "heldout") for task in tasks]
        return cache.open_cache(SimpleNamespace(cache=str(tmp_path / "cache"), data=str(tmp_path / "data"), workers=2), model, sets)
    return SimpleNamespace(data=tmp_path / "data", cache=tmp_path / "cache", open=opened, model=model)


def test_the_losses_are_those_without(runs):
    """To what half precision keeps. After a step or two of Adam the gradient's norm is not: rounding alone moves it by a tenth."""
    (plain, told), (cached, told_cached) = ((log(out), (out / "stdout").read_text()) for out in runs[:2])
    assert [row["step"] for row in plain] == [row["step"] for row in cached] == [1, 2] and plain[0]["loss"] != cached[0]["loss"]
    for a, b in zip(plain, cached):
        assert set(a["loss"]) == {"edit", "sr", "t2i"} and all(abs(b["loss"][task] / a["loss"][task] - 1) < 5e-4 for task in a["loss"])
    assert abs(cached[0]["grad_norm"] / plain[0]["grad_norm"] - 1) < 2e-3
    held_out = [[list(map(float, line.split()[1:])) for line in text.splitlines() if line.startswith(("edit ", "sr ", "t2i "))]
                for text in (told, told_cached)]
    assert np.shape(held_out) == (2, 3, 2) and np.abs(np.divide(*held_out) - 1).max() < 5e-4


def test_every_picture_and_text_is_in_it_once_and_as_the_networks_give_it(own):
    latents, texts = (load_file(own.cache / f"{kind}-00000.safetensors") for kind in ("latents", "texts"))
    assert latents["latents"].shape == (12, 2, 4, 16, 16) and texts.keys() == {"context"} and texts["context"].shape == (7, 77, 128)
    assert {t.dtype for t in (*latents.values(), *texts.values())} == {torch.float16}
    kept, dataset = own.open(), data.Folder(own.data, "edit", "train", 64)
    for i, key in ((0, "file_name"), (3, "source_file_name")):
        name = dataset.items[i][key]
        expected = torch.stack(own.model.vae.encode(data.to_tensor(dataset.picture(name))[None]), dim=1)[0]
        assert torch.allclose(kept.latents(own.data / name), expected, rtol=2e-3, atol=1e-3)
    context, pooled = kept.states(["number 3", "", "number 3"])
    assert pooled is None and torch.allclose(context, own.model.encode_text(["number 3", "", "number 3"])[0], rtol=2e-3, atol=1e-3)


def test_what_is_kept_is_neither_encoded_nor_opened(runs, pictures, tmp_path, monkeypatch):
    """Nor is it resized; of sr's pictures, which are degraded anew each time, the sources still are."""
    seen = dict(vae=0, text=0, opened=[])
    encode, text, open_image = vae.VAE.encode, clip.CLIPText.forward, data.open_image
    monkeypatch.setattr(vae.VAE, "encode", lambda self, x, *a: seen.update(vae=seen["vae"] + len(x)) or encode(self, x, *a))
    monkeypatch.setattr(clip.CLIPText, "forward", lambda self, ids: seen.update(text=seen["text"] + len(ids)) or text(self, ids))
    monkeypatch.setattr(data, "open_image", lambda path: seen["opened"].append(path) or open_image(path))
    done = run(tmp_path / "without-sr", "--data", pictures, "--cache", runs[2], "--task", "edit,t2i")
    assert done.returncode == 0, done.stderr
    assert seen == dict(vae=0, text=0, opened=[])
    run(tmp_path / "with-sr", "--data", pictures, "--cache", runs[2])
    assert len(seen["opened"]) == 2 + 2 * 2 and seen["text"] == 0  # held-out examples, then two steps
    assert 0 < seen["vae"] <= 4 * (1 + 2)  # four at a time, held-out ones once


def test_a_run_may_go_on_with_or_without_it(runs, pictures, tmp_path):
    for steps, words in ((1, ["--cache", runs[2]]), (2, []), (3, ["--cache", runs[2], "--workers", 1])):
        done = run(tmp_path / "run", "--data", pictures, "--lr-schedule", "constant", "--steps", steps, *words)
        assert done.returncode == 0 and (steps == 1 or f"at step {steps - 1}" in done.stdout), done.stderr
    assert [row["step"] for row in log(tmp_path / "run")] == [1, 2, 3]


def test_it_goes_to_processes_that_start_anew(own):
    dataset = own.open().applied(dict(edit=data.Folder(own.data, "edit", "train", 64)))["edit"]
    before = dataset[0]  # with its file open
    sent = multiprocessing.reduction.ForkingPickler.dumps(dataset)
    assert len(sent) < 20_000
    after = multiprocessing.reduction.ForkingPickler.loads(sent)[0]
    assert torch.equal(before["source"], after["source"]) and before["target"].untyped_storage().nbytes() == 2 * 4 * 16 * 16 * 4


def test_making_that_was_interrupted_goes_on(own, monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 5)
    shutil.rmtree(own.cache)
    own.cache.mkdir()
    (own.cache / "cache.json.part").write_text("{")  # from a kill at the very first
    encode_text, write_file = type(own.model).encode_text, cache.write_file

    def full(path, write):
        if path.name == "latents-00001.safetensors":
            raise OSError("no space left")
        write_file(path, write)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_file", full)
        with pytest.raises(OSError):
            own.open()
    assert sorted(f.name for f in own.cache.iterdir()) == ["cache.json", "latents-00000.safetensors"]
    first, read = (own.cache / "latents-00000.safetensors").stat().st_mtime_ns, []
    with monkeypatch.context() as patch:
        picture = data.Folder.picture
        patch.setattr(data.Folder, "picture", lambda self, name: read.append(name) or picture(self, name))
        kept = own.open()
    assert len(read) == len(set(read)) == 12 - 5 and (own.cache / "latents-00000.safetensors").stat().st_mtime_ns == first
    assert [len(load_file(own.cache / f"latents-0000{i}.safetensors")["latents"]) for i in range(3)] == [5, 5, 2]
    monkeypatch.setattr(type(own.model), "encode_text", None)
    own.open()  # nothing is left to do
    monkeypatch.setattr(type(own.model), "encode_text", encode_text)
    whole = [kept.latents(own.data / f"{s}{i}.png") for s in ("", "s") for i in range(6)]
    monkeypatch.setattr(cache, "SHARD", 512)
    shutil.rmtree(own.cache)
    kept = own.open()
    assert all(torch.equal(a, kept.latents(own.data / f"{s}{i}.png")) for a, (s, i) in zip(whole, ((s, i) for s in ("", "s") for i in range(6))))


def changed(path, before, after):
    path.write_text(path.read_text().replace(before, after))


def touch(own):
    os.utime(own.data / "s4.png", ns=(0, 1))


def other_size_at_the_same_time(own):
    time = (own.data / "0.png").stat().st_mtime_ns
    (own.data / "0.png").write_bytes((own.data / "0.png").read_bytes() + b"\0")
    os.utime(own.data / "0.png", ns=(time, time))


def weights(own, part, name):
    with torch.no_grad():
        getattr(own.model, part).get_parameter(name)[0] += 1e-3


@pytest.mark.parametrize("change, words", [
    (touch, "set of pictures"), (other_size_at_the_same_time, "set of pictures"),
    (lambda own: changed(own.data / "metadata.jsonl", "number 5", "number 7"), "set of texts"),
    (lambda own: weights(own, "vae", "quant_conv.bias"), "autoencoder"),
    (lambda own: weights(own, "text_encoder", "text_model.final_layer_norm.bias"), "text encoder or tokenizer"),
    (lambda own: own.model.tokenizer.ranks.popitem(), "text encoder or tokenizer"),
    (lambda own: own.model.text_encoder.config.update(hidden_act="gelu"), "text encoder or tokenizer"),
    (lambda own: setattr(cache, "FORMAT", 2), "format")])
def test_what_is_stale_is_refused_by_name_and_kept(own, monkeypatch, change, words):
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT)
    before = {f: f.read_bytes() for f in own.cache.iterdir()}
    own.open()
    change(own)
    with pytest.raises(UserError, match=f"another {words}: delete it or name another"):
        own.open()
    assert before == {f: f.read_bytes() for f in own.cache.iterdir()}


def test_another_size_or_other_tasks_are_stale_and_where_the_data_lie_is_not(own):
    with pytest.raises(UserError, match="another picture size: "):
        own.open(size=32)
    own.open(tasks=["edit"])  # has all the pictures and texts
    with pytest.raises(UserError, match="another set of pictures: "):
        own.open(tasks=["t2i"])
    own.data.rename(own.data.parent / "moved")
    own.data.symlink_to(own.data.parent / "moved")
    own.open()


def test_sdxls_pooled_states_and_zeros_for_the_empty_text(own):
    from dataclasses import replace
    twice = replace(own.model, text_encoder_2=own.model.text_encoder, tokenizer_2=own.model.tokenizer)
    with pytest.raises(UserError, match="another text encoder or tokenizer and another state of the empty text: "):
        own.open(model=twice)
    shutil.rmtree(own.cache)
    kept = own.open(model=twice).states(["", "number 1"])
    assert kept[0][0].abs().max() == 0 and all(torch.allclose(a, b, rtol=2e-3, atol=2e-3) for a, b in zip(kept, twice.encode_text(["", "number 1"])))
    twice.index["force_zeros_for_empty_prompt"] = False
    with pytest.raises(UserError, match="another state of the empty text: "):
        own.open(model=twice)


def test_texts_are_left_out_where_their_encoder_trains(own):
    shutil.rmtree(own.cache)
    own.model.text_encoder.train()
    assert own.open().texts == {} and sorted(f.name for f in own.cache.iterdir()) == ["cache.json", "latents-00000.safetensors"]


def test_grids_are_drawn_from_pictures(own):
    args = SimpleNamespace(data=own.data, cache=own.cache, workers=0, batch_size=6, seed=0, t_range=None, p_global=0.0, antithetic=False, eval_size=2,
                           model="tiny")
    encode = data.Encoder(own.model.vae)
    examples, held_out, fixed = train.open_data(args, own.model, ["edit", "sr", "t2i"], encode)
    assert all(dataset[0]["target"].shape == (3, 64, 64) for dataset in held_out.values()) and encode.texts is not None
    assert all(example["target"].shape == (2, 4, 16, 16) for example in (*fixed, *(examples[i] for i in range(6))))


def test_a_network_on_pixels_keeps_those(pictures, tmp_path):
    """It has neither texts nor an autoencoder, whose variance is then none."""
    for name, words in (("plain", []), ("cached", ["--cache", tmp_path / "cache"])):
        done = run(tmp_path / name, "--data", pictures, "--task", "uncond", "--model", "scratch", "--steps", 1, *words)
        assert done.returncode == 0, done.stderr
    a, b = (log(tmp_path / name)[0]["loss"]["uncond"] for name in ("plain", "cached"))
    assert abs(b / a - 1) < 5e-4


@pytest.mark.parametrize("name", ["latents-00000.safetensors", "texts-00000.safetensors", "cache.json"])
def test_a_file_that_is_cut_short_is_named(own, pictures, tmp_path, name):
    file = own.cache / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=name):  # before anything is read from it
        own.open()
    done = run(tmp_path / "run", "--data", own.data, "--cache", own.cache)
    assert done.returncode == 2 and str(file) in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_file_that_goes_missing_or_holds_something_else_is_named(own):
    kept, path = own.open(), own.cache / "latents-00000.safetensors"
    save_file({"latents": torch.zeros(2, 2, 4, 16, 16)}, path)
    cache.opened.cache_clear()
    with pytest.raises(UserError, match="latents-00000.safetensors does not hold"):
        kept.latents(own.data / "s5.png")
    path.unlink()
    cache.opened.cache_clear()
    with pytest.raises(UserError, match="latents-00000.safetensors cannot be read"):
        kept.latents(own.data / "0.png")


def test_a_folder_or_file_that_is_no_cache_is_left_alone(pictures, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    for path in (tmp_path / "letters", tmp_path / "letters" / "a.txt"):
        done = run(tmp_path / "run", "--data", pictures, "--cache", path)
        assert done.returncode == 2 and f"{path} is no cache" in done.stderr
    assert [(f.name, f.read_text()) for f in (tmp_path / "letters").iterdir()] == [("a.txt", "dear")]


@pytest.mark.parametrize("task", ["edit", "translate"])
def test_it_goes_with_pictures_of_ones_own(tmp_path, task):
    done = run(tmp_path / "run", "--cache", tmp_path / "cache", "--task", task)
    assert done.returncode == 2 and "--cache goes with --data" in done.stderr and not list(tmp_path.iterdir())


def in_small_shards(*words):  # so that both ranks have some
    cache.SHARD = 5
    return called(*words)


def test_two_ranks_make_it_and_train_from_it(runs, pictures, tmp_path):
    ends = in_two_processes(in_small_shards, "train.py", *WORDS, "--out", tmp_path / "run", "--data", pictures, "--cache", tmp_path / "cache")
    assert not any(done.returncode for done in ends), [done.stderr[-3000:] for done in ends]
    assert len(list(tmp_path.glob("cache/*.safetensors"))) == 3 + 2
    for a, b in zip(log(runs[1]), log(tmp_path / "run")):
        assert all(abs(b["loss"][task] / a["loss"][task] - 1) < 1e-3 for task in a["loss"])
