"""MT-Diffusion's tasks: pictures, loss, exact resume, what is known stays, folders, bad input."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import adm
import data
import joint
import train
from aggregation import Aggregation, joint_loss
from conftest import called
from data import ASSETS
from examples import Examples, collate, mean_by_task, mean_by_task_and_t, per_sample_loss
from folders import UserError
from merge import merge_folders
from sample import Model, generate, load_model
from vae import Pixels

QUICK = ["--batch-size", "4", "--eval-size", "1", "--sample-every", "0", "--save-every", "1", "--log-every", "1", "--warmup", "1",
         "--lr-schedule", "constant"]
HEAD = {"translate": "image", "masked": "image", "label": "linear", "repr": "vector"}


def run(out, *args, code=0):
    done = called("train.py", *QUICK, "--out", out, *args)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def attached(task, head=None, input="z", base=ASSETS / "tiny"):
    """Weights that are zero or copies at the start are none of these here."""
    torch.manual_seed(0)
    model = load_model(base)
    joint.attach(model, task, head or HEAD[task], input, "vanishing")
    with torch.no_grad():
        for p in model.heads.parameters():
            p += 0.02 * torch.randn_like(p)
        if input == "x":
            model.unet.conv_in.weight[:, -model.heads.config["channels"]:].normal_(std=0.1)
    model.index["_class_name"] = model.unet.config["_class_name"].replace("UNet", "Pipeline")
    return model


@pytest.fixture(scope="module")
def translate():
    return attached("translate")


@pytest.fixture(scope="module")
def label():
    return attached("label")


@pytest.fixture(scope="module")
def vector():
    return attached("repr")


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A CLIP image tower as transformers saves it, whose vectors are as wide as assets/tiny takes them, and differ."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, projection_dim=128, image_size=40, patch_size=8)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.1 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("tower") / "image_encoder"
    theirs.save_pretrained(folder)
    return folder, theirs


@pytest.fixture(scope="module")
def seeing(tmp_path_factory, tower):
    """A run of repr whose x is a picture's vector."""
    out = tmp_path_factory.mktemp("runs") / "seeing"
    run(out, "--task", "repr", "--image-encoder", tower[0], "--steps", 2, "--sample-every", 2, "--eval-every", 1)
    return out


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """-X on pixels, with ADM's learned variance."""
    out = tmp_path_factory.mktemp("runs") / "pixels"
    return out, run(out, "--task", "masked", "--model", "scratch", "--input", "x", "--steps", 1, "--sample-every", 1)


def a_batch(model, count=4, drop=0.0):
    side, task = model.unet.config["sample_size"], model.tasks[0]
    sets = {task: joint.Pictures(task, "train", model.native_size)}
    examples = Examples(sets, count, 0, 1000, (model.vae.config["latent_channels"], side, side), drop={task: (0, 0, drop)})
    return collate([examples[k] for k in range(count)])


# ---- pictures ----

def test_translate_pairs_the_styles_of_one_emoji_with_one_tone():
    pictures = joint.Pictures("translate", "train")
    e = next(e for e in pictures.rows if len(e.cells) > 3)
    for seed in range(4):
        example, tone = pictures._translate(e, np.random.default_rng(seed)), data._tone(e, np.random.default_rng(seed))
        for style, key in (("google", "x"), ("twitter", "target")):
            assert torch.equal(example[key], data.to_tensor(data.on_white(data.Sheet.picture(style, e.cells[tone]))))


def test_patches_are_squares_of_zeros_and_no_other_pixel_is_zero():
    picture, counts = joint.Pictures("masked", "heldout")[7]["target"], []
    assert (picture != 0).all()
    one = joint.patched(picture, np.random.default_rng(0), patches=1)
    rows, columns = np.nonzero((one == 0).all(0).numpy())
    assert len(rows) == 64 and np.ptp(rows) == np.ptp(columns) == 7 and torch.equal(one[one != 0], picture[one != 0])
    for seed in range(60):
        masked = joint.patched(picture, np.random.default_rng(seed))
        counts.append((masked == 0).all(0).sum().item() / 64)
    assert 2 < min(counts) < 6 and 10 < max(counts) <= 20  # 5 to 20, which overlap
    assert (joint.Pictures("masked", "heldout")[7]["x"] == joint.Pictures("masked", "heldout")[7]["x"]).all()


def test_labels_are_the_categories():
    pictures = joint.Pictures("label", "heldout")
    assert len(joint.classes()) == 10
    for i in range(0, len(pictures), 37):
        assert joint.classes()[pictures[i]["x"]] == pictures.items[i][0].category.lower()


# ---- training ----

@pytest.mark.parametrize("options", [["--task", "translate", "--input", "x"],
                                     ["--task", "label", "--head", "classifier", "--precision", "bf16", "--drop", "0.5"]],
                         ids=lambda options: options[1])
