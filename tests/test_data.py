"""Folders of one's own, encoded folders, and the examples of a run."""
import dataclasses
import functools
import json
import multiprocessing.reduction
import os
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import adm
import clip
import data
import dit
import emoji
import readers
import vae
from conftest import assert_mistake, call, full_disk
from data import ALL, ASSETS, Encoder, Examples, Folder, collate
from hub import UserError
from sample import load_model
from train import draw_timestep


def write_folder(folder, rows, size=(40, 30)):
    """Write a metadata.jsonl and the pictures that it names."""
    for row in rows:
        for key in ("file_name", "source_file_name"):
            if key in row:
                Image.new("RGB", size, "red").save(folder / row[key])
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data.read_rows.cache_clear()


def pair(i, split="train"):
    return dict(file_name=f"{i}.png", source_file_name=f"s{i}.png", text=f"number {i}",
                label=f"class {i % 2}", split=split)


# -------------------------------------------------------------------------------------------------
# Folders

def test_a_folder_serves_every_task(tmp_path):
    write_folder(tmp_path, [pair(0), pair(1), pair(2), pair(3, "heldout")])
    for task in data.TASKS:
        dataset = Folder(tmp_path, task, "train", 32)
        assert len(dataset) == 3 and len(Folder(tmp_path, task, "heldout", 32)) == 1
        example = dataset[1]
        assert example["target"].shape == (3, 32, 32)
        assert ("source" in example) == (task in ("edit", "sr", "inpaint"))
        assert ("x" in example) == (data.TASKS[task].modality is not None)
        prompts = dict.fromkeys(("t2i", "edit", "inpaint"), "number 1") | {"class": "class 1"}
        assert example["prompt"] == prompts.get(task, "")
    assert Folder(tmp_path, "label", "train", 32)[1]["x"] == 1
    assert data.class_names(tmp_path) == ["class 0", "class 1"]


def test_a_folder_says_which_tasks_it_serves(tmp_path):
    write_folder(tmp_path, [dict(file_name="a.png", text="x"), dict(file_name="b.png", text="y")])
    with pytest.raises(UserError, match="serves t2i, sr, .*edit .* needs source_file_name"):
        Folder(tmp_path, "edit", "train", 32)


