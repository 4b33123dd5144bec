"""Drawing: the shipped models, diffusers' picture, seeds, sizes, bad input."""
import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import moe
import sample
from clip import CONFIGS as TEXT, CLIPText
from conftest import called
from data import ALL, ASSETS, on_white, to_tensor
from folders import UserError
from sample import EXAMPLES, generate, load_model, open_image
from unet import CONFIGS, UNet


@pytest.fixture(scope="module")
def tiny():
    return load_model(ASSETS / "tiny")


@pytest.fixture(scope="module")
def mtu():
    return load_model(ASSETS / "tiny-mtu")


def example(task):
    image, prompt = EXAMPLES[task]
    return [prompt], [open_image(ASSETS / "examples" / image)] if image else None


def test_shipped_base_draws_diffusers_picture(tiny):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(ASSETS / "tiny", low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    for prompt, guidance in (("red apple, google style", 7.5), ("", 1.0)):
        theirs = pipe(prompt, num_inference_steps=8, guidance_scale=guidance, generator=torch.Generator().manual_seed(3)).images[0]
        ours = generate(tiny, "t2i", [prompt], guidance=guidance, steps=8, seed=3)[0]
        error = np.abs(np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)).mean()
        assert error < 1, f"mean absolute difference {error:.3f} of 255"