def test_resuming_is_exact_and_heads_train(tmp_path, options):
    run(tmp_path / "a", *options, "--steps", 2)
    run(tmp_path / "b", *options, "--steps", 1)
    first = {f: load_file(tmp_path / "b" / f / "diffusion_pytorch_model.safetensors") for f in ("unet", "heads")}
    run(tmp_path / "b", *options, "--steps", 2)
    for folder in ("unet", "heads"):
        a, b = (load_file(tmp_path / x / folder / "diffusion_pytorch_model.safetensors") for x in "ab")
        assert all(torch.equal(a[k], b[k]) for k in a)
        changed = [k for k in a if not torch.equal(a[k], first[folder][k])]
        assert len(changed) == len(a) if folder == "heads" else "conv_in.weight" in changed
    rows, task = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()], options[1]
    both = {task, f"{joint.SETTINGS[task].modality} head"}
    assert all(set(row["loss_by_t"]) == both and set(row["loss"]) <= both and task in row["loss"] for row in rows)
    before = (tmp_path / "a" / "log.jsonl").read_text()
    assert "--schedule was 'vanishing', is now 'zero'" in run(tmp_path / "a", *options, "--steps", 2, "--schedule", "zero", code=2).stderr
    assert (tmp_path / "a" / "log.jsonl").read_text() == before


def test_the_loss_is_that_of_a_batch_made_by_hand(translate):
    """From pictures to Eq. 6: latents, z_t = sqrt(ab) z_0 + c_t x + sqrt(1 - ab) noise, one forward pass, v of y_t and x."""
    model, batch, scale = translate, a_batch(translate), translate.vae.config["scaling_factor"]
    denoiser = joint.Denoiser(model, head_weight=0.3)
    with torch.no_grad():
        losses, weighted = per_sample_loss(denoiser, joint.Encoder(model), model, batch, "cpu")
        mean, logvar = model.vae.encode(batch["target"])
        z0, x = scale * (mean + (logvar / 2).exp() * batch["sample_noise"]), scale * model.vae.encode(torch.stack(batch["x"]))[0]
        t, noise, ab = batch["t"], batch["noise"], model.diffusion.alpha_bar[batch["t"]].view(-1, 1, 1, 1)
        context = model.encode_text([""] * 4)[0]
        z = ab.sqrt() * z0 + ab.sqrt() * (1 - ab.sqrt()) * x + (1 - ab).sqrt() * noise
        v, features = model.unet(z, t, context, return_features=True)
        denoising = (v - (ab.sqrt() * noise - (1 - ab).sqrt() * z0)).square().mean((1, 2, 3))
        term = (model.heads["source"](features, t) - x).square().mean((1, 2, 3))
        total, _, _ = joint_loss(model.diffusion, denoiser.aggregation, joint.network(model.unet, context, None), model.heads, z0, t, noise, x[None],
                                 {"source": x}, weight=0.3)
    assert torch.allclose(losses, torch.stack([denoising, term], dim=1), rtol=1e-3, atol=1e-4)
    assert torch.allclose(weighted, denoising + 0.3 * term, rtol=1e-3, atol=1e-4) and torch.allclose(weighted, total, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        p2, uw = (per_sample_loss(joint.Denoiser(model, kind, 0.3), joint.Encoder(model), model, batch, "cpu")[1] for kind in ("p2", "uw"))
    assert torch.allclose(uw, denoising / 2 + 0.3 * term, rtol=1e-3, atol=1e-4)
    assert torch.allclose(p2, denoising * model.diffusion.weight(t, "p2") + 0.3 * term, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: attached("label"), lambda: attached("masked", input="x")], ids=["label", "masked-x"])
def test_what_is_dropped_is_pure_generation_and_all_parameters_get_a_gradient(make):
    model = make()
    batch, denoiser, encode = a_batch(model, drop=1.0), joint.Denoiser(model), joint.Encoder(model)
    assert batch["keep"].tolist() == [0.0] * 4
    losses, weighted = per_sample_loss(denoiser, encode, model, batch, "cpu")
    assert losses[:, 1].isnan().all() and torch.allclose(losses[:, 0], weighted)
    weighted.sum().backward()
    assert all(p.grad is not None for p in denoiser.parameters()) and all((p.grad == 0).all() for p in model.heads.parameters())
    z0, known = encode(batch, "cpu")
    z = torch.cat([z0, torch.zeros_like(z0)], dim=1) if joint.beside(model) else z0

    def plain(z_t, t):
        return model.unet(torch.cat([z_t, z[:, z_t.shape[1]:]], dim=1), t, model.encode_text([""] * 4)[0])
    with torch.no_grad():
        assert torch.allclose(losses[:, 0], model.diffusion.loss(plain, z0, batch["t"], batch["noise"]), atol=1e-4)
    kept = dict(batch, keep=torch.ones(4))
    with torch.no_grad():
        losses_kept, _ = per_sample_loss(denoiser, encode, model, kept, "cpu")
    assert losses_kept.isfinite().all() and not torch.allclose(losses_kept[:, 0], losses[:, 0], atol=1e-4)


