"""Drawing: diffusers' picture, the shipped models, seeds, sizes, folders, bad input."""
import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import moe
from clip import CONFIGS as TEXT, CLIPText
from conftest import call
from data import ALL, ASSETS, EXAMPLES, on_white, open_image
from hub import UserError
from sample import generate, load_model
from unet import CONFIGS, UNet


@pytest.fixture(scope="module")
def tiny():
    return load_model(ASSETS / "tiny")


@pytest.fixture(scope="module")
def mtu():
    return load_model(ASSETS / "tiny-mtu")


def example(task):
    """The prompt and the picture, or None, that a task draws without arguments."""
    image, prompt = EXAMPLES[task]
    return prompt, open_image(ASSETS / "examples" / image) if image else None


def flat(picture, size=(64, 64)):
    """What diffusers is given: the picture on white, at the model's size."""
    return on_white(picture.convert("RGBA")).resize(size, Image.BICUBIC)


def difference(a, b):
    """Mean absolute difference of two pictures, of 255."""
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed):
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------------------
# The same picture as diffusers

@pytest.mark.parametrize("prompt, guidance", [("red apple, google style", 7.5), ("", 1.0)])
def test_the_shipped_base_draws_diffusers_picture(tiny, prompt, guidance):
    diffusers = pytest.importorskip("diffusers")
    pipe = quiet(diffusers.StableDiffusionPipeline.from_pretrained(ASSETS / "tiny"))
    theirs = pipe(prompt, num_inference_steps=8, guidance_scale=guidance,
                  generator=generator(3)).images[0]
    ours = generate(tiny, "t2i", prompt, guidance=guidance, steps=8, seed=3)[0]
    assert difference(ours, theirs) < 1


def test_a_folded_edit_draws_the_same_and_what_instruct_pix2pix_draws(mtu):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    prompt, image = example("edit")
    folded = replace(mtu, unet=moe.fold(mtu.unet, "edit"))
    options = dict(steps=6, guidance=3.0, image_guidance=1.5, seed=1)
    ours = generate(mtu, "edit", prompt, image, **options)[0]
    again = generate(folded, "edit", prompt, image, **options)[0]
    assert np.abs(np.asarray(ours, dtype=int) - np.asarray(again, dtype=int)).max() <= 2

    config = {k: v for k, v in folded.unet.config.items() if k != "_class_name"}
    unet = diffusers.UNet2DConditionModel(**config)
    unet.load_state_dict(folded.unet.state_dict())
    folder = ASSETS / "tiny-mtu" / "text_encoder"
    reader = transformers.CLIPTextModel.from_pretrained(folder).float()
    pipe = quiet(diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
        ASSETS / "tiny", unet=unet, text_encoder=reader, low_cpu_mem_usage=False))
    theirs = pipe(prompt, image=flat(image), num_inference_steps=6, guidance_scale=3.0,
                  image_guidance_scale=1.5, generator=generator(1)).images[0]
    assert difference(ours, theirs) < 1


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """SDXL's structure at reduced widths, random weights, as diffusers and transformers write it.

    The vocabulary of its text towers is assets/tiny's.
    """
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "xl"
    first_tokenizer, second_tokenizer = (
        transformers.CLIPTokenizer.from_pretrained(ASSETS / "tiny" / "tokenizer") for _ in range(2))
    second_tokenizer.pad_token = "!"
    text = dict(vocab_size=len(first_tokenizer), num_hidden_layers=3,
                bos_token_id=first_tokenizer.bos_token_id,
                eos_token_id=first_tokenizer.eos_token_id, num_attention_heads=4)
    unet = diffusers.UNet2DConditionModel(**CONFIGS["sdxl"] | dict(
        sample_size=8, block_out_channels=(32, 64, 64), attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 2, 3), cross_attention_dim=32 + 48,
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 6 * 8))
    with torch.no_grad():
        unet.add_embedding.linear_2.weight *= 30  # so that a wrong size or pooled text shows
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 32, 32), norm_num_groups=8, sample_size=64,
        scaling_factor=0.13025, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading")
    first = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        **text, hidden_size=32, intermediate_size=64))
    second = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
        **text, hidden_size=48, intermediate_size=96, projection_dim=24, hidden_act="gelu"))
    diffusers.StableDiffusionXLPipeline(vae, first, second, first_tokenizer, second_tokenizer, unet,
                                        scheduler).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("negative", ["", "dog face"])
