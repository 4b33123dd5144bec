"""evaluate.py: what its figures count."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import emoji
import evaluate
import measures
from conftest import assert_mistake, call, in_two_processes
from data import ASSETS
from sample import load_model


def test_a_picture_is_ranked_among_all():
    """On the pictures themselves each is nearest to itself; elsewhere the nearer ones count."""
    dataset = evaluate.open_examples("t2i", "heldout", 64)
    judge = measures.Nearest(dataset, range(40))
    pictures = torch.stack([dataset[i]["target"] for i in range(40)])
    small = torch.nn.functional.interpolate(pictures, scale_factor=0.25, mode="area")

    def distance(i, j):
        return ((small[i] - small[j]) ** 2).sum()

    for shift, share in ((0, 1.0), (2, 0.0)):
        own = [(i + shift) % 40 for i in range(40)]
        judged = judge.judge([dict(number=number) for number in own], pictures)
        rank = [sum(int(distance(i, j) < distance(i, own[i])) for j in range(40))
                for i in range(40)]
        assert judged["nearest"] == [float(r == 0) for r in rank]
        assert judged["nearest 10"] == [float(r < 10) for r in rank]
        assert np.mean(judged["nearest"]) == share
    assert 0 < np.mean(judged["nearest 10"]) < 1


def options(folder, **changes):
    """The arguments that the functions of evaluate.py read."""
    return SimpleNamespace(**dict(
        count=30, split="heldout", data=None, seed=0, steps=1, guidance=1.0, image_guidance=1.0,
        batch_size=25, model_hash="none", pictures=str(folder)) | changes)


def measured(model, task, args):
    return evaluate.measure_task(model, task, args, [])


@pytest.fixture(scope="module")
def mtu():
    return load_model(ASSETS / "tiny-mtu")


def by_prompt(monkeypatch, pictures):
    """In place of sampling: draw the picture that stands for each prompt."""
    def generate(model, task, prompts, sources, **options):
        return [pictures[prompt] for prompt in prompts]
    monkeypatch.setattr(evaluate, "generate", generate)


def test_a_model_that_draws_the_right_picture_is_recognised(mtu, monkeypatch, tmp_path):
    """A stand-in that draws each caption's own picture, and one that draws another's."""
    examples = list(emoji.Builtin("plain", "heldout"))
    captions = [example["prompt"] for example in examples]
    pictures = [data.to_pil(example["target"]) for example in examples]
    by_prompt(monkeypatch, dict(zip(captions, pictures)))
    scores = measured(mtu, "t2i", options(tmp_path / "own"))
    # A few are drawn alike.
    assert scores["nearest"]["value"] > 0.9 and scores["nearest 10"]["value"] == 1
    assert scores["nearest"]["count"] == 30
    assert scores["nearest"]["network"] == f"nearest of {len(captions)} pictures"
    by_prompt(monkeypatch, {caption: pictures[i - 7] for i, caption in enumerate(captions)})
    assert measured(mtu, "t2i", options(tmp_path / "other"))["nearest"]["value"] < 0.1


def test_a_model_that_draws_the_right_class_is_recognised(monkeypatch, tmp_path):
    """A stand-in that draws some picture of each class, and one that draws another class."""
    dataset = data.builtin("class", "heldout", 64)
    of_class = {}
    for example in dataset:
        of_class.setdefault(example["prompt"], data.to_pil(example["target"]))
    names = list(of_class)
    vae = SimpleNamespace(encode=lambda x: (x, None), decode=lambda x: x)
    weight = torch.zeros(1)
    model = SimpleNamespace(native_size=64, vae=vae, device=torch.device("cpu"),
                            unet=SimpleNamespace(conv_out=SimpleNamespace(weight=weight)))
    monkeypatch.setattr(evaluate, "scales", lambda *words: (1.0, 1.0))
    by_prompt(monkeypatch, of_class)
    scores = measured(model, "class", options(tmp_path / "own"))
    assert set(scores) == {"same class"} and scores["same class"]["count"] == 30
    assert scores["same class"]["value"] == 1
    by_prompt(monkeypatch, {name: of_class[names[i - 1]] for i, name in enumerate(names)})
    assert measured(model, "class", options(tmp_path / "other"))["same class"]["value"] == 0


def test_a_model_that_infers_the_right_class_is_recognised(monkeypatch):
    """MT-Diffusion's top-1, with stand-ins that name the right class, or the next one."""
    dataset = data.builtin("label", "heldout", 16)
    examples = list(dataset)
    right = {example["target"].numpy().tobytes(): example["x"] for example in examples}
    for shift, share in ((0, 1.0), (1, 0.0)):
        def draw_modalities(model, count, known, **options):
            labels = [(right[picture.numpy().tobytes()] + shift) % 10 for picture in known["image"]]
            return dict(label=torch.eye(10)[labels])
        monkeypatch.setattr(evaluate, "draw_modalities", draw_modalities)
        record = evaluate.measure_labels(
            None, dataset, evaluate.spread(30, len(dataset)), options("none"))["top-1"]
        assert record["value"] == share and record["better"] == "higher"
        assert record["count"] == 30 and record["network"] == "the model, of 10 classes"