def test_without_x_the_loss_on_pixels_is_train_pys(pixels):
    """Also its term for the learned variance."""
    model, x0, noise, t = load_model(pixels[0]), torch.rand(2, 3, 32, 32) - 0.5, torch.randn(2, 3, 32, 32), torch.tensor([5, 700])
    known = dict(E=torch.randn(1, 2, 3, 32, 32), x={"masked": torch.randn(2, 3, 32, 32)}, given=torch.tensor([[0.0, 1.0]]))
    with torch.no_grad():
        losses, weighted = joint.Denoiser(model)(x0, known, None, t, noise, None)
        plain, plain_weighted = train.Denoiser(model.unet, None, model.diffusion)(x0, torch.zeros_like(x0), None, t, noise, None)
    assert torch.allclose(losses[0, 0], plain[0]) and torch.allclose(weighted[0], plain_weighted[0]) and losses[0, 1].isnan()
    assert not torch.allclose(plain[0], plain_weighted[0]) and not torch.allclose(losses[1, 0], plain[1], atol=1e-5) and losses[1].isfinite().all()


def test_held_out_means_of_the_modalities_too():
    examples, losses = [dict(task="label", t=t) for t in (0, 249, 999)], np.array([[1.0, 10], [3, 30], [5, 50]])
    assert mean_by_task(examples, losses, ["label head"]) == {"label": 3.0, "label head": 30.0}
    assert mean_by_task_and_t(examples, losses, 1000, ["label head"]) == {"label": [2.0, None, None, 5.0], "label head": [20.0, None, None, 50.0]}


def test_drop_rates():
    for task, setting in joint.SETTINGS.items():
        examples = Examples({task: None}, 4, 0, 1000, (4, 16, 16), drop={task: (0, 0, 0.25)})
        keep = [examples.condition(dict(prompt="", target=None, x=1), task, r)["keep"] for r in np.linspace(0, 1, 400, endpoint=False)]
        assert keep.count(0.0) == 100
        assert setting.drop == (0.0 if task == "translate" else 0.1)


def test_each_class_is_encoded_once_a_batch_and_without_gradient(label, monkeypatch):
    batch, seen = a_batch(label), []
    encoding = joint.unet_encoding
    monkeypatch.setattr(joint, "unet_encoding", lambda unet, z, context, added: seen.append(len(context)) or encoding(unet, z, context, added))
    batch["x"] = [3, 5, 3, 3]
    E = joint.Encoder(label)(batch, "cpu")[1]["E"][0]
    with torch.no_grad():
        context, _ = label.encode_text([joint.classes()[3]])
        expected = label.unet(torch.zeros(1, 4, 16, 16), torch.zeros(1, dtype=torch.long), context)
    assert seen == [2] and not E.requires_grad
    assert torch.equal(E[0], E[2]) and torch.allclose(E[0], expected[0], atol=1e-5) and not torch.allclose(E[1], E[0], atol=1e-2)


def test_on_pixels_a_class_enters_by_the_class_embedding(tmp_path):
    """z_t meets the last row, a class its own, once a batch; the folder draws and classifies."""
    run(tmp_path / "a", "--task", "label", "--model", "scratch", "--unet", "adm-tiny", "--steps", 1)
    model, seen = load_model(tmp_path / "a"), []
    condition = type(model.unet).condition
    model.unet.condition = lambda *args: seen.append(args[-1]["class_labels"].tolist()) or condition(model.unet, *args)
    batch = a_batch(model)
    batch["x"] = [3, 5, 3, 3]
    z0, known = joint.Encoder(model)(batch, "cpu")
    assert seen == [[3, 5]] and z0.shape == (4, 3, 32, 32)
    E, rows = known["E"][0], torch.tensor([3, 5, 3, 3])
    with torch.no_grad():
        expected = model.unet(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long), None, added={"class_labels": rows})[:, :3]
    assert torch.allclose(E, expected, atol=1e-5) and not torch.allclose(E[0], E[1], atol=1e-2)
    seen.clear()
    flags, animals = (joint.draw(model, 1, {"label": torch.tensor([k])}, steps=2)["image"] for k in (3, 0))
    assert seen == [[*range(10)], [10], [10]] * 2 and (flags - animals).abs().mean() > 1e-4
    found = joint.draw(model, 2, {"image": batch["target"][:2]}, steps=2)["label"]
    assert found.shape == (2, 10) and torch.allclose(found.sum(1), torch.ones(2))
    config = json.loads((tmp_path / "a" / "unet" / "config.json").read_text())
    (tmp_path / "a" / "unet" / "config.json").write_text(json.dumps(config | dict(num_class_embeds=12)))
    with pytest.raises(UserError, match="num_class_embeds|class_embedding"):
        load_model(tmp_path / "a")
    plain = Model(adm.UNet2D(adm.CONFIGS["adm-tiny"] | dict(num_class_embeds=None)), Pixels(32), None, None, train.ADM_SCHEDULER, {})
    with pytest.raises(UserError, match="class embedding"):
        joint.attach(plain, "label", "linear", "z", "vanishing")


