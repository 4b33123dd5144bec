"""hub.py: files that are whole or not there, checkpoints, mistakes. More of models: test_unet.py."""
import io
import os
import stat
import subprocess
import sys

import pytest
import torch
from conftest import full_disk
from safetensors import SafetensorError
from safetensors.torch import save_file

import hub
from hub import UserError, load_state, read_scalars, replacing, save_state, write_json


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
    with full_disk(100), pytest.raises(UserError, match="state.safetensors cannot be written"):
        save_state(tmp_path / "state.safetensors", params, ema, optimizer, dict(step=2))
    assert read_scalars(tmp_path / "state.safetensors") == dict(step=1)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="cannot be written"):
        write_json(tmp_path / "state.safetensors" / "a.json", 1)


# ---- checkpoints ----

def small_run(seed=0, names="abc", width=3):
    """Parameters in two groups, their average and AdamW; the last never has a gradient."""
    torch.manual_seed(seed)
    params = {name: torch.nn.Parameter(torch.randn(4, width)) for name in names}
    ema = {name: torch.randn(4, width) for name in names}
    groups = [dict(params=[params[name] for name in names[1:]], weight_decay=0.1),
              dict(params=[params[names[0]]], weight_decay=0.0)]
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
    for state in (small_run(names="abx"), small_run(width=5)):
        with pytest.raises(UserError, match="state.safetensors .*delete it to begin again"):
            load_state(path, *state)
    for content in (whole[:-100], whole[:20], b"", b"nothing of the kind"):
        path.write_bytes(content)
        for read in (read_scalars, lambda path: load_state(path, params, ema, optimizer)):
            with pytest.raises(UserError, match="cannot be read .*delete it to begin again"):
                read(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(UserError, match="state.safetensors .delete it to begin again"):
        read_scalars(path)


# ---- mistakes ----

@pytest.mark.parametrize("content", ["[]", "{", "", '"text"', "\xff\xfe", "[" * 100_000])
def test_a_file_without_a_json_object_is_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="a.json cannot be read .it holds no JSON object."):
        hub.read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="b.json cannot be read .No such file"):
        hub.read_json(tmp_path / "b.json")


def test_whatever_goes_wrong_with_a_file_is_blamed_on_it_but_for_our_own_words():
    for wrong in (lambda: {}["x"], lambda: [][1], lambda: 1 / 0, lambda: int("a\nb"),
                  lambda: None.x, lambda: torch.ones(2) @ torch.ones(3), lambda: len(3)):
        words = r"^a.json does not hold what it should \(\w+: .*\)$"
        with pytest.raises(UserError, match=words), hub.blaming("a.json"):
            wrong()
    with pytest.raises(UserError, match="^ours$"), hub.blaming("a.json"):
        raise UserError("ours")
    with pytest.raises(KeyboardInterrupt), hub.blaming("a.json"):
        raise KeyboardInterrupt


def test_a_folder_that_is_no_model_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "nowhere", tmp_path / "file", "nowhere", "./a/b", "~/a", "a/b/c"):
        with pytest.raises(UserError, match=f"no model folder at {name}"):
            hub.fetch(name, "unet")
    with pytest.raises(UserError, match="has no folder unet/"):
        hub.fetch(tmp_path, "unet")
    assert hub.fetch(tmp_path, "") == tmp_path


@pytest.mark.parametrize("error, code, words", [
    (UserError("no such\n thing"), 2, "error: no such thing"),
    (SafetensorError("bad file"), 2, "error: bad file"),
    (FileNotFoundError(2, "No such file", "a.png"), 2, "error: a.png: No such file"),
    (OSError("no network"), 2, "error: no network"), (MemoryError(), 2, "error: out of memory"),
    (KeyboardInterrupt(), 130, "interrupted")])
def test_a_command_ends_in_one_line(error, code, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        hub.command(main)
    stderr = capsys.readouterr().err
    assert end.value.code == code and stderr.startswith(words) and stderr.count("\n") == 1


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
        with pytest.raises(UserError, match=words[0]):
            parser.parse_args(words)
    shown = " ".join(parser.format_help().split())
    assert "how many (default: 3)" in shown and shown.endswith("which")


def test_a_device_or_a_compiler_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(UserError, match="^--device nonsense is not available here .*[)]$"):
        hub.pick_device("nonsense")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"--compile on CPU needs a C\+\+ compiler"):
        hub.compiled(len, torch.device("cpu"))