def test_the_untouched_source_is_never_closer_than_itself(mtu, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "generate",
                        lambda model, task, prompts, sources, **options: sources)
    scores = measured(mtu, "edit", options(tmp_path, count=4))
    assert scores["closer"]["value"] == 0
    # Nothing changed, and the rest stayed better than any autoencoder can keep it.
    assert scores["changed"]["value"] == 0 and scores["kept"]["value"] == 1
    assert scores["rest"]["value"] > scores["rest"]["ceiling"] + 10
    # The drawings were 8-bit files.
    assert all(r["nothing"] == pytest.approx(r["value"], abs=1e-3) for r in scores.values()
               if r is not scores["rest"])


def test_psnr_is_the_textbooks_and_each_kind_of_edit_has_its_own():
    dataset = data.builtin("edit", "heldout")
    examples = [dataset[i] for i in evaluate.spread(12, len(dataset))]
    drawn = [(example["source"] + example["target"]) / 2 for example in examples]
    judged = measures.Pixels().judge(examples, drawn)
    expected = [10 * np.log10(255 ** 2 / np.mean(np.square(
        127.5 * (picture - example["target"]).double().numpy())))
        for picture, example in zip(drawn, examples)]
    assert judged["PSNR"] == pytest.approx(expected, rel=1e-4) and set(judged["closer"]) == {1.0}
    for kind in ("tone", "gender"):
        own = [value for value in judged[f"PSNR, {kind}"] if value is not None]
        assert own == [value for value, example in zip(judged["PSNR"], examples)
                       if example["kind"] == kind]
    far = measures.Pixels().judge(examples, [-example["target"] for example in examples])
    assert set(far["closer"]) == {0.0}
    # No error at all counts as 100 dB.
    assert measures.Pixels().judge(examples[:1], [examples[0]["target"]])["PSNR"] == [100]


# -------------------------------------------------------------------------------------------------
# Drawings that are kept

@pytest.fixture
def counted(monkeypatch):
    """In place of sampling: pictures of one grey level, which is the seed; and the calls."""
    calls = []

    def generate(model, task, prompts, sources, *, seed, **options):
        calls.append((seed, len(prompts)))
        return [Image.new("RGB", (64, 64), (seed + i, 0, 0)) for i in range(len(prompts))]
    monkeypatch.setattr(evaluate, "generate", generate)
    return calls


def drawings(paths):
    return [Image.open(path).getpixel((0, 0))[0] for path in paths]


def test_an_interrupted_evaluation_goes_on(mtu, tmp_path, counted):
    """What is there is not drawn again; a batch with a missing or damaged file is, as a whole."""
    dataset = evaluate.open_examples("edit", "heldout", 64)
    numbers = evaluate.spread(10, len(dataset))
    args = options(tmp_path, batch_size=4)
    paths = evaluate.draw(mtu, "edit", dataset, numbers, args)
    assert counted == [(0, 4), (4, 4), (8, 2)] and drawings(paths) == list(range(10))
    counted.clear()
    paths[5].write_bytes(paths[5].read_bytes()[:60])
    paths[9].unlink()
    assert evaluate.draw(mtu, "edit", dataset, numbers, args) == paths
    assert counted == [(4, 4), (8, 2)] and drawings(paths) == list(range(10))


@pytest.mark.parametrize("change", [dict(seed=1), dict(steps=2), dict(guidance=2.0),
                                    dict(model_hash="other"), dict(split="train")])
def test_drawings_of_other_settings_are_not_reused(mtu, tmp_path, counted, change):
    dataset = evaluate.open_examples("edit", "heldout", 64)
    args = options(tmp_path)
    first = evaluate.draw(mtu, "edit", dataset, [0, 1], args)
    second = evaluate.draw(mtu, "edit", dataset, [0, 1], options(tmp_path, **change))
    assert len(counted) == 2 and not set(first) & set(second)


def test_a_drawing_of_another_source_is_not_reused(mtu, tmp_path, counted):
    """A folder's pictures may change while its name stays."""
    examples = [dict(prompt="make it red", source=torch.zeros(3, 64, 64)) for _ in range(2)]
    evaluate.draw(mtu, "edit", examples, [0, 1], options(tmp_path))
    evaluate.draw(mtu, "edit", examples, [0, 1], options(tmp_path))
    assert len(counted) == 1
    examples[1]["source"] = torch.ones(3, 64, 64)
    evaluate.draw(mtu, "edit", examples, [0, 1], options(tmp_path))
    assert len(counted) == 2