def test_a_representation_is_the_captions_vector_encoded_as_one_token(vector):
    model, batch = vector, a_batch(vector, count=2)
    with torch.no_grad():
        _, known = joint.Encoder(model)(batch, "cpu")
        pooled = model.text_encoder(model.tokenizer(batch["x"]))[2]
        E = model.unet(torch.zeros(2, 4, 16, 16), torch.zeros(2, dtype=torch.long), pooled[:, None])
    assert torch.allclose(known["x"]["repr"], pooled, atol=1e-5) and torch.allclose(known["E"][0], E, atol=1e-4)
    assert all("style" in words for words in batch["x"]) and batch["x"][0] != batch["x"][1]
    apple, book = (joint.draw(model, 1, joint.tensors(model, {"repr": words}, 1, 64, 64), steps=3) for words in ("red apple", "blue book"))
    assert (apple["image"] - book["image"]).abs().mean() > 1e-3 and torch.equal(apple["repr"], joint.vectors(model, ["red apple"]))


def test_with_an_image_encoder_a_representation_is_the_pictures_vector(tower, seeing):
    """transformers' own, of its own preprocessing, in training, in the grids' rows and of a picture that is given."""
    import transformers
    size = dict(height=40, width=40)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=size)
    model, calls = load_model(seeing), []
    batch = a_batch(model, count=2)
    pictures = [data.to_pil(picture) for picture in batch["target"]] + [data.open_image(ASSETS / "examples/masked.png").resize((50, 30))]
    with torch.no_grad():
        theirs = tower[1](processor(pictures, return_tensors="pt").pixel_values).image_embeds
        _, known = joint.Encoder(model)(batch, "cpu")
        E = model.unet(torch.zeros(2, 4, 16, 16), torch.zeros(2, dtype=torch.long), theirs[:2, None])
    assert (theirs[0] - theirs[1]).abs().max() > 0.1 and (theirs[0] - theirs[2]).abs().max() > 0.1
    assert torch.allclose(known["x"]["repr"], theirs[:2], atol=1e-4) and torch.allclose(known["E"][0], E, atol=1e-4)
    given = joint.tensors(model, {"repr": pictures[2]}, 3, 64, 64)["repr"]
    assert given.shape == (3, 128) and torch.allclose(given, theirs[2:], atol=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "draw", lambda model, count, known, seed: calls.append(known) or {"image": batch["target"]})
        rows = joint.grid_rows(model, [{key: batch[key][i] for key in ("x", "target")} for i in range(2)], 0)
    assert calls[0] == {} and torch.allclose(calls[1]["repr"], theirs[:2], atol=1e-4) and len(rows) == 6