def test_folded_edit_draws_the_same_and_what_instruct_pix2pix_draws(mtu):
    diffusers = pytest.importorskip("diffusers")
    from dataclasses import replace
    prompts, images = example("edit")
    folded = replace(mtu, unet=moe.fold(mtu.unet, "edit"))
    ours = generate(mtu, "edit", prompts, images, steps=6, guidance=3.0, image_guidance=1.5, seed=1)[0]
    again = generate(folded, "edit", prompts, images, steps=6, guidance=3.0, image_guidance=1.5, seed=1)[0]
    assert np.abs(np.asarray(ours, dtype=float) - np.asarray(again, dtype=float)).max() <= 2

    unet = diffusers.UNet2DConditionModel(**{k: v for k, v in folded.unet.config.items() if k != "_class_name"})
    unet.load_state_dict(folded.unet.state_dict())
    reader = pytest.importorskip("transformers").CLIPTextModel.from_pretrained(ASSETS / "tiny-mtu/text_encoder").float()
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(ASSETS / "tiny", unet=unet, text_encoder=reader, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.alpha_composite(Image.new("RGBA", images[0].size, "white"), images[0]).convert("RGB").resize((64, 64), Image.BICUBIC)
    theirs = pipe(prompts[0], image=picture, num_inference_steps=6, guidance_scale=3.0, image_guidance_scale=1.5,
                  generator=torch.Generator().manual_seed(1)).images[0]
    assert difference(ours, theirs) < 1


def difference(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """SDXL's structure at reduced widths, random weights, as diffusers and transformers write it; the text towers' vocabulary is assets/tiny's."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "xl"
    tokenizer, second = (transformers.CLIPTokenizer.from_pretrained(ASSETS / "tiny" / "tokenizer") for _ in range(2))
    second.pad_token = "!"
    text = dict(vocab_size=len(tokenizer), num_hidden_layers=3, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    unet = diffusers.UNet2DConditionModel(**dict(CONFIGS["sdxl"], sample_size=8, block_out_channels=(32, 64, 64), attention_head_dim=(2, 4, 4),
                                                 transformer_layers_per_block=(1, 2, 3), cross_attention_dim=32 + 48, addition_time_embed_dim=8,
                                                 projection_class_embeddings_input_dim=24 + 6 * 8))
    with torch.no_grad():  # so that a wrong size or pooled text shows
        unet.add_embedding.linear_2.weight *= 30
    vae = diffusers.AutoencoderKL(block_out_channels=(16, 16, 32, 32), norm_num_groups=8, sample_size=64, scaling_factor=0.13025,
                                  down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                                 timestep_spacing="leading")
    first = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text, hidden_size=32, intermediate_size=64, num_attention_heads=4))
    bigg = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
        **text, hidden_size=48, intermediate_size=96, num_attention_heads=4, projection_dim=24, hidden_act="gelu"))
    diffusers.StableDiffusionXLPipeline(vae, first, bigg, tokenizer, second, unet, scheduler).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("negative", ["", "dog face"])
def test_sdxl_draws_diffusers_picture(sdxl, negative):
    import diffusers
    pipe = quiet(diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl))
    model = load_model(sdxl)
    assert model.diffusion.sampler == "euler" and model.native_size == 64
    for size, guidance in ((64, 5.0), (96, 1.0)):
        theirs = pipe("red apple!", negative_prompt=negative or None, num_inference_steps=6, guidance_scale=guidance, height=64, width=size,
                      generator=torch.Generator().manual_seed(3)).images[0]
        ours = generate(model, "t2i", ["red apple!"], negative_prompt=negative, guidance=guidance, steps=6, seed=3, height=64, width=size)[0]
        assert difference(ours, theirs) < 0.05


def test_a_hub_id_is_downloaded_part_by_part(sdxl, tmp_path, monkeypatch):
    """Through a stand-in for the hub's download call; the same picture as from the folder."""
    import huggingface_hub

    def snapshot_download(name, allow_patterns, ignore_patterns):
        assert name == "owner/xl"
        for file in (f.relative_to(sdxl) for f in sdxl.rglob("*") if f.is_file()):
            if any(file.match(p) for p in allow_patterns) and not any(file.match(p) for p in ignore_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                shutil.copy(sdxl / file, tmp_path / file)
        return tmp_path
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    a, b = (generate(load_model(name), "t2i", ["pizza"], steps=2)[0] for name in (sdxl, "owner/xl"))
    assert a.tobytes() == b.tobytes()


def test_a_model_on_the_hub_that_points_to_its_base_keeps_its_own_unet(tmp_path, monkeypatch):
    import huggingface_hub
    folders = {"owner/mtu": ASSETS / "tiny-mtu", "owner/tiny": ASSETS / "tiny"}
    shutil.copytree(ASSETS / "tiny-mtu", tmp_path / "mtu")
    index = json.loads((tmp_path / "mtu/model_index.json").read_text())
    (tmp_path / "mtu/model_index.json").write_text(json.dumps(index | {"base": "owner/tiny"}))
    folders["owner/mtu"] = tmp_path / "mtu"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **patterns: folders[name])
    assert load_model("owner/mtu").tasks == ["t2i", "edit", "sr", "inpaint"]


@pytest.mark.parametrize("name, task, branches", [("sdxl", "t2i", 2), ("mtu", "edit", 3)])
def test_low_memory_draws_the_same_in_smaller_batches(request, monkeypatch, name, task, branches):
    model = request.getfixturevalue(name)
    model = load_model(model) if name == "sdxl" else model
    sizes, forward, prompts = [], model.unet.forward, ["red apple", "make it a man"]
    images = [open_image(ASSETS / "examples/edit.png")] * 2 if task == "edit" else None
    monkeypatch.setattr(model.unet, "forward", lambda z, *rest: sizes.append(len(z)) or forward(z, *rest))
    plain, saving = (generate(model, task, prompts, images, guidance=2.0, image_guidance=1.5, steps=3, low_memory=low) for low in (False, True))
    assert sizes == [branches * 2] * 3 + [2] * branches * 3
    assert all(difference(a, b) < 0.05 for a, b in zip(plain, saving))


def test_what_does_not_change_keeps_the_sources_pixels(mtu, monkeypatch):
    """Here the right half of the latents changes."""
    picture = on_white(open_image(ASSETS / "examples/edit.png").convert("RGBA"))
    scaled = mtu.vae.encode(to_tensor(picture)[None])[0].detach() * mtu.vae.config["scaling_factor"]
    scaled[..., 8:] = scaled[..., 8:].flip(2)
    monkeypatch.setitem(sample.SAMPLERS, "ddim", lambda *args, **options: scaled)
    lossy, kept = (generate(mtu, "edit", ["make it a man"], [picture], keep_unchanged=keep)[0] for keep in (False, True))
    left, right = (0, 0, 24, 64), (40, 0, 64, 64)
    assert difference(kept.crop(left), picture.crop(left)) < 0.2 < 1 < difference(lossy.crop(left), picture.crop(left))
    assert difference(kept.crop(right), lossy.crop(right)) < difference(kept.crop(right), picture.crop(right)) / 5
    for task, images in (("t2i", None), ("sr", [picture])):
        with pytest.raises(UserError, match=f"{task} has no source"):
            generate(mtu, task, ["pizza"], images, keep_unchanged=True)


def test_low_memory_sends_text_encoders_away_once_they_have_read(tiny, monkeypatch):
    happened, kind = [], type(tiny.text_encoder)
    to, forward = kind.to, kind.forward
    monkeypatch.setattr(kind, "to", lambda self, device: happened.append(f"to {device}") or to(self, device))
    monkeypatch.setattr(kind, "forward", lambda self, ids: happened.append("reads") or forward(self, ids))
    for low in (True, False):
        generate(tiny, "t2i", ["pizza"], steps=1, low_memory=low)
    assert happened == ["to cpu", "reads", "to cpu", "to cpu", "reads"]


def test_an_ensemble_gives_each_step_to_the_copy_of_its_range(tiny):
    called = []

    class Copy:
        def __init__(self, name):
            self.name = name

        def __call__(self, z, t, *args, **kwargs):
            called.append((self.name, int(t[0])))
            return tiny.unet(z, t, *args, **kwargs)
    alone = generate(tiny, "t2i", ["pizza"], steps=8)[0]
    assert generate(tiny, "t2i", ["pizza"], steps=8, ensemble=[Copy(i) for i in range(4)])[0].tobytes() == alone.tobytes()
    assert called == [(t * 4 // 1000, t) for t in tiny.diffusion.timesteps(8)] and {name for name, _ in called} == {0, 1, 2, 3}


def test_half_precision_draws_nearly_the_same(mtu):
    """Weights and arithmetic in bf16."""
    prompts, images = example("edit")
    model = load_model(ASSETS / "tiny-mtu", torch.bfloat16)
    assert {p.dtype for p in model.unet.parameters()} == {p.dtype for p in model.vae.parameters()} == {torch.bfloat16}
    a, b = (generate(m, "edit", prompts, images, steps=4)[0] for m in (mtu, model))
    assert 0 < difference(a, b) < 5


def test_sdxl_is_upcycled_trained_exported_and_opened_by_diffusers(sdxl, tmp_path):
    import diffusers
    for size, path in ((64, "a.png"), (80, "b.png")):
        example("edit")[1][0].convert("RGB").resize((size, size)).save(tmp_path / path)
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(dict(file_name=f, source_file_name=s, text="make it blue", split=split)) + "\n"
                                                     for f, s, split in (("a.png", "b.png", "train"), ("b.png", "a.png", "heldout"))))
    done = called("train.py", "--model", sdxl, "--task", "edit,t2i", "--data", tmp_path, "--steps", 1, "--batch-size", 2, "--eval-size", 1,
               "--sample-every", 0, "--lr", 1e-2, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    done = called("sample.py", "--model", tmp_path / "run", "--export", "edit", "--export-to", tmp_path / "edit")
    assert done.returncode == 0, done.stderr
    pipe = quiet(diffusers.StableDiffusionXLInstructPix2PixPipeline.from_pretrained(tmp_path / "edit"))
    picture = Image.open(tmp_path / "a.png")
    theirs = pipe("make it blue", image=picture, num_inference_steps=4, guidance_scale=3.0, image_guidance_scale=1.5, height=64, width=64,
                  generator=torch.Generator().manual_seed(1)).images[0]
    for model in (tmp_path / "run", tmp_path / "edit"):
        ours = generate(load_model(model), "edit", ["make it blue"], [picture], steps=4, guidance=3.0, image_guidance=1.5, seed=1)[0]
        assert difference(ours, theirs) < 0.5


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_an_exported_task_draws_the_same_in_diffusers(mtu, tmp_path, task):
    import diffusers
    done = called("sample.py", "--export", task, "--export-to", tmp_path / "x")
    assert done.returncode == 0 and "from `../tiny`" in (tmp_path / "x" / "README.md").read_text(), done.stderr
    prompts, images = example(task)
    pipe = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "x"))
    text, image = load_model(tmp_path / "x").guidance.get(task, (1.0, 1.0))
    options = dict(num_inference_steps=4, generator=torch.Generator().manual_seed(0), guidance_scale=text)
    if images:
        picture = Image.alpha_composite(Image.new("RGBA", images[0].size, "white"), images[0]).convert("RGB").resize((64, 64), Image.BICUBIC)
        options |= dict(image=picture, image_guidance_scale=image)
    assert type(pipe).__name__ == ("StableDiffusionInstructPix2PixPipeline" if images else "StableDiffusionPipeline")
    theirs = pipe(prompts[0], **options).images[0]
    for model in (mtu, load_model(tmp_path / "x")):
        assert difference(generate(model, task, prompts, images, steps=4)[0], theirs) < 1
    again = called("sample.py", "--export", task, "--export-to", tmp_path / "x")
    assert again.returncode == 2 and "exists" in again.stderr


@pytest.mark.parametrize("name, sampler", [("EulerAncestralDiscreteScheduler", "euler-a"), ("DPMSolverMultistepScheduler", "dpm++")])
def test_the_folders_scheduler_names_the_sampler(mtu, tmp_path, name, sampler):
    """InstructPix2Pix's own folder names Euler's ancestral one."""
    import diffusers
    from sample import export
    export(mtu, "edit", tmp_path / "x", "tiny")
    scheduler = getattr(diffusers, name).from_config(mtu.scheduler)
    scheduler.save_pretrained(tmp_path / "x" / "scheduler")
    pipe = quiet(diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "x", scheduler=scheduler))
    model = load_model(tmp_path / "x")
    assert model.diffusion.sampler == sampler
    prompts, images = example("edit")
    picture = Image.alpha_composite(Image.new("RGBA", images[0].size, "white"), images[0]).convert("RGB").resize((64, 64), Image.BICUBIC)
    theirs = pipe(prompts[0], image=picture, num_inference_steps=6, guidance_scale=3.0, image_guidance_scale=1.5,
                  generator=torch.Generator().manual_seed(1)).images[0]
    ours = generate(model, "edit", prompts, images, steps=6, guidance=3.0, image_guidance=1.5, seed=1)[0]
    assert difference(ours, theirs) < 1