def test_a_model_is_known_by_its_weights(mtu):
    before = evaluate.model_hash(mtu)
    assert before == evaluate.model_hash(load_model(ASSETS / "tiny-mtu"))
    other = load_model(ASSETS / "tiny-mtu")
    with torch.no_grad():
        other.unet.conv_out.bias[0] += 1e-3
    assert before != evaluate.model_hash(other)


def test_processes_share_the_batches(mtu, tmp_path, counted):
    """Each is drawn once, in the shape that it has for one process."""
    dataset = evaluate.open_examples("edit", "heldout", 64)
    numbers = evaluate.spread(10, len(dataset))
    args = options(tmp_path, batch_size=3)
    for rank, shapes in enumerate(([(0, 3), (6, 3)], [(3, 3), (9, 1)])):
        counted.clear()
        paths = evaluate.draw(mtu, "edit", dataset, numbers, args, rank, 2)
        assert counted == shapes
    assert drawings(paths) == list(range(10))


def run_in_a_rank(words):
    return call("evaluate.py", *words)


@pytest.mark.slow
def test_two_processes_print_what_one_prints(tmp_path):
    words = ["--task", "sr", "--count", 5, "--steps", 1, "--batch-size", 2, "--device", "cpu"]
    alone = call("evaluate.py", *words, "--pictures", tmp_path / "one")
    first, second = in_two_processes(run_in_a_rank, [*words, "--pictures", tmp_path / "two"])
    assert alone.returncode == first.returncode == second.returncode == 0, first.stderr
    assert first.stdout == alone.stdout and second.stdout == ""


# -------------------------------------------------------------------------------------------------
# What is said of an example

def test_the_answer_of_an_edit_is_the_word_that_its_target_shows():
    dataset = evaluate.open_examples("edit", "train", 64)
    kinds = {}
    for i, change in enumerate(dataset.items):
        kinds.setdefault(change.kind, i)
    for kind, i in kinds.items():
        example = evaluate.example_of(dataset, i)
        assert example["answers"] == {kind: dataset.items[i].b}
        before, after = example["captions"]
        assert before != after and before.endswith(f"{dataset.items[i].style} style")
        if kind == "tone":
            assert ("skin tone" in after) == (dataset.items[i].b != "yellow")