def test_a_run_with_an_image_encoder_is_whole_and_resumes_exactly(tower, seeing, tmp_path):
    folder = tower[0].parent  # as a pipeline's
    run(tmp_path / "b", "--task", "repr", "--image-encoder", folder, "--steps", 1)
    run(tmp_path / "b", "--task", "repr", "--image-encoder", os.path.relpath(folder), "--steps", 2)
    for part in ("unet/diffusion_pytorch_model", "heads/diffusion_pytorch_model", "image_encoder/model"):
        a, b = (load_file(folder / f"{part}.safetensors") for folder in (seeing, tmp_path / "b"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    trained, start = load_file(seeing / "unet/diffusion_pytorch_model.safetensors"), load_model(ASSETS / "tiny").unet.state_dict()
    assert any(not torch.equal(trained[key], start[key]) for key in trained)
    assert (seeing / "samples" / "000002.png").is_file()
    heldout = [json.loads(line)["held_out"] for line in (seeing / "log.jsonl").read_text().splitlines() if "held_out" in line]
    assert heldout and all(set(row) == {"repr", "repr head"} and np.isfinite(list(row.values())).all() for row in heldout)
    theirs = type(tower[1]).from_pretrained(seeing / "image_encoder")
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), tower[1].state_dict().values()))
    model = load_model(seeing)
    assert model.index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]
    assert model.to(torch.float64).image_encoder.visual_projection.weight.dtype == torch.float64  # goes where the others go
    run(tmp_path / "on", "--task", "repr", "--model", seeing, "--steps", 1)  # goes on with what it was trained with
    assert load_model(tmp_path / "on").image_encoder.width == 128
    for options, words in ((["--image-encoder", tmp_path / "b"], "other settings: --image-encoder was"), ([], "--image-encoder was"),
                           (["--model", seeing, "--image-encoder", tower[0]], "keeps what it was trained with")):
        done = run(seeing if "--model" not in options else tmp_path / "no", "--task", "repr", "--eval-every", 1, "--steps", 2, *options, code=2)
        assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_picture_is_given_for_its_vector_and_a_drawn_one_names_a_picture(seeing, vector, tmp_path, monkeypatch):
    def drawn(given, folder=seeing, code=0):
        done = called("sample.py", "--task", "repr", "--model", folder, "--steps", 2, "--out", tmp_path / "r.png", *given)
        assert done.returncode == code, done.stderr
        return done
    Image.new("RGB", (90, 30), "red").save(tmp_path / "red.png")
    pictures = []
    for path in (tmp_path / "red.png", ASSETS / "examples/edit.png"):
        assert "nearest" not in drawn(["--given", f"repr={path}"]).stdout
        pictures.append(np.asarray(Image.open(tmp_path / "r.png")).astype(int))
    assert pictures[0].shape == pictures[1].shape == (64, 64, 3) and np.abs(pictures[0] - pictures[1]).max() > 1  # z_0 is as large as ever
    assert "nearest of 404 held-out pictures: '" in drawn([]).stdout
    vector.save(tmp_path / "words")
    for given, folder, words in (("red apple", seeing, "of a picture, and there is no such file"), (tmp_path, seeing, "there is no such file"),
                                 (tmp_path / "red.png", tmp_path / "words", "of words"), (tmp_path / "words/model_index.json", seeing, "not a picture")):
        done = drawn(["--given", f"repr={given}"], folder, code=2)
        assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr

    model, heldout = load_model(seeing), joint.Pictures("repr", "heldout")
    chosen = [heldout.items[i] for i in (40, 301)]
    known = joint.vectors(model, pictures=[data.on_white(data.Sheet.picture(style, e.cells[None])) for e, style in chosen])
    monkeypatch.setattr(joint, "draw", lambda *args, **options: {"image": torch.zeros(2, 3, 64, 64), "repr": 2 * known})
    _, _, lines = joint.side_by_side(model, {}, 2, 64, 64)
    assert [line.split(": ", 1)[1] for line in lines] == [f"{data.caption(e, None, style)!r}, cosine 1.000" for e, style in chosen]


def test_a_run_folder_whose_image_encoder_is_missing_or_another_is_refused(seeing, tmp_path):
    import clip
    shutil.copytree(seeing, tmp_path / "a", ignore=shutil.ignore_patterns("state"))
    shutil.copytree(ASSETS / "tiny", tmp_path / "base")
    shutil.copytree(seeing / "image_encoder", tmp_path / "base" / "image_encoder")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index | dict(image_encoder=["transformers", "CLIPVisionModelWithProjection"])))
    assert load_model(tmp_path / "base").image_encoder is None  # used where it is asked for
    clip.CLIPVision(dict(clip.CONFIGS["tiny"], projection_dim=24)).save_pretrained(tmp_path / "a" / "image_encoder")
    with pytest.raises(UserError, match="image encoder's width"):
        load_model(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "image_encoder")
    with pytest.raises(UserError, match="no folder image_encoder/"):
        load_model(tmp_path / "a")


def test_a_larger_model_sees_the_emoji_enlarged(tower, tmp_path):
    shutil.copytree(ASSETS / "tiny", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "unet" / "config.json").read_text())
    (tmp_path / "base" / "unet" / "config.json").write_text(json.dumps(config | dict(sample_size=32)))
    run(tmp_path / "run", "--task", "repr", "--model", tmp_path / "base", "--image-encoder", tower[0], "--steps", 1)
    model = load_model(tmp_path / "run")
    assert model.native_size == 128 and a_batch(model, count=1)["target"].shape == (1, 3, 128, 128)
    assert joint.draw(model, 1, steps=1)["image"].shape == (1, 3, 128, 128)


def test_a_mistake_with_an_image_encoder_is_one_line_and_exit_2(tmp_path):
    import clip
    clip.CLIPVision(dict(clip.CONFIGS["tiny"], projection_dim=24)).save_pretrained(tmp_path / "narrow")
    for task, encoder, words in (("repr", tmp_path / "narrow", "its vectors are 24 wide"), ("repr", tmp_path / "none", "no model folder at"),
                                 ("repr", ASSETS / "tiny", "config.json cannot be read"),
                                 ("repr", ASSETS / "tiny/text_encoder", "image encoder config: architectures"),
                                 ("label", tmp_path / "narrow", "goes with --task repr"), ("t2i", tmp_path / "narrow", "goes with --task repr")):
        done = run(tmp_path / "run", "--task", task, "--image-encoder", encoder, "--steps", 1, code=2)
        assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists(), done.stderr


# ---- drawing ----

