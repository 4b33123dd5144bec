"""Tasks and built-in data: what is held out, what pairs with what, and the folder reader."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
from folders import UserError


def test_every_emoji_in_both_styles():
    rows = data.Sheet.load()
    assert len(rows) == 1911 and sum(len(e.cells) for e in rows) == 3786
    for style in data.STYLES:
        assert all(np.asarray(data.Sheet.picture(style, e.cells[None]))[..., 3].max() > 0 for e in rows)


def test_whole_concepts_are_held_out():
    """No concept on both sides; tones, genders, colours and styles of a thing share a concept."""
    sides = [{e.concept for e in data.builtin("t2i", split).rows} for split in ("train", "heldout")]
    assert not sides[0] & sides[1] and 0.07 < len(sides[1]) / len(sides[0] | sides[1]) < 0.13
    concept = {e.name: e.concept for e in data.Sheet.load()}
    assert concept["man cook"] == concept["woman cook"] == concept["cook"]
    assert concept["blue heart"] == concept["green heart"] == concept["heavy black heart"] != concept["large blue circle"]
    assert concept["dog face"] != concept["cat face"]


@pytest.mark.parametrize("task", data.TASKS)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_examples(task, split):
    dataset = data.builtin(task, split)
    for i in range(0, len(dataset), len(dataset) // 20):
        example, again = dataset[i], dataset[i]
        assert (("source" in example) == (data.TASKS[task].source is not None)) and (example["prompt"] == "") == (task in ("sr", "uncond"))
        for key in ("source", "target"):
            if key in example:
                assert example[key].shape == (3, 64, 64) and example[key].abs().max() <= 1
                assert torch.equal(example[key], again[key])
        if data.TASKS[task].source:
            assert (example["source"] - example["target"]).abs().mean() > 0


def test_edit_pairs_are_genuine():
    """Both pictures show one figure in one style, and the instruction names the target's attribute."""
    dataset = data.builtin("edit", "train")
    cells = {tuple(cell): (e, tone) for e in data.Sheet.load() for tone, cell in e.cells.items()}
    kinds = set()
    for kind, a, b, name, source, target, style in dataset.items[::37]:
        (e, tone), (f, other) = cells[tuple(source)], cells[tuple(target)]
        assert e.concept == f.concept and (tone, e) != (other, f) and e.name == name
        if kind == "tone":
            assert e is f and (data.TONES[tone], data.TONES[other]) == (a, b)
        else:
            word = "person" if kind == "gender" else "colour"
            assert tone == other and (getattr(e, word), getattr(f, word)) == (a, b)
        kinds.add(kind)
    assert kinds == {"tone", "gender", "colour"}
    assert all(b in dataset[i]["prompt"] for i in range(0, len(dataset), 997) for b in [dataset.items[i].b])


def test_inpaint_target_lacks_the_object_and_keeps_the_other():
    dataset = data.builtin("inpaint", "train")
    placed, kinds = 0, set()
    for i in range(0, len(dataset), 131):
        example, e = dataset[i], dataset.items[i][0]
        kinds.add(example["kind"])
        changed = (example["source"] != example["target"]).any(0).float()
        white = (example["target"] == 1).all(0).float()
        assert changed.sum() > 0 and (1 - white).sum() > 0
        word = e.noun if example["kind"] == "classed" else e.name
        assert example["prompt"].startswith(f"remove the {word}") and (example["kind"] == "placed" or example["prompt"].endswith(word))
        if example["kind"] == "placed":
            placed += 1
            rows, columns = torch.nonzero(changed, as_tuple=True)
            side = example["prompt"].split()[-1]
            centre = {"left": columns, "right": columns, "top": rows, "bottom": rows}[side].float().mean()
            assert (centre < 31.5) == (side in ("left", "top"))
    assert placed > 5 and kinds == {"named", "classed", "placed"}


def test_classes_are_words_that_training_and_held_out_pictures_share():
    train, held_out = ({e.noun for e in data._rows(split)} for split in ("train", "heldout"))
    assert held_out <= train and len(train) > 25 and None in train
    subcategories = {row["subcategory"] for row in json.loads((data.ASSETS / "emoji/emoji.json").read_text())}
    assert set(data.CLASS) <= subcategories and len(data.CLASS) == sum(len(s.split()) for s in data.CLASSES.values())
    dataset = data.builtin("inpaint", "train")
    for i in range(50):
        e = dataset.items[31 * i][0]
        other = dataset._other(e, np.random.default_rng(i))
        assert other.concept != e.concept and (other.noun is None or other.noun != e.noun)


def test_training_edits_are_mirrored_half_of_the_time_and_held_out_ones_never():
    for split, mirrored in (("train", range(20, 61)), ("heldout", range(1))):
        dataset, count = data.builtin("edit", split), 0
        cell = dataset.items[0]
        plain = data.to_tensor(data.on_white(data.Sheet.picture(cell.style, cell.source)))
        for seed in range(80):
            source = dataset.get(0, np.random.default_rng(seed))["source"]
            assert torch.equal(source, plain) or torch.equal(source, plain.flip(-1))
            count += not torch.equal(source, plain)
        assert count in mirrored