def test_of_a_handful_of_pictures_some_train_and_some_are_held_out(tmp_path):
    """Also where the rule of one name in ten puts all on one side. A picture has one side only."""
    one_sided = [f"{i}.png" for i in range(200) if emoji.is_held_out(f"{i}.png")]
    for n, names in enumerate((["0.png", "1.png"], one_sided[:3], [f"{i}.png" for i in range(60)])):
        folder = tmp_path / str(n)
        folder.mkdir()
        write_folder(folder, [dict(file_name=name, text=text) for name in names for text in "ab"])
        train, heldout = ([row["file_name"] for row in Folder(folder, "t2i", split, 32).items]
                          for split in ("train", "heldout"))
        assert train and heldout and not set(train) & set(heldout)
        assert len(set(heldout)) < max(3, len(names) // 3)
        assert sorted(train + heldout) == sorted(names * 2)


def test_a_folder_with_some_splits_holds_out_only_those(tmp_path):
    rows = [dict(file_name=f"{i}.png", text="x") for i in range(60)]
    rows[0]["split"] = rows[1]["split"] = "heldout"
    write_folder(tmp_path, rows)
    heldout = Folder(tmp_path, "t2i", "heldout", 32)
    assert [row["file_name"] for row in heldout.items] == ["0.png", "1.png"]
    assert len(Folder(tmp_path, "t2i", "train", 32)) == 58


@pytest.mark.parametrize("content, words", [
    (None, "metadata.jsonl"),
    ("", "no train pictures|needs"),
    ("{", "line 1"),
    ('{"file_name": "a.png"}', "text"),
    ("[1]", "line 1")])
def test_a_folder_refuses_by_name(tmp_path, content, words):
    data.read_rows.cache_clear()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    if content is not None:
        (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        Folder(tmp_path, "t2i", "train", 32)


# -------------------------------------------------------------------------------------------------
# Pictures

def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.BICUBIC)


def open_in_pillow(path, turn=None):
    """Pillow's own pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as picture:
            return np.asarray((turn(picture) if turn else picture).convert("RGBA"))


def exif(*entries, data=b""):
    """An EXIF block: entries of (tag, type, count, four bytes), then what they point to."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + data


def orientation(number):
    return (0x112, 3, 1, struct.pack("<HH", number, 0))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_pictures_are_turned_upright(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    for number in range(1, 9):
        noise(30, 20).save(path, exif=exif(orientation(number)))
        expected = open_in_pillow(path, ImageOps.exif_transpose)
        assert expected.shape[:2] == ((20, 30) if number < 5 else (30, 20))
        assert np.array_equal(data.open_image(path), expected)


# Orientation 6 beside values that the standard does not allow, and blocks that are damaged.
@pytest.mark.parametrize("block, turned", [
    (exif(orientation(6), (0x11A, 10, 1, b"\x26\0\0\0"), data=struct.pack("<ii", -1, 0)), 1),
    (exif(orientation(6), (0x128, 2, 4, b"two\0")), 1),
    (exif((0x100, 2, 4, b"abc\0"), orientation(6)), 1),
    (exif(orientation(6), (0x11A, 10, 1, struct.pack("<I", 9999))), 1),
    (exif((0x112, 2, 2, b"6\0\0\0")), 0),
    (exif(orientation(6))[:20], 0),
    (b"Exif\0\0" + bytes(range(30)), 0)])
def test_odd_metadata_do_no_harm(tmp_path, block, turned):
    for ending in ("jpg", "png", "webp"):
        path = tmp_path / f"a.{ending}"
        noise(30, 20).save(path, exif=block)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow's remarks would stand beside our output
            found = data.open_image(path)
        turn = (lambda picture: picture.transpose(Image.Transpose.ROTATE_270)) if turned else None
        assert np.array_equal(found, open_in_pillow(path, turn))


def test_every_kind_of_pixel_has_its_right_value(tmp_path):
    rgb = noise(30, 20)
    frames = [noise(30, 20), Image.new("RGB", (30, 20), "red")]
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.convert("L").save(tmp_path / "grey.jpg")
    rgb.quantize(9).save(tmp_path / "palette.png", transparency=bytes([0, 99, 255]))
    rgb.quantize(9).save(tmp_path / "palette.gif", transparency=3)
    rgb.convert("LA").save(tmp_path / "alpha.png")
    rgb.convert("1").save(tmp_path / "bits.tiff")
    rgb.save(tmp_path / "key.png", transparency=rgb.getpixel((0, 0)))
    for ending in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"moving.{ending}", save_all=True, append_images=frames[1:])
    for path in tmp_path.iterdir():
        assert np.array_equal(data.open_image(path), open_in_pillow(path)), path.name
    deep = np.arange(600).reshape(20, 30) * 109
    for name in ("deep.png", "deep.tiff", "deep.ppm"):
        Image.fromarray(deep.astype(np.uint16)).save(tmp_path / name)
        red = np.asarray(data.open_image(tmp_path / name))[:, :, 0]
        assert np.array_equal(red, deep // 256), name


def break_picture(path, damage):
    """Damage the picture at `path`, which is a JPEG by its content."""
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:len(content) * 2 // 3])
    elif damage == "header":
        path.write_bytes(content[:60])
    elif damage == "text":
        path.write_text("no picture")
    elif damage == "script":
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # PostScript
    elif damage == "format":
        Image.new("RGB", (8, 8)).save(path, format="PCX")  # one of those that are not meant
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "float":
        Image.new("F", (8, 8)).save(path, format="TIFF")
    elif damage == "large":
        # 13,000 x 13,000 grey pixels: the header of a PNG is enough.
        header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 0, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b""))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks))


@pytest.mark.parametrize("damage", ["missing", "cut", "header", "text", "script", "format", "pipe",
                                    "float", "large"])
def test_a_broken_picture_is_named(tmp_path, damage):
    noise(64, 64).save(tmp_path / "a.jpg")
    break_picture(tmp_path / "a.jpg", damage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="a.jpg") as error:
            data.open_image(tmp_path / "a.jpg")
    assert ("pixels" in str(error.value)) == (damage in ("large", "float"))