def test_known_modalities_stay_exactly_as_given(translate):
    pictures = joint.Pictures("translate", "heldout")
    source, target = (torch.stack([pictures[i][key] for i in (3, 30)]) for key in ("x", "target"))
    out = joint.draw(translate, 2, {"source": source}, steps=2)
    assert torch.equal(out["source"], source) and list(out) == ["image", "source"]
    back = joint.draw(translate, 2, {"image": target}, steps=2)
    other = joint.draw(translate, 2, {"image": target.flip(0)}, steps=2)
    assert torch.equal(back["image"], target) and (back["source"] - other["source"]).abs().mean() > 0.01
    free = joint.draw(translate, 2, steps=2)
    assert (free["image"] - out["image"]).abs().mean() > 1e-3 and (free["source"] - source).abs().mean() > 0.05
    again = joint.draw(translate, 1, {"source": source[1:]}, steps=2, seed=1)  # a sample does not depend on its batch
    assert (again["image"] - out["image"][1:]).abs().max() < 0.02


def test_what_is_known_enters_beside_z_t_and_zeros_where_it_is_not(pixels, monkeypatch):
    """-X without x is pure generation, as in training: no E either, and no x drawn."""
    model, e, seen = load_model(pixels[0]), joint.Pictures("masked", "heldout", 32)[9], []
    forward = model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda z, *rest, **more: seen.append(z[:, 3:]) or forward(z, *rest, **more))
    nothing = torch.zeros_like(e["x"])
    aggregated, aggregate = [], Aggregation.aggregate
    monkeypatch.setattr(Aggregation, "aggregate", lambda *args: aggregated.append(aggregate(*args)) or aggregated[-1])
    for known, beside, names in (({"masked": e["x"][None]}, e["x"], {"image", "masked"}), ({}, nothing, {"image"})):
        seen.clear(), aggregated.clear()
        out = joint.draw(model, 1, known, steps=2)
        assert len(seen) == 2 and all(torch.equal(z[0], beside) for z in seen) and set(out) == names
        assert any(C.any() for C in aggregated) == bool(known)
    with pytest.raises(UserError, match="beside z_t"):
        joint.draw(model, 1, {"image": e["target"][None]}, steps=2)


def test_interpolating_weights_need_x(monkeypatch):
    model = attached("translate")
    monkeypatch.setitem(model.heads.config["modalities"]["source"], "weights", "interpolating")
    for known in ({}, {"image": torch.zeros(1, 3, 64, 64)}):
        with pytest.raises(UserError, match="--given source"):
            joint.draw(model, 1, known, steps=2)


def test_a_picture_is_classified_and_a_class_is_drawn(label):
    picture = joint.Pictures("label", "heldout")[5]["target"][None]
    out = joint.draw(label, 1, {"image": picture}, steps=2)
    assert out["label"].shape == (1, 10) and torch.allclose(out["label"].sum(), torch.tensor(1.0))
    flags, fruit = (joint.draw(label, 1, {"label": torch.tensor([k])}, steps=3) for k in (3, 4))
    assert flags["label"].tolist() == [3] and (flags["image"] - fruit["image"]).abs().mean() > 1e-3


def transparent(path, task="masked", size=32, i=200):
    """A held-out picture whose patches are transparent, the left half in part, and both as tensors."""
    e = joint.Pictures(task, "heldout", size)[i]
    picture, alpha = data.to_pil(e["target"]), np.where((e["x"] == 0).all(0).numpy(), 0, 255).astype(np.uint8)
    alpha[:, :size // 2] = np.where(alpha[:, :size // 2], 255, 254)
    picture.putalpha(Image.fromarray(alpha))
    picture.save(path)
    return e


def test_restoring_on_pixels_keeps_the_others_exactly(pixels, tmp_path):
    e = transparent(tmp_path / "in.png")
    done = called("sample.py", "--task", "masked", "--model", pixels[0], "--given", f"masked={tmp_path / 'in.png'}", "--steps", 2, "--num-images", 2,
                  "--out", tmp_path / "out.png")
    assert done.returncode == 0 and "mean difference 0.00, largest 0.00; the network's own drawing: mean" in done.stdout, done.stderr
    drawn = torch.stack([data.to_tensor(Image.open(tmp_path / "out.png").crop((0, 32 * row, 64, 32 * row + 32))) for row in (0, 1)])
    kept = (e["x"] != 0).expand_as(e["x"])
    for picture in drawn:
        assert torch.equal(picture[:, :, :32][kept], e["x"][kept])
    assert not torch.equal(drawn[0], drawn[1])
    given, written = (np.asarray(Image.open(tmp_path / name)) for name in ("in.png", "out.png"))
    opaque = given[..., 3] == 255
    assert 0 < (~opaque[:, :16]).sum() < 512 and 0 < (~opaque[:, 16:]).sum() < 512
    for row in (written[:32], written[32:]):  # the bytes of both files
        assert np.array_equal(row[:, :32][opaque], given[..., :3][opaque]) and np.array_equal(row[:, 32:][opaque], given[..., :3][opaque])
        assert (row[:, :32] != given[..., :3]).any(-1)[~opaque].mean() > 0.9 and (row[:, 32:][~opaque] == 128).all()
    differs = float(done.stdout.split("mean ")[-1].split()[0])
    assert differs > 5  # after one step the network's own is far off, and that is what is told
    assert Image.open(pixels[0] / "samples" / "000001.png").size == (6 * 32, 4 * 32)  # z_0 alone; z_0 and x of x; the true z_0


def test_folders_reload_and_draw_the_same_and_diffusers_refuses_them(tmp_path):
    from diffusers import DiffusionPipeline
    from routing import add_routing
    routed = load_model(ASSETS / "tiny")
    add_routing(routed.unet)
    routed.unet.save_pretrained(tmp_path / "base" / "unet")
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({"base": str(ASSETS / "tiny")}))
    for name, model in (("x", attached("masked", input="x")), ("e", attached("label", "classifier", base=tmp_path / "base"))):
        model.index.pop("base", None)
        model.save(tmp_path / name)
        again = load_model(tmp_path / name)
        assert again.tasks == model.tasks and joint.beside(again) == (name == "x") and ("routing" in again.unet.config) == (name == "e")
        a, b = (joint.draw(m, 1, steps=2) for m in (model, again))
        assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)
        with pytest.raises(Exception, match="Joint|Routed"):
            DiffusionPipeline.from_pretrained(tmp_path / name)
        with pytest.raises(UserError, match="several modalities"):
            generate(again, again.tasks[0], [""])
    merge_folders(tmp_path / "x", [tmp_path / "x"], [0.5], tmp_path / "merged")
    assert load_model(tmp_path / "merged").tasks == ["masked"]