@pytest.mark.parametrize("task", ALL)
def test_same_seed_same_bytes_and_other_seed_other_picture(mtu, task):
    prompts, images = example(task)
    a, b, c = (generate(mtu, task, prompts, images, steps=4, seed=seed)[0] for seed in (0, 0, 1))
    assert a.tobytes() == b.tobytes() != c.tobytes()


def test_a_picture_does_not_depend_on_its_batch(mtu):
    prompts, images = example("edit")
    batch = generate(mtu, "edit", prompts * 3, images * 3, steps=4, seed=5)
    alone = generate(mtu, "edit", prompts, images, steps=4, seed=6)[0]
    assert np.abs(np.asarray(batch[1], dtype=int) - np.asarray(alone, dtype=int)).max() <= 2


def test_guidance_of_one_is_the_conditional_model(mtu):
    """Three branches at scales 1, 1 (forced by a hair) give what one branch gives."""
    prompts, images = example("edit")
    one = generate(mtu, "edit", prompts, images, steps=4, guidance=1.0, image_guidance=1.0)[0]
    three = generate(mtu, "edit", prompts, images, steps=4, guidance=1.0 + 1e-7, image_guidance=1.0)[0]
    assert np.abs(np.asarray(one, dtype=int) - np.asarray(three, dtype=int)).max() <= 2