def test_whatever_pillow_raises_names_the_file(tmp_path, monkeypatch):
    noise(10, 10).save(tmp_path / "a.png")
    for kind in (struct.error, SyntaxError, KeyError, TypeError, ZeroDivisionError, EOFError):
        def fail(*args, **options):
            raise kind("odd")
        monkeypatch.setattr(Image, "open", fail)
        with pytest.raises(UserError, match="a.png.*odd"):
            data.open_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_large_jpegs_are_reduced_while_they_are_decoded(tmp_path, name):
    """As near to what decoding them whole would give as another filter's result is."""
    photograph = getattr(skimage.data, name)()
    short = min(photograph.shape[:2]) // 16 * 16
    Image.fromarray(photograph[:short, :photograph.shape[1] // 16 * 16]).save(tmp_path / "a.jpg",
                                                                             quality=92)
    whole = Image.open(tmp_path / "a.jpg")
    left = (whole.width - short) // 2
    # A photograph of 2040 x 1356 pixels is 2.65 times as high as a square of 512.
    for ratio, scale in ((2.65, 2), (2.5, 1), (5.3, 4)):
        size = int(short / ratio)
        decoded = readers.open_pixels(tmp_path / "a.jpg", readers.SPARE * size)
        assert decoded.height == short / scale
        square = np.asarray(data.open_square(tmp_path / "a.jpg", size), dtype=float)
        bicubic, lanczos = (
            np.asarray(whole.crop((left, 0, left + short, short)).resize((size, size), kind), float)
            for kind in (Image.BICUBIC, Image.LANCZOS))
        error = abs(square - bicubic).mean()
        assert error < (0.1 if scale == 1 else 1.3 * abs(lanczos - bicubic).mean())
    # What is not resized keeps its pixels, and a crop is of whole ones.
    square = data.open_square(tmp_path / "a.jpg", short)
    assert np.array_equal(square, whole.crop((left, 0, left + short, short)))


@pytest.mark.parametrize("width, height", [(37, 23), (22, 37), (31, 31), (40, 23)])
def test_a_frame_lies_inside_its_picture(tmp_path, width, height):
    """Wherever it is cut out: beyond the edge would be black."""
    Image.new("RGB", (width, height), "white").save(tmp_path / "a.png")
    short = min(width, height)
    for side in np.arange(short - 5, short + 0.5, 0.5):
        for left in (0, 0.5, 1):
            frame = readers.Frame(short / side, left, left)
            assert np.min(data.open_square(tmp_path / "a.png", 16, frame)) == 255


# -------------------------------------------------------------------------------------------------
# Pictures that are missing or broken

def read_record(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_missing_pictures_are_left_out_and_named_up_to_one_percent(tmp_path, capsys, monkeypatch):
    rows = [pair(i, "heldout" if i < 9 else "train") for i in range(200)]
    write_folder(tmp_path, rows, size=(4, 4))
    (tmp_path / "s20.png").unlink()
    (tmp_path / "50.png").write_text("no picture")
    record = tmp_path / "run" / "skipped.jsonl"
    for _ in range(2):  # a run, and the same run resumed
        data.report_broken.cache_clear()
        datasets = [data.open_dataset(task, "train", 8, tmp_path) for task in ("edit", "t2i")]
        assert [len(dataset) for dataset in datasets] == [189, 189]
        data.record_skipped([*datasets, data.builtin("t2i", "train")], record)
    names = [str(tmp_path / name) for name in ("s20.png", "50.png")]
    assert sorted(row["file_name"] for row in read_record(record)) == sorted(names)
    assert all(row["file_name"] in row["reason"] for row in read_record(record))
    assert capsys.readouterr().err.count("left out: ") == 1

    # Of very many, only some headers are read, but every name is looked for.
    monkeypatch.setattr(readers, "MAX_HEADERS", 9)
    data.read_rows.cache_clear()
    assert [*data.read_rows(tmp_path)[1]] == [tmp_path / "s20.png"]
    for name in ("60.png", "61.png"):
        (tmp_path / name).unlink()
    data.read_rows.cache_clear()
    with pytest.raises(UserError, match="3 of 200 .*more than 1%.*no picture at .*s20.png"):
        data.open_dataset("sr", "train", 8, tmp_path)


@pytest.fixture
def broken_folder(tmp_path):
    """Twelve examples to train on. Headers are fine, but 3, the source of 4, and 11 are cut."""
    rows = [pair(i) for i in range(12)] + [pair(12, "heldout")]
    write_folder(tmp_path, rows)
    for row in rows:
        for key in ("file_name", "source_file_name"):
            noise(40, 40).rotate(20 * len(row["text"]) + int(row["text"][7:])).save(
                tmp_path / row[key], format="JPEG")
    for name in ("3.png", "s4.png", "11.png"):
        break_picture(tmp_path / name, "cut")
    data.read_rows.cache_clear()
    data.report_broken.cache_clear()
    return tmp_path


def equal(a, b):
    return all(torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
               for key in a)


def test_a_picture_that_turns_out_broken_is_replaced_by_the_next_good_one(broken_folder, capsys):
    for task, number, replacement in (("edit", 3, 5), ("sr", 3, 4), ("edit", 11, 0),
                                      ("masked", 11, 0), ("label", 3, 4)):
        dataset = Folder(broken_folder, task, "train", 32)
        for _ in range(2):
            a, b = (dataset.get(i, np.random.default_rng(0)) for i in (number, replacement))
            assert equal(a, b)
    reports = capsys.readouterr().err.strip().splitlines()
    assert len(reports) == 3 and all("left out: " in report for report in reports)
    assert sum("(and 1 more)" in report for report in reports) == 1  # edit 3 has two in a row
    for i in range(12):
        break_picture(broken_folder / f"{i}.png", "text")
    with pytest.raises(UserError, match="in a row"):
        dataset[0]
    assert not capsys.readouterr().err


def test_worker_processes_record_what_they_replace(broken_folder):
    """Each picture once, in whole lines, whoever meets it first and however often."""
    dataset = Folder(broken_folder, "edit", "train", 32)
    record = broken_folder / "run" / "skipped.jsonl"
    data.record_skipped([dataset], record)
    assert not record.exists()
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=[[3], [11, 3], [4], [4, 11]],
                                         collate_fn=list, num_workers=2)
    batches = list(loader)
    assert equal(batches[0][0], dataset[5]) and equal(batches[3][1], dataset[0])
    rows = read_record(record)
    assert sorted(Path(row["file_name"]).name for row in rows) == ["11.png", "3.png", "4.png"]
    assert "s4.png" in next(row["reason"] for row in rows if row["file_name"].endswith("/4.png"))
    with full_disk(record.stat().st_size), pytest.raises(UserError, match="skipped.jsonl cannot"):
        data.report_broken(record, (("another.png", "reason"),))


def test_check_decodes_everything(broken_folder):
    done = call("data.py", "check", "--data", broken_folder)
    assert_mistake(done, "3 of 26 pictures")
    lines = done.stdout.splitlines()
    assert "edit: 12 train, 1 held out" in lines and "label: 12 train, 1 held out" in lines
    bad = [line for line in lines if "is not a picture that can be read (" in line]
    assert len(bad) == 3 and "s4.png" in "".join(bad)
    write_folder(broken_folder, [pair(0), pair(1, "heldout")])
    done = call("data.py", "check", "--data", broken_folder)
    assert done.returncode == 0 and not done.stderr and "all 4 pictures" in done.stdout
    assert_mistake(call("data.py", "check", "--data", broken_folder / "run"), "serves none")


def test_unknown_task_and_split():
    assert ALL == ("t2i", "edit", "sr", "inpaint")
    with pytest.raises(UserError, match="t2i, edit, sr, inpaint"):
        data.builtin("segment", "train")
    with pytest.raises(UserError, match="heldout"):
        data.builtin("edit", "test")


# -------------------------------------------------------------------------------------------------
# A batch

def test_conditions_are_dropped_at_the_rates_of_the_table():
    """A uniform r decides: InstructPix2Pix drops 5 % text, 5 % both, 5 % picture."""
    examples = Examples({}, ["edit"], batch_size=1, seed=0, num_timesteps=10, latent_shape=(1, 1, 1))
    example = dict(prompt="words", target=None, source=None)
    kept = [examples.make_sample(example, "edit", dropout=(i + 0.5) / 1000, t=0, noise_seed=0)
            for i in range(1000)]
    text = sum(k["prompt"] == "" and k["keep"] == 1 for k in kept)
    both = sum(k["prompt"] == "" and k["keep"] == 0 for k in kept)
    picture = sum(k["prompt"] != "" and k["keep"] == 0 for k in kept)
    assert (text, both, picture) == (50, 50, 50)


def test_runs_that_differ_in_their_pictures_share_timesteps_and_noise():
    """So masked and uncond, whose pictures draw other random numbers, can be compared in pairs."""
    runs = [Examples({task: data.builtin(task, "train", 16)}, [task], batch_size=4, seed=0,
                     num_timesteps=1000, latent_shape=(3, 16, 16)) for task in ("uncond", "masked")]
    for i in range(8):
        a, b = (run[i] for run in runs)
        assert a["t"] == b["t"] and torch.equal(a["noise"], b["noise"])


def test_encoding_follows_the_tables_rules():
    """Targets are sampled and scaled, sources are means and unscaled; what is dropped is zero."""
    network = load_model(ASSETS / "tiny").vae
    dataset = data.builtin("edit", "heldout")
    pictures = [dataset[i]["source"] for i in (0, 5)]
    batch = dict(target=pictures, source=[None, pictures[0]], latent_noise=torch.randn(2, 4, 16, 16),
                 keep=torch.tensor([1.0, 1.0]))
    encoder = Encoder(network)
    x0, source = encoder(batch, "cpu")
    again = encoder(batch, "cpu")  # from memory
    mean, logvar = network.encode(torch.stack(pictures))
    sampled = mean + (logvar / 2).exp() * batch["latent_noise"]
    assert torch.allclose(x0, network.config["scaling_factor"] * sampled, atol=1e-5)
    assert source[0].abs().max() == 0 and torch.allclose(source[1], mean[0], atol=1e-5)
    assert torch.equal(again[0], x0) and torch.equal(again[1], source)
    dropped = encoder(batch | {"keep": torch.tensor([1.0, 0.0])}, "cpu")[1]
    assert dropped.abs().max() == 0


def test_a_batch_is_a_function_of_seed_step_and_index():
    """Also in a worker process, and in one that starts anew, as on a Mac."""
    def examples(seed, **options):
        datasets = {task: data.builtin(task, "train") for task in ALL}
        return Examples(datasets, ALL, batch_size=8, seed=seed, num_timesteps=1000,
                        latent_shape=(4, 16, 16), **options)

    def batch(seed, workers=0):
        loader = torch.utils.data.DataLoader(examples(seed), batch_sampler=[range(8, 16)],
                                             collate_fn=collate, num_workers=workers)
        return next(iter(loader))

    a, b, c = batch(0), batch(0, workers=1), batch(1)
    assert a["task"] == [*ALL] * 2
    assert all(torch.equal(a[key], b[key]) for key in ("noise", "t", "latent_noise", "keep"))
    assert all(torch.equal(x, y) for x, y in zip(a["target"], b["target"]))
    assert a["prompt"] == b["prompt"] != c["prompt"] and not torch.equal(a["noise"], c["noise"])
    draw = functools.partial(draw_timestep, (0, 500), 1000, 0.3)
    for one in (examples(0), examples(0, sample_timestep=draw)):
        sent = multiprocessing.reduction.ForkingPickler.dumps(one)
        again = multiprocessing.reduction.ForkingPickler.loads(sent)
        assert torch.equal(again[2]["source"], one[2]["source"]) and again[2]["t"] == one[2]["t"]


def test_a_latent_does_not_depend_on_what_else_is_remembered():
    dataset, network = data.builtin("t2i", "train"), load_model(ASSETS / "tiny").vae
    pictures = [dataset[i]["target"] for i in range(0, 40, 2)]
    fresh, warm = Encoder(network), Encoder(network)
    for n in (3, 7):
        warm.moments(pictures[n:n + 2], "cpu")
    a, b = fresh.moments(pictures, "cpu"), warm.moments(pictures, "cpu")
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# -------------------------------------------------------------------------------------------------
# Encoded folders

# Seed 2: with noise for pictures, some draws meet a sample whose gradient amplifies rounding.
TRAIN = ["--seed", "2", "--task", "edit,sr,t2i", "--model", str(ASSETS / "tiny"), "--batch-size", "6",
         "--eval-size", "2", "--sample-every", "0", "--log-every", "1", "--warmup", "1",
         "--steps", "2", "--lr", "1e-3"]


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six pairs, four to train on, of another size and shape than what the network draws."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        for name in (f"{i}.png", f"s{i}.png"):
            noise = Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8))
            noise.resize((70, 80), Image.BICUBIC).save(folder / name)
        rows.append(pair(i, "heldout" if i > 3 else "train"))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def encoded(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "out"
    done = call("data.py", "encode", "--data", pictures, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "edit: 4 train, 2 held out" in done.stdout
    return out


@pytest.fixture(scope="module")
def runs(pictures, encoded, tmp_path_factory):
    """The same training from pictures, and from the encoded folder -> their run folders."""
    out = tmp_path_factory.mktemp("runs")
    for name, folder in (("plain", pictures), ("encoded", encoded)):
        done = call("train.py", *TRAIN, "--data", folder, "--out", out / name)
        assert done.returncode == 0, done.stderr
    return out / "plain", out / "encoded"


def test_training_from_it_gives_the_same_losses(runs):
    """To what half precision keeps."""
    plain, encoded = map(read_log, runs)
    assert [row["step"] for row in plain] == [row["step"] for row in encoded] == [1, 2]
    assert plain[0]["loss"] != encoded[0]["loss"]
    for a, b in zip(plain, encoded):
        assert set(a["loss"]) == {"edit", "sr", "t2i"}
        assert all(abs(b["loss"][task] / a["loss"][task] - 1) < 5e-4 for task in a["loss"])
    assert abs(encoded[0]["grad_norm"] / plain[0]["grad_norm"] - 1) < 2e-3


@pytest.mark.parametrize("task", data.TASKS)
def test_its_examples_are_the_folders_with_moments_in_the_place_of_pictures(pictures, encoded, task):
    """But for pictures that are spoiled anew: the source of sr, and x of masked."""
    network = load_model(ASSETS / "tiny").vae
    assert data.class_names(encoded, "class") == data.class_names(pictures) == ["class 0", "class 1"]
    plain, dataset = (data.open_dataset(task, "train", 64, root) for root in (pictures, encoded))
    assert len(plain) == len(dataset) == 4
    for i in range(4):
        expected, example = (each.get(i, np.random.default_rng(i)) for each in (plain, dataset))
        assert set(example) == set(expected) - {"number"}
        for key, value in example.items():
            if key == "target" or key in ("source", "x") and task in ("edit", "inpaint", "translate"):
                moments = torch.stack(network.encode(expected[key][None]), dim=1)[0]
                assert torch.allclose(value, moments, rtol=2e-3, atol=1e-3)
            else:
                assert equal({key: value}, {key: expected[key]})


def test_a_dit_trains_on_the_latents_of_classes(tmp_path, monkeypatch):
    """Which were encoded with an autoencoder that came with a text encoder, at another size."""
    monkeypatch.setitem(dit.CONFIGS, "small", dict(
        sample_size=8, in_channels=4, out_channels=8, num_layers=1, num_attention_heads=2,
        attention_head_dim=16))
    for i in range(6):
        path = tmp_path / f"in/{'train' if i < 4 else 'val'}/class {i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(50, 40).rotate(60 * i).save(path)
    done = call("data.py", "encode", "--data", tmp_path / "in", "--out", tmp_path / "encoded",
                "--size", 32, "--task", "class")
    assert done.stdout.startswith("class: 4 train, 2 held out\n"), done.stderr
    assert not (tmp_path / "encoded/pictures").exists()  # those are for sr and masked
    logs = []
    for name in ("in", "encoded"):
        done = call("train.py", "--task", "class", "--unet", "small", "--data", tmp_path / name,
                    "--out", tmp_path / f"run of {name}", "--steps", 3, "--batch-size", 4,
                    "--eval-size", 2, "--sample-every", 0, "--log-every", 1, "--lr", 1e-2,
                    "--warmup", 1)
        assert done.returncode == 0, done.stderr
        logs.append([row["loss"]["class"] for row in read_log(tmp_path / f"run of {name}")])
    assert logs[0][2] != logs[1][2] and np.allclose(*logs, rtol=5e-4)


def test_pairs_of_latents_train_and_are_drawn(encoded, tmp_path):
    """translate decodes x for its sheet of samples."""
    done = call("train.py", "--task", "translate", "--data", encoded, "--out", tmp_path / "run",
                "--steps", 1, "--batch-size", 2, "--eval-size", 1, "--sample-every", 1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/samples/000001.png").is_file()


def test_every_picture_and_text_is_in_it_once_as_the_networks_give_it(encoded):
    model = load_model(ASSETS / "tiny")
    latents = load_file(encoded / "latents-00000.safetensors")["latents"]
    texts = load_file(encoded / "texts-00000.safetensors")["context"]
    assert latents.shape == (12, 2, 4, 16, 16) and texts.shape == (9, 77, 128)
    assert latents.dtype == texts.dtype == torch.float16
    dataset = data.Encoded(encoded, "edit", "train", 64)
    prompts = ["number 3", "", "number 3"]
    context, pooled = dataset.encode_text(prompts)
    assert pooled is None
    assert torch.allclose(context, model.encode_text(prompts)[0], rtol=2e-3, atol=1e-3)


def test_what_is_in_it_is_neither_encoded_nor_opened_again(encoded, tmp_path, monkeypatch):
    """But for sr's sources, which are degraded anew each time."""
    counts = dict(vae=0, text=0, opened=0)
    encode, forward, open_image = vae.VAE.encode, clip.CLIPText.forward, data.open_image

    def count(name, function, size):
        def counting(*args):
            counts[name] += size(*args)
            return function(*args)
        return counting
    monkeypatch.setattr(vae.VAE, "encode", count("vae", encode, lambda self, x, *rest: len(x)))
    monkeypatch.setattr(clip.CLIPText, "forward", count("text", forward, lambda self, ids: len(ids)))
    monkeypatch.setattr(data, "open_image", count("opened", open_image, lambda path: 1))
    words = ["--data", encoded, "--task", "edit,t2i"]
    done = call("train.py", *TRAIN, "--out", tmp_path / "without", *words)
    assert done.returncode == 0, done.stderr
    assert counts == dict(vae=0, text=0, opened=0)
    call("train.py", *TRAIN, "--out", tmp_path / "with", "--data", encoded)
    assert counts["text"] == 0
    assert counts["opened"] == 2 + 2 * 2           # held-out examples, then two steps
    assert 0 < counts["vae"] <= 4 * (1 + 2 + 1)    # four at a time


def test_examples_go_to_worker_processes_without_the_whole_file(encoded):
    dataset = data.Encoded(encoded, "edit", "train", 64)
    before = dataset[0]  # with its file open
    sent = multiprocessing.reduction.ForkingPickler.dumps(dataset)
    after = multiprocessing.reduction.ForkingPickler.loads(sent)[0]
    assert torch.equal(before["source"], after["source"])
    assert before["target"].untyped_storage().nbytes() == 2 * 4 * 16 * 16 * 4


def test_encoding_that_was_interrupted_goes_on(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ROWS_PER_FILE", 5)
    model = load_model(ASSETS / "tiny")
    save_file = data.save_file

    def full(tensors, path, **options):
        if path.name == "latents-00001.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **options)
    with monkeypatch.context() as patch:
        patch.setattr(data, "save_file", full)
        with pytest.raises(UserError, match="latents-00001.*No space"):
            data.encode_folder(model, pictures, tmp_path / "out", "cpu")
    first = (tmp_path / "out" / "latents-00000.safetensors").stat().st_mtime_ns
    data.encode_folder(model, pictures, tmp_path / "out", "cpu")
    assert (tmp_path / "out" / "latents-00000.safetensors").stat().st_mtime_ns == first
    sizes = [len(load_file(tmp_path / f"out/latents-0000{i}.safetensors")["latents"])
             for i in range(3)]
    assert sizes == [5, 5, 2]
    assert not list((tmp_path / "out").glob("*.part*"))


def test_another_model_or_size_is_refused(encoded):
    model = load_model(ASSETS / "tiny")
    dataset = data.Encoded(encoded, "edit", "train", 64)
    dataset.check(model)
    dataset.check(dataclasses.replace(model, text_encoder=None))
    with torch.no_grad():
        model.vae.quant_conv.bias[0] += 1e-3
    with pytest.raises(UserError, match="another autoencoder or text encoder"):
        dataset.check(model)
    del dataset.index["encoders"]
    with pytest.raises(UserError, match="or by an earlier version of this project; encode it"):
        dataset.check(load_model(ASSETS / "tiny"))
    with pytest.raises(UserError, match="64 pixels"):
        data.Encoded(encoded, "edit", "train", 32)
    with pytest.raises(UserError, match="not for inpaint2|was encoded for"):
        data.Encoded(encoded, "inpaint2", "train", 64)


@pytest.mark.parametrize("kind, name, shape", [("latents", "latents", (12, 2, 2, 16, 16)),
                                               ("texts", "context", (9, 77, 7)),
                                               ("texts", "context", (9, 128)),
                                               ("texts", "contexts", (9, 77, 128)),
                                               ("latents", "texts", (12, 2, 4, 16, 16))])
def test_files_of_other_shapes_are_named(encoded, tmp_path, kind, name, shape):
    shutil.copytree(encoded, tmp_path / "copy")
    save_file({name: torch.zeros(shape)}, tmp_path / f"copy/{kind}-00000.safetensors")
    dataset = data.Encoded(tmp_path / "copy", "edit", "train", 64)
    with pytest.raises(UserError, match=f"{kind}-00000.safetensors holds .*'{name}': .* needs"):
        dataset.check(load_model(ASSETS / "tiny"))


def test_a_folder_without_pictures_of_a_split_is_named(encoded, tmp_path):
    copy = shutil.copytree(encoded, tmp_path / "encoded")
    index = json.loads((copy / "encoded.json").read_text())
    index["tasks"]["edit"]["train"] = []
    (copy / "encoded.json").write_text(json.dumps(index))
    (tmp_path / "pictures").mkdir()
    write_folder(tmp_path / "pictures", [pair(i, "heldout") for i in range(3)])
    for name in ("encoded", "pictures"):
        with pytest.raises(UserError, match=f"{name} has no train pictures for edit; mark some li"):
            data.open_dataset("edit", "train", 64, tmp_path / name)
        assert len(data.open_dataset("edit", "heldout", 64, tmp_path / name)) in (2, 3)


@pytest.mark.parametrize("part, words", [("vae", "the latents that the model computes are not fin"),
                                         ("text_encoder", "the context that the model computes")])
def test_what_half_precision_cannot_hold_is_not_written(pictures, tmp_path, part, words):
    model = load_model(ASSETS / "tiny")
    scaled = getattr(model, part)
    scaled = scaled.quant_conv if part == "vae" else scaled.text_model.final_layer_norm
    with torch.no_grad():
        scaled.weight *= 1e6
    with pytest.raises(UserError, match=words):
        data.encode_folder(model, pictures, tmp_path / "out", "cpu")
    assert not list((tmp_path / "out").glob(f"{'latents' if part == 'vae' else 'texts'}*"))


def test_a_folder_is_not_encoded_into_itself_nor_twice(pictures, encoded, tmp_path):
    before = sorted(pictures.rglob("*"))
    (tmp_path / "link").symlink_to(pictures)
    for root, out, words in ((pictures, pictures, "choose another folder"),
                             (pictures, tmp_path / "link/in/it", "choose another folder"),
                             (pictures, "", "--out is empty"),
                             (encoded, tmp_path / "again", "out holds latents; name the folder")):
        assert_mistake(call("data.py", "encode", "--data", root, "--out", out), words)
    assert sorted(pictures.rglob("*")) == before and not (tmp_path / "again").exists()
    assert_mistake(call("data.py", "check", "--data", encoded), "out holds latents")


def test_a_folder_that_was_made_from_other_data_is_not_overwritten(pictures, encoded, tmp_path):
    shutil.copytree(pictures, tmp_path / "other")
    before = (encoded / "encoded.json").read_bytes()
    done = call("data.py", "encode", "--data", tmp_path / "other", "--out", encoded)
    assert_mistake(done, "another model or version, or from other")
    assert (encoded / "encoded.json").read_bytes() == before
    copy = shutil.copytree(encoded, tmp_path / "copy")
    (copy / "encoded.json").unlink()
    with pytest.raises(UserError, match="copy was made with another model or version"):
        data.encode_folder(load_model(ASSETS / "tiny"), pictures, copy, "cpu")
    assert not (copy / "encoded.json").exists()


def test_a_model_on_pixels_encodes_nothing_and_one_without_texts_only_pictures(pictures, tmp_path):
    model = load_model(ASSETS / "tiny")
    for size in (6, 30):
        with pytest.raises(UserError, match="must be a multiple of 4"):
            data.encode_folder(model, pictures, tmp_path / "out", "cpu", size)
    model.text_encoder = None
    data.encode_folder(model, pictures, tmp_path / "out", "cpu")
    assert not list((tmp_path / "out").glob("texts*"))
    data.Encoded(tmp_path / "out", "class", "train", 64).check(model)
    with pytest.raises(UserError, match="with another autoencoder or text encoder"):
        data.Encoded(tmp_path / "out", "edit", "train", 64).check(load_model(ASSETS / "tiny"))
    model.vae = adm.Pixels(64)
    with pytest.raises(UserError, match="tiny draws pixels"):
        data.encode_folder(model, pictures, tmp_path / "new", "cpu")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["latents-00000.safetensors", "texts-00000.safetensors",
                                  "encoded.json"])
def test_a_file_that_is_cut_short_is_named(encoded, tmp_path, name):
    shutil.copytree(encoded, tmp_path / "copy")
    file = tmp_path / "copy" / name
    file.write_bytes(file.read_bytes()[:-100])
    data.open_shard.cache_clear()
    done = call("train.py", *TRAIN, "--out", tmp_path / "run", "--data", tmp_path / "copy")
    assert_mistake(done, file)


def test_sdxls_pooled_states_and_zeros_for_the_empty_text(pictures, tmp_path):
    model = load_model(ASSETS / "tiny")
    model.text_encoder_2, model.tokenizer_2 = model.text_encoder, model.tokenizer
    data.encode_folder(model, pictures, tmp_path / "out", "cpu")
    context, pooled = data.Encoded(tmp_path / "out", "t2i", "train", 64).encode_text(["", "number 1"])
    expected = model.encode_text(["", "number 1"])
    assert context[0].abs().max() == 0
    assert torch.allclose(context, expected[0], rtol=2e-3, atol=2e-3)
    assert torch.allclose(pooled, expected[1], rtol=2e-3, atol=2e-3)