def test_a_run_on_pixels_does_not_open_in_diffusers(pixels):
    from diffusers import DDPMPipeline
    with pytest.raises(Exception, match="JointUNet2D"):
        DDPMPipeline.from_pretrained(pixels[0])
    assert load_model(pixels[0]).tasks == ["masked"]


def test_the_commands(translate, label, vector, tmp_path):
    translate.save(tmp_path / "t")
    done = called("sample.py", "--task", "translate", "--model", tmp_path / "t", "--steps", 2, "--num-images", 2, "--out", tmp_path / "t.png",
                  "--given", f"source={ASSETS / 'examples/sr.png'}")
    assert done.returncode == 0 and "image, source; given: source=" in done.stdout, done.stderr
    picture = Image.open(tmp_path / "t.png")
    given = data.to_tensor(data.on_white(data.open_image(ASSETS / "examples/sr.png")).resize((64, 64), Image.BICUBIC))
    assert picture.size == (128, 128) and torch.equal(data.to_tensor(picture.crop((64, 64, 128, 128))), given)
    label.save(tmp_path / "l")
    done = called("sample.py", "--task", "label", "--model", tmp_path / "l", "--steps", 2, "--out", tmp_path / "l.png",
                  "--given", f"image={ASSETS / 'examples/edit.png'}")
    first, second = done.stdout.splitlines()
    assert len(first.split(", ")) == 3 and first.split(", ")[0].rsplit(" ", 1)[0] in joint.classes()
    assert Image.open(tmp_path / "l.png").size == (64, 64)
    done = called("sample.py", "--task", "label", "--model", tmp_path / "l", "--steps", 2, "--out", tmp_path / "l.png",
                  "--given", "label=Food & Drink")
    assert done.returncode == 0 and "given: label=Food & Drink" in done.stdout
    vector.save(tmp_path / "r")
    done = called("sample.py", "--task", "repr", "--model", tmp_path / "r", "--steps", 2, "--out", tmp_path / "r.png")
    assert "nearest of 404 held-out captions: '" in done.stdout, done.stderr

    shutil.copy(ASSETS / "examples/edit.png", tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:100])
    edit, before = f"image={ASSETS / 'examples/edit.png'}", (tmp_path / "l.png").read_bytes()
    for model, task, words, told in (
            ("l", "label", ["label=cats"], "the classes are activities"), ("l", "label", ["source=a.png"], "not trained on source"),
            ("l", "label", ["label=flags", "label=symbols"], "given twice"), ("l", "label", ["label=flags", edit], "nothing is left"),
            ("l", "label", ["flags"], "NAME=VALUE"), ("l", "label", ["label="], "NAME=VALUE"),
            ("t", "translate", ["label=flags"], "not trained on label"),
            ("t", "translate", ["source=nothing.png"], "nothing.png"), ("t", "translate", [f"image={tmp_path / 'cut.png'}"], "cut.png"),
            ("t", "label", [], "does not know the task 'label'; it knows translate"), ("t", "t2i", ["label=flags"], "--given goes with"),
            ("t", "t2i", [], "it knows translate")):
        given = [word for pair in words for word in ("--given", pair)]
        done = called("sample.py", "--task", task, "--model", tmp_path / model, "--steps", 1, "--out", tmp_path / "l.png", *given)
        assert done.returncode == 2 and told in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert (tmp_path / "l.png").read_bytes() == before
    index = json.loads((tmp_path / "l" / "model_index.json").read_text())
    (tmp_path / "l" / "model_index.json").write_text(json.dumps(index | {"joint": {"task": "masked"}}))
    with pytest.raises(UserError, match="joint task"):
        load_model(tmp_path / "l")


