"""Data sets as their authors ship them, in miniature: the same trees, of emoji."""
import collections
import gzip
import json
import shutil
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import data
import emoji
import evaluate
import readers
from conftest import assert_mistake, call
from data import Folder, open_dataset
from hub import UserError
from readers import find_layout, read_rows

PLAIN = emoji.Builtin("plain", "train")
PICTURES = [data.to_pil(PLAIN[i]["target"]) for i in range(0, 400, 7)]


def rng(seed=0):
    return np.random.default_rng(seed)


def save(path, i, size=(48, 48), mode="RGB"):
    """Save emoji i, which is unlike all others, under a name -> its pixels as they are read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = PICTURES[i % len(PICTURES)].resize(size, Image.LANCZOS).convert(mode)
    picture.save(path, quality=95)
    return data.to_tensor(Image.open(path).convert("RGB"))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def rows_of(root):
    read_rows.cache_clear()
    return list(read_rows(root)[0])


def by_split(root):
    """Split -> the names of its targets."""
    names = collections.defaultdict(list)
    for row in rows_of(root):
        names[row["split"]].append(row["file_name"])
    return dict(names)


def examples_of(dataset):
    return [dataset[i] for i in range(len(dataset))]


def visits(root, task, i=0, count=200, split="train", size=48, key="prompt", **options):
    dataset = open_dataset(task, split, size, root, **options)
    return [dataset.get(i, rng(seed))[key] for seed in range(count)]


@pytest.fixture(autouse=True)
def fresh():
    read_rows.cache_clear()
    readers.print_once.cache_clear()
    data.report_broken.cache_clear()


# -------------------------------------------------------------------------------------------------
# Pictures and words

def coco(root, parts, missing=()):
    """parts: name -> the numbers of its pictures. Picture 1 is grey, and 2 has a sixth caption."""
    for part, numbers in parts.items():
        prefix = f"COCO_{part}_" if part.endswith("2014") else ""
        images, annotations = [], []
        for i in numbers:
            name = f"{prefix}{i:012d}.jpg"
            images.append(dict(id=i, file_name=name, height=40, width=56, license=1))
            if i not in missing:
                save(root / part / name, i, (56, 40), "L" if i == 1 else "RGB")
            if i != 99:  # one picture without captions
                annotations += [dict(image_id=i, id=100 * i + k, caption=f" A picture,  {i} {k}.\n")
                                for k in range(6 if i == 2 else 5)]
        write(root / f"annotations/captions_{part}.json",
              dict(info={}, licenses=[], images=images, annotations=annotations[::-1]))
        write(root / f"annotations/instances_{part}.json", {})


def test_coco_draws_one_of_five_captions_or_more(tmp_path, capsys):
    coco(tmp_path, dict(train2017=[*range(12), 99], val2017=range(20, 24)), missing=[5])
    assert find_layout(tmp_path).name == "COCO captions"
    found = by_split(tmp_path)
    assert found["train"] == [f"train2017/{i:012d}.jpg" for i in range(12)]
    assert found["heldout"] == [f"val2017/{i:012d}.jpg" for i in range(20, 24)]
    counts = collections.Counter(visits(tmp_path, "t2i", 2, 600))
    assert set(counts) == {f"A picture, 2 {k}." for k in range(6)}
    assert min(counts.values()) > 70
    dataset = Folder(tmp_path, "t2i", "train", 40)
    assert len(dataset) == 11
    grey = dataset[1]["target"]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    assert "COCO captions, 15 of 123,287 examples are there" in capsys.readouterr().err
    # The words of a caption may say left and right: nothing is mirrored.
    assert all(torch.equal(dataset.get(3, rng(seed))["target"], dataset[3]["target"])
               for seed in range(9))


def test_coco_of_2014_is_read_where_it_is_the_one_that_is_there(tmp_path):
    coco(tmp_path, dict(train2014=range(4), val2014=range(4, 6), train2017=range(6)))
    shutil.rmtree(tmp_path / "train2017")
    assert by_split(tmp_path) == {
        "train": [f"train2014/COCO_train2014_{i:012d}.jpg" for i in range(4)],
        "heldout": [f"val2014/COCO_val2014_{i:012d}.jpg" for i in (4, 5)]}
    (tmp_path / "train2017").mkdir()
    assert {name.split("/")[0] for name in sum(by_split(tmp_path).values(), [])} == {"train2017"}


def test_a_text_file_beside_each_picture(tmp_path, capsys):
    for i in range(12):
        save(tmp_path / f"a picture {i}.png", i)
        write(tmp_path / f"a picture {i}.txt", f"words of {i}\n")
    write(tmp_path / "._a picture 1.png", "macOS leaves such files")
    dataset = Folder(tmp_path, "t2i", "train", 48)
    for row, example in zip(dataset.items, examples_of(dataset)):
        number = row["file_name"].split()[-1].removesuffix(".png")
        assert example["prompt"] == f"words of {number}"
        assert torch.equal(example["target"], save(tmp_path / row["file_name"], int(number)))
    (tmp_path / "a picture 3.txt").unlink()
    read_rows.cache_clear()
    items = sum((list(Folder(tmp_path, "t2i", split, 48).items) for split in ("train", "heldout")),
                [])
    assert len(items) == 11 and "a picture 3.png" not in [row["file_name"] for row in items]
    assert "pictures, 11 of 12 examples are there" in capsys.readouterr().err
    done = call("data.py", "check", "--data", tmp_path)
    assert done.returncode == 2 and "a picture 3.txt" in done.stdout


def test_metadata_csv_has_the_columns_of_metadata_jsonl(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", i)
    write(tmp_path / "metadata.csv", '\ufefffile_name,source_file_name,text,split\n0.png,1.png,'
          '"red, or ""blue""\nor green",train\n2.png,3.png,plain,heldout\n')
    row, held = rows_of(tmp_path)
    assert row == dict(file_name="0.png", source_file_name="1.png", split="train",
                       text='red, or "blue"\nor green')
    assert held["split"] == "heldout"
    assert len(Folder(tmp_path, "edit", "train", 48)) == 1
    # An empty cell is no column, but an empty text is a text.
    write(tmp_path / "metadata.csv", "file_name,source_file_name,text\n0.png,,\n1.png,,b\n")
    assert [set(row) for row in rows_of(tmp_path)] == [{"file_name", "text", "split"}] * 2
    assert list(data.served_folders(tmp_path, data.TASKS))[:2] == ["t2i", "sr"]
    write(tmp_path / "metadata.csv", "file_name,text\n0.png,a\n../x.png,b\n")
    read_rows.cache_clear()
    with pytest.raises(UserError, match="metadata.csv line 3: ../x.png lies outside"):
        Folder(tmp_path, "t2i", "train", 48)


# -------------------------------------------------------------------------------------------------
# InstructPix2Pix

def instructpix2pix(root, count=20, seeds_json=True):
    """Prompt i has i % 4 + 1 pairs, in which the source and the target are alike."""
    listed = []
    for i in range(count):
        name = f"{i:07d}"
        seeds = [str(1000 * i + k) for k in range(i % 4 + 1)]
        for k, seed in enumerate(seeds):
            for end in (0, 1):
                save(root / name / f"{seed}_{end}.jpg", 4 * i + k, (64, 64))
        key = "caption" if i % 2 else "input"
        write(root / name / "prompt.json", {key: "before", "edit": f"edit {i} ", "output": "after",
                                            "url": "x"})
        write(root / name / "metadata.jsonl", "\n".join(json.dumps(dict(seed=s)) for s in seeds))
        listed.append([name, seeds])
    if seeds_json:
        write(root / "seeds.json", listed[::-1])
    return root


@pytest.mark.parametrize("seeds_json", [True, False])
def test_instructpix2pix_is_split_by_position_and_draws_a_seed(tmp_path, seeds_json):
    instructpix2pix(tmp_path, seeds_json=seeds_json)
    rows = rows_of(tmp_path)
    numbers = [int(row["file_name"][0].split("/")[0]) for row in rows]
    assert numbers == (list(range(20))[::-1] if seeds_json else list(range(20)))
    assert [row["split"] for row in rows] == ["train"] * 18 + ["heldout", "test"]
    dataset = Folder(tmp_path, "edit", "train", 64)
    assert len(dataset) == 18
    assert Folder(tmp_path, "edit", "heldout", 64)[0]["prompt"] == f"edit {numbers[18]}"
    # A visit draws one of the four seeds, for both pictures.
    i = numbers.index(7)
    names = collections.Counter()
    for seed in range(400):
        row, _ = dataset.open_example(i, seed)
        assert row["file_name"].replace("_1.jpg", "_0.jpg") == row["source_file_name"]
        assert row["text"] == "edit 7"
        names[row["file_name"]] += 1
    assert sorted(names) == [f"0000007/{7000 + k}_1.jpg" for k in range(4)]
    assert min(names.values()) > 70


def ramp(path, size=128):
    """A picture whose red grows from left to right, and whose green from top to bottom."""
    across = np.tile(np.linspace(0, 255, size), (size, 1))
    array = np.stack([across, across.T, np.full_like(across, 128)], axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.round().astype(np.uint8)).save(path, quality=100, subsampling=0)


def window(picture):
    """The part of a `ramp` that a picture shows -> left, top, width, height, all from 0 to 1."""
    red, green, _ = picture / 2 + 0.5
    size = len(red) - 1
    # Fitted lines, because the picture was a JPEG.
    slopes, starts = zip(*(np.polyfit(np.arange(4, size - 3), line[4:-4], 1)
                           for line in (red.mean(0).numpy(), green.mean(1).numpy())))
    return starts[0], starts[1], slopes[0] * size, slopes[1] * size


@pytest.mark.parametrize("size", [48, 160])
def test_instructpix2pix_resizes_crops_and_mirrors_both_pictures_alike(tmp_path, size):
    """To 256 to 288 pixels, of which it cuts 256; half of the pairs are mirrored."""
    instructpix2pix(tmp_path)
    for end in (0, 1):
        ramp(tmp_path / "0000004" / f"4000_{end}.jpg")
    i = [row["file_name"][0][:7] for row in rows_of(tmp_path)].index("0000004")  # of one seed
    dataset = Folder(tmp_path, "edit", "train", size)
    examples = [dataset.get(i, rng(seed)) for seed in range(300)]
    assert all(torch.equal(example["source"], example["target"]) for example in examples)
    again = [dataset.get(i, rng(seed)) for seed in range(9)]
    assert all(torch.equal(a["target"], b["target"]) for a, b in zip(examples, again))
    lefts, tops, widths, heights = np.array([window(example["target"]) for example in examples]).T
    mirrored = widths < 0
    assert 110 < mirrored.sum() < 190
    lefts = np.where(mirrored, lefts + widths, lefts)
    assert np.allclose(abs(widths), heights, atol=0.02)
    enlarge = 1 / heights
    assert 0.97 < enlarge.min() < 1.03 and 1.11 < enlarge.max() < 1.17
    assert 1.05 < enlarge.mean() < 1.10
    for starts in (lefts, tops):
        assert starts.min() > -0.02 and (starts + heights).max() < 1.02
        # The place is uniform between both ends.
        share = (starts / (1 - heights))[heights < 0.94]
        assert share.min() < 0.25 < 0.75 < share.max() and 0.4 < share.mean() < 0.6
    # Nothing is random about what is held out, but for the seed.
    held = Folder(tmp_path, "edit", "heldout", 32)
    assert len({held.get(0, rng(seed))["target"].numpy().tobytes() for seed in range(40)}) <= 4


@pytest.mark.parametrize("task, other", [("edit", "inpaint"), ("inpaint", "edit")])
def test_an_instruction_serves_the_task_that_it_was_written_for(tmp_path, task, other):
    """`--task all` with such a folder must not learn captions from instructions."""
    (instructpix2pix if task == "edit" else gqa)(tmp_path)
    assert set(data.served_folders(tmp_path, data.TASKS)) == {task, "sr", "uncond", "translate",
                                                              "masked"}
    for wrong in ("t2i", other):
        with pytest.raises(UserError, match=f"serves .*{task}.*for {wrong} every .* needs text"):
            Folder(tmp_path, wrong, "train", 32)


def test_instructpix2pix_without_a_prompt_or_a_picture_goes_on(tmp_path):
    instructpix2pix(tmp_path)
    (tmp_path / "0000003" / "prompt.json").unlink()
    (tmp_path / "0000006" / "6001_1.jpg").unlink()
    write(tmp_path / "0000009" / "prompt.json", {"caption": "no instruction"})
    dataset = Folder(tmp_path, "edit", "train", 32)
    names = [row["source_file_name"] for row in dataset.items]
    assert len(names) == 16
    nine = next(i for i, name in enumerate(names) if str(name[0])[:7] == "0000009")
    assert dataset[nine]["prompt"] == dataset.get(nine + 1, rng(3))["prompt"] == "edit 8"
    # evaluate.py takes the captions of the example that it sees.
    write(tmp_path / "0000008" / "prompt.json", dict(input="a", edit="edit 8 ", output="b"))
    assert evaluate.example_of(dataset, nine)["captions"] == ["a", "b"]
    done = call("data.py", "check", "--data", tmp_path)
    assert done.returncode == 2
    for name in ("0000003/prompt.json", "6001_1.jpg", "0000009/prompt.json"):
        assert name in done.stdout


def test_instructpix2pix_in_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet
    names = dict(full=("original_prompt", "original_image", "edit_prompt", "edited_prompt",
                       "edited_image"), sample=("input_image", "edit_prompt", "edited_image"))
    for kind, columns in names.items():
        path = tmp_path / kind / "data" / "train-00000-of-00262-0123.parquet"
        path.parent.mkdir(parents=True)
        table = {column: [] for column in columns}
        pixels = []
        for i in range(20):
            for column in columns:
                if column.endswith("image"):
                    picture = tmp_path / "one.png"
                    pixels.append(save(picture, i + 20 * (column == "edited_image")))
                    table[column].append(dict(bytes=picture.read_bytes(), path=None))
                else:
                    table[column].append(f"{column} {i}")
        pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=6)
        dataset = Folder(tmp_path / kind, "edit", "heldout", 48)
        for row, example in zip(dataset.items, examples_of(dataset)):
            group, number = map(int, row["file_name"].split("/")[-2:])
            i = 6 * group + number
            assert example["prompt"] == f"edit_prompt {i}"
            assert torch.equal(example["source"], pixels[2 * i])
            assert torch.equal(example["target"], pixels[2 * i + 1])
            captions = [f"original_prompt {i}", f"edited_prompt {i}"] if kind == "full" else None
            assert evaluate.captions_of(dataset, row) == captions
        assert len(rows_of(tmp_path / kind)) == 20


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    write(tmp_path / "data" / "a.parquet", "x")
    assert_mistake(call("data.py", "check", "--data", tmp_path), "pip install pyarrow")


# -------------------------------------------------------------------------------------------------
# GQA-Inpaint, masks, Real-ESRGAN

def gqa_thing(name, box, attributes=None, relations=(), bidirected=True):
    thing = dict(name=name, bbox=box, bidirected=bidirected,
                 relations=[dict(name=words, object=other) for words, other in relations])
    return thing | ({} if attributes is None else dict(attributes=attributes))


def gqa(root):
    objects = {
        "11": gqa_thing("dog", [0, 0, 20, 20], ["brown", "wet"],
                        [("to the left of", "12"), ("on", "13"), ("near", "14"), ("near", "15")]),
        "12": gqa_thing("tree", [30, 0, 60, 40], []),
        "13": gqa_thing("grass", [0, 20, 60, 40], bidirected=False),
        "14": gqa_thing("bird", [0, 0, 9, 9], relations=[("near", "15")]),
        "15": gqa_thing("bird", [40, 0, 49, 9], ["red"]),
        "16": gqa_thing("cloud", [0, 0, 5, 5]), "17": gqa_thing("cloud", [0, 6, 5, 9]),
        "18": gqa_thing("leaf", [0, 0, 5, 5]), "19": gqa_thing("leaf", [40, 0, 45, 5]),
        "20": gqa_thing("leaf", [20, 0, 25, 5])}
    places = dict.fromkeys(objects, "to the left") | {"12": "to the center", "15": "to the right",
                                                      "19": "to the right", "20": "to the center"}
    scene = dict(width=60, height=40, objects=objects, image_relative_positions=places)
    write(root / "train_scenes.json", {"2370799": scene, "5": scene})
    write(root / "test_scenes.json", {"77": scene})
    write(root / "test_instructions.json", {"i77-o11": "remove the dog at last"})
    for number, image in enumerate(("2370799", "5", "77")):
        save(root / f"images/{image}.jpg", number, (60, 40))
        for i, thing in enumerate(objects):
            save(root / f"images_inpainted/{image}/{thing}.jpg", 10 + 10 * number + i, (60, 40))
            save(root / f"masks/{image}/{thing}.jpg", 3, (60, 40), "L")
    return root


def test_gqa_inpaint_composes_instructions_as_its_authors_do(tmp_path):
    gqa(tmp_path)
    write(tmp_path / "._train_scenes.json", "left by macOS")
    assert find_layout(tmp_path).name == "GQA-Inpaint"
    rows = rows_of(tmp_path)
    # Three leaves, and two clouds in one place, cannot be told apart; grass was not removed.
    targets = [row["file_name"] for row in rows if row["split"] == "train"]
    assert sorted(targets) == sorted(f"images_inpainted/{image}/{thing}.jpg" for image in
                                     ("2370799", "5") for thing in ("11", "12", "14", "15"))
    assert {row["file_name"].split("/")[1] for row in rows if row["split"] == "heldout"} == {"77"}
    dog, tree, bird, red = (targets.index(f"images_inpainted/5/{thing}.jpg")
                            for thing in ("11", "12", "14", "15"))
    # The dog is the only one: half of the time its place is left out. It is near two birds.
    counts = collections.Counter(visits(tmp_path, "inpaint", dog, 800, size=8))
    share = {f"remove the {a} dog{place}": weight / 2 for a in ("brown", "wet")
             for place, weight in (("", 1 / 2), (" at the left of the tree", 1 / 8),
                                   (" on the grass", 1 / 8), (" near the bird", 1 / 8),
                                   (" near the red bird", 1 / 8))}
    assert set(counts) == set(share)
    assert all(abs(counts[words] / 800 - p) < 0.06 for words, p in share.items())
    # Without a relation a thing has its place, in the central square: the scene has another one.
    assert set(visits(tmp_path, "inpaint", tree, size=8)) == {"remove the tree",
                                                              "remove the tree at the right"}
    # Of two birds the relation to the other one says nothing. In the square, [10, 50], the first
    # is cut away to the left.
    assert set(visits(tmp_path, "inpaint", bird, size=8)) == {"remove the bird at the left"}
    assert set(visits(tmp_path, "inpaint", red, size=8)) == {"remove the red bird at the right"}
    # What is shipped takes the place of what is composed.
    heldout = Folder(tmp_path, "inpaint", "heldout", 8)
    assert heldout[0]["prompt"] == "remove the dog at last"
    example = Folder(tmp_path, "inpaint", "train", 40)[red]
    expected = [data.open_square(tmp_path / name, 40)
                for name in ("images/5.jpg", "images_inpainted/5/15.jpg")]
    assert torch.equal(example["source"], data.to_tensor(expected[0]))
    assert torch.equal(example["target"], data.to_tensor(expected[1]))


@pytest.mark.parametrize("box, place", [
    # Of a picture of 300 x 100, in whose square from 100 to 200 a third is 33 pixels.
    ([0, 0, 90, 9], "left"), ([100, 0, 133, 9], "left"), ([100, 0, 200, 9], "center"),
    ([120, 0, 146, 9], "left"), ([120, 0, 148, 9], "center"), ([140, 0, 160, 9], "center"),
    ([160, 0, 172, 9], "center"), ([160, 0, 174, 9], "right"), ([170, 0, 300, 9], "right"),
    ([110, 0, 166, 9], "center"), ([133, 0, 166, 9], "center")])
def test_gqa_inpaint_names_the_third_of_the_central_square(box, place):
    assert readers.position(dict(width=300, height=100), box) == f"at the {place}"


def test_what_a_mask_covers_is_grey_in_the_source(tmp_path):
    for i in range(8):
        whole = save(tmp_path / f"images/in/{i} x.jpg", i)
        mask = Image.new("L", (24, 24))
        mask.paste(255, (0, 0, 12, 24))
        write(tmp_path / "masks/in/x.txt", "")
        mask.save(tmp_path / f"masks/in/{i} x.png")
    for example in examples_of(Folder(tmp_path, "inpaint", "train", 48)):
        assert example["prompt"] == ""
        assert example["source"][:, :, :23].abs().max() < 0.01
        assert torch.equal(example["source"][:, :, 26:], example["target"][:, :, 26:])
    assert whole.shape == (3, 48, 48)
    (tmp_path / "masks/in/0 x.png").unlink()
    read_rows.cache_clear()
    assert sum(len(Folder(tmp_path, "inpaint", split, 48)) for split in ("train", "heldout")) == 7


def test_real_esrgans_list_holds_out_whole_pictures(tmp_path, capsys):
    """Not crops, of which each picture has many; what follows a space is ignored."""
    lines = []
    for picture in range(1, 16):
        for scale in ("", "T0", "T3"):
            for crop in (1, 2):
                folder = "DF2K_multiscale_sub" if scale else "DF2K_HR_sub"
                name = f"{folder}/{picture:04d}{scale}_s{crop:03d}.png"
                lines.append(f"{name} (480,480,3)" if crop == 1 else f"  {name}  ")
                if (picture, crop) != (7, 2):
                    save(tmp_path / name, picture + crop, (16, 16))
    write(tmp_path / "meta_info/meta_info_DF2Kmultiscale+OST_sub.txt", "\n".join(lines + [""]))
    found = by_split(tmp_path)
    numbers = {split: {name.split("/")[1][:4] for name in names} for split, names in found.items()}
    assert numbers["train"] and numbers["heldout"]
    assert not numbers["train"] & numbers["heldout"]
    assert sum(map(len, found.values())) == 90
    items = sum(len(Folder(tmp_path, "sr", split, 16)) for split in ("train", "heldout"))
    assert items == 87
    assert "Real-ESRGAN, 87 of 90 examples are there; for one, no pic" in capsys.readouterr().err
    done = call("data.py", "check", "--data", tmp_path)
    assert "no picture at" in done.stdout and "DF2K_HR_sub/0007_s002.png" in done.stdout
    for other in ("simple", "real-esrgan"):
        example = Folder(tmp_path, "sr", "train", 16, degradation=other)[0]
        assert not torch.equal(example["source"], example["target"])
    shutil.rmtree(tmp_path / "DF2K_HR_sub")
    shutil.rmtree(tmp_path / "DF2K_multiscale_sub")
    read_rows.cache_clear()
    with pytest.raises(UserError, match="90 of 90 .*no picture at"):
        Folder(tmp_path, "sr", "train", 16)


# -------------------------------------------------------------------------------------------------
# Classes

CIFAR_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def cifar(root):
    root.mkdir(parents=True, exist_ok=True)
    pixels = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        arrays = rng(len(pixels)).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
        labels = np.arange(4, dtype=np.uint8) * 3
        records = np.concatenate([labels[:, None], arrays.reshape(4, -1)], axis=1)
        records.tofile(root / f"{name}.bin")
        pixels[f"{name}.bin"] = arrays
    write(root / "batches.meta.txt", "\n".join(CIFAR_NAMES) + "\n\n")
    return pixels


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-bin"])
def test_cifars_binary_files(tmp_path, folder):
    pixels = cifar(tmp_path / folder)
    write(tmp_path / folder / "._data_batch_1.bin", "left by macOS")
    for split, files in (("train", 5), ("heldout", 1)):
        dataset = Folder(tmp_path, "class", split, 32)
        assert len(dataset) == 4 * files
        for row, i in zip(dataset.items, range(len(dataset))):
            *_, file, number = row["file_name"].split("/")
            expected = torch.from_numpy(pixels[file][int(number)] / np.float32(127.5) - 1)
            example = dataset[i]
            assert example["prompt"] == CIFAR_NAMES[3 * int(number)]
            assert any(torch.equal(example["target"], e) for e in (expected, expected.flip(-1)))
    assert torch.equal(Folder(tmp_path, "uncond", "heldout", 32)[0]["target"],
                       torch.from_numpy(pixels["test_batch.bin"][0] / np.float32(127.5) - 1))
    assert data.class_names(tmp_path) == [CIFAR_NAMES[i] for i in (0, 3, 6, 9)]
    path = tmp_path / folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-5])
    read_rows.cache_clear()
    with pytest.raises(UserError, match="CIFAR-10 example 5"):
        Folder(tmp_path, "class", "train", 32)


def fashion_mnist(root, packed):
    root.mkdir(exist_ok=True)
    pixels = {}
    for part, count in (("train", 20), ("t10k", 5)):
        images = rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            content += array.tobytes()
            path = root / f"{part}-{kind}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(content) if packed else content)
        pixels[part] = images
    return pixels


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_plain_and_packed(tmp_path, packed):
    readers.read_idx_array.cache_clear()
    pixels = fashion_mnist(tmp_path, packed)
    for split, part in (("train", "train"), ("heldout", "t10k")):
        dataset = Folder(tmp_path, "label", split, 28)
        assert len(dataset) == len(pixels[part])
        for i, example in enumerate(examples_of(dataset)):
            assert example["x"] == i % 10
            expected = torch.from_numpy(pixels[part][i] / np.float32(127.5) - 1)
            assert torch.equal(example["target"], expected.expand(3, -1, -1))
    assert data.class_names(tmp_path) == [str(i) for i in range(10)]


@pytest.mark.parametrize("shape, size, words", [
    ((20,), 200_000_000, "does not hold the 20 bytes"), ((2 ** 31, 28), 9, "promises more than"),
    ((20,), 19, "does not hold the 20 bytes"), ((20,), -9, "end-of-stream|Compressed file ended")])
def test_no_more_of_a_packed_array_is_read_than_its_header_promises(tmp_path, shape, size, words):
    readers.read_idx_array.cache_clear()
    content = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + bytes(max(size, 0))
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (tmp_path / name).write_bytes(gzip.compress(content, 1)[:size if size < 0 else None])
    tracemalloc.start()
    with pytest.raises(UserError, match=words):
        Folder(tmp_path, "class", "train", 28)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_the_class_is_the_rank_of_the_folder(tmp_path):
    """ImageNet: upper-case endings, one PNG and one CMYK among the JPEGs, a flat val folder."""
    for n, synset in enumerate(("n01440764", "n01443537", "n02102040")):
        for i in range(6):
            save(tmp_path / f"train/{synset}/{synset}_{i}.JPEG", 7 * n + i, (50, 40),
                 "CMYK" if i == 5 else "RGB")
    Image.open(tmp_path / "train/n01440764/n01440764_0.JPEG").save(
        tmp_path / "train/n01440764/n01440764_1.JPEG", format="PNG")
    save(tmp_path / "val/ILSVRC2012_val_00000001.JPEG", 40)
    assert find_layout(tmp_path).name == "ImageNet"
    found = by_split(tmp_path)
    assert len(found["train"]) + len(found["heldout"]) == 18 and found["heldout"]
    for split in ("train", "heldout"):
        dataset = Folder(tmp_path, "label", split, 40)
        for row, example in zip(dataset.items, examples_of(dataset)):
            synset = row["file_name"].split("/")[1]
            assert ["n01440764", "n01443537", "n02102040"][example["x"]] == synset
    for synset in ("n01440764", "n02102040"):
        save(tmp_path / f"val/{synset}/ILSVRC2012_val_00000007.JPEG", 40)
    found = by_split(tmp_path)
    assert len(found["heldout"]) == 2 and len(found["train"]) == 18


def test_any_tree_of_folders_is_a_tree_of_classes(tmp_path):
    for i, name in enumerate(("cat/b/1.png", "cat/2.webp", "dog/3.jpg", "axolotl/4.png")):
        save(tmp_path / "train" / name, i)
        save(tmp_path / "test" / name, i)
    assert [row["label"] for row in Folder(tmp_path, "class", "train", 48).items] == [
        "axolotl", "cat", "cat", "dog"]
    assert len(Folder(tmp_path, "class", "heldout", 48)) == 4
    assert Folder(tmp_path, "label", "train", 48)[3]["x"] == 2
    # It is one's own, so nothing is mirrored: a class may be a letter.
    dataset = Folder(tmp_path, "class", "train", 48)
    assert len({dataset.get(1, rng(seed))["target"].numpy().tobytes() for seed in range(9)}) == 1


@pytest.mark.parametrize("folders, layout", [
    (("A", "B", "C"), "folders of letters"), (("masks", "hats"), "pictures"),
    (("train/cats", "train/n1 notes"), "pictures"), (("A", "B"), "paired folders"),
    (("images", "masks"), "pictures with masks"), (("train/n01440764",), "ImageNet")])
def test_a_class_may_have_any_name(tmp_path, folders, layout):
    for i, folder in enumerate(folders):
        for k in range(3):
            save(tmp_path / folder / f"{k}.png", 3 * i + k)
    # A picture that is twice as wide as high does not make a data set of pairs.
    for i, size in enumerate(((96, 48), (48, 48))):
        save(tmp_path / f"train/{i}.png", i, size)
    assert find_layout(tmp_path).name == layout


def test_lsuns_exported_folders(tmp_path):
    """The export tool calls every file .webp, whatever it is, and may nest folders."""
    for i in range(6):
        for part in ("church_outdoor_train", "church_outdoor_val", "bedroom_train"):
            path = tmp_path / part / "a/f/0" / f"{i:040x}.jpg"
            save(path, i)
            path.rename(path.with_suffix(".webp"))
    assert {split: len(names) for split, names in by_split(tmp_path).items()} == dict(train=12,
                                                                                     heldout=6)
    assert data.class_names(tmp_path, "class") == ["bedroom", "church_outdoor"]
    assert set(visits(tmp_path, "class", 0, 3)) == {"bedroom"}


# -------------------------------------------------------------------------------------------------
# Pairs

def test_pix2pix_pictures_side_by_side(tmp_path):
    halves = {}
    for part, numbers in (("train", range(8)), ("val", range(8, 10)), ("test", range(10, 12))):
        for i in numbers:
            both = Image.new("RGB", (96, 48))
            for k in range(2):
                half = PICTURES[2 * i + k].resize((48, 48), Image.LANCZOS)
                both.paste(half, (48 * k, 0))
                halves[i, k] = data.to_tensor(half)
            (tmp_path / part).mkdir(exist_ok=True)
            both.save(tmp_path / part / f"{i}.png")
    for name in ("._0.png", ".DS_Store", "Thumbs.db"):
        write(tmp_path / "train" / name, "left by a system")
    assert find_layout(tmp_path).name == "pix2pix"
    assert {split: len(names) for split, names in by_split(tmp_path).items()} == dict(
        train=8, heldout=2, test=2)
    example = Folder(tmp_path, "translate", "heldout", 48)[0]
    back = Folder(tmp_path, "translate", "heldout", 48, reverse=True)[0]
    assert torch.equal(example["x"], halves[8, 0]) and torch.equal(example["target"], halves[8, 1])
    assert torch.equal(back["x"], halves[8, 1]) and torch.equal(back["target"], halves[8, 0])
    # Training cuts 256 out of 286, wherever, and mirrors.
    seen = visits(tmp_path, "translate", 0, 30, key="x")
    assert len({x.numpy().tobytes() for x in seen}) > 20
    done = call("data.py", "check", "--data", tmp_path)
    assert "translate: 8 train, 2 held out, 2 test" in done.stdout and done.returncode == 0


@pytest.mark.parametrize("name_a, name_b", [("trainA/{}_A.jpg", "trainB/{}_B.jpg"),
                                            ("A/train/{}.png", "B/train/{}.jpg"),
                                            ("A/{}.png", "B/{}.png")])
def test_paired_folders(tmp_path, name_a, name_b):
    for i in range(10):
        save(tmp_path / name_a.format(i), i)
        if i != 4:
            save(tmp_path / name_b.format(i), 20 + i)
    assert find_layout(tmp_path).name == "paired folders"
    rows = rows_of(tmp_path)
    pairs = {(row["source_file_name"], row["file_name"]) for row in rows}
    assert pairs >= {(name_a.format(i), name_b.format(i)) for i in range(10) if i != 4}
    assert sum(len(Folder(tmp_path, "translate", split, 48)) for split in ("train", "heldout")) == 9


# -------------------------------------------------------------------------------------------------
# What all layouts share

def test_every_task_may_have_a_folder_in_a_layout_of_its_own(tmp_path):
    coco(tmp_path / "t2i", dict(train2017=range(4), val2017=range(4, 6)))
    instructpix2pix(tmp_path / "edit")
    gqa(tmp_path / "inpaint")
    for i in range(12):
        save(tmp_path / f"sr/{i}.png", i)
    folders = data.served_folders(tmp_path, data.TASKS)
    assert set(folders) == {"t2i", "edit", "inpaint", "sr"}
    done = call("data.py", "check", "--data", tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("t2i: 4 train, 2 held out", "edit: 18 train, 1 held out, 1 test",
                  "inpaint: 8 train, 4 held out", "is read as GQA-Inpaint", "edit/0000"):
        assert words in done.stdout.replace("000000", "edit/0000")
    done = call("train.py", "--task", "all", "--data", tmp_path, "--out", tmp_path / "run",
                "--steps", "1", "--batch-size", "4", "--eval-size", "1", "--sample-every", "0")
    assert done.returncode == 0 and "t2i 4 + 2, edit 18 + 1, sr 1" in done.stdout, done.stderr
    for task in folders:
        done = call("data.py", "show", "--task", task, "--data", tmp_path, "--size", "64",
                    "--out", tmp_path / f"{task}.png")
        assert done.returncode == 0, done.stderr
        sheet = Image.open(tmp_path / f"{task}.png")
        count = 1 if task == "t2i" else 2
        assert sheet.size[0] == 4 * (64 * count + 4)
        example = open_dataset(task, "train", 64, tmp_path)[0]
        cell = sheet.crop((0, 0, 64 * count, 64))
        expected = [example[key] for key in ("source", "target") if key in example]
        assert torch.equal(data.to_tensor(cell), torch.cat([
            data.to_tensor(data.to_pil(picture)) for picture in expected], dim=2))
        words = np.asarray(sheet.crop((0, 64, 64 * count, 96)))
        assert (words.min() < 128) == (task != "sr")


def test_every_layout_can_be_encoded(tmp_path):
    """Each visit of an encoded folder draws among the same pairs and words as of the folder."""
    coco(tmp_path / "in/t2i", dict(train2017=range(3), val2017=range(4, 6)))
    instructpix2pix(tmp_path / "in/edit", count=4)
    gqa(tmp_path / "in/inpaint")
    lists = "a.png\nb.png\n"
    write(tmp_path / "in/sr/meta_info.txt", lists)
    for folder in ("sr", "translate/A", "translate/B"):
        for i, name in enumerate(lists.split()):
            save(tmp_path / "in" / folder / name, i)
    cifar(tmp_path / "in/class")
    fashion_mnist(tmp_path / "in/label", packed=True)
    done = call("data.py", "encode", "--data", tmp_path / "in", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "edit: 3 train, 1 held out" in done.stdout
    tasks = ("class", "label", "translate", *data.ALL)
    plain, encoded = ({task: open_dataset(task, "train", 64, root) for task in tasks}
                      for root in (tmp_path / "in", tmp_path / "out"))
    for task in tasks:
        assert len(plain[task]) == len(encoded[task])
        words = [{dataset[task].get(2 % len(plain[task]), rng(seed))["prompt"]
                  for seed in range(60)} for dataset in (plain, encoded)]
        assert words[1] <= words[0] and len(words[1]) >= min(len(words[0]), 2)
    assert words[0] != {""} and not plain["sr"][0]["prompt"]
    # The same pair is drawn by the same rng; mirroring aside.
    for seed in range(12):
        row, _ = plain["edit"].open_example(2, rng(seed).integers(2 ** 62))
        path = tmp_path / "in/edit" / row["file_name"]
        index = json.loads((tmp_path / "out/encoded.json").read_text())
        numbers = index["tasks"]["edit"]["train"][2][0]
        names = [str(tmp_path / "in/edit" / name) for name in plain["edit"].items[2]["file_name"]]
        latents = encoded["edit"].get(2, rng(seed))["target"]
        expected = data.read_shard(tmp_path / "out", "latents", numbers[names.index(str(path))])
        assert torch.equal(latents, expected["latents"])
    texts = encoded["t2i"].encode_text(["", "A picture, 2 5.", "frog"])[0]
    assert texts.shape[0] == 3
    assert data.class_names(tmp_path / "out") == data.class_names(tmp_path / "in")
    assert encoded["label"][11]["x"] == plain["label"][11]["x"] == 1
    # A and B hold the same pictures here.
    assert torch.equal(encoded["translate"][0]["x"], encoded["translate"][0]["target"])


@pytest.mark.parametrize("name, content", [
    ("annotations/captions_train2017.json", "{"),
    ("annotations/captions_train2017.json", {"images": 3}),
    ("annotations/captions_train2017.json",
     {"images": [{"id": 1, "file_name": "../../x.jpg"}],
      "annotations": [{"image_id": 1, "caption": "x"}]}),
    ("annotations/captions_train2017.json",
     {"images": [{"id": 1, "file_name": 5}], "annotations": [{"image_id": 1, "caption": None}]}),
    ("annotations/captions_odd2017.json",
     {"images": [{"id": 1, "file_name": "x"}], "annotations": [{"image_id": 1, "caption": "x"}]}),
    ("seeds.json", "[[1]]"), ("seeds.json", '[["/etc", ["1"]]]'), ("seeds.json", '[["a", [[]]]]'),
    ("seeds.json", "[]"), ("train_scenes.json", '{"1": {}}'), ("train_scenes.json", "3"),
    ("meta_info.txt", "../../etc/passwd\n"), ("meta_info.txt", ""), ("data_batch_1.bin", "xyz"),
    ("train-images-idx3-ubyte", "xyz"), ("train-images-idx3-ubyte.gz", "\x1f\x8b"),
    ("seeds.json", '[["a", []]]'), ("metadata.csv", ""), ("metadata.csv", "a,b\n1,2\n"),
    ("metadata.csv", "file_name\n\udc80"), ("metadata.csv", "file_name\n" + "x" * 200_000),
    ("images/x", ""), ("x.parquet", "x"), ("trainA/x", "x"), ("train/x.jpg", "x")])
def test_whatever_is_wrong_ends_in_one_line(tmp_path, name, content):
    root = tmp_path / "data"
    (root / name).parent.mkdir(parents=True)
    if isinstance(content, str):
        (root / name).write_bytes(content.encode(errors="surrogateescape"))
    else:
        write(root / name, content)
    for words in (["check"], ["show", "--task", "edit"], ["encode", "--out", tmp_path / "out"]):
        read_rows.cache_clear()
        assert_mistake(call("data.py", *words, "--data", root), root)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", [
    dict(text=3), dict(text=[]), dict(text=["a", 3]), dict(text={}), dict(text={"join": 3}),
    dict(text={"join": [{"file": "/etc/passwd"}]}), dict(text=[{"file": "a.txt"}]),
    dict(text={"file": "/etc/passwd"}), dict(text={"file": "../x"}), dict(text={"file": 3}),
    dict(label=3), dict(label=["a"]), dict(source_file_name=["a.png"]), dict(file_name=[]),
    dict(file_name=["a.png", "b.png"], source_file_name=["a.png"]), dict(file_name=[["a.png"]]),
    dict(file_name="../a.png"), dict(file_name="/etc/passwd"), dict(file_name="link.png"),
    dict(file_name="b/../a.png"), dict(file_name="link/a.png"),
    dict(file_name="masks/m.png/../../x"),
    dict(group=3), dict(split="val"), dict(split=[])])
def test_a_row_from_elsewhere_is_checked(tmp_path, row):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path)
    (tmp_path / "in/link.png").symlink_to(tmp_path / "a.png")
    for name in ("a.png", "in/a.png", "in/b.png", "in/masks/m.png"):
        save(tmp_path / name, 1)
    words = "lies outside" if isinstance(row.get("file_name"), str) else ""
    whole = dict(file_name="a.png", text="x", label="y") | row
    write(tmp_path / "in/metadata.jsonl", json.dumps(whole))
    with pytest.raises(UserError, match=f"metadata.jsonl line 1: .*{words}"):
        Folder(tmp_path / "in", "t2i", "train", 8)


def test_a_row_may_hold_several_captions_and_pairs(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        save(tmp_path / name, ord(name[0]))
    rows = [dict(file_name=["a.png", "b.png"], source_file_name=["c.png", "d.png"],
                 text=["one", {"join": ["two", ["", "three"]]}], split=split)
            for split in ("train", "heldout")]
    write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    dataset = Folder(tmp_path, "edit", "train", 48)
    seen = collections.Counter()
    for seed in range(400):
        row, _ = dataset.open_example(0, seed)
        seen[row["file_name"], row["source_file_name"], row["text"]] += 1
    assert set(seen) == {(*pair, text) for pair in (("a.png", "c.png"), ("b.png", "d.png"))
                         for text in ("one", "two", "two three")}
    assert all(abs(n / 400 - (0.25 if key[2] == "one" else 0.125)) < 0.06
               for key, n in seen.items())


def test_rows_are_packed_so_that_workers_share_them():
    """One array, and no Python object that a worker would copy by counting references to it."""
    rows = [dict(file_name=f"{i}.png", text=["a", "é"]) for i in range(1000)]
    packed = readers.Rows(rows)
    assert list(packed) == rows and packed[-1] == rows[-1] and len(packed) == 1000
    assert packed.text.nbytes < 50 * 1000
    with pytest.raises(IndexError):
        packed[1000]
    assert not list(readers.Rows([]))