def test_a_caption_says_what_its_picture_should_show():
    dataset = evaluate.open_examples("t2i", "heldout", 64)
    for i in (0, 17):
        row = emoji.rows_of("heldout")[i // 2]
        style = emoji.STYLES[i % 2]
        example = evaluate.example_of(dataset, i)
        assert example["prompt"] == f"{row.name}, {style} style"
        assert np.array_equal(data.to_pil(example["target"]),
                              emoji.drawing(style, row.cells[None]))
        assert example["answers"]["style"] == style
    dataset = evaluate.open_examples("inpaint", "heldout", 64)
    assert evaluate.example_of(dataset, 0)["answers"] == {}


def own_folder(root, **extra):
    """A folder of four edits, all held out, with captions as InstructPix2Pix has them."""
    dataset = data.builtin("edit", "heldout")
    rows = []
    for i in range(4):
        for key in ("source", "target"):
            data.to_pil(dataset[i * 100][key]).save(root / f"{key}-{i}.png")
        rows.append(dict(file_name=f"target-{i}.png", source_file_name=f"source-{i}.png",
                         text="make it so", split="heldout", **extra))
    rows.append(dict(rows[0], split="train"))
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_a_folder_is_measured_too(tmp_path):
    folder = own_folder(tmp_path, input="a hand", output="a dark hand")
    dataset = evaluate.open_examples("edit", "heldout", 64, folder)
    assert evaluate.example_of(dataset, 0)["captions"] == ["a hand", "a dark hand"]
    done = call("evaluate.py", "--data", folder, "--count", 3, "--steps", 1, "--task", "edit",
                "--pictures", tmp_path / "drawn", "--out", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["scores"]["edit"]["PSNR"]["count"] == 3
    # The classifier knows nothing but the built-in emoji.
    assert set(result["scores"]["edit"]) == {"PSNR", "closer", "changed", "rest", "kept"}
    assert result["scores"]["edit"]["rest"]["settings"]["data"] == str(folder)


def test_captions_are_read_from_instruct_pix2pixs_prompts(tmp_path):
    dataset = SimpleNamespace(root=tmp_path)
    row = dict(text=dict(file="prompt.json"))
    for keys, expected in (({"caption": "a", "edit": "e", "output": "b"}, ["a", "b"]),
                           ({"input": "a", "edit": "e", "output": "b"}, ["a", "b"]),
                           ({"edit": "e"}, None)):
        (tmp_path / "prompt.json").write_text(json.dumps(keys))
        assert evaluate.captions_of(dataset, row) == expected
    assert evaluate.captions_of(dataset, dict(text="make it red")) is None
    # A caption in a file of its own belongs to text-to-image.
    (tmp_path / "1.txt").write_text("a cat")
    assert evaluate.captions_of(dataset, dict(text=dict(file="1.txt"))) is None


# -------------------------------------------------------------------------------------------------
# The command

def test_several_tasks_make_one_table_and_one_file(tmp_path):
    """And the same seed gives the same scores, from kept drawings as from new ones."""
    def run(name, pictures):
        done = call("evaluate.py", "--count", 3, "--steps", 1, "--pictures", tmp_path / pictures,
                    "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((tmp_path / name).read_text())
    printed, first = run("a.json", "one")
    assert printed == run("b.json", "one")[0] == run("c.json", "two")[0]
    assert printed.count("score  ") == 1 and set(first["scores"]) == set(data.ALL)
    for task, records in first["scores"].items():
        assert {"emoji-KD", "emoji-FD", "nearest" if task == "t2i" else "PSNR"} <= set(records)
        assert ("changed" in records) == (task in ("edit", "inpaint"))
        for name, r in records.items():
            assert {"value", "margin", "nothing", "ceiling", "count", "better", "network",
                    "sha256", "resize"} <= set(r)
            assert (r["nothing"] is None) == (task == "t2i") and r["ceiling"] is not None
            assert {"split", "seed", "steps", "guidance", "format", "model"} <= set(r["settings"])
            # Each word of the table is explained below it.
            word = name.partition(",")[0]
            assert f"\n{word:<10} " in printed and f"{name:<28}{task}" in printed
    assert "right on" in printed and first["scores"]["edit"]["tone"]["sha256"] in printed


def test_an_edit_without_captions_has_no_direction_and_a_line_says_so(tmp_path, monkeypatch):
    class WithoutCaptions:
        record = dict(network="stub", sha256=None, resize="none")

        def __init__(self, device, path):
            pass

        def judge(self, examples, drawn):
            return {"CLIP image similarity": [0.5] * len(drawn),
                    "CLIP image-text direction": [0.1 if example.get("captions") else None
                                                  for example in examples]}
    monkeypatch.setattr(measures, "CLIP", WithoutCaptions)
    for number, captions in enumerate((dict(caption="a hand", output="a dark hand"), {})):
        folder = tmp_path / str(number)
        folder.mkdir()
        own_folder(folder, **captions)
        done = call("evaluate.py", "--task", "edit", "--data", folder, "--count", 2, "--steps", 1,
                    "--clip", "x", "--pictures", tmp_path / "drawn")
        assert done.returncode == 0, done.stderr
        assert ("CLIP image-text direction*" in done.stdout) == bool(captions)
        assert ("no captions" in done.stderr) == (not captions)


class Stub:
    """In place of Inception: the numbers of its scores, in its order."""
    record = dict(network="stub", sha256="0" * 16, resize="none")

    def __init__(self, device, path):
        pass

    def features(self, pictures):
        return pictures.mean(dim=(2, 3))

    def compare(self, drawn, targets):
        return {"KID": 0.5, "FID": 100.0}


def test_fid_of_few_pictures_warns_and_stands_after_kid(tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "Inception", Stub)
    done = call("evaluate.py", "--task", "t2i", "--count", 10, "--steps", 1, "--inception", "x",
                "--pictures", tmp_path)
    assert done.returncode == 0 and "warning: FID of 10 pictures" in done.stderr
    lines = [line.split()[0] for line in done.stdout.splitlines() if line]
    # FID is what MTU's Table 2 prints for text-to-image.
    assert lines.index("KID") < lines.index("FID*")


@pytest.mark.parametrize("arguments, words", [
    (["--task", "colour"], "t2i"),
    (["--task", "edit", "--model", ASSETS / "tiny"], "edit"),
    (["--count", 0], "--count"),
    (["--split", "test"], "split"),
    (["--count", 9, "--inception", "w.pth"], "--inception"),
    (["--lpips", "missing.pth"], "pip install lpips|missing.pth"),
    (["--clip", "missing"], "missing"),
    (["--data", "missing"], "missing")])
def test_a_mistake_is_one_line_and_exit_2(arguments, words):
    done = call("evaluate.py", *arguments)
    assert_mistake(done)
    assert any(word in done.stderr for word in words.split("|"))