def test_degrading_halves_the_resolution_and_is_reproducible():
    picture = data.to_pil(data.builtin("t2i", "train")[5]["target"])
    a, b, c = (data.degrade(picture, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert a.size == picture.size and np.array_equal(a, b) and not np.array_equal(a, c)
    spectrum = np.abs(np.fft.fft2(np.asarray(a.convert("L"), dtype=float)))
    assert spectrum[24:40].mean() < 0.1 * np.abs(np.fft.fft2(np.asarray(a.convert("L"), dtype=float)))[:8].mean()


def test_pictures_survive_the_tensor():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert np.array_equal(picture, data.to_pil(data.to_tensor(picture)))


def test_only_targets_are_scaled_and_sampled():
    mean, logvar, noise = torch.randn(3, 2, 4, 4, 4)
    assert torch.equal(data.latents(data.SOURCE, mean, logvar, 0.18215, noise), mean)
    assert torch.allclose(data.latents(data.TARGET, mean, logvar, 0.18215, noise), 0.18215 * (mean + (logvar / 2).exp() * noise))


def folder(tmp_path, rows, size=(40, 30)):
    for row in rows:
        for key in ("file_name", "source_file_name"):
            if key in row:
                Image.new("RGB", size, "red").save(tmp_path / row[key])
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows))


def test_folder_reads_every_task(tmp_path):
    folder(tmp_path, [dict(file_name=f"{i}.png", source_file_name=f"s{i}.png", text=f"number {i}", split="train") for i in range(3)]
           + [dict(file_name="h.png", source_file_name="hs.png", text="held", split="heldout")])
    for task in data.TASKS:
        dataset = data.Folder(tmp_path, task, "train", 32)
        assert len(dataset) == 3 and len(data.Folder(tmp_path, task, "heldout", 32)) == 1
        example = dataset[1]
        assert example["target"].shape == (3, 32, 32) and ("source" in example) == (task in ("edit", "sr", "inpaint"))
        assert example["prompt"] == ("" if task in ("sr", "uncond") else "number 1")


def test_folder_without_splits_divides_itself(tmp_path):
    folder(tmp_path, [dict(file_name=f"{i}.png", text="x") for i in range(60)])
    names = [{row["file_name"] for row in data.Folder(tmp_path, "t2i", split, 32).items} for split in ("train", "heldout")]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 60 and 0 < len(names[1]) < 20


def test_folder_with_some_splits_holds_out_only_those(tmp_path):
    folder(tmp_path, [dict(file_name=f"{i}.png", text="x", **(dict(split="heldout") if i < 2 else {})) for i in range(60)])
    assert [row["file_name"] for row in data.Folder(tmp_path, "t2i", "heldout", 32).items] == ["0.png", "1.png"]
    assert len(data.Folder(tmp_path, "t2i", "train", 32)) == 58


def test_pictures_are_turned_upright(tmp_path):
    picture, exif = Image.new("RGB", (20, 10), "red"), Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert data.open_image(tmp_path / "a.jpg").size == (10, 20)


def test_some_captions_place_two_things():
    """A half is white where its thing was removed, and nowhere else."""
    dataset, scenes = data.builtin("t2i", "train"), 0
    nouns = {e.name: e.noun for e in dataset.rows}
    for example in (dataset[i] for i in range(400)):
        words, _, removed = example["prompt"].removesuffix(" style").rpartition(", ")[0].partition(", remove the ")
        if not (" left and " in words or " top and " in words):
            continue
        scenes += 1
        halves = example["target"].chunk(2, dim=2 if " left and " in words else 1)
        for thing, half in zip(words.split(" left and " if " left and " in words else " top and "), halves):
            name = thing.removesuffix(" on the right").removesuffix(" at the bottom").removesuffix(" on the").removesuffix(" at the")
            gone = removed and removed.split(" on the ")[0].split(" at the ")[0] in (name, nouns[name])
            assert bool(half.min() > 0.99) == bool(gone), example["prompt"]
    assert 50 < scenes < 110


def test_some_captions_tell_the_picture_by_a_change():
    """The picture is the changed one."""
    dataset = data.builtin("t2i", "train")
    told = {f"{c.name}, make the skin tone {c.b}, {c.style} style": c for c in dataset.changes if c.kind == "tone"}
    found = [(told[e["prompt"]], e["target"]) for e in (dataset[i] for i in range(800)) if e["prompt"] in told]
    assert len(found) > 10
    for c, target in found:
        assert torch.equal(target, data.to_tensor(data.on_white(data.Sheet.picture(c.style, c.target))))


@pytest.mark.parametrize("content, words", [
    ('{"file_name": "a.png", "text": "x", "split": "val"}', "split"), (None, "metadata.jsonl"), ("", "no train pictures"), ("{", "line 1"), ('{"file_name": "a.png"}', "text"), ('[1]', "line 1"),
    ('{"file_name": "a.png", "text": 3}', "text")])
def test_folder_refuses_by_name(tmp_path, content, words):
    if content is not None:
        (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        data.Folder(tmp_path, "t2i", "train", 32)


@pytest.mark.parametrize("damage", ["missing", "text", "cut"])
def test_folder_names_the_broken_picture(tmp_path, damage):
    folder(tmp_path, [dict(file_name="a.png", text="x", split="train")])
    path = tmp_path / "a.png"
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("no picture")
    else:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="a.png"):
        data.Folder(tmp_path, "t2i", "train", 32)[0]


def test_unknown_task_and_split():
    with pytest.raises(UserError, match="t2i, edit, sr, inpaint"):
        data.builtin("segment", "train")
    with pytest.raises(UserError, match="heldout"):
        data.builtin("edit", "test")