def test_a_masked_picture_needs_something_masked(pixels, tmp_path):
    model = load_model(pixels[0])
    with pytest.raises(UserError, match="transparent"):
        joint.read_given([f"masked={ASSETS / 'results/routing.png'}"], model)
    Image.new("RGBA", (32, 32), (9, 9, 9, 254)).save(tmp_path / "in-part.png")
    for picture in (ASSETS / "examples/masked.png", tmp_path / "in-part.png"):
        assert list(joint.read_given([f"masked={picture}"], model)) == ["masked"]


@pytest.mark.parametrize("size, options, drawn", [(64, [], "32 x 32"), (24, [], "32 x 32"), (32, ["--width", 40, "--height", 48], "40 x 48")])
def test_a_masked_picture_of_another_size_is_one_line_and_exit_2(pixels, tmp_path, size, options, drawn):
    transparent(tmp_path / "in.png", size=size)
    done = called("sample.py", "--task", "masked", "--model", pixels[0], "--given", f"masked={tmp_path / 'in.png'}", "--steps", 1,
                  "--out", tmp_path / "out.png", *options)
    assert done.returncode == 2 and f"the picture is {size} x {size} and what is drawn {drawn}" in done.stderr and "--height" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out.png").exists()


def test_the_shipped_masked_picture_and_one_of_the_size_that_is_asked_for_are_drawn(pixels, tmp_path):
    transparent(tmp_path / "in.png", size=40)
    for picture, size in ((ASSETS / "examples/masked.png", 32), (tmp_path / "in.png", 40)):
        done = called("sample.py", "--task", "masked", "--model", pixels[0], "--given", f"masked={picture}", "--steps", 1,
                      "--out", tmp_path / "out.png", *(["--height", 40, "--width", 40] if size == 40 else []))
        assert done.returncode == 0 and "largest 0.00" in done.stdout and Image.open(tmp_path / "out.png").size == (2 * size, size), done.stderr


@pytest.mark.parametrize("arguments, words", [
    (["--task", "translate,masked"], "alone"), (["--task", "translate,t2i"], "alone"), (["--task", "t2i", "--head", "linear"], "--head goes with"),
    (["--task", "translate", "--head", "linear"], "has the head image"), (["--task", "label", "--input", "x"], "only pictures"),
    (["--task", "label", "--drop", "1"], "--drop"), (["--task", "label", "--head-weight", "-1"], "--head-weight"),
    (["--task", "translate", "--data", "x"], "--data"), (["--task", "masked", "--t-range", "0", "9"], "--t-range"),
    (["--task", "masked", "--decouple", "2"], "--decouple"), (["--task", "label", "--model", "scratch", "--input", "x"], "only pictures"),
    (["--task", "repr", "--model", "scratch"], "text encoder"),
    (["--task", "translate", "--model", str(ASSETS / "tiny-mtu")], "starts from"),
    (["--task", "translate", "--unet", "adm-tiny"], "--unet"),
    (["--task", "translate", "--schedule", "interpolating"], "interpolating")])
def test_a_mistake_in_training_is_one_line_and_exit_2(tmp_path, arguments, words):
    done = run(tmp_path / "run", "--steps", 1, *arguments, code=2)
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--prompt", "x"], "--prompt"), (["--strength", "0.5"], "--strength"), ([], "python train.py --task translate makes it")])
def test_a_mistake_in_drawing_is_one_line_and_exit_2(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    done = called("sample.py", "--task", "translate", *arguments)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_training_goes_on_from_a_joint_model_of_the_same_kind_alone(tmp_path, translate):
    translate.save(tmp_path / "t")
    run(tmp_path / "on", "--task", "translate", "--model", tmp_path / "t", "--steps", 1)
    assert load_model(tmp_path / "on").tasks == ["translate"]
    for options in (["--input", "x"], ["--schedule", "zero"]):
        assert "another head" in run(tmp_path / "no", "--task", "translate", "--model", tmp_path / "t", "--steps", 1, *options, code=2).stderr
    for task in ("all", "t2i"):
        assert "it knows translate" in run(tmp_path / "no", "--task", task, "--model", tmp_path / "t", "--steps", 1, code=2).stderr
    done = called("sample.py", "--export", "translate", "--export-to", tmp_path / "x", "--model", tmp_path / "t")
    assert done.returncode == 2 and "joint" in done.stderr and not (tmp_path / "x").exists()
    assert "another head" in run(tmp_path / "no", "--task", "masked", "--model", tmp_path / "t", "--steps", 1, code=2).stderr