def test_sdxl_draws_diffusers_picture(sdxl, negative):
    import diffusers
    pipe = quiet(diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl))
    model = load_model(sdxl)
    assert model.diffusion.sampler == "euler" and model.native_size == 64
    for width, guidance in ((64, 5.0), (96, 1.0)):
        theirs = pipe("red apple!", negative_prompt=negative or None, num_inference_steps=6,
                      guidance_scale=guidance, height=64, width=width,
                      generator=generator(3)).images[0]
        ours = generate(model, "t2i", "red apple!", negative_prompt=negative, guidance=guidance,
                        steps=6, seed=3, height=64, width=width)[0]
        assert difference(ours, theirs) < 0.05


@pytest.mark.parametrize("name, sampler", [("EulerAncestralDiscreteScheduler", "euler-a"),
                                           ("DPMSolverMultistepScheduler", "dpm++")])
def test_the_folders_scheduler_names_the_sampler(tmp_path, name, sampler):
    """InstructPix2Pix's own folder names Euler's ancestral one."""
    import diffusers
    done = call("moe.py", "--fold", "edit", "--model", ASSETS / "tiny-mtu", "--out", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    scheduler = getattr(diffusers, name).from_config(load_model(tmp_path / "x").scheduler)
    scheduler.save_pretrained(tmp_path / "x" / "scheduler")
    pipe = quiet(diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
        tmp_path / "x", scheduler=scheduler))
    model = load_model(tmp_path / "x")
    assert model.diffusion.sampler == sampler
    prompt, image = example("edit")
    theirs = pipe(prompt, image=flat(image), num_inference_steps=6, guidance_scale=3.0,
                  image_guidance_scale=1.5, generator=generator(1)).images[0]
    ours = generate(model, "edit", prompt, image, steps=6, guidance=3.0, image_guidance=1.5,
                    seed=1)[0]
    assert difference(ours, theirs) < 1


def test_a_scheduler_that_is_not_implemented_matters_only_for_its_own_stepping(tmp_path, tiny):
    shutil.copytree(ASSETS / "tiny", tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"_class_name": "UniPCMultistepScheduler"}
    path.write_text(json.dumps(config))
    model = load_model(tmp_path / "model")
    with pytest.raises(UserError, match="UniPC.*--sampler"):
        generate(model, "t2i", "red apple", steps=2)
    a = generate(model, "t2i", "red apple", steps=2, sampler="ddim")[0]
    assert a.tobytes() == generate(tiny, "t2i", "red apple", steps=2, sampler="ddim")[0].tobytes()


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_a_folded_task_draws_the_same_in_diffusers(mtu, tmp_path, task):
    import diffusers
    words = ["moe.py", "--fold", task, "--model", ASSETS / "tiny-mtu", "--out", tmp_path / "x"]
    done = call(*words)
    assert done.returncode == 0, done.stderr
    prompt, image = example(task)
    pipe = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "x"))
    text_scale, image_scale = load_model(tmp_path / "x").guidance.get(task, (1.0, 1.0))
    options = dict(num_inference_steps=4, generator=generator(0), guidance_scale=text_scale)
    if image:
        options |= dict(image=flat(image), image_guidance_scale=image_scale)
    kind = "StableDiffusionInstructPix2PixPipeline" if image else "StableDiffusionPipeline"
    assert type(pipe).__name__ == kind
    theirs = pipe(prompt, **options).images[0]
    for model in (mtu, load_model(tmp_path / "x")):
        assert difference(generate(model, task, prompt, image, steps=4)[0], theirs) < 1
    again = call(*words)
    assert again.returncode == 2 and "exists" in again.stderr