def test_strength_keeps_or_changes_the_picture(mtu):
    image = open_image(ASSETS / "examples" / "edit.png")

    def distance(strength):
        out = generate(mtu, "t2i", ["red apple, google style"], [image], strength=strength, steps=10)[0]
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB").resize(out.size)
        return np.abs(np.asarray(out, dtype=float) - np.asarray(flat, dtype=float)).mean()

    assert distance(0.1) < 0.5 * distance(1.0)


@pytest.mark.parametrize("size", [(64, 96), (48, 40)])
def test_sizes(mtu, size):
    assert generate(mtu, "t2i", ["x"], height=size[0], width=size[1], steps=1)[0].size == size[::-1]


def test_a_picture_keeps_its_shape(mtu):
    assert generate(mtu, "sr", [""], [Image.new("RGBA", (300, 150), "red")], steps=1)[0].size == (64, 32)


def test_the_command(tmp_path):
    out = tmp_path / "a" / "b.png"
    done = called("sample.py", "--task", "edit", "--steps", 3, "--num-images", 2, "--out", out, "--trajectory")
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    picture = Image.open(out)
    assert picture.size in ((64, 128), (128, 64)) and json.loads(picture.text["arguments"])["steps"] == 3
    assert Image.open(tmp_path / "a" / "b-trajectory.png").size == (3 * 64, 2 * 64)
    assert Image.open(tmp_path / "a" / "b-trajectory.gif").n_frames == 3


