"""hub.py: files that are whole or not there, the hub, checkpoints, and mistakes."""
import io
import json
import multiprocessing
import os
import re
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from conftest import ROOT, full_disk, refused
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import hub
import merge
import sample
import train
from hub import UserError, append_line, load_state, read_scalars, replacing, save_state, write_json


def files(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_text()
            for path in folder.rglob("*")}


# ---- writing ----

def test_a_file_or_a_folder_takes_its_place_when_all_of_it_is_there(tmp_path):
    with replacing(tmp_path / "new" / "a.txt") as beside:
        beside.touch(0o600)  # as safetensors does it
        beside.write_text("whole")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert stat.S_IMODE((tmp_path / "new" / "a.txt").stat().st_mode) == 0o644
    with replacing(tmp_path / "folder") as beside:
        (beside / "inner").mkdir(parents=True)
        (beside / "inner" / "b.txt").write_text("also")
        assert not (tmp_path / "folder").exists()
    assert {text for text in files(tmp_path).values() if text} == {"whole", "also"}


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path):
    """Also where it leads to nothing yet, and whether a file or a folder comes."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.txt", "folder"):
        (tmp_path / name).symlink_to(f"elsewhere/{name}")
    for text in ("first", "second"):
        hub.write_text(tmp_path / "a.txt", text)
        assert files(tmp_path / "elsewhere") == {"a.txt": text}
    with replacing(tmp_path / "folder") as beside:
        (beside / "inner").mkdir(parents=True)
    assert (tmp_path / "elsewhere" / "folder" / "inner").is_dir()
    assert all((tmp_path / name).is_symlink() for name in ("a.txt", "folder"))


@pytest.mark.parametrize("path", [".", "..", "folder", "folder/", "/", "file/a.txt", "a" * 300])
def test_a_place_where_nothing_can_be_written_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "folder/inside", "file")
    before = files(tmp_path)
    with refused(f"^{path.rstrip('/') or '/'}/? cannot be written"):
        hub.write_text(path, "text")
    assert files(tmp_path) == before


@pytest.mark.parametrize("error, raised", [
    (KeyboardInterrupt(), KeyboardInterrupt), (RuntimeError("a bug"), RuntimeError),
    (OSError(28, "No space left on device"), UserError), (SafetensorError("broken"), UserError)])
def test_what_is_not_finished_leaves_the_old_file(error, raised, tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    before = files(tmp_path)
    with pytest.raises(raised) as caught, replacing(tmp_path / "a.json") as beside:
        beside.write_text("{")
        raise error
    assert files(tmp_path) == before
    if raised is UserError:
        assert f"{tmp_path / 'a.json'} cannot be written" in str(caught.value)


def test_a_writer_that_was_killed_leaves_nothing_for_long_and_others_are_left_alone(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    abandoned, *others = (f"a.json.part-{process.pid}", f"a.json.part-{os.getppid()}",
                          f"b.json.part-{process.pid}")
    for name in (abandoned, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmp123").write_text("half")  # as safetensors leaves it
    write_json(tmp_path / "a.json", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *others}


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path):
    params, ema, optimizer = small_run()
    save_state(tmp_path / "state.safetensors", params, ema, optimizer, dict(step=1))
    with full_disk(100), refused("state.safetensors cannot be written"):
        save_state(tmp_path / "state.safetensors", params, ema, optimizer, dict(step=2))
    assert read_scalars(tmp_path / "state.safetensors") == dict(step=1)
    assert len(list(tmp_path.iterdir())) == 1
    # In a folder that is written as a whole, the place that the user knows is named.
    with full_disk(100), pytest.raises(UserError) as error:
        with replacing(tmp_path / "model") as folder:
            write_json(folder / "unet" / "config.json", "1" * 200)
    assert str(error.value).startswith(f"{tmp_path / 'model/unet/config.json'} cannot be written")


def test_a_full_disk_leaves_no_empty_picture_and_no_half_line(tmp_path):
    noise = Image.effect_noise((64, 64), 99)
    for kind in ("png", "gif"):
        with full_disk(100), refused(f"a.{kind} cannot be written"):
            with replacing(tmp_path / f"a.{kind}") as beside:
                noise.save(beside, format=kind)
    assert not files(tmp_path)
    log = tmp_path / "log.jsonl"
    with full_disk(10), refused("log.jsonl cannot be written .File too la"):
        append_line(log, {"step": "1" * 50})
    assert files(tmp_path) == {"log.jsonl": ""}
    append_line(log, {"step": 1})
    append_line(log, {"step": 2})
    with full_disk(30), refused("log.jsonl cannot be written"):
        append_line(log, {"step": 3})
    assert [json.loads(line) for line in log.read_text().splitlines()] == [{"step": 1}, {"step": 2}]


def hold(folder, workers):
    with hub.lock(folder):
        worker = os.fork()
        if worker:
            workers.put(worker)
        time.sleep(60)


def test_a_run_folder_is_held_until_its_process_is_gone(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    workers = context.Queue()
    process = context.Process(target=hold, args=(tmp_path / "run", workers))
    process.start()
    worker = workers.get(timeout=20)
    with refused("another process trains into .*run; wait"):
        with hub.lock(tmp_path / "run"):
            raise AssertionError
    with hub.lock(tmp_path / "other"):
        pass
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")  # of another process of the same run: the first holds the folder
        with hub.lock(tmp_path / "run"):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(hub, "fcntl", None)  # Windows
        with hub.lock(tmp_path / "run"):
            pass
    process.kill()
    process.join()
    try:
        for _ in range(2):
            # A worker of a DataLoader outlives its killed parent for a while, without the lock.
            with hub.lock(tmp_path / "run"):
                os.kill(worker, 0)
    finally:
        os.kill(worker, signal.SIGKILL)


# ---- checkpoints ----

def small_run(seed=0):
    """Parameters in two groups, their average and AdamW; the last never has a gradient."""
    torch.manual_seed(seed)
    params = {name: torch.nn.Parameter(torch.randn(4, 3)) for name in "abc"}
    ema = {name: torch.randn(4, 3) for name in "abc"}
    groups = [dict(params=[params["b"], params["c"]], weight_decay=0.1),
              dict(params=[params["a"]], weight_decay=0.0)]
    return params, ema, torch.optim.AdamW(groups, lr=0.1, fused=True)


def step(params, optimizer):
    for name in "ab":
        params[name].grad = params[name].detach().cos()
    optimizer.step()


def test_a_state_that_was_read_goes_on_bit_for_bit(tmp_path):
    a, ema, optimizer = small_run()
    a["a"].data = a["a"].data.t().contiguous().t()  # however the weights lie in memory
    for _ in range(3):
        step(a, optimizer)
    path, scalars = tmp_path / "new" / "state.safetensors", dict(step=3, settings=dict(data=None))
    save_state(path, a, ema, optimizer, scalars)
    b, other_ema, other = small_run(seed=1)
    load_state(path, b, other_ema, other)
    assert read_scalars(path) == scalars and len(other.state_dict()["state"]) == 2
    assert all(torch.equal(ema[name], other_ema[name]) for name in ema)
    for _ in range(2):
        step(a, optimizer)
        step(b, other)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_state_that_does_not_fit_is_named(tmp_path):
    path = tmp_path / "state.safetensors"
    params, ema, optimizer = small_run()
    save_state(path, params, ema, optimizer, dict(step=1))
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:20], b"", b"nothing of the kind"):
        path.write_bytes(content)
        for read in (read_scalars, lambda path: load_state(path, params, ema, optimizer)):
            with refused("cannot be read .*delete it to begin again"):
                read(path)
    save_file({"a": torch.ones(1)}, path)
    with refused("state.safetensors .delete it to begin again"):
        read_scalars(path)


@pytest.mark.parametrize("change, counted", [
    (lambda tensors: tensors | {"param/d": torch.ones(1)}, False),  # of another network
    (lambda tensors: tensors | {"adam/max_exp_avg_sq/a": torch.ones(4, 3)}, False),
    (lambda tensors: {key: v for key, v in tensors.items() if not key.endswith("/a")}, False),
    (lambda tensors: {key: v for key, v in tensors.items() if "adam/exp_avg/a" != key}, False),
    # A fused Adam would read beyond the end of a moment that is too short.
    (lambda tensors: tensors | {"adam/exp_avg/a": torch.ones(2)}, False),
    (lambda tensors: tensors | {"param/a": torch.ones(1)}, False),
    (lambda tensors: tensors | {"param/a": torch.ones(4, 3).long()}, False),
    (lambda tensors: tensors | {"ema/a": torch.full((4, 3), torch.nan)}, False),
    # Parameters without moments are no mistake by themselves.
    (lambda tensors: {key: v for key, v in tensors.items() if not key.startswith("adam/")}, True)])
def test_tensors_that_a_state_lacks_or_that_do_not_belong_to_it_are_noticed(
        change, counted, tmp_path):
    path = tmp_path / "state.safetensors"
    params, ema, optimizer = small_run()
    step(params, optimizer)
    save_state(path, params, ema, optimizer, dict(step=1))
    with hub.open_weights(path) as file:
        metadata = file.metadata()
    for metadata in (metadata, {"scalars": metadata["scalars"]}):  # earlier versions did not count
        save_file(change(load_file(path)), tmp_path / "other", metadata=metadata)
        if "tensors" in metadata or not counted:
            with refused("other .*delete it to begin again"):
                load_state(tmp_path / "other", *small_run())
        else:
            load_state(tmp_path / "other", *small_run())


# ---- mistakes ----

@pytest.mark.parametrize("content", ["[]", "{", "", '"text"', "\xff\xfe", "[" * 100_000])
def test_a_file_without_a_json_object_is_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with refused("a.json cannot be read .it holds no JSON object."):
        hub.read_json(tmp_path / "a.json")
    with refused("b.json cannot be read .No such file"):
        hub.read_json(tmp_path / "b.json")


def test_whatever_goes_wrong_with_a_file_is_blamed_on_it_but_for_our_own_words():
    for wrong in (lambda: {}["x"], lambda: [][1], lambda: 1 / 0, lambda: int("a\nb"),
                  lambda: None.x, lambda: torch.ones(2) @ torch.ones(3), lambda: len(3)):
        words = r"^a.json does not hold what it should \(\w+: .*\)$"
        with refused(words), hub.blaming("a.json"):
            wrong()
    for ours, shown in [("ours", "a.json: ours"), ("ours in a.json", "ours in a.json")]:
        with refused(f"^{shown}$"), hub.blaming("a.json"):
            raise UserError(ours)
    with pytest.raises(KeyboardInterrupt), hub.blaming("a.json"):
        raise KeyboardInterrupt


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_a_folder_that_is_no_model_is_named(tmp_path, monkeypatch):
    """A misspelt one is not looked for on the hub."""
    monkeypatch.setattr(hub, "download", lambda *args: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "file", "runs/all/file")
    for name in (tmp_path / "nowhere", tmp_path / "file", "nowhere", "./a/b", "~/a", "a/b/c",
                 "runs/al"):
        with refused(f"no model folder at {name}"):
            hub.fetch(name, "unet")
    with refused("has no folder unet/"):
        hub.fetch(tmp_path, "unet")
    with refused("has no model_index.json"):
        hub.fetch(tmp_path, "")
    folder = touch(tmp_path / "owner" / "name@v1", "model_index.json", "unet/config.json")
    assert hub.fetch(folder, "") == folder and hub.fetch(folder, "unet") == folder / "unet"


@pytest.mark.parametrize("names, words", [
    (["model_index.json", "transformer/config.json", "vae/config.json"], "is a transformer"),
    (["pytorch_lora_weights.safetensors", "README.md"], "LoRA.*fuse_lora.*save_pretrained"),
    (["v1-5-pruned.safetensors", "v1-inference.yaml"], "single file.*from_single_file.*save_pret"),
    (["v1-5-pruned.ckpt"], "single file.*from_single_file.*save_pretrained"),
    (["pytorch_model.bin", "README.md"], "kind that runs code when it is opened.*save_pretrained"),
    (["notes.txt"], "not a model in the Hugging Face layout")])
def test_what_lies_in_another_folder_is_said(names, words, tmp_path, monkeypatch):
    touch(tmp_path, *names)
    for subfolder in ("unet", "" if "model_index.json" not in names else "unet"):
        with refused(f"{tmp_path} has no .*{words}"):
            hub.fetch(tmp_path, subfolder)
        serve(monkeypatch, names, tmp_path / "cache")
        with refused(f"owner/name has no .*{words}"):
            hub.fetch("owner/name", subfolder)


def test_what_a_single_file_is_is_said(tmp_path):
    for key, words in [("model.diffusion_model.out.2.bias", "single file.*from_single_file"),
                       ("lora_unet_mid_block.lora_up.weight", "LoRA.*fuse_lora")]:
        save_file({key: torch.ones(1)}, tmp_path / "style.safetensors")
        with refused(f"no model folder at .*style.safetensors.*{words}"):
            hub.fetch(tmp_path / "style.safetensors", "unet")
    with refused("no model folder at .*old.ckpt.*from_single_file"):
        hub.fetch(touch(tmp_path, "old.ckpt") / "old.ckpt", "")


def test_sdxls_refiner_is_named_and_a_lora_beside_a_model_is_ignored_with_a_word(tmp_path, capsys):
    touch(tmp_path, "model_index.json", "unet/config.json", "text_encoder_2/config.json")
    with refused("has no folder text_encoder/: it is SDXL's refiner"):
        hub.fetch(tmp_path, "text_encoder")
    touch(tmp_path, "text_encoder/config.json", "pytorch_lora_weights.safetensors")
    for part in ("", "unet", "text_encoder", "unet"):
        hub.fetch(tmp_path, part)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}: the LoRA pytorch_lora_weights.safetensors is ignored, only the model "
        "itself is loaded\n")
    with refused("no folder tokenizer/: it is not a model in"):
        hub.fetch(tmp_path, "tokenizer")


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with refused("config.json cannot be read .it is no regular file"):
        hub.read_json(tmp_path / "config.json")
    os.mkfifo(tmp_path / "model.safetensors")
    with refused("no weights in"):
        hub.weight_files(tmp_path)
    write_json(tmp_path / "model.safetensors.index.json", dict(weight_map=dict(a="fifo.safetensors")))
    os.mkfifo(tmp_path / "fifo.safetensors")
    (file,) = hub.weight_files(tmp_path)
    with refused("no file .*fifo"), hub.open_weights(file):
        pass
    os.mkfifo(tmp_path / "log.jsonl")
    os.mkfifo(tmp_path / ".lock")
    for write in (lambda: append_line(tmp_path / "log.jsonl", {}),
                  lambda: write_json(tmp_path / "log.jsonl", {}),
                  lambda: hub.lock(tmp_path).__enter__()):
        with refused("written .it is no regular file"):
            write()
    with refused("log.jsonl cannot be read .it is no regular file"):
        train.forget_after(tmp_path / "log.jsonl", 0)
    assert (tmp_path / "log.jsonl").is_fifo()


# ---- the hub ----

def serve(monkeypatch, names, cache, revision=None):
    """Let a stand-in for the hub hold the named files; an index lists the shards of its kind."""
    import huggingface_hub

    def list_repo_files(repository, revision):
        assert (repository, revision) == ("owner/name", wanted)
        return list(names)

    def snapshot_download(repository, revision, allow_patterns, local_files_only=False):
        assert (repository, revision) == ("owner/name", wanted)
        if local_files_only and not cache.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache\nat all")
        here = [] if local_files_only else names
        cache.mkdir(exist_ok=True)
        for name in huggingface_hub.utils.filter_repo_objects(here, allow_patterns=allow_patterns):
            touch(cache, name)
            if ".index." in name:
                half = "fp16" in name
                shards = [n.rpartition("/")[2] for n in names
                          if "-of-" in n and ("fp16" in n) == half]
                write_json(cache / name, dict(weight_map=dict(enumerate(shards))))
        return str(cache)

    wanted = revision
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


STEM = "unet/diffusion_pytorch_model"
FULL, HALF = f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"
SHARDS = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
HALF_SHARDS = [f"{STEM}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX, HALF_INDEX = f"{STEM}.safetensors.index.json", f"{STEM}.safetensors.index.fp16.json"
OTHERS = ["unet/config.json", f"{STEM}.non_ema.safetensors", f"{STEM}.bin", "v1-5.safetensors",
          "vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt",
          "text_encoder/model.safetensors", "README.md"]


@pytest.mark.parametrize("there, fetched", [
    ([FULL, HALF], [FULL]), ([HALF], [HALF]),
    (["unet/diffusion_pytorch_model.bf16.safetensors"],) * 2,
    ([HALF_INDEX, *HALF_SHARDS],) * 2,  # diffusers' pull request 8869
    ([INDEX, *SHARDS, HALF_INDEX, *HALF_SHARDS], [INDEX, *SHARDS, HALF_INDEX]),
    ([INDEX, *SHARDS, HALF], [INDEX, *SHARDS])])
def test_the_hub_gives_one_precision_and_an_index_with_its_shards(there, fetched, tmp_path,
                                                                 monkeypatch):
    serve(monkeypatch, [*there, *OTHERS], tmp_path / "cache")
    assert hub.fetch("owner/name", "unet") == tmp_path / "cache" / "unet"
    found = {name for name, text in files(tmp_path / "cache").items() if text is not False}
    assert found == {*fetched, "unet/config.json"}
    weights = {f"unet/{file.name}" for file in hub.weight_files(tmp_path / "cache" / "unet")}
    assert weights == {name for name in fetched if name.endswith(".safetensors")}


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt",
                                  "diffusion_pytorch_model.non_ema.safetensors"])
def test_a_repository_with_weights_of_another_kind_alone_says_which(name, tmp_path, monkeypatch):
    def fails(place, function, *words):
        with refused(f"^no weights in {place}: .* and found {name}. "
                     "diffusers can load another variant .*save_pretrain"):
            function(*words)

    serve(monkeypatch, [f"unet/{name}", *OTHERS[-5:], "model_index.json"], tmp_path / "cache")
    fails("owner/name/unet", hub.fetch, "owner/name", "unet")
    serve(monkeypatch, [name, "config.json"], tmp_path / "cache")
    fails("owner/name", hub.fetch, "owner/name", "")
    assert not (tmp_path / "cache").exists()
    fails(tmp_path / "a", hub.weight_files, touch(tmp_path / "a", "config.json", name))
    # What lies beside the folders of a whole model is not needed.
    serve(monkeypatch, [name, "config.json", FULL, *OTHERS], tmp_path / "cache")
    hub.fetch("owner/name", "")


@pytest.mark.parametrize("config, kind", [
    (dict(_class_name="ControlNetModel"), "ControlNetModel"), (dict(model_type="clip"), "clip"),
    (dict(_class_name="UNet2DConditionModel"), "UNet2DConditionModel")])
def test_a_part_of_a_model_is_no_model_and_says_what_it_is(config, kind, tmp_path, monkeypatch):
    touch(tmp_path / "part", "diffusion_pytorch_model.safetensors")
    write_json(tmp_path / "part" / "config.json", config)
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: os.listdir("part"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: "part")
    monkeypatch.chdir(tmp_path)
    for name in ("part", "owner/name"):
        for read in (sample.load_model, merge.find_parts):
            with refused(f"^{name} has no model_index.json: it holds a {kind}"
                         " alone; name a whole model"):
                read(name)


def test_the_hub_gives_parts_without_weights_and_models_without_folders(tmp_path, monkeypatch):
    serve(monkeypatch, [*OTHERS, FULL], tmp_path / "a", revision="refs/pr/1")
    hub.fetch("owner/name@refs/pr/1", "tokenizer")
    assert {*files(tmp_path / "a")} == {"tokenizer", "tokenizer/vocab.json", "tokenizer/merges.txt"}
    tower = ["config.json", "model.safetensors"]  # CLIP's, alone in its repository
    serve(monkeypatch, [*tower, "pytorch_model.bin", *OTHERS], tmp_path / "b")
    assert hub.fetch("owner/name", "") == tmp_path / "b"
    assert {*files(tmp_path / "b")} == {*tower}


def test_without_a_network_a_download_is_found_again(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network\nat all")

    import huggingface_hub
    for i in range(2):
        serve(monkeypatch, [*OTHERS, FULL], tmp_path / "cache")
        monkeypatch.setattr(huggingface_hub, "list_repo_files", no_network)
        if i == 0:
            with refused("owner/name.*OSError: no network$"):
                hub.fetch("owner/name", "unet")
            serve(monkeypatch, [*OTHERS, FULL], tmp_path / "cache")
        assert hub.fetch("owner/name", "unet") == tmp_path / "cache" / "unet"
        assert hub.weight_files(tmp_path / "cache" / "unet") == [tmp_path / "cache" / FULL]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with refused("no network$"):
        hub.fetch("owner/name", "unet")


@pytest.mark.parametrize("error, code, words", [
    (UserError("no such\n thing"), 2, "error: no such thing"),
    (SafetensorError("bad file"), 2, "error: bad file"),
    (FileNotFoundError(2, "No such file", "a.png"), 2, "error: a.png: No such file"),
    (OSError("no network"), 2, "error: no network"), (MemoryError(), 2, "error: out of memory"),
    (torch.OutOfMemoryError("a\nb"), 2, "error: out of memory"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: "), 2, "error: out of memory"),
    (KeyboardInterrupt(), 130, "interrupted")])
def test_a_command_ends_in_one_line(error, code, words, capsys, monkeypatch):
    def main():
        signal.signal(signal.SIGTERM, lambda *_: None)  # train.py saves before it ends
        warnings.warn("a library's remark")
        raise error

    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: print(message, file=sys.stderr))
    with pytest.raises(SystemExit) as end:
        hub.command(main)
    stderr = capsys.readouterr().err
    assert end.value.code == code and stderr.startswith(words) and stderr.count("\n") == 1

    # The second process of torchrun's waits to be ended before it prints the same.
    def sleep(seconds):
        assert seconds > 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert not capsys.readouterr().err
        raise InterruptedError

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InterruptedError):
        hub.command(main)


def test_ctrl_c_during_the_imports_is_no_traceback():
    """Before `command` runs. Every command imports hub first: torch takes seconds."""
    for path in ROOT.glob("*.py"):
        if "    command(main)" in path.read_text():
            imports = [line for line in path.read_text().splitlines()
                       if line.startswith(("import", "from"))]
            assert imports[0].split()[:2] == ["import", "hub"], path
    for error, code, words in [("KeyboardInterrupt", 130, "^interrupted\n$"),
                               ("ImportError", 1, "^Traceback(.|\n)*ImportError\n$")]:
        done = subprocess.run([sys.executable, "-c", f"import hub; raise {error}"], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == code and re.search(words, done.stderr)


def test_a_program_from_elsewhere_keeps_its_own_way_to_end(tmp_path):
    (tmp_path / "own.py").write_text("import hub; raise KeyboardInterrupt")
    done = subprocess.run([sys.executable, tmp_path / "own.py"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stderr.endswith("\nKeyboardInterrupt\n")


def test_a_mistake_of_ours_shows_its_traceback_and_a_command_without_mistakes_just_runs():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        hub.command(main)
    assert hub.command(lambda: 3) == 3


def test_a_character_that_the_terminal_lacks_is_a_question_mark(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    hub.command(lambda: print("ein Häuschen", flush=True))
    assert terminal.buffer.getvalue().split() == [b"ein", b"H?uschen"]


def test_arguments_that_do_not_parse_are_a_users_mistake_and_help_shows_defaults():
    parser = hub.Parser("Do it.")
    parser.add_argument("--steps", type=int, default=3, help="how many")
    parser.add_argument("--model", help="which")
    for words in (["--steps", "x"], ["--step-size", "1"], ["--model"]):
        with refused(words[0]):
            parser.parse_args(words)
    shown = " ".join(parser.format_help().split())
    assert "how many (default: 3)" in shown and shown.endswith("which")


def test_a_device_or_a_compiler_that_is_not_there_is_named(monkeypatch):
    with refused("^--device nonsense is not available here .*[)]$"):
        hub.pick_device("nonsense")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with refused(r"--compile on CPU needs a C\+\+ compiler"):
        hub.compiled(len, torch.device("cpu"))


def test_a_processor_without_instructions_for_bf16_is_known():
    """By the flags that Linux reads off an x86 processor."""
    information = Path("/proc/cpuinfo")
    if not information.exists() or "avx2" not in information.read_text():
        pytest.skip("no x86 processor under Linux")
    known = re.search("avx512bw|avx_ne_convert", information.read_text())
    assert hub.is_slow_in_bf16(torch.device("cpu")) == (known is None)
    assert not hub.is_slow_in_bf16(torch.device("cuda"))



@pytest.mark.parametrize("name", ["../x.safetensors", "*", "a?.safetensors", "/etc/passwd", ""])
def test_a_shard_is_a_plain_file_beside_its_index(tmp_path, name):
    write_json(tmp_path / "model.safetensors.index.json", dict(weight_map=dict(a=name)))
    with refused("no plain file name"):
        hub.weight_files(tmp_path)