def test_sdxl_is_upcycled_trained_folded_and_opened_by_diffusers(sdxl, tmp_path):
    import diffusers
    for size, name in ((64, "a.png"), (80, "b.png")):
        example("edit")[1].convert("RGB").resize((size, size)).save(tmp_path / name)
    rows = [dict(file_name="a.png", source_file_name="b.png", text="make it blue", split="train"),
            dict(file_name="b.png", source_file_name="a.png", text="make it blue", split="heldout")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = call("train.py", "--model", sdxl, "--task", "edit,t2i", "--data", tmp_path,
                "--steps", 1, "--batch-size", 2, "--eval-size", 1, "--sample-every", 0,
                "--lr", 1e-2, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    done = call("moe.py", "--fold", "edit", "--model", tmp_path / "run", "--out", tmp_path / "edit")
    assert done.returncode == 0, done.stderr
    pipe = quiet(diffusers.StableDiffusionXLInstructPix2PixPipeline.from_pretrained(
        tmp_path / "edit"))
    picture = Image.open(tmp_path / "a.png")
    theirs = pipe("make it blue", image=picture, num_inference_steps=4, guidance_scale=3.0,
                  image_guidance_scale=1.5, height=64, width=64, generator=generator(1)).images[0]
    for folder in (tmp_path / "run", tmp_path / "edit"):
        ours = generate(load_model(folder), "edit", "make it blue", picture, steps=4, guidance=3.0,
                        image_guidance=1.5, seed=1)[0]
        assert difference(ours, theirs) < 0.5


# -------------------------------------------------------------------------------------------------
# The hub, by a stand-in for its download call

def test_a_hub_id_is_downloaded_part_by_part(sdxl, tmp_path, monkeypatch):
    import huggingface_hub

    def snapshot_download(name, allow_patterns, ignore_patterns):
        assert name == "owner/xl"
        for file in (path.relative_to(sdxl) for path in sdxl.rglob("*") if path.is_file()):
            allowed = any(file.match(pattern) for pattern in allow_patterns)
            if allowed and not any(file.match(pattern) for pattern in ignore_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                shutil.copy(sdxl / file, tmp_path / file)
        return tmp_path
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    a, b = (generate(load_model(name), "t2i", "pizza", steps=2)[0] for name in (sdxl, "owner/xl"))
    assert a.tobytes() == b.tobytes()


def test_a_model_on_the_hub_that_names_its_base_keeps_its_own_unet(tmp_path, monkeypatch):
    import huggingface_hub
    shutil.copytree(ASSETS / "tiny-mtu", tmp_path / "mtu")
    path = tmp_path / "mtu" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": "owner/tiny"}))
    folders = {"owner/mtu": tmp_path / "mtu", "owner/tiny": ASSETS / "tiny"}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: folders[name])
    assert load_model("owner/mtu").tasks == ["t2i", "edit", "sr", "inpaint"]


# -------------------------------------------------------------------------------------------------
# Properties of a drawing

def test_an_ensemble_gives_each_step_to_the_copy_of_its_range(tiny):
    calls = []

    class Copy:
        def __init__(self, name):
            self.name = name

        def __call__(self, z, t, *args, **options):
            calls.append((self.name, int(t[0])))
            return tiny.unet(z, t, *args, **options)
    alone = generate(tiny, "t2i", "pizza", steps=8)[0]
    together = generate(tiny, "t2i", "pizza", steps=8, ensemble=[Copy(i) for i in range(4)])[0]
    assert together.tobytes() == alone.tobytes()
    assert calls == [(t * 4 // 1000, t) for t in tiny.diffusion.timesteps(8)]
    assert {name for name, _ in calls} == {0, 1, 2, 3}


def test_half_precision_draws_nearly_the_same(mtu):
    """Weights and arithmetic in bf16."""
    prompt, image = example("edit")
    model = load_model(ASSETS / "tiny-mtu", torch.bfloat16)
    assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.bfloat16}
    a, b = (generate(each, "edit", prompt, image, steps=4)[0] for each in (mtu, model))
    assert 0 < difference(a, b) < 5


@pytest.mark.parametrize("task", ALL)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_picture(mtu, task):
    prompt, image = example(task)
    a, b, c = (generate(mtu, task, prompt, image, steps=4, seed=seed)[0] for seed in (0, 0, 1))
    assert a.tobytes() == b.tobytes() != c.tobytes()


def test_a_picture_does_not_depend_on_its_batch(mtu):
    prompt, image = example("edit")
    batch = generate(mtu, "edit", [prompt] * 3, [image] * 3, steps=4, seed=5)
    alone = generate(mtu, "edit", prompt, image, steps=4, seed=6)[0]
    assert np.abs(np.asarray(batch[1], dtype=int) - np.asarray(alone, dtype=int)).max() <= 2


def test_guidance_of_at_most_one_is_the_conditional_model(mtu):
    """Three branches at scales 1, 1 (forced by a hair) give what one branch gives, as 0 does."""
    prompt, image = example("edit")

    def draw(guidance):
        return generate(mtu, "edit", prompt, image, steps=4, guidance=guidance, image_guidance=1.0)[0]
    one, zero, three = (np.asarray(draw(g), dtype=int) for g in (1.0, 0.0, 1.0 + 1e-7))
    assert (one == zero).all() and np.abs(one - three).max() <= 2


def test_strength_keeps_or_changes_the_picture(mtu):
    image = example("edit")[1]

    def distance(strength):
        drawn = generate(mtu, "t2i", "red apple, google style", image, strength=strength, steps=10)
        return difference(drawn[0], flat(image))
    assert distance(0.1) < 0.5 * distance(1.0)


@pytest.mark.parametrize("size", [(64, 96), (48, 40)])
def test_sizes(mtu, size):
    picture = generate(mtu, "t2i", "x", height=size[0], width=size[1], steps=1)[0]
    assert picture.size == size[::-1]


def test_a_picture_keeps_its_shape(mtu):
    wide = Image.new("RGBA", (300, 150), "red")
    assert generate(mtu, "sr", "", wide, steps=1)[0].size == (64, 32)


def test_long_prompts_warn(mtu, capsys):
    generate(mtu, "t2i", "apple " * 80 + "zebra", steps=1)
    assert "zebra" in capsys.readouterr().err


@pytest.mark.parametrize("like", ["t2i", "edit"])
def test_a_task_added_later_draws_as_its_model_did(mtu, like):
    image = Image.new("RGB", (64, 64)) if like == "edit" else None
    model = replace(mtu, unet=copy.deepcopy(mtu.unet), index=mtu.index | {"guidance": {}})
    moe.add_task(model.unet, "later", like=like)
    drawn, before = (np.asarray(generate(model, task, "pizza", image, steps=2)[0])
                     for task in ("later", like))
    assert np.array_equal(drawn, before)


# -------------------------------------------------------------------------------------------------
# The command

def test_the_command_writes_a_picture_a_strip_and_a_gif(tmp_path):
    out = tmp_path / "a" / "b.png"
    done = call("sample.py", "--task", "edit", "--steps", 3, "--num-images", 2, "--out", out,
                "--trajectory")
    assert done.returncode == 0 and str(out) in done.stdout, done.stderr
    picture = Image.open(out)
    assert picture.size in ((64, 128), (128, 64))
    assert json.loads(picture.text["arguments"])["steps"] == 3
    assert Image.open(tmp_path / "a" / "b-trajectory.png").size == (3 * 64, 2 * 64)
    assert Image.open(tmp_path / "a" / "b-trajectory.gif").n_frames == 3


def test_side_by_side_shows_the_source_and_the_result(tmp_path):
    words = ["sample.py", "--task", "edit", "--steps", 1]
    for name, option in (("a", []), ("b", ["--side-by-side"])):
        done = call(*words, *option, "--out", tmp_path / f"{name}.png")
        assert done.returncode == 0, done.stderr
    alone, both = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab")
    assert both.shape == (64, 128, 3) and (both[:, 64:] == alone).all()
    assert (both[:, :64] == np.asarray(flat(example("edit")[1]))).all()


def test_several_prompts_make_a_grid_with_a_row_each(tmp_path):
    out = tmp_path / "grid.png"
    done = call("sample.py", "--task", "t2i", "--steps", 1, "--num-images", 3, "--out", out,
                "--prompt", "red apple", "--prompt", "blue book")
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size == (3 * 64, 2 * 64)
    assert "'red apple', 'blue book'" in done.stdout


def test_a_prompt_alone_meets_the_shipped_picture(tmp_path):
    done = call("sample.py", "--task", "edit", "--steps", 1, "--prompt", "make it a man",
                "--out", tmp_path / "a.png")
    assert done.returncode == 0 and "edit.png" in done.stdout


def test_an_examples_instruction_is_never_applied_to_ones_own_picture(tmp_path):
    image = ASSETS / "examples" / "sr.png"
    words = ["sample.py", "--steps", 1, "--image", image, "--out", tmp_path / "a.png"]
    done = call(*words, "--task", "edit")
    assert done.returncode == 2 and "--prompt" in done.stderr and not list(tmp_path.iterdir())
    assert call(*words, "--task", "sr").returncode == 0


@pytest.mark.parametrize("arguments, words", [
    (["--image", "nothing.png", "--task", "edit", "--prompt", "x"], "nothing.png"),
    (["--model", "no/such/folder"], "no/such/folder"),
    (["--task", "colorize"], "colorize"),
    (["--out", "a.jpg"], "a.jpg"),
    (["--num-images", "0"], "--num-images"),
    (["--seed", "-1"], "--seed"),
    (["--steps", "1e9"], "--steps"),
    (["--device", "nonsense"], "nonsense")])
def test_a_mistake_is_one_line_and_exit_2(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    done = call("sample.py", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and words in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options, words", [
    (dict(task="colorize"), "t2i, edit, sr, inpaint"),
    (dict(task="edit", images=None, strength=None), "--image"),
    (dict(strength=None), "strength"),
    (dict(strength=float("nan")), "strength"),
    (dict(strength=0.5, images=None), "picture"),
    (dict(strength=0.0), "strength"),
    (dict(strength=1.5), "strength"),
    (dict(height=60), "multiples of 8"),
    (dict(height=-8), "multiples of 8"),
    (dict(steps=0), "steps"),
    (dict(steps=2000), "steps"),
    (dict(eta=2.0), "eta"),
    (dict(sampler="magic"), "magic"),
    (dict(guidance=float("nan")), "finite")])
def test_bad_requests_are_refused(mtu, options, words):
    image = [Image.new("RGB", (64, 64))]
    arguments = dict(task="t2i", images=image, strength=0.5, steps=10) | options
    with pytest.raises(UserError, match=words):
        generate(mtu, prompts=["x"], **arguments)


def test_the_base_knows_only_text_to_image(tiny):
    with pytest.raises(UserError, match="t2i"):
        generate(tiny, "edit", "x", Image.new("RGB", (64, 64)))


# -------------------------------------------------------------------------------------------------
# Folders that are wrong

@pytest.mark.parametrize("part, config, words", [
    ("unet", dict(in_channels=9), "9 input channels"),
    ("unet", dict(in_channels=3, out_channels=3), "latent_channels"),
    ("unet", dict(cross_attention_dim=32), "hidden_size"),
    ("unet", dict(sample_size=None), "sample_size"),
    ("text_encoder", dict(vocab_size=100, eos_token_id=99, bos_token_id=98), "words"),
    ("text_encoder", dict(vocab_size=2048, max_position_embeddings=16), "positions")])
def test_parts_that_do_not_fit_are_named(tmp_path, part, config, words):
    shutil.copytree(ASSETS / "tiny", tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    network = UNet(CONFIGS["tiny"] | config) if part == "unet" else CLIPText(TEXT["tiny"] | config)
    network.save_pretrained(tmp_path / "model" / part)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "model")


def test_a_cut_checkpoint_is_named(tmp_path):
    shutil.copytree(ASSETS / "tiny", tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors"):
        load_model(tmp_path / "model")