def test_several_prompts_make_a_grid_with_a_row_each(tmp_path):
    out = tmp_path / "grid.png"
    done = called("sample.py", "--task", "t2i", "--steps", 1, "--num-images", 3, "--prompt", "red apple", "--prompt", "blue book", "--out", out)
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size == (3 * 64, 2 * 64) and "'red apple', 'blue book'" in done.stdout


def test_a_prompt_alone_meets_the_shipped_picture(tmp_path):
    done = called("sample.py", "--task", "edit", "--steps", 1, "--prompt", "make it a man", "--out", tmp_path / "a.png")
    assert done.returncode == 0 and "edit.png" in done.stdout


def test_long_prompts_warn(mtu, capsys):
    generate(mtu, "t2i", ["apple " * 80 + "zebra"], steps=1)
    assert "zebra" in capsys.readouterr().err


BROKEN = ["nothing.png", "text.png", "cut.png"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    (folder / "text.png").write_text("hello")
    (folder / "cut.png").write_bytes((ASSETS / "examples" / "edit.png").read_bytes()[:100])
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_named(broken, name):
    with pytest.raises(UserError, match=name):
        open_image(broken / name)


@pytest.mark.parametrize("options, words", [
    (dict(task="colorize"), "t2i, edit, sr, inpaint"), (dict(task="edit", images=None, strength=None), "--image"), (dict(strength=None), "strength"), (dict(strength=float("nan")), "strength"), (dict(height=60), "multiples of 8"),
    (dict(height=-8), "multiples of 8"), (dict(steps=0), "steps"), (dict(steps=2000), "steps"), (dict(eta=2.0), "eta"),
    (dict(guidance=float("nan")), "finite"), (dict(strength=0.5, images=None), "picture"), (dict(strength=0.0), "strength"), (dict(strength=1.5), "strength")])
def test_bad_requests_are_refused(mtu, options, words):
    arguments = dict(task="t2i", images=[Image.new("RGB", (64, 64))], strength=0.5, steps=10) | options
    with pytest.raises(UserError, match=words):
        generate(mtu, prompts=["x"], **arguments)


@pytest.mark.parametrize("arguments, words", [
    (["--image", "nothing.png", "--task", "edit"], "nothing.png"), (["--model", "no/such/folder"], "no/such/folder"),
    (["--task", "colorize"], "colorize"), (["--out", "a.jpg"], "a.jpg"), (["--num-images", "0"], "--num-images"), (["--seed", "-1"], "--seed"),
    (["--device", "nonsense"], "nonsense")])
def test_a_mistake_is_one_line_and_exit_2(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    done = called("sample.py", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_base_knows_only_text_to_image(tiny):
    with pytest.raises(UserError, match="t2i"):
        generate(tiny, "edit", ["x"], [Image.new("RGB", (64, 64))])


@pytest.mark.parametrize("like, images", [("t2i", None), ("edit", [Image.new("RGB", (64, 64))])])
def test_a_task_added_later_draws_as_its_model_did(mtu, like, images):
    model = replace(mtu, unet=copy.deepcopy(mtu.unet), index=mtu.index | {"guidance": {}})
    moe.add_task(model.unet, "later", like=like)
    drawn, before = (np.asarray(generate(model, task, ["pizza"], images, steps=2)[0]) for task in ("later", like))
    assert np.array_equal(drawn, before)


@pytest.mark.parametrize("part, changed, words", [
    ("unet", lambda: UNet(CONFIGS["tiny"] | dict(in_channels=9)), "9 input channels"),
    ("unet", lambda: UNet(CONFIGS["tiny"] | dict(in_channels=3, out_channels=3)), "latent_channels"),
    ("unet", lambda: UNet(CONFIGS["tiny"] | dict(cross_attention_dim=32)), "hidden_size"),
    ("unet", lambda: UNet(CONFIGS["tiny"] | dict(sample_size=None)), "sample_size"),
    ("text_encoder", lambda: CLIPText(TEXT["tiny"] | dict(vocab_size=100, eos_token_id=99, bos_token_id=98)), "vocabulary"),
    ("text_encoder", lambda: CLIPText(TEXT["tiny"] | dict(vocab_size=2048, max_position_embeddings=16)), "positions")])
def test_parts_that_do_not_fit_are_named(tmp_path, part, changed, words):
    shutil.copytree(ASSETS / "tiny", tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    changed().save_pretrained(tmp_path / "model" / part)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "model")


def test_a_cut_checkpoint_is_named(tmp_path):
    shutil.copytree(ASSETS / "tiny", tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors"):
        load_model(tmp_path / "model")
